// Lets XLA's programs for the CPU run the custom calls that are for a GPU, by CUDA kernels that the C++ compiler made:
// the same handlers, which get a stream that is none. Plain C, for ctypes.
#include <string>

#include "../xla/custom_call.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "xla/ffi/api/ffi.h"

namespace xla::ffi {  // of xla/ffi/ffi_api.h, which wants headers that are not installed
struct HandlerRegistration {
  XLA_FFI_Metadata metadata;
  XLA_FFI_Handler_Bundle bundle;
};
absl::StatusOr<HandlerRegistration> FindHandler(absl::string_view name, absl::string_view platform);
const XLA_FFI_Api* GetXlaFfiApi();
}  // namespace xla::ffi

namespace {

namespace ffi = xla::ffi;

XLA_FFI_Error* no_stream(XLA_FFI_Stream_Get_Args* wanted) {
  wanted->stream = nullptr;
  return nullptr;
}

const XLA_FFI_Api* api_with_a_stream() {
  static const XLA_FFI_Api api = [] {
    XLA_FFI_Api api = *ffi::GetXlaFfiApi();
    api.XLA_FFI_Stream_Get = no_stream;
    return api;
  }();
  return &api;
}

// The handler that is registered for a GPU.
template <const char* target>
XLA_FFI_Handler* cuda_handler() {
  static XLA_FFI_Handler* const handler = ffi::FindHandler(target, "CUDA")->bundle.execute;
  return handler;
}

template <const char* target>
XLA_FFI_Error* on_host(XLA_FFI_CallFrame* frame) {
  const XLA_FFI_Api* const api = frame->api;
  frame->api = api_with_a_stream();
  XLA_FFI_Error* const error = cuda_handler<target>()(frame);
  frame->api = api;
  return error;
}

template <const char* target>
std::string register_on_host() {
  if (const auto found = ffi::FindHandler(target, "CUDA"); !found.ok()) return std::string(found.status().message());
  const XLA_FFI_Api* const api = ffi::GetXlaFfiApi();
  XLA_FFI_Error* const error = ffi::Ffi::RegisterStaticHandler(api, target, "Host", on_host<target>);
  return error == nullptr ? "" : ffi::internal::GetErrorMessage(api, error);
}

}  // namespace

// Empty, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* harness_register() {
  static const std::string error = [] {
    const std::string forward = register_on_host<fusedconvbn::xla::kCudaForward>();
    return forward.empty() ? register_on_host<fusedconvbn::xla::kCudaBackward>() : forward;
  }();
  return error.c_str();
}
