"""The terms of a VAE with a mixture prior: KL, dispersion, KL of the aggregate and mutual information."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.interleave import OURS, Case, assert_close
from fastvae.functional import mixture_kl

SIZES = [(64, 20, 5, 2), (600, 20, 5, 2), (600, 3, 5, 16)]  # batch, variables, components, latent

Function = Callable[..., tuple[Tensor, ...]]


def eager(
    mean: Tensor, log_var: Tensor, logits: Tensor, component_mean: Tensor, component_log_var: Tensor
) -> tuple[Tensor, ...]:
    """By natural parameters and the log-partition function, as the paper writes it."""
    q, log_q = logits.softmax(-1), logits.log_softmax(-1)
    precision = torch.exp(-component_log_var)
    first, second = component_mean * precision, -0.5 * precision
    average_first = torch.einsum("bmk,mkd->bmd", q, first)
    average_second = torch.einsum("bmk,mkd->bmd", q, second)
    dispersion = (q * _log_partition(first, second)).sum(-1) - _log_partition(average_first, average_second)
    prior_var = -0.5 / average_second
    prior_mean = average_first * prior_var
    kl = 0.5 * (prior_var.log() - log_var + (log_var.exp() + (mean - prior_mean).square()) / prior_var - 1)
    aggregate = q.mean(0)
    entropy = -(aggregate * aggregate.log()).sum(-1)
    information = entropy + (q * log_q).sum(-1).mean(0)
    return kl.sum((1, 2)), dispersion.sum(1), math.log(logits.shape[-1]) - entropy, information


def _log_partition(first: Tensor, second: Tensor) -> Tensor:
    return (-first.square() / (4 * second) - 0.5 * torch.log(-2 * second)).sum(-1)


def cases() -> Iterator[Case]:
    functions: dict[str, Function] = {
        OURS: mixture_kl,
        "eager": eager,
        "torch.compile": torch.compile(eager, fullgraph=True, dynamic=False),
    }
    for size in SIZES:
        yield _case(functions, *size)


def _case(functions: dict[str, Function], batch: int, variables: int, components: int, latent: int) -> Case:
    random = torch.Generator().manual_seed(0)
    posterior, prior = (batch, variables, latent), (variables, components, latent)
    shapes = [posterior, posterior, (batch, variables, components), prior, prior]
    leaves = [torch.randn(shape, generator=random).requires_grad_() for shape in shapes]
    grads = [torch.randn(n, generator=random) for n in (batch, batch, variables, variables)]

    def both(function: Function) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            outputs = function(*leaves)
            return *outputs, *torch.autograd.grad(outputs, leaves, grads)

        return call

    def check(name: str) -> None:
        exact = [x.detach().double().requires_grad_() for x in leaves]
        outputs = eager(*exact)
        expected = *outputs, *torch.autograd.grad(outputs, exact, [g.double() for g in grads])
        names = ("kl", "dispersion", "aggregate_kl", "mutual_information", *(f"gradient {n}" for n in range(5)))
        for term, ours, theirs in zip(names, contenders[name](), expected, strict=True):
            assert_close(name, term, ours + 1, theirs + 1)  # what is near 0 is a difference of numbers near 1

    contenders = {name: both(function) for name, function in functions.items()}
    elements = sum(x.numel() for x in leaves)
    # For each datum and variable: exponentials and logarithms count 15, forward and backward.
    work = batch * variables * (2 * 15 * (components + 2 + 3 * latent) + 30 * components * latent)
    return Case(
        "mixture",
        f"batch {batch}, {variables} variables of {components} components, latent {latent}",
        "forward+backward",
        contenders,
        check,
        flops=float(work),
        bytes=4.0 * 3 * elements,
    )
