/* Cross-memory attach: reading and writing the memory of another member's process, which saves the copy through shared memory.
 *
 * The kernel does it (process_vm_readv, process_vm_writev) if the process is allowed to: containers and hardened systems may forbid it, so
 * it is probed before use (cg_group_probe_cma). Memory of another thread of this process is accessed by the same calls: if it was unmapped
 * meanwhile they return an error, and the process does not crash. */
#ifndef COMMGRAPH_CMA_H
#define COMMGRAPH_CMA_H

#include "copy.h"
#include "team.h"

enum { CG_CMA_READ, CG_CMA_WRITE };
/* Result of a copy that failed while the member's process was there: CG_REFUSED if the kernel did not allow it, else CG_GONE: the member has
 * freed its tensor. To be called before anything else sets errno. */
int cg_cma_why(void);
/* Fills the block from `address` in the process of that member (CG_CMA_READ), or writes it there (CG_CMA_WRITE). 0 if not all of it was
 * copied. */
int cg_cma_copy(const cg_team *team, int member, const cg_block *block, uint64_t address, int direction);
/* Whether other members can access this memory of this process. Asks the kernel; memory that a device's driver has mapped is an example of
 * no. */
int cg_cma_can_access(const cg_team *team, const void *data);

#endif
