/* A ring of bytes in shared memory: one writer, any number of readers, each of which gets every record.
 *
 * A record has parts and travels in fragments, so that it may be larger than the ring. A fragment that begins a record ends one that was
 * not finished: the writer gave up on it, and its readers forget it. The order of loads and stores is explored by tests/shm/protocol_model.py.
 */
#ifndef COMMGRAPH_RING_H
#define COMMGRAPH_RING_H

#include "handover.h"
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

/* What stands in front of a record; its sizes follow, each with CG_LIES_THERE where the part is handed over, and stands in the record as a
 * cg_reference. */
typedef struct {
    uint32_t kind, n_parts;
    uint64_t meta;
    uint64_t bytes; /* of sizes and parts */
} cg_record;

#define CG_LIES_THERE (1ull << 63)
typedef struct {
    uint64_t address, number;
} cg_reference;

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
    /* Large parts of a ring that is private (handover.h): from so many bytes on, 0 for never; and how many were offered. */
    size_t handed_from;
    size_t handing; /* the same of the record that is being written */
    cg_side side;
    uint64_t offered;
    /* Of a reader: what is being read. */
    cg_record record;
    int in_record;
    size_t fragment_left, padding, record_left;
    uint64_t *sizes;
    size_t sizes_read;
    cg_reference reference; /* of the part that is handed over */
    size_t reference_read;
    unsigned taken; /* chunks of it; CG_UNOPENED */
} cg_ring;

size_t cg_ring_bytes(int n_readers, size_t capacity);
/* `memory`: zeroed, of cg_ring_bytes(). Readers sit in the seats from `first_reader` on, the writer's left out. */
void cg_ring_join(cg_ring *ring, cg_team *team, void *memory, int writer, int first_reader, int n_readers, size_t capacity);
/* The bells of a ring for one reader: that on which the writer (or the reader) of such a ring sleeps. */
cg_bell *cg_ring_bell(void *memory, int writer);
void cg_ring_leave(cg_ring *ring);

/* Writer. CG_TIMEOUT: nobody will see any of it. Parts that are handed over have been read when it returns. */
int cg_ring_put(cg_ring *ring, uint32_t kind, uint64_t meta, const cg_part *parts, uint32_t n_parts, int64_t deadline, int *who);
/* Goes on without a reader, whose seat stays empty for ever. 0 if it has sat down already. */
int cg_ring_leave_out(cg_ring *ring, int reader);

/* Reader: whether cg_ring_next would find anything at once. */
int cg_ring_ready(const cg_ring *ring);
/* Reader: waits for the next record and its sizes; ring->record holds it, cg_ring_size tells them. CG_TIMEOUT: call again, nothing is lost. */
int cg_ring_next(cg_ring *ring, int64_t deadline, int *who);
static inline size_t cg_ring_size(const cg_ring *ring, uint32_t part) { return (size_t)(ring->sizes[part] & ~CG_LIES_THERE); }
/* Reads a part; all before it were read. *done counts its bytes, also where it ends early: go on from there, with the same `to`. CG_RESTART:
 * call cg_ring_next again. */
int cg_ring_read(cg_ring *ring, uint32_t part, void *to, size_t *done, int64_t deadline, int *who);
/* Gives up on a part that is being read, as is to be done before it is freed. 0 if another process may still write to it: it must stay. */
int cg_ring_give_up(cg_ring *ring);
/* Ends the record, all of which was read, or which is void. */
void cg_ring_finish(cg_ring *ring);

#endif
