/* Keyed permutation of [0, n): a function, not an array, so that the order of 10^10 records costs no memory.
 *
 * x is written as (left, right) = (x / b, x % b) with an even a, the smallest at or above the square root of n, and
 * b = ceil(n / a). An alternating Feistel network over Z_a and Z_b is a bijection on [0, a * b); a * b exceeds n by
 * less than a, so a result at or above n is enciphered again (cycle walking) about once in sqrt(n) times. a is even
 * because cyclic shifts of an odd number of places are even permutations: with a and b odd, half of all orders could
 * not come.
 *
 * The values are part of a run's state (resume serves the same records), so nothing here may change: golden values
 * stand in the tests.
 * Everything is pure; a tc_permutation is read-only after tc_permute_init and may be shared between threads.
 */
#ifndef TC_PERMUTE_H
#define TC_PERMUTE_H
#include <stddef.h>
#include <stdint.h>

/* Measured over keys: with 8 rounds position chi-squares, neighbour differences, serial pairs and bit counts are those
 * of a uniform shuffle where n is in the hundreds or more (with 4 they are not, with 6 one was off). Halves of a few
 * values mix slower: the 720 permutations of 6 came with a chi-square of z = 128 after 8 rounds, 34 after 10 and 0
 * after 24. */
#define TC_PERMUTE_ROUNDS 8
#define TC_PERMUTE_SMALL_N 1024
#define TC_PERMUTE_SMALL_ROUNDS 24
#define TC_PERMUTE_MAX_N (UINT64_C(1) << 63)

typedef struct {
    uint64_t n, a, b;
    uint32_t rounds;
    uint64_t add[TC_PERMUTE_SMALL_ROUNDS];
    uint64_t mul[TC_PERMUTE_SMALL_ROUNDS];
} tc_permutation;

/* Prepare the permutation of [0, n) for a key of 128 bits. 1 <= n <= TC_PERMUTE_MAX_N. */
void tc_permute_init(tc_permutation *p, uint64_t key_low, uint64_t key_high, uint64_t n);

/* The record at position x, and the position of record y; x, y < n. */
uint64_t tc_permute_one(const tc_permutation *p, uint64_t x);
uint64_t tc_permute_invert(const tc_permutation *p, uint64_t y);

/* out[i] = permuted(start + i) for i < m; start + m <= n. */
void tc_permute_fill(const tc_permutation *p, uint64_t start, size_t m, uint64_t *out);

/* Where the rows of k blocks lie, in a served order. first[0..k] are cumulative rows from 0, never falling, first[k] > 0;
 * hints has tc_finder_n_hints entries: the block that holds row (i << shift). With as many hints as blocks, or more, the
 * scan from a hint takes one step or less on average over all rows, however uneven the blocks are. Read-only: threads
 * share it. */
typedef struct tc_finder {
    const int64_t *first;
    const uint32_t *hints;
    unsigned shift;
    const tc_permutation *permutation; /* NULL: rows come as they stand */
    const uint32_t *row_start;         /* [k], what is added to the rows of each block; NULL: nothing */
} tc_finder;

/* The shift that gives at least k hints where the rows allow it, and the number of hints for it. */
unsigned tc_finder_shift(uint64_t n_rows, size_t k);
size_t tc_finder_n_hints(uint64_t n_rows, unsigned shift);
void tc_finder_hint(const int64_t *first, size_t k, unsigned shift, uint32_t *hints);

/* (block, row in it) of positions start .. start + m; start + m <= first[k]. */
void tc_find_rows(const tc_finder *finder, uint64_t start, size_t m, uint32_t *block, uint32_t *row);

#endif
