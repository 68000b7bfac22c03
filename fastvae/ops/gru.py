"""GRU decoding: embedding gather with word dropout, latent injection and the recurrence, as one op.

    r, z = sigmoid of [embedding of the token; z] @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh, their parts
    n = tanh(input's part + r * m), where m is the recurrence's part with its bias
    h = (1 - z) * n + z * h

The latent's term and the biases are made by torch outside the op, once a sequence: `static_gates` holds what is added
to m, r, z and n, in this order. Words are dropped and sequences packed as in :mod:`fastvae.ops.lstm`. Several latents
of a sentence share what depends on its words alone: the gather and the input's product.
Source: Cho et al. 2014, in the form of torch.nn.GRU (r multiplies after the product).
"""

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
    embedding: Tensor,
    weight_input: Tensor,
    weight_hh: Tensor,
    seed: Tensor,
    word_dropout: float,
    unk_index: int,
) -> tuple[Tensor, Tensor]:
    """Eager definition: hidden (N, T, H), zero in the padding, and the last state h_n (N, H).

    N is B times the number of samples; sample s of sequence b is number s * B + b.
    """
    compute, samples, size = static_gates.dtype, sample_count(tokens, h0), h0.shape[1]
    words = dropped_tokens(tokens, lengths, seed, word_dropout, unk_index)
    inputs = F.linear(F.embedding(words, embedding).to(compute), weight_input.to(compute))
    static_m, static_input = static_gates.split([size, 3 * size], -1)
    h, hidden, ends = h0.to(compute), [], lengths.repeat(samples)[:, None]
    for t in range(tokens.shape[1]):
        input_r, input_z, input_n = (inputs[:, t].repeat(samples, 1) + static_input).chunk(3, -1)
        from_r, from_z, from_n = (h @ weight_hh.to(compute).T).chunk(3, -1)
        r, z = torch.sigmoid(input_r + from_r), torch.sigmoid(input_z + from_z)
        n = torch.tanh(input_n + r * (from_n + static_m))
        h_next = n + z * (h - n)
        hidden.append(torch.where(t < ends, h_next, 0))
        h = torch.where(t < ends, h_next, h)
    stacked = torch.stack(hidden, 1) if hidden else h.new_zeros(h.shape[0], 0, size)
    return stacked.to(h0.dtype), h.to(h0.dtype)


