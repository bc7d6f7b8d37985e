/* One loop copies ranges that end at page boundaries, independent of the pieces. */
#include "layout.h"

#include <string.h>

#include "crc32c.h"
#include "guard.h"

typedef struct {
    const tc_layout *layout;
    uint8_t *page; /* The page that is being filled. */
    size_t filled;
    uint32_t *sums;
    uint32_t whole;
} laying;

static void end_page(laying *at) {
    const uint32_t crc = tc_crc32c_run(at->layout->kernel, 0, at->page, at->filled);
    *at->sums++ = crc;
    at->whole = tc_crc32c_combine(at->whole, crc, at->filled);
    at->page += at->filled;
    at->filled = 0;
}

/* Append n bytes of source, or n zero bytes if source is NULL. */
static void put(laying *at, const uint8_t *source, size_t n) {
    while (n) {
        const size_t room = at->layout->page_bytes - at->filled, length = n < room ? n : room;
        if (source) {
            memcpy(at->page + at->filled, source, length);
            source += length;
        } else
            memset(at->page + at->filled, 0, length);
        at->filled += length;
        n -= length;
        if (length == room) end_page(at);
    }
}

/* A separate frame: variables that change here must not be in the frame that a fault jumps back to. */
__attribute__((noinline)) static uint32_t lay_out(const tc_layout *layout, uint8_t *out, uint32_t *sums) {
    laying at = {.layout = layout, .page = out, .sums = sums};
    for (size_t i = 0; i < layout->count; i++) {
        const size_t over = layout->lengths[i] % layout->align;
        put(&at, (const uint8_t *)(uintptr_t)layout->addresses[i], layout->lengths[i]);
        put(&at, NULL, over ? layout->align - over : 0);
    }
    if (at.filled) end_page(&at);
    return at.whole;
}

int tc_lay_out(const tc_layout *layout, uint8_t *out, uint32_t *sums, uint32_t *whole) {
    if (tc_guard_enter()) return TC_EIO;
    *whole = lay_out(layout, out, sums);
    tc_guard_leave();
    return 0;
}
