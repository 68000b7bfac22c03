"""LSTM over embedded tokens with word dropout in the gather and the latent's term added at every step.

What: ``gates[b, t] = weight_input @ embedding[word(b, t)] + static_gates[b] + weight_hh @ h[b, t - 1]``, then
the usual LSTM update (gates i, f, g, o); the definition is the reference in ``fastvae/ops/lstm.py``.

Why: eager PyTorch writes a mask, the replaced tokens and a concatenation of latent and embedding at every
step. Here the gather draws the dropout itself; one product projects all B*T inputs (8*B*T*E*H FLOPs, cuBLAS);
each step is one launch that makes the recurrent product (8*B*H*H FLOPs), the gates and the state without a
byte in between. A step at B = 32, H = 256 reads 1 MB of weights, which stay in L2: it is bound by the launch,
so capture the loop in a CUDA graph.

How: a program of a step owns 16 sequences by 32 hidden units and their four gates. The state after step t is
hidden[:, t] itself, so steps need no barrier but the launch. Blocks of sequences which all have ended skip
the product: batches sorted by length save it for their padding. Backward walks the steps in reverse, again
one launch each: the product with the next step's gate gradients, then this step's; weight gradients are plain
products over all steps afterwards. Nothing random is stored, and no atomics are used in float: the
embedding's gradient is PyTorch's own sorted reduction.

Limits: float32, bfloat16 and float16, static_gates in float32; contiguous operands; any B, T, E, H. Kept for
backward: gates (N, T, 4 * H) and cells (N, T, H) in float32, unwritten in the padding. In 16-bit the hidden
state is rounded at every step and the cell state is not. A token out of range makes its sequence NaN from
there on, and so the gradients. float32 products follow ``torch.set_float32_matmul_precision`` (see
``precision.py``).

Source: Hochreiter & Schmidhuber 1997; word dropout: Bowman et al. 2016.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.precision import UPCAST_OPERANDS, dot_precision
from fastvae.kernels.random import uniform

_BLOCK_B, _BLOCK_H, _BLOCK_K = 16, 32, 32
_EMBED_TILE = 1024


def forward(
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
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the LSTM over all steps.

    Args:
        tokens: int64 (B, T).
        lengths: int64 (B,), valid steps of each sequence, in [0, T].
        static_gates: float32 (N, 4 * H), added to the gates at every step; N is a multiple of B, and sequence n
            reads the tokens of n modulo B.
        h0, c0: (N, H), float32, bfloat16 or float16, as all that follow.
        embedding: (V, E).
        weight_input: (4 * H, E).
        weight_hh: (4 * H, H).
        seed: int64 (1,).
        word_dropout: probability that a word is replaced; not at step 0.
        unk_index: the replacement.
        keep: whether :func:`backward` will follow.

    Returns:
        hidden (N, T, H), zero at steps >= length; h_n and c_n (N, H), the state after the last valid step;
        activated gates (N * T, 4 * H) and cells (N * T, H), float32, for :func:`backward`: (0, 0) if not kept.
    """
    _check_dtype(embedding)
    (batch, time), (sequences, hidden_size) = tokens.shape, h0.shape
    options = {"dtype": torch.float32, "device": h0.device}
    hidden = torch.empty((sequences, time, hidden_size), dtype=h0.dtype, device=h0.device)
    kept = sequences * time if keep else 0
    gates = torch.empty((kept, 4 * hidden_size if keep else 0), **options)
    cells = torch.empty((kept, hidden_size if keep else 0), **options)
    h_n, c_n = h0.clone(), c0.clone()
    if hidden.numel() == 0:
        return hidden, h_n, c_n, gates, cells
    # Without a backward to come, one running cell for each sequence.
    step_cells = cells if keep else torch.empty((sequences, hidden_size), **options)
    inputs, _ = _embed(tokens, lengths, embedding, seed, word_dropout, unk_index)
    projected = inputs @ weight_input.t()
    for step in range(time):
        _lstm_step_kernel[_step_grid(sequences, hidden_size)](
            projected, static_gates, h0, c0, weight_hh, lengths, hidden, h_n, c_n, gates, step_cells,
            sequences, batch, time, step, hidden_size,
            KEEP=keep, **_step_options(),
        )  # fmt: skip
    return hidden, h_n, c_n, gates, cells


