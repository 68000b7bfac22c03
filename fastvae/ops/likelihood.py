"""Negative log-likelihoods of a datum under a decoder's output, summed over its features in the same pass.

    bernoulli_nll = sum_d max(l, 0) - l t + log(1 + exp(-|l|))                   logits l, targets t in [0, 1]
    gaussian_nll  = 1/2 sum_d log(2 pi) + log_var + (t - mean)^2 exp(-log_var)   log_var clamped to [-40, 40]

The target has the trailing part of the prediction's shape: leading dimensions, samples of a latent for instance, share
it, and it is never expanded in memory. Nothing but the inputs is kept for backward.

The Bernoulli terms are computed as |l| w + log1p(exp(-|l|)), where w is the share of the target on the other side than
the logit, and their slopes as +-(w - sigmoid(-|l|)): no difference of large numbers, so that a confident prediction
keeps its digits, and an infinite logit that the target agrees with costs nothing.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastvae.ops.backend import CORE, compute_dtype, dtype_code, empty, first_order, kernel, large, pointer, register
from fastvae.ops.checks import check_device, check_float
from fastvae.ops.gaussian import LOG_VAR_LIMIT


# ------------------------------------------------------------------------------------------------ reference
def reference_bernoulli(logits: Tensor, target: Tensor, event_dims: int) -> Tensor:
    """Eager definition: logits (*samples, *batch, *event), target (*batch, *event), nll (*samples, *batch)."""
    valid = (target >= 0) & (target <= 1)
    if target.device.type == "cpu" and not valid.all():
        raise _bad_target(target)
    _, weight, magnitude = _by_side(logits, target)
    linear = torch.where(weight == 0, 0, magnitude * weight)
    terms = torch.where(valid, linear + torch.log1p(torch.exp(-magnitude)), math.nan)
    return terms.sum(_event(event_dims))


def reference_bernoulli_backward(
    grad: Tensor, logits: Tensor, target: Tensor, event_dims: int, need_logits: bool, need_target: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `reference_bernoulli`; one that is not needed has no elements."""
    grad = grad.reshape(*grad.shape, *[1] * event_dims)
    sign, weight, magnitude = _by_side(logits, target)
    grad_logits = grad * sign * (weight - torch.sigmoid(-magnitude)) if need_logits else grad.new_empty(0)
    grad_target = -grad * logits.to(grad.dtype)
    grad_target = grad_target.sum_to_size(target.shape) if need_target else target.new_empty(0)
    return grad_logits.to(logits.dtype), grad_target.to(target.dtype)


