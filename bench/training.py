"""Speed of training on the Penn Treebank, in tokens a second: ``FASTVAE_DATA=... python -m bench.training``.

Ours is the loop of `fastvae train`, Lightning included, from sentences to updated weights. The peer is the same model,
with the same weights, on `nn.LSTM`, in the loop one would write for it, and is given our batches: sentences of like
length, which spares it most of the padding of random ones. PyTorch's own fused Adam serves anyone, so the peer is timed
with it too. Both are checked to have the same loss and gradient first, then they train in turns.
"""

import argparse
import contextlib
import csv
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from bench import machine
from bench.interleave import OURS, assert_close
from bench.tables import RESULTS
from fastvae.data import TextBatch, Vocabulary, load_text
from fastvae.models import SentenceVAE
from fastvae.training.config import TrainConfig, read_yaml, settings_path
from fastvae.training.datamodule import TextDataModule
from fastvae.training.run import _quiet_lightning, _trainer, build_module

NAME = "training"
_PAD, _BOS, _UNK = 0, 2, 1


class EagerSentenceVAE(nn.Module):
    """The sentence VAE as one would write it on `nn.LSTM`, with the weights of one of ours."""

    def __init__(self, ours: SentenceVAE) -> None:
        super().__init__()
        self.embedding, self.decoder, self.output, self.initial_state = ours.decoder.to_modules()  # type: ignore[operator]
        self.encoder_embedding = nn.Embedding.from_pretrained(ours.encoder.embedding.weight.detach().clone(), False)
        self.encoder = nn.LSTM(ours.config["embed_dim"], ours.config["hidden_size"], batch_first=True)
        weights = dict(zip(("weight_ih_l0", "weight_hh_l0", "bias_ih_l0"), ours.encoder.layer(0), strict=True))  # type: ignore[operator]
        self.encoder.load_state_dict(weights | {"bias_hh_l0": torch.zeros_like(weights["bias_ih_l0"])})
        self.head = nn.Linear(ours.config["hidden_size"], 2 * ours.latent_dim)
        self.head.load_state_dict(ours.head.linear.state_dict())
        if ours.config["tie_weights"]:
            self.output.weight = self.embedding.weight
        self.dropout = nn.Dropout(ours.config["dropout"])
        self.word_dropout = ours.config["word_dropout"]

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = pack_padded_sequence(self.encoder_embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        _, (hidden, _) = self.encoder(packed)
        mean, log_var = self.head(self.dropout(hidden[-1])).chunk(2, dim=-1)
        kl = -0.5 * (1 + log_var - mean.pow(2) - log_var.exp()).sum(-1)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()

        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if self.training:
            dropped = torch.rand(inputs.shape) < self.word_dropout
            inputs = inputs.masked_fill(dropped & (inputs != _BOS) & (inputs != _PAD), _UNK)
        embedded = self.embedding(inputs)
        h, c = self.initial_state(z).chunk(2, dim=-1)
        features = torch.cat([embedded, z.unsqueeze(1).expand(-1, inputs.size(1), -1)], dim=-1)
        states, _ = self.decoder(features, (h.unsqueeze(0).contiguous(), c.unsqueeze(0).contiguous()))
        logits = self.output(self.dropout(states))
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_PAD, reduction="sum")
        return nll / len(tokens) + kl.mean(), nll.detach(), kl.detach().sum()


class Eager:
    """The usual loop, which also sums what it would log."""

    def __init__(self, ours: SentenceVAE, config: TrainConfig, data: TextDataModule, *, fused: bool) -> None:
        self.model = EagerSentenceVAE(ours).train()
        self.config, self.data = config, data
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=fused or None)

    def epoch(self) -> float:
        loader = self.data.epoch(0)
        total = 0.0
        start = time.perf_counter()
        for batch in loader:
            self.optimizer.zero_grad()
            loss, nll, kl = self.model(batch.tokens, batch.lengths)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
            self.optimizer.step()
            total += nll.item() + kl.item()
        return time.perf_counter() - start


