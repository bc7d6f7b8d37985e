#include "copy_task.h"

#include "prefetch.h"
#include "copy.h"
#include "sigbus_guard.h"

/* Copying a slice takes about 15 us: long compared with taking the lock, and short compared with the time that two
 * threads may then wait for each other. */
enum { SLICE_BYTES = 128 << 10 };

tc_slice tc_copy_task_slice(tc_copy_task *task) {
    tc_slice slice = {task->n_started, task->n_started};
    for (size_t n_bytes = 0; slice.stop < task->n && n_bytes < SLICE_BYTES; slice.stop++) n_bytes += task->refs[slice.stop].n_bytes + LINE;
    task->n_started = slice.stop;
    return slice;
}

static inline void prefetch_object(const tc_ref *ref) { prefetch_row((const uint8_t *)(uintptr_t)ref->address, ref->n_bytes); }

int tc_copy_task_run(const tc_copy_task *task, tc_slice slice) {
    if (tc_guard_enter()) return TC_EIO;
    if (slice.first < slice.stop) prefetch_object(&task->refs[slice.first]);
    for (size_t i = slice.first; i < slice.stop; i++) {
        if (i + 1 < task->n) prefetch_object(&task->refs[i + 1]);
        tc_copy((uint8_t *)task->destinations[i], (const uint8_t *)(uintptr_t)task->refs[i].address, task->refs[i].n_bytes);
    }
    tc_guard_leave();
    return 0;
}
