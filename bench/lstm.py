"""LSTM decoding: the recurrence alone, and the whole step of a sentence decoder down to its loss."""

import copy
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bench.interleave import OURS, Case, assert_close
from fastvae.functional import lstm_decode
from fastvae.nn import LSTMDecoder
from fastvae.ops.lstm import dropped_tokens
from fastvae.ops.random import draw_seed

BATCH, TIME, VOCABULARY, EMBED, HIDDEN, LATENT = 32, 30, 10_000, 256, 256, 32
WORD_DROPOUT = 0.25
PAD, UNK, BOS, EOS = range(4)


class EagerDecoder(nn.Module):
    """What a user writes: embedding, word dropout, z beside each embedding, nn.LSTM, output, cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, EMBED)
        self.lstm = nn.LSTM(EMBED + LATENT, HIDDEN, batch_first=True)
        self.output = nn.Linear(HIDDEN, VOCABULARY)
        self.initial_state = nn.Linear(LATENT, 2 * HIDDEN)

    def forward(self, tokens: Tensor, z: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the mean loss a target and the words read; `lengths`, given, packs the sequences."""
        words = tokens[:, :-1]
        dropped = torch.rand(words.shape) < WORD_DROPOUT
        words = torch.where(dropped & (torch.arange(words.shape[1]) > 0) & (words != PAD), UNK, words)
        hidden = self.states(words, z, lengths)
        return self.loss(hidden, tokens[:, 1:]), words

    def states(self, words: Tensor, z: Tensor, lengths: Tensor | None = None) -> Tensor:
        inputs = torch.cat([self.embedding(words), z[:, None].expand(-1, words.shape[1], -1)], -1)
        start = tuple(s[None].contiguous() for s in self.initial_state(z).chunk(2, -1))
        if lengths is None:
            return self.lstm(inputs, start)[0]
        packed = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed, start)[0], batch_first=True, total_length=words.shape[1])[0]

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.output(hidden).flatten(0, 1), targets.flatten(), ignore_index=PAD)


def cases() -> Iterator[Case]:
    torch._dynamo.config.allow_rnn = True  # else Dynamo breaks the graph at nn.LSTM
    torch.manual_seed(0)
    modules = EagerDecoder()
    for backward in (False, True):
        yield _recurrence(modules, backward)
    for ragged in (False, True):
        for backward in (False, True):
            yield _step(modules, ragged, backward)


