// Plans of the custom calls that have run.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "custom_call.h"

namespace fusedconvbn::xla {

// What besides the problem decides a plan.
struct PlannedBy {
  DeviceInfo device;
  std::string kernel;  // forced, or empty
};

// A program holds as many calls as a network has layers, and a handler is told nothing of the program: so one table
// serves all, and keeps what it has.
class Plans {
 public:
  using Planner = Status (*)(const ConvBnParams&, const DeviceInfo&, const std::string&, Plan*);

  explicit Plans(Planner planner) : planner_(planner) {}

  Status get(const ConvBnParams& params, const PlannedBy& by, std::shared_ptr<const Plan>* plan) {
    Key key{integers_of(params), params.epsilon, params.momentum, by.device.isa, by.device.threads, by.kernel};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = plans_.find(key);
      if (found != plans_.end()) return *plan = found->second, Status{};
    }
    auto made = std::make_shared<Plan>();
    const Status status = planner_(params, by.device, by.kernel, made.get());
    if (!status.ok()) return status;
    std::lock_guard<std::mutex> lock(mutex_);
    *plan = plans_.emplace(std::move(key), std::move(made)).first->second;
    return Status{};
  }

 private:
  using Key = std::tuple<std::vector<int64_t>, double, double, Isa, int, std::string>;

  const Planner planner_;
  std::mutex mutex_;
  std::map<Key, std::shared_ptr<const Plan>> plans_;
};

}  // namespace fusedconvbn::xla
