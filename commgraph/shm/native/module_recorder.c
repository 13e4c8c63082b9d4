/* The Python types Recorder, which writes the record of one rank's calls, and GroupRecord, of those of one coordinator. All of it runs under the
 * interpreter's lock. */
#include "recorder.h"
#include "module_sites.h"

#include <string.h>
#include <time.h>

enum { NAMES = 64, OUTER = 64, PROBES = 256, LANES = 1 << 14 };
/* First byte of a text in the arena: a name, or JSON about a group or about the rank. */
enum { TEXT_NAME = 1, TEXT_GROUP = 2, TEXT_FACTS = 3 };

/* A call of several parts that is under way on a thread: the calls of the same group that it makes have no entries of their own. */
typedef struct {
    uint64_t thread;
    uint16_t group;
    cg_entry *entry;
    uint64_t number;
} outer_call;

/* Messages of one kind between this rank and another one, which are numbered for themselves. */
typedef struct {
    uint64_t key; /* 0: none */
    uint64_t count;
    int32_t tag;
} lane_count;

struct Recorder {
    PyObject_HEAD
    Segment *segment;
    Tensors *tensors;
    PyObject *texts;  /* dict: text -> index */
    PyObject *dtypes; /* dict: dtype -> name */
    PyObject *shape, *nbytes, *dtype; /* names, interned */
    cg_record_header *header;
    cg_entry *entries;
    uint64_t count; /* of texts */
    int n_outer;
    outer_call outer[OUTER];
    call_sites sites;
    lane_count lanes[LANES];
    struct {
        const char *name;
        uint16_t index;
    } names[NAMES];
    uint16_t kinds[65536 / 8]; /* index of a dtype's name by DLPack's code and bits / 8 */
};

/* Appends a text to the arena; its index, 0 where there is no room (text 0 is empty). */
static uint32_t append_text(Recorder *self, int kind, const char *text, size_t bytes) {
    cg_record_header *header = self->header;
    uint64_t used = atomic_load_explicit(&header->texts_used, memory_order_relaxed);
    if (bytes >= 1 << 24 || used + 4 + bytes > header->texts_bytes || self->count > UINT32_MAX - 1) return 0;
    char *at = (char *)header + header->texts_offset + used;
    uint32_t head = (uint32_t)kind << 24 | (uint32_t)bytes;
    memcpy(at, &head, sizeof head);
    memcpy(at + sizeof head, text, bytes);
    atomic_store_explicit(&header->texts_used, used + 4 + bytes, memory_order_release);
    return (uint32_t)self->count++;
}

uint32_t index_of(Recorder *self, PyObject *text) {
    PyObject *known = PyDict_GetItemWithError(self->texts, text); /* borrowed */
    if (known != NULL) return (uint32_t)PyLong_AsUnsignedLong(known);
    Py_ssize_t bytes;
    const char *utf8 = PyErr_Occurred() ? NULL : PyUnicode_AsUTF8AndSize(text, &bytes);
    if (utf8 == NULL) return PyErr_Clear(), 0;
    uint32_t index = append_text(self, TEXT_NAME, utf8, (size_t)bytes);
    PyObject *number = PyLong_FromUnsignedLong(index);
    if (number == NULL || PyDict_SetItem(self->texts, text, number) < 0) PyErr_Clear();
    Py_XDECREF(number);
    return index;
}

/* The same for a literal of C, by its address. */
static uint16_t index_of_name(Recorder *self, const char *name) {
    size_t at = ((uintptr_t)name >> 2) % NAMES;
    for (int i = 0; i < NAMES; i++, at = (at + 1) % NAMES) {
        if (self->names[at].name == name) return self->names[at].index;
        if (self->names[at].name == NULL) {
            PyObject *text = PyUnicode_FromString(name);
            self->names[at].index = text == NULL ? 0 : (uint16_t)index_of(self, text);
            self->names[at].name = name;
            Py_XDECREF(text);
            return self->names[at].index;
        }
    }
    return 0;
}

static void set_view(Recorder *self, cg_entry *entry, const view *v) {
    int kind = v->kind.code << 8 | v->kind.bits;
    entry->dtype = self->kinds[(kind & 0xFFFF) / 8];
    entry->ndim = (uint8_t)v->ndim;
    for (int i = 0; i < v->ndim && i < ENTRY_DIMS; i++) entry->shape[i] = v->shape[i];
    entry->bytes = v->bytes;
    entry->tensors = 1;
}

