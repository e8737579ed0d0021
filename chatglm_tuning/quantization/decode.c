/* One row of floats times a stored int4 or int8 weight, read once: y[r] = scale[r] * (sum over c of level[r, c] * x[c]);
 * the same with a bf16 weight; and int4 levels written out as bf16, for products of many rows.
 *
 * Written in the vector extensions of GCC and clang; with AVX512-BF16, int4 times bf16 has a form of its own. Sums are
 * kept in fp32. x comes in an order in which one shift of a vector of weights serves one vector of x.
 */
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { LANES = 16, STEP_BYTES = 4 * LANES, ROWS = 4, NIBBLES = 8 };

typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(64), aligned(1), may_alias));
typedef _Float16 half;

static float sum_lanes(floats v) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += v[lane];
    return sum;
}

/* The step of a row at `offset`, from `end_buffer` where the row ends within it. */
static const int8_t *step_of(const int8_t *row, long offset, long row_bytes, int8_t *end_buffer) {
    if (offset + STEP_BYTES <= row_bytes) return row + offset;
    memset(end_buffer, 0, STEP_BYTES);
    memcpy(end_buffer, row + offset, row_bytes - offset);
    return end_buffer;
}

/* A row that is read later; past the last row it is a row that is there. */
static inline void fetch_ahead(const int8_t *rows, long row, long last_row, long offset, long row_bytes) {
    long ahead = row + ROWS;
    __builtin_prefetch(rows + (ahead > last_row ? last_row : ahead) * row_bytes + offset);
}

/* spread: 8 parts of `length` floats; part k holds the x that nibble k of every 32-bit word of a weight's row meets. */
static void int4_float(const int8_t *weight, const half *scale, const float *spread, float *y, long rows,
                       long row_bytes, long length) {
#pragma omp parallel for schedule(static)
    for (long first = 0; first < rows; first += ROWS) {
        floats sums[ROWS] = {0};
        int count = rows - first < ROWS ? (int)(rows - first) : ROWS;
        for (long word = 0; word < length; word += LANES) {
            ints words[ROWS];
            int8_t end_buffer[STEP_BYTES];
            for (int i = 0; i < ROWS; i++) {
                long row = first + (i < count ? i : 0);
                words[i] = *(const ints *)step_of(weight + row * row_bytes, 4 * word, row_bytes, end_buffer);
                fetch_ahead(weight, row, rows - 1, 4 * word, row_bytes);
            }
#pragma GCC unroll 8
            for (int k = 0; k < NIBBLES; k++) {
                floats x = *(const floats *)(spread + k * length + word);
                for (int i = 0; i < ROWS; i++) {
                    sums[i] += __builtin_convertvector(words[i] << (28 - 4 * k) >> 28, floats) * x;
                }
            }
        }
        for (int i = 0; i < count; i++) y[first + i] = scale[first + i] * sum_lanes(sums[i]);
    }
}

#ifdef __AVX512BF16__
/* Two levels at a time become bf16 without a conversion: the four bits of a level, shifted into the top of a mantissa
 * under the exponent of 1 and with their sign bit inverted, are the number v = 1.5 + level / 16. The sum of level * x is
 * then 16 * (the sum of v * x) - 24 * (the sum of x), at the price of three bits of fp32, of which bf16 sees none.
 *
 * spread: 4 parts of `length` pairs of bf16; part k holds the x of nibbles k and k + 4 of every word.
 * shift: 24 * (the sum of x).
 */
