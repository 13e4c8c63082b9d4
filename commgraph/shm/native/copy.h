/* Copies by plain or nontemporal stores, and between dense memory and the strided blocks that a tensor is split into. */
#ifndef COMMGRAPH_COPY_H
#define COMMGRAPH_COPY_H

#include <stddef.h>
#include <stdint.h>

enum {
    CG_RUN = 256,    /* bytes by which two interleaved copies alternate: whole lines; of one line the compiler makes no vectors */
    CG_AHEAD = 1024, /* bytes ahead that lines are prefetched */
};
/* Prefetches the lines of a later run. For writing, because a line that another core has read must be made exclusive first; for reading,
 * where computation keeps the processor from running ahead by itself. */
#define CG_SOON(at, write) \
    for (size_t line = 0; line < CG_RUN; line += 64) __builtin_prefetch((const char *)(at) + CG_AHEAD + line, write);

/* A piece of a contiguous tensor: `rows` runs of `row` bytes, `pitch` bytes apart. Positions count its bytes row by row. */
typedef struct {
    char *base;
    size_t rows, row, pitch;
} cg_block;

static inline size_t cg_block_bytes(const cg_block *block) { return block->rows * block->row; }
/* Whether its bytes lie one after the other. */
static inline int cg_is_dense(const cg_block *block) { return block->rows <= 1 || block->pitch == block->row || block->row == 0; }

/* Two interleaved copies, `from` to `to` and `next` to `put`: while the processor waits for lines that another core wrote it writes those
 * of the second copy. No two of the four overlap, but `put` may be `from`. `nontemporal`: the stores into `to`. */
void cg_copy_both(void *to, const void *from, void *put, const void *next, size_t bytes, int nontemporal);

/* Nontemporal stores go past the caches; call cg_store_fence before publishing the data that they wrote. */
void cg_copy(void *to, const void *from, size_t bytes, int nontemporal);
void cg_store_fence(void);

/* Copies bytes [at, at + bytes) of the block to or from dense memory. */
void cg_pack(void *to, const cg_block *from, size_t at, size_t bytes, int nontemporal);
void cg_unpack(const cg_block *to, const void *from, size_t at, size_t bytes);

#endif
