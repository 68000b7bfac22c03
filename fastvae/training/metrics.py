"""What a model is judged by, in nats: -ELBO, importance-weighted NLL, KL, active units, I(z;x), PPL; errors.

The batches are read once and nothing grows with their number: the active units come from running moments and
the mutual information from a uniform sample of the posteriors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvae import functional
from fastvae.models.evidence import evaluating
from fastvae.training.checkpoint import replace_atomically

if TYPE_CHECKING:
    from fastvae.data import LabeledBatch, TextBatch
    from fastvae.models import ControlledTextVAE, SentenceVAE
    from fastvae.training.array_models import ArrayModel

ACTIVE_VARIANCE = 0.01  # Burda et al. 2016
_KEPT_NUMBERS = 1 << 26  # of the posteriors kept for I(z;x)
_PAIR_NUMBERS = 1 << 22  # of the largest tensor on the way to I(z;x) of full covariances


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured, on which data, and by which software.

    Args:
        data, split: what was evaluated. versions: of the software.
    """

    data: str = ""
    split: str = ""
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain types."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the figures as JSON, atomically; null for those that are not finite, which JSON has no word for."""
        figures = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in self.to_dict().items()}
        text = json.dumps(figures, indent=2, allow_nan=False) + "\n"
        replace_atomically(path, lambda file: file.write(text.encode()))


@dataclass(frozen=True, kw_only=True)
class VAEFigures(Figures):
    """Figures of a VAE, in nats a sentence or a row.

    Args:
        neg_elbo: nll + kl, never annealed, one sample of z each.
        nll: reconstruction term -E_q log p(x|z). kl: KL(q(z|x) || N(0, I)).
        iw_nll: importance-weighted estimate of -log p(x) with iw_samples samples; None when not asked for.
        active_units: latent dimensions whose posterior mean varies over the data, Var_x(mean_d) > 0.01.
        latent_dim: how many there are.
    """

    neg_elbo: float
    nll: float
    kl: float
    iw_nll: float | None
    iw_samples: int
    active_units: int
    latent_dim: int


@dataclass(frozen=True, kw_only=True)
class TextFigures(Figures):
    """Figures of what a model of text writes; None for those that were not asked for.

    Args:
        bleu: of sentences written again, greedily from the posterior mean, 0 to 100, against the words that the
            vocabulary has.
        samples: how many sentences were drawn from the prior for self_bleu (0 to 100), distinct_1 and distinct_2 (0 to
            1), all as in `fastvae.training.text_metrics`.
        reverse_samples: how many were drawn for reverse_ppl, the perplexity of the evaluated sentences under a
            language model trained on them, and word_kl, the KL in nats of their word frequencies to those of the
            training text.
    """

    bleu: float | None = None
    samples: int = 0
    self_bleu: float | None = None
    distinct_1: float | None = None
    distinct_2: float | None = None
    reverse_samples: int = 0
    reverse_ppl: float | None = None
    word_kl: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation(VAEFigures, TextFigures):
    """Figures of a sentence VAE on a set of sentences, in nats a sentence unless said otherwise.

    Args:
        ppl: exp(total -ELBO / predicted tokens). iw_ppl: the same from iw_nll.
        mutual_information: estimate of I(z;x) under q from `mutual_information_sentences` posteriors, of
            whose number it is at most the logarithm.
        sentences, tokens: how many were evaluated; tokens are those predicted, </s> included.
    """

    ppl: float
    iw_ppl: float | None
    mutual_information: float
    mutual_information_sentences: int
    sentences: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class ArrayEvaluation(VAEFigures):
    """Figures of a VAE on vectors or images, in nats a row, of the scaled numbers.

    Args:
        kl_per_dimension: KL of each dimension of z, which sum to the KL; of a full posterior that of each marginal.
        mutual_information: as in `Evaluation`, from `mutual_information_rows` posteriors.
        bits_per_dimension: -ELBO in bits over the numbers of a row, where that is a code length: of classes, and of
            numbers that are 0 or 1; else None.
        rows: how many were evaluated.
    """

    kl_per_dimension: list[float]
    mutual_information: float
    mutual_information_rows: int
    bits_per_dimension: float | None
    rows: int


