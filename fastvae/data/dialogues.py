"""Exchanges of a dialogue: what was said, and the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from fastvae.data.batching import TextBatch, collate
from fastvae.data.corpus import SPLIT_NAMES, TextCorpus, corpus_folder
from fastvae.data.vocabulary import Vocabulary


class Exchange(NamedTuple):
    """An answer and what it answers.

    Attributes:
        context: the utterances before it, the earliest first, at least one.
        response: the answer.
        label: what kind it is of: the intent, or the answer's dialogue act.
    """

    context: tuple[str, ...]
    response: str
    label: str


class ExchangeBatch(NamedTuple):
    """Exchanges of one batch.

    Attributes:
        tokens: answers, int64 `(batch, time)`: rows from `<s>` to `</s>`, then padding.
        lengths: tokens of each answer, int64 `(batch,)`.
        context, context_lengths: likewise; the utterances follow each other, each from `<s>` to `</s>`.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    context: torch.Tensor
    context_lengths: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ExchangeBatch:
        """Copy all tensors to a device."""
        return ExchangeBatch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


def load_exchanges(name: str, split: str = "train") -> list[Exchange]:
    """Give the exchanges of one split of a corpus of dialogues.

    Args:
        name: "dailydialog" or "smd", in the folder that the environment variable FASTVAE_DATA names.
        split: "train", "valid" or "test".

    Raises:
        ValueError: there is no such corpus or split.
        FileNotFoundError: a file is missing, or FASTVAE_DATA is not set.
    """
    from fastvae.data.dailydialog import dailydialog_exchanges
    from fastvae.data.smd import smd_exchanges  # which give what this file defines

    corpora: dict[str, Callable[[Path, str], list[Exchange]]] = {
        "dailydialog": dailydialog_exchanges,
        "smd": smd_exchanges,
    }
    if name not in corpora:
        raise ValueError(f"expected a corpus of dialogues, {' or '.join(corpora)}, got {name!r}")
    if split not in SPLIT_NAMES:
        raise ValueError(f"split must be one of {', '.join(SPLIT_NAMES)}, got {split!r}")
    return corpora[name](corpus_folder(name), split)


def encode_context(vocabulary: Vocabulary, utterances: Sequence[str], most_words: int = 0) -> torch.Tensor:
    """Turn the utterances before an answer into one row of tokens, int64 `(time,)`.

    Args:
        vocabulary: gives the indices.
        utterances: the earliest first; at least one.
        most_words: the last that are kept; 0 keeps all.
    """
    tokens = [index for utterance in utterances for index in vocabulary.encode(utterance)]
    return torch.tensor(tokens[-most_words:] if most_words else tokens)


class ExchangeCorpus(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Exchanges in memory, as (answer, context), each int64 `(time,)`.

    Args:
        exchanges: at least one.
        vocabulary: gives the indices; words it lacks become `<unk>`.
        max_length: longer answers are cut to this many tokens, `<s>` and `</s>` counted; None cuts nothing.
        context_words: of what was said before, the last tokens that are kept; 0 keeps all.

    Attributes:
        lengths: int64 array (exchanges,): tokens of each answer.

    Raises:
        ValueError: there is no exchange, or max_length is below 3.
    """

    def __init__(
        self,
        exchanges: Sequence[Exchange],
        vocabulary: Vocabulary,
        max_length: int | None = None,
        context_words: int = 0,
    ) -> None:
        self._answers = TextCorpus([exchange.response for exchange in exchanges], vocabulary, max_length)
        self._contexts = [encode_context(vocabulary, exchange.context, context_words) for exchange in exchanges]
        self.lengths = self._answers.lengths

    def __len__(self) -> int:
        return len(self._answers)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._answers[index], self._contexts[index]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return (self[index] for index in range(len(self)))


def collate_exchanges(exchanges: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> ExchangeBatch:
    """Pad answers and contexts, each to the longest among them: the `collate_fn` of a DataLoader.

    Raises:
        ValueError: there is no exchange.
    """
    answers: TextBatch = collate([answer for answer, _ in exchanges])
    contexts: TextBatch = collate([context for _, context in exchanges])
    return ExchangeBatch(*answers, *contexts)
