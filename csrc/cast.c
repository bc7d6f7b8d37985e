#include "cast.h"

#include <float.h>
#include <string.h>

/* One loop per pair of dtypes, without branches, so that the compiler vectorises it: what does not fit is or-ed into
 * one variable, which is examined after the loop. Checks that a pair does not need are compile-time constants. */

#define ANY_PLACE __attribute__((aligned(1), may_alias))
typedef uint8_t ANY_PLACE any_u8;
typedef int8_t ANY_PLACE any_i8;
typedef uint16_t ANY_PLACE any_u16;
typedef int16_t ANY_PLACE any_i16;
typedef uint32_t ANY_PLACE any_u32;
typedef int32_t ANY_PLACE any_i32;
typedef uint64_t ANY_PLACE any_u64;
typedef int64_t ANY_PLACE any_i64;
typedef float ANY_PLACE any_f32;
typedef double ANY_PLACE any_f64;
typedef uint8_t ANY_PLACE any_bool;

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float widen_bf16(uint16_t bits) { return float_of((uint32_t)bits << 16); }

/* a where mask is all ones, b where it is zero. For ?: with float arithmetic on one side compilers generate branches,
 * and then no vector code. */
static inline uint32_t choose(uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); }

static inline uint32_t mask_if(int is_so) { return (uint32_t)-is_so; }

/* Integer arithmetic, and a subtraction of normal floats for subnormal halves: right in threads that flush subnormal
 * floats to zero, too. */
static inline float widen_f16(uint16_t half) {
    uint32_t rest = (uint32_t)(half & 0x7fff) << 13, exponent = rest & 0x0f800000u;
    uint32_t tiny = bits_of(float_of(rest + (113u << 23)) - float_of(113u << 23));
    uint32_t normal = rest + (112u << 23) + (mask_if(exponent == 0x0f800000u) & (112u << 23)); /* Infinity and NaN: the largest exponent. */
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    return float_of(choose(mask_if(exponent == 0), tiny, normal) | sign);
}

static inline uint16_t round_to_bf16(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

static inline uint16_t round_to_f16(float value) {
    uint32_t sign = (bits_of(value) >> 16) & 0x8000, bits = bits_of(value) & 0x7fffffff;
    uint32_t normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    uint32_t tiny = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f); /* The last bit of 0.5f has the value of the smallest float16. */
    uint32_t large = 0x7c00 | (mask_if(bits > 0x7f800000) & 0x200);
    return (uint16_t)(sign | choose(mask_if(bits >= 0x47800000), large, choose(mask_if(bits < 0x38800000), tiny, normal)));
}

/* Round to odd: if the value is not exact, return the neighbour nearer to zero with its last bit set. Rounding this
 * result again to a shorter type is the same as rounding once. */
static inline float round_to_odd(double value) {
    float nearest = (float)value;
    double back = (double)nearest;
    uint32_t is_inexact = (uint32_t)((back < value) | (back > value));
    uint32_t is_away = (uint32_t)(is_inexact & (__builtin_fabs(back) > __builtin_fabs(value)));
    return float_of((bits_of(nearest) - is_away) | is_inexact);
}

/* from, to: Short names of dtypes. body: Computes `out`, in the target's stored type, from `in`, and ors into `wrong`
 * what does not fit. */
#define CASTER(from, to, wrong_type, body)                                                                                     \
    static uint64_t from##_to_##to(const uint8_t *restrict source, uint8_t *restrict target, size_t n) {                       \
        const STORED_##from *ins = (const STORED_##from *)source;                                                              \
        STORED_##to *outs = (STORED_##to *)target;                                                                             \
        wrong_type wrong = 0;                                                                                                  \
        for (size_t i = 0; i < n; i++) body;                                                                                   \
        return (uint64_t)wrong;                                                                                                \
    }

#define STORED_bool any_bool
#define STORED_u8 any_u8
#define STORED_i8 any_i8
#define STORED_u16 any_u16
#define STORED_i16 any_i16
#define STORED_u32 any_u32
#define STORED_i32 any_i32
#define STORED_u64 any_u64
#define STORED_i64 any_i64
#define STORED_f16 any_u16
#define STORED_bf16 any_u16
#define STORED_f32 any_f32
#define STORED_f64 any_f64

