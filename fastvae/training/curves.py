"""Learning curves of a run as a PNG."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastvae.training.checkpoint import replace_atomically

_TITLES = {
    "neg_elbo": "-ELBO",
    "iw_nll": "- importance-weighted bound",
    "nll": "reconstruction NLL",
    "kl": "KL",
    "objective": "objective",
    "mutual_information": "I(c;x)",
    "policy_nll": "policy",
    "error": "reconstruction error",
    "control_nll": "attributes of generated sentences, NLL",
}


@contextlib.contextmanager
def figure_to(path: str | Path, rows: int, columns: int, size: tuple[float, float], **settings: Any) -> Iterator[Any]:
    """Give the axes, (rows * columns,), of a figure without window or global state; it is written when the block ends.

    Args:
        path: PNG to write, at once or not at all.
        rows, columns: of panels.
        size: width and height in inches.
        **settings: of matplotlib's `Figure.subplots`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure.subplots(rows, columns, squeeze=False, **settings).ravel()
    replace_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))


def plot_curves(
    rows: Sequence[dict[str, float]],
    path: str | Path,
    *,
    terms: Sequence[str] = ("neg_elbo", "nll", "kl"),
    unit: str = "sentence",
    floor: float | None = None,
) -> Path:
    """Plot terms of the loss in training and validation, and the weight of the KL where there is one, over the steps.

    Args:
        rows: what `read_metrics` returns.
        path: PNG to write.
        terms: which; those without a panel, such as "ppl", are passed over.
        unit: what the nats are of.
        floor: entropy of the data in nats a sentence, drawn as a line beside the -ELBO; None draws none.

    Returns:
        The path.

    Raises:
        ValueError: there are no rows.
    """
    import matplotlib

    if not rows:
        raise ValueError("rows must hold at least one row of metrics, got none")
    terms = [term for term in terms if term in _TITLES]
    weighted = any("kl_weight" in row for row in rows)
    panels = len(terms) + weighted
    columns = min(panels, 2)
    lines = -(-panels // columns)
    with (
        matplotlib.rc_context({"axes.grid": True, "grid.alpha": 0.3, "font.size": 9}),
        figure_to(path, lines, columns, (5 * columns, 3.25 * lines), sharex=True) as axes,
    ):
        for axis, term in zip(axes, terms, strict=False):
            _draw(axis, rows, f"train/{term}", "training", "tab:blue", "")
            _draw(axis, rows, f"valid/{term}", "validation", "tab:orange", "o")
            if term == "neg_elbo" and floor is not None:
                axis.axhline(floor, color="black", linestyle="--", linewidth=1, label=f"entropy {floor:.2f}")
            axis.set(title=_TITLES[term], ylabel=f"nats / {unit}")
            if axis.get_legend_handles_labels()[0]:
                axis.legend()
        if weighted:
            axis = axes[len(terms)]
            _draw(axis, rows, "kl_weight", "", "tab:green", "")
            axis.set(title="weight of the KL", ylim=(-0.02, None))
        for axis in axes[panels:]:
            axis.remove()
        for axis in axes[max(0, panels - columns) : panels]:
            axis.set_xlabel("optimizer step")
            axis.tick_params(labelbottom=True)
    return Path(path)


def _draw(axis: Any, rows: Sequence[dict[str, float]], key: str, label: str, color: str, marker: str) -> None:
    points = [(row["step"], row[key]) for row in rows if key in row]
    if points:
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, color=color, marker=marker, markersize=3, linewidth=1.2, label=label)
