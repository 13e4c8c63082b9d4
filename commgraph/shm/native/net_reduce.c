#include "net_reduce.h"

#include <string.h>

#include "steps.h"

enum {
    ONE_SHOT = 64 * 1024, /* bytes up to which every rank sends its whole tensor to all others */
    ONE_SHOT_RANKS = 8,   /* ranks up to which it does so at once; of more ranks in log2(n) steps, in which it passes on those of others */
    CHUNK = 256 * 1024,   /* bytes of one message of a larger tensor */
    BOTH_WHOLE = 4,       /* chunks up to which two ranks send each other all of it */
    DEPTH = 4             /* chunks that are received ahead of their reduction: they stay in a cache until then */
};

/* Each rank reduces all elements of all ranks. */
static int one_shot(cg_net *net, const cg_net_call *call, const void *from, void *to, size_t count, size_t size, cg_kernel kernel, int *who) {
    size_t bytes = count * size;
    int n = net->n, used = 0;
    char *scratch = cg_pool_take(call->pool, bytes * (size_t)(n - 1));
    if (scratch == NULL) return CG_NOMEM;
    cg_message messages[2 * n];
    const void *sources[n];
    sources[net->me] = from;
    for (int i = 1; i < n; i++) {
        int p = (net->me + i) % n;
        char *there = scratch + (size_t)(i - 1) * bytes;
        sources[p] = there;
        cg_net_send(net, &messages[used++], p, call->tag, from, bytes);
        cg_net_receive(net, &messages[used++], p, call->tag, there, bytes);
    }
    int result = cg_net_finish(net, call, messages, used, who);
    if (result == CG_OK) kernel(to, sources, n, count, NULL, NULL);
    cg_pool_give(scratch);
    return result;
}

/* The same among many ranks: each would have a link to all others, and send to all. */
static int by_gathering(cg_net *net, const cg_net_call *call, const void *from, void *to, size_t count, size_t size, cg_kernel kernel, int *who) {
    const int n = net->n;
    const size_t bytes = count * size;
    char *scratch = cg_pool_take(call->pool, bytes * (size_t)n);
    if (scratch == NULL) return CG_NOMEM;
    size_t sizes[n];
    cg_block into[n];
    const void *sources[n];
    for (int p = 0; p < n; p++) {
        sizes[p] = bytes;
        sources[p] = scratch + (size_t)p * bytes;
        into[p] = (cg_block){scratch + (size_t)p * bytes, 1, bytes, bytes};
    }
    int result = cg_net_gatherv(net, call, from, sizes, into, -1, who);
    if (result == CG_OK) kernel(to, sources, n, count, NULL, NULL);
    cg_pool_give(scratch);
    return result;
}

int cg_net_reduces_with(const cg_net *net, size_t bytes, int peer) {
    return bytes > ONE_SHOT || net->n <= ONE_SHOT_RANKS || cg_net_gathers_with(net, peer);
}

static size_t at_most(size_t a, size_t b) { return a < b ? a : b; }

/* Two ranks send each other all chunks: as many bytes as in two_shot, of which none waits for a reduction before it is sent. Each rank reduces
 * twice as many elements, chunk by chunk as they come. */
