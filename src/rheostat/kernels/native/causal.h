// Causal attention of whole prompts: blocks of queries against blocks of keys, with a running softmax.
//
// Keys and values of a layer lie in panels of bfloat16, as weights do: a key is an output of the product that gives
// scores, a channel is an output of the product that weighs values. So both are the tiles of gemm.h, and what lies above
// the diagonal or before the window is not computed, but for the rest of a tile. Query heads of a group read the same panels.
#pragma once

#include "attention.h"
#include "gemm.h"

constexpr int kQueries = 48;  // of one unit of work
constexpr int kKeys = 256;    // at a time
constexpr int kNearKeys = 128;  // of which the values stay in the first cache

// Keys and values of one layer, rows of the batch one after the other, each from a new block of 16 slots on.
struct KeyPanels {
    int heads = 0, wide = 0, blocks = 0;  // K; d rounded up to 16; blocks of 16 slots, of all rows
    std::vector<int> first;               // [B + 1], each row's first block
    Scratch<uint32_t> keys;               // [K][blocks][wide / 2 pairs][16 slots]
    Scratch<uint32_t> values;             // [K][wide / 16][blocks * 8 pairs of slots][16 channels]

    void reserve(const std::vector<int>& slots, int num_heads, int head_dim) {
        heads = num_heads, wide = round_up(head_dim, kLanes);
        first.assign(1, 0);
        for (int count : slots) first.push_back(first.back() + (count + kLanes - 1) / kLanes);
        blocks = first.back();
        const size_t n = (size_t)heads * blocks * wide * kLanes / 2;
        keys.reserve(n), values.reserve(n);
    }

    int64_t panel() const { return (int64_t)wide / 2 * kLanes; }  // pairs in a panel of 16 keys

    uint32_t* key_block(int head, int block) { return keys.data.get() + ((int64_t)head * blocks + block) * panel(); }

    uint32_t* value_block(int head, int channels, int block) {
        return values.data.get() + (((int64_t)head * (wide / kLanes) + channels) * blocks + block) * 8 * kLanes;
    }

    // Slots of one block: keys and values of `count` <= 16 of them, floats [16][wide], zeros elsewhere.
    void set(int head, int block, const float* key, const float* value) {
        uint32_t* to = key_block(head, block);
        alignas(64) uint16_t half[kLanes];
        for (int s = 0; s < kLanes; s++)
            for (int i = 0; i < wide; i += kLanes) {
                store_bfloat(half, load(key + s * wide + i));
                for (int j = 0; j < kLanes; j += 2) to[(i + j) / 2 * kLanes + s] = half[j] | (uint32_t)half[j + 1] << 16;
            }
        for (int i = 0; i < wide; i += kLanes) {
            to = value_block(head, i / kLanes, block);
            for (int s = 0; s < kLanes; s += 2) {
                alignas(64) uint16_t odd[kLanes];
                store_bfloat(half, load(value + s * wide + i));
                store_bfloat(odd, load(value + (s + 1) * wide + i));
                for (int j = 0; j < kLanes; j++) to[s / 2 * kLanes + j] = half[j] | (uint32_t)odd[j] << 16;
            }
        }
    }
};

// What one thread needs for a block of queries.
struct CausalScratch {
    alignas(64) float scores[kQueries][kKeys];
    alignas(64) uint32_t weights[kQueries][kKeys / 2];
    float top[kQueries], total[kQueries];
    std::vector<float> out;  // [kQueries][wide]
};

// One row's scores of slots [begin, end) of `count` become weights; returns what earlier sums keep. Scores are in powers
// of two. Slots that are not seen get a weight below 2^-119 of the largest.
INLINE float soften(float* scores, uint32_t* weights, int begin, int end, int count, float& top, float& total) {
    if (begin >= end) {
        memset(weights, 0, count * 2);
        return 1;
    }
    for (int s = 0; s < begin; s++) scores[s] = -INFINITY;
    for (int s = end; s < count; s++) scores[s] = -INFINITY;
    F16 high = load(scores);
    for (int s = kLanes; s < count; s += kLanes) high = larger(high, load(scores + s));
    const float highest = std::max(top, largest(high));
    const float keep = top == highest ? 1 : top == -INFINITY ? 0 : exp2f(top - highest);
    F16 all{};
    for (int s = 0; s < count; s += kLanes) {
        const F16 weight = power_of_two(load(scores + s) - highest);
        all += weight;
        store_bfloat((uint16_t*)weights + s, weight);
    }
    total = total * keep + sum(all);
    top = highest;
    return keep;
}

