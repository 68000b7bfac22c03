// Sampling from a Gaussian of full covariance + KL (fastvae/ops/full_gaussian.py holds the definition).
//
// Bytes, with T = D (D - 1) / 2 numbers below the diagonal: the forward reads T + 2 D and writes D + 1 numbers a row,
// the backward reads T + 3 D + 1 and writes T + 2 D: 12 T bytes in all where T is most. FLOPs: 2 T a sample for z, 2 T
// for the KL, 2 T a sample and T for the gradients: under one a byte, so that memory is the limit where rows do not fit
// the caches. Below 16 or so dimensions the noise is: 1.5 ns an element and core.
//
// The triangles of some rows lie in a tile on the stack for all their samples; a triangle too large for it is gone
// through in pieces of whole triangle rows, with the noise made again for each.
#include "gaussian.h"
#include "sums.h"

namespace fastvae::FASTVAE_ISA {
namespace {

constexpr int64_t kTile = 4096;  // numbers: two tiles fit the first-level cache
static_assert(kBlock <= kTile, "a triangle row fits a tile");

FASTVAE_INLINE int64_t triangle(int64_t rows) { return rows * (rows - 1) / 2; }

// A group of rows that one thread computes at once.
struct Groups {
  int64_t rows, latent, rows_per_group;
  Groups(int64_t rows, int64_t latent)
      : rows(rows),
        latent(latent),
        rows_per_group(even_rows(rows, latent,
                                 min(kBlock / max<int64_t>(1, latent), kTile / max<int64_t>(1, triangle(latent))))) {}
  int64_t count() const { return (rows + rows_per_group - 1) / rows_per_group; }
  // The triangle rows [from, end) fit a tile.
  int64_t end(int64_t from) const {
    if (triangle(latent) <= kTile) return latent;
    int64_t to = from + 1;
    while (to < latent && triangle(to + 1) - triangle(from) <= kTile) ++to;
    return to;
  }
  int threads(int64_t samples) const {
    return threads_for(rows * (latent * max<int64_t>(samples, 1) + triangle(latent) * (samples + 1) / 8), kGrain);
  }
};

// Noise of `count` elements in the type of the arithmetic.
template <typename C>
FASTVAE_INLINE void fill_noise(uint64_t seed, int64_t first, int64_t count, C *noise) {
  alignas(64) float buffer[kBlock + 8];
  const float *from = normal_block(seed, uint64_t(first), count, buffer);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) noise[i] = C(from[i]);
}

template <typename T>
void forward(const FullGaussian &g, const GaussianOutputs &out) {
  using C = typename ComputeType<T>::type;
  const T *mean = static_cast<const T *>(g.mean), *log_diagonal = static_cast<const T *>(g.log_diagonal);
  const T *lower = static_cast<const T *>(g.lower);
  T *z = static_cast<T *>(out.z);
  C *kl = static_cast<C *>(out.kl);
  const Groups groups(g.rows, g.latent);
  const uint64_t seed = uint64_t(*g.seed);
  const int64_t latent = g.latent, size = g.rows * latent, numbers = triangle(latent);

#pragma omp parallel for schedule(static) num_threads(groups.threads(g.samples))
  for (int64_t group = 0; group < groups.count(); ++group) {
    const int64_t row = group * groups.rows_per_group, rows = min(groups.rows_per_group, g.rows - row);
    const int64_t first = row * latent;
    alignas(64) C tile[kTile + kPad], noise[kBlock + kPad], divergence[kBlock + kPad];
    alignas(64) C m[kBlock], diagonal[kBlock], product[kBlock];
    double sums[kBlock];
#pragma omp simd
    for (int64_t i = 0; i < rows * latent; ++i) {
      const C mu = load(mean[first + i]), log_var = clamp(C(2) * C(load(log_diagonal[first + i])));
      const auto half = exp_pair(C(0.5) * log_var);
      m[i] = mu;
      diagonal[i] = half.exp;
      const C distance = limited(mu);
      divergence[i] = C(0.5) *
                      (distance * distance + (half.expm1 * (half.exp + C(1)) - log_var));  // as in gaussian.cpp
    }
    for (int64_t r = 0; r < rows; ++r) sums[r] = double(sum(divergence + r * latent, latent));

    int64_t from = 0;
    do {
      const int64_t to = groups.end(from), start = triangle(from), width = triangle(to) - start;
      for (int64_t r = 0; r < rows; ++r) {
        const T *below = lower + (row + r) * numbers + start;
        C squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; ++i) {
          const C x = load(below[i]), distance = limited(x);
          tile[r * width + i] = x;
          squares += distance * distance;
        }
        sums[r] += 0.5 * double(squares);
      }
      const int64_t end = (rows - 1) * latent + to;
      for (int64_t s = 0; s < g.samples; ++s) {
        fill_noise(seed, s * size + first, end, noise);
        for (int64_t r = 0; r < rows; ++r) {
          const C *below = tile + r * width - start;
          for (int64_t i = from; i < to; ++i) {
            product[r * latent + i] = dot(below + triangle(i), noise + r * latent, i);
          }
        }
        T *sample = z + s * size + first;
#pragma omp simd
        for (int64_t i = from; i < end; ++i) store(sample[i], m[i] + (product[i] + diagonal[i] * noise[i]));
      }
      from = to;
    } while (from < latent);
    for (int64_t r = 0; r < rows; ++r) kl[row + r] = C(sums[r]);
  }
}

