import csv
from pathlib import Path

import pytest

from bench import estimators


def test_command_writes_a_table_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--latent", "1", "3", "--data", "7", "--draws", "9", "--epochs", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench.estimators", *options])
    assert estimators.main() == 0
    with (tmp_path / "estimator_variance.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["latent_dim"], row["estimator"]) for row in rows] == [
        (latent, estimator) for latent in "13" for estimator in estimators.ESTIMATORS
    ]
    for row in rows:
        ours = next(r for r in rows if r["latent_dim"] == row["latent_dim"])
        ratio = float(row["variance"]) / float(ours["variance"])
        assert float(row["times_reparameterized"]) == pytest.approx(ratio, rel=1e-2)
    assert len((tmp_path / "estimator_variance.md").read_text().splitlines()) == 6
    assert (tmp_path / "estimator_variance.png").read_bytes().startswith(b"\x89PNG")
