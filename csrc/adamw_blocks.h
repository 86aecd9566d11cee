// 8-bit moments in the AdamW launch, as host and device code. A block has kBlock slots, of which a row's last block may fill a part. 8 adjacent
// lanes of a warp have a block, kWidth adjacent slots each. Access: see adamw_streams.h.
#pragma once

#include "adamw_streams.h"
#include "eight_bit.h"

namespace adept_fast {

constexpr int kLanes = kBlock / kWidth;

// The elements in a thread's slots: the first one, a bit for each slot that has one, and their block (-1: none).
struct Spot {
    std::int64_t first;
    std::uint32_t present;
    std::int64_t block;
};

// slot: of the tensor. Without 8-bit moments, slots are elements.
ADEPT_FAST_INLINE Spot spot_at(const Setup& s, const Tensor& row, std::int64_t slot) {
    if (s.whole) {
        return {slot, 0xffu, slot >> 6};  // slot / kBlock would take more instructions, for negative numbers
    }
    if (s.moments != k8Bit) {
        return {slot, present_bits(slot, row.numel), -1};
    }
    const std::int64_t block = slot / kBlock, in_row = blocks_in_row(row), number = block / in_row;
    const std::int64_t column = (block - number * in_row) * kBlock + slot % kBlock;
    const bool exists = number * row.row < row.numel;
    return {number * row.row + column, exists ? present_bits(column, row.row) : 0u, exists ? block : -1};
}

// Of a block. Even lanes have that of exp_avg, odd ones that of exp_avg_sq; the first two own them.
struct Scale {
    float value;
    std::int64_t address;
    std::uint32_t lane;
    bool owned;
};

template <class Access>
ADEPT_FAST_INLINE Scale load_scale(const Setup& s, const Tensor& row, const Spot& spot, std::uint32_t lane) {
    lane %= kLanes;
    const bool owned = lane < 2 && (s.whole || spot.block >= 0);
    const std::int64_t address = (lane % 2 == 0 ? row.exp_avg_scale : row.exp_avg_sq_scale) + 4 * spot.block;
    return {owned ? float_of(Access::load4(address)) : 0.0f, address, lane, owned};
}

// Returns words with the highest bit of each byte that is 255.
ADEPT_FAST_INLINE std::uint32_t full_bytes(std::uint32_t word) { return ((word & 0x7f7f7f7fu) + 0x01010101u) & word & 0x80808080u; }

// Converts codes to fp32 in place: averages, and the roots of averages of squares.
template <class Access>
ADEPT_FAST_INLINE void decode(Eight& m, Eight& root, const Scale& scale) {
    const float of_average = Access::from_lane(scale.value, 0), of_root = Access::from_lane(scale.value, 1);
    const Eight bytes = m, root_bytes = root;
    const Eight sizes{{m.word[0] & 0x7f7f7f7fu, m.word[1] & 0x7f7f7f7fu}};
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
        const std::uint32_t sign = bytes.word[k / 4] << (24 - k % 4 * 8) & 0x80000000u;
        m.word[k] = bits_of(size_of<OfAverage>(byte_of(sizes, k), of_average)) | sign;
        root.word[k] = bits_of(size_of<OfRoot>(byte_of(root_bytes, k), of_root));
    }
    const std::uint32_t high = 0x80808080u;
    if (full_bytes(bytes.word[0] | high) | full_bytes(bytes.word[1] | high) | full_bytes(root_bytes.word[0]) | full_bytes(root_bytes.word[1])) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            m.word[k] = byte_of(sizes, k) > OfAverage::kLast ? 0x7fc00000u : m.word[k];
            root.word[k] = byte_of(root_bytes, k) > OfRoot::kLast ? 0x7fc00000u : root.word[k];
        }
    }
}

ADEPT_FAST_INLINE void move_rooted(Eight& weight, const Eight& grad, Eight& m, Eight& root, const Constants<float>& c,
                                   const Rate<float> (&rates)[kWidth]) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
        float first = float_of(m.word[k]), second = float_of(root.word[k]);
        weight.word[k] = bits_of(adamw_rooted(float_of(weight.word[k]), float_of(grad.word[k]), first, second, c, rates[k]));
        m.word[k] = bits_of(first);
        root.word[k] = bits_of(second);
    }
}

