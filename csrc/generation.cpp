// Sentences from an LSTM decoder: greedy, sampled or by beam search, all steps of a batch in one call
// (fastvae/ops/generation.py holds the definition).
//
// A step is a recurrent product for each layer, the gates its epilogue; the product with the vocabulary, whose epilogue
// keeps of each panel of columns the maximum and the sum of exponentials; and the choice of the next words. FLOPs per
// row and step: 2 hidden vocabulary + 8 hidden^2 (16 hidden^2 in upper layers). The weights are read once a step, by
// threads that share out their columns: at one row that is the limit, 4 hidden vocabulary bytes. The input's share of
// the gates depends on the word alone: it is kept in a table and made when a word first occurs.
//
// Every sum runs in an order that depends on neither the rows around nor the threads: a sentence is the same to the bit
// in any batch. Sentences that have ended leave the batch.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "philox.h"
#include "recurrence.h"

namespace fastvae::FASTVAE_ISA {
namespace {

constexpr int64_t kTableBytes = 64 << 20;
constexpr int64_t kScreenedRows = 8;  // more are bound by their products, not by the weights' bytes
constexpr double kNothing = -__builtin_inf();

constexpr int kPanelVectors = 3;
template <typename T>
constexpr int64_t kPanel = kPanelVectors * kWidth<T>;  // words in a panel

constexpr int kScreenVectors = 6;
constexpr int64_t kScreenWords = kScreenVectors * kWidth<float>;

// Candidates, best first; of equal ones the first by index.
struct Entry {
  double value;
  int64_t index;
};
FASTVAE_INLINE bool before(const Entry &a, const Entry &b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}
void sift_down(Entry *heap, int64_t count, int64_t at) {
  const Entry moving = heap[at];
  for (int64_t child; (child = 2 * at + 1) < count; at = child) {
    if (child + 1 < count && before(heap[child + 1], heap[child])) ++child;
    if (!before(heap[child], moving)) break;
    heap[at] = heap[child];
  }
  heap[at] = moving;
}
void make_heap(Entry *heap, int64_t count) {
  for (int64_t i = count / 2; i-- > 0;) sift_down(heap, count, i);
}
// Takes the best of `count`, which goes to heap[count - 1]; what is popped in turn lies there best last.
Entry pop(Entry *heap, int64_t count) {
  const Entry best = heap[0];
  heap[0] = heap[count - 1];
  sift_down(heap, count - 1, 0);
  heap[count - 1] = best;
  return best;
}

// The sum over a panel of exp((x - maximum) * scale), and log-sum-exp over panels.
template <typename T>
FASTVAE_INLINE T panel_maximum(const T *x) {
  T maximum = T(kNothing);
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < kPanel<T>; ++j) maximum = x[j] > maximum ? x[j] : maximum;
  return maximum;
}
template <typename T>
FASTVAE_INLINE T panel_sum(const T *x, T maximum, T scale) {
  constexpr int64_t W = kWidth<T>;
  T lanes[W];
#pragma omp simd
  for (int64_t j = 0; j < W; ++j) {
    lanes[j] = exp((x[j] - maximum) * scale);
    for (int v = 1; v < kPanelVectors; ++v) lanes[j] += exp((x[v * W + j] - maximum) * scale);
  }
  // By halves: compilers add the lanes of a reduction one after the other.
  for (int64_t half = W / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return maximum > T(kNothing) ? lanes[0] : T(0);
}
struct Mass {
  double maximum, sum;  // of exp((x - maximum) * scale)
};
template <typename T>
Mass total_mass(const T *maxima, const T *sums, int64_t panels, double scale) {
  T maximum = T(kNothing);
#pragma omp simd reduction(max : maximum)
  for (int64_t p = 0; p < panels; ++p) maximum = maxima[p] > maximum ? maxima[p] : maximum;
  if (!(maximum > T(kNothing))) return {kNothing, 0.0};
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t p = 0; p < panels; ++p) sum += double(sums[p]) * double(exp((maxima[p] - maximum) * T(scale)));
  return {double(maximum), sum};
}

// Where everything lies in the caller's memory.
template <typename T>
struct Work {
  static constexpr int64_t W = kWidth<T>, G = 4 * W, N = kPanel<T>;
  int64_t rows, blocks, units, gates, panels, capacity;
  T *packed_input, *packed_gates, *packed_output, *output_bias;
  T *static_gates, *upper_bias, *table, *fresh_inputs;
  T *inputs, *cells;  // (layers, 2 sides, rows, 2 units) and (layers, 2 sides, rows, units)
  T *logits, *maxima, *sums, *all_maxima, *all_sums;
  T *best, *history_scores, *word_score;
  int64_t *best_word, *slot_of, *fresh_words, *fresh_slots, *words, *slots, *parents, *from, *sequences, *history;
  int64_t *counts;
  double *totals, *next_totals, *bases, *finished;
  Entry *heaps;
  int64_t heap_size, bytes, screen_panels;
  bool screened;
  int8_t *done, *screen;
  T *screen_scale, *screen_bias, *uppers, *upper_maxima, *chosen;

