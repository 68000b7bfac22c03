"""Bernoulli and Gaussian negative log-likelihoods summed over features, one pass forward and one backward.

What: ``nll[s, n]``, the sum over the features of a datum of its terms; the definition is the reference in
``fastvae/ops/likelihood.py``. S samples of the prediction share the N targets.

Why: eager PyTorch moves 5 to 10 tensors of S*N*D elements each way and expands the target for some. These kernels read
the prediction and the target and write S*N sums; backward reads both again and writes the gradients that are wanted.
An exponential and a polynomial of 10 multiply-adds an element: bound by memory.

How: a program owns a tile of 512 elements, rows by features, and loops over up to 8192 features of its rows forward;
longer rows are split among programs, whose sums ``torch.sum`` adds. Backward has one tile a program, and goes through
the samples where the gradient of the target is their sum. The gradient of a log-variance that rows share is summed in
registers over a strided set of tiles, then over the programs by ``torch.sum``: no atomics, so the same operands always
give the same bits.

Limits: float32, bfloat16 and float16 (float64 stays with the reference); contiguous operands. A target outside [0, 1]
makes its datum's Bernoulli nll NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 512
_SPLIT = 8192
_MAX_PARTIAL_SUMS = 1024
_NUMBER, _ROW, _FULL = range(3)


def bernoulli_forward(logits: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood of the targets, in nats.

    Args:
        logits: (S, N, D), float32, bfloat16 or float16.
        target: (N, D), of the same type or float32.

    Returns:
        nll, float32 (S, N).
    """
    return _forward(_bernoulli_forward_kernel, logits, target)


