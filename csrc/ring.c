#include "ring.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core_distance.h"
#include "copy.h"
#include "slot.h"
#include "batch.h"

enum { MEASURE_EVERY_BATCHES = 16 }; /* Batches: a measurement takes about 1 us. */

struct tc_ring {
    pthread_mutex_t lock;
    pthread_cond_t work, ready, room;
    size_t n_work_waiting, n_ready_waiting, n_room_waiting;
    pthread_cond_t consumers_done;
    size_t n_gathering_consumers; /* Number of consumers that gather. */
    pid_t pid;

    size_t n_streams, depth;
    tc_stream *streams;

    tc_sequence sequence;
    tc_copy_task *copy_tasks; /* Tasks with slices that no thread has begun. */
    uint64_t taken_rows, retired_rows, retired_target;
    int end_status; /* 0 until tc_ring_finish. */
    tc_batch *batches;
    uint64_t next_cut, next_take;
    size_t n_open; /* Number of open batches with rows that no thread has begun to copy. */

    tc_pool pool;
    size_t n_out; /* Number of taken slots. */
    int closing, dropped;

    size_t n_threads;
    pthread_t *threads;
    pthread_mutex_t joining; /* Held while the workers are joined, so that a concurrent second close returns only after they have ended. */
    tc_ring_stats stats;
};

static _Atomic size_t live_batch_bytes;
static _Thread_local int is_worker;
/* Between workers and consumers, shared by all rings, so that the ring of the next epoch starts with the current
 * estimate. */
static tc_distance distance;

int tc_ring_is_consumer_far(void) { return tc_distance_is_far(&distance); }

uint64_t tc_ring_n_measurements(void) { return atomic_load_explicit(&distance.n_measurements, memory_order_relaxed); }

size_t tc_live_batch_bytes(void) { return atomic_load_explicit(&live_batch_bytes, memory_order_relaxed); }

void tc_count_copied(ptrdiff_t n_bytes) { atomic_fetch_add_explicit(&live_batch_bytes, (size_t)n_bytes, memory_order_relaxed); }

/* Bytes of unused slots that a dropped ring keeps for no other reason than a slot that the consumer holds. */
static size_t idle_bytes(const tc_ring *ring) { return ring->dropped && ring->pool.lent.memory == NULL ? ring->pool.idle_bytes : 0; }

/* ---- Gathering batches. The caller holds the lock. ---- */

/* Number of rows of the next batch, 0 while it cannot be determined. Before a failure there is no short batch: a run
 * that resumes after it would skip the rows that such a batch lacks. */
static size_t next_batch_rows(const tc_ring *ring) { return tc_sequence_next_rows(&ring->sequence, ring->end_status == TC_END); }

static int can_cut(const tc_ring *ring) {
    return ring->next_cut < ring->next_take + ring->depth && next_batch_rows(ring) > 0;
}

static tc_batch *cut(tc_ring *ring) {
    tc_batch *c = &ring->batches[ring->next_cut++ % ring->depth];
    tc_sequence_cut(&ring->sequence, next_batch_rows(ring), c);
    c->slot = tc_pool_take(&ring->pool, !is_worker);
    if (c->slot == NULL) c->status = TC_NOMEM;
    else c->slot->ring = ring;
    return c;
}

static void set_ready(tc_ring *ring, tc_batch *c) {
    ring->stats.ready++;
    c->state = TC_READY;
    if (ring->n_ready_waiting && c == &ring->batches[ring->next_take % ring->depth]) pthread_cond_broadcast(&ring->ready);
}

/* There may be something to gather: wake a worker, which wakes the next one, and a consumer that sleeps. */
static void wake_for_more(tc_ring *ring) {
    if (ring->n_work_waiting) pthread_cond_signal(&ring->work);
    if (ring->n_ready_waiting) pthread_cond_broadcast(&ring->ready);
}

/* Copy one row range of an open batch, with the lock released meanwhile. The thread that finishes the last range makes
 * the batch ready. */
