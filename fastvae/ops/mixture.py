"""The terms of a VAE with an exponential-family mixture prior, in one pass: its KL, its dispersion, and I(c;x).

M independent variables c_m in {1..K} choose a component of z_m each: p(z|c) = exp(<eta_c, phi(z)> - A(eta_c)) and
q(z, c|x) = q(z|x) prod_m q(c_m|x). With eta_bar = sum_k q(c=k|x) eta_k, for each datum and summed over m,

    sum_k q(c=k|x) KL(q(z|x) || p(z|c=k)) = KL(q(z|x) || p(z; eta_bar)) + L_d
    L_d = sum_k q(c=k|x) A(eta_k) - A(eta_bar) >= 0                                    (the dispersion)

and with q_bar(c) the mean of q(c|x) over the batch, for each m,

    mean_x KL(q(c|x) || 1/K) = KL(q_bar(c) || 1/K) + I(c;x)

Everything is computed from differences that keep their digits where the components coincide: for Gaussians L_d is
1/2 sum_d [sum_k q_k P_k (mu_k - mu_bar)^2 + log P_bar - sum_k q_k log P_k] with precisions P, P_bar their average and
mu_bar the mean of the averaged component; for categorical z it is -log sum_v exp(sum_k q_k log p_k(v)). Log-variances
are clamped to [-40, 40] with no gradient outside. Source: Shi et al. 2020, "Dispersed exponential family mixture VAEs
for interpretable text generation", section 3.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.ops.backend import CORE, compute_dtype, first_order, kernel, pointer, recording, register
from fastvae.ops.checks import check_device, check_float, check_shape
from fastvae.ops.gaussian import LOG_VAR_LIMIT

_LEAST_LOG_PROB = -1e4  # of a component: exp of it is 0, and 0 times it is 0 too


class MixtureTerms(NamedTuple):
    """What :func:`mixture_kl` and :func:`categorical_mixture_kl` return, in nats, float32 (float64 for float64 input).

    Attributes:
        kl: KL(q(z|x) || p(z; eta_bar)), the averaged component, summed over the variables, (batch,).
        dispersion: L_d, summed over the variables, (batch,).
        aggregate_kl: KL(q_bar(c) || uniform) of each variable, (variables,).
        mutual_information: I(c;x) of each variable under the batch, (variables,).
    """

    kl: Tensor
    dispersion: Tensor
    aggregate_kl: Tensor
    mutual_information: Tensor


# ------------------------------------------------------------------------------------------------ reference
def reference_gaussian(
    mean: Tensor, log_var: Tensor, logits: Tensor, component_mean: Tensor, component_log_var: Tensor
) -> tuple[Tensor, ...]:
    """Eager definition: mean, log_var (B, M, D), logits (B, M, K), components (M, K, D); the terms and q_bar (M, K)."""
    log_q = _log_softmax(logits)
    q = log_q.exp()
    log_precision = -component_log_var.clamp(-LOG_VAR_LIMIT, LOG_VAR_LIMIT)
    precision = log_precision.exp()
    average = torch.einsum("bmk,mkd->bmd", q, precision)
    center = torch.einsum("bmk,mkd->bmd", q, precision * component_mean) / average
    ratio = log_var.clamp(-LOG_VAR_LIMIT, LOG_VAR_LIMIT) + average.log()
    kl = 0.5 * ((mean - center).square() * average + torch.expm1(ratio) - ratio)
    spread = (q[..., None] * precision * (component_mean - center[:, :, None]).square()).sum(2)
    dispersion = 0.5 * (spread + average.log() - torch.einsum("bmk,mkd->bmd", q, log_precision))
    return kl.sum((1, 2)), dispersion.sum((1, 2)), *_aggregates(q, log_q)


def reference_categorical(z_logits: Tensor, logits: Tensor, component_logits: Tensor) -> tuple[Tensor, ...]:
    """Eager definition: z_logits (B, M, V), logits (B, M, K), component_logits (M, K, V); results as above."""
    log_q, log_p, log_components = (_log_softmax(x) for x in (logits, z_logits, component_logits))
    q, p = log_q.exp(), log_p.exp()
    average = torch.einsum("bmk,mkv->bmv", q, log_components)
    normalizer = average.logsumexp(-1)
    kl = (p * (log_p - average)).sum(-1) + normalizer
    return kl.sum(1), -normalizer.sum(1), *_aggregates(q, log_q)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1).clamp_min(_LEAST_LOG_PROB)


def _aggregates(q: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, log_mean, size = q.mean(0), log_q.logsumexp(0) - math.log(len(q)), q.shape[-1]
    # Differences of size * mean from 1 enter by their squares, so that their rounding does not count.
    divergence = (mean * (log_mean + math.log(size)) - mean + 1 / size).sum(-1)
    return divergence, (q * log_q).sum(-1).mean(0) - (mean * log_mean).sum(-1), mean


def reference(z: Tensor, log_var: Tensor | None, logits: Tensor, component_mean: Tensor | None,
              components: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
    """The op's definition: that of Gaussians, or of categorical variables without `log_var` and `component_mean`."""
    if log_var is None or component_mean is None:
        return reference_categorical(z, logits, components)
    return reference_gaussian(z, log_var, logits, component_mean, components)


