import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvae.nn import LSTMDecoder, LSTMEncoder

V, E, H, L = 11, 5, 7, 3
SPECIAL = {"pad_index": 0, "unk_index": 1, "bos_index": 2, "eos_index": 3}
LENGTHS = torch.tensor([6, 2, 4, 1, 5])


def sentences(lengths=LENGTHS, vocab_size=V, width=None):
    """Random sentences <s> w.. </s>, padded."""
    tokens = torch.randint(4, vocab_size, (len(lengths), width or int(lengths.max())))
    tokens[:, 0] = 2
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        if length > 1:
            row[length - 1] = 3
        row[length:] = 0
    return tokens


def make_decoder(seed=0, dtype=torch.float64, **settings):
    torch.manual_seed(seed)
    return LSTMDecoder(V, E, H, L, **(SPECIAL | settings)).to(dtype)


def user_modules(dtype=torch.float64, *, bias=True, start=True, layers=1, seed=0):
    torch.manual_seed(seed)
    return (
        nn.Embedding(V, E).to(dtype),
        nn.LSTM(E + L, H, layers, batch_first=True, bias=bias).to(dtype),
        nn.Linear(H, V, bias=bias).to(dtype),
        nn.Linear(L, 2 * layers * H, bias=bias).to(dtype) if start else None,
    )


def eager_logits(modules, tokens, z):
    """What a user writes: logits of each next token of one sentence (time,), with z (latent,)."""
    embedding, lstm, output, initial_state = modules
    if len(tokens) == 1:  # nn.LSTM takes no empty sequence
        return output.weight.new_zeros(0, output.out_features)
    embedded = embedding(tokens[:-1])
    inputs = torch.cat([embedded, z.expand(len(embedded), -1)], -1)
    state = None
    if initial_state is not None:
        h0, c0 = initial_state(z).chunk(2, -1)
        state = (h0.view(lstm.num_layers, H), c0.view(lstm.num_layers, H))
    return output(lstm(inputs, state)[0])


def eager_nll(modules, tokens, z, lengths):
    rows = []
    for row, latent, length in zip(tokens, z, lengths.tolist(), strict=True):
        sentence = row[:length]
        logits = eager_logits(modules, sentence, latent)
        rows.append(F.cross_entropy(logits, sentence[1:], reduction="sum"))
    return torch.stack(rows)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_adopted_modules_give_the_same_nll_and_gradients_on_ragged_sentences(bias, start, layers):
    modules = user_modules(bias=bias, start=start, layers=layers)
    decoder = LSTMDecoder.from_modules(*modules, **SPECIAL)
    tokens = sentences()
    z, z_user = (torch.randn(5, L, dtype=torch.float64).requires_grad_() for _ in range(2))
    z_user.data.copy_(z.data)
    expected = eager_nll(modules, tokens, z_user, LENGTHS)
    nll = decoder(tokens, z, LENGTHS)
    torch.testing.assert_close(nll, expected, rtol=1e-10, atol=1e-10)

    weights = torch.rand(5, dtype=torch.float64)
    (nll * weights).sum().backward()
    (expected * weights).sum().backward()
    embedding, lstm, output, initial_state = modules
    pairs = {
        "z": (z, z_user),
        "embedding": (decoder.embedding.weight, embedding.weight),
        "output": (decoder.output.weight, output.weight),
    }
    for n in range(layers):
        weight_ih, weight_hh, layer_bias = decoder.layer(n)
        pairs[f"weight_ih {n}"] = (weight_ih, getattr(lstm, f"weight_ih_l{n}"))
        pairs[f"weight_hh {n}"] = (weight_hh, getattr(lstm, f"weight_hh_l{n}"))
        if bias:
            pairs[f"bias {n}"] = (layer_bias, getattr(lstm, f"bias_ih_l{n}"))
    if bias:
        pairs["output bias"] = (decoder.output.bias, output.bias)
    if start:
        pairs["initial_state"] = (decoder.initial_state.weight, initial_state.weight)
    for name, (ours, theirs) in pairs.items():
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10, msg=name)


