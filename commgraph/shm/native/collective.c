#include "pipelined.h"
#include "steps.h"
#include "nontemporal.h"

#include <sched.h>
#include <string.h>

enum {
    /* Bytes from which a piece is read by cross-memory attach: one copy and a step more in place of two copies. */
    CMA_FROM = 64 * 1024,
    SPLIT_FROM = 512 * 1024, /* bytes from which root and receivers of a broadcast copy at the same time */
    PUSHED_CHUNK = 128 * 1024, /* bytes that the root of a broadcast writes to a receiver before it looks whether that one has given up */
    CHUNK_BITS = 24,
    SAME_PROCESS_FROM = 32 * 1024,  /* bytes from which same-process ranks reduce in place: a step more in place of a copy */
};

/* `where` of this rank's memory for cross-memory attach; 0 where the others cannot access it. Its owner checks, because only the owner can
 * stage it instead. */
static uint64_t cma_address_of(cg_group *g, const void *data) {
    return cg_cma_can_access(g->team, data) ? CG_WHERE_ADDRESS | (uint64_t)(uintptr_t)data : 0;
}

/* `where` the others can read these bytes of this rank in place; 0 if staging them is faster, or necessary. */
static uint64_t find_readable(cg_group *g, const void *data, size_t bytes) {
    uint64_t where = cg_find_region(g, data, bytes);
    return where == 0 && g->cma_from && bytes >= g->cma_from ? cma_address_of(g, data) : where;
}

static int cma_copy_from_rank(cg_group *g, int rank, const cg_block *block, uint64_t where, int direction, int *who) {
    if (cg_cma_copy(g->team, rank, block, where & ~CG_WHERE_ADDRESS, direction)) return CG_OK;
    /* The rank has died, or has given up on the call and freed its tensor, or its memory is no longer accessible. */
    int why = cg_cma_why(), result = cg_team_lost(g->team, who);
    if (result == CG_OK) *who = rank;
    return result == CG_OK ? why : result;
}

/* Reads all of a piece that its rank has not staged. */
static int read_in_place(cg_group *g, int rank, uint64_t where, const cg_block *into, int *who) {
    if (where & CG_WHERE_ADDRESS) return cma_copy_from_rank(g, rank, into, where, CG_CMA_READ, who);
    cg_unpack(into, cg_resolve(g, rank, where), 0, cg_block_bytes(into));
    return CG_OK;
}

#define CG_REVOKED ((1ull << CHUNK_BITS) - 1)
#define REVOKE_PATIENCE_NS 1000000000 /* longest wait for a chunk that the root was writing: it may have been stopped in the middle */

/* Root of a broadcast: writes the tail to the receiver's tensor, chunk by chunk. A receiver that gives up revokes the rest, and its tensor is its own
 * again. */
static int push_tail(cg_group *g, int rank, const char *tail, size_t bytes, uint64_t there, int *who) {
    cg_line *line = cg_line_of(g, rank, g->step);
    uint64_t claimed = (uint64_t)g->step << CHUNK_BITS;
    for (size_t at = 0; at < bytes; at += PUSHED_CHUNK) {
        uint64_t expected = claimed++;
        if (!atomic_compare_exchange_strong(&line->claimed, &expected, claimed)) {
            *who = rank;
            return CG_GONE;
        }
        size_t some = cg_smaller(PUSHED_CHUNK, bytes - at);
        cg_block chunk = {(char *)tail + at, 1, some, some};
        int result = cma_copy_from_rank(g, rank, &chunk, there + at, CG_CMA_WRITE, who);
        if (result != CG_OK) return result;
        atomic_store_explicit(&line->pushed, claimed, memory_order_release);
    }
    return CG_OK;
}

/* Receiver: lets the root write to its tensor in the step that is announced next. */
static void allow_push(cg_group *g) {
    cg_line *line = cg_line_of(g, g->me, g->step);
    g->receiving = g->step;
    atomic_store_explicit(&line->claimed, (uint64_t)g->step << CHUNK_BITS, memory_order_relaxed);
    atomic_store_explicit(&line->pushed, (uint64_t)g->step << CHUNK_BITS, memory_order_relaxed);
}

/* Receiver, which has given up: the root writes no further chunk. Returns whether it may still be writing one. */
static int revoke_push(cg_group *g) {
    cg_line *line = cg_line_of(g, g->me, g->receiving);
    uint64_t claimed = atomic_exchange(&line->claimed, (uint64_t)g->receiving << CHUNK_BITS | CG_REVOKED);
    for (int64_t until = cg_clock_ns() + REVOKE_PATIENCE_NS; atomic_load_explicit(&line->pushed, memory_order_acquire) < claimed; sched_yield())
        if (cg_clock_ns() > until) return 1;
    return 0;
}

