import math

import pytest
import torch
import torch.nn.functional as F

from fastvae.nn import GRUDecoder, LSTMDecoder, LSTMEncoder
from fastvae.nn.soft_generation import _STEP
from fastvae.ops.random import gumbel

V, LENGTH = 9, 7
SPECIAL = {"pad_index": 0, "unk_index": 1, "bos_index": 2, "eos_index": 3}
SEED = torch.tensor([5])


def make(decoder=LSTMDecoder, dtype=torch.float64, **settings):
    torch.manual_seed(1)
    return decoder(V, 4, 5, 3, **SPECIAL, **settings).to(dtype)


def latents(batch=6):
    return torch.randn(batch, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def drawn_by_hand(decoder, z):
    """Sentences whose words are drawn by the Gumbel-max trick, the logits taken from the whole beginning each time."""
    tokens = torch.full((len(z), 1), SPECIAL["bos_index"])
    for t in range(LENGTH):
        beginning = torch.cat([tokens, tokens[:, :1]], 1)  # `logits` reads all but the last
        logits = decoder.logits(beginning, z, torch.full((len(z),), t + 2))[:, -1]
        logits[:, [SPECIAL["pad_index"], SPECIAL["bos_index"]]] = -math.inf
        noise = gumbel(SEED + t * _STEP, torch.arange(len(z) * V).view(len(z), V))
        tokens = torch.cat([tokens, (logits + noise).argmax(1, keepdim=True)], 1)
    return tokens[:, 1:]


@pytest.mark.parametrize("decoder", [LSTMDecoder, GRUDecoder])
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2}])
def test_at_temperature_0_it_is_hard_decoding_with_the_same_noise(decoder, settings):
    decoder, z = make(decoder, **settings), latents()
    soft = decoder.generate_soft(z, LENGTH, 1e-6, seed=SEED)
    hard = drawn_by_hand(decoder.eval(), z)
    ended = 0
    for row, words, length in zip(soft.words, hard.tolist(), soft.lengths.tolist(), strict=True):
        expected = words.index(SPECIAL["eos_index"]) + 1 if SPECIAL["eos_index"] in words else LENGTH
        ended += expected < LENGTH
        assert length == expected
        torch.testing.assert_close(row[:length], F.one_hot(torch.tensor(words), V)[:length].double())
    assert ended, "the case must have sentences that end"


def test_words_are_distributions_that_soften_with_the_temperature():
    decoder, z = make(), latents()
    largest = []
    for temperature in (0.1, 1.0, 10.0):
        words = decoder.generate_soft(z, LENGTH, temperature, seed=SEED).words
        torch.testing.assert_close(words.sum(-1), torch.ones(words.shape[:2], dtype=torch.float64))
        assert (words[..., [SPECIAL["pad_index"], SPECIAL["bos_index"]]] == 0).all()
        largest.append(float(words.detach().amax(-1).mean()))
    assert largest == sorted(largest, reverse=True)
    assert largest[0] > 0.9
    assert largest[2] < 0.3


@pytest.mark.parametrize("settings", [{}, {"num_layers": 2}])
def test_gradients_against_finite_differences(settings):
    decoder, z = make(**settings), latents(2).requires_grad_()
    with torch.no_grad():
        decoder.output.bias[SPECIAL["eos_index"]] = -9  # else the lengths would jump
    weigh = torch.rand(2, 4, V, dtype=torch.float64)
    parameters = dict(decoder.named_parameters())

    def loss(z, *values):
        written = torch.func.functional_call(
            _Soft(decoder), {f"decoder.{name}": value for name, value in zip(parameters, values, strict=True)}, (z,)
        )
        return (written * weigh).sum()

    assert torch.autograd.gradcheck(loss, (z, *parameters.values()), fast_mode=True)


class _Soft(torch.nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, z):
        return self.decoder.generate_soft(z, 4, 0.7, seed=SEED).words


def test_no_dropout_and_seeds():
    decoder, z = make(word_dropout=0.9, dropout=0.9), latents()
    first = decoder.train().generate_soft(z, LENGTH, 1.0, seed=SEED).words
    assert torch.equal(first, decoder.eval().generate_soft(z, LENGTH, 1.0, seed=SEED).words)
    drawn = [decoder.generate_soft(z, LENGTH, 1.0, generator=torch.Generator().manual_seed(s)).words for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_it_stops_when_all_have_ended():
    decoder, z = make(), latents()
    with torch.no_grad():
        decoder.output.bias[SPECIAL["eos_index"]] = 99
    soft = decoder.generate_soft(z, LENGTH, 1.0)
    assert soft.words.shape == (6, 1, V)
    assert soft.lengths.tolist() == [1] * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((latents()[:, :2], 3, 1.0), "z: "),
        ((latents(), 0, 1.0), "max_length: "),
        ((latents(), 3, 0.0), "temperature: "),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make().generate_soft(*arguments)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_encoder_reads_embeddings_as_it_reads_words(layers):
    torch.manual_seed(0)
    encoder = LSTMEncoder(V, 4, 5, num_layers=layers, pad_index=0).double()
    tokens, lengths = torch.randint(1, V, (3, 6)), torch.tensor([6, 2, 4])
    inputs = F.one_hot(tokens, V).double() @ encoder.embedding.weight
    torch.testing.assert_close(encoder.forward_embedded(inputs, lengths), encoder(tokens, lengths))
