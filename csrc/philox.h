// The shared random stream: Philox4x32-10 (Salmon et al. 2011), counter (low, high, 0, 0), key (seed low, seed high).
// Uniform of element e: first word of counter e; packed uniform: word e % 4 of counter e / 4. Normal of element e:
// number e % 4 of counter e / 4, the two Box-Muller pairs of its four words. See fastvae/ops/random.py, the reference.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vecmath.h"

namespace fastvae::FASTVAE_ISA {

// Vectors of 64-bit lanes. multiply_low multiplies the lower halves: a Philox round in this form is two
// multiplications, two shuffles and two xors, with no packing in between, since garbage in the upper halves is never
// read. Compilers do not find it (they emulate a full 64-bit product), hence the intrinsics. A round's instructions
// wait for each other: kInterleaved vectors of counters go through it together.
#if defined(__AVX512F__)
using Lanes = __m512i;
constexpr int64_t kInterleaved = 4;
FASTVAE_INLINE Lanes splat(uint64_t x) { return _mm512_set1_epi64(int64_t(x)); }
FASTVAE_INLINE Lanes multiply_low(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
FASTVAE_INLINE Lanes upper(Lanes a) { return _mm512_shuffle_epi32(a, _MM_PERM_ENUM(0xF5)); }
FASTVAE_INLINE Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
FASTVAE_INLINE void store_low(uint32_t *to, Lanes a) { _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi64_epi32(a)); }
FASTVAE_INLINE Lanes count_from(uint32_t x) {
  return _mm512_add_epi64(splat(x), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
}
#elif defined(__AVX2__)
using Lanes = __m256i;
constexpr int64_t kInterleaved = 2;
FASTVAE_INLINE Lanes splat(uint64_t x) { return _mm256_set1_epi64x(int64_t(x)); }
FASTVAE_INLINE Lanes multiply_low(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
FASTVAE_INLINE Lanes upper(Lanes a) { return _mm256_shuffle_epi32(a, 0xF5); }
FASTVAE_INLINE Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
FASTVAE_INLINE void store_low(uint32_t *to, Lanes a) {
  const __m256i packed = _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(packed));
}
FASTVAE_INLINE Lanes count_from(uint32_t x) { return _mm256_add_epi64(splat(x), _mm256_setr_epi64x(0, 1, 2, 3)); }
#else
using Lanes = uint64_t;
constexpr int64_t kInterleaved = 2;
FASTVAE_INLINE Lanes splat(uint64_t x) { return x; }
FASTVAE_INLINE Lanes multiply_low(Lanes a, Lanes b) { return uint64_t(uint32_t(a)) * uint32_t(b); }
FASTVAE_INLINE Lanes upper(Lanes a) { return a >> 32; }
FASTVAE_INLINE Lanes xor3(Lanes a, Lanes b, Lanes c) { return a ^ b ^ c; }
FASTVAE_INLINE void store_low(uint32_t *to, Lanes a) { *to = uint32_t(a); }
FASTVAE_INLINE Lanes count_from(uint32_t x) { return x; }
#endif
constexpr int64_t kLanes = sizeof(Lanes) / 8, kCountersAtOnce = kLanes * kInterleaved;

// Writes the words of counters [counter, counter + count), words[k][i]; may write up to kCountersAtOnce - 1 more. The
// low counter word is a plain sum: a run that crosses a multiple of 2^32 is cut there.
template <int kWords>
FASTVAE_INLINE void fill_words(uint64_t seed, uint64_t counter, int64_t count, uint32_t *const (&words)[kWords]) {
  const Lanes a = splat(0xD2511F53u), b = splat(0xCD9E8D57u);
  for (int64_t done = 0; done < count;) {
    const uint32_t low = uint32_t(counter + done), high = uint32_t((counter + done) >> 32);
    const int64_t run = min<int64_t>(count - done, int64_t(0xFFFFFFFFu - low) + 1);
    for (int64_t i = 0; i < run; i += kCountersAtOnce) {
      Lanes c[kInterleaved][4];
      for (int64_t v = 0; v < kInterleaved; ++v) {
        c[v][0] = count_from(low + uint32_t(i + v * kLanes));
        c[v][1] = splat(high), c[v][2] = splat(0), c[v][3] = splat(0);
      }
      uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
      for (int round = 0; round < 10; ++round) {
        const Lanes key0 = splat(k0), key1 = splat(k1);
#pragma GCC unroll 4
        for (int64_t v = 0; v < kInterleaved; ++v) {
          const Lanes product_a = multiply_low(c[v][0], a), product_b = multiply_low(c[v][2], b);
          c[v][0] = xor3(upper(product_b), c[v][1], key0);
          c[v][2] = xor3(upper(product_a), c[v][3], key1);
          c[v][1] = product_b, c[v][3] = product_a;
        }
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
      }
      for (int64_t v = 0; v < kInterleaved; ++v) {
        for (int k = 0; k < kWords; ++k) store_low(words[k] + done + i + v * kLanes, c[v][k]);
      }
    }
    done += run;
  }
}

// In [0, 1): the sign bit is folded in, so that 31 bits are used.
FASTVAE_INLINE float to_uniform(uint32_t word) {
  const int32_t value = int32_t(word);
  return float(value < 0 ? ~value : value) * 4.6566127342e-10f;
}

FASTVAE_INLINE CosSin to_normals(uint32_t first, uint32_t second) {
  float u = to_uniform(first);
  u = u < 1e-7f ? 1e-7f : u;
  const float radius = std::sqrt(-2.0f * log(u));
  const CosSin angle = cos_sin_turns(to_uniform(second));
  return {radius * angle.cos, radius * angle.sin};
}

constexpr int64_t kNoiseBlock = 1024;  // elements a call of block_of may give

// Numbers of elements [first, first + count) with count <= kNoiseBlock, four of a counter: numbers(words, to) makes
// them. `out` has room for count + 8; returns where in it the first element lies.
template <typename Numbers>
FASTVAE_INLINE const float *block_of(uint64_t seed, uint64_t first, int64_t count, float *out, Numbers numbers) {
  constexpr int64_t kCounters = kNoiseBlock / 4 + 1 + kCountersAtOnce;
  alignas(64) uint32_t w0[kCounters], w1[kCounters], w2[kCounters], w3[kCounters];
  const uint64_t counter = first / 4;
  const int64_t counters = int64_t((first + count + 3) / 4 - counter);
  uint32_t *const words[4] = {w0, w1, w2, w3};
  fill_words<4>(seed, counter, counters, words);
#pragma omp simd
  for (int64_t i = 0; i < counters; ++i) numbers(w0[i], w1[i], w2[i], w3[i], out + 4 * i);
  return out + first % 4;
}

FASTVAE_INLINE const float *normal_block(uint64_t seed, uint64_t first, int64_t count, float *out) {
  return block_of(seed, first, count, out, [](uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3, float *to) {
    const CosSin a = to_normals(w0, w1), b = to_normals(w2, w3);
    to[0] = a.cos, to[1] = a.sin, to[2] = b.cos, to[3] = b.sin;
  });
}

FASTVAE_INLINE const float *uniform_block(uint64_t seed, uint64_t first, int64_t count, float *out) {
  return block_of(seed, first, count, out, [](uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3, float *to) {
    to[0] = to_uniform(w0), to[1] = to_uniform(w1), to[2] = to_uniform(w2), to[3] = to_uniform(w3);
  });
}

FASTVAE_INLINE const float *gumbel_block(uint64_t seed, uint64_t first, int64_t count, float *out) {
  const float *from = uniform_block(seed, first, count, out);
#pragma omp simd
  for (int64_t i = 0; i < int64_t(first % 4) + count; ++i) out[i] = -log(-log(out[i] < 0x1p-32f ? 0x1p-32f : out[i]));
  return from;
}

FASTVAE_INLINE void fill_uniform(uint64_t seed, uint64_t first, int64_t count, float *out) {
  constexpr int64_t kBlock = 1024;
  alignas(64) uint32_t block[kBlock + kCountersAtOnce];
  uint32_t *const words[1] = {block};
  for (int64_t done = 0; done < count; done += kBlock) {
    const int64_t n = min(kBlock, count - done);
    fill_words<1>(seed, first + done, n, words);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[done + i] = to_uniform(block[i]);
  }
}

}  // namespace fastvae::FASTVAE_ISA
