import itertools
import signal

import pytest
import torch
from torch import nn

from fastvae.nn import LSTMDecoder, generation
from fastvae.ops.generation import Steps

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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sentence_does_not_depend_on_its_batch(strategy):
    """Not even in the last digit."""
    decoder, z, seeds = make_decoder(vocab_size=60).float(), latents(10).float(), torch.arange(10)
    tokens, lengths, log_probs = decoder.generate(z, 7, strategy, beam_size=2, seeds=seeds, return_log_probs=True)
    for row, length in enumerate(lengths.tolist()):
        alone = decoder.generate(
            z[row : row + 1], 7, strategy, beam_size=2, seeds=seeds[row : row + 1], return_log_probs=True
        )
        assert torch.equal(alone[0][0], tokens[row, :length])
        assert torch.equal(alone[2][0], log_probs[row, :length])


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


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_n_best_are_the_best_of_exhaustive_search(length_penalty):
    decoder, max_length, n_best = make_decoder(vocab_size=6, sharpness=4.0, end_bias=-2.0), 3, 5
    z = latents(3)
    tokens, lengths, log_probs = decoder.generate(
        z, max_length, "beam", beam_size=36, n_best=n_best, length_penalty=length_penalty, return_log_probs=True
    )
    assert tokens.shape == log_probs.shape == (3, n_best, max_length)
    for row, latent in enumerate(z):
        found = []
        for size in range(max_length):
            for beginning in itertools.product([UNK, 4, 5], repeat=size):
                sentence = [*beginning, EOS]
                table = next_log_probs(decoder, latent, beginning).detach()
                score = table[torch.arange(size + 1), torch.tensor(sentence)].sum() / (size + 1) ** length_penalty
                found.append((float(score), sentence))
        found.sort(reverse=True)
        for place in range(n_best):
            length = int(lengths[row, place])
            assert tokens[row, place, :length].tolist() == found[place][1]
            score = float(log_probs[row, place].sum() / length**length_penalty)
            assert score == pytest.approx(found[place][0])


def test_places_of_n_best_without_an_ended_sentence_hold_cut_ones_then_none():
    decoder = make_decoder(vocab_size=6)
    with torch.no_grad():
        decoder.output.bias[EOS] = -500.0
    tokens, lengths = decoder.generate(latents(2), 1, "beam", beam_size=7, n_best=7)
    assert lengths.tolist() == [[1, 1, 1, 1, 0, 0, 0]] * 2, "three words and </s> are all there is"
    assert (tokens[:, 0] == EOS).all()
    assert [sorted(row[1:4].flatten().tolist()) for row in tokens] == [[UNK, 4, 5]] * 2
    assert (tokens[:, 4:] == PAD).all()


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_number_of_layers(strategy, layers):
    decoder, z = make_decoder(num_layers=layers), latents(6)
    tokens, lengths, log_probs = decoder.generate(z, 6, strategy, return_log_probs=True)
    sentences = torch.cat([torch.full((6, 1), BOS), tokens], 1)
    torch.testing.assert_close(-log_probs.sum(1), decoder(sentences, z, lengths + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_count_in_float32(dtype):
    decoder, z = make_decoder().to(dtype), latents(6).to(dtype)
    for mine, exact in zip(
        decoder.generate(z, 6, return_log_probs=True),
        decoder.float().generate(z.float(), 6, return_log_probs=True),
        strict=True,
    ):
        assert torch.equal(mine, exact)


def test_modules_without_biases_and_without_latent():
    torch.manual_seed(0)
    modules = nn.Embedding(20, 4), nn.LSTM(4, 7, 2, bias=False, batch_first=True), nn.Linear(7, 20, bias=False)
    decoder = LSTMDecoder.from_modules(*modules, **SPECIAL)
    prefix = torch.tensor([[5, 6], [7, PAD]])
    tokens, lengths, log_probs = decoder.generate(None, 9, "sample", prefix=prefix, return_log_probs=True)
    assert tokens.shape[0] == 2
    sentences = torch.cat([torch.full((2, 1), BOS), tokens], 1)
    torch.testing.assert_close(-log_probs.sum(1), decoder(sentences, None, lengths + 1))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_prefix_comes_first_and_is_scored(strategy):
    decoder, z = make_decoder(), latents(4)
    prefix = torch.tensor([[7, 8, 9], [10, PAD, PAD], [PAD, PAD, PAD], [11, 12, PAD]])
    tokens, lengths, log_probs = decoder.generate(z, 7, strategy, prefix=prefix, return_log_probs=True)
    given = prefix != PAD
    assert torch.equal(tokens[:, :3][given], prefix[given])
    sentences = torch.cat([torch.full((4, 1), BOS), tokens], 1)
    torch.testing.assert_close(-log_probs.sum(1), decoder(sentences, z, lengths + 1))
    assert (lengths >= given.sum(1)).all()


def test_a_seed_belongs_to_its_sentence():
    decoder, z, seeds = make_decoder(sharpness=1.0, end_bias=0.0), latents(8), torch.arange(8)
    tokens, _ = decoder.generate(z, 9, "sample", seeds=seeds)
    again, _ = decoder.generate(z[[5, 2]], 9, "sample", seeds=seeds[[5, 2]])
    assert torch.equal(again, tokens[[5, 2], : again.size(1)])
    other, _ = decoder.generate(z, 9, "sample", seeds=seeds + 1)
    assert not torch.equal(other, tokens)
    same_latent, _ = decoder.generate(z[:1].expand(8, -1), 9, "sample", seeds=seeds)
    assert len({tuple(row) for row in same_latent.tolist()}) > 4


@pytest.mark.parametrize("core", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "sample", "top_p": 0.9, "seeds": torch.arange(9)},
        {"strategy": "sample", "prefix": torch.tensor([[7, 8]] * 9), "no_repeat_ngram": 2, "seeds": torch.arange(9)},
    ],
)
def test_stream_gives_what_generate_gives(options, core, monkeypatch):
    if not core:
        monkeypatch.setattr(generation, "CORE", None)
    decoder, z = make_decoder(end_bias=3.0), latents(9)
    tokens, lengths = decoder.generate(z, 8, **options)
    assert len(set(lengths.tolist())) > 1
    steps = [*decoder.stream(z, 8, **options)]
    assert torch.equal(torch.stack(steps, 1), tokens)