  explicit Work(const Generation &g) {
    const int64_t H = g.hidden, E = g.embed, L = g.layers, V = g.vocabulary, B = g.batch, steps = g.max_length;
    const bool beam = g.strategy == kBeam;
    rows = B * g.beams, blocks = (H + W - 1) / W, units = blocks * W, gates = 4 * units;
    panels = (V + N - 1) / N;
    capacity = max<int64_t>(rows, min<int64_t>(V, kTableBytes / max<int64_t>(gates * int64_t(sizeof(T)), 1)));
    uintptr_t at = reinterpret_cast<uintptr_t>(g.memory);
    at = (at + 63) / 64 * 64;
    const auto take = [&](auto *&pointer, int64_t count) {
      pointer = reinterpret_cast<decltype(+pointer)>(at);
      at += uintptr_t((count * int64_t(sizeof(*pointer)) + 63) / 64 * 64);
    };
    take(packed_input, blocks * E * G);
    take(packed_gates, blocks * G * (H + (L - 1) * (units + H)));
    screened = !g.is_double && g.strategy == kGreedy && !g.log_probs && !g.stores_logits() && B <= kScreenedRows;
    screen_panels = screened ? (V + kScreenWords - 1) / kScreenWords : 0;
    take(screen, screen_panels * kScreenWords * H);
    take(screen_scale, screen_panels * kScreenWords), take(screen_bias, screen_panels * kScreenWords);
    take(uppers, screen_panels * kScreenWords * rows), take(upper_maxima, screen_panels * rows);
    take(chosen, screened ? g.threads * H * N : 0);
    take(packed_output, screened ? 0 : panels * H * N);
    take(output_bias, panels * N);
    take(static_gates, B * gates);
    take(upper_bias, (L - 1) * gates);
    take(table, capacity * gates);
    take(fresh_inputs, rows * E);
    take(inputs, L * 2 * rows * 2 * units);
    take(cells, L * 2 * rows * units);
    const bool stored = g.stores_logits();
    take(logits, stored ? rows * panels * N : 0);
    take(maxima, stored ? rows * panels : 0);
    take(sums, stored ? rows * panels : 0);
    take(all_maxima, g.log_probs ? rows * panels : 0);
    take(all_sums, g.log_probs ? rows * panels : 0);
    take(best, g.threads * rows);
    take(best_word, g.threads * rows);
    take(history, beam ? 2 * rows * steps : 0);
    take(history_scores, beam ? 2 * rows * steps : 0);
    take(word_score, rows);
    take(slot_of, V);
    take(fresh_words, rows), take(fresh_slots, rows), take(words, rows), take(slots, rows);
    take(parents, rows), take(from, rows), take(sequences, rows);
    take(totals, rows), take(next_totals, rows), take(bases, rows);
    take(counts, B);
    take(finished, B * g.n_best);
    take(done, B);
    heap_size = max(panels, panels * N) * g.beams;
    take(heaps, stored ? g.threads * heap_size : 0);
    bytes = int64_t(at - reinterpret_cast<uintptr_t>(g.memory));
  }

  T *input(int64_t layer, int64_t side, int64_t row) const {
    return inputs + ((layer * 2 + side) * rows + row) * 2 * units;
  }
  T *cell(int64_t layer, int64_t side, int64_t row) const { return cells + ((layer * 2 + side) * rows + row) * units; }
  // Of the words of a panel, those of all rows lie together: they are written together.
  T *panel_logits(int64_t row, int64_t panel) const { return logits + (panel * rows + row) * N; }
  T logit(int64_t row, int64_t word) const { return panel_logits(row, word / N)[word % N]; }
  T *packed_layer(int64_t layer, int64_t H) const {
    return packed_gates + (layer == 0 ? 0 : blocks * G * (H + (layer - 1) * (units + H)));
  }
};

// Columns [0, columns) of `to`, `width` apart per inner step, from rows of `from`; zero up to `full`.
template <typename T, int64_t full>
void pack(const T *from, int64_t stride, int64_t inner, int64_t columns, T *to, int64_t width) {
  if (columns == full) {
    constexpr int64_t kBlock = 64 / int64_t(sizeof(T));  // a cache line of each row at a time
    for (int64_t first = 0; first < inner; first += kBlock) {
      const int64_t last = min(first + kBlock, inner);
      for (int64_t k = first; k < last; ++k) {
#pragma omp simd
        for (int64_t j = 0; j < full; ++j) to[k * width + j] = from[j * stride + k];
      }
    }
    return;
  }
  for (int64_t k = 0; k < inner; ++k) {
    for (int64_t j = 0; j < full; ++j) to[k * width + j] = j < columns ? from[j * stride + k] : T(0);
  }
}

template <typename T>
void pack_gates(const T *from, int64_t stride, int64_t hidden, int64_t inner, int64_t unit, T *to) {
  constexpr int64_t W = kWidth<T>;
  for (int64_t gate = 0; gate < 4; ++gate) {
    pack<T, W>(from + (gate * hidden + unit) * stride, stride, inner, min(W, hidden - unit), to + gate * W, 4 * W);
  }
}

// The likeliest word of few rows is found without most of the weights' bits. With weights rounded to 8 bits, w = s q +
// at most s / 2, a logit is known to within s |h|_1 / 2 and some rounding; only words that may then still be the
// likeliest are computed, by the product that serves everywhere else. A quarter of the bytes, the same words.
// A vector of float from bytes; compilers do it one by one.
FASTVAE_INLINE VectorOf<float>::type widened(const int8_t *from) {
#if defined(__AVX512F__)
  return (VectorOf<float>::type)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif defined(__AVX2__)
  return (VectorOf<float>::type)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
  VectorOf<float>::type to;
  for (int i = 0; i < kWidth<float>; ++i) to[i] = float(from[i]);
  return to;
#endif
}

template <int kRows>
static __attribute__((noinline)) void screen_tile(int64_t inner, const float *h, int64_t stride, const int8_t *packed,
                                                  float *out) {
  constexpr int kW = kVectorBytes / 4;
  using V = VectorOf<float>::type;
  V sums[kRows][kScreenVectors] = {};
  for (int64_t k = 0; k < inner; ++k, packed += kScreenWords) {
    for (int v = 0; v < kScreenVectors; ++v) {
      const V q = widened(packed + v * kW);
      for (int r = 0; r < kRows; ++r) sums[r][v] += h[r * stride + k] * q;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kScreenVectors; ++v) *reinterpret_cast<V *>(out + r * kScreenWords + v * kW) = sums[r][v];
  }
}

// Rounds the weights of a panel of words to 8 bits. Forbidden words get a bias of minus infinity.
void pack_screen(const Generation &g, const Work<float> &w, int64_t panel) {
  constexpr int64_t kBlock = 64;
  const int64_t H = g.hidden;
  const float *weight = static_cast<const float *>(g.output_weight), *bias = static_cast<const float *>(g.output_bias);
  int8_t *to = w.screen + panel * H * kScreenWords;
  const float *rows[kScreenWords];
  float inverses[kScreenWords];
  for (int64_t j = 0; j < kScreenWords; ++j) {
    const int64_t word = panel * kScreenWords + j;
    const bool allowed = word < g.vocabulary && (word == g.eos || (word != g.bos && word != g.padding));
    const float *from = rows[j] = weight + (allowed ? word : 0) * H;
    float largest = 0, zero = 0;
#pragma omp simd reduction(max : largest) reduction(+ : zero)
    for (int64_t k = 0; k < H; ++k) {
      const float size = std::fabs(from[k]);
      largest = size > largest ? size : largest;
      zero += from[k] * 0.0f;
    }
    const bool finite = zero == 0;  // else NaN; what is not finite is never screened out
    inverses[j] = finite && largest > 1e-30f ? 127.0f / largest : 0.0f;
    w.screen_scale[word] = !finite ? -float(kNothing) : inverses[j] > 0 ? largest / 127.0f : 2.0f * largest;
    w.screen_bias[word] = allowed ? bias[word] : float(kNothing);
  }
  int8_t rounded[kScreenWords][kBlock];
  for (int64_t first = 0; first < H; first += kBlock) {
    const int64_t count = min(kBlock, H - first);
    for (int64_t j = 0; j < kScreenWords; ++j) {
      const float *from = rows[j] + first, inverse = inverses[j];
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) {
        const float q = inverse > 0 ? from[k] * inverse : 0.0f;
        rounded[j][k] = int8_t(int32_t(q < 0 ? q - 0.5f : q + 0.5f));
      }
    }
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t j = 0; j < kScreenWords; ++j) to[(first + k) * kScreenWords + j] = rounded[j][k];
    }
  }
}

