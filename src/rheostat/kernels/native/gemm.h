// Products y = x W^T of many rows: the panels of matrix.h, a block of rows at a time.
//
// A tile is up to 6 rows by 4 panels: 24 sums that stay in registers while the inputs go by, each weight vector used for
// every row and each pair of activations for every panel. Weights are bfloat16 (pairs of inputs side by side, which
// the processor multiplies as they are) or float32. Rows are given one by one, so that picking some costs nothing.
//
// A phase of work is cut into units, rows' chunk by rows' chunk, that threads take from a counter: a thread that was
// put aside holds up nobody for longer than a unit.
#pragma once

#include <algorithm>
#include <memory>

#include "matrix.h"

constexpr int kTileRows = 6, kTilePanels = 4, kTileOutputs = kTilePanels * kLanes;
constexpr int kChunkRows = 192;  // of 576 or 1536 inputs: they stay in the second cache while all panels go by

INLINE F16 pair_even(uint32_t pair) { return as_float(U16{} + (pair << 16)); }

INLINE F16 pair_odd(uint32_t pair) { return as_float(U16{} + (pair & 0xffff0000u)); }

// out[r][p] = sum over `steps` of row r times panel p: pairs of bfloat16, 64 bytes of weights a step.
template <int R, int P>
static void tile_of_pairs(const uint8_t* const* w, const uint32_t* const* x, int steps, float* out) {
    F16 a[R][P]{};
    for (int k = 0; k < steps; k++) {
#if LEVEL_AVX512
        __m512i v[P];
        for (int p = 0; p < P; p++) v[p] = _mm512_loadu_si512(w[p] + k * 64);
        for (int r = 0; r < R; r++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32((int)x[r][k]);
            for (int p = 0; p < P; p++) a[r][p] = (F16)_mm512_dpbf16_ps((__m512)a[r][p], (__m512bh)v[p], pair);
        }
#else
        for (int p = 0; p < P; p++) {
            F16 even, odd;
            split_pairs(w[p] + k * 64, even, odd);
            for (int r = 0; r < R; r++) a[r][p] += even * pair_even(x[r][k]) + odd * pair_odd(x[r][k]);
        }
#endif
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) store(out + r * kTileOutputs + p * kLanes, a[r][p]);
}

// The same of float32.
template <int R, int P>
static void tile_of_floats(const uint8_t* const* w, const uint32_t* const* x, int steps, float* out) {
    F16 a[R][P]{};
    for (int k = 0; k < steps; k++) {
        F16 v[P];
        for (int p = 0; p < P; p++) v[p] = load((const float*)(w[p] + k * 64));
        for (int r = 0; r < R; r++) {
            float one;
            memcpy(&one, x[r] + k, sizeof one);
            for (int p = 0; p < P; p++) a[r][p] += v[p] * one;
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) store(out + r * kTileOutputs + p * kLanes, a[r][p]);
}

typedef void (*Tile)(const uint8_t* const* w, const uint32_t* const* x, int steps, float* out);

// [bfloat16, float32][rows: 1, 2, 4, 6][panels: 1, 2, 4]
static const Tile kTiles[2][4][3] = {
    {{tile_of_pairs<1, 1>, tile_of_pairs<1, 2>, tile_of_pairs<1, 4>},
     {tile_of_pairs<2, 1>, tile_of_pairs<2, 2>, tile_of_pairs<2, 4>},
     {tile_of_pairs<4, 1>, tile_of_pairs<4, 2>, tile_of_pairs<4, 4>},
     {tile_of_pairs<6, 1>, tile_of_pairs<6, 2>, tile_of_pairs<6, 4>}},
    {{tile_of_floats<1, 1>, tile_of_floats<1, 2>, tile_of_floats<1, 4>},
     {tile_of_floats<2, 1>, tile_of_floats<2, 2>, tile_of_floats<2, 4>},
     {tile_of_floats<4, 1>, tile_of_floats<4, 2>, tile_of_floats<4, 4>},
     {tile_of_floats<6, 1>, tile_of_floats<6, 2>, tile_of_floats<6, 4>}}};

// One tile of 1 to 6 rows and 1 to 4 panels, the last of each repeated where the kernel takes more. `w` and `x` have
// room for 4 and 6. Output of row r and panel p: out + r * kTileOutputs + p * 16.
INLINE void multiply_tile(int format, const uint8_t** w, int panels, const uint32_t** x, int rows, int steps, float* out) {
    const int tall = rows > 4 ? 3 : rows > 2 ? 2 : rows - 1, wide = panels > 2 ? 2 : panels - 1;
    if (rows == 3) x[3] = x[2];
    if (rows == 5) x[5] = x[4];
    if (panels == 3) w[3] = w[2];
    kTiles[format == kFloat32][tall][wide](w, x, steps, out);
}

// Rows [begin, end), `row(r)` giving each, times `panels` panels; `take(r, p, F16)` gets what comes out.
template <class Row, class Take>
INLINE void multiply_rows(int format, const uint8_t** w, int panels, int begin, int end, int steps, Row&& row, Take&& take) {
    alignas(64) float out[kTileRows * kTileOutputs];
    const uint32_t* x[kTileRows];
    for (int first = begin; first < end; first += kTileRows) {
        const int rows = std::min(kTileRows, end - first);
        for (int r = 0; r < rows; r++) x[r] = row(first + r);
        multiply_tile(format, w, panels, x, rows, steps, out);
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < panels; p++) take(first + r, p, load(out + r * kTileOutputs + p * kLanes));
    }
}

