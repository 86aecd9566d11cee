// Included by one source file per instruction set: adds one block of logits to the running softmax of its rows.
#pragma once

#include <cmath>
#include <limits>

#include "cpu_lanes.h"
#include "cpu_rows.h"

namespace adept_fast {
namespace {

struct Row {
    const LogitBlock& block;
    std::int64_t index;
    float* logits() const { return block.logits + index * block.stride; }
    double& operator[](RowState field) const { return block.state[field * block.state_stride + index]; }
};

// d logit / d product, where logit = softcap * tanh(scale * (product + bias) / softcap)
ADEPT_FAST_INLINE Lanes slope(const LogitBlock& block, const Lanes& z) {
    if (block.softcap == 0.0f) return all(block.scale);
    const Lanes share = z * all(1.0f / block.softcap);
    return (all(1.0f) - share * share) * all(block.scale);
}

// Converts products to logits in place, padded to whole lanes with -inf. Returns the largest.
float logits_of(const LogitBlock& block, float* row) {
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    Lanes largest = all(kNone);
    for (std::int64_t j = block.count; j % kLanes != 0; ++j) row[j] = 0.0f;
    for (std::int64_t j = 0; j < block.count; j += kLanes) {
        Lanes z = load(row + j);
        if (block.bias != nullptr) {
            float shift[kLanes] = {};
            const std::int64_t n = block.count - j < kLanes ? block.count - j : kLanes;
            std::memcpy(shift, block.bias + j, static_cast<std::size_t>(n) * sizeof(float));
            z = z + load(shift);
        }
        z = z * all(block.scale);
        if (block.softcap != 0.0f) z = hyperbolic_tangent(z / all(block.softcap)) * all(block.softcap);
        if (j + kLanes > block.count) {  // pad again: soft-cap, and a scale <= 0, change -inf
            store(row + j, z);
            for (std::int64_t k = block.count; k % kLanes != 0; ++k) row[k] = kNone;
            z = load(row + j);
        }
        store(row + j, z);
        largest = larger(z, largest);
    }
    return largest_of(largest);
}

// exponentials: output of e^(logit - maximum), or null
void update(const Row& row, float* exponentials) {
    const LogitBlock& block = row.block;
    float* z = row.logits();
    const float largest = logits_of(block, z);
    const std::int64_t target = block.targets[row.index] - block.first;
    if (target >= 0 && target < block.count) {
        row[kTarget] = z[target];
        float slopes[kLanes];
        store(slopes, slope(block, all(z[target])));
        row[kSlope] = slopes[0];
    }
    const double before = row[kMaximum];
    row[kShrink] = 1.0;
    if (largest > before) {
        std::int64_t j = 0;
        while (z[j] != largest) ++j;
        row[kArgmax] = static_cast<double>(block.first + j);
        row[kMaximum] = largest;
        row[kShrink] = std::exp(before - largest);
    }
    const float maximum = static_cast<float>(row[kMaximum]);
    Lanes sum = all(0.0f);
    const bool nothing = maximum == -std::numeric_limits<float>::infinity();  // so far: all logits are -inf
    for (std::int64_t j = 0; j < block.count; j += kLanes) {
        const Lanes logit = load(z + j);
        const Lanes e = nothing ? all(0.0f) : exponential(logit - all(maximum));
        sum = sum + e;
        if (exponentials != nullptr) store(exponentials + j, e);
        if (block.gradient) store(z + j, e * slope(block, logit));
    }
    row[kSum] = row[kSum] * row[kShrink] + sum_of(sum);
}

// sum_v e^(a_v - maximum of a) (a_v - b_v), for the divergence of b's softmax from a's
float weighted_difference(std::int64_t count, const float* exponentials, const float* a, const float* b) {
    Lanes sum = all(0.0f);
    for (std::int64_t j = 0; j < count; j += kLanes) {
        const Lanes e = load(exponentials + j);
        sum = sum + where_less(all(0.0f), e, e * (load(a + j) - load(b + j)), all(0.0f));  // where e = 0 the difference may be NaN
    }
    return sum_of(sum);
}

void softmax_rows(const LogitBlock& block, std::int64_t first_row, std::int64_t rows) {
    if (block.variants == 0) {
        for (std::int64_t i = first_row; i < first_row + rows; ++i) update(Row{block, i}, nullptr);
        return;
    }
    alignas(64) float exponentials[kLongestBlock];
    for (std::int64_t i = first_row; i < first_row + rows; i += block.variants) {
        const Row base{block, i};
        update(base, exponentials);
        for (std::int64_t k = 1; k < block.variants; ++k) {
            const Row row{block, i + k};
            update(row, nullptr);
            row[kWeighted] = row[kWeighted] * base[kShrink] + weighted_difference(block.count, exponentials, base.logits(), row.logits());
        }
    }
}

}  // namespace
}  // namespace adept_fast
