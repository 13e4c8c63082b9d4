/* Collectives over links. Messages of equal calls are those of the Python strategies (communicators/gloo.py), so that ranks may take either
 * way; they begin with the right neighbour, so that not all send to rank 0 first. Scratch memory is that of the call's pool. */
#ifndef COMMGRAPH_NET_REDUCE_H
#define COMMGRAPH_NET_REDUCE_H

#include "copy.h"
#include "kernels.h"
#include "net.h"

/* All return CG_*, and set *who where the result names a rank. All messages have the tag of the call. */

/* Every rank gets the reduction, in the order of the ranks and with the same bits. `to` may be `from`. */
int cg_net_all_reduce(cg_net *net, const cg_net_call *call, const void *from, void *to, size_t count, int dtype, int op, int *who);
/* Whether an all-reduce of so many bytes passes between this rank and `peer`: of small ones among many ranks each meets log2(n) on either side. */
int cg_net_reduces_with(const cg_net *net, size_t bytes, int peer);
/* Block out[p] is reduced by rank p; `to` receives the reduction of the blocks for this rank. */
int cg_net_reduce_scatter(cg_net *net, const cg_net_call *call, const cg_block *out, void *to, int dtype, int op, int *who);
/* Block out[p] goes to rank p, into[p] comes from rank p. */
int cg_net_all_to_allv(cg_net *net, const cg_net_call *call, const cg_block *out, const cg_block *into, int *who);
/* Rank p contributes bytes[p] bytes, this rank those at `mine`; into[p] receives those of rank p, which may lie there already. `root`: the
 * only rank that wants them, -1: all do. */
int cg_net_gatherv(cg_net *net, const cg_net_call *call, const char *mine, const size_t *bytes, const cg_block *into, int root, int *who);
/* Whether one that all want, and a barrier, passes between this rank and `peer`. */
int cg_net_gathers_with(const cg_net *net, int peer);
/* By a binomial tree. */
int cg_net_broadcast(cg_net *net, const cg_net_call *call, void *data, size_t bytes, int root, int *who);
/* Whether a broadcast passes between this rank and `peer`. */
int cg_net_is_near(const cg_net *net, int root, int peer);
int cg_net_barrier(cg_net *net, const cg_net_call *call, int *who);

#endif
