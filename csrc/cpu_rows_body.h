// Included by one source file per instruction set, which defines ADEPT_FAST_ROWS as its name.
#pragma once

#include "cpu_attention_body.h"
#include "cpu_layer_body.h"
#include "cpu_gradient_sums_body.h"
#include "cpu_linear_cross_entropy_body.h"

namespace adept_fast {

const RowKernels ADEPT_FAST_ROWS = {&softmax_rows, &saliency_band, &rms_norm_rows, &gated_activation_range, &attend};

}  // namespace adept_fast
