// The layer-normalized LSTM over packed sequences (fastvae/ops/layer_norm_lstm.py holds the definition).
//
// A gate needs the statistics of all gates of its sequence: a step is the product of the active sequences' states with
// the packed recurrent weight, then a pass over each sequence's row, which stays in the cache. Threads share out the
// sequences of both where recurrence.h says so; otherwise the product's columns, then the rows, with a barrier after
// each. FLOPs per token: 8 hidden^2 forward, 8 hidden^2 backward. Kept for backward are the normalized shares of the
// gates, 8 hidden numbers a token, from which it makes the gates again: reading those too would cost more.
#include <cmath>

#include "recurrence.h"
#include "vecmath.h"

namespace fastvae::FASTVAE_ISA {
namespace {

// A product's packed right-hand side, B[k][n] = weight[k * row + n * column], in blocks of kColumns columns.
constexpr int kVectors = 2;
template <typename T>
constexpr int64_t kColumns = kVectors * kWidth<T>;

template <typename T>
FASTVAE_INLINE void pack_blocks(Range blocks, int64_t inner, int64_t columns, const T *weight, int64_t row,
                                int64_t column, T *packed) {
  for (int64_t block = blocks.first; block < blocks.last; ++block) {
    const int64_t first = block * kColumns<T>, valid = min<int64_t>(kColumns<T>, columns - first);
    T *to = packed + first * inner;
    // Line by line of the weight, whichever way it lies: its rows may be a power of two apart.
    const int64_t deep = row == 1 ? kWidth<T> : 1;
    for (int64_t k = 0; k < inner; k += deep, to += deep * kColumns<T>) {
      const int64_t depth = min<int64_t>(deep, inner - k);
      for (int64_t j = 0; j < kColumns<T>; ++j) {
        const T *from = weight + k * row + (first + j) * column;
        for (int64_t i = 0; i < depth; ++i) to[i * kColumns<T> + j] = j < valid ? from[i * row] : T(0);
      }
    }
  }
}

// out[i * out_stride + n] = sum_k a[i * stride + k] B[k][n] for the columns of the blocks.
template <typename T>
FASTVAE_INLINE void multiply_blocks(Range blocks, int64_t rows, int64_t inner, int64_t columns, const T *a,
                                    int64_t stride, const T *packed, T *out, int64_t out_stride) {
  for (int64_t block = blocks.first; block < blocks.last; ++block) {
    const int64_t n = block * kColumns<T>, valid = min<int64_t>(kColumns<T>, columns - n);
    multiply_packed<T, kVectors>(
        rows, inner, a, stride, packed + n * inner,
        [&](int64_t first, int count, const T *product) {
          for (int i = 0; i < count; ++i, product += kColumns<T>) {
            std::memcpy(out + (first + i) * out_stride + n, product, size_t(valid) * sizeof(T));
          }
        },
        packed + (block + 1 < blocks.last ? block + 1 : blocks.first) * kColumns<T> * inner);
  }
}

template <typename T>
struct Moments {
  T mean, inverse;  // inverse: 1 / sqrt(variance + epsilon)
};
template <typename T>
FASTVAE_INLINE Moments<T> moments(const T *x, int64_t n, T epsilon) {
  T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += x[j];
  const T mean = sum / T(n);
#pragma omp simd reduction(+ : squares)
  for (int64_t j = 0; j < n; ++j) squares += (x[j] - mean) * (x[j] - mean);
  return {mean, T(1) / std::sqrt(squares / T(n) + epsilon)};
}

// The ranks whose rows a thread passes over: its own, or its share of the active ones.
struct Rows {
  int64_t first, stride, count;
};
FASTVAE_INLINE Rows my_rows(const Part &part, int64_t active) {
  if (part.by_sequence) return {part.rank, part.stride, part.ranks(active)};
  const Range share = my_share(active);
  return {share.first, 1, share.last - share.first};
}

template <typename T>
void forward(const LayerNormLSTMForward &f) {
  const PackedPlan &plan = f.plan;
  const Packed packed(plan);
  const int64_t H = plan.hidden, G = 4 * H, N = packed.sequences, blocks = (G + kColumns<T> - 1) / kColumns<T>;
  const T epsilon = T(f.epsilon);
  const T *inputs = static_cast<const T *>(f.inputs), *static_inputs = static_cast<const T *>(f.static_inputs);
  const T *h0 = static_cast<const T *>(f.h0), *c0 = static_cast<const T *>(f.c0);
  const T *gain_input = static_cast<const T *>(f.norm_gates), *gain_hidden = gain_input + G, *bias = gain_hidden + G;
  const T *gain_cell = static_cast<const T *>(f.norm_cell), *bias_cell = gain_cell + H;
  T *normalized = static_cast<T *>(f.normalized), *inverses = static_cast<T *>(f.inverses);
  T *cells = static_cast<T *>(f.cells), *states = static_cast<T *>(f.states);
  T *hidden = static_cast<T *>(f.hidden), *h_n = static_cast<T *>(f.h_n), *c_n = static_cast<T *>(f.c_n);
  T *packed_weight = static_cast<T *>(f.packed_weight);
  const int threads = int(min<int64_t>(threads_for(N * 8 * H * H, kGrainFlops), max<int64_t>(blocks, 1)));

#pragma omp parallel num_threads(threads)
  {
    const Range owned = my_share(N);
    pack_blocks(my_share(blocks), H, G, static_cast<const T *>(f.weight_hh), int64_t(1), H, packed_weight);
    // Two steps' states by rank, in turn: those before step 0 lie where an odd step's do.
    for (int64_t rank = owned.first; rank < owned.last; ++rank) {
      const int64_t sequence = packed.sequence(rank);
      std::memcpy(states + (N + rank) * H, h0 + sequence * H, size_t(H) * sizeof(T));
      if (!f.keep) std::memcpy(cells + rank * H, c0 + sequence * H, size_t(H) * sizeof(T));
    }
    barrier();

    const Part part = my_part(N, blocks, G * H * int64_t(sizeof(T)));
    for (int64_t t = 0; t < plan.time && plan.active[t] > 0; ++t) {
      const int64_t active = packed.active(t), start = packed.start(t);
      const T *before = states + (1 - t % 2) * N * H;
      T *shares = normalized + (f.keep ? start : 0) * 2 * G;
      multiply_blocks(part.blocks, part.ranks(active), H, G, before + part.rank * H, part.stride * H, packed_weight,
                      shares + part.rank * 2 * G, part.stride * 2 * G);
      if (!part.by_sequence) barrier();
      const Rows rows = my_rows(part, active);
      for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t rank = rows.first + i * rows.stride, sequence = packed.sequence(rank), kept = f.keep ? start : 0;
        T *__restrict from_hidden = shares + rank * 2 * G, *__restrict from_input = from_hidden + G;
        const T *__restrict input = inputs + packed.token(start + rank) * G;
        const T *__restrict extra = static_inputs + sequence * G;
#pragma omp simd
        for (int64_t j = 0; j < G; ++j) from_input[j] = input[j] + extra[j];
        const Moments<T> of_hidden = moments(from_hidden, G, epsilon), of_input = moments(from_input, G, epsilon);
        inverses[(kept + rank) * 2] = of_hidden.inverse, inverses[(kept + rank) * 2 + 1] = of_input.inverse;
#pragma omp simd
        for (int64_t j = 0; j < G; ++j) {
          from_hidden[j] = (from_hidden[j] - of_hidden.mean) * of_hidden.inverse;
          from_input[j] = (from_input[j] - of_input.mean) * of_input.inverse;
        }
        const auto gate = [&](int64_t j) __attribute__((always_inline)) {
          return from_hidden[j] * gain_hidden[j] + from_input[j] * gain_input[j] + bias[j];
        };
        T *cell = cells + (kept + rank) * H;
        const T *previous_c = !f.keep ? cell : t == 0 ? c0 + sequence * H : cells + (packed.start(t - 1) + rank) * H;
        T *__restrict state = states + (t % 2 * N + rank) * H, *__restrict out = hidden +
                                                                                 (sequence * plan.time + t) * H;
#pragma omp simd
        for (int64_t j = 0; j < H; ++j) {
          cell[j] = sigmoid(gate(H + j)) * previous_c[j] + sigmoid(gate(j)) * tanh(gate(2 * H + j));
          state[j] = sigmoid(gate(3 * H + j));
        }
        const Moments<T> of_cell = moments(cell, H, epsilon);
#pragma omp simd
        for (int64_t j = 0; j < H; ++j) {
          const T h = state[j] * tanh((cell[j] - of_cell.mean) * of_cell.inverse * gain_cell[j] + bias_cell[j]);
          state[j] = h, out[j] = h;
        }
      }
      if (!part.by_sequence) barrier();
    }
    if (part.by_sequence) barrier();

    for (int64_t rank = owned.first; rank < owned.last; ++rank) {
      const int64_t sequence = packed.sequence(rank), length = packed.length(rank);
      T *const end = hidden + (sequence * plan.time + length) * H;
      std::memset(end, 0, size_t((plan.time - length) * H) * sizeof(T));
      std::memcpy(h_n + sequence * H, length == 0 ? h0 + sequence * H : end - H, size_t(H) * sizeof(T));
      const T *last_c = !f.keep       ? cells + rank * H
                        : length == 0 ? c0 + sequence * H
                                      : cells + (packed.start(length - 1) + rank) * H;
      std::memcpy(c_n + sequence * H, last_c, size_t(H) * sizeof(T));
    }
  }
}

template <typename T>
void backward(const LayerNormLSTMBackward &f) {
  const PackedPlan &plan = f.plan;
  const Packed packed(plan);
  const int64_t H = plan.hidden, G = 4 * H, N = packed.sequences, blocks = (H + kColumns<T> - 1) / kColumns<T>;
  const T epsilon = T(f.epsilon);
  const T *normalized = static_cast<const T *>(f.normalized), *inverses = static_cast<const T *>(f.inverses);
  const T *cells = static_cast<const T *>(f.cells), *hidden = static_cast<const T *>(f.hidden);
  const T *h0 = static_cast<const T *>(f.h0), *c0 = static_cast<const T *>(f.c0);
  const T *gain_input = static_cast<const T *>(f.norm_gates), *gain_hidden = gain_input + G, *bias = gain_hidden + G;
  const T *gain_cell = static_cast<const T *>(f.norm_cell), *bias_cell = gain_cell + H;
  const T *grad_hidden = static_cast<const T *>(f.grad_hidden), *grad_h_n = static_cast<const T *>(f.grad_h_n);
  const T *grad_c_n = static_cast<const T *>(f.grad_c_n);
  T *grad_products = static_cast<T *>(f.grad_products), *grad_inputs = static_cast<T *>(f.grad_inputs);
  T *grad_static = static_cast<T *>(f.grad_static_inputs), *grad_norms = static_cast<T *>(f.grad_norms);
  T *grad_h0 = static_cast<T *>(f.grad_h0), *grad_c = static_cast<T *>(f.grad_c0);  // grad_c: running, by sequence
  T *states = static_cast<T *>(f.states), *before = static_cast<T *>(f.before);
  T *packed_weight = static_cast<T *>(f.packed_weight);
  const int64_t most = min<int64_t>(max<int64_t>(blocks, 1), f.partials);
  const int threads = int(min<int64_t>(threads_for(N * 8 * H * H, kGrainFlops), most));

#pragma omp parallel num_threads(threads)
  {
    const Range owned = my_share(N);
    pack_blocks(my_share(blocks), G, H, static_cast<const T *>(f.weight_hh), H, int64_t(1), packed_weight);
    std::memcpy(grad_c + owned.first * H, grad_c_n + owned.first * H,
                size_t((owned.last - owned.first) * H) * sizeof(T));
    std::memset(grad_static + owned.first * G, 0, size_t((owned.last - owned.first) * G) * sizeof(T));
    T *__restrict sum_gain_input = grad_norms + thread_index() * (3 * G + 2 * H);
    T *__restrict sum_gain_hidden = sum_gain_input + G, *__restrict sum_bias = sum_gain_hidden + G;
    T *__restrict sum_gain_cell = sum_bias + G, *__restrict sum_bias_cell = sum_gain_cell + H;
    std::memset(sum_gain_input, 0, size_t(3 * G + 2 * H) * sizeof(T));
    barrier();

    const Part part = my_part(N, blocks, G * H * int64_t(sizeof(T)));
    // Step -1 makes the gradient of h0. A sequence enters, with its gradient of h_n, at its last step: its rank is
    // then not yet active in the step after.
    for (int64_t t = plan.time - 1; t >= -1; --t) {
      const int64_t flowing = t + 1 < plan.time ? packed.active(t + 1) : 0;  // these have a step after
      if (flowing > 0) {
        multiply_blocks(part.blocks, part.ranks(flowing), G, H, grad_products + (packed.start(t + 1) + part.rank) * G,
                        part.stride * G, packed_weight, states + part.rank * H, part.stride * H);
        if (!part.by_sequence) barrier();
      }
      const Rows rows = my_rows(part, t < 0 ? N : packed.active(t));
      for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t rank = rows.first + i * rows.stride, sequence = packed.sequence(rank);
        T *__restrict state = states + rank * H;  // gradient of the state, from the step after
        if (rank >= flowing) std::memcpy(state, grad_h_n + sequence * H, size_t(H) * sizeof(T));
        if (t < 0) {
          std::memcpy(grad_h0 + sequence * H, state, size_t(H) * sizeof(T));
          continue;
        }
        const int64_t row = packed.start(t) + rank, place = (sequence * plan.time + t) * H;
        const T *__restrict previous_h = t == 0 ? h0 + sequence * H : hidden + place - H;
        const T *__restrict previous_c = t == 0 ? c0 + sequence * H : cells + (packed.start(t - 1) + rank) * H;
        const T *__restrict from_hidden = normalized + row * 2 * G, *__restrict from_input = from_hidden + G;
        const T *__restrict cell = cells + row * H, *__restrict from_output = grad_hidden + place;
        T *__restrict dc = grad_c + sequence * H, *__restrict to = grad_products + row * G;
        T *__restrict to_input = grad_inputs + row * G, *__restrict sum = grad_static + sequence * G;
        std::memcpy(before + row * H, previous_h, size_t(H) * sizeof(T));

        const auto gate = [&](int64_t j) __attribute__((always_inline)) {
          return from_hidden[j] * gain_hidden[j] + from_input[j] * gain_input[j] + bias[j];
        };
        const Moments<T> of_cell = moments(cell, H, epsilon);
        T cell_sum = 0, cell_product = 0;
#pragma omp simd reduction(+ : cell_sum, cell_product)
        for (int64_t j = 0; j < H; ++j) {
          const T unit = (cell[j] - of_cell.mean) * of_cell.inverse;
          const T squashed = tanh(unit * gain_cell[j] + bias_cell[j]), o = sigmoid(gate(3 * H + j));
          const T dh = state[j] + from_output[j], dy = dh * o * (T(1) - squashed * squashed);
          to[j] = sigmoid(gate(j)), to[H + j] = sigmoid(gate(H + j)), to[2 * H + j] = tanh(gate(2 * H + j));
          to[3 * H + j] = dh * squashed * o * (T(1) - o);
          sum_gain_cell[j] += dy * unit, sum_bias_cell[j] += dy;
          const T d = dy * gain_cell[j];
          state[j] = d, cell_sum += d, cell_product += d * unit;
        }
        cell_sum /= T(H), cell_product /= T(H);
#pragma omp simd
        for (int64_t j = 0; j < H; ++j) {
          const T unit = (cell[j] - of_cell.mean) * of_cell.inverse;
          const T d = dc[j] + of_cell.inverse * (state[j] - cell_sum - unit * cell_product);
          const T in = to[j], forget = to[H + j], g = to[2 * H + j];
          to[j] = d * g * in * (T(1) - in);
          to[H + j] = d * previous_c[j] * forget * (T(1) - forget);
          to[2 * H + j] = d * in * (T(1) - g * g);
          dc[j] = d * forget;
        }
        T hidden_sum = 0, hidden_product = 0, input_sum = 0, input_product = 0;
#pragma omp simd reduction(+ : hidden_sum, hidden_product, input_sum, input_product)
        for (int64_t j = 0; j < G; ++j) {
          const T d = to[j], of_hidden = d * gain_hidden[j], of_input = d * gain_input[j];
          sum_bias[j] += d, sum_gain_hidden[j] += d * from_hidden[j], sum_gain_input[j] += d * from_input[j];
          hidden_sum += of_hidden, hidden_product += of_hidden * from_hidden[j];
          input_sum += of_input, input_product += of_input * from_input[j];
        }
        hidden_sum /= T(G), hidden_product /= T(G), input_sum /= T(G), input_product /= T(G);
        const T hidden_inverse = inverses[row * 2], input_inverse = inverses[row * 2 + 1];
#pragma omp simd
        for (int64_t j = 0; j < G; ++j) {
          const T d = to[j];
          const T of_input = input_inverse * (d * gain_input[j] - input_sum - from_input[j] * input_product);
          to[j] = hidden_inverse * (d * gain_hidden[j] - hidden_sum - from_hidden[j] * hidden_product);
          to_input[j] = of_input, sum[j] += of_input;
        }
      }
      if (!part.by_sequence) barrier();
    }
  }
}

}  // namespace

void layer_norm_lstm_forward(const LayerNormLSTMForward &f) { f.is_double ? forward<double>(f) : forward<float>(f); }
void layer_norm_lstm_backward(const LayerNormLSTMBackward &f) {
  f.is_double ? backward<double>(f) : backward<float>(f);
}

}  // namespace fastvae::FASTVAE_ISA
