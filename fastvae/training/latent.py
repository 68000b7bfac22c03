"""Sentences in the latent space of a trained model of sentences: sums of them, neighbours, and a map of a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastvae.data import Vocabulary, read_sentences
from fastvae.models import MixtureVAE, SentenceVAE
from fastvae.training.interpret import labeled_text
from fastvae.training.text import encode_sentences

_CHUNK = 64  # sentences encoded together
METRICS = ("euclidean", "cosine")
PROJECTIONS = ("pca", "tsne")


@torch.no_grad()
def latent_means(model: SentenceVAE | MixtureVAE, vocabulary: Vocabulary, sentences: Sequence[str]) -> Tensor:
    """Give the latent at the posterior's mean of each sentence, as the model's `posterior_mean`.

    Args:
        model, vocabulary: what `load_run` gives.
        sentences: words are separated by white space; unknown ones are read as <unk>.

    Returns:
        float64 on the CPU, `(sentences, latent_dim)`.

    Raises:
        ValueError: there is no sentence, or one of them has no word.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(sentences)), key=lambda place: -len(sentences[place].split()))  # little padding
    parts = []
    for start in range(0, max(len(order), 1), _CHUNK):
        batch = encode_sentences(vocabulary, [sentences[place] for place in order[start : start + _CHUNK]]).to(device)
        parts.append(model.posterior_mean(batch.tokens, batch.lengths).cpu().double())
    return torch.cat(parts)[torch.tensor(order).argsort()]


def combine_sentences(
    model: SentenceVAE | MixtureVAE,
    vocabulary: Vocabulary,
    terms: Sequence[tuple[float, str]],
    *,
    seed: int = 0,
    **options: Any,
) -> str:
    """Write the sentence at a weighted sum of the latent means of sentences.

    Args:
        model, vocabulary: what `load_run` gives.
        terms: weight and sentence; [(1, a), (-1, b), (1, c)] is a - b + c.
        seed: of the draws where options say strategy="sample".
        options: arguments of `SentenceVAE.decode`, such as max_length or strategy.

    Raises:
        ValueError: there is no term, or a sentence has no word.
    """
    weights = torch.tensor([weight for weight, _ in terms], dtype=torch.float64)
    z = weights @ latent_means(model, vocabulary, [sentence for _, sentence in terms])
    parameter = next(model.parameters())
    generator = torch.Generator(parameter.device).manual_seed(seed)
    tokens, _ = model.decode(z.to(parameter).unsqueeze(0), generator=generator, **options)
    return vocabulary.decode(tokens[0])


