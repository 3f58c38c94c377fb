// Packed weights W [N, K] and their products y = x W^T with few rows x [M, K].
//
// W is cut into panels of 16 outputs. A panel is a run of cells, each 16 outputs by 64 inputs, so a slice of outputs is
// one contiguous piece, and a prefix of inputs is one contiguous piece of each panel. Inside a cell the 16 outputs
// lie side by side (one lane each), so no sum across lanes is ever needed:
//
//   float32, float16   [64 inputs][16]
//   bfloat16           [32 pairs][16][2]
//   int8               [16 quads][16][4], weight + 128; a scale for each output, kept apart
//   int4, group g      [64 / g] of: scales [16] and least values [16] as float16, then quads [g / 8][16][4]: low half of
//                      each byte from the first g / 2 inputs of the group, high half from the others
//
// Padding (outputs to 16, inputs to 64) is zero weights; activations are padded with zeros too.
#pragma once

#include <vector>

#include "pool.h"
#include "simd.h"

enum Format { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kInt4 = 4 };

constexpr int kLanes = 16, kCell = 64, kActivationGroup = 32;

struct Matrix {
    const uint8_t* data;
    const float* scales;  // [N rounded up to 16], int8 only
    int32_t format;
    int32_t group;  // of int4: 32 or 64
    int32_t rows;   // N
    int32_t cols;   // K
    int64_t cell_bytes;
    int64_t panel_bytes;

    int panels() const { return (rows + kLanes - 1) / kLanes; }
    int cells() const { return (cols + kCell - 1) / kCell; }
};

INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Activations x [M, K] in the form that a format multiplies: floats, pairs of bfloat16, or bytes with a scale for each
// 32 of them.
struct Input {
    int width = 0;  // K rounded up to a cell
    std::vector<float> floats;
    std::vector<uint32_t> pairs;
    std::vector<int8_t> bytes;
    std::vector<float> scales, sums;  // [M, width / 32]: of the bytes, and scale * sum of bytes

    static bool is_paired(int format) {
#if LEVEL_AVX512
        return format == kBFloat16;
#else
        return false;
#endif
    }

    static bool is_quantised(int format) { return format == kInt8 || format == kInt4; }

    void reserve(int format, int num_rows, int cols) {
        width = round_up(cols, kCell);
        size_t n = (size_t)num_rows * width;
        if (is_quantised(format)) {
            if (bytes.size() < n) bytes.resize(n);
            if (scales.size() < n / kActivationGroup) scales.resize(n / kActivationGroup), sums.resize(n / kActivationGroup);
        } else if (is_paired(format)) {
            if (pairs.size() < n / 2) pairs.resize(n / 2);
        } else if (floats.size() < n) {
            floats.resize(n);
        }
    }

    // Columns [begin, begin + 64) of one row, of which `count` are there.
    void set_cell(int format, int row, int begin, const float* x, int count) {
        alignas(64) float part[kCell];
        if (count < kCell) {
            memset(part, 0, sizeof part);
            if (count > 0) memcpy(part, x, count * sizeof(float));
            x = part;
        }
        size_t at = (size_t)row * width + begin;
        if (is_quantised(format))
            for (int g = 0; g < kCell; g += kActivationGroup) quantise(at + g, x + g);
        else if (is_paired(format))
            for (int i = 0; i < kCell; i += 32) set_pairs(&pairs[(at + i) / 2], x + i);
        else
            memcpy(&floats[at], x, kCell * sizeof(float));
    }

    void set_row(int format, int row, const float* x, int cols) {
        for (int k = 0; k < width; k += kCell) set_cell(format, row, k, x + k, cols - k < kCell ? cols - k : kCell);
    }

private:
    static void set_pairs(uint32_t* to, const float* x) {
#if LEVEL_AVX512
        __m512bh both = _mm512_cvtne2ps_pbh((__m512)load(x + 16), (__m512)load(x));
        memcpy(to, &both, 64);
#else
        for (int i = 0; i < 16; i++)
            to[i] = float_to_bfloat(x[2 * i]) | (uint32_t)float_to_bfloat(x[2 * i + 1]) << 16;
#endif
    }

    void quantise(size_t at, const float* x) {
        F16 a = load(x), b = load(x + 16);
        float top = largest(larger(larger(a, -a), larger(b, -b)));
        float scale = top / 127, inverse = top > 0 ? 127 / top : 0;
        const float shift = 12582912.0f;
        I16 qa, qb;
        F16 ta = a * inverse + shift, tb = b * inverse + shift;
        memcpy(&qa, &ta, sizeof qa);
        memcpy(&qb, &tb, sizeof qb);
        qa -= 0x4b400000;
        qb -= 0x4b400000;
        int32_t total = 0;
        int8_t* q = &bytes[at];
#if LEVEL_AVX512
        _mm_storeu_si128((__m128i*)q, _mm512_cvtepi32_epi8((__m512i)qa));
        _mm_storeu_si128((__m128i*)(q + 16), _mm512_cvtepi32_epi8((__m512i)qb));
        total = _mm512_reduce_add_epi32((__m512i)(qa + qb));
#else
        for (int i = 0; i < 16; i++) q[i] = (int8_t)qa[i], q[16 + i] = (int8_t)qb[i];
        I16 both = qa + qb;
        for (int i = 0; i < 16; i++) total += both[i];
#endif
        scales[at / kActivationGroup] = scale;
        sums[at / kActivationGroup] = scale * total;
    }
};