static void copy_row_range(tc_ring *ring, tc_batch *c) {
    tc_content content = tc_batch_content(c, ring->streams, ring->n_streams);
    tc_row_range range = tc_batch_reserve_rows(c);
    if (!tc_batch_has_rows_left(c)) ring->n_open--;
    else wake_for_more(ring);
    c->n_copying++;
    pthread_mutex_unlock(&ring->lock);
    uint64_t start_ns = now_ns();
    tc_copy_set_nontemporal(is_worker && tc_distance_is_far(&distance));
    int status = tc_slot_copy(c->slot, &content, range.first, range.stop);
    tc_copy_end();
    pthread_mutex_lock(&ring->lock);
    if (status != TC_OK) c->status = status;
    if (--c->n_copying == 0 && !tc_batch_has_rows_left(c)) {
        c->state = TC_BUSY;
        status = c->status;
        pthread_mutex_unlock(&ring->lock);
        if (status == TC_OK) status = tc_slot_end(c->slot, &content);
        pthread_mutex_lock(&ring->lock);
        c->status = status;
        set_ready(ring, c);
    }
    ring->stats.gather_ns += now_ns() - start_ns;
}

/* Cut the next batch, locate and measure its rows and copy its first row range, with the lock released meanwhile. */
static void begin_next(tc_ring *ring) {
    tc_batch *c = cut(ring);
    if (ring->n_work_waiting && can_cut(ring)) pthread_cond_signal(&ring->work); /* Each woken worker wakes the next one. */
    if (ring->n_room_waiting && next_batch_rows(ring) == 0) pthread_cond_signal(&ring->room);
    pthread_mutex_unlock(&ring->lock);

    uint64_t start_ns = now_ns();
    tc_content content = tc_batch_content(c, ring->streams, ring->n_streams);
    if (c->status == TC_OK) tc_batch_find_rows(c);
    if (c->status == TC_OK) c->status = tc_slot_begin(c->slot, &content);
    uint64_t took_ns = now_ns() - start_ns;

    pthread_mutex_lock(&ring->lock);
    ring->stats.gather_ns += took_ns;
    if (c->status != TC_OK) {
        set_ready(ring, c);
        return;
    }
    tc_batch_open(c);
    ring->n_open++;
    copy_row_range(ring, c);
}

/* The oldest open batch with a row range; there is one while n_open > 0. */
static tc_batch *oldest_open(const tc_ring *ring) {
    uint64_t number = ring->next_take;
    while (!tc_batch_has_rows_left(&ring->batches[number % ring->depth])) number++;
    return &ring->batches[number % ring->depth];
}

static void unlink_task(tc_ring *ring, tc_copy_task *task) {
    tc_copy_task **at = &ring->copy_tasks;
    while (*at != task) at = &(*at)->next;
    *at = task->next;
}

/* Copy a slice of a copy task, with the lock released meanwhile. The task's owner waits until no slice is running. */
static void run_slice(tc_ring *ring, tc_copy_task *task) {
    tc_slice slice = tc_copy_task_slice(task);
    if (task->n_started == task->n) unlink_task(ring, task); /* No other thread has to do anything for it. */
    task->n_running++;
    if (ring->n_work_waiting && ring->copy_tasks) pthread_cond_signal(&ring->work);
    pthread_mutex_unlock(&ring->lock);
    tc_copy_set_nontemporal(is_worker && tc_distance_is_far(&distance));
    int status = tc_copy_task_run(task, slice);
    tc_copy_end();
    pthread_mutex_lock(&ring->lock);
    if (status != TC_OK) task->status = status;
    if (--task->n_running == 0 && ring->n_ready_waiting) pthread_cond_broadcast(&ring->ready);
}

/* Do one unit of work, copy tasks first, because a consumer waits for them. Returns 0 if there is none. */
static int work_once(tc_ring *ring) {
    if (ring->closing) return 0;
    if (ring->copy_tasks)
        run_slice(ring, ring->copy_tasks);
    else if (ring->n_open)
        copy_row_range(ring, oldest_open(ring));
    else if (can_cut(ring))
        begin_next(ring);
    else
        return 0;
    return 1;
}

/* work_once() on behalf of a consumer. Closing the ring waits for it. */
static int gather_as_consumer(tc_ring *ring) {
    ring->n_gathering_consumers++;
    int did_work = work_once(ring);
    if (--ring->n_gathering_consumers == 0 && ring->closing) pthread_cond_broadcast(&ring->consumers_done);
    return did_work;
}

static void *worker(void *argument) {
    tc_ring *ring = argument;
    is_worker = 1;
    pthread_mutex_lock(&ring->lock);
    while (!ring->closing) {
        if (work_once(ring)) {
            tc_distance_write(&distance);
            continue;
        }
        ring->n_work_waiting++;
        pthread_cond_wait(&ring->work, &ring->lock);
        ring->n_work_waiting--;
    }
    pthread_mutex_unlock(&ring->lock);
    return NULL;
}

/* ---- The functions of ring.h ---- */