template <typename T>
void backward(const FullGaussian &g, const FullGaussianGradients &grad) {
  using C = typename ComputeType<T>::type;
  const T *mean = static_cast<const T *>(g.mean), *log_diagonal = static_cast<const T *>(g.log_diagonal);
  const T *lower = static_cast<const T *>(g.lower), *grad_z = static_cast<const T *>(grad.grad_z);
  const C *grad_kl = static_cast<const C *>(grad.grad_kl);
  T *grad_mean = static_cast<T *>(grad.grad_mean), *grad_log_diagonal = static_cast<T *>(grad.grad_log_diagonal);
  T *grad_lower = static_cast<T *>(grad.grad_lower);
  const Groups groups(g.rows, g.latent);
  const uint64_t seed = uint64_t(*g.seed);
  const int64_t latent = g.latent, size = g.rows * latent, numbers = triangle(latent);

#pragma omp parallel for schedule(static) num_threads(groups.threads(g.samples))
  for (int64_t group = 0; group < groups.count(); ++group) {
    const int64_t row = group * groups.rows_per_group, rows = min(groups.rows_per_group, g.rows - row);
    const int64_t first = row * latent;
    // A sample adds to `tile` what `sum_tile` takes: whole vectors run over into the next row, not yet written there.
    alignas(64) C tiles[2][kTile + kPad], noise[kBlock + kPad], dz[kBlock];
    alignas(64) C sum_z[kBlock], sum_noise[kBlock], weight[kBlock];
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
      for (int64_t i = r * latent; i < (r + 1) * latent; ++i) {
        sum_z[i] = sum_noise[i] = C(0);
        weight[i] = grad_kl ? grad_kl[row + r] : C(0);
      }
    }

    int64_t from = 0;
    do {
      const int64_t to = groups.end(from), start = triangle(from), width = triangle(to) - start;
      C *tile = tiles[0], *sum_tile = tiles[1];
      for (int64_t r = 0; r < rows; ++r) {
        const T *below = lower + (row + r) * numbers + start;
        const C share = grad_kl ? grad_kl[row + r] : C(0);
        C *first_of = tile + r * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) first_of[i] = grad_kl ? share * zero_beyond(C(load(below[i]))) : C(0);
      }
      const int64_t end = (rows - 1) * latent + to;
      for (int64_t s = 0; grad_z && s < g.samples; ++s) {
        fill_noise(seed, s * size + first, end, noise);
        const T *sample = grad_z + s * size + first;
#pragma omp simd
        for (int64_t i = from; i < end; ++i) {
          dz[i] = load(sample[i]);
          sum_z[i] += dz[i];
          sum_noise[i] += dz[i] * noise[i];
        }
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = from; i < to; ++i) {
            const int64_t at = r * width + triangle(i) - start;
            const C scale = dz[r * latent + i];
            for (int64_t j = 0; j < i; j += kWidth<C>) {
              vector_at(sum_tile + at + j) = vector_at(tile + at + j) + scale * vector_at(noise + r * latent + j);
            }
          }
        }
        C *const sums = sum_tile;
        sum_tile = tile, tile = sums;
      }
      for (int64_t r = 0; r < rows; ++r) {
        T *below = grad_lower + (row + r) * numbers + start;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) store(below[i], tile[r * width + i]);
      }
      from = to;
    } while (from < latent);

#pragma omp simd
    for (int64_t i = 0; i < rows * latent; ++i) {
      const C mu = load(mean[first + i]), raw = C(2) * C(load(log_diagonal[first + i]));
      const auto half = exp_pair(C(0.5) * clamp(raw));
      const C change = half.exp * sum_noise[i] + weight[i] * (half.expm1 * (half.exp + C(1)));
      store(grad_mean[first + i], sum_z[i] + weight[i] * zero_beyond(mu));
      store(grad_log_diagonal[first + i], clamped(raw) ? C(0) : change);
    }
  }
}

}  // namespace

void full_gaussian_forward(const FullGaussian &g, const GaussianOutputs &out) {
  switch (g.dtype) {
    case DType::kFloat32: return forward<float>(g, out);
    case DType::kFloat64: return forward<double>(g, out);
    case DType::kBFloat16: return forward<BFloat16>(g, out);
    case DType::kFloat16: return forward<Float16>(g, out);
  }
}

void full_gaussian_backward(const FullGaussian &g, const FullGaussianGradients &grad) {
  switch (g.dtype) {
    case DType::kFloat32: return backward<float>(g, grad);
    case DType::kFloat64: return backward<double>(g, grad);
    case DType::kBFloat16: return backward<BFloat16>(g, grad);
    case DType::kFloat16: return backward<Float16>(g, grad);
  }
}

}  // namespace fastvae::FASTVAE_ISA
