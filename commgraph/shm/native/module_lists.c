/* Native calls of a list of tensors: small plain ones of one dtype, which travel as one buffer. The general path
 * (commgraph/coordinator/coalesced.py) sends the same bytes under the same tag, so that each rank may take either. */
#include "module_fast.h"

#include <string.h>

#define LARGE_BYTES (256 * 1024) /* as coalesced.py has it: a larger tensor is sent by itself */
enum { MOST_TENSORS = 4096 };

/* The tensors of a list. */
typedef struct {
    PyObject *tuple; /* of them: other threads may change the list meanwhile */
    Py_ssize_t n;
    view *views;
    view key; /* of the first, with the bytes of all */
    size_t count;
    uint64_t hash; /* of all shapes */
} tensors;

static PyObject *item(const tensors *xs, Py_ssize_t i) { return PyTuple_GetItem(xs->tuple, i); }

static void mix(tensors *xs, uint64_t value) { xs->hash = (xs->hash ^ value) * 0x9E3779B97F4A7C15ull, xs->hash ^= xs->hash >> 29; }

/* Reads a list: 1; 0 if the general path serves it, -1 with an error set. */
static int read_tensors(const FastCalls *fast, PyObject *list, tensors *xs) {
    *xs = (tensors){.tuple = PySequence_Tuple(list), .hash = 1};
    if (xs->tuple == NULL) return -1;
    xs->n = PyTuple_Size(xs->tuple);
    if (xs->n < 2 || xs->n > MOST_TENSORS) return 0;
    xs->views = PyMem_Malloc(sizeof(view) * (size_t)xs->n);
    if (xs->views == NULL) return PyErr_NoMemory(), -1;
    for (Py_ssize_t i = 0; i < xs->n; i++) {
        view *v = &xs->views[i];
        int plain = view_tensor(fast->tensors, item(xs, i), v);
        if (plain <= 0) return plain;
        if (v->bytes >= LARGE_BYTES || memcmp(&v->kind, &xs->views[0].kind, sizeof v->kind) || v->is_bool != xs->views[0].is_bool) return 0;
        xs->count += v->bytes / v->size;
        mix(xs, (uint64_t)v->ndim);
        for (int dim = 0; dim < v->ndim; dim++) mix(xs, (uint64_t)v->shape[dim]);
    }
    xs->key = xs->views[0];
    xs->key.bytes = xs->count * xs->key.size;
    return 1;
}

/* Whether all tensors may be filled, and none lies where another one does: 0 if not, -1 with an error set. */
static int may_fill_all(const FastCalls *fast, const tensors *xs) {
    for (Py_ssize_t i = 0; i < xs->n; i++) {
        int may = may_fill(fast->tensors, item(xs, i));
        if (may <= 0) return may;
    }
    /* A table of addresses, at most half full. */
    size_t cells = 4;
    while (cells < 2 * (size_t)xs->n) cells *= 2;
    char **table = PyMem_Calloc(cells, sizeof *table);
    if (table == NULL) return PyErr_NoMemory(), -1;
    int apart = 1;
    for (Py_ssize_t i = 0; i < xs->n && apart; i++) {
        size_t at = (size_t)(((uintptr_t)xs->views[i].data >> 2) * 0x9E3779B97F4A7C15ull) & (cells - 1);
        while (table[at] != NULL && table[at] != xs->views[i].data) at = (at + 1) & (cells - 1);
        if (table[at] != NULL) apart = 0;
        table[at] = xs->views[i].data;
    }
    PyMem_Free(table);
    return apart;
}

/* Begins a call of a list; `extra` distinguishes calls with other arguments. */
static int begin_list(FastCalls *fast, Calls *group, native_call *call, const char *name, int operation, tensors *xs, int64_t extra, PyObject *const *args,
                      int n_args, int64_t timeout_ns) {
    PyObject *const those[3] = {xs->tuple, args[1], n_args > 2 ? args[2] : NULL};
    mix(xs, (uint64_t)extra);
    mix(xs, (uint64_t)xs->n);
    if (!prepare(fast, group, name, operation, &xs->key, (int64_t)xs->hash, those, n_args, call)) return 0;
    if (!begin(fast, group, call, operation, timeout_ns, NULL, xs->key.bytes)) return 0;
    if (call->entry != NULL) call->entry->tensors = (uint16_t)xs->n;
    return 1;
}