static void int4_bf16(const int8_t *weight, const half *scale, const uint32_t *spread, float *y, long rows,
                      long row_bytes, long length, float shift) {
    const __m512i mask = _mm512_set1_epi32(0x00780078), one_and_half = _mm512_set1_epi32(0x3fc03fc0);
#define LEVELS(moved) (__m512bh) _mm512_xor_si512(_mm512_and_si512(moved, mask), one_and_half)
#define PART(k) (__m512bh) _mm512_loadu_si512(spread + (k) * length + word)
#pragma omp parallel for schedule(static)
    for (long first = 0; first < rows; first += ROWS) {
        __m512 sums[ROWS], more[ROWS];
        int count = rows - first < ROWS ? (int)(rows - first) : ROWS;
        for (int i = 0; i < ROWS; i++) sums[i] = more[i] = _mm512_setzero_ps();
        for (long word = 0; word < length; word += LANES) {
            __m512bh x0 = PART(0), x1 = PART(1), x2 = PART(2), x3 = PART(3);
            int8_t end_buffer[STEP_BYTES];
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++) {
                long row = first + (i < count ? i : 0);
                __m512i words =
                    _mm512_loadu_si512(step_of(weight + row * row_bytes, 4 * word, row_bytes, end_buffer));
                fetch_ahead(weight, row, rows - 1, 4 * word, row_bytes);
                sums[i] = _mm512_dpbf16_ps(sums[i], LEVELS(_mm512_slli_epi32(words, 3)), x0);
                more[i] = _mm512_dpbf16_ps(more[i], LEVELS(_mm512_srli_epi32(words, 1)), x1);
                sums[i] = _mm512_dpbf16_ps(sums[i], LEVELS(_mm512_srli_epi32(words, 5)), x2);
                more[i] = _mm512_dpbf16_ps(more[i], LEVELS(_mm512_srli_epi32(words, 9)), x3);
            }
        }
        for (int i = 0; i < count; i++)
            y[first + i] = scale[first + i] * (16 * _mm512_reduce_add_ps(sums[i] + more[i]) - shift);
    }
}
#endif

/* Words of a row, filled up to whole steps. */
static long words_of(long columns) {
    long words = (columns + NIBBLES - 1) / NIBBLES;
    return (words + LANES - 1) / LANES * LANES;
}

/* Nibble 0 of a word is the low one of its first byte, which holds the second of two columns: bits are little-endian. */
static int nibble_of(long column) { return (int)(column % NIBBLES) ^ 1; }

/* weight: (rows, columns / 2); scale: (rows,); x: (columns,); spread: room for columns + 128 floats. */
void int4_product_float(const int8_t *weight, const half *scale, const float *x, float *y, long rows, long columns,
                        float *spread) {
    long length = words_of(columns);
    memset(spread, 0, NIBBLES * length * sizeof *spread);
    for (long c = 0; c < columns; c++) spread[nibble_of(c) * length + c / NIBBLES] = x[c];
    int4_float(weight, scale, spread, y, rows, columns / 2, length);
}

/* The same of x in bf16; spread has room for columns + 128 of them. */
void int4_product_bf16(const int8_t *weight, const half *scale, const uint16_t *x, float *y, long rows, long columns,
                       uint16_t *spread) {
#ifdef __AVX512BF16__
    long length = words_of(columns);
    float sums[NIBBLES] = {0}, sum = 0;
    memset(spread, 0, NIBBLES * length * sizeof *spread);
    for (long c = 0; c < columns; c++) {
        int k = nibble_of(c);
        spread[2 * (k % 4 * length + c / NIBBLES) + k / 4] = x[c];
        union { uint32_t bits; float value; } widened = {(uint32_t)x[c] << 16};
        sums[k] += widened.value;
    }
    for (int k = 0; k < NIBBLES; k++) sum += sums[k];
    int4_bf16(weight, scale, (const uint32_t *)spread, y, rows, columns / 2, length, 24 * sum);
#else
    (void)weight, (void)scale, (void)x, (void)y, (void)rows, (void)columns, (void)spread;
#endif
}

static inline ints widen(const int8_t *levels) {
#ifdef __AVX512F__ /* which GCC 12 does not make of the loop */
    return (ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)levels));
#else
    int32_t wide[LANES];
    for (int lane = 0; lane < LANES; lane++) wide[lane] = levels[lane];
    return *(const ints *)wide;
#endif
}

