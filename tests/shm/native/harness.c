/* Tests of the C core without Python: threads (and, in one part, processes) over one piece of zeroed memory.
 *
 *     harness PART SECONDS SEED        PART: one of those at the end of this file, or all
 *
 * Every member draws the same random numbers, so that each knows the input of all others and computes its own expected output. The first
 * failed check is printed, and ends the program with 1. nox -s tsan builds it with ThreadSanitizer, and with AddressSanitizer.
 */
#define _GNU_SOURCE
#include "collective.h"
#include "kernels.c" /* for the tables of every instruction set */
#include "net_reduce.h"
#include "pool.h"
#include "ring.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 5, PAGE_BYTES = 4096 };

static _Thread_local char doing[256]; /* the current operation of this thread, for the message of a failed check */

static void fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "harness: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, " [%s]\n", doing);
    va_end(args);
    _exit(1);
}

#define CHECK(condition, ...)              \
    do {                                   \
        if (!(condition)) fail(__VA_ARGS__); \
    } while (0)

/* Random numbers: splitmix64. */

typedef struct {
    uint64_t state;
} dice;

static uint64_t mix(uint64_t z) {
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

static uint64_t roll(dice *d) { return mix(d->state += 0x9E3779B97F4A7C15ull); }
static size_t below(dice *d, size_t limit) { return limit ? (size_t)(roll(d) % limit) : 0; }
static int chance(dice *d, int percent) { return (int)below(d, 100) < percent; }

static void pause_a_little(dice *d) {
    if (chance(d, 15)) sched_yield();
    if (chance(d, 4)) usleep((useconds_t)below(d, 300));
}

static int64_t soon(void) { return cg_clock_ns() + 60 * 1000000000ll; }

/* Values: element `i` of the input of rank `rank` in the call whose seed is `seed`. */

static uint64_t bits_of(uint64_t seed, int rank, size_t i) { return mix(seed ^ (uint64_t)rank << 56 ^ (uint64_t)i * 0x9E3779B97F4A7C15ull); }

static void fill_bytes(char *to, uint64_t seed, int rank, size_t begin, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) to[i] = (char)bits_of(seed, rank, begin + i);
}

static void check_bytes(const char *found, uint64_t seed, int rank, size_t begin, size_t bytes, const char *what) {
    for (size_t i = 0; i < bytes; i++)
        CHECK(found[i] == (char)bits_of(seed, rank, begin + i), "%s: byte %zu of %zu from rank %d is wrong", what, i, bytes, rank);
}

/* Elements as bits: integers of any value; floats of all kinds, with some NaN and infinity. */
static uint64_t element(int dtype, uint64_t seed, int rank, size_t i) {
    uint64_t bits = bits_of(seed, rank, i), kind = bits >> 58;
    if (dtype > CG_F16) return bits;
    static const uint64_t infinity[] = {0x7F800000, 0x7FF0000000000000, 0x7F80, 0x7C00};
    static const int width[] = {32, 64, 16, 16}, mantissa[] = {23, 52, 7, 10};
    uint64_t sign = (bits >> 8 & 1) << (width[dtype] - 1), whole = ((uint64_t)1 << (width[dtype] - 1)) - 1;
    uint64_t rest = (uint64_t)1 << mantissa[dtype];
    if (kind == 0) return infinity[dtype] | sign;
    if (kind == 1) return infinity[dtype] | sign | (bits % (rest - 1) + 1); /* NaN of any kind */
    if (kind == 2) return sign | bits % rest;                              /* zero, or subnormal */
    if (kind == 3) return (bits & whole) | sign;                           /* anything */
    /* Around one, so that sums round and tie. */
    uint64_t one = dtype == CG_F32 ? 0x3F800000 : dtype == CG_F64 ? 0x3FF0000000000000 : dtype == CG_BF16 ? 0x3F80 : 0x3C00;
    return sign | (one + (bits >> 12) % 8 * rest) | bits % rest;
}

static void store(char *to, int dtype, uint64_t bits) { /* little-endian, as every machine this runs on */
    memcpy(to, &bits, cg_dtype_bytes(dtype));
}

static uint64_t load(const char *from, int dtype) {
    uint64_t bits = 0;
    memcpy(&bits, from, cg_dtype_bytes(dtype));
    return bits;
}

static void fill_elements(char *to, int dtype, uint64_t seed, int rank, size_t begin, size_t count) {
    for (size_t i = 0; i < count; i++) store(to + i * cg_dtype_bytes(dtype), dtype, element(dtype, seed, rank, begin + i));
}

/* The reference, independent of the kernels: floats of 16 bits are converted through double. */

static double widen(uint64_t bits, int mantissa, int bias) {
    int exponents = 15 - mantissa;
    uint64_t fraction = bits & ((1u << mantissa) - 1), exponent = bits >> mantissa & ((1u << exponents) - 1);
    double sign = bits >> 15 ? -1.0 : 1.0;
    if (exponent == (1u << exponents) - 1) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * ldexp((double)fraction, 1 - bias - mantissa);
    return sign * ldexp((double)(fraction | 1u << mantissa), (int)exponent - bias - mantissa);
}

/* To nearest, ties to even; NaN as the quiet one without sign. */
static uint64_t narrow(double value, int mantissa, int bias) {
    int exponents = 15 - mantissa;
    uint64_t infinity = ((1ull << exponents) - 1) << mantissa, sign = signbit(value) ? 0x8000 : 0;
    if (isnan(value)) return infinity | 1ull << (mantissa - 1);
    if (isinf(value)) return sign | infinity;
    int exponent = value == 0 ? -bias + 1 : ilogb(value);
    if (exponent < 1 - bias) exponent = 1 - bias;
    double units = nearbyint(ldexp(fabs(value), mantissa - exponent)); /* exact but for the rounding */
    uint64_t fraction = (uint64_t)units;
    /* A carry into the next exponent comes out by itself, and infinity, too. */
    uint64_t bits = fraction < 1ull << mantissa ? fraction : ((uint64_t)(exponent + bias) << mantissa) + (fraction - (1ull << mantissa));
    return sign | (bits > infinity ? infinity : bits);
}

static float combine_float(float a, float b, int op) {
    switch (op) {
    case CG_MAX: return isnan(a) || isnan(b) ? NAN : a > b ? a : b;
    case CG_MIN: return isnan(a) || isnan(b) ? NAN : a < b ? a : b;
    case CG_PRODUCT: return a * b;
    default: return a + b;
    }
}

static double combine_double(double a, double b, int op) {
    switch (op) {
    case CG_MAX: return isnan(a) || isnan(b) ? NAN : a > b ? a : b;
    case CG_MIN: return isnan(a) || isnan(b) ? NAN : a < b ? a : b;
    case CG_PRODUCT: return a * b;
    default: return a + b;
    }
}

static int is_signed(int dtype) { return dtype >= CG_I8 && dtype <= CG_I64; }

static int64_t extend(uint64_t bits, int dtype) {
    int shift = 64 - 8 * (int)cg_dtype_bytes(dtype);
    return (int64_t)(bits << shift) >> shift;
}

static uint64_t combine_whole(uint64_t a, uint64_t b, int dtype, int op) {
    int less = is_signed(dtype) ? extend(a, dtype) < extend(b, dtype) : a < b;
    uint64_t bits = op == CG_MAX ? (less ? b : a) : op == CG_MIN ? (less ? a : b) : op == CG_PRODUCT ? a * b : a + b;
    return cg_dtype_bytes(dtype) == 8 ? bits : bits & ((1ull << 8 * cg_dtype_bytes(dtype)) - 1);
}

/* Whether `found` is the reduction of `given`, in their order. Any NaN equals any other, and either zero the other. */
static int is_reduction(uint64_t found, const uint64_t *given, int n, int dtype, int op) {
    if (dtype == CG_F64) {
        union { uint64_t bits; double value; } u = {given[0]}, f = {found};
        for (int p = 1; p < n; p++) {
            union { uint64_t bits; double value; } next = {given[p]};
            u.value = combine_double(u.value, next.value, op);
        }
        if (op == CG_AVG) u.value /= n;
        return isnan(u.value) ? isnan(f.value) : u.value == f.value;
    }
    if (dtype == CG_F32) {
        union { uint32_t bits; float value; } u = {(uint32_t)given[0]}, f = {(uint32_t)found};
        for (int p = 1; p < n; p++) {
            union { uint32_t bits; float value; } next = {(uint32_t)given[p]};
            u.value = combine_float(u.value, next.value, op);
        }
        if (op == CG_AVG) u.value /= (float)n;
        return isnan(u.value) ? isnan(f.value) : u.value == f.value;
    }
    if (dtype == CG_BF16 || dtype == CG_F16) {
        int mantissa = dtype == CG_BF16 ? 7 : 10, bias = dtype == CG_BF16 ? 127 : 15;
        float sum = (float)widen(given[0], mantissa, bias);
        for (int p = 1; p < n; p++) sum = combine_float(sum, (float)widen(given[p], mantissa, bias), op);
        if (op == CG_AVG) sum /= (float)n;
        if (isnan(sum)) return isnan(widen(found, mantissa, bias));
        uint64_t right = narrow(sum, mantissa, bias);
        return found == right || ((found | right) & 0x7FFF) == 0;
    }
    uint64_t whole = given[0] & (cg_dtype_bytes(dtype) == 8 ? UINT64_MAX : (1ull << 8 * cg_dtype_bytes(dtype)) - 1);
    for (int p = 1; p < n; p++) {
        uint64_t next = cg_dtype_bytes(dtype) == 8 ? given[p] : given[p] & ((1ull << 8 * cg_dtype_bytes(dtype)) - 1);
        whole = combine_whole(whole, next, dtype, op);
    }
    return found == whole;
}

static void check_reduction(const char *found, int n, int dtype, int op, uint64_t seed, size_t begin, size_t count) {
    uint64_t given[2 * MOST];
    for (size_t i = 0; i < count; i++) {
        for (int p = 0; p < n; p++) given[p] = element(dtype, seed, p, begin + i);
        uint64_t bits = load(found + i * cg_dtype_bytes(dtype), dtype);
        CHECK(is_reduction(bits, given, n, dtype, op), "dtype %d op %d of %d ranks, element %zu of %zu: %#llx of %#llx, %#llx ...", dtype, op, n, i,
              count, (unsigned long long)bits, (unsigned long long)given[0], (unsigned long long)given[1]);
    }
}

/* Memory of a tensor: private with exact ends, in a shared region, or between two pages without access. */

typedef struct {
    char *data, *base;
    size_t mapped; /* bytes of the mapping; 0: of malloc; SIZE_MAX: not owned by this buffer */
} buffer;

enum { SPARES = 2 * MOST, SPARE_PAGES = 4 };
static _Thread_local char *spares[SPARES]; /* mappings of SPARE_PAGES between guards, to be used again: making one takes long */
static _Thread_local int n_spares;

