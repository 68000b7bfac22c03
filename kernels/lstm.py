"""LSTM over embedded tokens with word dropout in the gather and the latent's term added at every step.

What: ``gates[b, t] = weight_input @ embedding[word(b, t)] + static_gates[b] + weight_hh @ h[b, t - 1]``, then
the usual LSTM update (gates i, f, g, o); the definition is the reference in ``fastvae/ops/lstm.py``.

Why: eager PyTorch writes a mask, the replaced tokens and a concatenation of latent and embedding at every
step. Here the gather draws the dropout itself; one product projects all B*T inputs (8*B*T*E*H FLOPs, cuBLAS);
each step is one launch that makes the recurrent product (8*B*H*H FLOPs), the gates and the state without a
byte in between. A step at B = 32, H = 256 reads 1 MB of weights, which stay in L2: it is bound by the launch,
so capture the loop in a CUDA graph.

How: where the recurrent weights fit on chip (hidden sizes up to 128 in 16-bit, 64 in TF32, 32 in float32), a program
owns 16 sequences, holds the weights in registers and shared memory, and runs all steps up to the longest of its
sequences in one launch; the next step's inputs are loaded while one computes. Beyond, a step is a launch, whose
programs own 16 sequences by 32 hidden units and their four gates: the state after step t is hidden[:, t] itself, so
steps need no barrier but the launch, and sequences that have all ended skip the product. Backward walks the steps in
reverse, in one launch or a launch each: the product with the next step's gate gradients, then this step's; weight
gradients are plain products over all steps afterwards (see ``recurrence.py``).

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
from fastvae.kernels.recurrence import (
    BLOCK_B,
    check_dtype,
    embed,
    input_gradients,
    load_four,
    previous_states,
    step_grid,
    step_options,
    store_four,
    tanh,
)

_SHARED_BYTES = 99 << 10  # that every GPU since sm_80 gives a program


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
    check_dtype(embedding)
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
    inputs, _ = embed(tokens, lengths, embedding, seed, word_dropout, unk_index)
    projected = inputs @ weight_input.t()
    operands = (projected, static_gates, h0, c0, weight_hh, lengths, hidden, h_n, c_n, gates, step_cells)
    if _fits_chip(weight_hh):
        _lstm_sequence_kernel[(triton.cdiv(sequences, BLOCK_B),)](
            *operands, sequences, batch, time, hidden_size, KEEP=keep, **_sequence_options(hidden_size)
        )
        return hidden, h_n, c_n, gates, cells
    for step in range(time):
        _lstm_step_kernel[step_grid(sequences, hidden_size)](
            *operands, sequences, batch, time, step, hidden_size, KEEP=keep, **step_options()
        )
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
    check_dtype(embedding)
    (batch, time), (sequences, hidden_size) = tokens.shape, h0.shape
    grad_cell = torch.zeros((sequences, hidden_size), dtype=torch.float32, device=h0.device)
    if hidden.numel() == 0:
        grad_static_gates = grad_cell.new_zeros((sequences, 4 * hidden_size))
        weights = (torch.zeros_like(w) for w in (embedding, weight_input, weight_hh))
        return grad_static_gates, grad_h_n.clone(), grad_c_n.clone(), *weights
    grad_gates = torch.empty((sequences, time, 4 * hidden_size), dtype=h0.dtype, device=h0.device)
    operands = (grad_hidden, grad_h_n, grad_c_n, gates, cells, c0, weight_hh, lengths, grad_gates, grad_cell)
    if _fits_chip(weight_hh):
        _lstm_sequence_backward_kernel[(triton.cdiv(sequences, BLOCK_B),)](
            *operands, sequences, batch, time, hidden_size, **_sequence_options(hidden_size)
        )
    else:
        for step in reversed(range(time)):
            _lstm_step_backward_kernel[step_grid(sequences, hidden_size)](
                *operands, sequences, batch, time, step, hidden_size, **step_options()
            )
    empty = (lengths == 0).repeat(sequences // batch)[:, None]
    grad_h0 = torch.where(empty, grad_h_n, grad_gates[:, 0] @ weight_hh)
    grad_c0 = torch.where(empty, grad_c_n, grad_cell.to(c0.dtype))
    grad_static_gates = grad_gates.sum(1, dtype=torch.float32)
    grad_gates = grad_gates.flatten(0, 1)
    grad_weight_hh = grad_gates.t() @ previous_states(h0, hidden)
    inputs = tokens, lengths, embedding, seed, word_dropout, unk_index
    return grad_static_gates, grad_h0, grad_c0, *input_gradients(grad_gates, weight_input, *inputs), grad_weight_hh


def _fits_chip(weight_hh: Tensor) -> bool:
    """Whether a program can hold the weights: by what the compiler makes of them (``RESOURCES.md``), and this GPU."""
    block = _sequence_options(weight_hh.shape[1])["BLOCK_H"]
    largest = 128 if weight_hh.dtype.itemsize == 2 else 64 if dot_precision() == "tf32" else 32
    if block > largest:
        return False
    needed = _shared_bytes(block, weight_hh.dtype.itemsize)
    if needed <= _SHARED_BYTES or weight_hh.device.type != "cuda":
        return True
    properties = torch.cuda.get_device_properties(weight_hh.device)
    return needed <= getattr(properties, "shared_memory_per_block_optin", 0)  # AMD's have none


def _shared_bytes(block: int, itemsize: int) -> int:
    # The weights, and what goes between the warps.
    return 4 * block * block * itemsize + (20 << 10)


def _sequence_options(hidden_size: int) -> dict[str, int | str]:
    block = max(triton.next_power_of_2(hidden_size), 16)
    # One stage: the pipeliner would hold the next step's gates in shared memory, where the weights are.
    return {
        "UPCAST": UPCAST_OPERANDS, "PRECISION": dot_precision(),
        "BLOCK_B": BLOCK_B, "BLOCK_H": block, "num_warps": 4 if block <= 32 else 8, "num_stages": 1,
    }  # fmt: skip


@triton.jit
def _multiply_four(h, weight_i, weight_f, weight_g, weight_o, i, f, g, o, PRECISION: tl.constexpr):
    i = tl.dot(h, weight_i, i, input_precision=PRECISION)
    f = tl.dot(h, weight_f, f, input_precision=PRECISION)
    g = tl.dot(h, weight_g, g, input_precision=PRECISION)
    o = tl.dot(h, weight_o, o, input_precision=PRECISION)
    return i, f, g, o


@triton.jit
def update(i, f, g, o, previous_cell):
    """Return the activated gates, and the cell after the step."""
    i, f, g, o = tl.sigmoid(i), tl.sigmoid(f), tanh(g), tl.sigmoid(o)
    return i, f, g, o, f * previous_cell + i * g


@triton.jit
def update_backward(grad_cell, i, f, g, o, previous_cell, grad_o):
    """Return gradients of the gates before their activation, and of the cell before; grad_o is the activated one's."""
    grad_i = grad_cell * g * i * (1.0 - i)
    grad_f = grad_cell * previous_cell * f * (1.0 - f)
    grad_g = grad_cell * i * (1.0 - g * g)
    return grad_i, grad_f, grad_g, grad_o * o * (1.0 - o), grad_cell * f


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

    static = static_gates_ptr + row[:, None] * 4 * hidden_size + unit[None, :]
    i, f, g, o = load_four(static, hidden_size, mask, 1)
    projected = projected_ptr + (row % batch * time + step)[:, None] * 4 * hidden_size + unit[None, :]
    input_i, input_f, input_g, input_o = load_four(projected, hidden_size, mask, 1)
    i, f, g, o = i + input_i, f + input_f, g + input_g, o + input_o
    # No product where all sequences have ended.
    end = tl.max(active.to(tl.int32), axis=0) * hidden_size
    for start in range(0, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = tl.load(previous_ptr[:, None] + k[None, :], mask=active[:, None] & (k < hidden_size)[None, :], other=0.0)
        if UPCAST:
            h = h.to(tl.float32)
        weight = weight_ptr + unit[None, :] * hidden_size + k[:, None]
        weight_mask = (unit < hidden_size)[None, :] & (k < hidden_size)[:, None]
        weight_i, weight_f, weight_g, weight_o = load_four(weight, hidden_size * hidden_size, weight_mask, UPCAST)
        i, f, g, o = _multiply_four(h, weight_i, weight_f, weight_g, weight_o, i, f, g, o, PRECISION)

    i, f, g, o, cell = update(i, f, g, o, previous_cell)
    h = tl.where(mask, o * tanh(cell), 0.0).to(hidden_ptr.dtype.element_ty)
    if KEEP:
        store_four(gates_ptr + place[:, None] * 4 * hidden_size + unit[None, :], hidden_size, mask, i, f, g, o)
    tl.store(cells_ptr + cell_offset, cell, mask=mask)
    tl.store(hidden_ptr + output, h, mask=(row < sequences)[:, None] & (unit < hidden_size)[None, :])
    last = mask & (step == length - 1)[:, None]
    tl.store(h_n_ptr + state, h, mask=last)
    tl.store(c_n_ptr + state, cell.to(c_n_ptr.dtype.element_ty), mask=last)


@triton.jit(do_not_specialize=["sequences", "batch", "time"])
def _lstm_sequence_kernel(
    projected_ptr,  # as in the step kernel above
    static_gates_ptr,
    h0_ptr,
    c0_ptr,
    weight_ptr,
    lengths_ptr,
    hidden_ptr,  # (N, T, H)
    h_n_ptr,
    c_n_ptr,
    gates_ptr,  # (N * T, 4 * H) float32, if KEEP
    cells_ptr,  # (N * T, H) float32, if KEEP
    sequences,
    batch,
    time,
    hidden_size,
    KEEP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,  # at least hidden_size
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit, k = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_H)
    inside = (row < sequences)[:, None] & (unit < hidden_size)[None, :]
    length = tl.load(lengths_ptr + row % batch, mask=row < sequences, other=0)
    longest = tl.max(length, axis=0)
    state = row[:, None] * hidden_size + unit[None, :]
    weight = weight_ptr + unit[None, :] * hidden_size + k[:, None]
    weight_mask = (unit < hidden_size)[None, :] & (k < hidden_size)[:, None]
    weight_i, weight_f, weight_g, weight_o = load_four(weight, hidden_size * hidden_size, weight_mask, UPCAST)
    static = static_gates_ptr + row[:, None] * 4 * hidden_size + unit[None, :]
    projected = projected_ptr + (row % batch * time)[:, None] * 4 * hidden_size + unit[None, :]
    h = tl.load(h0_ptr + state, mask=inside, other=0.0)
    cell = tl.load(c0_ptr + state, mask=inside, other=0.0).to(tl.float32)
    input_i, input_f, input_g, input_o = load_four(projected, hidden_size, inside & (length > 0)[:, None], 0)

    for step in range(0, longest):
        mask = inside & (step < length)[:, None]
        place = row * time + step
        i, f, g, o = load_four(static, hidden_size, mask, 0)
        i, f = i + input_i.to(tl.float32), f + input_f.to(tl.float32)
        g, o = g + input_g.to(tl.float32), o + input_o.to(tl.float32)
        # The next step's inputs are on their way while this one computes.
        projected += 4 * hidden_size
        input_i, input_f, input_g, input_o = load_four(projected, hidden_size, inside & (step + 1 < length)[:, None], 0)
        if UPCAST:
            h = h.to(tl.float32)
        i, f, g, o = _multiply_four(h, weight_i, weight_f, weight_g, weight_o, i, f, g, o, PRECISION)
        i, f, g, o, cell = update(i, f, g, o, cell)
        h = tl.where(mask, o * tanh(cell), 0.0).to(hidden_ptr.dtype.element_ty)
        output = place[:, None] * hidden_size + unit[None, :]
        if KEEP:
            store_four(gates_ptr + place[:, None] * 4 * hidden_size + unit[None, :], hidden_size, mask, i, f, g, o)
            tl.store(cells_ptr + output, cell, mask=mask)
        tl.store(hidden_ptr + output, h, mask=inside)
        last = mask & (step == length - 1)[:, None]
        tl.store(h_n_ptr + state, h, mask=last)
        tl.store(c_n_ptr + state, cell.to(c_n_ptr.dtype.element_ty), mask=last)

    nothing = tl.zeros((BLOCK_B, BLOCK_H), hidden_ptr.dtype.element_ty)
    for step in range(longest, time):
        tl.store(hidden_ptr + (row * time + step)[:, None] * hidden_size + unit[None, :], nothing, mask=inside)


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

    inside = (row < sequences)[:, None] & (unit < hidden_size)[None, :]
    grad_cell = tl.load(grad_cell_ptr + state, mask=inside, other=0.0)
    grad_i, grad_f, grad_g, grad_o, grad_cell = _step_gradients(
        grad_h, grad_cell, grad_hidden_ptr, grad_h_n_ptr, grad_c_n_ptr, gates_ptr, cells_ptr, c0_ptr,
        row, unit, length, step, time, hidden_size, inside,
    )  # fmt: skip
    element = grad_gates_ptr.dtype.element_ty
    store_four(
        grad_gates_ptr + place[:, None] * 4 * hidden_size + unit[None, :], hidden_size, inside,
        grad_i.to(element), grad_f.to(element), grad_g.to(element), grad_o.to(element),
    )  # fmt: skip
    tl.store(grad_cell_ptr + state, grad_cell, mask=inside & (step < length)[:, None])


@triton.jit
def _step_gradients(
    grad_h, grad_cell, grad_hidden_ptr, grad_h_n_ptr, grad_c_n_ptr, gates_ptr, cells_ptr, c0_ptr,
    row, unit, length, step, time, hidden_size, inside,
):  # fmt: skip
    # Gradients of a step's gates and of the cell before it, given what the step after sends to state and cell.
    # Everything read is 0 where the sequence has ended, hence so are the gradients.
    mask = inside & (step < length)[:, None]
    last = mask & (step == length - 1)[:, None]
    place = (row * time + step)[:, None]
    output, state = place * hidden_size + unit[None, :], row[:, None] * hidden_size + unit[None, :]
    grad_h += tl.load(grad_hidden_ptr + output, mask=mask, other=0.0).to(tl.float32)
    grad_h += tl.load(grad_h_n_ptr + state, mask=last, other=0.0).to(tl.float32)
    grad_cell += tl.load(grad_c_n_ptr + state, mask=last, other=0.0).to(tl.float32)
    i, f, g, o = load_four(gates_ptr + place * 4 * hidden_size + unit[None, :], hidden_size, mask, 0)
    tanh_cell = tanh(tl.load(cells_ptr + output, mask=mask, other=0.0))
    if step == 0:
        previous_cell = tl.load(c0_ptr + state, mask=mask, other=0.0).to(tl.float32)
    else:
        previous_cell = tl.load(cells_ptr + output - hidden_size, mask=mask, other=0.0)
    grad_cell += grad_h * o * (1.0 - tanh_cell * tanh_cell)
    return update_backward(grad_cell, i, f, g, o, previous_cell, grad_h * tanh_cell)


@triton.jit(do_not_specialize=["sequences", "batch", "time"])
def _lstm_sequence_backward_kernel(
    grad_hidden_ptr,  # as in the step kernel above
    grad_h_n_ptr,
    grad_c_n_ptr,
    gates_ptr,
    cells_ptr,
    c0_ptr,
    weight_ptr,
    lengths_ptr,
    grad_gates_ptr,  # (N, T, 4 * H)
    grad_cell_ptr,  # (N, H) float32, of c0
    sequences,
    batch,
    time,
    hidden_size,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,  # at least hidden_size
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit, k = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_H)
    inside = (row < sequences)[:, None] & (unit < hidden_size)[None, :]
    length = tl.load(lengths_ptr + row % batch, mask=row < sequences, other=0)
    longest = tl.max(length, axis=0)
    weight_mask = (k < hidden_size)[:, None] & (unit < hidden_size)[None, :]
    weight = weight_ptr + k[:, None] * hidden_size + unit[None, :]
    weight_i, weight_f, weight_g, weight_o = load_four(weight, hidden_size * hidden_size, weight_mask, UPCAST)
    element = grad_gates_ptr.dtype.element_ty
    grad_gates = grad_gates_ptr + (row * time)[:, None] * 4 * hidden_size + unit[None, :]
    nothing = tl.zeros((BLOCK_B, BLOCK_H), element)
    for step in range(longest, time):
        store_four(grad_gates + step * 4 * hidden_size, hidden_size, inside, nothing, nothing, nothing, nothing)

    grad_h = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    grad_cell = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    for back in range(0, longest):
        step = longest - 1 - back
        grad_i, grad_f, grad_g, grad_o, grad_cell = _step_gradients(
            grad_h, grad_cell, grad_hidden_ptr, grad_h_n_ptr, grad_c_n_ptr, gates_ptr, cells_ptr, c0_ptr,
            row, unit, length, step, time, hidden_size, inside,
        )  # fmt: skip
        grad_i, grad_f, grad_g, grad_o = grad_i.to(element), grad_f.to(element), grad_g.to(element), grad_o.to(element)
        store_four(grad_gates + step * 4 * hidden_size, hidden_size, inside, grad_i, grad_f, grad_g, grad_o)
        if UPCAST:
            grad_i, grad_f = grad_i.to(tl.float32), grad_f.to(tl.float32)
            grad_g, grad_o = grad_g.to(tl.float32), grad_o.to(tl.float32)
        grad_h = tl.dot(grad_i, weight_i, input_precision=PRECISION)
        grad_h = tl.dot(grad_f, weight_f, grad_h, input_precision=PRECISION)
        grad_h = tl.dot(grad_g, weight_g, grad_h, input_precision=PRECISION)
        grad_h = tl.dot(grad_o, weight_o, grad_h, input_precision=PRECISION)
    tl.store(grad_cell_ptr + row[:, None] * hidden_size + unit[None, :], grad_cell, mask=inside)
