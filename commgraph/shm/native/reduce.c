#include "pipelined.h"
#include "steps.h"
#include "nontemporal.h"

#include <sched.h>
#include <string.h>

enum {
    /* Bytes, of all ranks together, up to which each rank reduces everything in one step; above, each reduces its partition, in one step
     * more. */
    ONE_SHOT = 512 * 1024,
    /* Bytes that are reduced at once, so that they are still in the first-level cache when they are copied. */
    REDUCE_BLOCK = 16 * 1024,
    RELEASE_PATIENCE_NS = 1000000000, /* longest wait for the other ranks to release a tensor: a thread may be without a core for a while */
};

/* One-shot all-reduce: each rank reduces all elements of all ranks. */
static int one_shot(cg_group *g, const cg_call *call, const void *from, void *to, size_t count, size_t size, cg_kernel kernel, int *who) {
    size_t bytes = count * size;
    int nontemporal = cg_choose_stores(g, bytes);
    cg_stopwatch writing = cg_start(bytes);
    cg_copy(cg_slot_of(g, g->me, g->step), from, bytes, nontemporal);
    if (nontemporal) cg_store_fence();
    cg_note_write(g, bytes, nontemporal, cg_stop(&writing));
    cg_announce(g, call, 0, 1, nontemporal);
    int result = cg_agree(g, call, who);
    if (result != CG_OK) return result;
    const void *sources[g->n];
    for (int p = 0; p < g->n; p++) sources[p] = p == g->me ? from : cg_slot_of(g, p, g->step);
    cg_stopwatch reading = cg_start(bytes);
    kernel(to, sources, g->n, count, NULL, NULL);
    cg_note_reads(g, bytes, cg_stop(&reading));
    return CG_OK;
}

/* Reduces, in place, tensors that all lie in shared memory: each rank reduces its partition in its own tensor, and then takes the partitions of the
 * others from theirs. No rank writes to another's tensor, which is its owner's again once a call has failed there. */
static int reduce_in_shared(cg_group *g, const cg_call *call, size_t count, size_t size, cg_kernel kernel, int *who) {
    char *tensors[g->n];
    const void *sources[g->n];
    for (int p = 0; p < g->n; p++) tensors[p] = cg_resolve(g, p, cg_line_of(g, p, g->step)->where);
    size_t at, end, block = REDUCE_BLOCK / size;
    cg_partition_of(count, size, g->n, g->me, &at, &end);
    for (; at < end; at += block) {
        size_t length = cg_smaller(block, end - at);
        for (int p = 0; p < g->n; p++) sources[p] = tensors[p] + at * size;
        kernel(tensors[g->me] + at * size, sources, g->n, length, NULL, NULL);
    }
    int result = cg_leave_together(g, call, who);
    for (int i = 1; result == CG_OK && i < g->n; i++) {
        int p = (g->me + i) % g->n;
        cg_partition_of(count, size, g->n, p, &at, &end);
        cg_copy(tensors[g->me] + at * size, tensors[p] + at * size, (end - at) * size, 0);
    }
    return result == CG_OK ? cg_leave_together(g, call, who) : result;
}

/* In bytes [begin, end) of this rank's reduce buffer: copies the result of the preceding chunk to `before`, if there is one, and a part of
 * the next chunk into its place. */
static void swap_chunk(char *mine, char *before, const char *part, size_t begin, size_t end, int nontemporal) {
    if (before != NULL && nontemporal == 0) {
        cg_copy_both(before + begin, mine + begin, mine + begin, part + begin, end - begin, 0);
        return;
    }
    if (before != NULL) memcpy(before + begin, mine + begin, end - begin);
    cg_copy(mine + begin, part + begin, end - begin, nontemporal);
}

/* Two-shot all-reduce, chunk by chunk: each rank reduces its partition of all reduce buffers, and writes the result back into them. It
 * holds these cache lines since it read them, and their owners get them back with the result, ready for the next chunk. A line moves once
 * in each direction. */