def backward(
    grad_hidden: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor,
    hidden: Tensor,
    gates: Tensor,
    cells: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    h0: Tensor,
    c0: Tensor,
    embedding: Tensor,
    weight_input: Tensor,
    weight_hh: Tensor,
    seed: Tensor,
    word_dropout: float,
    unk_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`; arguments as there.

    Args:
        grad_hidden: (N, T, H), like `hidden`.
        grad_h_n, grad_c_n: (N, H), like `h0`.
        hidden, gates, cells: what :func:`forward` returned.

    Returns:
        Gradients of static_gates (float32), h0, c0, embedding, weight_input and weight_hh.
    """
    _check_dtype(embedding)
    (batch, time), (sequences, hidden_size) = tokens.shape, h0.shape
    grad_cell = torch.zeros((sequences, hidden_size), dtype=torch.float32, device=h0.device)
    if hidden.numel() == 0:
        grad_static_gates = grad_cell.new_zeros((sequences, 4 * hidden_size))
        weights = (torch.zeros_like(w) for w in (embedding, weight_input, weight_hh))
        return grad_static_gates, grad_h_n.clone(), grad_c_n.clone(), *weights
    grad_gates = torch.empty((sequences, time, 4 * hidden_size), dtype=h0.dtype, device=h0.device)
    for step in reversed(range(time)):
        _lstm_step_backward_kernel[_step_grid(sequences, hidden_size)](
            grad_hidden, grad_h_n, grad_c_n, gates, cells, c0, weight_hh, lengths, grad_gates, grad_cell,
            sequences, batch, time, step, hidden_size,
            **_step_options(),
        )  # fmt: skip
    samples = sequences // batch
    empty = (lengths == 0).repeat(samples)[:, None]
    grad_h0 = torch.where(empty, grad_h_n, grad_gates[:, 0] @ weight_hh)
    grad_c0 = torch.where(empty, grad_c_n, grad_cell.to(c0.dtype))

    previous = torch.cat([h0.unsqueeze(1), hidden[:, :-1]], 1).view(sequences * time, hidden_size)
    grad_static_gates = grad_gates.sum(1, dtype=torch.float32)
    grad_gates = grad_gates.view(sequences * time, 4 * hidden_size)
    grad_weight_hh = grad_gates.t() @ previous
    if samples > 1:  # they read the same tokens
        shared = grad_gates.view(samples, batch * time, 4 * hidden_size).sum(0, dtype=torch.float32)
        grad_gates = shared.to(h0.dtype)
    inputs, words = _embed(tokens, lengths, embedding, seed, word_dropout, unk_index)
    grad_embedding = torch.ops.aten.embedding_dense_backward(
        grad_gates @ weight_input, words, embedding.shape[0], -1, False
    )
    return grad_static_gates, grad_h0, grad_c0, grad_embedding, grad_gates.t() @ inputs, grad_weight_hh


def _embed(
    tokens: Tensor,
    lengths: Tensor,
    embedding: Tensor,
    seed: Tensor,
    word_dropout: float,
    unk_index: int,
) -> tuple[Tensor, Tensor]:
    """Return the inputs (B * T, E) after word dropout, 0 in the padding, and their words (B * T,)."""
    (batch, time), (vocabulary, embed_size) = tokens.shape, embedding.shape
    inputs = torch.empty((batch * time, embed_size), dtype=embedding.dtype, device=embedding.device)
    words = torch.empty(batch * time, dtype=torch.int64, device=tokens.device)
    block_embed = min(triton.next_power_of_2(max(embed_size, 16)), 256)
    block_rows = _EMBED_TILE // block_embed
    grid = (triton.cdiv(batch * time, block_rows), max(triton.cdiv(embed_size, block_embed), 1))
    _lstm_embed_kernel[grid](
        tokens, lengths, seed, embedding, inputs, words,
        batch * time, time, embed_size, vocabulary, unk_index, float(word_dropout),
        BLOCK_N=block_rows, BLOCK_E=block_embed, num_warps=4,
    )  # fmt: skip
    return inputs, words


def _check_dtype(embedding: Tensor) -> None:
    if embedding.dtype == torch.float64:
        raise TypeError("embedding: expected float32, bfloat16 or float16, got torch.float64")


def _step_grid(sequences: int, hidden_size: int) -> tuple[int, int]:
    return triton.cdiv(sequences, _BLOCK_B), triton.cdiv(hidden_size, _BLOCK_H)


def _step_options() -> dict[str, int | str]:
    return {
        "UPCAST": UPCAST_OPERANDS, "PRECISION": dot_precision(),
        "BLOCK_B": _BLOCK_B, "BLOCK_H": _BLOCK_H, "BLOCK_K": _BLOCK_K, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


@triton.jit
def _tanh(x):
    # Series near 0, where the quotient would lose its relative accuracy; there is no tanh without libdevice.
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0))))
    return tl.where(square < 0.01, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit(do_not_specialize=["total", "time", "vocabulary", "unk_index", "word_dropout"])
def _lstm_embed_kernel(
    tokens_ptr,  # (B, T) int64
    lengths_ptr,  # (B,) int64
    seed_ptr,  # (1,) int64
    embedding_ptr,  # (V, E)
    inputs_ptr,  # (B * T, E)
    words_ptr,  # (B * T,) int64
    total,
    time,
    embed_size,
    vocabulary,
    unk_index,
    word_dropout,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = row < total
    step = row % time
    inside = mask & (step < tl.load(lengths_ptr + row // time, mask=mask, other=0))
    word = tl.load(tokens_ptr + row, mask=inside, other=0)
    drop = (step > 0) & (uniform(tl.load(seed_ptr), row) < word_dropout)
    word = tl.where(inside & drop, unk_index, word)
    valid = inside & (word >= 0) & (word < vocabulary)
    value = tl.load(
        embedding_ptr + word[:, None] * embed_size + column[None, :],
        mask=valid[:, None] & (column < embed_size)[None, :],
        other=0.0,
    ).to(tl.float32)
    # A word out of range must not pass for another one.
    value = tl.where(inside[:, None] & (valid[:, None] == 0), float("nan"), value)
    tl.store(
        inputs_ptr + row[:, None] * embed_size + column[None, :],
        value.to(inputs_ptr.dtype.element_ty),
        mask=mask[:, None] & (column < embed_size)[None, :],
    )
    # Only for the scatter of the gradient, which is 0 in the padding and NaN where the word is out of range.
    if tl.program_id(1) == 0:
        tl.store(words_ptr + row, tl.where(valid, word, 0), mask=mask)


@triton.jit(do_not_specialize=["sequences", "batch", "time", "step"])
def _lstm_step_kernel(
    projected_ptr,  # (B * T, 4 * H)
    static_gates_ptr,  # (N, 4 * H) float32
    h0_ptr,  # (N, H)
    c0_ptr,  # (N, H)
    weight_ptr,  # (4 * H, H)
    lengths_ptr,  # (B,) int64
    hidden_ptr,  # (N, T, H): reads step - 1, writes step
    h_n_ptr,  # (N, H)
    c_n_ptr,  # (N, H)
    gates_ptr,  # (N * T, 4 * H) float32, if KEEP
    cells_ptr,  # float32; KEEP: (N * T, H), reads step - 1, writes step; else (N, H), in place
    sequences,
    batch,
    time,
    step,
    hidden_size,
    KEEP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    length = tl.load(lengths_ptr + row % batch, mask=row < sequences, other=0)
    active = step < length
    mask = active[:, None] & (unit < hidden_size)[None, :]
    state = row[:, None] * hidden_size + unit[None, :]
    place = row * time + step
    output = place[:, None] * hidden_size + unit[None, :]
    cell_offset = output if KEEP else state

    if step == 0:
        previous_ptr = h0_ptr + row * hidden_size
        previous_cell = tl.load(c0_ptr + state, mask=mask, other=0.0).to(tl.float32)
    else:
        previous_ptr = hidden_ptr + (place - 1) * hidden_size
        previous_offset = cell_offset - hidden_size if KEEP else cell_offset
        previous_cell = tl.load(cells_ptr + previous_offset, mask=mask, other=0.0)

    gate_i = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    gate_f = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    gate_g = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    gate_o = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    # No product where all sequences have ended.
    end = tl.max(active.to(tl.int32), axis=0) * hidden_size
    for start in range(0, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = tl.load(previous_ptr[:, None] + k[None, :], mask=active[:, None] & (k < hidden_size)[None, :], other=0.0)
        weight_mask = (unit < hidden_size)[None, :] & (k < hidden_size)[:, None]
        weight_i_ptr = weight_ptr + unit[None, :] * hidden_size + k[:, None]
        weight_f_ptr = weight_ptr + (unit + hidden_size)[None, :] * hidden_size + k[:, None]
        weight_g_ptr = weight_ptr + (unit + 2 * hidden_size)[None, :] * hidden_size + k[:, None]
        weight_o_ptr = weight_ptr + (unit + 3 * hidden_size)[None, :] * hidden_size + k[:, None]
        weight_i = tl.load(weight_i_ptr, mask=weight_mask, other=0.0)
        weight_f = tl.load(weight_f_ptr, mask=weight_mask, other=0.0)
        weight_g = tl.load(weight_g_ptr, mask=weight_mask, other=0.0)
        weight_o = tl.load(weight_o_ptr, mask=weight_mask, other=0.0)
        if UPCAST:
            h = h.to(tl.float32)
            weight_i = weight_i.to(tl.float32)
            weight_f = weight_f.to(tl.float32)
            weight_g = weight_g.to(tl.float32)
            weight_o = weight_o.to(tl.float32)
        gate_i = tl.dot(h, weight_i, gate_i, input_precision=PRECISION)
        gate_f = tl.dot(h, weight_f, gate_f, input_precision=PRECISION)
        gate_g = tl.dot(h, weight_g, gate_g, input_precision=PRECISION)
        gate_o = tl.dot(h, weight_o, gate_o, input_precision=PRECISION)

    static = static_gates_ptr + row[:, None] * 4 * hidden_size + unit[None, :]
    projected = projected_ptr + (row % batch * time + step)[:, None] * 4 * hidden_size + unit[None, :]
    gate_i += tl.load(static, mask=mask, other=0.0)
    gate_f += tl.load(static + hidden_size, mask=mask, other=0.0)
    gate_g += tl.load(static + 2 * hidden_size, mask=mask, other=0.0)
    gate_o += tl.load(static + 3 * hidden_size, mask=mask, other=0.0)
    gate_i += tl.load(projected, mask=mask, other=0.0).to(tl.float32)
    gate_f += tl.load(projected + hidden_size, mask=mask, other=0.0).to(tl.float32)
    gate_g += tl.load(projected + 2 * hidden_size, mask=mask, other=0.0).to(tl.float32)
    gate_o += tl.load(projected + 3 * hidden_size, mask=mask, other=0.0).to(tl.float32)
    gate_i = tl.sigmoid(gate_i)
    gate_f = tl.sigmoid(gate_f)
    gate_g = _tanh(gate_g)
    gate_o = tl.sigmoid(gate_o)
    cell = gate_f * previous_cell + gate_i * gate_g
    h = gate_o * _tanh(cell)

    if KEEP:
        gates = gates_ptr + place[:, None] * 4 * hidden_size + unit[None, :]
        tl.store(gates, gate_i, mask=mask)
        tl.store(gates + hidden_size, gate_f, mask=mask)
        tl.store(gates + 2 * hidden_size, gate_g, mask=mask)
        tl.store(gates + 3 * hidden_size, gate_o, mask=mask)
    tl.store(cells_ptr + cell_offset, cell, mask=mask)
    h = tl.where(mask, h, 0.0).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + output, h, mask=(row < sequences)[:, None] & (unit < hidden_size)[None, :])
    last = mask & (step == length - 1)[:, None]
    tl.store(h_n_ptr + state, h, mask=last)
    tl.store(c_n_ptr + state, cell.to(c_n_ptr.dtype.element_ty), mask=last)


@triton.jit(do_not_specialize=["sequences", "batch", "time", "step"])
def _lstm_step_backward_kernel(
    grad_hidden_ptr,  # (N, T, H)
    grad_h_n_ptr,  # (N, H)
    grad_c_n_ptr,  # (N, H)
    gates_ptr,  # (N, T, 4 * H) float32
    cells_ptr,  # (N, T, H) float32
    c0_ptr,  # (N, H)
    weight_ptr,  # (4 * H, H)
    lengths_ptr,  # (B,) int64
    grad_gates_ptr,  # (N, T, 4 * H): reads step + 1, writes step
    grad_cell_ptr,  # (N, H) float32, in place: gradient of the cell after the step, then of the one before it
    sequences,
    batch,
    time,
    step,
    hidden_size,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    length = tl.load(lengths_ptr + row % batch, mask=row < sequences, other=0)
    active = step < length
    mask = active[:, None] & (unit < hidden_size)[None, :]
    state = row[:, None] * hidden_size + unit[None, :]
    place = row * time + step

    # Through the next step's gates, for the sequences that have a next step.
    grad_h = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    continues = step + 1 < length
    end = tl.max(continues.to(tl.int32), axis=0) * 4 * hidden_size
    next_ptr = grad_gates_ptr + (place + 1) * 4 * hidden_size
    for start in range(0, end, BLOCK_K):
        k = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_K)
        grad_next = tl.load(
            next_ptr[:, None] + k[None, :],
            mask=continues[:, None] & (k < 4 * hidden_size)[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + k[:, None] * hidden_size + unit[None, :],
            mask=(k < 4 * hidden_size)[:, None] & (unit < hidden_size)[None, :],
            other=0.0,
        )
        if UPCAST:
            grad_next = grad_next.to(tl.float32)
            weight = weight.to(tl.float32)
        grad_h = tl.dot(grad_next, weight, grad_h, input_precision=PRECISION)

    output = place[:, None] * hidden_size + unit[None, :]
    last = mask & (step == length - 1)[:, None]
    grad_h += tl.load(grad_hidden_ptr + output, mask=mask, other=0.0).to(tl.float32)
    grad_h += tl.load(grad_h_n_ptr + state, mask=last, other=0.0).to(tl.float32)
    grad_cell = tl.load(grad_cell_ptr + state, mask=mask, other=0.0)
    grad_cell += tl.load(grad_c_n_ptr + state, mask=last, other=0.0).to(tl.float32)

    gate = place[:, None] * 4 * hidden_size + unit[None, :]
    gates = gates_ptr + gate
    gate_i = tl.load(gates, mask=mask, other=0.0)
    gate_f = tl.load(gates + hidden_size, mask=mask, other=0.0)
    gate_g = tl.load(gates + 2 * hidden_size, mask=mask, other=0.0)
    gate_o = tl.load(gates + 3 * hidden_size, mask=mask, other=0.0)
    tanh_cell = _tanh(tl.load(cells_ptr + output, mask=mask, other=0.0))
    if step == 0:
        previous_cell = tl.load(c0_ptr + state, mask=mask, other=0.0).to(tl.float32)
    else:
        previous_cell = tl.load(cells_ptr + output - hidden_size, mask=mask, other=0.0)

    # Everything read is 0 where the sequence has ended, hence so are the gradients.
    grad_cell += grad_h * gate_o * (1.0 - tanh_cell * tanh_cell)
    grad_i = grad_cell * gate_g * gate_i * (1.0 - gate_i)
    grad_f = grad_cell * previous_cell * gate_f * (1.0 - gate_f)
    grad_g = grad_cell * gate_i * (1.0 - gate_g * gate_g)
    grad_o = grad_h * tanh_cell * gate_o * (1.0 - gate_o)

    element = grad_gates_ptr.dtype.element_ty
    store_mask = (row < sequences)[:, None] & (unit < hidden_size)[None, :]
    grad_gates = grad_gates_ptr + gate
    tl.store(grad_gates, grad_i.to(element), mask=store_mask)
    tl.store(grad_gates + hidden_size, grad_f.to(element), mask=store_mask)
    tl.store(grad_gates + 2 * hidden_size, grad_g.to(element), mask=store_mask)
    tl.store(grad_gates + 3 * hidden_size, grad_o.to(element), mask=store_mask)
    tl.store(grad_cell_ptr + state, grad_cell * gate_f, mask=mask)
