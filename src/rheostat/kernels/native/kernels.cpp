// What Python calls. Arguments are checked there; here they are taken as right.
#include "ahead.h"
#include "draft.h"
#include "reader.h"
#include "settle.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int rheostat_level() {
#if LEVEL_AVX512
    return 2;
#elif LEVEL_AVX2
    return 1;
#else
    return 0;
#endif
}

// y [M, stop - start] = x [M, K] W[start:stop]^T + bias
EXPORT void rheostat_few_rows(const Matrix* m, const float* x, int64_t x_stride, int num_rows, int start, int stop,
                              const float* bias, float* y, int64_t y_stride, int num_threads) {
    static thread_local Input in;
    in.reserve(m->format, num_rows, m->cols);
    for (int r = 0; r < num_rows; r++) in.set_row(m->format, r, x + r * x_stride, m->cols);
    Input& ready = in;
    parallel(num_threads, [&](Team& team, int thread) {
        multiply(*m, ready, num_rows, start, stop, bias, y, y_stride, false, team, thread);
    });
}

// Reads `bytes` bytes (a multiple of 4096) once: the machine's bandwidth, without arithmetic worth the name.
EXPORT uint32_t rheostat_read(const uint8_t* data, int64_t bytes, int num_threads) {
    std::atomic<uint32_t> total{0};
    parallel(num_threads, [&](Team& team, int thread) {
        Share share((int)(bytes / 4096), thread, team.size);
        U16 a{}, b{}, c{}, d{};
        for (const uint8_t* p = data + (int64_t)share.begin * 4096; p < data + (int64_t)share.end * 4096; p += 256) {
            U16 v[4];
            memcpy(v, p, sizeof v);
            a ^= v[0], b ^= v[1], c ^= v[2], d ^= v[3];
        }
        a ^= b ^ c ^ d;
        total ^= a[0] ^ a[5];
    });
    return total;
}

// y [M, D] of rows x [M, D] through experts [M]; -1 gives zeros.
EXPORT void rheostat_nested_ffn(const Ffn* ffn, const float* x, const int32_t* experts, int num_rows, float* y,
                                int num_threads) {
    static thread_local Order order;
    static thread_local Input in, hidden;
    const int width = ffn->gate.cols, outputs = ffn->downs[0].rows;
    order.sort(*ffn, experts, num_rows);
    in.reserve(ffn->gate.format, num_rows, width);
    for (int r = 0; r < num_rows; r++) in.set_row(ffn->gate.format, r, x + (int64_t)order.rows[r] * width, width);
    hidden.reserve(ffn->downs[0].format, num_rows, ffn->size());
    Order& sorted = order;
    Input &ready = in, &between = hidden;
    parallel(num_threads, [&](Team& team, int thread) {
        static thread_local std::vector<float> buffer;
        ffn_hidden(*ffn, sorted, ready, between, buffer, team, thread);
        team.barrier();
        ffn_down(*ffn, sorted, between, y, outputs, false, team, thread);
    });
}

// out [B, H, d] of queries q [B, H, d] over slots [starts, lengths) of each row.
EXPORT void rheostat_attention(const Attention* a, const float* q, const void* keys, const void* values,
                               const int32_t* lengths, const int32_t* starts, int window, int num_rows, float* out,
                               int num_threads) {
    static thread_local std::vector<float> pieces;
    const int group = a->num_heads / a->num_kv_heads, d = a->head_dim, wide = round_up(d, kLanes);
    int longest = 0;
    for (int b = 0; b < num_rows; b++) longest = std::max(longest, lengths[b] - starts[b]);
    const int most = num_stretches(num_rows, *a, longest, num_threads);
    room(pieces, (size_t)num_rows * a->num_kv_heads * most * piece_floats(group, d));
    float* scratch = pieces.data();
    parallel(num_threads, [&](Team& team, int thread) {
        static thread_local std::vector<float> buffer, queries;
        const int cuts = num_stretches(num_rows, *a, longest, team.size);
        float* scaled = room(queries, (size_t)group * wide);
        Share share(num_rows * a->num_kv_heads * cuts, thread, team.size);
        for (int item = share.begin; item < share.end; item++) {
            const int cut = item % cuts, k = item / cuts % a->num_kv_heads, b = item / cuts / a->num_kv_heads;
            for (int g = 0; g < group; g++)
                for (int i = 0; i < wide; i++)
                    scaled[g * wide + i] = i < d ? q[((int64_t)b * a->num_heads + k * group + g) * d + i] * a->scale : 0;
            const int begin = window ? std::max(starts[b], lengths[b] - window) : starts[b];
            Share slots(std::max(lengths[b] - begin, 0), cut, cuts);
            attend_slots(*a, scaled, keys, values, b, k, begin + slots.begin, begin + slots.end,
                         piece_at(scratch, item, group, d), buffer);
        }
        team.barrier();
        Share heads(num_rows * a->num_heads, thread, team.size);
        for (int i = heads.begin; i < heads.end; i++)
            join(*a, scratch, i / a->num_heads, i % a->num_heads, cuts, out + (int64_t)i * d);
    });
}

