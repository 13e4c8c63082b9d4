#include "net_reduce.h"

#include <stdlib.h>
#include <string.h>

#include "steps.h"

enum {
    ONE_SHOT = 64 * 1024, /* bytes up to which every rank sends its whole tensor to all others */
    CHUNK = 256 * 1024    /* bytes of one message of a larger tensor */
};

static size_t largest_partition(int n, size_t count, size_t size) {
    size_t begin, end;
    cg_partition_of(count, size, n, 0, &begin, &end);
    return end;
}

size_t cg_net_scratch_bytes(int n, size_t count, size_t size) {
    return (count * size <= ONE_SHOT ? count : largest_partition(n, count, size)) * size * (size_t)(n - 1);
}

/* Each rank reduces all elements of all ranks. */
static int one_shot(cg_net *net, const cg_net_call *call, const void *from, void *to, size_t count, size_t size, cg_kernel kernel, char *scratch, int *who) {
    size_t bytes = count * size;
    int n = net->n, used = 0;
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
    cg_messages all = {messages, used};
    int result = cg_net_wait(net, call, cg_net_all, &all, who);
    if (result != CG_OK) cg_net_withdraw(net, messages, used);
    else kernel(to, sources, n, count, NULL, NULL);
    return result;
}

/* Each rank reduces its partition, chunk by chunk as they come, and sends the result to all others. A chunk of the result takes the place of one
 * that was sent before, as its reduction needed that. */
static int two_shot(cg_net *net, const cg_net_call *call, const char *from, char *to, size_t count, size_t size, cg_kernel kernel, char *scratch, int *who) {
    const int n = net->n, me = net->me;
    const size_t chunk = CHUNK / size, most = largest_partition(n, count, size), chunks = (most + chunk - 1) / chunk;
    cg_message *messages = malloc(sizeof *messages * 4 * (size_t)n * chunks);
    if (messages == NULL) return CG_NOMEM;
    cg_message *coming = messages + 2 * (size_t)n * chunks; /* [chunk][rank - me]: parts of this rank's partition */
    int used = 0, result = CG_OK;
    size_t own, own_end, begin, end;
    cg_partition_of(count, size, n, me, &own, &own_end);
    for (size_t c = 0; c < chunks; c++) {
        for (int i = 1; i < n; i++) {
            int p = (me + i) % n;
            cg_message *m = &coming[c * (size_t)n + (size_t)i];
            size_t at = own + c * chunk;
            m->state = CG_OK;
            if (at >= own_end) continue;
            size_t some = own_end - at < chunk ? own_end - at : chunk;
            cg_net_receive(net, m, p, call->tag, scratch + ((size_t)(i - 1) * most + c * chunk) * size, some * size);
        }
    }
    for (size_t c = 0; c < chunks; c++) {
        for (int i = 1; i < n; i++) {
            int p = (me + i) % n;
            cg_partition_of(count, size, n, p, &begin, &end);
            size_t at = begin + c * chunk;
            if (at >= end) continue;
            size_t some = end - at < chunk ? end - at : chunk;
            cg_net_send(net, &messages[used++], p, call->tag, from + at * size, some * size);
        }
    }
    /* The peers send results after all parts of partitions, so these receives stand behind those. */
    for (int i = 1; i < n; i++) {
        int p = (me + i) % n;
        cg_partition_of(count, size, n, p, &begin, &end);
        for (size_t at = begin; at < end; at += chunk) {
            size_t some = end - at < chunk ? end - at : chunk;
            cg_net_receive(net, &messages[used++], p, call->tag, to + at * size, some * size);
        }
    }
    int parts = used;
    for (size_t c = 0; result == CG_OK && c < chunks; c++) {
        size_t at = own + c * chunk;
        if (at >= own_end) break;
        size_t some = own_end - at < chunk ? own_end - at : chunk;
        const void *sources[n];
        sources[me] = from + at * size;
        for (int i = 1; i < n; i++) sources[(me + i) % n] = scratch + ((size_t)(i - 1) * most + c * chunk) * size;
        cg_messages wanted = {&coming[c * (size_t)n + 1], n - 1};
        result = cg_net_wait(net, call, cg_net_all, &wanted, who);
        if (result != CG_OK) break;
        kernel(to + at * size, sources, n, some, NULL, NULL);
        /* Their memory is that of the parts that have come. */
        for (int i = 1; i < n; i++) cg_net_send(net, &coming[c * (size_t)n + (size_t)i], (me + i) % n, call->tag, to + at * size, some * size);
    }
    if (result == CG_OK) {
        cg_messages rest = {messages, parts};
        result = cg_net_wait(net, call, cg_net_all, &rest, who);
    }
    for (size_t c = 0; result == CG_OK && c < chunks; c++) {
        cg_messages sent = {&coming[c * (size_t)n + 1], n - 1};
        result = cg_net_wait(net, call, cg_net_all, &sent, who);
    }
    if (result != CG_OK) {
        cg_net_withdraw(net, messages, parts);
        for (size_t c = 0; c < chunks; c++) cg_net_withdraw(net, &coming[c * (size_t)n + 1], n - 1);
    }
    free(messages);
    return result;
}

int cg_net_all_reduce(cg_net *net, const cg_net_call *call, const void *from, void *to, size_t count, int dtype, int op, void *scratch, int *who) {
    cg_kernel kernel = cg_find_kernel(dtype, op);
    size_t size = cg_dtype_bytes(dtype);
    if (count * size <= ONE_SHOT) return one_shot(net, call, from, to, count, size, kernel, scratch, who);
    return two_shot(net, call, from, to, count, size, kernel, scratch, who);
}
