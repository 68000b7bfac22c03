"""Gaussian samples with their log density ratios in one pass, and the importance-weighted bound over the samples.

What: ``z_s = mean + exp(log_var / 2) * noise_s`` and ``log N(z_s; 0, I) - log q(z_s)`` for each of S samples; and
``logsumexp_s(log_likelihood_s + log_ratio_s) - log S``. The definitions are the references in
``fastvae/ops/importance.py``.

Why: the samples are S * N * D elements: forward they are written once, backward their gradient is read once, and the
noise is made again from the seed, about 60 instructions an element where D is a multiple of 4, twice that elsewhere.
Eager PyTorch passes some ten times over the samples each way, and keeps half of that for its backward pass.

How: forward, a program owns one sample of a tile of 512 elements; backward, a tile of mean and log_var, over all
samples in turn. The bound: a program owns 32 data, for which it goes over the samples 32 at a time, keeping the largest
log-weight and the sum above it; backward it goes over them twice.

Limits: float32, bfloat16 and float16 (float64 stays with the reference); contiguous operands. log_var is clamped to
[-40, 40] with no gradient outside, and z to [-1e15, 1e15] where the ratio squares it; NaN passes through everything; an
infinite bound has a gradient of 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.gaussian import clamp_log_var, limited, noise_tile, outside, row_tile, zero_beyond

_BLOCK = 32


def sample_forward(mean: Tensor, log_var: Tensor, seed: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """Sample z and compute log N(z; 0, I) - log q(z).

    Args:
        mean, log_var: (N, D), float32, bfloat16 or float16.
        seed: int64 (1,).
        num_samples: S.

    Returns:
        z (S, N, D) in `mean`'s dtype and the log ratio in nats, float32 (S, N).
    """
    _refuse_float64("mean", mean)
    rows, latent = mean.shape
    z = torch.empty((num_samples, rows, latent), dtype=mean.dtype, device=mean.device)
    if mean.numel() == 0:
        return z, torch.zeros((num_samples, rows), dtype=torch.float32, device=mean.device)
    log_ratio = torch.empty((num_samples, rows), dtype=torch.float32, device=mean.device)
    block_rows, block_latent = row_tile(latent)
    _importance_sample_kernel[(num_samples * triton.cdiv(rows, block_rows),)](
        mean, log_var, seed, z, log_ratio, rows, latent,
        QUADS=int(latent % 4 == 0), BLOCK_N=block_rows, BLOCK_D=block_latent, num_warps=4,
    )  # fmt: skip
    return z, log_ratio


def sample_backward(
    grad_z: Tensor, grad_log_ratio: Tensor, mean: Tensor, log_var: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`sample_forward` to mean and log_var, in their dtype; arguments as there.

    Args:
        grad_z: (S, N, D) in `mean`'s dtype.
        grad_log_ratio: float32 (S, N).
    """
    _refuse_float64("mean", mean)
    rows, latent = mean.shape
    grad_mean, grad_log_var = torch.empty_like(mean), torch.empty_like(log_var)
    if mean.numel() == 0:
        return grad_mean, grad_log_var
    block_rows, block_latent = row_tile(latent)
    _importance_sample_backward_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(latent, block_latent))](
        grad_z, grad_log_ratio, mean, log_var, seed, grad_mean, grad_log_var, rows, latent, grad_z.shape[0],
        QUADS=int(latent % 4 == 0), BLOCK_N=block_rows, BLOCK_D=block_latent, num_warps=4,
    )  # fmt: skip
    return grad_mean, grad_log_var


