"""Reparameterized Gaussian samples and their KL divergence, one pass forward and one backward.

What: ``z = mean + exp(log_var / 2) * noise`` for each of S samples and ``KL(N(mean, var) || prior)`` per row
or per dimension; the definition is the reference in ``fastvae/ops/gaussian.py``. The sum over the latent is
taken in registers.

Why: eager PyTorch moves about 10 tensors of N*D elements forward and as many backward. These kernels read
mean and log_var and write z (3 * N*D elements, S = 1), and backward read 3 and write 2; noise is made again
from the seed, about 60 instructions an element where D is a multiple of 4, twice that elsewhere.

How: a program owns a tile of 512 elements (16 bytes a thread in float32), hence many small programs: 8 at
(128, 32), 512 at (4096, 64), 16384 at (65536, 128). A latent above 512 is looped over forward and is a second
grid axis backward. The gradient of a prior shared by all rows is summed in registers over a strided set of
row tiles, then over the programs by ``torch.sum``: no atomics, so a given seed and shape always give the same
bits.

Limits: float32, bfloat16 and float16 (float64 stays with the reference); contiguous operands; the prior is
float32. log_var is clamped to [-40, 40] with no gradient outside, and so is the distance that the KL squares, to 1e15
of the prior's standard deviations; NaN passes through everything.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.random import normal, normals_of_counters

_TILE = 512
_MAX_PARTIAL_SUMS = 1024


def sample_kl_forward(
    mean: Tensor,
    log_var: Tensor,
    prior_mean: Tensor | None,
    prior_log_var: Tensor | None,
    seed: Tensor,
    num_samples: int,
    sum_latent: bool,
) -> tuple[Tensor, Tensor]:
    """Sample z and compute its KL divergence from the prior.

    Args:
        mean, log_var: (N, D), float32, bfloat16 or float16.
        prior_mean, prior_log_var: float32 (1, D) or (N, D), or None for N(0, I).
        seed: int64 (1,).
        num_samples: S; 0 computes the KL alone.
        sum_latent: whether the KL is summed over D.

    Returns:
        z (S, N, D) in `mean`'s dtype and kl in nats, float32 (N,) or (N, D).
    """
    rows, latent = mean.shape
    z = torch.empty((num_samples, rows, latent), dtype=mean.dtype, device=mean.device)
    kl_shape = (rows,) if sum_latent else (rows, latent)
    if mean.numel() == 0:
        return z, torch.zeros(kl_shape, dtype=torch.float32, device=mean.device)
    kl = torch.empty(kl_shape, dtype=torch.float32, device=mean.device)
    prior, prior_log, prior_stride = _prior(prior_mean, prior_log_var, mean)
    block_rows, block_latent = row_tile(latent)
    _gaussian_forward_kernel[(triton.cdiv(rows, block_rows),)](
        mean, log_var, prior, prior_log, seed, z, kl,
        rows, latent, prior_stride, num_samples,
        HAS_PRIOR=int(prior_mean is not None), SUM_LATENT=int(sum_latent),
        QUADS=int(latent % 4 == 0), BLOCK_N=block_rows, BLOCK_D=block_latent, num_warps=4,
    )  # fmt: skip
    return z, kl


def sample_kl_backward(
    grad_z: Tensor,
    grad_kl: Tensor,
    mean: Tensor,
    log_var: Tensor,
    prior_mean: Tensor | None,
    prior_log_var: Tensor | None,
    seed: Tensor,
    sum_latent: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of :func:`sample_kl_forward`; arguments as there.

    Args:
        grad_z: (S, N, D) in `mean`'s dtype.
        grad_kl: float32 (N,) or (N, D).

    Returns:
        Gradients of mean and log_var in their dtype, and of the prior in float32, None without one.
    """
    rows, latent = mean.shape
    grad_mean, grad_log_var = torch.empty_like(mean), torch.empty_like(log_var)
    if mean.numel() == 0:
        zeros = [None if p is None else torch.zeros_like(p) for p in (prior_mean, prior_log_var)]
        return grad_mean, grad_log_var, zeros[0], zeros[1]
    block_rows, block_latent = row_tile(latent)
    programs = triton.cdiv(rows, block_rows)
    shared_prior = prior_mean is not None and prior_mean.shape[0] == 1
    if shared_prior:
        programs = min(programs, _MAX_PARTIAL_SUMS)
    # Without a prior nothing is written here; the kernel still wants a pointer.
    grad_prior = grad_mean
    if prior_mean is not None:
        grad_prior_rows = programs if shared_prior else rows
        grad_prior = torch.empty((2, grad_prior_rows, latent), dtype=torch.float32, device=mean.device)
    prior, prior_log, prior_stride = _prior(prior_mean, prior_log_var, mean)
    _gaussian_backward_kernel[(programs, triton.cdiv(latent, block_latent))](
        grad_z, grad_kl, mean, log_var, prior, prior_log, seed, grad_mean, grad_log_var, grad_prior,
        rows, latent, prior_stride, grad_z.shape[0],
        HAS_PRIOR=int(prior_mean is not None), SHARED_PRIOR=int(shared_prior), SUM_LATENT=int(sum_latent),
        QUADS=int(latent % 4 == 0), BLOCK_N=block_rows, BLOCK_D=block_latent, num_warps=4,
    )  # fmt: skip
    if prior_mean is None:
        return grad_mean, grad_log_var, None, None
    if shared_prior:
        grad_prior = grad_prior.sum(1, keepdim=True)
    return grad_mean, grad_log_var, grad_prior[0], grad_prior[1]


