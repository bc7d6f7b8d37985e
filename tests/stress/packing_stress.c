/* Stress test of packing with random documents and options, run under a sanitizer: all arrays have exactly the sizes that
 * packing.h asks for. tests/unit/native/test_packing.py compares the rows.
 *
 *   packing_stress SEED N_RUNS
 */
#include <stdio.h>
#include <stdlib.h>

#include "cast.h"
#include "packing.h"

static uint64_t state;

static uint32_t below(uint32_t n) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state % n);
}

/* A random integer dtype that packing allows. */
static uint32_t any_dtype(void) {
    static const uint32_t DTYPES[] = {TC_U8, TC_I8, TC_U16, TC_I16, TC_U32, TC_I32, TC_I64};
    return DTYPES[below(7)];
}

static void *array(size_t n, size_t width) { return malloc(n ? n * width : 1); }

static int run(void) {
    size_t n = below(12);
    uint32_t longest = below(5) ? 50 : 300, length = 1 + below(below(7) ? 40 : 400);
    tc_packing how = {.length = length, .mode = below(3), .cuts_long = 1, .has_end = below(2), .masks_borders = below(2), .dtype = any_dtype(),
                      .mask_dtype = (const uint32_t[]){TC_AS_IS, TC_BOOL, any_dtype()}[below(3)], .pad = 3, .end = 7};
    size_t width = tc_dtype_bytes(how.dtype);
    int64_t *lengths = array(n, sizeof *lengths);
    size_t mask_width = tc_dtype_bytes(how.mask_dtype);
    uint64_t *addresses = array(n, sizeof *addresses), *masks = array(n, sizeof *masks);
    for (size_t d = 0; d < n; d++) {
        lengths[d] = below(longest);
        addresses[d] = (uint64_t)(uintptr_t)calloc((size_t)lengths[d] * width + 1, 1);
        masks[d] = (uint64_t)(uintptr_t)calloc((size_t)lengths[d] * mask_width + 1, 1);
    }
    tc_documents documents = {lengths, addresses, masks, n};
    uint32_t *scratch = array(tc_pack_scratch_words(&how, n), sizeof *scratch);
    int64_t n_rows = tc_pack(&how, &documents, scratch, NULL, NULL);
    size_t rows = (size_t)n_rows;
    tc_packed_piece *pieces = array(n + rows, sizeof *pieces);
    uint32_t *first_piece = array(rows + 1, sizeof *first_piece);
    int is_wrong = tc_pack(&how, &documents, scratch, pieces, first_piece) != n_rows;
    tc_packed_unit unit = {pieces, first_piece, &how};
    size_t most = first_piece[rows] + 2 * rows;
    int32_t *boundaries = array(most, sizeof *boundaries), *counts = array(rows, sizeof *counts);
    int64_t *offsets = array(rows + 1, sizeof *offsets);
    is_wrong |= tc_boundaries(&unit, rows, boundaries, offsets, counts) != (size_t)offsets[rows] || (size_t)offsets[rows] > most;
    if (rows) tc_join_boundaries(boundaries, offsets, rows, (int32_t)length, boundaries);
    uint32_t *block = calloc(rows + 1, sizeof *block), *row = array(rows, sizeof *row);
    for (size_t i = 0; i < rows; i++) row[i] = (uint32_t)i;
    tc_source source = {(const uint8_t *)&unit, NULL, rows};
    tc_rows all = {&source, NULL, block, row, rows, rows};
    for (uint8_t output = 0; output < TC_N_OUTPUTS; output++) {
        uint32_t row_bytes = length * (output == TC_DOCUMENT_IDS ? 4 : 8);
        tc_stream stream = {.kind = TC_PACKED, .from = output, .width = row_bytes};
        tc_sink sink = {array(rows, row_bytes), NULL};
        tc_gather(&stream, &all, &sink);
        free(sink.values);
    }
    for (size_t d = 0; d < n; d++) free((void *)(uintptr_t)addresses[d]), free((void *)(uintptr_t)masks[d]);
    void *used[] = {lengths, addresses, masks, scratch, pieces, first_piece, boundaries, counts, offsets, block, row};
    for (size_t i = 0; i < sizeof used / sizeof *used; i++) free(used[i]);
    return is_wrong;
}

int main(int n_arguments, char **arguments) {
    if (n_arguments != 3) return 2;
    state = strtoull(arguments[1], NULL, 10) * 2 + 1;
    for (long i = atol(arguments[2]); i > 0; i--)
        if (run()) return printf("run %ld before the last: the numbers of rows or boundaries differ\n", i), 1;
    return 0;
}
