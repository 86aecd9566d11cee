// AdamW on CUDA devices, for the bindings; includes no CUDA header. Addresses are of device memory. Errors are thrown.
#pragma once

#include <cstdint>
#include <vector>

#include "descriptor.h"

namespace adept_fast {

struct Stream {
    int device;
    std::int64_t handle;  // cudaStream_t
};

// A table of tensors in device memory. A step reads it and writes its scalars. chunks: number of chunks of each update kernel.
struct Table {
    std::int64_t address, tensors;
    std::vector<std::int64_t> chunks;
};

struct TableSize {
    std::vector<std::int64_t> chunks;
    std::int64_t bytes;
};

TableSize adamw_table_size(const Tensor* rows, std::int64_t tensors);

// Fills the table. Rows are launch parameters: no host memory must outlive the call, and a captured graph has its own copy.
void adamw_write_table(Stream stream, const Table& table, const Tensor* rows);

// Runs one step: a launch that increments the steps (several with over 400 groups), one per update kernel that has chunks, and one more if a
// beta is below 1/2 or on the device.
// grad_scale: address of an fp64; 0: 1. found_inf: address of an fp32; 0: none. A value other than 0 skips the step.
void adamw_step(Stream stream, const Table& table, const Group* groups, std::int64_t group_count, std::int64_t grad_scale,
                std::int64_t found_inf);

}  // namespace adept_fast
