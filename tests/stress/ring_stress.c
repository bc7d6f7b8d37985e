/* Stress test of rings with random parameters, run under a sanitizer: every byte of every batch is compared, and every
 * batch that must fail does.
 *
 *   ring_stress SEED N_RUNS      prints what was wrong and exits with 1 in that case
 *
 * A run may have these faults: a page of a chunk with a wrong checksum, a mapped file that is truncated, a number that
 * does not fit its cast. A run may be closed at any time, and be taken from with short timeouts. Its slots may be released by other threads, and tensors over them may live longer than the consumer's
 * reference, or than the ring.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "cast.h"
#include "copy.h"
#include "crc32c.h"
#include "core_distance.h"
#include "sigbus_guard.h"
#include "slot.h"
#include "ring.h"
#include "dlpack.h"

enum { WIDTH = 5000, N_ROWS = 400, N_BLOCKS = 3, N_PLANS = 16, PAGE_BYTES = 65536 };
enum { N_PAGES = (WIDTH * N_ROWS + PAGE_BYTES - 1) / PAGE_BYTES };
enum { FIXED, VAR, CAST, REF, N_STREAMS };
enum { CUT_FROM_ROW = 250, CUT_BLOCK = 1, BAD_PAGE = 9, BAD_BLOCK = 2, MISFIT_BLOCK = 0, MISFIT_ROW = 77 };

#ifdef __SANITIZE_THREAD__ /* ThreadSanitizer does not support jumps out of a signal handler. */
enum { CAN_CUT = 0 };
#else
enum { CAN_CUT = 1 };
#endif

static uint8_t *fixed[N_BLOCKS], *cut, *var[N_BLOCKS];
static int64_t *offsets[N_BLOCKS], wide[N_BLOCKS][N_ROWS];
static uint32_t sums[N_BLOCKS][N_PAGES];
static uint8_t checked[N_BLOCKS][N_PAGES];
static tc_source sources[N_STREAMS * N_BLOCKS];
static tc_chunk chunks[N_STREAMS * N_BLOCKS];
static uint32_t block[N_PLANS][N_ROWS], row[N_PLANS][N_ROWS];
static tc_plan plans[N_PLANS];
static const tc_stream streams[N_STREAMS] = {
    {.kind = TC_FIXED, .width = WIDTH},
    {.kind = TC_VAR, .width = 1},
    {.kind = TC_FIXED, .from = TC_I64, .to = TC_I32, .width = 8},
    {.kind = TC_REF, .width = 1},
};

typedef struct {
    tc_ring *ring;
    size_t batch_rows, depth, n_threads;
    int is_cut, is_bad, is_misfit, close_us; /* close_us 0: runs to its end. */
    uint64_t timeout_ns;
} run;

static unsigned seed;

static size_t any(size_t n) { return (size_t)rand_r(&seed) % n; }

static void *random_bytes(size_t n) {
    uint8_t *bytes = aligned_alloc(64, (n + 63) / 64 * 64);
    for (size_t i = 0; i < n; i++) bytes[i] = (uint8_t)rand_r(&seed);
    return bytes;
}

/* Map a copy of block CUT_BLOCK in a file that is then truncated after row CUT_FROM_ROW. */
static void make_cut(void) {
    FILE *file = tmpfile();
    fwrite(fixed[CUT_BLOCK], 1, WIDTH * N_ROWS, file);
    fflush(file);
    cut = mmap(NULL, WIDTH * N_ROWS, PROT_READ, MAP_SHARED, fileno(file), 0);
    if (cut == MAP_FAILED || ftruncate(fileno(file), CUT_FROM_ROW * WIDTH / 4096 * 4096)) exit(2);
}

