"""Writing sentences with a decoder: its weights and the user's wishes as operands of `ops.generation`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from fastvae.nn.cells import LSTM
from fastvae.ops import generation
from fastvae.ops.backend import CORE, compute_dtype
from fastvae.ops.checks import check_device, check_float, check_index, check_shape
from fastvae.ops.generation import BEAM, GREEDY, SAMPLE, Decoder, Search
from fastvae.ops.random import draw_seed

if TYPE_CHECKING:
    from fastvae.nn.lstm import _Decoder
    from fastvae.nn.sentences import SentenceDecoder

STRATEGIES = {"greedy": GREEDY, "sample": SAMPLE, "beam": BEAM}


class Generated(NamedTuple):
    """Sentences in the form `LSTMDecoder.generate` describes.

    Attributes:
        tokens: `(batch, length)` int64, padded behind `</s>`; `(batch, n_best, length)` for n_best above 1.
        lengths: `(batch,)` or `(batch, n_best)` int64, `</s>` counted.
        log_probs: as tokens, nats, zero at padding.
    """

    tokens: Tensor
    lengths: Tensor
    log_probs: Tensor


@torch.no_grad()
def generate(
    decoder: SentenceDecoder,
    z: Tensor | None,
    max_length: int,
    strategy: str,
    *,
    prefix: Tensor | None = None,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    **wishes: Any,
) -> Generated:
    """Write sentences; arguments and errors as for `LSTMDecoder.generate`."""
    search = _checked_search(decoder, max_length, strategy, **wishes)
    z, prefix, seeds = _checked_inputs(decoder, z, search, prefix, seeds, generator)
    if _is_lstm(decoder):
        tokens, lengths, log_probs = generation.generate(*_lstm(decoder, z), prefix, seeds, *search)
    else:
        tokens, lengths, log_probs = generation.write(decoder.recurrence(z, max_length), prefix, seeds, search)
    longest = int(lengths.max())
    tokens, log_probs = tokens[..., :longest], log_probs[..., :longest]
    if search.n_best == 1:
        return Generated(tokens[:, 0], lengths[:, 0], log_probs[:, 0])
    return Generated(tokens, lengths, log_probs)


@torch.no_grad()
def stream(
    decoder: SentenceDecoder,
    z: Tensor | None,
    max_length: int,
    strategy: str,
    *,
    prefix: Tensor | None = None,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    **wishes: Any,
) -> Iterator[Tensor]:
    """Write sentences word by word; arguments and errors as for `LSTMDecoder.stream`."""
    if strategy == "beam":
        raise ValueError("strategy: expected 'greedy' or 'sample' (a beam search settles no word early), got 'beam'")
    search = _checked_search(decoder, max_length, strategy, **wishes)
    return _steps(decoder, *_checked_inputs(decoder, z, search, prefix, seeds, generator), search)


@torch.no_grad()
def _steps(decoder: SentenceDecoder, z: Tensor, prefix: Tensor, seeds: Tensor, search: Search) -> Iterator[Tensor]:
    if not _is_lstm(decoder):
        yield from generation.steps(decoder.recurrence(z, search.max_length), prefix, seeds, search)
        return
    operands = _lstm(decoder, z)
    if CORE is None or z.device.type != "cpu" or not decoder.hidden_size:
        yield from generation.steps(generation.recurrence(operands), prefix, seeds, search)
        return
    steps = generation.Steps(operands, prefix, seeds, search)
    for t in range(search.max_length):
        more = steps.advance(1)
        yield steps.tokens[:, 0, t].clone()
        if not more:
            return


def _checked_search(
    decoder: SentenceDecoder,
    max_length: int,
    strategy: str,
    *,
    log_probs: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    beam_size: int = 1,
    length_penalty: float = 0.0,
    n_best: int = 1,
    no_repeat_ngram: int = 0,
) -> Search:
    bos, eos, pad = decoder.bos_index, decoder.eos_index, decoder.pad_index
    if bos is None or eos is None:
        missing = "bos_index" if bos is None else "eos_index"
        raise ValueError(f"{missing}: expected a token in order to generate, got None in the decoder")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
    if max_length < 1:
        raise ValueError(f"max_length: expected at least 1, got {max_length}")
    if no_repeat_ngram < 0:
        raise ValueError(f"no_repeat_ngram: expected at least 0, got {no_repeat_ngram}")
    if n_best != 1 and strategy != "beam":
        raise ValueError(f"n_best: expected 1 for strategy {strategy!r}, got {n_best}")
    padding = eos if pad is None else pad
    search = Search(bos, eos, padding, max_length, STRATEGIES[strategy], log_probs, no_repeat_ngram=no_repeat_ngram)
    if strategy == "sample":
        if not temperature > 0:
            raise ValueError(f"temperature: expected above 0, got {temperature}")
        if top_k < 0:
            raise ValueError(f"top_k: expected at least 0, got {top_k}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected a share in (0, 1], got {top_p}")
        # Colder than this is as cold; its inverse would overflow.
        return search._replace(temperature=max(temperature, 1e-30), top_k=top_k, top_p=top_p)
    if strategy == "beam":
        if beam_size < 1:
            raise ValueError(f"beam_size: expected at least 1, got {beam_size}")
        if length_penalty < 0:
            raise ValueError(f"length_penalty: expected at least 0, got {length_penalty}")
        if not 1 <= n_best <= beam_size:
            raise ValueError(f"n_best: expected 1 to {beam_size} (beam_size), got {n_best}")
        return search._replace(log_probs=True, beam_size=beam_size, length_penalty=length_penalty, n_best=n_best)
    return search


def _checked_inputs(
    decoder: SentenceDecoder,
    z: Tensor | None,
    search: Search,
    prefix: Tensor | None,
    seeds: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    weight, latent_dim = decoder.embedding.weight, decoder.latent_dim
    if z is None and latent_dim == 0:
        like = prefix if prefix is not None else seeds
        z = weight.new_empty(1 if like is None or like.dim() == 0 else like.size(0), 0)
    if z is None or z.dim() != 2 or z.size(0) < 1 or z.size(1) != latent_dim:
        got = "None" if z is None else str(tuple(z.shape))
        raise ValueError(f"z: expected shape (batch, {latent_dim}) with batch at least 1, got {got}")
    check_float("z", z)
    check_device("z", z, "the decoder", weight)
    batch = z.size(0)
    prefix = _checked_prefix(decoder, search, prefix, batch)
    if seeds is None:
        sampled = search.strategy == SAMPLE
        seeds = draw_seed(z.device, generator, batch) if sampled else prefix.new_zeros(batch)
    elif generator is not None:
        raise ValueError("seeds: expected None when a generator is given, got both")
    check_index("seeds", seeds, "the decoder", weight)
    check_shape("seeds", seeds, (batch,), "(batch,)")

    return z.to(compute_dtype(weight)), prefix, seeds


def _is_lstm(decoder: SentenceDecoder) -> TypeGuard[_Decoder]:
    return decoder.cell == LSTM


def _lstm(decoder: _Decoder, z: Tensor) -> Decoder:
    """The decoder's weights, and the start of each sentence, as the op takes them."""
    compute, hidden_size, embed = z.dtype, decoder.hidden_size, decoder.embed_dim
    layers = [[None if p is None else p.to(compute) for p in decoder.layer(i)] for i in range(decoder.num_layers)]
    weights_ih, weights_hh, biases = (list(column) for column in zip(*layers, strict=True))
    biases = [w.new_zeros(4 * hidden_size) if b is None else b for w, b in zip(weights_hh, biases, strict=True)]
    static_gates = biases[0].expand(z.size(0), -1)
    states = z.new_zeros(2, decoder.num_layers, z.size(0), hidden_size)
    if decoder.latent_dim:
        static_gates = generation.linear_rows(z, weights_ih[0][:, embed:], biases[0])
    if decoder.initial_state is not None:
        start = decoder.initial_state.weight.to(compute)
        given = decoder.initial_state.bias
        bias = start.new_zeros(len(start)) if given is None else given.to(compute)
        # As `initial_states`, but a row that does not depend on the batch around it.
        states = generation.linear_rows(z, start, bias).reshape(z.size(0), 2, -1, hidden_size).permute(1, 2, 0, 3)
    output = decoder.output
    return Decoder(
        embedding=decoder.embedding.weight.to(compute),
        weight_input=weights_ih[0][:, :embed],
        weight_hh=torch.stack(weights_hh) if len(weights_hh) > 1 else weights_hh[0][None],
        weight_ih=torch.stack(weights_ih[1:]) if weights_ih[1:] else z.new_empty(0, 4 * hidden_size, hidden_size),
        bias=torch.stack(biases[1:]) if biases[1:] else z.new_empty(0, 4 * hidden_size),
        static_gates=static_gates,
        h0=states[0],
        c0=states[1],
        output_weight=output.weight.to(compute),
        output_bias=z.new_zeros(decoder.vocab_size) if output.bias is None else output.bias.to(compute),
    )


