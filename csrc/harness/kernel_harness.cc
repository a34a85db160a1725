// Makes and runs the kernels that an op library registered for a device, without that device: the caller says where its
// memory comes from and which stream is the context's. So the GPU kernels run on the host, by the CUDA kernels that the
// C++ compiler made, and on a GPU where there is no TensorFlow but its framework library. Plain C, for ctypes.
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "tensorflow/core/framework/device_base.h"
#include "tensorflow/core/framework/node_def_util.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/public/version.h"
#include "xla/stream_executor/stream.h"

namespace tensorflow {  // exported, but in no header that is installed
absl::Status LoadDynamicLibrary(const char* path, void** library, const void** ops, size_t* bytes);
namespace proto_utils {
absl::Status ParseTextFormatFromString(absl::string_view input, google::protobuf::Message* output);
}
}  // namespace tensorflow

namespace {

using tensorflow::AllocatorAttributes;
using tensorflow::OpKernel;
using tensorflow::Tensor;
using tensorflow::TensorShape;
namespace se = stream_executor;

extern "C" {
using Allocate = void* (*)(size_t bytes);  // aligned to 256 bytes; null: there is no memory left
using Release = void (*)(void* memory);

struct Array {
  void* data;
  int32_t dtype;  // tensorflow::DataType; 0 of an output: not wanted
  int32_t rank;
  int64_t sizes[4];
};
}

class Memory : public tensorflow::Allocator {
 public:
  Memory(Allocate allocate, Release release) : allocate_(allocate), release_(release) {}
  std::string Name() override { return "harness"; }
  void* AllocateRaw(size_t, size_t bytes) override { return allocate_(bytes); }
  void DeallocateRaw(void* memory) override { release_(memory); }
  tensorflow::AllocatorMemoryType GetMemoryType() const override { return tensorflow::AllocatorMemoryType::kDevice; }

 private:
  const Allocate allocate_;
  const Release release_;
};

class Device : public tensorflow::DeviceBase {
 public:
  Device(Allocate allocate, Release release) : DeviceBase(tensorflow::Env::Default()), memory_(allocate, release) {}
  tensorflow::Allocator* GetAllocator(AllocatorAttributes wanted) override {
    return wanted.on_host() ? tensorflow::cpu_allocator() : &memory_;
  }

 private:
  Memory memory_;
};

// A handle, and nothing that a kernel may ask of it.
class Stream : public se::Stream {
 public:
  explicit Stream(void* handle) : handle_(handle) {}
  PlatformSpecificHandle platform_specific_handle() const override { return {handle_}; }
  bool ok() const override { return true; }
  absl::StatusOr<se::Stream*> GetOrCreateSubStream() override { return none(); }
  void ReturnSubStream(se::Stream*) override {}
  absl::Status WaitFor(se::Stream*) override { return none(); }
  absl::Status WaitFor(se::Event*) override { return none(); }
  absl::Status RecordEvent(se::Event*) override { return none(); }
  absl::Status Memcpy(void*, const se::DeviceAddressBase&, uint64_t) override { return none(); }
  absl::Status Memcpy(se::DeviceAddressBase*, const void*, uint64_t) override { return none(); }
  absl::Status BlockHostUntilDone() override { return none(); }
  absl::Status DoHostCallbackWithStatus(absl::AnyInvocable<absl::Status() &&>) override { return none(); }
  se::StreamExecutor* parent() const override { return nullptr; }
  se::CudaComputeCapability GetCudaComputeCapability() const override { return {}; }
  se::RocmComputeCapability GetRocmComputeCapability() const override { return {}; }
  se::OneAPIComputeCapability GetOneAPIComputeCapability() const override { return {}; }
  std::variant<se::StreamPriority, int> priority() const override { return 0; }
  const std::string& GetName() const override { return name_; }
  void SetName(std::string) override {}

 private:
  static absl::Status none() { return absl::UnimplementedError("the harness has no such stream"); }
  void* const handle_;
  const std::string name_;
};

class Context : public tensorflow::DeviceContext {
 public:
  explicit Context(void* stream) : stream_(stream) {}
  se::Stream* stream() const override { return &stream_; }

 private:
  mutable Stream stream_;
};

// Memory of the caller's.
class Borrowed : public tensorflow::TensorBuffer {
 public:
  Borrowed(void* data, size_t bytes) : TensorBuffer(data), bytes_(bytes) {}
  size_t size() const override { return bytes_; }
  TensorBuffer* root_buffer() override { return this; }
  bool OwnsMemory() const override { return false; }
  void FillAllocationDescription(tensorflow::AllocationDescription*) const override {}

