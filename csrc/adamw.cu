// AdamW over a table of tensors. One launch increments the steps, as threads that read a step would race with its update; another updates
// all elements. Untested on a GPU.

#include <algorithm>
#include <map>
#include <mutex>

#include "adamw_body.h"
#include "adamw_cuda.h"
#include "cuda_check.h"

namespace adept_fast {
namespace {

constexpr int kWarp = 32;
constexpr std::int64_t kRowWords = sizeof(Tensor) / 8, kCountedWords = sizeof(Counted) / 8, kGroupWords = sizeof(Group) / 8;
static_assert(kRowWords + kCountedWords < kWarp, "a warp fetches an entry with one word per lane");

// Words that a launch can take by value, beside its other parameters.
constexpr std::int64_t kParameterWords = CUDART_VERSION >= 12010 ? 4000 : 500;
constexpr std::int64_t kGroupsAtOnce = kParameterWords / kGroupWords;

struct Parameters {
    std::int64_t words[kParameterWords];
};

struct GroupParameters {
    Group groups[kGroupsAtOnce];
};

// The parts of a table in memory order.
struct Parts {
    std::int64_t* rows;
    std::int64_t* first_chunks;
    Counted* counted;
    std::int32_t* tensor_of_chunk;

    explicit Parts(const Table& table)
        : rows(reinterpret_cast<std::int64_t*>(table.address)),
          first_chunks(rows + kRowWords * table.tensors),
          counted(reinterpret_cast<Counted*>(first_chunks + table.tensors)),
          tensor_of_chunk(reinterpret_cast<std::int32_t*>(counted + table.tensors)) {}
};

// Accesses to global memory, which the compiler cannot infer for addresses from a table. Tensors are used once per step, so they are evicted
// first, which leaves the caches to tables and multipliers.
struct DeviceMemory {
    template <class T>
    static __device__ __forceinline__ T* at(std::int64_t address) {
        return reinterpret_cast<T*>(address);
    }
    static __device__ __forceinline__ std::uint16_t load2(std::int64_t address) { return __ldcs(at<const unsigned short>(address)); }
    static __device__ __forceinline__ std::uint32_t load4(std::int64_t address) { return __ldcs(at<const unsigned>(address)); }
    static __device__ __forceinline__ double load8(std::int64_t address) { return __ldcs(at<const double>(address)); }
    static __device__ __forceinline__ Words load16(std::int64_t address) {
        const uint4 value = __ldcs(at<const uint4>(address));
        return {{value.x, value.y, value.z, value.w}};
    }
    static __device__ __forceinline__ void store2(std::int64_t address, std::uint16_t value) { __stcs(at<unsigned short>(address), value); }
    static __device__ __forceinline__ void store4(std::int64_t address, std::uint32_t value) { __stcs(at<unsigned>(address), value); }
    static __device__ __forceinline__ void store16(std::int64_t address, const Words& value) {
        __stcs(at<uint4>(address), make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]));
    }
};

__global__ void write_words(std::int64_t* target, const __grid_constant__ Parameters source, int count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        target[i] = source.words[i];
    }
}

__global__ void map_chunks(std::int32_t* tensor_of_each, const std::int64_t* first_chunks, std::int64_t tensors, std::int64_t chunks) {
    const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
    for (std::int64_t chunk = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; chunk < chunks; chunk += stride) {
        tensor_of_each[chunk] = tensor_of_chunk(first_chunks, tensors, chunk);
    }
}

// One thread per tensor. Skips tensors of groups outside of first_group ... first_group + group_count - 1.
__global__ void __launch_bounds__(kThreads)
    count_steps(Counted* counted, const Tensor* rows, std::int64_t tensors, const __grid_constant__ GroupParameters parameters,
                std::int64_t first_group, std::int64_t group_count, const double* grad_scale, const float* found_inf) {
    const std::int64_t index = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (index >= tensors || (found_inf != nullptr && *found_inf != 0.0f)) {
        return;
    }
    const std::int64_t group = rows[index].group - first_group;
    if (group >= 0 && group < group_count) {
        counted[index] = advance<DeviceMemory>(rows[index], parameters.groups[group], grad_scale == nullptr ? 1.0 : *grad_scale);
    }
}

// Data of a chunk's tensor, one per warp.
struct Entry {
    Tensor row;
    Counted counted;
    std::int64_t first_chunk;
};

static __device__ __forceinline__ std::int64_t fetch(const Parts& parts, std::int64_t tensor, int lane) {
    if (lane < kRowWords) {
        return parts.rows[kRowWords * tensor + lane];
    }
    if (lane < kRowWords + kCountedWords) {
        return reinterpret_cast<const std::int64_t*>(parts.counted + tensor)[lane - kRowWords];
    }
    return parts.first_chunks[tensor];
}

