#define _GNU_SOURCE
#include "collective.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

enum {
    PAGE = 4096,
    /* Bytes that all ranks together reduce in one step, each everything: beyond, each reduces its share in a step of its own. */
    ONE_SHOT = 512 * 1024,
    /* Of a tensor that goes through the slots at once: what the ranks then touch stays in their second caches. */
    REDUCE_CHUNK = 512 * 1024,
    /* Reduced at once, so that it is still in the first cache where it is copied on. */
    REDUCE_BLOCK = 16 * 1024,
    /* From here on a piece is read where it lies, if it can be: one copy and a step more in place of two copies. */
    REACHED = 64 * 1024,
    SPLIT = 512 * 1024,   /* from here on giver and receivers share the work of a broadcast */
    PLACED = 1024 * 1024, /* from here on two ways to copy between tensors are compared */
    /* Below this a slot is always written plainly, and nothing is measured. */
    MEASURED = 16 * 1024,
    EXPLORE = 64, /* every so many chunks the other way to write is tried */
    TRIALS = 16,  /* chunks at first take turns */
    UNTOUCHED = 4, /* and the very first count for nothing: touching a page costs more than either way */
};
/* Where a tensor lies: (1 + region) << 44 | offset in shared memory, or an address of its rank's with the highest bit set. */
#define WHERE_SHIFT 44
#define WHERE_ADDRESS (1ull << 63)

static size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }
static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

/* Offsets of the parts in the memory of a group. */
typedef struct {
    size_t lines, costs, pairs, notes, slots, shares, end;
} cg_map;

/* What one rank puts at once into what changes hands (`two_shot`). */
static size_t share_bytes(size_t slot_bytes) { return smaller(slot_bytes, REDUCE_CHUNK); }

