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
constexpr int kMostQueries = 6;  // at once: with three digits each, what the registers hold

// What one thread needs while it reads a body.
struct BodyRoom {
    std::vector<int8_t> digits;
    std::vector<float> floats;
    std::vector<uint8_t> codes;
};

typedef int8_t B16 __attribute__((vector_size(16)));

INLINE void store_bytes(int8_t* to, I16 v) {
    B16 b = __builtin_convertvector(v, B16);
    memcpy(to, &b, sizeof b);
}

// Numbers x [n] (n a multiple of 16) as scale * sum of digit_i * 128^(D - 1 - i); `total` is scale * their sum.
template <int D>
INLINE void to_digits(const float* x, int n, int8_t* digits, float& scale, float& total) {
    F16 high{};
    for (int i = 0; i < n; i += kLanes) {
        F16 v = load(x + i);
        high = larger(high, larger(v, -v));
    }
    const float most = 127 * (D == 3 ? 16384.0f : D == 2 ? 128.0f : 1.0f), top = largest(high);
    const float inverse = top > 0 ? most / top : 0, shift = 12582912.0f;
    scale = top / most;
    I16 sum{};
    for (int i = 0; i < n; i += kLanes) {
        F16 t = load(x + i) * inverse + shift;
        I16 v;
        memcpy(&v, &t, sizeof v);
        v -= 0x4b400000;
        sum += v;
        for (int d = D - 1; d > 0; d--) {
            I16 low = ((v + 64) & 127) - 64;
            store_bytes(digits + d * n + i, low);
            v = (v - low) >> kDigitBits;
        }
        store_bytes(digits + i, v);
    }
    int64_t whole = 0;
    for (int j = 0; j < kLanes; j++) whole += sum[j];
    total = scale * (float)whole;
}

// Codes of `octs` eights as quads of bytes: 2 * octs vectors.
template <bool Small>
INLINE void unpack_codes(const uint8_t* upper, const uint8_t* lower, int octs, uint8_t* to) {
    const int32_t nibble = 0x0f0f0f0f;
    for (int o = 0; o < octs; o++) {
        I16 u, low, high;
        memcpy(&u, upper + o * 64, sizeof u);
        if (Small) {
            low = u & nibble, high = (u >> 4) & nibble;
        } else {
            I16 l;
            memcpy(&l, lower + o * 64, sizeof l);
            low = ((u & nibble) << 4) | (l & nibble), high = (u & ~nibble) | ((l >> 4) & nibble);
        }
        memcpy(to + o * 128, &low, sizeof low);
        memcpy(to + o * 128 + 64, &high, sizeof high);
    }
}

// out[r] = sixteen sums of codes [quads][16][4] with the digits [R][D][width] of R queries.
template <int R, int D, bool Small>
static void dot_codes(const uint8_t* codes, int quads, const int8_t* digits, int width, F16* out) {
    I16 acc[R][D]{};
    for (int q = 0; q < quads; q++) {
        I16 v = load_bytes(codes + q * 64);
        for (int r = 0; r < R; r++)
            for (int d = 0; d < D; d++) {
                const int32_t quad = quad_at(digits + (r * D + d) * width + q * 4);
                acc[r][d] = Small ? dot_small_quads(acc[r][d], v, quad) : dot_quads(acc[r][d], v, quad);
            }
    }
    for (int r = 0; r < R; r++) {
        out[r] = __builtin_convertvector(acc[r][0], F16);
        for (int d = 1; d < D; d++) out[r] = out[r] * 128.0f + __builtin_convertvector(acc[r][d], F16);
    }
}

template <int D, bool Small, class Take>
INLINE void dot_all(const uint8_t* codes, int quads, const int8_t* digits, int width, int num_queries, Take&& take) {
    F16 out[kMostQueries];
    const int blocks = (num_queries + kMostQueries - 1) / kMostQueries;
    for (int i = 0; i < blocks; i++) {
        Share share(num_queries, i, blocks);
        const int8_t* x = digits + (int64_t)share.begin * D * width;
        switch (share.end - share.begin) {
            case 1: dot_codes<1, D, Small>(codes, quads, x, width, out); break;
            case 2: dot_codes<2, D, Small>(codes, quads, x, width, out); break;
            case 3: dot_codes<3, D, Small>(codes, quads, x, width, out); break;
            case 4: dot_codes<4, D, Small>(codes, quads, x, width, out); break;
            case 5: dot_codes<5, D, Small>(codes, quads, x, width, out); break;
            default: dot_codes<6, D, Small>(codes, quads, x, width, out);
        }
        for (int q = share.begin; q < share.end; q++) take(q, out[q - share.begin]);
    }
}

