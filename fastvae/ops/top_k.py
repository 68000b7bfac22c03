"""The k largest latents of a linear encoder, and the decoder that sums their rows: a sparse auto-encoder's two halves.

    values[n], indices[n] = top k of x[n] @ weight.T + bias,    y[n] = sum_j values[n, j] * weight[indices[n, j]] + bias

The (samples, latents) pre-activations are never whole in memory: the rows go through in blocks, and of each block only
the k largest stay. All that follows costs k products a sample in place of one for each latent. A weight's gradient is
summed latent by latent in the order of the samples, after a stable sort of the indices: no atomics, the same bits at
every call.

The functions below are the definition, and serve every device: a matrix product, `torch.topk` and sums of gathered
rows are torch's own.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops.backend import compute_dtype, first_order, in_autocast_dtype, recording, register
from fastvae.ops.checks import check_choice, check_float, check_index, check_like, check_shape

_BLOCK_LATENTS = 2_500_000  # pre-activations of a block of rows: 10 MB of float32 stay in cache
_BLOCK_LATENTS_CUDA = 64_000_000  # few launches, long products
_MIN_BLOCK_ROWS = 128  # below this the product is bound by reading the weight


# -------------------------------------------------------------------------------------------------- the ops
def encode(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, relu: bool) -> tuple[Tensor, Tensor]:
    """The k largest of F.linear(x, weight, bias) in each row, in descending order, and where they are."""
    rows, latents, compute = x.shape[0], weight.shape[0], compute_dtype(x)
    values = x.new_empty(rows, k)
    indices = torch.empty(rows, k, dtype=torch.int64, device=x.device)
    block = max(_MIN_BLOCK_ROWS, (_BLOCK_LATENTS_CUDA if x.is_cuda else _BLOCK_LATENTS) // latents)
    table, shift = weight.to(compute).T, None if bias is None else bias.to(compute)
    buffer = values.new_empty(min(rows, block), latents, dtype=compute)
    for first in range(0, rows, block):
        here = slice(first, min(first + block, rows))
        latent = torch.mm(x[here].to(compute), table, out=buffer[: here.stop - first])
        if shift is not None:
            latent += shift
        largest, indices[here] = torch.topk(latent, k)
        values[here] = largest.relu_() if relu else largest
    return values, indices


def encode_backward(
    grad_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    weight: Tensor,
    relu: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `encode` for x, weight and bias; those not needed have no elements."""
    compute, latents = compute_dtype(x), weight.shape[0]
    grad = grad_values.to(compute)
    if relu:
        grad = torch.where(values > 0, grad, 0)
    grad_x, grad_weight, grad_bias = (x.new_empty(0) for _ in range(3))
    if need_x:
        grad_x = _sum_rows(grad, indices, weight.to(compute)).to(x.dtype)
    if need_weight:
        grad_weight = _sum_by_latent(grad, indices, x.to(compute), latents).to(x.dtype)
    if need_bias:
        ones = grad.new_ones(x.shape[0], 1)
        grad_bias = _sum_by_latent(grad, indices, ones, latents).squeeze(1).to(x.dtype)
    return grad_x, grad_weight, grad_bias


def decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The sum of the rows of `weight` at `indices`, weighted by `values`, plus bias."""
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(end) for end in indices.aminmax())
        if low < 0 or high >= weight.shape[0]:
            wrong = low if low < 0 else high
            raise IndexError(f"indices: expected latents in [0, {weight.shape[0]}), got {wrong}")
    compute = compute_dtype(weight)
    y = _sum_rows(values.to(compute), indices, weight.to(compute))
    if bias is not None:
        y += bias.to(compute)
    return y.to(weight.dtype)


def decode_backward(
    grad: Tensor, values: Tensor, indices: Tensor, weight: Tensor, need_values: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `decode` for values, weight and bias; those not needed have no elements."""
    compute = compute_dtype(weight)
    grad = grad.to(compute)
    grad_values, grad_weight, grad_bias = (weight.new_empty(0) for _ in range(3))
    if need_values:
        grad_values = _products_with_rows(grad, indices, weight.to(compute)).to(weight.dtype)
    if need_weight:
        grad_weight = _sum_by_latent(values.to(compute), indices, grad, weight.shape[0]).to(weight.dtype)
    if need_bias:
        grad_bias = grad.sum(0).to(weight.dtype)
    return grad_values, grad_weight, grad_bias


