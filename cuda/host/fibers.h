// CUDA's kernels on the host, for tests on machines without a GPU: a fiber for each thread of a block, one block after
// the other. __syncthreads() hands over to the next fiber; a barrier that is missing, or that not all threads reach,
// shows as a wrong result, or as an error where threads end meanwhile, an access beyond a buffer as the sanitizers show
// it. What it cannot show: threads at different barriers, races between blocks, and those that only another order of
// threads would show (`FUSEDCONVBN_FIBERS=reverse` gives one).
#pragma once

#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)

namespace fusedconvbn::cuda::host {

struct Index {
  unsigned x;
};
extern Index thread_index, block_index;

// Runs body() as every thread of every block.
void run_blocks(int64_t blocks, int threads, const std::function<void()>& body);
void synchronize_block();

}  // namespace fusedconvbn::cuda::host

#define threadIdx (::fusedconvbn::cuda::host::thread_index)
#define blockIdx (::fusedconvbn::cuda::host::block_index)
inline void __syncthreads() { ::fusedconvbn::cuda::host::synchronize_block(); }
