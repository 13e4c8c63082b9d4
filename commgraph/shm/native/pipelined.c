#include "pipelined.h"

#include <string.h>

#include "steps.h"
#include "nontemporal.h"

enum {
    /* Small, so that the first chunk is in flight early; not too small, because each costs a step. */
    CHUNKS = 16,
    LEAST_CHUNK = 32 * 1024,
    LARGEST_CHUNK = 128 * 1024,
};

size_t cg_pipelined_chunk(cg_group *g, size_t bytes) {
    size_t chunk = cg_round_up(bytes / CHUNKS, CG_LINE);
    return cg_smaller(chunk < LEAST_CHUNK ? LEAST_CHUNK : cg_smaller(chunk, LARGEST_CHUNK), g->slot_bytes / CG_LINE * CG_LINE);
}

/* Bytes of the chunk at `at`. */
static size_t chunk_at(size_t at, size_t bytes, size_t chunk) { return at < bytes ? cg_smaller(chunk, bytes - at) : 0; }

static void stage(cg_group *g, const cg_block *send, size_t chunk) {
    cg_pack(cg_slot_of(g, g->me, g->step), send, 0, chunk_at(0, cg_block_bytes(send), chunk), 0);
}

void cg_stage_first(cg_group *g, const cg_call *call, const cg_block *send, size_t chunk, uint64_t where) {
    if (where == 0) stage(g, send, chunk);
    cg_announce(g, call, where, 1, 0);
}

int cg_agree_on_staging(cg_group *g, const cg_call *call, const cg_block *send, size_t chunk, uint64_t *where, int *who) {
    uint64_t mine = *where, theirs = cg_line_of(g, 1 - g->me, g->step)->where;
    *where = mine != 0 ? theirs : 0;
    if ((mine != 0) == (theirs != 0)) return CG_OK;
    g->step++;
    stage(g, send, chunk);
    return cg_next_step(g, call, who);
}

int cg_pipelined_reduce(cg_group *g, const cg_call *call, const cg_block *send, const char *mine, char *to, size_t own, size_t chunk, size_t size, cg_kernel kernel, int *who) {
    size_t send_bytes = cg_block_bytes(send);
    for (size_t at = 0;; at += chunk) {
        size_t length = chunk_at(at, own, chunk), next = chunk_at(at + chunk, send_bytes, chunk), both = cg_smaller(length, next);
        char *theirs = cg_slot_of(g, 1 - g->me, g->step), *put = cg_slot_of(g, g->me, g->step + 1);
        const void *sources[2];
        if (both > 0) {
            sources[g->me] = mine + at, sources[1 - g->me] = theirs;
            kernel(to + at, sources, 2, both / size, put, send->base + at + chunk);
        }
        if (length > both) {
            sources[g->me] = mine + at + both, sources[1 - g->me] = theirs + both;
            kernel(to + at + both, sources, 2, (length - both) / size, NULL, NULL);
        }
        if (next > both) memcpy(put + both, send->base + at + chunk + both, next - both);
        if (at + chunk >= own && at + chunk >= send_bytes) return CG_OK;
        g->step++;
        int result = cg_next_step(g, call, who);
        if (result != CG_OK) return result;
    }
}

int cg_pipelined_exchange(cg_group *g, const cg_call *call, const cg_block *send, const cg_block *into, const cg_block *keep, size_t chunk, int *who) {
    size_t send_bytes = cg_block_bytes(send), recv_bytes = cg_block_bytes(into);
    int nontemporal = cg_choose_output_stores(g, g->output_choices, into);
    cg_stopwatch copying = cg_start(recv_bytes);
    for (size_t at = 0;; at += chunk) {
        size_t length = chunk_at(at, recv_bytes, chunk), next = chunk_at(at + chunk, send_bytes, chunk);
        size_t both = send->rows <= 1 && into->rows <= 1 ? cg_smaller(length, next) : 0;
        const char *theirs = cg_slot_of(g, 1 - g->me, g->step);
        char *put = cg_slot_of(g, g->me, g->step + 1);
        if (both > 0) cg_copy_both(into->base + at, theirs, put, send->base + at + chunk, both, nontemporal);
        cg_pack(put + both, send, at + chunk + both, next - both, 0);
        if (next > 0 && keep != NULL) {
            /* From the tensor, not from the slot, whose lines are still being fetched. */
            const char *own = send->base + at + chunk;
            if (nontemporal && keep->rows <= 1) cg_copy(keep->base + at + chunk, own, next, nontemporal);
            else cg_unpack(keep, own, at + chunk, next);
        }
        cg_unpack(into, theirs + both, at + both, length - both);
        if (at + chunk >= send_bytes && at + chunk >= recv_bytes) break;
        g->step++;
        int result = cg_next_step(g, call, who);
        if (result != CG_OK) return result;
    }
    if (nontemporal) cg_store_fence();
    cg_note_output(g, g->output_choices, into, cg_stop(&copying));
    return CG_OK;
}
