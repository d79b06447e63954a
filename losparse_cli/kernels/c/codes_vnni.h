/* Products of a strip of codes (codes.h) with AVX-512 and VNNI: 64 bytes times bytes are summed up, four by four, straight
   into 32 bits, so that nothing overflows and a strip passes once. A register holds two rows of a line, `pair` of eight:
   rows t and t + 2 for codes cut into 4, 2 and 1 bits, because the 4 bits lie so; t and t + 1 for those of 8 bits. */

#if defined(__x86_64__)
enum { PAIRS = STRIP / 2, LINES_AT_ONCE = 32 };

/* The rows of a pair. */
INLINE int first_of_pair(int bits, int pair) { return bits == 8 ? 2 * pair : pair / 2 * 4 + pair % 2; }
INLINE int second_of_pair(int bits, int pair) { return first_of_pair(bits, pair) + (bits == 8 ? 1 : 2); }

AVX512 INLINE __m512i twice(const void *line) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)line));
}

/* Bytes of both halves turned left by so many bits: what leaves a byte is masked away by whoever asks. */
AVX512 INLINE __m512i turned(__m512i v, int lower, int upper) {
    if (lower == 0 && upper == 0) return v;
    const long long low = (lower & 31) * 0x100000001ll, up = (upper & 31) * 0x100000001ll;
    return _mm512_rolv_epi32(v, _mm512_set_epi64(up, up, up, up, low, low, low, low));
}

/* u of all pairs of a line. */
AVX512 INLINE void pairs_of_line(const uint8_t *p, int bits, __m512i u[PAIRS]) {
    int low = 0;
    if (bits == 8) {
        UNROLL for (int pair = 0; pair < PAIRS; pair++) u[pair] = _mm512_loadu_si512(p + 2 * pair * LINE);
        return;
    }
    UNROLL for (int pair = 0; pair < PAIRS; pair++) u[pair] = _mm512_setzero_si512();
    if (bits & 4) {
        const __m512i mask = _mm512_set1_epi8(15);
        UNROLL for (int pair = 0; pair < PAIRS; pair += 2) {
            const __m512i line = _mm512_loadu_si512(p + pair * LINE);
            u[pair] = _mm512_and_si512(line, mask);
            u[pair + 1] = _mm512_and_si512(_mm512_srli_epi16(line, 4), mask);
        }
        p += STRIP / 2 * LINE, low = 4;
    }
    if (bits & 2) {
        const __m512i mask = _mm512_set1_epi8((char)(3 << low));
        UNROLL for (int pair = 0; pair < PAIRS; pair++) {
            const int r = first_of_pair(bits, pair), s = second_of_pair(bits, pair);
            const __m512i line = turned(twice(p + r / 4 * LINE), low - 2 * (r % 4), low - 2 * (s % 4));
            u[pair] = low ? _mm512_ternarylogic_epi64(line, mask, u[pair], 0xea) : _mm512_and_si512(line, mask);
        }
        p += STRIP / 4 * LINE, low += 2;
    }
    if (bits & 1) {
        const __m512i mask = _mm512_set1_epi8((char)(1 << low)), line = twice(p);
        UNROLL for (int pair = 0; pair < PAIRS; pair++) {
            const int r = first_of_pair(bits, pair), s = second_of_pair(bits, pair);
            u[pair] = _mm512_ternarylogic_epi64(turned(line, low - r, low - s), mask, u[pair], 0xea); /* line & mask | u */
        }
    }
}

/* Sums (digits, STRIP) of a row of x from those of pairs. */
AVX512 INLINE void put_pairs(const __m512i *acc, int bits, int digits, int32_t *sums) {
    /* Which number of which row: those of the first rows of all pairs stand first. */
    const __m256i places = bits == 8 ? _mm256_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11) : _mm256_setr_epi32(0, 1, 8, 9, 2, 3, 10, 11);
    UNROLL for (int d = 0; d < digits; d++, acc += PAIRS) {
        __m512i two[2];
        UNROLL for (int k = 0; k < 2; k++)
            two[k] = _mm512_add_epi32(_mm512_unpacklo_epi32(acc[2 * k], acc[2 * k + 1]),
                                      _mm512_unpackhi_epi32(acc[2 * k], acc[2 * k + 1]));
        const __m512i four = _mm512_add_epi32(_mm512_unpacklo_epi64(two[0], two[1]), _mm512_unpackhi_epi64(two[0], two[1]));
        const __m512i all = _mm512_add_epi32(four, _mm512_shuffle_i64x2(four, four, 0xb1)); /* the other quarter of each half */
        const __m512i placed = _mm512_permutexvar_epi32(_mm512_castsi256_si512(places), all);
        _mm256_storeu_si256((__m256i *)(sums + d * STRIP), _mm512_castsi512_si256(placed));
    }
}

/* A line of codes times as many rows of x as have room in registers, the first at x, each `next` bytes behind the last. */
AVX512 INLINE void add_line(const __m512i u[PAIRS], const int8_t *x, int64_t next, int rows, int digits, __m512i *sums) {
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int d = 0; d < digits; d++) {
            const __m512i digit = twice(x + r * next + d * LINE);
            UNROLL for (int pair = 0; pair < PAIRS; pair++) {
                __m512i *sum = sums + (r * digits + d) * PAIRS + pair;
                *sum = _mm512_dpbusd_epi32(*sum, u[pair], digit);
            }
        }
}

