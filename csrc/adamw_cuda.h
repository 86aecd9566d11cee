// AdamW on CUDA devices, as the bindings call it: no CUDA header. Addresses are of device memory; errors are thrown.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "descriptor.h"

namespace adept_fast {

struct Stream {
    int device;
    std::int64_t handle;  // cudaStream_t
};

// A table of tensors in device memory, which a step reads and, for its counters, writes to.
struct Table {
    std::int64_t address, tensors, chunks;
};

// (chunks, bytes) that a table of these tensors needs.
std::pair<std::int64_t, std::int64_t> adamw_table_size(const Tensor* rows, std::int64_t tensors);

// Fills the table. The rows travel as launch parameters: nothing on the host must outlive the call, and a captured graph holds its own.
void adamw_write_table(Stream stream, Table table, const Tensor* rows);

// One step: a launch that advances the counters (more with over 400 groups) and one that updates. grad_scale: address of an fp64, 0: 1;
// found_inf: address of an fp32, 0: none. Where it is not 0 nothing is changed.
void adamw_step(Stream stream, Table table, const Group* groups, std::int64_t group_count, std::int64_t grad_scale, std::int64_t found_inf);

struct Kernel {
    int registers, local_bytes, shared_bytes;  // per thread, per thread, per block
    int threads, blocks_per_multiprocessor, multiprocessors;
};

// The update kernel on a device.
Kernel adamw_kernel(int device);

}  // namespace adept_fast
