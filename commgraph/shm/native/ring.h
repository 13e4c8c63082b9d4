/* A ring of bytes in shared memory: one writer, any number of readers, each of which gets every record.
 *
 * A record has parts and travels in fragments, so that it may be larger than the ring. A fragment that begins a record ends one that was
 * not finished: the writer gave up on it, and its readers forget it. The order of loads and stores is explored by tests/protocol_model.py.
 */
#ifndef COMMGRAPH_RING_H
#define COMMGRAPH_RING_H

#include "team.h"

/* In shared memory, in front of the bytes. */
typedef struct {
    _Alignas(CG_LINE) _Atomic uint64_t position;
    cg_bell bell; /* of whoever waits for it to move, where that is one thread with a view of its own */
} cg_mark;

typedef struct {
    const void *data;
    size_t bytes;
} cg_part;

/* What stands in front of a record; its sizes follow. */
typedef struct {
    uint32_t kind, n_parts;
    uint64_t meta;
    uint64_t bytes; /* of sizes and parts */
} cg_record;

typedef struct {
    cg_team *team;
    cg_mark *head;
    cg_mark *tails; /* of the readers */
    char *bytes;
    size_t capacity;
    int private;         /* whether `team` is a view of this ring's own: then its two sides sleep on the bells of the marks */
    int collective;      /* what it carries are calls of the group, numbered like its collectives */
    int writer;          /* seat */
    int n_readers;
    int first_reader;    /* the seats of the readers: all from here on, without the writer's */
    uint64_t at;         /* how far this side has come; a reader's is published behind it */
    uint64_t published;
    /* Of a reader: what is being read. */
    cg_record record;
    int in_record;
    size_t fragment_left, padding, record_left;
    uint64_t *sizes;
    size_t sizes_read;
} cg_ring;

size_t cg_ring_bytes(int n_readers, size_t capacity);
/* `memory`: zeroed, of cg_ring_bytes(). Readers sit in the seats from `first_reader` on, the writer's left out. */
void cg_ring_join(cg_ring *ring, cg_team *team, void *memory, int writer, int first_reader, int n_readers, size_t capacity);
/* The bells of a ring for one reader: that on which the writer (or the reader) of such a ring sleeps. */
cg_bell *cg_ring_bell(void *memory, int writer);
void cg_ring_leave(cg_ring *ring);

/* Writer. CG_TIMEOUT: nobody will see any of it. */
int cg_ring_put(cg_ring *ring, uint32_t kind, uint64_t meta, const cg_part *parts, uint32_t n_parts, int64_t deadline, int *who);
/* Goes on without a reader, whose seat stays empty for ever. 0 if it has sat down already. */
int cg_ring_leave_out(cg_ring *ring, int reader);

/* Reader: waits for the next record and its sizes; ring->record and ring->sizes hold them. CG_TIMEOUT: call again, nothing is lost. */
int cg_ring_next(cg_ring *ring, int64_t deadline, int *who);
/* Reads the next bytes of the record. *done counts them, also where it ends early: go on from there. CG_RESTART: call cg_ring_next again. */
int cg_ring_read(cg_ring *ring, void *to, size_t bytes, size_t *done, int64_t deadline, int *who);
/* Ends the record, all of which was read. */
void cg_ring_finish(cg_ring *ring);

#endif
