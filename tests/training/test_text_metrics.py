import math
import random

import numpy as np
import pytest
import sacrebleu
import torch
from scipy.stats import entropy

from fastvae.data import Vocabulary
from fastvae.training.text_metrics import (
    bleu,
    distinct_n,
    homogeneity,
    reverse_perplexity,
    self_bleu,
    train_language_model,
    word_kl,
)


def test_bleu_of_a_hand_made_case():
    # matches 5 of 6, 3 of 5, 2 of 4, 1 of 3; as long as the reference
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert bleu(["the cat sat on the mat"], ["the cat sat on a mat"]) == pytest.approx(expected)
    # one word short of the reference: the brevity penalty alone
    assert bleu(["a b c d e"], ["a b c d e f"]) == pytest.approx(100 * math.exp(1 - 6 / 5))


def test_bleu_is_that_of_the_corpus_and_takes_words_as_they_are():
    references = ["you 're here , n't you", "<unk> said <unk> & N % of sales", "fine"]
    hypotheses = ["you 're there , n't you", "<unk> said <unk> & N of sales", "fine"]
    expected = sacrebleu.corpus_bleu(hypotheses, [references], tokenize="none", force=True).score
    assert bleu(hypotheses, references) == expected
    assert bleu(references, references) == pytest.approx(100)
    assert bleu(["(a) b. c,d"], ["( a ) b . c , d"]) == 0.0


def test_bleu_of_empty_and_short_output():
    assert bleu([""], ["a b c d"]) == 0.0
    assert 0 < bleu(["", "a b c d"], ["a b c d", "a b c d"]) < 100
    assert bleu(["a"], ["a"]) == 0.0
    with pytest.raises(ValueError, match="hypotheses: expected at least one sentence, got none"):
        bleu([], [])
    with pytest.raises(ValueError, match="references: expected one for each of the 2 hypotheses, got 1"):
        bleu(["a", "b"], ["a"])


def test_self_bleu_equals_sentence_bleu_against_all_others():
    draw = random.Random(0)
    sentences = [" ".join(draw.choices("abcd", k=draw.randint(0, 9))) for _ in range(30)]
    sentences += [sentences[3], "a a a a a", "a a a a a a a", "never seen elsewhere"]
    expected = [
        sacrebleu.sentence_bleu(sentence, sentences[:i] + sentences[i + 1 :], tokenize="none").score
        for i, sentence in enumerate(sentences)
    ]
    assert self_bleu(sentences) == pytest.approx(sum(expected) / len(expected), rel=1e-12)


def test_self_bleu_of_extremes():
    assert self_bleu(["a b c d e"] * 2) == pytest.approx(100)
    assert self_bleu(["a b c d e", "f g h i j"]) == 0.0
    with pytest.raises(ValueError, match="sentences: expected at least 2, got 1"):
        self_bleu(["a"])


def test_distinct_n_by_hand():
    sentences = ["a b a b", "b a", "", "c"]
    assert distinct_n(sentences, 1) == pytest.approx(3 / 7)
    assert distinct_n(sentences, 2) == pytest.approx(2 / 4)  # ab ba ab, ba: none across two sentences
    assert distinct_n(sentences, 5) == 0.0
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        distinct_n(sentences, 0)


def test_word_kl_equals_scipys_entropy():
    vocabulary = Vocabulary(["a", "b", "c"])
    text = ["a b c c", "rare a b", "odd b"]
    samples = ["a a b", "<unk> c"]
    p, q = np.array([1, 2, 1, 1]), np.array([2, 2, 3, 2])  # <unk>, a, b, c
    assert word_kl(samples, text, vocabulary) == pytest.approx(entropy(p, q), rel=1e-12)
    assert word_kl(text, text, vocabulary) == 0.0
    assert word_kl(["a b c"], ["a b"], vocabulary) == math.inf
    with pytest.raises(ValueError, match="samples: expected at least one word"):
        word_kl([""], text, vocabulary)


def test_homogeneity_from_entropies_and_of_several_variables():
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    codes = np.array([0, 0, 1, 1, 1, 0, 2, 2])
    conditional = sum(
        np.mean(codes == code) * entropy(np.bincount(labels[codes == code], minlength=3)) for code in range(3)
    )
    assert homogeneity(labels, codes) == pytest.approx(1 - conditional / entropy([3, 3, 2]), rel=1e-9)
    assert homogeneity(labels, np.zeros(8)) == pytest.approx(0, abs=1e-12)
    # neither variable tells the label, both together do
    both = np.array([[0, 0], [0, 1], [1, 0], [1, 1]] * 2)
    exclusive_or = both[:, 0] ^ both[:, 1]
    assert homogeneity(exclusive_or, both[:, 0]) == pytest.approx(0, abs=1e-12)
    assert homogeneity(exclusive_or, torch.tensor(both)) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"\(sentences, variables\), got \(4,\) and \(3,\)"):
        homogeneity([0, 1, 2, 3], [0, 1, 2])


