// The AdamW launches for one tensor's step and for the elements of one thread, as host and device code. `Access` reads and writes memory by
// address (static load2, load4, load8, load16 and store2, store4, store16), so that a test can run the code of the GPU on the host.
#pragma once

#include "adamw.h"
#include "adamw_grid.h"
#include "descriptor.h"

namespace adept_fast {

// Results of the counter launch for the update launch.
struct Counted {
    StepScalars scalars;
    std::int64_t t;
};

struct alignas(16) Words {
    std::uint32_t word[4];
};

struct alignas(8) Pair {
    std::uint32_t word[2];
};

// The elements of one thread of one stream, two groups of kGroup: as loaded (2-byte formats in the first four words, lower half first), or one
// fp32 per word.
struct Eight {
    std::uint32_t word[kWidth];
};

// What decides how elements are updated. In kernels of one set-up it is a constant, and all that depends on it is decided by the compiler.
struct Setup {
    std::int64_t param, grad, moments;  // Format
    std::int64_t mode;                  // Master
    bool amsgrad, units;                // units: the tensor has multipliers
    bool whole;                         // all elements of the chunk exist, and every stream is aligned to 16 bytes
};

// Decides while it runs.
ADEPT_FAST_INLINE Setup any_setup(const Tensor& row) {
    return {row.formats & 3, row.formats >> 2 & 3, row.formats >> 4 & 3, row.mode, row.max_exp_avg_sq != 0, row.multipliers != 0, false};
}

// Distance of the two groups of a thread. Adjacent groups of 2-byte elements make one access of 16 bytes. Those of fp32 are kGroup * 32 apart,
// so that each access of a warp covers adjacent memory.
ADEPT_FAST_INLINE constexpr std::uint32_t gap_of(const Setup& s) {
    return s.whole && (s.param == kFp32 || s.grad == kFp32 || s.moments == kFp32 || s.mode == kCopy) ? 32 * kGroup : kGroup;
}

// The first element of a thread in a turn.
ADEPT_FAST_INLINE std::uint32_t offset_of(std::uint32_t gap, std::uint32_t thread) {
    return gap == kGroup ? thread * kWidth : thread / 32 * 32 * kWidth + thread % 32 * kGroup;
}

// The place of element k of a thread after its first one.
ADEPT_FAST_INLINE std::uint32_t after_first(std::uint32_t gap, int k) { return k < kGroup ? k : k - kGroup + gap; }

template <class Access>
ADEPT_FAST_INLINE double hyperparameter(double value, std::int64_t address, std::int64_t kind) {
    return address == 0 ? value : kind == 1 ? float_of(Access::load4(address)) : Access::load8(address);
}

// Increments the tensor's step.
template <class Access>
ADEPT_FAST_INLINE Counted advance(const Tensor& row, const Group& group, double grad_scale) {
    const float step = float_of(Access::load4(row.step)) + 1.0f;
    Access::store4(row.step, bits_of(step));
    const std::int64_t t = static_cast<std::int64_t>(step);
    const double lr = hyperparameter<Access>(group.lr, group.lr_address, group.kinds & 3);
    const double beta1 = hyperparameter<Access>(group.beta1, group.beta1_address, group.kinds >> 2 & 3);
    const double beta2 = hyperparameter<Access>(group.beta2, group.beta2_address, group.kinds >> 4 & 3);
    return {step_scalars(lr, beta1, beta2, group.eps, group.weight_decay, group.maximize != 0.0 ? -grad_scale : grad_scale, t), t};
}

// Loads the elements whose bit in `present` is 1. The others, and all of an absent stream (address 0), give 0.
template <class Access>
ADEPT_FAST_INLINE Eight load(const Setup& s, std::int64_t stream, std::int64_t first, bool fp32, std::uint32_t present) {
    Eight raw{};
    if (stream == 0) {
        return raw;
    }
    const std::uint32_t gap = gap_of(s);
    const std::int64_t address = stream + first * (fp32 ? 4 : 2);
    if (s.whole || (present == 0xffu && address % 16 == 0)) {
        if (fp32 || gap == kGroup) {
            const Words low = Access::load16(address);
            const Words high = fp32 ? Access::load16(address + 4 * gap) : Words{};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                raw.word[k] = low.word[k];
                raw.word[k + 4] = high.word[k];
            }
        } else {
            const Pair low = Access::load_pair(address), high = Access::load_pair(address + 2 * gap);
            raw.word[0] = low.word[0];
            raw.word[1] = low.word[1];
            raw.word[2] = high.word[0];
            raw.word[3] = high.word[1];
        }
        return raw;
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
        if (present >> k & 1u) {
            if (fp32) {
                raw.word[k] = Access::load4(address + 4 * k);
            } else {
                raw.word[k / 2] |= std::uint32_t{Access::load2(address + 2 * k)} << (k % 2 * 16);
            }
        }
    }
    return raw;
}

