/* The fast path of a coordinator's collectives: plain tensors, checked in C.
 *
 * Every method returns None, with nothing sent, if an argument is not plain (another kind of tensor or argument), or the group is closed or
 * broken. The coordinator then takes the general path, which handles every case and raises every error. Both paths number and tag calls
 * alike, so that ranks may take different ones. The last argument of each is the timeout of the coordinator's method: seconds, a timedelta,
 * or None. */
#include "module_fast.h"

#include <stdlib.h>
#include <string.h>

int parse_op(PyObject *name) {
    static const char *const names[CG_OPS] = {"sum", "avg", "max", "min", "product"};
    if (!PyUnicode_Check(name)) return -1;
    for (int op = 0; op < CG_OPS; op++)
        if (PyUnicode_CompareWithASCIIString(name, names[op]) == 0) return op;
    return -1;
}

int reduces(const view *v, int *dtype, int *op) {
    *dtype = v->dtype;
    if (*op < 0) return 0;
    if (v->is_bool && *op != CG_AVG) {
        *dtype = CG_U8;
        *op = *op == CG_SUM || *op == CG_MAX ? CG_MAX : CG_MIN;
        return 1;
    }
    return *dtype != ANY_DTYPE && cg_find_kernel(*dtype, *op) != NULL;
}

int prepare(FastCalls *fast, Calls *group, const char *name, int operation, const view *v, int64_t extra, PyObject *const *args, int n_args,
            native_call *call) {
    call->name = name;
    call->viewed = v;
    call->args = args;
    int kind = v->kind.code << 8 | v->kind.bits;
    uint64_t hash = ((uint64_t)operation << 32 ^ (uint64_t)kind << 16 ^ (uint64_t)extra) * 0x9E3779B97F4A7C15ull;
    for (int i = 0; i < v->ndim; i++) hash = (hash ^ (uint64_t)v->shape[i]) * 0x9E3779B97F4A7C15ull;
    cached_call *cell = &group->cache[hash >> 58];
    if (v->ndim <= KEY_DIMS && cell->operation == operation && cell->dtype == kind && cell->ndim == v->ndim && cell->extra == extra &&
        memcmp(cell->shape, v->shape, sizeof(int64_t) * (size_t)v->ndim) == 0) {
        call->digest = cell->digest;
        return 1;
    }
    PyObject *arguments = PyTuple_New(n_args);
    for (int i = 0; arguments != NULL && i < n_args; i++) PyTuple_SetItem(arguments, i, Py_NewRef(args[i]));
    PyObject *answer = arguments == NULL ? NULL : PyObject_CallFunction(fast->describe, "sN", name, arguments);
    call->digest = answer == NULL ? 0 : (uint32_t)PyLong_AsUnsignedLong(answer);
    Py_XDECREF(answer);
    if (PyErr_Occurred()) return 0;
    if (v->ndim <= KEY_DIMS) {
        *cell = (cached_call){operation, kind, v->ndim, extra, {0}, call->digest};
        memcpy(cell->shape, v->shape, sizeof(int64_t) * (size_t)v->ndim);
    }
    return 1;
}

/* The result tensor: `given` if it fits and does not overlap x, a new one if `given` is None; NULL, with or without an error. */
static PyObject *result_for(FastCalls *fast, Calls *group, PyObject *given, const view *x, const int64_t *shape, char **data) {
    size_t bytes = x->size;
    for (int i = 0; i < x->ndim; i++)
        if (__builtin_mul_overflow(bytes, (size_t)shape[i], &bytes)) return NULL; /* the general path says what is wrong with the sizes */
    if (given == Py_None) return new_tensor(fast->tensors, group->pool, x->kind, x->ndim, shape, bytes, data);
    view out;
    if (view_tensor(fast->tensors, given, &out) <= 0) return NULL;
    if (out.ndim != x->ndim || memcmp(&out.kind, &x->kind, sizeof out.kind) || memcmp(out.shape, shape, sizeof *shape * (size_t)x->ndim) ||
        (out.data < x->data + x->bytes && x->data < out.data + out.bytes) || may_fill(fast->tensors, given) <= 0)
        return NULL;
    *data = out.data;
    return Py_NewRef(given);
}

PyObject *finish_call(const native_call *call, Calls *group, int result, int who, PyObject *x, PyObject *value) {
    if (call->recorder != NULL) record_site(call->recorder, call->entry);
    record_end(call->entry, result == CG_OK ? ENTRY_DONE : ENTRY_FAILED);
    if (result == CG_OK) return value;
    /* If other ranks may still access x and the result, both stay for ever. */
    if (group->carrier->exposes(group)) Py_INCREF(x);
    else Py_DECREF(value);
    group->enabled = 0;
    return raise_stopped((PyObject *)group, result, who);
}

/* What can wait until this rank has arrived, while the others do. Every step of a call comes here. */
static void finish_beginning(void *of) {
    native_call *call = of;
    if (call->filled != NULL && !mark_as_written(call->tensors, call->filled)) PyErr_WriteUnraisable(call->filled);
    if (call->recorder == NULL) return;
    record_site(call->recorder, call->entry);
    call->recorder = NULL;
}

/* Begins the entry of a call in the record. The second argument of the operations with a root is that rank; `op` is a name. */
static cg_entry *record(FastCalls *fast, const Calls *group, const native_call *call) {
    static const struct {
        const char *name;
        int root, op;
    } forms[] = {{"all_reduce", 0, 1}, {"all_reduce_", 0, 1}, {"reduce_scatter", 0, 2}, {"reduce_scatterv", 0, 3}, {"reduce", 1, 2},
                 {"broadcast", 1, 0}, {"gather", 1, 0}, {"scatter", 1, 0}};
    static const char *const ops[CG_OPS] = {"sum", "avg", "max", "min", "product"};
    int root = -1, op = -1;
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++)
        if (strcmp(forms[i].name, call->name) == 0) {
            if (forms[i].root) root = (int)PyLong_AsLong(call->args[1]);
            if (forms[i].op) op = parse_op(call->args[forms[i].op]);
            break;
        }
    return record_begin(fast->record, call->name, fast->strategy_text, group->sequence, call->viewed, root, op < 0 ? NULL : ops[op]);
}

