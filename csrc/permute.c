#include "permute.h"

__extension__ typedef unsigned __int128 tc_u128;

/* The finalizer of splitmix64 (public domain; Steele, Lea and Flood): every input bit affects every output bit. */
static inline uint64_t mix64(uint64_t x) {
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

/* A number below `limit`, from a 32-bit half and the keys of a round. Two multiplications with a fold between them: a
 * single one leaves an arithmetic progression in the high bits, which the last step uses. */
static inline uint64_t round_function(uint64_t half, uint64_t add, uint64_t mul, uint64_t limit) {
    uint64_t x = (half + add) * mul;
    x = (x ^ (x >> 32)) * UINT64_C(0xd6e8feb86659fd93);
    return (uint64_t)(((tc_u128)x * limit) >> 64);
}

static uint64_t ceil_sqrt(uint64_t n) {
    uint64_t low = 1, high = UINT64_C(1) << 32;
    while (low < high) {
        uint64_t middle = (low + high) / 2;
        if ((tc_u128)middle * middle >= n)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

void tc_permute_init(tc_permutation *p, uint64_t key_low, uint64_t key_high, uint64_t n) {
    p->n = n;
    p->a = ceil_sqrt(n);
    p->a += p->a & 1;
    p->b = (n - 1) / p->a + 1;
    p->rounds = n < TC_PERMUTE_SMALL_N ? TC_PERMUTE_SMALL_ROUNDS : TC_PERMUTE_ROUNDS;
    for (unsigned i = 0; i < p->rounds; i++) {
        uint64_t step = 2 * i + 1;
        uint64_t low = mix64(key_low + step * UINT64_C(0x9e3779b97f4a7c15));
        uint64_t high = mix64(key_high + step * UINT64_C(0xd1342543de82ef95));
        p->add[i] = mix64(low ^ key_high);
        p->mul[i] = mix64(high ^ low) | 1;
    }
}

/* (x + drawn) mod limit without a branch, for two numbers below limit. */
static inline uint64_t add_modulo(uint64_t x, uint64_t drawn, uint64_t limit) {
    uint64_t sum = x + drawn, wrapped = sum - limit;
    return sum >= limit ? wrapped : sum;
}

/* One index is a chain of about 150 cycles of latency, and several lanes side by side fill the gaps: 1 lane 57, 4 lanes
 * 88, 8 lanes 103 million indices per second. */
enum { LANES = 8 };

static inline void encipher(const tc_permutation *p, uint64_t *left, uint64_t *right, unsigned n_lanes) {
    for (unsigned i = 0; i < p->rounds; i += 2) {
        for (unsigned j = 0; j < n_lanes; j++)
            left[j] = add_modulo(left[j], round_function(right[j], p->add[i], p->mul[i], p->a), p->a);
        for (unsigned j = 0; j < n_lanes; j++)
            right[j] = add_modulo(right[j], round_function(left[j], p->add[i + 1], p->mul[i + 1], p->b), p->b);
    }
}

static inline uint64_t decipher(const tc_permutation *p, uint64_t left, uint64_t right) {
    for (unsigned i = p->rounds; i > 0; i -= 2) {
        uint64_t drawn = round_function(left, p->add[i - 1], p->mul[i - 1], p->b);
        right = right >= drawn ? right - drawn : right + p->b - drawn;
        drawn = round_function(right, p->add[i - 2], p->mul[i - 2], p->a);
        left = left >= drawn ? left - drawn : left + p->a - drawn;
    }
    return left * p->b + right;
}

uint64_t tc_permute_one(const tc_permutation *p, uint64_t x) {
    do {
        uint64_t left = x / p->b, right = x % p->b;
        encipher(p, &left, &right, 1);
        x = left * p->b + right;
    } while (x >= p->n);
    return x;
}

uint64_t tc_permute_invert(const tc_permutation *p, uint64_t y) {
    do
        y = decipher(p, y / p->b, y % p->b);
    while (y >= p->n);
    return y;
}

void tc_permute_fill(const tc_permutation *p, uint64_t start, size_t m, uint64_t *out) {
    const tc_permutation local = *p; /* The compiler must assume that out may alias *p. */
    uint64_t next_left = start / local.b, next_right = start % local.b;
    size_t done = 0;
    for (; done + LANES <= m; done += LANES) {
        uint64_t left[LANES], right[LANES];
        for (unsigned j = 0; j < LANES; j++) {
            left[j] = next_left;
            right[j] = next_right;
            if (++next_right == local.b) {
                next_right = 0;
                next_left++;
            }
        }
        encipher(&local, left, right, LANES);
        for (unsigned j = 0; j < LANES; j++) {
            uint64_t y = left[j] * local.b + right[j];
            out[done + j] = y < local.n ? y : tc_permute_one(&local, y);
        }
    }
    for (; done < m; done++)
        out[done] = tc_permute_one(&local, start + done);
}

unsigned tc_row_finder_shift(uint64_t n_rows, size_t k) {
    unsigned shift = 0;
    while ((n_rows >> (shift + 1)) >= k && shift < 62)
        shift++;
    return shift;
}

size_t tc_row_finder_n_hints(uint64_t n_rows, unsigned shift) { return (size_t)((n_rows - 1) >> shift) + 1; }

void tc_row_finder_fill_hints(const int64_t *first, size_t k, unsigned shift, uint32_t *hints) {
    size_t n_hints = tc_row_finder_n_hints((uint64_t)first[k], shift), block = 0;
    for (size_t i = 0; i < n_hints; i++) {
        int64_t row = (int64_t)((uint64_t)i << shift);
        while (first[block + 1] <= row)
            block++;
        hints[i] = (uint32_t)block;
    }
}

static inline void locate(const tc_row_finder *finder, uint64_t x, uint32_t *block, uint32_t *row) {
    uint32_t at = finder->hints[x >> finder->shift];
    while (finder->first[at + 1] <= (int64_t)x)
        at++;
    *block = at;
    *row = (uint32_t)(x - (uint64_t)finder->first[at]);
}

/* Positions without a permutation: consecutive rows of each block, in loops that the compiler vectorises (a tenth of
 * the time of one call of place() per row). */
static void find_runs(const tc_row_finder *finder, uint64_t start, size_t m, uint32_t *block, uint32_t *row) {
    for (size_t done = 0, k; done < m; done += k) {
        uint32_t at, first;
        locate(finder, start + done, &at, &first);
        size_t left = (size_t)(finder->first[at + 1] - (int64_t)(start + done));
        k = left < m - done ? left : m - done;
        for (size_t i = 0; i < k; i++)
            block[done + i] = at;
        for (size_t i = 0; i < k; i++)
            row[done + i] = first + (uint32_t)i;
    }
}

enum { CHUNK = 256 }; /* 2 KiB of indices between the two loops stay in L1. */

static void find_permuted(const tc_row_finder *finder, uint64_t start, size_t m, uint32_t *block, uint32_t *row) {
    uint64_t drawn[CHUNK];
    for (size_t done = 0; done < m; done += CHUNK) {
        size_t n = m - done < CHUNK ? m - done : CHUNK;
        tc_permute_fill(finder->permutation, start + done, n, drawn);
        for (size_t i = 0; i < n; i++)
            locate(finder, drawn[i], block + done + i, row + done + i);
    }
}

void tc_find_rows(const tc_row_finder *finder, uint64_t start, size_t m, uint32_t *block, uint32_t *row) {
    if (finder->permutation)
        find_permuted(finder, start, m, block, row);
    else
        find_runs(finder, start, m, block, row);
    for (size_t i = 0; finder->row_start && i < m; i++)
        row[i] += finder->row_start[block[i]];
}