/* Type of `wrong`: as wide as the source, so that all lanes of a loop have one width. */
#define WRONG_bool uint8_t
#define WRONG_u8 uint8_t
#define WRONG_i8 uint8_t
#define WRONG_u16 uint16_t
#define WRONG_i16 uint16_t
#define WRONG_u32 uint32_t
#define WRONG_i32 uint32_t
#define WRONG_u64 uint64_t
#define WRONG_i64 uint64_t

#define VALUE_bool(in) ((uint8_t)((in) != 0)) /* Any stored byte but 0 is true. */
#define VALUE_u8(in) (in)
#define VALUE_i8(in) (in)
#define VALUE_u16(in) (in)
#define VALUE_i16(in) (in)
#define VALUE_u32(in) (in)
#define VALUE_i32(in) (in)
#define VALUE_u64(in) (in)
#define VALUE_i64(in) (in)

#define TYPE_bool uint8_t
#define TYPE_u8 uint8_t
#define TYPE_i8 int8_t
#define TYPE_u16 uint16_t
#define TYPE_i16 int16_t
#define TYPE_u32 uint32_t
#define TYPE_i32 int32_t
#define TYPE_u64 uint64_t
#define TYPE_i64 int64_t

/* Nonzero if the number changes when it is converted and back, or if a sign bit becomes a value bit or the other way
 * round; for bool, if any bit but the last is set. Without a comparison, because SSE2 has none for 64 bits. */
