/* Reductions over several sources in their order. */
#ifndef COMMGRAPH_KERNELS_H
#define COMMGRAPH_KERNELS_H

#include <stddef.h>
#include <stdint.h>

enum {
    CG_F32, CG_F64, CG_BF16, CG_F16, CG_I8, CG_I16, CG_I32, CG_I64, CG_U8, CG_U16, CG_U32, CG_U64, CG_DTYPES
};
enum { CG_SUM, CG_AVG, CG_MAX, CG_MIN, CG_PRODUCT, CG_OPS };

/* out[i] = ((src[0][i] op src[1][i]) op src[2][i]) ...; `out` may be one of the sources; n >= 2. bfloat16 and float16 are combined in
 * float32 and rounded once, to nearest even; integers wrap; NaN wins in max and min.
 *
 * `put` may be NULL. With two sources it may be other memory, which gets `count` elements from `next` meanwhile, a few lines at a time:
 * while the processor waits for lines that another core wrote it writes those that the other core reads next. */
typedef void (*cg_kernel)(void *out, const void *const *src, int n, size_t count, void *put, const void *next);

/* The fastest kernel of this processor; NULL where there is none (the average of integers). */
cg_kernel cg_find_kernel(int dtype, int op);
size_t cg_dtype_bytes(int dtype);
/* To float32, and back with rounding to nearest even. */
typedef struct {
    void (*widen)(float *to, const uint16_t *from, size_t count);
    void (*narrow)(uint16_t *to, const float *from, size_t count);
} cg_conversion;
/* Of bfloat16 and float16; NULL for every other kind. */
const cg_conversion *cg_find_conversion(int dtype);
/* How many times as long as a byte of float32 a byte of this kind takes, roughly. */
int cg_kernel_weight(int dtype);
/* Which instructions the kernels use: "avx2", "sse2", "neon", ... */
const char *cg_kernel_isa(void);

#endif
