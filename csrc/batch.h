#ifndef TC_BATCH_H
#define TC_BATCH_H
/* Batch: the state of one batch between the row sequence and the consumer. There are no locks here: the ring's lock
 * guards all fields, but not the bytes of the slot and of the sources.
 *
 * Several threads copy one large batch together, each a range of its rows. The batch is then ready sooner, and fewer
 * batches are in progress at a time, so that prepared batches stay in the last-level cache until they are read.
 */
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
    size_t n_started, range_rows, n_copying; /* TC_OPEN: rows before n_started are copied, or n_copying threads are copying them. */
    tc_slot *slot;
} tc_batch;

/* The rows [first, stop) of a batch. */
typedef struct {
    size_t first, stop;
} tc_row_range;

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
static inline int tc_batch_has_rows_left(const tc_batch *batch) { return batch->state == TC_OPEN && batch->n_started < batch->n_rows; }

/* Reserve and return the next row range of a batch for which tc_batch_has_rows_left() holds. */
tc_row_range tc_batch_reserve_rows(tc_batch *batch);

void tc_batch_free(tc_batch *batch);


/* Sequence: the rows that a planner has pushed, as a queue of plans, which are cut into batches of one size. There are
 * no locks here: the ring's lock guards it. */

typedef struct {
    struct tc_queued *head, *tail; /* Plans with rows that are not cut yet. */
    size_t batch_rows;
    uint64_t pushed_rows, cut_rows;
} tc_sequence;

/* Append a plan. Returns 0 or TC_NOMEM. */
int tc_sequence_push(tc_sequence *sequence, const tc_plan *plan);

/* Number of rows of the next batch; 0 while it cannot be determined. is_ended: Nothing more will be pushed, so the
 * remaining rows form the last batch. */
size_t tc_sequence_next_rows(const tc_sequence *sequence, int is_ended);

/* Cut the next batch of n_rows = tc_sequence_next_rows(), which must be available. */
void tc_sequence_cut(tc_sequence *sequence, size_t n_rows, tc_batch *batch);

void tc_sequence_free(tc_sequence *sequence);


#endif
