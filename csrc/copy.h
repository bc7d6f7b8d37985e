/* Copies of a kilobyte and more from memory that is in no cache to memory that is: rows, and runs of rows, from mapped shards to slots.
 *
 * The processor's string instruction writes whole lines without reading them first; glibc's memcpy, which does not use it on AMD's processors,
 * reads them. Measured on a Zen 4, two threads, from a mapped file, times memcpy's speed: rows at random places of 12 KiB 1.20, 4 KiB 1.17, 2 KiB
 * 1.12, 1 KiB 1.05; runs of 256 KiB 1.2 to 1.4, which is the speed of reading alone.
 */
#ifndef TC_COPY_H
#define TC_COPY_H
#include <stdint.h>
#include <string.h>

enum { TC_LONG_COPY = 1024 };

/* Look at the processor, unless portable kernels are asked for (kernel 0, as in crc32c.h). Once a process; before it, and where the
 * instruction is slow, copies are memcpy's. */
void tc_copy_init(int kernel);

/* Whether this processor copies past its caches; where not, tc_copy_pass changes nothing. */
int tc_copy_can_pass(void);

/* Have this thread's long copies, until tc_copy_end, pass the caches by on their way to memory, or not: for what a core of another cache reads
 * next (distance.h), for 128 KiB came from that cache at 3 GB/s and from memory at 26. Not for what the thread itself reads again at once: a buffer
 * of 4 KiB took five times as long. Returns whether they did before. */
int tc_copy_pass(int on);

/* Before others are told of what this thread has copied: what passed the caches by is then there. Its copies pass them no more. */
void tc_copy_end(void);

void tc_copy_long(uint8_t *to, const uint8_t *from, size_t n_bytes);

static inline void tc_copy(uint8_t *to, const uint8_t *from, size_t n_bytes) {
    if (n_bytes < TC_LONG_COPY) memcpy(to, from, n_bytes);
    else tc_copy_long(to, from, n_bytes);
}

#endif
