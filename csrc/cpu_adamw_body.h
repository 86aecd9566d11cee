// Included by one source file per instruction set, which defines ADEPT_FAST_SET as its name.
#pragma once

#include <type_traits>

#include "cpu_adamw_blocks.h"
#include "cpu_adamw_pairs.h"

namespace adept_fast {
namespace {

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
