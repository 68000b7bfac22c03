"""Sentences from a decoder: greedy, sampled or by beam search; from an LSTM all steps of a batch as one op.

A step gives each sentence the log-probabilities of its next word, log_softmax(W h + b) over the whole vocabulary. Of
these <s> and the padding are struck out, and with `no_repeat_ngram` the words that would repeat an n-gram. Greedy takes
the likeliest word. Sampling divides by the temperature, keeps the `top_k` likeliest and of these the nucleus of mass
`top_p`, and inverts the cumulative distribution, over the words in their order or, truncated, the likeliest first, at
the uniform number of element t of the sentence's own seed: a sentence depends on its latent and its seed alone, not on
the batch around it. Beam search ranks by log p / length ** length_penalty. If the logits are no numbers, the sentence
ends there. On CUDA a step is captured as a graph in each call, and the host looks at what it wrote every 10 steps.
Source: nucleus: Holtzman et al. 2020, section 3.1; repeated n-grams: Paulus et al. 2018, section 2.5.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops.backend import CORE, compute_dtype, large, pointer, register
from fastvae.ops.graph import StepGraph
from fastvae.ops.random import uniform

GREEDY, SAMPLE, BEAM = range(3)


class Decoder(NamedTuple):
    """An LSTM decoder and the start of each sentence, all of one type, float32 or float64; gates i, f, g, o."""

    embedding: Tensor  # (V, E)
    weight_input: Tensor  # (4 H, E), the first layer's
    weight_hh: Tensor  # (layers, 4 H, H)
    weight_ih: Tensor  # (layers - 1, 4 H, H), the upper layers'
    bias: Tensor  # (layers - 1, 4 H)
    static_gates: Tensor  # (B, 4 H): what the latent and the bias add to the first layer's gates
    h0: Tensor  # (layers, B, H)
    c0: Tensor  # (layers, B, H)
    output_weight: Tensor  # (V, H)
    output_bias: Tensor  # (V,)


class Search(NamedTuple):
    """How words are chosen, as for `LSTMDecoder.generate`."""

    bos: int
    eos: int
    padding: int
    max_length: int
    strategy: int
    log_probs: bool
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    beam_size: int = 1
    length_penalty: float = 0.0
    n_best: int = 1
    no_repeat_ngram: int = 0


_TENSORS = len(Decoder._fields)


def _parsed(args: tuple[Any, ...]) -> tuple[Decoder, Tensor, Tensor, Search]:
    return Decoder(*args[:_TENSORS]), *args[_TENSORS : _TENSORS + 2], Search(*args[_TENSORS + 2 :])


States = tuple[Tensor, ...]  # each (layers, rows, H), the hidden state first


class Recurrence(NamedTuple):
    """What the eager loops know of a decoder.

    Attributes:
        step: words (rows,), static and states to the log-probabilities (rows, V) of the next word, and states.
        static: (B, gates), what the latent adds at every step.
        states: at the start.
    """

    step: Callable[[Tensor, Tensor, States], tuple[Tensor, States]]
    static: Tensor
    states: States


def _blank_outputs(state: Tensor, search: Search) -> tuple[Tensor, Tensor, Tensor]:
    shape = (state.shape[1], search.n_best, search.max_length)
    tokens = torch.full(shape, search.padding, dtype=torch.int64, device=state.device)
    compute = compute_dtype(state)
    return tokens, tokens.new_zeros(shape[:2]), torch.zeros(shape, dtype=compute, device=state.device)


# ------------------------------------------------------------------------------------------------ reference
def reference(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Eager definition: tokens (B, n_best, max_length) padded, lengths (B, n_best), log-probabilities as tokens."""
    decoder, prefix, seeds, search = _parsed(args)
    return write(recurrence(decoder), prefix, seeds, search)


