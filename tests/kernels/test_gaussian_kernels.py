"""Sampling + KL kernels against float64 PyTorch with noise from the reference stream."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fastvae.kernels import gaussian
from fastvae.ops import random

SEED = 123456789012345
SHAPES = [(1, 1), (7, 33), (33, 7), (257, 4), (5, 257), (3, 1028), (2, 513)]
CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [(shape, half) for shape in [(7, 33), (2, 513)] for half in (torch.bfloat16, torch.float16)]


def _noise(num_samples: int, rows: int, latent: int) -> Tensor:
    element = torch.arange(num_samples * rows * latent).reshape(num_samples, rows, latent)
    return random.normal(torch.tensor([SEED]), element)


def _eager(
    mean: Tensor, log_var: Tensor, prior: list[Tensor], num_samples: int, sum_latent: bool
) -> tuple[Tensor, Tensor]:
    log_var, prior = log_var.clamp(-40, 40), [p.to(mean.dtype) for p in prior]
    z = mean + torch.exp(log_var / 2) * _noise(num_samples, *mean.shape).to(mean)
    prior_mean, prior_log_var = prior or (torch.zeros_like(mean), torch.zeros_like(mean))
    posterior = Normal(mean, torch.exp(log_var / 2), validate_args=False)
    kl = kl_divergence(posterior, Normal(prior_mean, torch.exp(prior_log_var.clamp(-40, 40) / 2)))
    return z, kl.sum(-1) if sum_latent else kl


def _operands(
    rows: int, latent: int, dtype: torch.dtype, prior: str, num_samples: int, sum_latent: bool
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    mean, log_var = torch.randn(2, rows, latent).to(dtype)
    prior_rows = {"none": 0, "shared": 1, "full": rows}[prior]
    priors = list(torch.randn(2, prior_rows, latent)) if prior_rows else []
    grad_z = torch.randn(num_samples, rows, latent).to(dtype)
    grad_kl = torch.randn((rows,) if sum_latent else (rows, latent))
    return mean, log_var, priors, grad_z, grad_kl


def _kernels(mean: Tensor, log_var: Tensor, prior: list[Tensor], grad_z: Tensor, grad_kl: Tensor,
             sum_latent: bool, device: str) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    mean, log_var, grad_z, grad_kl = (x.to(device) for x in (mean, log_var, grad_z, grad_kl))
    priors = [p.to(device) for p in prior] or [None, None]
    seed = torch.tensor([SEED], device=device)
    outputs = gaussian.sample_kl_forward(mean, log_var, *priors, seed, grad_z.shape[0], sum_latent)
    grads = gaussian.sample_kl_backward(grad_z, grad_kl, mean, log_var, *priors, seed, sum_latent)
    assert all(g is None for g in grads[2:]) == (not prior)
    return [x.cpu() for x in outputs], [g.cpu() for g in grads if g is not None]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("prior", ["none", "shared", "full"])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_matches_float64(
    shape: tuple[int, int], dtype: torch.dtype, prior: str, device: str, assert_within_budget: Callable
) -> None:
    num_samples, sum_latent = (2, True) if shape[0] % 2 else (1, False)
    mean, log_var, priors, grad_z, grad_kl = _operands(*shape, dtype, prior, num_samples, sum_latent)
    ours = _kernels(mean, log_var, priors, grad_z, grad_kl, sum_latent, device)

    def eager(compute: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [x.to(compute).requires_grad_() for x in (mean, log_var, *priors)]
        outputs = _eager(leaves[0], leaves[1], leaves[2:], num_samples, sum_latent)
        grads = torch.autograd.grad(outputs, leaves, [grad_z.to(compute), grad_kl.to(compute)])
        return list(outputs), list(grads)

    exact, plain = eager(torch.float64), eager(dtype)
    names = ["z", "kl", "grad_mean", "grad_log_var", "grad_prior_mean", "grad_prior_log_var"]
    rows = zip(names, [*ours[0], *ours[1]], [*exact[0], *exact[1]], [*plain[0], *plain[1]], strict=False)
    for name, mine, truth, peer in rows:
        expected = dtype if name in ("z", "grad_mean", "grad_log_var") else torch.float32
        assert mine.dtype == expected, name
        # The interpreter cuts float32 to bfloat16 where a GPU rounds: one unit, not half of one.
        assert_within_budget(name, mine, truth, peer.to(mine.dtype), rounding=8 if mine.dtype.itemsize == 4 else 1)


@pytest.mark.usefixtures("poison")
def test_small_divergences_keep_their_digits(device: str) -> None:
    mean = torch.zeros(4, 8, device=device)
    log_var = torch.logspace(-4, 0, 32, device=device).reshape(4, 8)
    log_var[:, ::2].neg_()
    kl = gaussian.sample_kl_forward(mean, log_var, None, None, torch.tensor([1], device=device), 0, False)[1]
    exact = 0.5 * (torch.expm1(log_var.double()) - log_var.double())
    torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("poison")
def test_divergence_alone(device: str) -> None:
    mean, log_var, _, _, grad_kl = _operands(7, 33, torch.float32, "none", 0, True)
    (z, kl), grads = _kernels(mean, log_var, [], torch.zeros(0, 7, 33), grad_kl, True, device)
    assert z.shape == (0, 7, 33)
    exact = [x.double().requires_grad_() for x in (mean, log_var)]
    truth = _eager(*exact, [], 1, True)[1]
    torch.testing.assert_close(kl.double(), truth.detach(), rtol=1e-5, atol=1e-5)
    for ours, grad in zip(grads, torch.autograd.grad(truth, exact, grad_kl.double()), strict=True):
        torch.testing.assert_close(ours.double(), grad, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("prior", ["none", "shared", "full"])
def test_extreme_log_variances_are_finite_and_gradients_stop(prior: str, device: str) -> None:
    extremes = [-3e38, -1000.0, -41.0, -40.0, -39.0, 0.0, 39.0, 40.0, 41.0, 1000.0, 3e38, float("inf")]
    log_var = torch.tensor(extremes).repeat(12, 1)
    mean = torch.ones_like(log_var)
    priors = {"none": [], "shared": [mean[:1] / 2, log_var[:1]], "full": [mean / 2, log_var.t().contiguous()]}
    grad_kl, grad_z = torch.ones(12), torch.ones(1, 12, 12)
    outputs, grads = _kernels(mean, log_var, priors[prior], grad_z, grad_kl, True, device)
    assert all(torch.isfinite(x).all() for x in [*outputs, *grads])
    outside = log_var.abs() > 40
    assert (grads[1][outside] == 0).all()
    assert (grads[1][~outside] != 0).all(), "the gradient passes at the bounds, as torch.clamp's does"
    if prior == "full":
        outside = log_var.t().abs() > 40
        assert (grads[3][outside] == 0).all()
        assert (grads[3][~outside] != 0).all()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("prior", ["none", "full"])
def test_extreme_means_have_a_finite_divergence(prior: str, device: str) -> None:
    mean = torch.tensor([1e4, -1e14, 1e19, -1e20, 3e38]).repeat(3, 1)
    zeros = torch.zeros_like(mean)
    priors = [] if prior == "none" else [zeros, torch.tensor([-1e4, 0.0, 4.0])[:, None].expand(3, 5).contiguous()]
    (_, kl), grads = _kernels(mean, zeros, priors, torch.zeros(1, 3, 5), torch.ones(3, 5), False, device)
    assert all(torch.isfinite(x).all() for x in (kl, *grads))
    std = torch.exp(priors[1].double().clamp(-40, 40) / 2) if priors else 1.0
    distance = mean.double() / std
    expected = torch.where(distance.abs() > 1e15, 0, distance / std)
    torch.testing.assert_close(grads[0].double(), expected, rtol=1e-5, atol=0)
    exact = kl_divergence(Normal(distance.clamp(-1e15, 1e15), 1 / (std + 0 * distance)), Normal(0.0, 1.0))
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("operand", ["mean", "log_var", "prior_mean", "prior_log_var"])
def test_nan_in_gives_nan_out(operand: str, device: str) -> None:
    mean, log_var, priors, grad_z, grad_kl = _operands(7, 33, torch.float32, "full", 1, True)
    operands = {"mean": mean, "log_var": log_var, "prior_mean": priors[0], "prior_log_var": priors[1]}
    operands[operand][2, 5] = float("nan")
    (z, kl), grads = _kernels(mean, log_var, priors, grad_z, grad_kl, True, device)
    assert kl.isnan().tolist() == [row == 2 for row in range(7)]
    assert z[0, 2, 5].isnan() == (operand in ("mean", "log_var"))
    assert z.isnan().sum() <= 1
    assert any(g[2, 5].isnan() for g in grads)
    assert all(g.isnan().sum() <= 1 for g in grads)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("prior", ["none", "shared"])
def test_no_elements(shape: tuple[int, int], prior: str, device: str) -> None:
    mean, log_var, priors, grad_z, grad_kl = _operands(*shape, torch.float32, prior, 2, True)
    (z, kl), grads = _kernels(mean, log_var, priors, grad_z, grad_kl, True, device)
    assert z.shape == (2, *shape)
    assert kl.tolist() == [0.0] * shape[0]
    assert [g.shape for g in grads] == [shape, shape, *[(1, shape[1])] * len(priors)]
    assert all((g == 0).all() for g in grads)


def test_shared_prior_is_summed_over_many_programs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(gaussian, "_MAX_PARTIAL_SUMS", 3)  # so that each program takes several tiles
    operands = _operands(257, 33, torch.float32, "shared", 1, True)
    mean, log_var, priors, _, grad_kl = operands
    first, second = (_kernels(*operands, True, device)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    leaves = [x.double().requires_grad_() for x in (mean, log_var, *priors)]
    exact = torch.autograd.grad(_eager(*leaves[:2], leaves[2:], 1, True)[1], leaves[2:], grad_kl.double())
    for ours, truth in zip(first[2:], exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-4)


def test_float64_is_refused(device: str) -> None:
    mean = torch.zeros(2, 3, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match=r"^mean: expected float32, bfloat16 or float16, got torch\.float64$"):
        gaussian.sample_kl_forward(mean, mean, None, None, torch.tensor([1], device=device), 1, True)
