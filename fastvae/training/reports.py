"""What `fastvae evaluate` measures and prints of a run on text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from fastvae.data import TextCorpus, load_text
from fastvae.training.batches import ordered_batches
from fastvae.training.metrics import Evaluation, Figures, TextFigures, VAEFigures, evaluate
from fastvae.training.text import reconstruct_sentences, sample_sentences

if TYPE_CHECKING:
    from fastvae.data import Vocabulary
    from fastvae.models import SentenceVAE
    from fastvae.training.mixture_metrics import MixtureEvaluation

IW_SAMPLES = 100  # unless told otherwise
Rows = list[tuple[str, str, str]]  # name, value, unit
_Text = TypeVar("_Text", bound=TextFigures)


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What to measure of a run on text; a model has no use for some of it (`TextModel.lacks`).

    Args:
        data, split: the text, as `load_text`.
        training_data, training_split: what the model was trained on; `data` when None.
        iw_samples: of the importance-weighted bound; 0 leaves it out, None means 100 where the model has one.
        samples, reverse_samples: as `measure_writing`.
        context_words: of a dialogue, as `fastvae.training.dialogue_metrics.evaluate_dialogue`.
        batch_size: sentences at a time.
        seed: of every draw.
    """

    data: str
    split: str
    training_data: str | None = None
    training_split: str = "train"
    iw_samples: int | None = 0
    samples: int = 0
    reverse_samples: int = 0
    context_words: int = 60
    batch_size: int = 32
    seed: int = 0

    @property
    def source(self) -> dict[str, Any]:
        """The arguments that every measurement takes."""
        return {"seed": self.seed, "data": self.data, "split": self.split}

    @property
    def writing(self) -> dict[str, Any]:
        """The arguments of `measure_writing`, the seed left out."""
        return {
            "training_data": self.training_data or self.data,
            "training_split": self.training_split,
            "samples": self.samples,
            "reverse_samples": self.reverse_samples,
        }


def report_sentences(model: SentenceVAE, vocabulary: Vocabulary, options: ReportOptions) -> tuple[Figures, str, Rows]:
    """Measure a sentence VAE.

    Args:
        model, vocabulary: what `load_run` gives.
        options: on what, and how much of it.

    Returns:
        The figures, a title, and the rows of a table.
    """
    sentences = load_text(options.data, options.split)
    batches = ordered_batches(TextCorpus(sentences, vocabulary), options.batch_size)
    usual = IW_SAMPLES if model.regularizer == "kl" else 0  # others have no density to weigh samples by
    iw_samples = usual if options.iw_samples is None else options.iw_samples
    result = evaluate(model, batches, iw_samples=iw_samples, **options.source)
    result = measure_writing(result, model, vocabulary, sentences, seed=options.seed, **options.writing)
    return result, title_of(result), sentence_rows(result)


def title_of(result: Evaluation | MixtureEvaluation) -> str:
    """Say what was measured."""
    return f"{result.data} ({result.split}): {result.sentences:,} sentences, {result.tokens:,} predicted tokens"


def sentence_rows(result: Evaluation) -> Rows:
    """Return the rows of what `evaluate` measures."""
    rows = [*elbo_rows(result, "a sentence"), ("PPL", f"{result.ppl:.4f}", "a predicted token, from -ELBO")]
    if result.iw_nll is not None and result.iw_ppl is not None:
        rows.append(("IW-NLL", f"{result.iw_nll:.4f}", f"nats a sentence, {result.iw_samples} samples"))
        rows.append(("IW-PPL", f"{result.iw_ppl:.4f}", ""))
    rows.append(("active units", f"{result.active_units} of {result.latent_dim}", ""))
    limit = f"nats, from {result.mutual_information_sentences} sentences"
    rows.append(("I(z;x)", f"{result.mutual_information:.4f}", limit))
    return rows + writing_rows(result)


def measure_writing(
    result: _Text,
    model: Any,
    vocabulary: Vocabulary,
    sentences: Sequence[str],
    *,
    training_data: str = "",
    training_split: str = "train",
    samples: int = 0,
    reverse_samples: int = 0,
    seed: int = 0,
) -> _Text:
    """Measure what a model of text writes: BLEU of reconstruction and, of samples, what is asked for.

    Args:
        result: figures so far.
        model: with the methods `reconstruct` and `sample` of a `SentenceVAE`; in evaluation mode.
        vocabulary: of the model.
        sentences: to write again, and on which reverse PPL is measured.
        training_data, training_split: what word_kl compares with; needed with `reverse_samples` alone.
        samples: sentences to draw for self-BLEU and distinct n-grams; 0 leaves them out.
        reverse_samples: sentences to draw for reverse PPL and word-KL, on which a language model is trained for
            up to 10 epochs; 0 leaves them out.
        seed: of every draw.

    Returns:
        The figures with those of `TextFigures`.

    Raises:
        ValueError: there is one sample alone, or so few that no language model can be trained.
    """
    from fastvae.training import text_metrics

    ordered = sorted(sentences, key=lambda sentence: -len(sentence.split()))  # few are decoded beyond their end
    written = reconstruct_sentences(model, vocabulary, ordered)
    known = [vocabulary.decode(vocabulary.encode(sentence)) for sentence in ordered]
    figures: dict[str, Any] = {"bleu": text_metrics.bleu(written, known)}
    drawn = []
    if samples or reverse_samples:
        drawn = sample_sentences(model, vocabulary, max(samples, reverse_samples), seed=seed)
    if samples:
        some = drawn[:samples]
        figures |= {"samples": samples, "self_bleu": text_metrics.self_bleu(some)}
        figures |= {f"distinct_{n}": text_metrics.distinct_n(some, n) for n in (1, 2)}
    if reverse_samples:
        some = drawn[:reverse_samples]
        device = next(model.parameters()).device
        figures |= {
            "reverse_samples": reverse_samples,
            "reverse_ppl": text_metrics.reverse_perplexity(some, sentences, vocabulary, seed=seed, device=device),
            "word_kl": text_metrics.word_kl(some, load_text(training_data, training_split), vocabulary),
        }
    return replace(result, **figures)


def writing_rows(result: TextFigures) -> Rows:
    """Return the rows of a table that tell of `TextFigures`."""
    rows = []
    if result.bleu is not None:
        rows.append(("BLEU", f"{result.bleu:.2f}", "of sentences written again from the posterior mean"))
    if result.self_bleu is not None:
        rows.append(("self-BLEU", f"{result.self_bleu:.2f}", f"of {result.samples:,} samples from the prior"))
        rows.append(("distinct-1", f"{result.distinct_1:.4f}", "different words of all in those samples"))
        rows.append(("distinct-2", f"{result.distinct_2:.4f}", "the same of pairs of words"))
    if result.reverse_ppl is not None:
        model = f"a language model trained on {result.reverse_samples:,} samples"
        rows.append(("reverse PPL", f"{result.reverse_ppl:.4f}", f"of {model}"))
        rows.append(("word-KL", f"{result.word_kl:.4f}", "nats, of their words to those of the training text"))
    return rows


def elbo_rows(result: VAEFigures | MixtureEvaluation, unit: str) -> Rows:
    """Return the rows that the table of every VAE begins with."""
    return [
        ("-ELBO", f"{result.neg_elbo:.4f}", f"nats {unit}"),
        ("  NLL", f"{result.nll:.4f}", ""),
        ("  KL", f"{result.kl:.4f}", ""),
    ]
