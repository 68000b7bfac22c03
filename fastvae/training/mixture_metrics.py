"""What a `MixtureVAE` is judged by: the terms of its bound, I(c;x), its codes, and BLEU of what it writes again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvae.data import load_text
from fastvae.models.evidence import evaluating
from fastvae.training.metrics import Figures, TextFigures, perplexity
from fastvae.training.reports import ReportOptions, Rows, elbo_rows, measure_writing, title_of, writing_rows
from fastvae.training.text import encode_sentences

if TYPE_CHECKING:
    from fastvae.data import Vocabulary
    from fastvae.models import MixtureVAE


@dataclass(frozen=True, kw_only=True)
class MixtureEvaluation(TextFigures):
    """Figures of a `MixtureVAE` on a set of sentences, in nats a sentence unless said otherwise.

    Args:
        neg_elbo: nll + kl, of one sample a sentence; of a model of discrete latents with one-hot samples.
        nll: -E_q log p(x|z). kl: KL(q(z, c|x) || p(z, c)), whole. dispersion: L_d, a part of it.
        code_kl: mean KL(q(c|x) || p(c)), a part of `kl`, which is mutual_information and the KL of the mean q(c|x).
        mutual_information: I(c;x) over these sentences, summed over the codes; mutual_information_per_code: of each.
        codes: how many different rows of likeliest codes there are.
        ppl: exp(total -ELBO / predicted tokens).
        sentences, tokens: how many were evaluated; tokens are those predicted, </s> included.
    """

    neg_elbo: float
    nll: float
    kl: float
    dispersion: float
    code_kl: float
    mutual_information: float
    mutual_information_per_code: list[float]
    codes: int
    ppl: float
    sentences: int
    tokens: int


def code_entropy(probabilities: Tensor) -> Tensor:
    """Entropy of each code in nats: `(..., components)` to `(...)`."""
    return torch.special.entr(probabilities).sum(-1)


def code_information(probabilities: Tensor) -> Tensor:
    """I(c;x) of each code over all sentences, in nats: `(sentences, variables, components)` to `(variables,)`."""
    return code_entropy(probabilities.mean(0)) - code_entropy(probabilities).mean(0)


@torch.no_grad()
def code_probabilities(
    model: MixtureVAE, vocabulary: Vocabulary, sentences: Sequence[str], *, batch_size: int = 64
) -> Tensor:
    """Give q(c|x) of sentences.

    Args:
        model, vocabulary: what `load_run` gives.
        sentences: words are separated by white space; unknown ones are read as <unk>.
        batch_size: sentences at a time.

    Returns:
        float64 on the CPU, `(sentences, variables, components)`.

    Raises:
        ValueError: there is no sentence, or one of them has no word.
    """
    parts: list[Tensor] = []
    with evaluating(model):
        for start in range(0, len(sentences), batch_size):
            batch = encode_sentences(vocabulary, sentences[start : start + batch_size]).to(_device(model))
            parts.append(model.encode(batch.tokens, batch.lengths).logits.double().softmax(-1).cpu())
    if not parts:
        raise ValueError("there are no sentences to evaluate")
    return torch.cat(parts)


@torch.no_grad()
def evaluate_mixture(
    model: MixtureVAE,
    vocabulary: Vocabulary,
    sentences: Sequence[str],
    *,
    batch_size: int = 64,
    seed: int = 0,
    data: str = "",
    split: str = "",
    **writing: Any,
) -> MixtureEvaluation:
    """Evaluate a model on sentences, each counted once and no term weighted.

    Args:
        model, vocabulary: what `load_run` gives; the model is evaluated with dropout off and left as it was.
        sentences: words are separated by white space.
        batch_size: sentences at a time, of like length.
        seed: of every draw; the same seed gives the same figures.
        data, split: written into the result as they are.
        writing: samples, reverse_samples and training_data, as `fastvae.training.reports.measure_writing`.

    Raises:
        ValueError: there are no sentences, one has no word, or the model gives a figure that is not finite.
    """
    generator = torch.Generator(_device(model)).manual_seed(seed)
    sums = torch.zeros(4, dtype=torch.float64)
    ordered = sorted(sentences, key=lambda sentence: -len(sentence.split()))
    probabilities: list[Tensor] = []
    with evaluating(model):
        for start in range(0, len(ordered), batch_size):
            batch = encode_sentences(vocabulary, ordered[start : start + batch_size]).to(_device(model))
            output = model(batch.tokens, batch.lengths, num_samples=1, generator=generator)
            terms = (output.nll, output.kl, output.dispersion, output.tokens)
            sums += torch.stack([term.double().sum() for term in terms]).cpu()
            probabilities.append(output.logits.double().softmax(-1).cpu())
    if not probabilities:
        raise ValueError("there are no sentences to evaluate")
    q = torch.cat(probabilities)
    nll, kl, dispersion, tokens = (sums / len(q)).tolist()
    if not math.isfinite(nll + kl):
        raise ValueError(f"the -ELBO is {nll + kl}: the model's weights are damaged or training diverged")
    information = code_information(q)
    result = MixtureEvaluation(
        neg_elbo=nll + kl,
        nll=nll,
        kl=kl,
        dispersion=dispersion,
        code_kl=float((math.log(q.size(-1)) - code_entropy(q)).sum(1).mean()),
        mutual_information=float(information.sum()),
        mutual_information_per_code=information.tolist(),
        codes=len(q.argmax(-1).unique(dim=0)),
        ppl=perplexity(nll + kl, tokens),
        sentences=len(q),
        tokens=round(tokens * len(q)),
        data=data,
        split=split,
    )
    return measure_writing(result, model, vocabulary, ordered, seed=seed, **writing)


def report_mixture(model: MixtureVAE, vocabulary: Vocabulary, options: ReportOptions) -> tuple[Figures, str, Rows]:
    """Measure a `MixtureVAE`; arguments and result as `fastvae.training.reports.report_sentences`."""
    sentences, batch_size = load_text(options.data, options.split), options.batch_size
    how = options.source | options.writing
    result = evaluate_mixture(model, vocabulary, sentences, batch_size=batch_size, **how)
    each = " ".join(f"{value:.3f}" for value in result.mutual_information_per_code)
    rows = [
        *elbo_rows(result, "a sentence"),
        ("    L_d", f"{result.dispersion:.4f}", "the dispersion of the components"),
        ("    KL of c", f"{result.code_kl:.4f}", ""),
        ("PPL", f"{result.ppl:.4f}", "a predicted token, from -ELBO"),
        ("I(c;x)", f"{result.mutual_information:.4f}", f"nats: {each}"),
        ("codes", str(result.codes), "different rows of likeliest codes"),
        *writing_rows(result),
    ]
    return result, title_of(result), rows


def _device(model: MixtureVAE) -> torch.device:
    return next(model.parameters()).device
