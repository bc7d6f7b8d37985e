#ifndef TC_RESIZE_H
#define TC_RESIZE_H
/* Resize of a picture with a triangle filter, as torchvision's and Pillow's bilinear resize.
 *
 * The caller owns all memory; the functions take no locks and allocate nothing. All sums are of integers, so that the
 * results do not depend on the machine.
 */
#include <stddef.h>
#include <stdint.h>

/* One direction of a resize: the box [start, start + length) of the source, in pixels that may be fractions, becomes
 * n_out pixels. Of the source only the pixels [first, stop) are read: 0 <= first < stop. half_width: Half the width of
 * the filter in pixels of the source, above 0. */
typedef struct {
    double start, length, half_width;
    size_t first, stop, n_out;
} tc_axis;

/* Number of bytes of scratch memory that tc_resize needs. */
size_t tc_resize_bytes(const tc_axis *rows, const tc_axis *columns);

/* Write a resized picture to `to`, uint8[rows->n_out][columns->n_out][3].
 *
 * from: Pixels uint8[3], contiguous in a row; rows begin row_bytes apart. Every result is within one level of the exact
 * one, and a picture of one colour keeps it. scratch: tc_resize_bytes bytes, aligned to 16. */
void tc_resize(const uint8_t *from, ptrdiff_t row_bytes, const tc_axis *rows, const tc_axis *columns, uint8_t *to, void *scratch);

#endif
