#include "output_layout.h"

#include <string.h>

#include "cast.h"
#include "gather_rows.h"
#include "slot.h"

enum { AHEAD = 6 }; /* Rows: they may be short. */

tc_stream tc_stored_as(const tc_stream *stream) {
    return (tc_stream){.kind = stream->kind == TC_PADDED ? TC_VAR : stream->kind, .width = stream->width};
}

static size_t n_varying(const tc_output_layout *output_layout) {
    size_t n = 0;
    for (size_t d = 0; d < output_layout->n_dims; d++) n += output_layout->dims[d] < 0;
    return n;
}

/* Number of the first length in the head: at a multiple of 64 bytes, because lengths are served as a tensor. */
static size_t lengths_at(size_t n) { return (n + 1 + 7) / 8 * 8; }

size_t tc_layout_head_bytes(const tc_output_layout *output_layout, size_t n) {
    return (lengths_at(n) + (n + 1) * n_varying(output_layout)) * sizeof(int64_t);
}

static int64_t *offsets_of(tc_slot *slot, size_t s) { return (int64_t *)(slot->memory + slot->offsets_at[s]); }

/* One byte per row, 0: a null that gets the fill. NULL: no row gets it. */
static const uint8_t *mask_of(const tc_slot *slot, const tc_output_layout *output_layout) {
    if (output_layout->valid == TC_NO_STREAM) return NULL;
    const uint8_t *valid = slot->memory + slot->values_at[output_layout->valid];
    return memchr(valid, 0, slot->n_rows) == NULL ? NULL : valid;
}

static size_t row_bytes(const tc_stream *stream) {
    if (stream->kind == TC_BITS) return stream->to == TC_AS_IS ? 1 : tc_dtype_bytes(stream->to);
    return stream->kind == TC_REF ? sizeof(tc_ref) : tc_cast_bytes(stream, stream->width);
}

/* Rows of fixed size: the rows of nulls become the fill, or point to it. */
static void fill_rows(tc_slot *slot, const tc_stream *stream, size_t s, const tc_output_layout *output_layout) {
    const uint8_t *valid = mask_of(slot, output_layout);
    if (valid == NULL) return;
    tc_ref ref = {(uint64_t)(uintptr_t)output_layout->fill, output_layout->fill_bytes};
    const void *fill = stream->kind == TC_REF ? (const void *)&ref : output_layout->fill;
    size_t n_bytes = row_bytes(stream);
    uint8_t *values = slot->memory + slot->values_at[s];
    for (size_t i = 0; i < slot->n_rows; i++)
        if (!valid[i]) memcpy(values + i * n_bytes, fill, n_bytes);
}

static int gather_stream(tc_slot *slot, const tc_stream *stream, size_t s, const tc_part *parts, size_t n_parts) {
    size_t done = 0;
    for (size_t p = 0; p < n_parts; p++) {
        tc_rows rows = tc_rows_of(&parts[p], s);
        tc_sink sink = {slot->memory + slot->values_at[s] + done * row_bytes(stream), NULL};
        int status = tc_gather(stream, &rows, &sink);
        if (status) return status;
        done += rows.n;
    }
    return 0;
}

static int gather_first_streams(tc_slot *slot, const tc_stream *streams, size_t n_streams, const tc_part *parts, size_t n_parts) {
    const tc_output_layout *output_layouts = parts[0].plan->output_layouts;
    for (size_t pass = 0; pass < 2; pass++) /* First the masks, then the shapes, whose fills depend on masks. */
        for (size_t s = 0; s < n_streams; s++) {
            if (!output_layouts[s].gathered_first || (streams[s].kind == TC_BITS) != (pass == 0)) continue;
            int status = gather_stream(slot, &streams[s], s, parts, n_parts);
            if (status) return status;
            fill_rows(slot, &streams[s], s, &output_layouts[s]);
        }
    return 0;
}

static void add_fill_lengths(int64_t *offsets, size_t n, const uint8_t *valid, int64_t n_fill) {
    int64_t before = offsets[0], total = offsets[0];
    for (size_t i = 0; i < n; i++) {
        int64_t here = offsets[i + 1];
        total += valid[i] ? here - before : n_fill;
        before = here;
        offsets[i + 1] = total;
    }
}

/* Whether the shape of a record with n elements fits its column. The product cannot overflow unnoticed. */
static int shape_fits(const int32_t *shape, const tc_output_layout *output_layout, int64_t n) {
    int64_t product = 1;
    int has_none = 0;
    for (size_t d = 0; d < output_layout->n_dims; d++) {
        if (shape[d] < 0 || (output_layout->dims[d] >= 0 && shape[d] != output_layout->dims[d])) return 0;
        has_none |= shape[d] == 0;
    }
    if (has_none) return n == 0;
    for (size_t d = 0; d < output_layout->n_dims; d++)
        if (__builtin_mul_overflow(product, shape[d], &product)) return 0;
    return product == n;
}

