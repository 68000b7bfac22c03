"""Batches for measuring a model; apart from the training batches, which need Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader

from fastvae.data import TokenBatchSampler, collate


def ordered_batches(corpus: Any, batch_size: int, collate_fn: Callable[..., Any] = collate) -> DataLoader[Any]:
    """Return batches of every row of a corpus with `lengths` once, longest first, shared out over the processes."""
    sampler = TokenBatchSampler(corpus.lengths, batch_size=batch_size, shuffle=False)
    return DataLoader(corpus, batch_sampler=sampler, collate_fn=collate_fn)
