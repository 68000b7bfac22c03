"""LSTM decoding: embedding gather with word dropout, latent injection and the recurrence, as one op.

    gates[b, t] = weight_ih[:, :E] @ embedding[word(b, t)] + (weight_ih[:, E:] @ z[b] + bias) + weight_hh @ h[b, t-1]

The latent's term and the bias are one product per sequence, made by torch outside the op (`static_gates`), not a
concatenation at every step. Word dropout replaces an input token by `unk_index` where the uniform number of element
b * T + t of the seed's stream is below `word_dropout`; never at t = 0, which holds <s>, nor in the padding. Sequences
are processed packed: cost follows the tokens, not the padding, and nobody has to sort. Samples of a sequence differ
in latent and states only, so that gather and input product are made once for all of them.
Source: Hochreiter & Schmidhuber 1997 (as torch.nn.LSTM, gates i, f, g, o); word dropout: Bowman et al. 2016.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops.backend import (
    CORE,
    TRITON_MISSING,
    compute_dtype,
    first_order,
    in_autocast_dtype,
    kernel,
    large,
    pointer,
    recording,
    register,
)
from fastvae.ops.checks import check_device, check_float, check_index, check_like, check_seed, check_shape
from fastvae.ops.random import draw_seed, uniform


# ------------------------------------------------------------------------------------------------ reference
def dropped_tokens(tokens: Tensor, lengths: Tensor, seed: Tensor, word_dropout: float, unk_index: int) -> Tensor:
    """Return `tokens` (B, T) with word dropout applied and 0 in the padding: what the recurrence reads."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    offsets = torch.arange(tokens.numel(), device=tokens.device).reshape(tokens.shape)
    valid = positions < lengths[:, None]
    dropped = (uniform(seed, offsets) < word_dropout) & (positions > 0) & valid
    # The padding may hold anything, also what is no word.
    return torch.where(dropped, unk_index, tokens).where(valid, 0)


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


def sample_count(tokens: Tensor, h0: Tensor) -> int:
    """Return the number of samples of each sequence: N / B."""
    return h0.shape[0] // tokens.shape[0] if tokens.shape[0] else 1


