/* Attention of single queries over a paged cache. Prompts: see prefill_attention.c. */
#include "common.h"

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
            /* A sink is a score that takes its part of the weight and has no value. */
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
