import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from fastvae.functional import scale_tril
from fastvae.nn import FullGaussianHead, GaussianHead

SEED = torch.tensor([5])


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = FullGaussianHead(6, 4, dtype=torch.float64)
    with torch.no_grad():
        head.linear.weight[8:].normal_()
        head.linear.bias[8:].normal_()
    return head


def distribution(head, hidden):
    mean, log_diagonal, lower = head.parameters_of(hidden)
    return MultivariateNormal(mean, scale_tril=scale_tril(log_diagonal, lower))


def test_kl_and_density_are_those_of_torch_distributions(head):
    hidden = torch.randn(5, 6, dtype=torch.float64)
    z, kl, *parameters = head(hidden, num_samples=3, seed=SEED)
    q, p = distribution(head, hidden), MultivariateNormal(torch.zeros(4).double(), torch.eye(4).double())
    torch.testing.assert_close(kl, kl_divergence(q, p))
    torch.testing.assert_close(head.log_density(z, *parameters), q.log_prob(z))
    samples = head.weighted_samples(hidden, 3, seed=SEED)
    assert torch.equal(samples.z, z)
    assert torch.equal(samples.kl, kl)
    torch.testing.assert_close(samples.log_ratio, p.log_prob(z) - q.log_prob(z))


def test_samples_have_the_posterior_moments(head):
    hidden = torch.randn(1, 6, dtype=torch.float64)
    z = head(hidden, num_samples=40_000, seed=SEED).z.squeeze(1)
    q = distribution(head, hidden)
    spread = q.variance.max().item()
    torch.testing.assert_close(z.mean(0), q.mean.squeeze(0), rtol=0, atol=5 * (spread / 40_000) ** 0.5)
    torch.testing.assert_close(z.T.cov(), q.covariance_matrix.squeeze(0), rtol=0, atol=0.05 * spread)


def test_starts_as_a_diagonal_posterior():
    full, diagonal = FullGaussianHead(6, 4), GaussianHead(6, 4)
    with torch.no_grad():
        diagonal.linear.weight.copy_(full.linear.weight[:8])
        diagonal.linear.bias.copy_(full.linear.bias[:8])
        for parameter in (diagonal.linear.weight, diagonal.linear.bias):
            parameter[4:] *= 2  # log-variances, of log-deviations
    hidden = torch.randn(5, 6)
    ours, expected = full(hidden, seed=SEED), diagonal(hidden, seed=SEED)
    torch.testing.assert_close(ours.z, expected.z, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.kl, expected.kl)
    ours.kl.sum().backward()
    assert full.linear.weight.grad[:8].abs().sum() > 0


def test_diagonal_density_and_weights(head):
    head, hidden = GaussianHead(6, 4, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    z, kl, mean, log_var = head(hidden, num_samples=3, seed=SEED)
    q, p = Normal(mean, (0.5 * log_var).exp()), Normal(torch.zeros(4).double(), 1.0)
    torch.testing.assert_close(head.log_density(z, mean, log_var), q.log_prob(z).sum(-1))
    samples = head.weighted_samples(hidden, 3, seed=SEED)
    torch.testing.assert_close(samples.z, z, rtol=0, atol=1e-5)  # the noise is float32's
    torch.testing.assert_close(samples.kl, kl)
    expected = (p.log_prob(samples.z) - q.log_prob(samples.z)).sum(-1)
    torch.testing.assert_close(samples.log_ratio, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [GaussianHead, FullGaussianHead])
def test_gradients_of_density_and_weights(kind):
    torch.manual_seed(0)
    head = kind(3, 2, dtype=torch.float64)
    hidden = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    z = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, z: head.log_density(z, *head.parameters_of(h)), (hidden, z))
    assert torch.autograd.gradcheck(lambda h: tuple(head.weighted_samples(h, 3, seed=SEED)), (hidden,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_compute_in_float32(dtype):
    head = FullGaussianHead(6, 4, dtype=dtype)
    z, kl, *parameters = head(torch.randn(5, 6, dtype=dtype), num_samples=2, seed=SEED)
    assert z.dtype == dtype
    assert kl.dtype == head.log_density(z, *parameters).dtype == torch.float32


def test_autocast_keeps_the_parameters_precision():
    head, hidden = FullGaussianHead(6, 4), torch.randn(5, 6)
    plain = head.weighted_samples(hidden, 2, seed=SEED)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head.weighted_samples(hidden, 2, seed=SEED)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_wrong_arguments_are_named(head):
    with pytest.raises(ValueError, match="hidden: expected"):
        head(torch.randn(5, 7))
    with pytest.raises(ValueError, match="latent_dim"):
        FullGaussianHead(6, 0)
    with pytest.raises(ValueError, match="num_samples"):
        head(torch.randn(5, 6), num_samples=0)
