/* The checks of gather.h: the gathering thread checks a page when it first touches it. For each later row of a verified
 * page, the check is one load of a byte. */
#include <stdatomic.h>

#include "copy.h"
#include "crc32c.h"
#include "gather.h"
#include "runs.h"

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

static int check_fixed(size_t width, const tc_rows *rows, tc_fault *fault) {
    if (width == 0) return 0;
    for (size_t i = 0, k; i < rows->n; i += k) {
        k = run_at(rows, i);
        const tc_chunk *chunk = &rows->chunks[rows->block[i]];
        if (chunk->checked == NULL) continue;
        int64_t page = wrong_page(chunk, rows->sources[rows->block[i]].values + rows->row[i] * width, k * width);
        if (page != NONE) return *fault = (tc_fault){i, page}, TC_CORRUPT;
    }
    return 0;
}

static int check_bits(const tc_rows *rows, tc_fault *fault) {
    for (size_t i = 0, k; i < rows->n; i += k) {
        k = run_at(rows, i);
        const tc_chunk *chunk = &rows->chunks[rows->block[i]];
        const uint8_t *bits = rows->sources[rows->block[i]].values;
        if (chunk->checked == NULL || bits == NULL) continue;
        size_t first = rows->row[i] >> 3, last = (rows->row[i] + k - 1) >> 3;
        int64_t page = wrong_page(chunk, bits + first, last - first + 1);
        if (page != NONE) return *fault = (tc_fault){i, page}, TC_CORRUPT;
    }
    return 0;
}

static const tc_chunk unchecked = {NULL, 0, NULL, NULL};

/* The offsets are checked first, because they tell which pages of values are needed. They are checked again where they
 * are used. */
static int check_var(size_t width, const tc_rows *rows, tc_fault *fault) {
    for (size_t i = 0, k; i < rows->n; i += k) {
        k = run_at(rows, i);
        const tc_chunk *chunk = rows->chunks == NULL ? &unchecked : &rows->chunks[rows->block[i]];
        const tc_source *source = &rows->sources[rows->block[i]];
        const int64_t *offsets = source->offsets + rows->row[i];
        int64_t page = chunk->checked == NULL ? NONE : wrong_page(chunk, offsets, (k + 1) * sizeof *offsets);
        if (page == NONE) {
            int64_t start = offsets[0], end = offsets[k];
            if (!is_inside(start, end, source->n_elements) || !never_falls(offsets, k)) return *fault = (tc_fault){i, NONE}, TC_CORRUPT;
            if (chunk->checked == NULL || start == end || width == 0) continue;
            page = wrong_page(chunk, source->values + (size_t)start * width, (size_t)(end - start) * width);
        }
        if (page != NONE) return *fault = (tc_fault){i, page}, TC_CORRUPT;
    }
    return 0;
}

int tc_check(const tc_stream *stream, const tc_rows *rows, tc_fault *fault) {
    switch (stream->kind) {
        case TC_FIXED: return rows->chunks == NULL ? 0 : check_fixed(stream->width, rows, fault);
        case TC_BITS: return rows->chunks == NULL ? 0 : check_bits(rows, fault);
        case TC_VAR: return check_var(stream->width, rows, fault);
        case TC_REF: return check_var(1, rows, fault);
        default: return 0;
    }
}
