/* The place in the code of a call that is recorded: the innermost caller outside of commgraph. */
#include "module_sites.h"
#include "recorder.h"

/* Kinds of code, in the place of an instruction: of operations themselves, between whose frames are no others; and what else is not the user's. */
enum { OF_OPERATIONS = -2, OURS = -1 };

int begin_sites(call_sites *self, PyObject *site_of_job, PyObject *operations, PyObject *ours, uint64_t thread) {
    self->site_of_job = Py_NewRef(site_of_job);
    self->operations = Py_NewRef(operations);
    self->ours = Py_NewRef(ours);
    self->thread = thread;
    self->f_back = PyUnicode_InternFromString("f_back");
    self->f_lasti = PyUnicode_InternFromString("f_lasti");
    self->co_filename = PyUnicode_InternFromString("co_filename");
    self->co_qualname = PyUnicode_InternFromString("co_qualname");
    self->getframe = Py_XNewRef(PySys_GetObject("_getframe")); /* borrowed */
    for (int i = 0; i < DEPTHS; i++) self->depths[i] = PyLong_FromLong(i);
    return !PyErr_Occurred();
}

void end_sites(call_sites *self) {
    for (int i = 0; i < SITES; i++) Py_XDECREF(self->known[i].code);
    PyObject *const held[] = {self->site_of_job, self->operations, self->ours, self->getframe, self->f_back, self->f_lasti, self->co_filename, self->co_qualname};
    for (size_t i = 0; i < sizeof held / sizeof *held; i++) Py_XDECREF(held[i]);
    for (int i = 0; i < DEPTHS; i++) Py_XDECREF(self->depths[i]);
}

static int begins_with_one(PyObject *file, PyObject *prefixes) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(prefixes); i++)
        if (PyUnicode_Tailmatch(file, PyTuple_GetItem(prefixes, i), 0, PY_SSIZE_T_MAX, -1) == 1) return 1;
    return 0;
}

/* The kind of a code whose file was not compared yet; 0: it is the user's. */
static int kind_of_code(call_sites *self, PyObject *code) {
    PyObject *file = PyObject_GetAttr(code, self->co_filename);
    int kind = file == NULL ? 0 : begins_with_one(file, self->operations) ? OF_OPERATIONS : begins_with_one(file, self->ours) ? OURS : 0;
    Py_XDECREF(file);
    if (PyErr_Occurred()) PyErr_Clear();
    if (kind) {
        known_site *cell = &self->known[((uintptr_t)code >> 4) % SITES];
        Py_XDECREF(cell->code);
        *cell = (known_site){Py_NewRef(code), kind, 0};
    }
    return kind;
}

static int known_kind_of_code(const call_sites *self, const PyObject *code) {
    const known_site *cell = &self->known[((uintptr_t)code >> 4) % SITES];
    return cell->code == code && cell->lasti < 0 ? (int)cell->lasti : 0;
}

static uint32_t describe_site(call_sites *self, Recorder *recorder, PyFrameObject *frame, PyObject *code) {
    PyObject *file = PyObject_GetAttr(code, self->co_filename), *name = PyObject_GetAttr(code, self->co_qualname);
    PyObject *text = file == NULL || name == NULL ? NULL : PyUnicode_FromFormat("%U:%d in %U", file, PyFrame_GetLineNumber(frame), name);
    uint32_t index = text == NULL ? 0 : index_of(recorder, text);
    Py_XDECREF(text);
    Py_XDECREF(file);
    Py_XDECREF(name);
    if (PyErr_Occurred()) PyErr_Clear();
    return index;
}

/* The frame that called; takes the reference. */
static PyFrameObject *back_of(call_sites *self, PyFrameObject *frame) {
    PyObject *back = PyObject_GetAttr((PyObject *)frame, self->f_back);
    Py_DECREF((PyObject *)frame);
    if (back == Py_None) Py_CLEAR(back);
    return (PyFrameObject *)back;
}

/* The frame so many calls above this one, if that is known to be one of operations; NULL, without an error, if not. It makes no objects for those
 * below, as `back_of` does. */
static PyFrameObject *frame_of_operations(call_sites *self, int depth) {
    PyObject *frame = PyObject_CallFunctionObjArgs(self->getframe, self->depths[depth], NULL);
    if (frame == NULL) return PyErr_Clear(), NULL;
    PyObject *code = (PyObject *)PyFrame_GetCode((PyFrameObject *)frame);
    if (known_kind_of_code(self, code) != OF_OPERATIONS) Py_CLEAR(frame);
    Py_DECREF(code);
    return (PyFrameObject *)frame;
}

/* The site of a frame's call, or the kind of its code where that is not the user's. */
static int64_t site_in(call_sites *self, Recorder *recorder, PyFrameObject *frame) {
    PyObject *code = (PyObject *)PyFrame_GetCode(frame);
    int64_t site = known_kind_of_code(self, code);
    if (site == 0) {
        PyObject *number = PyObject_GetAttr((PyObject *)frame, self->f_lasti);
        long lasti = number == NULL ? 0 : PyLong_AsLong(number);
        Py_XDECREF(number);
        known_site *cell = &self->known[(((uintptr_t)code >> 4) * 31 + (uintptr_t)lasti) % SITES];
        if (cell->code == code && cell->lasti == lasti) site = cell->site;
        else if ((site = kind_of_code(self, code)) == 0) {
            site = describe_site(self, recorder, frame, code);
            Py_XDECREF(cell->code);
            *cell = (known_site){Py_NewRef(code), lasti, (uint32_t)site};
        }
    }
    Py_DECREF(code);
    return site;
}

uint32_t find_site(call_sites *self, Recorder *recorder, uint64_t thread, uint16_t operation) {
    if (thread != self->thread && self->site_of_job != Py_None) {
        PyObject *given = PyObject_CallNoArgs(self->site_of_job);
        uint32_t index = given != NULL && given != Py_None ? index_of(recorder, given) : 0;
        int found = given != NULL && given != Py_None;
        Py_XDECREF(given);
        if (PyErr_Occurred()) PyErr_Clear();
        if (found) return index;
    }
    /* An operation is recorded below as many frames of its own, as a rule: the walk begins at the outermost of them. */
    unsigned char *usual = &self->usual[operation % USUAL];
    PyFrameObject *outermost = *usual ? frame_of_operations(self, *usual - 1) : NULL;
    int depth = outermost == NULL ? 0 : *usual, own = depth;
    PyFrameObject *frame = outermost == NULL ? (PyFrameObject *)Py_XNewRef((PyObject *)PyEval_GetFrame()) : back_of(self, outermost);
    int64_t site = 0;
    for (; frame != NULL && (site = site_in(self, recorder, frame)) < 0; frame = back_of(self, frame), depth++)
        if (site == OF_OPERATIONS && own == depth) own++;
    Py_XDECREF((PyObject *)frame);
    if (own < DEPTHS) *usual = (unsigned char)own;
    if (PyErr_Occurred()) PyErr_Clear();
    return site < 0 ? 0 : (uint32_t)site;
}
