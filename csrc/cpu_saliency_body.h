// Included by one source file per instruction set: sums of squares and Taylor terms of a band of rows, in one pass over gradient and weight.
#pragma once

#include "cpu_lanes.h"
#include "cpu_rows.h"
#include "descriptor.h"

namespace adept_fast {
namespace {

constexpr std::int64_t kTile = 1024;  // columns whose sums stay in the first-level cache
constexpr std::int64_t kRun = 128;    // rows whose sums of columns stay in fp32

ADEPT_FAST_INLINE Words words(const std::uint16_t* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return __builtin_convertvector(halves, Words);
}

ADEPT_FAST_INLINE Lanes load_bf16(const std::uint16_t* from) {
    ADEPT_FAST_EACH((Floats)(words(from + i * (kLanes / kParts)) << 16));
}

// As from_fp16 of number_formats.h.
ADEPT_FAST_INLINE Lanes load_fp16(const std::uint16_t* from) {
    Lanes result;
    for (int i = 0; i < kParts; ++i) {
        const Words half = words(from + i * (kLanes / kParts));
        const Floats magnitude = (Floats)((half & 0x7fffu) << 13) * 0x1p112f;
        const Words special = (Words)(magnitude >= 65536.0f) & 0x7f800000u;
        result.part[i] = (Floats)((Words)magnitude | special | ((half & 0x8000u) << 16));
    }
    return result;
}

// Elements [first, first + n) as fp32, padded with zeros to whole lanes: in place where that is what they are, else in `tile`.
const float* open(const void* memory, std::int64_t format, std::int64_t first, std::int64_t n, float* tile) {
    const std::int64_t whole = n / kLanes * kLanes;
    if (format == kFp32) {
        const float* in = static_cast<const float*>(memory) + first;
        if (whole == n) return in;
        std::memset(tile + whole, 0, kLanes * sizeof(float));
        std::memcpy(tile, in, static_cast<std::size_t>(n) * sizeof(float));
        return tile;
    }
    const std::uint16_t* in = static_cast<const std::uint16_t*>(memory) + first;
    std::uint16_t rest[kLanes] = {};
    std::memcpy(rest, in + whole, static_cast<std::size_t>(n - whole) * sizeof(std::uint16_t));
    for (std::int64_t j = 0; j < n; j += kLanes) {
        const std::uint16_t* from = j < whole ? in + j : rest;
        store(tile + j, format == kBf16 ? load_bf16(from) : load_fp16(from));
    }
    return tile;
}

// Adds g^2, and with kProducts |theta g| and theta g, of a row's tile to the sums of its columns, and gives their sums.
template <bool kProducts, bool kColumns>
void tile_sums(std::int64_t n, const float* g, const float* theta, float* columns, float* totals) {
    Lanes squares = all(0.0f), absolutes = squares, products = squares;
    for (std::int64_t j = 0; j < n; j += kLanes) {
        const Lanes gradient = load(g + j), square = gradient * gradient;
        squares = squares + square;
        if (kColumns) store(columns + j, load(columns + j) + square);
        if (kProducts) {
            const Lanes product = load(theta + j) * gradient, magnitude = absolute(product);
            absolutes = absolutes + magnitude;
            products = products + product;
            if (kColumns) store(columns + kTile + j, load(columns + kTile + j) + magnitude);
            if (kColumns) store(columns + 2 * kTile + j, load(columns + 2 * kTile + j) + product);
        }
    }
    totals[0] = sum_of(squares);
    totals[1] = kProducts ? sum_of(absolutes) : 0.0f;
    totals[2] = kProducts ? sum_of(products) : 0.0f;
}

// column_sums: of this band alone, [kinds, columns]
template <bool kProducts, bool kColumns>
void band(const GradientPass& pass, std::int64_t first_row, std::int64_t rows, double* column_sums) {
    constexpr int kKinds = kProducts ? 3 : 1;
    alignas(64) float gradient_tile[kTile], param_tile[kTile], columns[3 * kTile];
    for (std::int64_t first = 0; first < pass.columns; first += kTile) {
        const std::int64_t n = pass.columns - first < kTile ? pass.columns - first : kTile;
        for (std::int64_t run = first_row; run < first_row + rows; run += kRun) {
            const std::int64_t end = run + kRun < first_row + rows ? run + kRun : first_row + rows;
            if (kColumns) std::memset(columns, 0, sizeof columns);
            for (std::int64_t row = run; row < end; ++row) {
                const std::int64_t at = row * pass.columns + first;
                const float* g = open(pass.grad, pass.grad_format, at, n, gradient_tile);
                const float* theta = kProducts ? open(pass.param, pass.param_format, at, n, param_tile) : nullptr;
                float totals[3];
                tile_sums<kProducts, kColumns>(n, g, theta, columns, totals);
                for (int kind = 0; pass.row_sums != nullptr && kind < kKinds; ++kind) pass.row_sums[kind * pass.rows + row] += totals[kind];
                if (pass.running != nullptr) {
                    float* running = pass.running + at;
                    for (std::int64_t j = 0; j < n; ++j) running[j] += g[j];
                }
            }
            for (int kind = 0; kColumns && kind < kKinds; ++kind) {
                double* sums = column_sums + kind * pass.columns + first;
                for (std::int64_t j = 0; j < n; ++j) sums[j] += columns[kind * kTile + j];
            }
        }
    }
}

void saliency_band(const GradientPass& pass, std::int64_t first_row, std::int64_t rows, double* column_sums) {
    if (pass.param != nullptr) {
        column_sums != nullptr ? band<true, true>(pass, first_row, rows, column_sums) : band<true, false>(pass, first_row, rows, nullptr);
    } else {
        column_sums != nullptr ? band<false, true>(pass, first_row, rows, column_sums) : band<false, false>(pass, first_row, rows, nullptr);
    }
}

}  // namespace
}  // namespace adept_fast