int cg_group_probe_cma(cg_group *g, const cg_call *call, int *who) {
    /* The first word is read by all other ranks, the second written by the preceding rank. */
    volatile uint64_t words[2] = {(uint64_t)cg_clock_ns() ^ (uint64_t)(uintptr_t)g << 20 ^ (uint64_t)g->me, 0};
    cg_begin(g, call);
    *(uint64_t *)(void *)cg_slot_of(g, g->me, g->step) = words[0];
    cg_announce(g, call, CG_WHERE_ADDRESS | (uint64_t)(uintptr_t)words, 1, 0);
    int result = cg_agree(g, call, who), works = 1;
    for (int i = 1; result == CG_OK && i < g->n; i++) {
        int p = (g->me + i) % g->n;
        uint64_t found = 0, there = cg_line_of(g, p, g->step)->where & ~CG_WHERE_ADDRESS;
        cg_block word = {(char *)&found, 1, sizeof found, sizeof found};
        works = works && cg_cma_copy(g->team, p, &word, there, CG_CMA_READ) && found == *(uint64_t *)(void *)cg_slot_of(g, p, g->step);
        if (works && i == 1) works = cg_cma_copy(g->team, p, &word, there + sizeof found, CG_CMA_WRITE);
    }
    /* One step for all ranks to have written, and one to tell whether this rank received its word. */
    for (int round = 0; result == CG_OK && round < 2; round++) {
        g->step++;
        cg_line_of(g, g->me, g->step)->rounds = (uint32_t)(works && (round == 0 || words[1] == words[0]));
        result = cg_next_step(g, call, who);
        for (int p = 0; p < g->n; p++) works = works && cg_line_of(g, p, g->step)->rounds;
    }
    g->cma_from = works && result == CG_OK ? CMA_FROM : 0;
    /* Equal pids are equal processes only inside one pid namespace, which the probe has proved. */
    if (g->cma_from != 0 && cg_team_all_same_process(g->team)) g->same_process_from = SAME_PROCESS_FROM;
    return result;
}

/* The data of two ranks, after the first step: read in place, or exchanged through the slots. */
static int exchange_two(cg_group *g, const cg_call *call, const cg_block *send, const cg_block *into, const cg_block *keep, size_t chunk, uint64_t where, int *who) {
    if (where == 0) return cg_pipelined_exchange(g, call, send, into, keep, chunk, who);
    cg_unpack(into, cg_resolve(g, 1 - g->me, where), 0, cg_block_bytes(into));
    size_t send_bytes = cg_block_bytes(send);
    if (keep != NULL && send_bytes > chunk) cg_unpack(keep, send->base + chunk, chunk, send_bytes - chunk);
    return cg_leave_together(g, call, who);
}

static int all_gatherv_of_two(cg_group *g, const cg_call *call, const char *mine, const size_t *bytes, const cg_block *into, int *who) {
    size_t own = bytes[g->me], theirs = bytes[1 - g->me], chunk = cg_pipelined_chunk(g, own > theirs ? own : theirs);
    cg_block send = {(char *)mine, 1, own, own};
    const cg_block *keep = own > 0 && into[g->me].base != mine ? &into[g->me] : NULL; /* NULL if its own piece is in its place already */
    uint64_t where = cg_find_region(g, mine, own);
    g->bytes_sent += own;
    cg_begin(g, call);
    cg_stage_first(g, call, &send, chunk, where);
    if (keep != NULL) cg_unpack(keep, mine, 0, cg_smaller(own, chunk));
    int result = cg_agree(g, call, who);
    if (result == CG_OK) result = cg_agree_on_staging(g, call, &send, chunk, &where, who);
    return result == CG_OK ? exchange_two(g, call, &send, &into[1 - g->me], keep, chunk, where, who) : result;
}

