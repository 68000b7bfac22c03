// The LSTM recurrence over packed sequences, forward and backward (fastvae/ops/lstm.py holds the definition).
//
// A step multiplies the active sequences' states (rows) by the packed recurrent weight; the gates are the epilogue, so
// that a step is one pass. Threads share out the sequences where the batch is large and the weight fits a second-level
// cache: they then never wait for each other. Otherwise they share out the hidden units, with a barrier after each
// step. FLOPs per token: 8 hidden^2 forward, 8 hidden^2 backward (the weight's gradient is one product outside). The
// weight, 16 hidden^2 bytes, is read once a step by each thread that owns sequences, once by all that own units.
#include "philox.h"
#include "recurrence.h"

namespace fastvae::FASTVAE_ISA {
namespace {

template <typename T>
void forward(const LSTMForward &f) {
  const PackedPlan &plan = f.plan;
  const Packed packed(plan);
  const int64_t H = plan.hidden, G = 4 * H;
  constexpr int64_t W = kWidth<T>;
  const int64_t blocks = (H + W - 1) / W;  // of W hidden units: their four gates are a tile's four vectors
  const T *static_gates = static_cast<const T *>(f.static_gates), *weight = static_cast<const T *>(f.weight_hh);
  const T *h0 = static_cast<const T *>(f.h0), *c0 = static_cast<const T *>(f.c0);
  const T *inputs = static_cast<const T *>(f.inputs);
  T *gates = static_cast<T *>(f.gates), *cells = static_cast<T *>(f.cells), *states = static_cast<T *>(f.states);
  T *packed_weight = static_cast<T *>(f.packed_weight), *first_h = static_cast<T *>(f.sorted_h0);
  T *hidden = static_cast<T *>(f.hidden), *h_n = static_cast<T *>(f.h_n), *c_n = static_cast<T *>(f.c_n);
  const int threads = int(
      min<int64_t>(threads_for(packed.sequences * 8 * H * H, kGrainFlops), max<int64_t>(blocks, 1)));

#pragma omp parallel num_threads(threads)
  {
    const Range mine = my_share(blocks);
    for (int64_t block = mine.first; block < mine.last; ++block) {
      T *to = packed_weight + block * H * 4 * W;
      const int64_t valid = min<int64_t>(W, H - block * W);
      // Line by line of the weight: its rows may lie a power of two apart.
      for (int64_t k = 0; k < H; k += W) {
        const int64_t depth = min<int64_t>(W, H - k);
        for (int64_t gate = 0; gate < 4; ++gate) {
          for (int64_t j = 0; j < W; ++j) {
            const T *from = weight + (gate * H + block * W + j) * H + k;
            for (int64_t i = 0; i < depth; ++i) to[((k + i) * 4 + gate) * W + j] = j < valid ? from[i] : T(0);
          }
        }
      }
    }
    const Range ranks = my_share(packed.sequences);
    for (int64_t rank = ranks.first; rank < ranks.last; ++rank) {
      const int64_t sequence = packed.sequence(rank);
      std::memcpy(first_h + rank * H, h0 + sequence * H, size_t(H) * sizeof(T));
      if (!f.keep) std::memcpy(cells + rank * H, c0 + sequence * H, size_t(H) * sizeof(T));
    }
    barrier();

    const Part part = my_part(packed.sequences, blocks, G * H * int64_t(sizeof(T)));
    for (int64_t t = 0; t < plan.time && plan.active[t] > 0; ++t) {
      const int64_t start = packed.start(t), before = t == 0 ? 0 : packed.start(t - 1);
      const T *previous_h = (t == 0 ? first_h : states + before * H) + part.rank * H;
      for (int64_t block = part.blocks.first; block < part.blocks.last; ++block) {
        const int64_t unit = block * W, valid = min<int64_t>(W, H - unit);
        multiply_packed<T, 4>(
            part.ranks(packed.active(t)), H, previous_h, part.stride * H, packed_weight + block * H * 4 * W,
            [&](int64_t first, int count, const T *__restrict product) {
              for (int r = 0; r < count; ++r, product += 4 * W) {
                const int64_t rank = part.rank + (first + r) * part.stride;
                const int64_t row = start + rank, sequence = packed.sequence(rank);
                const T *input = inputs + packed.token(row) * G + unit;
                const T *__restrict extra = static_gates + sequence * G + unit;
                // Kept for backward, or one running cell for each sequence.
                const T *previous_c = f.keep ? (t == 0 ? c0 + sequence * H : cells + (before + rank) * H) + unit
                                             : cells + rank * H + unit;
                T *cell = cells + (f.keep ? row : rank) * H + unit;
                T *__restrict state = states + row * H + unit;
                const auto activate = [&](const int64_t n, T *gate) __attribute__((always_inline)) {
#pragma omp simd
                  for (int64_t j = 0; j < n; ++j) {
                    const T i = sigmoid(product[j] + input[j] + extra[j]);
                    const T forget = sigmoid(product[W + j] + input[H + j] + extra[H + j]);
                    const T g = tanh(product[2 * W + j] + input[2 * H + j] + extra[2 * H + j]);
                    const T o = sigmoid(product[3 * W + j] + input[3 * H + j] + extra[3 * H + j]);
                    const T c = forget * previous_c[j] + i * g;
                    if (gate) gate[j] = i, gate[H + j] = forget, gate[2 * H + j] = g, gate[3 * H + j] = o;
                    cell[j] = c;
                    state[j] = o * tanh(c);
                  }
                };
                const auto activate_block = [&](T *gate) __attribute__((always_inline)) {
                  valid == W ? activate(W, gate) : activate(valid, gate);
                };
                f.keep ? activate_block(gates + row * G + unit) : activate_block(nullptr);
              }
            },
            packed_weight + (block + 1 < part.blocks.last ? block + 1 : part.blocks.first) * H * 4 * W);
      }
      if (!part.by_sequence) barrier();
    }
    if (part.by_sequence) barrier();

    for (int64_t rank = ranks.first; rank < ranks.last; ++rank) {
      const int64_t sequence = packed.sequence(rank), length = packed.length(rank);
      T *to = hidden + sequence * plan.time * H;
      for (int64_t t = 0; t < length; ++t, to += H) {
        std::memcpy(to, states + (packed.start(t) + rank) * H, size_t(H) * sizeof(T));
      }
      std::memset(to, 0, size_t((plan.time - length) * H) * sizeof(T));
      const int64_t last = length == 0 ? 0 : packed.start(length - 1) + rank;
      const T *last_c = !f.keep ? cells + rank * H : length == 0 ? c0 + sequence * H : cells + last * H;
      std::memcpy(h_n + sequence * H, length == 0 ? h0 + sequence * H : states + last * H, size_t(H) * sizeof(T));
      std::memcpy(c_n + sequence * H, last_c, size_t(H) * sizeof(T));
    }
  }
}

template <typename T>
void backward(const LSTMBackward &f) {
  const PackedPlan &plan = f.plan;
  const Packed packed(plan);
  const int64_t H = plan.hidden, G = 4 * H, N = packed.sequences;
  constexpr int64_t kVectors = 2, W = kVectors * kWidth<T>;
  const int64_t blocks = (H + W - 1) / W;
  const T *gates = static_cast<const T *>(f.gates), *cells = static_cast<const T *>(f.cells);
  const T *c0 = static_cast<const T *>(f.c0), *weight = static_cast<const T *>(f.weight_hh);
  const T *grad_states = static_cast<const T *>(f.grad_states);
  const T *grad_h_n = static_cast<const T *>(f.grad_h_n), *grad_c_n = static_cast<const T *>(f.grad_c_n);
  T *grad_gates = static_cast<T *>(f.grad_gates), *grad_static = static_cast<T *>(f.grad_static_gates);
  T *grad_h0 = static_cast<T *>(f.grad_h0), *grad_c = static_cast<T *>(f.grad_c0);  // grad_c: running, by sequence
  T *packed_weight = static_cast<T *>(f.packed_weight);
  const int threads = int(min<int64_t>(threads_for(N * 8 * H * H, kGrainFlops), max<int64_t>(blocks, 1)));

#pragma omp parallel num_threads(threads)
  {
    const Range mine = my_share(blocks);
    for (int64_t block = mine.first; block < mine.last; ++block) {
      const int64_t unit = block * W, valid = min<int64_t>(W, H - unit);
      T *to = packed_weight + block * G * W;
      for (int64_t k = 0; k < G; ++k, to += W) {
        for (int64_t j = 0; j < W; ++j) to[j] = j < valid ? weight[k * H + unit + j] : T(0);
      }
      for (int64_t b = 0; b < N; ++b) {
        std::memcpy(grad_c + b * H + unit, grad_c_n + b * H + unit, size_t(valid) * sizeof(T));
        for (int64_t gate = 0; gate < 4; ++gate) {
          std::memset(grad_static + b * G + gate * H + unit, 0, size_t(valid) * sizeof(T));
        }
      }
    }
    barrier();
    const Part part = my_part(N, blocks, G * H * int64_t(sizeof(T)));
    // Step -1 makes the gradient of h0. A sequence enters, with its gradient of h_n, at its last step: its rank is
    // then not yet active in the step after.
    for (int64_t t = plan.time - 1; t >= -1; --t) {
      const int64_t active = t < 0 ? N : packed.active(t), start = t < 0 ? 0 : packed.start(t);
      const int64_t before = t <= 0 ? 0 : packed.start(t - 1);
      const int64_t flowing = t + 1 < plan.time ? packed.active(t + 1) : 0;  // these have a step after
      const T *next_gates = flowing > 0 ? grad_gates + (packed.start(t + 1) + part.rank) * G : grad_gates;
      for (int64_t block = part.blocks.first; block < part.blocks.last; ++block) {
        const int64_t unit = block * W, valid = min<int64_t>(W, H - unit);
        const auto step = [&](int64_t rank, const T *__restrict product) {
          const int64_t sequence = packed.sequence(rank);
          const T *__restrict from_next = rank < flowing ? product : grad_h_n + sequence * H + unit;
          if (t < 0) {
            std::memcpy(grad_h0 + sequence * H + unit, from_next, size_t(valid) * sizeof(T));
            return;
          }
          const int64_t row = start + rank;
          const T *__restrict previous_c = (t == 0 ? c0 + sequence * H : cells + (before + rank) * H) + unit;
          const T *__restrict gate = gates + row * G + unit, *__restrict cell = cells + row * H + unit;
          const T *__restrict from_output = grad_states + row * H + unit;
          T *__restrict dc = grad_c + sequence * H + unit;
          T *__restrict to = grad_gates + row * G + unit, *__restrict sum = grad_static + sequence * G + unit;
          const auto differentiate = [&](const int64_t n) __attribute__((always_inline)) {
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) {
              const T i = gate[j], forget = gate[H + j], g = gate[2 * H + j], o = gate[3 * H + j];
              const T squashed = tanh(cell[j]);
              const T dh = from_next[j] + from_output[j];
              const T d = dc[j] + dh * o * (T(1) - squashed * squashed);
              const T di = d * g * i * (T(1) - i), df = d * previous_c[j] * forget * (T(1) - forget);
              const T dg = d * i * (T(1) - g * g), d_out = dh * squashed * o * (T(1) - o);
              dc[j] = d * forget;
              to[j] = di, to[H + j] = df, to[2 * H + j] = dg, to[3 * H + j] = d_out;
              sum[j] += di, sum[H + j] += df, sum[2 * H + j] += dg, sum[3 * H + j] += d_out;
            }
          };
          valid == W ? differentiate(W) : differentiate(valid);
        };
        const int64_t products = part.ranks(flowing);
        multiply_packed<T, kVectors>(
            products, G, next_gates, part.stride * G, packed_weight + block * G * W,
            [&](int64_t first, int count, const T *product) {
              for (int r = 0; r < count; ++r, product += W) {
                step(part.rank + (first + r) * part.stride, product);
              }
            },
            packed_weight + (block + 1 < part.blocks.last ? block + 1 : part.blocks.first) * G * W);
        for (int64_t i = products; i < part.ranks(active); ++i) step(part.rank + i * part.stride, nullptr);
      }
      if (!part.by_sequence) barrier();
    }
  }
}

}  // namespace

