// Reading prompts: all tokens of a batch through a range of layers, in one parallel part.
//
// Rows of the batch are packed one after the other without padding. The residual stream is float32; what products read
// is bfloat16, rounded once, after all that goes before. Where a router chose, tokens go through the FFN sorted by width.
#pragma once

#include "causal.h"
#include "decoder.h"
#include "grouped.h"

struct Reading {
    float* hidden;             // [N, D], the residual stream; overwritten
    const int64_t* positions;  // [N]
    const float* settings;     // [N], or null: all tokens dense
    const int32_t* lengths;    // [B], tokens of each row
    const int32_t* pasts;      // [B], slots that the cache holds before them
    const int32_t* rows;       // [B], rows of the cache
    uint8_t *keys, *values;    // [L, rows, K, S, d], as in a step
    int64_t layer_stride;
    const float *cos, *sin;  // [P, r / 2]
    int32_t* experts;        // [L, N]; written where `settings` is given
    int32_t num_rows, num_tokens, first_layer, last_layer;
};

// What the threads share, for one call.
struct ReaderCommon {
    HalfRows normed, queries, attended, hidden;
    Scratch<float> qkv;
    KeyPanels panels;
    Grouping order;
    std::vector<int> first_token;                 // [B], among the packed
    std::vector<int> row_of_block;                // of each block of 16 slots
    std::vector<std::pair<int, int>> queries_of;  // row and first slot of each block of queries, those that see most first
};

// What each thread keeps to itself.
struct ReaderOwn {
    CausalScratch causal;
    Grouping whole;
    std::vector<float> normed, block, routed;
};

constexpr int kPhases = 9;        // of one layer at most
constexpr int kRoutedTokens = 24;  // at a time

class Reader {
public:
    Reader(const Decoder& decoder, const Reading& reading, ReaderCommon& common, Phases& phases, Team& team, int thread,
           ReaderOwn& own)
        : d_(decoder), a_(decoder.attention), s_(reading), c_(common), phases_(phases), team_(team), thread_(thread), p_(own) {}

    void run() {
        for (int i = s_.first_layer; i < s_.last_layer; i++) run_layer(i);
    }

protected:
    void run_layer(int i) {
        const Layer& layer = d_.layers[i];
        phase_ = (i - s_.first_layer) * kPhases;
        norm(layer.input_norm, c_.normed);
        project(layer);
        prepare(layer, i);
        attend(layer);
        put_out(layer);
        feed_forward(layer.ffn, choose(layer, i));
    }

    float* residual(int n) { return s_.hidden + (int64_t)n * d_.hidden_size; }

    // Blocks of tokens, for what each token does for itself.
    template <class Function>
    void each_block(int size, Function&& function) {
        share_out(phases_, phase_++, (s_.num_tokens + size - 1) / size, team_, [&](int unit) {
            function(unit * size, std::min(unit * size + size, s_.num_tokens));
        });
    }

    // Chunks of tokens and `others`, for products.
    template <class Function>
    void each_product(int others, Function&& function) {
        const Chunks chunks(s_.num_tokens, others, team_.size);
        share_out(phases_, phase_++, chunks.count * others, team_, [&](int unit) {
            const int chunk = unit / others;
            function(unit % others, (unit + team_.size) % others, chunks.begin(chunk), chunks.end(chunk, s_.num_tokens));
        });
    }

    // The residual stream, normalised, into channels of `to` from `first` on; of the tokens `others`, if given.
    void norm(const float* weight, HalfRows& to, int first = 0, const int32_t* others = nullptr) {
        float* normed = room(p_.normed, d_.hidden_size);
        each_block(16, [&](int begin, int end) {
            for (int n = begin; n < end; n++) {
                rms_norm(residual(others ? others[n] : n), weight, d_.hidden_size, d_.eps, normed);
                to.set(n, normed, d_.hidden_size, first);
            }
        });
    }

    static int width(const Layer& layer) { return layer.q.rows + layer.k.rows + layer.v.rows; }

