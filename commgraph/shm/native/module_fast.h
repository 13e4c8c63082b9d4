/* What the native calls of a coordinator share: module_fast.c has them, module_lists.c those of lists of tensors, and
 * module_objects.c those of objects. */
#ifndef COMMGRAPH_MODULE_FAST_H
#define COMMGRAPH_MODULE_FAST_H

#include "module_tensors.h"
#include "recorder.h"

/* A call, and the caller's tensor that it fills; NULL if there is none. */
typedef struct {
    cg_call call;
    const Tensors *tensors;
    PyObject *filled;
    uint32_t digest;
    int64_t timeout_ns;
    const char *name;
    const view *viewed;
    PyObject *const *args;
    cg_entry *entry; /* in the record of calls; NULL if there is none */
    Recorder *recorder; /* that has yet to find the place of the call; NULL if it has, or there is none */
} native_call;

/* An all_reduce that was begun and has not been ended. */
typedef struct {
    Group *group; /* NULL: there is none */
    PyObject *x, *result;
    const char *from;
    char *to;
    size_t count;
    int dtype, op;
    cg_call call;
    cg_entry *entry;
} half_done;

typedef struct {
    PyObject_HEAD
    Calls *group; /* NULL: a group of one rank */
    Tensors *tensors;
    PyObject *describe; /* (name, arguments) -> int: the digest of the text that the general path has for a call */
    int64_t timeout_ns; /* of calls without a timeout of their own */
    half_done begun;
    int open;           /* 0 after close(), which may have dropped the group */
    GroupRecord *record; /* NULL: calls are not recorded */
    uint16_t strategy_text;
} FastCalls;

int parse_op(PyObject *name);
/* The kernel's kind and op of a reduction; 0 if there is none. On bool, sum is "or" and product is "and". */
int reduces(const view *v, int *dtype, int *op);
/* A dimension, counted from the front; -1 if it is none. */
int dim_of(PyObject *value, const view *v);
/* A rank of the group; -1 if it is none. */
int rank_of(PyObject *value, int n);
/* Whether native calls are handled now. */
int is_usable(const FastCalls *fast, const Calls *group);
/* Whether native calls of an operation are handled now; of one with a root `is_near` says so as well. */
int is_open(const FastCalls *fast, Calls *group, int operation);
int is_near(Calls *group, int operation, int root);
/* Sets the digest of a call's text. `args`: the arguments of the coordinator's method that its text depends on; `extra`: distinguishes, in
 * the cache, calls with equal tensors and different arguments. 0 with an error set. */
int prepare(FastCalls *fast, Calls *group, const char *name, int operation, const view *v, int64_t extra, PyObject *const *args, int n_args,
            native_call *call);
/* Claims the group and begins a call, which is numbered now: one that is refused leaves no trace. `filled` is marked as written while the
 * other ranks arrive, if this thread keeps the interpreter, else now. 0 if it was not begun, with or without an error: Python code that ran
 * since `is_open` may have closed the group, or another thread may be in a call. */
int begin(FastCalls *fast, Calls *group, native_call *call, int operation, int64_t timeout_ns, PyObject *filled, size_t bytes);
/* Makes the deadline absolute for a call that may take several steps. */
void limit(cg_call *call, size_t bytes, int64_t timeout_ns);
void end_call(Calls *group);
/* The return value of a call with x, or NULL with the exception set. */
PyObject *finish_call(const native_call *call, Calls *group, int result, int who, PyObject *x, PyObject *value);

/* The calls of a list or tuple of tensors, with the arguments of those of one. */
static inline int is_list(PyObject *x) { return PyList_CheckExact(x) || PyTuple_CheckExact(x); }
PyObject *all_reduce_list(FastCalls *fast, Calls *group, PyObject *const *args, int in_place);
PyObject *all_gather_list(FastCalls *fast, Calls *group, PyObject *const *args);
PyObject *reduce_scatter_list(FastCalls *fast, Calls *group, PyObject *const *args);
PyObject *broadcast_list(FastCalls *fast, Calls *group, PyObject *const *args);

/* The calls of objects (module_objects.c). */
PyObject *do_all_gather_object(FastCalls *fast, Calls *group, PyObject *const *args, Py_ssize_t nargs);
PyObject *do_broadcast_object(FastCalls *fast, Calls *group, PyObject *const *args, Py_ssize_t nargs);

#endif
