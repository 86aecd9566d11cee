// The AdamW launches for one tensor's step and for the elements of one thread, as host and device code. Access: see adamw_streams.h.
#pragma once

#include "adamw.h"
#include "adamw_blocks.h"
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
    } else if (mode == kRemainder8) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            const std::uint16_t high = static_cast<std::uint16_t>(param.word[k] >> 16);
            param.word[k] = bits_of(join_master8(high, static_cast<std::int8_t>(byte_of(master, k))));
        }
    } else if (mode == kKahan) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            param.word[k] = bits_of(float_of(param.word[k]) + from_half(half_of(master, k), format));
        }
    }
}

// The numbers of one step that decide how weights and 8-bit moments are rounded.
struct Noise {
    NoiseKey key;
    std::uint32_t dither;
};

// Rounds fp32 weights in `param` to param and master as stored. index: of the first element in the unsharded parameter.
ADEPT_FAST_INLINE void round_weights(const Setup& s, Eight& param, Eight& master, const Noise& noise, std::int64_t index) {
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
    } else if (mode == kRemainder8) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            std::uint16_t high;
            std::int8_t low;
            const std::uint64_t each = static_cast<std::uint64_t>(index) + after_first(gap_of(s), k);
            split_master8(float_of(param.word[k]), dither_of(noise.dither, each), high, low);
            set_half(param, k, high);
            set_byte(master, k, static_cast<std::uint8_t>(low));
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
            set_half(param, k, stochastic_bf16(float_of(param.word[k]), noise.key, static_cast<std::uint64_t>(index) + after_first(gap_of(s), k)));
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

// Looks up the rate of each element of a thread, which has element `offset` after the first one of the walk. one: that of multiplier 1. Returns a bit for each element that is not frozen.
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

// Updates one thread's elements in the slots from `offset` on, of the chunk that begins with slot `chunk_first`. walk: from the chunk's first
// element, begin.
template <class Access>
ADEPT_FAST_INLINE void update_eight(const Setup& s, const Tensor& row, const StepScalars& scalars, const Constants<float>& c, const Noise& noise,
                                    const UnitWalk& walk, Rate<float> one, std::int64_t begin, std::int64_t chunk_first, std::uint32_t offset) {
    const Spot spot = spot_at(s, row, chunk_first + offset);
    const std::int64_t first = spot.first;
    const std::uint32_t present = spot.present;
    const bool blocks = s.moments == k8Bit;
    if (present == 0 && !blocks) {  // lanes of a block exchange values
        return;
    }
    const std::uint32_t param_size = size_of_format(s.param), moment_size = size_of_format(s.moments), master_size = size_of_master(s.mode);

    // All loads come before the first conversion, so that they run together.
    Eight param = load<Access>(s, row.param, first, param_size, present);
    Eight grad = load<Access>(s, row.grad, first, size_of_format(s.grad), present);
    Eight m = load<Access>(s, row.exp_avg, first, moment_size, present);
    Eight v = load<Access>(s, row.exp_avg_sq, first, moment_size, present);
    Eight vmax = load<Access>(s, row.max_exp_avg_sq, first, s.amsgrad ? moment_size : 0, present);
    Eight master = load<Access>(s, row.master, first, master_size, present);
    const Scale scale = blocks ? load_scale<Access>(s, row, spot, offset / kWidth) : Scale{};

    Rate<float> rates[kWidth];
    const std::uint32_t place = blocks && !s.whole ? static_cast<std::uint32_t>(first - begin) : offset;
    const std::uint32_t live = present & unit_rates<Access>(s, row, scalars, walk, place, one, rates);
    widen(param, s.param);
    widen(grad, s.grad);
    read_weights(param, master, s.param, s.mode);
    if (blocks) {
        decode<Access>(m, v, scale);
        move_rooted(param, grad, m, v, c, rates);
        encode<Access>(m, v, scale, dither_of(noise.dither, static_cast<std::uint64_t>(row.first_index + first)));
    } else {
        widen(m, s.moments);
        widen(v, s.moments);
        if (s.amsgrad) {
            widen(vmax, s.moments);
            move<true>(param, grad, m, v, vmax, c, rates);
            narrow(vmax, s.moments);
            store<Access>(s, row.max_exp_avg_sq, first, moment_size, present, vmax);
        } else {
            move<false>(param, grad, m, v, vmax, c, rates);
        }
        narrow(m, s.moments);
        narrow(v, s.moments);
    }
    store<Access>(s, row.exp_avg, first, moment_size, present, m);
    store<Access>(s, row.exp_avg_sq, first, moment_size, present, v);
    round_weights(s, param, master, noise, row.first_index + first);
    store<Access>(s, row.param, first, param_size, live, param);
    if (master_size != 0) {
        store<Access>(s, row.master, first, master_size, live, master);
    }
}

// Updates one thread's part of a chunk.
template <class Access>
ADEPT_FAST_INLINE void update_turns(const Setup& s, const Tensor& row, const Counted& counted, const Constants<float>& c, std::int64_t chunk,
                                    int thread) {
    const std::int64_t first = chunk * kChunk, begin = spot_at(s, row, first).first;
    const std::uint32_t seed = static_cast<std::uint32_t>(row.seed);
    const Noise noise{noise_key(seed, counted.t), dither_key(seed, counted.t)};
    const UnitWalk walk = s.units ? unit_walk(row, begin) : UnitWalk{};
    const Rate<float> one = unit_rate<float>(counted.scalars, 1.0);
#pragma unroll 1
    for (std::uint32_t offset = offset_of(gap_of(s), thread); offset < kChunk; offset += kTurn) {
        update_eight<Access>(s, row, counted.scalars, c, noise, walk, one, begin, first, offset);
    }
}

// Whether both averages move from their old values, as with all usual betas. Kernels of one set-up take only such tensors.
ADEPT_FAST_INLINE bool is_slow(const StepScalars& s) { return s.beta1 >= 0.5 && s.beta2 >= 0.5; }

// chunk: number in the tensor.
template <class Access>
ADEPT_FAST_INLINE void update_whole_chunk(const Setup& s, const Tensor& row, const Counted& counted, std::int64_t chunk, int thread) {
    Constants<float> c = constants<float>(counted.scalars);
    c.slow1 = c.slow2 = true;
    update_turns<Access>(s, row, counted, c, chunk, thread);
}

// A chunk of any tensor. Two ways, as 8-bit moments and others have little in common.
template <class Access>
ADEPT_FAST_INLINE void update_any_chunk(const Tensor& row, const Counted& counted, std::int64_t chunk, int thread) {
    Setup s = any_setup(row);
    const Constants<float> c = constants<float>(counted.scalars);
    if (s.moments == k8Bit) {
        s.moments = k8Bit;
        s.amsgrad = false;
        update_turns<Access>(s, row, counted, c, chunk, thread);
    } else {
        s.moments &= 3;
        update_turns<Access>(s, row, counted, c, chunk, thread);
    }
}

}  // namespace adept_fast
