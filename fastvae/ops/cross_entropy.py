"""Linear layer and cross-entropy together, without the (rows, vocabulary) logits ever whole in memory.

    loss[n] = sum over the targets t of row n of logsumexp(logits[n]) - logits[n, t], logits = hidden @ weight.T + bias

A language model has one target a row, a bag of words many: the ops take (rows, words) and share one kernel. With label
smoothing eps, logits[n, t] stands for (1 - eps) logits[n, t] + eps mean(logits[n]).

On CPU the rows go through in blocks, and where gradients are wanted they are taken at once, while the block is still
there. That takes the gradient of the *sum* of the losses. A backward whose row gradients are all equal, as for a mean
or a sum, only scales it; any other runs the blocks again. On CUDA the logits are made again in the backward.
"""

import math
import threading
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
    recording,
    register,
)
from fastvae.ops.checks import check_choice, check_float, check_index, check_like, check_shape

_SLICE = 256  # of hidden that the core goes through at a time (kSlice)
_BLOCK_LOGITS = 2_500_000  # logits of a block of rows that are kept for its gradients: 10 MB of float32
_MIN_BLOCK_ROWS = 160  # below this the products are bound by reading the weight and adding to its gradient
_BLOCK_HIDDEN = 1 << 17  # numbers of a block of rows of hidden, a slice of it, to stay in the second cache
_KEPT_SCRATCH = 4 << 20  # bytes


