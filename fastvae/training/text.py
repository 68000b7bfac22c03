"""Strings in, strings out: reconstructing, sampling and interpolating sentences with a trained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastvae.data import TextBatch, Vocabulary, collate
from fastvae.models import ControlledTextVAE, MixtureVAE, SentenceVAE

_CHUNK = 64  # sentences decoded together
_DRAWN = 1000  # the same, of those drawn from the prior


def sample_sentences(
    model: SentenceVAE | MixtureVAE | ControlledTextVAE,
    vocabulary: Vocabulary,
    count: int,
    *,
    seed: int = 0,
    **options: Any,
) -> list[str]:
    """Write new sentences from z ~ N(0, I).

    Args:
        model, vocabulary: what `load_run` gives.
        count: number of sentences, at least 1.
        seed: of every draw; the same seed gives the same sentences.
        options: arguments of the model's `sample`, such as max_length, strategy or temperature, or `chosen` attributes.
    """
    generator = torch.Generator(_device(model)).manual_seed(seed)
    written = []
    for start in range(0, max(count, 1), _DRAWN):
        tokens, _ = model.sample(min(_DRAWN, count - start), generator=generator, **options)
        written += [vocabulary.decode(row) for row in tokens]
    return written


def reconstruct_sentences(
    model: SentenceVAE | MixtureVAE, vocabulary: Vocabulary, sentences: Sequence[str], *, seed: int = 0, **options: Any
) -> list[str]:
    """Write sentences again from the mean of their latent vector.

    Args:
        model, vocabulary: what `load_run` gives.
        sentences: words are separated by white space; unknown ones are read as <unk>.
        seed: of the draws where options say strategy="sample".
        options: arguments of `SentenceVAE.decode`, such as max_length or strategy.

    Returns:
        As many sentences, in the same order.

    Raises:
        ValueError: there is no sentence, or one of them has no word.
    """
    return _rewritten(model.reconstruct, model, vocabulary, sentences, seed, options)


def transfer_sentences(
    model: ControlledTextVAE,
    vocabulary: Vocabulary,
    sentences: Sequence[str],
    chosen: Mapping[str, str],
    *,
    seed: int = 0,
    **options: Any,
) -> list[str]:
    """Write sentences again from the mean of their latent vector, with other attributes.

    Args:
        model, vocabulary, sentences, seed: as in `reconstruct_sentences`.
        chosen: values of attributes, such as {"sentiment": "positive"}; the others stay as the model finds them.
        options: arguments of `ControlledTextVAE.decode`, such as max_length or strategy.

    Returns:
        As many sentences, in the same order.

    Raises:
        ValueError: there is no sentence, one of them has no word, or there is no such attribute or value.
    """
    options["chosen"] = chosen
    return _rewritten(model.transfer, model, vocabulary, sentences, seed, options)


def _rewritten(
    write: Callable[..., tuple[torch.Tensor, ...]],
    model: torch.nn.Module,
    vocabulary: Vocabulary,
    sentences: Sequence[str],
    seed: int,
    options: dict[str, Any],
) -> list[str]:
    options["generator"] = torch.Generator(_device(model)).manual_seed(seed)
    written: list[str] = []
    for start in range(0, len(sentences), _CHUNK):
        batch = encode_sentences(vocabulary, sentences[start : start + _CHUNK]).to(_device(model))
        tokens, *_ = write(batch.tokens, batch.lengths, **options)
        written += [vocabulary.decode(row) for row in tokens]
    return written


def interpolate_sentences(
    model: SentenceVAE,
    vocabulary: Vocabulary,
    first: str,
    last: str,
    steps: int,
    *,
    seed: int = 0,
    **options: Any,
) -> list[str]:
    """Write sentences along the straight line between the latent means of two sentences.

    Args:
        model, vocabulary: what `load_run` gives.
        first, last: the two sentences.
        steps: sentences to write, both ends included, at least 2.
        seed: of the draws where options say strategy="sample".
        options: arguments of `SentenceVAE.decode`.

    Raises:
        ValueError: a sentence has no word, or steps is below 2.
    """
    ends = [encode_sentences(vocabulary, [sentence]).to(_device(model)).tokens[0] for sentence in (first, last)]
    generator = torch.Generator(_device(model)).manual_seed(seed)
    tokens, _ = model.interpolate(ends[0], ends[1], steps, generator=generator, **options)
    return [vocabulary.decode(row) for row in tokens]


def encode_sentences(vocabulary: Vocabulary, sentences: Sequence[str]) -> TextBatch:
    """Turn sentences into a padded batch.

    Raises:
        ValueError: there is no sentence, or one of them has no word.
    """
    for number, sentence in enumerate(sentences, start=1):
        if not sentence.split():
            raise ValueError(f"sentence {number} has no word")
    return collate([torch.tensor(vocabulary.encode(sentence)) for sentence in sentences])


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
