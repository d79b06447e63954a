/* What sparse.c asks of a C library, for programs without one (arm.py): memory is taken from one piece, and all of it is
   given back before the next call. Loops are volatile, or the compiler would make them calls of these very functions. */

#include <stddef.h>
#include <stdint.h>

static char heap[64 << 20] __attribute__((aligned(64)));
static size_t used;

void arm_begin(void) { used = 0; }

void *aligned_alloc(size_t alignment, size_t size) {
    used = (used + alignment - 1) / alignment * alignment;
    if (size > sizeof heap - used) return NULL;
    used += size;
    return heap + used - size;
}

void *malloc(size_t size) { return aligned_alloc(64, size); }

void free(void *memory) { (void)memory; }

void *memset(void *to, int value, size_t size) {
    for (volatile char *at = to; size; size--) *at++ = (char)value;
    return to;
}

void *memcpy(void *to, const void *from, size_t size) {
    const char *of = from;
    for (volatile char *at = to; size; size--) *at++ = *of++;
    return to;
}

void *memmove(void *to, const void *from, size_t size) {
    if ((uintptr_t)to <= (uintptr_t)from) return memcpy(to, from, size);
    for (volatile char *at = to; size; size--) at[size - 1] = ((const char *)from)[size - 1];
    return to;
}

void *calloc(size_t count, size_t size) {
    void *memory = malloc(count * size);
    return memory ? memset(memory, 0, count * size) : NULL;
}

int memcmp(const void *a, const void *b, size_t size) {
    const unsigned char *one = a, *other = b;
    for (; size; size--, one++, other++)
        if (*one != *other) return *one - *other;
    return 0;
}

int bcmp(const void *a, const void *b, size_t size) { return memcmp(a, b, size); }

void qsort(void *base, size_t count, size_t size, int (*compare)(const void *, const void *)) {
    char *at = base, kept[64];
    for (size_t k = 1; k < count; k++)
        for (size_t j = k; j && compare(at + (j - 1) * size, at + j * size) > 0; j--) {
            memcpy(kept, at + j * size, size);
            memcpy(at + j * size, at + (j - 1) * size, size);
            memcpy(at + (j - 1) * size, kept, size);
        }
}

int madvise(void *memory, size_t size, int advice) {
    (void)memory, (void)size, (void)advice;
    return 0;
}

unsigned long getauxval(unsigned long type) {
    (void)type;
    return 0;
}
