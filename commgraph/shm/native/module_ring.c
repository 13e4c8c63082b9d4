/* The Python type Ring: records from one member of a team to others. */
#include "any_ring.h"
#include "module_ring.h"

#include <string.h>

static PyObject *ring_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    PyObject *team, *pool;
    Py_ssize_t offset, capacity;
    int writer, first_reader, n_readers, collective, private;
    if (!PyArg_ParseTuple(args, "OOniiinpp", &team, &pool, &offset, &writer, &first_reader, &n_readers, &capacity, &collective, &private))
        return NULL;
    module_state *state = PyType_GetModuleState(type);
    if (state == NULL || !PyObject_TypeCheck(team, state->team) || !PyObject_TypeCheck(pool, state->pool))
        return PyErr_Format(PyExc_TypeError, "Ring(team, pool, offset, writer, first_reader, n_readers, capacity, collective, private)");
    int n = ((Team *)team)->team.n, me = ((Team *)team)->team.me, sound = writer >= 0 && writer < n && n_readers >= 1 && n_readers < n && first_reader >= 0 && first_reader < n;
    int end = sound ? first_reader + n_readers : 0; /* behind the last reader */
    if (sound && writer >= first_reader && writer < end) end++;
    if (!sound || end > n)
        return PyErr_Format(PyExc_ValueError, "a ring from member %d of %d to %d from %d on", writer, n, n_readers, first_reader);
    if (offset % CG_LINE || capacity < 1024 || capacity > MOST_BYTES || !fits(((Team *)team)->segment, offset, cg_ring_bytes(n_readers, (size_t)capacity)))
        return PyErr_Format(PyExc_ValueError, "a ring of %zd bytes at %zd does not fit into the segment", capacity, offset);
    if (private && n_readers != 1) return PyErr_Format(PyExc_ValueError, "a ring with %d readers cannot be private to two", n_readers);
    Ring *self = (Ring *)allocate(type);
    if (self == NULL) return NULL;
    char *memory = ((Team *)team)->segment->base + offset;
    int writes = ((Team *)team)->team.me == writer;
    self->team = private ? new_view(state, (Team *)team, cg_ring_bell(memory, writes), cg_ring_bell(memory, !writes)) : (Team *)Py_NewRef(team);
    if (self->team == NULL) {
        Py_DECREF(self);
        return NULL;
    }
    self->pool = (Pool *)Py_NewRef(pool);
    cg_ring_join(&self->ring, &self->team->team, memory, writer, first_reader, n_readers, (size_t)capacity);
    self->reads = me != writer && me >= first_reader && me < end;
    self->ring.collective = collective;
    self->ring.private = private;
    return (PyObject *)self;
}

/* Gives up on a part that was being read. 0 if another process may still write to its memory, which must then never be freed. */
static int release_part(Ring *ring) {
    int unused = 1;
    if (ring->ring.claimed != CG_UNOPENED) {
        Py_BEGIN_ALLOW_THREADS
        unused = cg_ring_give_up(&ring->ring);
        Py_END_ALLOW_THREADS
    }
    return unused;
}

static void ring_dealloc(PyObject *self) {
    Ring *ring = (Ring *)self;
    if (release_part(ring)) Py_XDECREF(ring->parts);
    cg_ring_leave(&ring->ring);
    Py_XDECREF((PyObject *)ring->team);
    Py_XDECREF((PyObject *)ring->pool);
    free_object(self);
}

void publish_posted(Ring *ring, uint64_t posted) {
    atomic_store_explicit(&ring->team->team.members[ring->team->team.me].posted, posted, memory_order_release);
}

int may_use(const Ring *ring, int writing) {
    if (writing ? ring->ring.writer == ring->team->team.me : ring->reads) return 1;
    PyErr_Format(PyExc_ValueError, "member %d does not %s this ring", ring->team->team.me, writing ? "write" : "read");
    return 0;
}

enum { FEW_PARTS = 8 };

