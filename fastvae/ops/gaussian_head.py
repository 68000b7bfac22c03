"""A linear layer whose output parametrizes a diagonal Gaussian, its samples and their KL divergence, as one op.

    mean, log_var = halves of hidden W^T + b,    z and KL as :mod:`fastvae.ops.gaussian` has them

What one op saves over two: the halves are read where the product left them and their gradient is written where the
layer's products read it, with no copies between; and a node of the graph, which at the sizes of a latent takes as long
as the arithmetic. Source: Kingma & Welling 2014, section 2.4 and appendix B.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops import gaussian
from fastvae.ops.backend import CORE, compute_dtype, dtype_code, first_order, in_autocast, pointer, register
from fastvae.ops.checks import check_choice, check_float, check_like, check_samples, check_shape
from fastvae.ops.random import seed_of


# ------------------------------------------------------------------------------------------------ reference
def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, num_samples: int | None, sum_latent: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Eager definition. hidden (..., H), weight (2 D, H), bias (2 D); returns z, kl and mean beside log_var."""
    return _compose(gaussian.reference_sample_kl, hidden, weight, bias, seed, num_samples, sum_latent)


def reference_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    grad_parameters: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    parameters: Tensor,
    seed: Tensor,
    num_samples: int | None,
    sum_latent: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference` for hidden, weight and bias."""
    operands = parameters, seed, num_samples, sum_latent
    grad = _compose_backward(gaussian.reference_sample_kl_backward, grad_z, grad_kl, *operands)
    return _through_linear(grad, grad_parameters, hidden, weight)


def _compose(sample_kl: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor,
             num_samples: int | None, sum_latent: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    parameters = F.linear(hidden, weight, bias)
    return *sample_kl(*parameters.chunk(2, -1), None, None, seed, num_samples, sum_latent), parameters


def _compose_backward(sample_kl_backward: Any, grad_z: Tensor | None, grad_kl: Tensor | None, parameters: Tensor,
                      seed: Tensor, num_samples: int | None, sum_latent: bool) -> Tensor:  # fmt: skip
    if grad_z is None and grad_kl is None:
        return torch.zeros_like(parameters)
    halves = parameters.chunk(2, -1)
    grads = sample_kl_backward(grad_z, grad_kl, *halves, None, None, seed, num_samples, sum_latent)
    return torch.cat(grads[:2], -1)


def _through_linear(
    grad: Tensor, grad_parameters: Tensor | None, hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if grad_parameters is not None:
        grad = grad + grad_parameters
    count = hidden.shape[:-1].numel()
    rows = grad.reshape(count, weight.shape[0])
    grad_weight = rows.t() @ hidden.reshape(count, weight.shape[1])
    return (rows @ weight).reshape(hidden.shape), grad_weight, rows.sum(0)


# ----------------------------------------------------------------------------------------------- C++ on CPU
def _cpu(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, num_samples: int | None, sum_latent: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # The C++ core takes the halves as they lie in the product.
    return _compose(gaussian.cpu_sample_kl, hidden, weight, bias, seed, num_samples, sum_latent)


def _cpu_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    grad_parameters: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    parameters: Tensor,
    seed: Tensor,
    num_samples: int | None,
    sum_latent: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    assert CORE is not None
    grad_z = None if grad_z is None else grad_z.contiguous()
    grad_kl = None if grad_kl is None else grad_kl.contiguous()
    parameters = parameters.contiguous()
    grad = parameters.new_empty(parameters.shape)
    size = parameters.shape[-1]
    latent, half = size // 2, size // 2 * parameters.element_size()
    rows = parameters.numel() // max(size, 1)
    CORE.gaussian_backward(
        dtype_code(grad), pointer(grad_z), pointer(grad_kl), pointer(parameters), pointer(parameters) + half, size,
        0, 0, 0, pointer(seed), pointer(grad), pointer(grad) + half, size, 0, 0,
        1 if num_samples is None else num_samples, rows, latent, sum_latent,
    )  # fmt: skip
    return _through_linear(grad, grad_parameters, hidden, weight)


# -------------------------------------------------------------------------------------------- Triton on CUDA
def _cuda(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, num_samples: int | None, sum_latent: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _compose(gaussian.cuda_sample_kl, hidden, weight, bias, seed, num_samples, sum_latent)


def _cuda_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    grad_parameters: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    parameters: Tensor,
    seed: Tensor,
    num_samples: int | None,
    sum_latent: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    operands = parameters, seed, num_samples, sum_latent
    grad = _compose_backward(gaussian.cuda_sample_kl_backward, grad_z, grad_kl, *operands)
    return _through_linear(grad, grad_parameters, hidden, weight)


# ------------------------------------------------------------------------------------------ schema, autograd
def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, num_samples: int | None, sum_latent: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, latent = hidden.shape[:-1], weight.shape[0] // 2
    z = hidden.new_empty((*batch, latent) if num_samples is None else (num_samples, *batch, latent))
    kl = hidden.new_empty(batch if sum_latent else (*batch, latent), dtype=compute_dtype(hidden))
    return z, kl, hidden.new_empty((*batch, weight.shape[0]))


def _fake_backward(grad_z: Any, grad_kl: Any, grad_parameters: Any, hidden: Tensor, weight: Tensor, parameters: Tensor,
                   seed: Tensor, num_samples: Any, sum_latent: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


_head = register(
    "gaussian_head(Tensor hidden, Tensor weight, Tensor? bias, Tensor seed, SymInt? num_samples, bool sum_latent) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)
_head_backward = register(
    "gaussian_head_backward(Tensor? grad_z, Tensor? grad_kl, Tensor? grad_parameters, Tensor hidden, Tensor weight, "
    "Tensor parameters, Tensor seed, SymInt? num_samples, bool sum_latent) -> (Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=_fake_backward,
    cpu=_cpu_backward,
    cuda=_cuda_backward,
)


class _GaussianHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor,
                num_samples: int | None, sum_latent: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        z, kl, parameters = _head(hidden, weight, bias, seed, num_samples, sum_latent)
        ctx.save_for_backward(hidden, weight, parameters, seed)
        ctx.num_samples, ctx.sum_latent = num_samples, sum_latent
        return z, kl, parameters

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = _head_backward(*grads, *ctx.saved_tensors, ctx.num_samples, ctx.sum_latent)
        return *(g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=False)), None, None, None


# -------------------------------------------------------------------------------------------------- public
def gaussian_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_samples: int | None = None,
    reduction: str = "sum",
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Linear layer to mean and log-variance, sample z ~ N(mean, exp(log_var)) and its KL from N(0, I), as one op.

    The same numbers as `F.linear` and :func:`gaussian_sample_kl` give for the same seed.

    Args:
        hidden: (..., hidden), float32, float64, bfloat16 or float16.
        weight: (2 * latent, hidden), dtype and device of `hidden`: the first half gives the mean, the second log_var.
        bias: (2 * latent,), likewise; none if None.
        num_samples: draw this many samples of each datum; None draws one and adds no dimension.
        reduction: "sum" adds the KL over the latent dimension, "none" keeps it per dimension.
        generator: source of the seed, on the device of `hidden`; torch's global one if None.
        seed: int64 tensor (1,) on the device of `hidden` to use instead of drawing one.

    Returns:
        z, in `hidden`'s dtype, (..., latent) or (num_samples, ..., latent); the KL divergence in nats, float32
        (float64 for float64 input), (...) or (..., latent) for "none"; mean and log_var, each (..., latent). All
        have gradients.

    Raises:
        TypeError, ValueError: naming the argument whose type, shape or device is wrong.

    Source: Kingma & Welling 2014, "Auto-encoding variational Bayes", section 2.4.
    """
    check_float("hidden", hidden)
    if in_autocast(hidden):
        hidden = hidden.to(weight.dtype)  # up: log_var in half precision would cost the KL its digits
    check_like("weight", weight, "hidden", hidden)
    if weight.dim() != 2 or weight.shape[0] % 2 or hidden.dim() == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected shape (2 * latent, hidden) for hidden's {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_like("bias", bias, "hidden", hidden)
        check_shape("bias", bias, (weight.shape[0],), "(2 * latent,)")
    check_choice("reduction", reduction, ("sum", "none"))
    check_samples(num_samples)
    seed = seed_of(seed, generator, "hidden", hidden)
    z, kl, parameters = _GaussianHead.apply(hidden, weight, bias, seed, num_samples, reduction == "sum")
    return z, kl, *parameters.chunk(2, -1)
