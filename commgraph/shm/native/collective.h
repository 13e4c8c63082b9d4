/* Collectives of the ranks of one group in shared memory.
 *
 * A call is a sequence of steps, numbered through the life of the group. In step t a rank writes its data to a slot t & 1, then its line t
 * & 1 with a header, then the number of the step into the line (release), and waits until the lines of all others show t (acquire). Two
 * slots are enough: a rank that has reached step t + 1 has read everything of step t, and slots t & 1 are overwritten in step t + 2, after
 * all have reached t + 1. For the same reason it does not matter which rank writes which slot, and in step t a rank may write for t + 1
 * while others still read the slots of t (pipelined.h): all are in step t, so all have read the slots of t - 1.
 */
#ifndef COMMGRAPH_COLLECTIVE_H
#define COMMGRAPH_COLLECTIVE_H

#include "copy.h"
#include "kernels.h"
#include "cma.h"
#include "wait.h"

#define CG_MAX_REGIONS 4096
#define CG_NOTE_BYTES 1024
enum { CG_OUT, CG_IN, CG_WHERE, CG_PAIR_ROWS };

typedef struct {
    _Alignas(CG_LINE) _Atomic uint32_t step;
    uint32_t tag;         /* of the call; the ranks must agree on it */
    uint64_t where;       /* where the data lie for all to read (steps.h); 0: staged in the slot */
    uint32_t rounds;      /* that this rank needs */
    uint32_t nontemporal; /* whether the slot was written by nontemporal stores, past the caches */
    /* Of a receiver of a large broadcast, the rest of whose tensor the root writes (collective.c): step << 24 | chunks. */
    _Atomic uint64_t claimed; /* chunks that the root has begun to write; CG_REVOKED: the receiver has given up, and the root writes no more */
    _Atomic uint64_t pushed;  /* chunks that it has written */
    _Atomic uint32_t released; /* the first step of a same-process call, once this rank accesses no tensor of the others any more (reduce.c) */
} cg_line;
_Static_assert(sizeof(cg_line) == CG_LINE, "one cache line");

/* The choice between plain (0) and nontemporal (1) stores, for one class of sizes (nontemporal.c). */
typedef struct {
    float cost[2];       /* ns per KiB, of the writer and of the slowest reader together, by kind of store */
    uint32_t turn, read; /* chunks written, and read */
    int last;            /* the last choice of cg_choose_output_stores, repeated `streak` times */
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
    char *reduce_buffers;    /* [rank][cg_reduce_buffer_bytes()], of three ranks and more */
    _Atomic uint32_t *costs; /* [reader][writer][class][nontemporal]: ns per KiB as a reader measured it, in 1/256 */
    uint64_t *pairs;         /* [parity][rank][out, in, where][peer]: bytes of an all_to_all, and addresses of its blocks, or of same-process tensors */
    char *notes;             /* [rank][CG_NOTE_BYTES], the length of the text in front */
    uint32_t step;
    cg_choice slot_choices[CG_CLASSES], own_choices[CG_CLASSES], output_choices[CG_CLASSES];
    size_t cma_from; /* bytes from which a piece is read in place by cross-memory attach; 0 where the kernel does not allow that */
    size_t same_process_from; /* bytes from which tensors are reduced in place; 0 unless all ranks are threads of this process */
    uint32_t receiving; /* the step in which this rank let the root of a broadcast write to its tensor; 0: it has not */
    int exposed; /* other ranks may access the tensors of a call; after it has failed they may still do so, and the tensors must stay */
    int nontemporal; /* stores into slots, except those of a pipelined exchange: 0 plain, 1 nontemporal, -1 by measurement */
    cg_region *regions;
    int n_regions;
    uint64_t bytes_sent;
} cg_group;

/* A call: its tag, its number and operation (`posted` of cg_member; 0: it is not posted), its deadline. */
typedef struct {
    uint32_t tag;
    uint64_t call;
    int64_t deadline;
    void (*meanwhile)(void *); /* called with `of` while the other ranks arrive; may be NULL */
    void *of;
} cg_call;

size_t cg_group_bytes(int n, size_t slot_bytes);
/* `memory`: zeroed, of cg_group_bytes(), at a multiple of 4096. */
void cg_group_join(cg_group *group, cg_team *team, void *memory, size_t slot_bytes);
void cg_group_leave(cg_group *group);
int cg_group_add_region(cg_group *group, char *base, size_t stride, size_t bytes);

/* Probes cross-memory attach between all ranks; sets `cma_from` and `same_process_from` alike on all. Collective. */
int cg_group_probe_cma(cg_group *g, const cg_call *call, int *who);

/* All return CG_*, and set *who where the result names a member. After a result other than CG_OK the group is unusable. */
int cg_barrier(cg_group *g, const cg_call *call, int *who);
/* `to` may be `from`; `in_place` says on all ranks alike whether it is. */
int cg_all_reduce(cg_group *g, const cg_call *call, const void *from, void *to, size_t count, int dtype, int op, int in_place, int *who);
/* An all-reduce in two halves. This rank may do anything between them but another call of the group. The first half sends all that the other ranks
 * need, so none of them waits for the second. Not of large tensors, which take several steps: ask cg_can_halve_all_reduce first. */
int cg_can_halve_all_reduce(const cg_group *g, size_t count, int dtype);
void cg_all_reduce_begin(cg_group *g, const cg_call *call, const void *from, size_t count, int dtype);
/* Whether cg_all_reduce_end would wait for no rank. */
int cg_all_reduce_has_arrived(cg_group *g);
int cg_all_reduce_end(cg_group *g, const cg_call *call, const void *from, void *to, size_t count, int dtype, int op, int *who);
/* Rank p contributes bytes[p] bytes, this rank those at `mine`; `into[p]` (base NULL: not wanted) receives those of rank p. `everywhere`
 * says on all ranks alike whether each rank wants all. Serves all_gather, gather and broadcast. */
int cg_all_gatherv(cg_group *g, const cg_call *call, const char *mine, const size_t *bytes, const cg_block *into, int everywhere, int *who);
/* Block out[p] goes to rank p, into[p] comes from rank p. */
int cg_all_to_allv(cg_group *g, const cg_call *call, const cg_block *out, const cg_block *into, int *who);
/* Block out[p] is reduced by rank p; `to` receives the reduction of the blocks for this rank. Sizes are equal on all ranks. */
int cg_reduce_scatter(cg_group *g, const cg_call *call, const cg_block *out, void *to, int dtype, int op, int *who);

/* A row of `pairs` in the current step. */
uint64_t *cg_pair_row(cg_group *g, int rank, int row);

/* One-way latency, in ns, of a cache line between the first two ranks; the other ranks wait. */
int cg_ping_pong(cg_group *g, const cg_call *call, int rounds, double *ns, int *who);

#endif
