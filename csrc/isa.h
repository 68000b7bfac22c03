// Compiled once per instruction set. Everything a kernel uses sits in that set's own namespace: a template or inline
// function shared between sets would be merged by the linker, and a plain machine could run the AVX-512 copy. For the
// same reason kernel sources use no standard-library templates.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#define FASTVAE_INLINE static inline __attribute__((always_inline))

namespace fastvae::FASTVAE_ISA {

template <typename To, typename From>
FASTVAE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename T>
FASTVAE_INLINE T min(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
FASTVAE_INLINE T max(T a, T b) {
  return a > b ? a : b;
}

// Storage types that are not arithmetic types.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {  // by hand: _Float16 is missing from many compilers
  uint16_t bits;
};

FASTVAE_INLINE float load(float x) { return x; }
FASTVAE_INLINE double load(double x) { return x; }
FASTVAE_INLINE float load(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
FASTVAE_INLINE float load(Float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7FFF) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);  // moves the exponent's bias
  return bit_cast<float>(((x.bits & 0x7C00) == 0x7C00 ? magnitude | 0x7F800000u : scaled) | sign);
}
FASTVAE_INLINE void store(float &to, float x) { to = x; }
FASTVAE_INLINE void store(double &to, double x) { to = x; }
FASTVAE_INLINE void store(BFloat16 &to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  to.bits = uint16_t(x == x ? rounded : 0x7FC0);
}
FASTVAE_INLINE void store(Float16 &to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7FFFFFFF;
  const uint32_t normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1)) >> 13;  // to nearest, ties to even
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  to.bits = uint16_t((magnitude >= 0x47800000u ? special : finite) | ((bits >> 16) & 0x8000));
}

template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

// Threads worth starting for `work` items when each should get at least `grain`.
FASTVAE_INLINE int threads_for(int64_t work, int64_t grain) {
#ifdef _OPENMP
  const int64_t wanted = grain > 0 ? (work + grain - 1) / grain : work;
  return int(max<int64_t>(1, min<int64_t>(wanted, omp_get_max_threads())));
#else
  (void)work, (void)grain;
  return 1;
#endif
}

FASTVAE_INLINE int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// In a parallel region.
FASTVAE_INLINE void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

FASTVAE_INLINE int thread_count() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

}  // namespace fastvae::FASTVAE_ISA
