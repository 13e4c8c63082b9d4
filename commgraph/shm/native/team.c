#define _GNU_SOURCE
#include "team.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434 /* the same on every architecture; C libraries before 2.36 lack the name */
#endif

/* team->watch[seat] where it is no descriptor. */
enum { WATCH_UNKNOWN = -1, WATCH_MYSELF = -2, WATCH_BY_PROC = -3 };

#define SPIN_NS 10000        /* at least: about the time of a small message there and back */
#define LONGEST_SPIN_NS 100000 /* at most: a sleep and a wake-up cost about half of it */
#define PAUSES 16            /* between two looks at the clock */
#define YIELD_NS 200000      /* of yielding at most: on a busy machine one may take a time slice, and nobody looks at the deadline meanwhile */
#define CREW_YIELDS 400
#define SLICE_NS 50000000ull /* of a sleep, after which the others are looked after: a death is noticed within it */

int64_t cg_clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* State and start time of a process, from /proc. 0 if there is none, or it is a zombie. */
static int process_alive(int pid, uint64_t *born) {
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return errno != ENOENT && errno != ESRCH; /* too many open files, say: nothing is known */
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    if (length <= 0) return 0;
    text[length] = 0;
    char *rest = strrchr(text, ')'); /* the name of a program may hold anything */
    if (rest == NULL || rest[1] == 0) return 0;
    rest += 2;
    if (*rest == 'Z' || *rest == 'X') return 0;
    for (int field = 3; field < 22 && rest != NULL; field++) {
        rest = strchr(rest, ' ');
        if (rest != NULL) rest++;
    }
    if (rest != NULL) *born = strtoull(rest, NULL, 10);
    return 1;
}

int cg_team_join(cg_team *team, cg_seat *seats, int n, int me, int crowd) {
    memset(team, 0, sizeof *team);
    team->watch = malloc(sizeof(int) * (size_t)n);
    if (team->watch == NULL) return ENOMEM;
    team->seats = seats;
    team->n = n;
    team->me = me;
    team->slice_ns = SLICE_NS;
    team->bell = &seats[me].bell;
    team->crew = -1;
    for (int i = 0; i < n; i++) team->watch[i] = WATCH_UNKNOWN;
    int cores = cg_cores_allowed();
    cg_cores_init(&team->cores, crowd);
    /* A spin is lost time where the one that is waited for has no core of its own. */
    team->spin_ns = crowd <= cores ? SPIN_NS : 0;
    team->yields = crowd <= cores ? 200 : 20;
    int32_t nobody = 0;
    if (!atomic_compare_exchange_strong(&seats[me].pid, &nobody, getpid())) return EBUSY;
    process_alive(seats[me].pid, &seats[me].born);
    atomic_store_explicit(&seats[me].state, CG_SEATED, memory_order_release);
    return 0;
}

int cg_team_view(cg_team *view, cg_team *of, cg_bell *bell, cg_bell *theirs) {
    *view = *of;
    view->watch = malloc(sizeof(int) * (size_t)of->n);
    if (view->watch == NULL) return ENOMEM;
    for (int i = 0; i < of->n; i++) view->watch[i] = WATCH_UNKNOWN;
    view->bell = bell;
    view->theirs = theirs;
    cg_cores_init(&view->cores, of->cores.crowd);
    view->first = NULL;
    view->next = of->first;
    of->first = view;
    return 0;
}

void cg_team_leave_view(cg_team *view, cg_team *of) {
    for (cg_team **at = &of->first; *at != NULL; at = &(*at)->next)
        if (*at == view) {
            *at = view->next;
            break;
        }
    cg_team_leave(view);
}

void cg_team_leave(cg_team *team) {
    for (int i = 0; team->watch != NULL && i < team->n; i++)
        if (team->watch[i] >= 0) close(team->watch[i]);
    free(team->watch);
    team->watch = NULL;
    cg_cores_free(&team->cores);
}

int cg_team_is_crew(cg_team *team) {
    if (team->crew >= 0) return team->crew;
    int32_t mine = team->seats[team->me].pid;
    for (int i = 0; i < team->n; i++) {
        if (i == team->me) continue;
        int32_t other = team->seats[i].pid;
        if (other == mine) return team->crew = 1;
        if (other == 0) return 0;
    }
    return team->crew = 0;
}

int cg_team_is_of_threads(const cg_team *team) {
    for (int i = 0; i < team->n; i++)
        if (team->seats[i].pid != team->seats[team->me].pid) return 0;
    return 1;
}

