#include "slot.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "cast.h"
#include "forms.h"
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
    tc_fault fault;
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
    if (status == 0 && parts[0].plan->forms != NULL) status = tc_forms_begin(slot, streams, n_streams, parts, n_parts);
    tc_guard_leave();
    return status;
}

static size_t out_width(const tc_stream *stream) {
    switch (stream->kind) {
        case TC_FIXED: return tc_cast_bytes(stream, stream->width);
        case TC_BITS: return stream->to == TC_AS_IS ? 1 : tc_dtype_bytes(stream->to);
        case TC_REF: return sizeof(tc_ref);
        default: return 0;
    }
}

/* Copy all rows of a part to the rows of the batch from `done` on. The streams that output layouts own are copied in
 * the last step. */
static int copy_part(tc_slot *slot, const tc_stream *streams, size_t n_streams, const tc_part *part, size_t done) {
    const tc_form *forms = part->plan->forms;
    tc_rows rows = rows_of(part);
    int status = 0;
    for (size_t s = 0; status == 0 && s < n_streams; s++) {
        if (forms != NULL && tc_form_owns(slot, &streams[s], &forms[s])) continue;
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

/* Lay out the streams in the slot: first those of known size, then the values of varying length. */
int tc_slot_begin(tc_slot *slot, const tc_content *content) {
    const tc_stream *streams = content->streams;
    const tc_part *parts = content->parts;
    size_t n_streams = content->n_streams, n_parts = content->n_parts;
    const tc_form *forms = parts[0].plan->forms;
    size_t end = 0;
    int is_measured = 0; /* 1: measure() must run, because there are sizes to find or pages to check. */
    slot->n_rows = 0;
    for (size_t p = 0; p < n_parts; p++) {
        slot->n_rows += parts[p].n;
        is_measured |= parts[p].plan->chunks != NULL || parts[p].plan->forms != NULL;
    }
    for (size_t s = 0; s < n_streams; s++) {
        if (is_var(&streams[s])) {
            slot->offsets_at[s] = end;
            end += aligned(streams[s].kind == TC_VAR ? (slot->n_rows + 1) * sizeof(int64_t) : tc_form_head_bytes(&forms[s], slot->n_rows));
            slot->n_elements[s] = 0;
            is_measured = 1;
        } else {
            slot->values_at[s] = end;
            end += aligned(slot->n_rows * out_width(&streams[s]));
        }
    }
    int status = slot_grow(slot, end + 1, 0);
    if (status == 0 && is_measured) {
        size_t head = end;
        status = measure(slot, streams, n_streams, parts, n_parts);
        for (size_t s = 0; status == 0 && s < n_streams; s++) {
            if (!is_var(&streams[s])) continue;
            slot->values_at[s] = end;
            end += aligned(slot->n_elements[s] * tc_cast_bytes(&streams[s], streams[s].width));
        }
        if (status == 0) status = slot_grow(slot, end + 1, head);
    }
    slot->end = end;
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
        tc_part share = {part->plan, part->first + from, to - from, part->block + from, part->row + from};
        status = copy_part(slot, content->streams, content->n_streams, &share, done + from);
    }
    tc_guard_leave();
    return status;
}

int tc_slot_end(tc_slot *slot, const tc_content *content) {
    int status = 0;
    if (content->parts[0].plan->forms != NULL) {
        if (tc_guard_enter()) return TC_EIO;
        status = tc_forms_end(slot, content->streams, content->n_streams, content->parts, content->n_parts);
        tc_guard_leave();
    }
    slot->n_bytes = status == 0 ? batch_bytes(slot, content->streams, content->n_streams) : 0;
    return status;
}
