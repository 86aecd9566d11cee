// AdamW over a table of tensors. One launch increments the steps, as threads that read a step would race with its update. Then one launch per
// set-up updates the whole chunks of its tensors, and one the rest: ends of tensors, misaligned ones, rare set-ups. One more takes the whole
// chunks of groups with a beta below 1/2. Untested on a GPU.

#include <algorithm>
#include <array>
#include <map>
#include <mutex>

#include "adamw_table.h"
#include "cuda_check.h"

namespace adept_fast {
namespace {

// Words that a launch can take by value, beside its other parameters. Small launches take few, as each launch copies all.
constexpr std::int64_t kParameterWords = CUDART_VERSION >= 12010 ? 4000 : 500;
constexpr std::int64_t kGroupsAtOnce = kParameterWords / (sizeof(Group) / 8), kFewGroups = 8;

template <std::int64_t kCount>
struct Parameters {
    std::int64_t words[kCount];
};

template <std::int64_t kCount>
struct GroupParameters {
    Group groups[kCount];
};

// Accesses to global memory, which the compiler cannot infer for addresses from a table. Tensors are used once per step, so they are evicted
// first, which leaves the caches to tables and multipliers.
struct DeviceMemory {
    template <class T>
    static __device__ __forceinline__ T* at(std::int64_t address) {
        return reinterpret_cast<T*>(address);
    }
    static __device__ __forceinline__ std::uint8_t load1(std::int64_t address) { return __ldcs(at<const unsigned char>(address)); }
    static __device__ __forceinline__ std::uint16_t load2(std::int64_t address) { return __ldcs(at<const unsigned short>(address)); }
    static __device__ __forceinline__ std::uint32_t load4(std::int64_t address) { return __ldcs(at<const unsigned>(address)); }
    static __device__ __forceinline__ double load8(std::int64_t address) { return __ldcs(at<const double>(address)); }
    static __device__ __forceinline__ Words load16(std::int64_t address) {
        const uint4 value = __ldcs(at<const uint4>(address));
        return {{value.x, value.y, value.z, value.w}};
    }
    static __device__ __forceinline__ Pair load_pair(std::int64_t address) {
        const uint2 value = __ldcs(at<const uint2>(address));
        return {{value.x, value.y}};
    }
    static __device__ __forceinline__ std::uint32_t load_kept4(std::int64_t address) { return __ldg(at<const unsigned>(address)); }
    static __device__ __forceinline__ void store1(std::int64_t address, std::uint8_t value) { __stcs(at<unsigned char>(address), value); }
    static __device__ __forceinline__ void store2(std::int64_t address, std::uint16_t value) { __stcs(at<unsigned short>(address), value); }
    static __device__ __forceinline__ void store4(std::int64_t address, std::uint32_t value) { __stcs(at<unsigned>(address), value); }
    static __device__ __forceinline__ void store_pair(std::int64_t address, const Pair& value) {
        __stcs(at<uint2>(address), make_uint2(value.word[0], value.word[1]));
    }
    static __device__ __forceinline__ void store16(std::int64_t address, const Words& value) {
        __stcs(at<uint4>(address), make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]));
    }
    static __device__ __forceinline__ std::uint32_t exchanged(std::uint32_t value, int distance) {
        return __shfl_xor_sync(0xffffffffu, value, distance);
    }
    static __device__ __forceinline__ float from_lane(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane, kLanes); }
};

template <std::int64_t kCount>
__global__ void write_words(std::int64_t* target, const __grid_constant__ Parameters<kCount> source, int count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        target[i] = source.words[i];
    }
}

// word: that of Span which numbers these chunks.
__global__ void map_chunks(std::int32_t* tensor_of_each, const std::int64_t* spans, int word, std::int64_t tensors, std::int64_t chunks) {
    const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
    for (std::int64_t chunk = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; chunk < chunks; chunk += stride) {
        tensor_of_each[chunk] = tensor_of_chunk(spans + word, kSpanWords, tensors, chunk);
    }
}

// One thread per tensor. Skips tensors of groups outside of first_group ... first_group + group_count - 1.
template <std::int64_t kCount>
__global__ void __launch_bounds__(kThreads)
    count_steps(Counted* counted, const Tensor* rows, std::int64_t tensors, const __grid_constant__ GroupParameters<kCount> parameters,
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
    Span span;
    Counted counted;
};

static __device__ __forceinline__ std::int64_t fetch(const Parts& parts, std::int64_t tensor, int lane) {
    if (lane < kRowWords) {
        return parts.rows[kRowWords * tensor + lane];
    }
    if (lane < kRowWords + kSpanWords) {
        return parts.spans[kSpanWords * tensor + lane - kRowWords];
    }
    return lane < kRowWords + kSpanWords + kCountedWords
               ? reinterpret_cast<const std::int64_t*>(parts.counted + tensor)[lane - kRowWords - kSpanWords]
               : 0;
}

