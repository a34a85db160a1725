// From a problem and a device to a plan, and from a plan to its stages.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iomanip>
#include <sstream>

#include "conv_bn.h"
#include "cpu/dispatch.h"
#include "cpu/estimates.h"
#include "shape.h"

namespace fusedconvbn {
namespace {

constexpr size_t kAlignment = 64;

size_t align(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

size_t compute_bytes(const ConvBnParams& p) { return p.dtype == DType::kFloat64 ? 8 : 4; }
size_t data_bytes(const ConvBnParams& p) { return p.dtype == DType::kFloat64 ? 8 : p.dtype == DType::kFloat32 ? 4 : 2; }
size_t output_elements(const ConvBnParams& p) { return static_cast<size_t>(p.pixels() * p.out_channels); }

// Workspace of a backward plan in stages: [conv_grad][scratch of the stage]. A recomputed z lies where its gradient
// will.
size_t conv_grad_bytes(const ConvBnParams& p) { return align(output_elements(p) * compute_bytes(p)); }

Saved saved_by(const Kernel& forward, const ConvBnParams& p) {
  if (!p.training) return Saved::kNothing;
  if (forward.saves == Saved::kMoments) return Saved::kMoments;
  return asked_for(p);
}

Status forced_name(const std::string& argument, std::string* name) {
  const char* environment = std::getenv("FUSEDCONVBN_KERNEL");
  *name = !argument.empty() ? argument : environment ? environment : "";
  if (name->empty()) return Status{};
  std::string known;
  for (const Kernel& kernel : kernel_table()) {
    if (*name == kernel.name) return Status{};
    known += std::string(known.empty() ? "" : ", ") + kernel.name;
  }
  return Status::error("kernel must be one of " + known + ". Received: " + *name);
}

// Reads FUSEDCONVBN_STRICT.
Status read_strict(bool* strict) {
  const char* environment = std::getenv("FUSEDCONVBN_STRICT");
  const std::string value = environment ? environment : "";
  *strict = value == "1";
  if (*strict || value.empty() || value == "0") return Status{};
  return Status::error("FUSEDCONVBN_STRICT must be 0 or 1. Received: " + value);
}

// A plan without stages, and the name of the forced row.
Status begin(const ConvBnParams& params, const DeviceInfo& device, const std::string& force_kernel, Plan* plan,
             std::string* forced) {
  if (Status s = validate(params); !s.ok()) return s;
  *plan = Plan{params, device, {}};
  if (Status s = read_strict(&plan->params.strict); !s.ok()) return s;
  return forced_name(force_kernel, forced);
}

bool usable(const Kernel& kernel, const ConvBnParams& params, const DeviceInfo& device) {
  return has_rows(device.isa, kernel.isa) && kernel.supports(params);
}

bool serves(const Kernel& kernel, Stage stage) {
  return kernel.stage == stage || (stage == Stage::kRecompute && kernel.stage == Stage::kForward && kernel.recomputes);
}

// The forced row if it serves this stage, else the first that suits the problem.
Status choose(Stage stage, const ConvBnParams& params, const DeviceInfo& device, const std::string& forced,
              const Kernel** chosen) {
  *chosen = nullptr;
  for (const Kernel& kernel : kernel_table()) {
    if (!serves(kernel, stage)) continue;
    if (forced == kernel.name && !usable(kernel, params, device))
      return Status::error("kernel " + forced + " does not support this problem or this machine (" +
                           name_of(device.isa) + ")");
    if (forced == kernel.name || (*chosen == nullptr && usable(kernel, params, device) &&
                                  kernel.suits(params, estimated_isa(device.isa, kernel.isa))))
      *chosen = &kernel;
  }
  return *chosen ? Status{} : Status::error(std::string("no kernel for stage ") + name_of(stage));
}

Status add_stages(const std::vector<Stage>& stages, const std::string& forced, Plan* plan) {
  size_t scratch = 0;
  for (Stage stage : stages) {
    const Kernel* kernel = nullptr;
    if (Status s = choose(stage, plan->params, plan->device, forced, &kernel); !s.ok()) return s;
    plan->stages.push_back(kernel);
    scratch = std::max(scratch, kernel->scratch_bytes(plan->params, plan->device));
  }
  plan->workspace_bytes = plan->conv_grad_bytes + align(scratch);
  return Status{};
}

// The instruction set of the row that a stage would take.
Isa best_isa(Stage stage, const ConvBnParams& params, const DeviceInfo& device) {
  const Kernel* kernel = nullptr;
  return choose(stage, params, device, "", &kernel).ok() ? kernel->isa : Isa::kGeneric;
}

// Whether a row that suits is to do the whole of backward: the stage that multiplies most has no row of a better
// instruction set, or this one outdoes it all the same.
bool beats_stages(const Kernel& row, const ConvBnParams& params, Isa stages) {
  return row.isa >= stages || (row.outdoes_thirds != nullptr && row.outdoes_thirds(params));
}

// Whether one row is to do it: it is forced; or, where nothing is, suits the problem and beats the stages.
bool backward_in_one(const ConvBnParams& params, const DeviceInfo& device, const std::string& forced) {
  const auto& rows = kernel_table();
  const Isa stages = params.saved == Saved::kMoments ? Isa::kGeneric : best_isa(Stage::kWgrad, params, device);
  return std::any_of(rows.begin(), rows.end(), [&](const Kernel& row) {
    if (row.stage != Stage::kBackward) return false;
    if (!forced.empty()) return forced == row.name;
    return usable(row, params, device) && row.suits(params, estimated_isa(device.isa, row.isa)) &&
           beats_stages(row, params, stages);
  });
}

Status run_forward(const Plan& plan, const ForwardBuffers& buffers, void* packed, void* workspace,
                   ParallelFor* parallel) {
  StageCall call{plan.params, plan.device};
  call.forward = &buffers;
  call.packed = packed;
  call.scratch = static_cast<char*>(workspace);
  call.parallel = parallel;
  return plan.stages.at(0)->run(call);
}

// One direction's time on one thread, roughly: a usual speed of the multiplications and of memory.
double estimated_microseconds(const ConvBnParams& p) {
  constexpr double kFlops = 1e5, kBytes = 1e4;  // a microsecond
  const double outputs = static_cast<double>(output_elements(p));
  const double inputs = static_cast<double>(p.batch) * p.in_height * p.in_width * p.in_channels;
  const double filters = static_cast<double>(p.taps()) * p.group_in() * p.out_channels;
  return 2 * outputs * p.taps() * p.group_in() / kFlops + (inputs + outputs + filters) * data_bytes(p) / kBytes;
}

}  // namespace

int useful_threads(const ConvBnParams& params, int threads) {
  // Waking a thread takes the caller some 10 us if it sleeps, and the thread begins some 30 us later; if it still looks
  // out for work, 1 us.
  constexpr double kMicroseconds = 20;
  return static_cast<int>(std::min<double>(threads, 1 + std::floor(estimated_microseconds(params) / kMicroseconds)));
}

Status plan_forward(const ConvBnParams& params, const DeviceInfo& device, const std::string& force_kernel, Plan* plan) {
  std::string forced;
  if (Status s = begin(params, device, force_kernel, plan, &forced); !s.ok()) return s;
  if (Status s = add_stages({Stage::kForward}, forced, plan); !s.ok()) return s;
  plan->saved = saved_by(*plan->stages[0], params);
  if (const auto packed_bytes = plan->stages[0]->packed_bytes) plan->packed_bytes = align(packed_bytes(params, device));
  return Status{};
}

Status plan_backward(const ConvBnParams& params, const DeviceInfo& device, const std::string& force_kernel,
                     Plan* plan) {
  std::string forced;
  if (Status s = begin(params, device, force_kernel, plan, &forced); !s.ok()) return s;
  if (backward_in_one(params, device, forced)) return add_stages({Stage::kBackward}, forced, plan);
  std::vector<Stage> stages = {Stage::kReduce, Stage::kDgrad, Stage::kWgrad};
  if (!has_conv_out(params)) stages.insert(stages.begin(), Stage::kRecompute);
  plan->conv_grad_bytes = conv_grad_bytes(params);
  return add_stages(stages, forced, plan);
}

Status pack_filters(const Plan& plan, const void* filters, void* packed, void* workspace, ParallelFor* parallel) {
  if (plan.packed_bytes == 0) return Status::error("plan must pack filters. Received: " + plan.describe());
  ForwardBuffers buffers;
  buffers.filters = filters;
  return run_forward(plan, buffers, packed, workspace, parallel);
}

Status run_cpu(const Plan& plan, const ForwardBuffers& buffers, void* workspace, ParallelFor* parallel) {
  if (const size_t n = output_elements(plan.params); plan.saved == Saved::kBFloat16 && n % 2 == 1)
    static_cast<uint16_t*>(buffers.conv_out)[n] = 0;  // the other half of the last element
  return run_forward(plan, buffers, nullptr, workspace, parallel);
}

Status run_cpu(const Plan& plan, const BackwardBuffers& buffers, void* workspace, ParallelFor* parallel) {
  const bool saved = plan.params.training && plan.params.saved != Saved::kNothing;
  if (saved && buffers.conv_out == nullptr && plan.params.pixels() > 0)
    return Status::error("conv_out must be what forward saved in training. Received: none");
  StageCall call{plan.params, plan.device};
  call.backward = &buffers;
  call.conv_grad = workspace;
  call.conv_out = plan.stages.at(0)->stage == Stage::kForward ? workspace : buffers.conv_out;
  call.scratch = static_cast<char*>(workspace) + plan.conv_grad_bytes;
  call.parallel = parallel;
  for (const Kernel* kernel : plan.stages)
    if (Status s = kernel->run(call); !s.ok()) return s;
  return Status{};
}

std::vector<int64_t> conv_out_shape(const ConvBnParams& params, Saved saved) {
  if (saved == Saved::kNothing) return {};
  const auto width =
      static_cast<int64_t>(compute_bytes(params) / data_bytes(params));  // moments are of the compute type
  if (saved == Saved::kMoments) return {width * (params.in_channels + 2), params.in_channels};
  if (saved == Saved::kBFloat16) return {(params.pixels() * params.out_channels + 1) / 2};
  const auto shape = output_shape(params);
  return {shape.begin(), shape.end()};
}

std::string Plan::describe() const {
  if (!gpu.empty()) return gpu + "; workspace " + std::to_string(workspace_bytes) + " bytes of a GPU's memory";
  std::string text;
  for (const Kernel* kernel : stages) text += std::string(text.empty() ? "" : " -> ") + kernel->name;
  return text + "; workspace " + std::to_string(workspace_bytes) + " bytes; isa " + name_of(device.isa);
}

std::vector<Comparison> Plan::comparisons() const {
  std::vector<Comparison> all;
  for (const Kernel* kernel : stages)
    for (Comparison& each : comparisons_of(*kernel, params, device.isa)) all.push_back(std::move(each));
  return all;
}

std::string Plan::explain() const {
  std::ostringstream text;
  text << describe() << std::fixed << std::setprecision(1);
  for (const Comparison& each : comparisons()) {
    text << "\n  " << each.stage << ", estimated on one thread:";
    for (const Estimate& estimate : each.estimates)
      text << (&estimate == &each.estimates.front() ? " " : ", ") << estimate.algorithm << " "
           << estimate.nanoseconds / 1e3 << " us";
  }
  return text.str();
}

std::vector<KernelInfo> list_kernels() {
  std::vector<KernelInfo> rows;
  for (const Kernel& kernel : kernel_table()) rows.push_back({kernel.name, name_of(kernel.stage), kernel.isa});
  return rows;
}

}  // namespace fusedconvbn
