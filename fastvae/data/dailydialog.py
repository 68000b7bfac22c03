"""DailyDialog: everyday dialogues, each utterance with its dialogue act and its emotion."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

from fastvae.data.corpus import read_sentences
from fastvae.data.dialogues import Exchange

ACTS = ("inform", "question", "directive", "commissive")
EMOTIONS = ("none", "anger", "disgust", "fear", "happiness", "sadness", "surprise")
_FILES = {"train": "train", "valid": "validation", "test": "test"}
_MISALIGNED = ("train", 7852)  # of the published files: 12 utterances, 11 labels


class LabelledUtterance(NamedTuple):
    """An utterance of a dialogue.

    Attributes:
        text: its words, lower-cased, separated by white space.
        act: index into `ACTS`. emotion: index into `EMOTIONS`.
    """

    text: str
    act: int
    emotion: int


def dailydialog_dialogues(folder: Path, split: str) -> list[list[LabelledUtterance]]:
    """Read one split: its dialogues, each a list of utterances.

    The published training file has one dialogue, line 7852, with fewer labels than utterances: it is left out, with a
    warning.

    Args:
        folder: holds train.txt, train_act.txt, train_emotion.txt, and the same of validation and test.
        split: "train", "valid" or "test".

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: utterances, acts and emotions do not go together; the message names file and line.

    Source: Li et al., DailyDialog: A Manually Labelled Multi-turn Dialogue Dataset (2017).
    """
    path = folder / f"{_FILES[split]}.txt"
    lines = [list(read_sentences(path.with_stem(path.stem + suffix))) for suffix in ("", "_act", "_emotion")]
    if len({len(part) for part in lines}) > 1:
        counts = ", ".join(str(len(part)) for part in lines)
        raise ValueError(f"{path}: expected as many lines of text, acts and emotions, got {counts}")
    dialogues = []
    for number, (text, acts, emotions) in enumerate(zip(*lines, strict=True), start=1):
        utterances = [part.strip().lower() for part in text.removesuffix("__eou__").split("__eou__")]
        if len(utterances) == len(acts.split()) == len(emotions.split()):
            labels = zip(
                _labels(path, number, acts, 1, ACTS), _labels(path, number, emotions, 0, EMOTIONS), strict=True
            )
            both = zip(utterances, labels, strict=True)
            dialogues.append([LabelledUtterance(utterance, *label) for utterance, label in both if utterance])
            continue
        counts = f"{len(utterances)} utterances, {len(acts.split())} acts and {len(emotions.split())} emotions"
        if (split, number) != _MISALIGNED:
            raise ValueError(f"{path}, line {number}: {counts} do not go together")
        warnings.warn(f"{path}, line {number} is left out: {counts}", stacklevel=2)
    return dialogues


def dailydialog_exchanges(folder: Path, split: str) -> list[Exchange]:
    """Give each utterance but a dialogue's first as an answer to those before it, labelled with its act.

    Arguments and errors as `dailydialog_dialogues`.
    """
    return [
        Exchange(tuple(said.text for said in dialogue[:turn]), dialogue[turn].text, ACTS[dialogue[turn].act])
        for dialogue in dailydialog_dialogues(folder, split)
        for turn in range(1, len(dialogue))
    ]


def _labels(path: Path, number: int, text: str, first: int, names: tuple[str, ...]) -> list[int]:
    labels = [int(label) - first if label.isdecimal() else -1 for label in text.split()]
    if not all(0 <= label < len(names) for label in labels):
        raise ValueError(f"{path}, line {number}: expected labels {first} to {first + len(names) - 1}, got {text!r}")
    return labels
