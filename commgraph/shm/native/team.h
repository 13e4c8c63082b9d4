/* The members of one piece of shared memory: which process is which member, whether it left or died. wait.h says how they wait for each
 * other.
 *
 * A view serves one thread at a time. A ring between two members has a view of its own on either side, with doorbells of its own, so that
 * its messages move while another thread is in a collective.
 */
#ifndef COMMGRAPH_TEAM_H
#define COMMGRAPH_TEAM_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "cores.h"

#define CG_LINE 64 /* bytes of a cache line */

/* State of a member. CG_FAILED: it left after an error, and the last call that it posted does not count as done. */
enum { CG_EMPTY = 0, CG_JOINED = 1, CG_CLOSED = 2, CG_FAILED = 3 };

/* Result of a wait, and of every call that may wait. `who`, where it is set, is a member. */
enum {
    CG_OK = 0,
    CG_TIMEOUT = 1,     /* the deadline passed; `who` was waited for */
    CG_LOST = 2,        /* member `who` died */
    CG_GONE = 3,        /* member `who` closed its side */
    CG_SELF = 4,        /* this side was closed, by another thread */
    CG_SIGNAL = 5,      /* a signal handler raised */
    CG_MISMATCH = 6,    /* the calls of the members do not fit together */
    CG_NOMEM = 7,
    CG_REFUSED = 9,     /* the kernel does not let this process access the memory of that of `who`, though it did when it was probed */
    CG_RESTART = 8,     /* the writer of a ring gave up on the record that was being read, and began another */
};

/* The futex that one thread sleeps on. */
typedef struct {
    _Atomic uint32_t doorbell; /* how often it was rung: the word of the futex */
    _Atomic uint32_t sleeping; /* 1 while its owner sleeps, or is about to */
} cg_bell;

/* One member, in shared memory. Two cache lines: the first is written by anyone, the second by its owner. */
typedef struct {
    _Alignas(CG_LINE) cg_bell bell;
    _Alignas(CG_LINE) _Atomic uint32_t state;
    _Atomic int32_t core;     /* 1 + the core on which its owner last waited, or woke a peer; 0 before that */
    _Atomic int32_t pid;      /* 0 before a process joins; -1 where none ever will */
    uint64_t born;            /* start time of the process in clock ticks since boot: a pid may be used again */
    _Atomic uint64_t posted;  /* the last call that its owner began: (1 + number) << 8 | operation; 0 for none */
} cg_member;

/* One member's view of the team; process memory. */
typedef struct cg_team {
    cg_member *members;
    int n, me;
    int64_t spin_ns;   /* shortest spin of a wait; 0 where those that share its cores are more than these */
    int64_t recent_ns; /* how long recent waits lasted, of those that a spin could have covered */
    int yields;
    cg_cores cores;
    int same_process; /* whether another member is a thread of this process: 1 yes, 0 no, -1 not every member has joined */
    int *watch; /* pidfd of each member's process, or WATCH_* (team.c) */
    /* Called around a wait that does not end at once; may be NULL. */
    void (*pause)(struct cg_team *);
    void (*resume)(struct cg_team *);
    int (*interrupted)(struct cg_team *); /* called every slice of a wait; non-zero ends it with CG_SIGNAL */
    void *user;
    uint64_t slice_ns;
    cg_bell *bell, *theirs; /* the bell of this view; in a further view that of its peer, too */
    struct cg_team *first, *next; /* list of the further views of a member */
} cg_team;

/* Joins as member `me` of `n`; `members` is zeroed memory for all. `sharing`: ranks that may run on a core of this one's, itself included.
 * 0, or an errno: EBUSY where a process has joined as that member before. */
int cg_team_join(cg_team *team, cg_member *members, int n, int me, int sharing);
/* A further view of the member of `of`, whose owner sleeps on `bell` and whose one peer sleeps on `theirs`. */
int cg_team_view(cg_team *view, cg_team *of, cg_bell *bell, cg_bell *theirs);
void cg_team_leave(cg_team *team); /* frees the view; the member's state stays as it is */
void cg_team_leave_view(cg_team *view, cg_team *of);
/* Marks this member as closed, or as failed, and wakes every member. From any thread, but not while views come or go. */
void cg_team_close(cg_team *team, int failed);
/* Marks this member as failed, also after another thread has closed it: the last call that it posted does not count as done. */
void cg_team_fail(cg_team *team);
/* CG_LOST if another member has died, else CG_GONE if one has left, else CG_OK. Not beside a wait on the same view. */
int cg_team_lost(cg_team *team, int *who);
/* Marks a member as one that no process will ever join as. 0 if one has. */
int cg_team_leave_out(cg_team *team, int member);
/* Whether another member is a thread of this process; whether all members are. */
int cg_team_has_same_process(cg_team *team);
int cg_team_all_same_process(const cg_team *team);
/* A member that has failed in this member's present call or before it; -1 for none. */
int cg_team_failed(const cg_team *team);

/* Whether a member has closed its side, or failed. */
static inline int cg_team_has_left(const cg_team *team, int member) {
    return atomic_load_explicit(&team->members[member].state, memory_order_acquire) >= CG_CLOSED;
}
/* Whether this side was closed. */
static inline int cg_team_left(const cg_team *team) { return cg_team_has_left(team, team->me); }

/* For waits: a member among those watched (one, or CG_EVERYONE) that has left, that has died, or that is in another call of the same number
 * or in a later one, so that a wait for it cannot end well; -1 for none. */
#define CG_EVERYONE (-1)
int cg_team_find_left(const cg_team *team, int watched);
int cg_team_find_dead(cg_team *team, int watched);
int cg_team_find_mismatch(const cg_team *team, int watched);

#endif
