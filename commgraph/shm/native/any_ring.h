/* A wait for whichever of several rings has a record first. */
#ifndef COMMGRAPH_ANY_RING_H
#define COMMGRAPH_ANY_RING_H

#include "ring.h"

/* The index of the first of these rings in which cg_ring_next finds something; -1 at the deadline, where this side was closed, or where a signal
 * came. Each is private, and this thread is its only reader. Neither the death nor the leaving of a writer ends it: see to those in between. */
int cg_any_ring(cg_ring *const *rings, int n, int64_t deadline);

#endif
