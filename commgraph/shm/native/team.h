/* The participants of one piece of shared memory: who sits where, how they wait for each other, how a death is noticed.
 *
 * Every participant has a seat with a doorbell. Whoever waits for anything sleeps on its own doorbell, and whoever makes something true
 * rings the doorbells of those that sleep. A view serves one thread at a time; a ring between two has a view of its own on either side, with
 * doorbells of its own, so that its messages move while another thread is in a collective. The order of stores and loads in `cg_wait` and
 * `cg_notify` is the one that tests/shm/protocol_model.py explores: change them together.
 *
 * A wait goes through three stages. It spins for twice as long as the longest of the recent waits that a spin could cover, between 10 and 100
 * us: a peer that comes meanwhile saves both sides a system call, and one that is later than that is not worth a core. It yields, which hands
 * the core over to a peer that needs this very one. Then it sleeps. Nobody spins where the ranks are more than the cores, nor for a peer that
 * was last seen on this very core: it cannot come while this rank spins. Members publish the core they run on when they leave the first
 * pauses of a wait, and when they ring the doorbell of one that sleeps, so that a call whose peers are there already pays nothing for it.
 * A rank that stays beside its peer while another core idles moves there: cores.h.
 */
#ifndef COMMGRAPH_TEAM_H
#define COMMGRAPH_TEAM_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "cores.h"

#define CG_LINE 64 /* bytes of a cache line */

/* CG_FAILED: left after an error, so that what it did last does not count as done. */
enum { CG_EMPTY = 0, CG_SEATED = 1, CG_CLOSED = 2, CG_FAILED = 3 };

/* What a wait comes to. */
enum {
    CG_OK = 0,
    CG_TIMEOUT = 1,     /* the deadline passed; `who` was waited for */
    CG_LOST = 2,        /* participant `who` died */
    CG_GONE = 3,        /* participant `who` closed its side */
    CG_SELF = 4,        /* this side was closed, by another thread */
    CG_SIGNAL = 5,      /* a signal handler raised */
    CG_MISMATCH = 6,    /* the calls of the participants do not fit together */
    CG_NOMEM = 7,
    CG_RESTART = 8,     /* the writer of a ring gave up on the record that was being read, and began another */
};

/* What one thread sleeps on. */
typedef struct {
    _Atomic uint32_t doorbell; /* counts what was rung */
    _Atomic uint32_t sleeping; /* its owner is about to sleep, or does */
} cg_bell;

/* One participant, in shared memory. Two cache lines: the first is written by anyone, the second by its owner. */
typedef struct {
    _Alignas(CG_LINE) cg_bell bell;
    _Alignas(CG_LINE) _Atomic uint32_t state;
    _Atomic int32_t core;     /* 1 + the core on which its owner last waited, or woke somebody; 0 before that */
    _Atomic int32_t pid;      /* 0 until somebody claims the seat; -1 where nobody ever will */
    uint64_t born;            /* start time of the process in clock ticks since boot: a pid may be used again */
    _Atomic uint64_t posted;  /* the last call that its owner began: (1 + number) << 8 | operation; 0 for none */
} cg_seat;

/* The view of one participant; process memory. */
typedef struct cg_team {
    cg_seat *seats;
    int n, me;
    int64_t spin_ns;   /* at least; 0 where the ranks of this host are more than its cores */
    int64_t recent_ns; /* how long recent waits lasted, of those that a spin could have covered */
    int yields;
    cg_cores cores;
    int crew; /* whether others here are threads of this very process: 1 yes, 0 no, -1 not everybody has come */
    int *watch; /* pidfd of each process; WATCH_* */
    /* Called around a wait that does not end at once; may be NULL. */
    void (*pause)(struct cg_team *);
    void (*resume)(struct cg_team *);
    int (*interrupted)(struct cg_team *); /* called every slice of a wait; non-zero ends it with CG_SIGNAL */
    void *user;
    uint64_t slice_ns;
    cg_bell *bell, *theirs; /* its own; and of a further view that of its peer */
    struct cg_team *first, *next; /* the further views of a seat */
} cg_team;

int64_t cg_clock_ns(void);

/* Sits down: `seats` is zeroed memory of `n` seats. 0, or an errno: EBUSY where somebody sits, or sat. */
int cg_team_join(cg_team *team, cg_seat *seats, int n, int me, int crowd);
/* A further view of the seat of `of`, whose owner sleeps on `bell` and whose one peer does on `theirs`. */
int cg_team_view(cg_team *view, cg_team *of, cg_bell *bell, cg_bell *theirs);
void cg_team_leave(cg_team *team); /* frees the view; the seat stays as it is */
void cg_team_leave_view(cg_team *view, cg_team *of);
/* Says that this side does nothing more, and wakes everybody. From any thread, but not while views come or go. */
void cg_team_close(cg_team *team, int failed);
/* The same after an error, also where another thread has closed it meanwhile: what it did last does not count. */
void cg_team_fail(cg_team *team);
/* Whether anybody else has died (CG_LOST) or, if not, left (CG_GONE); else CG_OK. Not beside a wait on the same view. */
int cg_team_lost(cg_team *team, int *who);
/* Says that nobody will sit there. 0 if somebody does. */
int cg_team_leave_out(cg_team *team, int seat);
/* Whether others are threads of this process; whether all are. */
int cg_team_is_crew(cg_team *team);
int cg_team_is_of_threads(const cg_team *team);
/* Whether this side was closed. */
int cg_team_left(const cg_team *team);
/* Who has failed in the call that this side is in, or before; -1 for nobody. */
int cg_team_failed(const cg_team *team);

typedef int (*cg_condition)(void *);
#define CG_EVERYONE (-1)
/* Waits until `ready(arg)`. `watched`: whose death or leaving ends the wait, CG_EVERYONE for all. `collective`: so does one of them that is in
 * another call of the same number, or in a later one. `deadline`: CLOCK_MONOTONIC ns; below zero it is so far from the begin of this very wait. */
int cg_wait(cg_team *team, cg_condition ready, void *arg, int watched, int collective, int64_t deadline, int *who);
/* After a store that may make somebody's condition true. */
void cg_notify_bell(cg_bell *bell);
void cg_notify(cg_team *team, int seat);
void cg_notify_all(cg_team *team);

static inline void cg_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb" ::: "memory");
#endif
}


#endif
