#include "packing.h"

#include <string.h>

#include "cast.h"
#include "prefetch.h"

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* What is left of a document. */
typedef struct {
    size_t tokens;
    int ends; /* The end token is left. */
} rest;

static rest rest_of(const tc_packing *packing, const tc_documents *documents, size_t d) {
    return (rest){(size_t)documents->lengths[d], (int)packing->has_end};
}

/* Number of positions that all that is left takes. */
static size_t size_of(const rest *left) { return left->tokens + (size_t)left->ends; }

/* Take the next piece of a document into at most `room` > 0 positions. Returns the number of positions it takes: all of
 * the room, or all that is left. */
static size_t take_piece(rest *left, size_t room, tc_packed_piece *piece) {
    size_t n = least(left->tokens, room);
    int ends = left->ends && n == left->tokens && n < room;
    piece->n = (uint32_t)n;
    left->tokens -= n;
    if (ends) left->ends = 0;
    piece->flags = (ends ? TC_ENDS : 0) | (left->tokens ? TC_GOES_ON : left->ends ? TC_END_LATER : 0);
    return n + (size_t)ends;
}

typedef struct {
    const tc_documents *documents;
    size_t width, mask_width; /* Bytes of a stored token, and of its mask. */
    tc_packed_piece *pieces;  /* NULL: pieces are only counted. */
} writer;

static writer writer_of(const tc_packing *packing, const tc_documents *documents, tc_packed_piece *pieces) {
    return (writer){documents, tc_dtype_bytes(packing->dtype), tc_dtype_bytes(packing->mask_dtype), pieces};
}

static void write_piece(const writer *to, size_t at, tc_packed_piece piece, size_t d, size_t offset, size_t start) {
    if (to->pieces == NULL) return;
    piece.from = (const uint8_t *)(uintptr_t)to->documents->addresses[d] + offset * to->width;
    piece.mask = to->mask_width ? (const uint8_t *)(uintptr_t)to->documents->masks[d] + offset * to->mask_width : NULL;
    piece.document = (uint32_t)d;
    piece.start = (uint32_t)start;
    to->pieces[at] = piece;
}

static int64_t pack_in_turn(const tc_packing *packing, const tc_documents *documents, tc_packed_piece *pieces, uint32_t *first_piece) {
    writer to = writer_of(packing, documents, pieces);
    size_t n_rows = 0, n_pieces = 0, used = packing->length; /* used: Positions of the current row, full before the first row. */
    for (size_t d = 0; d < documents->n; d++) {
        rest left = rest_of(packing, documents, d);
        size_t n = left.tokens;
        if (packing->mode == TC_SEPARATE) {
            if (!packing->cuts_long && size_of(&left) > packing->length) return -1 - (int64_t)d;
            used = packing->length;
        }
        while (size_of(&left)) {
            if (used == packing->length) {
                if (pieces) first_piece[n_rows] = (uint32_t)n_pieces;
                n_rows++;
                used = 0;
            }
            tc_packed_piece piece;
            size_t offset = n - left.tokens, taken = take_piece(&left, packing->length - used, &piece);
            write_piece(&to, n_pieces++, piece, d, offset, used);
            used += taken;
        }
    }
    if (pieces) first_piece[n_rows] = (uint32_t)n_pieces;
    return (int64_t)n_rows;
}

/* Scratch memory of best fit. Rows are kept in lists by the room that is left in them; `filled` has a bit for each room
 * that some row has, and `any` a bit for each word of `filled`. */
typedef struct {
    uint32_t *size, *order, *row; /* [n] Size of what is left of each document for the shared rows (0: nothing); documents by size; row of each. */
    uint32_t *counts;             /* [length + 2] */
    uint32_t *head, *next;        /* [length + 1], [n] Lists of shared rows, numbered from 0; NOWHERE ends a list. */
    uint32_t *filled, *any;
} best_fit;

enum { WORD_BITS = 32 };
static const uint32_t NOWHERE = UINT32_MAX;