FASTVAE_INLINE float screen_margin(const float *h, int64_t hidden) {
  float size = 0;
#pragma omp simd reduction(+ : size)
  for (int64_t k = 0; k < hidden; ++k) size += std::fabs(h[k]);
  // Half a step of 8 bits, and the rounding of both sums of `hidden` terms.
  return size * (0.52f + 127.0f * 1.1920929e-7f * float(hidden + 8)) + 1e-30f;
}

template <int kRows>
FASTVAE_INLINE void screen_rows(int64_t rows, int64_t inner, const float *h, int64_t stride, const int8_t *packed,
                                float *out) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return screen_tile<kRows>(inner, h, stride, packed, out);
    screen_rows<kRows - 1>(rows, inner, h, stride, packed, out);
  }
}

void screen(const Generation &g, const Work<float> &w) {
  constexpr int64_t kRows = kAccumulators / kScreenVectors;
  const int64_t P = w.screen_panels, stride = 2 * w.units;
  const float *h = w.input(g.layers - 1, 1 - g.side, 0) + w.units;
  float margins[kScreenedRows], *lower = w.best + thread_index() * w.rows;
  for (int64_t row = 0; row < g.active; ++row) {
    margins[row] = screen_margin(h + row * stride, g.hidden), lower[row] = float(kNothing);
  }
  alignas(kVectorBytes) float products[kRows * kScreenWords];
  const Range panels = my_share(P);
  for (int64_t panel = panels.first; panel < panels.last; ++panel) {
    const float *scale = w.screen_scale + panel * kScreenWords, *bias = w.screen_bias + panel * kScreenWords;
    for (int64_t first = 0; first < g.active; first += kRows) {
      const int64_t count = min(kRows, g.active - first);
      screen_rows<kRows>(count, g.hidden, h + first * stride, stride, w.screen + panel * g.hidden * kScreenWords,
                         products);
      for (int64_t row = first; row < first + count; ++row) {
        const float *x = products + (row - first) * kScreenWords, margin = margins[row];
        float *upper = w.uppers + (row * P + panel) * kScreenWords, highest = float(kNothing), least = lower[row];
#pragma omp simd reduction(max : highest, least)
        for (int64_t j = 0; j < kScreenWords; ++j) {
          const float slack = std::fabs(bias[j]) * 1e-6f;
          const float above = scale[j] * (x[j] + margin) + bias[j] + slack;
          const float below = scale[j] * (x[j] - margin) + bias[j] - slack;
          upper[j] = above;
          highest = above > highest ? above : highest;
          least = below > least ? below : least;
        }
        w.upper_maxima[row * P + panel] = highest, lower[row] = least;
      }
    }
  }
}

int64_t likeliest_screened(const Generation &g, const Work<float> &w, int64_t row) {
  constexpr int64_t N = kPanel<float>;
  const float *weight = static_cast<const float *>(g.output_weight), *bias = static_cast<const float *>(g.output_bias);
  const float *h = w.input(g.layers - 1, 1 - g.side, row) + w.units;
  float least = float(kNothing), best = float(kNothing), *packed = w.chosen + thread_index() * g.hidden * N;
  for (int64_t thread = 0; thread < g.used_threads; ++thread) least = max(least, w.best[thread * w.rows + row]);
  int64_t words[N], count = 0, likeliest = -1;
  const auto compute = [&] {
    multiply_packed<float, kPanelVectors>(1, g.hidden, h, 0, packed, [&](int64_t, int, const float *product) {
      for (int64_t i = 0; i < count; ++i) {
        const float logit = product[i] + bias[words[i]];
        if (logit > best) best = logit, likeliest = words[i];
      }
    });
    count = 0;
  };
  for (int64_t panel = 0; panel < w.screen_panels; ++panel) {
    if (!(w.upper_maxima[row * w.screen_panels + panel] >= least)) continue;
    const float *upper = w.uppers + (row * w.screen_panels + panel) * kScreenWords;
    for (int64_t j = 0; j < kScreenWords; ++j) {
      if (!(upper[j] >= least && upper[j] > float(kNothing))) continue;
      const int64_t word = words[count] = panel * kScreenWords + j;
      for (int64_t k = 0; k < g.hidden; ++k) packed[k * N + count] = weight[word * g.hidden + k];
      if (++count == N) compute();
    }
  }
  if (count > 0) compute();
  return likeliest;
}
int64_t likeliest_screened(const Generation &, const Work<double> &, int64_t) { return -1; }
void screen(const Generation &, const Work<double> &) {}
void pack_screen(const Generation &, const Work<double> &, int64_t) {}