int put_parts(Ring *ring, uint32_t kind, uint64_t meta, PyObject *given, int64_t deadline, uint64_t posted, recording *written, int *who) {
    Py_ssize_t n = PyTuple_Size(given), held = 0;
    if (n < 0 || !may_use(ring, 1)) return -1;
    cg_part few[FEW_PARTS], *parts = few;
    Py_buffer few_views[FEW_PARTS], *views = few_views;
    if (n > FEW_PARTS) {
        parts = PyMem_Malloc(sizeof *parts * (size_t)n);
        views = PyMem_Malloc(sizeof *views * (size_t)n);
    }
    size_t total = 0;
    int result = CG_NOMEM;
    if (parts != NULL && views != NULL) {
        for (; held < n; held++) {
            PyObject *item = PyTuple_GetItem(given, held);
            views[held].obj = NULL; /* no buffer to release */
            if (PyTuple_Check(item)) {
                unsigned long long address;
                Py_ssize_t bytes;
                if (!PyArg_ParseTuple(item, "Kn", &address, &bytes)) break;
                if (!is_memory((void *)(uintptr_t)address, (size_t)bytes)) break;
                parts[held] = (cg_part){(void *)(uintptr_t)address, (size_t)bytes};
                continue;
            }
            /* PyBUF_SIMPLE: contiguous bytes, or an error */
            if (PyObject_GetBuffer(item, &views[held], PyBUF_SIMPLE) < 0) break;
            parts[held] = (cg_part){views[held].buf, (size_t)views[held].len};
        }
        for (Py_ssize_t i = 0; i < held; i++) total += parts[i].bytes;
        if (held == n) {
            add_to_recording(written, total - (kind == DICT && n > 0 ? parts[0].bytes : 0));
            begin_work(ring->team, keeps_interpreter(ring->team, total));
            if (posted) publish_posted(ring, posted);
            result = cg_ring_put(&ring->ring, kind, meta, parts, (uint32_t)n, deadline, who);
            end_work(ring->team);
        } else result = -1;
    }
    for (Py_ssize_t i = 0; i < held; i++) PyBuffer_Release(&views[i]);
    if (n > FEW_PARTS) {
        PyMem_Free(parts);
        PyMem_Free(views);
    }
    return result;
}

/* put(kind, meta, parts, timeout_ns, posted, told=None): a part is a buffer, or (address, bytes) of memory that the caller keeps alive. */
static PyObject *ring_put(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Ring *ring = (Ring *)self;
    if (nargs != 5 && nargs != 6) return PyErr_Format(PyExc_TypeError, "put(kind, meta, parts, timeout_ns, posted, told=None)");
    told_call told;
    unsigned long kind = PyLong_AsUnsignedLong(args[0]);
    unsigned long long meta = PyLong_AsUnsignedLongLong(args[1]), posted = PyLong_AsUnsignedLongLong(args[4]);
    int64_t timeout = PyLong_AsLongLong(args[3]);
    if (PyErr_Occurred() || !parse_told(self, nargs == 6 ? args[5] : Py_None, &told) || !claim(ring->team)) return NULL;
    recording written;
    record_told(&written, &told, 1, ring->team);
    int who = 0, result = put_parts(ring, (uint32_t)kind, meta, args[2], deadline_after(timeout), posted, &written, &who);
    /* A poll that has found no room was no call. */
    end_recording(&written, result == CG_OK ? ENTRY_DONE : result == CG_TIMEOUT && timeout <= 0 ? 0 : ENTRY_FAILED);
    unclaim(ring->team);
    if (result < 0) return NULL;
    return result == CG_OK ? Py_NewRef(Py_None) : raise_stopped(self, result, who);
}

/* Waits for the next record, on a ring that was claimed. */
static int wait_next(Ring *ring, int64_t deadline, unsigned long long posted, int *who) {
    begin_work(ring->team, keeps_interpreter(ring->team, 0));
    if (posted) publish_posted(ring, posted);
    int result = cg_ring_next(&ring->ring, deadline, who);
    end_work(ring->team);
    return result;
}