/* weight: (rows, columns); scale: (rows,); x: (columns,). */
void int8_product(const int8_t *weight, const half *scale, const float *x, float *y, long rows, long columns) {
    long whole = columns / LANES * LANES;
#pragma omp parallel for schedule(static)
    for (long first = 0; first < rows; first += ROWS) {
        floats sums[ROWS] = {0};
        int count = rows - first < ROWS ? (int)(rows - first) : ROWS;
        for (long c = 0; c < whole; c += LANES) {
            floats part = *(const floats *)(x + c);
            for (int i = 0; i < ROWS; i++) {
                long row = first + (i < count ? i : 0);
                sums[i] += __builtin_convertvector(widen(weight + row * columns + c), floats) * part;
                fetch_ahead(weight, row, rows - 1, c, columns);
            }
        }
        for (int i = 0; i < count; i++) {
            float sum = sum_lanes(sums[i]);
            for (long c = whole; c < columns; c++) sum += weight[(first + i) * columns + c] * x[c];
            y[first + i] = scale[first + i] * sum;
        }
    }
}

static inline floats widen_bf16(const uint16_t *values) {
#ifdef __AVX512F__
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)values));
    return (floats)_mm512_slli_epi32(wide, 16);
#else
    uint32_t wide[LANES];
    for (int lane = 0; lane < LANES; lane++) wide[lane] = (uint32_t)values[lane] << 16;
    return *(const floats *)wide;
#endif
}

/* weight: bf16 (rows, columns), columns a multiple of 16; x: (columns,). */
void bf16_product(const uint16_t *weight, const float *x, float *y, long rows, long columns) {
#pragma omp parallel for schedule(static)
    for (long first = 0; first < rows; first += ROWS) {
        floats sums[ROWS] = {0};
        int count = rows - first < ROWS ? (int)(rows - first) : ROWS;
        for (long c = 0; c < columns; c += LANES) {
            floats part = *(const floats *)(x + c);
            for (int i = 0; i < ROWS; i++) {
                long row = first + (i < count ? i : 0);
                sums[i] += widen_bf16(weight + row * columns + c) * part;
                fetch_ahead((const int8_t *)weight, row, rows - 1, 2 * c, 2 * columns);
            }
        }
        for (int i = 0; i < count; i++) y[first + i] = sum_lanes(sums[i]);
    }
}

/* bf16 of the levels 0 to 7 and -8 to -1, the order of a nibble's bits. */
static const uint16_t LEVELS_BF16[16] = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                         0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};

/* packed: rows of `width` bytes, `stride` bytes apart; even, odd: rows of `width` bf16, `out_stride` of them apart. */
void spread_int4_bf16(const uint8_t *packed, uint16_t *even, uint16_t *odd, long rows, long width, long stride,
                      long out_stride) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        const uint8_t *source = packed + row * stride;
        uint16_t *high = even + row * out_stride, *low = odd + row * out_stride;
        long c = 0;
#ifdef __AVX512BW__
        __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)LEVELS_BF16));
        int is_aligned = ((uintptr_t)high | (uintptr_t)low) % 64 == 0;
        for (; c + 32 <= width; c += 32) {
            __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(source + c)));
            __m512i first = _mm512_permutexvar_epi16(_mm512_srli_epi16(wide, 4), table);
            /* The fifth bit of an index picks the table's second half, which is like the first; more do not count. */
            __m512i second = _mm512_permutexvar_epi16(wide, table);
            if (is_aligned) { /* past the cache, which the whole matrix would not fit into */
                _mm512_stream_si512((__m512i *)(high + c), first);
                _mm512_stream_si512((__m512i *)(low + c), second);
            } else {
                _mm512_storeu_si512(high + c, first);
                _mm512_storeu_si512(low + c, second);
            }
        }
        _mm_sfence();
#endif
        for (; c < width; c++) {
            high[c] = LEVELS_BF16[source[c] >> 4];
            low[c] = LEVELS_BF16[source[c] & 15];
        }
    }
}

/* Whether int4_product_bf16 does anything. */
int has_bf16(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}
