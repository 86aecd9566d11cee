// Conversions between fp32 and bf16 or fp16: round to nearest even, with denormals. CPUs use integer arithmetic, whose loops vectorise on
// every CPU (the instruction vcvtneps2bf16 flushes denormals), GPUs their instruction. All give the same bits, except for the payloads of NaN.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ADEPT_FAST_INLINE static __host__ __device__ __forceinline__
#else
// static, because each instruction set compiles its own copy, which the linker must not merge.
#define ADEPT_FAST_INLINE static inline __attribute__((always_inline, unused))
#endif

namespace adept_fast {

ADEPT_FAST_INLINE std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

ADEPT_FAST_INLINE float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

ADEPT_FAST_INLINE bool is_finite(float value) {
#if defined(__CUDA_ARCH__)
    return fabsf(value) < float_of(0x7f800000u);  // one instruction
#else
    return (bits_of(value) & 0x7f800000u) != 0x7f800000u;
#endif
}

ADEPT_FAST_INLINE bool is_finite(double value) { return value - value == 0.0; }

ADEPT_FAST_INLINE float from_bf16(std::uint16_t half) { return float_of(std::uint32_t{half} << 16); }

ADEPT_FAST_INLINE std::uint16_t to_bf16(float value) {
#if defined(__CUDA_ARCH__)
    std::uint16_t half;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
#else
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    // A carry out of the payload could turn NaN into a number.
    return static_cast<std::uint16_t>(value != value ? 0x7fc0u : rounded);
#endif
}

// Rounds two values to bf16. low: into the lower half.
ADEPT_FAST_INLINE std::uint32_t to_bf16_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
    std::uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return to_bf16(low) | std::uint32_t{to_bf16(high)} << 16;
#endif
}

ADEPT_FAST_INLINE float from_fp16(std::uint16_t half) {
    // 2^112 is the distance of the two exponent biases; the product also normalises denormals.
    const float magnitude = float_of((half & 0x7fffu) << 13) * 0x1p112f;
    const std::uint32_t special = magnitude >= 65536.0f ? 0x7f800000u : 0u;
    return float_of(bits_of(magnitude) | special | ((half & 0x8000u) << 16));
}

ADEPT_FAST_INLINE std::uint16_t to_fp16(float value) {
    const std::uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
    const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 aligns the last bit of the denormal with the last bit of the sum, where the addition rounds.
    const std::uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const std::uint32_t result = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? denormal : normal;
    return static_cast<std::uint16_t>(result | ((bits >> 16) & 0x8000u));
}

}  // namespace adept_fast
