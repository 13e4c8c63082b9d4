#define _GNU_SOURCE
#include "cores.h"

#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PATIENCE_NS 50000000ll /* ticks of /proc/stat have 10 ms */
#define LONGEST_NS 400000000ll

_Static_assert(sizeof(cg_affinity) == sizeof(cpu_set_t), "an affinity is what the C library takes for one");

int cg_core(void) { return sched_getcpu(); }

int cg_cores_allowed(void) {
    cpu_set_t allowed;
    return sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? CPU_COUNT(&allowed) : 1;
}

void cg_cores_init(cg_cores *cores, int sharing) { *cores = (cg_cores){.sharing = sharing, .patience = PATIENCE_NS}; }

void cg_cores_free(cg_cores *cores) {
    free(cores->idle);
    cores->idle = NULL;
}

/* Reads from /proc/stat how long every core has been idle. Returns the core of `allowed`, other than `mine`, that was idle longest since
 * the last call, and for how many ticks; -1 if there is none. */
static int longest_idle(cg_cores *cores, const cpu_set_t *allowed, int mine, uint32_t *ticks) {
    int best = -1;
    *ticks = 0;
    int fd = open("/proc/stat", O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    char text[4096];
    size_t held = 0;
    for (int first = 1;; first = 0) {
        char *end;
        while ((end = memchr(text, '\n', held)) == NULL) {
            ssize_t got = held < sizeof text - 1 ? read(fd, text + held, sizeof text - 1 - held) : 0;
            if (got <= 0) goto out;
            held += (size_t)got;
        }
        *end = 0;
        if (!first) { /* the first line is the sum of all cores */
            unsigned core;
            unsigned long long idle, waiting;
            char *at = text;
            if (strncmp(at, "cpu", 3) != 0) break;
            core = (unsigned)strtoul(at + 3, &at, 10);
            for (int field = 0; field < 3; field++) strtoull(at, &at, 10); /* user, nice, system */
            idle = strtoull(at, &at, 10);
            waiting = strtoull(at, &at, 10); /* for a disk, which is idle too */
            if (core < CPU_SETSIZE) {
                uint32_t now = (uint32_t)(idle + waiting), passed = now - cores->idle[core];
                cores->idle[core] = now;
                if ((int)core != mine && CPU_ISSET(core, allowed) && passed > *ticks && passed < UINT32_MAX / 2) best = (int)core, *ticks = passed;
            }
        }
        size_t line = (size_t)(end + 1 - text);
        memmove(text, end + 1, held -= line);
    }
out:
    close(fd);
    return best;
}

int cg_affinity_narrow(int core, cg_affinity *before) {
    cpu_set_t narrow;
    if (sched_getaffinity(0, sizeof *before, (cpu_set_t *)before) || !CPU_ISSET(core, (cpu_set_t *)before)) return 0;
    CPU_ZERO(&narrow);
    CPU_SET(core, &narrow);
    return sched_setaffinity(0, sizeof narrow, &narrow) == 0;
}

int cg_affinity_restore(int core, const cg_affinity *before) {
    cpu_set_t narrow, now, back;
    CPU_ZERO(&narrow);
    CPU_SET(core, &narrow);
    if (sched_getaffinity(0, sizeof now, &now) || !CPU_EQUAL(&now, &narrow)) return 0;
    memcpy(&back, before, sizeof back);
    /* A thread that may run everywhere gets all bits: it then follows its cpuset, as a thread whose affinity was never set. */
    if (CPU_COUNT(&back) == (int)sysconf(_SC_NPROCESSORS_ONLN)) memset(&back, 0xFF, sizeof back);
    return sched_setaffinity(0, sizeof back, &back) == 0;
}

int cg_cores_move(int core) {
    cg_affinity before;
    if (!cg_affinity_narrow(core, &before)) return 0;
    cg_affinity_restore(core, &before);
    return 1;
}

/* The next core after `mine`, of those allowed, on which no other rank was seen; -1 if there is none. */
static int next_free(const cpu_set_t *allowed, int mine, int (*taken)(const void *, int), const void *arg) {
    for (int i = 1; i < CPU_SETSIZE; i++) {
        int core = (mine + i) % CPU_SETSIZE;
        if (CPU_ISSET(core, allowed) && !taken(arg, core)) return core;
    }
    return -1;
}

int cg_cores_wait(cg_cores *cores, int beside, int64_t now, int (*taken)(const void *, int), const void *arg) {
    if (!beside) {
        cores->since = 0;
        return 0;
    }
    if (cores->since != 0 && now - cores->since < cores->patience) return 0;
    cpu_set_t allowed;
    uint32_t ticks = 0;
    int64_t passed = cores->since == 0 ? 0 : now - cores->since;
    int mine = sched_getcpu(), target = -1;
    int many = sched_getaffinity(0, sizeof allowed, &allowed) == 0 && CPU_COUNT(&allowed) > 1 && CPU_COUNT(&allowed) >= cores->sharing;
    if (many && cores->idle == NULL) cores->idle = calloc(CPU_SETSIZE, sizeof *cores->idle);
    if (many && cores->idle != NULL) target = longest_idle(cores, &allowed, mine, &ticks);
    cores->since = now;
    if (passed == 0) return 0; /* the first reading of two */
    if (ticks * (1000000000ll / sysconf(_SC_CLK_TCK)) * 2 <= passed) target = many ? next_free(&allowed, mine, taken, arg) : -1;
    if (target < 0 || !cg_cores_move(target)) {
        if (cores->patience < LONGEST_NS) cores->patience *= 2;
        return 0;
    }
    cores->since = 0;
    cores->patience = PATIENCE_NS;
    return 1;
}