int is_usable(const FastCalls *fast, const Calls *group) {
    return fast->open && (group == NULL || (group->enabled && !group->paused));
}

int is_open(const FastCalls *fast, Calls *group, int operation) {
    if (!is_usable(fast, group)) return 0;
    if (group != NULL) {
        const cg_carrier *carrier = group->carrier;
        int rooted = operation == OP_BROADCAST || operation == OP_GATHER || operation == OP_REDUCE;
        if (!(carrier->serves & 1u << operation) || (!rooted && !carrier->is_ready(group, operation, -1))) return 0;
    }
    return is_unwatched(fast->tensors) > 0;
}

int is_near(Calls *group, int operation, int root) { return root >= 0 && group->carrier->is_ready(group, operation, root); }

/* Whether a call by the general path is under way. One of several parts holds the number of its thread, whose further calls are the parts. */
static int is_claimed(const Calls *group) {
    if (PyDict_Size(group->claims) == 0) return 0;
    PyObject *held = PyDict_GetItemWithError(group->claims, Py_None); /* borrowed */
    return held != NULL && !(PyLong_CheckExact(held) && PyLong_AsUnsignedLong(held) == PyThread_get_thread_ident());
}

int begin(FastCalls *fast, Calls *group, native_call *call, int operation, int64_t timeout_ns, PyObject *filled, size_t bytes) {
    const cg_carrier *carrier = group->carrier;
    int keep = carrier->keeps(group, bytes);
    cg_entry *entry = fast->record == NULL ? NULL : record(fast, group, call); /* first: it may make objects, and Python collect garbage */
    if (entry != NULL && !keep) record_site(fast->record->recorder, entry);
    if (!is_usable(fast, group)) return record_cancel(entry), 0;
    if ((operation == OP_ALL_REDUCE || operation == OP_ALL_REDUCE_) && !carrier->is_ready_to_reduce(group, bytes)) return record_cancel(entry), 0;
    if (group->begun || is_claimed(group)) {
        record_cancel(entry);
        PyErr_SetString(state_of((PyObject *)fast)->busy, "another call of this very group is under way: one thread at a time may use it");
        return 0;
    }
    if (!carrier->claim(group)) return record_cancel(entry), 0;
    if (filled != NULL && !keep && !mark_as_written(fast->tensors, filled)) {
        record_cancel(entry);
        carrier->unclaim(group);
        return 0;
    }
    *call = (native_call){.tensors = fast->tensors, .filled = filled, .digest = call->digest, .timeout_ns = timeout_ns, .entry = entry,
                          .recorder = entry != NULL && keep ? fast->record->recorder : NULL};
    call->call.tag = make_tag(0, group->sequence++, call->digest); /* 0: a collective */
    call->call.call = call_word(group, operation);
    if (keep && (filled != NULL || entry != NULL)) call->call.meanwhile = finish_beginning, call->call.of = call;
    /* A call of a single step waits once: a relative deadline saves reading the clock. */
    call->call.deadline = bytes <= BRIEF ? -timeout_ns : deadline_after(timeout_ns);
    carrier->begin_work(group, keep);
    return 1;
}

void end_call(Calls *group) {
    group->carrier->end_work(group);
    group->carrier->unclaim(group);
}

int dim_of(PyObject *value, const view *v) {
    if (!PyLong_CheckExact(value)) return -1;
    int overflow;
    long dim = PyLong_AsLongAndOverflow(value, &overflow);
    if (overflow || dim < -v->ndim || dim >= v->ndim) return -1;
    return (int)(dim < 0 ? dim + v->ndim : dim);
}

/* Splits dimension `dim`, of size `extent`, into n equal pieces: blocks of a dense tensor that begins at `data`. */
static void cut(cg_block *blocks, int n, char *data, const view *v, int dim, int64_t extent) {
    size_t rows = 1, inner = v->size;
    for (int i = 0; i < dim; i++) rows *= (size_t)v->shape[i];
    for (int i = dim + 1; i < v->ndim; i++) inner *= (size_t)v->shape[i];
    size_t row = (size_t)(extent / n) * inner;
    for (int p = 0; p < n; p++) blocks[p] = (cg_block){data + (size_t)p * row, rows, row, row * (size_t)n};
}

static PyObject *do_all_reduce_(FastCalls *fast, Calls *group, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "all_reduce_(x, op, timeout)");
    if (is_list(args[0])) return all_reduce_list(fast, group, args, 1);
    view v;
    int64_t timeout;
    int dtype, op = parse_op(args[1]), given = op, who = 0;
    if (!is_open(fast, group, OP_ALL_REDUCE_) || view_tensor(fast->tensors, args[0], &v) <= 0 || !reduces(&v, &dtype, &op) || may_fill(fast->tensors, args[0]) <= 0 ||
        parse_timeout((PyObject *)fast, args[2], fast->timeout_ns, &timeout) <= 0)
        return not_handled();
    if (group == NULL) return Py_NewRef(Py_True);
    native_call call;
    if (!prepare(fast, group, "all_reduce_", OP_ALL_REDUCE_, &v, given, args, 2, &call) || !begin(fast, group, &call, OP_ALL_REDUCE_, timeout, args[0], v.bytes))
        return not_handled();
    int result = group->carrier->all_reduce(group, &call.call, v.data, v.data, v.bytes / v.size, dtype, op, 1, &who);
    end_call(group);
    return finish_call(&call, group, result, who, args[0], Py_NewRef(Py_True));
}

static PyObject *do_all_reduce(FastCalls *fast, Calls *group, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "all_reduce(x, op, timeout)");
    if (is_list(args[0])) return all_reduce_list(fast, group, args, 0);
    view v;
    int64_t timeout;
    int dtype, op = parse_op(args[1]), given = op, who = 0;
    if (!is_open(fast, group, OP_ALL_REDUCE) || view_tensor(fast->tensors, args[0], &v) <= 0 || !reduces(&v, &dtype, &op) || parse_timeout((PyObject *)fast, args[2], fast->timeout_ns, &timeout) <= 0)
        return not_handled();
    if (group == NULL) return Py_NewRef(args[0]);
    char *out;
    PyObject *tensor = new_tensor(fast->tensors, group->pool, v.kind, v.ndim, v.shape, v.bytes, &out);
    if (tensor == NULL) return NULL;
    native_call call;
    if (!prepare(fast, group, "all_reduce", OP_ALL_REDUCE, &v, given, args, 2, &call) || !begin(fast, group, &call, OP_ALL_REDUCE, timeout, NULL, v.bytes)) {
        Py_DECREF(tensor);
        return not_handled();
    }
    int result = group->carrier->all_reduce(group, &call.call, v.data, out, v.bytes / v.size, dtype, op, 0, &who);
    end_call(group);
    return finish_call(&call, group, result, who, args[0], tensor);
}

