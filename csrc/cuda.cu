#include "cuda_check.h"
#include "cuda_query.h"

namespace adept_fast {

std::vector<Device> devices() {
    if (versions().driver == 0) {
        return {};
    }
    int count = 0;
    const cudaError_t code = cudaGetDeviceCount(&count);
    if (code == cudaErrorNoDevice) {
        return {};
    }
    check(code, "cudaGetDeviceCount");
    std::vector<Device> found;
    for (int index = 0; index < count; ++index) {
        cudaDeviceProp properties;
        ADEPT_FAST_CHECK(cudaGetDeviceProperties(&properties, index));
        int kilohertz = 0, bus_bits = 0;
        ADEPT_FAST_CHECK(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, index));
        ADEPT_FAST_CHECK(cudaDeviceGetAttribute(&bus_bits, cudaDevAttrGlobalMemoryBusWidth, index));
        found.push_back({properties.name, properties.major, properties.minor, properties.multiProcessorCount,
                         static_cast<std::int64_t>(properties.totalGlobalMem), 2.0 * 1e3 * kilohertz * bus_bits / 8});
    }
    return found;
}

Versions versions() {
    Versions result{};
    ADEPT_FAST_CHECK(cudaRuntimeGetVersion(&result.runtime));
    ADEPT_FAST_CHECK(cudaDriverGetVersion(&result.driver));
    return result;
}

std::vector<std::string> architectures() {
    std::vector<std::string> result;
    for (const int number : {__CUDA_ARCH_LIST__}) {
        result.push_back("sm_" + std::to_string(number / 10));
    }
    result.push_back("compute_" + std::to_string(ADEPT_FAST_PTX));
    return result;
}

}  // namespace adept_fast