static int two_shot(cg_group *g, const cg_call *call, const void *from, void *to, size_t count, size_t size, int in_place, cg_kernel kernel, int *who) {
    uint64_t where = cg_find_region(g, from, count * size);
    size_t chunk = cg_reduce_buffer_bytes(g->slot_bytes) / size, own_begin, own_end;
    char *mine = cg_reduce_buffer_of(g, g->me), *before = NULL;
    for (size_t at = 0; at < count; at += chunk) {
        size_t length = cg_smaller(chunk, count - at), block = REDUCE_BLOCK / size;
        cg_partition_of(length, size, g->n, g->me, &own_begin, &own_end);
        int nontemporal = cg_choose_stores(g, length * size);
        if (at > 0) g->step++;
        if (where == 0) {
            /* All of the chunk except this rank's own partition, which no other rank reads. */
            const char *part = (const char *)from + at * size;
            cg_stopwatch writing = cg_start(length * size);
            swap_chunk(mine, before, part, 0, own_begin * size, nontemporal);
            swap_chunk(mine, before, part, own_end * size, length * size, nontemporal);
            if (nontemporal) cg_store_fence();
            cg_note_write(g, length * size, nontemporal, cg_stop(&writing));
        }
        int result;
        if (at == 0) {
            cg_announce(g, call, where, 1, nontemporal);
            result = cg_agree(g, call, who);
            if (result != CG_OK) return result;
            int direct = in_place;
            for (int p = 0; p < g->n; p++) direct = direct && cg_line_of(g, p, g->step)->where != 0;
            if (direct) return reduce_in_shared(g, call, count, size, kernel, who);
        } else {
            cg_line_of(g, g->me, g->step)->where = where;
            cg_line_of(g, g->me, g->step)->nontemporal = (uint32_t)nontemporal;
            result = cg_next_step(g, call, who);
            if (result != CG_OK) return result;
        }
        const char *parts[g->n];
        const void *sources[g->n];
        for (int p = 0; p < g->n; p++) {
            uint64_t there = cg_line_of(g, p, g->step)->where;
            parts[p] = p == g->me ? (const char *)from + at * size : there ? cg_resolve(g, p, there) + at * size : cg_reduce_buffer_of(g, p);
        }
        char *out = (char *)to + at * size;
        cg_stopwatch reading = cg_start(length * size);
        for (size_t i = own_begin; i < own_end; i += block) {
            size_t some = cg_smaller(block, own_end - i);
            for (int p = 0; p < g->n; p++) sources[p] = parts[p] + i * size;
            kernel(out + i * size, sources, g->n, some, NULL, NULL);
            for (int k = 1; k < g->n; k++) cg_copy(cg_reduce_buffer_of(g, (g->me + k) % g->n) + i * size, out + i * size, some * size, nontemporal);
        }
        if (nontemporal) cg_store_fence();
        cg_note_reads(g, length * size, cg_stop(&reading));
        result = cg_leave_together(g, call, who); /* the parts, which may lie in the tensors of other ranks, have been read; the results have been written */
        if (result != CG_OK) return result;
        /* The parts of the next chunk replace these results, if both chunks are partitioned alike. */
        before = where == 0 && at + 2 * chunk <= count ? out : NULL;
        if (before != NULL) continue;
        memcpy(out, mine, own_begin * size);
        memcpy(out + own_end * size, mine + own_end * size, (length - own_end) * size);
    }
    return CG_OK;
}

static int takes_same_process_path(const cg_group *g, size_t bytes) { return g->same_process_from && bytes >= g->same_process_from; }

/* Ends a same-process call. The ranks, threads of one process, access each other's tensors between the first step of a call and the second,
 * which is its last. A rank that gives up therefore marks itself as failed, and stays until all others have released its tensors: they
 * check for a failed rank between two blocks, and one that arrives later does not begin. */
