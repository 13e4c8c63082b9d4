#include "kernels.h"

#include "copy.h"

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { BLOCK = 1024 }; /* elements: a block of float32 fills an eighth of a usual first cache */

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
/* A wheel must run on any x86-64, so kernels of newer instruction sets are compiled as well and chosen at run time. No fused multiply-add:
 * its results would differ in the last bit from those of the other sets. The processor's max and min return b where either is NaN: only the
 * case that a is NaN needs a blend. */
#define TARGET __attribute__((target("avx2,f16c,prfchw")))
#define NAME(x) x##_avx2
#define LANES 8
#define lanes __m256
TARGET static inline void copy_avx2(uint16_t *to, const uint16_t *from) { _mm256_storeu_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)from)); }
TARGET static inline lanes larger_avx2(lanes a, lanes b) { return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
TARGET static inline lanes smaller_avx2(lanes a, lanes b) { return _mm256_blendv_ps(_mm256_min_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
/* bfloat16 by pairs: a word of 32 bits holds two, and either is a float32 once the other's bits are gone. No element is moved. */
TARGET static inline lanes bf16_low_avx2(const uint16_t *from) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)from), 16)); }
TARGET static inline lanes bf16_high_avx2(const uint16_t *from) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i *)from), _mm256_set1_epi32((int)0xFFFF0000)));
}
/* To nearest even, in the upper half of each word. */
TARGET static inline __m256i bf16_round_avx2(lanes value) {
    __m256i bits = _mm256_castps_si256(value), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
}
TARGET static inline __m256i bf16_quiet_avx2(__m256i rounded, lanes value) {
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q)));
}
TARGET static inline void bf16_store_avx2(uint16_t *to, lanes low, lanes high) {
    __m256i below = bf16_round_avx2(low), above = bf16_round_avx2(high);
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(low, high, _CMP_UNORD_Q)), 0)) /* either is NaN */
        below = bf16_quiet_avx2(below, low), above = bf16_quiet_avx2(above, high);
    _mm256_storeu_si256((__m256i *)to, _mm256_blend_epi16(_mm256_srli_epi32(below, 16), above, 0xAA));
}
TARGET static inline lanes f16_low_avx2(const uint16_t *from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }
TARGET static inline lanes f16_high_avx2(const uint16_t *from) { return f16_low_avx2(from + LANES); }
TARGET static inline void f16_store_avx2(uint16_t *to, lanes low, lanes high) {
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(to + LANES), _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
}
#include "kernels_body.h"
#undef TARGET
#undef NAME
#undef LANES
#undef lanes

#if defined(__clang__) || __GNUC__ >= 10 /* compilers that know these instructions */
/* Twice as wide, with an instruction that rounds to bfloat16. A kernel that memory limits gains nothing; one of bfloat16 takes half the
 * time. */
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,f16c,prfchw,prefer-vector-width=512")))
#define NAME(x) x##_avx512
#define LANES 16
#define lanes __m512
TARGET static inline void copy_avx512(uint16_t *to, const uint16_t *from) { _mm512_storeu_si512(to, _mm512_loadu_si512(from)); }
TARGET static inline lanes larger_avx512(lanes a, lanes b) { return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a); }
TARGET static inline lanes smaller_avx512(lanes a, lanes b) { return _mm512_mask_mov_ps(_mm512_min_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a); }
TARGET static inline lanes bf16_low_avx512(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}
TARGET static inline lanes bf16_high_avx512(const uint16_t *from) { return bf16_low_avx512(from + LANES); }
TARGET static inline __m256i bf16_round_avx512(lanes value) {
    __m512i bits = _mm512_castps_si512(value), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
TARGET __attribute__((noinline)) static void bf16_store_rare_avx512(uint16_t *to, lanes low, lanes high) {
    _mm256_storeu_si256((__m256i *)to, bf16_round_avx512(low));
    _mm256_storeu_si256((__m256i *)(to + LANES), bf16_round_avx512(high));
}
TARGET static inline void bf16_store_avx512(uint16_t *to, lanes low, lanes high) {
    /* The instruction flushes subnormal numbers to zero, and keeps the payload of a NaN. */
    enum { NAN_OR_SUBNORMAL = 0x80 | 0x20 | 0x01 };
    if (__builtin_expect(_mm512_fpclass_ps_mask(low, NAN_OR_SUBNORMAL) | _mm512_fpclass_ps_mask(high, NAN_OR_SUBNORMAL), 0))
        bf16_store_rare_avx512(to, low, high);
    else
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
TARGET static inline lanes f16_low_avx512(const uint16_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
TARGET static inline lanes f16_high_avx512(const uint16_t *from) { return f16_low_avx512(from + LANES); }
TARGET static inline void f16_store_avx512(uint16_t *to, lanes low, lanes high) {
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
    _mm256_storeu_si256((__m256i *)(to + LANES), _mm512_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
}
#include "kernels_body.h"
#undef TARGET
#undef NAME
#undef LANES
#undef lanes

#else
#define table_avx512 table_avx2
#define conversion_avx512 conversion_avx2
#endif

static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}
cg_kernel cg_find_kernel(int dtype, int op) {
    return has_avx512() ? table_avx512[dtype][op] : has_avx2() ? table_avx2[dtype][op] : table_base[dtype][op];
}
static const cg_conversion *conversions(void) { return has_avx512() ? conversion_avx512 : has_avx2() ? conversion_avx2 : conversion_base; }
const char *cg_kernel_isa(void) { return has_avx512() ? "avx512" : has_avx2() ? "avx2" : "sse2"; }
#elif defined(__aarch64__)
cg_kernel cg_find_kernel(int dtype, int op) { return table_neon[dtype][op]; }
static const cg_conversion *conversions(void) { return conversion_neon; }
const char *cg_kernel_isa(void) { return "neon"; }
#else
cg_kernel cg_find_kernel(int dtype, int op) { return table_base[dtype][op]; }
static const cg_conversion *conversions(void) { return conversion_base; }
const char *cg_kernel_isa(void) { return "plain C"; }
#endif

const cg_conversion *cg_find_conversion(int dtype) { return dtype == CG_BF16 ? &conversions()[0] : dtype == CG_F16 ? &conversions()[1] : NULL; }

int cg_kernel_weight(int dtype) {
    if (dtype != CG_BF16 && dtype != CG_F16) return 1;
#if defined(__x86_64__)
    if (has_avx512()) return 2;
    if (has_avx2()) return 3;
#endif
    return 8;
}

size_t cg_dtype_bytes(int dtype) {
    static const unsigned char bytes[CG_DTYPES] = {4, 8, 2, 2, 1, 2, 4, 8, 1, 2, 4, 8};
    return bytes[dtype];
}
