#include "cpu_rows.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "descriptor.h"
#include "parallel.h"

namespace adept_fast {

const RowKernels& row_kernels(const char* set) {
#if defined(__x86_64__)
    if (std::strcmp(set, "avx512") == 0) return kAvx512Rows;
    if (std::strcmp(set, "avx2") == 0) return kAvx2Rows;
#endif
    (void)set;
    return kGenericRows;
}

const char* softmax(const LogitBlock& block, int threads, const RowKernels& kernels) {
    const std::int64_t group = std::max<std::int64_t>(block.variants, 1);
    if (block.count < 1 || block.count > kLongestBlock || block.stride < block.count || block.stride % 16 != 0) {
        return "a block of logits is too long, or its stride is no multiple of 16";
    }
    if (block.variants < 0 || block.rows % group != 0 || (block.gradient && block.variants > 0)) {
        return "the rows of a block are no whole groups of variants, or want a gradient of a divergence";
    }
    if (block.rows < 0 || block.first < 0 || block.state_stride < block.rows) return "a block has a negative size, or more rows than state";
    if (block.rows > 0 && (block.logits == nullptr || block.targets == nullptr || block.state == nullptr)) {
        return "a block has no logits, targets or state";
    }
    const std::int64_t at_once = std::max<std::int64_t>(1, kElements / block.count / group) * group;
    in_ranges(block.rows, at_once, threads, [&](std::int64_t first, std::int64_t rows) { kernels.softmax(block, first, rows); });
    return nullptr;
}

const char* saliency(const GradientPass& pass, int threads, const RowKernels& kernels) {
    constexpr std::int64_t kElementsOfABand = 65536, kBands = 64;  // least elements of a band, as each has its own column sums; most bands
    const auto known = [](std::int64_t format) { return format == kFp32 || format == kBf16 || format == kFp16; };
    if (pass.rows < 0 || pass.columns < 0 || !known(pass.param_format) || !known(pass.grad_format)) {
        return "a gradient has a negative size, or a format that is not fp32, bf16 or fp16";
    }
    if (pass.rows == 0 || pass.columns == 0) return nullptr;
    if (pass.grad == nullptr) return "there is no gradient";
    // Bands depend on the shape only, so that sums do not depend on the number of threads.
    const std::int64_t fewest = (pass.rows + kBands - 1) / kBands, height = std::max({fewest, kElementsOfABand / pass.columns, std::int64_t{1}});
    const std::int64_t bands = (pass.rows + height - 1) / height, kinds = pass.param == nullptr ? 1 : 3, width = kinds * pass.columns;
    std::vector<double> partials(pass.column_sums == nullptr || bands == 1 ? 0 : static_cast<std::size_t>(bands * width));
    in_ranges(pass.rows, height, threads, [&](std::int64_t first, std::int64_t rows) {
        double* sums = partials.empty() ? pass.column_sums : partials.data() + first / height * width;
        kernels.saliency(pass, first, rows, sums);
    });
    for (std::int64_t band = 0; !partials.empty() && band < bands; ++band) {
        for (std::int64_t i = 0; i < width; ++i) pass.column_sums[i] += partials[static_cast<std::size_t>(band * width + i)];
    }
    return nullptr;
}

}  // namespace adept_fast
