// Sums and dot products of short runs of numbers, whole vectors at a time: they read up to a vector past the end of a
// run and leave out what stands there, even NaN.
#pragma once

#include "gemm.h"

namespace fastvae::FASTVAE_ISA {

constexpr int64_t kPad = kLine / int64_t(sizeof(float));  // numbers to leave room for after a run

template <typename T>
struct LanesOf {
  using Number = int32_t;
};
template <>
struct LanesOf<double> {
  using Number = int64_t;
};

template <typename T>
struct LaneNumbers {
  typename LanesOf<T>::Number values[kWidth<T>]{};
  constexpr LaneNumbers() {
    for (int i = 0; i < kWidth<T>; ++i) values[i] = i;
  }
};
template <typename T>
static constexpr LaneNumbers<T> kLaneNumbers{};

template <typename T>
FASTVAE_INLINE const typename VectorOf<T>::type &vector_at(const T *from) {
  return *reinterpret_cast<const typename VectorOf<T>::type *>(from);
}
template <typename T>
FASTVAE_INLINE typename VectorOf<T>::type &vector_at(T *from) {
  return *reinterpret_cast<typename VectorOf<T>::type *>(from);
}

// The first `count` lanes of x, zeros in the others.
template <typename T>
FASTVAE_INLINE typename VectorOf<T>::type first_lanes(typename VectorOf<T>::type x, int64_t count) {
  using Number = typename LanesOf<T>::Number;
  typedef Number Lanes __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  const Lanes kept = *reinterpret_cast<const Lanes *>(kLaneNumbers<T>.values) < Number(count);
  return typename VectorOf<T>::type(kept & Lanes(x));
}

// Compilers make register halves of this, not memory.
template <typename T, int kCount>
FASTVAE_INLINE T sum_halves(const T *lanes) {
  if constexpr (kCount == 2) {
    return lanes[0] + lanes[1];
  } else {
    constexpr int kHalf = kCount / 2;
    typedef T Half __attribute__((vector_size(kHalf * sizeof(T)), aligned(sizeof(T)), may_alias));
    alignas(kVectorBytes) T sums[kHalf];
    *reinterpret_cast<Half *>(sums) = *reinterpret_cast<const Half *>(lanes) +
                                      *reinterpret_cast<const Half *>(lanes + kHalf);
    return sum_halves<T, kHalf>(sums);
  }
}
template <typename T>
FASTVAE_INLINE T sum_lanes(typename VectorOf<T>::type x) {
  alignas(kVectorBytes) T lanes[kWidth<T>];
  vector_at<T>(lanes) = x;
  return sum_halves<T, kWidth<T>>(lanes);
}

template <typename T>
FASTVAE_INLINE T sum(const T *a, int64_t count) {
  typename VectorOf<T>::type sums{};
  int64_t i = 0;
  for (; i + kWidth<T> <= count; i += kWidth<T>) sums += vector_at(a + i);
  if (i < count) sums += first_lanes<T>(vector_at(a + i), count - i);
  return sum_lanes<T>(sums);
}

template <typename T>
FASTVAE_INLINE T dot(const T *a, const T *b, int64_t count) {
  typename VectorOf<T>::type sums{};
  int64_t i = 0;
  for (; i + kWidth<T> <= count; i += kWidth<T>) sums += vector_at(a + i) * vector_at(b + i);
  if (i < count) sums += first_lanes<T>(vector_at(a + i) * vector_at(b + i), count - i);
  return sum_lanes<T>(sums);
}

}  // namespace fastvae::FASTVAE_ISA
