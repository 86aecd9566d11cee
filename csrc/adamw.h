// AdamW for one element on CPU and GPU: the formula, and the master modes of low-precision parameters.
//
//     m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2            (amsgrad: vmax <- max(vmax, v), used for v below)
//     w <- w - (rate weight_decay w + rate sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps sqrt(1 - beta2^t)))
//     rate = lr * multiplier; with a multiplier of 0, w is not written
//
// Source: Loshchilov and Hutter, arXiv 1711.05101. Two changes of torch.optim.AdamW's order: sqrt(1 - beta2^t) is taken out of the
// denominator, which saves a division, and decay and step are added before they are subtracted from w, which saves the rounding of
// 1 - rate weight_decay.
//
// Every operation is rounded once (IEEE). Compile without contraction (-ffp-contract=off, --fmad=false), so that CPU, CUDA and Triton
// (kernels/adamw.py, the same operations in the same order) give the same bits.
#pragma once

#include <cmath>

#include "number_formats.h"

namespace adept_fast {

// Scalars of one tensor and step, in fp64 until the last rounding.
struct StepScalars {
    double lr, weight_decay, beta1, beta2;
    double epsilon;     // eps sqrt(1 - beta2^t)
    double correction;  // sqrt(1 - beta2^t) / (1 - beta1^t)
    double grad_scale;  // factor of gradients; negative to maximize
};

// base^count by squaring: the same bits everywhere, unlike pow. Exact to about count * 2^-53.
ADEPT_FAST_INLINE double power(double base, std::int64_t count) {
    double result = 1.0;
    for (; count > 0; count >>= 1) {
        if (count & 1) {
            result *= base;
        }
        base *= base;
    }
    return result;
}

// t: the number of this step, from 1.
ADEPT_FAST_INLINE StepScalars step_scalars(double lr, double beta1, double beta2, double eps, double weight_decay, double grad_scale,
                                           std::int64_t t) {
    const double root = std::sqrt(1.0 - power(beta2, t));
    return {lr, weight_decay, beta1, beta2, eps * root, root / (1.0 - power(beta1, t)), grad_scale};
}

// StepScalars rounded to the arithmetic's type. An average with beta >= 1/2 (slow) moves from the old value by `weight`, any other from the
// new value, so that beta = 0 gives exactly the new value.
template <class T>
struct Constants {
    T grad_scale, epsilon, weight1, weight2;
    bool slow1, slow2;
};

template <class T>
ADEPT_FAST_INLINE Constants<T> constants(const StepScalars& s) {
    const bool slow1 = s.beta1 >= 0.5, slow2 = s.beta2 >= 0.5;
    return {static_cast<T>(s.grad_scale), static_cast<T>(s.epsilon), static_cast<T>(slow1 ? 1.0 - s.beta1 : s.beta1),
            static_cast<T>(slow2 ? 1.0 - s.beta2 : s.beta2), slow1, slow2};
}

template <class T>
ADEPT_FAST_INLINE T average(T old, T value, T weight, bool slow) {
    return slow ? old + weight * (value - old) : value + weight * (old - value);
}

// Rates of a unit: decay, the factor of w (-1: frozen), and step, the factor of m / (sqrt(v) + epsilon).
template <class T>
struct Rate {
    T decay, step;
};

template <class T>
ADEPT_FAST_INLINE Rate<T> unit_rate(const StepScalars& s, double multiplier) {
    const double rate = s.lr * multiplier;
    return {multiplier == 0.0 ? static_cast<T>(-1) : static_cast<T>(rate * s.weight_decay), static_cast<T>(rate * s.correction)};
}

// Returns NaN if one is NaN, as torch does.
template <class T>
ADEPT_FAST_INLINE T larger(T a, T b) {
    return a > b || a != a ? a : b;
}

ADEPT_FAST_INLINE float square_root(float x) { return sqrtf(x); }
ADEPT_FAST_INLINE double square_root(double x) { return std::sqrt(x); }

// The weight after a step along m / (root + epsilon). An infinite weight does not decay, as inf - inf is NaN.
template <class T>
ADEPT_FAST_INLINE T moved(T weight, T m, T root, const Constants<T>& c, Rate<T> rate) {
    const T step = rate.step * (m / (root + c.epsilon));
    const T decay = is_finite(weight) ? rate.decay * weight : static_cast<T>(0);
    return weight - (decay + step);
}

// Updates m, v and (with kAmsgrad) vmax in place and returns the new weight, frozen or not.
template <bool kAmsgrad, class T>
ADEPT_FAST_INLINE T adamw_moving(T weight, T grad, T& m, T& v, T& vmax, const Constants<T>& c, Rate<T> rate) {
    const T g = grad * c.grad_scale;
    m = average(m, g, c.weight1, c.slow1);
    v = average(v, g * g, c.weight2, c.slow2);
    T second = v;
    if (kAmsgrad) {
        second = vmax = larger(vmax, v);
    }
    return moved(weight, m, square_root(second), c, rate);
}

// The same with the square root of v, as 8-bit moments keep it.
template <class T>
ADEPT_FAST_INLINE T adamw_rooted(T weight, T grad, T& m, T& root, const Constants<T>& c, Rate<T> rate) {
    const T g = grad * c.grad_scale;
    m = average(m, g, c.weight1, c.slow1);
    root = square_root(average(root * root, g * g, c.weight2, c.slow2));
    return moved(weight, m, root, c, rate);
}

// adamw_moving, but returns the old weight if the unit is frozen.
template <bool kAmsgrad, class T>
ADEPT_FAST_INLINE T adamw(T weight, T grad, T& m, T& v, T& vmax, const Constants<T>& c, Rate<T> rate, bool frozen) {
    const T moved = adamw_moving<kAmsgrad>(weight, grad, m, v, vmax, c, rate);
    return frozen ? weight : moved;
}

template <bool kAmsgrad, class T>
ADEPT_FAST_INLINE T adamw(T weight, T grad, T& m, T& v, T& vmax, const Constants<T>& c, Rate<T> rate) {
    return adamw<kAmsgrad>(weight, grad, m, v, vmax, c, rate, rate.decay < static_cast<T>(0));
}

// The bits of a weight, with those of bf16's NaN for every NaN: no sum with less than 2^16 makes a number of it.
ADEPT_FAST_INLINE std::uint32_t weight_bits(float weight) { return weight != weight ? 0x7fc00000u : bits_of(weight); }

// An exact fp32 weight stored as bf16 and a signed 16-bit remainder: bits = 2^16 * param + remainder. A tie rounds away from zero, because
// the remainder of a tie to even may not fit. Infinities and NaN have remainder 0. If the sum is NaN, the parameter was set to 0 through
// `.data` and its remainder is negative: the result is the parameter.
ADEPT_FAST_INLINE float join_master(std::uint16_t param, std::int16_t remainder) {
    const float joined = float_of((std::uint32_t{param} << 16) + static_cast<std::uint32_t>(static_cast<std::int32_t>(remainder)));
    return joined != joined ? from_bf16(param) : joined;
}

ADEPT_FAST_INLINE void split_master(float weight, std::uint16_t& param, std::int16_t& remainder) {
    const std::uint32_t bits = weight_bits(weight);
    param = static_cast<std::uint16_t>((bits + 0x8000u) >> 16);
    remainder = static_cast<std::int16_t>(bits & 0xffffu);
}

// The same with the upper 8 bits of the remainder: the weight rounded to its upper 24 bits, up or down by the dither.
ADEPT_FAST_INLINE float join_master8(std::uint16_t param, std::int8_t remainder) {
    return join_master(param, static_cast<std::int16_t>(remainder * 256));
}

ADEPT_FAST_INLINE void split_master8(float weight, std::uint32_t dither, std::uint16_t& param, std::int8_t& remainder) {
    const std::uint32_t bits = weight_bits(weight) + ((dither + 0xdaa66d2bu) >> 24);
    param = static_cast<std::uint16_t>((bits + 0x8000u) >> 16);
    remainder = static_cast<std::int8_t>(bits >> 8 & 0xffu);
}

// Two rounds of multiply and shift with hash-prospector's best constants.
ADEPT_FAST_INLINE std::uint32_t mix(std::uint32_t x) {
    x = (x ^ (x >> 16)) * 0x21f0aaadu;
    x = (x ^ (x >> 15)) * 0x735a2d97u;
    return x ^ (x >> 15);
}

struct NoiseKey {
    std::uint32_t low, high;
};

ADEPT_FAST_INLINE NoiseKey noise_key(std::uint32_t seed, std::int64_t t) {
    const std::uint32_t key = mix(mix(seed + 0x9e3779b9u) ^ static_cast<std::uint32_t>(t));
    return {key, mix(key + 0x9e3779b9u)};
}

// Rounds fp32 to bf16, up or down with probabilities that make the expectation exact.
ADEPT_FAST_INLINE std::uint16_t stochastic_bf16(float weight, NoiseKey key, std::uint64_t index) {
    const std::uint32_t low = static_cast<std::uint32_t>(index), high = static_cast<std::uint32_t>(index >> 32);
    const std::uint32_t noise = mix(mix(low ^ key.low) + high + key.high) >> 16;
    return static_cast<std::uint16_t>((weight_bits(weight) + noise) >> 16);
}

}  // namespace adept_fast
