/* Collectives of the ranks of one group in shared memory.
 *
 * A call is a sequence of steps, numbered through the life of the group. In step t a rank writes its data to a slot t & 1, then its line
 * t & 1 with a header, then the number of the step into the line (release), and waits until the lines of all others show t (acquire).
 * Two slots are enough: who has reached step t + 1 has read everything of step t, and slots t & 1 are overwritten in step t + 2, after all
 * have reached t + 1. For the same reason it does not matter which rank writes which of them, and in step t a rank may write for t + 1 while
 * others still read what was written for t (relay.h): all are in step t, so they have read what was written for t - 1.
 */
#ifndef COMMGRAPH_COLLECTIVE_H
#define COMMGRAPH_COLLECTIVE_H

#include "copy.h"
#include "kernels.h"
#include "reach.h"
#include "team.h"

#define CG_MAX_REGIONS 4096
#define CG_NOTE_BYTES 1024
enum { CG_OUT, CG_IN, CG_WHERE, CG_PAIR_ROWS };

typedef struct {
    _Alignas(CG_LINE) _Atomic uint32_t step;
    uint32_t tag;      /* of the call: what all ranks must have in common */
    uint64_t where;    /* where they lie for all to read (steps.h), 0: staged in the slot */
    uint32_t rounds;   /* that this rank needs */
    uint32_t streamed; /* whether the slot was written past the caches */
    _Atomic uint32_t off; /* the first step of a call of threads, once this rank has its hands off the tensors of the others (reduce.c) */
} cg_line;

/* How two ways to write a slot compare, for one class of sizes: nanoseconds per KiB, of the writer and of the slowest reader together. */
typedef struct {
    float cost[2];
    uint32_t turn, read; /* so many were written, and read */
    int last;        /* way, which was taken `streak` times more before (cg_choose_landing) */
    uint32_t streak;
} cg_choice;
enum { CG_CLASSES = 3 };

typedef struct {
    char *base;    /* of the mapping; rank r's part begins at base + r * stride */
    size_t stride, bytes;
} cg_region;

typedef struct {
    cg_team *team;
    int n, me;
    size_t slot_bytes;
    cg_line *lines;          /* [rank][parity] */
    char *slots;             /* [place][parity][slot_bytes] */
    char *shares;            /* [rank][cg_share_bytes()], of three ranks and more */
    _Atomic uint32_t *costs; /* [reader][writer][class][way]: ns per KiB as a reader measured it, in 1/256 */
    uint64_t *pairs;         /* [parity][rank][out, in, where][peer]: bytes of an all_to_all, and where those that go out lie, or tensors of threads do */
    char *notes;             /* [rank][CG_NOTE_BYTES], a step in front */
    uint32_t step;
    cg_choice choices[CG_CLASSES], placings[CG_CLASSES], landings[CG_CLASSES];
    size_t reach_from; /* pieces of so many bytes are read where they lie; 0 where the ranks may not reach each other's memory */
    size_t among_from; /* tensors of so many bytes are reduced where they lie; 0 where not all ranks are threads of this process */
    int exposed; /* others may be at the tensors of a call; if it has failed they may still be, and the tensors must stay */
    int way; /* how slots are written, but for those of a relay: 0 plain, 1 streaming, -1 by measurement */
    cg_region *regions;
    int n_regions;
    uint64_t bytes_sent;
} cg_group;

/* What a call is, and until when. */
typedef struct {
    uint32_t tag;
    uint64_t call;
    int64_t deadline;
    void (*meanwhile)(void *); /* what may as well be done while the others come; may be NULL */
    void *of;
} cg_call;

size_t cg_group_bytes(int n, size_t slot_bytes);
/* `memory`: zeroed, of cg_group_bytes(), at a multiple of 4096. */
void cg_group_join(cg_group *group, cg_team *team, void *memory, size_t slot_bytes);
void cg_group_leave(cg_group *group);
int cg_group_add_region(cg_group *group, char *base, size_t stride, size_t bytes);

/* Finds out on all ranks alike whether they may read each other's memory. Collective. */
int cg_group_reach(cg_group *g, const cg_call *call, int *who);

/* All return CG_*, and set *who where it says so. After anything but CG_OK the group is of no use any more. */
int cg_barrier(cg_group *g, const cg_call *call, int *who);
/* `to` may be `from`; `in_place` says on all ranks alike whether it is. */
int cg_all_reduce(cg_group *g, const cg_call *call, const void *from, void *to, size_t count, int dtype, int op, int in_place, int *who);
/* An all-reduce in two halves, between which this rank does something else and no other call of the group: the first sends all that the others
 * need, so that none of them waits for the second. 0 if that is not possible, with nothing done: large tensors, which take several steps. */
int cg_all_reduce_begin(cg_group *g, const cg_call *call, const void *from, size_t count, int dtype);
int cg_all_reduce_has_arrived(cg_group *g);
int cg_all_reduce_end(cg_group *g, const cg_call *call, const void *from, void *to, size_t count, int dtype, int op, int *who);
/* Every rank p gives bytes[p] bytes, this one those at `mine`; `into[p]` (base NULL: not wanted) gets those of rank p. `everywhere` says on all
 * ranks alike whether each wants all. */
int cg_share(cg_group *g, const cg_call *call, const char *mine, const size_t *bytes, const cg_block *into, int everywhere, int *who);
/* Block out[p] goes to rank p, into[p] comes from rank p. */
int cg_trade(cg_group *g, const cg_call *call, const cg_block *out, const cg_block *into, int *who);
/* Block out[p] is reduced by rank p; `to` gets the reduction of this rank's. Sizes are the same on all ranks. */
int cg_reduce_scatter(cg_group *g, const cg_call *call, const cg_block *out, void *to, int dtype, int op, int *who);

/* A row of `pairs` in the step that runs. */
uint64_t *cg_pair_row(cg_group *g, int rank, int row);

/* One way, in ns, of a cache line between the first two ranks; the others look on. */
int cg_ping_pong(cg_group *g, const cg_call *call, int rounds, double *ns, int *who);

#endif
