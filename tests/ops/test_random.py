"""The random stream against Philox in plain Python integers, the published vectors, and statistics."""

import math
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from fastvae.functional import gaussian_sample_kl
from fastvae.ops import random

WORD = 0xFFFFFFFF
SEEDS = [0, 1, 123456789012345, 2**63 - 1, -1, -(2**63), -6_000_000_000]
OFFSETS = [0, 1, 2, 3, 4, 5, 1023, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**34 - 1, 2**34 + 2, 2**40, 2**62]
CSRC = Path(__file__).parents[2] / "csrc"


def philox4x32(counter, key):
    """Philox4x32-10 as Salmon et al. 2011 define it, over Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & WORD, (a >> 32) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def words_of(seed, counter):
    seed %= 2**64
    return philox4x32((counter & WORD, counter >> 32, 0, 0), (seed & WORD, seed >> 32))


def uniform_of(word):
    signed = word - 2**32 if word >= 2**31 else word
    return (signed if signed >= 0 else -signed - 1) * 4.6566127342e-10


def normal_of(seed, element):
    words = words_of(seed, element // 4)
    first, second = words[2:] if element % 4 >= 2 else words[:2]
    radius = math.sqrt(-2 * math.log(max(uniform_of(first), 1e-7)))
    return radius * (math.sin if element % 2 else math.cos)(2 * math.pi * uniform_of(second))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_plain_philox_gives_the_published_vectors(counter, key, expected):
    assert list(philox4x32(counter, key)) == expected


def test_reference_gives_the_published_vector():
    words = random.philox(torch.tensor([0]), torch.tensor([0]))
    assert [w.item() for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", SEEDS)
def test_reference_words_are_philox(seed):
    ours = torch.stack(random.philox(torch.tensor([seed]), torch.tensor(OFFSETS)), -1)
    assert ours.tolist() == [list(words_of(seed, offset)) for offset in OFFSETS]


@pytest.mark.parametrize("seed", SEEDS)
def test_reference_uniforms_and_normals(seed):
    seed_tensor, offsets = torch.tensor([seed]), torch.tensor([*OFFSETS, *range(100, 140)])
    uniforms = [uniform_of(words_of(seed, offset)[0]) for offset in offsets.tolist()]
    normals = [normal_of(seed, offset) for offset in offsets.tolist()]
    as_tensor = {"dtype": torch.float64}
    torch.testing.assert_close(
        random.uniform(seed_tensor, offsets).double(), torch.tensor(uniforms, **as_tensor), rtol=1e-6, atol=1e-9
    )
    torch.testing.assert_close(
        random.normal(seed_tensor, offsets).double(), torch.tensor(normals, **as_tensor), rtol=0, atol=2e-6
    )


def test_shape_and_type():
    offsets = torch.arange(12).reshape(3, 1, 4)
    for draw in (random.uniform, random.normal):
        numbers = draw(torch.tensor([1]), offsets)
        assert numbers.shape == offsets.shape
        assert numbers.dtype == torch.float32


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("latent", [1, 3, 33, 257, 1030])
def test_core_noise_is_the_references(latent, seed):
    """Pieces of every alignment: rows start anywhere within a group of four numbers."""
    zeros, seed_tensor = torch.zeros(7, latent), torch.tensor([seed])
    noise = gaussian_sample_kl(zeros, zeros, seed=seed_tensor)[0]
    expected = random.normal(seed_tensor, torch.arange(zeros.numel()).reshape(zeros.shape))
    torch.testing.assert_close(noise, expected, rtol=0, atol=1e-6)


DRIVER = """
#include <cstdio>
#include "philox.h"
using namespace fastvae::FASTVAE_ISA;
int main(int, char **arguments) {
  const uint64_t seed = strtoull(arguments[1], nullptr, 10), first = strtoull(arguments[2], nullptr, 10);
  const int64_t count = 1024;
  static float buffer[kNoiseBlock + 8], uniforms[1024 + 64];
  const float *normals = normal_block(seed, first, count, buffer);
  fill_uniform(seed, first, count, uniforms);
  for (int64_t i = 0; i < count; ++i) printf("%.9g %.9g\\n", uniforms[i], normals[i]);
}
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_core_counters_go_on_past_32_bits(isa, tmp_path):
    """No tensor of a test is that large: the header's functions are called directly."""
    core = pytest.importorskip("fastvae._C")
    compiler = shutil.which((sysconfig.get_config_var("CXX") or "c++").split()[0]) or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    if isa not in core.isas():
        pytest.skip(f"this machine does not run {isa}")
    (tmp_path / "driver.cpp").write_text("#include <cstdlib>\n" + DRIVER)
    flags = {"baseline": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]}[isa]
    subprocess.run(
        [compiler, "-std=c++17", "-O1", *flags, f"-DFASTVAE_ISA={isa}", f"-I{CSRC}", "driver.cpp", "-o", "driver"],
        cwd=tmp_path,
        check=True,
    )
    for seed, first in [(3, 0), (2**63 + 11, 2**32 - 37), (5, 2**34 - 401), (2**64 - 1, 2**40 + 3)]:
        printed = subprocess.run(
            [tmp_path / "driver", str(seed), str(first)], check=True, capture_output=True, text=True
        ).stdout
        ours = torch.tensor([[float(x) for x in line.split()] for line in printed.splitlines()]).T
        key, offsets = torch.tensor([seed - 2**64 if seed >= 2**63 else seed]), torch.arange(first, first + 1024)
        assert torch.equal(ours[0], random.uniform(key, offsets))
        torch.testing.assert_close(ours[1], random.normal(key, offsets), rtol=0, atol=1e-6)


