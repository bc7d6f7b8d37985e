/* Pool: the slots of a ring that nobody uses, and the arena that the first ones are pieces of. No locks here: the ring's guards it. */
#ifndef TC_POOL_H
#define TC_POOL_H
#include "slot.h"

typedef struct {
    size_t n_streams, n_ahead; /* slots are kept for so many batches ahead */
    tc_slot *free, *last; /* kept, the one that has rested longest first */
    size_t n_free, resting_bytes;
    uint8_t *arena;
    size_t arena_bytes, arena_slot_bytes, arena_used;
} tc_pool;

/* slot_bytes: expected size of a batch, 0: unknown. Without memory for an arena slots map their own. */
void tc_pool_init(tc_pool *pool, size_t n_streams, size_t n_ahead, size_t slot_bytes);
void tc_pool_free(tc_pool *pool);

/* From hold to let_go the memory of a pool that is freed is kept, up to 64 MiB, for one of the same size: for those whose rings
 * follow each other. */
void tc_pool_hold(void);
void tc_pool_let_go(void);

/* A slot for the calling thread to fill. is_consumer: it will read it too. NULL without memory. */
tc_slot *tc_pool_take(tc_pool *pool, int is_consumer);

/* Keep a slot for a coming batch, unless there are more than are ever ahead: after list(loader) their memory goes back. */
void tc_pool_keep(tc_pool *pool, tc_slot *slot);

#endif
