"""Weighted context-free grammars that sample sentences and know their exact probability and entropy.

A grammar is a dictionary from a name to its alternatives, written in one of two ways:

- a list of phrases, most frequent first, gets Zipf's law: phrase r (from 0) has weight 1 / (r + 2.7);
- a text has one alternative a line, a weight and then words and names in braces:

      "request": '''
          3  take me to {destination: place}
          1  wake up
      '''

`{place}` is replaced by an alternative of `place`; `{destination: place}` also records what it became as the
slot `destination`; `{}` stands for nothing. `{request/polite}` gives `request` and all that it contains the
tag `polite`: there a name stands for `name/polite` where that is defined, and for `name` where it is not.

Limit: no left recursion (a phrase that begins with a phrase of its own kind); it is refused.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

Symbol = str | int  # a word, or the number of a nonterminal
Symbols = tuple[Symbol, ...]


class Sample(NamedTuple):
    """A sentence with the way it was derived.

    Attributes:
        text: its words.
        log_prob: log-probability of the derivation in nats; of the sentence too, if the grammar is
            unambiguous.
        slots: what each slot became; the last time, where it is filled more than once.
        alternative: which alternative of the start symbol was chosen, from 0.
    """

    text: str
    log_prob: float
    slots: dict[str, str]
    alternative: int


class Grammar:
    """A weighted context-free grammar in the notation above.

    Args:
        rules: alternatives of each name.
        start: the name that stands for a sentence.

    Raises:
        ValueError: a rule cannot be read, a name is not defined or not used, or the grammar is
            left-recursive or derives endless sentences with positive probability.
    """

    def __init__(self, rules: Mapping[str, str | Sequence[str]], start: str) -> None:
        self._names: list[str] = []
        self._probabilities: list[list[float]] = []
        self._alternatives: list[list[Symbols]] = []
        self._slots: list[list[tuple[str | None, ...]]] = []
        self._compile(rules, start)
        self._cumulative = [list(accumulate(p)) for p in self._probabilities]
        # Probability and number of derivations of nothing, and what each symbol leaves to come after a first
        # word.
        self._empty: dict[int, float] = {}
        self._empty_derivations: dict[int, int] = {}
        self._after: dict[int, dict[str, list[tuple[float, Symbols]]]] = {}
        for symbol in self._dependencies_first():
            self._first_words(symbol)
        self._check_ends()

    def words(self) -> list[str]:
        """Give every word that a sentence can contain, sorted."""
        return sorted({x for rules in self._alternatives for rule in rules for x in rule if isinstance(x, str)})

    def sample(self, generator: random.Random) -> Sample:
        """Draw a sentence."""
        words: list[str] = []
        slots: dict[str, str] = {}
        log_prob, alternative = self._expand(0, generator, words, slots)
        return Sample(" ".join(words), log_prob, slots, alternative)

    def log_prob(self, text: str) -> float:
        """Give the exact log-probability of a sentence in nats; -inf outside the language.

        Left to right, over the stacks of symbols still to come in the leftmost derivations of the words so
        far. The sum over all derivations is the inside probability.
        """
        return self._inside({(0,): 1.0}, text)

    def alternative_of(self, text: str) -> int | None:
        """Give which alternative of the start symbol a sentence is of, the likeliest; None outside the language."""
        pairs = zip(self._probabilities[0], self._alternatives[0], strict=True)
        log_probs = [self._inside({rule: probability}, text) for probability, rule in pairs]
        best = max(log_probs)
        return None if best == -math.inf else log_probs.index(best)

    def _inside(self, stacks: dict[Symbols, float], text: str) -> float:
        log_scale = 0.0
        for word in text.split():
            following: dict[Symbols, float] = {}
            for stack, probability in stacks.items():
                for step, rest in self._read(stack, word):
                    following[rest] = following.get(rest, 0.0) + probability * step
            total = sum(following.values())
            if total == 0.0:
                return -math.inf
            log_scale += math.log(total)
            stacks = {stack: probability / total for stack, probability in following.items()}
        end = sum(probability * self._empty_probability(stack) for stack, probability in stacks.items())
        return log_scale + math.log(end) if end > 0.0 else -math.inf

    def entropy(self) -> float:
        """Give the exact entropy of a derivation in nats; of a sentence too, if the grammar is unambiguous.

        H(A) = sum over its alternatives r of p(r) (-log p(r) + sum of H(B) over the symbols B of r): a linear
        system.
        """
        cost = [-sum(p * math.log(p) for p in probabilities) for probabilities in self._probabilities]
        return self._expectation(cost)

    def expected_length(self) -> float:
        """Give the exact mean number of words of a sentence."""
        cost = [
            sum(p * sum(isinstance(x, str) for x in rule) for p, rule in zip(probabilities, rules, strict=True))
            for probabilities, rules in zip(self._probabilities, self._alternatives, strict=True)
        ]
        return self._expectation(cost)

    def find_ambiguity(self, max_states: int = 1_000_000) -> str | None:
        """Give the beginning of a sentence that has two derivations, or None: a proof that no sentence has.

        Follows all pairs of leftmost derivations that read the same words: an ambiguous sentence is a pair
        that parts and later meets again, or ends together. Where phrases recurse at their end only, the
        stacks and so the pairs are finitely many.

        Raises:
            RuntimeError: more than max_states pairs, so nothing is proved.
        """
        start: Symbols = (0,)
        seen: dict[tuple[Symbols, Symbols], tuple[tuple[Symbols, Symbols], str] | None] = {(start, start): None}
        queue = deque(seen)
        reads: dict[Symbols, dict[str, list[Symbols]]] = {}

        def words_to(pair: tuple[Symbols, Symbols], *last: str) -> str:
            words = list(last)
            while (step := seen[pair]) is not None:
                pair = step[0]
                words.insert(0, step[1])
            return " ".join(words)

        def read_all(stack: Symbols) -> dict[str, list[Symbols]]:
            if stack not in reads:
                reads[stack] = self._read_all(stack)
            return reads[stack]

        while queue:
            pair = queue.popleft()
            one, other = pair
            ends = self._count_empty(one) * self._count_empty(other)
            if ends > (one == other):
                return words_to(pair)
            left, right = read_all(one), read_all(other)
            for word in left.keys() & right.keys():
                if one == other and len(set(left[word])) < len(left[word]):
                    return words_to(pair, word)
                for p in left[word]:
                    for q in right[word]:
                        if p == q and one != other:
                            return words_to(pair, word)
                        # A pair that has parted is never (p, p), so pairs with equal halves have not parted.
                        following = (p, q) if repr(p) <= repr(q) else (q, p)
                        if following not in seen:
                            seen[following] = (pair, word)
                            queue.append(following)
                            if len(seen) > max_states:
                                raise RuntimeError(f"more than {max_states} pairs of derivations: not decided")
        return None

    def _compile(self, rules: Mapping[str, str | Sequence[str]], start: str) -> None:
        parsed = {name: _parse(name, body) for name, body in rules.items()}
        tagged = _tag_dependent(parsed)
        numbers: dict[tuple[str, str], int] = {}
        used: set[str] = set()

        def number(reference: str, tag: str) -> int:
            name, _, new_tag = reference.partition("/")
            key = (name, new_tag or tag) if name in tagged else (name, "")
            if key not in numbers:
                definition = f"{name}/{key[1]}" if f"{name}/{key[1]}" in parsed else name
                if definition not in parsed:
                    raise ValueError(f"the name {{{reference}}} is not defined for the tag {key[1]!r}")
                used.add(definition)
                numbers[key] = len(numbers)
                self._names.append("/".join(filter(None, key)))
                pending.append((definition, key[1]))
            return numbers[key]

        pending: deque[tuple[str, str]] = deque()
        number(start, "")
        while pending:
            definition, tag = pending.popleft()
            weights = [weight for weight, _ in parsed[definition]]
            self._probabilities.append([weight / math.fsum(weights) for weight in weights])
            self._alternatives.append(
                [
                    tuple(number(item.name, tag) if item.name else item.word for item in rule)
                    for _, rule in parsed[definition]
                ]
            )
            self._slots.append([tuple(item.slot or None for item in rule) for _, rule in parsed[definition]])
        if unused := parsed.keys() - used:
            raise ValueError(f"rules that no sentence uses: {', '.join(sorted(unused))}")

    def _expand(
        self, symbol: int, generator: random.Random, words: list[str], slots: dict[str, str]
    ) -> tuple[float, int]:
        cumulative = self._cumulative[symbol]
        chosen = min(bisect(cumulative, generator.random()), len(cumulative) - 1)
        log_prob = math.log(self._probabilities[symbol][chosen])
        for item, slot in zip(self._alternatives[symbol][chosen], self._slots[symbol][chosen], strict=True):
            begin = len(words)
            if isinstance(item, str):
                words.append(item)
            else:
                log_prob += self._expand(item, generator, words, slots)[0]
            if slot is not None:
                slots[slot] = " ".join(words[begin:])
        return log_prob, chosen

    def _dependencies_first(self) -> list[int]:
        """Order the symbols so that what a phrase can begin with comes before it."""
        can_be_empty: set[int] = set()
        size = -1
        while size < len(can_be_empty):
            size = len(can_be_empty)
            for symbol, rules in enumerate(self._alternatives):
                if any(all(item in can_be_empty for item in rule) for rule in rules):
                    can_be_empty.add(symbol)
        order: list[int] = []
        state: dict[int, bool] = {}  # False while below, True when done

        def visit(symbol: int) -> None:
            if symbol in state:
                if not state[symbol]:
                    raise ValueError(f"{self._names[symbol]} is left-recursive: it can begin with itself")
                return
            state[symbol] = False
            for rule in self._alternatives[symbol]:
                for item in rule:
                    if isinstance(item, str):
                        break
                    visit(item)
                    if item not in can_be_empty:
                        break
            state[symbol] = True
            order.append(symbol)

        for symbol in range(len(self._names)):
            visit(symbol)
        return order

    def _first_words(self, symbol: int) -> None:
        after: dict[str, list[tuple[float, Symbols]]] = {}
        empty, count = 0.0, 0
        for probability, rule in zip(self._probabilities[symbol], self._alternatives[symbol], strict=True):
            reach, ways = probability, 1
            for i, item in enumerate(rule):
                rest = rule[i + 1 :]
                if isinstance(item, str):
                    after.setdefault(item, []).extend([(reach, rest)] * ways)
                    reach, ways = 0.0, 0
                    break
                for word, steps in self._after[item].items():
                    after.setdefault(word, []).extend([(reach * p, r + rest) for p, r in steps])
                reach *= self._empty[item]
                ways *= self._empty_derivations[item]
                if not ways:
                    break
            empty += reach
            count += ways
        self._after[symbol], self._empty[symbol], self._empty_derivations[symbol] = after, empty, count

    def _read(self, stack: Symbols, word: str) -> Iterator[tuple[float, Symbols]]:
        reach = 1.0
        for i, item in enumerate(stack):
            if isinstance(item, str):
                if item == word:
                    yield reach, stack[i + 1 :]
                return
            for probability, rest in self._after[item].get(word, ()):
                yield reach * probability, rest + stack[i + 1 :]
            reach *= self._empty[item]
            if reach == 0.0:
                return

    def _read_all(self, stack: Symbols) -> dict[str, list[Symbols]]:
        """Give the stacks after each next word, once for each derivation."""
        following: dict[str, list[Symbols]] = {}
        ways = 1
        for i, item in enumerate(stack):
            rest = stack[i + 1 :]
            if isinstance(item, str):
                following.setdefault(item, []).extend([rest] * ways)
                break
            for word, steps in self._after[item].items():
                following.setdefault(word, []).extend([r + rest for _, r in steps] * ways)
            ways *= self._empty_derivations[item]
            if not ways:
                break
        return following

    def _empty_probability(self, stack: Symbols) -> float:
        return math.prod(0.0 if isinstance(item, str) else self._empty[item] for item in stack)

    def _count_empty(self, stack: Symbols) -> int:
        return math.prod(0 if isinstance(item, str) else self._empty_derivations[item] for item in stack)

    def _mean_children(self) -> np.ndarray:
        """Give the matrix of the mean number of symbols B (column) in an alternative of A (row)."""
        children = np.zeros((len(self._names), len(self._names)))
        for symbol, (probabilities, rules) in enumerate(zip(self._probabilities, self._alternatives, strict=True)):
            for probability, rule in zip(probabilities, rules, strict=True):
                for item in rule:
                    if isinstance(item, int):
                        children[symbol, item] += probability
        return children

    def _expectation(self, cost: list[float]) -> float:
        """Give the mean of a cost summed over all symbols of a derivation."""
        solution = np.linalg.solve(np.eye(len(cost)) - self._mean_children(), np.array(cost))
        return float(solution[0])

    def _check_ends(self) -> None:
        radius = float(np.abs(np.linalg.eigvals(self._mean_children())).max())
        if radius >= 1.0:
            raise ValueError(f"recursive rules are too likely: each symbol gives rise to {radius:.3g} on average")


class _Item(NamedTuple):
    """A word, or a reference to a name with or without a slot."""

    word: str = ""
    name: str = ""
    slot: str = ""


_Rules = list[tuple[float, list[_Item]]]


def _parse(name: str, body: str | Sequence[str]) -> _Rules:
    if not isinstance(body, str):
        rules: _Rules = [
            (1.0 / (rank + 2.7), [_Item(word=word) for word in phrase.split()]) for rank, phrase in enumerate(body)
        ]
        phrases = [tuple(phrase.split()) for phrase in body]
        if repeated := {" ".join(phrase) for phrase in phrases if phrases.count(phrase) > 1}:
            raise ValueError(f"{name}: listed more than once: {', '.join(sorted(repeated))}")
    else:
        rules = [_parse_line(name, line.strip()) for line in body.splitlines() if line.strip()]
    if not rules:
        raise ValueError(f"{name}: has no alternative")
    return rules


def _parse_line(name: str, line: str) -> tuple[float, list[_Item]]:
    weight, _, template = line.partition(" ")
    items = []
    for token in re.findall(r"\{[^{}]*\}|[^\s{}]+|[{}]", template):
        if len(token) == 1 or not token.startswith("{"):
            items.append(_Item(word=token))
            continue
        slot, _, reference = token[1:-1].rpartition(":")
        if reference.strip():
            items.append(_Item(name=reference.strip(), slot=slot.strip()))
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf or any(item.word in ("{", "}") for item in items) or not template.strip():
        raise ValueError(f"{name}: expected a positive weight, then words and {{names}}, got {line!r}")
    return value, items


def _tag_dependent(parsed: Mapping[str, _Rules]) -> set[str]:
    """Give the names whose meaning depends on the tag."""

    def references(rules: _Rules) -> Iterable[str]:
        return (item.name for _, rule in rules for item in rule if item.name and "/" not in item.name)

    dependent = {name.partition("/")[0] for name in parsed if "/" in name}
    size = -1
    while size < len(dependent):
        size = len(dependent)
        dependent |= {
            name.partition("/")[0]
            for name, rules in parsed.items()
            if any(reference in dependent for reference in references(rules))
        }
    return dependent
