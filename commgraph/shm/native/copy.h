/* Copies: plain, past the caches, and from or to the strided blocks that a tensor is cut into. */
#ifndef COMMGRAPH_COPY_H
#define COMMGRAPH_COPY_H

#include <stddef.h>
#include <stdint.h>

enum {
    CG_RUN = 256,    /* bytes, whole lines: where two things are done at once each is done for so many; of one line the compiler makes no vectors */
    CG_AHEAD = 1024, /* bytes before they are needed lines are asked for */
};
/* Lines that another core has read are its as well: they have to be had back before they can be written. And where computing keeps the
 * processor from looking far ahead by itself, it is told what will be read. */
#define CG_SOON(at, write) \
    for (size_t line = 0; line < CG_RUN; line += 64) __builtin_prefetch((const char *)(at) + CG_AHEAD + line, write);

/* A piece of a contiguous tensor: `rows` runs of `row` bytes, `pitch` bytes apart. Flat positions count its bytes row by row. */
typedef struct {
    char *base;
    size_t rows, row, pitch;
} cg_block;

static inline size_t cg_block_bytes(const cg_block *block) { return block->rows * block->row; }

/* Two copies line by line: while the processor waits for lines that another core wrote it has the time to write those that this one reads
 * after. No two of the four overlap, but `put` may be `from`. `streaming`: how `to` is written. */
void cg_copy_both(void *to, const void *from, void *put, const void *next, size_t bytes, int streaming);

/* Streaming stores go past the caches; whoever publishes what they wrote calls cg_stream_fence first. */
void cg_copy(void *to, const void *from, size_t bytes, int streaming);
void cg_stream_fence(void);

/* Bytes [at, at + bytes) of the block, to or from packed memory. */
void cg_pack(void *to, const cg_block *from, size_t at, size_t bytes, int streaming);
void cg_unpack(const cg_block *to, const void *from, size_t at, size_t bytes);

#endif
