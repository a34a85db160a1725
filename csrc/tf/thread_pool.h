// The core's ParallelFor on TensorFlow's intra-op threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
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
  // How many an op may use.
  static int of(tensorflow::OpKernelContext* context) {
    return std::max(1, context->device()->tensorflow_cpu_worker_threads()->num_threads);
  }

  IntraOpThreads(tensorflow::OpKernelContext* context, int threads)
      : pool_(context->device()->tensorflow_cpu_worker_threads()->workers), threads_(threads) {}

  int threads() const override { return threads_; }

  void run(int64_t tasks, const Body& body) override {
    const int helpers = static_cast<int>(std::min<int64_t>(threads_, tasks)) - 1;
    if (helpers <= 0) {
      for (int64_t task = 0; task < tasks; ++task) body(task, 0);
      return;
    }
    auto work = std::make_shared<Work>(tasks, body);
    for (int worker = 1; worker <= helpers; ++worker) pool_->Schedule([work, worker] { work->claim(worker); });
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
      if (watch()) return;
      std::unique_lock<std::mutex> lock(mutex);
      finished.wait(lock, [this] { return unfinished.load() == 0; });
    }

    // Looks whether all is done for about as long as it would take to sleep and be woken.
    bool watch() const {
      constexpr std::chrono::microseconds kWakeUp(40);
      const auto end = std::chrono::steady_clock::now() + kWakeUp;
      while (unfinished.load() > 0) {
        if (std::chrono::steady_clock::now() > end) return false;
        relax();
      }
      return true;
    }

    // Leaves the core's units to the other thread that may share it.
    static void relax() {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }

    const int64_t tasks;
    const Body& body;
    std::atomic<int64_t> next{0}, unfinished;
    std::mutex mutex;
    std::condition_variable finished;
  };

  tensorflow::thread::ThreadPool* pool_;
  const int threads_;
};

}  // namespace fusedconvbn::tf