static void free_ring(tc_ring *ring) {
    tc_sequence_free(&ring->sequence);
    for (size_t i = 0; i < ring->depth; i++) tc_batch_free(&ring->batches[i]);
    tc_pool_free(&ring->pool);
    pthread_cond_destroy(&ring->work);
    pthread_cond_destroy(&ring->consumers_done);
    pthread_cond_destroy(&ring->ready);
    pthread_cond_destroy(&ring->room);
    pthread_mutex_destroy(&ring->lock);
    pthread_mutex_destroy(&ring->joining);
    free(ring->batches);
    free(ring->streams);
    free(ring->threads);
    free(ring);
}

static int start_threads(tc_ring *ring, size_t n_threads) {
    /* Signals are handled by the interpreter's threads. Only signals that this thread itself causes (SIGBUS and
     * similar) may be delivered here. */
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGFPE);
    sigdelset(&all, SIGILL);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (ring->n_threads < n_threads && pthread_create(&ring->threads[ring->n_threads], NULL, worker, ring) == 0) ring->n_threads++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return ring->n_threads > 0 ? TC_OK : TC_NOMEM; /* With fewer threads than requested, the ring is only slower. */
}

tc_ring *tc_ring_new(
    const tc_stream *streams, size_t n_streams, size_t batch_rows, size_t depth, size_t n_threads, size_t slot_bytes, const tc_lent_memory *lent) {
    tc_ring *ring = calloc(1, sizeof *ring);
    if (ring == NULL) {
        if (lent->memory) lent->drop(lent->owner);
        return NULL;
    }
    tc_pool_init(&ring->pool, n_streams, depth, slot_bytes, lent);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutexattr_t adaptive; /* The lock is held for about 50 ns at a time, so a thread spins a little before it makes a system call. */
    pthread_mutexattr_init(&adaptive);
    pthread_mutexattr_settype(&adaptive, PTHREAD_MUTEX_ADAPTIVE_NP);
    pthread_mutex_init(&ring->lock, &adaptive);
    pthread_mutexattr_destroy(&adaptive);
    pthread_mutex_init(&ring->joining, NULL);
    pthread_cond_init(&ring->work, NULL);
    pthread_cond_init(&ring->consumers_done, NULL);
    pthread_cond_init(&ring->ready, &monotonic);
    pthread_cond_init(&ring->room, NULL);
    pthread_condattr_destroy(&monotonic);
    ring->pid = getpid();
    ring->n_streams = n_streams;
    ring->sequence.batch_rows = batch_rows;
    ring->depth = depth;
    ring->streams = malloc((n_streams + 1) * sizeof *ring->streams);
    ring->batches = calloc(depth, sizeof *ring->batches);
    size_t n_workers = n_threads > 1 ? n_threads - 1 : 1; /* The consumer is the last of the threads: see wait_ready. */
    ring->threads = calloc(n_workers, sizeof *ring->threads);
    if (ring->streams == NULL || ring->batches == NULL || ring->threads == NULL) {
        ring->depth = ring->batches ? depth : 0;
        free_ring(ring);
        return NULL;
    }
    if (n_streams) memcpy(ring->streams, streams, n_streams * sizeof *streams);
    if (start_threads(ring, n_workers) != TC_OK) {
        free_ring(ring);
        return NULL;
    }
    return ring;
}

int tc_ring_push(tc_ring *ring, const tc_plan *plan) {
    if (ring->pid != getpid()) return TC_CLOSED;
    pthread_mutex_lock(&ring->lock);
    int status = ring->closing || ring->end_status ? TC_CLOSED : tc_sequence_push(&ring->sequence, plan);
    wake_for_more(ring);
    pthread_mutex_unlock(&ring->lock);
    return status;
}

void tc_ring_finish(tc_ring *ring, int status) {
    if (ring->pid != getpid()) return;
    pthread_mutex_lock(&ring->lock);
    if (!ring->end_status) ring->end_status = status;
    pthread_cond_broadcast(&ring->work);
    pthread_cond_broadcast(&ring->ready);
    pthread_mutex_unlock(&ring->lock);
}

int tc_ring_wait_room(tc_ring *ring, uint64_t row, uint64_t *retired) {
    if (ring->pid != getpid()) return TC_CLOSED;
    pthread_mutex_lock(&ring->lock);
    ring->retired_target = row;
    while (!ring->closing && ring->retired_rows < row && next_batch_rows(ring) > 0) {
        ring->n_room_waiting++;
        pthread_cond_wait(&ring->room, &ring->lock);
        ring->n_room_waiting--;
    }
    int status = ring->closing ? TC_CLOSED : TC_OK;
    *retired = ring->retired_rows;
    pthread_mutex_unlock(&ring->lock);
    return status;
}

