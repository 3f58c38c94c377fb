// Attention over the quantised part of a hierarchical cache: two nibble planes, read one (4 bits) or both (8 bits).
//
// Per row and key/value head the body is a run of blocks, one for each group of G tokens. With G' and d' the tokens and
// channels of a block rounded up to 16, each plane of a block holds
//
//   keys     [G' / 16][d' / 8][16 tokens][4]     low half: channels 0 to 3 of eight, high half: 4 to 7
//   values   [d' / 16][G' / 8][16 channels][4]   low half: tokens 0 to 3 of eight, high half: 4 to 7
//
// and the block's scales, in the cache's number format, are: of the keys [d], their zeros [d], of the values
// [groups of channels][G'], their zeros. A number is U S + Z in 4 bits and (16 U + L' - 8) S / 16 + Z in 8.
//
// Queries times scales, and weights times scales, become whole numbers of two or three digits of seven bits, which
// byte products multiply with the codes exactly. Each query's sums are its own: how many come at once changes no bit.
#pragma once

#include "attention.h"

struct Planes {
    const uint8_t *upper, *lower, *scales;  // [L, B, K, capacity, a block]; `lower` may be null where bits is 4
    const int32_t* groups;                  // [B], groups in each row's body
    int64_t capacity;                       // groups allocated
    int32_t group, value_group;             // tokens of a key group, channels of a value group
    int32_t bits;                           // 8 or 4
    int32_t num_rows;                       // B

    int tokens() const { return round_up(group, kLanes); }
};

constexpr int kDigitBits = 7;

// What a block of accumulators is: so many queries by so many tiles of 16 lanes, as far as the registers go.
#if LEVEL_AVX512
constexpr int kTilesAtOnce = 2;
#else
constexpr int kTilesAtOnce = 1;
#endif
template <int D>
constexpr int kMostQueries = D == 1 ? 6 : D == 2 ? 5 : 4;

// Where the next block is fetched to. With few queries lines come faster than the first cache can ask for them, so the
// second one does; with many there is time, and then the second would be too far.
template <int R>
constexpr int kNear = R <= 3 ? 2 : 3;

// What one thread needs while it reads a body.
struct BodyRoom {
    std::vector<int8_t> digits;
    std::vector<float> floats;
};

typedef int8_t B16 __attribute__((vector_size(16)));

INLINE void store_bytes(int8_t* to, I16 v) {
    B16 b = __builtin_convertvector(v, B16);
    memcpy(to, &b, sizeof b);
}

// The largest whole number of D digits.
template <int D>
constexpr float kMostWhole = 127 * (D == 3 ? 16384.0f : D == 2 ? 128.0f : 1.0f);

// Sixteen numbers, in whole units already, rounded: digit i of them at to + i * n. Returns the whole numbers.
template <int D>
INLINE I16 store_digits(F16 x, int n, int8_t* to) {
    const F16 t = x + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    I16 bits, v;
    memcpy(&bits, &t, sizeof bits);
    v = bits;  // what the shift added is gone from the byte of each digit
    for (int d = D - 1; d > 0; d--) {
        const I16 low = ((v + 64) & 127) - 64;
        store_bytes(to + d * n, low);
        v = (v - low) >> kDigitBits;
    }
    store_bytes(to, v);
    return bits - 0x4b400000;
}

INLINE float total_of(I16 v) {
    int64_t total = 0;
    for (int j = 0; j < kLanes; j++) total += v[j];
    return (float)total;
}

// Sixteen lanes of eight codes: the first four of each, and the others.
template <bool Small>
INLINE void unpack_codes(const uint8_t* upper, const uint8_t* lower, I16& first, I16& second) {
    const int32_t nibble = 0x0f0f0f0f;
    I16 u, l;
    memcpy(&u, upper, sizeof u);
    if (Small) {
        first = u & nibble, second = (u >> 4) & nibble;
        return;
    }
    memcpy(&l, lower, sizeof l);
    first = ((u & nibble) << 4) | (l & nibble), second = (u & ~nibble) | ((l >> 4) & nibble);
}

// Codes [tiles][octs][16 lanes][8], and how far on lies what will be read next.
struct Codes {
    const uint8_t *upper, *lower;  // `lower` is not read where codes are small
    int64_t ahead;
    int octs;

    Codes from(int tile) const {
        const int64_t at = (int64_t)tile * octs * 64;
        return {upper + at, lower + at, ahead, octs};
    }
};