    void project(const Layer& layer) {
        const Matrix* parts[] = {&layer.q, &layer.k, &layer.v};
        const float* biases[] = {layer.q_bias, layer.k_bias, layer.v_bias};
        const int stride = width(layer);
        each_product(num_groups(layer.q) + num_groups(layer.k) + num_groups(layer.v), [&](int group, int next, int begin, int end) {
            int i = 0, before = 0;
            for (; group >= num_groups(*parts[i]); i++) {
                group -= num_groups(*parts[i]), next -= num_groups(*parts[i]);
                before += parts[i]->rows;
            }
            if (next < 0) next = group;  // in another matrix: too few to matter
            const auto row = [&](int r) { return c_.normed.row(r); };
            multiply_group(*parts[i], group, next, begin, end, d_.hidden_size, row, [&](int r, int column, int n, F16 v) {
                if (biases[i]) v += load_most(biases[i] + column, n);
                store_most(c_.qkv.data.get() + (int64_t)r * stride + before + column, v, n);
            });
        });
    }

    // Queries turned and scaled; keys and values into the cache and into panels: sixteen slots of one row at a time.
    void prepare(const Layer& layer, int index) {
        const int dim = a_.head_dim, wide = round_up(dim, kLanes), kv = a_.num_kv_heads, stride = width(layer);
        float *key = room(p_.block, 2 * (size_t)kLanes * wide), *value = key + kLanes * wide;
        share_out(phases_, phase_++, c_.panels.blocks, team_, [&](int unit) {
            const int b = c_.row_of_block[unit], first = (unit - c_.panels.first[b]) * kLanes, past = s_.pasts[b];
            const int count = std::min(kLanes, past + s_.lengths[b] - first), old = std::min(std::max(past - first, 0), count);
            const int token = c_.first_token[b] + first - past;  // of slot `first`, were it a token
            const float* x = c_.qkv.data.get() + (int64_t)token * stride;
            memset(key, 0, 2 * kLanes * wide * sizeof(float));
            for (int i = old; i < count; i++)
                for (int h = 0; h < a_.num_heads; h++) {
                    turn(x + (int64_t)i * stride + h * dim, layer.q_norm, layer.has_rope, token + i, key);
                    uint16_t* to = c_.queries.values(token + i) + h * wide;
                    for (int j = 0; j < wide; j += kLanes) store_bfloat(to + j, load(key + j) * (a_.scale * kLog2E));
                }
            for (int k = 0; k < kv; k++) {
                const int64_t at = (((int64_t)s_.rows[b] * kv + k) * a_.num_slots + first) * dim + index * s_.layer_stride;
                for (int i = 0; i < old; i++) {
                    read_slot(s_.keys, at + i * dim, key + i * wide);
                    read_slot(s_.values, at + i * dim, value + i * wide);
                }
                for (int i = old; i < count; i++) {
                    const float* from = x + (int64_t)i * stride + layer.q.rows + k * dim;
                    turn(from, layer.k_norm, layer.has_rope, token + i, key + i * wide);
                    memcpy(value + i * wide, from + layer.k.rows, dim * sizeof(float));
                    write(s_.keys, at + i * dim, key + i * wide);
                    write(s_.values, at + i * dim, value + i * wide);
                }
                c_.panels.set(k, unit, key, value);
            }
        });
    }

    // One head of a query or a key: its norm and its rotation.
    void turn(const float* x, const float* norm_weight, bool has_rope, int n, float* to) {
        if (norm_weight)
            rms_norm(x, norm_weight, a_.head_dim, d_.eps, to);
        else
            memcpy(to, x, a_.head_dim * sizeof(float));
        const int64_t at = s_.positions[n] * d_.rope_half;
        if (has_rope) rotate(to, s_.cos + at, s_.sin + at, d_.rope_half);
    }

