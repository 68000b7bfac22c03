import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch.distributions import Categorical, Normal, kl_divergence

from fastvae.models import MixtureVAE, SentenceVAE
from fastvae.models.mixture_vae import KINDS

V, M, K, D = 15, 2, 3, 4
LENGTHS = torch.tensor([7, 3, 5, 4, 6, 2])


def sentences(lengths=LENGTHS, vocab_size=V):
    tokens = torch.randint(4, vocab_size, (len(lengths), int(lengths.max())))
    tokens[:, 0] = 2
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        row[length - 1] = 3
        row[length:] = 0
    return tokens


def make_model(kind="dgm_vae", **settings):
    """A model in float64 whose posteriors differ from sentence to sentence."""
    torch.manual_seed(0)
    sizes = {"variables": M, "components": K, "latent_dim": D, "embed_dim": 6, "hidden_size": 8}
    model = MixtureVAE.of_kind(kind, V, **(sizes | settings)).double()
    with torch.no_grad():
        model.encoder.embedding.weight.mul_(30)
        model.code_head.weight.mul_(8)
        if model.prior == "mixture" and not model.categorical:
            model.component_log_var.normal_()
    return model.eval()


def seed(value):
    return torch.tensor([value])


def component(model, variable, code):
    if model.categorical:
        return Categorical(logits=model.component_logits[variable, code])
    return Normal(model.component_mean[variable, code], (0.5 * model.component_log_var[variable, code]).exp())


def kl_given(model, posterior, variable, code):
    """KL(q(z_m|x) || p(z_m|c_m)) of each sentence, by torch.distributions."""
    mean, log_var, _ = posterior
    if model.categorical:
        return kl_divergence(Categorical(logits=mean[:, variable]), component(model, variable, code))
    q = Normal(mean[:, variable], (0.5 * log_var[:, variable]).exp())
    return kl_divergence(q, component(model, variable, code)).sum(-1)


@pytest.mark.parametrize("kind", ["gm_vae", "dgm_vae", "dcm_vae", "semi_vae"])
def test_elbo_is_the_sum_over_all_codes(kind):
    model, tokens = make_model(kind), sentences()
    output, posterior = model(tokens, LENGTHS, seed=seed(1)), model.encode(tokens, LENGTHS)
    log_q = posterior.logits.log_softmax(-1)
    exact = torch.zeros(len(tokens), dtype=torch.float64)
    for codes in itertools.product(range(K), repeat=M):
        log_code = sum(log_q[:, m, c] for m, c in enumerate(codes))
        kl = sum(kl_given(model, posterior, m, c) for m, c in enumerate(codes))
        exact += log_code.exp() * (kl + log_code + M * math.log(K))
    torch.testing.assert_close(output.kl, exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.neg_elbo, output.nll + exact, rtol=1e-10, atol=1e-10)


