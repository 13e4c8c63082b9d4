/* The pipelined exchange of two ranks, chunk by chunk through swapped slots.
 *
 * While a rank reads a chunk of its peer it writes its own next chunk, so that two chunks of each rank are in flight. Swapped slots
 * (steps.h) never leave the caches, and each cache line crosses once for the data that it carries. The slots are written by plain stores:
 * nontemporal ones were not faster on any pair of cores. */
#ifndef COMMGRAPH_PIPELINED_H
#define COMMGRAPH_PIPELINED_H

#include "collective.h"

/* Bytes of a chunk, where the larger side of a call sends `bytes`. */
size_t cg_pipelined_chunk(cg_group *g, size_t bytes);

/* Arrives at the first step of a call. Stages the first chunk of `send`, unless the peer can read `send` at `where`. */
void cg_stage_first(cg_group *g, const cg_call *call, const cg_block *send, size_t chunk, uint64_t where);
/* After `cg_agree` and every other comparison of that step, because it may go on to the next step. Sets `where` to that of the peer, if
 * both ranks read in place; else to 0, and both have staged their first chunk. */
int cg_agree_on_staging(cg_group *g, const cg_call *call, const cg_block *send, size_t chunk, uint64_t *where, int *who);

/* The rest of a call, after `cg_agree_on_staging`: sends all of `send`, and reduces `own` bytes at `mine` with those of the peer into `to`. */
int cg_pipelined_reduce(cg_group *g, const cg_call *call, const cg_block *send, const char *mine, char *to, size_t own, size_t chunk, size_t size, cg_kernel kernel, int *who);
/* The rest of a call without a reduction: sends all of `send`, and receives into `into`. `keep`, if not NULL, receives this rank's own
 * bytes after the first chunk, which are one run in `send`. */
int cg_pipelined_exchange(cg_group *g, const cg_call *call, const cg_block *send, const cg_block *into, const cg_block *keep, size_t chunk, int *who);

#endif