@dataclass(frozen=True, kw_only=True)
class AutoEncoderEvaluation(Figures):
    """Figures of an auto-encoder.

    Args:
        error: what training minimises, mean over the rows: 1/2 |x - reconstruction|^2, or the Bernoulli NLL in nats; of
            the scaled numbers. A denoising auto-encoder reads the rows corrupted for it, and as they are for the rest.
        squared_error: mean over all numbers, in their own units.
        explained: 1 - |x - reconstruction|^2 / |x - mean|^2, sums over all rows; NaN where these do not differ.
        latent_dim: size of the code. rows: how many were evaluated.
    """

    error: float
    squared_error: float
    explained: float
    latent_dim: int
    rows: int


class RunningMoments:
    """Mean and variance of each dimension over rows that come in batches (Chan et al. 1983), in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.squares = torch.zeros(0, dtype=torch.float64)

    def update(self, rows: torch.Tensor) -> None:
        """Add a batch of rows, shape (batch, dims)."""
        rows = rows.to("cpu", torch.float64)
        if not len(rows):
            return
        mean = rows.mean(0)
        squares = (rows - mean).square().sum(0)
        if self.count == 0:
            self.count, self.mean, self.squares = len(rows), mean, squares
            return
        total = self.count + len(rows)
        delta = mean - self.mean
        self.squares = self.squares + squares + delta.square() * (self.count * len(rows) / total)
        self.mean = self.mean + delta * (len(rows) / total)
        self.count = total

    @property
    def variance(self) -> torch.Tensor:
        """The population variance of each dimension, shape (dims,)."""
        return self.squares / max(self.count, 1)


class PosteriorSample:
    """A uniform sample of posteriors from a stream, of bounded size (reservoir sampling, Vitter 1985).

    Args:
        size: posteriors kept at most; fewer where they would take more than half a GiB.
        seed: of the choice.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.seen = 0
        self.rows: list[torch.Tensor] = []
        self._generator = torch.Generator().manual_seed(seed)

    def update(self, *parameters: torch.Tensor) -> None:
        """Add a batch of posteriors, the same parameters each time: mean (batch, latent), then its spread."""
        self._widths = [part.shape[1] for part in parameters]
        size = max(1, min(self.size, _KEPT_NUMBERS // max(1, sum(self._widths))))
        for row in torch.cat(parameters, 1).to("cpu", torch.float64):
            self.seen += 1
            if len(self.rows) < size:
                self.rows.append(row)
                continue
            place = int(torch.randint(self.seen, (), generator=self._generator))
            if place < size:
                self.rows[place] = row

    def parameters(self) -> tuple[torch.Tensor, ...]:
        """Return what was kept as it was given, in float64."""
        return torch.stack(self.rows).split(self._widths, 1)


def mutual_information(mean: torch.Tensor, log_var: torch.Tensor, *, seed: int = 0) -> float:
    """Estimate I(z;x) = E_x KL(q(z|x) || q(z)) under the uniform distribution over the given posteriors, in float64.

    One z is drawn from each posterior, and q(z) is the exact mixture of all of them, so the estimate is at
    most log(sentences) up to noise: with a few thousand posteriors, values near 8 nats are a lower bound.

    Args:
        mean, log_var: posteriors, shape (sentences, latent).
        seed: of the draws.

    Returns:
        The estimate in nats; 0 for no sentences.

    Source: Hoffman and Johnson 2016, "ELBO surgery".
    """
    draw = torch.tensor([seed], device=mean.device)
    return functional.mutual_information(mean.double(), log_var.double(), seed=draw).item()


def full_mutual_information(
    mean: torch.Tensor, log_diagonal: torch.Tensor, lower: torch.Tensor, *, seed: int = 0
) -> float:
    """Estimate I(z;x) as `mutual_information` does, of posteriors of full covariance.

    The log-densities of all z under some posteriors at a time come from triangular solves with their Cholesky factors,
    so that nothing of size (rows, rows) is stored.

    Args:
        mean, log_diagonal, lower: posteriors in float64, (rows, ...), as `functional.full_gaussian_sample_kl` has them.
        seed: of the draws.
    """
    rows, latent = mean.shape
    scale = functional.scale_tril(log_diagonal, lower)
    draws = torch.Generator().manual_seed(seed)
    noise = torch.randn(mean.shape, dtype=mean.dtype, generator=draws).to(mean.device)
    z = mean + (scale @ noise[..., None]).squeeze(-1)
    normalizer = -scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # and of all: -latent/2 log(2 pi), which drops out
    mixture = mean.new_full((rows,), -math.inf)
    chunk = max(1, _PAIR_NUMBERS // max(1, rows * latent))
    for centre, factor, constant in zip(mean.split(chunk), scale.split(chunk), normalizer.split(chunk), strict=True):
        white = torch.linalg.solve_triangular(factor, (z - centre[:, None]).mT, upper=False)  # (chunk, latent, rows)
        density = constant[:, None] - 0.5 * white.square().sum(1)
        mixture = torch.logaddexp(mixture, density.logsumexp(0))
    own = normalizer - 0.5 * noise.square().sum(-1)
    return float((own - mixture).mean() + math.log(rows))


@torch.no_grad()
def evaluate(
    model: SentenceVAE | ControlledTextVAE,
    batches: Iterable[TextBatch | LabeledBatch],
    *,
    iw_samples: int = 0,
    iw_chunk: int = 50,
    mutual_information_sentences: int = 2048,
    seed: int = 0,
    data: str = "",
    split: str = "",
) -> Evaluation:
    """Evaluate a sentence VAE on batches of sentences, each counted once and the KL never weighted.

    Args:
        model: the model; it is evaluated with dropout off and left as it was.
        batches: TextBatch (tokens (batch, time) int64, lengths (batch,) int64).
        iw_samples: samples of z a sentence for the importance-weighted NLL; 0 leaves it out.
        iw_chunk: how many of them are decoded at once.
        mutual_information_sentences: posteriors kept for the estimate of I(z;x).
        seed: of every draw; the same seed gives the same figures.
        data, split: written into the result as they are.

    Returns:
        The figures, in nats.

    Raises:
        ValueError: there are no sentences, or the model gives a figure that is not finite.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    sums = torch.zeros(4, dtype=torch.float64)  # nll, kl, iw_nll, tokens
    sentences = 0
    moments, posteriors = RunningMoments(), PosteriorSample(mutual_information_sentences, seed)
    with evaluating(model):
        for batch in batches:
            tokens, lengths = batch.tokens.to(device), batch.lengths.to(device)
            output = model(tokens, lengths, generator=generator)
            mean, log_var = model.encode(tokens, lengths)
            sums[0] += output.nll.double().sum().cpu()
            sums[1] += output.kl.double().sum().cpu()
            sums[3] += output.tokens.sum().cpu()
            if iw_samples:
                iw_nll = model.importance_weighted_nll(
                    tokens, lengths, num_samples=iw_samples, chunk=iw_chunk, generator=generator
                )
                sums[2] += iw_nll.double().sum().cpu()
            sentences += len(tokens)
            moments.update(mean)
            posteriors.update(mean, log_var)
    if not sentences:
        raise ValueError("there are no sentences to evaluate")
    nll, kl, iw_total, tokens_total = sums.tolist()
    _require_finite(nll, kl, iw_total)
    kept = posteriors.parameters()
    return Evaluation(
        neg_elbo=(nll + kl) / sentences,
        nll=nll / sentences,
        kl=kl / sentences,
        ppl=perplexity(nll + kl, tokens_total),
        iw_nll=iw_total / sentences if iw_samples else None,
        iw_ppl=perplexity(iw_total, tokens_total) if iw_samples else None,
        iw_samples=iw_samples,
        active_units=int((moments.variance > ACTIVE_VARIANCE).sum()),
        latent_dim=kept[0].shape[1],
        mutual_information=mutual_information(*kept, seed=seed),
        mutual_information_sentences=len(kept[0]),
        sentences=sentences,
        tokens=int(tokens_total),
        data=data,
        split=split,
    )


def _require_finite(nll: float, kl: float, iw_nll: float) -> None:
    for name, value in (("reconstruction NLL", nll), ("KL", kl), ("importance-weighted NLL", iw_nll)):
        if not math.isfinite(value):
            raise ValueError(f"the {name} is {value}: the model's weights are damaged or training diverged")


@torch.no_grad()
def evaluate_array(
    model: ArrayModel,
    batches: Iterable[Tensor],
    *,
    iw_samples: int = 0,
    iw_chunk: int = 50,
    mutual_information_rows: int = 2048,
    seed: int = 0,
    data: str = "",
    split: str = "",
) -> ArrayEvaluation:
    """Evaluate a VAE or an IWAE on vectors or images, each counted once and the KL never weighted.

    Args:
        model: whose `has_prior` is true.
        batches: rows (rows, *shape), unscaled.
        iw_samples, iw_chunk, seed, data, split: as in `evaluate`.
        mutual_information_rows: posteriors kept for the estimate of I(z;x).

    Raises:
        ValueError: there are no rows, or the model gives a figure that is not finite.
    """
    vae: Any = model.model
    generator = torch.Generator(model.device).manual_seed(seed)
    nll = kl = iw_nll = 0.0
    kl_per_dimension: Tensor | float = 0.0
    rows, diagonal = 0, True
    moments, posteriors = RunningMoments(), PosteriorSample(mutual_information_rows, seed)
    with evaluating(vae):
        for batch in batches:
            x = model.input(batch)
            output = vae(x, num_samples=1, generator=generator)
            mean, *spread = vae.encode(x)
            nll += float(output.nll.double().sum())
            kl += float(output.kl.double().sum())
            if iw_samples:
                bound = vae.importance_weighted_nll(x, num_samples=iw_samples, chunk=iw_chunk, generator=generator)
                iw_nll += float(bound.double().sum())
            rows += len(x)
            diagonal = len(spread) == 1
            log_var = spread[0] if diagonal else functional.scale_tril(*spread).square().sum(-1).log()
            kl_per_dimension += functional.gaussian_kl(mean, log_var, reduction="none").double().sum(0)
            moments.update(mean)
            posteriors.update(mean, *spread)
    if not rows:
        raise ValueError("there are no rows to evaluate")
    _require_finite(nll, kl, iw_nll)
    assert isinstance(kl_per_dimension, Tensor)
    kept = posteriors.parameters()
    information = mutual_information if diagonal else full_mutual_information
    discrete = vae.likelihood == "categorical" or (vae.likelihood == "bernoulli" and model.scaling.kind == "binary")
    bits = (nll + kl) / rows / math.prod(model.scaling.shape) / math.log(2)
    return ArrayEvaluation(
        neg_elbo=(nll + kl) / rows,
        nll=nll / rows,
        kl=kl / rows,
        iw_nll=iw_nll / rows if iw_samples else None,
        iw_samples=iw_samples,
        active_units=int((moments.variance > ACTIVE_VARIANCE).sum()),
        latent_dim=kept[0].shape[1],
        kl_per_dimension=(kl_per_dimension / rows).tolist(),
        mutual_information=information(*kept, seed=seed),
        mutual_information_rows=len(kept[0]),
        bits_per_dimension=bits if discrete else None,
        rows=rows,
        data=data,
        split=split,
    )


@torch.no_grad()
def evaluate_autoencoder(
    model: ArrayModel, batches: Iterable[Tensor], *, seed: int = 0, data: str = "", split: str = ""
) -> AutoEncoderEvaluation:
    """Evaluate a linear or denoising auto-encoder on vectors or images; arguments as in `evaluate_array`.

    Raises:
        ValueError: there are no rows, or the model gives a figure that is not finite.
    """
    core: Any = model.model
    error = squares = 0.0
    moments = RunningMoments()
    with evaluating(core):
        options = {"generator": torch.Generator(model.device).manual_seed(seed)} if hasattr(core, "noise") else {}
        for batch in batches:
            error += float(core(model.input(batch), **options).error.double().sum())
            squares += float((batch.to(model.device) - model.reconstruct(batch)).double().square().sum())
            moments.update(batch.flatten(1))
    if not moments.count:
        raise ValueError("there are no rows to evaluate")
    if not math.isfinite(error):
        raise ValueError(f"the error is {error}: the model's weights are damaged or training diverged")
    return AutoEncoderEvaluation(
        error=error / moments.count,
        squared_error=squares / moments.count / len(moments.mean),
        explained=1.0 - squares / variation if (variation := float(moments.squares.sum())) else math.nan,
        latent_dim=model.codes(batch).size(1),
        rows=moments.count,
        data=data,
        split=split,
    )


def perplexity(total_nats: float, tokens: float) -> float:
    """Return exp(total nats / predicted tokens), infinite where that overflows."""
    return math.exp(min(total_nats / max(tokens, 1.0), 709.0))


def versions() -> dict[str, str]:
    """Return the versions of fastvae, torch and Python."""
    import platform

    import fastvae

    return {"fastvae": fastvae.__version__, "torch": torch.__version__, "python": platform.python_version()}