ADEPT_FAST_INLINE std::uint32_t larger_of(std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }

// coded_size of a finite size in the upper byte, of averages below a highest bit of 1. Limits are applied before the dither, which never carries a
// share of a whole code to the next one. share: size times factor.
template <class Code>
ADEPT_FAST_INLINE std::uint32_t upper_code(float share, std::uint32_t dither) {
    constexpr float last = Code::kLargest + 0x1p-7f;
    float x = fminf(share + 0x1p-7f, last);
    if (Code::kLeast > 0 && share > 0.0f) {
        x = fmaxf(x, float_of(kBaseBits + (Code::kLeast << Code::kShift)));
    }
    return (bits_of(x) << (24 - Code::kShift)) + ((dither + Code::kOffset) >> 8);  // kBaseBits becomes the highest bit or 0
}

// Packs the upper bytes of the words.
ADEPT_FAST_INLINE void pack_upper(Eight& raw) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const std::uint32_t* word = raw.word + 4 * k;
#if defined(__CUDA_ARCH__)
        raw.word[k] = __byte_perm(__byte_perm(word[0], word[1], 0x73), __byte_perm(word[2], word[3], 0x73), 0x5410);
#else
        raw.word[k] = word[0] >> 24 | word[1] >> 24 << 8 | word[2] >> 24 << 16 | word[3] >> 24 << 24;
#endif
    }
}

ADEPT_FAST_INLINE void replace_byte(Eight& raw, int k, std::uint32_t byte) {
    raw.word[k / 4] = (raw.word[k / 4] & ~(0xffu << (k % 4 * 8))) | byte << (k % 4 * 8);
}

// Converts fp32 to codes in place, and stores the scales of the block. dither: of the first element.
template <class Access>
ADEPT_FAST_INLINE void encode(Eight& m, Eight& root, const Scale& scale, std::uint32_t dither) {
    std::uint32_t most = 0, most_root = 0;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
        most = larger_of(most, m.word[k] & 0x7fffffffu);
        most_root = larger_of(most_root, root.word[k]);
    }
    const bool special = larger_of(most, most_root) >= 0x7f800000u;
    if (special) {
        most = most_root = 0;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            most = larger_of(most, size_bits(float_of(m.word[k])));
            most_root = larger_of(most_root, size_bits(float_of(root.word[k])));
        }
    }
    // Even lanes go on with the averages, odd ones with the roots. Then one division of each lane gives a scale or a factor.
    const bool odd = scale.lane & 1u;
    std::uint32_t mine = larger_of(odd ? most_root : most, Access::exchanged(odd ? most : most_root, 1));
#pragma unroll
    for (int distance = 2; distance < kLanes; distance *= 2) {
        mine = larger_of(mine, Access::exchanged(mine, distance));
    }
    const float largest = float_of(mine), code = odd ? OfRoot::kLargest : OfAverage::kLargest;
    const bool is_factor = scale.lane & 2u;
    const float quotient = (is_factor ? code : largest) / (is_factor ? largest : code);
    const float result = largest >= kLeastScaled ? quotient : 0.0f;
    if (scale.owned) {
        Access::store4(scale.address, bits_of(result));
    }
    const float factor = Access::from_lane(result, 2), root_factor = Access::from_lane(result, 3);
    Eight codes, root_codes;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
        const std::uint32_t each = dither_of(dither, static_cast<std::uint64_t>(k));
        codes.word[k] = upper_code<OfAverage>(fabsf(float_of(m.word[k])) * factor, each) & (m.word[k] | 0x7fffffffu);  // its highest bit is 1
        root_codes.word[k] = upper_code<OfRoot>(float_of(root.word[k]) * root_factor, each);
    }
    pack_upper(codes);
    pack_upper(root_codes);
    if (special) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            if (!is_finite(float_of(m.word[k]))) replace_byte(codes, k, OfAverage::kLast + 1);
            if (!is_finite(float_of(root.word[k]))) replace_byte(root_codes, k, OfRoot::kLast + 1);
        }
    }
    m = codes;
    root = root_codes;
}

}  // namespace adept_fast
