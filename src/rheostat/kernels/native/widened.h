// Attention of one token over keys and values that are widened to floats as they are read: float16 and float32.
//
// Queries and weighted sums stay in registers while slots go by, so that a slot costs its own loads and one
// multiplication for each head and vector, and no more.
#pragma once

#include <algorithm>

#include "paired.h"

// Heads that share a reading: as many as leave room for a slot's vectors. `Vectors` is d / 16.
template <int Vectors>
constexpr int widened_heads() {
    return Vectors <= 4 ? 3 : 1;
}

INLINE bool is_read_widened(int head_dim) {
#if LEVEL_AVX512
    return head_dim == 64 || head_dim == 128;
#else
    return false;  // registers of half the size would not hold it
#endif
}

#if LEVEL_AVX512
template <class Type, int Vectors, int G>
class WidenedPiece {
public:
    typedef typename Type::T T;

    WidenedPiece(const float* q, float softcap) : q_(q), softcap_(softcap) {
        for (int g = 0; g < G; g++) {
            top_[g] = -INFINITY, total_[g] = 0;
            for (int i = 0; i < Vectors; i++) sums_[g][i] = F16{};
        }
    }

    // `n` <= 64 slots.
    void add(const T* keys, const T* values, int n) {
        for (int s = 0; s < n; s += kLanes) score(keys + s * kDim, s, std::min(kLanes, n - s));
        for (int g = 0; g < G; g++) soften(g, n);
        weigh(values, n);
    }

    void finish(float* top, float* total, float* values) const {
        for (int g = 0; g < G; g++) {
            top[g] = top_[g], total[g] = total_[g];
            for (int i = 0; i < Vectors; i++) store(values + g * kDim + i * kLanes, sums_[g][i]);
        }
    }

private:
    static constexpr int kDim = Vectors * kLanes;

    void score(const T* keys, int at, int n) {
        F16 q[G][Vectors], dots[G][kLanes];
        for (int g = 0; g < G; g++)
            for (int i = 0; i < Vectors; i++) q[g][i] = load(q_ + g * kDim + i * kLanes);
        for (int j = 0; j < kLanes; j++) {
            const T* key = keys + std::min(j, n - 1) * kDim;
            F16 dot[G];
            for (int i = 0; i < Vectors; i++) {
                const F16 k = Type::get(key + i * kLanes);
                for (int g = 0; g < G; g++) dot[g] = i ? dot[g] + q[g][i] * k : q[g][i] * k;
            }
            for (int g = 0; g < G; g++) dots[g][j] = dot[g];
        }
        for (int g = 0; g < G; g++) store(scores_[g] + at, sums(dots[g]));
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
            store(score + s, weight);
            total += weight;
        }
        total_[g] = total_[g] * keep + sum(total);
        top_[g] = top;
        for (int i = 0; i < Vectors && keep != 1; i++) sums_[g][i] *= keep;
    }

    void weigh(const T* values, int n) {
        F16 a[G][Vectors];
        memcpy(a, sums_, sizeof a);
        for (int s = 0; s < n; s++, values += kDim)
            for (int i = 0; i < Vectors; i++) {
                const F16 value = Type::get(values + i * kLanes);
                for (int g = 0; g < G; g++) a[g][i] += value * scores_[g][s];
            }
        memcpy(sums_, a, sizeof a);
    }

    const float* q_;
    const float softcap_;
    F16 sums_[G][Vectors];
    float top_[G], total_[G];
    alignas(64) float scores_[G][kBlock];
};

template <class Type, int Vectors, int G>
static void attend_widened_some(const float* q, const typename Type::T* keys, const typename Type::T* values, int begin,
                                int end, float softcap, float* top, float* total, float* out) {
    WidenedPiece<Type, Vectors, G> piece(q, softcap);
    for (int s = begin; s < end; s += kBlock)
        piece.add(keys + (int64_t)s * Vectors * kLanes, values + (int64_t)s * Vectors * kLanes, std::min(kBlock, end - s));
    piece.finish(top, total, out);
}

// As `attend_in_pairs`.
template <class Type, int Vectors>
static void attend_widened(const float* q, const typename Type::T* keys, const typename Type::T* values, int begin, int end,
                           int group, float softcap, float* top, float* total, float* out) {
    constexpr int kDim = Vectors * kLanes, kMost = widened_heads<Vectors>();
    for (int g = 0; g < group;) {
        const int left = group - g;
        if (left >= kMost) {
            attend_widened_some<Type, Vectors, kMost>(q + g * kDim, keys, values, begin, end, softcap, top + g, total + g,
                                                      out + g * kDim);
            g += kMost;
        } else if (left == 2) {
            attend_widened_some<Type, Vectors, 2>(q + g * kDim, keys, values, begin, end, softcap, top + g, total + g,
                                                  out + g * kDim);
            g += 2;
        } else {
            attend_widened_some<Type, Vectors, 1>(q + g * kDim, keys, values, begin, end, softcap, top + g, total + g,
                                                  out + g * kDim);
            g++;
        }
    }
}
#endif