static buffer guarded(size_t bytes, int at_end) {
    size_t pages = bytes <= SPARE_PAGES * PAGE_BYTES ? SPARE_PAGES : (bytes + PAGE_BYTES - 1) / PAGE_BYTES, mapped = (pages + 2) * PAGE_BYTES;
    char *base = pages == SPARE_PAGES && n_spares > 0 ? spares[--n_spares] : NULL;
    if (base == NULL) {
        base = mmap(NULL, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(base != MAP_FAILED && mprotect(base + PAGE_BYTES, pages * PAGE_BYTES, PROT_READ | PROT_WRITE) == 0, "mmap: %s", strerror(errno));
    }
    char *data = at_end ? base + PAGE_BYTES + pages * PAGE_BYTES - bytes : base + PAGE_BYTES;
    return (buffer){data, base, mapped};
}

static buffer private(size_t bytes, size_t shift) {
    char *base = malloc(bytes + shift + !(bytes + shift));
    CHECK(base != NULL, "malloc");
    return (buffer){base + shift, base, 0};
}

static void free_buffer(buffer *b) {
    if (b->mapped == 0) free(b->base);
    else if (b->mapped == (SPARE_PAGES + 2) * PAGE_BYTES && n_spares < SPARES) spares[n_spares++] = b->base;
    else if (b->mapped != SIZE_MAX) munmap(b->base, b->mapped);
}

/* Shared memory of a team: members, a group, a region. */

typedef struct {
    int n;
    size_t slot_bytes, region_bytes;
    char *memory, *region;
    size_t bytes;
} place;

enum { MEMBERS_BYTES = 4 * PAGE_BYTES, REGIONS = 2 };

static place make_place(int n, size_t slot_bytes, size_t region_bytes) {
    place p = {n, slot_bytes, region_bytes, NULL, NULL, 0};
    size_t group = (cg_group_bytes(n, slot_bytes) + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    p.bytes = MEMBERS_BYTES + group + REGIONS * (size_t)n * region_bytes;
    p.memory = mmap(NULL, p.bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(p.memory != MAP_FAILED, "mmap: %s", strerror(errno));
    p.region = p.memory + MEMBERS_BYTES + group;
    return p;
}

static void clear_place(place *p) { munmap(p->memory, p->bytes); }

typedef struct {
    cg_team team;
    cg_group group;
    uint64_t calls;
} member;

static void join_place(member *m, const place *p, int me) {
    int error = cg_team_join(&m->team, (cg_member *)p->memory, p->n, me, p->n);
    CHECK(error == 0, "join: %s", strerror(error));
    cg_group_join(&m->group, &m->team, p->memory + MEMBERS_BYTES, p->slot_bytes);
    for (int k = 0; k < REGIONS && p->region_bytes; k++) {
        char *base = p->region + (size_t)k * (size_t)p->n * p->region_bytes;
        CHECK(cg_group_add_region(&m->group, base, p->region_bytes, p->region_bytes) == 0, "add_region");
    }
    m->calls = 0;
}

static void leave_place(member *m) {
    cg_group_leave(&m->group);
    cg_team_leave(&m->team);
}

static cg_call next_call(member *m, int operation) {
    uint64_t number = m->calls++;
    return (cg_call){.tag = (uint32_t)(0x1234567 ^ (uint32_t)number * 0x9E3779B1u) & 0xFFFFFFF, .call = number << 8 | (uint64_t)operation, .deadline = soon()};
}

static void succeeded(int result, int who) { CHECK(result == CG_OK, "ended with %d, about %d", result, who); }

/* Collectives. */

typedef struct {
    const place *place;
    int me;
    uint64_t seed;
    size_t steps;
    int guards; /* every buffer between guard pages */
    const size_t *sizes; /* bytes, in place of random ones */
} session;

enum { STRIDES = 3 };

/* Sizes around which the core branches: a few bytes, a slot, the bytes of one step, several slots. */
static size_t interesting(dice *d, const place *p, size_t unit) {
    static const size_t few[] = {1, 2, 3, 7, 8, 16, 63, 64, 65, 100, 127, 255, 256, 257, 1000};
    size_t one_step = 512 * 1024 / (size_t)p->n, bytes;
    switch (below(d, 6)) {
    case 0: return (few[below(d, sizeof few / sizeof *few)] + unit - 1) / unit;
    case 1: bytes = p->slot_bytes * (1 + below(d, 4)); break;
    case 2: bytes = p->slot_bytes >= one_step ? one_step : p->slot_bytes; break;
    case 3: bytes = p->slot_bytes / (size_t)p->n * (1 + below(d, 3)); break;
    default: return 1 + below(d, 5 * p->slot_bytes / unit);
    }
    bytes /= unit;
    return bytes + below(d, 5) > 2 ? bytes + below(d, 5) - 2 : 1;
}

/* Memory for a tensor of this rank; `mine` are the dice of this rank alone, because ranks choose their memory independently. */
static buffer tensor_of(const session *s, dice *mine, size_t bytes, size_t unit, int *in_use) {
    if (s->guards) return guarded(bytes, chance(mine, 50));
    const place *p = s->place;
    if (*in_use < REGIONS && chance(mine, 60) && bytes <= p->region_bytes) {
        size_t room = (p->region_bytes - bytes) / unit, k = (size_t)(*in_use)++;
        char *region = p->region + (k * (size_t)p->n + (size_t)s->me) * p->region_bytes;
        char *data = region + below(mine, room + 1) * unit;
        return (buffer){data, data, SIZE_MAX};
    }
    return private(bytes, below(mine, 9) * unit);
}

/* A random block of `bytes`, in rows where their number divides. */
static cg_block block_of(dice *d, size_t bytes, size_t unit, size_t *span) {
    size_t rows = 1 + below(d, STRIDES), row, pitch;
    while (bytes / unit % rows) rows--;
    row = bytes / rows;
    pitch = rows > 1 ? row + unit * below(d, 3) : row;
    *span = bytes ? (rows - 1) * pitch + row : 0;
    return (cg_block){NULL, rows, row, pitch};
}

static void block_bytes(const cg_block *block, uint64_t seed, int rank, size_t begin, int check, const char *what) {
    for (size_t r = 0; r < block->rows; r++) {
        char *row = block->base + r * block->pitch;
        if (check) check_bytes(row, seed, rank, begin + r * block->row, block->row, what);
        else fill_bytes(row, seed, rank, begin + r * block->row, block->row);
    }
}

static void do_all_reduce(const session *s, member *m, dice *ours, dice *mine, size_t given_bytes) {
    int dtype = (int)below(ours, CG_DTYPES), op = (int)below(ours, CG_OPS), in_place = chance(ours, 50), n = s->place->n, who = -1, in_use = 0;
    if (cg_find_kernel(dtype, op) == NULL) op = CG_SUM;
    size_t unit = cg_dtype_bytes(dtype), count = given_bytes ? (given_bytes + unit - 1) / unit : interesting(ours, s->place, unit);
    uint64_t seed = roll(ours);
    snprintf(doing, sizeof doing, "rank %d: all_reduce of %zu, dtype %d op %d in_place %d", s->me, count, dtype, op, in_place);
    buffer from = tensor_of(s, mine, count * unit, unit, &in_use), to = from;
    if (!in_place) to = tensor_of(s, mine, count * unit, unit, &in_use);
    fill_elements(from.data, dtype, seed, s->me, 0, count);
    cg_call call = next_call(m, 2);
    if (!in_place && chance(mine, 50) && cg_can_halve_all_reduce(&m->group, count, dtype)) {
        /* The other ranks need not call it in halves. */
        cg_all_reduce_begin(&m->group, &call, from.data, count, dtype);
        pause_a_little(mine);
        cg_all_reduce_has_arrived(&m->group);
        succeeded(cg_all_reduce_end(&m->group, &call, from.data, to.data, count, dtype, op, &who), who);
    } else {
        succeeded(cg_all_reduce(&m->group, &call, from.data, to.data, count, dtype, op, in_place, &who), who);
    }
    check_reduction(to.data, n, dtype, op, seed, 0, count);
    if (!in_place) {
        for (size_t i = 0; i < count; i++)
            CHECK(load(from.data + i * unit, dtype) == (unit == 8 ? element(dtype, seed, s->me, i) : element(dtype, seed, s->me, i) & ((1ull << 8 * unit) - 1)),
                  "element %zu of the input was changed", i);
        free_buffer(&to);
    }
    free_buffer(&from);
}

static void do_all_gatherv(const session *s, member *m, dice *ours, dice *mine, size_t given_bytes) {
    int n = s->place->n, who = -1, in_use = 0, kind = (int)below(ours, 3), root = (int)below(ours, (size_t)n);
    uint64_t seed = roll(ours);
    size_t bytes[MOST], spans[MOST];
    cg_block into[MOST];
    buffer outputs[MOST], own = {NULL, NULL, SIZE_MAX};
    for (int p = 0; p < n; p++) {
        bytes[p] = given_bytes ? given_bytes : chance(ours, 10) ? 0 : interesting(ours, s->place, 1);
        if (kind == 1 && p != root) bytes[p] = 0; /* a broadcast */
    }
    snprintf(doing, sizeof doing, "rank %d: all_gatherv of kind %d root %d, %zu %zu ... bytes", s->me, kind, root, bytes[0], bytes[1]);
    int in_place = kind != 2 && chance(mine, 30);
    for (int p = 0; p < n; p++) {
        into[p] = block_of(mine, bytes[p], 1, &spans[p]);
        outputs[p] = (buffer){NULL, NULL, SIZE_MAX};
        if (bytes[p] == 0 || (kind == 2 && s->me != root)) continue; /* a gather */
        if (p == s->me && in_place) into[p] = (cg_block){NULL, 1, bytes[p], bytes[p]}, spans[p] = bytes[p];
        outputs[p] = p == s->me && in_place ? tensor_of(s, mine, spans[p], 1, &in_use) : s->guards ? guarded(spans[p], chance(mine, 50)) : private(spans[p], below(mine, 9));
        memset(outputs[p].data, 0x5A, spans[p]);
        into[p].base = outputs[p].data;
    }
    if (bytes[s->me] > 0) {
        own = in_place && into[s->me].base ? (buffer){into[s->me].base, NULL, SIZE_MAX} : tensor_of(s, mine, bytes[s->me], 1, &in_use);
        fill_bytes(own.data, seed, s->me, 0, bytes[s->me]);
    }
    cg_call call = next_call(m, 4);
    int everywhere = kind == 0 || (kind == 1 && chance(ours, 30));
    succeeded(cg_all_gatherv(&m->group, &call, own.data, bytes, into, everywhere, &who), who);
    if (bytes[s->me] > 0) check_bytes(own.data, seed, s->me, 0, bytes[s->me], "the input");
    for (int p = 0; p < n; p++)
        if (into[p].base != NULL) block_bytes(&into[p], seed, p, 0, 1, "a piece");
    free_buffer(&own);
    for (int p = 0; p < n; p++) free_buffer(&outputs[p]);
}

static void do_all_to_allv(const session *s, member *m, dice *ours, dice *mine, size_t given_bytes) {
    int n = s->place->n, who = -1, in_use = 0;
    uint64_t seed = roll(ours);
    size_t pair_sizes[MOST][MOST], span;
    cg_block out[MOST], into[MOST];
    buffer outs[MOST], ins[MOST];
    for (int p = 0; p < n; p++)
        for (int q = 0; q < n; q++) pair_sizes[p][q] = given_bytes ? given_bytes : chance(ours, 15) ? 0 : 1 + interesting(ours, s->place, 1) / (size_t)n;
    snprintf(doing, sizeof doing, "rank %d: all_to_allv, %zu to the next", s->me, pair_sizes[s->me][(s->me + 1) % n]);
    for (int p = 0; p < n; p++) {
        out[p] = block_of(mine, pair_sizes[s->me][p], 1, &span);
        outs[p] = tensor_of(s, mine, span, 1, &in_use);
        out[p].base = outs[p].data;
        block_bytes(&out[p], seed + (uint64_t)p, s->me, 0, 0, "");
        into[p] = block_of(mine, pair_sizes[p][s->me], 1, &span);
        ins[p] = s->guards ? guarded(span, chance(mine, 50)) : private(span, below(mine, 9));
        into[p].base = ins[p].data;
    }
    cg_call call = next_call(m, 6);
    succeeded(cg_all_to_allv(&m->group, &call, out, into, &who), who);
    for (int p = 0; p < n; p++) {
        block_bytes(&out[p], seed + (uint64_t)p, s->me, 0, 1, "an input");
        block_bytes(&into[p], seed + (uint64_t)s->me, p, 0, 1, "a piece");
        free_buffer(&outs[p]);
        free_buffer(&ins[p]);
    }
}

static void do_reduce_scatter(const session *s, member *m, dice *ours, dice *mine, size_t given_bytes) {
    int dtype = (int)below(ours, CG_DTYPES), op = (int)below(ours, CG_OPS), n = s->place->n, who = -1, in_use = 0;
    if (cg_find_kernel(dtype, op) == NULL) op = CG_SUM;
    size_t unit = cg_dtype_bytes(dtype), counts[MOST], width = 0, rows = chance(ours, 60) ? 1 : 2 + below(ours, 3);
    uint64_t seed = roll(ours);
    for (int p = 0; p < n; p++) {
        counts[p] = given_bytes ? (given_bytes + unit - 1) / unit : chance(ours, 10) ? 0 : 1 + interesting(ours, s->place, unit) / (size_t)n / rows;
        width += counts[p];
    }
    snprintf(doing, sizeof doing, "rank %d: reduce_scatter of %zu x %zu, dtype %d op %d", s->me, rows, width, dtype, op);
    /* The whole tensor is rows x width, and cut into columns; element (row, column) is numbered row * width + column. */
    buffer whole = tensor_of(s, mine, rows * width * unit, unit, &in_use);
    size_t own = counts[s->me] * rows * unit, begin = 0;
    buffer to = s->guards ? guarded(own, chance(mine, 50)) : tensor_of(s, mine, own, unit, &in_use);
    fill_elements(whole.data, dtype, seed, s->me, 0, rows * width);
    cg_block out[MOST];
    size_t column = 0;
    for (int p = 0; p < n; p++) {
        if (p == s->me) begin = column;
        out[p] = (cg_block){whole.data + column * unit, counts[p] ? rows : 0, counts[p] * unit, width * unit};
        column += counts[p];
    }
    cg_call call = next_call(m, 5);
    succeeded(cg_reduce_scatter(&m->group, &call, out, to.data, dtype, op, &who), who);
    for (size_t r = 0; r < rows; r++) check_reduction(to.data + r * counts[s->me] * unit, n, dtype, op, seed, r * width + begin, counts[s->me]);
    free_buffer(&whole);
    free_buffer(&to);
}

static void *run_session(void *arg) {
    session *s = arg;
    member m;
    dice ours = {s->seed}, mine = {mix(s->seed + 1 + (uint64_t)s->me)};
    snprintf(doing, sizeof doing, "rank %d", s->me);
    join_place(&m, s->place, s->me);
    int none = -1;
    cg_call first = next_call(&m, 1);
    succeeded(cg_group_probe_cma(&m.group, &first, &none), none);
    const int has_cma = m.group.cma_from != 0, threads = m.group.same_process_from != 0;
    for (size_t step = 0; step < s->steps; step++) {
        int who = -1;
        m.group.nontemporal = (int)below(&mine, 3) - 1;
        m.group.cma_from = !has_cma ? 0 : below(&mine, 2) ? 1 : SIZE_MAX;
        m.group.same_process_from = threads && below(&ours, 2); /* any size, or none */
        pause_a_little(&mine);
        size_t bytes = s->sizes ? s->sizes[step % s->steps] : 0;
        switch (below(&ours, 9)) {
        case 0: {
            cg_call call = next_call(&m, 1);
            snprintf(doing, sizeof doing, "rank %d: barrier", s->me);
            succeeded(cg_barrier(&m.group, &call, &who), who);
            break;
        }
        case 1: case 2: case 3: do_all_reduce(s, &m, &ours, &mine, bytes); break;
        case 4: case 5: do_all_gatherv(s, &m, &ours, &mine, bytes); break;
        case 6: do_all_to_allv(s, &m, &ours, &mine, bytes); break;
        default: do_reduce_scatter(s, &m, &ours, &mine, bytes); break;
        }
    }
    /* A rank leaves only after all others have ended: they may read its memory. */
    int who = -1;
    cg_call call = next_call(&m, 1);
    succeeded(cg_barrier(&m.group, &call, &who), who);
    leave_place(&m);
    return NULL;
}

static void run_threads(int n, void *(*run)(void *), void *args, size_t stride) {
    pthread_t threads[64];
    for (int i = 0; i < n; i++) CHECK(pthread_create(&threads[i], NULL, run, (char *)args + (size_t)i * stride) == 0, "pthread_create");
    for (int i = 0; i < n; i++) pthread_join(threads[i], NULL);
}

static void collectives(dice *d, int64_t until) {
    do {
        int n = 2 + (int)below(d, 3);
        static const size_t slots[] = {4096, 4096, 8192, 16384, 65536, 262144};
        size_t slot = slots[below(d, sizeof slots / sizeof *slots)];
        place p = make_place(n, slot, 6 * slot);
        session sessions[MOST];
        uint64_t seed = roll(d);
        for (int i = 0; i < n; i++) sessions[i] = (session){&p, i, seed, slot > 16384 ? 6 : 25, 0, NULL};
        run_threads(n, run_session, sessions, sizeof *sessions);
        clear_place(&p);
    } while (cg_clock_ns() < until);
}

/* Guard pages around every input and output. */

static const size_t GUARD_SIZES[] = {1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 320, 1000, 4095, 4096, 4097};
enum { N_GUARD_SIZES = sizeof GUARD_SIZES / sizeof *GUARD_SIZES };

static void guarded_copies(void) {
    for (size_t k = 0; k < N_GUARD_SIZES; k++) {
        size_t bytes = GUARD_SIZES[k];
        for (int how = 0; how < 8; how++) {
            snprintf(doing, sizeof doing, "cg_copy of %zu, nontemporal %d, ends %d", bytes, how & 1, how >> 1);
            buffer from = guarded(bytes, how >> 1 & 1), to = guarded(bytes, how >> 2);
            fill_bytes(from.data, 7, 0, 0, bytes);
            cg_copy(to.data, from.data, bytes, how & 1);
            cg_store_fence();
            check_bytes(to.data, 7, 0, 0, bytes, "a copy");
            /* Two copies at once, the second to memory of its own or to where the first was read. */
            for (int same = 0; same < 2; same++) {
                buffer first = guarded(bytes, how >> 1 & 1), copied = guarded(bytes, how >> 2), put = guarded(bytes, how >> 2);
                fill_bytes(first.data, 8, 0, 0, bytes);
                cg_copy_both(copied.data, first.data, same ? first.data : put.data, from.data, bytes, how & 1);
                cg_store_fence();
                check_bytes(copied.data, 8, 0, 0, bytes, "the first copy");
                check_bytes(same ? first.data : put.data, 7, 0, 0, bytes, "the second copy");
                free_buffer(&first), free_buffer(&copied), free_buffer(&put);
            }
            /* Three rows of these bytes, to dense memory and back, from the middle of one row to the middle of another. */
            for (size_t gap = 0; gap < 2; gap++) {
                size_t span = 3 * bytes + 2 * gap, at = bytes / 2, part = 2 * bytes;
                buffer rows = guarded(span, how >> 1 & 1), dense = guarded(part, how >> 2), back = guarded(span, how >> 2);
                cg_block block = {rows.data, 3, bytes, bytes + gap}, returned = {back.data, 3, bytes, bytes + gap};
                block_bytes(&block, 9, 0, 0, 0, "");
                memset(back.data, 0, span);
                cg_pack(dense.data, &block, at, part, how & 1);
                cg_store_fence();
                check_bytes(dense.data, 9, 0, at, part, "packed bytes");
                cg_unpack(&returned, dense.data, at, part);
                for (size_t i = 0; i < 3 * bytes; i++) {
                    char found = back.data[i / bytes * (bytes + gap) + i % bytes];
                    CHECK(found == (i >= at && i < at + part ? (char)bits_of(9, 0, i) : 0), "unpacked byte %zu", i);
                }
                free_buffer(&rows), free_buffer(&dense), free_buffer(&back);
            }
            free_buffer(&from), free_buffer(&to);
        }
    }
}

/* One kernel at many counts, from memory with guards, into memory of its own or into that of a source. */
static void try_kernel(cg_kernel kernel, const char *set, int dtype, int op) {
    size_t unit = cg_dtype_bytes(dtype);
    for (int n = 2; n <= MOST; n++) {
        for (size_t k = 0; k < N_GUARD_SIZES; k++) {
            size_t count = (GUARD_SIZES[k] + unit - 1) / unit;
            if (n > 3 && count > 300) continue; /* more ranks are the same loop */
            for (int how = 0; how < 4; how++) {
                int into = how == 3 ? (int)(k % (size_t)n) : -1;
                snprintf(doing, sizeof doing, "%s kernel, dtype %d op %d of %d, %zu elements, how %d", set, dtype, op, n, count, how);
                uint64_t seed = mix((uint64_t)dtype << 40 ^ (uint64_t)op << 32 ^ (uint64_t)n << 24 ^ k);
                buffer sources[MOST], out = guarded(count * unit, how & 1);
                const void *pointers[MOST];
                for (int p = 0; p < n; p++) {
                    sources[p] = guarded(count * unit, how == 2 ? p & 1 : !(how & 1));
                    fill_elements(sources[p].data, dtype, seed, p, 0, count);
                    pointers[p] = sources[p].data;
                }
                char *to = into >= 0 ? sources[into].data : out.data;
                /* Two sources, and an interleaved copy. */
                int puts = n == 2 && how != 1;
                buffer put = guarded(puts ? count * unit : 0, how & 1), next = guarded(puts ? count * unit : 0, !(how & 1));
                if (puts) fill_bytes(next.data, seed, 3, 0, count * unit);
                kernel(to, pointers, n, count, puts ? put.data : NULL, puts ? next.data : NULL);
                check_reduction(to, n, dtype, op, seed, 0, count);
                if (puts) check_bytes(put.data, seed, 3, 0, count * unit, "the interleaved copy");
                free_buffer(&put), free_buffer(&next);
                for (int p = 0; p < n; p++) free_buffer(&sources[p]);
                free_buffer(&out);
            }
        }
    }
}

/* The bits of a result, those of a NaN included, must not depend on the alignment of the tensors, which differs between ranks. */
static void bits_by_place(cg_kernel kernel, const char *set, int dtype, int op) {
    size_t unit = cg_dtype_bytes(dtype), count = 200;
    char first[8 * 200];
    for (int n = 2; n <= 4; n += 2) {
        for (size_t shift = 0; shift < 18; shift++) {
            snprintf(doing, sizeof doing, "%s kernel, dtype %d op %d of %d, shifted by %zu", set, dtype, op, n, shift);
            buffer sources[MOST], out = private(count * unit, (shift * 5 % 17) * unit);
            const void *pointers[MOST];
            for (int p = 0; p < n; p++) {
                sources[p] = private(count * unit, ((shift + (size_t)p * 3) % 17) * unit);
                fill_elements(sources[p].data, dtype, 77, p, 0, count);
                /* Two NaNs of different payloads in one element, everywhere in a vector. */
                for (size_t i = 0; i < count; i += 3) store(sources[p].data + i * unit, dtype, element(dtype, 77, p, i) | (dtype == CG_F32 ? 0x7FC00000 : dtype == CG_F64 ? 0x7FF8000000000000 : 0x7FC0));
                pointers[p] = sources[p].data;
            }
            kernel(out.data, pointers, n, count, NULL, NULL);
            if (shift == 0) memcpy(first, out.data, count * unit);
            CHECK(memcmp(first, out.data, count * unit) == 0, "other bits than without the shift");
            for (int p = 0; p < n; p++) free_buffer(&sources[p]);
            free_buffer(&out);
        }
    }
}

static void kernels(void) {
    for (int dtype = 0; dtype < CG_DTYPES; dtype++) {
        for (int op = 0; op < CG_OPS; op++) {
#if defined(__x86_64__)
            if (table_base[dtype][op] != NULL) try_kernel(table_base[dtype][op], "sse2", dtype, op);
            if (dtype <= CG_F16) bits_by_place(table_base[dtype][op], "sse2", dtype, op);
            if (has_avx2() && table_avx2[dtype][op] != NULL) try_kernel(table_avx2[dtype][op], "avx2", dtype, op);
            if (has_avx2() && dtype <= CG_F16) bits_by_place(table_avx2[dtype][op], "avx2", dtype, op);
            if (has_avx512() && table_avx512[dtype][op] != NULL) try_kernel(table_avx512[dtype][op], "avx512", dtype, op);
            if (has_avx512() && dtype <= CG_F16) bits_by_place(table_avx512[dtype][op], "avx512", dtype, op);
#else
            if (cg_find_kernel(dtype, op) != NULL) try_kernel(cg_find_kernel(dtype, op), cg_kernel_isa(), dtype, op);
            if (dtype <= CG_F16) bits_by_place(cg_find_kernel(dtype, op), cg_kernel_isa(), dtype, op);
#endif
        }
    }
    /* Every value of 16 bits, widened and narrowed: its maximum with itself is itself. */
    for (int dtype = CG_BF16; dtype <= CG_F16; dtype++) {
        static uint16_t all[1 << 16], out[1 << 16];
        const void *sources[2] = {all, all};
        for (uint32_t i = 0; i < 1 << 16; i++) all[i] = (uint16_t)i;
#if defined(__x86_64__)
        cg_kernel sets[3] = {table_base[dtype][CG_MAX], has_avx2() ? table_avx2[dtype][CG_MAX] : table_base[dtype][CG_MAX],
                             has_avx512() ? table_avx512[dtype][CG_MAX] : table_base[dtype][CG_MAX]};
#else
        cg_kernel sets[1] = {cg_find_kernel(dtype, CG_MAX)};
#endif
        uint32_t infinity = dtype == CG_BF16 ? 0x7F80 : 0x7C00;
        for (size_t set = 0; set < sizeof sets / sizeof *sets; set++) {
            sets[set](out, sources, 2, 1 << 16, NULL, NULL);
            for (uint32_t i = 0; i < 1 << 16; i++)
                CHECK(((i & 0x7FFF) > infinity) ? (out[i] & 0x7FFFu) > infinity : out[i] == i, "dtype %d: %#x became %#x", dtype, i, out[i]);
        }
    }
}

static void guards(void) {
    guarded_copies();
    for (int n = 2; n <= 4; n++) {
        place p = make_place(n, 4096, 0);
        session sessions[MOST];
        size_t sizes[8 * N_GUARD_SIZES];
        for (size_t i = 0; i < 8 * N_GUARD_SIZES; i++) sizes[i] = GUARD_SIZES[(i * 7) % N_GUARD_SIZES];
        for (int i = 0; i < n; i++) sessions[i] = (session){&p, i, 4711 + (uint64_t)n, 8 * N_GUARD_SIZES, 1, sizes};
        run_threads(n, run_session, sessions, sizeof *sessions);
        clear_place(&p);
    }
}

/* Rings. */

enum { RECORDS = 400, MOST_PARTS = 12 };
#define END_KIND 99u

typedef struct {
    char *memory;
    int n, me, writer, first_reader, n_readers;
    size_t capacity;
    uint64_t seed;
    unsigned char *sent; /* [RECORDS]: by the writer, read when all have ended */
    size_t seen;         /* by this reader */
    unsigned char arrived[RECORDS];
} ring_side;

static uint32_t parts_of(const ring_side *s, uint64_t number, size_t *sizes) {
    dice d = {mix(s->seed ^ number)};
    uint32_t n = (uint32_t)below(&d, MOST_PARTS + 1);
    size_t most = chance(&d, 70) ? 100 : chance(&d, 70) ? s->capacity / 3 : 4 * s->capacity;
    for (uint32_t i = 0; i < n; i++) sizes[i] = chance(&d, 20) ? 0 : 1 + below(&d, most / (chance(&d, 50) ? n : 1) + 1);
    return n;
}

static void write_side(ring_side *s, cg_ring *ring, dice *d) {
    for (uint64_t number = 0; number < RECORDS; number++) {
        size_t sizes[MOST_PARTS], total = 0;
        cg_part parts[MOST_PARTS];
        uint32_t n = parts_of(s, number, sizes);
        for (uint32_t i = 0; i < n; i++) {
            char *data = malloc(sizes[i] + 1);
            fill_bytes(data, s->seed + number, (int)i, 0, sizes[i]);
            parts[i] = (cg_part){data, sizes[i]};
            total += sizes[i];
        }
        pause_a_little(d);
        int patience = (int)below(d, 4), who = -1, result;
        snprintf(doing, sizeof doing, "writer: record %llu of %u parts, %zu bytes, ring of %zu", (unsigned long long)number, n, total, s->capacity);
        for (int tries = 0;; tries++) {
            /* No patience: gives up, perhaps inside the record, and continues with the next one. */
            int64_t deadline = patience == 0 ? cg_clock_ns() + (int64_t)below(d, 2) * (int64_t)below(d, 200000) : patience == 1 ? 0 : soon();
            result = cg_ring_put(ring, 5, number, parts, n, deadline, &who);
            if (result == CG_OK || patience == 0 || tries > 200) break;
            CHECK(result == CG_TIMEOUT && who != s->me && who >= 0 && who < s->n, "put ended with %d, about %d", result, who);
            if (chance(d, 30)) usleep(100);
        }
        CHECK(result == CG_OK || result == CG_TIMEOUT, "put ended with %d", result);
        s->sent[number] = result == CG_OK;
        for (uint32_t i = 0; i < n; i++) free((void *)parts[i].data);
    }
    int who = -1;
    succeeded(cg_ring_put(ring, END_KIND, 0, NULL, 0, soon(), &who), who);
}

static void read_side(ring_side *s, cg_ring *ring, dice *d) {
    int who = -1;
    for (uint64_t least = 0;;) {
        snprintf(doing, sizeof doing, "reader %d: after record %llu", s->me, (unsigned long long)least);
        pause_a_little(d);
        int result = cg_ring_next(ring, chance(d, 50) ? 0 : soon(), &who);
        if (result == CG_TIMEOUT) {
            CHECK(who == s->writer, "waited for %d, the writer is %d", who, s->writer);
            if (chance(d, 20)) usleep(50);
            continue;
        }
        succeeded(result, who);
        if (ring->record.kind == END_KIND) {
            cg_ring_finish(ring);
            return;
        }
        uint64_t number = ring->record.meta;
        size_t sizes[MOST_PARTS];
        CHECK(number >= least && number < RECORDS, "record %llu after %llu", (unsigned long long)number, (unsigned long long)least);
        uint32_t n = parts_of(s, number, sizes);
        CHECK(n == ring->record.n_parts && ring->record.kind == 5, "%u parts", ring->record.n_parts);
        int restarted = 0;
        for (uint32_t i = 0; i < n && !restarted; i++) {
            CHECK(cg_ring_size(ring, i) == sizes[i], "part %u has %zu bytes", i, cg_ring_size(ring, i));
            char *data = malloc(sizes[i] + 1);
            size_t done = 0; /* perhaps in several attempts */
            while ((result = cg_ring_read(ring, i, data, &done, chance(d, 50) ? 0 : soon(), &who)) == CG_TIMEOUT)
                if (chance(d, 10)) usleep(50);
            if (result == CG_RESTART) restarted = 1;
            else succeeded(result, who);
            CHECK(restarted || done == sizes[i], "%zu of %zu bytes", done, sizes[i]);
            if (!restarted) check_bytes(data, s->seed + number, (int)i, 0, sizes[i], "a part");
            free(data);
        }
        if (restarted) continue; /* the writer gave up on it */
        cg_ring_finish(ring);
        CHECK(!s->arrived[number], "record %llu came twice", (unsigned long long)number);
        s->arrived[number] = 1;
        s->seen++;
        least = number + 1;
    }
}

static void *run_ring(void *arg) {
    ring_side *s = arg;
    cg_team team;
    cg_ring ring;
    dice mine = {mix(s->seed + 100 + (uint64_t)s->me)};
    CHECK(cg_team_join(&team, (cg_member *)s->memory, s->n, s->me, s->n) == 0, "join");
    cg_team view;
    char *at = s->memory + MEMBERS_BYTES;
    int writes = s->me == s->writer, private = s->n_readers == 1 && (s->seed & 1);
    if (private) CHECK(cg_team_view(&view, &team, cg_ring_bell(at, writes), cg_ring_bell(at, !writes)) == 0, "view");
    cg_ring_join(&ring, private ? &view : &team, at, s->writer, s->first_reader, s->n_readers, s->capacity);
    ring.private = private;
    /* Half of the private rings have zero-copy parts, in chunks of any size. */
    ring.zero_copy_from = private && (s->seed & 2) ? 1 + (s->seed >> 8 & 1023) : 0;
    ring.side.chunk = 64 + (size_t)(s->seed >> 18 & 511); /* smaller ones take seconds: `zero_copies` tests them */
    if (writes) write_side(s, &ring, &mine);
    else if (s->n_readers > 1 || s->me == s->first_reader) read_side(s, &ring, &mine);
    cg_ring_leave(&ring);
    if (private) cg_team_leave_view(&view, &team);
    cg_team_leave(&team);
    return NULL;
}

/* Memory that this process can read and no other can access: the kernel's page for the clock. NULL if there is none. */
static char *unreachable_page(void) {
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512];
    char *found = NULL;
    while (maps != NULL && found == NULL && fgets(line, sizeof line, maps) != NULL) {
        unsigned long begin;
        if (strstr(line, "[vvar]") != NULL && sscanf(line, "%lx-", &begin) == 1) found = (char *)begin;
    }
    if (maps != NULL) fclose(maps);
    return found;
}

static void *run_unreachable(void *arg) {
    ring_side *s = arg;
    cg_team team, view;
    cg_ring ring;
    char *at = s->memory + MEMBERS_BYTES, *page = unreachable_page(), there[2 * 64];
    int who = -1, writes = s->me == 0;
    CHECK(cg_team_join(&team, (cg_member *)s->memory, 2, s->me, 2) == 0, "join");
    CHECK(cg_team_view(&view, &team, cg_ring_bell(at, writes), cg_ring_bell(at, !writes)) == 0, "view");
    cg_ring_join(&ring, &view, at, 0, 1, 1, 4096);
    ring.private = 1;
    ring.zero_copy_from = 64;
    CHECK(!cg_cma_can_access(&team, page) && cg_cma_can_access(&team, there), "which memory others can access");
    char own[64] = "accessible";
    cg_part parts[2] = {{own, sizeof own}, {page, 64}};
    if (writes) {
        succeeded(cg_ring_put(&ring, 1, 0, parts, 2, soon(), &who), who);
    } else {
        succeeded(cg_ring_next(&ring, soon(), &who), who);
        for (uint32_t i = 0; i < 2; i++) {
            size_t done = 0;
            succeeded(cg_ring_read(&ring, i, there + 64 * i, &done, soon(), &who), who);
        }
        CHECK(memcmp(there, own, sizeof own) == 0, "the accessible part");
        cg_ring_finish(&ring);
    }
    cg_ring_leave(&ring);
    cg_team_leave_view(&view, &team);
    cg_team_leave(&team);
    return NULL;
}

static void unreachable(void) {
    char *page = unreachable_page(), byte;
    struct iovec here = {&byte, 1}, there = {page, 1};
    if (page == NULL || process_vm_readv(getpid(), &here, 1, &there, 1, 0) == 1) return; /* another kernel */
    size_t bytes = MEMBERS_BYTES + cg_ring_bytes(1, 4096);
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED, "mmap");
    ring_side sides[2] = {{.memory = memory, .me = 0}, {.memory = memory, .me = 1}};
    run_threads(2, run_unreachable, sides, sizeof *sides);
    munmap(memory, bytes);
}

static void rings(dice *d, int64_t until) {
    unreachable();
    do {
        static const size_t capacities[] = {1024, 1040, 1088, 2000, 4096, 32768};
        int n_readers = chance(d, 50) ? 1 : 3, n = n_readers == 1 ? 2 + (int)below(d, 3) : 4;
        int writer = (int)below(d, (size_t)n), first = n_readers == 1 ? (writer + 1 + (int)below(d, (size_t)n - 1)) % n : 0;
        size_t capacity = capacities[below(d, sizeof capacities / sizeof *capacities)];
        size_t bytes = MEMBERS_BYTES + cg_ring_bytes(n_readers, capacity);
        char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(memory != MAP_FAILED, "mmap");
        unsigned char sent[RECORDS] = {0};
        static ring_side sides[MOST];
        uint64_t seed = roll(d);
        for (int i = 0; i < n; i++) sides[i] = (ring_side){memory, n, i, writer, first, n_readers, capacity, seed, sent, 0, {0}};
        run_threads(n, run_ring, sides, sizeof *sides);
        for (int i = 0; i < n; i++) {
            if (i == writer || (n_readers == 1 && i != first)) continue;
            for (int r = 0; r < RECORDS; r++) CHECK(sides[i].arrived[r] == sent[r], "record %d: sent %d, arrived %d at %d", r, sent[r], sides[i].arrived[r], i);
        }
        munmap(memory, bytes);
    } while (cg_clock_ns() < until);
}

/* Zero-copy parts, with deadlines of every length and readers that give up: both sides must agree on the outcome of each. */

enum { ZERO_COPIES = 300, MOST_ZERO_COPY_BYTES = 5000 };

typedef struct {
    char *memory;
    int me;
    uint64_t seed;
    pthread_barrier_t *round;
    char *source; /* of the round, by the writer */
    int came;     /* whether the part came, as this side knows it */
} rendezvous_side;

static void offer_part(rendezvous_side *h, const cg_side *side, uint64_t number, size_t bytes, dice *d) {
    int who = -1;
    pause_a_little(d);
    int64_t patience = chance(d, 20) ? 0 : chance(d, 30) ? (int64_t)below(d, 50000) : 20000000;
    int result = cg_zero_copy_send(side, number, h->source, bytes, cg_clock_ns() + patience, &who);
    h->came = result == CG_OK;
    CHECK(result == CG_OK || result == CG_TIMEOUT || (result == CG_GONE && who == 1), "give ended with %d, about %d", result, who);
    if (result != CG_OK) memset(h->source, 0xEE, bytes); /* like memory that was freed and is used again */
}

static void take_part(rendezvous_side *h, const rendezvous_side *writer, const cg_side *side, uint64_t number, size_t bytes, dice *d) {
    char *to = malloc(bytes);
    unsigned taken = CG_UNOPENED;
    int who = -1, result = CG_TIMEOUT, quits = (int)below(d, 4); /* after so many attempts; 0: never */
    pause_a_little(d);
    for (int tries = 1; result == CG_TIMEOUT; tries++) {
        int64_t deadline = cg_clock_ns() + (chance(d, 50) ? 0 : (int64_t)below(d, 100000));
        result = cg_zero_copy_receive(side, number, (uint64_t)(uintptr_t)writer->source, to, bytes, &taken, deadline, &who);
        if (result != CG_TIMEOUT || tries != quits) continue;
        CHECK(cg_zero_copy_revoke(side, number, taken), "the writer has not ended its chunk");
        memset(to, 0x77, bytes); /* like memory with another use */
        break;
    }
    h->came = result == CG_OK;
    CHECK(result == CG_OK || result == CG_TIMEOUT || result == CG_RESTART, "take ended with %d, about %d", result, who);
    if (result == CG_OK) check_bytes(to, h->seed + number, 0, 0, bytes, "a zero-copy part");
    pthread_barrier_wait(h->round);
    if (result == CG_OK) check_bytes(to, h->seed + number, 0, 0, bytes, "a zero-copy part, later");
    for (size_t i = 0; result == CG_TIMEOUT && i < bytes; i++) CHECK(to[i] == 0x77, "byte %zu was written after it was given up", i);
    CHECK(h->came == writer->came, "the writer says %d, the reader %d", writer->came, h->came);
    free(to);
}

static void *run_rendezvous(void *arg) {
    rendezvous_side *h = arg;
    rendezvous_side *writer = h - h->me;
    cg_team team, view;
    dice mine = {mix(h->seed + 7 + (uint64_t)h->me)}, both = {mix(h->seed)};
    char *ring = h->memory + MEMBERS_BYTES;
    CHECK(cg_team_join(&team, (cg_member *)h->memory, 2, h->me, 2) == 0, "join");
    CHECK(cg_team_view(&view, &team, cg_ring_bell(ring, h->me == 0), cg_ring_bell(ring, h->me == 1)) == 0, "view");
    cg_side side = {(cg_zero_copy *)(h->memory + MEMBERS_BYTES + PAGE_BYTES), &view, 1 - h->me, 1 + below(&both, 700)};
    pthread_barrier_wait(h->round);
    for (uint64_t number = 1; number <= ZERO_COPIES; number++) {
        size_t bytes = 1 + below(&both, MOST_ZERO_COPY_BYTES);
        snprintf(doing, sizeof doing, "part %llu of %zu bytes, chunks of %zu", (unsigned long long)number, bytes, side.chunk);
        if (h->me == 0) {
            h->source = malloc(bytes);
            fill_bytes(h->source, h->seed + number, 0, 0, bytes);
        }
        pthread_barrier_wait(h->round);
        if (h->me == 0) {
            offer_part(h, &side, number, bytes, &mine);
            pthread_barrier_wait(h->round);
        } else {
            take_part(h, writer, &side, number, bytes, &mine);
        }
        pthread_barrier_wait(h->round);
        if (h->me == 0) free(h->source);
    }
    cg_team_leave_view(&view, &team);
    cg_team_leave(&team);
    return NULL;
}

static void zero_copies(dice *d, int64_t until) {
    char one = 1, other = 0;
    struct iovec from = {&one, 1}, to = {&other, 1};
    if (process_vm_readv(getpid(), &to, 1, &from, 1, 0) != 1) {
        printf("zero_copies: not tried, because cross-memory attach does not work here (%s)\n", strerror(errno)); /* an emulator, a sandbox */
        return;
    }
    do {
        size_t bytes = MEMBERS_BYTES + 2 * PAGE_BYTES;
        char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(memory != MAP_FAILED, "mmap");
        pthread_barrier_t round;
        pthread_barrier_init(&round, NULL, 2);
        uint64_t seed = roll(d);
        rendezvous_side sides[2];
        for (int i = 0; i < 2; i++) sides[i] = (rendezvous_side){memory, i, seed, &round, NULL, 0};
        run_threads(2, run_rendezvous, sides, sizeof *sides);
        pthread_barrier_destroy(&round);
        munmap(memory, bytes);
    } while (cg_clock_ns() < until);
}

/* The pool: blocks taken by one thread and given back by another. */

enum { POCKETS = 64 };

typedef struct {
    cg_pool *pool;
    _Atomic(char *) *pockets;
    uint64_t seed;
    int64_t until;
} swimmer;

static void mark(char *memory, size_t bytes, uint64_t what) {
    memcpy(memory, &bytes, sizeof bytes);
    memcpy(memory + 8, &what, sizeof what);
    memset(memory + 16, (int)(what & 0xFF), bytes - 16);
}

static void unmark(const char *memory) {
    size_t bytes;
    uint64_t what;
    memcpy(&bytes, memory, sizeof bytes);
    memcpy(&what, memory + 8, sizeof what);
    for (size_t i = 16; i < bytes; i++) CHECK(memory[i] == (char)(what & 0xFF), "byte %zu of %zu of a block has another owner, too", i, bytes);
}

static void *swim(void *arg) {
    swimmer *s = arg;
    dice d = {s->seed};
    while (cg_clock_ns() < s->until) {
        size_t bytes = 16 + (chance(&d, 80) ? below(&d, 3000) : below(&d, 400000));
        char *memory = cg_pool_take(s->pool, bytes);
        CHECK(memory != NULL && (uintptr_t)memory % 64 == 0 && cg_pool_usable(memory) >= bytes, "a block of %zu", bytes);
        mark(memory, bytes, roll(&d));
        memory = atomic_exchange_explicit(&s->pockets[below(&d, POCKETS)], memory, memory_order_acq_rel);
        if (memory == NULL) continue;
        unmark(memory);
        cg_pool_give(memory);
    }
    return NULL;
}

static void pool(dice *d, int64_t until) {
    do {
        _Atomic(char *) pockets[POCKETS];
        for (int i = 0; i < POCKETS; i++) atomic_init(&pockets[i], NULL);
        cg_pool *shared = cg_pool_new(below(d, 2) ? 1 << 20 : 4096);
        CHECK(shared != NULL, "a pool");
        int64_t now = cg_clock_ns();
        swimmer swimmers[3];
        for (int i = 0; i < 3; i++) swimmers[i] = (swimmer){shared, pockets, roll(d), now + 100000000};
        run_threads(3, swim, swimmers, sizeof *swimmers);
        cg_pool_drop(shared); /* the owner goes first */
        for (int i = 0; i < POCKETS; i++) {
            char *memory = atomic_load_explicit(&pockets[i], memory_order_relaxed);
            if (memory == NULL) continue;
            unmark(memory);
            cg_pool_give(memory);
        }
    } while (cg_clock_ns() < until);
    /* The block that was given back last is taken next. */
    cg_pool *again = cg_pool_new(1 << 20);
    void *first = cg_pool_take(again, 1000);
    cg_pool_give(first);
    CHECK(cg_pool_take(again, 1000) == first, "memory is not used again");
    cg_pool_give(first);
    cg_pool_drop(again);
}

/* Endings: closed by another thread, by a peer, by a signal's handler; calls that do not fit together; deadlines. */

typedef struct {
    const place *place;
    member *members;
    int me, how, odd;
    int result, who;
    int64_t took;
} ending;

enum { SELF_CLOSES, PEER_CLOSES, PEER_FAILS, TAGS_DIFFER, OPERATIONS_DIFFER, PEER_IS_LATE, SIGNALLED, ENDINGS };

static int stop_now(cg_team *team) { return team->user != NULL; }

static void *end_somehow(void *arg) {
    ending *e = arg;
    member *m = &e->members[e->me];
    int64_t began = cg_clock_ns();
    cg_call call = next_call(m, 1);
    snprintf(doing, sizeof doing, "rank %d, ending %d, odd one %d", e->me, e->how, e->odd);
    int is_odd = e->me == e->odd;
    if (e->how == PEER_IS_LATE) call.deadline = cg_clock_ns() + 20000000;
    if (e->how == TAGS_DIFFER && is_odd) call.tag ^= 1;
    if (is_odd && (e->how == PEER_CLOSES || e->how == PEER_FAILS)) {
        usleep(3000);
        cg_team_close(&m->team, e->how == PEER_FAILS);
        return NULL;
    }
    if (is_odd && e->how == OPERATIONS_DIFFER) {
        /* Waits for a record that is never written, in the call of the same number. */
        call.call = (call.call & ~0xFFull) | 200;
        atomic_store_explicit(&m->team.members[e->me].posted, call.call + 256, memory_order_release);
        cg_ring ring;
        static char memory[MOST][8192] __attribute__((aligned(64)));
        cg_ring_join(&ring, &m->team, memory[e->me], (e->me + 1) % e->place->n, 0, e->place->n - 1, 1024);
        ring.collective = 1;
        e->result = cg_ring_next(&ring, call.deadline, &e->who);
        cg_ring_leave(&ring);
    } else if (is_odd && (e->how == PEER_IS_LATE || e->how == SELF_CLOSES)) {
        return NULL; /* never calls */
    } else {
        if (is_odd && e->how == SIGNALLED) m->team.user = m;
        if (e->how == SIGNALLED && e->me == (e->odd + 1) % e->place->n) usleep(120000); /* so that the signal arrives during the wait */
        e->result = cg_barrier(&m->group, &call, &e->who);
    }
    if (e->result != CG_OK) cg_team_close(&m->team, 1);
    e->took = cg_clock_ns() - began;
    return NULL;
}

static void endings(dice *d, int rounds) {
    for (int round = 0; round < rounds; round++) {
        for (int how = 0; how < ENDINGS; how++) {
            int n = 2 + (int)below(d, 3), odd = (int)below(d, (size_t)n);
            place p = make_place(n, 4096, 0);
            static member members[MOST];
            static ending ends[MOST];
            for (int i = 0; i < n; i++) {
                join_place(&members[i], &p, i);
                members[i].team.interrupted = stop_now;
                members[i].team.user = NULL;
                ends[i] = (ending){&p, members, i, how, odd, -1, -1, 0};
            }
            pthread_t threads[MOST];
            for (int i = 0; i < n; i++) CHECK(pthread_create(&threads[i], NULL, end_somehow, &ends[i]) == 0, "pthread_create");
            if (how == SELF_CLOSES) {
                usleep((useconds_t)below(d, 3000));
                for (int i = 0; i < n; i++) cg_team_close(&members[i].team, 0); /* from a thread of no member */
            }
            for (int i = 0; i < n; i++) pthread_join(threads[i], NULL);
            for (int i = 0; i < n; i++) {
                const ending *e = &ends[i];
                snprintf(doing, sizeof doing, "ending %d of %d ranks, rank %d, odd one %d: %d about %d", how, n, i, odd, e->result, e->who);
                CHECK(e->took < 2000000000, "took %lld ns", (long long)e->took);
                int others_gave_up = e->result == CG_GONE && e->who != i;
                if (i == odd && how != TAGS_DIFFER && how != OPERATIONS_DIFFER && how != SIGNALLED) continue;
                if (how == SELF_CLOSES) CHECK(e->result == CG_SELF || others_gave_up, "not noticed");
                if (how == PEER_CLOSES || how == PEER_FAILS) CHECK(e->result == CG_GONE && (e->who == odd || others_gave_up), "not noticed");
                if (how == TAGS_DIFFER) CHECK(e->result == CG_MISMATCH || others_gave_up, "not noticed");
                if (how == OPERATIONS_DIFFER) CHECK(e->result == CG_MISMATCH || others_gave_up, "not noticed");
                if (how == PEER_IS_LATE) CHECK((e->result == CG_TIMEOUT && e->who == odd) || others_gave_up, "not noticed");
                if (how == SIGNALLED) CHECK(e->result == (i == odd ? CG_SIGNAL : CG_GONE), "not noticed");
            }
            for (int i = 0; i < n; i++) leave_place(&members[i]);
            clear_place(&p);
        }
    }
}

/* Withdrawals: same-process ranks reduce in place, until one is closed at some moment, or reaches its deadline. When its call has returned
 * no other rank accesses its tensors. */

typedef struct {
    const place *place;
    member *members;
    int me, quitter;
    uint64_t seed;
    int64_t patience; /* of the quitter; 0: it has any */
    int differs; /* the round in which the quitter makes a different call; -1 for none */
    int failed;
    _Atomic int begun;
} withdrawal;

static void *withdraw(void *arg) {
    withdrawal *w = arg;
    member *m = &w->members[w->me];
    dice ours = {w->seed}, mine = {mix(w->seed + 1 + (uint64_t)w->me)};
    int who = -1, n = w->place->n;
    cg_call call = next_call(m, 1);
    succeeded(cg_group_probe_cma(&m->group, &call, &who), who);
    m->group.same_process_from = 1;
    w->begun = 1;
    for (int round = 0; round < 40 && !w->failed; round++) {
        size_t bytes = (size_t)n * (1 + below(&ours, chance(&ours, 50) ? 20000 : 200000)), span = bytes + 100;
        int scatters = chance(&ours, 30), in_place = chance(&ours, 50);
        snprintf(doing, sizeof doing, "rank %d of %d, quitter %d, round %d, %zu bytes", w->me, n, w->quitter, round, bytes);
        buffer from = guarded(span, 0), to = in_place && !scatters ? from : guarded(span, 0);
        memset(from.data, 1, span);
        pause_a_little(&mine);
        call = next_call(m, 2);
        if (w->me == w->quitter && w->patience) call.deadline = cg_clock_ns() + w->patience;
        cg_block pieces[MOST];
        for (int p = 0; p < n; p++) pieces[p] = (cg_block){from.data + (size_t)p * (bytes / (size_t)n), 1, bytes / (size_t)n, bytes / (size_t)n};
        /* The quitter makes the call with another tag, or a barrier, or posts another call for long enough to be noticed, and then makes
         * this call. */
        int odd = w->me == w->quitter && round == w->differs, stray = round == w->differs && round % 3 == 2;
        if (odd && !stray) call.tag ^= 1;
        if (odd && stray) {
            atomic_store_explicit(&m->team.members[w->me].posted, ((call.call & ~0xFFull) | 200) + 256, memory_order_release);
            usleep(70000);
            atomic_store_explicit(&m->team.members[w->me].posted, 0, memory_order_release);
        }
        int64_t began = cg_clock_ns();
        int result = odd && round % 3 == 1 ? cg_barrier(&m->group, &call, &who)
                     : scatters ? cg_reduce_scatter(&m->group, &call, pieces, to.data, CG_U8, CG_SUM, &who)
                              : cg_all_reduce(&m->group, &call, from.data, to.data, bytes, CG_U8, CG_SUM, in_place, &who);
        w->failed = result != CG_OK;
        CHECK(!m->group.exposed && cg_clock_ns() - began < 900000000, "a second was not enough");
        CHECK(round != w->differs || result == CG_MISMATCH || result == CG_GONE || (stray && result == CG_OK), "ended with %d", result);
        size_t length = w->failed ? 0 : scatters ? bytes / (size_t)n : bytes;
        for (size_t i = 0; i < length; i++) CHECK(to.data[i] == (char)n, "byte %zu is %d", i, to.data[i]);
        /* A rank that still writes here is detected below; one that still reads gets a wrong result, or a fault after munmap. */
        memset(from.data, 0x33, span);
        memset(to.data, 0x33, span);
        if (w->failed) usleep((useconds_t)below(&mine, 300));
        for (size_t i = 0; i < span; i++) CHECK(from.data[i] == 0x33 && to.data[i] == 0x33, "byte %zu was overwritten after the end", i);
        if (to.data != from.data) munmap(to.base, to.mapped);
        munmap(from.base, from.mapped);
        if (stray && !odd) usleep(60000); /* closes only after the stray rank has arrived, like an owner that handles its error slowly */
    }
    if (w->failed) cg_team_close(&m->team, 1);
    return NULL;
}

static void withdrawals(dice *d, int64_t until) {
    int tries = 0, failed = 0;
    do {
        int n = 2 + (int)below(d, 3), quitter = (int)below(d, (size_t)n), how = (int)below(d, 5), closes = how > 1;
        place p = make_place(n, 4096, 0);
        static member members[MOST];
        static withdrawal ranks[MOST];
        uint64_t seed = roll(d);
        for (int i = 0; i < n; i++) {
            join_place(&members[i], &p, i);
            ranks[i] = (withdrawal){&p, members, i, quitter, seed, how == 0 ? 1 + (int64_t)below(d, 400000) : 0, -1, 0, 0};
        }
        int differs = (int)below(d, 10);
        for (int i = 0; i < n; i++) ranks[i].differs = how == 1 ? differs : -1;
        pthread_t threads[MOST];
        for (int i = 0; i < n; i++) CHECK(pthread_create(&threads[i], NULL, withdraw, &ranks[i]) == 0, "pthread_create");
        if (closes) {
            while (!ranks[quitter].begun) usleep(20);
            usleep((useconds_t)below(d, 1500));
            cg_team_close(&members[quitter].team, 0);
        }
        for (int i = 0; i < n; i++) pthread_join(threads[i], NULL);
        for (int i = 0; i < n; i++) failed += ranks[i].failed, leave_place(&members[i]);
        clear_place(&p);
        tries++;
    } while (cg_clock_ns() < until);
    CHECK(failed > 0, "no rank failed in %d tries", tries);
}

/* Nets: ranks that are linked by sockets. Of each rank one thread makes all-reduces, and others exchange messages with tags of their own. */

enum { TALKERS = 3, NET_MOST = 10 }; /* among more than 8 ranks small reductions take several steps */

typedef struct {
    cg_net *collectives, *messages;
    int me, n, thread, rounds;
    int quitter, quits; /* the rank that breaks off, and in which round; -1 for none */
    uint64_t seed;
    cg_pool *pool;
    int result;
} net_side;

static int attend_nothing(void *user, int why) {
    (void)user;
    (void)why;
    return CG_OK;
}

static int ends_well(const net_side *s, int result) {
    if (result == CG_OK) return 1;
    CHECK(s->quits >= 0 && (result == CG_LOST || result == CG_SELF), "ended with %d", result);
    return 0;
}

static int talk(net_side *s, dice *ours, dice *mine, int round) {
    cg_message messages[8 * NET_MOST];
    char *memory[8 * NET_MOST], *copies[8 * NET_MOST] = {NULL};
    uint64_t seed = roll(ours);
    size_t bytes[4];
    uint32_t tags[4];
    int count = 0, each = 1 + (int)below(ours, 4), who = 0;
    for (int i = 0; i < each; i++) {
        bytes[i] = below(ours, chance(ours, 20) ? 300000 : 3000);
        tags[i] = 1u << 28 | (uint32_t)(round << 8) | (uint32_t)(s->thread << 4) | (uint32_t)i;
    }
    /* Receives are begun in another order than the sends of the peers. */
    int first = (int)below(mine, (size_t)each);
    for (int k = 0; k < each; k++) {
        int i = (first + k) % each;
        for (int p = 0; p < s->n; p++) {
            if (p == s->me) continue;
            memory[count] = malloc(bytes[i] + 1);
            cg_net_receive(s->messages, &messages[count], p, tags[i], memory[count], bytes[i]);
            count++;
        }
    }
    int sends = count;
    for (int i = 0; i < each; i++) {
        for (int p = 0; p < s->n; p++) {
            if (p == s->me) continue;
            memory[count] = malloc(bytes[i] + 1);
            fill_bytes(memory[count], seed + (uint64_t)i, s->me, 0, bytes[i]);
            cg_net_send(s->messages, &messages[count], p, tags[i], memory[count], bytes[i]);
            if (chance(mine, 30)) { /* it goes on with a copy */
                copies[count] = malloc(bytes[i] + 1);
                cg_net_keep(s->messages, &messages[count], copies[count]);
                memset(memory[count], 0x5A, bytes[i]);
            }
            count++;
        }
    }
    pause_a_little(mine);
    cg_net_call call = {0, soon(), attend_nothing, NULL, NULL};
    cg_messages all = {messages, count};
    int result = cg_net_wait(s->messages, &call, cg_net_all, &all, &who);
    if (result != CG_OK) cg_net_withdraw(s->messages, messages, count);
    for (int k = 0, at = 0; k < each && result == CG_OK; k++) {
        int i = (first + k) % each;
        for (int p = 0; p < s->n; p++)
            if (p != s->me) check_bytes(memory[at++], seed + (uint64_t)i, p, 0, bytes[i], "message");
    }
    CHECK(sends * 2 == count, "%d of %d", sends, count);
    for (int i = 0; i < count; i++) free(memory[i]), free(copies[i]);
    return ends_well(s, result);
}

static int reduce_over_net(net_side *s, dice *ours, dice *mine, int round) {
    uint64_t seed = roll(ours);
    int in_place = chance(ours, 50), who = 0;
    size_t count = 1 + below(ours, chance(ours, 30) ? 400000 : 20000);
    int dtype = chance(ours, 50) ? CG_I32 : CG_U8;
    size_t bytes = count * cg_dtype_bytes(dtype);
    char *from = malloc(bytes), *to = in_place ? from : malloc(bytes);
    fill_elements(from, dtype, seed, s->me, 0, count);
    pause_a_little(mine);
    cg_net_call call = {(uint32_t)round, soon(), attend_nothing, NULL, s->pool};
    int result = cg_net_all_reduce(s->collectives, &call, from, to, count, dtype, CG_SUM, &who);
    if (result == CG_OK) check_reduction(to, s->n, dtype, CG_SUM, seed, 0, count);
    if (to != from) free(to);
    free(from);
    return ends_well(s, result);
}

/* A strided block with memory of its own, and where it begins. */
static cg_block block_with_memory(dice *mine, size_t bytes) {
    size_t span;
    cg_block block = block_of(mine, bytes, 1, &span);
    block.base = malloc(span + 1);
    return block;
}

/* Every other collective over links. Rank a has bytes[a][b] bytes for rank b. */
static int collect_over_net(net_side *s, dice *ours, dice *mine, int round) {
    const int n = s->n, me = s->me, kind = (int)below(ours, 5), root = (int)below(ours, (size_t)n + 1) - 1;
    const uint64_t seed = roll(ours);
    size_t bytes[NET_MOST][NET_MOST], most = chance(ours, 20) ? 300000 : 3000, sizes[NET_MOST];
    for (int a = 0; a < n; a++)
        for (int b = 0; b < n; b++) bytes[a][b] = chance(ours, 20) ? 0 : below(ours, most);
    int result, who = 0;
    cg_block out[NET_MOST], into[NET_MOST];
    cg_net_call call = {(uint32_t)round, soon(), attend_nothing, NULL, s->pool};
    pause_a_little(mine);
    if (kind == 0) {
        result = cg_net_barrier(s->collectives, &call, &who);
    } else if (kind == 1) {
        size_t length = bytes[0][0], from = root < 0 ? 0 : (size_t)root;
        char *data = malloc(length + 1);
        fill_bytes(data, seed, me, 0, length);
        result = cg_net_broadcast(s->collectives, &call, data, length, (int)from, &who);
        if (result == CG_OK) check_bytes(data, seed, (int)from, 0, length, "broadcast");
        free(data);
    } else if (kind == 2) {
        for (int p = 0; p < n; p++) {
            sizes[p] = bytes[p][0];
            into[p] = block_with_memory(mine, sizes[p]);
        }
        char *own = malloc(sizes[me] + 1);
        fill_bytes(own, seed, me, 0, sizes[me]);
        result = cg_net_gatherv(s->collectives, &call, own, sizes, into, root, &who);
        for (int p = 0; p < n; p++) {
            if (result == CG_OK && (root < 0 || root == me)) block_bytes(&into[p], seed, p, 0, 1, "gathered piece");
            free(into[p].base);
        }
        free(own);
    } else if (kind == 3) {
        for (int p = 0; p < n; p++) {
            out[p] = block_with_memory(mine, bytes[me][p]);
            block_bytes(&out[p], seed + (uint64_t)p, me, 0, 0, "");
            into[p] = p == me ? (cg_block){malloc(bytes[me][me] + 1), 1, bytes[me][me], bytes[me][me]} : block_with_memory(mine, bytes[p][me]);
        }
        result = cg_net_all_to_allv(s->collectives, &call, out, into, &who);
        for (int p = 0; p < n; p++) {
            if (result == CG_OK) block_bytes(&into[p], seed + (uint64_t)me, p, 0, 1, "exchanged piece");
            free(out[p].base);
            free(into[p].base);
        }
    } else {
        size_t count = 0, begin = 0;
        for (int p = 0; p < n; p++) count += bytes[p][0];
        char *whole = malloc(count + 1), *to = malloc(bytes[me][0] + 1);
        fill_elements(whole, CG_U8, seed, me, 0, count);
        for (int p = 0, at = 0; p < n; at += (int)bytes[p][0], p++) {
            if (p == me) begin = (size_t)at;
            out[p] = (cg_block){whole + at, 1, bytes[p][0], bytes[p][0]};
        }
        result = cg_net_reduce_scatter(s->collectives, &call, out, to, CG_U8, CG_SUM, &who);
        if (result == CG_OK) check_reduction(to, n, CG_U8, CG_SUM, seed, begin, bytes[me][0]);
        free(whole);
        free(to);
    }
    return ends_well(s, result);
}

static int collective_over_net(net_side *s, dice *ours, dice *mine, int round) {
    return chance(ours, 40) ? reduce_over_net(s, ours, mine, round) : collect_over_net(s, ours, mine, round);
}

static void *run_net(void *arg) {
    net_side *s = arg;
    dice ours = {mix(s->seed + (uint64_t)s->thread * 977)}, mine = {mix(s->seed + 7919 * (uint64_t)(s->me * 8 + s->thread))};
    for (int round = 0; round < s->rounds; round++) {
        snprintf(doing, sizeof doing, "rank %d of %d, thread %d, round %d, seed %llu", s->me, s->n, s->thread, round, (unsigned long long)s->seed);
        if (s->me == s->quitter && round == s->quits && s->thread == 0) {
            cg_net_abort(s->collectives);
            cg_net_abort(s->messages);
        }
        if (!(s->thread == 0 ? collective_over_net(s, &ours, &mine, round) : talk(s, &ours, &mine, round))) {
            /* As a group does that has failed. */
            cg_net_abort(s->collectives);
            cg_net_abort(s->messages);
            return NULL;
        }
    }
    return NULL;
}

static void nets(dice *d, int64_t until) {
    do {
        int n = chance(d, 15) ? 9 + (int)below(d, 2) : 2 + (int)below(d, 4), quits = chance(d, 30) ? (int)below(d, 8) : -1, quitter = (int)below(d, (size_t)n);
        static cg_net made[NET_MOST][2];
        cg_pool *pools[NET_MOST];
        uint64_t seed = roll(d);
        for (int r = 0; r < n; r++) pools[r] = cg_pool_new((size_t)64 << 20);
        for (int r = 0; r < n; r++)
            for (int c = 0; c < 2; c++) CHECK(cg_net_begin(&made[r][c], n, r, c == 0, chance(d, 50) ? 20000 : 0, pools[r]) == 0, "cg_net_begin");
        for (int a = 0; a < n; a++)
            for (int b = a + 1; b < n; b++)
                for (int c = 0; c < 2; c++) {
                    int pair[2];
                    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair) == 0, "socketpair");
                    CHECK(cg_net_attach(&made[a][c], b, pair[0]) == 0 && cg_net_attach(&made[b][c], a, pair[1]) == 0, "cg_net_attach");
                    CHECK(cg_net_is_linked(&made[a][c], b) && cg_net_error(&made[a][c], b) == 0, "not linked");
                }
        net_side sides[NET_MOST * (1 + TALKERS)];
        for (int r = 0; r < n; r++)
            for (int t = 0; t <= TALKERS; t++)
                sides[r * (1 + TALKERS) + t] = (net_side){&made[r][0], &made[r][1], r, n, t, 12, quitter, quits, seed, pools[r], 0};
        run_threads(n * (1 + TALKERS), run_net, sides, sizeof *sides);
        for (int r = 0; r < n; r++)
            for (int c = 0; c < 2; c++) cg_net_say_goodbye(&made[r][c]);
        for (int a = 0; a < n; a++)
            for (int b = 0; b < n; b++) /* who has broken off says nothing any more */
                for (int c = 0; c < 2; c++) CHECK(a == b || cg_net_has_left(&made[a][c], b) == (quits < 0), "rank %d of %d says goodbye", b, n);
        for (int r = 0; r < n; r++)
            for (int c = 0; c < 2; c++) cg_net_end(&made[r][c]);
        for (int r = 0; r < n; r++) cg_pool_drop(pools[r]);
    } while (cg_clock_ns() < until);
}

