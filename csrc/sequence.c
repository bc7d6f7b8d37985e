#include "sequence.h"

#include <stdlib.h>
#include <string.h>

typedef struct tc_queued {
    const tc_plan *plan;
    size_t first, n; /* The rows that are not cut yet. */
    struct tc_queued *next;
} queued;

int tc_sequence_push(tc_sequence *sequence, const tc_plan *plan) {
    if (plan->n_rows == 0) return 0;
    queued *last = malloc(sizeof *last);
    if (last == NULL) return TC_NOMEM;
    *last = (queued){plan, 0, plan->n_rows, NULL};
    if (sequence->tail)
        sequence->tail->next = last;
    else
        sequence->head = last;
    sequence->tail = last;
    sequence->pushed_rows += plan->n_rows;
    return 0;
}

/* Make room for n more sizes after the remaining ones. */
static int sizes_grow(tc_sequence *sequence, size_t n) {
    size_t left = sequence->n_sizes - sequence->next_size;
    if (sequence->next_size) memmove(sequence->sizes, sequence->sizes + sequence->next_size, left * sizeof *sequence->sizes);
    sequence->next_size = 0;
    sequence->n_sizes = left;
    if (left + n <= sequence->sizes_capacity) return 0;
    size_t capacity = 2 * (left + n);
    uint32_t *sizes = realloc(sequence->sizes, capacity * sizeof *sizes);
    if (sizes == NULL) return TC_NOMEM;
    sequence->sizes = sizes;
    sequence->sizes_capacity = capacity;
    return 0;
}

int tc_sequence_push_sizes(tc_sequence *sequence, const uint32_t *rows, size_t n) {
    if (sizes_grow(sequence, n)) return TC_NOMEM;
    if (n) memcpy(sequence->sizes + sequence->n_sizes, rows, n * sizeof *rows);
    sequence->n_sizes += n;
    sequence->is_sized = 1;
    return 0;
}

size_t tc_sequence_next_rows(const tc_sequence *sequence, int is_ended) {
    uint64_t rows = sequence->pushed_rows - sequence->cut_rows;
    if (sequence->is_sized) {
        size_t want = sequence->next_size < sequence->n_sizes ? sequence->sizes[sequence->next_size] : 0;
        return rows >= want ? want : 0;
    }
    if (rows >= sequence->batch_rows) return sequence->batch_rows;
    return is_ended ? (size_t)rows : 0;
}

void tc_sequence_cut(tc_sequence *sequence, size_t n_rows, tc_batch *batch) {
    tc_batch_reset(batch, n_rows, sequence->cut_rows);
    sequence->cut_rows += n_rows;
    if (sequence->is_sized) sequence->next_size++;
    while (n_rows) {
        queued *head = sequence->head;
        tc_part part = {head->plan, head->first, head->n < n_rows ? head->n : n_rows, NULL, NULL};
        tc_batch_add(batch, &part);
        head->first += part.n;
        head->n -= part.n;
        n_rows -= part.n;
        if (head->n) continue;
        sequence->head = head->next;
        if (sequence->head == NULL) sequence->tail = NULL;
        free(head);
    }
}

void tc_sequence_free(tc_sequence *sequence) {
    for (queued *q = sequence->head; q;) {
        queued *next = q->next;
        free(q);
        q = next;
    }
    free(sequence->sizes);
}
