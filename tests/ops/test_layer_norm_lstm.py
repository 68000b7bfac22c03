"""The layer-normalized LSTM, both CPU backends: against its equations, ragged lengths, samples, op contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES

from fastvae.functional import layer_norm_lstm, layer_norm_lstm_decode
from fastvae.ops import layer_norm_lstm as module
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


def operands(sizes, dtype=torch.float32):
    samples, batch, time, vocabulary, embed, latent, hidden = sizes
    leading = (batch,) if samples is None else (samples, batch)
    shapes = {
        "z": (*leading, latent),
        "h0": (*leading, hidden),
        "c0": (*leading, hidden),
        "embedding": (vocabulary, embed),
        "weight_ih": (4 * hidden, embed + latent),
        "weight_hh": (4 * hidden, hidden),
        "bias": (4 * hidden,),
        "norm_input": (4 * hidden,),
        "norm_hidden": (4 * hidden,),
        "norm_cell": (2, hidden),
    }
    torch.manual_seed(0)
    leaves = {name: torch.randn(shape) for name, shape in shapes.items()}
    leaves = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
    if latent == 0:
        leaves["z"] = leaves["bias"] = None
    tokens = torch.randint(0, max(vocabulary, 1), (batch, time))
    # All lengths from 0 to time where the batch has room for them, the longest first.
    lengths = time - torch.arange(batch) % (time + 1)
    return tokens, lengths, leaves


def clones(leaves, dtype=None):
    return {
        name: None if leaf is None else leaf.detach().to(dtype or leaf.dtype, copy=True).requires_grad_()
        for name, leaf in leaves.items()
    }


def norm(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def eager(tokens, lengths, leaves, eps=1e-5):
    """The equations, one sequence at a time, each at its own length."""
    h0, c0, z = leaves["h0"], leaves["c0"], leaves["z"]
    if h0.dim() == 3:
        samples = [leaves | {"h0": h0[s], "c0": c0[s], "z": None if z is None else z[s]} for s in range(h0.shape[0])]
        outputs = [eager(tokens, lengths, one, eps) for one in samples]
        return tuple(torch.stack(x) for x in zip(*outputs, strict=True))
    bias = 0 if leaves["bias"] is None else leaves["bias"]
    results = []
    for b, length in enumerate(lengths.tolist()):
        h, c, hidden = h0[b], c0[b], []
        for t in range(length):
            x = leaves["embedding"][tokens[b, t]]
            x = x if z is None else torch.cat([x, z[b]])
            gates = norm(leaves["weight_ih"] @ x, eps) * leaves["norm_input"] + bias
            gates = gates + norm(leaves["weight_hh"] @ h, eps) * leaves["norm_hidden"]
            i, f, g, o = gates.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * (norm(c, eps) * leaves["norm_cell"][0] + leaves["norm_cell"][1]).tanh()
            hidden.append(h)
        stacked = torch.stack(hidden) if hidden else h0.new_zeros(0, h0.shape[1])
        results.append((F.pad(stacked, (0, 0, 0, tokens.shape[1] - length)), h, c))
    return tuple(torch.stack(x) for x in zip(*results, strict=True))


def upstream(outputs):
    torch.manual_seed(1)
    return [torch.randn(o.shape).to(o.dtype) for o in outputs]


def with_gradients(outputs, leaves):
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(
        outputs, [*given.values()], upstream(outputs), allow_unused=True, materialize_grads=True
    )
    return dict(zip(("hidden", "h_n", "c_n", *given), (*outputs, *grads), strict=True))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_float64(sizes, dtype, backend, assert_within_budget):
    """With an eps that counts: without, the gradient of a state of size 1 is but rounding, as its scale is lost."""
    tokens, lengths, leaves = operands(sizes, dtype)
    peer, exact = clones(leaves), clones(leaves, torch.float64)
    ours = with_gradients(layer_norm_lstm_decode(tokens, **leaves, lengths=lengths, eps=0.5), leaves)
    theirs = with_gradients(eager(tokens, lengths, peer, 0.5), peer)
    truth = with_gradients(eager(tokens, lengths, exact, 0.5), exact)
    for name, mine in ours.items():
        assert mine.dtype == dtype, name
        # Half precision: float32 inside; the products over the latent and of the backward read rounded operands.
        rounding = {torch.float32: 16, torch.float64: 64}.get(dtype, 2)
        assert_within_budget(name, mine, truth[name], theirs[name], rounding)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_without_gradients_nothing_is_kept_and_all_is_equal(sizes, backend):
    tokens, lengths, leaves = operands(sizes)
    expected = layer_norm_lstm_decode(tokens, **leaves, lengths=lengths)
    with torch.no_grad():
        ours = layer_norm_lstm_decode(tokens, **leaves, lengths=lengths)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_dense_inputs_are_a_vocabulary_of_their_own(backend):
    tokens, lengths, leaves = operands((None, 7, 5, 11, 9, 0, 33))
    rest = {name: leaf for name, leaf in leaves.items() if name not in ("z", "embedding")}
    inputs = leaves["embedding"][tokens]
    ours = with_gradients(layer_norm_lstm(inputs, **rest, lengths=lengths), leaves)
    expected = with_gradients(layer_norm_lstm_decode(tokens, **leaves, lengths=lengths), leaves)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-4)


def test_gains_set_the_scale_whatever_the_weights(backend):
    """What the layer is for: weights of any size give the same states."""
    tokens, lengths, leaves = operands((None, 7, 5, 11, 9, 3, 33))
    larger = leaves | {name: 1000 * leaves[name] for name in ("weight_ih", "weight_hh")}
    ours = layer_norm_lstm_decode(tokens, **larger, lengths=lengths)
    torch.testing.assert_close(ours, layer_norm_lstm_decode(tokens, **leaves, lengths=lengths), rtol=1e-3, atol=1e-3)


def test_a_sequence_does_not_depend_on_what_is_around_it(backend):
    """The other sequences, the other samples, the padding."""
    tokens, lengths, leaves = operands((3, 9, 6, 11, 3, 2, 33))
    whole = layer_norm_lstm_decode(tokens, **leaves, lengths=lengths)
    chosen = torch.tensor([8, 0, 3])
    some = leaves | {name: leaves[name][1:, chosen] for name in ("z", "h0", "c0")}
    part = layer_norm_lstm_decode(F.pad(tokens[chosen], (0, 3), value=-5), **some, lengths=lengths[chosen])
    torch.testing.assert_close(part[0][:, :, :6], whole[0][1:, chosen], rtol=1e-4, atol=1e-5)
    for mine, all_rows in zip(part[1:], whole[1:], strict=True):
        torch.testing.assert_close(mine, all_rows[1:, chosen], rtol=1e-4, atol=1e-5)
    assert (part[0][:, :, 6:] == 0).all()


def test_word_dropout_is_the_stream(backend):
    tokens, _, leaves = operands((2, 5, 70, 11, 3, 2, 6))
    lengths, unk = torch.tensor([70, 0, 64, 65, 3]), 1
    replaced = dropped_tokens(tokens, lengths, SEED, 0.25, unk)
    assert not torch.equal(replaced[0, 1:], tokens[0, 1:])
    ours = layer_norm_lstm_decode(tokens, **leaves, lengths=lengths, word_dropout=0.25, unk_index=unk, seed=SEED)
    torch.testing.assert_close(ours, layer_norm_lstm_decode(replaced, **leaves, lengths=lengths))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "sizes",
    [
        (None, 0, 5, 7, 3, 2, 4),
        (2, 3, 0, 7, 3, 2, 4),
        (0, 3, 5, 7, 3, 2, 4),
        (2, 3, 5, 7, 0, 2, 4),
        (None, 3, 0, 0, 3, 2, 4),
    ],
    ids=str,
)
def test_zero_sizes(sizes, backend):
    tokens, lengths, leaves = operands(sizes)
    results = with_gradients(layer_norm_lstm_decode(tokens, **leaves, lengths=lengths), leaves)
    assert results["hidden"].shape == (*leaves["h0"].shape[:-1], sizes[2], sizes[6])
    assert all(results[name].shape == leaf.shape for name, leaf in leaves.items())
    assert all(torch.isfinite(result).all() for result in results.values())
    if sizes[2] == 0:
        assert torch.equal(results["c_n"], leaves["c0"])


@pytest.mark.parametrize("wanted", ["hidden", "h_n", "c_n"])
def test_gradient_of_one_output(wanted, backend):
    tokens, lengths, leaves = operands((2, 4, 5, 7, 3, 2, 6))
    exact, grads = clones(leaves, torch.float64), []
    for which, function in ((leaves, layer_norm_lstm_decode), (exact, None)):
        outputs = function(tokens, **which, lengths=lengths) if function else eager(tokens, lengths, which)
        output = outputs[("hidden", "h_n", "c_n").index(wanted)]
        grads.append(torch.autograd.grad(output, [*which.values()], upstream([output])))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sizes", [(None, 64, 4, 100, 9, 3, 65), (3, 33, 5, 11, 3, 2, 33)], ids=str)
def test_threads_agree(sizes, with_threads):
    tokens, lengths, leaves = operands(sizes)

    def run():
        return with_gradients(layer_norm_lstm_decode(tokens, **leaves, lengths=lengths), leaves)

    torch.testing.assert_close(with_threads(1, run), with_threads(2, run), rtol=1e-3, atol=1e-4)


def test_threads_share_out_the_columns_of_a_large_weight(with_threads, assert_within_budget):
    """Beyond a second-level cache: three samples of two sentences of which one ends before the other."""
    tokens, lengths, leaves = operands((3, 2, 3, 5, 4, 2, 385))
    assert 4 * 385 * 385 * 4 > 2 << 20
    peer, exact = clones(leaves), clones(leaves, torch.float64)
    ours = with_threads(2, lambda: with_gradients(layer_norm_lstm_decode(tokens, **leaves, lengths=lengths), leaves))
    theirs, truth = (with_gradients(eager(tokens, lengths, which), which) for which in (peer, exact))
    for name, mine in ours.items():
        assert_within_budget(name, mine, truth[name], theirs[name], 32)


def test_nan_stays_in_its_sequence(backend):
    tokens, _, leaves = operands((2, 4, 5, 7, 3, 2, 33))
    tokens = tokens % 6
    tokens[2, 3] = 6
    with torch.no_grad():
        leaves["embedding"][6, 1] = math.nan
    hidden, _, c_n = layer_norm_lstm_decode(tokens, **leaves)
    expected = torch.zeros(2, 4, 5, dtype=torch.bool)
    expected[:, 2, 3:] = True
    assert torch.equal(hidden.isnan().all(-1), expected)
    assert torch.equal(hidden.isnan().any(-1), expected)
    assert torch.equal(c_n.isnan().all(-1), expected[..., -1])


def test_gradcheck(backend):
    tokens, lengths, leaves = operands((2, 3, 3, 5, 2, 2, 3), torch.float64)

    def function(*tensors):
        arguments = dict(zip(leaves, tensors, strict=True))
        options = {"word_dropout": 0.4, "unk_index": 1, "seed": SEED, "eps": 0.1}
        return layer_norm_lstm_decode(tokens, **arguments, lengths=lengths, **options)

    assert torch.autograd.gradcheck(function, [*leaves.values()])


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("dtype", "samples"), [(torch.float64, 1), (torch.bfloat16, 2)])
def test_opcheck(dtype, samples, keep):
    tokens, lengths, leaves = operands((samples, 4, 3, 5, 2, 0, 3), dtype)
    states = [leaves[name].detach().flatten(0, 1) for name in ("h0", "c0")]
    weights = [leaves[name].detach() for name in ("embedding", "weight_ih", "weight_hh", "norm_cell")]
    weights.insert(3, torch.randn(3, 12).to(dtype))
    static_inputs = torch.randn(samples * 4, 12, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    arguments = (tokens, lengths, static_inputs, *states, *weights, SEED, 0.5, 1, 1e-5)
    torch.library.opcheck(torch.ops.fastvae.layer_norm_lstm_decode, (*arguments, keep))
    outputs = torch.ops.fastvae.layer_norm_lstm_decode(*arguments, keep)
    assert [o.numel() > 0 for o in outputs[3:]] == 3 * [keep and module.CORE is not None]
    if keep:
        grads = upstream(outputs[:3])
        for given in (grads, [grads[0], None, None], [None, grads[1], grads[2]]):
            torch.library.opcheck(
                torch.ops.fastvae.layer_norm_lstm_decode_backward, (*given, outputs[0], *outputs[3:], *arguments)
            )


def test_errors_name_the_argument():
    tokens, lengths, leaves = operands((None, 4, 5, 7, 3, 2, 6))
    good = {"tokens": tokens, "lengths": lengths} | {name: leaf.detach() for name, leaf in leaves.items()}
    cases = [
        (ValueError, r"weight_ih: .*embed \+ latent.*\(24, 5\), got \(24, 3\)", {"weight_ih": torch.zeros(24, 3)}),
        (ValueError, r"c0: .*\(batch, hidden\) = \(4, 6\), got \(3, 6\)", {"c0": torch.zeros(3, 6)}),
        (ValueError, r"bias: .*\(4 \* hidden,\) = \(24,\), got \(6,\)", {"bias": torch.zeros(6)}),
        (ValueError, r"norm_input: .*\(24,\), got \(6,\)", {"norm_input": torch.zeros(6)}),
        (TypeError, "norm_hidden: expected torch.float32 as embedding", {"norm_hidden": torch.zeros(24).double()}),
        (ValueError, r"norm_cell: .*\(2, hidden\) = \(2, 6\), got \(6,\)", {"norm_cell": torch.zeros(6)}),
        (ValueError, "eps: expected above 0, got 0.0", {"eps": 0.0}),
        (ValueError, "unk_index: expected the index of <unk> .* got None", {"word_dropout": 0.5}),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            layer_norm_lstm_decode(**(good | arguments))
    rest = {name: leaf for name, leaf in good.items() if name not in ("tokens", "z", "embedding")}
    with pytest.raises(ValueError, match=r"inputs: expected shape \(batch, time, features\), got \(4, 6\)"):
        layer_norm_lstm(torch.zeros(4, 6), **rest)
