/* Three techniques: table slicing for every processor; the CRC instruction on three independent parts at once, because
 * its latency is three times its throughput; and joining the checksums of neighbours by multiplication with a power of
 * x, which is what appending zero bytes does.
 *
 * Polynomials over GF(2) are stored reflected, as the instruction does: bit 31 is x^0, so a shift to the right
 * multiplies by x.
 */
#include "crc32c.h"

#include <string.h>

#include "sigbus_guard.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#define TC_HARDWARE TC_CRC_SSE42
#define TC_TARGET __attribute__((target("sse4.2")))
#define TC_STEP8(crc, word) ((uint32_t)_mm_crc32_u64((crc), (word)))
#define TC_STEP1(crc, byte) _mm_crc32_u8((crc), (byte))
#elif defined(__aarch64__) && defined(__linux__) && defined(__AARCH64EL__)
#include <sys/auxv.h>
#define TC_HARDWARE TC_CRC_ARMV8
#if defined(__clang__)
#define TC_TARGET __attribute__((target("crc")))
#else
#define TC_TARGET __attribute__((target("+crc")))
#endif
#include <arm_acle.h>
#define TC_STEP8(crc, word) __crc32cd((crc), (word))
#define TC_STEP1(crc, byte) __crc32cb((crc), (byte))
#define TC_HWCAP_CRC32 (1UL << 7) /* HWCAP_CRC32 of the kernel's ABI; old libc headers do not define it. */
#endif

static const uint32_t POLYNOMIAL = 0x82f63b78u;
static const uint32_t X0 = 0x80000000u; /* The polynomial 1. */

/* slices[k][b]: contribution of byte b to the checksum after k more bytes. */
static uint32_t slices[8][256];
/* powers[k] = x^(2^k). The order of x is 2^31 - 1, so x^(2^31) is x again, and 31 powers are sufficient for any
 * exponent. */
enum { N_POWERS = 31 };
static uint32_t powers[N_POWERS];

static uint32_t times(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (int bit = 31; bit >= 0; bit--) {
        product ^= b & -((a >> bit) & 1u);
        b = (b >> 1) ^ (POLYNOMIAL & -(b & 1u));
    }
    return product;
}

/* x^(8 n_bytes): the factor for a checksum that is followed by n_bytes zero bytes. */
static uint32_t power_of_bytes(uint64_t n_bytes) {
    uint32_t power = X0;
    for (unsigned k = 3; n_bytes; n_bytes >>= 1, k++)
        if (n_bytes & 1) power = times(power, powers[k % N_POWERS]);
    return power;
}

uint32_t tc_crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t n_bytes_b) {
    return times(power_of_bytes(n_bytes_b), crc_a) ^ crc_b;
}

/* table: the effect on a checksum of n_bytes zero bytes after it, byte by byte. */
static void make_after(uint32_t table[4][256], size_t n_bytes) {
    uint32_t power = power_of_bytes(n_bytes);
    for (int part = 0; part < 4; part++)
        for (uint32_t byte = 0; byte < 256; byte++) table[part][byte] = times(power, byte << (8 * part));
}

static uint32_t shift(uint32_t table[4][256], uint32_t crc) {
    return table[0][crc & 0xff] ^ table[1][(crc >> 8) & 0xff] ^ table[2][(crc >> 16) & 0xff] ^ table[3][crc >> 24];
}

uint32_t tc_crc32c_combine_pages(const uint32_t *sums, size_t count, size_t page_bytes, uint64_t n_bytes) {
    uint32_t table[4][256], whole = 0;
    if (!count) return 0;
    make_after(table, page_bytes);
    for (size_t i = 0; i + 1 < count; i++) whole = shift(table, whole) ^ sums[i];
    return tc_crc32c_combine(whole, sums[count - 1], n_bytes - (uint64_t)(count - 1) * page_bytes);
}

static uint64_t little_endian(const uint8_t *p) {
    uint64_t word = 0;
    for (int i = 0; i < 8; i++) word |= (uint64_t)p[i] << (8 * i);
    return word;
}

static uint32_t run_portable(uint32_t crc, const uint8_t *p, size_t n) {
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t word = little_endian(p) ^ crc;
        crc = 0;
        for (int i = 0; i < 8; i++) crc ^= slices[7 - i][(word >> (8 * i)) & 0xff];
    }
    for (; n; p++, n--) crc = (crc >> 8) ^ slices[0][(crc ^ *p) & 0xff];
    return crc;
}

#ifdef TC_HARDWARE
/* Two part lengths, so that few bytes remain for the slow single stream: joining costs about as much as 100 bytes. */
enum { LONG_BYTES = 4096, SHORT_BYTES = 256 };
static uint32_t after_long[4][256], after_short[4][256];

static uint64_t load(const uint8_t *p) {
    uint64_t word;
    memcpy(&word, p, 8);
    return word;
}

TC_TARGET static uint32_t run_three(uint32_t a, const uint8_t *p, size_t run_bytes, uint32_t table[4][256]) {
    uint32_t b = 0, c = 0;
    for (const uint8_t *end = p + run_bytes; p < end; p += 8) {
        a = TC_STEP8(a, load(p));
        b = TC_STEP8(b, load(p + run_bytes));
        c = TC_STEP8(c, load(p + 2 * run_bytes));
    }
    return shift(table, shift(table, a) ^ b) ^ c;
}

