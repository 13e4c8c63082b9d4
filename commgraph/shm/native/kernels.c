#include "kernels.h"

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { BLOCK = 1024 }; /* entries: a block of float32 fills an eighth of a usual first cache */

#define TARGET
#if defined(__aarch64__)
#define NAME(x) x##_neon
#else
#define NAME(x) x##_base
#endif
#include "kernels_body.h"
#undef TARGET
#undef NAME

#if defined(__x86_64__)
/* A wheel must run on any x86-64, so what a newer one can do is compiled beside it and chosen at run time. No fused multiply-add: its
 * results would differ in the last bit from those of the other set. Wider vectors than these gain nothing, memory being the limit. */
#define TARGET __attribute__((target("avx2,f16c")))
#define NAME(x) x##_avx2
#define HALF_BY_F16C
#include "kernels_body.h"
#undef TARGET
#undef NAME
#undef HALF_BY_F16C

static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }
cg_kernel cg_find_kernel(int dtype, int op) { return has_avx2() ? table_avx2[dtype][op] : table_base[dtype][op]; }
const char *cg_kernel_isa(void) { return has_avx2() ? "avx2" : "sse2"; }
#elif defined(__aarch64__)
cg_kernel cg_find_kernel(int dtype, int op) { return table_neon[dtype][op]; }
const char *cg_kernel_isa(void) { return "neon"; }
#else
cg_kernel cg_find_kernel(int dtype, int op) { return table_base[dtype][op]; }
const char *cg_kernel_isa(void) { return "plain C"; }
#endif

size_t cg_dtype_bytes(int dtype) {
    static const unsigned char bytes[CG_DTYPES] = {4, 8, 2, 2, 1, 2, 4, 8, 1, 2, 4, 8};
    return bytes[dtype];
}
