"""Sampling from a Gaussian of full covariance and its KL divergence from N(0, I), one pass over the Cholesky factor.

    L = strictly lower triangle + diag(exp(log_diagonal)),    z = mean + L noise
    KL(N(mean, L L^T) || N(0, I)) = 1/2 (|mean|^2 + |L|_F^2 - D) - sum log_diagonal, in nats

The strictly lower triangle comes row by row: element (i, j), i > j, at i (i - 1) / 2 + j. The noise comes from
:mod:`fastvae.ops.random` at element (s * N + n) * D + d, as in :mod:`fastvae.ops.gaussian`, and is made again in the
backward pass. ``log_diagonal`` is clamped to [-20, 20], the standard deviations of that family's log-variances, with
no gradient outside; in the KL's squares the means and the numbers below the diagonal are to [-1e15, 1e15], likewise.
Source: Kingma & Welling 2019, "An introduction to variational autoencoders", section 2.5.1.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastvae.ops.backend import (
    CORE,
    compute_dtype,
    dtype_code,
    first_order,
    kernel,
    large,
    pointer,
    recording,
    register,
)
from fastvae.ops.checks import check_float, check_like, check_samples
from fastvae.ops.gaussian import LOG_VAR_LIMIT, limited_square, noise_like, z_shape
from fastvae.ops.random import seed_of

LOG_DIAGONAL_LIMIT = LOG_VAR_LIMIT / 2
MAX_LATENT = 1024  # a row of noise is made at once; its factor has half a million numbers


# ------------------------------------------------------------------------------------------------ reference
def reference_sample_kl(
    mean: Tensor, log_diagonal: Tensor, lower: Tensor, seed: Tensor, num_samples: int | None
) -> tuple[Tensor, Tensor]:
    """Eager definition. mean, log_diagonal (..., D), lower (..., D (D - 1) / 2); z (..., D) or (S, ..., D)."""
    compute = compute_dtype(mean)
    mean_, log_diagonal_, lower_ = mean.to(compute), log_diagonal.to(compute), lower.to(compute)
    noise = noise_like(mean, seed, num_samples)
    z = mean_ + torch.einsum("...ij, ...j -> ...i", scale_tril(log_diagonal_, lower_), noise)
    log_var = 2 * log_diagonal_.clamp(-LOG_DIAGONAL_LIMIT, LOG_DIAGONAL_LIMIT)
    kl = 0.5 * ((limited_square(mean_) + torch.expm1(log_var) - log_var).sum(-1) + limited_square(lower_).sum(-1))
    return z.to(mean.dtype), kl


def reference_sample_kl_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mean: Tensor,
    log_diagonal: Tensor,
    lower: Tensor,
    seed: Tensor,
    num_samples: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference_sample_kl` by autograd."""
    with recording():
        m, ld, low = (t.detach().requires_grad_() for t in (mean, log_diagonal, lower))
        outputs = reference_sample_kl(m, ld, low, seed, num_samples)
    grads = [torch.zeros_like(o) if g is None else g for o, g in zip(outputs, (grad_z, grad_kl), strict=True)]
    grad_mean, grad_log_diagonal, grad_lower = torch.autograd.grad(outputs, (m, ld, low), grads)
    return grad_mean, grad_log_diagonal, grad_lower


# ----------------------------------------------------------------------------------------------- C++ on CPU
def _cpu_sample_kl(
    mean: Tensor, log_diagonal: Tensor, lower: Tensor, seed: Tensor, num_samples: int | None
) -> tuple[Tensor, Tensor]:
    assert CORE is not None
    mean, log_diagonal, lower = mean.contiguous(), log_diagonal.contiguous(), lower.contiguous()
    z = large(mean.new_empty(z_shape(mean, num_samples)))
    kl = mean.new_empty(mean.shape[:-1], dtype=compute_dtype(mean))
    CORE.full_gaussian_forward(
        dtype_code(mean), pointer(mean), pointer(log_diagonal), pointer(lower), pointer(seed), pointer(z), pointer(kl),
        1 if num_samples is None else num_samples, kl.numel(), mean.shape[-1],
    )  # fmt: skip
    return z, kl


