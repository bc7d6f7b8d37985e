#include "guard.h"

#include <pthread.h>
#include <signal.h>
#include <stddef.h>

__thread tc_guard tc_guard_here;

static struct sigaction previous;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void on_sigbus(int number, siginfo_t *info, void *context) {
    if (tc_guard_here.armed) {
        tc_guard_here.armed = 0;
        siglongjmp(tc_guard_here.jump, 1);
    }
    /* Not ours: the earlier handler is called in place (it may be another extension's guard, armed for this thread, or faulthandler's).
     * Where there was none, the default is restored and the faulting instruction runs again, so that the core dump shows it. */
    if (previous.sa_flags & SA_SIGINFO)
        previous.sa_sigaction(number, info, context);
    else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN)
        previous.sa_handler(number);
    else
        sigaction(SIGBUS, &previous, NULL);
}

static void install(void) {
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &previous);
}

/* Once a process and never again: handlers that come later chain to ours, and installing anew would make the chain a ring. */
void tc_guard_install(void) { pthread_once(&once, install); }
