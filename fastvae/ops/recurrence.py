"""What the recurrences share: word dropout, packing, checks of operands, and the products around the recurrent one."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.ops.backend import CORE, TRITON_MISSING, kernel, large, pointer, recording
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


def sample_count(tokens: Tensor, h0: Tensor) -> int:
    """Return the number of samples of each sequence: N / B."""
    return h0.shape[0] // tokens.shape[0] if tokens.shape[0] else 1


def differentiate(
    definition: Callable[..., tuple[Tensor, ...]], operands: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Return the operands' gradients by autograd, given those of the definition's outputs; None stands for zero."""
    with recording():
        inputs = [t.detach().requires_grad_() for t in operands]
        outputs = definition(*inputs)
    # Without a single step the hidden states depend on nothing.
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    return torch.autograd.grad(
        [o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )


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


def input_gradients(
    packing: Packing, grad_shares: Tensor, embedding: Tensor, weight_input: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of embedding and weight_input, given that of the input's product (rows, gates)."""
    tokens_read, compute = packing.words.numel(), grad_shares.dtype
    if packing.samples != 1:  # they read the same token
        grad_shares = grad_shares.view(tokens_read, packing.samples, grad_shares.shape[1]).sum(1)
    inputs = embedding.index_select(0, packing.words).to(compute)
    grad_inputs = grad_shares @ weight_input.to(compute)
    grad_embedding = torch.ops.aten.embedding_dense_backward(grad_inputs, packing.words, embedding.shape[0], -1, False)
    return grad_embedding.to(embedding.dtype), (grad_shares.T @ inputs).to(weight_input.dtype)


def weight_scratch(weight: Tensor) -> Tensor:
    """Return memory for the core's own layout of a weight: columns in whole tiles, at most 32 wide."""
    return large(weight.new_empty(weight.shape[0] * (-(-weight.shape[1] // 32) * 32)))


# -------------------------------------------------------------------------------------------- Triton on CUDA
def triton_forward(module: str, reference: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Return the forward op of `fastvae.kernels.<module>` on CUDA; `reference` serves float64."""
    launch = kernel(module, "forward")

    def call(tokens: Tensor, lengths: Tensor, static: Tensor, *args: Any) -> tuple[Tensor, ...]:
        serve = reference if static.dtype == torch.float64 else launch
        return serve(*_contiguous(tokens, _within(tokens, lengths), static, *args))

    return call


def triton_backward(
    module: str, reference: Callable[..., tuple[Tensor, ...]], outputs: int, saved: int
) -> Callable[..., tuple[Tensor, ...]]:
    """Return the backward op likewise; the kernel takes its arguments but for the static gates.

    These are the gradients of `outputs` outputs (hidden, then states), None for zeros; hidden; `saved` tensors which
    the kernel has kept; and what the forward took.
    """
    launch, static = kernel(module, "backward"), outputs + 1 + saved + 2

    def call(*args: Any) -> tuple[Tensor, ...]:
        args = *args[: static - 1], _within(*args[static - 2 : static]), *args[static:]
        if args[static].dtype == torch.float64:
            return reference(*args)
        likes = args[outputs], *args[static + 1 : static + outputs]
        grads = (torch.zeros_like(like) if g is None else g for g, like in zip(args[:outputs], likes, strict=True))
        return launch(*_contiguous(*grads, *args[outputs:static], *args[static + 1 :]))

    return call


def _within(tokens: Tensor, lengths: Tensor) -> Tensor:
    # Nobody looks at values on a GPU, and a length that is wrong must not lead a kernel out of its tensors.
    return lengths.clamp(0, tokens.shape[1])


def _contiguous(*args: Any) -> list[Any]:
    return [t.contiguous() if isinstance(t, Tensor) else t for t in args]


# ------------------------------------------------------------------------------------------ schema, autograd
def kernel_keeps(h0: Tensor, static: Tensor, keep: bool) -> bool:
    """Whether a kernel, rather than the reference, will serve, and is to keep what its backward reads."""
    if h0.device.type == "cuda":
        return keep and not TRITON_MISSING and static.dtype == torch.float32
    return keep and h0.device.type == "cpu" and CORE is not None


# -------------------------------------------------------------------------------------------------- public
def positions_as_words(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return dense inputs (batch, time, features) as words (batch, time), each its own, and their embedding."""
    check_float("inputs", inputs)
    if inputs.dim() != 3:
        raise ValueError(f"inputs: expected shape (batch, time, features), got {tuple(inputs.shape)}")
    batch, time, features = inputs.shape
    words = torch.arange(batch * time, device=inputs.device).view(batch, time)
    return words, inputs.reshape(batch * time, features)


def recorded(*operands: Tensor) -> tuple[Tensor, ...]:
    """Detach the operands where gradients are off: needs_input_grad ignores it, and gates would be kept for nobody."""
    return operands if torch.is_grad_enabled() else tuple(t.detach() for t in operands)


def with_samples(outputs: tuple[Tensor, ...], sequences: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Give outputs (N, ...) the leading dimensions `sequences`, ([samples,] batch)."""
    return outputs if len(sequences) == 1 else tuple(t.reshape(*sequences, *t.shape[1:]) for t in outputs)


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
