/* The Python type Recorder: writes the record of one rank's calls. All of it runs under the interpreter's lock. */
#include "recorder.h"

#include <string.h>
#include <time.h>

enum { SITES = 1024, NAMES = 64, OUTER = 64, PROBES = 256, LANES = 1 << 14, USUAL = 256, DEPTHS = 16 };
/* First byte of a text in the arena: a name, or JSON about a group or about the rank. */
enum { MESSAGE_OUT = 1, MESSAGE_IN = 2 }; /* kinds of entries */
enum { TEXT_NAME = 1, TEXT_GROUP = 2, TEXT_FACTS = 3 };

/* Kinds of code, in the place of an instruction: of operations themselves, between whose frames are no others; and what else is not the user's. */
enum { OF_OPERATIONS = -2, OURS = -1 };

/* Place of a call in the code, by code object and index of its instruction, or the kind of the code. */
typedef struct {
    PyObject *code; /* a reference, so that no other code takes its address */
    long lasti;
    uint32_t site;
} known_site;

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
    PyObject *site_of_job; /* () -> str or None: where a job of another thread was begun */
    PyObject *ours;        /* tuple of prefixes of the files whose frames are not the caller's */
    PyObject *texts;       /* dict: text -> index */
    PyObject *dtypes;      /* dict: dtype -> name */
    PyObject *getframe;    /* sys._getframe */
    PyObject *depths[DEPTHS]; /* numbers from 0 */
    unsigned char usual[USUAL]; /* frames of an operation, innermost first, by its name; 0: not known */
    PyObject *f_back, *f_lasti, *co_filename, *co_qualname, *shape, *nbytes, *dtype; /* names, interned */
    cg_record_header *header;
    cg_entry *entries;
    uint64_t count; /* of texts */
    uint64_t thread; /* which made this: no thread of a lane */
    int n_outer;
    outer_call outer[OUTER];
    known_site sites[SITES];
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

