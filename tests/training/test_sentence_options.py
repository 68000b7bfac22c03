"""What runs of a sentence VAE add to its options: aggressive training, warm-up, the precision of products."""

import math

import pytest
import torch

pytest.importorskip("lightning")

from fastvae.training import TrainConfig, load_run, train
from fastvae.training.checkpoint import read_checkpoint
from fastvae.training.metrics_file import read_metrics
from fastvae.training.module import SentenceVAEModule


def state(path):
    return read_checkpoint(path)["state_dict"]


def test_encoder_steps_leave_the_decoder_untouched_and_its_step_the_encoder(settings, monkeypatch):
    inner, outer, train_encoder = [], [], SentenceVAEModule._train_encoder

    def copied(parameters):
        return [parameter.detach().clone() for parameter in parameters]

    def split(module):
        mine = {id(parameter) for parameter in module.encoder_parameters()}
        return [[p for p in module.model.parameters() if (id(p) in mine) == encoder] for encoder in (True, False)]

    def same(before, after):
        return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def watch_inner(self):
        before = [copied(part) for part in split(self)]
        if outer and outer[-1] is not None:
            outer[-1] = [same(x, y) for x, y in zip(outer[-1], before, strict=True)]
        train_encoder(self)
        after = [copied(part) for part in split(self)]
        inner.append([same(x, y) for x, y in zip(before, after, strict=True)])
        outer.append(after)

    monkeypatch.setattr(SentenceVAEModule, "_train_encoder", watch_inner)
    train(settings(aggressive_steps=20, epochs=1, share_embedding=True))
    assert len(inner) == 9
    assert inner == [[False, True]] * 9
    assert outer[:-1] == [[True, False]] * 8


def test_aggressive_training_ends_when_information_no_longer_rises(settings, monkeypatch):
    values = iter([1.0, 2.0, 1.5])
    monkeypatch.setattr("fastvae.training.module.mutual_information", lambda *posteriors: next(values))
    steps = []
    monkeypatch.setattr(SentenceVAEModule, "_train_encoder", lambda self: steps.append(self.global_step))
    config = settings(aggressive_steps=5, epochs=5)
    train(config)
    assert len(steps) == 3 * 9
    assert read_checkpoint(f"{config.out}/checkpoints/last.ckpt")["aggressive"] == [False, 1.5]


def test_a_resumed_aggressive_run_is_the_uninterrupted_one(settings, tmp_path):
    whole, parts = (settings(out=str(tmp_path / name), aggressive_steps=5, kl_steps=9) for name in ("whole", "parts"))
    train(whole)
    train(TrainConfig(**(parts.to_dict() | {"epochs": 1})))
    train(parts, resume=True)
    first, second = (state(f"{config.out}/checkpoints/last.ckpt") for config in (whole, parts))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("course", ["constant", "linear"])
def test_the_learning_rate_rises_then_follows_its_course(settings, course):
    config = settings(warmup_steps=9, lr_schedule=course, log_every=1, lr=1e-3)
    train(config)
    rates = {row["step"]: row["lr"] for row in read_metrics(f"{config.out}/metrics.csv") if "train/nll" in row}
    for step, rate in rates.items():  # written after the step, with the rate of the next
        falling = 1.0 if course == "constant" else 1 - step / 18
        assert rate == pytest.approx(1e-3 * min((step + 1) / 10, 1.0) * falling, rel=1e-4)
    assert len(rates) == 18


def test_the_precision_of_products_is_that_of_the_run_alone(settings, monkeypatch):
    seen, losses = [], SentenceVAEModule.losses

    def watch(self, *arguments):
        seen.append(torch.get_float32_matmul_precision())
        return losses(self, *arguments)

    monkeypatch.setattr(SentenceVAEModule, "losses", watch)
    before = torch.get_float32_matmul_precision()
    train(settings(epochs=1, matmul_precision="medium"))
    assert set(seen) == {"medium"}
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder": "transformer", "decoder": "transformer", "num_layers": 2, "layer_dropout": 0.1},
        {"batch_norm": 0.5, "free_bits": 0.1, "free_bits_per": "batch"},
        {"encoder": "gru", "encoder_noise": "shuffle", "encoder_noise_level": 3, "bag_of_words": 0.1},
        {"decoder": "gru", "regularizer": "adversarial", "embedding_dropout": 0.1},
    ],
)
def test_runs_with_these_settings_load_again(settings, changes):
    config = settings(epochs=1, **changes)
    assert math.isfinite(train(config).best_neg_elbo)
    model, _, read = load_run(config.out)
    assert read == config.to_dict()
    for name, value in changes.items():
        assert model.config.get(name, value) == value


def test_a_run_from_before_these_settings_goes_on(settings, tmp_path):
    config = settings(epochs=1, kl_steps=9)
    train(config)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for name in ("encoder", "decoder", "warmup_steps", "matmul_precision", "batch_norm", "regularizer", "num_heads"):
        checkpoint["train_config"].pop(name)
        checkpoint["model_config"].pop(name, None)
    checkpoint.pop("aggressive")
    torch.save(checkpoint, path)
    assert train(TrainConfig(**(config.to_dict() | {"epochs": 2})), resume=True).steps == 18


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "conv"}, "encoder must be one of lstm, gru, transformer, got 'conv'"),
        ({"decoder": "transformer", "num_heads": 3}, "num_heads must divide hidden_size 16, got 3"),
        ({"feedforward_size": 0}, "feedforward_size must be at least 1"),
        ({"regularizer": "none", "free_bits": 0.1}, "free_bits must be 0"),
        ({"encoder_noise": "drop", "encoder_noise_level": 3.0}, "encoder_noise_level must be a share"),
        ({"encoder_noise": "shuffle"}, "encoder_noise_level must be a whole number of places"),
        ({"aggressive_steps": 5, "precision": "16-mixed"}, "aggressive_steps needs"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"embedding_dropout": 1.0}, r"embedding_dropout must be in \[0, 1\)"),
    ],
)
def test_wrong_settings_are_named(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)