/* New tensors of these shapes, in a list; `shapes`: one for each tensor, `data`: their memory. */
static PyObject *new_list(FastCalls *fast, Calls *group, const tensors *xs, int64_t (*shapes)[MAX_DIMS], char **data) {
    PyObject *made = PyList_New(xs->n);
    for (Py_ssize_t i = 0; made != NULL && i < xs->n; i++) {
        const view *v = &xs->views[i];
        size_t bytes = v->size;
        for (int dim = 0; dim < v->ndim; dim++) bytes *= (size_t)shapes[i][dim];
        PyObject *one = new_tensor(fast->tensors, group->pool, v->kind, v->ndim, shapes[i], bytes, &data[i]);
        if (one == NULL) Py_CLEAR(made);
        else PyList_SetItem(made, i, one);
    }
    return made;
}

static void mark_all(const FastCalls *fast, const tensors *xs) {
    for (Py_ssize_t i = 0; i < xs->n; i++)
        if (!mark_as_written(fast->tensors, item(xs, i))) PyErr_WriteUnraisable(item(xs, i));
}

/* Copies all tensors to a buffer, or from it. */
static void pack(const tensors *xs, char *buffer) {
    for (Py_ssize_t i = 0; i < xs->n; buffer += xs->views[i++].bytes) memcpy(buffer, xs->views[i].data, xs->views[i].bytes);
}
static void unpack(const tensors *xs, const char *buffer, char *const *to) {
    for (Py_ssize_t i = 0; i < xs->n; buffer += xs->views[i++].bytes) memcpy(to == NULL ? xs->views[i].data : to[i], buffer, xs->views[i].bytes);
}

/* What a call of a list holds; given back by `drop`. */
typedef struct {
    tensors xs;
    Block *buffer, *result;
    int64_t (*shapes)[MAX_DIMS];
    char **data;
    PyObject *made;
} held;

static int hold(FastCalls *fast, Calls *group, held *h, size_t buffer, size_t result) {
    h->shapes = PyMem_Malloc(sizeof *h->shapes * (size_t)h->xs.n);
    h->data = PyMem_Malloc(sizeof *h->data * (size_t)h->xs.n);
    if (h->shapes == NULL || h->data == NULL) return PyErr_NoMemory(), 0;
    for (Py_ssize_t i = 0; i < h->xs.n; i++) memcpy(h->shapes[i], h->xs.views[i].shape, sizeof *h->shapes);
    h->buffer = take_block((PyObject *)fast, group->pool, buffer);
    if (result && h->buffer != NULL) h->result = take_block((PyObject *)fast, group->pool, result);
    return h->buffer != NULL && (!result || h->result != NULL);
}

static PyObject *drop(held *h, PyObject *value) {
    Py_XDECREF(h->xs.tuple);
    PyMem_Free(h->xs.views);
    PyMem_Free(h->shapes);
    PyMem_Free(h->data);
    Py_XDECREF((PyObject *)h->buffer);
    Py_XDECREF((PyObject *)h->result);
    Py_XDECREF(h->made);
    return value;
}

/* The end of a call whose buffers other ranks may still access after a failure: then they stay for ever. */
static PyObject *finish_list(const native_call *call, Calls *group, int result, int who, held *h, PyObject *value) {
    if (result != CG_OK && h->result != NULL && group->carrier->exposes(group)) Py_INCREF((PyObject *)h->result);
    return drop(h, finish_call(call, group, result, who, (PyObject *)h->buffer, value));
}

