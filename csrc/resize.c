#include "resize.h"

#include <math.h>
#include <string.h>

/* Sums of the first direction are 16-bit fixed-point numbers with 8 bits of fraction, and weights have 16 bits of
 * fraction: a product is one instruction (the high half of a 16-bit multiplication). The weights of a result have the
 * sum 65535, so that no sum exceeds 255 * 255.99. */
enum { CHANNELS = 3, LANES = 8, ONE = 65535 };

/* Products are rounded down, by half a unit in the last place on average: half their number is added to a sum. In a
 * plain area the losses are all alike, so that larger sums are of 32 bits and lose nothing. */
enum { MANY = 64 };

#define INLINE static inline __attribute__((always_inline))

/* The source pixels of one result. */
typedef struct {
    size_t first, n;
} span;

/* An open interval of this length holds at most so many whole numbers. */
static size_t most_pixels(const tc_axis *axis) {
    size_t n = (size_t)ceil(2 * axis->half_width), all = axis->stop - axis->first;
    return n < all ? n : all;
}

static double weight_at(double distance, double half_width) {
    double weight = distance < 0 ? half_width + distance : half_width - distance;
    return weight > 0 ? weight : 0;
}

/* Write the weights of result i, at most most_pixels elements, and return its pixels. */
static span weigh(const tc_axis *axis, size_t i, size_t most, uint16_t *weights) {
    double half = axis->half_width, centre = axis->start + axis->length / (double)axis->n_out * ((double)i + 0.5) - 0.5;
    ptrdiff_t first = (ptrdiff_t)axis->first, last = (ptrdiff_t)axis->stop - 1;
    ptrdiff_t low = (ptrdiff_t)floor(centre - half) + 1, high = (ptrdiff_t)ceil(centre + half) - 1;
    low = low < first ? first : low > last ? last : low;
    high = high > last ? last : high < low ? low : high;
    span pixels = {(size_t)low, (size_t)(high - low) + 1};
    if (pixels.n > most) pixels.n = most;
    double sum = 0, before = 0;
    for (size_t k = 0; k < pixels.n; k++) sum += weight_at((double)(low + (ptrdiff_t)k) - centre, half);
    if (sum <= 0) pixels.n = 1;
    /* The differences of rounded partial sums have the sum ONE, whatever the number of weights. */
    uint16_t so_far = 0;
    for (size_t k = 0; k < pixels.n; k++) {
        before += weight_at((double)(low + (ptrdiff_t)k) - centre, half);
        uint16_t next = k + 1 < pixels.n ? (uint16_t)(before / sum * ONE + 0.5) : ONE;
        weights[k] = (uint16_t)(next - so_far);
        so_far = next;
    }
    return pixels;
}

INLINE void add_rows(const uint8_t *rows, ptrdiff_t row_bytes, const uint16_t *weights, ptrdiff_t n_rows, uint16_t *restrict sums, size_t n, int is_first) {
    for (size_t i = 0; i < n; i++) {
        uint16_t sum = (uint16_t)((is_first ? 0 : sums[i]) + n_rows / 2);
        for (ptrdiff_t k = 0; k < n_rows; k++) sum = (uint16_t)(sum + (((uint32_t)(uint16_t)(rows[k * row_bytes + (ptrdiff_t)i] << 8) * weights[k]) >> 16));
        sums[i] = sum;
    }
}

static void add_many_rows(const uint8_t *rows, ptrdiff_t row_bytes, const uint16_t *weights, size_t n_rows, uint16_t *sums, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t sum = 0;
        for (size_t k = 0; k < n_rows; k++) sum += (uint32_t)rows[(ptrdiff_t)k * row_bytes + (ptrdiff_t)i] * weights[k];
        sums[i] = (uint16_t)(sum >> 8);
    }
}

/* sums = the weighted sum of rows, n values each. */
static void sum_rows(const uint8_t *rows, ptrdiff_t row_bytes, const uint16_t *weights, size_t n_rows, uint16_t *sums, size_t n) {
    if (n_rows > MANY) add_many_rows(rows, row_bytes, weights, n_rows, sums, n);
    else if (n_rows == 1) add_rows(rows, row_bytes, weights, 1, sums, n, 1);
    else if (n_rows == 2) add_rows(rows, row_bytes, weights, 2, sums, n, 1);
    else if (n_rows == 3) add_rows(rows, row_bytes, weights, 3, sums, n, 1);
    else {
        add_rows(rows, row_bytes, weights, 4, sums, n, 1);
        size_t k = 4;
        for (; k + 2 <= n_rows; k += 2) add_rows(rows + (ptrdiff_t)k * row_bytes, row_bytes, weights + k, 2, sums, n, 0);
        if (k < n_rows) add_rows(rows + (ptrdiff_t)k * row_bytes, row_bytes, weights + k, 1, sums, n, 0);
    }
}

typedef uint16_t lanes __attribute__((vector_size(2 * LANES)));