/* Frames: what a peer sends, right or mangled, in pieces of any sizes. What is received whole is what was sent, whatever else was. */

enum { FRAMES = 6, FRAME_TAGS = 4 };

static void feed_frames(dice *d) {
    cg_pool *pool = cg_pool_new(1 << 20);
    cg_net net;
    int pair[2], ordered = chance(d, 30), who = 0;
    CHECK(cg_net_begin(&net, 2, 0, ordered, 0, pool) == 0, "cg_net_begin");
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair) == 0 && cg_net_attach(&net, 1, pair[0]) == 0, "attach");
    /* The stream. */
    int n = 1 + (int)below(d, FRAMES), mangled = chance(d, 60);
    uint64_t seed = roll(d);
    size_t bytes[FRAMES], length = 0, most = chance(d, 10) ? 60000 : 300;
    uint32_t tags[FRAMES];
    static _Thread_local char stream[(FRAMES + 1) * (60000 + sizeof(cg_frame)) + 64];
    for (int i = 0; i < n; i++) {
        tags[i] = (uint32_t)below(d, FRAME_TAGS) << 28 | (uint32_t)below(d, FRAME_TAGS);
        bytes[i] = chance(d, 10) ? 0 : below(d, most);
        cg_frame frame = {0x6D636731, tags[i], bytes[i]};
        memcpy(stream + length, &frame, sizeof frame);
        fill_bytes(stream + length + sizeof frame, seed, i, 0, bytes[i]);
        length += sizeof frame + bytes[i];
    }
    const int leaves = chance(d, 40);
    int differs = 0;
    if (leaves) {
        memcpy(stream + length, &(cg_frame){0x6D636732, 0, 0}, sizeof(cg_frame));
        length += sizeof(cg_frame);
    }
    const int fits = length <= CG_HELD_BYTES; /* with the goodbye: what does not fit is not looked at before it is received */
    if (mangled) {
        int kind = (int)below(d, 4);
        if (kind == 0) length = below(d, length);
        else if (kind == 1) for (size_t i = 1 + below(d, 8); i > 0; i--) stream[below(d, length)] ^= (char)(1 + below(d, 255));
        else if (kind == 2) memset(stream + below(d, length), chance(d, 50) ? 0xFF : 0, 16); /* a length beyond everything, perhaps */
        else fill_bytes(stream, seed + 1, 0, 0, 1 + below(d, length));
    }
    /* Receives: of frames that are sent, or are not, of their sizes or of any. */
    cg_message messages[2 * FRAMES];
    char *memory[2 * FRAMES];
    int frame_of[2 * FRAMES], count = 0;
    for (int i = 0; i < n; i++) {
        if (chance(d, 15)) continue;
        int takes = chance(d, 30);
        frame_of[count] = i;
        memory[count] = takes ? NULL : malloc(bytes[i] + 1);
        if (takes) cg_net_take(&net, &messages[count], 1, tags[i]);
        else cg_net_receive(&net, &messages[count], 1, tags[i], memory[count], chance(d, 5) ? bytes[i] + 1 - 2 * (bytes[i] > 0) : bytes[i]);
        count++;
    }
    /* In pieces, as the sockets have them: of small ones few fill a socket. */
    size_t at = 0;
    while (at < length) {
        size_t some = 1 + below(d, chance(d, 50) ? 40 : 20000);
        if (some > length - at) some = length - at;
        ssize_t sent = send(pair[1], stream + at, some, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent > 0) at += (size_t)sent;
        else if (errno != EAGAIN && errno != EWOULDBLOCK) break; /* the net has ended the link */
        cg_net_call now = {0, cg_clock_ns(), attend_nothing, NULL, pool};
        cg_messages all = {messages, count};
        if (chance(d, 50) || sent < 0) {
            int result = cg_net_wait(&net, &now, cg_net_all, &all, &who);
            if (sent < 0 && result == CG_OK) break; /* nobody waits for more, and nothing more is read */
        }
    }
    close(pair[1]);
    for (int i = 0; i < count; i++) {
        cg_net_call last = {0, soon(), attend_nothing, NULL, pool};
        cg_messages one = {&messages[i], 1};
        int result = cg_net_wait(&net, &last, cg_net_all, &one, &who);
        CHECK(result == CG_OK || result == CG_LOST || result == CG_MISMATCH || result == CG_NOMEM, "a receive ended with %d", result);
        differs |= result == CG_MISMATCH;
        if (result == CG_OK) CHECK(messages[i].done == messages[i].frame.bytes, "a part of a message");
        if (result == CG_OK && !mangled) {
            /* The first frame of that tag that no earlier receive has got. */
            int earlier = 0, found = 0;
            for (int k = 0; k < i; k++) earlier += tags[frame_of[k]] == tags[frame_of[i]] && messages[k].state == CG_OK;
            while (tags[found] != tags[frame_of[i]] || earlier-- > 0) found++;
            CHECK(messages[i].frame.bytes == bytes[found], "%llu bytes of %zu", (unsigned long long)messages[i].frame.bytes, bytes[found]);
            check_bytes(messages[i].data, seed, found, 0, bytes[found], "a frame");
        }
    }
    if (!mangled && !differs && (!leaves || (fits && at == length))) CHECK(cg_net_has_left(&net, 1) == leaves, "a goodbye was %s", leaves ? "missed" : "made up");
    cg_net_withdraw(&net, messages, count);
    for (int i = 0; i < count; i++) {
        if (memory[i] == NULL && messages[i].data != NULL) cg_pool_give(messages[i].data);
        free(memory[i]);
    }
    cg_net_end(&net);
    cg_pool_drop(pool);
}

