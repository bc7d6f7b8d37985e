#include "sigbus_guard.h"

#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>

typedef void (*handler)(int, siginfo_t *, void *); /* A handler without SA_SIGINFO is called with more arguments than it takes, which is harmless. */

enum { MAX_HANDLERS = 16 };

__thread tc_guard tc_guard_here;

/* Handlers that ours replaced, oldest first. Each handler is stored once: two guards that replace each other in turns
 * (each extension has its own), or an older handler that is restored (faulthandler does so after a dump), must neither
 * form a cycle nor fill the array. */
static _Atomic(handler) replaced_handlers[MAX_HANDLERS];
/* Number of handlers that this thread has called for the current fault. */
static __thread int n_called;

static void on_sigbus(int number, siginfo_t *info, void *context) {
    if (tc_guard_here.armed) {
        tc_guard_here.armed = 0;
        siglongjmp(tc_guard_here.jump, 1);
    }
    /* Not our fault: the other handlers are called one after the other (one of them may be another extension's guard
     * that is armed for this thread, or faulthandler's). After the last one, the default action is restored and the
     * faulting instruction runs again, so that the core dump shows it. */
    handler other = n_called < MAX_HANDLERS ? atomic_load(&replaced_handlers[n_called]) : NULL;
    if (other == NULL) {
        signal(SIGBUS, SIG_DFL);
        return;
    }
    n_called++;
    other(number, info, context);
}

static int is_ours(const struct sigaction *action) { return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == on_sigbus; }

static void remember_handler(const struct sigaction *found) {
    handler other = (found->sa_flags & SA_SIGINFO) ? found->sa_sigaction : (handler)(void *)found->sa_handler;
    if (found->sa_handler == SIG_DFL || found->sa_handler == SIG_IGN) return;
    for (int i = 0; i < MAX_HANDLERS; i++) {
        handler none = NULL;
        if (atomic_compare_exchange_strong(&replaced_handlers[i], &none, other) || none == other) return;
    }
}

void tc_guard_install(void) {
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER}, found;
    n_called = 0; /* A guard that jumped out of a handler has left the counter as it was. */
    if (sigaction(SIGBUS, NULL, &found) || is_ours(&found)) return;
    sigemptyset(&action.sa_mask);
    remember_handler(&found);
    sigaction(SIGBUS, &action, NULL);
}
