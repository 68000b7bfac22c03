"""Words and their indices: built from text, saved as plain text beside the model that uses them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from fastvae.files import replace_atomically

SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>")
"""The tokens with the indices 0 to 3."""


class Vocabulary:
    """A fixed list of words; index 0 to 3 are `<pad>`, `<unk>`, `<s>` and `</s>`.

    `<unk>` in a text means the unknown word; the other three special tokens are never read from a text
    (there they count as unknown words), so no text can end or pad a sentence by accident.

    Args:
        words: the ordinary words in index order, each once, without the special tokens.

    Raises:
        ValueError: a word is repeated, empty, special, or contains white space.
    """

    pad_index = 0
    unk_index = 1
    bos_index = 2
    eos_index = 3

    def __init__(self, words: Iterable[str]) -> None:
        if isinstance(words, str):
            raise ValueError("words must be an iterable of words, got one string")
        self._tokens = (*SPECIAL_TOKENS, *words)
        self._index = {"<unk>": self.unk_index}
        for index, word in enumerate(self._tokens[4:], start=4):
            if word.split() != [word]:
                raise ValueError(f"word {index - 4} must be non-empty and free of white space, got {word!r}")
            if word in SPECIAL_TOKENS or word in self._index:
                kind = "a special token" if word in SPECIAL_TOKENS else f"already word {self._index[word] - 4}"
                raise ValueError(f"word {index - 4} is {word!r}, which is {kind}")
            self._index[word] = index

    @classmethod
    def build(
        cls, sentences: Iterable[str | Sequence[str]], max_size: int | None = None, min_count: int = 1
    ) -> Vocabulary:
        """Count the words of a corpus and keep the frequent ones, most frequent first (ties by spelling).

        Args:
            sentences: strings, split at white space, or sequences of words.
            max_size: the largest `len(vocabulary)` allowed, the four special tokens included.
            min_count: words seen fewer times than this are left out.

        Raises:
            ValueError: a limit makes no sense, or no word is left.
        """
        if isinstance(sentences, (str, Path)):
            raise ValueError("sentences must be an iterable of sentences, got one string or path")
        if max_size is not None and max_size <= len(SPECIAL_TOKENS):
            raise ValueError(f"max_size must exceed the {len(SPECIAL_TOKENS)} special tokens, got {max_size}")
        if min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {min_count}")
        counts: Counter[str] = Counter()
        for sentence in sentences:
            counts.update(sentence.split() if isinstance(sentence, str) else sentence)
        for token in SPECIAL_TOKENS:
            counts.pop(token, None)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        limit = None if max_size is None else max_size - len(SPECIAL_TOKENS)
        words = [word for word in ranked[:limit] if counts[word] >= min_count]
        if not words:
            raise ValueError(f"sentences hold no word that occurs at least min_count={min_count} times")
        return cls(words)

    @property
    def words(self) -> tuple[str, ...]:
        """The ordinary words; `Vocabulary(v.words) == v`."""
        return self._tokens[len(SPECIAL_TOKENS) :]

    def __len__(self) -> int:
        return len(self._tokens)

    def __contains__(self, word: object) -> bool:
        return word in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self._tokens == other._tokens

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} tokens)"

    def encode(self, sentence: str | Sequence[str]) -> list[int]:
        """Give the indices of a sentence, `<s>` first and `</s>` last; unknown words become `<unk>`."""
        words = sentence.split() if isinstance(sentence, str) else sentence
        index, unknown = self._index, self.unk_index
        return [self.bos_index, *[index.get(word, unknown) for word in words], self.eos_index]

    def decode(self, ids: Iterable[int] | torch.Tensor) -> str:
        """Give the text of a row of indices up to its first `</s>`, showing `<unk>` and no other special
        token.

        Args:
            ids: a 1-D tensor or iterable of indices in [0, len(vocabulary)).

        Raises:
            ValueError: an index before the first `</s>` is out of range.
        """
        words = []
        for position, index in enumerate(ids.tolist() if isinstance(ids, torch.Tensor) else ids):
            if not 0 <= index < len(self):
                raise ValueError(f"ids[{position}] is {index}, out of range for a vocabulary of {len(self)} tokens")
            if index == self.eos_index:
                break
            if index not in (self.pad_index, self.bos_index):
                words.append(self._tokens[index])
        return " ".join(words)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one token a line, so line number - 1 is the index; the file appears whole or not at all."""
        text = "".join(f"{token}\n" for token in self._tokens)
        replace_atomically(path, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Vocabulary:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a whole, valid vocabulary; the message says why.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such vocabulary file")
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise ValueError(f"{path}, line {line}: not a vocabulary, the text is not UTF-8") from None
        *tokens, rest = text.split("\n")
        if tuple(tokens[:4]) != SPECIAL_TOKENS:
            raise ValueError(f"{path}: not a vocabulary, the first four lines must be {' '.join(SPECIAL_TOKENS)}")
        if rest:
            raise ValueError(f"{path}, line {len(tokens) + 1}: vocabulary cut off, the last line has no end")
        try:
            return cls(tokens[4:])
        except ValueError as error:
            raise ValueError(f"{path}: corrupt vocabulary, {error}") from None
