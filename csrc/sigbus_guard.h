#ifndef TC_SIGBUS_GUARD_H
#define TC_SIGBUS_GUARD_H
/* SIGBUS guard: turns a read of a truncated mapped file, or of an unreadable disk sector, into an error instead of the
 * end of the process.
 *
 *   if (tc_guard_enter()) return TC_EIO;   (the mapping failed; the guard is already left)
 *   ...read the mapping; take no locks and allocate nothing that must be freed...
 *   tc_guard_leave();
 *
 * tc_guard_enter is a macro because sigsetjmp must run in the frame that the handler jumps back to. A local variable
 * that changes after tc_guard_enter and is read after a fault must be volatile. Each thread has its own guard, and
 * guards do not nest. Each tc_guard_enter makes sure, with one system call, that our handler is installed, because
 * other handlers come and go: faulthandler, when it is enabled later, replaces ours, and after a dump it restores ours
 * or an older one. A SIGBUS outside a guard is passed to the handlers that ours replaced.
 */
#include <setjmp.h>

#define TC_EIO (-5) /* The mapping could not be read. */

typedef struct {
    sigjmp_buf jump;
    volatile int armed;
} tc_guard;

extern __thread tc_guard tc_guard_here;

/* Install our SIGBUS handler, unless it is installed already. */
void tc_guard_install(void);

/* `armed` is set after the jump buffer: a fault between the two would otherwise jump into the dead frame of the
 * previous guard. */
#define tc_guard_enter() (tc_guard_install(), sigsetjmp(tc_guard_here.jump, 0) != 0 || (tc_guard_here.armed = 1, 0))
#define tc_guard_leave() ((void)(tc_guard_here.armed = 0))


#endif
