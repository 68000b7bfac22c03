"""LSTM decoding, both CPU backends: nn.Embedding + nn.LSTM, ragged lengths, word dropout, op contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from torch import nn

from fastvae.functional import lstm as lstm_layer
from fastvae.functional import lstm_decode
from fastvae.ops import lstm, random, recurrence

SEED = torch.tensor([-98765432123456789])
# batch, time, vocabulary, embed, latent, hidden
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (7, 5, 33, 7, 3, 33),
    (5, 9, 11, 33, 7, 7),
    (3, 4, 257, 1, 5, 65),
    (33, 7, 13, 9, 0, 17),
    (16, 8, 32, 16, 8, 32),
]


def operands(sizes, dtype=torch.float32, bias=True):
    batch, time, vocabulary, embed, latent, hidden = sizes
    shapes = {
        "z": (batch, latent),
        "h0": (batch, hidden),
        "c0": (batch, hidden),
        "embedding": (vocabulary, embed),
        "weight_ih": (4 * hidden, embed + latent),
        "weight_hh": (4 * hidden, hidden),
        "bias": (4 * hidden,),
    }
    torch.manual_seed(0)
    leaves = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name in ("weight_ih", "weight_hh"):
        leaves[name] /= math.sqrt(max(hidden, 1))
    leaves = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
    if latent == 0:
        leaves["z"] = None
    if not bias:
        leaves["bias"] = None
    tokens = torch.randint(0, max(vocabulary, 1), (batch, time))
    # All lengths from 0 to time where the batch has room for them, the longest first.
    lengths = time - torch.arange(batch) % (time + 1)
    return tokens, lengths, leaves


def clones(leaves, dtype=None):
    return {
        name: None if leaf is None else leaf.detach().to(dtype or leaf.dtype, copy=True).requires_grad_()
        for name, leaf in leaves.items()
    }


def given(leaves):
    return [leaf for leaf in leaves.values() if leaf is not None]


def eager(tokens, lengths, leaves):
    """nn.Embedding + nn.LSTM fed with [embedding; z], one sequence at a time, each at its own length."""
    weight_hh, weight_ih, bias = leaves["weight_hh"], leaves["weight_ih"], leaves["bias"]
    layer = nn.LSTM(weight_ih.shape[1], weight_hh.shape[1], bias=bias is not None, batch_first=True)
    parameters = {"weight_ih_l0": weight_ih, "weight_hh_l0": weight_hh}
    if bias is not None:
        parameters |= {"bias_ih_l0": bias, "bias_hh_l0": torch.zeros_like(bias)}
    hidden, h_n, c_n = [], [], []
    for b, length in enumerate(lengths.tolist()):
        h, c, out = leaves["h0"][b : b + 1], leaves["c0"][b : b + 1], leaves["h0"].new_zeros(1, 0, weight_hh.shape[1])
        if length:
            inputs = F.embedding(tokens[b : b + 1, :length], leaves["embedding"])
            if leaves["z"] is not None:
                inputs = torch.cat([inputs, leaves["z"][b : b + 1, None].expand(-1, length, -1)], -1)
            out, (h, c) = torch.func.functional_call(layer, parameters, (inputs, (h[None], c[None])))
            h, c = h[0], c[0]
        hidden.append(F.pad(out, (0, 0, 0, tokens.shape[1] - length)))
        h_n.append(h)
        c_n.append(c)
    return torch.cat(hidden), torch.cat(h_n), torch.cat(c_n)


def upstream(outputs):
    torch.manual_seed(1)
    return [torch.randn(o.shape).to(o.dtype) for o in outputs]


def with_gradients(outputs, leaves):
    names = [name for name, leaf in leaves.items() if leaf is not None]
    grads = torch.autograd.grad(outputs, given(leaves), upstream(outputs))
    return dict(zip(("hidden", "h_n", "c_n"), outputs, strict=True)) | dict(zip(names, grads, strict=True))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_float64(sizes, dtype, bias, backend, assert_within_budget):
    tokens, lengths, leaves = operands(sizes, dtype, bias)
    peer, exact = clones(leaves), clones(leaves, torch.float64)
    ours = with_gradients(lstm_decode(tokens, **leaves, lengths=lengths), leaves)
    theirs = with_gradients(eager(tokens, lengths, peer), peer)
    truth = with_gradients(eager(tokens, lengths, exact), exact)
    for name, mine in ours.items():
        assert mine.dtype == dtype, name
        # Half precision: float32 inside; the products over the latent and of the backward read rounded operands.
        rounding = {torch.float32: 8, torch.float64: 32}.get(dtype, 2)
        assert_within_budget(name, mine, truth[name], theirs[name], rounding)


@pytest.mark.parametrize("full_length", [True, False])
@pytest.mark.parametrize("word_dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_through_the_library_as_by_the_definition(sizes, bias, word_dropout, full_length, monkeypatch):
    """What CUDA takes where cuDNN is said to be faster, on the CPU, in float64."""
    tokens, lengths, leaves = operands(sizes, torch.float64, bias)
    if not full_length:
        tokens[torch.arange(tokens.shape[1]) >= lengths[:, None]] = -999  # padding is never read
    again, options = clones(leaves), {"word_dropout": word_dropout, "unk_index": 0, "seed": SEED}
    options["lengths"] = None if full_length else lengths
    expected = with_gradients(lstm_decode(tokens, **again, **options), again)
    monkeypatch.setattr(lstm, "_library_serves", lambda *_: True)
    ours = with_gradients(lstm_decode(tokens, **leaves, **options), leaves)
    assert not isinstance(ours["hidden"].grad_fn, type(expected["hidden"].grad_fn))
    for name, mine in ours.items():
        torch.testing.assert_close(mine, expected[name], rtol=1e-12, atol=1e-12)


def test_through_the_library_a_word_out_of_range_gives_nan():
    tokens, _, leaves = operands((7, 5, 33, 7, 3, 33))
    tokens[3, 2] = -1
    leaves["weight_ih"], leaves["bias"] = leaves["weight_ih"].detach(), None
    for lengths, steps in ((None, 3), (torch.full((7,), 4), 2)):
        options = {"lengths": lengths, "seed": SEED, "word_dropout": 0.0, "unk_index": -1}
        hidden, h_n, c_n = lstm.library("embedding", tokens, **leaves, **options)
        assert hidden[3, 2 : 2 + steps].isnan().all()
        assert hidden.isnan().sum() == steps * 33
        for last in (h_n, c_n):
            assert last.isnan().any(1).tolist() == [b == 3 for b in range(7)]


@pytest.mark.parametrize("full_length", [True, False])
def test_dense_inputs_through_the_library_as_by_the_definition(full_length, monkeypatch):
    _, lengths, leaves = operands((7, 5, 35, 7, 0, 33), torch.float64)
    leaves = {name: leaf for name, leaf in leaves.items() if name not in ("z", "embedding")}
    inputs, lengths = torch.randn(7, 5, 7, dtype=torch.float64), None if full_length else lengths
    if lengths is not None:
        inputs[torch.arange(5) >= lengths[:, None]] = torch.nan  # padding is never read
    leaves["inputs"] = inputs.requires_grad_()
    again = clones(leaves)
    expected = with_gradients(lstm_layer(**again, lengths=lengths), again)
    monkeypatch.setattr(lstm, "_library_serves", lambda *_: True)
    for name, mine in with_gradients(lstm_layer(**leaves, lengths=lengths), leaves).items():
        torch.testing.assert_close(mine, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_through_the_library_on_a_gpu(dtype, monkeypatch):
    tokens, lengths, leaves = operands((7, 5, 33, 7, 3, 128), dtype)
    leaves = {name: leaf.detach().cuda().requires_grad_() for name, leaf in leaves.items()}
    assert lstm._library_serves(tokens.cuda(), leaves["h0"], leaves["embedding"])
    ours = with_gradients([x.cpu() for x in lstm_decode(tokens.cuda(), **leaves, lengths=lengths.cuda())], leaves)
    monkeypatch.setenv("FASTVAE_CUDNN_LSTM", "0")
    assert not lstm._library_serves(tokens.cuda(), leaves["h0"], leaves["embedding"])
    kernels = with_gradients([x.cpu() for x in lstm_decode(tokens.cuda(), **leaves, lengths=lengths.cuda())], leaves)
    for name, mine in ours.items():
        scale = kernels[name].abs().max()
        assert (mine - kernels[name]).abs().max() <= 16 * torch.finfo(dtype).eps * scale, name


def test_all_steps_are_valid_without_lengths(backend):
    tokens, _, leaves = operands((4, 5, 7, 3, 2, 6))
    without = lstm_decode(tokens, **leaves)
    full = lstm_decode(tokens, **leaves, lengths=torch.full((4,), 5))
    assert all(torch.equal(a, b) for a, b in zip(without, full, strict=True))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("latent", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("samples", [1, 2, 7])
def test_samples_are_sequences_that_share_their_tokens(samples, dtype, latent, backend):
    tokens, lengths, leaves = operands((5, 6, 11, 4, latent, 17), dtype)
    torch.manual_seed(2)
    for name in ("z", "h0", "c0"):
        if leaves[name] is not None:
            sampled = torch.randn(samples, *leaves[name].shape)
            leaves[name] = sampled.to(dtype).requires_grad_()
    flat = clones(leaves)
    flattened = flat | {name: flat[name].flatten(0, 1) for name in ("z", "h0", "c0") if flat[name] is not None}
    dropout = {"word_dropout": 0.4, "unk_index": 1}
    together = lstm_decode(tokens, **leaves, lengths=lengths, **dropout, seed=SEED)
    # Of one batch, all samples of a sequence drop the same words.
    replaced = recurrence.dropped_tokens(tokens, lengths, SEED, **dropout)
    apart = lstm_decode(replaced.repeat(samples, 1), **flattened, lengths=lengths.repeat(samples))
    apart = [o.unflatten(0, (samples, 5)) for o in apart]
    ours, theirs = with_gradients(together, leaves), with_gradients(apart, flat)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    for name, mine in ours.items():
        assert mine.shape == theirs[name].shape, name
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(mine, theirs[name], rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.mark.usefixtures("poison")
def test_nothing_is_kept_without_gradient(backend):
    tokens, lengths, leaves = operands((5, 6, 11, 4, 3, 17))
    recorded = lstm_decode(tokens, **leaves, lengths=lengths)
    with torch.no_grad():
        plain = lstm_decode(tokens, **leaves, lengths=lengths)
    frozen = {name: leaf.detach() for name, leaf in leaves.items()}
    for a, b, c in zip(recorded, plain, lstm_decode(tokens, **frozen, lengths=lengths), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert not b.requires_grad


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (7, 5, 33, 7), (3, 4, 1, 33), (9, 6, 17, 65)], ids=str)
def test_dense_inputs_match_float64(sizes, dtype, backend, assert_within_budget):
    """`lstm` against nn.LSTM, each sequence at its own length."""
    batch, time, features, hidden = sizes
    tokens, lengths, leaves = operands((batch, time, batch * time, features, 0, hidden), dtype)
    tokens = torch.arange(batch * time).view(batch, time)
    peer, exact = clones(leaves), clones(leaves, torch.float64)
    inputs = {name: leaf for name, leaf in leaves.items() if name not in ("z", "embedding")}
    outputs = lstm_layer(leaves["embedding"].view(batch, time, features), **inputs, lengths=lengths)
    ours = with_gradients(outputs, leaves)
    theirs = with_gradients(eager(tokens, lengths, peer), peer)
    truth = with_gradients(eager(tokens, lengths, exact), exact)
    for name, mine in ours.items():
        rounding = {torch.float32: 8, torch.float64: 32}.get(dtype, 2)
        assert_within_budget(name, mine, truth[name], theirs[name], rounding)


def test_dense_inputs_errors_name_the_argument():
    inputs, state = torch.zeros(2, 3, 4), torch.zeros(2, 5)
    good = {"inputs": inputs, "h0": state, "c0": state, "weight_ih": torch.zeros(20, 4), "bias": None}
    good["weight_hh"] = torch.zeros(20, 5)
    lstm_layer(**good)
    for arguments, error, message in [
        ({"inputs": inputs[0]}, ValueError, r"inputs: expected shape \(batch, time, features\), got \(3, 4\)"),
        ({"inputs": inputs.long()}, TypeError, "inputs: expected float32"),
        ({"weight_ih": torch.zeros(20, 7)}, ValueError, r"weight_ih: expected .*features\).* got \(20, 7\)"),
        ({"weight_hh": good["weight_hh"].double()}, TypeError, "weight_hh: .*inputs"),
        ({"h0": state[:1]}, ValueError, "h0: expected"),
        ({"lengths": torch.tensor([3])}, ValueError, "lengths: expected"),
    ]:
        with pytest.raises(error, match=message):
            lstm_layer(**(good | arguments))


def test_lengths(backend):
    tokens, lengths, leaves = operands((7, 5, 11, 3, 2, 6))
    hidden, h_n, c_n = lstm_decode(tokens, **leaves, lengths=lengths)
    assert set(lengths.tolist()) == set(range(6))
    for b, length in enumerate(lengths.tolist()):
        assert (hidden[b, length:] == 0).all()
        if length == 0:
            assert torch.equal(h_n[b], leaves["h0"][b])
            assert torch.equal(c_n[b], leaves["c0"][b])
        else:
            assert torch.equal(h_n[b], hidden[b, length - 1])


def test_a_sequence_does_not_depend_on_the_batch_around_it(backend):
    """Its order, its neighbours and their lengths: with word dropout off."""
    tokens, lengths, leaves = operands((9, 6, 11, 3, 2, 33))
    whole = lstm_decode(tokens, **leaves, lengths=lengths)
    chosen = torch.tensor([8, 0, 3])
    some = leaves | {name: leaves[name][chosen] for name in ("z", "h0", "c0")}
    part = lstm_decode(tokens[chosen], **some, lengths=lengths[chosen])
    for all_rows, rows in zip(whole, part, strict=True):
        torch.testing.assert_close(all_rows[chosen], rows, rtol=1e-5, atol=1e-6)
    wider = lstm_decode(F.pad(tokens, (0, 3), value=4), **leaves, lengths=lengths)
    torch.testing.assert_close(wider[0][:, :6], whole[0], rtol=1e-5, atol=1e-6)
    assert (wider[0][:, 6:] == 0).all()


@pytest.mark.parametrize("filler", [0, 10, -1, 11, 2**40])
@pytest.mark.parametrize("word_dropout", [0.0, 0.5])
def test_padding_may_hold_anything(word_dropout, filler, backend):
    """Even tokens out of range: they are not read, and get no gradient."""
    tokens, lengths, leaves = operands((7, 5, 11, 3, 2, 6))
    arguments = {"lengths": lengths, "word_dropout": word_dropout, "unk_index": 1, "seed": SEED}
    padding = torch.arange(5) >= lengths[:, None]
    plain = with_gradients(lstm_decode(tokens.masked_fill(padding, 3), **leaves, **arguments), leaves)
    filled = with_gradients(lstm_decode(tokens.masked_fill(padding, filler), **leaves, **arguments), leaves)
    assert all(torch.equal(plain[name], filled[name]) for name in plain)


def test_words_only_in_the_padding_get_no_gradient(backend):
    tokens, lengths, leaves = operands((7, 5, 11, 3, 2, 6))
    padding = torch.arange(5) >= lengths[:, None]
    tokens = torch.where(padding, 9, tokens % 9)
    outputs = lstm_decode(tokens, **leaves, lengths=lengths)
    grad = torch.autograd.grad(outputs, leaves["embedding"], upstream(outputs))[0]
    assert (grad[9:] == 0).all()
    assert (grad[tokens[~padding].unique()] != 0).any(-1).all()


@pytest.mark.parametrize("word_dropout", [0.25, 1.0])
def test_word_dropout_is_the_stream(word_dropout, backend):
    """Equal to a run without it on the tokens replaced by hand; longer than one piece of the core's uniforms."""
    tokens, _, leaves = operands((5, 150, 11, 3, 2, 6))
    lengths, unk = torch.tensor([150, 0, 64, 65, 129]), 1
    replaced = tokens.clone()
    for b in range(5):
        for t in range(1, int(lengths[b])):
            if random.uniform(SEED, torch.tensor(b * 150 + t)) < word_dropout:
                replaced[b, t] = unk
    assert (replaced[:, 0] == tokens[:, 0]).all()
    dropped = lstm_decode(tokens, **leaves, lengths=lengths, word_dropout=word_dropout, unk_index=unk, seed=SEED)
    by_hand = lstm_decode(replaced, **leaves, lengths=lengths)
    assert not torch.equal(dropped[0], lstm_decode(tokens, **leaves, lengths=lengths)[0])
    ours, expected = with_gradients(dropped, leaves), with_gradients(by_hand, leaves)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_word_dropout_rate(rate, backend):
    """Counted in what comes out: without a recurrent weight, a hidden state tells whether its word was <unk>."""
    batch, time = 100, 101
    embedding = torch.tensor([[0.0], [5.0]])
    weight_ih, zeros = torch.ones(4, 1), torch.zeros(batch, 1)
    weight_ih[1] = -100.0  # the forget gate: shut on <unk>, and there is nothing to remember before it
    arguments = (torch.zeros(batch, time, dtype=torch.int64), None, zeros, zeros, embedding, weight_ih)
    hidden = lstm_decode(*arguments, torch.zeros(4, 1), None, word_dropout=rate, unk_index=1, seed=torch.tensor([5]))[0]
    dropped = hidden[:, :, 0] > 0.5
    assert not dropped[:, 0].any()
    count = batch * (time - 1)
    assert abs(dropped.sum() - rate * count) < 4 * math.sqrt(rate * (1 - rate) * count)