static int all_gatherv(cg_group *g, const cg_call *call, const char *mine, const size_t *bytes, const cg_block *into, int *who) {
    size_t own = bytes[g->me], staged = 0;
    int any_direct = 0, n_senders = 0, root = 0; /* the last rank that contributes */
    for (int p = 0; p < g->n; p++)
        if (bytes[p] > 0) root = p, n_senders++;
    uint64_t where = find_readable(g, mine, own);
    /* Broadcast of a large tensor: cross-memory attach is preferred to a shared region, because root and receivers then copy at the same
     * time. */
    if (n_senders == 1 && own >= SPLIT_FROM && g->cma_from && !(where & CG_WHERE_ADDRESS)) {
        uint64_t address = cma_address_of(g, mine);
        if (address != 0) where = address;
    }
    /* Broadcast of a large tensor: each receiver publishes the address of its output. The root, idle otherwise, writes the last 1/n there
     * while the receiver reads the rest. */
    if (n_senders == 1 && own == 0 && g->cma_from && bytes[root] >= g->cma_from && into[root].rows == 1 && into[root].base != NULL) {
        where = cma_address_of(g, into[root].base);
    }
    size_t head = bytes[root] / (size_t)g->n * (size_t)(g->n - 1) / CG_LINE * CG_LINE, chunk = g->slot_bytes;
    g->bytes_sent += own;
    cg_begin(g, call);
    g->receiving = 0;
    if (own == 0 && where & CG_WHERE_ADDRESS) allow_push(g);
    for (size_t k = 0, rounds = 1; k < rounds; k++) {
        size_t at = k * chunk, length = where == 0 && at < own ? cg_smaller(chunk, own - at) : 0;
        int nontemporal = cg_choose_stores(g, length);
        if (k > 0) g->step++;
        if (length > 0) {
            cg_stopwatch writing = cg_start(length);
            cg_copy(cg_slot_of(g, g->me, g->step), mine + at, length, nontemporal);
            if (nontemporal) cg_store_fence();
            cg_note_write(g, length, nontemporal, cg_stop(&writing));
        }
        int result;
        if (k == 0) {
            cg_announce(g, call, where, 1, nontemporal);
            /* Copies its own piece while the others arrive, unless it is in its place already. */
            if (into[g->me].base != NULL && into[g->me].base != mine) cg_copy_own(g, &into[g->me], mine, own);
            result = cg_agree(g, call, who);
            for (int p = 0; result == CG_OK && p < g->n; p++) {
                uint64_t there = cg_line_of(g, p, g->step)->where;
                any_direct |= there != 0 && bytes[p] > 0;
                if (there == 0 && bytes[p] > staged) staged = bytes[p];
            }
            if (staged > 0) rounds = (staged + chunk - 1) / chunk;
            int split = n_senders == 1 && cg_line_of(g, root, g->step)->where & CG_WHERE_ADDRESS;
            for (int p = 0; split && own > 0 && result == CG_OK && p < g->n; p++) {
                uint64_t there = cg_line_of(g, p, g->step)->where;
                if (p != g->me && there != 0) result = push_tail(g, p, mine + head, own - head, (there & ~CG_WHERE_ADDRESS) + head, who);
            }
        } else {
            cg_line_of(g, g->me, g->step)->where = where;
            cg_line_of(g, g->me, g->step)->nontemporal = (uint32_t)nontemporal;
            result = cg_next_step(g, call, who);
        }
        for (int i = 1; result == CG_OK && i < g->n; i++) {
            int p = (g->me + i) % g->n;
            cg_line *line = cg_line_of(g, p, g->step);
            if (at >= bytes[p] || into[p].base == NULL) continue;
            if (line->where != 0) {
                cg_block part = into[p];
                if (where & CG_WHERE_ADDRESS && own == 0 && line->where & CG_WHERE_ADDRESS) part.row = head;
                if (k == 0) result = read_in_place(g, p, line->where, &part, who);
                continue;
            }
            size_t part = cg_smaller(chunk, bytes[p] - at);
            cg_stopwatch reading = cg_start(part);
            cg_unpack(&into[p], cg_slot_of(g, p, g->step), at, part);
            cg_note_read(g, p, part, (int)line->nontemporal, cg_stop(&reading));
        }
        if (result != CG_OK) return result;
    }
    return any_direct ? cg_leave_together(g, call, who) : CG_OK;
}

int cg_all_gatherv(cg_group *g, const cg_call *call, const char *mine, const size_t *bytes, const cg_block *into, int everywhere, int *who) {
    if (everywhere && g->n == 2) return all_gatherv_of_two(g, call, mine, bytes, into, who);
    int result = all_gatherv(g, call, mine, bytes, into, who);
    if (result != CG_OK && g->receiving) g->exposed = revoke_push(g);
    return result;
}

uint64_t *cg_pair_row(cg_group *g, int rank, int row) {
    return g->pairs + (((size_t)(g->step & 1) * (size_t)g->n + (size_t)rank) * CG_PAIR_ROWS + (size_t)row) * (size_t)g->n;
}

/* Every rank compares the sizes of all pairs, so that all ranks raise alike. */
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

/* Copies a rank's own piece to its place in the output; either may be strided. */
static void keep_own(cg_group *g, const cg_block *into, const cg_block *out) {
    size_t bytes = cg_block_bytes(out);
    if (into->base == out->base || bytes != cg_block_bytes(into)) return;
    if (out->rows <= 1) {
        cg_copy_own(g, into, out->base, bytes);
        return;
    }
    char strip[4096];
    for (size_t at = 0; at < bytes; at += sizeof strip) {
        size_t some = cg_smaller(sizeof strip, bytes - at);
        cg_pack(strip, out, at, some, 0);
        cg_unpack(into, strip, at, some);
    }
}

