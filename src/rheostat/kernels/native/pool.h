// A small pool of threads that wait by spinning for a moment, and then sleep.
//
// A decode step has hundreds of short parallel parts. `Pool::run` starts all threads on one function, which goes
// through its parts with `Team::barrier` in between; nothing is allocated and no kernel call is made on that path.
//
// Safe to use from several threads (a second caller at the same time works alone), and after `fork` (the child starts
// a pool of its own).
#pragma once

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "simd.h"

INLINE void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

constexpr int kSpins = 2000;            // before a thread that waits lets others run: some 20 microseconds
constexpr int kAwakeMicroseconds = 200;  // an idle worker stays awake: the time between two steps

// What a thread reads next: fetched while it waits for the others.
struct Fetch {
    const uint8_t* data = nullptr;
    int64_t bytes = 0;

    void fetch_some() {
        for (int i = 0; i < 8; i++) __builtin_prefetch(data + i * 64, 0, 2);
        data += 512, bytes -= 512;
    }
};

// The share [begin, end) of `count` units that thread `thread` of `size` takes.
struct Share {
    int begin, end;
    Share(int count, int thread, int size)
        : begin((int)((int64_t)count * thread / size)), end((int)((int64_t)count * (thread + 1) / size)) {}
    Share(int first, int last) : begin(first), end(last) {}
};

// How work is shared out between threads whose cores are not equally quick: a neighbour on the same core, another
// program, or a slower kind of core. Each thread says how long its share took it, and the next call's shares are moved a
// little towards those that would have taken equally long. What is computed does not depend on it.
class Balance {
public:
    void begin(int size) {
        if (size != size_ || size > kMost) {
            size_ = size;
            for (int t = 0; t < std::min(size, kMost); t++) parts_[t] = 1;
        } else {
            adjust();
        }
        for (int t = 0; t < std::min(size, kMost); t++) spent_[t].seconds = 0;
        edges_[0] = 0;
        for (int t = 0; t < std::min(size, kMost); t++) edges_[t + 1] = edges_[t] + parts_[t];
    }

    void add(int thread, double seconds) {
        if (thread < kMost) spent_[thread].seconds += seconds;
    }

    Share share(int count, int thread) const {
        if (size_ > kMost) return Share(count, thread, size_);
        return Share(edge(count, thread), edge(count, thread + 1));
    }

private:
    static constexpr int kMost = 64;         // threads; more take equal shares
    static constexpr float kRate = 0.15f;    // how far a share is moved at a time
    static constexpr float kLeast = 0.5f, kLargest = 2;  // of an equal share

    int edge(int count, int thread) const { return (int)(count * edges_[thread] / edges_[size_] + 0.5f); }

    void adjust() {
        double total = 0;
        for (int t = 0; t < size_; t++) {
            if (!(spent_[t].seconds > 0)) return;  // a call that was not timed
            total += spent_[t].seconds;
        }
        float sum = 0;
        for (int t = 0; t < size_; t++) {
            const float ratio = std::min(std::max((float)(total / size_ / spent_[t].seconds), 0.5f), 2.0f);
            sum += parts_[t] *= 1 + kRate * (ratio - 1);
        }
        for (int t = 0; t < size_; t++) parts_[t] = std::min(std::max(parts_[t] * size_ / sum, kLeast), kLargest);
    }

    struct alignas(64) Spent {
        double seconds = 0;
    };

    int size_ = 0;
    float parts_[kMost], edges_[kMost + 1];
    Spent spent_[kMost];
};

INLINE double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The threads that run one function, and where they meet.
struct Team {
    int size = 1;
    Balance* balance = nullptr;  // none: equal shares
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> phase{0};

    Share share(int count, int thread) const {
        return balance ? balance->share(count, thread) : Share(count, thread, size);
    }