/* Begins an all_reduce. Native calls of the group are refused until `end_all_reduce`; the caller of this module orders all others after it. */
static PyObject *do_begin_all_reduce(FastCalls *fast, Calls *group, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "begin_all_reduce(x, op, timeout)");
    view v;
    int64_t timeout;
    int dtype, op = parse_op(args[1]), given = op;
    Group *shared = group == NULL ? NULL : in_shared_memory(group);
    if (!is_open(fast, group, OP_ALL_REDUCE_BEGUN) || shared == NULL || fast->begun.group != NULL || view_tensor(fast->tensors, args[0], &v) <= 0 || !reduces(&v, &dtype, &op) ||
        !cg_can_halve_all_reduce(&shared->group, v.bytes / v.size, dtype) || parse_timeout((PyObject *)fast, args[2], fast->timeout_ns, &timeout) <= 0)
        return not_handled();
    half_done half = {.from = v.data, .count = v.bytes / v.size, .dtype = dtype, .op = op};
    half.result = new_tensor(fast->tensors, group->pool, v.kind, v.ndim, v.shape, v.bytes, &half.to);
    if (half.result == NULL) return NULL;
    native_call call;
    if (!prepare(fast, group, "all_reduce", OP_ALL_REDUCE, &v, given, args, 2, &call) || !begin(fast, group, &call, OP_ALL_REDUCE, timeout, NULL, v.bytes)) {
        Py_DECREF(half.result);
        return not_handled();
    }
    half.call = call.call;
    half.entry = call.entry;
    half.call.deadline = deadline_after(timeout);
    cg_all_reduce_begin(&shared->group, &half.call, half.from, half.count, dtype);
    half.call.meanwhile = NULL; /* `call` ends here */
    end_work(shared->team);
    half.group = (Group *)Py_NewRef((PyObject *)group);
    half.x = Py_NewRef(args[0]);
    group->paused = group->begun = 1;
    fast->begun = half;
    unclaim(shared->team);
    Py_RETURN_TRUE;
}

static PyObject *fast_has_arrived(PyObject *self, PyObject *unused) {
    (void)unused;
    FastCalls *fast = (FastCalls *)self;
    Group *group = fast->begun.group;
    return PyBool_FromLong(group == NULL || !group->calls.enabled || cg_all_reduce_has_arrived(&group->group));
}

static PyObject *fast_end_all_reduce(PyObject *self, PyObject *unused) {
    (void)unused;
    FastCalls *fast = (FastCalls *)self;
    half_done half = fast->begun;
    Group *group = half.group;
    int result = CG_SELF, who = 0;
    if (group == NULL) return PyErr_Format(PyExc_RuntimeError, "no all_reduce was begun");
    fast->begun = (half_done){0};
    if (group->calls.enabled && enter_for(group->team, half.count * cg_dtype_bytes(half.dtype))) {
        result = cg_all_reduce_end(&group->group, &half.call, half.from, half.to, half.count, half.dtype, half.op, &who);
        leave(group->team);
    }
    group->calls.begun = 0;
    record_end(half.entry, result == CG_OK ? ENTRY_DONE : ENTRY_FAILED);
    if (result != CG_OK) {
        group->calls.enabled = 0;
        if (!PyErr_Occurred()) raise_stopped(self, result, who);
    }
    Py_DECREF(half.x);
    Py_DECREF((PyObject *)group);
    if (!PyErr_Occurred()) return half.result;
    Py_DECREF(half.result);
    return NULL;
}

static PyObject *do_all_gather(FastCalls *fast, Calls *group, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 4) return PyErr_Format(PyExc_TypeError, "all_gather(x, dim, out, timeout)");
    if (is_list(args[0])) return all_gather_list(fast, group, args);
    view v;
    int64_t timeout;
    int dim, who = 0;
    if (!is_open(fast, group, OP_ALL_GATHER) || group == NULL || view_tensor(fast->tensors, args[0], &v) <= 0 || (dim = dim_of(args[1], &v)) < 0 ||
        parse_timeout((PyObject *)fast, args[3], fast->timeout_ns, &timeout) <= 0)
        return not_handled();
    int n = group->n;
    int64_t shape[MAX_DIMS];
    memcpy(shape, v.shape, sizeof shape);
    shape[dim] *= n;
    char *data;
    PyObject *out = result_for(fast, group, args[2], &v, shape, &data);
    if (out == NULL) return not_handled();
    cg_block into[n];
    size_t bytes[n];
    cut(into, n, data, &v, dim, shape[dim]);
    for (int p = 0; p < n; p++) bytes[p] = v.bytes;
    native_call call;
    if (!prepare(fast, group, "all_gather", OP_ALL_GATHER, &v, dim, args, 2, &call) || !begin(fast, group, &call, OP_ALL_GATHER, timeout, args[2] == Py_None ? NULL : out, v.bytes)) {
        Py_DECREF(out);
        return not_handled();
    }
    int result = group->carrier->gatherv(group, &call.call, v.data, bytes, into, -1, &who);
    end_call(group);
    return finish_call(&call, group, result, who, args[0], out);
}