def reference_backward(grads: list[Tensor], aggregate: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of `reference` by autograd; those of absent inputs have no elements."""
    with recording():
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        outputs = reference(*leaves)[:4]  # type: ignore[arg-type]
    given = iter(torch.autograd.grad(outputs, [x for x in leaves if x is not None], grads))
    return tuple(_absent(aggregate) if x is None else next(given) for x in inputs)


def _absent(like: Tensor) -> Tensor:
    return like.new_empty(0)  # an op cannot return None


# ----------------------------------------------------------------------------------------------- C++ on CPU
def _cpu(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    assert CORE is not None
    arguments, kept = _arguments(*inputs)
    outputs = _fake(*inputs)  # type: ignore[arg-type]
    kl, aggregate = outputs[0], outputs[4]
    parts = kl.new_empty(2, len(aggregate), len(kl))  # kl and dispersion of each variable
    CORE.mixture_prior_forward(*arguments, *map(pointer, (*outputs, parts)))
    del kept
    return outputs


def _cpu_backward(grads: list[Tensor], aggregate: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    assert CORE is not None
    arguments, kept = _arguments(*inputs)
    dense = [g.contiguous() for g in grads]
    outputs = _fake_backward(grads, aggregate, *inputs)
    CORE.mixture_prior_backward(*arguments, *map(pointer, (*dense, aggregate, *outputs)))
    del kept
    return outputs


def _arguments(*inputs: Tensor | None) -> tuple[tuple[Any, ...], list[Tensor | None]]:
    """Return the C++ core's arguments, and the tensors to keep while it uses their addresses."""
    assert CORE is not None
    kept = [None if x is None else x.contiguous() for x in inputs]
    z, log_var, logits = kept[:3]
    assert z is not None
    assert logits is not None
    variables, components = logits.shape[1:]
    threads = min(torch.get_num_threads(), variables)
    kept.append(z.new_empty(threads * CORE.mixture_prior_workspace(components, z.shape[2])))
    *addresses, memory = map(pointer, kept)
    is_double, categorical = z.dtype == torch.float64, log_var is None
    return (is_double, categorical, *addresses, *logits.shape, z.shape[2], memory, threads), kept


# -------------------------------------------------------------------------------------------- Triton on CUDA
_triton_forward = kernel("mixture", "forward")
_triton_backward = kernel("mixture", "backward")


_MAX_TILE_CUDA = 16384  # K * D, each rounded up to a power of 2: a program holds a sentence's share of it in registers


def _by_reference(components: Tensor | None) -> bool:
    assert components is not None
    tile = math.prod(1 << (size - 1).bit_length() for size in components.shape[1:])
    return components.dtype == torch.float64 or tile > _MAX_TILE_CUDA


def _cuda(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    if _by_reference(inputs[4]):
        return reference(*inputs)  # type: ignore[arg-type]
    return _triton_forward(*(None if x is None else x.contiguous() for x in inputs))


def _cuda_backward(grads: list[Tensor], aggregate: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    if _by_reference(inputs[4]):
        return reference_backward(grads, aggregate, *inputs)
    dense = (None if x is None else x.contiguous() for x in inputs)
    outputs = _triton_backward([g.contiguous() for g in grads], aggregate, *dense)
    return tuple(_absent(aggregate) if x is None else x for x in outputs)


# ------------------------------------------------------------------------------------------ schema, autograd
def _fake(z: Tensor, log_var: Any, logits: Tensor, component_mean: Any, components: Tensor) -> tuple[Tensor, ...]:
    batch, variables, size = logits.shape
    shapes: list[tuple[int, ...]] = [(batch,), (batch,), (variables,), (variables,), (variables, size)]
    return tuple(z.new_empty(shape) for shape in shapes)


def _fake_backward(grads: list[Tensor], aggregate: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(_absent(aggregate) if x is None else x.new_empty(x.shape) for x in inputs)


_INPUTS = "Tensor z, Tensor? log_var, Tensor logits, Tensor? component_mean, Tensor components"
_mixture = register(
    f"mixture_kl({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)
_mixture_backward = register(
    f"mixture_kl_backward(Tensor[] grads, Tensor aggregate, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=_fake_backward,
    cpu=_cpu_backward,
    cuda=_cuda_backward,
)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        outputs = _mixture(*inputs)
        ctx.save_for_backward(outputs[4], *inputs)
        ctx.mark_non_differentiable(outputs[4])
        return outputs

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        outputs = _mixture_backward(list(grads[:4]), *ctx.saved_tensors)
        return tuple(g if n else None for g, n in zip(outputs, ctx.needs_input_grad, strict=True))


# -------------------------------------------------------------------------------------------------- public
def mixture_kl(
    mean: Tensor, log_var: Tensor, logits: Tensor, component_mean: Tensor, component_log_var: Tensor
) -> MixtureTerms:
    """Terms of the evidence lower bound under a mixture of Gaussians for each of several latent variables.

    The KL of the ELBO is kl + dispersion, plus aggregate_kl + mutual_information summed over the variables.

    Args:
        mean: posterior means of z, (batch, variables, latent), float32, float64, bfloat16 or float16.
        log_var: log of the posterior variances, like `mean`; clamped to [-40, 40].
        logits: of q(c|x), (batch, variables, components); -inf for a component that cannot be.
        component_mean: means of p(z|c), (variables, components, latent).
        component_log_var: log of their variances, likewise; clamped to [-40, 40].

    Returns:
        kl, dispersion, aggregate_kl and mutual_information.

    Raises:
        TypeError, ValueError: naming the argument whose type, shape or device is wrong, or an empty batch.

    Source: Shi et al. 2020, "Dispersed exponential family mixture VAEs for interpretable text generation".
    """
    inputs = {"mean": mean, "log_var": log_var, "logits": logits,
              "component_mean": component_mean, "component_log_var": component_log_var}  # fmt: skip
    return _terms(inputs, "latent")


def categorical_mixture_kl(z_logits: Tensor, logits: Tensor, component_logits: Tensor) -> MixtureTerms:
    """The same for categorical z: q(z|x) = softmax(z_logits) and p(z|c) = softmax(component_logits).

    Args:
        z_logits: (batch, variables, classes), float32, float64, bfloat16 or float16.
        logits: of q(c|x), (batch, variables, components).
        component_logits: (variables, components, classes). Log-probabilities below -10,000 count as that.

    Returns, raises, source: as :func:`mixture_kl`.
    """
    inputs = {"z_logits": z_logits, "logits": logits, "component_logits": component_logits}
    return _terms(inputs, "classes")


def _terms(inputs: dict[str, Tensor], last: str) -> MixtureTerms:
    first, z = next(iter(inputs.items()))
    for name, tensor in inputs.items():
        check_float(name, tensor)
        check_device(name, tensor, first, z)
    if z.dim() != 3 or 0 in z.shape:
        raise ValueError(f"{first}: expected shape (batch, variables, {last}), none of them 0, got {tuple(z.shape)}")
    logits = inputs["logits"]
    if logits.dim() != 3 or logits.shape[:2] != z.shape[:2] or not logits.shape[2]:
        batch, variables = z.shape[:2]
        raise ValueError(f"logits: expected shape ({batch}, {variables}, components), got {tuple(logits.shape)}")
    components = z.shape[1], logits.shape[2], z.shape[2]
    for name, tensor in inputs.items():
        if name == "log_var":
            check_shape(name, tensor, tuple(z.shape), f"(batch, variables, {last})")
        elif name.startswith("component"):
            check_shape(name, tensor, components, f"(variables, components, {last})")
    compute = compute_dtype(z)
    given = {name: tensor.to(compute) for name, tensor in inputs.items()}
    z_, *_, components_ = given.values()
    outputs = _Mixture.apply(z_, given.get("log_var"), given["logits"], given.get("component_mean"), components_)
    return MixtureTerms(*outputs[:4])
