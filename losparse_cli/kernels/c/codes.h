/* S as whole numbers in few bits: S_ij = a_i c_j q_ij (shim/packed.py says how they lie).

   x times the factors of the columns becomes whole numbers, too, in digits of base 128, so that all that is done for
   each code is whole: exact, and 32 at a time in AVX2. Two digits are 15 bits of the largest of a row of x, finer than
   bfloat16; three are 22, for float32. A code is held as u = q + 2^(bits - 1), which is not negative, as the processor's
   product of bytes wants it; what that adds is known from the sum of the digits. */

enum { STRIP = 8, LINE = 32, BLOCK = 8, MOST_DIGITS = 3, ROWS_AT_ONCE = 16 };
#define UNIT (1 << 7) /* of the next digit */

typedef struct {
    int64_t rows, lines; /* of x; of LINE columns in each */
    int digits;
    float *factors; /* (n,) of columns */
    float *z;       /* (rows, lines * LINE): x times the factors of columns; for what does not fit into `bits` */
    float *z_columns; /* the same of several rows, (rows / ROWS_AT_ONCE, lines * LINE, ROWS_AT_ONCE) */
    int8_t *x;      /* (rows, lines, digits, LINE) */
    float *scales;  /* (rows,): of one in the lowest digit */
    int32_t *sums;  /* (rows, digits): of all digits */
} Whole;

INLINE int64_t lines_of(const Layer *layer) { return (layer->n + LINE - 1) / LINE; }

INLINE const uint8_t *strip_of(const Layer *layer, int64_t strip) {
    return layer->index + strip * lines_of(layer) * LINE * layer->bits;
}

/* Where rest begins for each row (m + 1), its columns and its values. */
INLINE const int32_t *rest_of(const Layer *layer) {
    return (const int32_t *)strip_of(layer, (layer->m + STRIP - 1) / STRIP);
}

/* root[which] of each; GCC has a builtin for this, and clang makes the same of it. */
INLINE word8 chosen(word8 root, word8 which) {
#if defined(__clang__)
    word8 found;
    for (int l = 0; l < 8; l++) found[l] = root[which[l]];
    return found;
#else
    return __builtin_shuffle(root, which);
#endif
}

/* factors[j] = 2^((e_j - 128) / 8) for all n columns, as COLUMN_FACTORS has it; room for a multiple of 8 of them. */
INLINE void column_factors(const uint8_t *exponents, int64_t n, float *factors) {
    static const float roots[8] = {1.0f, 1.0905077326652577f, 1.189207115002721f, 1.2968395546510096f,
                                   1.4142135623730951f, 1.5422108254079407f, 1.681792830507429f, 1.8340080864093424f};
    word8 root;
    memcpy(&root, roots, sizeof root);
    for (int64_t j = 0; j < n; j += 8) {
        byte8 e = {0};
        if (j + 8 <= n) memcpy(&e, exponents + j, sizeof e);
        else memcpy(&e, exponents + j, n - j);
        const word8 wide = __builtin_convertvector(e, word8), power = (wide / 8 + 127 - 16) << 23;
        const vec8 line = (vec8)power * (vec8)chosen(root, wide & 7);
        memcpy(factors + j, &line, sizeof line);
    }
}

#define FACTORS(NAME, TARGET)                                                                                         \
    TARGET static void NAME(const uint8_t *exponents, int64_t n, float *factors) { column_factors(exponents, n, factors); }
FACTORS(factors_plain, )
#if defined(__x86_64__)
FACTORS(factors_avx2, AVX2)
#endif

/* Those of a layer. */
static void put_factors(const Layer *layer, float *factors, int level) {
#if defined(__x86_64__)
    if (level >= LEVEL_AVX2) {
        factors_avx2((const uint8_t *)layer->starts, layer->n, factors);
        return;
    }
#endif
    (void)level;
    factors_plain((const uint8_t *)layer->starts, layer->n, factors);
}

/* u of entry l of a line of row t of a strip, from the bytes of that line. */
INLINE int code_at(const uint8_t *p, int bits, int t, int l) {
    int u = 0, low = 0;
    if (bits == 8) return p[t * LINE + l];
    if (bits & 4) {
        u = p[t / 2 * LINE + l] >> 4 * (t % 2) & 15;
        p += STRIP / 2 * LINE, low = 4;
    }
    if (bits & 2) {
        u |= (p[t / 4 * LINE + l] >> 2 * (t % 4) & 3) << low;
        p += STRIP / 4 * LINE, low += 2;
    }
    if (bits & 1) u |= (p[l] >> t & 1) << low;
    return u;
}

/* The reverse, of a whole line of a strip. */
INLINE void put_line_of_codes(uint8_t *p, int bits, const uint8_t u[STRIP][LINE]) {
    int low = 0;
    if (bits == 8) {
        memcpy(p, u, STRIP * LINE);
        return;
    }
    if (bits & 4) {
        for (int t = 0; t < STRIP; t += 2, p += LINE)
            for (int l = 0; l < LINE; l++) p[l] = (uint8_t)((u[t][l] & 15) | u[t + 1][l] << 4);
        low = 4;
    }
    if (bits & 2) {
        for (int t = 0; t < STRIP; t += 4, p += LINE)
            for (int l = 0; l < LINE; l++)
                p[l] = (uint8_t)((u[t][l] >> low & 3) | (u[t + 1][l] >> low & 3) << 2 | (u[t + 2][l] >> low & 3) << 4 |
                                 (u[t + 3][l] >> low & 3) << 6);
        low += 2;
    }
    if (bits & 1)
        for (int l = 0; l < LINE; l++) {
            int line = 0;
            UNROLL for (int t = 0; t < STRIP; t++) line |= (u[t][l] >> low & 1) << t;
            p[l] = (uint8_t)line;
        }
}

