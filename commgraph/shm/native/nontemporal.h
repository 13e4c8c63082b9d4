/* The choice between plain (0) and nontemporal (1) stores, by measurement.
 *
 * Their speed depends on the cores of the ranks: between ranks that share a cache plain stores stay in it, otherwise the reader fetches the
 * lines from another cache. The choice is the writer's alone, since a reader copies the same bytes either way. Each writer therefore adds
 * the time of its writes and the time of its slowest reader, which the readers record in shared memory, and prefers the smaller sum. */
#ifndef COMMGRAPH_NONTEMPORAL_H
#define COMMGRAPH_NONTEMPORAL_H

#include "collective.h"

/* Below this many bytes a slot is written by plain stores, and nothing is measured. */
#define CG_MEASURED (16 * 1024)

/* The stores by which this rank writes so many bytes to its slot. */
int cg_choose_stores(cg_group *g, size_t bytes);
/* Records the time of a write to a slot, or of a read from the slot of `writer`. */
void cg_note_write(cg_group *g, size_t bytes, int nontemporal, int64_t ns);
void cg_note_read(cg_group *g, int writer, size_t bytes, int nontemporal, int64_t ns);
/* Records a read of the slots of all other ranks at once. */
void cg_note_reads(cg_group *g, size_t bytes, int64_t ns);

/* The stores by which a large output is written: where it does not fit into a cache, nontemporal ones may halve the time. */
int cg_choose_output_stores(cg_group *g, cg_choice *choices, const cg_block *into);
void cg_note_output(cg_group *g, cg_choice *choices, const cg_block *into, int64_t ns);
/* Copies a rank's own piece to its place in the output. */
void cg_copy_own(cg_group *g, const cg_block *into, const char *mine, size_t bytes);

typedef struct {
    int64_t started;
    size_t bytes;
} cg_stopwatch;

static inline cg_stopwatch cg_start(size_t bytes) { return (cg_stopwatch){bytes < CG_MEASURED ? 0 : cg_clock_ns(), bytes}; }
static inline int64_t cg_stop(const cg_stopwatch *s) { return s->bytes < CG_MEASURED ? 0 : cg_clock_ns() - s->started; }

#endif
