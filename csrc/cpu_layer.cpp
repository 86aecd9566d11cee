#include "cpu_layer.h"

#include <algorithm>

#include "cpu_rows.h"
#include "parallel.h"

namespace adept_fast {

const char* rms_norm(const RootMeanSquareNorm& norm, int threads, const RowKernels& kernels) {
    if (norm.rows < 0 || norm.width < 1) return "a norm has a negative number of rows, or none of columns";
    const std::int64_t at_once = std::max<std::int64_t>(1, kElements / norm.width);
    in_ranges(norm.rows, at_once, threads, [&](std::int64_t first, std::int64_t rows) { kernels.rms_norm(norm, first, rows); });
    return nullptr;
}

const char* gated_activation(const GatedActivation& activation, int threads, const RowKernels& kernels) {
    in_ranges(activation.count, kElements, threads,
              [&](std::int64_t first, std::int64_t count) { kernels.gated_activation(activation, first, count); });
    return nullptr;
}

const char* attention(const Attention& given, int threads, const RowKernels& kernels) {
    if (given.width < 32 || given.width % 32 != 0) return "the width of a head is no multiple of 32";
    if (given.key_heads < 1 || given.heads % given.key_heads != 0) return "heads are no whole groups of key heads";
    for (std::int64_t s = 0; s < given.segments; ++s) {
        if (given.ends[s] <= (s == 0 ? 0 : given.ends[s - 1])) return "segments do not ascend";
    }
    if (given.segments < 1 || given.ends[given.segments - 1] != given.tokens) return "the last segment does not end with the tokens";
    for (std::int64_t i = 0; i < given.asking; ++i) {
        const std::int64_t least = i == 0 ? 0 : given.askers[i - 1] + 1;
        if (given.askers[i] < least || given.askers[i] >= given.tokens) return "tokens that ask do not ascend";
    }
    for_each(given.sequences * given.segments * given.key_heads, threads, [&](std::int64_t i) {
        const std::int64_t key_head = i % given.key_heads, segment = i / given.key_heads % given.segments;
        const std::int64_t first = segment == 0 ? 0 : given.ends[segment - 1];
        kernels.attend(given, i / given.key_heads / given.segments, first, given.ends[segment] - first, key_head);
    });
    return nullptr;
}

}  // namespace adept_fast
