// The GRU recurrence over packed sequences, forward and backward (fastvae/ops/gru.py holds the definition).
//
// A step multiplies the active sequences' states (rows) by the packed recurrent weight; the gates are the epilogue, so
// that a step is one pass; threads share it out as recurrence.h says. FLOPs per token: 6 hidden^2 forward, 6 hidden^2
// backward (the weight's gradient is one product outside). The weight, 12 hidden^2 bytes, is read once a step by each
// thread that owns sequences, once by all that own units.
//
// A row of gates is m, r, z, n: m is the recurrence's share of n, which r multiplies. The last three are the input's,
// the first three the recurrence's, so that the products of either read and write columns side by side.
#include "recurrence.h"
#include "vecmath.h"

namespace fastvae::FASTVAE_ISA {
namespace {

template <typename T>
void forward(const GRUForward &f) {
  const PackedPlan &plan = f.plan;
  const Packed packed(plan);
  const int64_t H = plan.hidden, G = 4 * H, sequences = packed.sequences, stride = f.input_stride;
  constexpr int64_t W = kWidth<T>;
  const int64_t blocks = (H + W - 1) / W;  // of W hidden units: r, z and n of them are a tile's three vectors
  const T *inputs = static_cast<const T *>(f.inputs), *static_gates = static_cast<const T *>(f.static_gates);
  const T *h0 = static_cast<const T *>(f.h0), *weight = static_cast<const T *>(f.weight_hh);
  T *gates = static_cast<T *>(f.gates), *hidden = static_cast<T *>(f.hidden), *h_n = static_cast<T *>(f.h_n);
  T *states = static_cast<T *>(f.states), *packed_weight = static_cast<T *>(f.packed_weight);
  const int threads = int(min<int64_t>(threads_for(sequences * 6 * H * H, kGrainFlops), max<int64_t>(blocks, 1)));

#pragma omp parallel num_threads(threads)
  {
    const Range mine = my_share(blocks), owned = my_share(sequences);
    for (int64_t block = mine.first; block < mine.last; ++block) {
      const int64_t unit = block * W, valid = min<int64_t>(W, H - unit);
      T *to = packed_weight + block * H * 3 * W;
      // Line by line of the weight: its rows may lie a power of two apart.
      for (int64_t k = 0; k < H; k += W) {
        const int64_t depth = min<int64_t>(W, H - k);
        for (int64_t gate = 0; gate < 3; ++gate) {
          for (int64_t j = 0; j < W; ++j) {
            const T *from = weight + (gate * H + unit + j) * H + k;
            for (int64_t i = 0; i < depth; ++i) to[((k + i) * 3 + gate) * W + j] = j < valid ? from[i] : T(0);
          }
        }
      }
    }
    // Two steps' states by rank, in turn: those before step 0 lie where an odd step's do.
    for (int64_t rank = owned.first; rank < owned.last; ++rank) {
      std::memcpy(states + (sequences + rank) * H, h0 + packed.sequence(rank) * H, size_t(H) * sizeof(T));
    }
    barrier();

    const Part part = my_part(sequences, blocks, 3 * H * H * int64_t(sizeof(T)));
    for (int64_t t = 0; t < plan.time && plan.active[t] > 0; ++t) {
      const T *before = states + (1 - t % 2) * sequences * H;
      T *after = states + t % 2 * sequences * H;
      for (int64_t block = part.blocks.first; block < part.blocks.last; ++block) {
        const int64_t unit = block * W, valid = min<int64_t>(W, H - unit);
        multiply_packed<T, 3>(
            part.ranks(packed.active(t)), H, before + part.rank * H, part.stride * H, packed_weight + block * H * 3 * W,
            [&](int64_t first, int count, const T *__restrict product) {
              for (int i = 0; i < count; ++i, product += 3 * W) {
                const int64_t rank = part.rank + (first + i) * part.stride, row = packed.start(t) + rank;
                const int64_t sequence = packed.sequence(rank);
                const T *__restrict extra = static_gates + sequence * G + unit;
                const T *__restrict previous = before + rank * H + unit;
                const T *input = inputs + packed.token(row) * stride + unit;  // may lie within `gates`
                T *gate = gates + row * G + unit;
                T *__restrict state = after + rank * H + unit;
                T *__restrict out = hidden + (sequence * plan.time + t) * H + unit;
                const auto activate = [&](const int64_t n, const bool keep) __attribute__((always_inline)) {
#pragma omp simd
                  for (int64_t j = 0; j < n; ++j) {
                    const T m = product[2 * W + j] + extra[j];
                    const T r = sigmoid(product[j] + input[j] + extra[H + j]);
                    const T z = sigmoid(product[W + j] + input[H + j] + extra[2 * H + j]);
                    const T candidate = tanh(input[2 * H + j] + extra[3 * H + j] + r * m);
                    const T h = candidate + z * (previous[j] - candidate);
                    if (keep) gate[j] = m, gate[H + j] = r, gate[2 * H + j] = z, gate[3 * H + j] = candidate;
                    state[j] = h, out[j] = h;
                  }
                };
                if (gates) {
                  valid == W ? activate(W, true) : activate(valid, true);
                } else {
                  valid == W ? activate(W, false) : activate(valid, false);
                }
              }
            },
            packed_weight + (block + 1 < part.blocks.last ? block + 1 : part.blocks.first) * H * 3 * W);
      }
      if (!part.by_sequence) barrier();
    }
    if (part.by_sequence) barrier();

    for (int64_t rank = owned.first; rank < owned.last; ++rank) {
      const int64_t sequence = packed.sequence(rank), length = packed.length(rank);
      T *const end = hidden + (sequence * plan.time + length) * H;
      std::memset(end, 0, size_t((plan.time - length) * H) * sizeof(T));
      std::memcpy(h_n + sequence * H, length == 0 ? h0 + sequence * H : end - H, size_t(H) * sizeof(T));
    }
  }
}

template <typename T>
void backward(const GRUBackward &f) {
  const PackedPlan &plan = f.plan;
  const Packed packed(plan);
  const int64_t H = plan.hidden, G = 4 * H, sequences = packed.sequences;
  constexpr int64_t kVectors = 2, W = kVectors * kWidth<T>;
  const int64_t blocks = (H + W - 1) / W;
  const T *gates = static_cast<const T *>(f.gates), *hidden = static_cast<const T *>(f.hidden);
  const T *h0 = static_cast<const T *>(f.h0), *weight = static_cast<const T *>(f.weight_hh);
  const T *grad_hidden = static_cast<const T *>(f.grad_hidden), *grad_h_n = static_cast<const T *>(f.grad_h_n);
  T *grad_gates = static_cast<T *>(f.grad_gates), *grad_static = static_cast<T *>(f.grad_static_gates);
  T *grad_h = static_cast<T *>(f.grad_h0);  // running: what has come to a state not through the recurrent product
  T *before = static_cast<T *>(f.before), *packed_weight = static_cast<T *>(f.packed_weight);
  const int threads = int(min<int64_t>(threads_for(sequences * 6 * H * H, kGrainFlops), max<int64_t>(blocks, 1)));

#pragma omp parallel num_threads(threads)
  {
    const Range mine = my_share(blocks), owned = my_share(sequences);
    for (int64_t block = mine.first; block < mine.last; ++block) {
      const int64_t unit = block * W, valid = min<int64_t>(W, H - unit);
      T *to = packed_weight + block * 3 * H * W;
      for (int64_t k = 0; k < 3 * H; ++k, to += W) {
        const T *from = weight + (k < H ? 2 * H + k : k - H) * H + unit;  // m, r, z
        for (int64_t j = 0; j < W; ++j) to[j] = j < valid ? from[j] : T(0);
      }
    }
    const int64_t own = owned.first * H, count = (owned.last - owned.first) * H;
    if (grad_h_n) {
      std::memcpy(grad_h + own, grad_h_n + own, size_t(count) * sizeof(T));
    } else {
      std::memset(grad_h + own, 0, size_t(count) * sizeof(T));
    }
    std::memset(grad_static + 4 * own, 0, size_t(4 * count) * sizeof(T));
    barrier();

    const Part part = my_part(sequences, blocks, 3 * H * H * int64_t(sizeof(T)));
    const T zeros[W] = {};
    // Step -1 makes the gradient of h0. Ranks not active in the step after get nothing through its product.
    for (int64_t t = plan.time - 1; t >= -1; --t) {
      const int64_t flowing = t + 1 < plan.time ? packed.active(t + 1) : 0;
      const T *next_gates = flowing > 0 ? grad_gates + (packed.start(t + 1) + part.rank) * G : grad_gates;
      for (int64_t block = part.blocks.first; block < part.blocks.last; ++block) {
        const int64_t unit = block * W, valid = min<int64_t>(W, H - unit);
        const auto step = [&](int64_t rank, const T *__restrict product) {
          const int64_t sequence = packed.sequence(rank);
          T *__restrict dh_kept = grad_h + sequence * H + unit;
          if (t < 0) {
            for (int64_t j = 0; j < valid; ++j) dh_kept[j] += product[j];
            return;
          }
          const int64_t row = packed.start(t) + rank, place = (sequence * plan.time + t) * H + unit;
          const T *__restrict previous = t == 0 ? h0 + sequence * H + unit : hidden + place - H;
          const T *__restrict gate = gates + row * G + unit;
          const T *__restrict from_output = grad_hidden ? grad_hidden + place : zeros;
          T *__restrict to = grad_gates + row * G + unit, *__restrict sum = grad_static + sequence * G + unit;
          T *__restrict copy = before + row * H + unit;
          const auto differentiate = [&](const int64_t n) __attribute__((always_inline)) {
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) {
              const T m = gate[j], r = gate[H + j], z = gate[2 * H + j], candidate = gate[3 * H + j];
              const T dh = dh_kept[j] + product[j] + from_output[j];
              const T dn = dh * (T(1) - z) * (T(1) - candidate * candidate);
              const T dz = dh * (previous[j] - candidate) * z * (T(1) - z);
              const T dm = dn * r, dr = dn * m * r * (T(1) - r);
              dh_kept[j] = dh * z;
              copy[j] = previous[j];
              to[j] = dm, to[H + j] = dr, to[2 * H + j] = dz, to[3 * H + j] = dn;
              sum[j] += dm, sum[H + j] += dr, sum[2 * H + j] += dz, sum[3 * H + j] += dn;
            }
          };
          valid == W ? differentiate(W) : differentiate(valid);
        };
        const int64_t products = part.ranks(flowing);
        multiply_packed<T, kVectors>(
            products, 3 * H, next_gates, part.stride * G, packed_weight + block * 3 * H * W,
            [&](int64_t first, int rows, const T *product) {
              for (int i = 0; i < rows; ++i, product += W) {
                step(part.rank + (first + i) * part.stride, product);
              }
            },
            packed_weight + (block + 1 < part.blocks.last ? block + 1 : part.blocks.first) * 3 * H * W);
        const int64_t entered = t < 0 ? products : part.ranks(packed.active(t));
        for (int64_t i = products; i < entered; ++i) step(part.rank + i * part.stride, zeros);
      }
      if (!part.by_sequence) barrier();
    }
  }
}

}  // namespace

void gru_forward(const GRUForward &f) { f.is_double ? forward<double>(f) : forward<float>(f); }
void gru_backward(const GRUBackward &f) { f.is_double ? backward<double>(f) : backward<float>(f); }

}  // namespace fastvae::FASTVAE_ISA