INLINE int32_t quad_at(const int8_t* p) {
    int32_t q;
    memcpy(&q, p, 4);
    return q;
}

// -- one panel with R rows: acc[r] = the 16 outputs of row r

constexpr int kFetched = 4096;  // bytes ahead of a panel's reading, to the second cache: the first cannot ask for so many

// Several rows keep the processor busy with so many products that it does not look far enough ahead by itself; for one
// or two it does, and asking costs more than it brings.
template <int R>
INLINE void fetch_ahead(const uint8_t* w) {
    if (R > 2) __builtin_prefetch(w + kFetched, 0, 2);
}

template <int R>
INLINE void panel_float32(const uint8_t* w, const Input& in, int row, int cells, F16* acc) {
    F16 a[R][2]{};
    const float* x = &in.floats[(size_t)row * in.width];
    for (int c = 0; c < cells; c++, w += kCell * 64, x += kCell) {
        __builtin_prefetch(w + 8192);
        for (int k = 0; k < kCell; k += 2) {
            F16 w0 = load((const float*)(w + k * 64)), w1 = load((const float*)(w + k * 64 + 64));
            for (int r = 0; r < R; r++) {
                a[r][0] += w0 * x[r * in.width + k];
                a[r][1] += w1 * x[r * in.width + k + 1];
            }
        }
    }
    for (int r = 0; r < R; r++) acc[r] = a[r][0] + a[r][1];
}

template <int R>
INLINE void panel_float16(const uint8_t* w, const Input& in, int row, int cells, F16* acc) {
    F16 a[R][2]{};
    const float* x = &in.floats[(size_t)row * in.width];
    for (int c = 0; c < cells; c++, w += kCell * 32, x += kCell)
        for (int k = 0; k < kCell; k += 2) {
            F16 w0 = load_half((const uint16_t*)(w + k * 32)), w1 = load_half((const uint16_t*)(w + k * 32 + 32));
            for (int r = 0; r < R; r++) {
                a[r][0] += w0 * x[r * in.width + k];
                a[r][1] += w1 * x[r * in.width + k + 1];
            }
        }
    for (int r = 0; r < R; r++) acc[r] = a[r][0] + a[r][1];
}

template <int R>
INLINE void panel_bfloat16(const uint8_t* w, const Input& in, int row, int cells, F16* acc) {
    F16 a[R][2]{};
#if LEVEL_AVX512
    const uint32_t* x = &in.pairs[(size_t)row * in.width / 2];
    const int stride = in.width / 2;
    for (int c = 0; c < cells; c++, w += kCell * 32, x += kCell / 2)
        for (int k = 0; k < kCell / 2; k += 2) {
            fetch_ahead<R>(w + k * 64), fetch_ahead<R>(w + k * 64 + 64);
            for (int r = 0; r < R; r++) {
                a[r][0] = dot_pairs(a[r][0], w + k * 64, x[r * stride + k]);
                a[r][1] = dot_pairs(a[r][1], w + k * 64 + 64, x[r * stride + k + 1]);
            }
        }
#else
    const float* x = &in.floats[(size_t)row * in.width];
    for (int c = 0; c < cells; c++, w += kCell * 32, x += kCell)
        for (int k = 0; k < kCell; k += 2) {
            F16 even, odd;
            split_pairs(w + k * 32, even, odd);
            for (int r = 0; r < R; r++) {
                a[r][0] += even * x[r * in.width + k];
                a[r][1] += odd * x[r * in.width + k + 1];
            }
        }
#endif
    for (int r = 0; r < R; r++) acc[r] = a[r][0] + a[r][1];
}

template <int R>
INLINE void panel_int8(const uint8_t* w, const Input& in, int row, int cells, F16* acc) {
    const size_t first = (size_t)row * in.width;
    const int groups = in.width / kActivationGroup;
    F16 a[R]{};
    const int8_t* x = &in.bytes[first];
    const float *scales = &in.scales[first / kActivationGroup], *sums = &in.sums[first / kActivationGroup];
    for (int g = 0; g < 2 * cells; g++, w += 512, x += 32) {
        I16 t[R]{};
        for (int q = 0; q < 8; q++) {
            I16 v = load_bytes(w + q * 64);
            for (int r = 0; r < R; r++) t[r] = dot_quads(t[r], v, quad_at(x + r * in.width + q * 4));
        }
        for (int r = 0; r < R; r++)
            a[r] += __builtin_convertvector(t[r], F16) * scales[r * groups + g] - kBytesBias * sums[r * groups + g];
    }
    for (int r = 0; r < R; r++) acc[r] = a[r];
}

