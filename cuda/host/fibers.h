// CUDA's kernels on the host, for tests on machines without a GPU: a fiber for each thread of a block, one block after
// the other. A barrier, of the block or of a warp, hands over to the next fiber; one that is missing, or that not all
// threads reach, shows as a wrong result, or as an error where threads end meanwhile, an access beyond a buffer as the
// sanitizers show it. What it cannot show: threads at different barriers, races between blocks, and those that only
// another order of threads would show (`FUSEDCONVBN_FIBERS=reverse` gives one).
#pragma once

#include <cstddef>
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

// Runs body() as every thread of every block, with so many bytes of dynamic shared memory, 16-byte aligned.
void run_blocks(int64_t blocks, int threads, size_t shared, const std::function<void()>& body);
void* dynamic_shared();
void synchronize_block();
void synchronize_warp();

// What each thread of a warp brought, in the order of the lanes, until the next call; all 32 must call. At most 64
// bytes each.
const unsigned char* all_of_warp(const void* own, size_t bytes);
template <class V>
const V* all_of_warp(const V& own) {
  return reinterpret_cast<const V*>(all_of_warp(&own, sizeof(V)));
}

// Copies of 16 bytes that take effect when the thread waits for their group; from null: zeros.
void copy_async(void* to, const void* from);
void commit_copies();
void wait_for_copies(int but_the_last_groups);

}  // namespace fusedconvbn::cuda::host

#define threadIdx (::fusedconvbn::cuda::host::thread_index)
#define blockIdx (::fusedconvbn::cuda::host::block_index)
inline void __syncthreads() { ::fusedconvbn::cuda::host::synchronize_block(); }
inline void __syncwarp() { ::fusedconvbn::cuda::host::synchronize_warp(); }
