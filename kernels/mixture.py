"""Terms of a mixture prior over latent variables and their gradients, one pass each.

What: the KL to the averaged component, the dispersion, the KL of the aggregate q(c) and I(c;x); the definition is the
reference in ``fastvae/ops/mixture.py``.

Why: eager PyTorch launches some 25 operations forward and twice as many backward on tensors of a few thousand numbers,
each a launch of microseconds. Here each pass is one launch, which reads every operand once.

How: a program owns one variable and loops over tiles of the batch, with its components in registers, (K, D) padded to
powers of two; the gradients of the components are summed there, without atomics: the same shape always gives the same
bits. Terms of a datum are stored for each variable and summed by ``torch.sum``.

Limits: float32; contiguous operands. There are as many programs as variables, 20 say, which leaves most of a large GPU
idle: the op is bound by its launch. K times D beyond some thousands does not fit in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.gaussian import clamp_log_var, exp_minus_one, exp_minus_one_minus_itself, outside

_TILE = 2048  # elements of the largest array of a program


def forward(z: Tensor, log_var: Tensor | None, logits: Tensor, component_mean: Tensor | None,
            components: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute the terms.

    Args:
        z: posterior means (B, M, D), or logits of D classes without `log_var`; float32, like all.
        log_var: (B, M, D) or None.
        logits: (B, M, K).
        component_mean: (M, K, D) or None.
        components: log-variances or logits of the components, (M, K, D).

    Returns:
        kl (B,), dispersion (B,), aggregate_kl (M,), mutual_information (M,) and the mean of q(c|x) (M, K).
    """
    batch, variables, size = logits.shape
    parts = z.new_empty(2, variables, batch)
    aggregate_kl, mutual_information = z.new_empty(variables), z.new_empty(variables)
    aggregate = z.new_empty(variables, size)
    _mixture_forward_kernel[(variables,)](
        z, z if log_var is None else log_var, logits, components if component_mean is None else component_mean,
        components, parts, aggregate_kl, mutual_information, aggregate, batch, variables, size, z.shape[2],
        CATEGORICAL=int(log_var is None), **_tile(size, z.shape[2]),
    )  # fmt: skip
    kl, dispersion = parts.sum(1).unbind()
    return kl.clone(), dispersion.clone(), aggregate_kl, mutual_information, aggregate


