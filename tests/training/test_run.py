import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from fastvae.models import SentenceVAE
from fastvae.training import callbacks
from fastvae.training.checkpoint import load_run, read_checkpoint
from fastvae.training.config import TrainConfig, read_yaml
from fastvae.training.metrics_file import read_metrics
from fastvae.training.module import NonFiniteLossError, SentenceVAEModule, kl_schedule
from fastvae.training.run import train


def last(config):
    return read_checkpoint(f"{config.out}/checkpoints/last.ckpt")


def assert_same_training(a, b):
    """Weights, optimizer and schedule are equal to the bit."""
    assert a["global_step"] == b["global_step"]
    assert a["lr_schedulers"] == b["lr_schedulers"]
    assert a["position"] == b["position"]
    for name, tensor in a["state_dict"].items():
        assert torch.equal(tensor, b["state_dict"][name]), name
    first, second = a["optimizer_states"][0]["state"], b["optimizer_states"][0]["state"]
    assert first.keys() == second.keys()
    for index, state in first.items():
        for name, value in state.items():
            assert torch.equal(value, second[index][name]), (index, name)


def interrupt_at(monkeypatch, step):
    """Send this process a Ctrl-C in the middle of a step."""
    training_step = SentenceVAEModule.training_step

    def interrupted_step(self, batch, batch_idx):
        if self.global_step == step:
            signal.raise_signal(signal.SIGINT)
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(SentenceVAEModule, "training_step", interrupted_step)


SMALL = {
    "embed_dim": 12,
    "hidden_size": 16,
    "latent_dim": 4,
    "batch_size": 16,
    "log_every": 3,
    "accelerator": "cpu",
}
NOISY = {"word_dropout": 0.3, "dropout": 0.2, "lr": 1e-2, "lr_schedule": "linear", "epochs": 3}


