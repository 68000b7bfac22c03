"""Top-k encoder and decoder of a sparse auto-encoder: definition, ties, blocks of rows, memory, op contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES

from bench.interleave import peak_bytes
from fastvae.functional import top_k_decode, top_k_encode
from fastvae.ops import top_k

# samples, features, latents, k: all, one and some of the latents
SHAPES = [(1, 1, 1, 1), (1, 7, 33, 33), (7, 33, 257, 5), (33, 257, 7, 7), (257, 33, 33, 1), (64, 32, 128, 16)]


def encoder(samples, features, latents, dtype=torch.float32):
    torch.manual_seed(0)
    leaves = torch.randn(samples, features), torch.randn(latents, features) / math.sqrt(features), torch.randn(latents)
    return [leaf.to(dtype).requires_grad_() for leaf in leaves]


def decoder(samples, features, latents, k, dtype=torch.float32):
    torch.manual_seed(0)
    leaves = [torch.randn(samples, k), torch.randn(latents, features), torch.randn(features)]
    indices = torch.rand(samples, latents).argsort(1)[:, :k]
    return [leaf.to(dtype).requires_grad_() for leaf in leaves], indices


def clones(leaves, dtype=None):
    return [leaf.detach().to(dtype or leaf.dtype, copy=True).requires_grad_() for leaf in leaves]


def eager_encode(x, weight, bias, k):
    values, indices = F.linear(x, weight, bias).topk(k)
    return values.relu(), indices


def eager_decode(values, indices, weight, bias):
    codes = values.new_zeros(values.shape[0], weight.shape[0]).scatter_add(1, indices, values)
    return codes @ weight + bias


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 3 rows of 33 latents."""
    monkeypatch.setattr(top_k, "_BLOCK_LATENTS", 100)
    monkeypatch.setattr(top_k, "_MIN_BLOCK_ROWS", 1)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encode_matches_float64(shape, dtype, assert_within_budget):
    *sizes, k = shape
    leaves = encoder(*sizes, dtype)
    exact, peer = clones(leaves, torch.float64), clones(leaves)
    values, indices = top_k_encode(*leaves, k=k)
    assert values.dtype == dtype
    assert indices.dtype == torch.int64
    assert (values.diff(dim=1) <= 0).all()
    assert (indices.sort(1).values.diff(dim=1) > 0).all(), "a latent comes twice"
    # Given the chosen latents, all else is a definition without choices; that the choice is right, the values tell.
    results = []
    for of in (exact, peer):
        chosen = F.linear(*of).gather(1, indices).relu()
        grads = torch.autograd.grad(chosen, of, torch.ones(()).expand(values.shape).to(chosen))
        results.append([F.linear(*of).topk(k).values.relu(), *grads])
    ours = [values, *torch.autograd.grad(values, leaves, torch.ones_like(values))]
    for name, mine, truth, other in zip(["values", "x", "weight", "bias"], ours, *results, strict=True):
        assert_within_budget(name, mine, truth, other, 1 if dtype in DTYPES[2:] else 8)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_matches_float64(shape, dtype, assert_within_budget):
    leaves, indices = decoder(*shape, dtype)
    exact, peer = clones(leaves, torch.float64), clones(leaves)
    results = []
    for function, (values, weight, bias) in zip([top_k_decode, eager_decode, eager_decode], [leaves, exact, peer],
                                                strict=True):  # fmt: skip
        y = function(values, indices, weight, bias)
        results.append([y, *torch.autograd.grad(y, [values, weight, bias], torch.ones_like(y))])
    assert results[0][0].dtype == dtype
    for name, mine, truth, other in zip(["y", "values", "weight", "bias"], *results, strict=True):
        assert_within_budget(name, mine, truth, other, 1 if dtype in DTYPES[2:] else 8)


def test_activation_none_keeps_negative_values():
    leaves = encoder(9, 5, 7)
    values, indices = top_k_encode(*leaves, k=7, activation="none")
    expected = F.linear(*leaves)
    assert (values < 0).any()
    torch.testing.assert_close(values, expected.gather(1, indices))
    torch.testing.assert_close(values.relu(), top_k_encode(*leaves, k=7)[0])
    ours, theirs = (torch.autograd.grad(v.square().sum(), leaves) for v in (values, expected))
    torch.testing.assert_close(ours, theirs)


def test_without_bias_and_with_leading_dimensions():
    x, weight, _ = encoder(6, 5, 7)
    values, indices = top_k_encode(x.reshape(2, 3, 5), weight, k=3)
    flat = top_k_encode(x, weight, torch.zeros(7), k=3)
    assert values.shape == indices.shape == (2, 3, 3)
    assert torch.equal(values.reshape(6, 3), flat[0])
    y = top_k_decode(values, indices, weight)
    assert y.shape == (2, 3, 5)
    torch.testing.assert_close(y.reshape(6, 5), eager_decode(*flat, weight, 0))
    one = top_k_encode(x[0], weight, k=3)
    assert torch.equal(one[1], flat[1][0])
    assert top_k_decode(*one, weight).shape == (5,)


