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

constexpr size_t kStack = size_t{64} << 10, kMostBytes = 64;
constexpr int kWarp = 32;

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

enum class State { kRuns, kAtWarp, kAtBlock, kEnded };

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t context;
  Stack stack;
  std::unique_ptr<char[]> memory{new char[kStack]};
  State state = State::kRuns;
  int exchanges = 0;                         // calls of all_of_warp()
  std::vector<std::vector<Copy>> copies{1};  // by group; the last one is open
};

// Two: of a call, and of the one before, which slower lanes may still read.
struct Exchange {
  alignas(16) unsigned char lanes[2][kWarp * kMostBytes];
};

class Block {
 public:
  // Kept: to make the stacks takes longer than many a kernel.
  static Block* of(int threads) {
    static Block block;
    if (threads % kWarp != 0) fail("a block has whole warps");
    block.fibers_.resize(threads);
    block.exchanges_.resize(threads / kWarp);
    const char* order = std::getenv("FUSEDCONVBN_FIBERS");
    block.reverse_ = order != nullptr && std::strcmp(order, "reverse") == 0;
    return &block;
  }

  void run(const std::function<void()>& body) {
    body_ = &body;
    for (Fiber& fiber : fibers_) start(&fiber);
    while (!all(0, count(), State::kEnded)) {  // a round: to the next barrier of the block, or to the end
      for (int i = 0; i < count(); i += kWarp) run_warp(reverse_ ? count() - kWarp - i : i);
      if (all(0, count(), State::kAtBlock))
        for (Fiber& fiber : fibers_) fiber.state = State::kRuns;
      else if (!all(0, count(), State::kEnded))
        fail("some threads of a block ended while others wait at __syncthreads()");
    }
  }

  void wait_at(State barrier) {
    Fiber& fiber = fibers_[thread_index.x];
    fiber.state = barrier;
    leave(&fiber);
  }

  const unsigned char* all_of_warp(const void* own, size_t bytes) {
    if (bytes > kMostBytes) fail("more than all_of_warp() can exchange");
    const int thread = static_cast<int>(thread_index.x);
    unsigned char* const lanes = exchanges_[thread / kWarp].lanes[fibers_[thread].exchanges++ % 2];
    std::memcpy(lanes + thread % kWarp * bytes, own, bytes);
    wait_at(State::kAtWarp);
    return lanes;
  }

  void copy_async(void* to, const void* from) { fibers_[thread_index.x].copies.back().push_back({to, from}); }
  void commit_copies() { fibers_[thread_index.x].copies.emplace_back(); }
  void wait_for_copies(size_t but_the_last_groups) {
    auto& groups = fibers_[thread_index.x].copies;
    while (groups.size() > but_the_last_groups + 1) {
      for (const Copy& copy : groups.front())
        copy.from == nullptr ? std::memset(copy.to, 0, 16) : std::memcpy(copy.to, copy.from, 16);
      groups.erase(groups.begin());
    }
  }

 private:
  int count() const { return static_cast<int>(fibers_.size()); }

  bool all(int begin, int end, State state) const {
    for (int i = begin; i < end; ++i)
      if (fibers_[i].state != state) return false;
    return true;
  }

  // To the next barrier of the block, or to the end.
  void run_warp(int begin) {
    for (;;) {
      for (int i = 0; i < kWarp; ++i) {
        const int thread = begin + (reverse_ ? kWarp - 1 - i : i);
        if (fibers_[thread].state == State::kRuns) enter(thread);
      }
      if (!all(begin, begin + kWarp, State::kAtWarp)) break;
      for (int i = begin; i < begin + kWarp; ++i) fibers_[i].state = State::kRuns;
    }
    for (int i = begin; i < begin + kWarp; ++i)
      if (fibers_[i].state == State::kAtWarp) fail("some threads of a warp went on while others wait at its barrier");
  }

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
    fiber->state = State::kRuns;
    fiber->copies.assign(1, {});
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
  std::vector<Exchange> exchanges_;
  const std::function<void()>* body_ = nullptr;
  ucontext_t context_;
  Stack stack_;
  const void* base_ = nullptr;  // of the stack that runs the block
  size_t bytes_ = 0;
  bool reverse_ = false;
};

Block* current = nullptr;
void* shared_memory = nullptr;

void Block::main() {
  Block* const block = current;
  Fiber& fiber = block->fibers_[thread_index.x];
  fiber.stack.arrive(&block->base_, &block->bytes_);
  (*block->body_)();
  fiber.state = State::kEnded;
  block->leave(&fiber);
}

}  // namespace

void run_blocks(int64_t blocks, int threads, size_t shared, const std::function<void()>& body) {
  const std::unique_ptr<unsigned char[]> memory(new unsigned char[shared]);  // aligned to 16, as new[] is
  shared_memory = memory.get();
  current = Block::of(threads);
  for (int64_t i = 0; i < blocks; ++i) {
    block_index.x = static_cast<unsigned>(i);
    current->run(body);
  }
  current = nullptr;
}

void* dynamic_shared() { return shared_memory; }
void synchronize_block() { current->wait_at(State::kAtBlock); }
void synchronize_warp() { current->wait_at(State::kAtWarp); }
const unsigned char* all_of_warp(const void* own, size_t bytes) { return current->all_of_warp(own, bytes); }
void copy_async(void* to, const void* from) { current->copy_async(to, from); }
void commit_copies() { current->commit_copies(); }
void wait_for_copies(int but_the_last_groups) { current->wait_for_copies(but_the_last_groups); }

}  // namespace fusedconvbn::cuda::host
