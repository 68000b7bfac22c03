// Sparse coding: an active set within a working set, ISTA and FISTA, and the solves of the implicit gradient
// (fastvae/ops/sparse.py holds the definitions).
//
// The lasso, a sample: the gradient of all atoms costs nnz * atoms multiply-adds from rows of the Gram matrix,
// which should stay in the second-level cache (atoms <= 512 or so; beyond, nnz * atoms * 4 bytes of the third level are
// the limit). All else happens on the working set, up to twice the support in size, whose Gram block and inverse lie in
// the first level. Atoms join and leave the support's inverse, and the codes move to the exact solution on it, at some
// nnz * set multiply-adds each. Sweeps of coordinate descent, bound by their own latency, come where that fails:
// for dependent atoms, and for very large supports.
//
// ISTA: 4 * atoms * features FLOPs a sample and iteration, or 2 * atoms^2 with the Gram matrix; a block of samples
// stays in the first level through all iterations, the packed dictionary in the second: bound by multiply-adds.
#include "gemm.h"
#include "vecmath.h"

namespace fastvae::FASTVAE_ISA {
namespace {

template <typename T>
FASTVAE_INLINE T shrink(T x, T threshold, bool positive) {
  // Less what the interval of the threshold holds of it: compilers turn this into vector code.
  T held = x > threshold ? threshold : x;
  if (!positive) held = held < -threshold ? -threshold : held;
  return x - held;
}

template <typename T>
FASTVAE_INLINE void add_scaled(T *__restrict to, T factor, const T *__restrict from, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] += factor * from[i];
}
// Lanes: arrays of the working set are read and written a vector at a time, without remainder loops.
template <typename T>
using Lane = typename VectorOf<T>::type;
template <typename T>
FASTVAE_INLINE Lane<T> &lane(T *at) {
  return *reinterpret_cast<Lane<T> *>(at);
}
template <typename T>
FASTVAE_INLINE Lane<T> lane(const T *at) {
  return *reinterpret_cast<const Lane<T> *>(at);
}
constexpr int64_t kPadding = 16;  // a whole number of vectors of any kind
// By halves: a chain of 15 operations would wait for each.
template <typename T, typename Combine>
FASTVAE_INLINE T reduce(Lane<T> x, Combine combine) {
  T parts[kWidth<T>];
  lane(parts) = x;
  for (int64_t half = kWidth<T> / 2; half > 0; half /= 2) {
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) parts[j] = combine(parts[j], parts[j + half]);
  }
  return parts[0];
}
template <typename T>
FASTVAE_INLINE T sum_of(Lane<T> x) {
  return reduce<T>(x, [](T a, T b) { return a + b; });
}
template <typename T>
FASTVAE_INLINE T largest_of(Lane<T> x) {
  return reduce<T>(x, [](T a, T b) { return a > b ? a : b; });
}
FASTVAE_INLINE int64_t padded(int64_t count) { return (count + kPadding - 1) / kPadding * kPadding; }

