#include "slot.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "guard.h"

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
    madvise(memory + before, n_bytes, MADV_HUGEPAGE); /* a hint: kernels without it say EINVAL */
    return memory + before;
}

size_t tc_page_rounded(size_t n_bytes) {
    size_t unit = n_bytes < HUGE_BYTES ? 4096 : HUGE_BYTES;
    return (n_bytes + unit - 1) / unit * unit;
}

/* Make room for n_bytes, keeping the first keep_bytes. */
static int slot_grow(tc_slot *slot, size_t n_bytes, size_t keep_bytes) {
    if (n_bytes <= slot->capacity) return 0;
    size_t capacity = tc_page_rounded(n_bytes + n_bytes / 4); /* batches of varied length: do not grow by a page each time */
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

static int measure(tc_slot *slot, const tc_stream *streams, size_t n_streams, const tc_part *parts, size_t n_parts) {
    if (tc_guard_enter()) return TC_EIO;
    for (size_t s = 0; s < n_streams; s++) {
        if (streams[s].kind != TC_VAR) continue;
        int64_t *offsets = (int64_t *)(slot->memory + slot->offsets_at[s]);
        offsets[0] = 0;
        for (size_t p = 0; p < n_parts; p++) {
            const tc_part *here = &parts[p];
            const tc_plan *plan = here->plan;
            tc_measure(plan->sources + s * plan->n_blocks, plan->block + here->first, plan->row + here->first, here->n, offsets);
            offsets += here->n;
        }
        slot->n_elements[s] = (size_t)*offsets;
    }
    tc_guard_leave();
    return 0;
}

static size_t out_width(const tc_stream *stream) {
    switch (stream->kind) {
        case TC_FIXED: return stream->width;
        case TC_BITS: return 1;
        case TC_REF: return sizeof(tc_ref);
        default: return 0;
    }
}

static int copy(tc_slot *slot, const tc_stream *streams, size_t n_streams, const tc_part *parts, size_t n_parts) {
    if (tc_guard_enter()) return TC_EIO;
    for (size_t s = 0; s < n_streams; s++) {
        const tc_stream *stream = &streams[s];
        size_t width = out_width(stream), done = 0;
        for (size_t p = 0; p < n_parts; p++) {
            const tc_part *here = &parts[p];
            const tc_plan *plan = here->plan;
            tc_sink sink = {slot->memory + slot->values_at[s] + done * width, NULL};
            if (stream->kind == TC_VAR) sink.offsets = (int64_t *)(slot->memory + slot->offsets_at[s]) + done;
            tc_gather(stream, plan->sources + s * plan->n_blocks, plan->block + here->first, plan->row + here->first, here->n, &sink);
            done += here->n;
        }
    }
    tc_guard_leave();
    return 0;
}

static size_t batch_bytes(const tc_slot *slot, const tc_stream *streams, size_t n_streams) {
    size_t n_bytes = 0;
    for (size_t s = 0; s < n_streams; s++) {
        const tc_stream *stream = &streams[s];
        if (stream->kind == TC_VAR) {
            n_bytes += slot->n_elements[s] * stream->width;
        } else if (stream->kind == TC_REF) {
            const tc_ref *refs = (const tc_ref *)(slot->memory + slot->values_at[s]);
            for (size_t i = 0; i < slot->n_rows; i++) n_bytes += refs[i].n_bytes;
        } else {
            n_bytes += slot->n_rows * out_width(stream);
        }
    }
    return n_bytes;
}

/* Lay the streams out in the slot (sizes known first, TC_VAR values after), then copy. */
int tc_slot_fill(tc_slot *slot, const tc_stream *streams, size_t n_streams, const tc_part *parts, size_t n_parts) {
    size_t end = 0;
    int has_var = 0;
    slot->n_rows = 0;
    for (size_t p = 0; p < n_parts; p++) slot->n_rows += parts[p].n;
    for (size_t s = 0; s < n_streams; s++) {
        if (streams[s].kind == TC_VAR) {
            slot->offsets_at[s] = end;
            end += aligned((slot->n_rows + 1) * sizeof(int64_t));
            has_var = 1;
        } else {
            slot->values_at[s] = end;
            end += aligned(slot->n_rows * out_width(&streams[s]));
        }
    }
    int status = slot_grow(slot, end + 1, 0);
    if (status == 0 && has_var) {
        size_t head = end;
        status = measure(slot, streams, n_streams, parts, n_parts);
        for (size_t s = 0; status == 0 && s < n_streams; s++) {
            if (streams[s].kind != TC_VAR) continue;
            slot->values_at[s] = end;
            end += aligned(slot->n_elements[s] * streams[s].width);
        }
        if (status == 0) status = slot_grow(slot, end + 1, head);
    }
    if (status == 0) status = copy(slot, streams, n_streams, parts, n_parts);
    slot->n_bytes = status == 0 ? batch_bytes(slot, streams, n_streams) : 0;
    return status;
}