static int end_same_process(cg_group *g, const cg_call *call, int result, int *who) {
    const uint32_t first = g->step;
    atomic_store_explicit(&cg_line_of(g, g->me, first)->released, first, memory_order_release);
    if (result == CG_OK) result = cg_leave_together(g, call, who);
    if (result == CG_OK) return result;
    cg_team_fail(g->team);
    const int64_t patience = cg_clock_ns() + RELEASE_PATIENCE_NS;
    for (int p = 0; p < g->n; p++) {
        cg_line *line = cg_line_of(g, p, first);
        /* A rank that is in another call accesses no tensor of this one. */
        while (atomic_load_explicit(&line->released, memory_order_acquire) != first &&
               atomic_load_explicit(&line->step, memory_order_seq_cst) == first && line->tag == call->tag) {
            g->exposed = cg_clock_ns() > patience;
            if (g->exposed) return result;
            sched_yield();
        }
    }
    return result;
}

/* Reduces a block of the parts of all ranks, unless a rank has given up. */
static int reduce_block(cg_group *g, const char *const *parts, size_t offset, void *to, size_t count, cg_kernel kernel, int *who) {
    int result = cg_check_no_failure(g, who);
    if (result != CG_OK) return result;
    const void *sources[g->n];
    for (int p = 0; p < g->n; p++) sources[p] = parts[p] + offset;
    kernel(to, sources, g->n, count, NULL, NULL);
    return CG_OK;
}

static int reduce_same_process(cg_group *g, const cg_call *call, const void *from, void *to, size_t count, size_t size, cg_kernel kernel, int *who) {
    char *results[g->n];
    const char *parts[g->n];
    size_t at, end, block = REDUCE_BLOCK / size;
    uint64_t *mine = cg_pair_row(g, g->me, CG_WHERE); /* the row for all peers alike: element 0 is the address of the input, 1 that of the output */
    mine[0] = (uint64_t)(uintptr_t)from, mine[1] = (uint64_t)(uintptr_t)to;
    cg_announce(g, call, 0, 1, 0);
    int result = cg_agree(g, call, who);
    for (int p = 0; result == CG_OK && p < g->n; p++) {
        parts[p] = (const char *)(uintptr_t)cg_pair_row(g, p, CG_WHERE)[0];
        results[p] = (char *)(uintptr_t)cg_pair_row(g, p, CG_WHERE)[1];
    }
    cg_partition_of(count, size, g->n, g->me, &at, &end);
    for (; result == CG_OK && at < end; at += block) {
        size_t length = cg_smaller(block, end - at), offset = at * size;
        result = reduce_block(g, parts, offset, (char *)to + offset, length, kernel, who);
        for (int i = 1; result == CG_OK && i < g->n; i++) cg_copy(results[(g->me + i) % g->n] + offset, (char *)to + offset, length * size, 0);
    }
    return end_same_process(g, call, result, who);
}

static int reduce_scatter_same_process(cg_group *g, const cg_call *call, const cg_block *out, void *to, size_t count, size_t size, cg_kernel kernel, int *who) {
    const char *parts[g->n];
    size_t block = REDUCE_BLOCK / size;
    for (int p = 0; p < g->n; p++) cg_pair_row(g, g->me, CG_WHERE)[p] = (uint64_t)(uintptr_t)out[p].base;
    cg_announce(g, call, 0, 1, 0);
    int result = cg_agree(g, call, who);
    for (int p = 0; result == CG_OK && p < g->n; p++) parts[p] = (const char *)(uintptr_t)cg_pair_row(g, p, CG_WHERE)[g->me];
    for (size_t at = 0; result == CG_OK && at < count; at += block)
        result = reduce_block(g, parts, at * size, (char *)to + at * size, cg_smaller(block, count - at), kernel, who);
    return end_same_process(g, call, result, who);
}