template <int R, int Group>
INLINE void panel_int4(const uint8_t* w, const Input& in, int row, int cells, F16* acc) {
    const size_t first = (size_t)row * in.width;
    const int groups = in.width / kActivationGroup;
    F16 a[R]{};
    const int8_t* x = &in.bytes[first];
    const float *scales = &in.scales[first / kActivationGroup], *sums = &in.sums[first / kActivationGroup];
    for (int g = 0; g < cells * kCell / Group; g++, w += 64 + Group * 8) {
        F16 scale = load_half((const uint16_t*)w), least = load_half((const uint16_t*)(w + 32));
        I16 low[R]{}, high[R]{};
        for (int q = 0; q < Group / 8; q++) {
            I16 v = load_bytes(w + 64 + q * 64);
            I16 v0 = v & 0x0f0f0f0f, v1 = (v >> 4) & 0x0f0f0f0f;
            for (int r = 0; r < R; r++) {
                low[r] = dot_small_quads(low[r], v0, quad_at(x + r * in.width + q * 4));
                high[r] = dot_small_quads(high[r], v1, quad_at(x + r * in.width + Group / 2 + q * 4));
            }
        }
        for (int r = 0; r < R; r++) {
            const float *s = scales + r * groups, *m = sums + r * groups;
            if (Group == 32)
                a[r] += __builtin_convertvector(low[r] + high[r], F16) * (scale * s[0]) + least * m[0];
            else
                a[r] += (__builtin_convertvector(low[r], F16) * s[0] + __builtin_convertvector(high[r], F16) * s[1]) * scale +
                        least * (m[0] + m[1]);
        }
        x += Group;
        scales += Group / kActivationGroup;
        sums += Group / kActivationGroup;
    }
    for (int r = 0; r < R; r++) acc[r] = a[r];
}

template <int R>
static void panel(const Matrix& m, int index, const Input& in, int row, int cells, F16* acc) {
    const uint8_t* w = m.data + index * m.panel_bytes;
    switch (m.format) {
        case kFloat32: return panel_float32<R>(w, in, row, cells, acc);
        case kBFloat16: return panel_bfloat16<R>(w, in, row, cells, acc);
        case kFloat16: return panel_float16<R>(w, in, row, cells, acc);
        case kInt8: {
            panel_int8<R>(w, in, row, cells, acc);
            F16 scale = load(m.scales + index * kLanes);
            for (int r = 0; r < R; r++) acc[r] *= scale;
            return;
        }
        default:
            if (m.group == 32) return panel_int4<R, 32>(w, in, row, cells, acc);
            return panel_int4<R, 64>(w, in, row, cells, acc);
    }
}

constexpr int kMostRows = 8;  // at once: what the registers hold, so that a check of a few tokens reads weights once

// Rows [row, row + count) of one panel; `take(r, F16)` gets each row's 16 outputs. Only the first `cells` cells of the
// inputs are read.
template <class Take>
INLINE void panel_rows(const Matrix& m, int index, const Input& in, int row, int count, int cells, Take&& take) {
    F16 acc[kMostRows];
    for (; count > 0; row += kMostRows, count -= kMostRows) {
        const int n = count < kMostRows ? count : kMostRows;
        switch (n) {
            case 1: panel<1>(m, index, in, row, cells, acc); break;
            case 2: panel<2>(m, index, in, row, cells, acc); break;
            case 3: panel<3>(m, index, in, row, cells, acc); break;
            case 4: panel<4>(m, index, in, row, cells, acc); break;
            case 5: panel<5>(m, index, in, row, cells, acc); break;
            case 6: panel<6>(m, index, in, row, cells, acc); break;
            case 7: panel<7>(m, index, in, row, cells, acc); break;
            default: panel<8>(m, index, in, row, cells, acc);
        }
        for (int r = 0; r < n; r++) take(row + r, acc[r]);
    }
}

// y[:, start:stop] = x W[start:stop]^T + bias for this thread's share of the panels; y [M, stride] at column `start`.
static void multiply(const Matrix& m, const Input& in, int num_rows, int start, int stop, const float* bias, float* y,
                     int64_t stride, bool is_added, Team& team, int thread) {
    int first = start / kLanes, last = (stop + kLanes - 1) / kLanes;
    const Share share = team.share(last - first, thread);
    for (int p = first + share.begin; p < first + share.end; p++) {
        int begin = p * kLanes > start ? p * kLanes : start;
        int end = (p + 1) * kLanes < stop ? (p + 1) * kLanes : stop;
        int skip = begin - p * kLanes, n = end - begin;
        panel_rows(m, p, in, 0, num_rows, m.cells(), [&](int r, F16 v) {
            float* to = y + r * stride + begin - start;
            if (n == kLanes) {
                if (bias) v += load(bias + begin - start);
                store(to, is_added ? v + load(to) : v);
                return;
            }
            float out[kLanes];
            store(out, v);
            for (int i = 0; i < n; i++)
                to[i] = (is_added ? to[i] : 0) + out[skip + i] + (bias ? bias[begin - start + i] : 0);
        });
    }
}
