/* Two kernels of each kind, with equal results: one for scattered rows, which prefetches the rows ahead, and one for
 * runs of consecutive rows, which copies each run at once. The number of breaks decides which one is faster. */
#include "gather.h"

#include <string.h>

#include "cast.h"
#include "copy.h"
#include "gather_rows.h"
#include "packing.h"

/* Number of rows that are prefetched ahead. With 100 ns per cache miss, 16 small rows in flight hide the latency; 8 to
 * 24 are within 10 %. For long rows 2 are sufficient, because the start of each of their pages is prefetched; 3 and 4
 * give the same. */
enum { AHEAD_LONG = 2, AHEAD_SMALL = 16, SMALL_BYTES = 128, FEW_ROWS = 32 };

static size_t count_breaks(const uint32_t *block, const uint32_t *row, size_t n) {
    uint32_t breaks = 0;
    for (size_t i = 1; i < n; i++) breaks += (row[i] != row[i - 1] + 1) | (block[i] != block[i - 1]);
    return breaks;
}

/* The first rows show whether all rows are worth counting. */
size_t tc_count_breaks(const uint32_t *block, const uint32_t *row, size_t n) {
    size_t few = n < FEW_ROWS ? n : FEW_ROWS;
    if (n > UINT32_MAX || count_breaks(block, row, few) * SHORTEST_RUN >= few) return n;
    return count_breaks(block, row, n);
}

/* Loops over single rows keep the row arrays in locals. The output bytes may alias anything, so the compiler would
 * otherwise reload the arrays for each row (half the speed for rows of 8 bytes). */
#define LOCALS(rows)                                                                                                           \
    const tc_source *const sources = (rows)->sources;                                                                          \
    const uint32_t *const block = (rows)->block, *const row = (rows)->row;                                                     \
    const size_t n = (rows)->n

/* A small row is read soon and once, so it is prefetched into L1. */
static inline void prefetch_small(const uint8_t *row, size_t width) {
    for (size_t at = 0; at < width; at += LINE) __builtin_prefetch(row + at, 0, 0);
}

/* Inlined with a constant width for small rows, so that a copy is a few loads without a call. */
static inline __attribute__((always_inline)) void copy_rows(const tc_rows *rows, size_t width, uint8_t *values) {
    LOCALS(rows);
    for (size_t i = 0; i < n && i < AHEAD_SMALL; i++) prefetch_small(sources[block[i]].values + row[i] * width, width);
    for (size_t i = 0; i < n; i++) {
        if (i + AHEAD_SMALL < n) prefetch_small(sources[block[i + AHEAD_SMALL]].values + row[i + AHEAD_SMALL] * width, width);
        memcpy(values + i * width, sources[block[i]].values + row[i] * width, width);
    }
}

/* Scattered long rows. */
static void copy_long_rows(const tc_rows *rows, size_t width, uint8_t *values) {
    LOCALS(rows);
    for (size_t i = 0; i < n && i < AHEAD_LONG; i++) prefetch_row(sources[block[i]].values + row[i] * width, width);
    for (size_t i = 0; i < n; i++) {
        if (i + AHEAD_LONG < n) prefetch_row(sources[block[i + AHEAD_LONG]].values + row[i + AHEAD_LONG] * width, width);
        tc_copy(values + i * width, sources[block[i]].values + row[i] * width, width);
    }
}

typedef struct {
    const tc_rows *rows;
    size_t width;
    uint8_t *values;
    const int64_t *offsets; /* Offsets of the batch's elements, for rows of varying length. */
} target;

static inline row_copy fixed_at(const void *of, size_t i) {
    const target *t = of;
    const tc_rows *rows = t->rows;
    return (row_copy){rows->sources[rows->block[i]].values + rows->row[i] * t->width, t->values + i * t->width, t->width};
}

/* Without prefetch: out-of-order execution runs ahead in such a short loop. */
#define COPY_AS(type)                                                                                                          \
    do {                                                                                                                       \
        LOCALS(rows);                                                                                                          \
        type *out = (type *)values;                                                                                            \
        for (size_t i = 0; i < n; i++) out[i] = ((const type *)sources[block[i]].values)[row[i]];                               \
    } while (0)

static void copy_runs(const tc_rows *rows, size_t width, uint8_t *values) {
    for (size_t i = 0, k; i < rows->n; i += k) {
        k = run_at(rows, i);
        tc_copy(values + i * width, rows->sources[rows->block[i]].values + rows->row[i] * width, k * width);
    }
}

