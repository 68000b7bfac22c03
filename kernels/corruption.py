"""Corruption of denoising auto-encoders, alone and in the load of the linear layer that reads the corrupted input.

What: Gaussian, masking or salt-and-pepper noise of each element of x; ``linear(corrupt(x), weight, bias)`` and the
gradient of its weight. The definition is the reference in ``fastvae/ops/corruption.py``.

Why: eager PyTorch writes the noise, the mask and the corrupted copy, and keeps the copy for the backward. Alone,
the kernel reads and writes one element (8 bytes in float32) for about 25 instructions of noise. In the products the
copy never exists, at the price of its noise being made once for each block of outputs: with blocks of 64 that is 25
integer instructions for 128 FLOPs, which costs time where tensor cores make the FLOPs cheap. It pays in memory, of
one x forward and through to the backward, not in speed.

How: each product's program makes a tile of the output in registers; the tile of x is corrupted between its load
and the ``tl.dot``, rounded to x's dtype as the copy would be. No atomics: the same inputs give the same bits.

Limits: float32, bfloat16 and float16 (float64 stays with the reference); contiguous operands. float32 products
follow ``torch.set_float32_matmul_precision`` (see ``precision.py``). Where the number of features is not a multiple
of 4 the noise costs four times as much.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.precision import UPCAST_OPERANDS, dot_precision
from fastvae.kernels.random import normal, normals_of_counters, packed_uniform, packed_uniforms_of_counters

_BLOCK = 1024
_NOISES = {"gaussian": 0, "masking": 1, "salt_and_pepper": 2}


def corrupt(x: Tensor, seed: Tensor, noise: str, level: float, low: float, high: float) -> Tensor:
    """Return x, contiguous, corrupted; `noise` is "gaussian", "masking" or "salt_and_pepper", `seed` int64 (1,)."""
    _check_dtype(x)
    out = torch.empty_like(x)
    if x.numel() > 0:
        _corrupt_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            x, seed, out, x.numel(), level, low, high, NOISE=_NOISES[noise], BLOCK=_BLOCK, num_warps=4
        )
    return out


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, noise: str, level: float, low: float, high: float
) -> Tensor:
    """Return ``F.linear(corrupt(x, ...), weight, bias)``: (N, outputs) in x's dtype.

    Args:
        x: (N, features), float32, bfloat16 or float16.
        weight: (outputs, features), like `x`.
        bias: (outputs,), like `x`, or None.
        seed, noise, level, low, high: as for :func:`corrupt`.
    """
    _check_dtype(x)
    (rows, features), outputs = x.shape, weight.shape[0]
    y = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        options = _options(x, noise)
        # One axis: the second may not have more than 65,535 blocks.
        grid = (triton.cdiv(outputs, options["BLOCK_M"]) * triton.cdiv(rows, options["BLOCK_N"]),)
        _corrupted_linear_kernel[grid](
            x, weight, x if bias is None else bias, seed, y, rows, features, outputs, level, low, high,
            HAS_BIAS=int(bias is not None), **options,
        )  # fmt: skip
    return y


def grad_weight(grad: Tensor, x: Tensor, seed: Tensor, noise: str, level: float, low: float, high: float) -> Tensor:
    """Return ``grad.T @ corrupt(x, ...)``: (outputs, features), for grad (N, outputs) and x as in :func:`linear`."""
    _check_dtype(x)
    (rows, features), outputs = x.shape, grad.shape[1]
    result = torch.empty((outputs, features), dtype=x.dtype, device=x.device)
    if result.numel() > 0:
        options = _options(x, noise)
        grid = triton.cdiv(outputs, options["BLOCK_M"]), triton.cdiv(features, options["BLOCK_N"])
        _corrupted_grad_weight_kernel[grid](grad, x, seed, result, rows, features, outputs, level, low, high, **options)
    return result


def _check_dtype(x: Tensor) -> None:
    if x.dtype == torch.float64:
        raise TypeError("x: expected float32, bfloat16 or float16, got torch.float64")


def _options(x: Tensor, noise: str) -> dict[str, int | str]:
    precision = dot_precision()
    # Without tensor cores a step's operands lie in registers: longer steps would take all 255 of a thread.
    block_k, stages = (16, 2) if x.dtype == torch.float32 and precision == "ieee" else (32, 3)
    return {
        "NOISE": _NOISES[noise], "QUADS": int(x.shape[1] % 4 == 0), "UPCAST": UPCAST_OPERANDS, "PRECISION": precision,
        "BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_K": block_k, "num_warps": 4, "num_stages": stages,
    }  # fmt: skip


@triton.jit
def _replace(x, number, level, low, high, NOISE: tl.constexpr):
    if NOISE == 0:
        return x + level * number
    elif NOISE == 1:
        return tl.where(number < level, 0.0, x)
    else:
        return tl.where(number < 0.5 * level, low, tl.where(number < level, high, x))


@triton.jit
def _numbers(seed, element, NOISE: tl.constexpr):
    if NOISE == 0:
        return normal(seed, element)
    else:
        return packed_uniform(seed, element)


@triton.jit
def _numbers_of_counters(seed, counter, NOISE: tl.constexpr):
    if NOISE == 0:
        return normals_of_counters(seed, counter)
    else:
        return packed_uniforms_of_counters(seed, counter)


@triton.jit(do_not_specialize=["count", "level", "low", "high"])
def _corrupt_kernel(
    x_ptr,  # (count,)
    seed_ptr,  # (1,) int64
    out_ptr,  # (count,)
    count,
    level,
    low,
    high,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    element = first + tl.arange(0, BLOCK)[None, :]
    mask = element < count
    x = tl.load(x_ptr + element, mask=mask, other=0.0).to(tl.float32)
    counter = first // 4 + tl.arange(0, BLOCK // 4)[None, :]
    x = _replace(x, _numbers_of_counters(tl.load(seed_ptr), counter, NOISE), level, low, high, NOISE)
    tl.store(out_ptr + element, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _corrupted_tile(
    x_ptr, seed, row, start, rows, features, level, low, high,
    NOISE: tl.constexpr, QUADS: tl.constexpr, UPCAST: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Rows of x and COLUMNS features from `start` on. Beyond the matrix it is 0: there the noise has no element.
    column = start + tl.arange(0, COLUMNS)
    element = row[:, None] * features + column[None, :]
    mask = (row < rows)[:, None] & (column < features)[None, :]
    x = tl.load(x_ptr + element, mask=mask, other=0.0)
    # Where rows are made of whole counters, each is computed once for its four elements.
    if QUADS:
        counter = row[:, None] * (features // 4) + (start // 4 + tl.arange(0, COLUMNS // 4))[None, :]
        numbers = _numbers_of_counters(seed, counter, NOISE)
    else:
        numbers = _numbers(seed, element, NOISE)
    corrupted = tl.where(mask, _replace(x.to(tl.float32), numbers, level, low, high, NOISE), 0.0).to(x.dtype)
    if UPCAST:
        corrupted = corrupted.to(tl.float32)
    return corrupted


_RUN_TIME = ["rows", "level", "low", "high"]


@triton.jit(do_not_specialize=_RUN_TIME)
def _corrupted_linear_kernel(
    x_ptr,  # (N, features)
    weight_ptr,  # (outputs, features)
    bias_ptr,  # (outputs,)
    seed_ptr,  # (1,) int64
    y_ptr,  # (N, outputs)
    rows,
    features,
    outputs,
    level,
    low,
    high,
    HAS_BIAS: tl.constexpr,
    NOISE: tl.constexpr,
    QUADS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across = tl.cdiv(outputs, BLOCK_M)
    row = (tl.program_id(0) // across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    output = (tl.program_id(0) % across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    seed = tl.load(seed_ptr)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, features, BLOCK_K):
        x = _corrupted_tile(
            x_ptr, seed, row, start, rows, features, level, low, high, NOISE, QUADS, UPCAST, BLOCK_K
        )  # fmt: skip
        k = start + tl.arange(0, BLOCK_K)
        weight = tl.load(
            weight_ptr + output[None, :] * features + k[:, None],
            mask=(output < outputs)[None, :] & (k < features)[:, None],
            other=0.0,
        )
        if UPCAST:
            weight = weight.to(tl.float32)
        sums = tl.dot(x, weight, sums, input_precision=PRECISION)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    mask = (row < rows)[:, None] & (output < outputs)[None, :]
    tl.store(y_ptr + row[:, None] * outputs + output[None, :], sums.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_RUN_TIME)
def _corrupted_grad_weight_kernel(
    grad_ptr,  # (N, outputs)
    x_ptr,  # (N, features)
    seed_ptr,  # (1,) int64
    result_ptr,  # (outputs, features)
    rows,
    features,
    outputs,
    level,
    low,
    high,
    NOISE: tl.constexpr,
    QUADS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    output = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    seed = tl.load(seed_ptr)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, rows, BLOCK_K):
        row = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_K)
        grad = tl.load(
            grad_ptr + row[None, :] * outputs + output[:, None],
            mask=(row < rows)[None, :] & (output < outputs)[:, None],
            other=0.0,
        )
        if UPCAST:
            grad = grad.to(tl.float32)
        x = _corrupted_tile(
            x_ptr, seed, row, first, rows, features, level, low, high, NOISE, QUADS, UPCAST, BLOCK_N
        )  # fmt: skip
        sums = tl.dot(grad, x, sums, input_precision=PRECISION)
    feature = first + tl.arange(0, BLOCK_N)
    mask = (output < outputs)[:, None] & (feature < features)[None, :]
    tl.store(
        result_ptr + output[:, None] * features + feature[None, :], sums.to(result_ptr.dtype.element_ty), mask=mask
    )
