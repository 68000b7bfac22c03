"""Models against exact mathematics: PCA, closed forms, exact posteriors and likelihoods, and digits."""

import math

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import nn
from torch.distributions import MultivariateNormal

from bench.estimators import ESTIMATORS, given_posterior, gradients, measure
from fastvae.functional import mutual_information, scale_tril
from fastvae.models import IWAE, VAE, DenoisingAutoEncoder, LinearAutoEncoder
from fastvae.nn import MLPDecoder, MLPEncoder


def seed(value):
    return torch.tensor([value])


def correlated(rows, features, strength=3.0):
    """Data with a mean, and a spectrum that falls by the same factor from one component to the next."""
    generator = torch.Generator().manual_seed(features)
    basis = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64)).Q
    scales = strength * 0.6 ** torch.arange(features, dtype=torch.float64)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64) * scales
    return x @ basis.T + torch.randn(features, generator=generator, dtype=torch.float64)


def minimise(model, loss, steps=150):
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def train(model, x, steps, *, lr=0.02, batch=None, **options):
    """Adam whose rate falls to 0."""
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        rows = x if batch is None else x[torch.randint(len(x), (batch,))]
        optimizer.zero_grad()
        model(rows, seed=seed(step), **options).loss.backward()
        optimizer.step()
        schedule.step()


# ------------------------------------------------------------------------------------------- auto-encoders
@pytest.mark.parametrize("tied", [True, False])
def test_linear_auto_encoder_finds_the_principal_subspace(tied):
    torch.manual_seed(0)
    x = correlated(60, 8)
    model = LinearAutoEncoder(8, 3, tied=tied, dtype=torch.float64)
    minimise(model, lambda: model(x).loss)
    pca = PCA(3).fit(x.numpy())
    components = torch.from_numpy(pca.components_).T
    ours = torch.linalg.qr(model.decoder.detach().T).Q
    outside = ours - components @ (components.T @ ours)
    assert math.asin(torch.linalg.matrix_norm(outside, 2).item()) < 1e-3
    spectrum = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0)) / len(x))
    assert model(x).loss.item() == pytest.approx(0.5 * spectrum[:-3].sum().item(), rel=1e-6)
    torch.testing.assert_close(model.reconstruct(x), torch.from_numpy(pca.inverse_transform(pca.transform(x.numpy()))),
                               rtol=0, atol=1e-3)  # fmt: skip


@pytest.mark.parametrize(("noise", "level"), [("masking", 0.4), ("gaussian", 0.7)])
def test_linear_denoising_auto_encoder_is_the_closed_form(noise, level):
    x = correlated(20, 4, strength=1.5)
    second = x.T @ x / len(x)
    if noise == "masking":
        keep = 1 - level
        corrupted = keep**2 * second + torch.diag((keep - keep**2) * second.diagonal())
        expected = keep * second @ torch.linalg.inv(corrupted)
    else:
        expected = second @ torch.linalg.inv(second + level**2 * torch.eye(4))
    # With one seed the corruption is fixed and the loss an exact least-squares problem; seeds differ by the draws.
    many, solutions = x.repeat(100, 1), []
    for draw in range(12):
        linear = nn.Linear(4, 4, bias=False, dtype=torch.float64)
        model = DenoisingAutoEncoder(linear, nn.Identity(), noise=noise, level=level)
        minimise(model, lambda model=model, draw=draw: model(many, seed=seed(draw)).loss, 100)
        solutions.append(linear.weight.detach())
    solutions = torch.stack(solutions)
    error = solutions.std(0) / len(solutions) ** 0.5
    assert error.max() < 0.02
    assert ((solutions.mean(0) - expected).abs() < 5 * error).all()
    assert (expected - torch.eye(4)).abs().max() > 0.1, "the case must differ from no corruption"


# --------------------------------------------------------------------------------------- linear Gaussian VAE
def linear_vae(features, latent_dim, kind=VAE, **settings):
    torch.manual_seed(0)
    model = kind(MLPEncoder((features,), ()), MLPDecoder(latent_dim, (features,), ()), latent_dim, **settings)
    return model.double()