def test_a_run_learns_and_keeps_its_files(settings, tmp_path):
    config = settings(epochs=8, kl_steps=20)
    result = train(config)
    folder = tmp_path / "run"
    for name in (
        "vocabulary.txt",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "curves.png",
        "samples.txt",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert TrainConfig.from_mapping(read_yaml(folder / "config.yaml")) == config
    rows = read_metrics(folder / "metrics.csv")
    valid = [row["valid/neg_elbo"] for row in rows if "valid/neg_elbo" in row]
    assert len(valid) == 8
    assert valid[-1] < 0.6 * valid[0]
    assert result.best_neg_elbo == pytest.approx(min(valid), rel=1e-6)
    assert result.steps == 8 * 9  # 144 training sentences in batches of 16
    model, vocabulary, saved = load_run(folder)
    assert model.config["vocab_size"] == len(vocabulary)
    assert saved == config.to_dict()
    pretrained = SentenceVAE.from_pretrained(folder)
    assert pretrained.config == model.config
    assert all(map(torch.equal, pretrained.state_dict().values(), model.state_dict().values()))
    text = (folder / "samples.txt").read_text()
    assert "->" in text
    assert any(word in text for word in ("anna", "ben"))


def test_losses_in_the_metrics_are_never_annealed(settings, tmp_path):
    train(settings(kl_schedule="constant", kl_weight=0.0, epochs=2))
    for row in read_metrics(tmp_path / "run" / "metrics.csv"):
        assert row["kl_weight"] == 0
        for part in ("train", "valid", "train_epoch"):
            if f"{part}/kl" in row:
                assert row[f"{part}/kl"] > 0
                assert row[f"{part}/neg_elbo"] == pytest.approx(row[f"{part}/nll"] + row[f"{part}/kl"], rel=1e-6)


def test_validation_agrees_with_evaluate(settings, tmp_path):
    from fastvae.data import TextCorpus, load_text
    from fastvae.training.batches import ordered_batches
    from fastvae.training.metrics import evaluate
    from fastvae.training.module import _VALIDATION_SEED

    config = settings(word_dropout=0.5, dropout=0.5, epochs=1)
    result = train(config)
    model, vocabulary, _ = load_run(tmp_path / "run")
    corpus = TextCorpus(load_text(config.data, "valid"), vocabulary)
    figures = evaluate(model, ordered_batches(corpus, config.batch_size), seed=_VALIDATION_SEED)
    assert figures.neg_elbo == pytest.approx(result.best_neg_elbo, rel=1e-6)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, sentences):
    """The folder of a run of 3 epochs of 9 steps, with everything random in use."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "text.txt").write_text("\n".join(sentences), encoding="utf-8")
    config = TrainConfig(data=str(folder / "text.txt"), out=str(folder), **SMALL, **NOISY)
    train(config)
    return config


# steps are counted from 0: one whose row of metrics is due, the first and the last of an epoch
@pytest.mark.parametrize("step", [5, 9, 17])
def test_interrupted_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, monkeypatch, step):
    config = TrainConfig(**(uninterrupted.to_dict() | {"out": str(tmp_path)}))
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        stopped = train(config)
    assert stopped.interrupted
    assert stopped.steps == step + 1
    assert last(config)["position"]["step"] == step + 1
    resumed = train(config, resume=True)
    assert not resumed.interrupted
    assert_same_training(last(uninterrupted), last(config))
    assert Path(uninterrupted.out, "metrics.csv").read_text() == (tmp_path / "metrics.csv").read_text()


def test_more_epochs_after_a_finished_run(settings, tmp_path):
    fixed = {"word_dropout": 0.3, "kl_steps": 9}  # neither follows the length of the run
    whole = settings(out=str(tmp_path / "whole"), epochs=2, **fixed)
    parts = settings(out=str(tmp_path / "parts"), epochs=1, **fixed)
    train(whole)
    train(parts)
    with pytest.raises(ValueError, match="all of its 1 epochs"):
        train(parts, resume=True)
    train(TrainConfig(**(parts.to_dict() | {"epochs": 2})), resume=True)
    assert_same_training(last(whole), last(parts))


def test_the_course_of_the_kl_weight_stays_that_of_the_run_as_it_began(settings, tmp_path):
    config = settings(epochs=3, kl_steps=0)  # a third of 27 steps
    train(config)
    train(TrainConfig(**(config.to_dict() | {"epochs": 6})), resume=True)
    train(TrainConfig(**(config.to_dict() | {"epochs": 9})), resume=True)
    rows = [row for row in read_metrics(f"{config.out}/metrics.csv") if "valid/kl" in row]
    assert [row["step"] for row in rows] == [9 * epoch for epoch in range(1, 10)]
    assert all(row["kl_weight"] == 1.0 for row in rows)


def test_a_crash_loses_no_more_than_the_steps_since_the_checkpoint(uninterrupted, tmp_path, monkeypatch):
    config = TrainConfig(**(uninterrupted.to_dict() | {"out": str(tmp_path), "checkpoint_every": 5}))
    with monkeypatch.context() as patch:
        training_step = SentenceVAEModule.training_step

        def crash(self, batch, batch_idx):
            if self.global_step == 17:
                raise MemoryError
            return training_step(self, batch, batch_idx)

        patch.setattr(SentenceVAEModule, "training_step", crash)
        with pytest.raises(MemoryError):
            train(config)
    assert last(config)["global_step"] == 15
    train(config, resume=True)
    assert_same_training(last(uninterrupted), last(config))
    assert Path(uninterrupted.out, "metrics.csv").read_text() == (tmp_path / "metrics.csv").read_text()


def test_a_resumed_run_cannot_change_what_it_depends_on(settings):
    config = settings(epochs=1)
    train(config)
    changed = TrainConfig(**(config.to_dict() | {"epochs": 2, "hidden_size": 20}))
    with pytest.raises(ValueError, match="hidden_size cannot change when a run is resumed: it was 16, got 20"):
        train(changed, resume=True)


def test_a_run_is_not_overwritten_by_accident(settings):
    config = settings(epochs=1)
    with pytest.raises(FileNotFoundError, match="no run at"):
        train(config, resume=True)
    train(config)
    before = last(config)
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(config)
    assert_same_training(last(config), before)
    assert train(config, overwrite=True).steps == 9


@pytest.mark.parametrize(("place", "term"), [("decoder.output.bias", "reconstruction NLL"), ("head.linear.bias", "KL")])
def test_non_finite_losses_are_named_and_the_checkpoint_kept(settings, monkeypatch, place, term):
    on_train_batch_start = SentenceVAEModule.on_train_batch_start

    def poison(self, batch, batch_idx):
        on_train_batch_start(self, batch, batch_idx)
        if self.global_step == 12:
            if term == "KL":  # a NaN posterior makes both terms NaN: an infinite mean is worse for the KL alone
                self.model.head.forward = lambda *a, **k: spoil(head(*a, **k))
            else:
                self.model.get_parameter(place).data.fill_(float("nan"))

    def spoil(posterior):
        return posterior._replace(kl=posterior.kl + math.inf)

    build = SentenceVAEModule.build_model

    def build_and_keep(*arguments):
        nonlocal head
        model = build(*arguments)
        head = model.head.forward
        return model

    head = None
    monkeypatch.setattr(SentenceVAEModule, "build_model", build_and_keep)
    monkeypatch.setattr(SentenceVAEModule, "on_train_batch_start", poison)
    config = settings(epochs=3)
    with pytest.raises(NonFiniteLossError, match=f"the {term} became (nan|inf) at step 12"):
        train(config)
    checkpoint = last(config)
    assert checkpoint["global_step"] == 9
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())


def test_a_failed_write_keeps_the_previous_checkpoint(settings, monkeypatch):
    save, written = torch.save, []

    def disk_fills(checkpoint, file):
        save(checkpoint, file)
        written.append(checkpoint["global_step"])
        if checkpoint["global_step"] == 18:
            file.truncate(100)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastvae.training.callbacks.torch.save", disk_fills)
    config = settings()
    with pytest.raises(OSError, match="No space left on device"):
        train(config)
    assert 18 in written
    assert last(config)["global_step"] == 9


def test_early_stopping_and_best_checkpoint(settings):
    config = settings(epochs=50, lr=1e-9, patience=2)  # nothing improves, after noise of the first epochs
    result = train(config)
    assert 3 * 9 <= result.steps < 50 * 9
    rows = [row for row in read_metrics(f"{config.out}/metrics.csv") if "valid/neg_elbo" in row]
    best = min(rows, key=lambda row: np.float32(row["valid/neg_elbo"]))  # as it is compared
    assert read_checkpoint(f"{config.out}/checkpoints/best.ckpt")["global_step"] == best["step"]
    assert rows[-1]["step"] - best["step"] == 2 * 9


def test_a_time_limit_ends_the_run_after_a_validation(settings):
    config = settings(epochs=500, max_minutes=0.2 / 60)
    result = train(config)
    assert 0 < result.steps < 500 * 9
    assert math.isfinite(result.best_neg_elbo)
    assert last(config)["global_step"] == result.steps


def test_a_time_limit_within_an_epoch_leaves_nothing_out(uninterrupted, tmp_path, monkeypatch):
    settings = uninterrupted.to_dict() | {"out": str(tmp_path)}
    monkeypatch.setattr(callbacks.TimeLimit, "on_train_start", lambda self, *_: setattr(self, "_start", -1e9))
    for step in (1, 2):  # the limit is over after the first step
        assert train(TrainConfig(**settings | {"max_minutes": 1.0}), resume=step > 1).steps == step
        checkpoint = last(TrainConfig(**settings))
        assert checkpoint["position"] == {"epoch": 0, "batch": step, "step": step}
    best = read_checkpoint(tmp_path / "checkpoints" / "best.ckpt")["global_step"]
    rows = {row["step"]: row["valid/neg_elbo"] for row in read_metrics(tmp_path / "metrics.csv") if "valid/kl" in row}
    assert best == min(rows, key=rows.get)
    kept = [state for name, state in checkpoint["callbacks"].items() if "RunCheckpoints" in name]
    assert kept[0]["best_neg_elbo"] == pytest.approx(min(rows.values()), rel=1e-6)
    train(TrainConfig(**settings), resume=True)
    assert_same_training(last(uninterrupted), last(TrainConfig(**settings)))


def test_a_resumed_run_may_be_more_patient(settings):
    config = settings(epochs=50, lr=1e-9, patience=2)
    stopped = train(config).steps
    more = TrainConfig(**config.to_dict() | {"patience": 5})
    assert train(more, resume=True).steps == stopped + 3 * 9


def test_a_run_written_over_leaves_nothing(settings, tmp_path):
    config = settings(epochs=1)
    train(config)
    folder = tmp_path / "run"
    for name in ("samples.png", "evaluation_test.json", "codes.html", "mine.png"):
        (folder / name).write_text("old")
    events = set((folder / "tensorboard").glob("events*"))
    train(config, overwrite=True)
    assert not any((folder / name).exists() for name in ("samples.png", "evaluation_test.json", "codes.html"))
    assert (folder / "mine.png").exists()
    assert not events & set((folder / "tensorboard").glob("events*"))


def test_streaming_trains_and_resumes(settings, tmp_path, text_file, monkeypatch):
    changes = {"streaming": True, "valid": str(text_file), "kl_steps": 20, "epochs": 2, "word_dropout": 0.3}
    whole, parts = (
        settings(out=str(tmp_path / "whole"), **changes),
        settings(out=str(tmp_path / "parts"), **changes),
    )
    assert train(whole).steps == 2 * 10
    with monkeypatch.context() as patch:
        interrupt_at(patch, 13)
        assert train(parts).interrupted
    train(parts, resume=True)
    assert_same_training(last(whole), last(parts))


def test_token_budget(settings):
    config = settings(max_tokens=96, epochs=1)
    assert train(config).steps > 0
    with pytest.raises(ValueError, match="max_tokens=20 cannot hold"):
        train(settings(max_tokens=20, out=config.out + "2"))


def test_mixed_precision(settings):
    result = train(settings(precision="bf16-mixed", epochs=6))
    reference = train(settings(epochs=6), overwrite=True)
    assert result.best_neg_elbo == pytest.approx(reference.best_neg_elbo, rel=0.05)


def test_unusable_settings_are_told_in_one_line(settings, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(settings(data=str(tmp_path / "nowhere.txt")))
    with pytest.raises(ValueError, match="batch_size") as error:
        train(settings(batch_size=1000))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_schedule_settings(settings):
    def weights(steps, **changes):
        schedule = kl_schedule(settings(**changes), steps)
        return [schedule(step) for step in (0, 50, 100, 150)]

    assert weights(300, kl_schedule="constant", kl_weight=0.5) == [0.5] * 4
    assert weights(300, kl_schedule="linear", kl_start=0.2) == pytest.approx([0.2, 0.6, 1.0, 1.0])
    assert weights(-1, kl_schedule="linear", kl_steps=200) == pytest.approx([0, 0.25, 0.5, 0.75])
    assert weights(300, kl_schedule="cyclical") == pytest.approx([0, 1, 0, 1])
    assert weights(300, kl_schedule="logistic", kl_weight=2.0) == pytest.approx([0.0038, 1, 1.996, 2], abs=1e-3)


def test_what_is_refused_changes_no_folder(settings, tmp_path):
    """Neither a new one nor, with overwrite or resume, an older run."""
    for wrong, message in (
        ({"accelerator": "gpu"}, "accelerator 'gpu', precision '32': No supported gpu backend found"),
        ({"accelerator": "abacus"}, "accelerator='abacus'"),
    ):
        if wrong["accelerator"] == "gpu" and torch.cuda.is_available():
            continue
        with pytest.raises(ValueError, match=message):
            train(settings(**wrong))
        assert not (tmp_path / "run").exists()
    train(settings(epochs=1))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for how in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match="accelerator='abacus'"):
            train(settings(epochs=2, accelerator="abacus"), **how)
        assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_model_that_validation_finds_broken_is_not_kept(settings, tmp_path):
    with pytest.raises(NonFiniteLossError, match="became nan at step 1, in validation"):
        train(settings(epochs=1, lr=1e30, batch_size=144))  # of one step, whose own loss is still finite
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_tensorboard_where_installed(settings, tmp_path):
    pytest.importorskip("tensorboard")
    train(settings(epochs=1))
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_nothing_of_lightning_reaches_the_screen(settings, capfd):
    train(settings(epochs=1))
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "epoch   1" in shown.err
    for noise in ("num_workers", "GPU available", "litlogger", "💡", "Warning"):
        assert noise not in shown.err


def test_the_run_folder_holds_plain_json_values(settings):
    config = settings(epochs=1)
    train(config)
    assert json.loads(json.dumps(last(config)["train_config"])) == config.to_dict()