def reference_backward(
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
    """Gradients of `reference` by autograd, for static_gates, h0, c0, embedding, weight_input and weight_hh."""
    with recording():
        inputs = [t.detach().requires_grad_() for t in (static_gates, h0, c0, embedding, weight_input, weight_hh)]
        gates_, h0_, c0_, embedding_, input_, hh_ = inputs
        outputs = reference(tokens, lengths, gates_, h0_, c0_, embedding_, input_, hh_, seed, word_dropout, unk_index)
    grads = (grad_hidden, grad_h_n, grad_c_n)
    # Without a single step the hidden states depend on nothing.
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    return torch.autograd.grad(
        [o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )


def _reference_op(tokens: Tensor, lengths: Tensor, static_gates: Tensor, *args: Any) -> tuple[Tensor, ...]:
    # The reference's backward starts afresh: nothing is kept for it.
    outputs = reference(tokens, lengths, static_gates, *args[:-1])
    return *outputs, static_gates.new_empty(0, 0), static_gates.new_empty(0, 0)


# ----------------------------------------------------------------------------------------------- C++ on CPU
class Packing(NamedTuple):
    """A batch packed step by step, longest sequences first (``PackedPlan`` and ``WordPacking`` in csrc/kernels.h)."""

    plan: tuple[int, ...]  # addresses for the core
    samples: int
    order: Tensor  # (B,) sequence of each rank
    words: Tensor  # (total,) after word dropout
    rows: Tensor  # (total,) b * T + t
    first: int  # packed rows of the first step
    keep: tuple[Tensor, ...]  # what `plan` points into

    def of_samples(self, index: Tensor, stride: int) -> Tensor:
        """Return the index of each sample, side by side; the next sample lies `stride` further."""
        if self.samples == 1:
            return index
        return (index[:, None] + stride * torch.arange(self.samples)).flatten()


def pack(
    tokens: Tensor,
    lengths: Tensor,
    h0: Tensor,
    vocabulary: int,
    seed: Tensor,
    word_dropout: float,
    unk_index: int,
) -> Packing:
    """Plan the steps of a batch, and make its words after word dropout.

    Raises:
        IndexError, ValueError: if a token or a length is out of range.
    """
    assert CORE is not None
    tokens, lengths = tokens.contiguous(), lengths.contiguous()
    batch, time = tokens.shape
    order, active, start = (torch.empty(n, dtype=torch.int64) for n in (batch, time, time))
    words, rows = torch.empty_like(tokens).view(-1), torch.empty_like(tokens).view(-1)
    total = CORE.pack_words(
        pointer(tokens), pointer(lengths), batch, time, vocabulary, pointer(seed), word_dropout, unk_index,
        pointer(order), pointer(active), pointer(start), pointer(words), pointer(rows),
    )  # fmt: skip
    if total <= CORE.BAD_TOKEN:
        b, t = divmod(CORE.BAD_TOKEN - total, time)
        raise IndexError(f"tokens: expected words in [0, {vocabulary}), got {int(tokens[b, t])} at [{b}, {t}]")
    if total < 0:
        b = CORE.BAD_LENGTH - total
        raise ValueError(f"lengths: expected values in [0, {time}], got {int(lengths[b])} at [{b}]")
    samples = sample_count(tokens, h0)
    addresses = (batch, samples, time, h0.shape[1], *(pointer(t) for t in (lengths, order, active, start)))
    first = int(active[0]) if time else 0
    return Packing(addresses, samples, order, words[:total], rows[:total], first, (lengths, active, start))


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
    samples, tokens_read = packing.samples, packing.words.numel()
    total, first = samples * tokens_read, samples * packing.first
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
    if samples > 1:  # they read the same token
        grad_gates = grad_gates.view(tokens_read, samples, 4 * size).sum(1)
    inputs = embedding.index_select(0, packing.words).to(compute)
    grad_inputs = grad_gates @ weight_input.to(compute)
    grad_embedding = torch.ops.aten.embedding_dense_backward(grad_inputs, packing.words, embedding.shape[0], -1, False)
    return (
        grad_static_gates,
        grad_h0.to(h0.dtype),
        grad_c0.to(c0.dtype),
        grad_embedding.to(embedding.dtype),
        (grad_gates.T @ inputs).to(weight_input.dtype),
        grad_weight_hh.to(weight_hh.dtype),
    )


def weight_scratch(weight: Tensor) -> Tensor:
    """Return memory for the core's own layout of a weight: columns in whole tiles, at most 32 wide."""
    return large(weight.new_empty(weight.shape[0] * (-(-weight.shape[1] // 32) * 32)))


# -------------------------------------------------------------------------------------------- Triton on CUDA
_triton_forward = kernel("lstm", "forward")
_triton_backward = kernel("lstm", "backward")


def _cuda_forward(tokens: Tensor, lengths: Tensor, static_gates: Tensor, *args: Any) -> tuple[Tensor, ...]:
    if static_gates.dtype == torch.float64:
        return _reference_op(tokens, lengths, static_gates, *args)
    *tensors, seed, word_dropout, unk_index, keep = args
    operands = [t.contiguous() for t in (tokens, lengths, static_gates, *tensors)]
    return _triton_forward(*operands, seed, word_dropout, unk_index, keep)


def _cuda_backward(
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
    *args: Any,
) -> tuple[Tensor, ...]:
    if static_gates.dtype == torch.float64:
        return reference_backward(
            grad_hidden, grad_h_n, grad_c_n, hidden, gates, cells, tokens, lengths, static_gates, h0, c0, *args
        )
    *weights, seed, word_dropout, unk_index = args
    grads = [
        torch.zeros_like(like) if grad is None else grad
        for grad, like in ((grad_hidden, hidden), (grad_h_n, h0), (grad_c_n, c0))
    ]
    operands = [t.contiguous() for t in (*grads, hidden, gates, cells, tokens, lengths, h0, c0, *weights)]
    return _triton_backward(*operands, seed, word_dropout, unk_index)


# ------------------------------------------------------------------------------------------ schema, autograd
def _fake_forward(tokens: Tensor, lengths: Tensor, static_gates: Tensor, h0: Tensor, c0: Tensor,
                  *args: Any) -> tuple[Tensor, ...]:  # fmt: skip
    time, (sequences, size) = tokens.shape[1], h0.shape
    kernels = h0.device.type == "cuda" and not TRITON_MISSING and static_gates.dtype == torch.float32
    kernels |= h0.device.type == "cpu" and CORE is not None
    kept = (sequences * time, size) if kernels and args[-1] else (0, 0)
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
    cuda=_cuda_forward,
)
_backward = register(
    "lstm_decode_backward(Tensor? grad_hidden, Tensor? grad_h_n, Tensor? grad_c_n, Tensor hidden, Tensor gates, "
    f"Tensor cells, {_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=_fake_backward,
    cpu=_cpu_backward,
    cuda=_cuda_backward,
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

    Equals ``nn.LSTM`` fed with [embedding of the token; z].

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
    check_float("inputs", inputs)
    if inputs.dim() != 3:
        raise ValueError(f"inputs: expected shape (batch, time, features), got {tuple(inputs.shape)}")
    # Every position is a word of its own.
    batch, time, features = inputs.shape
    words = torch.arange(batch * time, device=inputs.device).view(batch, time)
    rows = inputs.reshape(batch * time, features)
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
    sequences, lengths, seed, word_dropout, unk_index = check_recurrence(
        source, 4, tokens, z, {"h0": h0, "c0": c0}, embedding, weight_ih, weight_hh, {"bias": bias}, lengths, **options
    )
    batch, embed_size, hidden_size = tokens.shape[0], embedding.shape[1], weight_hh.shape[1]
    if c0 is h0:  # Dynamo refuses one tensor given twice to an autograd function
        c0 = h0.view_as(h0)
    rows = sequences[0] * batch if len(sequences) == 2 else batch
    # A latent's contribution does not change from step to step: one product per sequence.
    static_gates = embedding.new_zeros((rows, 4 * hidden_size)) if bias is None else bias.expand(rows, -1)
    if z is not None:
        static_gates = F.linear(z.reshape(rows, z.shape[-1]).to(embedding.dtype), weight_ih[:, embed_size:], bias)
    static_gates = static_gates.to(compute_dtype(embedding))
    h0, c0 = (state.reshape(rows, hidden_size).to(embedding.dtype) for state in (h0, c0))
    weight_input = weight_ih[:, :embed_size]
    if not torch.is_grad_enabled():  # needs_input_grad ignores it: the gates would be kept for nobody
        static_gates, h0, c0, embedding, weight_input, weight_hh = (
            t.detach() for t in (static_gates, h0, c0, embedding, weight_input, weight_hh)
        )
    hidden, h_n, c_n = _LSTMDecode.apply(
        tokens, lengths, static_gates, h0, c0, embedding, weight_input, weight_hh, seed, word_dropout, unk_index
    )  # fmt: skip
    if len(sequences) == 1:
        return hidden, h_n, c_n
    return tuple(t.reshape(*sequences, *t.shape[1:]) for t in (hidden, h_n, c_n))


def check_recurrence(
    source: str,
    gates: int,
    tokens: Tensor,
    z: Tensor | None,
    states: dict[str, Tensor],
    embedding: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    biases: dict[str, Tensor | None],
    lengths: Tensor | None,
    word_dropout: float,
    unk_index: int | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
) -> tuple[tuple[int, ...], Tensor, Tensor, float, int]:
    """Check the operands of a recurrence of `gates` gates, the embedding called `source`, and fill in what is None.

    Returns:
        ([samples,] batch) of the states, lengths, seed, word_dropout and unk_index.
    """
    check_index("tokens", tokens, source, embedding)
    check_like("weight_hh", weight_hh, source, embedding)
    if z is not None:
        check_float("z", z)
        check_device("z", z, source, embedding)
    for name, tensor, meaning in (
        ("tokens", tokens, "(batch, time)"),
        ("embedding", embedding, "(vocabulary, embed)"),
        ("weight_hh", weight_hh, f"({gates} * hidden, hidden)"),
    ):
        if tensor.dim() != 2:
            raise ValueError(f"{name}: expected shape {meaning}, got {tuple(tensor.shape)}")
    sampled, name = (states["h0"], "h0") if z is None else (z, "z")
    if sampled.dim() not in (2, 3):
        size = "hidden" if z is None else "latent"
        meaning = f"(batch, {size}) or (samples, batch, {size})"
        raise ValueError(f"{name}: expected shape {meaning}, got {tuple(sampled.shape)}")
    (batch, time), hidden_size, embed_size = tokens.shape, weight_hh.shape[1], embedding.shape[1]
    latent, sequences = 0 if z is None else z.shape[-1], (*sampled.shape[:-2], batch)
    layout = "(batch, hidden)" if sampled.dim() == 2 else "(samples, batch, hidden)"
    rows = gates * hidden_size
    check_shape("weight_hh", weight_hh, (rows, hidden_size), f"({gates} * hidden, hidden)")
    check_like("weight_ih", weight_ih, source, embedding)
    inputs = "features" if source == "inputs" else "embed + latent"
    check_shape("weight_ih", weight_ih, (rows, embed_size + latent), f"({gates} * hidden, {inputs})")
    for name, state in states.items():
        check_float(name, state)
        check_device(name, state, source, embedding)
        check_shape(name, state, (*sequences, hidden_size), layout)
    if z is not None:
        check_shape("z", z, (*sequences, latent), layout.replace("hidden", "latent"))
    for name, bias in biases.items():
        if bias is not None:
            check_like(name, bias, source, embedding)
            check_shape(name, bias, (rows,), f"({gates} * hidden,)")
    if lengths is None:
        lengths = torch.full((batch,), time, dtype=torch.int64, device=tokens.device)
    else:
        check_index("lengths", lengths, source, embedding)
        check_shape("lengths", lengths, (batch,), "(batch,)")
    if not 0.0 <= word_dropout <= 1.0:
        raise ValueError(f"word_dropout: expected a probability in [0, 1], got {word_dropout}")
    if word_dropout > 0 and unk_index is None:
        raise ValueError("unk_index: expected the index of <unk> when word_dropout > 0, got None")
    if word_dropout > 0 and not 0 <= unk_index < embedding.shape[0]:  # type: ignore[operator]
        raise ValueError(f"unk_index: expected a word in [0, {embedding.shape[0]}), got {unk_index}")
    if seed is not None and generator is not None:
        raise ValueError("seed: expected None when a generator is given, got both")
    if seed is not None:
        check_seed(seed, source, embedding)
    elif word_dropout > 0:
        seed = draw_seed(tokens.device, generator)
    else:
        seed = torch.zeros(1, dtype=torch.int64, device=tokens.device)
    return sequences, lengths, seed, word_dropout, -1 if unk_index is None else unk_index