def test_adopted_modules_agree_to_float32_rounding():
    modules = user_modules(torch.float32)
    decoder = LSTMDecoder.from_modules(*modules, **SPECIAL)
    tokens, z = sentences(), torch.randn(5, L)
    torch.testing.assert_close(
        decoder(tokens, z, LENGTHS), eager_nll(modules, tokens, z, LENGTHS), rtol=1e-5, atol=1e-5
    )
    logits = decoder.logits(tokens, z, LENGTHS)
    assert logits.shape == (5, 5, V)
    torch.testing.assert_close(logits[0], eager_logits(modules, tokens[0], z[0]), rtol=1e-5, atol=1e-6)


def test_logits_beyond_the_end_are_the_bias():
    decoder = make_decoder()
    logits = decoder.logits(sentences(), torch.randn(5, L, dtype=torch.float64), LENGTHS)
    beyond = torch.arange(5) >= (LENGTHS - 1).unsqueeze(1)
    bias = decoder.output.bias
    assert torch.equal((logits == bias).all(-1), beyond)


@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "layer_dropout": 0.25}])
def test_modules_survive_the_way_there_and_back(settings):
    decoder = make_decoder(**settings).eval()
    tokens, z = sentences(), torch.randn(5, L, dtype=torch.float64)
    modules = decoder.to_modules()
    torch.testing.assert_close(eager_nll(modules, tokens, z, LENGTHS), decoder(tokens, z, LENGTHS))
    assert modules.lstm.batch_first
    assert not modules.lstm.bias_hh_l0.any()
    adopted = LSTMDecoder.from_modules(*modules, **SPECIAL)
    assert adopted.layer_dropout == decoder.layer_dropout
    again = adopted.state_dict()
    assert again.keys() == decoder.state_dict().keys()
    for name, value in decoder.state_dict().items():
        assert torch.equal(again[name], value), name
    with torch.no_grad():
        modules.output.weight.zero_()
    assert decoder.output.weight.any(), "to_modules must copy"


def test_adoption_copies_and_keeps_tying():
    embedding, lstm = nn.Embedding(V, H, padding_idx=0), nn.LSTM(H + L, H)
    output = nn.Linear(H, V)
    output.weight = embedding.weight
    decoder = LSTMDecoder.from_modules(embedding, lstm.eval(), output)
    assert decoder.output.weight is decoder.embedding.weight
    assert decoder.output.weight is not embedding.weight
    assert decoder.pad_index == 0
    assert not decoder.training
    modules = decoder.to_modules()
    assert modules.output.weight is modules.embedding.weight
    assert modules.initial_state is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: nn.LSTM(E + L, H, num_layers=2)}, r"initial_state: expected nn.Linear\(3, 28\)"),
        ({1: nn.LSTM(E + L, H, bidirectional=True)}, "bidirectional"),
        ({1: nn.LSTM(E + L, H, proj_size=2)}, "proj_size"),
        ({1: nn.LSTM(E - 1, H)}, "input_size"),
        ({2: nn.Linear(H + 1, V)}, "output: expected"),
        ({2: nn.Linear(H, V - 1)}, "output: expected"),
        ({3: nn.Linear(L, H)}, "initial_state: expected"),
        ({3: nn.Linear(L + 1, 2 * H)}, "initial_state: expected"),
        ({0: nn.Embedding(V, E, max_norm=1.0)}, "max_norm"),
        ({2: nn.Linear(H, V).double()}, "output: expected torch.float32"),
    ],
)
def test_modules_that_cannot_be_adopted_are_refused(change, message):
    modules = list(user_modules(torch.float32))
    for index, module in change.items():
        modules[index] = module
    with pytest.raises(ValueError, match=message):
        LSTMDecoder.from_modules(*modules, **SPECIAL)


def test_other_kinds_of_modules_are_refused():
    embedding, _, output, _ = user_modules()
    with pytest.raises(TypeError, match=r"lstm: expected nn.LSTM, got GRU"):
        LSTMDecoder.from_modules(embedding, nn.GRU(E + L, H), output)


def test_lengths_are_counted_from_padding():
    decoder = make_decoder()
    lengths = torch.tensor([6, 2, 4, 3, 5])
    tokens, z = sentences(lengths), torch.randn(5, L, dtype=torch.float64)
    assert torch.equal(decoder(tokens, z), decoder(tokens, z, lengths))
    without_padding = make_decoder(pad_index=None)
    whole = without_padding(tokens, z, torch.full((5,), 6))
    assert torch.equal(without_padding(tokens, z), whole)


