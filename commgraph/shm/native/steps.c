#define _GNU_SOURCE
#include "steps.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

enum {
    PAGE = 4096,
};

/* Offsets of the parts in the memory of a group. */
typedef struct {
    size_t lines, costs, pairs, notes, slots, reduce_buffers, end;
} cg_map;

static cg_map map_of(int n, size_t slot_bytes) {
    size_t ranks = (size_t)n;
    cg_map m;
    m.lines = 0;
    m.costs = m.lines + ranks * 2 * sizeof(cg_line);
    m.pairs = cg_round_up(m.costs + ranks * ranks * CG_CLASSES * 2 * sizeof(uint32_t), CG_LINE);
    m.notes = m.pairs + 2 * ranks * CG_PAIR_ROWS * ranks * sizeof(uint64_t);
    m.slots = cg_round_up(m.notes + ranks * CG_NOTE_BYTES, PAGE);
    m.reduce_buffers = m.slots + ranks * 2 * slot_bytes;
    m.end = m.reduce_buffers + (n > 2 ? ranks * cg_reduce_buffer_bytes(slot_bytes) : 0); /* two ranks exchange through swapped slots (pipelined.c) */
    return m;
}

size_t cg_group_bytes(int n, size_t slot_bytes) { return map_of(n, slot_bytes).end; }

void cg_group_join(cg_group *g, cg_team *team, void *memory, size_t slot_bytes) {
    memset(g, 0, sizeof *g);
    cg_map m = map_of(team->n, slot_bytes);
    g->team = team;
    g->n = team->n;
    g->me = team->me;
    g->slot_bytes = slot_bytes;
    g->lines = (cg_line *)((char *)memory + m.lines);
    g->costs = (_Atomic uint32_t *)((char *)memory + m.costs);
    g->pairs = (uint64_t *)((char *)memory + m.pairs);
    g->notes = (char *)memory + m.notes;
    g->slots = (char *)memory + m.slots;
    g->reduce_buffers = (char *)memory + m.reduce_buffers;
    g->nontemporal = -1;
}

void cg_group_leave(cg_group *g) {
    free(g->regions);
    g->regions = NULL;
}

int cg_group_add_region(cg_group *g, char *base, size_t stride, size_t bytes) {
    if (g->n_regions == CG_MAX_REGIONS) return ENOSPC;
    cg_region *grown = realloc(g->regions, sizeof(cg_region) * (size_t)(g->n_regions + 1));
    if (grown == NULL) return ENOMEM;
    g->regions = grown;
    g->regions[g->n_regions++] = (cg_region){base, stride, bytes};
    return 0;
}

uint64_t cg_find_region(cg_group *g, const void *data, size_t bytes) {
    if (bytes <= CG_READ_IN_PLACE_FROM) return 0;
    for (int k = 0; k < g->n_regions; k++) {
        const char *mine = g->regions[k].base + (size_t)g->me * g->regions[k].stride, *at = data;
        if (at >= mine && at + bytes <= mine + g->regions[k].bytes)
            return (uint64_t)(k + 1) << WHERE_SHIFT | (uint64_t)(at - mine);
    }
    return 0;
}

char *cg_resolve(cg_group *g, int rank, uint64_t where) {
    cg_region *region = &g->regions[(where >> WHERE_SHIFT) - 1];
    return region->base + (size_t)rank * region->stride + (where & ((1ull << WHERE_SHIFT) - 1));
}

typedef struct {
    cg_group *g;
    uint32_t step;
    int next; /* the first rank that was not seen to arrive */
} arrival;

static int all_arrived(void *arg) {
    arrival *a = arg;
    for (; a->next < a->g->n; a->next++)
        if (atomic_load_explicit(&cg_line_of(a->g, a->next, a->step)->step, memory_order_acquire) != a->step) return 0;
    return 1;
}

static void arrive(cg_group *g) {
    atomic_store_explicit(&cg_line_of(g, g->me, g->step)->step, g->step, memory_order_release);
    cg_notify_all(g->team);
}

