"""Full-covariance sampling + KL kernels against float64 PyTorch with noise from the reference stream."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvae.kernels import full_gaussian, gaussian
from fastvae.ops import random

SEED = 123456789012345
# Above 64 dimensions the factor comes in several tiles.
SHAPES = [(1, 1), (2, 33), (17, 7), (37, 4), (2, 64), (1, 67), (1, 132)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [(shape, dtype) for shape in SHAPES for dtype in DTYPES if dtype == torch.float32 or shape[1] < 64]


def _eager(mean: Tensor, log_diagonal: Tensor, lower: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    rows, latent = mean.shape
    log_diagonal = log_diagonal.clamp(-20, 20)
    i, j = torch.tril_indices(latent, latent, -1)
    below = lower.new_zeros(rows, latent, latent)
    below[:, i, j] = lower
    tril = below + torch.diag_embed(log_diagonal.exp())
    element = torch.arange(num_samples * rows * latent).reshape(num_samples, rows, latent)
    noise = random.normal(torch.tensor([SEED]), element).to(mean)
    z = mean + (tril @ noise[..., None])[..., 0]
    return z, 0.5 * (mean.square().sum(-1) + tril.square().sum((1, 2)) - latent) - log_diagonal.sum(-1)


def _operands(rows: int, latent: int, dtype: torch.dtype, num_samples: int) -> list[Tensor]:
    torch.manual_seed(0)
    mean, log_diagonal = torch.randn(2, rows, latent).to(dtype)
    lower = (torch.randn(rows, latent * (latent - 1) // 2) / latent**0.5).to(dtype)
    return [mean, log_diagonal, lower, torch.randn(num_samples, rows, latent).to(dtype), torch.randn(rows)]


def _kernels(operands: list[Tensor], device: str) -> list[Tensor]:
    mean, log_diagonal, lower, grad_z, grad_kl = (x.to(device) for x in operands)
    seed = torch.tensor([SEED], device=device)
    outputs = full_gaussian.sample_kl_forward(mean, log_diagonal, lower, seed, grad_z.shape[0])
    grads = full_gaussian.sample_kl_backward(grad_z, grad_kl, mean, log_diagonal, lower, seed)
    return [x.cpu() for x in (*outputs, *grads)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_matches_float64(
    shape: tuple[int, int], dtype: torch.dtype, device: str, assert_within_budget: Callable
) -> None:
    operands = _operands(*shape, dtype, 2 if shape[0] % 2 else 1)
    ours = _kernels(operands, device)

    def eager(compute: torch.dtype) -> list[Tensor]:
        leaves = [x.to(compute).requires_grad_() for x in operands[:3]]
        grads = [x.to(compute) for x in operands[3:]]
        outputs = _eager(*leaves, len(grads[0]))
        return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]

    names = ["z", "kl", "grad_mean", "grad_log_diagonal", "grad_lower"]
    for name, mine, truth, peer in zip(names, ours, eager(torch.float64), eager(dtype), strict=True):
        assert mine.dtype == (torch.float32 if name == "kl" else dtype), name
        # The interpreter cuts float32 to bfloat16 where a GPU rounds: one unit, not half of one.
        assert_within_budget(name, mine, truth, peer.to(mine.dtype), rounding=8 if mine.dtype.itemsize == 4 else 1)


@pytest.mark.usefixtures("poison")
def test_without_correlation_it_is_the_diagonal_family(device: str) -> None:
    mean, log_diagonal, lower, _, _ = (x.to(device) for x in _operands(5, 33, torch.float32, 2))
    log_diagonal *= 1e-3  # a small divergence keeps its digits
    seed = torch.tensor([SEED], device=device)
    ours = full_gaussian.sample_kl_forward(1e-3 * mean, log_diagonal, 0 * lower, seed, 2)
    theirs = gaussian.sample_kl_forward(1e-3 * mean, 2 * log_diagonal, None, None, seed, 2, True)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("poison")
def test_extreme_diagonals_are_finite_and_gradients_stop(device: str) -> None:
    extremes = [-3e38, -1e4, -21.0, -20.0, 0.0, 20.0, 21.0, 1e4, 3e38, float("inf")]
    log_diagonal = torch.tensor(extremes).repeat(3, 1)
    operands = [torch.ones(3, 10), log_diagonal, torch.ones(3, 45), torch.ones(1, 3, 10), torch.ones(3)]
    results = _kernels(operands, device)
    assert all(torch.isfinite(x).all() for x in results)
    outside = log_diagonal.abs() > 20
    assert (results[3][outside] == 0).all()
    assert (results[3][~outside] != 0).any()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("operand", "latent"), [(0, 7), (1, 7), (2, 7), (2, 67)])
def test_nan_in_gives_nan_out(operand: int, latent: int, device: str) -> None:
    operands = _operands(3, latent, torch.float32, 1)
    operands[operand][1, 5] = float("nan")
    z, kl, *grads = _kernels(operands, device)
    assert kl.isnan().tolist() == [False, True, False]
    assert z[0].isnan().nonzero().tolist() == [[1, 3 if operand == 2 else 5]]  # (3, 2) is number 5
    assert grads[operand].isnan().nonzero().tolist() == [[1, 5]]
    assert sum(int(g.isnan().sum()) for g in grads) == 1


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_no_elements(shape: tuple[int, int], device: str) -> None:
    below = shape[1] * (shape[1] - 1) // 2
    operands = [torch.zeros(shape), torch.zeros(shape), torch.zeros(shape[0], below)]
    operands += [torch.zeros(2, *shape), torch.ones(shape[0])]
    z, kl, *grads = _kernels(operands, device)
    assert z.shape == (2, *shape)
    assert kl.tolist() == [0.0] * shape[0]
    assert [g.shape for g in grads] == [x.shape for x in operands[:3]]


def test_extreme_means_and_factors_have_a_finite_divergence(device: str) -> None:
    operands = [[1e4, -1e19, 1e20, 3e38], [-1e4, 1e4, 0.0, 1.0], [1.0, -1e20, 1e14, 3e38, 0.5, -2.0]]
    mean, log_diagonal, lower = (torch.tensor([numbers], device=device) for numbers in operands)
    seed, grad_z = torch.tensor([1], device=device), torch.zeros(1, 1, 4, device=device)
    _, kl = full_gaussian.sample_kl_forward(mean, log_diagonal, lower, seed, 1)
    grads = full_gaussian.sample_kl_backward(grad_z, torch.ones_like(kl), mean, log_diagonal, lower, seed)
    squares = sum(t.double().clamp(-1e15, 1e15).square().sum() for t in (mean, lower))
    torch.testing.assert_close(kl[0].double(), squares / 2, rtol=1e-5, atol=0)
    for grad, operand in zip(grads, (mean, None, lower), strict=True):
        assert torch.isfinite(grad).all()
        assert operand is None or torch.equal(grad, operand.masked_fill(operand.abs() > 1e15, 0))


def test_float64_is_refused(device: str) -> None:
    mean = torch.zeros(2, 3, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match=r"^mean: expected float32, bfloat16 or float16, got torch\.float64$"):
        full_gaussian.sample_kl_forward(mean, mean, mean, torch.tensor([1], device=device), 1)
