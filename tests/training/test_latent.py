import numpy as np
import pytest
import torch

from fastvae.data import Vocabulary, load_text
from fastvae.data.assistant import SENTIMENTS, assistant_utterances
from fastvae.models import SentenceVAE
from fastvae.training.latent import (
    combine_sentences,
    labeled_sentences,
    latent_means,
    nearest_sentences,
    plot_map,
    project,
)
from fastvae.training.text import reconstruct_sentences


@pytest.fixture
def vocabulary(sentences):
    return Vocabulary.build(sentences)


@pytest.fixture
def model(vocabulary):
    torch.manual_seed(0)
    model = SentenceVAE(len(vocabulary), embed_dim=6, hidden_size=7, latent_dim=3, dropout=0.5)
    with torch.no_grad():
        model.decoder.output.weight.mul_(8)
        model.head.linear.weight.mul_(5)
    return model.eval()


def test_latent_means_keep_the_order_of_the_sentences(model, vocabulary, sentences):
    means = latent_means(model.train(), vocabulary, sentences)
    assert model.training
    model.eval()
    for place in (0, 7, 100, 159):
        tokens = torch.tensor([vocabulary.encode(sentences[place])])
        torch.testing.assert_close(means[place], model.encode(tokens)[0][0].double(), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="at least one sentence"):
        latent_means(model, vocabulary, [])


def test_sums_of_sentences(model, vocabulary):
    a, b, c = "anna likes jazz", "ben sees rain again", "clara calls lunch again again"
    (again,) = reconstruct_sentences(model, vocabulary, [c])
    assert combine_sentences(model, vocabulary, [(1, c)]) == again
    assert combine_sentences(model, vocabulary, [(1, a), (-1, a), (1, c)]) == again
    first, second, third = latent_means(model, vocabulary, [a, b, c])
    tokens, _ = model.decode((first - second + 0.5 * third).float()[None])
    written = combine_sentences(model, vocabulary, [(1, a), (-1, b), (0.5, c)])
    assert written == vocabulary.decode(tokens[0])
    assert written not in (again, combine_sentences(model, vocabulary, [(1, a)]))
    drawn = [combine_sentences(model, vocabulary, [(1, a)], seed=seed, strategy="sample") for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_nearest_sentences_by_brute_force(model, vocabulary, sentences, metric):
    query = "anna sees rain again"
    found = nearest_sentences(model, vocabulary, query, sentences, 5, metric=metric)
    here = latent_means(model, vocabulary, [query])[0].numpy()
    distance = {}
    for sentence in set(sentences):
        there = latent_means(model, vocabulary, [sentence])[0].numpy()
        cosine = here @ there / np.linalg.norm(here) / np.linalg.norm(there)
        distance[sentence] = np.linalg.norm(here - there) if metric == "euclidean" else 1 - cosine
    expected = sorted(distance.items(), key=lambda pair: pair[1])[:5]
    assert [sentence for _, sentence in found] == [sentence for sentence, _ in expected]
    np.testing.assert_allclose([value for value, _ in found], [value for _, value in expected], atol=1e-5)
    (itself,) = nearest_sentences(model, vocabulary, sentences[3], sentences, 1, metric=metric)
    assert itself == (pytest.approx(0, abs=1e-6), sentences[3])


def test_nearest_sentences_mistakes(model, vocabulary):
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        nearest_sentences(model, vocabulary, "anna", ["ben"], 0)
    with pytest.raises(ValueError, match="metric must be one of euclidean, cosine, got 'l1'"):
        nearest_sentences(model, vocabulary, "anna", ["ben"], metric="l1")


def test_a_projection_keeps_the_widest_plane_and_groups():
    draw = torch.Generator().manual_seed(0)
    plane = torch.randn(60, 2, generator=draw, dtype=torch.float64) * torch.tensor([9.0, 4.0])
    turn = torch.linalg.qr(torch.randn(5, 5, generator=draw, dtype=torch.float64))[0][:2]
    points, axes = project(plane @ turn + 3)
    centred = plane - plane.mean(0)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), centred.norm(dim=1).numpy(), rtol=1e-9)
    shares = [int(axis.rpartition("(")[2].removesuffix(" %)")) for axis in axes]
    assert sum(shares) == 100
    assert shares[0] > 60

    groups = torch.randn(40, 5, generator=draw, dtype=torch.float64)
    groups[20:] += 100
    points, axes = project(groups, "tsne")
    assert axes == ["t-SNE 1", "t-SNE 2"]
    within = max(np.ptp(points[:20], axis=0).max(), np.ptp(points[20:], axis=0).max())
    assert np.linalg.norm(points[:20].mean(0) - points[20:].mean(0)) > within / 2
    np.testing.assert_array_equal(points, project(groups, "tsne")[0])
    with pytest.raises(ValueError, match="method must be one of pca, tsne, got 'umap'"):
        project(groups, "umap")
    with pytest.raises(ValueError, match="at least 2 sentences, got 1"):
        project(groups[:1])


def test_a_map_has_the_colours_of_its_labels(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    points = np.random.default_rng(0).normal(size=(300, 2))

    def hues(**how):
        plot_map(points, tmp_path / "map.png", axes=["one", "two"], **how)
        picture = (imread(tmp_path / "map.png")[..., :3] * 255).astype(int)
        coloured = picture[np.ptp(picture, axis=2) > 100] // 64
        return len(np.unique(coloured, axis=0))

    one = hues(labels=["a"] * 300)
    assert hues(labels=list("abcdef") * 50) > 2 * one
    assert hues(labels=[str(n % 40) for n in range(300)]) > 2 * one  # the frequent ones, and others
    assert hues(lengths=list(range(300))) > 2 * one


def test_labels_belong_to_their_sentences(tmp_path, text_file):
    sentences = load_text("assistant", "test")
    same, intents = labeled_sentences("assistant", "test", "intent")
    assert same == sentences
    assert intents == [utterance.intent for utterance in assistant_utterances("test")]
    assert set(labeled_sentences("assistant", "test", "sentiment")[1]) == set(SENTIMENTS)
    own = tmp_path / "labels.txt"
    own.write_text("x\ny\n" * 4)
    assert labeled_sentences(str(text_file), "test", str(own))[1] == ["x", "y"] * 4
    with pytest.raises(ValueError, match=r"holds 8 labels, but .* \(all\) has 160 sentences"):
        labeled_sentences(str(text_file), "all", str(own))
    with pytest.raises(ValueError, match="no labels 'mood': assistant has sentiment, intent, and there is no"):
        labeled_sentences("assistant", "test", "mood")
    with pytest.raises(ValueError, match="has no labels of its own"):
        labeled_sentences(str(text_file), "test", "mood")
