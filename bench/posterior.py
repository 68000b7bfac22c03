"""I(z;x) of 10,000 data, and the log-density of a batch under a mixture, with gradients."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.interleave import OURS, Case, WrongResultError, assert_close
from fastvae.functional import mixture_log_density, mutual_information

DATA = 10_000
_CHUNK = 50  # data at a time, of those who hold (chunk, data, latent) numbers
_PRODUCT_CHUNK = 500  # of those who hold (chunk, data)

Information = Callable[[Tensor, Tensor], Tensor]
Density = Callable[[Tensor, Tensor, Tensor], Tensor]


def broadcast(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    log_density = -0.5 * ((z[:, None] - mean) ** 2 / torch.exp(log_var) + log_var + math.log(2 * math.pi))
    return torch.logsumexp(log_density.sum(-1), 1) - math.log(mean.shape[0])


def expanded(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    precision = torch.exp(-log_var)
    constant = (mean.square() * precision + log_var).sum(-1) + z.shape[1] * math.log(2 * math.pi)
    squares = z.square() @ precision.T - 2 * z @ (mean * precision).T + constant
    return torch.logsumexp(-0.5 * squares, 1) - math.log(mean.shape[0])


def information(density: Density, chunk: int) -> Information:
    """I(z;x) as it is written around a density, some data at a time."""

    def call(mean: Tensor, log_var: Tensor) -> Tensor:
        noise = torch.randn_like(mean)
        z = mean + torch.exp(0.5 * log_var) * noise
        own = -0.5 * (noise.square() + log_var + math.log(2 * math.pi)).sum(-1)
        mixture = torch.cat([density(rows, mean, log_var) for rows in z.split(chunk)])
        return (own - mixture).mean()

    return call


def cases() -> Iterator[Case]:
    for latent in (2, 32, 128):
        yield _information(latent)
    for rows, components, latent in ((256, 256, 10), (128, 500, 40)):
        yield _mixture(rows, components, latent)


def _information(latent: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(DATA, latent, generator=generator)
    log_var = 0.5 * torch.randn(DATA, latent, generator=generator) - 2
    compiled = torch.compile(broadcast, fullgraph=True, dynamic=False)
    functions: dict[str, Information] = {
        OURS: mutual_information,
        "eager": information(expanded, _PRODUCT_CHUNK),
        "torch.compile": information(compiled, _CHUNK),
    }
    if latent == 2:  # with 32 a call takes half a minute
        functions["eager, broadcast"] = information(broadcast, _CHUNK)

    def run(function: Information) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return function(mean, log_var)

        return call

    def check(name: str) -> None:
        # Each draws noise of its own: they agree to the standard error of the estimate.
        few = [t[:1000] for t in (mean, log_var)]
        z = few[0].double() + torch.exp(0.5 * few[1].double()) * torch.randn(1000, latent).double()
        own = torch.stack([broadcast(z[i : i + 1], *(t[i : i + 1].double() for t in few))[0] for i in range(1000)])
        ratio = own - torch.cat([broadcast(rows, *(t.double() for t in few)) for rows in z.split(_CHUNK)])
        error = (functions[name](*few).double() - ratio.mean()).abs().item()
        if not error <= 6 * 2**0.5 * ratio.std().item() / 1000**0.5 + 1e-3:
            raise WrongResultError(f"{name}: I(z;x) is off by {error:.3g} nats")

    return Case(
        "posterior",
        f"I(z;x) of {DATA:,} data, latent {latent}",
        "forward",
        {name: run(function) for name, function in functions.items()},
        check,
        flops=4.0 * DATA * DATA * latent,
        bytes=4.0 * 2 * DATA * latent,
    )


def _mixture(rows: int, components: int, latent: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    z, mean, log_var = (torch.randn(n, latent, generator=generator) for n in (rows, components, components))
    grad = torch.randn(rows, generator=generator)
    leaves = [t.requires_grad_() for t in (z, mean, log_var)]
    functions: dict[str, Density] = {
        OURS: mixture_log_density,
        "eager": broadcast,
        "eager, expanded": expanded,
        "torch.compile": torch.compile(broadcast, fullgraph=True, dynamic=False),
    }

    def run(function: Density) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            output = function(z, mean, log_var)
            return output, *torch.autograd.grad(output, leaves, grad)

        return call

    contenders = {name: run(function) for name, function in functions.items()}

    def check(name: str) -> None:
        exact = [t.detach().double().requires_grad_() for t in leaves]
        output = broadcast(*exact)
        expected = [output, *torch.autograd.grad(output, exact, grad.double())]
        parts = ("log_density", "grad_z", "grad_mean", "grad_log_var")
        for part, got, wanted in zip(parts, contenders[name](), expected, strict=True):
            assert_close(name, part, got.detach(), wanted.detach())

    return Case(
        "posterior",
        f"{rows} points under {components} components, latent {latent}",
        "forward+backward",
        contenders,
        check,
        flops=9.0 * rows * components * latent,
        bytes=4.0 * (2 * rows + 4 * components) * latent,
    )
