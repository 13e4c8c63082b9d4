#include "copy.h"

#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

void cg_store_fence(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

void cg_copy(void *to, const void *from, size_t bytes, int nontemporal) {
#if defined(__SSE2__)
    /* Every x86-64 has these stores. Four fill one line, which then leaves the core as a whole. */
    if (nontemporal && bytes >= 256) {
        char *out = to;
        const char *in = from;
        size_t head = (size_t)(-(uintptr_t)out & 63);
        memcpy(out, in, head);
        out += head, in += head, bytes -= head;
        for (; bytes >= 64; bytes -= 64, out += 64, in += 64) {
            __m128i a = _mm_loadu_si128((const __m128i *)in), b = _mm_loadu_si128((const __m128i *)(in + 16));
            __m128i c = _mm_loadu_si128((const __m128i *)(in + 32)), d = _mm_loadu_si128((const __m128i *)(in + 48));
            _mm_stream_si128((__m128i *)out, a);
            _mm_stream_si128((__m128i *)(out + 16), b);
            _mm_stream_si128((__m128i *)(out + 32), c);
            _mm_stream_si128((__m128i *)(out + 48), d);
        }
        memcpy(out, in, bytes);
        return;
    }
#else
    (void)nontemporal;
#endif
    memcpy(to, from, bytes);
}

void cg_copy_both(void *to, const void *from, void *put, const void *next, size_t bytes, int nontemporal) {
    size_t at = 0;
    for (; at + CG_RUN <= bytes; at += CG_RUN) {
        CG_SOON((char *)put + at, 1)
        if (nontemporal) cg_copy((char *)to + at, (const char *)from + at, CG_RUN, 1);
        else memcpy((char *)to + at, (const char *)from + at, CG_RUN);
        memcpy((char *)put + at, (const char *)next + at, CG_RUN);
    }
    memcpy((char *)to + at, (const char *)from + at, bytes - at);
    memcpy((char *)put + at, (const char *)next + at, bytes - at);
}

void cg_pack(void *to, const cg_block *from, size_t at, size_t bytes, int nontemporal) {
    char *out = to;
    if (bytes == 0) return; /* the rows of an empty block may have no bytes */
    if (from->rows <= 1 || from->pitch == from->row) {
        cg_copy(out, from->base + at, bytes, nontemporal);
        return;
    }
    for (size_t row = at / from->row, offset = at % from->row; bytes > 0; row++, offset = 0) {
        size_t part = from->row - offset < bytes ? from->row - offset : bytes;
        cg_copy(out, from->base + row * from->pitch + offset, part, nontemporal);
        out += part, bytes -= part;
    }
}

void cg_unpack(const cg_block *to, const void *from, size_t at, size_t bytes) {
    const char *in = from;
    if (bytes == 0) return;
    if (to->rows <= 1 || to->pitch == to->row) {
        memcpy(to->base + at, in, bytes);
        return;
    }
    for (size_t row = at / to->row, offset = at % to->row; bytes > 0; row++, offset = 0) {
        size_t part = to->row - offset < bytes ? to->row - offset : bytes;
        memcpy(to->base + row * to->pitch + offset, in, part);
        in += part, bytes -= part;
    }
}
