"""What the recurrences' kernels share: the gather of the inputs with word dropout, tiles of four gates, and gradients.

The inputs of all steps are gathered once, with word dropout drawn in the gather, and projected by one product (cuBLAS).
A step's program owns 16 sequences by 32 hidden units and their gates. Backward, what follows the sweep over the steps
are plain products over all of them, and PyTorch's own sorted reduction for the embedding: nothing random is stored, and
no atomics are used in float. A token out of range makes its sequence NaN from there on, and so the gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.precision import UPCAST_OPERANDS, dot_precision
from fastvae.kernels.random import uniform

BLOCK_B = 16
_BLOCK_H, _BLOCK_K = 32, 32
_EMBED_TILE = 1024


def check_dtype(embedding: Tensor) -> None:
    """Raise for float64."""
    if embedding.dtype == torch.float64:
        raise TypeError("embedding: expected float32, bfloat16 or float16, got torch.float64")


def embed(
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
    _embed_kernel[grid](
        tokens, lengths, seed, embedding, inputs, words,
        batch * time, time, embed_size, vocabulary, unk_index, float(word_dropout),
        BLOCK_N=block_rows, BLOCK_E=block_embed, num_warps=4,
    )  # fmt: skip
    return inputs, words


def input_gradients(
    grad_shares: Tensor,
    weight_input: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    embedding: Tensor,
    seed: Tensor,
    word_dropout: float,
    unk_index: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of embedding and weight_input.

    Args:
        grad_shares: gradient of the inputs' product, (N * T, gates); samples of a sequence lie B * T rows apart.
        weight_input: (gates, E).
        tokens, lengths, embedding, seed, word_dropout, unk_index: as in the forward.
    """
    samples = grad_shares.shape[0] // tokens.numel()
    if samples > 1:  # they read the same tokens
        summed = grad_shares.unflatten(0, (samples, -1)).sum(0, dtype=torch.float32)
        grad_shares = summed.to(grad_shares.dtype)
    inputs, words = embed(tokens, lengths, embedding, seed, word_dropout, unk_index)
    grad_embedding = torch.ops.aten.embedding_dense_backward(
        grad_shares @ weight_input, words, embedding.shape[0], -1, False
    )
    return grad_embedding, grad_shares.t() @ inputs


def previous_states(h0: Tensor, hidden: Tensor) -> Tensor:
    """Return the state before each step, (N * T, H), from h0 (N, H) and hidden (N, T, H)."""
    return torch.cat([h0.unsqueeze(1), hidden[:, :-1]], 1).flatten(0, 1)


def step_grid(sequences: int, columns: int) -> tuple[int, int]:
    """Return the programs of a step."""
    return triton.cdiv(sequences, BLOCK_B), triton.cdiv(columns, _BLOCK_H)


def step_options() -> dict[str, int | str]:
    """Return the options of a step's kernel."""
    return {
        "UPCAST": UPCAST_OPERANDS, "PRECISION": dot_precision(),
        "BLOCK_B": BLOCK_B, "BLOCK_H": _BLOCK_H, "BLOCK_K": _BLOCK_K, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


@triton.jit
def tanh(x):
    """tanh; near 0 a series, as the quotient would lose its relative accuracy. Without libdevice there is none."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0))))
    return tl.where(square < 0.01, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit(do_not_specialize=["total", "time", "vocabulary", "unk_index", "word_dropout"])
def _embed_kernel(
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


@triton.jit
def load_four(ptr, stride, mask, UPCAST: tl.constexpr):
    """Load what belongs to gates i, f, g and o, `stride` apart."""
    i = tl.load(ptr, mask=mask, other=0.0)
    f = tl.load(ptr + stride, mask=mask, other=0.0)
    g = tl.load(ptr + 2 * stride, mask=mask, other=0.0)
    o = tl.load(ptr + 3 * stride, mask=mask, other=0.0)
    if UPCAST:
        i, f, g, o = i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)
    return i, f, g, o


@triton.jit
def store_four(ptr, stride, mask, i, f, g, o):
    """Store what belongs to gates i, f, g and o, `stride` apart."""
    tl.store(ptr, i, mask=mask)
    tl.store(ptr + stride, f, mask=mask)
    tl.store(ptr + 2 * stride, g, mask=mask)
    tl.store(ptr + 3 * stride, o, mask=mask)
