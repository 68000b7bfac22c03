// Linear layer and cross-entropy: a block of rows at a time, all products and what lies between them in one pass.
//
// The logits of a block are kept transposed, (vocabulary, lanes), a lane for each row: the weight is read as it lies, a
// maximum or a sum over the vocabulary is an addition of vectors, and a thread that owns a range of the vocabulary owns
// its part of every product. In chunks of kChunk words, which stay in the second cache:
//
//   forward   logits = weight x', running maximum and sum of exponentials; with gradients, the exponentials are stored
//   backward  grad = factor * exponentials - one hot; grad_weight += grad x; grad_hidden += grad' weight
//
// Of the three products (6 * rows * vocabulary * hidden FLOPs) each reads the weight once for a block of rows; the
// exponentials go to memory and back once. With logsumexp known, nothing larger than a chunk is kept.
#include "gemm.h"
#include "vecmath.h"

namespace fastvae::FASTVAE_ISA {
namespace {

constexpr int64_t kChunk = 192, kSlice = 256;
constexpr int kPanel = kAccumulators >= 24 ? 4 : 2, kRows = kAccumulators / kPanel;  // vectors and rows of a tile

// While it lives, this thread makes no denormal numbers: products with them are a hundred times slower. It reads them,
// as float16 is widened by way of them.
struct FlushDenormals {
#ifdef __SSE2__
  const unsigned before = __builtin_ia32_stmxcsr();
  FlushDenormals() { __builtin_ia32_ldmxcsr(before | 0x8000); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(before); }
#else
  FlushDenormals() {}
#endif
};

FASTVAE_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Cuts [0, total) into even parts of at most kPart and calls each(first, size).
template <int kPart, typename Each>
FASTVAE_INLINE void parts(int64_t total, Each each) {
  const int64_t count = (total + kPart - 1) / kPart;
  for (int64_t i = 0, first = 0; i < count; ++i) {
    const int64_t size = (total - first) / (count - i);
    each(first, size);
    first += size;
  }
}

// c[r][v] = (add ? c[r][v] : 0) + sum_k a[r * a_row + k * a_step] * b[k][v], for kR rows and kV vectors.
template <typename T, int kR, int kV>
static __attribute__((noinline)) void multiply_tile(int64_t inner, const T *a, int64_t a_row, int64_t a_step,
                                                    const T *b, T *c, int64_t c_row, bool add) {
  using V = typename VectorOf<T>::type;
  constexpr int kW = kWidth<T>;
  V sums[kR][kV];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      sums[r][v] = V{};
      __builtin_prefetch(c + r * c_row + v * kW, 1);  // here by the time the sums are
    }
  }
  for (int64_t k = 0; k < inner; ++k, a += a_step, b += kV * kW) {
    V row[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) row[v] = *reinterpret_cast<const V *>(b + v * kW);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const T scalar = a[r * a_row];
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) sums[r][v] += scalar * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      V &to = *reinterpret_cast<V *>(c + r * c_row + v * kW);
      to = add ? to + sums[r][v] : sums[r][v];
    }
  }
}

template <typename T, int kR, int kV, typename... Arguments>
FASTVAE_INLINE void multiply_tile_of(int64_t rows, int64_t vectors, Arguments... arguments) {
  if constexpr (kV > 1) {
    if (vectors < kV) return multiply_tile_of<T, kR, kV - 1>(rows, vectors, arguments...);
  }
  if constexpr (kR > 1) {
    if (rows < kR) return multiply_tile_of<T, kR - 1, kV>(rows, vectors, arguments...);
  }
  multiply_tile<T, kR, kV>(arguments...);
}

// A product C = A B or C += A B. B is packed: panels of at most kPanel vectors, each (inner, panel).
template <typename T>
struct Product {
  int64_t rows, columns, inner;
  const T *a;
  int64_t a_row, a_step;
  const T *b;
  T *c;
  int64_t c_row;
  bool add;

