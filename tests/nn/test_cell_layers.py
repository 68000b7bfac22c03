"""Encoders and decoders of other cells: against nn.GRU, and against the cell's step in plain PyTorch."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvae.nn import GRUDecoder, GRUEncoder, LSTMDecoder, LSTMEncoder, export_decoder

V, E, H, L = 11, 5, 7, 3
SPECIAL = {"pad_index": 0, "unk_index": 1, "bos_index": 2, "eos_index": 3}
LENGTHS = torch.tensor([6, 2, 4, 1, 5])
KINDS = {"LSTM": (LSTMDecoder, {}), "layer norm": (LSTMDecoder, {"layer_norm": True}), "GRU": (GRUDecoder, {})}
every_cell = pytest.mark.parametrize("kind", KINDS)


def sentences(lengths=LENGTHS):
    """Random sentences <s> w.. </s>, padded."""
    tokens = torch.randint(4, V, (len(lengths), int(lengths.max())))
    tokens[:, 0] = 2
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        if length > 1:
            row[length - 1] = 3
        row[length:] = 0
    return tokens


def make_decoder(kind, **settings):
    torch.manual_seed(0)
    decoder, own = KINDS[kind]
    decoder = decoder(V, E, H, L, **(SPECIAL | own | settings)).double()
    for name, parameter in decoder.named_parameters():
        if name.startswith("norm"):
            nn.init.normal_(parameter)
    return decoder


def stepwise_nll(decoder, tokens, z, lengths):
    """One sentence, one token, one layer at a time, by the cell's own step."""
    rows = []
    for row, latent, length in zip(tokens, z, lengths.tolist(), strict=True):
        states = [s[:, None] for s in decoder.initial_states(latent)]
        nll = z.new_zeros(())
        for word, target in itertools.pairwise(row[:length]):
            below, after = torch.cat([decoder.embedding.weight[word], latent])[None], []
            for layer in range(decoder.num_layers):
                parameters = decoder.layer(layer)
                after.append(decoder.cell.step(below @ parameters[0].T, tuple(s[layer] for s in states), parameters))
                below = after[-1][0]
            states = [torch.stack(layers) for layers in zip(*after, strict=True)]
            nll = nll + F.cross_entropy(decoder.output(below)[0], target)
        rows.append(nll)
    return torch.stack(rows)


@every_cell
@pytest.mark.parametrize("layers", [1, 3])
def test_likelihood_and_gradients_are_those_of_the_steps(kind, layers):
    decoder = make_decoder(kind, num_layers=layers)
    tokens, z = sentences(), torch.randn(5, L, dtype=torch.float64).requires_grad_()
    ours, expected = decoder(tokens, z), stepwise_nll(decoder, tokens, z, LENGTHS)
    torch.testing.assert_close(ours, expected)
    leaves, grad = [z, *decoder.parameters()], torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(expected, leaves, grad))


@every_cell
def test_samples_of_a_sentence_are_scored_together(kind):
    decoder = make_decoder(kind, num_layers=2)
    tokens, z = sentences(), torch.randn(4, 5, L, dtype=torch.float64)
    expected = torch.stack([decoder(tokens, one) for one in z])
    torch.testing.assert_close(decoder(tokens, z), expected)


def gru_modules(bias, start, layers):
    torch.manual_seed(0)
    modules = (
        nn.Embedding(V, E),
        nn.GRU(E + L, H, layers, batch_first=True, bias=bias),
        nn.Linear(H, V, bias=bias),
        nn.Linear(L, layers * H, bias=bias) if start else None,
    )
    return tuple(None if m is None else m.double() for m in modules)


