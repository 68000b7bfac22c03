"""Runs on vectors and images: every model, resuming, pictures, figures, and the commands on them."""

import json
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("sklearn")

from fastvae.cli import main
from fastvae.data import Samples, load_array
from fastvae.training import datamodule
from fastvae.training.array_models import ArrayModel
from fastvae.training.array_module import ArrayModule
from fastvae.training.checkpoint import load_run, read_checkpoint
from fastvae.training.config import CONFIGS, RunConfig, read_yaml
from fastvae.training.metrics import evaluate_array, evaluate_autoencoder, full_mutual_information
from fastvae.training.metrics_file import read_metrics
from fastvae.training.module import _VALIDATION_SEED, NonFiniteLossError
from fastvae.training.run import train

SMALL: dict[str, Any] = {"latent_dim": 3, "batch_size": 16, "epochs": 2, "lr": 5e-3, "log_every": 2}
NETWORK = {"hidden": (12,)}


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    """Leave out what takes longer than a run, but where a test asks for it."""
    monkeypatch.setattr("fastvae.files.os.fsync", lambda descriptor: None)
    if "tensorboard" not in request.fixturenames:
        monkeypatch.setattr("fastvae.training.run.TENSORBOARD", False)
        monkeypatch.setattr("fastvae.training.run.plot_curves", lambda *args, **options: None)
    if not {"tensorboard", "pictures"} & set(request.fixturenames):
        monkeypatch.setattr("fastvae.training.run.draw_pictures", lambda *args, **options: None)


@pytest.fixture
def pictures() -> None:
    """Draw the pictures of runs."""


@pytest.fixture
def tensorboard() -> None:
    """Draw pictures and curves of runs, and send them to TensorBoard."""
    pytest.importorskip("tensorboard")


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """120 images of 6 x 5: bars at one of six heights, with noise."""
    random = np.random.default_rng(0)
    x = random.integers(0, 40, (120, 6, 5), np.uint8)
    x[np.arange(120), np.arange(120) % 6] = 255
    path = tmp_path_factory.mktemp("images") / "bars.npy"
    np.save(path, x)
    return path


@pytest.fixture(scope="session")
def vectors(tmp_path_factory) -> Path:
    """200 vectors about a plane in 6 dimensions, of unlike units."""
    random = np.random.default_rng(0)
    x = random.standard_normal((200, 2)) @ random.standard_normal((2, 6)) + 0.1 * random.standard_normal((200, 6))
    path = tmp_path_factory.mktemp("vectors") / "plane.npy"
    np.save(path, x * [1, 10, 100, 1, 1, 1e-3] + 5)
    return path


@pytest.fixture
def settings(tmp_path, images) -> Callable[..., RunConfig]:
    def make(model: str = "vae", **changes: Any) -> RunConfig:
        small = {"data": str(images), "out": str(tmp_path / "run"), "accelerator": "cpu"} | SMALL
        small |= {} if model == "linear_autoencoder" else NETWORK
        return CONFIGS[model](**(small | changes))

    return make


def last(config):
    return read_checkpoint(f"{config.out}/checkpoints/last.ckpt")


def loaded(config) -> tuple[ArrayModel, Samples]:
    model, scaling, saved = load_run(config.out)
    assert saved == config.to_dict()
    return ArrayModel(model, scaling), load_array(config.data, "valid")


def every(samples):
    return samples.read(slice(None))


def picture(path):
    from matplotlib.image import imread

    shown = imread(path)[..., :3]
    assert min(shown.shape[:2]) >= 100, path
    assert shown.std() > 0.02, f"{path} is blank"
    return shown


# every model

