// AdamW over ranges of memory on the CPU, compiled once per instruction set (cpu_adamw_body.h), and the step over all tensors.
#pragma once

#include "adamw.h"
#include "descriptor.h"

namespace adept_fast {

// One tensor in one step. decay and step: the unit rates, `length` values of the arithmetic's type each, and where that is fp32 once more,
// those of even units before those of odd ones; null where there is one unit.
struct Work {
    Tensor tensor;
    StepScalars scalars;
    std::int64_t t;
    double multiplier;  // of the one unit
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

// The instruction sets that this CPU has, the best first; `name` null ends the list.
const InstructionSet* const* instruction_sets();

// Advances every tensor's step and updates it. Returns what is wrong with the rows, or null.
const char* adamw_step(const Tensor* tensors, std::int64_t count, const Group* groups, std::int64_t group_count, double grad_scale,
                       int threads, const InstructionSet& set);

// What is wrong with the rows, or null; sum_of_squares takes them at their word.
const char* wrong_gradients(const Gradient* gradients, std::int64_t count);

// Of all elements, in fp64: the same bits for any number of threads and any instruction set.
double sum_of_squares(const Gradient* gradients, std::int64_t count, int threads, const InstructionSet& set);

}  // namespace adept_fast
