// How much memory packed filters may take.
#pragma once

#include <charconv>
#include <cstddef>
#include <cstdlib>
#include <limits>
#include <string>

#include "../conv_bn.h"

namespace fusedconvbn::host {

// What FUSEDCONVBN_PACKED_MEGABYTES says, else 512 MiB; of what it may not say, an error.
inline Status read_packed_limit(size_t* bytes) {
  constexpr size_t kMegabyte = size_t{1} << 20, kMost = std::numeric_limits<size_t>::max() / kMegabyte;
  *bytes = 512 * kMegabyte;
  const char* const environment = std::getenv("FUSEDCONVBN_PACKED_MEGABYTES");
  const std::string text = environment ? environment : "";
  if (text.empty()) return Status{};
  size_t megabytes = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, megabytes);
  if (error != std::errc{} || stop != end || megabytes > kMost)
    return Status::error("FUSEDCONVBN_PACKED_MEGABYTES must be a whole number of megabytes, from 0 to " +
                         std::to_string(kMost) + ". Received: " + text);
  *bytes = megabytes * kMegabyte;
  return Status{};
}

}  // namespace fusedconvbn::host
