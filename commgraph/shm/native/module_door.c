/* The short way from a coordinator to its group: plain tensors, checked here and not in Python.
 *
 * Every method answers None, with nothing sent, for whatever is not plain: another kind of tensor or argument, a closed or broken group.
 * The coordinator then takes the long way, which knows every case and every error. Both ways count alike and tag alike, so that ranks may
 * take different ones. */
#include "module_tensors.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    PyObject_HEAD
    Group *group; /* NULL: a group of one rank */
    Tensors *tensors;
    PyObject *filled; /* by the call that runs, if that is a tensor of the caller's */
    int open; /* a door that was closed may have no group any more */
} Door;

static int parse_op(PyObject *name) {
    static const char *const names[CG_OPS] = {"sum", "avg", "max", "min", "product"};
    if (!PyUnicode_Check(name)) return -1;
    for (int op = 0; op < CG_OPS; op++)
        if (PyUnicode_CompareWithASCIIString(name, names[op]) == 0) return op;
    return -1;
}

/* The kernel's kind and op of a reduction; 0 if there is none. On bool, sum is "or" and product is "and". */
static int reduces(const view *v, int *dtype, int *op) {
    *dtype = v->dtype;
    if (v->is_bool && *op != CG_AVG) {
        *dtype = CG_U8;
        *op = *op == CG_SUM || *op == CG_MAX ? CG_MAX : CG_MIN;
        return 1;
    }
    return *op >= 0 && *dtype != ANY_DTYPE && cg_find_kernel(*dtype, *op) != NULL;
}

/* The tag of the call that is about to begin: as commgraph.coordinator.link.make_tag. 0 with an error set. */
static int tag_of(Group *group, const char *name, int operation, PyObject *x, const view *v, int64_t extra, PyObject *argument, cg_call *call) {
    int kind = v->kind.code << 8 | v->kind.bits;
    uint64_t hash = ((uint64_t)operation << 32 ^ (uint64_t)kind << 16 ^ (uint64_t)extra) * 0x9E3779B97F4A7C15ull;
    for (int i = 0; i < v->ndim; i++) hash = (hash ^ (uint64_t)v->shape[i]) * 0x9E3779B97F4A7C15ull;
    cached_call *cell = &group->cache[hash >> 58];
    int known = v->ndim <= KEY_DIMS && cell->operation == operation && cell->dtype == kind && cell->ndim == v->ndim && cell->extra == extra &&
                memcmp(cell->shape, v->shape, sizeof(int64_t) * (size_t)v->ndim) == 0;
    uint32_t digest = cell->digest;
    if (!known) {
        PyObject *answer = PyObject_CallFunction(group->describe, "sOO", name, x, argument);
        digest = answer == NULL ? 0 : (uint32_t)PyLong_AsUnsignedLong(answer);
        Py_XDECREF(answer);
        if (PyErr_Occurred()) return 0;
        if (v->ndim <= KEY_DIMS) {
            *cell = (cached_call){operation, kind, v->ndim, extra, {0}, digest};
            memcpy(cell->shape, v->shape, sizeof(int64_t) * (size_t)v->ndim);
        }
    }
    group->sequence++;
    call->tag = tagged(0, group->sequence - 1, digest); /* 0: a collective */
    call->call = call_word(group, operation);
    call->meanwhile = NULL;
    /* One of a single step waits once, and need not look at the clock before. */
    call->deadline = v->bytes <= BRIEF ? -group->timeout_ns : deadline_after(group->timeout_ns);
    return 1;
}

/* The result: the caller's if it fits and lies apart from x, a new one if there is none; NULL, with or without an error. */
static PyObject *result_for(Door *door, PyObject *given, const view *x, const int64_t *shape, char **data) {
    size_t bytes = x->size;
    for (int i = 0; i < x->ndim; i++) bytes *= (size_t)shape[i];
    if (given == Py_None) return new_tensor(door->tensors, door->group->pool, x->kind, x->ndim, shape, bytes, data);
    view out;
    if (look(door->tensors, given, &out) <= 0) return NULL;
    if (out.ndim != x->ndim || memcmp(&out.kind, &x->kind, sizeof out.kind) || memcmp(out.shape, shape, sizeof *shape * (size_t)x->ndim) ||
        (out.data < x->data + x->bytes && x->data < out.data + out.bytes) || may_fill(door->tensors, given) <= 0)
        return NULL;
    *data = out.data;
    return Py_NewRef(given);
}