static PyObject *ring_peek(PyObject *self, PyObject *args) {
    Ring *ring = (Ring *)self;
    long long timeout;
    unsigned long long posted;
    if (!PyArg_ParseTuple(args, "LK", &timeout, &posted)) return NULL;
    if (!may_use(ring, 0)) return NULL;
    int who = 0;
    if (!claim(ring->team)) return NULL;
    int result = wait_next(ring, deadline_after(timeout), posted, &who);
    PyObject *found = NULL;
    if (result == CG_OK) {
        const cg_record *record = &ring->ring.record;
        PyObject *sizes = PyTuple_New(record->n_parts);
        for (uint32_t i = 0; sizes != NULL && i < record->n_parts; i++) {
            PyObject *size = PyLong_FromSize_t(cg_ring_size(&ring->ring, i));
            if (size == NULL || PyTuple_SetItem(sizes, i, size) < 0) Py_CLEAR(sizes);
        }
        if (sizes != NULL) found = Py_BuildValue("(kKN)", (unsigned long)record->kind, (unsigned long long)record->meta, sizes);
    }
    unclaim(ring->team);
    return result == CG_OK ? found : raise_stopped(self, result, who);
}

/* Memory for the next part: bytes for the first, which is a pickle, a Block for the others. */
static char *new_part(Ring *ring, PyObject **part) {
    size_t index = (size_t)PyList_Size(ring->parts), bytes = cg_ring_size(&ring->ring, (uint32_t)index);
    if (index == 0) {
        *part = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)bytes);
        return *part == NULL ? NULL : PyBytes_AsString(*part);
    }
    Block *block = take_block((PyObject *)ring, ring->pool, bytes);
    *part = (PyObject *)block;
    return block == NULL ? NULL : block->base;
}

/* Reads what is left of the record to ring->parts, on a ring that was claimed. -1 with an error set, else the result. */
static int read_parts(Ring *ring, int64_t deadline, int *who) {
    for (;;) {
        Py_ssize_t have = PyList_Size(ring->parts);
        PyObject *part = have ? PyList_GetItem(ring->parts, have - 1) : NULL; /* borrowed */
        char *memory;
        if (have == 0 || ring->done == cg_ring_size(&ring->ring, (uint32_t)(have - 1))) {
            if ((uint32_t)have == ring->ring.record.n_parts) return CG_OK;
            memory = new_part(ring, &part);
            if (memory == NULL) return -1;
            int failed = PyList_Append(ring->parts, part) < 0;
            Py_DECREF(part); /* the list holds it */
            if (failed) return -1;
            have++;
            ring->done = 0;
        } else {
            memory = have == 1 ? PyBytes_AsString(part) : ((Block *)part)->base;
        }
        begin_work(ring->team, keeps_interpreter(ring->team, cg_ring_size(&ring->ring, (uint32_t)(have - 1))));
        int result = cg_ring_read(&ring->ring, (uint32_t)(have - 1), memory, &ring->done, deadline, who);
        end_work(ring->team);
        if (result != CG_OK) return result;
    }
}

PyObject *next_parts(Ring *ring, int64_t deadline, unsigned long long posted, int *result) {
    int who = 0;
    do {
        if (ring->parts == NULL) {
            *result = wait_next(ring, deadline, posted, &who);
            if (*result != CG_OK) return raise_stopped((PyObject *)ring, *result, who);
            ring->parts = PyList_New(0);
            ring->done = 0;
            if (ring->parts == NULL) return NULL;
        }
        *result = read_parts(ring, deadline, &who);
        if (*result == CG_RESTART) Py_CLEAR(ring->parts);
    } while (*result == CG_RESTART);
    if (*result != CG_OK) return *result < 0 ? NULL : raise_stopped((PyObject *)ring, *result, who);
    cg_ring_finish(&ring->ring);
    PyObject *parts = ring->parts;
    ring->parts = NULL;
    return parts;
}

/* How the entry of a receive ends that has got these parts, or NULL. */
static int state_of_receive(const Ring *ring, const told_call *told, const PyObject *parts, int result, int is_its) {
    if (parts == NULL) return result == CG_TIMEOUT ? 0 : ENTRY_FAILED; /* 0: nothing is lost, and the call can be made again */
    const cg_record *record = &ring->ring.record;
    if (told->for_all) return record->kind == told->kind && record->meta == told->meta ? ENTRY_DONE : ENTRY_FAILED;
    return record->kind == told->kind && is_its ? ENTRY_DONE : 0; /* else it is kept, and the call goes on, or another path makes it */
}

uint64_t size_of_record(const Ring *ring) {
    uint64_t bytes = 0;
    for (uint32_t i = ring->ring.record.kind == DICT; i < ring->ring.record.n_parts; i++) bytes += cg_ring_size(&ring->ring, i);
    return bytes;
}