// Calls body(entry, chunk) for the block's chunks of first ... end - 1. Blocks are persistent. Each warp has its own entry, so that warps never
// wait for each other, and prefetches the next one.
template <class Body>
static __device__ __forceinline__ void for_chunks(const Parts& parts, const std::int32_t* tensor_of_each, std::int64_t first,
                                                  std::int64_t end, const Body& body) {
    __shared__ Entry entries[kThreads / kWarp];
    Entry& entry = entries[threadIdx.x / kWarp];
    const int lane = threadIdx.x % kWarp;
    std::int64_t chunk = first + blockIdx.x;
    std::int64_t word = chunk < end ? fetch(parts, tensor_of_each[chunk], lane) : 0;
    std::int64_t next = chunk + gridDim.x;
    std::int32_t next_tensor = next < end ? tensor_of_each[next] : 0;
    while (chunk < end) {
        __syncwarp();
        if (lane < static_cast<int>(sizeof(Entry) / 8)) {
            reinterpret_cast<std::int64_t*>(&entry)[lane] = word;
        }
        __syncwarp();
        word = fetch(parts, next_tensor, lane);
        const std::int64_t after = next + gridDim.x;
        next_tensor = after < end ? tensor_of_each[after] : 0;
        body(entry, chunk);
        chunk = next;
        next = after;
    }
}

// Whole chunks first ... end - 1, all of one set-up. Three blocks a multiprocessor leave 80 registers a thread, too few for multipliers.
template <int kKernel>
__global__ void __launch_bounds__(kThreads, kKernel % 2 ? 2 : 3) update_whole(const Parts parts, std::int64_t first, std::int64_t end, const float* found_inf) {
    if (found_inf != nullptr && *found_inf != 0.0f) {
        return;
    }
    for_chunks(parts, parts.tensor_of_whole, first, end, [](const Entry& entry, std::int64_t chunk) {
        if (is_slow(entry.counted.scalars)) {
            constexpr Setup setup = setup_of(kKernel);
            update_whole_chunk<DeviceMemory>(setup, entry.row, entry.counted, chunk - entry.span.first_whole, threadIdx.x);
        }
    });
}

// Chunks 0 ... end - 1 of any set-up: of the rest (first: 0), or the whole ones that update_whole leaves (first: kWhole).
constexpr std::int64_t kWhole = -1;
__global__ void __launch_bounds__(kThreads, 2) update_rest(const Parts parts, std::int64_t first, std::int64_t end, const float* found_inf) {
    if (found_inf != nullptr && *found_inf != 0.0f) {
        return;
    }
    const bool whole = first == kWhole;
    for_chunks(parts, whole ? parts.tensor_of_whole : parts.tensor_of_rest, 0, end, [=](const Entry& entry, std::int64_t chunk) {
        if (!(whole && is_slow(entry.counted.scalars))) {
            const std::int64_t number = whole ? chunk - entry.span.first_whole : entry.span.whole + chunk - entry.span.first_rest;
            update_any_chunk<DeviceMemory>(entry.row, entry.counted, number, threadIdx.x);
        }
    });
}

using Update = void (*)(Parts, std::int64_t, std::int64_t, const float*);

template <int... kIndices>
constexpr std::array<Update, kKernels> all_kernels(std::integer_sequence<int, kIndices...>) {
    return {update_whole<kIndices>..., update_rest};
}

const std::array<Update, kKernels>& kernels() {
    static const std::array<Update, kKernels> found = all_kernels(std::make_integer_sequence<int, kRest>{});
    return found;
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

// Returns the number of blocks of a kernel that run at a time on a device, which must be current.
std::int64_t resident_blocks(int device, int kernel) {
    static std::mutex mutex;
    static std::map<std::pair<int, int>, std::int64_t> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find({device, kernel});
    if (found != known.end()) {
        return found->second;
    }
    int each = 0, multiprocessors = 0;
    ADEPT_FAST_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernels()[kernel], kThreads, 0));
    ADEPT_FAST_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    return known[{device, kernel}] = std::int64_t{each} * multiprocessors;
}

cudaStream_t handle(Stream stream) { return reinterpret_cast<cudaStream_t>(stream.handle); }

int blocks_for(std::int64_t items) { return static_cast<int>((items + kThreads - 1) / kThreads); }

// Whether an average of the group may move from the new value (is_slow). Betas on the device are not known here.
bool may_be_fast(const Group& group) {
    return (group.beta1_address == 0 ? group.beta1 : 0.0) < 0.5 || (group.beta2_address == 0 ? group.beta2 : 0.0) < 0.5;
}

template <std::int64_t kCount>
void write(std::int64_t* target, const std::int64_t* words, std::int64_t count, Stream stream) {
    Parameters<kCount> source{};
    std::copy_n(words, count, source.words);
    write_words<kCount><<<1, kThreads, 0, handle(stream)>>>(target, source, static_cast<int>(count));
    ADEPT_FAST_CHECK(cudaGetLastError());
}

