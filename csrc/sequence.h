/* Sequence: the rows that a planner pushed, one plan behind the other, and how they are cut into batches: of one size, or of sizes that were
 * pushed beside them. No locks here: the ring's guards it. */
#ifndef TC_SEQUENCE_H
#define TC_SEQUENCE_H
#include "batch.h"

typedef struct {
    struct tc_queued *head, *tail; /* plans with rows that are not cut yet */
    size_t batch_rows;
    uint64_t pushed_rows, cut_rows;
    int is_sized;
    uint32_t *sizes; /* of batches that are not cut yet: [next_size, n_sizes) */
    size_t next_size, n_sizes, sizes_capacity;
} tc_sequence;

/* Append a plan. 0 or TC_NOMEM. */
int tc_sequence_push(tc_sequence *sequence, const tc_plan *plan);

/* Append sizes, 1 or more each; from the first call on batches have these and no others. 0 or TC_NOMEM. */
int tc_sequence_push_sizes(tc_sequence *sequence, const uint32_t *rows, size_t n);

/* Rows of the next batch, 0 while it cannot be known. is_ended: nothing will be pushed any more, so that what is left makes a last one. */
size_t tc_sequence_next_rows(const tc_sequence *sequence, int is_ended);

/* Cut the next batch of n_rows (tc_sequence_next_rows), which are there. */
void tc_sequence_cut(tc_sequence *sequence, size_t n_rows, tc_batch *batch);

void tc_sequence_free(tc_sequence *sequence);

#endif