  // `depth` steps of the inner dimension from `k` on, for a tile.
  void at(int64_t row, int64_t count, int64_t first, int64_t vectors, int64_t k, int64_t depth) const {
    constexpr int64_t kW = kWidth<T>;
    const int64_t column = first * kW, wide = vectors * kW;
    const T *const left = a + row * a_row + k * a_step, *const right = b + column * inner + k * wide;
    T *const out = c + row * c_row + column;
    const bool more = add || k > 0;
    if (column + wide <= columns) {
      return multiply_tile_of<T, kRows, kPanel>(count, vectors, depth, left, a_row, a_step, right, out, c_row, more);
    }
    alignas(kVectorBytes) T padded[kAccumulators * kWidth<T>] = {};
    const int64_t valid = columns - column;
    if (more) {
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t v = 0; v < valid; ++v) padded[r * wide + v] = out[r * c_row + v];
      }
    }
    multiply_tile_of<T, kRows, kPanel>(count, vectors, depth, left, a_row, a_step, right, padded, wide, more);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t v = 0; v < valid; ++v) out[r * c_row + v] = padded[r * wide + v];
    }
  }
  // For an A that comes from memory: the next rows are asked for in good time. In slices of the inner dimension, whose
  // B stays in the second cache.
  void by_rows() const {
    constexpr int64_t kNumbers = kLine / int64_t(sizeof(T));  // in a line
    const int64_t panels = (round_up(columns, kWidth<T>) / kWidth<T> + kPanel - 1) / kPanel;
    parts<kSlice>(inner, [&](int64_t k, int64_t depth) {
      parts<kRows>(rows, [&](int64_t row, int64_t count) {
        const int64_t row_lines = (depth + kNumbers - 1) / kNumbers, ahead = min(count, rows - row - count) * row_lines;
        int64_t line = 0, panel = 0;
        parts<kPanel>(round_up(columns, kWidth<T>) / kWidth<T>, [&](int64_t first, int64_t vectors) {
          for (const int64_t until = ahead * ++panel / panels; line < until; ++line) {
            __builtin_prefetch(a + (row + count + line / row_lines) * a_row + k + line % row_lines * kNumbers);
          }
          at(row, count, first, vectors, k, depth);
        });
      });
    });
  }
  void by_panels() const {
    parts<kPanel>(round_up(columns, kWidth<T>) / kWidth<T>, [&](int64_t first, int64_t vectors) {
      parts<kRows>(rows, [&](int64_t row, int64_t count) { at(row, count, first, vectors, 0, inner); });
    });
  }
};

// Hands out pieces of a block of memory; without a block it only counts.
struct Pieces {
  char *memory;
  int64_t used;

  template <typename T>
  T *take(int64_t count) {
    T *const piece = reinterpret_cast<T *>(memory + used);
    used += round_up(count * int64_t(sizeof(T)), 64);
    return memory ? piece : nullptr;
  }
};

template <typename T>
struct Thread {
  T *maximum, *sum;                      // (lanes) of this thread's words: running maximum, sum of exp(logit - maximum)
  double *picked, *total;                // (lanes) sums of the targets' logits and of all logits
  T *overall, *inverse, *factor, *even;  // (lanes)
  T *shift;                              // (chunks, lanes): the maximum that a chunk's exponentials were made with
  T *chunk;                              // (kChunk, lanes), unless the block's logits are stored
  T *words;                              // (kChunk, columns) of the weight
  T *grad_hidden;                        // (rows, columns)
};

template <typename T>
struct Plan {
  bool stored, gradient;
  int64_t block_rows, lanes, columns, chunks;  // chunks: the most of a thread
  int64_t *kept, *counts;                      // rows that have a target, and how many
  T *by_hidden;                                // the rows, packed as panels of rows: (hidden, lanes)
  T *by_row;                                   // packed as panels of hidden: (rows, columns)
  T *logits;                                   // (vocabulary, lanes), if stored
  Thread<T> *threads;
  int64_t bytes;

