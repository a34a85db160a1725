// Packed filters that are kept between the calls of inference.
//
// A pointer to filters is no key: an update in place keeps it. What tells that they still are what they were is their
// witness, which the caller brings. A Witness has
//   confirms(other)  whether, at the same address, `other` is a witness of the same filters
//   is_last()        whether nobody else can come with these filters again
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "../conv_bn.h"
#include "packed_limit.h"
#include "piece_pool.h"

namespace fusedconvbn::host {

template <class Witness>
class PackedFilters {
 public:
  using Packed = std::shared_ptr<const void>;

  // One for the process, never destroyed: kernels may run while it ends.
  static PackedFilters* global() {
    static PackedFilters* filters = new PackedFilters;
    return filters;
  }

  // The filters at `address` as `plan` reads them, or null. They are packed at the second call: what is used once is
  // not worth it. pack(memory) returns whether it succeeded.
  template <class Pack>
  Packed get(const void* address, const Witness& witness, const Plan& plan, Pack pack) {
    if (max_bytes_ == 0) return nullptr;
    const Form form = form_of(plan);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++now_;
      Copy* copy = find(address, witness, form);
      if (copy == nullptr) return add(address, witness, form), nullptr;
      copy->last_use = now_;
      if (copy->packed || !reserve(plan.packed_bytes)) return copy->packed;
    }
    const std::shared_ptr<void> packed = PiecePool::global()->take(plan.packed_bytes);
    return keep(address, witness, form, packed && pack(packed.get()) ? packed : nullptr, plan.packed_bytes);
  }

  // Before an update, which would have to copy what a witness refers to.
  void forget(const void* address) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto entry = entries_.find(address);
    if (entry != entries_.end()) drop(entry);
  }

 private:
  // Calls after which what was not used may make room: more than a network has layers, else one that does not fit as a
  // whole would replace each layer's filters just before they are needed again.
  static constexpr int64_t kIdleCalls = 1000;

  // Row, shape with the number of groups, dtype, and bytes, which tell the forms of a row apart: what decides the
  // packed form of given memory.
  using Form = std::pair<const Kernel*, std::array<int64_t, 7>>;
  struct Copy {
    Packed packed;  // null after the first call
    size_t bytes;   // of it
    int64_t last_use;
  };
  struct Entry {
    Witness witness;  // one, however many forms
    std::map<Form, Copy> copies;
  };
  using Entries = std::unordered_map<const void*, Entry>;  // by the address

  PackedFilters() { read_packed_limit(&max_bytes_); }

  static Form form_of(const Plan& plan) {
    const ConvBnParams& p = plan.params;
    return {plan.stages[0],
            {p.filter_height, p.filter_width, p.in_channels, p.out_channels, p.groups, static_cast<int64_t>(p.dtype),
             static_cast<int64_t>(plan.packed_bytes)}};
  }

  Copy* find(const void* address, const Witness& witness, const Form& form) {
    const auto entry = entries_.find(address);
    if (entry == entries_.end() || !entry->second.witness.confirms(witness)) return nullptr;
    const auto copy = entry->second.copies.find(form);
    return copy == entry->second.copies.end() ? nullptr : &copy->second;
  }

  void add(const void* address, const Witness& witness, const Form& form) {
    drop_unreachable();
    auto entry = entries_.find(address);
    if (entry != entries_.end() && !entry->second.witness.confirms(witness)) entry = drop(entry);
    entries_.insert({address, {witness, {}}}).first->second.copies[form] = {nullptr, 0, now_};
  }

  // Takes `bytes` of the limit, from those not used for longest if need be.
  bool reserve(size_t bytes) {
    while (bytes_ + bytes > max_bytes_)
      if (!drop_oldest()) return false;
    bytes_ += bytes;
    return true;
  }

  bool drop_oldest() {
    Copy* oldest = nullptr;
    for (auto& [address, entry] : entries_)
      for (auto& [form, copy] : entry.copies)
        if (copy.packed && (oldest == nullptr || copy.last_use < oldest->last_use)) oldest = &copy;
    if (oldest == nullptr || now_ - oldest->last_use < kIdleCalls) return false;
    bytes_ -= oldest->bytes;
    *oldest = {nullptr, 0, oldest->last_use};
    return true;
  }

  // Ends a reservation: `packed` is kept, unless the entry was dropped or filled by another thread meanwhile.
  Packed keep(const void* address, const Witness& witness, const Form& form, const Packed& packed, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    Copy* copy = find(address, witness, form);
    if (packed && copy != nullptr && !copy->packed) {
      copy->packed = packed;
      copy->bytes = bytes;
    } else {
      bytes_ -= bytes;
    }
    return packed;
  }

  typename Entries::iterator drop(typename Entries::iterator entry) {
    for (const auto& [form, copy] : entry->second.copies) bytes_ -= copy.bytes;
    return entries_.erase(entry);
  }

  // Of filters that came once and not again there is nothing but the entry.
  bool is_idle(const Entry& entry) const {
    return std::all_of(entry.copies.begin(), entry.copies.end(), [this](const auto& copy) {
      return !copy.second.packed && now_ - copy.second.last_use > kIdleCalls;
    });
  }

  void drop_unreachable() {
    for (auto it = entries_.begin(); it != entries_.end();)
      it = it->second.witness.is_last() || is_idle(it->second) ? drop(it) : ++it;
  }

  size_t max_bytes_ = 0;
  std::mutex mutex_;
  Entries entries_;
  size_t bytes_ = 0;  // of all that is packed or being packed
  int64_t now_ = 0;   // calls of get()
};

}  // namespace fusedconvbn::host