static int whole_to_each(cg_net *net, const cg_net_call *call, const char *from, char *to, size_t count, size_t size, cg_kernel kernel, int *who) {
    const int me = net->me, peer = 1 - me, chunks = (int)((count * size + CHUNK - 1) / CHUNK);
    char *scratch = cg_pool_take(call->pool, count * size);
    if (scratch == NULL) return CG_NOMEM;
    cg_message messages[2 * BOTH_WHOLE], *sends = messages, *coming = messages + chunks;
    for (int k = 0; k < 2 * chunks; k++) {
        const size_t at = (size_t)(k % chunks) * CHUNK, bytes = at_most(count * size - at, CHUNK);
        if (k < chunks) cg_net_receive(net, &coming[k], peer, call->tag, scratch + at, bytes);
        else cg_net_send(net, &sends[k - chunks], peer, call->tag, from + at, bytes);
    }
    int result = CG_OK;
    for (int k = 0; k < chunks && result == CG_OK; k++) {
        const size_t at = (size_t)k * CHUNK;
        cg_messages part = {&coming[k], 1}, own = {&sends[k], 1};
        result = cg_net_wait(net, call, cg_net_all, &part, who);
        if (result == CG_OK && to == from) result = cg_net_wait(net, call, cg_net_all, &own, who); /* the sum takes its place */
        if (result != CG_OK) break;
        const void *sources[2];
        sources[me] = from + at, sources[peer] = scratch + at;
        kernel(to + at, sources, 2, at_most(count * size - at, CHUNK) / size, NULL, NULL);
    }
    cg_messages all = {sends, chunks};
    if (result == CG_OK) result = cg_net_wait(net, call, cg_net_all, &all, who);
    if (result != CG_OK) cg_net_withdraw(net, messages, 2 * chunks);
    cg_pool_give(scratch);
    return result;
}

/* One chunked all-reduce. */
typedef struct {
    cg_net *net;
    const cg_net_call *call;
    const char *from;
    char *to, *scratch;
    size_t count, size, chunk; /* chunk: elements */
    size_t own, own_end, own_chunks;
    cg_message *sends, *coming, *results; /* coming[chunk * (n - 1) + i - 1]: of rank me + i */
    size_t n_sends, n_results;
} chunked;

/* Begins to receive the parts of one chunk of this rank's partition. */
static void expect(chunked *c, size_t number) {
    int n = c->net->n;
    size_t at = c->own + number * c->chunk, bytes = at_most(c->own_end - at, c->chunk) * c->size, slot = number % DEPTH;
    for (int i = 1; i < n; i++)
        cg_net_receive(c->net, &c->coming[number * (size_t)(n - 1) + (size_t)i - 1], (c->net->me + i) % n, c->call->tag,
                       c->scratch + (slot * (size_t)(n - 1) + (size_t)i - 1) * c->chunk * c->size, bytes);
}

/* Sends the parts of the others' partitions (`from`), or begins to receive their results (`to`), which they send after all parts. */
static void begin_others(chunked *c, int receive) {
    int n = c->net->n;
    size_t begin, end;
    for (size_t k = 0;; k++) {
        int more = 0;
        for (int i = 1; i < n; i++) {
            int p = (c->net->me + i) % n;
            cg_partition_of(c->count, c->size, n, p, &begin, &end);
            size_t at = begin + k * c->chunk;
            if (at >= end) continue;
            more = 1;
            size_t bytes = at_most(end - at, c->chunk) * c->size;
            if (receive) cg_net_receive(c->net, &c->results[c->n_results++], p, c->call->tag, c->to + at * c->size, bytes);
            else cg_net_send(c->net, &c->sends[c->n_sends++], p, c->call->tag, c->from + at * c->size, bytes);
        }
        if (!more) return;
    }
}

static int reduce_chunks(chunked *c, cg_kernel kernel, int *who) {
    const int n = c->net->n, me = c->net->me;
    size_t ahead = at_most(c->own_chunks, DEPTH);
    for (size_t k = 0; k < ahead; k++) expect(c, k);
    begin_others(c, 0);
    if (ahead == c->own_chunks) begin_others(c, 1);
    for (size_t k = 0; k < c->own_chunks; k++) {
        size_t at = c->own + k * c->chunk, some = at_most(c->own_end - at, c->chunk);
        const void *sources[n];
        sources[me] = c->from + at * c->size;
        for (int i = 1; i < n; i++) sources[(me + i) % n] = c->scratch + (k % DEPTH * (size_t)(n - 1) + (size_t)i - 1) * c->chunk * c->size;
        cg_messages parts = {&c->coming[k * (size_t)(n - 1)], n - 1};
        int result = cg_net_wait(c->net, c->call, cg_net_all, &parts, who);
        if (result != CG_OK) return result;
        kernel(c->to + at * c->size, sources, n, some, NULL, NULL);
        /* The messages of the parts have ended, and are those of the results now. The result takes the place of bytes of `from` that only
         * this rank needs. */
        for (int i = 1; i < n; i++) cg_net_send(c->net, &parts.messages[i - 1], (me + i) % n, c->call->tag, c->to + at * c->size, some * c->size);
        if (ahead < c->own_chunks) {
            expect(c, ahead++);
            if (ahead == c->own_chunks) begin_others(c, 1);
        }
    }
    cg_messages all[] = {{c->results, (int)c->n_results}, {c->sends, (int)c->n_sends}, {c->coming, (int)c->own_chunks * (n - 1)}};
    for (int i = 0; i < 3; i++) {
        int result = cg_net_wait(c->net, c->call, cg_net_all, &all[i], who);
        if (result != CG_OK) return result;
    }
    return CG_OK;
}