PyObject *all_reduce_list(FastCalls *fast, Calls *group, PyObject *const *args, int in_place) {
    held h = {0};
    native_call call;
    int64_t timeout;
    int dtype, op = parse_op(args[1]), given = op, who = 0;
    if (!is_open(fast, group, OP_ALL_REDUCE_) || group == NULL || parse_timeout((PyObject *)fast, args[2], fast->timeout_ns, &timeout) <= 0) return not_handled();
    if (read_tensors(fast, args[0], &h.xs) <= 0 || !reduces(&h.xs.key, &dtype, &op) || (in_place && may_fill_all(fast, &h.xs) <= 0) ||
        !hold(fast, group, &h, h.xs.key.bytes, 0) || (!in_place && (h.made = new_list(fast, group, &h.xs, h.shapes, h.data)) == NULL))
        return drop(&h, not_handled());
    pack(&h.xs, h.buffer->base);
    /* By the general path, too, the buffer is reduced in place. */
    if (!begin_list(fast, group, &call, in_place ? "all_reduce_" : "all_reduce", OP_ALL_REDUCE_, &h.xs, given * 2 + in_place, args, 2, timeout))
        return drop(&h, not_handled());
    int result = group->carrier->all_reduce(group, &call.call, h.buffer->base, h.buffer->base, h.xs.count, dtype, op, 1, &who);
    end_call(group);
    if (result == CG_OK) {
        if (in_place) mark_all(fast, &h.xs);
        unpack(&h.xs, h.buffer->base, in_place ? NULL : h.data);
    }
    return finish_list(&call, group, result, who, &h, Py_NewRef(in_place ? Py_True : h.made));
}

PyObject *broadcast_list(FastCalls *fast, Calls *group, PyObject *const *args) {
    held h = {0};
    native_call call;
    int64_t timeout;
    int who = 0;
    if (!is_open(fast, group, OP_BROADCAST) || group == NULL || parse_timeout((PyObject *)fast, args[2], fast->timeout_ns, &timeout) <= 0) return not_handled();
    int src = rank_of(args[1], group->n);
    if (!is_near(group, OP_BROADCAST, src) || read_tensors(fast, args[0], &h.xs) <= 0 || may_fill_all(fast, &h.xs) <= 0 || !hold(fast, group, &h, h.xs.key.bytes, 0))
        return drop(&h, not_handled());
    if (group->me == src) pack(&h.xs, h.buffer->base);
    if (!begin_list(fast, group, &call, "broadcast", OP_BROADCAST, &h.xs, src, args, 2, timeout)) return drop(&h, not_handled());
    int result = group->carrier->broadcast(group, &call.call, h.buffer->base, h.xs.key.bytes, src, &who);
    end_call(group);
    if (result == CG_OK) {
        mark_all(fast, &h.xs);
        if (group->me != src) unpack(&h.xs, h.buffer->base, NULL);
    }
    return finish_list(&call, group, result, who, &h, Py_NewRef(Py_True));
}

/* The place of one rank's piece of a tensor that is joined, or cut, along `dim`: `rows` pieces of `row` bytes. */
static void piece_of(const view *v, int dim, size_t extent, size_t *rows, size_t *row) {
    *rows = 1;
    *row = v->size * extent;
    for (int i = 0; i < dim; i++) *rows *= (size_t)v->shape[i];
    for (int i = dim + 1; i < v->ndim; i++) *row *= (size_t)v->shape[i];
}

