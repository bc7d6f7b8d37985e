#ifndef TC_PREFETCH_H
#define TC_PREFETCH_H
/* Prefetch the source lines of upcoming copies into L2. Used for rows that are longer than one or two cache lines. This
 * is the processor's prefetch; the prefetch of blocks and shards is load/prefetch.py.
 *
 * L1 can track only a few outstanding lines. A non-temporal prefetch (prefetchnta, the compiler's locality 0) fills no
 * other cache on Intel processors, so the line may be evicted before it is copied. Measured against prefetchnta on a
 * Granite Rapids with two threads: random rows of 12 KiB and runs of 256 KiB are copied at 1.15 times the speed, and
 * copy_pieces (copy.c) reaches 1.6 times. On a Zen 4, rows of up to 4 KiB reach 1.2 to 1.5 times, and longer rows do
 * not change.
 */
#include <stddef.h>
#include <stdint.h>

enum { LINE = 64, PAGE = 4096 };

/* Prefetch the cache lines that hold n_bytes from address `at`. */
static inline void prefetch_lines(const uint8_t *at, size_t n_bytes) {
    const uint8_t *end = at + n_bytes;
    for (at -= (uintptr_t)at & (LINE - 1); at < end; at += LINE) __builtin_prefetch(at, 0, 2);
}

/* Prefetch the first lines of each page of a long row. The hardware prefetcher continues from there to the end of the
 * page. An address translation takes about 200 ns in a virtual machine, and several translations overlap only if their
 * prefetches follow each other directly. Of a very long row only the first pages are prefetched here; the copy loop
 * prefetches the rest. */
static inline void prefetch_row(const uint8_t *row, size_t n_bytes) {
    enum { PAGE_START_BYTES = 8 * LINE, MOST_BYTES = 8 * PAGE };
    const uint8_t *end = row + (n_bytes < MOST_BYTES ? n_bytes : MOST_BYTES);
    for (const uint8_t *next; row < end; row = next) {
        next = row + PAGE - ((uintptr_t)row & (PAGE - 1));
        size_t n = (size_t)((next < end ? next : end) - row);
        prefetch_lines(row, n < PAGE_START_BYTES ? n : PAGE_START_BYTES);
    }
}


#endif
