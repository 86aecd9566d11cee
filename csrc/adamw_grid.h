// The elements that a thread of the AdamW launch updates, and their units, as host and device code.
//
// Tensors are divided into chunks, numbered over all tensors. Block b takes chunks b, b + grid, ... It processes kTurn elements of a chunk
// at a time, kWidth per thread: two groups of kGroup adjacent ones.
#pragma once

#include "descriptor.h"
#include "number_formats.h"

namespace adept_fast {

constexpr int kThreads = 256;
constexpr int kGroup = 4;
constexpr int kWidth = 2 * kGroup;
constexpr int kTurn = kThreads * kWidth;
constexpr int kChunk = 4 * kTurn;

ADEPT_FAST_INLINE std::int64_t chunks_of(std::int64_t slots) { return (slots + kChunk - 1) / kChunk; }

// Returns the tensor of `chunk`. first_chunks: of each tensor, `stride` words apart, ascending; an empty tensor has that of its successor.
ADEPT_FAST_INLINE std::int32_t tensor_of_chunk(const std::int64_t* first_chunks, std::int64_t stride, std::int64_t tensors,
                                               std::int64_t chunk) {
    std::int64_t low = 0, high = tensors;  // first_chunks[low] <= chunk < first_chunks[high]
    while (high - low > 1) {
        const std::int64_t middle = (low + high) / 2;
        (first_chunks[stride * middle] <= chunk ? low : high) = middle;
    }
    return static_cast<std::int32_t>(low);
}

// Returns one bit for each of the kWidth elements from `first` on that the tensor has.
ADEPT_FAST_INLINE std::uint32_t present_bits(std::int64_t first, std::int64_t numel) {
    const std::int64_t left = numel - first;
    return left >= kWidth ? (1u << kWidth) - 1u : left <= 0 ? 0u : (1u << left) - 1u;
}

// The unit of an element, and the number of elements from here to its end (at least to the end of the chunk).
struct Place {
    std::int64_t unit;
    std::uint32_t left;
};

// Units (i / inner) % length along one chunk: 64-bit divisions once, then 32-bit ones.
struct UnitWalk {
    std::int64_t length, unit;    // unit: of the chunk's first element
    std::uint32_t inner, passed;  // passed: elements of that unit before the chunk
};

// first: of the chunk.
ADEPT_FAST_INLINE UnitWalk unit_walk(const Tensor& row, std::int64_t first) {
    if (row.length == 1) {
        return {1, 0, 2 * kChunk, 0};
    }
    const std::int64_t units = first / row.inner, passed = first - units * row.inner;
    const std::int64_t unit = units % row.length;
    if (row.inner <= kChunk) {
        return {row.length, unit, static_cast<std::uint32_t>(row.inner), static_cast<std::uint32_t>(passed)};
    }
    // A unit longer than a chunk ends in it at most once. A length of two chunks is then equivalent, and fits 32 bits.
    const std::int64_t left = row.inner - passed;
    return {row.length, unit, 2 * kChunk, static_cast<std::uint32_t>(2 * kChunk - (left < kChunk ? left : kChunk))};
}

// offset: of an element in the chunk.
ADEPT_FAST_INLINE Place place_at(const UnitWalk& walk, std::uint32_t offset) {
    const std::uint32_t units = (walk.passed + offset) / walk.inner, left = (units + 1) * walk.inner - (walk.passed + offset);
    const std::int64_t unit = walk.unit + units;
    if (unit < walk.length) {
        return {unit, left};
    }
    if (walk.length > kChunk) {
        return {unit - walk.length, left};
    }
    return {static_cast<std::uint32_t>(unit) % static_cast<std::uint32_t>(walk.length), left};
}

ADEPT_FAST_INLINE void to_next(const UnitWalk& walk, Place& place) {
    if (--place.left == 0) {
        place.left = walk.inner;
        place.unit = place.unit + 1 == walk.length ? 0 : place.unit + 1;
    }
}

}  // namespace adept_fast
