#include "pool.h"

#include <stdatomic.h>
#include <sys/mman.h>

/* A larger arena is not kept: it belongs to batches of 16 MiB and more, whose epochs are long, and it would occupy its
 * memory between the epochs. */
enum { LINE = 64, MOST_SPARE_BYTES = 64 << 20 };

/* Twice the size of a core's L2. Measured with slots of 64 KiB that one core writes and another core of the same
 * last-level cache reads (Zen 4, L2 of 1 MiB): with 0.5, 1, 2 and 4 MiB of slots in rotation, 6.5, 9.2, 18.8 and 19.5
 * GB/s are written. */
enum { REST_BYTES = 2 << 20 };

/* An arena without a ring, for the next ring: mapping new pages took a tenth of an epoch of 30 ms. Its first bytes hold
 * its size. It is unmapped when no pool and no holder exists any more. Atomic and without a lock, because a fork could
 * leave a lock locked. */
typedef struct {
    size_t n_bytes;
} spare;

static _Atomic(spare *) spare_arena;
static _Atomic size_t n_holding;

static void unmap(spare *arena) {
    if (arena) munmap(arena, arena->n_bytes);
}

void tc_pool_hold(void) { atomic_fetch_add(&n_holding, 1); }

void tc_pool_let_go(void) {
    if (atomic_fetch_sub(&n_holding, 1) == 1) unmap(atomic_exchange(&spare_arena, NULL));
}

static uint8_t *arena_of(size_t n_bytes) {
    spare *found = atomic_exchange(&spare_arena, NULL);
    if (found && found->n_bytes == n_bytes) return (uint8_t *)found;
    unmap(found);
    return tc_map_bytes(n_bytes);
}

static __thread char this_thread; /* Its address identifies the thread. */

void tc_pool_init(tc_pool *pool, size_t n_streams, size_t n_ahead, size_t slot_bytes) {
    *pool = (tc_pool){.n_streams = n_streams, .n_ahead = n_ahead};
    if (slot_bytes == 0) return;
    /* Room for the batches ahead and for the one at the consumer. */
    pool->arena_slot_bytes = (slot_bytes + 1 + LINE - 1) & ~(size_t)(LINE - 1);
    pool->arena_bytes = tc_page_rounded(pool->arena_slot_bytes * (n_ahead + 2));
    pool->arena = arena_of(pool->arena_bytes);
    if (pool->arena) tc_pool_hold();
}

void tc_pool_free(tc_pool *pool) {
    for (tc_slot *slot = pool->free; slot;) {
        tc_slot *next = slot->next;
        tc_slot_free(slot);
        slot = next;
    }
    if (pool->arena == NULL) return;
    spare *arena = (spare *)pool->arena;
    arena->n_bytes = pool->arena_bytes;
    unmap(arena->n_bytes <= MOST_SPARE_BYTES ? atomic_exchange(&spare_arena, arena) : arena);
    tc_pool_let_go();
}

static int has_room(const tc_pool *pool) { return pool->arena && pool->arena_used + pool->arena_slot_bytes <= pool->arena_bytes; }

/* A slot in the arena while there is room, then a slot with a mapping of its own. */
static tc_slot *make(tc_pool *pool) {
    int room = has_room(pool);
    uint8_t *memory = room ? pool->arena + pool->arena_used : NULL;
    tc_slot *slot = tc_slot_new(pool->n_streams, memory, room ? pool->arena_slot_bytes : 0);
    if (slot && room) pool->arena_used += pool->arena_slot_bytes;
    return slot;
}

static tc_slot *unlink_after(tc_pool *pool, tc_slot *before) {
    tc_slot **at = before ? &before->next : &pool->free, *slot = *at;
    *at = slot->next;
    if (pool->last == slot) pool->last = before;
    pool->n_free--;
    pool->resting_bytes -= slot->capacity;
    return slot;
}

/* The slot that a consumer filled last and has read since is mostly in the consumer's own cache, so it is the best one
 * for the consumer to fill again. */
static tc_slot *take_own(tc_pool *pool) {
    tc_slot *before = NULL, *found = NULL;
    for (tc_slot *slot = pool->free, *prior = NULL; slot; prior = slot, slot = slot->next)
        if (slot->filler == &this_thread) found = slot, before = prior;
    return found ? unlink_after(pool, before) : NULL;
}

/* A worker's batch was read by the consumer and is in the consumer's cache. Writing to this memory took three times as
 * long as writing to memory that is in no other core's cache. Slots therefore stay unused for a while, and new slots of
 * the arena are used until enough are unused: REST_BYTES, or, for small slots, the number of batches ahead. */
static tc_slot *take_rested(tc_pool *pool) {
    int enough = pool->n_free >= pool->n_ahead || pool->resting_bytes >= REST_BYTES;
    return pool->n_free && (enough || !has_room(pool)) ? unlink_after(pool, NULL) : NULL;
}

tc_slot *tc_pool_take(tc_pool *pool, int is_consumer) {
    tc_slot *slot = is_consumer ? take_own(pool) : NULL;
    if (slot == NULL) slot = take_rested(pool);
    if (slot == NULL) slot = make(pool);
    if (slot == NULL && pool->n_free) slot = unlink_after(pool, NULL); /* No memory for a new slot. */
    if (slot) slot->filler = &this_thread;
    return slot;
}

void tc_pool_keep(tc_pool *pool, tc_slot *slot) {
    if (slot->own && pool->n_free > pool->n_ahead) {
        tc_slot_free(slot);
        return;
    }
    slot->next = NULL;
    *(pool->last ? &pool->last->next : &pool->free) = slot;
    pool->last = slot;
    pool->n_free++;
    pool->resting_bytes += slot->capacity;
}