/* Each rank reduces its partition, chunk by chunk as they come, and sends the result to all others. */
static int two_shot(cg_net *net, const cg_net_call *call, const void *from, void *to, size_t count, size_t size, cg_kernel kernel, int *who) {
    const size_t others = (size_t)net->n - 1, chunk = CHUNK / size;
    chunked c = {.net = net, .call = call, .from = from, .to = to, .count = count, .size = size, .chunk = chunk};
    size_t first, first_end;
    cg_partition_of(count, size, net->n, 0, &first, &first_end); /* the largest */
    cg_partition_of(count, size, net->n, net->me, &c.own, &c.own_end);
    c.own_chunks = (c.own_end - c.own + chunk - 1) / chunk;
    const size_t chunks = (first_end + chunk - 1) / chunk, all = 3 * chunks * others;
    cg_message *messages = cg_pool_take(call->pool, all * sizeof *messages);
    c.scratch = messages == NULL ? NULL : cg_pool_take(call->pool, at_most(chunks, DEPTH) * others * chunk * size);
    int result = CG_NOMEM;
    if (c.scratch != NULL) {
        for (size_t i = 0; i < all; i++) messages[i].state = CG_OK;
        c.sends = messages, c.coming = messages + chunks * others, c.results = messages + 2 * chunks * others;
        result = reduce_chunks(&c, kernel, who);
        if (result != CG_OK) cg_net_withdraw(net, messages, (int)all);
        cg_pool_give(c.scratch);
    }
    if (messages != NULL) cg_pool_give(messages);
    return result;
}

int cg_net_all_reduce(cg_net *net, const cg_net_call *call, const void *from, void *to, size_t count, int dtype, int op, int *who) {
    cg_kernel kernel = cg_find_kernel(dtype, op);
    size_t size = cg_dtype_bytes(dtype);
    if (count == 0) return CG_OK;
    if (count * size <= ONE_SHOT && net->n > ONE_SHOT_RANKS) return by_gathering(net, call, from, to, count, size, kernel, who);
    if (count * size <= ONE_SHOT) return one_shot(net, call, from, to, count, size, kernel, who);
    if (count * size <= BOTH_WHOLE * CHUNK && net->n == 2) return whole_to_each(net, call, from, to, count, size, kernel, who);
    return two_shot(net, call, from, to, count, size, kernel, who);
}

int cg_net_reduce_scatter(cg_net *net, const cg_net_call *call, const cg_block *out, void *to, int dtype, int op, int *who) {
    const int n = net->n, me = net->me;
    const size_t bytes = cg_block_bytes(&out[me]);
    char *scratch = cg_pool_take(call->pool, bytes * (size_t)n);
    if (scratch == NULL) return CG_NOMEM;
    const void *sources[n];
    cg_block into[n];
    for (int p = 0; p < n; p++) {
        sources[p] = scratch + (size_t)p * bytes;
        into[p] = (cg_block){scratch + (size_t)p * bytes, 1, bytes, bytes};
    }
    if (cg_is_dense(&out[me])) {
        sources[me] = out[me].base;
        into[me] = out[me];
    }
    int result = cg_net_all_to_allv(net, call, out, into, who);
    if (result == CG_OK && bytes > 0) cg_find_kernel(dtype, op)(to, sources, n, bytes / cg_dtype_bytes(dtype), NULL, NULL);
    cg_pool_give(scratch);
    return result;
}