PyObject *all_gather_list(FastCalls *fast, Calls *group, PyObject *const *args) {
    held h = {0};
    native_call call;
    int64_t timeout;
    int who = 0;
    if (args[2] != Py_None || !is_open(fast, group, OP_ALL_GATHER) || group == NULL || parse_timeout((PyObject *)fast, args[3], fast->timeout_ns, &timeout) <= 0)
        return not_handled();
    size_t n = (size_t)group->n;
    if (read_tensors(fast, args[0], &h.xs) <= 0 || !hold(fast, group, &h, h.xs.key.bytes, n * h.xs.key.bytes)) return drop(&h, not_handled());
    for (Py_ssize_t i = 0; i < h.xs.n; i++) {
        int dim = dim_of(args[1], &h.xs.views[i]);
        if (dim < 0) return drop(&h, not_handled());
        h.shapes[i][dim] *= (int64_t)n;
    }
    if ((h.made = new_list(fast, group, &h.xs, h.shapes, h.data)) == NULL) return drop(&h, NULL);
    pack(&h.xs, h.buffer->base);
    size_t whole = h.xs.key.bytes, bytes[n];
    cg_block into[n];
    for (size_t p = 0; p < n; p++) bytes[p] = whole, into[p] = (cg_block){h.result->base + p * whole, 1, whole, whole};
    if (!begin_list(fast, group, &call, "all_gather", OP_ALL_GATHER, &h.xs, PyLong_AsLong(args[1]), args, 2, timeout)) return drop(&h, not_handled());
    limit(&call.call, n * whole, timeout);
    int result = group->carrier->gatherv(group, &call.call, h.buffer->base, bytes, into, -1, &who);
    end_call(group);
    size_t at = 0;
    for (Py_ssize_t i = 0; result == CG_OK && i < h.xs.n; at += h.xs.views[i++].bytes) {
        const view *v = &h.xs.views[i];
        size_t rows, row;
        int dim = dim_of(args[1], v);
        piece_of(v, dim, (size_t)v->shape[dim], &rows, &row);
        for (size_t p = 0; p < n; p++)
            for (size_t r = 0; r < rows; r++) memcpy(h.data[i] + (r * n + p) * row, h.result->base + p * whole + at + r * row, row);
    }
    return finish_list(&call, group, result, who, &h, Py_NewRef(h.made));
}

PyObject *reduce_scatter_list(FastCalls *fast, Calls *group, PyObject *const *args) {
    held h = {0};
    native_call call;
    int64_t timeout;
    int dtype, op = parse_op(args[2]), given = op, who = 0;
    if (args[3] != Py_None || !is_open(fast, group, OP_REDUCE_SCATTER) || group == NULL || parse_timeout((PyObject *)fast, args[4], fast->timeout_ns, &timeout) <= 0)
        return not_handled();
    size_t n = (size_t)group->n;
    if (read_tensors(fast, args[0], &h.xs) <= 0 || !reduces(&h.xs.key, &dtype, &op) || !hold(fast, group, &h, h.xs.key.bytes, h.xs.key.bytes / n + h.xs.key.size))
        return drop(&h, not_handled());
    for (Py_ssize_t i = 0; i < h.xs.n; i++) {
        int dim = dim_of(args[1], &h.xs.views[i]);
        if (dim < 0 || h.shapes[i][dim] % (int64_t)n) return drop(&h, not_handled());
        h.shapes[i][dim] /= (int64_t)n;
    }
    if ((h.made = new_list(fast, group, &h.xs, h.shapes, h.data)) == NULL) return drop(&h, NULL);
    /* One row for each rank: its piece of every tensor. */
    size_t whole = h.xs.key.bytes / n, at = 0;
    cg_block pieces[n];
    for (size_t p = 0; p < n; p++) pieces[p] = (cg_block){h.buffer->base + p * whole, 1, whole, whole};
    for (Py_ssize_t i = 0; i < h.xs.n; at += h.xs.views[i++].bytes / n) {
        const view *v = &h.xs.views[i];
        size_t rows, row;
        int dim = dim_of(args[1], v);
        piece_of(v, dim, (size_t)h.shapes[i][dim], &rows, &row);
        for (size_t p = 0; p < n; p++)
            for (size_t r = 0; r < rows; r++) memcpy(h.buffer->base + p * whole + at + r * row, v->data + (r * n + p) * row, row);
    }
    int64_t extra = PyLong_AsLong(args[1]) * CG_OPS + given;
    if (!begin_list(fast, group, &call, "reduce_scatter", OP_REDUCE_SCATTER, &h.xs, extra, args, 3, timeout)) return drop(&h, not_handled());
    int result = group->carrier->reduce_scatter(group, &call.call, pieces, h.result->base, dtype, op, &who);
    end_call(group);
    at = 0;
    for (Py_ssize_t i = 0; result == CG_OK && i < h.xs.n; at += h.xs.views[i++].bytes / n) memcpy(h.data[i], h.result->base + at, h.xs.views[i].bytes / n);
    return finish_list(&call, group, result, who, &h, Py_NewRef(h.made));
}
