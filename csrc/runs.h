/* Shared by the kernels of gather.c, check.c and others: runs of consecutive rows, and bounds checks of offsets. */
#ifndef TC_RUNS_H
#define TC_RUNS_H
#include "ask.h"
#include "gather.h"

/* Shorter runs (on average) are not worth detecting: the row loops prefetch, which is faster than one short copy after
 * another. */
enum { SHORTEST_RUN = 4 };

static inline int in_runs(const tc_rows *rows) { return rows->n_breaks * SHORTEST_RUN < rows->n; }

/* Number of rows from i that are consecutive in one block; 1 if the rows are scattered. */
static inline size_t run_at(const tc_rows *rows, size_t i) {
    if (rows->n_breaks == 0) return rows->n - i;
    if (!in_runs(rows)) return 1;
    size_t end = i + 1;
    while (end < rows->n && rows->row[end] == rows->row[end - 1] + 1 && rows->block[end] == rows->block[i]) end++;
    return end - i;
}

/* Prefetch the elements of row i. The source must have its offsets; `offsets` gives the row's length in the batch. */
static inline void ask_elements(const tc_rows *rows, size_t i, size_t width, const int64_t *offsets) {
    const tc_source *source = &rows->sources[rows->block[i]];
    ask_row(source->values + (size_t)source->offsets[rows->row[i]] * width, (size_t)(offsets[i + 1] - offsets[i]) * width);
}

/* Whether [start, end) is a valid range of n_elements elements. The comparisons are unsigned, so negative numbers are
 * too large. */
static inline int is_inside(int64_t start, int64_t end, uint64_t n_elements) {
    return (uint64_t)end <= n_elements && (uint64_t)start <= (uint64_t)end;
}

/* Whether offsets[0..n] never decrease. Without branches, so that the compiler vectorises the loop. */
static inline int never_falls(const int64_t *offsets, size_t n) {
    int64_t falls = 0;
    for (size_t i = 0; i < n; i++) falls |= offsets[i + 1] < offsets[i];
    return falls == 0;
}

#endif
