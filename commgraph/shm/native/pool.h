/* Memory for results that is used again: a fresh page costs as much as copying ten. */
#ifndef COMMGRAPH_POOL_H
#define COMMGRAPH_POOL_H

#include <stddef.h>

typedef struct cg_pool cg_pool;

/* Keeps up to `keep` bytes of memory that is not in use. */
cg_pool *cg_pool_new(size_t keep);
void *cg_pool_take(cg_pool *pool, size_t bytes); /* aligned to 64 bytes; NULL where there is none. Holds the pool */
void cg_pool_give(void *memory);                 /* from any thread, with or without the pool's owner */
void cg_pool_drop(cg_pool *pool);                /* the owner goes: freed when the last block came back */
size_t cg_pool_usable(const void *memory);

#endif
