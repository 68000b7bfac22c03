// Terms of a mixture prior and their gradients, one pass each (fastvae/ops/mixture.py holds the definition).
//
// Bytes: every operand once, (2 D + K) numbers for each datum and variable, and as many gradients. Work for each: K
// exponentials and a logarithm for q(c|x), and for each dimension two exponentials, a logarithm and 8 K multiplications
// and additions: some 30 ns at K = 5, D = 2, against which 100 bytes of a cache are nothing. A thread owns variables,
// so that the components' gradients need no sums over threads; the data of a block lie side by side in vectors.
#include "elementwise.h"
#include "vecmath.h"

namespace fastvae::FASTVAE_ISA {
namespace {

constexpr int64_t kWidth = 32;    // data of a block
constexpr int64_t kGrain = 4096;  // terms a thread should get at least: some 10 us of work
constexpr double kLeastLogProb = -1e4;

// A number of each of n data, `stride` apart, to and from a vector. Those past n are 0, so that every loop may run over
// the whole vector: nothing of them is written, and their gradients are 0.
template <typename C>
FASTVAE_INLINE void gather(const C *from, int64_t stride, int64_t n, C *to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
  for (int64_t i = n; i < kWidth; ++i) to[i] = C(0);
}
template <typename C>
FASTVAE_INLINE void scatter(const C *from, int64_t stride, int64_t n, C *to) {
  for (int64_t i = 0; i < n; ++i) to[i * stride] = from[i];
}
template <typename C>
FASTVAE_INLINE void fill(C *to, int64_t n, C value) {
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}

// p and log p of n data: (classes, kWidth) each, from logits whose rows lie `stride` apart.
template <typename C>
void softmax(const C *logits, int64_t stride, int64_t classes, int64_t n, C *p, C *log_p) {
  alignas(64) C largest[kWidth], total[kWidth];
  fill(largest, kWidth, C(-1e30));
  fill(total, kWidth, C(0));
  for (int64_t k = 0; k < classes; ++k) {
    C *l = log_p + k * kWidth;
    gather(logits + k, stride, n, l);
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) largest[i] = l[i] > largest[i] ? l[i] : largest[i];
  }
  for (int64_t k = 0; k < classes; ++k) {
    C *l = log_p + k * kWidth, *e = p + k * kWidth;
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      l[i] -= largest[i];
      e[i] = exp(l[i]);
      total[i] += e[i];
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < kWidth; ++i) {
    largest[i] = total[i] == total[i] ? log(total[i]) : total[i];  // log does not keep NaN
    total[i] = C(1) / total[i];
  }
  for (int64_t k = 0; k < classes; ++k) {
    C *l = log_p + k * kWidth, *e = p + k * kWidth;
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      e[i] *= total[i];
      l[i] -= largest[i];
      l[i] = l[i] < C(kLeastLogProb) ? C(kLeastLogProb) : l[i];
    }
  }
}

// The gradient of logits, (classes, kWidth) over `grad`, from that of the probabilities.
template <typename C>
void through_softmax(const C *p, int64_t classes, C *grad) {
  alignas(64) C mean[kWidth];
  fill(mean, kWidth, C(0));
  for (int64_t k = 0; k < classes; ++k) {
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) mean[i] += p[k * kWidth + i] * grad[k * kWidth + i];
  }
  for (int64_t k = 0; k < classes; ++k) {
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) grad[k * kWidth + i] = p[k * kWidth + i] * (grad[k * kWidth + i] - mean[i]);
  }
}

// A thread's memory.
template <typename C>
struct Scratch {
  C *q, *log_q, *grad_q;         // (components, kWidth)
  C *p, *log_p, *grad_z;         // (latent, kWidth), of a categorical z
  C *component, *log_component;  // (components, latent): precisions or probabilities, and their logarithms
  C *grad_component;             // (components, latent), of a categorical z
  Scratch(const MixturePrior &x, int64_t thread) {
    C *next = static_cast<C *>(x.memory) + thread * mixture_prior_workspace(x.components, x.latent);
    const auto take = [&](int64_t size) { return next += size, next - size; };
    const int64_t by_component = x.components * kWidth, by_latent = x.latent * kWidth, both = x.components * x.latent;
    q = take(by_component), log_q = take(by_component), grad_q = take(by_component);
    p = take(by_latent), log_p = take(by_latent), grad_z = take(by_latent);
    component = take(both), log_component = take(both), grad_component = take(both);
  }
};

