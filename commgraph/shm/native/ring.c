#include "ring.h"

#include <stdlib.h>
#include <string.h>

#include "cma.h"

enum {
    UNIT = 16, /* fragments begin at multiples of it */
    FIRST = 1,
    LARGEST = 256 * 1024, /* bytes of a fragment: few headers, and a reader that begins early */
};

typedef struct {
    uint32_t bytes;
    uint32_t flags;
    uint64_t unused;
} cg_fragment;

_Static_assert(sizeof(cg_fragment) == UNIT, "the head of a fragment never wraps");

static size_t padded(size_t bytes) { return (bytes + UNIT - 1) / UNIT * UNIT; }
static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

size_t cg_ring_bytes(int n_readers, size_t capacity) {
    return sizeof(cg_cursor) * (size_t)(1 + n_readers) + sizeof(cg_zero_copy) + padded(capacity);
}

void cg_ring_join(cg_ring *ring, cg_team *team, void *memory, int writer, int first_reader, int n_readers, size_t capacity) {
    memset(ring, 0, sizeof *ring);
    ring->team = team;
    ring->head = memory;
    ring->tails = ring->head + 1;
    ring->side = (cg_side){(cg_zero_copy *)(ring->tails + n_readers), team, team->me == writer ? first_reader : writer, CG_ZERO_COPY_CHUNK};
    ring->claimed = CG_UNOPENED;
    ring->bytes = (char *)(ring->side.shared + 1);
    ring->capacity = padded(capacity);
    ring->writer = writer;
    ring->first_reader = first_reader;
    ring->n_readers = n_readers;
}

cg_bell *cg_ring_bell(void *memory, int writer) {
    /* The writer waits for the tail, which is the second cursor, the reader for the head. */
    return &((cg_cursor *)memory)[writer ? 1 : 0].bell;
}

void cg_ring_leave(cg_ring *ring) {
    free(ring->sizes);
    ring->sizes = NULL;
}

static int member_of_reader(const cg_ring *ring, int reader) {
    int member = ring->first_reader + reader;
    return ring->writer >= ring->first_reader && member >= ring->writer ? member + 1 : member;
}

static cg_cursor *my_tail(cg_ring *ring) {
    int reader = ring->team->me - ring->first_reader;
    return &ring->tails[ring->writer >= ring->first_reader && ring->team->me > ring->writer ? reader - 1 : reader];
}

static int watched_readers(const cg_ring *ring) {
    /* One reader: the writer watches that one. Several: all, because each must get every record. */
    return ring->n_readers == 1 ? member_of_reader(ring, 0) : CG_EVERYONE;
}

/* Writer. */

typedef struct {
    cg_ring *ring;
    size_t needed;
    int slowest;
} vacancy;

static int has_room(void *arg) {
    vacancy *v = arg;
    cg_ring *ring = v->ring;
    for (int r = 0; r < ring->n_readers; r++) {
        uint64_t tail = atomic_load_explicit(&ring->tails[r].position, memory_order_acquire);
        if (ring->capacity - (size_t)(ring->at - tail) < v->needed) {
            v->slowest = r;
            return 0;
        }
    }
    return 1;
}

int cg_ring_leave_out(cg_ring *ring, int reader) {
    if (!cg_team_leave_out(ring->team, member_of_reader(ring, reader))) return 0;
    /* As if it had read every record that will ever be written. */
    atomic_store_explicit(&ring->tails[reader].position, UINT64_MAX / 2, memory_order_release);
    return 1;
}

static int make_room(cg_ring *ring, size_t bytes, int64_t deadline, int *who) {
    vacancy v = {ring, bytes, 0};
    int result = has_room(&v) ? CG_OK : cg_wait(ring->team, has_room, &v, watched_readers(ring), ring->collective, deadline, who);
    if (result == CG_TIMEOUT) *who = member_of_reader(ring, v.slowest);
    return result;
}

static void write_bytes(cg_ring *ring, const void *data, size_t bytes) {
    size_t offset = (size_t)(ring->at % ring->capacity), before = smaller(bytes, ring->capacity - offset);
    memcpy(ring->bytes + offset, data, before);
    memcpy(ring->bytes, (const char *)data + before, bytes - before);
    ring->at += bytes;
}

static void publish_head(cg_ring *ring) {
    ring->at = padded((size_t)ring->at);
    atomic_store_explicit(&ring->head->position, ring->at, memory_order_release);
    if (ring->private) cg_notify_bell(ring->team->theirs);
    else if (ring->n_readers == 1) cg_notify(ring->team, member_of_reader(ring, 0));
    else cg_notify_all(ring->team);
}