#define IS_SIGNED(type) ((TYPE_##type)-1 < 1)
#define TURNS_SIGN(from, to)                                                                                                   \
    ((IS_SIGNED(from) && !IS_SIGNED(to)) ||                                                                                    \
     (!IS_SIGNED(from) && IS_SIGNED(to) && sizeof(TYPE_##from) >= sizeof(TYPE_##to)))
#define LOST(from, to, in)                                                                                                     \
    ((in ^ (WRONG_##from)(TYPE_##to)in) | (TURNS_SIGN(from, to) ? in >> (8 * sizeof in - 1) : 0) | (IS_##to ? in & ~1ull : 0))
#define IS_bool 1
#define IS_u8 0
#define IS_i8 0
#define IS_u16 0
#define IS_i16 0
#define IS_u32 0
#define IS_i32 0
#define IS_u64 0
#define IS_i64 0

#define INTEGER(from, to)                                                                                                      \
    CASTER(from, to, WRONG_##from, {                                                                                           \
        TYPE_##from in = VALUE_##from(ins[i]);                                                                                 \
        WRONG_##from bits = (WRONG_##from)in;                                                                                  \
        wrong |= (WRONG_##from)LOST(from, to, bits);                                                                           \
        outs[i] = (TYPE_##to)in;                                                                                               \
    })

/* Whether a float differs from the integer that it was made from. A double represents all integers of up to 32 bits.
 * For 64 bits, the float is converted back to an integer, which is defined only inside the range of the type; a float16
 * may be infinite in either direction. */
#define DIFFERS_32(in, back) ((double)(back) != (double)(in))
#define DIFFERS_bool DIFFERS_32
#define DIFFERS_u8 DIFFERS_32
#define DIFFERS_i8 DIFFERS_32
#define DIFFERS_u16 DIFFERS_32
#define DIFFERS_i16 DIFFERS_32
#define DIFFERS_u32 DIFFERS_32
#define DIFFERS_i32 DIFFERS_32
#define IS_WITHIN(value, least, end) (((double)(value) >= (least)) & ((double)(value) < (end)))
#define DIFFERS_64(in, back, type, least, end)                                                                                 \
    (!IS_WITHIN(back, least, end) | ((type)(IS_WITHIN(back, least, end) ? (double)(back) : 0.0) != (in)))
#define DIFFERS_u64(in, back) DIFFERS_64(in, back, uint64_t, 0.0, 0x1p64)
#define DIFFERS_i64(in, back) DIFFERS_64(in, back, int64_t, -0x1p63, 0x1p63)

#define OUT_f64(value) ((double)(value))
#define OUT_f32(value) ((float)(value))
#define OUT_f16(value) round_to_f16((float)(value))
#define OUT_bf16(value) round_to_bf16((float)(value))
#define BACK_f64(out) (out)
#define BACK_f32(out) (out)
#define BACK_f16(out) widen_f16(out)
#define BACK_bf16(out) widen_bf16(out)
#define HELD_f64 double
#define HELD_f32 float
#define HELD_f16 uint16_t
#define HELD_bf16 uint16_t

/* Every integer of the source type is exact in the target type: nothing to check. */
#define EXACT(from, to) CASTER(from, to, uint64_t, outs[i] = OUT_##to(VALUE_##from(ins[i])))
/* Integers reach float16 and bfloat16 by way of float: an integer that is exact in one of them is exact in float. */
#define TO_FLOAT(from, to)                                                                                                     \
    CASTER(from, to, uint64_t, {                                                                                               \
        TYPE_##from in = VALUE_##from(ins[i]);                                                                                 \
        HELD_##to out = OUT_##to(in);                                                                                          \
        wrong |= (uint64_t)DIFFERS_##from(in, BACK_##to(out));                                                                 \
        outs[i] = out;                                                                                                         \
    })

/* A finite number has become infinite. */
#define IS_OVER(from, out, in) ((__builtin_fabsf(out) > FLT_MAX) & IS_FINITE_##from(in))
#define IS_FINITE_f32(in) (__builtin_fabsf(in) <= FLT_MAX)
#define IS_FINITE_bf16 IS_FINITE_f32
#define IS_FINITE_f64(in) (__builtin_fabs(in) <= DBL_MAX)
#define WIDEN(from, to) CASTER(from, to, uint64_t, outs[i] = OUT_##to(BACK_##from(ins[i])))
#define NARROW(from, to, how)                                                                                                  \
    CASTER(from, to, uint32_t, {                                                                                               \
        HELD_##to out = OUT_##to(how(BACK_##from(ins[i])));                                                                    \
        wrong |= (uint32_t)IS_OVER(from, BACK_##to(out), BACK_##from(ins[i]));                                 \
        outs[i] = out;                                                                                                         \
    })

#define INTEGERS_FROM(from)                                                                                                    \
    INTEGER(from, bool)                                                                                                        \
    INTEGER(from, u8)                                                                                                          \
    INTEGER(from, i8)                                                                                                          \
    INTEGER(from, u16)                                                                                                         \
    INTEGER(from, i16)                                                                                                         \
    INTEGER(from, u32)                                                                                                         \
    INTEGER(from, i32)                                                                                                         \
    INTEGER(from, u64)                                                                                                         \
    INTEGER(from, i64)

INTEGERS_FROM(bool)
INTEGERS_FROM(u8)
INTEGERS_FROM(i8)
INTEGERS_FROM(u16)
INTEGERS_FROM(i16)
INTEGERS_FROM(u32)
INTEGERS_FROM(i32)
INTEGERS_FROM(u64)
INTEGERS_FROM(i64)

/* All integers up to these are exact: float16 2048, bfloat16 256, float32 2^24, float64 2^53. */
EXACT(bool, f16)
EXACT(u8, f16)
EXACT(i8, f16)
TO_FLOAT(u16, f16)
TO_FLOAT(i16, f16)
TO_FLOAT(u32, f16)
TO_FLOAT(i32, f16)
TO_FLOAT(u64, f16)
TO_FLOAT(i64, f16)
EXACT(bool, bf16)
EXACT(u8, bf16)
EXACT(i8, bf16)
TO_FLOAT(u16, bf16)
TO_FLOAT(i16, bf16)
TO_FLOAT(u32, bf16)
TO_FLOAT(i32, bf16)
TO_FLOAT(u64, bf16)
TO_FLOAT(i64, bf16)
EXACT(bool, f32)
EXACT(u8, f32)
EXACT(i8, f32)
EXACT(u16, f32)
EXACT(i16, f32)
TO_FLOAT(u32, f32)
TO_FLOAT(i32, f32)
TO_FLOAT(u64, f32)
TO_FLOAT(i64, f32)
EXACT(bool, f64)
EXACT(u8, f64)
EXACT(i8, f64)
EXACT(u16, f64)
EXACT(i16, f64)
EXACT(u32, f64)
EXACT(i32, f64)
TO_FLOAT(u64, f64)
TO_FLOAT(i64, f64)

WIDEN(f16, f32)
WIDEN(f16, f64)
WIDEN(f16, bf16) /* Rounds; no float16 is too large for bfloat16. */
WIDEN(bf16, f32)
WIDEN(bf16, f64)
NARROW(bf16, f16, )
NARROW(f32, f16, )
NARROW(f32, bf16, )
WIDEN(f32, f64)
NARROW(f64, f16, round_to_odd)
NARROW(f64, bf16, round_to_odd)
NARROW(f64, f32, )

#define TO_FLOATS(from) from##_to_f16, from##_to_bf16, from##_to_f32, from##_to_f64
#define ROW(from)                                                                                                              \
    {                                                                                                                          \
        0, from##_to_bool, from##_to_u8, from##_to_i8, from##_to_u16, from##_to_i16, from##_to_u32, from##_to_i32,             \
            from##_to_u64, from##_to_i64, TO_FLOATS(from)                                                                      \
    }

static const tc_caster CASTERS[TC_N_DTYPES][TC_N_DTYPES] = {
    [TC_BOOL] = ROW(bool),
    [TC_U8] = ROW(u8),
    [TC_I8] = ROW(i8),
    [TC_U16] = ROW(u16),
    [TC_I16] = ROW(i16),
    [TC_U32] = ROW(u32),
    [TC_I32] = ROW(i32),
    [TC_U64] = ROW(u64),
    [TC_I64] = ROW(i64),
    [TC_F16] = {[TC_BF16] = f16_to_bf16, [TC_F32] = f16_to_f32, [TC_F64] = f16_to_f64},
    [TC_BF16] = {[TC_F16] = bf16_to_f16, [TC_F32] = bf16_to_f32, [TC_F64] = bf16_to_f64},
    [TC_F32] = {[TC_F16] = f32_to_f16, [TC_BF16] = f32_to_bf16, [TC_F64] = f32_to_f64},
    [TC_F64] = {[TC_F16] = f64_to_f16, [TC_BF16] = f64_to_bf16, [TC_F32] = f64_to_f32},
};

static const uint8_t DTYPE_BYTES[TC_N_DTYPES] = {
    [TC_BOOL] = 1, [TC_U8] = 1,  [TC_I8] = 1,  [TC_U16] = 2, [TC_I16] = 2, [TC_U32] = 4, [TC_I32] = 4,
    [TC_U64] = 8,  [TC_I64] = 8, [TC_F16] = 2, [TC_BF16] = 2, [TC_F32] = 4, [TC_F64] = 8,
};

tc_caster tc_caster_of(uint32_t from, uint32_t to) { return from != to && from < TC_N_DTYPES && to < TC_N_DTYPES ? CASTERS[from][to] : NULL; }

size_t tc_dtype_bytes(uint32_t dtype) { return dtype < TC_N_DTYPES ? DTYPE_BYTES[dtype] : 0; }

/* The gather of streams with a cast: the kernels of gather.c, with a cast in place of the copy. */
#include "copy.h"

#include "gather_rows.h"

/* Rows of up to SMALL_BYTES are gathered into a buffer that stays in L1, and cast from there, many rows in one call.
 * For rows of 8 bytes, a call per row would cost more than the row. */
enum { AHEAD = 6, SMALL_BYTES = 128, BUFFER_BYTES = 4096, PIECE_BYTES = 2048 };

size_t tc_cast_bytes(const tc_stream *stream, size_t n_bytes) {
    return stream->to == TC_AS_IS ? n_bytes : n_bytes / tc_dtype_bytes(stream->from) * tc_dtype_bytes(stream->to);
}

/* width: Bytes of a gathered row. */
static uint64_t cast_buffered(const tc_stream *stream, const tc_rows *rows, size_t width, uint8_t *values) {
    uint8_t buffer[BUFFER_BYTES] __attribute__((aligned(64)));
    tc_caster cast = tc_caster_of(stream->from, stream->to);
    tc_stream plain = {.kind = stream->kind, .width = stream->width};
    size_t step = BUFFER_BYTES / width, n_elements = width / tc_dtype_bytes(stream->from), out_bytes = tc_cast_bytes(stream, width);
    uint64_t wrong = 0;
    int was_nontemporal = tc_copy_set_nontemporal(0); /* If a source cannot be read, the setting stays off until the thread starts its next copy. */
    for (size_t first = 0; first < rows->n; first += step) {
        tc_rows some = *rows;
        some.block += first;
        some.row += first;
        some.n = rows->n - first < step ? rows->n - first : step;
        some.n_breaks = tc_count_breaks(some.block, some.row, some.n);
        tc_gather(&plain, &some, &(tc_sink){buffer, NULL});
        wrong |= cast(buffer, values + first * out_bytes, some.n * n_elements);
    }
    tc_copy_set_nontemporal(was_nontemporal);
    return wrong;
}

/* Cast a long run piece by piece, and prefetch the next piece, because the hardware prefetcher stops at the end of each
 * page. */
static uint64_t cast_long(const tc_stream *stream, uint8_t *to, const uint8_t *from, size_t n_bytes) {
    tc_caster cast = tc_caster_of(stream->from, stream->to);
    size_t from_bytes = tc_dtype_bytes(stream->from), out_bytes = tc_cast_bytes(stream, PIECE_BYTES);
    uint64_t wrong = 0;
    for (; n_bytes > PIECE_BYTES; n_bytes -= PIECE_BYTES, from += PIECE_BYTES, to += out_bytes) {
        prefetch_row(from + PIECE_BYTES, n_bytes - PIECE_BYTES < PIECE_BYTES ? n_bytes - PIECE_BYTES : PIECE_BYTES);
        wrong |= cast(from, to, PIECE_BYTES / from_bytes);
    }
    return wrong | cast(from, to, n_bytes / from_bytes);
}

static uint64_t cast_wide(const tc_stream *stream, const tc_rows *rows, uint8_t *values) {
    const tc_source *const sources = rows->sources;
    const uint32_t *const block = rows->block, *const row = rows->row;
    const size_t n = rows->n, width = stream->width, out_bytes = tc_cast_bytes(stream, width);
    uint64_t wrong = 0;
    for (size_t i = 0; i < n && i < AHEAD; i++) prefetch_row(sources[block[i]].values + row[i] * width, width);
    for (size_t i = 0, k; i < n; i += k) {
        k = run_at(rows, i);
        if (k == 1 && i + AHEAD < n) prefetch_row(sources[block[i + AHEAD]].values + row[i + AHEAD] * width, width);
        wrong |= cast_long(stream, values + i * out_bytes, sources[block[i]].values + row[i] * width, k * width);
    }
    return wrong;
}

/* As in gather.c: the sizes are those of tc_measure. The start is read again here and therefore checked again. */
static int cast_var(const tc_stream *stream, const tc_rows *rows, const tc_sink *sink, uint64_t *wrong) {
    const size_t n = rows->n, width = stream->width, out_bytes = tc_cast_bytes(stream, width);
    const int64_t *offsets = sink->offsets;
    for (size_t i = 0, k; i < n; i += k) {
        k = run_at(rows, i);
        if (k == 1 && i + AHEAD < n) prefetch_elements(rows, i + AHEAD, width, offsets);
        const tc_source *source = &rows->sources[rows->block[i]];
        uint64_t start = (uint64_t)source->offsets[rows->row[i]], n_elements = (uint64_t)(offsets[i + k] - offsets[i]);
        if (start > source->n_elements || n_elements > source->n_elements - start) return TC_CORRUPT;
        *wrong |= cast_long(stream, sink->values + (size_t)offsets[i] * out_bytes, source->values + start * width, n_elements * width);
    }
    return 0;
}

int tc_gather_cast(const tc_stream *stream, const tc_rows *rows, const tc_sink *sink) {
    uint64_t wrong = 0;
    int status = 0;
    if (stream->kind == TC_VAR) status = cast_var(stream, rows, sink, &wrong);
    else if (stream->kind == TC_BITS) wrong = cast_buffered(stream, rows, 1, sink->values);
    else if (stream->width > SMALL_BYTES) wrong = cast_wide(stream, rows, sink->values);
    else if (stream->width) wrong = cast_buffered(stream, rows, stream->width, sink->values);
    return status ? status : wrong ? TC_MISFIT : 0;
}
