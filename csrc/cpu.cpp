// adept_fast._C: native code for the CPU.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu_adamw.h"
#include "cpu_rows.h"
#include "parallel.h"

namespace py = pybind11;

namespace {

using namespace adept_fast;

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

std::vector<std::string> names() {
    std::vector<std::string> result;
    for (const InstructionSet* const* set = instruction_sets(); *set != nullptr; ++set) {
        result.push_back((*set)->name);
    }
    return result;
}

const InstructionSet& chosen(const std::string& name) {
    const InstructionSet* const* set = instruction_sets();
    for (; *set != nullptr; ++set) {
        if (name.empty() || name == (*set)->name) {
            return **set;
        }
    }
    throw py::value_error("this CPU has no " + name);
}

py::dict features() {
    py::dict result;
    result["compiler"] = kCompiler;
    result["instruction_sets"] = names();
    result["openmp_runtime"] = openmp_runtime();
    return result;
}

template <class Row>
std::pair<const Row*, std::int64_t> rows(const py::buffer_info& bytes) {
    const std::int64_t size = bytes.size * bytes.itemsize;
    if (bytes.ndim != 1 || (bytes.size > 1 && bytes.strides[0] != bytes.itemsize)) {
        throw py::value_error("a table is no contiguous row of bytes or words");
    }
    if (size % static_cast<std::int64_t>(sizeof(Row)) != 0) {
        throw py::value_error("a table's size is no multiple of " + std::to_string(sizeof(Row)) + " bytes");
    }
    return {static_cast<const Row*>(bytes.ptr), size / static_cast<std::int64_t>(sizeof(Row))};
}

void step(const py::buffer& tensor_table, const py::buffer& group_table, double grad_scale, int threads, const std::string& set) {
    const py::buffer_info tensor_bytes = tensor_table.request(), group_bytes = group_table.request();
    const auto [tensors, count] = rows<Tensor>(tensor_bytes);
    const auto [groups, group_count] = rows<Group>(group_bytes);
    const InstructionSet& instructions = chosen(set);
    const char* wrong = nullptr;
    {
        py::gil_scoped_release unlocked;
        wrong = adamw_step(tensors, count, groups, group_count, grad_scale, threads, instructions);
    }
    if (wrong != nullptr) {
        throw py::value_error(wrong);
    }
}

void logits(std::int64_t logits, std::int64_t rows, std::int64_t count, std::int64_t stride, std::int64_t first, std::int64_t targets,
            std::int64_t bias, float scale, float softcap, std::int64_t variants, bool gradient, std::int64_t state,
            std::int64_t state_stride, int threads, const std::string& set) {
    const LogitBlock block{reinterpret_cast<float*>(logits), rows, count, stride, first, reinterpret_cast<const std::int64_t*>(targets),
                           reinterpret_cast<const float*>(bias), scale, softcap, variants, gradient,
                           reinterpret_cast<double*>(state), state_stride};
    const RowKernels& kernels = row_kernels(chosen(set).name);
    const char* wrong = nullptr;
    {
        py::gil_scoped_release unlocked;
        wrong = softmax(block, threads, kernels);
    }
    if (wrong != nullptr) {
        throw py::value_error(wrong);
    }
}

double squares(const py::buffer& table, int threads, const std::string& set) {
    const py::buffer_info bytes = table.request();
    const auto [gradients, count] = rows<Gradient>(bytes);
    if (const char* wrong = wrong_gradients(gradients, count)) {
        throw py::value_error(wrong);
    }
    const InstructionSet& instructions = chosen(set);
    py::gil_scoped_release unlocked;
    return sum_of_squares(gradients, count, threads, instructions);
}

void gradient(std::int64_t param, std::int64_t param_format, std::int64_t grad, std::int64_t grad_format, std::int64_t rows,
              std::int64_t columns, std::int64_t running, std::int64_t row_sums, std::int64_t column_sums, int threads,
              const std::string& set) {
    const GradientPass pass{reinterpret_cast<const void*>(param), reinterpret_cast<const void*>(grad), param_format, grad_format, rows,
                            columns, reinterpret_cast<float*>(running), reinterpret_cast<double*>(row_sums),
                            reinterpret_cast<double*>(column_sums)};
    const RowKernels& kernels = row_kernels(chosen(set).name);
    const char* wrong = nullptr;
    {
        py::gil_scoped_release unlocked;
        wrong = saliency(pass, threads, kernels);
    }
    if (wrong != nullptr) {
        throw py::value_error(wrong);
    }
}

template <class Work>
void work(const char* (*pass)(const Work&, int, const RowKernels&), const Work& given, int threads, const std::string& set) {
    const RowKernels& kernels = row_kernels(chosen(set).name);
    const char* wrong = nullptr;
    {
        py::gil_scoped_release unlocked;
        wrong = pass(given, threads, kernels);
    }
    if (wrong != nullptr) {
        throw py::value_error(wrong);
    }
}

void norm(std::int64_t input, std::int64_t weight, std::int64_t output, std::int64_t rows, std::int64_t width, float epsilon, int threads,
          const std::string& set) {
    work(&rms_norm,
         {reinterpret_cast<const float*>(input), reinterpret_cast<const float*>(weight), reinterpret_cast<float*>(output), rows, width,
          epsilon},
         threads, set);
}

void activation(std::int64_t gate, std::int64_t up, std::int64_t count, int threads, const std::string& set) {
    work(&gated_activation, {reinterpret_cast<float*>(gate), reinterpret_cast<const float*>(up), count}, threads, set);
}

void attend(std::int64_t queries, std::int64_t keys, std::int64_t values, std::int64_t cosines, std::int64_t sines, std::int64_t output,
            std::int64_t sequences, std::int64_t tokens, std::int64_t heads, std::int64_t key_heads, std::int64_t width,
            const std::vector<std::int64_t>& ends, std::int64_t askers, std::int64_t asking, float scale, int threads,
            const std::string& set) {
    const auto at = [](std::int64_t address) { return reinterpret_cast<const float*>(address); };
    work(&attention,
         {at(queries), at(keys), at(values), at(cosines), at(sines), reinterpret_cast<float*>(output), sequences, tokens, heads, key_heads,
          width, ends.data(), static_cast<std::int64_t>(ends.size()), reinterpret_cast<const std::int64_t*>(askers), asking, scale},
         threads, set);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Native code for the CPU.";
    module.def("features", &features,
               "Returns the compiler, the instruction sets of this CPU (best first), and the OpenMP runtime whose threads are used.");
    module.def("adamw", &step, py::arg("tensors"), py::arg("groups"), py::arg("grad_scale"), py::arg("threads"), py::arg("set") = "",
               "Runs one AdamW step. tensors, groups: rows of csrc/descriptor.h with valid addresses. set: an instruction set; empty: the best.");
    module.def("softmax", &logits, py::arg("logits"), py::arg("rows"), py::arg("count"), py::arg("stride"), py::arg("first"),
               py::arg("targets"), py::arg("bias"), py::arg("scale"), py::arg("softcap"), py::arg("variants"), py::arg("gradient"),
               py::arg("state"), py::arg("state_stride"), py::arg("threads"), py::arg("set") = "",
               "Adds a block of logits to the running softmax of its rows: csrc/cpu_rows.h. Takes addresses of fp32, int64 and fp64 memory.");
    module.def("sum_of_squares", &squares, py::arg("gradients"), py::arg("threads"), py::arg("set") = "",
               "Sums the squares of dense gradients in fp64. gradients: rows of address, numel, format (csrc/descriptor.h).");
    module.def("saliency", &gradient, py::arg("param"), py::arg("param_format"), py::arg("grad"), py::arg("grad_format"), py::arg("rows"),
               py::arg("columns"), py::arg("running"), py::arg("row_sums"), py::arg("column_sums"), py::arg("threads"), py::arg("set") = "",
               "Adds sums of g^2, |theta g| and theta g over rows and columns to fp64 memory: csrc/cpu_rows.h. Address 0: none.");
    module.def("rms_norm", &norm, py::arg("input"), py::arg("weight"), py::arg("output"), py::arg("rows"), py::arg("width"),
               py::arg("epsilon"), py::arg("threads"), py::arg("set") = "", "csrc/cpu_layer.h. Addresses of fp32 memory.");
    module.def("gated_activation", &activation, py::arg("gate"), py::arg("up"), py::arg("count"), py::arg("threads"), py::arg("set") = "",
               "csrc/cpu_layer.h. Addresses of fp32 memory.");
    module.def("attention", &attend, py::arg("queries"), py::arg("keys"), py::arg("values"), py::arg("cosines"), py::arg("sines"),
               py::arg("output"), py::arg("sequences"), py::arg("tokens"), py::arg("heads"), py::arg("key_heads"), py::arg("width"),
               py::arg("ends"), py::arg("askers"), py::arg("asking"), py::arg("scale"), py::arg("threads"), py::arg("set") = "",
               "csrc/cpu_layer.h. Addresses of fp32 memory, and of int64 askers.");
}
