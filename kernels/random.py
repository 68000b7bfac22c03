"""The random stream of every fastvae kernel: Philox4x32-10, keyed by a seed, indexed by element.

What: ``uniform`` of element e equals ``tl.rand(seed, e)``, ``normal`` equals ``tl.randn4x(seed, e // 4)[e % 4]``
and ``packed_uniform`` equals ``tl.rand4x(seed, e // 4)[e % 4]``. The definition is the reference in
``fastvae/ops/random.py``. The counter's words are given explicitly as 32-bit numbers: past 2**32 the second
one counts on, and the stream does not depend on how a version of Triton splits a 64-bit offset.

Cost: about 90 integer instructions for a counter and no memory, against 8 bytes an element to store noise and
read it back. ``normals_of_counters`` and ``packed_uniforms_of_counters`` use all four words of a counter, a
quarter of the rounds of ``normal`` and ``packed_uniform``.

Limits: elements are non-negative int64. The sine, cosine and logarithm are the device's own, so that normals
agree between backends to the last bits, not bit for bit; uniform numbers agree exactly.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box & Muller 1958.
"""

import triton
import triton.language as tl


@triton.jit
def uniform(seed, element):
    """Return float32 numbers in [0, 1) for int64 `element`s; `seed` is an int64 scalar."""
    word, _, _, _ = _words(seed, element)
    return _to_uniform(word)


@triton.jit
def normal(seed, element):
    """Return float32 standard normal numbers for int64 `element`s; `seed` is an int64 scalar."""
    w0, w1, w2, w3 = _words(seed, element >> 2)
    upper = (element & 2) != 0
    cosine, sine = _normal_pair(tl.where(upper, w2, w0), tl.where(upper, w3, w1))
    return tl.where((element & 1) != 0, sine, cosine)


@triton.jit
def normals_of_counters(seed, counter):
    """Return the normal numbers of elements 4 * counter .. 4 * counter + 3, (M, K) counters to (M, 4 * K)."""
    w0, w1, w2, w3 = _words(seed, counter)
    n0, n1 = _normal_pair(w0, w1)
    n2, n3 = _normal_pair(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def packed_uniform(seed, element):
    """Return float32 numbers in [0, 1), four of a counter, for int64 `element`s."""
    w0, w1, w2, w3 = _words(seed, element >> 2)
    even, odd = tl.where((element & 2) != 0, w2, w0), tl.where((element & 2) != 0, w3, w1)
    return _to_uniform(tl.where((element & 1) != 0, odd, even))


@triton.jit
def packed_uniforms_of_counters(seed, counter):
    """Return the packed uniform numbers of elements 4 * counter .. 4 * counter + 3, (M, K) counters to (M, 4 * K)."""
    w0, w1, w2, w3 = _words(seed, counter)
    return _to_uniform(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))


@triton.jit
def to_gumbel(u):
    """Return the standard Gumbel numbers -log(-log u) of packed uniform ones; 0 counts as 2**-32."""
    return -tl.log(-tl.log(tl.maximum(u, 2.3283064365386963e-10)))


@triton.jit
def _words(seed, counter):
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def _to_uniform(word):
    signed = word.to(tl.int32, bitcast=True)
    # The largest float32 scale with (2**31 - 1) * scale < 1: the result never rounds up to 1.
    return tl.where(signed < 0, ~signed, signed).to(tl.float32) * 4.6566127342e-10


@triton.jit
def _normal_pair(first, second):
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(_to_uniform(first), 1.0e-7)))
    angle = 6.283185307179586 * _to_uniform(second)
    return radius * tl.cos(angle), radius * tl.sin(angle)