def test_dispersion_parts_the_kl_to_the_components():
    """The identity in natural parameters, from the definition of the family alone."""
    model, tokens = make_model(), sentences()
    posterior = model.encode(tokens, LENGTHS)
    mean, log_var, logits = posterior
    q = logits.softmax(-1)
    variance = model.component_log_var.exp()
    eta1, eta2 = model.component_mean / variance, -0.5 / variance

    def log_partition(eta1, eta2):
        return (-(eta1**2) / (4 * eta2) - 0.5 * (-2 * eta2).log()).sum(-1)

    bar1, bar2 = torch.einsum("bmk,mkd->bmd", q, eta1), torch.einsum("bmk,mkd->bmd", q, eta2)
    dispersion = (torch.einsum("bmk,mk->bm", q, log_partition(eta1, eta2)) - log_partition(bar1, bar2)).sum(1)
    average = Normal(-bar1 / (2 * bar2), (-0.5 / bar2).sqrt())
    to_average = kl_divergence(Normal(mean, (0.5 * log_var).exp()), average).sum((1, 2))
    expected = sum(q[:, m, k] * kl_given(model, posterior, m, k) for m in range(M) for k in range(K))
    output = model(tokens, LENGTHS, seed=seed(1))
    torch.testing.assert_close(output.dispersion, dispersion, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(to_average + dispersion, expected, rtol=1e-10, atol=1e-10)
    assert (output.dispersion > 0.1).all()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ae", {}),
        ("vae", {}),
        ("di_vae", {}),
        ("semi_vae", {"mutual_information_weight": 1.0}),
        ("gm_vae", {}),
        ("gm_vae", {"mutual_information_weight": 1.0}),
        ("dgm_vae", {"beta": 0.7}),
        ("dgm_vae", {"beta": 0.7, "mutual_information_weight": 1.0}),
        ("dcm_vae", {"beta": 0.8}),
    ],
)
def test_loss_is_that_of_its_kind(kind, settings):
    model, tokens = make_model(kind, **settings), sentences()
    output, (mean, log_var, logits) = model(tokens, LENGTHS, kl_weight=0.3, seed=seed(1)), model.encode(tokens, LENGTHS)
    q = Categorical(logits=logits)
    average = Categorical(probs=q.probs.mean(0))
    to_uniform = (math.log(logits.size(-1)) - q.entropy()).sum(1).mean()
    information = average.entropy().sum() - q.entropy().sum(1).mean()
    charged = torch.zeros((), dtype=torch.float64)
    if kind in ("vae", "semi_vae"):
        charged = kl_divergence(Normal(mean, (0.5 * log_var).exp()), Normal(0.0, 1.0)).sum((1, 2)).mean()
    elif "m_vae" in kind:
        to_components = torch.stack(
            [torch.stack([kl_given(model, (mean, log_var, logits), m, k) for k in range(K)], 1) for m in range(M)],
            1,
        )
        beta = settings.get("beta", 0.0)
        charged = (q.probs * to_components).sum((1, 2)).mean() - beta * output.dispersion.mean()
    if kind != "ae":
        weight = KINDS[kind].get("mutual_information_weight", settings.get("mutual_information_weight", 0.0))
        charged = charged + to_uniform - weight * information
    assert output.loss.item() == pytest.approx((output.nll.mean() + 0.3 * charged).item(), rel=1e-10)
    torch.testing.assert_close(output.mutual_information.sum(), information if kind != "ae" else 0 * information)
    if kind == "di_vae":  # what is left is the KL of the aggregate
        to_aggregate = (math.log(K) - average.entropy()).sum()
        assert output.loss.item() == pytest.approx((output.nll.mean() + 0.3 * to_aggregate).item(), rel=1e-10)


def test_mutual_information_of_hard_codes_is_that_of_scikit_learn():
    """Where every q(c|x) is certain, I(c;x) is that of the assignment, and of the sentences' numbers."""
    model, tokens = make_model(), sentences(torch.tensor([3, 4, 5, 6] * 5))
    with torch.no_grad():
        model.code_head.weight.mul_(1e6)
        model.code_head.bias.copy_(-model.code_head.weight @ model.encoder(tokens).mean(0))
    output = model(tokens)
    codes = output.logits.argmax(-1).numpy()
    assert len(np.unique(codes[:, 0])) > 1
    expected = [mutual_info_score(codes[:, m], np.arange(len(codes))) for m in range(M)]
    assert output.mutual_information.tolist() == pytest.approx(expected, abs=1e-6)


def test_standard_kinds_are_the_sentence_vae():
    """With one component the VAE is `SentenceVAE`; the auto-encoder reads the same mean without noise."""
    for kind in ("vae", "ae"):
        model, tokens = make_model(kind), sentences()
        plain = SentenceVAE(V, embed_dim=6, hidden_size=8, latent_dim=M * D).double().eval()
        plain.load_state_dict({name: value for name, value in model.state_dict().items() if "code_head" not in name})
        ours = model(tokens, LENGTHS, seed=seed(1))
        if kind == "vae":
            theirs = plain(tokens, LENGTHS, seed=seed(1))
            torch.testing.assert_close((ours.loss, ours.nll, ours.kl), (theirs.loss, theirs.nll, theirs.kl))
        else:
            torch.testing.assert_close(ours.nll, plain.decoder(tokens, plain.encode(tokens, LENGTHS)[0], LENGTHS))
            assert ours.kl.abs().sum() == 0
        for written, expected in zip(model.reconstruct(tokens), plain.reconstruct(tokens), strict=True):
            assert torch.equal(written, expected)