// Writes the elements whose bit in `stored` is 1.
template <class Access>
ADEPT_FAST_INLINE void store(const Setup& s, std::int64_t stream, std::int64_t first, bool fp32, std::uint32_t stored, const Eight& raw) {
    const std::uint32_t gap = gap_of(s);
    const std::int64_t address = stream + first * (fp32 ? 4 : 2);
    if (stored == 0xffu && (s.whole || address % 16 == 0)) {
        if (fp32 || gap == kGroup) {
            Access::store16(address, Words{{raw.word[0], raw.word[1], raw.word[2], raw.word[3]}});
            if (fp32) {
                Access::store16(address + 4 * gap, Words{{raw.word[4], raw.word[5], raw.word[6], raw.word[7]}});
            }
        } else {
            Access::store_pair(address, Pair{{raw.word[0], raw.word[1]}});
            Access::store_pair(address + 2 * gap, Pair{{raw.word[2], raw.word[3]}});
        }
        return;
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
        if (stored >> k & 1u) {
            if (fp32) {
                Access::store4(address + 4 * after_first(gap, k), raw.word[k]);
            } else {
                Access::store2(address + 2 * after_first(gap, k), static_cast<std::uint16_t>(raw.word[k / 2] >> (k % 2 * 16)));
            }
        }
    }
}

ADEPT_FAST_INLINE std::uint16_t half_of(const Eight& raw, int k) { return static_cast<std::uint16_t>(raw.word[k / 2] >> (k % 2 * 16)); }

// Converts a format to fp32 in place, beginning with the last element, so that no half is overwritten before it is read.
ADEPT_FAST_INLINE void widen(Eight& raw, std::int64_t format) {
    if (format == kBf16) {
#pragma unroll
        for (int k = kWidth - 1; k >= 0; --k) {
            raw.word[k] = bits_of(from_bf16(half_of(raw, k)));
        }
    } else if (format == kFp16) {
#pragma unroll
        for (int k = kWidth - 1; k >= 0; --k) {
            raw.word[k] = bits_of(from_fp16(half_of(raw, k)));
        }
    }
}

// Packs two halves per word, in place.
ADEPT_FAST_INLINE void set_half(Eight& raw, int k, std::uint16_t half) {
    raw.word[k / 2] = k % 2 == 0 ? half : raw.word[k / 2] | std::uint32_t{half} << 16;
}

ADEPT_FAST_INLINE std::uint16_t to_half(float value, std::int64_t format) { return format == kBf16 ? to_bf16(value) : to_fp16(value); }

ADEPT_FAST_INLINE float from_half(std::uint16_t half, std::int64_t format) { return format == kBf16 ? from_bf16(half) : from_fp16(half); }

// Converts fp32 to a format in place.
ADEPT_FAST_INLINE void narrow(Eight& raw, std::int64_t format) {
    if (format == kBf16) {
#pragma unroll
        for (int k = 0; k < kWidth; k += 2) {
            raw.word[k / 2] = to_bf16_pair(float_of(raw.word[k]), float_of(raw.word[k + 1]));
        }
    } else if (format == kFp16) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            set_half(raw, k, to_fp16(float_of(raw.word[k])));
        }
    }
}