static size_t words_of(size_t n_bits) { return (n_bits + WORD_BITS - 1) / WORD_BITS; }

size_t tc_pack_scratch_words(const tc_packing *packing, size_t n) {
    if (packing->mode != TC_BEST_FIT) return 0;
    size_t n_rooms = (size_t)packing->length + 1, n_words = words_of(n_rooms);
    return 4 * n + (n_rooms + 1) + n_rooms + n_words + words_of(n_words);
}

static best_fit best_fit_of(const tc_packing *packing, size_t n, uint32_t *scratch) {
    size_t n_rooms = (size_t)packing->length + 1, n_words = words_of(n_rooms);
    best_fit b;
    b.size = scratch;
    b.order = b.size + n;
    b.row = b.order + n;
    b.next = b.row + n;
    b.counts = b.next + n;
    b.head = b.counts + n_rooms + 1;
    b.filled = b.head + n_rooms;
    b.any = b.filled + n_words;
    memset(b.counts, 0, (n_rooms + 1) * sizeof *b.counts);
    memset(b.head, 0xff, n_rooms * sizeof *b.head);
    memset(b.filled, 0, n_words * sizeof *b.filled);
    memset(b.any, 0, words_of(n_words) * sizeof *b.any);
    return b;
}

static void add_row(best_fit *b, uint32_t room, uint32_t row) {
    b->next[row] = b->head[room];
    b->head[room] = row;
    b->filled[room / WORD_BITS] |= UINT32_C(1) << room % WORD_BITS;
    b->any[room / WORD_BITS / WORD_BITS] |= UINT32_C(1) << room / WORD_BITS % WORD_BITS;
}

static uint32_t remove_row(best_fit *b, uint32_t room) {
    uint32_t row = b->head[room], word = room / WORD_BITS;
    b->head[room] = b->next[row];
    if (b->head[room] != NOWHERE) return row;
    b->filled[word] &= ~(UINT32_C(1) << room % WORD_BITS);
    if (b->filled[word] == 0) b->any[word / WORD_BITS] &= ~(UINT32_C(1) << word % WORD_BITS);
    return row;
}

/* The index of the first bit from `from` on that is set in the bits of one word, or WORD_BITS. */
static uint32_t bit_from(uint32_t word, uint32_t from) {
    uint32_t kept = from < WORD_BITS ? word & (UINT32_MAX << from) : 0;
    return kept ? (uint32_t)__builtin_ctz(kept) : WORD_BITS;
}

/* The smallest room from `size` to `length` that a row has, or NOWHERE. */
static uint32_t room_from(const best_fit *b, uint32_t size, uint32_t length) {
    uint32_t word = size / WORD_BITS, bit = bit_from(b->filled[word], size % WORD_BITS);
    if (bit < WORD_BITS) return word * WORD_BITS + bit;
    uint32_t n_words = (uint32_t)words_of((size_t)length + 1), n_any = (uint32_t)words_of(n_words);
    uint32_t group = (word + 1) / WORD_BITS, from = (word + 1) % WORD_BITS;
    for (; group < n_any; group++, from = 0) {
        uint32_t found = bit_from(b->any[group], from);
        if (found == WORD_BITS) continue;
        word = group * WORD_BITS + found;
        return word * WORD_BITS + bit_from(b->filled[word], 0);
    }
    return NOWHERE;
}

/* Sort the documents that share rows by size, the largest first, and equal ones by number. Returns how many there are. */
static size_t sort_by_size(best_fit *b, size_t n, uint32_t length) {
    size_t total = 0;
    for (size_t d = 0; d < n; d++) b->counts[b->size[d]]++;
    for (uint32_t size = length; size > 0; size--) {
        uint32_t count = b->counts[size];
        b->counts[size] = (uint32_t)total;
        total += count;
    }
    for (size_t d = 0; d < n; d++)
        if (b->size[d]) b->order[b->counts[b->size[d]]++] = (uint32_t)d;
    return total;
}

