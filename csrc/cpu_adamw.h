// AdamW over ranges of memory on the CPU, compiled once per instruction set (cpu_adamw_body.h), and the step over all tensors.
#pragma once

#include "adamw.h"
#include "descriptor.h"

namespace adept_fast {

// One tensor in one step. decay, step: unit rates, `length` values of the arithmetic's type each; null if there is one unit. fp32 rates
// follow once more, those of even units before those of odd ones.
struct Work {
    Tensor tensor;
    StepScalars scalars;
    std::int64_t t;
    double multiplier;  // if there is one unit
    const void *decay, *step;
};

// A gradient whose squares are summed.
struct Gradient {
    std::int64_t address, numel, format;
};

struct InstructionSet {
    const char* name;
    void (*update)(const Work& work, std::int64_t first, std::int64_t count);
    double (*sum_of_squares)(const Gradient& gradient, std::int64_t first, std::int64_t count);
};

extern const InstructionSet kGeneric;
#if defined(__x86_64__)
extern const InstructionSet kAvx2, kAvx512;
#endif

// Returns the instruction sets of this CPU, the best first, ended by a null pointer.
const InstructionSet* const* instruction_sets();

// Increments every tensor's step and updates the tensor. Returns what is wrong with the rows, or null.
const char* adamw_step(const Tensor* tensors, std::int64_t count, const Group* groups, std::int64_t group_count, double grad_scale,
                       int threads, const InstructionSet& set);

// Returns what is wrong with the rows, or null. sum_of_squares does not check them.
const char* wrong_gradients(const Gradient* gradients, std::int64_t count);

// Sums the squares of all elements in fp64: the same bits for any number of threads and any instruction set.
double sum_of_squares(const Gradient* gradients, std::int64_t count, int threads, const InstructionSet& set);

}  // namespace adept_fast
