// Attention of one token over keys and values in bfloat16, two at a time as the processor multiplies them.
//
// A query is split into two bfloat16 whose sum it is to sixteen bits, so scores lose nothing to rounding; weights of
// values are rounded to one. Two slots' values are interleaved as they are read: then a weight pair serves 16 channels.
#pragma once

#include <algorithm>

#include "matrix.h"

constexpr int kBlock = 64;  // slots at a time

INLINE bool is_read_in_pairs(int head_dim) {
#if LEVEL_AVX512
    return head_dim == 64 || head_dim == 128;
#else
    return false;
#endif
}

#if LEVEL_AVX512
// What a piece of G heads keeps while it goes through its slots. `Parts` is d / 32.
template <int Parts, int G>
class PairedPiece {
public:
    PairedPiece(const float* q, float softcap) : softcap_(softcap) {
        for (int g = 0; g < G; g++) {
            top_[g] = -INFINITY, total_[g] = 0;
            for (int c = 0; c < Parts; c++) {
                const F16 a = load(q + g * Parts * 32 + c * 32), b = load(q + g * Parts * 32 + c * 32 + kLanes);
                high_[g][c] = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
                uint16_t half[32];
                memcpy(half, &high_[g][c], sizeof half);
                low_[g][c] = _mm512_cvtne2ps_pbh((__m512)(b - load_bfloat(half + kLanes)), (__m512)(a - load_bfloat(half)));
                sums_[g][2 * c] = sums_[g][2 * c + 1] = F16{};
            }
        }
    }

    // `n` <= 64 slots.
    void add(const uint16_t* keys, const uint16_t* values, int n) {
        for (int s = 0; s < n; s += kLanes) score(keys + s * kDim, s, std::min(kLanes, n - s));
        for (int g = 0; g < G; g++) soften(g, n);
        weigh(values, n);
    }

    void finish(float* top, float* total, float* values) const {
        for (int g = 0; g < G; g++) {
            top[g] = top_[g], total[g] = total_[g];
            for (int c = 0; c < 2 * Parts; c++)  // channels as unpacking left them: fours of eight
                for (int i = 0; i < kLanes; i++) values[g * kDim + c / 2 * 32 + i / 4 * 8 + c % 2 * 4 + i % 4] = sums_[g][c][i];
        }
    }

private:
    static constexpr int kDim = Parts * 32;

    void score(const uint16_t* keys, int at, int n) {
        for (int g = 0; g < G; g++) {
            F16 dots[kLanes];
            for (int j = 0; j < kLanes; j++) {
                const uint16_t* key = keys + std::min(j, n - 1) * kDim;
                __m512 dot = _mm512_setzero_ps();
                for (int c = 0; c < Parts; c++) {
                    const __m512bh k = (__m512bh)_mm512_loadu_si512(key + c * 32);
                    dot = _mm512_dpbf16_ps(_mm512_dpbf16_ps(dot, k, high_[g][c]), k, low_[g][c]);
                }
                dots[j] = (F16)dot;
            }
            store(scores_[g] + at, sums(dots));
        }
    }

    void soften(int g, int n) {
        float* score = scores_[g];
        for (int s = 0; s < n && softcap_ > 0; s++) score[s] = softcap_ * tanhf(score[s] / softcap_);
        for (int s = n; s < round_up(n, kLanes); s++) score[s] = -INFINITY;
        F16 high = load(score);
        for (int s = kLanes; s < n; s += kLanes) high = larger(high, load(score + s));
        const float top = std::max(top_[g], largest(high));
        const float keep = top == top_[g] ? 1 : top_[g] == -INFINITY ? 0 : expf(top_[g] - top);
        F16 total{};
        for (int s = 0; s < n; s += kLanes) {
            F16 weight = exponential(load(score + s) - top);
            for (int i = n - s; i < kLanes; i++) weight[i] = 0;
            store_bfloat((uint16_t*)weights_[g] + s, weight);
            total += weight;
        }
        total_[g] = total_[g] * keep + sum(total);
        top_[g] = top;
        for (int c = 0; c < 2 * Parts && keep != 1; c++) sums_[g][c] *= keep;
    }

    void weigh(const uint16_t* values, int n) {
        F16 a[G][2 * Parts];
        memcpy(a, sums_, sizeof a);
        for (int s = 0; s < n; s += 2, values += 2 * kDim)
            for (int c = 0; c < Parts; c++) {
                const __m512i even = _mm512_loadu_si512(values + c * 32);
                const __m512i odd = s + 1 < n ? _mm512_loadu_si512(values + kDim + c * 32) : _mm512_setzero_si512();
                const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(even, odd), high = (__m512bh)_mm512_unpackhi_epi16(even, odd);
                for (int g = 0; g < G; g++) {
                    const __m512bh weight = (__m512bh)_mm512_set1_epi32((int)weights_[g][s / 2]);
                    a[g][2 * c] = (F16)_mm512_dpbf16_ps((__m512)a[g][2 * c], low, weight);
                    a[g][2 * c + 1] = (F16)_mm512_dpbf16_ps((__m512)a[g][2 * c + 1], high, weight);
                }
            }
        memcpy(sums_, a, sizeof a);
    }

    const float softcap_;
    __m512bh high_[G][Parts], low_[G][Parts];
    F16 sums_[G][2 * Parts];
    float top_[G], total_[G];
    alignas(64) float scores_[G][kBlock];
    alignas(64) uint32_t weights_[G][kBlock / 2];
};

template <int Parts, int G>
static void attend_some(const float* q, const uint16_t* keys, const uint16_t* values, int begin, int end, float softcap,
                        float* top, float* total, float* out) {
    PairedPiece<Parts, G> piece(q, softcap);
    for (int s = begin; s < end; s += kBlock)
        piece.add(keys + (int64_t)s * Parts * 32, values + (int64_t)s * Parts * 32, std::min(kBlock, end - s));
    piece.finish(top, total, out);
}

// Slots [begin, end) for the queries q [G, d] (scaled): largest scores and sums of weights [G], weighted values [G, d].
template <int Parts>
static void attend_in_pairs(const float* q, const uint16_t* keys, const uint16_t* values, int begin, int end, int group,
                            float softcap, float* top, float* total, float* out) {
    for (int g = 0; g < group;) {
        const int left = group - g, at = g * Parts * 32;
        if (left >= 3) {
            attend_some<Parts, 3>(q + at, keys, values, begin, end, softcap, top + g, total + g, out + at), g += 3;
        } else if (left == 2) {
            attend_some<Parts, 2>(q + at, keys, values, begin, end, softcap, top + g, total + g, out + at), g += 2;
        } else {
            attend_some<Parts, 1>(q + at, keys, values, begin, end, softcap, top + g, total + g, out + at), g++;
        }
    }
}
#endif
