// Included by one source file per instruction set, which defines ADEPT_FAST_SET as its name.
//
// Tensors of other formats are converted in tiles that stay in the L1 cache, so that one loop, which the compiler vectorises, covers every
// mix of formats. Tiles are small, so that conversions of the next tile overlap with square roots and divisions of this one.
#pragma once

#include <type_traits>

#include "cpu_adamw.h"
#include "cpu_adamw_pairs.h"
#include "eight_bit.h"

namespace adept_fast {
namespace {

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

// The loop of 8-bit moments.
template <bool kSlow, class N, class Rates>
void rooted_loop(N n, float* __restrict w, const float* __restrict g, float* __restrict m, float* __restrict root, Constants<float> c, Rates rates) {
    if (kSlow) c.slow1 = c.slow2 = true;
    for (std::int64_t i = 0; i < n; ++i) {
        const Rate<float> rate = rates[i];
        const float moved = adamw_rooted(w[i], g[i], m[i], root[i], c, rate);
        w[i] = rate.decay < 0.0f ? w[i] : moved;
    }
}

template <class N, class Rates>
void rooted(N n, float* w, const float* g, float* m, float* root, const Constants<float>& c, Rates rates) {
    c.slow1 && c.slow2 ? rooted_loop<true>(n, w, g, m, root, c, rates) : rooted_loop<false>(n, w, g, m, root, c, rates);
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

template <class T, class N, class Rates>
void tile(const Work& work, std::int64_t first, N n, const Constants<T>& c, Rates rates) {
    alignas(64) T weights[kTile], grads[kTile], averages[kTile], squares[kTile], maxima[kTile];
    const Tensor& t = work.tensor;
    const std::int64_t moments = (t.formats >> 4) & 3;
    Streams<T> s;
    s.weight = open_weights(t, first, n, weights);
    s.grad = open(t.grad, (t.formats >> 2) & 3, first, n, grads);
    s.exp_avg = open(t.exp_avg, moments, first, n, averages);
    s.exp_avg_sq = open(t.exp_avg_sq, moments, first, n, squares);
    s.max_exp_avg_sq = t.max_exp_avg_sq == 0 ? nullptr : open(t.max_exp_avg_sq, moments, first, n, maxima);
    elements(n, s, c, rates);
    if (s.weight == weights && rates.store()) close_weights(work, first, n, static_cast<const T*>(weights), rates);
    if (!is_own<T>(moments)) {
        store(t.exp_avg, moments, first, n, static_cast<const T*>(averages), Always{});
        store(t.exp_avg_sq, moments, first, n, static_cast<const T*>(squares), Always{});
        if (t.max_exp_avg_sq != 0) store(t.max_exp_avg_sq, moments, first, n, static_cast<const T*>(maxima), Always{});
    }
}

template <class N>
void decode(N n, const std::uint8_t* __restrict m_bytes, const std::uint8_t* __restrict root_bytes, float m_scale, float root_scale,
            float* __restrict m, float* __restrict root) {
    for (std::int64_t i = 0; i < n; ++i) {
        m[i] = decoded_average(m_bytes[i], m_scale);
        root[i] = decoded_root(root_bytes[i], root_scale);
    }
}

// The largest finite sizes of a block.
template <class N>
float largest(N n, const float* __restrict values) {
    alignas(64) std::int32_t sizes[kTile];  // a loop of its own, as compilers see no maximum behind a condition
    for (std::int64_t i = 0; i < n; ++i) sizes[i] = static_cast<std::int32_t>(size_bits(values[i]));
    std::int32_t most = 0;
    for (std::int64_t i = 0; i < n; ++i) most = sizes[i] > most ? sizes[i] : most;
    return float_of(static_cast<std::uint32_t>(most));
}

template <class N>
void encode(N n, const float* __restrict m, const float* __restrict root, float m_factor, float root_factor, std::uint32_t dither,
            std::uint8_t* __restrict m_bytes, std::uint8_t* __restrict root_bytes) {
    for (std::int64_t i = 0; i < n; ++i) {
        const std::uint32_t walked = dither_of(dither, static_cast<std::uint64_t>(i));
        m_bytes[i] = coded_average(m[i], m_factor, walked);
        root_bytes[i] = coded_root(root[i], root_factor, walked);
    }
}

// Blocks of n elements each of 8-bit moments, kCount of them, with rates[k]. Each phase takes all, so that the next block's arithmetic does not
// wait for this one's maximum.
template <int kCount, class N, class Rates>
void blocks(const Work& work, std::int64_t number, std::int64_t first, N n, const Constants<float>& c, const Rates (&rates)[kCount]) {
    static_assert(kBlock == kTile);
    alignas(64) float weights[kCount][kTile], grads[kCount][kTile], m[kCount][kTile], root[kCount][kTile];
    const Tensor& t = work.tensor;
    float *m_scale = at<float>(t.exp_avg_scale, number), *root_scale = at<float>(t.exp_avg_sq_scale, number);
    std::uint8_t *m_bytes = at<std::uint8_t>(t.exp_avg, first), *root_bytes = at<std::uint8_t>(t.exp_avg_sq, first);
    BlockScale scale[kCount], scale_of_root[kCount];
    for (int k = 0; k < kCount; ++k) {
        const std::int64_t begin = first + k * kBlock;
        float* weight = open_weights(t, begin, n, weights[k]);
        const float* grad = open(t.grad, (t.formats >> 2) & 3, begin, n, grads[k]);
        decode(n, m_bytes + k * kBlock, root_bytes + k * kBlock, m_scale[k], root_scale[k], m[k], root[k]);
        rooted(n, weight, grad, m[k], root[k], c, rates[k]);
        if (weight == weights[k] && rates[k].store()) close_weights(work, begin, n, static_cast<const float*>(weight), rates[k]);
    }
    for (int k = 0; k < kCount; ++k) {
        scale[k] = block_scale<OfAverage>(largest(n, m[k]));
        scale_of_root[k] = block_scale<OfRoot>(largest(n, root[k]));
        m_scale[k] = scale[k].scale;
        root_scale[k] = scale_of_root[k].scale;
    }
    const std::uint32_t dither = dither_of(dither_key(static_cast<std::uint32_t>(t.seed), work.t), static_cast<std::uint64_t>(t.first_index + first));
    for (int k = 0; k < kCount; ++k) {
        encode(n, m[k], root[k], scale[k].factor, scale_of_root[k].factor, dither_of(dither, static_cast<std::uint64_t>(k * kBlock)),
               m_bytes + k * kBlock, root_bytes + k * kBlock);
    }
}

// Blocks first ... first + count - 1, numbered over all rows.
void update_blocks(const Work& work, std::int64_t first, std::int64_t count) {
    constexpr int kTogether = 4;
    const Tensor& t = work.tensor;
    const Constants<float> c = constants<float>(work.scalars);
    const RateEach<float> units{static_cast<const float*>(work.decay), static_cast<const float*>(work.step)};
    const std::int64_t in_row = blocks_in_row(t);
    std::int64_t column = first % in_row * kBlock, begin = first / in_row * t.row + column, unit = (begin / t.inner) % t.length, rest = begin % t.inner;
    OneRate<float> one{unit_rate<float>(work.scalars, work.multiplier)};
    for (std::int64_t number = first; number < first + count;) {
        const std::int64_t left = t.row - column, run = work.decay == nullptr ? left : t.inner - rest < left ? t.inner - rest : left;
        if (work.decay != nullptr) one.rate = units[unit];
        std::int64_t taken = 1, n = kBlock < left ? kBlock : left;
        if (run >= kTogether * kBlock && number + kTogether <= first + count) {
            blocks(work, number, begin, Whole{}, c, {one, one, one, one});
            taken = kTogether;
            n = kTogether * kBlock;
        } else if (run >= n) {
            n == kBlock ? blocks(work, number, begin, Whole{}, c, {one}) : blocks(work, number, begin, n, c, {one});
        } else {
            alignas(64) float decay[kTile], step[kTile];
            const bool adjacent = t.inner == 1 && unit + n <= t.length;
            for (std::int64_t i = 0, at = unit, passed = rest; !adjacent && i < n; ++i) {
                decay[i] = units.decay[at];
                step[i] = units.step[at];
                if (++passed == t.inner) {
                    passed = 0;
                    at = at + 1 == t.length ? 0 : at + 1;
                }
            }
            const RateEach<float> each = adjacent ? units.from(unit) : RateEach<float>{decay, step};
            n == kBlock ? blocks(work, number, begin, Whole{}, c, {each}) : blocks(work, number, begin, n, c, {each});
        }
        number += taken;
        begin += n;
        column = column + n == t.row ? 0 : column + n;
        rest += n;
        unit = (unit + rest / t.inner) % t.length;
        rest %= t.inner;
    }
}

template <class T, class Rates>
void range(const Work& work, std::int64_t first, std::int64_t n, const Constants<T>& c, Rates rates) {
    const Tensor& t = work.tensor;
    if (t.mode == kDirect && is_own<T>(t.formats & 3) && is_own<T>((t.formats >> 2) & 3) && is_own<T>((t.formats >> 4) & 3)) {
        T* vmax = t.max_exp_avg_sq == 0 ? nullptr : at<T>(t.max_exp_avg_sq, first);
        const Streams<T> s{at<T>(t.param, first), at<T>(t.exp_avg, first), at<T>(t.exp_avg_sq, first), vmax, at<const T>(t.grad, first)};
        elements(n, s, c, rates);
        return;
    }
    std::int64_t i = 0;
    if constexpr (std::is_same_v<Rates, OneRate<float>>) {
        if (rates.store() && in_pairs(t, c)) {
            pairs_of_mode(work, first, n / 2, c, SameRates{rates.rate});
            i = n / 2 * 2;
        }
    }
    for (; i + kTile <= n; i += kTile) tile(work, first + i, Whole{}, c, rates.from(i));
    if (i < n) tile(work, first + i, n - i, c, rates.from(i));
}

// Updates elements that have a unit each, beginning with `unit`.
template <class T>
void columns(const Work& work, std::int64_t first, std::int64_t n, const Constants<T>& c, RateEach<T> units, std::int64_t unit) {
    std::int64_t i = 0;
    if constexpr (std::is_same_v<T, float>) {
        if (in_pairs(work.tensor, c)) {
            pairs_of_mode(work, first, n / 2, c, paired_rates(work, unit));
            i = n / 2 * 2;
        }
    }
    range(work, first + i, n - i, c, units.from(unit + i));
}

template <class T>
void update(const Work& work, std::int64_t first, std::int64_t count) {
    const Tensor& t = work.tensor;
    const Constants<T> c = constants<T>(work.scalars);
    if (work.decay == nullptr) {
        range(work, first, count, c, OneRate<T>{unit_rate<T>(work.scalars, work.multiplier)});
        return;
    }
    const RateEach<T> units{static_cast<const T*>(work.decay), static_cast<const T*>(work.step)};
    const std::int64_t run = t.inner == 1 ? t.length : t.inner;  // consecutive elements with adjacent rates, or with one rate
    std::int64_t unit = (first / t.inner) % t.length, rest = first % t.inner;
    if (run >= kTile) {
        for (const std::int64_t end = first + count; first < end;) {
            const std::int64_t left = t.inner == 1 ? t.length - unit : t.inner - rest;
            std::int64_t n = left < end - first ? left : end - first;
            if (t.inner == 1) {
                columns(work, first, n, c, units, unit);
                unit = 0;
            } else {
                const Rate<T> rate = units[unit];
                unit = unit + 1 == t.length ? 0 : unit + 1;
                while (n < end - first && units.decay[unit] == rate.decay && units.step[unit] == rate.step) {  // adjacent units with equal rates
                    n = n + t.inner < end - first ? n + t.inner : end - first;
                    unit = unit + 1 == t.length ? 0 : unit + 1;
                }
                range(work, first, n, c, OneRate<T>{rate});
            }
            first += n;
            rest = 0;
        }
        return;
    }
    for (const std::int64_t end = first + count; first < end;) {
        alignas(64) T decay[kTile], step[kTile];
        const std::int64_t n = kTile < end - first ? kTile : end - first;
        for (std::int64_t i = 0; i < n; ++i) {
            decay[i] = units.decay[unit];
            step[i] = units.step[unit];
            if (++rest == t.inner) {
                rest = 0;
                unit = unit + 1 == t.length ? 0 : unit + 1;
            }
        }
        range(work, first, n, c, RateEach<T>{decay, step});
        first += n;
    }
}

void update_any(const Work& work, std::int64_t first, std::int64_t count) {
    if (work.tensor.formats >> 4 == k8Bit) return update_blocks(work, first / kBlock, (count + kBlock - 1) / kBlock);
    (work.tensor.formats & 3) == kFp64 ? update<double>(work, first, count) : update<float>(work, first, count);
}

// Lane k sums elements k, k + kTile, ...: an order that every instruction set can follow.
template <class N>
void add_squares(const Gradient& g, std::int64_t first, N n, double* __restrict lanes) {
    if (g.format == kFp64) {
        const double* in = at<const double>(g.address, first);
        for (std::int64_t i = 0; i < n; ++i) lanes[i] += in[i] * in[i];
        return;
    }
    alignas(64) float tile[kTile];
    const float* in = open(g.address, g.format, first, n, tile);
    for (std::int64_t i = 0; i < n; ++i) lanes[i] += static_cast<double>(in[i]) * static_cast<double>(in[i]);
}

double sum_of_squares_any(const Gradient& g, std::int64_t first, std::int64_t count) {
    alignas(64) double lanes[kTile] = {};
    std::int64_t i = 0;
    for (; i + kTile <= count; i += kTile) add_squares(g, first + i, Whole{}, lanes);
    add_squares(g, first + i, count - i, lanes);
    for (std::int64_t half = kTile / 2; half > 0; half /= 2) {
        for (std::int64_t k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    }
    return lanes[0];
}

}  // namespace

const InstructionSet ADEPT_FAST_SET = {ADEPT_FAST_SET_NAME, &update_any, &sum_of_squares_any};

}  // namespace adept_fast
