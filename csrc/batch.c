#include "batch.h"

#include <stdlib.h>

/* Copying this much takes about 20 us: long compared with taking the lock, and short compared with the time that the
 * consumer may wait for another thread's range. Half and twice the size gave the same. */
enum { SHARE_BYTES = 256 << 10 };

void tc_batch_reset(tc_batch *batch, size_t n_rows, uint64_t first_row) {
    batch->state = TC_BUSY;
    batch->status = 0;
    batch->n_parts = 0;
    batch->n_rows = n_rows;
    batch->first_row = first_row;
    batch->begun = batch->share_rows = batch->n_copying = 0;
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
    size_t n_shares = batch->slot->end / SHARE_BYTES + 1;
    batch->share_rows = (batch->n_rows + n_shares - 1) / n_shares;
    batch->state = TC_OPEN;
}

tc_share tc_batch_share(tc_batch *batch) {
    size_t first = batch->begun, left = batch->n_rows - first;
    batch->begun += left < batch->share_rows ? left : batch->share_rows;
    return (tc_share){first, batch->begun};
}

void tc_batch_free(tc_batch *batch) {
    if (batch->state != TC_EMPTY && batch->slot) tc_slot_free(batch->slot);
    free(batch->parts);
    free(batch->found);
}
