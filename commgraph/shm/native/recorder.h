/* The record of calls: a ring of entries in memory that other processes read (commgraph/shm/recorder.py has the layout). */
#ifndef COMMGRAPH_RECORDER_H
#define COMMGRAPH_RECORDER_H

#include "module_tensors.h"

enum { ENTRY_DIMS = 6, ENTRY_OPEN = 1, ENTRY_DONE = 2, ENTRY_FAILED = 3 };

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

/* Begins the entry of a native collective; NULL where it is a part of a call that has an entry, or there is no room. Never fails. The place
 * of the call is left to `record_site`, which takes as long as all the rest. */
cg_entry *record_begin(Recorder *recorder, const char *operation, uint16_t group, uint16_t strategy, uint64_t sequence, const view *v, int root,
                       const char *reduction);
/* Finds the place in the code of an entry whose call was made on this thread. */
void record_site(Recorder *recorder, cg_entry *entry);
/* Sets the tensor of an entry that was begun without one. */
void record_tensor(Recorder *recorder, cg_entry *entry, const view *v);
/* Ends an entry; NULL is none. */
void record_end(cg_entry *entry, int state);
/* Removes an entry: the call goes on by another path, which begins one. */
void record_cancel(cg_entry *entry);
Recorder *recorder_of(PyObject *self, PyObject *value);

extern PyType_Spec recorder_spec;

#endif
