/* One token through a whole decoder, as a list of operations on vectors of float32: between two products of a small model
   there is little to do, and a call from outside for each of these trifles takes longer than all the products.

   memory holds vectors (rows, width) one behind the other, one row for each sequence; an operation names them by where
   they begin in the memory of one row, so that a vector that begins at `from` lies at memory + from * rows. */

enum { NORM = 0, PRODUCT = 1, ROTATE = 2, ATTEND = 3, GATE = 4, ADD = 5, EXPERTS = 6, SHARE = 7 };
enum { SILU = 0, GELU_TANH = 1, RELU = 2, CLAMPED = 3 };
enum { CODED = 0, SPREAD = 1, KEPT_COLUMNS = 2, KEPT_ROWS = 3, DENSE = 4 };

typedef struct Operation Operation;
typedef struct Step Step;

/* Operations of one expert, on vectors of their own. */
typedef struct {
    const Operation *operations;
    int64_t count;
} Part;

struct Operation {
    int32_t kind, choice; /* choice: of an activation, or of a form; EXPERTS: whether the shares of the chosen sum to 1 */
    int64_t from, to[TOGETHER];
    int64_t width;            /* of a vector; of one head for ROTATE and ATTEND */
    int64_t count;            /* NORM: vectors of a row, side by side; PRODUCT: layers; ROTATE and ATTEND: heads;
                                 EXPERTS: how many there are */
    const float *weight;      /* NORM (width,); ROTATE: cosines, then sines, (width,) each; ATTEND: a score for each head
                                 that nothing is read for, or NULL; GATE, if CLAMPED: its limit and its steepness */
    const Layer *layers[TOGETHER];
    void *keys, *values;      /* ATTEND: (rows, kept, room, width) each */
    int64_t kept, room;       /* ATTEND: heads of keys, and positions there is memory for; EXPERTS, kept: how many are
                                 chosen */
    int64_t window;           /* ATTEND: how many positions back it looks, itself included; 0: all */
    float number;             /* NORM: epsilon; ATTEND: what scores are multiplied by */
    const Part *parts;        /* EXPERTS: each one's, from the vector at 0 of what is `inside` to that at to[2] */
    const Step *inside;       /* EXPERTS: for one row */
};

struct Step {
    float *memory, *scores; /* scores: (rows, heads, room) */
    char *narrow;           /* what a product of `dtype` reads and writes: two vectors (rows, widest) */
    int64_t rows, position, widest;
    int32_t dtype, threads, level;
};

/* The first `count` of them, the others zero. */
INLINE vec8 some8(const float *p, int64_t count) {
    vec8 v = {0};
    if (count >= 8) memcpy(&v, p, sizeof v);
    else memcpy(&v, p, count * sizeof *p);
    return v;
}

INLINE void put8(float *p, vec8 v, int64_t count) {
    if (count >= 8) memcpy(p, &v, sizeof v);
    else memcpy(p, &v, count * sizeof *p);
}

/* a where the comparison holds, b elsewhere. */
#define CHOSEN(where, a, b) ((vec8)(((word8)(a) & (word8)(where)) | ((word8)(b) & ~(word8)(where))))

/* e to the power of each, within 2e-7 of it; NaN stays one. */
INLINE vec8 exp8(vec8 x) {
    const vec8 least = (vec8){0} - 87.0f, most = (vec8){0} + 88.0f, magic = (vec8){0} + 12582912.0f;
    const vec8 low = CHOSEN(x < least, least, x), bound = CHOSEN(low > most, most, low);
    const vec8 shifted = bound * 1.44269504f + magic, whole = shifted - magic;
    const vec8 r = bound - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec8 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const word8 power = ((word8)shifted - (word8)magic + 127) << 23;
    return p * (vec8)power;
}

INLINE void norm_of(float *to, const float *x, const float *weight, int64_t n, float epsilon) {
    vec8 sum = {0}, more = {0};
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) {
        const vec8 v = load8(x, j, FLOAT32), w = load8(x, j + 8, FLOAT32);
        sum += v * v, more += w * w;
    }
    for (; j < n; j += 8) {
        const vec8 v = some8(x + j, n - j);
        sum += v * v;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum8(sum + more) / (float)n + epsilon);
    for (j = 0; j < n; j++) to[j] = x[j] * scale * weight[j];
}