static void make_blocks(void) {
    for (size_t b = 0; b < N_BLOCKS; b++) {
        fixed[b] = random_bytes(WIDTH * N_ROWS);
        offsets[b] = calloc(N_ROWS + 1, sizeof *offsets[b]);
        for (size_t i = 0; i < N_ROWS; i++) {
            offsets[b][i + 1] = offsets[b][i] + (int64_t)any(6000);
            wide[b][i] = (int64_t)(b * N_ROWS + i);
        }
        var[b] = random_bytes((size_t)offsets[b][N_ROWS]);
        for (size_t p = 0; p < N_PAGES; p++) {
            size_t start = p * PAGE_BYTES, left = WIDTH * N_ROWS - start;
            sums[b][p] = tc_crc32c_run(0, 0, fixed[b] + start, left < PAGE_BYTES ? left : PAGE_BYTES);
        }
    }
    make_cut();
}

static void make_plans(const run *r) {
    for (size_t b = 0; b < N_BLOCKS; b++) {
        int is_cut = r->is_cut && b == CUT_BLOCK;
        sources[FIXED * N_BLOCKS + b] = (tc_source){.values = is_cut ? cut : fixed[b]};
        sources[VAR * N_BLOCKS + b] = sources[REF * N_BLOCKS + b] = (tc_source){var[b], offsets[b], (uint64_t)offsets[b][N_ROWS]};
        sources[CAST * N_BLOCKS + b] = (tc_source){.values = (const uint8_t *)wide[b]};
        chunks[FIXED * N_BLOCKS + b] = (tc_chunk){is_cut ? cut : fixed[b], WIDTH * N_ROWS, sums[b], is_cut ? NULL : checked[b]};
        memset(checked[b], 0, N_PAGES);
    }
    sums[BAD_BLOCK][BAD_PAGE] ^= (uint32_t)r->is_bad;
    wide[MISFIT_BLOCK][MISFIT_ROW] = r->is_misfit ? INT64_MAX : MISFIT_ROW;
    for (size_t p = 0; p < N_PLANS; p++) {
        int in_runs = any(2) == 0;
        for (size_t k = 0; k < N_ROWS; k++) {
            block[p][k] = (uint32_t)(in_runs ? p % N_BLOCKS : any(N_BLOCKS));
            row[p][k] = (uint32_t)(in_runs ? k : any(N_ROWS));
        }
        plans[p] = (tc_plan){.sources = sources, .chunks = any(2) || r->is_bad ? chunks : NULL, .n_blocks = N_BLOCKS, .block = block[p], .row = row[p],
                             .n_rows = N_ROWS};
    }
}

/* Whether a row must fail its batch with this status. */
static int must_fail(const run *r, uint32_t b, uint32_t i, int status) {
    size_t first = (size_t)i * WIDTH, last = first + WIDTH - 1;
    if (status == TC_EIO) return r->is_cut && b == CUT_BLOCK && last >= CUT_FROM_ROW * WIDTH / 4096 * 4096;
    if (status == TC_CORRUPT) return r->is_bad && b == BAD_BLOCK && first / PAGE_BYTES <= BAD_PAGE && last / PAGE_BYTES >= BAD_PAGE;
    return r->is_misfit && b == MISFIT_BLOCK && i == MISFIT_ROW;
}

static int status_is_right(const run *r, int status, size_t first, size_t n) {
    static const int failures[] = {TC_EIO, TC_CORRUPT, TC_MISFIT};
    int n_expected = 0, is_found = 0;
    for (size_t f = 0; f < 3; f++) {
        int fails = 0;
        for (size_t k = first; k < first + n; k++) fails |= must_fail(r, block[k / N_ROWS][k % N_ROWS], row[k / N_ROWS][k % N_ROWS], failures[f]);
        n_expected += fails;
        is_found |= fails && status == failures[f];
    }
    return n_expected ? is_found : status == TC_OK;
}