#if defined(__SSE2__)
#include <emmintrin.h>
INLINE lanes times(lanes a, lanes b) { return (lanes)_mm_mulhi_epu16((__m128i)a, (__m128i)b); }
/* The sums of two pixels are added. Four bytes are written. */
INLINE void store(lanes sums, uint8_t *to) {
    __m128i both = _mm_add_epi16((__m128i)sums, _mm_srli_si128((__m128i)sums, 2 * CHANNELS));
    int32_t pixel = _mm_cvtsi128_si32(_mm_packus_epi16(_mm_srli_epi16(both, 8), both));
    memcpy(to, &pixel, sizeof pixel);
}
#else
INLINE lanes times(lanes a, lanes b) {
    lanes product;
    for (int i = 0; i < LANES; i++) product[i] = (uint16_t)(((uint32_t)a[i] * b[i]) >> 16);
    return product;
}
INLINE void store(lanes sums, uint8_t *to) {
    for (int c = 0; c < CHANNELS; c++) to[c] = (uint8_t)((uint16_t)(sums[c] + sums[c + CHANNELS]) >> 8);
}
#endif

INLINE void add_pixels(const uint16_t *values, const size_t *first, const lanes *weights, size_t n_pairs, uint8_t *to, size_t n_out) {
    uint16_t more = (uint16_t)(128 + n_pairs);
    for (size_t i = 0; i < n_out; i++) {
        const uint16_t *at = values + first[i];
        lanes sum = {more, more, more};
        for (size_t k = 0; k < n_pairs; k++) {
            lanes two;
            memcpy(&two, at + 2 * CHANNELS * k, sizeof two);
            sum += times(two, weights[i * n_pairs + k]);
        }
        store(sum, to + i * CHANNELS);
    }
}

static void add_many_pixels(const uint16_t *values, const size_t *first, const lanes *weights, size_t n_pairs, uint8_t *to, size_t n_out) {
    for (size_t i = 0; i < n_out; i++, weights += n_pairs)
        for (size_t c = 0; c < CHANNELS; c++) {
            uint32_t sum = 1 << 23;
            for (size_t k = 0; k < 2 * n_pairs; k++) sum += (uint32_t)values[first[i] + k * CHANNELS + c] * weights[k / 2][k % 2 * CHANNELS];
            to[i * CHANNELS + c] = (uint8_t)(sum >> 24);
        }
}

/* Row of the result from the sums of rows. One byte more than the row is written. */
static void sum_columns(const uint16_t *values, const size_t *first, const lanes *weights, size_t n_pairs, uint8_t *to, size_t n_out) {
    if (2 * n_pairs > MANY) add_many_pixels(values, first, weights, n_pairs, to, n_out);
    else if (n_pairs == 1) add_pixels(values, first, weights, 1, to, n_out);
    else if (n_pairs == 2) add_pixels(values, first, weights, 2, to, n_out);
    else if (n_pairs == 3) add_pixels(values, first, weights, 3, to, n_out);
    else add_pixels(values, first, weights, n_pairs, to, n_out);
}

/* Scratch memory: the weights of pairs of pixels for each column, the sums of a row, the first value of each column,
 * a row of the result, the weights of one result. */
typedef struct {
    size_t n_pairs, most_rows, sums, first, row, weights, end;
} layout;

static layout layout_of(const tc_axis *rows, const tc_axis *columns) {
    size_t most_columns = most_pixels(columns);
    layout of = {.n_pairs = (most_columns + 1) / 2, .most_rows = most_pixels(rows)};
    of.sums = columns->n_out * of.n_pairs * sizeof(lanes);
    of.first = of.sums + ((CHANNELS * (columns->stop - columns->first + 2 * of.n_pairs) + LANES) * sizeof(uint16_t) + 15) / 16 * 16;
    of.weights = of.first + columns->n_out * sizeof(size_t);
    of.row = of.weights + (most_columns > of.most_rows ? most_columns : of.most_rows) * sizeof(uint16_t);
    of.end = of.row + columns->n_out * CHANNELS + 1;
    return of;
}

size_t tc_resize_bytes(const tc_axis *rows, const tc_axis *columns) { return layout_of(rows, columns).end; }

void tc_resize(const uint8_t *from, ptrdiff_t row_bytes, const tc_axis *rows, const tc_axis *columns, uint8_t *to, void *scratch) {
    layout at = layout_of(rows, columns);
    size_t n_out = columns->n_out, most_columns = most_pixels(columns);
    uint8_t *memory = scratch, *row = memory + at.row;
    lanes *pairs = scratch;
    uint16_t *sums = (uint16_t *)(memory + at.sums), *weights = (uint16_t *)(memory + at.weights);
    size_t *first = (size_t *)(memory + at.first), start = 0, stop = 0;
    memset(memory, 0, at.first);
    for (size_t i = 0; i < n_out; i++) {
        span pixels = weigh(columns, i, most_columns, weights);
        if (i == 0) start = pixels.first;
        stop = pixels.first + pixels.n;
        first[i] = (pixels.first - start) * CHANNELS;
        for (size_t k = 0; k < pixels.n; k++)
            for (size_t c = 0; c < CHANNELS; c++) pairs[i * at.n_pairs + k / 2][k % 2 * CHANNELS + c] = weights[k];
    }
    for (size_t i = 0; i < rows->n_out; i++) {
        span pixels = weigh(rows, i, at.most_rows, weights);
        sum_rows(from + (ptrdiff_t)pixels.first * row_bytes + (ptrdiff_t)(start * CHANNELS), row_bytes, weights, pixels.n, sums, (stop - start) * CHANNELS);
        sum_columns(sums, first, pairs, at.n_pairs, row, n_out);
        memcpy(to + i * n_out * CHANNELS, row, n_out * CHANNELS);
    }
}
