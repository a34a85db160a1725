#include "handlers.h"

namespace xla::ffi {
const XLA_FFI_Api* GetXlaFfiApi();  // of libtensorflow_cc; its header takes in half of XLA
}

namespace fusedconvbn::xla {

Status register_handler(const char* target, const char* platform, XLA_FFI_Handler* handler) {
  const XLA_FFI_Api* const api = ffi::GetXlaFfiApi();
  XLA_FFI_Error* const error = ffi::Ffi::RegisterStaticHandler(api, target, platform, handler);
  if (error == nullptr) return {};
  Status status = Status::error(ffi::internal::GetErrorMessage(api, error));
  ffi::internal::DestroyError(api, error);
  return status;
}

}  // namespace fusedconvbn::xla
