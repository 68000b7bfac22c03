"""Corruption alone and inside a linear layer, both CPU backends: stream, statistics, gradients, pieces, op contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES

from fastvae.functional import corrupt, corrupted_linear
from fastvae.ops import corruption, random

SEED = torch.tensor([-123456789012345])
NOISES = ["gaussian", "masking", "salt_and_pepper"]
RANGE = {"low": -3.0, "high": 2.5}
SHAPES = [(), (1,), (2, 7, 33), (3, 1030)]

every_noise = pytest.mark.parametrize("noise", NOISES)


def linear_operands(rows, features, outputs, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((rows, features), (outputs, features), (outputs,))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.fixture
def small_pieces(monkeypatch):
    """Cut already small matrices in several pieces."""
    monkeypatch.setattr(corruption, "_PIECE_BYTES", 1 << 10)
    monkeypatch.setattr(corruption, "_MIN_PIECE", 3)


@pytest.mark.usefixtures("poison")
@every_noise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_element_follows_the_stream_at_its_index(shape, dtype, noise, backend):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    ours = corrupt(x, noise, 0.4, **RANGE, seed=SEED)
    element = torch.arange(x.numel())
    if noise == "gaussian":
        expected = (x.double() + 0.4 * random.normal(SEED, element).double().reshape(shape)).to(dtype)
        rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
        torch.testing.assert_close(ours, expected, rtol=rounding, atol=1e-6)
        return
    u = random.packed_uniform(SEED, element).reshape(shape)
    if noise == "masking":
        expected = torch.where(u < 0.4, torch.zeros_like(x), x)
    else:
        pepper = torch.where(u < 0.2, RANGE["low"], RANGE["high"]).to(dtype)
        expected = torch.where(u < 0.4, pepper, x)
    assert torch.equal(ours, expected)


@every_noise
def test_frequencies(noise, backend):
    """Within four standard errors: more in one of 16,000 draws."""
    count, level, x = 200_000, 0.3, torch.full((200_000,), 0.5)
    values = corrupt(x, noise, level, seed=SEED)
    error = 4 * math.sqrt(level * (1 - level) / count)
    if noise == "gaussian":
        assert (values.mean() - 0.5).abs() < 4 * level / math.sqrt(count)
        assert (values.std() / level - 1).abs() < 4 / math.sqrt(2 * count)
    elif noise == "masking":
        assert ((values == 0).float().mean() - level).abs() < error
        assert ((values == 0) | (values == 0.5)).all()
    else:
        for value, probability in ((0.0, level / 2), (1.0, level / 2), (0.5, 1 - level)):
            assert ((values == value).float().mean() - probability).abs() < error


@pytest.mark.parametrize(("level", "kept"), [(0.0, True), (1.0, False)])
def test_probabilities_0_and_1_are_exact(level, kept, backend):
    x = torch.full((100_000,), 0.5)
    assert torch.equal(corrupt(x, "masking", level, seed=SEED), x if kept else torch.zeros_like(x))
    grains = corrupt(x, "salt_and_pepper", level, seed=SEED)
    assert torch.equal(grains == 0.5, torch.full(x.shape, kept))
    assert torch.equal(corrupt(x, "gaussian", 0.0, seed=SEED), x)


@every_noise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_goes_to_what_was_kept(noise, dtype, backend):
    x = torch.full((33, 7), 0.5, dtype=dtype, requires_grad=True)
    y = corrupt(x, noise, 0.4, seed=SEED)
    upstream = torch.randn(33, 7).to(dtype)
    (grad,) = torch.autograd.grad(y, x, upstream)
    expected = upstream if noise == "gaussian" else upstream.masked_fill(y != 0.5, 0)
    assert torch.equal(grad, expected)


def test_nothing_but_the_seed_is_kept(backend):
    kept = []
    x, weight, bias = linear_operands(4, 5, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        corrupt(x, "masking", 0.3, seed=SEED)
        assert kept == [(1,)]
        kept.clear()
        corrupted_linear(x, weight, bias, "masking", 0.3, seed=SEED)
    assert kept == [(4, 5), (3, 5), (1,)]


@pytest.mark.usefixtures("poison", "small_pieces")
@every_noise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 33, 5), (257, 3, 1), (33, 257, 65), (3, 1030, 2)], ids=str)
def test_linear_equals_the_composition(sizes, dtype, noise, backend, assert_within_budget):
    ours = linear_operands(*sizes, dtype)
    peer = [tensor.detach().clone().requires_grad_() for tensor in ours]
    corrupted = corrupt(ours[0].detach(), noise, 0.4, **RANGE, seed=SEED)

    y = corrupted_linear(*ours, noise, 0.4, **RANGE, seed=SEED)
    assert y.dtype == dtype
    upstream = torch.randn(y.shape).to(dtype)
    results = [y, *torch.autograd.grad(y, ours, upstream)]
    composed = F.linear(corrupt(peer[0], noise, 0.4, **RANGE, seed=SEED), *peer[1:])
    plain = [composed, *torch.autograd.grad(composed, peer, upstream)]

    x, weight, bias = (tensor.detach().double() for tensor in ours)
    grad_x = upstream.double() @ weight
    if noise != "gaussian":
        grad_x[random.packed_uniform(SEED, torch.arange(x.numel())).reshape(x.shape) < 0.4] = 0
    exact = [
        corrupted.double() @ weight.T + bias,
        grad_x,
        upstream.double().T @ corrupted.double(),
        upstream.double().sum(0),
    ]
    for name, mine, truth, other in zip(
        ["y", "grad_x", "grad_weight", "grad_bias"], results, exact, plain, strict=True
    ):
        assert_within_budget(name, mine, truth, other, {torch.float32: 8, torch.float64: 16}.get(dtype, 1))


@pytest.mark.usefixtures("small_pieces")
def test_a_matrix_goes_through_in_pieces(monkeypatch):
    """No scratch is as large as x, forward or backward."""
    if corruption.CORE is None:
        pytest.skip("the C++ core is not built")
    x, weight, bias = linear_operands(65, 129, 4, torch.float32)
    shapes = []
    pieces = corruption._pieces

    def recorded(*arguments):
        for here, scratch in pieces(*arguments):
            shapes.append(tuple(scratch.shape))
            yield here, scratch

    monkeypatch.setattr(corruption, "_pieces", recorded)
    y = corrupted_linear(x, weight, bias, "masking", 0.3, seed=SEED)
    assert {columns for _, columns in shapes} == {129}
    assert max(rows for rows, _ in shapes) == 3
    shapes.clear()
    y.sum().backward()
    assert {rows for rows, _ in shapes} == {65}
    assert max(columns for _, columns in shapes) == 3


@every_noise
def test_leading_dimensions_and_no_bias(noise, backend):
    x, weight, bias = linear_operands(30, 7, 5)
    flat = corrupted_linear(x, weight, bias, noise, 0.3, seed=SEED)
    shaped = corrupted_linear(x.reshape(2, 3, 5, 7), weight, bias, noise, 0.3, seed=SEED)
    torch.testing.assert_close(shaped, flat.reshape(2, 3, 5, 5))
    bare = corrupted_linear(x, weight, None, noise, 0.3, seed=SEED)
    torch.testing.assert_close(bare + bias, flat)
    vector = corrupted_linear(x[0], weight, None, noise, 0.3, seed=SEED)
    torch.testing.assert_close(vector, bare[0])


@pytest.mark.usefixtures("poison")
@every_noise
@pytest.mark.parametrize("sizes", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)], ids=str)
def test_zero_sizes(sizes, noise, backend):
    leaves = linear_operands(*sizes, torch.float32)
    assert corrupt(leaves[0], noise, 0.3, seed=SEED).shape == sizes[:2]
    y = corrupted_linear(*leaves, noise, 0.3, seed=SEED)
    assert torch.equal(y, leaves[2].expand(y.shape))
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    expected = (torch.zeros(sizes[:2]), torch.zeros(sizes[2], sizes[1]), torch.full(sizes[2:], float(sizes[0])))
    if math.prod(sizes) == 0:
        expected = (torch.zeros(sizes[:2]), torch.zeros(sizes[2], sizes[1]), expected[2])
    assert all(torch.equal(g, e) for g, e in zip(grads, expected, strict=True))


@pytest.mark.usefixtures("small_pieces")
@every_noise
def test_strided_inputs(noise, backend):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(33, 14).T[::2], torch.randn(33, 5).T, torch.randn(10)[::2]
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    copies = [t.detach().clone().contiguous().requires_grad_() for t in leaves]
    torch.testing.assert_close(corrupt(x, noise, 0.3, seed=SEED), corrupt(copies[0], noise, 0.3, seed=SEED))
    upstream = torch.randn(5, 7).T
    outputs = [corrupted_linear(*operands, noise, 0.3, seed=SEED) for operands in (leaves, copies)]
    torch.testing.assert_close(*outputs)
    grads = [torch.autograd.grad(y, o, upstream) for y, o in zip(outputs, (leaves, copies), strict=True)]
    torch.testing.assert_close(*grads)


@every_noise
def test_nan_stays_where_it_is(noise, backend):
    x = torch.full((40,), math.nan)
    y = corrupt(x, noise, 0.5, seed=SEED)
    replaced = random.packed_uniform(SEED, torch.arange(40)) < 0.5
    assert torch.equal(y.isnan(), torch.ones(40, dtype=torch.bool) if noise == "gaussian" else ~replaced)


@every_noise
def test_threads_do_not_change_a_bit(noise, with_threads):
    x = torch.randn(300, 257)

    def run():
        return corrupt(x, noise, 0.3, seed=SEED)

    assert torch.equal(with_threads(1, run), with_threads(2, run))


def test_manual_seed_and_generator():
    x, weight, bias = linear_operands(4, 50, 3)

    def draws(**arguments):
        return [
            corrupt(x, "masking", 0.5, **arguments),
            corrupted_linear(x, weight, bias, "masking", 0.5, **arguments),
        ]

    torch.manual_seed(3)
    first = draws()
    torch.manual_seed(3)
    second = draws()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.allclose(F.linear(first[0], weight, bias), first[1])  # another seed
    third = draws(generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    same = draws(seed=SEED)
    torch.testing.assert_close(F.linear(same[0], weight, bias), same[1])


@every_noise
@pytest.mark.usefixtures("small_pieces")
def test_gradcheck(noise, backend):
    x, weight, bias = linear_operands(7, 5, 3)
    assert torch.autograd.gradcheck(lambda x: corrupt(x, noise, 0.4, seed=SEED), x)
    assert torch.autograd.gradcheck(lambda *t: corrupted_linear(*t, noise, 0.4, seed=SEED), (x, weight, bias))


@pytest.mark.parametrize(
    ("noise", "dtype"), list(zip(NOISES, [torch.float64, torch.bfloat16, torch.float32], strict=True))
)
def test_opcheck(noise, dtype):
    x, weight, bias = (t.detach() for t in linear_operands(3, 5, 2, dtype))
    arguments = (SEED, noise, 0.4, 0.0, 1.0)
    torch.library.opcheck(torch.ops.fastvae.corrupt, (x, *arguments))
    for shift in (bias, None):
        torch.library.opcheck(torch.ops.fastvae.corrupted_linear, (x, weight, shift, *arguments))
    y = torch.ops.fastvae.corrupted_linear(x, weight, bias, *arguments)
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        torch.library.opcheck(torch.ops.fastvae.corrupted_linear_backward, (y, x, weight, *arguments, *needs))


def test_errors_name_the_argument():
    x, weight, bias = (t.detach() for t in linear_operands(4, 5, 3))
    good = {"x": x, "noise": "masking", "level": 0.3}
    cases = [
        (TypeError, "x: expected a tensor, got list", {"x": [0.0]}),
        (TypeError, "x: expected float32, .* got torch.int64", {"x": x.long()}),
        (ValueError, "noise: expected one of 'gaussian', 'masking', 'salt_and_pepper', got 'salt'", {"noise": "salt"}),
        (ValueError, r"level: expected a probability in \[0, 1\], got 1.5", {"level": 1.5}),
        (ValueError, r"level: expected a probability in \[0, 1\], got -0.1", {"level": -0.1}),
        (ValueError, r"level: expected a probability in \[0, 1\], got nan", {"level": math.nan}),
        (ValueError, "level: expected a finite standard .* at least 0, got -1", {"noise": "gaussian", "level": -1}),
        (ValueError, "level: .* deviation of at least 0, got inf", {"noise": "gaussian", "level": math.inf}),
        (ValueError, "low: expected a finite number, got nan", {"low": math.nan}),
        (ValueError, "high: expected a finite number, got inf", {"high": math.inf}),
        (TypeError, "seed: expected an int64 tensor, got int", {"seed": 3}),
        (ValueError, "seed: expected None when a generator", {"seed": SEED, "generator": torch.Generator()}),
    ]  # fmt: skip
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            corrupt(**(good | arguments))
        with pytest.raises(error, match=message):
            corrupted_linear(**(good | {"weight": weight, "bias": bias} | arguments))
    linear_cases = [
        (TypeError, "weight: expected torch.float64 as x, got torch.float32", {"weight": weight.float()}),
        (ValueError, r"weight: .*features\) with features = 5 as in x, got \(3, 4\)", {"weight": weight[:, 1:]}),
        (ValueError, r"x: expected shape \(\.\.\., features\), got \(\)", {"x": x[0, 0]}),
        (ValueError, r"bias: expected shape \(outputs,\) = \(3,\), got \(2,\)", {"bias": bias[1:]}),
        (ValueError, "bias: expected device cpu as x, got meta", {"bias": bias.to("meta")}),
    ]  # fmt: skip
    for error, message, arguments in linear_cases:
        with pytest.raises(error, match=message):
            corrupted_linear(**(good | {"weight": weight, "bias": bias} | arguments))
