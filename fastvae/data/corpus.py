"""Plain-text corpora, one sentence a line: held compactly in memory, or streamed from a file of any size.

Blank lines are skipped, words are what white space separates, and text must be UTF-8.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from fastvae.data.assistant import SPLITS as ASSISTANT_SPLITS
from fastvae.data.assistant import assistant_sentences
from fastvae.data.vocabulary import Vocabulary

SPLIT_NAMES = ("train", "valid", "test")


def _folder(folder: Path, split: str) -> list[str]:
    return list(read_sentences(folder / f"{split}.txt"))


def _dailydialog(folder: Path, split: str) -> list[str]:
    from fastvae.data.dailydialog import dailydialog_dialogues

    return [utterance.text for dialogue in dailydialog_dialogues(folder, split) for utterance in dialogue]


def _smd(folder: Path, split: str) -> list[str]:
    from fastvae.data.smd import both_sides, smd_exchanges

    return both_sides(smd_exchanges(folder, split))


def _sst2(folder: Path, split: str) -> list[str]:
    from fastvae.data.sst2 import read_reviews

    return [text for _, text in read_reviews(folder, split)]


# Corpora by name: each reads a split from the folder of its name in the one that FASTVAE_DATA names.
CORPORA: dict[str, Callable[[Path, str], list[str]]] = {
    "ptb": _folder,
    "dailydialog": _dailydialog,
    "smd": _smd,
    "sst2": _sst2,
}


def read_sentences(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the sentences of a UTF-8 text file one by one, without the white space around them.

    Raises:
        FileNotFoundError: there is no such file.
        UnicodeError: a line is not UTF-8; the message has the path and the line number.
        ValueError: the file has no sentence (raised at its end).
    """
    path = _existing_file(path)
    empty = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark some editors write
            try:
                sentence = line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise UnicodeError(
                    f"{path}, line {number}: byte {byte:#04x} at position {error.start} is not UTF-8 text"
                ) from None
            if "\0" in sentence:
                raise UnicodeError(f"{path}, line {number}: NUL character; expected UTF-8 text, not UTF-16 or binary")
            if sentence:
                empty = False
                yield sentence
    if empty:
        raise ValueError(f"{path}: no sentences, the file is empty or blank")


def load_text(name_or_path: str | os.PathLike[str], split: str = "train") -> list[str]:
    """Give the sentences of one split of a corpus.

    Args:
        name_or_path: `"assistant"`, the embedded corpus; one of `CORPORA`, such as `"ptb"`, the Penn Treebank as the
            files `ptb/{train,valid,test}.txt`, in the folder that the environment variable FASTVAE_DATA names;
            a folder with train.txt, valid.txt and test.txt; or one text file. A table or folder of tables of
            sentences with attributes, as `load_labeled`, gives its sentences. A name wins over a path spelt the same:
            write `./ptb` for the path.
        split: `"train"`, `"valid"` or `"test"`. Of each 20 sentences of one text file the 19th is for
            validation and the 20th for testing. `"all"` gives the whole of one text file.

    Raises:
        FileNotFoundError: a file is missing, or FASTVAE_DATA is not set.
        UnicodeError: a line is not UTF-8.
        ValueError: the split is unknown or has no sentence.
    """
    if split not in (*SPLIT_NAMES, "all"):
        raise ValueError(f"split must be one of {', '.join(SPLIT_NAMES)}, all; got {split!r}")
    if name_or_path == "assistant":
        if split not in ASSISTANT_SPLITS:
            raise ValueError(f"split {split!r} is for a single text file; 'assistant' has {', '.join(SPLIT_NAMES)}")
        return assistant_sentences(split)
    named = str(name_or_path) in CORPORA
    path = corpus_folder(str(name_or_path)) if named else Path(name_or_path)
    if not named and path.exists() and holds_attributes(path):
        from fastvae.data.labeled import load_labeled

        return load_labeled(path, split).sentences
    if named or path.is_dir():
        if split == "all":
            raise ValueError(f"split 'all' is for a single text file; {path} is a folder of {', '.join(SPLIT_NAMES)}")
        return CORPORA[str(name_or_path)](path, split) if named else _folder(path, split)
    if not path.exists():
        names = ", ".join(map(repr, ("assistant", *CORPORA)))
        raise FileNotFoundError(f"{path}: no such file or folder, and not one of the names {names}")
    sentences = list(read_sentences(path))
    if split == "all":
        return sentences
    if split == "train":
        return [sentence for i, sentence in enumerate(sentences) if i % 20 < 18]
    held_out = sentences[18 if split == "valid" else 19 :: 20]
    if not held_out:
        raise ValueError(f"{path}: {len(sentences)} sentences are too few to hold any out for {split!r}, 20 are needed")
    return held_out


def holds_attributes(path: Path) -> bool:
    """Whether a path is that of a table of sentences with attributes, or of a folder of such: of `load_labeled`."""
    return path.suffix == ".tsv" or (path / "train.tsv").is_file()