 private:
  const size_t bytes_;
};

TensorShape shape_of(const Array& array) { return TensorShape(absl::MakeSpan(array.sizes, array.rank)); }

Tensor tensor_of(const Array& array) {
  const auto dtype = static_cast<tensorflow::DataType>(array.dtype);
  const TensorShape shape = shape_of(array);
  const size_t bytes = shape.num_elements() * tensorflow::DataTypeSize(dtype);
  return Tensor(dtype, shape, tensorflow::core::RefCountPtr<tensorflow::TensorBuffer>(new Borrowed(array.data, bytes)));
}

struct Kernel {
  std::unique_ptr<Device> device;
  std::unique_ptr<OpKernel> kernel;
  std::vector<Tensor> outputs;  // of the last call
};

absl::Status create(const char* type, const char* node_text, Kernel* made) {
  tensorflow::NodeDef node;
  TF_RETURN_IF_ERROR(tensorflow::proto_utils::ParseTextFormatFromString(node_text, &node));
  const tensorflow::OpDef* op = nullptr;
  TF_RETURN_IF_ERROR(tensorflow::OpRegistry::Global()->LookUpOpDef(node.op(), &op));
  tensorflow::AddDefaultsToNodeDef(*op, &node);
  absl::Status status;
  made->kernel = tensorflow::CreateOpKernel(tensorflow::DeviceType(type), made->device.get(),
                                            made->device->GetAllocator({}), node, TF_GRAPH_DEF_VERSION, &status);
  return status;
}

absl::Status run(Kernel* kernel, const Array* inputs, int count, void* stream, Array* outputs) {
  std::vector<Tensor> tensors;
  for (int i = 0; i < count; ++i) tensors.push_back(tensor_of(inputs[i]));
  std::vector<tensorflow::TensorValue> values;
  for (Tensor& tensor : tensors) values.emplace_back(&tensor);
  const int results = kernel->kernel->num_outputs();
  const std::vector<AllocatorAttributes> input_attributes(count), output_attributes(results);
  const std::unique_ptr<bool[]> wanted(new bool[results]);
  for (int i = 0; i < results; ++i) wanted[i] = outputs[i].dtype != 0;
  const tensorflow::core::RefCountPtr<Context> device_context(new Context(stream));

  tensorflow::OpKernelContext::Params params;
  params.device = kernel->device.get();
  params.op_kernel = kernel->kernel.get();
  params.inputs = values;
  params.input_alloc_attrs = input_attributes;
  params.output_attr_array = output_attributes.data();
  params.outputs_required_array = wanted.get();
  params.op_device_context = device_context.get();
  tensorflow::OpKernelContext context(&params);
  kernel->kernel->Compute(&context);
  TF_RETURN_IF_ERROR(context.status());

  kernel->outputs.assign(results, Tensor());
  for (int i = 0; i < results; ++i) {
    const std::unique_ptr<Tensor> output(context.mutable_output(i) ? context.release_output(i).tensor : nullptr);
    outputs[i] = {};
    if (!output) continue;
    kernel->outputs[i] = *output;
    outputs[i] = {output->data(), static_cast<int32_t>(output->dtype()), output->dims(), {}};
    for (int d = 0; d < output->dims() && d < 4; ++d) outputs[i].sizes[d] = output->dim_size(d);
  }
  return absl::OkStatus();
}

// Null, or the error's text, until the thread's next call.
const char* text(const absl::Status& status) {
  static thread_local std::string message;
  message = status.ToString();
  return status.ok() ? nullptr : message.c_str();
}

}  // namespace

#define HARNESS_API extern "C" __attribute__((visibility("default")))

// Registers what the library holds.
HARNESS_API const char* harness_load(const char* path) {
  void* library = nullptr;
  const void* ops = nullptr;
  size_t bytes = 0;
  const absl::Status status = tensorflow::LoadDynamicLibrary(path, &library, &ops, &bytes);
  std::free(const_cast<void*>(ops));
  return text(status);
}

// A kernel for a device of this type, of a NodeDef as text; to be given to harness_release().
HARNESS_API const char* harness_create(const char* type, const char* node, Allocate allocate, Release release,
                                       Kernel** kernel) {
  auto made = std::make_unique<Kernel>();
  made->device = std::make_unique<Device>(allocate, release);
  const absl::Status status = create(type, node, made.get());
  if (status.ok()) *kernel = made.release();
  return text(status);
}

// Inputs are the caller's memory. Outputs live until the next call or the release; dtype says before whether one is
// wanted, and after whether there is one.
HARNESS_API const char* harness_run(Kernel* kernel, const Array* inputs, int count, void* stream, Array* outputs) {
  return text(run(kernel, inputs, count, stream, outputs));
}

HARNESS_API void harness_release(Kernel* kernel) { delete kernel; }
