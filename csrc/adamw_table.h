// The table of a step in device memory: the rows of its tensors, the chunks of each update kernel, and the tensor of each chunk.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "adamw_body.h"
#include "adamw_cuda.h"

namespace adept_fast {
namespace {

constexpr int kWarp = 32;
constexpr std::int64_t kRowWords = sizeof(Tensor) / 8, kCountedWords = sizeof(Counted) / 8;

// Set-ups of common training, whose whole chunks have kernels of their own.
constexpr Setup kSetups[] = {
    {kFp32, kFp32, kFp32, kDirect},    {kBf16, kBf16, kFp32, kDirect},    {kBf16, kBf16, kFp32, kCopy},
    {kBf16, kBf16, kFp32, kRemainder}, {kBf16, kBf16, kFp32, kStochastic}, {kBf16, kBf16, kBf16, kDirect},
    {kBf16, kBf16, kBf16, kRemainder}, {kBf16, kBf16, kBf16, kKahan},     {kBf16, kBf16, kBf16, kStochastic},
    {kFp32, kFp32, k8Bit, kDirect},    {kBf16, kBf16, k8Bit, kDirect},    {kBf16, kBf16, k8Bit, kRemainder},
    {kBf16, kBf16, k8Bit, kRemainder8}, {kBf16, kBf16, k8Bit, kStochastic}, {kBf16, kBf16, kFp32, kRemainder8},
};
constexpr int kSetupCount = sizeof(kSetups) / sizeof(Setup);

// The kernel of whole chunks: 2 * set-up + whether the tensor has multipliers; kRest: none, all chunks of the tensor are rest.
constexpr int kRest = 2 * kSetupCount, kKernels = kRest + 1;

ADEPT_FAST_INLINE constexpr Setup setup_of(int kernel) {
    Setup setup = kSetups[kernel / 2];
    setup.units = kernel % 2 != 0;
    setup.whole = true;
    return setup;
}

int kernel_of(const Tensor& row) {
    const std::int64_t streams = row.param | row.grad | row.exp_avg | row.exp_avg_sq | row.master;
    for (int i = 0; i < kSetupCount && row.max_exp_avg_sq == 0 && streams % 16 == 0 && row.row % kBlock == 0; ++i) {
        const Setup& s = kSetups[i];
        if (row.formats == (s.param | s.grad << 2 | s.moments << 4) && row.mode == s.mode) {
            return 2 * i + (row.multipliers != 0);
        }
    }
    return kRest;
}

// The chunks of a tensor. Those of all tensors are numbered in the order of their kernels, whole ones and the rest apart.
struct Span {
    std::int64_t first_whole, first_rest;
    std::int64_t whole;  // number of whole chunks, which precede the rest
};
constexpr std::int64_t kSpanWords = sizeof(Span) / 8;
static_assert(kRowWords + kSpanWords + kCountedWords <= kWarp, "a warp fetches an entry with one word per lane");

// The parts of a table in memory order.
struct Parts {
    std::int64_t* rows;   // by kernel
    std::int64_t* spans;  // one more than tensors, with the totals
    Counted* counted;
    std::int32_t* tensor_of_whole;
    std::int32_t* tensor_of_rest;

    Parts(std::int64_t address, std::int64_t tensors, std::int64_t whole)
        : rows(reinterpret_cast<std::int64_t*>(address)),
          spans(rows + kRowWords * tensors),
          counted(reinterpret_cast<Counted*>(spans + kSpanWords * (tensors + 1))),
          tensor_of_whole(reinterpret_cast<std::int32_t*>(counted + tensors)),
          tensor_of_rest(tensor_of_whole + whole) {}
};

// The whole chunks of a tensor that has the kernel `kernel`.
std::int64_t whole_chunks(const Tensor& row, int kernel) { return kernel == kRest ? 0 : row.numel / kChunk; }

std::int64_t total_whole(const std::vector<std::int64_t>& chunks) { return std::accumulate(chunks.begin(), chunks.end() - 1, std::int64_t{0}); }

// Rows and spans in the order of their kernels, as a table begins with them.
struct Content {
    std::vector<std::int64_t> words;
    std::int64_t whole = 0, rest = 0;  // numbers of chunks

    Content(const Tensor* rows, std::int64_t tensors) {
        std::vector<std::int64_t> order(tensors);
        std::iota(order.begin(), order.end(), std::int64_t{0});
        std::vector<int> kernel_of_each;
        for (std::int64_t i = 0; i < tensors; ++i) {
            kernel_of_each.push_back(kernel_of(rows[i]));
        }
        std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return kernel_of_each[a] < kernel_of_each[b]; });
        std::vector<std::int64_t> spans;
        for (const std::int64_t i : order) {
            const std::int64_t* row = reinterpret_cast<const std::int64_t*>(rows + i);
            words.insert(words.end(), row, row + kRowWords);
            const std::int64_t each = whole_chunks(rows[i], kernel_of_each[i]);
            spans.insert(spans.end(), {whole, rest, each});
            whole += each;
            rest += chunks_of(slots_of(rows[i])) - each;
        }
        spans.insert(spans.end(), {whole, rest, 0});
        words.insert(words.end(), spans.begin(), spans.end());
    }
};

}  // namespace

}  // namespace adept_fast