static void gather_fixed(const tc_rows *rows, size_t width, uint8_t *values) {
    if (is_in_runs(rows)) {
        copy_runs(rows, width, values);
        return;
    }
    switch (width) { /* Chunks are aligned to 64 bytes, so these loads are aligned too. */
        case 0: return;
        case 1: COPY_AS(uint8_t); return;
        case 2: COPY_AS(uint16_t); return;
        case 4: COPY_AS(uint32_t); return;
        case 8: COPY_AS(uint64_t); return;
        case 16: copy_rows(rows, 16, values); return;
        case 32: copy_rows(rows, 32, values); return;
        case 64: copy_rows(rows, 64, values); return;
        case 128: copy_rows(rows, 128, values); return;
        default: break;
    }
    if (width <= SMALL_BYTES) copy_rows(rows, width, values);
    else if (width <= MEDIUM_ROW_BYTES) copy_medium_rows(fixed_at, &(target){rows, width, values, NULL}, rows->n);
    else copy_long_rows(rows, width, values);
}

static inline uint8_t bit_at(const uint8_t *bits, size_t at) { return (bits[at >> 3] >> (at & 7)) & 1; }

/* Eight bits per step: each byte keeps its own bit, and adding 127 carries it to the top bit if it is set. */
static void spread_bits(const uint8_t *bits, size_t at, size_t n, uint8_t *values) {
    size_t i = 0;
    for (; i < n && ((at + i) & 7); i++) values[i] = bit_at(bits, at + i);
    for (; i + 8 <= n; i += 8) {
        uint64_t own = (bits[(at + i) >> 3] * 0x0101010101010101u) & 0x8040201008040201u;
        uint64_t spread = ((own + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
        for (size_t byte = 0; byte < 8; byte++) values[i + byte] = (uint8_t)(spread >> (8 * byte));
    }
    for (; i < n; i++) values[i] = bit_at(bits, at + i);
}

static void gather_bits(const tc_rows *rows, uint8_t *values) {
    LOCALS(rows);
    if (!is_in_runs(rows)) {
        for (size_t i = 0; i < n; i++) {
            const uint8_t *bits = sources[block[i]].values;
            values[i] = bits == NULL ? 1 : bit_at(bits, row[i]);
        }
        return;
    }
    for (size_t i = 0, k; i < n; i += k) {
        k = run_at(rows, i);
        const uint8_t *bits = sources[block[i]].values;
        if (bits == NULL) memset(values + i, 1, k);
        else spread_bits(bits, row[i], k, values + i);
    }
}

/* The elements of k consecutive rows of a block. The sizes are those of tc_measure. The start is read again and
 * therefore checked again, because the file may change concurrently. */
static inline row_copy elements_at(const tc_source *source, uint32_t row, size_t width, const int64_t *offsets, size_t k, uint8_t *values) {
    uint64_t start = (uint64_t)source->offsets[row], n_elements = (uint64_t)(offsets[k] - offsets[0]);
    if (start > source->n_elements || n_elements > source->n_elements - start) return (row_copy){NULL, NULL, OUTSIDE_CHUNK};
    return (row_copy){source->values + start * width, values + (size_t)offsets[0] * width, n_elements * width};
}

static inline int copy_elements(const tc_source *source, uint32_t row, size_t width, const int64_t *offsets, size_t k, uint8_t *values) {
    row_copy run = elements_at(source, row, width, offsets, k, values);
    if (run.n_bytes == OUTSIDE_CHUNK) return TC_CORRUPT;
    tc_copy(run.to, run.from, run.n_bytes);
    return 0;
}

static int copy_var_runs(const tc_rows *rows, size_t width, const tc_sink *sink) {
    int status = 0;
    for (size_t i = 0, k; status == 0 && i < rows->n; i += k) {
        k = run_at(rows, i);
        status = copy_elements(&rows->sources[rows->block[i]], rows->row[i], width, sink->offsets + i, k, sink->values);
    }
    return status;
}

static inline row_copy var_at(const void *of, size_t i) {
    const target *t = of;
    const tc_rows *rows = t->rows;
    return elements_at(&rows->sources[rows->block[i]], rows->row[i], t->width, t->offsets + i, 1, t->values);
}

static int copy_var_rows(const tc_rows *rows, size_t width, const tc_sink *sink) {
    LOCALS(rows);
    const int64_t *const offsets = sink->offsets;
    uint8_t *const values = sink->values;
    if ((size_t)(offsets[n] - offsets[0]) * width <= n * MEDIUM_ROW_BYTES) return copy_medium_rows(var_at, &(target){rows, width, values, offsets}, n);
    int status = 0;
    for (size_t i = 0; i < n && i < AHEAD_LONG; i++) prefetch_elements(rows, i, width, offsets);
    for (size_t i = 0; status == 0 && i < n; i++) {
        if (i + AHEAD_LONG < n) prefetch_elements(rows, i + AHEAD_LONG, width, offsets);
        status = copy_elements(&sources[block[i]], row[i], width, offsets + i, 1, values);
    }
    return status;
}

static int gather_refs(const tc_rows *rows, uint8_t *values) {
    LOCALS(rows);
    tc_ref *refs = (tc_ref *)values;
    for (size_t i = 0; i < n; i++) {
        if (i + AHEAD_SMALL < n) __builtin_prefetch(&sources[block[i + AHEAD_SMALL]].offsets[row[i + AHEAD_SMALL]], 0, 0);
        const tc_source *source = &sources[block[i]];
        int64_t start = source->offsets[row[i]], end = source->offsets[row[i] + 1];
        if (!is_inside(start, end, source->n_elements)) return TC_CORRUPT;
        refs[i] = (tc_ref){(uint64_t)(uintptr_t)(source->values + start), (uint64_t)(end - start)};
    }
    return 0;
}

static int measure_runs(const tc_rows *rows, int64_t *offsets) {
    for (size_t i = 0, k; i < rows->n; i += k) {
        k = run_at(rows, i);
        const tc_source *source = &rows->sources[rows->block[i]];
        const int64_t *from = source->offsets + rows->row[i];
        int64_t shift = offsets[i] - from[0];
        if (!is_inside(from[0], from[k], source->n_elements)) return TC_CORRUPT;
        for (size_t j = 1; j <= k; j++) offsets[i + j] = (int64_t)((uint64_t)from[j] + (uint64_t)shift);
        if (!never_decreases(offsets + i, k)) return TC_CORRUPT; /* The copy is checked, because the source may change concurrently. */
    }
    return 0;
}

static int measure_rows(const tc_rows *rows, int64_t *offsets) {
    LOCALS(rows);
    int64_t total = offsets[0];
    for (size_t i = 0; i < n; i++) {
        if (i + AHEAD_SMALL < n) __builtin_prefetch(&sources[block[i + AHEAD_SMALL]].offsets[row[i + AHEAD_SMALL]], 0, 0);
        const tc_source *source = &sources[block[i]];
        int64_t start = source->offsets[row[i]], end = source->offsets[row[i] + 1];
        if (!is_inside(start, end, source->n_elements)) return TC_CORRUPT;
        total += end - start;
        offsets[i + 1] = total;
    }
    return 0;
}

int tc_measure(const tc_rows *rows, int64_t *offsets) { return is_in_runs(rows) ? measure_runs(rows, offsets) : measure_rows(rows, offsets); }

int tc_gather(const tc_stream *stream, const tc_rows *rows, const tc_sink *sink) {
    if (stream->to != TC_AS_IS) return tc_gather_cast(stream, rows, sink);
    switch (stream->kind) {
        case TC_FIXED: gather_fixed(rows, stream->width, sink->values); return 0;
        case TC_BITS: gather_bits(rows, sink->values); return 0;
        case TC_VAR: return is_in_runs(rows) ? copy_var_runs(rows, stream->width, sink) : copy_var_rows(rows, stream->width, sink);
        case TC_REF: return gather_refs(rows, sink->values);
        case TC_PACKED: tc_gather_packed(stream, rows, sink); return 0;
        default: return 0;
    }
}

void tc_copy_refs(uint8_t *const *destinations, const tc_ref *refs, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (i + AHEAD_LONG < n) prefetch_row((const uint8_t *)(uintptr_t)refs[i + AHEAD_LONG].address, refs[i + AHEAD_LONG].n_bytes);
        tc_copy(destinations[i], (const uint8_t *)(uintptr_t)refs[i].address, refs[i].n_bytes);
    }
}

int tc_offsets_ok(const int64_t *offsets, size_t n, int64_t limit) {
    return offsets[0] >= 0 && offsets[n] <= limit && never_decreases(offsets, n);
}

/* The checks of gather.h: the gathering thread checks a page when it first touches it. For each later row of a verified
 * page, the check is one load of a byte. */
#include <stdatomic.h>

#include "crc32c.h"

enum { PAGE_BYTES = 65536 };
static const int64_t NONE = -1;

static int kernel;

void tc_gather_init(int crc_kernel) {
    tc_copy_init(crc_kernel);
    tc_crc32c_init();
    kernel = crc_kernel;
}

/* Relaxed order is sufficient: the byte says that the mapping's bytes were right, and every thread sees those bytes
 * anyway. Two threads that both find 0 both compute the checksum and both write 1. */
static int was_right(const tc_chunk *chunk, size_t page) {
    return atomic_load_explicit((_Atomic uint8_t *)&chunk->checked[page], memory_order_relaxed);
}

__attribute__((noinline, cold)) static int sum_is_right(const tc_chunk *chunk, size_t page) {
    size_t start = page * PAGE_BYTES, n_bytes = chunk->n_bytes - start;
    if (n_bytes > PAGE_BYTES) n_bytes = PAGE_BYTES;
    if (tc_crc32c_run(kernel, 0, chunk->base + start, n_bytes) != chunk->crcs[page]) return 0;
    atomic_store_explicit((_Atomic uint8_t *)&chunk->checked[page], 1, memory_order_relaxed);
    return 1;
}

/* The first wrong page among those of n_bytes > 0 at `from`, in a chunk that is to be checked, or NONE. */
static inline int64_t wrong_page(const tc_chunk *chunk, const void *from, size_t n_bytes) {
    size_t start = (size_t)((const uint8_t *)from - chunk->base);
    for (size_t page = start / PAGE_BYTES; page <= (start + n_bytes - 1) / PAGE_BYTES; page++)
        if (!was_right(chunk, page) && !sum_is_right(chunk, page)) return (int64_t)page;
    return NONE;
}

int64_t tc_check_chunk(const tc_chunk *chunk) {
    return chunk->checked == NULL || chunk->n_bytes == 0 ? NONE : wrong_page(chunk, chunk->base, chunk->n_bytes);
}

static int check_fixed(size_t width, const tc_rows *rows, tc_corruption *fault) {
    if (width == 0) return 0;
    for (size_t i = 0, k; i < rows->n; i += k) {
        k = run_at(rows, i);
        const tc_chunk *chunk = &rows->chunks[rows->block[i]];
        if (chunk->checked == NULL) continue;
        int64_t page = wrong_page(chunk, rows->sources[rows->block[i]].values + rows->row[i] * width, k * width);
        if (page != NONE) return *fault = (tc_corruption){i, page}, TC_CORRUPT;
    }
    return 0;
}

static int check_bits(const tc_rows *rows, tc_corruption *fault) {
    for (size_t i = 0, k; i < rows->n; i += k) {
        k = run_at(rows, i);
        const tc_chunk *chunk = &rows->chunks[rows->block[i]];
        const uint8_t *bits = rows->sources[rows->block[i]].values;
        if (chunk->checked == NULL || bits == NULL) continue;
        size_t first = rows->row[i] >> 3, last = (rows->row[i] + k - 1) >> 3;
        int64_t page = wrong_page(chunk, bits + first, last - first + 1);
        if (page != NONE) return *fault = (tc_corruption){i, page}, TC_CORRUPT;
    }
    return 0;
}

static const tc_chunk unchecked = {NULL, 0, NULL, NULL};

/* The offsets are checked first, because they tell which pages of values are needed. They are checked again where they
 * are used. */
static int check_var(size_t width, const tc_rows *rows, tc_corruption *fault) {
    for (size_t i = 0, k; i < rows->n; i += k) {
        k = run_at(rows, i);
        const tc_chunk *chunk = rows->chunks == NULL ? &unchecked : &rows->chunks[rows->block[i]];
        const tc_source *source = &rows->sources[rows->block[i]];
        const int64_t *offsets = source->offsets + rows->row[i];
        int64_t page = chunk->checked == NULL ? NONE : wrong_page(chunk, offsets, (k + 1) * sizeof *offsets);
        if (page == NONE) {
            int64_t start = offsets[0], end = offsets[k];
            if (!is_inside(start, end, source->n_elements) || !never_decreases(offsets, k)) return *fault = (tc_corruption){i, NONE}, TC_CORRUPT;
            if (chunk->checked == NULL || start == end || width == 0) continue;
            page = wrong_page(chunk, source->values + (size_t)start * width, (size_t)(end - start) * width);
        }
        if (page != NONE) return *fault = (tc_corruption){i, page}, TC_CORRUPT;
    }
    return 0;
}

int tc_check(const tc_stream *stream, const tc_rows *rows, tc_corruption *fault) {
    switch (stream->kind) {
        case TC_FIXED: return rows->chunks == NULL ? 0 : check_fixed(stream->width, rows, fault);
        case TC_BITS: return rows->chunks == NULL ? 0 : check_bits(rows, fault);
        case TC_VAR: return check_var(stream->width, rows, fault);
        case TC_REF: return check_var(1, rows, fault);
        default: return 0;
    }
}
