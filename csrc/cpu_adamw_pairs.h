// Included by cpu_adamw_body.h: the loop for all-bf16 tensors, which are limited by instructions, not by memory.
#pragma once

#include "cpu_adamw_tiles.h"

namespace adept_fast {
namespace {

// Two adjacent 16-bit elements in one 32-bit word. Vectors unpack and pack it with a shift and a mask each, where a loop over single
// elements shuffles across lanes.
struct Pair {
    std::uint32_t bits;
    std::uint16_t low() const { return static_cast<std::uint16_t>(bits & 0xffffu); }
    std::uint16_t high() const { return static_cast<std::uint16_t>(bits >> 16); }
};

Pair load_pair(std::int64_t address, std::int64_t element) {
    Pair pair;
    std::memcpy(&pair.bits, at<const std::uint16_t>(address, element), sizeof pair.bits);
    return pair;
}

void store_pair(std::int64_t address, std::int64_t element, std::uint16_t low, std::uint16_t high) {
    const std::uint32_t bits = std::uint32_t{low} | std::uint32_t{high} << 16;
    std::memcpy(at<std::uint16_t>(address, element), &bits, sizeof bits);
}

// to_bf16 and split_master for values computed from bf16 alone. Their NaN, from bf16 or from the CPU, have no low bits, so that rounding
// cannot carry out of the payload.
std::uint16_t short_to_bf16(float value) {
    const std::uint32_t bits = bits_of(value);
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

void split_short(float weight, std::uint16_t& param, std::uint16_t& remainder) {
    const std::uint32_t bits = bits_of(weight), low = bits & 0xffffu;
    param = static_cast<std::uint16_t>((bits + 0x8000u) >> 16);
    remainder = static_cast<std::uint16_t>(low);
}

// Whether pairs() supports the update: all bf16, a master of 16 bits or none, both betas >= 1/2, no amsgrad.
bool in_pairs(const Tensor& t, const Constants<float>& c) {
    const std::int64_t all_bf16 = kBf16 | kBf16 << 2 | kBf16 << 4;
    return t.formats == all_bf16 && t.mode != kCopy && t.mode != kRemainder8 && t.max_exp_avg_sq == 0 && c.slow1 && c.slow2;
}

// The rates of pairs: one for all, or arrays of the first elements' and of the second elements' rates.
struct SameRates {
    Rate<float> rate;
    SameRates from(std::int64_t) const { return *this; }
};

struct PairedRates {
    const float *decay0, *step0, *decay1, *step1;
    PairedRates from(std::int64_t i) const { return {decay0 + i, step0 + i, decay1 + i, step1 + i}; }
};

// Returns the rates of pairs that begin with `unit`, in a tensor with one unit per element of a row.
PairedRates paired_rates(const Work& work, std::int64_t unit) {
    const std::int64_t length = work.tensor.length, even = (length + 1) / 2;
    const float *decay = static_cast<const float*>(work.decay) + length, *step = static_cast<const float*>(work.step) + length;
    const PairedRates all{decay, step, decay + even, step + even};
    return unit % 2 == 0 ? all.from(unit / 2) : PairedRates{all.decay1, all.step1, all.decay0 + 1, all.step0 + 1}.from(unit / 2);
}

// Updates 2 * count elements. Without kEach all have `rate`, which is not frozen.
template <std::int64_t kMode, bool kEach>
void pairs(const Work& work, std::int64_t first, std::int64_t count, Constants<float> c, Rate<float> rate, const float* __restrict decay0,
           const float* __restrict step0, const float* __restrict decay1, const float* __restrict step1) {
    const Tensor t = work.tensor;
    const NoiseKey key = noise_key(static_cast<std::uint32_t>(t.seed), work.t);
    const std::uint64_t index = static_cast<std::uint64_t>(t.first_index + first);
    c.slow1 = c.slow2 = true;
    float none = 0;
#pragma GCC ivdep
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t at = first + 2 * i;
        const Pair param = load_pair(t.param, at), grad = load_pair(t.grad, at), m = load_pair(t.exp_avg, at), v = load_pair(t.exp_avg_sq, at);
        Pair kept{0};
        if (kMode == kRemainder || kMode == kKahan) kept = load_pair(t.master, at);
        float w0 = from_bf16(param.low()), w1 = from_bf16(param.high());
        if (kMode == kRemainder) {
            w0 = join_master(param.low(), static_cast<std::int16_t>(kept.low()));
            w1 = join_master(param.high(), static_cast<std::int16_t>(kept.high()));
        } else if (kMode == kKahan) {
            w0 += from_bf16(kept.low());
            w1 += from_bf16(kept.high());
        }
        float m0 = from_bf16(m.low()), m1 = from_bf16(m.high()), v0 = from_bf16(v.low()), v1 = from_bf16(v.high());
        const Rate<float> rate0 = kEach ? Rate<float>{decay0[i], step0[i]} : rate, rate1 = kEach ? Rate<float>{decay1[i], step1[i]} : rate;
        const bool frozen0 = kEach && rate0.decay < 0.0f, frozen1 = kEach && rate1.decay < 0.0f;
        w0 = adamw<false>(w0, from_bf16(grad.low()), m0, v0, none, c, rate0, frozen0);
        w1 = adamw<false>(w1, from_bf16(grad.high()), m1, v1, none, c, rate1, frozen1);
        store_pair(t.exp_avg, at, short_to_bf16(m0), short_to_bf16(m1));
        store_pair(t.exp_avg_sq, at, short_to_bf16(v0), short_to_bf16(v1));
        std::uint16_t p0 = short_to_bf16(w0), p1 = short_to_bf16(w1);
        if (kMode == kRemainder) {
            std::uint16_t r0, r1;
            split_short(w0, p0, r0);
            split_short(w1, p1, r1);
            // A frozen weight keeps both halves as they are: split again, NaN, infinities and -0 would lose the remainder.
            p0 = frozen0 ? param.low() : p0;
            p1 = frozen1 ? param.high() : p1;
            store_pair(t.master, at, frozen0 ? kept.low() : r0, frozen1 ? kept.high() : r1);
        } else if (kMode == kKahan) {
            const float lost0 = is_finite(w0) ? w0 - from_bf16(p0) : 0.0f, lost1 = is_finite(w1) ? w1 - from_bf16(p1) : 0.0f;
            p0 = frozen0 ? param.low() : p0;
            p1 = frozen1 ? param.high() : p1;
            store_pair(t.master, at, frozen0 ? kept.low() : short_to_bf16(lost0), frozen1 ? kept.high() : short_to_bf16(lost1));
        } else if (kMode == kStochastic) {
            p0 = stochastic_bf16(w0, key, index + 2 * static_cast<std::uint64_t>(i));
            p1 = stochastic_bf16(w1, key, index + 2 * static_cast<std::uint64_t>(i) + 1);
            p0 = frozen0 ? param.low() : p0;
            p1 = frozen1 ? param.high() : p1;
        }
        store_pair(t.param, at, p0, p1);
    }
}

// Prefetches for a loop, because the hardware prefetcher stops at every page.
void fetch(const Tensor& t, std::int64_t first, std::int64_t n) {
    const std::int64_t addresses[] = {t.param, t.grad, t.exp_avg, t.exp_avg_sq, t.mode == kRemainder || t.mode == kKahan ? t.master : 0};
    for (const std::int64_t address : addresses) {
        for (std::int64_t i = 0; address != 0 && i < n; i += 32) __builtin_prefetch(at<const std::uint16_t>(address, first + i));
    }
}

template <std::int64_t kMode>
void pairs(const Work& work, std::int64_t first, std::int64_t count, const Constants<float>& c, SameRates same) {
    pairs<kMode, false>(work, first, count, c, same.rate, nullptr, nullptr, nullptr, nullptr);
}

template <std::int64_t kMode>
void pairs(const Work& work, std::int64_t first, std::int64_t count, const Constants<float>& c, PairedRates each) {
    pairs<kMode, true>(work, first, count, c, {}, each.decay0, each.step0, each.decay1, each.step1);
}

template <class Rates>
void pairs_of_mode(const Work& work, std::int64_t first, std::int64_t count, const Constants<float>& c, Rates rates) {
    constexpr std::int64_t kAhead = 512;
    if (count > kAhead) {
        for (std::int64_t i = 0; i < count; i += kAhead) {
            const std::int64_t n = kAhead < count - i ? kAhead : count - i;
            fetch(work.tensor, first + 2 * (i + n), 2 * (count - i - n < kAhead ? count - i - n : kAhead));
            pairs_of_mode(work, first + 2 * i, n, c, rates.from(i));
        }
        return;
    }
    switch (work.tensor.mode) {
        case kRemainder: return pairs<kRemainder>(work, first, count, c, rates);
        case kKahan: return pairs<kKahan>(work, first, count, c, rates);
        case kStochastic: return pairs<kStochastic>(work, first, count, c, rates);
        default: return pairs<kDirect>(work, first, count, c, rates);
    }
}

}  // namespace
}  // namespace adept_fast
