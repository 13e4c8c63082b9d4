/* The fast path of messages between the ranks of a host: plain tensors, and dicts of them, checked in C.
 *
 * As those of module_fast.c the methods return None, with nothing sent or read, if an argument is not plain. Fast and general path tag
 * alike, so that the two ranks of a message may take different ones. */
#include "module_messages.h"
#include "module_ring.h"

#include <string.h>

enum { LABEL_SHIFT = 8 }; /* of the kind of a record of tensors, as in commgraph/shm/mailbox.py */
enum { FEW_TENSORS = 32, DESCRIPTION = 4096 };
/* The first byte of the description of a plain dict, where a pickle has 0x80. */
enum { PLAIN = 1 };

/* Header of an item in the description of a dict. Of a tensor its shape and its key follow. Of a plain value `lanes` is 0, `code` is a
 * VALUE_*, `ndim` the number of its bytes, and these and the key follow. */
typedef struct {
    dl_dtype kind;
    uint32_t ndim, key_bytes;
} item_header;
enum { VALUE_NONE, VALUE_FALSE, VALUE_TRUE, VALUE_INT, VALUE_FLOAT, VALUE_STR };

/* NULL with an error set. */
static Ring *ring_of(PyObject *self, PyObject *ring) {
    if (PyObject_TypeCheck(ring, state_of(self)->ring)) return (Ring *)ring;
    PyErr_SetString(PyExc_TypeError, "a Ring is needed");
    return NULL;
}

static int code_of(dl_dtype kind) { return kind.code << 8 | kind.bits; }

/* 64 bits of a shape. */
static uint64_t hash_shape(const view *v) {
    uint64_t hash = 1 + (uint64_t)v->ndim;
    for (int i = 0; i < v->ndim; i++) {
        hash = (hash ^ (uint64_t)v->shape[i]) * 0x9E3779B97F4A7C15ull;
        hash ^= hash >> 32;
    }
    return hash;
}

static PyObject *shape_of(const view *v) {
    PyObject *shape = PyTuple_New(v->ndim);
    for (int i = 0; shape != NULL && i < v->ndim; i++) {
        PyObject *extent = PyLong_FromLongLong(v->shape[i]);
        if (extent == NULL || PyTuple_SetItem(shape, i, extent) != 0) Py_CLEAR(shape);
    }
    return shape;
}

int message_digest(Messages *messages, const view *v, int label, uint32_t *digest) {
    int code = code_of(v->kind);
    uint64_t hash = hash_shape(v) ^ (uint64_t)label << 40;
    known_kind *cell = &messages->known[(hash ^ (uint64_t)code << 32) * 0x9E3779B97F4A7C15ull >> 58];
    if (cell->kind == code && cell->shape == hash) {
        *digest = cell->digest;
        return 1;
    }
    PyObject *shape = shape_of(v), *answer = shape == NULL ? NULL : PyObject_CallFunction(messages->digest, "iOi", code, shape, label);
    Py_XDECREF(shape);
    *digest = answer == NULL ? 0 : (uint32_t)PyLong_AsUnsignedLong(answer);
    Py_XDECREF(answer);
    if (PyErr_Occurred()) return 0;
    *cell = (known_kind){code, hash, *digest};
    return 1;
}

int label_of(PyObject *lane, int *label) {
    PyObject *tag = PyTuple_Check(lane) && PyTuple_Size(lane) == 3 ? PyTuple_GetItem(lane, 2) : NULL; /* borrowed */
    if (tag == NULL) return PyErr_SetString(PyExc_TypeError, "a lane is (rank, whether it is sent to it, tag)"), 0;
    *label = (int)PyLong_AsLong(tag);
    return !PyErr_Occurred();
}

/* Whether a receive of that label from any rank is under way: 0 or 1, -1 with an error set. */
static int receives_from_any(Messages *messages, PyObject *lane) {
    if (PyDict_Size(messages->claims) < 2 || PyTuple_GetItem(lane, 1) == Py_True) return 0; /* the lane itself is one */
    PyObject *any = Py_BuildValue("(iOO)", ANY_RANK, Py_False, PyTuple_GetItem(lane, 2));
    int found = any == NULL ? -1 : PyDict_Contains(messages->claims, any);
    Py_XDECREF(any);
    return found;
}

