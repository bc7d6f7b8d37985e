#ifndef TC_GATHER_H
#define TC_GATHER_H
/* Gather: copy rows of many blocks, of all columns, into a batch's memory, and check the stored bytes before they are
 * used.
 *
 * A stream is one group of Arrow buffers that the kernel understands. A column has one or more streams (values,
 * validity, shape).
 *   TC_FIXED  width bytes per row                       -> values: width bytes per row
 *   TC_BITS   one bit per row, least significant first  -> values: one byte per row, 0 or 1; a NULL source gives 1, because
 *                                                          a block without a validity buffer has no nulls
 *   TC_VAR    int64 offsets, in elements of width bytes, and values
 *                                                       -> offsets: int64[n + 1] in elements from 0; values: the elements
 *   TC_REF    as TC_VAR with width 1; no bytes are copied  -> values: n pairs (address, length). The consumer makes a bytes
 *                                                          object of each and fills it from the source: one copy, not two
 * The caller has checked that block < n_blocks, and row < rows of that block. Stored offsets are never trusted: they
 * are checked each time they are read, which costs two comparisons. All functions run under the caller's SIGBUS guard,
 * take no locks and allocate nothing.
 */
#include <stddef.h>
#include <stdint.h>

/* Kind 4 is TC_PADDED (output_layout.h), and kind 5 is TC_PACKED (packing.h). */
enum { TC_FIXED = 0, TC_BITS = 1, TC_VAR = 2, TC_REF = 3 };

#define TC_CORRUPT (-6) /* A page's checksum is wrong, or offsets decrease or leave their chunk. */
#define TC_MISFIT (-7)  /* A value cannot be represented in the dtype of the cast. */
#define TC_TOO_LONG (-8) /* A record is longer than its output layout allows (output_layout.h). */

/* Source of one stream in one block. TC_FIXED and TC_BITS have offsets == NULL and ignore n_elements. */
typedef struct {
    const uint8_t *values;
    const int64_t *offsets;
    uint64_t n_elements; /* Number of elements at `values`, below 2^63. */
} tc_source;

/* A stored chunk in a mapping, which holds a stream's buffers: pages of 64 KiB from `base`, the last one may be short,
 * and the CRC-32C of each page. */
typedef struct {
    const uint8_t *base;
    uint64_t n_bytes;
    const uint32_t *crcs;
    /* One byte per page, 1: the page was verified. NULL: no page is to be checked. Threads may share it and check the
     * same page at the same time. */
    uint8_t *checked;
} tc_chunk;

/* Two 32-bit words, as Python writes them: kind | from << 8 | to << 16 | on_host << 24, and width. */
typedef struct {
    uint8_t kind;
    uint8_t from, to; /* Dtypes of cast.h; both TC_AS_IS (0) without a cast. `from` of TC_BITS is TC_BOOL. */
    uint8_t on_host; /* 1: the consumer makes a list of the values, so they lie apart from what goes to a device (slot.h). */
    uint32_t width; /* Stored bytes per row (TC_FIXED) or per element (TC_VAR); unused otherwise. */
} tc_stream;

/* Rows of one stream, in output order. */
typedef struct {
    const tc_source *sources; /* [n_blocks] */
    const tc_chunk *chunks;   /* [n_blocks], or NULL: nothing is to be checked. */
    const uint32_t *block, *row;
    size_t n;
    size_t n_breaks; /* Result of tc_count_breaks, which selects the kernel for scattered rows or the kernel for runs of rows. */
} tc_rows;

typedef struct {
    uint8_t *values;
    int64_t *offsets;
} tc_sink;

typedef struct {
    uint64_t address;
    uint64_t n_bytes;
} tc_ref;

/* Location of a corruption. page: Index of the page in its chunk whose checksum is wrong, or -1 if the offsets are
 * wrong. */
typedef struct {
    size_t row; /* Index among the given rows. */
    int64_t page;
} tc_corruption;

/* Prepare for checks with a kernel of crc32c.h. Call it once per process, before any other function of this header. */
void tc_gather_init(int crc_kernel);

/* Number of the n - 1 steps from row to row that do not lead to the next row of the same block. Returns n early if the
 * first rows are scattered. */
size_t tc_count_breaks(const uint32_t *block, const uint32_t *row, size_t n);

/* Check those pages of the rows, including their offsets, that no thread has checked before. Returns 0, or TC_CORRUPT
 * with *fault set. In a run of rows the fault may name an earlier row of the run than the wrong one; with n_breaks = n
 * the row is exact. */
int tc_check(const tc_stream *stream, const tc_rows *rows, tc_corruption *fault);

/* Fill offsets[1..n] of a TC_VAR stream's sink; offsets[0] is given. Returns 0 or TC_CORRUPT. */
int tc_measure(const tc_rows *rows, int64_t *offsets);

/* Copy or cast the rows (cast.h). For TC_VAR, the sink's offsets[0..n] are those of tc_measure, and `values` is the
 * address for offset 0. Returns 0, TC_CORRUPT or TC_MISFIT. */
int tc_gather(const tc_stream *stream, const tc_rows *rows, const tc_sink *sink);

/* Copy the bytes of refs[i] to destinations[i]. */
void tc_copy_refs(uint8_t *const *destinations, const tc_ref *refs, size_t n);

/* Check every page of a chunk. Returns the index of the first wrong page, or -1. */
int64_t tc_check_chunk(const tc_chunk *chunk);

/* Whether offsets[0..n] start at 0 or more, never decrease, and end at `limit` or below: 1 or 0. */
int tc_offsets_ok(const int64_t *offsets, size_t n, int64_t limit);


#endif