MODELS = {
    "vae": {"model": "vae"},
    "full": {"model": "vae", "posterior": "full"},
    "score function": {"model": "vae", "estimator": "score_function_baseline"},
    "gaussian": {"model": "vae", "likelihood": "gaussian"},
    "binary": {"model": "vae", "scaling": "binary"},
    "conv": {"model": "vae", "encoder": "conv", "hidden": (400,), "channels": (4, 6)},
    "iwae": {"model": "iwae", "num_samples": 4},
    "denoising": {"model": "denoising_autoencoder"},
    "salt and pepper": {"model": "denoising_autoencoder", "noise": "salt_and_pepper", "likelihood": "gaussian"},
    "linear": {"model": "linear_autoencoder"},
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_every_model_trains(settings, changes):
    config = settings(**changes, epochs=4)
    result = train(config)
    rows = read_metrics(f"{config.out}/metrics.csv")
    measure = {"-ELBO": "neg_elbo", "IW-NLL": "iw_nll", "error": "error"}[result.measure]
    valid = [row[f"valid/{measure}"] for row in rows if f"valid/{measure}" in row]
    assert len(valid) == 4
    assert valid[-1] < valid[0]
    assert result.best == pytest.approx(min(valid), rel=1e-6)
    assert result.steps == 4 * (108 // 16)
    model, samples = loaded(config)
    assert model.reconstruct(every(samples)).shape == (6, 1, 6, 5)


def test_categorical_likelihood(settings, tmp_path):
    levels = np.random.default_rng(0).integers(0, 2, (60, 4, 4)) * 2 + 3
    np.save(tmp_path / "x.npy", levels)
    for changes in ({}, {"encoder": "conv", "hidden": (400,), "channels": (4,)}):
        config = settings(data=str(tmp_path / "x.npy"), likelihood="categorical", **changes)
        first = train(config, overwrite=True).best
        assert first == pytest.approx(16 * math.log(3), rel=0.3)  # levels 3, 4 and 5
        model, samples = loaded(config)
        rows = model.reconstruct(every(samples))
        assert rows.shape == (3, 1, 4, 4)
        assert 3 <= float(rows.min()) <= float(rows.max()) <= 5
    np.save(tmp_path / "x.npy", levels / 2)
    with pytest.raises(ValueError, match="levels need whole numbers"):
        train(settings(data=str(tmp_path / "x.npy"), likelihood="categorical", out=str(tmp_path / "other")))


def test_vectors_are_standardised_and_given_back_in_their_units(settings, pictures, vectors):
    config = settings(data=str(vectors), epochs=12, latent_dim=2, lr=2e-2)
    train(config)
    model, samples = loaded(config)
    assert (model.scaling.kind, model.model.likelihood) == ("standard", "gaussian")
    x = every(samples)
    error = (model.reconstruct(x) - x).square().mean(0) / x.var(0)
    assert float(error.mean()) < 0.5
    assert {path.name for path in Path(config.out).glob("*.png")} == {"latent_map.png", "reconstructions.png"}
    picture(Path(config.out, "reconstructions.png"))
    x, sampled = every(load_array(vectors)), model.sample(500)
    assert float(((sampled.mean(0) - x.mean(0)) / x.std(0)).abs().max()) < 0.3
    assert 0.5 < float((sampled.std(0) / x.std(0)).mean()) < 1.2


def test_linear_autoencoder_finds_the_plane(settings, vectors):
    config = settings("linear_autoencoder", data=str(vectors), latent_dim=2, epochs=20, lr=5e-2)
    train(config)
    model, _ = loaded(config)
    x = model.scaling.apply(every(load_array(vectors)))
    singular = torch.linalg.svdvals(x - x.mean(0))
    rest = float(singular[2:].square().sum() / 2 / len(x))
    assert model.model(x).loss.item() == pytest.approx(rest, rel=0.03)


def test_losses_in_the_metrics_are_never_weighted(settings):
    config = settings(beta=7.0, kl_schedule="linear", kl_weight=3.0, free_bits=0.5)
    train(config)
    for row in read_metrics(f"{config.out}/metrics.csv"):
        for part in ("train", "valid", "train_epoch"):
            if f"{part}/kl" in row:
                assert row[f"{part}/neg_elbo"] == pytest.approx(row[f"{part}/nll"] + row[f"{part}/kl"], rel=1e-6)


def test_validation_agrees_with_evaluate(settings):
    config = settings(beta=3.0, batch_size=64)
    result = train(config)
    model, samples = loaded(config)
    figures = evaluate_array(model, [every(samples)], seed=_VALIDATION_SEED)
    assert figures.neg_elbo == pytest.approx(result.best, rel=1e-6)


# resuming

NOISY = {"epochs": 3, "lr_schedule": "linear"}
RESUMED = {
    "vae": {"model": "vae", "kl_schedule": "linear", **NOISY},
    "score": {"model": "vae", "estimator": "score_function_baseline", **NOISY},
    "denoising": {"model": "denoising_autoencoder", **NOISY},
}


def assert_same_training(a, b):
    assert a["position"] == b["position"]
    for name, tensor in a["state_dict"].items():
        assert torch.equal(tensor, b["state_dict"][name]), name
    first, second = a["optimizer_states"][0]["state"], b["optimizer_states"][0]["state"]
    for index, state in first.items():
        for name, value in state.items():
            assert torch.equal(value, second[index][name]), (index, name)


def interrupted_at(monkeypatch, step):
    training_step = ArrayModule.training_step

    def stepping(self, batch, batch_idx):
        if self.global_step == step:
            signal.raise_signal(signal.SIGINT)
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(ArrayModule, "training_step", stepping)


# steps are counted from 0, six an epoch: within one, and its last
@pytest.mark.parametrize(("name", "step"), [("vae", 3), ("vae", 11), ("score", 8), ("denoising", 8)])
def test_interrupted_and_resumed_equals_uninterrupted(settings, tmp_path, monkeypatch, name, step):
    whole = settings(**RESUMED[name], out=str(tmp_path / "whole"))
    parts = settings(**RESUMED[name], out=str(tmp_path / "parts"))
    train(whole)
    with monkeypatch.context() as patch:
        interrupted_at(patch, step)
        stopped = train(parts)
    assert (stopped.interrupted, stopped.steps) == (True, step + 1)
    assert not train(parts, resume=True).interrupted
    assert_same_training(last(whole), last(parts))
    assert (tmp_path / "whole" / "metrics.csv").read_text() == (tmp_path / "parts" / "metrics.csv").read_text()


def test_rows_that_do_not_fit_are_read_batch_by_batch(settings, tmp_path, monkeypatch):
    resident = settings(out=str(tmp_path / "resident"))
    train(resident)
    read = settings(out=str(tmp_path / "read"))
    monkeypatch.setattr(datamodule, "RESIDENT_BYTES", 1000)
    monkeypatch.setattr(datamodule.ArrayBatches, "__iter__", checked(datamodule.ArrayBatches.__iter__))
    train(read)
    assert_same_training(last(resident), last(read))


def checked(iterate):
    def iterating(self):
        assert self.resident is None or len(self.samples) < 10
        return iterate(self)

    return iterating


def test_another_model_cannot_resume_a_run(settings):
    config = settings()
    train(config)
    with pytest.raises(ValueError, match="holds a run of vae, which cannot go on as iwae"):
        train(settings("iwae", epochs=3), resume=True)
    with pytest.raises(ValueError, match="hidden cannot change"):
        train(settings(epochs=3, hidden=(5,)), resume=True)


def test_corrupt_checkpoints_are_named(settings):
    config = settings()
    train(config)
    path = Path(config.out, "checkpoints", "best.ckpt")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:5], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"best\.ckpt is corrupt"):
            load_run(config.out)
    checkpoint = last(config)
    checkpoint["model_config"]["hidden"] = [7]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="does not fit this version's VAE"):
        load_run(config.out)