template <typename T>
FASTVAE_INLINE void add_scaled_lanes(T *to, T factor, const T *from, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth<T>) lane(to + i) += factor * lane(from + i);
}
template <typename T>
FASTVAE_INLINE T dot(const T *__restrict a, const T *__restrict b, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// Upper Cholesky factor in place of the upper triangle of a (n, n) matrix, the reciprocal diagonal in `inverse`; the
// lower triangle is overwritten. A pivot that rounding has eaten ends it: returns false.
template <typename T>
bool factorise(T *a, int64_t n, int64_t stride, T *inverse) {
  const T tiny = sizeof(T) == 8 ? T(1e-12) : T(1e-5);
  for (int64_t j = 0; j < n; ++j) inverse[j] = a[j * stride + j];
  for (int64_t j = 0; j < n; ++j) {
    T *__restrict row = a + j * stride;
    if (!(row[j] > tiny * inverse[j])) return false;
    inverse[j] = T(1) / std::sqrt(row[j]);
#pragma omp simd
    for (int64_t k = j; k < n; ++k) row[k] *= inverse[j];
    for (int64_t i = j + 1; i < n; ++i) {
      const int64_t from = i / kWidth<T> * kWidth<T>;
      add_scaled_lanes(a + i * stride + from, -row[i], row + from, padded(n) - from);
    }
  }
  return true;
}
template <typename T>
void solve_factorised(const T *a, int64_t n, int64_t stride, const T *inverse, T *x) {
  for (int64_t j = 0; j < n; ++j) {
    x[j] *= inverse[j];
    add_scaled(x + j + 1, -x[j], a + j * stride + j + 1, n - j - 1);
  }
  for (int64_t j = n - 1; j >= 0; --j) {
    x[j] = (x[j] - dot(a + j * stride + j + 1, x + j + 1, n - j - 1)) * inverse[j];
  }
}

// Solves a x = x in place for the positive semidefinite matrix that fill(i, row) writes, row i from its diagonal on,
// into `a`. Dependent atoms (duplicates, say) have no inverse: a growing ridge then chooses among the solutions.
template <typename T, typename Fill>
FASTVAE_INLINE void solve_regularised(T *a, int64_t n, int64_t stride, T *inverse, T *x, Fill fill) {
  for (T ridge = 0;; ridge = ridge == T(0) ? T(1e-6) : ridge * T(10)) {
    for (int64_t i = 0; i < n; ++i) {
      fill(i, a + i * stride);
      a[i * stride + i] *= T(1) + ridge;
    }
    if (factorise(a, n, stride, inverse) || ridge > T(1)) break;
  }
  solve_factorised(a, n, stride, inverse, x);
}

// What one thread works with. The working set has `size` atoms; `gram` is their block of A A' + l2 I. Entries beyond
// `size` up to the next multiple of 16 are touched but never used.
template <typename T>
struct Workspace {
  T *c, *score;          // (atoms): c = A (x - h A) - l2 h; how far beyond its threshold an atom outside the set is
  T *gram, *inverse;     // (capacity, stride); the inverse of the basis' block of `gram`, zero outside that block
  T *h, *q, *b;          // (capacity): codes, c and A x of the set
  T *threshold, *scale;  // (capacity): l1 weight, and one over it
  T *pull;               // (capacity): what q is where h is optimal, the threshold with its sign; 0 outside the basis
  T *unit;               // (capacity): one over the diagonal of `gram`
  T *move, *force, *change;  // (capacity)
  int32_t *atom, *basis, *best;
  int64_t size = 0, basis_size = 0, capacity, stride;

  Workspace(char *memory, int64_t m, int64_t capacity) : capacity(capacity), stride(stride_of(capacity)) {
    std::memset(memory, 0, size_t(bytes(m, capacity)));
    const auto take = [&](int64_t count) {
      T *at = reinterpret_cast<T *>(memory);
      memory += padded(count) * int64_t(sizeof(T));
      return at;
    };
    c = take(m), score = take(m);
    gram = take(capacity * stride), inverse = take(capacity * stride);
    h = take(capacity), q = take(capacity), b = take(capacity);
    threshold = take(capacity), scale = take(capacity), pull = take(capacity), unit = take(capacity);
    move = take(capacity), force = take(capacity), change = take(capacity);
    atom = reinterpret_cast<int32_t *>(take(capacity)), basis = reinterpret_cast<int32_t *>(take(capacity));
    best = reinterpret_cast<int32_t *>(take(capacity));
  }
  // Not a power of 2: its columns would share a few sets of the cache.
  static int64_t stride_of(int64_t capacity) { return padded(capacity) + kPadding; }
  static int64_t bytes(int64_t m, int64_t capacity) {
    return int64_t(sizeof(T)) * (2 * padded(m) + 2 * capacity * stride_of(capacity) + 13 * padded(capacity) + 64);
  }
};

// Of the basis. From kLargeBasis on sweeps of the whole set move more at less cost, and exact steps are rare.
constexpr int64_t kLargeBasis = 256, kLargestBasis = 512;

template <typename T>
struct Sample {
  const SparseEncode &p;
  Workspace<T> &w;
  const T *gram, *weights, *products;
  T squared, l1;
  int64_t sweeps = 0;
  T highest_score = 0;
  bool accurate = true;

  T weight(int64_t j) const { return weights ? weights[j] : T(1); }

  // `excess` is the largest |c| over its threshold, of all atoms for a certificate, of the set for the problem
  // restricted to it.
  T gap(T excess) const {
    const T s = excess > T(1) ? T(1) / excess : T(1);
    Lane<T> residual = {}, penalty = {};
    for (int64_t i = 0; i < w.size; i += kWidth<T>) {
      const Lane<T> h = lane(w.h + i), q = lane(w.q + i), size = h < T(0) ? -h : h;
      residual += h * (lane(w.b + i) + q);
      penalty += lane(w.threshold + i) * size - s * (q * h);
    }
    const T missing = max(T(0), squared - sum_of<T>(residual));
    return T(0.5) * (T(1) - s) * (T(1) - s) * missing + max(T(0), sum_of<T>(penalty));
  }
  T gap_of_set() const {
    Lane<T> excess = {};
    for (int64_t i = 0; i < w.size; i += kWidth<T>) {
      const Lane<T> q = lane(w.q + i), size = p.positive ? q : (q < T(0) ? -q : q), ratio = size * lane(w.scale + i);
      excess = ratio > excess ? ratio : excess;
    }
    return gap(largest_of<T>(excess));
  }

  void add(int64_t j, T code) {
    const int64_t at = w.size++, m = p.atoms;
    T *row = w.gram + at * w.stride;
    for (int64_t i = 0; i <= at; ++i) {
      if (i == at) w.atom[i] = int32_t(j);
      const T value = gram[j * m + w.atom[i]];
      row[i] = value, w.gram[i * w.stride + at] = value;
    }
    row[at] += T(p.l2);
    w.unit[at] = T(1) / row[at];
    w.h[at] = code, w.b[at] = products[j], w.q[at] = w.c[j];
    w.threshold[at] = l1 * weight(j), w.scale[at] = T(1) / w.threshold[at];
  }

  // c of every atom, afresh from the codes.
  void correlate() {
    const int64_t m = p.atoms;
    T *__restrict c = w.c;
    std::memcpy(c, products, size_t(m) * sizeof(T));
    const T *rows[4];
    T codes[4];
    int count = 0;
    const auto subtract = [&] {
      const T *__restrict r0 = rows[0], *__restrict r1 = rows[1], *__restrict r2 = rows[2], *__restrict r3 = rows[3];
      const T h0 = codes[0], h1 = codes[1], h2 = codes[2], h3 = codes[3];
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) c[j] -= (h0 * r0[j] + h1 * r1[j]) + (h2 * r2[j] + h3 * r3[j]);
      count = 0;
    };
    for (int64_t i = 0; i < w.size; ++i) {
      if (w.h[i] == T(0)) continue;
      rows[count] = gram + int64_t(w.atom[i]) * m, codes[count] = w.h[i];
      if (++count == 4) subtract();
    }
    if (count) {
      for (; count < 4; ++count) rows[count] = rows[0], codes[count] = T(0);
      subtract();
    }
    for (int64_t i = 0; i < w.size; ++i) {
      w.c[w.atom[i]] -= T(p.l2) * w.h[i];
      w.q[i] = w.c[w.atom[i]];
    }
  }

  // Scores the atoms by how far they are beyond their thresholds, those of the set below all; returns the largest |c|
  // over its threshold of all.
  T score() {
    Lane<T> excess = {}, highest = {};
    for (int64_t j = 0; j < p.atoms; j += kWidth<T>) {
      const Lane<T> c = lane(w.c + j), size = p.positive ? c : (c < T(0) ? -c : c);
      const Lane<T> threshold = weights ? l1 * lane(weights + j) : Lane<T>{} + l1;
      const Lane<T> ratio = weights ? size / threshold : size, score = size - threshold;
      excess = ratio > excess ? ratio : excess;
      highest = score > highest ? score : highest;
      lane(w.score + j) = score;
    }
    for (int64_t i = 0; i < w.size; ++i) w.score[w.atom[i]] = T(-1);
    highest_score = largest_of<T>(highest);
    return largest_of<T>(excess) / (weights ? T(1) : l1);
  }

  // Adds at most as many atoms as the set has, or a first few: the highest score of each class of atoms, if it is not
  // far below the highest of all.
  void grow() {
    const int64_t before = padded(w.size), classes = max(kPadding, w.size / kPadding * kPadding);
    for (int64_t first = 0; first < min(classes, p.atoms); first += kWidth<T>) {
      Lane<T> most = Lane<T>{} + T(0.3) * highest_score, where = {};
      for (int64_t j = first; j < p.atoms; j += classes) {
        const Lane<T> score = lane(w.score + j), index = Lane<T>{} + T(j);
        where = score > most ? index : where;
        most = score > most ? score : most;
      }
      for (int64_t j = 0; j < kWidth<T> && w.size < w.capacity; ++j) {
        if (most[j] > T(0.3) * highest_score) add(int64_t(where[j]) + j, T(0));
      }
    }
    for (int64_t k = 0; k < w.basis_size; ++k) {
      for (int64_t i = before; i < padded(w.size); i += kWidth<T>) {
        lane(w.inverse + w.basis[k] * w.stride + i) = Lane<T>{};
      }
    }
  }

  // What lies in the lanes beyond the set must count for nothing; were it inf or nan, not even times zero.
  void clear() {
    for (int64_t i = 0; i < w.size; i += kWidth<T>) {
      lane(w.h + i) = lane(w.q + i) = lane(w.b + i) = Lane<T>{};
      lane(w.threshold + i) = lane(w.scale + i) = lane(w.pull + i) = Lane<T>{};
    }
    w.size = w.basis_size = 0;
  }

  void drop_zeros() {
    int64_t kept = 0;
    for (int64_t i = 0; i < w.size; ++i) {
      if (w.h[i] != T(0)) w.best[kept] = w.atom[i], w.move[kept++] = w.h[i];
    }
    clear();
    for (int64_t i = 0; i < kept; ++i) add(w.best[i], w.move[i]);
    renew_basis();
  }

  void sweep() {
    const int64_t n = w.size, lanes = padded(n);
    T *__restrict q = w.q;
    for (int64_t i = 0; i < n; ++i) {
      const T *__restrict row = w.gram + i * w.stride;
      const T old = w.h[i], code = shrink(q[i] + old * row[i], w.threshold[i], p.positive) * w.unit[i];
      if (code == old) continue;
      w.h[i] = code;
      add_scaled_lanes(q, old - code, row, lanes);
    }
    ++sweeps;
  }

  // to += sum over the basis of factor[i] * row i of a (capacity, stride) matrix, for kVectors vectors of it.
  template <int kVectors>
  void add_rows(T *to, const T *factor, const T *matrix) const {
    Lane<T> sums[2][kVectors] = {};  // two chains: one would wait for its own additions
    int64_t k = 0;
    const auto add = [&](Lane<T> *sum) {
      const int64_t at = w.basis[k++];
      for (int v = 0; v < kVectors; ++v) sum[v] += factor[at] * lane(matrix + at * w.stride + v * kWidth<T>);
    };
    while (k + 1 < w.basis_size) add(sums[0]), add(sums[1]);
    if (k < w.basis_size) add(sums[0]);
    for (int v = 0; v < kVectors; ++v) lane(to + v * kWidth<T>) += sums[0][v] + sums[1][v];
  }
  void add_rows(T *to, const T *factor, const T *matrix) const {
    const int64_t lanes = padded(w.size);
    int64_t i = 0;
    for (; i + 4 * kWidth<T> <= lanes; i += 4 * kWidth<T>) add_rows<4>(to + i, factor, matrix + i);
    for (; i + 2 * kWidth<T> <= lanes; i += 2 * kWidth<T>) add_rows<2>(to + i, factor, matrix + i);
    for (; i < lanes; i += kWidth<T>) add_rows<1>(to + i, factor, matrix + i);
  }
  void update_inverse(T factor) {
    const int64_t lanes = padded(w.size);
    for (int64_t k = 0; k < w.basis_size; ++k) {
      add_scaled_lanes(w.inverse + w.basis[k] * w.stride, factor * w.move[w.basis[k]], w.move, lanes);
    }
  }

  // Borders the inverse by an atom of the set; not by one that depends on the basis: then returns false.
  bool enter(int64_t j, T sign) {
    if (w.basis_size == kLargestBasis) return false;
    const T tiny = sizeof(T) == 8 ? T(1e-9) : T(1e-3);
    const T *row = w.gram + j * w.stride;
    const int64_t lanes = padded(w.size);
    for (int64_t i = 0; i < lanes; i += kWidth<T>) lane(w.move + i) = Lane<T>{};
    add_rows(w.move, row, w.inverse);
    Lane<T> explained = {};
    for (int64_t i = 0; i < lanes; i += kWidth<T>) explained += lane(row + i) * lane(w.move + i);
    const T left = row[j] - sum_of<T>(explained);
    if (!(left > tiny * row[j])) return false;
    w.basis[w.basis_size++] = int32_t(j), w.pull[j] = sign > T(0) ? w.threshold[j] : -w.threshold[j];
    w.move[j] = T(-1);
    for (int64_t i = 0; i < lanes; i += kWidth<T>) lane(w.inverse + j * w.stride + i) = Lane<T>{};
    update_inverse(T(1) / left);
    return true;
  }
  void leave(int64_t k) {
    const int64_t j = w.basis[k];
    const T *row = w.inverse + j * w.stride;
    for (int64_t i = 0; i < padded(w.size); i += kWidth<T>) lane(w.move + i) = lane(row + i);
    w.basis[k] = w.basis[--w.basis_size], w.pull[j] = T(0);
    update_inverse(T(-1) / row[j]);
    for (int64_t i = 0; i < w.basis_size; ++i) w.inverse[w.basis[i] * w.stride + j] = T(0);
  }
  void forget_basis() {  // and with it the errors of its inverse
    for (; w.basis_size > 0; --w.basis_size) w.pull[w.basis[w.basis_size - 1]] = T(0);
  }
  // Makes the basis the support of the codes, as far as it is independent.
  void renew_basis() {
    for (int64_t k = w.basis_size; k-- > 0;) {
      const int64_t j = w.basis[k];
      if (!(w.h[j] * w.pull[j] > T(0))) leave(k);
    }
    for (int64_t j = 0; j < w.size; ++j) {
      if (w.h[j] != T(0) && w.pull[j] == T(0)) enter(j, w.h[j]);
    }
  }

  // Moves to the exact solution for the basis and its signs, as far as no sign changes: the atom whose sign would
  // leaves the basis. Returns whether one did.
  bool exact_step() {
    const int64_t lanes = padded(w.size);
    for (int64_t i = 0; i < lanes; i += kWidth<T>) {
      const Lane<T> pull = lane(w.pull + i);
      lane(w.change + i) = pull != T(0) ? lane(w.q + i) - pull : Lane<T>{};
      lane(w.move + i) = lane(w.force + i) = Lane<T>{};
    }
    add_rows(w.move, w.change, w.inverse);
    add_rows(w.force, w.move, w.gram);
    const Lane<T> whole = Lane<T>{} + T(1);
    Lane<T> shortest = whole, slope = {}, curvature = {};
    for (int64_t i = 0; i < lanes; i += kWidth<T>) {
      const Lane<T> h = lane(w.h + i), move = lane(w.move + i);
      const Lane<T> length = (h + move) * lane(w.pull + i) < T(0) ? -h / move : whole;
      shortest = length < shortest ? length : shortest;
      slope += move * lane(w.change + i), curvature += move * lane(w.force + i);
      lane(w.change + i) = length;
    }
    // The minimum on the way is at its end, but for rounding in the inverse.
    const T gain = sum_of<T>(slope), best = gain / sum_of<T>(curvature), least = -largest_of<T>(-shortest);
    accurate = gain == T(0) || (best > T(0.5) && best < T(2));
    const T end = accurate && best < T(1) ? best : T(accurate), length = least < end ? least : end;
    const bool blocked = least < end;
    for (int64_t i = 0; i < lanes; i += kWidth<T>) {
      lane(w.h + i) += length * lane(w.move + i), lane(w.q + i) -= length * lane(w.force + i);
    }
    ++sweeps;
    for (int64_t k = w.basis_size; blocked && k-- > 0;) {
      const int64_t j = w.basis[k];
      if (w.change[j] > length) continue;
      add_scaled_lanes(w.q, w.h[j], w.gram + j * w.stride, lanes);  // what rounding left of its code
      w.h[j] = T(0);
      leave(k);
      break;
    }
    return blocked;
  }

  // The atoms of the set most beyond their thresholds join the basis, more of them where steps cost more; returns
  // whether any did.
  bool enter_best() {
    Lane<T> most = {}, where = {};
    for (int64_t i = 0; i < w.size; i += kWidth<T>) {
      const Lane<T> q = lane(w.q + i), size = p.positive ? q : (q < T(0) ? -q : q);
      const Lane<T> ratio = lane(w.pull + i) == T(0) ? size * lane(w.scale + i) : Lane<T>{};
      where = ratio > most ? Lane<T>{} + T(i) : where;
      most = ratio > most ? ratio : most;
    }
    const T highest = largest_of<T>(most), enough = max(T(1), highest - T(0.3) * (highest - T(1)));
    int64_t left = 1 + w.size / 16;
    bool any = false;
    for (int64_t j = 0; j < kWidth<T> && left > 0; ++j) {
      if (!(most[j] > T(1)) || most[j] < enough) continue;
      const int64_t at = int64_t(where[j]) + j;
      if (w.h[at] == T(0) && enter(at, w.q[at])) any = true, --left;
    }
    return any;
  }

  bool solve(const T *init, T *codes, T *gap_out) {
    const int64_t m = p.atoms;
    const T target = T(p.tol) * squared;
    clear();
    for (int64_t j = 0; init && j < m && w.size < w.capacity; ++j) {
      if (init[j] != T(0) && gram[j * m + j] > T(0)) add(j, init[j]);
    }
    renew_basis();
    bool converged = false;
    T reached = 0, lowest = 0;
    for (int64_t round = 0, stalled = 0;; ++round) {
      correlate();
      reached = gap(score());
      converged = reached <= target;
      stalled = round == 0 || reached < T(0.9) * lowest ? 0 : stalled + 1;
      if (stalled == 0) lowest = reached;
      if (converged || sweeps >= p.max_iter || stalled >= 10) break;
      if (w.size == w.capacity) drop_zeros();
      grow();
      // The restricted problem need be no better than what the rest leaves open; when stalled, it is.
      const T enough = stalled ? T(0.1) * target : max(T(0.1) * reached, T(0.3) * target);
      bool stale = false;
      for (int64_t swept = 0; sweeps < p.max_iter && swept < 100;) {
        const bool large = w.basis_size >= kLargeBasis;
        if (!large || swept % 16 == 0) {
          if (stale) renew_basis();
          stale = false;
          while (exact_step() && sweeps < p.max_iter) {
          }
        }
        if (gap_of_set() <= enough) break;
        if (!large && accurate && enter_best()) continue;
        sweep();
        if (!accurate) forget_basis();
        ++swept, stale = true;
      }
      if (stale) renew_basis();
    }
    std::memset(codes, 0, size_t(m) * sizeof(T));
    for (int64_t i = 0; i < w.size; ++i) codes[w.atom[i]] = w.h[i];
    *gap_out = squared > T(0) ? reached / squared : T(0);
    return converged;
  }
};