// Packs the weights and sets up the batch; called once by every thread.
template <typename T>
void start(Generation &g, const Work<T> &w) {
  constexpr int64_t W = Work<T>::W, G = Work<T>::G, N = Work<T>::N;
  const int64_t H = g.hidden, L = g.layers;
  const T *weight_hh = static_cast<const T *>(g.weight_hh), *weight_ih = static_cast<const T *>(g.weight_ih);
  const T *static_gates = static_cast<const T *>(g.static_gates), *bias = static_cast<const T *>(g.bias);
  const T *h0 = static_cast<const T *>(g.h0), *c0 = static_cast<const T *>(g.c0);
  const Range blocks = my_share(w.blocks), panels = my_share(w.panels), rows = my_share(w.rows);
  for (int64_t block = blocks.first; block < blocks.last; ++block) {
    const int64_t unit = block * W, valid = min(W, H - unit);
    pack_gates(static_cast<const T *>(g.weight_input), g.input_stride, H, g.embed, unit,
               w.packed_input + block * g.embed * G);
    for (int64_t layer = 0; layer < L; ++layer) {
      T *to = w.packed_layer(layer, H) + block * (layer == 0 ? H : w.units + H) * G;
      if (layer > 0) {
        pack_gates(weight_ih + (layer - 1) * 4 * H * H, H, H, H, unit, to);
        std::memset(to + H * G, 0, size_t((w.units - H) * G) * sizeof(T));
        to += w.units * G;
      }
      pack_gates(weight_hh + layer * 4 * H * H, H, H, H, unit, to);
    }
    const auto spread = [&](const T *from, int64_t count, T *to) {  // (count, 4 hidden) to the order of the tiles
      for (int64_t i = 0; i < count * 4; ++i) {
        for (int64_t j = 0; j < W; ++j) {
          to[i / 4 * w.gates + block * G + i % 4 * W + j] = j < valid ? from[i * H + unit + j] : T(0);
        }
      }
    };
    spread(static_gates, g.batch, w.static_gates);
    spread(bias, L - 1, w.upper_bias);
  }
  const T *output_weight = static_cast<const T *>(g.output_weight),
          *output_bias = static_cast<const T *>(g.output_bias);
  const Range screens = my_share(w.screen_panels);
  for (int64_t panel = screens.first; panel < screens.last; ++panel) pack_screen(g, w, panel);
  for (int64_t panel = panels.first; panel < panels.last && !w.screened; ++panel) {
    const int64_t first = panel * N, valid = min(N, g.vocabulary - first);
    pack<T, N>(output_weight + first * H, H, H, valid, w.packed_output + panel * H * N, N);
    for (int64_t j = 0; j < N; ++j) w.output_bias[first + j] = j < valid ? output_bias[first + j] : T(kNothing);
  }
  for (int64_t row = rows.first; row < rows.last; ++row) {
    const int64_t sequence = row / g.beams;
    for (int64_t layer = 0; layer < L; ++layer) {
      T *state = w.input(layer, 0, row) + w.units, *cell = w.cell(layer, 0, row);
      const int64_t from = (layer * g.batch + sequence) * H;
      for (int64_t unit = 0; unit < w.units; ++unit) {
        state[unit] = unit < H ? h0[from + unit] : T(0);
        cell[unit] = unit < H ? c0[from + unit] : T(0);
      }
    }
    w.words[row] = g.bos, w.slots[row] = 0;
    // The beams of a sentence start out alike: only the first may be extended.
    w.totals[row] = row % g.beams == 0 ? 0.0 : kNothing;
    if (row % g.beams == 0) w.sequences[sequence] = sequence, w.counts[sequence] = 0;
  }
  if (thread_index() == 0) {
    for (int64_t word = 0; word < g.vocabulary; ++word) w.slot_of[word] = -1;
    w.slot_of[g.bos] = 0, w.fresh_words[0] = g.bos, w.fresh_slots[0] = 0;
    g.fresh = g.table_used = 1;
    g.active = g.batch;
  }
}

// Brings the rows that go on to their places, and the embeddings of words that are new to the table.
template <typename T>
void gather(const Generation &g, const Work<T> &w) {
  const T *embedding = static_cast<const T *>(g.embedding);
  const Range fresh = my_share(g.fresh);
  for (int64_t i = fresh.first; i < fresh.last; ++i) {
    std::memcpy(w.fresh_inputs + i * g.embed, embedding + w.fresh_words[i] * g.embed, size_t(g.embed) * sizeof(T));
  }
  if (!g.moved) return;
  const Range rows = my_share(g.active * g.beams);
  const size_t state_bytes = size_t(w.units) * sizeof(T);
  for (int64_t row = rows.first; row < rows.last; ++row) {
    const int64_t from = w.from[row];
    for (int64_t layer = 0; layer < g.layers; ++layer) {
      std::memcpy(w.input(layer, g.side, row) + w.units, w.input(layer, 1 - g.side, from) + w.units, state_bytes);
      std::memcpy(w.cell(layer, g.cell_side, row), w.cell(layer, 1 - g.cell_side, from), state_bytes);
    }
    if (g.strategy == kBeam) {
      const int64_t to = (g.cell_side * w.rows + row) * g.max_length;
      const int64_t at = ((1 - g.cell_side) * w.rows + from) * g.max_length, before = g.step - 1;
      std::memcpy(w.history + to, w.history + at, size_t(before) * sizeof(int64_t));
      std::memcpy(w.history_scores + to, w.history_scores + at, size_t(before) * sizeof(T));
      w.history[to + before] = w.words[row], w.history_scores[to + before] = w.word_score[row];
    }
  }
}

