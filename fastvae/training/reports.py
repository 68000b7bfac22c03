"""What `fastvae evaluate` measures and prints of a run on text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastvae.data import TextCorpus, load_text
from fastvae.training.batches import ordered_batches
from fastvae.training.metrics import Figures, VAEFigures, evaluate

if TYPE_CHECKING:
    from fastvae.data import Vocabulary
    from fastvae.models import SentenceVAE

Rows = list[tuple[str, str, str]]  # name, value, unit


def report_sentences(
    model: SentenceVAE,
    vocabulary: Vocabulary,
    *,
    data: str,
    split: str,
    iw_samples: int = 0,
    batch_size: int = 32,
    seed: int = 0,
) -> tuple[Figures, str, Rows]:
    """Measure a sentence VAE.

    Args:
        model, vocabulary: what `load_run` gives.
        data, split: the sentences, as `load_text`.
        iw_samples, seed: as `evaluate`.
        batch_size: sentences at a time.

    Returns:
        The figures, a title, and the rows of a table.
    """
    corpus = TextCorpus(load_text(data, split), vocabulary)
    batches = ordered_batches(corpus, batch_size)
    result = evaluate(model, batches, iw_samples=iw_samples, seed=seed, data=data, split=split)
    rows = [*elbo_rows(result, "a sentence"), ("PPL", f"{result.ppl:.4f}", "a predicted token, from -ELBO")]
    if result.iw_nll is not None and result.iw_ppl is not None:
        rows.append(("IW-NLL", f"{result.iw_nll:.4f}", f"nats a sentence, {result.iw_samples} samples"))
        rows.append(("IW-PPL", f"{result.iw_ppl:.4f}", ""))
    rows.append(("active units", f"{result.active_units} of {result.latent_dim}", ""))
    limit = f"nats, from {result.mutual_information_sentences} sentences"
    rows.append(("I(z;x)", f"{result.mutual_information:.4f}", limit))
    title = f"{data} ({split}): {result.sentences:,} sentences, {result.tokens:,} predicted tokens"
    return result, title, rows


def elbo_rows(result: VAEFigures, unit: str) -> Rows:
    """Return the rows that the table of every VAE begins with."""
    return [
        ("-ELBO", f"{result.neg_elbo:.4f}", f"nats {unit}"),
        ("  NLL", f"{result.nll:.4f}", ""),
        ("  KL", f"{result.kl:.4f}", ""),
    ]
