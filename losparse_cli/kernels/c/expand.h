/* expand: rows of S, dense. */

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