/* The entry that a call of this group, on this thread, is a part of; NULL if it is a whole one. */
static cg_entry *outer_of(Recorder *self, uint64_t thread, uint16_t group) {
    for (int i = self->n_outer - 1; i >= 0; i--)
        if (self->outer[i].thread == thread && self->outer[i].group == group) return self->outer[i].entry;
    return NULL;
}

/* Sets the number of a collective of several parts to that of its first part: those that were begun before it come first. */
static void number_outer(cg_entry *outer, uint64_t sequence) {
    if (outer->kind == 0 && !outer->unused[0]) outer->sequence = sequence, outer->unused[0] = 1;
}

static void number_outer_by(cg_entry *outer, PyObject *sequence) {
    uint64_t number = PyLong_AsUnsignedLongLong(sequence);
    if (PyErr_Occurred()) PyErr_Clear();
    else number_outer(outer, number);
}

/* Takes the next entry that is not of a call under way, and fills in what every entry has. */
static cg_entry *take_entry(Recorder *self, uint64_t thread) {
    cg_record_header *header = self->header;
    uint64_t number = atomic_load_explicit(&header->next, memory_order_relaxed), mask = header->capacity - 1;
    cg_entry *entry = NULL;
    for (uint64_t i = 0; i < PROBES && i <= mask; i++) {
        cg_entry *one = &self->entries[(number + i) & mask];
        if ((atomic_load_explicit(&one->state, memory_order_relaxed) & 7) == ENTRY_OPEN) continue;
        entry = one;
        number += i;
        break;
    }
    if (entry == NULL) {
        atomic_fetch_add_explicit(&header->dropped, 1, memory_order_relaxed);
        return NULL;
    }
    atomic_store_explicit(&entry->state, 0, memory_order_release);
    atomic_store_explicit(&header->next, number + 1, memory_order_relaxed);
    memset((char *)entry + sizeof entry->state, 0, sizeof *entry - sizeof entry->state);
    entry->thread = thread;
    /* The lowest bits of a number say which entry it is: a token needs nothing else. */
    entry->sequence = number;
    return entry;
}

/* Shows an entry to readers. `take_entry` has left its number in `sequence`. */
static void open_entry(Recorder *self, cg_entry *entry, uint64_t sequence) {
    uint64_t number = entry->sequence;
    entry->sequence = sequence;
    entry->begin = cg_clock_ns();
    atomic_store_explicit(&entry->state, (number + 1) << 3 | ENTRY_OPEN, memory_order_release);
    /* The ring is larger than a cache, and was last written a turn ago: the next entry comes from memory while this call runs. */
    cg_entry *next = &self->entries[(number + 1) & (self->header->capacity - 1)];
    __builtin_prefetch(next, 1);
    __builtin_prefetch((char *)next + CG_LINE, 1);
}

static uint64_t this_thread(void) { return (uint64_t)PyThread_get_thread_ident(); }

cg_entry *record_begin(const GroupRecord *record, const char *operation, uint16_t strategy, uint64_t sequence, const view *v, int root,
                       const char *reduction) {
    Recorder *self = record->recorder;
    uint64_t thread = this_thread();
    cg_entry *entry = self->n_outer ? outer_of(self, thread, record->group) : NULL;
    if (entry != NULL) {
        entry->bytes += v->bytes;
        number_outer(entry, sequence);
        entry = NULL;
    } else if ((entry = take_entry(self, thread)) != NULL) {
        entry->group = record->group;
        entry->operation = index_of_name(self, operation);
        entry->strategy = strategy;
        entry->peer = root;
        entry->reduction = reduction == NULL ? 0 : index_of_name(self, reduction);
        if (v->bytes > 0) set_view(self, entry, v);
        open_entry(self, entry, sequence);
    }
    return entry;
}

void record_site(Recorder *self, cg_entry *entry) { entry->site = find_site(&self->sites, self, entry->thread, entry->operation); }

void record_tensor(Recorder *self, cg_entry *entry, const view *v) {
    if (entry != NULL) set_view(self, entry, v);
}

static void close_entry(cg_entry *entry, int64_t end, int state) {
    entry->end = end;
    uint64_t number = atomic_load_explicit(&entry->state, memory_order_relaxed) >> 3;
    atomic_store_explicit(&entry->state, number << 3 | (uint64_t)state, memory_order_release);
}

