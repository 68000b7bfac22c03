import json
import math

import pytest
import torch

from fastvae.data import TextBatch, collate
from fastvae.functional import gaussian_sample_kl, scale_tril
from fastvae.models import SentenceVAE
from fastvae.training import metrics
from fastvae.training.metrics import (
    PosteriorSample,
    RunningMoments,
    evaluate,
    full_mutual_information,
    mutual_information,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SentenceVAE(11, embed_dim=6, hidden_size=7, latent_dim=3, word_dropout=0.5, dropout=0.5)


@pytest.fixture
def batches():
    draw = torch.Generator().manual_seed(1)
    rows = []
    for length in (1, 2, 3, 3, 5, 6, 6):
        words = torch.randint(4, 11, (length,), generator=draw)
        rows.append(torch.cat([torch.tensor([2]), words, torch.tensor([3])]))
    return [collate(rows[:3]), collate(rows[3:])]


def test_running_moments_equal_those_of_the_whole():
    rows = torch.randn(101, 4, dtype=torch.float64) * 3 + 100
    moments = RunningMoments()
    for part in rows.split([1, 33, 0, 60, 7]):
        moments.update(part)
    torch.testing.assert_close(moments.mean, rows.mean(0))
    torch.testing.assert_close(moments.variance, rows.var(0, unbiased=False))


def test_posterior_sample_is_uniform_over_the_stream():
    counts = torch.zeros(10)
    for seed in range(400):
        sample = PosteriorSample(4, seed)
        for value in torch.arange(10.0).split(3):
            sample.update(value[:, None], torch.zeros(len(value), 2))
        kept, spread = sample.parameters()
        assert spread.shape == (4, 2)
        kept = kept[:, 0].long()
        assert len(set(kept.tolist())) == 4
        counts[kept] += 1
    assert ((counts / 400 - 0.4).abs() < 0.1).all()  # four standard errors


def test_mutual_information_of_separate_and_of_equal_posteriors():
    means = torch.arange(50.0)[:, None] * 100
    separate = mutual_information(means, torch.zeros(50, 1))
    assert separate == pytest.approx(math.log(50), abs=1e-9)
    assert mutual_information(torch.ones(50, 3), torch.zeros(50, 3)) == pytest.approx(0, abs=1e-9)


def test_mutual_information_against_a_plain_sum():
    generator = torch.Generator().manual_seed(3)
    mean, log_var = torch.randn(2, 300, 2, generator=generator, dtype=torch.float64)
    z, _ = gaussian_sample_kl(mean, log_var, seed=torch.tensor([5]))
    normal = torch.distributions.Normal(mean, (log_var / 2).exp())
    joint = normal.log_prob(z[:, None]).sum(-1)
    expected = (joint.diagonal() - joint.logsumexp(1) + math.log(300)).mean()
    assert mutual_information(mean, log_var, seed=5) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("pairs", [1 << 22, 1000])
def test_mutual_information_of_full_covariances_against_a_plain_sum(pairs, monkeypatch):
    monkeypatch.setattr(metrics, "_PAIR_NUMBERS", pairs)  # with 1000, a posterior at a time
    generator = torch.Generator().manual_seed(3)
    mean, log_diagonal, lower = (torch.randn(300, n, generator=generator, dtype=torch.float64) for n in (3, 3, 3))
    lower *= 2
    scale = scale_tril(log_diagonal, lower)
    noise = torch.randn(300, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    z = mean + torch.einsum("nij, nj -> ni", scale, noise)
    joint = torch.distributions.MultivariateNormal(mean, scale_tril=scale).log_prob(z[:, None])
    expected = (joint.diagonal() - joint.logsumexp(1) + math.log(300)).mean()
    assert full_mutual_information(mean, log_diagonal, lower, seed=5) == pytest.approx(float(expected), rel=1e-9)
    kept = PosteriorSample(300)
    kept.update(mean, log_diagonal, lower)
    assert full_mutual_information(*kept.parameters(), seed=5) == pytest.approx(float(expected), rel=1e-9)


def test_evaluation_equals_sums_by_hand(model, batches):
    result = evaluate(model, batches, seed=7, data="d", split="s")
    generator = torch.Generator().manual_seed(7)
    model.eval()
    nll, kl, means = [], [], []
    for batch in batches:
        output = model(batch.tokens, batch.lengths, generator=generator)
        nll.append(output.nll.detach())
        kl.append(output.kl.detach())
        means.append(model.encode(batch.tokens, batch.lengths)[0])
    tokens = sum(int((batch.lengths - 1).sum()) for batch in batches)
    total = float(torch.cat(nll).sum() + torch.cat(kl).sum())
    assert result.sentences == 7
    assert result.tokens == tokens == 33
    assert result.nll == pytest.approx(float(torch.cat(nll).mean()), rel=1e-6)
    assert result.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-6)
    assert result.neg_elbo == pytest.approx(result.nll + result.kl)
    assert result.ppl == pytest.approx(math.exp(total / tokens), rel=1e-6)
    assert result.active_units == int((torch.cat(means).var(0, unbiased=False) > 0.01).sum())
    assert result.iw_nll is None
    assert (result.data, result.split) == ("d", "s")


def test_evaluation_turns_dropout_off_and_leaves_the_mode(model, batches):
    model.train()
    first, second = evaluate(model, batches, seed=1), evaluate(model, batches, seed=1)
    assert first == second
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert evaluate(model, batches, seed=2).nll != first.nll


def test_active_units_counts_dimensions_that_vary(model, batches):
    with torch.no_grad():
        weight, bias = model.head.linear.weight, model.head.linear.bias
        weight[:3] = 0
        bias[:3] = 5.0
        weight[1] = torch.linspace(-50, 50, 7)
    assert evaluate(model, batches).active_units == 1


def test_importance_weighting_tightens_the_bound(model, batches):
    with torch.no_grad():
        model.head.linear.bias[:3] = 2.0  # a poor posterior: the bound has room
    loose = evaluate(model, batches, iw_samples=1, seed=0)
    tight = evaluate(model, batches, iw_samples=300, iw_chunk=64, seed=0)
    assert tight.iw_nll < loose.iw_nll - 1.0
    assert tight.iw_ppl == pytest.approx(math.exp(tight.iw_nll * 7 / 33), rel=1e-9)


def test_json_holds_the_promised_keys(model, batches, tmp_path):
    evaluate(model, batches, iw_samples=2, data="ptb", split="test").save(tmp_path / "e.json")
    written = json.loads((tmp_path / "e.json").read_text())
    promised = {"neg_elbo", "nll", "kl", "ppl", "active_units", "iw_nll"}
    promised |= {"sentences", "tokens", "data", "split", "versions"}
    assert promised <= written.keys()
    assert written["versions"].keys() >= {"fastvae", "torch"}


def test_nothing_to_evaluate_and_damaged_weights(model, batches):
    with pytest.raises(ValueError, match="no sentences"):
        evaluate(model, [])
    with torch.no_grad():
        model.decoder.output.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="reconstruction NLL is nan"):
        evaluate(model, [TextBatch(*batches[0])])


def test_figures_that_are_not_finite_are_null(tmp_path):
    metrics.TextFigures(word_kl=math.inf, bleu=math.nan, reverse_ppl=3.0).save(tmp_path / "e.json")
    figures = json.loads((tmp_path / "e.json").read_text())
    assert (figures["word_kl"], figures["bleu"], figures["reverse_ppl"]) == (None, None, 3.0)
