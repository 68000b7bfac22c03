"""Reparameterized sampling with its KL against N(0, I)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.interleave import OURS, Case, WrongResultError, assert_close
from fastvae.functional import gaussian_sample_kl

SIZES = [(128, 32), (4096, 64), (65536, 128)]

Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def eager(mean: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
    z = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
    kl = -0.5 * torch.sum(1 + log_var - mean.square() - log_var.exp(), -1)
    return z, kl


def cases() -> Iterator[Case]:
    functions: dict[str, Function] = {
        OURS: gaussian_sample_kl,
        "eager": eager,
        "torch.compile": torch.compile(eager, fullgraph=True, dynamic=False),
    }
    for rows, latent in SIZES:
        for backward in (False, True):
            yield _case(functions, rows, latent, backward)


def _case(functions: dict[str, Function], rows: int, latent: int, backward: bool) -> Case:
    generator = torch.Generator().manual_seed(0)
    mean, log_var, grad_z = (torch.randn(rows, latent, generator=generator) for _ in range(3))
    grad_kl = torch.randn(rows, generator=generator)
    leaves = [mean.requires_grad_(), log_var.requires_grad_()]

    def forward(function: Function) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return function(mean, log_var)

        return call

    def both(function: Function) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            outputs = function(mean, log_var)
            return *outputs, *torch.autograd.grad(outputs, leaves, (grad_z, grad_kl))

        return call

    contenders = {name: (both if backward else forward)(f) for name, f in functions.items()}

    def check(name: str) -> None:
        operands = (t.detach().double() for t in (mean, log_var, grad_z, grad_kl))
        _check(name, contenders[name](), *operands)

    elements = rows * latent
    return Case(
        "gaussian",
        f"({rows}, {latent})",
        "forward+backward" if backward else "forward",
        contenders,
        check,
        bytes=4.0 * (elements * (8 if backward else 3) + rows * (2 if backward else 1)),
    )


def _check(
    name: str, results: tuple[Tensor, ...], mean: Tensor, log_var: Tensor, grad_z: Tensor, grad_kl: Tensor
) -> None:
    # Each contender draws noise of its own: take it out of z, see that it is normal, and go on with it.
    z, kl, *grads = (t.detach().double() for t in results)
    std = torch.exp(0.5 * log_var)
    noise = (z - mean) / std
    six_sigma = 6 / noise.numel() ** 0.5
    moments = (noise.mean().abs(), (noise.square().mean() - 1).abs() / 2**0.5)
    if not all(moment.item() <= six_sigma for moment in moments):
        raise WrongResultError(f"{name}: the noise of z is not standard normal")
    assert_close(name, "kl", kl, 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(-1))
    if grads:
        grad_kl = grad_kl[:, None]
        assert_close(name, "grad_mean", grads[0], grad_z + grad_kl * mean)
        expected = 0.5 * (grad_z * std * noise + grad_kl * torch.expm1(log_var))
        assert_close(name, "grad_log_var", grads[1], expected)