// out[t * R + r] = sixteen sums of tile t's codes with the digits [R][D][width] of R queries.
template <int R, int D, int T, bool Small>
static void dot_codes(const Codes& codes, const int8_t* digits, int width, F16* out) {
    const uint8_t *upper = codes.upper, *lower = codes.lower;
    const int64_t ahead = codes.ahead;
    const int octs = codes.octs;
    I16 acc[T][R][D]{};
    for (int o = 0; o < octs; o++) {
        I16 first[T], second[T];
        for (int t = 0; t < T; t++) {
            const int64_t at = ((int64_t)t * octs + o) * 64;
            __builtin_prefetch(upper + at + ahead, 0, kNear<R>);
            if (!Small) __builtin_prefetch(lower + at + ahead, 0, kNear<R>);
            unpack_codes<Small>(upper + at, lower + at, first[t], second[t]);
        }
        for (int r = 0; r < R; r++)
            for (int d = 0; d < D; d++) {
                const int8_t* x = digits + (r * D + d) * width + o * 8;
                const int32_t a = quad_at(x), b = quad_at(x + 4);
                for (int t = 0; t < T; t++) {
                    I16& sum = acc[t][r][d];
                    sum = Small ? dot_small_quads(sum, first[t], a) : dot_quads(sum, first[t], a);
                    sum = Small ? dot_small_quads(sum, second[t], b) : dot_quads(sum, second[t], b);
                }
            }
    }
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) {
            F16 total = __builtin_convertvector(acc[t][r][0], F16);
            for (int d = 1; d < D; d++) total = total * 128.0f + __builtin_convertvector(acc[t][r][d], F16);
            out[t * R + r] = total;
        }
}

template <int D, int T, bool Small>
INLINE void dot_some(int R, const Codes& codes, const int8_t* digits, int width, F16* out) {
    switch (R) {
        case 1: return dot_codes<1, D, T, Small>(codes, digits, width, out);
        case 2: return dot_codes<2, D, T, Small>(codes, digits, width, out);
        case 3: return dot_codes<3, D, T, Small>(codes, digits, width, out);
        case 4: return dot_codes<4, D, T, Small>(codes, digits, width, out);
        case 5: return dot_codes<std::min(5, kMostQueries<D>), D, T, Small>(codes, digits, width, out);
        default: return dot_codes<kMostQueries<D>, D, T, Small>(codes, digits, width, out);
    }
}

// `take(query, tile, sums)` for all queries and tiles.
template <int D, bool Small, class Take>
INLINE void dot_all(const Codes& codes, int tiles, const int8_t* digits, int width, int num_queries, Take&& take) {
    F16 out[kTilesAtOnce * kMostQueries<D>];
    const int blocks = (num_queries + kMostQueries<D> - 1) / kMostQueries<D>;
    for (int t = 0; t < tiles;) {
        const int n = t + kTilesAtOnce <= tiles ? kTilesAtOnce : 1;
        const Codes here = codes.from(t);
        for (int i = 0; i < blocks; i++) {
            Share share(num_queries, i, blocks);
            const int count = share.end - share.begin;
            const int8_t* x = digits + (int64_t)share.begin * D * width;
            if (n == kTilesAtOnce)
                dot_some<D, kTilesAtOnce, Small>(count, here, x, width, out);
            else
                dot_some<D, 1, Small>(count, here, x, width, out);
            for (int c = 0; c < n; c++)
                for (int r = 0; r < count; r++) take(share.begin + r, t + c, out[c * count + r]);
        }
        t += n;
    }
}

template <int Type>
INLINE void widen_as(const void* from, int64_t at, int n, float* to) {
    const typename Stored<Type>::T* p = (const typename Stored<Type>::T*)from + at;
    for (int i = 0; i < n; i += kLanes) store_most(to + i, get_part<Type>(p + i, std::min(kLanes, n - i)), std::min(kLanes, n - i));
}

INLINE void widen(int format, const uint8_t* from, int64_t at, int n, float* to) {
    if (format == kFloat32) return widen_as<kFloat32>(from, at, n, to);
    if (format == kBFloat16) return widen_as<kBFloat16>(from, at, n, to);
    return widen_as<kFloat16>(from, at, n, to);
}

// The bytes product takes the codes less this.
template <bool Small>
constexpr float kCodeBias = Small ? 0.0f : 128.0f - kBytesBias;

