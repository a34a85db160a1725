// What is known of a call before any data is read or written: checked shapes and a plan.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

#include "attributes.h"
#include "tensorflow/core/framework/tensor_shape.h"

namespace fusedconvbn::tf {

struct Shapes {
  explicit Shapes(const Problem& problem)
      : inputs(problem.arguments.inputs_shape),
        filters(problem.arguments.filters_shape),
        output(output_shape(problem.params)),
        channels({problem.params.out_channels}) {}
  tensorflow::TensorShape inputs, filters, output, channels;
};

struct Prepared {
  Shapes shapes;
  Plan plan;
};

// What of a call decides that.
struct Call {
  std::array<int64_t, 4> inputs_shape{}, filters_shape{};
  bool training = false, has_residual = false, has_output = false;
  Saved saved = Saved::kConv;
  DeviceInfo device;
  std::string kernel;  // forced, or empty

  auto fields() const {
    return std::tie(inputs_shape, filters_shape, training, has_residual, has_output, saved, device.isa, device.threads,
                    kernel);
  }
};

using Planner = Status (*)(const ConvBnParams&, const DeviceInfo&, const std::string&, Plan*);

// Prepares the calls of a kernel. Those that equal the last one share its result.
class Preparation {
 public:
  Preparation(Problem attributes, Planner planner) : attributes_(std::move(attributes)), planner_(planner) {}

  absl::Status get(const Call& call, std::shared_ptr<const Prepared>* prepared) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (last_ && last_call_.fields() == call.fields()) return *prepared = last_, absl::OkStatus();
    }
    TF_RETURN_IF_ERROR(prepare(call, prepared));
    std::lock_guard<std::mutex> lock(mutex_);
    last_call_ = call;
    last_ = *prepared;
    return absl::OkStatus();
  }

 private:
  absl::Status prepare(const Call& call, std::shared_ptr<const Prepared>* prepared) const {
    Problem problem = attributes_;
    problem.arguments.inputs_shape = call.inputs_shape;
    problem.arguments.filters_shape = call.filters_shape;
    problem.params.training = call.training;
    problem.params.has_residual = call.has_residual;
    problem.params.has_output = call.has_output;
    problem.params.saved = call.saved;
    TF_RETURN_IF_ERROR(to_absl(resolve(problem.arguments, &problem.params)));
    DeviceInfo device = call.device;
    device.threads = useful_threads(problem.params, device.threads);
    Plan plan;
    TF_RETURN_IF_ERROR(to_absl(planner_(problem.params, device, call.kernel, &plan)));
    *prepared = std::make_shared<Prepared>(Prepared{Shapes(problem), plan});
    return absl::OkStatus();
  }

  const Problem attributes_;
  const Planner planner_;
  std::mutex mutex_;
  Call last_call_;
  std::shared_ptr<const Prepared> last_;
};

}  // namespace fusedconvbn::tf