/* What becomes of a call with x: its answer, or the exception. */
static PyObject *answer(Door *door, int result, int who, PyObject *x, PyObject *value) {
    if (result == CG_OK) return value;
    /* Where others may still be at x and the result, both stay for ever. */
    if (door->group->group.exposed) Py_INCREF(x);
    else Py_DECREF(value);
    door->group->enabled = 0;
    return raise_stopped((PyObject *)door, result, who);
}

static void mark_filled(void *of) {
    Door *door = of;
    if (!mark(door->tensors, door->filled)) PyErr_WriteUnraisable(door->filled);
}

/* Enters the group. What is filled is marked while the others come, if this thread keeps the interpreter. */
static int begin(Door *door, cg_call *call, PyObject *filled, size_t bytes) {
    Team *team = door->group->team;
    int keep = keeps_interpreter(team, bytes);
    if ((filled == NULL || keep || mark(door->tensors, filled)) && enter_keeping(team, keep)) {
        door->filled = filled;
        if (filled != NULL && keep) call->meanwhile = mark_filled, call->of = door;
        return 1;
    }
    door->group->sequence--; /* refused, and so not begun */
    return 0;
}

static int is_open(const Door *door) {
    if (!door->open || (door->group != NULL && (!door->group->enabled || door->group->held))) return 0;
    return is_unwatched(door->tensors) > 0;
}

/* A dimension, counted from the front; -1 if it is none. */
static int dim_of(PyObject *value, const view *v) {
    if (!PyLong_CheckExact(value)) return -1;
    int overflow;
    long dim = PyLong_AsLongAndOverflow(value, &overflow);
    if (overflow || dim < -v->ndim || dim >= v->ndim) return -1;
    return (int)(dim < 0 ? dim + v->ndim : dim);
}

/* `n` pieces of dimension `dim`, which has `extent` entries in all of them together: as blocks of a tensor that begins at `data`. */
static void cut(cg_block *blocks, int n, char *data, const view *v, int dim, int64_t extent) {
    size_t rows = 1, inner = v->size;
    for (int i = 0; i < dim; i++) rows *= (size_t)v->shape[i];
    for (int i = dim + 1; i < v->ndim; i++) inner *= (size_t)v->shape[i];
    size_t row = (size_t)(extent / n) * inner;
    for (int p = 0; p < n; p++) blocks[p] = (cg_block){data + (size_t)p * row, rows, row, row * (size_t)n};
}

static PyObject *door_all_reduce_(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Door *door = (Door *)self;
    if (nargs != 2) return PyErr_Format(PyExc_TypeError, "all_reduce_(x, op)");
    view v;
    int dtype, op = parse_op(args[1]), given = op, who = 0;
    if (!is_open(door) || look(door->tensors, args[0], &v) <= 0 || !reduces(&v, &dtype, &op) || may_fill(door->tensors, args[0]) <= 0) return no_answer();
    if (door->group == NULL) return Py_NewRef(Py_True);
    cg_call call;
    if (!tag_of(door->group, "all_reduce_", OP_ALL_REDUCE_, args[0], &v, given, args[1], &call)) return NULL;
    if (!begin(door, &call, args[0], v.bytes)) return NULL;
    int result = cg_all_reduce(&door->group->group, &call, v.data, v.data, v.bytes / v.size, dtype, op, 1, &who);
    leave(door->group->team);
    return answer(door, result, who, args[0], Py_NewRef(Py_True));
}

static PyObject *door_all_reduce(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Door *door = (Door *)self;
    if (nargs != 2) return PyErr_Format(PyExc_TypeError, "all_reduce(x, op)");
    view v;
    int dtype, op = parse_op(args[1]), given = op, who = 0;
    if (!is_open(door) || look(door->tensors, args[0], &v) <= 0 || !reduces(&v, &dtype, &op)) return no_answer();
    if (door->group == NULL) return Py_NewRef(args[0]);
    char *out;
    PyObject *tensor = new_tensor(door->tensors, door->group->pool, v.kind, v.ndim, v.shape, v.bytes, &out);
    if (tensor == NULL) return NULL;
    cg_call call;
    if (!tag_of(door->group, "all_reduce", OP_ALL_REDUCE, args[0], &v, given, args[1], &call) || !begin(door, &call, NULL, v.bytes)) {
        Py_DECREF(tensor);
        return NULL;
    }
    int result = cg_all_reduce(&door->group->group, &call, v.data, out, v.bytes / v.size, dtype, op, 0, &who);
    leave(door->group->team);
    return answer(door, result, who, args[0], tensor);
}

