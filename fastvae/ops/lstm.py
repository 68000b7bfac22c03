"""LSTM decoding: embedding gather with word dropout, latent injection and the recurrence, as one op.

    gates[b, t] = weight_ih[:, :E] @ embedding[word(b, t)] + (weight_ih[:, E:] @ z[b] + bias) + weight_hh @ h[b, t-1]

The latent's term and the bias are one product per sequence, made by torch outside the op (`static_gates`), not a
concatenation at every step. Word dropout replaces an input token by `unk_index` where the uniform number of element
b * T + t of the seed's stream is below `word_dropout`; never at t = 0, which holds <s>, nor in the padding. Sequences
are processed packed: cost follows the tokens, not the padding, and nobody has to sort. Samples of a sequence differ
in latent and states only, so that gather and input product are made once for all of them.
Source: Hochreiter & Schmidhuber 1997 (as torch.nn.LSTM, gates i, f, g, o); word dropout: Bowman et al. 2016.
"""

import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops.backend import CORE, compute_dtype, first_order, in_autocast_dtype, large, pointer, register
from fastvae.ops.checks import check_float
from fastvae.ops.recurrence import (
    check_recurrence,
    differentiate,
    dropped_tokens,
    input_gradients,
    kernel_keeps,
    pack,
    positions_as_words,
    recorded,
    sample_count,
    triton_backward,
    triton_forward,
    weight_scratch,
    with_samples,
)


