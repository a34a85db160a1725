// The core's ParallelFor on threads of its own, for callers that bring none.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "../conv_bn.h"

namespace fusedconvbn::python {

// `threads` - 1 threads that sleep between calls of run(); the caller is worker 0. Fewer, if the system grants no more.
class ThreadPool : public ParallelFor {
 public:
  explicit ThreadPool(int threads) {
    try {
      for (int worker = 1; worker < threads; ++worker) helpers_.emplace_back([this, worker] { help(worker); });
    } catch (const std::system_error&) {  // those that have started do the work
    }
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  ~ThreadPool() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    begun_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  int threads() const override { return static_cast<int>(helpers_.size()) + 1; }

  void run(int64_t tasks, const Body& body) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = &body;
      tasks_ = tasks;
      next_ = 0;
      working_ = helpers_.size();
      ++round_;
    }
    begun_.notify_all();
    claim(0);
    std::unique_lock<std::mutex> lock(mutex_);
    ended_.wait(lock, [this] { return working_ == 0; });
  }

 private:
  void claim(int worker) {
    for (int64_t task; (task = next_.fetch_add(1)) < tasks_;) (*body_)(task, worker);
  }

  void help(int worker) {
    int64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        begun_.wait(lock, [&] { return stopping_ || round_ != seen; });
        if (stopping_) return;
        seen = round_;
      }
      claim(worker);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--working_ == 0) ended_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable begun_, ended_;
  std::atomic<int64_t> next_{0};
  // Guarded by mutex_; body_ and tasks_ are read without it by those that work on the round.
  const Body* body_ = nullptr;
  int64_t tasks_ = 0, round_ = 0;
  size_t working_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> helpers_;  // last: they use all of the above
};

}  // namespace fusedconvbn::python
