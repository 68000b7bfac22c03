import os
import tracemalloc

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastvae.data import StreamingTextCorpus, TextCorpus, Vocabulary, load_text, read_sentences

SENTENCES = [f"word{i % 7} says {'very ' * (i % 5)}little {i}" for i in range(61)]


@pytest.fixture
def vocabulary():
    return Vocabulary.build(SENTENCES)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n  ".join(SENTENCES) + "\n \n", encoding="utf-8")
    return path


def rows(sentences):
    return [sentence.tolist() for sentence in sentences]


def test_a_corpus_holds_the_sentences_in_order(path, vocabulary):
    corpus = TextCorpus(path, vocabulary)
    assert len(corpus) == len(SENTENCES)
    assert rows(corpus[i] for i in range(len(corpus))) == [vocabulary.encode(text) for text in SENTENCES]
    assert corpus[3].dtype == torch.int64
    assert corpus[-1].tolist() == corpus[60].tolist()
    np.testing.assert_array_equal(corpus.lengths, [len(text.split()) + 2 for text in SENTENCES])
    for index in (61, -62):
        with pytest.raises(IndexError, match="out of range for a corpus of 61"):
            corpus[index]


def test_a_list_and_a_file_of_the_same_sentences_agree(path, vocabulary):
    from_list = TextCorpus([*SENTENCES, "", "  "], vocabulary)
    from_file = TextCorpus(str(path), vocabulary)
    assert rows(from_list[i] for i in range(61)) == rows(from_file[i] for i in range(61))
    assert rows([TextCorpus(iter(["word1"]), vocabulary)[0]]) == [vocabulary.encode("word1")]


def test_a_corpus_takes_four_bytes_a_token(vocabulary):
    text = [SENTENCES[0]] * 20_000
    tracemalloc.start()
    corpus = TextCorpus(text, vocabulary)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tokens, sentences = int(corpus.lengths.sum()), len(corpus)
    assert kept < 1.25 * (4 * tokens + 16 * sentences)


def test_items_are_copies(vocabulary):
    corpus = TextCorpus(SENTENCES, vocabulary)
    corpus[0].zero_()
    assert corpus[0].tolist() == vocabulary.encode(SENTENCES[0])


def test_long_sentences_are_cut_and_still_end(vocabulary):
    corpus = TextCorpus(SENTENCES, vocabulary, max_length=5)
    assert corpus.lengths.max() == 5
    assert corpus[4].tolist() == [*vocabulary.encode(SENTENCES[4])[:4], vocabulary.eos_index]
    assert TextCorpus(["word1 says"], vocabulary, max_length=4)[0].tolist() == vocabulary.encode("word1 says")
    with pytest.raises(ValueError, match="at least 3; got 2"):
        TextCorpus(SENTENCES, vocabulary, max_length=2)


def test_windows_lines_and_byte_order_mark(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfone two\r\n\r\nthree\r\n")
    assert list(read_sentences(path)) == ["one two", "three"]


@pytest.mark.parametrize("content", [b"", b"\n  \n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(content, tmp_path, vocabulary):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no sentences, the file is empty or blank") as caught:
        TextCorpus(path, vocabulary)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="no sentence"):
        TextCorpus([" "], vocabulary)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("first\n\ncafé\n".encode("latin-1"), "line 3: byte 0xe9 at position 3 is not UTF-8 text"),
        ("first\n".encode("utf-16"), "line 1: byte 0xff"),
        ("first\nsecond\n".encode("utf-16-le"), "line 1: NUL character"),
    ],
)
def test_a_wrong_encoding_is_told_with_its_line(content, message, tmp_path, vocabulary):
    path = tmp_path / "latin.txt"
    path.write_bytes(content)
    for read in (lambda: TextCorpus(path, vocabulary), lambda: list(StreamingTextCorpus(path, vocabulary))):
        with pytest.raises(UnicodeError, match=message) as caught:
            read()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_missing_path_is_told_at_once(tmp_path, vocabulary):
    for build in (TextCorpus, StreamingTextCorpus):
        with pytest.raises(FileNotFoundError, match="no such text file"):
            build(tmp_path / "missing.txt", vocabulary)
        with pytest.raises(FileNotFoundError, match="is a folder"):
            build(tmp_path, vocabulary)