  Plan(const CrossEntropy &p, void *memory) {
    constexpr int64_t kW = kWidth<T>;
    gradient = p.grad_hidden || p.grad_weight || p.grad_bias;
    stored = gradient && !p.known_lse;
    block_rows = min(p.block_rows, p.rows);
    // An odd number of vectors: rows of the logits must not share a few sets of the caches.
    lanes = (round_up(block_rows, kW) / kW | 1) * kW;
    columns = round_up(p.hidden_size, kW);
    chunks = (p.vocabulary + kChunk - 1) / kChunk;
    Pieces pieces{static_cast<char *>(memory), 0};
    kept = pieces.take<int64_t>(p.rows), counts = pieces.take<int64_t>(p.rows);
    by_hidden = pieces.take<T>(lanes * p.hidden_size);
    by_row = pieces.take<T>(p.grad_weight ? block_rows * columns : 0);
    logits = pieces.take<T>(stored ? p.vocabulary * lanes : 0);
    threads = pieces.take<Thread<T>>(p.workspaces);
    for (int64_t i = 0; i < p.workspaces; ++i) {
      Thread<T> t;
      t.maximum = pieces.take<T>(lanes), t.sum = pieces.take<T>(lanes);
      t.picked = pieces.take<double>(lanes), t.total = pieces.take<double>(lanes);
      t.overall = pieces.take<T>(lanes), t.inverse = pieces.take<T>(lanes), t.factor = pieces.take<T>(lanes),
      t.even = pieces.take<T>(lanes);
      t.shift = pieces.take<T>(stored ? chunks * lanes : 0);
      t.chunk = pieces.take<T>(stored ? 0 : kChunk * lanes);
      t.words = pieces.take<T>(p.grad_hidden || p.dtype > DType::kFloat64 ? kChunk * columns : 0);
      t.grad_hidden = pieces.take<T>(p.grad_hidden ? block_rows * columns : 0);
      if (memory) threads[i] = t;
    }
    bytes = pieces.used;
  }
};

// Finds the rows that have a target. Returns their number, or -1 - element for a target out of range.
int64_t find_rows(const CrossEntropy &p, int64_t *kept, int64_t *counts) {
  int64_t found = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    int64_t count = 0;
    for (int64_t i = row * p.words; i < (row + 1) * p.words; ++i) {
      const int64_t target = p.target[i];
      if (target == p.ignore_index) continue;
      if (target < 0 || target >= p.vocabulary) return -1 - i;
      ++count;
    }
    if (!count) continue;
    counts[found] = count;
    kept[found++] = row;
  }
  return found;
}

// A block of rows, as one thread sees it.
template <typename S>
struct Block {
  using T = typename ComputeType<S>::type;
  using V = typename VectorOf<T>::type;
  static constexpr int64_t kW = kWidth<T>;
  static constexpr T kLowest = T(-3.4e38);  // finite: less itself it is zero

  const CrossEntropy &p;
  const Plan<T> &plan;
  Thread<T> &own;
  const int64_t *kept, *counts;  // of this block
  int64_t rows, lanes, first_word, end_word;
  int thread, team;
  bool first_block;

  const T *scales() const { return static_cast<const T *>(p.scale); }
  T scale_of(int64_t r) const { return scales() ? scales()[kept[r]] : T(1); }
  T bias_of(int64_t word) const { return p.bias ? load(static_cast<const S *>(p.bias)[word]) : T(0); }
  const S *words_at(int64_t word) const { return static_cast<const S *>(p.weight) + word * p.hidden_size; }

