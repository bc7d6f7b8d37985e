#ifndef TC_RING_H
#define TC_RING_H
/* Ring: threads without Python that gather batches ahead of one consumer.
 *
 * A planner thread pushes plans (rows of the windows that are served together, in output order). The ring cuts the
 * sequence of rows into batches of batch_rows rows. Threads gather each batch into a slot of memory; several threads
 * share a large batch (batch.h). The consumer takes the slots in order. At most `depth` batches are cut and not yet
 * taken. A taken slot belongs to the consumer until tc_slot_release, which any thread may call: its memory is reused
 * only after that, and if the consumer holds all slots, new ones are made.
 *
 * A consumer that would have to wait gathers too, so a ring of n threads has n - 1 workers. If the consumer slept
 * instead, a worker would have to wake it for each batch, and there would be one thread more than cores.
 *
 * If the consumer's core has another cache than the workers' cores, the workers write with non-temporal stores
 * (core_distance.h, copy.h): read from a worker's cache, batches took up to 1.5 times as long. Rows that the consumer
 * gathers itself are written through its own cache.
 *
 * Locking: one mutex guards everything but the bytes of slots and sources. For each batch, a worker takes it once, the
 * consumer once, and the release once (about 25 ns each if uncontended). Conditions are signalled only if a thread
 * waits. A worker that waits for room is woken when a quarter of the depth is free, so that a fast consumer does not
 * pay for a wake-up (about 5 us) per batch.
 *
 * After a fork, the child has no workers: calls return TC_CLOSED, release and close do nothing, because a thread that
 * does not exist in the child may hold the mutex.
 */
#include "copy_task.h"
#include "slot.h"

enum {
    TC_OK = 0,
    TC_END = 1,     /* The planner has ended the sequence, and every batch was taken. */
    TC_FAILED = 2,  /* The planner has failed, and every whole batch before the failure was taken. */
    TC_TIMEOUT = 3,
    TC_CLOSED = 4
};

typedef struct tc_ring tc_ring;

typedef struct {
    uint64_t batches;    /* Number of batches taken. */
    uint64_t gather_ns;  /* Gather time of all threads. */
    uint64_t wait_ns;    /* Wait time of the consumer. */
    uint64_t waits;      /* Number of times that the consumer had to wait. */
    uint64_t ready;      /* Number of batches that are ready now. */
    uint64_t largest;    /* Bytes of the slot that the largest batch taken needs. */
} tc_ring_stats;

/* slot_bytes: Expected size of a batch in bytes, or 0 if unknown; a slot grows if a batch is larger. lent: Memory of
 * the caller for the slots (slot.h), which the ring owns from this call on, even if it fails. Returns NULL if there is no
 * memory or no thread could start. */
tc_ring *tc_ring_new(
    const tc_stream *streams, size_t n_streams, size_t batch_rows, size_t depth, size_t n_threads, size_t slot_bytes, const tc_lent_memory *lent);

/* Append the rows of a plan to the sequence. Returns TC_OK, TC_CLOSED or TC_NOMEM. */
int tc_ring_push(tc_ring *ring, const tc_plan *plan);

/* End the sequence with status TC_END or TC_FAILED. After TC_END, the remaining rows form a last, short batch; after
 * TC_FAILED, they are not served. */
void tc_ring_finish(tc_ring *ring, int status);

/* Wait until the rows of the sequence before `row` are retired (never read again), or until the next batch needs rows
 * that are not pushed yet. *retired: All rows before this position are retired. Returns TC_OK or TC_CLOSED. */
int tc_ring_wait_room(tc_ring *ring, uint64_t row, uint64_t *retired);

/* Take the next batch. Returns TC_OK (the caller owns *slot), TC_END, TC_FAILED, TC_TIMEOUT, TC_CLOSED, TC_EIO (a
 * source could not be read), TC_CORRUPT, TC_MISFIT, TC_TOO_LONG or TC_NOMEM. *first_row: Position of the batch's first
 * row in the sequence. Each call retires the rows of the batch that was taken before. */
int tc_ring_take(tc_ring *ring, uint64_t timeout_ns, tc_slot **slot, uint64_t *first_row);

/* Take the next batch if it is ready and has no error: TC_OK. Otherwise nothing is taken, and tc_ring_take gives the
 * reason; the rows of the previous batch are retired in either case. */
int tc_ring_take_ready(tc_ring *ring, tc_slot **slot, uint64_t *first_row);

/* Add a holder of a slot, and remove one. The slot returns to the ring when its last holder releases it; the consumer
 * that took it is the first holder. Any thread may call both. */
void tc_slot_hold(tc_slot *slot);
void tc_slot_release(tc_slot *slot);

/* Have the ring's threads copy the objects of a slot's batch, before they gather further batches. */
void tc_ring_submit_copy(tc_slot *slot, tc_copy_task *task);

/* Copy the rest of a task that was sent, and return when everything is copied. Returns 0, TC_EIO, or TC_CLOSED (in a
 * forked child). */
int tc_ring_finish_copy(tc_slot *slot, tc_copy_task *task);

/* Drop the rest of a task, and return when no thread is copying. Does nothing for a finished task. */
void tc_ring_cancel_copy(tc_slot *slot, tc_copy_task *task);

/* Wake all waiting threads and join the workers. When any of several concurrent calls returns, no plan is read any
 * more. Slots that are taken stay valid. May be called repeatedly, from any thread. */
void tc_ring_close(tc_ring *ring);

/* Close the ring, and free it once the last taken slot is released. */
void tc_ring_drop(tc_ring *ring);

void tc_ring_get_stats(tc_ring *ring, tc_ring_stats *stats);

/* Whether the workers of all rings of the process write with non-temporal stores now, because their consumers are far. */
int tc_ring_is_consumer_far(void);

/* For tests: number of distance measurements that consumers have made. */
uint64_t tc_ring_n_measurements(void);

/* Memory in bytes that the consumer's batches keep from being used again: taken slots, copied columns, and the unused slots
 * of dropped rings, of all rings of the process. */
size_t tc_live_batch_bytes(void);

/* Count bytes of a column that was copied out of its slot (negative: they are freed). */
void tc_count_copied(ptrdiff_t n_bytes);


#endif
