#include "module_tensors.h"

#include <stdlib.h>

int is_unwatched(const Tensors *tensors) {
    PyObject *level = PyDict_GetItemWithError(tensors->forward, tensors->current_level); /* borrowed, as the next */
    PyObject *profiling = PyDict_GetItemWithError(tensors->profiler, tensors->profiler_enabled);
    if (profiling == Py_True || (level != NULL && PyLong_AsLong(level) >= 0)) return 0;
    PyObject *modes = PyErr_Occurred() ? NULL : PyObject_CallNoArgs(tensors->modes);
    if (modes == NULL) return -1;
    int none = PyLong_AsLong(modes) == 0;
    Py_DECREF(modes);
    return PyErr_Occurred() ? -1 : none;
}

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

int view_tensor(const Tensors *tensors, PyObject *x, view *v) {
    if (Py_TYPE(x) != tensors->tensor_type || tensors->exchange == NULL) return 0;
    dl_tensor t;
    if (tensors->exchange->view_of_object(x, &t) != 0) {
        PyErr_Clear(); /* a sparse tensor, for example */
        return 0;
    }
    if (t.device.type != DL_CPU || t.data == NULL || t.ndim > MAX_DIMS || t.dtype.bits % 8 || t.dtype.lanes != 1) return 0;
    int64_t count = 1;
    for (int i = t.ndim - 1; i >= 0; i--) {
        v->shape[i] = t.shape[i];
        if (t.strides[i] != count) return 0;
        count *= t.shape[i];
    }
    if (count == 0) return 0;
    /* Complex memory may be lazily conjugated, and memory of floats lazily negated (the imaginary part of a conjugated tensor, restrided). */
    if (t.dtype.code > DL_BFLOAT && t.dtype.code != DL_BOOL) return 0;
    module_state *state = state_of((PyObject *)tensors);
    int set = flag(x, state->requires_grad, 0);
    if (set > 0) { /* it matters only where gradients are recorded */
        PyObject *recorded = PyObject_CallNoArgs(tensors->grad_mode);
        set = recorded == NULL ? -1 : PyObject_IsTrue(recorded);
        Py_XDECREF(recorded);
    }
    if (set == 0) set = flag(x, state->is_neg, 1);
    if (set != 0) return set < 0 ? -1 : 0;
    if (t.dtype.bits == 8 && (t.dtype.code == DL_INT || t.dtype.code == DL_UINT)) {
        PyObject *dtype = PyObject_GetAttr(x, tensors->dtype);
        if (dtype == NULL) return -1;
        Py_DECREF(dtype); /* torch keeps it */
        if (dtype != tensors->int8 && dtype != tensors->uint8) return 0;
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

int look_at_tensor(const Tensors *tensors, PyObject *x, view *v) {
    dl_tensor t;
    if (Py_TYPE(x) != tensors->tensor_type || tensors->exchange == NULL) return 0;
    if (tensors->exchange->view_of_object(x, &t) != 0) return PyErr_Clear(), 0;
    /* DLPack has one name for several dtypes of 8 bits. */
    if (t.device.type != DL_CPU || t.ndim > MAX_DIMS || t.dtype.bits % 8 || t.dtype.lanes != 1 || (t.dtype.bits == 8 && t.dtype.code != DL_BOOL)) return 0;
    v->ndim = t.ndim;
    v->kind = t.dtype;
    v->size = t.dtype.bits / 8;
    v->bytes = v->size;
    for (int i = 0; i < t.ndim; i++) v->bytes *= (size_t)(v->shape[i] = t.shape[i]);
    return 1;
}

int may_fill(const Tensors *tensors, PyObject *x) {
    PyObject *on = PyObject_CallNoArgs(tensors->inference_mode);
    if (on == NULL) return -1;
    int may = PyObject_IsTrue(on);
    Py_DECREF(on);
    if (may != 0) return may;
    /* A tensor of inference mode may be filled in that mode only. It is one if it has no version; is_inference() takes twice as long. */
    PyObject *version = PyObject_GetAttr(x, state_of((PyObject *)tensors)->version);
    if (version == NULL) PyErr_Clear();
    Py_XDECREF(version);
    return version != NULL;
}

int mark_as_written(const Tensors *tensors, PyObject *x) {
    PyObject *all = PyTuple_Pack(1, x), *done = all == NULL ? NULL : PyObject_CallFunctionObjArgs(tensors->mark_written, all, NULL);
    Py_XDECREF(all);
    Py_XDECREF(done);
    return done != NULL;
}

typedef struct {
    dl_managed managed;
    int64_t dims[2 * MAX_DIMS];
} owned;

static void give_back(dl_managed *managed) {
    cg_pool_give(managed->context);
    free(managed);
}

PyObject *tensor_over(const Tensors *tensors, void *memory, dl_dtype kind, int ndim, const int64_t *shape) {
    owned *o = malloc(sizeof *o);
    if (o == NULL) {
        cg_pool_give(memory);
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
    if (tensors->exchange->object_from_managed(&o->managed, &tensor) != 0) {
        give_back(&o->managed);
        return NULL;
    }
    return tensor;
}

PyObject *new_tensor(const Tensors *tensors, Pool *pool, dl_dtype kind, int ndim, const int64_t *shape, size_t bytes, char **data) {
    void *memory = cg_pool_take(pool->pool, bytes);
    if (memory == NULL) return PyErr_NoMemory();
    *data = memory;
    return tensor_over(tensors, memory, kind, ndim, shape);
}

static const char tensors_doc[] = "Tensors(tensor_type, exchange, inference_mode, grad_mode, modes, mark_written, forward, profiler, int8, uint8)\n--\n\n"
                                  "How plain tensors are inspected and made.";

/* The members that hold a reference. */
#define REFERENCES(tensors)                                                                                                                       \
    {&(tensors)->inference_mode, &(tensors)->grad_mode, &(tensors)->modes, &(tensors)->mark_written, &(tensors)->forward, \
     &(tensors)->profiler, &(tensors)->int8, &(tensors)->uint8, &(tensors)->current_level, &(tensors)->profiler_enabled, &(tensors)->dtype}

static PyObject *tensors_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    PyObject *tensor_type, *exchange, *given[8];
    if (!PyArg_ParseTuple(args, "OOOOOOOOOO", &tensor_type, &exchange, &given[0], &given[1], &given[2], &given[3], &given[4], &given[5], &given[6],
                          &given[7]))
        return NULL;
    if (!PyType_Check(tensor_type) || !PyDict_Check(given[4]) || !PyDict_Check(given[5])) return PyErr_Format(PyExc_TypeError, tensors_doc);
    const dl_exchange *api = NULL;
    if (exchange != Py_None && (api = PyCapsule_GetPointer(exchange, "dlpack_exchange_api")) == NULL) return NULL;
    if (api != NULL && (api->version.major != 1 || api->view_of_object == NULL)) api = NULL;
    Tensors *self = (Tensors *)allocate(type);
    if (self == NULL) return NULL;
    self->tensor_type = (PyTypeObject *)Py_NewRef(tensor_type);
    self->exchange = api;
    PyObject **members[] = REFERENCES(self);
    for (int i = 0; i < 8; i++) *members[i] = Py_NewRef(given[i]);
    self->current_level = PyUnicode_InternFromString("_current_level");
    self->profiler_enabled = PyUnicode_InternFromString("_is_profiler_enabled");
    self->dtype = PyUnicode_InternFromString("dtype");
    return (PyObject *)self;
}

static void tensors_dealloc(PyObject *self) {
    PyObject **members[] = REFERENCES((Tensors *)self);
    for (size_t i = 0; i < sizeof members / sizeof *members; i++) Py_XDECREF(*members[i]);
    Py_XDECREF((PyObject *)((Tensors *)self)->tensor_type);
    free_object(self);
}

static PyType_Slot tensors_slots[] = {{Py_tp_doc, (void *)tensors_doc}, {Py_tp_new, tensors_new}, {Py_tp_dealloc, tensors_dealloc}, {0}};
PyType_Spec tensors_spec = {"commgraph.shm._native.Tensors", sizeof(Tensors), 0, Py_TPFLAGS_DEFAULT, tensors_slots};