def test_non_finite_losses_are_named(settings, monkeypatch):
    start = ArrayModule.on_train_batch_start

    def poison(self, batch, batch_idx):
        start(self, batch, batch_idx)
        if self.global_step == 8:
            self.model.decoder.fill_(float("nan"))

    monkeypatch.setattr(ArrayModule, "on_train_batch_start", torch.no_grad()(poison))
    config = settings("linear_autoencoder")
    with pytest.raises(NonFiniteLossError, match="the reconstruction error became nan at step 8"):
        train(config)
    assert last(config)["position"]["step"] == 6


def test_settings_that_do_not_go_together(settings, vectors, tmp_path):
    for changes, message in [
        ({"encoder": "conv"}, "hidden cannot be set where encoder is 'conv'"),
        ({"channels": (3,)}, "channels cannot be set where encoder is 'mlp'"),
        ({"likelihood": "bernoulli", "scaling": "standard"}, "takes scaling unit or binary or none, got 'standard'"),
        ({"likelihood": "bernoulli", "log_var": 0.0}, "log_var is of likelihood 'gaussian', got 'bernoulli'"),
        ({"scaling": "levels"}, "scaling 'levels' is for likelihood 'categorical'"),
        ({"hidden": (0,)}, "hidden must be sizes of at least 1"),
        ({"model": "denoising_autoencoder", "level": 1.5}, "level is a share, at most 1"),
        ({"model": "denoising_autoencoder", "likelihood": "categorical"}, "must be bernoulli or gaussian"),
        ({"model": "linear_autoencoder", "scaling": "levels"}, "which a linear_autoencoder has not"),
        ({"model": "iwae", "num_samples": 0}, "num_samples must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            settings(**changes)
    for changes, message in [
        ({"data": str(vectors), "encoder": "conv", "hidden": (400,)}, "encoder 'conv' is for images"),
        ({"log_var": 0.0}, "that of these data is 'bernoulli'"),
        ({"scaling": "standard"}, "scaling 'standard' does not go with likelihood 'bernoulli'"),
        ({"batch_size": 500}, "batch_size must be at most the 108 training rows, got 500"),
        ({"batch_size": 15, "devices": 2}, "batch_size must be a multiple of devices, got 15 and 2"),
        ({"batch_size": 98, "devices": 7}, "devices must be at most the 6 validation rows, got 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(settings(**changes))
        assert not (tmp_path / "run").exists()


# pictures


@pytest.mark.parametrize(
    ("name", "more"), [("vae", {"samples", "atoms"}), ("conv", {"samples"}), ("linear", {"atoms"})]
)
def test_pictures_of_a_model(settings, pictures, name, more):
    config = settings(**MODELS[name], epochs=1)
    train(config)
    expected = {f"{picture}.png" for picture in {"latent_map", "reconstructions"} | more}
    assert {path.name for path in Path(config.out).glob("*.png")} == expected
    for name in expected:
        picture(Path(config.out, name))


def test_reconstructions_stand_beside_their_inputs(settings, pictures):
    config = settings(epochs=1)
    train(config)
    model, samples = loaded(config)
    shown = picture(Path(config.out, "reconstructions.png"))
    scale = 900 // (12 * 5)  # 12 images of 5 pixels
    space = scale // 2 + 1
    for n, image in enumerate(every(samples)[:2, 0] / 255):
        left = space + n * (10 * scale + space // 3 + 1 + space)
        tile = shown[space : space + 6 * scale : scale, left : left + 5 * scale : scale, 0]
        np.testing.assert_allclose(tile, image, atol=0.003)
        beside = left + 5 * scale + space // 3 + 1
        tile = shown[space : space + 6 * scale : scale, beside : beside + 5 * scale : scale, 0]
        np.testing.assert_allclose(tile, model.reconstruct(every(samples))[n, 0] / 255, atol=0.003)


def test_manifold_of_two_dimensions(settings, pictures):
    config = settings(latent_dim=2, epochs=1)
    train(config)
    model, _ = loaded(config)
    shown = picture(Path(config.out, "manifold.png"))
    scale = 900 // (20 * 5)
    assert shown.shape[:2] == (20 * (6 * scale + 1) + 1, 20 * (5 * scale + 1) + 1)
    normal = torch.distributions.Normal(0.0, 1.0)
    corner = model.decode(normal.icdf(torch.tensor([[0.025, 0.975]])))[0, 0] / 255  # z1 small, z2 large
    np.testing.assert_allclose(shown[1 : 6 * scale : scale, 1 : 5 * scale : scale, 0], corner, atol=0.003)


def test_colours_stay_colours(settings, pictures, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), np.uint8)
    x[..., 2] = 0
    np.save(tmp_path / "x.npy", x)
    config = settings(data=str(tmp_path / "x.npy"), epochs=1)
    train(config)
    shown = picture(Path(config.out, "reconstructions.png"))
    inside = shown[shown.min(-1) < 0.95]
    assert inside[:, 2].max() < 0.8  # blue is 0 in the inputs and 1/2 at most where nothing was learnt
    assert inside[:, 0].max() > 0.9


# figures


def test_figures_equal_sums_by_hand(settings):
    config = settings(epochs=3)
    train(config)
    model, _ = loaded(config)
    x = every(load_array(config.data))
    figures = evaluate_array(model, x.split(50), iw_samples=20, seed=3, data="d", split="s")
    generator = torch.Generator().manual_seed(3)
    outputs, means, kls = [], [], []
    with torch.no_grad():
        for batch in x.split(50):
            scaled = model.scaling.apply(batch)
            outputs.append(model.model(scaled, generator=generator))
            model.model.importance_weighted_nll(scaled, num_samples=20, generator=generator)
            mean, log_var = model.model.encode(scaled)
            means.append(mean)
            kls.append(0.5 * (mean**2 + log_var.exp() - 1 - log_var))
    assert figures.rows == 108
    assert figures.nll == pytest.approx(float(torch.cat([o.nll for o in outputs]).mean()), rel=1e-5)
    assert figures.kl == pytest.approx(float(torch.cat([o.kl for o in outputs]).mean()), rel=1e-5)
    assert figures.kl_per_dimension == pytest.approx(torch.cat(kls).mean(0).tolist(), rel=1e-4)
    assert sum(figures.kl_per_dimension) == pytest.approx(figures.kl, rel=1e-5)
    assert figures.active_units == int((torch.cat(means).var(0, unbiased=False) > 0.01).sum())
    assert figures.iw_nll < figures.neg_elbo
    assert figures.bits_per_dimension is None
    assert 0 <= figures.mutual_information <= math.log(108)
    with pytest.raises(ValueError, match="no rows"):
        evaluate_array(model, [])


def test_bits_of_binary_numbers_and_marginals_of_a_full_posterior(settings):
    config = settings(scaling="binary", posterior="full", epochs=3)
    train(config)
    model, samples = loaded(config)
    figures = evaluate_array(model, [every(samples)])
    assert figures.bits_per_dimension == pytest.approx(figures.neg_elbo / 30 / math.log(2))
    posteriors = model.model.encode(model.input(every(samples)))
    information = full_mutual_information(*(p.detach().double() for p in posteriors))
    assert figures.mutual_information == pytest.approx(information)
    assert sum(figures.kl_per_dimension) <= figures.kl * (1 + 1e-4)  # correlations cost what marginals do not show


def test_figures_of_an_autoencoder(settings, vectors):
    config = settings("linear_autoencoder", data=str(vectors), epochs=5)
    train(config)
    model, samples = loaded(config)
    x = every(samples)
    figures = evaluate_autoencoder(model, x.split(4))
    residual = (x - model.reconstruct(x)).double().square()
    assert figures.squared_error == pytest.approx(float(residual.mean()), rel=1e-4)
    assert figures.explained == pytest.approx(1 - float(residual.sum() / (x - x.mean(0)).square().sum()), rel=1e-4)
    assert figures.error == pytest.approx(model.model(model.scaling.apply(x)).loss.item(), rel=1e-5)


def test_nothing_is_explained_of_rows_that_do_not_differ(settings, vectors, tmp_path, capsys):
    config = settings("linear_autoencoder", data=str(vectors), epochs=1)
    train(config)
    np.save(tmp_path / "one.npy", every(load_array(vectors, "valid"))[:1].numpy())
    assert main(["evaluate", config.out, "--data", str(tmp_path / "one.npy")]) == 0
    assert re.search(r"explained +-  of the variance", capsys.readouterr().out)
    assert json.loads(Path(config.out, "evaluation_all.json").read_text())["explained"] is None


def test_salt_and_pepper_are_the_ends_of_the_data(settings, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).uniform(3, 9, (60, 5)).astype(np.float32))
    options = {"noise": "salt_and_pepper", "likelihood": "gaussian", "data": str(tmp_path / "x.npy")}
    for scaling, (low, high) in {"standard": (-2, 2), "none": (3, 9)}.items():
        config = settings("denoising_autoencoder", scaling=scaling, out=str(tmp_path / scaling), **options)
        train(config)
        model, samples = loaded(config)
        x = model.model.corrupt(model.input(every(samples)))
        assert (x.min().item(), x.max().item()) == pytest.approx((low, high), abs=0.5)


# the commands


def fails(capsys, *argv):
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    line = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert line.startswith("fastvae: error: ")
    return line


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("run")
    config = CONFIGS["vae"](data=str(images), out=str(folder), accelerator="cpu", **SMALL, **NETWORK)
    train(config)
    return folder


def test_train_takes_a_file_then_flags_and_resumes(tmp_path, pictures, images, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"model: vae\ndata: {images}\nhidden: [9, 7]\nlr: 1e-2\nlatent_dim: 2\n")
    out = tmp_path / "trained"
    common = ["--batch-size", "16", "--accelerator", "cpu"]
    assert main(["train", "--config", str(settings), "--epochs", "1", "--beta", "2", "--out", str(out), *common]) == 0
    text = capsys.readouterr().out
    assert "best validation -ELBO" in text
    assert "nats an image after 6 steps" in text
    assert str(out / "manifold.png") in text
    kept = read_yaml(out / "config.yaml")
    assert (kept["model"], kept["hidden"], kept["lr"], kept["beta"]) == ("vae", (9, 7), 0.01, 2.0)
    assert main(["train", "--out", str(out), "--resume", "--epochs", "2"]) == 0
    assert read_yaml(out / "config.yaml")["epochs"] == 2
    assert "already holds a run" in fails(capsys, "train", "--model", "vae", "--data", str(images), "--out", str(out))
    assert "holds a run of vae, which cannot go on as one of iwae" in fails(
        capsys, "train", "--out", str(out), "--resume", "--model", "iwae"
    )


def test_settings_of_other_models_are_refused(capsys):
    line = fails(capsys, "train", "--model", "linear_autoencoder", "--beta", "2")
    assert line.endswith("beta is a setting of mixture_vae, vae, not of linear_autoencoder")
    line = fails(capsys, "train", "--model", "vae", "--word-dropout", "0.2")
    assert line.endswith("word_dropout is a setting of sentence_vae, mixture_vae, dialogue, controlled_vae, not of vae")
    assert "invalid choice: 'gan'" in fails(capsys, "train", "--model", "gan")
    assert "--hidden: expected whole numbers, parted by commas, got 'many'" in fails(
        capsys, "train", "--model", "vae", "--hidden", "many"
    )


@pytest.mark.parametrize("model", CONFIGS)
def test_help_shows_the_settings_of_the_model(model, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--model", model, "--help"])
    shown = capsys.readouterr().out
    owned = CONFIGS[model].__dataclass_fields__
    every_name = {name for config in CONFIGS.values() for name in config.__dataclass_fields__}
    for name in every_name:
        flag = f"--{name.replace('_', '-')} "
        assert (f"\n  {flag}" in shown or f"\n  {flag.strip()}," in shown) == (name in owned), name


def test_evaluate_prints_and_writes_json(vae_run, capsys, images):
    assert main(["evaluate", str(vae_run), "--iw-samples", "5"]) == 0
    shown = capsys.readouterr().out
    written = json.loads((vae_run / "evaluation_test.json").read_text())
    assert (written["split"], written["rows"]) == ("test", 6)
    for figure in ("neg_elbo", "nll", "kl", "iw_nll", "mutual_information"):
        assert f"{written[figure]:.4f}" in shown, figure
    assert "6 images of 5 x 6, scaled from [0, 255] to [0, 1]" in shown
    for value in written["kl_per_dimension"]:
        assert f"{value:.4f}" in shown
    other = vae_run / "other.json"
    assert main(["evaluate", str(vae_run), "--data", str(images), "--iw-samples", "0", "--out", str(other)]) == 0
    written = json.loads(other.read_text())
    assert (written["split"], written["rows"], written["iw_nll"]) == ("all", 120, None)
    assert "rows of shape (1, 8, 8), and the run is of images of 5 x 6" in fails(
        capsys, "evaluate", str(vae_run), "--data", "digits"
    )


def test_sample_and_reconstruct_write_pictures_and_arrays(vae_run, capsys, images, tmp_path):
    assert main(["sample", str(vae_run), "-n", "20", "--out", str(tmp_path / "s.png")]) == 0
    assert picture(tmp_path / "s.png").shape[1] > picture(tmp_path / "s.png").shape[0]
    assert main(["reconstruct", str(vae_run), "-n", "4"]) == 0
    assert f"written to {vae_run / 'reconstructed.png'}" in capsys.readouterr().out
    picture(vae_run / "reconstructed.png")
    assert main(["reconstruct", str(vae_run), str(images), "--out", str(tmp_path / "r.npy")]) == 0
    rows = np.load(tmp_path / "r.npy")
    assert rows.shape == (120, 6, 5)
    assert 0 <= rows.min() < rows.max() <= 255
    for seed in ("1", "1", "2"):
        main(["sample", str(vae_run), "-n", "3", "--seed", seed, "--out", str(tmp_path / f"{seed}.npy")])
    assert not np.array_equal(np.load(tmp_path / "1.npy"), np.load(tmp_path / "2.npy"))


def test_commands_that_make_no_sense_say_so(vae_run, capsys, settings, tmp_path):
    run = str(vae_run)
    assert fails(capsys, "export", run).endswith(f"export is for runs of sentence_vae, and {run} is one of vae")
    assert "interpolate is not for runs of vae" in fails(capsys, "interpolate", run, "a", "b")
    assert "--strategy is for runs on text" in fails(capsys, "sample", run, "--strategy", "greedy")
    assert "takes one DATA, got 2" in fails(capsys, "reconstruct", run, "a", "b")
    assert "--out must end with .png or .npy" in fails(capsys, "sample", run, "--out", "x.txt")
    assert "must be at least 1, got 0" in fails(capsys, "sample", run, "-n", "0")
    config = settings("linear_autoencoder", epochs=1)
    train(config)
    assert "without a prior cannot be sampled from" in fails(capsys, "sample", config.out)
    assert "--iw-samples is for runs of models with a prior" in fails(
        capsys, "evaluate", config.out, "--iw-samples", "5"
    )
    assert main(["evaluate", config.out]) == 0
    assert "explained" in capsys.readouterr().out


def test_curves_and_pictures_are_in_tensorboard_too(settings, tensorboard):
    from tensorboard.backend.event_processing import event_accumulator

    config = settings(epochs=1)
    train(config)
    picture(Path(config.out, "curves.png"))
    events = event_accumulator.EventAccumulator(f"{config.out}/tensorboard")
    events.Reload()
    assert set(events.Tags()["images"]) == {"atoms", "curves", "latent_map", "reconstructions", "samples"}