template <std::int64_t kCount>
void count(const Parts& parts, std::int64_t tensors, const Group* groups, std::int64_t first, std::int64_t group_count, Stream stream,
           const double* grad_scale, const float* found_inf) {
    GroupParameters<kCount> parameters{};
    std::copy_n(groups + first, group_count, parameters.groups);
    count_steps<kCount><<<blocks_for(tensors), kThreads, 0, handle(stream)>>>(parts.counted, reinterpret_cast<const Tensor*>(parts.rows), tensors,
                                                                          parameters, first, group_count, grad_scale, found_inf);
    ADEPT_FAST_CHECK(cudaGetLastError());
}

void map(std::int32_t* target, const Parts& parts, int word, std::int64_t tensors, std::int64_t chunks, Stream stream) {
    if (chunks > 0) {
        const int blocks = blocks_for(std::min<std::int64_t>(chunks, 1 << 20));
        map_chunks<<<blocks, kThreads, 0, handle(stream)>>>(target, parts.spans, word, tensors, chunks);
        ADEPT_FAST_CHECK(cudaGetLastError());
    }
}

}  // namespace

TableSize adamw_table_size(const Tensor* rows, std::int64_t tensors) {
    TableSize size{std::vector<std::int64_t>(kKernels), 0};
    for (std::int64_t i = 0; i < tensors; ++i) {
        const int kernel = kernel_of(rows[i]);
        const std::int64_t whole = whole_chunks(rows[i], kernel);
        size.chunks[kernel] += whole;
        size.chunks[kRest] += chunks_of(slots_of(rows[i])) - whole;
    }
    const std::int64_t chunks = std::accumulate(size.chunks.begin(), size.chunks.end(), std::int64_t{0});
    size.bytes = tensors * static_cast<std::int64_t>(sizeof(Tensor) + sizeof(Counted)) +
                 (tensors + 1) * static_cast<std::int64_t>(sizeof(Span)) + chunks * static_cast<std::int64_t>(sizeof(std::int32_t));
    return size;
}

void adamw_write_table(Stream stream, const Table& table, const Tensor* rows) {
    const OnDevice current(stream.device);
    const Content content(rows, table.tensors);
    const Parts parts(table.address, table.tensors, content.whole);
    const std::int64_t total = static_cast<std::int64_t>(content.words.size());
    constexpr std::int64_t kFewWords = 256;
    for (std::int64_t first = 0; first < total; first += kParameterWords) {
        const std::int64_t count = std::min(kParameterWords, total - first);
        (count <= kFewWords ? write<kFewWords> : write<kParameterWords>)(parts.rows + first, content.words.data() + first, count, stream);
    }
    map(parts.tensor_of_whole, parts, 0, table.tensors, content.whole, stream);
    map(parts.tensor_of_rest, parts, 1, table.tensors, content.rest, stream);
}

void adamw_step(Stream stream, const Table& table, const Group* groups, std::int64_t group_count, std::int64_t grad_scale,
                std::int64_t found_inf) {
    if (table.chunks.size() != kKernels) {
        throw std::invalid_argument("chunks of another number of kernels");
    }
    const OnDevice current(stream.device);
    const std::int64_t whole = total_whole(table.chunks);
    const Parts parts(table.address, table.tensors, whole);
    const auto* scale = reinterpret_cast<const double*>(grad_scale);
    const auto* infinities = reinterpret_cast<const float*>(found_inf);
    for (std::int64_t first = 0; first < group_count && table.tensors > 0; first += kGroupsAtOnce) {
        const std::int64_t some = std::min(kGroupsAtOnce, group_count - first);
        (some <= kFewGroups ? count<kFewGroups> : count<kGroupsAtOnce>)(parts, table.tensors, groups, first, some, stream, scale, infinities);
    }
    const auto launch = [&](int kernel, std::int64_t first, std::int64_t chunks, std::int64_t end) {
        if (chunks > 0) {
            const int blocks = static_cast<int>(std::min(chunks, resident_blocks(stream.device, kernel)));
            kernels()[kernel]<<<blocks, kThreads, 0, handle(stream)>>>(parts, first, end, infinities);
            ADEPT_FAST_CHECK(cudaGetLastError());
        }
    };
    std::int64_t first = 0;
    for (int kernel = 0; kernel < kRest; ++kernel) {
        const std::int64_t chunks = table.chunks[kernel];
        launch(kernel, first, chunks, first + chunks);
        first += chunks;
    }
    launch(kRest, 0, table.chunks[kRest], table.chunks[kRest]);
    if (std::any_of(groups, groups + group_count, may_be_fast)) {
        launch(kRest, kWhole, whole, whole);
    }
}

}  // namespace adept_fast