INLINE void rotate(float *x, const float *turn, int64_t n) {
    const float *cosine = turn, *sine = turn + n;
    for (int64_t j = 0; j < n / 2; j++) {
        const float a = x[j], b = x[j + n / 2];
        x[j] = a * cosine[j] - b * sine[j];
        x[j + n / 2] = b * cosine[j + n / 2] + a * sine[j + n / 2];
    }
}

INLINE void gate(float *to, const float *x, int64_t n, int choice) {
    for (int64_t j = 0; j < n; j += 8) {
        const vec8 v = some8(x + j, n - j), up = some8(to + j, n - j);
        vec8 y = CHOSEN(v > 0.0f, v, (vec8){0});
        if (choice != RELU) {
            const vec8 inner = choice == SILU ? v : 1.5957691216f * (v + 0.044715f * v * v * v);
            y = v / (1.0f + exp8(-inner));
        }
        put8(to + j, y * up, n - j);
    }
}

/* As gpt-oss has it: x (n, 2), each gate beside what it lets through. */
INLINE void clamped_gate(float *to, const float *x, int64_t n, const float *settings) {
    const vec8 limit = (vec8){0} + settings[0];
    for (int64_t j = 0; j < n; j += 8) {
        vec8 v = {0}, up = {0};
        for (int l = 0; l < 8 && j + l < n; l++) v[l] = x[2 * (j + l)], up[l] = x[2 * (j + l) + 1];
        v = CHOSEN(v > limit, limit, v);
        up = CHOSEN(up > limit, limit, up);
        up = CHOSEN(up < -limit, -limit, up);
        put8(to + j, v / (1.0f + exp8(-settings[1] * v)) * (up + 1.0f), n - j);
    }
}

/* One head: q (width,) against keys and values (positions, width) from `first` on; sink: a score, or NULL. */
INLINE void attend_head(const Operation *op, const float *q, const void *keys, const void *values, float *scores,
                        float *to, int64_t first, int64_t end, int dtype, const float *sink) {
    enum { SIDE_BY_SIDE = 64 };
    const int64_t n = op->width, count = end - first;
    float largest = sink ? *sink : -3.4e38f;
    for (int64_t p = 0; p < count; p++) {
        const int64_t at = (first + p) * n;
        vec8 sum = {0}, more = {0};
        int64_t j = 0;
        for (; j + 16 <= n; j += 16) {
            sum += load8(keys, at + j, dtype) * load8(q, j, FLOAT32);
            more += load8(keys, at + j + 8, dtype) * load8(q, j + 8, FLOAT32);
        }
        float s = sum8(sum + more);
        for (; j < n; j++) s += get(keys, at + j, dtype) * q[j];
        scores[p] = s * op->number;
        largest = scores[p] > largest ? scores[p] : largest;
    }
    vec8 total = {0};
    for (int64_t p = 0; p < count; p += 8) {
        const vec8 e = exp8(some8(scores + p, count - p) - largest);
        put8(scores + p, e, count - p);
        total += some8(scores + p, count - p); /* without what is beyond the end */
    }
    const float scale = 1.0f / (sum8(total) + (sink ? exp8((vec8){0} + (*sink - largest))[0] : 0.0f));
    int64_t j0 = 0;
    for (; j0 + SIDE_BY_SIDE <= n; j0 += SIDE_BY_SIDE) { /* of all positions before the next, to stay in registers */
        vec8 sums[SIDE_BY_SIDE / 8];
        UNROLL for (int l = 0; l < SIDE_BY_SIDE / 8; l++) sums[l] = (vec8){0};
        for (int64_t p = 0; p < count; p++)
            UNROLL for (int l = 0; l < SIDE_BY_SIDE / 8; l++)
                sums[l] += scores[p] * load8(values, (first + p) * n + j0 + 8 * l, dtype);
        UNROLL for (int l = 0; l < SIDE_BY_SIDE / 8; l++) put8(to + j0 + 8 * l, sums[l] * scale, 8);
    }
    memset(to + j0, 0, (n - j0) * sizeof *to);
    for (int64_t p = 0; p < count; p++)
        for (int64_t j = j0; j < n; j++) to[j] += scores[p] * scale * get(values, (first + p) * n + j, dtype);
}

