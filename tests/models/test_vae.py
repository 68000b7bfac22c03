import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

from fastvae.functional import scale_tril
from fastvae.models import IWAE, VAE
from fastvae.nn import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder, OneHot

LIKELIHOODS = ("gaussian", "bernoulli", "categorical")
POSTERIORS = ("diagonal", "full")
ESTIMATORS = ("reparameterized", "score_function", "score_function_baseline")
SHAPE, CLASSES, LATENT = (3, 5), 4, 3


def seed(value=1):
    return torch.tensor([value])


def make_data(likelihood, batch=7):
    x = torch.rand(batch, *SHAPE, generator=torch.Generator().manual_seed(batch))
    return (x * CLASSES).long() if likelihood == "categorical" else x


def make_model(likelihood="bernoulli", kind=VAE, **settings):
    torch.manual_seed(0)
    categorical = likelihood == "categorical"
    shape = (CLASSES, *SHAPE) if categorical else SHAPE
    encoder = MLPEncoder(shape, (16,))
    if categorical:
        encoder = nn.Sequential(OneHot(CLASSES), encoder)
    return kind(encoder, MLPDecoder(LATENT, shape, (16,)), LATENT, likelihood=likelihood, **settings)


def posterior_of(model, x):
    parameters = model.encode(x)
    if len(parameters) == 2:
        return Normal(parameters[0], (0.5 * parameters[1]).exp())
    return MultivariateNormal(parameters[0], scale_tril=scale_tril(*parameters[1:]))


def kl_of(model, x):
    q = posterior_of(model, x)
    if isinstance(q, Normal):
        return kl_divergence(q, Normal(0.0, 1.0)).sum(-1)
    return kl_divergence(q, MultivariateNormal(torch.zeros(LATENT), torch.eye(LATENT)))


