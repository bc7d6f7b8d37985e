/* Errand: objects that the consumer has made room for, filled from their sources by all of a ring's threads, slice by slice. */
#ifndef TC_ERRAND_H
#define TC_ERRAND_H
#include "gather.h"

/* Owned by the caller, with refs, places and sources, until it is finished or cancelled. The ring's lock guards what is below the line. */
typedef struct tc_errand {
    const tc_ref *refs; /* [n], what is copied */
    char **places;      /* [n], where to: room for refs[i].n_bytes */
    size_t n;
    /* ---- */
    size_t begun;   /* objects before it are somebody's */
    size_t running; /* slices that are being copied */
    int status;     /* 0, or TC_EIO: a source could not be read */
    struct tc_errand *next;
} tc_errand;

/* Objects [first, stop). */
typedef struct {
    size_t first, stop;
} tc_slice;

/* The next slice that nobody has begun; there is one while begun < n. */
tc_slice tc_errand_slice(tc_errand *errand);

/* Copy a slice. 0 or TC_EIO. */
int tc_errand_copy(const tc_errand *errand, tc_slice slice);

#endif
