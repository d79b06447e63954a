/* y = x (U V + S)ᵀ + b for an S whose entries lie packed row by row; see native.py for who calls what.

   S (m, n) is held as its values in row-major order, `starts` (m + 1: where each row's values begin) and one of
     bits   one bit an entry, ceil(n / 8) bytes a row, lowest bit first;
     gaps   one byte a value: the entries skipped before it; 255 skips 255 and carries no value. `gap_starts` (m + 1)
            says where each row's bytes begin, and the counter begins anew in every row.
   Whatever lies in these arrays has been checked before: nothing is checked here.

   Three ways to the product:
     spread  32 values at a time are spread over their columns in a register and multiplied with x as it lies
             (AVX-512 only). Costs the same for any density: for few rows of x.
     walk    each value times a row of xᵀ, 16 to 64 rows of x at once: for sparse S and any number of rows.
     expand  rows of S written densely into scratch memory, for a dense product.
   Values stream from memory once and are read long before the processor's own prefetcher would dare to: asking for
   them a kilobyte ahead is worth a factor of two to three. */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,bmi,bmi2,popcnt")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx2,fma,bmi,bmi2,popcnt")))
#define AVX512_BF16                                                                                                   \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx2,fma,bmi,bmi2,popcnt")))
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define AHEAD 1024 /* bytes that values are asked for ahead of their use */

enum { BFLOAT16 = 0, FLOAT32 = 1 };
enum { PLAIN = 0, LEVEL_AVX2 = 1, LEVEL_AVX512 = 2, LEVEL_AVX512_BF16 = 3 };

#define CHUNK 128 /* rows of S that a thread takes at a time */
#define GROUP 16 /* of them, those whose sums are kept side by side */
#define WALK_CACHE 4194304   /* bytes of x, transposed */
#define SPREAD_CACHE 32768 /* bytes of x that are used again and again */

typedef struct {
    const void *values;
    const uint8_t *index; /* bits or gaps */
    const int32_t *starts, *gap_starts; /* gap_starts: NULL for bits */
    const void *U, *V, *bias; /* (m, rank), (rank, n), (m,); NULL if absent */
    int64_t m, n, rank;
    int32_t dtype; /* of values, U, V, bias, x and y */
} Layer;

typedef float vec __attribute__((vector_size(64), aligned(4)));

