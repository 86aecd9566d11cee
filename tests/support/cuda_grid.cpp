// The AdamW launches of csrc/adamw.cu on the host: every (block, thread) in turn, over the same functions.

#include <vector>

#include "adamw_body.h"

namespace {

using namespace adept_fast;

template <class T>
T load(std::int64_t address) {
    T value;
    std::memcpy(&value, reinterpret_cast<const void*>(address), sizeof value);
    return value;
}

template <class T>
void store(std::int64_t address, T value) {
    std::memcpy(reinterpret_cast<void*>(address), &value, sizeof value);
}

struct HostMemory {
    static std::uint16_t load2(std::int64_t address) { return load<std::uint16_t>(address); }
    static std::uint32_t load4(std::int64_t address) { return load<std::uint32_t>(address); }
    static double load8(std::int64_t address) { return load<double>(address); }
    static Words load16(std::int64_t address) {
        aligned = aligned && address % 16 == 0;
        ++wide_accesses;
        return load<Words>(address);
    }
    static void store2(std::int64_t address, std::uint16_t value) { store(address, value); }
    static void store4(std::int64_t address, std::uint32_t value) { store(address, value); }
    static void store16(std::int64_t address, const Words& value) {
        aligned = aligned && address % 16 == 0;
        ++wide_accesses;
        store(address, value);
    }
    static bool aligned;
    static std::int64_t wide_accesses;
};
bool HostMemory::aligned = true;
std::int64_t HostMemory::wide_accesses = 0;

std::vector<std::int64_t> first_chunks_of(const Tensor* rows, std::int64_t tensors, std::int64_t& chunks) {
    std::vector<std::int64_t> first;
    chunks = 0;
    for (std::int64_t i = 0; i < tensors; ++i) {
        first.push_back(chunks);
        chunks += chunks_of(rows[i].numel);
    }
    return first;
}

}  // namespace

// For each element of tensor i, at begin[i] + its number: how often it is visited, and the multiplier it is given.
extern "C" void visit(const Tensor* rows, std::int64_t tensors, std::int64_t blocks, const std::int64_t* begin, std::uint8_t* visits,
                      std::int64_t* units) {
    std::int64_t chunks;
    const std::vector<std::int64_t> first_chunks = first_chunks_of(rows, tensors, chunks);
    for (std::int64_t block = 0; block < blocks; ++block) {
        for (std::int64_t chunk = block; chunk < chunks; chunk += blocks) {
            const std::int32_t tensor = tensor_of_chunk(first_chunks.data(), tensors, chunk);
            const Tensor& row = rows[tensor];
            const std::int64_t first = (chunk - first_chunks[tensor]) * kChunk;
            const UnitWalk walk = unit_walk(row, first);
            for (int thread = 0; thread < kThreads; ++thread) {
                for (std::uint32_t offset = thread * kWidth; offset < kChunk; offset += kTurn) {
                    Place place = place_at(walk, offset);
                    const std::uint32_t present = present_bits(first + offset, row.numel);
                    for (int k = 0; k < kWidth; ++k, to_next(walk, place)) {
                        if (present >> k & 1u) {
                            ++visits[begin[tensor] + first + offset + k];
                            units[begin[tensor] + first + offset + k] = place.unit;
                        }
                    }
                }
            }
        }
    }
}

// The multiplier of element chunk * kChunk + offset, for tensors too large to walk.
extern "C" std::int64_t unit_of(const Tensor* row, std::int64_t chunk, std::uint32_t offset) {
    return place_at(unit_walk(*row, chunk * kChunk), offset).unit;
}

// A step; returns the number of 16-byte accesses, or -1 where one was misaligned.
extern "C" std::int64_t step(const Tensor* rows, std::int64_t tensors, const Group* groups, std::int64_t blocks, double grad_scale) {
    HostMemory::aligned = true;
    HostMemory::wide_accesses = 0;
    std::int64_t chunks;
    const std::vector<std::int64_t> first_chunks = first_chunks_of(rows, tensors, chunks);
    std::vector<Counted> counted;
    for (std::int64_t i = 0; i < tensors; ++i) {
        counted.push_back(advance<HostMemory>(rows[i], groups[rows[i].group], grad_scale));
    }
    for (std::int64_t block = 0; block < blocks; ++block) {
        for (int thread = 0; thread < kThreads; ++thread) {
            for (std::int64_t chunk = block; chunk < chunks; chunk += blocks) {
                const std::int32_t tensor = tensor_of_chunk(first_chunks.data(), tensors, chunk);
                update_chunk<HostMemory>(rows[tensor], counted[tensor], chunk - first_chunks[tensor], thread);
            }
        }
    }
    return HostMemory::aligned ? HostMemory::wide_accesses : -1;
}
