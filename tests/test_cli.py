import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastvae import cli
from fastvae.cli import main
from fastvae.data import Vocabulary
from fastvae.models import ControlledTextVAE, SentenceVAE

SIZES = [
    "--embed-dim",
    "8",
    "--hidden-size",
    "10",
    "--latent-dim",
    "3",
    "--batch-size",
    "8",
    "--accelerator",
    "cpu",
]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"play song {'again ' * (n % 3)}{'now' if n % 2 else 'later'}" for n in range(60)))
    return path


@pytest.fixture
def run_folder(tmp_path, text_file):
    """A run's folder with an untrained model, made without the packages of training."""
    torch.manual_seed(0)
    model = SentenceVAE(9, embed_dim=4, hidden_size=5, latent_dim=3)
    with torch.no_grad():
        model.decoder.output.weight.mul_(8)  # of different opinions on different z
    return saved_run(tmp_path / "run", model, {"data": str(text_file)})


@pytest.fixture
def controlled_folder(tmp_path):
    """The folder of a run of controlled_vae that writes "now" for good sentences and "later" for bad ones."""
    torch.manual_seed(0)
    attributes = {"mood": ["bad", "good"], "tense": ["past", "present"]}
    model = ControlledTextVAE(9, attributes, embed_dim=4, hidden_size=5, latent_dim=3, max_length=3)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
        model.decoder.output.bias[8] = 50
        model.decoder.weight_ih[10:15, 4 + 3 + 1] = 9  # the cell's new content, where the mood is good
        model.decoder.output.weight[7] = 999
    return saved_run(tmp_path / "controlled", model, {"data": "reviews.tsv", "model": "controlled_vae"})


def saved_run(folder, model, settings):
    (folder / "checkpoints").mkdir(parents=True)
    Vocabulary(["play", "song", "again", "now", "later"]).save(folder / "vocabulary.txt")
    checkpoint = {
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "model_config": model.config,
        "train_config": settings,
    }
    torch.save(checkpoint, folder / "checkpoints" / "best.ckpt")
    return folder


def fails(capsys, *argv):
    """Run a command that must fail as a mistake of the user's, and return its one line."""
    try:
        code = main(argv)
    except SystemExit as stop:  # argparse
        code = stop.code
    shown = capsys.readouterr()
    assert code == 2
    assert shown.out == ""
    line = shown.err.removesuffix("\n")
    assert "\n" not in line, line
    assert line.startswith("fastvae: error: ")
    return line