static PyObject *do_reduce_scatter(FastCalls *fast, Calls *group, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 5) return PyErr_Format(PyExc_TypeError, "reduce_scatter(x, dim, op, out, timeout)");
    if (is_list(args[0])) return reduce_scatter_list(fast, group, args);
    view v;
    int64_t timeout;
    int dim, dtype, op = parse_op(args[2]), given = op, who = 0;
    if (!is_open(fast, group, OP_REDUCE_SCATTER) || group == NULL || view_tensor(fast->tensors, args[0], &v) <= 0 || (dim = dim_of(args[1], &v)) < 0 || !reduces(&v, &dtype, &op) ||
        parse_timeout((PyObject *)fast, args[4], fast->timeout_ns, &timeout) <= 0)
        return not_handled();
    int n = group->n;
    if (v.shape[dim] % n) return not_handled();
    int64_t shape[MAX_DIMS];
    memcpy(shape, v.shape, sizeof shape);
    shape[dim] /= n;
    char *data;
    PyObject *out = result_for(fast, group, args[3], &v, shape, &data);
    if (out == NULL) return not_handled();
    cg_block pieces[n];
    cut(pieces, n, v.data, &v, dim, v.shape[dim]);
    native_call call;
    if (!prepare(fast, group, "reduce_scatter", OP_REDUCE_SCATTER, &v, dim * CG_OPS + given, args, 3, &call) || !begin(fast, group, &call, OP_REDUCE_SCATTER, timeout, args[3] == Py_None ? NULL : out, v.bytes)) {
        Py_DECREF(out);
        return not_handled();
    }
    int result = group->carrier->reduce_scatter(group, &call.call, pieces, data, dtype, op, &who);
    end_call(group);
    return finish_call(&call, group, result, who, args[0], out);
}

static PyObject *all_to_all_by_sizes(FastCalls *fast, Calls *group, PyObject *const *args, const view *v, int dim, int64_t timeout);

static PyObject *do_all_to_all(FastCalls *fast, Calls *group, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 7) return PyErr_Format(PyExc_TypeError, "all_to_all(x, scatter_dim, gather_dim, input_sizes, output_sizes, out, timeout)");
    view v;
    int64_t timeout;
    int dim, who = 0;
    if (!is_open(fast, group, OP_ALL_TO_ALL) || group == NULL || view_tensor(fast->tensors, args[0], &v) <= 0 || (dim = dim_of(args[1], &v)) < 0 ||
        dim_of(args[2], &v) != dim || parse_timeout((PyObject *)fast, args[6], fast->timeout_ns, &timeout) <= 0)
        return not_handled();
    if (args[3] != Py_None || args[4] != Py_None) return all_to_all_by_sizes(fast, group, args, &v, dim, timeout);
    int n = group->n;
    if (v.shape[dim] % n) return not_handled();
    char *data;
    PyObject *out = result_for(fast, group, args[5], &v, v.shape, &data);
    if (out == NULL) return not_handled();
    cg_block sends[n], receives[n];
    cut(sends, n, v.data, &v, dim, v.shape[dim]);
    cut(receives, n, data, &v, dim, v.shape[dim]);
    native_call call;
    if (!prepare(fast, group, "all_to_all", OP_ALL_TO_ALL, &v, dim, args, 3, &call) ||
        !begin(fast, group, &call, OP_ALL_TO_ALL, timeout, args[5] == Py_None ? NULL : out, v.bytes)) {
        Py_DECREF(out);
        return not_handled();
    }
    int result = group->carrier->all_to_allv(group, &call.call, sends, receives, &who);
    end_call(group);
    return finish_call(&call, group, result, who, args[0], out);
}

static PyObject *do_broadcast(FastCalls *fast, Calls *group, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "broadcast(x, src, timeout)");
    if (is_list(args[0])) return broadcast_list(fast, group, args);
    view v;
    int64_t timeout;
    int who = 0;
    if (!is_open(fast, group, OP_BROADCAST) || group == NULL || !PyLong_CheckExact(args[1]) || view_tensor(fast->tensors, args[0], &v) <= 0 ||
        parse_timeout((PyObject *)fast, args[2], fast->timeout_ns, &timeout) <= 0)
        return not_handled();
    int n = group->n, overflow;
    long src = PyLong_AsLongAndOverflow(args[1], &overflow);
    if (overflow || src >= n || !is_near(group, OP_BROADCAST, (int)(src < 0 ? -1 : src)) || may_fill(fast->tensors, args[0]) <= 0) return not_handled();
    native_call call;
    if (!prepare(fast, group, "broadcast", OP_BROADCAST, &v, src, args, 2, &call) || !begin(fast, group, &call, OP_BROADCAST, timeout, args[0], v.bytes))
        return not_handled();
    int result = group->carrier->broadcast(group, &call.call, v.data, v.bytes, (int)src, &who);
    end_call(group);
    return finish_call(&call, group, result, who, args[0], Py_NewRef(Py_True));
}

static PyObject *do_barrier(FastCalls *fast, Calls *group, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 1) return PyErr_Format(PyExc_TypeError, "barrier(timeout)");
    int64_t timeout;
    if (!is_open(fast, group, OP_BARRIER) || parse_timeout((PyObject *)fast, args[0], fast->timeout_ns, &timeout) <= 0) return not_handled();
    if (group == NULL) return Py_NewRef(Py_True);
    view nothing = {.ndim = 0, .bytes = 0};
    native_call call;
    int who = 0;
    if (!prepare(fast, group, "barrier", OP_BARRIER, &nothing, 0, NULL, 0, &call) || !begin(fast, group, &call, OP_BARRIER, timeout, NULL, 0))
        return not_handled();
    int result = group->carrier->barrier(group, &call.call, &who);
    end_call(group);
    return finish_call(&call, group, result, who, Py_None, Py_NewRef(Py_True));
}

/* Operations with pieces of any sizes, and operations with a root. */

/* Reads one size per rank from a list or tuple of integers: 1; None: 2. 0 if it is neither. */
static int parse_sizes(PyObject *value, int n, int64_t *sizes) {
    if (value == Py_None) return 2;
    int list = PyList_CheckExact(value);
    if ((!list && !PyTuple_CheckExact(value)) || (list ? PyList_Size(value) : PyTuple_Size(value)) != n) return 0;
    for (int i = 0; i < n; i++) {
        PyObject *item = list ? PyList_GetItem(value, i) : PyTuple_GetItem(value, i);
        int overflow;
        if (item == NULL || !PyLong_CheckExact(item)) return PyErr_Clear(), 0;
        sizes[i] = PyLong_AsLongLongAndOverflow(item, &overflow);
        if (overflow || sizes[i] < 0 || sizes[i] > MOST_BYTES / n) return 0; /* their sum is no overflow */
    }
    return 1;
}

