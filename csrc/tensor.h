/* Tensor: a part of a slot as DLPack hands memory from one library to another (https://dmlc.github.io/dlpack: DLManagedTensor).
 *
 * What it is made of keeps the slot (tc_slot_hold) until whoever got it calls its deleter, from any thread, with or without the GIL.
 */
#ifndef TC_TENSOR_H
#define TC_TENSOR_H
#include "slot.h"

enum { TC_TENSOR_DIMS = 64 };

/* How rows lie one after the other: DLPack's code and bits of the type, and the shape of a row. */
typedef struct {
    uint8_t code, bits;
    int32_t n_dims; /* of a row */
    int64_t dims[TC_TENSOR_DIMS];
    size_t row_bytes;
} tc_layout;

/* n_rows from offset on, which the caller has seen to lie in the slot: a DLManagedTensor. NULL without memory. */
void *tc_tensor_new(tc_slot *slot, size_t offset, const tc_layout *layout, size_t n_rows);

/* Call its deleter: nobody has taken it over. */
void tc_tensor_drop(void *tensor);

#endif