def backward(grads: list[Tensor], aggregate: Tensor, z: Tensor, log_var: Tensor | None, logits: Tensor,
             component_mean: Tensor | None, components: Tensor) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of :func:`forward`, in the order of its arguments; `grads` are those of its first four results."""
    batch, variables, size = logits.shape
    outputs = [None if x is None else torch.empty_like(x) for x in (z, log_var, logits, component_mean, components)]
    grad_z, grad_log_var, grad_logits, grad_component_mean, grad_components = outputs
    _mixture_backward_kernel[(variables,)](
        z, z if log_var is None else log_var, logits, components if component_mean is None else component_mean,
        components, aggregate, *grads,
        grad_z, grad_z if grad_log_var is None else grad_log_var, grad_logits,
        grad_components if grad_component_mean is None else grad_component_mean, grad_components,
        batch, variables, size, z.shape[2], CATEGORICAL=int(log_var is None), **_tile(size, z.shape[2]),
    )  # fmt: skip
    return tuple(outputs)


def _tile(size: int, latent: int) -> dict[str, int]:
    block_k, block_d = triton.next_power_of_2(size), triton.next_power_of_2(latent)
    return {
        "BLOCK_B": max(1, min(64, _TILE // (block_k * block_d))),
        "BLOCK_K": block_k,
        "BLOCK_D": block_d,
        "num_warps": 4,
    }


@triton.jit
def _log_softmax(logits, mask):
    """Of rows (rows, columns); a column outside the mask has log-probability -1e4, that is, probability 0."""
    logits = tl.where(mask, logits, -float("inf"))
    largest = tl.max(logits, axis=1)
    shifted = logits - tl.where(largest == -float("inf"), 0.0, largest)[:, None]
    log_prob = shifted - tl.log(tl.sum(tl.exp(shifted), axis=1))[:, None]
    return tl.where(log_prob < -1.0e4, -1.0e4, log_prob)


@triton.jit(do_not_specialize=["batch"])
def _mixture_forward_kernel(
    z_ptr,  # (B, M, D)
    log_var_ptr,  # (B, M, D)
    logits_ptr,  # (B, M, K)
    component_mean_ptr,  # (M, K, D)
    components_ptr,  # (M, K, D)
    parts_ptr,  # (2, M, B)
    aggregate_kl_ptr,  # (M,)
    information_ptr,  # (M,)
    aggregate_ptr,  # (M, K)
    batch,
    variables,
    size,
    latent,
    CATEGORICAL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    k, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    component = (m * size + k)[:, None] * latent + d[None, :]
    component_mask = (k < size)[:, None] & (d < latent)[None, :]
    given = tl.load(components_ptr + component, mask=component_mask, other=0.0)
    if CATEGORICAL:
        log_component = tl.where((k < size)[:, None], _log_softmax(given, (d < latent)[None, :]), 0.0)
    else:
        log_component = -clamp_log_var(given)
        precision = tl.exp(log_component)
        component_mean = tl.load(component_mean_ptr + component, mask=component_mask, other=0.0)
    sum_q = tl.zeros((BLOCK_K,), tl.float32)
    sum_log = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, batch, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        row = b.to(tl.int64) * variables + m
        row_mask = b < batch
        logits_mask = row_mask[:, None] & (k < size)[None, :]
        logits = tl.load(logits_ptr + row[:, None] * size + k[None, :], mask=logits_mask, other=0.0)
        log_q = _log_softmax(logits, (k < size)[None, :])
        q = tl.exp(log_q)
        sum_q += tl.sum(tl.where(logits_mask, q, 0.0), axis=0)
        sum_log += tl.sum(tl.where(logits_mask, q * log_q, 0.0), axis=0)

        element = row[:, None] * latent + d[None, :]
        mask = row_mask[:, None] & (d < latent)[None, :]
        z = tl.load(z_ptr + element, mask=mask, other=0.0)
        if CATEGORICAL:
            log_p = _log_softmax(z, (d < latent)[None, :])
            average = tl.sum(q[:, :, None] * log_component[None, :, :], axis=1)
            average = tl.where((d < latent)[None, :], average, -1.0e30)
            largest = tl.max(average, axis=1)
            normalizer = largest + tl.log(tl.sum(tl.exp(average - largest[:, None]), axis=1))
            kl = tl.sum(tl.where(mask, tl.exp(log_p) * (log_p - average), 0.0), axis=1) + normalizer
            dispersion = -normalizer
        else:
            log_var = tl.load(log_var_ptr + element, mask=mask, other=0.0)
            average = tl.sum(q[:, :, None] * precision[None, :, :], axis=1)
            center = tl.sum(q[:, :, None] * (precision * component_mean)[None, :, :], axis=1) / average
            apart = component_mean[None, :, :] - center[:, None, :]
            spread = precision[None, :, :] * apart * apart - log_component[None, :, :]
            log_average = tl.log(average)
            ratio = clamp_log_var(log_var) + log_average
            distance = z - center
            terms = 0.5 * (distance * distance * average + exp_minus_one_minus_itself(ratio))
            kl = tl.sum(tl.where(mask, terms, 0.0), axis=1)
            terms = 0.5 * (tl.sum(q[:, :, None] * spread, axis=1) + log_average)
            dispersion = tl.sum(tl.where(mask, terms, 0.0), axis=1)
        tl.store(parts_ptr + m * batch + b, kl, mask=row_mask)
        tl.store(parts_ptr + (variables + m) * batch + b, dispersion, mask=row_mask)

    mean = sum_q / batch
    log_mean = tl.log(tl.where(mean < 1.0e-37, 1.0e-37, mean))
    tl.store(aggregate_ptr + m * size + k, mean, mask=k < size)
    divergence = mean * (log_mean + tl.log(tl.cast(size, tl.float32))) - mean + 1.0 / size
    tl.store(aggregate_kl_ptr + m, tl.sum(tl.where(k < size, divergence, 0.0), axis=0))
    tl.store(information_ptr + m, tl.sum(tl.where(k < size, sum_log / batch - mean * log_mean, 0.0), axis=0))


@triton.jit(do_not_specialize=["batch"])
def _mixture_backward_kernel(
    z_ptr,  # (B, M, D)
    log_var_ptr,  # (B, M, D)
    logits_ptr,  # (B, M, K)
    component_mean_ptr,  # (M, K, D)
    components_ptr,  # (M, K, D)
    aggregate_ptr,  # (M, K)
    grad_kl_ptr,  # (B,)
    grad_dispersion_ptr,  # (B,)
    grad_aggregate_kl_ptr,  # (M,)
    grad_information_ptr,  # (M,)
    grad_z_ptr,  # (B, M, D)
    grad_log_var_ptr,  # (B, M, D)
    grad_logits_ptr,  # (B, M, K)
    grad_component_mean_ptr,  # (M, K, D)
    grad_components_ptr,  # (M, K, D)
    batch,
    variables,
    size,
    latent,
    CATEGORICAL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    k, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    component = (m * size + k)[:, None] * latent + d[None, :]
    component_mask = (k < size)[:, None] & (d < latent)[None, :]
    given = tl.load(components_ptr + component, mask=component_mask, other=0.0)
    if CATEGORICAL:
        log_component = tl.where((k < size)[:, None], _log_softmax(given, (d < latent)[None, :]), 0.0)
    else:
        log_component = -clamp_log_var(given)
        precision = tl.exp(log_component)
        component_mean = tl.load(component_mean_ptr + component, mask=component_mask, other=0.0)
    mean = tl.load(aggregate_ptr + m * size + k, mask=k < size, other=1.0)
    log_mean = tl.log(tl.where(mean < 1.0e-37, 1.0e-37, mean))
    grad_aggregate = tl.load(grad_aggregate_kl_ptr + m) / batch
    grad_information = tl.load(grad_information_ptr + m) / batch
    sum_mean = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    sum_component = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, batch, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        row = b.to(tl.int64) * variables + m
        row_mask = b < batch
        logits_mask = row_mask[:, None] & (k < size)[None, :]
        logits = tl.load(logits_ptr + row[:, None] * size + k[None, :], mask=logits_mask, other=0.0)
        log_q = _log_softmax(logits, (k < size)[None, :])
        q = tl.exp(log_q)
        grad_q = grad_aggregate * log_mean[None, :] + grad_information * (log_q - log_mean[None, :])
        grad_kl = tl.load(grad_kl_ptr + b, mask=row_mask, other=0.0)[:, None]
        grad_dispersion = tl.load(grad_dispersion_ptr + b, mask=row_mask, other=0.0)[:, None]

        element = row[:, None] * latent + d[None, :]
        mask = row_mask[:, None] & (d < latent)[None, :]
        z = tl.load(z_ptr + element, mask=mask, other=0.0)
        if CATEGORICAL:
            log_p = _log_softmax(z, (d < latent)[None, :])
            p = tl.exp(log_p)
            average = tl.sum(q[:, :, None] * log_component[None, :, :], axis=1)
            average = tl.where((d < latent)[None, :], average, -1.0e30)
            largest = tl.max(average, axis=1)
            chance = tl.exp(average - largest[:, None])
            chance = chance / tl.sum(chance, axis=1)[:, None]
            slope = tl.where(mask, grad_kl * (chance - p) - grad_dispersion * chance, 0.0)
            grad_p = tl.where(mask, grad_kl * (log_p - average), 0.0)
            grad_z = p * (grad_p - tl.sum(p * grad_p, axis=1)[:, None])
            grad_q += tl.sum(slope[:, None, :] * log_component[None, :, :], axis=2)
            sum_component += tl.sum(q[:, :, None] * slope[:, None, :], axis=0)
        else:
            raw = tl.load(log_var_ptr + element, mask=mask, other=0.0)
            average = tl.sum(q[:, :, None] * precision[None, :, :], axis=1)
            center = tl.sum(q[:, :, None] * (precision * component_mean)[None, :, :], axis=1) / average
            distance = z - center
            excess = exp_minus_one(clamp_log_var(raw) + tl.log(average))
            # of the averaged precision, its mean held
            slope = 0.5 * (grad_kl * (distance * distance + excess / average) + grad_dispersion / average)
            slope = tl.where(mask, slope, 0.0)
            grad_z = grad_kl * distance * average
            grad_log_var = tl.where(outside(raw), 0.0, 0.5 * grad_kl * excess)
            tl.store(grad_log_var_ptr + element, grad_log_var, mask=mask)
            pull = (grad_kl * distance)[:, None, :]
            apart = component_mean[None, :, :] - center[:, None, :]
            push = tl.where(mask, grad_dispersion, 0.0)[:, None, :]
            of_precision = slope[:, None, :] + (0.5 * push * apart - pull) * apart
            of_precision = tl.where(mask[:, None, :], of_precision, 0.0)
            terms = precision[None, :, :] * of_precision
            grad_q += tl.sum(terms - 0.5 * push * log_component[None, :, :], axis=2)
            sum_mean += tl.sum(q[:, :, None] * (push * apart - pull), axis=0)
            sum_component += tl.sum(q[:, :, None] * (terms - 0.5 * push), axis=0)
        tl.store(grad_z_ptr + element, grad_z, mask=mask)
        grad_logits = q * (grad_q - tl.sum(q * grad_q, axis=1)[:, None])
        tl.store(grad_logits_ptr + row[:, None] * size + k[None, :], grad_logits, mask=logits_mask)

    if CATEGORICAL:
        kept = tl.where(log_component > -1.0e4, sum_component, 0.0)
        grad = kept - tl.exp(log_component) * tl.sum(tl.where(component_mask, kept, 0.0), axis=1)[:, None]
        tl.store(grad_components_ptr + component, grad, mask=component_mask)
    else:
        tl.store(grad_component_mean_ptr + component, precision * sum_mean, mask=component_mask)
        grad = tl.where(outside(given), 0.0, -sum_component)
        tl.store(grad_components_ptr + component, grad, mask=component_mask)