def log_likelihood(model, x, z):
    output = model.decoder(z)
    if model.likelihood == "categorical":
        return -F.cross_entropy(output, x, reduction="none").flatten(1).sum(1)
    if model.likelihood == "bernoulli":
        each = x * F.logsigmoid(output) + (1 - x) * F.logsigmoid(-output)
    else:
        each = Normal(output, math.exp(0.5 * torch.as_tensor(model.log_var).item())).log_prob(x)
    return each.flatten(1).sum(1)


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_terms_of_the_loss(likelihood, posterior):
    model, x = make_model(likelihood, posterior=posterior, beta=2.0), make_data(likelihood)
    output = model(x, num_samples=3, kl_weight=0.25, seed=seed())
    z = model.head(model.encoder(x), num_samples=3, seed=seed()).z
    nll = -torch.stack([log_likelihood(model, x, one) for one in z]).mean(0)
    torch.testing.assert_close(output.nll, nll)
    torch.testing.assert_close(output.kl, kl_of(model, x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.loss, output.nll.mean() + 0.5 * output.kl.mean())
    torch.testing.assert_close(output.neg_elbo, output.nll + output.kl)
    torch.testing.assert_close(output.elbo, -output.neg_elbo)
    assert output.nll.shape == output.kl.shape == (7,)


def test_log_var_of_a_gaussian_likelihood_is_fixed_or_learned():
    x = make_data("gaussian")
    fixed, learned = make_model("gaussian", log_var=-1.5), make_model("gaussian")
    assert "log_var" not in dict(fixed.named_parameters())
    with torch.no_grad():
        learned.log_var.fill_(-1.5)
    torch.testing.assert_close(fixed(x, seed=seed()).loss, learned(x, seed=seed()).loss)
    learned(x, seed=seed()).loss.backward()
    assert learned.log_var.grad.abs() > 0


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_estimator_has_the_same_value_and_trains_every_parameter(likelihood, posterior):
    x, losses, gradients = make_data(likelihood), [], []
    for estimator in ESTIMATORS:
        model = make_model(likelihood, posterior=posterior, estimator=estimator)
        output = model(x, num_samples=2, seed=seed())
        output.loss.backward()
        losses.append(output.loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert all(g is not None and g.isfinite().all() for g in gradients[-1].values())
    assert losses[0] == losses[1] == losses[2]
    for name, first in gradients[0].items():
        same = [torch.allclose(first, other[name]) for other in gradients[1:]]
        assert same == [not name.startswith(("head", "encoder"))] * 2


def test_score_function_is_the_loss_times_the_gradient_of_the_log_density():
    x = make_data("bernoulli")
    for estimator in ESTIMATORS[1:]:
        model = make_model(estimator=estimator)
        if estimator == "score_function_baseline":
            model.baseline.fill_(7.5)
            model.baseline_batches.fill_(10)
        output = model(x, num_samples=2, kl_weight=0.0, seed=seed())
        weight = model.head.linear.weight
        (grad,) = torch.autograd.grad(output.loss, weight)
        z = model.head(model.encoder(x), num_samples=2, seed=seed()).z.detach()
        f = torch.stack([-log_likelihood(model, x, one) for one in z]).detach()
        if estimator == "score_function_baseline":
            f = f - 7.5
        density = posterior_of(model, x).log_prob(z).sum(-1)
        (expected,) = torch.autograd.grad((f * density).mean(), weight)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_baseline_is_the_running_mean_of_the_batches_before():
    model = make_model(estimator="score_function_baseline")
    means = [model(make_data("bernoulli", n), seed=seed(n)).nll.mean() for n in (2, 5, 9)]
    torch.testing.assert_close(model.baseline, torch.stack(means).mean().detach())
    model.eval()
    model(make_data("bernoulli"))
    assert model.baseline_batches == 3
    assert {"baseline", "baseline_batches"} < set(model.state_dict())


def test_an_infinite_likelihood_does_not_spoil_the_baseline():
    model, x = make_model("gaussian", estimator="score_function_baseline", log_var=0.0), make_data("gaussian")
    x[0] = 1e30
    output = model(x, seed=seed())
    output.loss.backward()
    assert output.loss == math.inf
    assert 0 < model.baseline < 1e3


def test_free_bits_of_a_diagonal_posterior_bound_each_dimension():
    model, x = make_model(free_bits=0.007, beta=3.0), make_data("bernoulli")
    output = model(x, seed=seed())
    apart = kl_divergence(posterior_of(model, x), Normal(0.0, 1.0)).mean(0)
    assert apart.min() < 0.007 < apart.max(), "the case must have dimensions on both sides"
    charged = sum(max(0.007, value) for value in apart.tolist())
    assert output.loss.item() == pytest.approx(output.nll.mean().item() + 3 * charged, rel=1e-5)
    torch.testing.assert_close(output.kl.mean(), apart.sum())


@pytest.mark.parametrize("free_bits", [0.001, 1.0])
def test_free_bits_of_a_full_posterior_bound_the_whole(free_bits):
    model, x = make_model(posterior="full", free_bits=free_bits), make_data("bernoulli")
    output = model(x, seed=seed())
    charged = max(LATENT * free_bits, output.kl.mean().item())
    assert output.loss.item() == pytest.approx(output.nll.mean().item() + charged, rel=1e-5)
    torch.testing.assert_close(output.kl, kl_of(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_importance_weighted_bound(likelihood, posterior):
    model, x = make_model(likelihood, IWAE, posterior=posterior, num_samples=5), make_data(likelihood)
    output = model(x, seed=seed())
    z, log_ratio, kl = model.head.weighted_samples(model.encoder(x), 5, seed=seed())
    terms = torch.stack([log_likelihood(model, x, one) for one in z])
    expected = (terms + log_ratio).logsumexp(0) - math.log(5)
    torch.testing.assert_close(output.loss, -expected.mean())
    torch.testing.assert_close(output.nll, -terms.mean(0))
    torch.testing.assert_close(output.kl, kl)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    annealed = model(x, num_samples=3, kl_weight=0.0, seed=seed())
    z, _, _ = model.head.weighted_samples(model.encoder(x), 3, seed=seed())
    terms = torch.stack([log_likelihood(model, x, one) for one in z])
    torch.testing.assert_close(annealed.loss, (math.log(3) - terms.logsumexp(0)).mean())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_importance_weighted_nll_is_the_mean_over_samples_in_any_chunks(likelihood):
    model, x = make_model(likelihood).train(), make_data(likelihood)
    whole = model.importance_weighted_nll(x, num_samples=2000, chunk=2000)
    chunks = model.importance_weighted_nll(x, num_samples=2000, chunk=300)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(whole, chunks, rtol=0.01, atol=0.05)
    # The prior as posterior makes it the plain average of p(x|z).
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.zero_()
    z = torch.randn(20_000, LATENT)
    inputs = x[:1].expand(len(z), *SHAPE)
    average = math.log(len(z)) - log_likelihood(model, inputs, z).logsumexp(0).item()
    ours = model.importance_weighted_nll(x[:1], num_samples=20_000, chunk=7000)
    assert ours.item() == pytest.approx(average, abs=0.05)
    assert model.training


def test_one_sample_estimates_the_negative_elbo():
    model, x = make_model(), make_data("bernoulli", 1)
    with torch.no_grad():
        elbo = model(x, num_samples=20_000).neg_elbo
    many = x.expand(20_000, *SHAPE)
    ours = model.importance_weighted_nll(many, num_samples=1).mean()
    assert ours.item() == pytest.approx(elbo.item(), abs=0.03)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_means_of_the_likelihood(likelihood):
    model, x = make_model(likelihood), make_data(likelihood)
    z = torch.randn(5, LATENT)
    mean, output = model.decode(z), model.decoder(z)
    expected = {"gaussian": output, "bernoulli": output.sigmoid(), "categorical": output.softmax(1)}[likelihood]
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(model.reconstruct(x), model.decode(model.encode(x)[0]).detach())
    samples = [model.sample(4, generator=torch.Generator().manual_seed(value)) for value in (1, 1, 2)]
    assert samples[0].shape == (4, *mean.shape[1:])
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_evaluation_is_without_dropout_and_leaves_modes_alone():
    torch.manual_seed(0)
    encoder = nn.Sequential(MLPEncoder(SHAPE, (16,)), nn.Dropout(0.5))
    decoder = nn.Sequential(nn.Dropout(0.5), MLPDecoder(LATENT, SHAPE))
    model, x = VAE(encoder, decoder, LATENT, likelihood="bernoulli"), make_data("bernoulli")
    decoder.eval()
    assert torch.equal(model.reconstruct(x), model.reconstruct(x))
    draws = [model.importance_weighted_nll(x, num_samples=3, generator=torch.Generator().manual_seed(1)) for _ in "ab"]
    assert torch.equal(*draws)
    assert encoder.training
    assert not decoder.training


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 7, 5), (3, 1, 33)])
def test_convolutions_on_images_of_any_size(shape):
    model = VAE(ConvEncoder(shape, (4, 6)), ConvDecoder(2, shape, (6, 4)), 2, likelihood="bernoulli")
    output = model(torch.rand(3, *shape))
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.sample(2).shape == (2, *shape)


def test_categorical_likelihood_of_labels_alone():
    model = VAE(nn.Sequential(OneHot(5), nn.Linear(5, 8)), nn.Linear(2, 5), 2, likelihood="categorical")
    x = torch.randint(5, (9,))
    output = model(x, num_samples=2)
    assert output.nll.shape == (9,)
    assert model.decode(torch.randn(3, 2)).sum(1).allclose(torch.ones(3))


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(15, 6)

    def forward(self, x):
        return self.linear(x.flatten(1))


@pytest.mark.parametrize(
    ("encoder", "features", "count"),
    [
        (MLPEncoder(SHAPE, (9, 8)), None, 8),
        (nn.Sequential(nn.Flatten(), nn.Linear(15, 7), nn.ReLU()), None, 7),
        (nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(15, 7), nn.ReLU(), nn.Linear(7, 5)), nn.ReLU()), None, 5),
        (nn.Sequential(nn.Unflatten(1, (1, 3)), ConvEncoder((1, *SHAPE), (4,))), None, 4 * 2 * 3),
        (Features(), 6, 6),
        (nn.Flatten(), 15, 15),
    ],
)
def test_any_encoder_whose_features_are_known(encoder, features, count):
    model = VAE(encoder, MLPDecoder(2, SHAPE), 2, likelihood="bernoulli", features=features)
    assert model.head.in_features == count
    model(make_data("bernoulli")).loss.backward()


