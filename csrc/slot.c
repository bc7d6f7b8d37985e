#include "slot.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "cast.h"
#include "output_layout.h"
#include "packing.h"
#include "sigbus_guard.h"

enum { ALIGN = 64, HUGE_BYTES = 2 << 20 };

static size_t aligned(size_t n) { return (n + ALIGN - 1) & ~(size_t)(ALIGN - 1); }

uint8_t *tc_map_bytes(size_t n_bytes) {
    if (n_bytes < HUGE_BYTES) {
        void *memory = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        return memory == MAP_FAILED ? NULL : memory;
    }
    uint8_t *memory = mmap(NULL, n_bytes + HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return NULL;
    size_t before = (HUGE_BYTES - ((uintptr_t)memory & (HUGE_BYTES - 1))) & (HUGE_BYTES - 1);
    if (before) munmap(memory, before);
    munmap(memory + before + n_bytes, HUGE_BYTES - before);
    madvise(memory + before, n_bytes, MADV_HUGEPAGE); /* A hint only: kernels without huge pages return EINVAL. */
    return memory + before;
}

size_t tc_page_rounded(size_t n_bytes) {
    size_t unit = n_bytes < HUGE_BYTES ? 4096 : HUGE_BYTES;
    return (n_bytes + unit - 1) / unit * unit;
}

/* Make room for n_bytes, and keep the first keep_bytes. */
static int slot_grow(tc_slot *slot, size_t n_bytes, size_t keep_bytes) {
    if (n_bytes <= slot->capacity) return 0;
    size_t capacity = tc_page_rounded(n_bytes + n_bytes / 4); /* A quarter in reserve: batches of varying length must not grow by a page each time. */
    uint8_t *memory = tc_map_bytes(capacity);
    if (memory == NULL) return TC_NOMEM;
    if (keep_bytes) memcpy(memory, slot->memory, keep_bytes);
    if (slot->own) munmap(slot->memory, slot->capacity);
    slot->memory = memory;
    slot->capacity = capacity;
    slot->own = 1;
    return 0;
}

tc_slot *tc_slot_new(size_t n_streams, uint8_t *memory, size_t capacity) {
    tc_slot *slot = calloc(1, sizeof *slot);
    size_t *places = calloc(n_streams * 3 + 1, sizeof *places);
    if (slot == NULL || places == NULL) {
        free(slot);
        free(places);
        return NULL;
    }
    slot->memory = memory;
    slot->capacity = capacity;
    slot->values_at = places;
    slot->offsets_at = places + n_streams;
    slot->n_elements = places + 2 * n_streams;
    return slot;
}

void tc_slot_free(tc_slot *slot) {
    if (slot->own) munmap(slot->memory, slot->capacity);
    free(slot->values_at);
    free(slot);
}

/* The rows of a part, for stream 0 of its plan; of_stream derives those of the other streams. Breaks are counted once
 * for all streams. */
static tc_rows rows_of(const tc_part *part) {
    const tc_plan *plan = part->plan;
    return (tc_rows){plan->sources, plan->chunks, part->block, part->row, part->n, tc_count_breaks(part->block, part->row, part->n)};
}

static tc_rows of_stream(const tc_rows *rows, size_t n_blocks, size_t s) {
    tc_rows mine = *rows;
    mine.sources += s * n_blocks;
    if (mine.chunks != NULL) mine.chunks += s * n_blocks;
    return mine;
}

tc_rows tc_rows_of(const tc_part *part, size_t stream) {
    tc_rows rows = rows_of(part);
    return of_stream(&rows, part->plan->n_blocks, stream);
}

static int is_var(const tc_stream *stream) { return stream->kind == TC_VAR || stream->kind == TC_PADDED; }

/* Check the pages that are not checked yet, before any of their bytes is used, and find the sizes of the TC_VAR
 * streams. */
static int measure(tc_slot *slot, const tc_stream *streams, size_t n_streams, const tc_part *parts, size_t n_parts) {
    if (tc_guard_enter()) return TC_EIO;
    int status = 0;
    tc_corruption fault;
    for (size_t p = 0, done = 0; status == 0 && p < n_parts; done += parts[p++].n) {
        tc_rows rows = rows_of(&parts[p]);
        for (size_t s = 0; status == 0 && s < n_streams; s++) {
            tc_rows mine = of_stream(&rows, parts[p].plan->n_blocks, s);
            tc_stream stored = tc_stored_as(&streams[s]);
            if (mine.chunks != NULL) status = tc_check(&stored, &mine, &fault);
            if (status != 0 || stored.kind != TC_VAR) continue;
            int64_t *offsets = (int64_t *)(slot->memory + slot->offsets_at[s]) + done;
            if (done == 0) offsets[0] = 0;
            status = tc_measure(&mine, offsets);
            slot->n_elements[s] = (size_t)offsets[parts[p].n];
        }
    }
    if (status == 0 && parts[0].plan->output_layouts != NULL) status = tc_layouts_begin(slot, streams, n_streams, parts, n_parts);
    tc_guard_leave();
    return status;
}

static size_t out_width(const tc_stream *stream) {
    switch (stream->kind) {
        case TC_FIXED: return tc_cast_bytes(stream, stream->width);
        case TC_BITS: return stream->to == TC_AS_IS ? 1 : tc_dtype_bytes(stream->to);
        case TC_REF: return sizeof(tc_ref);
        case TC_PACKED: return stream->width;
        default: return 0;
    }
}

/* Copy all rows of a part to the rows of the batch from `done` on. The streams that output layouts own are copied in
 * the last step. */
static int copy_part(tc_slot *slot, const tc_stream *streams, size_t n_streams, const tc_part *part, size_t done) {
    const tc_output_layout *output_layouts = part->plan->output_layouts;
    tc_rows rows = rows_of(part);
    int status = 0;
    for (size_t s = 0; status == 0 && s < n_streams; s++) {
        if (output_layouts != NULL && tc_layout_owns(slot, &streams[s], &output_layouts[s])) continue;
        tc_rows mine = of_stream(&rows, part->plan->n_blocks, s);
        tc_sink sink = {slot->memory + slot->values_at[s] + done * out_width(&streams[s]), NULL};
        if (streams[s].kind == TC_VAR) sink.offsets = (int64_t *)(slot->memory + slot->offsets_at[s]) + done;
        status = tc_gather(&streams[s], &mine, &sink);
    }
    return status;
}

static size_t batch_bytes(const tc_slot *slot, const tc_stream *streams, size_t n_streams) {
    size_t n_bytes = 0;
    for (size_t s = 0; s < n_streams; s++) {
        const tc_stream *stream = &streams[s];
        if (is_var(stream)) {
            n_bytes += slot->n_elements[s] * tc_cast_bytes(stream, stream->width);
        } else if (stream->kind == TC_REF) {
            const tc_ref *refs = (const tc_ref *)(slot->memory + slot->values_at[s]);
            for (size_t i = 0; i < slot->n_rows; i++) n_bytes += refs[i].n_bytes;
        } else {
            n_bytes += slot->n_rows * out_width(stream);
        }
    }
    return n_bytes;
}

static int is_on_host(const tc_stream *stream) { return stream->on_host || stream->kind == TC_REF; }

/* Place the heads: the streams of known size, and the offsets of the others. Returns the end of the used memory. */
static size_t place_heads(tc_slot *slot, const tc_stream *streams, size_t n_streams, const tc_output_layout *output_layouts) {
    size_t end = 0;
    for (int on_host = 1; on_host >= 0; on_host--)
        for (size_t s = 0; s < n_streams; s++) {
            if (is_on_host(&streams[s]) != on_host) continue;
            if (is_var(&streams[s])) {
                slot->offsets_at[s] = end;
                end += aligned(streams[s].kind == TC_VAR ? (slot->n_rows + 1) * sizeof(int64_t) : tc_layout_head_bytes(&output_layouts[s], slot->n_rows));
                slot->n_elements[s] = 0;
            } else {
                slot->values_at[s] = end;
                end += aligned(slot->n_rows * out_width(&streams[s]));
            }
        }
    return end;
}

/* Place the values of varying length from `end` on. Returns the new end. */
static size_t place_values(tc_slot *slot, const tc_stream *streams, size_t n_streams, size_t end) {
    for (int on_host = 0; on_host <= 1; on_host++)
        for (size_t s = 0; s < n_streams; s++) {
            if (!is_var(&streams[s]) || is_on_host(&streams[s]) != on_host) continue;
            slot->values_at[s] = end;
            end += aligned(slot->n_elements[s] * tc_cast_bytes(&streams[s], streams[s].width));
        }
    return end;
}

/* A column of SMALL_BYTES always gets memory of its own: with its tensor, it fits into the chunks that malloc keeps for each
 * thread. Larger columns get it, from the smallest on, as long as they make up at most a 16th of the batch together.
 * Without that limit, batches of 32 columns of 64 KiB took 3.8 times as long: each copy went to new pages. */
enum { SMALL_BYTES = 512, SMALL_PART = 16 };

static size_t small_bytes(const tc_slot *slot, const tc_stream *streams, size_t n_streams) {
    size_t budget = slot->end / SMALL_PART;
    for (size_t limit = budget; limit > SMALL_BYTES; limit /= 2) {
        size_t total = 0;
        for (size_t s = 0; s < n_streams; s++) {
            size_t n_bytes = is_var(&streams[s]) ? slot->n_elements[s] * tc_cast_bytes(&streams[s], streams[s].width) : slot->n_rows * out_width(&streams[s]);
            if (n_bytes <= limit && !is_on_host(&streams[s])) total += n_bytes;
        }
        if (total <= budget) return limit;
    }
    return SMALL_BYTES;
}

int tc_slot_is_small_column(const tc_slot *slot, size_t n_bytes) { return slot->lent == NULL && n_bytes <= slot->small_bytes; }

int tc_slot_begin(tc_slot *slot, const tc_content *content) {
    const tc_stream *streams = content->streams;
    const tc_part *parts = content->parts;
    size_t n_streams = content->n_streams, n_parts = content->n_parts;
    int is_measured = 0; /* 1: measure() must run, because there are sizes to find or pages to check. */
    slot->n_rows = 0;
    for (size_t p = 0; p < n_parts; p++) {
        slot->n_rows += parts[p].n;
        is_measured |= parts[p].plan->chunks != NULL || parts[p].plan->output_layouts != NULL;
    }
    for (size_t s = 0; s < n_streams; s++) is_measured |= is_var(&streams[s]);
    size_t end = place_heads(slot, streams, n_streams, parts[0].plan->output_layouts);
    int status = slot_grow(slot, end + 1, 0);
    if (status == 0 && is_measured) {
        size_t head = end;
        status = measure(slot, streams, n_streams, parts, n_parts);
        if (status == 0) end = place_values(slot, streams, n_streams, end);
        if (status == 0) status = slot_grow(slot, end + 1, head);
    }
    slot->end = end;
    slot->small_bytes = small_bytes(slot, streams, n_streams);
    return status;
}

int tc_slot_copy(tc_slot *slot, const tc_content *content, size_t first, size_t stop) {
    if (tc_guard_enter()) return TC_EIO;
    int status = 0;
    size_t done = 0; /* Number of rows of the previous parts. */
    for (size_t p = 0; status == 0 && done < stop; done += content->parts[p++].n) {
        const tc_part *part = &content->parts[p];
        size_t from = first > done ? first - done : 0, to = part->n < stop - done ? part->n : stop - done;
        if (from >= to) continue;
        tc_part range = {part->plan, part->first + from, to - from, part->block + from, part->row + from};
        status = copy_part(slot, content->streams, content->n_streams, &range, done + from);
    }
    tc_guard_leave();
    return status;
}

int tc_slot_end(tc_slot *slot, const tc_content *content) {
    int status = 0;
    if (content->parts[0].plan->output_layouts != NULL) {
        if (tc_guard_enter()) return TC_EIO;
        status = tc_layouts_end(slot, content->streams, content->n_streams, content->parts, content->n_parts);
        tc_guard_leave();
    }
    slot->n_bytes = status == 0 ? batch_bytes(slot, content->streams, content->n_streams) : 0;
    return status;
}


#include <stdatomic.h>
#include <sys/mman.h>

/* A larger arena is not kept: it belongs to batches of 16 MiB and more, whose epochs are long, and it would occupy its
 * memory between the epochs. */
enum { LINE = 64, MAX_SPARE_BYTES = 64 << 20 };

/* Twice the size of a core's L2. Measured with slots of 64 KiB that one core writes and another core of the same
 * last-level cache reads (Zen 4, L2 of 1 MiB): with 0.5, 1, 2 and 4 MiB of slots in rotation, 6.5, 9.2, 18.8 and 19.5
 * GB/s are written. */
enum { IDLE_BYTES = 2 << 20 };

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

void tc_arena_keep(void) { atomic_fetch_add(&n_holding, 1); }

void tc_arena_let_go(void) {
    if (atomic_fetch_sub(&n_holding, 1) == 1) unmap(atomic_exchange(&spare_arena, NULL));
}

static uint8_t *arena_of(size_t n_bytes) {
    spare *found = atomic_exchange(&spare_arena, NULL);
    if (found && found->n_bytes == n_bytes) return (uint8_t *)found;
    unmap(found);
    return tc_map_bytes(n_bytes);
}

static __thread char this_thread; /* Its address identifies the thread. */

void tc_pool_init(tc_pool *pool, size_t n_streams, size_t n_ahead, size_t slot_bytes, const tc_lent_memory *lent) {
    *pool = (tc_pool){.lent = *lent, .n_streams = n_streams, .n_ahead = n_ahead};
    if (lent->memory) {
        pool->arena = lent->memory;
        pool->arena_bytes = lent->n_bytes;
        pool->arena_slot_bytes = slot_bytes;
        return;
    }
    if (slot_bytes == 0) return;
    /* Room for the batches ahead and for the one at the consumer. */
    pool->arena_slot_bytes = (slot_bytes + 1 + LINE - 1) & ~(size_t)(LINE - 1);
    pool->arena_bytes = tc_page_rounded(pool->arena_slot_bytes * (n_ahead + 2));
    pool->arena = arena_of(pool->arena_bytes);
    if (pool->arena) tc_arena_keep();
}

void tc_pool_free(tc_pool *pool) {
    for (tc_slot *slot = pool->free; slot;) {
        tc_slot *next = slot->next;
        tc_slot_free(slot);
        slot = next;
    }
    if (pool->lent.memory) {
        pool->lent.drop(pool->lent.owner);
        return;
    }
    if (pool->arena == NULL) return;
    spare *arena = (spare *)pool->arena;
    arena->n_bytes = pool->arena_bytes;
    unmap(arena->n_bytes <= MAX_SPARE_BYTES ? atomic_exchange(&spare_arena, arena) : arena);
    tc_arena_let_go();
}

static int has_room(const tc_pool *pool) { return pool->arena && pool->arena_used + pool->arena_slot_bytes <= pool->arena_bytes; }

/* A slot in the arena while there is room, then a slot with a mapping of its own. */
static tc_slot *make(tc_pool *pool) {
    int room = has_room(pool);
    uint8_t *memory = room ? pool->arena + pool->arena_used : NULL;
    tc_slot *slot = tc_slot_new(pool->n_streams, memory, room ? pool->arena_slot_bytes : 0);
    if (slot && room) pool->arena_used += pool->arena_slot_bytes;
    if (slot && pool->lent.memory) slot->lent = memory;
    return slot;
}

static tc_slot *unlink_after(tc_pool *pool, tc_slot *before) {
    tc_slot **at = before ? &before->next : &pool->free, *slot = *at;
    *at = slot->next;
    if (pool->last == slot) pool->last = before;
    pool->n_free--;
    pool->idle_bytes -= slot->capacity;
    return slot;
}

/* The slot that a consumer filled last and has read since is mostly in the consumer's own cache, so it is the best one
 * for the consumer to fill again. */
static tc_slot *take_last_filled(tc_pool *pool) {
    tc_slot *before = NULL, *found = NULL;
    for (tc_slot *slot = pool->free, *prior = NULL; slot; prior = slot, slot = slot->next)
        if (slot->filler == &this_thread) found = slot, before = prior;
    return found ? unlink_after(pool, before) : NULL;
}

/* A worker's batch was read by the consumer and is in the consumer's cache. Writing to this memory took three times as
 * long as writing to memory that is in no other core's cache. Slots therefore stay unused for a while, and new slots of
 * the arena are used until enough are unused: IDLE_BYTES, or, for small slots, the number of batches ahead. */
static tc_slot *take_idle(tc_pool *pool) {
    int enough = pool->n_free >= pool->n_ahead || pool->idle_bytes >= IDLE_BYTES;
    return pool->n_free && (enough || !has_room(pool)) ? unlink_after(pool, NULL) : NULL;
}

tc_slot *tc_pool_take(tc_pool *pool, int is_consumer) {
    tc_slot *slot = is_consumer ? take_last_filled(pool) : NULL;
    if (slot == NULL) slot = take_idle(pool);
    if (slot == NULL) slot = make(pool);
    if (slot == NULL && pool->n_free) slot = unlink_after(pool, NULL); /* No memory for a new slot. */
    if (slot) slot->filler = &this_thread;
    return slot;
}

void tc_pool_return(tc_pool *pool, tc_slot *slot) {
    if (slot->own && (pool->lent.memory ? slot->lent == NULL : pool->n_free > pool->n_ahead)) {
        tc_slot_free(slot);
        return;
    }
    if (slot->own && slot->lent) { /* The next batch may fit into the caller's memory again. */
        munmap(slot->memory, slot->capacity);
        slot->memory = slot->lent;
        slot->capacity = pool->arena_slot_bytes;
        slot->own = 0;
    }
    slot->next = NULL;
    *(pool->last ? &pool->last->next : &pool->free) = slot;
    pool->last = slot;
    pool->n_free++;
    pool->idle_bytes += slot->capacity;
}
