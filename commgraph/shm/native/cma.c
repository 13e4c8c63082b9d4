#define _GNU_SOURCE
#include "cma.h"

#include <errno.h>
#include <sys/uio.h>

enum {
    AT_ONCE = 256 * 1024, /* bytes of one system call: as many as the kernel copies while it holds the pages of both sides */
    RUNS = 64,            /* rows of one system call */
};

int cg_cma_copy(const cg_team *team, int member, const cg_block *block, uint64_t address, int direction) {
    int pid = atomic_load_explicit(&team->members[member].pid, memory_order_relaxed);
    int one = block->rows <= 1 || block->pitch == block->row;
    size_t rows = one ? 1 : block->rows, row = one ? cg_block_bytes(block) : block->row;
    for (size_t i = 0, at = 0; i < rows;) {
        struct iovec here[RUNS];
        size_t wanted = 0, n = 0;
        /* From byte `at` of row i. */
        while (n < RUNS && i < rows && wanted < AT_ONCE) {
            size_t part = row - at < AT_ONCE - wanted ? row - at : AT_ONCE - wanted;
            here[n++] = (struct iovec){block->base + i * block->pitch + at, part};
            wanted += part;
            at += part;
            if (at == row) at = 0, i++;
        }
        struct iovec there = {(void *)(uintptr_t)address, wanted};
        ssize_t done = direction == CG_CMA_WRITE ? process_vm_writev(pid, here, n, &there, 1, 0) : process_vm_readv(pid, here, n, &there, 1, 0);
        if (done != (ssize_t)wanted) return 0;
        address += wanted;
    }
    return 1;
}

int cg_cma_why(void) { return errno == EPERM || errno == EACCES || errno == ENOSYS ? CG_REFUSED : CG_GONE; }

int cg_cma_can_access(const cg_team *team, const void *data) {
    char byte;
    cg_block one = {&byte, 1, 1, 1};
    return cg_cma_copy(team, team->me, &one, (uint64_t)(uintptr_t)data, CG_CMA_READ);
}
