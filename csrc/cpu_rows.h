// Passes over rows of matrices on the CPU, compiled once per instruction set (cpu_linear_cross_entropy_body.h, cpu_gradient_sums_body.h).
#pragma once

#include <cstdint>

#include "cpu_layer.h"

namespace adept_fast {

// The running state of each row of logits: one array of fp64 [rows] per value.
enum RowState : int { kMaximum, kSum, kWeighted, kTarget, kSlope, kShrink, kArgmax, kRowStates };

// Products w . h of one block of the vocabulary, [rows, count], with a row stride that is a multiple of 16. They are replaced by logits, or
// with `gradient` by e^(logit - maximum) * d logit / d product.
// variants > 0: rows are in groups of that size, and each accumulates its divergence from the first row of its group.
struct LogitBlock {
    float* logits;
    std::int64_t rows, count, stride;
    std::int64_t first;  // index of column 0 in the vocabulary
    const std::int64_t* targets;
    const float* bias;  // [count], or null
    float scale, softcap;
    std::int64_t variants;
    bool gradient;
    double* state;  // of row 0
    std::int64_t state_stride;
};

// A dense gradient [rows, columns] and its parameter. Sums are added to row_sums [kinds, rows] and column_sums [kinds, columns]: g^2, and
// with a parameter also |theta g| and theta g. The gradient is added to `running`, fp32. Null pointers are skipped.
struct GradientPass {
    const void *param, *grad;
    std::int64_t param_format, grad_format;  // Format, except fp64
    std::int64_t rows, columns;
    float* running;
    double *row_sums, *column_sums;
};

struct RowKernels {
    void (*softmax)(const LogitBlock& block, std::int64_t first_row, std::int64_t rows);
    void (*saliency)(const GradientPass& pass, std::int64_t first_row, std::int64_t rows, double* column_sums);
    void (*rms_norm)(const RootMeanSquareNorm& norm, std::int64_t first_row, std::int64_t rows);
    void (*gated_activation)(const GatedActivation& activation, std::int64_t first, std::int64_t count);
    void (*attend)(const Attention& attention, std::int64_t sequence, std::int64_t first, std::int64_t tokens, std::int64_t key_head);
};

extern const RowKernels kGenericRows;
#if defined(__x86_64__)
extern const RowKernels kAvx2Rows, kAvx512Rows;
#endif

// Elements that a thread takes at a time.
constexpr std::int64_t kElements = 16384;

// Most columns of a block.
constexpr std::int64_t kLongestBlock = 4096;

// Returns the kernels of an instruction set, by its name in cpu_adamw.h.
const RowKernels& row_kernels(const char* set);

// Return what is wrong with the arguments, or null.
const char* softmax(const LogitBlock& block, int threads, const RowKernels& kernels);
const char* saliency(const GradientPass& pass, int threads, const RowKernels& kernels);

}  // namespace adept_fast
