/* How members of a team wait for each other and wake each other: spin, yield, futex.
 *
 * Every member has a doorbell. A member that waits sleeps on its own doorbell, and a member that makes a condition true rings the doorbells
 * of the sleepers. The order of stores and loads in `cg_wait` and `cg_notify` is the one that tests/shm/protocol_model.py explores: change
 * them together.
 *
 * A wait goes through three stages. It spins for twice as long as the longest of the recent waits that a spin could cover, between 10 and
 * 100 us: a peer that comes meanwhile saves both sides a system call, and a later peer is not worth a core. It yields, which hands the core
 * over to a peer that needs this very one. Then it sleeps on the futex. A rank does not spin where the ranks are more than the cores, nor
 * for a peer that was last seen on this very core: that peer cannot run while this rank spins. Members publish the core they run on when
 * they leave the first pauses of a wait, and when they ring the doorbell of a sleeper, so that a call whose peers have arrived already pays
 * nothing for it. A rank that stays beside its peer moves to another core, and one that was woken beside it goes back to its own: cores.h.
 */
#ifndef COMMGRAPH_WAIT_H
#define COMMGRAPH_WAIT_H

#include "team.h"

/* CLOCK_MONOTONIC, ns. */
int64_t cg_clock_ns(void);

typedef int (*cg_condition)(void *);
/* Waits until `ready(arg)`. `watched`: the member whose death or leaving ends the wait, or CG_EVERYONE. `collective`: a watched member that
 * is in another call of the same number, or in a later one, ends it as well. `deadline`: of cg_clock_ns(); a negative one counts from the
 * begin of this wait. */
int cg_wait(cg_team *team, cg_condition ready, void *arg, int watched, int collective, int64_t deadline, int *who);
/* After a sleep that began on core `before`: moves back there, if this rank is on the core of a peer now and `before` is no peer's. Returns
 * whether it moved. */
int cg_go_back(cg_team *team, int before);
/* After a store that may make a condition true: wakes the owner of the bell, one member, or all members, if they sleep. */
void cg_notify_bell(cg_bell *bell);
void cg_notify(cg_team *team, int member);
void cg_notify_all(cg_team *team);
/* Wakes the owner of the bell in any case. */
void cg_ring_doorbell(cg_bell *bell);

static inline void cg_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb" ::: "memory");
#endif
}

#endif