def test_a_long_call_can_be_interrupted(monkeypatch):
    """What a signal raises comes before the last step: the core was not busy to the end."""
    if generation.CORE is None:
        pytest.skip("the C++ core is not built")
    unfinished, advance = [], Steps.advance

    def interrupt(*_):
        raise InterruptedError

    monkeypatch.setattr(Steps, "advance", lambda *arguments: unfinished.append(advance(*arguments)) or unfinished[-1])
    decoder, before = make_decoder(sharpness=1.0, end_bias=-50.0), signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(InterruptedError):
            decoder.generate(latents(2), 3_000_000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all(unfinished)


def test_stream_writes_no_further_than_asked():
    """A step is taken when it is asked for: the first token comes before the second is computed."""
    decoder = make_decoder(sharpness=1.0, end_bias=-50.0)
    steps = decoder.stream(latents(2), 10**9 // 64)
    assert next(steps).shape == (2,)
    assert next(steps).shape == (2,)


def test_stream_complains_at_once():
    with pytest.raises(ValueError, match="strategy: expected 'greedy' or 'sample'"):
        make_decoder().stream(latents(2), 3, "beam")
    with pytest.raises(ValueError, match="max_length"):
        make_decoder().stream(latents(2), 0)


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
        ({"n_best": 2}, "n_best: expected 1 for strategy 'greedy', got 2"),
        ({"strategy": "beam", "n_best": 6}, "n_best: expected 1 to 5"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram"),
        ({"prefix": torch.full((3, 1), 5)}, "prefix: expected shape"),
        ({"prefix": torch.full((2, 4), 5)}, "prefix: expected shape"),
        ({"prefix": torch.full((2, 1), 30)}, "prefix: expected tokens in"),
        ({"prefix": torch.full((2, 1), -1)}, "prefix: expected tokens in"),
        ({"prefix": torch.full((2, 1), EOS)}, "prefix: expected neither"),
        ({"prefix": torch.full((2, 1), BOS)}, "prefix: expected neither"),
        ({"prefix": torch.tensor([[5, 6], [PAD, 6]])}, "prefix: expected padding only behind"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, "seeds: expected shape"),
        ({"seeds": torch.zeros(2, dtype=torch.int64), "generator": torch.Generator()}, "seeds: expected None"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    decoder = make_decoder()
    with pytest.raises(ValueError, match=message):
        decoder.generate(**({"z": latents(2), "max_length": 3} | arguments))


@pytest.mark.parametrize("argument", ["prefix", "seeds"])
def test_integers_are_asked_for(argument):
    with pytest.raises(TypeError, match=f"{argument}: expected an int64 tensor"):
        make_decoder().generate(latents(2), 3, **{argument: torch.ones(2)})


def test_a_decoder_without_special_tokens_says_so():
    with pytest.raises(ValueError, match="eos_index"):
        make_decoder(eos_index=None).generate(latents(2), 3)
