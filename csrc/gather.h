/* Gather: rows of many blocks, of all columns, into the batch's memory. One call a batch.
 *
 * A stream is one run of Arrow buffers that the kernel understands; a column has one or more (values, validity, shape).
 *   TC_FIXED  width bytes a row                         -> values: width bytes a row
 *   TC_BITS   one bit a row, least significant first    -> values: one byte a row, 0 or 1; a NULL source gives 1 (no validity buffer: all valid)
 *   TC_VAR    int64 offsets in elements of width bytes, and values
 *             -> offsets: int64[n + 1] in elements from 0; values: the elements
 *   TC_REF    as TC_VAR with width 1, but nothing is copied -> values: n pairs (address, length), for lists of bytes and str, whose objects
 *             are made by the consumer and filled from the source: one copy instead of two
 * The caller has checked: block < n_blocks, row < rows of that block, offsets monotonic and inside their chunk.
 */
#ifndef TC_GATHER_H
#define TC_GATHER_H
#include <stddef.h>
#include <stdint.h>

enum { TC_FIXED = 0, TC_BITS = 1, TC_VAR = 2, TC_REF = 3 };

/* Source of a stream in a block. For TC_FIXED and TC_BITS offsets is NULL. */
typedef struct {
    const uint8_t *values;
    const int64_t *offsets;
} tc_source;

typedef struct {
    uint32_t kind;
    uint32_t width; /* bytes of a row (TC_FIXED) or of an element (TC_VAR); unused otherwise */
} tc_stream;

typedef struct {
    uint8_t *values;
    int64_t *offsets;
} tc_sink;

typedef struct {
    uint64_t address;
    uint64_t n_bytes;
} tc_ref;

/* Fill offsets[1..n] (offsets[0] is given) of a TC_VAR stream's sink, and return the elements of these rows. */
int64_t tc_measure(const tc_source *sources, const uint32_t *block, const uint32_t *row, size_t n, int64_t *offsets);

/* Copy the rows of one stream. For TC_VAR the sink's offsets[0..n] are those of tc_measure, and values is where offset 0 would be. */
void tc_gather(const tc_stream *stream, const tc_source *sources, const uint32_t *block, const uint32_t *row, size_t n, const tc_sink *sink);

/* Whether offsets[0..n] start at 0 or more, never fall and end at `limit` or below: 1 or 0. */
int tc_offsets_ok(const int64_t *offsets, size_t n, int64_t limit);

#endif
