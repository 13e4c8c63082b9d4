/* The short way from a coordinator to its group: plain tensors, checked here and not in Python.
 *
 * Every method answers None, with nothing sent, for whatever is not plain: another kind of tensor or argument, a closed or broken group.
 * The coordinator then takes the long way, which knows every case and every error. Both ways count alike and tag alike, so that ranks may
 * take different ones. */
#include "module.h"

#include "dlpack.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_DIMS = 8, ANY_DTYPE = -1 };
enum { BRIEF = 8 * 1024 }; /* bytes that are copied in less time than it takes to let another thread run */

typedef struct {
    PyObject_HEAD
    Group *group; /* NULL: a group of one rank */
    PyTypeObject *tensor_type;
    const dl_exchange *exchange;
    PyObject *inference_mode; /* tells whether it is on */
    PyObject *modes; /* tells how many modes look at every operator, and so have to see this one */
    PyObject *mark_written; /* called with a tuple of tensors that are going to be filled */
    int open; /* a door that was closed may have no group any more */
} Door;

/* A contiguous host tensor. */
typedef struct {
    char *data;
    int ndim, dtype;
    int64_t shape[MAX_DIMS];
    size_t size, bytes;
    dl_dtype kind;
    int is_bool;
} view;

static int dtype_of(dl_dtype kind) {
    static const signed char ints[4] = {CG_I8, CG_I16, CG_I32, CG_I64}, uints[4] = {CG_U8, CG_U16, CG_U32, CG_U64};
    int log = kind.bits == 8 ? 0 : kind.bits == 16 ? 1 : kind.bits == 32 ? 2 : kind.bits == 64 ? 3 : -1;
    if (log < 0 || kind.lanes != 1) return ANY_DTYPE;
    if (kind.code == DL_INT) return ints[log];
    if (kind.code == DL_UINT) return uints[log];
    if (kind.code == DL_FLOAT) return log == 1 ? CG_F16 : log == 2 ? CG_F32 : log == 3 ? CG_F64 : ANY_DTYPE;
    if (kind.code == DL_BFLOAT) return log == 1 ? CG_BF16 : ANY_DTYPE;
    return ANY_DTYPE;
}

/* A flag of a tensor; -1 with an error set. */
static int flag(PyObject *x, PyObject *name, int call) {
    PyObject *value = call ? PyObject_CallMethodObjArgs(x, name, NULL) : PyObject_GetAttr(x, name);
    if (value == NULL) return -1;
    int set = PyObject_IsTrue(value);
    Py_DECREF(value);
    return set;
}

/* 1 if x is plain, 0 if not, -1 with an error set. `written`: it is going to be filled. */
static int look(Door *door, PyObject *x, view *v, int written) {
    if (Py_TYPE(x) != door->tensor_type || door->exchange == NULL) return 0;
    dl_tensor t;
    if (door->exchange->view_of_object(x, &t) != 0) {
        PyErr_Clear(); /* a sparse one, say */
        return 0;
    }
    if (t.device.type != DL_CPU || t.ndim > MAX_DIMS || t.dtype.bits % 8 || t.dtype.lanes != 1) return 0;
    int64_t count = 1;
    for (int i = t.ndim - 1; i >= 0; i--) {
        v->shape[i] = t.shape[i];
        if (t.strides[i] != count) return 0;
        count *= t.shape[i];
    }
    if (count == 0) return 0;
    /* Complex memory may be lazily conjugated, and that of floats lazily negated (the imaginary part of such a tensor, restrided). */
    if (t.dtype.code > DL_BFLOAT && t.dtype.code != DL_BOOL) return 0;
    module_state *state = state_of((PyObject *)door);
    int set = flag(x, state->requires_grad, 0);
    if (set == 0) set = flag(x, state->is_neg, 1);
    if (set != 0) return set < 0 ? -1 : 0;
    if (written) {
        /* One of inference mode has no version, and may be filled in that mode only. */
        set = flag(x, state->is_inference, 1);
        if (set > 0) {
            PyObject *on = PyObject_CallFunctionObjArgs(door->inference_mode, NULL);
            if (on == NULL) return -1;
            set = PyObject_IsTrue(on) ? 0 : 1;
            Py_DECREF(on);
        } else if (set == 0) {
            /* Tells autograd that values are changed which it may have saved. */
            PyObject *tensors = PyTuple_Pack(1, x), *done = tensors == NULL ? NULL : PyObject_CallFunctionObjArgs(door->mark_written, tensors, NULL);
            Py_XDECREF(tensors);
            if (done == NULL) return -1;
            Py_DECREF(done);
        }
        if (set != 0) return set < 0 ? -1 : 0;
    }
    v->data = (char *)t.data + t.byte_offset;
    v->ndim = t.ndim;
    v->kind = t.dtype;
    v->dtype = dtype_of(t.dtype);
    v->is_bool = t.dtype.code == DL_BOOL;
    v->size = t.dtype.bits / 8;
    v->bytes = (size_t)count * v->size;
    return 1;
}

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
    call->tag = (digest ^ (uint32_t)(group->sequence - 1) * 0x9E3779B1u) & 0xFFFFFFF;
    call->call = call_word(group, operation);
    /* One of a single step waits once, and need not look at the clock before. */
    call->deadline = v->bytes <= BRIEF ? -group->timeout_ns : deadline_after(group->timeout_ns);
    return 1;
}

