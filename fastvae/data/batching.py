"""Padded batches of sentences of like length, shuffled by epoch and split over the processes of a run.

Batches are planned globally: the sequence of global batches depends on the seed and the epoch, not on the
number of processes, and each process takes an equal share of every one. So N processes see exactly the data
of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset, Sampler

from fastvae.data.corpus import StreamingTextCorpus, process_rank, read_sentences, worker_rank
from fastvae.data.vocabulary import Vocabulary


class TextBatch(NamedTuple):
    """Sentences of one batch.

    Attributes:
        tokens: int64 (batch, time): rows from `<s>` to `</s>`, then padding.
        lengths: int64 (batch,): tokens of each row, `<s>` and `</s>` counted.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TextBatch:
        """Copy both tensors to a device."""
        return TextBatch(
            self.tokens.to(device, non_blocking=non_blocking),
            self.lengths.to(device, non_blocking=non_blocking),
        )


def collate(sentences: Sequence[torch.Tensor]) -> TextBatch:
    """Pad 1-D int64 sentences to the longest among them: the `collate_fn` of a DataLoader.

    Raises:
        ValueError: there is no sentence.
    """
    if not sentences:
        raise ValueError("sentences must hold at least one sentence, got none")
    lengths = torch.tensor([len(sentence) for sentence in sentences])
    return TextBatch(pad_sequence(list(sentences), batch_first=True, padding_value=Vocabulary.pad_index), lengths)


class TokenBatchSampler(Sampler[list[int]]):
    """Batches of sentences of like length: the `batch_sampler` of a DataLoader over a `TextCorpus`.

    Give either `batch_size` or `max_tokens`. With `batch_size`, sentences are shuffled, sorted by length
    within pools of `pool_batches` batches, cut, and the batches are shuffled. With `max_tokens` the pool is
    the whole corpus (which sentences of a length meet is still random), so that every epoch has the same
    number of batches.

    Args:
        lengths: tokens of each sentence (`corpus.lengths`).
        batch_size: sentences of a global batch; world_size must divide it.
        max_tokens: the most tokens of a global batch, padding counted: sentences times the longest of them.
        shuffle: a new order each epoch; otherwise sorted by length, longest first.
        drop_last: leave out, anew at random each epoch, the few sentences that would make an uneven batch
            (fewer than batch_size, or than multiple_of with max_tokens). By default the same as shuffle:
            training batches are all even, evaluation sees each sentence once.
        multiple_of: with max_tokens, the sentences of a global batch are a multiple of this; world_size must
            divide it.
        pool_batches: see above; larger means less padding, smaller means batches mixed more in length.
        seed: of the shuffling, at least 0.
        rank, world_size: this process among the processes, by default those of torch.distributed.

    Raises:
        ValueError: an argument makes no sense, or makes no batch possible.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        shuffle: bool = True,
        drop_last: bool | None = None,
        multiple_of: int = 8,
        pool_batches: int = 50,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.lengths: NDArray[np.int64] = np.asarray(lengths, dtype=np.int64)
        if self.lengths.ndim != 1 or self.lengths.size == 0:
            raise ValueError(f"lengths must be a non-empty 1-D array, got shape {self.lengths.shape}")
        self.rank, self.world_size = process_rank(rank, world_size)
        self.shuffle = shuffle
        self.seed = _checked_seed(seed)
        self.epoch = 0
        self._cut = BatchCutter(batch_size, max_tokens, shuffle if drop_last is None else drop_last, multiple_of)
        self._cut.check(self.world_size, int(self.lengths.max()), len(self.lengths))
        if pool_batches < 1:
            raise ValueError(f"pool_batches must be at least 1, got {pool_batches}")
        whole = batch_size is None or not shuffle
        self._pool = len(self.lengths) if whole else pool_batches * (batch_size or 1)
        self._planned: tuple[tuple[int, int], list[NDArray[np.int64]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle: the same seed and epoch always give the same batches."""
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Give all there is to resume from: seed and epoch."""
        return {"seed": self.seed, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.seed = _checked_seed(state["seed"])
        self.set_epoch(state["epoch"])

    def global_batches(self) -> list[NDArray[np.int64]]:
        """Give the sentence indices of each batch of this epoch, over all processes."""
        key = (self.seed, self.epoch)
        if self._planned is None or self._planned[0] != key:
            self._planned = (key, self._plan())
        return self._planned[1]

    def __len__(self) -> int:
        return len(self.global_batches())

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.global_batches():
            # Sentences of a batch are sorted by length: striding gives every process the same mixture.
            yield batch[self.rank :: self.world_size].tolist()

    @property
    def sampler(self) -> TokenBatchSampler:
        """This sampler: Lightning looks for `set_epoch` on `batch_sampler.sampler`."""
        return self

    def _plan(self) -> list[NDArray[np.int64]]:
        if not self.shuffle:
            order = self._cut.keep(np.arange(len(self.lengths)))
            return self._cut(order, self.lengths)
        random = np.random.default_rng([self.seed, self.epoch])
        order = self._cut.keep(random.permutation(len(self.lengths)))
        batches = [
            batch
            for start in range(0, len(order), self._pool)
            for batch in self._cut(order[start : start + self._pool], self.lengths)
        ]
        return [batches[i] for i in random.permutation(len(batches))]


class StreamingBatches(IterableDataset[TextBatch]):
    """Shuffled batches of like length from a file of any size, for a `DataLoader(..., batch_size=None)`.

    The file is read in pools of `pool_sentences`, and each pool is shuffled, bucketed and cut as by
    `TokenBatchSampler`. Pools are dealt out to the workers of the DataLoader; each process takes an equal
    share of every batch. Order reaches no farther than a pool: shuffle a sorted file beforehand.

    Where fewer sentences than processes are left at the end of the file and drop_last is off, the last ranks
    have a batch less.

    Args:
        corpus: the file, vocabulary, rank and world size.
        batch_size, max_tokens, shuffle, drop_last, multiple_of, seed: as in `TokenBatchSampler`; drop_last
            applies to each pool.
        pool_sentences: sentences in memory at a time, in each worker; batch_size must divide it.

    Raises:
        ValueError: an argument makes no sense or, while iterating, the file has too few sentences for one
            batch or one too long for max_tokens.
    """

    def __init__(
        self,
        corpus: StreamingTextCorpus,
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        shuffle: bool = True,
        drop_last: bool | None = None,
        multiple_of: int = 8,
        pool_sentences: int | None = None,
        seed: int = 0,
    ) -> None:
        self.corpus = corpus
        self.shuffle = shuffle
        self.seed = _checked_seed(seed)
        self._cut = BatchCutter(batch_size, max_tokens, shuffle if drop_last is None else drop_last, multiple_of)
        self._cut.check(corpus.world_size)
        self.pool_sentences = pool_sentences or 100 * (batch_size or 100)
        if batch_size is not None and self.pool_sentences % batch_size:
            raise ValueError(f"pool_sentences must be a multiple of batch_size={batch_size}, got {self.pool_sentences}")
        # In shared memory, so that set_epoch also reaches workers that live on between epochs.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle: the same seed and epoch always give the same batches."""
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[TextBatch]:
        worker, workers = worker_rank()
        sentences = read_sentences(self.corpus.path)
        pool = 0
        while texts := list(islice(sentences, self.pool_sentences)):
            if pool % workers == worker:
                yield from self._batches(texts, pool)
            pool += 1

    def _batches(self, texts: list[str], pool: int) -> Iterator[TextBatch]:
        rank, world_size = self.corpus.rank, self.corpus.world_size
        encoded = [self.corpus.encode(text) for text in texts]
        lengths = np.array([len(sentence) for sentence in encoded])
        order = np.arange(len(texts))
        random = np.random.default_rng([self.seed, int(self._epoch), pool])
        if self.shuffle:
            order = random.permutation(order)
        order = self._cut.keep(order)
        if not len(order):
            if pool == 0:
                raise ValueError(f"{self.corpus.path}: {len(texts)} sentences make no batch of {self._cut.multiple_of}")
            return
        self._cut.check(world_size, int(lengths.max()))
        batches = self._cut(order, lengths)
        for i in random.permutation(len(batches)) if self.shuffle else range(len(batches)):
            share = batches[i][rank::world_size]
            if len(share):
                yield collate([torch.tensor(encoded[j]) for j in share])


