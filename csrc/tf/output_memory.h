// Memory of results, in large pages. Of those that the caches hold the next one takes what was given back last, whose
// lines are still there; TensorFlow's allocator takes the smallest gap that fits, of small pages, and takes 1 us longer
// (ResNet-50 at batch 1 in bfloat16: 2 % of all). Larger ones go past the caches and take what was given back first.
// From 32 MB on, C's allocator would have new memory from the system for each, whose first use takes longer than the
// convolution where the host of a virtual machine has to find it, too.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "../host/piece_pool.h"
#include "tensorflow/core/framework/allocation_description.pb.h"
#include "tensorflow/core/framework/tensor.h"

namespace fusedconvbn::tf {

class OutputMemory {
 public:
  // Smaller results cost TensorFlow less; larger ones than kMaxCached go past the caches.
  static constexpr size_t kMinBytes = size_t{32} << 10, kMaxCached = size_t{4} << 20;

  // The process's for results of so many bytes. Never destroyed: tensors may outlive all else. Of idle memory, small
  // pieces are more than a network has results at a time, and little beside its filters; large ones, what a residual
  // block has.
  static OutputMemory* of(size_t bytes) {
    static OutputMemory* cached = new OutputMemory(32, size_t{32} << 20, true);
    static OutputMemory* large = new OutputMemory(8, size_t{256} << 20, false);
    return bytes <= kMaxCached ? cached : large;
  }

  // Of this type and shape; nothing if there is no memory left.
  std::optional<tensorflow::Tensor> take(tensorflow::DataType dtype, const tensorflow::TensorShape& shape) {
    const size_t bytes = shape.num_elements() * tensorflow::DataTypeSize(dtype);
    Piece piece = take_idle(bytes);
    if (!piece.data) piece = {pieces_.take(bytes), bytes};
    if (!piece.data) return std::nullopt;
    auto* const buffer = new Buffer(this, std::move(piece), bytes);
    return tensorflow::Tensor(dtype, shape, tensorflow::core::RefCountPtr<tensorflow::TensorBuffer>(buffer));
  }

 private:
  OutputMemory(size_t max_idle_pieces, size_t max_idle_bytes, bool used_last)
      : max_idle_pieces_(max_idle_pieces), max_idle_bytes_(max_idle_bytes), used_last_(used_last) {}

  struct Piece {
    std::shared_ptr<void> data;
    size_t bytes = 0;
  };

  class Buffer : public tensorflow::TensorBuffer {
   public:
    Buffer(OutputMemory* memory, Piece piece, size_t bytes)
        : TensorBuffer(piece.data.get()), memory_(memory), piece_(std::move(piece)), bytes_(bytes) {}
    ~Buffer() override { memory_->give_back(std::move(piece_)); }
    size_t size() const override { return bytes_; }
    tensorflow::TensorBuffer* root_buffer() override { return this; }
    tensorflow::AllocatorMemoryType GetMemoryType() const override {
      return tensorflow::AllocatorMemoryType::kHostPageable;
    }
    void FillAllocationDescription(tensorflow::AllocationDescription* description) const override {
      description->set_requested_bytes(static_cast<int64_t>(bytes_));
      description->set_allocated_bytes(static_cast<int64_t>(piece_.bytes));
      description->set_allocator_name("fusedconvbn");
    }

   private:
    OutputMemory* const memory_;
    Piece piece_;
    const size_t bytes_;
  };

  // The smallest that is large enough, and at most twice as large; of equal ones that which was used last, or first.
  Piece take_idle(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it)
      if (it->bytes >= bytes && it->bytes <= 2 * bytes &&
          (best == idle_.end() || it->bytes < best->bytes || (used_last_ && it->bytes == best->bytes)))
        best = it;
    if (best == idle_.end()) return {};
    Piece piece = std::move(*best);
    idle_.erase(best);
    idle_bytes_ -= piece.bytes;
    return piece;
  }

  // Keeps the piece, and drops those idle for longest beyond the limits: the system may take long to take memory back,
  // and others wait for the lock.
  void give_back(Piece piece) {
    std::vector<Piece> dropped;
    std::lock_guard<std::mutex> lock(mutex_);
    idle_bytes_ += piece.bytes;
    idle_.push_back(std::move(piece));
    while (idle_.size() > max_idle_pieces_ || idle_bytes_ > max_idle_bytes_) {
      idle_bytes_ -= idle_.front().bytes;
      dropped.push_back(std::move(idle_.front()));
      idle_.erase(idle_.begin());
    }
  }

  const size_t max_idle_pieces_, max_idle_bytes_;
  const bool used_last_;
  host::PiecePool pieces_;
  std::mutex mutex_;
  std::vector<Piece> idle_;  // the one used last is the last
  size_t idle_bytes_ = 0;
};

}  // namespace fusedconvbn::tf