void lstm_forward(const LSTMForward &f) { f.is_double ? forward<double>(f) : forward<float>(f); }
void lstm_backward(const LSTMBackward &f) { f.is_double ? backward<double>(f) : backward<float>(f); }

int64_t pack_words(const WordPacking &p) {
  // Sort by length, longest first; equal lengths keep their order.
  const int64_t B = p.batch, T = p.time;
  for (int64_t t = 0; t < T; ++t) p.active[t] = 0;
  for (int64_t b = 0; b < B; ++b) {
    if (p.lengths[b] < 0 || p.lengths[b] > T) return kBadLength - b;
    if (p.lengths[b] > 0) p.active[p.lengths[b] - 1] += 1;
  }
  for (int64_t t = T - 2; t >= 0; --t) p.active[t] += p.active[t + 1];
  int64_t total = 0;
  for (int64_t t = 0; t < T; ++t) p.start[t] = total, total += p.active[t];
  // Ranks of length n are those from active[n] (the longer ones) on: one walk over the lengths for each that occurs.
  for (int64_t n = T, rank = 0; n >= 0; --n) {
    const int64_t end = n == 0 ? B : p.active[n - 1];
    for (int64_t b = 0; rank < end && b < B; ++b) {
      if (p.lengths[b] == n) p.order[rank++] = b;
    }
  }

  int64_t bad = -1;
  const int threads = threads_for(B * T, 4096);
#pragma omp parallel for schedule(static) num_threads(threads) reduction(max : bad)
  for (int64_t rank = 0; rank < B; ++rank) {
    const int64_t b = p.order[rank];
    float chance[64];
    for (int64_t t = 0; t < p.lengths[b]; ++t) {
      if (p.word_dropout > 0 && t % 64 == 0) {
        fill_uniform(uint64_t(*p.seed), uint64_t(b * T + t), min<int64_t>(64, p.lengths[b] - t), chance);
      }
      int64_t word = p.tokens[b * T + t];
      if (word < 0 || word >= p.vocabulary) bad = max(bad, b * T + t), word = 0;
      if (p.word_dropout > 0 && t > 0 && chance[t % 64] < p.word_dropout) word = p.unk_index;
      const int64_t row = p.start[t] + rank;
      p.words[row] = word;
      p.rows[row] = b * T + t;
    }
  }
  return bad < 0 ? total : kBadToken - bad;
}

}  // namespace fastvae::FASTVAE_ISA
