/* The kernels of one instruction set: included by kernels.c once for each, with TARGET (a function attribute) and NAME(x) (a suffix). */

#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep") /* where `out` is a source, each iteration reads and writes one element of it */
#endif

/* Kernels in the type itself. Two sources in one pass; more through a block that stays in the first-level cache, because `out` may be a
 * source that is still to be read. */
#define DIRECT(name, T, COMBINE, FINISH)                                                             \
    TARGET static void NAME(name)(void *out_, const void *const *src, int n, size_t count, void *put_, const void *next_) { \
        T *out = out_, *put = put_;                                                                  \
        const T *first = src[0], *second = src[1], *next = next_;                                    \
        if (n == 2) {                                                                                \
            size_t i = 0;                                                                            \
            for (; put != NULL && i + CG_RUN / sizeof(T) <= count; i += CG_RUN / sizeof(T)) {        \
                CG_SOON(put + i, 1)                                                                  \
                INDEPENDENT                                                                          \
                for (size_t j = 0; j < CG_RUN / sizeof(T); j++) {                                    \
                    T a = first[i + j], b = second[i + j];                                           \
                    a = COMBINE;                                                                     \
                    out[i + j] = FINISH;                                                             \
                    put[i + j] = next[i + j];                                                        \
                }                                                                                    \
            }                                                                                        \
            if (put != NULL) memcpy(put + i, next + i, (count - i) * sizeof(T));                     \
            INDEPENDENT                                                                              \
            for (size_t j = i; j < count; j++) {                                                     \
                T a = first[j], b = second[j];                                                       \
                a = COMBINE;                                                                         \
                out[j] = FINISH;                                                                     \
            }                                                                                        \
            return;                                                                                  \
        }                                                                                            \
        T block[BLOCK];                                                                              \
        for (size_t at = 0; at < count; at += BLOCK) {                                               \
            size_t length = count - at < BLOCK ? count - at : BLOCK;                                 \
            for (size_t i = 0; i < length; i++) {                                                    \
                T a = first[at + i], b = second[at + i];                                             \
                block[i] = COMBINE;                                                                  \
            }                                                                                        \
            for (int k = 2; k < n; k++) {                                                            \
                const T *next = (const T *)src[k] + at;                                              \
                for (size_t i = 0; i < length; i++) {                                                \
                    T a = block[i], b = next[i];                                                     \
                    block[i] = COMBINE;                                                              \
                }                                                                                    \
            }                                                                                        \
            for (size_t i = 0; i < length; i++) {                                                    \
                T a = block[i];                                                                      \
                out[at + i] = FINISH;                                                                \
            }                                                                                        \
        }                                                                                            \
    }

