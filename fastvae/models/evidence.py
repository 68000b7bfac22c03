"""What the variational models share: free bits, the importance-weighted likelihood, and evaluation without dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastvae.functional import importance_weighted_bound

FREE_BITS_PER = ("dimension", "batch")


def free_bits_kl(kl: Tensor, free_bits: float, per: str = "dimension") -> Tensor:
    """Sum over the parts of z of max(free_bits, mean of their KL over the batch): below, the KL has no gradient.

    Args:
        kl: KL in nats, `(batch, parts)`.
        free_bits: lambda, nats a part.
        per: "dimension" takes each dimension as a part; "batch" the whole z as one.

    Returns:
        Nats per datum, a scalar.

    Source: Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow (2016), equation 15.
    """
    mean = kl.mean(0)
    return (mean if per == "dimension" else mean.sum()).clamp_min(free_bits).sum()


def check_free_bits(free_bits: float, per: str = "dimension") -> None:
    """Raise ValueError unless `free_bits` is a finite number of nats, at least 0, and `per` says of what."""
    if per not in FREE_BITS_PER:
        raise ValueError(f"free_bits_per: expected one of {', '.join(map(repr, FREE_BITS_PER))}, got {per!r}")
    if not 0 <= free_bits < float("inf"):
        raise ValueError(f"free_bits: expected at least 0 nats, got {free_bits}")


def importance_weighted_nll(draw: Callable[[int], tuple[Tensor, Tensor]], num_samples: int, chunk: int) -> Tensor:
    """Estimate -log p(x) as -log 1/S sum over s of p(x|z_s) p(z_s) / q(z_s|x), drawing S samples in chunks.

    Args:
        draw: gives, for a number of samples, log p(x|z) and log p(z) - log q(z|x) of as many, each `(samples, batch)`.
        num_samples: S.
        chunk: most samples to draw at a time.

    Returns:
        Nats per datum, float64, `(batch,)`.

    Raises:
        ValueError: if `num_samples` or `chunk` is below 1.

    Source: Burda et al., Importance Weighted Autoencoders (2016), equation 8.
    """
    for name, value in (("num_samples", num_samples), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    draws = [draw(min(chunk, num_samples - first)) for first in range(0, num_samples, chunk)]
    log_likelihood, log_ratio = (torch.cat([part.double() for part in parts]) for parts in zip(*draws, strict=True))
    return -importance_weighted_bound(log_likelihood, log_ratio)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode, and each of its modules back into the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