// Computes the fp32 weights from param (as fp32) and master (as loaded), into `param`.
ADEPT_FAST_INLINE void read_weights(Eight& param, const Eight& master, std::int64_t format, std::int64_t mode) {
    if (mode == kCopy) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            const float kept = float_of(master.word[k]);
            param.word[k] = from_half(to_half(kept, format), format) == float_of(param.word[k]) ? master.word[k] : param.word[k];
        }
    } else if (mode == kRemainder) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            const std::uint16_t high = static_cast<std::uint16_t>(param.word[k] >> 16);
            param.word[k] = bits_of(join_master(high, static_cast<std::int16_t>(half_of(master, k))));
        }
    } else if (mode == kKahan) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            param.word[k] = bits_of(float_of(param.word[k]) + from_half(half_of(master, k), format));
        }
    }
}

// Rounds fp32 weights in `param` to param and master as stored. index: of the first element in the unsharded parameter.
ADEPT_FAST_INLINE void round_weights(const Setup& s, Eight& param, Eight& master, NoiseKey key, std::int64_t index) {
    const std::int64_t format = s.param, mode = s.mode;
    if (mode == kRemainder) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            std::uint16_t high;
            std::int16_t low;
            split_master(float_of(param.word[k]), high, low);
            set_half(param, k, high);
            set_half(master, k, static_cast<std::uint16_t>(low));
        }
    } else if (mode == kKahan) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            const float weight = float_of(param.word[k]);
            const std::uint16_t rounded = to_half(weight, format);
            set_half(param, k, rounded);
            set_half(master, k, is_finite(weight) ? to_half(weight - from_half(rounded, format), format) : std::uint16_t{0});
        }
    } else if (mode == kStochastic) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            set_half(param, k, stochastic_bf16(float_of(param.word[k]), key, static_cast<std::uint64_t>(index) + after_first(gap_of(s), k)));
        }
    } else {
        if (mode == kCopy) {
            master = param;
        }
        narrow(param, format);
    }
}

// Updates weights and moments, all fp32.
template <bool kAmsgrad>
ADEPT_FAST_INLINE void move(Eight& weight, const Eight& grad, Eight& m, Eight& v, Eight& vmax, const Constants<float>& c,
                            const Rate<float> (&rates)[kWidth]) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
        float first = float_of(m.word[k]), second = float_of(v.word[k]), largest = float_of(vmax.word[k]);
        const float old = float_of(weight.word[k]);
        weight.word[k] = bits_of(adamw_moving<kAmsgrad>(old, float_of(grad.word[k]), first, second, largest, c, rates[k]));
        m.word[k] = bits_of(first);
        v.word[k] = bits_of(second);
        vmax.word[k] = bits_of(largest);
    }
}

// Looks up the rate of each element of a thread. one: that of multiplier 1. Returns a bit for each element that is not frozen.
template <class Access>
ADEPT_FAST_INLINE std::uint32_t unit_rates(const Setup& s, const Tensor& row, const StepScalars& scalars, const UnitWalk& walk,
                                           std::uint32_t offset, Rate<float> one, Rate<float> (&rates)[kWidth]) {
    if (!s.units) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            rates[k] = one;
        }
        return 0xffu;
    }
    const std::uint32_t gap = gap_of(s);
    const int adjacent = gap == kGroup ? kWidth : kGroup;
    std::uint32_t live = 0;
#pragma unroll
    for (int begin = 0; begin < kWidth; begin += adjacent) {
        Place place = place_at(walk, offset + after_first(gap, begin));
        const bool one_unit = place.left >= static_cast<std::uint32_t>(adjacent);
        std::uint32_t multiplier = Access::load_kept4(row.multipliers + 4 * place.unit);
        Rate<float> rate = unit_rate<float>(scalars, float_of(multiplier));
#pragma unroll
        for (int k = begin; k < begin + adjacent; ++k) {
            if (k > begin && !one_unit) {
                to_next(walk, place);
                const std::uint32_t found = Access::load_kept4(row.multipliers + 4 * place.unit);
                if (found != multiplier) {
                    multiplier = found;
                    rate = unit_rate<float>(scalars, float_of(multiplier));
                }
            }
            rates[k] = rate;
            live |= rate.decay < 0.0f ? 0u : 1u << k;
        }
    }
    return live;
}

