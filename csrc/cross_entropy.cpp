// One pass over a block of logits: losses, logsumexp and, when wanted, the gradient in the logits' place.
//
// The block was just made by a matrix product and is at most some 10 MB. A row (40 KB at 10k words) stays in the first
// caches through its three sweeps: maximum, exponentials and their sum, scaling.
#include "vecmath.h"

namespace fastvae::FASTVAE_ISA {
namespace {

template <typename T>
void block(const CrossEntropyBlock &b) {
  const int64_t V = b.vocabulary;
  const T *bias = static_cast<const T *>(b.bias), *scale = static_cast<const T *>(b.scale);
  T *losses = static_cast<T *>(b.losses), *lse = static_cast<T *>(b.lse);
  int threads = threads_for(b.rows * V, 16384);
  if (b.grad_bias) threads = int(min<int64_t>(threads, b.partials));

#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < b.rows; ++row) {
    T *__restrict x = static_cast<T *>(b.logits) + row * V;
    const int64_t target = b.target[row];
    if (bias) {
#pragma omp simd
      for (int64_t v = 0; v < V; ++v) x[v] += bias[v];
    }
    T log_sum, inverse = T(1);  // softmax = x * inverse once x holds exponentials
    if (b.known_lse) {
      log_sum = lse[row];
#pragma omp simd
      for (int64_t v = 0; v < V; ++v) x[v] = exp(x[v] - log_sum);
    } else {
      T maximum = x[0];
#pragma omp simd reduction(max : maximum)
      for (int64_t v = 0; v < V; ++v) maximum = x[v] > maximum ? x[v] : maximum;
      const T target_logit = x[target];
      T sum = T(0);
#pragma omp simd reduction(+ : sum)
      for (int64_t v = 0; v < V; ++v) {
        const T e = exp(x[v] - maximum);
        sum += e;
        x[v] = e;
      }
      const T log_of_sum = sum == sum ? log(sum) : sum;  // log does not keep NaN
      log_sum = maximum + log_of_sum;
      // Subtracting the maximum first keeps a small loss's digits when the logits are large.
      losses[row] = log_of_sum - (target_logit - maximum);
      lse[row] = log_sum;
      inverse = T(1) / sum;
    }
    if (!b.gradient) continue;
    const T weight = scale ? scale[row] : T(1), factor = weight * inverse;
#pragma omp simd
    for (int64_t v = 0; v < V; ++v) x[v] *= factor;
    x[target] -= weight;
    if (b.grad_bias) {
      T *__restrict sums = static_cast<T *>(b.grad_bias) + thread_index() * V;
#pragma omp simd
      for (int64_t v = 0; v < V; ++v) sums[v] += x[v];
    }
  }
}

}  // namespace

void cross_entropy_block(const CrossEntropyBlock &b) { b.is_double ? block<double>(b) : block<float>(b); }

}  // namespace fastvae::FASTVAE_ISA
