#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace adept_fast {

inline void check(cudaError_t code, const char* call) {
    if (code != cudaSuccess) {
        throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(code));
    }
}

}  // namespace adept_fast

#define ADEPT_FAST_CHECK(call) ::adept_fast::check((call), #call)