/* Of two ranks, tensors in shared memory are read in place; neither rank leaves before the other has read. */
static int reduce_two_in_place(cg_group *g, const cg_call *call, const void *mine, const void *theirs, void *to, size_t count, cg_kernel kernel, int *who) {
    const void *sources[2];
    sources[g->me] = mine, sources[1 - g->me] = theirs;
    kernel(to, sources, 2, count, NULL, NULL);
    return cg_leave_together(g, call, who);
}

static int all_reduce_of_two(cg_group *g, const cg_call *call, const void *from, void *to, size_t count, size_t size, int in_place, cg_kernel kernel, int *who) {
    size_t bytes = count * size, chunk = cg_pipelined_chunk(g, bytes);
    uint64_t where = cg_find_region(g, from, bytes);
    cg_block send = {(char *)from, 1, bytes, bytes};
    cg_stage_first(g, call, &send, chunk, where);
    int result = cg_agree(g, call, who);
    if (result == CG_OK) result = cg_agree_on_staging(g, call, &send, chunk, &where, who);
    if (result != CG_OK) return result;
    if (where != 0 && in_place) return reduce_in_shared(g, call, count, size, kernel, who);
    if (where != 0) return reduce_two_in_place(g, call, from, cg_resolve(g, 1 - g->me, where), to, count, kernel, who);
    return cg_pipelined_reduce(g, call, &send, from, to, bytes, chunk, size, kernel, who);
}

int cg_all_reduce(cg_group *g, const cg_call *call, const void *from, void *to, size_t count, int dtype, int op, int in_place, int *who) {
    size_t size = cg_dtype_bytes(dtype), bytes = count * size;
    cg_kernel kernel = cg_find_kernel(dtype, op);
    cg_begin(g, call);
    g->bytes_sent += bytes;
    if (takes_same_process_path(g, bytes)) return reduce_same_process(g, call, from, to, count, size, kernel, who);
    if (g->n == 2) return all_reduce_of_two(g, call, from, to, count, size, in_place, kernel, who);
    /* Where reducing takes several times as long as copying, two-shot pays at smaller sizes. */
    if (bytes <= g->slot_bytes && bytes * (size_t)g->n * (size_t)cg_kernel_weight(dtype) <= ONE_SHOT)
        return one_shot(g, call, from, to, count, size, kernel, who);
    return two_shot(g, call, from, to, count, size, in_place, kernel, who);
}

int cg_can_halve_all_reduce(const cg_group *g, size_t count, int dtype) {
    size_t bytes = count * cg_dtype_bytes(dtype);
    if (bytes > CG_READ_IN_PLACE_FROM || bytes > g->slot_bytes || takes_same_process_path(g, bytes)) return 0;
    return g->n == 2 || bytes * (size_t)g->n * (size_t)cg_kernel_weight(dtype) <= ONE_SHOT;
}

void cg_all_reduce_begin(cg_group *g, const cg_call *call, const void *from, size_t count, int dtype) {
    size_t bytes = count * cg_dtype_bytes(dtype);
    cg_begin(g, call);
    g->bytes_sent += bytes;
    memcpy(cg_slot_of(g, g->me, g->step), from, bytes);
    cg_announce(g, call, 0, 1, 0);
}

int cg_all_reduce_end(cg_group *g, const cg_call *call, const void *from, void *to, size_t count, int dtype, int op, int *who) {
    int result = cg_agree(g, call, who);
    if (result != CG_OK || count == 0) return result;
    const void *sources[g->n];
    for (int p = 0; p < g->n; p++) sources[p] = p == g->me ? from : cg_slot_of(g, p, g->step);
    cg_find_kernel(dtype, op)(to, sources, g->n, count, NULL, NULL);
    return CG_OK;
}

