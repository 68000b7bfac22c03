"""Layer-normalized LSTM decoding: `lstm_decode` with the gates and the cell normalized at every step.

    gates = LN([embedding of the token; z] @ weight_ih.T) * norm_input + LN(h @ weight_hh.T) * norm_hidden + bias
    i, f, g, o = gates;  c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    h = sigmoid(o) * tanh(LN(c) * norm_cell[0] + norm_cell[1])

LN(x) = (x - mean) / sqrt(variance + eps), over the 4 * hidden numbers of a product, all gates together, and over the
hidden numbers of a cell. The cell goes on to the next step as it is. The rest is as in :mod:`fastvae.ops.lstm`.
Source: Ba, Kiros & Hinton 2016, equations 20 to 22.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops.backend import CORE, compute_dtype, first_order, in_autocast_dtype, large, pointer, register
from fastvae.ops.checks import check_float, check_like, check_shape
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
    static_inputs: Tensor,
    h0: Tensor,
    c0: Tensor,
    embedding: Tensor,
    weight_input: Tensor,
    weight_hh: Tensor,
    norm_gates: Tensor,
    norm_cell: Tensor,
    seed: Tensor,
    word_dropout: float,
    unk_index: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eager definition: hidden (N, T, H), zero in the padding, and the last states h_n, c_n (N, H).

    N is B times the number of samples; sample s of sequence b is number s * B + b. static_inputs (N, 4 * H) is the
    latents' part of the input's product; norm_gates (3, 4 * H) is norm_input, norm_hidden and bias.
    """
    compute, samples, size = static_inputs.dtype, sample_count(tokens, h0), h0.shape[1]
    words = dropped_tokens(tokens, lengths, seed, word_dropout, unk_index)
    inputs = F.linear(F.embedding(words, embedding).to(compute), weight_input.to(compute))
    gain_input, gain_hidden, bias = norm_gates.to(compute)
    gain_cell, bias_cell = norm_cell.to(compute)
    h, c, hidden, ends = h0.to(compute), c0.to(compute), [], lengths.repeat(samples)[:, None]
    for t in range(tokens.shape[1]):
        from_input = inputs[:, t].repeat(samples, 1) + static_inputs
        gates = F.layer_norm(from_input, (4 * size,), gain_input, bias, eps)
        gates = gates + F.layer_norm(h @ weight_hh.to(compute).T, (4 * size,), gain_hidden, None, eps)
        i, f, g, o = gates.chunk(4, -1)
        c_next = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h_next = torch.sigmoid(o) * torch.tanh(F.layer_norm(c_next, (size,), gain_cell, bias_cell, eps))
        hidden.append(torch.where(t < ends, h_next, 0))
        h, c = torch.where(t < ends, h_next, h), torch.where(t < ends, c_next, c)
    stacked = torch.stack(hidden, 1) if hidden else h.new_zeros(h.shape[0], 0, size)
    return stacked.to(h0.dtype), h.to(h0.dtype), c.to(h0.dtype)


