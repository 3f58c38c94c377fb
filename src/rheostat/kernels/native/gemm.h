// Products y = x W^T of many rows: the panels of matrix.h, a block of rows at a time.
//
// A tile is up to 6 rows (2 without AVX-512) by 4 panels: 24 sums that stay in registers while the inputs go by, each weight vector used for
// every row and each pair of activations for every panel. Weights are bfloat16 (pairs of inputs side by side, which
// the processor multiplies as they are) or float32. Rows are given one by one, so that picking some costs nothing.
//
// A phase of work is cut into units, rows' chunk by rows' chunk, that threads take from a counter: a thread that was
// put aside holds up nobody for longer than a unit.
#pragma once

#include <algorithm>
#include <memory>

#include "matrix.h"

#if LEVEL_AVX512
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 2;  // the sums need as many registers as there are, and compiling must not take minutes
#endif
constexpr int kTilePanels = 4, kTileOutputs = kTilePanels * kLanes;
constexpr int kChunkRows = 192;  // of 576 or 1536 inputs: they stay in the second cache while all panels go by

INLINE F16 pair_even(uint32_t pair) { return as_float(U16{} + (pair << 16)); }

INLINE F16 pair_odd(uint32_t pair) { return as_float(U16{} + (pair & 0xffff0000u)); }

// What a tile does besides: where its results go (row r, panel p: out + r * stride + p * 16), and which weights it fetches
// for later, a line every eight steps.
struct TileOut {
    float* out;
    int64_t stride = kTileOutputs;
    bool is_added = false;
    const uint8_t* ahead = nullptr;
};

template <int R, int P>
INLINE void step_of_pairs(const uint8_t* const* w, const uint32_t* const* x, int k, F16 (*a)[P]) {
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

template <int R, int P>
INLINE void step_of_floats(const uint8_t* const* w, const uint32_t* const* x, int k, F16 (*a)[P]) {
    F16 v[P];
    for (int p = 0; p < P; p++) v[p] = load((const float*)(w[p] + k * 64));
    for (int r = 0; r < R; r++) {
        float one;
        memcpy(&one, x[r] + k, sizeof one);
        for (int p = 0; p < P; p++) a[r][p] += v[p] * one;
    }
}

// Rows times panels: `steps` pairs of bfloat16, or single float32s; 64 bytes of each panel a step.
template <bool IsPaired, int R, int P>
static void tile(const uint8_t* const* w, const uint32_t* const* x, int steps, const TileOut& to) {
    F16 a[R][P];
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) a[r][p] = to.is_added ? load(to.out + r * to.stride + p * kLanes) : F16{};
    int k = 0;
    for (; k + 8 <= steps; k += 8) {
        __builtin_prefetch(to.ahead + k * 8, 0, 2);  // of no place: nothing happens
        for (int i = 0; i < 8; i++) IsPaired ? step_of_pairs<R, P>(w, x, k + i, a) : step_of_floats<R, P>(w, x, k + i, a);
    }
    for (; k < steps; k++) IsPaired ? step_of_pairs<R, P>(w, x, k, a) : step_of_floats<R, P>(w, x, k, a);
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) store(to.out + r * to.stride + p * kLanes, a[r][p]);
}

typedef void (*Tile)(const uint8_t* const* w, const uint32_t* const* x, int steps, const TileOut& to);

#define TILES_OF_ROWS(paired, rows) {tile<paired, rows, 1>, tile<paired, rows, 2>, tile<paired, rows, 3>, tile<paired, rows, 4>}
#if LEVEL_AVX512
#define TILES(paired)                                                                            \
    {TILES_OF_ROWS(paired, 1), TILES_OF_ROWS(paired, 2), TILES_OF_ROWS(paired, 3),               \
     TILES_OF_ROWS(paired, 4), TILES_OF_ROWS(paired, 5), TILES_OF_ROWS(paired, 6)}
#else
#define TILES(paired) {TILES_OF_ROWS(paired, 1), TILES_OF_ROWS(paired, 2)}
#endif

static const Tile kTiles[2][kTileRows][kTilePanels] = {TILES(false), TILES(true)};

// One tile of 1 to kTileRows rows and 1 to 4 panels.
INLINE void multiply_tile(int format, const uint8_t* const* w, int panels, const uint32_t* const* x, int rows, int steps,
                          const TileOut& to) {
    kTiles[format != kFloat32][rows - 1][panels - 1](w, x, steps, to);
}

// Panels that one unit of work multiplies with, and two pieces of weights that the thread will want next.
struct Panels {
    const uint8_t* data[kTilePanels];
    int count;
    const uint8_t* ahead[2] = {nullptr, nullptr};
};

// Rows [begin, end), `row(r)` giving each, times panels; `take(r, p, F16)` gets what comes out.
template <class Row, class Take>
INLINE void multiply_rows(int format, const Panels& w, int begin, int end, int steps, Row&& row, Take&& take) {
    alignas(64) float out[kTileRows * kTileOutputs];
    const uint32_t* x[kTileRows];
    int tiles[2] = {0, 0};
    for (int first = begin, turn = 0; first < end; first += kTileRows, turn = !turn) {
        const int rows = std::min(kTileRows, end - first);
        for (int r = 0; r < rows; r++) x[r] = row(first + r);
        TileOut to{out};
        if (w.ahead[turn]) to.ahead = w.ahead[turn] + (int64_t)tiles[turn]++ * (steps / 8) * 64;
        multiply_tile(format, w.data, w.count, x, rows, steps, to);
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < w.count; p++) take(first + r, p, load(out + r * kTileOutputs + p * kLanes));
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

    // Row r's channels from `first` on.
    void set(int r, const float* x, int cols, int first = 0) {
        uint16_t* to = values(r) + first;
        int i = 0;
        for (; i + kLanes <= cols; i += kLanes) store_bfloat(to + i, load(x + i));
        for (; i < cols; i++) to[i] = float_to_bfloat(x[i]);
        if ((first + cols) % 2) to[cols] = 0;
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

// The panels of one group of outputs; `next` is the group that the thread will probably take after it.
INLINE Panels panels_of(const Matrix& m, int group, int next) {
    const int first = group * kTilePanels;
    Panels w;
    w.count = std::min(kTilePanels, m.panels() - first);
    for (int p = 0; p < w.count; p++) w.data[p] = m.data + (first + p) * m.panel_bytes;
    if (next < num_groups(m))
        for (int i = 0; i < 2; i++) w.ahead[i] = m.data + (next * kTilePanels + i * kTilePanels / 2) * m.panel_bytes;
    return w;
}

// One unit of a product: rows [begin, end) times the panels of one group; `take(r, column, count, F16)`.
template <class Row, class Take>
INLINE void multiply_group(const Matrix& m, int group, int next, int begin, int end, int inputs, Row&& row, Take&& take) {
    const int first = group * kTilePanels;
    multiply_rows(m.format, panels_of(m, group, next), begin, end, num_steps(m.format, inputs), row, [&](int r, int p, F16 v) {
        const int column = (first + p) * kLanes;
        take(r, column, std::min(kLanes, m.rows - column), v);
    });
}
