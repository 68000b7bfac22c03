import json
import math
import random
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from fastvae.cli import main
from fastvae.data import load_labeled, load_text
from fastvae.data.assistant import SENTIMENTS, assistant_grammar, assistant_utterances
from fastvae.models import ControlledTextVAE
from fastvae.training.checkpoint import load_run, read_checkpoint
from fastvae.training.config import ControlledConfig
from fastvae.training.controlled_module import ControlledModule, LabeledDataModule, report_controlled
from fastvae.training.metrics_file import read_metrics
from fastvae.training.module import NonFiniteLossError
from fastvae.training.reports import ReportOptions
from fastvae.training.run import train
from fastvae.training.text import sample_sentences

SMALL = {
    "embed_dim": 12,
    "hidden_size": 16,
    "latent_dim": 4,
    "filters": 4,
    "batch_size": 16,
    "epochs": 4,
    "pretrain_epochs": 2,
    "longest": 4,
    "lr": 1e-2,
    "log_every": 3,
    "accelerator": "cpu",
}
OPINIONS = {"likes": "good", "loves": "good", "hates": "bad", "dreads": "bad"}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """160 sentences of 3 to 5 words, the mood of every tenth of them unknown."""
    draw = random.Random(0)
    lines = ["mood\ttext"]
    for i in range(160):
        verb = draw.choice(list(OPINIONS))
        again = " again" * draw.randint(0, 2)
        mood = "?" if i % 10 == 0 else OPINIONS[verb]
        lines.append(f"{mood}\t{draw.choice(['anna', 'ben'])} {verb} {draw.choice(['jazz', 'rain'])}{again}")
    path = tmp_path_factory.mktemp("table") / "table.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def whole_run(table, tmp_path_factory):
    torch.set_num_threads(1)
    config = ControlledConfig(data=str(table), out=str(tmp_path_factory.mktemp("whole")), **SMALL)
    train(config)
    return config


def test_epochs_of_pre_training_have_all_sentences_and_the_others_the_short_ones(table):
    config = ControlledConfig(data=str(table), **SMALL)
    data = LabeledDataModule(config)
    lengths = [torch.cat([batch.lengths for batch in data.epoch(epoch)]) - 2 for epoch in (1, 2)]
    assert lengths[0].max() == 5
    assert lengths[1].max() == 4
    assert data.longest == 5  # with </s>
    assert max(data.valid.lengths) == 4 + 2
    batches = [len(list(data.epoch(epoch))) for epoch in range(4)]
    assert [data.steps(epochs) for epochs in range(5)] == [sum(batches[:epochs]) for epochs in range(5)]
    assert LabeledDataModule(ControlledConfig(data=str(table), **(SMALL | {"pretrain_epochs": None}))).steps(
        4
    ) == data.steps(4)
    again = LabeledDataModule(config, data.vocabulary, start_epoch=2, start_batch=3)
    assert len(list(again.epoch(2))) == batches[2] - 3


def test_a_run_goes_through_its_phases(whole_run):
    folder = Path(whole_run.out)
    for name in ("vocabulary.txt", "checkpoints/last.ckpt", "curves.png", "samples.txt"):
        assert (folder / name).stat().st_size > 0, name
    rows = read_metrics(folder / "metrics.csv")
    valid = [row for row in rows if "valid/objective" in row]
    assert len(valid) == 4
    for row in valid:
        assert row["valid/neg_elbo"] == pytest.approx(row["valid/nll"] + row["valid/kl"], rel=1e-6)
        assert row["valid/objective"] == pytest.approx(row["valid/neg_elbo"] + 0.1 * row["valid/control_nll"], rel=1e-6)
        assert 0 <= row["valid/control"] <= 1
    epochs = [row for row in rows if "train_epoch/neg_elbo" in row]
    assert ["train_epoch/control" in row for row in epochs] == [False, False, True, True]
    best = read_checkpoint(folder / "checkpoints" / "best.ckpt")["global_step"]
    after = {row["step"]: row["valid/objective"] for row in valid[2:]}
    assert best == min(after, key=after.get), "the best checkpoint is of the sleep phase"