// Persistent blocks. Each warp has its own entry, so that warps never wait for each other, and prefetches the next one.
__global__ void __launch_bounds__(kThreads, 2) update(const Parts parts, std::int64_t chunks, const float* found_inf) {
    __shared__ Entry entries[kThreads / kWarp];
    if (found_inf != nullptr && *found_inf != 0.0f) {
        return;
    }
    Entry& entry = entries[threadIdx.x / kWarp];
    const int lane = threadIdx.x % kWarp;
    std::int64_t chunk = blockIdx.x;
    std::int64_t word = chunk < chunks ? fetch(parts, parts.tensor_of_chunk[chunk], lane) : 0;
    std::int64_t next = chunk + gridDim.x;
    std::int32_t next_tensor = next < chunks ? parts.tensor_of_chunk[next] : 0;
    while (chunk < chunks) {
        __syncwarp();
        if (lane <= kRowWords + kCountedWords) {
            reinterpret_cast<std::int64_t*>(&entry)[lane] = word;
        }
        __syncwarp();
        word = fetch(parts, next_tensor, lane);
        const std::int64_t after = next + gridDim.x;
        next_tensor = after < chunks ? parts.tensor_of_chunk[after] : 0;
        update_chunk<DeviceMemory>(entry.row, entry.counted, chunk - entry.first_chunk, threadIdx.x);
        chunk = next;
        next = after;
    }
}

// Makes a device current for its lifetime.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        ADEPT_FAST_CHECK(cudaGetDevice(&before_));
        ADEPT_FAST_CHECK(cudaSetDevice(device));
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0;
};

Kernel query(int device) {
    cudaFuncAttributes attributes;
    ADEPT_FAST_CHECK(cudaFuncGetAttributes(&attributes, update));
    Kernel kernel{attributes.numRegs, static_cast<int>(attributes.localSizeBytes), static_cast<int>(attributes.sharedSizeBytes), kThreads};
    ADEPT_FAST_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&kernel.blocks_per_multiprocessor, update, kThreads, 0));
    ADEPT_FAST_CHECK(cudaDeviceGetAttribute(&kernel.multiprocessors, cudaDevAttrMultiProcessorCount, device));
    return kernel;
}

// The device must be current.
Kernel kernel_of(int device) {
    static std::mutex mutex;
    static std::map<int, Kernel> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(device);
    return found != known.end() ? found->second : known.emplace(device, query(device)).first->second;
}

cudaStream_t handle(Stream stream) { return reinterpret_cast<cudaStream_t>(stream.handle); }

int blocks_for(std::int64_t items) { return static_cast<int>((items + kThreads - 1) / kThreads); }

}  // namespace

std::pair<std::int64_t, std::int64_t> adamw_table_size(const Tensor* rows, std::int64_t tensors) {
    std::int64_t chunks = 0;
    for (std::int64_t i = 0; i < tensors; ++i) {
        chunks += chunks_of(rows[i].numel);
    }
    const std::int64_t per_tensor = static_cast<std::int64_t>(sizeof(Tensor) + sizeof(std::int64_t) + sizeof(Counted));
    return {chunks, tensors * per_tensor + chunks * static_cast<std::int64_t>(sizeof(std::int32_t))};
}

void adamw_write_table(Stream stream, Table table, const Tensor* rows) {
    const OnDevice current(stream.device);
    const std::int64_t* words = reinterpret_cast<const std::int64_t*>(rows);
    std::vector<std::int64_t> content(words, words + kRowWords * table.tensors);
    std::int64_t chunks = 0;
    for (std::int64_t i = 0; i < table.tensors; ++i) {
        content.push_back(chunks);
        chunks += chunks_of(rows[i].numel);
    }
    const Parts parts(table);
    const std::int64_t total = static_cast<std::int64_t>(content.size());
    for (std::int64_t first = 0; first < total; first += kParameterWords) {
        const std::int64_t count = std::min(kParameterWords, total - first);
        Parameters source{};
        std::copy_n(content.data() + first, count, source.words);
        write_words<<<1, kThreads, 0, handle(stream)>>>(parts.rows + first, source, static_cast<int>(count));
        ADEPT_FAST_CHECK(cudaGetLastError());
    }
    if (chunks > 0) {
        const int blocks = blocks_for(std::min<std::int64_t>(chunks, 1 << 20));
        map_chunks<<<blocks, kThreads, 0, handle(stream)>>>(parts.tensor_of_chunk, parts.first_chunks, table.tensors, chunks);
        ADEPT_FAST_CHECK(cudaGetLastError());
    }
}

void adamw_step(Stream stream, Table table, const Group* groups, std::int64_t group_count, std::int64_t grad_scale,
                std::int64_t found_inf) {
    const OnDevice current(stream.device);
    const Kernel kernel = kernel_of(stream.device);
    const Parts parts(table);
    const auto* scale = reinterpret_cast<const double*>(grad_scale);
    const auto* infinities = reinterpret_cast<const float*>(found_inf);
    for (std::int64_t first = 0; first < group_count && table.tensors > 0; first += kGroupsAtOnce) {
        const std::int64_t count = std::min(kGroupsAtOnce, group_count - first);
        GroupParameters parameters{};
        std::copy_n(groups + first, count, parameters.groups);
        count_steps<<<blocks_for(table.tensors), kThreads, 0, handle(stream)>>>(
            parts.counted, reinterpret_cast<const Tensor*>(parts.rows), table.tensors, parameters, first, count, scale, infinities);
        ADEPT_FAST_CHECK(cudaGetLastError());
    }
    if (table.chunks > 0) {
        const std::int64_t resident = std::int64_t{kernel.multiprocessors} * kernel.blocks_per_multiprocessor;
        const int blocks = static_cast<int>(std::min(table.chunks, resident));
        update<<<blocks, kThreads, 0, handle(stream)>>>(parts, table.chunks, infinities);
        ADEPT_FAST_CHECK(cudaGetLastError());
    }
}

Kernel adamw_kernel(int device) {
    const OnDevice current(device);
    return kernel_of(device);
}

}  // namespace adept_fast
