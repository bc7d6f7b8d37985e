/* Forms: what is made of a stream beyond its plain gather, in the slot's own memory and by the gathering thread.
 *
 *   padded   each record's elements in a box of the longest record's dimensions, zeros behind them: kind TC_PADDED, whose source is that of
 *            TC_VAR. At offsets_at of the slot: int64[n + 1] offsets as of TC_VAR, then lengths int64[n][n_varying], then longest
 *            int64[n_varying]; at values_at: the boxes, n_elements of them all
 *   rows     the offsets of a TC_VAR stream counted in rows of the records' first dimension
 *   fill     a null's value replaced by another, in streams of any kind
 *   shapes   of ragged records: seen to fit their elements, in every form
 *
 * Functions run in the gathering thread, on a slot that it owns, under the caller's SIGBUS guard; no locks, no allocation.
 */
#ifndef TC_FORMS_H
#define TC_FORMS_H
#include "gather.h"

enum { TC_PADDED = 4, TC_MAX_DIMS = 32 };

#define TC_NONE UINT64_MAX

/* Of one stream; eight words, as Python lays them out. */
typedef struct tc_form {
    uint64_t early;       /* 1: others are measured by it (masks that choose fills, shapes): it is gathered first, by tc_forms_begin */
    uint64_t valid;       /* number of the mask's stream where nulls get the fill, else TC_NONE */
    const uint8_t *fill;
    uint64_t fill_bytes;  /* as served: a whole row of TC_FIXED and TC_BITS; of TC_VAR, TC_PADDED and TC_REF a multiple of the element */
    uint64_t shape;       /* number of the stream of shapes (int32[n][n_dims]), TC_NONE: none */
    const int64_t *dims;  /* [n_dims] of a record, -1 where they vary; one that varies where there are no shapes */
    uint64_t n_dims;      /* 1 to TC_MAX_DIMS for TC_PADDED and streams with shapes, else 0 */
    uint64_t in_rows;     /* 1: offsets in rows */
} tc_form;

struct tc_slot;
struct tc_part;

/* What a stream is in the shards: TC_VAR for TC_PADDED, and not cast. */
tc_stream tc_stored_as(const tc_stream *stream);

/* Bytes at offsets_at of a TC_PADDED stream of n rows. */
size_t tc_form_head_bytes(const tc_form *form, size_t n);

/* Once all was checked and offsets are as tc_measure has them: gather the early streams, and go on to fills' lengths, shapes, longest and
 * n_elements. 0, TC_CORRUPT (shapes that do not fit) or TC_NOMEM. */
int tc_forms_begin(struct tc_slot *slot, const tc_stream *streams, size_t n_streams, const struct tc_part *parts, size_t n_parts);

/* Whether tc_forms_begin or tc_forms_end copies the stream, so that it must not be gathered plainly. */
int tc_form_owns(const struct tc_slot *slot, const tc_stream *stream, const tc_form *form);

/* Copy the streams that forms own, once the others are there, and change those others where their form says so. 0, TC_CORRUPT or
 * TC_MISFIT. */
int tc_forms_end(struct tc_slot *slot, const tc_stream *streams, size_t n_streams, const struct tc_part *parts, size_t n_parts);

#endif
