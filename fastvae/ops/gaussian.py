"""Reparameterized Gaussian sampling and its KL divergence in one pass.

    z = mean + exp(log_var / 2) * noise,    KL(N(mean, var) || N(prior_mean, prior_var)) in nats

The noise comes from :mod:`fastvae.ops.random` at element (s * N + n) * D + d and is made again in the backward
pass. ``log_var`` and ``prior_log_var`` are clamped to [-40, 40]: every exponential then stays finite in float32, and
the gradient is zero outside. Likewise the distance that the KL squares, (mean - prior_mean) / prior_std, is clamped to
[-1e15, 1e15], so that millions of squares add up to a finite number. Source: Kingma & Welling 2014, eq. 10 and
appendix B.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastvae.ops.backend import (
    CORE,
    compute_dtype,
    dtype_code,
    empty,
    first_order,
    kernel,
    large,
    pointer,
    recording,
    register,
)
from fastvae.ops.checks import check_broadcast, check_choice, check_float, check_like, check_samples
from fastvae.ops.random import normal, seed_of

LOG_VAR_LIMIT = 40.0
DISTANCE_LIMIT = 1e15


# ------------------------------------------------------------------------------------------------ reference
def reference_sample_kl(
    mean: Tensor,
    log_var: Tensor,
    prior_mean: Tensor | None,
    prior_log_var: Tensor | None,
    seed: Tensor,
    num_samples: int | None,
    sum_latent: bool,
) -> tuple[Tensor, Tensor]:
    """Eager definition. mean, log_var (..., D), prior (D,) or (..., D); z (..., D), or (S, ..., D) with num_samples."""
    compute = compute_dtype(mean)
    mean_, log_var_ = mean.to(compute), log_var.to(compute).clamp(-LOG_VAR_LIMIT, LOG_VAR_LIMIT)
    z = mean_ + torch.exp(0.5 * log_var_) * noise_like(mean, seed, num_samples)
    if prior_mean is None or prior_log_var is None:
        kl = 0.5 * (limited_square(mean_) + torch.expm1(log_var_) - log_var_)
    else:
        prior_log_var_ = prior_log_var.to(compute).clamp(-LOG_VAR_LIMIT, LOG_VAR_LIMIT)
        ratio, distance = log_var_ - prior_log_var_, mean_ - prior_mean.to(compute)
        kl = 0.5 * (limited_square(distance, torch.exp(-prior_log_var_)) + torch.expm1(ratio) - ratio)
    return z.to(mean.dtype), kl.sum(-1) if sum_latent else kl


def reference_sample_kl_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mean: Tensor,
    log_var: Tensor,
    prior_mean: Tensor | None,
    prior_log_var: Tensor | None,
    seed: Tensor,
    num_samples: int | None,
    sum_latent: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `reference_sample_kl` by autograd; those of an absent prior have no elements."""
    with recording():
        m, lv, pm, plv = (
            None if t is None else t.detach().requires_grad_() for t in (mean, log_var, prior_mean, prior_log_var)
        )
        assert m is not None
        assert lv is not None
        outputs = reference_sample_kl(m, lv, pm, plv, seed, num_samples, sum_latent)
    inputs = [t for t in (m, lv, pm, plv) if t is not None]
    pairs = [(o, g) for o, g in zip(outputs, (grad_z, grad_kl), strict=True) if g is not None]
    grads = torch.autograd.grad(
        [o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    prior = _no_prior(mean) if prior_mean is None else (grads[2], grads[3])
    return grads[0], grads[1], *prior


def limited_square(distance: Tensor, precision: Tensor | float = 1.0) -> Tensor:
    """Square of `distance` times `precision`, at most 1e30 and with no gradient beyond; NaN stays, there too."""
    beyond = distance * (distance * precision) > DISTANCE_LIMIT**2
    distance = distance.masked_fill(beyond, 0)
    return (distance * (distance * precision)).masked_fill(beyond, DISTANCE_LIMIT**2)


def z_shape(mean: Tensor, num_samples: int | None) -> tuple[int, ...]:
    """Shape of the samples: that of `mean`, or (S, ..., D) with num_samples."""
    return tuple(mean.shape) if num_samples is None else (num_samples, *mean.shape)


def noise_like(mean: Tensor, seed: Tensor, num_samples: int | None) -> Tensor:
    """Standard normal noise of the samples, in the dtype `mean` is computed in."""
    shape = z_shape(mean, num_samples)
    offsets = torch.arange(math.prod(shape), device=mean.device).reshape(shape)
    return normal(seed, offsets).to(compute_dtype(mean))


# ----------------------------------------------------------------------------------------------- C++ on CPU
def cpu_sample_kl(
    mean: Tensor,
    log_var: Tensor,
    prior_mean: Tensor | None,
    prior_log_var: Tensor | None,
    seed: Tensor,
    num_samples: int | None,
    sum_latent: bool,
) -> tuple[Tensor, Tensor]:
    """`reference_sample_kl` by the C++ core."""
    assert CORE is not None
    mean, log_var, stride = _rows_apart(mean, log_var)
    samples = 1 if num_samples is None else num_samples
    rows, latent = _rows(mean)
    z = large(empty(mean, z_shape(mean, num_samples)))
    kl = large(empty(mean, mean.shape[:-1] if sum_latent else mean.shape, compute_dtype(mean)))
    prior_rows = 0
    if prior_mean is not None and prior_log_var is not None:
        prior_mean, prior_log_var = prior_mean.contiguous(), prior_log_var.contiguous()
        prior_rows = _prior_rows(prior_mean, rows)
    CORE.gaussian_forward(
        dtype_code(mean), pointer(mean), pointer(log_var), stride, pointer(prior_mean), pointer(prior_log_var),
        prior_rows, pointer(seed), pointer(z), pointer(kl), samples, rows, latent, sum_latent,
    )  # fmt: skip
    return z, kl


def _cpu_sample_kl_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mean: Tensor,
    log_var: Tensor,
    prior_mean: Tensor | None,
    prior_log_var: Tensor | None,
    seed: Tensor,
    num_samples: int | None,
    sum_latent: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert CORE is not None
    mean, log_var, stride = _rows_apart(mean, log_var)
    grad_z = None if grad_z is None else grad_z.contiguous()
    grad_kl = None if grad_kl is None else grad_kl.contiguous()
    samples = 1 if num_samples is None else num_samples
    rows, latent = _rows(mean)
    grad_mean, grad_log_var = (large(empty(mean, mean.shape)) for _ in range(2))
    prior_rows, grad_prior, partials = 0, None, 0
    if prior_mean is not None and prior_log_var is not None:
        prior_mean, prior_log_var = prior_mean.contiguous(), prior_log_var.contiguous()
        prior_rows = _prior_rows(prior_mean, rows)
        # A prior shared by all rows gets one partial sum per thread, added up in a fixed order below.
        partials = torch.get_num_threads() if prior_rows == 1 else rows
        grad_prior = prior_mean.new_zeros((2, partials, latent))
    CORE.gaussian_backward(
        dtype_code(mean), pointer(grad_z), pointer(grad_kl), pointer(mean), pointer(log_var), stride,
        pointer(prior_mean), pointer(prior_log_var), prior_rows, pointer(seed), pointer(grad_mean),
        pointer(grad_log_var), latent, pointer(grad_prior), partials, samples, rows, latent, sum_latent,
    )  # fmt: skip
    if grad_prior is None or prior_mean is None:
        return grad_mean, grad_log_var, *_no_prior(mean)
    if prior_rows == 1:
        grad_prior = grad_prior.sum(1)
    shape = prior_mean.shape
    return grad_mean, grad_log_var, grad_prior[0].reshape(shape).clone(), grad_prior[1].reshape(shape).clone()


def _rows_apart(mean: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor, int]:
    # The halves of one layer's output need no copies: dense rows, evenly apart.
    stride = mean.stride(-2) if mean.dim() > 1 else mean.shape[-1]
    even = mean.stride() == log_var.stride() and mean.stride(-1) == 1 and mean.numel() > 0 and stride >= mean.shape[-1]
    if even and all(mean.stride(i) == mean.stride(i + 1) * mean.shape[i + 1] for i in range(mean.dim() - 2)):
        return mean, log_var, stride
    return mean.contiguous(), log_var.contiguous(), mean.shape[-1]


def _prior_rows(prior_mean: Tensor, rows: int) -> int:
    return 1 if prior_mean.dim() == 1 else rows


def _no_prior(mean: Tensor) -> tuple[Tensor, Tensor]:
    # An op cannot return None: the gradients of an absent prior have no elements.
    dtype = compute_dtype(mean)
    return mean.new_empty(0, dtype=dtype), mean.new_empty(0, dtype=dtype)


def _rows(tensor: Tensor) -> tuple[int, int]:
    return math.prod(tensor.shape[:-1]), tensor.shape[-1]


# -------------------------------------------------------------------------------------------- Triton on CUDA
_triton_forward = kernel("gaussian", "sample_kl_forward")
_triton_backward = kernel("gaussian", "sample_kl_backward")


def cuda_sample_kl(
    mean: Tensor,
    log_var: Tensor,
    prior_mean: Tensor | None,
    prior_log_var: Tensor | None,
    seed: Tensor,
    num_samples: int | None,
    sum_latent: bool,
) -> tuple[Tensor, Tensor]:
    """`reference_sample_kl` by the Triton kernel, or by itself in float64."""
    if mean.dtype == torch.float64:
        return reference_sample_kl(mean, log_var, prior_mean, prior_log_var, seed, num_samples, sum_latent)
    matrix, samples = _rows(mean), 1 if num_samples is None else num_samples
    prior = [None if p is None else p.reshape(-1, matrix[1]) for p in (prior_mean, prior_log_var)]
    z, kl = _triton_forward(
        mean.reshape(matrix).contiguous(), log_var.reshape(matrix).contiguous(), *prior, seed, samples, sum_latent
    )
    return z.reshape(z_shape(mean, num_samples)), kl.reshape(mean.shape[:-1] if sum_latent else mean.shape)


def cuda_sample_kl_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mean: Tensor,
    log_var: Tensor,
    prior_mean: Tensor | None,
    prior_log_var: Tensor | None,
    seed: Tensor,
    num_samples: int | None,
    sum_latent: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference_sample_kl_backward` by the Triton kernel, or by itself in float64."""
    if mean.dtype == torch.float64:
        return reference_sample_kl_backward(
            grad_z, grad_kl, mean, log_var, prior_mean, prior_log_var, seed, num_samples, sum_latent
        )
    rows, latent = _rows(mean)
    samples = 1 if num_samples is None else num_samples
    if grad_z is None:
        grad_z = mean.new_zeros((samples, rows, latent))
    if grad_kl is None:
        grad_kl = mean.new_zeros((rows,) if sum_latent else (rows, latent), dtype=torch.float32)
    prior = [None if p is None else p.reshape(-1, latent) for p in (prior_mean, prior_log_var)]
    grads = _triton_backward(
        grad_z.reshape(samples, rows, latent).contiguous(),
        grad_kl.reshape((rows,) if sum_latent else (rows, latent)).contiguous(),
        mean.reshape(rows, latent).contiguous(),
        log_var.reshape(rows, latent).contiguous(),
        *prior,
        seed,
        sum_latent,
    )
    grad_mean, grad_log_var = grads[0].reshape(mean.shape), grads[1].reshape(mean.shape)
    if prior_mean is None:
        return grad_mean, grad_log_var, *_no_prior(mean)
    return grad_mean, grad_log_var, grads[2].reshape(prior_mean.shape), grads[3].reshape(prior_mean.shape)


# ------------------------------------------------------------------------------------------ schema, autograd
def _fake_sample_kl(mean: Tensor, log_var: Tensor, prior_mean: Any, prior_log_var: Any, seed: Tensor,
                    num_samples: int | None, sum_latent: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    kl_shape = mean.shape[:-1] if sum_latent else mean.shape
    return mean.new_empty(z_shape(mean, num_samples)), mean.new_empty(kl_shape, dtype=compute_dtype(mean))


def _fake_sample_kl_backward(grad_z: Any, grad_kl: Any, mean: Tensor, log_var: Tensor, prior_mean: Tensor | None,
                             prior_log_var: Tensor | None, seed: Tensor, num_samples: int | None,
                             sum_latent: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = mean.new_empty(mean.shape), mean.new_empty(mean.shape)
    if prior_mean is None:
        return *grads, *_no_prior(mean)
    return *grads, prior_mean.new_empty(prior_mean.shape), prior_mean.new_empty(prior_mean.shape)


_sample_kl = register(
    "gaussian_sample_kl(Tensor mean, Tensor log_var, Tensor? prior_mean, Tensor? prior_log_var, Tensor seed, "
    "SymInt? num_samples, bool sum_latent) -> (Tensor, Tensor)",
    reference=reference_sample_kl,
    fake=_fake_sample_kl,
    cpu=cpu_sample_kl,
    cuda=cuda_sample_kl,
)
_sample_kl_backward = register(
    "gaussian_sample_kl_backward(Tensor? grad_z, Tensor? grad_kl, Tensor mean, Tensor log_var, "
    "Tensor? prior_mean, Tensor? prior_log_var, Tensor seed, SymInt? num_samples, bool sum_latent) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference_sample_kl_backward,
    fake=_fake_sample_kl_backward,
    cpu=_cpu_sample_kl_backward,
    cuda=cuda_sample_kl_backward,
)


class _SampleKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, log_var: Tensor, prior_mean: Tensor | None, prior_log_var: Tensor | None,
                seed: Tensor, num_samples: int | None, sum_latent: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mean, log_var, prior_mean, prior_log_var, seed)
        ctx.num_samples, ctx.sum_latent = num_samples, sum_latent
        return _sample_kl(mean, log_var, prior_mean, prior_log_var, seed, num_samples, sum_latent)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = _sample_kl_backward(grad_z, grad_kl, *ctx.saved_tensors, ctx.num_samples, ctx.sum_latent)
        return *(g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=False)), None, None, None


# -------------------------------------------------------------------------------------------------- public
def gaussian_sample_kl(
    mean: Tensor,
    log_var: Tensor,
    *,
    prior_mean: Tensor | None = None,
    prior_log_var: Tensor | None = None,
    num_samples: int | None = None,
    reduction: str = "sum",
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample z ~ N(mean, exp(log_var)) with gradients, and its KL divergence from the prior, in one pass.

    Args:
        mean: posterior means, (..., latent), float32, float64, bfloat16 or float16. The KL takes a distance from the
            prior's mean as at most 1e15 of its standard deviations, with no gradient beyond: it is finite.
        log_var: log of the posterior variances, like `mean`; clamped to [-40, 40].
        prior_mean: prior means, broadcastable to `mean`; 0 if None.
        prior_log_var: log of the prior variances, broadcastable to `mean`, clamped likewise; 0 if None.
        num_samples: draw this many samples of each datum; None draws one and adds no dimension.
        reduction: "sum" adds the KL over the latent dimension, "none" keeps it per dimension.
        generator: source of the seed, on the device of `mean`; torch's global one if None.
        seed: int64 tensor (1,) on the device of `mean` to use instead of drawing one.

    Returns:
        z, in `mean`'s dtype, (..., latent) or (num_samples, ..., latent); and the KL divergence in nats, float32
        (float64 for float64 input), (...) or (..., latent) for "none".

    Raises:
        TypeError, ValueError: naming the argument whose type, shape or device is wrong.

    Source: Kingma & Welling 2014, "Auto-encoding variational Bayes".
    """
    check_samples(num_samples)
    prior_mean, prior_log_var = _check(mean, log_var, prior_mean, prior_log_var, reduction)
    seed = seed_of(seed, generator, "mean", mean)
    return _SampleKL.apply(mean, log_var, prior_mean, prior_log_var, seed, num_samples, reduction == "sum")


def gaussian_kl(
    mean: Tensor,
    log_var: Tensor,
    *,
    prior_mean: Tensor | None = None,
    prior_log_var: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:
    """KL divergence of N(mean, exp(log_var)) from the prior, in nats.

    Arguments, result and errors as for :func:`gaussian_sample_kl`.
    """
    prior_mean, prior_log_var = _check(mean, log_var, prior_mean, prior_log_var, reduction)
    seed = torch.zeros(1, dtype=torch.int64, device=mean.device)
    return _SampleKL.apply(mean, log_var, prior_mean, prior_log_var, seed, 0, reduction == "sum")[1]


def check_log_var(mean: Tensor, log_var: Tensor) -> None:
    """Raise unless `mean` and `log_var` are (..., latent) alike."""
    check_float("mean", mean)
    check_like("log_var", log_var, "mean", mean)
    if mean.dim() == 0 or mean.shape != log_var.shape:
        raise ValueError(
            f"log_var: expected the shape (..., latent) of mean, {tuple(mean.shape)}, got {tuple(log_var.shape)}"
        )


def _check(mean: Tensor, log_var: Tensor, prior_mean: Tensor | None, prior_log_var: Tensor | None,
           reduction: str) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    check_log_var(mean, log_var)
    check_choice("reduction", reduction, ("sum", "none"))
    if prior_mean is None and prior_log_var is None:
        return None, None
    prior = []
    for name, tensor in (("prior_mean", prior_mean), ("prior_log_var", prior_log_var)):
        if tensor is None:
            tensor = mean.new_zeros((), dtype=compute_dtype(mean))
        check_broadcast(name, tensor, "mean", mean)
        prior.append(tensor.to(compute_dtype(mean)))
    # A prior without batch dimensions stays one row, so that its gradient is summed inside the kernel.
    shared = all(math.prod(tensor.shape[:-1]) == 1 for tensor in prior)
    shape = mean.shape[-1:] if shared else mean.shape
    return tuple(
        tensor.reshape(tensor.shape[-1:]).expand(shape) if shared else tensor.expand(shape) for tensor in prior
    )  # type: ignore[return-value]
