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

// What one thread needs for six queries at a time.
struct CausalScratch {
    alignas(64) float scores[kTileRows][kKeys];
    alignas(64) uint32_t weights[kTileRows][kKeys / 2];
    float top[kQueries], total[kQueries];
    std::vector<float> out;  // [kQueries][wide]
};

// One row's scores of slots [begin, end) of `count` become weights, zeros elsewhere; returns what earlier sums keep.
INLINE float soften(float* scores, uint32_t* weights, int begin, int end, int count, float softcap, float& top, float& total) {
    if (begin >= end) {
        memset(weights, 0, count * 2);
        return 1;
    }
    if (softcap > 0)
        for (int s = begin; s < end; s++) scores[s] = softcap * tanhf(scores[s] / softcap);
    for (int s = 0; s < begin; s++) scores[s] = -INFINITY;
    for (int s = end; s < count; s++) scores[s] = -INFINITY;
    F16 high = load(scores);
    for (int s = kLanes; s < count; s += kLanes) high = larger(high, load(scores + s));
    const float highest = std::max(top, largest(high));
    const float keep = top == -INFINITY ? 0 : expf(top - highest);
    F16 all{};
    for (int s = 0; s < count; s += kLanes) {
        const F16 score = load(scores + s) - highest;
        const F16 weight = score < -87.0f ? F16{} : exponential(score);
        all += weight;
        store_bfloat((uint16_t*)weights + s, weight);
    }
    total = total * keep + sum(all);
    top = highest;
    return keep;
}

// The queries that stand at slots [first, first + count) of row b, of one key/value head; query(t) gives that at slot t as
// pairs (scaled, `wide` values). Their results go to take(t, const float*).
template <class Query, class Take>
static void attend_causally(KeyPanels& panels, int b, int head, int first, int count, int window, float softcap,
                            CausalScratch& own, Query&& query, Take&& take) {
    const int wide = panels.wide, channels = wide / kLanes, base = panels.first[b];
    if (own.out.size() < (size_t)kQueries * wide) own.out.resize((size_t)kQueries * wide);
    float* out = own.out.data();
    memset(out, 0, (size_t)count * wide * sizeof(float));
    for (int i = 0; i < count; i++) own.top[i] = -INFINITY, own.total[i] = 0;
    const int start = window ? std::max(0, first - window + 1) / kLanes * kLanes : 0;
    alignas(64) float tile[kTileRows * kTileOutputs];
    const uint8_t* w[kTilePanels];
    const uint32_t* x[kTileRows];
    for (int slot = start; slot < first + count; slot += kKeys)
        for (int at = 0; at < count; at += kTileRows) {
            const int rows = std::min(kTileRows, count - at), last = first + at + rows - 1;
            const int oldest = window ? std::max(0, first + at - window + 1) : 0;
            if (slot > last || slot + kKeys <= oldest) continue;
            const int num = std::min(kKeys, last - slot + 1), blocks = (num + kLanes - 1) / kLanes;
            for (int r = 0; r < rows; r++) x[r] = query(first + at + r);
            for (int p = 0; p < blocks; p += kTilePanels) {
                const int some = std::min(kTilePanels, blocks - p);
                for (int i = 0; i < some; i++) w[i] = (const uint8_t*)panels.key_block(head, base + slot / kLanes + p + i);
                multiply_tile(kBFloat16, w, some, x, rows, wide / 2, tile);
                for (int r = 0; r < rows; r++)
                    memcpy(own.scores[r] + p * kLanes, tile + r * kTileOutputs, some * kLanes * sizeof(float));
            }
            float keep[kTileRows];
            for (int r = 0; r < rows; r++) {
                const int t = first + at + r, low = window ? std::max(0, t - window + 1) : 0;
                keep[r] = soften(own.scores[r], own.weights[r], std::max(0, low - slot), std::min(t + 1 - slot, kKeys),
                                 blocks * kLanes, softcap, own.top[at + r], own.total[at + r]);
                x[r] = own.weights[r];
            }
            for (int c = 0; c < channels; c += kTilePanels) {
                const int some = std::min(kTilePanels, channels - c);
                for (int i = 0; i < some; i++) w[i] = (const uint8_t*)panels.value_block(head, c + i, base + slot / kLanes);
                multiply_tile(kBFloat16, w, some, x, rows, blocks * 8, tile);
                for (int r = 0; r < rows; r++)
                    for (int i = 0; i < some; i++) {
                        float* to = out + (at + r) * wide + (c + i) * kLanes;
                        store(to, load(to) * keep[r] + load(tile + r * kTileOutputs + i * kLanes));
                    }
            }
        }
    for (int i = 0; i < count; i++) {
        const float share = own.total[i] > 0 ? 1 / own.total[i] : 0;
        for (int c = 0; c < wide; c += kLanes) store(out + i * wide + c, load(out + i * wide + c) * share);
        take(first + i, out + i * wide);
    }
}