int claim_lane(Messages *messages, PyObject *lane, uint64_t *number) {
    int taken = PyDict_Contains(messages->claims, lane);
    if (taken < 0 || (taken == 0 && PyDict_SetItem(messages->claims, lane, lane) < 0)) return 0;
    if (taken == 0 && (taken = receives_from_any(messages, lane)) != 0) PyDict_DelItem(messages->claims, lane);
    if (taken) {
        if (taken > 0) PyErr_SetString(state_of((PyObject *)messages)->busy, "another message of this kind, with this very rank, is under way: one thread at a time may have one");
        return 0;
    }
    PyObject *count = PyDict_GetItemWithError(messages->counts, lane); /* borrowed */
    *number = count == NULL ? 0 : PyLong_AsUnsignedLongLong(count);
    if (!PyErr_Occurred()) return 1;
    PyDict_DelItem(messages->claims, lane);
    return 0;
}

void unclaim_lane(Messages *messages, PyObject *lane, int64_t number) {
    PyObject *kind, *value, *trace, *count = NULL;
    PyErr_Fetch(&kind, &value, &trace);
    if (number >= 0 && ((count = PyLong_FromLongLong(number + 1)) == NULL || PyDict_SetItem(messages->counts, lane, count) < 0)) PyErr_WriteUnraisable(lane);
    Py_XDECREF(count);
    if (PyDict_DelItem(messages->claims, lane) < 0) PyErr_Clear();
    PyErr_Restore(kind, value, trace);
}

void record_message(recording *r, GroupRecord *record, PyObject *lane, const char *operation, PyObject *named, const view *v, Team *team) {
    *r = (recording){0};
    if (record == NULL) return;
    int peer = (int)PyLong_AsLong(PyTuple_GetItem(lane, 0)), tag = (int)PyLong_AsLong(PyTuple_GetItem(lane, 2));
    if (PyErr_Occurred()) PyErr_Clear();
    call_facts facts = {.operation = operation, .named = named, .strategy = team == NULL ? "tcp" : "shm", .family = FAMILY_TENSORS, .peer = peer,
                        .kind = PyTuple_GetItem(lane, 1) == Py_True ? ENTRY_OUTGOING : ENTRY_INCOMING, .tag = tag, .tensor = v};
    begin_recording(r, record, &facts, team);
}

static PyObject *messages_send(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Messages *messages = (Messages *)self;
    if (nargs != 5) return PyErr_Format(PyExc_TypeError, "send(ring, x, lane, timeout, record)");
    view v;
    Ring *ring = ring_of(self, args[0]);
    GroupRecord *record;
    int64_t timeout;
    int label;
    if (ring == NULL || !label_of(args[2], &label) || !record_of(self, args[4], &record) || !may_use(ring, 1) || is_unwatched(messages->tensors) <= 0 ||
        parse_timeout(self, args[3], messages->timeout_ns, &timeout) <= 0 || view_tensor(messages->tensors, args[1], &v) <= 0)
        return not_handled();
    uint32_t digest;
    uint64_t number;
    if (!message_digest(messages, &v, label, &digest) || !claim_lane(messages, args[2], &number)) return NULL;
    int who = 0, result = -1;
    if (claim(ring->team)) {
        cg_part part = {v.data, v.bytes};
        const uint32_t kind = TENSORS | (uint32_t)label << LABEL_SHIFT;
        recording written;
        record_message(&written, record, args[2], "send", NULL, &v, ring->team);
        begin_work(ring->team, keeps_interpreter(ring->team, v.bytes));
        result = cg_ring_put(&ring->ring, kind, make_tag(MESSAGE, number, digest), &part, 1, deadline_after(timeout), &who);
        end_work(ring->team);
        end_recording(&written, result == CG_OK ? ENTRY_DONE : ENTRY_FAILED);
        unclaim(ring->team);
    }
    unclaim_lane(messages, args[2], result < 0 ? -1 : (int64_t)number);
    if (result != CG_OK) return result < 0 ? NULL : raise_stopped(self, result, who);
    messages->sent += v.bytes;
    return Py_NewRef(Py_True);
}