# ------------------------------------------------------------------------------------- products with few rows
def _sum_rows(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """y[n] = sum_j values[n, j] * table[indices[n, j]]."""
    rows, k = indices.shape
    return _bags(values.flatten(), indices.flatten(), torch.arange(rows + 1, device=values.device) * k, table)


def _sum_by_latent(values: Tensor, indices: Tensor, table: Tensor, latents: int) -> Tensor:
    """y[l] = sum over the (n, j) with indices[n, j] = l of values[n, j] * table[n], in the order of n."""
    latent, order = indices.flatten().sort(stable=True)
    starts = torch.searchsorted(latent, torch.arange(latents + 1, device=latent.device))
    return _bags(values.flatten()[order], order.div(indices.shape[1], rounding_mode="floor"), starts, table)


def _bags(weights: Tensor, rows: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    # Each bag is summed by one thread from first to last, on every device: nothing depends on timing.
    if weights.numel() == 0 or table.shape[1] == 0:
        return table.new_zeros(starts.shape[0] - 1, table.shape[1])
    return F.embedding_bag(
        rows, table.contiguous(), starts, per_sample_weights=weights, mode="sum", include_last_offset=True
    )


def _products_with_rows(vectors: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """y[n, j] = vectors[n] . table[indices[n, j]]: the gradient of `_sum_rows` for the values, nothing gathered."""
    values = vectors.new_zeros(indices.shape)
    if vectors.numel() == 0:
        return values
    with recording():
        sums = F.embedding_bag(indices, table.detach(), per_sample_weights=values.requires_grad_(), mode="sum")
    return torch.autograd.grad(sums, values, vectors)[0]


# ------------------------------------------------------------------------------------------ schema, autograd
def _fake_encode(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, relu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)


def _fake_encode_backward(grad_values: Tensor, values: Tensor, indices: Tensor, x: Tensor, weight: Tensor, relu: bool,
                          need_x: bool, need_weight: bool, need_bias: bool) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = ((need_x, x.shape), (need_weight, weight.shape), (need_bias, weight.shape[:1]))
    return tuple(x.new_empty(shape if needed else (0,)) for needed, shape in shapes)


def _fake_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_empty(indices.shape[0], weight.shape[1])


def _fake_decode_backward(grad: Tensor, values: Tensor, indices: Tensor, weight: Tensor, need_values: bool,
                          need_weight: bool, need_bias: bool) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = ((need_values, values.shape), (need_weight, weight.shape), (need_bias, weight.shape[1:]))
    return tuple(weight.new_empty(shape if needed else (0,)) for needed, shape in shapes)


_encode = register(
    "top_k_encode(Tensor x, Tensor weight, Tensor? bias, SymInt k, bool relu) -> (Tensor, Tensor)",
    reference=encode,
    fake=_fake_encode,
    cpu=None,
    cuda=None,
)
_encode_backward = register(
    "top_k_encode_backward(Tensor grad_values, Tensor values, Tensor indices, Tensor x, Tensor weight, bool relu, "
    "bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    reference=encode_backward,
    fake=_fake_encode_backward,
    cpu=None,
    cuda=None,
)
_decode = register(
    "top_k_decode(Tensor values, Tensor indices, Tensor weight, Tensor? bias) -> Tensor",
    reference=decode,
    fake=_fake_decode,
    cpu=None,
    cuda=None,
)
_decode_backward = register(
    "top_k_decode_backward(Tensor grad, Tensor values, Tensor indices, Tensor weight, bool need_values, "
    "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    reference=decode_backward,
    fake=_fake_decode_backward,
    cpu=None,
    cuda=None,
)


class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, k: int,
                relu: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        values, indices = _encode(x, weight, bias, k, relu)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(values, indices, x, weight)
        ctx.relu = relu
        return values, indices

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        grads = _encode_backward(grad_values, *ctx.saved_tensors, ctx.relu, *needs)
        return *(g if n else None for g, n in zip(grads, needs, strict=True)), None, None


class _TopKDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(values, indices, weight)
        return _decode(values, indices, weight, bias)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_values, _, need_weight, need_bias = ctx.needs_input_grad
        grads = _decode_backward(grad, *ctx.saved_tensors, need_values, need_weight, need_bias)
        values, weight, bias = (
            g if n else None for g, n in zip(grads, (need_values, need_weight, need_bias), strict=True)
        )
        return values, None, weight, bias


# -------------------------------------------------------------------------------------------------- public
def top_k_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, k: int, activation: str = "relu"
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of ``F.linear(x, weight, bias)`` in each row, without keeping the others.

    Args:
        x: (..., features), float32, float64, bfloat16 or float16.
        weight: (latents, features), like `x` (or any of these types under autocast).
        bias: (latents,), like `x`, or None; -inf keeps a latent out for as long as k others are left.
        k: how many latents to keep, in [1, latents].
        activation: "relu" sets the negative ones among the k to 0, "none" leaves them.

    Returns:
        values (..., k) in descending order, in the operands' type, and their indices (..., k), int64, all different. Of
        equal pre-activations any may be kept. Gradients flow through the values to x, weight and bias.

    Raises:
        TypeError, ValueError: naming the argument whose type, shape, device or value is wrong.

    Source: Makhzani & Frey 2013, "k-Sparse autoencoders"; Gao et al. 2024, "Scaling and evaluating sparse
    autoencoders".
    """
    check_float("x", x)
    check_float("weight", weight)
    weight, x, bias = in_autocast_dtype(weight, x, bias)
    check_like("weight", weight, "x", x)
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., features), got ()")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight: expected (latents, features) with features = {x.shape[-1]} as in x, got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_like("bias", bias, "x", x)
        check_shape("bias", bias, (weight.shape[0],), "(latents,)")
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k: expected 1 <= k <= latents = {weight.shape[0]}, got {k}")
    check_choice("activation", activation, ("relu", "none"))
    rows = math.prod(x.shape[:-1])
    values, indices = _TopKEncode.apply(x.reshape(rows, x.shape[-1]), weight, bias, k, activation == "relu")
    return values.reshape(*x.shape[:-1], k), indices.reshape(*x.shape[:-1], k)


def top_k_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum the rows of `weight` at `indices`, weighted by `values`: the codes of `top_k_encode` times a dictionary.

    Args:
        values: (..., k), float32, float64, bfloat16 or float16.
        indices: rows of `weight`, int64 (..., k), in [0, latents); one that comes twice counts twice.
        weight: (latents, features), like `values` (or any of these types under autocast).
        bias: (features,), like `values`, or None; added to each sum.

    Returns:
        (..., features), in the operands' type, with gradients to values, weight and bias.

    Raises:
        TypeError, ValueError: naming the argument whose type, shape or device is wrong.
        IndexError: if an index is out of range (on CUDA a device-side assertion fails, as checking would synchronise).
    """
    check_float("values", values)
    check_float("weight", weight)
    weight, values, bias = in_autocast_dtype(weight, values, bias)
    check_like("weight", weight, "values", values)
    check_index("indices", indices, "values", values)
    if values.dim() == 0 or values.shape[-1] == 0:
        raise ValueError(f"values: expected shape (..., k) with k at least 1, got {tuple(values.shape)}")
    check_shape("indices", indices, tuple(values.shape), "that of values")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (latents, features), got {tuple(weight.shape)}")
    if bias is not None:
        check_like("bias", bias, "values", values)
        check_shape("bias", bias, (weight.shape[1],), "(features,)")
    rows, k = math.prod(values.shape[:-1]), values.shape[-1]
    y = _TopKDecode.apply(values.reshape(rows, k), indices.reshape(rows, k), weight, bias)
    return y.reshape(*values.shape[:-1], weight.shape[1])