/* A strip for one or two rows of x, whose codes never leave registers. */
AVX512 INLINE void strip_at_once(const uint8_t *p, const Whole *w, int64_t k, int rows, int bits, int digits, int32_t *to) {
    const int64_t next = w->lines * digits * LINE;
    const int8_t *x = w->x + k * next;
    __m512i sums[2 * MOST_DIGITS * PAIRS], u[PAIRS];
    UNROLL for (int e = 0; e < rows * digits * PAIRS; e++) sums[e] = _mm512_setzero_si512();
    ROLLED for (int64_t line = 0; line < w->lines; line++, p += LINE * bits, x += digits * LINE) {
        UNROLL for (int part = 0; part < bits * LINE; part += 64)
            _mm_prefetch((const char *)p + 4 * AHEAD + part, _MM_HINT_T0);
        pairs_of_line(p, bits, u);
        add_line(u, x, next, rows, digits, sums);
    }
    UNROLL for (int r = 0; r < rows; r++) put_pairs(sums + r * digits * PAIRS, bits, digits, to + r * digits * STRIP);
}

/* Some lines, made bytes before, for one or two rows of x from k on: added to what came of the lines before, which lies in
   acc; after the last the sums go where they belong. */
AVX512 INLINE void add_lines(const __m512i u[][PAIRS], const Whole *w, int64_t k, int64_t line, int64_t lines, int rows,
                             int bits, int digits, __m512i *acc, int32_t *to) {
    const int64_t next = w->lines * digits * LINE;
    const int8_t *x = w->x + k * next + line * digits * LINE;
    __m512i sums[2 * MOST_DIGITS * PAIRS];
    UNROLL for (int e = 0; e < rows * digits * PAIRS; e++) sums[e] = line ? acc[e] : _mm512_setzero_si512();
    ROLLED for (int64_t l = 0; l < lines; l++, x += digits * LINE) add_line(u[l], x, next, rows, digits, sums);
    if (line + lines < w->lines) {
        UNROLL for (int e = 0; e < rows * digits * PAIRS; e++) acc[e] = sums[e];
        return;
    }
    UNROLL for (int r = 0; r < rows; r++) put_pairs(sums + r * digits * PAIRS, bits, digits, to + r * digits * STRIP);
}

AVX512 INLINE void strip_vnni(const Layer *layer, const Whole *w, int64_t k0, int64_t k1, int64_t strip, int32_t *sums,
                              int bits, int digits) {
    const uint8_t *p = strip_of(layer, strip);
    const int64_t lines = w->lines, rows = k1 - k0;
    if (rows == 1) {
        strip_at_once(p, w, k0, 1, bits, digits, sums);
        return;
    }
    if (rows == 2) {
        strip_at_once(p, w, k0, 2, bits, digits, sums);
        return;
    }
    __m512i acc[ROWS_AT_ONCE * MOST_DIGITS * PAIRS], u[LINES_AT_ONCE][PAIRS];
    for (int64_t line = 0; line < lines; line += LINES_AT_ONCE) {
        const int64_t some = lines - line < LINES_AT_ONCE ? lines - line : LINES_AT_ONCE;
        for (int64_t l = 0; l < some; l++, p += LINE * bits) {
            UNROLL for (int part = 0; part < bits * LINE; part += 64) /* those that are next, or of the strip that is */
                _mm_prefetch((const char *)p + LINES_AT_ONCE * LINE * bits + part, _MM_HINT_T0);
            pairs_of_line(p, bits, u[l]);
        }
        int64_t k = 0;
        for (; k + 2 <= rows; k += 2)
            add_lines(u, w, k0 + k, line, some, 2, bits, digits, acc + k * digits * PAIRS, sums + k * digits * STRIP);
        if (k < rows)
            add_lines(u, w, k0 + k, line, some, 1, bits, digits, acc + k * digits * PAIRS, sums + k * digits * STRIP);
    }
}

STRIPS(strip_vnni, AVX512)

/* Codes of row i in at most 6 bits as numbers of bfloat16, of whole lines alone: looked up in a table of two registers.
   What does not fit is not in them. Returns where the columns begin that are left. With `line_of_row` in place of the
   instructions written out here it takes three to six times as long. */
AVX512 static int64_t numbers_of_row_avx512(const Layer *layer, int64_t i, uint16_t *row) {
    const uint8_t *p = strip_of(layer, i / STRIP);
    const int bits = (int)layer->bits, t = (int)(i % STRIP), offset = 1 << (bits - 1);
    const __m512i counted = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m256i part[4];
    UNROLL for (int k = 0; k < 4; k++) {
        const __m512 q = _mm512_cvtepi32_ps(_mm512_add_epi32(counted, _mm512_set1_epi32(16 * k - offset)));
        part[k] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(q), 16)); /* exact */
    }
    const __m512i low_half = _mm512_inserti64x4(_mm512_castsi256_si512(part[0]), part[1], 1);
    const __m512i high_half = _mm512_inserti64x4(_mm512_castsi256_si512(part[2]), part[3], 1);
    int64_t j = 0;
    for (; j + LINE <= layer->n; j += LINE) {
        __m256i u = _mm256_setzero_si256();
        int low = 0;
        UNROLL for (int width = 4; width; width /= 2) {
            if (!(bits & width)) continue;
            const __m256i line = _mm256_loadu_si256((const __m256i *)(p + t * width / 8 * LINE));
            const __m256i moved = _mm256_srl_epi16(line, _mm_cvtsi32_si128(t * width % 8));
            const __m256i cut = _mm256_and_si256(moved, _mm256_set1_epi8((char)((1 << width) - 1)));
            u = _mm256_or_si256(u, _mm256_sll_epi16(cut, _mm_cvtsi32_si128(low)));
            p += width * LINE, low += width;
        }
        const __m512i at = _mm512_cvtepu8_epi16(u);
        _mm512_storeu_si512(row + j, _mm512_permutex2var_epi16(low_half, at, high_half));
    }
    return j;
}
#endif
