/* The Python type Group: collectives of a team over one piece of shared memory. */
#include "module.h"

#include <errno.h>
#include <string.h>

/* The carrier of calls in shared memory. */

static int ready(Calls *calls, int operation, int root) {
    (void)calls, (void)operation, (void)root;
    return 1;
}
static int ready_to_reduce(Calls *calls, size_t bytes) {
    (void)calls, (void)bytes;
    return 1;
}
static int claim_group(Calls *calls) { return claim(((Group *)calls)->team); }
static void unclaim_group(Calls *calls) { unclaim(((Group *)calls)->team); }
static int keeps(Calls *calls, size_t bytes) { return keeps_interpreter(((Group *)calls)->team, bytes); }
static void begin_group(Calls *calls, int keep) { begin_work(((Group *)calls)->team, keep); }
static void end_group(Calls *calls) { end_work(((Group *)calls)->team); }
static int exposes(const Calls *calls) { return ((const Group *)calls)->group.exposed; }
static int barrier(Calls *calls, const cg_call *call, int *who) { return cg_barrier(&((Group *)calls)->group, call, who); }
static int all_reduce(Calls *calls, const cg_call *call, const void *from, void *to, size_t count, int dtype, int op, int in_place, int *who) {
    return cg_all_reduce(&((Group *)calls)->group, call, from, to, count, dtype, op, in_place, who);
}
static int reduce_scatter(Calls *calls, const cg_call *call, const cg_block *out, void *to, int dtype, int op, int *who) {
    return cg_reduce_scatter(&((Group *)calls)->group, call, out, to, dtype, op, who);
}
static int gatherv(Calls *calls, const cg_call *call, const char *mine, const size_t *bytes, const cg_block *into, int root, int *who) {
    return cg_all_gatherv(&((Group *)calls)->group, call, mine, bytes, into, root < 0, who);
}
static int all_to_allv(Calls *calls, const cg_call *call, const cg_block *out, const cg_block *into, int *who) {
    return cg_all_to_allv(&((Group *)calls)->group, call, out, into, who);
}
static int broadcast(Calls *calls, const cg_call *call, void *data, size_t bytes, int root, int *who) {
    cg_block into[calls->n];
    size_t sizes[calls->n];
    memset(into, 0, sizeof into);
    memset(sizes, 0, sizeof sizes);
    sizes[root] = bytes;
    into[root] = (cg_block){data, 1, bytes, bytes};
    return cg_all_gatherv(&((Group *)calls)->group, call, data, sizes, into, 0, who);
}

static const cg_carrier shared_memory = {
    ~0u, 256 * 1024 /* commgraph/communicators/shm.py */, ready, ready_to_reduce, claim_group, unclaim_group, keeps, begin_group, end_group, exposes,
    barrier, all_reduce, reduce_scatter, gatherv, all_to_allv, broadcast};

Group *in_shared_memory(Calls *calls) { return calls->carrier == &shared_memory ? (Group *)calls : NULL; }

static PyObject *group_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    PyObject *team, *pool;
    Py_ssize_t offset, slot_bytes;
    if (!PyArg_ParseTuple(args, "OOnn", &team, &pool, &offset, &slot_bytes)) return NULL;
    module_state *state = PyType_GetModuleState(type);
    if (state == NULL || !PyObject_TypeCheck(team, state->team) || !PyObject_TypeCheck(pool, state->pool))
        return PyErr_Format(PyExc_TypeError, "Group(team, pool, offset, slot_bytes)");
    cg_team *view = &((Team *)team)->team;
    if (offset % 4096 || slot_bytes % 4096 || !is_group(view->n, slot_bytes) ||
        !fits(((Team *)team)->segment, offset, cg_group_bytes(view->n, (size_t)slot_bytes)))
        return PyErr_Format(PyExc_ValueError, "a group at %zd with slots of %zd bytes does not fit into the segment", offset, slot_bytes);
    Group *self = (Group *)allocate(type);
    if (self == NULL) return NULL;
    self->regions = PyList_New(0);
    cg_group_join(&self->group, view, ((Team *)team)->segment->base + offset, (size_t)slot_bytes);
    self->team = (Team *)Py_NewRef(team);
    if (!begin_calls(&self->calls, &shared_memory, view->n, view->me, (Pool *)pool) || self->regions == NULL) Py_CLEAR(self);
    return (PyObject *)self;
}

static void group_dealloc(PyObject *self) {
    Group *group = (Group *)self;
    cg_group_leave(&group->group);
    Py_XDECREF((PyObject *)group->team);
    Py_XDECREF(group->regions);
    end_calls(&group->calls);
    free_object(self);
}

