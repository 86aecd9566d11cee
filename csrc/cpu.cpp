// adept_fast._C: native code for the CPU.

#include <pybind11/pybind11.h>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

struct Features {
    bool avx2 = false, fma = false, avx512f = false, avx512bw = false, avx512_bf16 = false;
};

Features detect() {
    Features found;
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    found.avx2 = __builtin_cpu_supports("avx2");
    found.fma = __builtin_cpu_supports("fma");
    found.avx512f = __builtin_cpu_supports("avx512f");  // includes that the system saves the wide registers
    found.avx512bw = __builtin_cpu_supports("avx512bw");
    // Compilers before GCC 11 do not know this name: leaf 7, subleaf 1, EAX bit 5.
    unsigned a = 0, b = 0, c = 0, d = 0;
    found.avx512_bf16 = found.avx512f && __get_cpuid_count(7, 1, &a, &b, &c, &d) && ((a >> 5) & 1u);
#endif
    return found;
}

py::dict features() {
    const Features found = detect();
    py::dict result;
    result["compiler"] = kCompiler;
    result["avx2"] = found.avx2;
    result["fma"] = found.fma;
    result["avx512f"] = found.avx512f;
    result["avx512bw"] = found.avx512bw;
    result["avx512_bf16"] = found.avx512_bf16;
    return result;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Native code for the CPU.";
    module.def("features", &features, "The compiler this was built with, and the vector instructions this CPU has, found at run time.");
}
