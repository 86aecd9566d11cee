// adept_fast._CUDA: native code for NVIDIA GPUs. It can be imported without a GPU or driver.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "adamw_body.h"
#include "adamw_cuda.h"
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

// Rows of a struct in a contiguous Python buffer, which `info` references.
template <class Row>
struct Rows {
    py::buffer_info info;
    const Row* first;
    std::int64_t count;

    explicit Rows(const py::buffer& buffer) : info(buffer.request()) {
        const std::int64_t bytes = info.size * info.itemsize, size = sizeof(Row);
        if (info.ndim != 1 || (info.size > 1 && info.strides[0] != info.itemsize) || bytes % size != 0) {
            throw std::invalid_argument("rows of " + std::to_string(size) + " bytes expected, not " + std::to_string(bytes) + " bytes");
        }
        first = static_cast<const Row*>(info.ptr);
        count = bytes / size;
    }
};

py::tuple adamw_table_size(const py::buffer& tensors) {
    const Rows<adept_fast::Tensor> rows(tensors);
    for (std::int64_t i = 0; i < rows.count; ++i) {
        if (const char* wrong = adept_fast::wrong_row(rows.first[i], rows.count)) {
            throw std::invalid_argument(wrong);
        }
    }
    const auto size = adept_fast::adamw_table_size(rows.first, rows.count);
    return py::make_tuple(size.chunks, size.bytes);
}

void adamw_write_table(int device, std::int64_t stream, std::int64_t table, const std::vector<std::int64_t>& chunks,
                       const py::buffer& tensors) {
    const Rows<adept_fast::Tensor> rows(tensors);
    if (adept_fast::adamw_table_size(rows.first, rows.count).chunks != chunks) {
        throw std::invalid_argument("a table of other chunks than its rows have");
    }
    py::gil_scoped_release unlocked;
    adept_fast::adamw_write_table({device, stream}, {table, rows.count, chunks}, rows.first);
}

void adamw_step(int device, std::int64_t stream, std::int64_t table, std::int64_t tensors, const std::vector<std::int64_t>& chunks,
                const py::buffer& groups, std::int64_t grad_scale, std::int64_t found_inf) {
    const Rows<adept_fast::Group> rows(groups);
    py::gil_scoped_release unlocked;
    adept_fast::adamw_step({device, stream}, {table, tensors, chunks}, rows.first, rows.count, grad_scale, found_inf);
}

py::dict struct_bytes() {
    py::dict result;
    result["Tensor"] = sizeof(adept_fast::Tensor);
    result["Group"] = sizeof(adept_fast::Group);
    result["StepScalars"] = sizeof(adept_fast::StepScalars);
    return result;
}

}  // namespace

PYBIND11_MODULE(_CUDA, module) {
    module.doc() = "Native code for NVIDIA GPUs.";
    module.def("devices", &devices,
               "Returns the visible devices; none without a driver. Raises RuntimeError if the driver is too old for the CUDA runtime.");
    module.def("versions", &versions,
               "Returns CUDA versions as 1000 * major + 10 * minor: of the runtime, and the newest that the driver supports (0: no driver).");
    module.def("architectures", &adept_fast::architectures,
               "Returns the compiled architectures: sm_XY (machine code) and compute_XY (PTX for newer devices).");
    module.def("adamw_table_size", &adamw_table_size, py::arg("tensors"),
               "Returns (chunks of each update kernel, bytes of device memory) of the table of these tensors. tensors: rows of struct "
               "Tensor (csrc/descriptor.h).");
    module.def("adamw_write_table", &adamw_write_table, py::arg("device"), py::arg("stream"), py::arg("table"), py::arg("chunks"),
               py::arg("tensors"), "Fills the table at address `table`, in stream order. `tensors` is read before the call returns.");
    module.def("adamw_step", &adamw_step, py::arg("device"), py::arg("stream"), py::arg("table"), py::arg("tensors"), py::arg("chunks"),
               py::arg("groups"), py::arg("grad_scale"), py::arg("found_inf"),
               "Runs one AdamW step over a table, in stream order. groups: rows of struct Group, read before the call returns. grad_scale: "
               "address of an fp64 on the device; 0: 1. found_inf: address of an fp32 there; 0: none. A value other than 0 skips the step.");
    module.def("struct_bytes", &struct_bytes, "Returns the compiled sizes of Tensor, Group and StepScalars.");
}
