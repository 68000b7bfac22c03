"""Samples of a full-covariance Gaussian and their KL divergence from N(0, I), one pass forward and one backward.

What: ``z = mean + L noise`` for each of S samples, and the KL divergence per row; L has the diagonal exp(log_diagonal)
and, below it, ``lower``, row by row. The definition is the reference in ``fastvae/ops/full_gaussian.py``.

Why: T = D * (D - 1) / 2 numbers below the diagonal are read once forward, read and written once backward: 12 T bytes a
row in all, under one FLOP a byte. Eager PyTorch spreads them to a (D, D) matrix, and passes over that some five times
each way. The noise is made again from the seed.

How: a program owns rows whose square tiles of L hold about 1024 numbers, half of them masked: 4 rows of D = 16, one row
of D = 32 or 64, in registers for all samples. A larger D is gone through in tiles of 64 x 64: forward, the factor comes
from the cache for each sample; backward, every tile is a program of its own.

Limits: float32, bfloat16 and float16 (float64 stays with the reference); contiguous operands. log_diagonal is clamped
to [-20, 20] with no gradient outside, and in the KL's squares mean and lower to [-1e15, 1e15] likewise; NaN passes
through everything.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.gaussian import (
    clamp_log_var,
    exp_minus_one,
    exp_minus_one_minus_itself,
    limited,
    noise_tile,
    outside,
    zero_beyond,
)

_TILE = 1024
_MAX_BLOCK = 64


def sample_kl_forward(
    mean: Tensor, log_diagonal: Tensor, lower: Tensor, seed: Tensor, num_samples: int
) -> tuple[Tensor, Tensor]:
    """Sample z and compute its KL divergence from N(0, I).

    Args:
        mean, log_diagonal: (N, D), float32, bfloat16 or float16.
        lower: (N, D * (D - 1) / 2), in `mean`'s dtype.
        seed: int64 (1,).
        num_samples: S.

    Returns:
        z (S, N, D) in `mean`'s dtype and kl in nats, float32 (N,).
    """
    rows, latent = _shape(mean)
    z = torch.empty((num_samples, rows, latent), dtype=mean.dtype, device=mean.device)
    if mean.numel() == 0:
        return z, torch.zeros(rows, dtype=torch.float32, device=mean.device)
    kl = torch.empty(rows, dtype=torch.float32, device=mean.device)
    block_rows, block_latent = _block(latent)
    _full_gaussian_forward_kernel[(triton.cdiv(rows, block_rows),)](
        mean, log_diagonal, lower, seed, z, kl, rows, latent, num_samples,
        ONE_TILE=int(latent <= block_latent), QUADS=int(latent % 4 == 0),
        BLOCK_N=block_rows, BLOCK_D=block_latent, num_warps=4,
    )  # fmt: skip
    return z, kl


def sample_kl_backward(
    grad_z: Tensor, grad_kl: Tensor, mean: Tensor, log_diagonal: Tensor, lower: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`sample_kl_forward` to mean, log_diagonal and lower, in their dtype; arguments as there.

    Args:
        grad_z: (S, N, D) in `mean`'s dtype.
        grad_kl: float32 (N,).
    """
    rows, latent = _shape(mean)
    grad_mean, grad_log_diagonal, grad_lower = (torch.empty_like(t) for t in (mean, log_diagonal, lower))
    if mean.numel() == 0:
        return grad_mean, grad_log_diagonal, grad_lower
    block_rows, block_latent = _block(latent)
    tiles = triton.cdiv(latent, block_latent)
    _full_gaussian_backward_kernel[(triton.cdiv(rows, block_rows), tiles, tiles)](
        grad_z, grad_kl, mean, log_diagonal, lower, seed, grad_mean, grad_log_diagonal, grad_lower,
        rows, latent, grad_z.shape[0],
        QUADS=int(latent % 4 == 0), BLOCK_N=block_rows, BLOCK_D=block_latent, num_warps=4,
    )  # fmt: skip
    return grad_mean, grad_log_diagonal, grad_lower


def _shape(mean: Tensor) -> tuple[int, int]:
    if mean.dtype == torch.float64:
        raise TypeError("mean: expected float32, bfloat16 or float16, got torch.float64")
    return mean.shape[0], mean.shape[1]


