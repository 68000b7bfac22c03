"""Controlled generation on SST-2, judged by classifiers trained apart: ``python -m bench.controlled``.

Trains the run if its folder holds none, goes on with one that was stopped, and judges it: two classifiers and a
language model, trained on the real sentences, read 1,000 sentences of chosen sentiment. Needs FASTVAE_DATA.
"""

import argparse
import copy
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.machine import describe
from bench.tables import CONTROLLED, controlled
from fastvae.data import LabeledText, Vocabulary, collate, load_labeled
from fastvae.models import ControlledTextVAE, TextClassifier
from fastvae.training.checkpoint import load_run
from fastvae.training.config import config_class, read_yaml
from fastvae.training.text import sample_sentences
from fastvae.training.text_metrics import LanguageModel, distinct_n, train_language_model

CONFIG = Path(__file__).parent.parent / "fastvae" / "configs" / "controlled_sst2.yaml"
TEMPERATURES = (1.0, 0.7)
PAIRS = 8
Judge = Callable[[Sequence[str]], list[int]]


def train_run(folder: Path) -> None:
    """Train the run, or the rest of it."""
    from fastvae.training.run import train

    settings = read_yaml(CONFIG) | {"out": str(folder)}
    resume = (folder / "checkpoints" / "last.ckpt").exists()
    train(config_class(settings["model"]).from_mapping(settings), resume=resume)


