// Included by one source file per instruction set: causal attention of one key head within one segment.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu_lanes.h"
#include "cpu_layer.h"

namespace adept_fast {
namespace {

constexpr std::int64_t kQueries = 6;  // queries at a time

constexpr float kCount[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// A matrix whose rows consist of runs of kLanes elements. row, run: distance to the next row and to the next run.
struct Cut {
    const float* start;
    std::int64_t row, run;
};

// c[kQueries, kWide runs] = a[kQueries, depth] b[depth, kWide runs]
template <int kWide>
ADEPT_FAST_INLINE void multiply_tile(const float* a, std::int64_t a_row, const Cut& b, float* c, std::int64_t c_row, std::int64_t depth) {
    Lanes sums[kQueries][kWide];
    for (int i = 0; i < kQueries; ++i) {
        for (int w = 0; w < kWide; ++w) sums[i][w] = all(0.0f);
    }
    for (std::int64_t k = 0; k < depth; ++k) {
        Lanes row[kWide];
        for (int w = 0; w < kWide; ++w) row[w] = load(b.start + k * b.row + w * b.run);
        for (int i = 0; i < kQueries; ++i) {
            const Lanes x = all(a[i * a_row + k]);
            for (int w = 0; w < kWide; ++w) sums[i][w] = multiplied_added(x, row[w], sums[i][w]);
        }
    }
    for (int i = 0; i < kQueries; ++i) {
        for (int w = 0; w < kWide; ++w) store(c + i * c_row + w * kLanes, sums[i][w]);
    }
}

// c[kQueries, columns] = a[kQueries, depth] b[depth, columns]; columns: a multiple of kLanes
void multiply(const float* a, std::int64_t a_row, Cut b, float* c, std::int64_t c_row, std::int64_t depth, std::int64_t columns) {
    std::int64_t runs = columns / kLanes;
    const auto tiles = [&](auto wide) {
        constexpr int kWide = decltype(wide)::value;
        for (; runs >= kWide; runs -= kWide, b.start += kWide * b.run, c += kWide * kLanes) {
            multiply_tile<kWide>(a, a_row, b, c, c_row, depth);
        }
    };
    if constexpr (ADEPT_FAST_VECTOR == 64) {  // sums take 24 of 32 registers; with narrower vectors one run fills them
        tiles(std::integral_constant<int, 4>());
        tiles(std::integral_constant<int, 2>());
    }
    tiles(std::integral_constant<int, 1>());
}

// Applies rotary embedding to a head of one token, and multiplies it by `factor`.
ADEPT_FAST_INLINE void turn(const Attention& given, const float* head, std::int64_t token, float factor, float* turned) {
    const float *cosines = given.cosines + token * given.width, *sines = given.sines + token * given.width;
    const std::int64_t half = given.width / 2;
    for (std::int64_t j = 0; j < half; j += kLanes) {
        const Lanes a = load(head + j), b = load(head + j + half);
        store(turned + j, (a * load(cosines + j) - b * load(sines + j)) * all(factor));
        store(turned + j + half, (b * load(cosines + j + half) + a * load(sines + j + half)) * all(factor));
    }
}

// Replaces the scores of query `at` of a segment by e^(score - largest), 0 for masked keys. Returns their sum.
ADEPT_FAST_INLINE float softened(float* scores, std::int64_t at, std::int64_t padded) {
    for (std::int64_t j = at / kLanes * kLanes; j < padded; j += kLanes) {
        store(scores + j, where_less(all(static_cast<float>(at - j)), load(kCount), all(-INFINITY), load(scores + j)));
    }
    Lanes largest = load(scores);
    for (std::int64_t j = kLanes; j < padded; j += kLanes) largest = larger(load(scores + j), largest);
    const Lanes maximum = all(largest_of(largest));
    Lanes sum = all(0.0f);
    for (std::int64_t j = 0; j < padded; j += kLanes) {
        const Lanes e = exponential<true>(load(scores + j) - maximum);
        sum = sum + e;
        store(scores + j, e);
    }
    return sum_of(sum);
}

// Attention of one sequence in the segment of tokens first ... first + count - 1, for the query heads of one key head.
void attend(const Attention& given, std::int64_t sequence, std::int64_t first, std::int64_t count, std::int64_t key_head) {
    const std::int64_t width = given.width, group = given.heads / given.key_heads;
    const std::int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    const std::int64_t row = given.heads * width, key_row = given.key_heads * width, start = sequence * given.tokens + first;
    const std::int64_t* askers = std::lower_bound(given.askers, given.askers + given.asking, first);
    const std::int64_t asking = std::lower_bound(askers, given.askers + given.asking, first + count) - askers;
    const std::int64_t asked = sequence * given.asking + (askers - given.askers);  // row of the first query
    if (asking == 0) return;
    thread_local std::vector<float> scratch;
    scratch.resize(static_cast<std::size_t>(width * padded + kLanes * width + kQueries * (width + padded + width)));
    float* transposed = scratch.data();  // keys, kLanes at a time as [width, kLanes]
    float* some = transposed + width * padded;
    float *queries = some + kLanes * width, *scores = queries + kQueries * width, *output = scores + kQueries * padded;

    for (std::int64_t j = 0; j < padded; j += kLanes) {
        for (std::int64_t t = 0; t < kLanes; ++t) {
            const std::int64_t token = std::min(j + t, count - 1);  // padding keys are masked
            turn(given, given.keys + (start + token) * key_row + key_head * width, first + token, 1.0f, some + t * width);
        }
        float* run = transposed + j * width;
        for (std::int64_t d = 0; d < width; ++d) {
            for (std::int64_t t = 0; t < kLanes; ++t) run[d * kLanes + t] = some[t * width + d];
        }
    }
    const float* values = given.values + start * key_row + key_head * width;
    for (std::int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
        for (std::int64_t i = 0; i < asking; i += kQueries) {
            const std::int64_t n = std::min(kQueries, asking - i), seen = askers[i + n - 1] - first + 1;
            const std::int64_t seen_padded = (seen + kLanes - 1) / kLanes * kLanes;
            for (std::int64_t q = 0; q < kQueries; ++q) {
                const std::int64_t at = i + std::min(q, n - 1);
                turn(given, given.queries + (asked + at) * row + head * width, askers[at], given.scale, queries + q * width);
            }
            multiply(queries, width, {transposed, kLanes, width * kLanes}, scores, padded, width, seen_padded);
            float sums[kQueries];
            for (std::int64_t q = 0; q < kQueries; ++q) {
                sums[q] = softened(scores + q * padded, askers[i + std::min(q, n - 1)] - first, seen_padded);
            }
            multiply(scores, padded, {values, key_row, kLanes}, output, width, seen, width);
            for (std::int64_t q = 0; q < n; ++q) {
                float* to = given.output + (asked + i + q) * row + head * width;
                const Lanes share = all(1.0f / sums[q]);
                for (std::int64_t d = 0; d < width; d += kLanes) store(to + d, load(output + q * width + d) * share);
            }
        }
    }
}

}  // namespace
}  // namespace adept_fast
