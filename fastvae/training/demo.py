"""`fastvae demo`: learn a language whose entropy is known, and show what was learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastvae.data import AssistantGrammar, TextCorpus, Vocabulary
from fastvae.data.assistant import assistant_utterances
from fastvae.models import SentenceVAE
from fastvae.training.batches import ordered_batches
from fastvae.training.checkpoint import load_run
from fastvae.training.config import TrainConfig
from fastvae.training.metrics import Evaluation, evaluate
from fastvae.training.run import train
from fastvae.training.text import interpolate_sentences, reconstruct_sentences, sample_sentences

# A final KL weight below 1 and much word dropout keep the decoder reading z: of its own accord an LSTM learns
# these sentences without. The figures in the table are unweighted, and without word dropout, all the same.
_SETTINGS: dict[str, Any] = {
    "embed_dim": 128,
    "hidden_size": 192,
    "latent_dim": 16,
    "share_embedding": True,
    "word_dropout": 0.4,
    "batch_size": 64,
    "epochs": 12,
    "lr": 3e-3,
    "lr_schedule": "linear",
    "kl_schedule": "linear",
    "kl_weight": 0.35,
    "kl_steps": 2500,
}
_QUICK = {"embed_dim": 32, "hidden_size": 32, "latent_dim": 8, "epochs": 1}


def demo(folder: str | Path = "runs/demo", *, seconds: float = 140.0, quick: bool = False) -> bool:
    """Train on the embedded corpus and print figures, reconstructions, an interpolation and samples.

    Args:
        folder: folder of the run; one that is there is replaced.
        seconds: most time spent training.
        quick: a tiny model and one epoch at most, to see the way rather than the result.

    Returns:
        Whether it was interrupted by Ctrl-C.

    Raises:
        ValueError: `seconds` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    console = Console()
    grammar = AssistantGrammar()
    vocabulary = Vocabulary(grammar.words())
    config = TrainConfig(
        data="assistant",
        out=str(folder),
        vocab_size=len(vocabulary),
        max_minutes=seconds / 60,
        **(_SETTINGS | (_QUICK if quick else {})),
    )
    entropy = grammar.entropy()
    console.print(
        f"Learning to speak to a car: {len(vocabulary):,} words, about {grammar.expected_length():.1f} "
        f"a sentence, entropy {entropy:.2f} nats.",
        soft_wrap=True,
    )
    result = train(config, overwrite=True, vocabulary=vocabulary, floor=entropy)
    if result.interrupted:
        console.print(f"stopped; continue with: fastvae train --out {folder} --resume")
        return True
    planned = config.epochs * (len(assistant_utterances("train")) // config.batch_size)
    if result.steps < planned:
        console.print(
            f"Stopped by the time limit after {result.steps:,} of {planned:,} steps, so far from what it can "
            "learn: this machine is slow or busy. Give more time: fastvae demo --seconds 600",
            soft_wrap=True,
        )
    model, vocabulary, _ = load_run(folder)
    heldout = assistant_utterances("test")[: 200 if quick else None]
    corpus = TextCorpus([utterance.text for utterance in heldout], vocabulary)
    figures = evaluate(model, ordered_batches(corpus, 64), iw_samples=20, data="assistant", split="test")
    figures.save(Path(folder) / "evaluation_test.json")
    floor = -sum(utterance.log_prob for utterance in heldout) / len(heldout)
    console.print(_table(figures, entropy, floor, result.seconds))
    _show_sentences(console, model, vocabulary, [utterance.text for utterance in heldout])
    console.print(f"Curves: {Path(folder) / 'curves.png'}", soft_wrap=True)
    console.print(f'More:   fastvae sample {folder}   fastvae reconstruct {folder} "take me home"', soft_wrap=True)
    return False


def _table(figures: Evaluation, entropy: float, floor: float, seconds: float) -> Table:
    table = Table(title=f"{figures.sentences:,} held-out sentences, after {seconds:.0f} s of training")
    table.add_column("")
    table.add_column("nats / sentence", justify="right")
    table.add_column("")
    table.add_row("true model", f"{floor:.2f}", f"their exact -log p; the entropy is {entropy:.2f}")
    assert figures.iw_nll is not None
    above = f"{100 * (figures.iw_nll / floor - 1):.1f} % above the true model"
    table.add_row("IW-NLL", f"{figures.iw_nll:.2f}", f"{figures.iw_samples} samples; {above}")
    table.add_row("-ELBO", f"{figures.neg_elbo:.2f}", f"PPL {figures.ppl:.2f} a word")
    table.add_row("  NLL", f"{figures.nll:.2f}", "given z")
    table.add_row("  KL", f"{figures.kl:.2f}", "carried by z")
    table.add_row("active units", str(figures.active_units), f"of {figures.latent_dim}")
    return table


def _show_sentences(console: Console, model: SentenceVAE, vocabulary: Vocabulary, sentences: list[str]) -> None:
    chosen = sorted(dict.fromkeys(sentences[:200]), key=len)[60:140:10]  # distinct, of middling length
    console.print("\n[bold]Held-out sentences, and the same written again from z[/bold]")
    for original, copy in zip(chosen, reconstruct_sentences(model, vocabulary, chosen, max_length=30), strict=True):
        console.print(f"  {original}\n  [green]{copy}[/green]\n", highlight=False, soft_wrap=True)
    console.print("[bold]From one sentence to another, in seven steps of z[/bold]")
    for sentence in interpolate_sentences(model, vocabulary, chosen[0], chosen[-1], 7, max_length=30):
        console.print(f"  {sentence}", highlight=False, markup=False, soft_wrap=True)
    console.print("\n[bold]New sentences, z from the prior[/bold]")
    for sentence in sample_sentences(model, vocabulary, 8, max_length=30):
        console.print(f"  {sentence}", highlight=False, markup=False, soft_wrap=True)
    console.print()