# ------------------------------------------------------------------------------------------------ reference
def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Eager definition: losses and logsumexp of the logits, both (rows,), 0 at rows whose targets are all ignored."""
    compute = compute_dtype(hidden)
    logits = F.linear(hidden.to(compute), weight.to(compute), None if bias is None else bias.to(compute))
    log_p, count = F.log_softmax(logits, -1), (target != ignore_index).sum(1)
    losses = log_p.new_zeros(target.shape[0])
    for word in target.unbind(1):
        losses = losses + F.nll_loss(log_p, word, ignore_index=ignore_index, reduction="none")
    if label_smoothing:
        even = (-count * log_p.mean(1)).masked_fill(count == 0, 0)
        losses = (1 - label_smoothing) * losses + label_smoothing * even
    return losses, torch.logsumexp(logits, -1).masked_fill(count == 0, 0)


def reference_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, logsumexp and, by autograd, the gradients of the losses' sum; those not needed have no elements.

    The gradients have the losses' type: in float16 a sum over many rows would overflow before it is scaled.
    """
    compute = compute_dtype(hidden)
    inputs = [t.detach().to(compute).requires_grad_() for t in (hidden, weight, bias) if t is not None]
    with recording():
        operands = (inputs[0], inputs[1], inputs[2] if bias is not None else None)
        losses, lse = reference(*operands, target, ignore_index, label_smoothing)
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
    label_smoothing: float,
    sum_gradients: list[Tensor],
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference`'s losses by autograd; those not needed have no elements."""
    inputs = [t.detach().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    with recording():
        operands = (inputs[0], inputs[1], inputs[2] if bias is not None else None)
        losses = reference(*operands, target, ignore_index, label_smoothing)[0]
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
def _cpu(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    *,
    grad_losses: Tensor | None = None,
    lse: Tensor | None = None,
    need_hidden: bool = False,
    need_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return losses (unless `lse` is given), lse and the gradients of sum(grad_losses * losses)."""
    assert CORE is not None
    (rows, size), vocabulary, compute = hidden.shape, weight.shape[0], compute_dtype(hidden)
    hidden, weight, target = hidden.contiguous(), weight.contiguous(), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    scale = None if grad_losses is None else grad_losses.to(compute).contiguous()
    known = lse is not None
    losses = hidden.new_empty(0 if known else rows, dtype=compute)
    lse = torch.empty_like(losses) if lse is None else lse
    grad_hidden = losses.new_empty(rows, size) if need_hidden else None
    grad_weight = large(losses.new_empty(vocabulary, size)) if need_weight else None
    grad_bias = losses.new_empty(vocabulary) if need_weight and bias is not None else None

    most = max(64, _BLOCK_HIDDEN // min(max(size, 1), _SLICE))
    if not known and (need_hidden or need_weight):
        most = min(most, max(_MIN_BLOCK_ROWS, _BLOCK_LOGITS // max(vocabulary, 1)))
    blocks = max(-(-rows // most), 1)
    arguments = (
        dtype_code(hidden), pointer(hidden), pointer(weight), pointer(bias), pointer(target), rows, size, vocabulary,
        target.shape[1], ignore_index, label_smoothing, pointer(scale), pointer(losses), pointer(lse), known,
        pointer(grad_hidden), pointer(grad_weight), pointer(grad_bias), -(-rows // blocks), torch.get_num_threads(),
    )  # fmt: skip
    scratch = _scratch(CORE.cross_entropy(True, *arguments, 0))
    found = CORE.cross_entropy(False, *arguments, pointer(scratch))
    if found < 0:
        wrong = int(target.flatten()[-1 - found])
        raise IndexError(f"target: expected classes in [0, {vocabulary}) or {ignore_index}, got {wrong}")
    return losses, lse, grad_hidden, grad_weight, grad_bias


_KEPT = threading.local()


def _scratch(size: int) -> Tensor:
    # Fresh memory costs a small problem more than its products. Each thread keeps what it had, up to a bound.
    if size > _KEPT_SCRATCH:
        return large(torch.empty(size, dtype=torch.uint8))
    kept: Tensor | None = getattr(_KEPT, "scratch", None)
    if kept is None or kept.numel() < size:
        kept = _KEPT.scratch = torch.empty(size, dtype=torch.uint8)
    return kept


def _cpu_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    return _cpu(hidden, weight, bias, target, ignore_index, label_smoothing)[:2]


def _cpu_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    losses, lse, *grads = _cpu(
        hidden, weight, bias, target, ignore_index, label_smoothing, need_hidden=need_hidden, need_weight=need_weight
    )
    return losses, lse, *_select(lse, grads, need_hidden, need_weight)


def _cpu_backward(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    sum_gradients: list[Tensor],
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads: list[Tensor | None]
    if sum_gradients and (factor := _equal_gradient(grad_losses, target, ignore_index)) is not None:
        grads = [torch.mul(g, factor, out=large(torch.empty_like(g))) for g in sum_gradients]
    else:
        grads = [
            *_cpu(
                hidden, weight, bias, target, ignore_index, label_smoothing,
                grad_losses=grad_losses, lse=lse, need_hidden=need_hidden, need_weight=need_weight,
            )[2:]
        ]  # fmt: skip
    grads = [None if g is None else g.to(hidden.dtype) for g in grads]
    return _select(hidden, grads, need_hidden, need_weight)


def _equal_gradient(grad_losses: Tensor, target: Tensor, ignore_index: int) -> float | None:
    # What all rows that have a target share; None if they differ.
    if grad_losses.stride(0) != 0:
        grad_losses = grad_losses[(target != ignore_index).any(1)]
    if not grad_losses.numel():
        return 1.0  # no row is left: the gradients are zero
    first = grad_losses[0].item()
    # An infinite one may be the mean over no row, and must not meet those zeros.
    return (
        first if math.isfinite(first) and (grad_losses.stride(0) == 0 or bool((grad_losses == first).all())) else None
    )


# -------------------------------------------------------------------------------------------- Triton on CUDA
_triton_forward = kernel("cross_entropy", "forward")
_triton_backward = kernel("cross_entropy", "backward")


def _cuda_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    if hidden.dtype == torch.float64:
        return reference(hidden, weight, bias, target, ignore_index, label_smoothing)
    bias = None if bias is None else bias.contiguous()
    operands = (hidden.contiguous(), weight.contiguous(), bias, target.contiguous())
    return _triton_forward(*operands, ignore_index, label_smoothing)


def _cuda_backward(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    sum_gradients: list[Tensor],
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if hidden.dtype == torch.float64:
        return reference_backward(
            grad_losses, hidden, weight, bias, target, lse, ignore_index, label_smoothing, [], need_hidden, need_weight
        )
    grads = _triton_backward(
        grad_losses.contiguous(), hidden.contiguous(), weight.contiguous(),
        None if bias is None else bias.contiguous(), target.contiguous(), lse,
        ignore_index, label_smoothing, need_hidden, need_weight,
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
                         label_smoothing: float, need_hidden: bool,
                         need_weight: bool) -> tuple[Tensor, ...]:  # fmt: skip
    losses, lse = _fake_forward(hidden)
    return losses, lse, *_fake_gradients(lse, hidden, weight, bias, need_hidden, need_weight)


def _fake_backward(grad_losses: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
                   lse: Tensor, ignore_index: int, label_smoothing: float, sum_gradients: list[Tensor],
                   need_hidden: bool, need_weight: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _fake_gradients(hidden, hidden, weight, bias, need_hidden, need_weight)


_forward = register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore_index, "
    "float label_smoothing) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake_forward,
    cpu=_cpu_forward,
    cuda=_cuda_forward,
)
_with_gradients = register(
    "linear_cross_entropy_with_gradients(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
    "int ignore_index, float label_smoothing, bool need_hidden, bool need_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference_with_gradients,
    fake=_fake_with_gradients,
    cpu=_cpu_with_gradients,
    cuda=None,
)
_backward = register(
    "linear_cross_entropy_backward(Tensor grad_losses, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
    "Tensor lse, int ignore_index, float label_smoothing, Tensor[] sum_gradients, bool need_hidden, "
    "bool need_weight) -> (Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=_fake_backward,
    cpu=_cpu_backward,
    cuda=_cuda_backward,
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
                ignore_index: int, label_smoothing: float) -> Tensor:  # fmt: skip
        need_hidden, need_weight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        settings = (ignore_index, label_smoothing)
        sum_gradients: list[Tensor] = []
        if hidden.device.type == "cpu" and CORE is not None and (need_hidden or need_weight):
            losses, lse, *sum_gradients = _with_gradients(
                hidden, weight, bias, target, *settings, need_hidden, need_weight
            )
        else:
            losses, lse = _forward(hidden, weight, bias, target, *settings)
        # As large as the weight: outside compiled graphs the backward scales them in place and gives them away, which
        # what is saved with `save_for_backward` does not allow.
        ctx.given_away = bool(sum_gradients) and not torch.compiler.is_compiling()
        ctx.sum_gradients = sum_gradients if ctx.given_away else None
        ctx.save_for_backward(hidden, weight, bias, target, lse, *([] if ctx.given_away else sum_gradients))
        ctx.settings, ctx.needs = settings, (need_hidden, need_weight)
        return losses

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, lse, *sum_gradients = ctx.saved_tensors
        factor = _equal_gradient(grad_losses, target, ctx.settings[0]) if ctx.given_away else None
        if factor is not None:
            mine, ctx.sum_gradients = ctx.sum_gradients, None
            if mine is None:  # the graph is used a second time
                mine = _with_gradients(hidden, weight, bias, target, *ctx.settings, *ctx.needs)[2:]
            grads = tuple(g.mul_(factor).to(hidden.dtype) for g in mine)
        else:
            grads = _backward(grad_losses, hidden, weight, bias, target, lse, *ctx.settings, sum_gradients, *ctx.needs)
        return *(g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=False)), None, None, None


# -------------------------------------------------------------------------------------------------- public
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0,  # not 0.0: under dynamic shapes the compiler takes it for a variable, and starts twice
    reduction: str = "mean",
) -> Tensor:
    """``F.cross_entropy(F.linear(hidden, weight, bias), target)`` without keeping the logits.

    Args:
        hidden: (..., hidden), float32, float64, bfloat16 or float16.
        weight: (vocabulary, hidden), like `hidden` (or any of these types under autocast).
        target: class indices, int64 (...), in [0, vocabulary) or equal to `ignore_index`.
        bias: (vocabulary,), like `hidden`, or None.
        ignore_index: rows with this target give no loss and no gradient, and cost nothing on CPU.
        label_smoothing: in [0, 1]: this part of each target's weight is spread evenly over the vocabulary
            (Szegedy et al. 2016, section 7).
        reduction: "mean" over the rows not ignored (NaN if there is none, as in torch), "sum", or "none".

    Returns:
        Loss in nats, float32 (float64 for float64 input): a scalar, or (...) for "none".

    Raises:
        TypeError, ValueError: naming the argument whose type, shape, device or value is wrong.
        IndexError: if a target is out of range (on CUDA its loss is NaN instead, as checking would synchronise).

    Soft targets and class weights are not offered. On CPU each thread that calls this keeps up to 4 MiB of scratch.
    """
    weight, hidden, bias = _checked(hidden, weight, bias)
    check_index("target", target, "hidden", hidden)
    check_shape("target", target, tuple(hidden.shape[:-1]), "hidden.shape[:-1]")
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    losses = _losses(hidden, weight, bias, target.reshape(target.numel(), 1), ignore_index, float(label_smoothing))
    if reduction == "none":
        return losses.reshape(target.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (target != ignore_index).sum()


def bag_of_words_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of a sentence's words, each drawn from softmax(weight @ hidden + bias), in any order.

    The auxiliary loss that makes a latent variable tell which words the sentence has (Zhao et al. 2017, equation 10).

    Args:
        hidden: (..., hidden), float32, float64, bfloat16 or float16: one vector a sentence.
        weight: (vocabulary, hidden), like `hidden` (or any of these types under autocast).
        targets: words, int64 (..., words), in [0, vocabulary) or equal to `ignore_index`; a word that occurs twice
            counts twice.
        bias: (vocabulary,), like `hidden`, or None.
        lengths: int64 (...): the words of a sentence that count are the first so many; None for all.
        ignore_index: words equal to it count nothing.
        reduction: "mean" over the sentences, "sum", or "none".

    Returns:
        Loss in nats, summed over the words of a sentence, float32 (float64 for float64 input): a scalar, or (...) for
        "none".

    Raises:
        TypeError, ValueError: naming the argument whose type, shape or device is wrong.
        IndexError: if a word is out of range (on CUDA its sentence's loss is NaN instead).
    """
    weight, hidden, bias = _checked(hidden, weight, bias)
    check_index("targets", targets, "hidden", hidden)
    if targets.shape[:-1] != hidden.shape[:-1] or targets.dim() != hidden.dim():
        expected = f"(*hidden.shape[:-1], words) = ({', '.join(map(str, (*hidden.shape[:-1], 'words')))})"
        raise ValueError(f"targets: expected shape {expected}, got {tuple(targets.shape)}")
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if lengths is not None:
        check_index("lengths", lengths, "hidden", hidden)
        check_shape("lengths", lengths, tuple(hidden.shape[:-1]), "hidden.shape[:-1]")
        beyond = torch.arange(targets.shape[-1], device=targets.device) >= lengths.unsqueeze(-1)
        targets = targets.masked_fill(beyond, ignore_index)
    if targets.shape[-1] == 0:
        targets = targets.new_full((*targets.shape[:-1], 1), ignore_index)
    words = targets.reshape(hidden.shape[:-1].numel(), targets.shape[-1])
    losses = _losses(hidden, weight, bias, words, ignore_index, 0.0).reshape(hidden.shape[:-1])
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def _checked(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Any]:
    check_float("hidden", hidden)
    check_float("weight", weight)
    weight, hidden, bias = in_autocast_dtype(weight, hidden, bias)
    check_like("weight", weight, "hidden", hidden)
    if hidden.dim() == 0:
        raise ValueError("hidden: expected shape (..., hidden), got ()")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected (vocabulary, hidden) with hidden = {tuple(hidden.shape[-1:])} as in hidden, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_like("bias", bias, "hidden", hidden)
        check_shape("bias", bias, (weight.shape[0],), "(vocabulary,)")
    return [weight, hidden, bias]


def _losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, label_smoothing: float
) -> Tensor:
    if not torch.is_grad_enabled():  # needs_input_grad ignores it: the gradients would be made for nobody
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    rows = hidden.reshape(target.shape[0], hidden.shape[-1])
    return _LinearCrossEntropy.apply(rows, weight, bias, target, ignore_index, label_smoothing)
