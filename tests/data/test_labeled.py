import os

import pytest
import torch

from fastvae.data import LabeledCorpus, Vocabulary, collate_labeled, load_labeled, load_text
from fastvae.data.assistant import assistant_utterances

TABLE = "mood\ttense\ttext\n" + "".join(
    f"{'good' if i % 3 else 'bad'}\t{'?' if i % 5 == 0 else ('now', 'then')[i % 2]}\tsentence number {i}\n"
    for i in range(45)
)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.tsv"
    path.write_text(TABLE, encoding="utf-8")
    return path


def test_a_table_in_its_splits(table):
    whole = load_labeled(table, "all")
    assert whole.attributes == {"mood": ("bad", "good"), "tense": ("now", "then")}
    assert whole.sentences == [f"sentence number {i}" for i in range(45)]
    assert whole.labels.tolist() == [[int(i % 3 > 0), -1 if i % 5 == 0 else i % 2] for i in range(45)]
    parts = {split: load_labeled(table, split).sentences for split in ("train", "valid", "test")}
    assert parts["valid"] == ["sentence number 18", "sentence number 38"]
    assert parts["test"] == ["sentence number 19", "sentence number 39"]
    assert sorted(each for part in parts.values() for each in part) == sorted(whole.sentences)
    only = whole.only(["tense"])
    assert only.attributes == {"tense": ("now", "then")}
    assert only.labels[:, 0].tolist() == whole.labels[:, 1].tolist()
    with pytest.raises(ValueError, match="attributes must be of mood, tense, got 'length'"):
        whole.only(["length"])


def test_a_folder_takes_its_values_from_the_training_table(tmp_path, table):
    for split, rows in (("train", TABLE), ("valid", "mood\ttense\ttext\ngood\tthen\tyes\n")):
        (tmp_path / f"{split}.tsv").write_text(rows)
    assert load_labeled(tmp_path, "valid").labels.tolist() == [[1, 1]]
    with pytest.raises(FileNotFoundError, match=r"test\.tsv"):
        load_labeled(tmp_path, "test")
    (tmp_path / "test.tsv").write_text("mood\ttense\ttext\nfine\tthen\tno\n")
    with pytest.raises(ValueError, match=r"test\.tsv, row 2: mood must be one of bad, good, got 'fine'"):
        load_labeled(tmp_path, "test")
    (tmp_path / "test.tsv").write_text("tense\ttext\nthen\tno\n")
    with pytest.raises(ValueError, match="expected the attributes mood, tense, got tense"):
        load_labeled(tmp_path, "test")
    with pytest.raises(ValueError, match="split 'all' is for a single table"):
        load_labeled(tmp_path, "all")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("good\tyes\n", "the last 'text'"),
        ("mood\ttext\n", "then sentences"),
        ("mood\tmood\ttext\na\tb\tc\n", "named twice"),
        ("mood\ttext\ngood\tyes\nno\n", "row 3: expected 2 cells, mood, text; got 'no'"),
        ("mood\ttext\ngood\tyes\n\t\tno\n", "row 3: expected 2 cells"),
        ("mood\ttext\ngood\tyes\n", "attribute 'mood' needs at least 2 values, got good"),
    ],
)
def test_damaged_tables_are_told(tmp_path, text, message):
    path = tmp_path / "table.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_labeled(path, "all")


def test_too_few_sentences_and_missing_files(tmp_path, table):
    with pytest.raises(ValueError, match="split must be one of"):
        load_labeled(table, "dev")
    with pytest.raises(FileNotFoundError, match="not one of the names assistant, dailydialog, smd, sst2"):
        load_labeled(tmp_path / "nowhere.tsv")
    table.write_text("mood\ttext\ngood\tyes\nbad\tno\n")
    with pytest.raises(ValueError, match="2 sentences are too few"):
        load_labeled(table, "valid")


def test_the_embedded_corpus_has_the_attributes_of_its_grammar():
    text = load_labeled("assistant", "valid")
    for row, utterance in enumerate(assistant_utterances("valid")):
        sentiment, intent = text.labels[row]
        assert text.sentences[row] == utterance.text
        assert text.attributes["sentiment"][sentiment] == utterance.sentiment
        assert text.attributes["intent"][intent] == utterance.intent


def test_long_sentences_are_left_out(table):
    text = load_labeled("assistant", "valid")
    short = text.up_to(6)
    kept = [row for row, sentence in enumerate(text.sentences) if len(sentence.split()) <= 6]
    assert short.sentences == [text.sentences[row] for row in kept]
    assert short.labels.tolist() == text.labels[kept].tolist()
    with pytest.raises(ValueError, match="no sentence has at most 0 words"):
        text.up_to(0)


def test_batches_keep_sentences_and_attributes_together(table):
    text = load_labeled(table, "all")
    vocabulary = Vocabulary.build(text.sentences)
    corpus = LabeledCorpus(text, vocabulary)
    batch = collate_labeled([corpus[i] for i in (7, 2)])
    assert [vocabulary.decode(row) for row in batch.tokens] == ["sentence number 7", "sentence number 2"]
    assert batch.attributes.tolist() == text.labels[[7, 2]].tolist()
    assert batch.lengths.tolist() == corpus.lengths[[7, 2]].tolist()
    assert torch.equal(batch.to("cpu").attributes, batch.attributes)


def test_sst2_files(tmp_path, monkeypatch):
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "stsa.binary.dev").write_text("0 a dull film .\n1 a fine film .\n")
    monkeypatch.setenv("FASTVAE_DATA", str(tmp_path))
    text = load_labeled("sst2", "valid")
    assert text.sentences == load_text("sst2", "valid") == ["a dull film .", "a fine film ."]
    assert text.labels.tolist() == [[0], [1]]
    assert text.attributes == {"sentiment": ("negative", "positive")}
    (tmp_path / "sst2" / "stsa.binary.dev").write_text("0 a dull film .\na fine film .\n")
    with pytest.raises(ValueError, match="sentence 2: expected 0 or 1, then words, got 'a fine film"):
        load_labeled("sst2", "valid")
    monkeypatch.delenv("FASTVAE_DATA")
    with pytest.raises(FileNotFoundError, match="FASTVAE_DATA"):
        load_labeled("sst2")


@pytest.mark.skipif("FASTVAE_DATA" not in os.environ, reason="FASTVAE_DATA is not set")
def test_sst2_as_published():
    sizes = {split: load_labeled("sst2", split) for split in ("train", "valid", "test")}
    assert [len(text.sentences) for text in sizes.values()] == [6920, 872, 1821]
    assert [int(text.labels.sum()) for text in sizes.values()] == [3610, 444, 909]
