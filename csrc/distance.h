/* Distance: whether what one thread writes is far from the one that reads it. Between cores of one cache a line that was just written takes some
 * 40 ns to come, from a core of another 150 and more. Which of the two holds is nowhere to be read in a virtual machine, whose host moves its
 * processors as it likes: within seconds here. So the writer writes some lines now and then, and the reader takes the time of reading them. */
#ifndef TC_DISTANCE_H
#define TC_DISTANCE_H
#include <stdatomic.h>
#include <stdint.h>

enum { TC_DISTANCE_LINES = 8, TC_DISTANCE_STRIDE = 4096 + 7 * 64 }; /* not in one set of a cache */

typedef struct {
    _Alignas(4096) uint8_t memory[TC_DISTANCE_LINES * TC_DISTANCE_STRIDE];
    _Atomic uint64_t marked_ns, n_answers;
    _Atomic int step, is_far, score;
} tc_distance;

/* The reader's, now and then: have the lines written. Written long before they are read they would have left the caches. */
void tc_distance_ask(tc_distance *distance);

/* The writer's: write the lines, if that was asked for. */
void tc_distance_mark(tc_distance *distance);

/* The reader's: read them, if they were written since, and learn from it; at most some 3 us. Not what was written more than a millisecond before:
 * out of all caches by then, it would look far. */
void tc_distance_look(tc_distance *distance);

/* An answer: the other core was found far, or near. It takes seven more of one sort than of the other to change what is held true for long. */
void tc_distance_learn(tc_distance *distance, int is_far);

int tc_distance_is_far(const tc_distance *distance);

/* For tests: 0 idle, 1 asked for, 2 written. */
int tc_distance_step(const tc_distance *distance);

/* For tests: all are far (1), near (0), or as they are (-1). */
void tc_distance_pretend(int is_far);

#endif
