"""The Stanford multi-domain in-car dialogues: drivers ask about the way, the weather and dates.

The training part is a table of exchanges, train_pairs.csv: context, response, intent. Its contexts are lower-cased and
without punctuation. The others are JSON, kvret_dev_public.json and kvret_test_public.json, a list of dialogues; they
are brought into the same form.

Source: Eric et al., Key-Value Retrieval Networks for Task-Oriented Dialogue (2017).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvae.data.dialogues import Exchange

SMD_INTENTS = ("navigate", "schedule", "weather")
_FILES = {"valid": "kvret_dev_public.json", "test": "kvret_test_public.json"}
_WORD = "[^\\W_]+(?:['\u2019:.-][^\\W_]+)*"


def smd_exchanges(folder: Path, split: str) -> list[Exchange]:
    """Read one split: what was said before, and what the assistant then said; exchanges without a word are left out.

    Args:
        folder: holds the files.
        split: "train", "valid" or "test".

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is not of the form; the message names it and the place.
    """
    path = folder / _FILES.get(split, "train_pairs.csv")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    read = _table if split == "train" else _dialogues
    found = [
        Exchange(tuple(filter(None, map(smd_words, context))), smd_words(response, punctuation=True), intent)
        for context, response, intent in read(path)
    ]
    return [exchange for exchange in found if exchange.context and exchange.response]


def both_sides(exchanges: Sequence[Exchange]) -> list[str]:
    """Give what was answered last, and the answer, of each exchange in turn."""
    return [said for exchange in exchanges for said in (exchange.context[-1], exchange.response)]


def smd_words(text: str, punctuation: bool = False) -> str:
    """Bring what was said into the form of the corpus: lower-cased words, and punctuation in the answers alone."""
    return " ".join(re.findall(_WORD + r"|[.,;:!?]" if punctuation else _WORD, text.lower()))


def _table(path: Path) -> list[tuple[list[str], str, str]]:
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if len(row) != 3 or row[2] not in SMD_INTENTS:
                raise ValueError(
                    f"{path}, row {number}: expected context, response, and {', '.join(SMD_INTENTS)}, got {row}"
                )
            rows.append((row[0].split("<eou>"), row[1], row[2]))
    return rows


def _dialogues(path: Path) -> list[tuple[list[str], str, str]]:
    try:
        dialogues: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        found = []
        for dialogue in dialogues:
            said: list[str] = []
            for turn in dialogue["dialogue"]:
                utterance = turn["data"]["utterance"]
                if turn["turn"] == "assistant":
                    found.append((list(said), utterance, dialogue["scenario"]["task"]["intent"]))
                said.append(utterance)
    except (ValueError, KeyError, TypeError) as error:  # of which JSONDecodeError is one
        raise ValueError(f"{path}: expected a list of dialogues with turns and an intent: {error!r}") from error
    return found
