// Sixteen numbers at a time, on any machine.
//
// `F16` and `I16` are the compiler's own vector types: one register with AVX-512, two with AVX2, four with NEON, and
// plain loops elsewhere. What the vector types cannot say (half floats, byte products) has a version for each level.
//
// A "pair" is two neighbouring values of one row in one 32-bit lane; a "quad" is four neighbouring bytes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define LEVEL_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LEVEL_AVX2 1
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));

INLINE F16 splat(float x) { return x - F16{}; }

INLINE F16 load(const float* p) {
    F16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float* p, F16 v) { memcpy(p, &v, sizeof v); }

// The first `n` of sixteen, zeros after them.
INLINE F16 load_part(const float* p, int n) {
    F16 v{};
    memcpy(&v, p, n * sizeof(float));
    return v;
}

INLINE void store_part(float* p, F16 v, int n) { memcpy(p, &v, n * sizeof(float)); }

// The same where n is sixteen nearly always.
INLINE void store_most(float* p, F16 v, int n) { n == 16 ? store(p, v) : store_part(p, v, n); }

INLINE F16 load_most(const float* p, int n) { return n == 16 ? load(p) : load_part(p, n); }

INLINE F16 as_float(U16 v) {
    F16 f;
    memcpy(&f, &v, sizeof f);
    return f;
}

INLINE U16 as_bits(F16 v) {
    U16 u;
    memcpy(&u, &v, sizeof u);
    return u;
}

