/* What a layer is to this code, and numbers in bfloat16 and float32. */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/mman.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,bmi,bmi2,popcnt")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,avx2,fma,bmi,bmi2,popcnt")))
#define AVX512_BF16                                                                                                   \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,avx2,fma,bmi,bmi2,popcnt")))
#endif
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("nounroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#define ROLLED _Pragma("GCC unroll 1") /* unrolled, what is summed up would not stay in registers */
#endif
#define AHEAD 1024 /* bytes that values are asked for ahead of their use */

enum { BFLOAT16 = 0, FLOAT32 = 1 };
enum { PLAIN = 0, LEVEL_AVX2 = 1, LEVEL_AVX512 = 2, LEVEL_AVX512_BF16 = 3 };
enum { LEVEL_DOT = 1 }; /* of ARM, whose plain one has NEON: products of bytes, four by four */

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
    const int32_t *kept; /* for losparse_block: the rows or columns that S keeps */
    int64_t kept_count;
    int64_t bits, rest; /* for codes.h: bits of a code, and how many do not fit */
} Layer;

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef float vec8 __attribute__((vector_size(32), aligned(4)));
typedef float vec4 __attribute__((vector_size(16), aligned(4)));
typedef uint32_t word8 __attribute__((vector_size(32)));
typedef int32_t whole8 __attribute__((vector_size(32)));
typedef uint8_t byte8 __attribute__((vector_size(8)));
typedef uint16_t half8 __attribute__((vector_size(16)));
typedef uint32_t word16 __attribute__((vector_size(64)));
typedef uint16_t half16 __attribute__((vector_size(32)));

/* Length of a row of V x: rank, padded to whole registers. */
INLINE int64_t padded_rank(const Layer *layer) { return (layer->rank + 15) / 16 * 16; }

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

/* Eight at once. */
INLINE void put_eight(void *p, int64_t i, vec8 line, int dtype) {
    if (dtype == BFLOAT16) {
        const word8 bits = (word8)line;
        const word8 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 64;
        const word8 nan = (word8)((bits & 0x7fffffff) > 0x7f800000);
        const half8 narrowed = __builtin_convertvector((rounded & ~nan) | (quiet & nan), half8);
        memcpy((uint16_t *)p + i, &narrowed, sizeof narrowed);
    } else {
        memcpy((float *)p + i, &line, sizeof line);
    }
}

/* p[i..i + count] = line. */
INLINE void put_line(void *p, int64_t i, const float *line, int64_t count, int dtype) {
    int64_t l = 0;
    for (; l + 8 <= count; l += 8) {
        vec8 some;
        memcpy(&some, line + l, sizeof some);
        put_eight(p, i + l, some, dtype);
    }
    for (; l < count; l++) put(p, i + l, line[l], dtype);
}

int losparse_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("bmi2"))
        return __builtin_cpu_supports("avx512bf16") ? LEVEL_AVX512_BF16 : LEVEL_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        return LEVEL_AVX2;
#elif defined(__ARM_FEATURE_DOTPROD)
    return LEVEL_DOT; /* the compiler was told, or knows it, as of Apple's processors */
#elif defined(__aarch64__) && defined(__linux__)
    if (getauxval(AT_HWCAP) >> 20 & 1) return LEVEL_DOT; /* HWCAP_ASIMDDP */
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