def test_what_stands_in_the_padding_does_not_matter():
    decoder = make_decoder()
    tokens, z = sentences(), torch.randn(5, L, dtype=torch.float64)
    other = tokens.clone()
    other[torch.arange(tokens.size(1)) >= LENGTHS.unsqueeze(1)] = 9
    torch.testing.assert_close(decoder(tokens, z, LENGTHS), decoder(other, z, LENGTHS))
    decoder(tokens, z, LENGTHS).sum().backward()
    assert not decoder.embedding.weight.grad[0].any()
    assert decoder.embedding.weight.grad[2].any()


def test_full_word_dropout_reads_unknown_words_behind_the_first():
    decoder = make_decoder(word_dropout=1.0)
    tokens, z = sentences(), torch.randn(5, L, dtype=torch.float64)
    modules = decoder.to_modules()
    losses = []
    for row, latent, length in zip(tokens, z, LENGTHS.tolist(), strict=True):
        read = torch.ones_like(row[:length])
        read[0] = 2
        logits = eager_logits(modules, read, latent)
        losses.append(F.cross_entropy(logits, row[1:length], reduction="sum"))
    torch.testing.assert_close(decoder(tokens, z, LENGTHS), torch.stack(losses))


def test_word_dropout_follows_its_seed_and_rests_in_evaluation():
    decoder = make_decoder(word_dropout=0.5)
    tokens, z = sentences(torch.full((40,), 9)), torch.randn(40, L, dtype=torch.float64)
    first, same, other = (decoder(tokens, z, seed=torch.tensor([seed])) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    generators = (torch.Generator().manual_seed(5) for _ in range(2))
    assert torch.equal(*(decoder(tokens, z, generator=generator) for generator in generators))
    decoder.eval()
    evaluated = decoder(tokens, z, seed=torch.tensor([1]))
    torch.testing.assert_close(evaluated, make_decoder().eval()(tokens, z))
    assert not torch.allclose(evaluated, first)


def test_dropout_acts_before_the_vocabulary_product_in_training_only():
    decoder = make_decoder(dropout=1.0)
    tokens, z = sentences(), torch.randn(5, L, dtype=torch.float64)
    log_probs = decoder.output.bias.log_softmax(-1)
    expected = torch.stack([-log_probs[row[1:n]].sum() for row, n in zip(tokens, LENGTHS, strict=True)])
    torch.testing.assert_close(decoder(tokens, z, LENGTHS), expected)
    torch.testing.assert_close(decoder.eval()(tokens, z, LENGTHS), make_decoder()(tokens, z, LENGTHS))


def test_dropout_is_inverted():
    torch.manual_seed(0)
    encoder = LSTMEncoder(V, E, 4000, dropout=0.25)
    tokens = sentences(torch.tensor([5]))
    dropped, whole = encoder(tokens), encoder.eval()(tokens)
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)


@pytest.mark.parametrize("variational", [False, True])
def test_dropout_between_layers_drops_what_the_next_layer_reads(variational):
    decoder = make_decoder(num_layers=2, layer_dropout=0.5, variational_dropout=variational)
    tokens, z, read = sentences(torch.full((5,), 9)), torch.randn(5, L, dtype=torch.float64), []
    layer = decoder.cell.dense
    decoder.cell = decoder.cell._replace(
        dense=lambda inputs, *rest, **k: read.append(inputs) or layer(inputs, *rest, **k)
    )
    decoder(tokens, z)
    decoder.eval()(tokens, z)
    dropped, whole = read
    kept = dropped != 0
    torch.testing.assert_close(dropped, torch.where(kept, 2 * whole, 0))
    assert 0.3 < kept.double().mean() < 0.7
    assert (kept == kept[:, :1]).all() == variational
    assert not torch.equal(kept[0], kept[1]), "a mask for each sentence"


