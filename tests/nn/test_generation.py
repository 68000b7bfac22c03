import itertools

import pytest
import torch

from fastvae.nn import LSTMDecoder
from fastvae.nn.generation import truncated

PAD, UNK, BOS, EOS = 0, 1, 2, 3
SPECIAL = {"pad_index": PAD, "unk_index": UNK, "bos_index": BOS, "eos_index": EOS}
STRATEGIES = ("greedy", "sample", "beam")


def make_decoder(vocab_size=30, seed=0, sharpness=4.0, end_bias=1.5, **settings):
    """A random decoder whose distributions differ much from step to step and latent to latent."""
    torch.manual_seed(seed)
    decoder = LSTMDecoder(vocab_size, 5, 6, 3, **(SPECIAL | settings)).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(sharpness)
        decoder.embedding.weight.mul_(10)
        decoder.output.bias[EOS] += end_bias
    return decoder


def latents(batch, seed=1):
    return torch.randn(batch, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def next_log_probs(decoder, z, tokens):
    """log p(next | tokens) of one sentence that begins behind <s>, by the whole-sequence path."""
    sequence = torch.tensor([[BOS, *tokens, EOS]])
    lengths = torch.tensor([sequence.size(1)])
    return decoder.logits(sequence, z.unsqueeze(0), lengths)[0].log_softmax(-1)


def allowed(log_probs):
    masked = log_probs.clone()
    masked[..., [PAD, BOS]] = -torch.inf
    return masked


@pytest.mark.parametrize("latent_set", [0, 1])
def test_greedy_takes_the_likeliest_token_of_the_whole_sequence_model(latent_set):
    decoder, z = make_decoder(seed=latent_set), latents(9)
    tokens, lengths = decoder.generate(z, 8)
    assert len(set(lengths.tolist())) > 1, "the case must hold sentences of several lengths"
    for row, latent, length in zip(tokens, z, lengths.tolist(), strict=True):
        words: list[int] = []
        while len(words) < 8 and EOS not in words:
            words.append(int(allowed(next_log_probs(decoder, latent, words)[len(words)]).argmax()))
        assert row[:length].tolist() == words
        assert (row[length:] == PAD).all()


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_a_sentence_does_not_depend_on_its_batch(strategy):
    # Ten latents pass through the table of gates for the whole vocabulary, one alone does not.
    decoder, z = make_decoder(vocab_size=60), latents(10)
    tokens, lengths = decoder.generate(z, 7, strategy, beam_size=2)
    for row, latent, length in zip(tokens, z, lengths.tolist(), strict=True):
        alone, _ = decoder.generate(latent.unsqueeze(0), 7, strategy, beam_size=2)
        assert alone[0].tolist() == row[:length].tolist()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_log_probs_are_those_of_forward(strategy):
    decoder, z = make_decoder(), latents(12)
    tokens, lengths, log_probs = decoder.generate(z, 8, strategy, temperature=0.7, top_p=0.9, return_log_probs=True)
    assert log_probs.shape == tokens.shape
    sentences = torch.cat([torch.full((12, 1), BOS), tokens], 1)
    torch.testing.assert_close(-log_probs.sum(1), decoder(sentences, z, lengths + 1))
    beyond = torch.arange(tokens.size(1)) >= lengths.unsqueeze(1)
    assert beyond.any()
    assert not log_probs[beyond].any()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_padding_and_start_are_never_written_inside_a_sentence(strategy):
    decoder = make_decoder()
    with torch.no_grad():
        decoder.output.bias[[PAD, BOS]] = 50.0
    tokens, lengths = decoder.generate(latents(20), 6, strategy)
    inside = tokens[torch.arange(tokens.size(1)) < lengths.unsqueeze(1)]
    assert not ((inside == PAD) | (inside == BOS)).any()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("bias", "length"), [(500.0, 1), (-500.0, 5)])
def test_writing_stops_at_the_end_token_or_at_max_length(strategy, bias, length):
    decoder = make_decoder()
    with torch.no_grad():
        decoder.output.bias[EOS] = bias
    tokens, lengths = decoder.generate(latents(4), 5, strategy)
    assert tokens.shape == (4, length)
    assert lengths.tolist() == [length] * 4
    assert (tokens == EOS).any() == (bias > 0)


def test_a_vocabulary_padded_with_its_end_token_can_end():
    decoder = make_decoder(pad_index=EOS)
    with torch.no_grad():
        decoder.output.bias[EOS] = 500.0
    assert decoder.generate(latents(2), 5)[1].tolist() == [1, 1]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_wide_beam_finds_what_exhaustive_search_finds(seed, length_penalty):
    decoder, max_length = make_decoder(vocab_size=6, seed=seed, sharpness=4.0, end_bias=-2.0), 4
    words = [UNK, 4, 5]
    z = latents(3, seed)
    tokens, lengths, log_probs = decoder.generate(
        z, max_length, "beam", beam_size=108, length_penalty=length_penalty, return_log_probs=True
    )
    for row, latent, length, scores in zip(tokens, z, lengths.tolist(), log_probs, strict=True):
        best, best_score = None, -torch.inf
        for size in range(max_length):
            for beginning in itertools.product(words, repeat=size):
                sentence = [*beginning, EOS]
                table = next_log_probs(decoder, latent, beginning)
                score = table[torch.arange(size + 1), torch.tensor(sentence)].sum()
                score = score / (size + 1) ** length_penalty
                if score > best_score:
                    best, best_score = sentence, score
        assert row[:length].tolist() == best
        torch.testing.assert_close(scores.sum() / length**length_penalty, best_score)