template <typename T>
void encode(const SparseEncode &p) {
  const T *products = static_cast<const T *>(p.products), *squared = static_cast<const T *>(p.squared);
  const T *l1 = static_cast<const T *>(p.l1), *init = static_cast<const T *>(p.init);
  T *codes = static_cast<T *>(p.codes), *gap = static_cast<T *>(p.gap);
  const int threads = int(min<int64_t>(threads_for(p.samples, 4), p.workspaces));
#pragma omp parallel num_threads(threads)
  {
    Workspace<T> work(static_cast<char *>(p.memory) + thread_index() * Workspace<T>::bytes(p.atoms, p.capacity),
                      p.atoms, p.capacity);
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < p.samples; ++i) {
      Sample<T> sample{
          p,          work, static_cast<const T *>(p.gram), static_cast<const T *>(p.weights), products + i * p.atoms,
          squared[i], l1[i]};
      const bool converged = sample.solve(init ? init + i * p.atoms : nullptr, codes + i * p.atoms, gap + i);
      p.iterations[i] = sample.sweeps;
      p.status[i] = converged ? 0 : 1;
    }
  }
}

// For each sample: solves (G_SS + l2 I) v = g on the support S of its codes; v is zero elsewhere.
template <typename T>
void solve_support(const SparseSupport &p) {
  const int64_t m = p.atoms;
  const T *gram = static_cast<const T *>(p.gram);
  const int threads = int(min<int64_t>(threads_for(p.samples, 4), p.workspaces));
#pragma omp parallel num_threads(threads)
  {
    Workspace<T> w(static_cast<char *>(p.memory) + thread_index() * Workspace<T>::bytes(m, p.capacity), m, p.capacity);
#pragma omp for schedule(dynamic, 4)
    for (int64_t s = 0; s < p.samples; ++s) {
      const T *codes = static_cast<const T *>(p.codes) + s * m, *g = static_cast<const T *>(p.grad) + s * m;
      T *solution = static_cast<T *>(p.solution) + s * m;
      int64_t n = 0;
      for (int64_t j = 0; j < m; ++j) {
        if (codes[j] != T(0)) w.atom[n++] = int32_t(j);
      }
      for (int64_t i = 0; i < n; ++i) w.move[i] = g[w.atom[i]];
      solve_regularised(w.inverse, n, w.stride, w.unit, w.move, [&](int64_t i, T *row) {
        for (int64_t k = i; k < n; ++k) row[k] = gram[w.atom[i] * m + w.atom[k]];
        row[i] += T(p.l2);
      });
      std::memset(solution, 0, size_t(m) * sizeof(T));
      for (int64_t i = 0; i < n; ++i) solution[w.atom[i]] = w.move[i];
    }
  }
}

