"""Reparameterized sampling from a Gaussian of full covariance with its KL against N(0, I)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from bench.interleave import OURS, Case, WrongResultError, assert_close
from fastvae.functional import full_gaussian_sample_kl

SIZES = [(128, 16), (1024, 32), (128, 64), (4096, 64)]

Function = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def factor(log_diagonal: Tensor, lower: Tensor) -> Tensor:
    """The Cholesky factor, (rows, latent, latent)."""
    latent = log_diagonal.shape[-1]
    row, column = torch.tril_indices(latent, latent, -1)
    tril = torch.diag_embed(log_diagonal.exp())
    tril[:, row, column] = lower
    return tril


def products(mean: Tensor, log_diagonal: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """The better eager way: the factor, then products."""
    tril = factor(log_diagonal, lower)
    z = mean + (tril @ torch.randn_like(mean).unsqueeze(-1)).squeeze(-1)
    kl = 0.5 * (mean.square().sum(-1) + tril.square().sum((1, 2)) - mean.shape[-1]) - log_diagonal.sum(-1)
    return z, kl


def distributions(mean: Tensor, log_diagonal: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    posterior = MultivariateNormal(mean, scale_tril=factor(log_diagonal, lower))
    prior = MultivariateNormal(torch.zeros_like(mean), scale_tril=torch.eye(mean.shape[-1]).expand(len(mean), -1, -1))
    return posterior.rsample(), kl_divergence(posterior, prior)


def cases() -> Iterator[Case]:
    functions: dict[str, Function] = {
        OURS: full_gaussian_sample_kl,
        "eager": products,
        "torch.distributions": distributions,
        "torch.compile": torch.compile(products, fullgraph=True, dynamic=False),
    }
    for rows, latent in SIZES:
        for backward in (False, True):
            yield _case(functions, rows, latent, backward)


def _case(functions: dict[str, Function], rows: int, latent: int, backward: bool) -> Case:
    generator = torch.Generator().manual_seed(0)
    numbers = latent * (latent - 1) // 2
    mean, log_diagonal, grad_z = (torch.randn(rows, latent, generator=generator) for _ in range(3))
    lower, grad_kl = torch.randn(rows, numbers, generator=generator), torch.randn(rows, generator=generator)
    leaves = [mean.requires_grad_(), log_diagonal.mul_(0.5).requires_grad_(), lower.mul_(0.3).requires_grad_()]

    def forward(function: Function) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return function(*leaves)

        return call

    def both(function: Function) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            outputs = function(*leaves)
            return *outputs, *torch.autograd.grad(outputs, leaves, (grad_z, grad_kl))

        return call

    contenders = {name: (both if backward else forward)(f) for name, f in functions.items()}

    def check(name: str) -> None:
        operands = (t.detach().double() for t in (*leaves, grad_z, grad_kl))
        _check(name, contenders[name](), *operands)

    return Case(
        "full_gaussian",
        f"({rows}, {latent})",
        "forward+backward" if backward else "forward",
        contenders,
        check,
        flops=float(rows * numbers * (9 if backward else 4)),
        bytes=4.0 * rows * (numbers * (3 if backward else 1) + latent * (8 if backward else 3)),
    )


def _check(
    name: str, results: tuple[Tensor, ...], mean: Tensor, log_diagonal: Tensor, lower: Tensor, grad_z: Tensor,
    grad_kl: Tensor
) -> None:  # fmt: skip
    # Each contender draws noise of its own: take it out of z, see that it is normal, and go on with it.
    z, kl, *grads = (t.detach().double() for t in results)
    leaves = [mean.requires_grad_(), log_diagonal.requires_grad_(), lower.requires_grad_()]
    tril = factor(log_diagonal, lower)
    noise = torch.linalg.solve_triangular(tril.detach(), (z - mean.detach()).unsqueeze(-1), upper=False).squeeze(-1)
    six_sigma = 6 / noise.numel() ** 0.5
    if not (noise.mean().abs() <= six_sigma and (noise.square().mean() - 1).abs() <= six_sigma * 2**0.5):
        raise WrongResultError(f"{name}: the noise of z is not standard normal")
    again = mean + (tril @ noise.unsqueeze(-1)).squeeze(-1)
    exact = 0.5 * (mean.square().sum(-1) + tril.square().sum((1, 2)) - mean.shape[-1]) - log_diagonal.sum(-1)
    assert_close(name, "kl", kl, exact.detach())
    if grads:
        truths = torch.autograd.grad((again, exact), leaves, (grad_z, grad_kl))
        for what, mine, truth in zip(("mean", "log_diagonal", "lower"), grads, truths, strict=True):
            assert_close(name, f"grad_{what}", mine, truth)