template <typename T>
void recurrence(const Generation &g, const Work<T> &w, int64_t layer) {
  constexpr int64_t W = Work<T>::W, G = Work<T>::G;
  const int64_t rows = g.active * g.beams, inner = layer == 0 ? g.hidden : w.units + g.hidden;
  const Range blocks = my_share(w.blocks);
  for (int64_t block = blocks.first; block < blocks.last; ++block) {
    const int64_t unit = block * W;
    if (layer == 0) {
      multiply_packed<T, 4>(g.fresh, g.embed, w.fresh_inputs, g.embed, w.packed_input + block * g.embed * G,
                            [&](int64_t first, int count, const T *product) {
                              for (int r = 0; r < count; ++r) {
                                std::memcpy(w.table + w.fresh_slots[first + r] * w.gates + block * G, product + r * G,
                                            G * sizeof(T));
                              }
                            });
    }
    multiply_packed<T, 4>(
        rows, inner, w.input(layer, g.side, 0) + (layer == 0 ? w.units : 0), 2 * w.units,
        w.packed_layer(layer, g.hidden) + block * inner * G,
        [&](int64_t first, int count, const T *__restrict product) {
          for (int r = 0; r < count; ++r, product += G) {
            const int64_t row = first + r;
            const T *__restrict fixed = layer == 0 ? w.static_gates + w.sequences[row / g.beams] * w.gates + block * G
                                                   : w.upper_bias + (layer - 1) * w.gates + block * G;
            const T *__restrict word = w.table + w.slots[row] * w.gates + block * G;
            T *__restrict cell = w.cell(layer, g.cell_side, row) + unit;
            T *__restrict state = w.input(layer, 1 - g.side, row) + w.units + unit;
            const T uses_word = layer == 0 ? T(1) : T(0);
#pragma omp simd
            for (int64_t j = 0; j < W; ++j) {
              const auto gate = [&](int64_t n) __attribute__((always_inline)) {
                const T sum = product[n * W + j] + fixed[n * W + j];
                return uses_word != T(0) ? sum + word[n * W + j] : sum;
              };
              const T c = sigmoid(gate(1)) * cell[j] + sigmoid(gate(0)) * tanh(gate(2));
              cell[j] = c;
              state[j] = sigmoid(gate(3)) * tanh(c);
            }
            if (layer + 1 < g.layers) std::memcpy(w.input(layer + 1, g.side, row) + unit, state, W * sizeof(T));
          }
        });
  }
}

template <typename T>
void score(const Generation &g, const Work<T> &w) {
  constexpr int64_t N = Work<T>::N;
  const int64_t rows = g.active * g.beams, P = w.panels;
  const bool stored = g.stores_logits();
  const T scale = T(g.strategy == kSample ? 1 / g.temperature : 1);
  const int64_t forbidden[2] = {g.bos == g.eos ? -1 : g.bos, g.padding == g.eos ? -1 : g.padding};
  T *best = w.best + thread_index() * w.rows;
  int64_t *best_word = w.best_word + thread_index() * w.rows;
  for (int64_t row = 0; row < rows; ++row) best[row] = T(kNothing), best_word[row] = -1;
  const Range panels = my_share(P);
  for (int64_t panel = panels.first; panel < panels.last; ++panel) {
    const T *bias = w.output_bias + panel * N;
    multiply_packed<T, kPanelVectors>(
        rows, g.hidden, w.input(g.layers - 1, 1 - g.side, 0) + w.units, 2 * w.units,
        w.packed_output + panel * g.hidden * N,
        [&](int64_t first, int count, T *__restrict x) {
          for (int64_t row = first; row < first + count; ++row, x += N) {
#pragma omp simd
            for (int64_t j = 0; j < N; ++j) x[j] += bias[j];
            T maximum = panel_maximum(x);
            if (g.log_probs) {
              w.all_maxima[row * P + panel] = maximum;
              w.all_sums[row * P + panel] = panel_sum(x, maximum, T(1));
            }
            for (const int64_t word : forbidden) {
              if (word >= panel * N && word < panel * N + N)
                x[word - panel * N] = T(kNothing), maximum = panel_maximum(x);
            }
            if (!stored) {
              if (maximum > best[row]) {
                int64_t j = 0;
                while (x[j] != maximum) ++j;
                best[row] = maximum, best_word[row] = panel * N + j;
              }
              continue;
            }
            std::memcpy(w.panel_logits(row, panel), x, N * sizeof(T));
            w.maxima[row * P + panel] = maximum;
            if (g.sums_mass()) w.sums[row * P + panel] = panel_sum(x, maximum, scale);
          }
        },
        panel + 1 < panels.last ? w.packed_output + (panel + 1) * g.hidden * N : nullptr);
  }
}

// Strikes out each word that would repeat an n-gram of the words written so far.
template <typename T>
void forbid_repeated(const Generation &g, const Work<T> &w, int64_t row, const int64_t *written) {
  constexpr int64_t N = Work<T>::N;
  const int64_t n = g.no_repeat_ngram, last = g.step - (n - 1);
  if (n == 0) return;
  for (int64_t j = 0; j < last; ++j) {
    if (std::memcmp(written + j, written + last, size_t(n - 1) * sizeof(int64_t)) != 0) continue;
    const int64_t word = written[j + n - 1], panel = word / N;
    T *x = w.panel_logits(row, panel);
    x[word % N] = T(kNothing);
    T &maximum = w.maxima[row * w.panels + panel];
    maximum = panel_maximum(x);
    if (g.sums_mass()) w.sums[row * w.panels + panel] = panel_sum(x, maximum, T(1 / g.temperature));
  }
}

