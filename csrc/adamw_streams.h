// The elements of one thread of the AdamW launch in registers: which they are, loads and stores, and conversions between formats, as host and
// device code. `Access` reads and writes memory by address (static load1, load2, load4, load_kept4, load8, load_pair, load16 and store1, store2,
// store4, store_pair, store16), and exchanges values between the lanes of a warp (exchanged, from_lane).
#pragma once

#include "adamw_grid.h"
#include "descriptor.h"

namespace adept_fast {

struct alignas(16) Words {
    std::uint32_t word[4];
};

struct alignas(8) Pair {
    std::uint32_t word[2];
};

// The elements of one thread of one stream, two groups of kGroup: as loaded (2-byte formats in the first four words, bytes in the first two, the
// lowest first), or one fp32 per word.
struct Eight {
    std::uint32_t word[kWidth];
};

// What decides how elements are updated. In kernels of one set-up it is a constant, and all that depends on it is decided by the compiler.
struct Setup {
    std::int64_t param, grad, moments;  // Format
    std::int64_t mode;                  // Master
    bool amsgrad, units;                // units: the tensor has multipliers
    bool whole;                         // all elements of the chunk exist, and every stream is aligned to 16 bytes
};

// Decides while it runs.
ADEPT_FAST_INLINE Setup any_setup(const Tensor& row) {
    return {row.formats & 3, row.formats >> 2 & 3, row.formats >> 4, row.mode, row.max_exp_avg_sq != 0, row.multipliers != 0, false};
}

// Bytes of an element.
ADEPT_FAST_INLINE constexpr std::uint32_t size_of_format(std::int64_t format) { return format == kFp32 ? 4 : format == k8Bit ? 1 : 2; }

// 0: the mode has no master.
ADEPT_FAST_INLINE constexpr std::uint32_t size_of_master(std::int64_t mode) {
    return mode == kCopy ? 4 : mode == kRemainder8 ? 1 : mode == kRemainder || mode == kKahan ? 2 : 0;
}

// Distance of the two groups of a thread. Adjacent groups of 2-byte elements make one access of 16 bytes. Those of fp32 are kGroup * 32 apart,
// so that each access of a warp covers adjacent memory; but adjacent with 8-bit moments, so that 8 lanes have a block.
ADEPT_FAST_INLINE constexpr std::uint32_t gap_of(const Setup& s) {
    return s.whole && s.moments != k8Bit && (s.param == kFp32 || s.grad == kFp32 || s.moments == kFp32 || s.mode == kCopy) ? 32 * kGroup : kGroup;
}

// The first element of a thread in a turn.
ADEPT_FAST_INLINE std::uint32_t offset_of(std::uint32_t gap, std::uint32_t thread) {
    return gap == kGroup ? thread * kWidth : thread / 32 * 32 * kWidth + thread % 32 * kGroup;
}

// The place of element k of a thread after its first one.
ADEPT_FAST_INLINE std::uint32_t after_first(std::uint32_t gap, int k) { return k < kGroup ? k : k - kGroup + gap; }

// Loads the elements whose bit in `present` is 1. The others, and all of an absent stream (size 0), give 0.
template <class Access>
ADEPT_FAST_INLINE Eight load(const Setup& s, std::int64_t stream, std::int64_t first, std::uint32_t size, std::uint32_t present) {
    Eight raw{};
    if (size == 0) {
        return raw;
    }
    const std::uint32_t gap = gap_of(s);
    const std::int64_t address = stream + first * size;
    if (s.whole || (present == 0xffu && address % (size == 1 ? 8 : 16) == 0)) {
        if (size == 1 && gap == kGroup) {
            const Pair bytes = Access::load_pair(address);
            raw.word[0] = bytes.word[0];
            raw.word[1] = bytes.word[1];
        } else if (size == 1) {
            raw.word[0] = Access::load4(address);
            raw.word[1] = Access::load4(address + gap);
        } else if (size == 4 || gap == kGroup) {
            const Words low = Access::load16(address);
            const Words high = size == 4 ? Access::load16(address + 4 * gap) : Words{};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                raw.word[k] = low.word[k];
                raw.word[k + 4] = high.word[k];
            }
        } else {
            const Pair low = Access::load_pair(address), high = Access::load_pair(address + 2 * gap);
            raw.word[0] = low.word[0];
            raw.word[1] = low.word[1];
            raw.word[2] = high.word[0];
            raw.word[3] = high.word[1];
        }
        return raw;
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
        if (present >> k & 1u) {
            if (size == 4) {
                raw.word[k] = Access::load4(address + 4 * k);
            } else if (size == 2) {
                raw.word[k / 2] |= std::uint32_t{Access::load2(address + 2 * k)} << (k % 2 * 16);
            } else {
                raw.word[k / 4] |= std::uint32_t{Access::load1(address + k)} << (k % 4 * 8);
            }
        }
    }
    return raw;
}

