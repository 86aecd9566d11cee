// adept_fast._CUDA: native code for NVIDIA GPUs. Imports on machines without a GPU or driver.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda_query.h"

namespace py = pybind11;

namespace {

py::list devices() {
    std::vector<adept_fast::Device> found;
    {
        py::gil_scoped_release unlocked;  // the first call loads and starts the driver
        found = adept_fast::devices();
    }
    py::list result;
    for (const auto& device : found) {
        py::dict entry;
        entry["name"] = device.name;
        entry["capability"] = py::make_tuple(device.major, device.minor);
        entry["multiprocessors"] = device.multiprocessors;
        entry["memory_bytes"] = device.memory_bytes;
        entry["peak_bytes_per_second"] = device.peak_bytes_per_second;
        result.append(entry);
    }
    return result;
}

py::dict versions() {
    adept_fast::Versions found;
    {
        py::gil_scoped_release unlocked;
        found = adept_fast::versions();
    }
    py::dict result;
    result["runtime"] = found.runtime;
    result["driver"] = found.driver;
    return result;
}

}  // namespace

PYBIND11_MODULE(_CUDA, module) {
    module.doc() = "Native code for NVIDIA GPUs.";
    module.def("devices", &devices,
               "The visible devices; none without a driver. RuntimeError where the driver is too old for the runtime built with.");
    module.def("versions", &versions,
               "CUDA versions as 1000 * major + 10 * minor: the runtime built with, and what the driver supports (0: no driver).");
    module.def("architectures", &adept_fast::architectures, "What was compiled in: sm_XY machine code, and compute_XY, PTX for newer devices.");
}