/* Reads a shape of Python into v. 0 if it has no elements, or is not plain. */
static int parse_shape(PyObject *size, view *v) {
    Py_ssize_t ndim = PyTuple_Check(size) ? PyTuple_Size(size) : 1;
    if (ndim > MAX_DIMS) return 0;
    int64_t count = 1;
    for (Py_ssize_t i = 0; i < ndim; i++) {
        PyObject *extent = PyTuple_Check(size) ? PyTuple_GetItem(size, i) : size;
        int overflow;
        if (!PyLong_CheckExact(extent)) return 0;
        v->shape[i] = PyLong_AsLongLongAndOverflow(extent, &overflow);
        if (overflow || v->shape[i] <= 0 || v->shape[i] > INT64_MAX / (int64_t)v->size / count) return 0;
        count *= v->shape[i];
    }
    v->ndim = (int)ndim;
    v->bytes = (size_t)count * v->size;
    return 1;
}

/* Reads the next message into the memory for it, if it has this kind, tag and size: 1. 0 if it has not, and nothing was read. -1 with an error
 * set, and `*kept` if another process may still write to that memory. */
static int read_tensor(Ring *ring, uint32_t wanted, uint64_t tag, const awaited *a, GroupRecord *record, PyObject *lane, int *kept) {
    const size_t bytes = a->v.bytes;
    *kept = 0;
    if (!claim(ring->team)) return -1;
    if (ring->parts != NULL) { /* a record that another receive has begun to read */
        unclaim(ring->team);
        return 0;
    }
    recording written;
    record_message(&written, record, lane, "recv", NULL, &a->v, ring->team);
    begin_work(ring->team, keeps_interpreter(ring->team, bytes));
    int who = 0, mine = 0, result = cg_ring_next(&ring->ring, a->deadline, &who);
    if (result == CG_OK) {
        const cg_record *next = &ring->ring.record;
        mine = next->kind == wanted && next->meta == tag && next->n_parts == 1 && cg_ring_size(&ring->ring, 0) == bytes;
        size_t done = 0;
        if (mine) result = cg_ring_read(&ring->ring, 0, a->memory, &done, a->deadline, &who);
    }
    if (mine && result != CG_RESTART) {
        if (result != CG_OK) *kept = !cg_ring_give_up(&ring->ring);
        cg_ring_finish(&ring->ring);
    }
    end_work(ring->team);
    const int elsewhere = result == CG_RESTART || (result == CG_OK && !mine); /* the writer gave up on it, or it is another one */
    end_recording(&written, elsewhere ? 0 : result == CG_OK ? ENTRY_DONE : ENTRY_FAILED);
    unclaim(ring->team);
    if (elsewhere || result == CG_OK) return !elsewhere;
    raise_stopped((PyObject *)ring, result, who);
    return -1;
}

int parse_awaited(Messages *messages, Pool *pool, PyObject *size, PyObject *code, PyObject *given, PyObject *timeout, awaited *a) {
    long kind = PyLong_AsLong(code);
    int64_t ns;
    if (PyErr_Occurred() || parse_timeout((PyObject *)messages, timeout, messages->timeout_ns, &ns) <= 0) return 0;
    if (kind < 0 || kind > 0xFFFF || (kind & 0xFF) == 0 || kind % 8) return PyErr_Format(PyExc_ValueError, "kind %ld of a tensor", kind), 0;
    view out;
    *a = (awaited){.v = {.kind = {(uint8_t)(kind >> 8), (uint8_t)kind, 1}, .size = (size_t)(kind & 0xFF) / 8}, .deadline = deadline_after(ns)};
    if (!parse_shape(size, &a->v)) return 0;
    if (given == Py_None) {
        a->memory = cg_pool_take(pool->pool, a->v.bytes);
        return a->memory != NULL; /* else the general path raises, and the group stays usable */
    }
    if (view_tensor(messages->tensors, given, &out) <= 0 || code_of(out.kind) != kind || out.ndim != a->v.ndim ||
        memcmp(out.shape, a->v.shape, sizeof *out.shape * (size_t)out.ndim) || may_fill(messages->tensors, given) <= 0)
        return 0;
    a->out = given;
    a->memory = out.data;
    return 1;
}

PyObject *received(Messages *messages, const awaited *a) {
    if (a->out == NULL) return tensor_over(messages->tensors, a->memory, a->v.kind, a->v.ndim, a->v.shape);
    return mark_as_written(messages->tensors, a->out) ? Py_NewRef(a->out) : NULL;
}

