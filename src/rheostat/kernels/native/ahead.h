// Reading ahead: a prompt through the first layers, and what they made of it into keys and values of all the others.
//
//     normed inputs of some layers [N, X] -> squeeze [N, R] -> maps, bias -> raw keys and values -> norm, rotation -> cache
//
// All in one parallel part: threads of somebody else's, woken in between, would spin on the cores that this needs.
#pragma once

#include "reader.h"

struct Predicted {
    const int32_t* reads;     // [num_reads], the layers whose input is read, rising; the last may be where reading stops
    const int32_t* columns;   // [num_reads], where that goes among the features, in units of D
    const int32_t* is_other;  // [num_reads], whether it is read of another token
    const int32_t* others;    // [N], the token before each; itself where there is none to read
    const int32_t* is_early;  // [N], the tokens whose keys and values are predicted
    const float* bias;        // [outputs]
    const float* firsts;      // [outputs], what a text's first token has instead
    Matrix squeeze;           // [R, X]
    Matrix maps;              // [outputs, R], or [outputs, X]: of each layer from where reading stops, keys, then values
    int32_t num_reads, has_squeeze;
};

// What the threads share, for one call.
struct AheadCommon {
    HalfRows features, mixed;
    Scratch<float> made;                      // [N, outputs]
    std::vector<std::pair<int, int>> places;  // [N], each token's row of the batch and its slot
};

constexpr int kTokensWritten = 16;  // at a time

class AheadReader : public Reader {
public:
    AheadReader(const Predicted& ahead, AheadCommon& shared, const Decoder& decoder, const Reading& reading, ReaderCommon& common,
                Phases& phases, Team& team, int thread, ReaderOwn& own)
        : Reader(decoder, reading, common, phases, team, thread, own), ahead_(ahead), f_(shared) {}

    void run() {
        const int after = (s_.last_layer - s_.first_layer) * kPhases;
        for (int i = s_.first_layer, place = 0; i <= s_.last_layer; i++) {
            for (; place < ahead_.num_reads && ahead_.reads[place] == i; place++) {
                phase_ = after + place;
                const int32_t* others = ahead_.is_other[place] ? ahead_.others : nullptr;
                norm(d_.layers[i].input_norm, f_.features, ahead_.columns[place] * d_.hidden_size, others);
            }
            if (i < s_.last_layer) run_layer(i);
        }
        phase_ = after + ahead_.num_reads;
        if (ahead_.has_squeeze) squeeze();
        predict();
        put();
    }

private:
    void squeeze() {
        multiply(ahead_.squeeze, f_.features, [&](int r, int column, int n, F16 v) {
            alignas(64) float part[kLanes];
            store(part, v);
            f_.mixed.set(r, part, n, column);
        });
    }

    void predict() {
        const int outputs = ahead_.maps.rows;
        multiply(ahead_.maps, ahead_.has_squeeze ? f_.mixed : f_.features, [&](int r, int column, int n, F16 v) {
            store_most(f_.made.data.get() + (int64_t)r * outputs + column, v + load_most(ahead_.bias + column, n), n);
        });
    }

    template <class Take>
    void multiply(const Matrix& matrix, HalfRows& inputs, Take&& take) {
        each_product(num_groups(matrix), [&](int group, int next, int begin, int end) {
            multiply_group(matrix, group, next, begin, end, matrix.cols, [&](int r) { return inputs.row(r); }, take);
        });
    }

    // Normed, turned, and into the cache: some tokens of one layer at a time.
    void put() {
        const int num_layers = d_.num_layers - s_.last_layer, outputs = ahead_.maps.rows;
        const int blocks = (s_.num_tokens + kTokensWritten - 1) / kTokensWritten;
        share_out(phases_, phase_++, blocks * num_layers, team_, [&](int unit) {
            const int layer = unit % num_layers, begin = unit / num_layers * kTokensWritten;
            for (int n = begin; n < std::min(begin + kTokensWritten, s_.num_tokens); n++) {
                if (!ahead_.is_early[n]) continue;
                const float* from = s_.positions[n] ? f_.made.data.get() + (int64_t)n * outputs : ahead_.firsts;
                put_token(n, s_.last_layer + layer, from + layer * (outputs / num_layers));
            }
        });
    }

    void put_token(int n, int index, const float* from) {
        const Layer& layer = d_.layers[index];
        const int dim = a_.head_dim, kv = a_.num_kv_heads, row = s_.rows[f_.places[n].first];
        float* key = room(p_.block, (size_t)round_up(dim, kLanes));
        for (int k = 0; k < kv; k++) {
            const int64_t at = (((int64_t)row * kv + k) * a_.num_slots + f_.places[n].second) * dim + index * s_.layer_stride;
            turn(from + k * dim, layer.k_norm, layer.has_rope, n, key);
            write(s_.keys, at, key);
            write(s_.values, at, from + (kv + k) * dim);
        }
    }

    const Predicted& ahead_;
    AheadCommon& f_;
};

static void read_ahead(const Decoder& d, const Reading& s, const Predicted& ahead, int num_threads) {
    ReaderCommon common;
    AheadCommon shared;
    lay_out(d, s, common);
    shared.features.reserve(s.num_tokens, ahead.num_reads * d.hidden_size);
    if (ahead.has_squeeze) shared.mixed.reserve(s.num_tokens, ahead.squeeze.rows);
    shared.made.reserve((size_t)s.num_tokens * ahead.maps.rows);
    for (int b = 0; b < s.num_rows; b++)
        for (int i = 0; i < s.lengths[b]; i++) shared.places.push_back({b, s.pasts[b] + i});
    Phases phases((s.last_layer - s.first_layer) * kPhases + ahead.num_reads + 3);
    parallel(num_threads, [&](Team& team, int thread) {
        static thread_local ReaderOwn own;
        AheadReader(ahead, shared, d, s, common, phases, team, thread, own).run();
    });
}