def reference_backward(
    grad_hidden: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    hidden: Tensor,
    normalized: Tensor,
    inverses: Tensor,
    cells: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    """Gradients of `reference` by autograd, for its operands from static_inputs to norm_cell."""
    return differentiate(
        lambda *operands: reference(tokens, lengths, *operands, *args[8:]), args[:8], (grad_hidden, grad_h_n, grad_c_n)
    )


def _reference_op(tokens: Tensor, lengths: Tensor, static_inputs: Tensor, *args: Any) -> tuple[Tensor, ...]:
    # The reference's backward starts afresh: nothing is kept for it.
    outputs = reference(tokens, lengths, static_inputs, *args[:-1])
    return *outputs, *(static_inputs.new_empty(0, 0) for _ in range(3))


# ----------------------------------------------------------------------------------------------- C++ on CPU
def _cpu_forward(
    tokens: Tensor,
    lengths: Tensor,
    static_inputs: Tensor,
    h0: Tensor,
    c0: Tensor,
    embedding: Tensor,
    weight_input: Tensor,
    weight_hh: Tensor,
    norm_gates: Tensor,
    norm_cell: Tensor,
    seed: Tensor,
    word_dropout: float,
    unk_index: int,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert CORE is not None
    compute = static_inputs.dtype
    time, (sequences, size) = tokens.shape[1], h0.shape
    packing = pack(tokens, lengths, h0, embedding.shape[0], seed, word_dropout, unk_index)
    rows = sequences * time if keep else sequences
    kept = [large(static_inputs.new_empty(rows, columns)) for columns in (8 * size, 2, size)]
    if keep:
        for tensor in kept:
            tensor[packing.samples * packing.words.numel() :] = 0
    inputs = embedding.index_select(0, packing.words).to(compute) @ weight_input.to(compute).T
    static_inputs, h0_, c0_, weight, gates_, cell_ = (
        t.to(compute).contiguous() for t in (static_inputs, h0, c0, weight_hh, norm_gates, norm_cell)
    )
    hidden = large(static_inputs.new_empty(sequences, time, size))
    h_n, c_n, states = torch.empty_like(h0_), torch.empty_like(c0_), h0_.new_empty(2, sequences, size)
    packed_weight = weight_scratch(weight.T)
    CORE.layer_norm_lstm_forward(
        compute == torch.float64, keep, *packing.plan, eps, pointer(inputs), pointer(static_inputs), pointer(h0_),
        pointer(c0_), pointer(weight), pointer(gates_), pointer(cell_), *(pointer(t) for t in kept), pointer(hidden),
        pointer(h_n), pointer(c_n), pointer(states), pointer(packed_weight),
    )  # fmt: skip
    kept = kept if keep else [static_inputs.new_empty(0, 0) for _ in kept]
    return hidden.to(h0.dtype), h_n.to(h0.dtype), c_n.to(h0.dtype), kept[0], kept[1], kept[2]


def _cpu_backward(
    grad_hidden: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    hidden: Tensor,
    normalized: Tensor,
    inverses: Tensor,
    cells: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    static_inputs: Tensor,
    h0: Tensor,
    c0: Tensor,
    embedding: Tensor,
    weight_input: Tensor,
    weight_hh: Tensor,
    norm_gates: Tensor,
    norm_cell: Tensor,
    seed: Tensor,
    word_dropout: float,
    unk_index: int,
    eps: float,
) -> tuple[Tensor, ...]:
    assert CORE is not None
    compute = static_inputs.dtype
    sequences, size = h0.shape
    packing = pack(tokens, lengths, h0, embedding.shape[0], seed, word_dropout, unk_index)
    total = packing.samples * packing.words.numel()
    grads = [
        torch.zeros_like(like, dtype=compute, memory_format=torch.contiguous_format)
        if grad is None
        else grad.to(compute).contiguous()
        for grad, like in ((grad_hidden, hidden), (grad_h_n, h0), (grad_c_n, c0))
    ]
    hidden_, h0_, c0_, weight, gates_, cell_ = (
        t.to(compute).contiguous() for t in (hidden, h0, c0, weight_hh, norm_gates, norm_cell)
    )
    grad_products, grad_shares, before = (
        large(normalized.new_empty(total, columns)) for columns in (4 * size, 4 * size, size)
    )
    grad_static = normalized.new_empty(sequences, 4 * size)
    grad_h0, grad_c0, states = (torch.empty_like(h0_) for _ in range(3))
    partials = max(torch.get_num_threads(), 1)
    grad_norms, packed_weight = normalized.new_zeros(partials, 14 * size), weight_scratch(weight)
    CORE.layer_norm_lstm_backward(
        compute == torch.float64, *packing.plan, eps, *(pointer(g) for g in grads), pointer(normalized),
        pointer(inverses), pointer(cells), pointer(hidden_), pointer(h0_), pointer(c0_), pointer(weight),
        pointer(gates_), pointer(cell_), pointer(grad_products), pointer(grad_shares), pointer(grad_static),
        pointer(grad_h0), pointer(grad_c0), pointer(before), pointer(grad_norms), partials, pointer(states),
        pointer(packed_weight),
    )  # fmt: skip

    # The rest are plain products over the packed rows.
    norms = grad_norms.sum(0)
    return (
        grad_static,
        grad_h0.to(h0.dtype),
        grad_c0.to(c0.dtype),
        *input_gradients(packing, grad_shares, embedding, weight_input),
        (grad_products.T @ before).to(weight_hh.dtype),
        norms[: 12 * size].view(3, 4 * size).to(norm_gates.dtype, copy=True),
        norms[12 * size :].view(2, size).to(norm_cell.dtype, copy=True),
    )


# ------------------------------------------------------------------------------------------ schema, autograd
def _fake_forward(tokens: Tensor, lengths: Tensor, static_inputs: Tensor, h0: Tensor, c0: Tensor,
                  *args: Any) -> tuple[Tensor, ...]:  # fmt: skip
    time, (sequences, size) = tokens.shape[1], h0.shape
    kept = kernel_keeps(h0, static_inputs, args[-1])
    return (
        h0.new_empty(sequences, time, size),
        h0.new_empty(h0.shape),
        h0.new_empty(h0.shape),
        *(static_inputs.new_empty((sequences * time, c) if kept else (0, 0)) for c in (8 * size, 2, size)),
    )


def _fake_backward(grad_hidden: Any, grad_h_n: Any, grad_c_n: Any, hidden: Tensor, normalized: Tensor,
                   inverses: Tensor, cells: Tensor, tokens: Tensor, lengths: Tensor,
                   *likes: Any) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(like.new_empty(like.shape) for like in likes[:8])


_OPERANDS = (
    "Tensor tokens, Tensor lengths, Tensor static_inputs, Tensor h0, Tensor c0, Tensor embedding, "
    "Tensor weight_input, Tensor weight_hh, Tensor norm_gates, Tensor norm_cell, Tensor seed, float word_dropout, "
    "int unk_index, float eps"
)
_forward = register(
    f"layer_norm_lstm_decode({_OPERANDS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_op,
    fake=_fake_forward,
    cpu=_cpu_forward,
    cuda=triton_forward("layer_norm_lstm", _reference_op),
)
_backward = register(
    "layer_norm_lstm_decode_backward(Tensor? grad_hidden, Tensor? grad_h_n, Tensor? grad_c_n, Tensor hidden, "
    f"Tensor normalized, Tensor inverses, Tensor cells, {_OPERANDS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=_fake_backward,
    cpu=_cpu_backward,
    cuda=triton_backward("layer_norm_lstm", reference_backward, outputs=3, saved=3),
)


class _LayerNormLSTMDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, lengths: Tensor, static_inputs: Tensor, h0: Tensor, c0: Tensor,
                embedding: Tensor, weight_input: Tensor, weight_hh: Tensor, norm_gates: Tensor, norm_cell: Tensor,
                seed: Tensor, word_dropout: float, unk_index: int,
                eps: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        operands = (
            tokens, lengths, static_inputs, h0, c0, embedding, weight_input, weight_hh, norm_gates, norm_cell, seed
        )  # fmt: skip
        keep = any(ctx.needs_input_grad)
        hidden, h_n, c_n, *kept = _forward(*operands, word_dropout, unk_index, eps, keep)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, *kept, *operands)
        ctx.options = word_dropout, unk_index, eps
        return hidden, h_n, c_n

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_hidden: Tensor | None, grad_h_n: Tensor | None,
                 grad_c_n: Tensor | None) -> tuple[Tensor | None, ...]:  # fmt: skip
        grads = _backward(grad_hidden, grad_h_n, grad_c_n, *ctx.saved_tensors, *ctx.options)
        needed = (g if n else None for g, n in zip(grads, ctx.needs_input_grad[2:10], strict=True))
        return None, None, *needed, None, None, None, None


