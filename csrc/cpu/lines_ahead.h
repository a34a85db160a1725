// What the next block will read, for kernels to ask for while this one is multiplied.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace fusedconvbn {

template <class C>
class LinesAhead {
 public:
  static constexpr int kMost = 5;  // what is beyond is not asked for
  // Steps of 24 multiplications of vectors to a line: with one step each, they take as long as the memory does.
  static constexpr int64_t kMinSteps = 2;

  LinesAhead() = default;
  LinesAhead(const LinesAhead&) = delete;  // what is pending may point into it

  void add(const Ahead<C>& lines) {
    if (count_ < kMost && lines.count * lines.lines > 0) pending_[count_++] = lines;
  }
  // Consecutive elements.
  void add(const C* memory, int64_t elements) {
    if (elements <= 0 || count_ == kMost) return;
    memory_[count_] = memory;
    add(ahead_of(&memory_[count_], 0, 1, elements));
  }
  // Spreads them over so many steps of the kernels.
  void spread(int64_t steps) {
    int64_t all = 0;
    for (int i = 0; i < count_; ++i) all += pending_[i].count * pending_[i].lines;
    for (int i = 0; i < count_; ++i) pending_[i].steps = std::max(kMinSteps, steps / std::max<int64_t>(all, 1));
  }

  // For the next call of a kernel; null where all is asked for.
  Ahead<C>* pending() {
    while (current_ < count_ && pending_[current_].row == pending_[current_].count) ++current_;
    return current_ < count_ ? &pending_[current_] : nullptr;
  }

 private:
  Ahead<C> pending_[kMost];
  const C* memory_[kMost];
  int count_ = 0, current_ = 0;
};

// One of so many products that share what is read next.
struct Share {
  int64_t number, of;
};

// Has gemm ask meanwhile, in so many steps, for its share of what the next block reads: first `elements` of one array,
// then of the other, which may be null.
template <class C>
void share_lines(const C* one, const C* other, int64_t elements, const Share& share, int64_t steps,
                 GatheredRows<C>* in) {
  if (elements <= 0) return;
  const int64_t shares = other ? (share.of + 1) / 2 : share.of, part = elements / shares;
  const C* begin = (share.number < shares ? one : other) + share.number % shares * part;
  in->ahead[0] = {begin, begin + std::min(part, steps / LinesAhead<C>::kMinSteps * Ahead<C>::kLine)};
}

}  // namespace fusedconvbn
