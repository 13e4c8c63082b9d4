#include "nontemporal.h"

#include "steps.h"

enum {
    OUTPUT_FROM = 1024 * 1024, /* bytes from which the stores into an output are chosen by measurement */
    EXPLORE = 64,   /* every so many chunks the slower kind is tried again */
    TRIALS = 16,    /* first chunks, which take either kind in turn */
    IN_A_ROW = 4,   /* chunks of one kind before a change, for outputs */
    UNTOUCHED = 4,  /* very first chunks, which are not recorded: touching a new page costs more than either kind */
};

static int chunk_class(size_t bytes) { return bytes < 64 * 1024 ? 0 : bytes < 256 * 1024 ? 1 : 2; }

static _Atomic uint32_t *cost_cell(cg_group *g, int reader, int writer, int class_, int nontemporal) {
    return &g->costs[(((size_t)reader * (size_t)g->n + (size_t)writer) * CG_CLASSES + (size_t)class_) * 2 + (size_t)nontemporal];
}

int cg_choose_stores(cg_group *g, size_t bytes) {
#if !defined(__SSE2__)
    return 0; /* memcpy of this processor's C library chooses for itself */
#endif
    if (g->nontemporal >= 0) return g->nontemporal;
    if (bytes < CG_MEASURED) return 0;
    cg_choice *c = &g->slot_choices[chunk_class(bytes)];
    float total[2];
    for (int nontemporal = 0; nontemporal < 2; nontemporal++) {
        uint32_t slowest = 0;
        for (int p = 0; p < g->n; p++) {
            uint32_t cost = p == g->me ? 0 : atomic_load_explicit(cost_cell(g, p, g->me, chunk_class(bytes), nontemporal), memory_order_relaxed);
            if (cost > slowest) slowest = cost;
        }
        total[nontemporal] = c->cost[nontemporal] + (float)slowest / 256;
    }
    int best = total[1] < total[0];
    if (++c->turn <= TRIALS) return c->turn & 1;
    return c->turn % EXPLORE == 0 ? !best : best;
}

/* A moving average that follows decreases faster than increases: an interrupted copy only takes longer. */
static float blend(float old, float now) {
    if (old == 0) return now;
    if (now < old) return (old + now) / 2;
    return old + ((now > 2 * old ? 2 * old : now) - old) / 8;
}

void cg_note_write(cg_group *g, size_t bytes, int nontemporal, int64_t ns) {
    if (bytes < CG_MEASURED || g->nontemporal >= 0) return;
    cg_choice *c = &g->slot_choices[chunk_class(bytes)];
    if (c->turn > UNTOUCHED) c->cost[nontemporal] = blend(c->cost[nontemporal], (float)ns * 1024 / (float)bytes);
}

void cg_note_read(cg_group *g, int writer, size_t bytes, int nontemporal, int64_t ns) {
    if (bytes < CG_MEASURED || ++g->slot_choices[chunk_class(bytes)].read <= UNTOUCHED) return;
    _Atomic uint32_t *cell = cost_cell(g, g->me, writer, chunk_class(bytes), nontemporal);
    float old = (float)atomic_load_explicit(cell, memory_order_relaxed) / 256;
    float now = blend(old, (float)ns * 1024 / (float)bytes);
    atomic_store_explicit(cell, (uint32_t)(now * 256) + 1, memory_order_relaxed);
}

void cg_note_reads(cg_group *g, size_t bytes, int64_t ns) {
    for (int p = 0; p < g->n; p++)
        if (p != g->me) cg_note_read(g, p, bytes, (int)cg_line_of(g, p, g->step)->nontemporal, ns / (g->n - 1));
}

/* NULL where nothing is measured, and the output is written by plain stores. */
static cg_choice *output_choice(cg_group *g, cg_choice *choices, const cg_block *into) {
    size_t bytes = cg_block_bytes(into);
    return bytes < OUTPUT_FROM || into->rows > 1 || g->nontemporal >= 0 ? NULL : &choices[chunk_class(bytes / 16)]; /* up to 4 MiB, and more */
}

/* The lines that one kind of store leaves in the caches slow down the other kind at first: each is tried several times in a row, and the
 * first times are not recorded. */
int cg_choose_output_stores(cg_group *g, cg_choice *choices, const cg_block *into) {
    cg_choice *c = output_choice(g, choices, into);
    if (c == NULL) return 0;
    int best = c->cost[1] < c->cost[0], nontemporal = best;
    if (c->turn < 2 * TRIALS) nontemporal = c->turn / IN_A_ROW & 1;
    else if (c->turn % (IN_A_ROW * EXPLORE) < IN_A_ROW) nontemporal = !best;
    c->turn++;
    c->streak = nontemporal == c->last ? c->streak + 1 : 0;
    c->last = nontemporal;
    return nontemporal;
}

void cg_note_output(cg_group *g, cg_choice *choices, const cg_block *into, int64_t ns) {
    cg_choice *c = output_choice(g, choices, into);
    if (c == NULL || c->turn <= UNTOUCHED || c->streak < IN_A_ROW / 2) return;
    c->cost[c->last] = blend(c->cost[c->last], (float)ns * 1024 / (float)cg_block_bytes(into));
}

void cg_copy_own(cg_group *g, const cg_block *into, const char *mine, size_t bytes) {
    int nontemporal = cg_choose_output_stores(g, g->own_choices, into);
    cg_stopwatch copying = cg_start(bytes);
    if (nontemporal == 0) cg_unpack(into, mine, 0, bytes);
    else cg_copy(into->base, mine, bytes, nontemporal);
    if (nontemporal) cg_store_fence();
    cg_note_output(g, g->own_choices, into, cg_stop(&copying));
}
