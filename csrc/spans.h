/* Copies of rows of middling length that lie anywhere: the memory is asked for those that come next while one is copied. */
#ifndef TC_SPANS_H
#define TC_SPANS_H
#include "ask.h"
#include "copy.h"
#include "gather.h"

/* Rows up to so long are asked for with all their lines, so many bytes ahead. On a Zen 4, one thread or two, rows of 256 bytes to 2 KiB at random
 * places are so copied at 1.3 to 1.5 times the speed of asking for eight lines of each into the first cache, those of 4 KiB at 1.2; 4 to 12 KiB ahead
 * give the same. Longer ones gain nothing. */
enum { SPAN_BYTES = 4096, SPAN_AHEAD_BYTES = 8192 };

/* A row, and where it goes. An empty one may lie, and go, anywhere; what lies outside its chunk has OUTSIDE bytes. */
typedef struct {
    const uint8_t *from;
    uint8_t *to;
    size_t n_bytes;
} span;

static const size_t OUTSIDE = (size_t)-1;

/* No more of it than is asked for ahead: one that is far longer than the others is copied as long ones are. */
static inline void ask_span(const span *row) { ask_lines(row->from, row->n_bytes < SPAN_AHEAD_BYTES ? row->n_bytes : SPAN_AHEAD_BYTES); }

/* Copy the rows that at() names, in order. 0, or TC_CORRUPT at the first one that has no place. */
static inline __attribute__((always_inline)) int copy_spans(span (*at)(const void *of, size_t i), const void *of, size_t n) {
    size_t next = 0, ahead = 0; /* the row that is asked for next; bytes of those that were asked for and are still to be copied */
    for (size_t i = 0; i < n; i++) {
        while (next < n && (next <= i || ahead < SPAN_AHEAD_BYTES)) {
            span later = at(of, next++);
            if (later.n_bytes == OUTSIDE) continue;
            ask_span(&later);
            ahead += later.n_bytes + LINE; /* about the lines that it takes, for tiny ones too */
        }
        span row = at(of, i);
        if (row.n_bytes == OUTSIDE) return TC_CORRUPT;
        tc_copy(row.to, row.from, row.n_bytes);
        size_t asked = row.n_bytes + LINE;
        ahead -= asked < ahead ? asked : ahead; /* a file that changes meanwhile may give it a place that it did not have */
    }
    return 0;
}

#endif