static int all_to_allv_of_two(cg_group *g, const cg_call *call, const cg_block *out, const cg_block *into, int *who) {
    const cg_block *send = &out[1 - g->me], *recv = &into[1 - g->me];
    size_t send_bytes = cg_block_bytes(send), recv_bytes = cg_block_bytes(recv), chunk = cg_pipelined_chunk(g, send_bytes > recv_bytes ? send_bytes : recv_bytes);
    uint64_t where = send->rows <= 1 ? cg_find_region(g, send->base, send_bytes) : 0;
    cg_stage_first(g, call, send, chunk, where);
    keep_own(g, &into[g->me], &out[g->me]);
    int result = cg_agree(g, call, who);
    if (result == CG_OK) result = agree_on_sizes(g, who);
    if (result == CG_OK) result = cg_agree_on_staging(g, call, send, chunk, &where, who);
    return result == CG_OK ? exchange_two(g, call, send, recv, NULL, chunk, where, who) : result;
}

int cg_all_to_allv(cg_group *g, const cg_call *call, const cg_block *out, const cg_block *into, int *who) {
    int n = g->n, any_direct = 0;
    size_t chunk = g->slot_bytes / (size_t)n / CG_LINE * CG_LINE, most = 0;
    cg_begin(g, call);
    uint64_t *where = cg_pair_row(g, g->me, CG_WHERE);
    for (int p = 0; p < n; p++) {
        size_t bytes = cg_block_bytes(&out[p]);
        cg_pair_row(g, g->me, CG_OUT)[p] = bytes;
        cg_pair_row(g, g->me, CG_IN)[p] = cg_block_bytes(&into[p]);
        where[p] = p != g->me && n > 2 && out[p].rows <= 1 ? find_readable(g, out[p].base, bytes) : 0;
        if (p == g->me) continue;
        if (bytes > most && where[p] == 0) most = bytes;
        g->bytes_sent += bytes;
    }
    if (n == 2) return all_to_allv_of_two(g, call, out, into, who);
    size_t rounds = most ? (most + chunk - 1) / chunk : 1;
    uint64_t direct[n], from[n]; /* copies, because the rows belong to the first step */
    memcpy(direct, where, sizeof direct);
    for (size_t k = 0; k < rounds; k++) {
        size_t at = k * chunk, staged = 0;
        if (k > 0) g->step++;
        for (int p = 0; p < n; p++)
            if (p != g->me && direct[p] == 0) staged += at < cg_block_bytes(&out[p]) ? cg_smaller(chunk, cg_block_bytes(&out[p]) - at) : 0;
        int nontemporal = cg_choose_stores(g, staged);
        cg_stopwatch writing = cg_start(staged);
        for (int i = 1; i < n; i++) {
            int p = (g->me + i) % n;
            size_t whole = cg_block_bytes(&out[p]);
            if (at >= whole || direct[p] != 0) continue;
            cg_pack(cg_part_of(g, g->me, p, chunk, g->step), &out[p], at, cg_smaller(chunk, whole - at), nontemporal);
        }
        if (nontemporal) cg_store_fence();
        cg_note_write(g, staged, nontemporal, cg_stop(&writing));
        int result;
        if (k == 0) {
            cg_announce(g, call, 0, (uint32_t)rounds, nontemporal);
            keep_own(g, &into[g->me], &out[g->me]);
            result = cg_agree(g, call, who);
            for (int p = 0; result == CG_OK && p < n; p++) {
                uint32_t theirs = cg_line_of(g, p, g->step)->rounds;
                if (theirs > rounds) rounds = theirs;
                for (int q = 0; q < n; q++) any_direct |= cg_pair_row(g, p, CG_WHERE)[q] != 0;
            }
            if (result == CG_OK) result = agree_on_sizes(g, who);
        } else {
            cg_line_of(g, g->me, g->step)->nontemporal = (uint32_t)nontemporal;
            result = cg_next_step(g, call, who);
        }
        if (k == 0)
            for (int p = 0; p < n; p++) from[p] = cg_pair_row(g, p, CG_WHERE)[g->me];
        for (int i = 1; result == CG_OK && i < n; i++) {
            int p = (g->me + i) % n;
            size_t whole = cg_block_bytes(&into[p]);
            if (at >= whole) continue;
            if (from[p] != 0) {
                if (k == 0) result = read_in_place(g, p, from[p], &into[p], who);
                continue;
            }
            size_t part = cg_smaller(chunk, whole - at);
            cg_stopwatch reading = cg_start(part);
            cg_unpack(&into[p], cg_part_of(g, p, g->me, chunk, g->step), at, part);
            cg_note_read(g, p, part, (int)cg_line_of(g, p, g->step)->nontemporal, cg_stop(&reading));
        }
        if (result != CG_OK) return result;
    }
    return any_direct ? cg_leave_together(g, call, who) : CG_OK;
}
