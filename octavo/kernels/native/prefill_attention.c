/* Attention of prompts over a paged cache: blocks of queries against blocks of keys with a running softmax, so that no
 * matrix of all scores exists. Paper: Dao et al., "FlashAttention", 2022. Single queries: see decode_attention.c.
 *
 * A task is QUERIES consecutive queries of one request and the query heads of one KV head. Blocks of keys lie at
 * multiples of KEYS positions whatever the chunk, so that a query's result does not depend on how its prompt was cut.
 */
#include "common.h"

#define QUERIES 96 /* of a task; a multiple of TOKENS on x86 */
#define KEYS 64 /* of a block; a multiple of COLUMNS */

/* scores [C, KEYS] = q [C, D] (ldq apart) times keys; keys: [KEYS / 16, D, 16]. */
INLINE void score_tile(const float *q, long ldq, const float *keys, long D, float scale, float *scores, const int C) {
    for (long j = 0; j < KEYS; j += COLUMNS, keys += D * COLUMNS) {
        vecf acc[TOKENS][VECTORS];
        for (int c = 0; c < C; c++)
            for (int v = 0; v < VECTORS; v++) acc[c][v] = (vecf){0};
        for (long d = 0; d < D; d++)
            for (int c = 0; c < C; c++)
                for (int v = 0; v < VECTORS; v++)
                    acc[c][v] += *(const vecf *)(keys + d * COLUMNS + v * LANES) * q[c * ldq + d];
        for (int c = 0; c < C; c++)
            for (int v = 0; v < VECTORS; v++) *(vecf *)(scores + c * KEYS + j + v * LANES) = acc[c][v] * scale;
    }
}

/* sums [C, D] = sums * keep [C] + weights [C, KEYS] times values; values: [D / 16, KEYS, 16]. */
INLINE void weigh_tile(const float *weights, const float *values, const float *keep, long count, long D, float *sums,
                       const int C) {
    for (long d = 0; d < D; d += COLUMNS, values += KEYS * COLUMNS) {
        vecf acc[TOKENS][VECTORS];
        for (int c = 0; c < C; c++)
            for (int v = 0; v < VECTORS; v++) acc[c][v] = *(const vecf *)(sums + c * D + d + v * LANES) * keep[c];
        for (long j = 0; j < count; j++)
            for (int c = 0; c < C; c++)
                for (int v = 0; v < VECTORS; v++)
                    acc[c][v] += *(const vecf *)(values + j * COLUMNS + v * LANES) * weights[c * KEYS + j];
        for (int c = 0; c < C; c++)
            for (int v = 0; v < VECTORS; v++) *(vecf *)(sums + c * D + d + v * LANES) = acc[c][v];
    }
}

/* Exponentials of a row of scores against the running maximum. Keys [from, to) of the block are visible. Returns by how
 * much earlier sums shrink. */
INLINE float soften(float *row, long from, long to, float *high, float *sum) {
    if (to <= from) { /* nothing to see yet, or not any more */
        memset(row, 0, sizeof(float) * KEYS);
        return 1.f;
    }
    for (long j = 0; j < from; j++) row[j] = -INFINITY;
    for (long j = to; j < KEYS; j++) row[j] = -INFINITY;
    float top = *high, total = 0.f;
    for (long j = 0; j < KEYS; j++) top = larger(top, row[j]);
    for (long j = 0; j < KEYS; j++) row[j] = exp_negative(row[j] - top);
    for (long j = 0; j < from; j++) row[j] = 0.f; /* not the smallest number that exp_negative returns */
    for (long j = to; j < KEYS; j++) row[j] = 0.f;
    for (long j = 0; j < KEYS; j++) total += row[j];
    const float keep = exp_negative(*high - top);
    *high = top;
    *sum = *sum * keep + total;
    return keep;
}

/* Keys and values of one KV head at positions [first, first + KEYS) into tiles; those from `end` on become zeros. */
static void gather(const float *cache, const int32_t *table, long first, long end, long g, long G, long D, long P,
                   float *keys, float *values) {
    for (long j = 0; j < KEYS; j++) {
        const long position = first + j;
        if (position >= end) {
            for (long d = 0; d < D; d++) keys[(j / COLUMNS * D + d) * COLUMNS + j % COLUMNS] = 0.f;
            for (long d = 0; d < D; d++) values[(d / COLUMNS * KEYS + j) * COLUMNS + d % COLUMNS] = 0.f;
            continue;
        }
        const float *key = cache + (((long)table[position / P] * P + position % P) * 2 * G + g) * D;
        const float *value = key + G * D;
        for (long d = 0; d < D; d++) keys[(j / COLUMNS * D + d) * COLUMNS + j % COLUMNS] = key[d];
        for (long d = 0; d < D; d += COLUMNS)
            memcpy(values + (d / COLUMNS * KEYS + j) * COLUMNS, value + d, sizeof(float) * COLUMNS);
    }
}

