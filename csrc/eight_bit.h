// 8-bit moments, as host and device code: the bytes and scales of adept_fast/ops/adamw/eight_bit.py.
#pragma once

#include "adamw.h"
#include "descriptor.h"

namespace adept_fast {

constexpr std::int64_t kBlock = 64;  // elements of a block; the last one of a row may have fewer

ADEPT_FAST_INLINE std::int64_t blocks_in_row(const Tensor& t) { return (t.row + kBlock - 1) / kBlock; }

// The elements of a tensor, or with 8-bit moments those that its blocks have room for.
ADEPT_FAST_INLINE std::int64_t slots_of(const Tensor& t) { return t.row == 0 ? t.numel : t.numel / t.row * blocks_in_row(t) * kBlock; }

// A code of a size: the upper bits of float_of(kBaseBits + z) - 1/128.
constexpr std::uint32_t kBaseBits = 0x3c000000u;  // 1/128
struct OfAverage {
    static constexpr int kShift = 19;
    static constexpr std::uint32_t kLast = 126, kLeast = 0;  // codes of the largest and of the smallest positive size
    static constexpr float kLargest = 1.8671875f;
    static constexpr std::uint32_t kOffset = 0;  // of the dither
};
struct OfRoot {
    static constexpr int kShift = 18;
    static constexpr std::uint32_t kLast = 254, kLeast = 2;
    static constexpr float kLargest = 1.9296875f;
    static constexpr std::uint32_t kOffset = 0x54858409u;
};

// How sizes of a block become codes: its scale and the factor before them.
struct BlockScale {
    float scale, factor;
};

constexpr float kLeastScaled = 0x1p-100f;  // a block with smaller sizes has the scale 0

// largest: of the block's finite sizes.
template <class Code>
ADEPT_FAST_INLINE BlockScale block_scale(float largest) {
    const bool used = largest >= kLeastScaled;
    return {used ? largest / Code::kLargest : 0.0f, used ? Code::kLargest / largest : 0.0f};
}

// The bits of a finite size, by which sizes are compared; else 0.
ADEPT_FAST_INLINE std::uint32_t size_bits(float value) {
    const std::uint32_t size = bits_of(value) & 0x7fffffffu;
    return size < 0x7f800000u ? size : 0u;
}

template <class Code>
ADEPT_FAST_INLINE float size_of(std::uint32_t coded, float scale) {
    return (float_of(kBaseBits + (coded << Code::kShift)) - 0x1p-7f) * scale;
}

// size: not negative, or NaN.
template <class Code>
ADEPT_FAST_INLINE std::uint32_t coded_size(float size, float factor, std::uint32_t dither) {
    const float share = size * factor;
    const std::uint32_t between = (dither + Code::kOffset) >> (32 - Code::kShift);
    std::uint32_t coded = (bits_of(share + 0x1p-7f) - kBaseBits + between) >> Code::kShift;
    coded = coded < Code::kLast ? coded : Code::kLast;
    if (Code::kLeast > 0) coded = share > 0.0f && coded < Code::kLeast ? Code::kLeast : coded;
    return is_finite(size) ? coded : Code::kLast + 1;
}

ADEPT_FAST_INLINE float decoded_average(std::uint8_t byte, float scale) {
    const std::uint32_t coded = byte & 127u;
    const std::uint32_t bits = bits_of(size_of<OfAverage>(coded, scale)) | (std::uint32_t{byte} & 128u) << 24;
    return float_of(coded > OfAverage::kLast ? 0x7fc00000u : bits);
}

ADEPT_FAST_INLINE float decoded_root(std::uint8_t byte, float scale) {
    const float root = size_of<OfRoot>(byte, scale);
    return float_of(byte > OfRoot::kLast ? 0x7fc00000u : bits_of(root));
}

ADEPT_FAST_INLINE std::uint8_t coded_average(float m, float factor, std::uint32_t dither) {
    const std::uint32_t bits = bits_of(m), sign = is_finite(m) ? bits >> 24 & 128u : 0u;
    return static_cast<std::uint8_t>(coded_size<OfAverage>(float_of(bits & 0x7fffffffu), factor, dither) | sign);
}

ADEPT_FAST_INLINE std::uint8_t coded_root(float root, float factor, std::uint32_t dither) {
    return static_cast<std::uint8_t>(coded_size<OfRoot>(root, factor, dither));
}

// 32 bits for each element, whose fraction walks through all of [0, 1) evenly from step to step.
ADEPT_FAST_INLINE std::uint32_t dither_key(std::uint32_t seed, std::int64_t t) {
    return mix(seed + 0x9e3779b9u) + static_cast<std::uint32_t>(t) * 0x9e3779b9u;
}

ADEPT_FAST_INLINE std::uint32_t dither_of(std::uint32_t key, std::uint64_t index) {
    return key + static_cast<std::uint32_t>(index) * 0x6a09e667u;
}

}  // namespace adept_fast