def test_manual_seed_and_generator():
    tokens, lengths, leaves = operands((7, 5, 11, 3, 2, 6))

    def draws(**arguments):
        arguments |= {"lengths": lengths, "word_dropout": 0.5, "unk_index": 1}
        return [lstm_decode(tokens, **leaves, **arguments)[0] for _ in range(2)]

    torch.manual_seed(3)
    first = draws()
    torch.manual_seed(3)
    second = draws()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(*first)
    before = torch.get_rng_state()
    third = draws(generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    draws(seed=SEED), lstm_decode(tokens, **leaves)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn without word dropout"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "sizes",
    [
        (0, 5, 7, 3, 2, 4),
        (3, 0, 7, 3, 2, 4),
        (0, 0, 7, 3, 2, 4),
        (3, 5, 7, 0, 2, 4),
        (3, 5, 7, 3, 2, 0),
        (3, 0, 0, 3, 2, 4),
    ],
    ids=str,
)
def test_zero_sizes(sizes, backend):
    tokens, lengths, leaves = operands(sizes)
    results = with_gradients(lstm_decode(tokens, **leaves, lengths=lengths), leaves)
    assert results["hidden"].shape == (sizes[0], sizes[1], sizes[5])
    assert all(results[name].shape == leaf.shape for name, leaf in leaves.items())
    assert all(torch.isfinite(result).all() for result in results.values())
    if sizes[1] == 0:
        assert torch.equal(results["h_n"], leaves["h0"])
        assert torch.equal(results["h0"], upstream([results["hidden"], results["h_n"]])[1])


