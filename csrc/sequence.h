/* Sequence: the rows that a planner has pushed, as a queue of plans, and how they are cut into batches, of one size or
 * of pushed sizes. There are no locks here: the ring's lock guards it. */
#ifndef TC_SEQUENCE_H
#define TC_SEQUENCE_H
#include "batch.h"

typedef struct {
    struct tc_queued *head, *tail; /* Plans with rows that are not cut yet. */
    size_t batch_rows;
    uint64_t pushed_rows, cut_rows;
    int is_sized;
    uint32_t *sizes; /* Sizes of batches that are not cut yet: [next_size, n_sizes). */
    size_t next_size, n_sizes, sizes_capacity;
} tc_sequence;

/* Append a plan. Returns 0 or TC_NOMEM. */
int tc_sequence_push(tc_sequence *sequence, const tc_plan *plan);

/* Append batch sizes, each 1 or more. From the first call on, batches have exactly these sizes. Returns 0 or TC_NOMEM. */
int tc_sequence_push_sizes(tc_sequence *sequence, const uint32_t *rows, size_t n);

/* Number of rows of the next batch; 0 while it cannot be determined. is_ended: Nothing more will be pushed, so the
 * remaining rows form the last batch. */
size_t tc_sequence_next_rows(const tc_sequence *sequence, int is_ended);

/* Cut the next batch of n_rows = tc_sequence_next_rows(), which must be available. */
void tc_sequence_cut(tc_sequence *sequence, size_t n_rows, tc_batch *batch);

void tc_sequence_free(tc_sequence *sequence);

#endif
