// Tokens that have grown old: from memory in full precision into a body in nibble planes, and what follows them to
// their place. Bit for bit what `caches/planes.py` does; `planes.h` says how a block of the body is laid out.
//
// Nothing may fuse here but what rounds alike: a lower nibble is rounded against the upper one as a reader sees it.
#pragma once

#include "planes.h"

struct Settling {
    uint8_t *upper, *lower, *scales;     // [L, B, K, capacity, a block], the body
    uint8_t *keys, *values;              // one row's oldest tokens of each layer and head, in the cache's number format
    int64_t capacity;                    // groups allocated
    int64_t layer_stride, head_stride;   // values from a layer's tokens to the next layer's, and from a head's
    int32_t num_layers, num_rows, num_kv_heads, head_dim, format;
    int32_t group, value_group;          // tokens of a key group, channels of a value group
    int32_t row, first_group, num_groups;  // where they go
    int32_t num_left;                    // tokens after them that move to the front
};

// What comes before is computed as it stands: a product is not drawn into the sum after it.
INLINE F16 apart(F16 v) {
#if LEVEL_AVX512
    asm("" : "+v"(v));
#else
    asm("" : "+m"(v));
#endif
    return v;
}

// The nearest whole number, ties to even, of numbers that a byte could hold.
INLINE F16 to_whole(F16 v) { return apart(v + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23: adding it rounds to an integer

INLINE I16 lanes() { return I16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// Numbers of groups with these scales and zeros, as both are stored: their nibbles, the lower one raised by 8.
INLINE void nibbles_of(F16 x, F16 scale, F16 zero, I16& upper, I16& lower) {
    const F16 step = scale > 0.0f ? scale : splat(1);  // a constant group, or a scale too small for its format
    F16 u = to_whole(smaller(larger((x - zero) / step, splat(0)), splat(15)));
    F16 l = to_whole(smaller(larger((x - (apart(u * scale) + zero)) / (step * 0.0625f), splat(-16)), splat(16)));
    const I16 is_carried = (l > 7.0f) & (u < 15.0f);
    u = is_carried ? u + 1.0f : u;
    l = is_carried ? splat(-8) : smaller(larger(l, splat(-8)), splat(7));
    upper = __builtin_convertvector(u, I16) & 15, lower = (__builtin_convertvector(l, I16) + 8) & 15;
}

template <int Type>
class Settler {
public:
    typedef typename Stored<Type>::T T;

    explicit Settler(const Settling& s) : s_(s), tokens_(round_up(s.group, kLanes)), wide_(round_up(s.head_dim, kLanes)) {
        parts_ = s.head_dim / s.value_group;
    }

    // All groups of one layer and head, and then the tokens after them.
    void settle(int layer, int k) const {
        const int64_t at = layer * s_.layer_stride + k * s_.head_stride, taken = (int64_t)s_.group * s_.head_dim;
        const int64_t block = (((int64_t)layer * s_.num_rows + s_.row) * s_.num_kv_heads + k) * s_.capacity + s_.first_group;
        const int64_t plane = (int64_t)tokens_ * wide_, numbers = 2 * (s_.head_dim + parts_ * tokens_);
        T *keys = (T*)s_.keys + at, *values = (T*)s_.values + at;
        for (int g = 0; g < s_.num_groups; g++) {
            uint8_t *upper = s_.upper + (block + g) * plane, *lower = s_.lower + (block + g) * plane;
            T* scales = (T*)s_.scales + (block + g) * numbers;
            for (int c = 0; c < wide_; c += kLanes) put_keys(keys + g * taken, c, upper, lower, scales);
            for (int t = 0; t < tokens_; t += 8) put_values(values + g * taken, t, upper + plane / 2, lower + plane / 2, scales);
        }
        const size_t bytes = (size_t)s_.num_left * s_.head_dim * sizeof(T);
        for (T* one : {keys, values})
            if (bytes) memmove(one, one + s_.num_groups * taken, bytes);
    }

private:
    // What a number is once it is stored.
    static float stored(float x, T* to) {
        Stored<Type>::put(to, x);
        T both[kLanes] = {*to};
        return Stored<Type>::get(both)[0];
    }

    // Sixteen channels, each a group of all tokens.
    void put_keys(const T* from, int c, uint8_t* upper, uint8_t* lower, T* scales) const {
        const int n = std::min(kLanes, s_.head_dim - c), octs = wide_ / 8;
        F16 low = get_part<Type>(from + c, n), high = low, scale{}, zero{};
        for (int t = 1; t < s_.group; t++) {
            const F16 x = get_part<Type>(from + (int64_t)t * s_.head_dim + c, n);
            low = smaller(x, low), high = larger(x, high);
        }
        const F16 range = (high - low) / 15.0f;
        for (int i = 0; i < n; i++) {
            scale[i] = stored(range[i], scales + c + i);
            zero[i] = stored(low[i], scales + s_.head_dim + c + i);
        }
        for (int t = 0; t < tokens_; t++) {
            I16 u{}, l{};
            if (t < s_.group) nibbles_of(get_part<Type>(from + (int64_t)t * s_.head_dim + c, n), scale, zero, u, l);
            const int64_t at = ((int64_t)(t / kLanes * octs + c / 8) * kLanes + t % kLanes) * 4;
            put_octs(u, upper + at), put_octs(lanes() < n ? l : I16{}, lower + at);
        }
    }

    // Two runs of eight channels of a token: the first four of each in low halves, the others in high ones.
    static void put_octs(I16 v, uint8_t* to) {
        uint64_t octs[2];
        int8_t bytes[kLanes];
        store_bytes(bytes, v);
        memcpy(octs, bytes, sizeof octs);
        for (int i = 0; i < 2; i++) {
            const uint32_t both = (uint32_t)(octs[i] | octs[i] >> 28);
            memcpy(to + i * 4 * kLanes, &both, sizeof both);
        }
    }

    // Eight tokens, of which each has groups of channels.
    void put_values(const T* from, int first, uint8_t* upper, uint8_t* lower, T* scales) const {
        const int most = std::max(0, std::min(8, s_.group - first));
        T *scale_at = scales + 2 * s_.head_dim + first, *zero_at = scale_at + parts_ * tokens_;
        for (int part = 0; part < parts_; part++) {
            float scale[8], zero[8];
            for (int t = 0; t < 8; t++) {
                float low = 0, high = 0;
                if (t < most) edges(from + (int64_t)(first + t) * s_.head_dim + part * s_.value_group, low, high);
                scale[t] = stored((high - low) / 15.0f, scale_at + part * tokens_ + t);
                zero[t] = stored(low, zero_at + part * tokens_ + t);
            }
            const int stop = std::min((part + 1) * s_.value_group, s_.head_dim);
            for (int c = part * s_.value_group; c < stop; c += kLanes) {
                const int n = std::min(kLanes, stop - c);
                I16 above{}, below{};
                for (int t = 0; t < most; t++) {
                    I16 u, l;
                    nibbles_of(get_part<Type>(from + (int64_t)(first + t) * s_.head_dim + c, n), splat(scale[t]), splat(zero[t]), u, l);
                    const int shift = 8 * (t % 4) + t / 4 * 4;
                    above |= u << shift, below |= l << shift;
                }
                const int64_t at = ((int64_t)c / kLanes * (tokens_ / 8) + first / 8) * 4 * kLanes;
                above = lanes() < n ? above : I16{}, below = lanes() < n ? below : I16{};
                memcpy(upper + at, &above, sizeof above), memcpy(lower + at, &below, sizeof below);
            }
        }
    }

    // The least and the largest of a group of channels.
    void edges(const T* from, float& low, float& high) const {
        F16 least = splat(INFINITY), most = -least;
        for (int i = 0; i < s_.value_group; i += kLanes) {
            const int n = std::min(kLanes, s_.value_group - i);
            const F16 x = get_part<Type>(from + i, n);
            least = lanes() < n ? smaller(x, least) : least, most = lanes() < n ? larger(x, most) : most;
        }
        low = -largest(-least), high = largest(most);
    }

    const Settling& s_;
    int tokens_, wide_, parts_;
};

template <int Type>
static void settle_share(const Settling& s, const Share& share) {
    const Settler<Type> settler(s);
    for (int i = share.begin; i < share.end; i++) settler.settle(i / s.num_kv_heads, i % s.num_kv_heads);
}

static void settle(const Settling& s, int num_threads) {
    parallel(num_threads, [&](Team& team, int thread) {
        const Share share(s.num_layers * s.num_kv_heads, thread, team.size);
        if (s.format == kFloat32) return settle_share<kFloat32>(s, share);
        if (s.format == kBFloat16) return settle_share<kBFloat16>(s, share);
        settle_share<kFloat16>(s, share);
    });
}