def convolutional_judge(text: LabeledText, valid: LabeledText, *, seed: int, epochs: int = 8) -> Judge:
    """Train a `TextClassifier` on all training sentences; the epoch is chosen by the validation sentences."""
    vocabulary = Vocabulary.build(text.sentences)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = TextClassifier(len(vocabulary), len(next(iter(text.attributes.values()))))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def encoded(sentences: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collate([torch.tensor(vocabulary.encode(sentence)[1:]) for sentence in sentences])
        return batch.tokens, batch.lengths

    @torch.no_grad()
    def judge(sentences: Sequence[str]) -> list[int]:
        parts = [sentences[start : start + 100] for start in range(0, len(sentences), 100)]
        return [label for part in parts for label in model.eval()(*encoded(part)).argmax(1).tolist()]

    best, weights = 0.0, model.state_dict()
    rows = list(range(len(text.sentences)))
    for _ in range(epochs):
        draw.shuffle(rows)
        model.train()
        for start in range(0, len(rows), 50):
            chosen = rows[start : start + 50]
            logits = model(*encoded([text.sentences[row] for row in chosen]))
            optimizer.zero_grad()
            F.cross_entropy(logits, torch.from_numpy(text.labels[chosen, 0])).backward()
            optimizer.step()
        right = accuracy(judge, valid)
        if right > best:
            best, weights = right, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return judge


def linear_judge(text: LabeledText) -> Judge:
    """Fit a logistic regression on tf-idf weights of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    features = TfidfVectorizer(token_pattern=r"\S+", ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(features, LogisticRegression(C=10, max_iter=1000)).fit(text.sentences, text.labels[:, 0])
    return lambda sentences: model.predict(list(sentences)).tolist()


def accuracy(judge: Judge, text: LabeledText) -> float:
    """Share of sentences that a judge gives their label."""
    found = judge(text.sentences)
    return sum(a == b for a, b in zip(found, text.labels[:, 0].tolist(), strict=True)) / len(found)


def judged(
    model: ControlledTextVAE, vocabulary: Vocabulary, judges: dict[str, Judge], language_model: LanguageModel,
    *, count: int, temperature: float, seed: int,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """Write sentences, as many of each sentiment, and measure them."""
    name, values = next(iter(model.attributes.items()))
    written: list[str] = []
    labels: list[int] = []
    for place, value in enumerate(values):
        options = {"temperature": temperature, "max_length": model.max_length, "chosen": {name: value}}
        part = sample_sentences(model, vocabulary, count // len(values), seed=seed + place, **options)
        written += part
        labels += [place] * len(part)
    found = {judge: classify(written) for judge, classify in judges.items()}
    right = {judge: [a == b for a, b in zip(verdicts, labels, strict=True)] for judge, verdicts in found.items()}
    of_value = {
        value: sum(ok for ok, label in zip(right["cnn"], labels, strict=True) if label == place) / labels.count(place)
        for place, value in enumerate(values)
    }
    return {
        "temperature": temperature,
        "sentences": len(written),
        "accuracy": sum(right["cnn"]) / len(written),
        "accuracy_of": of_value,
        "accuracy_linear": sum(right["linear"]) / len(written),
        "perplexity": language_model.perplexity(written),
        **_diversity(written),
    }, written


def _diversity(sentences: list[str]) -> dict[str, float]:
    words = [len(sentence.split()) for sentence in sentences]
    return {
        "distinct_1": distinct_n(sentences, 1),
        "distinct_2": distinct_n(sentences, 2),
        "distinct_sentences": len(set(sentences)) / len(sentences),
        "words_a_sentence": sum(words) / len(words),
        "unknown_words": sum(sentence.split().count("<unk>") for sentence in sentences) / sum(words),
    }


def pairs(model: ControlledTextVAE, vocabulary: Vocabulary, seed: int) -> list[dict[str, str]]:
    """Write, greedily, sentences of the same z and each sentiment."""
    name, values = next(iter(model.attributes.items()))
    z = model.draw_latent(PAIRS, generator=torch.Generator().manual_seed(seed))
    columns = []
    for value in values:
        attributes = model.choose(torch.zeros(PAIRS, len(model.attributes), dtype=torch.int64), {name: value})
        columns.append([vocabulary.decode(row) for row in model.decode(z, attributes)[0]])
    return [dict(zip(values, row, strict=True)) for row in zip(*columns, strict=True)]


def measure(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Judge a run; the figures as plain types."""
    train, valid, test = (load_labeled("sst2", split) for split in ("train", "valid", "test"))
    judges = {"cnn": convolutional_judge(train, valid, seed=seed + 1000), "linear": linear_judge(train)}
    words = Vocabulary.build(train.sentences, min_count=2)
    language_model = train_language_model(train.sentences, words, valid=valid.sentences, seed=seed + 1000)
    # the last weights: temperature and learning rate have gone their whole course
    model, vocabulary, settings = load_run(folder, which="last")
    longest = settings["longest"]
    short = test.up_to(longest)
    rows = []
    for temperature in TEMPERATURES:
        options: dict[str, Any] = {"count": count, "temperature": temperature, "seed": seed}
        row, sentences = judged(model, vocabulary, judges, language_model, **options)
        rows.append(row | {"examples": random.Random(seed).sample(sentences, 10)})
    return {
        "data": "sst2",
        "longest": longest,
        "generated": rows,
        "same_z": pairs(model, vocabulary, seed),
        "classifiers": {
            judge: {"test": accuracy(classify, test), "test_short": accuracy(classify, short)}
            for judge, classify in judges.items()
        },
        "real": {
            "sentences": len(short.sentences),
            "perplexity": language_model.perplexity(short.sentences),
            **_diversity(short.sentences),
        },
        "language_model_perplexity": language_model.perplexity(test.sentences),
        "settings": {name: value for name, value in settings.items() if name != "out"},
        "seed": seed,
        **describe(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.controlled", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/controlled_sst2"), metavar="FOLDER", help="of the run")
    parser.add_argument("--count", type=int, default=1000, metavar="INT", help="sentences to judge")
    parser.add_argument("--seed", type=int, default=0, metavar="INT")
    parser.add_argument("--out", type=Path, default=CONTROLLED, metavar="FILE", help="JSON to write")
    arguments = parser.parse_args()
    last = arguments.run / "checkpoints" / "last.ckpt"
    if not last.exists() or not _finished(last):
        train_run(arguments.run)
    result = measure(arguments.run, arguments.count, arguments.seed)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(controlled(arguments.out))
    return 0


def _finished(checkpoint: Path) -> bool:
    from fastvae.training.checkpoint import read_checkpoint

    saved = read_checkpoint(checkpoint)
    return bool(saved["position"]["epoch"] >= saved["train_config"]["epochs"])


if __name__ == "__main__":
    sys.exit(main())
