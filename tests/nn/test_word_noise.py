import pytest
import torch

from fastvae.nn import noisy_words

PAD, UNK, BOS, EOS = 0, 1, 2, 3
V, LENGTHS = 12, torch.tensor([9, 2, 3, 6])


def sentences():
    """Sentences of which each word tells its place."""
    tokens = torch.full((4, 9), 99)  # the padding may hold anything
    for row, length in zip(tokens, LENGTHS.tolist(), strict=True):
        row[:length] = torch.tensor([BOS, *range(4, 4 + length - 2), EOS])
    return tokens


def draws(noise, level, count=400):
    """Noisy sentences by their seeds, each as lists of words without <s> and </s>, which must be where they were."""
    tokens, written = sentences(), []
    for value in range(count):
        noisy, lengths = noisy_words(tokens, LENGTHS, noise, level, vocab_size=V, unk_index=UNK,
                                     special=(PAD, UNK, BOS, EOS), seed=torch.tensor([value]))  # fmt: skip
        rows = [row[:length].tolist() for row, length in zip(noisy, lengths.tolist(), strict=True)]
        assert all(row[0] == BOS and row[-1] == EOS for row in rows)
        written.append([row[1:-1] for row in rows])
    assert torch.equal(tokens, sentences())
    return written


@pytest.mark.parametrize("noise", ["drop", "blank", "substitute", "shuffle"])
def test_no_noise_at_level_zero(noise):
    assert draws(noise, 0.0, 3) == [[list(range(4, 11)), [], [4], [4, 5, 6, 7]]] * 3


def test_dropped_words_leave_the_others_in_order():
    written = draws("drop", 0.3)
    assert all(words == sorted(words) for rows in written for words in rows)
    kept = sum(len(words) for rows in written for words in rows) / (400 * 12)
    assert kept == pytest.approx(0.7, abs=0.02)
    for word in (4, 7, 10):
        share = sum(word in rows[0] for rows in written) / 400
        assert share == pytest.approx(0.7, abs=0.08)
    assert draws("drop", 1.0, 2) == [[[], [], [], []]] * 2


def test_blanks_stand_in_the_place_of_words():
    written = [words for rows in draws("blank", 0.3) for words in rows]
    assert all(word in (UNK, place + 4) for words in written for place, word in enumerate(words))
    blanks = sum(words.count(UNK) for words in written)
    assert blanks / (400 * 12) == pytest.approx(0.3, abs=0.02)
    assert draws("blank", 1.0, 1) == [[[UNK] * 7, [], [UNK], [UNK] * 4]]


def test_substitutes_are_even_over_the_words_that_are_no_marks():
    words = torch.tensor([word for rows in draws("substitute", 1.0) for row in rows for word in row])
    counts = words.bincount(minlength=V)
    assert not counts[[PAD, UNK, BOS, EOS]].any()
    torch.testing.assert_close(counts[4:] / len(words), torch.full((8,), 1 / 8), rtol=0, atol=0.02)
    places = [place for rows in draws("substitute", 0.4) for place, word in enumerate(rows[0]) if word != place + 4]
    changed = torch.tensor(places).bincount(minlength=7) / 400
    torch.testing.assert_close(changed, torch.full((7,), 0.4 * 7 / 8), rtol=0, atol=0.1)


@pytest.mark.parametrize("places", [1, 3])
def test_shuffled_words_stay_near(places):
    written = draws("shuffle", places)
    assert all(sorted(rows[0]) == list(range(4, 11)) for rows in written)
    moves = torch.tensor([[place + 4 - word for place, word in enumerate(rows[0])] for rows in written])
    assert moves.abs().max() == places
    assert (moves > 0).any()
    assert (moves < 0).any()
    assert (moves.abs() > 0).double().mean() > 0.2


def test_noise_follows_its_source():
    for noise, level in {"drop": 0.5, "blank": 0.5, "substitute": 0.5, "shuffle": 2}.items():
        options = {"vocab_size": V, "unk_index": UNK}
        first, again, other = (
            noisy_words(sentences(), LENGTHS, noise, level, **options, generator=torch.Generator().manual_seed(seed))
            for seed in (1, 1, 2)
        )
        assert torch.equal(first[0], again[0])
        assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("noise", "level", "message"),
    [
        ("dorp", 0.1, "noise: expected one of 'drop'"),
        ("drop", 1.1, "level: expected a probability"),
        ("shuffle", -1, "level: expected a whole number of places"),
        ("shuffle", 0.5, "level: expected a whole number of places"),
    ],
)
def test_wrong_arguments_are_named(noise, level, message):
    with pytest.raises(ValueError, match=message):
        noisy_words(sentences(), LENGTHS, noise, level, vocab_size=V, unk_index=UNK)
