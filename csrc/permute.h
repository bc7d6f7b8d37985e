#ifndef TC_PERMUTE_H
#define TC_PERMUTE_H
/* Keyed permutation of [0, n), computed by a function and not stored in an array, so that the order of 10^10 records
 * takes no memory.
 *
 * x is written as (left, right) = (x / b, x % b) with an even a, the smallest at or above the square root of n, and b =
 * ceil(n / a). An alternating Feistel network over Z_a and Z_b is a bijection on [0, a * b). a * b exceeds n by less
 * than a, so about once in sqrt(n) times a result is n or more and is enciphered again (cycle walking). a is even
 * because a cyclic shift of an odd number of places is an even permutation: with odd a and b, half of all orders could
 * not occur.
 *
 * The values are part of a run's state (a resumed run serves the same records), so they must never change; the tests
 * hold golden values. All functions are pure. A tc_permutation is read-only after tc_permute_init, and threads may
 * share it.
 */
#include <stddef.h>
#include <stdint.h>

/* Measured over many keys: with 8 rounds, position chi-squares, neighbour differences, serial pairs and bit counts
 * equal those of a uniform shuffle if n is in the hundreds or more (with 4 rounds they do not, with 6 one differed).
 * Halves with few values mix more slowly: the 720 permutations of 6 had a chi-square of z = 128 after 8 rounds, 34
 * after 10 and 0 after 24. */
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

/* The record at position x, and the position of record y. x, y < n. */
uint64_t tc_permute_one(const tc_permutation *p, uint64_t x);
uint64_t tc_permute_invert(const tc_permutation *p, uint64_t y);

/* out[i] = the record at position start + i, for i < m. start + m <= n. */
void tc_permute_fill(const tc_permutation *p, uint64_t start, size_t m, uint64_t *out);

/* Row finder: maps positions of an output order to rows of k blocks. first[0..k] are cumulative row counts from 0,
 * never decreasing, first[k] > 0. hints has tc_finder_n_hints entries: the block that holds row (i << shift). With at
 * least as many hints as blocks, the scan from a hint takes at most one step on average over all rows, however uneven
 * the blocks are. Read-only: threads may share it. */
typedef struct tc_row_finder {
    const int64_t *first;
    const uint32_t *hints;
    unsigned shift;
    const tc_permutation *permutation; /* NULL: the rows keep their order. */
    const uint32_t *row_start;         /* [k] Number that is added to the rows of each block, or NULL. */
} tc_row_finder;

/* The shift that gives at least k hints if there are enough rows, and the number of hints for a shift. */
unsigned tc_row_finder_shift(uint64_t n_rows, size_t k);
size_t tc_row_finder_n_hints(uint64_t n_rows, unsigned shift);
void tc_row_finder_fill_hints(const int64_t *first, size_t k, unsigned shift, uint32_t *hints);

/* Block, and row in the block, of the positions start to start + m. start + m <= first[k]. */
void tc_find_rows(const tc_row_finder *finder, uint64_t start, size_t m, uint32_t *block, uint32_t *row);


#endif
