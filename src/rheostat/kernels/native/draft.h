// Several greedy steps in one call: what a draft of the model itself writes.
//
// Between two steps there is only the most likely token of each row and its row of the embedding, so the threads stay
// awake and no Python, with its instructions and data gone from the caches after each step, is in between.
#pragma once

#include "decoder.h"

struct Draft {
    const void* table;     // [V, D], the embedding
    int64_t table_stride;  // values from a row to the next
    int32_t table_format;  // kFloat32, kBFloat16 or kFloat16
    int32_t num_tokens;
    int64_t* token_ids;  // [tokens, N], written
};

template <int Type>
INLINE void embed_as(const void* table, int64_t at, int n, float* to) {
    const typename Stored<Type>::T* from = (const typename Stored<Type>::T*)table + at;
    for (int i = 0; i < n; i += kLanes) {
        const int count = std::min(kLanes, n - i);
        store_most(to + i, get_part<Type>(from + i, count), count);
    }
}

static void embed(const Draft& f, int64_t token_id, int n, float* to) {
    const int64_t at = token_id * f.table_stride;
    if (f.table_format == kFloat32) return embed_as<kFloat32>(f.table, at, n, to);
    if (f.table_format == kBFloat16) return embed_as<kBFloat16>(f.table, at, n, to);
    embed_as<kFloat16>(f.table, at, n, to);
}

// The first of the largest of `n` logits.
static int64_t most_likely(const float* logits, int n) {
    F16 high = splat(-INFINITY);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) high = larger(high, load(logits + i));
    float top = largest(high);
    for (; i < n; i++) top = std::max(top, logits[i]);
    for (i = 0; i < n; i++)
        if (logits[i] == top) return i;
    return 0;  // not a number: the first, so that it is a token at all
}

// Step after step, each with the most likely tokens of the one before; `s.experts` has room for those of all steps.
static void write_draft(const Decoder& d, Step s, const Draft& f, int num_threads) {
    const int num_cached = s.tokens.num_cached, n = s.num_rows;
    std::vector<int32_t> lengths(s.tokens.lengths, s.tokens.lengths + num_cached);
    std::vector<int64_t> positions(s.positions, s.positions + n);
    s.tokens.lengths = lengths.data(), s.positions = positions.data();
    for (int i = 0; i < f.num_tokens; i++) {
        take_step(d, s, num_threads);
        for (int r = 0; r < n; r++) {
            const int64_t token = most_likely(s.logits + (int64_t)r * d.head.rows, d.head.rows);
            f.token_ids[(int64_t)i * n + r] = token;
            embed(f, token, d.hidden_size, s.hidden + (int64_t)r * d.hidden_size);
            positions[r]++;
        }
        for (int b = 0; b < num_cached; b++) lengths[b] += s.tokens.count(b);
        if (s.experts) s.experts += (int64_t)d.num_layers * n;
    }
}
