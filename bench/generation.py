"""Generation: sentences written by an LSTM decoder, against the loop over `nn.LSTMCell` that users write."""

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench.interleave import OURS, Case, WrongResultError
from fastvae.nn import LSTMDecoder

EMBED, HIDDEN, LATENT, TIME = 256, 256, 32, 60
BEAMS, BEAM_BATCH, BEAM_TIME = 10, 32, 20
MEAN_LENGTH = 15
PAD, UNK, BOS, EOS = range(4)
NEVER = -1e4  # the output bias of words that shall not be written

Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class CellDecoder(nn.Module):
    """What a user writes: a step of embedding, z beside it, nn.LSTMCell and output, in a Python loop."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBED)
        self.cell = nn.LSTMCell(EMBED + LATENT, HIDDEN)
        self.output = nn.Linear(HIDDEN, vocabulary)
        self.initial_state = nn.Linear(LATENT, 2 * HIDDEN)

    def forward(self, words: Tensor, z: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step: logits of the next word, and the states behind `words`."""
        h, c = self.cell(torch.cat([self.embedding(words), z], -1), (h, c))
        return self.output(h), h, c

    def greedy_step(self, words: Tensor, z: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, h, c = self(words, z, h, c)
        return logits.argmax(-1), h, c

    def sampled_step(self, words: Tensor, z: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, h, c = self(words, z, h, c)
        return torch.multinomial(logits.softmax(-1), 1)[:, 0], h, c

    def raced_step(self, words: Tensor, z: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `sampled_step`: the least of exponential times with these rates, quicker than `multinomial`."""
        logits, h, c = self(words, z, h, c)
        probs = logits.softmax(-1)
        return (probs / torch.empty_like(probs).exponential_()).argmax(-1), h, c

    def write(self, step: Step, z: Tensor) -> Tensor:
        """Words (batch, at most TIME) of the loop over `step`, padded behind </s>."""
        h, c = self.initial_state(z).chunk(2, -1)
        words = torch.full((len(z),), BOS)
        ended, written = torch.zeros(len(z), dtype=torch.bool), []
        for _ in range(TIME):
            words, h, c = step(words, z, h, c)
            written.append(words.masked_fill(ended, PAD))
            ended |= words == EOS
            if ended.all():
                break
        return torch.stack(written, 1)

    def beam_step(
        self, words: Tensor, z: Tensor, h: Tensor, c: Tensor, totals: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        logits, h, c = self(words, z, h, c)
        batch, vocabulary = len(totals), logits.shape[1]
        scores = (totals[:, :, None] + logits.log_softmax(-1).view(batch, BEAMS, vocabulary)).flatten(1)
        totals, index = scores.topk(BEAMS, 1)
        rows = (torch.arange(batch)[:, None] * BEAMS + index // vocabulary).flatten()
        return (index % vocabulary).flatten(), h[rows], c[rows], totals, rows

    def beam_search(self, step: Callable[..., tuple[Tensor, ...]], z: Tensor) -> Tensor:
        """The best of BEAMS beginnings after BEAM_TIME steps, (batch, BEAM_TIME); nothing ends before."""
        batch, z = len(z), z.repeat_interleave(BEAMS, 0)
        h, c = self.initial_state(z).chunk(2, -1)
        words = torch.full((batch * BEAMS,), BOS)
        totals = torch.full((batch, BEAMS), float("-inf"), dtype=z.dtype)
        totals[:, 0] = 0.0
        written = words.new_empty(batch * BEAMS, 0)
        for _ in range(BEAM_TIME):
            words, h, c, totals, rows = step(words, z, h, c, totals)
            written = torch.cat([written[rows], words[:, None]], 1)
        return written[::BEAMS]


def cases() -> Iterator[Case]:
    for vocabulary in (10_000, 1_000):
        for batch in (1, 32, 256):
            yield _greedy(batch, vocabulary)
    for batch in (32, 256):
        yield _sampled(batch, 10_000)
    yield _beam(10_000)


def _models(vocabulary: int, end_bias: float) -> tuple[CellDecoder, LSTMDecoder]:
    torch.manual_seed(0)
    modules = CellDecoder(vocabulary).requires_grad_(False)
    modules.output.bias[[PAD, BOS]] = NEVER
    modules.output.bias[EOS] = end_bias
    decoder = LSTMDecoder(
        vocabulary, EMBED, HIDDEN, LATENT, pad_index=PAD, unk_index=UNK, bos_index=BOS, eos_index=EOS
    ).requires_grad_(False)
    cell = modules.cell
    decoder.load_state_dict(
        {
            "embedding.weight": modules.embedding.weight,
            "weight_ih": cell.weight_ih,
            "weight_hh": cell.weight_hh,
            "bias": cell.bias_ih + cell.bias_hh,
            **{f"output.{name}": value for name, value in modules.output.state_dict().items()},
            **{f"initial_state.{name}": value for name, value in modules.initial_state.state_dict().items()},
        }
    )
    return modules, decoder


def _latents(batch: int) -> Tensor:
    return torch.randn(batch, LATENT, generator=torch.Generator().manual_seed(1))


def _greedy(batch: int, vocabulary: int) -> Case:
    modules, decoder = _models(vocabulary, NEVER)
    z = _latents(batch)
    compiled = torch.compile(modules.greedy_step, fullgraph=True, dynamic=False)
    contenders = {
        OURS: lambda: decoder.generate(z, TIME)[0],
        "eager": lambda: modules.write(modules.greedy_step, z),
        "torch.compile": lambda: modules.write(compiled, z),
    }

    def check(name: str) -> None:
        # Each word is the likeliest behind the words before it, in float64, up to rounding.
        words = contenders[name]()
        _check_shape(name, words, (batch, TIME))
        log_probs = _log_probs(modules, words, z)
        behind = (log_probs.max(-1).values - log_probs.gather(-1, words[..., None])[..., 0]).max().item()
        if not behind < 1e-4:
            raise WrongResultError(f"{name}: a word is {behind:.3g} nats behind the likeliest")

    return _case(f"greedy, batch {batch}, {TIME} steps", vocabulary, contenders, check, batch * TIME, TIME)


def _sampled(batch: int, vocabulary: int) -> Case:
    modules, decoder = _models(vocabulary, torch.tensor((vocabulary - 3) / (MEAN_LENGTH - 1)).log().item())
    z = _latents(batch)
    compiled = torch.compile(modules.raced_step, fullgraph=True, dynamic=False)
    contenders = {
        OURS: lambda: decoder.generate(z, TIME, "sample")[0],
        "eager": lambda: modules.write(modules.sampled_step, z),
        "eager, exponential race": lambda: modules.write(modules.raced_step, z),
        "torch.compile": lambda: modules.write(compiled, z),
    }

    def check(name: str) -> None:
        # Minus log p of a drawn word has the entropy as its mean: the sum of what is left over is some sigmas at most.
        words = contenders[name]()
        log_probs = _log_probs(modules, words, z)
        inside = words != PAD
        surprise = -log_probs.gather(-1, words[..., None])[..., 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        variance = (log_probs.exp() * log_probs.square()).sum(-1) - entropy.square()
        sigmas = abs((surprise - entropy)[inside].sum() / variance[inside].sum().sqrt()).item()
        length = inside.sum(1).double().mean().item()
        if not (sigmas < 5 and abs(length - MEAN_LENGTH) < 0.5 * MEAN_LENGTH):
            raise WrongResultError(f"{name}: {sigmas:.1f} sigmas from the entropy, mean length {length:.1f}")

    words = batch * MEAN_LENGTH
    name = f"sampling, batch {batch}, mean length {MEAN_LENGTH}"
    return _case(name, vocabulary, contenders, check, words, MEAN_LENGTH)


def _beam(vocabulary: int) -> Case:
    modules, decoder = _models(vocabulary, NEVER)
    z = _latents(BEAM_BATCH)
    compiled = torch.compile(modules.beam_step, fullgraph=True, dynamic=False)
    contenders = {
        OURS: lambda: decoder.generate(z, BEAM_TIME, "beam", beam_size=BEAMS)[0],
        "eager": lambda: modules.beam_search(modules.beam_step, z),
        "torch.compile": lambda: modules.beam_search(compiled, z),
    }

    def total(words: Tensor) -> Tensor:
        return _log_probs(modules, words, z).gather(-1, words[..., None]).sum((1, 2))

    @functools.cache
    def expected() -> Tensor:
        exact = copy.deepcopy(modules).double()
        return total(exact.beam_search(exact.beam_step, z.double()))

    def check(name: str) -> None:
        words = contenders[name]()
        _check_shape(name, words, (BEAM_BATCH, BEAM_TIME))
        # Candidates that are equal up to rounding may lead elsewhere: rarely, and not far.
        off = (total(words) - expected()).abs()
        if not ((off > 1e-4).double().mean() < 0.1 and off.max() < 1.0):
            raise WrongResultError(f"{name}: log-probabilities of the sentences are off by up to {off.max():.3g}")

    name = f"beam search, width {BEAMS}, batch {BEAM_BATCH}, {BEAM_TIME} steps"
    return _case(name, vocabulary, contenders, check, BEAM_BATCH * BEAMS * BEAM_TIME, BEAM_TIME)


def _log_probs(modules: CellDecoder, words: Tensor, z: Tensor) -> Tensor:
    """log p(word | words before) in float64, (batch, time, vocabulary)."""
    exact, z = copy.deepcopy(modules).double(), z.double()
    h, c = exact.initial_state(z).chunk(2, -1)
    log_probs, last = [], torch.full((len(z),), BOS)
    for t in range(words.shape[1]):
        logits, h, c = exact(last, z, h, c)
        log_probs.append(logits.log_softmax(-1))
        last = words[:, t]
    return torch.stack(log_probs, 1)


def _check_shape(name: str, words: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(words.shape) != expected:
        raise WrongResultError(f"{name}: words have shape {tuple(words.shape)}, not {expected}")


def _case(
    name: str, vocabulary: int, contenders: dict[str, Callable[[], Tensor]], check: Callable[[str], None], words: int,
    steps: int,
) -> Case:  # fmt: skip
    def without_gradients(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return call()

        return run

    def checked(contender: str) -> None:
        with torch.no_grad():
            check(contender)

    recurrent = 4 * HIDDEN * (EMBED + LATENT + HIDDEN)
    return Case(
        "generation",
        f"{name}, vocabulary {vocabulary:,}",
        "forward",
        {contender: without_gradients(call) for contender, call in contenders.items()},
        checked,
        flops=2.0 * words * (recurrent + HIDDEN * vocabulary),
        bytes=4.0 * steps * (4 * HIDDEN * HIDDEN + HIDDEN * vocabulary),
    )
