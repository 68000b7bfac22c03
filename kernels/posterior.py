"""Log-density of points under a uniform mixture of diagonal Gaussians, without anything of size N * M.

What: ``log 1/M sum_j N(z_i; mean_j, var_j)`` for each of N points and its gradients; the definition is the reference in
``fastvae/ops/posterior.py``.

Why: the broadcast form moves several tensors of N * M * D numbers; these kernels read 3 * N * D once for each block
of the other side, and do 3 operations (backward 11) for each pair and dimension, with one exponential a pair. Products
of matrices could not do it: the expanded square loses the digits of narrow components far from 0.

How: dimensions come first in memory, so that a block's numbers of one dimension lie side by side; a pair's distance is
summed in registers, the sum over components with a running maximum. Backward, one kernel owns points and one owns
components; each adds to its gradients in memory, which nobody else touches: no atomics, the same bits each time.

Limits: float32, bfloat16 and float16 (float64 stays with the reference); log_var is clamped to [-40, 40] with no
gradient outside. Few points make few programs: below some 1,000 of them a large GPU is not filled.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 32  # of points and of components to a program
_OTHERS = 64  # of what it goes over


def forward(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Compute the log-density of each point.

    Args:
        z: (N, D), float32, bfloat16 or float16. mean, log_var: (M, D).

    Returns:
        float32 (N,).
    """
    rows, components = z.shape[0], mean.shape[0]
    log_density = torch.empty(rows, dtype=torch.float32, device=z.device)
    if rows == 0:
        return log_density
    points, *mixture, _ = _dimensions_first(z, mean, log_var)
    _mixture_forward_kernel[(triton.cdiv(rows, _BLOCK),)](
        points, *mixture, log_density, rows, components, z.shape[1], math.log(components),
        BLOCK_N=_BLOCK, BLOCK_M=_OTHERS, num_warps=4,
    )  # fmt: skip
    return log_density