/* Check the objects of a batch's references, filled by a copy task that is finished or cancelled. */
static int copy_task_is_right(tc_slot *slot, size_t first) {
    const tc_ref *refs = (const tc_ref *)(slot->memory + slot->values_at[REF]);
    char **destinations = calloc(slot->n_rows, sizeof *destinations);
    for (size_t i = 0; i < slot->n_rows; i++) destinations[i] = malloc(refs[i].n_bytes + 1);
    tc_copy_task task = {.refs = refs, .destinations = destinations, .n = slot->n_rows};
    tc_ring_submit_copy(slot, &task);
    int is_right = 1, is_finished = any(4) && tc_ring_finish_copy(slot, &task) == TC_OK;
    tc_ring_cancel_copy(slot, &task);
    for (size_t i = 0; i < slot->n_rows; i++) {
        uint32_t b = block[(first + i) / N_ROWS][(first + i) % N_ROWS], k = row[(first + i) / N_ROWS][(first + i) % N_ROWS];
        size_t n_bytes = (size_t)(offsets[b][k + 1] - offsets[b][k]);
        if (is_finished && (refs[i].n_bytes != n_bytes || memcmp(destinations[i], var[b] + offsets[b][k], n_bytes))) is_right = 0;
        free(destinations[i]);
    }
    free(destinations);
    return is_right;
}

static int batch_is_right(const tc_slot *slot, size_t first) {
    const uint8_t *rows = slot->memory + slot->values_at[FIXED], *bytes = slot->memory + slot->values_at[VAR];
    const int64_t *ends = (const int64_t *)(slot->memory + slot->offsets_at[VAR]);
    const int32_t *numbers = (const int32_t *)(slot->memory + slot->values_at[CAST]);
    for (size_t i = 0; i < slot->n_rows; i++) {
        uint32_t b = block[(first + i) / N_ROWS][(first + i) % N_ROWS], k = row[(first + i) / N_ROWS][(first + i) % N_ROWS];
        int64_t n = offsets[b][k + 1] - offsets[b][k];
        if (memcmp(rows + i * WIDTH, fixed[b] + (size_t)k * WIDTH, WIDTH) || numbers[i] != (int32_t)(b * N_ROWS + k)) return 0;
        if (ends[i + 1] - ends[i] != n || memcmp(bytes + ends[i], var[b] + offsets[b][k], (size_t)n)) return 0;
    }
    return 1;
}

static void *push_all(void *argument) {
    run *r = argument;
    for (size_t p = 0; p < N_PLANS; p++) {
        uint64_t retired;
        if (tc_ring_wait_room(r->ring, p > 1 ? (p - 1) * N_ROWS : 0, &retired) || tc_ring_push(r->ring, &plans[p])) return NULL;
    }
    tc_ring_finish(r->ring, TC_END);
    return NULL;
}

static void *close_it(void *argument) {
    run *r = argument;
    nanosleep(&(struct timespec){0, r->close_us * 1000L}, NULL);
    tc_ring_close(r->ring);
    return NULL;
}

static void *release(void *slot) {
    tc_slot_release(slot);
    return NULL;
}

static pthread_t holder;
static int has_holder;

/* What a user does with a tensor of the FIXED stream: writes to it and drops it. Its first field is its address. */
static void *write_and_drop(void *tensor) {
    memset(*(uint8_t **)tensor, 0xee, WIDTH);
    tc_tensor_drop(tensor);
    return NULL;
}

static void end_holder(void) {
    if (has_holder) pthread_join(holder, NULL);
    has_holder = 0;
}

static void hold(tc_slot *slot) {
    static const tc_row_type rows = {.code = 1, .bits = 8, .n_dims = 1, .dims = {WIDTH}, .row_bytes = WIDTH};
    end_holder();
    void *tensor = tc_tensor_new(slot, slot->values_at[FIXED], &rows, slot->n_rows);
    if (tensor == NULL || pthread_create(&holder, NULL, write_and_drop, tensor)) exit(2);
    has_holder = 1;
}