def _cpu_sample_kl_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mean: Tensor,
    log_diagonal: Tensor,
    lower: Tensor,
    seed: Tensor,
    num_samples: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    assert CORE is not None
    mean, log_diagonal, lower = mean.contiguous(), log_diagonal.contiguous(), lower.contiguous()
    grad_z = None if grad_z is None else grad_z.contiguous()
    grad_kl = None if grad_kl is None else grad_kl.contiguous()
    grads = torch.empty_like(mean), torch.empty_like(log_diagonal), large(torch.empty_like(lower))
    CORE.full_gaussian_backward(
        dtype_code(mean), pointer(grad_z), pointer(grad_kl), pointer(mean), pointer(log_diagonal), pointer(lower),
        pointer(seed), *map(pointer, grads), 1 if num_samples is None else num_samples,
        math.prod(mean.shape[:-1]), mean.shape[-1],
    )  # fmt: skip
    return grads


# -------------------------------------------------------------------------------------------- Triton on CUDA
_triton_forward = kernel("full_gaussian", "sample_kl_forward")
_triton_backward = kernel("full_gaussian", "sample_kl_backward")


def _cuda_sample_kl(
    mean: Tensor, log_diagonal: Tensor, lower: Tensor, seed: Tensor, num_samples: int | None
) -> tuple[Tensor, Tensor]:
    if mean.dtype == torch.float64:
        return reference_sample_kl(mean, log_diagonal, lower, seed, num_samples)
    samples = 1 if num_samples is None else num_samples
    z, kl = _triton_forward(*map(_matrix, (mean, log_diagonal, lower)), seed, samples)
    return z.reshape(z_shape(mean, num_samples)), kl.reshape(mean.shape[:-1])


def _cuda_sample_kl_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mean: Tensor,
    log_diagonal: Tensor,
    lower: Tensor,
    seed: Tensor,
    num_samples: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if mean.dtype == torch.float64:
        return reference_sample_kl_backward(grad_z, grad_kl, mean, log_diagonal, lower, seed, num_samples)
    operands = [_matrix(t) for t in (mean, log_diagonal, lower)]
    rows, latent = operands[0].shape
    if grad_z is None:
        grad_z = mean.new_zeros(z_shape(mean, num_samples))
    if grad_kl is None:
        grad_kl = mean.new_zeros(rows, dtype=torch.float32)
    grad_z = grad_z.reshape(1 if num_samples is None else num_samples, rows, latent).contiguous()
    grads = _triton_backward(grad_z, grad_kl.reshape(rows).contiguous(), *operands, seed)
    return grads[0].reshape(mean.shape), grads[1].reshape(mean.shape), grads[2].reshape(lower.shape)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1]).contiguous()


# ------------------------------------------------------------------------------------------ schema, autograd
def _fake_sample_kl(mean: Tensor, log_diagonal: Tensor, lower: Tensor, seed: Tensor,
                    num_samples: int | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    return mean.new_empty(z_shape(mean, num_samples)), mean.new_empty(mean.shape[:-1], dtype=compute_dtype(mean))


def _fake_sample_kl_backward(grad_z: Any, grad_kl: Any, mean: Tensor, log_diagonal: Tensor, lower: Tensor,
                             seed: Tensor, num_samples: Any) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return mean.new_empty(mean.shape), mean.new_empty(mean.shape), lower.new_empty(lower.shape)


_sample_kl = register(
    "full_gaussian_sample_kl(Tensor mean, Tensor log_diagonal, Tensor lower, Tensor seed, SymInt? num_samples) "
    "-> (Tensor, Tensor)",
    reference=reference_sample_kl,
    fake=_fake_sample_kl,
    cpu=_cpu_sample_kl,
    cuda=_cuda_sample_kl,
)
_sample_kl_backward = register(
    "full_gaussian_sample_kl_backward(Tensor? grad_z, Tensor? grad_kl, Tensor mean, Tensor log_diagonal, "
    "Tensor lower, Tensor seed, SymInt? num_samples) -> (Tensor, Tensor, Tensor)",
    reference=reference_sample_kl_backward,
    fake=_fake_sample_kl_backward,
    cpu=_cpu_sample_kl_backward,
    cuda=_cuda_sample_kl_backward,
)


class _SampleKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, log_diagonal: Tensor, lower: Tensor, seed: Tensor,
                num_samples: int | None) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mean, log_diagonal, lower, seed)
        ctx.num_samples = num_samples
        return _sample_kl(mean, log_diagonal, lower, seed, num_samples)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = _sample_kl_backward(grad_z, grad_kl, *ctx.saved_tensors, ctx.num_samples)
        return *(g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=False)), None, None


