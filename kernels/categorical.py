"""Relaxed categorical (Gumbel-softmax) samples and their KL divergence, one pass forward and one backward.

What: ``softmax((log softmax(logits) + noise) / temperature)`` for each of S samples, or the one-hot vector of its
largest entry, and ``KL(softmax(logits) || prior)`` per row; the definition is the reference in
``fastvae/ops/categorical.py``.

Why: eager PyTorch moves about 12 tensors of N*K elements forward and 8 backward. These kernels read the logits
and write the sample (2 * N*K elements, S = 1), and backward read 3 and write 1; noise is made again from the seed
where the backward needs it, about 40 instructions an element where K is a multiple of 4, twice that elsewhere.

How: a program owns whole rows, about 1024 elements of them, in registers. The gradient of a prior shared by all
rows is summed in registers over a strided set of row tiles, then over the programs by ``torch.sum``: no atomics,
so a given seed and shape always give the same bits.

Limits: float32, bfloat16 and float16, at most MAX_CLASSES classes (the rest stays with the reference);
contiguous operands; the prior is normalized log-probabilities in float32. A row with a NaN, or without a possible
class, becomes NaN whole.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.random import packed_uniform, packed_uniforms_of_counters, to_gumbel

MAX_CLASSES = 8192
_TILE = 1024
_MAX_PARTIAL_SUMS = 1024


def sample_kl_forward(
    logits: Tensor, log_prior: Tensor | None, seed: Tensor, slope: float, hard: bool, num_samples: int
) -> tuple[Tensor, Tensor]:
    """Sample from softmax(logits) and compute the divergence from the prior.

    Args:
        logits: (N, K), float32, bfloat16 or float16.
        log_prior: float32 (1, K) or (N, K), or None for a uniform one.
        seed: int64 (1,).
        slope: 1 / temperature.
        hard: whether samples are one-hot.
        num_samples: S; 0 computes the KL alone.

    Returns:
        sample (S, N, K) in `logits`'s dtype and kl in nats, float32 (N,).
    """
    rows, classes = logits.shape
    sample = torch.empty((num_samples, rows, classes), dtype=logits.dtype, device=logits.device)
    kl = torch.empty(rows, dtype=torch.float32, device=logits.device)
    options = _options(logits, log_prior)
    if rows == 0:
        return sample, kl
    _categorical_forward_kernel[(triton.cdiv(rows, options["BLOCK_N"]),)](
        logits, *_prior(log_prior, logits), seed, sample, kl, rows, classes, num_samples, slope,
        HARD=int(hard), **options,
    )  # fmt: skip
    return sample, kl


def sample_kl_backward(
    grad_sample: Tensor | None,
    grad_kl: Tensor | None,
    sample: Tensor | None,
    logits: Tensor,
    log_prior: Tensor | None,
    seed: Tensor,
    slope: float,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`sample_kl_forward`, of the soft sample; arguments as there.

    Args:
        grad_sample: (S, N, K) in `logits`'s dtype, or None for zeros.
        grad_kl: float32 (N,), or None for zeros.
        sample: the soft sample, or None to make it again.

    Returns:
        Gradients of logits in their dtype, and of log_prior in float32, None without one.
    """
    rows, classes = logits.shape
    grad_logits = torch.empty_like(logits)
    options = _options(logits, log_prior)
    if rows == 0:
        return grad_logits, None if log_prior is None else torch.zeros_like(log_prior)
    programs = triton.cdiv(rows, options["BLOCK_N"])
    shared = log_prior is not None and log_prior.shape[0] == 1
    if shared:
        programs = min(programs, _MAX_PARTIAL_SUMS)
    # What is absent is never read or written; the kernel still wants pointers.
    grad_prior = grad_logits
    if log_prior is not None:
        partials = programs if shared else rows
        grad_prior = torch.empty((partials, classes), dtype=torch.float32, device=logits.device)
    _categorical_backward_kernel[(programs,)](
        logits if grad_sample is None else grad_sample, logits if grad_kl is None else grad_kl,
        logits if sample is None else sample, logits, *_prior(log_prior, logits), seed, grad_logits, grad_prior,
        rows, classes, 0 if grad_sample is None else grad_sample.shape[0], slope,
        HAS_KL=int(grad_kl is not None), SHARED_PRIOR=int(shared), AGAIN=int(sample is None), **options,
    )  # fmt: skip
    if log_prior is None:
        return grad_logits, None
    return grad_logits, grad_prior.sum(0, keepdim=True) if shared else grad_prior


