"""Importance-weighted bounds: samples with their log density ratios in one pass, and the bound over the samples.

    z_s = mean + exp(log_var / 2) * noise_s,    log_ratio_s = log p(z_s) - log q(z_s | x), p = N(0, I), in nats
        = sum_d 1/2 (log_var + noise_s^2 - z_s^2)
    bound = logsumexp_s(log_likelihood_s + log_ratio_s) - log S

The noise comes from :mod:`fastvae.ops.random` at element (s * N + n) * D + d and is made again in the backward pass,
where nothing as large as z is kept; ``log_var`` is clamped to [-40, 40], and z to [-1e15, 1e15] where the ratio squares
it, with no gradient outside. Source: Burda,
Grosse & Salakhutdinov 2016, "Importance weighted autoencoders", eq. 8.
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
from fastvae.ops.checks import check_float, check_like, check_samples
from fastvae.ops.gaussian import LOG_VAR_LIMIT, check_log_var, limited_square, noise_like, z_shape
from fastvae.ops.random import seed_of


# ------------------------------------------------------------------------------------------------ reference
def reference_sample(mean: Tensor, log_var: Tensor, seed: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """Eager definition of the samples. mean, log_var (..., D); z (S, ..., D), log_ratio (S, ...)."""
    compute = compute_dtype(mean)
    log_var_ = log_var.to(compute).clamp(-LOG_VAR_LIMIT, LOG_VAR_LIMIT)
    noise = noise_like(mean, seed, num_samples)
    z = mean.to(compute) + torch.exp(0.5 * log_var_) * noise
    return z.to(mean.dtype), 0.5 * (log_var_ + noise.square() - limited_square(z)).sum(-1)


def reference_sample_backward(
    grad_z: Tensor | None, grad_log_ratio: Tensor | None, mean: Tensor, log_var: Tensor, seed: Tensor, num_samples: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `reference_sample` by autograd."""
    with recording():
        m, lv = (t.detach().requires_grad_() for t in (mean, log_var))
        outputs = reference_sample(m, lv, seed, num_samples)
    grads = [torch.zeros_like(o) if g is None else g for o, g in zip(outputs, (grad_z, grad_log_ratio), strict=True)]
    grad_mean, grad_log_var = torch.autograd.grad(outputs, (m, lv), grads)
    return grad_mean, grad_log_var


def reference_bound(log_likelihood: Tensor, log_ratio: Tensor) -> Tensor:
    """Eager definition of the bound. log_likelihood, log_ratio (S, ...); bound (...)."""
    compute = compute_dtype(log_ratio)
    log_weight = log_likelihood.to(compute) + log_ratio.to(compute)
    return log_weight.logsumexp(0) - math.log(log_weight.shape[0])


def reference_bound_backward(grad: Tensor, log_likelihood: Tensor, log_ratio: Tensor) -> Tensor:
    """Gradient of `reference_bound`, the same for both inputs: the normalized weights, 0 where a bound is infinite."""
    log_weight = log_likelihood.to(grad.dtype) + log_ratio.to(grad.dtype)
    weight = torch.where(log_weight.logsumexp(0).isinf(), 0.0, log_weight.softmax(0))
    return (grad * weight).to(log_likelihood.dtype)


