#include "gather.h"

#include <string.h>

/* Rows are asked for this far ahead: at 100 ns a miss and 20 to 200 ns a row, four to eight in flight hide the latency. */
enum { AHEAD = 6, LINE = 64, PREFETCH_LINES = 8 };

static inline void prefetch_row(const uint8_t *row, size_t width) {
    size_t lines = (width + LINE - 1) / LINE;
    if (lines > PREFETCH_LINES) lines = PREFETCH_LINES; /* the hardware follows from there */
    for (size_t i = 0; i < lines; i++) __builtin_prefetch(row + i * LINE, 0, 0);
}

#define GATHER_AS(type)                                                                                                        \
    do {                                                                                                                       \
        type *out = (type *)values;                                                                                            \
        for (size_t i = 0; i < n; i++) out[i] = ((const type *)sources[block[i]].values)[row[i]];                               \
    } while (0)

static void gather_fixed(const tc_source *sources, size_t width, const uint32_t *block, const uint32_t *row, size_t n, uint8_t *values) {
    switch (width) { /* chunks are 64-byte aligned, so these loads are aligned too */
        case 0: return;
        case 1: GATHER_AS(uint8_t); return;
        case 2: GATHER_AS(uint16_t); return;
        case 4: GATHER_AS(uint32_t); return;
        case 8: GATHER_AS(uint64_t); return;
        default: break;
    }
    for (size_t i = 0; i < n && i < AHEAD; i++) prefetch_row(sources[block[i]].values + (size_t)row[i] * width, width);
    for (size_t i = 0; i < n; i++) {
        if (i + AHEAD < n) prefetch_row(sources[block[i + AHEAD]].values + (size_t)row[i + AHEAD] * width, width);
        memcpy(values + i * width, sources[block[i]].values + (size_t)row[i] * width, width);
    }
}

static void gather_bits(const tc_source *sources, const uint32_t *block, const uint32_t *row, size_t n, uint8_t *values) {
    for (size_t i = 0; i < n; i++) {
        const uint8_t *bits = sources[block[i]].values;
        values[i] = bits == NULL ? 1 : (uint8_t)((bits[row[i] >> 3] >> (row[i] & 7)) & 1);
    }
}

static void gather_var(const tc_source *sources, size_t width, const uint32_t *block, const uint32_t *row, size_t n, const tc_sink *sink) {
    for (size_t i = 0; i < n; i++) {
        if (i + AHEAD < n) {
            const tc_source *ahead = &sources[block[i + AHEAD]];
            size_t n_bytes = (size_t)(sink->offsets[i + AHEAD + 1] - sink->offsets[i + AHEAD]) * width;
            prefetch_row(ahead->values + (size_t)ahead->offsets[row[i + AHEAD]] * width, n_bytes);
        }
        const tc_source *source = &sources[block[i]];
        size_t n_bytes = (size_t)(sink->offsets[i + 1] - sink->offsets[i]) * width;
        memcpy(sink->values + (size_t)sink->offsets[i] * width, source->values + (size_t)source->offsets[row[i]] * width, n_bytes);
    }
}

static void gather_refs(const tc_source *sources, const uint32_t *block, const uint32_t *row, size_t n, uint8_t *values) {
    tc_ref *refs = (tc_ref *)values;
    for (size_t i = 0; i < n; i++) {
        if (i + AHEAD < n) __builtin_prefetch(&sources[block[i + AHEAD]].offsets[row[i + AHEAD]], 0, 0);
        const tc_source *source = &sources[block[i]];
        int64_t start = source->offsets[row[i]];
        refs[i].address = (uint64_t)(uintptr_t)(source->values + start);
        refs[i].n_bytes = (uint64_t)(source->offsets[row[i] + 1] - start);
    }
}

int64_t tc_measure(const tc_source *sources, const uint32_t *block, const uint32_t *row, size_t n, int64_t *offsets) {
    int64_t end = offsets[0];
    for (size_t i = 0; i < n; i++) {
        if (i + AHEAD < n) __builtin_prefetch(&sources[block[i + AHEAD]].offsets[row[i + AHEAD]], 0, 0);
        const int64_t *source = sources[block[i]].offsets + row[i];
        end += source[1] - source[0];
        offsets[i + 1] = end;
    }
    return end - offsets[0];
}

void tc_gather(const tc_stream *stream, const tc_source *sources, const uint32_t *block, const uint32_t *row, size_t n, const tc_sink *sink) {
    switch (stream->kind) {
        case TC_FIXED: gather_fixed(sources, stream->width, block, row, n, sink->values); return;
        case TC_BITS: gather_bits(sources, block, row, n, sink->values); return;
        case TC_VAR: gather_var(sources, stream->width, block, row, n, sink); return;
        case TC_REF: gather_refs(sources, block, row, n, sink->values); return;
        default: return;
    }
}

int tc_offsets_ok(const int64_t *offsets, size_t n, int64_t limit) {
    if (offsets[0] < 0 || offsets[n] > limit) return 0;
    int64_t falls = 0; /* a sum without a branch, so that the loop is vectorised: this runs over every offset once */
    for (size_t i = 0; i < n; i++) falls |= offsets[i + 1] < offsets[i];
    return falls == 0;
}