/* z = x times the factors of the columns; the largest size of them, NaN where a number is none or infinite. */
INLINE float scaled_row(const Layer *layer, const void *x, int64_t k, const float *factors, float *z, int dtype) {
    const int64_t n = layer->n;
    vec wrong = {0};
    word16 sizes = {0}; /* of sizes, which are not negative, the larger one has the larger bits */
    float largest = 0;
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) {
        const vec line = load16(x, k * n + j, dtype) * load16(factors, j, FLOAT32);
        memcpy(z + j, &line, sizeof line);
        const word16 size = (word16)line & 0x7fffffff, more = (word16)(size > sizes);
        sizes = (size & more) | (sizes & ~more);
        wrong += line - line; /* zero, but for what is not finite */
    }
    for (; j < n; j++) {
        z[j] = get(x, k * n + j, dtype) * factors[j];
        largest = __builtin_fabsf(z[j]) > largest ? __builtin_fabsf(z[j]) : largest;
        wrong[0] += z[j] - z[j];
    }
    const vec found = (vec)sizes;
    for (int l = 0; l < 16; l++) largest = found[l] > largest ? found[l] : largest;
    return largest + sum16(wrong);
}

/* Whole numbers of z, in digits of 7 bits: `digits` lines of LINE bytes, the lowest first; their sums are added up. */
INLINE void digits_of_line(const float *z, float inverse, int digits, int8_t *to, int32_t *sums) {
    int32_t v[LINE];
    for (int l = 0; l < LINE; l++) v[l] = (int32_t)(z[l] * inverse + __builtin_copysignf(0.5f, z[l]));
    UNROLL for (int d = 0; d < digits; d++) {
        int32_t sum = 0;
        for (int l = 0; l < LINE; l++) {
            const int32_t higher = d + 1 < digits ? (v[l] + UNIT / 2) >> 7 : 0, digit = v[l] - higher * UNIT;
            to[d * LINE + l] = (int8_t)digit;
            sum += digit;
            v[l] = higher;
        }
        sums[d] += sum;
    }
}

/* Row k of x into digits; 1 where a number is none or infinite. */
INLINE int into_digits(const Layer *layer, const void *x, const Whole *w, int64_t k, int digits) {
    const int64_t n = layer->n;
    const float most = digits == 2 ? 16319.0f : 2088895.0f;
    float *z = w->z + k * w->lines * LINE;
    int8_t *to = w->x + k * w->lines * digits * LINE;
    int32_t *sums = w->sums + k * digits;
    const float largest = layer->dtype == BFLOAT16 ? scaled_row(layer, x, k, w->factors, z, BFLOAT16)
                                                   : scaled_row(layer, x, k, w->factors, z, FLOAT32);
    memset(sums, 0, digits * sizeof *sums);
    w->scales[k] = largest / most;
    if (!(largest <= 3.4e38f)) return 1; /* what comes of this row is not used */
    const float inverse = largest > 0 && most / largest < 3e38f ? most / largest : 0;
    memset(z + n, 0, (w->lines * LINE - n) * sizeof *z);
    for (int64_t line = 0; line < w->lines; line++, to += digits * LINE)
        digits_of_line(z + line * LINE, inverse, digits, to, sums);
    return 0;
}

#define DIGITS(NAME, TARGET)                                                                                          \
    TARGET static int NAME(const Layer *layer, const void *x, const Whole *w, int64_t k) {                            \
        return w->digits == 2 ? into_digits(layer, x, w, k, 2) : into_digits(layer, x, w, k, 3);                      \
    }
DIGITS(digits_plain, )
#if defined(__x86_64__)
DIGITS(digits_avx2, AVX2)
DIGITS(digits_avx512, AVX512)
#endif

/* A line of z_columns of one tile of rows. */
INLINE void turn_line(const Whole *w, int64_t tile, int64_t line) {
    const int64_t width = w->lines * LINE, k0 = tile * ROWS_AT_ONCE;
    const int64_t count = w->rows - k0 < ROWS_AT_ONCE ? w->rows - k0 : ROWS_AT_ONCE;
    const float *from = w->z + k0 * width + line * LINE;
    float *to = w->z_columns + k0 * width + line * LINE * ROWS_AT_ONCE;
    for (int j = 0; j < LINE; j++, to += ROWS_AT_ONCE)
        for (int64_t k = 0; k < ROWS_AT_ONCE; k++) to[k] = k < count ? from[k * width + j] : 0;
}

/* What the rest of a strip adds for rows k0 to k1 of x, a tile at most: (k1 - k0, STRIP). */
INLINE void rest_of_strip(const Layer *layer, const Whole *w, int64_t k0, int64_t k1, int64_t strip, float *more) {
    const int64_t i0 = strip * STRIP, count = layer->m - i0 < STRIP ? layer->m - i0 : STRIP, width = w->lines * LINE;
    const int32_t *starts = rest_of(layer), *columns = starts + layer->m + 1, *values = columns + layer->rest;
    memset(more, 0, (k1 - k0) * STRIP * sizeof *more);
    for (int64_t r = 0; r < count; r++) {
        if (w->rows == 1) {
            for (int32_t e = starts[i0 + r]; e < starts[i0 + r + 1]; e++) more[r] += (float)values[e] * w->z[columns[e]];
            continue;
        }
        vec8 low = {0}, high = {0};
        for (int32_t e = starts[i0 + r]; e < starts[i0 + r + 1]; e++) {
            const float *z = w->z_columns + k0 * width + (int64_t)columns[e] * ROWS_AT_ONCE;
            low += (float)values[e] * load8(z, 0, FLOAT32), high += (float)values[e] * load8(z, 8, FLOAT32);
        }
        for (int64_t k = 0; k < k1 - k0; k++) more[k * STRIP + r] = k < 8 ? low[k % 8] : high[k % 8];
    }
}

