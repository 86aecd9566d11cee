// Included by cpu_adamw_body.h: elements of any format as fp32 or fp64, their loop, and weights behind a master.
//
// Tensors of other formats are converted in tiles that stay in the L1 cache, so that one loop, which the compiler vectorises, covers every
// mix of formats. Tiles are small, so that conversions of the next tile overlap with square roots and divisions of this one.
#pragma once

#include "cpu_adamw.h"
#include "eight_bit.h"

namespace adept_fast {
namespace {

template <class S>
S* at(std::int64_t address, std::int64_t index) {
    return reinterpret_cast<S*>(address) + index;
}

constexpr std::int64_t kTile = 64;

// The number of elements of a whole tile as a compile-time constant, so that loops over it have no remainder.
struct Whole {
    constexpr operator std::int64_t() const { return kTile; }
};

template <class T>
constexpr bool is_own(std::int64_t format) {
    return format == (sizeof(T) == 8 ? kFp64 : kFp32);
}

template <class T, class N>
void load(std::int64_t address, std::int64_t format, std::int64_t first, N n, T* __restrict out) {
    if (format == kBf16) {
        const std::uint16_t* in = at<const std::uint16_t>(address, first);
        for (std::int64_t i = 0; i < n; ++i) out[i] = from_bf16(in[i]);
    } else if (format == kFp16) {
        const std::uint16_t* in = at<const std::uint16_t>(address, first);
        for (std::int64_t i = 0; i < n; ++i) out[i] = from_fp16(in[i]);
    } else if (format == kFp32) {
        const float* in = at<const float>(address, first);
        for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(in[i]);
    } else {
        const double* in = at<const double>(address, first);
        for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(in[i]);
    }
}

// Returns the memory itself if it has the arithmetic's type, else a converted copy in `tile`.
template <class T, class N>
T* open(std::int64_t address, std::int64_t format, std::int64_t first, N n, T* tile) {
    if (is_own<T>(format)) return at<T>(address, first);
    load(address, format, first, n, tile);
    return tile;
}

// The rates of a range of elements: one for all, or one each.
template <class T>
struct OneRate {
    Rate<T> rate;
    Rate<T> operator[](std::int64_t) const { return rate; }
    bool frozen(std::int64_t) const { return false; }  // `store` skips a frozen range
    bool store() const { return !(rate.decay < static_cast<T>(0)); }
    OneRate from(std::int64_t) const { return *this; }
};

template <class T>
struct RateEach {
    const T *decay, *step;
    Rate<T> operator[](std::int64_t i) const { return {decay[i], step[i]}; }
    bool frozen(std::int64_t i) const { return decay[i] < static_cast<T>(0); }
    bool store() const { return true; }
    RateEach from(std::int64_t i) const { return {decay + i, step + i}; }
};

// For tensors without frozen elements.
struct Always {
    bool frozen(std::int64_t) const { return false; }
};

template <class T, class N, class Rates>
void store(std::int64_t address, std::int64_t format, std::int64_t first, N n, const T* __restrict in, Rates rates) {
    if (format == kBf16) {
        std::uint16_t* out = at<std::uint16_t>(address, first);
        for (std::int64_t i = 0; i < n; ++i) out[i] = rates.frozen(i) ? out[i] : to_bf16(static_cast<float>(in[i]));
    } else if (format == kFp16) {
        std::uint16_t* out = at<std::uint16_t>(address, first);
        for (std::int64_t i = 0; i < n; ++i) out[i] = rates.frozen(i) ? out[i] : to_fp16(static_cast<float>(in[i]));
    } else if (format == kFp32) {
        float* out = at<float>(address, first);
        for (std::int64_t i = 0; i < n; ++i) out[i] = rates.frozen(i) ? out[i] : static_cast<float>(in[i]);
    } else {
        double* out = at<double>(address, first);
        for (std::int64_t i = 0; i < n; ++i) out[i] = rates.frozen(i) ? out[i] : static_cast<double>(in[i]);
    }
}

template <class T>
struct Streams {
    T *weight, *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
    const T* grad;
};

// Loops over elements, with one rate, or with rates in arrays that are declared not to alias.
template <class T, bool kAmsgrad, bool kSlow, class N>
void loop(N n, Streams<T> s, Constants<T> c, OneRate<T> rates) {
    T *__restrict w = s.weight, *__restrict m = s.exp_avg, *__restrict v = s.exp_avg_sq, *__restrict x = s.max_exp_avg_sq;
    const T* __restrict g = s.grad;
    if (kSlow) c.slow1 = c.slow2 = true;
    T none = 0;
    for (std::int64_t i = 0; i < n; ++i) w[i] = adamw<kAmsgrad>(w[i], g[i], m[i], v[i], kAmsgrad ? x[i] : none, c, rates.rate);
}

template <class T, bool kAmsgrad, bool kSlow, class N>
void loop_each(N n, Streams<T> s, Constants<T> c, const T* __restrict decay, const T* __restrict step) {
    T *__restrict w = s.weight, *__restrict m = s.exp_avg, *__restrict v = s.exp_avg_sq, *__restrict x = s.max_exp_avg_sq;
    const T* __restrict g = s.grad;
    if (kSlow) c.slow1 = c.slow2 = true;
    T none = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        w[i] = adamw<kAmsgrad>(w[i], g[i], m[i], v[i], kAmsgrad ? x[i] : none, c, Rate<T>{decay[i], step[i]});
    }
}

template <class T, bool kAmsgrad, bool kSlow, class N>
void loop(N n, const Streams<T>& s, const Constants<T>& c, const RateEach<T>& rates) {
    loop_each<T, kAmsgrad, kSlow>(n, s, c, rates.decay, rates.step);
}

template <class T, class N, class Rates>
void elements(N n, Streams<T> s, const Constants<T>& c, Rates rates) {
    const bool slow = c.slow1 && c.slow2;
    if (s.max_exp_avg_sq != nullptr) {
        slow ? loop<T, true, true>(n, s, c, rates) : loop<T, true, false>(n, s, c, rates);
    } else {
        slow ? loop<T, false, true>(n, s, c, rates) : loop<T, false, false>(n, s, c, rates);
    }
}

// Computes the weights of the master mode, in place if the parameter has the arithmetic's type.
template <class T, class N>
T* open_weights(const Tensor& t, std::int64_t first, N n, T* tile) {
    const std::int64_t format = t.formats & 3;
    if (t.mode == kDirect || t.mode == kStochastic) return open(t.param, format, first, n, tile);
    if (t.mode == kRemainder) {
        const std::uint16_t* param = at<const std::uint16_t>(t.param, first);
        const std::int16_t* low = at<const std::int16_t>(t.master, first);
        for (std::int64_t i = 0; i < n; ++i) tile[i] = join_master(param[i], low[i]);
        return tile;
    }
    if (t.mode == kRemainder8) {
        const std::uint16_t* param = at<const std::uint16_t>(t.param, first);
        const std::int8_t* low = at<const std::int8_t>(t.master, first);
        for (std::int64_t i = 0; i < n; ++i) tile[i] = join_master8(param[i], low[i]);
        return tile;
    }
    load(t.param, format, first, n, tile);
    if (t.mode == kCopy) {
        const float* master = at<const float>(t.master, first);
        if (format == kBf16) {
            for (std::int64_t i = 0; i < n; ++i) tile[i] = from_bf16(to_bf16(master[i])) == tile[i] ? master[i] : tile[i];
        } else {
            for (std::int64_t i = 0; i < n; ++i) tile[i] = from_fp16(to_fp16(master[i])) == tile[i] ? master[i] : tile[i];
        }
    } else {
        alignas(64) T compensation[kTile];
        load(t.master, format, first, n, compensation);
        for (std::int64_t i = 0; i < n; ++i) tile[i] += compensation[i];
    }
    return tile;
}

template <class T, class N, class Rates>
void close_weights(const Work& work, std::int64_t first, N n, const T* weight, Rates rates) {
    const Tensor& t = work.tensor;
    const std::int64_t format = t.formats & 3;
    std::uint16_t* param = at<std::uint16_t>(t.param, first);
    if (t.mode == kRemainder) {
        std::int16_t* low = at<std::int16_t>(t.master, first);
        for (std::int64_t i = 0; i < n; ++i) {
            std::uint16_t high;
            std::int16_t rest;
            split_master(static_cast<float>(weight[i]), high, rest);
            param[i] = rates.frozen(i) ? param[i] : high;
            low[i] = rates.frozen(i) ? low[i] : rest;
        }
    } else if (t.mode == kRemainder8) {
        std::int8_t* low = at<std::int8_t>(t.master, first);
        const std::uint32_t key = dither_key(static_cast<std::uint32_t>(t.seed), work.t);
        const std::uint32_t dither = dither_of(key, static_cast<std::uint64_t>(t.first_index + first));
        for (std::int64_t i = 0; i < n; ++i) {
            std::uint16_t high;
            std::int8_t rest;
            split_master8(static_cast<float>(weight[i]), dither_of(dither, static_cast<std::uint64_t>(i)), high, rest);
            param[i] = rates.frozen(i) ? param[i] : high;
            low[i] = rates.frozen(i) ? low[i] : rest;
        }
    } else if (t.mode == kStochastic) {
        const NoiseKey key = noise_key(static_cast<std::uint32_t>(t.seed), work.t);
        const std::uint64_t index = static_cast<std::uint64_t>(t.first_index + first);
        for (std::int64_t i = 0; i < n; ++i) {
            const std::uint16_t rounded = stochastic_bf16(static_cast<float>(weight[i]), key, index + static_cast<std::uint64_t>(i));
            param[i] = rates.frozen(i) ? param[i] : rounded;
        }
    } else {
        store(t.param, format, first, n, weight, rates);
        if (t.mode == kCopy) {
            store(t.master, kFp32, first, n, weight, rates);
        } else if (t.mode == kKahan) {
            alignas(64) T lost[kTile];
            if (format == kBf16) {
                for (std::int64_t i = 0; i < n; ++i) lost[i] = weight[i] - from_bf16(to_bf16(static_cast<float>(weight[i])));
            } else {
                for (std::int64_t i = 0; i < n; ++i) lost[i] = weight[i] - from_fp16(to_fp16(static_cast<float>(weight[i])));
            }
            for (std::int64_t i = 0; i < n; ++i) lost[i] = is_finite(weight[i]) ? lost[i] : static_cast<T>(0);
            store(t.master, format, first, n, static_cast<const T*>(lost), rates);
        }
    }
}

}  // namespace
}  // namespace adept_fast