# ----------------------------------------------------------------------------------------------- C++ on CPU
def _cpu_sample(mean: Tensor, log_var: Tensor, seed: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    assert CORE is not None
    mean, log_var = mean.contiguous(), log_var.contiguous()
    z = large(empty(mean, z_shape(mean, num_samples)))
    log_ratio = large(empty(mean, z.shape[:-1], compute_dtype(mean)))
    CORE.log_ratio_forward(
        dtype_code(mean), pointer(mean), pointer(log_var), pointer(seed), pointer(z), pointer(log_ratio),
        num_samples, math.prod(mean.shape[:-1]), mean.shape[-1],
    )  # fmt: skip
    return z, log_ratio


def _cpu_sample_backward(
    grad_z: Tensor | None, grad_log_ratio: Tensor | None, mean: Tensor, log_var: Tensor, seed: Tensor, num_samples: int
) -> tuple[Tensor, Tensor]:
    assert CORE is not None
    mean, log_var = mean.contiguous(), log_var.contiguous()
    grad_z = None if grad_z is None else grad_z.contiguous()
    grad_log_ratio = None if grad_log_ratio is None else grad_log_ratio.contiguous()
    grad_mean, grad_log_var = torch.empty_like(mean), torch.empty_like(log_var)
    CORE.log_ratio_backward(
        dtype_code(mean), pointer(grad_z), pointer(grad_log_ratio), pointer(mean), pointer(log_var), pointer(seed),
        pointer(grad_mean), pointer(grad_log_var), num_samples, math.prod(mean.shape[:-1]), mean.shape[-1],
    )  # fmt: skip
    return grad_mean, grad_log_var


def _cpu_bound(log_likelihood: Tensor, log_ratio: Tensor) -> Tensor:
    assert CORE is not None
    log_likelihood, log_ratio = log_likelihood.contiguous(), log_ratio.contiguous()
    bound = empty(log_ratio, log_ratio.shape[1:], compute_dtype(log_ratio))
    CORE.importance_bound_forward(
        dtype_code(log_ratio), pointer(log_likelihood), pointer(log_ratio), pointer(bound), len(log_ratio),
        bound.numel(),
    )  # fmt: skip
    return bound


def _cpu_bound_backward(grad: Tensor, log_likelihood: Tensor, log_ratio: Tensor) -> Tensor:
    assert CORE is not None
    grad, log_likelihood, log_ratio = grad.contiguous(), log_likelihood.contiguous(), log_ratio.contiguous()
    shares = large(torch.empty_like(log_ratio))
    CORE.importance_bound_backward(
        dtype_code(log_ratio), pointer(grad), pointer(log_likelihood), pointer(log_ratio), pointer(shares),
        len(log_ratio), grad.numel(),
    )  # fmt: skip
    return shares


# -------------------------------------------------------------------------------------------- Triton on CUDA
_triton_sample = kernel("importance", "sample_forward")
_triton_sample_backward = kernel("importance", "sample_backward")
_triton_bound = kernel("importance", "bound_forward")
_triton_bound_backward = kernel("importance", "bound_backward")


def _cuda_sample(mean: Tensor, log_var: Tensor, seed: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    if mean.dtype == torch.float64:
        return reference_sample(mean, log_var, seed, num_samples)
    matrix = math.prod(mean.shape[:-1]), mean.shape[-1]
    z, log_ratio = _triton_sample(
        mean.reshape(matrix).contiguous(), log_var.reshape(matrix).contiguous(), seed, num_samples
    )
    shape = z_shape(mean, num_samples)
    return z.reshape(shape), log_ratio.reshape(shape[:-1])


def _cuda_sample_backward(
    grad_z: Tensor | None, grad_log_ratio: Tensor | None, mean: Tensor, log_var: Tensor, seed: Tensor, num_samples: int
) -> tuple[Tensor, Tensor]:
    if mean.dtype == torch.float64:
        return reference_sample_backward(grad_z, grad_log_ratio, mean, log_var, seed, num_samples)
    rows, latent = math.prod(mean.shape[:-1]), mean.shape[-1]
    if grad_z is None:
        grad_z = mean.new_zeros((num_samples, rows, latent))
    if grad_log_ratio is None:
        grad_log_ratio = mean.new_zeros((num_samples, rows), dtype=torch.float32)
    grads = _triton_sample_backward(
        grad_z.reshape(num_samples, rows, latent).contiguous(),
        grad_log_ratio.reshape(num_samples, rows).contiguous(),
        mean.reshape(rows, latent).contiguous(),
        log_var.reshape(rows, latent).contiguous(),
        seed,
    )
    return grads[0].reshape(mean.shape), grads[1].reshape(mean.shape)


def _cuda_bound(log_likelihood: Tensor, log_ratio: Tensor) -> Tensor:
    if log_ratio.dtype == torch.float64:
        return reference_bound(log_likelihood, log_ratio)
    return _triton_bound(_samples_by_data(log_likelihood), _samples_by_data(log_ratio)).reshape(log_ratio.shape[1:])


def _cuda_bound_backward(grad: Tensor, log_likelihood: Tensor, log_ratio: Tensor) -> Tensor:
    if log_ratio.dtype == torch.float64:
        return reference_bound_backward(grad, log_likelihood, log_ratio)
    flat = grad.reshape(-1).contiguous()
    return _triton_bound_backward(flat, _samples_by_data(log_likelihood), _samples_by_data(log_ratio)).reshape(
        log_ratio.shape
    )


def _samples_by_data(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:])).contiguous()