def test_the_weights_of_the_sleep_phase_follow_their_course(table):
    config = ControlledConfig(
        data=str(table), sleep_steps=4, temperature=2.0, temperature_end=0.5, **(SMALL | {"lambda_c": 3.0})
    )
    data = LabeledDataModule(config)
    module = ControlledModule(ControlledModule.build_model(config, data), config)
    start, end = data.steps(2), data.steps(4)
    module._sleep_start, module._steps = start, end
    seen, best = [], []
    for step in (0, start - 1, start, start + 1, start + 4, start + 9, (start + end) // 2, end):
        type(module).global_step, kept = step, type(module).global_step
        try:
            seen.append((module.asleep, module.sleep_weight, module.temperature))
            best.append(module.may_be_best)
        finally:
            type(module).global_step = kept
    assert [asleep for asleep, _, _ in seen] == [False, False, True, True, True, True, True, True]
    assert best == [False, False, False, True, True, True, True, True]
    assert [weight for _, weight, _ in seen][:6] == pytest.approx([0, 0, 0.2, 0.4, 1, 1])
    assert [seen[i][2] for i in (0, 2, 7)] == pytest.approx([2.0, 2.0, 0.5])
    assert seen[6][2] == pytest.approx(1.0, rel=0.1)


def test_the_loss_is_the_sum_of_its_terms(table):
    settings = {"lambda_c": 0.7, "lambda_z": 0.3, "lambda_u": 0.5, "entropy_weight": 0.2, "classifier_dropout": 0.0}
    config = ControlledConfig(data=str(table), word_dropout=0.0, **SMALL, **settings)
    data = LabeledDataModule(config)
    batch = next(iter(data.epoch(0)))
    model = ControlledModule.build_model(config, data)
    module = ControlledModule(model, config)
    module._steps = 10  # asleep from the first step on

    def parts():
        torch.manual_seed(3)
        wake = model(batch.tokens, batch.lengths, batch.attributes, kl_weight=0.4)
        real = model.discriminate(batch.tokens[:, 1:], batch.lengths - 1, batch.attributes).nll.mean()
        z, chosen = model.draw_latent(16), model.draw_attributes(16)
        words, lengths = model.decode(z, chosen, strategy="sample")
        written = model.discriminate(words, lengths, chosen)
        sleep = model.sleep(model.draw_latent(16), model.draw_attributes(16), temperature=1.0)
        yield wake.loss
        yield real
        yield (0.7 * sleep.attribute_nll + 0.3 * sleep.latent_nll).mean()
        yield 0.5 * (written.nll + 0.2 * written.entropy).mean()

    torch.manual_seed(3)
    loss, _ = module.losses(batch, 0.4, None)
    torch.testing.assert_close(loss, sum(parts()))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_interrupted_and_resumed_equals_uninterrupted(whole_run, tmp_path, monkeypatch):
    step = 20  # in the sleep phase
    config = ControlledConfig(**whole_run.to_dict() | {"out": str(tmp_path)})
    training_step = ControlledModule.training_step

    def interrupted_step(self, batch, batch_idx):
        if self.global_step == step:
            signal.raise_signal(signal.SIGINT)
        return training_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ControlledModule, "training_step", interrupted_step)
        stopped = train(config)
    assert stopped.interrupted
    assert stopped.steps == step + 1
    train(config, resume=True)
    a, b = (read_checkpoint(Path(c.out) / "checkpoints" / "last.ckpt") for c in (whole_run, config))
    assert a["global_step"] == b["global_step"]
    for name, tensor in a["state_dict"].items():
        assert torch.equal(tensor, b["state_dict"][name]), name
    assert Path(whole_run.out, "metrics.csv").read_text() == Path(config.out, "metrics.csv").read_text()


def test_a_longer_run_stays_in_the_phase_it_is_in(table, tmp_path):
    config = ControlledConfig(data=str(table), out=str(tmp_path), **(SMALL | {"pretrain_epochs": None}))
    assert config.pretrain_epochs == 2
    train(config)
    longer = ControlledConfig(**config.to_dict() | {"epochs": 6})
    train(longer, resume=True)
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "train_epoch/neg_elbo" in row]
    assert ["train_epoch/control" in row for row in rows] == [False, False, True, True, True, True]


def test_patience_begins_with_the_sleep_phase(table, tmp_path):
    settings = SMALL | {"lr": 1e-9, "epochs": 12, "pretrain_epochs": 6, "patience": 2}
    result = train(ControlledConfig(data=str(table), out=str(tmp_path), **settings))  # which learns nothing
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "valid/objective" in row]
    assert 6 + 3 <= len(rows) < 12
    assert math.isfinite(result.best)
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


