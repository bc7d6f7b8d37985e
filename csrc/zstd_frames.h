#ifndef TC_ZSTD_FRAMES_H
#define TC_ZSTD_FRAMES_H
/* Decode many zstd frames in one call.
 *
 * libzstd is not linked: the caller passes the addresses of its functions, which it has looked up at run time. Their
 * types are those of zstd.h, which have not changed since version 1.0.
 */
#include <stddef.h>
#include <stdint.h>

typedef struct {
    void *(*create)(void);                                                           /* ZSTD_createDCtx */
    size_t (*destroy)(void *context);                                                /* ZSTD_freeDCtx */
    size_t (*decode)(void *context, void *out, size_t room, const void *in, size_t); /* ZSTD_decompressDCtx */
    unsigned long long (*content_size)(const void *in, size_t n);                         /* ZSTD_getFrameContentSize */
} tc_zstd_functions;

/* Decode frame i (stored[i] bytes at address frames[i]) to address out[i], which has room for raw[i] bytes, for all i <
 * count. context: Result of zstd->create, used by one thread at a time. Returns count, or the index of the first frame
 * that does not decode to exactly raw[i] bytes. */
size_t tc_zstd_decode_frames(const tc_zstd_functions *zstd, void *context, const uint64_t *frames, const uint64_t *stored, const uint64_t *out,
                        const uint64_t *raw, size_t count);

#endif