void record_end(cg_entry *entry, int state) {
    if (entry != NULL) close_entry(entry, cg_clock_ns(), state);
}

void record_cancel(cg_entry *entry) {
    if (entry != NULL) atomic_store_explicit(&entry->state, 0, memory_order_release);
}

int record_of(PyObject *self, PyObject *value, GroupRecord **record) {
    *record = value == Py_None ? NULL : (GroupRecord *)value;
    if (*record == NULL || PyObject_TypeCheck(value, state_of(self)->group_record)) return 1;
    PyErr_SetString(PyExc_TypeError, "a GroupRecord is needed, or None");
    return 0;
}

/* Adds a tensor of any kind. 0 with an error set. */
static int add_any_tensor(Recorder *self, cg_entry *entry, PyObject *x) {
    view v;
    if (self->tensors != NULL && look_at_tensor(self->tensors, x, &v)) {
        uint64_t before = entry->bytes;
        uint16_t tensors = entry->tensors;
        if (!tensors) set_view(self, entry, &v);
        entry->bytes = before + v.bytes;
        entry->tensors = (uint16_t)(tensors + 1);
        return 1;
    }
    PyObject *nbytes = PyObject_GetAttr(x, self->nbytes);
    entry->bytes += nbytes == NULL ? 0 : PyLong_AsUnsignedLongLong(nbytes);
    Py_XDECREF(nbytes);
    if (entry->tensors++ == 0 && !PyErr_Occurred()) {
        PyObject *dtype = PyObject_GetAttr(x, self->dtype), *shape = PyObject_GetAttr(x, self->shape);
        PyObject *name = dtype == NULL ? NULL : PyDict_GetItemWithError(self->dtypes, dtype); /* borrowed */
        if (name != NULL) entry->dtype = (uint16_t)index_of(self, name);
        Py_ssize_t ndim = shape == NULL ? -1 : PySequence_Size(shape);
        entry->ndim = ndim < 0 ? 0 : (uint8_t)ndim;
        for (Py_ssize_t i = 0; i < ndim && i < ENTRY_DIMS; i++) {
            PyObject *extent = PySequence_GetItem(shape, i);
            entry->shape[i] = extent == NULL ? 0 : PyLong_AsLongLong(extent);
            Py_XDECREF(extent);
        }
        Py_XDECREF(dtype);
        Py_XDECREF(shape);
    }
    return !PyErr_Occurred();
}

/* Adds what a call moves: None, a number of bytes, a tensor, or a list or tuple of tensors. An error of it is nobody's: it is dropped. */
static void add_moved(Recorder *self, cg_entry *entry, PyObject *x) {
    if (x == Py_None) return;
    if (PyMemoryView_Check(x)) entry->bytes += (uint64_t)PyObject_Size(x);
    else if (PyLong_CheckExact(x)) entry->bytes += PyLong_AsUnsignedLongLong(x);
    else if (PyList_Check(x) || PyTuple_Check(x)) {
        Py_ssize_t n = PySequence_Size(x);
        for (Py_ssize_t i = 0; i < n; i++) {
            PyObject *one = PySequence_GetItem(x, i);
            if (one == NULL || !add_any_tensor(self, entry, one)) PyErr_Clear();
            Py_XDECREF(one);
        }
    } else add_any_tensor(self, entry, x);
    if (PyErr_Occurred()) PyErr_Clear();
}

/* The last entry of a thread and a group that is open. */
static cg_entry *last_of(Recorder *self, uint64_t thread, uint16_t group) {
    uint64_t mask = self->header->capacity - 1, next = atomic_load_explicit(&self->header->next, memory_order_relaxed);
    for (uint64_t i = 1; i <= next && i <= mask; i++) {
        cg_entry *one = &self->entries[(next - i) & mask];
        if ((atomic_load_explicit(&one->state, memory_order_relaxed) & 7) == ENTRY_OPEN && one->thread == thread && one->group == group) return one;
    }
    return NULL;
}

static cg_entry *entry_of(Recorder *self, PyObject *token, uint64_t *number) {
    *number = PyLong_AsUnsignedLongLong(token);
    if (PyErr_Occurred()) return PyErr_Clear(), NULL;
    cg_entry *entry = &self->entries[(*number - 1) & (self->header->capacity - 1)];
    return atomic_load_explicit(&entry->state, memory_order_relaxed) == (*number << 3 | ENTRY_OPEN) ? entry : NULL;
}

