"""Negative log-likelihoods summed over features: Bernoulli from logits, Gaussian with a learned variance for all."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal

from bench.interleave import OURS, Case, assert_close
from fastvae.functional import bernoulli_nll, gaussian_nll

SIZES = [(128, 784), (50, 128, 784)]  # ([samples,] batch, features): the samples share the target

Function = Callable[..., Tensor]


def eager_bernoulli(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none").sum(-1)


def eager_gaussian(mean: Tensor, target: Tensor, log_var: Tensor) -> Tensor:
    return 0.5 * (math.log(2 * math.pi) + log_var + (target - mean).square() * torch.exp(-log_var)).sum(-1)


def distributions_gaussian(mean: Tensor, target: Tensor, log_var: Tensor) -> Tensor:
    return -Normal(mean, torch.exp(0.5 * log_var)).log_prob(target).sum(-1)


def cases() -> Iterator[Case]:
    bernoulli: dict[str, Function] = {OURS: bernoulli_nll, "eager": eager_bernoulli}
    gaussian: dict[str, Function] = {
        OURS: gaussian_nll,
        "eager": eager_gaussian,
        "torch.distributions": distributions_gaussian,
    }
    for name, functions in (("Bernoulli", bernoulli), ("Gaussian", gaussian)):
        functions["torch.compile"] = torch.compile(functions["eager"], fullgraph=True, dynamic=False)
        for shape in SIZES:
            for backward in (False, True):
                yield _case(name, functions, shape, backward)


def _case(density: str, functions: dict[str, Function], shape: tuple[int, ...], backward: bool) -> Case:
    generator = torch.Generator().manual_seed(0)
    prediction = (2 * torch.randn(shape, generator=generator)).requires_grad_()
    target = torch.rand(shape[-2:], generator=generator)
    grad = torch.randn(shape[:-1], generator=generator)
    leaves, operands = [prediction], [prediction, target]
    if density == "Bernoulli":
        target.round_()
    else:
        log_var = torch.tensor(-0.5, requires_grad=True)
        leaves.append(log_var)
        operands.append(log_var)

    def forward(function: Function) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(*operands),)

        return call

    def both(function: Function) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            nll = function(*operands)
            return nll, *torch.autograd.grad(nll, leaves, grad)

        return call

    contenders = {name: (both if backward else forward)(f) for name, f in functions.items()}

    def check(name: str) -> None:
        exact = [t.detach().double() for t in operands]
        differentiable = [t.requires_grad_() for t, given in zip(exact, operands, strict=True) if given.requires_grad]
        nll = (eager_bernoulli if density == "Bernoulli" else eager_gaussian)(*exact)
        expected = [nll, *torch.autograd.grad(nll, differentiable, grad.double())]
        for what, got, truth in zip(("nll", "grad", "grad_log_var"), contenders[name](), expected, strict=False):
            assert_close(name, what, got, truth)

    elements, shared, rows = prediction.numel(), target.numel(), grad.numel()
    return Case(
        "likelihood",
        f"{density} {shape}",
        "forward+backward" if backward else "forward",
        contenders,
        check,
        bytes=4.0 * (3 * elements + 2 * (shared + rows) if backward else elements + shared + rows),
    )
