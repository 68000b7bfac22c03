"""Runs of `MixtureVAE`: training, what is measured, the command."""

import json
import math
import random

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score

from fastvae.cli import main
from fastvae.data import TextCorpus, Vocabulary, collate
from fastvae.data.labeled import LabeledText
from fastvae.models import MixtureVAE
from fastvae.models.mixture_vae import KINDS
from fastvae.training.checkpoint import load_run
from fastvae.training.config import CHOICES, MixtureConfig
from fastvae.training.interpret import draw, interpret, labeled_text, table, write_html
from fastvae.training.metrics_file import read_metrics
from fastvae.training.mixture_metrics import code_information, code_probabilities, evaluate_mixture
from fastvae.training.mixture_module import MixtureVAEModule
from fastvae.training.run import train


@pytest.fixture
def mixture(settings):
    def make(**changes):
        small = settings().to_dict()
        kept = {name: small[name] for name in ("data", "out", "embed_dim", "hidden_size", "batch_size", "epochs", "lr",
                                               "log_every", "accelerator")}  # fmt: skip
        sizes = {"variables": 2, "components": 3, "latent_dim": 2}
        return MixtureConfig(**(kept | sizes | changes))

    return make


def test_kinds_are_the_settings_choices():
    assert CHOICES["kind"] == tuple(KINDS)


@pytest.mark.parametrize("kind", ["dgm_vae", "di_vae", "dcm_vae"])
def test_a_run_trains_evaluates_and_writes(mixture, kind, tmp_path, capsys):
    result = train(mixture(kind=kind, num_samples=2, mutual_information_weight=0.5))
    rows = [row for row in read_metrics(result.folder / "metrics.csv") if "valid/objective" in row]
    assert len(rows) == 2
    last = rows[-1]
    model, _, known = load_run(result.folder)
    assert known["kind"] == kind
    relief = model.beta * last["valid/dispersion"]
    relief += model.mutual_information_weight * last["valid/mutual_information"]
    assert last["valid/objective"] == pytest.approx(last["valid/neg_elbo"] - relief)
    assert result.best == pytest.approx(min(row["valid/objective"] for row in rows))
    assert main(["evaluate", str(result.folder), "--split", "valid"]) == 0
    assert main(["arithmetic", str(result.folder), "anna", "-", "ben", "+", "carol"]) == 0
    assert main(["nearest", str(result.folder), "anna", "-n", "2"]) == 0
    assert main(["map", str(result.folder)]) == 0
    assert (result.folder / "map.png").is_file()
    assert "I(c;x)" in capsys.readouterr().out
    assert (result.folder / "samples.txt").read_text().count("->") == 8


def test_a_resumed_run_is_the_uninterrupted_one(mixture, tmp_path):
    settings = {"word_dropout": 0.3, "kl_steps": 6}
    straight = train(mixture(out=str(tmp_path / "straight"), **settings))
    train(mixture(out=str(tmp_path / "parts"), epochs=1, **settings))
    resumed = train(mixture(out=str(tmp_path / "parts"), **settings), resume=True)
    assert resumed.steps == straight.steps
    ours, theirs = (load_run(run.folder, which="last")[0].state_dict() for run in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_validation_information_is_that_of_all_sentences(mixture, sentences):
    """Sums over batches of like length give I(c;x) of the whole, not the mean of the batches' own."""
    torch.manual_seed(0)
    vocabulary = Vocabulary.build(sentences)
    model = MixtureVAE.of_kind("dgm_vae", len(vocabulary), variables=2, components=3, latent_dim=2,
                               embed_dim=8, hidden_size=8).eval()  # fmt: skip
    with torch.no_grad():
        model.encoder.embedding.weight.mul_(20)
        model.code_head.weight.mul_(20)
    module = MixtureVAEModule(model, mixture())
    corpus = TextCorpus(sentences, vocabulary)
    order = sorted(range(len(corpus)), key=lambda i: corpus.lengths[i])
    sums = module._no_sums()
    for first in range(0, len(order), 16):
        sums += module.losses(collate([corpus[i] for i in order[first : first + 16]]), 1.0, None)[1]
    whole = collate([corpus[i] for i in range(len(corpus))])
    with torch.no_grad():
        output = model(whole.tokens, whole.lengths)
    averages = module.averages(sums)
    assert averages["mutual_information"] == pytest.approx(float(output.mutual_information.sum()), rel=1e-4)
    assert averages["kl"] == pytest.approx(float(output.kl.mean()), rel=1e-4)
    evaluation = evaluate_mixture(model, vocabulary, sentences, batch_size=7)
    assert evaluation.mutual_information == pytest.approx(averages["mutual_information"], rel=1e-4)
    assert evaluation.kl == pytest.approx(averages["kl"], rel=1e-4)
    assert evaluation.code_kl >= evaluation.mutual_information > 0.01
    assert evaluation.tokens == sum(len(sentence.split()) + 1 for sentence in sentences)
    q = code_probabilities(model, vocabulary, sentences, batch_size=9)
    assert float(code_information(q).sum()) == pytest.approx(evaluation.mutual_information)


def test_information_of_certain_codes_is_that_of_scikit_learn():
    codes = torch.randint(3, (50, 2), generator=torch.Generator().manual_seed(0))
    information = code_information(torch.nn.functional.one_hot(codes, 3).double())
    expected = [mutual_info_score(codes[:, m], range(50)) for m in range(2)]
    assert information.tolist() == pytest.approx(expected)
    assert code_information(torch.full((9, 2, 3), 1 / 3)).abs().max() < 1e-6
    assert max(expected) < math.log(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "gmm"}, "kind must be one of ae, vae"),
        ({"free_bits": 0.1}, "free_bits"),
        ({"temperature": 0.0}, "temperature"),
        ({"components": 0}, "components"),
        ({"word_dropout": 1.0}, "word_dropout"),
        ({"tie_weights": True}, "tie_weights"),
        ({"beta": -1.0}, "beta"),
    ],
)
def test_wrong_settings_are_named(mixture, changes, message):
    with pytest.raises(ValueError, match=message):
        mixture(**changes)