static PyObject *messages_recv(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Messages *messages = (Messages *)self;
    if (nargs != 7) return PyErr_Format(PyExc_TypeError, "recv(ring, size, kind, out, lane, timeout, record)");
    Ring *ring = ring_of(self, args[0]);
    GroupRecord *record;
    awaited a;
    int label;
    if (ring == NULL || !label_of(args[4], &label) || !record_of(self, args[6], &record) || !may_use(ring, 0) || messages->tensors->exchange == NULL || is_unwatched(messages->tensors) <= 0 ||
        !parse_awaited(messages, ring->pool, args[1], args[2], args[3], args[5], &a))
        return not_handled();
    uint32_t digest;
    uint64_t number;
    int kept = 0, came = -1;
    if (message_digest(messages, &a.v, label, &digest) && claim_lane(messages, args[4], &number)) {
        came = read_tensor(ring, TENSORS | (uint32_t)label << LABEL_SHIFT, make_tag(MESSAGE, number, digest), &a, record, args[4], &kept);
        unclaim_lane(messages, args[4], came > 0 ? (int64_t)number : -1);
    }
    if (came > 0) return received(messages, &a);
    if (a.out == NULL && !kept) cg_pool_give(a.memory);
    if (a.out != NULL && kept) Py_INCREF(a.out); /* for ever */
    return came < 0 ? NULL : not_handled();
}

/* Dicts of plain tensors: one record, of a description and the memory of each. */

static int append(char *description, size_t *at, const void *data, size_t bytes) {
    if (bytes > DESCRIPTION - *at) return 0;
    memcpy(description + *at, data, bytes);
    *at += bytes;
    return 1;
}

/* A dict as the parts of a record. */
typedef struct {
    char description[DESCRIPTION];
    size_t length;
    PyObject *held[FEW_TENSORS]; /* references: another thread may change the dict meanwhile */
    cg_part parts[1 + FEW_TENSORS];
    Py_ssize_t n;
} packed_dict;

/* Appends a plain value. 0 if it is not plain. */
static int pack_value(packed_dict *p, const char *key, size_t key_bytes, PyObject *value) {
    int64_t number;
    double real;
    const void *data = NULL;
    Py_ssize_t bytes = 0;
    int code, overflow;
    if (value == Py_None) code = VALUE_NONE;
    else if (PyBool_Check(value)) code = value == Py_True ? VALUE_TRUE : VALUE_FALSE;
    else if (PyLong_CheckExact(value)) {
        number = PyLong_AsLongLongAndOverflow(value, &overflow);
        if (overflow) return 0;
        code = VALUE_INT, data = &number, bytes = sizeof number;
    } else if (PyFloat_CheckExact(value)) {
        real = PyFloat_AsDouble(value);
        code = VALUE_FLOAT, data = &real, bytes = sizeof real;
    } else if (PyUnicode_CheckExact(value)) {
        code = VALUE_STR, data = PyUnicode_AsUTF8AndSize(value, &bytes);
        if (data == NULL) return PyErr_Clear(), 0; /* half of a surrogate pair: a pickle can hold it */
        if (bytes > DESCRIPTION) return 0;
    } else return 0;
    item_header e = {{(uint8_t)code, 0, 0}, (uint32_t)bytes, (uint32_t)key_bytes};
    return append(p->description, &p->length, &e, sizeof e) && append(p->description, &p->length, data, (size_t)bytes) &&
           append(p->description, &p->length, key, key_bytes);
}

/* Appends an item. 0, with or without an error, if it is not plain. */
static int pack_item(Messages *messages, packed_dict *p, PyObject *key, PyObject *value) {
    view v;
    Py_ssize_t key_bytes;
    if (!PyUnicode_CheckExact(key)) return 0;
    const char *text = PyUnicode_AsUTF8AndSize(key, &key_bytes);
    if (text == NULL) {
        PyErr_Clear(); /* half of a surrogate pair: a pickle can hold it */
        return 0;
    }
    if (key_bytes > DESCRIPTION) return 0;
    if (Py_TYPE(value) != messages->tensors->tensor_type) return pack_value(p, text, (size_t)key_bytes, value);
    if (p->n == FEW_TENSORS) return 0;
    p->held[p->n++] = Py_NewRef(value);
    if (view_tensor(messages->tensors, value, &v) <= 0) return 0;
    item_header e = {v.kind, (uint32_t)v.ndim, (uint32_t)key_bytes};
    p->parts[p->n] = (cg_part){v.data, v.bytes};
    return append(p->description, &p->length, &e, sizeof e) &&
           append(p->description, &p->length, v.shape, sizeof *v.shape * (size_t)v.ndim) && append(p->description, &p->length, text, (size_t)key_bytes);
}

