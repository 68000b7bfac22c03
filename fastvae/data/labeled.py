"""Sentences with attributes, such as their sentiment: the embedded corpus, SST-2, and tables of one's own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fastvae.data.assistant import INTENTS, SENTIMENTS, assistant_utterances
from fastvae.data.batching import TextBatch, collate
from fastvae.data.corpus import SPLIT_NAMES, TextCorpus, corpus_folder, read_sentences
from fastvae.data.dailydialog import ACTS, EMOTIONS, dailydialog_dialogues
from fastvae.data.smd import SMD_INTENTS, both_sides, smd_exchanges
from fastvae.data.sst2 import SST2_SENTIMENTS, read_reviews
from fastvae.data.vocabulary import Vocabulary

LABELED = ("assistant", "dailydialog", "smd", "sst2")
_UNKNOWN = "?"


class LabeledText(NamedTuple):
    """Sentences and their attributes.

    Attributes:
        sentences: the texts.
        labels: the value of each attribute of each sentence, by its place in `attributes`, -1 where it is unknown;
            int64 (sentences, attributes).
        attributes: names of the values of each attribute.
    """

    sentences: list[str]
    labels: NDArray[np.int64]
    attributes: dict[str, tuple[str, ...]]

    def only(self, names: Sequence[str]) -> LabeledText:
        """Keep some of the attributes, in the order given.

        Raises:
            ValueError: there is no such attribute.
        """
        for name in names:
            if name not in self.attributes:
                raise ValueError(f"attributes must be of {', '.join(self.attributes)}, got {name!r}")
        columns = [list(self.attributes).index(name) for name in names]
        return self._replace(labels=self.labels[:, columns], attributes={name: self.attributes[name] for name in names})

    def up_to(self, words: int) -> LabeledText:
        """Leave out the sentences of more words than this.

        Raises:
            ValueError: no sentence is left.
        """
        kept = [row for row, sentence in enumerate(self.sentences) if len(sentence.split()) <= words]
        if not kept:
            raise ValueError(f"no sentence has at most {words} words")
        return self._replace(sentences=[self.sentences[row] for row in kept], labels=self.labels[kept])


def load_labeled(source: str | os.PathLike[str], split: str = "train") -> LabeledText:
    """Give the sentences of one split with their attributes.

    Args:
        source: "assistant", whose requests have a sentiment and an intent; "dailydialog", an act and an emotion;
            "smd", an intent; "sst2", whose reviews have a sentiment; a table, or a folder with train.tsv, valid.tsv and
            test.tsv, whose first line names the columns, parted by tabs: attributes, of which ? is an unknown value,
            and at the end text. The values of an attribute are those of the table, or of train.tsv, sorted.
        split: "train", "valid" or "test". Of each 20 sentences of a single table the 19th is for validation and the
            20th for testing; "all" gives the whole of it.

    Raises:
        FileNotFoundError: a file is missing, or FASTVAE_DATA is not set.
        ValueError, UnicodeError: an unknown split or value, or a table that is damaged; the message says where.
    """
    if split not in (*SPLIT_NAMES, "all"):
        raise ValueError(f"split must be one of {', '.join(SPLIT_NAMES)}, all; got {split!r}")
    path = Path(source)
    if split == "all" and (source in LABELED or path.is_dir()):
        raise ValueError(f"split 'all' is for a single table; {source} has {', '.join(SPLIT_NAMES)}")
    if source == "assistant":
        utterances = assistant_utterances(split)
        intents = tuple(INTENTS)
        labels = [(SENTIMENTS.index(each.sentiment), intents.index(each.intent)) for each in utterances]
        names = {"sentiment": SENTIMENTS, "intent": intents}
        return LabeledText([each.text for each in utterances], np.array(labels, dtype=np.int64), names)
    if source == "dailydialog":
        dialogues = dailydialog_dialogues(corpus_folder("dailydialog"), split)
        said = [utterance for dialogue in dialogues for utterance in dialogue]
        both = np.array([(utterance.act, utterance.emotion) for utterance in said], dtype=np.int64)
        return LabeledText([utterance.text for utterance in said], both, {"act": ACTS, "emotion": EMOTIONS})
    if source == "smd":
        exchanges = smd_exchanges(corpus_folder("smd"), split)
        intent = [[SMD_INTENTS.index(exchange.label)] for exchange in exchanges for _ in range(2)]
        return LabeledText(both_sides(exchanges), np.array(intent, dtype=np.int64), {"intent": SMD_INTENTS})
    if source == "sst2":
        reviews = read_reviews(corpus_folder("sst2"), split)
        values = np.array([[label] for label, _ in reviews], dtype=np.int64)
        return LabeledText([text for _, text in reviews], values, {"sentiment": SST2_SENTIMENTS})
    if path.is_dir():
        return _table(path / f"{split}.tsv", _values(path / "train.tsv"))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder, and not one of the names {', '.join(LABELED)}")
    whole = _table(path, _values(path))
    place = np.arange(len(whole.sentences)) % 20
    rows = np.flatnonzero({"train": place < 18, "valid": place == 18, "test": place == 19, "all": place >= 0}[split])
    if not len(rows):
        raise ValueError(f"{path}: {len(place)} sentences are too few to hold any out for {split!r}, 20 are needed")
    return whole._replace(sentences=[whole.sentences[row] for row in rows], labels=whole.labels[rows])


def _rows(path: Path) -> list[list[str]]:
    header, *lines = list(read_sentences(path))
    names = header.split("\t")
    if len(names) < 2 or names[-1] != "text" or not lines:
        raise ValueError(f"{path}: expected a line of names parted by tabs, the last 'text', then sentences")
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: a column is named twice in {names}")
    rows = [names]
    for number, line in enumerate(lines, start=2):
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != len(names) or not all(cells):
            raise ValueError(
                f"{path}, row {number}: expected {len(names)} cells, {', '.join(names)}; got {line[:60]!r}"
            )
        rows.append(cells)
    return rows


def _values(path: Path) -> dict[str, tuple[str, ...]]:
    names, *rows = _rows(path)
    columns = list(zip(*rows, strict=True))[:-1]
    values = {name: tuple(sorted(set(column) - {_UNKNOWN})) for name, column in zip(names, columns, strict=False)}
    for name, found in values.items():
        if len(found) < 2:
            raise ValueError(f"{path}: attribute {name!r} needs at least 2 values, got {', '.join(found) or 'none'}")
    return values


def _table(path: Path, attributes: Mapping[str, tuple[str, ...]]) -> LabeledText:
    names, *rows = _rows(path)
    known = dict(attributes)
    if names[:-1] != list(known):
        raise ValueError(f"{path}: expected the attributes {', '.join(known)}, got {', '.join(names[:-1])}")
    labels = np.full((len(rows), len(known)), -1, dtype=np.int64)
    for row, cells in enumerate(rows):
        for column, (name, values) in enumerate(known.items()):
            if cells[column] not in (*values, _UNKNOWN):
                expected = ", ".join(values)
                raise ValueError(f"{path}, row {row + 2}: {name} must be one of {expected}, got {cells[column]!r}")
            if cells[column] != _UNKNOWN:
                labels[row, column] = values.index(cells[column])
    return LabeledText([cells[-1] for cells in rows], labels, known)


class LabeledBatch(NamedTuple):
    """Sentences of one batch with their attributes.

    Attributes:
        tokens, lengths: as in `TextBatch`.
        attributes: int64 (batch, attributes), -1 where unknown.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    attributes: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LabeledBatch:
        """Copy all tensors to a device."""
        return LabeledBatch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


class LabeledCorpus(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Sentences in memory with their attributes: (tokens (time,), attributes (attributes,)), both int64.

    Args:
        text: sentences and attributes.
        vocabulary, max_length: as in `TextCorpus`.

    Attributes:
        lengths: int64 array (number of sentences,): tokens of each sentence, `<s>` and `</s>` counted.
        labels: int64 tensor (number of sentences, attributes).
    """

    def __init__(self, text: LabeledText, vocabulary: Vocabulary, max_length: int | None = None) -> None:
        self._corpus = TextCorpus(text.sentences, vocabulary, max_length)
        self.lengths = self._corpus.lengths
        self.labels = torch.from_numpy(text.labels)

    def __len__(self) -> int:
        return len(self._corpus)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._corpus[index], self.labels[index]


def collate_labeled(sentences: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> LabeledBatch:
    """Pad sentences to the longest among them: the `collate_fn` of a DataLoader.

    Raises:
        ValueError: there is no sentence.
    """
    batch: TextBatch = collate([tokens for tokens, _ in sentences])
    return LabeledBatch(*batch, torch.stack([labels for _, labels in sentences]))
