#include "pool.h"

#include <stdatomic.h>
#include <sys/mman.h>

/* A larger arena is not kept: it belongs to batches of 16 MiB and more, whose epochs are long, and would take its memory between them, too. */
enum { LINE = 64, MOST_SPARE_BYTES = 64 << 20 };

/* An arena that no ring has, for the next ring: making its pages anew took a tenth of an epoch of 30 ms. It describes itself in its first
 * bytes. It goes when nobody has or expects one any more. Without a lock, which a fork might leave locked. */
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

static __thread char this_thread; /* its address tells threads apart */

void tc_pool_init(tc_pool *pool, size_t n_streams, size_t n_ahead, size_t slot_bytes) {
    *pool = (tc_pool){.n_streams = n_streams, .n_ahead = n_ahead};
    if (slot_bytes == 0) return;
    /* Room for what is ahead and for the one at the consumer. */
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

/* A piece of the arena while there are some, a mapping of its own after. */
static tc_slot *make(tc_pool *pool) {
    int room = pool->arena && pool->arena_used + pool->arena_slot_bytes <= pool->arena_bytes;
    uint8_t *memory = room ? pool->arena + pool->arena_used : NULL;
    tc_slot *slot = tc_slot_new(pool->n_streams, memory, room ? pool->arena_slot_bytes : 0);
    if (slot && room) pool->arena_used += pool->arena_slot_bytes;
    return slot;
}

/* The one that this thread filled last, or any: what lies in another processor's cache takes longer to write. */
static tc_slot *unlink_best(tc_pool *pool) {
    tc_slot **at = &pool->free;
    while (*at && (*at)->filler != &this_thread) at = &(*at)->next;
    if (*at == NULL) at = &pool->free;
    tc_slot *slot = *at;
    if (slot) {
        *at = slot->next;
        pool->n_free--;
    }
    return slot;
}

tc_slot *tc_pool_take(tc_pool *pool) {
    tc_slot *slot = unlink_best(pool);
    if (slot == NULL) slot = make(pool);
    if (slot) slot->filler = &this_thread;
    return slot;
}

void tc_pool_keep(tc_pool *pool, tc_slot *slot) {
    if (slot->own && pool->n_free > pool->n_ahead) {
        tc_slot_free(slot);
        return;
    }
    slot->next = pool->free;
    pool->free = slot;
    pool->n_free++;
}