# ------------------------------------------------------------------------------------------ schema, autograd
def _fake_sample(mean: Tensor, log_var: Tensor, seed: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    z = z_shape(mean, num_samples)
    return mean.new_empty(z), mean.new_empty(z[:-1], dtype=compute_dtype(mean))


_sample = register(
    "gaussian_sample_log_ratio(Tensor mean, Tensor log_var, Tensor seed, SymInt num_samples) -> (Tensor, Tensor)",
    reference=reference_sample,
    fake=_fake_sample,
    cpu=_cpu_sample,
    cuda=_cuda_sample,
)
_sample_backward = register(
    "gaussian_sample_log_ratio_backward(Tensor? grad_z, Tensor? grad_log_ratio, Tensor mean, Tensor log_var, "
    "Tensor seed, SymInt num_samples) -> (Tensor, Tensor)",
    reference=reference_sample_backward,
    fake=lambda grad_z, grad_log_ratio, mean, *_: (mean.new_empty(mean.shape), mean.new_empty(mean.shape)),
    cpu=_cpu_sample_backward,
    cuda=_cuda_sample_backward,
)
_bound = register(
    "importance_weighted_bound(Tensor log_likelihood, Tensor log_ratio) -> Tensor",
    reference=reference_bound,
    fake=lambda log_likelihood, _: log_likelihood.new_empty(
        log_likelihood.shape[1:], dtype=compute_dtype(log_likelihood)
    ),
    cpu=_cpu_bound,
    cuda=_cuda_bound,
)
_bound_backward = register(
    "importance_weighted_bound_backward(Tensor grad, Tensor log_likelihood, Tensor log_ratio) -> Tensor",
    reference=reference_bound_backward,
    fake=lambda grad, log_likelihood, _: log_likelihood.new_empty(log_likelihood.shape),
    cpu=_cpu_bound_backward,
    cuda=_cuda_bound_backward,
)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, log_var: Tensor, seed: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mean, log_var, seed)
        ctx.num_samples = num_samples
        return _sample(mean, log_var, seed, num_samples)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_z: Tensor | None, grad_log_ratio: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = _sample_backward(grad_z, grad_log_ratio, *ctx.saved_tensors, ctx.num_samples)
        return *(g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=False)), None, None


class _Bound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_likelihood: Tensor, log_ratio: Tensor) -> Tensor:
        ctx.save_for_backward(log_likelihood, log_ratio)
        return _bound(log_likelihood, log_ratio)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = _bound_backward(grad, *ctx.saved_tensors)
        return tuple(weight if needed else None for needed in ctx.needs_input_grad)


# -------------------------------------------------------------------------------------------------- public
def gaussian_sample_log_ratio(
    mean: Tensor,
    log_var: Tensor,
    num_samples: int,
    *,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample z ~ q = N(mean, exp(log_var)) with gradients, and log N(z; 0, I) - log q(z) of each sample, in one pass.

    For the same seed the samples are those of :func:`gaussian_sample_kl`, whose KL is the mean of minus the ratio.

    Args:
        mean: posterior means, (..., latent), float32, float64, bfloat16 or float16.
        log_var: log of the posterior variances, like `mean`; clamped to [-40, 40], no gradient outside.
        num_samples: samples of each datum.
        generator: source of the seed, on the device of `mean`; torch's global one if None.
        seed: int64 tensor (1,) on the device of `mean` to use instead of drawing one.

    Returns:
        z, in `mean`'s dtype, (num_samples, ..., latent); and the log ratio in nats, summed over the latent dimensions,
        float32 (float64 for float64 input), (num_samples, ...).

    Raises:
        TypeError, ValueError: naming the argument whose type, shape or device is wrong.

    Source: Burda, Grosse & Salakhutdinov 2016, "Importance weighted autoencoders".
    """
    check_samples(num_samples, required=True)
    check_log_var(mean, log_var)
    return _Sample.apply(mean, log_var, seed_of(seed, generator, "mean", mean), num_samples)


def importance_weighted_bound(log_likelihood: Tensor, log_ratio: Tensor) -> Tensor:
    """Bound log p(x) from below by S samples: log 1/S sum_s p(x|z_s) p(z_s) / q(z_s|x), in nats, with gradients.

    The gradient of each sample is its normalized weight. Where the bound is infinite (all samples -inf, or one +inf)
    the weights are undefined and the gradient is 0; NaN in a datum's samples gives NaN.

    Args:
        log_likelihood: log p(x|z_s) in nats, (S, ...), float32, float64, bfloat16 or float16, S at least 1.
        log_ratio: log p(z_s) - log q(z_s|x) in nats, like `log_likelihood`.

    Returns:
        The bound of each datum, float32 (float64 for float64 input), (...).

    Raises:
        TypeError, ValueError: naming the argument whose type, shape or device is wrong.

    Source: Burda, Grosse & Salakhutdinov 2016, "Importance weighted autoencoders", eq. 8.
    """
    check_float("log_likelihood", log_likelihood)
    check_like("log_ratio", log_ratio, "log_likelihood", log_likelihood)
    if log_likelihood.dim() == 0 or log_likelihood.shape[0] == 0:
        raise ValueError(
            f"log_likelihood: expected shape (S, ...) with S at least 1, got {tuple(log_likelihood.shape)}"
        )
    if log_ratio.shape != log_likelihood.shape:
        raise ValueError(
            f"log_ratio: expected the shape (S, ...) of log_likelihood, {tuple(log_likelihood.shape)}, "
            f"got {tuple(log_ratio.shape)}"
        )
    return _Bound.apply(log_likelihood, log_ratio)