def bernoulli_backward(
    grad: Tensor, logits: Tensor, target: Tensor, need_logits: bool, need_target: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`bernoulli_forward`, None where not needed; grad is float32 (S, N)."""
    samples, targets, features = logits.shape
    grad_logits = torch.empty_like(logits) if need_logits else None
    grad_target = (torch.empty_like if samples else torch.zeros_like)(target) if need_target else None
    if logits.numel():
        block_rows, block_features = _tile(features)
        at_once = samples if need_target else 1  # samples that a program goes through
        programs = triton.cdiv(targets, block_rows) * (samples // at_once)
        _bernoulli_backward_kernel[(programs, triton.cdiv(features, block_features))](
            grad, logits, target, *(logits if g is None else g for g in (grad_logits, grad_target)),
            targets, features, at_once,
            NEED_LOGITS=int(need_logits), NEED_TARGET=int(need_target),
            BLOCK_N=block_rows, BLOCK_D=block_features, num_warps=4,
        )  # fmt: skip
    return grad_logits, grad_target


def gaussian_forward(mean: Tensor, target: Tensor, log_var: Tensor) -> Tensor:
    """Negative log-density of the targets, in nats.

    Args:
        mean: (S, N, D), float32, bfloat16 or float16.
        target: (N, D), of the same type or float32.
        log_var: float32 () or (D,), or like `mean`; clamped to [-40, 40].

    Returns:
        nll, float32 (S, N).
    """
    return _forward(_gaussian_nll_forward_kernel, mean, target, log_var, LOG_VAR=_kind(log_var))


def gaussian_backward(
    grad: Tensor, mean: Tensor, target: Tensor, log_var: Tensor, need_mean: bool, need_target: bool, need_log_var: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`gaussian_forward`, None where not needed; grad is float32 (S, N)."""
    samples, targets, features = mean.shape
    kind = _kind(log_var)
    shared = need_log_var and kind != _FULL
    grad_mean = torch.empty_like(mean) if need_mean else None
    grad_target = (torch.empty_like if samples else torch.zeros_like)(target) if need_target else None
    if mean.numel() == 0:
        return grad_mean, grad_target, torch.zeros_like(log_var) if need_log_var else None
    block_rows, block_features = _tile(features)
    at_once = samples if need_target else 1  # samples that a program goes through
    programs = triton.cdiv(targets, block_rows) * (samples // at_once)
    columns = triton.cdiv(features, block_features)
    grad_log_var = torch.empty_like(log_var) if need_log_var else None
    if shared:
        programs = min(programs, _MAX_PARTIAL_SUMS)
        width = features if kind == _ROW else columns
        grad_log_var = torch.empty((programs, width), dtype=torch.float32, device=mean.device)
    _gaussian_nll_backward_kernel[(programs, columns)](
        grad, mean, target, log_var, *(mean if g is None else g for g in (grad_mean, grad_target, grad_log_var)),
        samples, targets, features, at_once,
        LOG_VAR=kind, NEED_MEAN=int(need_mean), NEED_TARGET=int(need_target), NEED_LOG_VAR=int(need_log_var),
        BLOCK_N=block_rows, BLOCK_D=block_features, num_warps=4,
    )  # fmt: skip
    if shared:
        total = grad_log_var.sum(0) if kind == _ROW else grad_log_var.sum()
        grad_log_var = total.masked_fill(log_var.abs() > 40, 0)
    return grad_mean, grad_target, grad_log_var


def _forward(kernel: triton.runtime.JITFunction, prediction: Tensor, *others: Tensor, **flags: int) -> Tensor:
    samples, targets, features = prediction.shape
    if prediction.dtype == torch.float64:
        raise TypeError("prediction: expected float32, bfloat16 or float16, got torch.float64")
    rows, splits = samples * targets, triton.cdiv(features, _SPLIT)
    nll = torch.empty((splits, samples, targets), dtype=torch.float32, device=prediction.device)
    if rows and splits:
        block_rows, block_features = _tile(features)
        kernel[(triton.cdiv(rows, block_rows), splits)](
            prediction, *others, nll, rows, targets, features,
            **flags, SPLIT=_SPLIT, BLOCK_N=block_rows, BLOCK_D=block_features, num_warps=4,
        )  # fmt: skip
    return nll[0] if splits == 1 else nll.sum(0)


def _tile(features: int) -> tuple[int, int]:
    block_features = min(triton.next_power_of_2(features), _TILE)
    return _TILE // block_features, block_features


def _kind(log_var: Tensor) -> int:
    return {0: _NUMBER, 1: _ROW, 3: _FULL}[log_var.dim()]


# log(1 + x) of x in [0, 1], small ones to their last digits: x + x^2 times a minimax polynomial.
@triton.jit
def _log1p(x):
    p = 2.0204568282e-2 - 3.3184685744e-3 * x
    p = p * x - 5.7664413005e-2
    p = p * x + 1.0680552572e-1
    p = p * x - 1.5355394781e-1
    p = p * x + 1.9695399702e-1
    p = p * x - 2.4958586693e-1
    p = p * x + 3.3330512047e-1
    p = p * x - 4.9999931455e-1
    return p * x * x + x


@triton.jit
def _clamp(log_var):
    # Comparisons with NaN are false, so NaN stays; tl.minimum and tl.maximum would drop it.
    return tl.where(log_var > 40.0, 40.0, tl.where(log_var < -40.0, -40.0, log_var))


@triton.jit
def _load_log_var(log_var_ptr, element, column, mask, LOG_VAR: tl.constexpr):
    if LOG_VAR == 0:
        return tl.load(log_var_ptr) + tl.zeros(mask.shape, tl.float32)
    elif LOG_VAR == 1:
        return tl.load(log_var_ptr + column[None, :] + tl.zeros(mask.shape, tl.int32), mask=mask, other=0.0)
    else:
        return tl.load(log_var_ptr + element, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "targets"])
def _bernoulli_forward_kernel(
    logits_ptr,  # (S, N, D)
    target_ptr,  # (N, D)
    nll_ptr,  # (splits, S, N) float32
    rows,
    targets,
    features,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * SPLIT
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(first, min(first + SPLIT, features), BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mask = (row < rows)[:, None] & (column < features)[None, :]
        shared = (row % targets)[:, None] * features + column[None, :]
        logit = tl.load(logits_ptr + row[:, None] * features + column[None, :], mask=mask, other=0.0).to(tl.float32)
        target = tl.load(target_ptr + shared, mask=mask, other=0.0).to(tl.float32)
        weight = tl.where(logit < 0.0, target, 1.0 - target)
        magnitude = tl.abs(logit)
        term = tl.where(weight == 0.0, 0.0, magnitude * weight) + _log1p(tl.exp(-magnitude))
        term = tl.where((target >= 0.0) & (target <= 1.0), term, float("nan"))
        total += tl.where(mask, term, 0.0)
    at = tl.program_id(1) * tl.cast(rows, tl.int64) + row
    tl.store(nll_ptr + at, tl.sum(total, axis=1), mask=row < rows)


@triton.jit(do_not_specialize=["targets", "at_once"])
def _bernoulli_backward_kernel(
    grad_ptr,  # (S, N) float32
    logits_ptr,  # (S, N, D)
    target_ptr,  # (N, D)
    grad_logits_ptr,  # (S, N, D)
    grad_target_ptr,  # (N, D)
    targets,
    features,
    at_once,
    NEED_LOGITS: tl.constexpr,
    NEED_TARGET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(targets, BLOCK_N)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (row < targets)[:, None] & (column < features)[None, :]
    shared = row[:, None] * features + column[None, :]
    target = tl.load(target_ptr + shared, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sample = (tl.program_id(0) // tiles).to(tl.int64) * at_once
    for _ in range(at_once):
        element = sample * targets * features + shared
        grad = tl.load(grad_ptr + sample * targets + row, mask=row < targets, other=0.0)[:, None]
        logit = tl.load(logits_ptr + element, mask=mask, other=0.0).to(tl.float32)
        if NEED_LOGITS:
            tail = tl.exp(-tl.abs(logit))
            tail = tail / (1.0 + tail)
            slope = grad * tl.where(logit < 0.0, tail - target, (1.0 - target) - tail)
            tl.store(grad_logits_ptr + element, slope.to(grad_logits_ptr.dtype.element_ty), mask=mask)
        if NEED_TARGET:
            total -= grad * logit
        sample += 1
    if NEED_TARGET:
        tl.store(grad_target_ptr + shared, total.to(grad_target_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "targets"])
def _gaussian_nll_forward_kernel(
    mean_ptr,  # (S, N, D)
    target_ptr,  # (N, D)
    log_var_ptr,  # (), (D,) or (S, N, D)
    nll_ptr,  # (splits, S, N) float32
    rows,
    targets,
    features,
    LOG_VAR: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * SPLIT
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(first, min(first + SPLIT, features), BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mask = (row < rows)[:, None] & (column < features)[None, :]
        element = row[:, None] * features + column[None, :]
        shared = (row % targets)[:, None] * features + column[None, :]
        mean = tl.load(mean_ptr + element, mask=mask, other=0.0).to(tl.float32)
        target = tl.load(target_ptr + shared, mask=mask, other=0.0).to(tl.float32)
        log_var = _clamp(_load_log_var(log_var_ptr, element, column, mask, LOG_VAR))
        distance = (target - mean) * tl.exp(-0.5 * log_var)
        term = 0.5 * (1.8378770664093453 + log_var + distance * distance)
        total += tl.where(mask, term, 0.0)
    at = tl.program_id(1) * tl.cast(rows, tl.int64) + row
    tl.store(nll_ptr + at, tl.sum(total, axis=1), mask=row < rows)


@triton.jit(do_not_specialize=["samples", "targets", "at_once"])
def _gaussian_nll_backward_kernel(
    grad_ptr,  # (S, N) float32
    mean_ptr,  # (S, N, D)
    target_ptr,  # (N, D)
    log_var_ptr,  # (), (D,) or (S, N, D)
    grad_mean_ptr,  # (S, N, D)
    grad_target_ptr,  # (N, D)
    grad_log_var_ptr,  # (programs, column blocks), (programs, D) or (S, N, D)
    samples,
    targets,
    features,
    at_once,
    LOG_VAR: tl.constexpr,
    NEED_MEAN: tl.constexpr,
    NEED_TARGET: tl.constexpr,
    NEED_LOG_VAR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(targets, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    log_var_total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # One iteration, unless the gradient of a shared log_var is being added up.
    for unit in range(tl.program_id(0), tiles * (samples // at_once), tl.num_programs(0)):
        row = tl.cast(unit % tiles, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (row < targets)[:, None] & (column < features)[None, :]
        shared = row[:, None] * features + column[None, :]
        target = tl.load(target_ptr + shared, mask=mask, other=0.0).to(tl.float32)
        target_total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        sample = tl.cast(unit // tiles, tl.int64) * at_once
        for _ in range(at_once):
            element = sample * targets * features + shared
            grad = tl.load(grad_ptr + sample * targets + row, mask=row < targets, other=0.0)[:, None]
            mean = tl.load(mean_ptr + element, mask=mask, other=0.0).to(tl.float32)
            raw_log_var = _load_log_var(log_var_ptr, element, column, mask, LOG_VAR)
            inverse_std = tl.exp(-0.5 * _clamp(raw_log_var))
            distance = (target - mean) * inverse_std
            slope = grad * distance * inverse_std
            if NEED_MEAN:
                tl.store(grad_mean_ptr + element, (-slope).to(grad_mean_ptr.dtype.element_ty), mask=mask)
            if NEED_TARGET:
                target_total += slope
            if NEED_LOG_VAR:
                change = tl.where(mask, 0.5 * grad * (1.0 - distance * distance), 0.0)
                if LOG_VAR == 2:
                    change = tl.where((raw_log_var > 40.0) | (raw_log_var < -40.0), 0.0, change)
                    tl.store(grad_log_var_ptr + element, change.to(grad_log_var_ptr.dtype.element_ty), mask=mask)
                else:
                    log_var_total += change
            sample += 1
        if NEED_TARGET:
            tl.store(grad_target_ptr + shared, target_total.to(grad_target_ptr.dtype.element_ty), mask=mask)

    if NEED_LOG_VAR:
        if LOG_VAR == 0:
            at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            tl.store(grad_log_var_ptr + at, tl.sum(tl.sum(log_var_total, axis=1), axis=0))
        elif LOG_VAR == 1:
            partial = grad_log_var_ptr + tl.program_id(0).to(tl.int64) * features + column
            tl.store(partial, tl.sum(log_var_total, axis=0), mask=column < features)