template <typename T>
int64_t likeliest(const Work<T> &w, int64_t row) {
  const T *maxima = w.maxima + row * w.panels;
  int64_t panel = 0;
  for (int64_t p = 1; p < w.panels; ++p) panel = maxima[p] > maxima[panel] ? p : panel;
  if (!(maxima[panel] > T(kNothing))) return -1;
  const T *x = w.panel_logits(row, panel);
  int64_t j = 0;
  while (x[j] != maxima[panel]) ++j;
  return panel * Work<T>::N + j;
}

// Inverts the cumulative distribution over the words in their order.
template <typename T>
int64_t draw(const Work<T> &w, int64_t row, double uniform, double scale) {
  constexpr int64_t N = Work<T>::N;
  const T *maxima = w.maxima + row * w.panels, *sums = w.sums + row * w.panels;
  const Mass mass = total_mass(maxima, sums, w.panels, scale);
  const double target = uniform * mass.sum;
  int64_t panel = -1;
  double below = 0, next = 0;
  for (int64_t p = 0; p < w.panels && !(panel >= 0 && next > target); ++p) {
    if (!(maxima[p] > T(kNothing))) continue;
    panel = p, below = next;
    next += double(sums[p]) * double(exp(T((double(maxima[p]) - mass.maximum) * scale)));
  }
  if (panel < 0 || !(mass.sum > 0)) return -1;
  const T *x = w.panel_logits(row, panel);
  int64_t word = -1;
  for (int64_t j = 0; j < N; ++j) {
    if (!(x[j] > T(kNothing))) continue;
    word = panel * N + j;  // rounding may leave the target just behind the last
    below += double(exp(T((double(x[j]) - mass.maximum) * scale)));
    if (below > target) break;
  }
  return word;
}

// Puts the candidates of a row that are at least `least` behind `count` others; returns how many there are then.
template <typename T>
int64_t collect(const Work<T> &w, int64_t row, double base, double least, int64_t index, Entry *heap, int64_t count) {
  constexpr int64_t N = Work<T>::N;
  for (int64_t p = 0; p < w.panels; ++p) {
    const T maximum = w.maxima[row * w.panels + p];
    if (!(maximum > T(kNothing) && base + double(maximum) >= least)) continue;
    const T *x = w.panel_logits(row, p);
    for (int64_t j = 0; j < N; ++j) {
      const double value = base + double(x[j]);
      if (value >= least && x[j] > T(kNothing)) heap[count++] = {value, index + p * N + j};
    }
  }
  return count;
}

// A bound that the `wanted` best candidates reach: the panels' maxima are candidates themselves.
template <typename T>
int64_t collect_maxima(const Work<T> &w, int64_t row, double base, Entry *heap, int64_t count) {
  for (int64_t p = 0; p < w.panels; ++p) {
    const T maximum = w.maxima[row * w.panels + p];
    if (maximum > T(kNothing)) heap[count] = {base + double(maximum), count}, ++count;
  }
  return count;
}
double bound_of(Entry *heap, int64_t count, int64_t wanted) {
  if (wanted > count) return kNothing;
  make_heap(heap, count);
  for (; wanted > 1; --wanted) pop(heap, count--);
  return heap[0].value;
}

// Inverts the cumulative distribution over the words left by top_k and top_p, the likeliest first.
template <typename T>
int64_t draw_truncated(const Generation &g, const Work<T> &w, int64_t row, double uniform, double scale, Entry *heap) {
  int64_t count = collect_maxima(w, row, 0.0, heap, 0), kept = g.top_k;
  if (count == 0) return -1;
  double maximum = heap[0].value;
  for (int64_t i = 1; i < count; ++i) maximum = max(maximum, heap[i].value);
  const auto weight = [&](const Entry &entry) { return exp((entry.value - maximum) * scale); };
  double all = 0, sum = 0;
  if (kept > 0) {
    count = collect(w, row, 0.0, bound_of(heap, count, kept), 0, heap, 0);
    make_heap(heap, count);
    kept = min(kept, count);
    for (int64_t i = 0; i < kept; ++i) all += weight(pop(heap, count - i));
  } else {
    // The nucleus lies above some bound: lower it until what lies above is enough.
    all = total_mass(w.maxima + row * w.panels, w.sums + row * w.panels, w.panels, scale).sum;
    for (double width = 4; width <= 128 && sum < g.top_p * all; width *= 2) {
      count = collect(w, row, 0.0, maximum - width / scale, 0, heap, 0), sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += weight(heap[i]);
    }
    make_heap(heap, count);
  }
  // What has been popped lies from heap[count - 1] downwards.
  const Entry *ranked = heap + count - 1;
  if (g.top_p < 1) {
    int64_t i = 0;
    for (sum = 0; i < (kept > 0 ? kept : count) && sum < g.top_p * all; ++i) {
      if (kept == 0) pop(heap, count - i);
      sum += weight(ranked[-i]);
    }
    kept = i, all = sum;
  }
  int64_t i = 0;
  for (sum = weight(ranked[0]); i + 1 < kept && sum <= uniform * all; sum += weight(ranked[-i])) ++i;
  return ranked[-i].index;
}

template <typename T>
double log_sum_exp(const Work<T> &w, int64_t row) {
  const Mass mass = total_mass(w.all_maxima + row * w.panels, w.all_sums + row * w.panels, w.panels, 1.0);
  return mass.sum > 0 ? mass.maximum + std::log(mass.sum) : __builtin_nan("");
}

FASTVAE_INLINE int64_t forced_word(const Generation &g, int64_t sequence) {
  return g.step < g.prefix_length ? g.prefix[sequence * g.prefix_length + g.step] : -1;
}