static int check_shapes(const int32_t *shapes, const tc_output_layout *output_layout, const int64_t *offsets, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!shape_fits(shapes + i * output_layout->n_dims, output_layout, offsets[i + 1] - offsets[i])) return TC_CORRUPT;
    return 0;
}

/* Addresses of the parts of a TC_PADDED stream's head. */
typedef struct {
    int64_t *offsets, *lengths, *box;
    size_t n_varying;
    const int32_t *shapes; /* NULL: one dimension, whose lengths follow from the offsets. */
} padded_head;

static padded_head head_of(tc_slot *slot, size_t s, const tc_output_layout *output_layout) {
    padded_head h = {offsets_of(slot, s), NULL, NULL, n_varying(output_layout), NULL};
    h.lengths = h.offsets + lengths_at(slot->n_rows);
    h.box = h.lengths + slot->n_rows * h.n_varying;
    if (output_layout->shape != TC_NO_STREAM) h.shapes = (const int32_t *)(slot->memory + slot->values_at[output_layout->shape]);
    return h;
}

/* Set the lengths in the boxes, and the varying dimensions of a box: those of the longest record. */
static int find_longest(const padded_head *h, const tc_output_layout *output_layout, size_t n) {
    for (size_t v = 0; v < h->n_varying; v++) h->box[v] = 0;
    for (size_t i = 0; i < n; i++)
        for (size_t d = 0, v = 0; d < output_layout->n_dims; d++) {
            if (output_layout->dims[d] >= 0) continue;
            int64_t length = h->shapes ? h->shapes[i * output_layout->n_dims + d] : h->offsets[i + 1] - h->offsets[i];
            if (length > output_layout->max_length) {
                if (!output_layout->truncates) return TC_TOO_LONG;
                length = output_layout->max_length;
            }
            h->lengths[i * h->n_varying + v] = length;
            if (length > h->box[v]) h->box[v] = length;
            v++;
        }
    return 0;
}

/* Round the varying dimensions of a box up to the multiple, of which a box has one or more. */
static int round_up(const padded_head *h, int64_t multiple_of) {
    if (multiple_of == 1) return 0;
    for (size_t v = 0; v < h->n_varying; v++) {
        int64_t n_multiples = h->box[v] == 0 ? 1 : (h->box[v] - 1) / multiple_of + 1;
        if (__builtin_mul_overflow(n_multiples, multiple_of, &h->box[v])) return TC_NOMEM;
    }
    return 0;
}

static void box_of(const padded_head *h, const tc_output_layout *output_layout, int64_t *box) {
    for (size_t d = 0, v = 0; d < output_layout->n_dims; d++) box[d] = output_layout->dims[d] >= 0 ? output_layout->dims[d] : h->box[v++];
}

static int measure_padded(tc_slot *slot, const tc_stream *stream, size_t s, const tc_output_layout *output_layout) {
    padded_head h = head_of(slot, s, output_layout);
    int status = find_longest(&h, output_layout, slot->n_rows);
    if (status == 0) status = round_up(&h, output_layout->multiple_of);
    if (status) return status;
    int64_t box[TC_MAX_DIMS];
    box_of(&h, output_layout, box);
    size_t n = slot->n_rows, n_bytes;
    for (size_t d = 0; d < output_layout->n_dims; d++)
        if (__builtin_mul_overflow(n, (size_t)box[d], &n)) return TC_NOMEM;
    if (__builtin_mul_overflow(n, row_bytes(stream), &n_bytes) || n_bytes > PTRDIFF_MAX) return TC_NOMEM;
    slot->n_elements[s] = n;
    return 0;
}

static int measure_stream(tc_slot *slot, const tc_stream *stream, size_t s, const tc_output_layout *output_layout) {
    int64_t *offsets = offsets_of(slot, s);
    const uint8_t *valid = mask_of(slot, output_layout);
    if (valid) add_fill_lengths(offsets, slot->n_rows, valid, (int64_t)(output_layout->fill_bytes / row_bytes(stream)));
    slot->n_elements[s] = (size_t)offsets[slot->n_rows];
    if (output_layout->shape != TC_NO_STREAM) {
        const int32_t *shapes = (const int32_t *)(slot->memory + slot->values_at[output_layout->shape]);
        if (check_shapes(shapes, output_layout, offsets, slot->n_rows)) return TC_CORRUPT;
    }
    return stream->kind == TC_PADDED ? measure_padded(slot, stream, s, output_layout) : 0;
}

