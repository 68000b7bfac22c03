import itertools
import math
import random
import re
from collections import Counter

import pytest

from fastvae.data.assistant import grammar_rules
from fastvae.data.grammar import Grammar

ANIMALS = {
    "sentence": """
        3 the {who: animal} {verb}
        1 {maybe} the {who: animal/wild} and {whom: animal} {verb} {maybe}
    """,
    "animal": ["cat", "dog", "guinea pig"],
    "animal/wild": """
        2 wolf
        1 bear
    """,
    "verb": """
        1 sleeps
        1 eats the {what: animal}
    """,
    "maybe": """
        1 {}
        3 today
    """,
}


def expand(rules, name):
    """Every derivation of a rule without recursion or tags as (words, probability)."""
    body = rules[name]
    if isinstance(body, str):
        lines = [line.strip().partition(" ") for line in body.splitlines() if line.strip()]
        choices = [(float(weight), re.findall(r"\{[^}]*\}|[^\s{}]+", text)) for weight, _, text in lines]
    else:
        choices = [(1 / (rank + 2.7), text.split()) for rank, text in enumerate(body)]
    total = sum(weight for weight, _ in choices)
    for weight, items in choices:
        parts = []
        for item in items:
            if not item.startswith("{"):
                parts.append([((item,), 1.0)])
            elif reference := item[1:-1].rpartition(":")[2].strip():
                parts.append(list(expand(rules, reference)))
        for combination in itertools.product(*parts):
            words = tuple(word for some, _ in combination for word in some)
            yield words, weight / total * math.prod(probability for _, probability in combination)


def closure(rules, name, found=None):
    found = {} if found is None else found
    if name not in found:
        found[name] = rules[name]
        if isinstance(rules[name], str):
            for item in re.findall(r"\{([^}]*)\}", rules[name]):
                if reference := item.rpartition(":")[2].strip():
                    closure(rules, reference, found)
    return found


def check_against_enumeration(rules, start):
    grammar = Grammar(rules, start)
    probabilities = Counter()
    for words, probability in expand(rules, start):
        probabilities[" ".join(words)] += probability
    for text, probability in probabilities.items():
        assert grammar.log_prob(text) == pytest.approx(math.log(probability), abs=1e-12)
    assert sum(math.exp(grammar.log_prob(text)) for text in probabilities) == pytest.approx(1, abs=1e-12)
    assert grammar.words() == sorted({word for text in probabilities for word in text.split()})
    length = sum(len(text.split()) * probability for text, probability in probabilities.items())
    assert grammar.expected_length() == pytest.approx(length, rel=1e-12)
    entropy = -sum(probability * math.log(probability) for probability in probabilities.values())
    return grammar, entropy


def test_probabilities_match_enumeration():
    grammar, entropy = check_against_enumeration(ANIMALS, "sentence")
    assert grammar.find_ambiguity() is None
    assert grammar.entropy() == pytest.approx(entropy, rel=1e-12)


@pytest.mark.parametrize("start", ["date", "clock", "duration", "house_number", "dishes", "title", "items"])
def test_phrases_of_the_assistant_match_enumeration(start):
    grammar, entropy = check_against_enumeration(closure(grammar_rules(), start), start)
    assert grammar.find_ambiguity() is None
    assert grammar.entropy() == pytest.approx(entropy, rel=1e-12)


def test_an_ambiguous_sentence_sums_its_derivations():
    rules = {
        "sentence": """
            1 {noun} {tail}
            1 fish {tail}
            2 cat
        """,
        "noun": ["fish", "dog"],
        "tail": """
            3 {}
            1 swims
        """,
    }
    grammar, entropy = check_against_enumeration(rules, "sentence")
    first = (1 / 2.7) / (1 / 2.7 + 1 / 3.7)
    assert grammar.log_prob("fish swims") == pytest.approx(math.log(0.25 * first * 0.25 + 0.25 * 0.25))
    assert grammar.find_ambiguity() == "fish"
    assert grammar.entropy() > entropy  # derivations are more uncertain than sentences