INLINE float widen(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t narrow(float f) { /* to bfloat16, to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64); /* NaN stays one */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float get(const void *p, int64_t i, int dtype) {
    return dtype == BFLOAT16 ? widen(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

INLINE void put(void *p, int64_t i, float f, int dtype) {
    if (dtype == BFLOAT16)
        ((uint16_t *)p)[i] = narrow(f);
    else
        ((float *)p)[i] = f;
}

int losparse_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("bmi2"))
        return __builtin_cpu_supports("avx512bf16") ? LEVEL_AVX512_BF16 : LEVEL_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        return LEVEL_AVX2;
#endif
    return PLAIN;
}

#if defined(__x86_64__)
/* The values at the places of the set bits of `where`, zeros elsewhere. The instruction waits for what its register
   held before, although it writes all of it; naming the register as zero first frees it, and is worth a factor of two
   and more. Intrinsics cannot say that. */
AVX512 INLINE __m512i spread32(__mmask32 where, __m512i values) {
    __m512i spread;
    __asm__("vpxord %0, %0, %0\n\tvpexpandw %1, %0 %{%2%}%{z%}" : "=&v"(spread) : "v"(values), "Yk"(where));
    return spread;
}

AVX512 INLINE __m512 spread16(__mmask16 where, __m512 values) {
    __m512 spread;
    __asm__("vpxord %0, %0, %0\n\tvexpandps %1, %0 %{%2%}%{z%}" : "=&v"(spread) : "v"(values), "Yk"(where));
    return spread;
}

/* The reverse: the lanes at set bits, side by side. */
AVX512 INLINE __m512i gather32(__mmask32 where, __m512i lanes) {
    __m512i side_by_side;
    __asm__("vpxord %0, %0, %0\n\tvpcompressw %1, %0 %{%2%}%{z%}" : "=&v"(side_by_side) : "v"(lanes), "Yk"(where));
    return side_by_side;
}
#endif

/* --- the columns of a row's entries, in ascending order ------------------------------------------------------- */

INLINE int64_t columns_of_gaps(const uint8_t *gaps, int64_t count, uint16_t *columns) {
    int64_t found = 0;
    uint32_t next = 0;
    for (int64_t k = 0; k < count; k++) {
        if (gaps[k] == 255) {
            next += 255;
            continue;
        }
        next += gaps[k];
        columns[found++] = (uint16_t)next++;
    }
    return found;
}

INLINE int64_t columns_of_bits(const uint8_t *bits, int64_t n, uint16_t *columns) {
    int64_t found = 0;
    for (int64_t j = 0; j < n; j += 64) {
        uint64_t word = 0;
        int64_t left = (n - j + 7) / 8;
        memcpy(&word, bits + j / 8, left < 8 ? left : 8);
        for (; word; word &= word - 1) columns[found++] = (uint16_t)(j + __builtin_ctzll(word));
    }
    return found;
}

#if defined(__x86_64__)
AVX512 static int64_t columns_of_bits_512(const uint8_t *bits, int64_t n, uint16_t *columns) {
    int64_t found = 0, j = 0;
    __m512i here = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11,
                                    10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i step = _mm512_set1_epi16(32);
    for (; j + 32 <= n; j += 32) { /* `columns` has room for 32 more than n, so whole registers can be stored */
        uint32_t word;
        memcpy(&word, bits + j / 8, 4);
        _mm512_storeu_si512(columns + found, gather32(word, here));
        found += __builtin_popcount(word);
        here = _mm512_add_epi16(here, step);
    }
    for (; j < n; j++)
        if (bits[j / 8] >> (j % 8) & 1) columns[found++] = (uint16_t)j;
    return found;
}
#endif

INLINE int64_t columns_of_row(const Layer *layer, int64_t i, uint16_t *columns, int level) {
    if (layer->gap_starts) {
        int64_t start = layer->gap_starts[i];
        return columns_of_gaps(layer->index + start, layer->gap_starts[i + 1] - start, columns);
    }
    const uint8_t *bits = layer->index + i * ((layer->n + 7) / 8);
#if defined(__x86_64__)
    if (level >= LEVEL_AVX512) return columns_of_bits_512(bits, layer->n, columns);
#endif
    return columns_of_bits(bits, layer->n, columns);
}

/* --- walk: one value after the other, `width` vectors of 16 rows of x at once ----------------------------------- */

/* acc (width, 16) = sum over the row's entries of value * xt[column]; xt: (n, width, 16). */
INLINE void walk_row(const void *values, const uint16_t *columns, int64_t count, const float *xt, vec *acc, int width,
                     int dtype) {
    vec sum[8] = {{0}};
    const vec *x = (const vec *)xt;
    int64_t k = 0;
    for (; k + 2 <= count; k += 2) {
        const float a = get(values, k, dtype), b = get(values, k + 1, dtype);
        const vec *p = x + (int64_t)columns[k] * width, *q = x + (int64_t)columns[k + 1] * width;
        __builtin_prefetch((const char *)values + k * (dtype == BFLOAT16 ? 2 : 4) + AHEAD);
        UNROLL for (int w = 0; w < width; w++) sum[w] += a * p[w];
        UNROLL for (int w = 0; w < width; w++) sum[width + w] += b * q[w];
    }
    if (k < count) {
        const float a = get(values, k, dtype);
        const vec *p = x + (int64_t)columns[k] * width;
        UNROLL for (int w = 0; w < width; w++) sum[w] += a * p[w];
    }
    UNROLL for (int w = 0; w < width; w++) acc[w] = sum[w] + sum[width + w];
}

/* Rows i0..i1 of y (rows, m) += S xᵀ, for the `used` first of 16 * width rows. */
INLINE void walk_block(const Layer *layer, const float *xt, int width, int used, void *y, int64_t i0, int64_t i1,
                       uint16_t *columns, int level, int dtype) {
    const int size = dtype == BFLOAT16 ? 2 : 4;
    vec tile[GROUP][4];
    for (int64_t i = i0; i < i1; i += GROUP) {
        const int rows = i1 - i < GROUP ? (int)(i1 - i) : GROUP;
        for (int k = 0; k < rows; k++) {
            const int64_t start = layer->starts[i + k];
            const int64_t count = columns_of_row(layer, i + k, columns, level);
            walk_row((const char *)layer->values + start * size, columns, count, xt, tile[k], width, dtype);
        }
        for (int t = 0; t < used; t++)
            for (int k = 0; k < rows; k++) {
                const int64_t at = t * layer->m + i + k;
                put(y, at, get(y, at, dtype) + ((const float *)tile[k])[t], dtype);
            }
    }
}

/* xt (n, lanes) = x (used, n)ᵀ in float32, the missing rows zero. */
INLINE void transpose(const void *x, int64_t n, int used, int lanes, float *xt, int64_t j0, int64_t j1, int dtype) {
    for (int64_t j = j0; j < j1; j++)
        for (int t = 0; t < lanes; t++) xt[j * lanes + t] = t < used ? get(x, t * n + j, dtype) : 0.0f;
}

#define WALK(NAME, TARGET, LEVEL)                                                                                     \
    TARGET static void NAME(const Layer *layer, const float *xt, int width, int used, void *y, int64_t i0, int64_t i1,\
                            uint16_t *columns) {                                                                      \
        const int bf16 = layer->dtype == BFLOAT16;                                                                    \
        if (width == 1 && bf16) walk_block(layer, xt, 1, used, y, i0, i1, columns, LEVEL, BFLOAT16);                  \
        else if (width == 1) walk_block(layer, xt, 1, used, y, i0, i1, columns, LEVEL, FLOAT32);                      \
        else if (width == 2 && bf16) walk_block(layer, xt, 2, used, y, i0, i1, columns, LEVEL, BFLOAT16);             \
        else if (width == 2) walk_block(layer, xt, 2, used, y, i0, i1, columns, LEVEL, FLOAT32);                      \
        else if (bf16) walk_block(layer, xt, 4, used, y, i0, i1, columns, LEVEL, BFLOAT16);                           \
        else walk_block(layer, xt, 4, used, y, i0, i1, columns, LEVEL, FLOAT32);                                      \
    }                                                                                                                 \
    TARGET static void NAME##_transpose(const Layer *layer, const void *x, int used, int lanes, float *xt, int64_t j0,\
                                        int64_t j1) {                                                                 \
        if (layer->dtype == BFLOAT16) transpose(x, layer->n, used, lanes, xt, j0, j1, BFLOAT16);                      \
        else transpose(x, layer->n, used, lanes, xt, j0, j1, FLOAT32);                                                \
    }

WALK(walk_plain, , PLAIN)
#if defined(__x86_64__)
WALK(walk_avx2, AVX2, LEVEL_AVX2)
WALK(walk_avx512, AVX512, LEVEL_AVX512)
#endif

/* y (rows, m) += x (rows, n) Sᵀ. Returns 0, or 1 if there was no memory. */
int losparse_walk(const Layer *layer, const void *x, void *y, int64_t rows, int threads, int level) {
    const int64_t m = layer->m, n = layer->n;
    const int size = layer->dtype == BFLOAT16 ? 2 : 4;
    /* xᵀ is read at random: it should stay near. */
    const int fitting = n * 256 <= WALK_CACHE ? 4 : n * 128 <= WALK_CACHE ? 2 : 1;
    const int widest = rows > 32 && fitting > 2 ? 4 : rows > 16 && fitting > 1 ? 2 : 1;
    float *xt = aligned_alloc(64, (size_t)n * widest * 64);
    int failed = xt == NULL;
    for (int64_t t = 0; t < rows && !failed; t += 16 * widest) {
        const int used = rows - t < 16 * widest ? (int)(rows - t) : 16 * widest;
        const int width = used > 32 ? 4 : used > 16 ? 2 : 1, lanes = 16 * width; /* at most `widest` */
        const char *from = (const char *)x + t * n * size;
        char *to = (char *)y + t * m * size;
#pragma omp parallel num_threads(threads) reduction(| : failed)
        {
            uint16_t *columns = malloc((n + 32) * sizeof *columns);
            failed |= columns == NULL;
#pragma omp for schedule(static)
            for (int64_t j = 0; j < n; j += 256) {
                const int64_t end = j + 256 < n ? j + 256 : n;
#if defined(__x86_64__)
                if (level >= LEVEL_AVX512) walk_avx512_transpose(layer, from, used, lanes, xt, j, end);
                else if (level >= LEVEL_AVX2) walk_avx2_transpose(layer, from, used, lanes, xt, j, end);
                else
#endif
                    walk_plain_transpose(layer, from, used, lanes, xt, j, end);
            }
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < m; i += CHUNK) {
                const int64_t end = i + CHUNK < m ? i + CHUNK : m;
                if (columns == NULL) continue;
#if defined(__x86_64__)
                if (level >= LEVEL_AVX512) walk_avx512(layer, xt, width, used, to, i, end, columns);
                else if (level >= LEVEL_AVX2) walk_avx2(layer, xt, width, used, to, i, end, columns);
                else
#endif
                    walk_plain(layer, xt, width, used, to, i, end, columns);
            }
            free(columns);
        }
    }
    free(xt);
    return failed;
}

