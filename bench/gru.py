"""GRU decoding: the recurrence on padded and on ragged sentences, and the states of many samples of a latent."""

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bench.interleave import OURS, Case, assert_close
from fastvae.functional import gru_decode

BATCH, TIME, VOCABULARY, EMBED, LATENT = 32, 30, 10_000, 256, 32
SAMPLES = 100


class Eager(nn.Module):
    """What a user writes: embedding, z beside each embedding, nn.GRU, the states in the padding zeroed."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, EMBED)
        self.gru = nn.GRU(EMBED + LATENT, hidden, batch_first=True)
        self.initial_state = nn.Linear(LATENT, hidden)

    def forward(self, words: Tensor, z: Tensor, lengths: Tensor | None = None, packed: bool = False) -> Tensor:
        """Return the hidden states (batch, time, hidden), or (samples, batch, time, hidden) for samples of z.

        Samples are for sentences without `lengths` only.
        """
        samples, z = z.shape[:-2], z.flatten(0, -2)
        words = words.repeat(len(z) // len(words), 1)
        inputs = torch.cat([self.embedding(words), z[:, None].expand(-1, words.shape[1], -1)], -1)
        h0 = self.initial_state(z)[None]
        if packed:
            sequence = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
            hidden = pad_packed_sequence(self.gru(sequence, h0)[0], batch_first=True, total_length=words.shape[1])[0]
        else:
            hidden = self.gru(inputs, h0)[0]
        if lengths is not None and not packed:
            hidden = hidden * (torch.arange(words.shape[1]) < lengths[:, None])[..., None]
        return hidden.unflatten(0, (*samples, -1)) if samples else hidden


def cases() -> Iterator[Case]:
    torch._dynamo.config.allow_rnn = True  # else Dynamo breaks the graph at nn.GRU
    for hidden in (256, 1024):
        for backward in (False, True):
            yield _case(hidden, BATCH, TIME, backward, ragged=False)
    for backward in (False, True):
        yield _case(256, BATCH, TIME, backward, ragged=True)
    yield _case(256, 1, 22, False, ragged=False, samples=SAMPLES)


def _case(hidden: int, batch: int, time: int, backward: bool, *, ragged: bool, samples: int | None = None) -> Case:
    torch.manual_seed(0)
    modules = Eager(hidden)
    words = torch.randint(VOCABULARY, (batch, time))
    lengths = torch.full((batch,), time)
    if ragged:
        lengths = torch.randint(5, time + 1, (batch,))
        lengths[0] = time
    leading = (batch,) if samples is None else (samples, batch)
    z = torch.randn(*leading, LATENT).requires_grad_()
    given = lengths if ragged else None
    grad_hidden = torch.randn(*leading, time, hidden) * (torch.arange(time) < lengths[:, None])[..., None]
    leaves = [z, *modules.parameters()]

    def ours() -> Tensor:
        weights = (modules.embedding.weight, *modules.gru.parameters())
        return gru_decode(words, z, modules.initial_state(z), *weights, lengths=given)[0]

    compiled = torch.compile(modules, fullgraph=True, dynamic=False)
    functions: dict[str, Callable[[], Tensor]] = {
        OURS: ours,
        "eager": lambda: modules(words, z, given),
        "torch.compile": lambda: compiled(words, z, given),
    }
    if ragged:
        functions["eager, packed"] = lambda: modules(words, z, given, packed=True)

    def forward(function: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(),)

        return call

    def both(function: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            states = function()
            return states, *torch.autograd.grad(states, leaves, grad_hidden)

        return call

    contenders = {name: (both if backward else forward)(f) for name, f in functions.items()}

    @functools.cache
    def expected() -> list[Tensor]:
        exact, exact_z = copy.deepcopy(modules).double(), z.detach().double().requires_grad_()
        states = exact(words, exact_z, given)
        if not backward:
            return [states.detach()]
        grads = torch.autograd.grad(states, [exact_z, *exact.parameters()], grad_hidden.double())
        return [states.detach(), *grads]

    def check(name: str) -> None:
        for i, (got, wanted) in enumerate(zip(contenders[name](), expected(), strict=True)):
            assert_close(name, f"result {i}", got.detach(), wanted)

    tokens, sequences = int(lengths.sum()), (samples or 1) * batch
    steps = tokens * (samples or 1)
    flops = 2.0 * 3 * hidden * (tokens * EMBED + steps * hidden + sequences * LATENT)
    what = f"recurrence, batch {batch}, {'5 to ' if ragged else ''}{time} steps, hidden {hidden}"
    return Case(
        "gru",
        what if samples is None else f"{samples} samples, {what}",
        "forward+backward" if backward else "forward",
        contenders,
        check,
        flops=flops * (3 if backward else 1),
        bytes=4.0 * sum(leaf.numel() for leaf in leaves) * (2 if backward else 1),
    )
