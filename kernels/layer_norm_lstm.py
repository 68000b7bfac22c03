"""Layer-normalized LSTM over embedded tokens with word dropout in the gather and the latent's term added at every step.

What: the product of the inputs and that of the state are each normalized over the 4 * H numbers of all gates, and the
cell over its H numbers on the way to the hidden state; the definition is in ``fastvae/ops/layer_norm_lstm.py``.

Why: one product projects all B*T inputs (8*B*T*E*H FLOPs, cuBLAS). A step makes the recurrent product (8*N*H*H FLOPs)
and moves some 20*N*H numbers about it, which eager PyTorch moves several times, in a launch for each operation.

How: a step is two launches, as no gate is known before all of its row are: the product, whose programs own 16 sequences
by 32 columns, and what follows, whose programs own whole rows: moments, gates, cell, and the state. Both skip sequences
that have ended. Backward walks the steps in reverse with the same two launches; each program adds the gradients of
gains and biases up over the steps in a row of its own, and their sum is taken at the end: no atomics in float.

Limits: float32, bfloat16 and float16, static_inputs in float32; contiguous operands; any N, B, T, E, H, though rows of
many thousand units leave registers for memory. Kept for backward, in float32 and unwritten in the padding: normalized
products (N * T, 8 * H), inverse deviations (N * T, 2), cells (N * T, H). In 16-bit the hidden state and the gradients
of the products are rounded at every step. A token out of range makes its sequence NaN from there on, and so the
gradients. float32 products follow ``torch.set_float32_matmul_precision`` (see ``precision.py``).

Source: Ba, Kiros & Hinton 2016, equations 20 to 22; word dropout: Bowman et al. 2016.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.lstm import update, update_backward
from fastvae.kernels.recurrence import (
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

_ROW_TILE = 512


def forward(
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
) -> tuple[Tensor, ...]:
    """Run the layer-normalized LSTM over all steps.

    Args:
        tokens: int64 (B, T).
        lengths: int64 (B,), valid steps of each sequence, in [0, T].
        static_inputs: float32 (N, 4 * H), added to the inputs' product at every step; N is a multiple of B, and
            sequence n reads the tokens of n modulo B.
        h0, c0: (N, H), float32, bfloat16 or float16, as all that follow.
        embedding: (V, E).
        weight_input: (4 * H, E).
        weight_hh: (4 * H, H).
        norm_gates: (3, 4 * H), gains of the inputs' and of the state's product, and the bias.
        norm_cell: (2, H), gain and bias.
        seed: int64 (1,).
        word_dropout: probability that a word is replaced; not at step 0.
        unk_index: the replacement.
        eps: added to the variances.
        keep: whether :func:`backward` will follow.

    Returns:
        hidden (N, T, H), zero at steps >= length; h_n and c_n (N, H), the state after the last valid step; for
        :func:`backward`, float32: normalized products (N * T, 8 * H), the state's first, inverse deviations (N * T, 2)
        and cells (N * T, H): (0, 0) if not kept.
    """
    check_dtype(embedding)
    (batch, time), (sequences, size) = tokens.shape, h0.shape
    options = {"dtype": torch.float32, "device": h0.device}
    hidden = torch.empty((sequences, time, size), dtype=h0.dtype, device=h0.device)
    shapes = [(sequences * time, columns) if keep else (0, 0) for columns in (8 * size, 2, size)]
    normalized, inverses, cells = (torch.empty(shape, **options) for shape in shapes)
    h_n, c_n = h0.clone(), c0.clone()
    if hidden.numel() == 0:
        return hidden, h_n, c_n, normalized, inverses, cells
    # Without a backward to come, one running cell for each sequence.
    step_cells = cells if keep else torch.empty((sequences, size), **options)
    inputs, _ = embed(tokens, lengths, embedding, seed, word_dropout, unk_index)
    projected = inputs @ weight_input.t()
    product = torch.empty((sequences, 4 * size), **options)
    norms = norm_gates.float(), norm_cell.float()
    for step in range(time):
        before, before_time, before_step = (hidden, time, step - 1) if step else (h0, 1, 0)
        _step_product_kernel[step_grid(sequences, 4 * size)](
            before, weight_hh, lengths, product, sequences, batch, before_time, before_step, step, size, 4 * size,
            TRANSPOSED=1, **step_options(),
        )  # fmt: skip
        _layer_norm_lstm_step_kernel[_row_grid(sequences, size)](
            product, projected, static_inputs, c0, *norms, lengths, hidden, h_n, c_n, normalized, inverses, step_cells,
            sequences, batch, time, step, size, eps,
            KEEP=int(keep), **_row_options(size),
        )  # fmt: skip
    return hidden, h_n, c_n, normalized, inverses, cells


def backward(
    grad_hidden: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor,
    hidden: Tensor,
    normalized: Tensor,
    inverses: Tensor,
    cells: Tensor,
    tokens: Tensor,
    lengths: Tensor,
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
    """Gradients of :func:`forward`; arguments as there.

    Args:
        grad_hidden: (N, T, H), like `hidden`.
        grad_h_n, grad_c_n: (N, H), like `h0`.
        hidden, normalized, inverses, cells: what :func:`forward` returned.

    Returns:
        Gradients of static_inputs (float32), h0, c0, embedding, weight_input, weight_hh, norm_gates and norm_cell.
    """
    check_dtype(embedding)
    (batch, time), (sequences, size) = tokens.shape, h0.shape
    options = {"dtype": torch.float32, "device": h0.device}
    if hidden.numel() == 0:
        weights = (torch.zeros_like(w) for w in (embedding, weight_input, weight_hh, norm_gates, norm_cell))
        return torch.zeros((sequences, 4 * size), **options), grad_h_n.clone(), grad_c_n.clone(), *weights
    grad_products = torch.empty((sequences, time, 4 * size), dtype=h0.dtype, device=h0.device)
    grad_shares, grad_state = torch.empty_like(grad_products), torch.empty((sequences, size), **options)
    grad_cell = grad_c_n.float() if grad_c_n.dtype != torch.float32 else grad_c_n.clone()
    grid = _row_grid(sequences, size)
    partial_norms = torch.zeros((*grid, 14 * size), **options)
    norms = norm_gates.float(), norm_cell.float()
    for step in reversed(range(time)):
        if step + 1 < time:
            _step_product_kernel[step_grid(sequences, size)](
                grad_products, weight_hh, lengths, grad_state,
                sequences, batch, time, step + 1, step + 1, 4 * size, size,
                TRANSPOSED=0, **step_options(),
            )  # fmt: skip
        _layer_norm_lstm_step_backward_kernel[grid](
            grad_state, grad_hidden, grad_h_n, normalized, inverses, cells, c0, *norms, lengths,
            grad_products, grad_shares, grad_cell, partial_norms,
            sequences, batch, time, step, size, eps,
            **_row_options(size),
        )  # fmt: skip
    empty = (lengths == 0).repeat(sequences // batch)[:, None]
    grad_h0 = torch.where(empty, grad_h_n, grad_products[:, 0] @ weight_hh)
    grad_static = grad_shares.sum(1, dtype=torch.float32)
    grad_norms = partial_norms.sum(0)
    inputs = tokens, lengths, embedding, seed, word_dropout, unk_index
    return (
        grad_static,
        grad_h0,
        grad_cell.to(c0.dtype),
        *input_gradients(grad_shares.flatten(0, 1), weight_input, *inputs),
        grad_products.flatten(0, 1).t() @ previous_states(h0, hidden),
        grad_norms[: 12 * size].view(3, 4 * size).to(norm_gates.dtype, copy=True),
        grad_norms[12 * size :].view(2, size).to(norm_cell.dtype, copy=True),
    )


def _row_options(size: int) -> dict[str, int]:
    block = max(triton.next_power_of_2(size), 16)
    warps = 4 if block <= 512 else 8 if block == 1024 else 16
    return {"BLOCK_N": max(_ROW_TILE // block, 1), "BLOCK_H": block, "num_warps": warps, "num_stages": 1}


def _row_grid(sequences: int, size: int) -> tuple[int]:
    return (triton.cdiv(sequences, _row_options(size)["BLOCK_N"]),)


@triton.jit(do_not_specialize=["sequences", "batch", "time", "place", "step"])
def _step_product_kernel(
    left_ptr,  # (N, T, K), read at step `place`
    weight_ptr,  # (M, K) if TRANSPOSED, else (K, M)
    lengths_ptr,  # (B,) int64
    out_ptr,  # (N, M) float32, written for the sequences longer than `step`
    sequences,
    batch,
    time,
    place,
    step,
    inner,
    columns,
    TRANSPOSED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    column = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    active = step < tl.load(lengths_ptr + row % batch, mask=row < sequences, other=0)
    left_row = left_ptr + (row * time + place) * inner
    product = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    for start in range(0, tl.max(active.to(tl.int32), axis=0) * inner, BLOCK_K):
        k = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_K)
        left = tl.load(left_row[:, None] + k[None, :], mask=active[:, None] & (k < inner)[None, :], other=0.0)
        if TRANSPOSED:
            weight = weight_ptr + column[None, :] * inner + k[:, None]
        else:
            weight = weight_ptr + k[:, None] * columns + column[None, :]
        right = tl.load(weight, mask=(k < inner)[:, None] & (column < columns)[None, :], other=0.0)
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    out = out_ptr + row[:, None] * columns + column[None, :]
    tl.store(out, product, mask=active[:, None] & (column < columns)[None, :])


@triton.jit
def _normalized(x, mask, size, eps):
    # Rows with mean 0 and deviation 1, and the inverse of what it was; 0 outside the mask, as x must be.
    x = tl.where(mask, x - (tl.sum(x, axis=1) / size)[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / size + eps)
    return x * inverse[:, None], inverse


@triton.jit
def _four_normalized(i, f, g, o, mask, size, eps):
    mean = (tl.sum(i + f + g + o, axis=1) / (4 * size))[:, None]
    i, f = tl.where(mask, i - mean, 0.0), tl.where(mask, f - mean, 0.0)
    g, o = tl.where(mask, g - mean, 0.0), tl.where(mask, o - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(i * i + f * f + g * g + o * o, axis=1) / (4 * size) + eps)
    scale = inverse[:, None]
    return i * scale, f * scale, g * scale, o * scale, inverse


@triton.jit
def _through_norm(i, f, g, o, unit_i, unit_f, unit_g, unit_o, inverse, size):
    # From the gradient of the normalized product to that of the product.
    mean = (tl.sum(i + f + g + o, axis=1) / (4 * size))[:, None]
    slope = (tl.sum(i * unit_i + f * unit_f + g * unit_g + o * unit_o, axis=1) / (4 * size))[:, None]
    scale = inverse[:, None]
    i, f = scale * (i - mean - unit_i * slope), scale * (f - mean - unit_f * slope)
    g, o = scale * (g - mean - unit_g * slope), scale * (o - mean - unit_o * slope)
    return i, f, g, o


@triton.jit
def _add_four(ptr, stride, mask, i, f, g, o):
    old_i, old_f, old_g, old_o = load_four(ptr, stride, mask, 0)
    i, f = old_i + tl.sum(i, axis=0), old_f + tl.sum(f, axis=0)
    tl.debug_barrier()  # what one thread stores, others may be loading
    store_four(ptr, stride, mask, i, f, old_g + tl.sum(g, axis=0), old_o + tl.sum(o, axis=0))


@triton.jit(do_not_specialize=["sequences", "batch", "time", "step", "eps"])
def _layer_norm_lstm_step_kernel(
    product_ptr,  # (N, 4 * H) float32, of the state before the step
    projected_ptr,  # (B * T, 4 * H)
    static_inputs_ptr,  # (N, 4 * H) float32
    c0_ptr,  # (N, H)
    norm_gates_ptr,  # (3, 4 * H) float32
    norm_cell_ptr,  # (2, H) float32
    lengths_ptr,  # (B,) int64
    hidden_ptr,  # (N, T, H)
    h_n_ptr,  # (N, H)
    c_n_ptr,  # (N, H)
    normalized_ptr,  # (N * T, 8 * H) float32, if KEEP
    inverses_ptr,  # (N * T, 2) float32, if KEEP
    cells_ptr,  # float32; KEEP: (N * T, H), reads step - 1, writes step; else (N, H), in place
    sequences,
    batch,
    time,
    step,
    hidden_size,
    eps,
    KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = tl.arange(0, BLOCK_H)
    inside = (unit < hidden_size)[None, :]
    length = tl.load(lengths_ptr + row % batch, mask=row < sequences, other=0)
    active = step < length
    mask = active[:, None] & inside
    place = row * time + step
    state, output = row[:, None] * hidden_size + unit[None, :], place[:, None] * hidden_size + unit[None, :]
    cell_offset = output if KEEP else state
    if step == 0:
        previous_cell = tl.load(c0_ptr + state, mask=mask, other=0.0).to(tl.float32)
    else:
        previous_offset = cell_offset - hidden_size if KEEP else cell_offset
        previous_cell = tl.load(cells_ptr + previous_offset, mask=mask, other=0.0)

    gate = row[:, None] * 4 * hidden_size + unit[None, :]
    i, f, g, o = load_four(product_ptr + gate, hidden_size, mask, 0)
    i, f, g, o, inverse = _four_normalized(i, f, g, o, mask, hidden_size, eps)
    static_i, static_f, static_g, static_o = load_four(static_inputs_ptr + gate, hidden_size, mask, 0)
    projected = projected_ptr + (row % batch * time + step)[:, None] * 4 * hidden_size + unit[None, :]
    input_i, input_f, input_g, input_o = load_four(projected, hidden_size, mask, 1)
    input_i, input_f, input_g, input_o, input_inverse = _four_normalized(
        input_i + static_i, input_f + static_f, input_g + static_g, input_o + static_o, mask, hidden_size, eps
    )
    if KEEP:
        normalized = normalized_ptr + place[:, None] * 8 * hidden_size + unit[None, :]
        store_four(normalized, hidden_size, mask, i, f, g, o)
        store_four(normalized + 4 * hidden_size, hidden_size, mask, input_i, input_f, input_g, input_o)
        tl.store(inverses_ptr + place * 2, inverse, mask=active)
        tl.store(inverses_ptr + place * 2 + 1, input_inverse, mask=active)
    i, f, g, o = _gates(i, f, g, o, input_i, input_f, input_g, input_o, norm_gates_ptr, unit, hidden_size, inside)
    i, f, g, o, cell = update(i, f, g, o, previous_cell)
    cell = tl.where(mask, cell, 0.0)
    normal, _ = _normalized(cell, mask, hidden_size, eps)
    gain = tl.load(norm_cell_ptr + unit[None, :], mask=inside, other=0.0)
    bias = tl.load(norm_cell_ptr + hidden_size + unit[None, :], mask=inside, other=0.0)
    h = tl.where(mask, o * tanh(normal * gain + bias), 0.0).to(hidden_ptr.dtype.element_ty)
    tl.debug_barrier()  # what one thread stores, others may be loading
    tl.store(cells_ptr + cell_offset, cell, mask=mask)
    tl.store(hidden_ptr + output, h, mask=(row < sequences)[:, None] & inside)
    last = mask & (step == length - 1)[:, None]
    tl.store(h_n_ptr + state, h, mask=last)
    tl.store(c_n_ptr + state, cell.to(c_n_ptr.dtype.element_ty), mask=last)


@triton.jit
def _gates(i, f, g, o, input_i, input_f, input_g, input_o, norm_gates_ptr, unit, hidden_size, inside):
    # From the two normalized products to the gates before their activation.
    gains = norm_gates_ptr + unit[None, :]
    gain_i, gain_f, gain_g, gain_o = load_four(gains + 4 * hidden_size, hidden_size, inside, 0)
    bias_i, bias_f, bias_g, bias_o = load_four(gains + 8 * hidden_size, hidden_size, inside, 0)
    i, f, g, o = i * gain_i + bias_i, f * gain_f + bias_f, g * gain_g + bias_g, o * gain_o + bias_o
    gain_i, gain_f, gain_g, gain_o = load_four(gains, hidden_size, inside, 0)
    return i + input_i * gain_i, f + input_f * gain_f, g + input_g * gain_g, o + input_o * gain_o


@triton.jit(do_not_specialize=["sequences", "batch", "time", "step", "eps"])
def _layer_norm_lstm_step_backward_kernel(
    grad_state_ptr,  # (N, H) float32, from the step after, where there is one
    grad_hidden_ptr,  # (N, T, H)
    grad_h_n_ptr,  # (N, H)
    normalized_ptr,  # (N * T, 8 * H) float32
    inverses_ptr,  # (N * T, 2) float32
    cells_ptr,  # (N * T, H) float32
    c0_ptr,  # (N, H)
    norm_gates_ptr,  # (3, 4 * H) float32
    norm_cell_ptr,  # (2, H) float32
    lengths_ptr,  # (B,) int64
    grad_products_ptr,  # (N, T, 4 * H)
    grad_shares_ptr,  # (N, T, 4 * H), of the inputs' product
    grad_cell_ptr,  # (N, H) float32, in place: gradient of the cell after the step, then of the one before it
    partial_norms_ptr,  # (programs, 14 * H) float32, in place: gradients of norm_gates, then of norm_cell
    sequences,
    batch,
    time,
    step,
    hidden_size,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = tl.arange(0, BLOCK_H)
    inside = (unit < hidden_size)[None, :]
    length = tl.load(lengths_ptr + row % batch, mask=row < sequences, other=0)
    active = step < length
    mask = active[:, None] & inside
    place = row * time + step
    state, output = row[:, None] * hidden_size + unit[None, :], place[:, None] * hidden_size + unit[None, :]
    # Everything read is 0 where the sequence has ended, hence so are the gradients.
    grad_h = tl.load(grad_hidden_ptr + output, mask=mask, other=0.0).to(tl.float32)
    grad_h += tl.load(grad_state_ptr + state, mask=mask & (step + 1 < length)[:, None], other=0.0)
    grad_h += tl.load(grad_h_n_ptr + state, mask=mask & (step == length - 1)[:, None], other=0.0).to(tl.float32)
    if step == 0:
        previous_cell = tl.load(c0_ptr + state, mask=mask, other=0.0).to(tl.float32)
    else:
        previous_cell = tl.load(cells_ptr + output - hidden_size, mask=mask, other=0.0)
    normalized = normalized_ptr + place[:, None] * 8 * hidden_size + unit[None, :]
    unit_i, unit_f, unit_g, unit_o = load_four(normalized, hidden_size, mask, 0)
    input_i, input_f, input_g, input_o = load_four(normalized + 4 * hidden_size, hidden_size, mask, 0)
    i, f, g, o = _gates(
        unit_i, unit_f, unit_g, unit_o, input_i, input_f, input_g, input_o, norm_gates_ptr, unit, hidden_size, inside
    )
    i, f, g, o, cell = update(i, f, g, o, previous_cell)

    # Through the cell's norm.
    cell = tl.load(cells_ptr + output, mask=mask, other=0.0)
    normal, cell_inverse = _normalized(cell, mask, hidden_size, eps)
    gain = tl.load(norm_cell_ptr + unit[None, :], mask=inside, other=0.0)
    bias = tl.load(norm_cell_ptr + hidden_size + unit[None, :], mask=inside, other=0.0)
    squashed = tanh(normal * gain + bias)
    grad_output = grad_h * o * (1.0 - squashed * squashed)
    partial = partial_norms_ptr + tl.program_id(0).to(tl.int64) * 14 * hidden_size + unit
    within = unit < hidden_size
    grad_gain = tl.load(partial + 12 * hidden_size, mask=within, other=0.0) + tl.sum(grad_output * normal, axis=0)
    grad_bias = tl.load(partial + 13 * hidden_size, mask=within, other=0.0) + tl.sum(grad_output, axis=0)
    tl.debug_barrier()  # what one thread stores, others may be loading
    tl.store(partial + 12 * hidden_size, grad_gain, mask=within)
    tl.store(partial + 13 * hidden_size, grad_bias, mask=within)
    grad_normal = grad_output * gain
    mean = (tl.sum(grad_normal, axis=1) / hidden_size)[:, None]
    slope = (tl.sum(grad_normal * normal, axis=1) / hidden_size)[:, None]
    grad_cell = tl.load(grad_cell_ptr + state, mask=mask, other=0.0)
    grad_cell += tl.where(mask, cell_inverse[:, None] * (grad_normal - mean - normal * slope), 0.0)
    i, f, g, o, grad_cell = update_backward(grad_cell, i, f, g, o, previous_cell, grad_h * squashed)
    tl.debug_barrier()
    tl.store(grad_cell_ptr + state, grad_cell, mask=mask)

    # Through the norms of the two products; i, f, g and o are the gates' gradients from here on.
    _add_four(partial, hidden_size, within, i * input_i, f * input_f, g * input_g, o * input_o)
    _add_four(partial + 4 * hidden_size, hidden_size, within, i * unit_i, f * unit_f, g * unit_g, o * unit_o)
    _add_four(partial + 8 * hidden_size, hidden_size, within, i, f, g, o)
    element = grad_products_ptr.dtype.element_ty
    gate, store_mask = place[:, None] * 4 * hidden_size + unit[None, :], (row < sequences)[:, None] & inside
    gains = norm_gates_ptr + unit[None, :]
    gain_i, gain_f, gain_g, gain_o = load_four(gains, hidden_size, inside, 0)
    inverse = tl.load(inverses_ptr + place * 2 + 1, mask=active, other=0.0)
    gain_i, gain_f, gain_g, gain_o = _through_norm(
        i * gain_i, f * gain_f, g * gain_g, o * gain_o, input_i, input_f, input_g, input_o, inverse, hidden_size
    )
    store_four(
        grad_shares_ptr + gate, hidden_size, store_mask,
        gain_i.to(element), gain_f.to(element), gain_g.to(element), gain_o.to(element),
    )  # fmt: skip
    gain_i, gain_f, gain_g, gain_o = load_four(gains + 4 * hidden_size, hidden_size, inside, 0)
    inverse = tl.load(inverses_ptr + place * 2, mask=active, other=0.0)
    i, f, g, o = _through_norm(
        i * gain_i, f * gain_f, g * gain_g, o * gain_o, unit_i, unit_f, unit_g, unit_o, inverse, hidden_size
    )
    store_four(
        grad_products_ptr + gate, hidden_size, store_mask, i.to(element), f.to(element), g.to(element), o.to(element)
    )