/* y[k] for the rows of a strip, from the products of its digits with u: (digits, STRIP), and what its rest adds. */
INLINE void put_strip(const Layer *layer, const Whole *w, const float *t, void *y, int64_t k, int64_t strip,
                      const int32_t *products, const float *rest, int dtype) {
    const int64_t i0 = strip * STRIP, count = layer->m - i0 < STRIP ? layer->m - i0 : STRIP;
    const int32_t offset = 1 << (layer->bits - 1);
    vec8 line = {0}, factors = {0}, more = {0};
    for (int d = w->digits - 1; d >= 0; d--) {
        whole8 product;
        memcpy(&product, products + d * STRIP, sizeof product);
        product -= offset * w->sums[k * w->digits + d];
        line = line * (float)UNIT + __builtin_convertvector(product, vec8);
    }
    line *= w->scales[k];
    if (layer->rest) line += load8(rest, 0, FLOAT32);
    if (count == STRIP) factors = load8(layer->values, i0, dtype);
    else
        for (int64_t r = 0; r < count; r++) factors[r] = get(layer->values, i0 + r, dtype);
    if (layer->rank || layer->bias)
        for (int64_t r = 0; r < count; r++) more[r] = low_rank(layer, i0 + r, t + k * padded_rank(layer), dtype);
    line = line * factors + more;
    if (count == STRIP) put_eight(y, k * layer->m + i0, line, dtype);
    else
        for (int64_t r = 0; r < count; r++) put(y, k * layer->m + i0 + r, line[r], dtype);
}

/* y[k0] to y[k1] for the rows of a strip, from its sums (k1 - k0, digits, STRIP). */
#define PUT(NAME, TARGET)                                                                                             \
    TARGET static void NAME(const Layer *layer, const Whole *w, const float *t, void *y, int64_t k0, int64_t k1,      \
                            int64_t strip, const int32_t *sums) {                                                     \
        float rest[ROWS_AT_ONCE * STRIP];                                                                             \
        if (layer->rest) rest_of_strip(layer, w, k0, k1, strip, rest);                                                \
        for (int64_t k = k0; k < k1; k++, sums += w->digits * STRIP) {                                                \
            const float *more = rest + (k - k0) * STRIP;                                                              \
            if (layer->dtype == BFLOAT16) put_strip(layer, w, t, y, k, strip, sums, more, BFLOAT16);                  \
            else put_strip(layer, w, t, y, k, strip, sums, more, FLOAT32);                                            \
        }                                                                                                             \
    }
PUT(put_plain, )
#if defined(__x86_64__)
PUT(put_avx2, AVX2)
PUT(put_avx512, AVX512)
#endif

/* --- one strip: sums (k, digits, STRIP) over u times each digit ----------------------------------------------------- */

/* Lines that the sums of two products stay within 16 bits for. */
#define FLUSH(bits) ((bits) == 7 ? 1 : (bits) == 6 ? 2 : (bits) == 5 ? 4 : 8)

static void strip_plain(const Layer *layer, const Whole *w, int64_t k0, int64_t k1, int64_t strip, int32_t *sums) {
    const uint8_t *p = strip_of(layer, strip);
    const int digits = w->digits, bits = (int)layer->bits;
    uint8_t u[LINE];
    memset(sums, 0, (k1 - k0) * STRIP * digits * sizeof *sums);
    for (int64_t line = 0; line < w->lines; line++, p += LINE * bits)
        for (int t = 0; t < STRIP; t++) {
            for (int l = 0; l < LINE; l++) u[l] = (uint8_t)code_at(p, bits, t, l);
            for (int64_t k = k0; k < k1; k++) {
                const int8_t *x = w->x + (k * w->lines + line) * digits * LINE;
                for (int d = 0; d < digits; d++) {
                    int32_t sum = 0;
                    for (int l = 0; l < LINE; l++) sum += u[l] * x[d * LINE + l];
                    sums[((k - k0) * digits + d) * STRIP + t] += sum;
                }
            }
        }
}

/* A function of each number of bits, for two digits and for three, of one that is inlined. */
#define STRIP_OF(WAY, TARGET, BITS)                                                                                   \
    TARGET static void WAY##_##BITS(const Layer *layer, const Whole *w, int64_t k0, int64_t k1, int64_t strip,        \
                                    int32_t *sums) {                                                                  \
        if (w->digits == 2) WAY(layer, w, k0, k1, strip, sums, BITS, 2);                                              \
        else WAY(layer, w, k0, k1, strip, sums, BITS, 3);                                                             \
    }
#define STRIPS(WAY, TARGET)                                                                                           \
    STRIP_OF(WAY, TARGET, 2) STRIP_OF(WAY, TARGET, 3) STRIP_OF(WAY, TARGET, 4) STRIP_OF(WAY, TARGET, 5)               \
    STRIP_OF(WAY, TARGET, 6) STRIP_OF(WAY, TARGET, 7) STRIP_OF(WAY, TARGET, 8)