@pytest.mark.usefixtures("poison")
def test_empty_latent_is_no_latent(backend):
    tokens, lengths, leaves = operands((5, 4, 7, 3, 0, 6))
    none = lstm_decode(tokens, **leaves, lengths=lengths)
    empty = lstm_decode(tokens, **(leaves | {"z": torch.zeros(5, 0)}), lengths=lengths)
    torch.testing.assert_close(none, empty)


def test_batch_of_empty_sequences(backend):
    tokens, _, leaves = operands((4, 5, 7, 3, 2, 6))
    hidden, h_n, c_n = lstm_decode(tokens, **leaves, lengths=torch.zeros(4, dtype=torch.int64))
    assert (hidden == 0).all()
    assert torch.equal(h_n, leaves["h0"])
    grads = torch.autograd.grad((h_n, c_n), [leaves["h0"], leaves["c0"], leaves["weight_hh"]], upstream([h_n, c_n]))
    assert torch.equal(grads[0], upstream([h_n])[0])
    assert (grads[2] == 0).all()


def test_strided_and_expanded_operands(backend):
    tokens, lengths, leaves = operands((7, 5, 11, 3, 2, 6))
    strided = {
        name: leaf.detach().mT.contiguous().mT if leaf.dim() == 2 else leaf.detach() for name, leaf in leaves.items()
    }
    strided["h0"], strided["bias"] = leaves["h0"].detach()[:1].expand(7, 6), torch.ones(1).expand(24)
    dense = {name: leaf.clone(memory_format=torch.contiguous_format).requires_grad_() for name, leaf in strided.items()}
    strided = {name: leaf.requires_grad_() for name, leaf in strided.items()}
    other_tokens, other_lengths = tokens.T.contiguous().T, lengths.repeat_interleave(2)[::2]
    ours = with_gradients(lstm_decode(other_tokens, **strided, lengths=other_lengths), strided)
    theirs = with_gradients(lstm_decode(tokens, **dense, lengths=lengths), dense)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name])
    hidden, h_n, _ = lstm_decode(tokens, **strided, lengths=lengths)
    uniform = torch.autograd.grad((hidden.sum(), h_n.sum()), strided["weight_hh"])[0]
    hidden, h_n, _ = lstm_decode(tokens, **dense, lengths=lengths)
    ones = [torch.ones_like(hidden), torch.ones_like(h_n)]
    torch.testing.assert_close(uniform, torch.autograd.grad((hidden, h_n), dense["weight_hh"], ones)[0])