@pytest.mark.parametrize(
    ("rules", "beginning"),
    [
        ({"s": "1 a {x} {x}", "x": "1 {}\n1 b"}, "a b"),
        ({"s": "1 a\n1 a"}, "a"),
        ({"s": "1 {x}\n1 {y}", "x": "1 one {z}", "y": "1 one {z} two", "z": "1 {}\n1 two {z}"}, "one two"),
        ({"s": "1 go {x}", "x": "1 {}\n1 {y}", "y": "1 {}\n1 home"}, "go"),
        ({"s": "3 {n}\n1 {n} by {s}\n1 {n} by {n} at noon", "n": "1 a\n1 a by a"}, "a by a"),
    ],
)
def test_ambiguity_is_found(rules, beginning):
    assert Grammar(rules, "s").find_ambiguity().startswith(beginning)


def test_undecidable_ambiguity_is_not_taken_for_a_proof():
    grammar = Grammar({"s": "2 x\n1 a {s} b\n1 c {s} d"}, "s")
    with pytest.raises(RuntimeError, match="not decided"):
        grammar.find_ambiguity(max_states=100)


def test_recursion_has_the_entropy_of_a_geometric_distribution():
    grammar = Grammar({"list": "3 item\n1 item and {list}"}, "list")
    assert grammar.log_prob("item and item and item") == pytest.approx(math.log(0.75 / 16))
    assert grammar.entropy() == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / 0.75)
    assert grammar.expected_length() == pytest.approx(1 + 2 / 3)
    nested = Grammar({"s": "3 x\n1 ( {s} )"}, "s")
    assert nested.log_prob("( ( x ) )") == pytest.approx(math.log(0.75 / 16))
    assert nested.log_prob("( ( x )") == -math.inf


@pytest.mark.parametrize("text", ["", "the", "the cat", "cat sleeps", "the cat sleeps sleeps", "the bear sleeps", "?"])
def test_strings_outside_the_language_have_no_probability(text):
    assert Grammar(ANIMALS, "sentence").log_prob(text) == -math.inf


def test_long_improbable_sentences_do_not_underflow():
    grammar = Grammar({"s": "999 a\n1 a {s}"}, "s")
    assert grammar.log_prob("a " * 500) == pytest.approx(499 * math.log(0.001) + math.log(0.999))


def test_samples_follow_the_probabilities():
    grammar = Grammar(ANIMALS, "sentence")
    generator = random.Random(0)
    n = 4_000
    samples = [grammar.sample(generator) for _ in range(n)]
    for text, count in Counter(sample.text for sample in samples).most_common(10):
        probability = math.exp(grammar.log_prob(text))
        assert abs(count - n * probability) < 5 * math.sqrt(n * probability)
    for sample in samples[:200]:
        assert sample.log_prob == pytest.approx(grammar.log_prob(sample.text), abs=1e-12)
        assert sample.alternative == ("whom" in sample.slots)
        assert (sample.slots["who"] in ("wolf", "bear")) == (sample.alternative == 1)


def test_tags_reach_down():
    rules = {
        "s": "1 {say/loud}\n1 {say/soft}",
        "say": "1 i {verb} {it: thing}",
        "verb/loud": "1 shout",
        "verb/soft": "1 whisper",
        "thing": ["yes", "no"],
        "thing/loud": ["YES"],
    }
    grammar = Grammar(rules, "s")
    assert grammar.log_prob("i shout YES") == pytest.approx(math.log(0.5))
    assert grammar.log_prob("i whisper yes") == pytest.approx(math.log(0.5 * 3.7 / 6.4))
    assert grammar.log_prob("i shout yes") == -math.inf


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"s": "1 {missing}"}, "{missing} is not defined"),
        ({"s": "1 {x/loud}", "x": "1 {y}", "y/soft": "1 a"}, "{y} is not defined for the tag 'loud'"),
        ({"s": "1 a", "orphan": "1 b"}, "no sentence uses: orphan"),
        ({"s": "1 a\n1 {s} a"}, "s is left-recursive"),
        ({"s": "1 a\n1 {x} {s} a", "x": "1 {}\n1 b"}, "s is left-recursive"),
        ({"s": "1 a\n1 a {s} {s}"}, "too likely"),
        ({"s": "1 a {s}"}, "too likely"),
        ({"s": "one a"}, "expected a positive weight"),
        ({"s": "0 a"}, "expected a positive weight"),
        ({"s": "nan a"}, "expected a positive weight"),
        ({"s": "3"}, "expected a positive weight"),
        ({"s": "1 take {me home"}, "expected a positive weight"),
        ({"s": " \n "}, "s: has no alternative"),
        ({"s": ["a", "b", "a"]}, "s: listed more than once: a"),
    ],
)
def test_a_bad_grammar_is_refused(rules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Grammar(rules, "s")
