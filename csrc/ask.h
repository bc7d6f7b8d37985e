/* Ask the memory for what is copied soon, and is more than a line or two: into the second cache.
 *
 * The first has few places for lines that are still to come; and what is asked for without keeping (prefetchnta, the compiler's locality 0) is on
 * Intel's processors in no other, so that it is gone, or in the way, when it is copied. Measured on a Granite Rapids, two threads, against that: rows
 * of 12 KiB at random places 1.15 times the speed, runs of 256 KiB 1.15, by copy_pieces (copy.c) 1.6. On a Zen 4 rows of up to 4 KiB came at 1.2 to
 * 1.5 times the speed, longer ones at the same.
 */
#ifndef TC_ASK_H
#define TC_ASK_H
#include <stddef.h>
#include <stdint.h>

enum { LINE = 64, PAGE = 4096 };

/* The lines that hold n_bytes from `at` on. */
static inline void ask_lines(const uint8_t *at, size_t n_bytes) {
    const uint8_t *end = at + n_bytes;
    for (at -= (uintptr_t)at & (LINE - 1); at < end; at += LINE) __builtin_prefetch(at, 0, 2);
}

/* The first lines of each page of a long row; the processor goes on from there by itself, as far as the page goes. Finding where a page lies (its
 * address translated) takes some 200 ns in a virtual machine, and several are found at a time only if they are asked for one right after the other.
 * Of a very long row the first pages only: who copies it asks for the others. */
static inline void ask_row(const uint8_t *row, size_t n_bytes) {
    enum { PAGE_START_BYTES = 8 * LINE, MOST_BYTES = 8 * PAGE };
    const uint8_t *end = row + (n_bytes < MOST_BYTES ? n_bytes : MOST_BYTES);
    for (const uint8_t *next; row < end; row = next) {
        next = row + PAGE - ((uintptr_t)row & (PAGE - 1));
        size_t n = (size_t)((next < end ? next : end) - row);
        ask_lines(row, n < PAGE_START_BYTES ? n : PAGE_START_BYTES);
    }
}

#endif
