#ifndef TC_CRC32C_H
#define TC_CRC32C_H
/* CRC-32C (Castagnoli, reflected polynomial 0x82f63b78) of one buffer, of many buffers, and of the pages of a buffer;
 * and the checksum of a concatenation.
 *
 * A checksum starts from seed 0, and checksums chain: tc_crc32c_run(k, tc_crc32c_run(k, 0, a), b) is the checksum of a
 * followed by b. TC_CRC_PORTABLE is the reference kernel and runs everywhere. The other kernels give identical results
 * and are not usable on processors without the instruction. tc_crc32c, tc_crc32c_many and tc_crc32c_pages read memory
 * under the SIGBUS guard (sigbus_guard.h). They return 0, or TC_EIO if a mapping could not be read; the output is then
 * undefined. No function allocates memory or takes a lock, so any thread may call them without the GIL.
 */
#include <stddef.h>
#include <stdint.h>

enum { TC_CRC_PORTABLE = 0, TC_CRC_SSE42 = 1, TC_CRC_ARMV8 = 2, TC_CRC_KERNELS = 3 };

/* Build the lookup tables. Call it once per process, before any other function of this header. */
void tc_crc32c_init(void);

/* Whether this build and this processor can run the kernel: 1 or 0. */
int tc_crc32c_usable(int kernel);

/* *out = checksum of data[0..n), continued from seed. */
int tc_crc32c(int kernel, uint32_t seed, const uint8_t *data, size_t n, uint32_t *out);

/* out[i] = checksum of the lengths[i] bytes at addresses[i]. */
int tc_crc32c_many(int kernel, const uint64_t *addresses, const uint64_t *lengths, size_t count, uint32_t *out);

/* out[i] = checksum of page i of data[0..n) (the last page may be short); *whole = checksum of all data. page_bytes must
 * be 1 or more. */
int tc_crc32c_pages(int kernel, const uint8_t *data, size_t n, size_t page_bytes, uint32_t *out, uint32_t *whole);

/* tc_crc32c for callers that are inside a guard of their own, because guards do not nest. The kernel must be usable. */
uint32_t tc_crc32c_run(int kernel, uint32_t seed, const uint8_t *data, size_t n);

/* The checksum of a followed by b, from the checksums of a and b and the length of b in bytes. */
uint32_t tc_crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t n_bytes_b);

/* The checksum of n_bytes, from the checksums of their count pages of page_bytes; the last page may be short. */
uint32_t tc_crc32c_combine_pages(const uint32_t *sums, size_t count, size_t page_bytes, uint64_t n_bytes);


/* Lay out a chunk: copy its pieces to their places page by page, and compute the checksum of each page while the page
 * is in the cache.
 *
 * Copying 1 MiB and then computing the checksums took 1.15 times as long.
 *
 * The functions allocate nothing, take no lock, and may be called without the GIL. The sources are the caller's arrays,
 * which may be mappings, so they are read under the SIGBUS guard (sigbus_guard.h).
 */
#include <stddef.h>
#include <stdint.h>

typedef struct {
    const uint64_t *addresses, *lengths; /* Address and length of each piece. */
    size_t count, align;                 /* Each piece is padded with zero bytes to a multiple of align. */
    size_t page_bytes;
    int kernel;                          /* A usable kernel of crc32c.h. */
} tc_pieces;

/* Fill `out` with the pieces. sums[i] = CRC-32C of page i (the last page may be short), *whole = CRC-32C of all bytes.
 * The sizes of out and sums follow from lengths and align; page_bytes > 0. Returns 0, or TC_EIO if a source could not
 * be read; the output is then undefined. */
int tc_lay_out(const tc_pieces *layout, uint8_t *out, uint32_t *sums, uint32_t *whole);


#endif