/* The count of a lane; NULL where there are more lanes than are counted: their messages all have number 0. */
static uint64_t *count_of(Recorder *self, uint16_t lanes, const cg_entry *entry) {
    uint64_t key = 1 | (uint64_t)entry->kind << 1 | (uint64_t)entry->family << 4 | (uint64_t)lanes << 8 | (uint64_t)(uint32_t)(entry->peer + 1) << 24;
    uint64_t at = (key ^ (uint64_t)(uint32_t)entry->tag << 40) * 0x9E3779B97F4A7C15ull >> 50;
    for (int i = 0; i < 64; i++, at = (at + 1) % LANES) {
        lane_count *lane = &self->lanes[at];
        if (lane->key == 0) *lane = (lane_count){key, 0, entry->tag};
        if (lane->key == key && lane->tag == entry->tag) return &lane->count;
    }
    return NULL;
}

static int is_message(const cg_entry *entry) { return entry->kind == ENTRY_OUTGOING || entry->kind == ENTRY_INCOMING; }

/* The number of the next message of an entry's kind, which is one more then. */
static uint64_t next_number(const GroupRecord *record, const cg_entry *entry) {
    uint64_t *count = count_of(record->recorder, record->lanes, entry);
    return count == NULL ? 0 : (*count)++;
}

static void cancel(const GroupRecord *record, cg_entry *entry) {
    uint64_t *count = is_message(entry) ? count_of(record->recorder, record->lanes, entry) : NULL;
    if (count != NULL) --*count;
    record_cancel(entry);
}

/* Of native calls that write their own entries. */

static void place(void *of) {
    recording *r = of;
    if (r->entry == NULL || r->part || r->placed) return;
    r->placed = 1;
    PyObject *kind, *value, *trace;
    PyErr_Fetch(&kind, &value, &trace);
    record_site(r->record->recorder, r->entry);
    PyErr_Restore(kind, value, trace);
}

void begin_recording(recording *r, GroupRecord *record, const call_facts *facts, Team *team) {
    *r = (recording){.record = record, .team = team};
    if (record == NULL) return;
    Recorder *self = record->recorder;
    uint64_t thread = this_thread();
    r->entry = self->n_outer ? outer_of(self, thread, record->group) : NULL;
    if (r->entry != NULL) {
        r->part = 1;
        r->bytes = facts->tensor == NULL ? 0 : facts->tensor->bytes;
        number_outer(r->entry, facts->sequence);
        return;
    }
    cg_entry *entry = r->entry = take_entry(self, thread);
    if (entry == NULL) return;
    entry->group = record->group;
    entry->operation = facts->named == NULL ? index_of_name(self, facts->operation) : (uint16_t)index_of(self, facts->named);
    entry->strategy = index_of_name(self, facts->strategy);
    entry->kind = (uint8_t)facts->kind;
    entry->family = (uint8_t)facts->family;
    entry->peer = facts->peer;
    entry->tag = facts->tag;
    if (facts->tensor != NULL) set_view(self, entry, facts->tensor);
    open_entry(self, entry, is_message(entry) ? next_number(record, entry) : facts->sequence);
    if (team == NULL) place(r);
    else team->before_release = place, team->releasing = r;
}

void add_to_recording(recording *r, uint64_t bytes) {
    if (r->part) r->bytes += bytes;
    else if (r->entry != NULL) r->entry->bytes += bytes;
}

void end_recording(recording *r, int state) {
    if (r->record == NULL) return;
    if (r->team != NULL) r->team->before_release = NULL;
    if (r->entry == NULL) return;
    if (r->part) {
        if (state) r->entry->bytes += r->bytes;
    } else if (state) {
        int64_t end = cg_clock_ns();
        place(r);
        close_entry(r->entry, end, state);
    } else cancel(r->record, r->entry);
}

int parse_told(PyObject *self, PyObject *given, told_call *told) {
    *told = (told_call){0};
    if (given == Py_None) return 1;
    if (!PyTuple_Check(given) || PyTuple_Size(given) != 5) {
        PyErr_SetString(PyExc_TypeError, "(record, operation, kind, peer, meta) is needed, or None");
        return 0;
    }
    if (!record_of(self, PyTuple_GetItem(given, 0), &told->record)) return 0;
    told->operation = PyTuple_GetItem(given, 1); /* borrowed: the caller holds the tuple */
    told->kind = (uint32_t)PyLong_AsUnsignedLong(PyTuple_GetItem(given, 2));
    told->peer = (int)PyLong_AsLong(PyTuple_GetItem(given, 3));
    PyObject *meta = PyTuple_GetItem(given, 4);
    told->for_all = meta != Py_None;
    told->meta = told->for_all ? PyLong_AsUnsignedLongLong(meta) : 0;
    return !PyErr_Occurred();
}