def eager_nll(modules, tokens, z, lengths):
    embedding, gru, output, initial_state = modules
    rows = []
    for row, latent, length in zip(tokens, z, lengths.tolist(), strict=True):
        if length == 1:  # nn.GRU takes no empty sequence
            rows.append(z.new_zeros(()))
            continue
        embedded = embedding(row[: length - 1])
        inputs = torch.cat([embedded, latent.expand(len(embedded), -1)], -1)
        h0 = None if initial_state is None else initial_state(latent).view(gru.num_layers, H)
        rows.append(F.cross_entropy(output(gru(inputs, h0)[0]), row[1:length], reduction="sum"))
    return torch.stack(rows)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_adopted_gru_gives_the_same_likelihood_and_gradients(bias, start, layers):
    modules = gru_modules(bias, start, layers)
    decoder = GRUDecoder.from_modules(*modules, pad_index=0)
    tokens, z = sentences(), torch.randn(5, L, dtype=torch.float64).requires_grad_()
    ours, expected = decoder(tokens, z), eager_nll(modules, tokens, z, LENGTHS)
    torch.testing.assert_close(ours, expected)
    names = {f"gru.{name}_l{n}": f"{name}_l{n}" if n else name
             for n in range(layers) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}  # fmt: skip
    theirs = {
        names.get(f"{part}.{name}", f"{part}.{name}"): parameter
        for part, module in zip(("embedding", "gru", "output", "initial_state"), modules, strict=True)
        if module is not None
        for name, parameter in module.named_parameters()
    }
    own = dict(decoder.named_parameters())
    assert own.keys() == theirs.keys()
    mine = torch.autograd.grad(ours.sum(), [z, *own.values()])
    wanted = torch.autograd.grad(expected.sum(), [z, *(theirs[name] for name in own)])
    torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("bias", [True, False])
def test_gru_modules_survive_the_way_there_and_back(bias):
    modules = gru_modules(bias, True, 2)
    back = GRUDecoder.from_modules(*modules).eval().to_modules()
    for ours, theirs in zip(back, modules, strict=True):
        assert not ours.training
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_modules_that_cannot_be_adopted_or_made_are_refused():
    embedding, gru, output, start = gru_modules(True, True, 1)
    with pytest.raises(TypeError, match=r"gru: expected nn\.GRU, got LSTM"):
        GRUDecoder.from_modules(embedding, nn.LSTM(E + L, H), output, start)
    with pytest.raises(ValueError, match="gru: expected bidirectional=False, got True"):
        GRUDecoder.from_modules(embedding, nn.GRU(E + L, H, bidirectional=True).double(), output, start)
    with pytest.raises(ValueError, match=r"initial_state: expected nn.Linear\(3, 7\), got nn.Linear\(3, 14\)"):
        GRUDecoder.from_modules(embedding, gru, output, nn.Linear(L, 2 * H).double())
    with pytest.raises(ValueError, match=r"layer_norm: expected False, .* got True"):
        make_decoder("layer norm").to_modules()


@pytest.mark.parametrize("layers", [1, 3])
def test_gru_encoder_is_the_last_state_of_a_gru(layers):
    torch.manual_seed(0)
    encoder = GRUEncoder(V, E, H, num_layers=layers, pad_index=0).double()
    gru = nn.GRU(E, H, layers, batch_first=True).double()
    for n in range(layers):
        for name, parameter in zip(encoder.cell.names, encoder.layer(n), strict=True):
            getattr(gru, f"{name}_l{n}").data.copy_(parameter)
    tokens = sentences()
    ours = encoder(tokens)
    for mine, row, length in zip(ours, tokens, LENGTHS.tolist(), strict=True):
        torch.testing.assert_close(mine, gru(encoder.embedding(row[None, :length]))[1][-1, 0])


def test_layer_normalized_encoder_is_indifferent_to_the_scale_of_its_weights():
    torch.manual_seed(0)
    encoder = LSTMEncoder(V, E, H, num_layers=2, pad_index=0, layer_norm=True).double()
    tokens = sentences()
    for layer in range(2):
        for weight in encoder.layer(layer)[:2]:
            weight.data *= 100  # the variances are far above eps
    other = copy.deepcopy(encoder)
    for layer in range(2):
        for weight in other.layer(layer)[:2]:
            weight.data *= 100
    plain = LSTMEncoder(V, E, H, num_layers=2, pad_index=0).double()
    plain.load_state_dict(encoder.state_dict(), strict=False)
    torch.testing.assert_close(encoder(tokens), other(tokens), rtol=1e-3, atol=1e-3)
    assert (encoder(tokens) - plain(tokens)).abs().max() > 0.1


def test_layer_norm_begins_as_the_plain_normalization():
    decoder = LSTMDecoder(V, E, H, L, num_layers=2, layer_norm=True)
    for name in ("norm_input", "norm_hidden", "norm_input_l1", "norm_hidden_l1"):
        assert torch.equal(getattr(decoder, name), torch.ones(4 * H))
    for name in ("norm_cell", "norm_cell_l1"):
        assert torch.equal(getattr(decoder, name), torch.stack([torch.ones(H), torch.zeros(H)]))