    void barrier(Fetch next = {}) {
        if (size == 1) return;
        int now = phase.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            arrived.store(0, std::memory_order_relaxed);
            phase.store(now + 1, std::memory_order_release);
            return;
        }
        for (int i = 0; phase.load(std::memory_order_acquire) == now; i++)
            if (next.bytes >= 512)
                next.fetch_some();
            else if (i < kSpins)
                relax();
            else
                sched_yield();
    }
};

typedef void (*Work)(void* context, Team& team, int thread);

class Pool {
public:
    // Run `work` on up to `num_threads` threads, the caller among them, and return when all are done.
    void run(int num_threads, Work work, void* context) {
        std::unique_lock<std::mutex> lock(running_, std::try_to_lock);
        if (num_threads <= 1 || !lock.owns_lock()) {
            Team alone;
            work(context, alone, 0);
            return;
        }
        grow(num_threads - 1);
        int size = 1 + (int)workers_.size() < num_threads ? 1 + (int)workers_.size() : num_threads;
        team_.size = size;
        balance_.begin(size);
        team_.balance = &balance_;
        work_ = work;
        context_ = context;
        left_.store((int)workers_.size(), std::memory_order_relaxed);
        start_.fetch_add(1, std::memory_order_seq_cst);
        if (asleep_.load(std::memory_order_seq_cst)) {
            std::lock_guard<std::mutex> guard(sleeping_);
            wake_.notify_all();
        }
        work(context, team_, 0);
        for (int i = 0; left_.load(std::memory_order_acquire); i++)
            if (i < kSpins)
                relax();
            else
                sched_yield();
    }

private:
    void grow(int num_workers) {
        while ((int)workers_.size() < num_workers) {
            int index = (int)workers_.size() + 1;
            uint32_t seen = start_.load(std::memory_order_relaxed);
            try {
                workers_.emplace_back([this, index, seen] { serve(index, seen); });
                workers_.back().detach();
            } catch (const std::system_error&) {  // no more threads to be had: go on with those there are
                return;
            }
        }
    }

    void serve(int index, uint32_t seen) {
        for (;;) {
            await(seen);
            seen++;
            if (index < team_.size) work_(context_, team_, index);
            left_.fetch_sub(1, std::memory_order_acq_rel);
        }
    }

    void await(uint32_t seen) {
        auto began = std::chrono::steady_clock::now();
        for (;;) {
            for (int i = 0; i < 64; i++) {
                if (start_.load(std::memory_order_acquire) != seen) return;
                relax();
            }
            if (std::chrono::steady_clock::now() - began > std::chrono::microseconds(kAwakeMicroseconds)) break;
        }
        std::unique_lock<std::mutex> lock(sleeping_);
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return start_.load(std::memory_order_seq_cst) != seen; });
        asleep_.fetch_sub(1, std::memory_order_seq_cst);
    }

    std::mutex running_, sleeping_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    Team team_;
    Balance balance_;
    Work work_ = nullptr;
    void* context_ = nullptr;
    alignas(64) std::atomic<uint32_t> start_{0};
    alignas(64) std::atomic<int> left_{0};
    std::atomic<int> asleep_{0};
};

// Never freed: its threads live as long as the process, and a child of `fork` has none of them.
static std::atomic<Pool*> the_pool{nullptr};

static Pool& pool() {
    Pool* found = the_pool.load(std::memory_order_acquire);
    if (found) return *found;
    static std::atomic<bool> is_registered{false};
    if (!is_registered.exchange(true))
        pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr, std::memory_order_release); });
    Pool* fresh = new Pool;
    if (!the_pool.compare_exchange_strong(found, fresh)) {
        delete fresh;
        return *found;
    }
    return *fresh;
}

// Run a callable of (Team&, thread) on the pool.
template <class Function>
static void parallel(int num_threads, Function&& function) {
    pool().run(
        num_threads, [](void* f, Team& team, int thread) { (*(typename std::remove_reference<Function>::type*)f)(team, thread); },
        (void*)&function);
}
