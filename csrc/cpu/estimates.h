// What the dispatch table compares where several algorithms compete for a stage: an estimate of each one's time.
#pragma once

#include "dispatch.h"
#include "thirds_choice.h"
#include "winograd_choice.h"

namespace fusedconvbn {

// Of direct convolution and both of Winograd's algorithms, where winograd_applies(), with an instruction set's kernels:
// of any stage but kReduce and kBackward.
WinogradCosts winograd_costs(Stage stage, const ConvBnParams& p, Isa isa);

// Of the table's rows in thirds and of direct convolution, where thirds_apply(): of the same stages.
bool thirds_apply(Stage stage, const ConvBnParams& p);
ThirdsCosts thirds_costs(Stage stage, const ConvBnParams& p);
// The same where forward takes its statistics from moments: its one product over all pixels comes after them.
ThirdsCosts moments_costs(const ConvBnParams& p);
// What thirds must be faster by.
double margin_of_thirds(Stage stage, const ConvBnParams& p);

// Those in which a kernel takes part, beside rows of the table that a device has.
std::vector<Comparison> comparisons_of(const Kernel& kernel, const ConvBnParams& p, Isa device);

}  // namespace fusedconvbn