def test_a_folder_of_tables_is_measured(table, tmp_path):
    header, *rows = table.read_text().splitlines()
    data = tmp_path / "tables"
    data.mkdir()
    for split, part in (("train", rows[:80]), ("valid", rows[80:120]), ("test", rows[120:])):
        (data / f"{split}.tsv").write_text("\n".join([header, *part]) + "\n")
    folder = str(tmp_path / "run")
    train(ControlledConfig(data=str(data), out=folder, **SMALL))
    sampled = ["--iw-samples", "2", "--samples", "20", "--reverse-samples", "40"]
    assert main(["evaluate", folder, *sampled]) == 0
    figures = json.loads(Path(folder, "evaluation_test.json").read_text())
    assert figures["reverse_ppl"] > 1  # word_kl is infinite where the model writes <unk>
    assert load_text(data, "test") == load_labeled(data, "test").sentences


def test_a_term_that_is_not_finite_is_named(table, tmp_path, monkeypatch):
    sleep = ControlledTextVAE.sleep
    monkeypatch.setattr(
        ControlledTextVAE, "sleep", lambda *a, **k: sleep(*a, **k)._replace(latent_nll=torch.full((16,), math.nan))
    )
    config = ControlledConfig(data=str(table), out=str(tmp_path), **SMALL)
    with pytest.raises(NonFiniteLossError, match="the NLL of generated z became nan at step 18"):
        train(config)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 18


def test_what_is_reported_of_a_run(whole_run):
    model, vocabulary, config = load_run(whole_run.out)
    result, title, rows = report_controlled(
        model, vocabulary, ReportOptions(data=config["data"], split="test", iw_samples=3)
    )
    short = [text for text in load_labeled(config["data"], "test").sentences if len(text.split()) <= 4]
    assert 0 < len(short) < 8
    assert result.sentences == len(short)
    assert f"{len(short)} sentences, {sum(len(text.split()) + 1 for text in short)} predicted tokens" in title
    assert 0 <= result.control["mood"] <= 1
    assert result.iw_nll < result.neg_elbo + 1
    assert [name for name, _, _ in rows][-2:] == ["mood", "mood"]
    again, *_ = report_controlled(model, vocabulary, ReportOptions(data=config["data"], split="test", iw_samples=3))
    assert again == result


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attributes": "tense"}, "attributes must be of mood, got 'tense'"),
        ({"pretrain_epochs": 4}, "pretrain_epochs must be below epochs = 4, got 4"),
        ({"temperature_end": 0.0}, "temperature_end must be positive"),
        ({"widths": ()}, "widths must be sizes"),
        ({"lambda_c": -1.0}, "lambda_c must be at least 0, got -1.0"),
        ({"longest": 1}, "no sentence has at most 1 words"),
        ({"valid": "x.txt"}, "valid is for text without attributes"),
    ],
)
def test_unusable_settings_are_told_in_one_line(table, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        LabeledDataModule(ControlledConfig(data=str(table), **(SMALL | changes)))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def assistant_run(tmp_path_factory):
    """Requests about the climate, of which one in seven tells its sentiment."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("assistant")
    lines = ["sentiment\ttext"]
    chosen = [u for u in assistant_utterances("train") if u.intent == "climate" and len(u.text.split()) <= 11]
    lines += [f"{u.sentiment if i % 7 == 0 else '?'}\t{u.text}" for i, u in enumerate(chosen)]
    (folder / "table.tsv").write_text("\n".join(lines) + "\n")
    config = ControlledConfig(
        data=str(folder / "table.tsv"),
        out=str(folder / "run"),
        embed_dim=32,
        hidden_size=64,
        latent_dim=4,
        filters=16,
        word_dropout=0.2,
        epochs=7,
        pretrain_epochs=5,
        lr=1e-2,
        lambda_c=1.0,
        temperature_end=0.5,
        accelerator="cpu",
    )
    train(config)
    return config


def test_sentences_of_the_embedded_corpus_have_the_sentiment_chosen(assistant_run):
    """The grammar tells the sentiment of what it can say, so that nothing trained is the judge."""
    model, vocabulary, _ = load_run(assistant_run.out)
    grammar = assistant_grammar()
    said, right = 0, 0
    for sentiment in SENTIMENTS:
        for sentence in sample_sentences(model, vocabulary, 150, chosen={"sentiment": sentiment}, temperature=0.7):
            kind = grammar.kind_of(sentence)
            said += kind is not None
            right += kind is not None and kind[1] == sentiment
    assert said > 0.4 * 450, "too few sentences that the grammar can say"
    assert right / said > 0.9
