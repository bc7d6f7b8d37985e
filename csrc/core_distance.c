#include "core_distance.h"

#include <stddef.h>


/* FAR_NS is per line. The estimate changes only after several measurements agree (AGREE), because a thread may lose its
 * processor while it reads. */
enum { FAR_NS = 90, AGREE = 3, UNWRITTEN = 512, STALE_NS = 1000000 };

/* Each line is in a page of its own and names the next line to read. The hardware prefetches lines of one page: eight
 * lines of a far core then took 330 to 410 ns instead of 1,150, and those of a near core 100 to 140 ns instead of 270. */
static _Atomic uint32_t *line(tc_distance *distance, size_t number) {
    return (_Atomic uint32_t *)(distance->memory + number * TC_DISTANCE_STRIDE);
}

enum { IDLE, REQUESTED, WRITTEN };

static void go_to(tc_distance *distance, int step) { atomic_store_explicit(&distance->step, step, memory_order_release); }

int tc_distance_step(const tc_distance *distance) { return atomic_load_explicit(&distance->step, memory_order_acquire); }

void tc_distance_request(tc_distance *distance) {
    if (tc_distance_step(distance) == IDLE) go_to(distance, REQUESTED);
}

void tc_distance_write(tc_distance *distance) {
    if (tc_distance_step(distance) != REQUESTED) return;
    for (size_t i = 0; i < TC_DISTANCE_LINES; i++) atomic_store_explicit(line(distance, i), (uint32_t)(i + 3) % TC_DISTANCE_LINES, memory_order_relaxed);
    atomic_store_explicit(&distance->written_ns, now_ns(), memory_order_relaxed);
    go_to(distance, WRITTEN);
}

void tc_distance_add(tc_distance *distance, int is_far) {
    atomic_fetch_add_explicit(&distance->n_measurements, 1, memory_order_relaxed);
    int step = is_far ? 1 : -1, score = atomic_load_explicit(&distance->score, memory_order_relaxed);
    if (score * step < AGREE) atomic_store_explicit(&distance->score, score + step, memory_order_relaxed);
    else atomic_store_explicit(&distance->is_far, is_far, memory_order_relaxed);
}

static uint32_t read_line(tc_distance *distance, size_t number) { return atomic_load_explicit(line(distance, number), memory_order_relaxed); }

void tc_distance_measure(tc_distance *distance) {
    if (tc_distance_step(distance) != WRITTEN) return;
    uint32_t at = 0;
    /* Loads the page's address translation. */
    for (size_t i = 0; i < TC_DISTANCE_LINES; i++) at += *(volatile uint8_t *)((uint8_t *)line(distance, i) + UNWRITTEN);
    uint64_t before_ns = now_ns(), start_ns = now_ns(); /* The cost of reading the clock is subtracted. */
    for (size_t i = 0; i < TC_DISTANCE_LINES; i++) at = read_line(distance, at % TC_DISTANCE_LINES);
    /* Depends on the last line, so that the clock is read after it has arrived; the line's value adds 0. */
    uint64_t end_ns = now_ns() + at / TC_DISTANCE_LINES;
    if (start_ns < atomic_load_explicit(&distance->written_ns, memory_order_relaxed) + STALE_NS)
        tc_distance_add(distance, end_ns - start_ns > start_ns - before_ns + FAR_NS * TC_DISTANCE_LINES);
    go_to(distance, IDLE);
}

static _Atomic int overridden = -1;

void tc_distance_override(int is_far) { atomic_store_explicit(&overridden, is_far, memory_order_relaxed); }

int tc_distance_is_far(const tc_distance *distance) {
    int is_far = atomic_load_explicit(&overridden, memory_order_relaxed);
    return is_far >= 0 ? is_far : atomic_load_explicit(&distance->is_far, memory_order_relaxed);
}
