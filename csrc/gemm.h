// One register-blocked product, C = A B, with B packed and the epilogue in the caller's hands.
//
// A tile is kRows rows of A by kVectors vectors of columns, held in registers over the whole inner dimension. Per inner
// step it loads kVectors vectors and kRows broadcasts for kRows * kVectors fused multiply-adds.
#pragma once

#include "isa.h"

namespace fastvae::FASTVAE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kAccumulators = 24;  // of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kAccumulators = 12;  // of 16 registers; part of B is read from memory
#else
constexpr int kVectorBytes = 16;
constexpr int kAccumulators = 8;
#endif

constexpr int kLine = 64;  // bytes

template <typename T>
constexpr int kWidth = kVectorBytes / int(sizeof(T));  // numbers in a vector

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};

// out[r][v * width + j] = sum_k a[r * stride + k] * packed[(k * kVectors + v) * width + j] for kRows rows. On the way a
// line a step is asked for, from `ahead` on.
template <typename T, int kRows, int kVectors>
static __attribute__((noinline)) void tile(int64_t inner, const T *a, int64_t stride, const T *packed, T *out,
                                           const char *ahead) {
  using V = typename VectorOf<T>::type;
  constexpr int kW = kWidth<T>;
  V sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < inner; ++k, packed += kVectors * kW) {
    V b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = *reinterpret_cast<const V *>(packed + v * kW);
    __builtin_prefetch(ahead + k * kLine, 0, 2);
    for (int r = 0; r < kRows; ++r) {
      const T scalar = a[r * stride + k];
      for (int v = 0; v < kVectors; ++v) sums[r][v] += scalar * b[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V *>(out + (r * kVectors + v) * kW) = sums[r][v];
  }
}

template <typename T, int kRows, int kVectors>
FASTVAE_INLINE void tile_of(int rows, int64_t inner, const T *a, int64_t stride, const T *packed, T *out,
                            const char *ahead) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return tile<T, kRows, kVectors>(inner, a, stride, packed, out, ahead);
    tile_of<T, kRows - 1, kVectors>(rows, inner, a, stride, packed, out, ahead);
  }
}

// Goes over `rows` rows of A in tiles and calls epilogue(first_row, count, out) for each, out being (count, kVectors *
// width). With inner == 0 the product is zero. `next`, the B of the next call, is brought into the second-level cache
// meanwhile: one that comes from memory would hold up its first tile.
template <typename T, int kVectors, typename Epilogue>
FASTVAE_INLINE void multiply_packed(int64_t rows, int64_t inner, const T *a, int64_t stride, const T *packed,
                                    Epilogue epilogue, const T *next = nullptr) {
  constexpr int kRows = kAccumulators / kVectors;
  alignas(kVectorBytes) T out[kAccumulators * kWidth<T>];
  // Even tiles: 32 rows as 5 5 5 5 6 6 rather than 6 6 6 6 6 2.
  const int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t i = 0, row = 0; i < tiles; ++i) {
    const int count = int((rows - row) / (tiles - i));
    const char *ahead = reinterpret_cast<const char *>(next ? next : packed) + i % kVectors * inner * kLine;
    tile_of<T, kRows, kVectors>(count, inner, a + row * stride, stride, packed, out, ahead);
    epilogue(row, count, out);
    row += count;
  }
}

}  // namespace fastvae::FASTVAE_ISA
