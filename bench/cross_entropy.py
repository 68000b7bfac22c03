"""Output layer and cross-entropy of a language model."""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.interleave import OURS, Case, assert_close
from fastvae.functional import bag_of_words_loss, linear_cross_entropy

# Rows, hidden, vocabulary; the last of the forward sizes scores 100 samples of a sentence of 22 words.
SIZES = [(240, 256, 1_000), (960, 256, 10_000), (960, 512, 32_000), (240, 256, 128_000)]
SCORING = [(2_200, 256, 10_000)]
BAGS = [(32, 30, 256, 10_000)]  # sentences, words, hidden, vocabulary

Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), target)


def eager_bag_of_words(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor) -> Tensor:
    log_p = F.log_softmax(F.linear(hidden, weight, bias), -1)
    return -log_p.gather(-1, targets).sum(-1).mean()


def _contenders() -> dict[str, Function]:
    functions: dict[str, Function] = {
        OURS: linear_cross_entropy,
        "eager": eager,
        "torch.compile": torch.compile(eager, fullgraph=True, dynamic=False),
    }
    if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13

        def torch_function(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor, **kwargs: object) -> Tensor:
            return F.linear_cross_entropy(hidden, weight, target, linear_bias=bias, **kwargs)

        functions["F.linear_cross_entropy"] = torch_function
        # The form that keeps memory low, as ours does.
        options = torch.nn.LinearCrossEntropyOptions()
        functions["F.linear_cross_entropy, chunked"] = functools.partial(torch_function, options=options)
    return functions


def cases() -> Iterator[Case]:
    functions = _contenders()
    for rows, size, vocabulary in SIZES:
        for backward in (False, True):
            yield _case(functions, rows, size, vocabulary, backward)
    for rows, size, vocabulary in SCORING:
        yield _case(functions, rows, size, vocabulary, False)
    functions = {
        OURS: bag_of_words_loss,
        "eager": eager_bag_of_words,
        "torch.compile": torch.compile(eager_bag_of_words, fullgraph=True, dynamic=False),
    }
    for sentences, words, size, vocabulary in BAGS:
        for backward in (False, True):
            yield _case(functions, sentences, size, vocabulary, backward, words)


def _case(
    functions: dict[str, Function], rows: int, size: int, vocabulary: int, backward: bool, words: int | None = None
) -> Case:
    definition = eager if words is None else eager_bag_of_words
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, size, generator=generator)
    weight = torch.randn(vocabulary, size, generator=generator) * size**-0.5
    bias = torch.randn(vocabulary, generator=generator) * 0.1
    target = torch.randint(vocabulary, (rows,) if words is None else (rows, words), generator=generator)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]

    def forward(function: Function) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(hidden, weight, target, bias),)

        return call

    def both(function: Function) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            loss = function(hidden, weight, target, bias)
            loss.backward(inputs=leaves)
            return loss, *_taken(leaves)

        return call

    contenders = {name: (both if backward else forward)(f) for name, f in functions.items()}

    @functools.cache
    def expected() -> dict[str, Tensor]:
        exact = [t.detach().double().requires_grad_() for t in leaves]
        loss = definition(exact[0], exact[1], target, exact[2])
        grads = torch.autograd.grad(loss, exact) if backward else ()
        return dict(zip(("loss", "grad_hidden", "grad_weight", "grad_bias"), (loss.detach(), *grads), strict=False))

    def check(name: str) -> None:
        for (what, wanted), got in zip(expected().items(), contenders[name](), strict=True):
            assert_close(name, what, got.detach(), wanted)

    operands = rows * size + vocabulary * size + vocabulary
    return Case(
        "cross_entropy",
        f"{f'{rows} rows' if words is None else f'{rows} bags of {words} words'}, hidden {size}, "
        f"vocabulary {vocabulary:,}",
        "forward+backward" if backward else "forward",
        contenders,
        check,
        flops=2.0 * rows * size * vocabulary * (3 if backward else 1),
        bytes=4.0 * operands * (2 if backward else 1),
    )


def _taken(leaves: list[Tensor]) -> list[Tensor]:
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return grads  # type: ignore[return-value]
