"""GRU decoding, both CPU backends: nn.Embedding + nn.GRU, ragged lengths, samples, word dropout, op contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from torch import nn

from fastvae.functional import gru, gru_decode
from fastvae.ops import gru as module
from fastvae.ops.recurrence import dropped_tokens

SEED = torch.tensor([-98765432123456789])
# samples (None: no such dimension), batch, time, vocabulary, embed, latent, hidden
SIZES = [
    (None, 1, 1, 1, 1, 1, 1),
    (3, 7, 5, 33, 7, 3, 33),
    (None, 5, 9, 11, 33, 7, 7),
    (1, 3, 4, 257, 1, 5, 65),
    (2, 17, 7, 13, 9, 0, 17),
    (None, 16, 8, 32, 16, 8, 32),
]


def operands(sizes, dtype=torch.float32, bias=True):
    samples, batch, time, vocabulary, embed, latent, hidden = sizes
    leading = (batch,) if samples is None else (samples, batch)
    shapes = {
        "z": (*leading, latent),
        "h0": (*leading, hidden),
        "embedding": (vocabulary, embed),
        "weight_ih": (3 * hidden, embed + latent),
        "weight_hh": (3 * hidden, hidden),
        "bias_ih": (3 * hidden,),
        "bias_hh": (3 * hidden,),
    }
    torch.manual_seed(0)
    leaves = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name in ("weight_ih", "weight_hh"):
        leaves[name] /= math.sqrt(max(hidden, 1))
    leaves = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
    if latent == 0:
        leaves["z"] = None
    if not bias:
        leaves["bias_ih"] = leaves["bias_hh"] = None
    tokens = torch.randint(0, max(vocabulary, 1), (batch, time))
    # All lengths from 0 to time where the batch has room for them, the longest first.
    lengths = time - torch.arange(batch) % (time + 1)
    return tokens, lengths, leaves


def clones(leaves, dtype=None):
    return {
        name: None if leaf is None else leaf.detach().to(dtype or leaf.dtype, copy=True).requires_grad_()
        for name, leaf in leaves.items()
    }


def eager(tokens, lengths, leaves):
    """nn.Embedding + nn.GRU fed with [embedding; z], one sequence at a time, each at its own length."""
    h0, z, weight_hh, weight_ih, bias = (leaves[n] for n in ("h0", "z", "weight_hh", "weight_ih", "bias_ih"))
    if h0.dim() == 3:
        samples = [leaves | {"h0": h0[s], "z": None if z is None else z[s]} for s in range(h0.shape[0])]
        return tuple(torch.stack(x) for x in zip(*(eager(tokens, lengths, one) for one in samples), strict=True))
    layer = nn.GRU(weight_ih.shape[1], weight_hh.shape[1], bias=bias is not None, batch_first=True)
    parameters = {"weight_ih_l0": weight_ih, "weight_hh_l0": weight_hh}
    if bias is not None:
        parameters |= {"bias_ih_l0": bias, "bias_hh_l0": leaves["bias_hh"]}
    hidden, h_n = [], []
    for b, length in enumerate(lengths.tolist()):
        h, out = h0[b : b + 1], h0.new_zeros(1, 0, h0.shape[1])
        if length:
            inputs = F.embedding(tokens[b : b + 1, :length], leaves["embedding"])
            if z is not None:
                inputs = torch.cat([inputs, z[b : b + 1, None].expand(-1, length, -1)], -1)
            out, h = torch.func.functional_call(layer, parameters, (inputs, h[None]))
            h = h[0]
        hidden.append(F.pad(out, (0, 0, 0, tokens.shape[1] - length)))
        h_n.append(h)
    return torch.cat(hidden), torch.cat(h_n)


def upstream(outputs):
    torch.manual_seed(1)
    return [torch.randn(o.shape).to(o.dtype) for o in outputs]


def with_gradients(outputs, leaves):
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(outputs, [*given.values()], upstream(outputs))
    return dict(zip(("hidden", "h_n", *given), (*outputs, *grads), strict=True))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_float64(sizes, dtype, bias, backend, assert_within_budget):
    tokens, lengths, leaves = operands(sizes, dtype, bias)
    peer, exact = clones(leaves), clones(leaves, torch.float64)
    ours = with_gradients(gru_decode(tokens, **leaves, lengths=lengths), leaves)
    theirs = with_gradients(eager(tokens, lengths, peer), peer)
    truth = with_gradients(eager(tokens, lengths, exact), exact)
    for name, mine in ours.items():
        assert mine.dtype == dtype, name
        # Half precision: float32 inside; the products over the latent and of the backward read rounded operands.
        rounding = {torch.float32: 8, torch.float64: 32}.get(dtype, 2)
        assert_within_budget(name, mine, truth[name], theirs[name], rounding)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_without_gradients_nothing_is_stored_and_all_is_equal(sizes, backend):
    tokens, lengths, leaves = operands(sizes)
    arguments = {"lengths": lengths, "word_dropout": 0.5 if sizes[3] > 1 else 0.0, "unk_index": 0, "seed": SEED}
    expected = gru_decode(tokens, **leaves, **arguments)
    with torch.no_grad():
        ours = gru_decode(tokens, **leaves, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("batch", [1, 5, 33])
def test_dense_inputs_match_the_module(batch, backend):
    torch.manual_seed(0)
    layer, time = nn.GRU(9, 33, batch_first=True), 6
    inputs, h0 = torch.randn(batch, time, 9).requires_grad_(), torch.randn(batch, 33).requires_grad_()
    leaves = {"inputs": inputs, "h0": h0} | dict(layer.named_parameters())
    theirs, last = layer(inputs, h0[None])
    ours = with_gradients(gru(inputs, h0, *layer.parameters()), leaves)
    for name, expected in with_gradients((theirs, last[0]), leaves).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5)
    lengths = torch.arange(batch) % (time + 1)
    hidden, h_n = gru(inputs, h0, *layer.parameters(), lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(hidden[b, :length], theirs[b, :length], rtol=1e-4, atol=1e-5)
        assert (hidden[b, length:] == 0).all()
        assert torch.equal(h_n[b], hidden[b, length - 1] if length else h0[b])


def test_all_steps_are_valid_without_lengths(backend):
    tokens, _, leaves = operands((2, 4, 5, 7, 3, 2, 6))
    without = gru_decode(tokens, **leaves)
    full = gru_decode(tokens, **leaves, lengths=torch.full((4,), 5))
    assert all(torch.equal(a, b) for a, b in zip(without, full, strict=True))


def test_a_sequence_does_not_depend_on_what_is_around_it(backend):
    """The other sequences, the other samples, the padding."""
    tokens, lengths, leaves = operands((3, 9, 6, 11, 3, 2, 33))
    whole = gru_decode(tokens, **leaves, lengths=lengths)
    chosen = torch.tensor([8, 0, 3])
    some = leaves | {name: leaves[name][1:, chosen] for name in ("z", "h0")}
    part = gru_decode(F.pad(tokens[chosen], (0, 3), value=-5), **some, lengths=lengths[chosen])
    torch.testing.assert_close(part[0][:, :, :6], whole[0][1:, chosen], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(part[1], whole[1][1:, chosen], rtol=1e-5, atol=1e-6)
    assert (part[0][:, :, 6:] == 0).all()


@pytest.mark.parametrize("word_dropout", [0.25, 1.0])
def test_word_dropout_is_the_stream(word_dropout, backend):
    """Equal to a run without it on the words replaced by hand, for all samples of a sentence."""
    tokens, _, leaves = operands((2, 5, 70, 11, 3, 2, 6))
    lengths, unk = torch.tensor([70, 0, 64, 65, 3]), 1
    replaced = dropped_tokens(tokens, lengths, SEED, word_dropout, unk)
    assert not torch.equal(replaced[0, 1:], tokens[0, 1:])
    dropped = gru_decode(tokens, **leaves, lengths=lengths, word_dropout=word_dropout, unk_index=unk, seed=SEED)
    ours = with_gradients(dropped, leaves)
    expected = with_gradients(gru_decode(replaced, **leaves, lengths=lengths), leaves)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name])


def test_manual_seed_and_generator():
    tokens, lengths, leaves = operands((None, 7, 5, 11, 3, 2, 6))

    def draws(**arguments):
        arguments |= {"lengths": lengths, "word_dropout": 0.5, "unk_index": 1}
        return [gru_decode(tokens, **leaves, **arguments)[0] for _ in range(2)]

    torch.manual_seed(3)
    first = draws()
    before = torch.get_rng_state()
    second = draws(generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(*first)
    draws(seed=SEED), gru_decode(tokens, **leaves)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn without word dropout"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "sizes",
    [
        (None, 0, 5, 7, 3, 2, 4),
        (2, 3, 0, 7, 3, 2, 4),
        (2, 0, 0, 7, 3, 2, 4),
        (0, 3, 5, 7, 3, 2, 4),
        (2, 3, 5, 7, 0, 2, 4),
        (2, 3, 5, 7, 3, 2, 0),
        (None, 3, 0, 0, 3, 2, 4),
    ],
    ids=str,
)
def test_zero_sizes(sizes, backend):
    tokens, lengths, leaves = operands(sizes)
    results = with_gradients(gru_decode(tokens, **leaves, lengths=lengths), leaves)
    assert results["hidden"].shape == (*leaves["h0"].shape[:-1], sizes[2], sizes[6])
    assert all(results[name].shape == leaf.shape for name, leaf in leaves.items())
    assert all(torch.isfinite(result).all() for result in results.values())
    if sizes[2] == 0:
        assert torch.equal(results["h_n"], leaves["h0"])
        assert torch.equal(results["h0"], upstream([results["hidden"], results["h_n"]])[1])


def test_batch_of_empty_sequences(backend):
    tokens, _, leaves = operands((2, 4, 5, 7, 3, 2, 6))
    hidden, h_n = gru_decode(tokens, **leaves, lengths=torch.zeros(4, dtype=torch.int64))
    assert (hidden == 0).all()
    assert torch.equal(h_n, leaves["h0"])
    grads = torch.autograd.grad(h_n, [leaves["h0"], leaves["weight_hh"]], upstream([h_n]))
    assert torch.equal(grads[0], upstream([h_n])[0])
    assert (grads[1] == 0).all()


@pytest.mark.parametrize("wanted", ["hidden", "h_n"])
def test_gradient_of_one_output(wanted, backend):
    tokens, lengths, leaves = operands((2, 4, 5, 7, 3, 2, 6))
    exact = clones(leaves, torch.float64)
    grads = []
    for which, function in ((leaves, gru_decode), (exact, None)):
        outputs = function(tokens, **which, lengths=lengths) if function else eager(tokens, lengths, which)
        output = outputs[wanted == "h_n"]
        grads.append(torch.autograd.grad(output, [*which.values()], upstream([output])))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def test_strided_and_expanded_operands(backend):
    tokens, lengths, leaves = operands((2, 7, 5, 11, 3, 2, 6))
    strided = {name: leaf.detach().mT.contiguous().mT if leaf.dim() > 1 else leaf for name, leaf in leaves.items()}
    strided["h0"], strided["bias_hh"] = leaves["h0"].detach()[:, :1].expand(2, 7, 6), torch.ones(1).expand(18)
    dense = {name: leaf.clone(memory_format=torch.contiguous_format) for name, leaf in strided.items()}
    dense, strided = ({n: t.detach().requires_grad_() for n, t in which.items()} for which in (dense, strided))
    ours = gru_decode(tokens.T.contiguous().T, **strided, lengths=lengths.repeat_interleave(2)[::2])
    ours, theirs = with_gradients(ours, strided), with_gradients(gru_decode(tokens, **dense, lengths=lengths), dense)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("sizes", [(None, 64, 4, 100, 9, 3, 65), (3, 33, 5, 11, 3, 2, 33)], ids=str)
def test_threads_agree(sizes, with_threads):
    tokens, lengths, leaves = operands(sizes)

    def run():
        return with_gradients(gru_decode(tokens, **leaves, lengths=lengths), leaves)

    torch.testing.assert_close(with_threads(1, run), with_threads(2, run), rtol=1e-5, atol=1e-5)


def test_threads_share_out_the_units_of_a_large_weight(with_threads, assert_within_budget):
    """Beyond a second-level cache: three samples of two sentences of which one ends before the other."""
    tokens, lengths, leaves = operands((3, 2, 3, 5, 4, 2, 449))
    assert 3 * 449 * 449 * 4 > 2 << 20
    peer, exact = clones(leaves), clones(leaves, torch.float64)
    ours = with_threads(2, lambda: with_gradients(gru_decode(tokens, **leaves, lengths=lengths), leaves))
    theirs, truth = (with_gradients(eager(tokens, lengths, which), which) for which in (peer, exact))
    for name, mine in ours.items():
        assert_within_budget(name, mine, truth[name], theirs[name], 8)


def test_nan_and_saturation(backend):
    tokens, _, leaves = operands((2, 4, 5, 7, 3, 2, 33))
    tokens = tokens % 6
    tokens[2, 3] = 6
    with torch.no_grad():
        leaves["embedding"][6, 1] = math.nan
    hidden, h_n = gru_decode(tokens, **leaves)
    expected = torch.zeros(2, 4, 5, dtype=torch.bool)
    expected[:, 2, 3:] = True
    assert torch.equal(hidden.isnan().any(-1), expected)
    assert torch.equal(hidden.isnan().all(-1), expected)
    assert torch.equal(h_n.isnan().all(-1), expected[..., -1])
    tokens, lengths, leaves = operands((2, 4, 5, 7, 3, 2, 33))
    with torch.no_grad():
        leaves["weight_ih"] *= 1e4
        leaves["weight_hh"] *= 1e4
    results = with_gradients(gru_decode(tokens, **leaves, lengths=lengths), leaves)
    assert all(torch.isfinite(result).all() for result in results.values())


@pytest.mark.parametrize("wrong", [-1, 11, 2**40])
def test_token_out_of_range(wrong, backend):
    tokens, _, leaves = operands((None, 7, 5, 11, 3, 2, 6))
    tokens[6, 3] = wrong
    message = rf"tokens: expected words in \[0, 11\), got {wrong} at \[6, 3\]" if backend == "C++" else "."
    with pytest.raises(IndexError, match=message):
        gru_decode(tokens, **leaves)


def test_gradcheck(backend):
    tokens, lengths, leaves = operands((2, 4, 3, 5, 2, 2, 3), torch.float64)

    def function(*tensors):
        arguments = dict(zip(leaves, tensors, strict=True))
        return gru_decode(tokens, **arguments, lengths=lengths, word_dropout=0.4, unk_index=1, seed=SEED)

    assert torch.autograd.gradcheck(function, [*leaves.values()])


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("dtype", "samples"), [(torch.float64, 1), (torch.bfloat16, 2)])
def test_opcheck(dtype, samples, keep):
    tokens, lengths, leaves = operands((samples, 4, 3, 5, 2, 0, 3), dtype)
    tensors = [leaves[name].detach() for name in ("embedding", "weight_ih", "weight_hh")]
    tensors.insert(0, leaves["h0"].detach().flatten(0, 1))
    static_gates = torch.randn(samples * 4, 12, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    arguments = (tokens, lengths, static_gates, *tensors, SEED, 0.5, 1)
    torch.library.opcheck(torch.ops.fastvae.gru_decode, (*arguments, keep))
    outputs = torch.ops.fastvae.gru_decode(*arguments, keep)
    assert outputs[2].numel() == (samples * 4 * 3 * 12 if keep and module.CORE is not None else 0)
    if keep:
        grads = upstream(outputs[:2])
        for given_grads in (grads, [grads[0], None], [None, grads[1]]):
            torch.library.opcheck(torch.ops.fastvae.gru_decode_backward, (*given_grads, outputs[0], outputs[2],
                                                                          *arguments))  # fmt: skip


def test_errors_name_the_argument():
    tokens, lengths, leaves = operands((None, 4, 5, 7, 3, 2, 6))
    good = {"tokens": tokens, "lengths": lengths} | {name: leaf.detach() for name, leaf in leaves.items()}
    many = {"z": torch.zeros(3, 4, 2)}
    cases = [
        (TypeError, "tokens: expected an int64 tensor, got torch.int32", {"tokens": tokens.int()}),
        (ValueError, r"tokens: expected shape \(batch, time\), got \(5,\)", {"tokens": tokens[0]}),
        (TypeError, "embedding: expected float32, .* got torch.int64", {"embedding": tokens}),
        (ValueError, r"embedding: expected shape \(vocabulary, embed\), got \(7,\)", {"embedding": torch.zeros(7)}),
        (TypeError, "weight_hh: expected torch.float32 as embedding", {"weight_hh": torch.zeros(18, 6).half()}),
        (ValueError, r"weight_hh: .*\(18, 6\), got \(6, 6\)", {"weight_hh": torch.zeros(6, 6)}),
        (ValueError, r"weight_ih: .*embed \+ latent.*\(18, 5\), got \(18, 3\)", {"weight_ih": torch.zeros(18, 3)}),
        (ValueError, r"weight_ih: .*\(18, 3\), got \(18, 5\)", {"z": None}),
        (ValueError, r"h0: .*\(batch, hidden\) = \(4, 6\), got \(3, 6\)", {"h0": torch.zeros(3, 6)}),
        (ValueError, r"h0: .*\(samples, batch, hidden\).* got \(3, 5, 6\)", many | {"h0": torch.zeros(3, 5, 6)}),
        (ValueError, r"z: .*\(4, 2\), got \(3, 2\)", {"z": torch.zeros(3, 2)}),
        (ValueError, r"z: .*\(samples, batch, latent\), got \(2,\)", {"z": torch.zeros(2)}),
        (ValueError, r"h0: .*\(batch, hidden\) = \(4, 6\), got \(3, 4, 6\)", {"h0": torch.zeros(3, 4, 6)}),
        (ValueError, r"h0: .*\(samples, batch, hidden\) = \(3, 4, 6\), got \(4, 6\)", many),
        (ValueError, "z: expected device cpu as embedding, got meta", {"z": torch.zeros(4, 2, device="meta")}),
        (ValueError, r"bias_ih: .*\(18,\), got \(6,\)", {"bias_ih": torch.zeros(6)}),
        (TypeError, "bias_hh: expected torch.float32 as embedding", {"bias_hh": torch.zeros(18).double()}),
        (TypeError, "lengths: expected an int64 tensor, got list", {"lengths": [5, 5, 5, 5]}),
        (ValueError, r"lengths: .*\(4,\), got \(3,\)", {"lengths": lengths[:3]}),
        (ValueError, r"word_dropout: expected a probability in \[0, 1\], got 1.5", {"word_dropout": 1.5}),
        (ValueError, "unk_index: expected the index of <unk> .* got None", {"word_dropout": 0.5}),
        (ValueError, r"unk_index: expected a word in \[0, 7\), got 7", {"word_dropout": 0.5, "unk_index": 7}),
        (ValueError, r"seed: .*\(1,\), got \(\)", {"seed": torch.tensor(1)}),
        (ValueError, "seed: expected None when a generator", {"seed": SEED, "generator": torch.Generator()}),
    ]  # fmt: skip
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            gru_decode(**(good | arguments))
    weights = [leaves[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    with pytest.raises(ValueError, match=r"inputs: expected shape \(batch, time, features\), got \(4, 6\)"):
        gru(torch.zeros(4, 6), leaves["h0"], *weights)