def reference_backward(
    grad_hidden: Tensor | None,
    grad_h_n: Tensor | None,
    hidden: Tensor,
    gates: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    """Gradients of `reference` by autograd, for its operands from static_gates to weight_hh."""
    return differentiate(
        lambda *operands: reference(tokens, lengths, *operands, *args[5:]), args[:5], (grad_hidden, grad_h_n)
    )


def _reference_op(tokens: Tensor, lengths: Tensor, static_gates: Tensor, *args: Any) -> tuple[Tensor, ...]:
    # The reference's backward starts afresh: nothing is kept for it.
    return *reference(tokens, lengths, static_gates, *args[:-1]), static_gates.new_empty(0, 0)


# ----------------------------------------------------------------------------------------------- C++ on CPU
def _cpu_forward(
    tokens: Tensor,
    lengths: Tensor,
    static_gates: Tensor,
    h0: Tensor,
    embedding: Tensor,
    weight_input: Tensor,
    weight_hh: Tensor,
    seed: Tensor,
    word_dropout: float,
    unk_index: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    assert CORE is not None
    compute = static_gates.dtype
    time, (sequences, size) = tokens.shape[1], h0.shape
    packing = pack(tokens, lengths, h0, embedding.shape[0], seed, word_dropout, unk_index)
    tokens_read = packing.words.numel()
    gates = static_gates.new_empty(0, 0)
    if keep:
        gates = large(static_gates.new_empty(sequences * time, 4 * size))
        gates[packing.samples * tokens_read :] = 0
    # The inputs' share of r, z and n becomes the gates in place, unless samples share it.
    in_place = keep and packing.samples == 1
    shares = gates[:tokens_read, size:] if in_place else large(static_gates.new_empty(tokens_read, 3 * size))
    torch.mm(embedding.index_select(0, packing.words).to(compute), weight_input.to(compute).T, out=shares)
    static_gates, h0_, weight = (t.to(compute).contiguous() for t in (static_gates, h0, weight_hh))
    hidden = large(static_gates.new_empty(sequences, time, size))
    h_n, states = torch.empty_like(h0_), static_gates.new_empty(2, sequences, size)
    packed_weight = weight_scratch(weight)
    CORE.gru_forward(
        compute == torch.float64, *packing.plan, pointer(shares), shares.stride(0), pointer(static_gates),
        pointer(h0_), pointer(weight), pointer(gates if keep else None), pointer(hidden), pointer(h_n), pointer(states),
        pointer(packed_weight),
    )  # fmt: skip
    return hidden.to(h0.dtype), h_n.to(h0.dtype), gates


def _cpu_backward(
    grad_hidden: Tensor | None,
    grad_h_n: Tensor | None,
    hidden: Tensor,
    gates: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    static_gates: Tensor,
    h0: Tensor,
    embedding: Tensor,
    weight_input: Tensor,
    weight_hh: Tensor,
    seed: Tensor,
    word_dropout: float,
    unk_index: int,
) -> tuple[Tensor, ...]:
    assert CORE is not None
    compute = static_gates.dtype
    size = h0.shape[1]
    packing = pack(tokens, lengths, h0, embedding.shape[0], seed, word_dropout, unk_index)
    total = packing.samples * packing.words.numel()
    grads = [None if g is None else g.to(compute).contiguous() for g in (grad_hidden, grad_h_n)]
    hidden_, h0_, weight = (t.to(compute).contiguous() for t in (hidden, h0, weight_hh))
    grad_gates = large(gates.new_empty(total, 4 * size))
    before = large(gates.new_empty(total, size))
    grad_static_gates, grad_h0 = static_gates.new_empty(static_gates.shape), torch.empty_like(h0_)
    packed_weight = weight_scratch(weight)
    CORE.gru_backward(
        compute == torch.float64, *packing.plan, *(pointer(g) for g in grads), pointer(gates),
        pointer(hidden_), pointer(h0_), pointer(weight), pointer(grad_gates), pointer(grad_static_gates),
        pointer(grad_h0), pointer(before), pointer(packed_weight),
    )  # fmt: skip

    # The rest are plain products over the packed rows: columns m, r, z are the recurrence's, r, z, n the input's.
    grad_weight_hh = (grad_gates[:, : 3 * size].T @ before).roll(-size, 0)
    return (
        grad_static_gates,
        grad_h0.to(h0.dtype),
        *input_gradients(packing, grad_gates[:, size:], embedding, weight_input),
        grad_weight_hh.to(weight_hh.dtype),
    )


# ------------------------------------------------------------------------------------------ schema, autograd
def _fake_forward(tokens: Tensor, lengths: Tensor, static_gates: Tensor, h0: Tensor,
                  *args: Any) -> tuple[Tensor, ...]:  # fmt: skip
    (sequences, size), time = h0.shape, tokens.shape[1]
    kept = (sequences * time, 4 * size) if kernel_keeps(h0, static_gates, args[-1]) else (0, 0)
    return h0.new_empty(sequences, time, size), h0.new_empty(h0.shape), static_gates.new_empty(kept)


def _fake_backward(grad_hidden: Any, grad_h_n: Any, hidden: Tensor, gates: Tensor, tokens: Tensor, lengths: Tensor,
                   *likes: Any) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(like.new_empty(like.shape) for like in likes[:5])


_OPERANDS = (
    "Tensor tokens, Tensor lengths, Tensor static_gates, Tensor h0, Tensor embedding, Tensor weight_input, "
    "Tensor weight_hh, Tensor seed, float word_dropout, int unk_index"
)
_forward = register(
    f"gru_decode({_OPERANDS}, bool keep) -> (Tensor, Tensor, Tensor)",
    reference=_reference_op,
    fake=_fake_forward,
    cpu=_cpu_forward,
    cuda=triton_forward("gru", _reference_op),
)
_backward = register(
    "gru_decode_backward(Tensor? grad_hidden, Tensor? grad_h_n, Tensor hidden, Tensor gates, "
    f"{_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=_fake_backward,
    cpu=_cpu_backward,
    cuda=triton_backward("gru", reference_backward, outputs=2, saved=1),
)


class _GRUDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, lengths: Tensor, static_gates: Tensor, h0: Tensor, embedding: Tensor,
                weight_input: Tensor, weight_hh: Tensor, seed: Tensor, word_dropout: float,
                unk_index: int) -> tuple[Tensor, Tensor]:  # fmt: skip
        operands = (tokens, lengths, static_gates, h0, embedding, weight_input, weight_hh, seed)
        keep = any(ctx.needs_input_grad)
        hidden, h_n, gates = _forward(*operands, word_dropout, unk_index, keep)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, gates, *operands)
        ctx.word_dropout, ctx.unk_index = word_dropout, unk_index
        return hidden, h_n

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_hidden: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = _backward(grad_hidden, grad_h_n, *ctx.saved_tensors, ctx.word_dropout, ctx.unk_index)
        needed = (g if n else None for g, n in zip(grads, ctx.needs_input_grad[2:7], strict=True))
        return None, None, *needed, None, None, None


