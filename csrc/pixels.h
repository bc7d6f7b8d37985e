#ifndef TC_PIXELS_H
#define TC_PIXELS_H
/* Pixels: colour jitter of one decoded picture, and conversion of its values by tables.
 *
 * The caller owns all memory; the functions take no locks and allocate nothing. The results do not depend on the
 * machine: all arithmetic is in integers. The loops have no branches, so that compilers vectorise them.
 */
#include <stddef.h>
#include <stdint.h>

enum { TC_BRIGHTNESS = 0, TC_CONTRAST = 1, TC_SATURATION = 2 };

/* Largest factor of an adjustment. */
#define TC_MAX_FACTOR 8.0

/* Adjust the brightness, contrast or saturation of a picture in place, as torchvision does with uint8 tensors:
 *   brightness  x * factor
 *   contrast    x * factor + (1 - factor) * the mean of all grey values
 *   saturation  x * factor + (1 - factor) * the pixel's grey value
 * each clamped to [0, 255] and rounded down, where grey is 0.2989 R + 0.587 G + 0.114 B, rounded down. A result may
 * differ from the exact one by 1, because factors are rounded to 13 bits or more.
 *
 * planes: uint8[3][n], R, G and B. factor: In [0, TC_MAX_FACTOR]. kind: One of the values above. */
void tc_adjust(uint8_t *planes, size_t n, int kind, double factor);

/* Replace each value by an element of its channel's table.
 *
 * from: uint8[3][n] if is_planar, else uint8[n][3]. tables: [3][256] elements of `width` bytes, 2 or 4, aligned. to:
 * [3][n] elements if to_planar, else [n][3], aligned; it must not overlap the others. */
void tc_look_up(const uint8_t *from, int is_planar, const void *tables, size_t width, void *to, int to_planar, size_t n);


#endif
