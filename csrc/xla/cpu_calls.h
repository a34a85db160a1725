// The custom calls on the CPU.
#pragma once

#include "../conv_bn.h"

namespace fusedconvbn::xla {

// Tells XLA of them. Fails where another copy of this library has.
Status register_cpu_calls();

}  // namespace fusedconvbn::xla