static void frames(dice *d, int64_t until) {
    long tries = 0;
    do {
        feed_frames(d);
        tries++;
    } while (cg_clock_ns() < until);
    fprintf(stderr, "%ld streams of frames\n", tries);
}

/* Cores: a thread moves to another core, and its affinity is restored. */

static cpu_set_t affinity(void) {
    cpu_set_t now;
    CHECK(sched_getaffinity(0, sizeof now, &now) == 0, "sched_getaffinity");
    return now;
}

static void confine(const cpu_set_t *to) { CHECK(sched_setaffinity(0, sizeof *to, to) == 0, "sched_setaffinity"); }

static cpu_set_t only(int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    return set;
}

static int all_taken(const void *arg, int core) { return (void)arg, (void)core, 1; }
static int none_taken(const void *arg, int core) { return (void)arg, (void)core, 0; }

/* Reports this thread beside a peer for so long, every 1 ms. Returns how often it moved. */
static int stay_beside(cg_cores *cores, int milliseconds, int (*taken)(const void *, int)) {
    int moved = 0;
    for (int i = 0; i < milliseconds; i++, usleep(1000)) moved += cg_cores_wait(cores, 1, cg_clock_ns(), taken, NULL);
    return moved;
}

static _Atomic int loops_end;

static void *loop(void *arg) {
    const cpu_set_t one = only(*(const int *)arg);
    confine(&one);
    while (!atomic_load(&loops_end)) cg_pause();
    return NULL;
}

