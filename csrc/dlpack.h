#ifndef TC_DLPACK_H
#define TC_DLPACK_H
/* Tensor: a column of a batch in DLPack's exchange format (https://dmlc.github.io/dlpack: DLManagedTensor).
 *
 * A small column (tc_slot_is_small_column) is copied to memory of its own. Another column lies in the slot, and its tensor
 * holds the slot (tc_slot_hold) until its receiver calls the deleter, from any thread, with or without the GIL.
 */
#include "slot.h"

enum { TC_TENSOR_DIMS = 64 };

/* Type of consecutive rows: code and bits of the element type as in DLPack, and the shape of a row. */
typedef struct {
    uint8_t code, bits;
    int32_t n_dims; /* Number of dimensions of a row. */
    int64_t dims[TC_TENSOR_DIMS];
    size_t row_bytes;
} tc_row_type;

/* A DLManagedTensor of n_rows rows from byte position `offset`. The caller has checked that the rows are inside the
 * slot. NULL if no memory is left. */
void *tc_tensor_new(tc_slot *slot, size_t offset, const tc_row_type *row_type, size_t n_rows);

/* Call the deleter of a tensor that no receiver has taken over. */
void tc_tensor_drop(void *tensor);


#endif
