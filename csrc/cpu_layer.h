// What a decoder layer does between its products, on the CPU in fp32, compiled once per instruction set (cpu_layer_body.h,
// cpu_attention_body.h).
#pragma once

#include <cstdint>

namespace adept_fast {

struct RowKernels;

// y = x / sqrt(mean of x^2 + epsilon) * weight, for each of `rows` rows of `width`, x and y each in one piece; y may be x.
struct RootMeanSquareNorm {
    const float *input, *weight;
    float* output;
    std::int64_t rows, width;
    float epsilon;
};

// gate = gate / (1 + e^-gate) * up, for `count` elements.
struct GatedActivation {
    float* gate;
    const float* up;
    std::int64_t count;
};

// Causal attention within segments of each of `sequences` sequences of `tokens` tokens, which end where ends[0], ends[1], ... say, the
// last at `tokens`. Keys and values [sequences, tokens, key_heads * width], queries and outputs [sequences, asking, heads * width] of the
// tokens askers[0] < askers[1] < ..., all in one piece. `width` is a multiple of 32. Queries and keys are turned first: of the two halves
// (a, b) of a head, a becomes a cos - b sin and b becomes b cos + a sin, with the halves of the token's row of [tokens, width] cosines and
// sines.
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
