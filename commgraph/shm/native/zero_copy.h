/* The rendezvous of a large part of a record: both sides of a ring copy it from the memory of the one process to that of the other (cma.h).
 *
 * The writer offers the part under a number, and the reader opens the offer with the address of its destination. Then either side claims
 * chunks, one after the other, and copies them: the writer by writing, the reader by reading. Each could do it alone, two are faster. The
 * state is changed by compare-and-swap alone, so that an offer has one outcome on both sides: the reader has all of the part, or one side
 * has given up and the other claims no further chunk. */
#ifndef COMMGRAPH_ZERO_COPY_H
#define COMMGRAPH_ZERO_COPY_H

#include "wait.h"

#define CG_ZERO_COPY_CHUNK (128 * 1024) /* bytes: fewer than the kernel copies while it holds the pages of both sides (cma.c) */

/* In shared memory. */
typedef struct {
    _Alignas(CG_LINE) _Atomic uint64_t state; /* number << 24 | chunks that were claimed, or the outcome (zero_copy.c) */
    _Atomic uint64_t pushed;                  /* number << 24 | chunks that the writer has copied of it */
    _Atomic uint64_t to;                      /* address in the process of the reader; 0 where only the reader can access it: it copies all chunks */
} cg_zero_copy;

/* One side of a ring with a view of its own. */
typedef struct {
    cg_zero_copy *shared;
    cg_team *team;
    int peer;     /* the member on the other side */
    size_t chunk; /* the same on both sides */
} cg_side;

/* Writer: returns CG_OK once the reader has all of the part. Otherwise the reader gets nothing of it, its record is void, and `from` may be
 * freed. Numbers rise. */
int cg_zero_copy_send(const cg_side *side, uint64_t number, const void *from, size_t bytes, int64_t deadline, int *who);
/* Writer: gives up on all numbers up to this one. 0 if the reader has this part already. */
int cg_zero_copy_withdraw(const cg_side *side, uint64_t number);
/* Reader: copies the part from the address `from` in the writer's process. *mine counts the chunks that this side has claimed: CG_UNOPENED
 * at first, and kept between attempts, as is `to`. CG_RESTART: the writer has given up. */
#define CG_UNOPENED (~0u)
int cg_zero_copy_receive(const cg_side *side, uint64_t number, uint64_t from, void *to, size_t bytes, unsigned *mine, int64_t deadline, int *who);
/* Reader: gives up on a part that it has opened. 0 if the writer's process may still write to `to`: it has stopped in the middle of a
 * chunk. */
int cg_zero_copy_revoke(const cg_side *side, uint64_t number, unsigned mine);

#endif
