/* Norm, activation, rotation, writing to the cache: one pass each. */
#include "common.h"

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

/* Copy k and v [T, G * D] (tokens ldk, ldv apart) to slots[t] of cache [N * P, 2, G, D]; -1 is skipped. */
void octavo_write_kv(const float *k, long ldk, const float *v, long ldv, float *cache, const int64_t *slots, long T,
                     long size) {
    for (long t = 0; t < T; t++) {
        if (slots[t] < 0) continue;
        memcpy(cache + slots[t] * 2 * size, k + t * ldk, sizeof(float) * (size_t)size);
        memcpy(cache + slots[t] * 2 * size + size, v + t * ldv, sizeof(float) * (size_t)size);
    }
}
