// Log-density of points under a uniform mixture of diagonal Gaussians (fastvae/ops/posterior.py holds the definition).
//
// Work: a subtraction, a product and a fused multiply-add for each point, component and dimension, and one exponential
// for each pair; the expanded square would be two large products, and lose the digits of narrow components. Bytes: the
// components are read once for each kRowBlock points, from the second-level cache or beyond, at a few bytes a cycle.
#include "elementwise.h"
#include "gemm.h"
#include "vecmath.h"

namespace fastvae::FASTVAE_ISA {
namespace {

constexpr int64_t kGroup = 32;        // components side by side in vectors
constexpr int64_t kRowBlock = 36;     // points at a time, whose log-densities with
constexpr int64_t kBlockGroups = 8;   // groups of components stay in the first-level cache
constexpr int64_t kPacked = 1 << 19;  // bytes of components laid out at a time, for all points
constexpr int64_t kCache = 1 << 19;   // bytes of components and their gradients to stay in the second-level cache
constexpr int64_t kSummed = 16;       // dimensions in one sum
constexpr int64_t kGrain = 1 << 15;   // points * components * dimensions worth a thread
constexpr double kHalfLogTwoPi = 0.91893853320467274;
// Weights smaller than its exponential count as zero: they change no digit of a sum of weights, which is 1, and numbers
// below the normal range would slow the arithmetic down a hundredfold.
constexpr double kLeastLogWeight = -60.0;

template <typename T>
constexpr int kGroupVectors = int(kGroup) / kWidth<T>;
template <typename T>
constexpr int kTileRows = kAccumulators / kGroupVectors<T> > 0 ? kAccumulators / kGroupVectors<T> : 1;

template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
FASTVAE_INLINE Vector<T> &vector_at(T *p) {
  return *reinterpret_cast<Vector<T> *>(p);
}
template <typename T>
FASTVAE_INLINE const Vector<T> &vector_at(const T *p) {
  return *reinterpret_cast<const Vector<T> *>(p);
}

// A group holds, for each dimension, kGroup means and kGroup precisions; then kGroup terms that no point changes.
FASTVAE_INLINE int64_t group_size(int64_t latent) { return (2 * latent + 1) * kGroup; }
FASTVAE_INLINE int64_t group_count(const Mixture &p) { return (p.components + kGroup - 1) / kGroup; }

template <typename T>
FASTVAE_INLINE void pack_group(const Mixture &p, int64_t group, T *to) {
  const T *means = static_cast<const T *>(p.mean), *log_vars = static_cast<const T *>(p.log_var);
  for (int64_t j = 0; j < kGroup; ++j) {
    const int64_t component = group * kGroup + j;
    if (component >= p.components) {  // fills up the last group: a density of zero
      for (int64_t d = 0; d < p.latent; ++d) to[2 * d * kGroup + j] = 0, to[(2 * d + 1) * kGroup + j] = 1;
      to[2 * p.latent * kGroup + j] = T(-HUGE_VAL);
      continue;
    }
    const T *mean = means + component * p.latent, *log_var = log_vars + component * p.latent;
    double sum = 0;
    for (int64_t d = 0; d < p.latent; ++d) {
      const T clamped = clamp(log_var[d]);
      to[2 * d * kGroup + j] = mean[d];
      to[(2 * d + 1) * kGroup + j] = exp(-clamped);
      sum += double(clamped);
    }
    to[2 * p.latent * kGroup + j] = T(-0.5 * sum - kHalfLogTwoPi * double(p.latent));
  }
}

// out[r][j] = log N(z_r; mean_j, var_j) for kRows points and a group of components. Sums of kSummed dimensions are
// summed again: so the rounding of a long sum stays that of PyTorch's, which has many parts too.
template <typename T, int kRows>
static __attribute__((noinline)) void log_densities(int64_t latent, const T *z, const T *group, T *out,
                                                    int64_t out_stride) {
  constexpr int kV = kGroupVectors<T>, kW = kWidth<T>;
  const T *constants = group + 2 * latent * kGroup;
  for (int64_t first = 0; first == 0 || first < latent; first += kSummed) {
    Vector<T> sums[kRows][kV] = {};
    for (int64_t d = first; d < min(latent, first + kSummed); ++d, group += 2 * kGroup) {
      Vector<T> mean[kV], precision[kV];
      for (int v = 0; v < kV; ++v) {
        mean[v] = vector_at(group + v * kW), precision[v] = vector_at(group + kGroup + v * kW);
      }
      for (int r = 0; r < kRows; ++r) {
        const T scalar = z[r * latent + d];
        for (int v = 0; v < kV; ++v) {
          const Vector<T> distance = scalar - mean[v];
          sums[r][v] += distance * (distance * precision[v]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kV; ++v) {
        T *to = out + r * out_stride + v * kW;
        vector_at(to) = (first == 0 ? vector_at(constants + v * kW) : vector_at(to)) - T(0.5) * sums[r][v];
      }
    }
  }
}

// Adds what kRows points weigh in the gradients of a group: laid out as the group, d/d mean, (z - mean)^2 / var times
// weight, and the weights. `lanes` (kRows, latent, vector) takes minus the gradient of z, to be summed over the vector.
template <typename T, int kRows>
static __attribute__((noinline)) void add_gradients(int64_t latent, const T *z, const T *group, const T *weights,
                                                    T *gradient, T *lanes) {
  constexpr int kV = kGroupVectors<T>, kW = kWidth<T>;
  for (int64_t d = 0; d < latent; ++d, group += 2 * kGroup, gradient += 2 * kGroup) {
    Vector<T> mean[kV], precision[kV], to_mean[kV], to_square[kV];
    for (int v = 0; v < kV; ++v) {
      mean[v] = vector_at(group + v * kW), precision[v] = vector_at(group + kGroup + v * kW);
      to_mean[v] = vector_at(gradient + v * kW), to_square[v] = vector_at(gradient + kGroup + v * kW);
    }
    for (int r = 0; r < kRows; ++r) {
      const T scalar = z[r * latent + d];
      Vector<T> to_z = {};
      for (int v = 0; v < kV; ++v) {
        const Vector<T> distance = scalar - mean[v];
        const Vector<T> pull = vector_at(weights + r * kGroup + v * kW) * distance * precision[v];
        to_mean[v] += pull;
        to_square[v] += pull * distance;
        to_z += pull;
      }
      vector_at(lanes + (r * latent + d) * kW) += to_z;
    }
    for (int v = 0; v < kV; ++v) {
      vector_at(gradient + v * kW) = to_mean[v], vector_at(gradient + kGroup + v * kW) = to_square[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kV; ++v) vector_at(gradient + v * kW) += vector_at(weights + r * kGroup + v * kW);
  }
}

// The two above for any number of rows up to kTileRows.
template <typename T, int kRows>
FASTVAE_INLINE void log_densities_of(int64_t rows, int64_t latent, const T *z, const T *group, T *out,
                                     int64_t out_stride) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return log_densities<T, kRows>(latent, z, group, out, out_stride);
    log_densities_of<T, kRows - 1>(rows, latent, z, group, out, out_stride);
  }
}
template <typename T, int kRows>
FASTVAE_INLINE void add_gradients_of(int64_t rows, int64_t latent, const T *z, const T *group, const T *weights,
                                     T *gradient, T *lanes) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return add_gradients<T, kRows>(latent, z, group, weights, gradient, lanes);
    add_gradients_of<T, kRows - 1>(rows, latent, z, group, weights, gradient, lanes);
  }
}

// log sum exp so far, of one point.
struct LogSum {
  double largest, sum;  // sum of exponentials above the largest