def recurrence(decoder: Decoder) -> Recurrence:
    """Return the LSTM as the eager loops take it."""

    def step(words: Tensor, static: Tensor, states: States) -> tuple[Tensor, States]:
        inputs = F.linear(F.embedding(words, decoder.embedding), decoder.weight_input) + static
        hidden: list[Tensor] = []
        cells: list[Tensor] = []
        for layer, (h, c) in enumerate(zip(*states, strict=True)):
            if layer > 0:
                inputs = F.linear(hidden[-1], decoder.weight_ih[layer - 1], decoder.bias[layer - 1])
            i, f, g, o = (inputs + F.linear(h, decoder.weight_hh[layer])).chunk(4, -1)
            cells.append(torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g))
            hidden.append(torch.sigmoid(o) * torch.tanh(cells[-1]))
        log_probs = F.linear(hidden[-1], decoder.output_weight, decoder.output_bias).log_softmax(-1)
        return log_probs, (torch.stack(hidden), torch.stack(cells))

    return Recurrence(step, decoder.static_gates, (decoder.h0, decoder.c0))


def write(recurrence: Recurrence, prefix: Tensor, seeds: Tensor, search: Search) -> tuple[Tensor, Tensor, Tensor]:
    """Write with any recurrence; returns as `reference`."""
    if search.strategy == BEAM:
        return _beam_search(recurrence, prefix, search)
    graph = _writing(recurrence, prefix, seeds, search)
    _run(graph, search.max_length)
    _, _, _, tokens, lengths, log_probs, *_ = graph.state
    return tokens[:, None], lengths[:, None], log_probs[:, None]


def steps(recurrence: Recurrence, prefix: Tensor, seeds: Tensor, search: Search) -> Iterator[Tensor]:
    """Yield the words of each step, (B,), greedy or sampled, until all have ended."""
    graph = _writing(recurrence, prefix, seeds, search)
    for _ in range(search.max_length):
        graph.run()
        yield graph.state[1].clone()
        if graph.state[2].all():
            return


def _run(graph: StepGraph, most: int) -> None:
    # The state's third tensor tells which rows are done; to go on with them changes nothing.
    for first in range(0, most, graph.block):
        graph.run(min(graph.block, most - first))
        if graph.state[2].all():
            return


