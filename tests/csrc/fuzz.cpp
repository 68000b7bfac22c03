// Calls every entry point of the kernel table (csrc/kernels.h) with random sizes, odd and zero ones first, on every
// instruction set of the machine with one to four threads. Meant for builds with a sanitizer: every buffer is on the
// heap and exactly as long as the entry point may assume.
//
//   fuzz [--cases N] [--seconds S] [--seed N] [--entry NAME] [--isa NAME]
//
// The cases of a seed are always the same. Besides what a sanitizer finds: outputs must be written whole, finite for
// ordinary inputs, alike on all instruction sets, and the same bits for any number of threads where that is promised.
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "openmp.h"

namespace fastvae {

namespace baseline {
extern const Kernels table;
}
#ifdef FASTVAE_HAS_avx2
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

// A new entry point needs a case here.
static_assert(sizeof(Kernels) == 38 * sizeof(void *), "an entry point that is not fuzzed");

// ------------------------------------------------------------------------------------------- the case at hand
std::string current;  // what to do to see this case alone, and its sizes
std::string where;    // instruction set and threads

void tell_case() { std::fprintf(stderr, "\nfailing case: %s%s\n", current.c_str(), where.c_str()); }

__attribute__((format(printf, 1, 2))) std::string text(const char *format, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  return line;
}

[[noreturn]] void fail(const std::string &what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::abort();
}

// splitmix64 (Steele, Lea, Flood 2014): std's distributions differ between libraries.
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t x = state += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }
  int64_t below(int64_t limit) { return int64_t(next() % uint64_t(limit)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool one_in(int64_t n) { return below(n) == 0; }
  double real(double low, double high) { return low + (high - low) * (double(next() >> 11) * 0x1p-53); }
  // Up to `limit`: around the widths of vectors and tiles, or anything.
  int64_t size(int64_t limit) {
    static const int64_t edges[] = {0, 1, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257};
    const int64_t edge = edges[below(sizeof edges / sizeof *edges)];
    return edge <= limit && !one_in(3) ? edge : between(0, limit);
  }
};

// ------------------------------------------------------------------------------------------------------ arrays
enum Kind { kF32, kF64, kBF16, kF16, kI64, kI8 };  // the first four as DType
constexpr int64_t kBytes[] = {4, 8, 2, 2, 8, 1};
// Not what arithmetic gives: NaN with a payload, an unlikely integer.
constexpr uint64_t kPoison[] = {0x7FFBAD5A, 0x7FFFBAD5BAD5BAD5, 0x7FEB, 0x7FAB, 0x5BAD5BAD5BAD5BAD, 0x5A};

// On the heap, exactly `count` long, poisoned; null when empty, as tensors are.
class Array {
 public:
  Array(Kind kind, int64_t count) : kind(kind), count(count) {
    if (count == 0) return;
    // With an odd number of elements before it, aligned no better than its type is.
    const int64_t before = kBytes[kind] * (count % 2);
    memory.reset(static_cast<char *>(std::malloc(size_t(before + bytes()))));
    data = memory.get() + before;
    for (int64_t i = 0; i < count; ++i) std::memcpy(data + i * kBytes[kind], &kPoison[kind], size_t(kBytes[kind]));
  }
  Array copy() const { return first(count); }
  Array first(int64_t n) const {
    Array to(kind, n);
    if (n > 0) std::memcpy(to.data, data, size_t(n * kBytes[kind]));
    return to;
  }
  operator void *() const { return data; }
  int64_t *integers() const { return reinterpret_cast<int64_t *>(data); }
  int64_t bytes() const { return count * kBytes[kind]; }
  bool poisoned(int64_t i) const { return std::memcmp(data + i * kBytes[kind], &kPoison[kind], kBytes[kind]) == 0; }

  double get(int64_t i) const {
    switch (kind) {
      case kF32: return at<float>(i);
      case kF64: return at<double>(i);
      case kBF16: return from_half(at<uint16_t>(i), 8);
      case kF16: return from_half(at<uint16_t>(i), 5);
      case kI64: return double(at<int64_t>(i));
      case kI8: return at<int8_t>(i);
    }
    return 0;
  }
  void set(int64_t i, double value) {
    switch (kind) {
      case kF32: at<float>(i) = float(value); break;
      case kF64: at<double>(i) = value; break;
      case kBF16: at<uint16_t>(i) = to_half(value, 8); break;
      case kF16: at<uint16_t>(i) = to_half(value, 5); break;
      case kI64: at<int64_t>(i) = int64_t(value); break;
      case kI8: at<int8_t>(i) = int8_t(value); break;
    }
  }

  Kind kind;
  int64_t count;

 private:
  template <typename T>
  T &at(int64_t i) const {
    return reinterpret_cast<T *>(data)[i];
  }
  // A 16-bit float with so many exponent bits; numbers are cut, not rounded, on the way there.
  static double from_half(uint16_t bits, int exponent_bits) {
    const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = (bits & 0x7FFF) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
    double value = std::ldexp(double(mantissa) + (exponent ? 1 << mantissa_bits : 0),
                              (exponent ? exponent : 1) - bias - mantissa_bits);
    if (exponent == (1 << exponent_bits) - 1) value = mantissa ? std::nan("") : HUGE_VAL;
    return bits & 0x8000 ? -value : value;
  }
  static uint16_t to_half(double value, int exponent_bits) {
    const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0, top = uint16_t(((1 << exponent_bits) - 1) << mantissa_bits);
    if (std::isnan(value)) return uint16_t(top | (1 << (mantissa_bits - 1)));
    value = std::fabs(value);
    if (value == 0) return sign;
    if (std::isinf(value)) return uint16_t(sign | top);
    const int exponent = std::ilogb(value) + bias;
    if (exponent >= (1 << exponent_bits) - 1) return uint16_t(sign | top);
    const int shift = (exponent > 0 ? exponent : 1) - bias - mantissa_bits;
    const int digits = int(std::ldexp(value, -shift));
    return uint16_t(sign | (exponent > 0 ? (exponent << mantissa_bits) + digits - (1 << mantissa_bits) : digits));
  }

  struct Free {
    void operator()(char *p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory;
  char *data = nullptr;
};

Array zeros(Kind kind, int64_t count) {
  Array to(kind, count);
  for (int64_t i = 0; i < count; ++i) to.set(i, 0);
  return to;
}

// --------------------------------------------------------------------------------------------- running a case
struct Result {
  const char *name;
  Array values;
  bool same_bits;  // for any number of threads
  double
      tolerance;  // of the difference between instruction sets, relative to the largest value; negative: not compared
};
using Results = std::vector<Result>;

struct Case {
  Random random;
  bool wild;             // infinities, NaN, numbers without measure among the inputs
  std::string only_isa;  // or empty, for all

  Case(uint64_t seed, const std::string &isa) : random{seed}, wild(random.one_in(5)), only_isa(isa) {}

  Array reals(Kind kind, int64_t count, double low, double high) {
    static const double odd[] = {HUGE_VAL, -HUGE_VAL, 1e30, -1e30, 1e-42, -0.0, 88.5, -104, std::nan("")};
    Array to(kind, count);
    for (int64_t i = 0; i < count; ++i) {
      to.set(i, wild && random.one_in(40) ? odd[random.below(sizeof odd / sizeof *odd)] : random.real(low, high));
    }
    return to;
  }
  Array integers(int64_t count, int64_t low, int64_t high) {
    Array to(kI64, count);
    for (int64_t i = 0; i < count; ++i) to.integers()[i] = random.between(low, high);
    return to;
  }
  Array seed() {
    Array to(kI64, 1);
    to.integers()[0] = int64_t(random.next());
    return to;
  }
  Kind float_or_double() { return random.one_in(2) ? kF32 : kF64; }

  // Tells the sizes, whose names are the words of `names`.
  template <typename... Sizes>
  void describe(const char *names, Sizes... sizes) {
    for (const double size : {double(sizes)...}) {
      const int length = int(std::strcspn(names, " "));
      current += text(" %.*s %g", length, names, size);
      names += length + (names[length] == ' ');
    }
    if (wild) current += " wild";
  }
  // Calls `call` on each instruction set, with one thread first, which the others must agree with.
  void run(const std::function<void(const Kernels &, int threads, Results &)> &call);
};

void check_values(const Result &result, bool wild) {
  for (int64_t i = 0; i < result.values.count; ++i) {
    if (result.values.poisoned(i)) fail(text("%s[%lld] was not written", result.name, (long long)i));
    if (!wild && !std::isfinite(result.values.get(i))) {
      fail(text("%s[%lld] is %g", result.name, (long long)i, result.values.get(i)));
    }
  }
}

void compare(const Result &result, const Result &expected, double tolerance, const char *with) {
  if (result.values.count != expected.values.count) fail(text("%s: not as long %s", result.name, with));
  double largest = 1;
  for (int64_t i = 0; i < expected.values.count; ++i) largest = std::fmax(largest, std::fabs(expected.values.get(i)));
  for (int64_t i = 0; i < result.values.count; ++i) {
    const double a = result.values.get(i), b = expected.values.get(i);
    if (!(a == b || (std::isnan(a) && std::isnan(b)) || std::fabs(a - b) <= tolerance * largest)) {
      fail(text("%s[%lld] is %.9g, and %.9g %s", result.name, (long long)i, a, b, with));
    }
  }
}

void Case::run(const std::function<void(const Kernels &, int, Results &)> &call) {
  std::vector<const Kernels *> tables = {&baseline::table};
#ifdef FASTVAE_HAS_avx2
  tables = {&baseline::table, &avx2::table, &avx512::table};
#endif
  Results reference;
  for (const char *const *name = supported_isas(); *name; ++name) {
    const Kernels &table = *tables[size_t(name - supported_isas())];
    if (!only_isa.empty() && only_isa != *name) continue;
    Results alone;
    for (int turn = 0; turn < 3; ++turn) {
      const int threads = turn == 0 ? 1 : int(random.between(2, 4));
      const int granted = random.one_in(4) ? int(random.between(1, threads)) : threads;
      where = text(", isa %s, threads %d of %d", *name, granted, threads);
      set_threads(threads, granted);
      Results results;
      call(table, threads, results);
      for (size_t i = 0; i < results.size(); ++i) {
        check_values(results[i], wild);
        const double loose = results[i].values.kind == kF64 ? 1e-9 : 1e-4;
        if (turn > 0) compare(results[i], alone[i], alone[i].same_bits ? 0 : loose, "with one thread");
        if (turn == 0 && !reference.empty() && !wild && results[i].tolerance >= 0) {
          compare(results[i], reference[i], results[i].tolerance, "on the first instruction set");
        }
      }
      if (turn == 0) alone = std::move(results);
    }
    if (reference.empty()) reference = std::move(alone);
  }
}

// Rounding to the type, and of sums.
double tolerance_of(Kind kind) { return kind == kF64 ? 1e-9 : kind == kBF16 ? 2e-2 : kind == kF16 ? 4e-3 : 2e-4; }

// ------------------------------------------------------------------------------------------------ entry points
void fuzz_gaussian(Case &c) {
  Random &r = c.random;
  const Kind kind = Kind(r.below(4)), compute = kind == kF64 ? kF64 : kF32;
  const bool large = r.one_in(3);  // enough for four threads
  const int64_t latent = large && r.one_in(3) ? r.between(1000, 2600) : r.size(130);
  const int64_t rows = large && latent > 0 ? r.between(8192, 40000) / latent : r.size(70);
  const int64_t samples = r.below(large ? 2 : 4), size = rows * latent;
  const int prior = int(r.below(3));
  const int64_t prior_rows = prior == 0 ? 0 : prior == 1 || rows == 1 ? 1 : rows;
  const bool sum_latent = r.one_in(2), has_grad_z = !r.one_in(4), has_grad_kl = !r.one_in(4);
  const int64_t stride = latent + (r.one_in(2) ? r.between(1, 9) : 0), grad_stride = latent + (r.one_in(2) ? 3 : 0);
  c.describe("dtype samples rows latent prior_rows sum stride", kind, samples, rows, latent, prior_rows, sum_latent,
             stride);
  const int64_t apart = rows > 0 ? (rows - 1) * stride + latent : 0;
  const int64_t grads_apart = rows > 0 ? (rows - 1) * grad_stride + latent : 0;
  const Array mean = c.reals(kind, apart, -3, 3), log_var = c.reals(kind, apart, -4, 2), seed = c.seed();
  const Array prior_mean = c.reals(compute, prior_rows * latent, -2, 2);
  const Array prior_log_var = c.reals(compute, prior_rows * latent, -2, 2);
  const int64_t kl_size = sum_latent ? rows : size;
  const Array grad_z = c.reals(kind, has_grad_z ? samples * size : 0, -1, 1);
  const Array grad_kl = c.reals(compute, has_grad_kl ? kl_size : 0, -1, 1);
  const Gaussian g{DType(kind),     mean,    log_var, stride, prior_mean, prior_log_var, prior_rows,
                   seed.integers(), samples, rows,    latent, sum_latent};
  // The noise is float32, a few units of which may differ.
  const double tolerance = std::fmax(tolerance_of(kind), 1e-4);
  c.run([&](const Kernels &k, int threads, Results &results) {
    Array z(kind, samples * size), kl(compute, kl_size);
    k.gaussian_forward(g, {z, kl});
    const int64_t partials = prior_rows == 1 ? threads : prior_rows;
    // What lies between rows is no output.
    Array grad_mean = zeros(kind, grads_apart), grad_log_var = zeros(kind, grads_apart);
    if (grad_stride == latent) grad_mean = Array(kind, size), grad_log_var = Array(kind, size);
    Array grad_prior = zeros(compute, 2 * partials * latent);
    k.gaussian_backward(g, {grad_z, grad_kl, grad_mean, grad_log_var, grad_stride, grad_prior, partials});
    Array sums = zeros(compute, 2 * prior_rows * latent);
    for (int64_t half = 0; half < 2 * (prior_rows > 0); ++half) {
      for (int64_t i = 0; i < partials * latent; ++i) {
        const int64_t to = half * prior_rows * latent + i % (prior_rows * latent);
        sums.set(to, sums.get(to) + grad_prior.get(half * partials * latent + i));
      }
    }
    results.push_back({"z", std::move(z), true, tolerance});
    results.push_back({"kl", std::move(kl), true, tolerance});
    results.push_back({"grad_mean", std::move(grad_mean), true, tolerance});
    results.push_back({"grad_log_var", std::move(grad_log_var), true, tolerance});
    // A prior shared by all rows has one partial sum a thread.
    results.push_back({"grad_prior", std::move(sums), prior_rows != 1, prior_rows == 1 ? 1e-3 : tolerance});
  });
}

void fuzz_likelihood(Case &c) {
  Random &r = c.random;
  const Kind kind = Kind(r.below(4)), compute = kind == kF64 ? kF64 : kF32, target_kind = r.one_in(2) ? kind : compute;
  const Density density = Density(r.below(4));
  const bool large = r.one_in(3);  // enough for four threads
  const int64_t features = large && r.one_in(3) ? r.between(1000, 3000) : r.size(130), samples = r.below(4);
  const int64_t targets = large && features > 0 ? r.between(8192, 40000) / features : r.size(70);
  const int64_t rows = samples * targets, size = rows * features;
  const bool number = density == kGaussianNumber, row = density == kGaussianRow, full = density == kGaussianFull;
  const bool need_target = r.one_in(2), need_prediction = !r.one_in(4),
             need_log_var = density != kBernoulli && r.one_in(2);
  const int64_t log_vars = number ? 1 : row ? features : full ? size : 0, partials = r.between(1, 7);
  c.describe("dtype target density samples targets features partials", kind, target_kind, density, samples, targets,
             features, partials);
  const Array prediction = c.reals(kind, size, -5, 5), target = c.reals(target_kind, targets * features, 0, 1);
  const Array log_var = c.reals(full ? kind : compute, log_vars, -3, 3), grad = c.reals(compute, rows, -1, 1);
  const double tolerance = tolerance_of(kind) * (kind == kBF16 || kind == kF16 ? 1 : 10);
  c.run([&](const Kernels &k, int, Results &results) {
    const Array memory(compute, number || row ? features > kLikelihoodBlock ? features : kLikelihoodBlock : 0);
    const Likelihood p{density, DType(kind), DType(target_kind), prediction, target, log_var,
                       samples, targets,     features,           memory};
    Array nll(compute, rows);
    const bool possible = k.likelihood_forward(p, nll);
    if (!possible && !c.wild) fail("targets in [0, 1] are refused");
    Array grad_prediction(kind, need_prediction ? size : 0), grad_log_var(log_var.kind, need_log_var ? log_vars : 0);
    Array grad_target(target_kind, need_target ? targets * features : 0);
    const Array partial(number ? kF64 : compute, !need_log_var ? 0 : number ? rows : row ? partials * features : 0);
    k.likelihood_backward(p, {grad, grad_prediction, grad_target, grad_log_var, partial, partials});
    results.push_back({"nll", std::move(nll), true, 1e-5});
    results.push_back({"grad_prediction", std::move(grad_prediction), true, tolerance});
    results.push_back({"grad_target", std::move(grad_target), true, tolerance});
    results.push_back({"grad_log_var", std::move(grad_log_var), true, full ? tolerance : 1e-3});
  });
}

void fuzz_full_gaussian(Case &c) {
  Random &r = c.random;
  const Kind kind = Kind(r.below(4)), compute = kind == kF64 ? kF64 : kF32;
  const bool large = r.one_in(3);  // enough for four threads
  const int64_t latent = r.one_in(40) ? r.between(1000, 1024) : r.size(large ? 200 : 40),
                below = latent * (latent - 1) / 2;
  const int64_t rows = large && latent > 0 ? 1 + r.between(30'000, 120'000) / (latent * latent) : r.size(20);
  const int64_t samples = r.below(large ? 3 : 5), size = rows * latent;
  const bool has_grad_z = !r.one_in(4), has_grad_kl = !r.one_in(4);
  c.describe("dtype samples rows latent grad_z grad_kl", kind, samples, rows, latent, has_grad_z, has_grad_kl);
  const double bound = 1 / std::sqrt(double(latent) + 1);
  const Array mean = c.reals(kind, size, -3, 3), log_diagonal = c.reals(kind, size, -2, 1), seed = c.seed();
  const Array lower = c.reals(kind, rows * below, -bound, bound);
  const Array grad_z = c.reals(kind, has_grad_z ? samples * size : 0, -1, 1);
  const Array grad_kl = c.reals(compute, has_grad_kl ? rows : 0, -1, 1);
  const FullGaussian g{DType(kind), mean, log_diagonal, lower, seed.integers(), samples, rows, latent};
  // The noise is float32, a few units of which may differ.
  const double tolerance = std::fmax(tolerance_of(kind), 1e-4);
  c.run([&](const Kernels &k, int, Results &results) {
    Array z(kind, samples * size), kl(compute, rows);
    k.full_gaussian_forward(g, {z, kl});
    Array grad_mean(kind, size), grad_log_diagonal(kind, size), grad_lower(kind, rows * below);
    k.full_gaussian_backward(g, {grad_z, grad_kl, grad_mean, grad_log_diagonal, grad_lower});
    results.push_back({"z", std::move(z), true, tolerance});
    results.push_back({"kl", std::move(kl), true, tolerance});
    results.push_back({"grad_mean", std::move(grad_mean), true, tolerance});
    results.push_back({"grad_log_diagonal", std::move(grad_log_diagonal), true, tolerance});
    results.push_back({"grad_lower", std::move(grad_lower), true, tolerance});
  });
}

void fuzz_log_ratio(Case &c) {
  Random &r = c.random;
  const Kind kind = Kind(r.below(4)), compute = kind == kF64 ? kF64 : kF32;
  const bool large = r.one_in(3);  // enough for four threads
  const int64_t latent = large && r.one_in(3) ? r.between(1000, 2600) : r.size(130);
  const int64_t samples = r.below(6), rows = large && latent > 0 ? r.between(8192, 40000) / latent : r.size(70);
  const int64_t size = rows * latent;
  const bool has_grad_z = !r.one_in(4), has_grad_ratio = !r.one_in(4);
  c.describe("dtype samples rows latent grad_z grad_log_ratio", kind, samples, rows, latent, has_grad_z,
             has_grad_ratio);
  const Array mean = c.reals(kind, size, -3, 3), log_var = c.reals(kind, size, -4, 2), seed = c.seed();
  const Array grad_z = c.reals(kind, has_grad_z ? samples * size : 0, -1, 1);
  const Array grad_log_ratio = c.reals(compute, has_grad_ratio ? samples * rows : 0, -1, 1);
  const LogRatio g{DType(kind), mean, log_var, seed.integers(), samples, rows, latent};
  const double tolerance = std::fmax(tolerance_of(kind), 1e-4);
  c.run([&](const Kernels &k, int, Results &results) {
    Array z(kind, samples * size), log_ratio(compute, samples * rows);
    k.log_ratio_forward(g, {z, log_ratio});
    Array grad_mean(kind, size), grad_log_var(kind, size);
    k.log_ratio_backward(g, {grad_z, grad_log_ratio, grad_mean, grad_log_var});
    results.push_back({"z", std::move(z), true, tolerance});
    results.push_back({"log_ratio", std::move(log_ratio), true, tolerance});
    results.push_back({"grad_mean", std::move(grad_mean), true, tolerance});
    results.push_back({"grad_log_var", std::move(grad_log_var), true, tolerance});
  });
}

void fuzz_importance_bound(Case &c) {
  Random &r = c.random;
  const Kind kind = Kind(r.below(4)), compute = kind == kF64 ? kF64 : kF32;
  const bool large = r.one_in(3);  // enough for four threads
  const int64_t rows = large ? r.between(300, 900) : r.size(257), samples = 1 + (large ? 40 : r.size(70));
  c.describe("dtype samples rows", kind, samples, rows);
  const Array log_likelihood = c.reals(kind, samples * rows, -200, 0), log_ratio = c.reals(kind, samples * rows, -9, 9);
  const Array grad_bound = c.reals(compute, rows, -1, 1);
  const ImportanceBound p{DType(kind), log_likelihood, log_ratio, samples, rows};
  c.run([&](const Kernels &k, int, Results &results) {
    Array bound(compute, rows), grad(kind, samples * rows);
    k.importance_bound_forward(p, bound);
    k.importance_bound_backward(p, grad_bound, grad);
    results.push_back({"bound", std::move(bound), true, tolerance_of(compute)});
    results.push_back({"grad", std::move(grad), true, tolerance_of(kind)});
  });
}

void fuzz_categorical(Case &c) {
  Random &r = c.random;
  const Kind kind = Kind(r.below(4)), compute = kind == kF64 ? kF64 : kF32;
  const bool large = r.one_in(3);  // enough for four threads
  const int64_t classes = large && r.one_in(3) ? r.between(1000, 2600) : 1 + r.size(130);
  const int64_t rows = large ? r.between(8192, 40000) / classes : r.size(70);
  const int64_t samples = r.below(large ? 2 : 4), size = rows * classes;
  const int prior = int(r.below(3));
  const int64_t prior_rows = prior == 0 ? 0 : prior == 1 || rows == 1 ? 1 : rows;
  const bool hard = r.one_in(2), has_grad_sample = !r.one_in(4), has_grad_kl = !r.one_in(4);
  const double slope = c.wild && r.one_in(2) ? (r.one_in(2) ? 1e-37 : 3e38) : r.real(0.3, 3);
  c.describe("dtype samples rows classes prior_rows hard", kind, samples, rows, classes, prior_rows, hard);
  const Array logits = c.reals(kind, size, -3, 3), seed = c.seed();
  const Array log_prior = c.reals(compute, prior_rows * classes, -5, 0);
  const Array grad_sample = c.reals(kind, has_grad_sample ? samples * size : 0, -1, 1);
  const Array grad_kl = c.reals(compute, has_grad_kl ? rows : 0, -1, 1);
  // The noise is float32, a few units of which may differ.
  const double tolerance = std::fmax(tolerance_of(kind), 1e-4);
  c.run([&](const Kernels &k, int threads, Results &results) {
    const Array memory(kI8, threads * k.categorical_workspace(DType(kind), classes));
    Array sample(kind, samples * size), kl(compute, rows);
    const Categorical q{DType(kind), logits,  log_prior, prior_rows, seed.integers(), slope,
                        hard,        samples, rows,      classes,    memory,          threads};
    k.categorical_forward(q, {sample, kl});
    Array grad_logits(kind, size), grad_prior = zeros(compute, (prior_rows == 1 ? threads : prior_rows) * classes);
    void *const soft = hard ? nullptr : static_cast<void *>(sample);
    k.categorical_backward(q, {grad_sample, grad_kl, soft, grad_logits, grad_prior});
    Array sums = zeros(compute, prior_rows * classes);
    for (int64_t i = 0; i < grad_prior.count; ++i)
      sums.set(i % sums.count, sums.get(i % sums.count) + grad_prior.get(i));
    // Rounding may decide between classes: a hard sample is not compared between instruction sets.
    results.push_back({"sample", std::move(sample), true, hard ? -1 : tolerance});
    results.push_back({"kl", std::move(kl), true, tolerance});
    results.push_back({"grad_logits", std::move(grad_logits), true, tolerance});
    // A prior shared by all rows has one partial sum a thread.
    results.push_back({"grad_prior", std::move(sums), prior_rows != 1, prior_rows == 1 ? 1e-3 : tolerance});
  });
}

void fuzz_corrupt(Case &c) {
  Random &r = c.random;
  const Kind kind = Kind(r.below(4));
  const Noise noise = Noise(r.below(3));
  const bool large = r.one_in(3);  // enough for four threads
  const int64_t columns = large ? r.between(1, 2600) : r.size(130);
  const int64_t rows = large ? r.between(8192, 80000) / columns : r.size(70);
  const bool dense = r.one_in(2), in_place = dense && r.one_in(2);
  const int64_t stride = dense ? columns : columns + r.below(9);
  const int64_t first = r.one_in(4) ? (int64_t(1) << 34) - r.below(3000) : r.below(3000);
  c.describe("dtype noise rows columns stride first", kind, noise, rows, columns, stride, first);
  const Array x = c.reals(kind, rows > 0 ? (rows - 1) * stride + columns : 0, -3, 3), seed = c.seed();
  const double level = r.one_in(9) ? double(r.below(2)) : r.real(0, 1);
  c.run([&](const Kernels &k, int, Results &results) {
    Array out = in_place ? x.copy() : Array(kind, rows * columns);
    k.corrupt(
        {DType(kind), noise, level, -0.5, 2, seed.integers(), in_place ? out : x, rows, columns, stride, first, out});
    results.push_back({"out", std::move(out), true, noise == kGaussianNoise ? std::fmax(tolerance_of(kind), 1e-5) : 0});
  });
}

void fuzz_mixture(Case &c) {
  Random &r = c.random;
  const Kind kind = c.float_or_double();
  const int64_t latent = r.size(r.one_in(4) ? 130 : 40), large = r.one_in(4) ? 600 : 90;
  const int64_t rows = r.size(large), components = rows == 0 && r.one_in(2) ? 0 : 1 + r.size(large - 1);
  c.describe("dtype rows components latent", kind, rows, components, latent);
  const Array z = c.reals(kind, rows * latent, -3, 3), mean = c.reals(kind, components * latent, -3, 3);
  const Array log_var = c.reals(kind, components * latent, -2, 2), grad = c.reals(kind, rows, -1, 1);
  // The exponential of a log-density has the absolute rounding of that for a relative one.
  const double tolerance = kind == kF64 ? 1e-9 : 2e-3;
  c.run([&](const Kernels &k, int threads, Results &results) {
    Array log_density(kind, rows), grad_z(kind, rows * latent);
    Array grad_mean(kind, components * latent), grad_log_var(kind, components * latent);
    Mixture p{kind == kF64, z,       mean,    log_var, rows,    components, latent,
              log_density,  nullptr, nullptr, nullptr, nullptr, threads,    nullptr};
    const Array forward(kI8, k.mixture_workspace(p, false)), backward(kI8, k.mixture_workspace(p, true));
    p.memory = forward;
    k.mixture_forward(p);
    p.grad = grad, p.grad_z = grad_z, p.grad_mean = grad_mean, p.grad_log_var = grad_log_var, p.memory = backward;
    k.mixture_backward(p);
    results.push_back({"log_density", std::move(log_density), true, tolerance_of(kind)});
    results.push_back({"grad_z", std::move(grad_z), false, tolerance});
    results.push_back({"grad_mean", std::move(grad_mean), true, tolerance});
    results.push_back({"grad_log_var", std::move(grad_log_var), true, tolerance});
  });
}

void fuzz_mixture_prior(Case &c) {
  Random &r = c.random;
  const Kind kind = r.one_in(2) ? kF64 : kF32;
  const bool categorical = r.one_in(2);
  const int64_t batch = 1 + r.size(200), variables = 1 + r.size(12), components = 1 + r.size(9), latent = 1 + r.size(9);
  c.describe("dtype categorical batch variables components latent", kind, categorical, batch, variables, components,
             latent);
  const int64_t z = batch * variables * latent, q = batch * variables * components, p = variables * components * latent;
  const Array mean = c.reals(kind, z, -3, 3), log_var = c.reals(kind, categorical ? 0 : z, -4, 2);
  const Array logits = c.reals(kind, q, -3, 3), component_mean = c.reals(kind, categorical ? 0 : p, -2, 2);
  const Array component_log_var = c.reals(kind, p, -2, 2);
  const Array grad_kl = c.reals(kind, batch, -1, 1), grad_dispersion = c.reals(kind, batch, -1, 1);
  const Array grad_aggregate = c.reals(kind, variables, -1, 1), grad_information = c.reals(kind, variables, -1, 1);
  c.run([&](const Kernels &k, int threads, Results &results) {
    const Array memory(kind, threads * mixture_prior_workspace(components, latent));
    const MixturePrior mixture{
        kind == kF64, categorical, mean,       log_var, logits, component_mean, component_log_var,
        batch,        variables,   components, latent,  memory, threads};
    Array kl(kind, batch), dispersion(kind, batch), aggregate_kl(kind, variables), information(kind, variables);
    Array aggregate(kind, variables * components), parts(kind, 2 * variables * batch);
    k.mixture_prior_forward(mixture, {kl, dispersion, aggregate_kl, information, aggregate, parts});
    Array grad_mean(kind, z), grad_log_var(kind, categorical ? 0 : z), grad_logits(kind, q);
    Array grad_component_mean(kind, categorical ? 0 : p), grad_component_log_var(kind, p);
    k.mixture_prior_backward(mixture, {grad_kl, grad_dispersion, grad_aggregate, grad_information, aggregate, grad_mean,
                                       grad_log_var, grad_logits, grad_component_mean, grad_component_log_var});
    const double tolerance = kind == kF64 ? 1e-9 : 1e-3;
    results.push_back({"kl", std::move(kl), true, tolerance});
    results.push_back({"dispersion", std::move(dispersion), true, tolerance});
    results.push_back({"aggregate_kl", std::move(aggregate_kl), true, tolerance});
    results.push_back({"information", std::move(information), true, tolerance});
    results.push_back({"grad_mean", std::move(grad_mean), true, tolerance});
    results.push_back({"grad_log_var", std::move(grad_log_var), true, tolerance});
    results.push_back({"grad_logits", std::move(grad_logits), true, tolerance});
    results.push_back({"grad_component_mean", std::move(grad_component_mean), true, tolerance});
    results.push_back({"grad_component_log_var", std::move(grad_component_log_var), true, tolerance});
  });
}

void fuzz_cross_entropy(Case &c) {
  Random &r = c.random;
  const Kind kind = Kind(r.below(4)), compute = kind == kF64 ? kF64 : kF32;
  const bool large = r.one_in(3);  // enough for four threads
  const int64_t H = r.one_in(large ? 2 : 4) ? r.between(250, large ? 600 : 300)
                    : large                 ? r.between(16, 249)
                                            : r.size(40);
  const int64_t vocabulary = large ? r.between(100, 900) : r.one_in(9) ? 0 : 1 + r.size(400);
  const int64_t rows = large ? 1 + r.between(500'000, 2'200'000) / (vocabulary * H) : r.size(65);
  const int64_t words = r.one_in(2) ? 1 : r.between(0, 6), block_rows = r.one_in(2) ? rows : r.between(1, rows + 1);
  const int64_t ignored_in_ten = r.one_in(3) ? 0 : r.between(1, 10), workspaces = r.one_in(2) ? 4 : r.between(1, 4);
  const int64_t ignore_index = vocabulary > 0 && r.one_in(3) ? r.below(vocabulary) : -100;
  const double smoothing = r.one_in(2) ? 0 : r.one_in(4) ? 1 : r.real(0, 1);
  const bool has_bias = r.one_in(2), has_scale = r.one_in(2);
  const bool grad_hidden = !r.one_in(3), grad_weight = !r.one_in(3), grad_bias = !r.one_in(3);
  c.describe(
      "dtype rows hidden vocabulary words block_rows workspaces ignore_index smoothing bias scale grad_hidden "
      "grad_weight grad_bias",
      kind, rows, H, vocabulary, words, block_rows, workspaces, ignore_index, smoothing, has_bias, has_scale,
      grad_hidden, grad_weight, grad_bias);
  const double bound = 4 / std::sqrt(double(H) + 1);
  const Array hidden = c.reals(kind, rows * H, -1, 1), weight = c.reals(kind, vocabulary * H, -bound, bound);
  const Array bias = c.reals(kind, has_bias ? vocabulary : 0, -1, 1);
  const Array scale = c.reals(compute, has_scale ? rows : 0, 0, 2);
  Array target = c.integers(rows * words, 0, vocabulary > 0 ? vocabulary - 1 : 0);
  for (int64_t i = 0; i < target.count; ++i) {
    if (vocabulary == 0 || r.below(10) < ignored_in_ten) target.integers()[i] = ignore_index;
  }
  const int64_t wrong = target.count > 0 && r.one_in(8) ? r.below(target.count) : -1;
  if (wrong >= 0) target.integers()[wrong] = r.one_in(2) ? vocabulary + r.below(9) : -1 - r.below(99);
  int64_t expected = 0;
  for (int64_t row = 0; row < rows; ++row) {
    bool any = false;
    for (int64_t i = row * words; i < (row + 1) * words; ++i) any |= target.integers()[i] != ignore_index;
    expected += any;
  }
  if (wrong >= 0) expected = -1 - wrong;
  struct Gradients {
    Array hidden, weight, bias;
  };
  const Gradients none{{compute, 0}, {compute, 0}, {compute, 0}};
  const auto blank = [&] {
    return Gradients{{compute, grad_hidden ? rows * H : 0},
                     {compute, grad_weight ? vocabulary * H : 0},
                     {compute, grad_bias ? vocabulary : 0}};
  };
  const double tolerance = tolerance_of(compute);
  c.run([&](const Kernels &k, int, Results &results) {
    const auto call = [&](const Array &losses, const Array &lse, bool known_lse, const Gradients &to) {
      CrossEntropy p{DType(kind), hidden,     weight,    bias,         target.integers(), rows,
                     H,           vocabulary, words,     ignore_index, smoothing,         scale,
                     losses,      lse,        known_lse, to.hidden,    to.weight,         to.bias,
                     block_rows,  workspaces, nullptr};
      const Array memory(kF64, k.cross_entropy_workspace(p) / kBytes[kF64]);
      p.memory = memory;
      const int64_t got = k.cross_entropy(p);
      if (got != expected) {
        fail(text("cross_entropy gave %lld instead of %lld", (long long)got, (long long)expected));
      }
    };
    const auto keep = [&](const char *name, Array &values) {
      results.push_back({name, std::move(values), false, tolerance});
    };
    Array losses(compute, rows), lse(compute, rows), alone(compute, rows), lse_alone(compute, rows);
    call(alone, lse_alone, false, none);
    Gradients together = blank(), afterwards = blank();
    call(losses, lse, false, together);
    if (wrong >= 0) return;
    call(Array(compute, 0), lse, true, afterwards);
    keep("losses without gradient", alone), keep("lse without gradient", lse_alone);
    keep("losses", losses), keep("lse", lse);
    keep("grad_hidden", together.hidden), keep("grad_weight", together.weight), keep("grad_bias", together.bias);
    if (c.wild) return;  // exp(logit - lse) has few digits if both are large
    keep("grad_hidden with known lse", afterwards.hidden), keep("grad_weight with known lse", afterwards.weight);
    keep("grad_bias with known lse", afterwards.bias);
    for (size_t i : {0, 1}) compare(results[i], results[i + 2], tolerance, "with gradient");
    for (size_t i : {4, 5, 6}) compare(results[i], results[i + 3], tolerance, "with known lse");
  });
}

// A batch of words, and what pack_words made of it.
struct Batch {
  int64_t batch, time, vocabulary, total = 0;
  Array tokens, lengths, seed;
  Array order{kI64, batch}, active{kI64, time}, start{kI64, time}, words{kI64, batch * time}, rows{kI64, batch * time};
  float word_dropout = 0;
  int64_t unk_index = -1;

  Batch(Case &c, int64_t batch, int64_t time)
      : batch(batch),
        time(time),
        vocabulary(1 + c.random.size(40)),
        tokens(c.integers(batch * time, 0, vocabulary - 1)),
        lengths(c.integers(batch, 0, time)),
        seed(c.seed()) {
    if (c.random.one_in(3)) {  // as training has it: none shorter than 1, one of full length
      for (int64_t b = 0; b < batch && time > 0; ++b) lengths.integers()[b] = b == 0 ? time : c.random.between(1, time);
    }
    for (int64_t b = 0; b < batch; ++b) {  // the padding may hold anything
      for (int64_t t = lengths.integers()[b]; t < time; ++t) tokens.integers()[b * time + t] = int64_t(c.random.next());
    }
    if (c.random.one_in(2)) word_dropout = float(c.random.real(0, 1)), unk_index = c.random.below(vocabulary);
  }
  int64_t pack(const Kernels &k) {
    order = Array(kI64, batch), active = Array(kI64, time), start = Array(kI64, time);
    words = Array(kI64, batch * time), rows = Array(kI64, batch * time);
    return total = k.pack_words({tokens.integers(), lengths.integers(), batch, time, vocabulary, seed.integers(),
                                 word_dropout, unk_index, order.integers(), active.integers(), start.integers(),
                                 words.integers(), rows.integers()});
  }
  PackedPlan plan(int64_t samples, int64_t hidden) const {
    return {batch, samples, time, hidden, lengths.integers(), order.integers(), active.integers(), start.integers()};
  }
};

void fuzz_pack_words(Case &c) {
  Random &r = c.random;
  const bool large = r.one_in(3);
  const int64_t batch = large ? r.between(60, 300) : r.size(40), time = large ? r.between(40, 140) : r.size(70);
  Batch b(c, batch, time);
  const int64_t longest = batch * time == 0 ? 0 : r.one_in(5) ? r.between(1, 3) : 0;
  const int64_t wrong_length = batch > 0 && r.one_in(6) ? r.below(batch) : -1;
  if (wrong_length >= 0)
    b.lengths.integers()[wrong_length] = r.one_in(2) ? -1 - r.below(1 << 20) : time + 1 + r.below(9);
  for (int64_t i = 0; i < longest; ++i) {
    b.tokens.integers()[r.below(batch * time)] = r.one_in(2) ? b.vocabulary : -1 - int64_t(r.next() >> 1);
  }
  c.describe("batch time vocabulary word_dropout wrong_length_at", batch, time, b.vocabulary, b.word_dropout,
             wrong_length);
  const int64_t *lengths = b.lengths.integers(), *tokens = b.tokens.integers();
  int64_t total = 0, wrong_token = -1;
  for (int64_t i = 0; wrong_length < 0 && i < batch * time; ++i) {
    if (i % time >= lengths[i / time]) continue;
    ++total;
    if (tokens[i] < 0 || tokens[i] >= b.vocabulary) wrong_token = i;
  }
  c.run([&](const Kernels &k, int, Results &results) {
    const int64_t got = b.pack(k);
    if (wrong_length >= 0 || wrong_token >= 0) {
      if (got != (wrong_length >= 0 ? kBadLength - wrong_length : kBadToken - wrong_token)) {
        fail(text("pack_words gave %lld for what is out of range", (long long)got));
      }
      return;
    }
    if (got != total) fail(text("pack_words gave %lld tokens of %lld", (long long)got, (long long)total));
    std::vector<int64_t> seen(size_t(batch * time), 0);
    for (int64_t t = 0; t < time; ++t) {
      for (int64_t rank = 0; rank < b.active.integers()[t]; ++rank) {
        const int64_t row = b.start.integers()[t] + rank, sequence = b.order.integers()[rank], i = sequence * time + t;
        const int64_t word = b.words.integers()[row];
        if (t >= lengths[sequence] || b.rows.integers()[row] != i || seen[size_t(i)]++) fail("rows: not the batch's");
        if (word != tokens[i] && !(b.word_dropout > 0 && t > 0 && word == b.unk_index)) fail("words: not the batch's");
      }
    }
    results.push_back({"order", b.order.copy(), true, 0});
    results.push_back({"active", b.active.copy(), true, 0});
    results.push_back({"start", b.start.copy(), true, 0});
    results.push_back({"words", b.words.first(total), true, 0});
    results.push_back({"rows", b.rows.first(total), true, 0});
  });
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Sizes of a recurrence: in large cases more than one thread share out the sequences, or the hidden units.
struct Recurrence {
  Kind kind;
  int64_t samples, batch, time, hidden, sequences;

  explicit Recurrence(Case &c) {
    Random &r = c.random;
    const int64_t shape = r.below(4);
    kind = c.float_or_double(), samples = r.one_in(2) ? 1 : r.between(0, 5);
    batch = shape == 0 ? r.between(24, 50) : r.size(20), time = shape < 2 ? r.size(9) : r.size(20);
    hidden = shape == 0 ? r.between(40, 60) : shape == 1 ? r.between(64, 150) : r.size(40);
    sequences = samples * batch;
    c.describe("dtype batch samples time hidden", kind, batch, samples, time, hidden);
  }
};

void fuzz_lstm(Case &c) {
  const Recurrence s(c);
  const Kind kind = s.kind;
  const int64_t samples = s.samples, batch = s.batch, time = s.time, H = s.hidden, G = 4 * H, sequences = s.sequences;
  Batch b(c, batch, time);
  b.word_dropout = 0;
  const double bound = 1 / std::sqrt(double(H) + 1);
  const Array inputs = c.reals(kind, batch * time * G, -1, 1), static_gates = c.reals(kind, sequences * G, -1, 1);
  const Array h0 = c.reals(kind, sequences * H, -1, 1), c0 = c.reals(kind, sequences * H, -1, 1);
  const Array weight = c.reals(kind, G * H, -bound, bound);
  const Array grad_hidden = c.reals(kind, sequences * time * H, -1, 1);
  const Array grad_h_n = c.reals(kind, sequences * H, -1, 1), grad_c_n = c.reals(kind, sequences * H, -1, 1);
  const double tolerance = tolerance_of(kind);
  c.run([&](const Kernels &k, int, Results &results) {
    const int64_t total = b.pack(k);
    const PackedPlan plan = b.plan(samples, H);
    const auto forward = [&](bool keep, Array &gates, const char *const(&names)[3]) {
      // One sample's gates are made in the place of its inputs.
      const Array input = keep && samples == 1 ? Array(kind, 0) : inputs.first(total * G);
      Array cells(kind, (keep ? samples * total : sequences) * H), hidden(kind, sequences * time * H);
      Array h_n(kind, sequences * H), c_n(kind, sequences * H);
      const Array states(kind, samples * total * H), sorted_h0(kind, sequences * H), packed(kind, G * round_up(H, 16));
      k.lstm_forward({kind == kF64, keep, plan, input.count ? static_cast<void *>(input) : gates, static_gates, h0, c0,
                      weight, gates, cells, hidden, h_n, c_n, states, sorted_h0, packed});
      results.push_back({names[0], std::move(hidden), false, tolerance});
      results.push_back({names[1], std::move(h_n), false, tolerance});
      results.push_back({names[2], std::move(c_n), false, tolerance});
      return cells;
    };
    Array nothing(kind, 0), gates = samples == 1 ? inputs.first(total * G) : Array(kind, samples * total * G);
    forward(false, nothing, {"hidden without gradient", "h_n without gradient", "c_n without gradient"});
    Array cells = forward(true, gates, {"hidden", "h_n", "c_n"});
    for (int i = 0; i < 3; ++i) compare(results[size_t(i)], results[size_t(i + 3)], 1e-5, "with gradient");

    const Array grad_states = grad_hidden.first(samples * total * H), packed(kind, G * round_up(H, 32));
    Array grad_gates(kind, samples * total * G), grad_static(kind, sequences * G);
    Array grad_h0(kind, sequences * H), grad_c0(kind, sequences * H);
    k.lstm_backward({kind == kF64, plan, grad_states, grad_h_n, grad_c_n, gates, cells, c0, weight, grad_gates,
                     grad_static, grad_h0, grad_c0, packed});
    results.push_back({"gates", std::move(gates), false, tolerance});
    results.push_back({"cells", std::move(cells), false, tolerance});
    results.push_back({"grad_gates", std::move(grad_gates), false, tolerance});
    results.push_back({"grad_static_gates", std::move(grad_static), false, tolerance});
    results.push_back({"grad_h0", std::move(grad_h0), false, tolerance});
    results.push_back({"grad_c0", std::move(grad_c0), false, tolerance});
  });
}

Array product(Kind kind, const Array &a, const Array &b, int64_t rows, int64_t inner, int64_t columns,
              bool transposed) {
  Array to(kind, rows * columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < inner; ++k)
        sum += a.get(i * inner + k) * b.get(transposed ? j * inner + k : k * columns + j);
      to.set(i * columns + j, sum);
    }
  }
  return to;
}

// Samples and a dictionary, some atoms of which are zero or repeat another.
struct SparseProblem {
  Kind kind;
  int64_t samples, atoms, features;
  Array x, dictionary, gram, products, squared;

  SparseProblem(Case &c, int64_t samples, int64_t atoms, int64_t features)
      : kind(c.float_or_double()),
        samples(samples),
        atoms(atoms),
        features(features),
        x(c.reals(kind, samples * features, -1, 1)),
        dictionary(make_dictionary(c)),
        gram(product(kind, dictionary, dictionary, atoms, features, atoms, true)),
        products(product(kind, x, dictionary, samples, features, atoms, true)),
        squared(kind, samples) {
    for (int64_t i = 0; i < samples; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < features; ++j) sum += x.get(i * features + j) * x.get(i * features + j);
      squared.set(i, sum);
    }
  }
  Array make_dictionary(Case &c) const {
    Array to = c.reals(kind, atoms * features, -1, 1);
    const bool dependent = c.random.one_in(2);
    for (int64_t k = 1; dependent && k < atoms; ++k) {
      if (!c.random.one_in(4)) continue;
      const int64_t from = c.random.below(k);
      const double scale = c.random.one_in(3) ? 0 : 1;
      for (int64_t j = 0; j < features; ++j) to.set(k * features + j, scale * to.get(from * features + j));
    }
    return to;
  }
  Array sparse_codes(Case &c, double density, bool positive, bool on_zeros = true) const {
    Array to = zeros(kind, samples * atoms);
    for (int64_t i = 0; i < to.count; ++i) {
      const int64_t atom = i % atoms;
      if (c.random.real(0, 1) < density && (on_zeros || gram.get(atom * atoms + atom) > 0)) {
        to.set(i, c.random.real(positive ? 0.01 : -1, 1));
      }
    }
    return to;
  }
};

void fuzz_sparse(Case &c) {
  Random &r = c.random;
  c.wild = false;  // callers refuse what is not finite
  const SparseProblem p(c, r.size(40), 1 + r.size(130), r.size(40));
  const bool positive = r.one_in(3), has_weights = r.one_in(3), has_init = r.one_in(3);
  const double l2 = r.one_in(2) ? 0 : r.real(0, 0.5);
  const int64_t capacity = r.one_in(2) ? p.atoms : r.between(1, p.atoms), max_iter = r.one_in(4) ? r.below(5) : 300;
  const int64_t workspaces = r.between(1, 4);
  c.describe("dtype samples atoms features capacity max_iter positive l2 weights init workspaces", p.kind, p.samples,
             p.atoms, p.features, capacity, max_iter, positive, l2, has_weights, has_init, workspaces);
  const Array l1 = c.reals(p.kind, p.samples, 0.01, 0.5);
  Array weights = c.reals(p.kind, has_weights ? round_up(p.atoms, 16) : 0, 0.5, 2);
  for (int64_t i = p.atoms; i < weights.count; ++i) weights.set(i, 1);
  const Array init = has_init ? p.sparse_codes(c, 0.1, positive) : Array(p.kind, 0);
  // No solution has a code for an atom of zeros.
  const Array support = p.sparse_codes(c, r.real(0, 0.5), false, false),
              grad = c.reals(p.kind, p.samples * p.atoms, -1, 1);
  int64_t widest = 0;
  for (int64_t i = 0; i < p.samples; ++i) {
    int64_t nonzero = 0;
    for (int64_t j = 0; j < p.atoms; ++j) nonzero += support.get(i * p.atoms + j) != 0;
    if (nonzero > widest) widest = nonzero;
  }
  const bool is_double = p.kind == kF64;
  c.run([&](const Kernels &k, int, Results &results) {
    // Whole 8-byte words, so that the memory is aligned as a tensor's is.
    const auto memory = [&](int64_t size) { return Array(kF64, 2 * ((workspaces * size + 15) / 16)); };
    {
      Array codes(p.kind, p.samples * p.atoms), gap(p.kind, p.samples), iterations(kI64, p.samples);
      Array status(kI8, p.samples);
      const Array work = memory(k.sparse_workspace(is_double, p.atoms, capacity));
      k.sparse_encode({is_double,
                       p.gram,
                       p.products,
                       p.squared,
                       l1,
                       weights,
                       init,
                       l2,
                       1e-6,
                       positive,
                       p.samples,
                       p.atoms,
                       max_iter,
                       capacity,
                       codes,
                       gap,
                       iterations.integers(),
                       static_cast<int8_t *>(static_cast<void *>(status)),
                       work,
                       workspaces});
      for (int64_t i = 0; i < p.samples; ++i) {
        if (status.get(i) != 0 && status.get(i) != 1) fail("status: neither 0 nor 1");
        if (status.get(i) == 0 && !(gap.get(i) <= 1.001e-6)) fail("gap: above the tolerance in a solved sample");
      }
      results.push_back({"codes", std::move(codes), true, -1});
      results.push_back({"gap", std::move(gap), true, -1});
      results.push_back({"iterations", std::move(iterations), true, -1});
      results.push_back({"status", std::move(status), true, -1});
    }
    Array solution(p.kind, p.samples * p.atoms);
    const Array work = memory(k.sparse_workspace(is_double, p.atoms, widest));
    k.sparse_solve_support(
        {is_double, p.gram, support, grad, l2, p.samples, p.atoms, widest, solution, work, workspaces});
    for (int64_t i = 0; i < support.count; ++i) {
      if (support.get(i) == 0 && solution.get(i) != 0) fail("solution: nonzero outside the support");
    }
    results.push_back({"solution", std::move(solution), true, -1});
  });
}

void fuzz_ista(Case &c) {
  Random &r = c.random;
  const SparseProblem p(c, r.one_in(2) ? r.between(60, 150) : r.size(20), r.size(70), r.size(70));
  Ista ista{};
  ista.is_double = p.kind == kF64, ista.use_gram = r.one_in(2), ista.momentum = r.one_in(2);
  ista.samples = p.samples, ista.atoms = p.atoms, ista.features = p.features, ista.max_iter = r.below(5);
  ista.workspaces = r.between(1, 4), ista.step = 0.3 / double(1 + p.atoms * p.features);
  const Array l1 = c.reals(p.kind, p.samples, 0, 0.5);
  const Array init = r.one_in(2) ? p.sparse_codes(c, 0.5, false) : Array(p.kind, 0);
  ista.matrix = ista.use_gram ? p.gram : p.dictionary, ista.target = ista.use_gram ? p.products : p.x;
  ista.l1 = l1, ista.init = init;
  c.describe("dtype samples atoms features gram max_iter init workspaces", p.kind, p.samples, p.atoms, p.features,
             ista.use_gram, ista.max_iter, init.count > 0, ista.workspaces);
  c.run([&](const Kernels &k, int, Results &results) {
    const IstaSizes sizes = k.ista_sizes(ista);
    const Array packed(p.kind, sizes.packed), memory(p.kind, ista.workspaces * sizes.memory);
    Array codes(p.kind, p.samples * p.atoms);
    ista.codes = codes, ista.packed = packed, ista.memory = memory;
    k.ista(ista);
    results.push_back({"codes", std::move(codes), true, tolerance_of(p.kind)});
  });
}

void fuzz_dictionary_sweep(Case &c) {
  Random &r = c.random;
  const Kind kind = c.float_or_double();
  const int64_t atoms = r.size(40), features = r.size(130), stride = atoms + r.below(20);
  const bool sphere = r.one_in(2), positive = r.one_in(2);
  c.describe("dtype atoms features gram_stride sphere positive", kind, atoms, features, stride, sphere, positive);
  const Array before = c.reals(kind, atoms * features, -1, 1), change = c.reals(kind, atoms * features, -1, 1);
  Array gram = c.reals(kind, atoms > 0 ? (atoms - 1) * stride + atoms : 0, -0.1, 0.1);
  for (int64_t i = 0; i < atoms; ++i) gram.set(i * stride + i, r.real(1, 2));
  Array used(kI8, atoms);
  for (int64_t i = 0; i < atoms; ++i) used.set(i, r.one_in(4) ? 0 : 1);
  c.run([&](const Kernels &k, int, Results &results) {
    Array dictionary = before.copy();
    const Array gradient = change.copy();
    k.dictionary_sweep({kind == kF64, sphere, positive, dictionary, gradient, gram,
                        static_cast<const bool *>(static_cast<void *>(used)), atoms, features, stride});
    results.push_back({"atoms", std::move(dictionary), true, tolerance_of(kind)});
  });
}

void fuzz_gru(Case &c) {
  Random &r = c.random;
  const Recurrence s(c);
  const int64_t H = s.hidden, G = 4 * H;
  Batch b(c, s.batch, s.time);
  b.word_dropout = 0;
  const bool has_grad_hidden = !r.one_in(4), has_grad_h_n = !r.one_in(4);
  const double bound = 1 / std::sqrt(double(H) + 1);
  const Array inputs = c.reals(s.kind, s.batch * s.time * 3 * H, -1, 1);
  const Array static_gates = c.reals(s.kind, s.sequences * G, -1, 1), h0 = c.reals(s.kind, s.sequences * H, -1, 1);
  const Array weight = c.reals(s.kind, 3 * H * H, -bound, bound);
  const Array grad_hidden = c.reals(s.kind, has_grad_hidden ? s.sequences * s.time * H : 0, -1, 1);
  const Array grad_h_n = c.reals(s.kind, has_grad_h_n ? s.sequences * H : 0, -1, 1);
  const double tolerance = tolerance_of(s.kind);
  c.run([&](const Kernels &k, int, Results &results) {
    const int64_t total = b.pack(k);
    const PackedPlan plan = b.plan(s.samples, H);
    const auto forward = [&](bool keep, Array &gates, const char *const(&names)[2]) {
      // One sample's gates are made where its inputs lie, as their last three.
      const bool in_place = keep && s.samples == 1;
      const Array separate = inputs.first(in_place ? 0 : total * 3 * H);
      for (int64_t i = 0; in_place && i < total * 3 * H; ++i)
        gates.set(i / (3 * H) * G + H + i % (3 * H), inputs.get(i));
      const int64_t offset = gates.count ? H * kBytes[s.kind] : 0;
      void *input = in_place ? static_cast<char *>(static_cast<void *>(gates)) + offset : static_cast<void *>(separate);
      Array hidden(s.kind, s.sequences * s.time * H), h_n(s.kind, s.sequences * H);
      const Array states(s.kind, 2 * s.sequences * H), packed(s.kind, 3 * H * round_up(H, 16));
      k.gru_forward({s.kind == kF64, plan, input, in_place ? G : 3 * H, static_gates, h0, weight, gates, hidden, h_n,
                     states, packed});
      results.push_back({names[0], hidden.copy(), false, tolerance});
      results.push_back({names[1], std::move(h_n), false, tolerance});
      return hidden;
    };
    Array nothing(s.kind, 0), gates(s.kind, s.samples * total * G);
    forward(false, nothing, {"hidden without gradient", "h_n without gradient"});
    const Array hidden = forward(true, gates, {"hidden", "h_n"});
    for (int i = 0; i < 2; ++i) compare(results[size_t(i)], results[size_t(i + 2)], 1e-5, "with gradient");

    const Array packed(s.kind, 3 * H * round_up(H, 32));
    Array grad_gates(s.kind, s.samples * total * G), grad_static(s.kind, s.sequences * G);
    Array grad_h0(s.kind, s.sequences * H), before(s.kind, s.samples * total * H);
    k.gru_backward({s.kind == kF64, plan, grad_hidden, grad_h_n, gates, hidden, h0, weight, grad_gates, grad_static,
                    grad_h0, before, packed});
    results.push_back({"gates", std::move(gates), false, tolerance});
    results.push_back({"grad_gates", std::move(grad_gates), false, tolerance});
    results.push_back({"grad_static_gates", std::move(grad_static), false, tolerance});
    results.push_back({"grad_h0", std::move(grad_h0), false, tolerance});
    results.push_back({"before", std::move(before), false, tolerance});
  });
}

void fuzz_layer_norm_lstm(Case &c) {
  Random &r = c.random;
  const Recurrence s(c);
  const int64_t H = s.hidden, G = 4 * H;
  Batch b(c, s.batch, s.time);
  b.word_dropout = 0;
  const int64_t partials = r.between(1, 4);
  const double bound = 1 / std::sqrt(double(H) + 1), epsilon = 1e-5;
  const Array inputs = c.reals(s.kind, s.batch * s.time * G, -1, 1);
  const Array static_inputs = c.reals(s.kind, s.sequences * G, -1, 1);
  const Array h0 = c.reals(s.kind, s.sequences * H, -1, 1), c0 = c.reals(s.kind, s.sequences * H, -1, 1);
  const Array weight = c.reals(s.kind, G * H, -bound, bound);
  const Array norm_gates = c.reals(s.kind, 3 * G, -1, 1), norm_cell = c.reals(s.kind, 2 * H, -1, 1);
  const Array grad_hidden = c.reals(s.kind, s.sequences * s.time * H, -1, 1);
  const Array grad_h_n = c.reals(s.kind, s.sequences * H, -1, 1), grad_c_n = c.reals(s.kind, s.sequences * H, -1, 1);
  // A row of nearly equal numbers magnifies rounding by up to 1 / sqrt(epsilon).
  const double tolerance = H < 4 ? -1 : 100 * tolerance_of(s.kind);
  c.run([&](const Kernels &k, int, Results &results) {
    const int64_t total = b.pack(k);
    const PackedPlan plan = b.plan(s.samples, H);
    const Array read = inputs.first(total * G);
    const auto forward = [&](bool keep, Array &normalized, Array &inverses, Array &cells) {
      Array hidden(s.kind, s.sequences * s.time * H), h_n(s.kind, s.sequences * H), c_n(s.kind, s.sequences * H);
      const Array states(s.kind, 2 * s.sequences * H), packed(s.kind, H * round_up(G, 32));
      k.layer_norm_lstm_forward({s.kind == kF64, keep, plan, epsilon, read, static_inputs, h0, c0, weight, norm_gates,
                                 norm_cell, normalized, inverses, cells, hidden, h_n, c_n, states, packed});
      results.push_back({keep ? "hidden" : "hidden without gradient", hidden.copy(), false, tolerance});
      results.push_back({keep ? "h_n" : "h_n without gradient", std::move(h_n), false, tolerance});
      results.push_back({keep ? "c_n" : "c_n without gradient", std::move(c_n), false, tolerance});
      return hidden;
    };
    const int64_t rows = s.samples * total;
    {
      Array normalized(s.kind, s.sequences * 2 * G), inverses(s.kind, s.sequences * 2), cells(s.kind, s.sequences * H);
      forward(false, normalized, inverses, cells);
    }
    Array normalized(s.kind, rows * 2 * G), inverses(s.kind, rows * 2), cells(s.kind, rows * H);
    const Array hidden = forward(true, normalized, inverses, cells);
    for (int i = 0; i < 3; ++i) compare(results[size_t(i)], results[size_t(i + 3)], 1e-4, "with gradient");

    const Array states(s.kind, s.sequences * H), packed(s.kind, G * round_up(H, 32));
    Array grad_products(s.kind, rows * G), grad_inputs(s.kind, rows * G), grad_static(s.kind, s.sequences * G);
    Array grad_h0(s.kind, s.sequences * H), grad_c0(s.kind, s.sequences * H), before(s.kind, rows * H);
    const Array grad_norms = zeros(s.kind, partials * (3 * G + 2 * H));
    k.layer_norm_lstm_backward({s.kind == kF64, plan,          epsilon,     grad_hidden, grad_h_n, grad_c_n, normalized,
                                inverses,       cells,         hidden,      h0,          c0,       weight,   norm_gates,
                                norm_cell,      grad_products, grad_inputs, grad_static, grad_h0,  grad_c0,  before,
                                grad_norms,     partials,      states,      packed});
    Array sums = zeros(s.kind, 3 * G + 2 * H);
    for (int64_t i = 0; i < grad_norms.count; ++i) {
      sums.set(i % sums.count, sums.get(i % sums.count) + grad_norms.get(i));
    }
    results.push_back({"normalized", std::move(normalized), false, tolerance});
    if (H > 0) results.push_back({"inverses", std::move(inverses), false, -1});
    results.push_back({"cells", std::move(cells), false, tolerance});
    results.push_back({"grad_products", std::move(grad_products), false, tolerance});
    results.push_back({"grad_inputs", std::move(grad_inputs), false, tolerance});
    results.push_back({"grad_static_inputs", std::move(grad_static), false, tolerance});
    results.push_back({"grad_h0", std::move(grad_h0), false, tolerance});
    results.push_back({"grad_c0", std::move(grad_c0), false, tolerance});
    results.push_back({"before", std::move(before), false, tolerance});
    results.push_back({"grad_norms", std::move(sums), false, tolerance});
  });
}

void fuzz_generation(Case &c) {
  Random &r = c.random;
  const Kind kind = c.float_or_double();
  Generation g{};
  g.is_double = kind == kF64;
  const bool large = r.one_in(3);  // enough for four threads
  g.batch = 1 + r.size(large ? 60 : 12), g.embed = r.size(40), g.layers = r.between(1, 3);
  g.hidden = large ? r.between(30, 130) : r.size(40);
  g.vocabulary = 1 + (!large && r.one_in(2) ? r.size(70) : r.between(100, large ? 2000 : 700));
  g.max_length = 1 + r.size(9);
  g.strategy = Strategy(r.below(3));
  g.log_probs = g.strategy == kBeam || r.one_in(2);
  g.temperature = r.real(0.2, 3), g.top_p = r.one_in(2) ? 1 : r.real(0.01, 1), g.length_penalty = r.real(0, 1);
  g.top_k = r.one_in(2) ? 0 : 1 + r.size(g.vocabulary + 5);
  g.beams = g.strategy == kBeam ? r.between(1, 6) : 1, g.n_best = r.between(1, g.beams);
  g.no_repeat_ngram = r.one_in(2) ? 0 : r.between(1, 3);
  g.bos = r.below(g.vocabulary), g.eos = r.below(g.vocabulary), g.padding = r.below(g.vocabulary);
  g.prefix_length = r.one_in(2) ? 0 : r.between(1, g.max_length);
  g.input_stride = g.embed + r.below(5);
  const int64_t B = g.batch, E = g.embed, H = g.hidden, L = g.layers, V = g.vocabulary, G = 4 * H;
  c.describe(
      "dtype batch embed hidden layers vocabulary steps strategy log_probs top_k top_p beams n_best no_repeat prefix "
      "bos eos padding",
      kind, B, E, H, L, V, g.max_length, g.strategy, g.log_probs, g.top_k, g.top_p, g.beams, g.n_best,
      g.no_repeat_ngram, g.prefix_length, g.bos, g.eos, g.padding);
  const Array embedding = c.reals(kind, V * E, -2, 2);
  const Array weight_input = c.reals(kind, H > 0 && E > 0 ? (G - 1) * g.input_stride + E : 0, -1, 1);
  const Array weight_hh = c.reals(kind, L * G * H, -1, 1), weight_ih = c.reals(kind, (L - 1) * G * H, -1, 1);
  const Array bias = c.reals(kind, (L - 1) * G, -1, 1), static_gates = c.reals(kind, B * G, -1, 1);
  const Array h0 = c.reals(kind, L * B * H, -1, 1), c0 = c.reals(kind, L * B * H, -1, 1);
  const Array output_weight = c.reals(kind, V * H, -3, 3), output_bias = c.reals(kind, V, -1, 1);
  const Array seeds = c.integers(B, INT64_MIN / 4, INT64_MAX / 4);
  Array prefix = c.integers(B * g.prefix_length, -1, V - 1);
  for (int64_t i = 0; i < prefix.count; ++i) {
    int64_t &word = prefix.integers()[i];
    if (r.one_in(2) || (word != g.eos && (word == g.bos || word == g.padding))) word = -1;
  }
  g.embedding = embedding, g.weight_input = weight_input, g.weight_hh = weight_hh, g.weight_ih = weight_ih;
  g.bias = bias, g.static_gates = static_gates, g.h0 = h0, g.c0 = c0, g.output_weight = output_weight;
  g.output_bias = output_bias, g.prefix = prefix.integers(), g.seeds = seeds.integers();
  const int64_t at_once = r.one_in(2) ? g.max_length : r.between(1, g.max_length);
  c.run([&](const Kernels &k, int threads, Results &results) {
    Generation mine = g;
    Array tokens(kI64, B * g.n_best * g.max_length), lengths = zeros(kI64, B * g.n_best);
    Array scores = zeros(kind, tokens.count);
    for (int64_t i = 0; i < tokens.count; ++i) tokens.integers()[i] = g.padding;
    mine.tokens = tokens.integers(), mine.lengths = lengths.integers(), mine.scores = scores, mine.threads = threads;
    const size_t bytes = size_t(k.generation_bytes(mine));
    const std::unique_ptr<void, void (*)(void *)> memory(std::aligned_alloc(64, bytes), std::free);
    mine.memory = std::memset(memory.get(), 0x7F, bytes);
    do {
      k.generation_advance(mine, at_once);
    } while (mine.step < g.max_length && mine.active > 0);
    for (int64_t i = 0; i < tokens.count; ++i) {
      const int64_t row = i / g.max_length, t = i % g.max_length, length = lengths.integers()[row];
      const int64_t word = tokens.integers()[i];
      if (length < 0 || length > g.max_length) fail(text("lengths[%lld] is %lld", (long long)row, (long long)length));
      if (length == 0 && row % g.n_best == 0 && !c.wild && V > 2) fail("a row has no sentence");
      if (word < 0 || word >= V || (t >= length && (word != g.padding || scores.get(i) != 0))) {
        fail(text("tokens[%lld][%lld] is %lld, of a length of %lld", (long long)row, (long long)t, (long long)word,
                  (long long)length));
      }
      if (t < length && t < g.prefix_length) {
        const int64_t forced = g.prefix[row / g.n_best * g.prefix_length + t];
        if (forced >= 0 && word != forced) fail("tokens: not the prefix");
      }
    }
    // Rounding may decide between words: not compared between instruction sets.
    results.push_back({"tokens", std::move(tokens), true, -1});
    results.push_back({"lengths", std::move(lengths), true, -1});
    results.push_back({"scores", std::move(scores), true, -1});
  });
}

void fuzz_multiply_rows(Case &c) {
  Random &r = c.random;
  const Kind kind = c.float_or_double();
  const int64_t rows = r.size(40), inner = r.size(130), columns = r.size(260);
  c.describe("dtype rows inner columns", kind, rows, inner, columns);
  const Array x = c.reals(kind, rows * inner, -1, 1), weight = c.reals(kind, columns * inner, -1, 1);
  const Array bias = c.reals(kind, columns, -1, 1);
  c.run([&](const Kernels &k, int threads, Results &results) {
    Array out(kind, rows * columns);
    const Array memory(kind, threads * inner * 64);
    k.multiply_rows({kind == kF64, rows, inner, columns, x, weight, bias, out, memory, threads});
    results.push_back({"out", std::move(out), true, tolerance_of(kind)});
  });
}
struct Entry {
  const char *name;
  void (*fuzz)(Case &);
};
const Entry kEntries[] = {{"gaussian", fuzz_gaussian},
                          {"full_gaussian", fuzz_full_gaussian},
                          {"log_ratio", fuzz_log_ratio},
                          {"importance_bound", fuzz_importance_bound},
                          {"likelihood", fuzz_likelihood},
                          {"categorical", fuzz_categorical},
                          {"corrupt", fuzz_corrupt},
                          {"mixture", fuzz_mixture},
                          {"mixture_prior", fuzz_mixture_prior},
                          {"cross_entropy", fuzz_cross_entropy},
                          {"pack_words", fuzz_pack_words},
                          {"lstm", fuzz_lstm},
                          {"sparse", fuzz_sparse},
                          {"ista", fuzz_ista},
                          {"gru", fuzz_gru},
                          {"layer_norm_lstm", fuzz_layer_norm_lstm},
                          {"generation", fuzz_generation},
                          {"multiply_rows", fuzz_multiply_rows},
                          {"dictionary_sweep", fuzz_dictionary_sweep}};

}  // namespace
}  // namespace fastvae