def exact_posterior(model, x):
    """log p(x), mean (batch, latent) and covariance of p(z|x), for a linear decoder."""
    weight, bias = (p.detach() for p in model.decoder[0].parameters())
    variance = math.exp(torch.as_tensor(model.log_var).item())
    covariance = weight @ weight.T + variance * torch.eye(len(weight))
    posterior = variance * torch.linalg.inv(weight.T @ weight + variance * torch.eye(weight.shape[1]))
    mean = (x - bias) @ weight @ posterior / variance
    return MultivariateNormal(bias, covariance).log_prob(x), mean, posterior


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
def test_linear_vae_reaches_the_likelihood_of_probabilistic_pca(posterior):
    x = correlated(150, 6, strength=2.0)
    model = linear_vae(6, 2, posterior=posterior)
    minimise(model, lambda: model(x, num_samples=20, seed=seed(0)).loss)
    exact = PCA(2).fit(x.numpy()).score(x.numpy())
    with torch.no_grad():
        draws = model(x, num_samples=500, seed=seed(-1)).elbo.mean().item()
    assert draws == pytest.approx(exact, rel=0.005)
    assert draws < exact + 0.01
    log_likelihood, mean, _ = exact_posterior(model, x)
    assert log_likelihood.mean().item() == pytest.approx(exact, rel=0.005)
    torch.testing.assert_close(model.encode(x)[0].detach(), mean, rtol=0, atol=0.1)


def test_full_posterior_learns_the_analytic_one():
    x = correlated(100, 5, strength=1.0)
    model = linear_vae(5, 3, posterior="full", log_var=-1.0)
    model.decoder.requires_grad_(False)
    _, mean, covariance = exact_posterior(model, x)
    assert (covariance - covariance.diag().diag()).abs().max() > 0.1, "the posterior must not be diagonal"
    minimise(model.head, lambda: model(x, num_samples=100, seed=seed(0)).loss, 80)
    learned, *factor = (p.detach() for p in model.encode(x))
    factor = scale_tril(*factor)
    torch.testing.assert_close(learned, mean, rtol=0, atol=0.05)
    learned = factor @ factor.mT
    torch.testing.assert_close(learned.mean(0), covariance, rtol=0, atol=0.02)
    torch.testing.assert_close(learned, covariance.expand(100, 3, 3), rtol=0, atol=0.1)


