// Negative log-likelihoods and their gradients, one pass each (fastvae/ops/likelihood.py holds the definition).
//
// Bytes: the forward reads the prediction and the target (8 bytes of float32 an element), the backward reads both again
// and writes a gradient (12); eager makes 5 to 10 passes each way. Work, Bernoulli: one exponential and an
// eighth of a logarithm forward, one exponential and one division backward, 26 and 22 vector instructions a vector, of
// which a core does two a cycle: what the caches hold is bound by this, the rest by memory.
#include "elementwise.h"
#include "vecmath.h"

namespace fastvae::FASTVAE_ISA {
namespace {

constexpr int64_t kBlock = kLikelihoodBlock;
constexpr int64_t kGrain = 8192;  // elements a thread should get at least: some 5 us of work
constexpr int64_t kLanes = 16, kFactors = 8, kSpan = kLanes * kFactors;  // see bernoulli_sum
constexpr int64_t kSharedTargets = 1 << 17;  // elements of the target that stay in the second cache for all samples
constexpr double kLog2Pi = 1.8378770664093454836;

template <typename C>
struct Bits {
  using type = uint32_t;
  static constexpr DType dtype = DType::kFloat32;
};
template <>
struct Bits<double> {
  using type = uint64_t;
  static constexpr DType dtype = DType::kFloat64;
};

// n numbers from `first` on as the compute type C: where they are, or converted into `buffer`.
template <typename From, typename C>
FASTVAE_INLINE const C *converted(const void *from, int64_t first, int64_t n, C *buffer) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) buffer[i] = load(static_cast<const From *>(from)[first + i]);
  return buffer;
}
template <typename C>
FASTVAE_INLINE const C *read(DType dtype, const void *from, int64_t first, int64_t n, C *buffer) {
  switch (dtype) {
    case DType::kBFloat16: return converted<BFloat16>(from, first, n, buffer);
    case DType::kFloat16: return converted<Float16>(from, first, n, buffer);
    default: return static_cast<const C *>(from) + first;
  }
}

FASTVAE_INLINE void prefetch_numbers(DType dtype, const void *from, int64_t first, int64_t n) {
  const int64_t size = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  prefetch(static_cast<const char *>(from) + first * size, n * size);
}

// Where n numbers of a result are to be computed: at their place or, if that has another type or nobody wants them, in
// `buffer`.
template <typename C>
FASTVAE_INLINE C *place(DType dtype, void *to, int64_t first, C *buffer) {
  return to && dtype == Bits<C>::dtype ? static_cast<C *>(to) + first : buffer;
}
// Puts n computed numbers in their place, if they are not there.
template <typename To, typename C>
FASTVAE_INLINE void copy(void *to, int64_t first, int64_t n, const C *values) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(static_cast<To *>(to)[first + i], values[i]);
}
template <typename C>
FASTVAE_INLINE void write(DType dtype, void *to, int64_t first, int64_t n, const C *values) {
  if (!to || place(dtype, to, first, static_cast<C *>(nullptr)) == values) return;
  switch (dtype) {
    case DType::kBFloat16: return copy<BFloat16>(to, first, n, values);
    case DType::kFloat16: return copy<Float16>(to, first, n, values);
    default: return copy<C>(to, first, n, values);
  }
}

// The order of the work: a unit is a group of blocks of one sample's targets, or of all samples. Units that follow each
// other share their part of the target while it is in the second cache.
struct Units {
  Blocks blocks;
  int64_t samples, groups, shared;  // groups that are taken together for all samples
  bool all_samples;
  Units(const Likelihood &p, bool all_samples)
      : blocks(p.targets, p.features, kBlock),
        samples(p.samples),
        groups(blocks.groups()),
        shared(max<int64_t>(1, kSharedTargets / max<int64_t>(1, blocks.rows_per_block * p.features))),
        all_samples(all_samples) {}
  int64_t count() const { return all_samples ? groups : groups * samples; }
};
struct Unit {
  int64_t group, first_sample, last_sample;
  Unit(const Units &units, int64_t index) {
    if (units.all_samples) {
      group = index, first_sample = 0, last_sample = units.samples;
      return;
    }
    const int64_t before = index / (units.shared * units.samples) * units.shared;
    const int64_t width = min(units.shared, units.groups - before), rest = index - before * units.samples;
    group = before + rest % width;
    first_sample = rest / width, last_sample = first_sample + 1;
  }
};

