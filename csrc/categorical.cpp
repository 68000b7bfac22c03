// Gumbel-softmax sampling + KL, one pass forward and one backward (fastvae/ops/categorical.py holds the definition).
//
// Bytes: the forward reads and writes one number per element (8 bytes of float32), the backward reads 3 and writes 1.
// Work: a quarter of a Philox counter, two logarithms and two exponentials per element: about 3 ns of a core with
// AVX-512, so that arithmetic is the limit, not memory. Eager makes some 12 passes, and draws its noise with one
// thread.
#include "philox.h"

namespace fastvae::FASTVAE_ISA {
namespace {

constexpr int64_t kGrain = 4096;   // elements a thread should get at least: some 10 us of work
constexpr int64_t kSide = 16;      // numbers that go through every step together
constexpr int64_t kNarrow = 64;    // most classes of rows that do so side by side
constexpr int64_t kScratch = 6;    // arrays of a thread
constexpr int64_t kPadding = 128;  // numbers after each

// A row of 10 classes does not fill a vector, and its sums would be chains of dependent additions. Up to kNarrow
// classes, a tile is kSide rows, number j of row l at [j * kSide + l]; beyond, it is one row cut in steps of kSide.
// Either way the steps are the same, and `together` adds up what the sides of one row hold.
struct Tile {
  bool narrow;
  int64_t rows, classes, steps;
  int64_t size() const { return steps * kSide; }
};

template <typename T, typename C>
__attribute__((noinline)) void load_tile(const Tile &t, const T *from, int64_t stride, C padding, C *to) {
  if (!t.narrow) {
#pragma omp simd
    for (int64_t k = 0; k < t.classes; ++k) to[k] = load(from[k]);
    for (int64_t k = t.classes; k < t.size(); ++k) to[k] = padding;
  } else if (t.rows == kSide) {
    for (int64_t k = 0; k < t.classes; ++k) {
#pragma omp simd
      for (int64_t l = 0; l < kSide; ++l) to[k * kSide + l] = load(from[l * stride + k]);
    }
  } else {
    for (int64_t k = 0; k < t.classes; ++k) {
      for (int64_t l = 0; l < kSide; ++l) to[k * kSide + l] = l < t.rows ? C(load(from[l * stride + k])) : C(0);
    }
  }
}

template <typename T, typename C>
__attribute__((noinline)) void store_tile(const Tile &t, const C *from, T *to) {
  if (!t.narrow) {
#pragma omp simd
    for (int64_t k = 0; k < t.classes; ++k) store(to[k], from[k]);
    return;
  }
  for (int64_t l = 0; l < t.rows; ++l) {
#pragma omp simd
    for (int64_t k = 0; k < t.classes; ++k) store(to[l * t.classes + k], from[k * kSide + l]);
  }
}

template <typename C>
FASTVAE_INLINE void set(C (&sides)[kSide], C value) {
  for (int64_t l = 0; l < kSide; ++l) sides[l] = value;
}
template <typename C>
FASTVAE_INLINE void largest_together(const Tile &t, C (&sides)[kSide]) {
  if (t.narrow) return;
  C all = sides[0];
  for (int64_t l = 1; l < kSide; ++l) all = max(all, sides[l]);
  set(sides, all);
}
template <typename C>
FASTVAE_INLINE void sum_together(const Tile &t, C (&sides)[kSide]) {
  if (t.narrow) return;
  C all = 0;
  for (int64_t l = 0; l < kSide; ++l) all += sides[l];
  set(sides, all);
}

// Exactly 0 for an impossible class, where exp alone stops at 1e-38.
FASTVAE_INLINE float exp_or_zero(float x) {
  const float e = exp(x);
  return x < -87.0f ? 0.0f : e;
}
FASTVAE_INLINE double exp_or_zero(double x) { return std::exp(x); }

// Subtracts the largest of each row. A row of NaN, or of nothing but impossible classes, becomes NaN.
template <typename C>
__attribute__((noinline)) void shift(const Tile &t, C *x) {
  C top[kSide];
  set(top, -C(INFINITY));
  for (int64_t j = 0; j < t.steps; ++j) {
#pragma omp simd
    for (int64_t l = 0; l < kSide; ++l) top[l] = top[l] < x[j * kSide + l] ? x[j * kSide + l] : top[l];
  }
  largest_together(t, top);
  for (int64_t j = 0; j < t.steps; ++j) {
#pragma omp simd
    for (int64_t l = 0; l < kSide; ++l) x[j * kSide + l] -= top[l];
  }
}

// With e = exp(shifted), the unnormalized probabilities: total = sum e, mean = sum e (shifted - prior) / total. The
// divergence is mean - log(total), plus log(classes) for a uniform prior: that is added last, so as not to be rounded
// with each class.
template <typename C>
__attribute__((noinline)) void divergence(const Tile &t, const C *shifted, const C *prior, C (&total)[kSide],
                                          C (&mean)[kSide]) {
  set(total, C(0)), set(mean, C(0));
  for (int64_t j = 0; j < t.steps; ++j) {
#pragma omp simd
    for (int64_t l = 0; l < kSide; ++l) {
      const C d = shifted[j * kSide + l], e = exp_or_zero(d), term = e * (d - prior[j * kSide + l]);
      total[l] += e;
      mean[l] += e > C(0) ? term : C(0);
    }
  }
  sum_together(t, total), sum_together(t, mean);
  for (int64_t l = 0; l < kSide; ++l) mean[l] /= total[l];
}

// The prior's log-probabilities of the rows from `row` on, 0 for a uniform one.
template <typename C>
__attribute__((noinline)) void load_prior(const Categorical &q, const Tile &t, int64_t row, C *to) {
  if (q.prior_rows > 0) {
    const int64_t stride = q.prior_rows == 1 ? 0 : q.classes;
    load_tile(t, static_cast<const C *>(q.log_prior) + row * stride, stride, C(0), to);
  } else {
    for (int64_t i = 0; i < t.size(); ++i) to[i] = C(0);
  }
}

template <typename C>
__attribute__((noinline)) void soften(const Tile &t, const C *shifted, const float *noise, C slope, C *y) {
  load_tile(t, noise, t.classes, C(0), y);
#pragma omp simd
  for (int64_t i = 0; i < t.size(); ++i) y[i] += shifted[i];
  shift(t, y);
  C sum[kSide];
  set(sum, C(0));
  for (int64_t j = 0; j < t.steps; ++j) {
#pragma omp simd
    for (int64_t l = 0; l < kSide; ++l) {
      const C e = exp_or_zero(y[j * kSide + l] * slope);
      y[j * kSide + l] = e;
      sum[l] += e;
    }
  }
  sum_together(t, sum);
  for (int64_t l = 0; l < kSide; ++l) sum[l] = C(1) / sum[l];
  for (int64_t j = 0; j < t.steps; ++j) {
#pragma omp simd
    for (int64_t l = 0; l < kSide; ++l) y[j * kSide + l] *= sum[l];
  }
}

// Writes the one-hot vectors of the largest scores, the first of equal ones; NaN rows stay NaN.
template <typename T, typename C>
__attribute__((noinline)) void harden(const Tile &t, const C *shifted, const float *noise, C *scores, T *to) {
  load_tile(t, noise, t.classes, C(0), scores);
  C top[kSide], sum[kSide];
  int32_t step[kSide];
  set(top, -C(INFINITY)), set(sum, C(0)), set(step, 0);
  for (int64_t j = 0; j < t.steps; ++j) {
#pragma omp simd
    for (int64_t l = 0; l < kSide; ++l) {
      const C score = scores[j * kSide + l] + shifted[j * kSide + l];
      const bool larger = score > top[l];
      step[l] = larger ? int32_t(j) : step[l];
      top[l] = larger ? score : top[l];
      sum[l] += score;  // NaN if one is
    }
  }
  sum_together(t, sum);
  if (!t.narrow) {
    int64_t best = 0;
    for (int64_t l = 1; l < kSide; ++l) {
      const bool earlier = top[l] == top[best] && step[l] < step[best];
      if (top[l] > top[best] || earlier) best = l;
    }
    step[0] = int32_t(step[best] * kSide + best);
  }
  for (int64_t l = 0; l < t.rows; ++l, to += t.classes) {
    const float rest = sum[l] == sum[l] ? 0.0f : float(sum[l]);
#pragma omp simd
    for (int64_t k = 0; k < t.classes; ++k) store(to[k], rest);
    store(to[step[l]], rest + 1.0f);
  }
}

// Blocks of whole tiles, about as large as the noise is made at a time.
struct Blocks {
  bool narrow;
  int64_t rows, classes, tile_rows, block_rows, capacity;
  Blocks(int64_t rows, int64_t classes)
      : narrow(classes <= kNarrow),
        rows(rows),
        classes(classes),
        tile_rows(narrow ? kSide : 1),
        block_rows(narrow ? kSide * (kNoiseBlock / (kSide * classes)) : 1),
        capacity(max(kNoiseBlock, (classes + kSide - 1) / kSide * kSide) + kPadding) {}
  int64_t count() const { return (rows + block_rows - 1) / block_rows; }
  Tile tile(int64_t row) const {
    return {narrow, min(tile_rows, rows - row), classes, narrow ? classes : (classes + kSide - 1) / kSide};
  }
};

// As normal_block, of any count; `out` has room for 8 more.
FASTVAE_INLINE const float *gumbels(uint64_t seed, uint64_t first, int64_t count, float *out) {
  for (int64_t done = 0; done < count; done += kNoiseBlock) {
    gumbel_block(seed, first + done, min(kNoiseBlock, count - done), out + done);
  }
  return out + first % 4;
}

template <typename T>
void forward(const Categorical &q, const CategoricalOutputs &out) {
  using C = typename ComputeType<T>::type;
  const T *logits = static_cast<const T *>(q.logits);
  const Blocks blocks(q.rows, q.classes);
  const int64_t size = q.rows * q.classes;
  const C constant = q.prior_rows == 0 ? log(C(q.classes)) : C(0);
  const int threads = int(min<int64_t>(threads_for(size * max<int64_t>(q.samples, 1), kGrain), q.workspaces));

#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < blocks.count(); ++block) {
    C *const shifted = static_cast<C *>(q.memory) + thread_index() * kScratch * blocks.capacity;
    C *const scratch = shifted + blocks.capacity;
    float *const noise_buffer = reinterpret_cast<float *>(scratch + blocks.capacity);
    const int64_t begin = block * blocks.block_rows, end = min(begin + blocks.block_rows, q.rows);

    for (int64_t row = begin; row < end; row += blocks.tile_rows) {
      const Tile t = blocks.tile(row);
      C *const here = shifted + (row - begin) * q.classes;
      load_tile(t, logits + row * q.classes, q.classes, -C(INFINITY), here);
      shift(t, here);
      load_prior(q, t, row, scratch);
      C total[kSide], mean[kSide];
      divergence(t, here, scratch, total, mean);
      C *const kl = static_cast<C *>(out.kl) + row;
      for (int64_t l = 0; l < kSide; ++l) total[l] = mean[l] + (constant - log(total[l]));
      for (int64_t l = 0; l < t.rows; ++l) kl[l] = total[l];
    }

    for (int64_t s = 0; s < q.samples; ++s) {
      const int64_t first = s * size + begin * q.classes;
      const float *noise = gumbels(uint64_t(*q.seed), uint64_t(first), (end - begin) * q.classes, noise_buffer);
      for (int64_t row = begin; row < end; row += blocks.tile_rows) {
        const Tile t = blocks.tile(row);
        const int64_t at = (row - begin) * q.classes;
        T *const to = static_cast<T *>(out.sample) + first + at;
        if (q.hard) {
          harden(t, shifted + at, noise + at, scratch, to);
        } else {
          soften(t, shifted + at, noise + at, C(q.slope), scratch);
          store_tile(t, scratch, to);
        }
      }
    }
  }
}

template <typename T>
void backward(const Categorical &q, const CategoricalGradients &grad) {
  using C = typename ComputeType<T>::type;
  const T *logits = static_cast<const T *>(q.logits), *grad_sample = static_cast<const T *>(grad.grad_sample);
  const T *sample = static_cast<const T *>(grad.sample);
  const C *grad_kl = static_cast<const C *>(grad.grad_kl);
  const Blocks blocks(q.rows, q.classes);
  const int64_t size = q.rows * q.classes;
  const bool again = grad_sample && !sample;
  const int threads = int(min<int64_t>(threads_for(size * max<int64_t>(q.samples, 1), kGrain), q.workspaces));

#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < blocks.count(); ++block) {
    C *const shifted = static_cast<C *>(q.memory) + thread_index() * kScratch * blocks.capacity;
    C *const sums = shifted + blocks.capacity, *const y = sums + blocks.capacity, *const dy = y + blocks.capacity;
    C *const prior = dy + blocks.capacity;
    float *const noise_buffer = reinterpret_cast<float *>(prior + blocks.capacity);
    const int64_t begin = block * blocks.block_rows, end = min(begin + blocks.block_rows, q.rows);

    for (int64_t row = begin; row < end; row += blocks.tile_rows) {
      const Tile t = blocks.tile(row);
      const int64_t at = (row - begin) * q.classes;
      C *const d = shifted + at, *const to = sums + at;
      if (grad_kl || again) {
        load_tile(t, logits + row * q.classes, q.classes, -C(INFINITY), d);
        shift(t, d);
      }
      if (!grad_kl) {
        for (int64_t i = 0; i < t.size(); ++i) to[i] = C(0);
        continue;
      }
      load_prior(q, t, row, prior);
      C total[kSide], mean[kSide], weight[kSide];
      divergence(t, d, prior, total, mean);
      for (int64_t l = 0; l < kSide; ++l) {
        const C upstream = !t.narrow ? grad_kl[row] : l < t.rows ? grad_kl[row + l] : C(0);
        weight[l] = upstream / total[l];
      }
      for (int64_t j = 0; j < t.steps; ++j) {
#pragma omp simd
        for (int64_t l = 0; l < kSide; ++l) {
          const int64_t i = j * kSide + l;
          const C e = exp_or_zero(d[i]), pull = weight[l] * e, ratio = d[i] - prior[i],
                  slope = pull * (ratio - mean[l]);
          to[i] = e == C(0) ? C(0) : slope;
          y[i] = e == C(0) ? C(0) : -pull;
        }
      }
      if (q.prior_rows == 0) continue;
      C *grad_prior = static_cast<C *>(grad.grad_prior);
      if (q.prior_rows != 1) {
        store_tile(t, y, grad_prior + row * q.classes);
        continue;
      }
      grad_prior += thread_index() * q.classes;
      for (int64_t k = 0; k < q.classes; ++k) {
        C sum = t.narrow ? C(0) : y[k];
        for (int64_t l = 0; t.narrow && l < kSide; ++l) sum += y[k * kSide + l];
        grad_prior[k] += sum;
      }
    }

    for (int64_t s = 0; grad_sample && s < q.samples; ++s) {
      const int64_t first = s * size + begin * q.classes;
      const float *noise = noise_buffer;
      if (again) noise = gumbels(uint64_t(*q.seed), uint64_t(first), (end - begin) * q.classes, noise_buffer);
      for (int64_t row = begin; row < end; row += blocks.tile_rows) {
        const Tile t = blocks.tile(row);
        const int64_t at = (row - begin) * q.classes;
        if (again) {
          soften(t, shifted + at, noise + at, C(q.slope), y);
        } else {
          load_tile(t, sample + first + at, q.classes, C(0), y);
        }
        load_tile(t, grad_sample + first + at, q.classes, C(0), dy);
        C dot[kSide];
        set(dot, C(0));
        for (int64_t j = 0; j < t.steps; ++j) {
#pragma omp simd
          for (int64_t l = 0; l < kSide; ++l) dot[l] += y[j * kSide + l] * dy[j * kSide + l];
        }
        sum_together(t, dot);
        C *const to = sums + at;
        for (int64_t j = 0; j < t.steps; ++j) {
#pragma omp simd
          for (int64_t l = 0; l < kSide; ++l) {
            to[j * kSide + l] += C(q.slope) * (y[j * kSide + l] * (dy[j * kSide + l] - dot[l]));
          }
        }
      }
    }
    for (int64_t row = begin; row < end; row += blocks.tile_rows) {
      const int64_t at = (row - begin) * q.classes;
      store_tile(blocks.tile(row), sums + at, static_cast<T *>(grad.grad_logits) + row * q.classes);
    }
  }
}

}  // namespace

int64_t categorical_workspace(DType dtype, int64_t classes) {
  return kScratch * Blocks(0, classes).capacity * (dtype == DType::kFloat64 ? 8 : 4);
}

void categorical_forward(const Categorical &q, const CategoricalOutputs &out) {
  switch (q.dtype) {
    case DType::kFloat32: return forward<float>(q, out);
    case DType::kFloat64: return forward<double>(q, out);
    case DType::kBFloat16: return forward<BFloat16>(q, out);
    case DType::kFloat16: return forward<Float16>(q, out);
  }
}

void categorical_backward(const Categorical &q, const CategoricalGradients &grad) {
  switch (q.dtype) {
    case DType::kFloat32: return backward<float>(q, grad);
    case DType::kFloat64: return backward<double>(q, grad);
    case DType::kBFloat16: return backward<BFloat16>(q, grad);
    case DType::kFloat16: return backward<Float16>(q, grad);
  }
}

}  // namespace fastvae::FASTVAE_ISA
