// What the Gaussian families share: blocks as long as those of the noise, and a log-variance's exponentials.
#pragma once

#include "elementwise.h"
#include "philox.h"

namespace fastvae::FASTVAE_ISA {

constexpr int64_t kBlock = kNoiseBlock;
constexpr int64_t kGrain = 8192;  // elements a thread should get at least: some 10 us of work

// A distance from the prior's mean, in the prior's standard deviations, counts as at most this in a square: the sum of
// millions of them then stays finite in float32. Beyond it has no gradient. In this order NaN stays NaN.
constexpr double kDistanceLimit = 1e15;
constexpr double kSquareLimit = kDistanceLimit * kDistanceLimit;
template <typename C>
FASTVAE_INLINE C limited(C x) {
  const C limit = C(kDistanceLimit);
  x = x < -limit ? -limit : x;
  return x > limit ? limit : x;
}
template <typename C>
FASTVAE_INLINE C zero_beyond(C x) {
  const C limit = C(kDistanceLimit);
  x = x < -limit ? C(0) : x;
  return x > limit ? C(0) : x;
}

// exp(x) and expm1(x) for the cost of one.
struct ExpPair {
  float exp, expm1;
};
struct ExpPairDouble {
  double exp, expm1;
};
FASTVAE_INLINE ExpPair exp_pair(float x) {
  const ExpParts e = exp_parts(x);
  return {e.scale * e.fraction + e.scale, e.scale * e.fraction + (e.scale - 1.0f)};
}
FASTVAE_INLINE ExpPairDouble exp_pair(double x) { return {std::exp(x), std::expm1(x)}; }

}  // namespace fastvae::FASTVAE_ISA
