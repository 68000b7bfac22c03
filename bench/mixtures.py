"""Sentence VAEs with discrete codes side by side, trained alike: ``python -m bench.mixtures dailydialog``.

Each model is trained with the settings of ``fastvae/configs/dem_vae_*.yaml``, of which only the kind of model and the
weight of I(c;x) change, and is evaluated on the test part. The rows are written to ``bench/results`` one by one: a
model that is there with the same settings is left out, and a run that was interrupted goes on.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from bench.tables import RESULTS
from fastvae.data import load_text
from fastvae.data.corpus import corpus_folder
from fastvae.data.dailydialog import dailydialog_dialogues
from fastvae.files import replace_atomically
from fastvae.models.mixture_vae import KINDS
from fastvae.training.checkpoint import load_run, read_checkpoint
from fastvae.training.config import MixtureConfig, read_yaml
from fastvae.training.mixture_metrics import code_probabilities, evaluate_mixture
from fastvae.training.run import train
from fastvae.training.text import sample_sentences
from fastvae.training.text_metrics import homogeneity, reverse_perplexity, word_kl

# What of the settings each model changes.
MODELS: dict[str, dict[str, Any]] = {
    "AE": {"kind": "ae"},
    "VAE": {"kind": "vae"},
    "DI-VAE": {"kind": "di_vae"},
    "semi-VAE": {"kind": "semi_vae"},
    "GM-VAE": {"kind": "gm_vae"},
    "GM-VAE + L_mi": {"kind": "gm_vae", "mutual_information_weight": 1.0},
    "DGM-VAE": {"kind": "dgm_vae"},
    "DGM-VAE + L_mi": {"kind": "dgm_vae", "mutual_information_weight": 1.0},
}
OF_PTB = ("AE", "VAE", "GM-VAE", "GM-VAE + L_mi", "DGM-VAE", "DGM-VAE + L_mi")
_SAMPLES = 10_000  # from the prior, for word-KL and reverse perplexity
_LANGUAGE_MODEL = {"embed_dim": 128, "hidden_size": 128, "epochs": 5}


def measure(name: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train a model, or what is left of its training, and return its row."""
    config = MixtureConfig.from_mapping(settings | MODELS[name] | {"out": str(folder)})
    last = folder / "checkpoints" / "last.ckpt"
    started = last.is_file()
    if not started or read_checkpoint(last)["position"]["epoch"] < config.epochs:
        result = train(config, resume=started, overwrite=not started)
        if result.interrupted:
            raise KeyboardInterrupt
    model, vocabulary, _ = load_run(folder)
    test = load_text(config.data, "test")
    figures = evaluate_mixture(model, vocabulary, test, data=config.data, split="test").to_dict()
    figures = {key: value for key, value in figures.items() if value is not None}
    figures |= of_labels(model, vocabulary) if config.data == "dailydialog" else of_samples(model, vocabulary, config)
    return {"model": name, **figures, "steps": read_checkpoint(last)["global_step"], "settings": _described(config)}


def of_labels(model: Any, vocabulary: Any) -> dict[str, float]:
    """How far the likeliest codes of DailyDialog's test utterances tell their act and their emotion."""
    dialogues = dailydialog_dialogues(corpus_folder("dailydialog"), "test")
    utterances = [utterance for dialogue in dialogues for utterance in dialogue]
    codes = code_probabilities(model, vocabulary, [utterance.text for utterance in utterances]).argmax(-1)
    return {
        f"homogeneity_{label}": homogeneity([getattr(utterance, label) for utterance in utterances], codes.numpy())
        for label in ("act", "emotion")
    }


def of_samples(model: Any, vocabulary: Any, config: MixtureConfig) -> dict[str, float]:
    """How near sentences from the prior come to real ones."""
    samples = []
    for first in range(0, _SAMPLES, 1000):
        samples += sample_sentences(model, vocabulary, 1000, seed=first, max_length=config.max_length or 100)
    test = load_text(config.data, "test")
    return {
        "samples": len(samples),
        "reverse_ppl": reverse_perplexity(samples, test, vocabulary, **_LANGUAGE_MODEL),
        "word_kl": word_kl(samples, load_text(config.data, "train"), vocabulary),
    }


def _described(config: MixtureConfig) -> dict[str, Any]:
    """Give the settings that tell one result from another, those that the kind fixes as it fixes them."""
    settings = {name: value for name, value in config.to_dict().items() if name not in ("out", "max_minutes")}
    return settings | {name: value for name, value in KINDS[config.kind].items() if name in settings}


def _rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.is_file() else []


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.mixtures", description=__doc__)
    parser.add_argument("data", choices=("dailydialog", "ptb"))
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings [those of dem_vae_DATA]")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)} [all]")
    parser.add_argument("--seed", type=int, metavar="INT", help="that of the settings otherwise")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="where the runs go [build/mixtures/NAME]")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="[bench/results/NAME_mixtures.json], NAME: that of FILE or DATA, and the seed",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # such small products gain nothing from more
    import fastvae

    known = Path(fastvae.__file__).parent / "configs" / f"dem_vae_{arguments.data}.yaml"
    settings = read_yaml(arguments.config or known)
    which = arguments.config.stem if arguments.config else arguments.data
    if arguments.seed is not None:
        settings, which = settings | {"seed": arguments.seed}, f"{which}_{arguments.seed}"
    out = arguments.out or RESULTS / f"{which}_mixtures.json"
    runs = arguments.runs or Path("build") / "mixtures" / which
    for name in arguments.models or (MODELS if arguments.data == "dailydialog" else OF_PTB):
        wanted = _described(MixtureConfig.from_mapping(settings | MODELS[name]))
        if any(row["model"] == name and row["settings"] == wanted for row in _rows(out)):
            print(f"{name}: measured already")
            continue
        row = measure(name, settings, runs / re.sub(r"\W+", "_", name).lower())
        rows = [*(other for other in _rows(out) if other["model"] != name), row]  # others may have been at work
        rows.sort(key=lambda row: list(MODELS).index(row["model"]))
        text = json.dumps(rows, indent=2) + "\n"
        replace_atomically(out, lambda file, text=text: file.write(text.encode()))
        print({key: value for key, value in row.items() if isinstance(value, float)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
