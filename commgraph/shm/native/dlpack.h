/* The used part of DLPack 1.x (https://dmlc.github.io/dlpack/latest/c_api.html): the layout of its structures is its ABI. */
#ifndef COMMGRAPH_DLPACK_H
#define COMMGRAPH_DLPACK_H

#include <stdint.h>

enum { DL_CPU = 1 };
enum { DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_BOOL = 6 };

typedef struct {
    uint32_t major, minor;
} dl_version;

typedef struct {
    uint8_t code, bits;
    uint16_t lanes;
} dl_dtype;

typedef struct {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    dl_dtype dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} dl_tensor;

typedef struct dl_managed {
    dl_version version;
    void *context;
    void (*deleter)(struct dl_managed *);
    uint64_t flags;
    dl_tensor tensor;
} dl_managed;

/* The table behind a type's __dlpack_c_exchange_api__, a capsule of the name "dlpack_exchange_api". */
typedef struct {
    dl_version version;
    void *previous;
    void *allocate;
    int (*managed_from_object)(void *object, dl_managed **out);
    int (*object_from_managed)(dl_managed *managed, void **out);
    int (*view_of_object)(void *object, dl_tensor *out); /* may be NULL */
    void *stream;
} dl_exchange;

#endif