/* The index of a name, which is added if it is new. */
static uint32_t index_of(Recorder *self, PyObject *text) {
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

/* The kind of a code whose file was not compared yet; 0: it is the user's. */
static int kind_of_code(Recorder *self, PyObject *code) {
    PyObject *file = PyObject_GetAttr(code, self->co_filename);
    int kind = 0;
    for (Py_ssize_t i = 0; file != NULL && !kind && i < PyTuple_Size(self->ours); i++)
        if (PyUnicode_Tailmatch(file, PyTuple_GetItem(self->ours, i), 0, PY_SSIZE_T_MAX, -1) == 1) kind = i == 0 ? OF_OPERATIONS : OURS;
    Py_XDECREF(file);
    if (PyErr_Occurred()) PyErr_Clear();
    if (kind) {
        known_site *cell = &self->sites[((uintptr_t)code >> 4) % SITES];
        Py_XDECREF(cell->code);
        *cell = (known_site){Py_NewRef(code), kind, 0};
    }
    return kind;
}

static int known_kind_of_code(const Recorder *self, const PyObject *code) {
    const known_site *cell = &self->sites[((uintptr_t)code >> 4) % SITES];
    return cell->code == code && cell->lasti < 0 ? (int)cell->lasti : 0;
}

static uint32_t describe_site(Recorder *self, PyFrameObject *frame, PyObject *code) {
    PyObject *file = PyObject_GetAttr(code, self->co_filename), *name = PyObject_GetAttr(code, self->co_qualname);
    PyObject *text = file == NULL || name == NULL ? NULL : PyUnicode_FromFormat("%U:%d in %U", file, PyFrame_GetLineNumber(frame), name);
    uint32_t index = text == NULL ? 0 : index_of(self, text);
    Py_XDECREF(text);
    Py_XDECREF(file);
    Py_XDECREF(name);
    if (PyErr_Occurred()) PyErr_Clear();
    return index;
}

/* The frame that called; takes the reference. */
static PyFrameObject *back_of(Recorder *self, PyFrameObject *frame) {
    PyObject *back = PyObject_GetAttr((PyObject *)frame, self->f_back);
    Py_DECREF((PyObject *)frame);
    if (back == Py_None) Py_CLEAR(back);
    return (PyFrameObject *)back;
}

/* The frame so many calls above this one; NULL, without an error, if there is none. It makes no objects for those below, as `back_of` does. */
static PyFrameObject *frame_above(Recorder *self, int depth) {
    PyObject *frame = PyObject_CallFunctionObjArgs(self->getframe, self->depths[depth], NULL);
    if (frame == NULL) PyErr_Clear();
    return (PyFrameObject *)frame;
}

/* Whether the frame so many calls above is known to be of an operation. */
static int is_of_operation(Recorder *self, int depth) {
    PyFrameObject *frame = frame_above(self, depth);
    if (frame == NULL) return 0;
    PyObject *code = (PyObject *)PyFrame_GetCode(frame);
    int kind = known_kind_of_code(self, code);
    Py_DECREF(code);
    Py_DECREF((PyObject *)frame);
    return kind == OF_OPERATIONS;
}

/* The site of a frame's call, or the kind of its code where that is not the user's. */
static int64_t site_in(Recorder *self, PyFrameObject *frame) {
    PyObject *code = (PyObject *)PyFrame_GetCode(frame);
    int64_t site = known_kind_of_code(self, code);
    if (site == 0) {
        PyObject *number = PyObject_GetAttr((PyObject *)frame, self->f_lasti);
        long lasti = number == NULL ? 0 : PyLong_AsLong(number);
        Py_XDECREF(number);
        known_site *cell = &self->sites[(((uintptr_t)code >> 4) * 31 + (uintptr_t)lasti) % SITES];
        if (cell->code == code && cell->lasti == lasti) site = cell->site;
        else if ((site = kind_of_code(self, code)) == 0) {
            site = describe_site(self, frame, code);
            Py_XDECREF(cell->code);
            *cell = (known_site){Py_NewRef(code), lasti, (uint32_t)site};
        }
    }
    Py_DECREF(code);
    return site;
}

/* The innermost caller outside of commgraph. */
static uint32_t find_site(Recorder *self, uint64_t thread, uint16_t operation) {
    if (thread != self->thread && self->site_of_job != Py_None) {
        PyObject *given = PyObject_CallNoArgs(self->site_of_job);
        uint32_t index = given != NULL && given != Py_None ? index_of(self, given) : 0;
        int found = given != NULL && given != Py_None;
        Py_XDECREF(given);
        if (PyErr_Occurred()) PyErr_Clear();
        if (found) return index;
    }
    /* An operation is recorded below as many frames of its own, as a rule: the walk begins at the outermost of them. */
    unsigned char *usual = &self->usual[operation % USUAL];
    int depth = *usual && is_of_operation(self, *usual - 1) ? *usual : 0, own = depth;
    PyFrameObject *frame = depth ? frame_above(self, depth) : (PyFrameObject *)Py_XNewRef((PyObject *)PyEval_GetFrame());
    int64_t site = 0;
    for (; frame != NULL && (site = site_in(self, frame)) < 0; frame = back_of(self, frame), depth++)
        if (site == OF_OPERATIONS && own == depth) own++;
    Py_XDECREF((PyObject *)frame);
    if (own < DEPTHS) *usual = (unsigned char)own;
    if (PyErr_Occurred()) PyErr_Clear();
    return site < 0 ? 0 : (uint32_t)site;
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

cg_entry *record_begin(Recorder *self, const char *operation, uint16_t group, uint16_t strategy, uint64_t sequence, const view *v, int root,
                       const char *reduction) {
    uint64_t thread = this_thread();
    cg_entry *entry = self->n_outer ? outer_of(self, thread, group) : NULL;
    if (entry != NULL) {
        entry->bytes += v->bytes;
        number_outer(entry, sequence);
        entry = NULL;
    } else if ((entry = take_entry(self, thread)) != NULL) {
        entry->group = group;
        entry->operation = index_of_name(self, operation);
        entry->strategy = strategy;
        entry->peer = root;
        entry->reduction = reduction == NULL ? 0 : index_of_name(self, reduction);
        if (v->bytes > 0) set_view(self, entry, v);
        open_entry(self, entry, sequence);
    }
    return entry;
}

void record_site(Recorder *self, cg_entry *entry) { entry->site = find_site(self, entry->thread, entry->operation); }

void record_tensor(Recorder *self, cg_entry *entry, const view *v) {
    if (entry != NULL) set_view(self, entry, v);
}

void record_end(cg_entry *entry, int state) {
    if (entry == NULL) return;
    entry->end = cg_clock_ns();
    uint64_t number = atomic_load_explicit(&entry->state, memory_order_relaxed) >> 3;
    atomic_store_explicit(&entry->state, number << 3 | (uint64_t)state, memory_order_release);
}

void record_cancel(cg_entry *entry) {
    if (entry != NULL) atomic_store_explicit(&entry->state, 0, memory_order_release);
}

Recorder *recorder_of(PyObject *self, PyObject *value) {
    if (PyObject_TypeCheck(value, state_of(self)->recorder)) return (Recorder *)value;
    PyErr_SetString(PyExc_TypeError, "a Recorder is needed");
    return NULL;
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

static PyObject *recorder_begin(PyObject *object, PyObject *const *args, Py_ssize_t nargs) {
    Recorder *self = (Recorder *)object;
    if (nargs != 12)
        return PyErr_Format(PyExc_TypeError, "begin(group, lanes, operation, strategy, sequence, kind, family, peer, tag, moved, reduction, outer)");
    PyObject *const *first = args;
    args++; /* `lanes` is read below */
    uint64_t thread = this_thread();
    uint16_t group = (uint16_t)PyLong_AsUnsignedLong(first[0]), lanes = (uint16_t)PyLong_AsUnsignedLong(first[1]);
    cg_entry *outer = self->n_outer ? outer_of(self, thread, group) : NULL;
    if (outer != NULL) {
        uint16_t tensors = outer->tensors;
        outer->tensors = (uint16_t)(tensors + 1); /* only bytes are added: the entry is of the call, and not of its parts */
        add_moved(self, outer, args[8]);
        outer->tensors = tensors;
        number_outer_by(outer, args[3]);
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    }
    cg_entry *entry = take_entry(self, thread);
    if (entry == NULL) return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    entry->group = group;
    entry->operation = (uint16_t)index_of(self, args[1]);
    entry->site = find_site(self, thread, entry->operation);
    entry->strategy = args[2] == Py_None ? 0 : (uint16_t)index_of(self, args[2]);
    uint64_t sequence = PyLong_AsUnsignedLongLong(args[3]);
    entry->kind = (uint8_t)PyLong_AsLong(args[4]);
    entry->family = (uint8_t)PyLong_AsLong(args[5]);
    entry->peer = (int32_t)PyLong_AsLong(args[6]);
    entry->tag = (int32_t)PyLong_AsLong(args[7]);
    uint64_t *count = entry->kind == MESSAGE_OUT || entry->kind == MESSAGE_IN ? count_of(self, lanes, entry) : NULL;
    if (count != NULL) sequence = (*count)++;
    add_moved(self, entry, args[8]);
    if (args[9] != Py_None) entry->reduction = (uint16_t)index_of(self, args[9]);
    if (PyErr_Occurred()) return NULL;
    uint64_t number = entry->sequence + 1;
    open_entry(self, entry, sequence);
    if (args[10] == Py_True && self->n_outer < OUTER) self->outer[self->n_outer++] = (outer_call){thread, group, entry, number};
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

static PyObject *recorder_done(PyObject *object, PyObject *const *args, Py_ssize_t nargs) {
    Recorder *self = (Recorder *)object;
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

static PyObject *recorder_end(PyObject *object, PyObject *const *args, Py_ssize_t nargs) {
    Recorder *self = (Recorder *)object;
    if (nargs != 4) return PyErr_Format(PyExc_TypeError, "end(token, lanes, state, moved)");
    uint64_t number;
    cg_entry *entry = entry_of(self, args[0], &number);
    long state = PyLong_AsLong(args[2]);
    if (PyErr_Occurred()) return NULL;
    if (entry != NULL) {
        add_moved(self, entry, args[3]);
        if (state) record_end(entry, state == ENTRY_DONE ? ENTRY_DONE : ENTRY_FAILED);
        else {
            uint64_t *count = entry->kind == MESSAGE_OUT || entry->kind == MESSAGE_IN ? count_of(self, (uint16_t)PyLong_AsUnsignedLong(args[1]), entry) : NULL;
            if (count != NULL) --*count;
            record_cancel(entry);
        }
    }
    if (self->n_outer) drop_outer(self, number);
    Py_RETURN_NONE;
}

static PyObject *recorder_grow(PyObject *object, PyObject *const *args, Py_ssize_t nargs) {
    Recorder *self = (Recorder *)object;
    if (nargs != 2) return PyErr_Format(PyExc_TypeError, "grow(group, moved)");
    cg_entry *outer = self->n_outer ? outer_of(self, this_thread(), (uint16_t)PyLong_AsUnsignedLong(args[0])) : NULL;
    if (outer != NULL) add_moved(self, outer, args[1]);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *recorder_number(PyObject *object, PyObject *const *args, Py_ssize_t nargs) {
    Recorder *self = (Recorder *)object;
    if (nargs != 2) return PyErr_Format(PyExc_TypeError, "number(group, sequence)");
    cg_entry *outer = self->n_outer ? outer_of(self, this_thread(), (uint16_t)PyLong_AsUnsignedLong(args[0])) : NULL;
    if (outer != NULL) number_outer_by(outer, args[1]);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *recorder_assign(PyObject *object, PyObject *const *args, Py_ssize_t nargs) {
    Recorder *self = (Recorder *)object;
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "assign(group, lanes, peer)");
    cg_entry *entry = last_of(self, this_thread(), (uint16_t)PyLong_AsUnsignedLong(args[0]));
    if (entry != NULL) {
        uint16_t lanes = (uint16_t)PyLong_AsUnsignedLong(args[1]);
        uint64_t *count = count_of(self, lanes, entry);
        if (count != NULL) --*count;
        entry->peer = (int32_t)PyLong_AsLong(args[2]);
        count = count_of(self, lanes, entry);
        if (count != NULL) entry->sequence = (*count)++;
    }
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
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
    PyObject *segment, *tensors, *site_of_job, *ours, *dtypes, *kinds;
    if (!PyArg_ParseTuple(args, "OOOO!O!O!", &segment, &tensors, &site_of_job, &PyTuple_Type, &ours, &PyDict_Type, &dtypes, &PyDict_Type, &kinds)) return NULL;
    module_state *state = PyType_GetModuleState(type);
    if (state == NULL || !PyObject_TypeCheck(segment, state->segment) || (tensors != Py_None && !PyObject_TypeCheck(tensors, state->tensors)))
        return PyErr_Format(PyExc_TypeError, "Recorder(segment, tensors, site_of_job, ours, dtypes, kinds)");
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
    self->site_of_job = Py_NewRef(site_of_job);
    self->ours = Py_NewRef(ours);
    self->dtypes = Py_NewRef(dtypes);
    self->texts = PyDict_New();
    self->header = header;
    self->entries = (cg_entry *)((char *)header + header->entries_offset);
    self->thread = this_thread();
    static const char *const names[] = {"f_back", "f_lasti", "co_filename", "co_qualname", "shape", "nbytes", "dtype"};
    PyObject **const held[] = {&self->f_back, &self->f_lasti, &self->co_filename, &self->co_qualname, &self->shape, &self->nbytes, &self->dtype};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) *held[i] = PyUnicode_InternFromString(names[i]);
    self->getframe = Py_XNewRef(PySys_GetObject("_getframe")); /* borrowed */
    for (int i = 0; i < DEPTHS; i++) self->depths[i] = PyLong_FromLong(i);
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
    for (int i = 0; i < SITES; i++) Py_XDECREF(self->sites[i].code);
    PyObject *const held[] = {(PyObject *)self->segment, (PyObject *)self->tensors, self->site_of_job, self->ours, self->texts, self->dtypes,
                              self->f_back, self->f_lasti, self->co_filename, self->co_qualname, self->shape, self->nbytes, self->dtype};
    for (size_t i = 0; i < sizeof held / sizeof *held; i++) Py_XDECREF(held[i]);
    for (int i = 0; i < DEPTHS; i++) Py_XDECREF(self->depths[i]);
    Py_XDECREF(self->getframe);
    free_object(object);
}

static PyMethodDef recorder_methods[] = {
    {"begin", (PyCFunction)(void (*)(void))recorder_begin, METH_FASTCALL,
     "begin(group, lanes, operation, strategy, sequence, kind, family, peer, tag, moved, reduction, outer)\n--\n\nA token of a new entry; None where the call is a part of another one."},
    {"end", (PyCFunction)(void (*)(void))recorder_end, METH_FASTCALL, "end(token, lanes, state, moved)\n--\n\nEnds an entry that is open; state 0 removes it."},
    {"done", (PyCFunction)(void (*)(void))recorder_done, METH_FASTCALL, "done(token, moved=None)\n--\n\nEnds an entry that is open: the call was made."},
    {"assign", (PyCFunction)(void (*)(void))recorder_assign, METH_FASTCALL, "assign(group, lanes, peer)\n--\n\nSets who has sent the message of the last entry of this thread, which is open."},
    {"grow", (PyCFunction)(void (*)(void))recorder_grow, METH_FASTCALL,
     "grow(group, moved)\n--\n\nAdds to the call of several parts that is under way on this thread."},
    {"number", (PyCFunction)(void (*)(void))recorder_number, METH_FASTCALL, "number(group, sequence)\n--\n\nSays the number of that call."},
    {"note", recorder_note, METH_VARARGS, "note(kind, text)\n--\n\nAppends a text, and gives its index."},
    {"text", recorder_text, METH_O, "text(name)\n--\n\nIndex of a name."},
    {0}};
static PyType_Slot recorder_slots[] = {
    {Py_tp_doc, "Recorder(segment, tensors, site_of_job, ours, dtypes, kinds)\n--\n\nWrites the record of one rank's calls."},
    {Py_tp_new, recorder_new}, {Py_tp_dealloc, recorder_dealloc}, {Py_tp_methods, recorder_methods}, {0}};
PyType_Spec recorder_spec = {"commgraph.shm._native.Recorder", sizeof(Recorder), 0, Py_TPFLAGS_DEFAULT, recorder_slots};
