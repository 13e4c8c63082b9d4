/* Declarations that module*.c share. Only the stable ABI of Python 3.11 is used: one build serves every later version. */
#ifndef COMMGRAPH_MODULE_H
#define COMMGRAPH_MODULE_H

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "collective.h"
#include "pool.h"
#include "ring.h"

/* The thread that has the interpreter after a wait, 0 for none, and the core on which it took it (take_turn). */
typedef struct {
    _Atomic uintptr_t thread;
    _Atomic int core;
} turn;

typedef struct {
    PyObject *stopped, *busy; /* exceptions */
    PyTypeObject *segment, *pool, *block, *team, *group, *ring, *tensors, *fast, *messages, *net, *late, *link_group, *recorder, *group_record, *timedelta;
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
    struct Team *of; /* of the further view of a private ring: the first view of the member */
    turn *turn;
    PyThreadState *saved; /* of the thread that is in a call, while it has released the interpreter */
    int *disowned, is_disowned; /* `is_disowned` of the member's first view: the process was forked, and this is a copy */
    int busy;  /* a call has claimed it; read and written under the interpreter's lock alone */
    int brief; /* the call releases the interpreter only while it waits */
    void (*before_release)(void *); /* done before the interpreter is released, under its lock; NULL: nothing is */
    void *releasing;                /* its argument */
} Team;

/* Operations: the low byte of a member's `posted`. */
enum {
    OP_BARRIER = 1, OP_ALL_REDUCE, OP_ALL_REDUCE_, OP_ALL_GATHER, OP_REDUCE_SCATTER, OP_ALL_TO_ALL, OP_GATHER, OP_BROADCAST, OP_SCATTER, OP_REDUCE, OP_ALL_REDUCE_BEGUN
};

enum { CACHED = 64, KEY_DIMS = 4 };
/* The digest of an earlier call, by the operation and the tensor that it depends on. */
typedef struct {
    int operation, dtype, ndim;
    int64_t extra, shape[KEY_DIMS];
    uint32_t digest;
} cached_call;

typedef struct Calls Calls;
/* How the native calls of a group are carried: through shared memory (module_group.c), or over links (module_links.c). */
typedef struct {
    unsigned serves;       /* bits 1 << OP_*: which operations */
    size_t one_rank_bytes; /* bytes of a tensor of three ranks and more up to which a reduction to one rank is done by that rank alone */
    int (*is_ready)(Calls *, int operation, int root);            /* whether a call would make no link; `root`: -1 where there is none */
    int (*is_ready_to_reduce)(Calls *, size_t bytes);             /* likewise of an all_reduce for which is_ready holds */
    int (*claim)(Calls *);              /* begins a call; 0 with an error set */
    void (*unclaim)(Calls *);
    int (*keeps)(Calls *, size_t bytes); /* whether a call of so many bytes keeps the interpreter except while it waits */
    void (*begin_work)(Calls *, int keep);
    void (*end_work)(Calls *);
    int (*exposes)(const Calls *); /* after a failure: whether other ranks may still access the tensors of the call */
    int (*barrier)(Calls *, const cg_call *, int *who);
    int (*all_reduce)(Calls *, const cg_call *, const void *from, void *to, size_t count, int dtype, int op, int in_place, int *who);
    int (*reduce_scatter)(Calls *, const cg_call *, const cg_block *out, void *to, int dtype, int op, int *who);
    int (*gatherv)(Calls *, const cg_call *, const char *mine, const size_t *bytes, const cg_block *into, int root, int *who); /* root -1: all */
    int (*all_to_allv)(Calls *, const cg_call *, const cg_block *out, const cg_block *into, int *who);
    int (*broadcast)(Calls *, const cg_call *, void *data, size_t bytes, int root, int *who);
} cg_carrier;

/* The calls of one group, one at a time: the first member of Group and of LinkGroup. */
struct Calls {
    PyObject_HEAD
    const cg_carrier *carrier;
    int n, me;
    Pool *pool;
    PyObject *claims; /* a dict: None is in it while a call by the general path is under way (commgraph/coordinator/turns.py) */
    uint64_t sequence;
    int enabled;
    int paused; /* earlier calls are pending on another thread: native calls may not overtake them */
    int begun;  /* an all_reduce was begun and has not been ended: no other call may come between */
    cached_call cache[CACHED];
};

/* In shared memory. */
typedef struct {
    Calls calls;
    cg_group group;
    Team *team;
    PyObject *regions; /* segments that this group keeps mapped */
} Group;