def corpus_folder(name: str) -> Path:
    """Return the folder of a corpus that is known by name.

    Raises:
        FileNotFoundError: the environment variable FASTVAE_DATA is not set.
    """
    root = os.environ.get("FASTVAE_DATA")
    if not root:
        raise FileNotFoundError(f"{name!r} needs the environment variable FASTVAE_DATA: the folder that holds {name}/")
    return Path(root) / name


class TextCorpus(Dataset[torch.Tensor]):
    """Sentences in memory: all tokens in one int32 array, four bytes a token.

    Args:
        source: the path of a text file, or an iterable of sentences.
        vocabulary: gives the indices; words it lacks become `<unk>`.
        max_length: longer sentences are cut to this many tokens, `<s>` and `</s>` counted, and still end
            with `</s>`. `None` cuts nothing.

    Attributes:
        lengths: int64 array (number of sentences,): tokens of each sentence, `<s>` and `</s>` counted.

    Raises:
        FileNotFoundError, UnicodeError: as `read_sentences`.
        ValueError: there is no sentence, or max_length is below 3.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Iterable[str],
        vocabulary: Vocabulary,
        max_length: int | None = None,
    ) -> None:
        _check_max_length(max_length)
        from_file = isinstance(source, (str, os.PathLike))
        sentences = read_sentences(source) if isinstance(source, (str, os.PathLike)) else iter(source)
        tokens, ends = array("i"), array("q", [0])
        for sentence in sentences:
            if from_file or sentence.strip():
                tokens.extend(_encode(sentence, vocabulary, max_length))
                ends.append(len(tokens))
        if len(ends) == 1:
            raise ValueError("source holds no sentence")
        self.vocabulary = vocabulary
        self._tokens: NDArray[np.int32] = np.frombuffer(tokens, dtype=np.int32)
        self._ends: NDArray[np.int64] = np.frombuffer(ends, dtype=np.int64)
        self.lengths: NDArray[np.int64] = np.diff(self._ends)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Give sentence `index` as a 1-D int64 tensor, from `<s>` to `</s>`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for a corpus of {len(self)} sentences")
        index %= len(self)
        return torch.from_numpy(self._tokens[self._ends[index] : self._ends[index + 1]].astype(np.int64))


class StreamingTextCorpus(IterableDataset[torch.Tensor]):
    """The sentences of a text file in file order, never more than one line in memory.

    Each process of a distributed run gets every world_size-th sentence, and each worker of its DataLoader an
    equal part of those. All ranks get the same number: up to world_size - 1 sentences at the end of the file
    are left out. For shuffled batches, bucketed by length, wrap it in `StreamingBatches`.

    Args:
        path: a UTF-8 text file, one sentence a line.
        vocabulary, max_length: as in `TextCorpus`.
        rank, world_size: this process among the processes; by default those of torch.distributed where it is
            initialised when this is built, else 0 of 1.

    Raises:
        FileNotFoundError: there is no such file. Errors of the text are raised when its line is reached.
        ValueError: max_length or rank makes no sense.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        vocabulary: Vocabulary,
        max_length: int | None = None,
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        _check_max_length(max_length)
        self.path = _existing_file(path)
        self.vocabulary = vocabulary
        self.max_length = max_length
        # Workers of a DataLoader are processes of their own that know nothing of the rank: it is settled
        # here.
        self.rank, self.world_size = process_rank(rank, world_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker, workers = worker_rank()
        mine: str | None = None
        for number, sentence in enumerate(read_sentences(self.path)):
            group, member = divmod(number, self.world_size)
            if member == self.rank:
                mine = sentence
            if member == self.world_size - 1 and group % workers == worker and mine is not None:
                yield torch.tensor(_encode(mine, self.vocabulary, self.max_length))

    def encode(self, sentence: str) -> list[int]:
        """Give the indices of a sentence, cut to max_length."""
        return _encode(sentence, self.vocabulary, self.max_length)


def process_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Give (rank, world_size) as passed, else those of torch.distributed, else (0, 1).

    Raises:
        ValueError: only one of the two is given, or rank is not in [0, world_size).
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank and world_size go together, got rank={rank}, world_size={world_size}")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size), got rank={rank}, world_size={world_size}")
    return rank, world_size


def worker_rank() -> tuple[int, int]:
    """Give (this DataLoader worker, number of workers), (0, 1) outside a worker."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _existing_file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such text file")
    if path.is_dir():
        raise FileNotFoundError(f"{path}: is a folder, expected a text file")
    return path


def _encode(sentence: str, vocabulary: Vocabulary, max_length: int | None) -> list[int]:
    tokens = vocabulary.encode(sentence)
    if max_length is not None and len(tokens) > max_length:
        tokens[max_length - 1 :] = [vocabulary.eos_index]
    return tokens


def _check_max_length(max_length: int | None) -> None:
    if max_length is not None and max_length < 3:
        raise ValueError(f"max_length must leave room for <s>, a word and </s>, so at least 3; got {max_length}")