static PyObject *messages_put_dict(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Messages *messages = (Messages *)self;
    if (nargs != 6) return PyErr_Format(PyExc_TypeError, "put_dict(ring, tensors, meta, timeout_ns, posted, told)");
    uint64_t meta = PyLong_AsUnsignedLongLong(args[2]), posted = PyLong_AsUnsignedLongLong(args[4]);
    int64_t timeout = PyLong_AsLongLong(args[3]);
    if (PyErr_Occurred()) return NULL;
    Ring *ring = ring_of(self, args[0]);
    told_call told;
    /* A torch that could not read such a record sends none. */
    if (ring == NULL || !parse_told(self, args[5], &told) || !may_use(ring, 1) || !PyDict_CheckExact(args[1]) || messages->tensors->exchange == NULL || is_unwatched(messages->tensors) <= 0) return not_handled();
    packed_dict p;
    p.description[0] = PLAIN;
    p.length = 1;
    p.n = 0;
    PyObject *key, *value, *sent = NULL;
    int plain = 1;
    for (Py_ssize_t position = 0; plain && PyDict_Next(args[1], &position, &key, &value);) {
        Py_INCREF(key); /* another thread may change the dict meanwhile */
        plain = pack_item(messages, &p, key, value);
        Py_DECREF(key);
    }
    if (!plain) sent = not_handled();
    else {
        p.parts[0] = (cg_part){p.description, p.length};
        size_t bytes = 0;
        for (Py_ssize_t i = 0; i <= p.n; i++) bytes += p.parts[i].bytes;
        if (claim(ring->team)) {
            recording written;
            record_told(&written, &told, 1, ring->team);
            add_to_recording(&written, bytes - p.length);
            begin_work(ring->team, keeps_interpreter(ring->team, bytes));
            if (posted) publish_posted(ring, posted);
            int who = 0, result = cg_ring_put(&ring->ring, DICT, meta, p.parts, 1 + (uint32_t)p.n, deadline_after(timeout), &who);
            end_work(ring->team);
            end_recording(&written, result == CG_OK ? ENTRY_DONE : ENTRY_FAILED);
            unclaim(ring->team);
            sent = result == CG_OK ? Py_NewRef(Py_True) : raise_stopped(self, result, who);
            if (result == CG_OK) messages->sent += bytes;
        }
    }
    for (Py_ssize_t i = 0; i < p.n; i++) Py_DECREF(p.held[i]);
    return sent;
}

static int consume(const char *description, size_t length, size_t *at, void *to, size_t bytes) {
    if (bytes > length - *at) return 0;
    memcpy(to, description + *at, bytes);
    *at += bytes;
    return 1;
}

/* Adds the next item to the dict, if it is a plain value: 1. 0 if it is a tensor, -1 with an error set. */
static int add_value(PyObject *dict, const char *description, size_t length, size_t *at) {
    item_header e;
    size_t after = *at;
    if (!consume(description, length, &after, &e, sizeof e) || e.kind.lanes != 0) return 0;
    const char *data = description + after, *key = data + e.ndim;
    int fits = e.ndim <= length - after && e.key_bytes <= length - after - e.ndim;
    int64_t number;
    double real;
    PyObject *value = NULL;
    if (!fits) value = NULL;
    else if (e.kind.code == VALUE_NONE) value = Py_NewRef(Py_None);
    else if (e.kind.code == VALUE_FALSE || e.kind.code == VALUE_TRUE) value = PyBool_FromLong(e.kind.code == VALUE_TRUE);
    else if (e.kind.code == VALUE_INT && e.ndim == sizeof number) value = (memcpy(&number, data, sizeof number), PyLong_FromLongLong(number));
    else if (e.kind.code == VALUE_FLOAT && e.ndim == sizeof real) value = (memcpy(&real, data, sizeof real), PyFloat_FromDouble(real));
    else if (e.kind.code == VALUE_STR) value = PyUnicode_DecodeUTF8(data, (Py_ssize_t)e.ndim, "strict");
    if (value == NULL) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "the description of a dict of tensors is damaged");
        return -1;
    }
    PyObject *name = PyUnicode_DecodeUTF8(key, (Py_ssize_t)e.key_bytes, "strict");
    int added = name != NULL && PyDict_SetItem(dict, name, value) == 0;
    Py_XDECREF(name);
    Py_DECREF(value);
    *at = after + e.ndim + e.key_bytes;
    return added ? 1 : -1;
}

