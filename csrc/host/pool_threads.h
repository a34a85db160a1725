// The core's ParallelFor on the threads of somebody else's pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "../conv_bn.h"
#include "cpu_placement.h"
#include "idle_helpers.h"

namespace fusedconvbn::host {

// The caller works too and waits only for tasks that have begun: helpers that no thread of the pool ever takes up cost
// nothing, so any number of calls may share a pool, and one may run on a thread of that pool, and none hangs.
class PoolThreads : public ParallelFor {
 public:
  using Job = IdleHelpers::Job;

  // `pool`: tells it from others.
  PoolThreads(const void* pool, int threads) : pool_(pool), threads_(threads) {}

  int threads() const override { return threads_; }

  void run(int64_t tasks, const Body& body) override {
    const int helpers = static_cast<int>(std::min<int64_t>(threads_, tasks)) - 1;
    if (helpers <= 0) {
      for (int64_t task = 0; task < tasks; ++task) body(task, 0);
      return;
    }
    auto work = std::make_shared<Work>(tasks, helpers + 1, body);
    const int cpu = this_cpu();
    for (int worker = 1; worker <= helpers; ++worker)
      call_helper([work, worker, cpu] {
        if (work->unfinished.load() > 0) leave_cpu(cpu);
        work->claim(worker);
      });
    work->claim(0);
    work->wait();
  }

 protected:
  // Lets a thread of the pool do `job`, soon or never.
  virtual void schedule(Job job) = 0;

 private:
  void call_helper(Job job) {
    IdleHelpers* const idle = IdleHelpers::global();
    if (idle->hand_over(pool_, &job)) return;
    schedule([idle, pool = pool_, job = std::move(job)]() mutable { idle->help(pool, std::move(job)); });
  }

  // Helpers may outlive the call, so they share this; only one that has claimed a task, for which the call then waits,
  // may use `body`, which is the caller's.
  struct Work {
    Work(int64_t tasks, int workers, const Body& body)
        : body(body), unfinished(tasks), shares(tasks < kManyTasks * workers ? 1 : workers) {
      const int64_t count = static_cast<int64_t>(shares.size());
      for (int64_t i = 0; i < count; ++i) {
        shares[i].next = tasks * i / count;
        shares[i].end = tasks * (i + 1) / count;
      }
    }

    // First those of one's own share: tasks of the same place in ops that follow each other then run on one core, which
    // has much of what they read in its cache. Few tasks may be unequal, the last the least: all share those.
    void claim(int worker) {
      const size_t count = shares.size();
      for (size_t other = 0; other < count; ++other) {
        Share& share = shares[(worker + other) % count];
        for (int64_t task; (task = share.next.fetch_add(1)) < share.end;) {
          body(task, worker);
          if (unfinished.fetch_sub(1) == 1) notify();
        }
      }
    }

    void notify() {
      std::lock_guard<std::mutex> lock(mutex);
      finished.notify_one();
    }

    // Looks whether all is done for a few times as long as it would take to sleep and be woken: a virtual machine's
    // processor that sleeps goes to other guests.
    void wait() {
      constexpr std::chrono::microseconds kPatience(250);
      if (watch(kPatience, [this] { return unfinished.load() == 0; })) return;
      std::unique_lock<std::mutex> lock(mutex);
      finished.wait(lock, [this] { return unfinished.load() == 0; });
    }

    static constexpr int64_t kManyTasks = 4;  // a worker

    struct alignas(64) Share {  // a cache line each
      std::atomic<int64_t> next;
      int64_t end;
    };

    const Body& body;
    std::atomic<int64_t> unfinished;
    std::vector<Share> shares;
    std::mutex mutex;
    std::condition_variable finished;
  };

  const void* const pool_;
  const int threads_;
};

}  // namespace fusedconvbn::host