int tc_layouts_begin(tc_slot *slot, const tc_stream *streams, size_t n_streams, const tc_part *parts, size_t n_parts) {
    int status = gather_first_streams(slot, streams, n_streams, parts, n_parts);
    for (size_t s = 0; status == 0 && s < n_streams; s++)
        if (streams[s].kind == TC_VAR || streams[s].kind == TC_PADDED) status = measure_stream(slot, &streams[s], s, &parts[0].plan->output_layouts[s]);
    return status;
}

/* Destination of records: boxes of one size, or one record after the other (n_dims 0). */
typedef struct {
    uint8_t *values;
    size_t width, n_dims; /* Bytes of an output element. */
    const int32_t *shapes; /* NULL: one dimension. */
    int64_t box[TC_MAX_DIMS];
    int64_t kept[TC_MAX_DIMS]; /* Maximum of each dimension of a record in its box; at most the box's. */
    size_t strides[TC_MAX_DIMS]; /* Bytes from one element to the next, for each dimension of a box. */
    size_t box_bytes;
    uint64_t padding;
} record_target;

/* Origin of elements: a source, or a fill, which has the output dtype already (cast NULL). wrong: Nonzero if a value
 * did not fit. */
typedef struct {
    const uint8_t *at;
    size_t width;
    tc_caster cast;
    uint64_t wrong;
} element_source;

static void read_elements(element_source *from, uint8_t *to, size_t n) {
    if (n == 0) return;
    if (from->cast == NULL) memcpy(to, from->at, n * from->width);
    else from->wrong |= from->cast(from->at, to, n);
    from->at += n * from->width;
}

/* Fill the bytes from `at` on, which is an element's place, with padding elements. */
static void write_padding(const record_target *to, uint8_t *at, size_t n_bytes) {
    uint64_t bits = to->padding;
    uint32_t bits_32 = (uint32_t)bits;
    uint16_t bits_16 = (uint16_t)bits;
    if (bits == 0 || to->width == 1) memset(at, (int)bits, n_bytes);
    else if (to->width == 2)
        for (size_t i = 0; i < n_bytes; i += 2) memcpy(at + i, &bits_16, 2);
    else if (to->width == 4)
        for (size_t i = 0; i < n_bytes; i += 4) memcpy(at + i, &bits_32, 4);
    else
        for (size_t i = 0; i < n_bytes; i += 8) memcpy(at + i, &bits, 8);
}

static size_t least(size_t a, int64_t b) { return a < (size_t)b ? a : (size_t)b; }

/* Copy a record of several dimensions into its box, which is already filled with padding. From dimension `inner` on, the
 * record is as wide as the box, except that it may be cut in `inner`. */
static void write_into_box(const record_target *to, const int32_t *shape, size_t d, size_t inner, uint8_t *box, element_source *from) {
    size_t n = (size_t)shape[d], n_kept = least(n, to->kept[d]);
    if (d == inner) {
        read_elements(from, box, n_kept * (to->strides[d] / to->width));
    } else {
        for (size_t i = 0; i < n_kept; i++) write_into_box(to, shape, d + 1, inner, box + i * to->strides[d], from);
    }
    size_t n_cut = n - n_kept;
    for (size_t later = d + 1; later < to->n_dims; later++) n_cut *= (size_t)shape[later];
    from->at += n_cut * from->width;
}

/* Write record i with n elements; without boxes, it starts at element `start`. */
static void write_record(const record_target *to, size_t i, size_t start, element_source *from, size_t n) {
    if (to->n_dims == 0) {
        read_elements(from, to->values + start * to->width, n);
        return;
    }
    uint8_t *box = to->values + i * to->box_bytes;
    const int32_t *shape = to->shapes ? to->shapes + i * to->n_dims : NULL;
    size_t inner = to->n_dims - 1;
    if (shape) while (inner > 0 && shape[inner] == to->box[inner] && shape[inner] <= to->kept[inner]) inner--;
    if (shape == NULL || inner == 0 || n == 0) {
        /* One run of elements: the record is as wide as the box in all dimensions but the first. */
        size_t n_kept = n == 0 ? 0 : least(n, to->kept[0] * (int64_t)(to->strides[0] / to->width));
        read_elements(from, box, n_kept);
        write_padding(to, box + n_kept * to->width, to->box_bytes - n_kept * to->width);
        return;
    }
    write_padding(to, box, to->box_bytes);
    write_into_box(to, shape, 0, inner, box, from);
}