#if defined(__x86_64__)
/* A line of row t; of 8 bits the lower or upper half. */
AVX2 INLINE __m256i code_line(const uint8_t *p, int bits, int t, int upper) {
    const __m256i *lines = (const __m256i *)p;
    __m256i u = _mm256_setzero_si256();
    int low = 0;
    if (bits == 8) {
        u = _mm256_loadu_si256(lines + t);
        return _mm256_and_si256(upper ? _mm256_srli_epi16(u, 4) : u, _mm256_set1_epi8(15));
    }
    if (bits & 4) {
        const __m256i line = _mm256_loadu_si256(lines + t / 2);
        u = _mm256_and_si256(t % 2 ? _mm256_srli_epi16(line, 4) : line, _mm256_set1_epi8(15));
        lines += STRIP / 2, low = 4;
    }
    if (bits & 2) {
        const __m256i line = _mm256_loadu_si256(lines + t / 4);
        const int by = low - 2 * (t % 4);
        const __m256i moved = by < 0 ? _mm256_srli_epi16(line, -by) : _mm256_slli_epi16(line, by);
        u = _mm256_or_si256(u, _mm256_and_si256(moved, _mm256_set1_epi8((char)(3 << low))));
        lines += STRIP / 4, low += 2;
    }
    if (bits & 1) {
        const __m256i line = _mm256_loadu_si256(lines);
        const int by = low - t;
        const __m256i moved = by < 0 ? _mm256_srli_epi16(line, -by) : _mm256_slli_epi16(line, by);
        u = _mm256_or_si256(u, _mm256_and_si256(moved, _mm256_set1_epi8((char)(1 << low))));
    }
    return u;
}

/* One row of x and some lines, at most BLOCK, added to acc (digits, STRIP). */
AVX2 INLINE void block_of_one(const uint8_t *p, const int8_t *x, int64_t lines, int bits, int digits,
                              __m256i acc[MOST_DIGITS][STRIP]) {
    const int flush = FLUSH(bits), halves = bits == 8 ? 2 : 1;
    UNROLL for (int t = 0; t < STRIP; t += 2) {
        UNROLL for (int half = 0; half < halves; half++) {
            const __m256i one = _mm256_set1_epi16(half ? 16 : 1);
            ROLLED for (int64_t from = 0; from < lines; from += flush) {
                const int64_t to = from + flush < lines ? from + flush : lines;
                __m256i sum[2][MOST_DIGITS];
                UNROLL for (int d = 0; d < digits; d++) sum[0][d] = sum[1][d] = _mm256_setzero_si256();
                ROLLED for (int64_t line = from; line < to; line++) {
                    const uint8_t *at = p + line * LINE * bits;
                    if (half == 0) /* each of the four passes asks for its part of what comes */
                        _mm_prefetch((const char *)p + 2 * AHEAD + (t / 2 * BLOCK + line) * STRIP * bits, _MM_HINT_T0);
                    const __m256i u = code_line(at, bits, t, half), v = code_line(at, bits, t + 1, half);
                    UNROLL for (int d = 0; d < digits; d++) {
                        const __m256i digit = _mm256_loadu_si256((const __m256i *)(x + (line * digits + d) * LINE));
                        sum[0][d] = _mm256_add_epi16(sum[0][d], _mm256_maddubs_epi16(u, digit));
                        sum[1][d] = _mm256_add_epi16(sum[1][d], _mm256_maddubs_epi16(v, digit));
                    }
                }
                UNROLL for (int d = 0; d < digits; d++) {
                    acc[d][t] = _mm256_add_epi32(acc[d][t], _mm256_madd_epi16(sum[0][d], one));
                    acc[d][t + 1] = _mm256_add_epi32(acc[d][t + 1], _mm256_madd_epi16(sum[1][d], one));
                }
            }
        }
    }
}

/* The same for one of several, from codes that were made bytes once for all, (STRIP, halves, BLOCK, LINE). */
AVX2 INLINE void block_of_some(const uint8_t *u, const int8_t *x, int64_t lines, int bits, int digits, __m256i *acc) {
    const int flush = FLUSH(bits), halves = bits == 8 ? 2 : 1;
    UNROLL for (int d = 0; d < digits; d++) {
        UNROLL for (int t = 0; t < STRIP; t += 4) {
            UNROLL for (int half = 0; half < halves; half++) {
                const __m256i one = _mm256_set1_epi16(half ? 16 : 1);
                ROLLED for (int64_t from = 0; from < lines; from += flush) {
                    const int64_t to = from + flush < lines ? from + flush : lines;
                    __m256i sum[4];
                    UNROLL for (int r = 0; r < 4; r++) sum[r] = _mm256_setzero_si256();
                    ROLLED for (int64_t line = from; line < to; line++) {
                        const __m256i digit = _mm256_loadu_si256((const __m256i *)(x + (line * digits + d) * LINE));
                        UNROLL for (int r = 0; r < 4; r++) {
                            const __m256i *codes = (const __m256i *)u + ((t + r) * halves + half) * BLOCK + line;
                            sum[r] = _mm256_add_epi16(sum[r], _mm256_maddubs_epi16(_mm256_load_si256(codes), digit));
                        }
                    }
                    UNROLL for (int r = 0; r < 4; r++) {
                        __m256i *total = acc + d * STRIP + t + r;
                        *total = _mm256_add_epi32(*total, _mm256_madd_epi16(sum[r], one));
                    }
                }
            }
        }
    }
}

/* The sum of each of eight vectors. */
AVX2 INLINE void put_sums(const __m256i v[STRIP], int32_t *sums) {
    const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    const __m256i sum = _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
    _mm256_storeu_si256((__m256i *)sums, sum);
}