void record_told(recording *r, const told_call *told, int outgoing, Team *team) {
    call_facts facts = {.named = told->operation, .strategy = "shm", .peer = told->peer};
    if (told->for_all) facts.sequence = told->meta >> 32;
    else facts.kind = outgoing ? ENTRY_OUTGOING : ENTRY_INCOMING, facts.family = (int)told->kind;
    begin_recording(r, told->record, &facts, team);
}

/* The type GroupRecord. */

static PyObject *record_begin_call(PyObject *object, PyObject *const *args, Py_ssize_t nargs) {
    const GroupRecord *record = (GroupRecord *)object;
    Recorder *self = record->recorder;
    if (nargs < 5 || nargs > 8)
        return PyErr_Format(PyExc_TypeError, "begin(operation, strategy, sequence, message, peer, moved=None, reduction=None, outer=False)");
    PyObject *moved = nargs > 5 ? args[5] : Py_None, *reduction = nargs > 6 ? args[6] : Py_None;
    uint64_t thread = this_thread();
    cg_entry *outer = self->n_outer ? outer_of(self, thread, record->group) : NULL;
    if (outer != NULL) {
        uint16_t tensors = outer->tensors;
        outer->tensors = (uint16_t)(tensors + 1); /* only bytes are added: the entry is of the call, and not of its parts */
        add_moved(self, outer, moved);
        outer->tensors = tensors;
        number_outer_by(outer, args[2]);
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    }
    int family = 0, kind = 0, tag = 0;
    if (args[3] != Py_None && (!PyTuple_Check(args[3]) || !PyArg_ParseTuple(args[3], "iii", &family, &kind, &tag)))
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_TypeError, "a message is (family, kind, tag)");
    cg_entry *entry = take_entry(self, thread);
    if (entry == NULL) Py_RETURN_NONE;
    uint64_t number = entry->sequence + 1, sequence = PyLong_AsUnsignedLongLong(args[2]);
    entry->group = record->group;
    entry->operation = (uint16_t)index_of(self, args[0]);
    record_site(self, entry);
    entry->strategy = args[1] == Py_None ? 0 : (uint16_t)index_of(self, args[1]);
    entry->family = (uint8_t)family;
    entry->kind = (uint8_t)kind;
    entry->tag = tag;
    entry->peer = (int32_t)PyLong_AsLong(args[4]);
    if (PyErr_Occurred()) return NULL;
    if (is_message(entry)) sequence = next_number(record, entry);
    add_moved(self, entry, moved);
    if (reduction != Py_None) entry->reduction = (uint16_t)index_of(self, reduction);
    open_entry(self, entry, sequence);
    if (nargs > 7 && args[7] == Py_True && self->n_outer < OUTER) self->outer[self->n_outer++] = (outer_call){thread, record->group, entry, number};
    return PyLong_FromUnsignedLongLong(number);
}

static void drop_outer(Recorder *self, uint64_t number) {
    for (int i = self->n_outer - 1; i >= 0; i--)
        if (self->outer[i].number == number) {
            memmove(&self->outer[i], &self->outer[i + 1], sizeof *self->outer * (size_t)(self->n_outer - i - 1));
            self->n_outer--;
            return;
        }
}

static PyObject *record_done(PyObject *object, PyObject *const *args, Py_ssize_t nargs) {
    Recorder *self = ((GroupRecord *)object)->recorder;
    if (nargs != 1 && nargs != 2) return PyErr_Format(PyExc_TypeError, "done(token, moved=None)");
    uint64_t number;
    cg_entry *entry = entry_of(self, args[0], &number);
    if (entry != NULL) {
        if (nargs == 2) add_moved(self, entry, args[1]);
        record_end(entry, ENTRY_DONE);
    }
    if (self->n_outer) drop_outer(self, number);
    Py_RETURN_NONE;
}

static PyObject *record_fail(PyObject *object, PyObject *token) {
    Recorder *self = ((GroupRecord *)object)->recorder;
    uint64_t number;
    record_end(entry_of(self, token, &number), ENTRY_FAILED);
    drop_outer(self, number);
    Py_RETURN_NONE;
}