static PyObject *door_all_gather(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Door *door = (Door *)self;
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "all_gather(x, dim, out)");
    view v;
    int dim, who = 0;
    if (!is_open(door) || door->group == NULL || look(door->tensors, args[0], &v) <= 0 || (dim = dim_of(args[1], &v)) < 0) return no_answer();
    int n = door->group->group.n;
    int64_t shape[MAX_DIMS];
    memcpy(shape, v.shape, sizeof shape);
    shape[dim] *= n;
    char *data;
    PyObject *out = result_for(door, args[2], &v, shape, &data);
    if (out == NULL) return no_answer();
    cg_block into[n];
    size_t bytes[n];
    cut(into, n, data, &v, dim, shape[dim]);
    for (int p = 0; p < n; p++) bytes[p] = v.bytes;
    cg_call call;
    PyObject *number = PyLong_FromLong(dim);
    int begun = number != NULL && tag_of(door->group, "all_gather", OP_ALL_GATHER, args[0], &v, dim, number, &call);
    Py_XDECREF(number);
    if (!begun || !begin(door, &call, args[2] == Py_None ? NULL : out, v.bytes)) {
        Py_DECREF(out);
        return NULL;
    }
    int result = cg_share(&door->group->group, &call, v.data, bytes, into, 1, &who);
    leave(door->group->team);
    return answer(door, result, who, args[0], out);
}

static PyObject *door_reduce_scatter(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Door *door = (Door *)self;
    if (nargs != 4) return PyErr_Format(PyExc_TypeError, "reduce_scatter(x, dim, op, out)");
    view v;
    int dim, dtype, op = parse_op(args[2]), given = op, who = 0;
    if (!is_open(door) || door->group == NULL || look(door->tensors, args[0], &v) <= 0 || (dim = dim_of(args[1], &v)) < 0 || !reduces(&v, &dtype, &op))
        return no_answer();
    int n = door->group->group.n;
    if (v.shape[dim] % n) return no_answer();
    int64_t shape[MAX_DIMS];
    memcpy(shape, v.shape, sizeof shape);
    shape[dim] /= n;
    char *data;
    PyObject *out = result_for(door, args[3], &v, shape, &data);
    if (out == NULL) return no_answer();
    cg_block pieces[n];
    cut(pieces, n, v.data, &v, dim, v.shape[dim]);
    cg_call call;
    PyObject *argument = Py_BuildValue("(iO)", dim, args[2]);
    int begun = argument != NULL && tag_of(door->group, "reduce_scatter", OP_REDUCE_SCATTER, args[0], &v, dim * CG_OPS + given, argument, &call);
    Py_XDECREF(argument);
    if (!begun || !begin(door, &call, args[3] == Py_None ? NULL : out, v.bytes)) {
        Py_DECREF(out);
        return NULL;
    }
    int result = cg_reduce_scatter(&door->group->group, &call, pieces, data, dtype, op, &who);
    leave(door->group->team);
    return answer(door, result, who, args[0], out);
}

static PyObject *door_all_to_all(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Door *door = (Door *)self;
    if (nargs != 4) return PyErr_Format(PyExc_TypeError, "all_to_all(x, scatter_dim, gather_dim, out)");
    view v;
    int dim, who = 0;
    if (!is_open(door) || door->group == NULL || look(door->tensors, args[0], &v) <= 0 || (dim = dim_of(args[1], &v)) < 0 ||
        dim_of(args[2], &v) != dim)
        return no_answer();
    int n = door->group->group.n;
    if (v.shape[dim] % n) return no_answer();
    char *data;
    PyObject *out = result_for(door, args[3], &v, v.shape, &data);
    if (out == NULL) return no_answer();
    cg_block sends[n], receives[n];
    cut(sends, n, v.data, &v, dim, v.shape[dim]);
    cut(receives, n, data, &v, dim, v.shape[dim]);
    cg_call call;
    PyObject *number = PyLong_FromLong(dim);
    int begun = number != NULL && tag_of(door->group, "all_to_all", OP_ALL_TO_ALL, args[0], &v, dim, number, &call);
    Py_XDECREF(number);
    if (!begun || !begin(door, &call, args[3] == Py_None ? NULL : out, v.bytes)) {
        Py_DECREF(out);
        return NULL;
    }
    int result = cg_trade(&door->group->group, &call, sends, receives, &who);
    leave(door->group->team);
    return answer(door, result, who, args[0], out);
}

