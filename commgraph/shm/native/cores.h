/* Ranks that nobody pinned: how one finds out that it shares a core with the peer it waits for, and moves to another.
 *
 * The kernel likes to wake a sleeper on the core of its waker, and where few cores share a cache it does not look for an idle one if they
 * were busy of late. Two ranks that take turns then stay on one core while the other idles, for as long as they run: neither a longer spin
 * (nobody can come while this one spins) nor the kernel's balancing (both sleep too often) ends it. So members say on which core they run,
 * and one that waits, finds its peer on its own core again and again, and another core idle all the while, moves there. It narrows the
 * affinity of its thread to that core, which moves it at once, and gives the former affinity back before anything else happens.
 *
 * It stays where it is if its affinity names one core, if the ranks of this host are more than the cores, or if no other core was idle
 * for more than half of the time (by /proc/stat) during which it was seen beside its peer: other programs need it. It
 * then looks half as often, down to once in 0.4 s.
 */
#ifndef COMMGRAPH_CORES_H
#define COMMGRAPH_CORES_H

#include <stdint.h>

typedef struct {
    int crowd;         /* ranks of this host */
    int64_t since;     /* seen beside a peer without a break since then; 0 for not now */
    int64_t patience;  /* before it looks for an idle core, ns */
    uint32_t *idle;    /* ticks for which each core had been idle at `since`; NULL before the first time */
} cg_cores;

/* Cores that the calling thread may run on; 1 where that cannot be known. */
int cg_cores_allowed(void);
/* The core that the calling thread runs on; -1 where that cannot be known. */
int cg_core(void);

void cg_cores_init(cg_cores *cores, int crowd);
void cg_cores_free(cg_cores *cores);
/* The calling thread waits: `beside` for a peer on its own core, or not. Returns whether it has moved to another core. */
int cg_cores_wait(cg_cores *cores, int beside, int64_t now);

/* The two halves of a move. Narrows the affinity to `core`, one of it; 0 if it could not, with nothing changed. */
typedef struct {
    unsigned long words[16]; /* as sched_getaffinity(2) has it, for 1024 cores */
} cg_affinity;
int cg_affinity_narrow(int core, cg_affinity *before);
/* Gives it back, unless somebody else has changed it meanwhile: then it is left alone, and 0 returned. */
int cg_affinity_restore(int core, const cg_affinity *before);

#endif
