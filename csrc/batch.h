/* Batch: the state of one batch between the row sequence and the consumer. There are no locks here: the ring's lock
 * guards all fields, but not the bytes of the slot and of the sources.
 *
 * Several threads copy one large batch together, each a range of its rows. The batch is then ready sooner, and fewer
 * batches are in progress at a time, so that prepared batches stay in the last-level cache until they are read.
 */
#ifndef TC_BATCH_H
#define TC_BATCH_H
#include "slot.h"

typedef struct {
    /* TC_BUSY: one thread measures or finishes the batch. TC_OPEN: threads copy ranges of its rows. */
    enum { TC_EMPTY, TC_BUSY, TC_OPEN, TC_READY } state;
    int status;
    tc_part *parts;
    size_t n_parts, parts_capacity, n_rows;
    uint32_t *found; /* Output of the row finders: 2 * n_found numbers, first block indices, then row indices. */
    size_t n_found;
    uint64_t first_row; /* Position of the batch's first row in the sequence. */
    size_t begun, share_rows, n_copying; /* TC_OPEN: rows before `begun` are copied, or n_copying threads are copying them. */
    tc_slot *slot;
} tc_batch;

/* The rows [first, stop) of a batch. */
typedef struct {
    size_t first, stop;
} tc_share;

/* Reset the batch to n_rows rows from position first_row. The memory of `parts` and `found` is reused. */
void tc_batch_reset(tc_batch *batch, size_t n_rows, uint64_t first_row);

/* Append a part. If no memory is left, the batch's status becomes TC_NOMEM. */
void tc_batch_add(tc_batch *batch, const tc_part *part);

/* Resolve block and row of every row whose plan has a finder. Call it before the slot is filled. If no memory is left,
 * the batch's status becomes TC_NOMEM. */
void tc_batch_find_rows(tc_batch *batch);

/* The content that the batch's slot is filled from. */
tc_content tc_batch_content(const tc_batch *batch, const tc_stream *streams, size_t n_streams);

/* Allow threads to copy row ranges. The size of the slot must be known. */
void tc_batch_open(tc_batch *batch);

/* Whether the batch is open and has rows that no thread has begun to copy. */
static inline int tc_batch_has_share(const tc_batch *batch) { return batch->state == TC_OPEN && batch->begun < batch->n_rows; }

/* Reserve and return the next row range of a batch for which tc_batch_has_share() holds. */
tc_share tc_batch_share(tc_batch *batch);

void tc_batch_free(tc_batch *batch);

#endif