AVX2 INLINE void strip_avx2(const Layer *layer, const Whole *w, int64_t k0, int64_t k1, int64_t strip, int32_t *sums,
                            int bits, int digits) {
    const uint8_t *p = strip_of(layer, strip);
    const int64_t lines = w->lines, rows = k1 - k0;
    if (rows == 1) {
        __m256i acc[MOST_DIGITS][STRIP];
        UNROLL for (int t = 0; t < STRIP; t++)
            UNROLL for (int d = 0; d < digits; d++) acc[d][t] = _mm256_setzero_si256();
        const int8_t *x = w->x + k0 * lines * digits * LINE;
        for (int64_t line = 0; line < lines; line += BLOCK) {
            const int64_t some = lines - line < BLOCK ? lines - line : BLOCK;
            block_of_one(p + line * LINE * bits, x + line * digits * LINE, some, bits, digits, acc);
        }
        for (int d = 0; d < digits; d++) put_sums(acc[d], sums + d * STRIP);
        return;
    }
    enum { MOST_ACC = ROWS_AT_ONCE * STRIP * MOST_DIGITS };
    __m256i acc[MOST_ACC], u[STRIP * 2 * BLOCK];
    const int halves = bits == 8 ? 2 : 1;
    for (int64_t e = 0; e < rows * STRIP * digits; e++) acc[e] = _mm256_setzero_si256();
    for (int64_t line = 0; line < lines; line += BLOCK) {
        const int64_t some = lines - line < BLOCK ? lines - line : BLOCK;
        for (int64_t l = 0; l < some; l++)
            UNROLL for (int t = 0; t < STRIP; t++)
                UNROLL for (int half = 0; half < halves; half++)
                    u[(t * halves + half) * BLOCK + l] = code_line(p + (line + l) * LINE * bits, bits, t, half);
        for (int64_t k = 0; k < rows; k++) {
            const int8_t *x = w->x + ((k0 + k) * lines + line) * digits * LINE;
            block_of_some((uint8_t *)u, x, some, bits, digits, acc + k * STRIP * digits);
        }
    }
    for (int64_t e = 0; e < rows * digits; e++) put_sums(acc + e * STRIP, sums + e * STRIP);
}

STRIPS(strip_avx2, AVX2)
#endif

#include "codes_vnni.h"
#include "codes_neon.h"

typedef void Strip(const Layer *, const Whole *, int64_t, int64_t, int64_t, int32_t *);

static Strip *strip_way(const Layer *layer, int level) {
#if defined(__x86_64__)
    static Strip *const avx2[] = {strip_avx2_2, strip_avx2_3, strip_avx2_4, strip_avx2_5, strip_avx2_6, strip_avx2_7, strip_avx2_8};
    static Strip *const vnni[] = {strip_vnni_2, strip_vnni_3, strip_vnni_4, strip_vnni_5, strip_vnni_6, strip_vnni_7, strip_vnni_8};
    if (level >= LEVEL_AVX512) return vnni[layer->bits - 2];
    if (level >= LEVEL_AVX2) return avx2[layer->bits - 2];
#elif defined(__aarch64__)
    static Strip *const neon[] = {strip_neon_2, strip_neon_3, strip_neon_4, strip_neon_5, strip_neon_6, strip_neon_7, strip_neon_8};
#if !defined(NO_DOT)
    static Strip *const dot[] = {strip_dot_2, strip_dot_3, strip_dot_4, strip_dot_5, strip_dot_6, strip_dot_7, strip_dot_8};
    if (level >= LEVEL_DOT) return dot[layer->bits - 2];
#endif
    return neon[layer->bits - 2];
#endif
    (void)layer, (void)level;
    return strip_plain; /* where there is nothing better */
}

/* What one product needs beside the layer, in one piece of memory. */
typedef struct {
    const Layer *layer;
    Whole w;
    float *t; /* (rows, rank padded): V x */
    int shared; /* the digits are those of the layer before it */
    int64_t step; /* strips that a thread takes at a time */
} Coded;

/* y[l] (rows, m) = x (rows, n) (U V + S)ᵀ + bias for each of some layers that read the same x, at most TOGETHER, with x
   in 2 or 3 digits. Layers whose columns have the same factors share the digits. Returns 0; 1 if there was no memory; 3
   where x holds a number that is none or infinite. */
enum { TOGETHER = 3 };

