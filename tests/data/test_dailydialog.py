import os
from collections import Counter
from pathlib import Path

import pytest

from fastvae.data import load_text
from fastvae.data.dailydialog import ACTS, EMOTIONS, LabelledUtterance, dailydialog_dialogues

TEXT = "How are you ? __eou__ Fine , thanks . __eou__\nSit down ! __eou__\n"


def write(folder: Path, text: str = TEXT, acts: str = "2 1 \n3 \n", emotions: str = "0 4 \n1 \n") -> Path:
    for suffix, content in (("", text), ("_act", acts), ("_emotion", emotions)):
        (folder / f"validation{suffix}.txt").write_text(content, encoding="utf-8")
    return folder


def test_utterances_carry_their_labels(tmp_path):
    assert dailydialog_dialogues(write(tmp_path), "valid") == [
        [LabelledUtterance("how are you ?", 1, 0), LabelledUtterance("fine , thanks .", 0, 4)],
        [LabelledUtterance("sit down !", 2, 1)],
    ]


def test_it_is_known_by_name(tmp_path, monkeypatch):
    (tmp_path / "dailydialog").mkdir()
    write(tmp_path / "dailydialog")
    monkeypatch.setenv("FASTVAE_DATA", str(tmp_path))
    assert load_text("dailydialog", "valid") == ["how are you ?", "fine , thanks .", "sit down !"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"acts": "2 \n3 \n"}, "line 1: 2 utterances, 1 acts and 2 emotions"),
        ({"acts": "2 1 \n"}, "expected as many lines of text, acts and emotions, got 2, 1, 2"),
        ({"acts": "2 5 \n3 \n"}, "line 1: expected labels 1 to 4, got '2 5'"),
        ({"emotions": "0 7 \n3 \n"}, "line 1: expected labels 0 to 6, got '0 7'"),
        ({"emotions": "0 x \n3 \n"}, "expected labels"),
    ],
)
def test_what_does_not_go_together_is_told(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        dailydialog_dialogues(write(tmp_path, **files), "valid")


@pytest.mark.skipif("FASTVAE_DATA" not in os.environ, reason="needs FASTVAE_DATA")
def test_the_published_files():
    folder = Path(os.environ["FASTVAE_DATA"]) / "dailydialog"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    with pytest.warns(UserWarning, match="line 7852 is left out: 12 utterances, 11 acts and 11 emotions"):
        train = dailydialog_dialogues(folder, "train")
    assert len(train) == 11_117
    assert sum(map(len, train)) == 87_159
    acts = Counter(ACTS[utterance.act] for dialogue in train for utterance in dialogue)
    assert acts == {"inform": 39_869, "question": 24_970, "directive": 14_240, "commissive": 8_080}
    test = [utterance for dialogue in dailydialog_dialogues(folder, "test") for utterance in dialogue]
    assert len(test) == 7_740
    assert Counter(EMOTIONS[utterance.emotion] for utterance in test).most_common(2) == [
        ("none", 6_321),
        ("happiness", 1_019),
    ]
