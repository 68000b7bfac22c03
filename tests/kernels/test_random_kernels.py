"""The random stream against an independent Philox on Python integers, and against Triton's own functions."""

import math

import pytest
import torch
import triton
import triton.language as tl

from fastvae.kernels.random import (
    normal,
    normals_of_counters,
    packed_uniform,
    packed_uniforms_of_counters,
    to_gumbel,
    uniform,
)

SEEDS = [0, 5, 2**31 + 7, 123456789012345, 2**63 - 1]


@triton.jit
def _streams_kernel(seed_ptr, first, u_ptr, rand_ptr, n_ptr, counters_ptr, randn4x_ptr, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    seed = tl.load(seed_ptr)
    element = first + index.to(tl.int64)
    tl.store(u_ptr + index, uniform(seed, element))
    tl.store(rand_ptr + index, tl.rand(seed, element.to(tl.uint32)))
    tl.store(n_ptr + index, normal(seed, element))
    counter = (first // 4 + tl.arange(0, COUNT // 4).to(tl.int64))[None, :]
    tl.store(counters_ptr + index[None, :], normals_of_counters(seed, counter))
    n0, n1, n2, n3 = tl.randn4x(seed, counter.to(tl.uint32))
    column = 4 * tl.arange(0, COUNT // 4)[None, :]
    tl.store(randn4x_ptr + column, n0)
    tl.store(randn4x_ptr + column + 1, n1)
    tl.store(randn4x_ptr + column + 2, n2)
    tl.store(randn4x_ptr + column + 3, n3)


@triton.jit
def _packed_kernel(seed_ptr, first, packed_ptr, counters_ptr, gumbel_ptr, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    seed = tl.load(seed_ptr)
    packed = packed_uniform(seed, first + index.to(tl.int64))
    tl.store(packed_ptr + index, packed)
    tl.store(gumbel_ptr + index, to_gumbel(packed))
    counter = (first // 4 + tl.arange(0, COUNT // 4).to(tl.int64))[None, :]
    tl.store(counters_ptr + index[None, :], packed_uniforms_of_counters(seed, counter))


def _philox(seed: int, counter: int) -> list[int]:
    """Philox4x32-10 as published: Salmon et al. 2011, section 3.3."""
    mask = 0xFFFFFFFF
    key, state = [seed & mask, seed >> 32], [counter & mask, counter >> 32, 0, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * state[0], 0xCD9E8D57 * state[2]
        state = [(b >> 32) ^ state[1] ^ key[0], b & mask, (a >> 32) ^ state[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return state


def _uniform(word: int) -> float:
    folded = ~word & 0xFFFFFFFF if word >> 31 else word
    return torch.tensor(folded).float().mul(4.6566127342e-10).item()


def _normal(seed: int, element: int) -> float:
    words = _philox(seed, element // 4)[element % 4 // 2 * 2 :][:2]
    radius = math.sqrt(-2 * math.log(max(_uniform(words[0]), 1e-7)))
    return radius * (math.cos, math.sin)[element % 2](2 * math.pi * _uniform(words[1]))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first", [0, 2**31 - 8, 2**32 - 4, 2**40 + 4])
def test_streams(seed: int, first: int, device: str) -> None:
    count = 16
    outputs = [torch.full((count,), float("nan"), device=device) for _ in range(5)]
    _streams_kernel[(1,)](torch.tensor([seed], device=device), first, *outputs, COUNT=count)
    u, rand, n, counters, randn4x = (x.cpu() for x in outputs)

    assert u.tolist() == [_uniform(_philox(seed, first + i)[0]) for i in range(count)]
    expected = torch.tensor([_normal(seed, first + i) for i in range(count)])
    torch.testing.assert_close(n, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(counters, n, rtol=0, atol=0)
    inside = first + count <= 2**32  # where Triton's 32-bit offsets reach
    if inside:
        torch.testing.assert_close(u, rand, rtol=0, atol=0)
    if (first + count) // 4 <= 2**32:
        torch.testing.assert_close(n, randn4x, rtol=0, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first", [0, 2**31 - 8, 2**34 - 8, 2**40 + 4])
def test_packed_uniforms(seed: int, first: int, device: str) -> None:
    count = 16
    outputs = [torch.full((count,), float("nan"), device=device) for _ in range(3)]
    _packed_kernel[(1,)](torch.tensor([seed], device=device), first, *outputs, COUNT=count)
    packed, counters, gumbel = (x.cpu() for x in outputs)
    expected = [_uniform(_philox(seed, (first + i) // 4)[i % 4]) for i in range(count)]
    assert packed.tolist() == counters.tolist() == expected
    numbers = [-math.log(-math.log(u)) for u in expected]
    torch.testing.assert_close(gumbel, torch.tensor(numbers), rtol=0, atol=2e-6)


def test_gumbel_numbers_at_the_ends_are_finite(device: str) -> None:
    """The uniform numbers of these elements are 0, and the largest there is, 1 - 2**-24."""
    for seed, element, expected in ((1343428, 3, -math.log(32 * math.log(2))), (482, 4083, 24 * math.log(2))):
        outputs = [torch.full((4,), float("nan"), device=device) for _ in range(3)]
        _packed_kernel[(1,)](torch.tensor([seed], device=device), element // 4 * 4, *outputs, COUNT=4)
        assert outputs[2][element % 4].item() == pytest.approx(expected, abs=4e-6)
