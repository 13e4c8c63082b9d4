#define _GNU_SOURCE
#include "team.h"
#include "wait.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434 /* the same on every architecture; C libraries before 2.36 lack the name */
#endif

/* team->watch[member] where it is no descriptor. */
enum { WATCH_UNKNOWN = -1, WATCH_MYSELF = -2, WATCH_BY_PROC = -3 };

#define SPIN_NS 10000        /* shortest spin: about the time of a small message there and back */
#define SLICE_NS 50000000ull /* of a sleep, after which a wait checks the members: a death is noticed within it */

/* Whether the process exists and is no zombie, by /proc; *born is its start time. */
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

int cg_team_join(cg_team *team, cg_member *members, int n, int me, int sharing) {
    memset(team, 0, sizeof *team);
    team->watch = malloc(sizeof(int) * (size_t)n);
    if (team->watch == NULL) return ENOMEM;
    team->members = members;
    team->n = n;
    team->me = me;
    team->slice_ns = SLICE_NS;
    team->bell = &members[me].bell;
    team->same_process = -1;
    for (int i = 0; i < n; i++) team->watch[i] = WATCH_UNKNOWN;
    int cores = cg_cores_allowed();
    cg_cores_init(&team->cores, sharing);
    /* A spin is lost time where the peer has no core of its own. */
    team->spin_ns = sharing <= cores ? SPIN_NS : 0;
    team->yields = sharing <= cores ? 200 : 20;
    int32_t none = 0;
    if (!atomic_compare_exchange_strong(&members[me].pid, &none, getpid())) return EBUSY;
    process_alive(members[me].pid, &members[me].born);
    atomic_store_explicit(&members[me].state, CG_JOINED, memory_order_release);
    return 0;
}

int cg_team_view(cg_team *view, cg_team *of, cg_bell *bell, cg_bell *theirs) {
    *view = *of;
    view->watch = malloc(sizeof(int) * (size_t)of->n);
    if (view->watch == NULL) return ENOMEM;
    for (int i = 0; i < of->n; i++) view->watch[i] = WATCH_UNKNOWN;
    view->bell = bell;
    view->theirs = theirs;
    cg_cores_init(&view->cores, of->cores.sharing);
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

int cg_team_has_same_process(cg_team *team) {
    if (team->same_process >= 0) return team->same_process;
    int32_t mine = team->members[team->me].pid;
    for (int i = 0; i < team->n; i++) {
        if (i == team->me) continue;
        int32_t other = team->members[i].pid;
        if (other == mine) return team->same_process = 1;
        if (other == 0) return 0;
    }
    return team->same_process = 0;
}

int cg_team_all_same_process(const cg_team *team) {
    for (int i = 0; i < team->n; i++)
        if (team->members[i].pid != team->members[team->me].pid) return 0;
    return 1;
}

int cg_team_failed(const cg_team *team) {
    uint64_t mine = atomic_load_explicit(&team->members[team->me].posted, memory_order_relaxed);
    for (int i = 0; i < team->n; i++) {
        if (i == team->me || atomic_load_explicit(&team->members[i].state, memory_order_acquire) != CG_FAILED) continue;
        if (atomic_load_explicit(&team->members[i].posted, memory_order_relaxed) >> 8 <= mine >> 8) return i;
    }
    return -1;
}

void cg_team_fail(cg_team *team) {
    atomic_store_explicit(&team->members[team->me].state, CG_FAILED, memory_order_seq_cst);
    /* Not the further views, which another thread may be removing. */
    for (int i = 0; i < team->n; i++) cg_ring_doorbell(&team->members[i].bell);
}

void cg_team_close(cg_team *team, int failed) {
    /* By compare-and-swap: another thread may mark it as failed at this moment, which stays. */
    uint32_t joined = CG_JOINED;
    atomic_compare_exchange_strong(&team->members[team->me].state, &joined, failed ? CG_FAILED : CG_CLOSED);
    for (int i = 0; i < team->n; i++) cg_ring_doorbell(&team->members[i].bell);
    for (cg_team *view = team->first; view != NULL; view = view->next) {
        cg_ring_doorbell(view->bell);
        cg_ring_doorbell(view->theirs);
    }
}

int cg_team_leave_out(cg_team *team, int member) {
    int32_t none = 0;
    return atomic_compare_exchange_strong(&team->members[member].pid, &none, -1) || none == -1;
}

/* Whether the process of another member has ended. */
static int is_dead(cg_team *team, int member) {
    cg_member *other = &team->members[member];
    if (member == team->me || atomic_load_explicit(&other->state, memory_order_acquire) == CG_EMPTY) return 0;
    if (team->watch[member] == WATCH_UNKNOWN) {
        uint64_t born = other->born;
        if (other->pid == team->members[team->me].pid) {
            team->watch[member] = WATCH_MYSELF; /* a thread of this process, which marks its own end */
        } else {
            int fd = (int)syscall(SYS_pidfd_open, other->pid, 0);
            if (fd < 0 && errno == ESRCH) return 1;
            /* Opened first and compared then: the descriptor keeps its process, a pid does not. */
            if (!process_alive(other->pid, &born) || born != other->born) {
                if (fd >= 0) close(fd);
                return 1;
            }
            team->watch[member] = fd >= 0 ? fd : WATCH_BY_PROC; /* an old kernel, a sandbox, too many open files */
        }
    }
    if (team->watch[member] == WATCH_MYSELF) return 0;
    if (team->watch[member] == WATCH_BY_PROC) {
        uint64_t born = other->born;
        return !process_alive(other->pid, &born) || born != other->born;
    }
    struct pollfd watched = {.fd = team->watch[member], .events = POLLIN};
    return poll(&watched, 1, 0) > 0 && (watched.revents & POLLIN);
}

int cg_team_find_left(const cg_team *team, int watched) {
    if (watched != CG_EVERYONE) return cg_team_has_left(team, watched) ? watched : -1;
    for (int i = 0; i < team->n; i++)
        if (i != team->me && cg_team_has_left(team, i)) return i;
    return -1;
}

int cg_team_find_dead(cg_team *team, int watched) {
    if (watched != CG_EVERYONE) return is_dead(team, watched) ? watched : -1;
    for (int i = 0; i < team->n; i++)
        if (is_dead(team, i)) return i;
    return -1;
}

int cg_team_lost(cg_team *team, int *who) {
    for (*who = 0; *who < team->n; ++*who)
        if (is_dead(team, *who) && !cg_team_has_left(team, *who)) return CG_LOST; /* in this order: it may close between the two checks */
    return (*who = cg_team_find_left(team, CG_EVERYONE)) >= 0 ? CG_GONE : CG_OK;
}

int cg_team_find_mismatch(const cg_team *team, int watched) {
    uint64_t mine = atomic_load_explicit(&team->members[team->me].posted, memory_order_relaxed);
    if (mine == 0) return -1;
    for (int i = 0; i < team->n; i++) {
        if (i == team->me || (watched != CG_EVERYONE && watched != i)) continue;
        uint64_t theirs = atomic_load_explicit(&team->members[i].posted, memory_order_acquire);
        if (theirs >> 8 > mine >> 8 || (theirs >> 8 == mine >> 8 && theirs != mine)) return i;
    }
    return -1;
}