// Whether all are in [0, 1], NaN is not. The bits of such numbers are in the order of unsigned integers, but for -0.
template <typename C>
FASTVAE_INLINE bool are_probabilities(const C *values, int64_t n) {
  typename Bits<C>::type most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) most = max(most, bit_cast<typename Bits<C>::type>(values[i]));
  if (most <= bit_cast<typename Bits<C>::type>(C(1))) return true;
  for (int64_t i = 0; i < n; ++i) {
    if (!(values[i] >= C(0) && values[i] <= C(1))) return false;
  }
  return true;
}

// 1 / std of a log_var shared by all rows, laid out as a block is, so that a block's begins at its column; and the sum
// of a row's log_var.
template <typename C>
double share_log_var(const Likelihood &p, const Blocks &blocks) {
  const C *log_var = static_cast<const C *>(p.log_var);
  C *inverse_std = static_cast<C *>(p.memory);
  if (p.density == kGaussianNumber) {
    const C value = exp(C(-0.5) * clamp(log_var[0]));
    for (int64_t i = 0; i < kBlock; ++i) inverse_std[i] = value;
    return double(p.features) * double(clamp(log_var[0]));
  }
  double sum = 0.0;
#pragma omp simd
  for (int64_t i = 0; i < p.features; ++i) inverse_std[i] = exp(C(-0.5) * clamp(log_var[i]));
  for (int64_t i = 0; i < p.features; ++i) sum += double(clamp(log_var[i]));
  for (int64_t i = p.features; i < blocks.rows_per_block * p.features; ++i)
    inverse_std[i] = inverse_std[i - p.features];
  return sum;
}

// A block's operands.
template <typename C>
struct Operands {
  alignas(64) C buffers[4][kBlock];
  int64_t n;
  const C *prediction, *target, *log_var, *inverse_std;

  Operands(const Likelihood &p, const Block &b, int64_t sample) : n(b.count()) {
    const int64_t from = b.row * p.features + b.column, first = sample * p.targets * p.features + from;
    prefetch_numbers(p.dtype, p.prediction, first + n, min(n, p.samples * p.targets * p.features - first - n));
    prediction = read(p.dtype, p.prediction, first, n, buffers[0]);
    target = read(p.target_dtype, p.target, from, n, buffers[1]);
    if (p.density == kGaussianFull) {
      log_var = read(p.dtype, p.log_var, first, n, buffers[2]);
      inverse_std = buffers[3];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) buffers[3][i] = exp(C(-0.5) * clamp(log_var[i]));
    } else {
      inverse_std = static_cast<const C *>(p.memory) + (p.density == kGaussianRow ? b.column : 0);
    }
  }
};

template <typename C>
FASTVAE_INLINE void bernoulli_terms(const C *logits, const C *target, int64_t n, C *terms) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const C l = logits[i], t = target[i], magnitude = std::fabs(l), weight = l < C(0) ? t : C(1) - t;
    terms[i] = (weight == C(0) ? C(0) : magnitude * weight) + log1p(exp_of_minus(magnitude));
  }
}

// The sum of n terms, with one logarithm for kFactors of them: that of the product of their 1 + e, of which what it is
// beyond 1 is kept, so that small ones count to their last digits.
template <typename C>
FASTVAE_INLINE C bernoulli_sum(const C *logits, const C *target, int64_t n) {
  alignas(64) C sums[kLanes]{};
  int64_t i = 0;
  for (; i + kSpan <= n; i += kSpan) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      C linear = 0, beyond = 0;
      for (int64_t k = 0; k < kFactors; ++k) {
        const C l = logits[i + k * kLanes + lane], t = target[i + k * kLanes + lane];
        const C magnitude = std::fabs(l), weight = l < C(0) ? t : C(1) - t, e = exp_of_minus(magnitude);
        linear += magnitude * weight;
        beyond = beyond * e + (beyond + e);
      }
      sums[lane] += linear + log1p_wide(beyond);
    }
  }
  C sum = sum_of(sums, kLanes);
  if (!(sum == sum)) sum = 0, i = 0;  // an infinite logit whose weight is 0, or NaN: term by term
  alignas(64) C terms[kBlock];
  bernoulli_terms(logits + i, target + i, n - i, terms);
  return sum + sum_of(terms, n - i);
}

