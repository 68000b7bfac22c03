"""metrics.csv: a Lightning logger that a resumed run continues, and reading the file back."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from fastvae.training.checkpoint import replace_atomically

_TERMS = ("neg_elbo", "nll", "kl", "ppl")


class MetricsFile(Logger):
    """Appends a row per call to a CSV file with fixed columns.

    Lightning's own CSVLogger deletes an existing file, so a resumed run would lose its history.

    Args:
        path: the file. An existing one is continued after dropping the rows beyond `resume_step`, which the
            resumed run is going to write again.
        resume_step: optimizer step at which the run resumes; None starts a new file.
        terms: names of what is measured, in training's steps and epochs and in validation.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None, terms: Sequence[str] = _TERMS) -> None:
        super().__init__()
        parts = [f"{part}/{term}" for part in ("train", "train_epoch", "valid") for term in terms]
        self._columns = ("epoch", "step", "kl_weight", "lr", *parts)
        self.path = Path(path)
        self._resume_step = resume_step
        self._started = False

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """One file a run: there are no versions."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml holds the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row.

        Args:
            metrics: values of some of the columns.
            step: optimizer step.
        """
        if not self._started:
            self._start()
        row = {name: _text(value) for name, value in metrics.items() if name in self._columns}
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row | {"step": step})

    def _start(self) -> None:
        kept = []
        if self._resume_step is not None and self.path.is_file():
            kept = [row for row in read_metrics(self.path) if row["step"] <= self._resume_step]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows({name: _text(value) for name, value in row.items()} for row in kept)
        replace_atomically(self.path, lambda file: file.write(text.getvalue().encode()))
        self._started = True


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Read metrics.csv, one dict a row, without the empty cells.

    Args:
        path: the file. A last row cut short by a crash is left out.

    Raises:
        FileNotFoundError: there is no such file.
    """
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for cells in csv.DictReader(file):
            try:
                row = {name: float(cell) for name, cell in cells.items() if name and cell}
            except ValueError:
                continue
            if None not in cells.values() and "step" in row:
                rows.append(row)
    return rows


def _text(value: float) -> str:
    number = float(value)
    return str(int(number)) if math.isfinite(number) and number == int(number) else f"{number:.9g}"
