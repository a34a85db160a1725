// The contract between the kernels and whoever calls them.
//
//   z = conv(inputs, filters)
//   mean, variance = training ? moments of z over N,H,W : moving_mean, moving_variance
//   output = activation(gamma * (z - mean) / sqrt(variance + epsilon) + beta + residual)
//
// A caller describes the problem (ConvBnParams), plans it (plan_forward, plan_backward), allocates
// plan.workspace_bytes and runs the plan on its own threads. The core knows no framework, owns no memory and no
// threads, keeps no state between calls, and reports every error as a Status: it never prints or aborts, and throws
// nothing but std::bad_alloc where the few hundred bytes of a plan cannot be had.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "activation.h"

namespace fusedconvbn {

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };
enum class DataFormat { kNHWC, kNCHW };
enum class Algorithm { kAuto, kDirect, kWinograd2, kWinograd4 };
enum class Save { kConv, kBFloat16, kRecompute };
// What forward in training leaves in conv_out for backward: nothing, z, the second moments of the inputs, from which
// backward needs no z (cpu/second_moments.h), or z - batch_mean rounded to bfloat16.
enum class Saved { kNothing, kConv, kMoments, kBFloat16 };
// Each has what those before it have; but products of bfloat16 pairs (AVX512_BF16) are not used beside AMX.
enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Bf16, kAmx };
constexpr Isa kIsas[] = {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};

struct Status {
  std::string message;  // empty: success
  bool ok() const { return message.empty(); }
  static Status error(std::string text) { return Status{std::move(text)}; }
};

// The problem: everything that decides which kernels run and how much memory they need; no pointers. Sizes are in
// elements, paddings in elements of the input. Use resolve() of shape.h to make one from a user's arguments.
struct ConvBnParams {
  DType dtype = DType::kFloat32;  // of inputs, filters, residual, output
  DataFormat data_format = DataFormat::kNHWC;
  int64_t batch = 0, in_height = 0, in_width = 0, in_channels = 0;
  int64_t filter_height = 0, filter_width = 0, out_channels = 0, groups = 1;
  int64_t stride_height = 1, stride_width = 1, dilation_height = 1, dilation_width = 1;
  int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  int64_t out_height = 0, out_width = 0;
  Activation activation = Activation::kNone;
  bool has_residual = false;
  bool training = false;
  bool unbiased_moving_variance = false;
  double epsilon = 1e-3, momentum = 0.99;
  Algorithm algorithm = Algorithm::kAuto;
  Save save = Save::kConv;
  // Backward, in training: what forward's plan said that it saves, and whether y is at hand though not required.
  Saved saved = Saved::kConv;
  bool has_output = false;
  bool keeps_filters = true;  // inference: whoever runs the plan has packed_filters from one call to the next
  bool strict = false;        // kAuto takes no algorithm that errs more than the direct one; plan_*() sets it

  int64_t pixels() const { return batch * out_height * out_width; }  // elements a channel
  int64_t group_in() const { return in_channels / groups; }
  int64_t group_out() const { return out_channels / groups; }
  int64_t taps() const { return filter_height * filter_width; }
};

// Statistics, gamma and beta are float32; float64 for float64 inputs ("stat" below). [K] is [out_channels].
// "data" is the type that ConvBnParams::dtype names; image shapes are in the order of data_format. In inference forward
// writes the statistics that it reads, and what follows from them: null pointers save that.
struct ForwardBuffers {
  const void* inputs = nullptr;           // data [N,H,W,C] or [N,C,H,W]
  const void* filters = nullptr;          // data [kh,kw,C/groups,K]
  const void* gamma = nullptr;            // stat [K]
  const void* beta = nullptr;             // stat [K]
  const void* moving_mean = nullptr;      // stat [K]
  const void* moving_variance = nullptr;  // stat [K]
  const void* residual = nullptr;         // data, shape of output; null unless has_residual
  void* output = nullptr;                 // data [N,OH,OW,K] or [N,K,OH,OW]; unless training, may be the residual
  void* new_moving_mean = nullptr;        // stat [K]
  void* new_moving_variance = nullptr;    // stat [K]
  void* batch_mean = nullptr;             // stat [K]: the mean that was subtracted (training: of the batch)
  void* inv_std = nullptr;                // stat [K]: 1 / sqrt(variance + epsilon), of the same statistics
  void* conv_out = nullptr;               // data, of conv_out_shape(params, plan.saved); unused for kNothing
  const void* packed_filters = nullptr;   // what pack_filters made of `filters`; null: run_cpu packs them
};

// Gradients that are null are not computed; d_gamma .. d_moving_variance are always written.
struct BackwardBuffers {
  const void* output_gradient = nullptr;           // data, shape of output
  const void* moving_mean_gradient = nullptr;      // stat [K]: of the returned moving mean
  const void* moving_variance_gradient = nullptr;  // stat [K]: of the returned moving variance
  const void* inputs = nullptr;                    // as in ForwardBuffers
  const void* filters = nullptr;
  const void* gamma = nullptr;
  const void* beta = nullptr;
  const void* moving_mean = nullptr;
  const void* moving_variance = nullptr;
  const void* residual = nullptr;     // data; required if needs_residual(params)
  const void* output = nullptr;       // data; required if needs_output(params) or params.has_output
  const void* batch_mean = nullptr;   // stat [K], as forward wrote it; ignored in inference
  const void* inv_std = nullptr;      // stat [K], as forward wrote it; ignored in inference
  const void* conv_out = nullptr;     // what forward saved; without z, it is recomputed from inputs and filters
  void* d_inputs = nullptr;           // data, shape of inputs
  void* d_filters = nullptr;          // data, shape of filters
  void* d_gamma = nullptr;            // stat [K]
  void* d_beta = nullptr;             // stat [K]
  void* d_moving_mean = nullptr;      // stat [K]
  void* d_moving_variance = nullptr;  // stat [K]
  void* d_residual = nullptr;         // data, shape of output
};

