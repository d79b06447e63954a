/* The low-rank part and the gathered product of single rows. */

/* How many rows are computed for so many of x. */
INLINE int64_t spread_rows(int64_t rows) { return rows <= 8 ? rows : rows <= 12 ? 12 : 16; }

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

/* Eight numbers at a time: of sixteen GCC leaves no sum in registers in AVX2. */
INLINE vec8 load8(const void *p, int64_t i, int dtype) {
    vec8 v;
    if (dtype == BFLOAT16) {
        half8 h;
        memcpy(&h, (const uint16_t *)p + i, sizeof h);
        const word8 w = __builtin_convertvector(h, word8) << 16;
        memcpy(&v, &w, sizeof v);
    } else {
        memcpy(&v, (const float *)p + i, sizeof v);
    }
    return v;
}

INLINE float sum8(vec8 v) {
    vec4 four[2];
    memcpy(four, &v, sizeof v);
    four[0] += four[1];
    return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

INLINE float sum16(vec v) { /* half onto half in registers, which a loop over the entries would leave */
    vec8 eight[2];
    memcpy(eight, &v, sizeof v);
    return sum8(eight[0] + eight[1]);
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

INLINE float dot8(const void *a, int64_t i, const void *b, int64_t j, int64_t n, int dtype) {
    vec8 s[4] = {{0}};
    int64_t k = 0;
    for (; k + 32 <= n; k += 32) {
        __builtin_prefetch((const char *)a + (i + k) * (dtype == BFLOAT16 ? 2 : 4) + AHEAD);
        UNROLL for (int l = 0; l < 4; l++) s[l] += load8(a, i + k + 8 * l, dtype) * load8(b, j + k + 8 * l, dtype);
    }
    float rest = 0;
    for (; k < n; k++) rest += get(a, i + k, dtype) * get(b, j + k, dtype);
    return sum8((s[0] + s[1]) + (s[2] + s[3])) + rest;
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