int rank_of(PyObject *value, int n) {
    if (!PyLong_CheckExact(value)) return -1;
    int overflow;
    long rank = PyLong_AsLongAndOverflow(value, &overflow);
    return overflow || rank < 0 || rank >= n ? -1 : (int)rank;
}

static int64_t sum_of(const int64_t *sizes, int n) {
    int64_t sum = 0;
    for (int i = 0; i < n; i++) sum += sizes[i];
    return sum;
}

/* `extra` of a call with a number and sizes. */
static int64_t hash_of(int64_t number, const int64_t *sizes, int n) {
    uint64_t hash = (uint64_t)number + 1;
    for (int i = 0; i < n; i++) hash = (hash ^ (uint64_t)sizes[i]) * 0x9E3779B97F4A7C15ull, hash ^= hash >> 29;
    return (int64_t)hash;
}

/* Splits dimension `dim` into pieces of these sizes: blocks of a dense tensor that begins at `data`. */
static void cut_by(cg_block *blocks, const int64_t *sizes, int n, char *data, const view *v, int dim) {
    size_t rows = 1, inner = v->size;
    for (int i = 0; i < dim; i++) rows *= (size_t)v->shape[i];
    for (int i = dim + 1; i < v->ndim; i++) inner *= (size_t)v->shape[i];
    size_t pitch = (size_t)sum_of(sizes, n) * inner;
    for (int p = 0; p < n; p++) {
        size_t row = (size_t)sizes[p] * inner;
        blocks[p] = (cg_block){data, rows, row, pitch};
        data += row;
    }
}

/* Bytes of the elements with one index along `dim`. */
static size_t row_bytes(const view *v, int dim) { return v->bytes / (size_t)v->shape[dim]; }

void limit(cg_call *call, size_t bytes, int64_t timeout_ns) {
    if (bytes > BRIEF && call->deadline < 0) call->deadline = deadline_after(timeout_ns);
}

static PyObject *do_all_gatherv(FastCalls *fast, Calls *group, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 4) return PyErr_Format(PyExc_TypeError, "all_gatherv(x, dim, sizes, timeout)");
    view v;
    int64_t timeout;
    int dim, who = 0;
    if (!is_open(fast, group, OP_ALL_GATHER) || group == NULL || view_tensor(fast->tensors, args[0], &v) <= 0 || (dim = dim_of(args[1], &v)) < 0 ||
        parse_timeout((PyObject *)fast, args[3], fast->timeout_ns, &timeout) <= 0)
        return not_handled();
    int n = group->n, me = group->me;
    int64_t sizes[n], shape[MAX_DIMS];
    int given = parse_sizes(args[2], n, sizes);
    if (given == 2)
        for (int p = 0; p < n; p++) sizes[p] = v.shape[dim];
    if (!given || sizes[me] != v.shape[dim]) return not_handled();
    memcpy(shape, v.shape, sizeof shape);
    shape[dim] = sum_of(sizes, n);
    char *data;
    PyObject *out = result_for(fast, group, Py_None, &v, shape, &data);
    if (out == NULL) return not_handled();
    cg_block into[n];
    size_t bytes[n], row = row_bytes(&v, dim);
    cut_by(into, sizes, n, data, &v, dim);
    for (int p = 0; p < n; p++) bytes[p] = row * (size_t)sizes[p];
    native_call call;
    if (!prepare(fast, group, "all_gatherv", OP_ALL_GATHER, &v, hash_of(dim, sizes, n), args, 3, &call) || !begin(fast, group, &call, OP_ALL_GATHER, timeout, NULL, v.bytes))
        return Py_DECREF(out), not_handled();
    limit(&call.call, row * (size_t)shape[dim], timeout);
    int result = group->carrier->gatherv(group, &call.call, v.data, bytes, into, -1, &who);
    end_call(group);
    return finish_call(&call, group, result, who, args[0], out);
}

static PyObject *do_gather(FastCalls *fast, Calls *group, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 5) return PyErr_Format(PyExc_TypeError, "gather(x, dst, dim, sizes, timeout)");
    view v;
    int64_t timeout;
    int dim, who = 0;
    if (!is_open(fast, group, OP_GATHER) || group == NULL || view_tensor(fast->tensors, args[0], &v) <= 0 || (dim = dim_of(args[2], &v)) < 0 ||
        parse_timeout((PyObject *)fast, args[4], fast->timeout_ns, &timeout) <= 0)
        return not_handled();
    int n = group->n, me = group->me, dst = rank_of(args[1], n);
    int64_t sizes[n], shape[MAX_DIMS];
    int given = parse_sizes(args[3], n, sizes);
    if (given == 2)
        for (int p = 0; p < n; p++) sizes[p] = v.shape[dim];
    if (!is_near(group, OP_GATHER, dst) || !given || sizes[me] != v.shape[dim]) return not_handled();
    memcpy(shape, v.shape, sizeof shape);
    shape[dim] = sum_of(sizes, n);
    char *data = NULL;
    PyObject *out = me == dst ? result_for(fast, group, Py_None, &v, shape, &data) : Py_NewRef(Py_False);
    if (out == NULL) return not_handled();
    cg_block into[n];
    size_t bytes[n], row = row_bytes(&v, dim);
    if (me == dst) cut_by(into, sizes, n, data, &v, dim);
    else memset(into, 0, sizeof into);
    for (int p = 0; p < n; p++) bytes[p] = row * (size_t)sizes[p];
    native_call call;
    if (!prepare(fast, group, "gather", OP_GATHER, &v, hash_of(dst * MAX_DIMS + dim, sizes, n), args, 4, &call) || !begin(fast, group, &call, OP_GATHER, timeout, NULL, v.bytes))
        return Py_DECREF(out), not_handled();
    limit(&call.call, row * (size_t)shape[dim], timeout);
    int result = group->carrier->gatherv(group, &call.call, v.data, bytes, into, dst, &who);
    end_call(group);
    return finish_call(&call, group, result, who, args[0], out);
}