/* A tensor over memory of the pool. */

typedef struct {
    dl_managed managed;
    int64_t dims[2 * MAX_DIMS];
} owned;

static void give_back(dl_managed *managed) {
    cg_pool_give(managed->context);
    free(managed);
}

static PyObject *new_tensor(Door *door, dl_dtype kind, int ndim, const int64_t *shape, size_t bytes, char **data) {
    owned *o = malloc(sizeof *o);
    void *memory = o == NULL ? NULL : cg_pool_take(door->group->pool->pool, bytes);
    if (memory == NULL) {
        free(o);
        return PyErr_NoMemory();
    }
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        o->dims[i] = shape[i];
        o->dims[MAX_DIMS + i] = stride;
        stride *= shape[i];
    }
    o->managed = (dl_managed){.version = {1, 0}, .context = memory, .deleter = give_back,
                              .tensor = {.data = memory, .device = {DL_CPU, 0}, .ndim = ndim, .dtype = kind,
                                         .shape = o->dims, .strides = o->dims + MAX_DIMS}};
    void *tensor = NULL;
    if (door->exchange->object_from_managed(&o->managed, &tensor) != 0) {
        give_back(&o->managed);
        return NULL;
    }
    *data = memory;
    return tensor;
}

/* The result: the caller's if it fits and lies apart from x, a new one if there is none; NULL, with or without an error. */
static PyObject *result_for(Door *door, PyObject *given, const view *x, const int64_t *shape, char **data) {
    size_t bytes = x->size;
    for (int i = 0; i < x->ndim; i++) bytes *= (size_t)shape[i];
    if (given == Py_None) return new_tensor(door, x->kind, x->ndim, shape, bytes, data);
    view out;
    if (look(door, given, &out, 1) <= 0) return NULL;
    if (out.ndim != x->ndim || memcmp(&out.kind, &x->kind, sizeof out.kind) || memcmp(out.shape, shape, sizeof *shape * (size_t)x->ndim) ||
        (out.data < x->data + x->bytes && x->data < out.data + out.bytes))
        return NULL;
    *data = out.data;
    return Py_NewRef(given);
}

static PyObject *no_answer(void) { return PyErr_Occurred() ? NULL : Py_NewRef(Py_None); }

/* What becomes of a call: its answer, or the exception. */
static PyObject *answer(Door *door, int result, int who, PyObject *value) {
    if (result == CG_OK) return value;
    Py_DECREF(value);
    door->group->enabled = 0;
    return raise_stopped((PyObject *)door, result, who);
}

static int begin(Door *door, size_t bytes) {
    if (bytes <= BRIEF ? enter_briefly(door->group->team) : enter(door->group->team)) return 1;
    door->group->sequence--; /* refused, and so not begun */
    return 0;
}

