"""The aggregated posterior: log-density of a mixture of diagonal Gaussians, and I(z; x) by it.

    log q(z_i) = log 1/M sum_j N(z_i; mean_j, var_j),    I(z; x) = E_i [log q(z_i | x_i) - log q(z_i)] in nats

Each log-density is summed from (z - mean)^2 / var itself, since the expanded square loses the digits of a narrow
component far from 0; the sum over j keeps a running maximum. ``log_var`` is clamped to [-40, 40], and its gradient is
zero outside. Source: Hoffman & Johnson 2016, "ELBO surgery"; Tomczak & Welling 2018, "VAE with a VampPrior".
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastvae.ops.backend import CORE, compute_dtype, first_order, kernel, large, pointer, recording, register
from fastvae.ops.checks import check_float, check_like
from fastvae.ops.gaussian import LOG_VAR_LIMIT, gaussian_sample_kl

_LOG_2_PI = math.log(2 * math.pi)
_REFERENCE_ELEMENTS = 1 << 22  # of the reference's largest tensor
_DRAWN_ELEMENTS = 1 << 18  # of z that are drawn at once where no gradient is wanted
_STREAM = 0x5851F42D4C957F2D  # any large number: the seeds of two parts of z are this far apart
_OWN_ELEMENTS = 1 << 15  # of the temporaries of each z's density under its own posterior


# ------------------------------------------------------------------------------------------------ reference
def reference(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Eager definition, some rows of z at a time. z (N, D), mean, log_var (M, D); returns (N,)."""
    return torch.cat([_reference_rows(rows, mean, log_var) for rows in z.split(_reference_chunk(mean))])


