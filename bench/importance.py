"""Importance-weighted bound: samples, log-weights and their logsumexp under a linear log-likelihood of z."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.distributions import Normal

from bench.interleave import OURS, Case, WrongResultError, assert_close
from fastvae.functional import gaussian_sample_log_ratio, importance_weighted_bound

SAMPLES = 50
SIZES = [(128, 20), (128, 50), (1024, 50)]

# log p(x|z) = z @ direction: what comes before and after the bound should cost little.
Function = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def ours(mean: Tensor, log_var: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z, log_ratio = gaussian_sample_log_ratio(mean, log_var, SAMPLES)
    return z, log_ratio, importance_weighted_bound(z @ direction, log_ratio)


def eager(mean: Tensor, log_var: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    posterior = Normal(mean, torch.exp(0.5 * log_var))
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    z = posterior.rsample((SAMPLES,))
    log_ratio = prior.log_prob(z).sum(-1) - posterior.log_prob(z).sum(-1)
    log_samples = torch.log(torch.tensor(float(SAMPLES)))
    return z, log_ratio, torch.logsumexp(z @ direction + log_ratio, 0) - log_samples


def cases() -> Iterator[Case]:
    functions: dict[str, Function] = {
        OURS: ours,
        "eager": eager,
        "torch.compile": torch.compile(eager, fullgraph=True, dynamic=False),
    }
    for rows, latent in SIZES:
        yield _case(functions, rows, latent)


def _case(functions: dict[str, Function], rows: int, latent: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    mean, log_var = (torch.randn(rows, latent, generator=generator).requires_grad_() for _ in range(2))
    direction, grad = torch.randn(latent, generator=generator), torch.randn(rows, generator=generator)

    def both(function: Function, whole: bool = False) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            outputs = function(mean, log_var, direction) if whole else function(mean, log_var, direction)[2:]
            return *outputs, *torch.autograd.grad(outputs[-1], [mean, log_var], grad)

        return call

    contenders = {name: both(f) for name, f in functions.items()}

    def check(name: str) -> None:
        operands = (t.detach().double() for t in (mean, log_var, direction, grad))
        _check(name, both(functions[name], whole=True)(), *operands)

    elements = SAMPLES * rows * latent
    return Case(
        "importance",
        f"{SAMPLES} samples of ({rows}, {latent})",
        "forward+backward",
        contenders,
        check,
        # z and its gradient are written and read once each; 2 FLOPs an element for z and 3 for the gradients.
        flops=5.0 * elements,
        bytes=4.0 * 4 * elements,
    )


def _check(
    name: str, results: tuple[Tensor, ...], mean: Tensor, log_var: Tensor, direction: Tensor, grad: Tensor
) -> None:
    # Each contender draws noise of its own: take it out of z, see that it is normal, and go on with it.
    z, log_ratio, bound, *grads = (t.detach().double() for t in results)
    noise = (z - mean) / torch.exp(0.5 * log_var)
    six_sigma = 6 / noise.numel() ** 0.5
    if not (noise.mean().abs() <= six_sigma and (noise.square().mean() - 1).abs() <= six_sigma * 2**0.5):
        raise WrongResultError(f"{name}: the noise of z is not standard normal")
    leaves = [mean.requires_grad_(), log_var.requires_grad_()]
    std = torch.exp(0.5 * log_var)
    again = mean + std * noise
    exact_ratio = (Normal(0.0, 1.0).log_prob(again) - Normal(mean, std).log_prob(again)).sum(-1)
    exact = torch.logsumexp(again @ direction + exact_ratio, 0) - torch.log(torch.tensor(float(SAMPLES)).double())
    assert_close(name, "log_ratio", log_ratio, exact_ratio.detach())
    assert_close(name, "bound", bound, exact.detach())
    for what, mine, truth in zip(("mean", "log_var"), grads, torch.autograd.grad(exact, leaves, grad), strict=True):
        assert_close(name, f"grad_{what}", mine, truth)