static int is_open(const Door *door) {
    if (!door->open || (door->group != NULL && (!door->group->enabled || door->group->held))) return 0;
    PyObject *modes = PyObject_CallNoArgs(door->modes);
    int none = modes != NULL && PyLong_AsLong(modes) == 0;
    Py_XDECREF(modes);
    return none;
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
    if (!is_open(door) || look(door, args[0], &v, 1) <= 0 || !reduces(&v, &dtype, &op)) return no_answer();
    if (door->group == NULL) return Py_NewRef(Py_True);
    cg_call call;
    if (!tag_of(door->group, "all_reduce_", OP_ALL_REDUCE_, args[0], &v, given, args[1], &call)) return NULL;
    if (!begin(door, v.bytes)) return NULL;
    int result = cg_all_reduce(&door->group->group, &call, v.data, v.data, v.bytes / v.size, dtype, op, 1, &who);
    leave(door->group->team);
    return answer(door, result, who, Py_NewRef(Py_True));
}

static PyObject *door_all_reduce(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Door *door = (Door *)self;
    if (nargs != 2) return PyErr_Format(PyExc_TypeError, "all_reduce(x, op)");
    view v;
    int dtype, op = parse_op(args[1]), given = op, who = 0;
    if (!is_open(door) || look(door, args[0], &v, 0) <= 0 || !reduces(&v, &dtype, &op)) return no_answer();
    if (door->group == NULL) return Py_NewRef(args[0]);
    char *out;
    PyObject *tensor = new_tensor(door, v.kind, v.ndim, v.shape, v.bytes, &out);
    if (tensor == NULL) return NULL;
    cg_call call;
    if (!tag_of(door->group, "all_reduce", OP_ALL_REDUCE, args[0], &v, given, args[1], &call) || !begin(door, v.bytes)) {
        Py_DECREF(tensor);
        return NULL;
    }
    int result = cg_all_reduce(&door->group->group, &call, v.data, out, v.bytes / v.size, dtype, op, 0, &who);
    leave(door->group->team);
    return answer(door, result, who, tensor);
}

static PyObject *door_all_gather(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Door *door = (Door *)self;
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "all_gather(x, dim, out)");
    view v;
    int dim, who = 0;
    if (!is_open(door) || door->group == NULL || look(door, args[0], &v, 0) <= 0 || (dim = dim_of(args[1], &v)) < 0) return no_answer();
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
    if (!begun || !begin(door, v.bytes)) {
        Py_DECREF(out);
        return NULL;
    }
    int result = cg_share(&door->group->group, &call, v.data, bytes, into, 1, &who);
    leave(door->group->team);
    return answer(door, result, who, out);
}

static PyObject *door_reduce_scatter(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Door *door = (Door *)self;
    if (nargs != 4) return PyErr_Format(PyExc_TypeError, "reduce_scatter(x, dim, op, out)");
    view v;
    int dim, dtype, op = parse_op(args[2]), given = op, who = 0;
    if (!is_open(door) || door->group == NULL || look(door, args[0], &v, 0) <= 0 || (dim = dim_of(args[1], &v)) < 0 || !reduces(&v, &dtype, &op))
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
    if (!begun || !begin(door, v.bytes)) {
        Py_DECREF(out);
        return NULL;
    }
    int result = cg_reduce_scatter(&door->group->group, &call, pieces, data, dtype, op, &who);
    leave(door->group->team);
    return answer(door, result, who, out);
}