template <int Type>
INLINE void widen_as(const void* from, int64_t at, int n, float* to) {
    const typename Stored<Type>::T* p = (const typename Stored<Type>::T*)from + at;
    for (int i = 0; i < n; i += kLanes) store_part(to + i, get_part<Type>(p + i, std::min(kLanes, n - i)), std::min(kLanes, n - i));
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
        dim_ = a.head_dim, wide_ = round_up(dim_, kLanes), tokens_ = p.tokens();
        const int longest = std::max(wide_, tokens_);
        const size_t digits = (size_t)n_ * D * longest;
        const size_t floats = (size_t)n_ * (tokens_ + 4) + 5 * longest + 2 * (dim_ / p.value_group) * tokens_ + 64;
        if (room_.digits.size() < digits) room_.digits.resize(digits);
        if (room_.floats.size() < floats) room_.floats.resize(floats);
        if (room_.codes.size() < (size_t)16 * longest) room_.codes.resize((size_t)16 * longest);
        scores_ = room_.floats.data(), factors_ = scores_ + (size_t)n_ * tokens_, adds_ = factors_ + n_;
        work_ = adds_ + n_, scale_ = work_ + longest, zero_ = scale_ + longest, rest_ = zero_ + longest;
    }

    // One block: scores, a running softmax, and the weighted values of all queries q [n, wide].
    template <class PieceOf>
    void read(const uint8_t* upper, const uint8_t* lower, const uint8_t* scales, const float* q, PieceOf&& piece_of) {
        const int64_t key_bytes = (int64_t)tokens_ * wide_ / 2;
        score(upper, lower, scales, q);
        for (int i = 0; i < n_; i++) soften(i, piece_of);
        weigh(upper + key_bytes, Small ? nullptr : lower + key_bytes, scales, piece_of);
    }

private:
    void score(const uint8_t* upper, const uint8_t* lower, const uint8_t* scales, const float* q) {
        widen(a_.cache_format, scales, 0, dim_, scale_);
        widen(a_.cache_format, scales, dim_, dim_, zero_);
        for (int i = dim_; i < wide_; i++) scale_[i] = zero_[i] = 0;
        for (int i = 0; i < n_; i++) {
            F16 add{};
            for (int c = 0; c < wide_; c += kLanes) {
                F16 x = load(q + (int64_t)i * wide_ + c), s = load(scale_ + c), z = load(zero_ + c);
                store(work_ + c, Small ? x * s : x * s * 0.0625f);
                add += x * (Small ? z : z - s * 0.5f);
            }
            float total;
            to_digits<D>(work_, wide_, &room_.digits[(size_t)i * D * wide_], factors_[i], total);
            adds_[i] = sum(add) + kCodeBias<Small> * total;
        }
        for (int t = 0; t < tokens_; t += kLanes) {
            const int64_t at = (int64_t)t * wide_ / 2;
            unpack_codes<Small>(upper + at, lower + at, wide_ / 8, room_.codes.data());
            dot_all<D, Small>(room_.codes.data(), wide_ / 4, room_.digits.data(), wide_, n_, [&](int i, F16 v) {
                v = v * factors_[i] + adds_[i];
                if (a_.softcap > 0)
                    for (int j = 0; j < kLanes; j++) v[j] = a_.softcap * tanhf(v[j] / a_.softcap);
                for (int j = p_.group - t; j < kLanes; j++) v[j] = -INFINITY;
                store(scores_ + (int64_t)i * tokens_ + t, v);
            });
        }
    }

    template <class PieceOf>
    void soften(int i, PieceOf&& piece_of) {
        float *top, *sum_of, *to, *score = scores_ + (int64_t)i * tokens_;
        piece_of(i, top, sum_of, to);
        F16 high = splat(-INFINITY), total{};
        for (int t = 0; t < tokens_; t += kLanes) high = larger(high, load(score + t));
        const float now = std::max(*top, largest(high)), keep = *top == -INFINITY ? 0 : expf(*top - now);
        for (int t = 0; t < tokens_; t += kLanes) {
            F16 weight = exponential(load(score + t) - now);
            for (int j = p_.group - t; j < kLanes; j++) weight[j] = 0;
            store(score + t, weight);
            total += weight;
        }
        *sum_of = *sum_of * keep + sum(total);
        *top = now;
        if (keep != 1)
            for (int c = 0; c < wide_; c += kLanes) store(to + c, load(to + c) * keep);
    }

    template <class PieceOf>
    void weigh(const uint8_t* upper, const uint8_t* lower, const uint8_t* scales, PieceOf&& piece_of) {
        const int parts = dim_ / p_.value_group;
        widen(a_.cache_format, scales, 2 * dim_, 2 * parts * tokens_, rest_);
        for (int part = 0; part < parts; part++) {
            const float *s = rest_ + part * tokens_, *z = rest_ + (parts + part) * tokens_;
            for (int i = 0; i < n_; i++) {
                F16 add{};
                for (int t = 0; t < tokens_; t += kLanes) {
                    F16 w = load(scores_ + (int64_t)i * tokens_ + t), scale = load(s + t), zero = load(z + t);
                    store(work_ + t, Small ? w * scale : w * scale * 0.0625f);
                    add += w * (Small ? zero : zero - scale * 0.5f);
                }
                float total;
                to_digits<D>(work_, tokens_, &room_.digits[(size_t)i * D * tokens_], factors_[i], total);
                adds_[i] = sum(add) + kCodeBias<Small> * total;
            }
            const int first = part * p_.value_group, last = std::min(first + p_.value_group, dim_);
            for (int c = first; c < last; c += kLanes) {
                const int64_t at = (int64_t)c * tokens_ / 2;
                unpack_codes<Small>(upper + at, lower + (Small ? 0 : at), tokens_ / 8, room_.codes.data());
                dot_all<D, Small>(room_.codes.data(), tokens_ / 4, room_.digits.data(), tokens_, n_, [&](int i, F16 v) {
                    float *top, *sum_of, *to;
                    piece_of(i, top, sum_of, to);
                    store(to + c, load(to + c) + (v * factors_[i] + adds_[i]));
                });
            }
        }
    }

    const Attention& a_;
    const Planes& p_;
    const int n_;
    BodyRoom& room_;
    int dim_, wide_, tokens_;
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
        reader.read(p.upper + (first + g) * plane, Small ? nullptr : p.lower + (first + g) * plane,
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
