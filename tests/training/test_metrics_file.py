import pytest

pytest.importorskip("lightning")

from fastvae.training.curves import plot_curves
from fastvae.training.metrics_file import MetricsFile, read_metrics


def test_rows_come_back(tmp_path):
    logger = MetricsFile(tmp_path / "metrics.csv")
    logger.log_metrics({"train/nll": 1.5, "lr": 1e-3, "epoch": 0.0}, step=10)
    logger.log_metrics({"valid/kl": 0.25, "unknown": 3.0}, step=20)
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"epoch": 0, "step": 10, "lr": 1e-3, "train/nll": 1.5},
        {"step": 20, "valid/kl": 0.25},
    ]


def test_a_new_run_starts_a_new_file_and_a_resumed_one_continues(tmp_path):
    path = tmp_path / "metrics.csv"
    for step in (10, 20, 30):
        MetricsFile(path, resume_step=step - 10).log_metrics({"train/nll": step / 10}, step=step)
    assert [row["step"] for row in read_metrics(path)] == [10, 20, 30]
    MetricsFile(path, resume_step=20).log_metrics({"train/nll": 9.0}, step=25)
    assert [row["step"] for row in read_metrics(path)] == [10, 20, 25]
    MetricsFile(path).log_metrics({"train/nll": 1.0}, step=5)
    assert [row["step"] for row in read_metrics(path)] == [5]


def test_a_row_cut_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    logger = MetricsFile(path)
    logger.log_metrics({"train/nll": 1.0}, step=1)
    with open(path, "a") as file:
        file.write("0,2,0.5")
    assert [row["step"] for row in read_metrics(path)] == [1]


def test_curves_are_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"step": 1, "train/neg_elbo": 3.0, "kl_weight": 0.1},
        {"step": 2, "valid/neg_elbo": 2.0, "valid/kl": 1.0},
    ]
    path = plot_curves(rows, tmp_path / "curves.png", floor=1.5)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="at least one row"):
        plot_curves([], path)
