#include "zstd_frames.h"

size_t tc_zstd_decode_frames(const tc_zstd_functions *zstd, void *context, const uint64_t *frames, const uint64_t *stored, const uint64_t *out,
                        const uint64_t *raw, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const void *frame = (const void *)(uintptr_t)frames[i];
        /* Checked before decoding: several concatenated frames, and frames without a content size, are not what the
         * writer wrote. */
        if (zstd->content_size(frame, (size_t)stored[i]) != raw[i]) return i;
        /* An error is a number close to the largest size_t, so it never equals raw[i]. */
        if (zstd->decode(context, (void *)(uintptr_t)out[i], (size_t)raw[i], frame, (size_t)stored[i]) != raw[i]) return i;
    }
    return count;
}
