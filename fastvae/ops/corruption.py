"""Corrupted inputs of denoising auto-encoders, alone and inside the linear layer that reads them.

    gaussian:         x + level * noise
    masking:          0 with probability level, else x
    salt_and_pepper:  low or high, with probability level / 2 each, else x

The noise of element e is the shared stream's number at e (:mod:`fastvae.ops.random`), normal or packed uniform, and is
made again in the backward. `corrupted_linear` corrupts a piece of x at a time, of 4 MiB on a CPU and on its way to the
product on a GPU, so that the corrupted copy of a larger x is never whole in memory. That saves memory, not time: the
products take nearly all of it.

Source: Vincent et al. 2010, "Stacked denoising autoencoders".
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops.backend import (
    CORE,
    compute_dtype,
    dtype_code,
    first_order,
    in_autocast_dtype,
    kernel,
    large,
    pointer,
    register,
)
from fastvae.ops.checks import check_choice, check_float, check_like, check_shape
from fastvae.ops.random import normal, packed_uniform, seed_of

NOISES = ("gaussian", "masking", "salt_and_pepper")  # numbered as in csrc/kernels.h

_PIECE_BYTES = 4 << 20  # of corrupted x at a time: smaller ones stay nearer, and pay more for starting products
_MIN_PIECE = 64  # rows or columns: below this the products are bound by reading the other operand


# ------------------------------------------------------------------------------------------------ reference
def reference(x: Tensor, seed: Tensor, noise: str, level: float, low: float, high: float) -> Tensor:
    """Eager definition: x corrupted, in its shape and dtype."""
    offsets = torch.arange(x.numel(), device=x.device)
    if noise == "gaussian":
        compute = compute_dtype(x)
        return (x.to(compute) + level * normal(seed, offsets).to(compute).reshape(x.shape)).to(x.dtype)
    u = packed_uniform(seed, offsets).reshape(x.shape)
    if noise == "masking":
        return x.masked_fill(u < level, 0)
    return x.masked_fill(u < level, high).masked_fill(u < level / 2, low)


def reference_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, noise: str, level: float, low: float, high: float
) -> Tensor:
    """Eager definition: F.linear of `reference`. x (rows, features), weight (outputs, features), bias (outputs,)."""
    return F.linear(reference(x, seed, noise, level, low, high), weight, bias)


def reference_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    seed: Tensor,
    noise: str,
    level: float,
    low: float,
    high: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference_linear` for x, weight and bias; those not needed have no elements."""
    grad_x, grad_weight, grad_bias = (x.new_empty(0) for _ in range(3))
    if need_x:
        grad_x = _backward(grad @ weight, seed, noise, level, reference)
    if need_weight:
        grad_weight = grad.T @ reference(x, seed, noise, level, low, high)
    if need_bias:
        grad_bias = _sum_rows(grad)
    return grad_x, grad_weight, grad_bias


def _backward(grad: Tensor, seed: Tensor, noise: str, level: float, corrupt: Any) -> Tensor:
    """Gradient of a corruption: what was replaced has none."""
    return grad if noise == "gaussian" else corrupt(grad, seed, "masking", level, 0.0, 0.0)


def _sum_rows(grad: Tensor) -> Tensor:
    return grad.sum(0, dtype=compute_dtype(grad)).to(grad.dtype)


# ----------------------------------------------------------------------------------------------- C++ on CPU
def _cpu(x: Tensor, seed: Tensor, noise: str, level: float, low: float, high: float) -> Tensor:
    x = x.contiguous()
    out = large(torch.empty_like(x))
    _corrupt_piece(x.reshape(-1, 1), slice(0, x.numel()), slice(0, 1), seed, noise, level, low, high, out)
    return out


def _cpu_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, noise: str, level: float, low: float, high: float
) -> Tensor:
    x, columns, table = x.contiguous(), slice(0, x.shape[1]), weight.T
    y = large(x.new_empty(x.shape[0], weight.shape[0]))
    for rows, scratch in _pieces(x, 0):
        _corrupt_piece(x, rows, columns, seed, noise, level, low, high, scratch)
        if bias is None:
            torch.mm(scratch, table, out=y[rows])
        else:
            torch.addmm(bias, scratch, table, out=y[rows])
    return y