/* Kernels of 16-bit types, in float32. Two registers at a time where the instruction set has `lanes`. */
#define WIDENED(name, KIND, COMBINE, COMBINE_LANES, FINISH)                                                    \
    TARGET static void NAME(name)(void *out_, const void *const *src, int n, size_t count, void *put_, const void *next_) { \
        uint16_t *out = out_, *put = put_;                                                           \
        const uint16_t *next = next_;                                                                \
        size_t at = 0;                                                                               \
        BY_REGISTERS(KIND, COMBINE_LANES, FINISH)                                                              \
        float block[BLOCK], other[BLOCK];                                                            \
        for (; at < count; at += BLOCK) {                                                            \
            size_t length = count - at < BLOCK ? count - at : BLOCK;                                 \
            NAME(KIND##_widen)(block, (const uint16_t *)src[0] + at, length);                        \
            for (int k = 1; k < n; k++) {                                                            \
                NAME(KIND##_widen)(other, (const uint16_t *)src[k] + at, length);                    \
                for (size_t i = 0; i < length; i++) {                                                \
                    float a = block[i], b = other[i];                                                \
                    block[i] = COMBINE;                                                              \
                }                                                                                    \
            }                                                                                        \
            for (size_t i = 0; i < length; i++) {                                                    \
                float a = block[i];                                                                  \
                block[i] = FINISH;                                                                   \
            }                                                                                        \
            NAME(KIND##_narrow)(out + at, block, length);                                            \
        }                                                                                            \
    }

#if defined(LANES)
/* This instruction set has `lanes`, LANES float32 in a register, and for each kind of 16 bits two loads, each of one half of
 * 2 LANES elements, a store of both, and a copy of so many. */
#define LANES_LARGER NAME(larger)(a, b)
#define LANES_SMALLER NAME(smaller)(a, b)
#define REGISTERS(KIND, UNTIL, HALF, COMBINE_LANES, FINISH, ALSO)                                              \
    for (; at + 2 * LANES <= UNTIL; at += 2 * LANES) {                                               \
        lanes low, high;                                                                             \
        { HALF(KIND##_low, COMBINE_LANES) low = FINISH; }                                                      \
        { HALF(KIND##_high, COMBINE_LANES) high = FINISH; }                                                    \
        NAME(KIND##_store)(out + at, low, high);                                                     \
        ALSO                                                                                         \
    }
#define OF_TWO(LOAD, COMBINE_LANES)                                                                            \
    lanes a = NAME(LOAD)(first + at), b = NAME(LOAD)(second + at);                                   \
    a = COMBINE_LANES;
#define OF_MANY(LOAD, COMBINE_LANES)                                                                           \
    lanes a = NAME(LOAD)(first + at);                                                                \
    for (int k = 1; k < n; k++) {                                                                    \
        lanes b = NAME(LOAD)((const uint16_t *)src[k] + at);                                         \
        a = COMBINE_LANES;                                                                                     \
    }
#define BY_REGISTERS(KIND, COMBINE_LANES, FINISH)                                                              \
    const uint16_t *first = src[0], *second = src[1];                                                \
    while (put != NULL && at + CG_RUN / sizeof *put <= count) {                                      \
        size_t until = at + CG_RUN / sizeof *put;                                                    \
        CG_SOON(first + at, 0)                                                                       \
        CG_SOON(second + at, 0)                                                                      \
        CG_SOON(put + at, 1)                                                                         \
        REGISTERS(KIND, until, OF_TWO, COMBINE_LANES, FINISH, NAME(copy)(put + at, next + at);)                \
    }                                                                                                \
    if (put != NULL) memcpy(put + at, next + at, (count - at) * sizeof *put);                        \
    if (n == 2) REGISTERS(KIND, count, OF_TWO, COMBINE_LANES, FINISH, )                                        \
    else REGISTERS(KIND, count, OF_MANY, COMBINE_LANES, FINISH, )
#else
#define BY_REGISTERS(KIND, COMBINE_LANES, FINISH)                                                              \
    if (put != NULL) memcpy(put, next, count * sizeof *put);
#endif

TARGET static void NAME(bf16_widen)(float *to, const uint16_t *from, size_t count) {
    for (size_t i = 0; i < count; i++) {
        union { uint32_t bits; float value; } u = {.bits = (uint32_t)from[i] << 16};
        to[i] = u.value;
    }
}

TARGET static void NAME(bf16_narrow)(uint16_t *to, const float *from, size_t count) {
    for (size_t i = 0; i < count; i++) {
        union { float value; uint32_t bits; } u = {.value = from[i]};
        uint32_t rounded = (u.bits + 0x7FFF + (u.bits >> 16 & 1)) >> 16;
        to[i] = (uint16_t)((u.bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    }
}

#if defined(LANES)
TARGET static void NAME(f16_widen)(float *to, const uint16_t *from, size_t count) {
    for (size_t i = 0; i < count; i++) to[i] = _cvtsh_ss(from[i]);
}
TARGET static void NAME(f16_narrow)(uint16_t *to, const float *from, size_t count) {
    for (size_t i = 0; i < count; i++) to[i] = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__aarch64__)
TARGET static void NAME(f16_widen)(float *to, const uint16_t *from, size_t count) {
    for (size_t i = 0; i < count; i++) {
        union { uint16_t bits; __fp16 value; } u = {.bits = from[i]};
        to[i] = u.value;
    }
}
TARGET static void NAME(f16_narrow)(uint16_t *to, const float *from, size_t count) {
    for (size_t i = 0; i < count; i++) {
        union { __fp16 value; uint16_t bits; } u = {.value = (__fp16)from[i]};
        to[i] = u.bits;
    }
}
#else
/* By integers alone. A half is a float of another bias: subnormals by the exact product with a power of two, rounding by the integer unit. */
TARGET static void NAME(f16_widen)(float *to, const uint16_t *from, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint32_t half = from[i], sign = (half & 0x8000) << 16, rest = half & 0x7FFF;
        union { uint32_t bits; float value; } scaled = {.bits = rest << 13}, whole, special = {.bits = (rest << 13) | 0x7F800000};
        whole.value = scaled.value * 0x1p+112f;
        /* A NaN is made quiet, as the processor's own conversion does. */
        if (rest > 0x7C00) special.bits |= 0x00400000;
        union { uint32_t bits; float value; } result = {.bits = (rest >= 0x7C00 ? special.bits : whole.bits) | sign};
        to[i] = result.value;
    }
}
TARGET static void NAME(f16_narrow)(uint16_t *to, const float *from, size_t count) {
    for (size_t i = 0; i < count; i++) {
        union { float value; uint32_t bits; } u = {.value = from[i]}, small;
        uint32_t sign = u.bits >> 16 & 0x8000, rest = u.bits & 0x7FFFFFFF, half;
        if (rest > 0x7F800000) {
            half = 0x7E00 | (rest >> 13 & 0x3FF);
        } else if (rest >= 0x477FF000) {
            half = 0x7C00; /* 65520 and beyond round to infinity */
        } else if (rest < 0x38800000) {
            /* Subnormal: the addition shifts and rounds, with one unit of the sum being one of the result. */
            small.bits = rest;
            small.value += 0.5f;
            half = small.bits - 0x3F000000;
        } else {
            half = (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13;
        }
        to[i] = (uint16_t)(half | sign);
    }
}
#endif

#define ADD a + b
#define TIMES a * b
#define LARGER (a > b || a != a) ? a : b
#define SMALLER (a < b || a != a) ? a : b
#define LARGER_WHOLE a > b ? a : b
#define SMALLER_WHOLE a < b ? a : b

#define FLOATS(prefix, T)                             \
    DIRECT(prefix##_sum, T, ADD, a)                   \
    DIRECT(prefix##_avg, T, ADD, a / (T)n)            \
    DIRECT(prefix##_max, T, LARGER, a)                \
    DIRECT(prefix##_min, T, SMALLER, a)               \
    DIRECT(prefix##_product, T, TIMES, a)
#define HALVES(prefix)                                                     \
    WIDENED(prefix##_sum, prefix, ADD, ADD, a)                             \
    WIDENED(prefix##_avg, prefix, ADD, ADD, a / (float)n)                  \
    WIDENED(prefix##_max, prefix, LARGER, LANES_LARGER, a)                 \
    WIDENED(prefix##_min, prefix, SMALLER, LANES_SMALLER, a)               \
    WIDENED(prefix##_product, prefix, TIMES, TIMES, a)
/* Signed sums and products are computed unsigned, where wrapping is defined; the bits are the same. */
#define WHOLES(bits)                                                                             \
    DIRECT(u##bits##_sum, uint##bits##_t, (uint##bits##_t)(a + b), a)                            \
    DIRECT(u##bits##_product, uint##bits##_t, (uint##bits##_t)(1u * a * b), a)                   \
    DIRECT(u##bits##_max, uint##bits##_t, LARGER_WHOLE, a)                                       \
    DIRECT(u##bits##_min, uint##bits##_t, SMALLER_WHOLE, a)                                      \
    DIRECT(i##bits##_max, int##bits##_t, LARGER_WHOLE, a)                                        \
    DIRECT(i##bits##_min, int##bits##_t, SMALLER_WHOLE, a)

FLOATS(f32, float)
FLOATS(f64, double)
HALVES(bf16)
HALVES(f16)
WHOLES(8)
WHOLES(16)
WHOLES(32)
WHOLES(64)

#define ALL_FLOAT(p) {NAME(p##_sum), NAME(p##_avg), NAME(p##_max), NAME(p##_min), NAME(p##_product)}
#define ALL_SIGNED(b) {NAME(u##b##_sum), NULL, NAME(i##b##_max), NAME(i##b##_min), NAME(u##b##_product)}
#define ALL_UNSIGNED(b) {NAME(u##b##_sum), NULL, NAME(u##b##_max), NAME(u##b##_min), NAME(u##b##_product)}
static const cg_kernel NAME(table)[CG_DTYPES][CG_OPS] = {
    [CG_F32] = ALL_FLOAT(f32), [CG_F64] = ALL_FLOAT(f64), [CG_BF16] = ALL_FLOAT(bf16), [CG_F16] = ALL_FLOAT(f16),
    [CG_I8] = ALL_SIGNED(8), [CG_I16] = ALL_SIGNED(16), [CG_I32] = ALL_SIGNED(32), [CG_I64] = ALL_SIGNED(64),
    [CG_U8] = ALL_UNSIGNED(8), [CG_U16] = ALL_UNSIGNED(16), [CG_U32] = ALL_UNSIGNED(32), [CG_U64] = ALL_UNSIGNED(64),
};
static const cg_conversion NAME(conversion)[2] = {{NAME(bf16_widen), NAME(bf16_narrow)}, {NAME(f16_widen), NAME(f16_narrow)}};

#undef INDEPENDENT
#undef DIRECT
#undef WIDENED
#undef BY_REGISTERS
#undef REGISTERS
#undef OF_TWO
#undef OF_MANY
#undef LANES_LARGER
#undef LANES_SMALLER
#undef ADD
#undef TIMES
#undef LARGER
#undef SMALLER
#undef LARGER_WHOLE
#undef SMALLER_WHOLE
#undef FLOATS
#undef HALVES
#undef WHOLES
#undef ALL_FLOAT
#undef ALL_SIGNED
#undef ALL_UNSIGNED
