// Passes over rows of matrices on the CPU, compiled once per instruction set (cpu_linear_cross_entropy_body.h, cpu_gradient_sums_body.h).
#pragma once

#include <cstdint>

#include "cpu_layer.h"

namespace adept_fast {

// What is known of a row of logits after some blocks of the vocabulary. One array of `rows` fp64 for each, one after the other.
enum RowState : int { kMaximum, kSum, kWeighted, kTarget, kSlope, kShrink, kArgmax, kRowStates };

// Rows of products w . h of one block of the vocabulary: [rows, count], `stride` apart, which is a multiple of 16. Made into logits, and with
// `gradient` into e^(logit - maximum) times d logit / d product.
// variants > 0: rows stand in groups of as many, and each gathers its divergence from the first of its group.
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

// A gradient of [rows, columns], dense, and its parameter. Sums over rows and over columns are added to what stands in [kinds, rows] and
// [kinds, columns]: of g^2, and where there is a parameter of |theta g| and theta g too. `running`: fp32 that the gradient is added to.
// What is null is left out.
struct GradientPass {
    const void *param, *grad;
    std::int64_t param_format, grad_format;  // Format, but fp64
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

// That a thread takes at a time.
constexpr std::int64_t kElements = 16384;

// Columns that one block may have.
constexpr std::int64_t kLongestBlock = 4096;

// Of an instruction set, by the name that cpu_adamw.h gives it.
const RowKernels& row_kernels(const char* set);

// Return what is wrong with the arguments, or null.
const char* softmax(const LogitBlock& block, int threads, const RowKernels& kernels);
const char* saliency(const GradientPass& pass, int threads, const RowKernels& kernels);

}  // namespace adept_fast
