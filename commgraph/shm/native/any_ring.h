/* A wait for the first record of several rings. */
#ifndef COMMGRAPH_ANY_RING_H
#define COMMGRAPH_ANY_RING_H

#include "ring.h"

/* Returns the index of the first ring in which cg_ring_next finds a record; -1 at the deadline, after this side was closed, or after a
 * signal. Each ring is private, and this thread its only reader. The death or leaving of a writer does not end the wait: check for it
 * between two waits. */
int cg_any_ring(cg_ring *const *rings, int n, int64_t deadline);

#endif
