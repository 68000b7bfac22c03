"""Training in processes of its own: Ctrl-C on the command, and two processes against one."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from fastvae.data import load_array
from fastvae.training.checkpoint import load_run, read_checkpoint
from fastvae.training.metrics_file import read_metrics

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SIZES = ["--embed-dim", "12", "--hidden-size", "16", "--latent-dim", "4", "--accelerator", "cpu"]

# The noise of z is drawn by each process for its own sentences, so that only a posterior without noise lets
# the two runs be compared number by number. The KL of such a posterior is about 20 nats a dimension: it is
# kept out of the loss.
COMPARED = """
import sys
import torch
from fastvae.training import run
from fastvae.training.config import TrainConfig
from fastvae.training.module import SentenceVAEModule

def without_noise(config, data, build=SentenceVAEModule.build_model):
    model = build(config, data)
    with torch.no_grad():
        model.head.linear.weight[config.latent_dim:] = 0
        model.head.linear.bias[config.latent_dim:] = -40
    return model

if __name__ == "__main__":
    SentenceVAEModule.build_model = staticmethod(without_noise)
    data, out, devices = sys.argv[1:]
    config = TrainConfig(data=data, out=out, devices=int(devices), embed_dim=12, hidden_size=16, latent_dim=4,
        batch_size=16, epochs=2, lr=1e-2, log_every=1, accelerator="cpu", kl_schedule="constant",
        kl_weight=0.0)
    run.train(config)
"""


def test_two_processes_train_as_one(tmp_path, text_file):
    script = tmp_path / "compared.py"
    script.write_text(COMPARED)
    for devices in ("1", "2"):
        subprocess.run(
            [sys.executable, str(script), str(text_file), str(tmp_path / devices), devices],
            env=ENVIRONMENT,
            check=True,
            timeout=300,
            capture_output=True,
        )
    one, two = (read_metrics(tmp_path / devices / "metrics.csv") for devices in ("1", "2"))
    assert len(one) == len(two) == 2 * 9 + 2 + 2
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4), ours["step"]
    weights = [read_checkpoint(tmp_path / d / "checkpoints" / "last.ckpt")["state_dict"] for d in ("1", "2")]
    first, second = [row["valid/nll"] for row in one if "valid/nll" in row]
    assert second < 0.95 * first  # they did train
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-2, atol=1e-3)


def test_two_processes_train_on_arrays_and_count_each_row_once(tmp_path):
    data, folder = tmp_path / "images.npy", tmp_path / "run"
    np.save(data, np.random.default_rng(0).integers(0, 255, (150, 4, 3), np.uint8))
    command = [sys.executable, "-m", "fastvae", "train", "--model", "vae", "--data", str(data), "--out", str(folder)]
    options = ["--devices", "2", "--epochs", "1", "--hidden", "8", "--latent-dim", "3", "--accelerator", "cpu"]
    subprocess.run([*command, *options], env=ENVIRONMENT, check=True, timeout=300, capture_output=True)
    model, scaling, _ = load_run(folder, which="last")
    rows = load_array(str(data), "valid").read(slice(None))
    assert len(rows) % 2 == 1, "one process has a row more"
    with torch.no_grad():
        kl = model.eval()(scaling.apply(rows)).kl.mean()
    (validation,) = [row for row in read_metrics(folder / "metrics.csv") if "valid/kl" in row]
    assert validation["valid/kl"] == pytest.approx(kl.item(), rel=1e-5)


@pytest.fixture
def start_training(text_file):
    """Give a function that starts `fastvae train` and waits for its first steps."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path, *more: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "fastvae",
            "train",
            "--data",
            str(text_file),
            "--out",
            str(folder),
            *SIZES,
        ]
        process = subprocess.Popen(
            [*command, "--epochs", "100000", "--log-every", "1", *more],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        metrics = folder / "metrics.csv"
        deadline = time.monotonic() + 300
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 5):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "training did not start"
            time.sleep(0.05)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes it launched


@pytest.mark.parametrize("more", [(), ("--devices", "2")], ids=["one process", "two processes"])
def test_ctrl_c_saves_and_exits_with_130(tmp_path, start_training, more):
    folder = tmp_path / "run"
    process = start_training(folder, *more)
    process.send_signal(signal.SIGINT)  # to the first process alone: it has to tell the others
    out, err = process.communicate(timeout=180)
    assert process.returncode == 130, err
    assert f"fastvae train --out {folder} --resume" in out
    assert "Traceback" not in err
    step = read_checkpoint(folder / "checkpoints" / "last.ckpt")["position"]["step"]
    assert f"stopped at step {step}" in out
    assert step >= max(int(row["step"]) for row in read_metrics(folder / "metrics.csv"))