def grammar_sentence(draw: random.Random) -> str:
    """A subject, a verb that goes with it, then `again` any number of times: entropy known."""
    subject = draw.choice(["anna", "ben", "clara", "david"])
    verb = draw.choice(["likes", "sees"] if subject in ("anna", "ben") else ["calls", "hears"])
    words = [subject, verb]
    while draw.random() < 0.25:
        words.append("again")
    return " ".join(words)


GRAMMAR_ENTROPY = math.log(4) + math.log(2) + (-math.log(0.75) - math.log(0.25) / 3)  # nats a sentence
SMALL = {"embed_dim": 16, "hidden_size": 24, "dropout": 0.0, "lr": 1e-2, "epochs": 6}


@pytest.fixture(scope="module")
def grammar():
    draw = random.Random(1)
    return [grammar_sentence(draw) for _ in range(1500)], [grammar_sentence(draw) for _ in range(3000)]


def test_a_language_model_comes_near_the_entropy_of_a_grammar(grammar):
    train, test = grammar
    before = torch.get_rng_state()
    model = train_language_model(train, seed=3, **SMALL)
    nll, tokens = model.nll(test)
    assert torch.equal(torch.get_rng_state(), before)
    assert tokens.tolist() == [len(sentence.split()) + 1 for sentence in test]
    # the sample's own entropy: -log p of each sentence under the grammar, exact
    again = tokens.double() - 3
    true_nll = math.log(8) - math.log(0.75) - again * math.log(0.25)
    assert abs(float(true_nll.mean()) - GRAMMAR_ENTROPY) < 0.05
    assert 0 < float((nll - true_nll).mean()) < 0.05
    assert model.perplexity(test) == pytest.approx(math.exp(float(nll.sum() / tokens.sum())), rel=1e-12)
    again_model = train_language_model(train, seed=3, **SMALL)
    assert all(map(torch.equal, model.decoder.parameters(), again_model.decoder.parameters()))


def test_nll_of_each_sentence_is_that_of_itself_alone(grammar):
    model = train_language_model(grammar[0][:200], **SMALL | {"epochs": 1})
    sentences = ["anna likes", "", "ben sees again again", "unheard words", "anna likes"]
    together, tokens = model.nll(sentences)
    assert tokens.tolist() == [3, 1, 5, 3, 3]
    alone = torch.cat([model.nll([sentence])[0] for sentence in sentences])
    torch.testing.assert_close(together, alone)


def test_reverse_perplexity_prefers_samples_of_the_right_language(grammar):
    train, test = grammar
    vocabulary = Vocabulary.build(train)
    floor = math.exp(GRAMMAR_ENTROPY / (3 + 1 / 3))
    good = reverse_perplexity(train, test, vocabulary, **SMALL)
    assert floor * 0.98 < good < floor * 1.05
    narrow = [sentence for sentence in train if sentence.startswith("anna")] * 4
    assert reverse_perplexity(narrow, test, vocabulary, **SMALL) > 1.5 * floor


def test_a_language_model_keeps_its_best_epoch():
    # Of sentences unlike the training text, each epoch makes worse what the first left.
    settings = SMALL | {"valid": ["david hears"], "vocabulary": Vocabulary(["anna", "likes", "david", "hears"])}
    first, longest = (train_language_model(["anna likes"] * 320, **settings | {"epochs": n}) for n in (1, 9))
    assert all(map(torch.equal, first.decoder.parameters(), longest.decoder.parameters()))


def test_language_model_mistakes_are_named():
    with pytest.raises(ValueError, match="sentences: expected at least 20 to train a language model on, got 3"):
        train_language_model(["a b"] * 3)
    with pytest.raises(ValueError, match="epochs: expected at least 1, got 0"):
        train_language_model(["a b"] * 30, epochs=0)
    with pytest.raises(ValueError, match="lr: expected a positive"):
        train_language_model(["a b"] * 30, lr=math.nan)
    with pytest.raises(ValueError, match="valid: expected at least one"):
        train_language_model(["a b"], valid=[])
    with pytest.raises(ValueError, match="sentences: expected at least one"):
        train_language_model(["a b"], valid=["a"], epochs=1, hidden_size=3, embed_dim=3).nll([])