# -------------------------------------------------------------------------------------------------- public
def gru_decode(
    tokens: Tensor,
    z: Tensor | None,
    h0: Tensor,
    embedding: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    *,
    lengths: Tensor | None = None,
    word_dropout: float = 0.0,
    unk_index: int | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a GRU over embedded tokens, with the latent as an input at every step and word dropout inside.

    Equals ``nn.GRU`` fed with [embedding of the token; z]. Several samples of the latent, as a leading dimension of
    `z` and `h0`, read the same words: what depends on the words alone is computed once for all of them.

    Args:
        tokens: word indices, int64 (batch, time).
        z: latent of each sequence, (batch, latent) or (samples, batch, latent), or None for a plain GRU.
        h0: initial hidden state, (batch, hidden) or (samples, batch, hidden).
        embedding: (vocabulary, embed).
        weight_ih: (3 * hidden, embed + latent), gates in nn.GRU's order r, z, n.
        weight_hh: (3 * hidden, hidden).
        bias_ih, bias_hh: (3 * hidden,) or None, added as in nn.GRU: n's part of `bias_hh` before r multiplies.
        lengths: valid steps of each sequence, int64 (batch,), in [0, time]; all of them if None.
        word_dropout: probability that an input word is replaced by `unk_index`; not at the first step. All samples
            of a sentence read the same words.
        unk_index: index of <unk>; needed when `word_dropout` is positive.
        generator: source of the seed, on the inputs' device; torch's global one if None.
        seed: int64 tensor (1,) on the inputs' device to use instead of drawing one.

    Returns:
        hidden (batch, time, hidden), zero beyond each length, and the state (batch, hidden) after each sequence's
        last valid step; both with samples first if `h0` has them.

    Raises:
        TypeError, ValueError: naming the argument whose type, shape, device or value is wrong.
        IndexError: if a token is out of range (on CUDA the row becomes NaN instead, as checking would synchronise).
    """
    return _decode(
        "embedding", tokens, z, h0, embedding, weight_ih, weight_hh, bias_ih, bias_hh, lengths,
        word_dropout=word_dropout, unk_index=unk_index, generator=generator, seed=seed,
    )  # fmt: skip


def gru(
    inputs: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    *,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a GRU over dense inputs; equals ``nn.GRU`` with ``batch_first``, but that the cost follows `lengths`.

    Args:
        inputs: (batch, time, features).
        h0: initial hidden state, (batch, hidden); or (samples, batch, hidden), which all read the same inputs.
        weight_ih: (3 * hidden, features), gates in nn.GRU's order r, z, n.
        weight_hh: (3 * hidden, hidden).
        bias_ih, bias_hh: (3 * hidden,) or None.
        lengths: valid steps of each sequence, int64 (batch,), in [0, time]; all of them if None.

    Returns:
        hidden and the last state, as :func:`gru_decode`.

    Raises:
        TypeError, ValueError: naming the argument whose type, shape, device or value is wrong.
    """
    words, rows = positions_as_words(inputs)
    return _decode("inputs", words, None, h0, rows, weight_ih, weight_hh, bias_ih, bias_hh, lengths, word_dropout=0.0)


def _decode(
    source: str,
    tokens: Tensor,
    z: Tensor | None,
    h0: Tensor,
    embedding: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    # `source` is what the caller calls the embedding.
    check_float(source, embedding)
    embedding, weight_ih, weight_hh, bias_ih, bias_hh = in_autocast_dtype(
        embedding, weight_ih, weight_hh, bias_ih, bias_hh
    )
    sequences, lengths, seed, word_dropout, unk_index = check_recurrence(
        source, 3, tokens, z, {"h0": h0}, embedding, weight_ih, weight_hh, {"bias_ih": bias_ih, "bias_hh": bias_hh},
        lengths, **options,
    )  # fmt: skip
    embed_size, size, compute = embedding.shape[1], weight_hh.shape[1], compute_dtype(embedding)
    h0 = h0.flatten(0, -2).to(embedding.dtype)
    # What does not change from step to step: one product per sequence.
    rows = h0.shape[0]
    rzn = embedding.new_zeros((rows, 3 * size)) if bias_ih is None else bias_ih.expand(rows, -1)
    if z is not None:
        rzn = F.linear(z.flatten(0, -2).to(embedding.dtype), weight_ih[:, embed_size:], bias_ih)
    static_gates = F.pad(rzn.to(compute), (size, 0))
    if bias_hh is not None:
        static_gates = static_gates + F.pad(bias_hh.to(compute).roll(size), (0, size))
    operands = recorded(static_gates, h0, embedding, weight_ih[:, :embed_size], weight_hh)
    outputs = _GRUDecode.apply(tokens, lengths, *operands, seed, word_dropout, unk_index)
    hidden, h_n = with_samples(outputs, sequences)
    return hidden, h_n