// What the gradient reads besides z: with a residual, the activation's argument cannot be had from z alone. It
// follows from the output where derivative_from_output() says so, else the residual itself is needed.
inline bool needs_output(const ConvBnParams& p) { return p.has_residual && derivative_from_output(p.activation); }
inline bool needs_residual(const ConvBnParams& p) {
  return p.has_residual && p.activation != Activation::kNone && !derivative_from_output(p.activation);
}

// What params.save asks of forward. Data of 16 bits is saved as it is, and so is float64, which is for its precision.
inline Saved asked_for(const ConvBnParams& p) {
  if (!p.training || p.save == Save::kRecompute) return Saved::kNothing;
  return p.save == Save::kBFloat16 && p.dtype == DType::kFloat32 ? Saved::kBFloat16 : Saved::kConv;
}

// Whether backward finds z in conv_out, and whether as z - batch_mean in bfloat16.
inline bool has_rounded_conv_out(const ConvBnParams& p) { return p.training && p.saved == Saved::kBFloat16; }
inline bool has_conv_out(const ConvBnParams& p) {
  return p.training && (p.saved == Saved::kConv || has_rounded_conv_out(p));
}

struct DeviceInfo {
  Isa isa = Isa::kGeneric;  // the best that may be used
  int threads = 1;          // how many run_*'s ParallelFor may run at once
};

// What this machine offers; the environment variable FUSEDCONVBN_ISA (generic, avx2, avx512, amx) lowers it.
Status detect_device(int threads, DeviceInfo* device);

// How many of `threads` shorten a call: work for less than some microseconds is done before another thread has begun.
int useful_threads(const ConvBnParams& params, int threads);

// What a choice among algorithms of a stage compared: estimates for one thread, of float32 with AVX2 or AVX-512
// (thirds: AMX), whatever the problem's type; for the portable kernels those with AVX-512. The least is chosen, unless
// something else rules it out: few channels, a margin for thirds, FUSEDCONVBN_STRICT, what the caller names.
struct Estimate {
  std::string algorithm;
  double nanoseconds;
};
struct Comparison {
  std::string stage;
  std::vector<Estimate> estimates;
};

struct Kernel;  // a row of the dispatch table (cpu/dispatch.h)

// A kernel for each stage of the problem, and the memory that they need. The result of a pure function of the problem
// and the device; describe() and explain() print it. Splits of a sum are fixed by the problem, never by the number of
// threads.
struct Plan {
  ConvBnParams params;
  DeviceInfo device;
  std::vector<const Kernel*> stages;  // in the order of execution
  std::string gpu = {};               // what the CUDA library runs (cuda_library.h); empty: a plan for the CPU
  Saved saved = Saved::kNothing;      // forward: what it leaves in conv_out
  size_t workspace_bytes = 0;         // 64-byte aligned
  size_t conv_grad_bytes = 0;         // of them, at the start: the gradient of z, handed from stage to stage
  size_t packed_bytes = 0;            // forward: of the filters as pack_filters() writes them; 0: not to be packed
  std::string describe() const;       // a line
  std::string explain() const;        // it, and a line for each of comparisons()
  std::vector<Comparison> comparisons() const;  // those that the kernels took part in
};

// In elements of the data type. Empty where nothing is saved; else the output's shape; for kMoments [C + 2, C] numbers
// of the compute type: twice as many rows of 16-bit data, which then are parts of them; for kBFloat16 [(n + 1) / 2]:
// its n numbers [N,OH,OW,K], whatever the data format, two in an element.
std::vector<int64_t> conv_out_shape(const ConvBnParams& params, Saved saved);

// force_kernel: the name of a row (raw.kernels() lists them), used for each stage that it serves; empty: the first row
// of each stage that supports the problem. The environment variable FUSEDCONVBN_KERNEL does the same;
// FUSEDCONVBN_STRICT=1 sets params.strict.
Status plan_forward(const ConvBnParams& params, const DeviceInfo& device, const std::string& force_kernel, Plan* plan);
Status plan_backward(const ConvBnParams& params, const DeviceInfo& device, const std::string& force_kernel, Plan* plan);

// Runs body(task, worker) for task = 0 .. tasks-1, returns when all have ended. Several may run at once, each with a
// worker number of its own in [0, threads()). A body never waits for another one.
class ParallelFor {
 public:
  using Body = std::function<void(int64_t task, int worker)>;
  virtual ~ParallelFor() = default;
  virtual int threads() const = 0;  // at most plan.device.threads
  virtual void run(int64_t tasks, const Body& body) = 0;
};

// Packs filters ahead of run_cpu, into plan.packed_bytes of 64-byte aligned memory. They serve every forward plan of
// the same row and packed_bytes whose filters have the same shape, groups and dtype, whatever else differs.
Status pack_filters(const Plan& plan, const void* filters, void* packed, void* workspace, ParallelFor* parallel);

Status run_cpu(const Plan& plan, const ForwardBuffers& buffers, void* workspace, ParallelFor* parallel);
Status run_cpu(const Plan& plan, const BackwardBuffers& buffers, void* workspace, ParallelFor* parallel);

// One line a row of the dispatch table.
struct KernelInfo {
  std::string name;   // stage_algorithm_isa
  std::string stage;  // forward, reduce, dgrad, wgrad, backward
  Isa isa;
};
std::vector<KernelInfo> list_kernels();

}  // namespace fusedconvbn
