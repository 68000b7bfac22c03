"""Mixture kernels against the definition in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvae.kernels import mixture
from fastvae.ops.mixture import reference

SHAPES = [(1, 1, 1, 1), (7, 3, 5, 2), (33, 2, 3, 7), (70, 1, 33, 5), (5, 2, 4, 128)]


def _operands(shape: tuple[int, int, int, int], categorical: bool) -> tuple[list[Tensor | None], list[Tensor]]:
    batch, variables, size, latent = shape
    torch.manual_seed(0)
    shapes = [(batch, variables, latent)] * 2 + [(batch, variables, size)] + [(variables, size, latent)] * 2
    inputs: list[Tensor | None] = [torch.randn(s) for s in shapes]
    if categorical:
        inputs[1] = inputs[3] = None
    return inputs, [torch.randn(n) for n in (batch, batch, variables, variables)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("categorical", [False, True], ids=["gaussian", "categorical"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(
    shape: tuple[int, int, int, int], categorical: bool, device: str, assert_within_budget: Callable
) -> None:
    inputs, grads = _operands(shape, categorical)
    on_device = [None if x is None else x.to(device) for x in inputs]
    outputs = mixture.forward(*on_device)
    gradients = mixture.backward([g.to(device) for g in grads], outputs[4], *on_device)
    ours = [x.cpu() for x in (*outputs, *gradients) if x is not None]

    def eager(dtype: torch.dtype) -> list[Tensor]:
        leaves = [None if x is None else x.to(dtype).requires_grad_() for x in inputs]
        made = reference(*leaves)
        given = [x for x in leaves if x is not None]
        return [*made, *torch.autograd.grad(made[:4], given, [g.to(dtype) for g in grads])]

    for n, rows in enumerate(zip(ours, eager(torch.float64), eager(torch.float32), strict=True)):
        # Terms that are 0 (of one component, or of one datum) are so to the rounding of 1.
        with_one = [torch.cat([x.flatten(), x.new_ones(1)]) for x in rows]
        assert_within_budget(str(n), *with_one, rounding=16)


def test_extreme_values_are_finite_and_gradients_stop(device: str) -> None:
    inputs, grads = _operands((4, 2, 3, 2), False)
    mean, log_var, logits, component_mean, component_log_var = (x.to(device) for x in inputs)
    log_var[0], log_var[1] = 1e4, -1e4
    component_log_var[0, 0], component_log_var[1, 1] = 1e4, -1e4
    logits[2, 0, 1] = float("-inf")
    operands = mean, log_var, logits, component_mean, component_log_var
    outputs = mixture.forward(*operands)
    gradients = mixture.backward([g.to(device) for g in grads], outputs[4], *operands)
    assert all(x.isfinite().all() for x in (*outputs, *gradients))
    assert (gradients[1][:2] == 0).all()
    assert (gradients[4][0, 0] == 0).all()
    assert (gradients[2][2, 0, 1] == 0).all()