def bound_forward(log_likelihood: Tensor, log_ratio: Tensor) -> Tensor:
    """Importance-weighted bound of each datum.

    Args:
        log_likelihood, log_ratio: (S, N), float32, bfloat16 or float16, S at least 1.

    Returns:
        bound in nats, float32 (N,).
    """
    _refuse_float64("log_likelihood", log_likelihood)
    samples, rows = log_likelihood.shape
    bound = torch.empty(rows, dtype=torch.float32, device=log_likelihood.device)
    if rows > 0:
        _importance_bound_kernel[(triton.cdiv(rows, _BLOCK),)](
            log_likelihood, log_ratio, bound, samples, rows, BLOCK_S=_BLOCK, BLOCK_N=_BLOCK, num_warps=4
        )
    return bound


def bound_backward(grad_bound: Tensor, log_likelihood: Tensor, log_ratio: Tensor) -> Tensor:
    """Gradient of :func:`bound_forward`, the same for both of its arguments, in their dtype.

    Args:
        grad_bound: float32 (N,).
    """
    _refuse_float64("log_likelihood", log_likelihood)
    samples, rows = log_likelihood.shape
    grad = torch.empty_like(log_likelihood)
    if rows > 0:
        _importance_bound_backward_kernel[(triton.cdiv(rows, _BLOCK),)](
            grad_bound, log_likelihood, log_ratio, grad, samples, rows, BLOCK_S=_BLOCK, BLOCK_N=_BLOCK, num_warps=4
        )
    return grad


def _refuse_float64(name: str, tensor: Tensor) -> None:
    if tensor.dtype == torch.float64:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got torch.float64")


@triton.jit(do_not_specialize=["rows"])
def _importance_sample_kernel(
    mean_ptr,  # (N, D)
    log_var_ptr,  # (N, D)
    seed_ptr,  # (1,) int64
    z_ptr,  # (S, N, D)
    log_ratio_ptr,  # (S, N) float32
    rows,
    latent,
    QUADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_N)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    seed = tl.load(seed_ptr)
    offset = sample * rows * latent
    ratio = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, latent, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mask = (row < rows)[:, None] & (column < latent)[None, :]
        element = row[:, None] * latent + column[None, :]
        mean = tl.load(mean_ptr + element, mask=mask, other=0.0).to(tl.float32)
        log_var = clamp_log_var(tl.load(log_var_ptr + element, mask=mask, other=0.0).to(tl.float32))
        noise = noise_tile(seed, offset, row, start, element, latent, QUADS, BLOCK_D)
        z = mean + tl.exp(0.5 * log_var) * noise
        tl.store(z_ptr + offset + element, z.to(z_ptr.dtype.element_ty), mask=mask)
        distance = limited(z)
        ratio += tl.where(mask, 0.5 * (log_var + noise * noise - distance * distance), 0.0)
    tl.store(log_ratio_ptr + sample * rows + row, tl.sum(ratio, axis=1), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "num_samples"])
