// What Python tells native code about one tensor and one parameter group: rows of 64-bit words (adept_fast/ops/adamw/descriptors.py writes them).
#pragma once

#include <cstdint>

namespace adept_fast {

enum Format : std::int64_t { kFp32 = 0, kBf16 = 1, kFp16 = 2, kFp64 = 3 };

// How a bf16 or fp16 parameter is updated; fp32 and fp64 parameters are kDirect.
enum Master : std::int64_t { kDirect = 0, kCopy = 1, kRemainder = 2, kKahan = 3, kStochastic = 4 };

// All of one tensor's memory is in one order (dense, not necessarily row-major); element i has the multiplier
// multipliers[(i / inner) % length].
struct Tensor {
    std::int64_t param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master;  // addresses; 0: there is none
    std::int64_t step;         // address of an fp32, on the device for a GPU
    std::int64_t multipliers;  // address of fp32; 0: all 1
    std::int64_t numel, length, inner;
    std::int64_t first_index;  // of element 0 in the unsharded parameter, for stochastic rounding
    std::int64_t seed;
    std::int64_t group;
    std::int64_t formats;  // param | grad << 2 | moments << 4
    std::int64_t mode;     // Master
};

struct Group {
    double lr, beta1, beta2, eps, weight_decay, maximize;
    // Where not 0, the address (on the device) of an fp32 (kind 1) or fp64 (kind 2) that replaces lr, beta1, beta2.
    std::int64_t lr_address, beta1_address, beta2_address, kinds;  // kinds: lr | beta1 << 2 | beta2 << 4
};

}  // namespace adept_fast