  template <typename Each>  // each(row, word) for the targets in [first, end)
  void targets(int64_t first, int64_t end, Each each) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t *const target = p.target + kept[r] * p.words;
      for (int64_t i = 0; i < p.words; ++i) {
        if (target[i] >= first && target[i] < end && target[i] != p.ignore_index) each(r, target[i]);
      }
    }
  }

  // Packs this thread's share of the rows both ways.
  void pack() const {
    const S *const hidden = static_cast<const S *>(p.hidden);
    const int64_t H = p.hidden_size;
    int64_t part = 0;
    parts<kPanel>(lanes / kW, [&](int64_t first, int64_t vectors) {
      if (part++ % team != thread) return;
      T *const panel = plan.by_hidden + first * kW * H;
      const int64_t width = vectors * kW;
      for (int64_t lane = 0; lane < width; ++lane) {
        const int64_t r = first * kW + lane;
        if (r < rows) {
          const S *const from = hidden + kept[r] * H;
          for (int64_t k = 0; k < H; ++k) panel[k * width + lane] = load(from[k]);
        } else {
          for (int64_t k = 0; k < H; ++k) panel[k * width + lane] = T(0);
        }
      }
    });
    if (!p.grad_weight) return;
    parts<kPanel>(plan.columns / kW, [&](int64_t first, int64_t vectors) {
      if (part++ % team != thread) return;
      pack_panel(plan.by_row, rows, first, vectors, [&](int64_t r) { return hidden + kept[r] * H; });
    });
  }

  // Copies columns [first, first + vectors) of `count` rows behind each other, with zeros beyond the last column.
  template <typename Row>
  void pack_panel(T *to, int64_t count, int64_t first, int64_t vectors, Row row) const {
    const int64_t width = vectors * kW, column = first * kW, valid = min(width, p.hidden_size - column);
    T *__restrict panel = to + column * count;
    for (int64_t i = 0; i < count; ++i, panel += width) {
      const S *const from = row(i) + column;
#pragma omp simd
      for (int64_t k = 0; k < valid; ++k) panel[k] = load(from[k]);
      for (int64_t k = valid; k < width; ++k) panel[k] = T(0);
    }
  }

  // logits (count, lanes) of the words from `word` on, without the bias.
  void product(int64_t word, int64_t count, T *logits) const {
    const int64_t H = p.hidden_size;
    if (H == 0) return void(std::memset(logits, 0, size_t(count * lanes) * sizeof(T)));
    const T *a;
    if constexpr (sizeof(S) == sizeof(T)) {
      a = reinterpret_cast<const T *>(words_at(word));
    } else {
      const S *const from = words_at(word);
      T *__restrict to = own.words;
#pragma omp simd
      for (int64_t i = 0; i < count * H; ++i) to[i] = load(from[i]);
      a = own.words;
    }
    Product<T>{count, lanes, H, a, H, 1, plan.by_hidden, logits, lanes, false}.by_rows();
  }

  // Adds a chunk to the running maximum and sum; leaves exp(logit - maximum) in place if `keep`. A vector of lanes goes
  // through all words before the next: its logits are then still in the first cache for the exponentials.
  template <bool keep>
  void accumulate(int64_t word, int64_t count, T *__restrict logits) const {
    T bias[kChunk];
    for (int64_t i = 0; i < count; ++i) bias[i] = bias_of(word + i);
    targets(word, word + count, [&](int64_t r, int64_t target) {
      own.picked[r] += double(logits[(target - word) * lanes + r] + bias[target - word]);
    });
    for (int64_t first = 0; first < lanes; first += kW) {
      T *__restrict x = logits + first, *__restrict maximum = own.maximum + first, *__restrict sum = own.sum + first;
      const auto at = [&](int64_t i) -> V & { return *reinterpret_cast<V *>(x + i * lanes); };
      V largest = *reinterpret_cast<V *>(maximum), total = {}, added = {};
      for (int64_t i = 0; i < count; ++i) {
        const V logit = at(i) + bias[i];
        largest = logit > largest ? logit : largest;
      }
      if (p.label_smoothing > 0) {
        for (int64_t i = 0; i < count; ++i) total += at(i) + bias[i];
        for (int r = 0; r < kW; ++r) own.total[first + r] += double(total[r]);
      }
      T e[kW];
      for (int64_t i = 0; i < count; ++i) {
        const V difference = at(i) + bias[i] - largest;
#pragma omp simd
        for (int r = 0; r < kW; ++r) e[r] = exp(difference[r]);
        added += *reinterpret_cast<V *>(e);
        if constexpr (keep) at(i) = *reinterpret_cast<V *>(e);
      }
      for (int r = 0; r < kW; ++r) {
        sum[r] = sum[r] * exp(maximum[r] - largest[r]) + added[r];
        maximum[r] = largest[r];
      }
    }
  }

  // Joins the threads' maxima and sums. Every thread does so for itself; the first writes the results.
  void join(const Thread<T> *threads) const {
    T *__restrict overall = own.overall, *__restrict inverse = own.inverse;
    for (int64_t r = 0; r < lanes; ++r) {
      overall[r] = threads[0].maximum[r];
      inverse[r] = T(0);
    }
    for (int i = 1; i < team; ++i) {
      for (int64_t r = 0; r < lanes; ++r) overall[r] = max(overall[r], threads[i].maximum[r]);
    }
    for (int i = 0; i < team; ++i) {
      for (int64_t r = 0; r < lanes; ++r) inverse[r] += threads[i].sum[r] * exp(threads[i].maximum[r] - overall[r]);
    }
    for (int64_t r = 0; r < rows && thread == 0; ++r) {
      double picked = 0, total = 0;
      for (int i = 0; i < team; ++i) picked += threads[i].picked[r], total += threads[i].total[r];
      const T sum = overall[r] > kLowest ? inverse[r] : T(NAN);  // every word is masked, as softmax has it
      const double log_sum = double(sum == sum ? log(sum) : sum), maximum = double(overall[r]);  // log loses NaN
      const double count = double(counts[r]), smoothing = p.label_smoothing;
      // Subtracting the maximum first keeps a small loss's digits when the logits are large.
      double loss = count * log_sum - (1 - smoothing) * (picked - count * maximum);
      if (smoothing > 0) loss -= smoothing * count * (total / double(p.vocabulary) - maximum);
      static_cast<T *>(p.losses)[kept[r]] = T(loss);
      static_cast<T *>(p.lse)[kept[r]] = T(maximum + log_sum);
    }
    for (int64_t r = 0; r < lanes; ++r) inverse[r] = T(1) / inverse[r];
  }

  // Turns exponentials, or with `known_lse` logits, into the gradient of the logits.
  void to_gradient(int64_t word, int64_t count, const T *shift, T *logits) const {
    T *__restrict factor = own.factor;
    for (int64_t r = 0; r < lanes; ++r) factor[r] = r < rows ? scale_of(r) * T(counts[r]) : T(0);
    T *__restrict even = own.even;  // what label smoothing asks of each word
    for (int64_t r = 0; r < lanes; ++r) even[r] = factor[r] * T(p.label_smoothing / double(p.vocabulary));
    if (p.known_lse) {
      const T *__restrict lse = own.overall;
      for (int64_t i = 0; i < count; ++i) {
        T *__restrict x = logits + i * lanes;
        const T bias = bias_of(word + i);
#pragma omp simd
        for (int64_t r = 0; r < lanes; ++r) x[r] = exp(x[r] + bias - lse[r]) * factor[r] - even[r];
      }
    } else {
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) factor[r] *= exp(shift[r] - own.overall[r]) * own.inverse[r];
      for (int64_t i = 0; i < count; ++i) {
        T *__restrict x = logits + i * lanes;
#pragma omp simd
        for (int64_t r = 0; r < lanes; ++r) x[r] = x[r] * factor[r] - even[r];
      }
    }
    targets(word, word + count, [&](int64_t r, int64_t target) {
      logits[(target - word) * lanes + r] -= scale_of(r) * T(1 - p.label_smoothing);
    });
  }

  // What a chunk's gradient gives the weight, the bias and this thread's part of the rows.
  void gradients(int64_t word, int64_t count, const T *logits) const {
    const int64_t H = p.hidden_size;
    if (p.grad_bias) {
      T *const grad = static_cast<T *>(p.grad_bias) + word;
      for (int64_t i = 0; i < count; ++i) {
        const T *__restrict x = logits + i * lanes;
        T sum = T(0);
#pragma omp simd reduction(+ : sum)
        for (int64_t r = 0; r < rows; ++r) sum += x[r];
        grad[i] = first_block ? sum : grad[i] + sum;
      }
    }
    if (p.grad_weight) {
      T *const grad = static_cast<T *>(p.grad_weight) + word * H;
      Product<T>{count, H, rows, logits, lanes, 1, plan.by_row, grad, H, !first_block}.by_rows();
    }
    if (p.grad_hidden) {
      parts<kPanel>(plan.columns / kW, [&](int64_t first, int64_t vectors) {
        pack_panel(own.words, count, first, vectors, [&](int64_t i) { return words_at(word + i); });
      });
      Product<T>{rows,  plan.columns, count,           logits,       1,
                 lanes, own.words,    own.grad_hidden, plan.columns, word > first_word}
          .by_panels();
    }
  }

  template <typename Each>  // each(chunk, word, count)
  void chunks(Each each) const {
    parts<kChunk>(end_word - first_word, [&, chunk = int64_t(0)](int64_t first, int64_t count) mutable {
      each(chunk++, first_word + first, count);
    });
  }

  void run() const {
    const Thread<T> *const threads = plan.threads;
    pack();
    barrier();
    if (!p.known_lse) {
      for (int64_t r = 0; r < lanes; ++r) {
        own.maximum[r] = kLowest, own.sum[r] = T(0), own.picked[r] = 0, own.total[r] = 0;
      }
      chunks([&](int64_t chunk, int64_t word, int64_t count) {
        T *const logits = plan.stored ? plan.logits + word * lanes : own.chunk;
        product(word, count, logits);
        if (!plan.stored) return accumulate<false>(word, count, logits);
        accumulate<true>(word, count, logits);
        std::memcpy(own.shift + chunk * lanes, own.maximum, size_t(lanes) * sizeof(T));
      });
      barrier();
      join(threads);
    } else {
      for (int64_t r = 0; r < lanes; ++r) own.overall[r] = r < rows ? static_cast<const T *>(p.lse)[kept[r]] : T(0);
    }
    if (plan.gradient) {
      chunks([&](int64_t chunk, int64_t word, int64_t count) {
        T *const logits = plan.stored ? plan.logits + word * lanes : own.chunk;
        if (!plan.stored) product(word, count, logits);
        to_gradient(word, count, plan.stored ? own.shift + chunk * lanes : nullptr, logits);
        gradients(word, count, logits);
      });
    }
    barrier();
    if (!p.grad_hidden) return;
    for (int64_t r = thread; r < rows; r += team) {
      T *__restrict to = static_cast<T *>(p.grad_hidden) + kept[r] * p.hidden_size;
      for (int64_t k = 0; k < p.hidden_size; ++k) to[k] = T(0);
      for (int i = 0; i < team; ++i) {
        if (p.vocabulary * i / team == p.vocabulary * (i + 1) / team) continue;  // no word, nothing written
        const T *__restrict from = threads[i].grad_hidden + r * plan.columns;
#pragma omp simd
        for (int64_t k = 0; k < p.hidden_size; ++k) to[k] += from[k];
      }
    }
  }
};

