/* The record of calls: a ring of entries in memory that other processes read (commgraph/shm/recorder.py has the layout). */
#ifndef COMMGRAPH_RECORDER_H
#define COMMGRAPH_RECORDER_H

#include "module_tensors.h"

enum { ENTRY_DIMS = 6, ENTRY_OPEN = 1, ENTRY_DONE = 2, ENTRY_FAILED = 3 };
enum { ENTRY_COLLECTIVE = 0, ENTRY_OUTGOING = 1, ENTRY_INCOMING = 2 }; /* kinds */
enum { FAMILY_TENSORS = 1, FAMILY_OBJECTS = 2, FAMILY_DICTS = 3 };

/* One call. `state` is written first and last: a reader that finds it changed has read an entry that was being written. */
typedef struct {
    _Atomic uint64_t state; /* number of the entry << 3 | ENTRY_*; 0: nothing */
    int64_t begin, end;     /* CLOCK_MONOTONIC, ns */
    uint64_t sequence, bytes, thread;
    uint32_t site;                       /* index of a text, as the next */
    uint16_t group, operation, strategy; /* group: index of a text of the kind group */
    uint16_t tensors;                    /* how many */
    int32_t peer, tag;                   /* rank in the group; -1 none */
    uint16_t dtype;
    uint8_t ndim, kind;
    int64_t shape[ENTRY_DIMS];
    uint16_t reduction;
    uint8_t family, unused[5];
} cg_entry;

typedef struct {
    char magic[8];
    uint32_t version, entry_bytes;
    uint64_t capacity, texts_offset, texts_bytes, entries_offset;
    _Atomic uint64_t texts_used, next, dropped;
} cg_record_header;

typedef struct Recorder Recorder;

/* The record of one coordinator's calls. */
typedef struct {
    PyObject_HEAD
    Recorder *recorder;
    uint16_t group; /* number of the text about it */
    uint16_t lanes; /* distinguishes its messages from those of others; coordinators on the same communicators share it */
} GroupRecord;

/* Begins the entry of a native collective; NULL where it is a part of a call that has an entry, or there is no room. Never fails. The place
 * of the call is left to `record_site`, which takes as long as all the rest. */
cg_entry *record_begin(const GroupRecord *record, const char *operation, uint16_t strategy, uint64_t sequence, const view *v, int root,
                       const char *reduction);
/* Finds the place in the code of an entry whose call was made on this thread. */
void record_site(Recorder *recorder, cg_entry *entry);
/* Sets the tensor of an entry that was begun without one. */
void record_tensor(Recorder *recorder, cg_entry *entry, const view *v);
/* Ends an entry; NULL is none. */
void record_end(cg_entry *entry, int state);
/* Removes an entry: the call goes on by another path, which begins one. */
void record_cancel(cg_entry *entry);
/* The number of a name, which is added if it is new; 0 where there is no room. */
uint32_t index_of(Recorder *recorder, PyObject *text);

/* Of a message, or a collective of objects. */
typedef struct {
    const char *operation, *strategy; /* literals */
    PyObject *named;                  /* str: the operation, where it is not NULL */
    int kind, family, peer, tag;      /* commgraph/coordinator/recorded.py */
    uint64_t sequence;                /* of a collective; messages are numbered here */
    const view *tensor;               /* NULL: none, and bytes are added later */
} call_facts;

/* A native call that writes its own entry. The place of the call in the code takes as long as all the rest: it is found before the call releases
 * the interpreter, or at its end, when the peer has its message. */
typedef struct {
    GroupRecord *record; /* NULL: the call is not recorded */
    cg_entry *entry;     /* of the call, or of the one that it is a part of; NULL: there is no room */
    Team *team;
    int part;            /* of a call that has an entry */
    uint64_t bytes;      /* of a part */
    int placed;
} recording;

/* A GroupRecord, or NULL for None. 0 with an error set. */
int record_of(PyObject *self, PyObject *value, GroupRecord **record);
/* `team`: claimed by the call, whose work has not begun; NULL: the place is found now. Never fails. */
void begin_recording(recording *r, GroupRecord *record, const call_facts *facts, Team *team);
void add_to_recording(recording *r, uint64_t bytes);
/* Ends the entry, before `team` is unclaimed; state 0 removes it: the call was not made, or goes on by another path. An error that is set stays. */
void end_recording(recording *r, int state);

/* What the caller of a ring says of the call for the record: (record, operation, kind, peer, meta), or None, where nothing is recorded. `kind`: of
 * the ring's record, and of the message; `meta`: of the record, if that is for all ranks, whose high half is the number of the collective; None
 * of a message. */
typedef struct {
    GroupRecord *record; /* NULL: nothing is recorded */
    PyObject *operation;
    uint32_t kind;
    int peer, for_all;
    uint64_t meta;
} told_call;

/* 0 with an error set. */
int parse_told(PyObject *self, PyObject *given, told_call *told);
void record_told(recording *r, const told_call *told, int outgoing, Team *team);

extern PyType_Spec recorder_spec, group_record_spec;

#endif
