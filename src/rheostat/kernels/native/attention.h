// Attention of one new token a row over a cache [B, K, S, d]; the H / K query heads of a group share each read.
//
// The work is cut into pieces: a row, a key/value head, and a stretch of its slots. Each piece keeps a running softmax
// (largest score, sum, weighted values); the pieces of a head are joined at the end.
#pragma once

#include "widened.h"

struct Attention {
    int32_t num_heads, num_kv_heads, head_dim;
    int32_t cache_format;  // kFloat32, kBFloat16 or kFloat16
    int64_t num_slots;     // S, allocated
    float scale, softcap;  // softcap 0: none
};

template <int Type>
struct Stored;
template <>
struct Stored<kFloat32> {
    typedef float T;
    static F16 get(const T* p) { return load(p); }
    static void put(T* p, float x) { *p = x; }
};
template <>
struct Stored<kBFloat16> {
    typedef uint16_t T;
    static F16 get(const T* p) { return load_bfloat(p); }
    static void put(T* p, float x) { *p = float_to_bfloat(x); }
};
template <>
struct Stored<kFloat16> {
    typedef uint16_t T;
    static F16 get(const T* p) { return load_half(p); }
    static void put(T* p, float x) { *p = float_to_half(x); }
};

template <int Type>
INLINE F16 get_part(const typename Stored<Type>::T* p, int n) {
    if (n == kLanes) return Stored<Type>::get(p);
    typename Stored<Type>::T part[kLanes] = {};
    memcpy(part, p, n * sizeof part[0]);
    return Stored<Type>::get(part);
}

// What a piece knows: for each of its G heads the largest score, the sum of weights, and the weighted values [d'].
struct Piece {
    float* top;
    float* total;
    float* values;
};

INLINE int64_t piece_floats(int group, int head_dim) { return (int64_t)group * (2 + round_up(head_dim, kLanes)); }

INLINE Piece piece_at(float* scratch, int64_t index, int group, int head_dim) {
    float* p = scratch + index * piece_floats(group, head_dim);
    int wide = group * round_up(head_dim, kLanes);
    return {p + wide, p + wide + group, p};
}

// to[g] += weights[g][s] * values[s] for `Count` slots.
template <int Type, int Vectors, int Count>
INLINE void add_values(const typename Stored<Type>::T* values, const float* weights, int group, int d, float* to) {
    const int wide = round_up(d, kLanes);
    for (int i = 0; i < wide; i += kLanes) {
        F16 value[Count];
        for (int j = 0; j < Count; j++)
            value[j] = Vectors ? Stored<Type>::get(values + j * d + i) : get_part<Type>(values + j * d + i, std::min(kLanes, d - i));
        for (int g = 0; g < group; g++) {
            F16 sum = load(to + g * wide + i);
            for (int j = 0; j < Count; j++) sum += value[j] * weights[g * kBlock + j];
            store(to + g * wide + i, sum);
        }
    }
}

// Slots [begin, end) for the queries q [G, d'] (scaled, padded with zeros to d'). `Vectors` is d' / 16, or 0 for any.
template <int Type, int Vectors>
static void attend(const Attention& a, const float* q, const void* keys, const void* values, int begin, int end, int group,
                   Piece out, std::vector<float>& buffer) {
    typedef typename Stored<Type>::T T;
    const int d = Vectors ? Vectors * kLanes : a.head_dim, wide = round_up(d, kLanes), vectors = wide / kLanes;
    const int tail = d - (vectors - 1) * kLanes;
    if (buffer.size() < (size_t)group * kBlock) buffer.resize((size_t)group * kBlock);
    float* scores = buffer.data();
    for (int g = 0; g < group; g++) out.top[g] = -INFINITY, out.total[g] = 0;
    memset(out.values, 0, (size_t)group * wide * sizeof(float));
    for (int first = begin; first < end; first += kBlock) {
        const int n = end - first < kBlock ? end - first : kBlock;
        int done = 0;
        if (Vectors)  // sixteen keys at a time, widened once for all queries
            for (; done + kLanes <= n; done += kLanes) {
                const T* k = (const T*)keys + (int64_t)(first + done) * d;
                alignas(64) float wide_keys[kLanes][Vectors ? Vectors * kLanes : 1];
                for (int j = 0; j < kLanes; j++)
                    for (int i = 0; i < Vectors; i++) store(wide_keys[j] + i * kLanes, Stored<Type>::get(k + j * d + i * kLanes));
                for (int g = 0; g < group; g++) {
                    F16 dots[kLanes];
                    for (int j = 0; j < kLanes; j++) {
                        dots[j] = load(q + g * wide) * load(wide_keys[j]);
                        for (int i = 1; i < Vectors; i++) dots[j] += load(q + g * wide + i * kLanes) * load(wide_keys[j] + i * kLanes);
                    }
                    store(scores + g * kBlock + done, sums(dots));
                }
            }
        for (int s = done; s < n; s++) {
            const T* k = (const T*)keys + (int64_t)(first + s) * d;
            F16 key[Vectors ? Vectors : 16];
            for (int i = 0; i < vectors; i++) key[i] = get_part<Type>(k + i * kLanes, i + 1 < vectors ? kLanes : tail);
            for (int g = 0; g < group; g++) {
                F16 dot = load(q + g * wide) * key[0];
                for (int i = 1; i < vectors; i++) dot += load(q + g * wide + i * kLanes) * key[i];
                scores[g * kBlock + s] = sum(dot);
            }
        }
        for (int g = 0; g < group; g++) {
            float* score = scores + g * kBlock;
            if (a.softcap > 0)
                for (int s = 0; s < n; s++) score[s] = a.softcap * tanhf(score[s] / a.softcap);
            for (int s = n; s < round_up(n, kLanes); s++) score[s] = -INFINITY;
            F16 high = splat(-INFINITY);
            for (int s = 0; s < n; s += kLanes) high = larger(high, load(score + s));
            const float top = std::max(out.top[g], largest(high));
            const float keep = out.top[g] == -INFINITY ? 0 : expf(out.top[g] - top);
            F16 total{};
            for (int s = 0; s < n; s += kLanes) {
                F16 weight = exponential(load(score + s) - top);
                for (int i = n - s; i < kLanes; i++) weight[i] = 0;
                store(score + s, weight);
                total += weight;
            }
            out.total[g] = out.total[g] * keep + sum(total);
            out.top[g] = top;
            float* to = out.values + g * wide;
            if (keep != 1)
                for (int i = 0; i < vectors; i++) store(to + i * kLanes, load(to + i * kLanes) * keep);
        }
        const T* v = (const T*)values + (int64_t)first * d;
        int s = 0;
        for (; s + 4 <= n; s += 4) add_values<Type, Vectors, 4>(v + s * d, scores + s, group, d, out.values);
        for (; s < n; s++) add_values<Type, Vectors, 1>(v + s * d, scores + s, group, d, out.values);
    }
}

