/* The baseline: the simplest C code that gathers shuffled rows of mapped columns into batches.
 *
 * Threads claim batches by number, wait for a free slot of a ring, copy the rows of all columns into it and mark it
 * ready. The consumer takes batches in order and returns a slot by taking the next one. One mutex and two conditions
 * are used for every batch: no spinning, no prefetch, no saved wake-ups. Compiled by floor.py.
 *
 * A column with offsets has rows of varying length: its part of a slot is int64[batch_rows + 1] new offsets, then the
 * rows.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_COLUMNS = 8, MAX_THREADS = 256 };

typedef struct {
    const uint8_t *source;
    const int64_t *offsets; /* NULL: every row has `width` bytes; otherwise `width` is that of the longest row. */
    size_t width;
} column;

typedef struct {
    column columns[MAX_COLUMNS];
    size_t n_columns, batch_rows, n_slots, n_threads, n_started;
    uint8_t **memory; /* n_slots * n_columns */
    uint8_t *ready;   /* n_slots */
    const int64_t *order;
    size_t n_rows, n_batches, next_claimed, next_taken, n_released;
    int stopping;
    pthread_mutex_t lock;
    pthread_cond_t became_ready, became_free;
    pthread_t threads[MAX_THREADS];
} ring;

static void gather_varied(const column *from, const int64_t *rows, size_t n, uint8_t *to, size_t batch_rows) {
    int64_t *ends = (int64_t *)to, end = 0;
    uint8_t *values = to + (batch_rows + 1) * sizeof *ends;
    ends[0] = 0;
    for (size_t i = 0; i < n; i++) {
        int64_t start = from->offsets[rows[i]], n_bytes = from->offsets[rows[i] + 1] - start;
        memcpy(values + end, from->source + start, (size_t)n_bytes);
        ends[i + 1] = end += n_bytes;
    }
}

static void gather(const ring *r, size_t batch, size_t slot) {
    const int64_t *rows = r->order + batch * r->batch_rows;
    size_t left = r->n_rows - batch * r->batch_rows, n = left < r->batch_rows ? left : r->batch_rows;
    for (size_t c = 0; c < r->n_columns; c++) {
        const column *from = &r->columns[c];
        uint8_t *to = r->memory[slot * r->n_columns + c];
        if (from->offsets) {
            gather_varied(from, rows, n, to, r->batch_rows);
            continue;
        }
        for (size_t i = 0; i < n; i++)
            memcpy(to + i * from->width, from->source + (size_t)rows[i] * from->width, from->width);
    }
}

static void *work(void *argument) {
    ring *r = argument;
    pthread_mutex_lock(&r->lock);
    while (!r->stopping && r->next_claimed < r->n_batches) {
        size_t batch = r->next_claimed++, slot = batch % r->n_slots;
        while (!r->stopping && batch >= r->n_released + r->n_slots)
            pthread_cond_wait(&r->became_free, &r->lock);
        if (r->stopping)
            break;
        pthread_mutex_unlock(&r->lock);
        gather(r, batch, slot);
        pthread_mutex_lock(&r->lock);
        r->ready[slot] = 1;
        pthread_cond_signal(&r->became_ready);
    }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

void floor_free(ring *r) {
    if (!r)
        return;
    for (size_t i = 0; r->memory && i < r->n_slots * r->n_columns; i++)
        free(r->memory[i]);
    free(r->memory);
    free(r->ready);
    pthread_mutex_destroy(&r->lock);
    pthread_cond_destroy(&r->became_ready);
    pthread_cond_destroy(&r->became_free);
    free(r);
}

/* Returns NULL if no memory is left. Slots are touched here, so that no epoch pays for mapping their pages. */
ring *floor_new(const column *columns, size_t n_columns, size_t batch_rows, size_t n_slots, size_t n_threads) {
    ring *r = calloc(1, sizeof *r);
    if (!r || n_columns > MAX_COLUMNS || n_threads > MAX_THREADS) {
        free(r);
        return NULL;
    }
    r->n_columns = n_columns, r->batch_rows = batch_rows, r->n_slots = n_slots, r->n_threads = n_threads;
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->became_ready, NULL);
    pthread_cond_init(&r->became_free, NULL);
    r->ready = calloc(n_slots, 1);
    r->memory = calloc(n_slots * n_columns, sizeof *r->memory);
    memcpy(r->columns, columns, n_columns * sizeof *columns);
    for (size_t i = 0; r->memory && i < n_slots * n_columns; i++) {
        const column *of = &r->columns[i % n_columns];
        size_t n_bytes = batch_rows * of->width + (of->offsets ? (batch_rows + 1) * sizeof *of->offsets : 0);
        n_bytes = (n_bytes + 4095) / 4096 * 4096;
        r->memory[i] = aligned_alloc(4096, n_bytes);
        if (!r->memory[i]) {
            floor_free(r);
            return NULL;
        }
        memset(r->memory[i], 0, n_bytes);
    }
    if (!r->ready || !r->memory) {
        floor_free(r);
        return NULL;
    }
    return r;
}

void *floor_memory(const ring *r, size_t slot, size_t c) { return r->memory[slot * r->n_columns + c]; }

/* Start an epoch; `order` is kept until floor_end. Returns the number of running threads, 0 if none could be started. */
size_t floor_begin(ring *r, const int64_t *order, size_t n_rows) {
    r->order = order, r->n_rows = n_rows, r->n_batches = (n_rows + r->batch_rows - 1) / r->batch_rows;
    r->next_claimed = r->next_taken = r->n_released = 0;
    r->stopping = 0;
    memset(r->ready, 0, r->n_slots);
    for (r->n_started = 0; r->n_started < r->n_threads; r->n_started++)
        if (pthread_create(&r->threads[r->n_started], NULL, work, r))
            break;
    return r->n_started;
}

/* Returns the slot of the next batch, or -1 at the end. The slot taken before returns to the threads. */
int64_t floor_take(ring *r) {
    pthread_mutex_lock(&r->lock);
    if (r->next_taken > r->n_released) {
        r->n_released = r->next_taken;
        pthread_cond_broadcast(&r->became_free); /* Each waiting thread waits for a slot of its own. */
    }
    if (r->next_taken == r->n_batches) {
        pthread_mutex_unlock(&r->lock);
        return -1;
    }
    size_t slot = r->next_taken++ % r->n_slots;
    while (!r->ready[slot])
        pthread_cond_wait(&r->became_ready, &r->lock);
    r->ready[slot] = 0;
    pthread_mutex_unlock(&r->lock);
    return (int64_t)slot;
}

void floor_end(ring *r) {
    pthread_mutex_lock(&r->lock);
    r->stopping = 1;
    pthread_cond_broadcast(&r->became_free);
    pthread_mutex_unlock(&r->lock);
    for (size_t i = 0; i < r->n_started; i++)
        pthread_join(r->threads[i], NULL);
    r->n_started = 0;
}