# ------------------------------------------------------------------------------------------------ reference
def reference(
    tokens: Tensor,
    lengths: Tensor,
    static_gates: Tensor,
    h0: Tensor,
    c0: Tensor,
    embedding: Tensor,
    weight_input: Tensor,
    weight_hh: Tensor,
    seed: Tensor,
    word_dropout: float,
    unk_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eager definition: hidden (N, T, H), zero in the padding, and the last states h_n, c_n (N, H).

    N is B times the number of samples; sample s of sequence b is number s * B + b.
    """
    compute, samples = static_gates.dtype, sample_count(tokens, h0)
    words = dropped_tokens(tokens, lengths, seed, word_dropout, unk_index)
    inputs = F.linear(F.embedding(words, embedding).to(compute), weight_input.to(compute))
    h, c, hidden, ends = h0.to(compute), c0.to(compute), [], lengths.repeat(samples)[:, None]
    for t in range(tokens.shape[1]):
        gates = inputs[:, t].repeat(samples, 1) + static_gates + h @ weight_hh.to(compute).T
        i, f, g, o = gates.chunk(4, -1)
        c_next = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h_next = torch.sigmoid(o) * torch.tanh(c_next)
        hidden.append(torch.where(t < ends, h_next, 0))
        h, c = torch.where(t < ends, h_next, h), torch.where(t < ends, c_next, c)
    stacked = torch.stack(hidden, 1) if hidden else h.new_zeros(h.shape[0], 0, h.shape[1])
    return stacked.to(h0.dtype), h.to(h0.dtype), c.to(h0.dtype)


def reference_backward(
    grad_hidden: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    hidden: Tensor,
    gates: Tensor,
    cells: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    """Gradients of `reference` by autograd, for its operands from static_gates to weight_hh."""
    return differentiate(
        lambda *operands: reference(tokens, lengths, *operands, *args[6:]), args[:6], (grad_hidden, grad_h_n, grad_c_n)
    )


def _reference_op(tokens: Tensor, lengths: Tensor, static_gates: Tensor, *args: Any) -> tuple[Tensor, ...]:
    # The reference's backward starts afresh: nothing is kept for it.
    outputs = reference(tokens, lengths, static_gates, *args[:-1])
    return *outputs, static_gates.new_empty(0, 0), static_gates.new_empty(0, 0)


# ----------------------------------------------------------------------------------------------- C++ on CPU
def _cpu_forward(
    tokens: Tensor,
    lengths: Tensor,
    static_gates: Tensor,
    h0: Tensor,
    c0: Tensor,
    embedding: Tensor,
    weight_input: Tensor,
    weight_hh: Tensor,
    seed: Tensor,
    word_dropout: float,
    unk_index: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert CORE is not None
    compute = static_gates.dtype
    time, (sequences, size) = tokens.shape[1], h0.shape
    packing = pack(tokens, lengths, h0, embedding.shape[0], seed, word_dropout, unk_index)
    tokens_read = packing.words.numel()
    total = packing.samples * tokens_read
    gates, cells = static_gates.new_empty(0, 0), static_gates.new_empty(0, 0)
    if keep:
        gates = large(static_gates.new_empty(sequences * time, 4 * size))
        cells = large(static_gates.new_empty(sequences * time, size))
        gates[total:], cells[total:] = 0, 0
    # The inputs' share of the gates becomes the gates in place, unless samples share it.
    in_place = keep and packing.samples == 1
    projected = gates[:total] if in_place else large(static_gates.new_empty(tokens_read, 4 * size))
    inputs = embedding.index_select(0, packing.words).to(compute)
    torch.mm(inputs, weight_input.to(compute).T, out=projected)
    static_gates, h0_, c0_, weight = (t.to(compute).contiguous() for t in (static_gates, h0, c0, weight_hh))
    hidden = large(static_gates.new_empty(sequences, time, size))
    h_n, c_n = torch.empty_like(h0_), torch.empty_like(c0_)
    states, sorted_h0 = large(static_gates.new_empty(total, size)), torch.empty_like(h0_)
    running = cells if keep else torch.empty_like(c0_)
    packed_weight = weight_scratch(weight)
    CORE.lstm_forward(
        compute == torch.float64, keep, *packing.plan, pointer(projected), pointer(static_gates), pointer(h0_),
        pointer(c0_), pointer(weight), pointer(gates if keep else None), pointer(running), pointer(hidden),
        pointer(h_n), pointer(c_n), pointer(states), pointer(sorted_h0), pointer(packed_weight),
    )  # fmt: skip
    return hidden.to(h0.dtype), h_n.to(h0.dtype), c_n.to(h0.dtype), gates, cells


def _cpu_backward(
    grad_hidden: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    hidden: Tensor,
    gates: Tensor,
    cells: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    static_gates: Tensor,
    h0: Tensor,
    c0: Tensor,
    embedding: Tensor,
    weight_input: Tensor,
    weight_hh: Tensor,
    seed: Tensor,
    word_dropout: float,
    unk_index: int,
) -> tuple[Tensor, ...]:
    assert CORE is not None
    compute = static_gates.dtype
    (batch, time), (sequences, size) = tokens.shape, h0.shape
    packing = pack(tokens, lengths, h0, embedding.shape[0], seed, word_dropout, unk_index)
    total, first = packing.samples * packing.words.numel(), packing.samples * packing.first
    rows = packing.of_samples(packing.rows, batch * time)
    if grad_hidden is None:
        grad_states = gates.new_zeros(total, size)
    else:
        grad_states = grad_hidden.flatten(0, 1).index_select(0, rows).to(compute)
    grad_last = [
        torch.zeros_like(h0, dtype=compute) if g is None else g.to(compute).contiguous() for g in (grad_h_n, grad_c_n)
    ]
    c0_, weight = c0.to(compute).contiguous(), weight_hh.to(compute).contiguous()
    grad_gates = large(gates.new_empty(total, 4 * size))
    grad_static_gates = gates.new_empty(sequences, 4 * size)
    grad_h0, grad_c0 = torch.empty_like(c0_), torch.empty_like(c0_)
    packed_weight = weight_scratch(weight)
    CORE.lstm_backward(
        compute == torch.float64, *packing.plan, pointer(grad_states), pointer(grad_last[0]), pointer(grad_last[1]),
        pointer(gates), pointer(cells), pointer(c0_), pointer(weight), pointer(grad_gates),
        pointer(grad_static_gates), pointer(grad_h0), pointer(grad_c0), pointer(packed_weight),
    )  # fmt: skip

    # The rest are plain products over the packed rows. The state before row (b, t) is hidden[b, t - 1].
    before = large(gates.new_empty(total, size))
    before[:first] = h0.index_select(0, packing.of_samples(packing.order[: packing.first], batch)).to(compute)
    before[first:] = hidden.flatten(0, 1).index_select(0, rows[first:] - 1).to(compute)
    grad_weight_hh = grad_gates.T @ before
    return (
        grad_static_gates,
        grad_h0.to(h0.dtype),
        grad_c0.to(c0.dtype),
        *input_gradients(packing, grad_gates, embedding, weight_input),
        grad_weight_hh.to(weight_hh.dtype),
    )


# -------------------------------------------------------------------------------------------- cuDNN on CUDA
_HOLD = 1e4  # far beyond any sum of a gate's other terms, and a number of 16 bits


def library(source: str, tokens: Tensor, lengths: Tensor | None, z: Tensor | None, h0: Tensor, c0: Tensor,
            embedding: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, seed: Tensor,
            word_dropout: float, unk_index: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same through torch's own LSTM and autograd, for one sample, (B, ...), all steps of the padding included."""
    batch, time = tokens.shape
    if source == "inputs":
        inputs = embedding.view(batch, time, -1)
    else:
        ends = tokens.new_full((batch,), time) if lengths is None else lengths
        words = dropped_tokens(tokens, ends, seed, word_dropout, unk_index)
        valid = (words >= 0) & (words < embedding.shape[0])
        inputs = F.embedding(words.where(valid, 0), embedding).masked_fill(~valid[:, :, None], math.nan)
    if z is not None:
        inputs = torch.cat([inputs, z[:, None].expand(-1, time, -1)], -1)
    if lengths is not None:
        # One more input is 1 in the padding, where it shuts the input gates and opens the forget gates: the cell stays
        # to the last bit, its gradient too. Zeros fill up to a multiple of 8, as products in 16 bits like it.
        padding = (torch.arange(time, device=tokens.device) >= lengths[:, None])[:, :, None]
        more = 8 - inputs.shape[-1] % 8
        inputs = torch.cat([inputs.masked_fill(padding, 0), F.pad(padding.to(inputs.dtype), (0, more - 1))], -1)
        hold = weight_ih.new_tensor([-_HOLD, _HOLD, 0, 0]).repeat_interleave(h0.shape[1])
        weight_ih = torch.cat([weight_ih, F.pad(hold[:, None], (0, more - 1))], -1)
    weights = [weight_ih, weight_hh, *([] if bias is None else [bias, torch.zeros_like(bias)])]
    # In one piece, as cuDNN wants them: else they are copied at every call, with a warning.
    flat = torch.cat([w.flatten() for w in weights]).split([w.numel() for w in weights])
    weights = [part.view_as(w) for part, w in zip(flat, weights, strict=True)]
    states, recording = (h0[None], c0[None]), torch.is_grad_enabled()
    with torch.autocast(tokens.device.type, enabled=False):
        hidden, h_n, c_n = torch._VF.lstm(inputs, states, weights, bias is not None, 1, 0.0, recording, False, True)
    if lengths is None:
        return hidden, h_n[0], c_n[0]
    hidden = hidden.masked_fill(padding, 0)
    last = hidden[torch.arange(batch, device=tokens.device), (lengths - 1).clamp_min(0)]
    return hidden, torch.where(lengths[:, None] > 0, last, h0), c_n[0]


def _library_serves(tokens: Tensor, h0: Tensor, embedding: Tensor) -> bool:
    # Whether cuDNN takes the steps, those of the padding too: a rule after what others report, not what we measured.
    return (
        not torch.compiler.is_compiling()  # it would trace the steps one by one
        and embedding.device.type == "cuda"
        and embedding.dtype.itemsize == 2
        and h0.shape[1] % 128 == 0
        and h0.shape[0] == tokens.shape[0]  # samples would no longer share what depends on the tokens alone
        and min(tokens.numel(), h0.numel(), embedding.numel()) > 0
        and os.environ.get("FASTVAE_CUDNN_LSTM") != "0"
        and not torch.are_deterministic_algorithms_enabled()
        and torch.cudnn_is_acceptable(embedding)
    )


# ------------------------------------------------------------------------------------------ schema, autograd
def _fake_forward(tokens: Tensor, lengths: Tensor, static_gates: Tensor, h0: Tensor, c0: Tensor,
                  *args: Any) -> tuple[Tensor, ...]:  # fmt: skip
    time, (sequences, size) = tokens.shape[1], h0.shape
    kept = (sequences * time, size) if kernel_keeps(h0, static_gates, args[-1]) else (0, 0)
    return (
        h0.new_empty(sequences, time, size),
        h0.new_empty(h0.shape),
        h0.new_empty(h0.shape),
        static_gates.new_empty(kept[0], 4 * kept[1]),
        static_gates.new_empty(kept),
    )


def _fake_backward(grad_hidden: Any, grad_h_n: Any, grad_c_n: Any, hidden: Tensor, gates: Tensor, cells: Tensor,
                   tokens: Tensor, lengths: Tensor, *likes: Any) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(like.new_empty(like.shape) for like in likes[:6])


_OPERANDS = (
    "Tensor tokens, Tensor lengths, Tensor static_gates, Tensor h0, Tensor c0, Tensor embedding, "
    "Tensor weight_input, Tensor weight_hh, Tensor seed, float word_dropout, int unk_index"
)
_forward = register(
    f"lstm_decode({_OPERANDS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_op,
    fake=_fake_forward,
    cpu=_cpu_forward,
    cuda=triton_forward("lstm", _reference_op),
)
_backward = register(
    "lstm_decode_backward(Tensor? grad_hidden, Tensor? grad_h_n, Tensor? grad_c_n, Tensor hidden, Tensor gates, "
    f"Tensor cells, {_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=_fake_backward,
    cpu=_cpu_backward,
    cuda=triton_backward("lstm", reference_backward, outputs=3, saved=2),
)


class _LSTMDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, lengths: Tensor, static_gates: Tensor, h0: Tensor, c0: Tensor,
                embedding: Tensor, weight_input: Tensor, weight_hh: Tensor, seed: Tensor, word_dropout: float,
                unk_index: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        operands = (tokens, lengths, static_gates, h0, c0, embedding, weight_input, weight_hh, seed)
        keep = any(ctx.needs_input_grad)
        hidden, h_n, c_n, gates, cells = _forward(*operands, word_dropout, unk_index, keep)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, gates, cells, *operands)
        ctx.word_dropout, ctx.unk_index = word_dropout, unk_index
        return hidden, h_n, c_n

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_hidden: Tensor | None, grad_h_n: Tensor | None,
                 grad_c_n: Tensor | None) -> tuple[Tensor | None, ...]:  # fmt: skip
        grads = _backward(grad_hidden, grad_h_n, grad_c_n, *ctx.saved_tensors, ctx.word_dropout, ctx.unk_index)
        needed = (g if n else None for g, n in zip(grads, ctx.needs_input_grad[2:8], strict=True))
        return None, None, *needed, None, None, None