int cg_reduce_scatter(cg_group *g, const cg_call *call, const cg_block *out, void *to, int dtype, int op, int *who) {
    int n = g->n;
    size_t size = cg_dtype_bytes(dtype), most = 0, total = 0, own = cg_block_bytes(&out[g->me]);
    cg_kernel kernel = cg_find_kernel(dtype, op);
    int flat = out[g->me].rows <= 1, runs = 1;
    for (int p = 0; p < n; p++) {
        size_t bytes = cg_block_bytes(&out[p]);
        if (bytes > most) most = bytes;
        total += bytes, runs = runs && out[p].rows <= 1;
    }
    g->bytes_sent += total - own;
    cg_begin(g, call);
    if (runs && takes_same_process_path(g, total)) return reduce_scatter_same_process(g, call, out, to, own / size, size, kernel, who);
    /* Whole tensors in shared memory are read in place, if their pieces are runs. */
    uint64_t where = runs ? cg_find_region(g, out[0].base, total) : 0;
    if (n == 2 && runs) {
        const cg_block *send = &out[1 - g->me];
        size_t chunk = cg_pipelined_chunk(g, most);
        cg_stage_first(g, call, send, chunk, where);
        int result = cg_agree(g, call, who);
        if (result == CG_OK) result = cg_agree_on_staging(g, call, send, chunk, &where, who);
        if (result != CG_OK) return result;
        if (where == 0) return cg_pipelined_reduce(g, call, send, out[g->me].base, to, own, chunk, size, kernel, who);
        const char *theirs = cg_resolve(g, 1 - g->me, where) + (out[g->me].base - out[0].base);
        return reduce_two_in_place(g, call, out[g->me].base, theirs, to, own / size, kernel, who);
    }
    size_t chunk = g->slot_bytes / (size_t)n / CG_LINE * CG_LINE, rounds = most ? (most + chunk - 1) / chunk : 1;
    int any_direct = 0;
    for (size_t k = 0; k < rounds; k++) {
        size_t at = k * chunk, staged = 0;
        if (k > 0) g->step++;
        for (int p = 0; p < n; p++) staged += at < cg_block_bytes(&out[p]) ? cg_smaller(chunk, cg_block_bytes(&out[p]) - at) : 0;
        int nontemporal = cg_choose_stores(g, staged);
        if (where == 0) {
            cg_stopwatch writing = cg_start(staged);
            for (int i = 1; i <= n; i++) {
                int p = (g->me + i) % n;
                size_t whole = cg_block_bytes(&out[p]);
                if (at < whole && !(p == g->me && flat))
                    cg_pack(cg_part_of(g, g->me, p, chunk, g->step), &out[p], at, cg_smaller(chunk, whole - at), p == g->me ? 0 : nontemporal);
            }
            if (nontemporal) cg_store_fence();
            cg_note_write(g, staged, nontemporal, cg_stop(&writing));
        }
        int result;
        if (k == 0) {
            cg_announce(g, call, where, (uint32_t)rounds, nontemporal);
            result = cg_agree(g, call, who);
            for (int p = 0; result == CG_OK && p < n; p++) any_direct |= cg_line_of(g, p, g->step)->where != 0;
        } else {
            cg_line_of(g, g->me, g->step)->where = where;
            cg_line_of(g, g->me, g->step)->nontemporal = (uint32_t)nontemporal;
            result = cg_next_step(g, call, who);
        }
        if (result != CG_OK) return result;
        if (at >= own) continue;
        size_t part = cg_smaller(chunk, own - at), offset = (size_t)(out[g->me].base - out[0].base);
        const void *sources[n];
        for (int p = 0; p < n; p++) {
            uint64_t there = cg_line_of(g, p, g->step)->where;
            sources[p] = p == g->me && flat ? out[p].base + at : there ? cg_resolve(g, p, there) + offset + at : cg_part_of(g, p, g->me, chunk, g->step);
        }
        cg_stopwatch reading = cg_start(part);
        kernel((char *)to + at, sources, n, part / size, NULL, NULL);
        cg_note_reads(g, part, cg_stop(&reading));
    }
    return any_direct ? cg_leave_together(g, call, who) : CG_OK;
}
