#include "guard.h"

#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>

typedef void (*handler)(int, siginfo_t *, void *); /* a plain handler is called with more than it takes, which does no harm */

enum { MOST_HANDLERS = 16 };

__thread tc_guard tc_guard_here;

/* Whoever's handler ours was put in the place of, oldest first. Each is kept but once: two guards that take turns (each extension has its
 * own) or an older handler that is put back (faulthandler does so when it has dumped) must neither make a ring nor push another out. */
static _Atomic(handler) others[MOST_HANDLERS];
/* How many of them this thread has asked about the fault that it is in. */
static __thread int n_asked;

static void on_sigbus(int number, siginfo_t *info, void *context) {
    if (tc_guard_here.armed) {
        tc_guard_here.armed = 0;
        siglongjmp(tc_guard_here.jump, 1);
    }
    /* Not ours: the others are called in place, one after the other (one may be another extension's guard, armed for this thread, or
     * faulthandler's). After the last the default is restored and the faulting instruction runs again, so that the core dump shows it. */
    handler other = n_asked < MOST_HANDLERS ? atomic_load(&others[n_asked]) : NULL;
    if (other == NULL) {
        signal(SIGBUS, SIG_DFL);
        return;
    }
    n_asked++;
    other(number, info, context);
}

static int is_ours(const struct sigaction *action) { return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == on_sigbus; }

static void keep(const struct sigaction *found) {
    handler other = (found->sa_flags & SA_SIGINFO) ? found->sa_sigaction : (handler)(void *)found->sa_handler;
    if (found->sa_handler == SIG_DFL || found->sa_handler == SIG_IGN) return;
    for (int i = 0; i < MOST_HANDLERS; i++) {
        handler none = NULL;
        if (atomic_compare_exchange_strong(&others[i], &none, other) || none == other) return;
    }
}

void tc_guard_install(void) {
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER}, found;
    n_asked = 0; /* a guard that jumped out of a handler left it as it was */
    if (sigaction(SIGBUS, NULL, &found) || is_ours(&found)) return;
    sigemptyset(&action.sa_mask);
    keep(&found);
    sigaction(SIGBUS, &action, NULL);
}