INLINE int num_steps(int format, int inputs) { return format == kFloat32 ? inputs : (inputs + 1) / 2; }

// Memory for one call, not cleared: its pages are first touched by the thread that fills them.
template <class T>
struct Scratch {
    std::unique_ptr<T[]> data;
    size_t size = 0;

    T* reserve(size_t n) {
        if (size < n) data.reset(new T[n]), size = n;
        return data.get();
    }
};

// Rows of bfloat16 that products read: [n, width] with zeros from `cols` to an even number, a few more between rows so
// that not all of them meet in one set of the cache.
struct HalfRows {
    Scratch<uint32_t> pairs;
    int64_t stride = 0;  // pairs

    void reserve(int num_rows, int cols) {
        stride = round_up(cols, 2 * kLanes) / 2 + kLanes;
        pairs.reserve((size_t)num_rows * stride);
    }

    uint32_t* row(int r) { return pairs.data.get() + r * stride; }
    uint16_t* values(int r) { return (uint16_t*)row(r); }

    void set(int r, const float* x, int cols) {
        uint16_t* to = values(r);
        int i = 0;
        for (; i + kLanes <= cols; i += kLanes) store_bfloat(to + i, load(x + i));
        for (; i < cols; i++) to[i] = float_to_bfloat(x[i]);
        if (cols % 2) to[cols] = 0;
    }
};

// Where threads take units of a phase from: one counter a phase, all made before the threads start.
class Phases {
public:
    explicit Phases(int count) : next_(count) {}

    int take(int phase) { return next_[phase].fetch_add(1, std::memory_order_relaxed); }

private:
    std::vector<std::atomic<int>> next_;
};

// All `count` units of a phase between the threads, and meet.
template <class Function>
INLINE void share_out(Phases& phases, int phase, int count, Team& team, Function&& function) {
    for (int unit; (unit = phases.take(phase)) < count;) function(unit);
    team.barrier();
}

// How rows are cut into chunks, given how many other units each chunk has.
struct Chunks {
    int size, count;

    Chunks(int num_rows, int others, int num_threads) {
        int wanted = (num_rows + kChunkRows - 1) / kChunkRows;
        while (wanted * others < 4 * num_threads && wanted * 4 * kTileRows < num_rows) wanted *= 2;
        size = round_up((num_rows + wanted - 1) / std::max(wanted, 1), kTileRows);
        count = num_rows ? (num_rows + size - 1) / size : 0;
    }

    int begin(int chunk) const { return chunk * size; }
    int end(int chunk, int num_rows) const { return std::min((chunk + 1) * size, num_rows); }
};

INLINE int num_groups(const Matrix& m) { return (m.panels() + kTilePanels - 1) / kTilePanels; }

// One unit of a product: rows [begin, end) times the panels of one group; `take(r, column, count, F16)`.
template <class Row, class Take>
INLINE void multiply_group(const Matrix& m, int group, int begin, int end, int inputs, Row&& row, Take&& take) {
    const int first = group * kTilePanels, panels = std::min(kTilePanels, m.panels() - first);
    const uint8_t* w[kTilePanels];
    for (int p = 0; p < panels; p++) w[p] = m.data + (first + p) * m.panel_bytes;
    multiply_rows(m.format, w, panels, begin, end, num_steps(m.format, inputs), row, [&](int r, int p, F16 v) {
        const int column = (first + p) * kLanes;
        take(r, column, std::min(kLanes, m.rows - column), v);
    });
}