class BatchCutter:
    """The one rule by which a pool of sentences becomes batches; the arguments are `TokenBatchSampler`'s."""

    def __init__(self, batch_size: int | None, max_tokens: int | None, drop_last: bool, multiple_of: int) -> None:
        if (batch_size is None) == (max_tokens is None):
            raise ValueError(f"give batch_size or max_tokens, got {batch_size=}, {max_tokens=}")
        for name, value in (
            ("batch_size", batch_size),
            ("max_tokens", max_tokens),
            ("multiple_of", multiple_of),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.drop_last = drop_last
        self.multiple_of = batch_size or multiple_of

    def check(self, world_size: int, longest: int = 0, sentences: int | None = None) -> None:
        """Raise ValueError where some batch could not be made or not be shared out evenly."""
        name = "batch_size" if self.batch_size else "multiple_of"
        if self.multiple_of % world_size:
            raise ValueError(f"{name}={self.multiple_of} must be a multiple of world_size={world_size}")
        if self.max_tokens is not None and longest * self.multiple_of > self.max_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens} cannot hold multiple_of={self.multiple_of} sentences of the "
                f"longest length, {longest}: give {longest * self.multiple_of} or more, or a max_length"
            )
        if not self.drop_last and world_size > 1 and self.multiple_of < 2 * world_size:
            raise ValueError(
                f"{name}={self.multiple_of} must be at least twice world_size={world_size} when nothing is "
                "dropped, so that no process is left without a sentence of the last batch"
            )
        least = self.multiple_of if self.drop_last else world_size
        if sentences is not None and sentences < least:
            raise ValueError(f"{sentences} sentences make no batch, at least {least} are needed: lower {name}")

    def keep(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """Leave out what would make an uneven batch."""
        return order[: len(order) - len(order) % self.multiple_of] if self.drop_last else order

    def __call__(self, order: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Sort a pool by length, longest first (the first sentence of a batch gives its width), and cut."""
        order = order[np.argsort(-lengths[order], kind="stable")]
        starts = [0]
        while starts[-1] < len(order):
            starts.append(starts[-1] + self._size(int(lengths[order[starts[-1]]])))
        starts[-1] = len(order)
        if len(starts) > 2:
            # Even out the last two: no batch is tiny. The last one holds the shorter sentences, so the first
            # of the two only loses some and the last never outgrows what the first was: the token budget
            # still holds.
            both = starts[-1] - starts[-3]
            unit = self.multiple_of if self.max_tokens and both % self.multiple_of == 0 else 1
            if starts[-1] - starts[-2] < (starts[-2] - starts[-3]) / 2:
                starts[-2] = starts[-3] + -(-both // (2 * unit)) * unit
        return [order[start:end] for start, end in pairwise(starts)]

    def _size(self, width: int) -> int:
        if self.batch_size is not None or self.max_tokens is None:
            return self.multiple_of
        return self.max_tokens // width // self.multiple_of * self.multiple_of


def _checked_seed(seed: int) -> int:
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    return seed