/* --- few rows of x: everything in one pass ----------------------------------------------------------------------- */

/* How many rows are computed for so many of x. */
INLINE int64_t spread_rows(int64_t rows) { return rows <= 8 ? rows : rows <= 12 ? 12 : 16; }

typedef uint16_t half16 __attribute__((vector_size(32)));
typedef uint32_t word16 __attribute__((vector_size(64)));

INLINE vec load16(const void *p, int64_t i, int dtype) {
    vec v;
    if (dtype == BFLOAT16) {
        half16 h;
        memcpy(&h, (const uint16_t *)p + i, sizeof h);
        const word16 w = __builtin_convertvector(h, word16) << 16;
        memcpy(&v, &w, sizeof v);
    } else {
        memcpy(&v, (const float *)p + i, sizeof v);
    }
    return v;
}

INLINE float sum16(vec v) {
    float total = 0;
    for (int k = 8; k; k /= 2)
        for (int l = 0; l < k; l++) v[l] += v[l + k];
    total = v[0];
    return total;
}

INLINE float dot(const void *a, int64_t i, const void *b, int64_t j, int64_t n, int dtype) {
    vec s = {0}, t = {0};
    int64_t k = 0;
    for (; k + 32 <= n; k += 32) {
        s += load16(a, i + k, dtype) * load16(b, j + k, dtype);
        t += load16(a, i + k + 16, dtype) * load16(b, j + k + 16, dtype);
    }
    float rest = 0;
    for (; k < n; k++) rest += get(a, i + k, dtype) * get(b, j + k, dtype);
    return sum16(s + t) + rest;
}

