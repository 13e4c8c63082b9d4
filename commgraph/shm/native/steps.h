/* Where a group keeps what, and the steps that its calls are made of (collective.h). For the files that hold the calls. */
#ifndef COMMGRAPH_STEPS_H
#define COMMGRAPH_STEPS_H

#include "collective.h"

/* Where a tensor lies: (1 + region) << 44 | offset in shared memory, or an address of its rank's with the highest bit set. */
#define CG_READ_THERE ((size_t)16 * 1024) /* what is larger is read where it lies in shared memory: a step more in place of a copy */
#define WHERE_SHIFT 44
#define CG_WHERE_ADDRESS (1ull << 63)

static inline size_t cg_round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }
static inline size_t cg_smaller(size_t a, size_t b) { return a < b ? a : b; }

/* What one rank puts at once into what changes hands (reduce.c). What the ranks then touch stays in their second caches. */
#define CG_REDUCE_CHUNK (512 * 1024)
static inline size_t cg_share_bytes(size_t slot_bytes) { return cg_smaller(slot_bytes, CG_REDUCE_CHUNK); }

/* Memory that one rank writes and one other reads is written by that other the next time: it has the cache lines by then, which its processor
 * would otherwise ask back from the first one's. `turned`: the second time of the two. */
static inline int turned(uint32_t step) { return step >> 1 & 1; }

static inline char *slot_at(cg_group *g, int place, uint32_t step) { return g->slots + ((size_t)place * 2 + (step & 1)) * g->slot_bytes; }
static inline char *cg_shares_of(cg_group *g, int rank) { return g->shares + (size_t)rank * cg_share_bytes(g->slot_bytes); }
/* What all others read. Of two ranks there is one other. */
static inline char *cg_slot_of(cg_group *g, int rank, uint32_t step) { return slot_at(g, g->n == 2 && turned(step) ? 1 - rank : rank, step); }
/* What only rank `to` reads, in parts of `each` bytes. */
static inline char *cg_part_of(cg_group *g, int from, int to, size_t each, uint32_t step) {
    return turned(step) ? slot_at(g, to, step) + (size_t)from * each : slot_at(g, from, step) + (size_t)to * each;
}
static inline cg_line *cg_line_of(cg_group *g, int rank, uint32_t step) { return &g->lines[rank * 2 + (step & 1)]; }

/* Where these bytes of this rank lie in a shared region, 0 if they do not, or are so few that staging them is faster. */
uint64_t cg_find_region(cg_group *g, const void *data, size_t bytes);
char *cg_resolve(cg_group *g, int rank, uint64_t where);

/* The next step, which is the first of a call. */
void cg_begin(cg_group *g, const cg_call *call);
/* Arrives there; the line says what is called. */
void cg_announce(cg_group *g, const cg_call *call, uint64_t where, uint32_t rounds, int streamed);
/* Waits until the others are there as well, and compares. */
int cg_agree(cg_group *g, const cg_call *call, int *who);
/* Arrives at a later step, and waits until the others are there as well. */
int cg_next_step(cg_group *g, const cg_call *call, int *who);
/* The last step of a call that worked where the tensors of others lie, which they keep until then. One that gave up before may have used its own
 * for something else meanwhile: then nobody has a result. */
int cg_leave_together(cg_group *g, const cg_call *call, int *who);
/* CG_GONE, and who, if somebody has failed in this call or before. */
int cg_nobody_gave_up(cg_group *g, int *who);

#endif
