/* Products of a strip of codes (codes.h) on ARM: NEON, which all of 64 bits have, and its products of bytes that are
   summed up four by four into 32 bits, which those since Armv8.2 have that people meet (Apple's, Graviton2). Codes of 8
   bits lie as u, and are multiplied as q, so that all are bytes with a sign. */

#if defined(__aarch64__)
#include <arm_neon.h>

#if defined(__ARM_FEATURE_DOTPROD)
#define DOT
#else /* with what the rest may be compiled for, or it could not be inlined */
#define DOT __attribute__((target("arch=armv8.2-a+dotprod+fp16+crypto+rcpc")))
#endif

/* sum + a b, four by four. Two products fit into 16 bits, as digits are no larger than 127. */
INLINE int32x4_t add_neon(int32x4_t sum, int8x16_t a, int8x16_t b) {
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    return vpadalq_s16(sum, vmlal_s8(low, vget_high_s8(a), vget_high_s8(b)));
}

#if !defined(NO_DOT)
DOT INLINE int32x4_t add_dot(int32x4_t sum, int8x16_t a, int8x16_t b) { return vdotq_s32(sum, a, b); }
#endif

INLINE uint8x16_t shifted(uint8x16_t v, int by) { return vshlq_u8(v, vdupq_n_s8((int8_t)by)); }

/* Half of a line of row t: u, or q of 8 bits. */
INLINE int8x16_t half_line(const uint8_t *p, int bits, int t, int half) {
    p += half * (LINE / 2);
    if (bits == 8) return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + t * LINE), vdupq_n_u8(128)));
    uint8x16_t u = vdupq_n_u8(0);
    int low = 0;
    if (bits & 4) {
        const uint8x16_t line = vld1q_u8(p + t / 2 * LINE);
        u = t % 2 ? vshrq_n_u8(line, 4) : vandq_u8(line, vdupq_n_u8(15));
        p += STRIP / 2 * LINE, low = 4;
    }
    if (bits & 2) {
        const uint8x16_t moved = shifted(vld1q_u8(p + t / 4 * LINE), low - 2 * (t % 4));
        u = vorrq_u8(u, vandq_u8(moved, vdupq_n_u8((uint8_t)(3 << low))));
        p += STRIP / 4 * LINE, low += 2;
    }
    if (bits & 1) u = vorrq_u8(u, vandq_u8(shifted(vld1q_u8(p), low - t), vdupq_n_u8((uint8_t)(1 << low))));
    return vreinterpretq_s8_u8(u);
}

/* Sums (digits, STRIP) of row k of x. */
INLINE void put_totals(const Whole *w, int64_t k, int bits, int digits, const int32x4_t *acc, int32_t *sums) {
    for (int d = 0; d < digits; d++) {
        const int32_t more = bits == 8 ? 128 * w->sums[k * digits + d] : 0; /* what u has above q */
        for (int t = 0; t < STRIP; t++) sums[d * STRIP + t] = vaddvq_s32(acc[d * STRIP + t]) + more;
    }
}

/* `ADD` is one of the two above, which has to be inlined. */
#define STRIP_OF_ARM(NAME, TARGET, ADD)                                                                               \
    TARGET INLINE void NAME(const Layer *layer, const Whole *w, int64_t k0, int64_t k1, int64_t strip, int32_t *sums, \
                            int bits, int digits) {                                                                   \
        const uint8_t *p = strip_of(layer, strip);                                                                    \
        const int64_t lines = w->lines, rows = k1 - k0;                                                               \
        int32x4_t acc[ROWS_AT_ONCE * STRIP * MOST_DIGITS];                                                            \
        if (rows == 1) {                                                                                              \
            const int8_t *x = w->x + k0 * lines * digits * LINE;                                                      \
            int32x4_t one[STRIP * MOST_DIGITS];                                                                       \
            UNROLL for (int e = 0; e < STRIP * digits; e++) one[e] = vdupq_n_s32(0);                                  \
            ROLLED for (int64_t line = 0; line < lines; line++, p += LINE * bits, x += digits * LINE) {               \
                __builtin_prefetch(p + AHEAD);                                                                        \
                if (bits > 2) __builtin_prefetch(p + AHEAD + 64);                                                     \
                UNROLL for (int half = 0; half < 2; half++)                                                           \
                    UNROLL for (int t = 0; t < STRIP; t++) {                                                          \
                        const int8x16_t u = half_line(p, bits, t, half);                                              \
                        UNROLL for (int d = 0; d < digits; d++)                                                       \
                            one[d * STRIP + t] = ADD(one[d * STRIP + t], u, vld1q_s8(x + d * LINE + half * LINE / 2)); \
                    }                                                                                                 \
            }                                                                                                         \
            put_totals(w, k0, bits, digits, one, sums);                                                               \
            return;                                                                                                   \
        }                                                                                                             \
        for (int64_t e = 0; e < rows * STRIP * digits; e++) acc[e] = vdupq_n_s32(0);                                  \
        for (int64_t line = 0; line < lines; line += BLOCK) {                                                         \
            const int64_t some = lines - line < BLOCK ? lines - line : BLOCK;                                         \
            int8x16_t u[2 * BLOCK][STRIP];                                                                            \
            for (int64_t l = 0; l < some; l++)                                                                        \
                UNROLL for (int half = 0; half < 2; half++)                                                           \
                    UNROLL for (int t = 0; t < STRIP; t++)                                                            \
                        u[2 * l + half][t] = half_line(p + (line + l) * LINE * bits, bits, t, half);                  \
            for (int64_t k = 0; k < rows; k++)                                                                        \
                for (int d = 0; d < digits; d++) {                                                                    \
                    const int8_t *x = w->x + (((k0 + k) * lines + line) * digits + d) * LINE;                         \
                    int32x4_t *total = acc + (k * digits + d) * STRIP, sum[STRIP];                                    \
                    UNROLL for (int t = 0; t < STRIP; t++) sum[t] = total[t];                                         \
                    ROLLED for (int64_t l = 0; l < 2 * some; l++) {                                                   \
                        const int8x16_t digit = vld1q_s8(x + l / 2 * digits * LINE + l % 2 * (LINE / 2));             \
                        UNROLL for (int t = 0; t < STRIP; t++) sum[t] = ADD(sum[t], u[l][t], digit);                  \
                    }                                                                                                 \
                    UNROLL for (int t = 0; t < STRIP; t++) total[t] = sum[t];                                         \
                }                                                                                                     \
        }                                                                                                             \
        for (int64_t k = 0; k < rows; k++)                                                                            \
            put_totals(w, k0 + k, bits, digits, acc + k * digits * STRIP, sums + k * digits * STRIP);                 \
    }
STRIP_OF_ARM(strip_neon, , add_neon)
STRIPS(strip_neon, )
#if !defined(NO_DOT)
STRIP_OF_ARM(strip_dot, DOT, add_dot)
STRIPS(strip_dot, DOT)
#endif
#endif
