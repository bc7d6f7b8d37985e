/* The gather of streams with a cast: the kernels of gather.c, with a cast in place of the copy. */
#include "cast.h"
#include "copy.h"

#include "runs.h"

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
    int passed = tc_copy_pass(0); /* If a source cannot be read, the setting stays off until the thread starts its next copy. */
    for (size_t first = 0; first < rows->n; first += step) {
        tc_rows some = *rows;
        some.block += first;
        some.row += first;
        some.n = rows->n - first < step ? rows->n - first : step;
        some.n_breaks = tc_count_breaks(some.block, some.row, some.n);
        tc_gather(&plain, &some, &(tc_sink){buffer, NULL});
        wrong |= cast(buffer, values + first * out_bytes, some.n * n_elements);
    }
    tc_copy_pass(passed);
    return wrong;
}

/* Cast a long run piece by piece, and prefetch the next piece, because the hardware prefetcher stops at the end of each
 * page. */
static uint64_t cast_long(const tc_stream *stream, uint8_t *to, const uint8_t *from, size_t n_bytes) {
    tc_caster cast = tc_caster_of(stream->from, stream->to);
    size_t from_bytes = tc_dtype_bytes(stream->from), out_bytes = tc_cast_bytes(stream, PIECE_BYTES);
    uint64_t wrong = 0;
    for (; n_bytes > PIECE_BYTES; n_bytes -= PIECE_BYTES, from += PIECE_BYTES, to += out_bytes) {
        ask_row(from + PIECE_BYTES, n_bytes - PIECE_BYTES < PIECE_BYTES ? n_bytes - PIECE_BYTES : PIECE_BYTES);
        wrong |= cast(from, to, PIECE_BYTES / from_bytes);
    }
    return wrong | cast(from, to, n_bytes / from_bytes);
}

static uint64_t cast_wide(const tc_stream *stream, const tc_rows *rows, uint8_t *values) {
    const tc_source *const sources = rows->sources;
    const uint32_t *const block = rows->block, *const row = rows->row;
    const size_t n = rows->n, width = stream->width, out_bytes = tc_cast_bytes(stream, width);
    uint64_t wrong = 0;
    for (size_t i = 0; i < n && i < AHEAD; i++) ask_row(sources[block[i]].values + row[i] * width, width);
    for (size_t i = 0, k; i < n; i += k) {
        k = run_at(rows, i);
        if (k == 1 && i + AHEAD < n) ask_row(sources[block[i + AHEAD]].values + row[i + AHEAD] * width, width);
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
        if (k == 1 && i + AHEAD < n) ask_elements(rows, i + AHEAD, width, offsets);
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
