#include "cuda_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <system_error>

#include "../cuda/api.h"

namespace fusedconvbn {
namespace {

template <class Function>
Status find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function == nullptr ? Status::error(std::string("the CUDA library has no ") + name) : Status{};
}

std::filesystem::path path() {
  if (const char* const named = std::getenv("FUSEDCONVBN_CUDA_LIBRARY")) return named;
  static const int here = 0;
  Dl_info info;
  if (dladdr(&here, &info) == 0) return {};
  return std::filesystem::absolute(info.dli_fname).parent_path() / "_cuda.so";
}

}  // namespace

bool CudaLibrary::is_there() {
  std::error_code none;
  return std::filesystem::exists(path(), none);
}

const CudaLibrary* CudaLibrary::get(Status* status) {
  struct Opened {
    std::unique_ptr<CudaLibrary> library;  // null after an error
    Status status;
  };
  static const Opened* const opened = [] {
    auto* const result = new Opened;
    result->status = open(path(), &result->library);
    return result;
  }();
  if (status != nullptr) *status = opened->status;
  return opened->library.get();
}

Status CudaLibrary::open(const std::string& path, std::unique_ptr<CudaLibrary>* library) {
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return Status::error(dlerror());
  auto opened = std::make_unique<CudaLibrary>();
  decltype(&fcb_cuda_layout) layout = nullptr;
  for (const Status& found :
       {find(handle, "fcb_cuda_layout", &layout), find(handle, "fcb_cuda_kernels", &opened->kernels_),
        find(handle, "fcb_cuda_forward_workspace", &opened->forward_workspace_),
        find(handle, "fcb_cuda_backward_workspace", &opened->backward_workspace_),
        find(handle, "fcb_cuda_forward", &opened->forward_), find(handle, "fcb_cuda_backward", &opened->backward_)})
    if (!found.ok()) return found;
  if (layout() != contract_layout()) return Status::error("the CUDA library is of another build: " + path);
  *library = std::move(opened);
  return {};
}

Status CudaLibrary::plan(const ConvBnParams& params, bool backward, Plan* plan) const {
  if (params.algorithm == Algorithm::kWinograd2 || params.algorithm == Algorithm::kWinograd4)
    return Status::error(std::string("algorithm must be \"auto\" or \"direct\" on a GPU. Received: ") +
                         (params.algorithm == Algorithm::kWinograd2 ? "\"winograd2\"" : "\"winograd4\""));
  *plan = Plan{};
  plan->params = params;
  plan->gpu = kernels_(&params);
  if (backward && params.saved == Saved::kMoments) plan->params.saved = Saved::kNothing;
  if (!backward) plan->saved = asked_for(params);
  plan->workspace_bytes = (backward ? backward_workspace_ : forward_workspace_)(&plan->params);
  return {};
}

}  // namespace fusedconvbn