/* The status of the next batch if it is known now, else TC_TIMEOUT. */
static int next_status(const tc_ring *ring) {
    const tc_batch *c = &ring->batches[ring->next_take % ring->depth];
    if (ring->closing) return TC_CLOSED;
    if (ring->next_take < ring->next_cut) return c->state == TC_READY ? TC_OK : TC_TIMEOUT;
    return ring->end_status && next_batch_rows(ring) == 0 ? ring->end_status : TC_TIMEOUT;
}

static int take_next(tc_ring *ring, tc_slot **slot, uint64_t *first_row) {
    tc_batch *c = &ring->batches[ring->next_take++ % ring->depth];
    int status = c->status;
    c->state = TC_EMPTY;
    ring->taken_rows += c->n_rows;
    ring->stats.batches++;
    ring->stats.ready--;
    *first_row = c->first_row;
    if (status == TC_OK) {
        *slot = c->slot;
        if (c->slot->end + 1 > ring->stats.largest) ring->stats.largest = c->slot->end + 1; /* as tc_slot_begin sizes it */
        atomic_store_explicit(&c->slot->n_holders, 1, memory_order_relaxed);
        ring->n_out++;
        atomic_fetch_add_explicit(&live_batch_bytes, c->slot->capacity, memory_order_relaxed);
    } else if (c->slot) {
        tc_pool_return(&ring->pool, c->slot);
    }
    c->slot = NULL;
    size_t room = (size_t)(ring->next_take + ring->depth - ring->next_cut), quarter = ring->depth / 4;
    if (ring->n_work_waiting && room >= (quarter ? quarter : 1)) pthread_cond_signal(&ring->work);
    return status;
}

/* Wait until the status of the next batch is known, and return it, or TC_TIMEOUT. Meanwhile the consumer gathers too
 * (ring.h). What it gathers is in its own core's cache when it is read. */
static int wait_ready(tc_ring *ring, uint64_t start_ns, uint64_t timeout_ns) {
    uint64_t then = start_ns + timeout_ns;
    struct timespec until = {(time_t)(then / 1000000000u), (long)(then % 1000000000u)};
    int status;
    while ((status = next_status(ring)) == TC_TIMEOUT) {
        if (gather_as_consumer(ring)) {
            if (now_ns() < then) continue;
            return next_status(ring);
        }
        ring->n_ready_waiting++;
        int late = pthread_cond_timedwait(&ring->ready, &ring->lock, &until) == ETIMEDOUT;
        ring->n_ready_waiting--;
        if (late) return next_status(ring);
    }
    return status;
}

/* The rows of the batch that was taken before are not read any more. */
static void retire_taken(tc_ring *ring) {
    ring->retired_rows = ring->taken_rows;
    if (ring->n_room_waiting && ring->retired_rows >= ring->retired_target) pthread_cond_signal(&ring->room);
}

/* Release the lock, and measure from time to time how far the workers' cores are. */
static int end_take(tc_ring *ring, int status) {
    int asks = ring->next_take % MEASURE_EVERY_BATCHES == 0;
    pthread_mutex_unlock(&ring->lock);
    tc_distance_measure(&distance);
    if (asks && tc_copy_has_nontemporal()) tc_distance_request(&distance);
    return status;
}

int tc_ring_take(tc_ring *ring, uint64_t timeout_ns, tc_slot **slot, uint64_t *first_row) {
    if (ring->pid != getpid()) return TC_CLOSED;
    pthread_mutex_lock(&ring->lock);
    retire_taken(ring);
    int status = next_status(ring);
    if (status == TC_TIMEOUT && timeout_ns) {
        uint64_t start_ns = now_ns();
        status = wait_ready(ring, start_ns, timeout_ns);
        ring->stats.waits++;
        ring->stats.wait_ns += now_ns() - start_ns;
    }
    if (status == TC_OK) status = take_next(ring, slot, first_row);
    return end_take(ring, status);
}

int tc_ring_take_ready(tc_ring *ring, tc_slot **slot, uint64_t *first_row) {
    if (ring->pid != getpid()) return TC_CLOSED;
    pthread_mutex_lock(&ring->lock);
    retire_taken(ring);
    int status = next_status(ring);
    if (status == TC_OK) status = ring->batches[ring->next_take % ring->depth].status;
    if (status == TC_OK) status = take_next(ring, slot, first_row);
    return end_take(ring, status);
}

void tc_slot_hold(tc_slot *slot) { atomic_fetch_add_explicit(&slot->n_holders, 1, memory_order_relaxed); }