class _Clock(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.start = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds = time.perf_counter() - self.start


class Ours:
    """The trainer of a run with its progress bar and metrics, and without its checkpoints, which the peer has not."""

    def __init__(self, config: TrainConfig, data: TextDataModule) -> None:
        self.config, self.data = config, data
        self.module = build_module(config, data)
        self.model: SentenceVAE = self.module.model  # type: ignore[assignment]

    def epoch(self) -> float:
        clock = _Clock()
        Path(self.config.out).mkdir(exist_ok=True)
        with _quiet_lightning(), contextlib.redirect_stderr(io.StringIO()):
            trainer = _trainer(self.config, self.module, clock, None)  # type: ignore[arg-type]
            trainer.fit(self.module, datamodule=self.data)
        return clock.seconds


def check(ours: SentenceVAE, batch: TextBatch) -> None:
    """Raise `WrongResultError` unless both models have the same loss and gradient where q(z|x) is a point."""
    ours.eval()
    with torch.no_grad():
        narrow = ours.head.linear.bias[ours.latent_dim :]
        before = narrow.clone()
        narrow.fill_(-30.0)
    eager = EagerSentenceVAE(ours).eval()
    loss, _, _ = eager(batch.tokens, batch.lengths)
    loss.backward()
    result = ours(batch.tokens, batch.lengths)
    result.loss.backward()
    assert_close(OURS, "loss", result.loss, loss)
    pairs = {
        "output": (ours.decoder.output.weight, eager.output.weight),
        "decoder": (ours.decoder.weight_hh, eager.decoder.weight_hh_l0),
        "encoder": (ours.encoder.weight_ih, eager.encoder.weight_ih_l0),
    }
    for name, (mine, theirs) in pairs.items():
        assert_close(OURS, f"gradient of the {name}", mine.grad, theirs.grad, tolerance=1e-3)  # type: ignore[arg-type]
    with torch.no_grad():
        narrow.copy_(before)
    ours.zero_grad()
    ours.train()


def measure(
    folder: Path, train: list[str], valid: list[str], vocabulary: Vocabulary, *, rounds: int, **settings: Any
) -> list[dict[str, Any]]:
    """Train in turns and return a row for each contender.

    Args:
        folder: for the texts and what the trainer writes.
        train, valid: sentences of an epoch and, a few, of the validation that ends it.
        vocabulary: of all the text.
        rounds: epochs of each contender, after one to warm up.
        settings: of the run, beside those of `ptb_lstm_4_epochs`.
    """
    for split, sentences in (("train", train), ("valid", valid)):
        (folder / f"{split}.txt").write_text("\n".join(sentences) + "\n")
    given = read_yaml(settings_path("ptb_lstm_4_epochs")) | settings
    given |= {"data": str(folder), "out": str(folder / "run"), "epochs": 1, "accelerator": "cpu"}
    config = TrainConfig.from_mapping(given)
    data = TextDataModule(config, vocabulary)
    torch.manual_seed(0)
    ours = Ours(config, data)
    check(ours.model, next(iter(data.epoch(0))))
    epochs: dict[str, Callable[[], float]] = {
        OURS: ours.epoch,
        "eager": Eager(ours.model, config, data, fused=False).epoch,
        "eager, fused Adam": Eager(ours.model, config, data, fused=True).epoch,
    }
    tokens = sum(int((batch.lengths - 1).sum()) for batch in data.epoch(0))
    speeds: dict[str, list[float]] = {name: [] for name in epochs}
    for round_ in range(rounds + 1):
        for name, epoch in epochs.items():
            seconds = epoch()
            if round_:  # the first warms up
                speeds[name].append(tokens / seconds)
    median = {name: statistics.median(values) for name, values in speeds.items()}
    return [
        {
            "batch_size": config.batch_size,
            "contender": name,
            "tokens_per_second": round(median[name]),
            "lowest": round(min(values)),
            "highest": round(max(values)),
            "ours_faster": round(median[OURS] / median[name], 3),
            "tokens": tokens,
            "rounds": rounds,
        }
        for name, values in speeds.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128], metavar="INT", help="[32 128]")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each contender [3]")
    parser.add_argument("--share", type=int, default=40, metavar="N", help="train on each N-th sentence [40]")
    parser.add_argument("--threads", type=int, default=2, help="of every contender [2]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result [bench/results]")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sentences = load_text("ptb", "train")
    vocabulary = Vocabulary.build(sentences, max_size=10_002)
    texts = sentences[:: arguments.share], load_text("ptb", "valid")[::400]
    rows = []
    for batch_size in arguments.batch_sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(Path(folder), *texts, vocabulary, rounds=arguments.rounds, batch_size=batch_size)
        for row in rows[-3:]:
            print(f"batch {batch_size}: {row['contender']}: {row['tokens_per_second']:,} tokens/s", flush=True)
    here = machine.describe()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / f"{NAME}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *here], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | here for row in rows)
    print(f"written to {arguments.out / f'{NAME}.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
