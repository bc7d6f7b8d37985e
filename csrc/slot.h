#ifndef TC_SLOT_H
#define TC_SLOT_H
/* Slot: the memory of a batch, and how it is filled with rows of windows. There are no locks here: a slot has one owner
 * at a time (ring.h). */
#include <stdatomic.h>

#include "gather.h"
#include "permute.h"

#define TC_NOMEM (-12)

/* Rows of the windows that are served together, in output order. The caller owns the plan, which must live until its rows are retired
 * (tc_ring_wait_room) or the ring is closed. */
typedef struct {
    const tc_source *sources; /* [n_streams][n_blocks] */
    const tc_chunk *chunks;   /* Like sources, or NULL: nothing of this plan is to be checked. */
    size_t n_blocks;
    const uint32_t *block; /* [n_rows] Location of each row: block, and row in the block. */
    const uint32_t *row;
    const tc_row_finder *finder; /* If set, used instead of block and row: it locates the rows of each batch, from position `start`. */
    uint64_t start;
    size_t n_rows;
    const struct tc_output_layout *output_layouts; /* [n_streams] Output layouts (output_layout.h), or NULL: streams are served as gathered. */
} tc_plan;

/* The rows [first, first + n) of a plan, and their locations (tc_batch_find_rows). */
typedef struct tc_part {
    const tc_plan *plan;
    size_t first, n;
    const uint32_t *block, *row;
} tc_part;

/* The rows of a part, for one stream. */
tc_rows tc_rows_of(const tc_part *part, size_t stream);

/* A batch's memory. values_at[s], offsets_at[s]: Byte position of stream s in memory; n_elements[s]: Number of elements
 * of a TC_VAR or TC_PADDED stream. */
typedef struct tc_slot {
    struct tc_ring *ring;
    struct tc_slot *next;
    const void *filler; /* Used by the ring: the thread that filled the slot last. */
    uint8_t *lent; /* Used by the pool: the slot's part of the caller's memory, or NULL. */
    _Atomic size_t n_holders; /* Number of holders while the slot is taken. */
    uint8_t *memory;
    size_t capacity;
    int own; /* 1: the memory is a mapping of this slot, and not a part of the ring's arena. */
    size_t n_rows;
    size_t n_bytes; /* Size of the batch's values, including the bytes that references point to. */
    size_t end;     /* Used bytes of the memory. */
    size_t small_bytes; /* Size of the largest column that is copied when it is handed out. */
    size_t *values_at, *offsets_at, *n_elements;
} tc_slot;

/* Whether a column of n_bytes must be copied to memory of its own when it is handed out, so that a consumer that keeps it
 * does not keep the batch. Never for a slot in the caller's memory, from which one copy moves all columns. */
int tc_slot_is_small_column(const tc_slot *slot, size_t n_bytes);

/* Map n_bytes of private memory, a multiple of the page size. From 2 MiB, the memory is aligned to 2 MiB and advised to
 * use huge pages. NULL if no memory is left. */
uint8_t *tc_map_bytes(size_t n_bytes);

/* n_bytes rounded up to whole pages; from 2 MiB, to whole huge pages. */
size_t tc_page_rounded(size_t n_bytes);

/* A slot for n_streams streams in `memory` of `capacity` bytes. With NULL and 0, the slot maps its own memory when it
 * is filled. NULL if no memory is left. */
tc_slot *tc_slot_new(size_t n_streams, uint8_t *memory, size_t capacity);
void tc_slot_free(tc_slot *slot);

/* The content of a slot: the rows of the parts, in order. */
typedef struct {
    const tc_stream *streams;
    size_t n_streams;
    const tc_part *parts;
    size_t n_parts;
} tc_content;

/* Filling a slot has three steps. begin: check pages that are not checked yet, measure and lay out the streams; the
 * memory grows if needed. The streams that are served as tensors form one range, so that one copy moves them to a
 * device: [heads on the host][heads of tensors][values of tensors][values on the host], where TC_REF and on_host streams
 * stay on the host. Each stream begins at a multiple of 64 bytes. copy: copy each row of the batch once; threads may share
 * the rows. end: apply the output layouts. Each step returns 0, TC_EIO (a source could not be read), TC_CORRUPT, TC_MISFIT
 * or TC_TOO_LONG (gather.h), or TC_NOMEM. */
int tc_slot_begin(tc_slot *slot, const tc_content *content);
int tc_slot_copy(tc_slot *slot, const tc_content *content, size_t first, size_t stop);
int tc_slot_end(tc_slot *slot, const tc_content *content);


/* Pool: the unused slots of a ring, and the arena that the first slots are parts of. There are no locks here: the
 * ring's lock guards the pool. */

/* Memory of the caller for slots, e.g. pinned memory. drop(owner) is called once, when no slot can use the memory any
 * more, from the thread that frees the pool; that may be any thread. memory NULL: the pool maps its own arena. */
typedef struct {
    uint8_t *memory;
    size_t n_bytes;
    void (*drop)(void *owner);
    void *owner;
} tc_lent_memory;

typedef struct {
    tc_lent_memory lent;
    size_t n_streams, n_ahead; /* Number of batches prepared ahead; about as many unused slots are kept. */
    tc_slot *free, *last; /* The unused slots, in the order in which they were returned. */
    size_t n_free, idle_bytes;
    uint8_t *arena;
    size_t arena_bytes, arena_slot_bytes, arena_used;
} tc_pool;

/* slot_bytes: Expected size of a batch, or 0 if unknown. If there is no memory for an arena, each slot maps its own
 * memory. With lent memory, slot_bytes is the exact size of its slots, a multiple of 64; a batch that is larger lies in
 * a mapping of its own, and the slot's part is used again afterwards. */
void tc_pool_init(tc_pool *pool, size_t n_streams, size_t n_ahead, size_t slot_bytes, const tc_lent_memory *lent);
void tc_pool_free(tc_pool *pool);

/* Between a call of tc_arena_keep and the matching tc_arena_let_go, the arena of a freed pool, up to 64 MiB, is kept for
 * the next pool of the same size. Callers are those that run several rings one after the other. */
void tc_arena_keep(void);
void tc_arena_let_go(void);

/* A slot for the calling thread to fill. is_consumer: the same thread will also read it. NULL if no memory is left. */
tc_slot *tc_pool_take(tc_pool *pool, int is_consumer);

/* Return a slot to the pool. Excess slots are freed, so that the memory of list(loader) is given back. */
void tc_pool_return(tc_pool *pool, tc_slot *slot);


#endif
