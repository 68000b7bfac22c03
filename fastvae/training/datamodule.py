"""The sentences, vectors or images of a run as Lightning batches, at any point of any epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from fastvae.data import (
    Samples,
    Scaling,
    StreamingBatches,
    StreamingTextCorpus,
    TextBatch,
    TextCorpus,
    TokenBatchSampler,
    Vocabulary,
    collate,
    load_text,
    read_sentences,
)
from fastvae.data.arrays import load_arrays
from fastvae.data.corpus import process_rank
from fastvae.training.array_models import resolved_scaling
from fastvae.training.batches import ordered_batches
from fastvae.training.config import ArrayConfig, TextConfig, training_part

RESIDENT_BYTES = 2 << 30  # of rows that are held on a CPU as one tensor


class EpochLoader:
    """One epoch of a loader, of which the first batches may be left out.

    Args:
        loader: gives all batches of the epoch; its length, which a streaming one has not, is this one's too.
        skip: batches left out, those an interrupted run has done already.
    """

    def __init__(self, loader: DataLoader[Any], skip: int = 0) -> None:
        self.loader = loader
        self.skip = skip

    def __iter__(self) -> Iterator[TextBatch]:
        return islice(iter(self.loader), self.skip, None)

    def __len__(self) -> int:
        return len(self.loader)


class RunDataModule(LightningDataModule):
    """Training batches of an epoch, which a subclass gives, from where the run begins.

    Args:
        start_epoch, start_batch: that many batches of that epoch have been done.
    """

    def __init__(self, start_epoch: int = 0, start_batch: int = 0) -> None:
        super().__init__()
        self.start_epoch = start_epoch
        self.start_batch = start_batch

    def train_dataloader(self) -> Iterable[Any]:
        """Return the batches of the current epoch; the trainer asks anew for each epoch."""
        epoch = self.start_epoch
        if self.trainer is not None:
            done: Any = self.trainer.fit_loop.epoch_progress.current
            epoch = max(epoch, done.processed)
        return self.epoch(epoch)

    def epoch(self, epoch: int) -> Iterable[Any]:
        """Return the training batches of an epoch, from 0, less those done before the start."""
        raise NotImplementedError

    def skipped(self, epoch: int) -> int:
        """How many of an epoch's batches have been done before the start."""
        return self.start_batch if epoch == self.start_epoch else 0


