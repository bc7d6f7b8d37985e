/* Batch: one on its way from the sequence to its taker. No locks here: the ring's guards all but the bytes of slot and sources.
 *
 * A large batch is copied in shares by as many threads as are free, so that it is ready sooner and fewer are on their way at a time: what is
 * ahead stays in the last cache until it is read.
 */
#ifndef TC_BATCH_H
#define TC_BATCH_H
#include "slot.h"

typedef struct {
    /* BUSY: one thread measures it, or ends it; OPEN: its rows are copied in shares. */
    enum { TC_EMPTY, TC_BUSY, TC_OPEN, TC_READY } state;
    int status;
    tc_part *parts;
    size_t n_parts, parts_capacity, n_rows;
    uint32_t *found; /* where the rows lie that finders found: blocks, and behind n_found of them rows */
    size_t n_found;
    uint64_t first_row; /* of the sequence */
    size_t begun, share_rows, n_copying; /* OPEN: rows before `begun` are copied, or being copied by n_copying threads */
    tc_slot *slot;
} tc_batch;

/* Rows [first, stop) of a batch. */
typedef struct {
    size_t first, stop;
} tc_share;

/* Empty, for n_rows from first_row on; it keeps the memory of its parts, and of what was found. */
void tc_batch_reset(tc_batch *batch, size_t n_rows, uint64_t first_row);

/* Append a part; without memory the batch's status is TC_NOMEM. */
void tc_batch_add(tc_batch *batch, const tc_part *part);

/* Find where its rows lie, where its plans do not say; before its slot is filled. Without memory its status is TC_NOMEM. */
void tc_batch_find_rows(tc_batch *batch);

/* What its slot is filled from. */
tc_content tc_batch_content(const tc_batch *batch, const tc_stream *streams, size_t n_streams);

/* Let its rows be copied: its slot knows its size. */
void tc_batch_open(tc_batch *batch);

/* Whether there are rows that nobody has begun to copy. */
static inline int tc_batch_has_share(const tc_batch *batch) { return batch->state == TC_OPEN && batch->begun < batch->n_rows; }

/* The next share of one that has some. */
tc_share tc_batch_share(tc_batch *batch);

void tc_batch_free(tc_batch *batch);

#endif
