// One instruction set's kernels: each isa_*.cc compiles this with its own flags.
#include "isa_vectors.inl"

#include "amx_lines.h"
#include "kernels.h"
#include "pairs.h"
#include "thirds.h"

namespace fusedconvbn {
namespace {
#include "half_vectors.inl"

#include "storage.inl"  // by half_vectors.inl

#include "elementwise.inl"
#include "line_gradients.inl"

#include "tile_results.inl"

#include "gemm.inl"  // kTileRows and the panel of all that follows

#include "outer.inl"  // of the panels of gemm.inl

#include "depthwise3_narrow.inl"

#include "depthwise3.inl"  // by depthwise3_narrow.inl where registers are few

#include "depthwise.inl"  // by depthwise3.inl where that can be
#include "planes.inl"
#include "pointwise.inl"

#include "few_channels.inl"  // products of pointwise.inl

#include "winograd.inl"
#if defined(__AMX_BF16__)
#include "amx.inl"

#include "thirds.inl"  // tiles of amx.inl
#endif

// Z: of z.
template <int A, class C, class T, class D, class Z = T, class Table>
static constexpr void fill_gradients(Table* reduces, Table* applies) {
  if constexpr (A < kActivationCount) {
    constexpr Activation a = static_cast<Activation>(A);
    constexpr auto conv = Preactivation::kConv, both = Preactivation::kConvAndResidual, out = Preactivation::kOutput;
    if (reduces)
      (*reduces)[A][0] = reduce_kernel<C, T, Z, a, conv>(), (*reduces)[A][1] = reduce_kernel<C, T, Z, a, both>();
    (*applies)[A][0] = apply_kernel<C, T, D, Z, a, conv>(), (*applies)[A][1] = apply_kernel<C, T, D, Z, a, both>();
    if constexpr (derivative_from_output(a)) {
      if (reduces) (*reduces)[A][2] = reduce_kernel<C, T, Z, a, out>();
      (*applies)[A][2] = apply_kernel<C, T, D, Z, a, out>();
    }
    fill_gradients<A + 1, C, T, D, Z>(reduces, applies);
  }
}

template <int A, class C>
static constexpr void fill_activation(ComputeKernels<C>* k) {
  if constexpr (A < kActivationCount) {
    constexpr Activation a = static_cast<Activation>(A);
    k->affine[A] = affine<C, a>;
    k->emit[A] = emit<C, a>;
    if constexpr (a == Activation::kNone || derivative_from_output(a)) k->mask[A] = mask<C, a>;
    fill_activation<A + 1>(k);
  }
}

#if defined(__AMX_BF16__)
constexpr ThirdsKernels kThirdsKernels = {thirds_of_rows, thirds_of_columns, thirds_of_panel, multiply_thirds,
                                          emit_all,       cut_all_left,      cut_all_right};

template <int A>
static constexpr void fill_masks(AmxKernels* k) {
  if constexpr (A < kActivationCount) {
    constexpr Activation a = static_cast<Activation>(A);
    if constexpr (a == Activation::kNone || derivative_from_output(a)) k->mask[A] = mask_lines<BFloat16, a>;
    fill_masks<A + 1>(k);
  }
}

static constexpr AmxKernels amx_kernels() {
  AmxKernels k{};
  k.begin = amx_begin;
  k.end = amx_end;
  k.multiply = amx_multiply;
  k.multiply_lines[static_cast<int>(Activation::kNone)] = amx_multiply_lines<Activation::kNone>;
  k.multiply_lines[static_cast<int>(Activation::kRelu)] = amx_multiply_lines<Activation::kRelu>;
  k.multiply_lines[static_cast<int>(Activation::kRelu6)] = amx_multiply_lines<Activation::kRelu6>;
  k.emit = amx_emit;
  k.copy_pixels = amx_copy_pixels;
  k.pack = amx_pack;
  k.transpose = amx_transpose;
  k.pairs = amx_pairs_of_rows;
  k.outer = amx_outer;
  fill_gradients<0, float, BFloat16, BFloat16>(static_cast<decltype(&k.apply)>(nullptr), &k.apply);
  fill_masks<0>(&k);
  return k;
}
#endif
template <class C, int M>
static constexpr WinogradKernels<C> winograd_kernels() {
  WinogradKernels<C> k{};
  k.window[0][0] = winograd_window<C, M, M, M>;
  k.output[0][0] = winograd_output<C, M, M, M>;
  if constexpr (M == 4) {
    k.window[0][1] = winograd_window<C, M, M, 2>;
    k.window[1][0] = winograd_window<C, M, 2, M>;
    k.window[1][1] = winograd_window<C, M, 2, 2>;
    k.output[0][1] = winograd_output<C, M, M, 2>;
    k.output[1][0] = winograd_output<C, M, 2, M>;
    k.output[1][1] = winograd_output<C, M, 2, 2>;
  }
  k.gradient = winograd_gradient<C, M>;
  k.filter = winograd_filter<C, M>;
  k.filter_gradient = winograd_filter_gradient<C, M>;
  if constexpr (kFewRows) {
    k.filter_lines[0] = winograd_filter_lines<C, M, 0>;
    k.filter_lines[1] = winograd_filter_lines<C, M, 1>;
    if constexpr (M == 4) k.filter_lines[2] = winograd_filter_lines<C, M, 2>;
  }
  return k;
}

// Of a core: of Xeons since Sapphire Rapids; of EPYC before Zen 4, and less than those Core processors have that lack
// AVX-512.
constexpr int64_t kL2 = FCB_VECTOR_BYTES == 64 ? 2 << 20 : 512 << 10;

template <class C>
static constexpr ComputeKernels<C> compute_kernels() {
  ComputeKernels<C> k{};
  k.panel = kPanel<C>;
  k.outer_rows = kTileRows;
  k.lanes = kLanes<C>;
  k.gemm_columns = kMaxVectors * kLanes<C>;
  k.l2 = kL2;
  k.clamps_residual = kClampsResidual;
  k.fetches_results = kFewRows;  // timed with AVX2: from memory 24->144 x1.3, from L3 x1.0-1.1; of 64->64 -3 %
  k.gemm = gemm<C>;
  k.end_streaming = end_streaming;
  k.depthwise = depthwise<C>;
  if constexpr (kFewRows) k.depthwise_clamped = depthwise3_clamped<C, C>;
  k.outer = outer<C>;
  k.pack_rows = pack<C, kTileRows>;
  k.pack_columns = pack<C, static_cast<int>(kPanel<C>)>;
  k.transpose = transpose<C>;
  k.copy_windows = copy_windows<C>;
  k.add_columns = add_columns<C>;
  k.split = split<C>;
  k.multiply_shifted = multiply_shifted<C>;
  k.depthwise_outer = depthwise_outer<C>;
  k.multiply_plane = multiply_plane<C>;
  if constexpr (kFewRows) k.multiply_low_planes = multiply_low_planes<C>;
  k.multiply_transposed_planes = multiply_transposed_planes<C>;
  k.winograd2 = winograd_kernels<C, 2>();
  k.winograd4 = winograd_kernels<C, 4>();
  k.depthwise_copy = depthwise_copy<C>;
  k.depthwise_spread = depthwise_spread<C>;
  k.depthwise_fold = depthwise_fold<C>;
  k.moments = moments<C>;
  k.inverse_deviations = inverse_deviations<C>;
  k.emit_sums = emit_sums<C>;
  k.row_means = row_means<C>;
  k.center_rows = center_rows<C>;
  k.product[0] = product_kernel<C, 1>();
  k.product[1] = product_kernel<C, 2>();
  k.product[2] = product_kernel<C, 3>();
  fill_activation<0>(&k);
  fill_gradients<0, C, C, C>(&k.reduce, &k.apply);
  if constexpr (__is_same(C, float)) fill_gradients<0, C, C, C, BFloat16>(&k.reduce_rounded, &k.apply_rounded);
#if defined(__AVX512F__) && !defined(FUSEDCONVBN_NO_AVX512_BF16)
  if constexpr (__is_same(C, float)) k.pairs = &kPairKernels;
#endif
#if defined(__AMX_BF16__)
  if constexpr (__is_same(C, float)) {
    k.amx = amx_kernels();
    k.thirds = &kThirdsKernels;
  }
#endif
  return k;
}

#include "in_place.inl"

template <class C, class T>
static constexpr StorageKernels<C> storage_kernels() {
  return {load_block<C, T>, store_block<C, T>, load_rows<C, T>, in_place_kernels<C, T>()};
}

static constexpr KernelSet kernel_set() {
  return {compute_kernels<float>(),       compute_kernels<double>(),          storage_kernels<float, float>(),
          storage_kernels<float, Half>(), storage_kernels<float, BFloat16>(), storage_kernels<double, double>()};
}
}  // namespace

// Constant-initialized: loading the library must not run a single instruction of this unit.
extern constexpr KernelSet FCB_KERNELS = kernel_set();

}  // namespace fusedconvbn