/* With every core busy: who is beside a rank leaves, to a core that is no rank's. */
static void cores_of_others(const cpu_set_t *all, int first, int second) {
    pthread_t loops[CPU_SETSIZE];
    int numbers[CPU_SETSIZE], busy = 0;
    atomic_store(&loops_end, 0);
    for (int core = 0; core < CPU_SETSIZE; core++)
        if (CPU_ISSET(core, all)) numbers[busy] = core, pthread_create(&loops[busy], NULL, loop, &numbers[busy]), busy++;
    cg_cores state;
    cg_cores_init(&state, 1);
    CHECK(cg_cores_move(first) && sched_getcpu() == first, "not on core %d", first);
    CHECK(stay_beside(&state, 400, all_taken) == 0, "moved to the core of a rank");
    cg_cores_free(&state);
    cg_cores_init(&state, 1);
    CHECK(stay_beside(&state, 1000, none_taken) > 0, "stayed beside a rank");
    cg_cores_free(&state);
    cg_cores_init(&state, CPU_COUNT(all) + 1);
    CHECK(stay_beside(&state, 400, none_taken) == 0, "moved though the ranks are more than the cores");
    cg_cores_free(&state);
    atomic_store(&loops_end, 1);
    for (int i = 0; i < busy; i++) pthread_join(loops[i], NULL);

    /* Woken on the core of a peer. */
    cg_member members[2] = {0};
    cg_team team = {.members = members, .n = 2, .me = 1};
    const int32_t peers[] = {1 + first, 1 + second, 0};
    for (int i = 0; i < 3; i++) {
        CHECK(cg_cores_move(first), "not on core %d", first);
        atomic_store(&members[0].core, peers[i]);
        CHECK(cg_go_back(&team, second) == (i == 0), "peer on core %d, woken on %d, asleep on %d", peers[i] - 1, first, second);
        if (i == 0) CHECK(sched_getcpu() == second && atomic_load(&members[1].core) == 1 + second, "on core %d", sched_getcpu());
    }
    atomic_store(&members[0].core, 1 + first);
    CHECK(cg_cores_move(first) && !cg_go_back(&team, -1) && !cg_go_back(&team, first), "moved from core %d", first);
    cpu_set_t now = affinity();
    CHECK(CPU_EQUAL(&now, all), "the affinity is another one after moves");
}

