"""Convolutional classifier of sentences, which reads words or distributions over words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.models.pretrained import Pretrained
from fastvae.nn.sentences import checked_lengths


class TextClassifier(Pretrained):
    """Sentence classifier: convolutions over n-grams of embedded words, the largest of each filter, a linear layer.

    A filter reads every n-gram that holds at least one word of the sentence, with zeros around it, so a sentence has
    the same logits whatever the padding. A distribution over words is read as the mean of their embeddings, through
    which gradients reach whatever wrote it.

    `config` holds the constructor's arguments: `TextClassifier(**model.config)` builds the same model.

    Args:
        vocab_size: number of tokens V.
        classes: number of classes, at least 2.
        embed_dim: size of the token embeddings.
        filters: convolution filters of each width.
        widths: sizes of the n-grams.
        dropout: share of the filters' maxima dropped in training.
        pad_index: token that fills up short sentences.

    Source: Kim, Convolutional Neural Networks for Sentence Classification (2014), "CNN-rand".
    """

    def __init__(
        self,
        vocab_size: int,
        classes: int,
        *,
        embed_dim: int = 128,
        filters: int = 100,
        widths: Sequence[int] = (3, 4, 5),
        dropout: float = 0.5,
        pad_index: int = 0,
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes: expected at least 2, got {classes}")
        if not widths or min(widths) < 1:
            raise ValueError(f"widths: expected sizes of at least 1, got {tuple(widths)}")
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size,
            "classes": classes,
            "embed_dim": embed_dim,
            "filters": filters,
            "widths": list(widths),
            "dropout": dropout,
            "pad_index": pad_index,
        }
        self.pad_index = pad_index
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        nn.init.uniform_(self.embedding.weight, -0.25, 0.25)  # as the source has them
        self.convolutions = nn.ModuleList(nn.Conv1d(embed_dim, filters, n, padding=n - 1) for n in widths)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(filters * len(widths), classes)

    def forward(self, words: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Score the classes of sentences.

        Args:
            words: `(batch, time)` int64, without `<s>` and padded on the right; or `(batch, time, V)`, a distribution
                over words at each place.
            lengths: `(batch,)` int64, how many of the words count; None counts the tokens that are not padding, and
                all distributions.

        Returns:
            Logits, `(batch, classes)`.

        Raises:
            TypeError, ValueError: for a wrong shape or dtype; for lengths out of range, on CPU outside compiled
                graphs only.
        """
        if words.is_floating_point():
            vocab_size = self.config["vocab_size"]
            if words.dim() != 3 or words.size(-1) != vocab_size:
                raise ValueError(f"words: expected shape (batch, time, {vocab_size}), got {tuple(words.shape)}")
            # their lengths are checked as those of tokens of the same shape, all of which count
            lengths = checked_lengths(words[..., 0].long(), lengths, None, shortest=1)
            embedded = words @ self.embedding.weight
        else:
            lengths = checked_lengths(words, lengths, self.pad_index, shortest=1)
            embedded = self.embedding(words)
        places = torch.arange(words.size(1), device=words.device)
        inside = (places < lengths.unsqueeze(1)).unsqueeze(-1)
        embedded = (embedded * inside).transpose(1, 2)
        maxima = []
        for convolution in self.convolutions:
            features = F.relu(convolution(embedded))
            windows = torch.arange(features.size(-1), device=words.device)
            width = features.size(-1) - words.size(1) + 1
            beyond = windows >= (lengths + width - 1).unsqueeze(1)
            maxima.append(features.masked_fill(beyond.unsqueeze(1), 0).amax(-1))
        logits: Tensor = self.output(self.dropout(torch.cat(maxima, 1)))
        return logits
