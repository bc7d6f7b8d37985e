#ifndef TC_CAST_H
#define TC_CAST_H
/* Cast: convert elements from one dtype to another in one loop. Every value that cannot be represented is reported.
 *
 *   integer to integer (a bool counts as 0 or 1)   a number outside the target's range does not fit
 *   integer to float                               rounded to nearest; a number that is not exact does not fit
 *   float to float                                 rounded once, to nearest, ties to even; a finite number that becomes
 *                                                  infinite does not fit; NaN and infinity are kept
 * There is no cast from float to integer, because the rounding is the user's choice. Where all values fit, the results
 * equal those of numpy's astype.
 */
#include "gather.h"

enum { TC_AS_IS, TC_BOOL, TC_U8, TC_I8, TC_U16, TC_I16, TC_U32, TC_I32, TC_U64, TC_I64, TC_F16, TC_BF16, TC_F32, TC_F64, TC_N_DTYPES };

/* Convert n elements; any alignment is allowed. Returns 0 if all values fit. Otherwise the outputs of the values that
 * do not fit are undefined, and all other outputs are right. */
typedef uint64_t (*tc_caster)(const uint8_t *from, uint8_t *to, size_t n);

/* The function for a pair of dtypes, or NULL if the cast does not exist (including from a dtype to itself). */
tc_caster tc_caster_of(uint32_t from, uint32_t to);

/* Size of an element in bytes; 0 for TC_AS_IS and for an unknown dtype. */
size_t tc_dtype_bytes(uint32_t dtype);

/* Output size in bytes of n_bytes stored bytes of a TC_FIXED or TC_VAR stream. */
size_t tc_cast_bytes(const tc_stream *stream, size_t n_bytes);

/* tc_gather for a stream with a cast. Returns 0, TC_CORRUPT or TC_MISFIT. */
int tc_gather_cast(const tc_stream *stream, const tc_rows *rows, const tc_sink *sink);


#endif
