// A tile's sums as 16-bit numbers in memory, whole lines of 64 channels at a time: nothing is masked, and what stays
// the same is known, for these instructions compete with the products that they are mixed with (amx.inl).

template <Activation A, class T, bool Residual>
static void affine_lines(const AffineBlock<float>& b, int64_t c) {
  constexpr int kVectors = 4;
  __m512 mean[kVectors], scale[kVectors], beta[kVectors], u[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    mean[v] = _mm512_loadu_ps(b.mean + c + 16 * v);
    scale[v] = _mm512_loadu_ps(b.scale + c + 16 * v);
    beta[v] = _mm512_loadu_ps(b.beta + c + 16 * v);
  }
  const int64_t rows = b.rows, ld_z = b.ld_z, ld_residual = b.ld_residual, ld_y = b.ld_y;
  const bool stream = b.stream;
  const float* z = static_cast<const float*>(b.z) + c;
  const T* residual = Residual ? static_cast<const T*>(b.residual) + c : nullptr;
  T* y = static_cast<T*>(b.y) + c;
  for (int64_t r = 0; r < rows; ++r, z += ld_z, y += ld_y) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      u[v] = _mm512_fmadd_ps(_mm512_sub_ps(_mm512_loadu_ps(z + 16 * v), mean[v]), scale[v], beta[v]);
      if (Residual) {
        const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(residual + 16 * v));
        u[v] = _mm512_add_ps(u[v], widen(from, residual));
      }
      u[v] = activate_lanes<A>(u[v]);
    }
    store_32(y, narrow(u[0], u[1], y), {{0xffff, 0xffff}}, stream);
    store_32(y + 32, narrow(u[2], u[3], y), {{0xffff, 0xffff}}, stream);
    if (Residual) residual += ld_residual;
  }
}

template <Activation A, class T>
static void affine_of_tile(const AffineBlock<float>& b) {
  int64_t c = 0;
  for (; c + 64 <= b.cols; c += 64) b.residual ? affine_lines<A, T, true>(b, c) : affine_lines<A, T, false>(b, c);
  if (c + 32 < b.cols)
    affine_columns<A, float, T, 2>(b, c, 0, b.rows);
  else if (c < b.cols)
    affine_columns<A, float, T, 1>(b, c, 0, b.rows);
}
