#define _GNU_SOURCE
#include "any_ring.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449 /* Linux 5.16; the same on every architecture */
#endif

enum {
    MOST = 128,        /* futexes of one futex_waitv */
    WAIT_SHARED = 2,   /* FUTEX_32, and not private to this process */
    YIELD_NS = 200000, /* longest, as in wait.c */
    FRACTION = 500,    /* 1/500 of a short wait is spun at most: a caller that repeats short waits costs next to nothing */
    POLL_NS = 1000000, /* between two checks where the kernel cannot wait for several futexes */
};

/* As in linux/futex.h, where that is recent enough. */
typedef struct {
    uint64_t value, address;
    uint32_t flags, unused;
} futex_waiter;

static int first_ready(cg_ring *const *rings, int n) {
    for (int i = 0; i < n; i++)
        if (cg_ring_ready(rings[i])) return i;
    return -1;
}

/* Sleeps until one of the doorbells is rung, at most until `end`. */
static void sleep_on(futex_waiter *waiters, int n, int64_t end) {
    struct timespec until = {.tv_sec = end / 1000000000, .tv_nsec = end % 1000000000};
    if (n <= MOST && (syscall(SYS_futex_waitv, waiters, n, 0, &until, CLOCK_MONOTONIC) >= 0 || errno != ENOSYS)) return;
    int64_t left = end - cg_clock_ns();
    struct timespec brief = {.tv_nsec = left > POLL_NS ? POLL_NS : left > 0 ? left : 0};
    nanosleep(&brief, NULL);
}

int cg_any_ring(cg_ring *const *rings, int n, int64_t deadline) {
    int found = first_ready(rings, n);
    if (found >= 0 || n == 0) return found;
    cg_team *team = rings[0]->team;
    int64_t now = cg_clock_ns();
    const int64_t some = (deadline - now) / FRACTION, patience = now + (some < YIELD_NS ? some : YIELD_NS);
    const int64_t spun = now + (some < team->spin_ns ? some : team->spin_ns);
    for (; now < spun; now = cg_clock_ns()) {
        if ((found = first_ready(rings, n)) >= 0) return found;
        cg_pause();
    }
    for (int i = 0; i < team->yields && now < patience; i++, now = cg_clock_ns()) {
        if ((found = first_ready(rings, n)) >= 0) return found;
        sched_yield();
    }
    /* Stores, fence and loads in the order of cg_wait, for each doorbell. */
    futex_waiter waiters[MOST];
    for (int i = 0; i < n; i++) {
        cg_bell *bell = rings[i]->team->bell;
        if (i < MOST)
            waiters[i] = (futex_waiter){atomic_load_explicit(&bell->doorbell, memory_order_acquire), (uintptr_t)&bell->doorbell, WAIT_SHARED, 0};
        atomic_store_explicit(&bell->sleeping, 1, memory_order_relaxed);
    }
    atomic_thread_fence(memory_order_seq_cst);
    found = first_ready(rings, n);
    if (found < 0 && now < deadline && !cg_team_left(team)) sleep_on(waiters, n, deadline);
    for (int i = 0; i < n; i++) atomic_store_explicit(&rings[i]->team->bell->sleeping, 0, memory_order_relaxed);
    return found >= 0 ? found : first_ready(rings, n);
}