/* Give each document a shared row. Returns the number of shared rows. */
static uint32_t share_rows(best_fit *b, size_t n_sharing, uint32_t length) {
    uint32_t n_rows = 0;
    for (size_t i = 0; i < n_sharing; i++) {
        uint32_t d = b->order[i], room = room_from(b, b->size[d], length);
        uint32_t row = room == NOWHERE ? n_rows++ : remove_row(b, room);
        uint32_t left = (room == NOWHERE ? length : room) - b->size[d];
        b->row[d] = row;
        if (left) add_row(b, left, row);
    }
    return n_rows;
}

/* Rows that a long document fills by itself come first; the shared rows follow. */
static int64_t pack_best(const tc_packing *packing, const tc_documents *documents, uint32_t *scratch, tc_packed_piece *pieces, uint32_t *first_piece) {
    const uint32_t length = packing->length;
    const size_t n = documents->n;
    writer to = writer_of(packing, documents, pieces);
    best_fit b = best_fit_of(packing, n, scratch);
    size_t n_full = 0;
    tc_packed_piece piece;
    for (size_t d = 0; d < n; d++) {
        rest left = rest_of(packing, documents, d);
        if (!packing->cuts_long && size_of(&left) > length) return -1 - (int64_t)d;
        for (; size_of(&left) > length; n_full++) {
            size_t offset = (size_t)documents->lengths[d] - left.tokens;
            take_piece(&left, length, &piece);
            if (pieces) first_piece[n_full] = (uint32_t)n_full;
            write_piece(&to, n_full, piece, d, offset, 0);
        }
        b.size[d] = (uint32_t)size_of(&left);
    }
    size_t n_sharing = sort_by_size(&b, n, length);
    uint32_t n_shared = share_rows(&b, n_sharing, length);
    if (pieces == NULL) return (int64_t)(n_full + n_shared);
    /* Lay out the pieces by row: count them, then place them in order of documents. */
    uint32_t *first = first_piece + n_full, *used = b.next; /* The lists are no longer needed. */
    memset(first, 0, (n_shared + 1) * sizeof *first);
    memset(used, 0, n_shared * sizeof *used);
    for (size_t i = 0; i < n_sharing; i++) first[b.row[b.order[i]] + 1]++;
    first[0] = (uint32_t)n_full;
    for (uint32_t row = 0; row < n_shared; row++) first[row + 1] += first[row];
    uint32_t *placed = b.order; /* Pieces of each row that are placed. There are at least as many documents as shared rows. */
    memset(placed, 0, n_shared * sizeof *placed);
    for (size_t d = 0; d < n; d++) {
        if (b.size[d] == 0) continue;
        rest left = rest_of(packing, documents, d);
        while (size_of(&left) > length) take_piece(&left, length, &piece);
        size_t offset = (size_t)documents->lengths[d] - left.tokens;
        uint32_t row = b.row[d];
        /* The piece takes its size whatever room the row has left, because the row was chosen for this size. */
        piece.n = (uint32_t)left.tokens;
        piece.flags = left.ends ? TC_ENDS : 0;
        write_piece(&to, first[row] + placed[row]++, piece, d, offset, used[row]);
        used[row] += b.size[d];
    }
    return (int64_t)(n_full + n_shared);
}

int64_t tc_pack(const tc_packing *packing, const tc_documents *documents, uint32_t *scratch, tc_packed_piece *pieces, uint32_t *first_piece) {
    return packing->mode == TC_BEST_FIT ? pack_best(packing, documents, scratch, pieces, first_piece) : pack_in_turn(packing, documents, pieces, first_piece);
}

static size_t positions_of(const tc_packed_piece *piece) {
    return (size_t)piece->n + (piece->flags & TC_ENDS ? 1 : 0);
}