/* Initializes the first member; `claims` is made. 0 with an error set. */
int begin_calls(Calls *calls, const cg_carrier *carrier, int n, int me, Pool *pool);
void end_calls(Calls *calls);
PyObject *get_claims(PyObject *self, void *closure);
PyObject *get_number(PyObject *self, void *field);
int set_number(PyObject *self, PyObject *value, void *field);
/* The attributes of their types. */
#define CALLS_GETSET                                                                                                                    \
    {"claims", get_claims, NULL, "a dict: None is in it while a call by the general path is under way", NULL},                           \
    {"sequence", get_number, set_number, "calls begun", "sequence"},                                                                     \
    {"enabled", get_number, set_number, "whether native calls are handled", "enabled"},                                                  \
    {"paused", get_number, set_number, "whether native calls are not handled because earlier calls are pending", "paused"}
/* The group in shared memory; NULL if these calls are carried otherwise. */
Group *in_shared_memory(Calls *calls);

typedef struct {
    PyObject_HEAD
    cg_ring ring;
    Team *team;
    Pool *pool;
    PyObject *parts; /* list of the parts of the record that is being read */
    size_t done;     /* bytes that were read of the last of them */
    int reads;       /* whether this member is a reader */
} Ring;

/* Whether this member writes, or reads, the ring; 0 with an error set. */
int may_use(const Ring *ring, int writing);

extern PyType_Spec group_spec, ring_spec, tensors_spec, fast_spec, messages_spec, net_spec, late_spec, link_group_spec;

module_state *state_of(PyObject *self);
/* One call at a time uses a team, from `claim` to `unclaim`; it may run Python code in between. 0, with Busy set, if another one is under way:
 * of another thread, or of this one where user code within a call (a signal handler, say) makes a further call. */
int claim(Team *team);
void unclaim(Team *team);
/* Between the two: work during which other threads of Python run. Work of up to BRIEF bytes keeps the interpreter except while it waits:
 * it ends sooner than another thread could take the interpreter. */
enum { BRIEF = 8 * 1024 };
int keeps_interpreter(Team *team, size_t bytes);
void begin_work(Team *team, int keep);
void end_work(Team *team);
/* A call that is nothing but work: claim and begin_work (for so many bytes; by `enter` the interpreter is released), end_work and unclaim. */
int enter(Team *team);
int enter_for(Team *team, size_t bytes);
void leave(Team *team);
/* The exception for a result other than CG_OK. */
PyObject *raise_stopped(PyObject *self, int code, int who);
int64_t deadline_after(int64_t timeout_ns);
/* Allocates an object of a heap type; frees one, and its reference to its type. */
PyObject *allocate(PyTypeObject *type);
void free_object(PyObject *self);
Block *take_block(PyObject *self, Pool *pool, size_t bytes);
/* Over memory of a pool, which is given back if that fails. */
Block *block_over(PyObject *self, void *memory, size_t bytes);
/* A further view of a member, for a private ring. */
Team *new_view(module_state *state, Team *of, cg_bell *bell, cg_bell *theirs);
/* `call` of a cg_call: the number of the coordinator's call and an operation. 0 while the group is built: a step of that is no call. */
uint64_t call_word(const Calls *calls, int operation);
/* Publishes the call that this member begins (cg_member). */
void publish_posted(Ring *ring, uint64_t posted);
PyObject *module_any_ring(PyObject *module, PyObject *args);
/* Converts a timeout of Python (seconds, a timedelta, or None for `standard_ns`) to nanoseconds. 1; 0 if it is of another kind or range, -1
 * with an error set. */
int parse_timeout(PyObject *self, PyObject *value, int64_t standard_ns, int64_t *ns);
/* Whether these bytes are memory of this process, as far as the first and the last one tell; 0 with an error set. */
int is_memory(const void *data, size_t bytes);
/* Whether so many bytes at an offset lie in a segment. */
int fits(const Segment *segment, Py_ssize_t offset, size_t bytes);
/* Sizes beyond these are mistakes, and would overflow. */
#define MOST_BYTES ((Py_ssize_t)1 << 46)
enum { MOST_RANKS = 1 << 16 };
/* Whether a group can have n ranks and slots of so many bytes: a line for each rank at the least. */
static inline int is_group(int n, Py_ssize_t slot_bytes) {
    return n >= 1 && n <= MOST_RANKS && slot_bytes >= (Py_ssize_t)CG_LINE * n && slot_bytes <= MOST_BYTES / n;
}
/* Returned by a native call that does not handle its arguments: None, or NULL with the error that is set. */
PyObject *not_handled(void);
/* Equal to commgraph.communicators.tags.tag_of. */
uint32_t make_tag(uint32_t kind, uint64_t number, uint32_t digest);

#endif
