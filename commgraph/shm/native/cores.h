/* Ranks that were not pinned: a rank that shares a core with the peer it waits for detects that, and moves to another core.
 *
 * The kernel prefers to wake a sleeper on the core of its waker, and where few cores share a cache it does not search for an idle one if
 * they were busy of late. Two ranks that take turns then stay on one core while another idles, for as long as they run: neither a longer
 * spin (the peer cannot run while this rank spins) nor the kernel's balancing (both sleep too often) ends it. Members therefore publish the
 * core they run on. A rank that waits, finds its peer on its own core again and again, and another core idle all the while, moves there. It
 * narrows the affinity of its thread to that core, which moves it at once, and restores the former affinity immediately.
 *
 * Where no other core was idle for more than half of that time (by /proc/stat), other programs use them: an engine's scheduler that polls,
 * for example. The two ranks would still compute one after the other for as long as they share a core, so that the one that waits moves to a
 * core on which no other rank was seen. And a rank that the kernel has woken on the core of a peer goes back to its own at once.
 *
 * A rank does not move if its affinity names one core, or if the ranks that share its cores are more than these. Without a move it checks
 * half as often, down to once in 0.4 s.
 */
#ifndef COMMGRAPH_CORES_H
#define COMMGRAPH_CORES_H

#include <stdint.h>

typedef struct {
    int sharing;       /* ranks that may run on a core of this one's, itself included */
    int64_t since;     /* when the rank was first seen beside a peer, without a break since; 0: it is not beside one */
    int64_t patience;  /* ns beside a peer before the rank searches for another core */
    uint32_t *idle;    /* ticks for which each core had been idle at `since`; NULL before the first time */
} cg_cores;

/* Cores that the calling thread may run on; 1 where that cannot be known. */
int cg_cores_allowed(void);
/* The core that the calling thread runs on; -1 where that cannot be known. */
int cg_core(void);

void cg_cores_init(cg_cores *cores, int sharing);
void cg_cores_free(cg_cores *cores);
/* Called by a thread that waits; `beside`: for a peer on its own core. `taken(arg, core)`: whether another rank was last seen on that core.
 * Returns whether the thread has moved to another core. */
int cg_cores_wait(cg_cores *cores, int beside, int64_t now, int (*taken)(const void *arg, int core), const void *arg);
/* Moves the calling thread to a core of its affinity, which stays as it was; 0, with nothing changed, if that failed. */
int cg_cores_move(int core);

/* The two halves of a move. cg_affinity_narrow narrows the affinity to `core`, one of it; 0 if that failed, with nothing changed. */
typedef struct {
    unsigned long words[16]; /* as sched_getaffinity(2) has it, for 1024 cores */
} cg_affinity;
int cg_affinity_narrow(int core, cg_affinity *before);
/* Restores the affinity. 0, with nothing changed, if it was set by other code meanwhile. */
int cg_affinity_restore(int core, const cg_affinity *before);

#endif
