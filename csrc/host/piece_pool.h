// Memory for pieces that are kept for long and read in every call, packed into large pages whatever their sizes:
// through pages of 4 KiB, the packed filters of a network take ten thousand page walks a call (ResNet-50 at batch 1 in
// bfloat16: 7 % of the kernels' time).
#pragma once

#include <algorithm>
#include <iterator>
#include <list>
#include <map>
#include <memory>
#include <mutex>

#include "memory.h"

namespace fusedconvbn::host {

class PiecePool {
 public:
  // Never destroyed: pieces may outlive all else.
  static PiecePool* global() {
    static PiecePool* pool = new PiecePool;
    return pool;
  }

  // 64-byte aligned, for as long as somebody refers to it; null if there is no memory left.
  std::shared_ptr<void> take(size_t bytes) {
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    const Piece piece = cut(bytes);
    if (piece.data == nullptr) return nullptr;
    return {piece.data, [this, piece, bytes](void*) { give_back(piece, bytes); }};
  }

 private:
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kBlock = size_t{16} << 20;  // the system backs what of it has been written to

  using Gaps = std::map<size_t, size_t>;  // bytes, by the offset
  struct Block {
    Gaps::iterator find(size_t bytes) {
      return std::find_if(gaps.begin(), gaps.end(), [bytes](const auto& gap) { return gap.second >= bytes; });
    }
    Memory memory;
    Gaps gaps;
  };
  using Place = std::list<Block>::iterator;

  struct Piece {
    Place block;
    size_t offset;
    void* data;  // null: there is no memory left
  };

  Piece cut(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block)
      if (auto gap = block->find(bytes); gap != block->gaps.end()) return cut(block, gap, bytes);
    const Memory memory = allocate(std::max(bytes, kBlock));
    if (memory.data == nullptr) return {};
    blocks_.push_back({memory, {{0, memory.bytes}}});
    return cut(std::prev(blocks_.end()), blocks_.back().gaps.begin(), bytes);
  }

  static Piece cut(Place block, Gaps::iterator gap, size_t bytes) {
    const auto [offset, size] = *gap;
    block->gaps.erase(gap);
    if (size > bytes) block->gaps[offset + bytes] = size - bytes;
    return {block, offset, static_cast<char*>(block->memory.data) + offset};
  }

  // Joins neighbouring gaps; a block that is one gap goes back to the system.
  void give_back(const Piece& piece, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    const Place block = piece.block;
    Gaps& gaps = block->gaps;
    auto gap = gaps.emplace(piece.offset, bytes).first;
    join(&gaps, gap, std::next(gap));
    if (gap != gaps.begin()) join(&gaps, std::prev(gap), gap);
    if (gaps.begin()->second < block->memory.bytes) return;
    std::free(block->memory.data);
    blocks_.erase(block);
  }

  static void join(Gaps* gaps, Gaps::iterator first, Gaps::iterator second) {
    if (second == gaps->end() || first->first + first->second != second->first) return;
    first->second += second->second;
    gaps->erase(second);
  }

  std::mutex mutex_;
  std::list<Block> blocks_;
};

}  // namespace fusedconvbn::host
