// What csrc/adamw.cu uses of CUDA, on the CPU. Threads of a block are fibres that run in random order and meet at __syncwarp and shuffles; blocks
// run in random order. Accesses through __ldcs, __stcs and __ldg are checked. Arithmetic is the CPU's: csrc rounds every operation once, as a GPU does.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define CUDART_VERSION 13000
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
    unsigned x = 0;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;
void __syncwarp();
unsigned __shfl_xor_sync(unsigned lanes, unsigned value, int distance);
float __shfl_sync(unsigned lanes, float value, int lane, int width);

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101 };
enum { cudaDevAttrMultiProcessorCount };

namespace emulator {

struct Machine {
    int multiprocessors = 2, blocks_per_multiprocessor = 2, devices = 2, device = 0, error = cudaSuccess;
};
extern Machine machine;

// Reports an access that is misaligned, outside of every tensor, to a tensor that is only read, or that races with another thread's.
void touch(std::uintptr_t address, int bytes, bool write);

void enqueue(std::int64_t grid, int block, cudaStream_t stream, std::size_t parameter_bytes, std::function<void()> body);

template <class... P>
struct Launch {
    void (*kernel)(P...);
    std::int64_t grid;
    int block;
    std::size_t shared;
    cudaStream_t stream;

    // Copies the parameters, as a launch does.
    template <class... A>
    void operator()(A&&... arguments) const {
        std::size_t bytes = 0;
        ((bytes = (bytes + alignof(P) - 1) / alignof(P) * alignof(P) + sizeof(P)), ...);
        auto copied = std::make_shared<std::tuple<std::decay_t<P>...>>(std::forward<A>(arguments)...);
        enqueue(grid, block, stream, bytes, [kernel = kernel, copied] { std::apply([&](auto&... each) { kernel(each...); }, *copied); });
    }
};

template <class... P>
Launch<P...> launch(void (*kernel)(P...), std::int64_t grid, int block, std::size_t shared, cudaStream_t stream) {
    return {kernel, grid, block, shared, stream};
}

}  // namespace emulator

template <class T>
T __ldcs(const T* address) {
    emulator::touch(reinterpret_cast<std::uintptr_t>(address), sizeof(T), false);
    T value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

template <class T>
T __ldg(const T* address) {
    return __ldcs(address);
}

template <class T>
void __stcs(T* address, T value) {
    emulator::touch(reinterpret_cast<std::uintptr_t>(address), sizeof(T), true);
    std::memcpy(address, &value, sizeof value);
}

inline const char* cudaGetErrorString(cudaError_t code) {
    static std::string text;
    text = "emulated error " + std::to_string(code);
    return text.c_str();
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = emulator::machine.device;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= emulator::machine.devices) {
        return cudaErrorInvalidDevice;
    }
    emulator::machine.device = device;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(emulator::machine.error, static_cast<int>(cudaSuccess)); }
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F, int, std::size_t) {
    *blocks = emulator::machine.blocks_per_multiprocessor;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
    *value = emulator::machine.multiprocessors;
    return cudaSuccess;
}