static void ring(cg_bell *bell) {
    atomic_fetch_add_explicit(&bell->doorbell, 1, memory_order_seq_cst);
    syscall(SYS_futex, &bell->doorbell, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

static int has_left(const cg_team *team, int seat) {
    return atomic_load_explicit(&team->seats[seat].state, memory_order_acquire) >= CG_CLOSED;
}

int cg_team_left(const cg_team *team) { return has_left(team, team->me); }

int cg_team_failed(const cg_team *team) {
    uint64_t mine = atomic_load_explicit(&team->seats[team->me].posted, memory_order_relaxed);
    for (int i = 0; i < team->n; i++) {
        if (i == team->me || atomic_load_explicit(&team->seats[i].state, memory_order_acquire) != CG_FAILED) continue;
        if (atomic_load_explicit(&team->seats[i].posted, memory_order_relaxed) >> 8 <= mine >> 8) return i;
    }
    return -1;
}

void cg_team_fail(cg_team *team) {
    atomic_store_explicit(&team->seats[team->me].state, CG_FAILED, memory_order_seq_cst);
    /* Not its views, which another thread may be taking away. */
    for (int i = 0; i < team->n; i++) ring(&team->seats[i].bell);
}

void cg_team_close(cg_team *team, int failed) {
    /* In one go, for it may fail on another thread at this moment, and that stays. */
    uint32_t seated = CG_SEATED;
    atomic_compare_exchange_strong(&team->seats[team->me].state, &seated, failed ? CG_FAILED : CG_CLOSED);
    for (int i = 0; i < team->n; i++) ring(&team->seats[i].bell);
    for (cg_team *view = team->first; view != NULL; view = view->next) {
        ring(view->bell);
        ring(view->theirs);
    }
}

int cg_team_leave_out(cg_team *team, int seat) {
    int32_t nobody = 0;
    return atomic_compare_exchange_strong(&team->seats[seat].pid, &nobody, -1) || nobody == -1;
}

/* Publishes the core that this rank runs on, and returns 1 + its number; 0 where nobody knows. */
static int32_t publish_core(cg_team *team) {
    _Atomic int32_t *published = &team->seats[team->me].core;
    int32_t core = 1 + cg_core();
    if (atomic_load_explicit(published, memory_order_relaxed) != core) atomic_store_explicit(published, core, memory_order_relaxed);
    return core;
}

void cg_notify_bell(cg_bell *bell) {
    /* Pairs with the fence in cg_wait: either the sleeper sees what was stored, or this sees that it sleeps. */
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&bell->sleeping, memory_order_relaxed)) ring(bell);
}

static void wake_sleeper(cg_team *team, int seat) {
    if (!atomic_load_explicit(&team->seats[seat].bell.sleeping, memory_order_relaxed)) return;
    publish_core(team); /* beside which the kernel may well wake it */
    ring(&team->seats[seat].bell);
}

/* With the fence of cg_notify_bell, for the same reason. */
void cg_notify(cg_team *team, int seat) {
    atomic_thread_fence(memory_order_seq_cst);
    wake_sleeper(team, seat);
}

void cg_notify_all(cg_team *team) {
    atomic_thread_fence(memory_order_seq_cst);
    for (int i = 0; i < team->n; i++)
        if (i != team->me) wake_sleeper(team, i);
}

/* Whether the process in that seat has ended. */
static int is_dead(cg_team *team, int seat) {
    cg_seat *other = &team->seats[seat];
    if (seat == team->me || atomic_load_explicit(&other->state, memory_order_acquire) == CG_EMPTY) return 0;
    if (team->watch[seat] == WATCH_UNKNOWN) {
        uint64_t born = other->born;
        if (other->pid == team->seats[team->me].pid) {
            team->watch[seat] = WATCH_MYSELF; /* a thread of this process, which says itself that it ends */
        } else {
            int fd = (int)syscall(SYS_pidfd_open, other->pid, 0);
            if (fd < 0 && errno == ESRCH) return 1;
            /* Opened first and then compared: what the descriptor means cannot change any more. */
            if (!process_alive(other->pid, &born) || born != other->born) {
                if (fd >= 0) close(fd);
                return 1;
            }
            team->watch[seat] = fd >= 0 ? fd : WATCH_BY_PROC; /* an old kernel, a sandbox, too many open files */
        }
    }
    if (team->watch[seat] == WATCH_MYSELF) return 0;
    if (team->watch[seat] == WATCH_BY_PROC) {
        uint64_t born = other->born;
        return !process_alive(other->pid, &born) || born != other->born;
    }
    struct pollfd watched = {.fd = team->watch[seat], .events = POLLIN};
    return poll(&watched, 1, 0) > 0 && (watched.revents & POLLIN);
}

/* Who of those that are watched has left, -1 for nobody. */
static int someone_closed(cg_team *team, int watched) {
    if (watched != CG_EVERYONE) return has_left(team, watched) ? watched : -1;
    for (int i = 0; i < team->n; i++)
        if (i != team->me && has_left(team, i)) return i;
    return -1;
}

static int someone_died(cg_team *team, int watched) {
    if (watched != CG_EVERYONE) return is_dead(team, watched) ? watched : -1;
    for (int i = 0; i < team->n; i++)
        if (is_dead(team, i)) return i;
    return -1;
}

