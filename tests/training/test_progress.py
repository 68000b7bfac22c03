import io
import re
import signal

import pytest
import torch

pytest.importorskip("lightning")
import rich.console

from fastvae.training import callbacks
from fastvae.training.config import ControlledConfig, VAEConfig
from fastvae.training.metrics import evaluate
from fastvae.training.module import SentenceVAEModule
from fastvae.training.run import train


@pytest.fixture
def screen(monkeypatch):
    """What a terminal shows: every update of the bar."""
    file = io.StringIO()
    console = rich.console.Console

    def terminal(**options):
        return console(file=file, force_terminal=True, width=200, color_system=None)

    monkeypatch.setattr(rich.console, "Console", terminal)
    shown = callbacks.TrainingProgress.__init__

    def at_each_step(self, refresh=0.0):
        shown(self, refresh)

    monkeypatch.setattr(callbacks.TrainingProgress, "__init__", at_each_step)
    started = callbacks.TrainingProgress.on_train_start

    def draw_at_once(self, trainer, pl_module):
        started(self, trainer, pl_module)
        update = self._progress.update

        def update_and_draw(*arguments, **fields):
            update(*arguments, **fields)
            self._progress.refresh()

        self._progress.update = update_and_draw

    monkeypatch.setattr(callbacks.TrainingProgress, "on_train_start", draw_at_once)
    return file


def test_bar_tells_speed_loss_active_units_and_the_time_of_the_whole_run(screen, settings, tmp_path, monkeypatch):
    from fastvae.data import TextCorpus, load_text
    from fastvae.training.batches import ordered_batches
    from fastvae.training.checkpoint import load_run

    build = SentenceVAEModule.build_model.__func__

    def build_with_active_units(cls, config, data):
        model = build(cls, config, data)
        with torch.no_grad():
            model.head.linear.weight[:2].mul_(50)
        return model

    monkeypatch.setattr(SentenceVAEModule, "build_model", classmethod(build_with_active_units))
    config = settings(epochs=3, kl_schedule="constant", kl_weight=0.0)
    train(config)
    text = screen.getvalue()
    bar_of = re.compile(r"epoch (\d) .* (\d+)/9 +([\d,]+) tokens/s  -ELBO ([\d.]+)  KL ([\d.]+)(.*)")
    bars = [found.groups() for line in re.split(r"[\r\n]", text) if (found := bar_of.search(line))]
    assert {bar[0] for bar in bars} == {"1", "2", "3"}
    assert not any("active" in bar[5] for bar in bars if bar[0] == "1")
    assert all(re.search(r"  active \d  ", bar[5]) for bar in bars if bar[0] == "3")
    assert any(re.search(r"  0:\d\d:\d\d left", bar[5]) for bar in bars if bar[0] == "1")
    model, vocabulary, _ = load_run(tmp_path / "run", which="last")
    corpus = TextCorpus(load_text(config.data, "valid"), vocabulary)
    expected = evaluate(model, ordered_batches(corpus, 16)).active_units
    (line,) = re.findall(r"epoch   3  step .*active (\d+)", text)
    assert int(line) == expected > 0


def test_time_left_is_of_the_steps_left_or_of_the_time_limit(monkeypatch):
    class FakeTrainer:
        global_step = 30
        callbacks = ()

    bar = callbacks.TrainingProgress()
    bar._steps, bar._first_step, bar._start = 110, 10, 100.0
    trainer = FakeTrainer()
    assert bar._left(trainer, 140.0) == "  0:02:40 left"  # 20 steps took 40 s, 80 are left
    trainer.callbacks = (callbacks.TimeLimit(2.0),)
    assert bar._left(trainer, 140.0) == "  0:01:20 left"
    bar._steps = -1  # a streamed text
    assert bar._left(trainer, 230.0) == "  0:00:00 left"
    trainer.callbacks = ()
    assert bar._left(trainer, 140.0) == ""


def test_active_units_of_a_model_of_images(screen, tmp_path):
    pytest.importorskip("sklearn")
    small = {"data": "digits", "epochs": 3, "hidden": (16,), "accelerator": "cpu", "latent_dim": 3, "beta": 0.0}
    train(VAEConfig(**small, out=str(tmp_path / "vae")))
    assert re.search(r"epoch   3  step .*active [23]", screen.getvalue())


def test_bar_has_what_is_known_in_each_phase_of_controlled_generation(screen, tmp_path):
    table = tmp_path / "table.tsv"
    moods = {"good": "anna likes jazz", "bad": "ben hates rain"}
    rows = [f"{mood}\t{text}" for mood, text in moods.items()] * 20
    table.write_text("\n".join(["mood\ttext", *rows]) + "\n")
    sizes = {"embed_dim": 8, "hidden_size": 8, "latent_dim": 2, "filters": 2, "batch_size": 12, "accelerator": "cpu"}
    train(ControlledConfig(data=str(table), out=str(tmp_path / "run"), epochs=2, pretrain_epochs=1, **sizes))
    bars = [line for line in re.split(r"[\r\n]", screen.getvalue()) if "tokens/s" in line]
    assert not any("control" in line for line in bars if "epoch 1" in line)
    assert any("  control 0." in line or "  control 1." in line for line in bars if "epoch 2" in line)


def test_bar_of_epochs_shorter_than_its_updates(screen, settings, monkeypatch):
    """The figures stay from one epoch to the next."""
    monkeypatch.setattr(callbacks.TrainingProgress, "__init__", at_each_tenth_of_a_second(callbacks.TrainingProgress))
    train(settings(epochs=40, hidden_size=8, checkpoint_every=0))
    bars = [line for line in re.split(r"[\r\n]", screen.getvalue()) if "/9" in line]
    later = [line for line in bars if re.search(r"epoch (2\d|3\d)", line)]
    assert later
    assert all("tokens/s" in line and "left" in line for line in later)


def at_each_tenth_of_a_second(bar):
    begin = bar.__init__
    return lambda self: begin(self, 0.1)


def test_an_interrupted_run_gives_the_terminal_and_ctrl_c_back(screen, settings, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    training_step = SentenceVAEModule.training_step

    def interrupted_step(self, batch, batch_idx):
        signal.raise_signal(signal.SIGINT)
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(SentenceVAEModule, "training_step", interrupted_step)
    assert train(settings()).interrupted
    assert signal.getsignal(signal.SIGINT) is before
    text = screen.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0  # cursor hidden, and shown