template <int D, bool Small>
class BodyReader {
public:
    BodyReader(const Attention& a, const Planes& p, int num_queries, BodyRoom& room)
        : a_(a), p_(p), n_(num_queries), room_(room) {
        dim_ = a.head_dim, wide_ = round_up(dim_, kLanes), tokens_ = p.tokens(), parts_ = dim_ / p.value_group;
        const int longest = std::max(wide_, tokens_);
        const size_t digits = (size_t)n_ * D * longest;
        const size_t floats = (size_t)n_ * (tokens_ + 2) + 3 * longest + 2 * parts_ * tokens_ + 2 * kLanes;
        if (room_.digits.size() < digits) room_.digits.resize(digits);
        if (room_.floats.size() < floats) room_.floats.resize(floats);
        scores_ = room_.floats.data(), factors_ = scores_ + (size_t)n_ * tokens_, adds_ = factors_ + n_;
        work_ = adds_ + n_, scale_ = work_ + longest, zero_ = scale_ + longest, rest_ = zero_ + longest;
    }

    // One block: scores, a running softmax, and the weighted values of all queries q [n, wide].
    template <class PieceOf>
    void read(const uint8_t* upper, const uint8_t* lower, const uint8_t* scales, const float* q, PieceOf&& piece_of) {
        const int64_t key_bytes = (int64_t)tokens_ * wide_ / 2;
        const int64_t scale_bytes = (2 * dim_ + 2 * parts_ * tokens_) * (a_.cache_format == kFloat32 ? 4 : 2);
        for (int64_t i = 0; i < scale_bytes; i += 64) __builtin_prefetch(scales + scale_bytes + i);
        score({upper, lower, 2 * key_bytes, wide_ / 8}, scales, q);
        for (int i = 0; i < n_; i++) soften(i, piece_of);
        weigh({upper + key_bytes, lower + key_bytes, 2 * key_bytes, tokens_ / 8}, scales, piece_of);
    }

private:
    // Scales and zeros [n] of codes instead of nibbles.
    void set_steps(float* scale, float* zero, int n) {
        for (int i = 0; i < n && !Small; i += kLanes) {
            store(zero + i, load(zero + i) - load(scale + i) * 0.5f);
            store(scale + i, load(scale + i) * 0.0625f);
        }
    }

    void score(const Codes& codes, const uint8_t* scales, const float* q) {
        widen(a_.cache_format, scales, 0, dim_, scale_);
        widen(a_.cache_format, scales, dim_, dim_, zero_);
        for (int i = dim_; i < wide_; i++) scale_[i] = zero_[i] = 0;
        set_steps(scale_, zero_, wide_);
        for (int i = 0; i < n_; i++) {
            F16 add{}, high{};
            for (int c = 0; c < wide_; c += kLanes) {
                const F16 x = load(q + (int64_t)i * wide_ + c), v = x * load(scale_ + c);
                store(work_ + c, v);
                high = larger(high, larger(v, -v));
                add += x * load(zero_ + c);
            }
            const float top = largest(high), inverse = top > 0 ? kMostWhole<D> / top : 0;
            I16 whole{};
            int8_t* digits = &room_.digits[(size_t)i * D * wide_];
            for (int c = 0; c < wide_; c += kLanes) whole += store_digits<D>(load(work_ + c) * inverse, wide_, digits + c);
            factors_[i] = top * (1 / kMostWhole<D>);
            adds_[i] = sum(add);
            if (kCodeBias<Small> != 0) adds_[i] += kCodeBias<Small> * factors_[i] * total_of(whole);
        }
        dot_all<D, Small>(codes, tokens_ / kLanes, room_.digits.data(), wide_, n_, [&](int i, int tile, F16 v) {
            v = v * factors_[i] + adds_[i];
            if (a_.softcap > 0)
                for (int j = 0; j < kLanes; j++) v[j] = a_.softcap * tanhf(v[j] / a_.softcap);
            store(scores_ + (int64_t)i * tokens_ + tile * kLanes, v);
        });
        for (int i = 0; i < n_; i++)
            for (int t = p_.group; t < tokens_; t++) scores_[(int64_t)i * tokens_ + t] = -INFINITY;
    }

    template <class PieceOf>
    void soften(int i, PieceOf&& piece_of) {
        float *top, *sum_of, *to, *score = scores_ + (int64_t)i * tokens_;
        piece_of(i, top, sum_of, to);
        F16 high = splat(-INFINITY), total{};
        for (int t = 0; t < tokens_; t += kLanes) high = larger(high, load(score + t));
        const float now = std::max(*top, largest(high));
        const float keep = *top == now ? 1 : *top == -INFINITY ? 0 : expf(*top - now);
        for (int t = 0; t < tokens_; t += kLanes) {
            const F16 below = load(score + t) - now;
            const F16 weight = D == 3 ? exponential(below) : power_of_two(below * 1.44269504f);
            store(score + t, weight);
            total += weight;
        }
        for (int t = p_.group; t < tokens_; t++) score[t] = 0;  // what they added to `total` is below its last bit
        *sum_of = *sum_of * keep + sum(total);
        *top = now;
        if (keep != 1)
            for (int c = 0; c < wide_; c += kLanes) store(to + c, load(to + c) * keep);
    }