static void cores(void) {
    const cpu_set_t all = affinity();
    int first = -1, second = -1;
    for (int core = 0; core < CPU_SETSIZE && second < 0; core++)
        if (CPU_ISSET(core, &all)) *(first < 0 ? &first : &second) = core;
    CHECK(first >= 0 && cg_cores_allowed() == CPU_COUNT(&all), "%d cores of %d", cg_cores_allowed(), CPU_COUNT(&all));
    const cpu_set_t one = only(first);
    cg_affinity before;
    cg_cores state;
    cpu_set_t now;

    confine(&one);
    cg_cores_init(&state, 1);
    CHECK(stay_beside(&state, 300, none_taken) == 0, "moved away from its only core");
    now = affinity();
    CHECK(CPU_EQUAL(&now, &one), "an affinity for one core was changed");
    CHECK(second < 0 || !cg_affinity_narrow(second, &before), "narrowed to a core that is none of the thread's");
    now = affinity();
    CHECK(CPU_EQUAL(&now, &one), "an affinity for one core was changed");
    cg_cores_free(&state);
    confine(&all);
    if (second < 0) return;

    for (int core = 0; core < CPU_SETSIZE; core++) {
        if (!CPU_ISSET(core, &all)) continue;
        CHECK(cg_affinity_narrow(core, &before) && sched_getcpu() == core, "on core %d and not %d", sched_getcpu(), core);
        const cpu_set_t narrow = only(core);
        now = affinity();
        CHECK(CPU_EQUAL(&now, &narrow), "not narrowed to core %d", core);
        CHECK(cg_affinity_restore(core, &before), "not given back");
        now = affinity();
        CHECK(CPU_EQUAL(&now, &all), "given back otherwise");
    }
    /* An affinity of two cores, which may be fewer than all. */
    cpu_set_t two = one;
    CPU_SET(second, &two);
    confine(&two);
    CHECK(cg_affinity_narrow(second, &before) && cg_affinity_restore(second, &before), "did not move");
    now = affinity();
    CHECK(CPU_EQUAL(&now, &two), "two cores were not given back");
    /* Other code sets the affinity between the two halves. */
    CHECK(cg_affinity_narrow(second, &before), "did not move");
    confine(&one);
    CHECK(!cg_affinity_restore(second, &before), "restored over an affinity that other code set");
    now = affinity();
    CHECK(CPU_EQUAL(&now, &one), "overwrote the affinity of other code");

    confine(&all);
    cg_cores_init(&state, CPU_COUNT(&all) + 1);
    CHECK(stay_beside(&state, 200, none_taken) == 0, "moved though the ranks are more than the cores");
    cg_cores_free(&state);
    cg_cores_init(&state, 1);
    for (int i = 0; i < 200; i++, usleep(1000)) CHECK(!cg_cores_wait(&state, i % 20 != 0, cg_clock_ns(), none_taken, NULL), "moved though it was seen apart meanwhile");
    stay_beside(&state, 1000, none_taken); /* it may move or not, depending on other programs */
    now = affinity();
    CHECK(CPU_EQUAL(&now, &all), "the affinity is another one after waits");
    cg_cores_free(&state);
    cores_of_others(&all, first, second);
}

