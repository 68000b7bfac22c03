import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastvae.nn import GaussianHead


@pytest.fixture
def head():
    torch.manual_seed(0)
    return GaussianHead(6, 4)


def test_kl_is_that_of_torch_distributions(head):
    hidden = torch.randn(5, 6)
    _, kl, mean, log_var = head(hidden)
    expected = kl_divergence(Normal(mean, (0.5 * log_var).exp()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-6)


def test_mean_and_log_var_are_the_halves_of_one_linear_layer(head):
    hidden = torch.randn(5, 6)
    mean, log_var = head.parameters_of(hidden)
    torch.testing.assert_close(torch.cat([mean, log_var], -1), head.linear(hidden))


def test_samples_have_the_posterior_moments(head):
    hidden = torch.randn(3, 6)
    posterior = head(hidden, num_samples=20_000, seed=torch.tensor([1]))
    assert posterior.z.shape == (20_000, 3, 4)
    deviation = (0.5 * posterior.log_var).exp()
    torch.testing.assert_close(posterior.z.mean(0), posterior.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(posterior.z.std(0), deviation, rtol=0.03, atol=0)


def test_reduction_none_sums_to_the_kl(head):
    hidden = torch.randn(5, 6)
    apart = head(hidden, reduction="none").kl
    assert apart.shape == (5, 4)
    torch.testing.assert_close(apart.sum(-1), head(hidden).kl)


def test_randomness_follows_seed_and_generator(head):
    hidden = torch.randn(5, 6)
    by_seed = [head(hidden, seed=torch.tensor([value])).z for value in (7, 7, 8)]
    assert torch.equal(by_seed[0], by_seed[1])
    assert not torch.equal(by_seed[0], by_seed[2])
    by_generator = [head(hidden, generator=torch.Generator().manual_seed(3)).z for _ in range(2)]
    assert torch.equal(*by_generator)


def test_autocast_keeps_the_parameters_precision(head):
    hidden = torch.randn(5, 6)
    plain = head.parameters_of(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head.parameters_of(hidden)
    assert torch.equal(plain[0], mixed[0])
    assert torch.equal(plain[1], mixed[1])


def test_wrong_arguments_are_named(head):
    with pytest.raises(ValueError, match="hidden: expected"):
        head(torch.randn(5, 7))
    with pytest.raises(ValueError, match="latent_dim"):
        GaussianHead(6, 0)


def test_fused_gives_the_same_numbers_and_gradients(head):
    fused = GaussianHead(6, 4, fused=True)
    fused.load_state_dict(head.state_dict())
    hidden, seed = torch.randn(5, 6, requires_grad=True), torch.tensor([3])
    for how in ({}, {"num_samples": 3, "reduction": "none"}):
        ours, two = fused(hidden, seed=seed, **how), head(hidden, seed=seed, **how)
        torch.testing.assert_close(tuple(ours), tuple(two), rtol=0, atol=0)
        grads = [
            torch.autograd.grad([o.square().sum() for o in outputs], (hidden, *layer.parameters()))
            for outputs, layer in ((ours, fused), (two, head))
        ]
        torch.testing.assert_close(*grads)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fused(hidden.bfloat16(), seed=seed)
    torch.testing.assert_close(mixed.kl, fused(hidden.bfloat16().float(), seed=seed).kl)
    with pytest.raises(ValueError, match="hidden: expected"):
        fused(torch.randn(5, 7))