/* The return value of a call. `owner` holds its tensors; NULL if it has none. */
static PyObject *finished(Group *group, int result, int who, PyObject *owner) {
    if (result == CG_OK) return Py_NewRef(Py_None);
    if (group->group.exposed) Py_XINCREF(owner); /* for ever: other ranks may still access them */
    group->calls.enabled = 0;
    return raise_stopped((PyObject *)group, result, who);
}

static PyObject *group_barrier(PyObject *self, PyObject *args) {
    Group *group = (Group *)self;
    unsigned long tag;
    long long timeout;
    if (!PyArg_ParseTuple(args, "kL", &tag, &timeout)) return NULL;
    cg_call call = {.tag = (uint32_t)tag, .call = call_word(&group->calls, OP_BARRIER), .deadline = deadline_after(timeout)};
    int who = 0;
    if (!enter(group->team)) return NULL;
    int result = cg_barrier(&group->group, &call, &who);
    leave(group->team);
    return finished(group, result, who, NULL);
}

static PyObject *group_all_reduce(PyObject *self, PyObject *args) {
    Group *group = (Group *)self;
    unsigned long tag;
    long long timeout;
    unsigned long long from, to;
    Py_ssize_t count;
    int dtype, op, in_place;
    PyObject *owner;
    if (!PyArg_ParseTuple(args, "kLKKniipO", &tag, &timeout, &from, &to, &count, &dtype, &op, &in_place, &owner)) return NULL;
    if (dtype < 0 || dtype >= CG_DTYPES || op < 0 || op >= CG_OPS || cg_find_kernel(dtype, op) == NULL)
        return PyErr_Format(PyExc_ValueError, "no kernel for dtype %d and op %d", dtype, op);
    if (count < 0 || count > MOST_BYTES || !is_memory((void *)(uintptr_t)from, (size_t)count * cg_dtype_bytes(dtype)) ||
        !is_memory((void *)(uintptr_t)to, (size_t)count * cg_dtype_bytes(dtype)))
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "%zd elements", count);
    cg_call call = {.tag = (uint32_t)tag, .call = call_word(&group->calls, in_place ? OP_ALL_REDUCE_ : OP_ALL_REDUCE), .deadline = deadline_after(timeout)};
    int who = 0;
    if (!enter(group->team)) return NULL;
    int result = cg_all_reduce(&group->group, &call, (void *)(uintptr_t)from, (void *)(uintptr_t)to, (size_t)count, dtype, op, in_place, &who);
    leave(group->team);
    return finished(group, result, who, owner);
}

/* A sequence of n blocks (address, rows, row, pitch); None for one that is not wanted. */
static int parse_blocks(PyObject *sequence, cg_block *blocks, int n) {
    if (PySequence_Size(sequence) != n) {
        if (!PyErr_Occurred()) PyErr_Format(PyExc_ValueError, "%d blocks are needed", n);
        return 0;
    }
    for (int i = 0; i < n; i++) {
        PyObject *item = PySequence_GetItem(sequence, i);
        if (item == NULL) return 0;
        memset(&blocks[i], 0, sizeof blocks[i]);
        unsigned long long base = 0;
        Py_ssize_t rows = 0, row = 0, pitch = 0;
        int fine = item == Py_None || PyArg_ParseTuple(item, "Knnn", &base, &rows, &row, &pitch);
        Py_DECREF(item);
        if (!fine) return 0;
        if (rows < 0 || row < 0 || pitch < 0 || row > MOST_BYTES || pitch > MOST_BYTES || (rows > 0 && row > MOST_BYTES / rows) ||
            (rows > 0 && pitch > MOST_BYTES / rows))
            return PyErr_Format(PyExc_ValueError, "a block of %zd rows of %zd bytes, %zd apart", rows, row, pitch), 0;
        size_t extent = rows > 0 && row > 0 ? (size_t)(rows - 1) * (size_t)pitch + (size_t)row : 0;
        if (!is_memory((void *)(uintptr_t)base, extent)) return 0;
        blocks[i] = (cg_block){(char *)(uintptr_t)base, (size_t)rows, (size_t)row, (size_t)pitch};
    }
    return 1;
}