    void write(uint8_t* cache, int64_t at, const float* x) {
        int i = 0;
        for (; i + kLanes <= a_.head_dim && a_.cache_format != kFloat32; i += kLanes) {
            if (a_.cache_format == kBFloat16) store_bfloat((uint16_t*)cache + at + i, load(x + i));
            if (a_.cache_format == kFloat16) store_half((uint16_t*)cache + at + i, load(x + i));
        }
        write_slot(a_.cache_format, cache, at + i, x + i, a_.head_dim - i);
    }

    void read_slot(const uint8_t* cache, int64_t at, float* x) {
        for (int i = 0; i < a_.head_dim; i += kLanes) {
            const int n = std::min(kLanes, a_.head_dim - i);
            F16 v;
            if (a_.cache_format == kBFloat16) v = get_part<kBFloat16>((const uint16_t*)cache + at + i, n);
            else if (a_.cache_format == kFloat16) v = get_part<kFloat16>((const uint16_t*)cache + at + i, n);
            else v = get_part<kFloat32>((const float*)cache + at + i, n);
            store(x + i, v);
        }
    }

    void attend(const Layer& layer) {
        const int dim = a_.head_dim, wide = round_up(dim, kLanes), group = a_.num_heads / a_.num_kv_heads;
        share_out(phases_, phase_++, (int)c_.queries_of.size() * a_.num_heads, team_, [&](int unit) {
            const int h = unit % a_.num_heads, b = c_.queries_of[unit / a_.num_heads].first;
            const int first = c_.queries_of[unit / a_.num_heads].second, token = c_.first_token[b] - s_.pasts[b];
            const int count = std::min(kQueries, s_.pasts[b] + s_.lengths[b] - first);
            const auto query = [&](int slot) { return c_.queries.row(token + slot) + h * wide / 2; };
            const auto take = [&](int slot, const float* x) {
                uint16_t* to = c_.attended.values(token + slot) + h * dim;
                int i = 0;
                for (; i + kLanes <= dim; i += kLanes) store_bfloat(to + i, load(x + i));
                for (; i < dim; i++) to[i] = float_to_bfloat(x[i]);
                if (h == a_.num_heads - 1) to[dim] = 0;  // where products take inputs in pairs
            };
            attend_causally(c_.panels, b, h / group, first, count, layer.window, p_.causal, query, take);
        });
    }

    void put_out(const Layer& layer) {
        each_product(num_groups(layer.o), [&](int group, int next, int begin, int end) {
            const auto row = [&](int r) { return c_.attended.row(r); };
            const auto take = [&](int r, int column, int n, F16 v) {
                if (layer.o_bias) v += load_most(layer.o_bias + column, n);
                add(r, column, n, v);
            };
            multiply_group(layer.o, group, next, begin, end, a_.num_heads * a_.head_dim, row, take);
        });
    }

    void add(int n, int column, int count, F16 v) {
        float* to = residual(n) + column;
        store_most(to, load_most(to, count) + v, count);
    }

    // Normalises what the FFN reads, and sorts the tokens by the expert that each takes.
    const Grouping& choose(const Layer& layer, int index) {
        const int count = s_.num_tokens;
        if (!s_.settings || !layer.router.width) {
            norm(layer.post_norm, c_.normed);
            p_.whole.set_all(count, layer.ffn.num_experts);
            return p_.whole;
        }
        int32_t* chosen = s_.experts + (int64_t)index * count;
        each_block(kRoutedTokens, [&](int begin, int end) { route(layer, begin, end, chosen); });
        if (thread_ == 0) c_.order.sort(chosen, count, layer.ffn.num_experts);
        team_.barrier();
        return c_.order;
    }