static int await(cg_group *g, const cg_call *call, int *who) {
    arrival a = {g, g->step, 0};
    int result = cg_wait(g->team, all_arrived, &a, CG_EVERYONE, 1, call->deadline, who);
    if (result == CG_TIMEOUT) *who = a.next;
    return result;
}

int cg_all_reduce_has_arrived(cg_group *g) {
    arrival a = {g, g->step, 0};
    return all_arrived(&a);
}

int cg_check_no_failure(cg_group *g, int *who) {
    int failed = cg_team_failed(g->team);
    if (failed < 0) return CG_OK;
    *who = failed;
    return CG_GONE;
}

void cg_begin(cg_group *g, const cg_call *call) {
    g->step++;
    if (call->call == 0) return; /* no rank may take a step of the build for its first call, which another one has begun already */
    /* A call of the coordinator may be several here: all are posted as the first of them. */
    _Atomic uint64_t *posted = &g->team->members[g->me].posted;
    if (atomic_load_explicit(posted, memory_order_relaxed) >> 8 != (call->call >> 8) + 1)
        atomic_store_explicit(posted, call->call + 256, memory_order_release);
}

void cg_announce(cg_group *g, const cg_call *call, uint64_t where, uint32_t rounds, int nontemporal) {
    cg_line *line = cg_line_of(g, g->me, g->step);
    line->tag = call->tag;
    line->where = where;
    line->rounds = rounds;
    line->nontemporal = (uint32_t)nontemporal;
    arrive(g);
    if (call->meanwhile != NULL) call->meanwhile(call->of);
}

int cg_agree(cg_group *g, const cg_call *call, int *who) {
    int result = await(g, call, who);
    /* A rank that arrived, and gave up before the last had arrived, has no result: then no rank has. */
    if (result == CG_OK) result = cg_check_no_failure(g, who);
    if (result != CG_OK) return result;
    for (int p = 0; p < g->n; p++) {
        if (cg_line_of(g, p, g->step)->tag != call->tag) {
            *who = p;
            return CG_MISMATCH;
        }
    }
    return CG_OK;
}

int cg_next_step(cg_group *g, const cg_call *call, int *who) {
    arrive(g);
    return await(g, call, who);
}

int cg_leave_together(cg_group *g, const cg_call *call, int *who) {
    g->step++;
    int result = cg_next_step(g, call, who);
    return result == CG_OK ? cg_check_no_failure(g, who) : result;
}

int cg_barrier(cg_group *g, const cg_call *call, int *who) {
    cg_begin(g, call);
    cg_announce(g, call, 0, 1, 0);
    return cg_agree(g, call, who);
}

int cg_ping_pong(cg_group *g, const cg_call *call, int rounds, double *ns, int *who) {
    int result = cg_barrier(g, call, who);
    if (result != CG_OK) return result;
    rounds = rounds / 2 * 2;
    int64_t started = cg_clock_ns();
    if (g->me < 2) {
        /* On the lines of the two ranks, by the numbers of later steps. */
        for (int i = 0; i < rounds; i++) {
            g->step++;
            if (g->me == 0) atomic_store_explicit(&cg_line_of(g, 0, g->step)->step, g->step, memory_order_release);
            for (int64_t spins = 0; atomic_load_explicit(&cg_line_of(g, 1 - g->me, g->step)->step, memory_order_acquire) != g->step; spins++) {
                if (spins > 20000) {
                    sched_yield(); /* the peer has no core */
                    *who = 1 - g->me;
                    if (cg_clock_ns() > call->deadline) return CG_TIMEOUT;
                }
            }
            if (g->me == 1) atomic_store_explicit(&cg_line_of(g, 1, g->step)->step, g->step, memory_order_release);
        }
    } else {
        /* An even number, so that this rank next arrives on the other line: on that of the barrier its arrival there may not have been seen
         * yet. */
        g->step += (uint32_t)rounds;
    }
    *ns = (double)(cg_clock_ns() - started) / (2.0 * rounds);
    g->step++;
    return cg_next_step(g, call, who);
}