// The next word of a greedy or sampled sentence.
template <typename T>
void choose(const Generation &g, const Work<T> &w, int64_t row) {
  const int64_t sequence = w.sequences[row], forced = forced_word(g, sequence);
  int64_t *written = g.tokens + sequence * g.max_length;
  int64_t word = forced;
  T logit = T(0);
  if (w.screened) {
    if (forced < 0) word = likeliest_screened(g, w, row);
  } else if (!g.stores_logits()) {
    logit = T(kNothing);
    for (int64_t thread = 0; thread < g.used_threads && forced < 0; ++thread) {
      // Threads hold the panels in order: of equal words the first is taken.
      const T value = w.best[thread * w.rows + row];
      if (value > logit) logit = value, word = w.best_word[thread * w.rows + row];
    }
  } else if (forced < 0) {
    forbid_repeated(g, w, row, written);
    if (g.strategy == kGreedy) {
      word = likeliest(w, row);
    } else {
      float uniform;
      fill_uniform(uint64_t(g.seeds[sequence]), uint64_t(g.step), 1, &uniform);
      const double scale = 1 / g.temperature;
      word = g.top_k > 0 || g.top_p < 1
                 ? draw_truncated(g, w, row, uniform, scale, w.heaps + thread_index() * w.heap_size)
                 : draw(w, row, uniform, scale);
    }
  }
  if (word < 0) {  // no logit is a number
    word = g.eos, logit = T(__builtin_nan(""));
  } else if (g.stores_logits() && g.log_probs) {
    logit = w.logit(row, word);
  }
  w.words[row] = written[g.step] = word;
  if (g.log_probs)
    static_cast<T *>(g.scores)[sequence * g.max_length + g.step] = T(double(logit) - log_sum_exp(w, row));
  w.parents[row] = 0;
  w.done[row] = word == g.eos || g.step + 1 == g.max_length;
  if (w.done[row]) g.lengths[sequence] = g.step + 1;
}

// Enters a sentence that has ended, or was cut, among the best of its row.
template <typename T>
void enter(const Generation &g, const Work<T> &w, int64_t sequence, int64_t row, double total, int64_t word,
           T word_score, bool cut) {
  const int64_t steps = g.max_length, length = g.step + 1;
  const double value = total / std::pow(double(length), g.length_penalty);
  double *values = w.finished + sequence * g.n_best;
  int64_t &count = w.counts[sequence];
  int64_t place = count;
  while (!cut && place > 0 && value > values[place - 1]) --place;
  if (place == g.n_best) return;
  if (count < g.n_best) ++count;
  int64_t *tokens = g.tokens + sequence * g.n_best * steps, *lengths = g.lengths + sequence * g.n_best;
  T *scores = static_cast<T *>(g.scores) + sequence * g.n_best * steps;
  for (int64_t i = count - 1; i > place; --i) {
    values[i] = values[i - 1], lengths[i] = lengths[i - 1];
    std::memcpy(tokens + i * steps, tokens + (i - 1) * steps, size_t(steps) * sizeof(int64_t));
    std::memcpy(scores + i * steps, scores + (i - 1) * steps, size_t(steps) * sizeof(T));
  }
  const int64_t from = (g.cell_side * w.rows + row) * steps;
  tokens += place * steps, scores += place * steps;
  for (int64_t t = 0; t < steps; ++t) {
    tokens[t] = t < g.step ? w.history[from + t] : t == g.step ? word : g.padding;
    scores[t] = t < g.step ? w.history_scores[from + t] : t == g.step ? word_score : T(0);
  }
  values[place] = value, lengths[place] = length;
}

// The next words of the beams of a sentence. Among 2 K candidates at most K end, so that K beginnings go on.
template <typename T>
void extend(const Generation &g, const Work<T> &w, int64_t slot) {
  const int64_t K = g.beams, first = slot * K, sequence = w.sequences[slot], forced = forced_word(g, sequence);
  const int64_t row_words = w.panels * Work<T>::N;
  Entry *heap = w.heaps + thread_index() * w.heap_size;
  int64_t count = 0;
  for (int64_t beam = 0; beam < K; ++beam) {
    const int64_t row = first + beam;
    if (!(w.totals[row] > kNothing)) continue;
    const double base = w.bases[row] = w.totals[row] - log_sum_exp(w, row);
    if (forced >= 0) {
      heap[count++] = {base + double(w.logit(row, forced)), beam * row_words + forced};
      continue;
    }
    forbid_repeated(g, w, row, w.history + (g.cell_side * w.rows + row) * g.max_length);
    count = collect_maxima(w, row, base, heap, count);
  }
  if (forced < 0) {
    const double least = bound_of(heap, count, 2 * K);
    count = 0;
    for (int64_t beam = 0; beam < K; ++beam) {
      if (!(w.totals[first + beam] > kNothing)) continue;
      count = collect(w, first + beam, w.bases[first + beam], least, beam * row_words, heap, count);
    }
  }
  make_heap(heap, count);

  const bool last = g.step + 1 == g.max_length;
  const int64_t candidates = min(count, 2 * K);
  int64_t open = 0;
  for (int64_t rank = 0; rank < candidates && (open < K || rank < K); ++rank) {
    const Entry entry = pop(heap, count - rank);
    const int64_t beam = entry.index / row_words, word = entry.index % row_words;
    const T word_score = T(entry.value - w.totals[first + beam]);
    if (word == g.eos) {
      if (rank < K) enter(g, w, sequence, first + beam, entry.value, word, word_score, false);
    } else if (open < K) {
      const int64_t row = first + open++;
      w.parents[row] = beam, w.words[row] = word, w.word_score[row] = word_score, w.next_totals[row] = entry.value;
    }
  }
  // Where too few ended in time, the likeliest beginnings stand, cut.
  for (int64_t row = first; last && row < first + open && w.counts[sequence] < g.n_best; ++row) {
    enter(g, w, sequence, first + w.parents[row], w.next_totals[row], w.words[row], w.word_score[row], true);
  }
  for (int64_t row = first + open; row < first + K; ++row) {
    w.parents[row] = 0, w.words[row] = g.bos, w.word_score[row] = T(0), w.next_totals[row] = kNothing;
  }
  // Log-probabilities only fall, and max_length bounds the length that they are divided by.
  const double reach = w.next_totals[first] / std::pow(double(g.max_length), g.length_penalty);
  const bool full = w.counts[sequence] == g.n_best;
  w.done[slot] = last || open == 0 || (full && w.finished[sequence * g.n_best + g.n_best - 1] >= reach);
}

