/* Stored layouts to bits; these trust nothing. */

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
