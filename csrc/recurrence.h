// What the recurrences share: the packed order of their sequences, and how threads share out the work of a step.
#pragma once

#include "gemm.h"

namespace fastvae::FASTVAE_ISA {

struct Range {
  int64_t first, last;
};
FASTVAE_INLINE Range my_share(int64_t count) {
  const int64_t threads = thread_count(), me = thread_index();
  return {count * me / threads, count * (me + 1) / threads};
}

// A plan with its samples: sample s of the sequence of rank r has rank r * samples + s, so that the samples of a token
// lie side by side: row i of all is of token i / samples.
struct Packed {
  const PackedPlan &plan;
  int64_t samples, sequences;
  explicit Packed(const PackedPlan &p) : plan(p), samples(p.samples), sequences(p.batch * p.samples) {}
  int64_t active(int64_t t) const { return plan.active[t] * samples; }
  int64_t start(int64_t t) const { return plan.start[t] * samples; }
  int64_t token(int64_t row) const { return samples == 1 ? row : row / samples; }
  int64_t sequence(int64_t rank) const {
    return samples == 1 ? plan.order[rank] : rank % samples * plan.batch + plan.order[rank / samples];
  }
  int64_t length(int64_t rank) const { return plan.lengths[plan.order[token(rank)]]; }
};

constexpr int64_t kGrainFlops = 200'000;  // of one step; below, a second thread costs more than it brings
constexpr int64_t kCachedWeightBytes = 2 << 20;
constexpr int64_t kSequencesPerThread = 8;  // fewer leave the product's tiles half empty

// A thread's part of every step: blocks of hidden units, and each `stride`-th rank from `rank` on. Ranks are sorted by
// length, so that dealing them out in turn gives threads equal work.
struct Part {
  Range blocks;
  int64_t rank, stride;
  bool by_sequence;
  int64_t ranks(int64_t active) const { return active > rank ? (active - rank + stride - 1) / stride : 0; }
};
FASTVAE_INLINE Part my_part(int64_t sequences, int64_t blocks, int64_t weight_bytes) {
  const int64_t threads = thread_count();
  if (weight_bytes <= kCachedWeightBytes && sequences >= kSequencesPerThread * threads) {
    return {{0, blocks}, thread_index(), threads, true};
  }
  return {my_share(blocks), 0, 1, false};
}

}  // namespace fastvae::FASTVAE_ISA