def test_length_penalty_favours_longer_sentences():
    decoder, z = make_decoder(), latents(30)
    short, long = (decoder.generate(z, 10, "beam", length_penalty=penalty)[1].double().mean() for penalty in (0.0, 2.0))
    assert long > short


def test_beam_of_one_is_greedy():
    decoder, z = make_decoder(), latents(20)
    for beam, greedy in zip(decoder.generate(z, 8, "beam", beam_size=1), decoder.generate(z, 8), strict=True):
        assert torch.equal(beam, greedy)


def test_wider_beams_find_likelier_sentences_on_average():
    decoder, z = make_decoder(end_bias=0.0), latents(40)
    means = []
    for size in (1, 4, 16):
        _, _, log_probs = decoder.generate(z, 8, "beam", beam_size=size, return_log_probs=True)
        means.append(log_probs.sum(1).mean())
    assert means[0] < means[1] < means[2]


def test_sampling_follows_its_generator():
    decoder, z = make_decoder(sharpness=1.0, end_bias=0.0), latents(20)
    draws = [decoder.generate(z, 8, "sample", generator=torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_frequencies_are_the_tempered_probabilities(temperature):
    decoder, z = make_decoder(vocab_size=7, sharpness=2.0, end_bias=0.0), latents(1)
    count = 20_000
    tokens, _ = decoder.generate(
        z.expand(count, -1), 1, "sample", temperature=temperature, generator=torch.Generator().manual_seed(0)
    )
    frequency = tokens[:, 0].bincount(minlength=7) / count
    expected = (allowed(next_log_probs(decoder, z[0], [])[0]) / temperature).softmax(-1)
    torch.testing.assert_close(frequency.double(), expected, rtol=0, atol=0.015)


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.6), (4, 0.8)])
def test_truncated_sampling_stays_inside_its_set(top_k, top_p):
    decoder, z = make_decoder(sharpness=1.0, end_bias=0.0), latents(60)
    tokens, lengths = decoder.generate(z, 5, "sample", temperature=3.0, top_k=top_k, top_p=top_p)
    outside_plain_argmax = 0
    for row, latent, length in zip(tokens, z, lengths.tolist(), strict=True):
        probs = (allowed(next_log_probs(decoder, latent, row[:length].tolist())) / 3.0).softmax(-1)
        for position, word in enumerate(row[:length].tolist()):
            rank = int((probs[position] > probs[position, word]).sum())
            assert not top_k or rank < top_k
            ranked = probs[position].sort(descending=True).values
            mass = ranked[:top_k].sum() if top_k else 1.0
            assert ranked[:rank].sum() / mass < top_p
            outside_plain_argmax += rank > 0
    assert outside_plain_argmax > 20


def test_truncation_keeps_the_exact_set():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    for top_k, top_p, kept in [
        (0, 1.0, [0, 1, 2, 3]),
        (2, 1.0, [1, 3]),
        (9, 1.0, [0, 1, 2, 3]),
        (0, 0.3, [1]),
        (0, 0.69, [1, 3]),
        (0, 0.71, [1, 2, 3]),
        (2, 0.5, [1]),  # 0.4 / 0.7 holds half of what top_k left
        (0, 1e-9, [1]),
    ]:
        assert truncated(probs, top_k, top_p)[0].nonzero().flatten().tolist() == kept, (top_k, top_p)


def test_top_k_keeps_k_of_equal_tokens():
    assert (truncated(torch.full((1, 8), 0.125), 3, 1.0) > 0).sum() == 3


def test_generation_ignores_dropout_and_leaves_the_module_alone():
    decoder, z = make_decoder(dropout=0.9, word_dropout=0.9), latents(10).requires_grad_()
    decoder.train()
    tokens, _, log_probs = decoder.generate(z, 6, return_log_probs=True)
    assert decoder.training
    assert not log_probs.requires_grad
    assert torch.equal(tokens, decoder.eval().generate(z, 6)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "nucleus"}, "strategy: expected one of 'greedy', 'sample', 'beam'"),
        ({"max_length": 0}, "max_length"),
        ({"strategy": "sample", "temperature": 0.0}, "temperature"),
        ({"strategy": "sample", "top_k": -1}, "top_k"),
        ({"strategy": "sample", "top_p": 0.0}, "top_p"),
        ({"strategy": "beam", "beam_size": 0}, "beam_size"),
        ({"strategy": "beam", "length_penalty": -1.0}, "length_penalty"),
        ({"z": torch.zeros(2, 4)}, "z: expected"),
        ({"z": torch.zeros(0, 3)}, "z: expected"),
        ({"z": None}, "z: expected"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    decoder = make_decoder()
    with pytest.raises(ValueError, match=message):
        decoder.generate(**({"z": latents(2), "max_length": 3} | arguments))


def test_a_decoder_without_special_tokens_says_so():
    with pytest.raises(ValueError, match="eos_index"):
        make_decoder(eos_index=None).generate(latents(2), 3)
