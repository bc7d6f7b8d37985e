/* Many zstd frames decoded in one call.
 *
 * The library is not linked: whoever calls has found its functions in a libzstd of the machine. Their types are those of zstd.h, which
 * has not changed them since 1.0.
 */
#ifndef TC_FRAMES_H
#define TC_FRAMES_H
#include <stddef.h>
#include <stdint.h>

typedef struct {
    void *(*create)(void);                                                           /* ZSTD_createDCtx */
    size_t (*destroy)(void *context);                                                /* ZSTD_freeDCtx */
    size_t (*decode)(void *context, void *out, size_t room, const void *in, size_t); /* ZSTD_decompressDCtx */
    unsigned long long (*promise)(const void *in, size_t n);                         /* ZSTD_getFrameContentSize */
} tc_zstd;

/* Decode frame i (stored[i] bytes at frames[i]) to out[i], which takes raw[i] bytes, for all i below count.
 * context: of zstd->create, used by one thread at a time.
 * Returns count, or the number of the first frame that does not hold exactly raw[i] bytes or cannot be decoded. */
size_t tc_frames_decode(const tc_zstd *zstd, void *context, const uint64_t *frames, const uint64_t *stored, const uint64_t *out,
                        const uint64_t *raw, size_t count);
#endif
