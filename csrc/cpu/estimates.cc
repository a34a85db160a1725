#include "estimates.h"

#include <algorithm>
#include <string>

#include "../shape.h"
#include "second_moments.h"

namespace fusedconvbn {
namespace {

const WinogradPrices& winograd_prices(Stage stage, const ConvBnParams& p, Isa isa) {
  const WinogradPriceList& list = isa == Isa::kAvx2         ? kAvx2Prices
                                  : isa == Isa::kAvx512Bf16 ? kHalfWidthAvx512Prices
                                                            : kAvx512Prices;
  if (stage == Stage::kDgrad) return list.input_gradient;
  if (stage == Stage::kWgrad) return list.filter_gradient;
  return p.training ? list.training : list.inference;
}

const ThirdsPrices& thirds_prices(Stage stage, const ConvBnParams& p) {
  if (stage == Stage::kDgrad) return kInputGradientThirds;
  return p.training ? kTrainingThirds : kPackedThirds;
}

ThirdsProblem thirds_problem(Stage stage, const ConvBnParams& p) {
  const int64_t taps = p.taps();  // no overflow: strides may be huge
  const int64_t phases = std::min(taps, std::min(taps, p.stride_height) * std::min(taps, p.stride_width));
  const int64_t inputs = p.batch * p.in_height * p.in_width * p.in_channels;
  if (stage == Stage::kDgrad) return {p.pixels(), phases, taps, p.out_channels, p.in_channels, inputs, false};
  return {p.pixels(), 1, taps, p.in_channels, p.out_channels, p.pixels() * p.out_channels, p.has_residual};
}

bool is_by(const Kernel& kernel, const std::string& algorithm) {
  return std::string(kernel.name).rfind(name_of(kernel.stage) + ("_" + algorithm) + "_", 0) == 0;
}

Comparison sorted(Stage stage, std::vector<Estimate> estimates) {
  std::sort(estimates.begin(), estimates.end(),
            [](const Estimate& a, const Estimate& b) { return a.nanoseconds < b.nanoseconds; });
  return {name_of(stage), std::move(estimates)};
}

}  // namespace

WinogradCosts winograd_costs(Stage stage, const ConvBnParams& p, Isa isa) {
  const WinogradPrices& prices = winograd_prices(stage, p, isa);
  if (stage == Stage::kDgrad)
    return winograd_costs(prices, {p.batch, p.in_height, p.in_width, p.out_channels, p.in_channels});
  return winograd_costs(prices, {p.batch, p.out_height, p.out_width, p.in_channels, p.out_channels});
}

bool thirds_apply(Stage stage, const ConvBnParams& p) {
  constexpr int64_t kMaxDepth = 2048;  // a block's rows cut in thirds, and a panel of the filters, fit L2
  if (p.dtype != DType::kFloat32 || p.groups != 1 || p.data_format != DataFormat::kNHWC) return false;
  if (stage == Stage::kWgrad) return is_pointwise(p) && p.stride_height == 1 && p.stride_width == 1;
  return p.taps() * (stage == Stage::kDgrad ? p.out_channels : p.in_channels) <= kMaxDepth;
}

ThirdsCosts thirds_costs(Stage stage, const ConvBnParams& p) {
  if (stage == Stage::kWgrad) return filter_gradient_costs(p.pixels(), p.in_channels, p.out_channels);
  return thirds_costs(thirds_prices(stage, p), thirds_problem(stage, p));
}

ThirdsCosts moments_costs(const ConvBnParams& p) {
  return thirds_costs(kPackedThirds, thirds_problem(Stage::kForward, p));
}

double margin_of_thirds(Stage stage, const ConvBnParams& p) {
  if (stage == Stage::kWgrad) return 1;
  return margin_of_thirds(thirds_prices(stage, p), thirds_problem(stage, p));
}

std::vector<Comparison> comparisons_of(const Kernel& kernel, const ConvBnParams& p, Isa device) {
  const Stage stage = kernel.stage;
  std::vector<Comparison> found;
  if (stage == Stage::kReduce || stage == Stage::kBackward) return found;
  const bool on_amx = kernel.isa == Isa::kAmx, in_thirds = on_amx && is_by(kernel, "thirds");
  const bool direct = !on_amx && is_by(kernel, "direct");
  if ((direct || is_by(kernel, "winograd2") || is_by(kernel, "winograd4")) && winograd_applies(p)) {
    const WinogradCosts costs = winograd_costs(stage, p, estimated_isa(device, kernel.isa));
    found.push_back(sorted(stage, {{"direct", costs.direct}, {"winograd2", costs.two}, {"winograd4", costs.four}}));
  }
  if ((direct || in_thirds) && device == Isa::kAmx && thirds_apply(stage, p)) {
    const ThirdsCosts costs = thirds_costs(stage, p);
    found.push_back(sorted(stage, {{"direct", costs.direct}, {"thirds", costs.thirds}}));
  }
  return found;
}

}  // namespace fusedconvbn
