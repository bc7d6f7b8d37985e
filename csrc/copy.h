#ifndef TC_COPY_H
#define TC_COPY_H
/* Copies of 1 KiB and more from uncached memory to cached memory: rows and runs of rows from mapped shards to slots.
 *
 * The processor's string instruction (rep movsb) writes whole lines without reading them first. glibc's memcpy does not
 * use this instruction on AMD processors and reads the target lines. Measured on a Zen 4 with two threads from a mapped
 * file, relative to memcpy: random rows of 12 KiB 1.20, 4 KiB 1.17, 2 KiB 1.12, 1 KiB 1.05; runs of 256 KiB 1.2 to 1.4,
 * which is the speed of reading alone.
 */
#include <stdint.h>
#include <string.h>

enum { TC_LONG_COPY = 1024 };

/* Detect the processor's features, unless `kernel` is 0 (portable, as in crc32c.h). Call it once per process. Before
 * this call, and on processors with a slow string instruction, long copies use memcpy. */
void tc_copy_init(int kernel);

/* Whether this processor can copy with non-temporal stores. If not, tc_copy_pass has no effect. */
int tc_copy_has_nontemporal(void);

/* Turn non-temporal stores for this thread's long copies on or off, until tc_copy_end. Turn them on if a core with
 * another cache reads the data next (core_distance.h): measured, such a core read 128 KiB from the writer's cache at 3 GB/s
 * and from memory at 26 GB/s. Leave them off for data that this thread reads again at once: a 4 KiB buffer took five
 * times as long. Returns the previous setting. */
int tc_copy_set_nontemporal(int on);

/* End this thread's copies before other threads are told about the data: waits until non-temporal stores have reached
 * memory, and turns non-temporal stores off. */
void tc_copy_end(void);

void tc_copy_long(uint8_t *to, const uint8_t *from, size_t n_bytes);

static inline void tc_copy(uint8_t *to, const uint8_t *from, size_t n_bytes) {
    if (n_bytes < TC_LONG_COPY) memcpy(to, from, n_bytes);
    else tc_copy_long(to, from, n_bytes);
}


#endif
