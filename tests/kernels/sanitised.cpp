// All kernels over odd shapes, on heap memory of exactly the size they are told. Built with the address sanitiser.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "kernels.cpp"

static uint32_t state = 1;

static uint32_t draw() { return state = state * 1664525u + 1013904223u, state >> 8; }

struct Floats {
    std::unique_ptr<float[]> p;
    explicit Floats(size_t n) : p(new float[n]) {
        for (size_t i = 0; i < n; i++) p[i] = (int)(draw() % 2001) / 1000.0f - 1;
    }
    operator float*() { return p.get(); }
};

struct Packed {
    std::unique_ptr<uint8_t[]> data;
    std::unique_ptr<Floats> scales;
    Matrix m;
    Packed(int format, int group, int rows, int cols) {
        const int64_t bytes[] = {4096, 2048, 2048, 1024, group ? 64 / group * (64 + 8 * group) : 0};
        m = {nullptr, nullptr, format, group, rows, cols, bytes[format], 0};
        m.panel_bytes = m.cells() * m.cell_bytes;
        size_t n = m.panels() * m.panel_bytes;
        data.reset(new uint8_t[n]);
        for (size_t i = 0; i < n; i++) data[i] = draw() & 0x1f;
        m.data = data.get();
        if (format == kInt8) {
            scales.reset(new Floats(m.panels() * 16));
            m.scales = *scales;
        }
    }
};

static void products(int format, int group, int threads) {
    for (int rows : {1, 2, 3, 5, 32})
        for (int n : {1, 15, 16, 37, 65})
            for (int k : {1, 31, 64, 130}) {
                Packed w(format, group, n, k);
                int start = draw() % n, stop = start + 1 + draw() % (n - start);
                Floats x(rows * k), y(rows * (stop - start)), bias(stop - start);
                rheostat_few_rows(&w.m, x, k, rows, start, stop, draw() % 2 ? (float*)bias : nullptr, y, stop - start, threads);
            }
}

static void ffns(int format, int group, int threads) {
    for (int rows : {1, 4, 9})
        for (bool own : {false, true}) {
            const int d = 37;
            const int32_t sizes[] = {32, 96, 150};
            Packed gate(format, group, 150, d), up(format, group, 150, d);
            Packed a(format, group, d, own ? 32 : 150), b(format, group, d, 96), c(format, group, d, 150);
            const Matrix downs[] = {a.m, b.m, c.m};
            Floats bias(d), x(rows * d), y(rows * d);
            const float* biases[] = {bias, nullptr, bias};
            Ffn ffn = {gate.m, up.m, downs, biases, sizes, 3, own ? 3 : 1, (int)(draw() % 4)};
            std::unique_ptr<int32_t[]> experts(new int32_t[rows]);
            for (int r = 0; r < rows; r++) experts[r] = (int)(draw() % 4) - 1;
            rheostat_nested_ffn(&ffn, x, experts.get(), rows, y, threads);
        }
}

static void attentions(int threads) {
    for (int format : {kFloat32, kBFloat16, kFloat16})
        for (int d : {1, 20, 64, 128, 250})
            for (int slots : {1, 63, 200}) {
                const int rows = 3, heads = 6, kv = 2;
                const size_t size = format == kFloat32 ? 4 : 2, n = (size_t)rows * kv * slots * d * size;
                std::unique_ptr<uint8_t[]> keys(new uint8_t[n]()), values(new uint8_t[n]());
                Floats q(rows * heads * d), out(rows * heads * d);
                std::unique_ptr<int32_t[]> lengths(new int32_t[rows]), starts(new int32_t[rows]);
                for (int r = 0; r < rows; r++) lengths[r] = 1 + draw() % slots, starts[r] = draw() % lengths[r];
                Attention a = {heads, kv, d, format, slots, 0.1f, draw() % 2 ? 5.0f : 0.0f};
                rheostat_attention(&a, q, keys.get(), values.get(), lengths.get(), starts.get(), draw() % 2 ? 7 : 0, rows, out,
                                   threads);
            }
}