def _writing(recurrence: Recurrence, prefix: Tensor, seeds: Tensor, search: Search) -> StepGraph:
    # State: steps made, last words (B,), which have ended, tokens (B, max_length), lengths, log p, the recurrence's.
    prefix = F.pad(prefix, (0, search.max_length - prefix.shape[1]), value=-1)

    def step(t: Tensor, words: Tensor, ended: Tensor, tokens: Tensor, lengths: Tensor, log_probs: Tensor,
             *states: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        scores, states = recurrence.step(words, recurrence.static, states)
        choices = _allowed(scores, tokens, t, search)
        if search.strategy == GREEDY:
            words = choices.argmax(-1)
        else:
            words = _drawn(choices, uniform(seeds, t.expand_as(seeds)), search)
        words = torch.where(scores.isnan().any(-1), search.eos, words)
        forced = prefix.index_select(1, t[None])[:, 0]
        words = torch.where(forced >= 0, forced, words)
        score = scores.gather(1, words[:, None]).masked_fill(ended[:, None], 0.0)
        words = words.masked_fill(ended, search.padding)
        at = t.expand(len(words), 1)
        tokens = tokens.scatter(1, at, words[:, None])
        log_probs = log_probs.scatter(1, at, score) if search.log_probs else log_probs.clone()
        return t + 1, words, ended | (words == search.eos), tokens, lengths + ~ended, log_probs, *states

    tokens, lengths, log_probs = (x[:, 0] for x in _blank_outputs(recurrence.states[0], search))
    start = lengths.new_zeros(()), torch.full_like(seeds, search.bos), torch.zeros_like(lengths, dtype=torch.bool)
    return StepGraph(step, (*start, tokens, lengths, log_probs, *recurrence.states))


def _allowed(log_probs: Tensor, tokens: Tensor, t: Tensor, search: Search) -> Tensor:
    """Strike out what may not follow the first `t` words of `tokens` (rows, max_length)."""
    choices, size = log_probs.clone(), search.no_repeat_ngram
    # Some vocabularies pad with </s>; that one must stay possible.
    for word in {search.bos, search.padding} - {search.eos}:
        choices.select(1, word).fill_(-math.inf)
    if 0 < size <= tokens.shape[1]:
        grams = tokens.unfold(1, size, 1)
        last = t - size + 1 + torch.arange(size - 1, device=t.device)
        last = tokens.gather(1, last.clamp_min(0).expand(len(tokens), -1))
        written = torch.arange(size, tokens.shape[1] + 1, device=t.device) <= t
        repeated = (grams[..., :-1] == last[:, None]).all(-1) & written
        # Behind the end of a sentence the padding repeats, which no longer matters.
        struck = torch.zeros_like(log_probs).scatter_add(1, grams[..., -1], repeated.to(log_probs.dtype)) > 0
        choices = choices.masked_fill(struck, -math.inf)
    return choices


def _drawn(choices: Tensor, number: Tensor, search: Search) -> Tensor:
    weights, order = (choices.double() / search.temperature).softmax(-1), None
    if search.top_k > 0 or search.top_p < 1:
        weights, order = truncated(weights, search.top_k, search.top_p)
    cumulative = weights.cumsum(-1)
    place = torch.searchsorted(cumulative, number[:, None] * cumulative[:, -1:], right=True)
    place = place.clamp_max(choices.shape[-1] - 1)
    return (place if order is None else order.gather(-1, place))[:, 0]


def truncated(weights: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Sort distributions (..., V), the likeliest first, and zero what is outside `top_k` and the nucleus `top_p`.

    The nucleus are the fewest likeliest words that hold the share `top_p` of what `top_k` (0: all) has left.

    Returns:
        weights (..., V), not normalized, at least one positive; and the word of each.
    """
    kept, order = weights.sort(dim=-1, descending=True, stable=True)
    if top_k > 0:
        kept[..., top_k:] = 0
    if top_p < 1:
        share = kept / kept.sum(-1, keepdim=True)
        kept = kept.masked_fill(share.cumsum(-1) - share >= top_p, 0)
    return kept, order


def _beam_search(recurrence: Recurrence, prefix: Tensor, search: Search) -> tuple[Tensor, Tensor, Tensor]:
    """The best sentences of each row; among 2K candidates at most K end, so K beginnings always go on.

    A sentence that ends counts when it ranks among the first K. The search of a row is over when no beginning can
    still beat the last of its `n_best` sentences: log-probabilities only fall, and `max_length` bounds the length that
    they are divided by. Where too few have ended in time, the likeliest beginnings stand, cut at `max_length`.
    """
    beams, eos, steps = search.beam_size, search.eos, search.max_length
    best_tokens, best_lengths, best_log_probs = _blank_outputs(recurrence.states[0], search)
    batch, device = best_lengths.shape[0], best_lengths.device
    static = recurrence.static.repeat_interleave(beams, 0)
    words = torch.full((batch * beams,), search.bos, device=device)
    tokens = torch.full((batch, beams, steps), search.padding, device=device)
    log_probs = best_log_probs.new_zeros(tokens.shape)
    # The beams of a row start out alike: only the first may be extended.
    totals = torch.full((batch, beams), -math.inf, device=device, dtype=torch.float64)
    totals[:, 0] = 0.0
    best = totals.new_full((batch, search.n_best), -math.inf)
    over = torch.zeros_like(words[:batch], dtype=torch.bool)
    first_row = torch.arange(batch, device=device)[:, None] * beams
    prefix = F.pad(prefix, (0, steps - prefix.shape[1]), value=-1).repeat_interleave(beams, 0)
    divisors = totals.new_tensor([(t + 1) ** search.length_penalty for t in range(steps)])

    def step(t: Tensor, words: Tensor, over: Tensor, totals: Tensor, tokens: Tensor, log_probs: Tensor, best: Tensor,
             best_tokens: Tensor, best_log_probs: Tensor, best_lengths: Tensor,
             *states: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        scores, states = recurrence.step(words, static, states)
        choices = _allowed(scores, tokens.flatten(0, 1), t, search)
        forced = prefix.index_select(1, t[None])
        word = forced.clamp_min(0)
        only = torch.full_like(scores, -math.inf).scatter(1, word, scores.gather(1, word))
        choices = torch.where(forced >= 0, only, choices)
        vocabulary = choices.shape[-1]
        extended = (totals[:, :, None] + choices.reshape(batch, beams, vocabulary)).flatten(1)
        ranked, index = extended.topk(min(2, vocabulary) * beams, 1)
        parents, words_ = index // vocabulary, index % vocabulary
        word_scores = scores.reshape(batch, -1).gather(1, index)

        def continued(history: Tensor, parents: Tensor, last: Tensor) -> Tensor:
            grown = history.gather(1, parents[:, :, None].expand(-1, -1, steps))
            return grown.scatter(2, t.expand(*parents.shape, 1), last[:, :, None])

        ends = (words_ == eos) & (ranked > -math.inf)
        candidates = parents[:, :beams], words_[:, :beams], word_scores[:, :beams]
        values = ranked[:, :beams] / divisors.index_select(0, t[None])
        values = values.masked_fill(~ends[:, :beams] | over[:, None], -math.inf)
        best, best_tokens, best_log_probs, best_lengths = _merged(
            torch.cat([best, values], 1),
            torch.cat([best_tokens, continued(tokens, candidates[0], candidates[1])], 1),
            torch.cat([best_log_probs, continued(log_probs, candidates[0], candidates[2])], 1),
            torch.cat([best_lengths, (t + 1).expand_as(candidates[0])], 1),
            search,
        )

        go_on = ends.int().sort(dim=1, stable=True).indices[:, :beams]
        totals = ranked.masked_fill(ends, -math.inf).gather(1, go_on)
        parents, words_, word_scores = (x.gather(1, go_on) for x in (parents, words_, word_scores))
        tokens, log_probs = continued(tokens, parents, words_), continued(log_probs, parents, word_scores)
        over = over | (best[:, -1] >= totals[:, 0] / divisors[-1])
        rows = (first_row + parents).flatten()
        beginnings = words_.flatten(), over, totals, tokens, log_probs
        states = tuple(state[:, rows] for state in states)
        return t + 1, *beginnings, best, best_tokens, best_log_probs, best_lengths, *states

    states = (state.repeat_interleave(beams, 1) for state in recurrence.states)
    beginnings = words, over, totals, tokens, log_probs
    start = over.new_zeros((), dtype=torch.int64), *beginnings, best, best_tokens, best_log_probs, best_lengths
    graph = StepGraph(step, (*start, *states))
    _run(graph, steps)
    _, _, _, totals, tokens, log_probs, best, best_tokens, best_log_probs, best_lengths, *_ = graph.state

    # Cut beginnings take the places that are left. A row that was over early has none left, or nothing to put there.
    place = torch.arange(search.n_best, device=device) - (best > -math.inf).sum(1, keepdim=True)
    cut = (best == -math.inf) & (totals.gather(1, place.clamp_min(0)) > -math.inf)
    at = place.clamp_min(0)[:, :, None].expand(-1, -1, steps)
    best_tokens = torch.where(cut[:, :, None], tokens.gather(1, at), best_tokens)
    best_log_probs = torch.where(cut[:, :, None], log_probs.gather(1, at), best_log_probs)
    return best_tokens, best_lengths.masked_fill(cut, steps), best_log_probs


def _merged(values: Tensor, tokens: Tensor, log_probs: Tensor, lengths: Tensor, search: Search) -> tuple[Tensor, ...]:
    values, order = (x[:, : search.n_best] for x in values.sort(dim=1, descending=True, stable=True))
    at, found = order[:, :, None].expand(-1, -1, search.max_length), values > -math.inf
    tokens = tokens.gather(1, at).masked_fill(~found[:, :, None], search.padding)
    log_probs = log_probs.gather(1, at).masked_fill(~found[:, :, None], 0.0)
    return values, tokens, log_probs, lengths.gather(1, order).masked_fill(~found, 0)


# ----------------------------------------------------------------------------------------------- C++ on CPU
class Steps:
    """Sentences that the C++ core is writing, some steps at a time.

    Args:
        decoder: contiguous, on the CPU.
        prefix: `(batch, length)` int64, words to begin with, -1 where the choice is free.
        seeds: `(batch,)` int64.
        search: how words are chosen.

    Attributes:
        tokens, lengths, log_probs: as `reference` returns them, filled as far as the sentences are written.
    """

    def __init__(self, decoder: Decoder, prefix: Tensor, seeds: Tensor, search: Search) -> None:
        assert CORE is not None
        (vocabulary, embed), (layers, batch, hidden) = decoder.embedding.shape, decoder.h0.shape
        if prefix.numel() and not -1 <= int(prefix.min()) <= int(prefix.max()) < vocabulary:
            raise IndexError(f"prefix: expected words in [0, {vocabulary}), got {int(prefix.min())} to {prefix.max()}")
        self.tokens, self.lengths, self.log_probs = outputs = _blank_outputs(decoder.h0, search)
        if decoder.weight_input.stride(1) != 1:
            decoder = decoder._replace(weight_input=decoder.weight_input.contiguous())
        operands = *(t if t is decoder.weight_input else t.contiguous() for t in decoder), prefix, seeds.contiguous()
        self._keep = *weights, prefix, seeds = *operands[:-2], prefix.contiguous(), operands[-1]
        self._core = CORE.Generation(
            decoder.h0.dtype == torch.float64, batch, embed, hidden, layers, vocabulary,
            decoder.weight_input.stride(0), *map(pointer, weights),
            pointer(prefix), prefix.shape[1], pointer(seeds), search.bos, search.eos, search.padding, search.max_length,
            search.strategy, search.log_probs, search.temperature, search.top_k, search.top_p, search.beam_size,
            search.length_penalty, search.n_best, search.no_repeat_ngram, *map(pointer, outputs),
            torch.get_num_threads(),
        )  # fmt: skip
        self._memory = large(torch.empty(self._core.bytes(), dtype=torch.uint8))
        self._core.memory = pointer(self._memory)
        flops = 2 * batch * search.beam_size * hidden * (vocabulary + 4 * hidden * (2 * layers - 1))
        self._at_once = max(1, _FLOPS_AT_ONCE // (flops + _FLOPS_A_STEP))

    def advance(self, steps: int) -> bool:
        """Write up to `steps` more words of each sentence; False once all are written."""
        return self._core.advance(steps) > 0

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Write all that is left. Between pieces of some 50 ms Python sees to its signals, such as Ctrl-C."""
        while self.advance(self._at_once):
            pass
        return self.tokens, self.lengths, self.log_probs


_FLOPS_AT_ONCE, _FLOPS_A_STEP = 5_000_000_000, 250_000  # the latter for what a step costs besides


def _cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if args[0].shape[0] == 0 or args[_TENSORS - 4].shape[1] == 0:
        return reference(*args)
    return Steps(*_parsed(args)).finish()


def _cpu_linear_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    assert CORE is not None
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    (rows, inner), columns, threads = x.shape, weight.shape[0], torch.get_num_threads()
    out, memory = x.new_empty(rows, columns), x.new_empty(threads * inner * 64)
    CORE.multiply_rows(
        x.dtype == torch.float64, rows, inner, columns, pointer(x), pointer(weight), pointer(bias), pointer(out),
        pointer(memory), threads,
    )  # fmt: skip
    return out


# ------------------------------------------------------------------------------------------------- schema
def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    decoder, _, _, search = _parsed(args)
    shape = (decoder.h0.shape[1], search.n_best, search.max_length)
    tokens = decoder.h0.new_empty(shape, dtype=torch.int64)
    return tokens, tokens.new_empty(shape[:2]), decoder.h0.new_empty(shape)


generate = register(
    f"generate({', '.join(f'Tensor {name}' for name in (*Decoder._fields, 'prefix', 'seeds'))}, int bos, int eos, "
    "int padding, int max_length, int strategy, bool log_probs, float temperature, int top_k, float top_p, "
    "int beam_size, float length_penalty, int n_best, int no_repeat_ngram) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    cpu=_cpu,
    cuda=None,
    waits=True,
)
# x weight' + bias, (rows, columns): a row does not depend on the rows around it, as those of a library's product may.
linear_rows = register(
    "linear_rows(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    reference=lambda x, weight, bias: F.linear(x, weight, bias),
    fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    cpu=_cpu_linear_rows,
    cuda=None,
)