// As `a > b ? a : b`, which compilers do not see to be one instruction.
INLINE F16 larger(F16 a, F16 b) {
#if LEVEL_AVX512
    return (F16)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

INLINE F16 smaller(F16 a, F16 b) {
#if LEVEL_AVX512
    return (F16)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return a < b ? a : b;
#endif
}

INLINE float sum(F16 v) {
#if LEVEL_AVX512
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s[16];
    memcpy(s, &v, sizeof s);
    for (int n = 8; n; n >>= 1)
        for (int i = 0; i < n; i++) s[i] += s[i + n];
    return s[0];
#endif
}

// Sums of sixteen vectors, lane i that of v[i]: half as many vectors in each round, so far cheaper than one by one.
INLINE F16 sums(const F16* v) {
    F16 a[8], b[4], c[2];
    for (int i = 0; i < 8; i++)
        a[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
               __builtin_shufflevector(v[2 * i], v[2 * i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    for (int i = 0; i < 4; i++)
        b[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(a[2 * i], a[2 * i + 1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    for (int i = 0; i < 2; i++)
        c[i] = __builtin_shufflevector(b[2 * i], b[2 * i + 1], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               __builtin_shufflevector(b[2 * i], b[2 * i + 1], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    return __builtin_shufflevector(c[0], c[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(c[0], c[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

INLINE float largest(F16 v) {
#if LEVEL_AVX512
    return _mm512_reduce_max_ps((__m512)v);
#else
    float s[16];
    memcpy(s, &v, sizeof s);
    for (int n = 8; n; n >>= 1)
        for (int i = 0; i < n; i++) s[i] = s[i] > s[i + n] ? s[i] : s[i + n];
    return s[0];
#endif
}

// -- sixteen-bit floats

INLINE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, bits = (uint32_t)(h & 0x7fff) << 13;
    float f;
    if (bits >= 0x0f800000) {  // infinite, or not a number
        bits += 0x70000000;
        bits |= sign;
        memcpy(&f, &bits, 4);
        return f;
    }
    memcpy(&f, &bits, 4);
    f *= 5.192296858534828e33f;  // 2^112: the exponents' distance; right for subnormal numbers too
    memcpy(&bits, &f, 4);
    bits |= sign;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE F16 load_half(const uint16_t* p) {
#if LEVEL_AVX512
    return (F16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif LEVEL_AVX2
    __m256 v[2] = {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
                   _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
    F16 f;
    memcpy(&f, v, sizeof f);
    return f;
#else
    F16 f;
    for (int i = 0; i < 16; i++) f[i] = half_to_float(p[i]);
    return f;
#endif
}

INLINE uint16_t float_to_half(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    uint32_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (u >= 0x47800000) return (uint16_t)(sign | 0x7c00);  // 65536 and more
    if (u < 0x38800000) {                                   // subnormal: let the adder round
        float magnitude;
        memcpy(&magnitude, &u, 4);
        magnitude += 0.5f;
        uint32_t rounded;
        memcpy(&rounded, &magnitude, 4);
        return (uint16_t)(sign | (rounded - 0x3f000000));
    }
    u += 0xfff + (u >> 13 & 1);  // to the nearest, ties to even
    return (uint16_t)(sign | ((u - 0x38000000) >> 13));
}

INLINE uint16_t float_to_bfloat(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);  // not a number stays one
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

INLINE float bfloat_to_float(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

INLINE F16 load_bfloat(const uint16_t* p) {
#if LEVEL_AVX512
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return (F16)_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
#elif LEVEL_AVX2
    __m256i v[2] = {_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16),
                    _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8))), 16)};
    F16 f;
    memcpy(&f, v, sizeof f);
    return f;
#else
    F16 f;
    for (int i = 0; i < 16; i++) f[i] = bfloat_to_float(p[i]);
    return f;
#endif
}

INLINE void store_bfloat(uint16_t* p, F16 v) {
#if LEVEL_AVX512
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &half, sizeof half);
#else
    for (int i = 0; i < 16; i++) p[i] = float_to_bfloat(v[i]);
#endif
}

INLINE void store_half(uint16_t* p, F16 v) {
#if LEVEL_AVX512
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < 16; i++) p[i] = float_to_half(v[i]);
#endif
}

// Sixteen pairs of bfloat16: the even places, and the odd ones.
INLINE void split_pairs(const uint8_t* p, F16& even, F16& odd) {
    U16 u;
    memcpy(&u, p, sizeof u);
    even = as_float(u << 16);
    odd = as_float(u & 0xffff0000u);
}

#if LEVEL_AVX512
INLINE F16 dot_pairs(F16 acc, const uint8_t* weights, uint32_t pair) {
    __m512i w = _mm512_loadu_si512(weights);
    return (F16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)pair));
}
#endif

// -- bytes

// acc + sum over a quad of unsigned weight times signed activation. `Bias` is what the weights were raised by to make
// them unsigned: the machine's product takes them as they are, and the caller takes Bias * sum(activations) off.
#if LEVEL_AVX512
constexpr int kBytesBias = 128;

INLINE I16 load_bytes(const uint8_t* p) { return (I16)_mm512_loadu_si512(p); }

INLINE I16 dot_quads(I16 acc, I16 weights, int32_t quad) {
    return (I16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weights, _mm512_set1_epi32(quad));
}

INLINE I16 dot_small_quads(I16 acc, I16 weights, int32_t quad) { return dot_quads(acc, weights, quad); }
#elif LEVEL_AVX2
constexpr int kBytesBias = 0;

INLINE I16 load_bytes(const uint8_t* p) {
    I16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

// Weights below 16: sums of two products fit 16 bits.
INLINE I16 dot_small_quads(I16 acc, I16 weights, int32_t quad) {
    __m256i w[2], x = _mm256_set1_epi32(quad), one = _mm256_set1_epi16(1);
    memcpy(w, &weights, sizeof w);
    for (int i = 0; i < 2; i++) w[i] = _mm256_madd_epi16(_mm256_maddubs_epi16(w[i], x), one);
    I16 y;
    memcpy(&y, w, sizeof y);
    return acc + y;
}

// Any byte: magnitude of the weight times the activation with the weight's sign, so that 16 bits suffice.
INLINE I16 dot_quads(I16 acc, I16 weights, int32_t quad) {
    __m256i w[2], x = _mm256_set1_epi32(quad), one = _mm256_set1_epi16(1), bias = _mm256_set1_epi8((char)128);
    memcpy(w, &weights, sizeof w);
    for (int i = 0; i < 2; i++) {
        __m256i s = _mm256_xor_si256(w[i], bias);  // signed again
        w[i] = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(x, s)), one);
    }
    I16 y;
    memcpy(&y, w, sizeof y);
    return acc + y;
}
#else
constexpr int kBytesBias = 128;

INLINE I16 load_bytes(const uint8_t* p) {
    I16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE I16 dot_quads(I16 acc, I16 weights, int32_t quad) {
    uint8_t w[64];
    int8_t x[4];
    memcpy(w, &weights, sizeof w);
    memcpy(x, &quad, sizeof x);
    int32_t y[16];
    for (int i = 0; i < 16; i++)
        y[i] = w[4 * i] * x[0] + w[4 * i + 1] * x[1] + w[4 * i + 2] * x[2] + w[4 * i + 3] * x[3];
    I16 v;
    memcpy(&v, y, sizeof v);
    return acc + v;
}

INLINE I16 dot_small_quads(I16 acc, I16 weights, int32_t quad) { return dot_quads(acc, weights, quad); }
#endif

// -- functions

// e^x to about two units in the last place, for |x| < 87; beyond, the value at the bound.
INLINE F16 exponential(F16 x) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    x = smaller(larger(x, splat(-87.0f)), splat(87.0f));
    F16 t = x * 1.44269504f + shift;
    F16 n = t - shift;
    F16 r = x - n * 0.693145751953125f - n * 1.428606765330187e-6f;
    F16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    U16 scale = (as_bits(t) - 0x4b400000u + 127u) << 23;
    return p * as_float(scale);
}

// 2^x for x <= 0 to about five digits; below 2^-120, that.
INLINE F16 power_of_two(F16 x) {
    const float shift = 12582912.0f;
    x = larger(x, splat(-120.0f));
    F16 t = x + shift;
    F16 r = x - (t - shift);
    F16 p = r * 9.6181291e-3f + 5.5504109e-2f;
    p = p * r + 2.4022651e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
    return as_float(as_bits(p) + (as_bits(t) << 23));
}

enum Activation { kSilu = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3 };

INLINE F16 activate(F16 x, int kind) {
    if (kind == kRelu) return larger(x, F16{});
    if (kind == kGelu) {
        for (int i = 0; i < 16; i++) x[i] *= 0.5f * (1.0f + erff(x[i] * 0.70710678f));
        return x;
    }
    F16 u = kind == kSilu ? x : (x + x * x * x * 0.044715f) * 1.5957691216057308f;  // 2 * sqrt(2 / pi)
    return x / (exponential(-u) + 1.0f);
}
