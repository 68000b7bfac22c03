"""The sentences of a run as Lightning batches, at any point of any epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from fastvae.data import (
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
from fastvae.training.batches import ordered_batches
from fastvae.training.config import TrainConfig


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


class TextDataModule(LightningDataModule):
    """Training and validation batches of a run.

    Args:
        config: settings of the run.
        vocabulary: the words; built from the training text when None.
        start_epoch, start_batch: where the run begins: that many batches of that epoch have been done.

    Raises:
        ValueError: a text has no sentence, or too few for a batch.
        FileNotFoundError: a text is missing.
    """

    def __init__(
        self,
        config: TrainConfig,
        vocabulary: Vocabulary | None = None,
        *,
        start_epoch: int = 0,
        start_batch: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.start_epoch = start_epoch
        self.start_batch = start_batch
        sentences = training_sentences(config)
        self.vocabulary = vocabulary or Vocabulary.build(
            sentences, max_size=config.vocab_size, min_count=config.min_count
        )
        self._longest = config.max_length + 2 if config.max_length else None  # <s> and </s> count
        self._train = None if config.streaming else TextCorpus(sentences, self.vocabulary, self._longest)
        self.valid = TextCorpus(validation_sentences(config), self.vocabulary)
        if self._train is not None:  # a wrong batch size is better told now than from inside the trainer
            self._sampler()

    def _sampler(self) -> TokenBatchSampler:
        assert self._train is not None
        return TokenBatchSampler(self._train.lengths, **self._budget(), seed=self.config.seed)

    def _budget(self) -> dict[str, Any]:
        if self.config.max_tokens:
            return {"max_tokens": self.config.max_tokens}
        return {"batch_size": self.config.batch_size}

    def train_dataloader(self) -> Iterable[TextBatch]:
        """Return the batches of the current epoch; the trainer asks anew for each epoch."""
        epoch = self.start_epoch
        if self.trainer is not None:
            done: Any = self.trainer.fit_loop.epoch_progress.current
            epoch = max(epoch, done.processed)
        return self.epoch(epoch)

    def epoch(self, epoch: int) -> EpochLoader:
        """Return the training batches of an epoch, from 0, less those done before the start."""
        skip = self.start_batch if epoch == self.start_epoch else 0
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
        return EpochLoader(DataLoader(self._train, batch_sampler=sampler, collate_fn=collate, **settings), skip)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation batches: every sentence once, over all processes."""
        return ordered_batches(self.valid, self.config.batch_size)


def training_sentences(config: TrainConfig) -> Iterable[str]:
    """Return the training sentences: all of a single file where a validation text is given."""
    if config.streaming:
        return read_sentences(config.data)
    return load_text(config.data, "all" if config.valid is not None and Path(config.data).is_file() else "train")


def validation_sentences(config: TrainConfig) -> Iterable[str]:
    """Return the validation sentences: those of `valid`, or the validation part of `data`."""
    if config.valid is None:
        return load_text(config.data, "valid")
    return load_text(config.valid, "all" if Path(config.valid).is_file() else "valid")
