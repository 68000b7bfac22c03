"""The comparison of mixtures on a small corpus of labelled dialogues: rows, what is left out, what goes on."""

import json
import random

import pytest

from bench import mixtures, tables

SETTINGS = """\
data: dailydialog
embed_dim: 8
hidden_size: 8
batch_size: 16
epochs: 1
variables: 2
components: 3
latent_dim: 2
accelerator: cpu
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    draw = random.Random(0)
    (tmp_path / "dailydialog").mkdir()
    for name, count in (("train", 30), ("validation", 5), ("test", 8)):
        questions = [draw.choice(("where is it ?", "who are you ?")) for _ in range(count)]
        text = [f"{question} __eou__ it is {draw.choice(('here', 'there'))} . __eou__" for question in questions]
        for suffix, lines in (("", text), ("_act", ["2 1"] * count), ("_emotion", ["0 4"] * count)):
            (tmp_path / "dailydialog" / f"{name}{suffix}.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "settings.yaml").write_text("model: mixture_vae\n" + SETTINGS)
    monkeypatch.setenv("FASTVAE_DATA", str(tmp_path))
    return tmp_path


def measure(folder, monkeypatch, *models, settings="settings.yaml"):
    arguments = ["dailydialog", "--config", folder / settings, "--runs", folder / "runs", "--out", folder / "rows.json"]
    monkeypatch.setattr("sys.argv", ["mixtures", *map(str, arguments), "--models", *models])
    assert mixtures.main() == 0
    return json.loads((folder / "rows.json").read_text())


def test_models_are_measured_once_with_the_same_settings(folder, monkeypatch, capsys):
    rows = measure(folder, monkeypatch, "DGM-VAE", "AE")
    assert [row["model"] for row in rows] == ["AE", "DGM-VAE"]
    for row in rows:
        assert row["steps"] == 3
        assert row["split"] == "test"
        assert row["sentences"] == 16
        assert row["neg_elbo"] == pytest.approx(row["nll"] + row["kl"])
        assert 0 <= row["homogeneity_act"] <= 1
    assert rows[0]["kl"] == rows[0]["mutual_information"] == 0
    assert [row["settings"]["beta"] for row in rows] == [0.0, 0.7]  # as the kind fixes it, and the default
    capsys.readouterr()
    assert measure(folder, monkeypatch, "DGM-VAE") == rows
    assert "measured already" in capsys.readouterr().out
    (folder / "other.yaml").write_text(SETTINGS.replace("epochs: 1", "epochs: 2") + "model: mixture_vae\n")
    again = measure(folder, monkeypatch, "DGM-VAE", settings="other.yaml")
    assert again[1]["steps"] == 6  # the run of one epoch went on
    assert again[0] == rows[0]
    lines = tables.mixtures(folder / "rows.json").splitlines()
    assert lines[0].startswith("| model | I(c;x) | BLEU | homogeneity: act |")
    assert lines[2].startswith("| AE | 0.000 |")
    assert len(lines) == 4
    (folder / "rows.json").unlink()  # as if it had been interrupted after the training
    assert measure(folder, monkeypatch, "DGM-VAE", settings="other.yaml") == again[1:]


def test_seeds_have_files_of_their_own(folder, monkeypatch):
    rows = measure(folder, monkeypatch, "GM-VAE", "AE")
    (folder / "rows.json").rename(folder / "settings_mixtures.json")
    monkeypatch.setattr(mixtures, "RESULTS", folder)
    monkeypatch.chdir(folder)
    arguments = ["dailydialog", "--config", str(folder / "settings.yaml"), "--seed", "1", "--models", "GM-VAE"]
    monkeypatch.setattr("sys.argv", ["mixtures", *arguments])
    assert mixtures.main() == 0
    other = json.loads((folder / "settings_1_mixtures.json").read_text())
    assert other[0]["settings"] == rows[1]["settings"] | {"seed": 1}
    table = tables.mixture_seeds(folder, "settings").splitlines()
    assert len(table) == 3  # of the model that both have
    assert f"{rows[1]['bleu']:.2f}, {other[0]['bleu']:.2f}" in table[2]


def test_samples_are_compared_with_text(folder, monkeypatch):
    measure(folder, monkeypatch, "GM-VAE")
    monkeypatch.setattr(mixtures, "_SAMPLES", 1000)
    monkeypatch.setattr(mixtures, "_LANGUAGE_MODEL", {"embed_dim": 8, "hidden_size": 8, "epochs": 1})
    model, vocabulary, settings = mixtures.load_run(folder / "runs" / "gm_vae")
    figures = mixtures.of_samples(model, vocabulary, mixtures.MixtureConfig(**settings))
    assert figures["samples"] == 1000
    assert figures["reverse_ppl"] > 1
    assert figures["word_kl"] > 0