/* U[i] t + bias[i]; t: (rank,) in float32. */
INLINE float low_rank(const Layer *layer, int64_t i, const float *t, int dtype) {
    const int64_t rank = layer->rank;
    float y = layer->bias ? get(layer->bias, i, dtype) : 0.0f;
    int64_t r = 0;
    if (rank >= 16) {
        vec s = {0};
        for (; r + 16 <= rank; r += 16) s += load16(layer->U, i * rank + r, dtype) * load16(t, r, FLOAT32);
        y += sum16(s);
    }
    float a = 0, b = 0;
    for (; r + 2 <= rank; r += 2) {
        a += get(layer->U, i * rank + r, dtype) * t[r];
        b += get(layer->U, i * rank + r + 1, dtype) * t[r + 1];
    }
    if (r < rank) a += get(layer->U, i * rank + r, dtype) * t[r];
    return y + a + b;
}

/* Sum of value * x[column] over one row's entries. */
INLINE float gather_row(const void *values, const uint16_t *columns, int64_t count, const float *x, int level,
                        int dtype) {
    float total = 0, more = 0;
    int64_t k = 0;
#if defined(__x86_64__)
    if (level >= LEVEL_AVX2) {
        vec s = {0};
        for (; k + 16 <= count; k += 16) {
            vec g;
            __builtin_prefetch((const char *)values + k * (dtype == BFLOAT16 ? 2 : 4) + AHEAD);
            for (int l = 0; l < 16; l++) g[l] = x[columns[k + l]];
            s += load16(values, k, dtype) * g;
        }
        total = sum16(s);
    }
#endif
    for (; k + 2 <= count; k += 2) {
        total += get(values, k, dtype) * x[columns[k]];
        more += get(values, k + 1, dtype) * x[columns[k + 1]];
    }
    if (k < count) total += get(values, k, dtype) * x[columns[k]];
    return total + more;
}

#if defined(__x86_64__)

/* acc + the 32 products of two registers of bfloat16, added in pairs. */
#define PAIRS_NATIVE(acc, a, b) _mm512_dpbf16_ps(acc, (__m512bh)(a), (__m512bh)(b))
#define PAIRS_WIDENED(acc, a, b)                                                                                      \
    _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)),     \
                    _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)),                                   \
                                    _mm512_castsi512_ps(_mm512_and_si512(b, high)), acc))

/* acc (R, chains) += U[row] t for R rows of t, each `padded` long with zeros after `rank`. */
AVX512 INLINE void start(const void *U, const float *t, int64_t rank, int64_t padded, int R, int chains, int dtype,
                         __m512 *acc) {
    for (int64_t r = 0; r < rank; r += 16) {
        const __mmask16 inside = (__mmask16)_bzhi_u32(~0u, (uint32_t)(rank - r < 16 ? rank - r : 16));
        __m512 u;
        if (dtype == BFLOAT16)
            u = _mm512_castsi512_ps(_mm512_slli_epi32(
                _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, (const uint16_t *)U + r)), 16));
        else
            u = _mm512_maskz_loadu_ps(inside, (const float *)U + r);
        UNROLL for (int k = 0; k < R; k++)
            acc[k * chains] = _mm512_fmadd_ps(u, _mm512_loadu_ps(t + k * padded + r), acc[k * chains]);
    }
}

/* sums (R) += value * x[t][column] over a row's entries in the first `width` columns, for R rows of x, packed (see
   `pack`); returns where its values go on. `fenced`: the values' end is near, so whole registers must not be loaded.
   U: the row's, to begin with U t, or NULL. */
#define SPREAD_BF16(NAME, TARGET, PAIRS)                                                                              \
    TARGET INLINE const uint16_t *NAME(const uint16_t *v, const uint8_t *bits, const uint16_t *x, int64_t width,      \
                                       int R, int chains, int fenced, const uint16_t *U, const float *t,              \
                                       int64_t rank, int64_t padded, float *sums) {                                   \
        const __m512i high = _mm512_set1_epi32((int)0xffff0000);                                                      \
        __m512 acc[16];                                                                                               \
        int64_t j = 0;                                                                                                \
        (void)high;                                                                                                   \
        UNROLL for (int k = 0; k < R * chains; k++) acc[k] = _mm512_setzero_ps();                                     \
        if (U) start(U, t, rank, padded, R, chains, BFLOAT16, acc);                                                   \
        for (; j + 128 <= width && !fenced; j += 128) {                                                               \
            uint64_t w[2];                                                                                            \
            memcpy(w, bits + j / 8, 16);                                                                              \
            const int64_t first = __builtin_popcountll(w[0]);                                                         \
            const int64_t at[4] = {0, __builtin_popcount((uint32_t)w[0]), first,                                      \
                                   first + __builtin_popcount((uint32_t)w[1])};                                       \
            _mm_prefetch((const char *)v + AHEAD, _MM_HINT_T0);                                                       \
            _mm_prefetch((const char *)v + AHEAD + 64, _MM_HINT_T0);                                                  \
            UNROLL for (int s = 0; s < 4; s++) {                                                                      \
                const __mmask32 where = (__mmask32)(w[s / 2] >> (s % 2 * 32));                                        \
                const __m512i e = spread32(where, _mm512_loadu_si512(v + at[s]));                                     \
                UNROLL for (int t = 0; t < R; t++)                                                                    \
                    acc[t * chains + s % chains] =                                                                    \
                        PAIRS(acc[t * chains + s % chains], e, _mm512_loadu_si512(x + (j + 32 * s) * R + 32 * t));    \
            }                                                                                                         \
            v += first + __builtin_popcountll(w[1]);                                                                  \
        }                                                                                                             \
        for (; j < width; j += 32) {                                                                                  \
            uint32_t word = 0;                                                                                        \
            const int64_t left = width - j;                                                                           \
            memcpy(&word, bits + j / 8, left < 32 ? (left + 7) / 8 : 4);                                              \
            const int count = __builtin_popcount(word);                                                               \
            const __mmask32 some = _bzhi_u32(~0u, count);                                                             \
            const __m512i e = spread32((__mmask32)word, _mm512_maskz_loadu_epi16(some, v));                           \
            UNROLL for (int t = 0; t < R; t++)                                                                        \
                acc[t * chains] = PAIRS(acc[t * chains], e, _mm512_loadu_si512(x + j * R + 32 * t));                  \
            v += count;                                                                                               \
        }                                                                                                             \
        UNROLL for (int t = 0; t < R; t++) {                                                                          \
            UNROLL for (int k = 1; k < chains; k++)                                                                   \
                acc[t * chains] = _mm512_add_ps(acc[t * chains], acc[t * chains + k]);                                \
            sums[t] += _mm512_reduce_add_ps(acc[t * chains]);                                                         \
        }                                                                                                             \
        return v;                                                                                                     \
    }