def _block(latent: int) -> tuple[int, int]:
    block_latent = min(triton.next_power_of_2(latent), _MAX_BLOCK)
    return max(1, _TILE // max(block_latent * block_latent, 4 * block_latent)), block_latent


@triton.jit
def _load_lower(lower_ptr, row, i, j, rows, latent):
    # (N, I, J) of L below the diagonal, zeros elsewhere: row i of it begins at i * (i - 1) / 2.
    number, mask = _below(row, i, j, rows, latent)
    return tl.load(lower_ptr + number, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _below(row, i, j, rows, latent):
    first = row * (latent * (latent - 1) // 2)
    number = first[:, None, None] + ((i * (i - 1) // 2)[:, None] + j[None, :])[None, :, :]
    inside = (j[None, :] < i[:, None]) & (i < latent)[:, None]
    return number, (row < rows)[:, None, None] & inside[None, :, :]


@triton.jit(do_not_specialize=["rows", "num_samples"])
def _full_gaussian_forward_kernel(
    mean_ptr,  # (N, D)
    log_diagonal_ptr,  # (N, D)
    lower_ptr,  # (N, D * (D - 1) / 2)
    seed_ptr,  # (1,) int64
    z_ptr,  # (S, N, D)
    kl_ptr,  # (N,) float32
    rows,
    latent,
    num_samples,
    ONE_TILE: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    seed = tl.load(seed_ptr)
    sample_stride = rows.to(tl.int64) * latent
    kl = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, latent, BLOCK_D):
        i = start + tl.arange(0, BLOCK_D)
        mask = (row < rows)[:, None] & (i < latent)[None, :]
        element = row[:, None] * latent + i[None, :]
        # Masked elements read 0 everywhere, which gives them a KL of exactly 0.
        mean = tl.load(mean_ptr + element, mask=mask, other=0.0).to(tl.float32)
        log_var = clamp_log_var(2.0 * tl.load(log_diagonal_ptr + element, mask=mask, other=0.0).to(tl.float32))
        diagonal = tl.exp(0.5 * log_var)
        distance = limited(mean)
        kl += tl.sum(0.5 * (distance * distance + exp_minus_one_minus_itself(log_var)), axis=1)
        if ONE_TILE:
            lower = _load_lower(lower_ptr, row, i, i, rows, latent)
            tile = limited(lower)
            kl += 0.5 * tl.sum(tl.sum(tile * tile, axis=2), axis=1)
        else:
            for first in range(0, start + BLOCK_D, BLOCK_D):
                tile = limited(_load_lower(lower_ptr, row, i, first + tl.arange(0, BLOCK_D), rows, latent))
                kl += 0.5 * tl.sum(tl.sum(tile * tile, axis=2), axis=1)
        offset = tl.zeros((), tl.int64)
        for _ in range(num_samples):
            noise = noise_tile(seed, offset, row, start, element, latent, QUADS, BLOCK_D)
            z = mean + diagonal * noise
            if ONE_TILE:
                z += tl.sum(lower * noise[:, None, :], axis=2)
            else:
                for first in range(0, start + BLOCK_D, BLOCK_D):
                    j = first + tl.arange(0, BLOCK_D)
                    other = row[:, None] * latent + j[None, :]
                    noise = noise_tile(seed, offset, row, first, other, latent, QUADS, BLOCK_D)
                    z += tl.sum(_load_lower(lower_ptr, row, i, j, rows, latent) * noise[:, None, :], axis=2)
            tl.store(z_ptr + offset + element, z.to(z_ptr.dtype.element_ty), mask=mask)
            offset += sample_stride
    tl.store(kl_ptr + row, kl, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "num_samples"])
def _full_gaussian_backward_kernel(
    grad_z_ptr,  # (S, N, D)
    grad_kl_ptr,  # (N,) float32
    mean_ptr,  # (N, D)
    log_diagonal_ptr,  # (N, D)
    lower_ptr,  # (N, D * (D - 1) / 2)
    seed_ptr,  # (1,) int64
    grad_mean_ptr,  # (N, D)
    grad_log_diagonal_ptr,  # (N, D)
    grad_lower_ptr,  # (N, D * (D - 1) / 2)
    rows,
    latent,
    num_samples,
    QUADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start, first = tl.program_id(1) * BLOCK_D, tl.program_id(2) * BLOCK_D
    if first <= start:
        row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        i, j = start + tl.arange(0, BLOCK_D), first + tl.arange(0, BLOCK_D)
        mask = (row < rows)[:, None] & (i < latent)[None, :]
        element = row[:, None] * latent + i[None, :]
        other = row[:, None] * latent + j[None, :]
        seed = tl.load(seed_ptr)
        grad_kl = tl.load(grad_kl_ptr + row, mask=row < rows, other=0.0)
        grad_lower = grad_kl[:, None, None] * zero_beyond(_load_lower(lower_ptr, row, i, j, rows, latent))
        sum_z = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        sum_noise = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        offset = tl.zeros((), tl.int64)
        for _ in range(num_samples):
            noise = noise_tile(seed, offset, row, first, other, latent, QUADS, BLOCK_D)
            grad_z = tl.load(grad_z_ptr + offset + element, mask=mask, other=0.0).to(tl.float32)
            grad_lower += grad_z[:, :, None] * noise[:, None, :]
            sum_z += grad_z
            sum_noise += grad_z * noise  # of use on the diagonal, where both are of the same dimensions
            offset += rows.to(tl.int64) * latent
        number, below = _below(row, i, j, rows, latent)
        tl.store(grad_lower_ptr + number, grad_lower.to(grad_lower_ptr.dtype.element_ty), mask=below)
        if first == start:
            mean = tl.load(mean_ptr + element, mask=mask, other=0.0).to(tl.float32)
            raw = 2.0 * tl.load(log_diagonal_ptr + element, mask=mask, other=0.0).to(tl.float32)
            log_var = clamp_log_var(raw)
            grad_mean = sum_z + grad_kl[:, None] * zero_beyond(mean)
            change = tl.exp(0.5 * log_var) * sum_noise + grad_kl[:, None] * exp_minus_one(log_var)
            change = tl.where(outside(raw), 0.0, change)
            tl.store(grad_mean_ptr + element, grad_mean.to(grad_mean_ptr.dtype.element_ty), mask=mask)
            tl.store(grad_log_diagonal_ptr + element, change.to(grad_log_diagonal_ptr.dtype.element_ty), mask=mask)
