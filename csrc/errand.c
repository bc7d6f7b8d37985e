#include "errand.h"

#include "ask.h"
#include "copy.h"
#include "guard.h"

/* Copying a slice takes about 15 us: long compared with taking the lock, and short compared with the time that two
 * threads may then wait for each other. */
enum { SLICE_BYTES = 128 << 10 };

tc_slice tc_errand_slice(tc_errand *errand) {
    tc_slice slice = {errand->begun, errand->begun};
    for (size_t n_bytes = 0; slice.stop < errand->n && n_bytes < SLICE_BYTES; slice.stop++) n_bytes += errand->refs[slice.stop].n_bytes + LINE;
    errand->begun = slice.stop;
    return slice;
}

static inline void ask_object(const tc_ref *ref) { ask_row((const uint8_t *)(uintptr_t)ref->address, ref->n_bytes); }

int tc_errand_copy(const tc_errand *errand, tc_slice slice) {
    if (tc_guard_enter()) return TC_EIO;
    if (slice.first < slice.stop) ask_object(&errand->refs[slice.first]);
    for (size_t i = slice.first; i < slice.stop; i++) {
        if (i + 1 < errand->n) ask_object(&errand->refs[i + 1]);
        tc_copy((uint8_t *)errand->places[i], (const uint8_t *)(uintptr_t)errand->refs[i].address, errand->refs[i].n_bytes);
    }
    tc_guard_leave();
    return 0;
}