/* An operation on one row, or for ATTEND on one head of one row. */
INLINE void work_on(const Operation *op, const Step *s, int64_t row, int64_t head, int dtype) {
    const int64_t rows = s->rows, n = op->width;
    float *to = s->memory + op->to[0] * rows;
    const float *from = s->memory + op->from * rows;
    if (op->kind == NORM) {
        for (int64_t k = row * op->count; k < (row + 1) * op->count; k++)
            norm_of(to + k * n, from + k * n, op->weight, n, op->number);
    } else if (op->kind == ROTATE) {
        for (int64_t k = row * op->count; k < (row + 1) * op->count; k++) rotate(to + k * n, op->weight, n);
    } else if (op->kind == GATE && op->choice == CLAMPED) {
        clamped_gate(to + row * n, from + row * 2 * n, n, op->weight);
    } else if (op->kind == GATE) {
        gate(to + row * n, from + row * n, n, op->choice);
    } else if (op->kind == ADD) {
        for (int64_t j = row * n; j < (row + 1) * n; j++) to[j] += from[j];
    } else if (op->kind == SHARE) {
        const float share = 1.0f / (1.0f + exp8((vec8){0} - from[row])[0]);
        for (int64_t j = row * n; j < (row + 1) * n; j++) to[j] *= share;
    } else {
        const int64_t end = s->position + 1, first = op->window && end > op->window ? end - op->window : 0;
        const int64_t k = row * op->kept + head / (op->count / op->kept), at = row * op->count + head;
        const int64_t size = op->room * n * (dtype == BFLOAT16 ? 2 : 4);
        attend_head(op, from + at * n, (const char *)op->keys + k * size, (const char *)op->values + k * size,
                    s->scores + at * op->room, to + at * n, first, end, dtype, op->weight ? op->weight + head : NULL);
    }
}

typedef void Work(const Operation *, const Step *, int64_t, int64_t);
#define WORK(NAME, TARGET)                                                                                            \
    TARGET static void NAME(const Operation *op, const Step *s, int64_t row, int64_t head) {                          \
        if (s->dtype == BFLOAT16) work_on(op, s, row, head, BFLOAT16);                                                \
        else work_on(op, s, row, head, FLOAT32);                                                                      \
    }
WORK(work_plain, )
#if defined(__x86_64__)
WORK(work_avx2, AVX2)
WORK(work_avx512, AVX512)
#endif

/* The keys and values of this position take their place, from vectors (rows, kept * width). */
static void keep(const Operation *op, const Step *s) {
    for (int64_t k = 0; k < s->rows * op->kept; k++)
        for (int64_t j = 0; j < op->width; j++) {
            const int64_t to = (k * op->room + s->position) * op->width + j, from = k * op->width + j;
            put(op->keys, to, s->memory[op->to[1] * s->rows + from], s->dtype);
            put(op->values, to, s->memory[op->to[2] * s->rows + from], s->dtype);
        }
}

static int one_product(const Layer *layer, int form, const void *x, void *y, const Step *s, int threads) {
    const int64_t n = layer->n, size = layer->dtype == BFLOAT16 ? 2 : 4;
    int failed = 0;
    for (int64_t k = 0; k < s->rows && !failed; k++) {
        const void *from = (const char *)x + k * n * size;
        void *to = (char *)y + k * layer->m * size;
        if (form == SPREAD) failed = losparse_few(layer, from, to, 1, threads, s->level);
        else if (form == KEPT_COLUMNS || form == KEPT_ROWS)
            failed = losparse_block(layer, form == KEPT_ROWS, from, to, 1, threads, s->level);
    }
    return failed;
}

/* y (rows, m) = x Wᵀ + bias for a dense W, which a layer holds as V, with as many ranks as it has rows. */
static void dense_product(const Layer *layer, const void *x, float *y, const Step *s, int threads) {
    const int64_t m = layer->rank, n = layer->n, size = layer->dtype == BFLOAT16 ? 2 : 4;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < m; r++)
        for (int64_t k = 0; k < s->rows; k++) {
            float *line = y + k * m;
            project(layer, (const char *)x + k * n * size, line, 1, r, s->level);
            if (layer->bias) line[r] += get(layer->bias, r, layer->dtype);
        }
}