def test_head_is_made_as_the_encoder_is():
    encoder, decoder = MLPEncoder(SHAPE, (4,)).double(), MLPDecoder(2, SHAPE).double()
    model = VAE(encoder, decoder, 2, estimator="score_function_baseline")
    output = model(make_data("gaussian").double())
    assert {output.loss.dtype, output.nll.dtype, output.kl.dtype, model.log_var.dtype} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_half_types_and_autocast_are_near_float32(likelihood, dtype):
    model, x = make_model(likelihood), make_data(likelihood)
    expected = model(x, seed=seed())
    with torch.autocast("cpu", dtype):
        mixed = model(x, seed=seed())
    mixed.loss.backward()
    half = copy.deepcopy(model).to(dtype)
    if likelihood == "categorical":
        half.encoder = nn.Sequential(half.encoder[0], Cast(dtype), half.encoder[1])
        plain = half(x, seed=seed())
    else:
        plain = half(x.to(dtype), seed=seed())
    plain.loss.backward()
    for output in (mixed, plain):
        assert {output.loss.dtype, output.nll.dtype, output.kl.dtype} == {torch.float32}
        torch.testing.assert_close(output.nll, expected.nll, rtol=0.02, atol=0.1)
        torch.testing.assert_close(output.kl, expected.kl, rtol=0.05, atol=0.02)
    assert all(p.grad.isfinite().all() for p in [*model.parameters(), *half.parameters()])