def _cpu_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    seed: Tensor,
    noise: str,
    level: float,
    low: float,
    high: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, grad = x.contiguous(), grad.contiguous()
    grad_x, grad_weight, grad_bias = (x.new_empty(0) for _ in range(3))
    if need_x:
        grad_x = torch.mm(grad, weight, out=large(torch.empty_like(x)))
        if noise != "gaussian":
            everything = slice(0, x.shape[0]), slice(0, x.shape[1])
            _corrupt_piece(grad_x, *everything, seed, "masking", level, 0.0, 0.0, grad_x)
    if need_weight:
        # Columns: each product is summed to the end at once, in half precision too.
        grad_weight = large(weight.new_empty(weight.shape))
        for columns, scratch in _pieces(x, 1):
            _corrupt_piece(x, slice(0, x.shape[0]), columns, seed, noise, level, low, high, scratch)
            torch.mm(grad.T, scratch, out=grad_weight[:, columns])
    if need_bias:
        grad_bias = _sum_rows(grad)
    return grad_x, grad_weight, grad_bias


def _pieces(x: Tensor, dim: int) -> Iterator[tuple[slice, Tensor]]:
    """Cut x along `dim` in pieces that fit the second-level cache; yield where they are and room for one."""
    length, across = x.shape[dim], x.shape[1 - dim]
    step = max(_MIN_PIECE, _PIECE_BYTES // (max(1, across) * x.element_size()) // _MIN_PIECE * _MIN_PIECE)
    scratch = x.new_empty(min(length, step) * across)
    for first in range(0, length, step):
        here = slice(first, min(first + step, length))
        shape = (here.stop - first, across) if dim == 0 else (across, here.stop - first)
        yield here, scratch[: math.prod(shape)].view(shape)


def _corrupt_piece(x: Tensor, rows: slice, columns: slice, seed: Tensor, noise: str, level: float, low: float,
                   high: float, out: Tensor) -> None:  # fmt: skip
    """Write the corrupted x[rows, columns] of a contiguous matrix to `out`."""
    assert CORE is not None
    first = rows.start * x.shape[1] + columns.start
    CORE.corrupt(
        dtype_code(x), NOISES.index(noise), level, low, high, pointer(seed),
        pointer(x) + first * x.element_size(), rows.stop - rows.start, columns.stop - columns.start, x.shape[1], first,
        pointer(out),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------- Triton on CUDA
_triton_corrupt = kernel("corruption", "corrupt")
_triton_linear = kernel("corruption", "linear")
_triton_grad_weight = kernel("corruption", "grad_weight")


def _cuda(x: Tensor, seed: Tensor, noise: str, level: float, low: float, high: float) -> Tensor:
    if x.dtype == torch.float64:
        return reference(x, seed, noise, level, low, high)
    return _triton_corrupt(x.contiguous(), seed, noise, level, low, high)


def _cuda_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, noise: str, level: float, low: float, high: float
) -> Tensor:
    if x.dtype == torch.float64:
        return reference_linear(x, weight, bias, seed, noise, level, low, high)
    bias = None if bias is None else bias.contiguous()
    return _triton_linear(x.contiguous(), weight.contiguous(), bias, seed, noise, level, low, high)


def _cuda_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    seed: Tensor,
    noise: str,
    level: float,
    low: float,
    high: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    corruption = (seed, noise, level, low, high)
    if x.dtype == torch.float64:
        return reference_linear_backward(grad, x, weight, *corruption, need_x, need_weight, need_bias)
    grad_x, grad_weight, grad_bias = (x.new_empty(0) for _ in range(3))
    if need_x:
        grad_x = _backward(torch.mm(grad, weight), seed, noise, level, _triton_corrupt)
    if need_weight:
        grad_weight = _triton_grad_weight(grad.contiguous(), x.contiguous(), *corruption)
    if need_bias:
        grad_bias = _sum_rows(grad)
    return grad_x, grad_weight, grad_bias


# ------------------------------------------------------------------------------------------ schema, autograd
def _fake(x: Tensor, seed: Tensor, noise: str, level: float, low: float, high: float) -> Tensor:
    return x.new_empty(x.shape)


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, noise: str, level: float, low: float,
                 high: float) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_linear_backward(grad: Tensor, x: Tensor, weight: Tensor, seed: Tensor, noise: str, level: float, low: float,
                          high: float, need_x: bool, need_weight: bool, need_bias: bool
                          ) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = ((need_x, x.shape), (need_weight, weight.shape), (need_bias, weight.shape[:1]))
    return tuple(x.new_empty(shape if needed else (0,)) for needed, shape in shapes)