SPREAD_BF16(spread_bf16, AVX512_BF16, PAIRS_NATIVE)
SPREAD_BF16(spread_bf16_widened, AVX512, PAIRS_WIDENED)

/* The same in float32, 16 columns at a time. */
AVX512 INLINE const float *spread_f32(const float *v, const uint8_t *bits, const float *x, int64_t width, int R,
                                      int chains, int fenced, const float *U, const float *t, int64_t rank,
                                      int64_t padded, float *sums) {
    __m512 acc[16];
    int64_t j = 0;
    UNROLL for (int k = 0; k < R * chains; k++) acc[k] = _mm512_setzero_ps();
    if (U) start(U, t, rank, padded, R, chains, FLOAT32, acc);
    for (; j + 64 <= width && !fenced; j += 64) {
        uint64_t w;
        memcpy(&w, bits + j / 8, 8);
        _mm_prefetch((const char *)v + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)v + AHEAD + 64, _MM_HINT_T0);
        UNROLL for (int s = 0; s < 4; s++) {
            const __mmask16 where = (__mmask16)(w >> (16 * s));
            const __m512 e = spread16(where, _mm512_loadu_ps(v));
            UNROLL for (int t = 0; t < R; t++)
                acc[t * chains + s % chains] =
                    _mm512_fmadd_ps(e, _mm512_loadu_ps(x + (j + 16 * s) * R + 16 * t), acc[t * chains + s % chains]);
            v += __builtin_popcount(where);
        }
    }
    for (; j < width; j += 16) {
        uint16_t word = 0;
        const int64_t left = width - j;
        memcpy(&word, bits + j / 8, left <= 8 ? 1 : 2);
        const int count = __builtin_popcount(word);
        const __mmask16 some = (__mmask16)_bzhi_u32(~0u, count);
        const __m512 e = spread16(word, _mm512_maskz_loadu_ps(some, v));
        UNROLL for (int t = 0; t < R; t++)
            acc[t * chains] = _mm512_fmadd_ps(e, _mm512_loadu_ps(x + j * R + 16 * t), acc[t * chains]);
        v += count;
    }
    UNROLL for (int t = 0; t < R; t++) {
        UNROLL for (int k = 1; k < chains; k++) acc[t * chains] = _mm512_add_ps(acc[t * chains], acc[t * chains + k]);
        sums[t] += _mm512_reduce_add_ps(acc[t * chains]);
    }
    return v;
}

/* packed = columns j0..j1 of x (rows, n) for R rows: 64 bytes of one row after the other, then the next 64; zeros where
   there is no column or row. As x lies, the same columns of several rows can all fall on the same few lines of a
   cache. */
static void pack(const char *x, int64_t n, int64_t rows, int64_t R, int size, int64_t j0, int64_t j1, char *packed) {
    const int64_t lanes = 64 / size;
    for (int64_t j = j0; j < j1; j += lanes)
        for (int64_t t = 0; t < R; t++) {
            const int64_t left = t < rows && j < n ? (n - j < lanes ? n - j : lanes) : 0;
            char *to = packed + (j * R + lanes * t) * size;
            if (left) memcpy(to, x + (t * n + j) * size, left * size);
            memset(to + left * size, 0, 64 - left * size);
        }
}

/* Rows i0..i1 of y (rows, m), for R rows of x, some of them padding; t: (R, rank), each row padded with zeros to a
   multiple of 16. For more than one row, columns are taken in blocks whose part of x stays in the innermost cache, GROUP
   rows a block; as that reads values in short pieces, those of the next GROUP, which follow in memory, are asked for
   meanwhile. */