// `weight` is a function of the element: what a row shares is then known to the compiler.
template <typename C, typename Weight>
FASTVAE_INLINE void bernoulli_slopes(const C *logits, const C *target, int64_t n, Weight weight, C *slope) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const C l = logits[i], t = target[i], e = exp_of_minus(std::fabs(l)), far = l < C(0) ? t : C(1) - t;
    slope[i] = (far - e / (C(1) + e)) * (l < C(0) ? -weight(i) : weight(i));
  }
}

// (target - mean) / std at i.
template <typename C>
FASTVAE_INLINE C distance(const Operands<C> &in, int64_t i) {
  return (in.target[i] - in.prediction[i]) * in.inverse_std[i];
}

template <typename C>
FASTVAE_INLINE void gaussian_terms(const Operands<C> &in, bool full, C *terms) {
#pragma omp simd
  for (int64_t i = 0; i < in.n; ++i) terms[i] = distance(in, i) * distance(in, i);
  if (!full) return;
#pragma omp simd
  for (int64_t i = 0; i < in.n; ++i) terms[i] += clamp(in.log_var[i]);
}

template <typename C>
bool forward(const Likelihood &p, C *nll) {
  const Units units(p, false);
  const Blocks &blocks = units.blocks;
  const bool bernoulli = p.density == kBernoulli, full = p.density == kGaussianFull;
  double constant = 0.0, scale = 1.0;
  if (!bernoulli) {
    constant = double(p.features) * kLog2Pi + (full ? 0.0 : share_log_var<C>(p, blocks));
    scale = 0.5;
  }
  const int threads = threads_for(p.samples * p.targets * p.features, kGrain);
  int wrong = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : wrong)
  for (int64_t index = 0; index < units.count(); ++index) {
    const Unit unit(units, index);
    double sum = 0.0;
    for (int64_t piece = 0; piece < blocks.pieces; ++piece) {
      const Block b = blocks.block(unit.group, piece);
      const Operands<C> in(p, b, unit.first_sample);
      alignas(64) C terms[kBlock];
      const bool wide = bernoulli && b.columns >= kSpan;
      if (bernoulli && unit.first_sample == 0) wrong |= !are_probabilities(in.target, in.n);
      if (!bernoulli) {
        gaussian_terms(in, full, terms);
      } else if (!wide) {
        bernoulli_terms(in.prediction, in.target, in.n, terms);
      }
      for (int64_t r = 0; r < b.rows; ++r) {
        const int64_t from = r * b.columns;
        const C of_row = wide ? bernoulli_sum(in.prediction + from, in.target + from, b.columns)
                              : sum_of(terms + from, b.columns);
        sum = (blocks.pieces > 1 ? sum : 0.0) + double(of_row);
        nll[unit.first_sample * p.targets + b.row + r] = C(scale * (sum + constant));
      }
    }
  }
  return !wrong;
}

// The gradients of a block of one sample, that of the target added to `for_target`. Sums of the gradient of a shared
// log_var are added to row_sums (number) or column_sums (row).
template <typename C>
void backward_block(const Likelihood &p, const LikelihoodGradients &grad, const Block &b, int64_t sample, C *for_target,
                    double *row_sums, C *column_sums) {
  const Operands<C> in(p, b, sample);
  const int64_t n = in.n, row = sample * p.targets + b.row, first = row * p.features + b.column;
  alignas(64) C weight[kBlock], buffer[kBlock];
  const C *row_weight = static_cast<const C *>(grad.grad_nll) + row;
  const bool wide = p.density == kBernoulli && b.columns >= kSpan;
  for (int64_t r = 0; r < b.rows && (!wide || grad.grad_target); ++r) {
#pragma omp simd
    for (int64_t i = 0; i < b.columns; ++i) weight[r * b.columns + i] = row_weight[r];
  }

  C *slope = place(p.dtype, grad.grad_prediction, first, buffer);
  if (p.density == kBernoulli) {
    if (!wide) bernoulli_slopes(in.prediction, in.target, n, [&](int64_t i) { return weight[i]; }, slope);
    for (int64_t r = 0, from = 0; wide && r < b.rows; ++r, from += b.columns) {
      const C of_row = row_weight[r];
      bernoulli_slopes(
          in.prediction + from, in.target + from, b.columns, [=](int64_t) { return of_row; }, slope + from);
    }
    if (grad.grad_target) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) for_target[i] -= weight[i] * in.prediction[i];
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) slope[i] = -weight[i] * distance(in, i) * in.inverse_std[i];
    if (grad.grad_target) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) for_target[i] -= slope[i];
    }
  }
  write(p.dtype, grad.grad_prediction, first, n, slope);
  if (!grad.grad_log_var) return;

  const bool full = p.density == kGaussianFull;
  C *change = full ? place(p.dtype, grad.grad_log_var, first, buffer) : buffer;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) change[i] = C(0.5) * weight[i] * (C(1) - distance(in, i) * distance(in, i));
  if (full) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) change[i] = clamped(in.log_var[i]) ? C(0) : change[i];
    write(p.dtype, grad.grad_log_var, first, n, change);
    return;
  }
  for (int64_t r = 0; r < b.rows; ++r) {
    const C *of_row = change + r * b.columns;
    if (row_sums) {
      row_sums[row + r] = (b.column > 0 ? row_sums[row + r] : 0.0) + double(sum_of(of_row, b.columns));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < b.columns; ++i) column_sums[b.column + i] += of_row[i];
    }
  }
}

