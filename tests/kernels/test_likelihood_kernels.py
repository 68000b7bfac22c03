"""Likelihood kernels against float64 PyTorch, the definitions of a user."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal

from fastvae.kernels import likelihood

SHAPES = [(1, 1, 1), (2, 7, 33), (1, 33, 7), (3, 257, 4), (2, 5, 513)]
CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [(shape, half) for shape in [(2, 7, 33), (2, 5, 513)] for half in (torch.bfloat16, torch.float16)]
LOG_VARS = ["number", "row", "full"]


def _bernoulli(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none").sum(-1)


def _gaussian(mean: Tensor, target: Tensor, log_var: Tensor) -> Tensor:
    return -Normal(mean, torch.exp(log_var.clamp(-40, 40) / 2), validate_args=False).log_prob(target).sum(-1)


def _operands(shape: tuple[int, int, int], dtype: torch.dtype, log_var: str) -> list[Tensor]:
    """Prediction, target in [0, 1], log_var if any, and the gradient of the nll."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype), torch.rand(shape[1:]).to(dtype)]
    if log_var:
        tensors.append(torch.randn({"number": (), "row": shape[2:], "full": shape}[log_var]))
        if log_var == "full":
            tensors[2] = tensors[2].to(dtype)
    return [*tensors, torch.randn(shape[:2])]


def _kernels(operands: list[Tensor], grad: Tensor, device: str, needed: list[bool] | None = None) -> list[Tensor]:
    operands, grad = [x.to(device) for x in operands], grad.to(device)
    needed = needed or [True] * len(operands)
    forward, backward = (
        (likelihood.bernoulli_forward, likelihood.bernoulli_backward)
        if len(operands) == 2
        else (likelihood.gaussian_forward, likelihood.gaussian_backward)
    )
    grads = backward(grad, *operands, *needed)
    assert [g is not None for g in grads] == needed
    return [forward(*operands).cpu(), *(g.cpu() for g in grads if g is not None)]


def _exact(operands: list[Tensor], grad: Tensor, compute: torch.dtype) -> list[Tensor]:
    leaves = [x.to(compute).requires_grad_() for x in operands]
    nll = (_bernoulli if len(leaves) == 2 else _gaussian)(*leaves)
    return [nll.detach(), *torch.autograd.grad(nll, leaves, grad.to(compute))]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("log_var", ["", *LOG_VARS])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_matches_float64(
    shape: tuple[int, int, int], dtype: torch.dtype, log_var: str, device: str, assert_within_budget: Callable
) -> None:
    *operands, grad = _operands(shape, dtype, log_var)
    ours, exact, eager = _kernels(operands, grad, device), *(_exact(operands, grad, d) for d in (torch.double, dtype))
    types = [torch.float32, *(x.dtype for x in operands)]
    for name, mine, truth, peer, kind in zip(
        ["nll", "grad", "grad_target", "grad_log_var"], ours, exact, eager, types, strict=False
    ):
        assert mine.dtype == kind, name
        # The interpreter cuts float32 to bfloat16 where a GPU rounds: one unit, not half of one.
        assert_within_budget(name, mine, truth, peer.to(kind), rounding=8 if kind == torch.float32 else 1)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("log_var", ["", "number", "row"])
