// A call's arrays as the core's buffers.
#pragma once

#include <algorithm>
#include <vector>

#include "../conv_bn.h"
#include "xla/ffi/api/ffi.h"

namespace fusedconvbn::xla {

namespace ffi = ::xla::ffi;

class Arrays {
 public:
  Arrays(ffi::RemainingArgs operands, ffi::RemainingRets results) : operands_(operands), results_(results) {}

  size_t operands() const { return operands_.size(); }
  bool more_results() const { return result_ < results_.size(); }
  // `training`, the last operand, where the host can read it.
  bool training() const { return *operands_.get<ffi::AnyBuffer>(operands_.size() - 1)->typed_data<bool>(); }

  size_t operand_bytes(size_t i) const { return operands_.get<ffi::AnyBuffer>(i)->size_bytes(); }
  template <class Visit>
  void for_results(Visit visit) const {
    for (size_t i = 0; i < results_.size(); ++i) {
      const ffi::AnyBuffer result = **results_.get<ffi::AnyBuffer>(i);
      visit(result.untyped_data(), result.size_bytes());
    }
  }

  // In their order. Null if not `there`.
  const void* next_operand(bool there = true) {
    return there ? data(*operands_.get<ffi::AnyBuffer>(operand_++)) : nullptr;
  }
  void* next_result() { return data(next()); }
  void* next_result(size_t* bytes) {
    const ffi::AnyBuffer result = next();
    return *bytes = result.size_bytes(), data(result);
  }
  // Null unless it has that shape, as a result has that somebody wants.
  void* next_result(const std::vector<int64_t>& shape) {
    const ffi::AnyBuffer result = next();
    const auto sizes = result.dimensions();
    return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()) ? data(result) : nullptr;
  }

 private:
  ffi::AnyBuffer next() { return **results_.get<ffi::AnyBuffer>(result_++); }

  // An array without elements may have no memory, but to the core null means "not there".
  static void* data(const ffi::AnyBuffer& array) {
    alignas(64) static char nothing[64];
    return array.element_count() > 0 ? array.untyped_data() : nothing;
  }

  const ffi::RemainingArgs operands_;
  const ffi::RemainingRets results_;
  size_t operand_ = 0, result_ = 0;
};

// How many operands a call has, `training`, the last one, included.
inline size_t operand_count(const ConvBnParams& params, ForwardBuffers*) { return 7 + params.has_residual; }
inline size_t operand_count(const ConvBnParams& params, BackwardBuffers*) {
  return 13 + needs_residual(params) + params.has_output;
}

// False if what forward saves has no room.
inline bool gather(Arrays* arrays, const Plan& plan, ForwardBuffers* b) {
  b->inputs = arrays->next_operand();
  b->filters = arrays->next_operand();
  b->gamma = arrays->next_operand();
  b->beta = arrays->next_operand();
  b->moving_mean = arrays->next_operand();
  b->moving_variance = arrays->next_operand();
  b->residual = arrays->next_operand(plan.params.has_residual);
  b->output = arrays->next_result();
  b->new_moving_mean = arrays->next_result();
  b->new_moving_variance = arrays->next_result();
  b->batch_mean = arrays->next_result();
  b->inv_std = arrays->next_result();
  if (plan.saved == Saved::kNothing) return true;
  b->conv_out = arrays->next_result(conv_out_shape(plan.params, plan.saved));
  return b->conv_out != nullptr;
}

inline bool gather(Arrays* arrays, const Plan& plan, BackwardBuffers* b) {
  const ConvBnParams& p = plan.params;
  b->output_gradient = arrays->next_operand();
  b->moving_mean_gradient = arrays->next_operand();
  b->moving_variance_gradient = arrays->next_operand();
  b->inputs = arrays->next_operand();
  b->filters = arrays->next_operand();
  b->gamma = arrays->next_operand();
  b->beta = arrays->next_operand();
  b->moving_mean = arrays->next_operand();
  b->moving_variance = arrays->next_operand();
  b->residual = arrays->next_operand(needs_residual(p));
  b->output = arrays->next_operand(p.has_output);
  b->batch_mean = arrays->next_operand();
  b->inv_std = arrays->next_operand();
  const void* const conv_out = arrays->next_operand();
  if (p.training && p.saved != Saved::kNothing) b->conv_out = conv_out;
  const bool nchw = p.data_format == DataFormat::kNCHW;
  const int64_t n = p.batch, h = p.in_height, w = p.in_width, c = p.in_channels;
  b->d_inputs = arrays->next_result(nchw ? std::vector<int64_t>{n, c, h, w} : std::vector<int64_t>{n, h, w, c});
  b->d_filters = arrays->next_result({p.filter_height, p.filter_width, p.group_in(), p.out_channels});
  b->d_gamma = arrays->next_result();
  b->d_beta = arrays->next_result();
  b->d_moving_mean = arrays->next_result();
  b->d_moving_variance = arrays->next_result();
  if (arrays->more_results()) b->d_residual = arrays->next_result();
  return true;
}

}  // namespace fusedconvbn::xla
