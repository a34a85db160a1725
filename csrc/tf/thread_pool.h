// The core's ParallelFor on TensorFlow's intra-op threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "../conv_bn.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace fusedconvbn::tf {

// The caller works too and waits only for tasks that have begun: helpers that no thread of the pool ever takes up cost
// nothing, so any number of ops may share a pool, and one may run on a thread of that pool, and none hangs.
class IntraOpThreads : public ParallelFor {
 public:
  explicit IntraOpThreads(tensorflow::OpKernelContext* context)
      : pool_(context->device()->tensorflow_cpu_worker_threads()) {}

  int threads() const override { return std::max(1, pool_->num_threads); }

  void run(int64_t tasks, const Body& body) override {
    const int helpers = static_cast<int>(std::min<int64_t>(threads(), tasks)) - 1;
    auto work = std::make_shared<Work>(tasks, body);
    for (int worker = 1; worker <= helpers; ++worker) pool_->workers->Schedule([work, worker] { work->claim(worker); });
    work->claim(0);
    work->wait();
  }

 private:
  // Helpers may outlive the call, so they share this; only one that has claimed a task, for which the call then waits,
  // may use `body`, which is the caller's.
  struct Work {
    Work(int64_t tasks, const Body& body) : tasks(tasks), body(body), unfinished(tasks) {}

    void claim(int worker) {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
        body(task, worker);
        if (unfinished.fetch_sub(1) == 1) notify();
      }
    }

    void notify() {
      std::lock_guard<std::mutex> lock(mutex);
      finished.notify_one();
    }

    void wait() {
      std::unique_lock<std::mutex> lock(mutex);
      finished.wait(lock, [this] { return unfinished.load() == 0; });
    }

    const int64_t tasks;
    const Body& body;
    std::atomic<int64_t> next{0}, unfinished;
    std::mutex mutex;
    std::condition_variable finished;
  };

  const tensorflow::DeviceBase::CpuWorkerThreads* pool_;
};

}  // namespace fusedconvbn::tf
