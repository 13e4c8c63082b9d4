#define _GNU_SOURCE
#include "wait.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define LONGEST_SPIN_NS 100000 /* a sleep and a wake-up cost about half of it */
#define PAUSES 16              /* between two reads of the clock */
#define YIELD_NS 200000        /* longest yielding: on a busy machine one yield may take a time slice, and the deadline is not read meanwhile */
#define SAME_PROCESS_YIELDS 400

int64_t cg_clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

void cg_ring_doorbell(cg_bell *bell) {
    atomic_fetch_add_explicit(&bell->doorbell, 1, memory_order_seq_cst);
    syscall(SYS_futex, &bell->doorbell, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

/* Publishes the core that this rank runs on, and returns 1 + its number; 0 where that cannot be known. */
static int32_t publish_core(cg_team *team) {
    _Atomic int32_t *published = &team->members[team->me].core;
    int32_t core = 1 + cg_core();
    if (atomic_load_explicit(published, memory_order_relaxed) != core) atomic_store_explicit(published, core, memory_order_relaxed);
    return core;
}

void cg_notify_bell(cg_bell *bell) {
    /* Pairs with the fence in cg_wait: either the sleeper sees the store before this call, or this call sees that it sleeps. */
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&bell->sleeping, memory_order_relaxed)) cg_ring_doorbell(bell);
}

static void wake_sleeper(cg_team *team, int member) {
    if (!atomic_load_explicit(&team->members[member].bell.sleeping, memory_order_relaxed)) return;
    publish_core(team); /* the kernel may well wake the sleeper on it */
    cg_ring_doorbell(&team->members[member].bell);
}

/* The fence pairs as that of cg_notify_bell. */
void cg_notify(cg_team *team, int member) {
    atomic_thread_fence(memory_order_seq_cst);
    wake_sleeper(team, member);
}

void cg_notify_all(cg_team *team) {
    atomic_thread_fence(memory_order_seq_cst);
    for (int i = 0; i < team->n; i++)
        if (i != team->me) wake_sleeper(team, i);
}

static int was_seen_on(const cg_team *team, int member, int core) {
    return atomic_load_explicit(&team->members[member].core, memory_order_relaxed) == 1 + core;
}

/* Whether another member was last seen on that core. */
static int is_taken(const void *arg, int core) {
    const cg_team *team = arg;
    for (int i = 0; i < team->n; i++)
        if (i != team->me && was_seen_on(team, i, core)) return 1;
    return 0;
}

/* Whether a watched peer was last seen on this very core, where it cannot run while this rank runs. */
static int is_beside_peer(cg_team *team, int watched) {
    int core = publish_core(team) - 1;
    return core >= 0 && (watched == CG_EVERYONE ? is_taken(team, core) : was_seen_on(team, watched, core));
}

int cg_go_back(cg_team *team, int before) {
    int core = cg_core();
    if (before < 0 || core < 0 || core == before || !is_taken(team, core) || is_taken(team, before) || !cg_cores_move(before)) return 0;
    publish_core(team);
    return 1;
}

/* Records how long a wait took whose condition came true. One longer than a spin may be only lets `recent_ns` fade. */
static int finish_wait(cg_team *team, int64_t lasted) {
    team->recent_ns -= team->recent_ns / 8;
    if (lasted <= LONGEST_SPIN_NS && lasted > team->recent_ns) team->recent_ns = lasted;
    return CG_OK;
}

