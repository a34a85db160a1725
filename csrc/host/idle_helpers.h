// Threads of a pool that have just helped and look for more work before they go: the next op of a network comes within
// some tens of microseconds, and to wake a thread that sleeps costs as much, half of it to the one who wakes.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

namespace fusedconvbn::host {

// Leaves the core's units to the other thread that may share it.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// True as soon as done() is; false if that takes longer than `patience`.
template <class Done>
bool watch(std::chrono::microseconds patience, Done done) {
  const auto end = std::chrono::steady_clock::now() + patience;
  while (!done()) {
    if (std::chrono::steady_clock::now() > end) return false;
    relax();
  }
  return true;
}

class IdleHelpers {
 public:
  using Job = std::function<void()>;

  // One for the process, never destroyed: kernels may run while it ends.
  static IdleHelpers* global() {
    static IdleHelpers* helpers = new IdleHelpers;
    return helpers;
  }

  // On a thread of `pool`: does `job`, and those that come soon; not for long, for other ops' work may wait in the
  // pool. Nor for too short: to ask the pool again wakes one more of its threads, for which there is no processor.
  void help(const void* pool, Job job) {
    constexpr std::chrono::milliseconds kTurn(4);
    const auto end = std::chrono::steady_clock::now() + kTurn;
    while (job) {
      job();
      job = std::chrono::steady_clock::now() < end ? next(pool) : nullptr;
    }
  }

  // Hands `job` to an idle thread of `pool`; if there is none, leaves it and returns false.
  bool hand_over(const void* pool, Job* job) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto seat = std::find_if(idle_.begin(), idle_.end(), [pool](const Seat* s) { return s->pool == pool; });
    if (seat == idle_.end()) return false;
    (*seat)->job = std::move(*job);
    (*seat)->taken.store(true);
    idle_.erase(seat);
    return true;
  }

 private:
  struct Seat {
    const void* pool;
    Job job{};
    std::atomic<bool> taken{false};
  };

  // Empty if none comes. Short: meanwhile the thread does no other op's work.
  Job next(const void* pool) {
    constexpr std::chrono::microseconds kPatience(60);
    Seat seat{pool};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      idle_.push_back(&seat);
    }
    if (!watch(kPatience, [&] { return seat.taken.load(); })) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!seat.taken.load()) idle_.erase(std::find(idle_.begin(), idle_.end(), &seat));
    }
    std::lock_guard<std::mutex> lock(mutex_);  // hand_over() may still hold it
    return std::move(seat.job);
  }

  std::mutex mutex_;
  std::vector<Seat*> idle_;
};

}  // namespace fusedconvbn::host
