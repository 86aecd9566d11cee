// The operations of a decoder layer between its matrix products, on the CPU in fp32, compiled once per instruction set (cpu_layer_body.h,
// cpu_attention_body.h).
#pragma once

#include <cstdint>

namespace adept_fast {

struct RowKernels;

// y = x / sqrt(mean of x^2 + epsilon) * weight for each row. x, y: contiguous [rows, width]; y may be x.
struct RootMeanSquareNorm {
    const float *input, *weight;
    float* output;
    std::int64_t rows, width;
    float epsilon;
};

// gate = gate / (1 + e^-gate) * up for `count` elements.
struct GatedActivation {
    float* gate;
    const float* up;
    std::int64_t count;
};

// Causal attention within segments of packed sequences, with rotary embedding.
// keys, values: [sequences, tokens, key_heads * width].
// queries, output: [sequences, asking, heads * width], of the tokens askers[0] < askers[1] < ...
// cosines, sines: [tokens, width]. The halves (a, b) of a head become a cos - b sin and b cos + a sin.
// ends: ends of the segments, ascending; the last is `tokens`. width: a multiple of 32. All memory is contiguous.
struct Attention {
    const float *queries, *keys, *values, *cosines, *sines;
    float* output;
    std::int64_t sequences, tokens, heads, key_heads, width;
    const std::int64_t* ends;
    std::int64_t segments;
    const std::int64_t* askers;
    std::int64_t asking;
    float scale;
};

// Return what is wrong with the arguments, or null.
const char* rms_norm(const RootMeanSquareNorm& norm, int threads, const RowKernels& kernels);
const char* gated_activation(const GatedActivation& activation, int threads, const RowKernels& kernels);
const char* attention(const Attention& attention, int threads, const RowKernels& kernels);

}  // namespace adept_fast
