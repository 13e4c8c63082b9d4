#include "zero_copy.h"

#include <sched.h>

#include "cma.h"

enum { SHIFT = 24, PATIENCE_NS = 1000000000 };
/* The outcome of an offer, in place of a count of chunks: the reader has all of the part, or gets nothing. */
#define ALL 0xFFFFFFull
#define NONE 0xFFFFFEull
#define COUNT 0xFFFFFFull

static uint64_t load_acquire(_Atomic uint64_t *word) { return atomic_load_explicit(word, memory_order_acquire); }
static int change_state(const cg_side *side, uint64_t *old, uint64_t new) {
    return atomic_compare_exchange_strong_explicit(&side->shared->state, old, new, memory_order_acq_rel, memory_order_acquire);
}
static size_t chunks_of(const cg_side *side, size_t bytes) { return (bytes + side->chunk - 1) / side->chunk; }
static uint64_t pushed_of(const cg_side *side, uint64_t number) {
    uint64_t pushed = load_acquire(&side->shared->pushed);
    return pushed >> SHIFT == number ? pushed & COUNT : 0;
}
static int is_over(uint64_t state, uint64_t number) { return state >> SHIFT != number || (state & COUNT) >= NONE; }

/* Argument of the conditions that the two sides wait for. */
typedef struct {
    const cg_side *side;
    uint64_t number;
    size_t chunks;
    unsigned mine;
} progress;

static int is_opened(void *arg) {
    progress *p = arg;
    return load_acquire(&p->side->shared->state) >> SHIFT >= p->number;
}

static int is_decided(void *arg) {
    progress *p = arg;
    return is_over(load_acquire(&p->side->shared->state), p->number);
}

static int is_complete(void *arg) {
    progress *p = arg;
    return pushed_of(p->side, p->number) + p->mine >= p->chunks || is_decided(p);
}

/* Claims the next chunk. 0 if there is none. */
static int claim_chunk(const progress *p, size_t *chunk) {
    uint64_t state = load_acquire(&p->side->shared->state);
    do {
        if (is_over(state, p->number) || (state & COUNT) >= p->chunks) return 0;
        *chunk = (size_t)(state & COUNT);
    } while (!change_state(p->side, &state, state + 1));
    return 1;
}

/* Claims and copies chunks while there are any. `there`: address of the part in the other process; `here`: in this one. */
static int copy_chunks(progress *p, char *here, uint64_t there, size_t bytes, int direction) {
    const cg_side *side = p->side;
    int result = CG_OK;
    if (side->team->pause != NULL) side->team->pause(side->team);
    for (size_t chunk; result == CG_OK && claim_chunk(p, &chunk);) {
        size_t at = chunk * side->chunk, some = bytes - at < side->chunk ? bytes - at : side->chunk;
        cg_block block = {here + at, 1, some, some};
        p->mine++; /* also if the copy fails: then neither side copies it */
        if (!cg_cma_copy(side->team, side->peer, &block, there + at, direction)) result = cg_cma_why();
        else if (direction == CG_CMA_WRITE) atomic_store_explicit(&side->shared->pushed, p->number << SHIFT | p->mine, memory_order_release);
        if (result == CG_OK && cg_team_left(side->team)) result = CG_SELF;
    }
    if (side->team->resume != NULL) side->team->resume(side->team);
    return result;
}

/* The result where the memory of the peer's process could not be accessed. */
static int result_of_lost_peer(const cg_side *side, int *who) {
    int result = cg_team_lost(side->team, who);
    if (result == CG_OK || *who != side->peer) *who = side->peer, result = CG_GONE;
    return result;
}

int cg_zero_copy_withdraw(const cg_side *side, uint64_t number) {
    uint64_t state = load_acquire(&side->shared->state);
    do {
        if (state >> SHIFT > number) return 0; /* the reader has it, and has opened the next part of the same record */
        if (state >> SHIFT == number && (state & COUNT) >= NONE) return (state & COUNT) == NONE;
    } while (!change_state(side, &state, number << SHIFT | NONE));
    cg_notify_bell(side->team->theirs);
    return 1;
}

int cg_zero_copy_send(const cg_side *side, uint64_t number, const void *from, size_t bytes, int64_t deadline, int *who) {
    progress p = {side, number, chunks_of(side, bytes), 0};
    *who = side->peer;
    int result = cg_wait(side->team, is_opened, &p, side->peer, 0, deadline, who);
    if (result == CG_OK) {
        uint64_t to = atomic_load_explicit(&side->shared->to, memory_order_relaxed);
        if (to != 0) result = copy_chunks(&p, (char *)from, to, bytes, CG_CMA_WRITE);
        cg_notify_bell(side->team->theirs);
    }
    if (result == CG_OK) result = cg_wait(side->team, is_decided, &p, side->peer, 0, deadline, who);
    uint64_t state = load_acquire(&side->shared->state);
    /* The reader opens the next part of the same record once it has this one. */
    if (state >> SHIFT > number || state == (number << SHIFT | ALL)) return CG_OK;
    if (result == CG_OK) {
        *who = side->peer;
        return CG_GONE;
    }
    if (!cg_zero_copy_withdraw(side, number)) return CG_OK;
    return result == CG_GONE && *who == side->peer ? result_of_lost_peer(side, who) : result;
}

int cg_zero_copy_receive(const cg_side *side, uint64_t number, uint64_t from, void *to, size_t bytes, unsigned *mine, int64_t deadline, int *who) {
    cg_zero_copy *shared = side->shared;
    if (*mine == CG_UNOPENED) {
        uint64_t state = load_acquire(&shared->state);
        atomic_store_explicit(&shared->to, cg_cma_can_access(side->team, to) ? (uint64_t)(uintptr_t)to : 0, memory_order_relaxed);
        /* Before the offer is open only the writer changes the state: to give up. */
        if (state >> SHIFT >= number || !change_state(side, &state, number << SHIFT)) return CG_RESTART;
        *mine = 0;
        cg_notify_bell(side->team->theirs);
    }
    progress p = {side, number, chunks_of(side, bytes), *mine};
    int result = copy_chunks(&p, to, from, bytes, CG_CMA_READ);
    *mine = p.mine;
    if (result == CG_GONE) return is_decided(&p) ? CG_RESTART : result_of_lost_peer(side, who);
    *who = side->peer;
    if (result == CG_OK) result = cg_wait(side->team, is_complete, &p, side->peer, 0, deadline, who);
    if (result != CG_OK) return result;
    uint64_t state = number << SHIFT | p.chunks;
    if (!change_state(side, &state, number << SHIFT | ALL)) return CG_RESTART;
    cg_notify_bell(side->team->theirs);
    return CG_OK;
}

int cg_zero_copy_revoke(const cg_side *side, uint64_t number, unsigned mine) {
    uint64_t state = load_acquire(&side->shared->state);
    do {
        if (is_over(state, number)) return 1; /* a writer that gives up is not in the middle of a chunk */
    } while (!change_state(side, &state, number << SHIFT | NONE));
    cg_notify_bell(side->team->theirs);
    /* Waits for the chunks that the writer has claimed and not yet copied: one at most. */
    for (int64_t until = cg_clock_ns() + PATIENCE_NS; pushed_of(side, number) + mine < (state & COUNT); sched_yield())
        if (cg_clock_ns() > until) return 0;
    return 1;
}