static int is_zero_copy(const cg_ring *ring, const cg_part *part) { return ring->record_zero_copy_from && part->bytes >= ring->record_zero_copy_from; }

/* The bytes of a part in the record: all of them, or a reference. */
static cg_part written_part(cg_ring *ring, const cg_part *part, cg_reference *reference) {
    if (!is_zero_copy(ring, part)) return *part;
    *reference = (cg_reference){(uint64_t)(uintptr_t)part->data, ++ring->offered};
    return (cg_part){reference, sizeof *reference};
}

/* Writes a record fragment by fragment; after an error its last fragments are missing. */
static int write_record(cg_ring *ring, uint32_t kind, uint64_t meta, const cg_part *parts, uint32_t n_parts, int64_t deadline, int *who) {
    size_t sizes = n_parts * sizeof(uint64_t);
    cg_record record = {kind, n_parts, meta, sizes};
    for (uint32_t i = 0; i < n_parts; i++) record.bytes += is_zero_copy(ring, &parts[i]) ? sizeof(cg_reference) : parts[i].bytes;
    size_t largest = smaller(ring->capacity / 4, LARGEST) - UNIT;
    uint64_t started = ring->at;
    size_t left = sizeof record + (size_t)record.bytes;
    uint32_t part = 0;                /* the part that is written next */
    size_t within = 0, size_at = 0;   /* bytes written of that part, and of the sizes */
    cg_reference reference;
    cg_part written = {NULL, 0};
    if (n_parts > 0) written = written_part(ring, &parts[0], &reference);
    for (int first = 1; first || left > 0; first = 0) {
        cg_fragment fragment = {(uint32_t)smaller(left, largest), first ? FIRST : 0, 0};
        /* A record of one fragment is written as a whole or not at all. */
        int result = make_room(ring, UNIT + padded(fragment.bytes), deadline, who);
        if (result != CG_OK) {
            if (first) ring->at = started;
            return result;
        }
        size_t room = fragment.bytes;
        write_bytes(ring, &fragment, sizeof fragment);
        if (first) {
            write_bytes(ring, &record, sizeof record);
            room -= sizeof record;
        }
        for (; size_at < sizes && room > 0;) {
            /* A fragment may end between two bytes of a size. */
            const cg_part *sized = &parts[size_at / sizeof(uint64_t)];
            uint64_t size = sized->bytes | (is_zero_copy(ring, sized) ? CG_BY_REFERENCE : 0);
            size_t byte = size_at % sizeof size, some = smaller(room, sizeof size - byte);
            write_bytes(ring, (char *)&size + byte, some);
            size_at += some, room -= some;
        }
        while (room > 0) {
            if (within == written.bytes) {
                written = written_part(ring, &parts[++part], &reference), within = 0;
                continue;
            }
            size_t some = smaller(room, written.bytes - within);
            write_bytes(ring, (const char *)written.data + within, some);
            within += some, room -= some;
        }
        left -= fragment.bytes;
        publish_head(ring);
    }
    return CG_OK;
}

int cg_ring_put(cg_ring *ring, uint32_t kind, uint64_t meta, const cg_part *parts, uint32_t n_parts, int64_t deadline, int *who) {
    if (cg_team_left(ring->team)) return CG_SELF; /* also if there is room */
    uint64_t number = ring->offered;
    ring->record_zero_copy_from = ring->zero_copy_from;
    for (uint32_t i = 0; i < n_parts; i++)
        if (is_zero_copy(ring, &parts[i]) && !cg_cma_can_access(ring->team, parts[i].data)) ring->record_zero_copy_from = 0;
    int result = write_record(ring, kind, meta, parts, n_parts, deadline, who);
    if (result != CG_OK && ring->offered > number) cg_zero_copy_withdraw(&ring->side, ring->offered);
    for (uint32_t i = 0; i < n_parts && result == CG_OK; i++)
        if (is_zero_copy(ring, &parts[i])) result = cg_zero_copy_send(&ring->side, ++number, parts[i].data, parts[i].bytes, deadline, who);
    return result;
}

/* Reader. */

static int has_bytes(void *arg) {
    cg_ring *ring = arg;
    return atomic_load_explicit(&ring->head->position, memory_order_acquire) != ring->at;
}

int cg_ring_ready(const cg_ring *ring) {
    return ring->in_record || atomic_load_explicit(&ring->head->position, memory_order_acquire) != ring->at;
}

static void read_bytes(cg_ring *ring, void *to, size_t bytes) {
    size_t offset = (size_t)(ring->at % ring->capacity), before = smaller(bytes, ring->capacity - offset);
    memcpy(to, ring->bytes + offset, before);
    memcpy((char *)to + before, ring->bytes, bytes - before);
    ring->at += bytes;
}

