"""Noise for the sentences that a denoising encoder reads: words dropped, blanked, substituted or shuffled.

Source: Shen et al., Educating Text Autoencoders: Latent Representation Guidance via Denoising (2020), section 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvae.ops.random import seed_of, uniform

NOISES = ("drop", "blank", "substitute", "shuffle")


def check_noise(noise: str, level: float) -> None:
    """Raise ValueError unless `noise` and its `level` are those of `noisy_words`."""
    if noise not in NOISES:
        raise ValueError(f"noise: expected one of {', '.join(map(repr, NOISES))}, got {noise!r}")
    if noise == "shuffle":
        if not 0 <= level < math.inf or level % 1:
            raise ValueError(f"level: expected a whole number of places for 'shuffle', got {level}")
    elif not 0 <= level <= 1:
        raise ValueError(f"level: expected a probability in [0, 1] for {noise!r}, got {level}")


def noisy_words(
    tokens: Tensor,
    lengths: Tensor,
    noise: str,
    level: float,
    *,
    vocab_size: int,
    unk_index: int,
    special: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Corrupt the words of sentences: all that stands between the first token and the last.

    Args:
        tokens: `(batch, time)` int64, each row `<s> ... </s>`, padded on the right with anything.
        lengths: `(batch,)` int64, `<s>` and `</s>` counted.
        noise: "drop" leaves words out, "blank" puts `<unk>` in their place, "substitute" another word drawn evenly from
            the vocabulary, each word on its own with probability `level`; "shuffle" reorders the words, none of which
            moves further than `level` places.
        level: see there.
        vocab_size: number of tokens. unk_index: what "blank" writes.
        special: tokens that "substitute" never writes.
        generator: source of the noise; the global generator when None.
        seed: int64 tensor of shape (1,) that fixes the noise, in place of `generator`.

    Returns:
        tokens `(batch, time)`, what was padding unspecified, and lengths `(batch,)`.

    Raises:
        ValueError: for an unknown noise, or a level out of range.
    """
    check_noise(noise, level)
    seed = seed_of(seed, generator, "tokens", tokens)
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    offsets = torch.arange(tokens.numel(), device=tokens.device).view_as(tokens)
    number, words = uniform(seed, offsets), (positions > 0) & (positions < lengths.unsqueeze(1) - 1)
    if noise == "shuffle":
        # A word may pass those up to `level` places away: sorted by place + uniform in [0, level + 1).
        place = (positions + number.double() * (level + 1)).masked_fill(positions == 0, -1.0)
        place = place.where(words | (positions == 0), math.inf)
        return tokens.gather(1, place.sort(dim=1, stable=True).indices), lengths
    hit = words & (number < level)
    if noise == "blank":
        return tokens.masked_fill(hit, unk_index), lengths
    if noise == "substitute":
        others = sorted(set(special))
        choice = (uniform(seed, offsets + tokens.numel()).double() * (vocab_size - len(others))).long()
        for index in others:
            choice = choice + (choice >= index)
        return tokens.where(~hit, choice), lengths
    order = (positions + hit * tokens.size(1)).sort(dim=1).indices
    return tokens.gather(1, order), lengths - hit.sum(1)
