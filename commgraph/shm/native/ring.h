/* A ring of bytes in shared memory: one writer, any number of readers, each of which gets every record.
 *
 * A record has parts and travels in fragments, so that it may be larger than the ring. A fragment that begins a record voids an unfinished
 * record before it: the writer gave up on that one, and readers drop it. The order of loads and stores is explored by
 * tests/shm/protocol_model.py.
 */
#ifndef COMMGRAPH_RING_H
#define COMMGRAPH_RING_H

#include "zero_copy.h"
#include "wait.h"

/* How far the writer, or one reader, has come; in shared memory, in front of the bytes. */
typedef struct {
    _Alignas(CG_LINE) _Atomic uint64_t position;
    cg_bell bell; /* of the one thread that waits for it to move; private rings only */
} cg_cursor;

typedef struct {
    const void *data;
    size_t bytes;
} cg_part;

/* Header of a record. The sizes of its parts follow, then the parts. A size with CG_BY_REFERENCE is that of a zero-copy part, of which the
 * record holds a cg_reference only. */
typedef struct {
    uint32_t kind, n_parts;
    uint64_t meta;
    uint64_t bytes; /* of sizes and parts */
} cg_record;

#define CG_BY_REFERENCE (1ull << 63)
typedef struct {
    uint64_t address, number;
} cg_reference;

typedef struct {
    cg_team *team;
    cg_cursor *head;
    cg_cursor *tails; /* of the readers */
    char *bytes;
    size_t capacity;
    int private;         /* whether `team` is a view of this ring's own: then its two sides sleep on the bells of the cursors */
    int collective;      /* its records are calls of the group, numbered like its collectives */
    int writer;          /* the member that writes */
    int n_readers;
    int first_reader;    /* readers are the n_readers members from this one on, the writer left out */
    uint64_t at;         /* how far this side has come; a reader publishes it later */
    uint64_t published;
    /* Zero-copy parts, of private rings (zero_copy.h). */
    size_t zero_copy_from;        /* bytes from which a part is one; 0: none is */
    size_t record_zero_copy_from; /* as above, of the record that is being written */
    cg_side side;
    uint64_t offered; /* number of the last part that was offered */
    /* Of a reader: the record and the part that it reads. */
    cg_record record;
    int in_record;
    size_t fragment_left, padding, record_left;
    uint64_t *sizes;
    size_t sizes_read;
    cg_reference reference; /* of a zero-copy part */
    size_t reference_read;
    unsigned claimed; /* chunks of that part; CG_UNOPENED */
} cg_ring;

size_t cg_ring_bytes(int n_readers, size_t capacity);
/* `memory`: zeroed, of cg_ring_bytes(). Readers are the members from `first_reader` on, the writer left out. */
void cg_ring_join(cg_ring *ring, cg_team *team, void *memory, int writer, int first_reader, int n_readers, size_t capacity);
/* The bell of a private ring on which its writer, or else its reader, sleeps. */
cg_bell *cg_ring_bell(void *memory, int writer);
void cg_ring_leave(cg_ring *ring);

/* Writer: writes a record. CG_TIMEOUT: no reader gets any of it. Zero-copy parts have been read when it returns. */
int cg_ring_put(cg_ring *ring, uint32_t kind, uint64_t meta, const cg_part *parts, uint32_t n_parts, int64_t deadline, int *who);
/* Writer: goes on without a reader that will never join. 0 if it has joined already. */
int cg_ring_leave_out(cg_ring *ring, int reader);

/* Reader: whether cg_ring_next would find anything at once. */
int cg_ring_ready(const cg_ring *ring);
/* Reader: waits for the next record and its sizes: ring->record, cg_ring_size. CG_TIMEOUT: call again, nothing is lost. */
int cg_ring_next(cg_ring *ring, int64_t deadline, int *who);
static inline size_t cg_ring_size(const cg_ring *ring, uint32_t part) { return (size_t)(ring->sizes[part] & ~CG_BY_REFERENCE); }
/* Reader: reads a part, after all parts before it. *done counts its bytes, also after an early end: call again with the same `done` and
 * `to`. CG_RESTART: the writer gave up on the record; call cg_ring_next again. */
int cg_ring_read(cg_ring *ring, uint32_t part, void *to, size_t *done, int64_t deadline, int *who);
/* Reader: gives up on a part that it was reading, before freeing its memory. 0 if another process may still write to that memory: it must
 * stay. */
int cg_ring_give_up(cg_ring *ring);
/* Reader: ends the record, all of which was read, or which is void. */
void cg_ring_finish(cg_ring *ring);

#endif
