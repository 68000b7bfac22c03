// What kernels over rows of numbers share: blocks that stay in the first cache, prefetch, sums, the clamp of
// log-variances.
#pragma once

#include "isa.h"

namespace fastvae::FASTVAE_ISA {

constexpr float kLogVarLimit = 40.0f;

template <typename C>
FASTVAE_INLINE C clamp(C x) {
  const C limit = C(kLogVarLimit);
  x = x < -limit ? -limit : x;  // in this order NaN stays NaN
  return x > limit ? limit : x;
}
template <typename C>
FASTVAE_INLINE bool clamped(C x) {
  return x < -C(kLogVarLimit) || x > C(kLogVarLimit);
}

template <typename C>
FASTVAE_INLINE C sum_of(const C *values, int64_t n) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += values[i];
  return sum;
}

// Rows to compute at once, at most `most`: their number a multiple of four, so that threads share them evenly, unless
// less than 256 elements, a few counters of the noise at once, would be left in each.
FASTVAE_INLINE int64_t even_rows(int64_t rows, int64_t width, int64_t most) {
  most = max<int64_t>(most, 1);
  const int64_t blocks = ((rows + most - 1) / most + 3) / 4 * 4;
  const int64_t even = blocks > 0 ? (rows + blocks - 1) / blocks : 1, least = 256 / max<int64_t>(width, 1);
  return min(most, max<int64_t>(max(even, least), 1));
}

// A block: whole rows while they fit, else a piece of one row.
struct Block {
  int64_t row, rows, column, columns;
  int64_t count() const { return rows * columns; }
};

struct Blocks {
  int64_t rows, width, size, rows_per_block, pieces;  // blocks of a (rows, width) array, of at most `size` numbers
  Blocks(int64_t rows, int64_t width, int64_t size)
      : rows(rows),
        width(width),
        size(size),
        rows_per_block(even_rows(rows, width, width > 0 ? size / width : 1)),
        pieces(max<int64_t>(1, (width + size - 1) / size)) {}  // one even for rows without elements, whose sum is 0
  // Blocks of one group are handled by one thread in order, which lets a row's pieces add up in one place.
  int64_t groups() const { return (rows + rows_per_block - 1) / rows_per_block; }
  Block block(int64_t group, int64_t piece) const {
    const int64_t row = group * rows_per_block;
    const int64_t column = piece * size;
    return {row, min(rows_per_block, rows - row), column, min(size, width - column)};
  }
};

// Asks for the next block while this one is computed: a block is about a page, where the hardware's prefetch stops.
template <typename T>
FASTVAE_INLINE void prefetch(const T *from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i);
}

}  // namespace fastvae::FASTVAE_ISA
