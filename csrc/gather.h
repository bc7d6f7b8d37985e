/* Gather: rows of many blocks, of all columns, into the batch's memory, and the checks that come before a byte of them is used.
 *
 * A stream is one run of Arrow buffers that the kernel understands; a column has one or more (values, validity, shape).
 *   TC_FIXED  width bytes a row                         -> values: width bytes a row
 *   TC_BITS   one bit a row, least significant first    -> values: one byte a row, 0 or 1; a NULL source gives 1 (no validity buffer: all valid)
 *   TC_VAR    int64 offsets in elements of width bytes, and values
 *             -> offsets: int64[n + 1] in elements from 0; values: the elements
 *   TC_REF    as TC_VAR with width 1, but nothing is copied -> values: n pairs (address, length), for lists of bytes, whose objects
 *             are made by the consumer and filled from the source: one copy instead of two
 * The caller has checked: block < n_blocks, row < rows of that block. Offsets are believed nowhere: each row's are checked whenever they are
 * read, which costs two compares that never fail. Everything here runs under the caller's SIGBUS guard: no locks, no allocation.
 */
#ifndef TC_GATHER_H
#define TC_GATHER_H
#include <stddef.h>
#include <stdint.h>

enum { TC_FIXED = 0, TC_BITS = 1, TC_VAR = 2, TC_REF = 3 };

#define TC_CORRUPT (-6) /* a page's checksum is wrong, or offsets fall or leave their chunk */
#define TC_MISFIT (-7)  /* a value has no equal in the dtype that it is cast to */

/* Source of a stream in a block. For TC_FIXED and TC_BITS offsets is NULL and n_elements is not looked at. */
typedef struct {
    const uint8_t *values;
    const int64_t *offsets;
    uint64_t n_elements; /* of values, below 2^63 */
} tc_source;

/* A stored chunk in a mapping that holds a stream's buffers: pages of 64 KiB from base on, the last short, and their CRC-32C. */
typedef struct {
    const uint8_t *base;
    uint64_t n_bytes;
    const uint32_t *crcs;
    uint8_t *checked; /* one byte a page, 1: was right. NULL: nothing to check. Threads may share it, and check the same page at once */
} tc_chunk;

/* Two words, as Python lays them out: kind | from << 8 | to << 16, width. */
typedef struct {
    uint8_t kind;
    uint8_t from, to; /* dtypes of cast.h, both TC_AS_IS (0) where nothing is cast; of TC_BITS from is TC_BOOL */
    uint8_t zero;
    uint32_t width; /* stored bytes of a row (TC_FIXED) or of an element (TC_VAR); unused otherwise */
} tc_stream;

/* Rows of one stream, in the order that they are served. */
typedef struct {
    const tc_source *sources; /* [n_blocks] */
    const tc_chunk *chunks;   /* [n_blocks], or NULL: nothing is to be checked */
    const uint32_t *block, *row;
    size_t n;
    size_t n_breaks; /* tc_count_breaks: it chooses between the kernels for rows anywhere and for runs of rows */
} tc_rows;

typedef struct {
    uint8_t *values;
    int64_t *offsets;
} tc_sink;

typedef struct {
    uint64_t address;
    uint64_t n_bytes;
} tc_ref;

/* What is wrong with a row. page: number in its chunk of the page whose sum is wrong, or -1: the offsets are. */
typedef struct {
    size_t row; /* number in the rows that were given */
    int64_t page;
} tc_fault;

/* Make ready for checking, with a kernel of crc32c.h. Once a process, before everything else here. */
void tc_gather_init(int crc_kernel);

/* Of the n - 1 steps from row to row, how many do not lead to the next row of the same block; n where it is seen early that most do not. */
size_t tc_count_breaks(const uint32_t *block, const uint32_t *row, size_t n);

/* Check the pages that hold the rows, their offsets included, as far as nobody did. 0, or TC_CORRUPT with *fault set. In a run of rows the
 * fault may name an earlier row of the same block than the one that is wrong; with n_breaks = n it is exact. */
int tc_check(const tc_stream *stream, const tc_rows *rows, tc_fault *fault);

/* Fill offsets[1..n] (offsets[0] is given) of a TC_VAR stream's sink. 0 or TC_CORRUPT. */
int tc_measure(const tc_rows *rows, int64_t *offsets);

/* Copy the rows, or cast them (cast.h). For TC_VAR the sink's offsets[0..n] are those of tc_measure, and values is where offset 0 would be.
 * 0, TC_CORRUPT or TC_MISFIT. */
int tc_gather(const tc_stream *stream, const tc_rows *rows, const tc_sink *sink);

/* Copy what each reference points to to places[i]. */
void tc_fill(uint8_t *const *places, const tc_ref *refs, size_t n);

/* Check every page of a chunk. The number of the first that is wrong, or -1. */
int64_t tc_check_chunk(const tc_chunk *chunk);

/* Whether offsets[0..n] start at 0 or more, never fall and end at `limit` or below: 1 or 0. */
int tc_offsets_ok(const int64_t *offsets, size_t n, int64_t limit);

#endif