// Variable m's components, once for all data.
template <typename C>
void prepare(const MixturePrior &x, int64_t m, Scratch<C> &s) {
  const C *given = static_cast<const C *>(x.component_log_var) + m * x.components * x.latent;
  if (!x.categorical) {
    for (int64_t j = 0; j < x.components * x.latent; ++j) {
      s.log_component[j] = -clamp(given[j]);
      s.component[j] = exp(s.log_component[j]);
    }
    return;
  }
  for (int64_t k = 0; k < x.components; ++k) {
    const C *from = given + k * x.latent;
    C *p = s.component + k * x.latent, *log_p = s.log_component + k * x.latent;
    C largest = from[0], total = 0;
    for (int64_t v = 1; v < x.latent; ++v) largest = from[v] > largest ? from[v] : largest;
    for (int64_t v = 0; v < x.latent; ++v) total += p[v] = exp(from[v] - largest);
    const C log_total = total == total ? log(total) : total;
    for (int64_t v = 0; v < x.latent; ++v) {
      const C l = from[v] - largest - log_total;
      p[v] /= total;
      log_p[v] = l < C(kLeastLogProb) ? C(kLeastLogProb) : l;
    }
  }
}

// The averaged component of n data in one dimension: its precision, and its mean.
template <typename C>
FASTVAE_INLINE void average(const MixturePrior &x, const Scratch<C> &s, const C *component_mean, int64_t d,
                            C *precision, C *center) {
  fill(precision, kWidth, C(0));
  fill(center, kWidth, C(0));
  for (int64_t k = 0; k < x.components; ++k) {
    const C own = s.component[k * x.latent + d], weighted = own * component_mean[k * x.latent + d];
    const C *q = s.q + k * kWidth;
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) precision[i] += q[i] * own, center[i] += q[i] * weighted;
  }
#pragma omp simd
  for (int64_t i = 0; i < kWidth; ++i) center[i] /= precision[i];
}

template <typename C>
void gaussian_terms(const MixturePrior &x, const Scratch<C> &s, int64_t m, int64_t first, int64_t n, C *kl,
                    C *dispersion) {
  const int64_t stride = x.variables * x.latent;
  const C *component_mean = static_cast<const C *>(x.component_mean) + m * x.components * x.latent;
  for (int64_t d = 0; d < x.latent; ++d) {
    alignas(64) C precision[kWidth], center[kWidth], spread[kWidth], mean[kWidth], log_var[kWidth];
    average(x, s, component_mean, d, precision, center);
    fill(spread, kWidth, C(0));
    for (int64_t k = 0; k < x.components; ++k) {
      const int64_t j = k * x.latent + d;
      const C *q = s.q + k * kWidth, own = s.component[j], log_own = s.log_component[j], at = component_mean[j];
#pragma omp simd
      for (int64_t i = 0; i < kWidth; ++i) spread[i] += q[i] * (own * (at - center[i]) * (at - center[i]) - log_own);
    }
    const int64_t from = first * stride + m * x.latent + d;
    gather(static_cast<const C *>(x.mean) + from, stride, n, mean);
    gather(static_cast<const C *>(x.log_var) + from, stride, n, log_var);
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      const C log_precision = precision[i] == precision[i] ? log(precision[i]) : precision[i];
      const C distance = mean[i] - center[i], ratio = clamp(log_var[i]) + log_precision;
      kl[i] += C(0.5) * (distance * distance * precision[i] + (expm1(ratio) - ratio));
      dispersion[i] += C(0.5) * (spread[i] + log_precision);
    }
  }
}

// log p of the averaged component of n data, without its normalizer: log_p of a categorical z.
template <typename C>
FASTVAE_INLINE void average_log_prob(const MixturePrior &x, const Scratch<C> &s, int64_t v, C *log_prob) {
  fill(log_prob, kWidth, C(0));
  for (int64_t k = 0; k < x.components; ++k) {
    const C own = s.log_component[k * x.latent + v];
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) log_prob[i] += s.q[k * kWidth + i] * own;
  }
}
// That of all classes, and the logarithm of the normalizer.
template <typename C>
void average_log_probs(const MixturePrior &x, const Scratch<C> &s, C *average, C *log_normalizer) {
  alignas(64) C largest[kWidth], total[kWidth];
  fill(largest, kWidth, C(-1e30));
  fill(total, kWidth, C(0));
  for (int64_t v = 0; v < x.latent; ++v) {
    C *a = average + v * kWidth;
    average_log_prob(x, s, v, a);
    for (int64_t i = 0; i < kWidth; ++i) largest[i] = a[i] > largest[i] ? a[i] : largest[i];
  }
  for (int64_t v = 0; v < x.latent; ++v) {
    const C *a = average + v * kWidth;
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) total[i] += exp(a[i] - largest[i]);
  }
  for (int64_t i = 0; i < kWidth; ++i) log_normalizer[i] = total[i] == total[i] ? largest[i] + log(total[i]) : total[i];
}