// A finding aborts: main then tells the case.
#pragma GCC visibility push(default)
extern "C" {
const char *__asan_default_options() { return "abort_on_error=1"; }
const char *__ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }
const char *__tsan_default_options() { return "abort_on_error=1:halt_on_error=1:history_size=4"; }
}
#pragma GCC visibility pop

int main(int count, char **arguments) {
  using namespace fastvae;
  int64_t cases = 100, seed = 1;
  double seconds = 0;
  std::string entry, isa;
  for (int i = 1; i < count; i += 2) {
    const std::string name = arguments[i], value = i + 1 < count ? arguments[i + 1] : "";
    if (name == "--cases" && !value.empty()) {
      cases = std::atoll(value.c_str());
    } else if (name == "--seconds" && !value.empty()) {
      seconds = std::atof(value.c_str());
    } else if (name == "--seed" && !value.empty()) {
      seed = std::atoll(value.c_str());
    } else if (name == "--entry" && !value.empty()) {
      entry = value;
    } else if (name == "--isa" && !value.empty()) {
      isa = value;
    } else {
      std::fprintf(stderr, "fuzz [--cases N] [--seconds S] [--seed N] [--entry NAME] [--isa NAME]\n");
      return 2;
    }
  }
  std::signal(SIGABRT, [](int) { tell_case(); });
  std::string isas;
  for (const char *const *name = supported_isas(); *name; ++name) isas += std::string(" ") + *name;
  std::printf("on%s\n", isas.c_str());

  const auto begin = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
  int64_t done = 0;
  // With --seconds, for at least so long.
  for (int64_t n = seed; n < seed + cases || elapsed() < seconds; ++n) {
    for (const Entry &e : kEntries) {
      if (!entry.empty() && entry != e.name) continue;
      uint64_t mixed = uint64_t(n);
      for (const char *letter = e.name; *letter; ++letter) mixed = mixed * 131 + uint64_t(*letter);
      Case c(mixed, isa);
      current = text("--entry %s --seed %lld --cases 1:", e.name, (long long)n), where.clear();
      e.fuzz(c);
      ++done;
    }
  }
  std::printf("%lld cases in %.1f s\n", (long long)done, elapsed());
  return done > 0 ? 0 : 2;
}
