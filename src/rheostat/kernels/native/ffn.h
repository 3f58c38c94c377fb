// A gated FFN whose experts are prefixes of its channels: y = down(act(gate x) * up x), width by row.
//
// Rows are sorted by width, widest first, so that those a channel concerns are the first few: every weight is read
// once, up to the widest row's width, and each row pays for its own width only.
#pragma once

#include <algorithm>

#include "matrix.h"

struct Ffn {
    Matrix gate, up;                  // [F, D]
    const Matrix* downs;              // one [D, F] for all experts, or one [D, sizes[e]] each
    const float* const* down_biases;  // [D] or null, of each of `downs`
    const int32_t* sizes;             // channels of each expert, rising
    int32_t num_experts;
    int32_t num_downs;
    int32_t activation;

    int place(int expert) const { return num_downs > 1 ? expert : 0; }
    int size() const { return sizes[num_experts - 1]; }
};

// Rows by expert, widest first; each thread works it out for itself.
struct Order {
    std::vector<int> rows, experts, widths;

    void sort(const Ffn& ffn, const int* chosen, int num_rows) {
        rows.resize(num_rows), experts.resize(num_rows), widths.resize(num_rows);
        int at = 0;
        for (int e = ffn.num_experts - 1; e >= -1; e--)
            for (int r = 0; r < num_rows; r++)
                if (chosen[r] == e) {
                    rows[at] = r, experts[at] = e, widths[at] = e < 0 ? 0 : ffn.sizes[e];
                    at++;
                }
    }

    int widest() const { return rows.empty() ? 0 : widths[0]; }

    int active(int channel) const {  // rows wider than `channel`
        int n = 0;
        while (n < (int)rows.size() && widths[n] > channel) n++;
        return n;
    }
};

// This thread's share of the hidden activations. `in` has the rows in the order's order, as gate and up take them;
// `hidden` gets them as the downs take them.
static void ffn_hidden(const Ffn& ffn, const Order& order, const Input& in, Input& hidden, std::vector<float>& buffer,
                       Team& team, int thread) {
    const Share share = team.share((order.widest() + kCell - 1) / kCell, thread);
    if (buffer.size() < order.rows.size() * (kCell + kLanes)) buffer.resize(order.rows.size() * (kCell + kLanes));
    float* gates = buffer.data() + order.rows.size() * kCell;
    const int down_format = ffn.downs[0].format, cells = ffn.gate.cells(), last = ffn.gate.panels();
    for (int unit = share.begin; unit < share.end; unit++) {
        int count = order.active(unit * kCell);
        for (int i = 0; i < kCell / kLanes; i++) {
            int p = unit * (kCell / kLanes) + i;
            int rows = p < last ? order.active(p * kLanes) : 0;
            if (!rows) break;  // the cells' tails are cut off below
            panel_rows(ffn.gate, p, in, 0, rows, cells, [&](int r, F16 v) { store(gates + r * kLanes, v); });
            panel_rows(ffn.up, p, in, 0, rows, cells, [&](int r, F16 v) {
                store(&buffer[r * kCell + i * kLanes], activate(load(gates + r * kLanes), ffn.activation) * v);
            });
        }
        for (int r = 0; r < count; r++) {
            int left = order.widths[r] - unit * kCell;
            hidden.set_cell(down_format, r, unit * kCell, &buffer[r * kCell], left < kCell ? left : kCell);
        }
    }
}

// This thread's share of the outputs y [M, D].
static void ffn_down(const Ffn& ffn, const Order& order, const Input& hidden, float* y, int64_t stride, bool is_added,
                     Team& team, int thread) {
    const int width = ffn.downs[0].rows, num_rows = (int)order.rows.size();
    const Share share = team.share(ffn.downs[0].panels(), thread);
    for (int p = share.begin; p < share.end; p++) {
        const int n = width - p * kLanes < kLanes ? width - p * kLanes : kLanes;
        for (int begin = 0, end; begin < num_rows; begin = end) {
            const int expert = order.experts[begin];
            for (end = begin + 1; end < num_rows && order.experts[end] == expert;) end++;
            if (expert < 0) {
                for (int r = begin; r < end && !is_added; r++)
                    memset(y + order.rows[r] * stride + p * kLanes, 0, n * sizeof(float));
                continue;
            }
            const float* bias = ffn.down_biases[ffn.place(expert)];
            F16 more = bias ? load_part(bias + p * kLanes, n) : F16{};
            panel_rows(ffn.downs[ffn.place(expert)], p, hidden, begin, end - begin,
                       (order.widths[begin] + kCell - 1) / kCell, [&](int r, F16 v) {
                           float* to = y + order.rows[r] * stride + p * kLanes;
                           v += more;
                           store_part(to, is_added ? v + load_part(to, n) : v, n);
                       });
        }
    }
}
