// The core's ParallelFor on TensorFlow's intra-op threads.
#pragma once

#include <algorithm>
#include <utility>

#include "../host/pool_threads.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace fusedconvbn::tf {

class IntraOpThreads : public host::PoolThreads {
 public:
  // How many an op may use.
  static int of(tensorflow::OpKernelContext* context) {
    return std::max(1, context->device()->tensorflow_cpu_worker_threads()->num_threads);
  }

  IntraOpThreads(tensorflow::OpKernelContext* context, int threads)
      : IntraOpThreads(context->device()->tensorflow_cpu_worker_threads()->workers, threads) {}

 protected:
  void schedule(Job job) override { pool_->Schedule(std::move(job)); }

 private:
  IntraOpThreads(tensorflow::thread::ThreadPool* pool, int threads) : PoolThreads(pool, threads), pool_(pool) {}

  tensorflow::thread::ThreadPool* const pool_;
};

}  // namespace fusedconvbn::tf
