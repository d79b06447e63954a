/* spread: values put at their columns in a register, for 1 to 16 rows of x (AVX-512). */

#if defined(__x86_64__)

/* acc + the 32 products of two registers of bfloat16, added in pairs. */
#define PAIRS_NATIVE(acc, a, b) _mm512_dpbf16_ps(acc, (__m512bh)(a), (__m512bh)(b))
#define PAIRS_WIDENED(acc, a, b)                                                                                      \
    _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)),     \
                    _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)),                                   \
                                    _mm512_castsi512_ps(_mm512_and_si512(b, high)), acc))

/* a · b, bfloat16. */
AVX512_BF16 static float dot_pairs(const uint16_t *a, const uint16_t *b, int64_t n) {
    __m512 acc[4];
    int64_t j = 0;
    UNROLL for (int k = 0; k < 4; k++) acc[k] = _mm512_setzero_ps();
    for (; j + 128 <= n; j += 128)
        UNROLL for (int k = 0; k < 4; k++)
            acc[k] = PAIRS_NATIVE(acc[k], _mm512_loadu_si512(a + j + 32 * k), _mm512_loadu_si512(b + j + 32 * k));
    for (; j < n; j += 32) {
        const __mmask32 some = _bzhi_u32(~0u, (uint32_t)(n - j < 32 ? n - j : 32));
        acc[0] = PAIRS_NATIVE(acc[0], _mm512_maskz_loadu_epi16(some, a + j), _mm512_maskz_loadu_epi16(some, b + j));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3])));
}

/* sums[k] += all lanes of acc[k * step], for count of them; eight at a time share their shuffles. */
AVX512 INLINE void add_lanes(const __m512 *acc, int count, int step, float *sums) {
    int k = 0;
    for (; k + 8 <= count; k += 8) {
        __m512 half[4], quarter[2];
        UNROLL for (int i = 0; i < 4; i++) {
            const __m512 a = acc[(k + 2 * i) * step], b = acc[(k + 2 * i + 1) * step];
            half[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        }
        UNROLL for (int i = 0; i < 2; i++)
            quarter[i] = _mm512_add_ps(_mm512_shuffle_ps(half[2 * i], half[2 * i + 1], 0x44),
                                       _mm512_shuffle_ps(half[2 * i], half[2 * i + 1], 0xee));
        const __m512 two = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[0], quarter[1], 0x44),
                                         _mm512_shuffle_f32x4(quarter[0], quarter[1], 0xee));
        const __m512 one = _mm512_add_ps(_mm512_shuffle_f32x4(two, two, 0x08), _mm512_shuffle_f32x4(two, two, 0x0d));
        _mm256_storeu_ps(sums + k, _mm256_add_ps(_mm256_loadu_ps(sums + k), _mm512_castps512_ps256(one)));
    }
    for (; k < count; k++) sums[k] += _mm512_reduce_add_ps(acc[k * step]);
}

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
        UNROLL for (int t = 0; t < R; t++)                                                                            \
            UNROLL for (int k = 1; k < chains; k++)                                                                   \
                acc[t * chains] = _mm512_add_ps(acc[t * chains], acc[t * chains + k]);                                \
        add_lanes(acc, R, chains, sums);                                                                              \
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
    UNROLL for (int t = 0; t < R; t++)
        UNROLL for (int k = 1; k < chains; k++) acc[t * chains] = _mm512_add_ps(acc[t * chains], acc[t * chains + k]);
    add_lanes(acc, R, chains, sums);
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
   multiple of 16. For more than one row, columns are taken in blocks whose part of x stays in the innermost cache,
   GROUP rows a block; as that reads values in short pieces, those of the next GROUP, which follow in memory, are asked
   for meanwhile. */
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
        for (int k = 0; k < rows; k++) {                                                                              \
            float line[GROUP];                                                                                        \
            for (int64_t i = g; i < end; i++)                                                                         \
                line[i - g] = sums[i - g][k] + (layer->bias ? get(layer->bias, i, DTYPE) : 0.0f);                     \
            put_line(y, k * layer->m + g, line, end - g, DTYPE);                                                      \
        }                                                                                                             \
    }

#define SPREAD(NAME, TARGET, CALL, TYPE, DTYPE)                                                                       \
    TARGET static void NAME(const Layer *layer, const TYPE *x, const float *t, void *y, int rows, int64_t i0,         \
                            int64_t i1) {                                                                             \
        const int64_t stride = (layer->n + 7) / 8, padded = padded_rank(layer);                                       \
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