# -------------------------------------------------------------------------------------------------- public
def lstm_decode(
    tokens: Tensor,
    z: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    embedding: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    *,
    lengths: Tensor | None = None,
    word_dropout: float = 0.0,
    unk_index: int | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an LSTM over embedded tokens, with the latent as an input at every step and word dropout inside.

    Equals ``nn.LSTM`` fed with [embedding of the token; z]. On CUDA, in 16-bit, without samples and where `hidden` is a
    multiple of 128, cuDNN runs the steps, those of the padding too; not if the environment has FASTVAE_CUDNN_LSTM=0,
    torch is to be deterministic, or in a compiled graph.

    Args:
        tokens: word indices, int64 (batch, time).
        z: latent of each sequence, (batch, latent), or None for a plain LSTM. Several samples of each,
            (samples, batch, latent), share all work on the tokens, and the dropped words.
        h0: initial hidden state, (batch, hidden), or (samples, batch, hidden).
        c0: initial cell state, like `h0`.
        embedding: (vocabulary, embed).
        weight_ih: (4 * hidden, embed + latent), gates in nn.LSTM's order i, f, g, o.
        weight_hh: (4 * hidden, hidden).
        bias: (4 * hidden,), the sum of nn.LSTM's two, or None.
        lengths: valid steps of each sequence, int64 (batch,), in [0, time]; all of them if None.
        word_dropout: probability that an input word is replaced by `unk_index`; not at the first step.
        unk_index: index of <unk>; needed when `word_dropout` is positive.
        generator: source of the seed, on the inputs' device; torch's global one if None.
        seed: int64 tensor (1,) on the inputs' device to use instead of drawing one.

    Returns:
        hidden (batch, time, hidden), zero beyond each length, and the states (batch, hidden) after each sequence's
        last valid step; with samples, (samples, batch, ...).

    Raises:
        TypeError, ValueError: naming the argument whose type, shape, device or value is wrong.
        IndexError: if a token is out of range (on CUDA the row becomes NaN instead, as checking would synchronise).
    """
    return _decode(
        "embedding", tokens, z, h0, c0, embedding, weight_ih, weight_hh, bias, lengths,
        word_dropout=word_dropout, unk_index=unk_index, generator=generator, seed=seed,
    )  # fmt: skip


def lstm(
    inputs: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    *,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one LSTM layer over (batch, time, features), each sequence for its own length: cost follows the lengths.

    Args:
        inputs: (batch, time, features).
        h0, c0, weight_hh, bias, lengths: as for :func:`lstm_decode`.
        weight_ih: (4 * hidden, features), gates in nn.LSTM's order i, f, g, o.

    Returns:
        hidden (batch, time, hidden), zero beyond each length, and the states (batch, hidden) after each sequence's
        last valid step.

    Raises:
        TypeError, ValueError: naming the argument whose type, shape, device or value is wrong.
    """
    words, rows = positions_as_words(inputs)
    return _decode("inputs", words, None, h0, c0, rows, weight_ih, weight_hh, bias, lengths, word_dropout=0.0)


def _decode(
    source: str,
    tokens: Tensor,
    z: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    embedding: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    # `source` is what the caller calls the embedding.
    check_float(source, embedding)
    embedding, weight_ih, weight_hh, bias = in_autocast_dtype(embedding, weight_ih, weight_hh, bias)
    full_length = lengths is None
    sequences, lengths, seed, word_dropout, unk_index = check_recurrence(
        source, 4, tokens, z, {"h0": h0, "c0": c0}, embedding, weight_ih, weight_hh, {"bias": bias}, lengths, **options
    )
    embed_size, size = embedding.shape[1], weight_hh.shape[1]
    if c0 is h0:  # Dynamo refuses one tensor given twice to an autograd function
        c0 = h0.view_as(h0)
    h0, c0 = (state.flatten(0, -2).to(embedding.dtype) for state in (h0, c0))
    if _library_serves(tokens, h0, embedding):
        z = None if z is None else z.flatten(0, -2).to(embedding.dtype)
        weights = embedding, weight_ih, weight_hh, bias
        ends = None if full_length else lengths
        outputs = library(source, tokens, ends, z, h0, c0, *weights, seed, word_dropout, unk_index)
        hidden, h_n, c_n = with_samples(outputs, sequences)
        return hidden, h_n, c_n
    # A latent's contribution does not change from step to step: one product per sequence.
    rows = h0.shape[0]
    static_gates = embedding.new_zeros((rows, 4 * size)) if bias is None else bias.expand(rows, -1)
    if z is not None:
        static_gates = F.linear(z.flatten(0, -2).to(embedding.dtype), weight_ih[:, embed_size:], bias)
    static_gates = static_gates.to(compute_dtype(embedding))
    operands = recorded(static_gates, h0, c0, embedding, weight_ih[:, :embed_size], weight_hh)
    outputs = _LSTMDecode.apply(tokens, lengths, *operands, seed, word_dropout, unk_index)
    hidden, h_n, c_n = with_samples(outputs, sequences)
    return hidden, h_n, c_n
