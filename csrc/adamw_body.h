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

// kWidth elements of one stream: as loaded (2-byte formats in the first four words, lower half first), or one fp32 per word.
struct Eight {
    std::uint32_t word[kWidth];
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

// Loads kWidth elements. An absent stream (address 0), and elements whose bit in `present` is 0, give 0.
template <class Access>
ADEPT_FAST_INLINE Eight load(std::int64_t stream, std::int64_t first, bool fp32, std::uint32_t present) {
    Eight raw{};
    if (stream == 0) {
        return raw;
    }
    const std::int64_t address = stream + first * (fp32 ? 4 : 2);
    if (present == 0xffu && address % 16 == 0) {
        const Words low = Access::load16(address);
        Words high{};
        if (fp32) {
            high = Access::load16(address + 16);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            raw.word[k] = low.word[k];
            raw.word[k + 4] = high.word[k];
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
ADEPT_FAST_INLINE void store(std::int64_t stream, std::int64_t first, bool fp32, std::uint32_t stored, const Eight& raw) {
    const std::int64_t address = stream + first * (fp32 ? 4 : 2);
    if (stored == 0xffu && address % 16 == 0) {
        Access::store16(address, Words{{raw.word[0], raw.word[1], raw.word[2], raw.word[3]}});
        if (fp32) {
            Access::store16(address + 16, Words{{raw.word[4], raw.word[5], raw.word[6], raw.word[7]}});
        }
        return;
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
        if (stored >> k & 1u) {
            if (fp32) {
                Access::store4(address + 4 * k, raw.word[k]);
            } else {
                Access::store2(address + 2 * k, static_cast<std::uint16_t>(raw.word[k / 2] >> (k % 2 * 16)));
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
        for (int k = 0; k < kWidth; ++k) {
            set_half(raw, k, to_bf16(float_of(raw.word[k])));
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
ADEPT_FAST_INLINE void round_weights(Eight& param, Eight& master, std::int64_t format, std::int64_t mode, NoiseKey key,
                                     std::int64_t index) {
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
            set_half(param, k, stochastic_bf16(float_of(param.word[k]), key, static_cast<std::uint64_t>(index) + k));
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
        weight.word[k] = bits_of(adamw<kAmsgrad>(float_of(weight.word[k]), float_of(grad.word[k]), first, second, largest, c, rates[k]));
        m.word[k] = bits_of(first);
        v.word[k] = bits_of(second);
        vmax.word[k] = bits_of(largest);
    }
}

// Updates kWidth elements from `offset` on, in the chunk that begins with element `chunk_first`.
template <class Access>
ADEPT_FAST_INLINE void update_eight(const Tensor& row, const StepScalars& scalars, const Constants<float>& c, NoiseKey key,
                                    const UnitWalk& walk, std::int64_t chunk_first, std::uint32_t offset) {
    const std::int64_t first = chunk_first + offset;
    const std::uint32_t present = present_bits(first, row.numel);
    if (present == 0) {
        return;
    }
    const std::int64_t format = row.formats & 3, grad_format = row.formats >> 2 & 3, moment_format = row.formats >> 4 & 3;
    const std::int64_t mode = row.mode;

    // All loads come before the first conversion, so that they run together.
    Eight param = load<Access>(row.param, first, format == kFp32, present);
    Eight grad = load<Access>(row.grad, first, grad_format == kFp32, present);
    Eight m = load<Access>(row.exp_avg, first, moment_format == kFp32, present);
    Eight v = load<Access>(row.exp_avg_sq, first, moment_format == kFp32, present);
    Eight vmax = load<Access>(row.max_exp_avg_sq, first, moment_format == kFp32, present);
    Eight master = load<Access>(row.master, first, mode == kCopy, present);

    Rate<float> rates[kWidth];
    Place place{0, kWidth};
    std::uint32_t multipliers[kWidth] = {bits_of(1.0f)};
    if (row.multipliers != 0) {
        place = place_at(walk, offset);
        multipliers[0] = Access::load4(row.multipliers + 4 * place.unit);
    }
    const bool one_unit = place.left >= kWidth;
    if (!one_unit) {
#pragma unroll
        for (int k = 1; k < kWidth; ++k) {
            to_next(walk, place);
            multipliers[k] = Access::load4(row.multipliers + 4 * place.unit);
        }
    }
    rates[0] = unit_rate<float>(scalars, float_of(multipliers[0]));
#pragma unroll
    for (int k = 1; k < kWidth; ++k) {
        rates[k] = rates[k - 1];
        if (!one_unit && multipliers[k] != multipliers[k - 1]) {
            rates[k] = unit_rate<float>(scalars, float_of(multipliers[k]));
        }
    }
    std::uint32_t live = present;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
        live &= ~(rates[k].decay < 0.0f ? 1u << k : 0u);
    }

    widen(param, format);
    widen(grad, grad_format);
    widen(m, moment_format);
    widen(v, moment_format);
    read_weights(param, master, format, mode);
    if (row.max_exp_avg_sq != 0) {
        widen(vmax, moment_format);
        move<true>(param, grad, m, v, vmax, c, rates);
        narrow(vmax, moment_format);
        store<Access>(row.max_exp_avg_sq, first, moment_format == kFp32, present, vmax);
    } else {
        move<false>(param, grad, m, v, vmax, c, rates);
    }
    narrow(m, moment_format);
    narrow(v, moment_format);
    store<Access>(row.exp_avg, first, moment_format == kFp32, present, m);
    store<Access>(row.exp_avg_sq, first, moment_format == kFp32, present, v);
    round_weights(param, master, format, mode, key, row.first_index + first);
    store<Access>(row.param, first, format == kFp32, live, param);
    if (row.master != 0) {
        store<Access>(row.master, first, mode == kCopy, live, master);
    }
}

// Updates one thread's part of a chunk. chunk: number in the tensor.
template <class Access>
ADEPT_FAST_INLINE void update_chunk(const Tensor& row, const Counted& counted, std::int64_t chunk, int thread) {
    const std::int64_t first = chunk * kChunk;
    const Constants<float> c = constants<float>(counted.scalars);
    const NoiseKey key = noise_key(static_cast<std::uint32_t>(row.seed), counted.t);
    const UnitWalk walk = row.multipliers == 0 ? UnitWalk{} : unit_walk(row, first);
#pragma unroll 1
    for (std::uint32_t offset = thread * kWidth; offset < kChunk; offset += kTurn) {
        update_eight<Access>(row, counted.scalars, c, key, walk, first, offset);
    }
}

}  // namespace adept_fast
