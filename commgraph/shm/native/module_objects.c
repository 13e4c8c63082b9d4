/* The fast path of all_gather_object and broadcast_object: pickles that go as records for all ranks. */
#include "module_fast.h"
#include "module_ring.h"

enum { OBJECT_CALLS = 128 }; /* operations of objects are numbered from it, apart from those of tensors (objects_shm.py) */

/* A call, as the record names it and as ranks that wait for this one read it. */
typedef struct {
    uint64_t meta, posted;
    int64_t deadline;
    recording written;
} object_call;

/* The group, where it can make the call natively: rings (one by each rank) and hash are those of the call. NULL, with or without an error. */
static Group *open_group(FastCalls *fast, Calls *calls, PyObject *rings, PyObject *arguments, PyObject *timeout, int64_t *timeout_ns) {
    Group *group = calls == NULL ? NULL : in_shared_memory(calls);
    if (group == NULL || !is_usable(fast, calls) || parse_timeout((PyObject *)fast, timeout, fast->timeout_ns, timeout_ns) <= 0) return NULL;
    if (!PyTuple_Check(arguments) || !PyTuple_Check(rings) || PyTuple_Size(rings) != calls->n)
        return PyErr_SetString(PyExc_TypeError, "a tuple of a ring for each rank, and one of arguments, are needed"), NULL;
    module_state *state = state_of((PyObject *)group);
    for (int rank = 0; rank < calls->n; rank++) {
        Ring *ring = (Ring *)PyTuple_GetItem(rings, rank);
        if (!PyObject_TypeCheck((PyObject *)ring, state->ring) || ring->team != group->team || ring->ring.writer != rank || !ring->ring.collective)
            return PyErr_Format(PyExc_TypeError, "ring %d is not the one that rank %d writes for all others", rank, rank), NULL;
    }
    /* Refused by the general path, or a part of a call that it makes. */
    return calls->begun || (PyDict_Size(calls->claims) && PyDict_Contains(calls->claims, Py_None)) ? NULL : group;
}

/* Counts a call of a group that was claimed, and begins its entry. `arguments`: the second one is the name of the operation. */
static void begin_object_call(object_call *call, Group *group, uint32_t hash, int64_t timeout_ns, GroupRecord *record, PyObject *arguments, int root) {
    uint64_t number = group->calls.sequence++;
    uint32_t tag = make_tag(0, number, hash); /* 0: a collective */
    *call = (object_call){number << 32 | tag, (number + 1) << 8 | OBJECT_CALLS | (tag & (OBJECT_CALLS - 1)), deadline_after(timeout_ns), {0}};
    if (record == NULL) return;
    PyObject *operation = PyTuple_Size(arguments) > 1 ? PyTuple_GetItem(arguments, 1) : Py_None;
    begin_recording(&call->written, record, &(call_facts){.named = operation, .strategy = "shm", .peer = root, .sequence = number}, group->team);
}

/* Puts this rank's record for all. 0 with an error set. */
static int put_record(Ring *mine, object_call *call, PyObject *parts) {
    int who = 0, result = put_parts(mine, OBJECT, call->meta, parts, call->deadline, call->posted, &call->written, &who);
    if (result > CG_OK) raise_stopped((PyObject *)mine, result, who);
    return result == CG_OK;
}

static int is_of(const Ring *ring, const object_call *call) { return ring->ring.record.kind == OBJECT && ring->ring.record.meta == call->meta; }

/* Whether a record of these parts is one piece of bytes that the ring takes at once. */
static int is_small(PyObject *parts, Py_ssize_t room) {
    if (!PyTuple_Check(parts) || PyTuple_Size(parts) != 1) return 0;
    PyObject *pickled = PyTuple_GetItem(parts, 0);
    return PyBytes_CheckExact(pickled) && PyBytes_Size(pickled) <= room;
}

/* The record of one rank: its bytes, or (kind, meta, parts) where it is another record, or of several parts. */
static PyObject *read_from(Ring *ring, const object_call *call) {
    int result;
    PyObject *parts = next_parts(ring, call->deadline, call->posted, &result);
    if (parts == NULL) return NULL;
    if (is_of(ring, call) && PyList_Size(parts) == 1) {
        PyObject *pickled = Py_NewRef(PyList_GetItem(parts, 0));
        Py_DECREF(parts);
        return pickled;
    }
    return Py_BuildValue("(kKN)", (unsigned long)ring->ring.record.kind, (unsigned long long)ring->ring.record.meta, parts);
}

/* Puts this rank's record and reads the others: a list of `read_from` in rank order, in this rank's place its own pickle. */
static PyObject *exchange(Group *group, PyObject *rings, PyObject *parts, object_call *call) {
    int n = group->calls.n, me = group->calls.me;
    PyObject *found = PyList_New(n);
    int fine = found != NULL && put_record((Ring *)PyTuple_GetItem(rings, me), call, parts);
    for (int rank = 0; fine && rank < n; rank++) {
        PyObject *one = rank == me ? Py_NewRef(PyTuple_GetItem(parts, 0)) : read_from((Ring *)PyTuple_GetItem(rings, rank), call);
        fine = one != NULL && PyList_SetItem(found, rank, one) == 0;
    }
    if (!fine) Py_CLEAR(found);
    return found;
}

