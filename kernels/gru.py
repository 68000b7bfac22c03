"""GRU over embedded tokens with word dropout in the gather and the latent's term added at every step.

What: r, z, n of torch.nn.GRU, whose recurrent share m of n is multiplied by r; ``static_gates`` holds what is added to
m, r, z and n at every step of a sequence. The definition is the reference in ``fastvae/ops/gru.py``.

Why, how: as the step kernels of the LSTM in ``lstm.py``: one product projects all B*T inputs
(6*B*T*E*H FLOPs, cuBLAS), and a step is one launch that makes the recurrent product (6*N*H*H FLOPs), the gates and
the state without a byte in between, bound by the launch where the weights stay in L2. Samples are rows of a step that
share their sequence's projected inputs. Backward walks the steps in reverse, one launch each. What reaches a state
past the recurrent product, through h = n + z * (h - n), is kept in float32 between the steps. No atomics in float.

Limits: float32, bfloat16 and float16, static_gates in float32; contiguous operands; any N, B, T, E, H. Kept for
backward: gates (N * T, 4 * H) in float32, unwritten in the padding. In 16-bit the hidden state is rounded at every
step. A token out of range makes its sequence NaN from there on, and so the gradients. float32 products follow
``torch.set_float32_matmul_precision`` (see ``precision.py``).

Source: Cho et al. 2014, as torch.nn.GRU; word dropout: Bowman et al. 2016.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.recurrence import (
    check_dtype,
    embed,
    input_gradients,
    previous_states,
    step_grid,
    step_options,
    tanh,
)


def forward(
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
    """Run the GRU over all steps.

    Args:
        tokens: int64 (B, T).
        lengths: int64 (B,), valid steps of each sequence, in [0, T].
        static_gates: float32 (N, 4 * H), added to m, r, z, n at every step; N is a multiple of B, and sequence n
            reads the tokens of n modulo B.
        h0: (N, H), float32, bfloat16 or float16, as all that follow.
        embedding: (V, E).
        weight_input: (3 * H, E).
        weight_hh: (3 * H, H).
        seed: int64 (1,).
        word_dropout: probability that a word is replaced; not at step 0.
        unk_index: the replacement.
        keep: whether :func:`backward` will follow.

    Returns:
        hidden (N, T, H), zero at steps >= length; h_n (N, H), the state after the last valid step; m and the
        activated r, z, n (N * T, 4 * H), float32, for :func:`backward`, empty without `keep`.
    """
    check_dtype(embedding)
    (batch, time), (rows, size) = tokens.shape, h0.shape
    hidden = torch.empty((rows, time, size), dtype=h0.dtype, device=h0.device)
    gates = torch.empty((rows * time if keep else 0, 4 * size if keep else 0), dtype=torch.float32, device=h0.device)
    h_n = h0.clone()
    if hidden.numel() == 0:
        return hidden, h_n, gates
    inputs, _ = embed(tokens, lengths, embedding, seed, word_dropout, unk_index)
    projected = inputs @ weight_input.t()
    for step in range(time):
        _gru_step_kernel[step_grid(rows, size)](
            projected, static_gates, h0, weight_hh, lengths, hidden, h_n, gates,
            rows, batch, time, step, size,
            KEEP=int(keep), **step_options(),
        )  # fmt: skip
    return hidden, h_n, gates


def backward(
    grad_hidden: Tensor,
    grad_h_n: Tensor,
    hidden: Tensor,
    gates: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    h0: Tensor,
    embedding: Tensor,
    weight_input: Tensor,
    weight_hh: Tensor,
    seed: Tensor,
    word_dropout: float,
    unk_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`; arguments as there.

    Args:
        grad_hidden: (N, T, H), like `hidden`.
        grad_h_n: (N, H), like `h0`.
        hidden, gates: what :func:`forward` returned.

    Returns:
        Gradients of static_gates (float32), h0, embedding, weight_input and weight_hh.
    """
    check_dtype(embedding)
    (batch, time), (rows, size) = tokens.shape, h0.shape
    if hidden.numel() == 0:
        grad_static_gates = torch.zeros((rows, 4 * size), dtype=torch.float32, device=h0.device)
        return grad_static_gates, grad_h_n.clone(), *(torch.zeros_like(w) for w in (embedding, weight_input, weight_hh))
    grad_gates = torch.empty((rows, time, 4 * size), dtype=h0.dtype, device=h0.device)
    grad_kept = grad_h_n.float() if grad_h_n.dtype != torch.float32 else grad_h_n.clone()
    for step in reversed(range(time)):
        _gru_step_backward_kernel[step_grid(rows, size)](
            grad_hidden, gates, hidden, h0, weight_hh, lengths, grad_gates, grad_kept,
            rows, batch, time, step, size,
            **step_options(),
        )  # fmt: skip
    grad_static_gates = grad_gates.sum(1, dtype=torch.float32)
    # Columns m, r, z are the recurrence's, r, z, n the input's.
    through_step_0 = grad_gates[:, 0, : 3 * size] @ weight_hh.roll(size, 0)
    grad_h0 = (grad_kept + through_step_0).to(h0.dtype)

    grad_gates = grad_gates.flatten(0, 1)
    grad_weight_hh = (grad_gates[:, : 3 * size].t() @ previous_states(h0, hidden)).roll(-size, 0)
    inputs = tokens, lengths, embedding, seed, word_dropout, unk_index
    return grad_static_gates, grad_h0, *input_gradients(grad_gates[:, size:], weight_input, *inputs), grad_weight_hh


