#include "stores.h"

#include "steps.h"

enum {
    PLACED = 1024 * 1024, /* from here on two ways to copy between tensors are compared */
    EXPLORE = 64, /* every so many chunks the other way to write is tried */
    TRIALS = 16,  /* chunks at first take turns */
    IN_A_ROW = 4,
    UNTOUCHED = 4, /* and the very first count for nothing: touching a page costs more than either way */
};

static int class_of(size_t bytes) { return bytes < 64 * 1024 ? 0 : bytes < 256 * 1024 ? 1 : 2; }

static _Atomic uint32_t *cost_cell(cg_group *g, int reader, int writer, int class_, int way) {
    return &g->costs[(((size_t)reader * (size_t)g->n + (size_t)writer) * CG_CLASSES + (size_t)class_) * 2 + (size_t)way];
}

int cg_choose_way(cg_group *g, size_t bytes) {
#if !defined(__SSE2__)
    return 0; /* this processor's C library knows best */
#endif
    if (g->way >= 0) return g->way;
    if (bytes < CG_MEASURED) return 0;
    cg_choice *c = &g->choices[class_of(bytes)];
    float total[2];
    for (int way = 0; way < 2; way++) {
        uint32_t slowest = 0;
        for (int p = 0; p < g->n; p++) {
            uint32_t cost = p == g->me ? 0 : atomic_load_explicit(cost_cell(g, p, g->me, class_of(bytes), way), memory_order_relaxed);
            if (cost > slowest) slowest = cost;
        }
        total[way] = c->cost[way] + (float)slowest / 256;
    }
    int best = total[1] < total[0];
    if (++c->turn <= TRIALS) return c->turn & 1;
    return c->turn % EXPLORE == 0 ? !best : best;
}

/* A moving average that believes good news sooner than bad: whatever interrupts a copy only makes it longer. */
static float blend(float old, float now) {
    if (old == 0) return now;
    if (now < old) return (old + now) / 2;
    return old + ((now > 2 * old ? 2 * old : now) - old) / 8;
}

void cg_note_write(cg_group *g, size_t bytes, int way, int64_t ns) {
    if (bytes < CG_MEASURED || g->way >= 0) return;
    cg_choice *c = &g->choices[class_of(bytes)];
    if (c->turn > UNTOUCHED) c->cost[way] = blend(c->cost[way], (float)ns * 1024 / (float)bytes);
}

void cg_note_read(cg_group *g, int writer, size_t bytes, int way, int64_t ns) {
    if (bytes < CG_MEASURED || ++g->choices[class_of(bytes)].read <= UNTOUCHED) return;
    _Atomic uint32_t *cell = cost_cell(g, g->me, writer, class_of(bytes), way);
    float old = (float)atomic_load_explicit(cell, memory_order_relaxed) / 256;
    float now = blend(old, (float)ns * 1024 / (float)bytes);
    atomic_store_explicit(cell, (uint32_t)(now * 256) + 1, memory_order_relaxed);
}

void cg_note_reads(cg_group *g, size_t bytes, int64_t ns) {
    for (int p = 0; p < g->n; p++)
        if (p != g->me) cg_note_read(g, p, bytes, (int)cg_line_of(g, p, g->step)->streamed, ns / (g->n - 1));
}

/* NULL where nothing is compared, and results are written plainly. */
static cg_choice *landing_choice(cg_group *g, cg_choice *choices, const cg_block *into) {
    size_t bytes = cg_block_bytes(into);
    return bytes < PLACED || into->rows > 1 || g->way >= 0 ? NULL : &choices[class_of(bytes / 16)]; /* up to 4 MiB, and more */
}

/* What the other way left in the caches is in the way of this one at first: each is tried several times in a row, and the first ones do not
 * count. */
int cg_choose_landing(cg_group *g, cg_choice *choices, const cg_block *into) {
    cg_choice *c = landing_choice(g, choices, into);
    if (c == NULL) return 0;
    int best = c->cost[1] < c->cost[0], way = best;
    if (c->turn < 2 * TRIALS) way = c->turn / IN_A_ROW & 1;
    else if (c->turn % (IN_A_ROW * EXPLORE) < IN_A_ROW) way = !best;
    c->turn++;
    c->streak = way == c->last ? c->streak + 1 : 0;
    c->last = way;
    return way;
}

void cg_note_landing(cg_group *g, cg_choice *choices, const cg_block *into, int64_t ns) {
    cg_choice *c = landing_choice(g, choices, into);
    if (c == NULL || c->turn <= UNTOUCHED || c->streak < IN_A_ROW / 2) return;
    c->cost[c->last] = blend(c->cost[c->last], (float)ns * 1024 / (float)cg_block_bytes(into));
}

void cg_place(cg_group *g, const cg_block *into, const char *mine, size_t bytes) {
    int way = cg_choose_landing(g, g->placings, into);
    cg_stopwatch placing = cg_start(bytes);
    if (way == 0) cg_unpack(into, mine, 0, bytes);
    else cg_copy(into->base, mine, bytes, way);
    if (way) cg_stream_fence();
    cg_note_landing(g, g->placings, into, cg_stop(&placing));
}