static int products(const Operation *op, const Step *s) {
    const int64_t n = op->layers[0]->n, rows = s->rows, size = s->dtype == BFLOAT16 ? 2 : 4;
    const float *from = s->memory + op->from * rows;
    const void *x = from;
    void *y[TOGETHER];
    char *written = s->narrow + s->widest * rows * size;
    int64_t entries = 0;
    if (s->dtype == BFLOAT16) {
        for (int64_t j = 0; j < rows * n; j += 16)
            put_line(s->narrow, j, from + j, rows * n - j < 16 ? rows * n - j : 16, BFLOAT16);
        x = s->narrow;
    }
    for (int l = 0; l < op->count; l++) {
        y[l] = s->dtype == BFLOAT16 ? (void *)written : (void *)(s->memory + op->to[l] * rows);
        written += op->layers[l]->m * rows * size;
        entries += op->layers[l]->m * n;
    }
    /* Below this one thread is done before others would have begun. */
    const int threads = entries * (rows + 2) < (1 << 19) ? 1 : s->threads;
    int failed = 0;
    if (op->choice == CODED)
        failed = coded_together(op->layers, y, (int)op->count, x, rows, s->dtype == BFLOAT16 ? 2 : 3, threads, s->level);
    for (int l = 0; l < op->count && op->choice != CODED && !failed; l++) {
        if (op->choice == DENSE) dense_product(op->layers[l], x, s->memory + op->to[l] * rows, s, threads);
        else failed = one_product(op->layers[l], op->choice, x, y[l], s, threads);
    }
    for (int l = 0; l < op->count && s->dtype == BFLOAT16 && op->choice != DENSE; l++) {
        float *to = s->memory + op->to[l] * rows;
        const int64_t count = op->layers[l]->m * rows;
        for (int64_t j = 0; j < count; j++) to[j] = widen(((const uint16_t *)y[l])[j]);
    }
    return failed;
}

int losparse_step(const Operation *operations, int64_t count, const Step *s);

/* Each row's sum of what the experts with the largest logits make of it, by their shares in a softmax over all of
   them, or over the chosen. A row at a time: there are few. */
static int experts(const Operation *op, const Step *s) {
    const int64_t n = op->width, all = op->count;
    const Step *inside = op->inside;
    float *left = malloc(all * sizeof *left); /* of the softmax, -1 for those that are chosen */
    float *shares = malloc(op->kept * sizeof *shares);
    int64_t *chosen = malloc(op->kept * sizeof *chosen);
    int failed = !left || !shares || !chosen;
    for (int64_t row = 0; row < s->rows && !failed; row++) {
        const float *logits = s->memory + op->from * s->rows + row * all;
        float *to = s->memory + op->to[1] * s->rows + row * n, largest = logits[0], total = 0.0f, ours = 0.0f;
        for (int64_t e = 1; e < all; e++) largest = logits[e] > largest ? logits[e] : largest;
        for (int64_t e = 0; e < all; e += 8) put8(left + e, exp8(some8(logits + e, all - e) - largest), all - e);
        for (int64_t e = 0; e < all; e++) total += left[e];
        for (int64_t k = 0; k < op->kept; k++) {
            int64_t best = 0;
            for (int64_t e = 1; e < all; e++) best = left[e] > left[best] ? e : best;
            chosen[k] = best, shares[k] = left[best], ours += left[best], left[best] = -1.0f;
        }
        memset(to, 0, n * sizeof *to);
        memcpy(inside->memory, s->memory + op->to[0] * s->rows + row * n, n * sizeof *to);
        for (int64_t k = 0; k < op->kept && !failed; k++) {
            const Part *part = op->parts + chosen[k];
            const float share = shares[k] / (op->choice ? ours : total), *made = inside->memory + op->to[2];
            failed = losparse_step(part->operations, part->count, inside);
            for (int64_t j = 0; j < n; j++) to[j] += share * made[j];
        }
    }
    free(left), free(shares), free(chosen);
    return failed;
}

/* All operations in turn. Returns 0, or what a product returned that failed. */
int losparse_step(const Operation *operations, int64_t count, const Step *s) {
    Work *work = work_plain;
#if defined(__x86_64__)
    if (s->level >= LEVEL_AVX512) work = work_avx512;
    else if (s->level >= LEVEL_AVX2) work = work_avx2;
#endif
    for (const Operation *op = operations; op < operations + count; op++) {
        if (op->kind == PRODUCT) {
            const int failed = products(op, s);
            if (failed) return failed;
            continue;
        }
        if (op->kind == EXPERTS) {
            const int failed = experts(op, s);
            if (failed) return failed;
            continue;
        }
        if (op->kind == ATTEND) keep(op, s);
        const int64_t heads = op->kind == ATTEND ? op->count : 1;
        const int64_t all = op->kind == ATTEND ? heads * (s->position + 1) * op->width * s->rows : 0;
        const int threads = all < (1 << 16) ? 1 : s->threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int64_t k = 0; k < s->rows * heads; k++) work(op, s, k / heads, k % heads);
    }
    return 0;
}