def reference_backward(
    grad: Tensor, log_density: Tensor, z: Tensor, mean: Tensor, log_var: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference` by autograd; `log_density` is its result, for kernels that do not compute it again."""
    compute = compute_dtype(z)
    grad_z = torch.zeros(z.shape, dtype=compute, device=z.device)
    totals = [torch.zeros(mean.shape, dtype=compute, device=mean.device) for _ in range(2)]
    # A point whose density is below the range has no gradient; that of logsumexp would be NaN.
    for rows in (~log_density.isneginf()).nonzero().squeeze(1).split(_reference_chunk(mean)):
        with recording():
            leaves = [t.detach().to(compute).requires_grad_() for t in (z[rows], mean, log_var)]
            density = _reference_rows(*leaves)
        grad_z[rows], *grads = torch.autograd.grad(density, leaves, grad[rows])
        totals = [total + g for total, g in zip(totals, grads, strict=True)]
    return grad_z.to(z.dtype), totals[0].to(mean.dtype), totals[1].to(log_var.dtype)


def _reference_rows(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    compute = compute_dtype(z)
    log_densities = gaussian_log_density(z.to(compute)[:, None], mean.to(compute), log_var.to(compute))
    return torch.logsumexp(log_densities, 1) - math.log(max(len(mean), 1))


def _reference_chunk(mean: Tensor) -> int:
    return max(1, _REFERENCE_ELEMENTS // max(1, mean.numel()))


def gaussian_log_density(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Return log N(z; mean, exp(log_var)) in nats, summed over the last dimension; the operands broadcast."""
    log_var = log_var.clamp(-LOG_VAR_LIMIT, LOG_VAR_LIMIT)
    return -0.5 * ((z - mean).square() * torch.exp(-log_var) + (log_var + _LOG_2_PI)).sum(-1)


# ----------------------------------------------------------------------------------------------- C++ on CPU
def _cpu(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    assert CORE is not None
    z, mean, log_var = _computed(z, mean, log_var)
    is_double, sizes, threads = z.dtype == torch.float64, (*z.shape[:1], *mean.shape), torch.get_num_threads()
    log_density = z.new_empty(z.shape[0])
    memory = _workspace(False, is_double, sizes, threads)
    CORE.mixture_forward(
        is_double, pointer(z), pointer(mean), pointer(log_var), *sizes, pointer(log_density), threads, pointer(memory)
    )
    return log_density


def _cpu_backward(
    grad: Tensor, log_density: Tensor, z: Tensor, mean: Tensor, log_var: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    assert CORE is not None
    operands = _computed(z, mean, log_var)
    is_double, sizes = operands[0].dtype == torch.float64, (*z.shape[:1], *mean.shape)
    threads = torch.get_num_threads()
    grads = [large(t.new_empty(t.shape)) for t in operands]
    memory, log_density, grad = _workspace(True, is_double, sizes, threads), log_density.contiguous(), grad.contiguous()
    CORE.mixture_backward(
        is_double, *map(pointer, operands), *sizes, pointer(log_density), pointer(grad), *map(pointer, grads), threads,
        pointer(memory),
    )  # fmt: skip
    return grads[0].to(z.dtype), grads[1].to(mean.dtype), grads[2].to(log_var.dtype)


def _computed(*tensors: Tensor) -> list[Tensor]:
    return [t.to(compute_dtype(t)).contiguous() for t in tensors]


def _workspace(backward: bool, is_double: bool, sizes: tuple[int, ...], threads: int) -> Tensor:
    assert CORE is not None
    return large(torch.empty(CORE.mixture_workspace(backward, is_double, *sizes, threads), dtype=torch.uint8))


# -------------------------------------------------------------------------------------------- Triton on CUDA
_triton_forward = kernel("posterior", "forward")
_triton_backward = kernel("posterior", "backward")


def _cuda(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    return (reference if z.dtype == torch.float64 else _triton_forward)(z, mean, log_var)


def _cuda_backward(
    grad: Tensor, log_density: Tensor, z: Tensor, mean: Tensor, log_var: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    compute = reference_backward if z.dtype == torch.float64 else _triton_backward
    return compute(grad, log_density, z, mean, log_var)


# ------------------------------------------------------------------------------------------ schema, autograd
def _fake(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    return z.new_empty(z.shape[0], dtype=compute_dtype(z))


def _fake_backward(
    grad: Tensor, log_density: Tensor, z: Tensor, mean: Tensor, log_var: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), mean.new_empty(mean.shape), log_var.new_empty(log_var.shape)


_mixture = register(
    "mixture_log_density(Tensor z, Tensor mean, Tensor log_var) -> Tensor",
    reference=reference,
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)
_mixture_backward = register(
    "mixture_log_density_backward(Tensor grad, Tensor log_density, Tensor z, Tensor mean, Tensor log_var) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=_fake_backward,
    cpu=_cpu_backward,
    cuda=_cuda_backward,
)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        log_density = _mixture(z, mean, log_var)
        ctx.save_for_backward(log_density, z, mean, log_var)
        return log_density

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = _mixture_backward(grad, *ctx.saved_tensors)
        return tuple(g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=True))


# -------------------------------------------------------------------------------------------------- public
def mixture_log_density(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Log-density of each z under the uniform mixture of M diagonal Gaussians, with gradients to all three.

    Nothing of size N * M is stored, forward or backward. With the posteriors of a data set as components this is
    log q(z), the aggregated posterior; with those of pseudo-inputs, a VampPrior.

    Args:
        z: points, (N, latent), float32, float64, bfloat16 or float16.
        mean: means of the components, (M, latent), M at least 1, dtype and device of `z`.
        log_var: log of their variances, like `mean`; clamped to [-40, 40].

    Returns:
        log 1/M sum_j N(z_i; mean_j, exp(log_var_j)) in nats, summed over the latent dimension, float32 (float64 for
        float64 input), (N,). -inf where every component's log-density is below float32's range.

    Raises:
        TypeError, ValueError: naming the argument whose type, shape or device is wrong.

    Source: Tomczak & Welling 2018, "VAE with a VampPrior"; Chen et al. 2018, "Isolating sources of disentanglement".
    """
    check_float("z", z)
    if z.dim() != 2:
        raise ValueError(f"z: expected shape (N, latent), got {tuple(z.shape)}")
    check_like("mean", mean, "z", z)
    if mean.dim() != 2 or mean.shape[1] != z.shape[1] or mean.shape[0] == 0:
        raise ValueError(f"mean: expected shape (M, latent) with M at least 1 and latent {z.shape[1]} as z, "
                         f"got {tuple(mean.shape)}")  # fmt: skip
    _check_log_var(mean, log_var)
    return _Mixture.apply(z, mean, log_var)


def mutual_information(
    mean: Tensor, log_var: Tensor, *, generator: torch.Generator | None = None, seed: Tensor | None = None
) -> Tensor:
    """Estimate I(z; x) = E_x KL(q(z|x) || q(z)) under the uniform distribution over N data, with gradients.

    One z is drawn from each posterior, and q(z) is the exact mixture of all N: the estimate is at most log N, so that
    values near it are a lower bound.

    Args:
        mean: means of the posteriors, (N, latent), float32, float64, bfloat16 or float16.
        log_var: log of their variances, like `mean`; clamped to [-40, 40].
        generator: source of the seed, on the device of `mean`; torch's global one if None.
        seed: int64 tensor (1,) on the device of `mean` to use instead of drawing one; with gradients, or for up to
            2^18 numbers, it gives the z that :func:`gaussian_sample_kl` gives.

    Returns:
        mean_i [log q(z_i | x_i) - log q(z_i)] in nats, float32 (float64 for float64 input), (); 0 for no data.

    Raises:
        TypeError, ValueError: naming the argument whose type, shape or device is wrong.

    Source: Hoffman & Johnson 2016, "ELBO surgery".
    """
    check_float("mean", mean)
    if mean.dim() != 2:
        raise ValueError(f"mean: expected shape (N, latent), got {tuple(mean.shape)}")
    _check_log_var(mean, log_var)
    mean, log_var = (t.to(compute_dtype(mean)) for t in (mean, log_var))
    rows, latent = mean.shape
    recorded = torch.is_grad_enabled() and (mean.requires_grad or log_var.requires_grad)
    # Without gradients nobody needs the z of all data at once, which would be most of the memory.
    chunk = max(1, rows if recorded else _DRAWN_ELEMENTS // max(1, latent))
    total = mean.new_zeros(())
    for part in zip(mean.split(chunk), log_var.split(chunk), strict=True):
        z, _ = gaussian_sample_kl(*part, generator=generator, seed=seed)
        # Both densities are those of z as it was rounded: what rounding does to one it does to the other.
        total = total + (_own_log_density(z, *part) - _Mixture.apply(z, mean, log_var)).sum()
        seed = None if seed is None else seed + _STREAM
    return total / max(rows, 1)


def _own_log_density(*operands: Tensor) -> Tensor:
    # Some rows at a time: the temporaries of all would be as large as z.
    rows, latent = operands[0].shape
    chunk = max(1, _OWN_ELEMENTS // max(1, latent))
    if rows <= chunk:
        return gaussian_log_density(*operands)
    return torch.cat([gaussian_log_density(*parts) for parts in zip(*(t.split(chunk) for t in operands), strict=True)])


def _check_log_var(mean: Tensor, log_var: Tensor) -> None:
    check_like("log_var", log_var, "mean", mean)
    if log_var.shape != mean.shape:
        raise ValueError(f"log_var: expected the shape of mean, {tuple(mean.shape)}, got {tuple(log_var.shape)}")