void tc_slot_release(tc_slot *slot) {
    /* acq_rel: the thread that fills the slot again must see everything that its holders did with it. */
    if (atomic_fetch_sub_explicit(&slot->n_holders, 1, memory_order_acq_rel) != 1) return;
    tc_ring *ring = slot->ring;
    if (ring->pid != getpid()) return;
    pthread_mutex_lock(&ring->lock);
    size_t before = slot->capacity + idle_bytes(ring);
    tc_pool_return(&ring->pool, slot);
    ring->n_out--;
    int last = ring->dropped && ring->n_out == 0;
    size_t after = last ? 0 : idle_bytes(ring);
    atomic_fetch_sub_explicit(&live_batch_bytes, before - after, memory_order_relaxed);
    pthread_mutex_unlock(&ring->lock);
    if (last) free_ring(ring);
}

void tc_ring_submit_copy(tc_slot *slot, tc_copy_task *task) {
    tc_ring *ring = slot->ring;
    task->n_started = task->n_running = 0;
    task->status = TC_OK;
    if (ring->pid != getpid() || task->n == 0) return;
    pthread_mutex_lock(&ring->lock);
    tc_copy_task **at = &ring->copy_tasks;
    while (*at) at = &(*at)->next;
    *at = task;
    task->next = NULL;
    if (ring->n_work_waiting) pthread_cond_signal(&ring->work);
    pthread_mutex_unlock(&ring->lock);
}

static void wait_copied(tc_ring *ring, const tc_copy_task *task) {
    while (task->n_running) {
        ring->n_ready_waiting++;
        pthread_cond_wait(&ring->ready, &ring->lock);
        ring->n_ready_waiting--;
    }
}

int tc_ring_finish_copy(tc_slot *slot, tc_copy_task *task) {
    tc_ring *ring = slot->ring;
    if (ring->pid != getpid()) return TC_CLOSED;
    pthread_mutex_lock(&ring->lock);
    ring->n_gathering_consumers++; /* Sources are read until the task is done, even if another thread closes the ring. */
    while (task->n_started < task->n) run_slice(ring, task);
    wait_copied(ring, task);
    if (--ring->n_gathering_consumers == 0 && ring->closing) pthread_cond_broadcast(&ring->consumers_done);
    pthread_mutex_unlock(&ring->lock);
    return task->status;
}

void tc_ring_cancel_copy(tc_slot *slot, tc_copy_task *task) {
    tc_ring *ring = slot->ring;
    if (ring->pid != getpid()) return;
    pthread_mutex_lock(&ring->lock);
    if (task->n_started < task->n) unlink_task(ring, task);
    task->n_started = task->n;
    wait_copied(ring, task);
    pthread_mutex_unlock(&ring->lock);
}

void tc_ring_close(tc_ring *ring) {
    if (ring->pid != getpid()) return;
    pthread_mutex_lock(&ring->lock);
    ring->closing = 1;
    pthread_cond_broadcast(&ring->work);
    pthread_cond_broadcast(&ring->ready);
    pthread_cond_broadcast(&ring->room);
    while (ring->n_gathering_consumers) pthread_cond_wait(&ring->consumers_done, &ring->lock);
    pthread_mutex_unlock(&ring->lock);
    pthread_mutex_lock(&ring->joining);
    while (ring->n_threads) pthread_join(ring->threads[--ring->n_threads], NULL);
    pthread_mutex_unlock(&ring->joining);
}

void tc_ring_drop(tc_ring *ring) {
    if (ring->pid != getpid()) return;
    tc_ring_close(ring);
    pthread_mutex_lock(&ring->lock);
    ring->dropped = 1;
    for (size_t i = 0; i < ring->depth; i++) { /* Batches that nobody will take. */
        tc_batch *c = &ring->batches[i];
        if (c->state != TC_EMPTY && c->slot) tc_pool_return(&ring->pool, c->slot);
        c->slot = NULL;
    }
    int last = ring->n_out == 0;
    if (!last) atomic_fetch_add_explicit(&live_batch_bytes, idle_bytes(ring), memory_order_relaxed);
    pthread_mutex_unlock(&ring->lock);
    if (last) free_ring(ring);
}

void tc_ring_get_stats(tc_ring *ring, tc_ring_stats *stats) {
    memset(stats, 0, sizeof *stats);
    if (ring->pid != getpid()) return;
    pthread_mutex_lock(&ring->lock);
    *stats = ring->stats;
    pthread_mutex_unlock(&ring->lock);
}