// Queries that stand at slots [first, first + count) of row b, in one head, over its slots.
template <class Query>
class CausalBlock {
public:
    CausalBlock(KeyPanels& panels, int b, int head, int first, int count, int window, CausalScratch& own, Query& query)
        : panels_(panels), base_(panels.first[b]), head_(head), first_(first), count_(count), window_(window), own_(own),
          query_(query) {}

    void run() {
        const int start = oldest(first_) / kLanes * kLanes;
        memset(own_.out.data(), 0, (size_t)count_ * panels_.wide * sizeof(float));
        for (int i = 0; i < count_; i++) own_.top[i] = -INFINITY, own_.total[i] = 0;
        for (int slot = start; slot < first_ + count_; slot += kKeys) {
            score(slot);
            for (int i = 0; i < count_; i++) {
                const int t = first_ + i, seen = blocks(slot, i / kTileRows * kTileRows);
                if (!seen) continue;
                const float keep = soften(own_.scores[i], own_.weights[i], std::max(0, oldest(t) - slot),
                                          std::min(t + 1 - slot, kKeys), seen * kLanes, own_.top[i], own_.total[i]);
                float* out = own_.out.data() + i * panels_.wide;
                for (int c = 0; c < panels_.wide && keep != 1; c += kLanes) store(out + c, load(out + c) * keep);
            }
            add_values(slot);
        }
    }

private:
    // The first slot that the query at slot t sees.
    int oldest(int t) const { return window_ ? std::max(0, t - window_ + 1) : 0; }

    int rows(int at) const { return std::min(kTileRows, count_ - at); }

    // Blocks of 16 slots, from `slot` on, that the rows of the tile at `at` see any of.
    int blocks(int slot, int at) const {
        const int last = first_ + at + rows(at) - 1;
        if (slot > last || slot + kKeys <= oldest(first_ + at)) return 0;
        return (std::min(kKeys, last - slot + 1) + kLanes - 1) / kLanes;
    }

    // Four blocks of keys stay in the first cache while all queries go by.
    void score(int slot) {
        const uint8_t* w[kTilePanels];
        const uint32_t* x[kTileRows];
        for (int p = 0; p < kKeys / kLanes; p += kTilePanels)
            for (int at = 0; at < count_; at += kTileRows) {
                const int some = std::min(kTilePanels, blocks(slot, at) - p);
                if (some <= 0) continue;
                for (int r = 0; r < rows(at); r++) x[r] = query_(first_ + at + r);
                for (int i = 0; i < some; i++)
                    w[i] = (const uint8_t*)panels_.key_block(head_, base_ + slot / kLanes + p + i);
                const TileOut to{own_.scores[at] + p * kLanes, kKeys};
                multiply_tile(kBFloat16, w, some, x, rows(at), panels_.wide / 2, to);
            }
    }

    void add_values(int slot) {
        const uint8_t* w[kTilePanels];
        const uint32_t* x[kTileRows];
        const int wide = panels_.wide;
        for (int near = 0; near < kKeys / kLanes; near += kNearKeys / kLanes)
            for (int c = 0; c < wide / kLanes; c += kTilePanels)
                for (int at = 0; at < count_; at += kTileRows) {
                    const int some = std::min(kTilePanels, wide / kLanes - c);
                    const int seen = std::min(blocks(slot, at) - near, kNearKeys / kLanes);
                    if (seen <= 0) continue;
                    for (int r = 0; r < rows(at); r++) x[r] = own_.weights[at + r] + near * kLanes / 2;
                    for (int i = 0; i < some; i++)
                        w[i] = (const uint8_t*)panels_.value_block(head_, c + i, base_ + slot / kLanes + near);
                    const TileOut to{own_.out.data() + at * wide + c * kLanes, wide, true};
                    multiply_tile(kBFloat16, w, some, x, rows(at), seen * kLanes / 2, to);
                }
    }

    KeyPanels& panels_;
    const int base_, head_, first_, count_, window_;
    CausalScratch& own_;
    Query& query_;
};

constexpr float kLog2E = 1.44269504f;

// The queries that stand at slots [first, first + count) of row b, of one key/value head; query(t) gives that at slot t as
// pairs (scaled, and by kLog2E too; `wide` values). Their results go to take(t, const float*).
template <class Query, class Take>
static void attend_causally(KeyPanels& panels, int b, int head, int first, int count, int window, CausalScratch& own,
                            Query&& query, Take&& take) {
    const int wide = panels.wide;
    if (own.out.size() < (size_t)kQueries * wide) own.out.resize((size_t)kQueries * wide);
    CausalBlock<Query>(panels, b, head, first, count, window, own, query).run();
    for (int i = 0; i < count; i++) {
        float* out = own.out.data() + i * wide;
        for (int c = 0; c < wide; c += kLanes) store(out + c, load(out + c) * (1 / own.total[i]));
        take(first + i, out);
    }
}
