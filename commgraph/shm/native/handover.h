/* A large part of a record, which both sides of a ring copy from one process to the other, where it lies.
 *
 * The writer offers it under a number, and the reader opens the offer by saying where the part is wanted. Then either takes chunks of it, one
 * after the other, and copies them: each could do it alone, two are faster. The state is changed by compare-and-swap alone, so that
 * one thing comes of an offer: the reader has all of it, or one side has given up and the other takes no further chunk. */
#ifndef COMMGRAPH_HANDOVER_H
#define COMMGRAPH_HANDOVER_H

#include "team.h"

#define CG_HANDOVER_CHUNK (128 * 1024) /* bytes: less than what the kernel copies while it holds the pages of both sides */

/* In shared memory. */
typedef struct {
    _Alignas(CG_LINE) _Atomic uint64_t state; /* number << 24 | chunks that were taken, or what has come of it (handover.c) */
    _Atomic uint64_t pushed;                  /* number << 24 | chunks that the writer has copied of it */
    _Atomic uint64_t to;                      /* address in the process of the reader; 0 where only he reaches it, and copies all of it */
} cg_handover;

/* One side of a ring with a view of its own. */
typedef struct {
    cg_handover *shared;
    cg_team *team;
    int peer;     /* seat */
    size_t chunk; /* the same on both sides */
} cg_side;

/* Writer: CG_OK once the reader has all of it. Otherwise he gets nothing, and what was offered may be freed: his record is void. Numbers rise. */
int cg_handover_give(const cg_side *side, uint64_t number, const void *from, size_t bytes, int64_t deadline, int *who);
/* Writer: gives up on all numbers up to this one. 0 if the reader has it already. */
int cg_handover_withdraw(const cg_side *side, uint64_t number);
/* Reader: `from` is the address in the writer's process. *mine is CG_UNOPENED at first, and kept between attempts, as is `to`. CG_RESTART: the
 * writer has given up. */
#define CG_UNOPENED (~0u)
int cg_handover_take(const cg_side *side, uint64_t number, uint64_t from, void *to, size_t bytes, unsigned *mine, int64_t deadline, int *who);
/* Reader: gives up on a part that it has opened. 0 if the writer's process may still write to `to`: it has stopped in the midst of a chunk. */
int cg_handover_revoke(const cg_side *side, uint64_t number, unsigned mine);

#endif
