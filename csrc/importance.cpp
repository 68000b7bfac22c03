// Importance-weighted bounds: Gaussian samples with their log density ratios in one pass, and the bound over the
// samples (fastvae/ops/importance.py holds the definitions).
//
// Bytes: the forward reads mean and log_var once for all samples and writes 4 a sample's element (float32) and 4 / D
// for its ratio; the backward reads as much and writes 8 / S: eager passes 10 times over the samples each way. Work:
// the noise, 1.5 ns an element and core, made twice: it, not memory, is the limit. The bound reads its two inputs, D
// times smaller than z, from the cache after the first of three passes.
#include "gaussian.h"
#include "sums.h"

namespace fastvae::FASTVAE_ISA {
namespace {

template <typename T>
void forward(const LogRatio &g, const LogRatioOutputs &out) {
  using C = typename ComputeType<T>::type;
  const T *mean = static_cast<const T *>(g.mean), *log_var = static_cast<const T *>(g.log_var);
  T *z = static_cast<T *>(out.z);
  C *log_ratio = static_cast<C *>(out.log_ratio);
  const Blocks blocks(g.rows, g.latent, kBlock);
  const uint64_t seed = uint64_t(*g.seed);
  const int64_t size = g.rows * g.latent;

#pragma omp parallel for schedule(static) num_threads(threads_for(size *g.samples, kGrain))
  for (int64_t group = 0; group < blocks.groups(); ++group) {
    for (int64_t piece = 0; piece < blocks.pieces; ++piece) {
      const Block b = blocks.block(group, piece);
      const int64_t first = b.row * g.latent + b.column, n = b.count();
      alignas(64) C m[kBlock], std_dev[kBlock], lv[kBlock], ratio[kBlock + kPad];
      alignas(64) float noise_buffer[kBlock + 8];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        m[i] = load(mean[first + i]);
        lv[i] = clamp(C(load(log_var[first + i])));
        std_dev[i] = exp(C(0.5) * lv[i]);
      }
      for (int64_t s = 0; s < g.samples; ++s) {
        const float *noise = normal_block(seed, uint64_t(s * size + first), n, noise_buffer);
        T *to = z + s * size + first;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const C e = noise[i], x = m[i] + std_dev[i] * e, distance = limited(x);
          store(to[i], x);
          ratio[i] = C(0.5) * (lv[i] + e * e - distance * distance);
        }
        C *row = log_ratio + s * g.rows + b.row;
        for (int64_t r = 0; r < b.rows; ++r) {
          row[r] = (piece > 0 ? row[r] : C(0)) + sum(ratio + r * b.columns, b.columns);
        }
      }
    }
  }
}

template <typename T>
void backward(const LogRatio &g, const LogRatioGradients &grad) {
  using C = typename ComputeType<T>::type;
  const T *mean = static_cast<const T *>(g.mean), *log_var = static_cast<const T *>(g.log_var);
  const T *grad_z = static_cast<const T *>(grad.grad_z);
  const C *grad_log_ratio = static_cast<const C *>(grad.grad_log_ratio);
  T *grad_mean = static_cast<T *>(grad.grad_mean), *grad_log_var = static_cast<T *>(grad.grad_log_var);
  const Blocks blocks(g.rows, g.latent, kBlock);
  const uint64_t seed = uint64_t(*g.seed);
  const int64_t size = g.rows * g.latent;

#pragma omp parallel for schedule(static) num_threads(threads_for(size *g.samples, kGrain))
  for (int64_t group = 0; group < blocks.groups(); ++group) {
    for (int64_t piece = 0; piece < blocks.pieces; ++piece) {
      const Block b = blocks.block(group, piece);
      const int64_t first = b.row * g.latent + b.column, n = b.count();
      alignas(64) C m[kBlock], std_dev[kBlock], weight[kBlock], sum_z[kBlock], sum_noise[kBlock], sum_weight[kBlock];
      alignas(64) float noise_buffer[kBlock + 8];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        m[i] = load(mean[first + i]);
        std_dev[i] = exp(C(0.5) * clamp(C(load(log_var[first + i]))));
        weight[i] = sum_z[i] = sum_noise[i] = sum_weight[i] = C(0);
      }
      for (int64_t s = 0; s < g.samples; ++s) {
        const float *noise = normal_block(seed, uint64_t(s * size + first), n, noise_buffer);
        for (int64_t r = 0; grad_log_ratio && r < b.rows; ++r) {
          const C share = grad_log_ratio[s * g.rows + b.row + r];
#pragma omp simd
          for (int64_t i = r * b.columns; i < (r + 1) * b.columns; ++i) weight[i] = share;
        }
        const T *from = grad_z + (grad_z ? s * size + first : 0);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const C e = noise[i], distance = zero_beyond(m[i] + std_dev[i] * e);
          const C dz = (grad_z ? C(load(from[i])) : C(0)) - weight[i] * distance;
          sum_z[i] += dz;
          sum_noise[i] += dz * e;
          sum_weight[i] += weight[i];
        }
      }
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const C change = C(0.5) * (std_dev[i] * sum_noise[i] + sum_weight[i]);
        store(grad_mean[first + i], sum_z[i]);
        store(grad_log_var[first + i], clamped(C(load(log_var[first + i]))) ? C(0) : change);
      }
    }
  }
}