TC_TARGET static uint32_t run_hardware(uint32_t crc, const uint8_t *p, size_t n) {
    for (; n >= 3 * LONG_BYTES; p += 3 * LONG_BYTES, n -= 3 * LONG_BYTES) crc = run_three(crc, p, LONG_BYTES, after_long);
    for (; n >= 3 * SHORT_BYTES; p += 3 * SHORT_BYTES, n -= 3 * SHORT_BYTES) crc = run_three(crc, p, SHORT_BYTES, after_short);
    for (; n >= 8; p += 8, n -= 8) crc = TC_STEP8(crc, load(p));
    for (; n; p++, n--) crc = TC_STEP1(crc, *p);
    return crc;
}
#endif

uint32_t tc_crc32c_run(int kernel, uint32_t seed, const uint8_t *data, size_t n) {
#ifdef TC_HARDWARE
    if (kernel == TC_HARDWARE) return ~run_hardware(~seed, data, n);
#endif
    return ~run_portable(~seed, data, n);
}

void tc_crc32c_init(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ (POLYNOMIAL & -(crc & 1u));
        slices[0][byte] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (int byte = 0; byte < 256; byte++) slices[k][byte] = (slices[k - 1][byte] >> 8) ^ slices[0][slices[k - 1][byte] & 0xff];
    powers[0] = X0 >> 1;
    for (int k = 1; k < N_POWERS; k++) powers[k] = times(powers[k - 1], powers[k - 1]);
#ifdef TC_HARDWARE
    make_after(after_long, LONG_BYTES);
    make_after(after_short, SHORT_BYTES);
#endif
}

int tc_crc32c_usable(int kernel) {
    if (kernel == TC_CRC_PORTABLE) return 1;
#if defined(__x86_64__)
    return kernel == TC_CRC_SSE42 && __builtin_cpu_supports("sse4.2") != 0;
#elif defined(TC_HWCAP_CRC32)
    return kernel == TC_CRC_ARMV8 && (getauxval(AT_HWCAP) & TC_HWCAP_CRC32) != 0;
#else
    return 0;
#endif
}

int tc_crc32c(int kernel, uint32_t seed, const uint8_t *data, size_t n, uint32_t *out) {
    if (tc_guard_enter()) return TC_EIO;
    *out = tc_crc32c_run(kernel, seed, data, n);
    tc_guard_leave();
    return 0;
}

int tc_crc32c_many(int kernel, const uint64_t *addresses, const uint64_t *lengths, size_t count, uint32_t *out) {
    if (tc_guard_enter()) return TC_EIO;
    for (size_t i = 0; i < count; i++) out[i] = tc_crc32c_run(kernel, 0, (const uint8_t *)(uintptr_t)addresses[i], lengths[i]);
    tc_guard_leave();
    return 0;
}

/* A separate frame: variables that change here must not be in the frame that a fault jumps back to. */
__attribute__((noinline)) static uint32_t run_pages(int kernel, const uint8_t *data, size_t n, size_t page_bytes, uint32_t *out) {
    const uint32_t power = power_of_bytes(page_bytes);
    uint32_t whole = 0;
    for (size_t at = 0, length; at < n; at += length) {
        length = n - at < page_bytes ? n - at : page_bytes;
        uint32_t crc = tc_crc32c_run(kernel, 0, data + at, length);
        whole = times(length == page_bytes ? power : power_of_bytes(length), whole) ^ crc;
        *out++ = crc;
    }
    return whole;
}

int tc_crc32c_pages(int kernel, const uint8_t *data, size_t n, size_t page_bytes, uint32_t *out, uint32_t *whole) {
    if (tc_guard_enter()) return TC_EIO;
    *whole = run_pages(kernel, data, n, page_bytes, out);
    tc_guard_leave();
    return 0;
}

/* One loop copies ranges that end at page boundaries, independent of the pieces. */

#include <string.h>


typedef struct {
    const tc_pieces *layout;
    uint8_t *page; /* The page that is being filled. */
    size_t filled;
    uint32_t *sums;
    uint32_t whole;
} page_writer;

static void end_page(page_writer *at) {
    const uint32_t crc = tc_crc32c_run(at->layout->kernel, 0, at->page, at->filled);
    *at->sums++ = crc;
    at->whole = tc_crc32c_combine(at->whole, crc, at->filled);
    at->page += at->filled;
    at->filled = 0;
}

/* Append n bytes of source, or n zero bytes if source is NULL. */
static void put(page_writer *at, const uint8_t *source, size_t n) {
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
__attribute__((noinline)) static uint32_t lay_out(const tc_pieces *layout, uint8_t *out, uint32_t *sums) {
    page_writer at = {.layout = layout, .page = out, .sums = sums};
    for (size_t i = 0; i < layout->count; i++) {
        const size_t over = layout->lengths[i] % layout->align;
        put(&at, (const uint8_t *)(uintptr_t)layout->addresses[i], layout->lengths[i]);
        put(&at, NULL, over ? layout->align - over : 0);
    }
    if (at.filled) end_page(&at);
    return at.whole;
}

int tc_lay_out(const tc_pieces *layout, uint8_t *out, uint32_t *sums, uint32_t *whole) {
    if (tc_guard_enter()) return TC_EIO;
    *whole = lay_out(layout, out, sums);
    tc_guard_leave();
    return 0;
}