def test_every_sample_of_the_exact_posterior_weighs_the_same():
    """p(x, z) / q(z|x) = p(x) for all z: density, likelihood, KL and bounds at once, without any noise."""
    x = correlated(7, 5)
    model = linear_vae(5, 3, posterior="full", log_var=-0.5)
    log_likelihood, _, covariance = exact_posterior(model, x)
    weight, bias = (p.detach() for p in model.decoder[0].parameters())
    factor = torch.linalg.cholesky(covariance)
    rows, columns = torch.tril_indices(3, 3, -1)
    head = model.head.linear
    with torch.no_grad():
        head.weight.zero_()
        head.weight[:3] = covariance @ weight.T * math.exp(0.5)
        head.bias[:3] = -head.weight[:3] @ bias
        head.bias[3:] = torch.cat([factor.diagonal().log(), factor[rows, columns]])
        z, log_ratio, _ = model.head.weighted_samples(model.encoder(x), 9, seed=seed(1))
        torch.testing.assert_close(log_ratio - model.nll(x, z), log_likelihood.expand(9, 7))
        torch.testing.assert_close(-model.importance_weighted_nll(x, num_samples=3, chunk=2), log_likelihood)
        elbo = model(x, num_samples=20_000, seed=seed(1)).elbo
    torch.testing.assert_close(elbo, log_likelihood, rtol=0, atol=0.05)


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
def test_importance_weighted_bound_rises_with_samples_to_the_likelihood(posterior):
    x = correlated(20, 4, strength=1.0)
    model = linear_vae(4, 2, IWAE, posterior=posterior, log_var=0.0)
    with torch.no_grad():
        model.head.linear.weight.zero_()  # q near the prior: far from p(z|x), but with bounded weights
        model.head.linear.bias.zero_()
        model.head.linear.bias[-1] = 0.3
    exact = exact_posterior(model, x)[0].mean().item()
    bounds = []
    for samples in (1, 4, 16, 2048):
        with torch.no_grad():
            draws = [-model(x, num_samples=samples, seed=seed(s)).loss for s in range(max(4, 800 // samples))]
        bounds.append(torch.stack(draws))
    means = [b.mean().item() for b in bounds]
    errors = [b.std().item() / len(b) ** 0.5 for b in bounds]
    for i in range(3):
        assert means[i + 1] - means[i] > 2 * (errors[i] + errors[i + 1])
    assert means[0] < exact - 0.1
    assert means[-1] == pytest.approx(exact, abs=0.005)
    nll = model.importance_weighted_nll(x, num_samples=4096, chunk=1000).mean().item()
    assert -nll == pytest.approx(exact, abs=0.01)


# ------------------------------------------------------------------------------------------- score function
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("posterior", ["diagonal", "full"])
def test_gradient_estimators_have_the_exact_mean(posterior, estimator):
    """A linear decoder: E_q[-log p(x|z)] = 1/2 |x - W mean - b|^2 + 1/2 |W L|^2 + constant."""
    torch.manual_seed(0)
    draws, latent_dim = 50_000, 3
    decoder = nn.Linear(latent_dim, 5, dtype=torch.float64)
    x = 2 * torch.randn(5, dtype=torch.float64)
    row = torch.randn(6 if posterior == "diagonal" else 9, dtype=torch.float64) * 0.5
    model = given_posterior(row.repeat(draws, 1), decoder, latent_dim, posterior=posterior, estimator=estimator,
                            log_var=0.0)  # fmt: skip
    many = x.expand(draws, -1)
    for step in range(4):
        model(many, seed=seed(-1 - step))  # the baseline's batches
    drawn = gradients(model, many, 0)
    row.requires_grad_()
    mean, spread = row[:3], row[3:6]
    factor = scale_tril(spread, row[6:]) if posterior == "full" else (0.5 * spread).exp().diag()
    expected = 0.5 * ((x - decoder(mean)).square().sum() + (decoder.weight @ factor).square().sum())
    (expected,) = torch.autograd.grad(expected, row)
    error = drawn.std(0) / draws**0.5
    assert ((drawn.mean(0) - expected).abs() < 4.5 * error).all()
    assert (expected.abs() / error).max() > 10, "the case must be able to fail"


def test_variance_of_the_score_function_is_higher_and_a_baseline_lowers_it():
    rows = measure(8, data=20, draws=100, epochs=3)
    by_estimator = {row["estimator"]: row["variance"] for row in rows}
    assert by_estimator["reparameterized"] * 5 < by_estimator["score_function_baseline"]
    assert by_estimator["score_function_baseline"] * 5 < by_estimator["score_function"]


# --------------------------------------------------------------------------------------------------- digits
@pytest.fixture(scope="module")
def digits():
    return torch.tensor(load_digits().images / 16, dtype=torch.float32)


def digits_vae(digits, steps=250, **settings):
    torch.manual_seed(0)
    encoder, decoder = MLPEncoder((8, 8), (64,)), MLPDecoder(8, (8, 8), (64,))
    model = VAE(encoder, decoder, 8, likelihood="bernoulli", **settings)
    train(model, digits, steps, lr=5e-3, batch=128)
    return model.eval()


@torch.no_grad()
def terms(model, digits):
    output = model(digits, num_samples=4, seed=seed(-1))
    return output.nll.mean().item(), output.kl.mean().item()


def test_vae_of_digits(digits):
    model = digits_vae(digits)
    nll, kl = terms(model, digits)
    blank = model.nll(digits, torch.zeros(len(digits), 8)).mean().item()
    assert nll < blank - 3, "z must tell something of x"
    iw_nll = model.importance_weighted_nll(digits, num_samples=50).mean().item()
    assert nll + kl - 3 < iw_nll < nll + kl - 0.1
    samples = model.sample(2000, generator=torch.Generator().manual_seed(0))
    assert (samples.mean(0) - digits.mean(0)).abs().max() < 0.08
    assert (samples.mean(0) - digits.mean(0)).abs().mean() < 0.02
    mean, log_var = (p.detach() for p in model.encode(digits))
    information = mutual_information(mean, log_var, seed=seed(0)).item()
    assert 1 < information < min(kl + 0.05, math.log(len(digits)) + 0.05)
    active = mean.var(0) > 0.01
    assert 2 <= active.sum() <= 8
    assert (1 - log_var[:, active].exp().mean(0) > 0.05).all(), "an active unit is one that x narrows"


def test_more_beta_means_less_kl_and_a_worse_reconstruction(digits):
    nlls, kls = zip(*(terms(digits_vae(digits, beta=beta), digits) for beta in (0.1, 0.5, 2.0, 8.0)), strict=True)
    assert list(kls) == sorted(kls, reverse=True)
    assert list(nlls) == sorted(nlls)
    assert kls[0] > 4 * kls[2] + 1
    assert nlls[2] > nlls[0] + 1


@pytest.mark.slow
@pytest.mark.parametrize("posterior", ["diagonal", "full"])
def test_free_bits_hold_the_kl_at_the_floor(digits, posterior):
    settings = {"steps": 400, "beta": 4.0, "posterior": posterior}
    _, collapsed = terms(digits_vae(digits, **settings), digits)
    model = digits_vae(digits, free_bits=0.5, **settings)
    _, kl = terms(model, digits)
    assert collapsed < 0.5 * kl
    assert kl == pytest.approx(8 * 0.5, rel=0.1)
    if posterior == "diagonal":
        with torch.no_grad():
            apart = model.head(model.encoder(digits), reduction="none").kl.mean(0)
        torch.testing.assert_close(apart, torch.full((8,), 0.5), rtol=0.15, atol=0)