template <typename C>
void categorical_terms(const MixturePrior &x, Scratch<C> &s, int64_t m, int64_t first, int64_t n, C *kl,
                       C *dispersion) {
  const int64_t stride = x.variables * x.latent;
  alignas(64) C normalizer[kWidth];
  softmax(static_cast<const C *>(x.mean) + first * stride + m * x.latent, stride, x.latent, n, s.p, s.log_p);
  average_log_probs(x, s, s.grad_z, normalizer);
  for (int64_t v = 0; v < x.latent; ++v) {
    const C *p = s.p + v * kWidth, *log_p = s.log_p + v * kWidth, *a = s.grad_z + v * kWidth;
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) kl[i] += p[i] * (log_p[i] - a[i]);
  }
#pragma omp simd
  for (int64_t i = 0; i < kWidth; ++i) {
    kl[i] += normalizer[i];
    dispersion[i] -= normalizer[i];
  }
}

template <typename C>
FASTVAE_INLINE C log_of_mean(C mean) {
  return mean == mean ? log(max(mean, C(1e-37))) : mean;
}

template <typename C>
void forward(const MixturePrior &x, const MixturePriorTerms &out) {
  const int64_t batch = x.batch, row = x.variables * x.components;
  C *parts = static_cast<C *>(out.parts);  // (2, variables, batch)
  const int threads = int(
      min<int64_t>(x.threads, threads_for(batch * x.variables * (x.components + 3 * x.latent), kGrain)));

#pragma omp parallel num_threads(threads)
  {
    Scratch<C> s(x, thread_index());
#pragma omp for schedule(static)
    for (int64_t m = 0; m < x.variables; ++m) {
      prepare(x, m, s);
      C *aggregate = static_cast<C *>(out.aggregate) + m * x.components;
      double negative_entropy = 0.0;
      fill(aggregate, x.components, C(0));
      for (int64_t first = 0; first < batch; first += kWidth) {
        const int64_t n = min(kWidth, batch - first);
        softmax(static_cast<const C *>(x.logits) + first * row + m * x.components, row, x.components, n, s.q, s.log_q);
        for (int64_t k = 0; k < x.components; ++k) {
          alignas(64) C product[kWidth];
          const C *q = s.q + k * kWidth, *log_q = s.log_q + k * kWidth;
#pragma omp simd
          for (int64_t i = 0; i < kWidth; ++i) product[i] = q[i] * log_q[i];
          aggregate[k] += sum_of(q, n);
          negative_entropy += double(sum_of(product, n));
        }
        alignas(64) C kl[kWidth], dispersion[kWidth];
        fill(kl, kWidth, C(0));
        fill(dispersion, kWidth, C(0));
        if (x.categorical) {
          categorical_terms(x, s, m, first, n, kl, dispersion);
        } else {
          gaussian_terms(x, s, m, first, n, kl, dispersion);
        }
        scatter(kl, 1, n, parts + m * batch + first);
        scatter(dispersion, 1, n, parts + (x.variables + m) * batch + first);
      }
      double entropy = 0.0, divergence = 0.0;
      for (int64_t k = 0; k < x.components; ++k) {
        aggregate[k] /= C(batch);
        const double mean = double(aggregate[k]),
                     log_mean = mean > 1e-37 ? std::log(mean) : double(log_of_mean(aggregate[k]));
        entropy -= mean * log_mean;
        // Differences from 1 enter by their squares, so that their rounding does not count.
        const double ratio = mean * double(x.components);
        divergence += ratio * (log_mean + std::log(double(x.components))) - ratio + 1.0;
      }
      static_cast<C *>(out.aggregate_kl)[m] = C(divergence / double(x.components));
      static_cast<C *>(out.mutual_information)[m] = C(entropy + negative_entropy / double(batch));
    }
  }
  for (int64_t term = 0; term < 2; ++term) {
    C *to = static_cast<C *>(term ? out.dispersion : out.kl);
    const C *from = parts + term * x.variables * batch;
    fill(to, batch, C(0));
    for (int64_t m = 0; m < x.variables; ++m) {
#pragma omp simd
      for (int64_t b = 0; b < batch; ++b) to[b] += from[m * batch + b];
    }
  }
}