PyObject *get_parts(Ring *ring, int64_t timeout_ns, uint64_t posted, const told_call *told, int (*is_its)(PyObject *), uint32_t *kind, uint64_t *meta) {
    if (!may_use(ring, 0) || !claim(ring->team)) return NULL;
    recording written;
    record_told(&written, told, 0, ring->team);
    int result;
    PyObject *parts = next_parts(ring, deadline_after(timeout_ns), posted, &result);
    *kind = ring->ring.record.kind;
    *meta = ring->ring.record.meta;
    if (parts != NULL) add_to_recording(&written, size_of_record(ring));
    end_recording(&written, state_of_receive(ring, told, parts, result, is_its == NULL || parts == NULL || is_its(parts)));
    unclaim(ring->team);
    return parts;
}

/* get(timeout_ns, posted, told=None): (kind, meta, parts); the first part is bytes, the others are Blocks. */
static PyObject *ring_get(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 2 && nargs != 3) return PyErr_Format(PyExc_TypeError, "get(timeout_ns, posted, told=None)");
    int64_t timeout = PyLong_AsLongLong(args[0]);
    unsigned long long posted = PyLong_AsUnsignedLongLong(args[1]);
    told_call told;
    if (PyErr_Occurred() || !parse_told(self, nargs == 3 ? args[2] : Py_None, &told)) return NULL;
    uint32_t kind;
    uint64_t meta;
    PyObject *parts = get_parts((Ring *)self, timeout, posted, &told, NULL, &kind, &meta);
    return parts == NULL ? NULL : Py_BuildValue("(kKN)", (unsigned long)kind, (unsigned long long)meta, parts);
}

static PyObject *ring_reading(PyObject *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(((Ring *)self)->parts != NULL);
}

/* Reads the parts of the record that `peek` found to `targets`, on a ring that was claimed. -1 with an error set, else the result. */
static int take_parts(Ring *ring, PyObject *targets, int64_t deadline, int *who) {
    Py_ssize_t n = PyTuple_Size(targets);
    if (n < 0) return -1;
    if (!ring->ring.in_record || ring->parts != NULL || (uint32_t)n != ring->ring.record.n_parts)
        return PyErr_SetString(PyExc_ValueError, "another number of parts"), -1;
    for (Py_ssize_t i = 0; i < n; i++) {
        unsigned long long address;
        Py_ssize_t bytes;
        if (!PyArg_ParseTuple(PyTuple_GetItem(targets, i), "Kn", &address, &bytes)) return -1;
        if (!is_memory((void *)(uintptr_t)address, (size_t)bytes)) return -1;
        if ((size_t)bytes != cg_ring_size(&ring->ring, (uint32_t)i)) return PyErr_Format(PyExc_ValueError, "part %zd has another size", i), -1;
        size_t done = 0;
        begin_work(ring->team, keeps_interpreter(ring->team, (size_t)bytes));
        int result = cg_ring_read(&ring->ring, (uint32_t)i, (void *)(uintptr_t)address, &done, deadline, who);
        end_work(ring->team);
        if (result != CG_OK) return result;
    }
    return CG_OK;
}

/* take(timeout_ns, ((address, bytes), ...), owner): reads the parts of the record that `peek` found into the caller's memory, which `owner`
 * keeps alive. False if the writer gave up on the record. */
static PyObject *ring_take(PyObject *self, PyObject *args) {
    Ring *ring = (Ring *)self;
    long long timeout;
    PyObject *targets, *owner;
    if (!PyArg_ParseTuple(args, "LO!O", &timeout, &PyTuple_Type, &targets, &owner) || !claim(ring->team)) return NULL;
    int who = 0, result = take_parts(ring, targets, deadline_after(timeout), &who);
    if (result > CG_OK && result != CG_RESTART && !release_part(ring)) Py_INCREF(owner); /* for ever */
    if (result >= CG_OK && result != CG_RESTART) cg_ring_finish(&ring->ring);
    unclaim(ring->team);
    if (result == CG_RESTART) Py_RETURN_FALSE;
    if (result != CG_OK) return result < 0 ? NULL : raise_stopped(self, result, who);
    Py_RETURN_TRUE;
}

/* any_ring(rings, timeout_ns): the index of the first ring that has a record, -1 if none has one in time. The caller is the only reader of
 * each. */
