// What Winograd's algorithms compute on planes; plain structs, as in kernels.h, which includes it.
#pragma once

#include <stdint.h>

namespace fusedconvbn {

template <class C>
struct GatheredRows;

// Rows of operands of products of planes lie in blocks of so many elements: an operand [depth / kPlaneDepth][rows]
// [kPlaneDepth].
constexpr int64_t kPlaneDepth = 64;

// Matrix products of planes; c is [plane][rows][panel], the others as the kernel says. Distances in elements.
template <class C>
struct Planes {
  int64_t planes, rows, depth;
  const C* a;
  int64_t lda, plane_a;
  const C* b;
  int64_t ldb, plane_b;
  C* c;
  int64_t plane_c;
  bool add;  // to what c holds
  // What will be read next, `ahead_row` elements of it for each row of b, one plane's after the other's.
  const C* ahead = nullptr;
  int64_t ahead_row = 0;
};

// Where the transforms of windows go: channel c of row r of a plane at r * ld + c / kPlaneDepth * block +
// c % kPlaneDepth.
template <class C>
struct PlaneLayout {
  C* planes;
  int64_t ld, block, plane;
};

// The transforms of Winograd's F(MxM, 3x3), winograd.inl: (M+2)^2 planes of `plane` elements. Of F(4x4), windows of 2
// lines, of 2 columns or of both have transforms of their own, [2 lines][2 columns], that need 24, 24 and 16 planes.
template <class C>
struct WinogradKernels {
  void (*window[2][2])(const GatheredRows<C>& rows, const PlaneLayout<C>& to);
  void (*gradient)(const GatheredRows<C>& rows, const PlaneLayout<C>& to);
  // filters[9 taps, `tap` elements apart][depth][ld], of which a panel; planes[depth][panel].
  void (*filter)(const C* filters, int64_t tap, int64_t ld, int64_t depth, C* planes, int64_t plane, bool streams);
  // The same of lines 0 and M + 1, 1 and 2, 3 and 4 of the planes: planes[2][M + 2][depth][panel]. Null where
  // multiply_low_planes is.
  void (*filter_lines[3])(const C* filters, int64_t tap, int64_t ld, int64_t depth, C* planes, int64_t plane);
  void (*filter_gradient)(const C* planes, int64_t plane, int64_t rows, C* filters);
  void (*output[2][2])(const C* planes, int64_t plane, int64_t count, int64_t pixels, int64_t lines, C* rows,
                       int64_t pitch);
};

}  // namespace fusedconvbn