static PyObject *record_cancel_call(PyObject *object, PyObject *token) {
    const GroupRecord *record = (GroupRecord *)object;
    uint64_t number;
    cg_entry *entry = entry_of(record->recorder, token, &number);
    if (entry != NULL) cancel(record, entry);
    drop_outer(record->recorder, number);
    Py_RETURN_NONE;
}

/* The call of several parts that is under way on this thread. */
static cg_entry *under_way(const GroupRecord *record) {
    return record->recorder->n_outer ? outer_of(record->recorder, this_thread(), record->group) : NULL;
}

static PyObject *record_add(PyObject *object, PyObject *moved) {
    const GroupRecord *record = (GroupRecord *)object;
    cg_entry *outer = under_way(record);
    if (outer != NULL) add_moved(record->recorder, outer, moved);
    Py_RETURN_NONE;
}

static PyObject *record_number(PyObject *object, PyObject *sequence) {
    cg_entry *outer = under_way((GroupRecord *)object);
    if (outer != NULL) number_outer_by(outer, sequence);
    Py_RETURN_NONE;
}

static PyObject *record_assign(PyObject *object, PyObject *peer) {
    const GroupRecord *record = (GroupRecord *)object;
    long rank = PyLong_AsLong(peer);
    if (rank == -1 && PyErr_Occurred()) return NULL;
    cg_entry *entry = last_of(record->recorder, this_thread(), record->group);
    if (entry != NULL) {
        uint64_t *count = count_of(record->recorder, record->lanes, entry);
        if (count != NULL) --*count;
        entry->peer = (int32_t)rank;
        entry->sequence = next_number(record, entry);
    }
    Py_RETURN_NONE;
}

static void record_dealloc(PyObject *object) {
    Py_XDECREF((PyObject *)((GroupRecord *)object)->recorder);
    free_object(object);
}

static PyMethodDef record_methods[] = {
    {"begin", (PyCFunction)(void (*)(void))record_begin_call, METH_FASTCALL,
     "begin(operation, strategy, sequence, message, peer, moved=None, reduction=None, outer=False)\n--\n\nA token of a new entry; None where the "
     "call is a part of another one."},
    {"done", (PyCFunction)(void (*)(void))record_done, METH_FASTCALL, "done(token, moved=None)\n--\n\nEnds an entry that is open: the call was made."},
    {"fail", record_fail, METH_O, "fail(token)\n--\n\nEnds an entry that is open by an error."},
    {"cancel", record_cancel_call, METH_O, "cancel(token)\n--\n\nRemoves an entry that is open: the call was not made, or another path makes it."},
    {"assign", record_assign, METH_O, "assign(peer)\n--\n\nSets who has sent the message of the last entry of this thread, which is open."},
    {"add", record_add, METH_O, "add(moved)\n--\n\nAdds to the call of several parts that is under way on this thread."},
    {"number", record_number, METH_O, "number(sequence)\n--\n\nSays the number of that call."},
    {0}};
static PyType_Slot record_slots[] = {
    {Py_tp_doc, "The record of the calls of one coordinator; see Recorder.of."}, {Py_tp_dealloc, record_dealloc}, {Py_tp_methods, record_methods}, {0}};
PyType_Spec group_record_spec = {"commgraph.shm._native.GroupRecord", sizeof(GroupRecord), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                 record_slots};

/* The type Recorder. */

static PyObject *recorder_of(PyObject *object, PyObject *args) {
    int group, lanes;
    if (!PyArg_ParseTuple(args, "ii", &group, &lanes)) return NULL;
    GroupRecord *record = (GroupRecord *)allocate(state_of(object)->group_record);
    if (record == NULL) return NULL;
    record->recorder = (Recorder *)Py_NewRef(object);
    record->group = (uint16_t)group;
    record->lanes = (uint16_t)lanes;
    return (PyObject *)record;
}

static PyObject *recorder_note(PyObject *object, PyObject *args) {
    int kind;
    const char *text;
    Py_ssize_t bytes;
    if (!PyArg_ParseTuple(args, "is#", &kind, &text, &bytes)) return NULL;
    return PyLong_FromUnsignedLong(append_text((Recorder *)object, kind, text, (size_t)bytes));
}

