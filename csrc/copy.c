#include "copy.h"

#include "prefetch.h"

/* Below 2 KiB, the size at which libc's memcpy changes to a string instruction. Runs of 16 KiB and more are copied at
 * 1.1 to 1.5 times the speed of one memcpy. */
enum { PIECE_BYTES = 31 * LINE };
/* Bytes of the next page that are prefetched while a page is copied: the hardware prefetcher stops at the end of each
 * page and starts again. Runs are copied at 1.2 times the speed; twice as many bytes give the same. */
enum { NEXT_BYTES = 8 * LINE };
enum { NONTEMPORAL_AHEAD_BYTES = 1024 }; /* Prefetch distance in bytes for copies with non-temporal stores. */

static void copy_pieces(uint8_t *to, const uint8_t *from, size_t n_bytes) {
    while (n_bytes > PIECE_BYTES) {
        size_t ahead = n_bytes - PIECE_BYTES < PIECE_BYTES ? n_bytes - PIECE_BYTES : PIECE_BYTES;
        prefetch_lines(from + PIECE_BYTES, ahead);
        memcpy(to, from, PIECE_BYTES);
        to += PIECE_BYTES;
        from += PIECE_BYTES;
        n_bytes -= PIECE_BYTES;
    }
    memcpy(to, from, n_bytes);
}

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

static int has_fast_rep_movsb;     /* The processor reports ERMS and FSRM. */
static int has_nontemporal;             /* Non-temporal stores are used on AMD processors only, where they were measured. */
static _Thread_local int is_nontemporal; /* The setting of tc_copy_pass for this thread. */

void tc_copy_init(int kernel) {
    enum { ERMS = 1 << 9, FSRM = 1 << 4 };
    unsigned a, b, c, d;
    if (kernel == 0) return;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) has_fast_rep_movsb = (b & ERMS) && (d & FSRM);
    has_nontemporal = __builtin_cpu_is("amd") && __builtin_cpu_supports("avx2");
}

int tc_copy_has_nontemporal(void) { return has_nontemporal; }

int tc_copy_set_nontemporal(int on) {
    int before = is_nontemporal;
    is_nontemporal = on && has_nontemporal;
    return before;
}

void tc_copy_end(void) {
    is_nontemporal = 0;
    if (has_nontemporal) _mm_sfence();
}

static inline void copy_string(uint8_t *to, const uint8_t *from, size_t n_bytes) {
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n_bytes)::"memory");
}

/* The string instruction writes whole lines if the target is aligned, so the target is aligned first. Each piece then
 * ends where a source page ends, or less than a line before. */
static void copy_pages(uint8_t *to, const uint8_t *from, size_t n_bytes) {
    size_t n = -(uintptr_t)to & (LINE - 1);
    memcpy(to, from, LINE);
    to += n, from += n, n_bytes -= n;
    n = -(uintptr_t)from & (PAGE - LINE);
    for (n = n ? n : PAGE; n_bytes > n; n = PAGE) {
        prefetch_lines(from + n + LINE - 1, n_bytes - n < NEXT_BYTES ? n_bytes - n : NEXT_BYTES);
        copy_string(to, from, n);
        to += n, from += n, n_bytes -= n;
    }
    copy_string(to, from, n_bytes);
}

/* Copy with non-temporal stores: whole lines, each written at once. */
__attribute__((target("avx2"))) static void copy_lines(uint8_t *to, const uint8_t *from, size_t n_bytes) {
    size_t n = -(uintptr_t)to & (LINE - 1);
    memcpy(to, from, n);
    to += n, from += n, n_bytes -= n;
    for (; n_bytes >= LINE; to += LINE, from += LINE, n_bytes -= LINE) {
        __m256i low = _mm256_loadu_si256((const __m256i *)from), high = _mm256_loadu_si256((const __m256i *)(from + LINE / 2));
        __builtin_prefetch(from + NONTEMPORAL_AHEAD_BYTES, 0, 2);
        _mm256_stream_si256((__m256i *)to, low);
        _mm256_stream_si256((__m256i *)(to + LINE / 2), high);
    }
    memcpy(to, from, n_bytes);
}

/* If the target is 1 to 31 bytes after the source (modulo the page size), the instruction takes four times as long on a
 * Zen 4. */
static int is_rep_movsb_fast(const uint8_t *to, const uint8_t *from) {
    return has_fast_rep_movsb && (((uintptr_t)to - (uintptr_t)from - 1) & (PAGE - 1)) >= LINE;
}

void tc_copy_long(uint8_t *to, const uint8_t *from, size_t n_bytes) {
    if (is_nontemporal) copy_lines(to, from, n_bytes);
    else if (is_rep_movsb_fast(to, from)) copy_pages(to, from, n_bytes);
    else copy_pieces(to, from, n_bytes);
}
#else
void tc_copy_init(int kernel) { (void)kernel; }

int tc_copy_has_nontemporal(void) { return 0; }

int tc_copy_set_nontemporal(int on) { return (void)on, 0; }

void tc_copy_end(void) {}

void tc_copy_long(uint8_t *to, const uint8_t *from, size_t n_bytes) { copy_pieces(to, from, n_bytes); }
#endif
