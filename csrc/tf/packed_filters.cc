#include "packed_filters.h"

#include <algorithm>
#include <cstdlib>

#include "memory.h"
#include "tensorflow/core/common_runtime/dma_helper.h"

namespace fusedconvbn::tf {
namespace {

// Calls after which what was not used may make room: more than a network has layers, else one that does not fit as a
// whole would replace each layer's filters just before they are needed again.
constexpr int64_t kIdleCalls = 1000;

size_t limit() {
  constexpr size_t kMegabyte = size_t{1} << 20;
  const char* megabytes = std::getenv("FUSEDCONVBN_PACKED_MEGABYTES");
  return (megabytes ? std::strtoull(megabytes, nullptr, 10) : 512) * kMegabyte;
}

}  // namespace

PackedFilters::PackedFilters() : max_bytes_(limit()) {}

PackedFilters* PackedFilters::global() {
  static PackedFilters* filters = new PackedFilters;
  return filters;
}

bool PackedFilters::may_keep(const tensorflow::Tensor& filters) {
  tensorflow::Tensor tensor = filters;
  tensorflow::TensorBuffer* buffer = tensorflow::DMAHelper::buffer(&tensor);
  return buffer != nullptr && buffer->OwnsMemory() && buffer->root_buffer()->OwnsMemory();
}

PackedFilters::Packed PackedFilters::get(const tensorflow::Tensor& filters, const Plan& plan,
                                         absl::FunctionRef<bool(void*)> pack) {
  const Key key = key_of(filters, plan);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ++now_;
    const auto entry = entries_.find(key);
    if (entry == entries_.end()) {
      drop_unreachable();
      entries_.insert({key, {filters, nullptr, 0, now_}});
      return nullptr;
    }
    entry->second.last_use = now_;
    if (entry->second.packed || !reserve(plan.packed_bytes)) return entry->second.packed;
  }
  const std::shared_ptr<void> packed(allocate(plan.packed_bytes).data, std::free);
  return keep(key, packed && pack(packed.get()) ? packed : nullptr, plan.packed_bytes);
}

void PackedFilters::forget(const tensorflow::Tensor& filters) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto entry = entries_.lower_bound(Key(filters.data(), nullptr, {}));
  while (entry != entries_.end() && std::get<0>(entry->first) == filters.data()) entry = drop(entry);
}

PackedFilters::Key PackedFilters::key_of(const tensorflow::Tensor& filters, const Plan& plan) {
  const ConvBnParams& p = plan.params;
  return {filters.data(),
          plan.stages[0],
          {p.filter_height, p.filter_width, p.in_channels, p.out_channels, p.groups, static_cast<int64_t>(p.dtype)}};
}

// Takes `bytes` of the limit, from those not used for longest if need be.
bool PackedFilters::reserve(size_t bytes) {
  while (bytes_ + bytes > max_bytes_) {
    auto oldest = entries_.end();
    for (auto it = entries_.begin(); it != entries_.end(); ++it)
      if (it->second.packed && (oldest == entries_.end() || it->second.last_use < oldest->second.last_use)) oldest = it;
    if (oldest == entries_.end() || now_ - oldest->second.last_use < kIdleCalls) return false;
    drop(oldest);
  }
  bytes_ += bytes;
  return true;
}

// Ends a reservation: `packed` becomes the entry's, unless that was dropped or filled by another thread meanwhile.
PackedFilters::Packed PackedFilters::keep(const Key& key, const Packed& packed, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto entry = entries_.find(key);
  if (packed && entry != entries_.end() && !entry->second.packed) {
    entry->second.packed = packed;
    entry->second.bytes = bytes;
  } else {
    bytes_ -= bytes;
  }
  return packed;
}

PackedFilters::Entries::iterator PackedFilters::drop(Entries::iterator entry) {
  bytes_ -= entry->second.bytes;
  return entries_.erase(entry);
}

// Filters that only an entry refers to will not come back.
void PackedFilters::drop_unreachable() {
  for (auto it = entries_.begin(); it != entries_.end();) it = it->second.filters.RefCountIsOne() ? drop(it) : ++it;
}

}  // namespace fusedconvbn::tf