def test_one_state_given_twice(backend):
    tokens, lengths, leaves = operands((7, 5, 11, 3, 2, 6))
    state = leaves["h0"]
    both = lstm_decode(tokens, **(leaves | {"c0": state}), lengths=lengths)
    apart = lstm_decode(tokens, **(leaves | {"c0": state.clone()}), lengths=lengths)
    assert all(torch.equal(a, b) for a, b in zip(both, apart, strict=True))
    grads = [torch.autograd.grad(outputs, state, upstream(outputs))[0] for outputs in (both, apart)]
    torch.testing.assert_close(*grads)


def test_states_and_latent_of_another_type_are_converted(backend):
    tokens, lengths, leaves = operands((7, 5, 11, 3, 2, 6))
    lower = leaves | {name: leaves[name].detach().bfloat16().requires_grad_() for name in ("z", "h0", "c0")}
    rounded = leaves | {name: lower[name].detach().float().requires_grad_() for name in ("z", "h0", "c0")}
    ours = with_gradients(lstm_decode(tokens, **lower, lengths=lengths), lower)
    theirs = with_gradients(lstm_decode(tokens, **rounded, lengths=lengths), rounded)
    for name in ours:
        assert ours[name].dtype == (torch.bfloat16 if name in ("z", "h0", "c0") else torch.float32)
        assert torch.equal(ours[name], theirs[name].to(ours[name].dtype))


