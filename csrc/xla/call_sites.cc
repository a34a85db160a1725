#include "call_sites.h"

#include <memory>
#include <string>

#include "../tf/attributes.h"
#include "calls.h"
#include "custom_call.h"
#include "xla/shape_util.h"

namespace fusedconvbn::xla {
namespace {

using ::xla::Shape;
using ::xla::ShapeUtil;
using ::xla::XlaBuilder;
using ::xla::XlaOp;

std::vector<XlaOp> elements(XlaOp tuple, size_t begin, size_t end) {
  std::vector<XlaOp> result;
  for (size_t i = begin; i < end; ++i) result.push_back(::xla::GetTupleElement(tuple, static_cast<int64_t>(i)));
  return result;
}

XlaOp call(XlaBuilder* builder, const char* target, const ConvBnParams& params, const std::vector<XlaOp>& operands,
           const std::vector<Shape>& operand_shapes, const std::vector<Shape>& result_shapes) {
  return ::xla::CustomCallWithLayout(builder, target, operands, ShapeUtil::MakeTupleShape(result_shapes),
                                     operand_shapes, attributes_of(params), /*has_side_effect=*/false,
                                     /*output_operand_aliasing=*/{}, /*literal=*/nullptr,
                                     ::xla::CustomCallSchedule::SCHEDULE_NONE,
                                     ::xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
}

// A call of the CUDA kernels. Its workspace is a result that nobody reads: XLA places it among its own.
absl::StatusOr<std::vector<XlaOp>> cuda_call(XlaBuilder* builder, const ConvBnParams& params, const CallSite& site,
                                             const std::vector<XlaOp>& operands) {
  Plan plan;
  TF_RETURN_IF_ERROR(tf::to_absl(plan_cuda_call(params, site.backward, &plan)));
  std::vector<Shape> results{
      ShapeUtil::MakeShapeWithDescendingLayout(::xla::U8, {static_cast<int64_t>(plan.workspace_bytes)})};
  results.insert(results.end(), site.result_shapes.begin(), site.result_shapes.end());
  const char* const target = site.backward ? kCudaBackward : kCudaForward;
  return elements(call(builder, target, params, operands, site.operand_shapes, results), 1, results.size());
}

// A computation of the operands, as one tuple, that makes one of the results.
absl::StatusOr<::xla::XlaComputation> branch(XlaBuilder* parent, ConvBnParams params, bool training,
                                             const CallSite& site) {
  params.training = training;
  const std::unique_ptr<XlaBuilder> builder = parent->CreateSubBuilder(training ? "training" : "inference");
  const XlaOp given = ::xla::Parameter(builder.get(), 0, ShapeUtil::MakeTupleShape(site.operand_shapes), "operands");
  const auto results = cuda_call(builder.get(), params, site, elements(given, 0, site.operands.size()));
  if (!results.ok()) return results.status();
  ::xla::Tuple(builder.get(), *results);
  return builder->Build();
}

}  // namespace

std::vector<XlaOp> call_on_cpu(const ConvBnParams& params, const CallSite& site) {
  const char* const target = site.backward ? kBackward : kForward;
  const XlaOp tuple =
      call(site.operands[0].builder(), target, params, site.operands, site.operand_shapes, site.result_shapes);
  return elements(tuple, 0, site.result_shapes.size());
}

absl::StatusOr<std::vector<XlaOp>> call_on_gpu(const ConvBnParams& params, const CallSite& site,
                                               std::optional<XlaOp> training) {
  XlaBuilder* const builder = site.operands[0].builder();
  if (!training) return cuda_call(builder, params, site, site.operands);
  const auto on = branch(builder, params, true, site), off = branch(builder, params, false, site);
  for (const auto* made : {&on, &off})
    if (!made->ok()) return made->status();
  const XlaOp operands = ::xla::Tuple(builder, site.operands);
  return elements(::xla::Conditional(*training, operands, *on, operands, *off), 0, site.result_shapes.size());
}

}  // namespace fusedconvbn::xla