def _recurrence(modules: EagerDecoder, backward: bool) -> Case:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(EOS + 1, VOCABULARY, (BATCH, TIME), generator=generator)
    z = torch.randn(BATCH, LATENT, generator=generator).requires_grad_()
    grad_hidden = torch.randn(BATCH, TIME, HIDDEN, generator=generator)
    lstm, embedding = modules.lstm, modules.embedding.weight
    leaves = [z, embedding, lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, *modules.initial_state.parameters()]

    def ours() -> Tensor:
        h0, c0 = modules.initial_state(z).chunk(2, -1)
        bias = lstm.bias_ih_l0 + lstm.bias_hh_l0
        return lstm_decode(words, z, h0, c0, embedding, lstm.weight_ih_l0, lstm.weight_hh_l0, bias)[0]

    compiled = torch.compile(modules.states, fullgraph=True, dynamic=False)
    functions: dict[str, Callable[[], Tensor]] = {
        OURS: ours,
        "eager": lambda: modules.states(words, z),
        "torch.compile": lambda: compiled(words, z),
    }

    def forward(function: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(),)

        return call

    def both(function: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            hidden = function()
            return hidden, *torch.autograd.grad(hidden, leaves, grad_hidden)

        return call

    contenders = {name: (both if backward else forward)(f) for name, f in functions.items()}

    @functools.cache
    def expected() -> list[Tensor]:
        exact, exact_z = copy.deepcopy(modules).double(), z.detach().double().requires_grad_()
        hidden = exact.states(words, exact_z)
        if not backward:
            return [hidden.detach()]
        exact_leaves = [
            exact_z, exact.embedding.weight, exact.lstm.weight_ih_l0, exact.lstm.weight_hh_l0,
            exact.lstm.bias_ih_l0, *exact.initial_state.parameters(),
        ]  # fmt: skip
        return [hidden.detach(), *torch.autograd.grad(hidden, exact_leaves, grad_hidden.double())]

    def check(name: str) -> None:
        for i, (got, wanted) in enumerate(zip(contenders[name](), expected(), strict=True)):
            assert_close(name, f"result {i}", got.detach(), wanted)

    return Case(
        "lstm",
        f"recurrence, batch {BATCH}, {TIME} steps, hidden {HIDDEN}",
        "forward+backward" if backward else "forward",
        contenders,
        check,
        flops=_recurrence_flops(BATCH * TIME) * (3 if backward else 1),
        bytes=4.0 * sum(leaf.numel() for leaf in leaves) * (2 if backward else 1),
    )


def _step(modules: EagerDecoder, ragged: bool, backward: bool) -> Case:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(EOS + 1, VOCABULARY, (BATCH, TIME + 1), generator=generator)
    lengths = torch.full((BATCH,), TIME + 1)
    if ragged:
        lengths = torch.randint(6, TIME + 2, (BATCH,), generator=generator)
        lengths[0] = TIME + 1
    positions = torch.arange(TIME + 1)
    tokens = tokens.masked_fill(positions == 0, BOS).masked_fill(positions == lengths[:, None] - 1, EOS)
    tokens = tokens.masked_fill(positions >= lengths[:, None], PAD)
    z = torch.randn(BATCH, LATENT, generator=generator).requires_grad_()
    predicted = int((lengths - 1).sum())

    decoder = LSTMDecoder.from_modules(
        modules.embedding, modules.lstm, modules.output, modules.initial_state,
        word_dropout=WORD_DROPOUT, pad_index=PAD, unk_index=UNK,
    )  # fmt: skip
    compiled = torch.compile(modules, fullgraph=True, dynamic=False)
    losses: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: decoder(tokens, z, lengths).sum() / predicted,
        "eager": lambda: modules(tokens, z)[0],
        "torch.compile": lambda: compiled(tokens, z)[0],
    }
    if ragged:
        losses["eager, packed"] = lambda: modules(tokens, z, lengths - 1)[0]
    ours, theirs = [z, *decoder.parameters()], [z, *modules.parameters()]

    def forward(loss: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return loss()

        return call

    def both(loss: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            value = loss()
            return value, *torch.autograd.grad(value, leaves)

        return call

    wrap = both if backward else forward
    contenders = {name: wrap(loss, ours if name == OURS else theirs) for name, loss in losses.items()}

    def ours_with_words() -> tuple[Tensor, Tensor]:
        # The seed is drawn from torch's generator: after the same manual_seed it can be had again.
        torch.manual_seed(3)
        loss = losses[OURS]()
        torch.manual_seed(3)
        seed = draw_seed(tokens.device)
        return loss, dropped_tokens(tokens[:, :-1], lengths - 1, seed, WORD_DROPOUT, UNK)

    with_words: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        OURS: ours_with_words,
        "eager": lambda: modules(tokens, z),
        "torch.compile": lambda: compiled(tokens, z),
        "eager, packed": lambda: modules(tokens, z, lengths - 1),
    }

    def check(name: str) -> None:
        with torch.set_grad_enabled(backward):
            loss, words = with_words[name]()
            _check_step(name, loss, words, decoder if name == OURS else modules, modules, tokens, z)

    parameters = sum(p.numel() for p in modules.parameters())
    return Case(
        "lstm",
        f"decoding step, batch {BATCH}, {'5 to ' if ragged else ''}{TIME} words, vocabulary {VOCABULARY:,}",
        "forward+backward" if backward else "forward",
        contenders,
        check,
        flops=(_recurrence_flops(predicted) + 2.0 * predicted * HIDDEN * VOCABULARY) * (3 if backward else 1),
        bytes=4.0 * parameters * (2 if backward else 1),
    )


def _recurrence_flops(tokens: int) -> float:
    return 2.0 * 4 * HIDDEN * (tokens * (EMBED + HIDDEN) + BATCH * LATENT) + 2.0 * BATCH * LATENT * 2 * HIDDEN


def _check_step(
    name: str,
    loss: Tensor,
    words: Tensor,
    contender: EagerDecoder | LSTMDecoder,
    modules: EagerDecoder,
    tokens: Tensor,
    z: Tensor,
) -> None:
    """Check a contender's loss, and its gradients if it has any, given the words it read, against float64."""
    exact, exact_z = copy.deepcopy(modules).double(), z.detach().double().requires_grad_()
    expected = exact.loss(exact.states(words, exact_z), tokens[:, 1:])
    assert_close(name, "loss", loss.detach(), expected.detach())
    if loss.requires_grad:
        exact_leaves, leaves = {"z": exact_z} | _named(exact), {"z": z} | _named(contender)
        wanted = dict(zip(exact_leaves, torch.autograd.grad(expected, [*exact_leaves.values()]), strict=True))
        for what, got in zip(leaves, torch.autograd.grad(loss, [*leaves.values()]), strict=True):
            assert_close(name, f"gradient of {what}", got, wanted[what])


def _named(module: EagerDecoder | LSTMDecoder) -> dict[str, Tensor]:
    names = {"lstm.weight_ih_l0": "weight_ih", "lstm.weight_hh_l0": "weight_hh", "lstm.bias_ih_l0": "bias"}
    named = {names.get(name, name): parameter for name, parameter in module.named_parameters()}
    return {name: parameter for name, parameter in named.items() if name != "lstm.bias_hh_l0"}
