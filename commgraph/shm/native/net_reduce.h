/* All-reduce over the links of a group. */
#ifndef COMMGRAPH_NET_REDUCE_H
#define COMMGRAPH_NET_REDUCE_H

#include "kernels.h"
#include "net.h"

/* Bytes of memory that a call needs beside its tensors. */
size_t cg_net_scratch_bytes(int n, size_t count, size_t size);
/* Every rank is linked. `to` may be `from`. After a result other than CG_OK the group is unusable, and no link touches the tensors. */
int cg_net_all_reduce(cg_net *net, const cg_net_call *call, const void *from, void *to, size_t count, int dtype, int op, void *scratch, int *who);

#endif