def _checked_prefix(decoder: SentenceDecoder, search: Search, prefix: Tensor | None, batch: int) -> Tensor:
    """The first tokens as the op takes them: -1 behind each sentence's own."""
    weight = decoder.embedding.weight
    if prefix is None:
        return torch.empty(batch, 0, dtype=torch.int64, device=weight.device)
    check_index("prefix", prefix, "the decoder", weight)
    if prefix.dim() != 2 or prefix.size(0) != batch or prefix.size(1) > search.max_length:
        raise ValueError(
            f"prefix: expected shape (batch, length) = ({batch}, at most max_length {search.max_length}), "
            f"got {tuple(prefix.shape)}"
        )
    free = prefix == search.padding
    if (free[:, :-1] & ~free[:, 1:]).any():
        raise ValueError("prefix: expected padding only behind the first tokens, got tokens behind it")
    if ((prefix < 0) | (prefix >= decoder.vocab_size)).any():
        raise ValueError(
            f"prefix: expected tokens in [0, {decoder.vocab_size}), got {int(prefix.min())} to {int(prefix.max())}"
        )
    if (~free & ((prefix == search.bos) | (prefix == search.eos))).any():
        raise ValueError(f"prefix: expected neither <s> ({search.bos}) nor </s> ({search.eos}), got one of them")
    return prefix.masked_fill(free, -1)
