#ifndef TC_OUTPUT_LAYOUT_H
#define TC_OUTPUT_LAYOUT_H
/* Output layouts: what happens to a stream beyond the plain gather. The gathering thread does it in the slot's memory.
 *
 *   padded   each record is put into a box with the dimensions of the longest record, rounded up to a multiple, and filled
 *            up with a padding element; longer records than a limit are cut or refused: kind TC_PADDED, whose source is that
 *            of TC_VAR. offsets_at of the slot: int64[n + 1] offsets of the whole records, as for TC_VAR, then, from the next
 *            multiple of 64 bytes on, the lengths
 *            in the boxes, int64[n][n_varying], then the varying dimensions of a box, int64[n_varying]. values_at: the
 *            boxes; n_elements counts all their elements
 *   rows     the offsets of a TC_VAR stream count rows of the records' first dimension
 *   fill     null values are replaced by a given value, in streams of any kind
 *   shapes   the shapes of ragged records are checked against their numbers of elements, in every layout
 *
 * The functions work on a slot that the calling thread owns, under the caller's SIGBUS guard. They take no locks and
 * allocate nothing.
 */
#include "gather.h"

enum { TC_PADDED = 4, TC_MAX_DIMS = 32 };

#define TC_NO_STREAM UINT64_MAX

/* Output layout of one stream; twelve 64-bit words, as Python writes them. */
typedef struct tc_output_layout {
    uint64_t gathered_first;       /* 1: other streams depend on this one (a validity mask or shapes), so tc_layouts_begin gathers it first. */
    uint64_t valid;       /* Index of the validity mask's stream if nulls are replaced, else TC_NO_STREAM. */
    const uint8_t *fill;
    uint64_t fill_bytes;  /* Size as served: a whole row of TC_FIXED and TC_BITS; a multiple of the element size for TC_VAR, TC_PADDED and TC_REF. */
    uint64_t shape;       /* Index of the stream of shapes (int32[n][n_dims]), or TC_NO_STREAM. */
    const int64_t *dims;  /* [n_dims] Dimensions of a record, -1 where they vary. Without shapes at most one dimension varies. */
    uint64_t n_dims;      /* 1 to TC_MAX_DIMS for TC_PADDED and for streams with shapes, else 0. */
    uint64_t counts_rows;     /* 1: the offsets count rows. */
    uint64_t padding;     /* TC_PADDED: the bits of the padding element, as served, in the lowest bytes. */
    int64_t multiple_of;  /* TC_PADDED: 1 or more; the varying dimensions of a box are multiples of it, and not 0 if it is above 1. */
    int64_t max_length;   /* TC_PADDED: limit of the varying dimensions of a record, before they are rounded up; INT64_MAX: none. */
    uint64_t truncates;   /* TC_PADDED: 1: longer records are cut; 0: they are an error. */
} tc_output_layout;

struct tc_slot;
struct tc_part;

/* The stream as it is stored in shards: TC_VAR instead of TC_PADDED, and without a cast. */
tc_stream tc_stored_as(const tc_stream *stream);

/* Size in bytes of the data at offsets_at of a TC_PADDED stream with n rows. */
size_t tc_layout_head_bytes(const tc_output_layout *output_layout, size_t n);

/* First step, after all pages are checked and tc_measure has filled the offsets: gather the streams that others depend
 * on, then compute the lengths of fills, check the shapes, and find the lengths and dimensions of boxes and n_elements.
 * Returns 0, TC_CORRUPT (a shape does not fit), TC_TOO_LONG or TC_NOMEM. */
int tc_layouts_begin(struct tc_slot *slot, const tc_stream *streams, size_t n_streams, const struct tc_part *parts, size_t n_parts);

/* Whether tc_layouts_begin or tc_layouts_end copies the stream. If so, the plain gather must skip it. */
int tc_layout_owns(const struct tc_slot *slot, const tc_stream *stream, const tc_output_layout *output_layout);

/* Last step, after all other streams are gathered: copy the streams that the output layouts own, and fill nulls or
 * convert offsets in the others. Returns 0, TC_CORRUPT or TC_MISFIT. */
int tc_layouts_end(struct tc_slot *slot, const tc_stream *streams, size_t n_streams, const struct tc_part *parts, size_t n_parts);


#endif