def _by_side(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits' signs, the target's share on the other side, and the logits' magnitudes."""
    logits, target = (t.to(compute_dtype(logits)) for t in (logits, target))
    negative = logits < 0
    sign = 1 - 2 * negative.to(logits.dtype)
    return sign, torch.where(negative, target, 1 - target), logits.abs()


def reference_gaussian(mean: Tensor, target: Tensor, log_var: Tensor, event_dims: int) -> Tensor:
    """Eager definition: mean (*samples, *batch, *event), target (*batch, *event), log_var (), (*event) or as mean."""
    distance, log_var, _ = _standardized(mean, target, log_var)
    return (0.5 * (math.log(2 * math.pi) + log_var + distance.square())).sum(_event(event_dims))


def reference_gaussian_backward(
    grad: Tensor, mean: Tensor, target: Tensor, log_var: Tensor, event_dims: int,
    need_mean: bool, need_target: bool, need_log_var: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `reference_gaussian`; one that is not needed has no elements."""
    grad = grad.reshape(*grad.shape, *[1] * event_dims)
    distance, _, inverse_std = _standardized(mean, target, log_var)
    none = grad.new_empty(0)
    slope = grad * distance * inverse_std
    grad_mean = -slope if need_mean else none
    grad_target = slope.sum_to_size(target.shape) if need_target else none
    grad_log_var = none
    if need_log_var:
        grad_log_var = (0.5 * grad * (1 - distance.square())).sum_to_size(log_var.shape)
        grad_log_var = grad_log_var.masked_fill(log_var.abs() > LOG_VAR_LIMIT, 0)
    return grad_mean.to(mean.dtype), grad_target.to(target.dtype), grad_log_var.to(log_var.dtype)


def _standardized(mean: Tensor, target: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (target - mean) / std, the clamped log_var and 1 / std."""
    mean, target, log_var = (t.to(compute_dtype(mean)) for t in (mean, target, log_var))
    log_var = log_var.clamp(-LOG_VAR_LIMIT, LOG_VAR_LIMIT)
    inverse_std = torch.exp(-0.5 * log_var)
    return (target - mean) * inverse_std, log_var, inverse_std


def _event(event_dims: int) -> tuple[int, ...]:
    return tuple(range(-event_dims, 0))


def _bad_target(target: Tensor) -> ValueError:
    place = (~((target >= 0) & (target <= 1))).nonzero()[0].tolist()
    return ValueError(f"target: expected values in [0, 1], got {target[tuple(place)].item():g} at {tuple(place)}")


# ----------------------------------------------------------------------------------------------- C++ on CPU
_BERNOULLI, _NUMBER, _ROW, _FULL = range(4)  # Density in csrc/kernels.h


def _cpu_bernoulli(logits: Tensor, target: Tensor, event_dims: int) -> Tensor:
    return _cpu_forward(logits, target, None, event_dims)


def _cpu_bernoulli_backward(
    grad: Tensor, logits: Tensor, target: Tensor, event_dims: int, need_logits: bool, need_target: bool
) -> tuple[Tensor, Tensor]:
    return _cpu_backward(grad, logits, target, None, event_dims, need_logits, need_target, False)[:2]


def _cpu_forward(prediction: Tensor, target: Tensor, log_var: Tensor | None, event_dims: int) -> Tensor:
    assert CORE is not None
    prediction, target = prediction.contiguous(), target.contiguous()
    density, log_var, memory = _cpu_log_var(prediction, log_var)
    nll = empty(prediction, prediction.shape[:-event_dims], compute_dtype(prediction))
    possible = CORE.likelihood_forward(
        density, dtype_code(prediction), dtype_code(target), pointer(prediction), pointer(target), pointer(log_var),
        *_sizes(prediction, target, event_dims), pointer(memory), pointer(nll),
    )  # fmt: skip
    if not possible:
        raise _bad_target(target)
    return nll


def _cpu_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, log_var: Tensor | None, event_dims: int,
    need_prediction: bool, need_target: bool, need_log_var: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    assert CORE is not None
    prediction, target, grad = prediction.contiguous(), target.contiguous(), grad.contiguous()
    density, log_var, memory = _cpu_log_var(prediction, log_var)
    grad_prediction = large(torch.empty_like(prediction)) if need_prediction else prediction.new_empty(0)
    grad_target = large(torch.empty_like(target)) if need_target else target.new_empty(0)
    grad_log_var = None if log_var is None else log_var.new_empty(0)
    samples, targets, features = _sizes(prediction, target, event_dims)
    partial, partials = None, 1
    if need_log_var and log_var is not None:
        grad_log_var = large(torch.empty_like(log_var))
        if density == _NUMBER:
            partial = grad.new_empty(samples * targets, dtype=torch.float64)
        elif density == _ROW:
            # Sums over fixed parts of the rows: enough for the threads, little memory beside the prediction.
            partials = max(1, min(64, samples * targets // 8))
            partial = grad.new_empty((partials, features))
    CORE.likelihood_backward(
        density, dtype_code(prediction), dtype_code(target), pointer(prediction), pointer(target), pointer(log_var),
        samples, targets, features, pointer(memory), pointer(grad), pointer(grad_prediction), pointer(grad_target),
        pointer(grad_log_var), pointer(partial), partials,
    )  # fmt: skip
    return grad_prediction, grad_target, grad_log_var


def _cpu_log_var(prediction: Tensor, log_var: Tensor | None) -> tuple[int, Tensor | None, Tensor | None]:
    """Return the density's number, log_var in order, and the scratch that a shared one takes."""
    if log_var is None:
        return _BERNOULLI, None, None
    if log_var.shape == prediction.shape:
        return _FULL, log_var.contiguous(), None
    memory = log_var.new_empty(max(log_var.numel(), CORE.LIKELIHOOD_BLOCK))  # type: ignore[union-attr]
    return _ROW if log_var.dim() else _NUMBER, log_var.contiguous(), memory


def _sizes(prediction: Tensor, target: Tensor, event_dims: int) -> tuple[int, int, int]:
    """Return the numbers of samples, of targets and of features of each."""
    samples = prediction.shape[: prediction.dim() - target.dim()].numel()
    return samples, target.shape[:-event_dims].numel(), target.shape[-event_dims:].numel()


# -------------------------------------------------------------------------------------------- Triton on CUDA
_triton_bernoulli = kernel("likelihood", "bernoulli_forward")
_triton_bernoulli_backward = kernel("likelihood", "bernoulli_backward")
_triton_gaussian = kernel("likelihood", "gaussian_forward")
_triton_gaussian_backward = kernel("likelihood", "gaussian_backward")


def _cuda_bernoulli(logits: Tensor, target: Tensor, event_dims: int) -> Tensor:
    if logits.dtype == torch.float64:
        return reference_bernoulli(logits, target, event_dims)
    nll = _triton_bernoulli(*_matrices(logits, target, None, event_dims)[:2])
    return nll.reshape(logits.shape[:-event_dims])


def _cuda_bernoulli_backward(
    grad: Tensor, logits: Tensor, target: Tensor, event_dims: int, need_logits: bool, need_target: bool
) -> tuple[Tensor, Tensor]:
    if logits.dtype == torch.float64:
        return reference_bernoulli_backward(grad, logits, target, event_dims, need_logits, need_target)
    matrices = _matrices(logits, target, None, event_dims)[:2]
    grads = _triton_bernoulli_backward(grad.contiguous(), *matrices, need_logits, need_target)
    return _shaped(grads[0], logits), _shaped(grads[1], target)


def _cuda_gaussian(mean: Tensor, target: Tensor, log_var: Tensor, event_dims: int) -> Tensor:
    if mean.dtype == torch.float64:
        return reference_gaussian(mean, target, log_var, event_dims)
    return _triton_gaussian(*_matrices(mean, target, log_var, event_dims)).reshape(mean.shape[:-event_dims])


def _cuda_gaussian_backward(
    grad: Tensor, mean: Tensor, target: Tensor, log_var: Tensor, event_dims: int,
    need_mean: bool, need_target: bool, need_log_var: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    needed = need_mean, need_target, need_log_var
    if mean.dtype == torch.float64:
        return reference_gaussian_backward(grad, mean, target, log_var, event_dims, *needed)
    grads = _triton_gaussian_backward(grad.contiguous(), *_matrices(mean, target, log_var, event_dims), *needed)
    return _shaped(grads[0], mean), _shaped(grads[1], target), _shaped(grads[2], log_var)


def _matrices(prediction: Tensor, target: Tensor, log_var: Tensor | None, event_dims: int) -> tuple[Any, ...]:
    """Return (samples, targets, features), (targets, features) and (), (features,) or as the first."""
    shape = _sizes(prediction, target, event_dims)
    if log_var is not None:
        flat = shape if log_var.shape == prediction.shape else shape[3 - min(log_var.dim(), 1) :]
        log_var = log_var.contiguous().reshape(flat)
    return prediction.contiguous().reshape(shape), target.contiguous().reshape(shape[1:]), log_var


def _shaped(grad: Tensor | None, tensor: Tensor) -> Tensor:
    return tensor.new_empty(0) if grad is None else grad.reshape(tensor.shape)


# ------------------------------------------------------------------------------------------ schema, autograd
def _fake_bernoulli(logits: Tensor, target: Tensor, event_dims: int) -> Tensor:
    return logits.new_empty(logits.shape[: logits.dim() - event_dims], dtype=compute_dtype(logits))


def _fake_bernoulli_backward(grad: Tensor, logits: Tensor, target: Tensor, event_dims: int,
                             need_logits: bool, need_target: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _gradient(logits, need_logits), _gradient(target, need_target)


def _fake_gaussian(mean: Tensor, target: Tensor, log_var: Tensor, event_dims: int) -> Tensor:
    return _fake_bernoulli(mean, target, event_dims)


def _fake_gaussian_backward(grad: Tensor, mean: Tensor, target: Tensor, log_var: Tensor, event_dims: int,
                            need_mean: bool, need_target: bool, need_log_var: bool,
                            ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradient(mean, need_mean), _gradient(target, need_target), _gradient(log_var, need_log_var)


def _gradient(tensor: Tensor, needed: bool) -> Tensor:
    # An op cannot return None: a gradient that is not needed has no elements.
    return tensor.new_empty(tensor.shape if needed else 0)


_bernoulli = register(
    "bernoulli_nll(Tensor logits, Tensor target, int event_dims) -> Tensor",
    reference=reference_bernoulli,
    fake=_fake_bernoulli,
    cpu=_cpu_bernoulli,
    cuda=_cuda_bernoulli,
)
_bernoulli_backward = register(
    "bernoulli_nll_backward(Tensor grad, Tensor logits, Tensor target, int event_dims, "
    "bool need_logits, bool need_target) -> (Tensor, Tensor)",
    reference=reference_bernoulli_backward,
    fake=_fake_bernoulli_backward,
    cpu=_cpu_bernoulli_backward,
    cuda=_cuda_bernoulli_backward,
)
_gaussian = register(
    "gaussian_nll(Tensor mean, Tensor target, Tensor log_var, int event_dims) -> Tensor",
    reference=reference_gaussian,
    fake=_fake_gaussian,
    cpu=_cpu_forward,
    cuda=_cuda_gaussian,
)
_gaussian_backward = register(
    "gaussian_nll_backward(Tensor grad, Tensor mean, Tensor target, Tensor log_var, int event_dims, "
    "bool need_mean, bool need_target, bool need_log_var) -> (Tensor, Tensor, Tensor)",
    reference=reference_gaussian_backward,
    fake=_fake_gaussian_backward,
    cpu=_cpu_backward,
    cuda=_cuda_gaussian_backward,
)


class _BernoulliNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, event_dims: int) -> Tensor:
        ctx.save_for_backward(logits, target)
        ctx.event_dims = event_dims
        return _bernoulli(logits, target, event_dims)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_logits, need_target, _ = ctx.needs_input_grad
        grads = _bernoulli_backward(grad, *ctx.saved_tensors, ctx.event_dims, need_logits, need_target)
        return grads[0] if need_logits else None, grads[1] if need_target else None, None


class _GaussianNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, target: Tensor, log_var: Tensor, event_dims: int) -> Tensor:
        ctx.save_for_backward(mean, target, log_var)
        ctx.event_dims = event_dims
        return _gaussian(mean, target, log_var, event_dims)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        grads = _gaussian_backward(grad, *ctx.saved_tensors, ctx.event_dims, *needed)
        return *(g if n else None for g, n in zip(grads, needed, strict=True)), None


# -------------------------------------------------------------------------------------------------- public
def bernoulli_nll(logits: Tensor, target: Tensor, *, event_dims: int = 1) -> Tensor:
    """Negative log-likelihood of targets under independent Bernoulli variables, from logits.

    Args:
        logits: (*samples, *batch, *event), float32, float64, bfloat16 or float16; infinite ones are allowed.
        target: (*batch, *event), the trailing part of the logits' shape, of any of these types; in [0, 1], those in
            between being the mean of a soft target.
        event_dims: how many trailing dimensions belong to one datum and are summed over; at least 1.

    Returns:
        nll in nats per datum, (*samples, *batch), float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: naming the argument whose type, shape or device is wrong, or a target that is not in
            [0, 1] (on CUDA its datum's nll is NaN instead, as checking would synchronise).
    """
    check_float("logits", logits)
    return _BernoulliNLL.apply(logits, _checked_target(target, "logits", logits, event_dims), event_dims)


def gaussian_nll(mean: Tensor, target: Tensor, log_var: Tensor | float, *, event_dims: int = 1) -> Tensor:
    """Negative log-density of targets under N(mean, exp(log_var)), its constant 1/2 log(2 pi) included.

    Args:
        mean: (*samples, *batch, *event), float32, float64, bfloat16 or float16.
        target: (*batch, *event), the trailing part of the mean's shape, of any of these types.
        log_var: log of the variance, clamped to [-40, 40] with no gradient outside: a number, or a tensor of shape (),
            (*event) or that of the mean.
        event_dims: how many trailing dimensions belong to one datum and are summed over; at least 1.

    Returns:
        nll in nats per datum, (*samples, *batch), float32 (float64 for a float64 mean).

    Raises:
        TypeError, ValueError: naming the argument whose type, shape or device is wrong.
    """
    check_float("mean", mean)
    target = _checked_target(target, "mean", mean, event_dims)
    compute = compute_dtype(mean)
    if isinstance(log_var, Tensor):
        check_float("log_var", log_var)
        check_device("log_var", log_var, "mean", mean)
    elif isinstance(log_var, float | int):
        log_var = mean.new_full((), log_var, dtype=compute)
    else:
        raise TypeError(f"log_var: expected a number or a tensor, got {type(log_var).__name__}")
    if log_var.shape not in ((), mean.shape[mean.dim() - event_dims :], mean.shape):
        raise ValueError(
            f"log_var: expected a number or shape (), event = {tuple(mean.shape[mean.dim() - event_dims :])} or that "
            f"of mean, {tuple(mean.shape)}, got {tuple(log_var.shape)}"
        )
    if log_var.shape != mean.shape:
        log_var = log_var.to(compute)
    elif log_var.dtype != mean.dtype:
        mean, log_var = mean.to(compute), log_var.to(compute)
    return _GaussianNLL.apply(mean, target, log_var, event_dims)


def _checked_target(target: Tensor, name: str, prediction: Tensor, event_dims: int) -> Tensor:
    """Return the target in the prediction's type or the one it is computed in."""
    check_float("target", target)
    check_device("target", target, name, prediction)
    if event_dims < 1 or event_dims > prediction.dim():
        raise ValueError(f"event_dims: expected 1 to {prediction.dim()}, the dimensions of {name}, got {event_dims}")
    lead = prediction.dim() - target.dim()
    if target.dim() < event_dims or lead < 0 or target.shape != prediction.shape[lead:]:
        raise ValueError(
            f"target: expected (*batch, *event), the trailing part of {name}'s shape {tuple(prediction.shape)} with "
            f"{event_dims} event dimensions or more, got {tuple(target.shape)}"
        )
    return target if target.dtype == prediction.dtype else target.to(compute_dtype(prediction))
