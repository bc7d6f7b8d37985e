#include "dlpack.h"

#include <stdlib.h>
#include <string.h>

#include "ring.h"

/* DLPack's structure before its versions were numbered. */
typedef struct {
    void *data;
    int32_t device_type, device_id;
    int32_t n_dims;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} dl_tensor;

typedef struct dl_managed_tensor {
    dl_tensor tensor;
    void *manager_ctx;
    void (*deleter)(struct dl_managed_tensor *);
} dl_managed_tensor;

enum { CPU = 1, LINE = 64 };

/* slot: The slot that contains the values; NULL: the n_bytes of the values follow the structure in its own memory. */
typedef struct {
    dl_managed_tensor managed;
    tc_slot *slot;
    size_t n_bytes;
} column;

static void delete(dl_managed_tensor *managed) {
    column *mine = managed->manager_ctx;
    if (mine->slot) tc_slot_release(mine->slot);
    else tc_count_copied(-(ptrdiff_t)mine->n_bytes);
    free(mine);
}

void *tc_tensor_new(tc_slot *slot, size_t offset, const tc_row_type *row_type, size_t n_rows) {
    size_t n_dims = (size_t)row_type->n_dims + 1;
    size_t n_bytes = n_rows * row_type->row_bytes, head = sizeof(column) + 2 * n_dims * sizeof(int64_t);
    int is_small = tc_slot_is_small_column(slot, n_bytes);
    column *mine = malloc(head + (is_small ? LINE - 1 + n_bytes : 0));
    if (mine == NULL) return NULL;
    int64_t *shape = (int64_t *)(mine + 1), *strides = shape + n_dims;
    uint64_t stride = 1; /* Next to a dimension of 0 the other dimensions may have any size: the product may then wrap, and is not used. */
    shape[0] = (int64_t)n_rows;
    for (size_t i = 1; i < n_dims; i++) shape[i] = row_type->dims[i - 1];
    for (size_t i = n_dims; i-- > 0;) {
        strides[i] = (int64_t)stride;
        stride *= shape[i] ? (uint64_t)shape[i] : 1; /* As torch does for its own tensors without elements. */
    }
    uint8_t *values = slot->memory + offset;
    if (is_small) {
        values = (uint8_t *)(((uintptr_t)mine + head + LINE - 1) & ~(uintptr_t)(LINE - 1)); /* Aligned as in the slot. */
        memcpy(values, slot->memory + offset, n_bytes);
        tc_count_copied((ptrdiff_t)n_bytes);
    } else {
        tc_slot_hold(slot);
    }
    dl_tensor tensor = {values, CPU, 0, (int32_t)n_dims, row_type->code, row_type->bits, 1, shape, strides, 0};
    *mine = (column){{tensor, mine, delete}, is_small ? NULL : slot, n_bytes};
    return &mine->managed;
}

void tc_tensor_drop(void *tensor) { delete(tensor); }