def test_ties():
    """Any of equal latents may be kept, but none twice, and each sends its gradient to its own row."""
    x, weight = torch.ones(4, 3, requires_grad=True), torch.ones(33, 3, requires_grad=True)
    values, indices = top_k_encode(x, weight, k=5)
    assert (values == 3).all()
    assert (indices.sort(1).values.diff(dim=1) > 0).all()
    grad = torch.autograd.grad(values.sum(), weight)[0]
    assert torch.equal(grad, indices.flatten().bincount(minlength=33)[:, None].expand(33, 3).float())


def test_a_bias_of_minus_infinity_keeps_latents_out():
    x, weight, bias = encoder(9, 5, 7)
    with torch.no_grad():
        bias[[0, 1, 2, 3]] = -math.inf
    values, indices = top_k_encode(x, weight, bias, k=5)
    assert (indices[values > 0] > 3).all()
    assert (values[:, 3:] == 0).all(), "only three are left"
    grads = torch.autograd.grad(values.sum(), [x, weight, bias])
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[1][:4] == 0).all()


def test_indices_that_come_twice_count_twice():
    values, weight = torch.tensor([[2.0, 3.0]], requires_grad=True), torch.randn(4, 3, requires_grad=True)
    y = top_k_decode(values, torch.tensor([[1, 1]]), weight)
    torch.testing.assert_close(y, 5 * weight[1:2])
    grad = torch.autograd.grad(y.sum(), weight)[0]
    assert torch.equal(grad, torch.tensor([0.0, 5.0, 0.0, 0.0])[:, None].expand(4, 3))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("samples", "features"), [(0, 5), (3, 0), (0, 0)])
def test_zero_sizes(samples, features):
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((samples, features), (7, features), (7,))]
    shift = torch.randn(features, requires_grad=True)
    values, indices = top_k_encode(*leaves, k=3)
    y = top_k_decode(values, indices, leaves[1], shift)
    assert values.shape == indices.shape == (samples, 3)
    assert y.shape == (samples, features)
    torch.testing.assert_close(values, leaves[2].topk(3).values.relu().expand(samples, 3))
    grads = torch.autograd.grad(y.sum() + values.sum(), [*leaves, shift])
    assert [g.shape for g in grads] == [leaf.shape for leaf in (*leaves, shift)]
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_rows_change_nothing():
    leaves = encoder(10, 5, 33)
    values, indices = top_k_encode(*leaves, k=4)
    expected = eager_encode(*leaves, 4)
    torch.testing.assert_close((values, indices), expected)


def test_gradients_are_deterministic(with_threads):
    """The same bits whatever the number of threads, with many samples of each latent."""
    leaves, indices = decoder(257, 33, 7, 5)
    x = torch.randn(257, 33)

    def run():
        y = top_k_decode(leaves[0], indices, *leaves[1:])
        values, _ = top_k_encode(x, *(torch.zeros(s).requires_grad_() for s in ((7, 33),)), k=5, activation="none")
        return torch.autograd.grad(y, leaves, x), values

    first, second, third = (with_threads(threads, run) for threads in (1, 2, 2))
    for other in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(first[0], other[0], strict=True))


def test_strided_operands():
    x, weight, bias = torch.randn(5, 9).T, torch.randn(5, 7).T, torch.randn(7, 2)[:, 0]
    strided = [t.requires_grad_() for t in (x, weight, bias)]
    dense = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in strided]
    results = []
    for x, weight, bias in (strided, dense):
        values, indices = top_k_encode(x, weight, bias, k=3)
        y = top_k_decode(values.T.contiguous().T, indices.T.contiguous().T, weight)
        results.append((values, y, *torch.autograd.grad(y, [x, weight, bias], torch.ones(()).expand(y.shape))))
    torch.testing.assert_close(*results)


def test_latents_are_never_whole_in_memory():
    x, weight, bias = encoder(8192, 8, 2000)
    whole = 8192 * 2000 * 4

    def step(encode, decode):
        def call():
            values, indices = encode(x, weight, bias, k=4)
            y = decode(values, indices, weight, x.new_zeros(8))
            return torch.autograd.grad(y.square().sum(), [x, weight, bias])

        return call

    assert peak_bytes(step(eager_encode, eager_decode)) > whole, "the measure sees latents where they are whole"
    assert peak_bytes(step(top_k_encode, top_k_decode)) < 0.3 * whole


@pytest.mark.parametrize("wrong", [-1, 7, 2**40])
def test_index_out_of_range(wrong):
    (values, weight, bias), indices = decoder(4, 5, 7, 3)
    indices[2, 1] = wrong
    with pytest.raises(IndexError, match=rf"indices: expected latents in \[0, 7\), got {wrong}"):
        top_k_decode(values, indices, weight, bias)


