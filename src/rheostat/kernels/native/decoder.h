// A whole decode step of a Llama-like decoder: one token a row, or several, all layers, in one parallel part.
//
// Small work that every thread needs (norms, rounding of activations, joining of attention) each thread does for
// itself, which is cheaper than to meet once more. What is large is shared out.
#pragma once

#include "ffn.h"
#include "verify.h"

constexpr int kOwnPieces = 64;  // tokens times pieces of each, up to which every thread joins them all

constexpr int64_t kAhead = 256 << 10;  // bytes that a thread fetches while it waits: a part of its cache

struct Router {
    Matrix inner;             // [U, D]
    const float* inner_bias;  // [U]
    const float* outer;       // [outputs, U]
    const float* outer_bias;  // [outputs]
    int32_t width;            // U; 0 where there is no router
    int32_t num_outputs;
    int32_t is_confidence;  // else the rule of damage and price
};

struct Layer {
    const float *input_norm, *post_norm;  // [D]
    Matrix q, k, v, o;
    const float *q_bias, *k_bias, *v_bias, *o_bias;  // or null
    const float *q_norm, *k_norm;                    // [d] or null
    Ffn ffn;
    Router router;
    int32_t has_rope;
    int32_t window;  // 0: none
};

struct Decoder {
    const Layer* layers;
    int32_t num_layers, hidden_size, rope_half;  // rope_half: r / 2
    float eps;
    const float* final_norm;
    Matrix head;
    Attention attention;
};

struct Step {
    float* hidden;             // [N, D], the embedded tokens, by row of the cache; overwritten
    const int64_t* positions;  // [N]
    const float* settings;     // [N], or null: all tokens dense
    NewTokens tokens;
    uint8_t *keys, *values;    // [L, B, K, S, d]; a layer's part is dense
    int64_t layer_stride;      // values from a layer's part to the next: more than B K S d where rows are kept free
    const float *cos, *sin;    // [P, r / 2]
    float* logits;             // [N, V]
    int64_t* experts;          // [L, N]; written where `settings` is given
    int32_t num_rows;          // N: as many as rows of the cache, or more where a draft is checked
};

// What the threads share, kept from step to step by the thread that calls.
struct Common {
    std::vector<float> qkv, pieces, attended, scores;
    Input hidden;
};

// What each thread keeps to itself.
struct Private {
    std::vector<float> normed, key, queries, attended, buffer, routed;
    std::vector<int> chosen;
    BodyRoom body;
    Order order;
    Input input, routing;
};

INLINE float* room(std::vector<float>& v, size_t n) {
    if (v.size() < n) v.resize(n);
    return v.data();
}

static void rms_norm(const float* x, const float* weight, int n, float eps, float* y) {
    F16 squares{};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) squares += load(x + i) * load(x + i);
    if (i < n) squares += load_part(x + i, n - i) * load_part(x + i, n - i);
    const float scale = 1 / sqrtf(sum(squares) / n + eps);
    for (i = 0; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * scale * load(weight + i));
    for (; i < n; i++) y[i] = x[i] * scale * weight[i];
}

static void rotate(float* x, const float* cos, const float* sin, int half) {
    int i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const F16 a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(x + i, a * c - b * s);
        store(x + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cos[i] - b * sin[i];
        x[half + i] = b * cos[i] + a * sin[i];
    }
}

static void write_slot(int format, uint8_t* cache, int64_t at, const float* x, int d) {
    for (int i = 0; i < d; i++) {
        if (format == kFloat32) ((float*)cache)[at + i] = x[i];
        if (format == kBFloat16) ((uint16_t*)cache)[at + i] = float_to_bfloat(x[i]);
        if (format == kFloat16) ((uint16_t*)cache)[at + i] = float_to_half(x[i]);
    }
}

