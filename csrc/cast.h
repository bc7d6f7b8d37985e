/* Cast: elements of one dtype read, the same values of another written, in one loop. No value is lost without being seen.
 *
 *   integer to integer, bool counted as the integers 0 and 1    a number that the target has not does not fit
 *   integer to float                                            as the nearest float; a number that is not exactly one does not fit
 *   float to float                                              rounded once, to nearest, ties to even; a number that becomes infinite does not fit,
 *                                                               NaN and infinity stay
 * There is no other pair: what becomes of 0.5 as an integer is the user's to say. Where all values fit, results are those of numpy's astype.
 */
#ifndef TC_CAST_H
#define TC_CAST_H
#include "gather.h"

enum { TC_AS_IS, TC_BOOL, TC_U8, TC_I8, TC_U16, TC_I16, TC_U32, TC_I32, TC_U64, TC_I64, TC_F16, TC_BF16, TC_F32, TC_F64, TC_N_DTYPES };

/* Read n elements, write n; any alignment. 0, or another number if some did not fit (what is written for those is undefined, the rest is right). */
typedef uint64_t (*tc_caster)(const uint8_t *from, uint8_t *to, size_t n);

/* NULL: there is no such cast, as from a dtype to itself. */
tc_caster tc_caster_of(uint32_t from, uint32_t to);

/* Bytes of an element; 0 for TC_AS_IS and what is no dtype. */
size_t tc_dtype_bytes(uint32_t dtype);

/* What n_bytes stored bytes of a TC_FIXED or TC_VAR stream take as they are served. */
size_t tc_cast_bytes(const tc_stream *stream, size_t n_bytes);

/* tc_gather of a stream that is cast. 0, TC_CORRUPT or TC_MISFIT. */
int tc_gather_cast(const tc_stream *stream, const tc_rows *rows, const tc_sink *sink);

#endif