#define SPREAD_ROWS(CALL, R, CHAINS, TYPE, DTYPE)                                                                     \
    for (int64_t g = i0; g < i1; g += GROUP) {                                                                        \
        const int64_t block = R > 1 ? SPREAD_CACHE / (R * (int64_t)sizeof(TYPE)) / 128 * 128 : layer->n;              \
        const int64_t end = g + GROUP < i1 ? g + GROUP : i1, after = end + GROUP < i1 ? end + GROUP : i1;             \
        const char *next = (const char *)((const TYPE *)layer->values + layer->starts[end]);                          \
        const char *const stop = (const char *)((const TYPE *)layer->values + layer->starts[after]);                  \
        const int64_t share = (stop - next) / (64 * GROUP * ((layer->n + block - 1) / block)) + 1;                    \
        const TYPE *v[GROUP];                                                                                         \
        float sums[GROUP][R];                                                                                         \
        memset(sums, 0, sizeof sums);                                                                                 \
        for (int64_t i = g; i < end; i++) v[i - g] = (const TYPE *)layer->values + layer->starts[i];                  \
        for (int64_t j = 0; j < layer->n; j += block) {                                                               \
            const int64_t width = layer->n - j < block ? layer->n - j : block;                                        \
            for (int64_t i = g; i < end; i++) {                                                                       \
                const uint8_t *bits = layer->index + i * stride + j / 8;                                              \
                const int fenced = layer->starts[i + 1] + 64 > layer->starts[layer->m];                               \
                for (int64_t p = 0; R > 1 && p < share && next < stop; p++, next += 64) __builtin_prefetch(next);     \
                const TYPE *U = j || !layer->rank ? NULL : (const TYPE *)layer->U + i * layer->rank;                  \
                if (fenced)                                                                                           \
                    v[i - g] = CALL(v[i - g], bits, x + j * R, width, R, CHAINS, 1, U, t, layer->rank, padded,        \
                                    sums[i - g]);                                                                     \
                else                                                                                                  \
                    v[i - g] = CALL(v[i - g], bits, x + j * R, width, R, CHAINS, 0, U, t, layer->rank, padded,        \
                                    sums[i - g]);                                                                     \
            }                                                                                                         \
        }                                                                                                             \
        for (int64_t i = g; i < end; i++)                                                                             \
            for (int k = 0; k < rows; k++)                                                                            \
                put(y, k * layer->m + i, sums[i - g][k] + (layer->bias ? get(layer->bias, i, DTYPE) : 0.0f), DTYPE);  \
    }

#define SPREAD(NAME, TARGET, CALL, TYPE, DTYPE)                                                                       \
    TARGET static void NAME(const Layer *layer, const TYPE *x, const float *t, void *y, int rows, int64_t i0,         \
                            int64_t i1) {                                                                             \
        const int64_t stride = (layer->n + 7) / 8, padded = (layer->rank + 15) / 16 * 16;                             \
        switch (spread_rows(rows)) {                                                                                  \
            case 1: SPREAD_ROWS(CALL, 1, 4, TYPE, DTYPE) break;                                                       \
            case 2: SPREAD_ROWS(CALL, 2, 4, TYPE, DTYPE) break;                                                       \
            case 3: SPREAD_ROWS(CALL, 3, 4, TYPE, DTYPE) break;                                                       \
            case 4: SPREAD_ROWS(CALL, 4, 2, TYPE, DTYPE) break;                                                       \
            case 5: SPREAD_ROWS(CALL, 5, 2, TYPE, DTYPE) break;                                                       \
            case 6: SPREAD_ROWS(CALL, 6, 2, TYPE, DTYPE) break;                                                       \
            case 7: SPREAD_ROWS(CALL, 7, 2, TYPE, DTYPE) break;                                                       \
            case 8: SPREAD_ROWS(CALL, 8, 2, TYPE, DTYPE) break;                                                       \
            case 12: SPREAD_ROWS(CALL, 12, 1, TYPE, DTYPE) break;                                                     \
            default: SPREAD_ROWS(CALL, 16, 1, TYPE, DTYPE)                                                            \
        }                                                                                                             \
    }

SPREAD(spread_rows_bf16, AVX512_BF16, spread_bf16, uint16_t, BFLOAT16)
SPREAD(spread_rows_bf16_widened, AVX512, spread_bf16_widened, uint16_t, BFLOAT16)
SPREAD(spread_rows_f32, AVX512, spread_f32, float, FLOAT32)
#endif

#define FEW(NAME, TARGET, LEVEL)                                                                                      \
    TARGET static void NAME##_project(const Layer *layer, const void *x, float *t, int rows, int64_t r) {             \
        for (int k = 0; k < rows; k++)                                                                                \
            t[k * ((layer->rank + 15) / 16 * 16) + r] = layer->dtype == BFLOAT16                                      \
                                         ? dot(layer->V, r * layer->n, x, k * layer->n, layer->n, BFLOAT16)           \
                                         : dot(layer->V, r * layer->n, x, k * layer->n, layer->n, FLOAT32);           \
    }                                                                                                                 \
    TARGET static void NAME##_gather(const Layer *layer, const float *x, const float *t, void *y, int64_t i0,         \
                                     int64_t i1, uint16_t *columns) {                                                 \
        for (int64_t i = i0; i < i1; i++) {                                                                           \
            const int64_t start = layer->starts[i], count = columns_of_row(layer, i, columns, LEVEL);                 \
            if (layer->dtype == BFLOAT16) {                                                                           \
                const void *v = (const uint16_t *)layer->values + start;                                              \
                put(y, i, gather_row(v, columns, count, x, LEVEL, BFLOAT16) + low_rank(layer, i, t, BFLOAT16),        \
                    BFLOAT16);                                                                                        \
            } else {                                                                                                  \
                const void *v = (const float *)layer->values + start;                                                 \
                put(y, i, gather_row(v, columns, count, x, LEVEL, FLOAT32) + low_rank(layer, i, t, FLOAT32), FLOAT32);\
            }                                                                                                         \
        }                                                                                                             \
    }

