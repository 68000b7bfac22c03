"""Runs of `DialogueModel`: training over a run of `MixtureVAE`, what is measured, the commands."""

import csv
import itertools
import json

import pytest
import torch

from fastvae.cli import main
from fastvae.data.dialogues import load_exchanges
from fastvae.training.checkpoint import load_run
from fastvae.training.config import DialogueConfig, MixtureConfig
from fastvae.training.dialogue_metrics import answer, evaluate_dialogue
from fastvae.training.run import train

PLACES = ("cafe", "bank", "park", "garage")
SIZES = {"embed_dim": 24, "hidden_size": 32, "batch_size": 16, "lr": 1e-2, "accelerator": "cpu", "log_every": 5}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A corpus of dialogues, a run of a VAE on its answers and one of a dialogue model over it."""
    root = tmp_path_factory.mktemp("data")
    (root / "smd").mkdir()
    asked = [(f"where is the {place}", f"The {place} is near.") for place in PLACES]
    said = [*asked, ("thanks a lot", "You are so welcome!")] * 40
    with (root / "smd" / "train_pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([(context, answer, "navigate") for context, answer in said])
    dialogues = []
    for pair in said[:8]:
        turns = [
            {"turn": who, "data": {"utterance": text}} for who, text in zip(("driver", "assistant"), pair, strict=True)
        ]
        dialogues.append({"dialogue": turns, "scenario": {"task": {"intent": "navigate"}}})
    for name in ("dev", "test"):
        (root / "smd" / f"kvret_{name}_public.json").write_text(json.dumps(dialogues))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTVAE_DATA", str(root))
        torch.set_num_threads(1)
        codes = {"kind": "dgm_vae", "variables": 2, "components": 3, "latent_dim": 2}
        train(MixtureConfig(data="smd", out=str(root / "vae"), epochs=2, **codes, **SIZES))
        config = DialogueConfig(data="smd", vae=str(root / "vae"), out=str(root / "dialogue"), epochs=20, **SIZES)
        result = train(config)
        yield result, config


def test_a_run_learns_to_answer(runs):
    result, _ = runs
    model, vocabulary, settings = load_run(result.folder)
    assert settings["model"] == "dialogue"
    vae, words, _ = load_run(settings["vae"])
    assert words == vocabulary
    assert all(torch.equal(value, model.vae.state_dict()[name]) for name, value in vae.state_dict().items())
    assert answer(model, vocabulary, ["thanks a lot"], count=1)[0].text == "you are so welcome !"
    figures = evaluate_dialogue(model, vocabulary, load_exchanges("smd", "test"))
    assert figures.bleu > 50
    assert 0 <= figures.obeyed <= 1
    text = (result.folder / "samples.txt").read_text()
    assert text.count("->") >= 8


def test_answers_are_of_the_actions(runs):
    result, _ = runs
    model, vocabulary, _ = load_run(result.folder)
    every = list(itertools.product(range(3), repeat=2))
    each = answer(model, vocabulary, ["where is the bank"], codes=every)
    assert [one.codes for one in each] == every
    assert sum(one.probability for one in each) == pytest.approx(1.0)
    different = answer(model, vocabulary, ["where is the bank"], count=9)
    assert len({one.text for one in different}) == len(different) == len({one.text for one in each})
    for one in different:
        same = [other for other in each if other.text == one.text]
        assert one.probability == pytest.approx(sum(other.probability for other in same), rel=1e-4)
        assert one.codes == max(same, key=lambda other: other.probability).codes
    assert answer(model, vocabulary, ["where is the bank"], count=1) == different[:1]
    with pytest.raises(ValueError, match="codes: expected values"):
        answer(model, vocabulary, ["where"], codes=[(0, 3)])
    with pytest.raises(ValueError, match="context must be utterances"):
        answer(model, vocabulary, [" "])


def test_commands(runs, capsys):
    result, _ = runs
    folder = str(result.folder)
    assert main(["evaluate", folder]) == 0
    assert "obeyed" in capsys.readouterr().out
    assert main(["evaluate", folder, "--iw-samples", "5"]) == 2
    assert "--iw-samples is for runs of models that have that figure" in capsys.readouterr().err
    assert main(["respond", folder, "hello there", "where is the park", "-n", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 1 <= len(lines) <= 3
    assert main(["respond", folder, "where is the park", "--codes", "0-2", "1-1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0-2", "1-1"]
    assert main(["respond", folder, "where", "--codes", "0-5"]) == 2
    assert "codes: expected values in [0, 3)" in capsys.readouterr().err
    assert main(["respond", folder, "where", "--codes", "0"]) == 2
    assert main(["sample", folder]) == 2
    assert "dialogue" in capsys.readouterr().err


def test_what_is_said_is_read_as_the_corpus_has_it(runs, capsys):
    result, _ = runs
    for said in ("where is the park", "Where is the park?"):
        assert main(["respond", str(result.folder), said]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    assert main(["respond", str(result.folder), "?!"]) == 2
    assert "context must be utterances, each with a word" in capsys.readouterr().err


def test_the_context_is_cut_alike_in_training_samples_and_evaluation(runs, tmp_path):
    _, config = runs
    for words in (1, 2, 6):  # of 6 and of 5 tokens, <s> and </s> counted
        settings = {"context_words": words, "epochs": 1, "out": str(tmp_path / str(words))}
        result = train(DialogueConfig(**config.to_dict() | settings))
        assert (result.folder / "samples.txt").read_text().count("->") >= 8
        model, vocabulary, _ = load_run(result.folder)
        assert main(["evaluate", str(result.folder)]) == 0
        found = json.loads((result.folder / "evaluation_test.json").read_text())
        expected = evaluate_dialogue(model, vocabulary, load_exchanges("smd", "test"), context_words=words)
        assert found["policy_nll"] == pytest.approx(expected.policy_nll, rel=1e-6)
        if words == 1:  # every context is </s>
            whole = evaluate_dialogue(model, vocabulary, load_exchanges("smd", "test"))
            assert found["policy_nll"] != pytest.approx(whole.policy_nll, rel=1e-6)


def test_a_resumed_run_goes_on(runs, tmp_path):
    _, config = runs
    settings = config.to_dict() | {"out": str(tmp_path / "part"), "epochs": 1}
    train(DialogueConfig(**settings))
    resumed = train(DialogueConfig(**settings | {"epochs": 2}), resume=True)
    straight = train(DialogueConfig(**settings | {"epochs": 2, "out": str(tmp_path / "straight")}))
    ours, theirs = (load_run(run.folder, which="last")[0].state_dict() for run in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"vae": ""}, "vae is missing"), ({"valid": "x"}, "valid"), ({"context_words": -1}, "context_words")],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DialogueConfig(**({"data": "smd", "vae": "run"} | changes))


def test_the_vae_must_be_one(runs, tmp_path):
    result, config = runs
    with pytest.raises(ValueError, match="vae must be the folder of a run of mixture_vae"):
        train(DialogueConfig(**config.to_dict() | {"vae": str(result.folder), "out": str(tmp_path / "x")}))