// A weight [N, K] of float32 or bfloat16 (rows `stride` values apart) as panels of bfloat16, which are zero before. Returns
// whether all of it is finite. To the nearest, ties to even, and subnormal numbers too: as torch does it.
EXPORT int rheostat_pack_bfloat(const void* weight, int64_t stride, int is_half, int rows, int cols, uint8_t* out,
                                int64_t panel_bytes, int num_threads) {
    std::atomic<int> is_finite{1};
    parallel(num_threads, [&](Team& team, int thread) {
        const Share share((rows + kLanes - 1) / kLanes, thread, team.size);
        std::vector<uint16_t> row(round_up(cols, 2 * kLanes));
        bool all = true;
        for (int r = share.begin * kLanes; r < std::min(share.end * kLanes, rows); r++) {
            uint32_t* to = (uint32_t*)(out + r / kLanes * panel_bytes) + r % kLanes;
            if (is_half)
                memcpy(row.data(), (const uint16_t*)weight + r * stride, cols * sizeof(uint16_t));
            else
                for (int k = 0; k < cols; k++) row[k] = float_to_bfloat(((const float*)weight)[r * stride + k]);
            for (int k = 0; k < cols; k++) all &= (row[k] & 0x7f80) != 0x7f80;
            for (int k = 0; k < cols; k += 2) to[k / 2 * kLanes] = row[k] | (uint32_t)row[k + 1] << 16;
        }
        if (!all) is_finite = 0;
    });
    return is_finite;
}

// Rows `ids` [M] of an embedding [V, D] of floats of the format: out [M, D].
EXPORT void rheostat_embed(const void* table, const int64_t* ids, float* out, int format, int num_rows, int width) {
    const Draft rows{table, width, format, 0, nullptr};
    for (int r = 0; r < num_rows; r++) embed(rows, ids[r], width, out + (int64_t)r * width);
}

EXPORT void rheostat_step(const Decoder* decoder, const Step* step, int num_threads) {
    take_step(*decoder, *step, num_threads);
}

EXPORT void rheostat_draft(const Decoder* decoder, const Step* step, const Draft* draft, int num_threads) {
    write_draft(*decoder, *step, *draft, num_threads);
}

// y [M, N] = x [M, K] W^T + bias; W in bfloat16 or float32
EXPORT void rheostat_many_rows(const Matrix* m, const float* x, int num_rows, const float* bias, float* y, int num_threads) {
    HalfRows halves;
    if (m->format == kBFloat16) halves.reserve(num_rows, m->cols);
    Phases phases(2);
    parallel(num_threads, [&](Team& team, int) {
        share_out(phases, 0, m->format == kBFloat16 ? num_rows : 0, team,
                  [&](int r) { halves.set(r, x + (int64_t)r * m->cols, m->cols); });
        const int groups = num_groups(*m);
        const Chunks chunks(num_rows, groups, team.size);
        const auto row = [&](int r) {
            return m->format == kBFloat16 ? halves.row(r) : (const uint32_t*)(x + (int64_t)r * m->cols);
        };
        share_out(phases, 1, chunks.count * groups, team, [&](int unit) {
            const int chunk = unit / groups;
            multiply_group(*m, unit % groups, (unit + team.size) % groups, chunks.begin(chunk), chunks.end(chunk, num_rows), m->cols, row,
                           [&](int r, int column, int n, F16 v) {
                               if (bias) v += load_most(bias + column, n);
                               store_most(y + (int64_t)r * m->rows + column, v, n);
                           });
        });
    });
}