// Adds what kl and dispersion give to s.grad_q; writes the gradients of z's posterior and adds those of the components.
template <typename C>
void gaussian_gradients(const MixturePrior &x, const MixturePriorGradients &grad, Scratch<C> &s, int64_t m,
                        int64_t first, int64_t n, const C *grad_kl, const C *grad_dispersion) {
  const int64_t stride = x.variables * x.latent, components = m * x.components * x.latent;
  const C *component_mean = static_cast<const C *>(x.component_mean) + components;
  for (int64_t d = 0; d < x.latent; ++d) {
    alignas(64) C precision[kWidth], center[kWidth], mean[kWidth], log_var[kWidth], distance[kWidth], slope[kWidth];
    average(x, s, component_mean, d, precision, center);
    const int64_t from = first * stride + m * x.latent + d;
    gather(static_cast<const C *>(x.mean) + from, stride, n, mean);
    gather(static_cast<const C *>(x.log_var) + from, stride, n, log_var);
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      const C log_precision = precision[i] == precision[i] ? log(precision[i]) : precision[i];
      const C excess = expm1(clamp(log_var[i]) + log_precision), inverse = C(1) / precision[i];
      distance[i] = mean[i] - center[i];
      // of the averaged precision, its mean held
      slope[i] = C(0.5) * (grad_kl[i] * (distance[i] * distance[i] + excess * inverse) + grad_dispersion[i] * inverse);
      mean[i] = grad_kl[i] * distance[i] * precision[i];
      log_var[i] = clamped(log_var[i]) ? C(0) : C(0.5) * grad_kl[i] * excess;
      distance[i] *= grad_kl[i];
    }
    scatter(mean, stride, n, static_cast<C *>(grad.grad_mean) + from);
    scatter(log_var, stride, n, static_cast<C *>(grad.grad_log_var) + from);
    for (int64_t k = 0; k < x.components; ++k) {
      const int64_t j = k * x.latent + d;
      const C *q = s.q + k * kWidth, own = s.component[j], log_own = s.log_component[j], at = component_mean[j];
      C *grad_q = s.grad_q + k * kWidth, sum_mean = 0, sum_precision = 0;
#pragma omp simd reduction(+ : sum_mean, sum_precision)
      for (int64_t i = 0; i < kWidth; ++i) {
        const C apart = at - center[i], half = C(0.5) * grad_dispersion[i] * apart;
        const C of_precision = slope[i] + (half - distance[i]) * apart;
        grad_q[i] += own * of_precision - C(0.5) * grad_dispersion[i] * log_own;
        sum_mean += q[i] * (C(2) * half - distance[i]);
        sum_precision += q[i] * (own * of_precision - C(0.5) * grad_dispersion[i]);
      }
      static_cast<C *>(grad.grad_component_mean)[components + j] += own * sum_mean;
      static_cast<C *>(grad.grad_component_log_var)[components + j] -= sum_precision;
    }
  }
}

template <typename C>
void categorical_gradients(const MixturePrior &x, const MixturePriorGradients &grad, Scratch<C> &s, int64_t m,
                           int64_t first, int64_t n, const C *grad_kl, const C *grad_dispersion) {
  const int64_t stride = x.variables * x.latent, from = first * stride + m * x.latent;
  alignas(64) C normalizer[kWidth], slope[kWidth];
  softmax(static_cast<const C *>(x.mean) + from, stride, x.latent, n, s.p, s.log_p);
  average_log_probs(x, s, s.grad_z, normalizer);
  for (int64_t v = 0; v < x.latent; ++v) {
    const C *p = s.p + v * kWidth, *log_p = s.log_p + v * kWidth;
    C *grad_z = s.grad_z + v * kWidth;
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      const C chance = exp(grad_z[i] - normalizer[i]);
      slope[i] = grad_kl[i] * (chance - p[i]) - grad_dispersion[i] * chance;
      grad_z[i] = grad_kl[i] * (log_p[i] - grad_z[i]);
    }
    for (int64_t k = 0; k < x.components; ++k) {
      const C own = s.log_component[k * x.latent + v], *q = s.q + k * kWidth;
      C *grad_q = s.grad_q + k * kWidth, sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < kWidth; ++i) {
        grad_q[i] += slope[i] * own;
        sum += q[i] * slope[i];
      }
      s.grad_component[k * x.latent + v] += own > C(kLeastLogProb) ? sum : C(0);
    }
  }
  through_softmax(s.p, x.latent, s.grad_z);
  for (int64_t v = 0; v < x.latent; ++v) {
    scatter(s.grad_z + v * kWidth, stride, n, static_cast<C *>(grad.grad_mean) + from + v);
  }
}