static int coded_together(const Layer *const *layers, void *const *y, int count, const void *x, int64_t rows, int digits,
                          int threads, int level) {
    const int64_t n = layers[0]->n, lines = lines_of(layers[0]), width = lines * LINE;
    const int64_t tiles = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    int (*into)(const Layer *, const void *, const Whole *, int64_t) = digits_plain;
    void (*put_them)(const Layer *, const Whole *, const float *, void *, int64_t, int64_t, int64_t, const int32_t *) = put_plain;
#if defined(__x86_64__)
    if (level >= LEVEL_AVX512) into = digits_avx512, put_them = put_avx512;
    else if (level >= LEVEL_AVX2) into = digits_avx2, put_them = put_avx2;
#endif
    Coded parts[TOGETHER];
    char *memory[TOGETHER] = {NULL};
    int64_t chunks[TOGETHER + 1] = {0}; /* where those of each layer begin */
    int wrong = 0, failed = 0, with_rest = 0;
    for (int l = 0; l < count; l++) with_rest |= layers[l]->rest > 0;
    for (int l = 0; l < count; l++) {
        const Layer *layer = layers[l];
        Coded *part = parts + l;
        const int shared = l > 0 && memcmp(layer->starts, layers[l - 1]->starts, n) == 0;
        const int64_t own = !shared;
        const int64_t sizes[] = {own * width * 4, own * rows * width * 4, own * rows * width * digits, own * rows * 4,
                                 own * rows * digits * 4, (rows * padded_rank(layer) + 1) * 4,
                                 own * with_rest * (rows > 1) * tiles * ROWS_AT_ONCE * width * 4};
        int64_t total = 0, from[7];
        for (int k = 0; k < 7; k++) from[k] = total, total += (sizes[k] + 63) / 64 * 64;
        char *at = memory[l] = aligned_alloc(64, total);
        if (at == NULL) {
            failed = 1;
            break;
        }
        part->layer = layer, part->shared = shared, part->t = memset(at + from[5], 0, sizes[5]);
        part->w = shared ? part[-1].w
                         : (Whole){rows, lines, digits, (float *)at, (float *)(at + from[1]), (float *)(at + from[6]),
                                   (int8_t *)at + from[2], (float *)(at + from[3]), (int32_t *)(at + from[4])};
        if (!shared) put_factors(layer, part->w.factors, level);
        /* Few and long: what is asked for ahead of a chunk's end another thread reads. */
        const int64_t strips = (layer->m + STRIP - 1) / STRIP, fair = (strips + 3 * threads - 1) / (3 * threads);
        part->step = rows > ROWS_AT_ONCE && fair > 16 ? 16 : fair;
        chunks[l + 1] = chunks[l] + (strips + part->step - 1) / part->step;
    }
    if (!failed)
#pragma omp parallel num_threads(threads) reduction(| : wrong)
    {
        for (int l = 0; l < count; l++) {
            const Coded *part = parts + l;
            if (!part->shared) {
#pragma omp for schedule(static) nowait
                for (int64_t k = 0; k < rows; k++) wrong |= into(part->layer, x, &part->w, k);
            }
#pragma omp for schedule(static) nowait
            for (int64_t r = 0; r < part->layer->rank; r++) project(part->layer, x, part->t, rows, r, level);
        }
#pragma omp barrier
        for (int l = 0; l < count && rows > 1; l++)
            if (!parts[l].shared && with_rest) {
#pragma omp for schedule(static)
                for (int64_t e = 0; e < tiles * lines; e++) turn_line(&parts[l].w, e / lines, e % lines);
            }
        int32_t sums[ROWS_AT_ONCE * STRIP * MOST_DIGITS];
#pragma omp for schedule(dynamic)
        for (int64_t chunk = 0; chunk < chunks[count]; chunk++) {
            int l = 0;
            while (chunk >= chunks[l + 1]) l++;
            const Coded *part = parts + l;
            const Layer *layer = part->layer;
            Strip *way = strip_way(layer, level);
            const int64_t strips = (layer->m + STRIP - 1) / STRIP, first = (chunk - chunks[l]) * part->step;
            const int64_t last = first + part->step < strips ? first + part->step : strips;
            for (int64_t tile = 0; tile < tiles; tile++) {
                const int64_t k0 = tile * ROWS_AT_ONCE, k1 = k0 + ROWS_AT_ONCE < rows ? k0 + ROWS_AT_ONCE : rows;
                for (int64_t strip = first; strip < last; strip++) {
                    way(layer, &part->w, k0, k1, strip, sums);
                    put_them(layer, &part->w, part->t, y[l], k0, k1, strip, sums);
                }
            }
        }
    }
    for (int l = 0; l < count; l++) free(memory[l]);
    return failed ? 1 : wrong ? 3 : 0;
}

int losparse_coded(const Layer *layer, const void *x, void *y, int64_t rows, int digits, int threads, int level) {
    return coded_together(&layer, &y, 1, x, rows, digits, threads, level);
}

/* --- codes into bits and back --------------------------------------------------------------------------- */

INLINE int32_t whole_at(const void *codes, int64_t i, int width) {
    return width == 1 ? ((const int8_t *)codes)[i] : width == 2 ? ((const int16_t *)codes)[i] : ((const int32_t *)codes)[i];
}

INLINE int bits_of(int32_t q) {
    const uint32_t size = (uint32_t)(q < 0 ? ~q : q);
    return size ? 33 - __builtin_clz(size) : 1;
}

/* counts[b]: codes that take b bits, 1 to 8, and at 0 those that take more. */
int losparse_code_bits(const void *codes, int64_t count, int width, int64_t *counts, int threads) {
    memset(counts, 0, 9 * sizeof *counts);
#pragma omp parallel num_threads(threads)
    {
        int64_t bytes[4][256] = {{0}}, mine[33] = {0}; /* four, or each would wait for the one before */
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < count / 4; i++)
            for (int k = 0; k < 4; k++) {
                if (width == 1) bytes[k][((const uint8_t *)codes)[4 * i + k]]++;
                else mine[bits_of(whole_at(codes, 4 * i + k, width))]++;
            }
        for (int q = 0; q < 256; q++)
            for (int k = 0; k < 4; k++) mine[bits_of((int8_t)q)] += bytes[k][q];
#pragma omp critical
        for (int b = 1; b <= 32; b++) counts[b > 8 ? 0 : b] += mine[b];
    }
    for (int64_t i = count / 4 * 4; i < count; i++) {
        const int b = bits_of(whole_at(codes, i, width));
        counts[b > 8 ? 0 : b]++;
    }
    return 0;
}

INLINE int32_t clipped(int32_t q, int bits) {
    const int32_t half = 1 << (bits - 1);
    return q < -half ? -half : q >= half ? half - 1 : q;
}

/* Some codes as u, clipped; how many were. */
INLINE int32_t line_of_codes(const void *codes, int64_t i, int64_t count, int width, int bits, uint8_t *u) {
    const int32_t half = 1 << (bits - 1);
    int32_t unfit = 0;
    for (int64_t l = 0; l < count; l++) {
        const int32_t q = whole_at(codes, i + l, width), fits = clipped(q, bits);
        unfit += q != fits;
        u[l] = (uint8_t)(fits + half);
    }
    return unfit;
}

