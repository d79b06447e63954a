/* The columns of a row's entries, in ascending order. */

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