/* Queries of S spans of requests. span s: rows [spans[s].row, + count) of q and out [T, H, D], the first at position
 * spans[s].position of request spans[s].request in block_table [B, ldt]; cache [N, P, 2, G, D]. window: keys that a
 * query sees, itself included, 0 for all. tasks: [num_tasks, 2] (span, first query in it). sinks: [H] or null. D is a
 * multiple of 16. scratch: octavo_prefill_scratch(). */
typedef struct { int32_t row, count, position, request; } Span;

/* Floats of working memory of a thread. */
INLINE long workspace(long group, long D) {
    return 2 * KEYS * D + TOKENS * KEYS + group * QUERIES * (D + 2) + TOKENS + 64;
}

long octavo_prefill_scratch(long H, long G, long D) {
    return (long)sizeof(float) * omp_get_max_threads() * workspace(H / G, D);
}

static void attend_block(const float *q, long ldq, float *out, long ldo, const float *cache, const int32_t *table,
                         long position, long count, long g, long H, long G, long D, long P, long window, float scale,
                         const float *sinks, float *work) {
    const long group = H / G, rows = group * QUERIES, end = position + count;
    float *keys = work, *values = keys + KEYS * D, *scores = values + KEYS * D, *keep = scores + TOKENS * KEYS;
    float *highs = keep + TOKENS, *totals = highs + rows, *sums = totals + rows;
    for (long i = 0; i < rows; i++) highs[i] = -INFINITY, totals[i] = 0.f;
    memset(sums, 0, sizeof(float) * (size_t)(rows * D));
    const long begin = window && position + 1 > window ? position + 1 - window : 0;
    for (long first = begin / KEYS * KEYS; first < end; first += KEYS) {
        gather(cache, table, first, end, g, G, D, P, keys, values);
        for (long h = 0; h < group; h++)
            for (long i = 0; i < count; i += TOKENS) {
                const long few = smaller(count - i, TOKENS), at = h * QUERIES + i;
                const long last = position + i + few - 1; /* of the tile: keys behind it need no product */
                if (last < first) continue;
                const float *from = q + i * ldq + (g * group + h) * D;
                WITH_ROWS(few, score_tile(from, ldq, keys, D, scale, scores, C))
                for (long c = 0; c < few; c++) {
                    const long own = position + i + c, to = smaller(own + 1 - first, KEYS);
                    const long low = window ? own + 1 - window - first : 0;
                    keep[c] = soften(scores + c * KEYS, low > 0 ? low : 0, to, highs + at + c, totals + at + c);
                }
                const long used = smaller(last + 1 - first, KEYS);
                WITH_ROWS(few, weigh_tile(scores, values, keep, used, D, sums + at * D, C))
            }
    }
    for (long h = 0; h < group; h++)
        for (long i = 0; i < count; i++) {
            const long at = h * QUERIES + i, head = g * group + h;
            float factor = 1.f, total = totals[at];
            if (sinks) { /* a score that takes its part of the weight and has no value */
                const float high = larger(highs[at], sinks[head]);
                factor = exp_negative(highs[at] - high);
                total = total * factor + exp_negative(sinks[head] - high);
            }
            for (long d = 0; d < D; d++) out[i * ldo + head * D + d] = sums[at * D + d] * factor / total;
        }
}

void octavo_prefill_attention(const float *q, long ldq, float *out, long ldo, const float *cache,
                              const int32_t *block_table, long ldt, const Span *spans, const int32_t *tasks,
                              long num_tasks, long H, long G, long D, long P, long window, float scale,
                              const float *sinks, float *scratch) {
#pragma omp parallel
    {
        float *work = scratch + omp_get_thread_num() * workspace(H / G, D);
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < num_tasks * G; task++) {
            const Span span = spans[tasks[2 * (task / G)]];
            const long start = tasks[2 * (task / G) + 1], g = task % G;
            attend_block(q + (span.row + start) * ldq, ldq, out + (span.row + start) * ldo, ldo, cache,
                         block_table + span.request * ldt, span.position + start,
                         smaller(span.count - start, QUERIES), g, H, G, D, P, window, scale, sinks, work);
        }
    }
}