template <int Type>
static void attend_any(const Attention& a, const float* q, const void* keys, const void* values, int begin, int end,
                       int group, Piece out, std::vector<float>& buffer) {
#if LEVEL_AVX512
    if (Type == kBFloat16 && is_read_in_pairs(a.head_dim)) {
        const auto attend_pairs = a.head_dim == 64 ? attend_in_pairs<2> : attend_in_pairs<4>;
        return attend_pairs(q, (const uint16_t*)keys, (const uint16_t*)values, begin, end, group, a.softcap, out.top, out.total,
                            out.values);
    }
    if (Type != kBFloat16 && is_read_widened(a.head_dim)) {
        const auto attend_wide = a.head_dim == 64 ? attend_widened<Stored<Type>, 4> : attend_widened<Stored<Type>, 8>;
        typedef typename Stored<Type>::T T;
        return attend_wide(q, (const T*)keys, (const T*)values, begin, end, group, a.softcap, out.top, out.total, out.values);
    }
#endif
    if (a.head_dim == 64) return attend<Type, 4>(a, q, keys, values, begin, end, group, out, buffer);
    if (a.head_dim == 128) return attend<Type, 8>(a, q, keys, values, begin, end, group, out, buffer);
    return attend<Type, 0>(a, q, keys, values, begin, end, group, out, buffer);
}

// One piece: slots [begin, end) of row b and key/value head k.
static void attend_slots(const Attention& a, const float* q, const void* keys, const void* values, int b, int k, int begin,
                         int end, Piece out, std::vector<float>& buffer) {
    const int group = a.num_heads / a.num_kv_heads;
    const int64_t at = ((int64_t)b * a.num_kv_heads + k) * a.num_slots * a.head_dim;
    const int64_t size = a.cache_format == kFloat32 ? 4 : 2;
    keys = (const uint8_t*)keys + at * size, values = (const uint8_t*)values + at * size;
    switch (a.cache_format) {
        case kFloat32: return attend_any<kFloat32>(a, q, keys, values, begin, end, group, out, buffer);
        case kBFloat16: return attend_any<kBFloat16>(a, q, keys, values, begin, end, group, out, buffer);
        default: return attend_any<kFloat16>(a, q, keys, values, begin, end, group, out, buffer);
    }
}

// How many stretches each head's slots are cut into: enough pieces for the threads, and none too short to pay.
INLINE int num_stretches(int num_rows, const Attention& a, int longest, int num_threads) {
    if (num_threads == 1) return 1;
    int heads = num_rows * a.num_kv_heads;
    int wanted = (8 * num_threads + heads - 1) / heads;
    int fit = longest / kBlock;
    return std::max(1, std::min(wanted, fit));
}

// Joins the stretches of one head of one row into out [d]; the first `count` of them, where not all are used.
static void join(const Attention& a, float* scratch, int b, int head, int stretches, float* out, int count = -1) {
    const int group = a.num_heads / a.num_kv_heads, k = head / group, g = head % group;
    const int d = a.head_dim, wide = round_up(d, kLanes);
    const int64_t first = ((int64_t)b * a.num_kv_heads + k) * stretches;
    float top = -INFINITY, total = 0;
    if (count < 0) count = stretches;
    for (int s = 0; s < count; s++) top = std::max(top, piece_at(scratch, first + s, group, d).top[g]);
    for (int i = 0; i < d; i++) out[i] = 0;
    if (top == -INFINITY) return;  // no slots: nothing to attend to
    for (int s = 0; s < count; s++) {
        Piece p = piece_at(scratch, first + s, group, d);
        if (p.total[g] == 0) continue;
        const float share = expf(p.top[g] - top);
        total += share * p.total[g];
        for (int i = 0; i < d; i++) out[i] += share * p.values[g * wide + i];
    }
    for (int i = 0; i < d; i++) out[i] /= total;
}
