// Rows of 64-bit words about one tensor and one parameter group, written by adept_fast/ops/adamw/descriptors.py.
#pragma once

#include <cstdint>

namespace adept_fast {

enum Format : std::int64_t { kFp32 = 0, kBf16 = 1, kFp16 = 2, kFp64 = 3, k8Bit = 4 };  // k8Bit: of moments alone

// Master mode of a bf16 or fp16 parameter; fp32 and fp64 parameters have kDirect.
enum Master : std::int64_t { kDirect = 0, kCopy = 1, kRemainder = 2, kKahan = 3, kStochastic = 4, kRemainder8 = 5 };

// All memory of a tensor is in one dense order, not necessarily row-major. Element i has the multiplier
// multipliers[(i / inner) % length].
struct Tensor {
    std::int64_t param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master;  // addresses; 0: none
    std::int64_t step;         // address of an fp32, on the device for a GPU
    std::int64_t multipliers;  // address of fp32; 0: all 1
    std::int64_t numel, length, inner;
    std::int64_t first_index;  // of element 0 in the unsharded parameter, for stochastic rounding
    std::int64_t seed;
    std::int64_t group;
    std::int64_t formats;  // param | grad << 2 | moments << 4
    std::int64_t mode;     // Master
    // Of 8-bit moments (eight_bit.h): addresses of fp32, one per block, and the elements of a row, in which blocks begin anew. Else 0.
    std::int64_t exp_avg_scale, exp_avg_sq_scale, row;
};

struct Group {
    double lr, beta1, beta2, eps, weight_decay, maximize;
    // Addresses on the device of an fp32 (kind 1) or fp64 (kind 2) that replaces lr, beta1 or beta2; 0: none.
    std::int64_t lr_address, beta1_address, beta2_address, kinds;  // kinds: lr | beta1 << 2 | beta2 << 4
};

// Checks sizes, required addresses, formats and mode of a row. Returns what is wrong, or null.
inline const char* wrong_row(const Tensor& t, std::int64_t groups) {
    if (t.numel < 0 || t.length < 1 || t.inner < 1 || t.group < 0 || t.group >= groups) return "a row of the tensor table is out of range";
    const std::int64_t moments = t.formats >> 4;
    if (t.formats < 0 || moments > k8Bit || t.mode < kDirect || t.mode > kRemainder8) return "a row has a format or a mode that does not exist";
    const std::int64_t format = t.formats & 3;
    if (t.mode != kDirect && format != kBf16 && (format != kFp16 || t.mode == kRemainder || t.mode == kRemainder8 || t.mode == kStochastic)) {
        return "a row has a master that its parameter's format cannot have";
    }
    if (moments == k8Bit ? t.row < 1 || t.numel % t.row != 0 || t.max_exp_avg_sq != 0 || format == kFp64 : t.row != 0) {
        return "a row has 8-bit moments that do not fit its elements";
    }
    if (t.step == 0) return "a row has no step";
    if (t.numel == 0) return nullptr;
    // Formulated so that no product overflows.
    if (t.length > t.numel || t.inner > t.numel / t.length || t.numel % (t.length * t.inner) != 0) return "a row's units do not fit its elements";
    const bool kept = t.mode == kCopy || t.mode == kRemainder || t.mode == kRemainder8 || t.mode == kKahan;
    if (t.param == 0 || t.grad == 0 || t.exp_avg == 0 || t.exp_avg_sq == 0 || (kept && t.master == 0) || (t.length > 1 && t.multipliers == 0) ||
        (moments == k8Bit && (t.exp_avg_scale == 0 || t.exp_avg_sq_scale == 0))) {
        return "a row lacks the address of a tensor";
    }
    return nullptr;
}

}  // namespace adept_fast
