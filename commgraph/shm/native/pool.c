#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { CLASSES = 4 * 44, HEAD = 64 };
#define MOST ((size_t)1 << 50) /* bytes; more than any machine has, and every size below it has a class */

/* In front of every block. */
typedef struct block {
    cg_pool *pool;
    struct block *next; /* in the list of its class */
    size_t bytes;       /* of the whole, this head included */
    int class_;
} block;

struct cg_pool {
    pthread_mutex_t lock;
    block *free_[CLASSES];
    size_t kept, keep;
    size_t out; /* blocks in use, and one for the owner */
};

/* Four sizes between one power of two and the next: at most a fifth is wasted. */
static int size_class(size_t bytes, size_t *rounded) {
    int power = 63 - __builtin_clzll((unsigned long long)(bytes < 256 ? 256 : bytes));
    for (int quarter = 0; quarter < 4; quarter++) {
        size_t size = ((size_t)4 + (size_t)quarter) << (power - 2);
        if (size >= bytes && size >= 256) {
            *rounded = size;
            return (power - 8) * 4 + quarter;
        }
    }
    *rounded = (size_t)1 << (power + 1);
    return (power - 7) * 4;
}

/* Takes large blocks from the kernel, so that releasing them returns them to the kernel. */
static block *fetch(size_t bytes) {
    if (bytes < 128 * 1024) {
        void *memory = NULL;
        return posix_memalign(&memory, HEAD, bytes) == 0 ? memory : NULL;
    }
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static void release(block *b) {
    if (b->bytes < 128 * 1024) free(b);
    else munmap(b, b->bytes);
}

cg_pool *cg_pool_new(size_t keep) {
    cg_pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL) return NULL;
    pthread_mutex_init(&pool->lock, NULL);
    pool->keep = keep;
    pool->out = 1;
    return pool;
}

void *cg_pool_take(cg_pool *pool, size_t bytes) {
    size_t rounded;
    if (bytes > MOST) return NULL;
    int class_ = size_class(bytes + HEAD, &rounded);
    pthread_mutex_lock(&pool->lock);
    block *b = pool->free_[class_];
    if (b != NULL) {
        pool->free_[class_] = b->next;
        pool->kept -= b->bytes;
    }
    pool->out++;
    pthread_mutex_unlock(&pool->lock);
    if (b == NULL) {
        b = fetch(rounded);
        if (b == NULL) {
            pthread_mutex_lock(&pool->lock);
            pool->out--; /* the owner holds a reference, so this was not the last */
            pthread_mutex_unlock(&pool->lock);
            return NULL;
        }
        *b = (block){.pool = pool, .bytes = rounded, .class_ = class_};
    }
    return (char *)b + HEAD;
}

/* Empties the pool; the caller releases the blocks outside the lock. */
static block *empty(cg_pool *pool) {
    block *all = NULL;
    for (int i = 0; i < CLASSES; i++) {
        while (pool->free_[i] != NULL) {
            block *b = pool->free_[i];
            pool->free_[i] = b->next;
            b->next = all;
            all = b;
        }
    }
    pool->kept = 0;
    return all;
}

static void release_all(block *all) {
    while (all != NULL) {
        block *next = all->next;
        release(all);
        all = next;
    }
}

static void give_back_block(cg_pool *pool, block *back) {
    block *surplus = NULL;
    pthread_mutex_lock(&pool->lock);
    if (back != NULL) {
        if (back->bytes > pool->keep) {
            back->next = NULL;
            surplus = back;
        } else {
            /* The block that was used last is likeliest to be used again: the others are released. */
            if (pool->kept + back->bytes > pool->keep) surplus = empty(pool);
            back->next = pool->free_[back->class_];
            pool->free_[back->class_] = back;
            pool->kept += back->bytes;
        }
    } else {
        pool->keep = 0; /* no more blocks are taken */
        surplus = empty(pool);
    }
    int last = --pool->out == 0;
    pthread_mutex_unlock(&pool->lock);
    release_all(surplus);
    if (last) {
        release_all(empty(pool));
        pthread_mutex_destroy(&pool->lock);
        free(pool);
    }
}

void cg_pool_give(void *memory) {
    block *b = (block *)((char *)memory - HEAD);
    give_back_block(b->pool, b);
}

void cg_pool_drop(cg_pool *pool) { give_back_block(pool, NULL); }

size_t cg_pool_usable(const void *memory) { return ((const block *)((const char *)memory - HEAD))->bytes - HEAD; }
