// Fibres, checked memory, launches and graphs of the emulator, and functions for ctypes.

#include "cuda_emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <map>
#include <random>

#include "adamw_cuda.h"

Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

Machine machine;

namespace {

std::mt19937_64 randomness(1);

// Checked memory: what each byte allows, and the last launch and thread that read and wrote it.
constexpr std::uint8_t kReads = 1, kWrites = 2;
constexpr std::uint32_t kSeveral = 0xffffffffu;
struct Use {
    std::uint32_t launch = 0, thread = 0;
};
std::uintptr_t arena = 0;
std::vector<std::uint8_t> allowed;
std::vector<Use> read_by, written_by;
std::uint32_t launch_number = 0;
std::int64_t faults = 0, wide_accesses = 0;
std::string first_fault;

void report(const std::string& fault) {
    if (faults++ == 0) {
        first_fault = fault;
    }
}

struct Fibre {
    enum State { kReady, kAtBarrier, kDone };
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(128 << 10);
    State state = kReady;
};
ucontext_t scheduler;
std::vector<std::unique_ptr<Fibre>> fibres;
Fibre* running = nullptr;
const std::function<void()>* running_body = nullptr;

void enter() {
    (*running_body)();
    running->state = Fibre::kDone;
    swapcontext(&running->context, &scheduler);
}

void run_block(int threads, const std::function<void()>& body) {
    while (static_cast<int>(fibres.size()) < threads) {
        fibres.push_back(std::make_unique<Fibre>());
    }
    running_body = &body;
    std::vector<int> ready(threads);
    for (int i = 0; i < threads; ++i) {
        Fibre& fibre = *fibres[i];
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.data();
        fibre.context.uc_stack.ss_size = fibre.stack.size();
        fibre.context.uc_link = &scheduler;
        makecontext(&fibre.context, enter, 0);
        fibre.state = Fibre::kReady;
        ready[i] = i;
    }
    while (!ready.empty()) {
        std::swap(ready[randomness() % ready.size()], ready.back());
        const int thread = ready.back();
        ready.pop_back();
        running = fibres[thread].get();
        threadIdx.x = static_cast<unsigned>(thread);
        swapcontext(&scheduler, &running->context);
        const int first = thread / 32 * 32, end = std::min(threads, first + 32);
        int waiting = 0, done = 0;
        for (int i = first; i < end; ++i) {
            waiting += fibres[i]->state == Fibre::kAtBarrier;
            done += fibres[i]->state == Fibre::kDone;
        }
        if (waiting > 0 && waiting + done == end - first) {
            if (done > 0) {
                report("__syncwarp without the lanes that have ended");
            }
            for (int i = first; i < end; ++i) {
                if (fibres[i]->state == Fibre::kAtBarrier) {
                    fibres[i]->state = Fibre::kReady;
                    ready.push_back(i);
                }
            }
        }
    }
}

struct Operation {
    std::int64_t grid;
    int block;
    std::function<void()> body;
};
std::map<cudaStream_t, std::vector<Operation>> queues;
std::vector<Operation> graph;
bool deferred = false, capturing = false;
std::int64_t launches = 0, largest_parameters = 0;

void run(const Operation& operation) {
    ++launch_number;
    blockDim.x = static_cast<unsigned>(operation.block);
    gridDim.x = static_cast<unsigned>(operation.grid);
    std::vector<unsigned> order(static_cast<std::size_t>(operation.grid));
    for (std::size_t i = 0; i < order.size(); ++i) {
        order[i] = static_cast<unsigned>(i);
    }
    std::shuffle(order.begin(), order.end(), randomness);
    for (const unsigned block : order) {
        blockIdx.x = block;
        run_block(operation.block, operation.body);
    }
}

}  // namespace

void touch(std::uintptr_t address, int bytes, bool write) {
    if (address % bytes != 0) {
        report("an access of " + std::to_string(bytes) + " bytes is misaligned");
    }
    wide_accesses += bytes == 16;
    if (arena == 0) {
        return;
    }
    if (address < arena || address + bytes > arena + allowed.size()) {
        report("an access outside of all memory");
        return;
    }
    const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    const auto races = [&](const Use& use) { return use.launch == launch_number && use.thread != thread; };
    for (std::size_t at = address - arena; at < address - arena + bytes; ++at) {
        if (!(allowed[at] & (write ? kWrites : kReads))) {
            report(write ? "a write to bytes that no tensor may be written at" : "a read of bytes of no tensor");
            return;
        }
        if (races(written_by[at]) || (write && races(read_by[at]))) {
            report("a race between two threads");
        }
        Use& use = write ? written_by[at] : read_by[at];
        use = {launch_number, races(use) ? kSeveral : thread};
    }
}

void enqueue(std::int64_t grid, int block, cudaStream_t stream, std::size_t parameter_bytes, std::function<void()> body) {
    ++launches;
    largest_parameters = std::max(largest_parameters, static_cast<std::int64_t>(parameter_bytes));
    if (grid < 1 || grid > 2147483647 || block < 1 || block > 1024) {
        machine.error = cudaErrorInvalidConfiguration;
    } else if (parameter_bytes > 32764) {
        machine.error = cudaErrorInvalidValue;
    } else if (Operation operation{grid, block, std::move(body)}; capturing) {
        graph.push_back(std::move(operation));
    } else if (deferred) {
        queues[stream].push_back(std::move(operation));
    } else {
        run(operation);
    }
}

}  // namespace emulator

