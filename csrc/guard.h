/* SIGBUS guard: a mapped file that was truncated under us, or a sector that cannot be read, is an error and not a dead process.
 *
 *   if (tc_guard_enter()) return TC_EIO;   (the mapping failed; the guard is already left)
 *   ...touch the mapping; take no locks, allocate nothing that must be freed...
 *   tc_guard_leave();
 *
 * tc_guard_enter is a macro because a jump buffer must be set in the frame that is jumped back to. Locals that change between enter and a
 * fault and are read after it must be volatile. Guards are a thread's own and do not nest. Each enter sees to it that our handler is the
 * one that is called first (one system call), for others come and go: whoever enables faulthandler later puts its own above ours, and
 * puts ours, or an older one, back when it has dumped. A fault that is not ours goes to all the others.
 */
#ifndef TC_GUARD_H
#define TC_GUARD_H
#include <setjmp.h>

#define TC_EIO (-5) /* the mapping could not be read */

typedef struct {
    sigjmp_buf jump;
    volatile int armed;
} tc_guard;

extern __thread tc_guard tc_guard_here;

/* Make ours the process's handler, unless it is. */
void tc_guard_install(void);

/* Armed only once the jump buffer is set: a fault between the two would jump into the last guard's dead frame. */
#define tc_guard_enter() (tc_guard_install(), sigsetjmp(tc_guard_here.jump, 0) != 0 || (tc_guard_here.armed = 1, 0))
#define tc_guard_leave() ((void)(tc_guard_here.armed = 0))

#endif