class TextDataModule(RunDataModule):
    """Training and validation batches of sentences.

    Args:
        config: settings of the run.
        vocabulary: the words; built from the training text when None.
        start_epoch, start_batch: as in `RunDataModule`.

    Raises:
        ValueError: a text has no sentence, or too few for a batch.
        FileNotFoundError: a text is missing.
    """

    collate: Callable[..., Any] = staticmethod(collate)  # makes a batch of rows; other kinds of rows have their own

    def __init__(
        self,
        config: TextConfig,
        vocabulary: Vocabulary | None = None,
        *,
        start_epoch: int = 0,
        start_batch: int = 0,
    ) -> None:
        super().__init__(start_epoch, start_batch)
        self.config = config
        sentences = training_sentences(config)
        self.vocabulary = vocabulary or Vocabulary.build(
            sentences, max_size=config.vocab_size, min_count=config.min_count
        )
        self._longest = config.max_length + 2 if config.max_length else None  # <s> and </s> count
        self._train: Any = None if config.streaming else TextCorpus(sentences, self.vocabulary, self._longest)
        self.valid: Any = TextCorpus(validation_sentences(config), self.vocabulary)
        self._drawable: list[list[int]] | None = None
        if self._train is not None:  # a wrong batch size is better told now than from inside the trainer
            self._sampler()

    def _sampler(self) -> TokenBatchSampler:
        assert self._train is not None
        return TokenBatchSampler(self._train.lengths, **self._budget(), seed=self.config.seed)

    def _budget(self) -> dict[str, Any]:
        if self.config.max_tokens:
            return {"max_tokens": self.config.max_tokens}
        return {"batch_size": self.config.batch_size}

    def epoch(self, epoch: int) -> EpochLoader:
        """Return the training batches of an epoch, from 0, less those done before the start."""
        skip = self.skipped(epoch)
        settings: dict[str, Any] = {
            "num_workers": self.config.workers,
            # the loader draws a seed for its workers, not from the generator of the training noise
            "generator": torch.Generator().manual_seed(self.config.seed),
        }
        if self._train is None:
            corpus = StreamingTextCorpus(self.config.data, self.vocabulary, self._longest)
            batches = StreamingBatches(corpus, **self._budget(), seed=self.config.seed)
            batches.set_epoch(epoch)
            return EpochLoader(DataLoader(batches, batch_size=None, **settings), skip)
        sampler = self._sampler()
        sampler.set_epoch(epoch)
        return EpochLoader(DataLoader(self._train, batch_sampler=sampler, collate_fn=self.collate, **settings), skip)

    def random_batches(self, seed: int, count: int) -> Iterator[TextBatch]:
        """Give training batches drawn with replacement, beside those of the epochs.

        Args:
            seed: the same seed gives the same batches.
            count: how many.
        """
        assert self._train is not None
        if self._drawable is None:
            self._drawable = list(self._sampler())
        for place in torch.randint(len(self._drawable), (count,), generator=torch.Generator().manual_seed(seed)):
            yield self.collate([self._train[i] for i in self._drawable[place]])

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation batches: every sentence once, over all processes."""
        return ordered_batches(self.valid, self.config.batch_size, self.collate)


def training_sentences(config: TextConfig) -> Iterable[str]:
    """Return the training sentences: all of a single file where a validation text is given."""
    if config.streaming:
        return read_sentences(config.data)
    return load_text(config.data, training_part(config.data, config.valid))


def validation_sentences(config: TextConfig) -> Iterable[str]:
    """Return the validation sentences: those of `valid`, or the validation part of `data`."""
    if config.valid is None:
        return load_text(config.data, "valid")
    return load_text(config.valid, "all" if Path(config.valid).is_file() else "valid")


class ArrayDataModule(RunDataModule):
    """Training and validation batches of vectors or images, (rows, *shape) float32, scaled.

    Rows that fit lie scaled on the device, and a batch is an indexing of them; others are read for each batch.

    Args:
        config: settings of the run.
        scaling: that of the run that is resumed; found from the training rows when None.
        start_epoch, start_batch: as in `RunDataModule`.

    Raises:
        ValueError, OSError: as `load_array`; there are fewer rows than a batch takes, or a scaling that does not fit.
    """

    def __init__(
        self, config: ArrayConfig, scaling: Scaling | None = None, *, start_epoch: int = 0, start_batch: int = 0
    ) -> None:
        super().__init__(start_epoch, start_batch)
        self.config = config
        self.train, self.valid = load_arrays(config.data, ("train", "valid"), image_size=config.image_size)
        if config.batch_size > len(self.train):
            raise ValueError(f"batch_size must be at most the {len(self.train)} training rows, got {config.batch_size}")
        if config.batch_size % config.devices:
            raise ValueError(f"batch_size must be a multiple of devices, got {config.batch_size} and {config.devices}")
        if len(self.valid) < config.devices:
            raise ValueError(f"devices must be at most the {len(self.valid)} validation rows, got {config.devices}")
        self.scaling = scaling or Scaling.fit(resolved_scaling(config, self.train), self.train)
        self._resident: dict[int, torch.Tensor] = {}

    def epoch(self, epoch: int) -> ArrayBatches:
        """Return the training batches of an epoch, from 0, less those done before the start."""
        size, steps = self.config.batch_size, len(self.train) // self.config.batch_size
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train), generator=generator)[: steps * size].view(steps, size)
        rank, processes = process_rank(None, None)
        return self._batches(self.train, list(order[:, rank::processes]), self.skipped(epoch))

    def val_dataloader(self) -> ArrayBatches:
        """Return the validation batches: every row once, over all processes."""
        rank, processes = process_rank(None, None)
        rows = torch.arange(rank, len(self.valid), processes)
        return self._batches(self.valid, list(rows.split(self.config.batch_size)))

    def _batches(self, samples: Samples, order: list[torch.Tensor], skip: int = 0) -> ArrayBatches:
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        if id(samples) not in self._resident and _fits(samples, device):
            self._resident[id(samples)] = self.scaling.apply(samples.read(slice(None))).to(device)
        return ArrayBatches(samples, self.scaling, order, skip, self._resident.get(id(samples)))


class ArrayBatches:
    """Batches of rows in a given order, of which the first may be left out.

    Args:
        samples, scaling: the rows.
        order: rows of each batch, int64.
        skip: batches left out.
        resident: all rows, scaled, on the device; None reads them as they are asked for.
    """

    def __init__(
        self,
        samples: Samples,
        scaling: Scaling,
        order: list[torch.Tensor],
        skip: int = 0,
        resident: torch.Tensor | None = None,
    ) -> None:
        self.samples = samples
        self.scaling = scaling
        self.order = order
        self.skip = skip
        self.resident = resident

    def __iter__(self) -> Iterator[torch.Tensor]:
        for rows in self.order[self.skip :]:
            if self.resident is not None:
                yield self.resident[rows.to(self.resident.device, non_blocking=True)]
            else:
                yield self.scaling.apply(self.samples.read(rows.numpy()))

    def __len__(self) -> int:
        return len(self.order)


def _fits(samples: Samples, device: torch.device) -> bool:
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else RESIDENT_BYTES
    return 4 * len(samples) * prod(samples.shape) <= room