@pytest.mark.parametrize("kind", ["dgm_vae", "dcm_vae", "semi_vae", "di_vae"])
def test_many_samples_are_as_many_passes(kind):
    model, tokens = make_model(kind), sentences()
    together = model(tokens, LENGTHS, num_samples=3, seed=seed(1))
    latent = model._draw(model.encode(tokens, LENGTHS), 3, None, seed(1))
    assert latent.shape == (3, len(tokens), model.decoder.latent_dim)
    apart = torch.stack([model.decoder(tokens, z, LENGTHS) for z in latent]).mean(0)
    torch.testing.assert_close(together.nll, apart)
    assert not torch.allclose(latent[0], latent[1])


def test_discrete_samples_are_soft_in_training_and_hard_in_evaluation():
    for kind in ("dcm_vae", "di_vae"):
        model, tokens = make_model(kind), sentences()
        for mode in (True, False):
            latent = model.train(mode)._draw(model.encode(tokens), 2, None, seed(1))
            assert latent.unflatten(-1, (M, -1)).sum(-1).allclose(torch.ones((), dtype=torch.float64))
            assert bool(((latent == 0) | (latent == 1)).all()) is not mode


def test_the_seed_fixes_latents_codes_and_word_dropout_apart():
    model, tokens = make_model("semi_vae", word_dropout=0.5).train(), sentences()
    first, same, other = (model(tokens, seed=seed(value)).nll for value in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)
    assert torch.isfinite(model(tokens, seed=seed(2**63 - 1)).loss)
    by_generator = [model(tokens, generator=torch.Generator().manual_seed(4)).nll for _ in range(2)]
    assert torch.equal(*by_generator)


def test_labels_supervise_the_first_codes():
    model, tokens = make_model("dcm_vae"), sentences()
    labels = torch.tensor([[0, -1], [1, 2], [-1, -1], [2, 0], [0, 1], [1, -1]])
    output = model(tokens, LENGTHS, labels=labels, supervision_weight=0.5, seed=seed(1))
    log_q = output.logits.log_softmax(-1)
    known = sum(-log_q[i, m, c] for i, row in enumerate(labels.tolist()) for m, c in enumerate(row) if c >= 0)
    plain = model(tokens, LENGTHS, seed=seed(1))
    assert output.loss.item() == pytest.approx((plain.loss + 0.5 * known / len(tokens)).item(), rel=1e-10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model(tokens, LENGTHS, labels=labels, supervision_weight=5.0, seed=seed(1)).loss.backward()
        optimizer.step()
    codes = model.encode(tokens, LENGTHS).logits.argmax(-1)
    assert bool((codes == labels)[labels >= 0].all())


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_that_counts_gets_a_gradient(kind):
    model = make_model(kind).train()
    model(sentences()).loss.backward()
    unused = {"ae": ("code_head",), "vae": ("code_head",)}.get(kind, ())
    for name, parameter in model.named_parameters():
        if not name.startswith(unused):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_config_rebuilds_the_model_and_it_writes(kind):
    model, tokens = make_model(kind), sentences()
    again = MixtureVAE(**pickle.loads(pickle.dumps(model.config))).double()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(tokens, seed=seed(1)).loss, model(tokens, seed=seed(1)).loss)
    draws = [model.sample(5, max_length=6, generator=torch.Generator().manual_seed(value)) for value in (1, 1)]
    assert draws[0][0].shape[0] == len(draws[0][1]) == 5
    assert torch.equal(draws[0][0], draws[1][0])
    ends = model.interpolate(tokens[0], tokens[2, :5], 3, max_length=9)[0]
    assert ends[0].tolist()[:4] == model.reconstruct(tokens[:1], max_length=9)[0][0].tolist()[:4]


