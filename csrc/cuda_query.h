// Queries of CUDA runtime, driver and devices. Includes no CUDA header, so that the bindings compile with the host compiler alone.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace adept_fast {

struct Device {
    std::string name;
    int major, minor;
    int multiprocessors;
    std::int64_t memory_bytes;
    double peak_bytes_per_second;  // 2 * memory clock * bus width; 0 if the driver does not report it
};

struct Versions {
    int runtime, driver;  // 1000 * major + 10 * minor; driver 0: none installed
};

std::vector<Device> devices();
Versions versions();
std::vector<std::string> architectures();

}  // namespace adept_fast
