"""Importance-weighted sampling and bound kernels against float64 PyTorch with noise from the reference stream."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvae.kernels import importance
from fastvae.ops import random

SEED = 123456789012345
SHAPES = [(1, 1), (7, 33), (33, 7), (65, 4), (3, 257), (1, 1028), (2, 513)]
CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [(shape, half) for shape in [(7, 33), (2, 513)] for half in (torch.bfloat16, torch.float16)]
INF, NAN = math.inf, math.nan


def _eager(mean: Tensor, log_var: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    element = torch.arange(num_samples * mean.numel()).reshape(num_samples, *mean.shape)
    noise = random.normal(torch.tensor([SEED]), element).to(mean)
    log_var = log_var.clamp(-40, 40)
    z = mean + torch.exp(log_var / 2) * noise
    return z, 0.5 * (log_var + noise.square() - z.square()).sum(-1)


def _sample(mean: Tensor, log_var: Tensor, grad_z: Tensor, grad_log_ratio: Tensor, device: str) -> list[Tensor]:
    mean, log_var, grad_z, grad_log_ratio = (x.to(device) for x in (mean, log_var, grad_z, grad_log_ratio))
    seed = torch.tensor([SEED], device=device)
    outputs = importance.sample_forward(mean, log_var, seed, len(grad_z))
    return [x.cpu() for x in (*outputs, *importance.sample_backward(grad_z, grad_log_ratio, mean, log_var, seed))]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_samples_match_float64(
    shape: tuple[int, int], dtype: torch.dtype, device: str, assert_within_budget: Callable
) -> None:
    torch.manual_seed(0)
    num_samples = 3 if shape[0] % 2 else 1
    mean, log_var = torch.randn(2, *shape).to(dtype)
    grad_z, grad_log_ratio = torch.randn(num_samples, *shape).to(dtype), torch.randn(num_samples, shape[0])
    ours = _sample(mean, log_var, grad_z, grad_log_ratio, device)

    def eager(compute: torch.dtype) -> list[Tensor]:
        leaves = [x.to(compute).requires_grad_() for x in (mean, log_var)]
        outputs = _eager(*leaves, num_samples)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [grad_z.to(compute), grad_log_ratio.to(compute)])]

    names = ["z", "log_ratio", "grad_mean", "grad_log_var"]
    for name, mine, truth, peer in zip(names, ours, eager(torch.float64), eager(dtype), strict=True):
        assert mine.dtype == (torch.float32 if name == "log_ratio" else dtype), name
        # The interpreter cuts float32 to bfloat16 where a GPU rounds: one unit, not half of one.
        assert_within_budget(name, mine, truth, peer.to(mine.dtype), rounding=8 if mine.dtype.itemsize == 4 else 1)


@pytest.mark.usefixtures("poison")
def test_extreme_log_variances_are_finite_and_gradients_stop(device: str) -> None:
    extremes = [-3e38, -1e4, -41.0, -40.0, 0.0, 40.0, 41.0, 1e4, 3e38, INF]
    log_var = torch.tensor(extremes).repeat(3, 1)
    results = _sample(torch.ones(3, 10), log_var, torch.ones(2, 3, 10), torch.ones(2, 3), device)
    assert all(torch.isfinite(x).all() for x in results)
    outside = log_var.abs() > 40
    assert (results[3][outside] == 0).all()
    assert (results[3][~outside] != 0).all(), "the gradient passes at the bounds, as torch.clamp's does"


@pytest.mark.usefixtures("poison")
def test_extreme_means_have_finite_ratios(device: str) -> None:
    mean = torch.tensor([1e4, -1e19, 1e20, 3e38]).repeat(3, 1)
    log_var = torch.tensor([-1e4, 0.0, 1e4])[:, None].expand(3, 4).contiguous()
    results = _sample(mean, log_var, torch.zeros(2, 3, 4), torch.ones(2, 3), device)
    assert all(torch.isfinite(x).all() for x in results)
    assert (results[1] <= -1e30).all()
    assert (results[2][:, 1:] == 0).all()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("operand", [0, 1])
def test_nan_in_gives_nan_out(operand: int, device: str) -> None:
    torch.manual_seed(0)
    operands = list(torch.randn(2, 4, 33))
    operands[operand][2, 5] = NAN
    z, log_ratio, *grads = _sample(*operands, torch.ones(2, 4, 33), torch.ones(2, 4), device)
    assert z.isnan().nonzero().tolist() == [[0, 2, 5], [1, 2, 5]]
    assert log_ratio.isnan().nonzero().tolist() == [[0, 2], [1, 2]]
    assert all(g.isnan().nonzero().tolist() == [[2, 5]] for g in grads)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_no_elements(shape: tuple[int, int], device: str) -> None:
    z, log_ratio, *grads = _sample(
        torch.ones(shape), torch.ones(shape), torch.ones(2, *shape), torch.ones(2, shape[0]), device
    )
    assert z.shape == (2, *shape)
    assert torch.equal(log_ratio, torch.zeros(2, shape[0]))
    assert all(g.shape == shape for g in grads)
    nothing = torch.zeros(3, 0, device=device)
    assert importance.bound_forward(nothing, nothing).shape == (0,)
    assert importance.bound_backward(nothing[0], nothing, nothing).shape == (3, 0)


def _bound(log_likelihood: Tensor, log_ratio: Tensor, grad_bound: Tensor, device: str) -> list[Tensor]:
    log_weights = log_likelihood.to(device), log_ratio.to(device)
    results = importance.bound_forward(*log_weights), importance.bound_backward(grad_bound.to(device), *log_weights)
    return [x.cpu() for x in results]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 33), (100, 3), (2, 257)], ids=str)
def test_bound_matches_float64(
    shape: tuple[int, int], dtype: torch.dtype, device: str, assert_within_budget: Callable
) -> None:
    torch.manual_seed(0)
    operands, grad_bound = (20 * torch.randn(2, *shape)).to(dtype), torch.randn(shape[1])
    ours = _bound(*operands, grad_bound, device)

    def eager(compute: torch.dtype) -> list[Tensor]:
        leaf, other = (x.to(compute).requires_grad_() for x in operands)
        bound = torch.logsumexp(leaf + other, 0) - math.log(shape[0])
        return [bound, torch.autograd.grad(bound, leaf, grad_bound.to(compute))[0]]

    for name, mine, truth, peer in zip(("bound", "grad"), ours, eager(torch.float64), eager(dtype), strict=True):
        assert mine.dtype == (torch.float32 if name == "bound" else dtype), name
        assert_within_budget(name, mine, truth, peer.to(mine.dtype), rounding=8 if mine.dtype.itemsize == 4 else 1)


@pytest.mark.usefixtures("poison")
def test_infinite_and_undefined_weights(device: str) -> None:
    # Columns: one impossible sample, all impossible, one infinitely likely, NaN, NaN with impossible, ordinary.
    values = [[-INF, 1.0, 2.0], [-INF] * 3, [0.0, INF, -INF], [NAN, 1.0, 2.0], [NAN, -INF, -INF], [1.0, 2.0, 3.0]]
    log_likelihood = torch.tensor(values).T.repeat(20, 1).contiguous()  # in two blocks
    bound, grad = _bound(log_likelihood, torch.zeros(60, 6), torch.ones(6), device)
    expected = log_likelihood.double().logsumexp(0) - math.log(60)
    torch.testing.assert_close(bound.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    softmax = log_likelihood.double().softmax(0)
    softmax[:, 1:3] = 0.0
    torch.testing.assert_close(grad.double(), softmax, rtol=1e-6, atol=0, equal_nan=True)


def test_float64_is_refused(device: str) -> None:
    mean = torch.zeros(2, 3, dtype=torch.float64, device=device)
    message = r": expected float32, bfloat16 or float16, got torch\.float64$"
    with pytest.raises(TypeError, match="^mean" + message):
        importance.sample_forward(mean, mean, torch.tensor([1], device=device), 1)
    with pytest.raises(TypeError, match="^log_likelihood" + message):
        importance.bound_forward(mean, mean)