@triton.jit(do_not_specialize=["rows", "batch", "time", "step"])
def _gru_step_kernel(
    projected_ptr,  # (B * T, 3 * H)
    static_gates_ptr,  # (N, 4 * H) float32
    h0_ptr,  # (N, H)
    weight_ptr,  # (3 * H, H)
    lengths_ptr,  # (B,) int64
    hidden_ptr,  # (N, T, H): reads step - 1, writes step
    h_n_ptr,  # (N, H)
    gates_ptr,  # (N, T, 4 * H) float32
    rows,
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
    length = tl.load(lengths_ptr + row % batch, mask=row < rows, other=0)
    active = step < length
    mask = active[:, None] & (unit < hidden_size)[None, :]
    state = row[:, None] * hidden_size + unit[None, :]
    place = row * time + step

    previous_ptr = h0_ptr + row * hidden_size if step == 0 else hidden_ptr + (place - 1) * hidden_size
    gate_r = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    gate_z = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    gate_m = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    # No product where all sequences have ended.
    end = tl.max(active.to(tl.int32), axis=0) * hidden_size
    for start in range(0, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = tl.load(previous_ptr[:, None] + k[None, :], mask=active[:, None] & (k < hidden_size)[None, :], other=0.0)
        weight_mask = (unit < hidden_size)[None, :] & (k < hidden_size)[:, None]
        weight_r = tl.load(weight_ptr + unit[None, :] * hidden_size + k[:, None], mask=weight_mask, other=0.0)
        weight_z_ptr = weight_ptr + (unit + hidden_size)[None, :] * hidden_size + k[:, None]
        weight_m_ptr = weight_ptr + (unit + 2 * hidden_size)[None, :] * hidden_size + k[:, None]
        weight_z = tl.load(weight_z_ptr, mask=weight_mask, other=0.0)
        weight_m = tl.load(weight_m_ptr, mask=weight_mask, other=0.0)
        if UPCAST:
            h = h.to(tl.float32)
            weight_r = weight_r.to(tl.float32)
            weight_z = weight_z.to(tl.float32)
            weight_m = weight_m.to(tl.float32)
        gate_r = tl.dot(h, weight_r, gate_r, input_precision=PRECISION)
        gate_z = tl.dot(h, weight_z, gate_z, input_precision=PRECISION)
        gate_m = tl.dot(h, weight_m, gate_m, input_precision=PRECISION)

    static = static_gates_ptr + row[:, None] * 4 * hidden_size + unit[None, :]
    projected = projected_ptr + (row % batch * time + step)[:, None] * 3 * hidden_size + unit[None, :]
    gate_m += tl.load(static, mask=mask, other=0.0)
    gate_r += tl.load(static + hidden_size, mask=mask, other=0.0)
    gate_z += tl.load(static + 2 * hidden_size, mask=mask, other=0.0)
    gate_n = tl.load(static + 3 * hidden_size, mask=mask, other=0.0)
    gate_r += tl.load(projected, mask=mask, other=0.0).to(tl.float32)
    gate_z += tl.load(projected + hidden_size, mask=mask, other=0.0).to(tl.float32)
    gate_n += tl.load(projected + 2 * hidden_size, mask=mask, other=0.0).to(tl.float32)
    gate_r = tl.sigmoid(gate_r)
    gate_z = tl.sigmoid(gate_z)
    gate_n = tanh(gate_n + gate_r * gate_m)
    previous = tl.load(previous_ptr[:, None] + unit[None, :], mask=mask, other=0.0).to(tl.float32)
    h = gate_n + gate_z * (previous - gate_n)

    if KEEP:
        gates = gates_ptr + place[:, None] * 4 * hidden_size + unit[None, :]
        tl.store(gates, gate_m, mask=mask)
        tl.store(gates + hidden_size, gate_r, mask=mask)
        tl.store(gates + 2 * hidden_size, gate_z, mask=mask)
        tl.store(gates + 3 * hidden_size, gate_n, mask=mask)
    h = tl.where(mask, h, 0.0).to(hidden_ptr.dtype.element_ty)
    store_mask = (row < rows)[:, None] & (unit < hidden_size)[None, :]
    tl.store(hidden_ptr + place[:, None] * hidden_size + unit[None, :], h, mask=store_mask)
    tl.store(h_n_ptr + state, h, mask=mask & (step == length - 1)[:, None])


@triton.jit(do_not_specialize=["rows", "batch", "time", "step"])
def _gru_step_backward_kernel(
    grad_hidden_ptr,  # (N, T, H)
    gates_ptr,  # (N, T, 4 * H) float32
    hidden_ptr,  # (N, T, H)
    h0_ptr,  # (N, H)
    weight_ptr,  # (3 * H, H)
    lengths_ptr,  # (B,) int64
    grad_gates_ptr,  # (N, T, 4 * H): reads step + 1, writes step
    grad_kept_ptr,  # (N, H) float32, in place: gradient that passes by the recurrent product; h_n's at first
    rows,
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
    length = tl.load(lengths_ptr + row % batch, mask=row < rows, other=0)
    active = step < length
    mask = active[:, None] & (unit < hidden_size)[None, :]
    state = row[:, None] * hidden_size + unit[None, :]
    place = row * time + step

    # Through the next step's m, r, z, for the sequences that have a next step.
    grad_h = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    continues = step + 1 < length
    end = tl.max(continues.to(tl.int32), axis=0) * 3 * hidden_size
    next_ptr = grad_gates_ptr + (place + 1) * 4 * hidden_size
    for start in range(0, end, BLOCK_K):
        k = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_K)
        grad_next = tl.load(
            next_ptr[:, None] + k[None, :],
            mask=continues[:, None] & (k < 3 * hidden_size)[None, :],
            other=0.0,
        )
        weight_row = tl.where(k < hidden_size, k + 2 * hidden_size, k - hidden_size)
        weight = tl.load(
            weight_ptr + weight_row[:, None] * hidden_size + unit[None, :],
            mask=(k < 3 * hidden_size)[:, None] & (unit < hidden_size)[None, :],
            other=0.0,
        )
        if UPCAST:
            grad_next = grad_next.to(tl.float32)
            weight = weight.to(tl.float32)
        grad_h = tl.dot(grad_next, weight, grad_h, input_precision=PRECISION)

    output = place[:, None] * hidden_size + unit[None, :]
    grad_h += tl.load(grad_hidden_ptr + output, mask=mask, other=0.0).to(tl.float32)
    grad_h += tl.load(grad_kept_ptr + state, mask=mask, other=0.0)
    gate = place[:, None] * 4 * hidden_size + unit[None, :]
    gates = gates_ptr + gate
    gate_m = tl.load(gates, mask=mask, other=0.0)
    gate_r = tl.load(gates + hidden_size, mask=mask, other=0.0)
    gate_z = tl.load(gates + 2 * hidden_size, mask=mask, other=0.0)
    gate_n = tl.load(gates + 3 * hidden_size, mask=mask, other=0.0)
    if step == 0:
        previous = tl.load(h0_ptr + state, mask=mask, other=0.0).to(tl.float32)
    else:
        previous = tl.load(hidden_ptr + output - hidden_size, mask=mask, other=0.0).to(tl.float32)

    # Everything read is 0 where the sequence has ended, hence so are the gradients.
    grad_n = grad_h * (1.0 - gate_z) * (1.0 - gate_n * gate_n)
    grad_z = grad_h * (previous - gate_n) * gate_z * (1.0 - gate_z)
    grad_r = grad_n * gate_m * gate_r * (1.0 - gate_r)

    element = grad_gates_ptr.dtype.element_ty
    store_mask = (row < rows)[:, None] & (unit < hidden_size)[None, :]
    grad_gates = grad_gates_ptr + gate
    tl.store(grad_gates, (grad_n * gate_r).to(element), mask=store_mask)
    tl.store(grad_gates + hidden_size, grad_r.to(element), mask=store_mask)
    tl.store(grad_gates + 2 * hidden_size, grad_z.to(element), mask=store_mask)
    tl.store(grad_gates + 3 * hidden_size, grad_n.to(element), mask=store_mask)
    tl.store(grad_kept_ptr + state, grad_h * gate_z, mask=mask)
