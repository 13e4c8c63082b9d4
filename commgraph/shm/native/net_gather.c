#include <string.h>

#include "net_reduce.h"

enum { DIRECT_RANKS = 4 }; /* up to which each rank sends its part to all others at once; of more ranks, log2(n) steps of growing parts */

int cg_net_all_to_allv(cg_net *net, const cg_net_call *call, const cg_block *out, const cg_block *into, int *who) {
    const int n = net->n, me = net->me;
    size_t room = 0;
    for (int p = 0; p < n; p++) {
        if (p == me) continue;
        if (!cg_is_dense(&out[p])) room += cg_block_bytes(&out[p]);
        if (!cg_is_dense(&into[p])) room += cg_block_bytes(&into[p]);
    }
    char *scratch = room == 0 ? NULL : cg_pool_take(call->pool, room), *at = scratch, *landed[n];
    if (room > 0 && scratch == NULL) return CG_NOMEM;
    cg_message messages[2 * n];
    int used = 0;
    for (int i = 1; i < n; i++) {
        int p = (me + i) % n;
        size_t going = cg_block_bytes(&out[p]), coming = cg_block_bytes(&into[p]);
        const char *from = out[p].base;
        if (!cg_is_dense(&out[p])) {
            cg_pack(at, &out[p], 0, going, 0);
            from = at;
            at += going;
        }
        landed[p] = NULL;
        if (!cg_is_dense(&into[p])) {
            landed[p] = at;
            at += coming;
        }
        if (coming > 0) cg_net_receive(net, &messages[used++], p, call->tag, landed[p] == NULL ? into[p].base : landed[p], coming);
        if (going > 0) cg_net_send(net, &messages[used++], p, call->tag, from, going);
    }
    const size_t own = cg_block_bytes(&into[me]);
    if (own > 0 && into[me].base != out[me].base) {
        if (cg_is_dense(&out[me])) cg_unpack(&into[me], out[me].base, 0, own);
        else if (cg_is_dense(&into[me])) cg_pack(into[me].base, &out[me], 0, own, 0);
        else /* equal rows, as of one tensor cut and joined along one dim */
            for (size_t row = 0; row < out[me].rows; row++) cg_unpack(&into[me], out[me].base + row * out[me].pitch, row * out[me].row, out[me].row);
    }
    int result = cg_net_finish(net, call, messages, used, who);
    for (int p = 0; p < n && result == CG_OK; p++)
        if (p != me && landed[p] != NULL) cg_unpack(&into[p], landed[p], 0, cg_block_bytes(&into[p]));
    if (scratch != NULL) cg_pool_give(scratch);
    return result;
}

int cg_net_gathers_with(const cg_net *net, int peer) {
    const int ahead = (peer - net->me + net->n) % net->n, behind = net->n - ahead;
    return net->n <= DIRECT_RANKS || (ahead & (ahead - 1)) == 0 || (behind & (behind - 1)) == 0;
}

/* After Bruck et al. (1997), as in communicators/gloo.py: the buffer begins with this rank's part, and the next ones continue it. */
static int gather_in_steps(cg_net *net, const cg_net_call *call, const char *mine, const size_t *bytes, const cg_block *into, int *who) {
    const int n = net->n, me = net->me;
    size_t ends[n + 1];
    ends[0] = 0;
    for (int i = 0; i < n; i++) ends[i + 1] = ends[i] + bytes[(me + i) % n];
    char *buffer = cg_pool_take(call->pool, ends[n]);
    if (buffer == NULL) return CG_NOMEM;
    memcpy(buffer, mine, bytes[me]);
    int result = CG_OK;
    for (int held = 1; held < n && result == CG_OK;) {
        int taken = held < n - held ? held : n - held, used = 0;
        cg_message messages[2];
        size_t coming = ends[held + taken] - ends[held];
        if (coming > 0) cg_net_receive(net, &messages[used++], (me + held) % n, call->tag, buffer + ends[held], coming);
        if (ends[taken] > 0) cg_net_send(net, &messages[used++], (me - held + n) % n, call->tag, buffer, ends[taken]);
        result = cg_net_finish(net, call, messages, used, who);
        held += taken;
    }
    for (int i = 0; i < n && result == CG_OK; i++) cg_unpack(&into[(me + i) % n], buffer + ends[i], 0, bytes[(me + i) % n]);
    cg_pool_give(buffer);
    return result;
}

int cg_net_gatherv(cg_net *net, const cg_net_call *call, const char *mine, const size_t *bytes, const cg_block *into, int root, int *who) {
    const int n = net->n, me = net->me;
    if (root < 0 && n > DIRECT_RANKS) return gather_in_steps(net, call, mine, bytes, into, who);
    cg_block out[n], wanted[n];
    for (int p = 0; p < n; p++) {
        int gets = p == me ? root < 0 || root == me : root < 0 || root == p;
        out[p] = (cg_block){(char *)(uintptr_t)mine, 1, gets ? bytes[me] : 0, bytes[me]};
        wanted[p] = root < 0 || root == me ? into[p] : (cg_block){NULL, 1, 0, 0};
    }
    return cg_net_all_to_allv(net, call, out, wanted, who);
}

/* The position of a rank in the tree, and the distance to its parent, which is twice that to its first child. */
static int position_of(const cg_net *net, int root, int rank) { return (rank - root + net->n) % net->n; }
static int distance_of(const cg_net *net, int position) {
    if (position > 0) return position & -position;
    int distance = 1;
    while (distance < net->n) distance <<= 1;
    return distance;
}

int cg_net_is_near(const cg_net *net, int root, int peer) {
    int mine = position_of(net, root, net->me), theirs = position_of(net, root, peer);
    int low = mine < theirs ? mine : theirs, high = mine < theirs ? theirs : mine;
    return high > 0 && high - (high & -high) == low;
}

int cg_net_broadcast(cg_net *net, const cg_net_call *call, void *data, size_t bytes, int root, int *who) {
    const int n = net->n, position = position_of(net, root, net->me);
    int distance = distance_of(net, position), used = 0;
    if (bytes == 0) return CG_OK;
    cg_message messages[32];
    if (position > 0) {
        cg_net_receive(net, messages, (position - distance + root) % n, call->tag, data, bytes);
        int result = cg_net_finish(net, call, messages, 1, who);
        if (result != CG_OK) return result;
    }
    while ((distance >>= 1) > 0)
        if (position + distance < n) cg_net_send(net, &messages[used++], (position + distance + root) % n, call->tag, data, bytes);
    return cg_net_finish(net, call, messages, used, who);
}

int cg_net_barrier(cg_net *net, const cg_net_call *call, int *who) {
    const int n = net->n;
    char here[n];
    size_t bytes[n];
    cg_block into[n];
    for (int p = 0; p < n; p++) {
        here[p] = 0;
        bytes[p] = 1;
        into[p] = (cg_block){&here[p], 1, 1, 1};
    }
    return cg_net_gatherv(net, call, &here[net->me], bytes, into, -1, who);
}
