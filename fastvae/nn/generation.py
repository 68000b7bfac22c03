"""Writing sentences with an `LSTMDecoder`: greedy, sampled, and by beam search.

The three strategies share one recurrence over plain torch ops, which knows the decoder; they know only
tokens, log-probabilities and states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops.backend import compute_dtype

if TYPE_CHECKING:
    from fastvae.nn.lstm import _Decoder

STRATEGIES = ("greedy", "sample", "beam")


class Generated(NamedTuple):
    """Sentences in the form `LSTMDecoder.generate` describes.

    Attributes:
        tokens: `(batch, length)` int64, padded behind `</s>`.
        lengths: `(batch,)` int64, `</s>` counted.
        log_probs: `(batch, length)`, nats, zero at padding.
    """

    tokens: Tensor
    lengths: Tensor
    log_probs: Tensor


@torch.no_grad()
def generate(
    decoder: _Decoder,
    z: Tensor | None,
    max_length: int,
    *,
    strategy: str,
    temperature: float,
    top_k: int,
    top_p: float,
    beam_size: int,
    length_penalty: float,
    generator: torch.Generator | None,
) -> Generated:
    """Write one sentence for each latent; arguments and errors as for `LSTMDecoder.generate`."""
    special = _checked_special_tokens(decoder)
    if z is None or z.dim() != 2 or z.size(0) < 1 or z.size(1) != decoder.latent_dim:
        got = "None" if z is None else str(tuple(z.shape))
        raise ValueError(f"z: expected shape (batch, {decoder.latent_dim}) with batch at least 1, got {got}")
    if max_length < 1:
        raise ValueError(f"max_length: expected at least 1, got {max_length}")
    if strategy == "greedy":
        step = _Recurrence(decoder, z, max_length)
        return _one_by_one(step, special, max_length, lambda log_probs: log_probs.argmax(-1))
    if strategy == "sample":
        if not temperature > 0:
            raise ValueError(f"temperature: expected above 0, got {temperature}")
        if top_k < 0:
            raise ValueError(f"top_k: expected at least 0, got {top_k}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected a share in (0, 1], got {top_p}")

        def draw(log_probs: Tensor) -> Tensor:
            probs = truncated((log_probs / temperature).softmax(-1), top_k, top_p)
            return torch.multinomial(probs, 1, generator=generator).squeeze(-1)

        return _one_by_one(_Recurrence(decoder, z, max_length), special, max_length, draw)
    if strategy == "beam":
        if beam_size < 1:
            raise ValueError(f"beam_size: expected at least 1, got {beam_size}")
        if length_penalty < 0:
            raise ValueError(f"length_penalty: expected at least 0, got {length_penalty}")
        step = _Recurrence(decoder, z.repeat_interleave(beam_size, 0), max_length)
        return _beam_search(step, special, max_length, beam_size, length_penalty)
    raise ValueError(f"strategy: expected one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")


def truncated(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero the probabilities outside the `top_k` likeliest and outside the nucleus of mass `top_p`.

    Args:
        probs: `(..., V)`, each row a distribution.
        top_k: number of tokens to keep; 0 for all.
        top_p: mass of the nucleus, the fewest likeliest tokens that hold it, counted after `top_k`.

    Returns:
        `(..., V)`, not normalized; at least one token stays in each row.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration (2020), section 3.1.
    """
    size = probs.size(-1)
    if top_k in range(1, size) or top_p < 1:
        kept, index = probs.topk(top_k if 0 < top_k < size else size, -1)
        if top_p < 1:
            kept = kept / kept.sum(-1, keepdim=True)
            before = kept.cumsum(-1) - kept
            kept = kept.masked_fill(before >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, index, kept)
    return probs


class _SpecialTokens(NamedTuple):
    bos: int
    eos: int
    padding: int
    forbidden: list[int]


def _checked_special_tokens(decoder: _Decoder) -> _SpecialTokens:
    bos, eos, pad = decoder.bos_index, decoder.eos_index, decoder.pad_index
    if bos is None or eos is None:
        missing = "bos_index" if bos is None else "eos_index"
        raise ValueError(f"{missing}: expected a token in order to generate, got None in the decoder")
    # Some vocabularies pad with </s>; that one must stay possible.
    forbidden = sorted({bos, eos if pad is None else pad} - {eos})
    return _SpecialTokens(bos, eos, eos if pad is None else pad, forbidden)


