/* What the parts of the Python module share. Only the stable ABI of Python 3.11 is used: one build serves every later version. */
#ifndef COMMGRAPH_MODULE_H
#define COMMGRAPH_MODULE_H

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "collective.h"
#include "pool.h"
#include "ring.h"

/* Which thread has the interpreter after a wait, 0 for none, and on which core it began to. */
typedef struct {
    _Atomic uintptr_t thread;
    _Atomic int core;
} turn;

typedef struct {
    PyObject *stopped, *busy; /* exceptions */
    PyTypeObject *segment, *pool, *block, *team, *group, *ring, *tensors, *fast, *messages, *timedelta;
    PyObject *requires_grad, *is_neg, *version, *total_seconds; /* names, interned */
    turn turn;
} module_state;

typedef struct {
    PyObject_HEAD
    char *base;
    size_t bytes;
} Segment;

typedef struct {
    PyObject_HEAD
    cg_pool *pool;
} Pool;

/* Memory of a pool, given back when the last reference goes. */
typedef struct {
    PyObject_HEAD
    char *base;
    Py_ssize_t bytes;
} Block;

typedef struct Team {
    PyObject_HEAD
    cg_team team;
    Segment *segment;
    struct Team *of; /* of a view that a ring has for itself: the seat's first one */
    turn *turn;
    PyThreadState *saved; /* of the thread that is in a call, while others may run */
    int busy;
    int brief; /* the call lets others run only while it waits */
} Team;

/* Operations, as a line and a seat name them. */
enum {
    OP_BARRIER = 1, OP_ALL_REDUCE, OP_ALL_REDUCE_, OP_ALL_GATHER, OP_REDUCE_SCATTER, OP_ALL_TO_ALL, OP_GATHER, OP_BROADCAST
};

enum { CACHED = 64, KEY_DIMS = 4 };
/* A call that was made before: its digest need not be computed again. */
typedef struct {
    int operation, dtype, ndim;
    int64_t extra, shape[KEY_DIMS];
    uint32_t digest;
} cached_call;

typedef struct {
    PyObject_HEAD
    cg_group group;
    Team *team;
    Pool *pool;
    PyObject *regions; /* segments that are kept mapped */
    uint64_t sequence;
    int enabled;
    int paused; /* calls that were begun before wait for another thread to make them: native calls may not overtake them */
    cached_call cache[CACHED];
} Group;

typedef struct {
    PyObject_HEAD
    cg_ring ring;
    Team *team;
    Pool *pool;
    PyObject *parts; /* of the record that is being read, a list; and how far the last of them is */
    size_t done;
} Ring;

extern PyType_Spec group_spec, ring_spec, tensors_spec, fast_spec, messages_spec;

module_state *state_of(PyObject *self);
/* Begins and ends a call on a team, during which other threads of Python run. 0 if the team is in use. */
int enter(Team *team);
/* The same for a call that copies so many bytes: one that is over sooner than the interpreter could be handed to another thread, unless it has to
 * wait, keeps it. */
enum { BRIEF = 8 * 1024 };
int enter_for(Team *team, size_t bytes);
/* The two halves of it: whether such a call keeps the interpreter, and to begin one that does, or does not. */
int keeps_interpreter(Team *team, size_t bytes);
int enter_keeping(Team *team, int keep);
void leave(Team *team);
/* The exception for a result other than CG_OK. */
PyObject *raise_stopped(PyObject *self, int code, int who);
int64_t deadline_after(int64_t timeout_ns);
/* A new object of a type, and the end of one, whose type it holds. */
PyObject *allocate(PyTypeObject *type);
void free_object(PyObject *self);
Block *take_block(PyObject *self, Pool *pool, size_t bytes);
/* A further view of a seat, for a ring between two. */
Team *new_view(module_state *state, Team *of, cg_bell *bell, cg_bell *theirs);
uint64_t call_word(const Group *group, int operation);
/* The seat says which call it is in. */
void say_posted(Ring *ring, uint64_t posted);
PyObject *module_any_ring(PyObject *module, PyObject *args);
/* A timeout as Python's callers give it, in nanoseconds; `standard_ns` for None. 1; 0 if it is none that is plain, -1 with an error set. */
int parse_timeout(PyObject *self, PyObject *value, int64_t standard_ns, int64_t *ns);
/* The answer of a native call that does not handle its arguments: None, or NULL with the error that is set. */
PyObject *not_handled(void);
/* As commgraph.communicators.tags.tag_of. */
uint32_t make_tag(uint32_t kind, uint64_t number, uint32_t digest);

#endif