static int choose_expert(const Router& router, const int32_t* sizes, int num_experts, const float* scores, float setting) {
    const int full = num_experts - 1;
    if (!(setting > 0)) return full;
    if (!router.is_confidence) {  // least damage plus price; ties go to the larger
        int best = full;
        float least = setting;
        for (int e = full - 1; e >= 0; e--) {
            float total = expf(scores[e]) + setting * ((float)sizes[e] / (float)sizes[full]);
            if (total < least) least = total, best = e;
        }
        return best;
    }
    float top = scores[0], total = 0, sum = 0;
    for (int e = 1; e < num_experts; e++) top = std::max(top, scores[e]);
    for (int e = 0; e < num_experts; e++) total += expf(scores[e] - top);
    for (int e = 0; e < full; e++)
        if ((sum += expf(scores[e] - top) / total) >= 1 - setting) return e;
    return full;
}

class Stepper {
public:
    Stepper(const Decoder& decoder, const Step& step, Common& common, Team& team, int thread, Private& own)
        : d_(decoder), s_(step), c_(common), team_(team), thread_(thread), p_(own) {}

    void run() {
        for (int i = 0; i < d_.num_layers; i++) {
            const Layer& layer = d_.layers[i];
            project(layer);
            team_.barrier(share_of(layer.o));
            attend_share(layer, i);
            team_.barrier(share_of(layer.o));
            put_out(layer);
            team_.barrier(s_.settings ? Fetch{} : share_of(layer.ffn.gate));
            choose(layer, i);
            double then = seconds_now();
            ffn_hidden(layer.ffn, p_.order, p_.input, c_.hidden, p_.buffer, team_, thread_);
            double spent = seconds_now() - then;
            team_.barrier(share_of(layer.ffn.downs[layer.ffn.place(p_.order.experts[0])]));
            then = seconds_now();
            ffn_down(layer.ffn, p_.order, c_.hidden, s_.hidden, d_.hidden_size, true, team_, thread_);
            if (team_.balance) team_.balance->add(thread_, spent + seconds_now() - then);
            team_.barrier(i + 1 < d_.num_layers ? projection_of(d_.layers[i + 1]) : share_of(d_.head));
        }
        norm(d_.final_norm);
        fill(d_.head.format);
        multiply(d_.head, p_.input, s_.num_rows, 0, d_.head.rows, nullptr, s_.logits, d_.head.rows, false, team_, thread_);
    }

private:
    // The beginning of this thread's share of a matrix.
    Fetch share_of(const Matrix& m) const {
        const Share share = team_.share(m.panels(), thread_);
        return {m.data + share.begin * m.panel_bytes, std::min(kAhead, (share.end - share.begin) * m.panel_bytes)};
    }

    // And of a layer's projections of queries, keys and values, one after the other.
    Fetch projection_of(const Layer& layer) const {
        const Share share = team_.share(layer.q.panels() + layer.k.panels() + layer.v.panels(), thread_);
        int first = share.begin;
        for (const Matrix* m : {&layer.q, &layer.k, &layer.v}) {
            if (first < m->panels()) return {m->data + first * m->panel_bytes, std::min(kAhead, (m->panels() - first) * m->panel_bytes)};
            first -= m->panels();
        }
        return {};
    }

    // Normalised residual stream, whole, for this thread.
    void norm(const float* weight) {
        float* to = room(p_.normed, (size_t)s_.num_rows * d_.hidden_size);
        for (int b = 0; b < s_.num_rows; b++)
            rms_norm(s_.hidden + (int64_t)b * d_.hidden_size, weight, d_.hidden_size, d_.eps, to + (int64_t)b * d_.hidden_size);
    }

    void fill(int format) {
        p_.input.reserve(format, s_.num_rows, d_.hidden_size);
        for (int b = 0; b < s_.num_rows; b++) p_.input.set_row(format, b, &p_.normed[(size_t)b * d_.hidden_size], d_.hidden_size);
    }