def test_interpretation_of_codes_that_are_known(sentences, tmp_path):
    """Where a code is the verb, its sentences, share and labels are those of the verb."""
    vocabulary = Vocabulary.build(sentences)
    verbs = ["likes", "sees", "calls"]
    values = [verbs.index(sentence.split()[1]) for sentence in sentences]

    class Known(MixtureVAE):
        def encode(self, tokens, lengths=None):
            said = [verbs.index(vocabulary.decode(row).split()[1]) for row in tokens]
            logits = 50.0 * torch.nn.functional.one_hot(torch.tensor(said), 3)
            return super().encode(tokens, lengths)._replace(logits=logits.unsqueeze(1).float())

    torch.manual_seed(0)
    model = Known(len(vocabulary), variables=1, components=3, embed_dim=8, hidden_size=8).eval()
    labels = np.array(values)[:, None]
    labels[:3] = -1  # some are unknown
    text = LabeledText(sentences, labels, {"verb": tuple(verbs)})
    found = interpret(model, vocabulary, text, examples=2, title="a < b")
    for code in found.codes:
        assert code.share == pytest.approx(values.count(code.value) / len(values))
        assert code.labels["verb"].tolist() == pytest.approx([float(code.value == verb) for verb in range(3)])
        assert all(verbs[code.value] in sentence for sentence in code.sentences)
        assert len(set(code.sentences)) == len(code.written) == 2
    assert found.information == pytest.approx([mutual_info_score(values, values)])
    assert found.overall["verb"].sum() == pytest.approx(1)
    assert len(table(found).splitlines()) == 5
    picture = draw(found, tmp_path / "codes.png")
    page = write_html(found, picture, tmp_path / "codes.html").read_text()
    assert "a &lt; b" in page
    assert page.count("<tr>") == 4
    assert "data:image/png;base64,iVBOR" in page


def test_command_interpret(mixture, tmp_path, capsys):
    result = train(mixture(epochs=1))
    assert main(["interpret", str(result.folder), "-n", "2"]) == 0
    assert "c2 = 2" in capsys.readouterr().out
    assert (result.folder / "codes.html").is_file()
    assert (result.folder / "codes.png").is_file()
    assert main(["interpolate", str(result.folder), "anna likes jazz", "ben sees rain", "--steps", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["respond", str(result.folder), "anna"]) == 2
    assert "respond is not for runs of mixture_vae" in capsys.readouterr().err
    plain = train(mixture(epochs=1, kind="vae", out=str(tmp_path / "vae")))
    assert main(["interpret", str(plain.folder)]) == 2
    assert "no codes" in capsys.readouterr().err


def test_codes_are_taught_by_labels(tmp_path, capsys):
    """The first code learns the verb of a table of sentences, whatever it would be of itself."""
    draw = random.Random(0)
    rows = [(draw.choice(("likes", "sees", "calls")), draw.choice("abcd"), draw.choice("efgh")) for _ in range(200)]
    lines = [f"{'?' if i % 5 == 0 else verb}\t{who} {whom} {verb}" for i, (verb, who, whom) in enumerate(rows)]
    path = tmp_path / "table.tsv"
    path.write_text("\n".join(["verb\ttext", *lines]) + "\n")
    sizes = {"variables": 2, "components": 3, "latent_dim": 2, "embed_dim": 12, "hidden_size": 16}
    config = MixtureConfig(
        data=str(path), out=str(tmp_path / "run"), kind="dcm_vae", supervision="verb", supervision_weight=5.0,
        batch_size=16, epochs=16, lr=2e-2, accelerator="cpu", **sizes
    )  # fmt: skip
    result = train(config)
    model, vocabulary, _ = load_run(result.folder, which="last")
    text = labeled_text(str(path), "valid")
    codes = code_probabilities(model, vocabulary, text.sentences).argmax(-1)[:, 0].numpy()
    known = text.labels[:, 0] >= 0
    assert (codes == text.labels[:, 0])[known].all()
    with pytest.raises(ValueError, match="supervision: verb has 3 values, and a code of dcm_vae has 2"):
        train(MixtureConfig(**config.to_dict() | {"components": 2, "out": str(tmp_path / "few")}))
    with pytest.raises(ValueError, match="attributes must be of verb, got 'noun'"):
        train(MixtureConfig(**config.to_dict() | {"supervision": "noun", "out": str(tmp_path / "none")}))
    with pytest.raises(ValueError, match="supervision: verb has 3 values, and a code of vae has 1"):
        train(MixtureConfig(**config.to_dict() | {"kind": "vae", "out": str(tmp_path / "vae")}))
    for changes in ({"valid": "other.txt"}, {"valid": "other.txt", "streaming": True}):
        with pytest.raises(ValueError, match="streaming"):
            MixtureConfig(**config.to_dict() | changes)
    assert main(["evaluate", str(result.folder)]) == 0  # sentences, not rows of the table
    figures = json.loads((result.folder / "evaluation_test.json").read_text())
    assert figures["tokens"] == 4 * figures["sentences"]
    assert main(["map", str(result.folder), "--color", "verb"]) == 0
    capsys.readouterr()
    assert main(["nearest", str(result.folder), "a e likes", "-n", "1"]) == 0
    assert "\t" not in capsys.readouterr().out