/* Adds the next tensor, over its block, to the dict. 0 with an error set. */
static int add_tensor(Messages *messages, PyObject *dict, const char *description, size_t length, size_t *at, PyObject *part) {
    item_header e;
    int64_t shape[MAX_DIMS];
    size_t bytes;
    int sound = consume(description, length, at, &e, sizeof e) && e.ndim <= MAX_DIMS && consume(description, length, at, shape, sizeof *shape * e.ndim) &&
                e.key_bytes <= length - *at && PyObject_TypeCheck(part, state_of((PyObject *)messages)->block) && ((Block *)part)->base != NULL;
    if (sound) {
        bytes = e.kind.bits / 8;
        for (uint32_t i = 0; sound && i < e.ndim; i++) sound = shape[i] >= 0 && !__builtin_mul_overflow(bytes, (size_t)shape[i], &bytes);
        sound = sound && e.kind.lanes == 1 && e.kind.bits > 0 && e.kind.bits % 8 == 0 && bytes == (size_t)((Block *)part)->bytes;
    }
    if (!sound) {
        PyErr_SetString(PyExc_ValueError, "the description of a dict of tensors does not fit what came with it");
        return 0;
    }
    PyObject *key = PyUnicode_DecodeUTF8(description + *at, (Py_ssize_t)e.key_bytes, "strict");
    *at += e.key_bytes;
    if (key == NULL) return 0;
    void *memory = ((Block *)part)->base;
    ((Block *)part)->base = NULL; /* the tensor owns it now */
    PyObject *tensor = tensor_over(messages->tensors, memory, e.kind, (int)e.ndim, shape);
    int added = tensor != NULL && PyDict_SetItem(dict, key, tensor) == 0;
    Py_DECREF(key);
    Py_XDECREF(tensor);
    return added;
}

/* Whether the record of a dict, with these parts, is described by this module. */
static int is_plain_dict(PyObject *parts) {
    char *description;
    Py_ssize_t length;
    PyObject *first = PyList_Size(parts) > 0 ? PyList_GetItem(parts, 0) : NULL;
    return first != NULL && PyBytes_AsStringAndSize(first, &description, &length) == 0 && length > 0 && description[0] == PLAIN;
}

/* The dict of a record; None if it is not a plain one. */
static PyObject *messages_unpack(PyObject *self, PyObject *parts) {
    char *description;
    Py_ssize_t length, n = PyList_Size(parts);
    PyObject *first = n > 0 ? PyList_GetItem(parts, 0) : NULL;
    if (first == NULL || PyBytes_AsStringAndSize(first, &description, &length) < 0) return not_handled();
    if (length == 0 || description[0] != PLAIN || ((Messages *)self)->tensors->exchange == NULL) Py_RETURN_NONE;
    PyObject *dict = PyDict_New();
    size_t at = 1;
    Py_ssize_t i = 1;
    while (dict != NULL && at < (size_t)length) {
        int value = add_value(dict, description, (size_t)length, &at);
        if (value > 0) continue;
        if (value < 0 || i == n || !add_tensor((Messages *)self, dict, description, (size_t)length, &at, PyList_GetItem(parts, i++))) {
            if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "the description of a dict of tensors does not fit what came with it");
            Py_CLEAR(dict);
        }
    }
    if (dict != NULL && i != n) {
        PyErr_SetString(PyExc_ValueError, "the description of a dict of tensors does not fit what came with it");
        Py_CLEAR(dict);
    }
    return dict;
}