static PyObject *do_reduce_scatterv(FastCalls *fast, Calls *group, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 5) return PyErr_Format(PyExc_TypeError, "reduce_scatterv(x, dim, sizes, op, timeout)");
    view v;
    int64_t timeout;
    int dim, dtype, op = parse_op(args[3]), given = op, who = 0;
    if (!is_open(fast, group, OP_REDUCE_SCATTER) || group == NULL || view_tensor(fast->tensors, args[0], &v) <= 0 || (dim = dim_of(args[1], &v)) < 0 ||
        !reduces(&v, &dtype, &op) || parse_timeout((PyObject *)fast, args[4], fast->timeout_ns, &timeout) <= 0)
        return not_handled();
    int n = group->n, me = group->me;
    int64_t sizes[n], shape[MAX_DIMS];
    if (parse_sizes(args[2], n, sizes) != 1 || sum_of(sizes, n) != v.shape[dim] || sizes[me] == 0) return not_handled();
    memcpy(shape, v.shape, sizeof shape);
    shape[dim] = sizes[me];
    char *data;
    PyObject *out = result_for(fast, group, Py_None, &v, shape, &data);
    if (out == NULL) return not_handled();
    cg_block pieces[n];
    cut_by(pieces, sizes, n, v.data, &v, dim);
    native_call call;
    int64_t extra = hash_of(dim * CG_OPS + given, sizes, n);
    if (!prepare(fast, group, "reduce_scatterv", OP_REDUCE_SCATTER, &v, extra, args, 4, &call) || !begin(fast, group, &call, OP_REDUCE_SCATTER, timeout, NULL, v.bytes))
        return Py_DECREF(out), not_handled();
    int result = group->carrier->reduce_scatter(group, &call.call, pieces, data, dtype, op, &who);
    end_call(group);
    return finish_call(&call, group, result, who, args[0], out);
}

static PyObject *do_reduce(FastCalls *fast, Calls *group, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 4) return PyErr_Format(PyExc_TypeError, "reduce(x, dst, op, timeout)");
    view v;
    int64_t timeout;
    int dtype, op = parse_op(args[2]), given = op, who = 0;
    if (!is_open(fast, group, OP_REDUCE) || group == NULL || view_tensor(fast->tensors, args[0], &v) <= 0 || !reduces(&v, &dtype, &op) ||
        parse_timeout((PyObject *)fast, args[3], fast->timeout_ns, &timeout) <= 0)
        return not_handled();
    int n = group->n, me = group->me, dst = rank_of(args[1], n);
    if (!is_near(group, OP_REDUCE, dst) || (n > 2 && v.bytes > group->carrier->one_rank_bytes)) return not_handled();
    char *data = NULL;
    PyObject *out = me == dst ? result_for(fast, group, Py_None, &v, v.shape, &data) : Py_NewRef(Py_False);
    if (out == NULL) return not_handled();
    cg_block pieces[n];
    for (int p = 0; p < n; p++) pieces[p] = (cg_block){v.data, 1, p == dst ? v.bytes : 0, p == dst ? v.bytes : 0};
    native_call call;
    if (!prepare(fast, group, "reduce", OP_REDUCE_SCATTER, &v, -1 - (dst * CG_OPS + given), args, 3, &call) || !begin(fast, group, &call, OP_REDUCE_SCATTER, timeout, NULL, v.bytes))
        return Py_DECREF(out), not_handled();
    int result = group->carrier->reduce_scatter(group, &call.call, pieces, data, dtype, op, &who);
    end_call(group);
    return finish_call(&call, group, result, who, args[0], out);
}

/* `all_to_all` along one dimension, by sizes. */
static PyObject *all_to_all_by_sizes(FastCalls *fast, Calls *group, PyObject *const *args, const view *v, int dim, int64_t timeout) {
    int n = group->n, me = group->me, who = 0;
    int64_t cut[n], joined[n], shape[MAX_DIMS];
    if (parse_sizes(args[3], n, cut) != 1 || parse_sizes(args[4], n, joined) != 1 || sum_of(cut, n) != v->shape[dim] || cut[me] != joined[me])
        return not_handled();
    memcpy(shape, v->shape, sizeof shape);
    shape[dim] = sum_of(joined, n);
    if (shape[dim] == 0) return not_handled();
    char *data;
    PyObject *out = result_for(fast, group, args[5], v, shape, &data);
    if (out == NULL) return not_handled();
    cg_block sends[n], receives[n];
    cut_by(sends, cut, n, v->data, v, dim);
    cut_by(receives, joined, n, data, v, dim);
    native_call call;
    /* The text has no sizes, and nothing of the shape that a rank may choose: `extra` differs from that of even pieces. */
    if (!prepare(fast, group, "all_to_all", OP_ALL_TO_ALL, v, MAX_DIMS + dim, args, 5, &call) || !begin(fast, group, &call, OP_ALL_TO_ALL, timeout, args[5] == Py_None ? NULL : out, v->bytes))
        return Py_DECREF(out), not_handled();
    limit(&call.call, v->bytes + row_bytes(v, dim) * (size_t)shape[dim], timeout);
    int result = group->carrier->all_to_allv(group, &call.call, sends, receives, &who);
    end_call(group);
    return finish_call(&call, group, result, who, args[0], out);
}

/* The header before the pieces of a scatter, equal to that of commgraph/coordinator/exchanges.py: DLPack's code and bits, dim, number of
 * dims, whether the tensor is on the host, shape, sizes. */
enum { HEADER_DIMS = 24, HEADER_FIXED = 4 };

