#include "batch.h"

#include <stdlib.h>

/* Copying this much takes about 20 us: long compared with taking the lock, and short compared with the time that the
 * consumer may wait for another thread's range. Half and twice the size gave the same. */
enum { ROW_RANGE_BYTES = 256 << 10 };

void tc_batch_reset(tc_batch *batch, size_t n_rows, uint64_t first_row) {
    batch->state = TC_BUSY;
    batch->status = 0;
    batch->n_parts = 0;
    batch->n_rows = n_rows;
    batch->first_row = first_row;
    batch->n_started = batch->range_rows = batch->n_copying = 0;
    batch->slot = NULL;
}

void tc_batch_add(tc_batch *batch, const tc_part *part) {
    if (batch->n_parts == batch->parts_capacity) {
        size_t capacity = batch->parts_capacity ? 2 * batch->parts_capacity : 4;
        tc_part *parts = realloc(batch->parts, capacity * sizeof *parts);
        if (parts == NULL) {
            batch->status = TC_NOMEM;
            return;
        }
        batch->parts = parts;
        batch->parts_capacity = capacity;
    }
    batch->parts[batch->n_parts++] = *part;
}

/* Rows are located per batch, while they are few. The locations of a whole window would be 8 bytes per row that one
 * thread writes to memory and reads again. */
void tc_batch_find_rows(tc_batch *batch) {
    for (size_t p = 0, done = 0; p < batch->n_parts; done += batch->parts[p++].n) {
        tc_part *part = &batch->parts[p];
        const tc_plan *plan = part->plan;
        if (plan->finder == NULL) {
            part->block = plan->block + part->first;
            part->row = plan->row + part->first;
            continue;
        }
        if (batch->n_found < batch->n_rows) { /* At the first such part, so that no part refers to the old memory yet. */
            uint32_t *found = realloc(batch->found, 2 * batch->n_rows * sizeof *found);
            if (found == NULL) {
                batch->status = TC_NOMEM;
                return;
            }
            batch->found = found;
            batch->n_found = batch->n_rows;
        }
        uint32_t *block = batch->found + done, *row = block + batch->n_found;
        tc_find_rows(plan->finder, plan->start + part->first, part->n, block, row);
        part->block = block;
        part->row = row;
    }
}

tc_content tc_batch_content(const tc_batch *batch, const tc_stream *streams, size_t n_streams) {
    return (tc_content){streams, n_streams, batch->parts, batch->n_parts};
}

void tc_batch_open(tc_batch *batch) {
    size_t n_shares = batch->slot->end / ROW_RANGE_BYTES + 1;
    batch->range_rows = (batch->n_rows + n_shares - 1) / n_shares;
    batch->state = TC_OPEN;
}

tc_row_range tc_batch_reserve_rows(tc_batch *batch) {
    size_t first = batch->n_started, left = batch->n_rows - first;
    batch->n_started += left < batch->range_rows ? left : batch->range_rows;
    return (tc_row_range){first, batch->n_started};
}

void tc_batch_free(tc_batch *batch) {
    if (batch->state != TC_EMPTY && batch->slot) tc_slot_free(batch->slot);
    free(batch->parts);
    free(batch->found);
}


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

size_t tc_sequence_next_rows(const tc_sequence *sequence, int is_ended) {
    uint64_t rows = sequence->pushed_rows - sequence->cut_rows;
    if (rows >= sequence->batch_rows) return sequence->batch_rows;
    return is_ended ? (size_t)rows : 0;
}

void tc_sequence_cut(tc_sequence *sequence, size_t n_rows, tc_batch *batch) {
    tc_batch_reset(batch, n_rows, sequence->cut_rows);
    sequence->cut_rows += n_rows;
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
}