def kolmogorov_smirnov(numbers, cumulative):
    """sqrt(n) times the largest distance between the empirical distribution and `cumulative`."""
    ordered = numbers.double().flatten().sort().values
    count = ordered.numel()
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    expected = cumulative(ordered)
    return math.sqrt(count) * max((steps[1:] - expected).max().item(), (expected - steps[:-1]).max().item())


def normal_cdf(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("seed", [0, 42, -5])
def test_normals_are_normal(seed):
    zeros = torch.zeros(100, 1000)
    noise = gaussian_sample_kl(zeros, zeros, seed=torch.tensor([seed]))[0].double()
    count = noise.numel()
    assert abs(noise.mean()) < 4 / math.sqrt(count)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((noise**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96 / count)
    assert kolmogorov_smirnov(noise, normal_cdf) < 1.95  # exceeded once in a thousand seeds
    # The four numbers of a counter come from two radii and two angles: uncorrelated, and so are their squares.
    for numbers in (noise.reshape(-1, 4), noise.reshape(-1, 4).square()):
        correlations = torch.corrcoef(numbers.T) - torch.eye(4)
        assert correlations.abs().max() < 4.5 / math.sqrt(count / 4)


@pytest.mark.parametrize("seed", [0, 42, -5])
def test_uniforms_are_uniform(seed):
    numbers = random.uniform(torch.tensor([seed]), torch.arange(100_000))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert kolmogorov_smirnov(numbers, lambda x: x) < 1.95
    neighbours = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
    assert abs(neighbours) < 4 / math.sqrt(numbers.numel())


@pytest.mark.parametrize("other", [1, 2**32, -1])
def test_different_seeds_are_independent(other):
    """Seeds that differ in one bit of either word, or in all."""
    offsets = torch.arange(100_000)
    pair = torch.stack([random.normal(torch.tensor([seed]), offsets) for seed in (0, other)])
    assert abs(torch.corrcoef(pair)[0, 1]) < 4 / math.sqrt(offsets.numel())
    assert abs(torch.corrcoef(pair.square())[0, 1]) < 4 / math.sqrt(offsets.numel())


def test_drawn_seeds():
    cpu = torch.device("cpu")
    torch.manual_seed(3)
    first = [random.draw_seed(cpu) for _ in range(3)]
    torch.manual_seed(3)
    assert [random.draw_seed(cpu).item() for _ in range(3)] == [seed.item() for seed in first]
    assert len({seed.item() for seed in first}) == 3
    assert all(seed.shape == (1,) and seed.dtype == torch.int64 and seed >= 0 for seed in first)
    before = torch.get_rng_state()
    from_generator = [random.draw_seed(cpu, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert torch.equal(*from_generator)
    assert from_generator[0] == first[0]


def test_generator_of_another_device_is_refused():
    with pytest.raises(ValueError, match="generator: expected a generator on meta, got one on cpu"):
        random.draw_seed(torch.device("meta"), torch.Generator())
