// What Python calls. Arguments are checked there; here they are taken as right.
#include "matrix.h"

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
