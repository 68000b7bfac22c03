"""Corrupted inputs, alone and with the linear layer that reads them."""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.interleave import OURS, Case, WrongResultError, assert_close
from fastvae.functional import corrupt, corrupted_linear

SIZES = [(128, 784, 400), (4096, 1024, 1024)]  # rows, features, outputs
LEVEL = 0.3

Function = Callable[..., Tensor]


def eager_masking(x: Tensor) -> Tensor:
    return x * (torch.rand_like(x) > LEVEL)


def eager_gaussian(x: Tensor) -> Tensor:
    return x + LEVEL * torch.randn_like(x)


def eager_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(eager_masking(x), weight, bias)


def two_steps(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(corrupt(x, "masking", LEVEL), weight, bias)


def cases() -> Iterator[Case]:
    for noise, eager in (("masking", eager_masking), ("gaussian", eager_gaussian)):
        functions: dict[str, Function] = {
            OURS: functools.partial(corrupt, noise=noise, level=LEVEL),
            "eager": eager,
            "torch.compile": torch.compile(eager, fullgraph=True, dynamic=False),
        }
        for rows, features, _ in SIZES:
            for backward in (False, True)[: 2 if noise == "masking" else 1]:
                yield _case(noise, functions, rows, features, 0, backward)
    functions = {
        OURS: functools.partial(corrupted_linear, noise="masking", level=LEVEL),
        "corrupt, then F.linear": two_steps,
        "eager": eager_linear,
        "torch.compile": torch.compile(eager_linear, fullgraph=True, dynamic=False),
    }
    for sizes in SIZES:
        for backward in (False, True):
            yield _case("masking", functions, *sizes, backward)


def _case(noise: str, functions: dict[str, Function], rows: int, features: int, outputs: int, backward: bool) -> Case:
    """With no outputs, the corruption alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, features, generator=generator)
    weight = torch.randn(outputs, features, generator=generator) * features**-0.5
    bias = torch.randn(outputs, generator=generator)
    grad = torch.randn(rows, outputs or features, generator=generator)
    leaves = [t.requires_grad_() for t in ((x, weight, bias) if outputs else (x,))]

    def forward(function: Function) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(*leaves),)

        return call

    def both(function: Function) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            y = function(*leaves)
            return y, *torch.autograd.grad(y, leaves, grad)

        return call

    contenders = {name: (both if backward else forward)(f) for name, f in functions.items()}

    def check(name: str) -> None:
        results = [t.detach().double() for t in contenders[name]()]
        operands = [t.detach().double() for t in (*leaves, grad)]
        (_check_linear if outputs else functools.partial(_check_corrupted, noise=noise))(name, results, operands)

    return Case(
        "corruption",
        f"{noise} of ({rows}, {features})" + (f" into {outputs} outputs" if outputs else ""),
        "forward+backward" if backward else "forward",
        contenders,
        check,
        flops=2.0 * rows * features * outputs * (3 if backward else 1),
        bytes=4.0 * (rows * features + (features + rows) * outputs + (0 if outputs else rows * features))
        * (2 if backward else 1),
    )  # fmt: skip


def _check_corrupted(name: str, results: list[Tensor], operands: list[Tensor], noise: str) -> None:
    (corrupted, *grads), (x, grad) = results, operands
    six_sigma = 6 / x.numel() ** 0.5
    if noise == "gaussian":
        drawn = (corrupted - x) / LEVEL
        moments = (drawn.mean().abs(), (drawn.square().mean() - 1).abs() / 2**0.5)
        wrong = not all(moment.item() <= six_sigma for moment in moments)
    else:
        kept = corrupted != 0
        assert_close(name, "what was kept", corrupted, x * kept)
        wrong = not abs(kept.double().mean().item() - (1 - LEVEL)) <= six_sigma
        if grads:
            assert_close(name, "grad_x", grads[0], grad * kept)
    if wrong:
        raise WrongResultError(f"{name}: the noise is not as it should be")


def _check_linear(name: str, results: list[Tensor], operands: list[Tensor]) -> None:
    # Each contender draws a mask of its own. The gradient of x tells it; without one, only moments can be seen.
    (y, *grads), (x, weight, bias, grad) = results, operands
    if grads:
        kept = grads[0] != 0
        assert_close(name, "grad_x", grads[0], (grad @ weight) * kept)
        assert_close(name, "grad_weight", grads[1], grad.T @ (x * kept))
        assert_close(name, "grad_bias", grads[2], grad.sum(0))
        assert_close(name, "y", y, (x * kept) @ weight.T + bias)
        return
    error = y - bias - (1 - LEVEL) * (x @ weight.T)
    variance = LEVEL * (1 - LEVEL) * (x.square() @ weight.square().T)
    if not 0.9 < (error.square() / variance).mean().item() < 1.1:
        raise WrongResultError(f"{name}: y is not that of a masked input")
