/* Tensors as native calls see them: contiguous ones on the host, looked at by DLPack and never through torch's headers. */
#ifndef COMMGRAPH_TENSORS_H
#define COMMGRAPH_TENSORS_H

#include "module.h"

#include "dlpack.h"

enum { MAX_DIMS = 8, ANY_DTYPE = -1 };

/* What is asked of torch. */
typedef struct {
    PyObject_HEAD
    PyTypeObject *tensor_type;
    const dl_exchange *exchange; /* NULL: this torch has none, and no tensor is plain */
    PyObject *inference_mode; /* tells whether it is on */
    PyObject *grad_mode;      /* tells whether gradients are recorded */
    PyObject *modes; /* tells how many modes look at every operator, and so have to see this one */
    PyObject *mark_written; /* called with a tuple of tensors that are going to be filled */
} Tensors;

/* A contiguous host tensor. */
typedef struct {
    char *data;
    int ndim, dtype;
    int64_t shape[MAX_DIMS];
    size_t size, bytes;
    dl_dtype kind;
    int is_bool;
} view;

/* 1 if nothing looks at operators, 0 if something does, -1 with an error set. */
int is_unwatched(const Tensors *tensors);
/* 1 if x is plain, 0 if not, -1 with an error set. */
int look(const Tensors *tensors, PyObject *x, view *v);
/* Whether x may be filled here and now: 0 if not, -1 with an error set. */
int may_fill(const Tensors *tensors, PyObject *x);
/* Tells autograd that the values of such a tensor are changed, which it may have saved; nothing where it has no version. 0 with an error set. */
int mark(const Tensors *tensors, PyObject *x);
/* A tensor over memory of the pool, which it gives back; also where there is none, with an error set. */
PyObject *tensor_over(const Tensors *tensors, void *memory, dl_dtype kind, int ndim, const int64_t *shape);
/* A new tensor, and where it lies. */
PyObject *new_tensor(const Tensors *tensors, Pool *pool, dl_dtype kind, int ndim, const int64_t *shape, size_t bytes, char **data);

#endif