static cg_map map_of(int n, size_t slot_bytes) {
    size_t ranks = (size_t)n;
    cg_map m;
    m.lines = 0;
    m.costs = m.lines + ranks * 2 * sizeof(cg_line);
    m.pairs = round_up(m.costs + ranks * ranks * CG_CLASSES * 2 * sizeof(uint32_t), CG_LINE);
    m.notes = m.pairs + 2 * ranks * CG_PAIR_ROWS * ranks * sizeof(uint64_t);
    m.slots = round_up(m.notes + ranks * CG_NOTE_BYTES, PAGE);
    m.shares = m.slots + ranks * 2 * slot_bytes;
    m.end = m.shares + ranks * share_bytes(slot_bytes);
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
    g->shares = (char *)memory + m.shares;
    g->way = -1;
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

/* Memory that one rank writes and one other reads is written by that other the next time: it has the cache lines by then, which its processor
 * would otherwise ask back from the first one's. `turned`: the second time of the two. */
static int turned(uint32_t step) { return step >> 1 & 1; }

static char *slot_at(cg_group *g, int place, uint32_t step) { return g->slots + ((size_t)place * 2 + (step & 1)) * g->slot_bytes; }
static char *shares_of(cg_group *g, int rank) { return g->shares + (size_t)rank * share_bytes(g->slot_bytes); }
/* What all others read. Of two ranks there is one other. */
static char *slot_of(cg_group *g, int rank, uint32_t step) { return slot_at(g, g->n == 2 && turned(step) ? 1 - rank : rank, step); }
/* What only rank `to` reads, in parts of `each` bytes. */
static char *part_of(cg_group *g, int from, int to, size_t each, uint32_t step) {
    return turned(step) ? slot_at(g, to, step) + (size_t)from * each : slot_at(g, from, step) + (size_t)to * each;
}
static cg_line *line_of(cg_group *g, int rank, uint32_t step) { return &g->lines[rank * 2 + (step & 1)]; }

/* Where these bytes of this rank lie in a shared region, 0 if they do not. */
static uint64_t find_region(cg_group *g, const void *data, size_t bytes) {
    for (int k = 0; k < g->n_regions; k++) {
        const char *mine = g->regions[k].base + (size_t)g->me * g->regions[k].stride, *at = data;
        if (at >= mine && at + bytes <= mine + g->regions[k].bytes)
            return (uint64_t)(k + 1) << WHERE_SHIFT | (uint64_t)(at - mine);
    }
    return 0;
}

static char *resolve(cg_group *g, int rank, uint64_t where) {
    cg_region *region = &g->regions[(where >> WHERE_SHIFT) - 1];
    return region->base + (size_t)rank * region->stride + (where & ((1ull << WHERE_SHIFT) - 1));
}

/* Memory of this rank's as the others reach it; 0 where they do not. It is this rank that asks, since only this one can stage it in place of
 * that. */
static uint64_t reachable(cg_group *g, const void *data) {
    return cg_is_reachable(g->team, data) ? WHERE_ADDRESS | (uint64_t)(uintptr_t)data : 0;
}

/* Where the others can read these bytes of this rank for themselves, 0 if they are better staged. */
static uint64_t readable(cg_group *g, const void *data, size_t bytes) {
    uint64_t where = g->n_regions && bytes > MEASURED ? find_region(g, data, bytes) : 0;
    return where == 0 && g->reach_from && bytes >= g->reach_from ? reachable(g, data) : where;
}

static int reach(cg_group *g, int rank, const cg_block *block, uint64_t where, int direction, int *who) {
    if (cg_reach(g->team, rank, block, where & ~WHERE_ADDRESS, direction)) return CG_OK;
    /* It has died, or has given up on the call and gone on. */
    int result = cg_team_lost(g->team, who);
    if (result == CG_OK) *who = rank;
    return result == CG_OK ? CG_GONE : result;
}

/* All of a piece that its rank has not staged. */
static int read_there(cg_group *g, int rank, uint64_t where, const cg_block *into, int *who) {
    if (where & WHERE_ADDRESS) return reach(g, rank, into, where, CG_PULL, who);
    cg_unpack(into, resolve(g, rank, where), 0, cg_block_bytes(into));
    return CG_OK;
}

/* Steps. */

typedef struct {
    cg_group *g;
    uint32_t step;
    int next; /* the first whose line was not seen yet */
} arrival;

static int all_arrived(void *arg) {
    arrival *a = arg;
    for (; a->next < a->g->n; a->next++)
        if (atomic_load_explicit(&line_of(a->g, a->next, a->step)->step, memory_order_acquire) != a->step) return 0;
    return 1;
}

static void arrive(cg_group *g) {
    atomic_store_explicit(&line_of(g, g->me, g->step)->step, g->step, memory_order_release);
    cg_notify_all(g->team);
}

static int await(cg_group *g, const cg_call *call, int *who) {
    arrival a = {g, g->step, 0};
    int result = cg_wait(g->team, all_arrived, &a, CG_EVERYONE, 1, call->deadline, who);
    if (result == CG_TIMEOUT) *who = a.next;
    return result;
}

/* The first step of a call: its line says what is called. */
static void announce(cg_group *g, const cg_call *call, uint64_t bytes, uint64_t where, uint32_t rounds, int streamed) {
    cg_line *line = line_of(g, g->me, g->step);
    line->tag = call->tag;
    line->bytes = bytes;
    line->where = where;
    line->rounds = rounds;
    line->streamed = (uint32_t)streamed;
    line->call = call->call;
    arrive(g);
}

static void begin(cg_group *g, const cg_call *call) {
    g->step++;
    /* A call of the coordinator may be several here (`empty`): they go by the first of them. */
    _Atomic uint64_t *posted = &g->team->seats[g->me].posted;
    if (atomic_load_explicit(posted, memory_order_relaxed) >> 8 != (call->call >> 8) + 1)
        atomic_store_explicit(posted, call->call + 256, memory_order_release);
}

/* Waits for the first step of the others, and compares. */
static int agree(cg_group *g, const cg_call *call, int *who) {
    int result = await(g, call, who);
    if (result != CG_OK) return result;
    /* One that was here, and gave up before the last had come, has no result: then nobody has. */
    int failed = cg_team_failed(g->team);
    if (failed >= 0) {
        *who = failed;
        return CG_GONE;
    }
    for (int p = 0; p < g->n; p++) {
        if (line_of(g, p, g->step)->tag != call->tag) {
            *who = p;
            return CG_MISMATCH;
        }
    }
    return CG_OK;
}

static int next_step(cg_group *g, const cg_call *call, int *who) {
    arrive(g);
    return await(g, call, who);
}

/* Plain or streaming stores.
 *
 * Which are faster depends on where the ranks run: where they share a cache plain ones stay in it, across caches they have to be
 * fetched from another. It is the writer's choice alone, since a reader does not see the difference. So each writer compares what
 * writing costs it, and what reading costs its slowest reader, which the readers leave in shared memory. */

static int class_of(size_t bytes) { return bytes < 64 * 1024 ? 0 : bytes < 256 * 1024 ? 1 : 2; }

static _Atomic uint32_t *cost_cell(cg_group *g, int reader, int writer, int class_, int way) {
    return &g->costs[(((size_t)reader * (size_t)g->n + (size_t)writer) * CG_CLASSES + (size_t)class_) * 2 + (size_t)way];
}

static int choose_way(cg_group *g, size_t bytes) {
#if !defined(__SSE2__)
    return 0; /* this processor's C library knows best */
#endif
    if (g->way >= 0) return g->way;
    if (bytes < MEASURED) return 0;
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

static void note_write(cg_group *g, size_t bytes, int way, int64_t ns) {
    if (bytes < MEASURED || g->way >= 0) return;
    cg_choice *c = &g->choices[class_of(bytes)];
    if (c->turn > UNTOUCHED) c->cost[way] = blend(c->cost[way], (float)ns * 1024 / (float)bytes);
}

static void note_read(cg_group *g, int writer, size_t bytes, int way, int64_t ns) {
    if (bytes < MEASURED || g->choices[class_of(bytes)].turn <= UNTOUCHED) return;
    _Atomic uint32_t *cell = cost_cell(g, g->me, writer, class_of(bytes), way);
    float old = (float)atomic_load_explicit(cell, memory_order_relaxed) / 256;
    float now = blend(old, (float)ns * 1024 / (float)bytes);
    atomic_store_explicit(cell, (uint32_t)(now * 256) + 1, memory_order_relaxed);
}

/* The same where all others were read at once. */
static void note_reads(cg_group *g, size_t bytes, int64_t ns) {
    for (int p = 0; p < g->n; p++)
        if (p != g->me) note_read(g, p, bytes, (int)line_of(g, p, g->step)->streamed, ns / (g->n - 1));
}

typedef struct {
    int64_t started;
    size_t bytes;
} stopwatch;

static stopwatch start(size_t bytes) { return (stopwatch){bytes < MEASURED ? 0 : cg_clock_ns(), bytes}; }
static int64_t stop(const stopwatch *s) { return s->bytes < MEASURED ? 0 : cg_clock_ns() - s->started; }

/* A rank's own piece, to where it belongs: between two tensors that do not fit into a cache, streaming stores may halve the time. */
static void place(cg_group *g, const cg_block *into, const char *mine, size_t bytes) {
    cg_choice *c = &g->placings[class_of(bytes / 16)]; /* up to 4 MiB, and more */
    if (bytes < PLACED || into->rows > 1 || g->way >= 0) {
        cg_unpack(into, mine, 0, bytes);
        return;
    }
    int way = ++c->turn <= TRIALS / 2 ? (int)(c->turn & 1) : (c->cost[1] < c->cost[0]) ^ (c->turn % EXPLORE == 0);
    stopwatch placing = start(bytes);
    cg_copy(into->base, mine, bytes, way);
    if (way) cg_stream_fence();
    if (c->turn > UNTOUCHED) c->cost[way] = blend(c->cost[way], (float)stop(&placing) * 1024 / (float)bytes);
}

/* Collectives. */

int cg_group_reach(cg_group *g, const cg_call *call, int *who) {
    /* The first word is read by all others, the second written by the one before. */
    volatile uint64_t words[2] = {(uint64_t)cg_clock_ns() ^ (uint64_t)(uintptr_t)g << 20 ^ (uint64_t)g->me, 0};
    begin(g, call);
    *(uint64_t *)(void *)slot_of(g, g->me, g->step) = words[0];
    announce(g, call, sizeof words, WHERE_ADDRESS | (uint64_t)(uintptr_t)words, 1, 0);
    int result = agree(g, call, who), fine = 1;
    for (int i = 1; result == CG_OK && i < g->n; i++) {
        int p = (g->me + i) % g->n;
        uint64_t found = 0, there = line_of(g, p, g->step)->where & ~WHERE_ADDRESS;
        cg_block word = {(char *)&found, 1, sizeof found, sizeof found};
        fine = fine && cg_reach(g->team, p, &word, there, CG_PULL) && found == *(uint64_t *)(void *)slot_of(g, p, g->step);
        if (fine && i == 1) fine = cg_reach(g->team, p, &word, there + sizeof found, CG_PUSH);
    }
    /* Once for all to have written, and once more to say whether it has come. */
    for (int round = 0; result == CG_OK && round < 2; round++) {
        g->step++;
        line_of(g, g->me, g->step)->rounds = (uint32_t)(fine && (round == 0 || words[1] == words[0]));
        result = next_step(g, call, who);
        for (int p = 0; p < g->n; p++) fine = fine && line_of(g, p, g->step)->rounds;
    }
    g->reach_from = fine && result == CG_OK ? REACHED : 0;
    return result;
}

int cg_barrier(cg_group *g, const cg_call *call, int *who) {
    begin(g, call);
    announce(g, call, 0, 0, 1, 0);
    return agree(g, call, who);
}

/* Everybody reduces everything. */
static int one_shot(cg_group *g, const cg_call *call, const void *from, void *to, size_t count, size_t size, cg_kernel kernel, int *who) {
    size_t bytes = count * size;
    int way = choose_way(g, bytes);
    stopwatch writing = start(bytes);
    cg_copy(slot_of(g, g->me, g->step), from, bytes, way);
    if (way) cg_stream_fence();
    note_write(g, bytes, way, stop(&writing));
    announce(g, call, bytes, 0, 1, way);
    int result = agree(g, call, who);
    if (result != CG_OK) return result;
    const void *sources[g->n];
    for (int p = 0; p < g->n; p++) sources[p] = p == g->me ? from : slot_of(g, p, g->step);
    stopwatch reading = start(bytes);
    kernel(to, sources, g->n, count);
    note_reads(g, bytes, stop(&reading));
    return CG_OK;
}

/* Entries [begin, end) of `count` that rank r reduces; whole cache lines, as evenly as these allow. */
static void share_of(size_t count, size_t size, int n, int r, size_t *begin_, size_t *end) {
    size_t unit = CG_LINE / size, each = round_up((count + (size_t)n - 1) / (size_t)n, unit);
    *begin_ = smaller((size_t)r * each, count);
    *end = smaller(*begin_ + each, count);
}

/* Tensors that all ranks can reach are reduced where they are, and the results written to all of them. */
static int reduce_in_shared(cg_group *g, const cg_call *call, size_t count, size_t size, cg_kernel kernel, int *who) {
    char *tensors[g->n];
    const void *sources[g->n];
    for (int p = 0; p < g->n; p++) tensors[p] = resolve(g, p, line_of(g, p, g->step)->where);
    size_t at, end, block = REDUCE_BLOCK / size;
    share_of(count, size, g->n, g->me, &at, &end);
    for (; at < end; at += block) {
        size_t length = smaller(block, end - at);
        for (int p = 0; p < g->n; p++) sources[p] = tensors[p] + at * size;
        kernel(tensors[g->me] + at * size, sources, g->n, length);
        for (int i = 1; i < g->n; i++) cg_copy(tensors[(g->me + i) % g->n] + at * size, tensors[g->me] + at * size, length * size, 0);
    }
    g->step++;
    return next_step(g, call, who);
}

/* Each rank reduces a share, chunk by chunk, and puts the result back where it found the parts: the cache lines came with them, and the ranks
 * that wrote the parts get them back with the result, ready for their next ones. A line moves once in each direction. */
static int two_shot(cg_group *g, const cg_call *call, const void *from, void *to, size_t count, size_t size, int in_place, cg_kernel kernel, int *who) {
    uint64_t where = g->n_regions ? find_region(g, from, count * size) : 0;
    size_t chunk = share_bytes(g->slot_bytes) / size, mine_from, mine_to;
    char *mine = shares_of(g, g->me);
    for (size_t at = 0; at < count; at += chunk) {
        size_t length = smaller(chunk, count - at), block = REDUCE_BLOCK / size;
        share_of(length, size, g->n, g->me, &mine_from, &mine_to);
        int way = choose_way(g, length * size);
        if (at > 0) g->step++;
        if (where == 0) {
            /* Each part to its place, but for this rank's own share, which nobody else reads. */
            const char *part = (const char *)from + at * size;
            stopwatch writing = start(length * size);
            cg_copy(mine, part, mine_from * size, way);
            cg_copy(mine + mine_to * size, part + mine_to * size, (length - mine_to) * size, way);
            if (way) cg_stream_fence();
            note_write(g, length * size, way, stop(&writing));
        }
        int result;
        if (at == 0) {
            announce(g, call, count * size, where, 1, way);
            result = agree(g, call, who);
            if (result != CG_OK) return result;
            int direct = in_place;
            for (int p = 0; p < g->n; p++) direct = direct && line_of(g, p, g->step)->where != 0;
            if (direct) return reduce_in_shared(g, call, count, size, kernel, who);
        } else {
            line_of(g, g->me, g->step)->where = where;
            line_of(g, g->me, g->step)->streamed = (uint32_t)way;
            result = next_step(g, call, who);
            if (result != CG_OK) return result;
        }
        const char *parts[g->n];
        const void *sources[g->n];
        for (int p = 0; p < g->n; p++) {
            uint64_t there = line_of(g, p, g->step)->where;
            parts[p] = p == g->me ? (const char *)from + at * size : there ? resolve(g, p, there) + at * size : shares_of(g, p);
        }
        char *out = (char *)to + at * size;
        stopwatch reading = start(length * size);
        for (size_t i = mine_from; i < mine_to; i += block) {
            size_t some = smaller(block, mine_to - i);
            for (int p = 0; p < g->n; p++) sources[p] = parts[p] + i * size;
            kernel(out + i * size, sources, g->n, some);
            for (int k = 1; k < g->n; k++) cg_copy(shares_of(g, (g->me + k) % g->n) + i * size, out + i * size, some * size, way);
        }
        if (way) cg_stream_fence();
        note_reads(g, length * size, stop(&reading));
        g->step++;
        result = next_step(g, call, who);
        if (result != CG_OK) return result;
        memcpy(out, mine, mine_from * size);
        memcpy(out + mine_to * size, mine + mine_to * size, (length - mine_to) * size);
    }
    return CG_OK;
}

int cg_all_reduce(cg_group *g, const cg_call *call, const void *from, void *to, size_t count, int dtype, int op, int in_place, int *who) {
    size_t size = cg_dtype_bytes(dtype), bytes = count * size;
    cg_kernel kernel = cg_find_kernel(dtype, op);
    begin(g, call);
    g->bytes_sent += bytes;
    /* Where reducing takes several times as long as copying, sharing the work pays early. */
    if (bytes <= g->slot_bytes && bytes * (size_t)g->n * (size_t)cg_kernel_weight(dtype) <= ONE_SHOT)
        return one_shot(g, call, from, to, count, size, kernel, who);
    return two_shot(g, call, from, to, count, size, in_place, kernel, who);
}

static int share(cg_group *g, const cg_call *call, const char *mine, const size_t *bytes, const cg_block *into, int *who) {
    size_t own = bytes[g->me], staged = 0;
    int any_direct = 0, givers = 0, giver = 0;
    for (int p = 0; p < g->n; p++)
        if (bytes[p] > 0) giver = p, givers++;
    uint64_t where = readable(g, mine, own);
    /* What only one gives is copied by both sides then, also where all could read it. */
    if (givers == 1 && own >= SPLIT && g->reach_from && !(where & WHERE_ADDRESS)) {
        uint64_t address = reachable(g, mine);
        if (address != 0) where = address;
    }
    /* A rank that gives nothing says where it wants what the only one gives: that one would be idle, and puts the end there. */
    if (givers == 1 && own == 0 && g->reach_from && bytes[giver] >= g->reach_from && into[giver].rows == 1 && into[giver].base != NULL) {
        where = reachable(g, into[giver].base);
        g->exposed = where != 0;
    }
    size_t head = bytes[giver] / (size_t)g->n * (size_t)(g->n - 1) / CG_LINE * CG_LINE, chunk = g->slot_bytes;
    g->bytes_sent += own;
    begin(g, call);
    for (size_t k = 0, rounds = 1; k < rounds; k++) {
        size_t at = k * chunk, length = where == 0 && at < own ? smaller(chunk, own - at) : 0;
        int way = choose_way(g, length);
        if (k > 0) g->step++;
        if (length > 0) {
            stopwatch writing = start(length);
            cg_copy(slot_of(g, g->me, g->step), mine + at, length, way);
            if (way) cg_stream_fence();
            note_write(g, length, way, stop(&writing));
        }
        int result;
        if (k == 0) {
            announce(g, call, own, where, 1, way);
            /* Its own piece while the others arrive. It may lie where it belongs already. */
            if (into[g->me].base != NULL && into[g->me].base != mine) place(g, &into[g->me], mine, own);
            result = agree(g, call, who);
            for (int p = 0; result == CG_OK && p < g->n; p++) {
                uint64_t there = line_of(g, p, g->step)->where;
                any_direct |= there != 0 && bytes[p] > 0;
                if (there == 0 && bytes[p] > staged) staged = bytes[p];
            }
            if (staged > 0) rounds = (staged + chunk - 1) / chunk;
            int split = givers == 1 && line_of(g, giver, g->step)->where & WHERE_ADDRESS;
            cg_block tail = {(char *)mine + head, 1, own - head, own - head};
            for (int p = 0; split && own > 0 && result == CG_OK && p < g->n; p++) {
                uint64_t there = line_of(g, p, g->step)->where;
                if (p != g->me && there != 0) result = reach(g, p, &tail, there + head, CG_PUSH, who);
            }
        } else {
            line_of(g, g->me, g->step)->where = where;
            line_of(g, g->me, g->step)->streamed = (uint32_t)way;
            result = next_step(g, call, who);
        }
        for (int i = 1; result == CG_OK && i < g->n; i++) {
            int p = (g->me + i) % g->n;
            cg_line *line = line_of(g, p, g->step);
            if (at >= bytes[p] || into[p].base == NULL) continue;
            if (line->where != 0) {
                cg_block part = into[p];
                if (where & WHERE_ADDRESS && own == 0 && line->where & WHERE_ADDRESS) part.row = head;
                if (k == 0) result = read_there(g, p, line->where, &part, who);
                continue;
            }
            size_t part = smaller(chunk, bytes[p] - at);
            stopwatch reading = start(part);
            cg_unpack(&into[p], slot_of(g, p, g->step), at, part);
            note_read(g, p, part, (int)line->streamed, stop(&reading));
        }
        if (result != CG_OK) return result;
    }
    if (any_direct) {
        /* Nobody leaves while his tensor is still read. */
        g->step++;
        return next_step(g, call, who);
    }
    return CG_OK;
}

int cg_share(cg_group *g, const cg_call *call, const char *mine, const size_t *bytes, const cg_block *into, int *who) {
    int result = share(g, call, mine, bytes, into, who);
    if (result == CG_OK) g->exposed = 0;
    return result;
}

uint64_t *cg_pair_row(cg_group *g, int rank, int row) {
    return g->pairs + (((size_t)(g->step & 1) * (size_t)g->n + (size_t)rank) * CG_PAIR_ROWS + (size_t)row) * (size_t)g->n;
}

int cg_trade(cg_group *g, const cg_call *call, const cg_block *out, const cg_block *into, int *who) {
    int n = g->n, any_direct = 0;
    size_t chunk = g->slot_bytes / (size_t)n / CG_LINE * CG_LINE, most = 0;
    /* A rank's piece for itself needs no slot where it is one run on both sides. */
    int straight = out[g->me].rows <= 1 && into[g->me].rows <= 1;
    begin(g, call);
    uint64_t *where = cg_pair_row(g, g->me, CG_WHERE);
    for (int p = 0; p < n; p++) {
        size_t bytes = cg_block_bytes(&out[p]);
        cg_pair_row(g, g->me, CG_OUT)[p] = bytes;
        cg_pair_row(g, g->me, CG_IN)[p] = cg_block_bytes(&into[p]);
        where[p] = p != g->me && out[p].rows <= 1 ? readable(g, out[p].base, bytes) : 0;
        if (bytes > most && where[p] == 0 && !(p == g->me && straight)) most = bytes;
        if (p != g->me) g->bytes_sent += bytes;
    }
    size_t rounds = most ? (most + chunk - 1) / chunk : 1;
    uint64_t direct[n], from[n]; /* kept, for the rows belong to the first step */
    memcpy(direct, where, sizeof direct);
    for (size_t k = 0; k < rounds; k++) {
        size_t at = k * chunk, staged = 0;
        if (k > 0) g->step++;
        for (int p = 0; p < n; p++)
            if (direct[p] == 0) staged += at < cg_block_bytes(&out[p]) ? smaller(chunk, cg_block_bytes(&out[p]) - at) : 0;
        int way = choose_way(g, staged);
        stopwatch writing = start(staged);
        for (int i = 1; i <= n; i++) { /* its own last: it is read first */
            int p = (g->me + i) % n;
            size_t whole = cg_block_bytes(&out[p]);
            if (at >= whole || direct[p] != 0 || (p == g->me && straight)) continue;
            cg_pack(part_of(g, g->me, p, chunk, g->step), &out[p], at, smaller(chunk, whole - at), p == g->me ? 0 : way);
        }
        if (way) cg_stream_fence();
        note_write(g, staged, way, stop(&writing));
        int result;
        if (k == 0) {
            announce(g, call, most, 0, (uint32_t)rounds, way);
            if (straight && into[g->me].base != out[g->me].base && cg_block_bytes(&out[g->me]) == cg_block_bytes(&into[g->me]))
                place(g, &into[g->me], out[g->me].base, cg_block_bytes(&out[g->me]));
            result = agree(g, call, who);
            for (int p = 0; result == CG_OK && p < n; p++) {
                uint32_t theirs = line_of(g, p, g->step)->rounds;
                if (theirs > rounds) rounds = theirs;
                for (int q = 0; q < n; q++) {
                    any_direct |= cg_pair_row(g, p, CG_WHERE)[q] != 0;
                    if (cg_pair_row(g, p, CG_OUT)[q] != cg_pair_row(g, q, CG_IN)[p]) {
                        *who = p;
                        result = CG_MISMATCH; /* every rank looks at all pairs, so that all of them raise */
                    }
                }
            }
        } else {
            line_of(g, g->me, g->step)->streamed = (uint32_t)way;
            result = next_step(g, call, who);
        }
        if (k == 0)
            for (int p = 0; p < n; p++) from[p] = cg_pair_row(g, p, CG_WHERE)[g->me];
        for (int i = 0; result == CG_OK && i < n; i++) {
            int p = (g->me + i) % n;
            size_t whole = cg_block_bytes(&into[p]);
            if (at >= whole || (p == g->me && straight)) continue;
            if (from[p] != 0) {
                if (k == 0) result = read_there(g, p, from[p], &into[p], who);
                continue;
            }
            size_t part = smaller(chunk, whole - at);
            stopwatch reading = start(part);
            cg_unpack(&into[p], part_of(g, p, g->me, chunk, g->step), at, part);
            if (i > 0) note_read(g, p, part, (int)line_of(g, p, g->step)->streamed, stop(&reading));
        }
        if (result != CG_OK) return result;
    }
    if (any_direct) {
        g->step++;
        return next_step(g, call, who);
    }
    return CG_OK;
}

int cg_reduce_scatter(cg_group *g, const cg_call *call, const cg_block *out, void *to, int dtype, int op, int *who) {
    int n = g->n;
    size_t size = cg_dtype_bytes(dtype), most = 0, own = cg_block_bytes(&out[g->me]);
    cg_kernel kernel = cg_find_kernel(dtype, op);
    int flat = out[g->me].rows <= 1, runs = 1;
    for (int p = 0; p < n; p++) {
        if (cg_block_bytes(&out[p]) > most) most = cg_block_bytes(&out[p]);
        if (p != g->me) g->bytes_sent += cg_block_bytes(&out[p]);
    }
    /* Whole tensors in shared memory are read where they are, if their pieces are runs. */
    size_t total = 0;
    for (int p = 0; p < n; p++) total += cg_block_bytes(&out[p]), runs = runs && out[p].rows <= 1;
    uint64_t where = g->n_regions && runs && most > MEASURED ? find_region(g, out[0].base, total) : 0;
    size_t chunk = g->slot_bytes / (size_t)n / CG_LINE * CG_LINE, rounds = most ? (most + chunk - 1) / chunk : 1;
    int any_direct = 0;
    begin(g, call);
    for (size_t k = 0; k < rounds; k++) {
        size_t at = k * chunk, staged = 0;
        if (k > 0) g->step++;
        for (int p = 0; p < n; p++) staged += at < cg_block_bytes(&out[p]) ? smaller(chunk, cg_block_bytes(&out[p]) - at) : 0;
        int way = choose_way(g, staged);
        if (where == 0) {
            stopwatch writing = start(staged);
            for (int i = 1; i <= n; i++) {
                int p = (g->me + i) % n;
                size_t whole = cg_block_bytes(&out[p]);
                if (at < whole && !(p == g->me && flat))
                    cg_pack(part_of(g, g->me, p, chunk, g->step), &out[p], at, smaller(chunk, whole - at), p == g->me ? 0 : way);
            }
            if (way) cg_stream_fence();
            note_write(g, staged, way, stop(&writing));
        }
        int result;
        if (k == 0) {
            announce(g, call, most, where, (uint32_t)rounds, way);
            result = agree(g, call, who);
            for (int p = 0; result == CG_OK && p < n; p++) any_direct |= line_of(g, p, g->step)->where != 0;
        } else {
            line_of(g, g->me, g->step)->where = where;
            line_of(g, g->me, g->step)->streamed = (uint32_t)way;
            result = next_step(g, call, who);
        }
        if (result != CG_OK) return result;
        if (at >= own) continue;
        size_t part = smaller(chunk, own - at), offset = (size_t)(out[g->me].base - out[0].base);
        const void *sources[n];
        for (int p = 0; p < n; p++) {
            uint64_t there = line_of(g, p, g->step)->where;
            sources[p] = p == g->me && flat ? out[p].base + at : there ? resolve(g, p, there) + offset + at : part_of(g, p, g->me, chunk, g->step);
        }
        stopwatch reading = start(part);
        kernel((char *)to + at, sources, n, part / size);
        note_reads(g, part, stop(&reading));
    }
    if (any_direct) {
        g->step++;
        return next_step(g, call, who);
    }
    return CG_OK;
}

int cg_ping_pong(cg_group *g, const cg_call *call, int rounds, double *ns, int *who) {
    int result = cg_barrier(g, call, who);
    if (result != CG_OK) return result;
    rounds = rounds / 2 * 2;
    int64_t started = cg_clock_ns();
    if (g->me < 2) {
        /* On the lines of the two, by the numbers of steps to come. */
        for (int i = 0; i < rounds; i++) {
            g->step++;
            if (g->me == 0) atomic_store_explicit(&line_of(g, 0, g->step)->step, g->step, memory_order_release);
            for (int64_t spins = 0; atomic_load_explicit(&line_of(g, 1 - g->me, g->step)->step, memory_order_acquire) != g->step; spins++) {
                if (spins > 20000) {
                    sched_yield(); /* the other has no core */
                    *who = 1 - g->me;
                    if (cg_clock_ns() > call->deadline) return CG_TIMEOUT;
                }
            }
            if (g->me == 1) atomic_store_explicit(&line_of(g, 1, g->step)->step, g->step, memory_order_release);
        }
    } else {
        /* An even number, so that what it says next is not said on the line where the barrier may still be looked for. */
        g->step += (uint32_t)rounds;
    }
    *ns = (double)(cg_clock_ns() - started) / (2.0 * rounds);
    g->step++;
    return next_step(g, call, who);
}
