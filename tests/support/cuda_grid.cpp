// The elements that the threads of csrc/adamw.cu visit, and their units.

#include <vector>

#include "adamw_body.h"

namespace {

using namespace adept_fast;

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

// For each element of tensor i, at begin[i] + its number: how often it is visited, and the multiplier it is given. gap: see gap_of.
extern "C" void visit(const Tensor* rows, std::int64_t tensors, std::int64_t blocks, std::uint32_t gap, const std::int64_t* begin, std::uint8_t* visits,
                      std::int64_t* units) {
    std::int64_t chunks;
    const std::vector<std::int64_t> first_chunks = first_chunks_of(rows, tensors, chunks);
    for (std::int64_t block = 0; block < blocks; ++block) {
        for (std::int64_t chunk = block; chunk < chunks; chunk += blocks) {
            const std::int32_t tensor = tensor_of_chunk(first_chunks.data(), 1, tensors, chunk);
            const Tensor& row = rows[tensor];
            const std::int64_t first = (chunk - first_chunks[tensor]) * kChunk;
            const UnitWalk walk = unit_walk(row, first);
            for (int thread = 0; thread < kThreads; ++thread) {
                for (std::uint32_t offset = offset_of(gap, thread); offset < kChunk; offset += kTurn) {
                    for (int k = 0; k < kWidth; ++k) {
                        const std::int64_t element = first + offset + after_first(gap, k);
                        if (element < row.numel) {
                            ++visits[begin[tensor] + element];
                            units[begin[tensor] + element] = place_at(walk, offset + after_first(gap, k)).unit;
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