    void project(const Layer& layer) {
        norm(layer.input_norm);
        fill(layer.q.format);
        const Matrix* parts[] = {&layer.q, &layer.k, &layer.v};
        const float* biases[] = {layer.q_bias, layer.k_bias, layer.v_bias};
        const int stride = layer.q.rows + layer.k.rows + layer.v.rows;
        const int all = layer.q.panels() + layer.k.panels() + layer.v.panels();
        const Share share = team_.share(all, thread_);
        float* y = c_.qkv.data();
        for (int i = 0, before = 0; i < 3; before += parts[i]->panels(), y += parts[i]->rows, i++) {
            const Matrix& m = *parts[i];
            int begin = std::max(share.begin - before, 0), end = std::min(share.end - before, m.panels());
            if (begin >= end) continue;
            begin *= kLanes, end = std::min(end * kLanes, m.rows);
            Team alone;
            multiply(m, p_.input, s_.num_rows, begin, end, biases[i] ? biases[i] + begin : nullptr, y + begin, stride, false,
                     alone, 0);
        }
    }

    void attend_share(const Layer& layer, int index) {
        const Attention& a = d_.attention;
        const int group = a.num_heads / a.num_kv_heads, dim = a.head_dim, wide = round_up(dim, kLanes);
        const int stride = layer.q.rows + layer.k.rows + layer.v.rows;
        const int64_t part = s_.layer_stride * (a.cache_format == kFloat32 ? 4 : 2);
        uint8_t *keys = s_.keys + index * part, *values = s_.values + index * part;
        float* key = room(p_.key, wide);
        auto queries = [&](int r, int k, float* q) {
            for (int g = 0; g < group; g++) {
                float* to = q + g * wide;
                prepare(c_.qkv.data() + (int64_t)r * stride + (k * group + g) * dim, layer.q_norm, layer.has_rope, r, to);
                for (int i = 0; i < dim; i++) to[i] *= a.scale;
                for (int i = dim; i < wide; i++) to[i] = 0;
            }
        };
        auto write = [&](int r, int b, int k, int slot) {
            const float* row = c_.qkv.data() + (int64_t)r * stride + layer.q.rows;
            prepare(row + k * dim, layer.k_norm, layer.has_rope, r, key);
            const int64_t at = (((int64_t)b * a.num_kv_heads + k) * a.num_slots + slot) * dim;
            write_slot(a.cache_format, keys, at, key, dim);
            write_slot(a.cache_format, values, at, row + layer.k.rows + k * dim, dim);
        };
        attend_new(a, s_.tokens, index, layer.window, keys, values, c_.pieces.data(), team_, thread_, p_.queries, p_.buffer,
                   p_.body, queries, write);
    }

    // One head of a query or a key: its norm and its rotation.
    void prepare(const float* x, const float* norm_weight, bool has_rope, int b, float* to) {
        const int dim = d_.attention.head_dim;
        if (norm_weight)
            rms_norm(x, norm_weight, dim, d_.eps, to);
        else
            memcpy(to, x, dim * sizeof(float));
        const int64_t at = s_.positions[b] * d_.rope_half;
        if (has_rope) rotate(to, s_.cos + at, s_.sin + at, d_.rope_half);
    }

    void put_out(const Layer& layer) {
        const Attention& a = d_.attention;
        const int width = a.num_heads * a.head_dim;
        // A few pieces are joined by each thread for itself, which is cheaper than to meet once more.
        const bool is_shared = (int64_t)s_.tokens.total() * s_.tokens.most_pieces() > kOwnPieces;
        float* attended = is_shared ? c_.attended.data() : room(p_.attended, (size_t)s_.num_rows * width);
        Team alone;
        join_new(a, s_.tokens, c_.pieces.data(), attended, is_shared ? team_ : alone, is_shared ? thread_ : 0);
        if (is_shared) team_.barrier();
        p_.input.reserve(layer.o.format, s_.num_rows, width);
        for (int r = 0; r < s_.num_rows; r++) p_.input.set_row(layer.o.format, r, attended + (int64_t)r * width, width);
        multiply(layer.o, p_.input, s_.num_rows, 0, layer.o.rows, layer.o_bias, s_.hidden, d_.hidden_size, true, team_, thread_);
    }

