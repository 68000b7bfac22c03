"""What the codes of a `MixtureVAE` stand for: their share, their sentences and labels, as a table, HTML and PNG."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fastvae.data import load_text
from fastvae.data.corpus import holds_attributes
from fastvae.data.labeled import LABELED, LabeledText, load_labeled
from fastvae.files import replace_atomically
from fastvae.training.curves import figure_to
from fastvae.training.mixture_metrics import code_information, code_probabilities

if TYPE_CHECKING:
    from fastvae.data import Vocabulary
    from fastvae.models import MixtureVAE


@dataclass(frozen=True)
class Code:
    """One value of one code.

    Args:
        variable, value: which.
        share: mean of q(c = value|x) over the sentences.
        sentences: those that it is most certain of, each once.
        written: sentences from the prior with this value, the other codes being drawn; the likeliest words.
        labels: of each kind of label, the distribution over its values among the sentences, each weighted by q.
    """

    variable: int
    value: int
    share: float
    sentences: list[str]
    written: list[str]
    labels: dict[str, NDArray[np.float64]]

    @property
    def name(self) -> str:
        """Such as `c1 = 3`; codes are counted from 1, values from 0."""
        return f"c{self.variable + 1} = {self.value}"


@dataclass(frozen=True)
class Interpretation:
    """What the codes of a model stand for.

    Args:
        codes: all values of all codes, in order.
        information: I(c;x) of each code over the sentences, nats.
        labels: names of the values of each kind of label.
        overall: the distribution of each kind of label over the sentences.
        title: of the report.
    """

    codes: list[Code]
    information: list[float]
    labels: dict[str, list[str]]
    overall: dict[str, NDArray[np.float64]]
    title: str = ""


def labeled_text(data: str, split: str) -> LabeledText:
    """Give the sentences of a corpus, with their attributes where it has some: as `load_labeled`, else as `load_text`.

    Args:
        data, split: a table of attributes ends with .tsv.
    """
    if data in LABELED or holds_attributes(Path(data)):
        return load_labeled(data, split)
    sentences = load_text(data, split)
    return LabeledText(sentences, np.zeros((len(sentences), 0), dtype=np.int64), {})


def interpret(
    model: MixtureVAE,
    vocabulary: Vocabulary,
    text: LabeledText,
    *,
    examples: int = 5,
    seed: int = 0,
    title: str = "",
) -> Interpretation:
    """Describe each value of each code by the sentences it is of.

    Args:
        model, vocabulary: what `load_run` gives.
        text: sentences to describe the codes by, and their labels.
        examples: sentences to show of each value, and to write.
        seed: of the other codes, and of z, in the sentences that are written.
        title: of the report.

    Raises:
        ValueError: there is no sentence, or the model has no codes.
    """
    if model.components == 1:
        raise ValueError("the model has no codes: it was trained with components=1")
    q = code_probabilities(model, vocabulary, text.sentences)
    one_hot = {}  # of an unknown label all 0
    for column, (name, names) in zip(text.labels.T, text.attributes.items(), strict=True):
        one_hot[name] = (column[:, None] == np.arange(len(names))).astype(float)
    codes = []
    for variable in range(model.variables):
        for value in range(model.components):
            weight = q[:, variable, value].numpy()
            order = np.argsort(-weight, kind="stable")
            shown = list(dict.fromkeys(text.sentences[i] for i in order[: 50 * examples]))[:examples]
            distributions = {name: _distribution(weight @ rows) for name, rows in one_hot.items()}
            written = _written(model, vocabulary, variable, value, examples, seed)
            codes.append(Code(variable, value, float(weight.mean()), shown, written, distributions))
    return Interpretation(
        codes,
        code_information(q).tolist(),
        {name: list(names) for name, names in text.attributes.items()},
        {name: _distribution(rows.sum(0)) for name, rows in one_hot.items()},
        title,
    )


def _distribution(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    return weights / max(float(weights.sum()), 1e-300)


def _written(model: MixtureVAE, vocabulary: Vocabulary, variable: int, value: int, count: int, seed: int) -> list[str]:
    generator = torch.Generator(model.code_head.weight.device).manual_seed(seed)
    shape = count, model.variables
    codes = torch.randint(model.components, shape, generator=generator, device=generator.device)
    codes[:, variable] = value
    tokens, _ = model.sample(count, codes=codes, strategy="greedy", max_length=40, generator=generator)
    return [vocabulary.decode(row) for row in tokens]


def table(found: Interpretation) -> str:
    """Return a table of the codes: share, distribution of the labels in per cent, a sentence of each."""
    heads = [name for names in found.labels.values() for name in names]
    lines = ["  ".join(["code      share", *(f"{name[:10]:>10}" for name in heads), "most certain of"])]
    for code in found.codes:
        shares = [share for values in code.labels.values() for share in values]
        cells = [f"{code.name:<8}{100 * code.share:5.1f} %", *(f"{100 * share:8.1f} %" for share in shares)]
        lines.append("  ".join([*cells, code.sentences[0]]))
    shares = [share for values in found.overall.values() for share in values]
    lines.append("  ".join([f"{'all':<8}{100:5.1f} %", *(f"{100 * share:8.1f} %" for share in shares)]))
    return "\n".join(lines)


def draw(found: Interpretation, path: str | Path) -> Path:
    """Draw the share of each code, and the distribution of each kind of label in it.

    Args:
        found: what `interpret` returns.
        path: PNG to write.
    """
    rows, kinds = len(found.codes), list(found.labels)
    names = [code.name for code in found.codes]
    size = (3.5 + sum(1.5 + 0.75 * len(found.labels[kind]) for kind in kinds), 1.2 + 0.32 * rows)
    ratios = [1.5, *(1 + 0.5 * len(found.labels[kind]) for kind in kinds)]
    with figure_to(path, 1, 1 + len(kinds), size, width_ratios=ratios) as axes:
        axes[0].barh(range(rows), [100 * code.share for code in found.codes], color="tab:blue")
        axes[0].set(yticks=range(rows), yticklabels=names, xlabel="% of the sentences", title="share")
        axes[0].set_ylim(rows - 0.5, -0.5)
        for axis, kind in zip(axes[1:], kinds, strict=True):
            shares = 100 * np.array([code.labels[kind] for code in found.codes])
            axis.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
            columns = found.labels[kind]
            axis.set(yticks=range(rows), yticklabels=[], xticks=range(len(columns)), title=f"% of each {kind}")
            axis.set_xticklabels(columns, rotation=40, ha="right")
            for row, column in np.ndindex(*shares.shape):
                dark = shares[row, column] > 60
                text = f"{shares[row, column]:.0f}"
                axis.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    return Path(path)


def write_html(found: Interpretation, picture: str | Path, path: str | Path) -> Path:
    """Write a page that holds all there is to see, the picture included.

    Args:
        found: what `interpret` returns.
        picture: PNG that `draw` wrote.
        path: HTML to write.
    """
    image = base64.b64encode(Path(picture).read_bytes()).decode()
    information = ", ".join(f"c{m + 1}: {value:.3f}" for m, value in enumerate(found.information))
    parts = [
        f"<h1>{html.escape(found.title or 'Codes')}</h1>",
        f"<p>I(c;x) in nats: {information}; in all {sum(found.information):.3f}.</p>",
        f'<img alt="Share and labels of each code" src="data:image/png;base64,{image}">',
        "<table><tr><th>code</th><th>share</th>"
        + "".join(f"<th>{html.escape(kind)}</th>" for kind in found.labels)
        + "<th>sentences it is most certain of</th><th>written with it</th></tr>",
    ]
    for code in found.codes:
        cells = [code.name, f"{100 * code.share:.1f} %"]
        for kind, names in found.labels.items():
            order = np.argsort(-code.labels[kind], kind="stable")[:3]
            cells.append("<br>".join(f"{html.escape(names[i])} {100 * code.labels[kind][i]:.0f} %" for i in order))
        cells += ["<br>".join(map(html.escape, sentences)) for sentences in (code.sentences, code.written)]
        parts.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    parts.append("</table>")
    page = "\n".join([_HEAD + parts[0], *parts[1:], "</body></html>", ""])
    replace_atomically(path, lambda file: file.write(page.encode()))
    return Path(path)


_HEAD = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Codes</title><style>
body { font: 14px/1.5 sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }
img { max-width: 100% }
table { border-collapse: collapse } td, th { border-bottom: 1px solid #ccc; padding: .4em .8em; text-align: left;
vertical-align: top }
</style></head><body>
"""