def test_streaming_gives_what_the_corpus_holds(path, vocabulary):
    corpus = TextCorpus(path, vocabulary, max_length=7)
    streamed = StreamingTextCorpus(path, vocabulary, max_length=7)
    expected = rows(corpus[i] for i in range(len(corpus)))
    assert rows(streamed) == expected
    assert rows(streamed) == expected  # once more from the start


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_a_stream_equally(path, vocabulary, world_size):
    shares = [
        rows(StreamingTextCorpus(path, vocabulary, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert {len(share) for share in shares} == {61 // world_size}
    interleaved = [sentence for group in zip(*shares, strict=True) for sentence in group]
    assert interleaved == [vocabulary.encode(text) for text in SENTENCES[: 61 // world_size * world_size]]


def test_workers_share_a_stream(path, vocabulary):
    streamed = StreamingTextCorpus(path, vocabulary, rank=1, world_size=2)
    loader = DataLoader(streamed, batch_size=None, num_workers=2)
    assert sorted(rows(loader)) == sorted(rows(streamed))


def test_the_rank_is_that_of_torch_distributed(path, vocabulary, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    streamed = StreamingTextCorpus(path, vocabulary)
    monkeypatch.undo()
    assert rows(streamed) == rows(StreamingTextCorpus(path, vocabulary, rank=2, world_size=3))


def test_rank_and_world_size_are_checked(path, vocabulary):
    with pytest.raises(ValueError, match="go together"):
        StreamingTextCorpus(path, vocabulary, rank=1)
    with pytest.raises(ValueError, match="rank=2, world_size=2"):
        StreamingTextCorpus(path, vocabulary, rank=2, world_size=2)


def test_a_stream_holds_no_more_than_a_line(tmp_path, vocabulary):
    path = tmp_path / "large.txt"
    path.write_text("\n".join(SENTENCES * 200), encoding="utf-8")
    streamed = StreamingTextCorpus(path, vocabulary)
    iterator = iter(streamed)
    next(iterator)
    tracemalloc.start()
    count = 1 + sum(1 for _ in iterator)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 61 * 200
    assert peak < 0.1 * path.stat().st_size


def test_load_text_of_one_file_holds_out_a_tenth(path):
    splits = {split: load_text(path, split) for split in ("train", "valid", "test", "all")}
    assert splits["all"] == SENTENCES
    assert splits["valid"] == SENTENCES[18::20]
    assert splits["test"] == SENTENCES[19::20]
    assert sorted(splits["train"] + splits["valid"] + splits["test"]) == sorted(SENTENCES)
    assert load_text(str(path)) == splits["train"]


def test_load_text_of_a_folder(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(f"the {split} text\n")
    assert load_text(tmp_path, "valid") == ["the valid text"]
    (tmp_path / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.txt: no such text file"):
        load_text(tmp_path, "test")
    with pytest.raises(ValueError, match="'all' is for a single text file"):
        load_text(tmp_path, "all")


def test_load_text_of_the_embedded_corpus():
    assert len(load_text("assistant", "valid")) == 2000
    assert load_text("assistant", "valid") != load_text("assistant", "test")
    with pytest.raises(ValueError, match="'all' is for a single text file"):
        load_text("assistant", "all")


def test_load_text_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="split must be one of train, valid, test, all; got 'dev'"):
        load_text("assistant", "dev")
    with pytest.raises(FileNotFoundError, match="missing: no such file or folder"):
        load_text("missing")
    monkeypatch.delenv("FASTVAE_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="FASTVAE_DATA"):
        load_text("ptb")
    monkeypatch.setenv("FASTVAE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"ptb.train\.txt"):
        load_text("ptb")
    short = tmp_path / "short.txt"
    short.write_text("one\ntwo\n")
    assert load_text(short) == ["one", "two"]
    with pytest.raises(ValueError, match="2 sentences are too few"):
        load_text(short, "valid")


@pytest.mark.skipif("FASTVAE_DATA" not in os.environ, reason="FASTVAE_DATA is not set")
def test_penn_treebank():
    train, valid, test = (load_text("ptb", split) for split in ("train", "valid", "test"))
    assert (len(train), len(valid), len(test)) == (42_068, 3_370, 3_761)
    vocabulary = Vocabulary.build(train)
    assert len(vocabulary) == 10_002  # the usual 10,000, which count <unk> and </s> but not <pad> and <s>
    corpus = TextCorpus(train, vocabulary)
    assert int(corpus.lengths.sum()) - len(corpus) == 929_589  # predicted tokens: words and </s>
    assert not {word for text in test for word in text.split()} - set(vocabulary)