def _importance_sample_backward_kernel(
    grad_z_ptr,  # (S, N, D)
    grad_log_ratio_ptr,  # (S, N) float32
    mean_ptr,  # (N, D)
    log_var_ptr,  # (N, D)
    seed_ptr,  # (1,) int64
    grad_mean_ptr,  # (N, D)
    grad_log_var_ptr,  # (N, D)
    rows,
    latent,
    num_samples,
    QUADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_D
    column = start + tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (column < latent)[None, :]
    element = row[:, None] * latent + column[None, :]
    seed = tl.load(seed_ptr)
    mean = tl.load(mean_ptr + element, mask=mask, other=0.0).to(tl.float32)
    raw_log_var = tl.load(log_var_ptr + element, mask=mask, other=0.0).to(tl.float32)
    deviation = tl.exp(0.5 * clamp_log_var(raw_log_var))
    grad_mean = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_noise = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_ratio = tl.zeros((BLOCK_N,), tl.float32)
    offset, ratio_row = tl.zeros((), tl.int64), row
    for _ in range(num_samples):
        noise = noise_tile(seed, offset, row, start, element, latent, QUADS, BLOCK_D)
        grad_ratio = tl.load(grad_log_ratio_ptr + ratio_row, mask=row < rows, other=0.0)
        grad_z = tl.load(grad_z_ptr + offset + element, mask=mask, other=0.0).to(tl.float32)
        grad_z -= grad_ratio[:, None] * zero_beyond(mean + deviation * noise)
        grad_mean += grad_z
        sum_noise += grad_z * noise
        sum_ratio += grad_ratio
        offset += rows.to(tl.int64) * latent
        ratio_row += rows
    grad_log_var = 0.5 * (deviation * sum_noise + sum_ratio[:, None])
    grad_log_var = tl.where(outside(raw_log_var), 0.0, grad_log_var)
    tl.store(grad_mean_ptr + element, grad_mean.to(grad_mean_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_log_var_ptr + element, grad_log_var.to(grad_log_var_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _log_weights(log_likelihood_ptr, log_ratio_ptr, start, row, samples, rows, BLOCK_S: tl.constexpr):
    sample = start + tl.arange(0, BLOCK_S)
    mask = (sample < samples)[:, None] & (row < rows)[None, :]
    element = sample.to(tl.int64)[:, None] * rows + row[None, :]
    log_likelihood = tl.load(log_likelihood_ptr + element, mask=mask, other=float("-inf")).to(tl.float32)
    log_ratio = tl.load(log_ratio_ptr + element, mask=mask, other=0.0).to(tl.float32)
    return log_likelihood + log_ratio, element, mask


@triton.jit
def _shift(largest):
    # A number to subtract before the exponential: inf - inf would be NaN.
    return tl.where(tl.abs(largest) < float("inf"), largest, 0.0)


@triton.jit
def _largest_and_total(log_likelihood_ptr, log_ratio_ptr, row, samples, rows,
                       BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    # The largest log-weight of each datum, and the sum of exp(log_weight - _shift(largest)); NaN shows in the sum.
    largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, samples, BLOCK_S):
        x, _, _ = _log_weights(log_likelihood_ptr, log_ratio_ptr, start, row, samples, rows, BLOCK_S)
        before, largest = largest, tl.maximum(largest, tl.max(x, axis=0))
        shift = _shift(largest)
        total = total * tl.exp(before - shift) + tl.sum(tl.exp(x - shift[None, :]), axis=0)
    return largest, total


@triton.jit(do_not_specialize=["samples", "rows"])
def _importance_bound_kernel(
    log_likelihood_ptr,  # (S, N)
    log_ratio_ptr,  # (S, N)
    bound_ptr,  # (N,) float32
    samples,
    rows,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    largest, total = _largest_and_total(log_likelihood_ptr, log_ratio_ptr, row, samples, rows, BLOCK_S, BLOCK_N)
    bound = largest + (tl.log(total) - tl.log(samples.to(tl.float32)))
    bound = tl.where(tl.abs(largest) < float("inf"), bound, largest)
    tl.store(bound_ptr + row, tl.where(total != total, total, bound), mask=row < rows)


@triton.jit(do_not_specialize=["samples", "rows"])
def _importance_bound_backward_kernel(
    grad_bound_ptr,  # (N,) float32
    log_likelihood_ptr,  # (S, N)
    log_ratio_ptr,  # (S, N)
    grad_ptr,  # (S, N)
    samples,
    rows,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    largest, total = _largest_and_total(log_likelihood_ptr, log_ratio_ptr, row, samples, rows, BLOCK_S, BLOCK_N)
    grad_bound = tl.load(grad_bound_ptr + row, mask=row < rows, other=0.0)
    shift, undefined = _shift(largest), (tl.abs(largest) == float("inf")) & (total == total)
    for start in range(0, samples, BLOCK_S):
        x, element, mask = _log_weights(log_likelihood_ptr, log_ratio_ptr, start, row, samples, rows, BLOCK_S)
        share = tl.exp(x - shift[None, :]) * (grad_bound / total)[None, :]
        share = tl.where(undefined[None, :], 0.0, share)
        tl.store(grad_ptr + element, share.to(grad_ptr.dtype.element_ty), mask=mask)
