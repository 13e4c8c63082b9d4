/* Copies: plain, past the caches, and from or to the strided blocks that a tensor is cut into. */
#ifndef COMMGRAPH_COPY_H
#define COMMGRAPH_COPY_H

#include <stddef.h>
#include <stdint.h>

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
