"""GRU kernels against float64 PyTorch, one sequence at a time through torch.gru_cell."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvae.kernels import gru
from fastvae.ops import random

SEED, UNK = 123456789012345, 1
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRADIENTS = ["static_gates", "h0", "embedding", "weight_input", "weight_hh"]


class _Problem:
    """Operands of one call: the sizes are samples, batch, time, embed, hidden, vocabulary."""

    def __init__(self, sizes: tuple[int, ...], dtype: torch.dtype, word_dropout: float = 0.4) -> None:
        torch.manual_seed(1)
        samples, batch, time, embed_size, size, vocabulary = sizes
        self.dtype, self.word_dropout = dtype, word_dropout
        self.tokens = torch.randint(0, vocabulary, (batch, time))
        self.lengths = torch.randint(0, time + 1, (batch,))
        if batch > 1:
            self.lengths[:2] = torch.tensor([time, 0])
        sequences = samples * batch
        shapes = [(sequences, size), (vocabulary, embed_size), (3 * size, embed_size), (3 * size, size)]
        self.floats = [torch.randn(sequences, 4 * size)]
        self.floats += [(torch.randn(shape) * size**-0.5).to(dtype) for shape in shapes]
        self.grads = [torch.randn(shape).to(dtype) for shape in [(sequences, time, size), (sequences, size)]]

    def words(self) -> Tensor:
        """The tokens after word dropout."""
        batch, time = self.tokens.shape
        numbers = random.uniform(torch.tensor([SEED]), torch.arange(batch * time).reshape(batch, time))
        return torch.where((numbers < self.word_dropout) & (torch.arange(time) > 0), UNK, self.tokens)

    def eager(self, compute: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [x.to(compute).requires_grad_() for x in self.floats]
        static, h0, embedding, weight_input, weight_hh = leaves
        words, size = self.words(), h0.shape[1]
        hidden, h_n = [], []
        for n in range(len(h0)):
            b, h, steps = n % len(words), h0[n : n + 1], []
            m, rzn = static[n].split([size, 3 * size])
            bias_hh = torch.cat([torch.zeros_like(rzn[: 2 * size]), m])
            for t in range(int(self.lengths[b])):
                x = embedding[words[b, t] : words[b, t] + 1]
                h = torch.gru_cell(x, h, weight_input, weight_hh, rzn, bias_hh)
                steps.append(h)
            hidden.append(torch.cat([*steps, h0.new_zeros(self.tokens.shape[1] - len(steps), size)]))
            h_n.append(h[0])
        results = [torch.stack(x) for x in (hidden, h_n)]
        grads = torch.autograd.grad(
            results, leaves, [g.to(compute) for g in self.grads], materialize_grads=True, allow_unused=True
        )
        return results, list(grads)

    def kernels(self, device: str) -> tuple[list[Tensor], list[Tensor]]:
        tokens, lengths, *floats = (x.to(device) for x in (self.tokens, self.lengths, *self.floats))
        static_gates, *rest = floats
        options = (torch.tensor([SEED], device=device), self.word_dropout, UNK)
        *outputs, gates = gru.forward(tokens, lengths, static_gates, *rest, *options, True)
        assert gates.dtype == torch.float32
        *unkept, nothing = gru.forward(tokens, lengths, static_gates, *rest, *options, False)
        assert nothing.numel() == 0
        for kept, plain in zip(outputs, unkept, strict=True):
            torch.testing.assert_close(plain, kept, rtol=0, atol=0, equal_nan=True)
        incoming = [g.to(device) for g in self.grads]
        grads = gru.backward(*incoming, outputs[0], gates, tokens, lengths, *rest, *options)
        return [x.cpu() for x in outputs], [g.cpu() for g in grads]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 2), (1, 33, 3, 33, 7, 257), (3, 5, 3, 7, 33, 11)], ids=str)
def test_matches_float64(
    sizes: tuple[int, ...], dtype: torch.dtype, device: str, assert_within_budget: Callable
) -> None:
    problem = _Problem(sizes, dtype)
    ours, exact, plain = problem.kernels(device), problem.eager(torch.float64), problem.eager(dtype)
    for name, mine, truth, peer in zip(("hidden", "h_n"), ours[0], exact[0], plain[0], strict=True):
        assert mine.dtype == dtype, name
        assert_within_budget(name, mine, truth, peer, rounding=8 if dtype.itemsize == 4 else 2)
    for name, mine, truth, peer in zip(GRADIENTS, ours[1], exact[1], plain[1], strict=True):
        assert mine.dtype == (torch.float32 if name == "static_gates" else dtype), name
        # The sum over steps of 16-bit gate gradients is not exact for being kept in float32.
        rounding = 8 if dtype.itemsize == 4 else 2 * torch.finfo(dtype).eps / torch.finfo(mine.dtype).eps
        assert_within_budget(name, mine, truth, peer.to(mine.dtype), rounding=rounding)


@pytest.mark.usefixtures("poison")
def test_padding_is_zero_and_states_stop_at_the_length(device: str) -> None:
    problem = _Problem((2, 7, 5, 7, 33, 11), torch.float32)
    (hidden, h_n), grads = problem.kernels(device)
    lengths = problem.lengths.repeat(2)
    for n, length in enumerate(lengths.tolist()):
        assert (hidden[n, length:] == 0).all()
        assert torch.equal(h_n[n], hidden[n, length - 1] if length else problem.floats[1][n])
    empty = lengths == 0
    assert empty.any()
    assert torch.equal(grads[1][empty], problem.grads[1][empty])
    assert (grads[0][empty] == 0).all()


@pytest.mark.usefixtures("poison")
def test_a_token_out_of_range_gives_nan(device: str) -> None:
    problem = _Problem((2, 7, 5, 7, 33, 11), torch.float32, 0.0)
    problem.lengths[2:6] = 4
    problem.tokens[2:5, 2] = torch.tensor([-1, 11, 2**40])
    problem.tokens[5, 4] = 11  # in the padding: never read
    (hidden, h_n), grads = problem.kernels(device)
    assert hidden.unflatten(0, (2, 7))[:, 2:5, 2:4].isnan().all()
    assert hidden.isnan().sum() == 2 * 3 * 2 * 33
    assert h_n.isnan().all(-1).tolist() == [2 <= b < 5 for b in range(7)] * 2
    assert all(g.isnan().any() for g in grads)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("sizes", [(2, 0, 5, 7, 33, 11), (2, 3, 0, 7, 33, 11), (0, 3, 4, 7, 33, 11)], ids=str)
def test_no_elements(sizes: tuple[int, ...], device: str) -> None:
    problem = _Problem(sizes, torch.float32)
    problem.lengths.zero_()
    (hidden, h_n), grads = problem.kernels(device)
    assert hidden.shape == (sizes[0] * sizes[1], sizes[2], 33)
    assert torch.equal(h_n, problem.floats[1])
    assert [g.shape for g in grads] == [x.shape for x in problem.floats]
    assert torch.equal(grads[1], problem.grads[1])
    assert all((grads[i] == 0).all() for i in (0, 2, 3, 4))


def test_repeats_bit_for_bit(device: str) -> None:
    problem = _Problem((2, 17, 3, 33, 7, 11), torch.float32)
    first, second = problem.kernels(device), problem.kernels(device)
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


def test_float64_is_refused(device: str) -> None:
    with pytest.raises(TypeError, match=r"^embedding: expected float32, bfloat16 or float16, got torch\.float64$"):
        _Problem((1, 2, 3, 4, 5, 6), torch.float64).kernels(device)
