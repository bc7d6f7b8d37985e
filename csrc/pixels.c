#include "pixels.h"

/* Values are 16-bit fixed-point numbers with `n_bits` bits of fraction: an int16_t holds 255 * factor. Eight pixels then
 * fit into the smallest vector, and a product is one instruction (the high half of a 16-bit multiplication). Floats
 * would need four times the vectors. */

/* Weights of R, G and B in a grey value, times 2^16. */
enum { RED = 19589, GREEN = 38470, BLUE = 7471 };

/* Roundings are such that a result that is exactly an integer is never rounded down to the integer below: sums of
 * products are rounded down by less than one unit in the last place, and up otherwise. */

static int fraction_bits(double factor) { return factor <= 2.0 ? 6 : factor <= 4.0 ? 5 : 4; }

/* Fixed-point forms of a multiplier for `times`, rounded up and down. At most 2^15. */
static uint16_t multiplier_up(double factor, int n_bits) {
    double scaled = factor * (double)(1 << (8 + n_bits));
    uint16_t down = (uint16_t)scaled;
    return (uint16_t)(down + (scaled > down));
}
static uint16_t multiplier_down(double factor, int n_bits) { return (uint16_t)(factor * (double)(1 << (8 + n_bits))); }

/* value * factor with n_bits bits of fraction, rounded down. */
static inline uint16_t times(uint8_t value, uint16_t factor) { return (uint16_t)(((uint32_t)((uint16_t)(value << 8)) * factor) >> 16); }

/* With 8 bits of fraction, each product loses less than 1 in the last place: 1 is added, so that few grey values are
 * rounded to a neighbour. */
static inline uint8_t grey_of(uint8_t r, uint8_t g, uint8_t b) { return (uint8_t)((uint16_t)(times(r, RED) + times(g, GREEN) + times(b, BLUE) + 1) >> 8); }

static double mean_grey(const uint8_t *planes, size_t n) {
    const uint8_t *r = planes, *g = planes + n, *b = planes + 2 * n;
    uint64_t sum = 0;
    for (size_t i = 0; i < n;) {
        size_t stop = n - i < 4096 ? n : i + 4096;
        uint32_t part = 0; /* Few additions, so that the loop does not need 64-bit lanes. */
        for (; i < stop; i++) part += grey_of(r[i], g[i], b[i]);
        sum += part;
    }
    return (double)sum / (double)n;
}

#define INLINE static inline __attribute__((always_inline))

INLINE uint8_t clamped(int16_t value, int n_bits) {
    int16_t largest = (int16_t)((256 << n_bits) - 1);
    value = value < largest ? value : largest;
    value = value > 0 ? value : 0;
    return (uint8_t)(value >> n_bits);
}

/* x * by + more. The product is limited before the addition, which therefore cannot overflow. */
INLINE void scale_by(uint8_t *values, size_t n, uint16_t by, int16_t more, int n_bits) {
    int16_t largest = (int16_t)((256 << n_bits) - 1 - more);
    for (size_t i = 0; i < n; i++) {
        int16_t value = (int16_t)times(values[i], by);
        value = value < largest ? value : largest;
        values[i] = clamped((int16_t)(value + more), n_bits);
    }
}

/* x * by + sign * grey * by_grey, with sign 1 or -1. Of two products that are added, each may lose a part of the last
 * place, so that 1 is added. */
INLINE void saturate_by(uint8_t *planes, size_t n, uint16_t by, uint16_t by_grey, int sign, int n_bits) {
    uint8_t *restrict r = planes, *restrict g = planes + n, *restrict b = planes + 2 * n;
    for (size_t i = 0; i < n; i++) {
        int16_t product = (int16_t)times(grey_of(r[i], g[i], b[i]), by_grey), more = (int16_t)(sign > 0 ? product + 1 : -product);
        r[i] = clamped((int16_t)(times(r[i], by) + more), n_bits);
        g[i] = clamped((int16_t)(times(g[i], by) + more), n_bits);
        b[i] = clamped((int16_t)(times(b[i], by) + more), n_bits);
    }
}

/* x * factor + addend, where |addend| is at most 255 * |1 - factor|. Constant numbers of bits make the shifts those of
 * 16-bit lanes. */
static void scale(uint8_t *values, size_t n, double factor, double addend) {
    int n_bits = fraction_bits(factor);
    uint16_t by = multiplier_up(factor, n_bits);
    double scaled = addend * (double)(1 << n_bits);
    int16_t more = (int16_t)scaled;
    more = (int16_t)(more + (scaled > more));
    if (n_bits == 6) scale_by(values, n, by, more, 6);
    else if (n_bits == 5) scale_by(values, n, by, more, 5);
    else scale_by(values, n, by, more, 4);
}

static void saturate(uint8_t *planes, size_t n, double factor) {
    int n_bits = fraction_bits(factor);
    uint16_t by = multiplier_up(factor, n_bits), by_grey = multiplier_down(factor > 1.0 ? factor - 1.0 : 0.0, n_bits);
    if (factor <= 1.0) saturate_by(planes, n, by, multiplier_up(1.0 - factor, n_bits), 1, 6);
    else if (n_bits == 6) saturate_by(planes, n, by, by_grey, -1, 6);
    else if (n_bits == 5) saturate_by(planes, n, by, by_grey, -1, 5);
    else saturate_by(planes, n, by, by_grey, -1, 4);
}

void tc_adjust(uint8_t *planes, size_t n, int kind, double factor) {
    if (n == 0) return;
    if (kind == TC_BRIGHTNESS) scale(planes, 3 * n, factor, 0.0);
    else if (kind == TC_CONTRAST) scale(planes, 3 * n, factor, (1.0 - factor) * mean_grey(planes, n));
    else saturate(planes, n, factor);
}

#define LOOK_UP(type)                                                                                                          \
    static void look_up_##type(const uint8_t *restrict from, const type *restrict tables, type *restrict to, size_t n,         \
                               int is_planar, int to_planar) {                                                                 \
        const type *table_r = tables, *table_g = tables + 256, *table_b = tables + 512;                                        \
        if (is_planar && to_planar) {                                                                                          \
            for (size_t i = 0; i < n; i++) to[i] = table_r[from[i]];                                                           \
            for (size_t i = n; i < 2 * n; i++) to[i] = table_g[from[i]];                                                       \
            for (size_t i = 2 * n; i < 3 * n; i++) to[i] = table_b[from[i]];                                                   \
            return;                                                                                                            \
        }                                                                                                                      \
        size_t pixel = is_planar ? 1 : 3, channel = is_planar ? n : 1, to_pixel = to_planar ? 1 : 3, to_channel = to_planar ? n : 1; \
        for (size_t i = 0; i < n; i++) {                                                                                       \
            const uint8_t *in = from + i * pixel;                                                                              \
            type *out = to + i * to_pixel;                                                                                     \
            out[0] = table_r[in[0]];                                                                                           \
            out[to_channel] = table_g[in[channel]];                                                                            \
            out[2 * to_channel] = table_b[in[2 * channel]];                                                                    \
        }                                                                                                                      \
    }

LOOK_UP(uint16_t)
LOOK_UP(uint32_t)

void tc_look_up(const uint8_t *from, int is_planar, const void *tables, size_t width, void *to, int to_planar, size_t n) {
    if (width == 2) look_up_uint16_t(from, tables, to, n, is_planar, to_planar);
    else look_up_uint32_t(from, tables, to, n, is_planar, to_planar);
}