template <typename C>
void backward(const Likelihood &p, const LikelihoodGradients &grad) {
  const Units units(p, grad.grad_target != nullptr);
  const Blocks &blocks = units.blocks;
  const bool number = p.density == kGaussianNumber, row = p.density == kGaussianRow;
  if (number || row) share_log_var<C>(p, blocks);
  double *row_sums = number ? static_cast<double *>(grad.partial) : nullptr;
  C *column_sums = row ? static_cast<C *>(grad.partial) : nullptr;
  const int64_t rows = p.samples * p.targets, count = units.count();
  const int threads = threads_for(rows * p.features, kGrain);
  // A task is a unit or, where columns get sums, a part of the units fixed beforehand, whatever the threads.
  const int64_t tasks = column_sums ? grad.partials : count;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task) {
    C *sums = column_sums ? column_sums + task * p.features : nullptr;
    for (int64_t i = 0; sums && i < p.features; ++i) sums[i] = C(0);
    const int64_t index = sums ? task * count / tasks : task, end = sums ? (task + 1) * count / tasks : task + 1;
    for (int64_t u = index; u < end; ++u) {
      const Unit unit(units, u);
      for (int64_t piece = 0; piece < blocks.pieces; ++piece) {
        const Block b = blocks.block(unit.group, piece);
        alignas(64) C for_target[kBlock];
        for (int64_t i = 0; grad.grad_target && i < b.count(); ++i) for_target[i] = C(0);
        for (int64_t sample = unit.first_sample; sample < unit.last_sample; ++sample) {
          backward_block(p, grad, b, sample, for_target, row_sums, sums);
        }
        write(p.target_dtype, grad.grad_target, b.row * p.features + b.column, b.count(), for_target);
      }
    }
  }

  const C *log_var = static_cast<const C *>(p.log_var);
  C *grad_log_var = static_cast<C *>(grad.grad_log_var);
  if (number && grad_log_var) {
    double sum = 0.0;
    for (int64_t r = 0; r < rows; ++r) sum += row_sums[r];
    grad_log_var[0] = clamped(log_var[0]) ? C(0) : C(sum);
  } else if (row && grad_log_var) {
    for (int64_t i = 0; i < p.features; ++i) grad_log_var[i] = C(0);
    for (int64_t task = 0; task < tasks; ++task) {
#pragma omp simd
      for (int64_t i = 0; i < p.features; ++i) grad_log_var[i] += column_sums[task * p.features + i];
    }
    for (int64_t i = 0; i < p.features; ++i) grad_log_var[i] = clamped(log_var[i]) ? C(0) : grad_log_var[i];
  }
}

}  // namespace

bool likelihood_forward(const Likelihood &p, void *nll) {
  return p.dtype == DType::kFloat64 ? forward(p, static_cast<double *>(nll)) : forward(p, static_cast<float *>(nll));
}

void likelihood_backward(const Likelihood &p, const LikelihoodGradients &grad) {
  p.dtype == DType::kFloat64 ? backward<double>(p, grad) : backward<float>(p, grad);
}

}  // namespace fastvae::FASTVAE_ISA
