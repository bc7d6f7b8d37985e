/* Slot: a batch's memory, and how it is filled from the rows of windows. No locks here: a slot has one owner at a time (see ring.h). */
#ifndef TC_SLOT_H
#define TC_SLOT_H
#include <stdatomic.h>

#include "gather.h"
#include "permute.h"

#define TC_NOMEM (-12)

/* Rows of a window in served order. Owned by the caller, must live until its rows are retired (tc_ring_wait_room) or the ring is closed. */
typedef struct {
    const tc_source *sources; /* [n_streams][n_blocks] */
    const tc_chunk *chunks;   /* as sources, or NULL: nothing of this plan is to be checked */
    size_t n_blocks;
    const uint32_t *block; /* with row: [n_rows], where the rows lie */
    const uint32_t *row;
    const tc_finder *finder; /* instead: finds those from position start on, batch by batch */
    uint64_t start;
    size_t n_rows;
    const struct tc_form *forms; /* [n_streams] (forms.h), or NULL: streams are served as they are gathered */
} tc_plan;

/* Rows [first, first + n) of a plan, and where they lie (tc_batch_find_rows). */
typedef struct tc_part {
    const tc_plan *plan;
    size_t first, n;
    const uint32_t *block, *row;
} tc_part;

/* The rows of a part, of one stream. */
tc_rows tc_rows_of(const tc_part *part, size_t stream);

/* values_at[s], offsets_at[s]: where stream s lies in memory; n_elements[s]: elements of a TC_VAR or TC_PADDED stream. */
typedef struct tc_slot {
    struct tc_ring *ring;
    struct tc_slot *next;
    const void *filler; /* the ring's: the thread that filled it last */
    _Atomic size_t n_holders; /* while it is at a consumer */
    uint8_t *memory;
    size_t capacity;
    int own; /* memory is this slot's own mapping, not a piece of the ring's arena */
    size_t n_rows;
    size_t n_bytes; /* of the batch's values, those that references point to included */
    size_t end;     /* of the memory that it takes */
    size_t *values_at, *offsets_at, *n_elements;
} tc_slot;

/* Private memory of n_bytes, a multiple of the page; from 2 MiB up aligned to 2 MiB with huge pages asked for. NULL without memory. */
uint8_t *tc_map_bytes(size_t n_bytes);

/* n_bytes rounded up to whole pages, from 2 MiB up to whole huge pages. */
size_t tc_page_rounded(size_t n_bytes);

/* A slot for n_streams streams over memory of capacity bytes (or NULL and 0: it maps its own when filled). NULL without memory. */
tc_slot *tc_slot_new(size_t n_streams, uint8_t *memory, size_t capacity);
void tc_slot_free(tc_slot *slot);

/* What a slot is filled from: the parts' rows, in order. */
typedef struct {
    const tc_stream *streams;
    size_t n_streams;
    const tc_part *parts;
    size_t n_parts;
} tc_content;

/* Filling a slot: begin (check what nobody checked, find sizes, lay out; it grows as needed), copy each row of the batch once (threads may
 * share the rows out), then end. Each returns 0, TC_EIO (a source could not be read), TC_CORRUPT or TC_MISFIT (see gather.h), or TC_NOMEM. */
int tc_slot_begin(tc_slot *slot, const tc_content *content);
int tc_slot_copy(tc_slot *slot, const tc_content *content, size_t first, size_t stop);
int tc_slot_end(tc_slot *slot, const tc_content *content);

#endif