FEW(few_plain, , PLAIN)
#if defined(__x86_64__)
FEW(few_avx2, AVX2, LEVEL_AVX2)
FEW(few_avx512, AVX512, LEVEL_AVX512)
#endif

/* y (rows, m) = x (rows, n) (U V + S)ᵀ + bias, whole, for 1 to 16 rows; one row only without AVX-512 or with gaps.
   Returns 0; 1 if there was no memory; 2 if it cannot. */
int losparse_few(const Layer *layer, const void *x, void *y, int64_t rows, int threads, int level) {
    const int64_t m = layer->m, n = layer->n, rank = layer->rank;
    const int spread = level >= LEVEL_AVX512 && !layer->gap_starts;
    if (rows < 1 || rows > (spread ? 16 : 1)) return 2;
    const int64_t R = spread_rows(rows);
    const int size = layer->dtype == BFLOAT16 ? 2 : 4;
    const int64_t padded = (n + 127) / 128 * 128;
    float *t = calloc(R * ((rank + 15) / 16 * 16) + 1, sizeof *t);
    void *ready = aligned_alloc(64, (size_t)(padded * (spread ? R * size : 4)));
    int failed = t == NULL || ready == NULL;
    if (!failed) {
        if (!spread)
            for (int64_t j = 0; j < n; j++) ((float *)ready)[j] = get(x, j, layer->dtype);
#pragma omp parallel num_threads(threads) reduction(| : failed)
        {
            uint16_t *columns = spread ? NULL : malloc((n + 32) * sizeof *columns);
            failed |= !spread && columns == NULL;
            if (spread) {
#pragma omp for schedule(static) nowait
                for (int64_t j = 0; j < padded; j += 128) pack(x, n, rows, R, size, j, j + 128, ready);
            }
            if (rank) {
#pragma omp for schedule(static) nowait
                for (int64_t r = 0; r < rank; r++) {
#if defined(__x86_64__)
                    if (level >= LEVEL_AVX512) few_avx512_project(layer, x, t, (int)rows, r);
                    else if (level >= LEVEL_AVX2) few_avx2_project(layer, x, t, (int)rows, r);
                    else
#endif
                        few_plain_project(layer, x, t, (int)rows, r);
                }
            }
#pragma omp barrier
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < m; i += CHUNK) {
                const int64_t end = i + CHUNK < m ? i + CHUNK : m;
                if (!spread && columns == NULL) continue;
#if defined(__x86_64__)
                if (spread && layer->dtype == FLOAT32) spread_rows_f32(layer, ready, t, y, (int)rows, i, end);
                else if (spread && level >= LEVEL_AVX512_BF16) spread_rows_bf16(layer, ready, t, y, (int)rows, i, end);
                else if (spread) spread_rows_bf16_widened(layer, ready, t, y, (int)rows, i, end);
                else if (level >= LEVEL_AVX512) few_avx512_gather(layer, ready, t, y, i, end, columns);
                else if (level >= LEVEL_AVX2) few_avx2_gather(layer, ready, t, y, i, end, columns);
                else
#endif
                    few_plain_gather(layer, ready, t, y, i, end, columns);
            }
            free(columns);
        }
    }
    free(t);
    free(ready);
    return failed;
}

/* --- expand: rows of S, dense ------------------------------------------------------------------------------------ */

#if defined(__x86_64__)
/* One row of 2-byte values of whatever type, at least 64 values before their end. */
AVX512 static void expand_row_512(const uint16_t *v, const uint8_t *bits, int64_t n, uint16_t *row) {
    int64_t j = 0;
    for (; j + 32 <= n; j += 32) {
        uint32_t word;
        memcpy(&word, bits + j / 8, 4);
        _mm_prefetch((const char *)v + AHEAD, _MM_HINT_T0);
        _mm512_storeu_si512(row + j, spread32((__mmask32)word, _mm512_loadu_si512(v)));
        v += __builtin_popcount(word);
    }
    for (; j < n; j++) row[j] = bits[j / 8] >> (j % 8) & 1 ? *v++ : 0;
}
#endif

/* Rows i0..i1 of S into dense (i1 - i0, n), for values of 2 or 4 bytes of whatever type. Returns 0; 1 without
   memory. */