static PyObject *do_scatter(FastCalls *fast, Calls *group, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 5) return PyErr_Format(PyExc_TypeError, "scatter(x, src, dim, sizes, timeout)");
    int64_t timeout;
    if (!is_open(fast, group, OP_SCATTER) || group == NULL || fast->tensors->exchange == NULL || parse_timeout((PyObject *)fast, args[4], fast->timeout_ns, &timeout) <= 0)
        return not_handled();
    int n = group->n, me = group->me, src = rank_of(args[1], n), dim = 0, who = 0;
    int64_t header[HEADER_FIXED + HEADER_DIMS + n], *sizes = header + HEADER_FIXED + HEADER_DIMS;
    view v = {.ndim = 0, .bytes = 0};
    memset(header, 0, sizeof header);
    if (src < 0) return not_handled();
    if (me == src) {
        if (view_tensor(fast->tensors, args[0], &v) <= 0 || v.ndim == 0 || (dim = dim_of(args[2], &v)) < 0) return not_handled();
        int given = parse_sizes(args[3], n, sizes);
        if (given == 2)
            for (int p = 0; p < n; p++) sizes[p] = v.shape[dim] / n;
        if (!given || sum_of(sizes, n) != v.shape[dim]) return not_handled();
        header[0] = v.kind.code << 8 | v.kind.bits;
        header[1] = dim;
        header[2] = v.ndim;
        header[3] = 1;
        for (int i = 0; i < v.ndim; i++) header[HEADER_FIXED + i] = v.shape[i];
    } else if (args[0] != Py_None || args[3] != Py_None || !PyLong_CheckExact(args[2])) {
        return not_handled();
    }
    view nothing = {.ndim = 0, .bytes = 0};
    native_call call;
    if (!prepare(fast, group, "scatter", OP_BROADCAST, &nothing, 1000 + src, args, 4, &call) || !begin(fast, group, &call, OP_BROADCAST, timeout, NULL, sizeof header))
        return not_handled();
    call.call.deadline = deadline_after(timeout);
    cg_block sends[n], receives[n];
    int result = group->carrier->broadcast(group, &call.call, header, sizeof header, src, &who);
    group->carrier->end_work(group);
    if (result != CG_OK) {
        group->carrier->unclaim(group);
        return finish_call(&call, group, result, who, args[0], Py_NewRef(Py_None));
    }
    /* Every rank knows from the header which pieces follow. A tensor that is not plain is left to the general path, which continues after
     * the header. */
    if (me != src) {
        int64_t code = header[0];
        v = (view){.kind = {(uint8_t)(code >> 8), (uint8_t)code, 1}, .ndim = (int)header[2], .size = (size_t)(code & 0xFF) / 8};
        dim = (int)header[1];
    }
    int plain = header[0] < 1 << 16 && header[2] <= MAX_DIMS && header[3] && sizes[me] > 0;
    if (plain && me != src) {
        memcpy(v.shape, header + HEADER_FIXED, sizeof *v.shape * (size_t)v.ndim);
        v.bytes = v.size;
        for (int i = 0; i < v.ndim; i++) v.bytes *= (size_t)v.shape[i];
    }
    if (call.entry != NULL && plain) {
        view piece = v;
        if (me != src) {
            piece.shape[dim] = sizes[me];
            piece.bytes = v.bytes / (size_t)v.shape[dim] * (size_t)sizes[me];
        }
        record_tensor(fast->record->recorder, call.entry, &piece);
    }
    if (!plain) {
        record_cancel(call.entry); /* the general path begins one */
        PyObject *numbers = PyList_New(0);
        for (int i = 0; numbers != NULL && i < HEADER_FIXED + HEADER_DIMS + n; i++) {
            PyObject *number = PyLong_FromLongLong(header[i]);
            if (number == NULL || PyList_Append(numbers, number) < 0) Py_CLEAR(numbers);
            Py_XDECREF(number);
        }
        /* The rest of the call is the general path's, which has to release this claim. */
        if (numbers != NULL && PyDict_SetItem(group->claims, Py_None, numbers) < 0) Py_CLEAR(numbers);
        group->carrier->unclaim(group);
        return numbers;
    }
    int64_t shape[MAX_DIMS];
    memcpy(shape, v.shape, sizeof shape);
    shape[dim] = sizes[me];
    char *data;
    PyObject *out = new_tensor(fast->tensors, group->pool, v.kind, v.ndim, shape, v.bytes / (size_t)v.shape[dim] * (size_t)sizes[me], &data);
    if (out == NULL) {
        record_end(call.entry, ENTRY_FAILED);
        group->carrier->unclaim(group);
        return NULL;
    }
    memset(sends, 0, sizeof sends);
    memset(receives, 0, sizeof receives);
    if (me == src) cut_by(sends, sizes, n, v.data, &v, dim);
    size_t own = v.bytes / (size_t)v.shape[dim] * (size_t)sizes[me];
    receives[src] = (cg_block){data, 1, own, own};
    call.call.call = call_word(group, OP_ALL_TO_ALL);
    group->carrier->begin_work(group, group->carrier->keeps(group, v.bytes));
    result = group->carrier->all_to_allv(group, &call.call, sends, receives, &who);
    end_call(group);
    return finish_call(&call, group, result, who, args[0], out);
}

static PyObject *fast_close(PyObject *self, PyObject *unused) {
    (void)unused;
    FastCalls *fast = (FastCalls *)self;
    fast->open = 0;
    Py_CLEAR(fast->group); /* its memory goes with the last reference, such as that of a call on another thread */
    Py_RETURN_NONE;
}

/* What the types of Calls share. */

int begin_calls(Calls *calls, const cg_carrier *carrier, int n, int me, Pool *pool) {
    calls->carrier = carrier;
    calls->n = n;
    calls->me = me;
    calls->pool = (Pool *)Py_NewRef((PyObject *)pool);
    calls->claims = PyDict_New();
    calls->enabled = 1;
    return calls->claims != NULL;
}

void end_calls(Calls *calls) {
    Py_XDECREF((PyObject *)calls->pool);
    Py_XDECREF(calls->claims);
}

PyObject *get_claims(PyObject *self, void *closure) {
    (void)closure;
    return Py_NewRef(((Calls *)self)->claims);
}

PyObject *get_number(PyObject *self, void *field) {
    const Calls *calls = (Calls *)self;
    const char *name = field;
    if (*name == 's') return PyLong_FromUnsignedLongLong(calls->sequence);
    return PyLong_FromLong(*name == 'e' ? calls->enabled : calls->paused);
}

int set_number(PyObject *self, PyObject *value, void *field) {
    Calls *calls = (Calls *)self;
    const char *name = field;
    if (value == NULL) return PyErr_SetString(PyExc_AttributeError, name), -1;
    unsigned long long number = PyLong_AsUnsignedLongLong(value);
    if (PyErr_Occurred()) return -1;
    if (*name == 's') calls->sequence = number;
    else *(*name == 'e' ? &calls->enabled : &calls->paused) = (int)number;
    return 0;
}

