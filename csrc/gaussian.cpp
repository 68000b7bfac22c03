// Gaussian sampling + KL, one pass forward and one backward (fastvae/ops/gaussian.py holds the definition).
//
// Bytes: the forward reads 2 and writes 1 number per element (12 bytes of float32), the backward reads 3 and writes 2
// (20 bytes); eager makes about 10 passes each way. Work: a quarter of a Philox counter, half a logarithm, square root
// and sine-cosine pair, one exponential: about 1.5 ns per element and core with AVX-512, so that two cores of a machine
// with 20 GB/s are near the balance of both limits.
#include "gaussian.h"

namespace fastvae::FASTVAE_ISA {
namespace {

// Rows that lie apart, as the halves of one tensor's rows do, are brought together first.
template <typename T>
FASTVAE_INLINE const T *gather(const void *matrix, int64_t stride, const Block &b, T *buffer) {
  const T *from = static_cast<const T *>(matrix) + b.row * stride + b.column;
  if (b.rows == 1 || stride == b.columns) return from;
  for (int64_t r = 0; r < b.rows; ++r) {
    for (int64_t i = 0; i < b.columns; ++i) buffer[r * b.columns + i] = from[r * stride + i];
  }
  return buffer;
}

// And put in their places when all of the block is computed: where to, and that.
template <typename T>
FASTVAE_INLINE T *destination(void *matrix, int64_t stride, const Block &b, T *buffer) {
  return b.rows == 1 || stride == b.columns ? static_cast<T *>(matrix) + b.row * stride + b.column : buffer;
}
template <typename T>
FASTVAE_INLINE void scatter(void *matrix, int64_t stride, const Block &b, const T *from) {
  T *to = static_cast<T *>(matrix) + b.row * stride + b.column;
  if (from == to) return;
  for (int64_t r = 0; r < b.rows; ++r) {
    for (int64_t i = 0; i < b.columns; ++i) to[r * stride + i] = from[r * b.columns + i];
  }
}

// Copies the prior's part of a block into (log_var clamped) arrays as dense as the block.
template <typename C>
FASTVAE_INLINE void load_prior(const Gaussian &g, const Block &b, C *mean, C *log_var) {
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t from = (g.prior_rows == 1 ? 0 : b.row + r) * g.latent + b.column;
    const C *prior_mean = static_cast<const C *>(g.prior_mean) + from;
    const C *prior_log_var = static_cast<const C *>(g.prior_log_var) + from;
#pragma omp simd
    for (int64_t i = 0; i < b.columns; ++i) {
      mean[r * b.columns + i] = prior_mean[i];
      log_var[r * b.columns + i] = clamp(prior_log_var[i]);
    }
  }
}

template <typename T>
void forward(const Gaussian &g, const GaussianOutputs &out) {
  using C = typename ComputeType<T>::type;
  T *z = static_cast<T *>(out.z);
  C *kl = static_cast<C *>(out.kl);
  const Blocks blocks(g.rows, g.latent, kBlock);
  const uint64_t seed = uint64_t(*g.seed);
  const int64_t size = g.rows * g.latent;
  const int threads = threads_for(size * max<int64_t>(g.samples, 1), kGrain);

#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t group = 0; group < blocks.groups(); ++group) {
    double piece_sum = 0.0;
    for (int64_t piece = 0; piece < blocks.pieces; ++piece) {
      const Block b = blocks.block(group, piece);
      const int64_t first = b.row * g.latent + b.column, n = b.count();
      alignas(64) C m[kBlock], std_dev[kBlock], divergence[kBlock];
      alignas(64) float noise_buffer[kBlock + 8];
      T mean_buffer[kBlock], log_var_buffer[kBlock];
      const T *mean = gather(g.mean, g.stride, b, mean_buffer),
              *log_var = gather(g.log_var, g.stride, b, log_var_buffer);

      const int64_t ahead = min(n, size - first - n);
      prefetch(mean + n, ahead);
      prefetch(log_var + n, ahead);
      if (g.prior_rows == 0) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const C mu = load(mean[i]), lv = clamp(C(load(log_var[i])));
          const auto half = exp_pair(C(0.5) * lv);
          m[i] = mu;
          std_dev[i] = half.exp;
          // expm1(lv) from its half's parts: for small lv its error stays a rounding of lv, that of exp(lv) - 1 would
          // be a rounding of 1.
          const C distance = limited(mu);
          divergence[i] = C(0.5) * (distance * distance + (half.expm1 * (half.exp + C(1)) - lv));
        }
      } else {
        alignas(64) C prior_mean[kBlock], prior_log_var[kBlock];
        load_prior(g, b, prior_mean, prior_log_var);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const C mu = load(mean[i]), lv = clamp(C(load(log_var[i])));
          const C distance = mu - prior_mean[i], ratio = lv - prior_log_var[i];
          const C square = distance * (distance * exp(-prior_log_var[i]));
          m[i] = mu;
          std_dev[i] = exp(C(0.5) * lv);
          divergence[i] = C(0.5) * ((square > C(kSquareLimit) ? C(kSquareLimit) : square) + (expm1(ratio) - ratio));
        }
      }

      for (int64_t s = 0; s < g.samples; ++s) {
        const float *noise = normal_block(seed, uint64_t(s * size + first), n, noise_buffer);
        T *to = z + s * size + first;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) store(to[i], m[i] + std_dev[i] * C(noise[i]));
      }

      if (g.sum_latent) {
        for (int64_t r = 0; r < b.rows; ++r) {
          C sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t i = 0; i < b.columns; ++i) sum += divergence[r * b.columns + i];
          piece_sum = (blocks.pieces > 1 ? piece_sum : 0.0) + double(sum);
          kl[b.row + r] = C(piece_sum);
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) kl[first + i] = divergence[i];
      }
    }
  }
}

