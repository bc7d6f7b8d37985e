/* CRC-32C (Castagnoli, reflected polynomial 0x82f63b78): of one buffer, of many, of the pages of one, and joined.
 *
 * The conventional form: sums start from seed 0 and chain, tc_crc32c(k, tc_crc32c(k, 0, a), b) is the sum of a then b.
 * TC_CRC_PORTABLE is the reference and works everywhere; the others are bit-identical and refused where the processor lacks them.
 * Functions that return int touch memory under the SIGBUS guard (guard.h): 0, or TC_EIO where a mapping could not be read, and then what
 * they wrote is undefined. None of them allocates or takes a lock, so all may be called from any thread without the GIL.
 */
#ifndef TC_CRC32C_H
#define TC_CRC32C_H
#include <stddef.h>
#include <stdint.h>

enum { TC_CRC_PORTABLE = 0, TC_CRC_SSE42 = 1, TC_CRC_ARMV8 = 2, TC_CRC_KERNELS = 3 };

/* Make the tables. Once a process, before everything else here. */
void tc_crc32c_init(void);

/* Whether this build and this processor can run the kernel: 1 or 0. */
int tc_crc32c_usable(int kernel);

/* *out = the sum of data[0..n), going on from seed. */
int tc_crc32c(int kernel, uint32_t seed, const uint8_t *data, size_t n, uint32_t *out);

/* out[i] = the sum of the lengths[i] bytes at addresses[i]. */
int tc_crc32c_many(int kernel, const uint64_t *addresses, const uint64_t *lengths, size_t count, uint32_t *out);

/* out[i] = the sum of page i of data[0..n), the last may be short; *whole = the sum of all. page_bytes > 0. */
int tc_crc32c_pages(int kernel, const uint8_t *data, size_t n, size_t page_bytes, uint32_t *out, uint32_t *whole);

/* As tc_crc32c, for callers that hold a guard of their own: guards do not nest. kernel must be usable. */
uint32_t tc_crc32c_run(int kernel, uint32_t seed, const uint8_t *data, size_t n);

/* The sum of a then b from both sums and b's length. */
uint32_t tc_crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t n_bytes_b);

#endif
