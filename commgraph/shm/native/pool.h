/* A pool of memory for results: the first touch of a page costs as much as copying ten. */
#ifndef COMMGRAPH_POOL_H
#define COMMGRAPH_POOL_H

#include <stddef.h>

typedef struct cg_pool cg_pool;

/* `keep`: most bytes of unused memory that the pool keeps. */
cg_pool *cg_pool_new(size_t keep);
void *cg_pool_take(cg_pool *pool, size_t bytes); /* aligned to 64 bytes; NULL if there is no memory. Holds a reference to the pool */
void cg_pool_give(void *memory);                 /* from any thread, also after cg_pool_drop */
void cg_pool_drop(cg_pool *pool);                /* drops the owner's reference; the pool is freed with the last block */
size_t cg_pool_usable(const void *memory);

#endif
