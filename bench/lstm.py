"""LSTM decoding: the recurrence alone, the whole step of a sentence decoder down to its loss, and scoring."""

import copy
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bench.interleave import OURS, Case, assert_close
from fastvae.functional import lstm
from fastvae.nn import LSTMDecoder
from fastvae.ops.random import draw_seed
from fastvae.ops.recurrence import dropped_tokens

BATCH, TIME, VOCABULARY, LATENT, SAMPLES = 32, 30, 10_000, 32, 100
WORD_DROPOUT = 0.25
PAD, UNK, BOS, EOS = range(4)
# Words of a sentence, </s> counted, at 32 even quantiles of the Penn Treebank's training set; shuffled below.
TREEBANK = [4, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 18, 19, 20, 21, 22, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 33,
            35, 37, 40, 47]  # fmt: skip


class EagerDecoder(nn.Module):
    """What a user writes: embedding, word dropout, z beside each embedding, nn.LSTM, output, cross-entropy."""

    def __init__(self, embed: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, embed)
        self.lstm = nn.LSTM(embed + LATENT, hidden, batch_first=True)
        self.output = nn.Linear(hidden, VOCABULARY)
        self.initial_state = nn.Linear(LATENT, 2 * hidden)

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

    def score(self, tokens: Tensor, z: Tensor) -> Tensor:
        """Return the negative log-likelihood of each sentence, for each sample of z (samples, batch, latent)."""
        tokens = tokens.repeat(z.shape[0], 1)
        logits = self.output(self.states(tokens[:, :-1], z.flatten(0, 1)))
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        return losses.sum(1).view(z.shape[:2])


def cases() -> Iterator[Case]:
    torch._dynamo.config.allow_rnn = True  # else Dynamo breaks the graph at nn.LSTM
    for embed, hidden in ((256, 256), (512, 1024)):
        torch.manual_seed(0)
        modules = EagerDecoder(embed, hidden)
        for backward in (False, True):
            yield _recurrence(modules, backward)
        full, treebank = torch.full((BATCH,), TIME), torch.tensor(TREEBANK)[torch.randperm(BATCH)]
        for lengths in (full, treebank) if hidden == 256 else (full,):
            for backward in (False, True):
                yield _step(modules, lengths, backward)
        if hidden == 256:
            yield _scoring(modules)


def _recurrence(modules: EagerDecoder, backward: bool) -> Case:
    generator, layer = (
        torch.Generator().manual_seed(1),
        nn.LSTM(modules.lstm.input_size - LATENT, modules.lstm.hidden_size, batch_first=True),
    )
    embed, hidden = layer.input_size, layer.hidden_size
    inputs = torch.randn(BATCH, TIME, embed, generator=generator).requires_grad_()
    grad_hidden = torch.randn(BATCH, TIME, hidden, generator=generator)
    zeros = torch.zeros(BATCH, hidden)

    def parameters(layer: nn.LSTM) -> list[Tensor]:
        return [layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0]

    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    functions: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: lstm(inputs, zeros, zeros, *parameters(layer)[:2], layer.bias_ih_l0 + layer.bias_hh_l0)[0],
        "eager": lambda: layer(inputs)[0],
        "torch.compile": lambda: compiled(inputs)[0],
    }

    def forward(function: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(),)

        return call

    def both(function: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            states = function()
            return states, *torch.autograd.grad(states, [inputs, *parameters(layer)], grad_hidden)

        return call

    contenders = {name: (both if backward else forward)(f) for name, f in functions.items()}

    @functools.cache
    def expected() -> list[Tensor]:
        exact, exact_inputs = copy.deepcopy(layer).double(), inputs.detach().double().requires_grad_()
        states = exact(exact_inputs)[0]
        if not backward:
            return [states.detach()]
        return [states.detach(), *torch.autograd.grad(states, [exact_inputs, *parameters(exact)], grad_hidden.double())]

    def check(name: str) -> None:
        for i, (got, wanted) in enumerate(zip(contenders[name](), expected(), strict=True)):
            assert_close(name, f"result {i}", got.detach(), wanted)

    return Case(
        "lstm",
        f"recurrence, batch {BATCH}, {TIME} steps, hidden {hidden}",
        "forward+backward" if backward else "forward",
        contenders,
        check,
        flops=8.0 * BATCH * TIME * hidden * (embed + hidden) * (3 if backward else 1),
        bytes=16.0 * hidden * (embed + hidden) * (2 if backward else 1),
    )


def _step(modules: EagerDecoder, words: Tensor, backward: bool) -> Case:
    generator = torch.Generator().manual_seed(2)
    ragged, lengths, hidden = bool((words != TIME).any()), words + 1, modules.lstm.hidden_size
    tokens = _sentences(lengths, generator)
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
        f"decoding step, batch {BATCH}, {'lengths of the Penn Treebank' if ragged else f'{TIME} words'}, "
        f"hidden {hidden}, vocabulary {VOCABULARY:,}",
        "forward+backward" if backward else "forward",
        contenders,
        check,
        flops=_flops(modules, predicted, predicted, BATCH) * (3 if backward else 1),
        bytes=4.0 * parameters * (2 if backward else 1),
    )


def _scoring(modules: EagerDecoder) -> Case:
    generator = torch.Generator().manual_seed(3)
    tokens = _sentences(torch.tensor([23]), generator)
    z = torch.randn(SAMPLES, 1, LATENT, generator=generator)
    decoder = LSTMDecoder.from_modules(modules.embedding, modules.lstm, modules.output, modules.initial_state)
    decoder.eval()
    compiled = torch.compile(modules.score, fullgraph=True, dynamic=False)
    functions: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: decoder(tokens, z),
        "eager": lambda: modules.score(tokens, z),
        "torch.compile": lambda: compiled(tokens, z),
    }
    contenders = {name: torch.no_grad()(function) for name, function in functions.items()}

    def check(name: str) -> None:
        exact = copy.deepcopy(modules).double()
        assert_close(name, "score", contenders[name](), exact.score(tokens, z.double()).detach())

    read = tokens.shape[1] - 1
    return Case(
        "lstm",
        f"scoring, one sentence of {read} words, {SAMPLES} samples, hidden {modules.lstm.hidden_size}, "
        f"vocabulary {VOCABULARY:,}",
        "forward",
        contenders,
        check,
        flops=_flops(modules, read, SAMPLES * read, SAMPLES),
        bytes=4.0 * sum(p.numel() for p in modules.parameters()),
    )


def _sentences(lengths: Tensor, generator: torch.Generator) -> Tensor:
    """Return <s> words </s>, padded, of the given lengths, both ends counted."""
    shape = (len(lengths), int(lengths.max()))
    tokens, positions = torch.randint(EOS + 1, VOCABULARY, shape, generator=generator), torch.arange(shape[1])
    tokens = tokens.masked_fill(positions == 0, BOS).masked_fill(positions == lengths[:, None] - 1, EOS)
    return tokens.masked_fill(positions >= lengths[:, None], PAD)


def _flops(modules: EagerDecoder, read: int, predicted: int, latents: int) -> float:
    """Forward, for so many words read and predicted."""
    hidden, embed = modules.lstm.hidden_size, modules.lstm.input_size - LATENT
    gates = 8.0 * hidden * (read * embed + predicted * hidden + latents * LATENT)
    return gates + 4.0 * latents * LATENT * hidden + 2.0 * predicted * hidden * VOCABULARY


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