static int are_pickles(PyObject *found) {
    for (Py_ssize_t rank = 0; rank < PyList_Size(found); rank++)
        if (!PyBytes_CheckExact(PyList_GetItem(found, rank))) return 0;
    return 1;
}

/* Pickles and exchanges, on a group that was claimed. */
static PyObject *gather(Group *group, PyObject *const *args, Py_ssize_t room, object_call *call) {
    PyObject *parts = PyObject_CallObject(args[3], args[4]), *found = NULL;
    if (parts == NULL) return NULL;
    if (is_small(parts, room)) {
        found = exchange(group, args[0], parts, call);
        if (found == NULL || are_pickles(found)) {
            Py_DECREF(parts);
            return found;
        }
    }
    PyObject *rest = Py_BuildValue("(NN)", parts, found == NULL ? Py_NewRef(Py_None) : found);
    if (rest != NULL && PyDict_SetItem(group->calls.claims, Py_None, rest) < 0) Py_CLEAR(rest);
    return rest;
}

/* all_gather_object(rings, room, hash, dumps, (group, operation, obj), timeout, record): None if the general path has to make the call. Else it has
 * the number that was the group's `sequence`, and `dumps` has returned the parts of this rank's record. A list: what each rank put, pickles
 * all. A tuple, if the general path has to go on: the parts, and what each rank put (`exchange`), None where this rank has put nothing. The
 * turn of the collectives is then under way, claimed by this very tuple, until the caller ends it. */
PyObject *do_all_gather_object(FastCalls *fast, Calls *calls, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 7) return PyErr_Format(PyExc_TypeError, "all_gather_object(rings, room, hash, dumps, arguments, timeout, record)");
    Py_ssize_t room = PyLong_AsSsize_t(args[1]);
    uint32_t hash = (uint32_t)PyLong_AsUnsignedLong(args[2]);
    int64_t timeout_ns;
    GroupRecord *record;
    Group *group = PyErr_Occurred() || !record_of((PyObject *)fast, args[6], &record) ? NULL : open_group(fast, calls, args[0], args[4], args[5], &timeout_ns);
    if (group == NULL) return not_handled();
    if (!claim(group->team)) return NULL;
    object_call call;
    begin_object_call(&call, group, hash, timeout_ns, record, args[4], -1);
    PyObject *found = gather(group, args, room, &call);
    /* The general path goes on with an entry of its own. */
    end_recording(&call.written, found == NULL ? ENTRY_FAILED : PyList_Check(found) ? ENTRY_DONE : 0);
    unclaim(group->team);
    return found;
}

/* The parts of the record of `src`, from there. */
static PyObject *read_record(Ring *ring, int src, object_call *call, int *result) {
    PyObject *parts = next_parts(ring, call->deadline, call->posted, result);
    if (parts != NULL) add_to_recording(&call->written, size_of_record(ring));
    if (parts == NULL || is_of(ring, call)) return parts;
    Py_DECREF(parts);
    return raise_stopped((PyObject *)ring, CG_MISMATCH, src);
}

/* broadcast_object(rings, hash, src, dumps, (group, operation, obj), timeout, record): None if the general path has to make the call. Else it has the
 * number that was the group's `sequence`, whether it fails or not: on `src` the parts that `dumps` returned, elsewhere a list of those that
 * came. */
PyObject *do_broadcast_object(FastCalls *fast, Calls *calls, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 7) return PyErr_Format(PyExc_TypeError, "broadcast_object(rings, hash, src, dumps, arguments, timeout, record)");
    uint32_t hash = (uint32_t)PyLong_AsUnsignedLong(args[1]);
    int64_t timeout_ns;
    GroupRecord *record;
    Group *group = PyErr_Occurred() || !record_of((PyObject *)fast, args[6], &record) ? NULL : open_group(fast, calls, args[0], args[4], args[5], &timeout_ns);
    int src = group == NULL ? -1 : rank_of(args[2], calls->n);
    if (src < 0) return not_handled();
    if (!claim(group->team)) return NULL;
    object_call call;
    begin_object_call(&call, group, hash, timeout_ns, record, args[4], src);
    Ring *ring = (Ring *)PyTuple_GetItem(args[0], src);
    const int mine = src == calls->me;
    int result = CG_OK;
    PyObject *parts = mine ? PyObject_CallObject(args[3], args[4]) : read_record(ring, src, &call, &result);
    /* An object that nothing was sent of, or of which nothing came: the call can be made again. */
    int failed = (mine && parts == NULL) || result == CG_TIMEOUT ? 0 : ENTRY_FAILED;
    if (parts != NULL && mine && !put_record(ring, &call, parts)) Py_CLEAR(parts);
    end_recording(&call.written, parts == NULL ? failed : ENTRY_DONE);
    unclaim(group->team);
    return parts;
}