static void publish_tail(cg_ring *ring) {
    ring->published = ring->at;
    atomic_store_explicit(&my_tail(ring)->position, ring->at, memory_order_release);
    if (ring->private) cg_notify_bell(ring->team->theirs);
    else cg_notify(ring->team, ring->writer);
}

/* Reads the header of the next fragment. One with FIRST begins a record, also before the end of another. */
static int next_fragment(cg_ring *ring, int64_t deadline, int *who) {
    if (ring->published != ring->at) publish_tail(ring); /* the writer may be waiting for this room */
    *who = ring->writer;
    int result = has_bytes(ring) ? CG_OK : cg_wait(ring->team, has_bytes, ring, ring->n_readers == 1 ? ring->writer : CG_EVERYONE, ring->collective, deadline, who);
    if (result != CG_OK) return result;
    cg_fragment fragment;
    read_bytes(ring, &fragment, sizeof fragment);
    ring->fragment_left = fragment.bytes;
    ring->padding = padded(fragment.bytes) - fragment.bytes;
    if (!(fragment.flags & FIRST)) return CG_OK;
    int interrupted = ring->in_record;
    read_bytes(ring, &ring->record, sizeof ring->record);
    ring->fragment_left -= sizeof ring->record;
    ring->record_left = (size_t)ring->record.bytes;
    ring->in_record = 1;
    ring->sizes_read = 0;
    free(ring->sizes);
    ring->sizes = NULL;
    return interrupted ? CG_RESTART : CG_OK;
}

static int read_on(cg_ring *ring, void *to, size_t bytes, size_t *done, int64_t deadline, int *who) {
    while (*done < bytes) {
        if (ring->fragment_left == 0) {
            ring->at += ring->padding;
            ring->padding = 0;
            int result = next_fragment(ring, deadline, who);
            if (result != CG_OK) return result;
            continue;
        }
        size_t some = smaller(bytes - *done, ring->fragment_left);
        read_bytes(ring, (char *)to + *done, some);
        *done += some;
        ring->fragment_left -= some;
        ring->record_left -= some;
        if (ring->at - ring->published >= ring->capacity / 4) publish_tail(ring);
    }
    return CG_OK;
}

static void skip_fragment(cg_ring *ring) {
    ring->at += ring->fragment_left + ring->padding;
    ring->fragment_left = ring->padding = 0;
}

int cg_ring_next(cg_ring *ring, int64_t deadline, int *who) {
    if (cg_team_left(ring->team)) return CG_SELF;
    for (;;) {
        if (!ring->in_record) {
            int result = next_fragment(ring, deadline, who);
            if (result != CG_OK) return result;
            if (!ring->in_record) {
                skip_fragment(ring); /* of a record that was dropped */
                continue;
            }
        }
        size_t sizes = ring->record.n_parts * sizeof(uint64_t);
        if (ring->sizes == NULL && (ring->sizes = malloc(sizes + 1)) == NULL) return CG_NOMEM;
        int result = read_on(ring, ring->sizes, sizes, &ring->sizes_read, deadline, who);
        if (result != CG_RESTART) return result;
    }
}

void cg_ring_finish(cg_ring *ring) {
    skip_fragment(ring);
    ring->in_record = 0;
    publish_tail(ring);
}

int cg_ring_read(cg_ring *ring, uint32_t part, void *to, size_t *done, int64_t deadline, int *who) {
    size_t bytes = cg_ring_size(ring, part);
    if (!(ring->sizes[part] & CG_BY_REFERENCE)) return read_on(ring, to, bytes, done, deadline, who);
    if (ring->claimed == CG_UNOPENED) {
        int result = read_on(ring, &ring->reference, sizeof ring->reference, &ring->reference_read, deadline, who);
        if (result == CG_RESTART) ring->reference_read = 0;
        if (result != CG_OK) return result;
    }
    const cg_reference *reference = &ring->reference;
    int result = cg_zero_copy_receive(&ring->side, reference->number, reference->address, to, bytes, &ring->claimed, deadline, who);
    if (result != CG_OK && result != CG_RESTART) return result; /* the next call continues it */
    ring->reference_read = 0;
    ring->claimed = CG_UNOPENED;
    if (result == CG_OK) *done = bytes;
    else cg_ring_finish(ring);
    return result;
}

int cg_ring_give_up(cg_ring *ring) {
    if (ring->claimed == CG_UNOPENED) return 1;
    int unused = cg_zero_copy_revoke(&ring->side, ring->reference.number, ring->claimed);
    ring->claimed = CG_UNOPENED;
    ring->reference_read = 0;
    return unused;
}