@pytest.mark.parametrize("variational", [False, True])
def test_variational_dropout_before_the_vocabulary_product(variational):
    decoder = make_decoder(dropout=0.5, variational_dropout=variational)
    torch.nn.init.eye_(decoder.output.weight)
    torch.nn.init.zeros_(decoder.output.bias)
    logits = decoder.logits(sentences(torch.full((5,), 9)), torch.randn(5, L, dtype=torch.float64))
    kept = logits[..., :H] != 0
    assert 0.3 < kept.double().mean() < 0.7
    assert (kept == kept[:, :1]).all() == variational


@pytest.mark.parametrize("settings", [{}, {"num_layers": 2}, {"word_dropout": 0.5}])
def test_samples_of_a_sentence_are_scored_together(settings):
    decoder = make_decoder(**settings)
    tokens, z, seed = sentences(), torch.randn(4, 5, L, dtype=torch.float64), torch.tensor([3])
    nll = decoder(tokens, z, LENGTHS, seed=seed)
    assert nll.shape == (4, 5)
    expected = torch.stack([decoder(tokens, sample, LENGTHS, seed=seed) for sample in z])
    torch.testing.assert_close(nll, expected)
    grads, wanted = (torch.autograd.grad(x.sum(), list(decoder.parameters())) for x in (nll, expected))
    for (name, _), ours, theirs in zip(decoder.named_parameters(), grads, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    logits = decoder.logits(tokens, z, LENGTHS, seed=seed)
    torch.testing.assert_close(logits[2], decoder.logits(tokens, z[2], LENGTHS, seed=seed))


def test_tied_weights_get_the_gradient_of_both_uses():
    torch.manual_seed(0)
    tied = LSTMDecoder(V, H, H, L, tie_weights=True, **SPECIAL).double()
    free = LSTMDecoder(V, H, H, L, **SPECIAL).double()
    free.load_state_dict(tied.state_dict())
    assert len(list(tied.parameters())) == len(list(free.parameters())) - 1
    tokens, z = sentences(), torch.randn(5, L, dtype=torch.float64)
    for decoder in (tied, free):
        decoder(tokens, z, LENGTHS).sum().backward()
    both = free.embedding.weight.grad + free.output.weight.grad
    torch.testing.assert_close(tied.embedding.weight.grad, both)
    assert copy.deepcopy(tied).output.weight is not tied.output.weight
    copied = pickle.loads(pickle.dumps(tied))
    assert copied.output.weight is copied.embedding.weight


def test_plain_language_model_without_latent():
    torch.manual_seed(0)
    decoder = LSTMDecoder(V, E, H, 0, **SPECIAL).double()
    tokens = sentences()
    expected = eager_nll(decoder.to_modules(), tokens, torch.empty(5, 0, dtype=torch.float64), LENGTHS)
    torch.testing.assert_close(decoder(tokens, None, LENGTHS), expected)
    assert torch.equal(decoder(tokens, lengths=LENGTHS), decoder(tokens, torch.empty(5, 0), LENGTHS))
    written, lengths = decoder.generate(None, 4)
    assert written.shape[0] == len(lengths) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d, t, z: d(t[:0], z[:0]), ValueError, "tokens: expected"),
        (lambda d, t, z: d(t[:, :1], z), ValueError, "tokens: expected"),
        (lambda d, t, z: d(t[0], z[0]), ValueError, "tokens: expected"),
        (lambda d, t, z: d(t, z[:, :-1], LENGTHS), ValueError, r"z: expected shape \(batch, latent_dim\)"),
        (lambda d, t, z: d(t, None, LENGTHS), ValueError, "z: expected .* got None"),
        (lambda d, t, z: d(t, z, LENGTHS - 1), ValueError, "lengths: expected 1 to 6 .* got 0 to 5"),
        (lambda d, t, z: d(t, z, LENGTHS + 1), ValueError, "lengths: expected 1 to 6 .* got 2 to 7"),
        (lambda d, t, z: d(t, z, LENGTHS[:-1]), ValueError, "lengths: expected shape"),
        (lambda d, t, z: d(t, z, LENGTHS.int()), TypeError, "lengths: expected int64"),
        (lambda d, t, z: d(t.int(), z, LENGTHS), TypeError, "tokens: expected an int64"),
        (lambda d, t, z: d(t.flip(1), z), ValueError, "tokens: expected padding only at the end"),
        (lambda d, t, z: d(t + V, z, LENGTHS), IndexError, None),
    ],
)
def test_wrong_inputs_are_named(call, error, message):
    decoder = make_decoder()
    with pytest.raises(error, match=message):
        call(decoder, sentences(), torch.randn(5, L, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tie_weights": True}, "tie_weights: expected embed_dim equal to hidden_size, got 5 and 7"),
        ({"word_dropout": 0.1, "unk_index": None}, "unk_index"),
        ({"word_dropout": 1.5}, "word_dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"eos_index": V}, "eos_index"),
        ({"num_layers": 0}, "num_layers: expected at least 1, got 0"),
        ({"layer_dropout": 2}, "layer_dropout"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_decoder(**settings)


@pytest.mark.parametrize(("settings", "samples"), [({}, ()), ({"num_layers": 2}, (3,))])
def test_decoder_compiles_into_one_graph(settings, samples):
    decoder = make_decoder(dtype=torch.float32, word_dropout=0.5, **settings)
    tokens, z, seed = sentences(), torch.randn(*samples, 5, L), torch.tensor([3])
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    expected = decoder(tokens, z, LENGTHS, seed=seed)
    torch.testing.assert_close(compiled(tokens, z, LENGTHS, seed=seed), expected)
    expected.sum().backward()
    gradient = decoder.weight_hh.grad.clone()
    decoder.zero_grad()
    compiled(tokens, z, LENGTHS, seed=seed).sum().backward()
    torch.testing.assert_close(decoder.weight_hh.grad, gradient)


def test_decoder_under_autocast():
    decoder = make_decoder(dtype=torch.float32)
    tokens, z = sentences(), torch.randn(5, L)
    with torch.autocast("cpu", torch.bfloat16):
        nll = decoder(tokens, z, LENGTHS)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, decoder(tokens, z, LENGTHS), rtol=0.02, atol=0.02)
    nll.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def test_copies_give_the_same_numbers():
    decoder = make_decoder()
    tokens, z = sentences(), torch.randn(5, L, dtype=torch.float64)
    fresh = make_decoder(seed=1)
    fresh.load_state_dict(decoder.state_dict())
    for copied in (fresh, copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert torch.equal(copied(tokens, z, LENGTHS), decoder(tokens, z, LENGTHS))


@pytest.mark.parametrize("layers", [1, 2])
def test_encoder_is_the_last_state_of_an_lstm(layers):
    torch.manual_seed(0)
    encoder = LSTMEncoder(V, E, H, num_layers=layers, pad_index=0).double()
    lstm = nn.LSTM(E, H, layers, batch_first=True).double()
    with torch.no_grad():
        for n in range(layers):
            for name, value in zip(("weight_ih", "weight_hh", "bias_ih"), encoder.layer(n), strict=True):
                getattr(lstm, f"{name}_l{n}").copy_(value)
            getattr(lstm, f"bias_hh_l{n}").zero_()
    tokens = sentences()
    packed = nn.utils.rnn.pack_padded_sequence(
        encoder.embedding(tokens), LENGTHS, batch_first=True, enforce_sorted=False
    )
    expected = lstm(packed)[1][0][-1]
    torch.testing.assert_close(encoder(tokens, LENGTHS), expected)
    torch.testing.assert_close(encoder(tokens), expected)
    weights = torch.randn(5, H, dtype=torch.float64)
    names = [f"{name}_l{n}" for n in range(layers) for name in ("weight_ih", "weight_hh", "bias_ih")]
    gradients = [
        torch.autograd.grad((out * weights).sum(), parameters)
        for out, parameters in (
            (encoder(tokens), [p for n in range(layers) for p in encoder.layer(n)]),
            (expected, [getattr(lstm, name) for name in names]),
        )
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_encoder_shares_a_given_embedding_as_it_is():
    embedding = nn.Embedding(V, E)
    before = embedding.weight.detach().clone()
    encoder = LSTMEncoder(V, E, H, pad_index=0, embedding=embedding)
    assert encoder.embedding is embedding
    assert torch.equal(embedding.weight, before)
    with pytest.raises(ValueError, match="embedding: expected shape"):
        LSTMEncoder(V, E + 1, H, pad_index=0, embedding=embedding)