// Updates one thread's elements from `offset` on, in the chunk that begins with element `chunk_first`.
template <class Access>
ADEPT_FAST_INLINE void update_eight(const Setup& s, const Tensor& row, const StepScalars& scalars, const Constants<float>& c, NoiseKey key,
                                    const UnitWalk& walk, Rate<float> one, std::int64_t chunk_first, std::uint32_t offset) {
    const std::int64_t first = chunk_first + offset;
    const std::uint32_t present = s.whole ? 0xffu : present_bits(first, row.numel);
    if (present == 0) {
        return;
    }
    const bool fp32_moments = s.moments == kFp32, has_master = s.mode == kCopy || s.mode == kRemainder || s.mode == kKahan;

    // All loads come before the first conversion, so that they run together.
    Eight param = load<Access>(s, row.param, first, s.param == kFp32, present);
    Eight grad = load<Access>(s, row.grad, first, s.grad == kFp32, present);
    Eight m = load<Access>(s, row.exp_avg, first, fp32_moments, present);
    Eight v = load<Access>(s, row.exp_avg_sq, first, fp32_moments, present);
    Eight vmax = load<Access>(s, s.amsgrad ? row.max_exp_avg_sq : 0, first, fp32_moments, present);
    Eight master = load<Access>(s, has_master ? row.master : 0, first, s.mode == kCopy, present);

    Rate<float> rates[kWidth];
    const std::uint32_t live = present & unit_rates<Access>(s, row, scalars, walk, offset, one, rates);
    widen(param, s.param);
    widen(grad, s.grad);
    widen(m, s.moments);
    widen(v, s.moments);
    read_weights(param, master, s.param, s.mode);
    if (s.amsgrad) {
        widen(vmax, s.moments);
        move<true>(param, grad, m, v, vmax, c, rates);
        narrow(vmax, s.moments);
        store<Access>(s, row.max_exp_avg_sq, first, fp32_moments, present, vmax);
    } else {
        move<false>(param, grad, m, v, vmax, c, rates);
    }
    narrow(m, s.moments);
    narrow(v, s.moments);
    store<Access>(s, row.exp_avg, first, fp32_moments, present, m);
    store<Access>(s, row.exp_avg_sq, first, fp32_moments, present, v);
    round_weights(s, param, master, key, row.first_index + first);
    store<Access>(s, row.param, first, s.param == kFp32, live, param);
    if (has_master) {
        store<Access>(s, row.master, first, s.mode == kCopy, live, master);
    }
}

// Updates one thread's part of a chunk.
template <class Access>
ADEPT_FAST_INLINE void update_turns(const Setup& s, const Tensor& row, const Counted& counted, const Constants<float>& c, std::int64_t chunk,
                                    int thread) {
    const std::int64_t first = chunk * kChunk;
    const NoiseKey key = noise_key(static_cast<std::uint32_t>(row.seed), counted.t);
    const UnitWalk walk = s.units ? unit_walk(row, first) : UnitWalk{};
    const Rate<float> one = unit_rate<float>(counted.scalars, 1.0);
#pragma unroll 1
    for (std::uint32_t offset = offset_of(gap_of(s), thread); offset < kChunk; offset += kTurn) {
        update_eight<Access>(s, row, counted.scalars, c, key, walk, one, first, offset);
    }
}

// chunk: number in the tensor.
template <class Access>
ADEPT_FAST_INLINE void update_chunk(const Setup& s, const Tensor& row, const Counted& counted, std::int64_t chunk, int thread) {
    Constants<float> c = constants<float>(counted.scalars);
    if (s.whole && c.slow1 && c.slow2) {
        c.slow1 = c.slow2 = true;  // constants for the compiler
        update_turns<Access>(s, row, counted, c, chunk, thread);
    } else {
        update_turns<Access>(s, row, counted, c, chunk, thread);
    }
}

}  // namespace adept_fast
