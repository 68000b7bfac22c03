"""Relaxed categorical (Gumbel-softmax) sampling and the categorical KL divergence in one pass.

    sample = softmax((log softmax(logits) + noise) / temperature),    KL(q || prior) = sum_k q_k (log q_k - log prior_k)

with q = softmax(logits) and Gumbel noise from :func:`fastvae.ops.random.gumbel` at element (s * N + n) * K + k, made
again where the backward needs it. A hard sample is the one-hot vector of the largest entry, exactly, and has the
soft one's gradient (straight-through). Its class follows q, whatever the temperature. Logits may be -inf: such a class
is never drawn, adds nothing to the divergence and gets no gradient.

Source: Jang, Gu & Poole 2017, "Categorical reparameterization with Gumbel-softmax"; Maddison, Mnih & Teh 2017, "The
concrete distribution".
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops.backend import (
    CORE,
    compute_dtype,
    dtype_code,
    first_order,
    kernel,
    large,
    pointer,
    recording,
    register,
)
from fastvae.ops.checks import check_broadcast, check_float, check_samples
from fastvae.ops.random import gumbel, seed_of


# ------------------------------------------------------------------------------------------------ reference
def reference_sample_kl(
    logits: Tensor, log_prior: Tensor | None, seed: Tensor, temperature: float, hard: bool, num_samples: int | None
) -> tuple[Tensor, Tensor]:
    """Eager definition. logits (..., K), log_prior (K,) or (..., K), normalized; sample (..., K) or (S, ..., K), kl."""
    scores, kl = _scores(logits, log_prior, seed, num_samples)
    sample = _soften(scores, temperature)
    if hard:
        one_hot = torch.zeros_like(sample).scatter_(-1, scores.argmax(-1, keepdim=True), 1)
        sample = torch.where(sample.isnan(), sample, one_hot)
    return sample.to(logits.dtype), kl


def reference_sample_kl_backward(
    grad_sample: Tensor | None,
    grad_kl: Tensor | None,
    sample: Tensor | None,
    logits: Tensor,
    log_prior: Tensor | None,
    seed: Tensor,
    temperature: float,
    num_samples: int | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the soft sample and the divergence by autograd; that of an absent prior has no elements.

    `sample` is the soft sample itself, to save making it again, or None.
    """
    with recording():
        inputs = [t.detach().requires_grad_() for t in (logits, log_prior) if t is not None]
        scores, kl = _scores(inputs[0], inputs[1] if log_prior is not None else None, seed, num_samples)
        outputs = (_soften(scores, temperature).to(logits.dtype), kl)
    pairs = [(o, g) for o, g in zip(outputs, (grad_sample, grad_kl), strict=True) if g is not None]
    grads = torch.autograd.grad(
        [o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    return grads[0], _no_prior(logits) if log_prior is None else grads[1]


def _scores(logits: Tensor, log_prior: Tensor | None, seed: Tensor, num_samples: int | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities plus noise, less a number that all classes of a row share; and the divergence."""
    x = logits.to(compute_dtype(logits))
    log_p = F.log_softmax(x, -1)
    p = log_p.exp()
    ratio = log_p + math.log(logits.shape[-1]) if log_prior is None else log_p - log_prior
    kl = (p * ratio.masked_fill(p == 0, 0)).sum(-1)
    shape = _sample_shape(logits, num_samples)
    offsets = torch.arange(math.prod(shape), device=logits.device).reshape(shape)
    return x - x.detach().amax(-1, keepdim=True) + gumbel(seed, offsets).to(x.dtype), kl


def _soften(scores: Tensor, temperature: float) -> Tensor:
    # The largest score becomes 0 first: no temperature overflows it.
    return F.softmax((scores - scores.detach().amax(-1, keepdim=True)) * _slope(temperature), -1)


def _slope(temperature: float) -> float:
    # Times 0 and -inf these stay what they are, in float32 too.
    return min(max(1 / temperature, 1e-37), 3e38)


def _sample_shape(logits: Tensor, num_samples: int | None) -> tuple[int, ...]:
    return tuple(logits.shape) if num_samples is None else (num_samples, *logits.shape)


def _no_prior(logits: Tensor) -> Tensor:
    return logits.new_empty(0, dtype=compute_dtype(logits))  # an op cannot return None


# ----------------------------------------------------------------------------------------------- C++ on CPU
def _cpu_sample_kl(
    logits: Tensor, log_prior: Tensor | None, seed: Tensor, temperature: float, hard: bool, num_samples: int | None
) -> tuple[Tensor, Tensor]:
    assert CORE is not None
    sample = large(logits.new_empty(_sample_shape(logits, num_samples)))
    kl = logits.new_empty(logits.shape[:-1], dtype=compute_dtype(logits))
    logits, log_prior = logits.contiguous(), None if log_prior is None else log_prior.contiguous()
    memory, workspaces = _workspaces(logits)
    CORE.categorical_forward(
        *_problem(logits, log_prior, seed, temperature), hard, *_sizes(logits, num_samples), pointer(memory),
        workspaces, pointer(sample), pointer(kl),
    )  # fmt: skip
    return sample, kl


def _cpu_sample_kl_backward(
    grad_sample: Tensor | None,
    grad_kl: Tensor | None,
    sample: Tensor | None,
    logits: Tensor,
    log_prior: Tensor | None,
    seed: Tensor,
    temperature: float,
    num_samples: int | None,
) -> tuple[Tensor, Tensor]:
    assert CORE is not None
    logits, log_prior = logits.contiguous(), None if log_prior is None else log_prior.contiguous()
    grad_sample, grad_kl, sample = (None if t is None else t.contiguous() for t in (grad_sample, grad_kl, sample))
    grad_logits, grad_prior = large(torch.empty_like(logits)), _no_prior(logits)
    memory, workspaces = _workspaces(logits)
    shared = log_prior is not None and log_prior.dim() == 1
    if log_prior is not None:
        # A prior shared by all rows gets one partial sum per thread, added up in a fixed order below.
        grad_prior = log_prior.new_zeros((workspaces, *log_prior.shape) if shared else log_prior.shape)
    CORE.categorical_backward(
        *_problem(logits, log_prior, seed, temperature), *_sizes(logits, num_samples), pointer(memory), workspaces,
        pointer(grad_sample), pointer(grad_kl), pointer(sample), pointer(grad_logits), pointer(grad_prior),
    )  # fmt: skip
    return grad_logits, grad_prior.sum(0) if shared else grad_prior


def _problem(logits: Tensor, log_prior: Tensor | None, seed: Tensor, temperature: float) -> tuple[Any, ...]:
    rows = 0 if log_prior is None else math.prod(log_prior.shape[:-1])
    slope = _slope(temperature)
    return dtype_code(logits), pointer(logits), pointer(log_prior), rows, pointer(seed), slope


def _sizes(logits: Tensor, num_samples: int | None) -> tuple[int, int, int]:
    return 1 if num_samples is None else num_samples, math.prod(logits.shape[:-1]), logits.shape[-1]


def _workspaces(logits: Tensor) -> tuple[Tensor, int]:
    """Scratch for each thread, and the number of threads."""
    assert CORE is not None
    threads = torch.get_num_threads()
    bytes_each = CORE.categorical_workspace(dtype_code(logits), logits.shape[-1])
    return torch.empty(threads * bytes_each, dtype=torch.uint8), threads


# -------------------------------------------------------------------------------------------- Triton on CUDA
_triton_forward = kernel("categorical", "sample_kl_forward")
_triton_backward = kernel("categorical", "sample_kl_backward")
_MAX_CLASSES_CUDA = 8192  # a row lies in registers


def _cuda_sample_kl(
    logits: Tensor, log_prior: Tensor | None, seed: Tensor, temperature: float, hard: bool, num_samples: int | None
) -> tuple[Tensor, Tensor]:
    if logits.dtype == torch.float64 or logits.shape[-1] > _MAX_CLASSES_CUDA:
        return reference_sample_kl(logits, log_prior, seed, temperature, hard, num_samples)
    samples, rows, classes = _sizes(logits, num_samples)
    prior = None if log_prior is None else log_prior.reshape(-1, classes)
    matrix = logits.reshape(rows, classes).contiguous()
    sample, kl = _triton_forward(matrix, prior, seed, _slope(temperature), hard, samples)
    return sample.reshape(_sample_shape(logits, num_samples)), kl.reshape(logits.shape[:-1])


def _cuda_sample_kl_backward(
    grad_sample: Tensor | None,
    grad_kl: Tensor | None,
    sample: Tensor | None,
    logits: Tensor,
    log_prior: Tensor | None,
    seed: Tensor,
    temperature: float,
    num_samples: int | None,
) -> tuple[Tensor, Tensor]:
    if logits.dtype == torch.float64 or logits.shape[-1] > _MAX_CLASSES_CUDA:
        return reference_sample_kl_backward(
            grad_sample, grad_kl, sample, logits, log_prior, seed, temperature, num_samples
        )
    sizes = _sizes(logits, num_samples)
    grad_sample, sample = (None if t is None else t.reshape(sizes).contiguous() for t in (grad_sample, sample))
    grad_logits, grad_prior = _triton_backward(
        grad_sample,
        None if grad_kl is None else grad_kl.reshape(sizes[1]).contiguous(),
        sample,
        logits.reshape(sizes[1:]).contiguous(),
        None if log_prior is None else log_prior.reshape(-1, sizes[2]),
        seed,
        _slope(temperature),
    )
    if log_prior is None:
        return grad_logits.reshape(logits.shape), _no_prior(logits)
    return grad_logits.reshape(logits.shape), grad_prior.reshape(log_prior.shape)


# ------------------------------------------------------------------------------------------ schema, autograd
def _fake_sample_kl(logits: Tensor, log_prior: Any, seed: Tensor, temperature: float, hard: bool,
                    num_samples: int | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    kl = logits.new_empty(logits.shape[:-1], dtype=compute_dtype(logits))
    return logits.new_empty(_sample_shape(logits, num_samples)), kl


def _fake_sample_kl_backward(grad_sample: Any, grad_kl: Any, sample: Any, logits: Tensor, log_prior: Tensor | None,
                             seed: Tensor, temperature: float, num_samples: int | None
                             ) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_prior = _no_prior(logits) if log_prior is None else log_prior.new_empty(log_prior.shape)
    return logits.new_empty(logits.shape), grad_prior


_sample_kl = register(
    "gumbel_softmax_sample_kl(Tensor logits, Tensor? log_prior, Tensor seed, float temperature, bool hard, "
    "SymInt? num_samples) -> (Tensor, Tensor)",
    reference=reference_sample_kl,
    fake=_fake_sample_kl,
    cpu=_cpu_sample_kl,
    cuda=_cuda_sample_kl,
)
_sample_kl_backward = register(
    "gumbel_softmax_sample_kl_backward(Tensor? grad_sample, Tensor? grad_kl, Tensor? sample, Tensor logits, "
    "Tensor? log_prior, Tensor seed, float temperature, SymInt? num_samples) -> (Tensor, Tensor)",
    reference=reference_sample_kl_backward,
    fake=_fake_sample_kl_backward,
    cpu=_cpu_sample_kl_backward,
    cuda=_cuda_sample_kl_backward,
)


class _SampleKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_prior: Tensor | None, seed: Tensor, temperature: float, hard: bool,
                num_samples: int | None) -> tuple[Tensor, Tensor]:  # fmt: skip
        sample, kl = _sample_kl(logits, log_prior, seed, temperature, hard, num_samples)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(None if hard else sample, logits, log_prior, seed)
        ctx.temperature, ctx.num_samples = temperature, num_samples
        return sample, kl

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_sample: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = _sample_kl_backward(grad_sample, grad_kl, *ctx.saved_tensors, ctx.temperature, ctx.num_samples)
        return *(g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=False)), None, None, None, None


# -------------------------------------------------------------------------------------------------- public
def gumbel_softmax_sample_kl(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    hard: bool = False,
    prior_logits: Tensor | None = None,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a relaxed one-hot vector from q = softmax(logits), with gradients, and its KL divergence from the prior.

    Args:
        logits: (..., classes), float32, float64, bfloat16 or float16; -inf for an impossible class.
        temperature: above 0; the sample nears a one-hot vector as it falls, and the gradients grow.
        hard: whether the sample is exactly one-hot; its gradient is then that of the soft one.
        prior_logits: of the prior's classes, broadcastable to `logits`; a uniform prior if None.
        num_samples: draw this many samples of each datum; None draws one and adds no dimension.
        generator: source of the seed, on the device of `logits`; torch's global one if None.
        seed: int64 tensor (1,) on the device of `logits` to use instead of drawing one.

    Returns:
        sample, in `logits`'s dtype, (..., classes) or (num_samples, ..., classes); and the KL divergence in nats,
        float32 (float64 for float64 input), (...), infinite where the prior excludes a class that q does not.

    Raises:
        TypeError, ValueError: naming the argument whose type, shape, device or value is wrong.

    Source: Jang, Gu & Poole 2017, "Categorical reparameterization with Gumbel-softmax".
    """
    if not isinstance(temperature, int | float | torch.SymFloat):
        raise TypeError(f"temperature: expected a number, got {type(temperature).__name__}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    check_samples(num_samples)
    log_prior = _check(logits, prior_logits)
    seed = seed_of(seed, generator, "logits", logits)
    return _SampleKL.apply(logits, log_prior, seed, float(temperature), hard, num_samples)


def categorical_kl(logits: Tensor, prior_logits: Tensor | None = None) -> Tensor:
    """KL divergence of softmax(logits) from softmax(prior_logits), uniform if None, in nats.

    Arguments, result and errors as for :func:`gumbel_softmax_sample_kl`.
    """
    log_prior = _check(logits, prior_logits)
    seed = torch.zeros(1, dtype=torch.int64, device=logits.device)
    return _SampleKL.apply(logits, log_prior, seed, 1.0, False, 0)[1]


def _check(logits: Tensor, prior_logits: Tensor | None) -> Tensor | None:
    check_float("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (..., classes) with at least one class, got {tuple(logits.shape)}")
    if prior_logits is None:
        return None
    check_broadcast("prior_logits", prior_logits, "logits", logits)
    # A prior without batch dimensions stays one row, so that its gradient is summed inside the kernel.
    shared = math.prod(prior_logits.shape[:-1]) == 1
    prior = prior_logits.to(compute_dtype(logits))
    prior = prior.reshape(prior.shape[-1:]).expand(logits.shape[-1:]) if shared else prior.expand(logits.shape)
    return F.log_softmax(prior, -1)