/* Processes: one is killed at some moment; the others notice it, although it has not been reaped. */

static void be_process(const place *p, int me, uint64_t seed, int odd) {
    member m;
    dice ours = {seed}, mine = {mix(seed + (uint64_t)me)};
    join_place(&m, p, me);
    char *x = malloc(40000);
    memset(x, 0, 40000);
    for (;;) {
        int who = -1, result;
        size_t count = 1 + below(&ours, 10000), most = below(&ours, 4);
        cg_call call = next_call(&m, 1);
        pause_a_little(&mine);
        if (most == 0) result = cg_barrier(&m.group, &call, &who);
        else result = cg_all_reduce(&m.group, &call, x, x, count, CG_F32, CG_SUM, 1, &who);
        if (result == CG_OK) continue;
        /* Another process may have noticed it first, and have left. */
        cg_team_close(&m.team, 1);
        _exit(result == CG_LOST && who == odd ? 42 : result == CG_GONE && who != odd && who != me ? 43 : 50 + result);
    }
}

static void processes(dice *d, int rounds) {
    for (int round = 0; round < rounds; round++) {
        int n = 2 + (int)below(d, 3), odd = (int)below(d, (size_t)n), heard = 0;
        place p = make_place(n, 4096, 0);
        uint64_t seed = roll(d);
        pid_t pids[MOST] = {0};
        for (int i = 0; i < n; i++) {
            pids[i] = fork();
            CHECK(pids[i] >= 0, "fork: %s", strerror(errno));
            if (pids[i] == 0) be_process(&p, i, seed, odd);
        }
        usleep(20000 + (useconds_t)below(d, 60000));
        kill(pids[odd], SIGKILL);
        int64_t began = cg_clock_ns();
        for (int i = 0; i < n; i++) {
            int status = 0;
            if (i == odd) continue;
            snprintf(doing, sizeof doing, "process %d of %d, the killed one is %d", i, n, odd);
            CHECK(waitpid(pids[i], &status, 0) == pids[i] && WIFEXITED(status), "did not exit");
            CHECK(WEXITSTATUS(status) == 42 || WEXITSTATUS(status) == 43, "ended with %d", WEXITSTATUS(status));
            heard += WEXITSTATUS(status) == 42;
        }
        CHECK(heard > 0, "no process has noticed the death itself");
        CHECK(cg_clock_ns() - began < 1500000000, "took %lld ns", (long long)(cg_clock_ns() - began));
        waitpid(pids[odd], NULL, 0);
        clear_place(&p);
    }
}

