"""Gumbel-softmax samples with their KL from the uniform prior."""

import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.interleave import OURS, Case, WrongResultError, assert_close
from fastvae.functional import gumbel_softmax_sample_kl

SIZES = [(128, 20, 10), (4096, 32, 32)]
TEMPERATURE = 0.7

Function = Callable[[Tensor], tuple[Tensor, Tensor]]


def eager(logits: Tensor, hard: bool) -> tuple[Tensor, Tensor]:
    sample = F.gumbel_softmax(logits, tau=TEMPERATURE, hard=hard)
    log_p = F.log_softmax(logits, -1)
    return sample, (log_p.exp() * (log_p + math.log(logits.shape[-1]))).sum(-1)


def cases() -> Iterator[Case]:
    for shape in SIZES:
        for hard, backward in ((False, False), (False, True), (True, True)):
            peer = functools.partial(eager, hard=hard)
            functions: dict[str, Function] = {
                OURS: functools.partial(gumbel_softmax_sample_kl, temperature=TEMPERATURE, hard=hard),
                "eager": peer,
                "torch.compile": torch.compile(peer, fullgraph=True, dynamic=False),
            }
            yield _case(functions, shape, hard, backward)


def _case(functions: dict[str, Function], shape: tuple[int, ...], hard: bool, backward: bool) -> Case:
    generator = torch.Generator().manual_seed(0)
    logits, grad_sample = (torch.randn(shape, generator=generator) for _ in range(2))
    grad_kl = torch.randn(shape[:-1], generator=generator)
    logits.requires_grad_()

    def forward(function: Function) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return function(logits)

        return call

    def both(function: Function) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            outputs = function(logits)
            return *outputs, *torch.autograd.grad(outputs, logits, (grad_sample, grad_kl))

        return call

    contenders = {name: (both if backward else forward)(f) for name, f in functions.items()}

    def check(name: str) -> None:
        _check(name, contenders[name](), *(t.detach().double() for t in (logits, grad_sample, grad_kl)), hard)

    rows, elements = math.prod(shape[:-1]), math.prod(shape)
    return Case(
        "categorical",
        f"{shape}, {'straight-through' if hard else 'relaxed'}",
        "forward+backward" if backward else "forward",
        contenders,
        check,
        bytes=4.0 * (elements * (6 if backward else 2) + rows * (2 if backward else 1)),
    )


def _check(
    name: str, results: tuple[Tensor, ...], logits: Tensor, grad_sample: Tensor, grad_kl: Tensor, hard: bool
) -> None:
    # Each contender draws noise of its own: see that its classes are as frequent as they should be, and go on with it.
    sample, kl, *grads = (t.detach().double() for t in results)
    log_p = F.log_softmax(logits, -1)
    p = log_p.exp()
    assert_close(name, "the sum of a sample", sample.sum(-1), torch.ones_like(kl))
    drawn = F.one_hot(sample.argmax(-1), logits.shape[-1]).double()
    deviation = (drawn - p).flatten(0, -2).sum(0) / (p * (1 - p)).flatten(0, -2).sum(0).sqrt()
    if not deviation.abs().max().item() <= 6:
        raise WrongResultError(f"{name}: the classes do not follow the probabilities")
    if hard:
        assert_close(name, "sample", sample, drawn)
    ratio = log_p + math.log(logits.shape[-1])
    assert_close(name, "kl", kl, (p * ratio).sum(-1))
    if grads and hard:  # the soft sample is not known, but no shift of the logits changes it
        assert_close(name, "the sum of a gradient", 1 + grads[0].sum(-1), torch.ones_like(kl))
    elif grads:
        pull = sample * (grad_sample - (sample * grad_sample).sum(-1, keepdim=True)) / TEMPERATURE
        assert_close(name, "grad_logits", grads[0], pull + grad_kl[..., None] * p * (ratio - kl[..., None]))