def backward(
    grad: Tensor, log_density: Tensor, z: Tensor, mean: Tensor, log_var: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`; arguments as there.

    Args:
        grad, log_density: float32 (N,), the result's gradient and the result.

    Returns:
        Gradients of z, mean and log_var, in their dtypes.
    """
    (rows, latent), components = z.shape, mean.shape[0]
    points, *mixture, inside = _dimensions_first(z, mean, log_var)
    grad_points = torch.zeros_like(points)
    # Not two views of one tensor: the second's alignment would change with the sizes, and the kernel compile again.
    grad_mean, grad_square = (torch.zeros((latent, components), dtype=torch.float32, device=z.device) for _ in range(2))
    weights = torch.zeros(components, dtype=torch.float32, device=z.device)
    if rows and components:
        log_sum = log_density.contiguous() + math.log(components)
        operands = (points, *mixture, grad.contiguous(), log_sum)
        _mixture_points_kernel[(triton.cdiv(rows, _BLOCK),)](
            *operands, grad_points, rows, components, latent, BLOCK_N=_BLOCK, BLOCK_M=_OTHERS, num_warps=4
        )
        _mixture_components_kernel[(triton.cdiv(components, _BLOCK),)](
            *operands, grad_mean, grad_square, weights, rows, components, latent,
            BLOCK_N=_OTHERS, BLOCK_M=_BLOCK, num_warps=4,
        )  # fmt: skip
    grad_log_var = torch.where(inside, 0.5 * (grad_square - weights), 0.0)
    grads = zip((grad_points, grad_mean, grad_log_var), (z, mean, log_var), strict=True)
    first, second, third = (g.t().to(t.dtype).contiguous() for g, t in grads)
    return first, second, third


def _dimensions_first(z: Tensor, mean: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return z (D, N); mean, precision (D, M), the components' constants (M,), and where log_var is not clamped."""
    if z.dtype == torch.float64:
        raise TypeError("z: expected float32, bfloat16 or float16, got torch.float64")
    raw = log_var.t().float()
    clamped = raw.clamp(-40, 40)
    constants = -0.5 * (clamped.sum(0) + raw.shape[0] * math.log(2 * math.pi))
    return (
        z.t().float().contiguous(), mean.t().float().contiguous(), torch.exp(-clamped).contiguous(), constants,
        (raw >= -40) & (raw <= 40),
    )  # fmt: skip


@triton.jit
def _log_densities(
    z_ptr, mean_ptr, precision_ptr, constant_ptr, row, column, rows, components, latent,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # A component beyond the last has density 0: precision 1, since an infinite distance times 0 would be NaN.
    squares = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in range(latent):
        z = tl.load(z_ptr + row, mask=row < rows, other=0.0)
        mean = tl.load(mean_ptr + column, mask=column < components, other=0.0)
        precision = tl.load(precision_ptr + column, mask=column < components, other=1.0)
        distance = z[:, None] - mean[None, :]
        squares += distance * (distance * precision[None, :])
        z_ptr += rows
        mean_ptr += components
        precision_ptr += components
    constant = tl.load(constant_ptr + column, mask=column < components, other=float("-inf"))
    return constant[None, :] - 0.5 * squares


@triton.jit(do_not_specialize=["rows", "components"])
def _mixture_forward_kernel(
    z_ptr,  # (D, N) float32
    mean_ptr,  # (D, M) float32
    precision_ptr,  # (D, M) float32
    constant_ptr,  # (M,) float32
    log_density_ptr,  # (N,) float32
    rows,
    components,
    latent,
    log_components,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, components, BLOCK_M):
        column = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
        log_densities = _log_densities(
            z_ptr, mean_ptr, precision_ptr, constant_ptr, row, column, rows, components, latent, BLOCK_N, BLOCK_M
        )
        # The maximum may drop a NaN; the sum keeps it.
        new = tl.maximum(largest, tl.max(log_densities, axis=1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(log_densities - shift[:, None]), axis=1)
        largest = new
    tl.store(log_density_ptr + row, shift + tl.log(total) - log_components, mask=row < rows)


@triton.jit
def _weights(
    z_ptr, mean_ptr, precision_ptr, constant_ptr, grad_ptr, log_sum_ptr, row, column, rows, components, latent,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    log_densities = _log_densities(
        z_ptr, mean_ptr, precision_ptr, constant_ptr, row, column, rows, components, latent, BLOCK_N, BLOCK_M
    )
    # A point with density 0, or beyond the last, weighs nothing.
    log_sum = tl.load(log_sum_ptr + row, mask=row < rows, other=float("-inf"))
    grad = tl.load(grad_ptr + row, mask=row < rows, other=0.0)
    nothing = (log_sum == float("-inf"))[:, None]
    return tl.where(nothing, 0.0, grad[:, None] * tl.exp(tl.where(nothing, 0.0, log_densities - log_sum[:, None])))


@triton.jit(do_not_specialize=["rows", "components"])
def _mixture_points_kernel(
    z_ptr,  # (D, N) float32
    mean_ptr,  # (D, M) float32
    precision_ptr,  # (D, M) float32
    constant_ptr,  # (M,) float32
    grad_ptr,  # (N,) float32
    log_sum_ptr,  # (N,) float32
    grad_z_ptr,  # (D, N) float32, zeros
    rows,
    components,
    latent,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    for start in range(0, components, BLOCK_M):
        column = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
        weights = _weights(
            z_ptr, mean_ptr, precision_ptr, constant_ptr, grad_ptr, log_sum_ptr,
            row, column, rows, components, latent, BLOCK_N, BLOCK_M,
        )  # fmt: skip
        point, other = row, column
        for _ in range(latent):
            z = tl.load(z_ptr + point, mask=row < rows, other=0.0)
            mean = tl.load(mean_ptr + other, mask=column < components, other=0.0)
            precision = tl.load(precision_ptr + other, mask=column < components, other=0.0)
            pull = weights * (z[:, None] - mean[None, :]) * precision[None, :]
            before = tl.load(grad_z_ptr + point, mask=row < rows, other=0.0)
            tl.store(grad_z_ptr + point, before - tl.sum(pull, axis=1), mask=row < rows)
            point += rows
            other += components
        tl.debug_barrier()  # other threads of the program may load next what these have stored


@triton.jit(do_not_specialize=["rows", "components"])
def _mixture_components_kernel(
    z_ptr,  # (D, N) float32
    mean_ptr,  # (D, M) float32
    precision_ptr,  # (D, M) float32
    constant_ptr,  # (M,) float32
    grad_ptr,  # (N,) float32
    log_sum_ptr,  # (N,) float32
    grad_mean_ptr,  # (D, M) float32, zeros
    grad_square_ptr,  # (D, M) float32, zeros: weight times (z - mean)^2 / var
    weights_ptr,  # (M,) float32
    rows,
    components,
    latent,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, rows, BLOCK_N):
        row = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)
        weights = _weights(
            z_ptr, mean_ptr, precision_ptr, constant_ptr, grad_ptr, log_sum_ptr,
            row, column, rows, components, latent, BLOCK_N, BLOCK_M,
        )  # fmt: skip
        total += tl.sum(weights, axis=0)
        point, other = row, column
        for _ in range(latent):
            z = tl.load(z_ptr + point, mask=row < rows, other=0.0)
            mean = tl.load(mean_ptr + other, mask=column < components, other=0.0)
            precision = tl.load(precision_ptr + other, mask=column < components, other=0.0)
            distance = z[:, None] - mean[None, :]
            pull = weights * distance * precision[None, :]
            to_mean = tl.load(grad_mean_ptr + other, mask=column < components, other=0.0) + tl.sum(pull, axis=0)
            to_square = tl.load(grad_square_ptr + other, mask=column < components, other=0.0)
            to_square += tl.sum(pull * distance, axis=0)
            tl.store(grad_mean_ptr + other, to_mean, mask=column < components)
            tl.store(grad_square_ptr + other, to_square, mask=column < components)
            point += rows
            other += components
        tl.debug_barrier()  # as above
    tl.store(weights_ptr + column, total, mask=column < components)
