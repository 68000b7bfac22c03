import dataclasses
import functools
import json
from pathlib import Path

import pytest
import sacrebleu
import torch

from fastvae.data import Vocabulary, load_text
from fastvae.models import SentenceVAE
from fastvae.training import text_metrics
from fastvae.training.reports import ReportOptions, report_sentences
from fastvae.training.text import reconstruct_sentences, sample_sentences

WRITING = {"bleu", "samples", "self_bleu", "distinct_1", "distinct_2", "reverse_samples", "reverse_ppl", "word_kl"}
COMMITTED = Path(__file__).parents[2] / "bench" / "results" / "ptb_lstm_4_epochs.json"


@pytest.fixture(autouse=True)
def _small_language_model(monkeypatch):
    small = functools.partial(text_metrics.reverse_perplexity, embed_dim=8, hidden_size=8, epochs=1)
    monkeypatch.setattr(text_metrics, "reverse_perplexity", small)


@pytest.fixture
def vocabulary(sentences):
    return Vocabulary([word for word in Vocabulary.build(sentences).words if word != "rain"])


@pytest.fixture
def model(vocabulary):
    torch.manual_seed(0)
    model = SentenceVAE(len(vocabulary), embed_dim=6, hidden_size=7, latent_dim=3)
    with torch.no_grad():
        model.decoder.output.weight.mul_(8)
    return model.eval()


def test_what_costs_is_measured_on_request_alone(model, vocabulary, text_file):
    result, title, rows = report_sentences(model, vocabulary, ReportOptions(data=str(text_file), split="test"))
    written = {name: getattr(result, name) for name in WRITING - {"bleu"}}
    assert not any(written.values())
    assert [name for name, _, _ in rows] == ["-ELBO", "  NLL", "  KL", "PPL", "active units", "I(z;x)", "BLEU"]
    assert "8 sentences" in title


def test_figures_of_what_a_model_writes_equal_those_by_hand(model, vocabulary, text_file):
    data, train = str(text_file), load_text(text_file, "train")
    test = load_text(text_file, "test")
    result, _, rows = report_sentences(
        model, vocabulary, ReportOptions(data=data, split="test", samples=30, reverse_samples=50, seed=3)
    )
    copies = [reconstruct_sentences(model, vocabulary, [sentence])[0] for sentence in test]
    known = [" ".join(word if word in vocabulary else "<unk>" for word in sentence.split()) for sentence in test]
    assert any("<unk>" in sentence for sentence in known)
    expected = sacrebleu.corpus_bleu(copies, [known], tokenize="none", force=True).score
    assert result.bleu == pytest.approx(expected)
    drawn = sample_sentences(model, vocabulary, 50, seed=3)
    assert result.self_bleu == text_metrics.self_bleu(drawn[:30])
    assert result.distinct_1 == text_metrics.distinct_n(drawn[:30], 1)
    assert result.distinct_2 == text_metrics.distinct_n(drawn[:30], 2)
    assert result.word_kl == text_metrics.word_kl(drawn, train, vocabulary)
    assert result.reverse_ppl == text_metrics.reverse_perplexity(drawn, test, vocabulary, seed=3)
    assert (result.samples, result.reverse_samples) == (30, 50)
    assert dict(row[:2] for row in rows)["reverse PPL"] == f"{result.reverse_ppl:.4f}"


def test_word_frequencies_compare_with_the_training_text(model, vocabulary, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("anna likes jazz\n" * 20)
    result, _, _ = report_sentences(
        model, vocabulary, ReportOptions(data=str(other), split="all", training_data=str(text_file), reverse_samples=20)
    )
    drawn = sample_sentences(model, vocabulary, 20)
    assert result.word_kl == text_metrics.word_kl(drawn, load_text(text_file, "train"), vocabulary)
    assert result.sentences == 20


def test_a_committed_evaluation_has_no_key_that_is_gone(model, vocabulary, text_file):
    result, _, _ = report_sentences(model, vocabulary, ReportOptions(data=str(text_file), split="test", iw_samples=2))
    keys = dataclasses.asdict(result).keys()
    assert json.loads(COMMITTED.read_text()).keys() <= keys
    assert keys >= WRITING


def test_many_samples_are_drawn_in_parts(model, vocabulary, monkeypatch):
    monkeypatch.setattr("fastvae.training.text._DRAWN", 7)
    drawn = sample_sentences(model, vocabulary, 17, seed=1)
    assert len(drawn) == 17
    assert drawn[:7] == sample_sentences(model, vocabulary, 7, seed=1)
    assert len(set(drawn)) > 7
    with pytest.raises(ValueError, match="n: expected at least 1 sentence, got 0"):
        sample_sentences(model, vocabulary, 0)
