/* Products with weights that lie in panels: 16 outputs side by side for each input, so that a product reads one
 * sequential stream and a tile of outputs needs no sum across a vector.
 *
 * float32: [ceil(N / 16), K, 16]. int8: [ceil(N / 16), Kp / 2, 16, 2], two neighbouring inputs of an output together,
 * as the 16-bit multiply-add wants them; Kp is K rounded up to 2. Rows and columns beyond N and K are zeros.
 */
#include "common.h"

#define BLOCK_BYTES 262144 /* of inputs that stay in the second-level cache while all panels of a thread pass by */

/* Panels that a thread takes at once: several times as many turns as threads, so that one which is held up by other
 * work on the machine does not hold up the rest. */
INLINE long panels_per_turn(long panels) {
    const long turn = panels / (8 * omp_get_num_threads());
    return turn > 1 ? turn : 1;
}

INLINE long rows_per_block(long row_bytes) {
    const long fit = BLOCK_BYTES / row_bytes / TOKENS * TOKENS;
    return fit > TOKENS ? fit : TOKENS;
}

/* A row of 16 results to out, of which `columns` exist. */
INLINE void put(const vecf *y, const float *bias, float *out, long columns) {
    if (columns == COLUMNS && !bias) {
        for (int v = 0; v < VECTORS; v++) *(vecf *)(out + v * LANES) = y[v];
        return;
    }
    float row[COLUMNS];
    for (int v = 0; v < VECTORS; v++) *(vecf *)(row + v * LANES) = y[v];
    for (long n = 0; n < columns; n++) out[n] = bias ? row[n] + bias[n] : row[n];
}

/* ---- float32 --------------------------------------------------------------------------------------------------- */

INLINE void tile_float32(const float *w, const float *x, long ldx, const float *bias, float *out, long ldo, long K,
                         long columns, const int C) {
    vecf acc[TOKENS][VECTORS];
    for (int c = 0; c < C; c++)
        for (int v = 0; v < VECTORS; v++) acc[c][v] = (vecf){0};
    for (long k = 0; k < K; k++, w += COLUMNS)
        for (int c = 0; c < C; c++) {
            const float in = x[c * ldx + k];
            for (int v = 0; v < VECTORS; v++) acc[c][v] += *(const vecf *)(w + v * LANES) * in;
        }
    for (int c = 0; c < C; c++) put(acc[c], bias, out + c * ldo, columns);
}

/* out [T, N] (contiguous) = x [T, K] (rows ldx apart) times w^T + bias [N] or null. */
void octavo_linear_float32(const float *x, long ldx, const float *w, const float *bias, float *out, long T, long K,
                           long N) {
    const long panels = (N + COLUMNS - 1) / COLUMNS, block = rows_per_block(4 * K);
#pragma omp parallel
    for (long first = 0; first < T; first += block) {
        const long last = smaller(first + block, T);
#pragma omp for schedule(dynamic, panels_per_turn(panels)) nowait
        for (long p = 0; p < panels; p++) {
            const long n = p * COLUMNS, columns = smaller(N - n, COLUMNS);
            for (long t = first; t < last; t += TOKENS)
                WITH_ROWS(last - t, tile_float32(w + n * K, x + t * ldx, ldx, bias ? bias + n : 0, out + t * N + n, N,
                                                 K, columns, C))
        }
    }
}

/* w [N, K] (contiguous) to panels. */
void octavo_pack_float32(const float *w, float *panels, long N, long K) {
#pragma omp parallel for schedule(static)
    for (long p = 0; p < (N + COLUMNS - 1) / COLUMNS; p++)
        for (long k = 0; k < K; k++)
            for (long n = 0; n < COLUMNS; n++)
                panels[(p * K + k) * COLUMNS + n] = p * COLUMNS + n < N ? w[(p * COLUMNS + n) * K + k] : 0.f;
}

/* ---- int8 weights, 16-bit inputs, products summed exactly in 32 bits --------------------------------------------- */

typedef int32_t vecl __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

