#ifndef TC_COPY_TASK_H
#define TC_COPY_TASK_H
/* Copy task: objects whose memory the consumer has allocated. All threads of a ring copy the objects from their
 * sources, slice by slice. */
#include "gather.h"

/* The caller owns the task, refs, destinations and the sources until the task is finished or cancelled. The ring's lock
 * guards the fields below the line. */
typedef struct tc_copy_task {
    const tc_ref *refs; /* [n] Source of each object. */
    char **destinations;      /* [n] Destination of each object: refs[i].n_bytes bytes. */
    size_t n;
    /* ---- */
    size_t n_started;   /* Objects before this index are copied or being copied. */
    size_t n_running; /* Number of slices that threads are copying. */
    int status;     /* 0, or TC_EIO if a source could not be read. */
    struct tc_copy_task *next;
} tc_copy_task;

/* The objects [first, stop) of a task. */
typedef struct {
    size_t first, stop;
} tc_slice;

/* Reserve and return the next slice. A slice is left while n_started < n. */
tc_slice tc_copy_task_slice(tc_copy_task *task);

/* Copy a slice. Returns 0 or TC_EIO. */
int tc_copy_task_run(const tc_copy_task *task, tc_slice slice);


#endif
