/* Copies of scattered rows of medium length: the source lines of the next rows are prefetched while one row is copied. */
#ifndef TC_SPANS_H
#define TC_SPANS_H
#include "ask.h"
#include "copy.h"
#include "gather.h"

/* Rows of up to SPAN_BYTES are prefetched with all their lines, SPAN_AHEAD_BYTES ahead. On a Zen 4 with one or two
 * threads, random rows of 256 bytes to 2 KiB are copied at 1.3 to 1.5 times the speed of prefetching eight lines of
 * each row into L1, and rows of 4 KiB at 1.2 times; 4 to 12 KiB ahead give the same. Longer rows gain nothing. */
enum { SPAN_BYTES = 4096, SPAN_AHEAD_BYTES = 8192 };

/* Source, destination and size of a row. An empty row may have any addresses. A row outside its chunk has the size
 * OUTSIDE. */
typedef struct {
    const uint8_t *from;
    uint8_t *to;
    size_t n_bytes;
} span;

static const size_t OUTSIDE = (size_t)-1;

/* At most SPAN_AHEAD_BYTES of a row are prefetched: a row that is far longer than the others is copied like a long row. */
static inline void ask_span(const span *row) { ask_lines(row->from, row->n_bytes < SPAN_AHEAD_BYTES ? row->n_bytes : SPAN_AHEAD_BYTES); }

/* Copy the rows at(of, 0) to at(of, n - 1) in order. Returns 0, or TC_CORRUPT at the first row outside its chunk. */
static inline __attribute__((always_inline)) int copy_spans(span (*at)(const void *of, size_t i), const void *of, size_t n) {
    size_t next = 0, ahead = 0; /* next: Index of the row that is prefetched next. ahead: Bytes that are prefetched and not copied yet. */
    for (size_t i = 0; i < n; i++) {
        while (next < n && (next <= i || ahead < SPAN_AHEAD_BYTES)) {
            span later = at(of, next++);
            if (later.n_bytes == OUTSIDE) continue;
            ask_span(&later);
            ahead += later.n_bytes + LINE; /* Roughly the lines that the row occupies, for tiny rows too. */
        }
        span row = at(of, i);
        if (row.n_bytes == OUTSIDE) return TC_CORRUPT;
        tc_copy(row.to, row.from, row.n_bytes);
        size_t asked = row.n_bytes + LINE;
        /* Saturates: in a file that changes concurrently, a row may have been outside its chunk when it was prefetched. */
        ahead -= asked < ahead ? asked : ahead;
    }
    return 0;
}

#endif
