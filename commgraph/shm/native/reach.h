/* Reading and writing memory of another participant's process without its help, which saves a copy where both would copy.
 *
 * By the kernel (process_vm_readv), which has to be allowed to: containers and hardened systems may forbid it, so that it is tried before it
 * is relied on. Threads of one process are reached in the same way: memory that has gone is an error then, and not a crash. */
#ifndef COMMGRAPH_REACH_H
#define COMMGRAPH_REACH_H

#include "copy.h"
#include "team.h"

enum { CG_PULL, CG_PUSH };
/* The block is filled with what lies at `address` in the process of that seat, or put there. 0 if not all of it could be. */
int cg_reach(const cg_team *team, int seat, const cg_block *block, uint64_t address, int direction);
/* Whether others reach memory of this participant's: not such as a device's driver has mapped, for one. It asks the kernel. */
int cg_is_reachable(const cg_team *team, const void *data);

#endif
