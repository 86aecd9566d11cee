#include "parallel.h"

#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif
#include <unistd.h>

namespace adept_fast {
namespace {

// The function that GCC compiles `#pragma omp parallel` to. libgomp, libiomp5 and libomp have it.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Runtime {
    std::string file;
    GompParallel parallel = nullptr;
    int (*thread_number)() = nullptr;
};

struct Call {
    void (*body)(void*, int);
    void* data;
};

#if defined(__linux__)
int look(dl_phdr_info* info, std::size_t, void* data) {
    const std::string file = info->dlpi_name == nullptr ? "" : info->dlpi_name;
    const std::string name = file.substr(file.rfind('/') + 1);
    if (name.rfind("libgomp", 0) != 0 && name.rfind("libiomp5", 0) != 0 && name.rfind("libomp", 0) != 0) {
        return 0;
    }
    Runtime& found = *static_cast<Runtime*>(data);
    // Several may be loaded, because wheels bring their own. torch's is in a folder of torch.
    if (found.file.empty() || file.find("/torch") != std::string::npos) {
        found.file = file;
    }
    return 0;
}
#endif

Runtime find() {
    Runtime found;
#if defined(__linux__)
    dl_iterate_phdr(&look, &found);
    if (!found.file.empty()) {
        if (void* library = dlopen(found.file.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {
            found.parallel = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
            found.thread_number = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_thread_num"));
        }
    }
#endif
    if (found.parallel == nullptr || found.thread_number == nullptr) {
        found.parallel = nullptr;
        found.file.clear();
    }
    return found;
}

const Runtime& runtime() {
    static const Runtime found = find();
    return found;
}

// A forked child inherits a thread pool without threads.
const pid_t kLoadedBy = getpid();

}  // namespace

void run_on_threads(int threads, void (*body)(void*, int), void* data) {
    if (threads <= 1) {
        body(data, 0);
    } else if (runtime().parallel != nullptr && getpid() == kLoadedBy) {
        Call call{body, data};
        const auto run = [](void* given) {
            const Call& c = *static_cast<Call*>(given);
            c.body(c.data, runtime().thread_number());
        };
        runtime().parallel(run, &call, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        others.reserve(static_cast<std::size_t>(threads - 1));
        try {
            for (int i = 1; i < threads; ++i) others.emplace_back(body, data, i);
        } catch (const std::system_error&) {
            // No more threads can be started. The running ones do all the work.
        }
        body(data, 0);
        for (std::thread& other : others) {
            other.join();
        }
    }
}

const char* openmp_runtime() { return runtime().file.c_str(); }

}  // namespace adept_fast
