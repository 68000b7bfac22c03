"""The random stream every backend shares: Philox4x32-10 keyed by a seed tensor, indexed by element.

The number of an element depends on the seed and on the element's flat index alone, so a backward pass makes the
noise again instead of storing it, and CPU, GPU and this reference agree. In Triton's terms:

    uniform of element e = tl.rand(seed, e)
    normal of element e  = tl.randn4x(seed, e // 4)[e % 4]
    packed uniform of element e = tl.rand4x(seed, e // 4)[e % 4], of which Gumbel numbers are made

with 32-bit counter words; past 2**32 the second word counts on. All four output words of a counter make a number
each, except of `uniform`, so that a vector of normals costs a quarter of the rounds that ``tl.randn`` would.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box & Muller 1958.
"""

import math

import torch
from torch import Tensor

from fastvae.ops.checks import check_seed

_MASK = 0xFFFFFFFF
_UNIFORM_SCALE = 4.6566127342e-10  # largest float32 with (2**31 - 1) * scale < 1


def draw_seed(device: torch.device, generator: torch.Generator | None = None, count: int = 1) -> Tensor:
    """Draw seeds from `generator` (the device's default one if None) without leaving the device.

    Args:
        device: where the seed is needed.
        generator: a generator of that device.
        count: number of seeds.

    Returns:
        int64 tensor of shape (count,), uniform over the non-negative int64 numbers.

    Raises:
        ValueError: if `generator` belongs to another device type.
    """
    if generator is None:
        return torch.randint(0, 2**63 - 1, (count,), dtype=torch.int64, device=device)
    if generator.device.type != device.type:
        raise ValueError(f"generator: expected a generator on {device}, got one on {generator.device}")
    return torch.randint(0, 2**63 - 1, (count,), dtype=torch.int64, device=device, generator=generator)


def seed_of(seed: Tensor | None, generator: torch.Generator | None, name: str, tensor: Tensor) -> Tensor:
    """Return `seed`, checked against the argument `name`, or draw one on the device of that `tensor`.

    Raises:
        TypeError, ValueError: if `seed` is not an int64 tensor (1,) of that device, or comes beside a generator.
    """
    if seed is None:
        return draw_seed(tensor.device, generator)
    if generator is not None:
        raise ValueError("seed: expected None when a generator is given, got both")
    check_seed(seed, name, tensor)
    return seed


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    # Two's complement keeps all 64 bits of the product; the masks undo the arithmetic shift's sign.
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def philox(seed: Tensor, counters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit output words of Philox4x32-10, as int64, for each int64 counter."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = counters & _MASK, (counters >> 32) & _MASK
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        high_a, low_a = _multiply(c0, 0xD2511F53)
        high_b, low_b = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _to_uniform(word: Tensor) -> Tensor:
    folded = torch.where(word >= 2**31, _MASK - word, word)
    return folded.float() * _UNIFORM_SCALE


def uniform(seed: Tensor, offsets: Tensor) -> Tensor:
    """Return float32 numbers in [0, 1), one for each element index in the int64 `offsets`."""
    return _to_uniform(philox(seed, offsets)[0])


def normal(seed: Tensor, offsets: Tensor) -> Tensor:
    """Return float32 standard normal numbers, one for each element index in the int64 `offsets`."""
    words = philox(seed, offsets // 4)
    upper = offsets % 4 >= 2
    # In float64 from here on: the exact number, which kernels meet to 1e-6 (C++) and 2e-6 (Triton).
    u1, u2 = (_to_uniform(torch.where(upper, words[i + 2], words[i])).double() for i in (0, 1))
    radius, angle = torch.sqrt(-2.0 * torch.log(u1.clamp_min(1e-7))), 2.0 * math.pi * u2
    return (radius * torch.where(offsets % 2 == 0, torch.cos(angle), torch.sin(angle))).float()


def packed_uniform(seed: Tensor, offsets: Tensor) -> Tensor:
    """Return float32 numbers in [0, 1), one for each element index, four of a counter: not those of `uniform`."""
    words, odd = philox(seed, offsets // 4), offsets % 2 == 1
    low, high = (torch.where(odd, words[i + 1], words[i]) for i in (0, 2))
    return _to_uniform(torch.where(offsets % 4 >= 2, high, low))


def gumbel(seed: Tensor, offsets: Tensor) -> Tensor:
    """Return float32 standard Gumbel numbers -log(-log u), u the packed uniform number, for each element index.

    u has 31 bits and may be 0: it counts as 2**-32, half of the next one. The largest is 1 - 2**-24, so that all
    numbers are finite, within [-3.1, 16.7].
    """
    u = packed_uniform(seed, offsets).clamp_min(2.0**-32).double()  # exact, as in `normal`
    return -torch.log(-torch.log(u)).float()
