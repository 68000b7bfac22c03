import random

import pytest
import torch

pytest.importorskip("lightning")

from bench import tables, training
from bench.interleave import WrongResultError
from fastvae.data import TextBatch, Vocabulary
from fastvae.models import SentenceVAE

WORDS = [f"w{n}" for n in range(20)]
SMALL = {"embed_dim": 8, "hidden_size": 8, "latent_dim": 3, "batch_size": 5}


def test_the_peer_is_the_same_model_to_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = SentenceVAE(24, embed_dim=8, hidden_size=8, latent_dim=3, dropout=0.5, word_dropout=0.5, tie_weights=True)
    batch = TextBatch(torch.tensor([[2, 7, 8, 9, 3], [2, 5, 3, 0, 0]]), torch.tensor([5, 3]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training.check(model, batch)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    monkeypatch.setattr(training, "_PAD", 5)  # a peer that leaves a word out of its loss
    with pytest.raises(WrongResultError, match="loss is off"):
        training.check(model, batch)


def test_contenders_train_in_turns_and_make_a_table(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(WORDS, k=draw.randint(1, 6))) for _ in range(25)]
    rows = training.measure(tmp_path, sentences, sentences[:3], Vocabulary(WORDS), rounds=2, **SMALL)
    assert [row["contender"] for row in rows] == ["fastvae", "eager", "eager, fused Adam"]
    assert {row["tokens"] for row in rows} == {sum(len(sentence.split()) + 1 for sentence in sentences)}
    assert all(0 < row["lowest"] <= row["tokens_per_second"] <= row["highest"] for row in rows)
    assert rows[0]["ours_faster"] == 1
    assert capsys.readouterr().err == ""
    machine = dict.fromkeys(("cpu", "isa", "threads", "fastvae", "torch", "triton", "python", "date"), "x")
    monkeypatch.setattr(training, "measure", lambda *texts, **settings: rows)
    monkeypatch.setattr(training, "load_text", lambda *split: sentences)
    monkeypatch.setattr(training.machine, "describe", lambda: machine)
    monkeypatch.setattr("sys.argv", ["training", "--batch-sizes", "5", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    assert training.main() == 0
    torch.set_num_threads(threads)
    table = tables.renewed("<!-- speed: begin -->\n<!-- speed: end -->\n", tmp_path).splitlines()
    assert table[1] == "| tokens a second | ours | eager | eager, fused Adam |"
    assert table[3].startswith(
        f"| batch 5 | {rows[0]['tokens_per_second']:,} | {rows[1]['tokens_per_second']:,} (ours "
    )
    assert tables.speed_summary(tmp_path / "absent.csv") == ""
