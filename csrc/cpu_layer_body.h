// Included by one source file per instruction set: norms and gated activations.
#pragma once

#include <cmath>

#include "cpu_lanes.h"
#include "cpu_layer.h"

namespace adept_fast {
namespace {

// Loads up to kLanes elements; the rest is zero.
ADEPT_FAST_INLINE Lanes load_some(const float* from, std::int64_t count) {
    if (count >= kLanes) return load(from);
    float padded[kLanes] = {};
    std::memcpy(padded, from, static_cast<std::size_t>(count) * sizeof(float));
    return load(padded);
}

ADEPT_FAST_INLINE void store_some(float* to, const Lanes& a, std::int64_t count) {
    if (count >= kLanes) return store(to, a);
    std::memcpy(to, &a, static_cast<std::size_t>(count) * sizeof(float));
}

void rms_norm_rows(const RootMeanSquareNorm& norm, std::int64_t first_row, std::int64_t rows) {
    const std::int64_t width = norm.width;
    for (std::int64_t i = first_row; i < first_row + rows; ++i) {
        const float* x = norm.input + i * width;
        float* y = norm.output + i * width;
        Lanes even = all(0.0f), odd = all(0.0f);
        std::int64_t j = 0;
        for (; j + 2 * kLanes <= width; j += 2 * kLanes) {
            const Lanes a = load(x + j), b = load(x + j + kLanes);
            even = multiplied_added(a, a, even);
            odd = multiplied_added(b, b, odd);
        }
        for (; j < width; j += kLanes) {
            const Lanes a = load_some(x + j, width - j);
            even = multiplied_added(a, a, even);
        }
        const Lanes factor = all(1.0f / std::sqrt(sum_of(even + odd) / static_cast<float>(width) + norm.epsilon));
        for (j = 0; j < width; j += kLanes) {
            store_some(y + j, load_some(x + j, width - j) * factor * load_some(norm.weight + j, width - j), width - j);
        }
    }
}

void gated_activation_range(const GatedActivation& activation, std::int64_t first, std::int64_t count) {
    for (std::int64_t j = first; j < first + count; j += kLanes) {
        const std::int64_t n = first + count - j;
        const Lanes gate = load_some(activation.gate + j, n), up = load_some(activation.up + j, n);
        const Lanes e = exponential<true>(all(0.0f) - absolute(gate));
        const Lanes upper = where_less(gate, all(0.0f), e, all(1.0f));  // numerator of the sigmoid
        store_some(activation.gate + j, gate * (upper / (all(1.0f) + e)) * up, n);
    }
}

}  // namespace
}  // namespace adept_fast