static record_target record_target_of(tc_slot *slot, const tc_stream *stream, size_t s, const tc_output_layout *output_layout) {
    record_target to = {.values = slot->memory + slot->values_at[s], .width = row_bytes(stream)};
    if (stream->kind != TC_PADDED) return to;
    padded_head h = head_of(slot, s, output_layout);
    to.n_dims = output_layout->n_dims;
    to.shapes = h.shapes;
    box_of(&h, output_layout, to.box);
    to.box_bytes = to.width;
    to.padding = output_layout->padding;
    for (size_t d = output_layout->n_dims; d-- > 0;) {
        int is_limited = output_layout->dims[d] < 0 && output_layout->max_length < to.box[d];
        to.kept[d] = is_limited ? output_layout->max_length : to.box[d];
        to.strides[d] = to.box_bytes;
        to.box_bytes *= (size_t)to.box[d];
    }
    return to;
}

typedef struct {
    const tc_stream *stream;
    const tc_output_layout *output_layout;
    const uint8_t *valid; /* Result of mask_of, for the whole batch. */
} served_stream;

/* Write rows one by one, from their source or from the fill. offsets: Of these rows. first: Index of the first row in
 * the batch. */
static int write_rows(const record_target *to, const served_stream *stream, const tc_rows *rows, const int64_t *offsets, size_t first) {
    const size_t width = stream->stream->width;
    element_source from = {NULL, width, tc_caster_of(stream->stream->from, stream->stream->to), 0};
    for (size_t i = 0; i < rows->n; i++) {
        uint64_t n_elements = (uint64_t)(offsets[i + 1] - offsets[i]);
        if (i + AHEAD < rows->n) prefetch_elements(rows, i + AHEAD, width, offsets);
        if (stream->valid && !stream->valid[first + i]) {
            write_record(to, first + i, (size_t)offsets[i], &(element_source){stream->output_layout->fill, to->width, NULL, 0}, n_elements);
            continue;
        }
        const tc_source *source = &rows->sources[rows->block[i]];
        /* The offset is read again and therefore checked again: the file may change concurrently. */
        uint64_t start = (uint64_t)source->offsets[rows->row[i]];
        if (start > source->n_elements || n_elements > source->n_elements - start) return TC_CORRUPT;
        from.at = source->values + start * width;
        write_record(to, first + i, (size_t)offsets[i], &from, n_elements);
    }
    return from.wrong ? TC_MISFIT : 0;
}

int tc_layout_owns(const tc_slot *slot, const tc_stream *stream, const tc_output_layout *output_layout) {
    return output_layout->gathered_first || stream->kind == TC_PADDED || (stream->kind == TC_VAR && mask_of(slot, output_layout) != NULL);
}

static int copy_rows(tc_slot *slot, const tc_stream *stream, size_t s, const tc_part *parts, size_t n_parts) {
    const tc_output_layout *output_layout = &parts[0].plan->output_layouts[s];
    served_stream what = {stream, output_layout, mask_of(slot, output_layout)};
    const int64_t *offsets = offsets_of(slot, s);
    record_target to = record_target_of(slot, stream, s, output_layout);
    int status = 0;
    for (size_t p = 0, done = 0; status == 0 && p < n_parts; done += parts[p++].n) {
        tc_rows rows = tc_rows_of(&parts[p], s);
        status = write_rows(&to, &what, &rows, offsets + done, done);
    }
    return status;
}

static void count_in_rows(tc_slot *slot, size_t s, const tc_output_layout *output_layout) {
    int64_t *offsets = offsets_of(slot, s);
    const int32_t *shapes = (const int32_t *)(slot->memory + slot->values_at[output_layout->shape]);
    for (size_t i = 0; i < slot->n_rows; i++) offsets[i + 1] = offsets[i] + shapes[i * output_layout->n_dims];
}

int tc_layouts_end(tc_slot *slot, const tc_stream *streams, size_t n_streams, const tc_part *parts, size_t n_parts) {
    int status = 0;
    for (size_t s = 0; status == 0 && s < n_streams; s++) {
        const tc_stream *stream = &streams[s];
        const tc_output_layout *output_layout = &parts[0].plan->output_layouts[s];
        if (output_layout->gathered_first) continue;
        if (stream->kind != TC_VAR && stream->kind != TC_PADDED) fill_rows(slot, stream, s, output_layout);
        else if (tc_layout_owns(slot, stream, output_layout)) status = copy_rows(slot, stream, s, parts, n_parts);
        if (output_layout->counts_rows && status == 0) count_in_rows(slot, s, output_layout);
    }
    return status;
}
