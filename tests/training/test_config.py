import math

import pytest

from fastvae.training.config import (
    TrainConfig,
    config_class,
    read_yaml,
    settings_names,
    settings_path,
    write_yaml,
)

pytest.importorskip("yaml")


def test_yaml_round_trip(tmp_path):
    config = TrainConfig(data="a.txt", valid="b.txt", lr=3e-5, tie_weights=True, patience=3)
    write_yaml(config, tmp_path / "config.yaml")
    assert TrainConfig.from_mapping(read_yaml(tmp_path / "config.yaml")) == config


def test_yaml_numbers_that_yaml_reads_as_strings(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1e-4\nprecision: 32\nfree_bits: 1\n")
    assert read_yaml(tmp_path / "c.yaml") == {"lr": 1e-4, "precision": "32", "free_bits": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hiden_size: 3", "c.yaml: unknown setting 'hiden_size'; did you mean 'hidden_size'?"),
        ("epochs: many", "c.yaml: epochs must be int, got 'many'"),
        ("epochs: 1.5", "epochs must be int, got 1.5"),
        ("epochs: true", "epochs must be int, got True"),
        ("lr: fast", "lr must be float, got 'fast'"),
        ("tie_weights: 1", "tie_weights must be bool, got 1"),
        ("data: 7", "data must be str, got 7"),
        ("- 1", "must hold `name: value` lines, got a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_yaml_mistakes_are_named(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"c\.yaml") as error:
        read_yaml(tmp_path / "c.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_yaml(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml"):
        read_yaml(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"word_dropout": 1.0}, r"word_dropout must be in \[0, 1\), got 1.0"),
        ({"lr": float("nan")}, "lr must be positive and finite, got nan"),
        ({"kl_weight": float("nan")}, "kl_weight must be at least 0, got nan"),
        ({"kl_schedule": "sudden"}, "kl_schedule must be one of constant, .*, got 'sudden'"),
        (
            {"tie_weights": True, "embed_dim": 8},
            "tie_weights needs embed_dim equal to hidden_size, got 8 and 256",
        ),
        ({"streaming": True}, "streaming needs a validation file"),
        ({"streaming": True, "valid": "v.txt"}, r"kl_steps must be given for a linear kl_schedule \(--kl-steps\)"),
        (
            {"streaming": True, "valid": "v.txt", "kl_steps": 9, "lr_schedule": "cosine"},
            "lr_schedule 'cosine' needs an epoch of known length, not streaming",
        ),
        ({"kl_weight": math.inf}, "kl_weight must be finite, got inf"),
        ({"kl_schedule": "logistic", "kl_start": 0.1}, "kl_start must be 0 with a logistic kl_schedule, got 0.1"),
        ({"batch_norm": 0.6, "batch_size": 1}, "batch_size must be at least 2 with batch_norm, got 1"),
        ({"out": ""}, r"out must name a folder, got nothing \(--out\)"),
    ],
)
def test_values_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(data="a.txt", **changes)


def test_data_is_required():
    with pytest.raises(ValueError, match="data is missing"):
        TrainConfig.from_mapping({"epochs": 3})


@pytest.mark.parametrize("name", settings_names())
def test_settings_of_the_package_are_whole(name):
    settings = read_yaml(settings_path(name))
    config = config_class(settings.get("model", "sentence_vae")).from_mapping(settings)
    assert config.data == settings["data"]


def test_a_file_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings_path("ptb_lstm_4_epochs").name == "ptb_lstm_4_epochs.yaml"
    (tmp_path / "ptb_lstm_4_epochs").write_text("epochs: 3")
    assert read_yaml(settings_path("ptb_lstm_4_epochs")) == {"epochs": 3}
    for name in ("../configs/ptb_lstm_4_epochs", "ptb_lstm_4_epochs.yaml", ""):
        with pytest.raises(FileNotFoundError, match=r"nor settings of that name: there are .*ptb_lstm_4_epochs"):
            settings_path(name)


def test_a_table_cannot_be_streamed():
    with pytest.raises(ValueError, match=r"streaming is for plain text, one sentence a line, got t\.tsv"):
        TrainConfig(data="t.tsv", valid="v.txt", streaming=True)


def test_seeds_are_bounded():
    assert TrainConfig(data="x", seed=2**32 - 1).seed == 2**32 - 1
    with pytest.raises(ValueError, match=r"seed must be below 2\^32, got 4294967296"):
        TrainConfig(data="x", seed=2**32)