// As rheostat_nested_ffn, for many rows and weights in bfloat16.
EXPORT void rheostat_grouped_ffn(const Ffn* ffn, const float* x, const int32_t* experts, int num_rows, float* y,
                                 int num_threads) {
    const int width = ffn->gate.cols, outputs = ffn->downs[0].rows;
    HalfRows in, hidden;
    in.reserve(num_rows, width), hidden.reserve(num_rows, ffn->size());
    Grouping order;
    order.sort(experts, num_rows, ffn->num_experts);
    memset(y, 0, (size_t)num_rows * outputs * sizeof(float));
    Phases phases(3);
    parallel(num_threads, [&](Team& team, int) {
        share_out(phases, 0, num_rows, team, [&](int r) { in.set(r, x + (int64_t)r * width, width); });
        const int units = num_hidden_units(*ffn), groups = num_groups(ffn->downs[0]);
        const Chunks wide(num_rows, units, team.size), narrow(num_rows, groups, team.size);
        const auto row = [&](int r) { return in.row(order.rows[r]); };
        share_out(phases, 1, wide.count * units, team, [&](int unit) {
            const int chunk = unit / units;
            grouped_hidden(*ffn, order, unit % units, (unit + team.size) % units, wide.begin(chunk),
                           wide.end(chunk, num_rows), row, hidden);
        });
        share_out(phases, 2, narrow.count * groups, team, [&](int unit) {
            const int chunk = unit / groups;
            grouped_down(*ffn, order, unit % groups, (unit + team.size) % groups, narrow.begin(chunk),
                         narrow.end(chunk, num_rows), hidden,
                         [&](int r, int column, int n, F16 v) { store_most(y + (int64_t)r * outputs + column, v, n); });
        });
    });
}

// out [H, T, d] of the queries q [H, T, d] of the last T of S tokens, over keys and values [K, S, d]
EXPORT void rheostat_causal_attention(const float* q, const float* keys, const float* values, int num_heads,
                                      int num_kv_heads, int head_dim, int num_queries, int num_slots, float scale,
                                      int window, float* out, int num_threads) {
    KeyPanels panels;
    HalfRows queries;
    panels.reserve({num_slots}, num_kv_heads, head_dim);
    const int wide = panels.wide, past = num_slots - num_queries;
    queries.reserve(num_heads * num_queries, wide);
    Phases phases(3);
    parallel(num_threads, [&](Team& team, int) {
        static thread_local CausalScratch own;
        static thread_local std::vector<float> buffer;
        float* block = room(buffer, 2 * (size_t)kLanes * wide);
        memset(block, 0, 2 * (size_t)kLanes * wide * sizeof(float));
        share_out(phases, 0, num_heads * num_queries, team, [&](int r) {
            for (int i = 0; i < head_dim; i++) block[i] = q[(int64_t)r * head_dim + i] * (scale * kLog2E);
            queries.set(r, block, wide);
        });
        share_out(phases, 1, num_kv_heads * panels.blocks, team, [&](int unit) {
            const int k = unit / panels.blocks, at = unit % panels.blocks;
            memset(block, 0, 2 * (size_t)kLanes * wide * sizeof(float));
            for (int s = 0; s < std::min(kLanes, num_slots - at * kLanes); s++) {
                const int64_t from = ((int64_t)k * num_slots + at * kLanes + s) * head_dim;
                memcpy(block + s * wide, keys + from, head_dim * sizeof(float));
                memcpy(block + (kLanes + s) * wide, values + from, head_dim * sizeof(float));
            }
            panels.set(k, at, block, block + kLanes * wide);
        });
        const int blocks = (num_queries + kQueries - 1) / kQueries;
        share_out(phases, 2, blocks * num_heads, team, [&](int unit) {
            const int h = unit % num_heads, first = (blocks - 1 - unit / num_heads) * kQueries;
            attend_causally(
                panels, 0, h / (num_heads / num_kv_heads), past + first, std::min(kQueries, num_queries - first), window, own,
                [&](int slot) { return queries.row(h * num_queries + slot - past); },
                [&](int slot, const float* result) {
                    memcpy(out + ((int64_t)h * num_queries + slot - past) * head_dim, result, head_dim * sizeof(float));
                });
        });
    });
}

EXPORT void rheostat_read_prompts(const Decoder* decoder, const Reading* reading, int num_threads) {
    read_prompts(*decoder, *reading, num_threads);
}

EXPORT void rheostat_read_ahead(const Decoder* decoder, const Reading* reading, const Predicted* ahead, int num_threads) {
    read_ahead(*decoder, *reading, *ahead, num_threads);
}

EXPORT void rheostat_settle(const Settling* settling, int num_threads) { settle(*settling, num_threads); }