static void crashed(int number) {
    char text[320];
    int length = snprintf(text, sizeof text, "harness: signal %d [%s]\n", number, doing);
    if (write(2, text, (size_t)length) < 0) _exit(2);
    _exit(2);
}

int main(int argc, char **argv) {
    if (argc != 4) return fprintf(stderr, "usage: harness PART SECONDS SEED\n"), 2;
    const char *part = argv[1];
    double seconds = atof(argv[2]);
    dice d = {strtoull(argv[3], NULL, 10)};
    int all = strcmp(part, "all") == 0, rounds = seconds < 1 ? 1 : (int)seconds, done = 0;
    signal(SIGSEGV, crashed);
    signal(SIGBUS, crashed);
#define RUN(name, call)                                                                        \
    if (all || strcmp(part, name) == 0) {                                                      \
        int64_t began = cg_clock_ns(), until = began + (int64_t)(seconds * 1e9);               \
        (void)until;                                                                           \
        call;                                                                                  \
        printf("%s: fine (%.1f s)\n", name, (double)(cg_clock_ns() - began) / 1e9);            \
        fflush(stdout);                                                                        \
        done = 1;                                                                              \
    }
    RUN("processes", processes(&d, rounds)) /* first: a process with threads must not fork */
    RUN("guards", guards())
    RUN("cores", cores())
    RUN("kernels", kernels())
    RUN("collectives", collectives(&d, until))
    RUN("rings", rings(&d, until))
    RUN("zero_copies", zero_copies(&d, until))
    RUN("pool", pool(&d, until))
    RUN("endings", endings(&d, rounds))
    RUN("withdrawals", withdrawals(&d, until))
    RUN("nets", nets(&d, until))
    RUN("frames", frames(&d, until))
    if (!done) return fprintf(stderr, "harness: there is no part %s\n", part), 2;
    return 0;
}