static int wait_on(cg_team *team, cg_condition ready, void *arg, int watched, int collective, int64_t deadline, int *who) {
    cg_bell *mine = team->bell;
    int64_t looked = cg_clock_ns(), began = looked, spin = team->spin_ns;
    const int same_process = cg_team_has_same_process(team);
    if (spin > 0 && !same_process) {
        if (2 * team->recent_ns > spin) spin = 2 * team->recent_ns < LONGEST_SPIN_NS ? 2 * team->recent_ns : LONGEST_SPIN_NS;
        int beside = is_beside_peer(team, watched);
        if (cg_cores_wait(&team->cores, beside, looked, is_taken, team)) publish_core(team), looked = cg_clock_ns();
        else if (beside) spin = 0;
    }
    /* By time, not by number: a pause takes three times as long on one processor as on another. */
    for (const int64_t spun = looked + spin; looked < spun; looked = cg_clock_ns()) {
        for (int i = 0; i < PAUSES; i++) {
            if (ready(arg)) return finish_wait(team, looked - began);
            cg_pause();
        }
    }
    if (deadline < 0) deadline = began - deadline;
    /* Threads of one process take turns with the interpreter, which takes longer than a few yields and less than a sleep. */
    int yields_left = same_process ? SAME_PROCESS_YIELDS : team->yields;
    for (const int64_t patience = began + YIELD_NS; looked < patience && yields_left > 0; yields_left--) {
        if (ready(arg)) return finish_wait(team, looked - began);
        sched_yield();
        looked = cg_clock_ns();
    }
    int result = CG_OK, before = spin > 0 && !same_process ? cg_core() : -1;
    for (;;) {
        uint32_t rung = atomic_load_explicit(&mine->doorbell, memory_order_acquire);
        atomic_store_explicit(&mine->sleeping, 1, memory_order_relaxed);
        atomic_thread_fence(memory_order_seq_cst);
        if (ready(arg)) break;
        if (cg_team_left(team)) {
            result = CG_SELF;
            break;
        }
        int gone = cg_team_find_left(team, watched);
        if (gone >= 0) {
            /* Its stores before it left count. */
            if (ready(arg)) break;
            *who = gone;
            result = CG_GONE;
            break;
        }
        int64_t now = cg_clock_ns();
        if (now >= deadline) {
            result = CG_TIMEOUT;
            break;
        }
        if (now - looked >= (int64_t)team->slice_ns) {
            looked = now;
            int dead = cg_team_find_dead(team, watched);
            if (dead >= 0) {
                if (ready(arg)) break;
                *who = dead;
                result = cg_team_has_left(team, dead) ? CG_GONE : CG_LOST; /* it closed between the two checks, and ended after that */
                break;
            }
            int elsewhere = collective ? cg_team_find_mismatch(team, watched) : -1;
            if (elsewhere >= 0) {
                if (ready(arg)) break;
                *who = elsewhere;
                result = CG_MISMATCH;
                break;
            }
            atomic_store_explicit(&mine->sleeping, 0, memory_order_relaxed);
            if (team->interrupted != NULL && team->interrupted(team)) {
                result = CG_SIGNAL;
                break;
            }
            continue;
        }
        int64_t left = deadline - now, slice = (int64_t)team->slice_ns;
        if (left > slice) left = slice;
        struct timespec relative = {.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
        long slept = syscall(SYS_futex, &mine->doorbell, FUTEX_WAIT, rung, &relative, NULL, 0);
        if (slept < 0 && errno == EINTR && team->interrupted != NULL && team->interrupted(team)) {
            result = CG_SIGNAL;
            break;
        }
    }
    atomic_store_explicit(&mine->sleeping, 0, memory_order_relaxed);
    if (result == CG_OK) {
        cg_go_back(team, before);
        finish_wait(team, cg_clock_ns() - began);
    }
    return result;
}

int cg_wait(cg_team *team, cg_condition ready, void *arg, int watched, int collective, int64_t deadline, int *who) {
    /* A peer that is about to arrive is not worth calling `pause` (which gives up the interpreter). */
    for (int i = 0; i < (team->spin_ns ? PAUSES : 1); i++) {
        if (ready(arg)) return CG_OK;
        cg_pause();
    }
    if (team->pause != NULL) team->pause(team);
    int result = wait_on(team, ready, arg, watched, collective, deadline, who);
    if (team->resume != NULL) team->resume(team);
    return result;
}