constexpr int kIstaVectors = kAccumulators >= 24 ? 4 : 2;
constexpr int64_t kIstaRows = 4 * (kAccumulators / kIstaVectors);

// Packs a (inner, columns) matrix with the given strides for multiply_packed.
template <typename T>
void pack(const T *from, int64_t inner, int64_t columns, int64_t stride, int64_t step, T *to) {
  constexpr int64_t W = kIstaVectors * kWidth<T>;
  for (int64_t block = 0; block * W < columns; ++block) {
    for (int64_t k = 0; k < inner; ++k) {
      for (int64_t j = 0; j < W; ++j) {
        const int64_t column = block * W + j;
        to[(block * inner + k) * W + j] = column < columns ? from[k * stride + column * step] : T(0);
      }
    }
  }
}

// The epilogue of an iteration's last product, for a piece of one sample; `point` and `next` may be the same.
template <typename T, bool kGram>
FASTVAE_INLINE void ista_update(int64_t n, const T *product, const T *products, const T *point, T *next, T *codes,
                                T step, T threshold, T beta) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T gradient = kGram ? products[j] - product[j] : product[j];
    const T code = shrink(point[j] + step * gradient, threshold, false);
    next[j] = code + beta * (code - codes[j]);
    codes[j] = code;
  }
}