/* A strip of codes; found: how many of each row do not fit. */
INLINE void pack_strip(const Layer *layer, const void *codes, int width, int bits, int64_t strip, int32_t *found) {
    const int64_t m = layer->m, n = layer->n;
    uint8_t *p = (uint8_t *)strip_of(layer, strip), u[STRIP][LINE];
    memset(u, 1 << (bits - 1), sizeof u);
    for (int64_t j = 0; j < n; j += LINE, p += LINE * bits) {
        const int64_t count = n - j < LINE ? n - j : LINE;
        if (count < LINE) memset(u, 1 << (bits - 1), sizeof u);
        for (int t = 0; t < STRIP && strip * STRIP + t < m; t++) {
            const int64_t at = (strip * STRIP + t) * n + j;
            found[t] += count == LINE ? line_of_codes(codes, at, LINE, width, bits, u[t])
                                      : line_of_codes(codes, at, count, width, bits, u[t]);
        }
        put_line_of_codes(p, bits, (const uint8_t(*)[LINE])u);
    }
}

typedef void Pack(const Layer *, const void *, int, int64_t, int32_t *);
#define PACK(NAME, TARGET)                                                                                            \
    TARGET static void NAME(const Layer *layer, const void *codes, int width, int64_t strip, int32_t *found) {        \
        if (width == 1 && layer->bits == 4) pack_strip(layer, codes, 1, 4, strip, found); /* the usual */             \
        else if (width == 1) pack_strip(layer, codes, 1, (int)layer->bits, strip, found);                             \
        else if (width == 2) pack_strip(layer, codes, 2, (int)layer->bits, strip, found);                             \
        else pack_strip(layer, codes, 4, (int)layer->bits, strip, found);                                             \
    }
PACK(pack_plain, )
#if defined(__x86_64__)
PACK(pack_avx2, AVX2)
#endif

/* Fresh memory, of which nothing is resident yet; `size` bytes of it, `begin` bytes behind its beginning, in pages of 2 MiB
   where one fits: reading through them misses fewer. What lay in these bytes is lost. */
int losparse_large_pages(void *memory, int64_t bytes, int64_t begin, int64_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t small = 4095, large = ((uintptr_t)1 << 21) - 1, from = (uintptr_t)memory, to = from + (uintptr_t)bytes;
    const uintptr_t first = (from + small) & ~small, last = to & ~small;
    if (last > first) madvise((void *)first, last - first, MADV_DONTNEED);
    const uintptr_t inner = (from + (uintptr_t)begin + large) & ~large, outer = (from + (uintptr_t)(begin + size)) & ~large;
    if (outer > inner) madvise((void *)inner, outer - inner, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes, (void)begin, (void)size;
#endif
    return 0;
}

/* Codes (m, n) into the layer's index, whose rest has room for what does not fit. Returns 0; 1 if that is another number
   than the layer says. */
int losparse_pack_codes(const Layer *layer, const void *codes, int width, int threads, int level) {
    const int64_t m = layer->m, n = layer->n;
    const int bits = (int)layer->bits;
    (void)level;
    int32_t *starts = layer->rest ? (int32_t *)rest_of(layer) : NULL;
    int64_t unfit = 0;
    Pack *pack = pack_plain;
#if defined(__x86_64__)
    if (level >= LEVEL_AVX2) pack = pack_avx2;
#endif
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : unfit)
    for (int64_t strip = 0; strip < (m + STRIP - 1) / STRIP; strip++) {
        int32_t found[STRIP] = {0};
        pack(layer, codes, width, strip, found);
        for (int t = 0; t < STRIP; t++) {
            unfit += found[t];
            if (starts && strip * STRIP + t < m) starts[strip * STRIP + t + 1] = found[t];
        }
    }
    if (unfit != layer->rest) return 1;
    if (!starts) return 0;
    int32_t *columns = starts + m + 1, *values = columns + layer->rest;
    starts[0] = 0;
    for (int64_t i = 0; i < m; i++) starts[i + 1] += starts[i];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < m; i++) {
        int32_t r = starts[i];
        for (int64_t j = 0; r < starts[i + 1]; j++) {
            const int32_t q = whole_at(codes, i * n + j, width), fits = clipped(q, bits);
            if (q == fits) continue;
            columns[r] = (int32_t)j;
            values[r++] = q - fits;
        }
    }
    return 0;
}

/* --- rows of codes -------------------------------------------------------------------------------------- */

enum { WHOLE = 2 }; /* beside BFLOAT16 and FLOAT32: codes as int32 */

/* u of a line of row t, which is not known beforehand. */
INLINE void line_of_row(const uint8_t *p, int bits, int t, uint8_t u[LINE]) {
    int low = 0;
    if (bits == 8) {
        memcpy(u, p + t * LINE, LINE);
        return;
    }
    memset(u, 0, LINE);
    for (int part = 4; part; part /= 2) {
        if (!(bits & part)) continue;
        const uint8_t *line = p + t * part / 8 * LINE;
        const int by = t * part % 8, mask = (1 << part) - 1;
        for (int l = 0; l < LINE; l++) u[l] |= (uint8_t)((line[l] >> by & mask) << low);
        p += part * LINE, low += part;
    }
}

/* out[j..j + count] = q, times factors a where there are such, rounded as in shim/operator.py. */
INLINE void put_numbers(void *out, int64_t j, const int32_t *q, int count, const float *factors, float a, int kind) {
    float line[LINE];
    if (kind == WHOLE) {
        memcpy((int32_t *)out + j, q, count * sizeof *q);
        return;
    }
    for (int l = 0; l < count; l++) line[l] = factors ? (float)q[l] * factors[j + l] * a : (float)q[l];
    if (kind == FLOAT32) {
        memcpy((float *)out + j, line, count * sizeof *line);
    } else {
        put_line(out, j, line, count, BFLOAT16);
    }
}

