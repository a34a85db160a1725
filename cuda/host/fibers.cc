#include "fibers.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1  // as gcc says it
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace fusedconvbn::cuda::host {

Index thread_index, block_index;

namespace {

constexpr size_t kStack = size_t{64} << 10;

// The sanitizer must know which stack is in use.
class Stack {
 public:
  void leave_for(const void* begin, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_, begin, bytes);
#else
    static_cast<void>(begin), static_cast<void>(bytes);
#endif
  }
  void arrive(const void** from = nullptr, size_t* bytes = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_, from, bytes);
#else
    static_cast<void>(from), static_cast<void>(bytes);
#endif
  }

 private:
  [[maybe_unused]] void* fake_ = nullptr;
};

struct Fiber {
  ucontext_t context;
  Stack stack;
  std::unique_ptr<char[]> memory{new char[kStack]};
  bool ended = false, waits = false;
};

class Block {
 public:
  // Kept: to make the stacks takes longer than many a kernel.
  static Block* of(int threads) {
    static Block block;
    block.fibers_.resize(threads);
    const char* order = std::getenv("FUSEDCONVBN_FIBERS");
    block.reverse_ = order != nullptr && std::strcmp(order, "reverse") == 0;
    return &block;
  }

  void run(const std::function<void()>& body) {
    body_ = &body;
    for (Fiber& fiber : fibers_) start(&fiber);
    for (int running = count(); running > 0;) {  // a round: to the next barrier, or to the end
      int ended = 0, waiting = 0;
      for (int i = 0; i < count(); ++i) {
        const int thread = reverse_ ? count() - 1 - i : i;
        if (!fibers_[thread].ended) enter(thread);
        ended += fibers_[thread].ended, waiting += fibers_[thread].waits;
        fibers_[thread].waits = false;
      }
      if (waiting > 0 && ended > 0) fail("some threads of a block ended while others wait at __syncthreads()");
      running = count() - ended;
    }
  }

  void synchronize() {
    Fiber& fiber = fibers_[thread_index.x];
    fiber.waits = true;
    leave(&fiber);
  }

 private:
  int count() const { return static_cast<int>(fibers_.size()); }

  // Ends the test's process: no fiber could go on, and nothing but tests links this.
  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "fibers: %s\n", what);
    std::abort();
  }

  void start(Fiber* fiber) {
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->memory.get();
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    fiber->ended = fiber->waits = false;
    fiber->stack = Stack();
    makecontext(&fiber->context, &Block::main, 0);
  }

  void enter(int thread) {
    thread_index.x = static_cast<unsigned>(thread);
    Fiber& fiber = fibers_[thread];
    stack_.leave_for(fiber.memory.get(), kStack);
    swapcontext(&context_, &fiber.context);
    stack_.arrive();
  }

  void leave(Fiber* fiber) {
    fiber->stack.leave_for(base_, bytes_);
    swapcontext(&fiber->context, &context_);
    fiber->stack.arrive(&base_, &bytes_);
  }

  static void main();

  std::vector<Fiber> fibers_;
  const std::function<void()>* body_ = nullptr;
  ucontext_t context_;
  Stack stack_;
  const void* base_ = nullptr;  // of the stack that runs the block
  size_t bytes_ = 0;
  bool reverse_ = false;
};

Block* current = nullptr;

void Block::main() {
  Block* const block = current;
  Fiber& fiber = block->fibers_[thread_index.x];
  fiber.stack.arrive(&block->base_, &block->bytes_);
  (*block->body_)();
  fiber.ended = true;
  block->leave(&fiber);
}

}  // namespace

void run_blocks(int64_t blocks, int threads, const std::function<void()>& body) {
  current = Block::of(threads);
  for (int64_t i = 0; i < blocks; ++i) {
    block_index.x = static_cast<unsigned>(i);
    current->run(body);
  }
  current = nullptr;
}

void synchronize_block() { current->synchronize(); }

}  // namespace fusedconvbn::cuda::host