static PyObject *recorder_text(PyObject *object, PyObject *text) {
    if (!PyUnicode_Check(text)) return PyErr_Format(PyExc_TypeError, "text(str)");
    return PyLong_FromUnsignedLong(index_of((Recorder *)object, text));
}

static PyObject *recorder_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    PyObject *segment, *tensors, *site_of_job, *operations, *ours, *dtypes, *kinds;
    if (!PyArg_ParseTuple(args, "OOOO!O!O!O!", &segment, &tensors, &site_of_job, &PyTuple_Type, &operations, &PyTuple_Type, &ours, &PyDict_Type, &dtypes, &PyDict_Type, &kinds)) return NULL;
    module_state *state = PyType_GetModuleState(type);
    if (state == NULL || !PyObject_TypeCheck(segment, state->segment) || (tensors != Py_None && !PyObject_TypeCheck(tensors, state->tensors)))
        return PyErr_Format(PyExc_TypeError, "Recorder(segment, tensors, site_of_job, operations, ours, dtypes, kinds)");
    cg_record_header *header = (cg_record_header *)((Segment *)segment)->base;
    size_t bytes = ((Segment *)segment)->bytes;
    if (bytes < sizeof *header || header->entry_bytes != sizeof(cg_entry) || header->capacity == 0 || header->capacity > bytes / sizeof(cg_entry) ||
        (header->capacity & (header->capacity - 1)) != 0 || header->texts_offset > bytes || header->texts_bytes > bytes - header->texts_offset ||
        header->entries_offset > bytes || header->entries_offset % 64 || header->capacity * sizeof(cg_entry) > bytes - header->entries_offset)
        return PyErr_Format(PyExc_ValueError, "the segment has not the header of a record");
    Recorder *self = (Recorder *)allocate(type);
    if (self == NULL) return NULL;
    self->segment = (Segment *)Py_NewRef(segment);
    self->tensors = tensors == Py_None ? NULL : (Tensors *)Py_NewRef(tensors);
    self->dtypes = Py_NewRef(dtypes);
    self->texts = PyDict_New();
    self->header = header;
    self->entries = (cg_entry *)((char *)header + header->entries_offset);
    self->shape = PyUnicode_InternFromString("shape");
    self->nbytes = PyUnicode_InternFromString("nbytes");
    self->dtype = PyUnicode_InternFromString("dtype");
    if (!begin_sites(&self->sites, site_of_job, operations, ours, this_thread())) PyErr_Clear(); /* no memory: what follows says so */
    PyObject *empty = PyUnicode_FromString(""), *kind, *name;
    if (self->texts != NULL && empty != NULL) index_of(self, empty);
    Py_XDECREF(empty);
    for (Py_ssize_t position = 0; self->texts != NULL && PyDict_Next(kinds, &position, &kind, &name);)
        self->kinds[(PyLong_AsUnsignedLong(kind) & 0xFFFF) / 8] = (uint16_t)index_of(self, name);
    if (PyErr_Occurred()) Py_CLEAR(self);
    return (PyObject *)self;
}

static void recorder_dealloc(PyObject *object) {
    Recorder *self = (Recorder *)object;
    end_sites(&self->sites);
    PyObject *const held[] = {(PyObject *)self->segment, (PyObject *)self->tensors, self->texts, self->dtypes, self->shape, self->nbytes, self->dtype};
    for (size_t i = 0; i < sizeof held / sizeof *held; i++) Py_XDECREF(held[i]);
    free_object(object);
}

static PyMethodDef recorder_methods[] = {
    {"of", recorder_of, METH_VARARGS, "of(group, lanes)\n--\n\nA GroupRecord; `group`: number of the text about it, `lanes`: distinguishes its messages."},
    {"note", recorder_note, METH_VARARGS, "note(kind, text)\n--\n\nAppends a text, and gives its index."},
    {"text", recorder_text, METH_O, "text(name)\n--\n\nIndex of a name."},
    {0}};
static PyType_Slot recorder_slots[] = {
    {Py_tp_doc, "Recorder(segment, tensors, site_of_job, operations, ours, dtypes, kinds)\n--\n\nWrites the record of one rank's calls."},
    {Py_tp_new, recorder_new}, {Py_tp_dealloc, recorder_dealloc}, {Py_tp_methods, recorder_methods}, {0}};
PyType_Spec recorder_spec = {"commgraph.shm._native.Recorder", sizeof(Recorder), 0, Py_TPFLAGS_DEFAULT, recorder_slots};
