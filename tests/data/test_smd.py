import json
import os
from pathlib import Path

import pytest

from fastvae.data import load_text
from fastvae.data.dialogues import Exchange, ExchangeCorpus, collate_exchanges, encode_context, load_exchanges
from fastvae.data.smd import smd_exchanges
from fastvae.data.vocabulary import Vocabulary


def turn(who, text):
    return {"turn": who, "data": {"end_dialogue": False, "utterance": text}}


DIALOGUES = [
    {
        "dialogue": [
            turn("driver", "What's the weather, please?"),
            turn("assistant", "It's 7:30pm; it rains. "),
            turn("driver", ""),
            turn("assistant", "Bye!"),
        ],
        "scenario": {"task": {"intent": "weather"}},
    }
]
TABLE = 'where is it <eou> over there <eou> thanks,"You\'re welcome, Sir!",navigate\n'


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "kvret_dev_public.json").write_text(json.dumps(DIALOGUES), encoding="utf-8")
    (tmp_path / "train_pairs.csv").write_text(TABLE, encoding="utf-8")
    return tmp_path


def test_table_and_dialogues_take_one_form(folder):
    assert smd_exchanges(folder, "train") == [
        Exchange(("where is it", "over there", "thanks"), "you're welcome , sir !", "navigate")
    ]
    said = ("what's the weather please", "it's 7:30pm it rains")
    assert smd_exchanges(folder, "valid") == [
        Exchange(said[:1], "it's 7:30pm ; it rains .", "weather"),
        Exchange(said, "bye !", "weather"),
    ]


def test_they_are_known_by_name(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVAE_DATA", str(tmp_path.parent))
    folder.rename(tmp_path.parent / "smd")
    assert load_text("smd", "train") == ["thanks", "you're welcome , sir !"]
    assert load_exchanges("smd", "valid")[1].response == "bye !"
    with pytest.raises(FileNotFoundError, match="kvret_test_public"):
        load_exchanges("smd", "test")
    with pytest.raises(ValueError, match="expected a corpus of dialogues, dailydialog or smd, got 'ptb'"):
        load_exchanges("ptb")
    with pytest.raises(ValueError, match="split must be one of"):
        load_exchanges("smd", "all")


@pytest.mark.parametrize("content", ["{", "[1]", '[{"dialogue": [{"turn": "driver"}]}]'])
def test_a_damaged_file_is_named(folder, content):
    (folder / "kvret_dev_public.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"kvret_dev_public\.json: expected a list of dialogues"):
        smd_exchanges(folder, "valid")


def test_a_damaged_table_is_named(folder):
    (folder / "train_pairs.csv").write_text(TABLE + "a,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train_pairs\.csv, row 2: expected context, response"):
        smd_exchanges(folder, "train")


def test_exchanges_become_batches():
    exchanges = [Exchange(("a b", "c"), "d", "x"), Exchange(("b",), "a b c", "x")]
    vocabulary = Vocabulary.build(["a b c d"])
    corpus = ExchangeCorpus(exchanges, vocabulary, max_length=4)
    batch = collate_exchanges(list(corpus))
    assert batch.lengths.tolist() == [3, 4]
    assert batch.context_lengths.tolist() == [7, 3]
    assert vocabulary.decode(batch.tokens[1]) == "a b"
    assert batch.context[0].tolist() == vocabulary.encode("a b") + vocabulary.encode("c")
    assert encode_context(vocabulary, ("a b", "c"), 3).tolist() == vocabulary.encode("c")


@pytest.mark.skipif("FASTVAE_DATA" not in os.environ, reason="needs FASTVAE_DATA")
def test_the_published_files():
    if not (Path(os.environ["FASTVAE_DATA"]) / "smd").is_dir():
        pytest.skip("smd is missing")
    sizes = {split: len(load_exchanges("smd", split)) for split in ("train", "valid", "test")}
    assert sizes == {"train": 6294, "valid": 776, "test": 807}
    assert load_exchanges("smd", "test")[0] == Exchange(
        ("remind me to take my pills",), "what time do you need to take your pills ?", "schedule"
    )