  double value() const {
    if (largest > -HUGE_VAL || sum != sum) return largest + std::log(sum);
    return -HUGE_VAL;  // the sum is then made of what the exponential gives at its lower clamp
  }
};

template <typename T>
FASTVAE_INLINE void add(LogSum &total, const T *values, int64_t count) {
  T largest = T(total.largest);
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) largest = values[i] > largest ? values[i] : largest;
  const T shift = largest == T(-HUGE_VAL) ? T(0) : largest;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += exp(values[i] - shift);
  if (double(largest) > total.largest) total.sum *= std::exp(total.largest - double(shift));
  total.largest = double(largest);
  total.sum += double(sum);
}

// Groups of components that the forward pass lays out at a time: whole blocks, the same for any number of threads.
template <typename T>
FASTVAE_INLINE int64_t packed_groups(const Mixture &p) {
  const int64_t blocks = kPacked / (kBlockGroups * group_size(p.latent) * int64_t(sizeof(T)));
  return min(group_count(p), max<int64_t>(1, blocks) * kBlockGroups);
}

template <typename T>
FASTVAE_INLINE int threads_of(const Mixture &p) {
  const double work = double(p.rows) * double(p.components) * double(max<int64_t>(p.latent, 8));
  return int(min<int64_t>(threads_for(int64_t(min(work, 1e18)), kGrain), p.threads));
}

