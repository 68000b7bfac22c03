"""LSTM kernels against float64 PyTorch, one sequence at a time through torch.lstm_cell."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvae.kernels import lstm, recurrence
from fastvae.ops import random

SEED, UNK = 123456789012345, 1
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["hidden", "h_n", "c_n"]
GRADIENTS = ["static_gates", "h0", "c0", "embedding", "weight_input", "weight_hh"]


class _Problem:
    """Operands of one call: the sizes are batch, time, embed, hidden, vocabulary; each sequence has `samples`."""

    def __init__(self, sizes: tuple[int, ...], dtype: torch.dtype, word_dropout: float = 0.4, samples: int = 1) -> None:
        torch.manual_seed(0)
        batch, time, embed_size, hidden_size, vocabulary = sizes
        self.dtype, self.word_dropout = dtype, word_dropout
        self.tokens = torch.randint(0, vocabulary, (batch, time))
        self.lengths = torch.randint(0, time + 1, (batch,))
        if batch > 1:
            self.lengths[:2] = torch.tensor([time, 0])
        scale, sequences = hidden_size**-0.5, samples * batch
        shapes = [(sequences, hidden_size)] * 2 + [(vocabulary, embed_size), (4 * hidden_size, embed_size),
                                               (4 * hidden_size, hidden_size)]  # fmt: skip
        self.floats = [torch.randn(sequences, 4 * hidden_size)]
        self.floats += [(torch.randn(shape) * scale).to(dtype) for shape in shapes]
        outputs = [(sequences, time, hidden_size), (sequences, hidden_size), (sequences, hidden_size)]
        self.grads = [torch.randn(shape).to(dtype) for shape in outputs]

    def words(self) -> Tensor:
        """The tokens after word dropout."""
        batch, time = self.tokens.shape
        numbers = random.uniform(torch.tensor([SEED]), torch.arange(batch * time).reshape(batch, time))
        return torch.where((numbers < self.word_dropout) & (torch.arange(time) > 0), UNK, self.tokens)

    def eager(self, compute: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [x.to(compute).requires_grad_() for x in self.floats]
        static, h0, c0, embedding, weight_input, weight_hh = leaves
        words, outputs = self.words(), []
        for n in range(h0.shape[0]):
            h, c, steps, b = h0[n : n + 1], c0[n : n + 1], [], n % self.tokens.shape[0]
            length = int(self.lengths[b])
            for t in range(length):
                x = embedding[words[b, t] : words[b, t] + 1]
                h, c = torch.lstm_cell(x, (h, c), weight_input, weight_hh, static[n], torch.zeros_like(static[n]))
                steps.append(h)
            padding = h0.new_zeros(self.tokens.shape[1] - length, h0.shape[1])
            outputs.append((torch.cat([*steps, padding]), h[0], c[0]))
        results = [torch.stack(x) for x in zip(*outputs, strict=True)]
        grads = torch.autograd.grad(
            results, leaves, [g.to(compute) for g in self.grads], materialize_grads=True, allow_unused=True
        )
        return results, list(grads)

    def kernels(self, device: str) -> tuple[list[Tensor], list[Tensor]]:
        tokens, lengths, *floats = (x.to(device) for x in (self.tokens, self.lengths, *self.floats))
        static_gates, *rest = floats
        options = (torch.tensor([SEED], device=device), self.word_dropout, UNK)
        *outputs, gates, cells = lstm.forward(tokens, lengths, static_gates, *rest, *options)
        assert gates.dtype == cells.dtype == torch.float32
        forgetting = [*lstm.forward(tokens, lengths, static_gates, *rest, *options, keep=False)]
        torch.testing.assert_close(forgetting[:3], outputs, rtol=0, atol=0, equal_nan=True)
        assert [x.numel() for x in forgetting[3:]] == [0, 0]
        incoming = [g.to(device) for g in self.grads]
        saved = (outputs[0], gates, cells, tokens, lengths)
        grads = lstm.backward(*incoming, *saved, *rest, *options)
        return [x.cpu() for x in outputs], [g.cpu() for g in grads]


@pytest.fixture(params=["a launch for all steps", "a launch a step"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test on both kinds of kernels, whatever the size."""
    monkeypatch.setattr(lstm, "_fits_chip", lambda weight_hh: request.param == "a launch for all steps")