static void steps(int format, int group, int threads) {
    const int d = 37, heads = 4, kv = 2, dim = 10, u = 5, v = 41, num_layers = 2, slots = 70;
    const int32_t sizes[] = {32, 96, 150};
    for (int cached : {1, 4})
        for (int rule : {0, 1}) {
            // a token a row; then a draft in each row (none in the third) behind a body in planes
            const int32_t firsts[] = {0, 3, 4, 4, 6};
            const bool is_draft = rule == 1;
            const int rows = is_draft ? firsts[cached] : cached;
            Packed q(format, group, heads * dim, d), k(format, group, kv * dim, d), o(format, group, d, heads * dim);
            Packed gate(format, group, 150, d), down(format, group, d, 150), head(format, group, v, d), inner(kFloat32, 0, u, d);
            Floats norm(d), head_norm(dim), bias(heads * dim), inner_bias(u), outer(3 * u), outer_bias(3);
            const float* biases[] = {norm};
            Router router = {inner.m, inner_bias, outer, outer_bias, u, rule ? 3 : 2, rule};
            Layer layers[num_layers];
            for (Layer& layer : layers)
                layer = {norm, norm, q.m, k.m, k.m, o.m, bias, nullptr, bias, norm, head_norm, head_norm,
                         {gate.m, gate.m, &down.m, biases, sizes, 3, 1, 0}, router, 1, rule ? 0 : 9};
            const int tokens = 20, padded = 32, wide = 16, capacity = 3, bits = format % 2 ? 8 : 4;
            const size_t blocks = (size_t)num_layers * cached * kv * capacity;
            std::unique_ptr<uint8_t[]> upper(new uint8_t[blocks * padded * wide]()), lower(new uint8_t[blocks * padded * wide]());
            std::unique_ptr<uint16_t[]> scales(new uint16_t[blocks * (2 * dim + 2 * padded)]());
            const int32_t groups[] = {3, 0, 2, 1};
            Planes planes = {upper.get(), bits == 4 ? nullptr : lower.get(), (uint8_t*)scales.get(), groups, capacity,
                             tokens, dim, bits, cached};
            const size_t n = (size_t)num_layers * cached * kv * slots * dim;
            std::unique_ptr<uint16_t[]> keys(new uint16_t[n]()), values(new uint16_t[n]());
            Decoder decoder = {layers, num_layers, d, 4, 1e-5f, norm, head.m, {heads, kv, dim, kFloat16, slots, 0.3f, 0}};
            Floats hidden(rows * d), settings(rows), cos(80 * 4), sin(80 * 4), logits(rows * v);
            std::unique_ptr<int64_t[]> positions(new int64_t[rows]), experts(new int64_t[rows * num_layers]);
            std::unique_ptr<int32_t[]> lengths(new int32_t[cached]), starts(new int32_t[cached]);
            for (int b = 0; b < cached; b++) lengths[b] = slots - 3 - b, starts[b] = b;
            for (int r = 0; r < rows; r++) positions[r] = slots - 1 - r, settings[r] = r % 2 * 0.5f;
            NewTokens now = {lengths.get(), starts.get(), is_draft ? firsts : nullptr, is_draft ? &planes : nullptr, cached};
            Step step = {hidden, positions.get(), settings, now, (uint8_t*)keys.get(),
                         (uint8_t*)values.get(), (int64_t)n / num_layers, cos, sin, logits, experts.get(), rows};
            for (int again = 0; again < 3; again++) rheostat_step(&decoder, &step, threads);  // shares are moved in between
        }
}

static void lookups() {
    for (int format : {kFloat32, kBFloat16, kFloat16})
        for (int d : {1, 16, 37}) {
            const int rows = 5;
            std::unique_ptr<uint8_t[]> table(new uint8_t[(size_t)rows * d * (format == kFloat32 ? 4 : 2)]());
            const int64_t ids[] = {4, 0, 4};
            Floats out(3 * d);
            rheostat_embed(table.get(), ids, out, format, 3, d);
        }
}