@every_cell
@pytest.mark.parametrize("steps", [2, 9])
def test_written_sentences_are_scored_as_the_decoder_scores_them(kind, steps):
    decoder = make_decoder(kind, num_layers=2).eval()
    z = torch.randn(4, L, dtype=torch.float64)
    for options in ({}, {"strategy": "sample"}, {"strategy": "beam", "beam_size": 3}):
        tokens, lengths, log_probs = decoder.generate(z, steps, return_log_probs=True, **options)
        whole = torch.cat([torch.full((4, 1), SPECIAL["bos_index"]), tokens], 1)
        scores = decoder.logits(whole, z, lengths + 1).log_softmax(-1)
        expected = scores.gather(-1, tokens[..., None])[..., 0]
        inside = torch.arange(tokens.shape[1]) < lengths[:, None]
        torch.testing.assert_close(log_probs[inside], expected[inside])


@every_cell
def test_every_way_to_write(kind):
    """Prefixes, seeds, streaming, several best sentences and no repetition are for all cells."""
    decoder, z = make_decoder(kind, num_layers=2).eval(), torch.randn(4, L, dtype=torch.float64)
    prefix, seeds = torch.tensor([[5, 6], [7, 0], [0, 0], [8, 8]]), torch.arange(4)
    for options in ({}, {"strategy": "sample", "seeds": seeds}):
        tokens, lengths = decoder.generate(z, 12, prefix=prefix, no_repeat_ngram=2, **options)
        assert torch.equal(tokens[:, :2][prefix > 0], prefix[prefix > 0])
        streamed = torch.stack(list(decoder.stream(z, 12, prefix=prefix, no_repeat_ngram=2, **options)), 1)
        assert torch.equal(streamed, tokens)
        for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
            pairs = list(itertools.pairwise(row[:length]))
            assert len(pairs) == len(set(pairs))
    tokens, lengths, log_probs = decoder.generate(z, 40, "beam", beam_size=4, n_best=3, return_log_probs=True)
    assert tokens.shape == (4, 3, int(lengths.max()))
    totals = log_probs.sum(-1)
    assert (totals[:, :-1] >= totals[:, 1:]).all()
    assert all(len({tuple(sentence) for sentence in rows}) == 3 for rows in tokens.tolist())


@every_cell
def test_greedy_takes_the_likeliest_word(kind):
    decoder = make_decoder(kind).eval()
    z = torch.randn(4, L, dtype=torch.float64)
    tokens, lengths = decoder.generate(z, 8)
    for row, latent, length in zip(tokens, z, lengths.tolist(), strict=True):
        sentence = torch.tensor([[SPECIAL["bos_index"]]])
        for word in row[:length]:
            padded = F.pad(sentence, (0, 1), value=4)
            scores = decoder.logits(padded, latent[None], torch.tensor([padded.shape[1]]))[0, -1].clone()
            scores[[SPECIAL["bos_index"], SPECIAL["pad_index"]]] = -torch.inf
            assert word == scores.argmax()
            sentence = torch.cat([sentence, word.view(1, 1)], 1)


@every_cell
def test_decoder_compiles_into_one_graph(kind):
    torch.compiler.reset()
    decoder = make_decoder(kind, num_layers=2, word_dropout=0.3)
    tokens, z, seed = sentences(), torch.randn(5, L, dtype=torch.float64), torch.tensor([5])
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, z, LENGTHS, seed=seed), decoder(tokens, z, LENGTHS, seed=seed))
    torch.compiler.reset()


@every_cell
def test_copies_give_the_same_numbers(kind):
    decoder = make_decoder(kind, num_layers=2).eval()
    tokens, z = sentences(), torch.randn(5, L, dtype=torch.float64)
    for other in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert torch.equal(other(tokens, z), decoder(tokens, z))
        assert other.cell == decoder.cell


@pytest.mark.parametrize("kind", ["layer norm", "GRU"])
def test_export_is_of_plain_lstm_layers(kind):
    with pytest.raises(ValueError, match="decoder: expected one of plain LSTM layers"):
        export_decoder(make_decoder(kind))
