// Corruption of denoising auto-encoders (fastvae/ops/corruption.py holds the definition).
//
// Bytes: one number read and one written per element. Work: a quarter of a Philox counter and a comparison, about 0.6
// ns of a core with AVX-512, or a normal number, 1 ns: two cores are near the limit of memory. Eager draws its noise
// with one thread and makes four passes.
#include "philox.h"

namespace fastvae::FASTVAE_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread should get at least: some 10 us of work

template <typename T>
void corrupt_elements(const Corruption &c, const T *x, uint64_t first, int64_t count, T *out) {
  using C = typename ComputeType<T>::type;
  alignas(64) float buffer[kNoiseBlock + 8];
  const uint64_t seed = uint64_t(*c.seed);
  if (c.noise == kGaussianNoise) {
    const float *noise = normal_block(seed, first, count, buffer);
    const C level = C(c.level);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(out[i], load(x[i]) + level * C(noise[i]));
    return;
  }
  const float *uniform = uniform_block(seed, first, count, buffer), level = float(c.level);
  if (c.noise == kMasking) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(out[i], uniform[i] < level ? C(0) : C(load(x[i])));
    return;
  }
  const float half = float(c.level / 2);
  const C low = C(c.low), high = C(c.high);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    store(out[i], uniform[i] < half ? low : uniform[i] < level ? high : C(load(x[i])));
  }
}

template <typename T>
void corrupt_matrix(const Corruption &c) {
  // A dense matrix is one row of all its elements.
  const bool dense = c.columns == c.stride;
  const int64_t rows = dense ? 1 : c.rows, columns = dense ? c.rows * c.columns : c.columns;
  const int64_t pieces = (columns + kNoiseBlock - 1) / kNoiseBlock;
  const int threads = threads_for(rows * columns, kGrain);

#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < rows * pieces; ++block) {
    const int64_t row = block / pieces, column = block % pieces * kNoiseBlock, from = row * c.stride + column;
    corrupt_elements(c, static_cast<const T *>(c.x) + from, uint64_t(c.first + from),
                     min(kNoiseBlock, columns - column), static_cast<T *>(c.out) + row * columns + column);
  }
}

}  // namespace

void corrupt(const Corruption &c) {
  switch (c.dtype) {
    case DType::kFloat32: return corrupt_matrix<float>(c);
    case DType::kFloat64: return corrupt_matrix<double>(c);
    case DType::kBFloat16: return corrupt_matrix<BFloat16>(c);
    case DType::kFloat16: return corrupt_matrix<Float16>(c);
  }
}

}  // namespace fastvae::FASTVAE_ISA
