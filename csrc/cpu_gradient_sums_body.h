// Included by one source file per instruction set: sums of g^2, |theta g| and theta g of a band of rows, in one pass over both tensors.
#pragma once

#include "cpu_lanes.h"
#include "cpu_rows.h"
#include "descriptor.h"

namespace adept_fast {
namespace {

constexpr std::int64_t kTile = 1024;  // columns whose sums stay in the L1 cache
constexpr std::int64_t kRun = 128;    // rows whose sums of columns stay in fp32
constexpr int kAtOnce = 4;            // rows that share one load and store of the column sums
constexpr int kAhead = 8;             // rows between the current ones and those prefetched from the L3 cache

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

// Returns elements [first, first + n) as fp32, padded with zeros to whole lanes: the memory itself if it is so, else a copy in `tile`.
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

// A row of a tile in fp32, and the memory of the row kAhead after it, with the bytes of an element.
struct TileRow {
    const float* now;
    const char* later;
    std::int64_t size;
};

// As open. The prefetched row may be behind the end of the memory.
TileRow open_row(const void* memory, std::int64_t format, std::int64_t first, std::int64_t n, std::int64_t columns, float* tile) {
    const std::int64_t size = format == kFp32 ? 4 : 2;
    return {open(memory, format, first, n, tile), static_cast<const char*>(memory) + (first + kAhead * columns) * size, size};
}

ADEPT_FAST_INLINE Lanes take(const TileRow& row, std::int64_t j) {
    __builtin_prefetch(row.later + j * row.size, 0, 2);
    return load(row.now + j);
}

// Applies sum_of to `n` Lanes, interleaved, because the steps of one sum depend on each other.
ADEPT_FAST_INLINE void sums_of(const Lanes* lanes, int n, float* totals) {
#ifdef ADEPT_FAST_TURNED
    for (int k = 0; k < n; ++k) totals[k] = sum_of(lanes[k]);
#else
    float x[kAtOnce * 3][kLanes];
    for (int k = 0; k < n; ++k) store(x[k], lanes[k]);
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int k = 0; k < n; ++k) {
            for (int i = 0; i < width; ++i) x[k][i] += x[k][i + width];
        }
    }
    for (int k = 0; k < n; ++k) totals[k] = x[k][0];
#endif
}

// Adds g^2, and with kProducts |theta g| and theta g, of kRows rows of a tile to the column sums, in the order of the rows. Writes the row
// sums to totals [kRows, kinds].
template <bool kProducts, bool kColumns, int kRows>
void tile_sums(std::int64_t n, const TileRow* g, const TileRow* theta, float* columns, float* totals) {
    constexpr int kKinds = kProducts ? 3 : 1;
    Lanes sums[kRows * kKinds];
    for (int k = 0; k < kRows * kKinds; ++k) sums[k] = all(0.0f);
    for (std::int64_t j = 0; j < n; j += kLanes) {
        Lanes column[kKinds];
        for (int kind = 0; kColumns && kind < kKinds; ++kind) column[kind] = load(columns + kind * kTile + j);
        for (int row = 0; row < kRows; ++row) {
            const Lanes gradient = take(g[row], j);
            Lanes terms[kKinds];
            terms[0] = gradient * gradient;
            if (kProducts) {
                terms[kKinds - 1] = take(theta[row], j) * gradient;
                terms[kKinds / 2] = absolute(terms[kKinds - 1]);
            }
            for (int kind = 0; kind < kKinds; ++kind) {
                sums[row * kKinds + kind] = sums[row * kKinds + kind] + terms[kind];
                if (kColumns) column[kind] = column[kind] + terms[kind];
            }
        }
        for (int kind = 0; kColumns && kind < kKinds; ++kind) store(columns + kind * kTile + j, column[kind]);
    }
    sums_of(sums, kRows * kKinds, totals);
}

// Processes kRows rows of a tile, from `row` on, at columns [first, first + n).
template <bool kProducts, bool kColumns, int kRows>
void tile_rows(const GradientPass& pass, std::int64_t row, std::int64_t first, std::int64_t n, float* columns) {
    constexpr int kKinds = kProducts ? 3 : 1;
    alignas(64) float gradient_tiles[kRows][kTile], param_tiles[kRows][kTile];
    TileRow g[kRows], theta[kRows];
    for (int i = 0; i < kRows; ++i) {
        const std::int64_t at = (row + i) * pass.columns + first;
        g[i] = open_row(pass.grad, pass.grad_format, at, n, pass.columns, gradient_tiles[i]);
        if (kProducts) theta[i] = open_row(pass.param, pass.param_format, at, n, pass.columns, param_tiles[i]);
    }
    float totals[kRows * kKinds];
    tile_sums<kProducts, kColumns, kRows>(n, g, theta, columns, totals);
    for (int i = 0; i < kRows; ++i) {
        for (int kind = 0; pass.row_sums != nullptr && kind < kKinds; ++kind) {
            pass.row_sums[kind * pass.rows + row + i] += totals[i * kKinds + kind];
        }
        if (pass.running != nullptr) {
            float* running = pass.running + (row + i) * pass.columns + first;
            for (std::int64_t j = 0; j < n; ++j) running[j] += g[i].now[j];
        }
    }
}

// Processes a band of rows. column_sums: of this band only, [kinds, columns].
template <bool kProducts, bool kColumns>
void band(const GradientPass& pass, std::int64_t first_row, std::int64_t rows, double* column_sums) {
    constexpr int kKinds = kProducts ? 3 : 1;
    alignas(64) float columns[3 * kTile];
    for (std::int64_t first = 0; first < pass.columns; first += kTile) {
        const std::int64_t n = pass.columns - first < kTile ? pass.columns - first : kTile;
        for (std::int64_t run = first_row; run < first_row + rows; run += kRun) {
            const std::int64_t end = run + kRun < first_row + rows ? run + kRun : first_row + rows;
            if (kColumns) std::memset(columns, 0, sizeof columns);
            std::int64_t row = run;
            for (; row + kAtOnce <= end; row += kAtOnce) tile_rows<kProducts, kColumns, kAtOnce>(pass, row, first, n, columns);
            for (; row < end; ++row) tile_rows<kProducts, kColumns, 1>(pass, row, first, n, columns);
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