static void settlings(int threads) {
    for (int format : {kFloat32, kBFloat16, kFloat16})
        for (int dim : {2, 16, 37, 64})
            for (int group : {1, 8, 19, 32}) {
                const int num_layers = 2, rows = 2, kv = 3, capacity = 3, count = 1 + draw() % 2, left = draw() % 4;
                const int held = count * group + left, wide = round_up(dim, kLanes), tokens = round_up(group, kLanes);
                const int value_group = dim == 64 ? 32 : dim, parts = dim / value_group;
                const size_t size = format == kFloat32 ? 4 : 2, blocks = (size_t)num_layers * rows * kv * capacity;
                const size_t n = (size_t)num_layers * kv * held * dim * size;
                std::unique_ptr<uint8_t[]> keys(new uint8_t[n]), values(new uint8_t[n]);
                for (size_t i = 0; i < n; i++) keys[i] = draw(), values[i] = draw();  // some are no numbers
                std::unique_ptr<uint8_t[]> upper(new uint8_t[blocks * tokens * wide]), lower(new uint8_t[blocks * tokens * wide]);
                std::unique_ptr<uint8_t[]> scales(new uint8_t[blocks * (2 * dim + 2 * parts * tokens) * size]);
                const Settling s = {upper.get(), lower.get(), scales.get(), keys.get(), values.get(), capacity,
                                    (int64_t)kv * held * dim, (int64_t)held * dim, num_layers, rows, kv, dim, format, group,
                                    value_group, rows - 1, capacity - count, count, left};
                rheostat_settle(&s, threads);
            }
}

static void packings(int threads) {
    for (int rows : {1, 16, 37})
        for (int cols : {1, 64, 77}) {
            Packed to(kBFloat16, 0, rows, cols);
            Floats from(rows * cols);
            std::unique_ptr<uint16_t[]> half(new uint16_t[rows * cols]());
            const int whole = rheostat_pack_bfloat((float*)from, cols, 0, rows, cols, to.data.get(), to.m.panel_bytes, threads);
            const int other = rheostat_pack_bfloat(half.get(), cols, 1, rows, cols, to.data.get(), to.m.panel_bytes, threads);
            if (!whole || !other) abort();
        }
}

static void prompts(int threads) {
    for (int rows : {1, 5, 13, 400})
        for (int n : {1, 37, 65}) {
            const int k = 1 + draw() % 130;
            Packed half(kBFloat16, 0, n, k), whole(kFloat32, 0, n, k);
            Floats x(rows * k), y(rows * n), bias(n);
            rheostat_many_rows(&half.m, x, rows, bias, y, threads);
            rheostat_many_rows(&whole.m, x, rows, nullptr, y, threads);
        }
    for (int d : {1, 20, 64, 130})
        for (int num : {1, 70}) {
            const int past = draw() % 300, slots = past + num;
            Floats q(4 * num * d), keys(2 * slots * d), values(2 * slots * d), out(4 * num * d);
            rheostat_causal_attention(q, keys, values, 4, 2, d, num, slots, 0.1f, draw() % 2 ? 9 : 0, out, threads);
        }
}