template <typename T>
void forward(const Mixture &p) {
  const T *z = static_cast<const T *>(p.z);
  T *log_density = static_cast<T *>(p.log_density), *packed = static_cast<T *>(p.memory);
  const int64_t groups = group_count(p), size = group_size(p.latent), at_once = packed_groups<T>(p);
  LogSum *sums = reinterpret_cast<LogSum *>(packed + at_once * size);
  const int threads = threads_of<T>(p);
  const int64_t row_block = max<int64_t>(1, min(kRowBlock, (p.rows + threads - 1) / threads));
  const double log_components = std::log(double(p.components));

#pragma omp parallel num_threads(threads)
  for (int64_t start = 0; start < groups; start += at_once) {
    const int64_t end = min(groups, start + at_once);
#pragma omp for schedule(static)
    for (int64_t group = start; group < end; ++group) pack_group(p, group, packed + (group - start) * size);

#pragma omp for schedule(static)
    for (int64_t first = 0; first < p.rows; first += row_block) {
      const int64_t rows = min(row_block, p.rows - first);
      alignas(64) T block[kRowBlock * kBlockGroups * kGroup];
      for (int64_t r = first; start == 0 && r < first + rows; ++r) sums[r] = {-HUGE_VAL, 0};
      for (int64_t group = start; group < end; group += kBlockGroups) {
        const int64_t count = min(kBlockGroups, end - group);
        for (int64_t g = 0; g < count; ++g) {
          for (int64_t r = 0; r < rows; r += kTileRows<T>) {
            log_densities_of<T, kTileRows<T>>(min<int64_t>(kTileRows<T>, rows - r), p.latent,
                                              z + (first + r) * p.latent, packed + (group - start + g) * size,
                                              block + (r * kBlockGroups + g) * kGroup, kBlockGroups * kGroup);
          }
        }
        for (int64_t r = 0; r < rows; ++r) add(sums[first + r], block + r * kBlockGroups * kGroup, count * kGroup);
      }
      for (int64_t r = first; end == groups && r < first + rows; ++r) {
        log_density[r] = T(sums[r].value() - log_components);
      }
    }
  }
}