static PyObject *door_all_to_all(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Door *door = (Door *)self;
    if (nargs != 4) return PyErr_Format(PyExc_TypeError, "all_to_all(x, scatter_dim, gather_dim, out)");
    view v;
    int dim, who = 0;
    if (!is_open(door) || door->group == NULL || look(door, args[0], &v, 0) <= 0 || (dim = dim_of(args[1], &v)) < 0 ||
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
    if (!begun || !begin(door, v.bytes)) {
        Py_DECREF(out);
        return NULL;
    }
    int result = cg_trade(&door->group->group, &call, sends, receives, &who);
    leave(door->group->team);
    return answer(door, result, who, out);
}

static PyObject *door_broadcast(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Door *door = (Door *)self;
    if (nargs != 2) return PyErr_Format(PyExc_TypeError, "broadcast(x, src)");
    view v;
    int who = 0;
    if (!is_open(door) || door->group == NULL || !PyLong_CheckExact(args[1]) || look(door, args[0], &v, 1) <= 0) return no_answer();
    int n = door->group->group.n, overflow;
    long src = PyLong_AsLongAndOverflow(args[1], &overflow);
    if (overflow || src < 0 || src >= n) return no_answer();
    cg_block into[n];
    size_t bytes[n];
    memset(into, 0, sizeof into);
    memset(bytes, 0, sizeof bytes);
    bytes[src] = v.bytes;
    into[src] = (cg_block){v.data, 1, v.bytes, v.bytes};
    cg_call call;
    if (!tag_of(door->group, "broadcast", OP_BROADCAST, args[0], &v, src, args[1], &call) || !begin(door, v.bytes)) return NULL;
    int result = cg_share(&door->group->group, &call, v.data, bytes, into, 0, &who);
    if (door->group->group.exposed) Py_INCREF(args[0]); /* for ever */
    leave(door->group->team);
    return answer(door, result, who, Py_NewRef(Py_True));
}

static PyObject *door_barrier(PyObject *self, PyObject *unused) {
    (void)unused;
    Door *door = (Door *)self;
    if (!is_open(door)) return Py_NewRef(Py_None);
    if (door->group == NULL) return Py_NewRef(Py_True);
    view nothing = {.ndim = 0, .bytes = 0};
    cg_call call;
    int who = 0;
    if (!tag_of(door->group, "barrier", OP_BARRIER, Py_None, &nothing, 0, Py_None, &call) || !begin(door, 0)) return NULL;
    int result = cg_barrier(&door->group->group, &call, &who);
    leave(door->group->team);
    return answer(door, result, who, Py_NewRef(Py_True));
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
    PyObject *group, *tensor_type, *exchange, *inference_mode, *modes, *mark_written;
    if (!PyArg_ParseTuple(args, "OOOOOO", &group, &tensor_type, &exchange, &inference_mode, &modes, &mark_written)) return NULL;
    module_state *state = PyType_GetModuleState(type);
    if (state == NULL || (group != Py_None && !PyObject_TypeCheck(group, state->group)) || !PyType_Check(tensor_type))
        return PyErr_Format(PyExc_TypeError, "Door(group, tensor_type, exchange, inference_mode, modes, mark_written)");
    const dl_exchange *api = NULL;
    if (exchange != Py_None && (api = PyCapsule_GetPointer(exchange, "dlpack_exchange_api")) == NULL) return NULL;
    if (api != NULL && (api->version.major != 1 || api->view_of_object == NULL)) api = NULL;
    Door *self = (Door *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self == NULL) return NULL;
    self->group = group == Py_None ? NULL : (Group *)Py_NewRef(group);
    self->tensor_type = (PyTypeObject *)Py_NewRef(tensor_type);
    self->exchange = api;
    self->inference_mode = Py_NewRef(inference_mode);
    self->modes = Py_NewRef(modes);
    self->mark_written = Py_NewRef(mark_written);
    self->open = 1;
    return (PyObject *)self;
}

static void door_dealloc(PyObject *self) {
    Door *door = (Door *)self;
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF((PyObject *)door->group);
    Py_XDECREF((PyObject *)door->tensor_type);
    Py_XDECREF(door->inference_mode);
    Py_XDECREF(door->modes);
    Py_XDECREF(door->mark_written);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
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
    {Py_tp_doc, "Door(group, tensor_type, exchange, inference_mode, modes, mark_written)\n--\n\nThe short way of one coordinator; `group` is None for one rank."},
    {Py_tp_new, door_new}, {Py_tp_dealloc, door_dealloc}, {Py_tp_methods, door_methods}, {0}};
PyType_Spec door_spec = {"commgraph.shm._native.Door", sizeof(Door), 0, Py_TPFLAGS_DEFAULT, door_slots};