COMMANDS = [
    "demo",
    "train",
    "evaluate",
    "sample",
    "reconstruct",
    "transfer",
    "interpolate",
    "export",
    "dictionary",
    "info",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--traceback" in text
    if command != "info":
        assert f"examples:\n  fastvae {command}" in text


def test_every_setting_has_a_flag_with_its_default():
    settings = [name for group in cli._SETTINGS.values() for name in group]
    known = {name for config in cli.CONFIGS.values() for name in config.__dataclass_fields__}
    assert sorted(settings) == sorted(known)


def test_info_names_versions_and_backends(capsys):
    from fastvae.ops import backend

    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    for row in backend.describe():
        assert row.op in text
        assert row.reason in text


def test_info_needs_torch_and_numpy_only():
    program = (
        "import sys\n"
        "for name in ('lightning', 'rich', 'yaml', 'matplotlib', 'tensorboard'): sys.modules[name] = None\n"
        "from fastvae.cli import main\n"
        "sys.exit(main(['info']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "instruction set" in done.stdout


def test_missing_packages_are_named_with_the_remedy(monkeypatch, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 1")
    monkeypatch.setitem(sys.modules, "yaml", None)
    line = fails(capsys, "train", "--config", str(tmp_path / "c.yaml"))
    assert line.endswith("this command needs pyyaml, which is not installed: pip install 'fastvae[train]'")


def test_mistakes_of_the_command_line(capsys):
    assert "did you mean --hidden-size?" in fails(capsys, "train", "--data", "x", "--hiden-size", "3")
    assert "invalid int value: 'many'" in fails(capsys, "train", "--data", "x", "--epochs", "many")
    assert "invalid choice: 'trian'" in fails(capsys, "trian")
    assert "data is missing" in fails(capsys, "train")
    assert "epochs must be at least 1, got 0" in fails(capsys, "train", "--data", "x", "--epochs", "0")


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_seeds_have_a_range(capsys, run_folder, command):
    for seed in ("-1", str(2**64)):
        assert "--seed: expected at least 0 and below 2^32" in fails(capsys, command, str(run_folder), "--seed", seed)


def test_what_cannot_be_written_or_used_is_told_before_the_work(capsys, run_folder, tmp_path, text_file, monkeypatch):
    run, out = str(run_folder), str(tmp_path / "absent" / "x.png")
    monkeypatch.setattr("fastvae.training.checkpoint.load_run", None)  # what begins the work
    for command in ("evaluate", "map"):
        assert f"--out {out}: there is no folder" in fails(capsys, command, run, "--out", out)
    assert "--out must end with .png, got 'map.txt'" in fails(capsys, "map", run, "--out", "map.txt")
    assert "--device 'meta' cannot be used here" in fails(capsys, "sample", run, "--device", "meta")
    assert "--seed: expected a whole number, got 'abc'" in fails(capsys, "sample", run, "--seed", "abc")
    assert "out must name a folder" in fails(capsys, "train", "--data", str(text_file), "--out", "")


def test_export_of_another_decoder_is_refused_and_leaves_nothing(tmp_path, text_file, capsys):
    model = SentenceVAE(9, embed_dim=4, hidden_size=5, latent_dim=3, decoder="gru")
    folder = saved_run(tmp_path / "gru", model, {"data": str(text_file), "decoder": "gru"})
    pytest.importorskip("onnxscript")
    before = sorted(folder.rglob("*"))
    assert f"export is for LSTM decoders, and that of {folder} is gru" in fails(capsys, "export", str(folder))
    assert sorted(folder.rglob("*")) == before


def test_mistakes_of_a_settings_file(capsys, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("data: x\nlatent_dims: 3\n")
    assert "unknown setting 'latent_dims'; did you mean 'latent_dim'?" in fails(capsys, "train", "--config", str(path))
    absent = fails(capsys, "train", "--config", "absent")
    assert "no settings file at absent, nor settings of that name: there are " in absent
    assert "ptb_lstm_4_epochs" in absent


def test_settings_by_name(capsys, monkeypatch, tmp_path):
    pytest.importorskip("yaml")
    run = pytest.importorskip("fastvae.training.run")
    seen = []
    monkeypatch.setattr(run, "train", lambda config, **options: seen.append(config) or exit(0))
    with pytest.raises(SystemExit):
        main(["train", "--config", "ptb_lstm_4_epochs", "--epochs", "1"])
    assert (seen[0].data, seen[0].epochs, seen[0].kl_steps) == ("ptb", 1, 1300)
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "ptb_lstm_4_epochs" in capsys.readouterr().out
    (tmp_path / "iwae.yaml").write_text("model: iwae\n")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(tmp_path / "iwae.yaml"), "--help"])
    assert "--num-samples INT" in capsys.readouterr().out  # help is of the file's model


def test_missing_files_and_runs(capsys, tmp_path, run_folder):
    pytest.importorskip("lightning")
    assert "nowhere.txt" in fails(
        capsys, "train", "--data", str(tmp_path / "nowhere.txt"), "--out", str(tmp_path / "o")
    )
    assert "no run at" in fails(capsys, "sample", str(tmp_path / "absent"))
    assert "--checkpoint best" in fails(capsys, "sample", str(run_folder), "--checkpoint", "last")
    (run_folder / "checkpoints" / "best.ckpt").write_bytes(b"junk")
    assert "best.ckpt is corrupt" in fails(capsys, "evaluate", str(run_folder))
    assert "--device 'gpu7' cannot be used here" in fails(capsys, "sample", str(run_folder), "--device", "gpu7")


def test_traceback_on_request(capsys, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        main(["sample", str(tmp_path / "absent"), "--traceback"])
    monkeypatch.setenv("FASTVAE_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["sample", str(tmp_path / "absent")])


def test_faults_of_the_program_are_not_hidden(monkeypatch, run_folder):
    def fault(*arguments, **options):
        raise TypeError("a bug")

    monkeypatch.setattr("fastvae.training.text.sample_sentences", fault)
    with pytest.raises(TypeError, match="a bug"):
        main(["sample", str(run_folder)])


def test_ctrl_c_has_the_exit_code_of_shells(monkeypatch, run_folder, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastvae.training.text.sample_sentences", interrupt)
    assert main(["sample", str(run_folder)]) == 130
    assert capsys.readouterr().err == "fastvae: interrupted\n"


def test_sample(run_folder, capsys):
    assert main(["sample", str(run_folder), "-n", "5", "--max-length", "6"]) == 0
    first = capsys.readouterr().out
    assert len(first.splitlines()) == 5
    assert set(first.split()) <= {"play", "song", "again", "now", "later", "<unk>"}
    main(["sample", str(run_folder), "-n", "5", "--max-length", "6"])
    assert capsys.readouterr().out == first
    main(["sample", str(run_folder), "-n", "5", "--max-length", "6", "--seed", "1"])
    assert capsys.readouterr().out != first


def test_sample_and_transfer_with_attributes(controlled_folder, run_folder, capsys, monkeypatch):
    folder = str(controlled_folder)
    for mood, word in (("good", "now"), ("bad", "later")):
        chosen = ["--attribute", f"mood={mood}", "--attribute", "tense=past", "--max-length", "4"]
        assert main(["sample", folder, "-n", "3", *chosen, "--strategy", "greedy"]) == 0
        assert capsys.readouterr().out == f"{' '.join([word] * 4)}\n" * 3
        assert main(["transfer", folder, "play song", "again", *chosen]) == 0
        assert capsys.readouterr().out == f"{' '.join([word] * 4)}\n" * 2
    monkeypatch.setattr("sys.stdin", io.StringIO("play song\n"))
    assert main(["transfer", folder, "--attribute", "mood=good", "--max-length", "1"]) == 0
    assert capsys.readouterr().out == "now\n"
    assert main(["sample", folder, "-n", "20", "--max-length", "1"]) == 0
    assert {"now", "later"} <= set(capsys.readouterr().out.split())  # others are drawn


def test_mistakes_about_attributes(controlled_folder, run_folder, capsys):
    folder = str(controlled_folder)
    assert "must be NAME=VALUE, each name once, got 'good'" in fails(capsys, "sample", folder, "--attribute", "good")
    twice = ["--attribute", "mood=good", "--attribute", "mood=bad"]
    assert "each name once, got 'mood=bad'" in fails(capsys, "sample", folder, *twice)
    assert "mood: expected one of bad, good, got 'fine'" in fails(
        capsys, "transfer", folder, "play", "--attribute", "mood=fine"
    )
    assert "required: --attribute" in fails(capsys, "transfer", folder, "play")
    assert "--attribute is for runs of controlled_vae" in fails(
        capsys, "sample", str(run_folder), "--attribute", "mood=good"
    )
    assert "transfer is for runs of controlled_vae" in fails(
        capsys, "transfer", str(run_folder), "play", "--attribute", "mood=good"
    )
    assert "interpolate is not for runs of controlled_vae" in fails(capsys, "interpolate", folder, "play", "song")


@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam"])
def test_reconstruct_from_arguments_and_from_standard_input(run_folder, capsys, monkeypatch, strategy):
    options = ["--max-length", "5", "--strategy", strategy]
    assert main(["reconstruct", str(run_folder), "play song now", "again", *options]) == 0
    from_arguments = capsys.readouterr().out
    assert len(from_arguments.splitlines()) == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("play song now\n\n  again\n"))
    assert main(["reconstruct", str(run_folder), *options]) == 0
    assert capsys.readouterr().out == from_arguments
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert "no sentence" in fails(capsys, "reconstruct", str(run_folder))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    assert "standard input is not UTF-8 text: byte 0xe9" in fails(capsys, "reconstruct", str(run_folder))


def test_interpolate_begins_and_ends_at_the_reconstructions(run_folder, capsys):
    ends = ["play song now", "again again again"]
    main(["reconstruct", str(run_folder), *ends, "--max-length", "5"])
    reconstructions = capsys.readouterr().out.splitlines()
    assert main(["interpolate", str(run_folder), *ends, "--steps", "4", "--max-length", "5"]) == 0
    between = capsys.readouterr().out.splitlines()
    assert len(between) == 4
    assert [between[0], between[-1]] == reconstructions
    assert "steps" in fails(capsys, "interpolate", str(run_folder), *ends, "--steps", "1")


def test_arithmetic_nearest_and_map(run_folder, text_file, tmp_path, capsys):
    run = str(run_folder)
    assert main(["reconstruct", run, "play song later"]) == 0
    assert main(["arithmetic", run, "play song", "-", "play song", "+", "play song later"]) == 0
    again, written = capsys.readouterr().out.splitlines()
    assert written == again
    for terms in (["play", "song", "now"], ["play", "+"], ["+", "play", "song"]):
        assert "expected SENTENCE + SENTENCE" in fails(capsys, "arithmetic", run, *terms)

    assert main(["nearest", run, "play song now", "-n", "2"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["0.0000", "play", "song", "now"]
    assert float(second.split()[0]) > 0

    pytest.importorskip("matplotlib")
    assert main(["map", run, "--split", "train"]) == 0
    assert "written to" in capsys.readouterr().out
    assert (run_folder / "map.png").read_bytes().startswith(b"\x89PNG")
    labels, out = tmp_path / "labels.txt", tmp_path / "own.png"
    labels.write_text("a\nb\nc\n" * 20)
    options = ["--data", str(text_file), "--color", str(labels), "--method", "tsne", "-n", "30", "--out", str(out)]
    assert main(["map", run, *options]) == 0
    assert str(out) in capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "no labels 'mood'" in fails(capsys, "map", run, "--color", "mood")
    assert "--count must be at least 2, got 1" in fails(capsys, "map", run, "-n", "1")


def test_export_writes_models_and_their_words(run_folder, capsys, monkeypatch):
    pytest.importorskip("onnxscript")
    assert main(["export", str(run_folder)]) == 0
    folder = run_folder / "onnx"
    assert sorted(path.name for path in folder.iterdir()) == ["start.onnx", "step.onnx", "vocabulary.txt"]
    assert (folder / "vocabulary.txt").read_text() == (run_folder / "vocabulary.txt").read_text()
    shown = capsys.readouterr()
    assert all(str(path) in shown.out for path in folder.iterdir())
    assert shown.err == ""
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "needs onnxscript, which is not installed: pip install 'fastvae[export]'" in fails(
        capsys, "export", str(run_folder), "--out", str(run_folder / "other")
    )


def test_evaluate_prints_and_writes_json(run_folder, capsys, tmp_path, text_file):
    assert main(["evaluate", str(run_folder), "--iw-samples", "4"]) == 0
    shown = capsys.readouterr().out
    written = json.loads((run_folder / "evaluation_test.json").read_text())
    assert written["split"] == "test"
    assert written["sentences"] == 3  # each 20th of 60
    assert f"{written['neg_elbo']:.4f}" in shown
    assert f"{written['iw_nll']:.4f}" in shown
    out = tmp_path / "other.json"
    assert main(["evaluate", str(run_folder), "--data", str(text_file), "--iw-samples", "0", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert (written["split"], written["sentences"], written["iw_nll"]) == ("all", 60, None)
    assert "IW-NLL" not in capsys.readouterr().out.splitlines()[5]


def test_what_a_run_was_trained_on_is_not_measured_as_a_test(tmp_path, text_file, capsys):
    """With a validation text of its own a run is trained on the whole file."""
    pytest.importorskip("lightning")
    valid, out = tmp_path / "valid.txt", tmp_path / "trained"
    valid.write_text("play song later\nplay song now\n" * 5)
    files = ["--data", str(text_file), "--valid", str(valid)]
    assert main(["train", *files, "--epochs", "1", "--out", str(out), *SIZES]) == 0
    for arguments in ([], ["--split", "valid"]):
        assert main(["evaluate", str(out), *arguments, "--iw-samples", "0", "--samples", "0"]) == 0
        written = json.loads((out / "evaluation_all.json").read_text())
        assert (written["data"], written["sentences"]) == (str(valid), 10)
    assert main(["evaluate", str(out), "--split", "train", "--iw-samples", "0", "--samples", "0"]) == 0
    assert json.loads((out / "evaluation_all.json").read_text())["sentences"] == 60
    capsys.readouterr()
    assert "the run was trained on the whole of" in fails(capsys, "evaluate", str(out), "--split", "test")
    assert main(["map", str(out)]) == 0
    assert main(["nearest", str(out), "play song now", "-n", "60"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 6


def test_a_plain_auto_encoder_is_measured_without_weights(tmp_path, text_file, capsys):
    pytest.importorskip("lightning")
    out = tmp_path / "plain"
    plain = ["--regularizer", "none", "--epochs", "1", "--out", str(out)]
    assert main(["train", "--data", str(text_file), *plain, *SIZES]) == 0
    assert main(["evaluate", str(out)]) == 0
    assert "IW-NLL" not in capsys.readouterr().out
    assert "regularizer 'none' has no posterior density" in fails(capsys, "evaluate", str(out), "--iw-samples", "5")


def test_train_takes_a_file_then_flags_and_resumes(tmp_path, text_file, capsys):
    pytest.importorskip("lightning")
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"data: {text_file}\nepochs: 7\nlr: 1e-2\nword_dropout: 0.1\n")
    out = tmp_path / "trained"
    assert main(["train", "--config", str(settings), "--epochs", "1", "--out", str(out), *SIZES]) == 0
    assert "best validation -ELBO" in capsys.readouterr().out
    from fastvae.training.config import read_yaml

    kept = read_yaml(out / "config.yaml")
    assert (kept["epochs"], kept["lr"], kept["hidden_size"]) == (1, 0.01, 10)
    assert "already holds a run" in fails_last_line(capsys, "train", "--data", str(text_file), "--out", str(out))
    assert main(["train", "--out", str(out), "--resume", "--epochs", "2"]) == 0
    assert read_yaml(out / "config.yaml")["epochs"] == 2
    capsys.readouterr()
    assert "lr cannot change" in fails_last_line(
        capsys, "train", "--out", str(out), "--resume", "--lr", "1", "--epochs", "3"
    )
    for command in (["sample", str(out), "-n", "2"], ["evaluate", str(out), "--split", "valid"]):
        assert main(command) == 0


def fails_last_line(capsys, *argv):
    assert main(argv) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_demo_shows_what_it_promises(tmp_path, capsys):
    for package in ("lightning", "rich", "matplotlib", "yaml"):
        pytest.importorskip(package)
    out = tmp_path / "demo"
    assert main(["demo", "--quick", "--seconds", "3", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for word in (
        "entropy",
        "true model",
        "-ELBO",
        "KL",
        "active units",
        "Held-out",
        "From one",
        "New sentences",
    ):
        assert word in text, word
    assert str(out / "curves.png") in text.replace("\n", "")
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((out / "evaluation_test.json").read_text())["neg_elbo"] > 16


def test_dictionary_writes_what_it_promises(tmp_path, capsys):
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    data, out = tmp_path / "patches.npy", tmp_path / "dictionary"
    np.save(data, np.random.default_rng(0).random((300, 9)))
    command = ["dictionary", str(data), "--atoms", "12", "--epochs", "2", "--batch-size", "50", "--out", str(out)]
    assert main(command) == 0
    text = capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert f"{metrics['objective']:.4f}" in text
    for name in ("components.npy", "atoms.png", "objective.png", "sparsity.png"):
        assert f"{out}/{name}" in text
        assert (out / name).is_file()
    assert "already holds a dictionary" in fails(capsys, *command)
    assert main([*command, "--overwrite"]) == 0


def test_dictionary_interrupted_says_so(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    from fastvae.estimators import MiniBatchDictionaryLearning

    learn = MiniBatchDictionaryLearning._learn

    def interrupted(self, learner, *arguments):
        if learner.steps == 3:
            raise KeyboardInterrupt
        return learn(self, learner, *arguments)

    monkeypatch.setattr(MiniBatchDictionaryLearning, "_learn", interrupted)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((300, 9)))
    command = [
        "dictionary",
        str(tmp_path / "x.npy"),
        "--atoms",
        "5",
        "--batch-size",
        "50",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(command) == 130
    assert "stopped before the end" in capsys.readouterr().out
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["batches"] == 3
    assert np.load(tmp_path / "o" / "components.npy").shape == (5, 9)


def test_mistakes_of_dictionary(capsys, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    assert "--atoms must be at least 1, got 0" in fails(capsys, "dictionary", "x.npy", "--atoms", "0")
    assert "--l1 must be above 0, got 0.0" in fails(capsys, "dictionary", "x.npy", "--l1", "0")
    assert "no file at nowhere.npy" in fails(capsys, "dictionary", "nowhere.npy")
    assert "did you mean --patch-size?" in fails(capsys, "dictionary", "--patchsize", "8")
    (tmp_path / "x.npy").write_text("junk")
    assert "is no array of numbers" in fails(capsys, "dictionary", str(tmp_path / "x.npy"))
    assert "expected a .npy file, an image or a folder" in fails(capsys, "dictionary", str(tmp_path))
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "fastvae.estimators", raising=False)
    monkeypatch.delitem(sys.modules, "fastvae.training.dictionary", raising=False)
    line = fails(capsys, "dictionary")
    assert line.endswith("this command needs scikit-learn, which is not installed: pip install 'fastvae[estimators]'")