@pytest.mark.parametrize(
    ("hidden_size", "dtype", "precision", "fits"),
    [
        (32, torch.float32, "ieee", True),
        (33, torch.float32, "ieee", False),
        (33, torch.float32, "tf32", True),
        (65, torch.float32, "tf32", False),
        (128, torch.bfloat16, "ieee", True),
        (129, torch.float16, "ieee", False),
    ],
)
def test_what_fits_on_chip(hidden_size: int, dtype: torch.dtype, precision: str, fits: bool,
                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(lstm, "dot_precision", lambda: precision)
    assert lstm._fits_chip(torch.empty(4 * hidden_size, hidden_size, dtype=dtype)) == fits


@pytest.mark.usefixtures("poison", "launches")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "samples"),
    [((1, 1, 1, 1, 2), 1), ((33, 3, 33, 7, 257), 1), ((3, 3, 7, 33, 11), 7)],
    ids=str,
)
def test_matches_float64(
    sizes: tuple[int, ...], samples: int, dtype: torch.dtype, device: str, assert_within_budget: Callable
) -> None:
    problem = _Problem(sizes, dtype, samples=samples)
    ours, exact, plain = problem.kernels(device), problem.eager(torch.float64), problem.eager(dtype)
    for name, mine, truth, peer in zip(NAMES, ours[0], exact[0], plain[0], strict=True):
        assert mine.dtype == dtype, name
        assert_within_budget(name, mine, truth, peer, rounding=8 if dtype.itemsize == 4 else 2)
    for name, mine, truth, peer in zip(GRADIENTS, ours[1], exact[1], plain[1], strict=True):
        assert mine.dtype == (torch.float32 if name == "static_gates" else dtype), name
        # The sum over steps of 16-bit gate gradients is not exact for being kept in float32.
        rounding = 8 * torch.finfo(dtype).eps / torch.finfo(mine.dtype).eps if dtype.itemsize == 4 else 2
        if dtype.itemsize == 2 and mine.dtype == torch.float32:
            rounding = 2 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        assert_within_budget(name, mine, truth, peer.to(mine.dtype), rounding=rounding)


@pytest.mark.usefixtures("poison", "launches")
def test_padding_is_zero_and_states_stop_at_the_length(device: str) -> None:
    problem = _Problem((7, 5, 7, 33, 11), torch.float32)
    (hidden, h_n, c_n), grads = problem.kernels(device)
    for b, length in enumerate(problem.lengths.tolist()):
        assert (hidden[b, length:] == 0).all()
        assert torch.equal(h_n[b], hidden[b, length - 1] if length else problem.floats[1][b])
    empty = problem.lengths == 0
    assert empty.any()
    assert torch.equal(c_n[empty], problem.floats[2][empty])
    assert torch.equal(grads[1][empty], problem.grads[1][empty])
    assert torch.equal(grads[2][empty], problem.grads[2][empty])
    assert (grads[0][empty] == 0).all()


@pytest.mark.usefixtures("poison", "launches")
def test_all_sequences_empty(device: str) -> None:
    problem = _Problem((3, 2, 7, 33, 11), torch.float32)
    problem.lengths.zero_()
    (hidden, h_n, c_n), grads = problem.kernels(device)
    assert (hidden == 0).all()
    assert torch.equal(h_n, problem.floats[1])
    assert torch.equal(c_n, problem.floats[2])
    assert all((grads[i] == 0).all() for i in (0, 3, 4, 5))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_word_dropout_follows_the_stream(probability: float, device: str) -> None:
    problem = _Problem((33, 7, 5, 3, 20), torch.float32, probability)
    problem.lengths.fill_(7)
    problem.lengths[4] = 3
    operands = [x.to(device) for x in (problem.tokens, problem.lengths, problem.floats[3])]
    inputs, words = recurrence.embed(*operands, torch.tensor([SEED], device=device), probability, UNK)
    inside = torch.arange(7) < problem.lengths[:, None]
    expected = problem.words()
    assert torch.equal(words.cpu().reshape(33, 7), torch.where(inside, expected, 0))
    assert torch.equal(expected[:, 0], problem.tokens[:, 0]), "<s> is never dropped"
    gathered = problem.floats[3][expected] * inside[..., None]
    assert torch.equal(inputs.cpu().reshape(33, 7, 5), gathered)


@pytest.mark.usefixtures("poison", "launches")
def test_a_token_out_of_range_gives_nan(device: str) -> None:
    problem = _Problem((7, 5, 7, 33, 11), torch.float32, 0.0)
    problem.lengths[2:6] = 4
    problem.tokens[2:5, 2] = torch.tensor([-1, 11, 2**40])
    problem.tokens[5, 4] = 11  # in the padding: never read
    (hidden, h_n, c_n), grads = problem.kernels(device)
    assert hidden[2:5, 2:4].isnan().all()
    assert hidden.isnan().sum() == 3 * 2 * 33
    assert h_n.isnan().all(-1).tolist() == c_n.isnan().all(-1).tolist() == [2 <= b < 5 for b in range(7)]
    assert all(g.isnan().any() for g in grads)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("sizes", [(0, 5, 7, 33, 11), (3, 0, 7, 33, 11)], ids=str)
def test_no_elements(sizes: tuple[int, ...], device: str) -> None:
    problem = _Problem(sizes, torch.float32)
    problem.lengths.zero_()
    (hidden, h_n, c_n), grads = problem.kernels(device)
    assert hidden.shape == (sizes[0], sizes[1], 33)
    assert torch.equal(h_n, problem.floats[1])
    assert torch.equal(c_n, problem.floats[2])
    assert [g.shape for g in grads] == [x.shape for x in problem.floats]
    assert torch.equal(grads[1], problem.grads[1])
    assert all((grads[i] == 0).all() for i in (0, 3, 4, 5))


@pytest.mark.usefixtures("launches")
def test_repeats_bit_for_bit(device: str) -> None:
    problem = _Problem((33, 3, 33, 7, 11), torch.float32)
    first, second = problem.kernels(device), problem.kernels(device)
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


def test_float64_is_refused(device: str) -> None:
    with pytest.raises(TypeError, match=r"^embedding: expected float32, bfloat16 or float16, got torch\.float64$"):
        _Problem((2, 3, 4, 5, 6), torch.float64).kernels(device)
