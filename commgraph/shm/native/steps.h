/* The memory layout of a group, and the steps of its calls (collective.h). For the files that implement the calls. */
#ifndef COMMGRAPH_STEPS_H
#define COMMGRAPH_STEPS_H

#include "collective.h"

/* `where` a tensor lies: (1 + region) << 44 | offset in shared memory, or an address in the process of its rank with the highest bit set. */
#define CG_READ_IN_PLACE_FROM ((size_t)16 * 1024) /* bytes above which shared memory is read in place: one step more, one copy less */
#define WHERE_SHIFT 44
#define CG_WHERE_ADDRESS (1ull << 63)

static inline size_t cg_round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }
static inline size_t cg_smaller(size_t a, size_t b) { return a < b ? a : b; }
/* Elements [begin, end) of `count` that rank r of n reduces: whole cache lines, as even as these allow; the first rank has most. */
static inline void cg_partition_of(size_t count, size_t size, int n, int r, size_t *begin_, size_t *end) {
    size_t unit = CG_LINE / size, each = cg_round_up((count + (size_t)n - 1) / (size_t)n, unit);
    *begin_ = cg_smaller((size_t)r * each, count);
    *end = cg_smaller(*begin_ + each, count);
}

/* Most bytes of a reduce buffer (reduce.c): the lines that the ranks touch in one chunk stay in their second-level caches. */
#define CG_REDUCE_CHUNK (512 * 1024)
static inline size_t cg_reduce_buffer_bytes(size_t slot_bytes) { return cg_smaller(slot_bytes, CG_REDUCE_CHUNK); }

/* Swapped slots: memory that one rank writes and one other reads is written by the other the next time. The reader holds the cache lines by
 * then; the first writer would have to fetch them back. True in the second step of each two. */
static inline int slots_swapped(uint32_t step) { return step >> 1 & 1; }

static inline char *slot_at(cg_group *g, int place, uint32_t step) { return g->slots + ((size_t)place * 2 + (step & 1)) * g->slot_bytes; }
static inline char *cg_reduce_buffer_of(cg_group *g, int rank) { return g->reduce_buffers + (size_t)rank * cg_reduce_buffer_bytes(g->slot_bytes); }
/* The slot of `rank` that all others read. Swapped between two ranks, where one other reads it. */
static inline char *cg_slot_of(cg_group *g, int rank, uint32_t step) { return slot_at(g, g->n == 2 && slots_swapped(step) ? 1 - rank : rank, step); }
/* The part of a slot that only rank `to` reads, of parts of `each` bytes. */
static inline char *cg_part_of(cg_group *g, int from, int to, size_t each, uint32_t step) {
    return slots_swapped(step) ? slot_at(g, to, step) + (size_t)from * each : slot_at(g, from, step) + (size_t)to * each;
}
static inline cg_line *cg_line_of(cg_group *g, int rank, uint32_t step) { return &g->lines[rank * 2 + (step & 1)]; }

/* `where` these bytes of this rank lie in a shared region; 0 if they do not, or are so few that staging them is faster. */
uint64_t cg_find_region(cg_group *g, const void *data, size_t bytes);
/* The address of a `where` in shared memory, as rank `rank` gave it. */
char *cg_resolve(cg_group *g, int rank, uint64_t where);

/* Goes to the next step, the first of a call. */
void cg_begin(cg_group *g, const cg_call *call);
/* Arrives at it, with the call's tag in the line. */
void cg_announce(cg_group *g, const cg_call *call, uint64_t where, uint32_t rounds, int nontemporal);
/* Waits until the others have arrived as well, and compares the tags. */
int cg_agree(cg_group *g, const cg_call *call, int *who);
/* Arrives at a later step, and waits until the others have arrived as well. */
int cg_next_step(cg_group *g, const cg_call *call, int *who);
/* The last step of a call that accessed the tensors of other ranks, which keep them until then. A rank that gave up before may have reused
 * its tensor: then no rank has a result. */
int cg_leave_together(cg_group *g, const cg_call *call, int *who);
/* CG_GONE, and `who`, if a rank has failed in this call or before. */
int cg_check_no_failure(cg_group *g, int *who);

#endif