size_t tc_boundaries(const tc_packed_unit *unit, size_t n_rows, int32_t *boundaries, int64_t *offsets, int32_t *counts) {
    size_t n = 0;
    for (size_t row = 0; row < n_rows; row++) {
        offsets[row] = (int64_t)n;
        const tc_packed_piece *piece = unit->pieces + unit->first_piece[row], *stop = unit->pieces + unit->first_piece[row + 1];
        size_t end = 0;
        for (; piece < stop; piece++) {
            boundaries[n++] = (int32_t)piece->start;
            end = piece->start + positions_of(piece);
        }
        if (end < unit->packing->length) boundaries[n++] = (int32_t)end;
        boundaries[n++] = (int32_t)unit->packing->length;
        counts[row] = (int32_t)(n - (size_t)offsets[row]);
    }
    offsets[n_rows] = (int64_t)n;
    return n;
}

/* Reads stored tokens as int64. All values fit, so the results of the casts are not used. */
typedef struct {
    tc_caster cast; /* NULL: they are stored as int64. */
    size_t width;
} reader;

enum { STEP_BYTES = 2048 };

/* The hardware prefetcher stops at the end of each page, so the next step is prefetched here. */
static void read_tokens(const reader *r, const uint8_t *from, int64_t *to, size_t n) {
    if (r->cast == NULL) {
        memcpy(to, from, n * sizeof *to);
        return;
    }
    const size_t step = STEP_BYTES / r->width;
    for (; n > step; n -= step, from += STEP_BYTES, to += step) {
        prefetch_row(from + STEP_BYTES, least(STEP_BYTES, (n - step) * r->width));
        r->cast(from, (uint8_t *)to, step);
    }
    r->cast(from, (uint8_t *)to, n);
}

static int64_t token_at(const reader *r, const uint8_t *from) {
    int64_t token;
    if (r->cast == NULL) memcpy(&token, from, sizeof token);
    else r->cast(from, (uint8_t *)&token, 1);
    return token;
}

static void read_piece(const reader *r, const tc_packed_unit *unit, const tc_packed_piece *piece, int64_t *to) {
    read_tokens(r, piece->from, to, piece->n);
    if (piece->flags & TC_ENDS) to[piece->n] = unit->packing->end;
}

static int64_t first_token(const reader *r, const tc_packed_unit *unit, const tc_packed_piece *piece) {
    return piece->n ? token_at(r, piece->from) : unit->packing->end;
}

/* The label of the last position of a piece: the document's next token, or what follows the document in the row. */
static int64_t last_label(const reader *r, const tc_packed_unit *unit, const tc_packed_piece *piece, int is_last) {
    const tc_packing *packing = unit->packing;
    if (piece->flags & TC_GOES_ON) return token_at(r, piece->from + (size_t)piece->n * r->width);
    if (piece->flags & TC_END_LATER) return packing->end;
    return is_last || packing->masks_borders ? TC_IGNORED : first_token(r, unit, piece + 1);
}

static void read_labels(const reader *r, const tc_packed_unit *unit, const tc_packed_piece *piece, int is_last, int64_t *to) {
    size_t n = positions_of(piece);
    if (piece->n) {
        read_tokens(r, piece->from + r->width, to, piece->n - 1);
        if (piece->flags & TC_ENDS) to[piece->n - 1] = unit->packing->end;
    }
    to[n - 1] = last_label(r, unit, piece, is_last);
}

enum { MASKS_AT_ONCE = 256 };

/* Ignore the labels of a piece whose tokens have the mask 0. Label i is the token at i + 1; mask[0] belongs to a label of
 * the piece before. */
static void mask_labels(const reader *mask, const tc_packed_piece *piece, int is_last, int64_t *to) {
    int64_t values[MASKS_AT_ONCE];
    size_t n = positions_of(piece);
    int last = 0; /* The mask of the last label; the first token of the next piece may be an end token alone. */
    if (piece->flags & TC_GOES_ON) last = token_at(mask, piece->mask + (size_t)piece->n * mask->width) != 0;
    else if (piece->flags & TC_END_LATER) last = token_at(mask, piece->mask + (size_t)(piece->n - 1) * mask->width) != 0;
    else if (!is_last && piece[1].n) last = token_at(mask, piece[1].mask) != 0;
    if (!last) to[n - 1] = TC_IGNORED;
    for (size_t at = 1; at < piece->n; at += MASKS_AT_ONCE) {
        size_t m = least(MASKS_AT_ONCE, piece->n - at);
        read_tokens(mask, piece->mask + at * mask->width, values, m);
        for (size_t i = 0; i < m; i++)
            if (values[i] == 0) to[at + i - 1] = TC_IGNORED;
    }
    if (piece->n && piece->flags & TC_ENDS && token_at(mask, piece->mask + (size_t)(piece->n - 1) * mask->width) == 0) to[piece->n - 1] = TC_IGNORED;
}