// Writes the elements whose bit in `stored` is 1.
template <class Access>
ADEPT_FAST_INLINE void store(const Setup& s, std::int64_t stream, std::int64_t first, std::uint32_t size, std::uint32_t stored,
                             const Eight& raw) {
    const std::uint32_t gap = gap_of(s);
    const std::int64_t address = stream + first * size;
    if (stored == 0xffu && (s.whole || address % (size == 1 ? 8 : 16) == 0)) {
        if (size == 1 && gap == kGroup) {
            Access::store_pair(address, Pair{{raw.word[0], raw.word[1]}});
        } else if (size == 1) {
            Access::store4(address, raw.word[0]);
            Access::store4(address + gap, raw.word[1]);
        } else if (size == 4 || gap == kGroup) {
            Access::store16(address, Words{{raw.word[0], raw.word[1], raw.word[2], raw.word[3]}});
            if (size == 4) {
                Access::store16(address + 4 * gap, Words{{raw.word[4], raw.word[5], raw.word[6], raw.word[7]}});
            }
        } else {
            Access::store_pair(address, Pair{{raw.word[0], raw.word[1]}});
            Access::store_pair(address + 2 * gap, Pair{{raw.word[2], raw.word[3]}});
        }
        return;
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
        if (stored >> k & 1u) {
            if (size == 4) {
                Access::store4(address + 4 * after_first(gap, k), raw.word[k]);
            } else if (size == 2) {
                Access::store2(address + 2 * after_first(gap, k), static_cast<std::uint16_t>(raw.word[k / 2] >> (k % 2 * 16)));
            } else {
                Access::store1(address + after_first(gap, k), static_cast<std::uint8_t>(raw.word[k / 4] >> (k % 4 * 8)));
            }
        }
    }
}

ADEPT_FAST_INLINE std::uint16_t half_of(const Eight& raw, int k) { return static_cast<std::uint16_t>(raw.word[k / 2] >> (k % 2 * 16)); }

ADEPT_FAST_INLINE std::uint32_t byte_of(const Eight& raw, int k) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(raw.word[k / 4], 0, 0x4440 + k % 4);
#else
    return raw.word[k / 4] >> (k % 4 * 8) & 255u;
#endif
}

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

// Packs four bytes per word, in place.
ADEPT_FAST_INLINE void set_byte(Eight& raw, int k, std::uint8_t byte) {
    raw.word[k / 4] = k % 4 == 0 ? byte : raw.word[k / 4] | std::uint32_t{byte} << (k % 4 * 8);
}

ADEPT_FAST_INLINE std::uint16_t to_half(float value, std::int64_t format) { return format == kBf16 ? to_bf16(value) : to_fp16(value); }

ADEPT_FAST_INLINE float from_half(std::uint16_t half, std::int64_t format) { return format == kBf16 ? from_bf16(half) : from_fp16(half); }

// Converts fp32 to a format in place.
ADEPT_FAST_INLINE void narrow(Eight& raw, std::int64_t format) {
    if (format == kBf16) {
#pragma unroll
        for (int k = 0; k < kWidth; k += 2) {
            raw.word[k / 2] = to_bf16_pair(float_of(raw.word[k]), float_of(raw.word[k + 1]));
        }
    } else if (format == kFp16) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            set_half(raw, k, to_fp16(float_of(raw.word[k])));
        }
    }
}

}  // namespace adept_fast
