// Where threads run. Linux may wake a helper on its caller's processor while another one idles, the more so after a
// pause, and leave the two there for 10 ms and more: ResNet-50 at batch 1 then takes 40 ms on two threads in place
// of 24.
#pragma once

#if defined(__linux__)
#include <sched.h>
#endif

namespace fusedconvbn::host {

// The processor that this thread runs on; -1 if the system does not tell.
inline int this_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Moves this thread to another one of the processors that it may use, if it runs on `cpu`. It may use the same ones
// afterwards, unless another thread has just said which: the scheduler is free to move it again. (Linux keeps them as
// the thread's own: of processors that its control group is given later, it uses none.)
inline void leave_cpu(int cpu) {
#if defined(__linux__)
  if (cpu < 0 || this_cpu() != cpu) return;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;  // more processors than the set holds
  cpu_set_t others = allowed;
  CPU_CLR(cpu, &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof(others), &others) != 0) return;
  cpu_set_t now;
  if (sched_getaffinity(0, sizeof(now), &now) == 0 && CPU_EQUAL(&now, &others))
    sched_setaffinity(0, sizeof(allowed), &allowed);
#endif
}

}  // namespace fusedconvbn::host
