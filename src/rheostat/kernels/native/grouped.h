// The nested FFN of many rows: rows sorted by width, each panel of channels for the prefix of rows that have it.
#pragma once

#include "ffn.h"
#include "gemm.h"

// Rows by expert, widest first; those of expert -1, which give nothing, come last.
struct Grouping {
    std::vector<int> rows;    // [N], where each stood
    std::vector<int> begins;  // [E + 1], rows at least as wide as expert e; those of e itself: [begins[e + 1], begins[e])

    void sort(const int32_t* chosen, int num_rows, int num_experts) {
        rows.resize(num_rows), begins.assign(num_experts + 1, 0);
        for (int r = 0; r < num_rows; r++) begins[chosen[r] < 0 ? num_experts : chosen[r]]++;
        int at = 0;
        std::vector<int> next(num_experts + 1);
        for (int e = num_experts - 1; e >= 0; e--) next[e] = at, at += begins[e];
        next[num_experts] = at;
        for (int r = 0; r < num_rows; r++) rows[next[chosen[r] < 0 ? num_experts : chosen[r]]++] = r;
        for (int e = 0; e < num_experts; e++) begins[e] = next[e];
        begins[num_experts] = 0;
    }

    // All rows take the widest expert.
    void set_all(int num_rows, int num_experts) {
        if ((int)rows.size() != num_rows) rows.resize(num_rows);
        for (int r = 0; r < num_rows; r++) rows[r] = r;
        begins.assign(num_experts + 1, num_rows);
        begins[num_experts] = 0;
    }

    int end(int expert) const { return begins[expert]; }
    int begin(int expert) const { return begins[expert + 1]; }

    // Rows wider than `channel`.
    int active(const Ffn& ffn, int channel) const {
        int e = 0;
        while (e < ffn.num_experts && ffn.sizes[e] <= channel) e++;
        return e < ffn.num_experts ? begins[e] : 0;
    }
};

constexpr int kPairedPanels = kTilePanels / 2;  // of gate and up each, in one tile

INLINE int num_hidden_units(const Ffn& ffn) { return (ffn.gate.panels() + kPairedPanels - 1) / kPairedPanels; }

// One unit: rows [begin, end) of the order, two panels of gate and the same two of up. `row(r)` gives the inputs of the
// r-th row in that order; `hidden` gets act(gate x) * up x, zeros beyond a row's own width.
template <class Row>
INLINE void grouped_hidden(const Ffn& ffn, const Grouping& order, int unit, int next, int begin, int end, Row&& row,
                           HalfRows& hidden) {
    const int first = unit * kPairedPanels, panels = std::min(kPairedPanels, ffn.gate.panels() - first);
    end = std::min(end, order.active(ffn, first * kLanes));
    Panels w;
    w.count = 2 * panels;
    for (int p = 0; p < panels; p++) {
        w.data[p] = ffn.gate.data + (first + p) * ffn.gate.panel_bytes;
        w.data[panels + p] = ffn.up.data + (first + p) * ffn.up.panel_bytes;
    }
    if (next < num_hidden_units(ffn)) {
        w.ahead[0] = ffn.gate.data + next * kPairedPanels * ffn.gate.panel_bytes;
        w.ahead[1] = ffn.up.data + next * kPairedPanels * ffn.up.panel_bytes;
    }
    F16 gates[kPairedPanels];
    int expert = ffn.num_experts - 1;
    multiply_rows(ffn.gate.format, w, begin, end, num_steps(ffn.gate.format, ffn.gate.cols), row,
                  [&](int r, int p, F16 v) {
                      if (p < panels) {
                          gates[p] = activate(v, ffn.activation);
                          return;
                      }
                      p -= panels;
                      v *= gates[p];
                      while (r >= order.end(expert)) expert--;
                      const int channel = (first + p) * kLanes, left = ffn.sizes[expert] - channel;
                      for (int i = std::max(left, 0); i < kLanes; i++) v[i] = 0;
                      store_bfloat(hidden.values(r) + channel, v);
                  });
}

// One unit: rows [begin, end) of the order, the panels of one group of outputs; take(row as it stood, column, count, F16).
template <class Take>
INLINE void grouped_down(const Ffn& ffn, const Grouping& order, int group, int next, int begin, int end, HalfRows& hidden,
                         Take&& take) {
    for (int e = ffn.num_experts - 1; e >= 0; e--) {
        const int from = std::max(begin, order.begin(e)), to = std::min(end, order.end(e));
        if (from >= to) continue;
        const float* bias = ffn.down_biases[ffn.place(e)];
        multiply_group(ffn.downs[ffn.place(e)], group, next, from, to, ffn.sizes[e], [&](int r) { return hidden.row(r); },
                       [&](int r, int column, int n, F16 v) {
                           if (bias) v += load_most(bias + column, n);
                           take(order.rows[r], column, n, v);
                       });
    }
}
