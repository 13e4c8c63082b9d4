/* Plain or streaming stores.
 *
 * Which are faster depends on where the ranks run: where they share a cache plain ones stay in it, across caches they have to be
 * fetched from another. It is the writer's choice alone, since a reader does not see the difference. So each writer compares what
 * writing costs it, and what reading costs its slowest reader, which the readers leave in shared memory. */
#ifndef COMMGRAPH_STORES_H
#define COMMGRAPH_STORES_H

#include "collective.h"

/* Below this a slot is always written plainly, and nothing is measured. */
#define CG_MEASURED (16 * 1024)

/* How this rank writes so many bytes to its slot: 0 plain, 1 streaming. */
int cg_choose_way(cg_group *g, size_t bytes);
void cg_note_write(cg_group *g, size_t bytes, int way, int64_t ns);
void cg_note_read(cg_group *g, int writer, size_t bytes, int way, int64_t ns);
/* The same where all others were read at once. */
void cg_note_reads(cg_group *g, size_t bytes, int64_t ns);

/* How a large result is written: where it does not fit into a cache, streaming stores may halve the time. */
int cg_choose_landing(cg_group *g, cg_choice *choices, const cg_block *into);
void cg_note_landing(cg_group *g, cg_choice *choices, const cg_block *into, int64_t ns);
/* A rank's own piece, to where it belongs. */
void cg_place(cg_group *g, const cg_block *into, const char *mine, size_t bytes);

typedef struct {
    int64_t started;
    size_t bytes;
} cg_stopwatch;

static inline cg_stopwatch cg_start(size_t bytes) { return (cg_stopwatch){bytes < CG_MEASURED ? 0 : cg_clock_ns(), bytes}; }
static inline int64_t cg_stop(const cg_stopwatch *s) { return s->bytes < CG_MEASURED ? 0 : cg_clock_ns() - s->started; }

#endif
