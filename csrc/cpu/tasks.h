// How finely work is divided among threads.
#pragma once

#include <cstdint>

#include "../conv_bn.h"

namespace fusedconvbn {

// How many tasks a thread should have of work that one thread alone would do as one. The last task to end makes the
// other threads wait for it, and they differ in speed: their cores are shared, and all but one of them begin later. Of
// 4 tasks they wait for a 20th of the time, of 16 hardly.
constexpr int64_t kFewTasks = 4, kTasks = 16;

inline int64_t wanted_tasks(const ParallelFor& parallel, int64_t of_thread) {
  return parallel.threads() == 1 ? 1 : of_thread * parallel.threads();
}

}  // namespace fusedconvbn
