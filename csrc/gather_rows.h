#ifndef TC_GATHER_ROWS_H
#define TC_GATHER_ROWS_H
/* Shared by gather.c, cast.c and output_layout.c: runs of consecutive rows, and bounds checks of offsets. */
#include "prefetch.h"
#include "gather.h"

/* Shorter runs (on average) are not worth detecting: the row loops prefetch, which is faster than one short copy after
 * another. */
enum { SHORTEST_RUN = 4 };

static inline int is_in_runs(const tc_rows *rows) { return rows->n_breaks * SHORTEST_RUN < rows->n; }

/* Number of rows from i that are consecutive in one block; 1 if the rows are scattered. */
static inline size_t run_at(const tc_rows *rows, size_t i) {
    if (rows->n_breaks == 0) return rows->n - i;
    if (!is_in_runs(rows)) return 1;
    size_t end = i + 1;
    while (end < rows->n && rows->row[end] == rows->row[end - 1] + 1 && rows->block[end] == rows->block[i]) end++;
    return end - i;
}

/* Prefetch the elements of row i. The source must have its offsets; `offsets` gives the row's length in the batch. */
static inline void prefetch_elements(const tc_rows *rows, size_t i, size_t width, const int64_t *offsets) {
    const tc_source *source = &rows->sources[rows->block[i]];
    prefetch_row(source->values + (size_t)source->offsets[rows->row[i]] * width, (size_t)(offsets[i + 1] - offsets[i]) * width);
}

/* Whether [start, end) is a valid range of n_elements elements. The comparisons are unsigned, so negative numbers are
 * too large. */
static inline int is_inside(int64_t start, int64_t end, uint64_t n_elements) {
    return (uint64_t)end <= n_elements && (uint64_t)start <= (uint64_t)end;
}

/* Whether offsets[0..n] never decrease. Without branches, so that the compiler vectorises the loop. */
static inline int never_decreases(const int64_t *offsets, size_t n) {
    int64_t falls = 0;
    for (size_t i = 0; i < n; i++) falls |= offsets[i + 1] < offsets[i];
    return falls == 0;
}


/* Copies of scattered rows of medium length: the source lines of the next rows are prefetched while one row is copied. */
#include "copy.h"

/* Rows of up to SPAN_BYTES are prefetched with all their lines, SPAN_AHEAD_BYTES ahead. On a Zen 4 with one or two
 * threads, random rows of 256 bytes to 2 KiB are copied at 1.3 to 1.5 times the speed of prefetching eight lines of
 * each row into L1, and rows of 4 KiB at 1.2 times; 4 to 12 KiB ahead give the same. Longer rows gain nothing. */
enum { MEDIUM_ROW_BYTES = 4096, PREFETCH_AHEAD_BYTES = 8192 };

/* Source, destination and size of a row. An empty row may have any addresses. A row outside its chunk has the size
 * OUTSIDE. */
typedef struct {
    const uint8_t *from;
    uint8_t *to;
    size_t n_bytes;
} row_copy;

static const size_t OUTSIDE_CHUNK = (size_t)-1;

/* At most SPAN_AHEAD_BYTES of a row are prefetched: a row that is far longer than the others is copied like a long row. */
static inline void prefetch_row_copy(const row_copy *row) { prefetch_lines(row->from, row->n_bytes < PREFETCH_AHEAD_BYTES ? row->n_bytes : PREFETCH_AHEAD_BYTES); }

/* Copy the rows at(of, 0) to at(of, n - 1) in order. Returns 0, or TC_CORRUPT at the first row outside its chunk. */
static inline __attribute__((always_inline)) int copy_medium_rows(row_copy (*at)(const void *of, size_t i), const void *of, size_t n) {
    size_t next = 0, ahead = 0; /* next: Index of the row that is prefetched next. ahead: Bytes that are prefetched and not copied yet. */
    for (size_t i = 0; i < n; i++) {
        while (next < n && (next <= i || ahead < PREFETCH_AHEAD_BYTES)) {
            row_copy later = at(of, next++);
            if (later.n_bytes == OUTSIDE_CHUNK) continue;
            prefetch_row_copy(&later);
            ahead += later.n_bytes + LINE; /* Roughly the lines that the row occupies, for tiny rows too. */
        }
        row_copy row = at(of, i);
        if (row.n_bytes == OUTSIDE_CHUNK) return TC_CORRUPT;
        tc_copy(row.to, row.from, row.n_bytes);
        size_t asked = row.n_bytes + LINE;
        /* Saturates: in a file that changes concurrently, a row may have been outside its chunk when it was prefetched. */
        ahead -= asked < ahead ? asked : ahead;
    }
    return 0;
}


#endif