    // The experts of this layer, and the FFN's input in their order.
    void choose(const Layer& layer, int index) {
        const Ffn& ffn = layer.ffn;
        const Router& router = layer.router;
        const int n = s_.num_rows, width = d_.hidden_size;
        norm(layer.post_norm);
        p_.chosen.assign(n, ffn.num_experts - 1);
        if (s_.settings && router.width) {
            p_.routing.reserve(kFloat32, n, width);
            for (int b = 0; b < n; b++) p_.routing.set_row(kFloat32, b, &p_.normed[(size_t)b * width], width);
            multiply(router.inner, p_.routing, n, 0, router.width, router.inner_bias, c_.scores.data(), router.width, false,
                     team_, thread_);
            team_.barrier();
            for (int b = 0; b < n; b++) p_.chosen[b] = decide(router, ffn, b);
        }
        if (s_.settings && thread_ == 0)
            for (int b = 0; b < n; b++) s_.experts[(int64_t)index * n + b] = p_.chosen[b];
        p_.order.sort(ffn, p_.chosen.data(), n);
        p_.input.reserve(ffn.gate.format, n, width);
        for (int r = 0; r < n; r++)
            p_.input.set_row(ffn.gate.format, r, &p_.normed[(size_t)p_.order.rows[r] * width], width);
    }

    int decide(const Router& router, const Ffn& ffn, int b) {
        const int u = router.width, wide = round_up(u, kLanes);
        float* inner = room(p_.routed, wide + router.num_outputs);
        float* scores = inner + wide;
        for (int i = 0; i < u; i += kLanes) {
            int n = std::min(kLanes, u - i);
            store(inner + i, activate(load_part(c_.scores.data() + (int64_t)b * u + i, n), kSilu));
        }
        for (int o = 0; o < router.num_outputs; o++) {
            F16 dot{};
            for (int i = 0; i < u; i += kLanes)
                dot += load(inner + i) * load_part(router.outer + (int64_t)o * u + i, std::min(kLanes, u - i));
            scores[o] = sum(dot) + router.outer_bias[o];
        }
        return choose_expert(router, ffn.sizes, ffn.num_experts, scores, s_.settings[b]);
    }

    const Decoder& d_;
    const Step& s_;
    Common& c_;
    Team& team_;
    int thread_;
    Private& p_;
};

static void take_step(const Decoder& d, const Step& s, int num_threads) {
    static thread_local Common common;
    const Attention& a = d.attention;
    const int group = a.num_heads / a.num_kv_heads;
    int qkv = 0, ffn = 0, routed = 0;
    for (int i = 0; i < d.num_layers; i++) {
        const Layer& layer = d.layers[i];
        qkv = std::max(qkv, layer.q.rows + layer.k.rows + layer.v.rows);
        routed = std::max(routed, layer.router.width);
        ffn = std::max(ffn, layer.ffn.size());
    }
    const int64_t pieces = (int64_t)s.num_rows * a.num_kv_heads * s.tokens.most_pieces();
    room(common.qkv, (size_t)s.num_rows * qkv);
    room(common.scores, (size_t)s.num_rows * routed);
    room(common.attended, (size_t)s.num_rows * a.num_heads * a.head_dim);
    room(common.pieces, (size_t)pieces * piece_floats(group, a.head_dim));
    // Widths may differ by layer, formats may not: room for the widest, rows as far apart.
    for (int i = 0; i < d.num_layers; i++) common.hidden.reserve(d.layers[i].ffn.downs[0].format, s.num_rows, ffn);
    Common& shared = common;
    parallel(num_threads, [&](Team& team, int thread) {
        static thread_local Private own;
        Stepper(d, s, shared, team, thread, own).run();
    });
}
