// 16-bit results of whole lines of 32 channels: nothing is masked, and what stays the same is known, for these
// instructions compete with the products that they are mixed with (amx.inl).

// Lines * 32 channels from c on, of rows [first, end). Z: of z, T: of memory.
template <Activation A, class Z, class T, int Lines, bool Residual>
static void affine_lines(const AffineBlock<float>& b, int64_t c, int64_t first, int64_t end) {
  constexpr int kVectors = 2 * Lines;
  constexpr bool kFetches = !__is_same(Z, float);  // what follows in memory; a tile's rows are few
  __m512 mean[kVectors], scale[kVectors], beta[kVectors], u[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    mean[v] = _mm512_loadu_ps(b.mean + c + 16 * v);
    scale[v] = _mm512_loadu_ps(b.scale + c + 16 * v);
    beta[v] = _mm512_loadu_ps(b.beta + c + 16 * v);
  }
  const int64_t ld_z = b.ld_z, ld_residual = b.ld_residual, ld_y = b.ld_y;
  const bool stream = b.stream;
  const Z* z = row<Z>(b.z, first, ld_z) + c;
  const T* residual = Residual ? row<T>(b.residual, first, ld_residual) + c : nullptr;
  T* y = row<T>(b.y, first, ld_y) + c;
  for (int64_t r = first; r < end; ++r, z += ld_z, y += ld_y) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (kFetches && v % 2 == 0) {
        __builtin_prefetch(z + 16 * v + kFetchBytes / sizeof(Z));
        if (Residual) __builtin_prefetch(residual + 16 * v + kFetchBytes / sizeof(T));
      }
      u[v] = _mm512_fmadd_ps(_mm512_sub_ps((__m512)load(z + 16 * v), mean[v]), scale[v], beta[v]);
      if (Residual) u[v] = _mm512_add_ps(u[v], (__m512)load(residual + 16 * v));
      u[v] = activate_lanes<A>(u[v]);
    }
#pragma GCC unroll 2
    for (int l = 0; l < Lines; ++l) store_32(y + 32 * l, narrow(u[2 * l], u[2 * l + 1], y), {{0xffff, 0xffff}}, stream);
    if (Residual) residual += ld_residual;
  }
}

template <Activation A, class Z, class T, int Lines>
FCB_INLINE void affine_lines(const AffineBlock<float>& b, int64_t c, int64_t first, int64_t end) {
  const auto lines = b.residual ? affine_lines<A, Z, T, Lines, true> : affine_lines<A, Z, T, Lines, false>;
  lines(b, c, first, end);
}