// After a step: sentences that are over leave the batch, words that are new get a place in the table.
template <typename T>
void arrange(Generation &g, const Work<T> &w) {
  const int64_t K = g.beams;
  const bool beam = g.strategy == kBeam;
  int64_t rows = 0;
  g.moved = beam;
  for (int64_t slot = 0; slot < g.active; ++slot) {
    if (w.done[slot]) continue;
    w.sequences[rows / K] = w.sequences[slot];
    for (int64_t row = slot * K; row < slot * K + K; ++row, ++rows) {
      w.from[rows] = slot * K + w.parents[row];
      g.moved |= w.from[rows] != rows;
      w.words[rows] = w.words[row];
      if (beam) w.word_score[rows] = w.word_score[row], w.totals[rows] = w.next_totals[row];
    }
  }
  g.active = rows / K;
  g.step += 1;
  // A step has written the states to the other side, and the cells in place.
  if (g.moved) g.cell_side = 1 - g.cell_side;
  if (!g.moved) g.side = 1 - g.side;

  if (g.table_used + rows > w.capacity) {
    for (int64_t word = 0; word < g.vocabulary; ++word) w.slot_of[word] = -1;
    g.table_used = 0;
  }
  g.fresh = 0;
  g.only_forced = !g.log_probs && !beam;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t &slot = w.slot_of[w.words[row]];
    if (slot < 0) {
      slot = g.table_used++;
      w.fresh_words[g.fresh] = w.words[row], w.fresh_slots[g.fresh++] = slot;
    }
    w.slots[row] = slot;
    g.only_forced &= forced_word(g, w.sequences[row / K]) >= 0;
  }
}

template <typename T>
void advance(Generation &g, int64_t steps) {
  const Work<T> w(g);
  const int64_t until = min(g.max_length, g.step + steps), rows = g.batch * g.beams;
  const int64_t flops = 2 * rows * g.hidden * (g.vocabulary + 4 * g.hidden * (2 * g.layers - 1));
  const int threads = int(min<int64_t>(threads_for(flops, kGrainFlops), g.threads));
#pragma omp parallel num_threads(threads)
  {
    const bool first = thread_index() == 0, begins = !g.started;
    if (begins) start(g, w);
    barrier();
    if (first) {
#ifdef _OPENMP
      g.used_threads = omp_get_num_threads();
#else
      g.used_threads = 1;
#endif
      if (begins) {
        g.started = true, g.only_forced = !g.log_probs && g.strategy != kBeam;
        for (int64_t slot = 0; slot < g.active; ++slot) g.only_forced &= forced_word(g, slot) >= 0;
      }
    }
    barrier();
    while (g.active > 0 && g.step < until) {
      // Read here: behind the step's last barrier the first thread may already write them.
      const bool shared = g.active > 1, only_forced = g.only_forced;
      gather(g, w);
      barrier();
      for (int64_t layer = 0; layer < g.layers; ++layer) {
        recurrence(g, w, layer);
        barrier();
      }
      if (!only_forced) {
        w.screened ? screen(g, w) : score(g, w);
        barrier();
      }
      const Range slots = shared ? my_share(g.active) : Range{0, first ? g.active : 0};
      for (int64_t slot = slots.first; slot < slots.last; ++slot) {
        g.strategy == kBeam ? extend(g, w, slot) : choose(g, w, slot);
      }
      if (shared) barrier();
      if (first) arrange(g, w);
      barrier();
    }
  }
}

// Products whose rows do not depend on the rows around them, as a library's may.
template <typename T>
void rows_product(const RowsProduct &p) {
  constexpr int64_t N = kPanel<T>;
  const T *weight = static_cast<const T *>(p.weight), *bias = static_cast<const T *>(p.bias);
  T *memory = static_cast<T *>(p.memory), *out = static_cast<T *>(p.out);
  const int64_t panels = (p.columns + N - 1) / N;
  const int threads = int(min<int64_t>(threads_for(2 * p.rows * p.inner * p.columns, kGrainFlops), p.threads));
#pragma omp parallel num_threads(threads)
  {
    T *packed = memory + thread_index() * p.inner * N;
    const Range mine = my_share(panels);
    for (int64_t first = mine.first * N; first < mine.last * N; first += N) {
      const int64_t valid = min(N, p.columns - first);
      pack<T, N>(weight + first * p.inner, p.inner, p.inner, valid, packed, N);
      multiply_packed<T, kPanelVectors>(p.rows, p.inner, static_cast<const T *>(p.x), p.inner, packed,
                                        [&](int64_t row, int count, const T *product) {
                                          for (int r = 0; r < count; ++r, product += N) {
                                            T *to = out + (row + r) * p.columns + first;
                                            for (int64_t j = 0; j < valid; ++j) to[j] = product[j] + bias[first + j];
                                          }
                                        });
    }
  }
}

}  // namespace

int64_t generation_bytes(const Generation &g) { return g.is_double ? Work<double>(g).bytes : Work<float>(g).bytes; }
void generation_advance(Generation &g, int64_t steps) {
  g.is_double ? advance<double>(g, steps) : advance<float>(g, steps);
}
void multiply_rows(const RowsProduct &p) { p.is_double ? rows_product<double>(p) : rows_product<float>(p); }

}  // namespace fastvae::FASTVAE_ISA
