/* Ring: threads that gather batches ahead of one consumer, without Python.
 *
 * A planner pushes parts (rows of a window, in served order); the ring cuts their sequence into batches of batch_rows, or of sizes
 * that are pushed beside the parts (a sampler's); threads gather each batch into a slot of memory, a large one together (batch.h); the
 * consumer takes the slots in order. At most `depth` batches are cut and not yet taken. A slot belongs to its taker until tc_slot_release
 * (any thread): the memory is reused only then, and when takers hold all slots new ones are made.
 *
 * A consumer that would wait gathers too, so that of n threads n - 1 are workers: asleep, it would have to be woken for each batch, by one
 * worker more than there are cores.
 *
 * What workers copy for a consumer whose core has another cache goes past the caches (distance.h, copy.h): read from the worker's cache, batches
 * took up to 1.5 times as long. What the consumer gathers itself goes through its own.
 *
 * Locking: one mutex guards everything but the bytes of slots and sources. Each batch takes it once for a worker, once for the consumer and
 * once at release (some 25 ns each uncontended). Conditions are signalled only where somebody waits, and a worker that waits for room is
 * woken when a quarter of the depth is free, so that a fast consumer does not pay a wake-up (about 5 us here) for each batch.
 *
 * After fork the child has no workers: calls give TC_CLOSED, release and close do nothing (the mutex may be held by a thread that is gone).
 */
#ifndef TC_RING_H
#define TC_RING_H
#include "errand.h"
#include "slot.h"

enum {
    TC_OK = 0,
    TC_END = 1,     /* the planner ended the sequence and every batch was taken */
    TC_FAILED = 2,  /* the planner failed; every whole batch before was taken */
    TC_TIMEOUT = 3,
    TC_CLOSED = 4
};

typedef struct tc_ring tc_ring;

typedef struct {
    uint64_t batches;    /* taken */
    uint64_t gather_ns;  /* of all workers */
    uint64_t wait_ns;    /* the consumer's */
    uint64_t waits;      /* how often the consumer had to wait */
    uint64_t ready;      /* batches ready now */
} tc_figures;

/* slot_bytes: expected size of a batch (0: unknown); a slot grows when a batch is larger. NULL without memory or threads. */
tc_ring *tc_ring_new(const tc_stream *streams, size_t n_streams, size_t batch_rows, size_t depth, size_t n_threads, size_t slot_bytes);

/* Append the plan's rows to the sequence. TC_OK, TC_CLOSED or TC_NOMEM. */
int tc_ring_push(tc_ring *ring, const tc_plan *plan);

/* Rows of the next n batches after those that were pushed before, 1 or more each: from the first call on, which comes before the first plan,
 * batches have these sizes and no others. TC_OK, TC_CLOSED or TC_NOMEM. */
int tc_ring_push_sizes(tc_ring *ring, const uint32_t *rows, size_t n);

/* End the sequence (status TC_END or TC_FAILED). At TC_END what is left makes a last, short batch; at TC_FAILED it is not served. */
void tc_ring_finish(tc_ring *ring, int status);

/* Wait until rows of the sequence before `row` will never be read again, or until the next batch needs rows that were not pushed yet.
 * *retired: rows before it will not be read again. TC_OK or TC_CLOSED. */
int tc_ring_wait_room(tc_ring *ring, uint64_t row, uint64_t *retired);

/* The next batch. TC_OK (*slot is the caller's), TC_END, TC_FAILED, TC_TIMEOUT, TC_CLOSED, TC_EIO (its source could not be read), TC_NOMEM.
 * *first_row: the sequence's row that the batch begins with. Taking retires the rows of the batch that was taken before. */
int tc_ring_take(tc_ring *ring, uint64_t timeout_ns, tc_slot **slot, uint64_t *first_row);

/* The next batch if it is ready and good: TC_OK. Else nothing is taken, and tc_ring_take says why; rows of the batch before are retired all the
 * same. */
int tc_ring_take_ready(tc_ring *ring, tc_slot **slot, uint64_t *first_row);

/* One more who has it. It goes back to the ring when it was released as often as it was held, and once more. Both from any thread. */
void tc_slot_hold(tc_slot *slot);
void tc_slot_release(tc_slot *slot);

/* Have objects of a slot's batch filled from their sources by its ring's threads, before any batch is gathered. */
void tc_ring_send_errand(tc_slot *slot, tc_errand *errand);

/* Copy what is left of an errand that was sent, and return when all is copied. 0, TC_EIO, or TC_CLOSED (in a forked child). */
int tc_ring_finish_errand(tc_slot *slot, tc_errand *errand);

/* Have what is left of it not copied, and return when nothing is being copied. For one that was finished nothing. */
void tc_ring_cancel_errand(tc_slot *slot, tc_errand *errand);

/* Wake everyone, join the workers: no plan is read once it returns, whoever else closes at the same time. Slots that are out stay valid.
 * Repeatable, from any thread. */
void tc_ring_close(tc_ring *ring);

/* Close, and free once the last slot that is out is released. */
void tc_ring_drop(tc_ring *ring);

void tc_ring_figures(tc_ring *ring, tc_figures *figures);

/* Whether workers copy for consumers that are far just now, in all rings of the process. */
int tc_ring_is_far(void);

/* For tests: how often consumers have looked. */
uint64_t tc_ring_n_answers(void);

/* Memory of all slots that are out, of all rings of the process, those that are dropped included. */
size_t tc_held_bytes(void);

#endif