def test_nan_stays_in_its_sequence_and_after_its_step(backend):
    tokens, _, leaves = operands((4, 5, 7, 3, 2, 33))
    tokens = tokens % 6
    tokens[2, 3] = 6
    with torch.no_grad():
        leaves["embedding"][6, 1] = math.nan
    hidden, h_n, _ = lstm_decode(tokens, **leaves)
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[2, 3:] = True
    assert torch.equal(hidden.isnan().any(-1), expected)
    assert torch.equal(hidden.isnan().all(-1), expected)
    assert h_n.isnan().all(-1).tolist() == [False, False, True, False]


def test_saturated_gates_are_finite(backend):
    tokens, lengths, leaves = operands((7, 5, 11, 3, 2, 6))
    with torch.no_grad():
        leaves["weight_ih"] *= 1e4
        leaves["weight_hh"] *= 1e4
    results = with_gradients(lstm_decode(tokens, **leaves, lengths=lengths), leaves)
    assert all(torch.isfinite(result).all() for result in results.values())
    expected = eager(tokens, lengths, clones(leaves, torch.float64))
    torch.testing.assert_close(results["hidden"].double(), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(64, 4, 100, 9, 3, 65), (33, 5, 11, 3, 2, 33)], ids=str)
def test_threads_agree(sizes, with_threads):
    tokens, lengths, leaves = operands(sizes)
    arguments = {"lengths": lengths, "word_dropout": 0.3, "unk_index": 1, "seed": SEED}

    def run():
        return with_gradients(lstm_decode(tokens, **leaves, **arguments), leaves)

    torch.testing.assert_close(with_threads(1, run), with_threads(2, run), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, 11, 2**40])
