#include "relay.h"
#include "steps.h"
#include "stores.h"

#include <string.h>

enum {
    /* From here on a piece is read where it lies, if it can be: one copy and a step more in place of two copies. */
    REACHED = 64 * 1024,
    SPLIT = 512 * 1024, /* from here on giver and receivers share the work of a broadcast */
    AMONG = 32 * 1024,  /* from here on threads reduce where their tensors lie: another step in place of a copy */
};

/* Memory of this rank's as the others reach it; 0 where they do not. It is this rank that asks, since only this one can stage it in place of
 * that. */
static uint64_t reachable(cg_group *g, const void *data) {
    return cg_is_reachable(g->team, data) ? CG_WHERE_ADDRESS | (uint64_t)(uintptr_t)data : 0;
}

/* Where the others can read these bytes of this rank for themselves, 0 if they are better staged. */
static uint64_t readable(cg_group *g, const void *data, size_t bytes) {
    uint64_t where = cg_find_region(g, data, bytes);
    return where == 0 && g->reach_from && bytes >= g->reach_from ? reachable(g, data) : where;
}

static int reach(cg_group *g, int rank, const cg_block *block, uint64_t where, int direction, int *who) {
    if (cg_reach(g->team, rank, block, where & ~CG_WHERE_ADDRESS, direction)) return CG_OK;
    /* It has died, or has given up on the call and gone on. */
    int result = cg_team_lost(g->team, who);
    if (result == CG_OK) *who = rank;
    return result == CG_OK ? CG_GONE : result;
}

/* All of a piece that its rank has not staged. */
static int read_there(cg_group *g, int rank, uint64_t where, const cg_block *into, int *who) {
    if (where & CG_WHERE_ADDRESS) return reach(g, rank, into, where, CG_PULL, who);
    cg_unpack(into, cg_resolve(g, rank, where), 0, cg_block_bytes(into));
    return CG_OK;
}

int cg_group_reach(cg_group *g, const cg_call *call, int *who) {
    /* The first word is read by all others, the second written by the one before. */
    volatile uint64_t words[2] = {(uint64_t)cg_clock_ns() ^ (uint64_t)(uintptr_t)g << 20 ^ (uint64_t)g->me, 0};
    cg_begin(g, call);
    *(uint64_t *)(void *)cg_slot_of(g, g->me, g->step) = words[0];
    cg_announce(g, call, CG_WHERE_ADDRESS | (uint64_t)(uintptr_t)words, 1, 0);
    int result = cg_agree(g, call, who), fine = 1;
    for (int i = 1; result == CG_OK && i < g->n; i++) {
        int p = (g->me + i) % g->n;
        uint64_t found = 0, there = cg_line_of(g, p, g->step)->where & ~CG_WHERE_ADDRESS;
        cg_block word = {(char *)&found, 1, sizeof found, sizeof found};
        fine = fine && cg_reach(g->team, p, &word, there, CG_PULL) && found == *(uint64_t *)(void *)cg_slot_of(g, p, g->step);
        if (fine && i == 1) fine = cg_reach(g->team, p, &word, there + sizeof found, CG_PUSH);
    }
    /* Once for all to have written, and once more to say whether it has come. */
    for (int round = 0; result == CG_OK && round < 2; round++) {
        g->step++;
        cg_line_of(g, g->me, g->step)->rounds = (uint32_t)(fine && (round == 0 || words[1] == words[0]));
        result = cg_next_step(g, call, who);
        for (int p = 0; p < g->n; p++) fine = fine && cg_line_of(g, p, g->step)->rounds;
    }
    g->reach_from = fine && result == CG_OK ? REACHED : 0;
    /* The same number may mean another process to another rank: only now it is known that it does not. */
    if (g->reach_from != 0 && cg_team_is_of_threads(g->team)) g->among_from = AMONG;
    return result;
}

/* What two ranks give each other, after the first step. */
static int exchange(cg_group *g, const cg_call *call, const cg_block *give, const cg_block *into, const cg_block *keep, size_t chunk, uint64_t where, int *who) {
    if (where == 0) return cg_relay(g, call, give, into, keep, chunk, who);
    cg_unpack(into, cg_resolve(g, 1 - g->me, where), 0, cg_block_bytes(into));
    size_t given = cg_block_bytes(give);
    if (keep != NULL && given > chunk) cg_unpack(keep, give->base + chunk, chunk, given - chunk);
    return cg_leave_together(g, call, who);
}

static int share_of_two(cg_group *g, const cg_call *call, const char *mine, const size_t *bytes, const cg_block *into, int *who) {
    size_t own = bytes[g->me], theirs = bytes[1 - g->me], chunk = cg_relay_chunk(g, own > theirs ? own : theirs);
    cg_block give = {(char *)mine, 1, own, own};
    const cg_block *keep = own > 0 && into[g->me].base != mine ? &into[g->me] : NULL; /* it may lie where it belongs already */
    uint64_t where = cg_find_region(g, mine, own);
    g->bytes_sent += own;
    cg_begin(g, call);
    cg_offer(g, call, &give, chunk, where);
    if (keep != NULL) cg_unpack(keep, mine, 0, cg_smaller(own, chunk));
    int result = cg_agree(g, call, who);
    if (result == CG_OK) result = cg_meet(g, call, &give, chunk, &where, who);
    return result == CG_OK ? exchange(g, call, &give, &into[1 - g->me], keep, chunk, where, who) : result;
}

