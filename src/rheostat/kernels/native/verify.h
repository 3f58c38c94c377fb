// Attention of the new tokens of a step: one a row when decoding, several where a draft is checked, another number in
// every row. Token t of a row sees its cache and the new tokens up to itself.
//
// A row's slots are cut at fixed places, and the pieces are joined in order, so a token's sums do not depend on how many
// tokens come with it, on the other rows, or on the number of threads: checking a draft rounds as decoding does.
#pragma once

#include "planes.h"

constexpr int kStretch = 256;  // slots of a piece: a multiple of kBlock
constexpr int kShort = 64;     // of the pieces before slot kStretch: what is short has to be shared out too

// The first slot of piece s.
INLINE int piece_begin(int s) {
    constexpr int count = kStretch / kShort;
    return s <= count ? s * kShort : (s - count + 1) * kStretch;
}

INLINE int pieces_of(int slots) {
    constexpr int count = kStretch / kShort;
    return slots <= kStretch ? (slots + kShort - 1) / kShort : count - 1 + (slots + kStretch - 1) / kStretch;
}

struct NewTokens {
    const int32_t *lengths, *starts;  // [B], slots filled before this step, and first slots that are not padding
    const int32_t* firsts;            // [B + 1], each row's first new token among all; null: one a row
    const Planes* body;               // what is before the slots, or null
    int32_t num_cached;               // B

    int first(int b) const { return firsts ? firsts[b] : b; }
    int count(int b) const { return firsts ? firsts[b + 1] - firsts[b] : 1; }
    int total() const { return firsts ? firsts[num_cached] : num_cached; }

    int most() const {  // new tokens of a row
        int n = 1;
        for (int b = 0; b < num_cached; b++) n = std::max(n, count(b));
        return n;
    }

    int groups_a_piece() const { return std::max(1, kStretch / body->group); }

    int body_pieces(int b) const {
        return body ? (body->groups[b] + groups_a_piece() - 1) / groups_a_piece() : 0;
    }

    int pieces(int b) const {
        return body_pieces(b) + pieces_of(lengths[b] + count(b) - starts[b]);
    }

    int most_pieces() const {
        int n = 1;
        for (int b = 0; b < num_cached; b++) n = std::max(n, pieces(b));
        return n;
    }
};

// This thread's share of the pieces [tokens, K, most pieces]. `queries(token, k, to)` puts a token's queries [G, wide]
// of a head there; `write(token, b, k, slot)` puts its key and value into the cache.
template <class Queries, class Write>
static void attend_new(const Attention& a, const NewTokens& n, int layer, int window, const uint8_t* keys,
                       const uint8_t* values, float* scratch, Team& team, int thread, std::vector<float>& room_for_queries,
                       std::vector<float>& buffer, BodyRoom& body_room, Queries&& queries, Write&& write) {
    const int group = a.num_heads / a.num_kv_heads, wide = round_up(a.head_dim, kLanes), most = n.most_pieces();
    const size_t wanted = (size_t)n.most() * group * wide;
    if (room_for_queries.size() < wanted) room_for_queries.resize(wanted);
    float* q = room_for_queries.data();
    const Share share = team.share(n.num_cached * a.num_kv_heads * most, thread);
    int ready = -1;
    for (int item = share.begin; item < share.end; item++) {
        const int s = item % most, k = item / most % a.num_kv_heads, b = item / most / a.num_kv_heads;
        const int count = n.count(b), first = n.first(b), bodies = n.body_pieces(b);
        if (!count || s >= n.pieces(b)) continue;
        if (ready != item / most)
            for (int t = 0; t < count; t++) queries(first + t, k, q + (size_t)t * group * wide);
        ready = item / most;
        auto piece_of = [&](int t) {
            return piece_at(scratch, ((int64_t)(first + t) * a.num_kv_heads + k) * most + s, group, a.head_dim);
        };
        if (s < bodies) {
            for (int t = 0; t < count; t++) {
                Piece p = piece_of(t);
                for (int g = 0; g < group; g++) p.top[g] = -INFINITY, p.total[g] = 0;
                memset(p.values, 0, (size_t)group * wide * sizeof(float));
            }
            const int begin = s * n.groups_a_piece(), end = std::min(begin + n.groups_a_piece(), (int)n.body->groups[b]);
            attend_groups(a, *n.body, layer, b, k, begin, end, q, count * group,
                          [&](int i, float*& top, float*& total, float*& to) {
                              Piece p = piece_of(i / group);
                              top = p.top + i % group, total = p.total + i % group, to = p.values + i % group * wide;
                          },
                          body_room);
            continue;
        }
        const int low = n.starts[b] + piece_begin(s - bodies), high = n.starts[b] + piece_begin(s - bodies + 1);
        for (int t = 0; t < count; t++)
            if (n.lengths[b] + t >= low && n.lengths[b] + t < high) write(first + t, b, k, n.lengths[b] + t);
        for (int t = 0; t < count; t++) {
            const int end = n.lengths[b] + t + 1, begin = window ? std::max(low, end - window) : low;
            attend_slots(a, q + (size_t)t * group * wide, keys, values, b, k, begin, std::min(high, end), piece_of(t), buffer);
        }
    }
}

// Joins all pieces of this thread's share of the heads into out [tokens, H * d].
static void join_new(const Attention& a, const NewTokens& n, float* scratch, float* out, Team& team, int thread) {
    const int most = n.most_pieces();
    const Share share = team.share(n.total() * a.num_heads, thread);
    for (int b = 0, item = share.begin; b < n.num_cached; b++)
        for (; item < share.end && item / a.num_heads < n.first(b) + n.count(b); item++)
            join(a, scratch, item / a.num_heads, item % a.num_heads, most, out + (int64_t)item * a.head_dim, n.pieces(b));
}
