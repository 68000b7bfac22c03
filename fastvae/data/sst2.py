"""SST-2: sentences of film reviews, each negative or positive.

The files hold one sentence a line behind its label, `0` or `1`: stsa.binary.train (6,920 sentences), .dev (872) and
.test (1,821).

Source: Socher et al., Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank (2013).
"""

from __future__ import annotations

from pathlib import Path

from fastvae.data.corpus import read_sentences

SST2_SENTIMENTS = ("negative", "positive")
_FILES = {"train": "stsa.binary.train", "valid": "stsa.binary.dev", "test": "stsa.binary.test"}


def read_reviews(folder: Path, split: str) -> list[tuple[int, str]]:
    """Give the place of its sentiment in `SST2_SENTIMENTS`, and the text, of each sentence of a split.

    Args:
        folder: holds the files.
        split: "train", "valid" or "test".

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: a line does not begin with a label; the message has its number.
    """
    path = folder / _FILES[split]
    reviews = []
    for number, line in enumerate(read_sentences(path), start=1):
        label, _, text = line.partition(" ")
        if label not in ("0", "1") or not text.strip():
            raise ValueError(f"{path}, sentence {number}: expected 0 or 1, then words, got {line[:40]!r}")
        reviews.append((int(label), text.strip()))
    return reviews
