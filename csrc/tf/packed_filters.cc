#include "packed_filters.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <limits>
#include <string>

#include "piece_pool.h"
#include "tensorflow/core/common_runtime/dma_helper.h"

namespace fusedconvbn::tf {
namespace {

// Calls after which what was not used may make room: more than a network has layers, else one that does not fit as a
// whole would replace each layer's filters just before they are needed again.
constexpr int64_t kIdleCalls = 1000;

// Reads FUSEDCONVBN_PACKED_MEGABYTES; leaves `bytes` where it is not set, or wrong.
Status read_limit(size_t* bytes) {
  constexpr size_t kMegabyte = size_t{1} << 20, kMost = std::numeric_limits<size_t>::max() / kMegabyte;
  const char* environment = std::getenv("FUSEDCONVBN_PACKED_MEGABYTES");
  const std::string text = environment ? environment : "";
  if (text.empty()) return Status{};
  size_t megabytes = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, megabytes);
  if (error != std::errc{} || stop != end || megabytes > kMost)
    return Status::error("FUSEDCONVBN_PACKED_MEGABYTES must be a whole number of megabytes, from 0 to " +
                         std::to_string(kMost) + ". Received: " + text);
  *bytes = megabytes * kMegabyte;
  return Status{};
}

size_t limit() {
  size_t bytes = size_t{512} << 20;
  read_limit(&bytes);
  return bytes;
}

}  // namespace

PackedFilters::PackedFilters() : max_bytes_(limit()) {}

Status PackedFilters::check_limit() {
  size_t unused = 0;
  return read_limit(&unused);
}

PackedFilters* PackedFilters::global() {
  static PackedFilters* filters = new PackedFilters;
  return filters;
}

bool PackedFilters::may_keep(const tensorflow::Tensor& filters) {
  tensorflow::Tensor tensor = filters;
  tensorflow::TensorBuffer* buffer = tensorflow::DMAHelper::buffer(&tensor);
  return buffer != nullptr && buffer->root_buffer() == buffer && buffer->OwnsMemory();
}

PackedFilters::Packed PackedFilters::get(const tensorflow::Tensor& filters, const Plan& plan,
                                         absl::FunctionRef<bool(void*)> pack) {
  if (max_bytes_ == 0) return nullptr;
  const Form form = form_of(plan);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ++now_;
    Copy* copy = find(filters, form);
    if (copy == nullptr) {
      drop_unreachable();
      entries_.insert({filters.data(), {filters, {}}}).first->second.copies[form] = {nullptr, 0, now_};
      return nullptr;
    }
    copy->last_use = now_;
    if (copy->packed || !reserve(plan.packed_bytes)) return copy->packed;
  }
  const std::shared_ptr<void> packed = PiecePool::global()->take(plan.packed_bytes);
  return keep(filters, form, packed && pack(packed.get()) ? packed : nullptr, plan.packed_bytes);
}

void PackedFilters::forget(const tensorflow::Tensor& filters) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto entry = entries_.find(filters.data());
  if (entry != entries_.end()) drop(entry);
}

PackedFilters::Form PackedFilters::form_of(const Plan& plan) {
  const ConvBnParams& p = plan.params;
  return {plan.stages[0],
          {p.filter_height, p.filter_width, p.in_channels, p.out_channels, p.groups, static_cast<int64_t>(p.dtype),
           static_cast<int64_t>(plan.packed_bytes)}};
}

PackedFilters::Copy* PackedFilters::find(const tensorflow::Tensor& filters, const Form& form) {
  const auto entry = entries_.find(filters.data());
  if (entry == entries_.end()) return nullptr;
  const auto copy = entry->second.copies.find(form);
  return copy == entry->second.copies.end() ? nullptr : &copy->second;
}

// Takes `bytes` of the limit, from those not used for longest if need be.
bool PackedFilters::reserve(size_t bytes) {
  while (bytes_ + bytes > max_bytes_)
    if (!drop_oldest()) return false;
  bytes_ += bytes;
  return true;
}

bool PackedFilters::drop_oldest() {
  Copy* oldest = nullptr;
  for (auto& [memory, entry] : entries_)
    for (auto& [form, copy] : entry.copies)
      if (copy.packed && (oldest == nullptr || copy.last_use < oldest->last_use)) oldest = &copy;
  if (oldest == nullptr || now_ - oldest->last_use < kIdleCalls) return false;
  bytes_ -= oldest->bytes;
  *oldest = {nullptr, 0, oldest->last_use};
  return true;
}

// Ends a reservation: `packed` is kept, unless the entry was dropped or filled by another thread meanwhile.
PackedFilters::Packed PackedFilters::keep(const tensorflow::Tensor& filters, const Form& form, const Packed& packed,
                                          size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  Copy* copy = find(filters, form);
  if (packed && copy != nullptr && !copy->packed) {
    copy->packed = packed;
    copy->bytes = bytes;
  } else {
    bytes_ -= bytes;
  }
  return packed;
}

PackedFilters::Entries::iterator PackedFilters::drop(Entries::iterator entry) {
  for (const auto& [form, copy] : entry->second.copies) bytes_ -= copy.bytes;
  return entries_.erase(entry);
}

// Filters that only an entry refers to will not come back.
void PackedFilters::drop_unreachable() {
  for (auto it = entries_.begin(); it != entries_.end();) it = it->second.filters.RefCountIsOne() ? drop(it) : ++it;
}

}  // namespace fusedconvbn::tf