def nearest_sentences(
    model: SentenceVAE | MixtureVAE,
    vocabulary: Vocabulary,
    sentence: str,
    corpus: Sequence[str],
    count: int = 10,
    *,
    metric: str = "euclidean",
) -> list[tuple[float, str]]:
    """Find the sentences of a corpus whose latent means are nearest to that of a sentence.

    Args:
        model, vocabulary: what `load_run` gives.
        sentence: where to look.
        corpus: what to choose from; one that comes twice counts once.
        count: most sentences to give, at least 1.
        metric: "euclidean", or "cosine", which is 1 - cos of the angle at the origin.

    Returns:
        Distance and sentence, nearest first.

    Raises:
        ValueError: an argument out of range, no sentence to choose from, or one without a word.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    different = list(dict.fromkeys(corpus))
    mean, others = latent_means(model, vocabulary, [sentence]), latent_means(model, vocabulary, different)
    cosine = metric == "cosine"
    distances = 1.0 - torch.cosine_similarity(others, mean) if cosine else (others - mean).norm(dim=1)
    nearest = distances.argsort(stable=True)[:count].tolist()
    return [(float(distances[place]), different[place]) for place in nearest]


def labeled_sentences(data: str, split: str, name: str) -> tuple[list[str], list[str]]:
    """Give the sentences of a corpus and a label of each.

    Args:
        data, split: as `load_text`.
        name: of a kind of label that the corpus has (of "assistant" sentiment and intent, of "dailydialog" act and
            emotion, of "sst2" sentiment, of "smd" intent), or the path of a text file with a label a line.

    Raises:
        ValueError: there is no such label, or a file does not hold one for each sentence.
        FileNotFoundError: the corpus is missing.
    """
    text = labeled_text(data, split)
    sentences, known = list(text.sentences), text.attributes
    if name in known:
        codes = text.labels[:, list(known).index(name)].tolist()
        return sentences, [known[name][code] if code >= 0 else "unknown" for code in codes]
    if not Path(name).is_file():
        has = f"{data} has {', '.join(known)}" if known else f"{data} has no labels of its own"
        raise ValueError(f"no labels {name!r}: {has}, and there is no such file")
    given = list(read_sentences(name))
    if len(given) != len(sentences):
        raise ValueError(f"{name} holds {len(given)} labels, but {data} ({split}) has {len(sentences)} sentences")
    return sentences, given


def project(means: Tensor, method: str = "pca", *, seed: int = 0) -> tuple[NDArray[np.float64], list[str]]:
    """Bring latent vectors into the plane.

    Args:
        means: `(sentences, latent_dim)`, at least 2 of them.
        method: "pca", the two principal components; or "tsne", which keeps neighbours together, after van der Maaten &
            Hinton, Visualizing Data using t-SNE (2008), as scikit-learn has it.
        seed: of t-SNE.

    Returns:
        Points `(sentences, 2)` and what the two axes are called.

    Raises:
        ValueError: an unknown method, or fewer than 2 sentences.
    """
    from fastvae.training.pictures import principal_components

    if method not in PROJECTIONS:
        raise ValueError(f"method must be one of {', '.join(PROJECTIONS)}, got {method!r}")
    if len(means) < 2:
        raise ValueError(f"means must be of at least 2 sentences, got {len(means)}")
    if method == "pca":
        points, shares = principal_components(means.double())
        return points.numpy(), [f"principal component {n + 1} ({100 * share:.0f} %)" for n, share in enumerate(shares)]
    from sklearn.manifold import TSNE

    neighbours = min(30.0, (len(means) - 1) / 3)
    plane = TSNE(init="random" if means.shape[1] < 2 else "pca", perplexity=neighbours, random_state=seed)
    return plane.fit_transform(means.double().numpy()).astype(np.float64), ["t-SNE 1", "t-SNE 2"]


def plot_map(
    points: NDArray[np.float64],
    path: str | Path,
    *,
    axes: Sequence[str],
    labels: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    title: str = "",
) -> None:
    """Draw where sentences lie, coloured by label or by length.

    Args:
        points: `(sentences, 2)`.
        path: PNG to write, at once or not at all.
        axes: names of the two axes.
        labels: of each sentence; of more than 20 different ones the 19 most frequent have a colour each.
        lengths: of each sentence in words, used without labels.
        title: above the map.
    """
    from fastvae.training.curves import figure_to
    from fastvae.training.pictures import scatter

    with figure_to(path, 1, 1, (8.5, 6.5)) as (axis,):
        if labels is not None:
            names, codes, counts = np.unique(np.asarray(labels, dtype=object), return_inverse=True, return_counts=True)
            order = np.argsort(-counts, kind="stable")
            shown = [str(name) for name in names[order]]
            places = np.argsort(order)[codes]
            if len(shown) > 20:
                shown, places = [*shown[:19], "others"], np.minimum(places, 19)
            scatter(axis, points, places, shown)
        else:
            drawn = axis.scatter(*points.T, s=8, c=lengths, cmap="viridis", alpha=0.75, linewidths=0)
            if lengths is not None:
                axis.figure.colorbar(drawn, label="words")
        axis.set(xlabel=axes[0], ylabel=axes[1], title=title)
        axis.grid(alpha=0.3)