def row_tile(latent: int) -> tuple[int, int]:
    """Rows and columns of a program's tile."""
    block_latent = min(triton.next_power_of_2(latent), _TILE)
    return _TILE // block_latent, block_latent


def _prior(prior_mean: Tensor | None, prior_log_var: Tensor | None, mean: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the prior's tensors and row stride (0: one row for all), or stand-ins the kernel never reads."""
    if mean.dtype == torch.float64:
        raise TypeError("mean: expected float32, bfloat16 or float16, got torch.float64")
    if prior_mean is None or prior_log_var is None:
        return mean, mean, 0
    stride = 0 if prior_mean.shape[0] == 1 else mean.shape[1]
    return prior_mean.contiguous(), prior_log_var.contiguous(), stride


# exp(x) - 1 loses its digits near 0, where a divergence is small: Taylor series to x^10 there, 1e-8 relative.
@triton.jit
def _half_square_series(x):
    series = 1.0 + x * (1.0 / 10.0)
    for i in tl.static_range(7):
        series = 1.0 + x * (1.0 / (9 - i)) * series
    return 0.5 * x * x * series


@triton.jit
def exp_minus_one(x):
    """Return exp(x) - 1 with the digits of a small x."""
    return tl.where(tl.abs(x) < 0.7, x + _half_square_series(x), tl.exp(x) - 1.0)


@triton.jit
def exp_minus_one_minus_itself(x):
    """Return exp(x) - 1 - x with the digits of a small x."""
    return tl.where(tl.abs(x) < 0.7, _half_square_series(x), tl.exp(x) - 1.0 - x)


@triton.jit
def clamp_log_var(log_var):
    """Return `log_var` within [-40, 40]."""
    # Comparisons with NaN are false, so NaN stays; tl.minimum and tl.maximum would drop it.
    return tl.where(log_var > 40.0, 40.0, tl.where(log_var < -40.0, -40.0, log_var))


@triton.jit
def outside(log_var):
    """Tell where :func:`clamp_log_var` changes `log_var`, which then has no gradient."""
    return (log_var > 40.0) | (log_var < -40.0)


@triton.jit
def limited(distance):
    """Return `distance` within [-1e15, 1e15]: millions of its squares then add up in float32."""
    return tl.where(distance > 1e15, 1e15, tl.where(distance < -1e15, -1e15, distance))


@triton.jit
def zero_beyond(distance):
    """Return `distance`, or 0 where :func:`limited` changes it, which then has no gradient."""
    return tl.where(tl.abs(distance) > 1e15, 0.0, distance)


@triton.jit
def noise_tile(seed, offset, row, start, element, latent, QUADS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the noise of a tile: `element`s (N, D) from column `start` on, of the sample that begins at `offset`."""
    # Where rows are made of whole counters, each is computed once for its four elements.
    if QUADS:
        counter = row[:, None] * (latent // 4) + (start // 4 + tl.arange(0, BLOCK_D // 4))[None, :]
        return normals_of_counters(seed, offset // 4 + counter)
    else:
        return normal(seed, offset + element)


@triton.jit(do_not_specialize=["rows", "num_samples"])
def _gaussian_forward_kernel(
    mean_ptr,  # (N, D)
    log_var_ptr,  # (N, D)
    prior_mean_ptr,  # (1 or N, D) float32
    prior_log_var_ptr,  # (1 or N, D) float32
    seed_ptr,  # (1,) int64
    z_ptr,  # (S, N, D)
    kl_ptr,  # (N,) or (N, D) float32
    rows,
    latent,
    prior_stride,
    num_samples,
    HAS_PRIOR: tl.constexpr,
    SUM_LATENT: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    seed = tl.load(seed_ptr)
    sample_stride = rows.to(tl.int64) * latent
    kl_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, latent, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mask = (row < rows)[:, None] & (column < latent)[None, :]
        element = row[:, None] * latent + column[None, :]
        # Masked elements read 0 everywhere, which gives them a KL of exactly 0.
        mean = tl.load(mean_ptr + element, mask=mask, other=0.0).to(tl.float32)
        log_var = clamp_log_var(tl.load(log_var_ptr + element, mask=mask, other=0.0).to(tl.float32))
        if HAS_PRIOR:
            prior = row[:, None] * prior_stride + column[None, :]
            prior_log_var = clamp_log_var(tl.load(prior_log_var_ptr + prior, mask=mask, other=0.0))
            distance = mean - tl.load(prior_mean_ptr + prior, mask=mask, other=0.0)
            square = distance * (distance * tl.exp(-prior_log_var))
            square = tl.where(square > 1e30, 1e30, square)
            kl = 0.5 * (square + exp_minus_one_minus_itself(log_var - prior_log_var))
        else:
            distance = limited(mean)
            kl = 0.5 * (distance * distance + exp_minus_one_minus_itself(log_var))
        if SUM_LATENT:
            kl_sum += kl
        else:
            tl.store(kl_ptr + element, kl, mask=mask)
        deviation = tl.exp(0.5 * log_var)
        offset = tl.zeros((), tl.int64)
        for _ in range(num_samples):
            noise = noise_tile(seed, offset, row, start, element, latent, QUADS, BLOCK_D)
            z = mean + deviation * noise
            tl.store(z_ptr + offset + element, z.to(z_ptr.dtype.element_ty), mask=mask)
            offset += sample_stride
    if SUM_LATENT:
        tl.store(kl_ptr + row, tl.sum(kl_sum, axis=1), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "num_samples"])
def _gaussian_backward_kernel(
    grad_z_ptr,  # (S, N, D)
    grad_kl_ptr,  # (N,) or (N, D) float32
    mean_ptr,  # (N, D)
    log_var_ptr,  # (N, D)
    prior_mean_ptr,  # (1 or N, D) float32
    prior_log_var_ptr,  # (1 or N, D) float32
    seed_ptr,  # (1,) int64
    grad_mean_ptr,  # (N, D)
    grad_log_var_ptr,  # (N, D)
    grad_prior_ptr,  # (2, programs or N, D) float32
    rows,
    latent,
    prior_stride,
    num_samples,
    HAS_PRIOR: tl.constexpr,
    SHARED_PRIOR: tl.constexpr,
    SUM_LATENT: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start = tl.program_id(1) * BLOCK_D
    column = start + tl.arange(0, BLOCK_D)
    seed = tl.load(seed_ptr)
    sample_stride = rows.to(tl.int64) * latent
    grad_prior_mean = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_prior_log_var = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # One iteration, unless a shared prior's gradient is being added up.
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_N), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (row < rows)[:, None] & (column < latent)[None, :]
        element = row[:, None] * latent + column[None, :]
        mean = tl.load(mean_ptr + element, mask=mask, other=0.0).to(tl.float32)
        raw_log_var = tl.load(log_var_ptr + element, mask=mask, other=0.0).to(tl.float32)
        log_var = clamp_log_var(raw_log_var)
        if SUM_LATENT:
            grad_kl = tl.load(grad_kl_ptr + row, mask=row < rows, other=0.0)[:, None]
        else:
            grad_kl = tl.load(grad_kl_ptr + element, mask=mask, other=0.0)

        if HAS_PRIOR:
            prior = row[:, None] * prior_stride + column[None, :]
            raw_prior_log_var = tl.load(prior_log_var_ptr + prior, mask=mask, other=0.0)
            prior_log_var = clamp_log_var(raw_prior_log_var)
            distance = mean - tl.load(prior_mean_ptr + prior, mask=mask, other=0.0)
            precision = tl.exp(-prior_log_var)
            distance = tl.where(distance * (distance * precision) > 1e30, 0.0, distance)
            scaled = distance * precision
            excess = exp_minus_one(log_var - prior_log_var)
            grad_mean = grad_kl * scaled
            grad_log_var = 0.5 * grad_kl * excess
            kl_to_prior_log_var = -0.5 * grad_kl * (excess + distance * scaled)
            kl_to_prior_log_var = tl.where(outside(raw_prior_log_var), 0.0, kl_to_prior_log_var)
            if SHARED_PRIOR:
                grad_prior_mean -= grad_mean
                grad_prior_log_var += kl_to_prior_log_var
            else:
                tl.store(grad_prior_ptr + element, -grad_mean, mask=mask)
                tl.store(grad_prior_ptr + sample_stride + element, kl_to_prior_log_var, mask=mask)
        else:
            grad_mean = grad_kl * zero_beyond(mean)
            grad_log_var = 0.5 * grad_kl * exp_minus_one(log_var)

        half_deviation = 0.5 * tl.exp(0.5 * log_var)
        offset = tl.zeros((), tl.int64)
        for _ in range(num_samples):
            noise = noise_tile(seed, offset, row, start, element, latent, QUADS, BLOCK_D)
            grad_z = tl.load(grad_z_ptr + offset + element, mask=mask, other=0.0).to(tl.float32)
            grad_mean += grad_z
            grad_log_var += grad_z * half_deviation * noise
            offset += sample_stride
        grad_log_var = tl.where(outside(raw_log_var), 0.0, grad_log_var)
        tl.store(grad_mean_ptr + element, grad_mean.to(grad_mean_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_log_var_ptr + element, grad_log_var.to(grad_log_var_ptr.dtype.element_ty), mask=mask)

    if SHARED_PRIOR:
        partial = grad_prior_ptr + tl.program_id(0).to(tl.int64) * latent + column
        tl.store(partial, tl.sum(grad_prior_mean, axis=0), mask=column < latent)
        partial += tl.num_programs(0).to(tl.int64) * latent
        tl.store(partial, tl.sum(grad_prior_log_var, axis=0), mask=column < latent)
