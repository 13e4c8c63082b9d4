#include "relay.h"

#include <string.h>

#include "steps.h"
#include "stores.h"

enum {
    /* Chunks are small, so that the first is soon on its way, and large, so that the steps do not cost what that gains. */
    CHUNKS = 16,
    LEAST_CHUNK = 32 * 1024,
    LARGEST_CHUNK = 128 * 1024,
};

size_t cg_relay_chunk(cg_group *g, size_t bytes) {
    size_t chunk = cg_round_up(bytes / CHUNKS, CG_LINE);
    return cg_smaller(chunk < LEAST_CHUNK ? LEAST_CHUNK : cg_smaller(chunk, LARGEST_CHUNK), g->slot_bytes / CG_LINE * CG_LINE);
}

/* Bytes of the chunk at `at`. */
static size_t chunk_at(size_t at, size_t bytes, size_t chunk) { return at < bytes ? cg_smaller(chunk, bytes - at) : 0; }

static void stage(cg_group *g, const cg_block *give, size_t chunk) {
    cg_pack(cg_slot_of(g, g->me, g->step), give, 0, chunk_at(0, cg_block_bytes(give), chunk), 0);
}

void cg_offer(cg_group *g, const cg_call *call, const cg_block *give, size_t chunk, uint64_t where) {
    if (where == 0) stage(g, give, chunk);
    cg_announce(g, call, where, 1, 0);
}

int cg_meet(cg_group *g, const cg_call *call, const cg_block *give, size_t chunk, uint64_t *where, int *who) {
    uint64_t mine = *where, theirs = cg_line_of(g, 1 - g->me, g->step)->where;
    *where = mine != 0 ? theirs : 0;
    if ((mine != 0) == (theirs != 0)) return CG_OK;
    g->step++;
    stage(g, give, chunk);
    return cg_next_step(g, call, who);
}

int cg_relay_reduced(cg_group *g, const cg_call *call, const cg_block *give, const char *mine, char *to, size_t own, size_t chunk, size_t size, cg_kernel kernel, int *who) {
    size_t given = cg_block_bytes(give);
    for (size_t at = 0;; at += chunk) {
        size_t length = chunk_at(at, own, chunk), next = chunk_at(at + chunk, given, chunk), both = cg_smaller(length, next);
        char *theirs = cg_slot_of(g, 1 - g->me, g->step), *put = cg_slot_of(g, g->me, g->step + 1);
        const void *sources[2];
        if (both > 0) {
            sources[g->me] = mine + at, sources[1 - g->me] = theirs;
            kernel(to + at, sources, 2, both / size, put, give->base + at + chunk);
        }
        if (length > both) {
            sources[g->me] = mine + at + both, sources[1 - g->me] = theirs + both;
            kernel(to + at + both, sources, 2, (length - both) / size, NULL, NULL);
        }
        if (next > both) memcpy(put + both, give->base + at + chunk + both, next - both);
        if (at + chunk >= own && at + chunk >= given) return CG_OK;
        g->step++;
        int result = cg_next_step(g, call, who);
        if (result != CG_OK) return result;
    }
}

int cg_relay(cg_group *g, const cg_call *call, const cg_block *give, const cg_block *into, const cg_block *keep, size_t chunk, int *who) {
    size_t given = cg_block_bytes(give), taken = cg_block_bytes(into);
    int way = cg_choose_landing(g, g->landings, into);
    cg_stopwatch landing = cg_start(taken);
    for (size_t at = 0;; at += chunk) {
        size_t length = chunk_at(at, taken, chunk), next = chunk_at(at + chunk, given, chunk);
        size_t both = give->rows <= 1 && into->rows <= 1 ? cg_smaller(length, next) : 0;
        const char *theirs = cg_slot_of(g, 1 - g->me, g->step);
        char *put = cg_slot_of(g, g->me, g->step + 1);
        if (both > 0) cg_copy_both(into->base + at, theirs, put, give->base + at + chunk, both, way);
        cg_pack(put + both, give, at + chunk + both, next - both, 0);
        if (next > 0 && keep != NULL) {
            /* Not from the slot, whose lines are on their way to this core still. */
            const char *own = give->base + at + chunk;
            if (way && keep->rows <= 1) cg_copy(keep->base + at + chunk, own, next, way);
            else cg_unpack(keep, own, at + chunk, next);
        }
        cg_unpack(into, theirs + both, at + both, length - both);
        if (at + chunk >= given && at + chunk >= taken) break;
        g->step++;
        int result = cg_next_step(g, call, who);
        if (result != CG_OK) return result;
    }
    if (way) cg_stream_fence();
    cg_note_landing(g, g->landings, into, cg_stop(&landing));
    return CG_OK;
}