class _Recurrence:
    """One step of the decoder for a batch: (tokens, states) to (log-probabilities of the next token, states)."""

    def __init__(self, decoder: _Decoder, z: Tensor, steps: int) -> None:
        self.decoder = decoder
        self.rows = z.size(0)
        self.start = decoder.initial_states(z)  # each (num_layers, rows, hidden)
        self.score_dtype = compute_dtype(z)
        self.weight_input = decoder.weight_ih[:, : decoder.embed_dim]
        # The latent adds the same to the inputs' product at every step.
        self.static = F.linear(z, decoder.weight_ih[:, decoder.embed_dim :])
        # One product for the whole vocabulary pays once the steps look up more words than there are.
        self.table: Tensor | None = None
        if self.rows * steps >= decoder.vocab_size:
            self.table = F.linear(decoder.embedding.weight, self.weight_input)

    def __call__(self, tokens: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.table is not None:
            inputs = self.table[tokens]
        else:
            inputs = F.linear(self.decoder.embedding.weight[tokens], self.weight_input)
        product = inputs + self.static
        after: list[tuple[Tensor, ...]] = []
        for layer in range(self.decoder.num_layers):
            parameters = self.decoder.layer(layer)
            if layer:
                product = F.linear(after[-1][0], parameters[0])
            after.append(self.decoder.cell.step(product, tuple(state[layer] for state in states), parameters))
        scores = self.decoder.output(after[-1][0]).log_softmax(-1, dtype=self.score_dtype)
        return scores, tuple(torch.stack(layers) for layers in zip(*after, strict=True))


def _one_by_one(
    step: _Recurrence, special: _SpecialTokens, max_length: int, choose: Callable[[Tensor], Tensor]
) -> Generated:
    states = step.start
    last = torch.full((step.rows,), special.bos, device=states[0].device)
    ended = torch.zeros_like(last, dtype=torch.bool)
    lengths = torch.zeros_like(last)
    tokens, log_probs = [], []
    for _ in range(max_length):
        scores, states = step(last, states)
        scores[:, special.forbidden] = -math.inf
        last = choose(scores)
        tokens.append(last.masked_fill(ended, special.padding))
        log_probs.append(scores.gather(-1, last.unsqueeze(-1)).squeeze(-1).masked_fill(ended, 0.0))
        lengths += ~ended
        ended |= last == special.eos
        if ended.all():
            break
    return Generated(torch.stack(tokens, 1), lengths, torch.stack(log_probs, 1))


def _beam_search(
    step: _Recurrence, special: _SpecialTokens, max_length: int, beam_size: int, length_penalty: float
) -> Generated:
    """Best sentence of each row; among 2K candidates at most K end, so K beginnings always go on.

    A sentence that ends counts when it ranks among the first K. The search of a row is over when no
    beginning can still beat its best sentence: log-probabilities only fall, and `max_length` bounds the
    length they are divided by. Rows that are over keep stepping until all are, which cannot change them.
    """
    states = step.start
    device, batch = states[0].device, step.rows // beam_size
    row = torch.arange(batch, device=device)
    last = torch.full((step.rows,), special.bos, device=device)
    # The beams of a row start out alike: only the first may be extended.
    scores = torch.full((batch, beam_size), -math.inf, device=device, dtype=step.score_dtype)
    scores[:, 0] = 0.0
    tokens = torch.full((batch, beam_size, max_length), special.padding, device=device)
    log_probs = torch.zeros(tokens.shape, device=device, dtype=step.score_dtype)
    best = torch.full_like(scores[:, 0], -math.inf)
    best_tokens, best_log_probs, best_lengths = tokens[:, 0], log_probs[:, 0], torch.zeros_like(row)

    for length in range(1, max_length + 1):
        step_scores, states = step(last, states)
        step_scores[:, special.forbidden] = -math.inf
        # The best candidates of a row are among the best of each of its beams.
        width = min(2 * beam_size, step_scores.size(-1))
        word_score, word = (best_of.reshape(batch, -1) for best_of in step_scores.topk(width, -1))
        totals, index = (scores.repeat_interleave(width, 1) + word_score).topk(min(2, width) * beam_size, 1)
        parent, word, word_score = index // width, word.gather(1, index), word_score.gather(1, index)

        ends = word == special.eos
        finished = totals[:, :beam_size].masked_fill(~ends[:, :beam_size], -math.inf) / length**length_penalty
        finished_score, rank = finished.max(1)
        better = finished_score > best
        best = torch.where(better, finished_score, best)
        source = parent[row, rank]
        ended_tokens, ended_log_probs = tokens[row, source], log_probs[row, source]
        ended_tokens[:, length - 1] = special.eos
        ended_log_probs[:, length - 1] = word_score[row, rank]
        best_tokens = torch.where(better.unsqueeze(1), ended_tokens, best_tokens)
        best_log_probs = torch.where(better.unsqueeze(1), ended_log_probs, best_log_probs)
        best_lengths = best_lengths.masked_fill(better, length)

        scores, rank = totals.masked_fill(ends, -math.inf).topk(beam_size, 1)
        parent, word, word_score = parent.gather(1, rank), word.gather(1, rank), word_score.gather(1, rank)
        tokens, log_probs = tokens[row.unsqueeze(1), parent], log_probs[row.unsqueeze(1), parent]
        tokens[:, :, length - 1], log_probs[:, :, length - 1] = word, word_score
        if (best >= scores[:, 0] / max_length**length_penalty).all():
            break
        beams = (row.unsqueeze(1) * beam_size + parent).reshape(-1)
        last, states = word.reshape(-1), tuple(state[:, beams] for state in states)

    # Where nothing ended in time, the likeliest beginning stands, cut at max_length.
    cut = best == -math.inf
    best_tokens = torch.where(cut.unsqueeze(1), tokens[:, 0], best_tokens)
    best_log_probs = torch.where(cut.unsqueeze(1), log_probs[:, 0], best_log_probs)
    best_lengths = best_lengths.masked_fill(cut, max_length)
    longest = int(best_lengths.max())
    return Generated(best_tokens[:, :longest], best_lengths, best_log_probs[:, :longest])
