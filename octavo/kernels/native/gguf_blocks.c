/* Blocks of GGUF files to float32, one thread per call: the loader runs several. Reference: gguf.quants.dequantize, to
 * the last bit (but for the sign of zeros). Layouts: ggml's block_q* structures; all little endian, packed.
 */
#include "common.h"

INLINE float half(const uint8_t *p) {
    const uint32_t bits = p[0] | (uint32_t)p[1] << 8, sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    union { uint32_t i; float f; } wide;
    if (magnitude >= 0x7c00)
        wide.i = 0x7f800000 | (magnitude & 0x3ff) << 13; /* infinite or not a number */
    else {
        wide.i = magnitude << 13;
        wide.f *= 0x1p112f; /* moves the exponent's bias; right for subnormal numbers too */
    }
    wide.i |= sign;
    return wide.f;
}

/* 32 numbers whose lower four bits are in 16 bytes, and whose fifth, if any, in 32 bits. */
INLINE void five_bits(const uint8_t *low, uint32_t high, int zero, float scale, float start, float *out) {
    for (int j = 0; j < 16; j++) {
        out[j] = scale * (float)((int)((low[j] & 15) | (high >> j & 1) << 4) - zero) + start;
        out[j + 16] = scale * (float)((int)(low[j] >> 4 | (high >> (j + 16) & 1) << 4) - zero) + start;
    }
}

INLINE uint32_t word(const uint8_t *p) {
    uint32_t value;
    memcpy(&value, p, 4);
    return value;
}

static void q4_0(const uint8_t *b, float *out) { five_bits(b + 2, 0, 8, half(b), 0.f, out); }
static void q4_1(const uint8_t *b, float *out) { five_bits(b + 4, 0, 0, half(b), half(b + 2), out); }
static void q5_0(const uint8_t *b, float *out) { five_bits(b + 6, word(b + 2), 16, half(b), 0.f, out); }
static void q5_1(const uint8_t *b, float *out) { five_bits(b + 8, word(b + 4), 0, half(b), half(b + 2), out); }
static void q8_0(const uint8_t *b, float *out) {
    const float scale = half(b);
    for (int j = 0; j < 32; j++) out[j] = scale * (float)(int8_t)b[2 + j];
}

/* Six-bit scale and minimum of each of eight groups of 32, in 12 bytes. */
INLINE void six_bits(const uint8_t *b, int group, float *scale, float *low) {
    if (group < 4) {
        *scale = b[group] & 63;
        *low = b[group + 4] & 63;
    } else {
        *scale = (b[group + 4] & 15) | b[group - 4] >> 6 << 4;
        *low = b[group + 4] >> 4 | b[group] >> 6 << 4;
    }
}

INLINE void q4_or_q5_k(const uint8_t *b, float *out, const int has_fifth) {
    const float d = half(b), least = half(b + 2);
    const uint8_t *fifth = b + 16, *low = fifth + (has_fifth ? 32 : 0);
    for (int group = 0; group < 8; group++, out += 32) {
        float scale, minimum;
        six_bits(b + 4, group, &scale, &minimum);
        scale *= d;
        minimum *= least;
        const uint8_t *from = low + group / 2 * 32;
        for (int j = 0; j < 32; j++) {
            int q = group % 2 ? from[j] >> 4 : from[j] & 15;
            if (has_fifth) q |= (fifth[j] >> group & 1) << 4;
            out[j] = scale * (float)q - minimum;
        }
    }
}

static void q4_k(const uint8_t *b, float *out) { q4_or_q5_k(b, out, 0); }
static void q5_k(const uint8_t *b, float *out) { q4_or_q5_k(b, out, 1); }

static void q6_k(const uint8_t *b, float *out) {
    const float d = half(b + 208);
    for (int group = 0; group < 8; group++) { /* of 32 numbers with two scales */
        const uint8_t *low = b + group / 4 * 64 + group % 2 * 32, *high = b + 128 + group / 4 * 32;
        const int8_t *scales = (const int8_t *)(b + 192) + 2 * group;
        for (int j = 0; j < 32; j++) {
            const int q = (group % 4 < 2 ? low[j] & 15 : low[j] >> 4) | (high[j] >> 2 * (group % 4) & 3) << 4;
            out[32 * group + j] = d * (float)scales[j / 16] * (float)(q - 32);
        }
    }
}

/* Number of the type in GGUF files to what decodes a block of it; `values` and `bytes` of a block. */
void octavo_dequantize(int type, const uint8_t *blocks, float *out, long num_blocks) {
    static const struct { void (*decode)(const uint8_t *, float *); int values, bytes; } kinds[15] = {
        [2] = {q4_0, 32, 18},   [3] = {q4_1, 32, 20},    [6] = {q5_0, 32, 22},    [7] = {q5_1, 32, 24},
        [8] = {q8_0, 32, 34},   [12] = {q4_k, 256, 144}, [13] = {q5_k, 256, 176}, [14] = {q6_k, 256, 210},
    };
    for (long i = 0; i < num_blocks; i++)
        kinds[type].decode(blocks + i * kinds[type].bytes, out + i * kinds[type].values);
}
