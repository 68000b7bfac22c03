import math

import pytest
import torch
from torch import nn

from fastvae.nn import TransformerDecoder, TransformerEncoder, export_decoder
from fastvae.nn.dropout import dropout
from fastvae.ops.generation import linear_rows

PAD, UNK, BOS, EOS = 0, 1, 2, 3
SPECIAL = {"pad_index": PAD, "unk_index": UNK, "bos_index": BOS, "eos_index": EOS}
STRATEGIES = ("greedy", "sample", "beam")
V, LENGTHS = 15, torch.tensor([7, 3, 5, 2])


def make_decoder(latent_dim=3, *, sharpness=3.0, hidden=8, **settings):
    """A random decoder whose distributions differ much from step to step and latent to latent."""
    torch.manual_seed(0)
    embed = settings.pop("embed_dim", hidden)
    decoder = TransformerDecoder(
        V, embed, hidden, latent_dim, **({"num_layers": 2, "num_heads": 2} | SPECIAL | settings)
    ).double()
    with torch.no_grad():
        decoder.embedding.weight.mul_(sharpness)
        if decoder.memory is not None:
            decoder.memory.weight.mul_(sharpness)
        decoder.output.weight.mul_(sharpness)
    return decoder.eval()


def make_encoder(**settings):
    torch.manual_seed(0)
    return (
        TransformerEncoder(V, 6, 8, **({"num_layers": 2, "num_heads": 2, "pad_index": PAD} | settings)).double().eval()
    )


def sentences(lengths=LENGTHS):
    tokens = torch.randint(4, V, (len(lengths), int(lengths.max())), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = BOS
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        row[length - 1] = EOS
        row[length:] = PAD
    return tokens


def latents(*shape):
    return torch.randn(*shape, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def reference_layers(source, kind):
    """The layers as PyTorch's own; of a decoder's, the memory is the latent itself, padded to the hidden size."""
    size, layers = source.hidden_size, []
    for n, layer in enumerate(source.layers):
        other = kind(
            size, source.num_heads, layer.inner.out_features, dropout=0.0, batch_first=True, norm_first=True
        ).double()
        with torch.no_grad():
            other.self_attn.in_proj_weight.copy_(layer.query_key_value.weight)
            other.self_attn.in_proj_bias.copy_(layer.query_key_value.bias)
            other.self_attn.out_proj.load_state_dict(layer.attended.state_dict())
            other.linear1.load_state_dict(layer.inner.state_dict())
            other.linear2.load_state_dict(layer.outer.state_dict())
            other.norm1.load_state_dict(layer.norm_attention.state_dict())
            feedforward_norm = other.norm3 if kind is nn.TransformerDecoderLayer else other.norm2
            feedforward_norm.load_state_dict(layer.norm_feedforward.state_dict())
            if kind is nn.TransformerDecoderLayer:
                # Value and output of the cross-attention, whose product is what z adds; query and key stay random.
                rows = slice(n * size, (n + 1) * size)
                value = torch.zeros(size, size, dtype=torch.float64)
                value[:, : source.latent_dim] = source.memory.weight[rows]
                turn = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
                other.multihead_attn.in_proj_weight[2 * size :] = turn.T @ value
                other.multihead_attn.in_proj_bias[2 * size :] = turn.T @ source.memory.bias[rows]
                other.multihead_attn.out_proj.weight.copy_(turn)
        layers.append(other.eval())
    return layers


@pytest.mark.parametrize("settings", [{}, {"embed_dim": 6}, {"positions": "learned", "feedforward_size": 5}])
def test_decoder_is_that_of_pytorch_with_one_vector_of_memory(settings):
    decoder, tokens, z = make_decoder(**settings), sentences(), latents(4)
    words = tokens[:, :-1]
    hidden = decoder.embedding(words) * math.sqrt(decoder.embed_dim)
    hidden = hidden if decoder.input is None else decoder.input(hidden)
    hidden = hidden + decoder.position_vectors(words.size(1))
    memory = torch.zeros(4, 1, decoder.hidden_size, dtype=torch.float64)
    memory[:, 0, :3] = z
    mask = nn.Transformer.generate_square_subsequent_mask(words.size(1), dtype=torch.float64)
    for layer in reference_layers(decoder, nn.TransformerDecoderLayer):
        hidden = layer(hidden, memory, tgt_mask=mask, tgt_is_causal=True)
    expected = decoder.output(decoder.norm(hidden)).log_softmax(-1)
    targets = tokens[:, 1:]
    nll = -expected.gather(2, targets[..., None])[..., 0]
    nll = nll.masked_fill(torch.arange(6) >= (LENGTHS - 1)[:, None], 0).sum(1)
    torch.testing.assert_close(decoder(tokens, z, LENGTHS), nll)
    inside = torch.arange(6) < (LENGTHS - 1)[:, None]
    torch.testing.assert_close(decoder.logits(tokens, z, LENGTHS).log_softmax(-1)[inside], expected[inside])


def test_encoder_is_the_mean_of_pytorchs_states():
    encoder, tokens = make_encoder(), sentences()
    hidden = encoder.input(encoder.embedding(tokens) * math.sqrt(6)) + encoder.position_vectors(tokens.size(1))
    beyond = torch.arange(tokens.size(1)) >= LENGTHS[:, None]
    for layer in reference_layers(encoder, nn.TransformerEncoderLayer):
        hidden = layer(hidden, src_key_padding_mask=beyond)
    for row, states, length in zip(encoder(tokens, LENGTHS), encoder.norm(hidden), LENGTHS.tolist(), strict=True):
        torch.testing.assert_close(row, states[:length].mean(0))


@pytest.mark.parametrize("junk", [PAD, 9, 10**9, -1])
def test_padding_never_matters(junk):
    """Not its tokens, not how much of it there is: nor for the gradients."""
    decoder, encoder, z = make_decoder(), make_encoder(), latents(4)
    tokens = sentences()
    wide = nn.functional.pad(tokens, (0, 3)).masked_fill(torch.arange(10) >= LENGTHS[:, None], junk)
    results = []
    for batch in (tokens, wide):
        nll, vectors = decoder(batch, z, LENGTHS), encoder(batch, LENGTHS)
        parameters = [*decoder.parameters(), *encoder.parameters()]
        results.append([nll, vectors, *torch.autograd.grad(nll.sum() + vectors.square().sum(), parameters)])
    for narrow, padded in zip(*results, strict=True):
        torch.testing.assert_close(narrow, padded)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = tokens[row : row + 1, :length]
        torch.testing.assert_close(decoder(alone, z[row : row + 1]), results[0][0][row : row + 1])
        torch.testing.assert_close(encoder(alone), results[0][1][row : row + 1])


def test_no_word_sees_what_follows():
    decoder, tokens, z = make_decoder(), sentences(torch.tensor([7])), latents(1)
    changed = tokens.clone()
    changed[0, 4] = 4 + (tokens[0, 4] - 3) % (V - 4)
    before, after = decoder.logits(tokens, z), decoder.logits(changed, z)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4], after[:, 4])


