"""Layer-normalized LSTM kernels against float64 PyTorch, one sequence at a time through F.layer_norm."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.kernels import layer_norm_lstm
from fastvae.ops import random

SEED, UNK = 123456789012345, 1
EPS = 0.5  # one that counts: without, the gradient of a state of size 1 is but rounding, as its scale is lost
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["hidden", "h_n", "c_n"]
GRADIENTS = ["static_inputs", "h0", "c0", "embedding", "weight_input", "weight_hh", "norm_gates", "norm_cell"]


class _Problem:
    """Operands of one call: the sizes are samples, batch, time, embed, hidden, vocabulary."""

    def __init__(self, sizes: tuple[int, ...], dtype: torch.dtype, word_dropout: float = 0.4) -> None:
        torch.manual_seed(2)
        samples, batch, time, embed_size, size, vocabulary = sizes
        self.dtype, self.word_dropout = dtype, word_dropout
        self.tokens = torch.randint(0, vocabulary, (batch, time))
        self.lengths = torch.randint(0, time + 1, (batch,))
        if batch > 1:
            self.lengths[:2] = torch.tensor([time, 0])
        sequences = samples * batch
        shapes = [(sequences, size), (sequences, size), (vocabulary, embed_size), (4 * size, embed_size),
                  (4 * size, size), (3, 4 * size), (2, size)]  # fmt: skip
        self.floats = [torch.randn(sequences, 4 * size)]
        self.floats += [torch.randn(shape).to(dtype) for shape in shapes]
        outputs = [(sequences, time, size), (sequences, size), (sequences, size)]
        self.grads = [torch.randn(shape).to(dtype) for shape in outputs]

    def words(self) -> Tensor:
        """The tokens after word dropout."""
        batch, time = self.tokens.shape
        numbers = random.uniform(torch.tensor([SEED]), torch.arange(batch * time).reshape(batch, time))
        return torch.where((numbers < self.word_dropout) & (torch.arange(time) > 0), UNK, self.tokens)

    def eager(self, compute: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [x.to(compute).requires_grad_() for x in self.floats]
        static, h0, c0, embedding, weight_input, weight_hh, norm_gates, norm_cell = leaves
        gain_input, gain_hidden, bias = norm_gates
        words, outputs, size = self.words(), [], h0.shape[1]
        for n in range(h0.shape[0]):
            h, c, steps, b = h0[n], c0[n], [], n % self.tokens.shape[0]
            for t in range(int(self.lengths[b])):
                inputs = weight_input @ embedding[words[b, t]] + static[n]
                gates = F.layer_norm(inputs, (4 * size,), gain_input, bias, EPS)
                i, f, g, o = (gates + F.layer_norm(weight_hh @ h, (4 * size,), gain_hidden, None, EPS)).chunk(4)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * F.layer_norm(c, (size,), norm_cell[0], norm_cell[1], EPS).tanh()
                steps.append(h)
            padding = h0.new_zeros(self.tokens.shape[1] - len(steps), size)
            outputs.append((torch.cat([torch.stack(steps), padding]) if steps else padding, h, c))
        results = [torch.stack(x) for x in zip(*outputs, strict=True)]
        grads = torch.autograd.grad(
            results, leaves, [g.to(compute) for g in self.grads], materialize_grads=True, allow_unused=True
        )
        return results, list(grads)

    def kernels(self, device: str) -> tuple[list[Tensor], list[Tensor]]:
        tokens, lengths, *floats = (x.to(device) for x in (self.tokens, self.lengths, *self.floats))
        static_inputs, *rest = floats
        options = (torch.tensor([SEED], device=device), self.word_dropout, UNK, EPS)
        *outputs, normalized, inverses, cells = layer_norm_lstm.forward(
            tokens, lengths, static_inputs, *rest, *options, True
        )
        assert {x.dtype for x in (normalized, inverses, cells)} == {torch.float32}
        *unkept, a, b, c = layer_norm_lstm.forward(tokens, lengths, static_inputs, *rest, *options, False)
        assert a.shape == b.shape == c.shape == (0, 0)
        torch.testing.assert_close(unkept, outputs, rtol=0, atol=0, equal_nan=True)
        incoming = [g.to(device) for g in self.grads]
        saved = (outputs[0], normalized, inverses, cells, tokens, lengths)
        grads = layer_norm_lstm.backward(*incoming, *saved, *rest, *options)
        return [x.cpu() for x in outputs], [g.cpu() for g in grads]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 2), (1, 17, 2, 33, 7, 257), (2, 3, 3, 7, 33, 11)], ids=str)
def test_matches_float64(
    sizes: tuple[int, ...], dtype: torch.dtype, device: str, assert_within_budget: Callable
) -> None:
    problem = _Problem(sizes, dtype)
    ours, exact, plain = problem.kernels(device), problem.eager(torch.float64), problem.eager(dtype)
    for name, mine, truth, peer in zip(NAMES, ours[0], exact[0], plain[0], strict=True):
        assert mine.dtype == dtype, name
        assert_within_budget(name, mine, truth, peer, rounding=8 if dtype.itemsize == 4 else 2)
    for name, mine, truth, peer in zip(GRADIENTS, ours[1], exact[1], plain[1], strict=True):
        assert mine.dtype == (torch.float32 if name == "static_inputs" else dtype), name
        # The sum over steps of 16-bit gradients is not exact for being kept in float32.
        rounding = 8 if dtype.itemsize == 4 else 2 * torch.finfo(dtype).eps / torch.finfo(mine.dtype).eps
        assert_within_budget(name, mine, truth, peer.to(mine.dtype), rounding=rounding)


@pytest.mark.usefixtures("poison")
def test_padding_is_zero_and_states_stop_at_the_length(device: str) -> None:
    problem = _Problem((2, 6, 5, 7, 33, 11), torch.float32)
    (hidden, h_n, c_n), grads = problem.kernels(device)
    lengths = problem.lengths.repeat(2)
    for n, length in enumerate(lengths.tolist()):
        assert (hidden[n, length:] == 0).all()
        assert torch.equal(h_n[n], hidden[n, length - 1] if length else problem.floats[1][n])
    empty = lengths == 0
    assert empty.any()
    assert torch.equal(c_n[empty], problem.floats[2][empty])
    assert torch.equal(grads[1][empty], problem.grads[1][empty])
    assert torch.equal(grads[2][empty], problem.grads[2][empty])
    assert (grads[0][empty] == 0).all()


@pytest.mark.usefixtures("poison")
def test_a_token_out_of_range_gives_nan(device: str) -> None:
    problem = _Problem((2, 6, 5, 7, 33, 11), torch.float32, 0.0)
    problem.lengths[2:] = 4
    problem.tokens[2:5, 2] = torch.tensor([-1, 11, 2**40])
    problem.tokens[5, 4] = 11  # in the padding: never read
    (hidden, h_n, c_n), grads = problem.kernels(device)
    assert hidden.unflatten(0, (2, 6))[:, 2:5, 2:4].isnan().all()
    assert hidden.isnan().sum() == 2 * 3 * 2 * 33
    assert h_n.isnan().all(-1).tolist() == c_n.isnan().all(-1).tolist() == [2 <= b < 5 for b in range(6)] * 2
    assert all(g.isnan().any() for g in grads)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("sizes", [(2, 0, 5, 7, 33, 11), (2, 3, 0, 7, 33, 11), (0, 3, 4, 7, 33, 11)], ids=str)
def test_no_elements(sizes: tuple[int, ...], device: str) -> None:
    problem = _Problem(sizes, torch.float32)
    problem.lengths.zero_()
    (hidden, h_n, c_n), grads = problem.kernels(device)
    assert hidden.shape == (sizes[0] * sizes[1], sizes[2], 33)
    assert torch.equal(h_n, problem.floats[1])
    assert torch.equal(c_n, problem.floats[2])
    assert [g.shape for g in grads] == [x.shape for x in problem.floats]
    assert torch.equal(grads[1], problem.grads[1])
    assert all((grads[i] == 0).all() for i in (0, 3, 4, 5, 6, 7))


def test_repeats_bit_for_bit(device: str) -> None:
    problem = _Problem((1, 17, 2, 7, 33, 11), torch.float32)
    first, second = problem.kernels(device), problem.kernels(device)
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


def test_float64_is_refused(device: str) -> None:
    with pytest.raises(TypeError, match=r"^embedding: expected float32, bfloat16 or float16, got torch\.float64$"):
        _Problem((1, 2, 3, 4, 5, 6), torch.float64).kernels(device)