static int share(cg_group *g, const cg_call *call, const char *mine, const size_t *bytes, const cg_block *into, int *who) {
    size_t own = bytes[g->me], staged = 0;
    int any_direct = 0, givers = 0, giver = 0;
    for (int p = 0; p < g->n; p++)
        if (bytes[p] > 0) giver = p, givers++;
    uint64_t where = readable(g, mine, own);
    /* What only one gives is copied by both sides then, also where all could read it. */
    if (givers == 1 && own >= SPLIT && g->reach_from && !(where & CG_WHERE_ADDRESS)) {
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
    cg_begin(g, call);
    for (size_t k = 0, rounds = 1; k < rounds; k++) {
        size_t at = k * chunk, length = where == 0 && at < own ? cg_smaller(chunk, own - at) : 0;
        int way = cg_choose_way(g, length);
        if (k > 0) g->step++;
        if (length > 0) {
            cg_stopwatch writing = cg_start(length);
            cg_copy(cg_slot_of(g, g->me, g->step), mine + at, length, way);
            if (way) cg_stream_fence();
            cg_note_write(g, length, way, cg_stop(&writing));
        }
        int result;
        if (k == 0) {
            cg_announce(g, call, where, 1, way);
            /* Its own piece while the others arrive. It may lie where it belongs already. */
            if (into[g->me].base != NULL && into[g->me].base != mine) cg_place(g, &into[g->me], mine, own);
            result = cg_agree(g, call, who);
            for (int p = 0; result == CG_OK && p < g->n; p++) {
                uint64_t there = cg_line_of(g, p, g->step)->where;
                any_direct |= there != 0 && bytes[p] > 0;
                if (there == 0 && bytes[p] > staged) staged = bytes[p];
            }
            if (staged > 0) rounds = (staged + chunk - 1) / chunk;
            int split = givers == 1 && cg_line_of(g, giver, g->step)->where & CG_WHERE_ADDRESS;
            cg_block tail = {(char *)mine + head, 1, own - head, own - head};
            for (int p = 0; split && own > 0 && result == CG_OK && p < g->n; p++) {
                uint64_t there = cg_line_of(g, p, g->step)->where;
                if (p != g->me && there != 0) result = reach(g, p, &tail, there + head, CG_PUSH, who);
            }
        } else {
            cg_line_of(g, g->me, g->step)->where = where;
            cg_line_of(g, g->me, g->step)->streamed = (uint32_t)way;
            result = cg_next_step(g, call, who);
        }
        for (int i = 1; result == CG_OK && i < g->n; i++) {
            int p = (g->me + i) % g->n;
            cg_line *line = cg_line_of(g, p, g->step);
            if (at >= bytes[p] || into[p].base == NULL) continue;
            if (line->where != 0) {
                cg_block part = into[p];
                if (where & CG_WHERE_ADDRESS && own == 0 && line->where & CG_WHERE_ADDRESS) part.row = head;
                if (k == 0) result = read_there(g, p, line->where, &part, who);
                continue;
            }
            size_t part = cg_smaller(chunk, bytes[p] - at);
            cg_stopwatch reading = cg_start(part);
            cg_unpack(&into[p], cg_slot_of(g, p, g->step), at, part);
            cg_note_read(g, p, part, (int)line->streamed, cg_stop(&reading));
        }
        if (result != CG_OK) return result;
    }
    return any_direct ? cg_leave_together(g, call, who) : CG_OK;
}

int cg_share(cg_group *g, const cg_call *call, const char *mine, const size_t *bytes, const cg_block *into, int everywhere, int *who) {
    if (everywhere && g->n == 2) return share_of_two(g, call, mine, bytes, into, who);
    int result = share(g, call, mine, bytes, into, who);
    if (result == CG_OK) g->exposed = 0;
    return result;
}

uint64_t *cg_pair_row(cg_group *g, int rank, int row) {
    return g->pairs + (((size_t)(g->step & 1) * (size_t)g->n + (size_t)rank) * CG_PAIR_ROWS + (size_t)row) * (size_t)g->n;
}

/* Every rank looks at the sizes of all pairs, so that all of them raise. */
static int agree_on_sizes(cg_group *g, int *who) {
    for (int p = 0; p < g->n; p++) {
        for (int q = 0; q < g->n; q++) {
            if (cg_pair_row(g, p, CG_OUT)[q] == cg_pair_row(g, q, CG_IN)[p]) continue;
            *who = p;
            return CG_MISMATCH;
        }
    }
    return CG_OK;
}

/* A rank's own piece, of which either side may be in strips. */
static void keep_own(cg_group *g, const cg_block *into, const cg_block *out) {
    size_t bytes = cg_block_bytes(out);
    if (into->base == out->base || bytes != cg_block_bytes(into)) return;
    if (out->rows <= 1) {
        cg_place(g, into, out->base, bytes);
        return;
    }
    char strip[4096];
    for (size_t at = 0; at < bytes; at += sizeof strip) {
        size_t some = cg_smaller(sizeof strip, bytes - at);
        cg_pack(strip, out, at, some, 0);
        cg_unpack(into, strip, at, some);
    }
}

static int trade_of_two(cg_group *g, const cg_call *call, const cg_block *out, const cg_block *into, int *who) {
    const cg_block *give = &out[1 - g->me], *take = &into[1 - g->me];
    size_t given = cg_block_bytes(give), taken = cg_block_bytes(take), chunk = cg_relay_chunk(g, given > taken ? given : taken);
    uint64_t where = give->rows <= 1 ? cg_find_region(g, give->base, given) : 0;
    cg_offer(g, call, give, chunk, where);
    keep_own(g, &into[g->me], &out[g->me]);
    int result = cg_agree(g, call, who);
    if (result == CG_OK) result = agree_on_sizes(g, who);
    if (result == CG_OK) result = cg_meet(g, call, give, chunk, &where, who);
    return result == CG_OK ? exchange(g, call, give, take, NULL, chunk, where, who) : result;
}

int cg_trade(cg_group *g, const cg_call *call, const cg_block *out, const cg_block *into, int *who) {
    int n = g->n, any_direct = 0;
    size_t chunk = g->slot_bytes / (size_t)n / CG_LINE * CG_LINE, most = 0;
    cg_begin(g, call);
    uint64_t *where = cg_pair_row(g, g->me, CG_WHERE);
    for (int p = 0; p < n; p++) {
        size_t bytes = cg_block_bytes(&out[p]);
        cg_pair_row(g, g->me, CG_OUT)[p] = bytes;
        cg_pair_row(g, g->me, CG_IN)[p] = cg_block_bytes(&into[p]);
        where[p] = p != g->me && n > 2 && out[p].rows <= 1 ? readable(g, out[p].base, bytes) : 0;
        if (p == g->me) continue;
        if (bytes > most && where[p] == 0) most = bytes;
        g->bytes_sent += bytes;
    }
    if (n == 2) return trade_of_two(g, call, out, into, who);
    size_t rounds = most ? (most + chunk - 1) / chunk : 1;
    uint64_t direct[n], from[n]; /* kept, for the rows belong to the first step */
    memcpy(direct, where, sizeof direct);
    for (size_t k = 0; k < rounds; k++) {
        size_t at = k * chunk, staged = 0;
        if (k > 0) g->step++;
        for (int p = 0; p < n; p++)
            if (p != g->me && direct[p] == 0) staged += at < cg_block_bytes(&out[p]) ? cg_smaller(chunk, cg_block_bytes(&out[p]) - at) : 0;
        int way = cg_choose_way(g, staged);
        cg_stopwatch writing = cg_start(staged);
        for (int i = 1; i < n; i++) {
            int p = (g->me + i) % n;
            size_t whole = cg_block_bytes(&out[p]);
            if (at >= whole || direct[p] != 0) continue;
            cg_pack(cg_part_of(g, g->me, p, chunk, g->step), &out[p], at, cg_smaller(chunk, whole - at), way);
        }
        if (way) cg_stream_fence();
        cg_note_write(g, staged, way, cg_stop(&writing));
        int result;
        if (k == 0) {
            cg_announce(g, call, 0, (uint32_t)rounds, way);
            keep_own(g, &into[g->me], &out[g->me]);
            result = cg_agree(g, call, who);
            for (int p = 0; result == CG_OK && p < n; p++) {
                uint32_t theirs = cg_line_of(g, p, g->step)->rounds;
                if (theirs > rounds) rounds = theirs;
                for (int q = 0; q < n; q++) any_direct |= cg_pair_row(g, p, CG_WHERE)[q] != 0;
            }
            if (result == CG_OK) result = agree_on_sizes(g, who);
        } else {
            cg_line_of(g, g->me, g->step)->streamed = (uint32_t)way;
            result = cg_next_step(g, call, who);
        }
        if (k == 0)
            for (int p = 0; p < n; p++) from[p] = cg_pair_row(g, p, CG_WHERE)[g->me];
        for (int i = 1; result == CG_OK && i < n; i++) {
            int p = (g->me + i) % n;
            size_t whole = cg_block_bytes(&into[p]);
            if (at >= whole) continue;
            if (from[p] != 0) {
                if (k == 0) result = read_there(g, p, from[p], &into[p], who);
                continue;
            }
            size_t part = cg_smaller(chunk, whole - at);
            cg_stopwatch reading = cg_start(part);
            cg_unpack(&into[p], cg_part_of(g, p, g->me, chunk, g->step), at, part);
            cg_note_read(g, p, part, (int)cg_line_of(g, p, g->step)->streamed, cg_stop(&reading));
        }
        if (result != CG_OK) return result;
    }
    return any_direct ? cg_leave_together(g, call, who) : CG_OK;
}