_corrupt = register(
    "corrupt(Tensor x, Tensor seed, str noise, float level, float low, float high) -> Tensor",
    reference=reference,
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)
_linear = register(
    "corrupted_linear(Tensor x, Tensor weight, Tensor? bias, Tensor seed, str noise, float level, float low, "
    "float high) -> Tensor",
    reference=reference_linear,
    fake=_fake_linear,
    cpu=_cpu_linear,
    cuda=_cuda_linear,
)
_linear_backward = register(
    "corrupted_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor seed, str noise, float level, float low, "
    "float high, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    reference=reference_linear_backward,
    fake=_fake_linear_backward,
    cpu=_cpu_linear_backward,
    cuda=_cuda_linear_backward,
)


class _Corrupt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, noise: str, level: float, low: float, high: float) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.noise, ctx.level = noise, level
        return _corrupt(x, seed, noise, level, low, high)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        return _backward(grad, seed, ctx.noise, ctx.level, _corrupt), None, None, None, None, None


class _CorruptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, noise: str, level: float,
                low: float, high: float) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, seed)
        ctx.corruption = noise, level, low, high
        return _linear(x, weight, bias, seed, noise, level, low, high)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        grads = _linear_backward(grad, *ctx.saved_tensors, *ctx.corruption, *needs)
        return *(g if n else None for g, n in zip(grads, needs, strict=True)), None, None, None, None, None


# -------------------------------------------------------------------------------------------------- public
def corrupt(
    x: Tensor,
    noise: str,
    level: float,
    *,
    low: float = 0.0,
    high: float = 1.0,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """Corrupt the input of a denoising auto-encoder.

    Args:
        x: any shape, float32, float64, bfloat16 or float16.
        noise: "gaussian" adds level * N(0, 1); "masking" sets elements to 0 with probability `level`;
            "salt_and_pepper" sets them to `low` or `high`, each with probability level / 2.
        level: standard deviation of the Gaussian noise, not negative; else a probability, in [0, 1].
        low, high: what "salt_and_pepper" writes: the ends of the data's range.
        generator: source of the seed, on the device of `x`; torch's global one if None.
        seed: int64 tensor (1,) on the device of `x` to use instead of drawing one.

    Returns:
        The corrupted copy, in `x`'s shape and dtype. Its gradient goes to the elements that were kept; to all of them
        with Gaussian noise.

    Raises:
        TypeError, ValueError: naming the argument whose type, device or value is wrong.

    Source: Vincent et al. 2010, "Stacked denoising autoencoders", section 3.3.
    """
    check_float("x", x)
    corruption = _check(noise, level, low, high)
    return _Corrupt.apply(x, seed_of(seed, generator, "x", x), *corruption)


def corrupted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    noise: str,
    level: float,
    *,
    low: float = 0.0,
    high: float = 1.0,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """``F.linear(corrupt(x, ...), weight, bias)`` without the corrupted copy of x, neither kept nor whole in memory.

    Args:
        x: (..., features), float32, float64, bfloat16 or float16.
        weight: (outputs, features), like `x` (or any of these types under autocast).
        bias: (outputs,), like `x`, or None.
        noise, level, low, high, generator, seed: as for :func:`corrupt`; the same seed gives the same corrupted x.

    Returns:
        (..., outputs), in the operands' type, with gradients to x, weight and bias.

    Raises:
        TypeError, ValueError: naming the argument whose type, shape, device or value is wrong.
    """
    check_float("x", x)
    check_float("weight", weight)
    weight, x, bias = in_autocast_dtype(weight, x, bias)
    check_like("weight", weight, "x", x)
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., features), got ()")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight: expected (outputs, features) with features = {x.shape[-1]} as in x, got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_like("bias", bias, "x", x)
        check_shape("bias", bias, (weight.shape[0],), "(outputs,)")
    corruption = _check(noise, level, low, high)
    rows = math.prod(x.shape[:-1])
    matrix = x.reshape(rows, x.shape[-1])
    y = _CorruptedLinear.apply(matrix, weight, bias, seed_of(seed, generator, "x", x), *corruption)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _check(noise: str, level: float, low: float, high: float) -> tuple[str, float, float, float]:
    check_choice("noise", noise, NOISES)
    if noise == "gaussian" and not 0 <= level < math.inf:
        raise ValueError(f"level: expected a finite standard deviation of at least 0, got {level}")
    if noise != "gaussian" and not 0 <= level <= 1:
        raise ValueError(f"level: expected a probability in [0, 1], got {level}")
    for name, value in (("low", low), ("high", high)):
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name}: expected a finite number, got {value}")
    return noise, float(level), float(low), float(high)