// Threads share the components; each has gradients of all points, added up at the end.
template <typename T>
void backward(const Mixture &p) {
  constexpr int64_t kRows = kTileRows<T>, kW = kWidth<T>;
  const T *z = static_cast<const T *>(p.z), *log_var = static_cast<const T *>(p.log_var);
  const T *log_density = static_cast<const T *>(p.log_density), *grad = static_cast<const T *>(p.grad);
  const int64_t groups = group_count(p), size = group_size(p.latent), points = p.rows * p.latent;
  const int64_t block_groups = max<int64_t>(1, kCache / (2 * size * int64_t(sizeof(T))));
  const int threads = threads_of<T>(p);
  const double log_components = std::log(double(p.components));
  T *packed = static_cast<T *>(p.memory), *gradients = packed + groups * size, *all_lanes = gradients + groups * size;
  T *partials = all_lanes + p.threads * kRows * p.latent * kW;

#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = thread_index(), team = thread_count();
    const int64_t begin = groups * thread / team, end = groups * (thread + 1) / team;
    T *lanes = all_lanes + thread * kRows * p.latent * kW, *partial = partials + thread * points;
    for (int64_t i = 0; i < points; ++i) partial[i] = 0;
    for (int64_t group = begin; group < end; ++group) pack_group(p, group, packed + group * size);
    for (int64_t i = begin * size; i < end * size; ++i) gradients[i] = 0;

    for (int64_t block = begin; block < end; block += block_groups) {
      for (int64_t first = 0; first < p.rows; first += kRows) {
        const int64_t rows = min(kRows, p.rows - first);
        alignas(64) T weights[kRows * kGroup];
        for (int64_t i = 0; i < rows * p.latent * kW; ++i) lanes[i] = 0;
        for (int64_t group = block; group < min(end, block + block_groups); ++group) {
          const T *from = z + first * p.latent, *components = packed + group * size;
          log_densities_of<T, kRows>(rows, p.latent, from, components, weights, kGroup);
          bool any = false;
          for (int64_t r = 0; r < rows; ++r) {
            const T total = log_density[first + r];
            const bool none = total == T(-HUGE_VAL);  // nowhere near any component: no gradient, as of logsumexp
            const T scale = none ? T(0) : grad[first + r], shift = none ? T(0) : T(double(total) + log_components);
            int used = 0;
#pragma omp simd reduction(| : used)
            for (int64_t j = 0; j < kGroup; ++j) {
              const T log_weight = weights[r * kGroup + j] - shift;
              const bool negligible = log_weight < T(kLeastLogWeight);
              weights[r * kGroup + j] = negligible ? T(0) : scale * exp(log_weight);
              used |= !negligible;
            }
            any |= used;
          }
          if (any)
            add_gradients_of<T, kRows>(rows, p.latent, from, components, weights, gradients + group * size, lanes);
        }
        for (int64_t i = 0; i < rows * p.latent; ++i) {
          T sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t lane = 0; lane < kW; ++lane) sum += lanes[i * kW + lane];
          partial[first * p.latent + i] -= sum;
        }
      }
    }

    T *grad_mean = static_cast<T *>(p.grad_mean), *grad_log_var = static_cast<T *>(p.grad_log_var);
    for (int64_t component = begin * kGroup; component < min(end * kGroup, p.components); ++component) {
      const T *from = gradients + component / kGroup * size + component % kGroup;
      for (int64_t d = 0; d < p.latent; ++d) {
        const int64_t to = component * p.latent + d;
        const T half = T(0.5) * (from[(2 * d + 1) * kGroup] - from[2 * p.latent * kGroup]);
        grad_mean[to] = from[2 * d * kGroup];
        grad_log_var[to] = clamped(log_var[to]) ? T(0) : half;
      }
    }
    barrier();
    T *grad_z = static_cast<T *>(p.grad_z);
    for (int64_t i = points * thread / team; i < points * (thread + 1) / team; ++i) {
      T sum = 0;
      for (int64_t t = 0; t < team; ++t) sum += partials[t * points + i];
      grad_z[i] = sum;
    }
  }
}

template <typename T>
int64_t workspace(const Mixture &p, bool backward) {
  const int64_t at_once = packed_groups<T>(p) * group_size(p.latent);
  if (!backward) return at_once * int64_t(sizeof(T)) + p.rows * int64_t(sizeof(LogSum));
  const int64_t packed = group_count(p) * group_size(p.latent);
  const int64_t thread = kTileRows<T> * p.latent * kWidth<T> + p.rows * p.latent;
  return (2 * packed + p.threads * thread) * int64_t(sizeof(T));
}

}  // namespace

void mixture_forward(const Mixture &p) { p.is_double ? forward<double>(p) : forward<float>(p); }
void mixture_backward(const Mixture &p) { p.is_double ? backward<double>(p) : backward<float>(p); }
int64_t mixture_workspace(const Mixture &p, bool backward) {
  return p.is_double ? workspace<double>(p, backward) : workspace<float>(p, backward);
}

}  // namespace fastvae::FASTVAE_ISA