void __syncwarp() {
    emulator::running->state = emulator::Fibre::kAtBarrier;
    swapcontext(&emulator::running->context, &emulator::scheduler);
}

namespace {

// Returns what thread `source` of the block passes. All lanes of the warp take part.
unsigned passed(unsigned value, unsigned source) {
    static unsigned values[1024];
    values[threadIdx.x] = value;
    __syncwarp();
    const unsigned found = values[source];
    __syncwarp();
    return found;
}

}  // namespace

unsigned __shfl_xor_sync(unsigned, unsigned value, int distance) { return passed(value, threadIdx.x ^ static_cast<unsigned>(distance)); }

float __shfl_sync(unsigned, float value, int lane, int width) {
    unsigned bits, source = threadIdx.x / static_cast<unsigned>(width) * static_cast<unsigned>(width) + static_cast<unsigned>(lane);
    std::memcpy(&bits, &value, sizeof bits);
    bits = passed(bits, source);
    std::memcpy(&value, &bits, sizeof bits);
    return value;
}

// Functions that may fail return 1 and write the message to `error`, of 256 bytes.
namespace {

template <class Body>
int guarded(char* error, const Body& body) {
    try {
        body();
        return 0;
    } catch (const std::exception& raised) {
        std::snprintf(error, 256, "%s", raised.what());
        return 1;
    }
}

using namespace adept_fast;

}  // namespace

extern "C" {

void set_machine(int multiprocessors, int blocks_per_multiprocessor, std::uint64_t seed) {
    emulator::machine.multiprocessors = multiprocessors;
    emulator::machine.blocks_per_multiprocessor = blocks_per_multiprocessor;
    emulator::randomness.seed(seed);
}

// Checks all accesses from now on to be inside of `bytes` from `address`; 0: checks alignment alone.
void set_arena(std::uintptr_t address, std::size_t bytes) {
    emulator::arena = address;
    emulator::allowed.assign(bytes, 0);
    emulator::read_by.assign(bytes, {});
    emulator::written_by.assign(bytes, {});
    emulator::launch_number = 0;
}

void allow(std::uintptr_t address, std::size_t bytes, int writes) {
    std::fill_n(emulator::allowed.begin() + static_cast<std::ptrdiff_t>(address - emulator::arena), bytes,
                emulator::kReads | (writes ? emulator::kWrites : 0));
}

// Returns the number of faults since the last call, and writes the first.
std::int64_t take_faults(char* first) {
    std::snprintf(first, 256, "%s", emulator::first_fault.c_str());
    return std::exchange(emulator::faults, 0);
}

// Returns the launches, the 16-byte accesses and the largest parameters in bytes since the last call.
void take_counts(std::int64_t* counts) {
    counts[0] = std::exchange(emulator::launches, 0);
    counts[1] = std::exchange(emulator::wide_accesses, 0);
    counts[2] = std::exchange(emulator::largest_parameters, 0);
}

// deferred: launches wait for drain(). capturing: launches become the graph, which replay() runs.
void set_mode(int deferred, int capturing) {
    if (capturing && !emulator::capturing) {
        emulator::graph.clear();
    }
    emulator::deferred = deferred != 0;
    emulator::capturing = capturing != 0;
}

void replay() {
    for (const auto& operation : emulator::graph) {
        emulator::run(operation);
    }
}

// Runs what waits: streams in random order, each stream in its own order.
void drain() {
    for (;;) {
        std::vector<cudaStream_t> waiting;
        for (const auto& [stream, operations] : emulator::queues) {
            if (!operations.empty()) {
                waiting.push_back(stream);
            }
        }
        if (waiting.empty()) {
            return;
        }
        auto& operations = emulator::queues[waiting[emulator::randomness() % waiting.size()]];
        const emulator::Operation operation = operations.front();
        operations.erase(operations.begin());
        emulator::run(operation);
    }
}

// Returns the number of update kernels, and writes the chunks of each and the bytes of the table.
int table_size(const void* rows, std::int64_t tensors, std::int64_t* chunks, std::int64_t* bytes) {
    const TableSize size = adamw_table_size(static_cast<const Tensor*>(rows), tensors);
    std::copy(size.chunks.begin(), size.chunks.end(), chunks);
    *bytes = size.bytes;
    return static_cast<int>(size.chunks.size());
}

int write_table(int device, std::int64_t stream, std::int64_t address, const std::int64_t* chunks, int kernels, const void* rows,
                std::int64_t tensors, char* error) {
    return guarded(error, [&] { adamw_write_table({device, stream}, {address, tensors, {chunks, chunks + kernels}}, static_cast<const Tensor*>(rows)); });
}

int step(int device, std::int64_t stream, std::int64_t address, std::int64_t tensors, const std::int64_t* chunks, int kernels,
         const void* groups, std::int64_t group_count, std::int64_t grad_scale, std::int64_t found_inf, char* error) {
    return guarded(error, [&] {
        adamw_step({device, stream}, {address, tensors, {chunks, chunks + kernels}}, static_cast<const Group*>(groups), group_count, grad_scale,
                   found_inf);
    });
}

}