static PyObject *fast_record(PyObject *self, PyObject *args) {
    PyObject *given;
    GroupRecord *record;
    int strategy;
    if (!PyArg_ParseTuple(args, "Oi", &given, &strategy) || !record_of(self, given, &record)) return NULL;
    FastCalls *fast = (FastCalls *)self;
    GroupRecord *before = fast->record;
    fast->record = (GroupRecord *)Py_XNewRef((PyObject *)record);
    fast->strategy_text = (uint16_t)strategy;
    Py_XDECREF((PyObject *)before);
    Py_RETURN_NONE;
}

/* The methods hold the group: Python code that a call runs, and other threads while it waits, may close it. */
#define CALL(name)                                                                                  \
    static PyObject *fast_##name(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {         \
        Calls *group = ((FastCalls *)self)->group;                                                  \
        Py_XINCREF((PyObject *)group);                                                              \
        PyObject *result = do_##name((FastCalls *)self, group, args, nargs);                        \
        Py_XDECREF((PyObject *)group);                                                              \
        return result;                                                                              \
    }
CALL(all_reduce)
CALL(all_reduce_)
CALL(all_gather)
CALL(reduce_scatter)
CALL(all_to_all)
CALL(broadcast)
CALL(all_gatherv)
CALL(reduce_scatterv)
CALL(gather)
CALL(reduce)
CALL(scatter)
CALL(barrier)
CALL(begin_all_reduce)
CALL(all_gather_object)
CALL(broadcast_object)

static PyObject *fast_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    PyObject *group, *tensors, *describe;
    long long timeout_ns;
    if (!PyArg_ParseTuple(args, "OOOL", &group, &tensors, &describe, &timeout_ns)) return NULL;
    module_state *state = PyType_GetModuleState(type);
    if (state == NULL || (group != Py_None && !PyObject_TypeCheck(group, state->group) && !PyObject_TypeCheck(group, state->link_group)) || !PyObject_TypeCheck(tensors, state->tensors))
        return PyErr_Format(PyExc_TypeError, "FastCalls(group, tensors, describe, timeout_ns)");
    FastCalls *self = (FastCalls *)allocate(type);
    if (self == NULL) return NULL;
    self->group = group == Py_None ? NULL : (Calls *)Py_NewRef(group);
    self->tensors = (Tensors *)Py_NewRef(tensors);
    self->describe = Py_NewRef(describe);
    self->timeout_ns = timeout_ns;
    self->open = 1;
    return (PyObject *)self;
}

static void fast_dealloc(PyObject *self) {
    half_done *begun = &((FastCalls *)self)->begun;
    Py_XDECREF((PyObject *)begun->group);
    Py_XDECREF(begun->x);
    Py_XDECREF(begun->result);
    Py_XDECREF((PyObject *)((FastCalls *)self)->group);
    Py_XDECREF((PyObject *)((FastCalls *)self)->tensors);
    Py_XDECREF(((FastCalls *)self)->describe);
    Py_XDECREF((PyObject *)((FastCalls *)self)->record);
    free_object(self);
}

#define FAST(name, doc) {#name, (PyCFunction)(void (*)(void))fast_##name, METH_FASTCALL, doc}
static PyMethodDef fast_methods[] = {
    FAST(all_reduce, "all_reduce(x, op, timeout)\n--\n\nA new tensor, or None."),
    FAST(all_reduce_, "all_reduce_(x, op, timeout)\n--\n\nTrue, or None."),
    FAST(all_gather, "all_gather(x, dim, out, timeout)\n--\n\nThe result, or None."),
    FAST(reduce_scatter, "reduce_scatter(x, dim, op, out, timeout)\n--\n\nThe result, or None."),
    FAST(all_to_all, "all_to_all(x, scatter_dim, gather_dim, input_sizes, output_sizes, out, timeout)\n--\n\nThe result, or None."),
    FAST(broadcast, "broadcast(x, src, timeout)\n--\n\nTrue, or None."),
    FAST(all_gather_object, "all_gather_object(rings, room, hash, dumps, arguments, timeout, record)\n--\n\nA list, a tuple, or None."),
    FAST(broadcast_object, "broadcast_object(rings, hash, src, dumps, arguments, timeout, record)\n--\n\nA list or a tuple of parts, or None."),
    FAST(all_gatherv, "all_gatherv(x, dim, sizes, timeout)\n--\n\nA new tensor, or None."),
    FAST(reduce_scatterv, "reduce_scatterv(x, dim, sizes, op, timeout)\n--\n\nA new tensor, or None."),
    FAST(gather, "gather(x, dst, dim, sizes, timeout)\n--\n\nA new tensor on dst and False elsewhere, or None."),
    FAST(reduce, "reduce(x, dst, op, timeout)\n--\n\nA new tensor on dst and False elsewhere, or None."),
    FAST(scatter, "scatter(x, src, dim, sizes, timeout)\n--\n\nA new tensor, or None; a list is the header that was sent, after which the pieces are due."),
    FAST(barrier, "barrier(timeout)\n--\n\nTrue, or None."),
    FAST(begin_all_reduce, "begin_all_reduce(x, op, timeout)\n--\n\nTrue, or None. `end_all_reduce` comes next, before any other collective."),
    {"has_arrived", fast_has_arrived, METH_NOARGS, "has_arrived()\n--\n\nWhether `end_all_reduce` would wait for no rank."},
    {"end_all_reduce", fast_end_all_reduce, METH_NOARGS, "end_all_reduce()\n--\n\nThe new tensor."},
    {"record", fast_record, METH_VARARGS, "record(record, strategy)\n--\n\nRecords every later call."},
    {"close", fast_close, METH_NOARGS, "close()\n--\n\nMakes every later call return None."},
    {0}};
static PyType_Slot fast_slots[] = {
    {Py_tp_doc, "FastCalls(group, tensors, describe, timeout_ns)\n--\n\nNative calls of one coordinator; `group` is None for one rank."},
    {Py_tp_new, fast_new}, {Py_tp_dealloc, fast_dealloc}, {Py_tp_methods, fast_methods}, {0}};
PyType_Spec fast_spec = {"commgraph.shm._native.FastCalls", sizeof(FastCalls), 0, Py_TPFLAGS_DEFAULT, fast_slots};