def _options(logits: Tensor, log_prior: Tensor | None) -> dict[str, int]:
    if logits.dtype == torch.float64:
        raise TypeError("logits: expected float32, bfloat16 or float16, got torch.float64")
    classes = logits.shape[1]
    if classes > MAX_CLASSES:
        raise ValueError(f"logits: expected at most {MAX_CLASSES} classes, got {classes}")
    block = triton.next_power_of_2(classes)
    return {
        "HAS_PRIOR": int(log_prior is not None), "QUADS": int(classes % 4 == 0),
        "BLOCK_N": max(_TILE // block, 1), "BLOCK_K": block, "num_warps": min(max(block // 256, 4), 16),
    }  # fmt: skip


def _prior(log_prior: Tensor | None, logits: Tensor) -> tuple[Tensor, int]:
    """Return the prior and its row stride (0: one row for all), or a stand-in the kernel never reads."""
    if log_prior is None:
        return logits, 0
    return log_prior.contiguous(), 0 if log_prior.shape[0] == 1 else logits.shape[1]


@triton.jit
def _exp_or_zero(x):
    # Exactly 0 where it would be less than a normal number, as in the other backends; NaN stays.
    return tl.where(x < -87.0, 0.0, tl.exp(x))


@triton.jit
def _shift(logits_ptr, element, mask, column, classes):
    # Beyond the last class the logits are -inf; beyond the last row 0, a row like any other.
    logits = tl.load(logits_ptr + element, mask=mask, other=0.0).to(tl.float32)
    logits = tl.where((column < classes)[None, :], logits, float("-inf"))
    return logits - tl.max(logits, axis=1)[:, None]


@triton.jit
def _divergence(shifted, prior_ptr, row, column, mask, prior_stride, HAS_PRIOR: tl.constexpr):
    # With e = exp(shifted): e, their sum, log-ratios to the prior up to a constant, and the mean of these.
    e = _exp_or_zero(shifted)
    ratio = shifted
    if HAS_PRIOR:
        ratio -= tl.load(prior_ptr + row[:, None] * prior_stride + column[None, :], mask=mask, other=0.0)
    total = tl.sum(e, axis=1)
    mean = tl.sum(tl.where(e > 0, e * ratio, 0.0), axis=1) / total
    return e, total, ratio, mean


@triton.jit
def _scores(shifted, seed, offset, row, column, classes, QUADS: tl.constexpr, BLOCK_K: tl.constexpr):
    # Where rows are made of whole counters, each is computed once for its four elements.
    if QUADS:
        counter = row[:, None] * (classes // 4) + tl.arange(0, BLOCK_K // 4)[None, :]
        u = packed_uniforms_of_counters(seed, offset // 4 + counter)
    else:
        u = packed_uniform(seed, offset + row[:, None] * classes + column[None, :])
    return shifted + to_gumbel(u)


@triton.jit
def _soften(scores, slope):
    e = _exp_or_zero((scores - tl.max(scores, axis=1)[:, None]) * slope)
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit(do_not_specialize=["rows", "num_samples", "slope"])
def _categorical_forward_kernel(
    logits_ptr,  # (N, K)
    prior_ptr,  # (1 or N, K) float32
    prior_stride,
    seed_ptr,  # (1,) int64
    sample_ptr,  # (S, N, K)
    kl_ptr,  # (N,) float32
    rows,
    classes,
    num_samples,
    slope,
    HARD: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    mask = (row < rows)[:, None] & (column < classes)[None, :]
    element = row[:, None] * classes + column[None, :]
    seed = tl.load(seed_ptr)
    shifted = _shift(logits_ptr, element, mask, column, classes)
    _, total, _, mean = _divergence(shifted, prior_ptr, row, column, mask, prior_stride, HAS_PRIOR)
    kl = mean - tl.log(total)
    if not HAS_PRIOR:
        kl = mean + (tl.log(tl.cast(classes, tl.float32)) - tl.log(total))
    tl.store(kl_ptr + row, kl, mask=row < rows)
    offset = tl.zeros((), tl.int64)
    for _ in range(num_samples):
        scores = _scores(shifted, seed, offset, row, column, classes, QUADS, BLOCK_K)
        if HARD:
            scores = tl.where(scores == scores, scores, 0.0)  # rows of NaN, which have no largest
            first = tl.argmax(scores, axis=1)[:, None] == column[None, :]
            sample = tl.where((total == total)[:, None], first.to(tl.float32), float("nan"))
        else:
            sample = _soften(scores, slope)
        tl.store(sample_ptr + offset + element, sample.to(sample_ptr.dtype.element_ty), mask=mask)
        offset += rows.to(tl.int64) * classes


@triton.jit(do_not_specialize=["rows", "num_samples", "slope"])
def _categorical_backward_kernel(
    grad_sample_ptr,  # (S, N, K)
    grad_kl_ptr,  # (N,) float32
    sample_ptr,  # (S, N, K)
    logits_ptr,  # (N, K)
    prior_ptr,  # (1 or N, K) float32
    prior_stride,
    seed_ptr,  # (1,) int64
    grad_logits_ptr,  # (N, K)
    grad_prior_ptr,  # (programs or N, K) float32
    rows,
    classes,
    num_samples,
    slope,
    HAS_KL: tl.constexpr,
    SHARED_PRIOR: tl.constexpr,
    AGAIN: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column = tl.arange(0, BLOCK_K)
    seed = tl.load(seed_ptr)
    grad_prior = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    # One iteration, unless a shared prior's gradient is being added up.
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_N), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (row < rows)[:, None] & (column < classes)[None, :]
        element = row[:, None] * classes + column[None, :]
        shifted = _shift(logits_ptr, element, mask, column, classes)
        grad_logits = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        pull = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if HAS_KL:
            e, total, ratio, mean = _divergence(shifted, prior_ptr, row, column, mask, prior_stride, HAS_PRIOR)
            weight = tl.load(grad_kl_ptr + row, mask=row < rows, other=0.0) / total
            pull = tl.where(e == 0, 0.0, weight[:, None] * e)
            grad_logits = tl.where(e == 0, 0.0, pull * (ratio - mean[:, None]))
        if SHARED_PRIOR:
            grad_prior -= pull
        elif HAS_PRIOR:
            tl.store(grad_prior_ptr + element, -pull, mask=mask)
        offset = tl.zeros((), tl.int64)
        for _ in range(num_samples):
            if AGAIN:
                sample = _soften(_scores(shifted, seed, offset, row, column, classes, QUADS, BLOCK_K), slope)
            else:
                sample = tl.load(sample_ptr + offset + element, mask=mask, other=0.0).to(tl.float32)
            grad_sample = tl.load(grad_sample_ptr + offset + element, mask=mask, other=0.0).to(tl.float32)
            dot = tl.sum(tl.where(mask, sample * grad_sample, 0.0), axis=1)
            grad_logits += slope * (sample * (grad_sample - dot[:, None]))
            offset += rows.to(tl.int64) * classes
        tl.store(grad_logits_ptr + element, grad_logits.to(grad_logits_ptr.dtype.element_ty), mask=mask)

    if SHARED_PRIOR:
        partial = grad_prior_ptr + tl.program_id(0).to(tl.int64) * classes + column
        tl.store(partial, tl.sum(grad_prior, axis=0), mask=column < classes)
