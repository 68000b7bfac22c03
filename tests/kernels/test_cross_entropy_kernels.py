"""Linear + cross-entropy kernels against float64 PyTorch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.kernels import cross_entropy

IGNORED = -100
SHAPES = [(1, 1, 1), (7, 33, 257), (65, 7, 64), (33, 257, 7)]  # rows, hidden, vocabulary
CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [(SHAPES[1], half) for half in (torch.bfloat16, torch.float16)]


def _operands(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu", words: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    rows, hidden_size, vocabulary = shape
    hidden = torch.randn(rows, hidden_size).to(dtype)
    weight = (2 * torch.randn(vocabulary, hidden_size) / hidden_size**0.5).to(dtype)
    bias = torch.randn(vocabulary).to(dtype)
    target = torch.randint(0, vocabulary, (rows, words))
    target[1::3, 0] = IGNORED
    return hidden.to(device), weight.to(device), bias.to(device), target.to(device)


def _kernels(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    grad_losses: Tensor,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    losses, lse = cross_entropy.forward(hidden, weight, bias, target, IGNORED, label_smoothing)
    operands = (hidden, weight, bias, target, lse, IGNORED, label_smoothing)
    grads = cross_entropy.backward(grad_losses, *operands, True, True)
    return losses, lse, grads


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@pytest.mark.parametrize(("words", "label_smoothing"), [(1, 0.0), (1, 0.1), (5, 0.0), (5, 0.1)])
def test_matches_float64(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    with_bias: bool,
    words: int,
    label_smoothing: float,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    assert_within_budget: Callable,
) -> None:
    # Small enough for several slices of the vocabulary, forward and backward.
    monkeypatch.setattr(cross_entropy, "_FORWARD_PROGRAMS", 2)
    monkeypatch.setattr(cross_entropy, "_BUFFER_ELEMENTS", 128 * 64)
    monkeypatch.setattr(cross_entropy, "_BUFFER_MIN_COLUMNS", 64)
    hidden, weight, bias, target = _operands(shape, dtype, words=words)
    if words > 1:
        target[0, 1:] = target[0, :1]  # a word many times
    grad_losses = torch.randn(shape[0])
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    on_device = [x.to(device) for x in (hidden, weight, bias, target, grad_losses)]
    if not with_bias:
        on_device[2] = None
    losses, lse, grads = _kernels(*on_device, label_smoothing)

    def eager(compute: torch.dtype) -> list[Tensor]:
        inputs = [x.to(compute).requires_grad_() for x in leaves]
        logits = F.linear(*inputs)
        settings = {"ignore_index": IGNORED, "reduction": "none", "label_smoothing": label_smoothing}
        loss = sum(F.cross_entropy(logits, word, **settings) for word in target.unbind(1))
        gradients = torch.autograd.grad(loss, inputs, grad_losses.to(compute))
        return [loss, torch.logsumexp(logits, -1).masked_fill((target == IGNORED).all(1), 0), *gradients]

    names = ["losses", "lse", "grad_hidden", "grad_weight", "grad_bias"]
    ours = [losses, lse, *grads[: len(leaves)]]
    assert grads[len(leaves) :] == (None,) * (3 - len(leaves))
    for name, mine, truth, peer in zip(names, ours, eager(torch.float64), eager(dtype), strict=False):
        assert mine.dtype == (torch.float32 if name in ("losses", "lse") else dtype), name
        rounding = 8 if mine.dtype.itemsize == 4 else 2
        one = int(shape[2] == 1)  # of a single word all is zero but for the rounding of numbers of order 1
        assert_within_budget(name, mine.cpu() + one, truth + one, peer.to(mine.dtype) + one, rounding=rounding)


@pytest.mark.usefixtures("poison")
def test_ignored_rows_are_zero_and_leave_no_gradient(device: str) -> None:
    hidden, weight, bias, target = _operands((7, 33, 70), torch.float32, device)
    target[:] = IGNORED
    hidden[2] = float("inf")  # whatever the row holds
    losses, lse, grads = _kernels(hidden, weight, bias, target, torch.ones(7, device=device))
    assert (losses == 0).all()
    assert (lse == 0).all()
    assert (grads[0] == 0).all()
    assert (grads[2] == 0).all()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("wrong", [-1, 70, 2**40])
def test_a_target_out_of_range_gives_nan(wrong: int, device: str) -> None:
    hidden, weight, bias, target = _operands((7, 33, 70), torch.float32, device)
    target[3] = wrong
    losses, _, grads = _kernels(hidden, weight, bias, target, torch.ones(7, device=device))
    assert losses.isnan().tolist() == [row == 3 for row in range(7)]
    assert grads[0][3].isnan().all()
    assert grads[1].isnan().all()


@pytest.mark.usefixtures("poison")
def test_nan_in_gives_nan_out(device: str) -> None:
    hidden, weight, bias, target = _operands((7, 33, 200), torch.float32, device)
    hidden[3, 4] = float("nan")
    losses, _, grads = _kernels(hidden, weight, bias, target, torch.ones(7, device=device))
    assert losses.isnan().tolist() == [row == 3 for row in range(7)]
    assert grads[0].isnan().any(-1).tolist() == [row == 3 for row in range(7)]


@pytest.mark.usefixtures("poison")
def test_large_logits_and_masked_words(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_FORWARD_PROGRAMS", 2)
    hidden, weight, bias, target = _operands((7, 33, 257), torch.float32, device)
    weight *= 1000
    bias[:128] = float("-inf")  # whole blocks of the vocabulary
    target[:] = 200
    losses, _, grads = _kernels(hidden, weight, bias, target, torch.ones(7, device=device))
    exact = F.cross_entropy(F.linear(hidden.double(), weight.double(), bias.double()), target[:, 0], reduction="none")
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-3)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[1][:128] == 0).all()


@pytest.mark.usefixtures("poison")
def test_only_the_gradients_needed(device: str) -> None:
    hidden, weight, bias, target = _operands((7, 33, 70), torch.float32, device)
    losses, lse = cross_entropy.forward(hidden, weight, bias, target, IGNORED, 0.0)
    operands = (torch.ones_like(losses), hidden, weight, bias, target, lse, IGNORED, 0.0)
    both = cross_entropy.backward(*operands, True, True)
    only_hidden = cross_entropy.backward(*operands, True, False)
    only_weight = cross_entropy.backward(*operands, False, True)
    assert torch.equal(only_hidden[0], both[0])
    assert only_hidden[1:] == (None, None)
    assert only_weight[0] is None
    assert torch.equal(only_weight[1], both[1])
    assert torch.equal(only_weight[2], both[2])


@pytest.mark.usefixtures("poison")
def test_no_rows(device: str) -> None:
    hidden, weight, bias, target = _operands((0, 33, 70), torch.float32, device)
    losses, lse, grads = _kernels(hidden, weight, bias, target, torch.ones(0, device=device))
    assert losses.shape == lse.shape == (0,)
    assert [g.shape for g in grads] == [hidden.shape, weight.shape, bias.shape]
    assert all((g == 0).all() for g in grads)


def test_float64_is_refused(device: str) -> None:
    hidden, weight, _, target = _operands((2, 3, 4), torch.float64, device)
    with pytest.raises(TypeError, match=r"^hidden: expected float32, bfloat16 or float16, got torch\.float64$"):
        cross_entropy.forward(hidden, weight, None, target, IGNORED, 0.0)


def test_float32_products_follow_the_setting_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvae.kernels.precision import dot_precision

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, expected in (("ieee", "ieee"), ("tf32", "tf32")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert dot_precision() == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