class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (VAE, {"likelihood": "gaussian"}),
        (VAE, {"likelihood": "categorical", "posterior": "full", "free_bits": 0.1,
               "estimator": "score_function_baseline"}),
        (IWAE, {"likelihood": "bernoulli", "num_samples": 3}),
    ],
)  # fmt: skip
def test_compiles_whole(kind, settings):
    torch.compiler.reset()
    model, x = make_model(kind=kind, **settings), make_data(settings["likelihood"])
    expected = copy.deepcopy(model)(x, seed=seed())
    expected.loss.backward()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for weight in (1.0, 0.5):
        output = compiled(x, kl_weight=torch.tensor(weight), seed=seed())
    output = compiled(x, kl_weight=torch.tensor(1.0), seed=seed())
    torch.testing.assert_close(output.nll, expected.nll)
    torch.testing.assert_close(output.loss, expected.loss)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", [VAE, IWAE])
def test_trains_under_distributed_data_parallel(kind, tmp_path):
    settings = {"estimator": "score_function_baseline"} if kind is VAE else {"num_samples": 3}
    model, x = make_model(kind=kind, **settings), make_data("bernoulli")
    expected = copy.deepcopy(model)(x, seed=seed()).loss
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second finds what the first left unused
            output = parallel(x, seed=seed())
            output.loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(output.loss, expected)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", [VAE, IWAE])
def test_config_state_and_copies(kind):
    model, x = make_model(kind=kind, posterior="full"), make_data("bernoulli")
    again = kind(copy.deepcopy(model.encoder), MLPDecoder(**model.decoder.config), **model.config)
    again.load_state_dict(model.state_dict())
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, seed=seed()).loss, model(x, seed=seed()).loss)


def test_randomness_follows_seed_and_generator():
    model, x = make_model(), make_data("bernoulli")
    by_seed = [model(x, seed=seed(value)).nll for value in (1, 1, 2)]
    by_generator = [model(x, generator=torch.Generator().manual_seed(value)).nll for value in (1, 1, 2)]
    for first, same, other in (by_seed, by_generator):
        assert torch.equal(first, same)
        assert not torch.equal(first, other)