@pytest.mark.parametrize("layers", [1, 3])
def test_samples_of_z_are_separate_calls(layers):
    decoder, tokens, z = make_decoder(num_layers=layers), sentences(), latents(5, 4).requires_grad_()
    together, apart = decoder(tokens, z, LENGTHS), torch.stack([decoder(tokens, sample, LENGTHS) for sample in z])
    assert together.shape == (5, 4)
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(decoder.logits(tokens, z, LENGTHS)[3], decoder.logits(tokens, z[3], LENGTHS))
    for mine, expected in zip(*(torch.autograd.grad(x.square().sum(), z) for x in (together, apart)), strict=True):
        torch.testing.assert_close(mine, expected)
    decoder.train().word_dropout = 0.5
    seed = torch.tensor([3])
    torch.testing.assert_close(decoder(tokens, z, LENGTHS, seed=seed)[2], decoder(tokens, z[2], LENGTHS, seed=seed))


@pytest.mark.parametrize(
    "settings", [{}, {"embed_dim": 6, "positions": "learned"}, {"latent_dim": 0}, {"num_layers": 1}]
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_steps_with_a_cache_are_the_whole_sequence(strategy, settings):
    decoder = make_decoder(**settings)
    z = latents(9) if decoder.latent_dim else torch.empty(9, 0, dtype=torch.float64)
    tokens, lengths, log_probs = decoder.generate(z, 8, strategy, temperature=0.8, seeds=torch.arange(9), beam_size=3,
                                                  return_log_probs=True)  # fmt: skip
    if not settings:
        assert len(set(lengths.tolist())) > 1, "the case must hold sentences of several lengths"
    whole = torch.cat([torch.full((9, 1), BOS), tokens], 1)
    torch.testing.assert_close(-log_probs.sum(1), decoder(whole, z, lengths + 1))
    if strategy == "greedy":
        scores = decoder.logits(whole, z, lengths + 1)
        scores[..., [PAD, BOS]] = -torch.inf
        inside = torch.arange(tokens.size(1)) < lengths[:, None]
        assert torch.equal(scores.argmax(-1)[inside], tokens[inside])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sentence_does_not_depend_on_its_batch(strategy):
    """Not even in the last digit."""
    decoder, z, seeds = make_decoder(hidden=16, num_heads=4).float(), latents(10).float(), torch.arange(10)
    options = {"strategy": strategy, "beam_size": 2, "return_log_probs": True}
    tokens, lengths, log_probs = decoder.generate(z, 7, seeds=seeds, **options)
    for row, length in enumerate(lengths.tolist()):
        alone = decoder.generate(z[row : row + 1], 9, seeds=seeds[row : row + 1], **options)
        if length < 7:
            assert torch.equal(alone[0][0], tokens[row, :length])
            assert torch.equal(alone[2][0], log_probs[row, :length])


def test_stream_gives_what_generate_gives():
    decoder, z, seeds = make_decoder(), latents(6), torch.arange(6)
    for options in ({}, {"strategy": "sample", "seeds": seeds, "prefix": torch.full((6, 1), 5), "no_repeat_ngram": 2}):
        steps = torch.stack([*decoder.stream(z, 8, **options)], 1)
        assert torch.equal(steps, decoder.generate(z, 8, **options)[0])


def test_word_dropout_replaces_its_share_of_words():
    """Never <s>, never padding; in training only, and as the seed says."""
    decoder, tokens, z = make_decoder(word_dropout=0.5), sentences(), latents(4)
    plain, read, embedded = decoder(tokens, z), [], decoder._embedded
    decoder.train()._embedded = lambda words: read.append(words) or embedded(words)
    losses = [decoder(tokens, z, LENGTHS, seed=torch.tensor([value])) for value in (*range(40), 0)]
    words = torch.stack(read)
    inside = torch.arange(6) < (LENGTHS - 1)[:, None]
    changed = words != tokens[:, :-1].where(inside, 0)
    assert (words[changed] == UNK).all()
    assert not changed[:, :, 0].any()
    assert not changed[:, ~inside].any()
    assert changed[:, :, 1:][:, inside[:, 1:]].double().mean().item() == pytest.approx(0.5, abs=0.06)
    assert torch.equal(losses[0], losses[-1])
    assert not torch.allclose(losses[0], losses[1])
    assert torch.equal(decoder.eval()(tokens, z), plain)


def test_learned_positions_begin_as_the_others_and_end():
    plain, learned = make_decoder(), make_decoder(positions="learned", max_positions=6)
    torch.testing.assert_close(learned.position_vectors(6), plain.position_vectors(6), rtol=1e-6, atol=1e-6)
    learned(sentences(torch.tensor([7])), latents(1))
    with pytest.raises(ValueError, match="max_positions = 6 learned positions, got 7"):
        learned(sentences(torch.tensor([8])), latents(1))
    with pytest.raises(ValueError, match="max_positions"):
        learned.generate(latents(1), 7)


@pytest.mark.parametrize("settings", [{}, {"tie_weights": True}, {"variational_dropout": True, "positions": "learned"}])
def test_every_parameter_learns_with_everything_dropped(settings):
    shares = {"dropout": 0.2, "layer_dropout": 0.2, "embedding_dropout": 0.2, "word_dropout": 0.2}
    decoder = make_decoder(**shares, **settings).float().train()
    encoder = make_encoder(**{k: v for k, v in shares.items() if k != "word_dropout"}).float().train()
    tokens = sentences(torch.tensor([7] * 64))
    vector = nn.Linear(8, 3)(encoder(tokens))
    decoder(tokens, vector).mean().backward()
    for network in (decoder, encoder):
        for name, parameter in network.named_parameters():
            assert parameter.grad.abs().sum() > 0, name


def test_compiles_into_one_graph():
    decoder, encoder, tokens = make_decoder(word_dropout=0.3).train(), make_encoder().train(), sentences()

    def loss(tokens, lengths, seed):
        return decoder(tokens, encoder(tokens, lengths)[:, :3], lengths, seed=seed)

    seed = torch.tensor([4])
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens, LENGTHS, seed), loss(tokens, LENGTHS, seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_dropout_drops_its_share_and_keeps_the_mean(probability, dtype):
    torch.manual_seed(0)
    x = torch.full((333, 301), 2.0, dtype=dtype, requires_grad=True)
    y = dropout(x, probability)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    dropped = y == 0
    assert dropped.double().mean().item() == pytest.approx(probability, abs=0.005)
    assert dropped.double().mean(0).max() - dropped.double().mean(0).min() < 0.2
    if probability < 1:
        torch.testing.assert_close(y[~dropped], torch.full_like(y[~dropped], 2 / (1 - probability)), rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient * 2, y)
    assert dropout(x, probability, training=False) is x
    if probability == 0.5:
        assert not torch.equal(dropout(x, 0.5) == 0, dropped)
        torch.manual_seed(0)
        assert torch.equal(dropout(x, 0.5) == 0, dropped)
        pairs = (dropped[:, 1:] & dropped[:, :-1]).double().mean()
        assert pairs.item() == pytest.approx(0.25, abs=0.005)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "num_heads: expected a divisor of hidden_size 8"),
        ({"positions": "none"}, "positions: expected 'sinusoidal' or 'learned'"),
        ({"feedforward_size": 0}, "feedforward_size: expected at least 1"),
        ({"embedding_dropout": 1.5}, "embedding_dropout: expected a probability"),
        ({"num_layers": 0}, "num_layers"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_decoder(**settings)


def test_a_transformer_is_not_exported_as_an_lstm():
    with pytest.raises(ValueError, match="plain LSTM layers"):
        export_decoder(make_decoder())


def test_products_of_rows_are_what_they_say():
    x, layer = torch.randn(5, 7), nn.Linear(7, 9)
    torch.testing.assert_close(linear_rows(x, layer.weight, layer.bias), layer(x))