static PyObject *group_all_gatherv(PyObject *self, PyObject *args) {
    Group *group = (Group *)self;
    unsigned long tag;
    long long timeout;
    unsigned long long mine;
    int operation;
    PyObject *sizes, *blocks, *owner;
    if (!PyArg_ParseTuple(args, "ikLKOOO", &operation, &tag, &timeout, &mine, &sizes, &blocks, &owner)) return NULL;
    int n = group->group.n;
    cg_block into[n];
    size_t bytes[n];
    if (!parse_blocks(blocks, into, n)) return NULL;
    if (PySequence_Size(sizes) != n) return PyErr_Format(PyExc_ValueError, "%d sizes are needed", n);
    for (int i = 0; i < n; i++) {
        PyObject *item = PySequence_GetItem(sizes, i);
        bytes[i] = item == NULL ? 0 : PyLong_AsSize_t(item);
        Py_XDECREF(item);
        if (PyErr_Occurred()) return NULL;
        if (bytes[i] > (size_t)MOST_BYTES || (into[i].base != NULL && cg_block_bytes(&into[i]) != bytes[i]))
            return PyErr_Format(PyExc_ValueError, "%zu bytes of rank %d", bytes[i], i);
    }
    if (!is_memory((void *)(uintptr_t)mine, bytes[group->group.me])) return NULL;
    cg_call call = {.tag = (uint32_t)tag, .call = call_word(&group->calls, operation), .deadline = deadline_after(timeout)};
    int who = 0;
    if (!enter(group->team)) return NULL;
    int result = cg_all_gatherv(&group->group, &call, (char *)(uintptr_t)mine, bytes, into, operation == OP_ALL_GATHER, &who);
    leave(group->team);
    return finished(group, result, who, owner);
}

static PyObject *group_all_to_allv(PyObject *self, PyObject *args) {
    Group *group = (Group *)self;
    unsigned long tag;
    long long timeout;
    PyObject *sends, *receives;
    if (!PyArg_ParseTuple(args, "kLOO", &tag, &timeout, &sends, &receives)) return NULL;
    int n = group->group.n;
    cg_block out[n], into[n];
    if (!parse_blocks(sends, out, n) || !parse_blocks(receives, into, n)) return NULL;
    cg_call call = {.tag = (uint32_t)tag, .call = call_word(&group->calls, OP_ALL_TO_ALL), .deadline = deadline_after(timeout)};
    int who = 0;
    if (!enter(group->team)) return NULL;
    int result = cg_all_to_allv(&group->group, &call, out, into, &who);
    leave(group->team);
    return finished(group, result, who, NULL);
}

static PyObject *group_reduce_scatter(PyObject *self, PyObject *args) {
    Group *group = (Group *)self;
    unsigned long tag;
    long long timeout;
    PyObject *sends, *owner;
    unsigned long long to;
    int dtype, op;
    if (!PyArg_ParseTuple(args, "kLOKiiO", &tag, &timeout, &sends, &to, &dtype, &op, &owner)) return NULL;
    if (dtype < 0 || dtype >= CG_DTYPES || op < 0 || op >= CG_OPS || cg_find_kernel(dtype, op) == NULL)
        return PyErr_Format(PyExc_ValueError, "no kernel for dtype %d and op %d", dtype, op);
    cg_block out[group->group.n];
    if (!parse_blocks(sends, out, group->group.n) || !is_memory((void *)(uintptr_t)to, cg_block_bytes(&out[group->group.me]))) return NULL;
    cg_call call = {.tag = (uint32_t)tag, .call = call_word(&group->calls, OP_REDUCE_SCATTER), .deadline = deadline_after(timeout)};
    int who = 0;
    if (!enter(group->team)) return NULL;
    int result = cg_reduce_scatter(&group->group, &call, out, (void *)(uintptr_t)to, dtype, op, &who);
    leave(group->team);
    return finished(group, result, who, owner);
}

static PyObject *group_ping_pong(PyObject *self, PyObject *args) {
    Group *group = (Group *)self;
    unsigned long tag;
    long long timeout;
    int rounds;
    if (!PyArg_ParseTuple(args, "kLi", &tag, &timeout, &rounds)) return NULL;
    cg_call call = {.tag = (uint32_t)tag, .call = call_word(&group->calls, OP_BARRIER), .deadline = deadline_after(timeout)};
    int who = 0;
    double ns = 0;
    if (!enter(group->team)) return NULL;
    int result = cg_ping_pong(&group->group, &call, rounds, &ns, &who);
    leave(group->team);
    if (result == CG_OK) return PyFloat_FromDouble(ns);
    return finished(group, result, who, NULL);
}

static PyObject *group_probe_cma(PyObject *self, PyObject *args) {
    Group *group = (Group *)self;
    unsigned long tag;
    long long timeout;
    if (!PyArg_ParseTuple(args, "kL", &tag, &timeout)) return NULL;
    cg_call call = {.tag = (uint32_t)tag, .call = call_word(&group->calls, OP_BARRIER), .deadline = deadline_after(timeout)};
    int who = 0;
    if (!enter(group->team)) return NULL;
    int result = cg_group_probe_cma(&group->group, &call, &who);
    leave(group->team);
    return finished(group, result, who, NULL);
}

static PyObject *get_has_cma(PyObject *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(((Group *)self)->group.cma_from != 0);
}

