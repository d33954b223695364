/* What the CPU kernels share. They are plain C over pointers, compiled on the machine that runs them.
 *
 * Every function has a reference in plain torch (named in the Python wrapper) and gives the same result for a row
 * whatever else is in the batch and however many threads run: sums are ordered by position, never by thread.
 * Shapes: T tokens, K inputs, N outputs, B requests, H query heads, G KV heads, D head size, P block size.
 */
#pragma once
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
INLINE long smaller(long a, long b) { return a < b ? a : b; }

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

/* Vectors of floats as the compiler's own type, so that one source serves every instruction set. LANES floats fill a
 * register; a tile of TOKENS rows times 16 columns leaves registers for one column vector and one broadcast. */
#if defined(__AVX512F__)
#define LANES 16
#define TOKENS 12
#elif defined(__AVX2__)
#define LANES 8
#define TOKENS 6
#else
#define LANES 4
#define TOKENS 4
#endif
#define COLUMNS 16
#define VECTORS (COLUMNS / LANES)
typedef float vecf __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

/* Runs `statement` with C as a constant: the number of rows of a tile, 1 to TOKENS. */
#define ONE_CASE(n, statement) case n: { enum { C = n }; statement; } break;
#if TOKENS == 12
#define WITH_ROWS(rows, statement)                                                                                   \
    switch (rows) {                                                                                                  \
        ONE_CASE(1, statement) ONE_CASE(2, statement) ONE_CASE(3, statement) ONE_CASE(4, statement)                  \
        ONE_CASE(5, statement) ONE_CASE(6, statement) ONE_CASE(7, statement) ONE_CASE(8, statement)                  \
        ONE_CASE(9, statement) ONE_CASE(10, statement) ONE_CASE(11, statement)                                       \
        default: { enum { C = 12 }; statement; }                                                                     \
    }
#elif TOKENS == 6
#define WITH_ROWS(rows, statement)                                                                                   \
    switch (rows) {                                                                                                  \
        ONE_CASE(1, statement) ONE_CASE(2, statement) ONE_CASE(3, statement) ONE_CASE(4, statement)                  \
        ONE_CASE(5, statement)                                                                                       \
        default: { enum { C = 6 }; statement; }                                                                      \
    }
#else
#define WITH_ROWS(rows, statement)                                                                                   \
    switch (rows) {                                                                                                  \
        ONE_CASE(1, statement) ONE_CASE(2, statement) ONE_CASE(3, statement)                                         \
        default: { enum { C = 4 }; statement; }                                                                      \
    }
#endif
