#include "cpu_layer.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "cpu_rows.h"
#include "parallel.h"

namespace adept_fast {

const char* rms_norm(const RootMeanSquareNorm& norm, int threads, const RowKernels& kernels) {
    if (norm.rows < 0 || norm.width < 1) return "a norm has a negative number of rows, or none of columns";
    const bool whole = norm.input && norm.weight && norm.output;
    if (norm.rows > 0 && !whole) return "a norm has no input, weight or output";
    const std::int64_t at_once = std::max<std::int64_t>(1, kElements / norm.width);
    in_ranges(norm.rows, at_once, threads, [&](std::int64_t first, std::int64_t rows) { kernels.rms_norm(norm, first, rows); });
    return nullptr;
}

const char* gated_activation(const GatedActivation& activation, int threads, const RowKernels& kernels) {
    if (activation.count < 0 || (activation.count > 0 && (activation.gate == nullptr || activation.up == nullptr))) {
        return "an activation has a negative size, or no gate or input";
    }
    in_ranges(activation.count, kElements, threads,
              [&](std::int64_t first, std::int64_t count) { kernels.gated_activation(activation, first, count); });
    return nullptr;
}

const char* attention(const Attention& given, int threads, const RowKernels& kernels) {
    if (given.width < 32 || given.width % 32 != 0) return "the width of a head is no multiple of 32";
    if (given.key_heads < 1 || given.heads < 1 || given.heads % given.key_heads != 0) return "heads are no whole groups of key heads";
    if (given.sequences < 0 || given.asking < 0) return "attention of a negative number of sequences or tokens";
    for (std::int64_t s = 0; s < given.segments; ++s) {
        if (given.ends[s] <= (s == 0 ? 0 : given.ends[s - 1])) return "segments do not ascend";
    }
    if (given.segments < 1 || given.ends[given.segments - 1] != given.tokens) return "the last segment does not end with the tokens";
    for (std::int64_t i = 0; i < given.asking; ++i) {
        const std::int64_t least = i == 0 ? 0 : given.askers[i - 1] + 1;
        if (given.askers[i] < least || given.askers[i] >= given.tokens) return "tokens that ask do not ascend";
    }
    const bool whole = given.queries && given.keys && given.values && given.cosines && given.sines && given.output;
    if (given.sequences > 0 && given.asking > 0 && !whole) return "attention has no queries, keys, values, turns or output";
    std::atomic<bool> short_of_memory{false};
    for_each(given.sequences * given.segments * given.key_heads, threads, [&](std::int64_t i) {
        const std::int64_t key_head = i % given.key_heads, segment = i / given.key_heads % given.segments;
        const std::int64_t first = segment == 0 ? 0 : given.ends[segment - 1];
        try {
            kernels.attend(given, i / given.key_heads / given.segments, first, given.ends[segment] - first, key_head);
        } catch (const std::bad_alloc&) {  // an exception must not leave a thread
            short_of_memory = true;
        }
    });
    return short_of_memory ? "no memory for the scores of attention" : nullptr;
}

}  // namespace adept_fast