static PyObject *door_broadcast(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Door *door = (Door *)self;
    if (nargs != 2) return PyErr_Format(PyExc_TypeError, "broadcast(x, src)");
    view v;
    int who = 0;
    if (!is_open(door) || door->group == NULL || !PyLong_CheckExact(args[1]) || look(door->tensors, args[0], &v) <= 0) return no_answer();
    int n = door->group->group.n, overflow;
    long src = PyLong_AsLongAndOverflow(args[1], &overflow);
    if (overflow || src < 0 || src >= n || may_fill(door->tensors, args[0]) <= 0) return no_answer();
    cg_block into[n];
    size_t bytes[n];
    memset(into, 0, sizeof into);
    memset(bytes, 0, sizeof bytes);
    bytes[src] = v.bytes;
    into[src] = (cg_block){v.data, 1, v.bytes, v.bytes};
    cg_call call;
    if (!tag_of(door->group, "broadcast", OP_BROADCAST, args[0], &v, src, args[1], &call) || !begin(door, &call, args[0], v.bytes)) return NULL;
    int result = cg_share(&door->group->group, &call, v.data, bytes, into, 0, &who);
    leave(door->group->team);
    return answer(door, result, who, args[0], Py_NewRef(Py_True));
}

static PyObject *door_barrier(PyObject *self, PyObject *unused) {
    (void)unused;
    Door *door = (Door *)self;
    if (!is_open(door)) return Py_NewRef(Py_None);
    if (door->group == NULL) return Py_NewRef(Py_True);
    view nothing = {.ndim = 0, .bytes = 0};
    cg_call call;
    int who = 0;
    if (!tag_of(door->group, "barrier", OP_BARRIER, Py_None, &nothing, 0, Py_None, &call) || !begin(door, &call, NULL, 0)) return NULL;
    int result = cg_barrier(&door->group->group, &call, &who);
    leave(door->group->team);
    return answer(door, result, who, Py_None, Py_NewRef(Py_True));
}

static PyObject *door_close(PyObject *self, PyObject *unused) {
    (void)unused;
    Door *door = (Door *)self;
    door->open = 0;
    /* Its memory goes with the last reference, unless another thread is in a call on it: then this one goes with the door. */
    if (door->group != NULL && !door->group->team->busy) Py_CLEAR(door->group);
    Py_RETURN_NONE;
}

static PyObject *door_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    PyObject *group, *tensors;
    if (!PyArg_ParseTuple(args, "OO", &group, &tensors)) return NULL;
    module_state *state = PyType_GetModuleState(type);
    if (state == NULL || (group != Py_None && !PyObject_TypeCheck(group, state->group)) || !PyObject_TypeCheck(tensors, state->tensors))
        return PyErr_Format(PyExc_TypeError, "Door(group, tensors)");
    Door *self = (Door *)allocate(type);
    if (self == NULL) return NULL;
    self->group = group == Py_None ? NULL : (Group *)Py_NewRef(group);
    self->tensors = (Tensors *)Py_NewRef(tensors);
    self->open = 1;
    return (PyObject *)self;
}

static void door_dealloc(PyObject *self) {
    Py_XDECREF((PyObject *)((Door *)self)->group);
    Py_XDECREF((PyObject *)((Door *)self)->tensors);
    free_object(self);
}

#define FAST(name, doc) {#name, (PyCFunction)(void (*)(void))door_##name, METH_FASTCALL, doc}
static PyMethodDef door_methods[] = {
    FAST(all_reduce, "all_reduce(x, op)\n--\n\nA new tensor, or None."),
    FAST(all_reduce_, "all_reduce_(x, op)\n--\n\nTrue, or None."),
    FAST(all_gather, "all_gather(x, dim, out)\n--\n\nThe result, or None."),
    FAST(reduce_scatter, "reduce_scatter(x, dim, op, out)\n--\n\nThe result, or None."),
    FAST(all_to_all, "all_to_all(x, scatter_dim, gather_dim, out)\n--\n\nThe result, or None."),
    FAST(broadcast, "broadcast(x, src)\n--\n\nTrue, or None."),
    {"barrier", door_barrier, METH_NOARGS, "barrier()\n--\n\nTrue, or None."},
    {"close", door_close, METH_NOARGS, "close()\n--\n\nFrom now on every answer is None."},
    {0}};
static PyType_Slot door_slots[] = {
    {Py_tp_doc, "Door(group, tensors)\n--\n\nThe short way of one coordinator; `group` is None for one rank."},
    {Py_tp_new, door_new}, {Py_tp_dealloc, door_dealloc}, {Py_tp_methods, door_methods}, {0}};
PyType_Spec door_spec = {"commgraph.shm._native.Door", sizeof(Door), 0, Py_TPFLAGS_DEFAULT, door_slots};
