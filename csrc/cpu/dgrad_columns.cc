// The gradient by the inputs where they have few channels, from the gradient of z in memory (column_gradient.h).
#include "column_gradient.h"
#include "stages.h"

namespace fusedconvbn {
namespace {

constexpr int64_t kTasks = 16;  // enough for as many threads

template <class C>
ColumnGradient<C> column_gradient(const KernelSet& set, const ConvBnParams& p, const BackwardBuffers& buffers,
                                  int workers, Arena* arena) {
  ColumnGradient<C> gradient(set, p, buffers, kTasks / std::max<int64_t>(p.batch, 1));
  gradient.carve(arena, workers);
  return gradient;
}

template <class C>
void run(const KernelSet& set, const StageCall& call) {
  const ConvBnParams& p = call.params;
  Arena arena(call.scratch);
  const auto gradient = column_gradient<C>(set, p, *call.backward, call.device.threads, &arena);
  gradient.pack_filters();
  call.parallel->run(p.batch * gradient.chunks(), [&](int64_t task, int worker) {
    const int64_t image = task / gradient.chunks(), chunk = task % gradient.chunks();
    const Span outputs = gradient.output_lines(chunk);
    const C* dz = static_cast<const C*>(call.conv_grad) + image * p.out_height * p.out_width * p.out_channels;
    auto lines = gradient.begin(image, chunk, worker);
    const int64_t end = outputs.end * p.out_width;
    for (int64_t at = outputs.begin * p.out_width; at < end; at += gradient.kPositions)
      gradient.add(at, std::min(gradient.kPositions, end - at), dz + at * p.out_channels, p.out_channels, worker,
                   &lines);
    gradient.end(worker, &lines);
  });
}

}  // namespace

size_t dgrad_columns_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return with_compute_type(p.dtype, [&](auto c) {
    Arena arena;
    column_gradient<decltype(c)>(set, p, {}, device.threads, &arena);
    return arena.used();
  });
}

Status run_dgrad_columns(const KernelSet& set, const StageCall& call) {
  if (call.backward->d_inputs == nullptr) return Status{};
  with_compute_type(call.params.dtype, [&](auto c) { run<decltype(c)>(set, call); });
  return Status{};
}

}  // namespace fusedconvbn
