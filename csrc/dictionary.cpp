// The sequential part of a dictionary update, inside a block of atoms (fastvae/ops/dictionary.py holds the definition).
//
// An atom is updated when all before it are, so that nothing but its own features can run side by side: block *
// features multiply-adds an atom, all in the first-level cache; the products between blocks are matrix products
// outside.
#include <cmath>

#include "isa.h"

namespace fastvae::FASTVAE_ISA {
namespace {

template <typename T>
void sweep(const DictionarySweep &p) {
  const int64_t d = p.features;
  T *atoms = static_cast<T *>(p.atoms), *gradient = static_cast<T *>(p.gradient);
  const T *gram = static_cast<const T *>(p.gram);
  for (int64_t k = 0; k < p.atom_count; ++k) {
    if (!p.used[k]) continue;
    T *__restrict atom = atoms + k * d, *__restrict change = gradient + k * d;
    const T step = T(1) / gram[k * p.gram_stride + k];
    T squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < d; ++j) {
      T x = atom[j] + step * change[j];
      x = p.positive && x < T(0) ? T(0) : x;
      change[j] = x;
      squares += x * x;
    }
    const T norm = std::sqrt(squares);
    if (p.sphere && !(norm > T(0))) continue;
    const T scale = T(1) / (p.sphere ? norm : max(norm, T(1)));
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) {
      const T x = change[j] * scale;
      change[j] = x - atom[j];
      atom[j] = x;
    }
    for (int64_t i = k + 1; i < p.atom_count; ++i) {
      const T factor = gram[i * p.gram_stride + k];
      T *__restrict to = gradient + i * d;
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) to[j] -= factor * change[j];
    }
  }
}

}  // namespace

void dictionary_sweep(const DictionarySweep &p) { p.is_double ? sweep<double>(p) : sweep<float>(p); }

}  // namespace fastvae::FASTVAE_ISA