/* The dict of the next record, if that is a plain one; else (kind, meta, parts), as Ring.get has it. */
static PyObject *messages_get_dict(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "get_dict(ring, timeout_ns, told)");
    Ring *ring = ring_of(self, args[0]);
    int64_t timeout = PyLong_AsLongLong(args[1]);
    told_call told;
    if (ring == NULL || PyErr_Occurred() || !parse_told(self, args[2], &told)) return NULL;
    uint32_t kind;
    uint64_t meta;
    PyObject *parts = get_parts(ring, timeout, 0, &told, is_plain_dict, &kind, &meta);
    if (parts == NULL) return NULL;
    PyObject *dict = kind == DICT ? messages_unpack(self, parts) : Py_NewRef(Py_None);
    if (dict != Py_None) {
        Py_DECREF(parts);
        return dict;
    }
    Py_DECREF(dict);
    return Py_BuildValue("(kKN)", (unsigned long)kind, (unsigned long long)meta, parts);
}

static PyObject *messages_sent(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromUnsignedLongLong(((Messages *)self)->sent);
}

static PyObject *messages_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    PyObject *tensors, *digest, *counts, *claims;
    long long timeout_ns;
    if (!PyArg_ParseTuple(args, "OOLO!O!", &tensors, &digest, &timeout_ns, &PyDict_Type, &counts, &PyDict_Type, &claims)) return NULL;
    module_state *state = PyType_GetModuleState(type);
    if (state == NULL || !PyObject_TypeCheck(tensors, state->tensors))
        return PyErr_Format(PyExc_TypeError, "Messages(tensors, digest, timeout_ns, counts, claims)");
    Messages *self = (Messages *)allocate(type);
    if (self == NULL) return NULL;
    self->tensors = (Tensors *)Py_NewRef(tensors);
    self->digest = Py_NewRef(digest);
    self->timeout_ns = timeout_ns;
    self->counts = Py_NewRef(counts);
    self->claims = Py_NewRef(claims);
    return (PyObject *)self;
}

static void messages_dealloc(PyObject *self) {
    Py_XDECREF((PyObject *)((Messages *)self)->tensors);
    Py_XDECREF(((Messages *)self)->digest);
    Py_XDECREF(((Messages *)self)->counts);
    Py_XDECREF(((Messages *)self)->claims);
    free_object(self);
}

#define FAST(name, doc) {#name, (PyCFunction)(void (*)(void))messages_##name, METH_FASTCALL, doc}
static PyMethodDef messages_methods[] = {
    FAST(send, "send(ring, x, lane, timeout, record)\n--\n\nTrue, or None."),
    FAST(recv, "recv(ring, size, kind, out, lane, timeout, record)\n--\n\nThe tensor, or None."),
    FAST(send_linked, "send_linked(net, x, dst, lane, timeout, record)\n--\n\nTrue, or None."),
    FAST(recv_linked, "recv_linked(net, size, kind, out, src, lane, timeout, record)\n--\n\nThe tensor, or None."),
    FAST(swap_linked, "swap_linked(net, x, dst, size, kind, out, src, there, here, timeout, record)\n--\n\nThe tensor that came, or None. there, here: lanes."),
    FAST(offer_linked, "offer_linked(net, x, dst, lane, operation, record)\n--\n\nTrue once the kernel has all of it; else a Late: the net sends the rest. None: not plain."),
    FAST(put_dict, "put_dict(ring, tensors, meta, timeout_ns, posted, told)\n--\n\nTrue, or None."),
    FAST(get_dict, "get_dict(ring, timeout_ns, told)\n--\n\nThe plain dict of the next record, else (kind, meta, parts)."),
    {"unpack", messages_unpack, METH_O, "unpack(parts)\n--\n\nThe plain dict of a record, or None."},
    {0}};
static PyGetSetDef messages_getset[] = {{"bytes_sent", messages_sent, NULL, "bytes that these calls sent", NULL}, {0}};
static PyType_Slot messages_slots[] = {
    {Py_tp_doc, "Messages(tensors, digest, timeout_ns, counts, claims)\n--\n\nNative messages through rings and over links."},
    {Py_tp_new, messages_new}, {Py_tp_dealloc, messages_dealloc}, {Py_tp_methods, messages_methods}, {Py_tp_getset, messages_getset}, {0}};
PyType_Spec messages_spec = {"commgraph.shm._native.Messages", sizeof(Messages), 0, Py_TPFLAGS_DEFAULT, messages_slots};
