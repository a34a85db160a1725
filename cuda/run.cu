// The entry points: a problem's data type, and, where its channels are few, the copies that tensor cores read.
#include "element.h"

#include <type_traits>

#include "api.h"
#include "backward.cuh"
#include "widen.cuh"

namespace fusedconvbn::cuda {
namespace {

// Where a problem is to run; or it is only asked how much memory it needs.
struct Target {
  void *workspace, *stream;
  bool runs;
};

template <class T>
Forward<T> direction(const ConvBnParams& p, const ForwardBuffers& b, void* stream) {
  return {p, b, stream};
}
template <class T>
Backward<T> direction(const ConvBnParams& p, const BackwardBuffers& b, void* stream) {
  return {p, b, stream};
}

// Runs the problem; its workspace.
template <class T, class Buffers>
size_t run(const ConvBnParams& p, const Buffers& b, const Target& at) {
  auto it = direction<T>(p, b, at.stream);
  const size_t bytes = it.carve(at.workspace);
  if (at.runs) it.run();
  return bytes;
}

void replace(const ForwardBuffers&, ForwardBuffers*, void*, void*) {}
void replace(const BackwardBuffers& from, BackwardBuffers* to, void* d_inputs, void* d_filters) {
  to->d_inputs = from.d_inputs == nullptr ? nullptr : d_inputs;
  to->d_filters = from.d_filters == nullptr ? nullptr : d_filters;
}
template <class T>
void copy_out(const Widened<T>&, const ForwardBuffers&, void*) {}
template <class T>
void copy_out(const Widened<T>& widened, const BackwardBuffers& b, void* stream) {
  widened.copy_out(b.d_inputs, b.d_filters, stream);
}

// The same of a problem of few channels.
template <class T, class Buffers>
size_t run_widened(const ConvBnParams& p, const Buffers& b, const Target& at) {
  Widened<T> copies{p};
  Carver carver(at.workspace);
  copies.carve(&carver, std::is_same_v<Buffers, BackwardBuffers>);
  const size_t bytes = carver.bytes();
  Buffers wide = b;
  wide.inputs = copies.inputs, wide.filters = copies.filters;
  replace(b, &wide, copies.d_inputs, copies.d_filters);
  if (!at.runs) return bytes + run<T>(copies.wide, wide, at);
  copies.copy_in(b.inputs, b.filters, at.stream);
  const size_t rest = run<T>(copies.wide, wide, {static_cast<char*>(at.workspace) + bytes, at.stream, true});
  copy_out(copies, b, at.stream);
  return bytes + rest;
}

template <class Buffers>
size_t run_of_type(const ConvBnParams& p, const Buffers& b, const Target& at) {
  switch (p.dtype) {
    case DType::kFloat32: return run<float>(p, b, at);
    case DType::kFloat64: return run<double>(p, b, at);
    case DType::kFloat16: return is_widened(p) ? run_widened<Half>(p, b, at) : run<Half>(p, b, at);
    case DType::kBFloat16: return is_widened(p) ? run_widened<BFloat16>(p, b, at) : run<BFloat16>(p, b, at);
  }
  return 0;
}

template <class Buffers>
const char* queue(const ConvBnParams& p, const Buffers& b, void* workspace, void* stream) {
  if (const char* error = too_large(p)) return error;
  run_of_type(p, b, {workspace, stream, true});
  return launch_error();
}

}  // namespace
}  // namespace fusedconvbn::cuda

using namespace fusedconvbn;  // NOLINT: of the entry points below alone

size_t fcb_cuda_layout() { return contract_layout(); }
const char* fcb_cuda_kernels(const ConvBnParams* params) {
  if (cuda::is_widened(*params)) return "tensor cores, input channels filled up to eights";
  if (cuda::suits_tensor_cores(*params)) switch (cuda::forward_tiles(*params)) {
      case cuda::Tiles::kWide: return "tensor cores, forward in tiles of 256x128";
      case cuda::Tiles::kSquare: return "tensor cores, forward in tiles of 128x128";
      case cuda::Tiles::kNarrow: return "tensor cores, forward in tiles of 128x64";
    }
  return cuda::is_depthwise(*params) ? "depthwise" : "plain";
}
size_t fcb_cuda_forward_workspace(const ConvBnParams* params) {
  return cuda::run_of_type(*params, ForwardBuffers{}, {});
}
size_t fcb_cuda_backward_workspace(const ConvBnParams* params) {
  return cuda::run_of_type(*params, BackwardBuffers{}, {});
}
const char* fcb_cuda_forward(const ConvBnParams* params, const ForwardBuffers* buffers, void* workspace, void* stream) {
  return cuda::queue(*params, *buffers, workspace, stream);
}
const char* fcb_cuda_backward(const ConvBnParams* params, const BackwardBuffers* buffers, void* workspace,
                              void* stream) {
  return cuda::queue(*params, *buffers, workspace, stream);
}