// The first layer read, the second predicted.
static void ahead_of(const Decoder& decoder, Reading reading, int threads) {
    const int tokens = reading.num_tokens, d = decoder.hidden_size, outputs = 2 * decoder.attention.num_kv_heads * decoder.attention.head_dim;
    const int32_t reads[] = {0, 1, 1}, columns[] = {1, 0, 2}, is_other[] = {0, 1, 0};
    Packed squeeze(kBFloat16, 0, 13, 3 * d), narrow(kBFloat16, 0, outputs, 13), wide(kBFloat16, 0, outputs, d);
    Floats bias(outputs), firsts(outputs);
    std::unique_ptr<int32_t[]> early(new int32_t[tokens]), others(new int32_t[tokens]);
    for (int n = 0; n < tokens; n++) early[n] = draw() % 4 > 0, others[n] = n ? n - 1 : 0;
    reading.last_layer = 1;
    const Predicted two = {reads, columns, is_other, others.get(), early.get(), bias, firsts, squeeze.m, narrow.m, 3, 1};
    const Predicted one = {reads + 1, columns + 1, is_other + 1, others.get(), early.get(), bias, firsts, {}, wide.m, 1, 0};
    rheostat_read_ahead(&decoder, &reading, &two, threads);
    rheostat_read_ahead(&decoder, &reading, &one, threads);
}

static void readings(int threads) {
    const int d = 37, heads = 4, kv = 2, dim = 11, u = 5, num_layers = 2, slots = 90;
    const int32_t sizes[] = {15, 33, 61}, lengths[] = {50, 1, 7}, pasts[] = {0, 3, 80}, rows[] = {2, 0, 1};
    for (int rule : {0, 1})
        for (int cache : {kFloat32, kBFloat16, kFloat16}) {
            Packed q(kBFloat16, 0, heads * dim, d), k(kBFloat16, 0, kv * dim, d), o(kBFloat16, 0, d, heads * dim);
            Packed gate(kBFloat16, 0, 61, d), down(kBFloat16, 0, d, 61), inner(kFloat32, 0, u, d);
            Floats norm(d), head_norm(dim), bias(heads * dim), inner_bias(u), outer(3 * u), outer_bias(3);
            const float* biases[] = {norm};
            Router router = {inner.m, inner_bias, outer, outer_bias, u, rule ? 3 : 2, rule};
            Layer layers[num_layers];
            for (Layer& layer : layers)
                layer = {norm, norm, q.m, k.m, k.m, o.m, bias, nullptr, bias, norm, head_norm, head_norm,
                         {gate.m, gate.m, &down.m, biases, sizes, 3, 1, 0}, router, 1, rule ? 0 : 9};
            const int tokens = 58;
            const size_t n = (size_t)num_layers * 3 * kv * slots * dim;
            std::unique_ptr<uint8_t[]> keys(new uint8_t[n * (cache == kFloat32 ? 4 : 2)]()),
                values(new uint8_t[n * (cache == kFloat32 ? 4 : 2)]());
            Decoder decoder = {layers, num_layers, d, 4, 1e-5f, norm, down.m, {heads, kv, dim, cache, slots, 0.3f, 0}};
            Floats hidden(tokens * d), settings(tokens), cos(slots * 4), sin(slots * 4);
            std::unique_ptr<int64_t[]> positions(new int64_t[tokens]);
            std::unique_ptr<int32_t[]> experts(new int32_t[num_layers * tokens]);
            for (int b = 0, at = 0; b < 3; b++)
                for (int i = 0; i < lengths[b]; i++) positions[at++] = pasts[b] + i;
            Reading reading = {hidden, positions.get(), rule ? (float*)settings : nullptr, lengths, pasts, rows, keys.get(),
                               values.get(), (int64_t)n / num_layers, cos, sin, experts.get(), 3, tokens, 0, num_layers};
            rheostat_read_prompts(&decoder, &reading, threads);
            ahead_of(decoder, reading, threads);
        }
}

int main() {
    for (int threads : {1, 2, 5}) {
        for (int format = 0; format < 6; format++) {
            const int group = format < 4 ? 0 : format == 4 ? 32 : 64, kind = format < 4 ? format : 4;
            products(kind, group, threads);
            ffns(kind, group, threads);
            steps(kind, group, threads);
        }
        attentions(threads);
        lookups();
        settlings(threads);
        packings(threads);
        prompts(threads);
        readings(threads);
    }
    Floats block(4096);
    rheostat_read((const uint8_t*)(float*)block, 4 * 4096, 2);
    puts("all done");
    return 0;
}