/* Two inputs times the weights of LANES outputs. */
#if defined(__AVX512BW__)
INLINE vecl widen(const int8_t *w) { return (vecl)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)w)); }
#if defined(__AVX512VNNI__)
INLINE vecl dot(vecl sum, vecl a, vecl b) { return (vecl)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }
#else
INLINE vecl dot(vecl sum, vecl a, vecl b) { return sum + (vecl)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#endif
#elif defined(__AVX2__) && LANES == 8
INLINE vecl widen(const int8_t *w) { return (vecl)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w)); }
INLINE vecl dot(vecl sum, vecl a, vecl b) { return sum + (vecl)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#else
typedef int16_t veci __attribute__((vector_size(LANES * 4), aligned(2), may_alias));
INLINE vecl widen(const int8_t *w) {
    veci wide;
    for (int i = 0; i < 2 * LANES; i++) wide[i] = w[i];
    return (vecl)wide;
}
INLINE vecl dot(vecl sum, vecl a, vecl b) { /* even and odd numbers of each pair, sign extended */
    return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
}
#endif

/* IS_WIDE: the panel has been widened to int16. */
INLINE void tile_int8(const void *w, const float *ws, const int16_t *x, const float *xs, const float *bias, float *out,
                      long ldo, long Kp, long columns, const int C, const int IS_WIDE) {
    vecl acc[TOKENS][VECTORS];
    for (int c = 0; c < C; c++)
        for (int v = 0; v < VECTORS; v++) acc[c][v] = (vecl){0};
    for (long k = 0; k < Kp; k += 2) {
        vecl wide[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            const long at = k * COLUMNS + v * 2 * LANES;
            wide[v] = IS_WIDE ? *(const vecl *)((const int16_t *)w + at) : widen((const int8_t *)w + at);
        }
        for (int c = 0; c < C; c++) {
            int32_t pair;
            memcpy(&pair, x + c * Kp + k, 4);
            const vecl in = (vecl){0} + pair;
            for (int v = 0; v < VECTORS; v++) acc[c][v] = dot(acc[c][v], wide[v], in);
        }
    }
    for (int c = 0; c < C; c++) {
        vecf y[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            y[v] = __builtin_convertvector(acc[c][v], vecf) * (*(const vecf *)(ws + v * LANES) * xs[c]);
        put(y, bias, out + c * ldo, columns);
    }
}

/* x [T, K] to int16 [T, Kp] with one scale per row: x = xq * xs. */
static void quantize_rows(const float *x, long ldx, long T, long K, long Kp, float limit, int16_t *xq, float *xs) {
#pragma omp parallel for schedule(static) if (T * K > 32768)
    for (long t = 0; t < T; t++) {
        const float *row = x + t * ldx;
        int16_t *to = xq + t * Kp;
        float high = 0.f;
        for (long k = 0; k < K; k++) high = larger(high, fabsf(row[k]));
        xs[t] = high / limit;
        const float inverse = high > 0.f ? limit / high : 0.f;
        for (long k = 0; k < K; k++) to[k] = (int16_t)(int32_t)rintf(row[k] * inverse);
        for (long k = K; k < Kp; k++) to[k] = 0;
    }
}

/* out [T, N] (contiguous) = x [T, K] (rows ldx apart) times (w * ws)^T + bias [N] or null. ws is padded with zeros to
 * whole panels. scratch: see octavo_linear_int8_scratch. */
void octavo_linear_int8(const float *x, long ldx, const int8_t *w, const float *ws, const float *bias, float *out,
                        long T, long K, long N, void *scratch) {
    const long Kp = (K + 1) / 2 * 2, panels = (N + COLUMNS - 1) / COLUMNS, block = rows_per_block(2 * Kp);
    int16_t *widened = scratch;
    float *xs = (float *)(widened + omp_get_max_threads() * Kp * COLUMNS);
    int16_t *xq = (int16_t *)(xs + T);
    /* The largest integer range whose sums of K products stay within 31 bits. */
    const double bound = 2147483647.0 / (127.0 * (double)K);
    quantize_rows(x, ldx, T, K, Kp, (float)(bound < 32767.0 ? (long)bound : 32767), xq, xs);
    /* Widening while multiplying costs as much as the products of two rows. */
    const int is_wide = T >= 3 * TOKENS;
#pragma omp parallel
    for (long first = 0; first < T; first += block) {
        const long last = smaller(first + block, T);
#pragma omp for schedule(dynamic, panels_per_turn(panels)) nowait
        for (long p = 0; p < panels; p++) {
            const long n = p * COLUMNS, columns = smaller(N - n, COLUMNS);
            const int8_t *narrow = w + n * Kp;
            int16_t *wide = widened + omp_get_thread_num() * Kp * COLUMNS;
            if (is_wide)
                for (long k = 0; k < Kp * COLUMNS; k += 2 * LANES) *(vecl *)(wide + k) = widen(narrow + k);
            for (long t = first; t < last; t += TOKENS) {
                if (is_wide)
                    WITH_ROWS(last - t, tile_int8(wide, ws + n, xq + t * Kp, xs + t, bias ? bias + n : 0,
                                                  out + t * N + n, N, Kp, columns, C, 1))
                else
                    WITH_ROWS(last - t, tile_int8(narrow, ws + n, xq + t * Kp, xs + t, bias ? bias + n : 0,
                                                  out + t * N + n, N, Kp, columns, C, 0))
            }
        }
    }
}

/* Bytes of working memory of a product. */
long octavo_linear_int8_scratch(long T, long K) {
    const long Kp = (K + 1) / 2 * 2;
    return omp_get_max_threads() * Kp * COLUMNS * 2 + T * 4 + T * Kp * 2;
}

/* Round w [N, K] (contiguous) to int8 panels; scales: [N rounded up to 16]. The largest of a row becomes 127. */
#define ROUNDED 256 /* numbers of a row at once: rounding is vector code, laying them apart is not */
void octavo_quantize_int8(const float *w, int8_t *w8, float *scales, long N, long K) {
    const long Kp = (K + 1) / 2 * 2, panels = (N + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for schedule(static)
    for (long n = 0; n < panels * COLUMNS; n++) {
        int16_t *to = (int16_t *)(w8 + n / COLUMNS * COLUMNS * Kp) + n % COLUMNS;
        if (n >= N) {
            scales[n] = 0.f;
            for (long k = 0; k < Kp / 2; k++) to[k * COLUMNS] = 0;
            continue;
        }
        const float *row = w + n * K;
        float high = 1e-30f;
        for (long k = 0; k < K; k++) high = larger(high, fabsf(row[k]));
        scales[n] = high / 127.f;
        for (long first = 0; first < Kp; first += ROUNDED) {
            int8_t rounded[ROUNDED] __attribute__((aligned(2))) = {0};
            const long count = smaller(K - first, ROUNDED);
            for (long k = 0; k < count; k++) rounded[k] = (int8_t)(int32_t)rintf(row[first + k] * (127.f / high));
            for (long k = 0; k < count; k += 2) memcpy(to + (first + k) / 2 * COLUMNS, rounded + k, 2);
        }
    }
}