    // Weights are at most 1, the largest of the piece so far: the largest scale bounds their products, in all queries.
    template <class PieceOf>
    void weigh(const Codes& codes, const uint8_t* scales, PieceOf&& piece_of) {
        widen(a_.cache_format, scales, 2 * dim_, 2 * parts_ * tokens_, rest_);
        for (int part = 0; part < parts_; part++) {
            float *scale = rest_ + part * tokens_, *zero = rest_ + (parts_ + part) * tokens_;
            set_steps(scale, zero, tokens_);
            F16 high{};
            for (int t = 0; t < tokens_; t += kLanes) high = larger(high, load(scale + t));
            const float top = largest(high), inverse = top > 0 ? kMostWhole<D> / top : 0, factor = top * (1 / kMostWhole<D>);
            for (int t = 0; t < tokens_; t += kLanes) store(scale + t, load(scale + t) * inverse);
            for (int i = 0; i < n_; i++) {
                F16 add{};
                I16 whole{};
                int8_t* digits = &room_.digits[(size_t)i * D * tokens_];
                for (int t = 0; t < tokens_; t += kLanes) {
                    const F16 w = load(scores_ + (int64_t)i * tokens_ + t);
                    whole += store_digits<D>(w * load(scale + t), tokens_, digits + t);
                    add += w * load(zero + t);
                }
                adds_[i] = sum(add);
                if (kCodeBias<Small> != 0) adds_[i] += kCodeBias<Small> * factor * total_of(whole);
            }
            const int first = part * p_.value_group, tiles = (std::min(p_.value_group, dim_ - first) + kLanes - 1) / kLanes;
            dot_all<D, Small>(codes.from(first / kLanes), tiles, room_.digits.data(), tokens_, n_, [&](int i, int tile, F16 v) {
                float *top_of, *sum_of, *to;
                piece_of(i, top_of, sum_of, to);
                to += first + tile * kLanes;
                store(to, load(to) + (v * factor + adds_[i]));
            });
        }
    }

    const Attention& a_;
    const Planes& p_;
    const int n_;
    BodyRoom& room_;
    int dim_, wide_, tokens_, parts_;
    float *scores_, *factors_, *adds_, *work_, *scale_, *zero_, *rest_;
};

template <int D, bool Small, class PieceOf>
static void read_groups(const Attention& a, const Planes& p, int layer, int b, int k, int begin, int end, const float* q,
                        int num_queries, PieceOf&& piece_of, BodyRoom& room) {
    BodyReader<D, Small> reader(a, p, num_queries, room);
    const int wide = round_up(a.head_dim, kLanes), parts = a.head_dim / p.value_group;
    const int64_t plane = (int64_t)p.tokens() * wide, numbers = 2 * a.head_dim + 2 * parts * p.tokens();
    const int64_t first = (((int64_t)layer * p.num_rows + b) * a.num_kv_heads + k) * p.capacity;
    for (int g = begin; g < end; g++)
        reader.read(p.upper + (first + g) * plane, (Small ? p.upper : p.lower) + (first + g) * plane,
                    p.scales + (first + g) * numbers * (a.cache_format == kFloat32 ? 4 : 2), q, piece_of);
}

// Groups [begin, end) of row b and key/value head k for queries q [n, wide] (scaled, padded with zeros), whose pieces
// `piece_of(query, top, total, values)` names; the pieces go on from what they hold.
template <class PieceOf>
static void attend_groups(const Attention& a, const Planes& p, int layer, int b, int k, int begin, int end, const float* q,
                          int num_queries, PieceOf&& piece_of, BodyRoom& room) {
    if (a.cache_format == kFloat32)
        return p.bits == 4 ? read_groups<3, true>(a, p, layer, b, k, begin, end, q, num_queries, piece_of, room)
                           : read_groups<3, false>(a, p, layer, b, k, begin, end, q, num_queries, piece_of, room);
    return p.bits == 4 ? read_groups<2, true>(a, p, layer, b, k, begin, end, q, num_queries, piece_of, room)
                       : read_groups<2, false>(a, p, layer, b, k, begin, end, q, num_queries, piece_of, room);
}
