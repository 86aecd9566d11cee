// Threads of torch's OpenMP runtime. A second pool would wait for torch's spinning threads, and be slower than one thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace adept_fast {

// Calls body(data, thread) once on each of up to `threads` threads, including the calling one, and waits for all. Uses fewer threads if no
// more can be started. `body` must not throw.
void run_on_threads(int threads, void (*body)(void*, int), void* data);

// Calls body(i) for each i < count on up to `threads` threads. Each thread begins with its share of equal consecutive shares, as matrix
// products divide rows, so that it reads data from its own core's cache; then it helps with the shares of others.
template <class F>
void for_each(std::int64_t count, int threads, const F& body) {
    struct alignas(64) Share {
        std::atomic<std::int64_t> next;
        std::int64_t end;
    };
    struct Work {
        const F& body;
        std::vector<Share> shares;
    } work{body, std::vector<Share>(static_cast<std::size_t>(std::clamp<std::int64_t>(count, 1, std::max(threads, 1))))};
    const auto shares = static_cast<std::int64_t>(work.shares.size());
    for (std::int64_t i = 0; i < shares; ++i) {
        work.shares[i].next.store(i * count / shares, std::memory_order_relaxed);
        work.shares[i].end = (i + 1) * count / shares;
    }
    const auto drain = [](void* data, int thread) {
        Work& w = *static_cast<Work*>(data);
        for (std::size_t turn = 0; turn < w.shares.size(); ++turn) {
            Share& share = w.shares[(static_cast<std::size_t>(thread) + turn) % w.shares.size()];
            for (std::int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) w.body(i);
        }
    };
    run_on_threads(static_cast<int>(shares), drain, &work);
}

// Calls body(first, count) for ranges of length `step` of 0 ... total - 1, on up to `threads` threads.
template <class F>
void in_ranges(std::int64_t total, std::int64_t step, int threads, const F& body) {
    for_each((total + step - 1) / step, threads, [&](std::int64_t i) { body(i * step, std::min(step, total - i * step)); });
}

// Returns the file of the OpenMP runtime, or "" if none was found: then each call starts threads.
const char* openmp_runtime();

}  // namespace adept_fast