def test_nan_stays_in_its_row():
    x, weight, bias = encoder(9, 5, 7)
    with torch.no_grad():
        x[4, 2] = math.nan
    values, _ = top_k_encode(x, weight, bias, k=3)
    assert values.isnan().any(1).tolist() == [row == 4 for row in range(9)]


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_gradcheck(activation):
    leaves = encoder(5, 3, 6, torch.float64)
    assert torch.autograd.gradcheck(lambda *of: top_k_encode(*of, k=4, activation=activation)[0], leaves)
    (values, weight, bias), indices = decoder(5, 3, 6, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda v, w, b: top_k_decode(v, indices, w, b), [values, weight, bias])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
def test_opcheck(dtype, needs):
    ops, (x, weight, bias) = torch.ops.fastvae, [t.detach() for t in encoder(5, 3, 6, dtype)]
    torch.library.opcheck(ops.top_k_encode, (x, weight, bias, 4, True))
    torch.library.opcheck(ops.top_k_encode, (x, weight, None, 4, False))
    values, indices = ops.top_k_encode(x, weight, bias, 4, True)
    torch.library.opcheck(ops.top_k_decode, (values, indices, weight, x[0]))
    torch.library.opcheck(ops.top_k_decode, (values, indices, weight, None))
    torch.library.opcheck(ops.top_k_encode_backward, (values, values, indices, x, weight, True, *needs))
    torch.library.opcheck(ops.top_k_decode_backward, (x, values, indices, weight, *needs))


def test_compiled_whole_equals_eager():
    leaves = encoder(9, 5, 33)

    def both(x, weight, bias):
        values, indices = top_k_encode(x, weight, bias, k=4)
        return values, indices, top_k_decode(values, indices, weight)

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    results = [f(*leaves) for f in (compiled, both)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    grads = [torch.autograd.grad(y.square().sum() + v.sum(), leaves) for v, _, y in results]
    torch.testing.assert_close(*grads)
    torch.compiler.reset()


def test_errors_name_the_argument():
    good = {"x": torch.zeros(4, 5), "weight": torch.zeros(7, 5), "k": 2}
    cases = [
        (TypeError, "x: expected float32, .* got torch.int64", {"x": torch.zeros(4, 5).long()}),
        (TypeError, "x: expected a tensor, got NoneType", {"x": None}),
        (ValueError, r"x: expected shape \(\.\.\., features\), got \(\)", {"x": torch.zeros(())}),
        (TypeError, "weight: expected torch.float32 as x, got torch.float64", {"weight": good["weight"].double()}),
        (ValueError, r"weight: expected \(latents, features\) .*5.*, got \(7, 6\)", {"weight": torch.zeros(7, 6)}),
        (ValueError, "weight: expected device cpu as x, got meta", {"weight": good["weight"].to("meta")}),
        (TypeError, "bias: expected torch.float32 as x, got torch.float16", {"bias": torch.zeros(7).half()}),
        (ValueError, r"bias: .*\(7,\), got \(1,\)", {"bias": torch.zeros(1)}),
        (ValueError, "k: expected 1 <= k <= latents = 7, got 0", {"k": 0}),
        (ValueError, "k: expected 1 <= k <= latents = 7, got 8", {"k": 8}),
        (ValueError, "activation: expected one of 'relu', 'none', got 'gelu'", {"activation": "gelu"}),
    ]  # fmt: skip
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            top_k_encode(**(good | arguments))

    good = {"values": torch.zeros(4, 3), "indices": torch.zeros(4, 3).long(), "weight": torch.zeros(7, 5)}
    cases = [
        (TypeError, "values: expected float32, .* got torch.int64", {"values": good["indices"]}),
        (ValueError, r"values: expected .* k at least 1, got \(4, 0\)", {"values": torch.zeros(4, 0)}),
        (TypeError, "indices: expected an int64 tensor, got torch.int32", {"indices": good["indices"].int()}),
        (ValueError, r"indices: .*\(4, 3\), got \(3, 3\)", {"indices": good["indices"][:3]}),
        (ValueError, "indices: expected device cpu as values, got meta", {"indices": good["indices"].to("meta")}),
        (TypeError, "weight: expected torch.float32 as values, got torch.float64", {"weight": good["weight"].double()}),
        (ValueError, r"weight: expected shape \(latents, features\), got \(7,\)", {"weight": torch.zeros(7)}),
        (ValueError, r"bias: .*\(5,\), got \(7,\)", {"bias": torch.zeros(7)}),
        (TypeError, "bias: expected torch.float32 as values, got torch.float16", {"bias": torch.zeros(5).half()}),
    ]  # fmt: skip
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            top_k_decode(**(good | arguments))
