// Scratch memory that outlives a call: fresh pages cost more than many a small convolution.
#pragma once

#include <cstdlib>
#include <mutex>
#include <vector>

#include "memory.h"

namespace fusedconvbn::host {

class WorkspacePool {
 public:
  // A buffer for as long as this lives, 64-byte aligned; data() is null if there is no memory left.
  class Lease {
   public:
    Lease(WorkspacePool* pool, size_t bytes) : pool_(pool), buffer_(pool->take(bytes)) {}
    ~Lease() { pool_->give_back(buffer_); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    void* data() const { return buffer_.data; }

   private:
    WorkspacePool* pool_;
    Memory buffer_;
  };

  // One for the process, never destroyed: kernels may run while it ends.
  static WorkspacePool* global() {
    static WorkspacePool* pool = new WorkspacePool;
    return pool;
  }

 private:
  static constexpr size_t kMaxIdleBuffers = 8, kMaxIdleBytes = size_t{256} << 20;

  // The smallest idle buffer that is large enough, else a new one.
  Memory take(size_t bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto best = idle_.end();
      for (auto it = idle_.begin(); it != idle_.end(); ++it)
        if (it->bytes >= bytes && (best == idle_.end() || it->bytes < best->bytes)) best = it;
      if (best != idle_.end()) {
        const Memory buffer = *best;
        idle_.erase(best);
        return buffer;
      }
    }
    return allocate(bytes);
  }

  // Keeps the buffer, and drops those idle for longest beyond the limits.
  void give_back(Memory buffer) {
    if (buffer.data == nullptr) return;
    std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(buffer);
    auto idle_bytes = [this] {
      size_t total = 0;
      for (const Memory& idle : idle_) total += idle.bytes;
      return total;
    };
    while (idle_.size() > kMaxIdleBuffers || idle_bytes() > kMaxIdleBytes) {
      std::free(idle_.front().data);
      idle_.erase(idle_.begin());
    }
  }

  std::mutex mutex_;
  std::vector<Memory> idle_;  // the one used last is the last
};

}  // namespace fusedconvbn::host