template <typename C>
void backward(const MixturePrior &x, const MixturePriorGradients &grad) {
  const int64_t batch = x.batch, row = x.variables * x.components;
  const int threads = int(
      min<int64_t>(x.threads, threads_for(batch * x.variables * (x.components + 3 * x.latent), kGrain)));

#pragma omp parallel num_threads(threads)
  {
    Scratch<C> s(x, thread_index());
#pragma omp for schedule(static)
    for (int64_t m = 0; m < x.variables; ++m) {
      prepare(x, m, s);
      const int64_t components = m * x.components * x.latent, size = x.components * x.latent;
      fill(static_cast<C *>(grad.grad_component_log_var) + components, size, C(0));
      if (!x.categorical) fill(static_cast<C *>(grad.grad_component_mean) + components, size, C(0));
      fill(s.grad_component, size, C(0));
      const C *aggregate = static_cast<const C *>(grad.aggregate) + m * x.components;
      const C share = C(1) / C(batch);
      const C grad_aggregate = static_cast<const C *>(grad.grad_aggregate_kl)[m] * share;
      const C grad_information = static_cast<const C *>(grad.grad_mutual_information)[m] * share;
      for (int64_t first = 0; first < batch; first += kWidth) {
        const int64_t n = min(kWidth, batch - first);
        const int64_t at = first * row + m * x.components;
        softmax(static_cast<const C *>(x.logits) + at, row, x.components, n, s.q, s.log_q);
        for (int64_t k = 0; k < x.components; ++k) {
          const C log_mean = log_of_mean(aggregate[k]);
          C *grad_q = s.grad_q + k * kWidth, *log_q = s.log_q + k * kWidth;
#pragma omp simd
          for (int64_t i = 0; i < kWidth; ++i) {
            grad_q[i] = grad_aggregate * log_mean + grad_information * (log_q[i] - log_mean);
          }
        }
        alignas(64) C grad_kl[kWidth], grad_dispersion[kWidth];
        gather(static_cast<const C *>(grad.grad_kl) + first, 1, n, grad_kl);
        gather(static_cast<const C *>(grad.grad_dispersion) + first, 1, n, grad_dispersion);
        if (x.categorical) {
          categorical_gradients(x, grad, s, m, first, n, grad_kl, grad_dispersion);
        } else {
          gaussian_gradients(x, grad, s, m, first, n, grad_kl, grad_dispersion);
        }
        through_softmax(s.q, x.components, s.grad_q);
        for (int64_t k = 0; k < x.components; ++k) {
          scatter(s.grad_q + k * kWidth, row, n, static_cast<C *>(grad.grad_logits) + at + k);
        }
      }
      C *to = static_cast<C *>(grad.grad_component_log_var) + components;
      if (!x.categorical) {
        const C *given = static_cast<const C *>(x.component_log_var) + components;
        for (int64_t j = 0; j < size; ++j) to[j] = clamped(given[j]) ? C(0) : to[j];
        continue;
      }
      for (int64_t k = 0; k < x.components; ++k) {
        const C *p = s.component + k * x.latent, *g = s.grad_component + k * x.latent;
        const C total = sum_of(g, x.latent);
        for (int64_t v = 0; v < x.latent; ++v) to[k * x.latent + v] = g[v] - p[v] * total;
      }
    }
  }
}

}  // namespace

void mixture_prior_forward(const MixturePrior &x, const MixturePriorTerms &out) {
  return x.is_double ? forward<double>(x, out) : forward<float>(x, out);
}
void mixture_prior_backward(const MixturePrior &x, const MixturePriorGradients &grad) {
  return x.is_double ? backward<double>(x, grad) : backward<float>(x, grad);
}

}  // namespace fastvae::FASTVAE_ISA
