"""Linear layer and cross-entropy together, without the (rows, vocabulary) logits ever whole in memory.

    loss[n] = logsumexp(logits[n]) - logits[n, target[n]],    logits = hidden @ weight.T + bias

On CPU the rows go through in blocks whose logits stay in cache: a product, one fused pass over the block, and, when
gradients are wanted, the two products of the backward at once, while the block is still there. That takes the gradient
of the *sum* of the losses. A backward whose row gradients are all equal, as for a mean or a sum, only scales it; any
other runs the blocks again. On CUDA the logits are made again in the backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops.backend import (
    CORE,
    compute_dtype,
    first_order,
    in_autocast_dtype,
    kernel,
    large,
    pointer,
    recording,
    register,
)
from fastvae.ops.checks import check_choice, check_float, check_index, check_like, check_shape

_BLOCK_LOGITS = 2_500_000  # logits of a block of rows: 10 MB of float32
_MIN_BLOCK_ROWS = 160  # below this the products are bound by reading the weight and adding to its gradient


# ------------------------------------------------------------------------------------------------ reference
def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Eager definition: losses and logsumexp of the logits, both (rows,), 0 at ignored rows."""
    compute = compute_dtype(hidden)
    logits = F.linear(hidden.to(compute), weight.to(compute), None if bias is None else bias.to(compute))
    losses = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    return losses, torch.logsumexp(logits, -1).masked_fill(target == ignore_index, 0)