template <typename T>
void fill_zero(void *to, int64_t count) {
  if (to) std::memset(to, 0, size_t(count) * sizeof(T));
}

template <typename S>
int64_t run(const CrossEntropy &p) {
  using T = typename ComputeType<S>::type;
  const Plan<T> plan(p, p.memory);
  const int64_t found = find_rows(p, plan.kept, plan.counts);
  if (found < 0) return found;
  if (!p.known_lse) fill_zero<T>(p.losses, p.rows), fill_zero<T>(p.lse, p.rows);
  if (found < p.rows) fill_zero<T>(p.grad_hidden, p.rows * p.hidden_size);
  if (found == 0) {
    fill_zero<T>(p.grad_weight, p.vocabulary * p.hidden_size), fill_zero<T>(p.grad_bias, p.vocabulary);
    return 0;
  }
  const int64_t blocks = (found + plan.block_rows - 1) / plan.block_rows;
  const int threads = int(
      min<int64_t>(threads_for(found * p.vocabulary * max<int64_t>(p.hidden_size, 1), 1 << 19), p.workspaces));
#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_index(), team = thread_count();
    const FlushDenormals flush;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = found * i / blocks, rows = found * (i + 1) / blocks - first;
      const int64_t lanes = (round_up(rows, kWidth<T>) / kWidth<T> | 1) * kWidth<T>;
      Block<S>{p,
               plan,
               plan.threads[thread],
               plan.kept + first,
               plan.counts + first,
               rows,
               lanes,
               p.vocabulary * thread / team,
               p.vocabulary * (thread + 1) / team,
               thread,
               team,
               i == 0}
          .run();
    }
  }
  return found;
}

}  // namespace

int64_t cross_entropy(const CrossEntropy &p) {
  switch (p.dtype) {
    case DType::kFloat64: return run<double>(p);
    case DType::kBFloat16: return run<BFloat16>(p);
    case DType::kFloat16: return run<Float16>(p);
    default: return run<float>(p);
  }
}

int64_t cross_entropy_workspace(const CrossEntropy &p) {
  return p.dtype == DType::kFloat64 ? Plan<double>(p, nullptr).bytes : Plan<float>(p, nullptr).bytes;
}

}  // namespace fastvae::FASTVAE_ISA
