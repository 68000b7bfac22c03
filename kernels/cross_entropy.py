"""Linear layer and cross-entropy without the (N, V) logits whole in memory.

What: the sum over a row's targets of ``logsumexp(logits[n]) - logits[n, target]`` with
``logits = hidden @ weight.T + bias``, labels smoothed or not; the definition is the reference in
``fastvae/ops/cross_entropy.py``. One target a row is a language model, many are a bag of words.

Why: the products cost 6*N*V*H FLOPs in eager PyTorch, which besides writes and reads the N*V logits, their
softmax and their gradient: at N = 960, V = 10,000 three times 38 MB in float32, against 11 MB of operands.
Here the forward keeps logits in registers, and the backward makes them again (2*N*V*H FLOPs more) into a
bounded buffer.

How: forward, a program takes a block of rows through one slice of the vocabulary, carrying a running maximum
and sum (online log-sum-exp); the vocabulary is cut into as many slices as fill the GPU when rows are few, and
a second kernel joins them. What the loss takes off the log-sum-exp, the targets' logits and with label
smoothing a part of all, is one number a row and slice. Backward, for a slice of the vocabulary at a time, one
kernel makes the logits' gradient ``(count * softmax - onehots) * grad_loss`` in the operands' dtype, and two
plain products (cuBLAS, whatever H) turn it into the slice's part of the gradients. No atomics: the same inputs
always give the same bits.

Limits: float32, bfloat16 and float16; any N, V, H; contiguous operands. The backward's buffer holds at most
max(4 Mi, 512 * N) elements, which is all of a small problem. In 16-bit, grad_hidden adds up float32 sums of
16-bit slices. Each target costs a comparison for every logit of its row: tens of targets a row, not thousands.
A target out of range gives its row a NaN loss, hence NaN gradients of that row's hidden and of all weights;
memory is never read outside the operands. float32 products follow ``torch.set_float32_matmul_precision`` (see
``precision.py``); a float32 forward at "highest" runs without tensor cores.

Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; Wijmans et al. 2024, "Cut your
losses".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.precision import UPCAST_OPERANDS, dot_precision

_BLOCK_N, _BLOCK_V = 64, 64
_FORWARD_PROGRAMS = 512  # about four for each multiprocessor of the largest GPUs
_BUFFER_ELEMENTS = 1 << 22
_BUFFER_MIN_COLUMNS = 512


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row.

    Args:
        hidden: (N, H), float32, bfloat16 or float16.
        weight: (V, H), like `hidden`.
        bias: (V,), like `hidden`, or None.
        target: int64 (N, words).
        ignore_index: targets equal to it count nothing; rows without any other have loss and logsumexp 0.
        label_smoothing: part of each target's weight that is spread evenly over the vocabulary.

    Returns:
        losses and logsumexp of the logits in nats, float32 (N,).
    """
    _check_dtype(hidden)
    (rows, hidden_size), vocabulary = hidden.shape, weight.shape[0]
    losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    lse = torch.empty_like(losses)
    if rows == 0:
        return losses, lse
    row_blocks, vocabulary_blocks = triton.cdiv(rows, _BLOCK_N), triton.cdiv(vocabulary, _BLOCK_V)
    wanted_slices = min(max(_FORWARD_PROGRAMS // row_blocks, 1), max(vocabulary_blocks, 1))
    slice_blocks = max(triton.cdiv(vocabulary_blocks, wanted_slices), 1)
    slices = triton.cdiv(vocabulary_blocks, slice_blocks)
    partial_lse = torch.empty((slices, rows), dtype=torch.float32, device=hidden.device)
    partial_taken = torch.empty_like(partial_lse)
    if slices > 0:
        _cross_entropy_forward_kernel[(row_blocks, slices)](
            hidden, weight, hidden if bias is None else bias, target, partial_lse, partial_taken,
            rows, vocabulary, hidden_size, target.shape[1], slice_blocks, ignore_index, label_smoothing,
            SMOOTH=int(label_smoothing > 0), **_product_options(hidden, bias),
        )  # fmt: skip
    _cross_entropy_join_kernel[(triton.cdiv(rows, 128),)](
        partial_lse, partial_taken, target, losses, lse, rows, vocabulary, target.shape[1], slices, ignore_index,
        BLOCK_N=128, num_warps=4,
    )  # fmt: skip
    return losses, lse


def backward(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`forward`'s losses; arguments as there.

    Args:
        grad_losses: float32 (N,).
        lse: float32 (N,), from the forward.
        need_hidden: whether to compute the gradient of `hidden`.
        need_weight: whether to compute those of `weight` and `bias`.

    Returns:
        Gradients of hidden, weight and bias in their dtype; None for those not needed.
    """
    _check_dtype(hidden)
    (rows, hidden_size), vocabulary = hidden.shape, weight.shape[0]
    sums = torch.zeros((rows, hidden_size), dtype=torch.float32, device=hidden.device) if need_hidden else None
    grad_weight = torch.zeros_like(weight) if need_weight else None
    grad_bias = torch.zeros_like(bias) if need_weight and bias is not None else None
    if rows == 0 or not (need_hidden or need_weight):
        return None if sums is None else sums.to(hidden.dtype), grad_weight, grad_bias

    columns = max(_BUFFER_MIN_COLUMNS, _BUFFER_ELEMENTS // max(rows, 2 * _BLOCK_N) // _BLOCK_V * _BLOCK_V)
    buffer = torch.empty(rows * min(columns, vocabulary), dtype=hidden.dtype, device=hidden.device)
    for start in range(0, vocabulary, columns):
        stop = min(start + columns, vocabulary)
        grad_logits = buffer[: rows * (stop - start)].view(rows, stop - start)
        _cross_entropy_grad_logits_kernel[(triton.cdiv(rows, _BLOCK_N), triton.cdiv(stop - start, _BLOCK_V))](
            hidden, weight, hidden if bias is None else bias, target, lse, grad_losses, grad_logits,
            rows, vocabulary, hidden_size, target.shape[1], start, stop, ignore_index, label_smoothing,
            **_product_options(hidden, bias),
        )  # fmt: skip
        if sums is not None and hidden.dtype == torch.float32:
            sums.addmm_(grad_logits, weight[start:stop])
        elif sums is not None:
            sums += grad_logits @ weight[start:stop]
        if grad_weight is not None:
            torch.mm(grad_logits.t(), hidden, out=grad_weight[start:stop])
        if grad_bias is not None:
            grad_bias[start:stop] = grad_logits.sum(0, dtype=torch.float32)
    return None if sums is None else sums.to(hidden.dtype), grad_weight, grad_bias


def _check_dtype(hidden: Tensor) -> None:
    if hidden.dtype == torch.float64:
        raise TypeError("hidden: expected float32, bfloat16 or float16, got torch.float64")


def _product_options(hidden: Tensor, bias: Tensor | None) -> dict[str, int | str]:
    precision = dot_precision()
    # Without tensor cores a step's operands lie in registers: longer steps would take all 255 of a thread.
    block_k, stages = (16, 2) if hidden.dtype == torch.float32 and precision == "ieee" else (32, 3)
    return {
        "HAS_BIAS": int(bias is not None), "UPCAST": UPCAST_OPERANDS, "PRECISION": precision,
        "BLOCK_N": _BLOCK_N, "BLOCK_V": _BLOCK_V, "BLOCK_K": block_k, "num_warps": 4, "num_stages": stages,
    }  # fmt: skip


@triton.jit
def _logits_tile(
    hidden_ptr, weight_ptr, bias_ptr, row, column, rows, columns_end, hidden_size,
    HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        hidden = tl.load(
            hidden_ptr + row[:, None] * hidden_size + k[None, :],
            mask=(row < rows)[:, None] & (k < hidden_size)[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + column[None, :] * hidden_size + k[:, None],
            mask=(column < columns_end)[None, :] & (k < hidden_size)[:, None],
            other=0.0,
        )
        if UPCAST:
            hidden = hidden.to(tl.float32)
            weight = weight.to(tl.float32)
        logits = tl.dot(hidden, weight, logits, input_precision=PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column < columns_end, other=0.0).to(tl.float32)
        logits += bias[None, :]
    return logits


@triton.jit
def _count_targets(target_ptr, row, rows, words, vocabulary, ignore_index, BLOCK_N: tl.constexpr):
    # Targets of each row that are not ignored, and whether all of them are in range.
    count = tl.zeros((BLOCK_N,), tl.float32)
    valid = tl.full((BLOCK_N,), 1, tl.int1)
    for word in range(words):
        target = tl.load(target_ptr + row * words + word, mask=row < rows, other=0)
        kept = target != ignore_index
        count += kept.to(tl.float32)
        valid = valid & ((kept == 0) | ((target >= 0) & (target < vocabulary)))
    return count, valid


_RUN_TIME = ["rows", "words", "slice_blocks", "ignore_index", "label_smoothing"]


@triton.jit(do_not_specialize=_RUN_TIME)
def _cross_entropy_forward_kernel(
    hidden_ptr,  # (N, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,)
    target_ptr,  # (N, words) int64
    partial_lse_ptr,  # (slices, N) float32
    partial_taken_ptr,  # (slices, N) float32: what the loss takes off count * logsumexp
    rows,
    vocabulary,
    hidden_size,
    words,
    slice_blocks,
    ignore_index,
    label_smoothing,
    SMOOTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * slice_blocks * BLOCK_V
    last = tl.minimum(first + slice_blocks * BLOCK_V, vocabulary)
    maximum = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    picked = tl.zeros((BLOCK_N,), tl.float32)
    every = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, last, BLOCK_V):
        column = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_V)
        logits = _logits_tile(
            hidden_ptr, weight_ptr, bias_ptr, row, column, rows, last, hidden_size,
            HAS_BIAS, UPCAST, PRECISION, BLOCK_N, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        for word in range(words):
            target = tl.load(target_ptr + row * words + word, mask=row < rows, other=-1)
            here = (column[None, :] == target[:, None]) & (target != ignore_index)[:, None] & (column < last)[None, :]
            picked += tl.sum(tl.where(here, logits, 0.0), axis=1)
        if SMOOTH:
            every += tl.sum(tl.where((column < last)[None, :], logits, 0.0), axis=1)
        logits = tl.where((column < last)[None, :], logits, float("-inf"))
        # NaN logits may get lost in the maximum; the sum keeps them.
        new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
        # Words masked by a bias of -inf may fill a block: -inf - (-inf) would be NaN.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        maximum = new_maximum
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    partial = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(partial_lse_ptr + partial, shift + tl.log(total), mask=row < rows)
    if SMOOTH:
        count, _ = _count_targets(target_ptr, row, rows, words, vocabulary, ignore_index, BLOCK_N)
        picked += label_smoothing * (count * (every / vocabulary) - picked)
    tl.store(partial_taken_ptr + partial, picked, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "vocabulary", "words", "slices", "ignore_index"])
def _cross_entropy_join_kernel(
    partial_lse_ptr,  # (slices, N) float32
    partial_taken_ptr,  # (slices, N) float32
    target_ptr,  # (N, words) int64
    losses_ptr,  # (N,) float32
    lse_ptr,  # (N,) float32
    rows,
    vocabulary,
    words,
    slices,
    ignore_index,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row < rows
    maximum = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    taken = tl.zeros((BLOCK_N,), tl.float32)
    partial = row
    for _ in range(slices):
        taken += tl.load(partial_taken_ptr + partial, mask=mask, other=0.0)
        value = tl.load(partial_lse_ptr + partial, mask=mask, other=0.0)
        new_maximum = tl.maximum(maximum, value)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp(maximum - shift) + tl.exp(value - shift)
        maximum = new_maximum
        partial += rows
    lse = tl.where(maximum == float("-inf"), 0.0, maximum) + tl.log(total)
    count, valid = _count_targets(target_ptr, row, rows, words, vocabulary, ignore_index, BLOCK_N)
    loss = tl.where(valid, count * lse - taken, float("nan"))
    tl.store(losses_ptr + row, tl.where(count == 0, 0.0, loss), mask=mask)
    tl.store(lse_ptr + row, tl.where(count == 0, 0.0, lse), mask=mask)


@triton.jit(do_not_specialize=["rows", "words", "start", "stop", "ignore_index", "label_smoothing"])
def _cross_entropy_grad_logits_kernel(
    hidden_ptr,  # (N, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,)
    target_ptr,  # (N, words) int64
    lse_ptr,  # (N,) float32
    grad_losses_ptr,  # (N,) float32
    grad_logits_ptr,  # (N, stop - start)
    rows,
    vocabulary,
    hidden_size,
    words,
    start,
    stop,
    ignore_index,
    label_smoothing,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offset = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    column = start.to(tl.int64) + offset
    logits = _logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, row, column, rows, stop, hidden_size,
        HAS_BIAS, UPCAST, PRECISION, BLOCK_N, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    mask = row < rows
    count, valid = _count_targets(target_ptr, row, rows, words, vocabulary, ignore_index, BLOCK_N)
    lse = tl.load(lse_ptr + row, mask=mask, other=0.0)
    grad_loss = tl.load(grad_losses_ptr + row, mask=mask, other=0.0)
    grad_loss = tl.where(valid, grad_loss, float("nan"))
    grad_logits = count[:, None] * (tl.exp(logits - lse[:, None]) - label_smoothing / vocabulary)
    for word in range(words):
        target = tl.load(target_ptr + row * words + word, mask=mask, other=-1)
        here = (column[None, :] == target[:, None]) & (target != ignore_index)[:, None]
        grad_logits -= tl.where(here, 1.0 - label_smoothing, 0.0)
    # Assigned, not multiplied: the lse of an ignored row is 0, and its softmax may overflow.
    grad_logits = tl.where((count == 0)[:, None], 0.0, grad_logits * grad_loss[:, None])
    tl.store(
        grad_logits_ptr + row[:, None] * (stop - start) + offset[None, :],
        grad_logits.to(grad_logits_ptr.dtype.element_ty),
        mask=mask[:, None] & (column < stop)[None, :],
    )