    void route(const Layer& layer, int begin, int end, int32_t* chosen) {
        const Router& router = layer.router;
        const int wide = d_.hidden_size, inner_wide = round_up(router.width, kLanes);
        float* normed = room(p_.normed, (size_t)kRoutedTokens * wide);
        float* inner = room(p_.routed, (size_t)kRoutedTokens * inner_wide + router.num_outputs);
        float* scores = inner + kRoutedTokens * inner_wide;
        for (int n = begin; n < end; n++) {
            rms_norm(residual(n), layer.post_norm, wide, d_.eps, normed + (n - begin) * wide);
            c_.normed.set(n, normed + (n - begin) * wide, wide);
        }
        const auto row = [&](int r) { return (const uint32_t*)(normed + r * wide); };
        const auto take = [&](int r, int column, int n, F16 v) {
            store(inner + r * inner_wide + column, activate(v + load_part(router.inner_bias + column, n), kSilu));
        };
        const int groups = num_groups(router.inner);
        for (int g = 0; g < groups; g++) multiply_group(router.inner, g, groups, 0, end - begin, wide, row, take);
        for (int n = begin; n < end; n++) {
            for (int o = 0; o < router.num_outputs; o++) {
                F16 dot{};
                for (int i = 0; i < router.width; i += kLanes)
                    dot += load(inner + (n - begin) * inner_wide + i) *
                           load_part(router.outer + (int64_t)o * router.width + i, std::min(kLanes, router.width - i));
                scores[o] = sum(dot) + router.outer_bias[o];
            }
            // A text's first token is the attention sink, whose huge activations serve all.
            chosen[n] = s_.positions[n] ? choose_expert(router, layer.ffn.sizes, layer.ffn.num_experts, scores, s_.settings[n])
                                        : layer.ffn.num_experts - 1;
        }
    }

    void feed_forward(const Ffn& ffn, const Grouping& order) {
        each_product(num_hidden_units(ffn), [&](int unit, int next, int begin, int end) {
            const auto row = [&](int r) { return c_.normed.row(order.rows[r]); };
            grouped_hidden(ffn, order, unit, next, begin, end, row, c_.hidden);
        });
        each_product(num_groups(ffn.downs[0]), [&](int group, int next, int begin, int end) {
            const auto take = [&](int n, int column, int count, F16 v) { add(n, column, count, v); };
            grouped_down(ffn, order, group, next, begin, end, c_.hidden, take);
        });
    }

    const Decoder& d_;
    const Attention& a_;
    const Reading& s_;
    ReaderCommon& c_;
    Phases& phases_;
    Team& team_;
    int thread_;
    ReaderOwn& p_;
    int phase_ = 0;
};

static void lay_out(const Decoder& d, const Reading& s, ReaderCommon& common) {
    const Attention& a = d.attention;
    std::vector<int> slots;
    for (int b = 0, token = 0; b < s.num_rows; token += s.lengths[b++]) {
        common.first_token.push_back(token);
        slots.push_back(s.pasts[b] + s.lengths[b]);
        for (int i = 0; i < s.lengths[b]; i += kQueries) common.queries_of.push_back({b, s.pasts[b] + i});
    }
    std::sort(common.queries_of.begin(), common.queries_of.end(), [](auto x, auto y) { return x.second > y.second; });
    common.panels.reserve(slots, a.num_kv_heads, a.head_dim);
    for (int b = 0; b < s.num_rows; b++) common.row_of_block.resize(common.panels.first[b + 1], b);
    size_t qkv = 0, ffn = 0;
    for (int i = s.first_layer; i < s.last_layer; i++) {
        const Layer& layer = d.layers[i];
        qkv = std::max(qkv, (size_t)(layer.q.rows + layer.k.rows + layer.v.rows));
        ffn = std::max(ffn, (size_t)layer.ffn.size());
    }
    common.qkv.reserve(qkv * s.num_tokens);
    common.normed.reserve(s.num_tokens, d.hidden_size);
    common.queries.reserve(s.num_tokens, a.num_heads * round_up(a.head_dim, kLanes));
    common.attended.reserve(s.num_tokens, a.num_heads * a.head_dim + 1);
    common.hidden.reserve(s.num_tokens, (int)ffn);
}

static void read_prompts(const Decoder& d, const Reading& s, int num_threads) {
    ReaderCommon common;
    lay_out(d, s, common);
    Phases phases((s.last_layer - s.first_layer) * kPhases);
    parallel(num_threads, [&](Team& team, int thread) {
        static thread_local ReaderOwn own;
        Reader(d, s, common, phases, team, thread, own).run();
    });
}