constexpr int64_t kColumns = 64;

template <typename C>
FASTVAE_INLINE bool finite(C x) {
  return x - x == C(0);
}

// exp of a number that is at most 0, and 0 where it is too small to matter.
template <typename C>
FASTVAE_INLINE C weight_of(C log_weight) {
  return log_weight < C(-87) ? C(0) : exp(log_weight);
}

// The log-weights of some data, a column each. exp(log_weight - shift) sums to at least 1 where the largest is finite.
template <typename T>
struct LogWeights {
  using C = typename ComputeType<T>::type;
  const T *log_likelihood, *log_ratio;
  int64_t samples, rows, columns;
  alignas(64) C largest[kColumns], shift[kColumns], total[kColumns];

  LogWeights(const ImportanceBound &p, int64_t column)
      : log_likelihood(static_cast<const T *>(p.log_likelihood) + column),
        log_ratio(static_cast<const T *>(p.log_ratio) + column),
        samples(p.samples),
        rows(p.rows),
        columns(min(kColumns, p.rows - column)) {
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) largest[i] = -C(HUGE_VAL), total[i] = C(0);
    for (int64_t s = 0; s < samples; ++s) {
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) {
        const C x = at(s, i);
        largest[i] = x > largest[i] ? x : largest[i];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) shift[i] = finite(largest[i]) ? largest[i] : C(0);
    for (int64_t s = 0; s < samples; ++s) {
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) total[i] += weight_of(at(s, i) - shift[i]);
    }
  }
  C at(int64_t s, int64_t i) const { return C(load(log_likelihood[s * rows + i])) + C(load(log_ratio[s * rows + i])); }
};

template <typename T>
void bound_forward(const ImportanceBound &p, void *to) {
  using C = typename ComputeType<T>::type;
  C *bound = static_cast<C *>(to);
  const C log_samples = C(std::log(double(p.samples)));
#pragma omp parallel for schedule(static) num_threads(threads_for(p.rows *p.samples, kGrain))
  for (int64_t column = 0; column < p.rows; column += kColumns) {
    const LogWeights<T> w(p, column);
#pragma omp simd
    for (int64_t i = 0; i < w.columns; ++i) {
      const C x = w.largest[i] + (log(w.total[i]) - log_samples);
      bound[column + i] = w.total[i] != w.total[i] ? w.total[i] : finite(w.largest[i]) ? x : w.largest[i];
    }
  }
}

template <typename T>
void bound_backward(const ImportanceBound &p, const void *grad_bound, void *to) {
  using C = typename ComputeType<T>::type;
  T *grad = static_cast<T *>(to);
#pragma omp parallel for schedule(static) num_threads(threads_for(p.rows *p.samples, kGrain))
  for (int64_t column = 0; column < p.rows; column += kColumns) {
    const LogWeights<T> w(p, column);
    const C *upstream = static_cast<const C *>(grad_bound) + column;
    alignas(64) C scale[kColumns];
#pragma omp simd
    for (int64_t i = 0; i < w.columns; ++i) {
      const bool defined = finite(w.largest[i]) || w.total[i] != w.total[i];
      scale[i] = defined ? upstream[i] / w.total[i] : C(0);
    }
    for (int64_t s = 0; s < p.samples; ++s) {
#pragma omp simd
      for (int64_t i = 0; i < w.columns; ++i) {
        const C share = weight_of(w.at(s, i) - w.shift[i]) * scale[i];
        store(grad[s * p.rows + column + i], scale[i] == C(0) ? C(0) : share);  // an undefined one may be infinite
      }
    }
  }
}

}  // namespace

void log_ratio_forward(const LogRatio &g, const LogRatioOutputs &out) {
  switch (g.dtype) {
    case DType::kFloat32: return forward<float>(g, out);
    case DType::kFloat64: return forward<double>(g, out);
    case DType::kBFloat16: return forward<BFloat16>(g, out);
    case DType::kFloat16: return forward<Float16>(g, out);
  }
}

void log_ratio_backward(const LogRatio &g, const LogRatioGradients &grad) {
  switch (g.dtype) {
    case DType::kFloat32: return backward<float>(g, grad);
    case DType::kFloat64: return backward<double>(g, grad);
    case DType::kBFloat16: return backward<BFloat16>(g, grad);
    case DType::kFloat16: return backward<Float16>(g, grad);
  }
}

void importance_bound_forward(const ImportanceBound &p, void *bound) {
  switch (p.dtype) {
    case DType::kFloat32: return bound_forward<float>(p, bound);
    case DType::kFloat64: return bound_forward<double>(p, bound);
    case DType::kBFloat16: return bound_forward<BFloat16>(p, bound);
    case DType::kFloat16: return bound_forward<Float16>(p, bound);
  }
}

void importance_bound_backward(const ImportanceBound &p, const void *grad_bound, void *grad) {
  switch (p.dtype) {
    case DType::kFloat32: return bound_backward<float>(p, grad_bound, grad);
    case DType::kFloat64: return bound_backward<double>(p, grad_bound, grad);
    case DType::kBFloat16: return bound_backward<BFloat16>(p, grad_bound, grad);
    case DType::kFloat16: return bound_backward<Float16>(p, grad_bound, grad);
  }
}

}  // namespace fastvae::FASTVAE_ISA
