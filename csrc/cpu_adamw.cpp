#include "cpu_adamw.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "eight_bit.h"
#include "parallel.h"

namespace adept_fast {
namespace {

constexpr std::int64_t kChunk = 32768;  // elements that a thread takes at a time

// Maps a chunk, numbered over all arrays, to its array and the position in it.
class Chunks {
public:
    void add(std::int64_t numel) { ends_.push_back((ends_.empty() ? 0 : ends_.back()) + (numel + kChunk - 1) / kChunk); }
    std::int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }

    template <class F>
    void visit(std::int64_t chunk, const F& body) const {
        const auto found = std::upper_bound(ends_.begin(), ends_.end(), chunk);
        const std::int64_t before = found == ends_.begin() ? 0 : *(found - 1);
        body(static_cast<std::size_t>(found - ends_.begin()), (chunk - before) * kChunk);
    }

private:
    std::vector<std::int64_t> ends_;
};

template <class T>
void fill_rates(const Work& work, const float* multipliers, T* decay, T* step) {
    const std::int64_t length = work.tensor.length;
    for (std::int64_t i = 0; i < length; ++i) {
        const Rate<T> rate = unit_rate<T>(work.scalars, multipliers[i]);
        decay[i] = rate.decay;
        step[i] = rate.step;
    }
    if (std::is_same_v<T, float> && work.tensor.inner == 1) {
        for (T* rates : {decay, step}) {
            for (std::int64_t i = 0, even = (length + 1) / 2; i < length; ++i) rates[length + (i % 2 == 0 ? 0 : even) + i / 2] = rates[i];
        }
    }
}

}  // namespace

const char* adamw_step(const Tensor* tensors, std::int64_t count, const Group* groups, std::int64_t group_count, double grad_scale,
                       int threads, const InstructionSet& set) {
    std::int64_t rates = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        const Tensor& t = tensors[i];
        if (const char* wrong = wrong_row(t, group_count)) return wrong;
        const float step = *reinterpret_cast<const float*>(t.step);
        if (!(step >= 0.0f && step < 9.0e18f) || std::floor(step) != step) return "a step is negative, or no whole number";
        rates += t.length > 1 ? 2 * t.length : 0;
    }
    // Memory for fp64, or for fp32 twice. It is reused, as page faults of new memory would take longer than the rates.
    static thread_local std::vector<double> scratch;
    if (scratch.size() < static_cast<std::size_t>(rates)) scratch.resize(static_cast<std::size_t>(rates));
    double* free = scratch.data();
    std::vector<Work> work;
    work.reserve(static_cast<std::size_t>(count));
    Chunks chunks;
    for (std::int64_t i = 0; i < count; ++i) {
        const Tensor& t = tensors[i];
        const Group& g = groups[t.group];
        float& step = *reinterpret_cast<float*>(t.step);
        step += 1.0f;
        const std::int64_t number = static_cast<std::int64_t>(step);
        const double scale = g.maximize != 0.0 ? -grad_scale : grad_scale;
        const float* multipliers = reinterpret_cast<const float*>(t.multipliers);
        Work one{t, step_scalars(g.lr, g.beta1, g.beta2, g.eps, g.weight_decay, scale, number), number, 1.0, nullptr, nullptr};
        if (multipliers != nullptr && t.length == 1) {
            one.multiplier = multipliers[0];
        } else if (multipliers != nullptr) {
            double *decay = free, *steps = free + t.length;
            free += 2 * t.length;
            if ((t.formats & 3) == kFp64) {
                fill_rates(one, multipliers, decay, steps);
            } else {
                fill_rates(one, multipliers, reinterpret_cast<float*>(decay), reinterpret_cast<float*>(steps));
            }
            one.decay = decay;
            one.step = steps;
        }
        work.push_back(one);
        chunks.add(slots_of(t));
    }
    for_each(chunks.count(), threads, [&](std::int64_t chunk) {
        chunks.visit(chunk, [&](std::size_t i, std::int64_t first) {
            set.update(work[i], first, std::min(kChunk, slots_of(work[i].tensor) - first));
        });
    });
    return nullptr;
}

const char* wrong_gradients(const Gradient* gradients, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        const Gradient& g = gradients[i];
        if (g.numel < 0 || g.format < kFp32 || g.format > kFp64 || (g.numel > 0 && g.address == 0)) {
            return "a row of the table of gradients is out of range";
        }
    }
    return nullptr;
}

double sum_of_squares(const Gradient* gradients, std::int64_t count, int threads, const InstructionSet& set) {
    Chunks chunks;
    for (std::int64_t i = 0; i < count; ++i) chunks.add(gradients[i].numel);
    std::vector<double> partial(static_cast<std::size_t>(chunks.count()));
    for_each(chunks.count(), threads, [&](std::int64_t chunk) {
        chunks.visit(chunk, [&](std::size_t i, std::int64_t first) {
            partial[static_cast<std::size_t>(chunk)] = set.sum_of_squares(gradients[i], first, std::min(kChunk, gradients[i].numel - first));
        });
    });
    double total = 0.0;
    for (const double part : partial) total += part;
    return total;
}

const InstructionSet* const* instruction_sets() {
    static const InstructionSet* found[4] = {};
    static const bool once = [] {
        int i = 0;
#if defined(__x86_64__)
        __builtin_cpu_init();  // its report includes whether the system saves the wide registers
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512dq")) {
            found[i++] = &kAvx512;
        }
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
            found[i++] = &kAvx2;
        }
#endif
        found[i] = &kGeneric;
        return true;
    }();
    (void)once;
    return found;
}

}  // namespace adept_fast