def test_long_rows_and_many_rows_are_split_in_a_fixed_order(
    log_var: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(likelihood, "_SPLIT", 512)
    monkeypatch.setattr(likelihood, "_MAX_PARTIAL_SUMS", 3)
    *operands, grad = _operands((1, 5, 600), torch.float32, log_var)
    needed = [True, False, True][: len(operands)]
    first, second = (_kernels(operands, grad, device, needed) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact = _exact(operands, grad, torch.double)
    del exact[2]  # the target's
    for ours, truth in zip(first, exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("log_var", ["", *LOG_VARS])
def test_gradients_that_are_not_needed_change_no_other(log_var: str, device: str) -> None:
    *operands, grad = _operands((2, 7, 33), torch.float32, log_var)
    grads = _kernels(operands, grad, device)[1:]
    for i in range(len(operands)):
        for needed in ([j == i for j in range(len(operands))], [j != i for j in range(len(operands))]):
            some = _kernels(operands, grad, device, needed)[1:]
            expected = [g for g, n in zip(grads, needed, strict=True) if n]
            for ours, other in zip(some, expected, strict=True):
                torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("poison")
def test_a_target_in_another_type(device: str) -> None:
    logits, target, grad = _operands((2, 7, 33), torch.bfloat16, "")
    results = _kernels([logits, target.float()], grad, device)
    assert [x.dtype for x in results] == [torch.float32, torch.bfloat16, torch.float32]
    expected = _kernels([logits, target], grad, device)
    torch.testing.assert_close(results[:2], expected[:2])


def test_extreme_logits(device: str) -> None:
    extremes = [-math.inf, -3e38, -1e4, -100.0, -88.0, -40.0, 40.0, 88.0, 100.0, 1e4, 3e38, math.inf]
    logits = torch.tensor(extremes).repeat_interleave(3).reshape(1, 36, 1)
    target = torch.tensor([0.0, 1.0, 0.5]).repeat(12).reshape(36, 1)
    nll, grad, _ = _kernels([logits, target], torch.ones(1, 36), device)
    x, t = logits.double()[0], target.double()
    far = torch.where(x > 0, 1 - t, t)  # how much of the target is on the other side
    expected = torch.where(far == 0, 0, far * x.abs()) + torch.log1p(torch.exp(-x.abs()))
    torch.testing.assert_close(nll[0].double(), expected[:, 0], rtol=1e-6, atol=1e-37)
    expected = (1 - t) * torch.sigmoid(x) - t * torch.sigmoid(-x)
    torch.testing.assert_close(grad[0].double(), expected, rtol=1e-5, atol=1e-37)


def test_impossible_targets_and_nan_make_their_datum_nan(device: str) -> None:
    logits, target, _ = _operands((1, 6, 33), torch.float32, "")
    for row, value in enumerate((-0.01, 1.01, math.nan, math.inf)):
        target[row, 5] = value
    logits[0, 4, 7] = math.nan
    target[5, 3] = -0.0
    nll = likelihood.bernoulli_forward(logits.to(device), target.to(device)).cpu()
    assert nll.isnan().tolist() == [[True] * 5 + [False]]


@pytest.mark.parametrize("log_var", LOG_VARS)
def test_extreme_log_variances_are_finite_and_gradients_stop(log_var: str, device: str) -> None:
    extremes = [-math.inf, -3e38, -41.0, -40.0, 0.0, 40.0, 41.0, 3e38, math.inf]
    for value in extremes if log_var == "number" else [None]:
        mean, target, grad = torch.ones(1, 2, 9), torch.full((2, 9), 0.5), torch.ones(1, 2)
        row = torch.tensor(extremes)
        tensor = torch.tensor(value) if value is not None else row if log_var == "row" else row.expand(1, 2, 9).clone()
        results = _kernels([mean, target, tensor], grad, device)
        assert all(torch.isfinite(x).all() for x in results)
        assert torch.equal(results[3] != 0, tensor.abs() <= 40)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 5, 0), (0, 5, 3)], ids=str)
@pytest.mark.parametrize("log_var", ["", *LOG_VARS])
def test_no_elements(shape: tuple[int, int, int], log_var: str, device: str) -> None:
    *operands, grad = _operands(shape, torch.float32, log_var)
    nll, *grads = _kernels(operands, grad, device)
    assert torch.equal(nll, torch.zeros(shape[:2]))
    for ours, operand in zip(grads, operands, strict=True):
        assert torch.equal(ours, torch.zeros(operand.shape))


def test_float64_is_refused(device: str) -> None:
    zeros = torch.zeros(1, 2, 3, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match=r"^prediction: expected float32, bfloat16 or float16, got torch\.float64$"):
        likelihood.bernoulli_forward(zeros, zeros[0])
