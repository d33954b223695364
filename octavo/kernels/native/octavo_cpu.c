/* CPU kernels behind octavo/kernels/native/: plain C over pointers, compiled on the machine that runs them.
 *
 * Every function has a reference in plain torch (named in the Python wrapper) and gives the same result for a row
 * whatever else is in the batch and however many threads run: sums are ordered by position, never by thread.
 * Shapes: T tokens, K inputs, N outputs, B requests, H query heads, G KV heads, D head size, P block size.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* Unlike fmaxf without a rule for NaN, so that loops over it become vector code. */
INLINE float larger(float a, float b) { return a > b ? a : b; }

/* ---- int8 weights: 16-bit activations, products summed exactly in 32 bits -------------------------------------- */

#if defined(__AVX512BW__)
#define LANES 32
typedef __m512i vec;
INLINE vec vec_zero(void) { return _mm512_setzero_si512(); }
INLINE vec load_weights(const int8_t *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vec load_inputs(const int16_t *p) { return _mm512_loadu_si512((const void *)p); }
#if defined(__AVX512VNNI__)
INLINE vec dot(vec sum, vec a, vec b) { return _mm512_dpwssd_epi32(sum, a, b); }
#else
INLINE vec dot(vec sum, vec a, vec b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
#endif
INLINE __m128i totals(vec a, vec b, vec c, vec d) {
    const vec ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const vec cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const vec all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
#elif defined(__AVX2__)
#define LANES 16
typedef __m256i vec;
INLINE vec vec_zero(void) { return _mm256_setzero_si256(); }
INLINE vec load_weights(const int8_t *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)); }
INLINE vec load_inputs(const int16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE vec dot(vec sum, vec a, vec b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
INLINE __m128i totals(vec a, vec b, vec c, vec d) {
    const vec ab = _mm256_hadd_epi32(a, b), cd = _mm256_hadd_epi32(c, d), all = _mm256_hadd_epi32(ab, cd);
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}
#else
#define LANES 1
#endif

/* Weights come in panels of 4 rows, LANES columns of each row in turn, padded with zeros: [ceil(N / 4), Kp / LANES, 4,
 * LANES]. So one product reads one sequential stream, which memory serves nearly twice as fast as four. */
#define ROWS 4

int octavo_lanes(void) { return LANES < 16 ? 16 : LANES; }

/* A panel times C input rows: sums [C, ROWS]. */
INLINE void tile(const int8_t *w, const int16_t *x, long Kp, int32_t *sums, const int C) {
#if LANES > 1
    vec acc[4][ROWS];
    for (int c = 0; c < C; c++)
        for (int r = 0; r < ROWS; r++) acc[c][r] = vec_zero();
    for (long k = 0; k < Kp; k += LANES, w += ROWS * LANES) {
        vec wide[ROWS];
        for (int r = 0; r < ROWS; r++) wide[r] = load_weights(w + r * LANES);
        for (int c = 0; c < C; c++) {
            const vec in = load_inputs(x + c * Kp + k);
            for (int r = 0; r < ROWS; r++) acc[c][r] = dot(acc[c][r], wide[r], in);
        }
    }
    for (int c = 0; c < C; c++)
        _mm_storeu_si128((__m128i *)(sums + c * ROWS), totals(acc[c][0], acc[c][1], acc[c][2], acc[c][3]));
#else
    for (int i = 0; i < C * ROWS; i++) sums[i] = 0;
    for (long k = 0; k < Kp; k += 16, w += ROWS * 16)
        for (int c = 0; c < C; c++)
            for (int r = 0; r < ROWS; r++)
                for (int i = 0; i < 16; i++) sums[c * ROWS + r] += (int32_t)w[r * 16 + i] * x[c * Kp + k + i];
#endif
}

/* C tokens of one panel; the last panel may have fewer than ROWS rows. */
INLINE void panel(const int8_t *w, const float *ws, const int16_t *x, const float *xs, const float *bias, float *out,
                  long ldo, long Kp, long rows, const int C) {
    int32_t sums[4 * ROWS];
    tile(w, x, Kp, sums, C);
    if (rows == ROWS && !bias) { /* the common case, as vector code */
        for (int c = 0; c < C; c++)
            for (int r = 0; r < ROWS; r++) out[c * ldo + r] = (float)sums[c * ROWS + r] * (xs[c] * ws[r]);
        return;
    }
    for (int c = 0; c < C; c++)
        for (long r = 0; r < rows; r++) {
            const float y = (float)sums[c * ROWS + r] * (xs[c] * ws[r]);
            out[c * ldo + r] = bias ? y + bias[r] : y;
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

/* out [T, N] (contiguous) = x [T, K] (rows ldx apart) times (w * ws [N])^T + bias [N] or null; w in panels.
 * scratch: T * (2 * Kp + 4) bytes. */
void octavo_linear_int8(const float *x, long ldx, const int8_t *w, const float *ws, const float *bias, float *out,
                        long T, long K, long N, void *scratch) {
    const long pad = octavo_lanes(), Kp = (K + pad - 1) / pad * pad;
    int16_t *xq = scratch;
    float *xs = (float *)(xq + T * Kp);
    /* The largest integer range whose sums of K products stay within 31 bits. */
    const double bound = 2147483647.0 / (127.0 * (double)K);
    quantize_rows(x, ldx, T, K, Kp, (float)(bound < 32767.0 ? (long)bound : 32767), xq, xs);
    const long panels = (N + ROWS - 1) / ROWS;
    /* A block of inputs stays in the second-level cache while all panels of the thread pass over it. */
    const long fit = 65536 / Kp / 4 * 4, block = fit > 4 ? fit : 4;
#pragma omp parallel
    for (long first = 0; first < T; first += block) {
        const long last = first + block < T ? first + block : T;
#pragma omp for schedule(static) nowait
        for (long p = 0; p < panels; p++) {
            const long n = p * ROWS, rows = n + ROWS <= N ? ROWS : N - n;
            const int8_t *pw = w + n * Kp;
            const float *pb = bias ? bias + n : 0;
            long t = first;
#if defined(__AVX512BW__)
            for (; t + 4 <= last; t += 4)
                panel(pw, ws + n, xq + t * Kp, xs + t, pb, out + t * N + n, N, Kp, rows, 4);
#endif
            for (; t + 2 <= last; t += 2)
                panel(pw, ws + n, xq + t * Kp, xs + t, pb, out + t * N + n, N, Kp, rows, 2);
            for (; t < last; t++) panel(pw, ws + n, xq + t * Kp, xs + t, pb, out + t * N + n, N, Kp, rows, 1);
        }
    }
}

/* ---- norm, activation, rotation: one pass each ----------------------------------------------------------------- */

/* x += delta unless delta is null, then out [T, K] = x / sqrt(mean(x^2) + eps) * weight; all contiguous. */
void octavo_rms_norm(float *x, const float *delta, const float *weight, float eps, float *out, long T, long K) {
#pragma omp parallel for schedule(static) if (T * K > 32768)
    for (long t = 0; t < T; t++) {
        float *restrict row = x + t * K;
        if (delta)
            for (long k = 0; k < K; k++) row[k] += delta[t * K + k];
        float squares = 0.f;
        for (long k = 0; k < K; k++) squares += row[k] * row[k];
        const float scale = 1.f / sqrtf(squares / (float)K + eps);
        for (long k = 0; k < K; k++) out[t * K + k] = row[k] * scale * weight[k];
    }
}

/* exp for arguments <= 0, relative error below 2e-7; branch-free so that loops over it become vector code. */
INLINE float exp_negative(float x) {
    x = x < -87.f ? -87.f : x;
    const float n = rintf(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.f / 5040.f;
    p = p * r + 1.f / 720.f;
    p = p * r + 1.f / 120.f;
    p = p * r + 1.f / 24.f;
    p = p * r + 1.f / 6.f;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    union { int32_t i; float f; } power = {((int32_t)n + 127) << 23};
    return p * power.f;
}

/* out [T, F] = silu(x[:, :F]) * x[:, F:]. */
void octavo_silu_and_mul(const float *x, float *out, long T, long F) {
#pragma omp parallel for schedule(static) if (T * F > 16384)
    for (long t = 0; t < T; t++) {
        const float *gate = x + t * 2 * F, *up = gate + F;
        for (long f = 0; f < F; f++) {
            const float e = exp_negative(-fabsf(gate[f]));
            const float sigmoid = (gate[f] >= 0.f ? 1.f : e) / (1.f + e);
            out[t * F + f] = gate[f] * sigmoid * up[f];
        }
    }
}

/* Rotate neighbouring pairs of the first R numbers of each head of x [T, H, D] (tokens ldx apart), in place.
 * rotation [T, R / 2] complex. */
void octavo_rotate(float *x, long ldx, const float *rotation, long T, long H, long D, long R) {
#pragma omp parallel for schedule(static) if (T * H * D > 32768)
    for (long t = 0; t < T; t++)
        for (long h = 0; h < H; h++) {
            float *head = x + t * ldx + h * D;
            const float *by = rotation + t * R;
            for (long i = 0; i < R; i += 2) {
                const float a = head[i], b = head[i + 1];
                head[i] = a * by[i] - b * by[i + 1];
                head[i + 1] = a * by[i + 1] + b * by[i];
            }
        }
}

/* ---- attention of single queries over a paged cache ------------------------------------------------------------ */

#define SPAN 64 /* keys of one task: fixed, so that sums do not depend on the batch; few enough to stay in cache */

typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));
INLINE float sum8(vec8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
#define AT(p) (*(vec8 *)(p))

/* scores[r * SPAN] of R queries that share one key. */
INLINE void score(const float *q, const float *key, long D, float scale, float *scores, const int R) {
    vec8 acc[4] = {{0}, {0}, {0}, {0}};
    for (long d = 0; d < D; d += 8)
        for (int r = 0; r < R; r++) acc[r] += AT(q + r * D + d) * AT(key + d);
    for (int r = 0; r < R; r++) scores[r * SPAN] = sum8(acc[r]) * scale;
}

/* sums[r * width] += the weighted values of up to 8 keys, for R queries that share them. */
INLINE void weigh(const float *const *values, long count, long offset, const float *weights, float *sums, long width,
                  long D, const int R) {
    for (long d = 0; d < D; d += 8) {
        vec8 acc[4];
        for (int r = 0; r < R; r++) acc[r] = AT(sums + r * width + d);
        for (long j = 0; j < count; j++) {
            const vec8 value = AT(values[j] + offset + d);
            for (int r = 0; r < R; r++) acc[r] += weights[r * SPAN + j] * value;
        }
        for (int r = 0; r < R; r++) AT(sums + r * width + d) = acc[r];
    }
}

/* Calls f for the queries of one KV head in fours, with their number as a constant. */
#define BY_FOURS(group, f, ...)                                              \
    for (long first_ = 0; first_ < (group); first_ += 4) {                   \
        const long h = g * (group) + first_;                                 \
        switch ((group) - first_) {                                          \
            case 1: f(__VA_ARGS__, 1); break;                                \
            case 2: f(__VA_ARGS__, 2); break;                                \
            case 3: f(__VA_ARGS__, 3); break;                                \
            default: f(__VA_ARGS__, 4);                                      \
        }                                                                    \
    }

/* All heads of one query over at most SPAN keys: per head maximum, sum of exponentials, D weighted values. Keys are
 * visited once, in order, all heads together, so that memory is read in long runs. D is a multiple of 8; scores:
 * H * SPAN floats. */
static void attend_span(const float *q, const float *cache, const int32_t *table, long first, long count, long P,
                        long H, long G, long D, float scale, float *scores, float *partial) {
    const long stride = 2 * G * D, group = H / G, width = D + 2;
    const float *keys[SPAN], *values[SPAN];
    for (long j = 0; j < count; j++) {
        const long position = first + j;
        keys[j] = cache + ((long)table[position / P] * P + position % P) * stride;
        values[j] = keys[j] + G * D;
    }
    for (long j = 0; j < count; j++) {
        for (long d = 0; d < G * D; d += 16) __builtin_prefetch(values[j] + d);
        for (long g = 0; g < G; g++)
            BY_FOURS(group, score, q + h * D, keys[j] + g * D, D, scale, scores + h * SPAN + j)
    }
    for (long h = 0; h < H; h++) {
        float *row = scores + h * SPAN, *to = partial + h * width, high = -INFINITY, sum = 0.f;
        for (long j = 0; j < count; j++) high = larger(high, row[j]);
        for (long j = 0; j < count; j++) row[j] = exp_negative(row[j] - high);
        for (long j = 0; j < count; j++) sum += row[j];
        to[0] = high;
        to[1] = sum;
        memset(to + 2, 0, sizeof(float) * (size_t)D);
    }
    for (long j = 0; j < count; j += 8) {
        const long few = count - j < 8 ? count - j : 8;
        for (long g = 0; g < G; g++)
            BY_FOURS(group, weigh, values + j, few, g * D, scores + h * SPAN + j, partial + h * width + 2, width, D)
    }
}

/* B single queries: q rows [H, D] at q + query_index[b] * ldq, out likewise; keys [starts[b], lens[b]) of request b
 * through block_table [B, ldt]; cache [N, P, 2, G, D]. tasks: [num_tasks, 2] (request, span index), first_task:
 * [B + 1]. scratch: (num_tasks * (D + 2) + threads * SPAN) * H floats. */
void octavo_decode_attention(const float *q, long ldq, float *out, long ldo, const float *cache,
                             const int32_t *block_table, long ldt, const int32_t *query_index, const int32_t *starts,
                             const int32_t *lens, const int32_t *tasks, const int32_t *first_task, long B,
                             long num_tasks, long H, long G, long D, long P, float scale, const float *sinks,
                             float *scratch) {
    const long width = D + 2;
#pragma omp parallel
    {
        float *scores = scratch + num_tasks * H * width + omp_get_thread_num() * H * SPAN;
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < num_tasks; task++) {
            const long b = tasks[2 * task], first = starts[b] + (long)tasks[2 * task + 1] * SPAN;
            const long count = lens[b] - first < SPAN ? lens[b] - first : SPAN;
            attend_span(q + query_index[b] * ldq, cache, block_table + b * ldt, first, count, P, H, G, D, scale,
                        scores, scratch + task * H * width);
        }
#pragma omp for schedule(static)
        for (long i = 0; i < B * H; i++) {
            const long b = i / H, h = i % H;
            float *to = out + query_index[b] * ldo + h * D;
            // A sink is a score that takes its part of the weight and has no value.
            float high = sinks ? sinks[h] : -INFINITY, sum = 0.f;
            for (long task = first_task[b]; task < first_task[b + 1]; task++)
                high = larger(high, scratch[(task * H + h) * width]);
            if (sinks) sum = exp_negative(sinks[h] - high);
            for (long d = 0; d < D; d++) to[d] = 0.f;
            for (long task = first_task[b]; task < first_task[b + 1]; task++) {
                const float *partial = scratch + (task * H + h) * width;
                const float weight = exp_negative(partial[0] - high);
                sum += weight * partial[1];
                for (long d = 0; d < D; d++) to[d] += weight * partial[d + 2];
            }
            for (long d = 0; d < D; d++) to[d] /= sum;
        }
    }
}

/* Copy k and v [T, G * D] (tokens ldk, ldv apart) to slots[t] of cache [N * P, 2, G, D]; -1 is skipped. */
void octavo_write_kv(const float *k, long ldk, const float *v, long ldv, float *cache, const int64_t *slots, long T,
                     long size) {
    for (long t = 0; t < T; t++) {
        if (slots[t] < 0) continue;
        memcpy(cache + slots[t] * 2 * size, k + t * ldk, sizeof(float) * (size_t)size);
        memcpy(cache + slots[t] * 2 * size + size, v + t * ldv, sizeof(float) * (size_t)size);
    }
}