static void fill(int64_t *to, size_t n, int64_t value) {
    for (size_t i = 0; i < n; i++) to[i] = value;
}

static void number(int64_t *to, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = (int64_t)i;
}

static void fill_short(int32_t *to, size_t n, int32_t value) {
    for (size_t i = 0; i < n; i++) to[i] = value;
}

static void write_row(const tc_packed_unit *unit, uint32_t row, int output, uint8_t *out) {
    const tc_packing *packing = unit->packing;
    const reader of_unit = {tc_caster_of(packing->dtype, TC_I64), tc_dtype_bytes(packing->dtype)}, *r = &of_unit;
    const reader of_masks = {tc_caster_of(packing->mask_dtype, TC_I64), tc_dtype_bytes(packing->mask_dtype)};
    const tc_packed_piece *first = unit->pieces + unit->first_piece[row], *stop = unit->pieces + unit->first_piece[row + 1];
    int64_t *to = (int64_t *)out;
    int32_t *to_short = (int32_t *)out;
    size_t end = 0, length = unit->packing->length;
    for (const tc_packed_piece *piece = first; piece < stop; piece++) {
        size_t start = piece->start, n = positions_of(piece);
        end = start + n;
        switch (output) {
            case TC_TOKENS: read_piece(r, unit, piece, to + start); break;
            case TC_LABELS:
                read_labels(r, unit, piece, piece + 1 == stop, to + start);
                if (of_masks.width) mask_labels(&of_masks, piece, piece + 1 == stop, to + start);
                break;
            case TC_POSITION_IDS: number(to + start, n); break;
            default: fill_short(to_short + start, n, (int32_t)(piece - first)); break;
        }
    }
    switch (output) {
        case TC_TOKENS: fill(to + end, length - end, unit->packing->pad); break;
        case TC_LABELS: fill(to + end, length - end, TC_IGNORED); break;
        case TC_POSITION_IDS: number(to + end, length - end); break;
        default: fill_short(to_short + end, length - end, -1); break;
    }
}

static const tc_packed_unit *unit_of(const tc_rows *rows, size_t i) {
    return (const tc_packed_unit *)(const void *)rows->sources[rows->block[i]].values;
}

void tc_gather_packed(const tc_stream *stream, const tc_rows *rows, const tc_sink *sink) {
    const int output = stream->from, reads = output == TC_TOKENS || output == TC_LABELS;
    for (size_t i = 0; i < rows->n; i++) {
        if (reads && i + 1 < rows->n) {
            const tc_packed_unit *next = unit_of(rows, i + 1);
            const tc_packed_piece *piece = next->pieces + next->first_piece[rows->row[i + 1]];
            prefetch_row(piece->from, piece->n * tc_dtype_bytes(next->packing->dtype));
        }
        write_row(unit_of(rows, i), rows->row[i], output, sink->values + i * stream->width);
    }
}

int32_t tc_join_boundaries(const int32_t *boundaries, const int64_t *offsets, size_t n, int32_t length, int32_t *out) {
    int32_t longest = 0, base = 0;
    size_t at = 0;
    for (size_t row = 0; row < n; row++, base += length)
        for (int64_t i = offsets[row]; i + 1 < offsets[row + 1]; i++) {
            int32_t start = boundaries[i], size = boundaries[i + 1] - start;
            if (size > longest) longest = size;
            out[at++] = base + start;
        }
    out[at] = base;
    return longest;
}
