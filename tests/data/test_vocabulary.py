import pytest
import torch

from fastvae.data import SPECIAL_TOKENS, Vocabulary


@pytest.fixture
def vocabulary():
    return Vocabulary(["take", "me", "home", "naïve", "N"])


def test_special_tokens_come_first(vocabulary):
    assert list(vocabulary)[:4] == list(SPECIAL_TOKENS) == ["<pad>", "<unk>", "<s>", "</s>"]
    indices = (vocabulary.pad_index, vocabulary.unk_index, vocabulary.bos_index, vocabulary.eos_index)
    assert indices == (0, 1, 2, 3)
    assert len(vocabulary) == 9


def test_encode_then_decode_gives_the_sentence(vocabulary):
    assert vocabulary.encode("take me home") == [2, 4, 5, 6, 3]
    assert vocabulary.encode(["take", "N"]) == [2, 4, 8, 3]
    assert vocabulary.decode(vocabulary.encode("  take \t me home\n")) == "take me home"
    assert vocabulary.decode(torch.tensor([2, 7, 3, 0, 0])) == "naïve"


def test_unknown_words_become_unk_and_are_shown(vocabulary):
    assert vocabulary.encode("take <unk> away") == [2, 4, 1, 1, 3]
    assert vocabulary.decode([2, 4, 1, 3]) == "take <unk>"


def test_text_cannot_smuggle_in_special_tokens(vocabulary):
    assert vocabulary.encode("<s> <pad> </s> take") == [2, 1, 1, 1, 4, 3]


def test_decode_stops_at_the_end_and_rejects_what_is_out_of_range(vocabulary):
    assert vocabulary.decode([2, 4, 3, 99, 5]) == "take"
    with pytest.raises(ValueError, match=r"ids\[1\] is 9, out of range for a vocabulary of 9"):
        vocabulary.decode([4, 9])
    with pytest.raises(ValueError, match=r"ids\[0\] is -1"):
        vocabulary.decode([-1])


def test_build_ranks_by_count_then_spelling():
    built = Vocabulary.build(["b a c c", "c b <unk> </s>", ["d", "b"]])
    assert built.words == ("b", "c", "a", "d")


def test_build_limits():
    text = ["c c c b b b a a d"]
    assert Vocabulary.build(text, max_size=6).words == ("b", "c")
    assert Vocabulary.build(text, min_count=2).words == ("b", "c", "a")
    assert Vocabulary.build(text, max_size=7, min_count=3).words == ("b", "c")
    assert len(Vocabulary.build(text, max_size=6)) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sentences": ["a"], "max_size": 4}, "max_size must exceed the 4 special tokens, got 4"),
        ({"sentences": ["a"], "max_size": -1}, "max_size"),
        ({"sentences": ["a"], "min_count": 0}, "min_count must be at least 1, got 0"),
        ({"sentences": ["a"], "min_count": 2}, "min_count=2"),
        ({"sentences": []}, "no word"),
        ({"sentences": "one sentence"}, "iterable of sentences"),
    ],
)
def test_build_refuses_nonsense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary.build(**arguments)


@pytest.mark.parametrize("words", [["a", "a"], ["a b"], [""], ["</s>"], ["a\u2028b"], "text"])
def test_words_must_be_single_distinct_and_ordinary(words):
    with pytest.raises(ValueError, match="word"):
        Vocabulary(words)


def test_saved_and_loaded_is_equal(vocabulary, tmp_path):
    path = tmp_path / "vocabulary.txt"
    vocabulary.save(path)
    vocabulary.save(path)
    assert Vocabulary.load(path) == vocabulary != Vocabulary(["take"])
    assert Vocabulary(vocabulary.words) == vocabulary
    assert path.read_text(encoding="utf-8").split("\n")[8] == "N"
    assert [file.name for file in tmp_path.iterdir()] == ["vocabulary.txt"]


def test_a_failed_save_leaves_the_old_file(vocabulary, tmp_path, monkeypatch):
    path = tmp_path / "vocabulary.txt"
    vocabulary.save(path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        Vocabulary(["other"]).save(path)
    assert Vocabulary.load(path) == vocabulary
    assert [file.name for file in tmp_path.iterdir()] == ["vocabulary.txt"]


HEAD = b"<pad>\n<unk>\n<s>\n</s>\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "first four lines"),
        (b"take\nme\nhome\n\n", "first four lines"),
        (HEAD + b"take\nme", "line 6: vocabulary cut off"),
        (HEAD + b"take\ntake\n", "corrupt vocabulary, word 1 is 'take', which is already word 0"),
        (HEAD + b"take\n\nme\n", "corrupt vocabulary, word 1 must be non-empty"),
        (HEAD + b"take me\n", "corrupt vocabulary, word 0"),
        (HEAD + b"caf\xe9\n", "line 5: not a vocabulary, the text is not UTF-8"),
    ],
)
def test_load_says_what_is_wrong(content, message, tmp_path):
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Vocabulary.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_of_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such vocabulary file"):
        Vocabulary.load(tmp_path / "missing.txt")
