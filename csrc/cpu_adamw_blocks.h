// Included by cpu_adamw_body.h: blocks of 8-bit moments. A block is a tile.
#pragma once

#include "cpu_adamw_tiles.h"

namespace adept_fast {
namespace {

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

}  // namespace
}  // namespace adept_fast
