// Memory of results that the caches hold. The next result takes what was given back last, whose lines are still there,
// and in large pages. TensorFlow's allocator takes the smallest gap that fits, of small pages, and takes 1 us longer
// (ResNet-50 at batch 1 in bfloat16: 2 % of all).
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "piece_pool.h"
#include "tensorflow/core/framework/allocation_description.pb.h"
#include "tensorflow/core/framework/tensor.h"

namespace fusedconvbn::tf {

class OutputMemory {
 public:
  // Smaller results cost TensorFlow less; larger ones go past the caches.
  static constexpr size_t kMinBytes = size_t{32} << 10, kMaxBytes = size_t{4} << 20;

  // One for the process, never destroyed: tensors may outlive all else.
  static OutputMemory* global() {
    static OutputMemory* memory = new OutputMemory;
    return memory;
  }

  // Of this type and shape, and of kMinBytes to kMaxBytes; not initialized if there is no memory left.
  tensorflow::Tensor take(tensorflow::DataType dtype, const tensorflow::TensorShape& shape) {
    const size_t bytes = shape.num_elements() * tensorflow::DataTypeSize(dtype);
    Piece piece = take_idle(bytes);
    if (!piece.data) piece = {pieces_.take(bytes), bytes};
    if (!piece.data) return tensorflow::Tensor(dtype);
    auto* const buffer = new Buffer(this, std::move(piece), bytes);
    return {dtype, shape, tensorflow::core::RefCountPtr<tensorflow::TensorBuffer>(buffer)};
  }

 private:
  // Of idle memory: more than a network has results at a time, and little beside its filters.
  static constexpr size_t kMaxIdlePieces = 32, kMaxIdleBytes = size_t{32} << 20;

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

  // The smallest that is large enough, and at most twice as large; of equal ones that which was used last.
  Piece take_idle(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it)
      if (it->bytes >= bytes && it->bytes <= 2 * bytes && (best == idle_.end() || it->bytes <= best->bytes)) best = it;
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
    while (idle_.size() > kMaxIdlePieces || idle_bytes_ > kMaxIdleBytes) {
      idle_bytes_ -= idle_.front().bytes;
      dropped.push_back(std::move(idle_.front()));
      idle_.erase(idle_.begin());
    }
  }

  PiecePool pieces_;
  std::mutex mutex_;
  std::vector<Piece> idle_;  // the one used last is the last
  size_t idle_bytes_ = 0;
};

}  // namespace fusedconvbn::tf
