/* Plain tensors: contiguous, on the host, viewed through DLPack and never through torch's headers. */
#ifndef COMMGRAPH_TENSORS_H
#define COMMGRAPH_TENSORS_H

#include "module.h"

#include "dlpack.h"

enum { MAX_DIMS = 8, ANY_DTYPE = -1 };

/* The objects of torch that native calls use. */
typedef struct {
    PyObject_HEAD
    PyTypeObject *tensor_type;
    const dl_exchange *exchange; /* NULL: this torch has none, and no tensor is plain */
    PyObject *inference_mode; /* () -> bool: whether inference mode is on */
    PyObject *grad_mode;      /* () -> bool: whether gradients are recorded */
    PyObject *modes;          /* () -> int: number of active dispatch modes, which must see every operator */
    PyObject *mark_written;   /* called with a tuple of tensors that are going to be filled */
    PyObject *forward;        /* namespace of torch.autograd.forward_ad, whose _current_level is below zero outside of every level */
    PyObject *profiler;       /* namespace of torch.autograd.profiler, with _is_profiler_enabled */
    PyObject *int8, *uint8;   /* dtypes: DLPack has no other names for those of less than 8 bits */
    PyObject *current_level, *profiler_enabled, *dtype; /* names, interned */
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

/* 1 if nothing of torch watches a call: no dispatch mode, no level of forward-mode derivatives, no profiler; else
 * 0; -1 with an error set. */
int is_unwatched(const Tensors *tensors);
/* Views x: 1 if it is plain, 0 if not, -1 with an error set. */
int view_tensor(const Tensors *tensors, PyObject *x, view *v);
/* Reads kind, shape and bytes of a host tensor, whose memory is not to be used: a fifth of the time. 0, and nothing read, of one that DLPack
 * does not know. */
int look_at_tensor(const Tensors *tensors, PyObject *x, view *v);
/* Whether x may be filled in the present inference mode: 0 if not, -1 with an error set. */
int may_fill(const Tensors *tensors, PyObject *x);
/* Increments the version of x, if it has one: autograd may have saved its values. 0 with an error set. */
int mark_as_written(const Tensors *tensors, PyObject *x);
/* A tensor over memory of the pool, which it gives back at its end. NULL with an error set, and the memory given back. */
PyObject *tensor_over(const Tensors *tensors, void *memory, dl_dtype kind, int ndim, const int64_t *shape);
/* A new tensor; *data is its memory. */
PyObject *new_tensor(const Tensors *tensors, Pool *pool, dl_dtype kind, int ndim, const int64_t *shape, size_t bytes, char **data);

#endif
