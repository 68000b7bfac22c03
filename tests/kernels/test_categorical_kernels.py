"""Gumbel-softmax + KL kernels against float64 PyTorch with noise from the reference stream."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.kernels import categorical
from fastvae.ops import random

SEED = 123456789012345
SHAPES = [(1, 1), (33, 7), (257, 4), (3, 1028), (2, 2049)]
CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [(shape, half) for shape in [(33, 7), (3, 1028)] for half in (torch.bfloat16, torch.float16)]
SLOPE = 1.25
INF = float("inf")


def _scores(logits: Tensor, num_samples: int) -> Tensor:
    element = torch.arange(num_samples * logits.numel()).reshape(num_samples, *logits.shape)
    return F.log_softmax(logits, -1) + random.gumbel(torch.tensor([SEED]), element).to(logits)


def _eager(logits: Tensor, prior: list[Tensor], num_samples: int) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(logits, -1)
    log_prior = prior[0].to(logits.dtype) if prior else -torch.tensor(float(logits.shape[1])).to(logits).log()
    return F.softmax(_scores(logits, num_samples) * SLOPE, -1), (log_p.exp() * (log_p - log_prior)).sum(-1)


def _operands(
    rows: int, classes: int, dtype: torch.dtype, prior: str, num_samples: int
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    logits = (2 * torch.randn(rows, classes)).to(dtype)
    prior_rows = {"none": 0, "shared": 1, "full": rows}[prior]
    priors = [F.log_softmax(torch.randn(prior_rows, classes), -1)] if prior != "none" else []
    return logits, priors, torch.randn(num_samples, rows, classes).to(dtype), torch.randn(rows)


def _kernels(
    logits: Tensor, prior: list[Tensor], grad_sample: Tensor, grad_kl: Tensor, hard: bool, device: str
) -> tuple[list[Tensor], list[Tensor]]:
    logits, grad_sample, grad_kl = (x.to(device) for x in (logits, grad_sample, grad_kl))
    log_prior = prior[0].to(device) if prior else None
    seed = torch.tensor([SEED], device=device)
    sample, kl = categorical.sample_kl_forward(logits, log_prior, seed, SLOPE, hard, grad_sample.shape[0])
    grads = categorical.sample_kl_backward(
        grad_sample, grad_kl, None if hard else sample, logits, log_prior, seed, SLOPE
    )
    return [sample.cpu(), kl.cpu()], [g.cpu() for g in grads if g is not None]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("prior", ["none", "shared", "full"])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_matches_float64(
    shape: tuple[int, int], dtype: torch.dtype, prior: str, device: str, assert_within_budget: Callable
) -> None:
    num_samples = 1 + shape[0] % 2
    logits, priors, grad_sample, grad_kl = _operands(*shape, dtype, prior, num_samples)
    ours = _kernels(logits, priors, grad_sample, grad_kl, False, device)

    def eager(compute: torch.dtype) -> list[Tensor]:
        leaves = [x.to(compute).requires_grad_() for x in (logits, *priors)]
        outputs = _eager(leaves[0], leaves[1:], num_samples)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [grad_sample.to(compute), grad_kl.to(compute)])]

    names = ["sample", "kl", "grad_logits", "grad_prior"]
    for name, mine, truth, peer in zip(names, [*ours[0], *ours[1]], eager(torch.float64), eager(dtype), strict=False):
        assert mine.dtype == (dtype if name in ("sample", "grad_logits") else torch.float32), name
        # The noise is good to 4e-6. The interpreter cuts float32 to bfloat16 where a GPU rounds, a unit each time: the
        # sample, then the gradient made of it.
        assert_within_budget(name, mine, truth, peer.to(mine.dtype), rounding=40 if mine.dtype.itemsize == 4 else 2)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("prior", ["none", "shared", "full"])
@pytest.mark.parametrize("shape", [(33, 7), (5, 260)], ids=str)
def test_hard_samples_are_one_hot_and_have_the_soft_gradient(shape: tuple[int, int], prior: str, device: str) -> None:
    operands = _operands(*shape, torch.float32, prior, 2)
    (hard, hard_kl), hard_grads = _kernels(*operands, True, device)
    (_, soft_kl), soft_grads = _kernels(*operands, False, device)
    assert torch.equal(hard, F.one_hot(_scores(operands[0], 2).argmax(-1), shape[1]).float())
    assert torch.equal(hard_kl, soft_kl)
    torch.testing.assert_close(hard_grads, soft_grads, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("hard", [False, True])
def test_extremes(hard: bool, device: str) -> None:
    """Impossible classes get exactly nothing; a row of NaN, +inf or nothing possible is NaN, and no other."""
    rows = [[1e4, -1e4, 0.0], [-INF, 1e30, -1e30], [-INF, -INF, -3.0], [float("nan"), 0, 0], [-INF] * 3, [INF, 0, 0]]
    logits = torch.tensor(rows)
    prior = [F.log_softmax(torch.tensor([[0.0, 0.0, -INF]]), -1)]
    (sample, kl), _ = _kernels(logits, [], torch.ones(1, 6, 3), torch.ones(6), hard, device)
    assert sample[0].isnan().all(1).tolist() == kl.isnan().tolist() == [False] * 3 + [True] * 3
    assert not sample[0, :3].isnan().any()
    torch.testing.assert_close(kl[:3], torch.tensor(3.0).log().expand(3))
    assert (sample[0, :3][logits[:3] == -INF] == 0).all()
    (_, kl), grads = _kernels(logits[:2], prior, torch.ones(1, 2, 3), torch.ones(2), hard, device)
    assert torch.isfinite(kl).all()
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("prior", ["none", "shared", "full"])
def test_gradients_of_single_outputs_add_up(prior: str, device: str) -> None:
    logits, priors, grad_sample, grad_kl = _operands(7, 33, torch.float32, prior, 2)
    seed = torch.tensor([SEED], device=device)
    moved = [x.to(device) for x in (grad_sample, grad_kl, logits, *priors)]
    log_prior = moved[3] if priors else None

    def grads(*upstream: Tensor | None) -> list[Tensor]:
        result = categorical.sample_kl_backward(*upstream, None, moved[2], log_prior, seed, SLOPE)
        return [g for g in result if g is not None]

    both, sample_alone, kl_alone = grads(*moved[:2]), grads(moved[0], None), grads(None, moved[1])
    for whole, first, second in zip(both, sample_alone, kl_alone, strict=True):
        torch.testing.assert_close(first + second, whole)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("prior", ["none", "shared"])
def test_no_rows(prior: str, device: str) -> None:
    (sample, kl), grads = _kernels(*_operands(0, 5, torch.float32, prior, 2), False, device)
    assert sample.shape == (2, 0, 5)
    assert kl.shape == (0,)
    assert [g.shape for g in grads] == [(0, 5), (1, 5)][: len(grads)]
    assert all((g == 0).all() for g in grads)


def test_shared_prior_is_summed_over_many_programs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(categorical, "_MAX_PARTIAL_SUMS", 3)  # so that each program takes several tiles
    operands = _operands(257, 33, torch.float32, "shared", 1)
    first, second = (_kernels(*operands, False, device)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact = -(F.softmax(operands[0].double(), -1) * operands[3][:, None]).sum(0, keepdim=True)
    torch.testing.assert_close(first[1].double(), exact, rtol=1e-5, atol=1e-5)


def test_what_is_refused(device: str) -> None:
    seed = torch.tensor([1], device=device)
    with pytest.raises(TypeError, match=r"^logits: expected float32, bfloat16 or float16, got torch\.float64$"):
        categorical.sample_kl_forward(torch.zeros(2, 3, dtype=torch.float64, device=device), None, seed, 1.0, False, 1)
    with pytest.raises(ValueError, match=r"^logits: expected at most 8192 classes, got 8193$"):
        categorical.sample_kl_forward(torch.zeros(1, 8193, device=device), None, seed, 1.0, False, 1)
