import math
from collections import Counter

import numpy as np
import pytest

from fastvae.data import AssistantGrammar, Vocabulary, load_text
from fastvae.data.assistant import INTENTS, SENTIMENTS, SPLITS, assistant_utterances


@pytest.fixture(scope="module")
def grammar():
    return AssistantGrammar()


@pytest.fixture(scope="module")
def utterances(grammar):
    return grammar.generate(8_000, seed=123)


def test_no_sentence_is_ambiguous(grammar):
    """With two derivations of one sentence, entropy() would be that of derivations."""
    assert grammar.find_ambiguity() is None


def test_recorded_log_probabilities_are_those_of_the_text(grammar, utterances):
    for utterance in utterances[:1_500]:
        assert utterance.log_prob == pytest.approx(grammar.log_prob(utterance.text), abs=1e-9)


def test_entropy_is_the_mean_negative_log_probability(grammar, utterances):
    nll = -np.array([utterance.log_prob for utterance in utterances])
    standard_error = nll.std(ddof=1) / math.sqrt(len(nll))
    assert standard_error < 0.1
    assert abs(nll.mean() - grammar.entropy()) < 4 * standard_error


def test_length_is_as_expected(grammar, utterances):
    lengths = np.array([len(utterance.text.split()) for utterance in utterances])
    assert abs(lengths.mean() - grammar.expected_length()) < 4 * lengths.std() / math.sqrt(len(lengths))
    assert np.mean((lengths >= 5) & (lengths <= 16)) > 0.85


def test_the_vocabulary_is_large_and_complete(grammar, utterances):
    words = grammar.words()
    assert len(words) >= 1_500
    said = Counter(word for utterance in utterances for word in utterance.text.split())
    assert said.keys() <= set(words)
    assert len(said) > 0.85 * len(words)
    vocabulary = Vocabulary(words)
    assert all(vocabulary.unk_index not in vocabulary.encode(utterance.text) for utterance in utterances)


def test_word_frequencies_fall_like_zipfs_law(utterances):
    said = Counter(word for utterance in utterances for word in utterance.text.split())
    counts = np.array(sorted(said.values(), reverse=True))[:1_000]
    slope = np.polyfit(np.log(np.arange(1, len(counts) + 1)), np.log(counts), 1)[0]
    assert -1.6 < slope < -0.7


def test_the_same_seed_gives_the_same_utterances(grammar, utterances):
    assert AssistantGrammar().generate(300, seed=123) == utterances[:300]
    assert grammar.generate(300, seed=124) != utterances[:300]
    assert grammar.generate(0, seed=1) == []
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        grammar.generate(-1, seed=1)


def test_intents_and_sentiments_have_their_weights(utterances):
    n = len(utterances)
    intents = Counter(utterance.intent for utterance in utterances)
    both = Counter((utterance.intent, utterance.sentiment) for utterance in utterances)
    total = sum(weight for weight, _ in INTENTS.values())
    for intent, (weight, shares) in INTENTS.items():
        p = weight / total
        assert abs(intents[intent] - n * p) < 5 * math.sqrt(n * p)
        for sentiment, share in zip(SENTIMENTS, shares, strict=True):
            q = p * share / sum(shares)
            assert abs(both[intent, sentiment] - n * q) < 5 * math.sqrt(n * q)


def test_slots_are_phrases_of_the_text(utterances):
    for utterance in utterances:
        for phrase in utterance.slots.values():
            assert phrase
            assert f" {phrase} " in f" {utterance.text} "


def test_labels_fit_the_words(utterances):
    marks = {
        "polite": ("thank", "would you kindly", "could you please", "sorry to bother"),
        "neutral": ("hey nova", "if you can ", "by the way", "go ahead and"),
        "impatient": ("right now", "hurry up", "for the last time", "answer me"),
    }
    for sentiment, phrases in marks.items():
        for phrase in phrases:
            matching = [u.sentiment for u in utterances if phrase in f"{u.text} "]
            assert set(matching) == {sentiment}, phrase
    for phrase, intent in (
        ("remind me to", "reminder"),
        ("playlist", "music"),
        ("navigate to", "navigation"),
    ):
        assert {u.intent for u in utterances if phrase in u.text} == {intent}
    slots = {intent: Counter() for intent in INTENTS}
    for utterance in utterances:
        slots[utterance.intent].update(utterance.slots.keys())
    assert all(slots.values())
    assert {"destination", "near", "relation"} <= slots["navigation"].keys()


def test_places_nest(utterances):
    deep = [u for u in utterances if u.slots.get("destination", "").count("the ") >= 3]
    assert deep
    assert all(" " in u.slots["destination"] for u in deep)


def test_nested_places_have_a_probability_at_any_depth(grammar):
    place = "the cafe next to the pharmacy behind the station"
    shallow = grammar.log_prob("take me to the station")
    deep = grammar.log_prob(f"take me to {place}")
    deeper = grammar.log_prob(f"take me to the school near {place}")
    assert -math.inf < deeper < deep < shallow < 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "take me to",
        "take me to the the station",
        "could you please take me to the station right now",
        "behind the station take me",
        "take me to the zeppelin",
    ],
)
def test_what_the_grammar_cannot_say_has_no_probability(grammar, text):
    assert grammar.log_prob(text) == -math.inf


def test_splits_are_fixed_and_drawn_from_different_seeds():
    assert len({seed for _, seed in SPLITS.values()}) == 3
    valid = assistant_utterances("valid")
    assert valid == assistant_utterances("valid")
    assert [utterance.text for utterance in valid] == load_text("assistant", "valid")
    train = set(load_text("assistant", "train"))
    fresh = sum(utterance.text not in train for utterance in valid)
    assert fresh > 0.8 * len(valid)  # what a model is tested on is not what it has seen
    with pytest.raises(ValueError, match="split must be one of train, valid, test, got 'dev'"):
        assistant_utterances("dev")


def test_the_grammar_tells_intent_and_sentiment_of_what_it_says(grammar):
    for utterance in grammar.generate(200, seed=4):
        assert grammar.kind_of(utterance.text) == (utterance.intent, utterance.sentiment)
    assert grammar.kind_of("please") is None
    assert grammar.kind_of("the the") is None