template <typename T>
void backward(const Gaussian &g, const GaussianGradients &grad) {
  using C = typename ComputeType<T>::type;
  const T *grad_z = static_cast<const T *>(grad.grad_z);
  const C *grad_kl = static_cast<const C *>(grad.grad_kl);
  const Blocks blocks(g.rows, g.latent, kBlock);
  const uint64_t seed = uint64_t(*g.seed);
  const int64_t size = g.rows * g.latent;
  int threads = threads_for(size * max<int64_t>(g.samples, 1), kGrain);
  if (g.prior_rows == 1) threads = int(min<int64_t>(threads, grad.partials));

#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t group = 0; group < blocks.groups(); ++group) {
    for (int64_t piece = 0; piece < blocks.pieces; ++piece) {
      const Block b = blocks.block(group, piece);
      const int64_t first = b.row * g.latent + b.column, n = b.count();
      alignas(64) C sum_z[kBlock], sum_noise[kBlock], weight[kBlock];
      alignas(64) float noise_buffer[kBlock + 8];
      T mean_buffer[kBlock], log_var_buffer[kBlock];
      const T *mean = gather(g.mean, g.stride, b, mean_buffer),
              *log_var = gather(g.log_var, g.stride, b, log_var_buffer);
      T *grad_mean = destination(grad.grad_mean, grad.grad_stride, b, mean_buffer);
      T *grad_log_var = destination(grad.grad_log_var, grad.grad_stride, b, log_var_buffer);

      const int64_t ahead = min(n, size - first - n);
      prefetch(mean + n, ahead);
      prefetch(log_var + n, ahead);
      if (grad_z) prefetch(grad_z + first + n, ahead);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) sum_z[i] = sum_noise[i] = weight[i] = C(0);
      for (int64_t s = 0; grad_z && s < g.samples; ++s) {
        const float *noise = normal_block(seed, uint64_t(s * size + first), n, noise_buffer);
        const T *from = grad_z + s * size + first;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const C dz = load(from[i]);
          sum_z[i] += dz;
          sum_noise[i] += dz * C(noise[i]);
        }
      }
      for (int64_t r = 0; grad_kl && r < b.rows; ++r) {
        const int64_t at = r * b.columns;
#pragma omp simd
        for (int64_t i = 0; i < b.columns; ++i) {
          weight[at + i] = g.sum_latent ? grad_kl[b.row + r] : grad_kl[first + at + i];
        }
      }

      if (g.prior_rows == 0) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const C mu = load(mean[i]), raw = load(log_var[i]);
          const auto half = exp_pair(C(0.5) * clamp(raw));
          const C dlv = C(0.5) * (half.exp * sum_noise[i] + weight[i] * (half.expm1 * (half.exp + C(1))));
          store(grad_mean[i], sum_z[i] + weight[i] * zero_beyond(mu));
          store(grad_log_var[i], clamped(raw) ? C(0) : dlv);
        }
        scatter(grad.grad_mean, grad.grad_stride, b, grad_mean);
        scatter(grad.grad_log_var, grad.grad_stride, b, grad_log_var);
        continue;
      }

      alignas(64) C prior_mean[kBlock], prior_log_var[kBlock];
      load_prior(g, b, prior_mean, prior_log_var);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const C mu = load(mean[i]), raw = load(log_var[i]), lv = clamp(raw);
        const C given = mu - prior_mean[i], precision = exp(-prior_log_var[i]);
        const C distance = given * (given * precision) > C(kSquareLimit) ? C(0) : given;
        const C ratio = expm1(lv - prior_log_var[i]), pull = weight[i] * distance * precision;
        const C dlv = C(0.5) * (exp(C(0.5) * lv) * sum_noise[i] + weight[i] * ratio);
        store(grad_mean[i], sum_z[i] + pull);
        store(grad_log_var[i], clamped(raw) ? C(0) : dlv);
        prior_mean[i] = -pull;  // from here on the gradients of the prior
        prior_log_var[i] = C(-0.5) * (distance * pull + weight[i] * ratio);
      }
      scatter(grad.grad_mean, grad.grad_stride, b, grad_mean);
      scatter(grad.grad_log_var, grad.grad_stride, b, grad_log_var);
      C *prior_gradient = static_cast<C *>(grad.grad_prior);
      const C *raw_prior_log_var = static_cast<const C *>(g.prior_log_var);
      for (int64_t r = 0; r < b.rows; ++r) {
        const int64_t to = (g.prior_rows == 1 ? thread_index() : b.row + r) * g.latent + b.column;
        const C *raw = raw_prior_log_var + (g.prior_rows == 1 ? 0 : b.row + r) * g.latent + b.column;
        C *to_mean = prior_gradient + to, *to_log_var = prior_gradient + grad.partials * g.latent + to;
#pragma omp simd
        for (int64_t i = 0; i < b.columns; ++i) {
          to_mean[i] += prior_mean[r * b.columns + i];
          to_log_var[i] += clamped(raw[i]) ? C(0) : prior_log_var[r * b.columns + i];
        }
      }
    }
  }
}

}  // namespace

void gaussian_forward(const Gaussian &g, const GaussianOutputs &out) {
  switch (g.dtype) {
    case DType::kFloat32: return forward<float>(g, out);
    case DType::kFloat64: return forward<double>(g, out);
    case DType::kBFloat16: return forward<BFloat16>(g, out);
    case DType::kFloat16: return forward<Float16>(g, out);
  }
}

void gaussian_backward(const Gaussian &g, const GaussianGradients &grad) {
  switch (g.dtype) {
    case DType::kFloat32: return backward<float>(g, grad);
    case DType::kFloat64: return backward<double>(g, grad);
    case DType::kBFloat16: return backward<BFloat16>(g, grad);
    case DType::kFloat16: return backward<Float16>(g, grad);
  }
}

}  // namespace fastvae::FASTVAE_ISA