PyObject *module_any_ring(PyObject *module, PyObject *args) {
    PyObject *given;
    long long timeout;
    if (!PyArg_ParseTuple(args, "O!L", &PyTuple_Type, &given, &timeout)) return NULL;
    Py_ssize_t n = PyTuple_Size(given), claimed = 0;
    cg_ring **rings = PyMem_Malloc(sizeof *rings * (size_t)(n + 1));
    if (rings == NULL) return PyErr_NoMemory();
    module_state *state = PyModule_GetState(module);
    for (; claimed < n; claimed++) {
        PyObject *ring = PyTuple_GetItem(given, claimed);
        if (!PyObject_TypeCheck(ring, state->ring) || !((Ring *)ring)->ring.private || !((Ring *)ring)->reads) {
            PyErr_SetString(PyExc_TypeError, "any_ring(rings, timeout_ns): private rings that this member reads are needed");
            break;
        }
        if (!claim(((Ring *)ring)->team)) break;
        rings[claimed] = &((Ring *)ring)->ring;
    }
    int found = -1;
    if (claimed == n) {
        Py_BEGIN_ALLOW_THREADS
        found = cg_any_ring(rings, (int)n, deadline_after(timeout));
        Py_END_ALLOW_THREADS
    }
    for (Py_ssize_t i = 0; i < claimed; i++) unclaim(((Ring *)PyTuple_GetItem(given, i))->team);
    PyMem_Free(rings);
    return claimed == n ? PyLong_FromLong(found) : NULL;
}

static int set_zero_copy_from(PyObject *self, PyObject *value, void *closure) {
    (void)closure;
    size_t bytes = value == NULL ? 0 : PyLong_AsSize_t(value);
    if (PyErr_Occurred()) return -1;
    if (bytes && !((Ring *)self)->ring.private) {
        PyErr_SetString(PyExc_ValueError, "only a private ring has zero-copy parts");
        return -1;
    }
    ((Ring *)self)->ring.zero_copy_from = bytes;
    return 0;
}

static PyObject *ring_leave_out(PyObject *self, PyObject *arg) {
    cg_ring *ring = &((Ring *)self)->ring;
    long reader = PyLong_AsLong(arg);
    if (reader < 0 || reader >= ring->n_readers) return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_IndexError, "reader %ld", reader);
    return PyBool_FromLong(cg_ring_leave_out(ring, (int)reader));
}

static PyMethodDef ring_methods[] = {
    {"put", (PyCFunction)(void (*)(void))ring_put, METH_FASTCALL, "put(kind, meta, parts, timeout_ns, posted, told=None)\n--\n\nWrites a record."},
    {"get", (PyCFunction)(void (*)(void))ring_get, METH_FASTCALL, "get(timeout_ns, posted, told=None)\n--\n\n(kind, meta, parts) of the next record."},
    {"peek", ring_peek, METH_VARARGS, "peek(timeout_ns, posted)\n--\n\n(kind, meta, sizes) of the next record, which stays."},
    {"take", ring_take, METH_VARARGS, "take(timeout_ns, targets, owner)\n--\n\nReads the parts of the record that `peek` returned; False: the writer gave up."},
    {"leave_out", ring_leave_out, METH_O, "leave_out(reader)\n--\n\nGoes on without a reader that has not joined; False if it has."},
    {0}};
static PyGetSetDef ring_getset[] = {
    {"reading", ring_reading, NULL, "whether a `get` ended inside a record: only another `get` may follow", NULL},
    {"zero_copy_from", NULL, set_zero_copy_from, "bytes from which a part is zero-copy: copied from process to process; 0: none is", NULL},
    {0}};
static PyType_Slot ring_slots[] = {
    {Py_tp_doc, "Ring(team, pool, offset, writer, first_reader, n_readers, capacity, collective, private)\n--\n\nRecords from one member to others; `private`: to "
                "one, with a view of its own, so that a thread may use it while another is in a call of the team."},
    {Py_tp_new, ring_new}, {Py_tp_dealloc, ring_dealloc}, {Py_tp_methods, ring_methods}, {Py_tp_getset, ring_getset}, {0}};
PyType_Spec ring_spec = {"commgraph.shm._native.Ring", sizeof(Ring), 0, Py_TPFLAGS_DEFAULT, ring_slots};