int losparse_expand(const Layer *layer, void *dense, int64_t i0, int64_t i1, int size, int threads, int level) {
    const int64_t n = layer->n;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        uint16_t *columns = malloc((n + 32) * sizeof *columns);
        failed |= columns == NULL;
#pragma omp for schedule(dynamic, 16)
        for (int64_t i = i0; i < i1; i++) {
            char *row = (char *)dense + (i - i0) * n * size;
            const char *v = (const char *)layer->values + (int64_t)layer->starts[i] * size;
            if (columns == NULL) continue;
#if defined(__x86_64__)
            if (size == 2 && level >= LEVEL_AVX512 && !layer->gap_starts &&
                layer->starts[i + 1] + 64 <= layer->starts[layer->m]) {
                expand_row_512((const uint16_t *)v, layer->index + i * ((n + 7) / 8), n, (uint16_t *)row);
                continue;
            }
#endif
            memset(row, 0, n * size);
            const int64_t count = columns_of_row(layer, i, columns, level);
            for (int64_t k = 0; k < count; k++) memcpy(row + (int64_t)columns[k] * size, v + k * size, size);
        }
        free(columns);
    }
    return failed;
}

/* --- stored layouts to bits; these trust nothing --------------------------------------------------------------- */

INLINE void set_bit(uint8_t *bits, int64_t n, int64_t row, int64_t column) {
    bits[row * ((n + 7) / 8) + column / 8] |= (uint8_t)(1 << (column % 8));
}

/* Layouts gaps4 (per_byte 2) and gaps8 (1). bits: zeros on entry; starts: (m + 1). Returns 0, or 1 if the index is
   damaged: the slower reference then says how. */
int losparse_bits_of_gaps(const uint8_t *stream, int64_t bytes, const int32_t *offsets, int64_t group_rows, int64_t m,
                          int64_t n, int64_t nnz, int per_byte, uint8_t *bits, int32_t *starts, int threads) {
    const int64_t groups = (m + group_rows - 1) / group_rows;
    const unsigned escape = per_byte == 2 ? 15 : 255;
    int damaged = offsets[0] != 0 || offsets[1] != 0 || offsets[2 * groups] != nnz || offsets[2 * groups + 1] != bytes;
    for (int64_t g = 0; g < groups && !damaged; g++)
        damaged = offsets[2 * g + 2] < offsets[2 * g] || offsets[2 * g + 3] < offsets[2 * g + 1];
    if (damaged) return 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : damaged)
    for (int64_t g = 0; g < groups; g++) {
        const int64_t first = g * group_rows, last = first + group_rows < m ? first + group_rows : m;
        int64_t value = offsets[2 * g], row = first, column = 0;
        starts[first] = (int32_t)value;
        for (int64_t b = offsets[2 * g + 1]; b < offsets[2 * g + 3] && !damaged; b++)
            for (int half = 0; half < per_byte; half++) {
                const unsigned unit = per_byte == 2 ? (half ? stream[b] >> 4 : stream[b] & 15) : stream[b];
                column += unit;
                if (unit == escape) continue;
                while (column >= n && row < last) {
                    column -= n;
                    if (++row < last) starts[row] = (int32_t)value;
                }
                if (row >= last || value >= offsets[2 * g + 2]) {
                    damaged |= 1;
                    break;
                }
                set_bit(bits, n, row, column++);
                value++;
            }
        damaged |= value != offsets[2 * g + 2];
        for (int64_t r = row + 1; r < last; r++) starts[r] = (int32_t)value;
    }
    starts[m] = (int32_t)nnz;
    return damaged;
}

/* Layout n:m: `keep` positions of `width` bits for every group of `group` entries, in ascending order. */
int losparse_bits_of_groups(const uint8_t *packed, int keep, int group, int width, int64_t m, int64_t n, uint8_t *bits,
                            int32_t *starts, int threads) {
    const int64_t groups = n / group;
    int damaged = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : damaged)
    for (int64_t i = 0; i < m; i++) {
        int64_t at = i * groups * keep * width;
        starts[i] = (int32_t)(i * groups * keep);
        for (int64_t g = 0; g < groups; g++) {
            int64_t last = -1;
            for (int k = 0; k < keep; k++) {
                int64_t position = 0;
                for (int b = 0; b < width; b++, at++) position |= (int64_t)(packed[at / 8] >> (at % 8) & 1) << b;
                if (position <= last || position >= group)
                    damaged |= 1;
                else
                    set_bit(bits, n, i, g * group + position);
                last = position;
            }
        }
    }
    starts[m] = (int32_t)(m * groups * keep);
    return damaged;
}

/* starts (m + 1) of a bitmask; returns 0, or 1 if it does not set nnz bits or sets any past column n. */
int losparse_starts_of_bits(const uint8_t *bits, int64_t m, int64_t n, int64_t nnz, int32_t *starts) {
    const int64_t stride = (n + 7) / 8;
    int64_t total = 0;
    for (int64_t i = 0; i < m; i++) {
        const uint8_t *row = bits + i * stride;
        int64_t j = 0;
        starts[i] = (int32_t)total;
        for (; j + 8 <= stride; j += 8) {
            uint64_t word;
            memcpy(&word, row + j, 8);
            total += __builtin_popcountll(word);
        }
        for (; j < stride; j++) total += __builtin_popcount(row[j]);
        if (n % 8 && row[stride - 1] >> (n % 8)) return 1;
        if (total > nnz) return 1;
    }
    starts[m] = (int32_t)total;
    return total != nnz;
}