@pytest.mark.parametrize("log_var", [-1e4, -41.0, 41.0, 1e4])
@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_extreme_variances_stay_finite(estimator, posterior, log_var):
    for likelihood in LIKELIHOODS:
        model, x = make_model(likelihood, posterior=posterior, estimator=estimator), make_data(likelihood)
        with torch.no_grad():
            model.head.linear.bias[LATENT : 2 * LATENT] = log_var
        output = model(x, seed=seed())
        output.loss.backward()
        assert output.nll.isfinite().all()
        assert output.kl.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert model.importance_weighted_nll(x, num_samples=3).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_huge_means_are_never_nan(posterior, likelihood, dtype):
    big = 6e4 if dtype == torch.float16 else 1e20
    for estimator in ESTIMATORS:
        torch.manual_seed(0)
        model = VAE(nn.Flatten(), MLPDecoder(LATENT, SHAPE, ()), LATENT, likelihood=likelihood, posterior=posterior,
                    estimator=estimator, features=15).to(dtype)  # fmt: skip
        with torch.no_grad():
            model.head.linear.bias[0] = big
        output = model(make_data(likelihood).to(dtype), seed=seed())
        output.loss.backward()
        assert not output.loss.isnan()
        assert not output.nll.isnan().any()
        assert output.kl.isfinite().all()
        if output.loss.isfinite() and dtype != torch.float16:  # where the gradients themselves are out of range
            assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: m(x[:0]), ValueError, "x: expected shape"),
        (lambda m, x: m(x[:, :2]), ValueError, "x: expected shape"),
        (lambda m, x: m(x.long()), TypeError, "x: expected float32"),
        (lambda m, x: m(x.numpy()), TypeError, "x: expected a tensor"),
        (lambda m, x: m(x + 1), ValueError, r"target: expected values in \[0, 1\]"),
        (lambda m, x: m(x, num_samples=0), ValueError, "num_samples"),
        (lambda m, x: m(x, seed=torch.tensor(1)), ValueError, "seed"),
        (lambda m, x: m(x, seed=seed(), generator=torch.Generator()), ValueError, "seed"),
        (lambda m, x: m.importance_weighted_nll(x, num_samples=0), ValueError, "num_samples"),
        (lambda m, x: m.importance_weighted_nll(x, chunk=0), ValueError, "chunk"),
        (lambda m, x: m.sample(0), ValueError, "n: expected"),
        (lambda m, x: m.decode(torch.zeros(2, 9)), ValueError, "z: expected"),
        (lambda m, x: make_model("poisson"), ValueError, "likelihood: expected"),
        (lambda m, x: make_model(posterior="banded"), ValueError, "posterior: expected"),
        (lambda m, x: make_model(estimator="rebar"), ValueError, "estimator: expected"),
        (lambda m, x: make_model(beta=-1.0), ValueError, "beta: expected"),
        (lambda m, x: make_model(beta=math.nan), ValueError, "beta: expected"),
        (lambda m, x: make_model(free_bits=-0.1), ValueError, "free_bits: expected"),
        (lambda m, x: make_model(log_var=0.0), ValueError, "log_var: expected None"),
        (lambda m, x: make_model(kind=IWAE, num_samples=0), ValueError, "num_samples: expected"),
        (lambda m, x: VAE(m.encoder, m.decoder, 0), ValueError, "latent_dim: expected"),
        (lambda m, x: VAE(Features(), m.decoder, 2), ValueError, "features: expected"),
        (lambda m, x: VAE(nn.Flatten(), m.decoder, LATENT, features=3)(x), ValueError, "encoder: expected features"),
        (lambda m, x: VAE(m.encoder, nn.Linear(2, 15), 2)(x), ValueError, r"decoder: expected .*\(rows, 3, 5\)"),
        (
            lambda m, x: make_model("categorical")(make_data("categorical") + 1),
            (ValueError, RuntimeError),
            "x: expected classes|smaller than num_classes",
        ),
        (lambda m, x: make_model("categorical")(x), TypeError, "x: expected an int64"),
        (
            lambda m, x: VAE(nn.Sequential(OneHot(9), MLPEncoder((9, *SHAPE))), MLPDecoder(2, (CLASSES, *SHAPE)), 2,
                             likelihood="categorical")(make_data("categorical") + 5),
            ValueError,
            r"x: expected classes in \[0, 4\)",
        ),
        (
            lambda m, x: VAE(nn.Sequential(OneHot(4), MLPEncoder((4, *SHAPE))), MLPDecoder(2, SHAPE), 2,
                             likelihood="categorical")(make_data("categorical")),
            ValueError,
            r"decoder: expected .*\(rows, classes, 3, 5\)",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(make_model(), make_data("bernoulli"))


def test_bernoulli_takes_soft_targets():
    model = make_model()
    x = make_data("bernoulli")
    z = model.head(model.encoder(x), seed=seed()).z
    expected = Bernoulli(logits=model.decoder(z))
    entropy = -(x * expected.probs.log() + (1 - x) * (1 - expected.probs).log()).flatten(1).sum(1)
    torch.testing.assert_close(model(x, seed=seed()).nll, entropy)