def reference_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, logsumexp and, by autograd, the gradients of the losses' sum; those not needed have no elements.

    The gradients have the losses' type: in float16 a sum over many rows would overflow before it is scaled.
    """
    compute = compute_dtype(hidden)
    inputs = [t.detach().to(compute).requires_grad_() for t in (hidden, weight, bias) if t is not None]
    with recording():
        losses, lse = reference(inputs[0], inputs[1], inputs[2] if bias is not None else None, target, ignore_index)
        total = losses.sum()
    grads = torch.autograd.grad(total, inputs)
    return losses.detach(), lse.detach(), *_select(lse, [*grads], need_hidden, need_weight)


def reference_backward(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    sum_gradients: list[Tensor],
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference`'s losses by autograd; those not needed have no elements."""
    inputs = [t.detach().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    with recording():
        losses = reference(inputs[0], inputs[1], inputs[2] if bias is not None else None, target, ignore_index)[0]
    grads = torch.autograd.grad(losses, inputs, grad_losses)
    return _select(hidden, [*grads], need_hidden, need_weight)


def _select(
    like: Tensor, grads: list[Tensor | None], need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # An op cannot return None: what is not wanted, or does not exist, has no elements.
    wanted = (need_hidden, need_weight, need_weight)
    kept = [g if g is not None and w else like.new_empty(0) for g, w in zip([*grads, None], wanted, strict=False)]
    return kept[0], kept[1], kept[2]


# ----------------------------------------------------------------------------------------------- C++ on CPU
def _cpu_blocks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    *,
    gradient: bool = False,
    grad_losses: Tensor | None = None,
    lse: Tensor | None = None,
    need_hidden: bool = False,
    need_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Go through the rows in blocks; returns losses, lse and the gradients of sum(grad_losses * losses)."""
    assert CORE is not None
    compute = compute_dtype(hidden)
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    kept = (target != ignore_index).nonzero().squeeze(1)
    compact = kept.numel() < rows
    x, y = (hidden[kept], target[kept]) if compact else (hidden, target.contiguous())
    count = x.shape[0]
    if count and (int(y.min()) < 0 or int(y.max()) >= vocabulary):
        wrong = y[(y < 0) | (y >= vocabulary)][0]
        raise IndexError(f"target: expected classes in [0, {vocabulary}) or {ignore_index}, got {int(wrong)}")
    w, b = weight.to(compute), None if bias is None else bias.to(compute).contiguous()
    scale = None if grad_losses is None else grad_losses[kept].to(compute).contiguous()
    losses = hidden.new_empty(count, dtype=compute)
    known = lse is not None
    lse_kept = losses.new_empty(count) if lse is None else lse[kept].contiguous()
    grad_x = large(losses.new_empty(count, hidden.shape[1])) if need_hidden else None
    grad_w = large(torch.empty_like(w, memory_format=torch.contiguous_format)) if need_weight else None
    partials = torch.get_num_threads()
    grad_b = losses.new_zeros(partials, vocabulary) if need_weight and b is not None else None

    if not count and grad_w is not None:
        grad_w.zero_()
    blocks = max(1, -(-count // max(_MIN_BLOCK_ROWS, _BLOCK_LOGITS // max(vocabulary, 1))))
    block_rows = -(-count // blocks)
    buffer = large(losses.new_empty(block_rows, vocabulary))
    for first in range(0, count, max(block_rows, 1)):
        rows_here = slice(first, min(first + block_rows, count))
        x_block = x[rows_here].to(compute)
        logits = torch.mm(x_block, w.T, out=buffer[: x_block.shape[0]])
        CORE.cross_entropy_block(
            compute == torch.float64, pointer(logits), pointer(b), pointer(y[rows_here]),
            pointer(None if scale is None else scale[rows_here]), pointer(losses[rows_here]),
            pointer(lse_kept[rows_here]), pointer(grad_b), partials, x_block.shape[0], vocabulary, gradient, known,
        )  # fmt: skip
        if grad_x is not None:
            torch.mm(logits, w, out=grad_x[rows_here])
        if grad_w is not None:
            grad_w.addmm_(logits.T, x_block, beta=0 if first == 0 else 1)

    if compact:
        losses = torch.zeros(rows, dtype=compute).index_copy_(0, kept, losses)
        lse_kept = torch.zeros(rows, dtype=compute).index_copy_(0, kept, lse_kept)
        if grad_x is not None:
            grad_x = torch.zeros(rows, hidden.shape[1], dtype=compute).index_copy_(0, kept, grad_x)
    return losses, lse_kept, grad_x, grad_w, None if grad_b is None else grad_b.sum(0)


def _cpu_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    return _cpu_blocks(hidden, weight, bias, target, ignore_index)[:2]


def _cpu_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    losses, lse, *grads = _cpu_blocks(
        hidden, weight, bias, target, ignore_index,
        gradient=True, need_hidden=need_hidden, need_weight=need_weight,
    )  # fmt: skip
    return losses, lse, *_select(lse, grads, need_hidden, need_weight)


def _cpu_backward(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    sum_gradients: list[Tensor],
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = grad_losses[target != ignore_index]
    grads: list[Tensor | None]
    if sum_gradients and bool((weights == weights[:1]).all()):
        factor = weights[0] if weights.numel() else 1  # no row is left: the gradients are zero
        grads = [torch.mul(g, factor, out=large(torch.empty_like(g))) for g in sum_gradients]
    else:
        *_, grad_hidden, grad_weight, grad_bias = _cpu_blocks(
            hidden, weight, bias, target, ignore_index,
            gradient=True, grad_losses=grad_losses, lse=lse, need_hidden=need_hidden, need_weight=need_weight,
        )  # fmt: skip
        grads = [grad_hidden, grad_weight, grad_bias]
    grads = [None if g is None else g.to(hidden.dtype) for g in grads]
    return _select(hidden, grads, need_hidden, need_weight)


# -------------------------------------------------------------------------------------------- Triton on CUDA
_triton_forward = kernel("cross_entropy", "forward")
_triton_backward = kernel("cross_entropy", "backward")


def _cuda_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    if hidden.dtype == torch.float64:
        return reference(hidden, weight, bias, target, ignore_index)
    return _triton_forward(hidden.contiguous(), weight.contiguous(), bias, target.contiguous(), ignore_index)


def _cuda_backward(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    sum_gradients: list[Tensor],
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if hidden.dtype == torch.float64:
        return reference_backward(
            grad_losses, hidden, weight, bias, target, lse, ignore_index, [], need_hidden, need_weight
        )
    grads = _triton_backward(
        grad_losses.contiguous(), hidden.contiguous(), weight.contiguous(), bias, target.contiguous(), lse,
        ignore_index, need_hidden, need_weight,
    )  # fmt: skip
    return _select(hidden, list(grads), need_hidden, need_weight)


# ------------------------------------------------------------------------------------------ schema, autograd
def _fake_forward(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(hidden)
    losses = hidden.new_empty(hidden.shape[:1], dtype=compute)
    return losses, torch.empty_like(losses)


def _fake_gradients(
    like: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [None if x is None else x.new_empty(x.shape, dtype=like.dtype) for x in (hidden, weight, bias)]
    return _select(like, grads, need_hidden, need_weight)


def _fake_with_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int,
                         need_hidden: bool, need_weight: bool) -> tuple[Tensor, ...]:  # fmt: skip
    losses, lse = _fake_forward(hidden)
    return losses, lse, *_fake_gradients(lse, hidden, weight, bias, need_hidden, need_weight)


def _fake_backward(grad_losses: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
                   lse: Tensor, ignore_index: int, sum_gradients: list[Tensor], need_hidden: bool,
                   need_weight: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _fake_gradients(hidden, hidden, weight, bias, need_hidden, need_weight)


_forward = register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore_index) "
    "-> (Tensor, Tensor)",
    reference=reference,
    fake=_fake_forward,
    cpu=_cpu_forward,
    cuda=_cuda_forward,
)
_with_gradients = register(
    "linear_cross_entropy_with_gradients(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
    "int ignore_index, bool need_hidden, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference_with_gradients,
    fake=_fake_with_gradients,
    cpu=_cpu_with_gradients,
    cuda=None,
)
_backward = register(
    "linear_cross_entropy_backward(Tensor grad_losses, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
    "Tensor lse, int ignore_index, Tensor[] sum_gradients, bool need_hidden, bool need_weight) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=_fake_backward,
    cpu=_cpu_backward,
    cuda=_cuda_backward,
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
                ignore_index: int) -> Tensor:  # fmt: skip
        need_hidden, need_weight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        if hidden.device.type == "cpu" and CORE is not None and (need_hidden or need_weight):
            losses, lse, *sum_gradients = _with_gradients(
                hidden, weight, bias, target, ignore_index, need_hidden, need_weight
            )
        else:
            losses, lse = _forward(hidden, weight, bias, target, ignore_index)
            sum_gradients = []
        ctx.save_for_backward(hidden, weight, bias, target, lse, *sum_gradients)
        ctx.ignore_index, ctx.needs = ignore_index, (need_hidden, need_weight)
        return losses

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, lse, *sum_gradients = ctx.saved_tensors
        grads = _backward(grad_losses, hidden, weight, bias, target, lse, ctx.ignore_index, sum_gradients, *ctx.needs)
        return *(g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=False)), None, None


# -------------------------------------------------------------------------------------------------- public
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """``F.cross_entropy(F.linear(hidden, weight, bias), target)`` without keeping the logits.

    Args:
        hidden: (..., hidden), float32, float64, bfloat16 or float16.
        weight: (vocabulary, hidden), like `hidden` (or any of these types under autocast).
        target: class indices, int64 (...), in [0, vocabulary) or equal to `ignore_index`.
        bias: (vocabulary,), like `hidden`, or None.
        ignore_index: rows with this target give no loss and no gradient, and cost nothing on CPU.
        reduction: "mean" over the rows not ignored (NaN if there is none, as in torch), "sum", or "none".

    Returns:
        Loss in nats, float32 (float64 for float64 input): a scalar, or (...) for "none".

    Raises:
        TypeError, ValueError: naming the argument whose type, shape or device is wrong.
        IndexError: if a target is out of range (on CUDA its loss is NaN instead, as checking would synchronise).

    Soft targets, class weights and label smoothing are not offered.
    """
    check_float("hidden", hidden)
    check_float("weight", weight)
    weight, hidden, bias = in_autocast_dtype(weight, hidden, bias)
    check_like("weight", weight, "hidden", hidden)
    check_index("target", target, "hidden", hidden)
    if hidden.dim() == 0:
        raise ValueError("hidden: expected shape (..., hidden), got ()")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected (vocabulary, hidden) with hidden = {tuple(hidden.shape[-1:])} as in hidden, "
            f"got {tuple(weight.shape)}"
        )
    check_shape("target", target, tuple(hidden.shape[:-1]), "hidden.shape[:-1]")
    if bias is not None:
        check_like("bias", bias, "hidden", hidden)
        check_shape("bias", bias, (weight.shape[0],), "(vocabulary,)")
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if not torch.is_grad_enabled():  # needs_input_grad ignores it: the gradients would be made for nobody
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    losses = _LinearCrossEntropy.apply(
        hidden.reshape(target.numel(), hidden.shape[-1]), weight, bias, target.reshape(-1), ignore_index
    )
    if reduction == "none":
        return losses.reshape(target.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (target != ignore_index).sum()
