#include "dlpack.h"

#include <stdlib.h>

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

enum { CPU = 1 };

static void delete(dl_managed_tensor *managed) {
    tc_slot_release(managed->manager_ctx);
    free(managed);
}

void *tc_tensor_new(tc_slot *slot, size_t offset, const tc_row_type *row_type, size_t n_rows) {
    size_t n_dims = (size_t)row_type->n_dims + 1;
    dl_managed_tensor *managed = malloc(sizeof *managed + 2 * n_dims * sizeof(int64_t));
    if (managed == NULL) return NULL;
    int64_t *shape = (int64_t *)(managed + 1), *strides = shape + n_dims;
    uint64_t stride = 1; /* Next to a dimension of 0 the other dimensions may have any size: the product may then wrap, and is not used. */
    shape[0] = (int64_t)n_rows;
    for (size_t i = 1; i < n_dims; i++) shape[i] = row_type->dims[i - 1];
    for (size_t i = n_dims; i-- > 0;) {
        strides[i] = (int64_t)stride;
        stride *= shape[i] ? (uint64_t)shape[i] : 1; /* As torch does for its own tensors without elements. */
    }
    managed->tensor = (dl_tensor){slot->memory + offset, CPU, 0, (int32_t)n_dims, row_type->code, row_type->bits, 1, shape, strides, 0};
    managed->manager_ctx = slot;
    managed->deleter = delete;
    tc_slot_hold(slot);
    return managed;
}

void tc_tensor_drop(void *tensor) { delete(tensor); }
