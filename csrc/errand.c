#include "errand.h"

#include "copy.h"
#include "guard.h"
#include "runs.h"

/* Slices that take some 15 us: long beside the lock, short beside what two threads may then wait for each other. */
enum { LINE = 64, PREFETCH_LINES = 8, SLICE_BYTES = 128 << 10 };

tc_slice tc_errand_slice(tc_errand *errand) {
    tc_slice slice = {errand->begun, errand->begun};
    for (size_t n_bytes = 0; slice.stop < errand->n && n_bytes < SLICE_BYTES; slice.stop++) n_bytes += errand->refs[slice.stop].n_bytes + LINE;
    errand->begun = slice.stop;
    return slice;
}

/* The first lines of an object; the hardware follows by itself from there. */
static void prefetch(const tc_ref *ref) {
    for (size_t at = 0; at < ref->n_bytes && at < LINE * PREFETCH_LINES; at += LINE) __builtin_prefetch((const char *)(uintptr_t)ref->address + at, 0, 0);
}

int tc_errand_copy(const tc_errand *errand, tc_slice slice) {
    if (tc_guard_enter()) return TC_EIO;
    for (size_t i = slice.first; i < slice.stop; i++) ask_pages((const uint8_t *)(uintptr_t)errand->refs[i].address, errand->refs[i].n_bytes);
    for (size_t i = slice.first; i < slice.stop; i++) {
        if (i + 1 < errand->n) prefetch(&errand->refs[i + 1]);
        tc_copy((uint8_t *)errand->places[i], (const uint8_t *)(uintptr_t)errand->refs[i].address, errand->refs[i].n_bytes);
    }
    tc_guard_leave();
    return 0;
}