# -------------------------------------------------------------------------------------------------- public
def layer_norm_lstm_decode(
    tokens: Tensor,
    z: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    embedding: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    norm_input: Tensor,
    norm_hidden: Tensor,
    norm_cell: Tensor,
    *,
    eps: float = 1e-5,
    lengths: Tensor | None = None,
    word_dropout: float = 0.0,
    unk_index: int | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer-normalized LSTM over embedded tokens, with the latent as an input at every step.

    Args:
        tokens, z, h0, c0, embedding, weight_ih, weight_hh: as for :func:`fastvae.functional.lstm_decode`; several
            samples of the latent share the gather and the token's product, not its normalization.
        bias: (4 * hidden,), added to the normalized gates, or None.
        norm_input: (4 * hidden,), gain of the normalized product with weight_ih.
        norm_hidden: (4 * hidden,), gain of the normalized product with weight_hh.
        norm_cell: (2, hidden), gain and bias of the normalized cell, on its way to the hidden state.
        eps: added to the variances, above 0.
        lengths, word_dropout, unk_index, generator, seed: as for :func:`fastvae.functional.lstm_decode`.

    Returns:
        hidden and the last states, as :func:`fastvae.functional.lstm_decode`.

    Raises:
        TypeError, ValueError: naming the argument whose type, shape, device or value is wrong.
        IndexError: if a token is out of range (on CUDA the row becomes NaN instead, as checking would synchronise).
    """
    return _decode(
        "embedding", tokens, z, h0, c0, embedding, weight_ih, weight_hh, bias, norm_input, norm_hidden, norm_cell, eps,
        lengths, word_dropout=word_dropout, unk_index=unk_index, generator=generator, seed=seed,
    )  # fmt: skip


def layer_norm_lstm(
    inputs: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    norm_input: Tensor,
    norm_hidden: Tensor,
    norm_cell: Tensor,
    *,
    eps: float = 1e-5,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer-normalized LSTM over (batch, time, features), each sequence for its own length.

    Args:
        inputs: (batch, time, features).
        h0, c0, weight_hh, lengths: as for :func:`fastvae.functional.lstm`.
        weight_ih: (4 * hidden, features), gates in nn.LSTM's order i, f, g, o.
        bias, norm_input, norm_hidden, norm_cell, eps: as for :func:`layer_norm_lstm_decode`.

    Returns:
        hidden and the last states, as :func:`fastvae.functional.lstm`.

    Raises:
        TypeError, ValueError: naming the argument whose type, shape, device or value is wrong.
    """
    words, rows = positions_as_words(inputs)
    return _decode(
        "inputs", words, None, h0, c0, rows, weight_ih, weight_hh, bias, norm_input, norm_hidden, norm_cell, eps,
        lengths, word_dropout=0.0,
    )  # fmt: skip


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
    norm_input: Tensor,
    norm_hidden: Tensor,
    norm_cell: Tensor,
    eps: float,
    lengths: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    # `source` is what the caller calls the embedding.
    check_float(source, embedding)
    embedding, weight_ih, weight_hh, bias, norm_input, norm_hidden, norm_cell = in_autocast_dtype(
        embedding, weight_ih, weight_hh, bias, norm_input, norm_hidden, norm_cell
    )
    gains = {"bias": bias, "norm_input": norm_input, "norm_hidden": norm_hidden}
    sequences, lengths, seed, word_dropout, unk_index = check_recurrence(
        source, 4, tokens, z, {"h0": h0, "c0": c0}, embedding, weight_ih, weight_hh, gains, lengths, **options
    )
    embed_size, size, compute = embedding.shape[1], weight_hh.shape[1], compute_dtype(embedding)
    check_like("norm_cell", norm_cell, source, embedding)
    check_shape("norm_cell", norm_cell, (2, size), "(2, hidden)")
    if not eps > 0:
        raise ValueError(f"eps: expected above 0, got {eps}")
    if c0 is h0:  # Dynamo refuses one tensor given twice to an autograd function
        c0 = h0.view_as(h0)
    h0, c0 = (state.flatten(0, -2).to(embedding.dtype) for state in (h0, c0))
    # The latent's part of the product does not change from step to step: one product per sequence.
    static_inputs = embedding.new_zeros((h0.shape[0], 4 * size))
    if z is not None:
        static_inputs = F.linear(z.flatten(0, -2).to(embedding.dtype), weight_ih[:, embed_size:])
    norm_gates = torch.stack([norm_input, norm_hidden, torch.zeros_like(norm_input) if bias is None else bias])
    operands = recorded(
        static_inputs.to(compute), h0, c0, embedding, weight_ih[:, :embed_size], weight_hh, norm_gates, norm_cell
    )
    outputs = _LayerNormLSTMDecode.apply(tokens, lengths, *operands, seed, word_dropout, unk_index, eps)
    hidden, h_n, c_n = with_samples(outputs, sequences)
    return hidden, h_n, c_n