static PyObject *group_add_region(PyObject *self, PyObject *args) {
    Group *group = (Group *)self;
    PyObject *segment;
    Py_ssize_t offset, stride, bytes;
    if (!PyArg_ParseTuple(args, "Onnn", &segment, &offset, &stride, &bytes)) return NULL;
    if (!PyObject_TypeCheck(segment, state_of(self)->segment)) return PyErr_Format(PyExc_TypeError, "a Segment is needed");
    if (stride < 0 || stride > MOST_BYTES || bytes < 0 || bytes > MOST_BYTES ||
        !fits((Segment *)segment, offset, (size_t)(group->group.n - 1) * (size_t)stride + (size_t)bytes))
        return PyErr_Format(PyExc_ValueError, "the region does not fit into its segment");
    if (PyList_Append(group->regions, segment) < 0) return NULL;
    int error = cg_group_add_region(&group->group, ((Segment *)segment)->base + offset, (size_t)stride, (size_t)bytes);
    if (error == ENOSPC) return PyErr_Format(PyExc_RuntimeError, "a group has at most %d shared tensors", CG_MAX_REGIONS);
    return error ? PyErr_NoMemory() : Py_NewRef(Py_None);
}

/* Notes: the text of each rank's last call, for the error if the calls differ. */

static PyObject *group_post_note(PyObject *self, PyObject *arg) {
    Group *group = (Group *)self;
    char *text;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(arg, &text, &length) < 0) return NULL;
    if (length > CG_NOTE_BYTES - 4) length = CG_NOTE_BYTES - 4;
    char *note = group->group.notes + (size_t)group->group.me * CG_NOTE_BYTES;
    memcpy(note + 4, text, (size_t)length);
    atomic_store_explicit((_Atomic uint32_t *)(void *)note, (uint32_t)length, memory_order_release);
    Py_RETURN_NONE;
}

static PyObject *group_read_note(PyObject *self, PyObject *arg) {
    Group *group = (Group *)self;
    long rank = PyLong_AsLong(arg);
    if (rank < 0 || rank >= group->group.n) return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_IndexError, "rank %ld", rank);
    char *note = group->group.notes + (size_t)rank * CG_NOTE_BYTES;
    uint32_t length = atomic_load_explicit((_Atomic uint32_t *)(void *)note, memory_order_acquire);
    if (length == 0 || length > CG_NOTE_BYTES - 4) Py_RETURN_NONE;
    return PyBytes_FromStringAndSize(note + 4, (Py_ssize_t)length);
}

static PyObject *get_bytes_sent(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromUnsignedLongLong(((Group *)self)->group.bytes_sent);
}

static PyObject *get_busy(PyObject *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(((Calls *)self)->begun || ((Group *)self)->team->busy);
}

static PyGetSetDef group_getset[] = {
    CALLS_GETSET,
    {"busy", get_busy, NULL, "whether a native call is under way, or was begun and not ended", NULL},
    {"bytes_sent", get_bytes_sent, NULL, "bytes sent to other ranks", NULL},
    {"has_cma", get_has_cma, NULL, "whether the ranks access each other's memory (cross-memory attach)", NULL},
    {0}};
static PyMethodDef group_methods[] = {
    {"barrier", group_barrier, METH_VARARGS, "barrier(tag, timeout_ns)\n--\n\n"},
    {"all_reduce", group_all_reduce, METH_VARARGS, "all_reduce(tag, timeout_ns, from, to, count, dtype, op, in_place, owner)\n--\n\n"},
    {"all_gatherv", group_all_gatherv, METH_VARARGS, "all_gatherv(operation, tag, timeout_ns, mine, bytes, into, owner)\n--\n\n"},
    {"all_to_allv", group_all_to_allv, METH_VARARGS, "all_to_allv(tag, timeout_ns, out, into)\n--\n\n"},
    {"reduce_scatter", group_reduce_scatter, METH_VARARGS, "reduce_scatter(tag, timeout_ns, out, to, dtype, op, owner)\n--\n\n"},
    {"ping_pong", group_ping_pong, METH_VARARGS, "ping_pong(tag, timeout_ns, rounds)\n--\n\nNanoseconds, one way."},
    {"add_region", group_add_region, METH_VARARGS, "add_region(segment, offset, stride, bytes)\n--\n\n"},
    {"post_note", group_post_note, METH_O, "post_note(text)\n--\n\n"},
    {"read_note", group_read_note, METH_O, "read_note(rank)\n--\n\n"},
    {"probe_cma", group_probe_cma, METH_VARARGS, "probe_cma(tag, timeout_ns)\n--\n\nProbes cross-memory attach between all ranks."},
    {0}};
static PyType_Slot group_slots[] = {
    {Py_tp_doc, "Group(team, pool, offset, slot_bytes)\n--\n\nCollectives of a team."},
    {Py_tp_new, group_new}, {Py_tp_dealloc, group_dealloc},
    {Py_tp_methods, group_methods}, {Py_tp_getset, group_getset}, {0}};
PyType_Spec group_spec = {"commgraph.shm._native.Group", sizeof(Group), 0, Py_TPFLAGS_DEFAULT, group_slots};