# -------------------------------------------------------------------------------------------------- public
def full_gaussian_sample_kl(
    mean: Tensor,
    log_diagonal: Tensor,
    lower: Tensor,
    *,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample z ~ N(mean, L L^T) with gradients, and its KL divergence from N(0, I), in one pass over L.

    With `lower` = 0 and `log_diagonal` = log_var / 2 this is :func:`gaussian_sample_kl`, its noise included.

    Args:
        mean: posterior means, (..., latent), float32, float64, bfloat16 or float16; latent at most 1024.
        log_diagonal: log of L's diagonal, like `mean`; clamped to [-20, 20], no gradient outside.
        lower: L below its diagonal, row by row, (..., latent * (latent - 1) / 2), in `mean`'s dtype.
        num_samples: draw this many samples of each datum; None draws one and adds no dimension.
        generator: source of the seed, on the device of `mean`; torch's global one if None.
        seed: int64 tensor (1,) on the device of `mean` to use instead of drawing one.

    Returns:
        z, in `mean`'s dtype, (..., latent) or (num_samples, ..., latent); and the KL divergence in nats, summed over
        the latent dimensions, float32 (float64 for float64 input), (...).

    Raises:
        TypeError, ValueError: naming the argument whose type, shape or device is wrong.

    Source: Kingma & Welling 2019, "An introduction to variational autoencoders", section 2.5.1.
    """
    check_samples(num_samples)
    check_float("mean", mean)
    check_like("log_diagonal", log_diagonal, "mean", mean)
    if mean.dim() == 0 or mean.shape != log_diagonal.shape:
        raise ValueError(
            f"log_diagonal: expected the shape (..., latent) of mean, {tuple(mean.shape)}, "
            f"got {tuple(log_diagonal.shape)}"
        )
    if mean.shape[-1] > MAX_LATENT:
        raise ValueError(f"mean: expected at most {MAX_LATENT} latent dimensions, got {mean.shape[-1]}")
    _check_lower(lower, "mean", mean)
    return _SampleKL.apply(mean, log_diagonal, lower, seed_of(seed, generator, "mean", mean), num_samples)


def scale_tril(log_diagonal: Tensor, lower: Tensor) -> Tensor:
    """Return the Cholesky factor L of a full-covariance posterior, (..., latent, latent), with gradients.

    Args:
        log_diagonal: log of L's diagonal, (..., latent), float32, float64, bfloat16 or float16; clamped to [-20, 20],
            no gradient outside.
        lower: L below its diagonal, row by row, (..., latent * (latent - 1) / 2), in `log_diagonal`'s dtype.

    Raises:
        TypeError, ValueError: naming the argument whose type, shape or device is wrong.
    """
    check_float("log_diagonal", log_diagonal)
    if log_diagonal.dim() == 0:
        raise ValueError("log_diagonal: expected shape (..., latent), got ()")
    _check_lower(lower, "log_diagonal", log_diagonal)
    latent = log_diagonal.shape[-1]
    diagonal = log_diagonal.clamp(-LOG_DIAGONAL_LIMIT, LOG_DIAGONAL_LIMIT).exp()
    row = torch.arange(latent, device=lower.device)[:, None]
    column = row.T
    below = torch.where(column < row, row * (row - 1) // 2 + column, lower.shape[-1] + latent)
    numbers = torch.cat([lower, diagonal, torch.zeros_like(diagonal[..., :1])], -1)
    return numbers[..., torch.where(column == row, lower.shape[-1] + row, below)]


def _check_lower(lower: Tensor, other_name: str, other: Tensor) -> None:
    check_like("lower", lower, other_name, other)
    latent = other.shape[-1]
    expected = (*other.shape[:-1], latent * (latent - 1) // 2)
    if lower.shape != expected:
        raise ValueError(
            f"lower: expected shape (..., latent * (latent - 1) / 2) = {tuple(expected)}, got {tuple(lower.shape)}"
        )