int cg_team_lost(cg_team *team, int *who) {
    for (*who = 0; *who < team->n; ++*who)
        if (is_dead(team, *who) && !has_left(team, *who)) return CG_LOST; /* in this order: it may close between the two looks */
    return (*who = someone_closed(team, CG_EVERYONE)) >= 0 ? CG_GONE : CG_OK;
}

/* Who of those that are watched is in another call of the same number, or in a later one, -1 for nobody: what is waited for never comes. */
static int someone_elsewhere(cg_team *team, int watched) {
    uint64_t mine = atomic_load_explicit(&team->seats[team->me].posted, memory_order_relaxed);
    if (mine == 0) return -1;
    for (int i = 0; i < team->n; i++) {
        if (i == team->me || (watched != CG_EVERYONE && watched != i)) continue;
        uint64_t theirs = atomic_load_explicit(&team->seats[i].posted, memory_order_acquire);
        if (theirs >> 8 > mine >> 8 || (theirs >> 8 == mine >> 8 && theirs != mine)) return i;
    }
    return -1;
}

/* Whether a watched peer was last seen on this very core, where it cannot run while this rank does. */
static int is_beside_peer(cg_team *team, int watched) {
    int32_t core = publish_core(team);
    if (core == 0) return 0;
    if (watched != CG_EVERYONE) return atomic_load_explicit(&team->seats[watched].core, memory_order_relaxed) == core;
    for (int i = 0; i < team->n; i++)
        if (i != team->me && atomic_load_explicit(&team->seats[i].core, memory_order_relaxed) == core) return 1;
    return 0;
}

/* How long a wait took that came to its end. Longer ones than a spin may take only let the memory of shorter ones fade. */
static int end_of_wait(cg_team *team, int64_t lasted) {
    team->recent_ns -= team->recent_ns / 8;
    if (lasted <= LONGEST_SPIN_NS && lasted > team->recent_ns) team->recent_ns = lasted;
    return CG_OK;
}

static int wait_on(cg_team *team, cg_condition ready, void *arg, int watched, int collective, int64_t deadline, int *who) {
    cg_bell *mine = team->bell;
    int64_t looked = cg_clock_ns(), began = looked, spin = team->spin_ns;
    const int crew = cg_team_is_crew(team);
    if (spin > 0 && !crew) {
        if (2 * team->recent_ns > spin) spin = 2 * team->recent_ns < LONGEST_SPIN_NS ? 2 * team->recent_ns : LONGEST_SPIN_NS;
        int beside = is_beside_peer(team, watched);
        if (cg_cores_wait(&team->cores, beside, looked)) publish_core(team), looked = cg_clock_ns();
        else if (beside) spin = 0;
    }
    /* Not by number: a pause takes three times as long on one processor as on another. */
    for (const int64_t spun = looked + spin; looked < spun; looked = cg_clock_ns()) {
        for (int i = 0; i < PAUSES; i++) {
            if (ready(arg)) return end_of_wait(team, looked - began);
            cg_pause();
        }
    }
    if (deadline < 0) deadline = began - deadline;
    /* Threads of one process have to take turns with the interpreter, which is longer than a few yields and shorter than a sleep. */
    int yields_left = crew ? CREW_YIELDS : team->yields;
    for (const int64_t patience = began + YIELD_NS; looked < patience && yields_left > 0; yields_left--) {
        if (ready(arg)) return end_of_wait(team, looked - began);
        sched_yield();
        looked = cg_clock_ns();
    }
    int result = CG_OK;
    for (;;) {
        uint32_t rung = atomic_load_explicit(&mine->doorbell, memory_order_acquire);
        atomic_store_explicit(&mine->sleeping, 1, memory_order_relaxed);
        atomic_thread_fence(memory_order_seq_cst);
        if (ready(arg)) break;
        if (has_left(team, team->me)) {
            result = CG_SELF;
            break;
        }
        int gone = someone_closed(team, watched);
        if (gone >= 0) {
            /* What it did before it left counts. */
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
            int dead = someone_died(team, watched);
            if (dead >= 0) {
                if (ready(arg)) break;
                *who = dead;
                result = has_left(team, dead) ? CG_GONE : CG_LOST; /* it closed between the two looks, and ended after that */
                break;
            }
            int elsewhere = collective ? someone_elsewhere(team, watched) : -1;
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
    if (result == CG_OK) end_of_wait(team, cg_clock_ns() - began);
    return result;
}

int cg_wait(cg_team *team, cg_condition ready, void *arg, int watched, int collective, int64_t deadline, int *who) {
    /* Who is about to come is not worth the pause. */
    for (int i = 0; i < (team->spin_ns ? PAUSES : 1); i++) {
        if (ready(arg)) return CG_OK;
        cg_pause();
    }
    if (team->pause != NULL) team->pause(team);
    int result = wait_on(team, ready, arg, watched, collective, deadline, who);
    if (team->resume != NULL) team->resume(team);
    return result;
}