template <typename T, bool kGram>
void ista(const Ista &p) {
  constexpr int64_t W = kIstaVectors * kWidth<T>;
  const int64_t m = p.atoms, d = p.features;
  const int64_t wide = (m + W - 1) / W, narrow = (d + W - 1) / W;
  const T *matrix = static_cast<const T *>(p.matrix), *target = static_cast<const T *>(p.target);
  const T *l1 = static_cast<const T *>(p.l1), *init = static_cast<const T *>(p.init);
  T *codes_out = static_cast<T *>(p.codes), *packed = static_cast<T *>(p.packed);
  T *packed_back = packed + (kGram ? 0 : narrow * m * W);  // residual form: A, then its transpose
  const int64_t inner = kGram ? m : d;
  const T step = T(p.step);
  const int64_t blocks = (p.samples + kIstaRows - 1) / kIstaRows;
  const int threads = int(min<int64_t>(threads_for(blocks, 1), p.workspaces));
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    {
      if (kGram) {
        pack(matrix, m, m, m, 1, packed_back);
      } else {
        pack(matrix, m, d, d, 1, packed);
        pack(matrix, d, m, 1, d, packed_back);
      }
    }
    // Of a block of samples: codes, the point the gradient is taken at, and the residual or the next point.
    T *const codes = static_cast<T *>(p.memory) + thread_index() * kIstaRows * (2 * m + inner);
    T *const points = codes + kIstaRows * m, *const other = points + kIstaRows * m;
#pragma omp for schedule(dynamic, 1)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * kIstaRows, rows = min(kIstaRows, p.samples - first);
      T *point = points, *next = kGram ? other : points;
      if (init) {
        std::memcpy(codes, init + first * m, size_t(rows * m) * sizeof(T));
      } else {
        std::memset(codes, 0, size_t(rows * m) * sizeof(T));
      }
      std::memcpy(point, codes, size_t(rows * m) * sizeof(T));
      double t = 1.0;
      for (int64_t iteration = 0; iteration < p.max_iter; ++iteration) {
        const double t_next = p.momentum ? 0.5 * (1.0 + std::sqrt(1.0 + 4.0 * t * t)) : 1.0;
        const T beta = T((t - 1.0) / t_next);
        t = t_next;
        for (int64_t b = 0; !kGram && b < narrow; ++b) {
          const int64_t column = b * W, valid = min<int64_t>(W, d - column);
          multiply_packed<T, kIstaVectors>(rows, m, point, m, packed + b * m * W,
                                           [&](int64_t row, int count, const T *__restrict product) {
                                             for (int r = 0; r < count; ++r, product += W) {
                                               const T *__restrict x = target + (first + row + r) * d + column;
                                               T *__restrict to = other + (row + r) * d + column;
#pragma omp simd
                                               for (int64_t j = 0; j < valid; ++j) to[j] = x[j] - product[j];
                                             }
                                           });
        }
        for (int64_t b = 0; b < wide; ++b) {
          const int64_t column = b * W, valid = min<int64_t>(W, m - column);
          multiply_packed<T, kIstaVectors>(rows, inner, kGram ? point : other, inner, packed_back + b * inner * W,
                                           [&](int64_t row, int count, const T *product) {
                                             for (int r = 0; r < count; ++r, product += W) {
                                               const int64_t at = (row + r) * m + column;
                                               const T *products = kGram ? target + (first + row + r) * m + column
                                                                         : nullptr;
                                               const T threshold = step * l1[first + row + r];
                                               if (valid == W) {
                                                 ista_update<T, kGram>(W, product, products, point + at, next + at,
                                                                       codes + at, step, threshold, beta);
                                               } else {
                                                 ista_update<T, kGram>(valid, product, products, point + at, next + at,
                                                                       codes + at, step, threshold, beta);
                                               }
                                             }
                                           });
        }
        if (kGram) {
          T *const swapped = point;
          point = next, next = swapped;
        }
      }
      std::memcpy(codes_out + first * m, codes, size_t(rows * m) * sizeof(T));
    }
  }
}

}  // namespace

void sparse_encode(const SparseEncode &p) { p.is_double ? encode<double>(p) : encode<float>(p); }
void sparse_solve_support(const SparseSupport &p) { p.is_double ? solve_support<double>(p) : solve_support<float>(p); }
int64_t sparse_workspace(bool is_double, int64_t atoms, int64_t capacity) {
  return is_double ? Workspace<double>::bytes(atoms, capacity) : Workspace<float>::bytes(atoms, capacity);
}
void ista(const Ista &p) {
  if (p.use_gram) return p.is_double ? ista<double, true>(p) : ista<float, true>(p);
  return p.is_double ? ista<double, false>(p) : ista<float, false>(p);
}
IstaSizes ista_sizes(const Ista &p) {
  const int64_t W = kIstaVectors * (p.is_double ? kWidth<double> : kWidth<float>);
  const int64_t wide = (p.atoms + W - 1) / W, narrow = (p.features + W - 1) / W;
  if (p.use_gram) return {wide * p.atoms * W, kIstaRows * 3 * p.atoms};
  return {narrow * p.atoms * W + wide * p.features * W, kIstaRows * (2 * p.atoms + p.features)};
}

}  // namespace fastvae::FASTVAE_ISA
