/* Two ranks. While one reads a chunk of the other's it writes its own next one, so that two chunks of each are on their way, in slots that
 * change hands: they never leave the caches, and a line crosses once for what it carries. Such slots are written plainly: streaming them
 * past the caches was never faster, wherever the ranks ran. */
#ifndef COMMGRAPH_RELAY_H
#define COMMGRAPH_RELAY_H

#include "collective.h"

/* Of what the larger side of a call gives, at once. */
size_t cg_relay_chunk(cg_group *g, size_t bytes);

/* Arrives at the first step of a call. A rank stages the beginning of what it gives, if that does not lie at `where` for the other to read. */
void cg_offer(cg_group *g, const cg_call *call, const cg_block *give, size_t chunk, uint64_t where);
/* After `cg_agree`, and whatever else is compared in that step, for this may go on to the next one. Then `where` is that of the other, if what
 * both give is read where it lies; else it is 0, and both are staged. */
int cg_meet(cg_group *g, const cg_call *call, const cg_block *give, size_t chunk, uint64_t *where, int *who);

/* The rest of a call, after `cg_meet`: gives all of `give`, and reduces `own` bytes of this rank's at `mine` and of the other's to `to`. */
int cg_relay_reduced(cg_group *g, const cg_call *call, const cg_block *give, const char *mine, char *to, size_t own, size_t chunk, size_t size, cg_kernel kernel, int *who);
/* The same where what the other gives only moves, to `into`. `keep`, if not NULL, is where this rank's own bytes after the first chunk are copied
 * as well; they are one run in `give`. */
int cg_relay(cg_group *g, const cg_call *call, const cg_block *give, const cg_block *into, const cg_block *keep, size_t chunk, int *who);

#endif
