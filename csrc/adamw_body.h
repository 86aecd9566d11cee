// The AdamW launches for one tensor's step and for the elements of one thread, as host and device code. Access: see adamw_streams.h.
#pragma once

#include "adamw.h"
#include "adamw_streams.h"

namespace adept_fast {

// Results of the counter launch for the update launch.
struct Counted {
    StepScalars scalars;
    std::int64_t t;
};

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
