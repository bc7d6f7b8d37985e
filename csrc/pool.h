/* Pool: the unused slots of a ring, and the arena that the first slots are parts of. There are no locks here: the
 * ring's lock guards the pool. */
#ifndef TC_POOL_H
#define TC_POOL_H
#include "slot.h"

typedef struct {
    size_t n_streams, n_ahead; /* Number of batches prepared ahead; about as many unused slots are kept. */
    tc_slot *free, *last; /* The unused slots, in the order in which they were returned. */
    size_t n_free, resting_bytes;
    uint8_t *arena;
    size_t arena_bytes, arena_slot_bytes, arena_used;
} tc_pool;

/* slot_bytes: Expected size of a batch, or 0 if unknown. If there is no memory for an arena, each slot maps its own
 * memory. */
void tc_pool_init(tc_pool *pool, size_t n_streams, size_t n_ahead, size_t slot_bytes);
void tc_pool_free(tc_pool *pool);

/* Between a call of hold and its let_go, the arena of a freed pool, up to 64 MiB, is kept for the next pool of the same
 * size. Callers are those that run several rings one after the other. */
void tc_pool_hold(void);
void tc_pool_let_go(void);

/* A slot for the calling thread to fill. is_consumer: the same thread will also read it. NULL if no memory is left. */
tc_slot *tc_pool_take(tc_pool *pool, int is_consumer);

/* Return a slot to the pool. Excess slots are freed, so that the memory of list(loader) is given back. */
void tc_pool_keep(tc_pool *pool, tc_slot *slot);

#endif
