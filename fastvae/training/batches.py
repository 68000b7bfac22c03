"""Batches for measuring a model; apart from the training batches, which need Lightning."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from fastvae.data import TextCorpus, TokenBatchSampler, collate


def ordered_batches(corpus: TextCorpus, batch_size: int) -> DataLoader[Any]:
    """Return batches of every sentence of a corpus once, longest first, shared out over the processes."""
    sampler = TokenBatchSampler(corpus.lengths, batch_size=batch_size, shuffle=False)
    return DataLoader(corpus, batch_sampler=sampler, collate_fn=collate)
