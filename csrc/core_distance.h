#ifndef TC_CORE_DISTANCE_H
#define TC_CORE_DISTANCE_H
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

static inline uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}


/* Core distance: whether the thread that reads batches runs on a core that shares a cache with the thread that writes
 * them. A line that was just written takes about 40 ns to read within one cache, and 150 ns or more from a core with
 * another cache. A virtual machine does not expose its topology, and the host moves virtual processors between cores
 * within seconds, so the distance is measured: the writer writes a few lines from time to time, and the reader times
 * its reads of them. */
enum { TC_DISTANCE_LINES = 8, TC_DISTANCE_STRIDE = 4096 + 7 * 64 }; /* Lines with this distance do not fall into one set of a cache. */

typedef struct {
    _Alignas(4096) uint8_t memory[TC_DISTANCE_LINES * TC_DISTANCE_STRIDE];
    _Atomic uint64_t written_ns, n_measurements;
    _Atomic int step, is_far, score;
} tc_distance;

/* Reader: request that the writer writes the lines. They are requested shortly before they are read, because old lines
 * have left the caches. */
void tc_distance_request(tc_distance *distance);

/* Writer: write the lines, if the reader has requested it. */
void tc_distance_write(tc_distance *distance);

/* Reader: time the reads of the lines, if they were written since the request, and update the estimate. Takes at most
 * about 3 us. Lines that were written more than 1 ms ago are ignored: they have left all caches and would look far. */
void tc_distance_measure(tc_distance *distance);

/* Add one measurement: far (1) or near (0). To change a long-held estimate, seven more measurements of one kind than of
 * the other are needed. */
void tc_distance_add(tc_distance *distance, int is_far);

int tc_distance_is_far(const tc_distance *distance);

/* For tests: 0 idle, 1 requested, 2 written. */
int tc_distance_step(const tc_distance *distance);

/* For tests: report far (1) or near (0) for all distances, or what was measured (-1). */
void tc_distance_override(int is_far);


#endif
