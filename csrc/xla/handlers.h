// What the handlers of every device do: they read a call, plan it, and hand its arrays to the kernels.
//
// A device is a class, one object to a call, with
//   plan_forward, plan_backward      planners
//   describe(arrays, &params, &by)   what of the call, the machine and the environment decides a plan
//   begin(&arrays)                   takes what is before the op's own results
//   run(plan, buffers)
#pragma once

#include <memory>
#include <string>

#include "arrays.h"
#include "custom_call.h"
#include "plans.h"

namespace fusedconvbn::xla {

using Integers = ffi::Span<const int64_t>;
using Numbers = ffi::Span<const double>;

inline ffi::Error invalid(const Status& status) {
  return status.ok() ? ffi::Error::Success() : ffi::Error::InvalidArgument(status.message);
}

// One table of plans to a device and a kind of buffers.
template <class Device>
Plans* plans(ForwardBuffers*) {
  static Plans* const plans = new Plans(Device::plan_forward);
  return plans;
}
template <class Device>
Plans* plans(BackwardBuffers*) {
  static Plans* const plans = new Plans(Device::plan_backward);
  return plans;
}

template <class Buffers, class Device>
ffi::Error handle(Device device, ffi::RemainingArgs operands, ffi::RemainingRets results, Integers integers,
                  Numbers numbers) {
  Buffers buffers;
  ConvBnParams params;
  Arrays arrays(operands, results);
  if (!read_params(integers, numbers, &params) || arrays.operands() != operand_count(params, &buffers))
    return ffi::Error::Internal("a call of fusedconvbn that it did not write");
  PlannedBy by;
  if (const Status status = device.describe(arrays, &params, &by); !status.ok()) return invalid(status);
  std::shared_ptr<const Plan> plan;
  if (const Status status = plans<Device>(&buffers)->get(params, by, &plan); !status.ok()) return invalid(status);
  device.begin(&arrays);
  if (!gather(&arrays, *plan, &buffers))
    return ffi::Error::InvalidArgument(
        "FUSEDCONVBN_ISA, FUSEDCONVBN_KERNEL and FUSEDCONVBN_STRICT must be what they were when XLA compiled the "
        "program");
  return device.run(*plan, buffers);
}

template <class Binding>
auto with_attributes(Binding binding) {
  return std::move(binding).RemainingArgs().RemainingRets().template Attr<Integers>(kIntegers).template Attr<Numbers>(
      kNumbers);
}

// Tells XLA of a handler, which it may refuse.
Status register_handler(const char* target, const char* platform, XLA_FFI_Handler* handler);

}  // namespace fusedconvbn::xla