def test_token_out_of_range(wrong, backend):
    """The core finds it also where word dropout would replace it, and from any thread."""
    tokens, _, leaves = operands((100, 50, 11, 1, 1, 1))
    tokens[70, 30] = wrong
    message = rf"tokens: expected words in \[0, 11\), got {wrong} at \[70, 30\]" if backend == "C++" else "."
    word_dropout = 1.0 if backend == "C++" else 0.0
    with pytest.raises(IndexError, match=message):
        lstm_decode(tokens, **leaves, word_dropout=word_dropout, unk_index=0, seed=SEED)


@pytest.mark.parametrize("wrong", [-1, 6])
def test_length_out_of_range(wrong):
    if lstm.CORE is None:
        pytest.skip("the C++ core is not built")
    tokens, lengths, leaves = operands((7, 5, 11, 3, 2, 6))
    lengths[4] = wrong
    with pytest.raises(ValueError, match=rf"lengths: expected values in \[0, 5\], got {wrong} at \[4\]"):
        lstm_decode(tokens, **leaves, lengths=lengths)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias, backend):
    tokens, lengths, leaves = operands((4, 3, 5, 2, 2, 3), torch.float64, bias)
    names = [name for name, leaf in leaves.items() if leaf is not None]

    def function(*tensors):
        arguments = leaves | dict(zip(names, tensors, strict=True))
        return lstm_decode(tokens, **arguments, lengths=lengths, word_dropout=0.4, unk_index=1, seed=SEED)

    assert torch.autograd.gradcheck(function, given(leaves))


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("dtype", "word_dropout"), [(torch.float64, 0.5), (torch.bfloat16, 0.0)])
def test_opcheck(dtype, word_dropout, samples):
    tokens, lengths, leaves = operands((4, 3, 5, 2, 0, 3), dtype)
    tensors = [leaves[name].detach() for name in ("h0", "c0", "embedding", "weight_ih", "weight_hh")]
    tensors[:2] = [state.repeat(samples, 1) for state in tensors[:2]]
    static_gates = torch.randn(4 * samples, 12, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    arguments = (tokens, lengths, static_gates, *tensors, SEED, word_dropout, 1)
    torch.library.opcheck(torch.ops.fastvae.lstm_decode, (*arguments, False))
    torch.library.opcheck(torch.ops.fastvae.lstm_decode, (*arguments, True))
    outputs = torch.ops.fastvae.lstm_decode(*arguments, True)
    grads = [torch.randn(o.shape).to(o.dtype) for o in outputs[:3]]
    for given_grads in (grads, [grads[0], None, None], [None, grads[1], None]):
        backward = (*given_grads, outputs[0], *outputs[3:], *arguments)
        torch.library.opcheck(torch.ops.fastvae.lstm_decode_backward, backward)


def test_errors_name_the_argument():
    tokens, lengths, leaves = operands((4, 5, 7, 3, 2, 6))
    good = {"tokens": tokens, "lengths": lengths} | {name: leaf.detach() for name, leaf in leaves.items()}
    seed = torch.tensor([1])
    cases = [
        (TypeError, "tokens: expected an int64 tensor, got torch.int32", {"tokens": tokens.int()}),
        (ValueError, r"tokens: expected shape \(batch, time\), got \(5,\)", {"tokens": tokens[0]}),
        (TypeError, "embedding: expected float32, .* got torch.int64", {"embedding": tokens}),
        (ValueError, r"embedding: expected shape \(vocabulary, embed\), got \(7,\)", {"embedding": torch.zeros(7)}),
        (TypeError, "weight_hh: expected torch.float32 as embedding", {"weight_hh": torch.zeros(24, 6).half()}),
        (ValueError, r"weight_hh: .*\(24, 6\), got \(6, 6\)", {"weight_hh": torch.zeros(6, 6)}),
        (TypeError, "weight_ih: expected torch.float32 as embedding", {"weight_ih": torch.zeros(24, 5).half()}),
        (ValueError, r"weight_ih: .*embed \+ latent.*\(24, 5\), got \(24, 3\)", {"weight_ih": torch.zeros(24, 3)}),
        (ValueError, r"weight_ih: .*\(24, 3\), got \(24, 5\)", {"z": None}),
        (ValueError, r"h0: .*\(4, 6\), got \(3, 6\)", {"h0": torch.zeros(3, 6)}),
        (TypeError, "c0: expected float32, .* got torch.int64", {"c0": torch.zeros(4, 6).long()}),
        (ValueError, r"z: .*\(4, 2\), got \(3, 2\)", {"z": torch.zeros(3, 2)}),
        (ValueError, "z: expected device cpu as embedding, got meta", {"z": torch.zeros(4, 2, device="meta")}),
        (ValueError, r"bias: .*\(24,\), got \(6,\)", {"bias": torch.zeros(6)}),
        (TypeError, "bias: expected torch.float32 as embedding, got torch.float64", {"bias": torch.zeros(24).double()}),
        (TypeError, "lengths: expected an int64 tensor, got list", {"lengths": [5, 5, 5, 5]}),
        (ValueError, r"lengths: .*\(4,\), got \(3,\)", {"lengths": lengths[:3]}),
        (ValueError, r"word_dropout: expected a probability in \[0, 1\], got 1.5", {"word_dropout": 1.5}),
        (ValueError, "word_dropout: .* got nan", {"word_dropout": math.nan}),
        (ValueError, "unk_index: expected the index of <unk> .* got None", {"word_dropout": 0.5}),
        (ValueError, r"unk_index: expected a word in \[0, 7\), got 7", {"word_dropout": 0.5, "unk_index": 7}),
        (TypeError, "seed: expected an int64 tensor, got torch.float32", {"seed": torch.zeros(1)}),
        (ValueError, r"seed: .*\(1,\), got \(\)", {"seed": torch.tensor(1)}),
        (ValueError, "seed: expected None when a generator", {"seed": seed, "generator": torch.Generator()}),
    ]  # fmt: skip
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            lstm_decode(**(good | arguments))