def test_latents_of_given_codes_are_of_their_component():
    model = make_model()
    with torch.no_grad():
        model.component_log_var.fill_(-8.0)
    codes = torch.tensor(list(itertools.product(range(K), repeat=M)))
    z = model.prior_latents(codes, generator=torch.Generator().manual_seed(0)).unflatten(1, (M, D))
    for row, latent in zip(codes.tolist(), z, strict=True):
        for m, code in enumerate(row):
            torch.testing.assert_close(latent[m], model.component_mean[m, code], rtol=0, atol=0.08)
    categorical = make_model("dcm_vae")
    with torch.no_grad():
        categorical.component_logits.mul_(1e4)
    z = categorical.prior_latents(codes).unflatten(1, (M, D))
    for row, latent in zip(codes.tolist(), z, strict=True):
        for m, code in enumerate(row):
            assert latent[m].argmax() == categorical.component_logits[m, code].argmax()
    with torch.random.fork_rng():
        given = model.sample(2, codes=codes[:2], strategy="greedy", generator=torch.Generator().manual_seed(0))
        z = model.prior_latents(codes[:2], generator=torch.Generator().manual_seed(0))
        assert torch.equal(given[0], model.decode(z)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: MixtureVAE.of_kind("hmm", V), "kind: expected one of ae, vae"),
        (lambda m, t: MixtureVAE(V, prior="beta"), "prior"),
        (lambda m, t: MixtureVAE(V, family="gamma"), "family"),
        (lambda m, t: MixtureVAE(V, latent_dim=0), "latent_dim"),
        (lambda m, t: MixtureVAE(V, latent_dim=0, components=1, prior="standard"), "latent_dim"),
        (lambda m, t: MixtureVAE(V, beta=float("nan")), "beta"),
        (lambda m, t: MixtureVAE(V, num_samples=0), "num_samples"),
        (lambda m, t: MixtureVAE(V, prior="none"), "prior"),
        (lambda m, t: m.sample(0), "n: expected"),
        (lambda m, t: m.sample(2, codes=torch.zeros(3, M, dtype=torch.int64)), "codes: expected 2 rows"),
        (lambda m, t: m.prior_latents(torch.zeros(3, M)), "codes: expected shape"),
        (lambda m, t: m.prior_latents(torch.full((3, M), K)), "codes: expected values"),
        (lambda m, t: m(t, labels=torch.zeros(6, M + 1, dtype=torch.int64)), "labels: expected shape"),
        (lambda m, t: m.interpolate(t[0], t[1], 1), "steps"),
        (lambda m, t: m(t[:0]), "tokens: expected"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_model(), sentences())


def test_model_compiles_into_one_graph():
    model, tokens = make_model().float(), sentences()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    weight = torch.tensor(0.5)
    expected = model(tokens, LENGTHS, kl_weight=weight, num_samples=2, seed=seed(1))
    output = compiled(tokens, LENGTHS, kl_weight=weight, num_samples=2, seed=seed(1))
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.kl, expected.kl)
    output.loss.backward()
    gradient = model.code_head.weight.grad.clone()
    model.zero_grad()
    expected.loss.backward()
    torch.testing.assert_close(gradient, model.code_head.weight.grad)


def test_model_under_autocast():
    model, tokens = make_model().float(), sentences()
    plain = model(tokens, seed=seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(tokens, seed=seed(1))
    assert mixed.loss.dtype == mixed.nll.dtype == mixed.kl.dtype == torch.float32
    torch.testing.assert_close(mixed.nll, plain.nll, rtol=0.02, atol=0.02)
    torch.testing.assert_close(mixed.kl, plain.kl, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_that_learns_has_a_gradient(kind):
    """Several processes wait for the gradients of all of them."""
    model = make_model(kind).train()
    model(sentences(), LENGTHS).loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