/* Take all batches, and sometimes keep a slot. Returns the final status, or -1 if anything was wrong. */
static int take_all(run *r) {
    tc_slot *slot, *kept = NULL;
    uint64_t first;
    size_t n_taken = 0, n_batches = 0, total = N_PLANS * N_ROWS;
    int status;
    for (;;) {
        while ((status = tc_ring_take(r->ring, r->timeout_ns, &slot, &first)) == TC_TIMEOUT) {}
        if (status == TC_END || status == TC_CLOSED) break;
        size_t n = total - n_taken < r->batch_rows ? total - n_taken : r->batch_rows;
        int is_right = first == n_taken && n_taken + n <= total && status_is_right(r, status, n_taken, n);
        if (status == TC_OK) {
            is_right = is_right && slot->n_rows == n && batch_is_right(slot, n_taken) && copy_task_is_right(slot, n_taken);
            if (any(3) == 0) hold(slot);
            pthread_t other;
            if (any(3) == 0 && pthread_create(&other, NULL, release, slot) == 0) pthread_join(other, NULL);
            else if (any(3) == 0 && kept == NULL) kept = slot;
            else tc_slot_release(slot);
        }
        if (!is_right) return printf("batch %zu of row %zu: status %d\n", n_batches, n_taken, status), -1;
        n_taken += n;
        n_batches++;
    }
    if (status == TC_END && n_taken != total) return printf("%zu of %zu rows\n", n_taken, total), -1;
    tc_ring_close(r->ring);
    if (kept) tc_slot_release(kept);
    return status;
}

static void choose(run *r) {
    static const size_t batch_rows[] = {1, 7, 100, 256, 399, 1000};
    *r = (run){.batch_rows = batch_rows[any(6)], .depth = 1 + any(4), .n_threads = 1 + any(4)};
    r->is_cut = CAN_CUT && any(3) == 0;
    r->is_bad = any(3) == 0;
    r->is_misfit = any(3) == 0;
    r->close_us = any(3) == 0 ? 1 + (int)any(3000) : 0;
    r->timeout_ns = any(2) ? 1000 : 2000000000u;
}

static int is_right(run *r) {
    pthread_t planner, closer;
    make_plans(r);
    tc_lent_memory lent = {NULL, 0, NULL, NULL};
    size_t slot_bytes = any(2) ? r->batch_rows * WIDTH : 0;
    if (any(3) == 0) {
        slot_bytes = (r->batch_rows * WIDTH / (1 + any(2)) + 64) & ~(size_t)63; /* Too small for some batches. */
        lent.n_bytes = slot_bytes * (1 + any(6));
        lent.memory = aligned_alloc(64, lent.n_bytes);
        lent.drop = free;
        lent.owner = lent.memory;
    }
    r->ring = tc_ring_new(streams, N_STREAMS, r->batch_rows, r->depth, r->n_threads, slot_bytes, &lent);
    if (r->ring == NULL || pthread_create(&planner, NULL, push_all, r)) exit(2);
    if (r->close_us && pthread_create(&closer, NULL, close_it, r)) exit(2);
    int status = take_all(r);
    if (r->close_us) pthread_join(closer, NULL);
    tc_ring_close(r->ring);
    pthread_join(planner, NULL);
    tc_ring_drop(r->ring);
    end_holder();
    sums[BAD_BLOCK][BAD_PAGE] ^= (uint32_t)r->is_bad;
    return status == TC_END || (status == TC_CLOSED && r->close_us);
}

int main(int count, char **words) {
    static run r;
    if (count != 3) return 2;
    seed = (unsigned)atoi(words[1]);
    tc_gather_init(0);
    if (seed % 2) tc_copy_init(1); /* The processor's fastest copies, which sanitizers do not see. */
    make_blocks();
    tc_arena_keep();
    for (int i = 0; i < atoi(words[2]); i++) {
        choose(&r);
        tc_distance_override((int)any(3) - 1);
        if (is_right(&r)) continue;
        printf("run %d: batches of %zu, depth %zu, %zu threads, cut %d, bad %d, misfit %d, closed after %d us\n", i, r.batch_rows,
               r.depth, r.n_threads, r.is_cut, r.is_bad, r.is_misfit, r.close_us);
        return 1;
    }
    tc_arena_let_go();
    return tc_live_batch_bytes() ? printf("%zu bytes are held\n", tc_live_batch_bytes()), 1 : 0;
}