/* Row i from column `from` on, at the beginning of a line. */
INLINE void row_of_codes(const Layer *layer, int64_t i, int64_t from, const float *factors, void *out, int kind) {
    const uint8_t *p = strip_of(layer, i / STRIP) + from * layer->bits;
    const int bits = (int)layer->bits, t = (int)(i % STRIP), offset = 1 << (bits - 1);
    const float a = factors ? get(layer->values, i, layer->dtype) : 1;
    for (int64_t j = from; j < layer->n; j += LINE, p += LINE * bits) {
        uint8_t u[LINE];
        int32_t q[LINE];
        line_of_row(p, bits, t, u);
        for (int l = 0; l < LINE; l++) q[l] = u[l] - offset;
        if (j + LINE <= layer->n) put_numbers(out, j, q, LINE, factors, a, kind);
        else put_numbers(out, j, q, (int)(layer->n - j), factors, a, kind);
    }
    if (!layer->rest) return;
    const int32_t *starts = rest_of(layer), *columns = starts + layer->m + 1, *values = columns + layer->rest;
    for (int32_t r = starts[i]; r < starts[i + 1]; r++) { /* what was clipped stands at one end of the range */
        const int32_t q = values[r] + (values[r] < 0 ? -offset : offset - 1);
        put_numbers(out, columns[r], &q, 1, factors, a, kind);
    }
}

typedef void Row(const Layer *, int64_t, const float *, void *, int);
#define ROW(NAME, TARGET, BEFORE)                                                                                     \
    TARGET static void NAME(const Layer *layer, int64_t i, const float *factors, void *out, int kind) {               \
        if (kind == WHOLE) row_of_codes(layer, i, 0, NULL, out, WHOLE);                                               \
        else if (kind == BFLOAT16 && factors) row_of_codes(layer, i, 0, factors, out, BFLOAT16);                      \
        else if (kind == BFLOAT16) row_of_codes(layer, i, BEFORE, NULL, out, BFLOAT16);                               \
        else if (factors) row_of_codes(layer, i, 0, factors, out, FLOAT32);                                           \
        else row_of_codes(layer, i, 0, NULL, out, FLOAT32);                                                           \
    }
ROW(row_plain, , 0)
#if defined(__x86_64__)
ROW(row_avx2, AVX2, 0)
ROW(row_avx512, AVX512, layer->bits <= 6 ? numbers_of_row_avx512(layer, i, out) : 0)
#endif

INLINE void scale_row(const Layer *layer, const void *x, int64_t k, const float *factors, void *out, int from, int to) {
    const int64_t n = layer->n;
    int64_t j = 0;
    for (; j + 8 <= n; j += 8) put_eight(out, k * n + j, load8(x, k * n + j, from) * load8(factors, j, FLOAT32), to);
    for (; j < n; j++) put(out, k * n + j, get(x, k * n + j, from) * factors[j], to);
}

#define SCALE(NAME, TARGET)                                                                                           \
    TARGET static void NAME(const Layer *layer, const void *x, int64_t k, const float *factors, void *out, int to) {  \
        if (layer->dtype == FLOAT32) scale_row(layer, x, k, factors, out, FLOAT32, FLOAT32);                          \
        else if (to == FLOAT32) scale_row(layer, x, k, factors, out, BFLOAT16, FLOAT32);                              \
        else scale_row(layer, x, k, factors, out, BFLOAT16, BFLOAT16);                                                \
    }
SCALE(scale_plain, )
#if defined(__x86_64__)
SCALE(scale_avx2, AVX2)
SCALE(scale_avx512, AVX512)
#endif

/* The factors of all columns, or NULL. */
static float *factors_of(const Layer *layer, int level) {
    float *factors = malloc((layer->n + 7) / 8 * 8 * sizeof *factors);
    if (factors) put_factors(layer, factors, level);
    return factors;
}

/* out (rows, n) = x times the factors of the columns; `to`: BFLOAT16, or FLOAT32 of any x. Returns 0; 1 if there was no
   memory. */
int losparse_scale(const Layer *layer, const void *x, int64_t rows, int to, void *out, int threads, int level) {
    void (*scale)(const Layer *, const void *, int64_t, const float *, void *, int) = scale_plain;
#if defined(__x86_64__)
    if (level >= LEVEL_AVX512) scale = scale_avx512;
    else if (level >= LEVEL_AVX2) scale = scale_avx2;
#endif
    float *factors = factors_of(layer, level);
    if (factors == NULL) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < rows; k++) scale(layer, x, k, factors, out, to);
    free(factors);
    return 0;
}

/* Some rows of S, dense (count, n): those numbered in `rows`, or from `first` on where that is NULL; kind: BFLOAT16,
   FLOAT32 or WHOLE. Without their factors where they are not to be scaled. Returns 0; 1 if there was no memory. */
int losparse_rows_of_codes(const Layer *layer, const int64_t *rows, int64_t first, int64_t count, int kind, int scaled,
                           void *out, int threads, int level) {
    const int64_t n = layer->n, size = kind == BFLOAT16 ? 2 : 4;
    float *factors = NULL;
    Row *row = row_plain;
#if defined(__x86_64__)
    if (level >= LEVEL_AVX512) row = row_avx512;
    else if (level >= LEVEL_AVX2) row = row_avx2;
#endif
    (void)level;
    if (scaled && kind != WHOLE) {
        factors = factors_of(layer, level);
        if (factors == NULL) return 1;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < count; k++)
        row(layer, rows ? rows[k] : first + k, factors, (char *)out + k * n * size, kind);
    free(factors);
    return 0;
}
