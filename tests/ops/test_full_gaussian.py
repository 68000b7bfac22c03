"""Full-covariance sampling + KL, both CPU backends: definition, error budget, noise, clamp, moments, op contract."""

import math

import pytest
import torch
from cases import DTYPES
from torch.distributions import MultivariateNormal, kl_divergence

from fastvae.functional import full_gaussian_sample_kl, gaussian_sample_kl, scale_tril
from fastvae.ops import random

SEED = torch.tensor([123456789012345])
# A triangle of more than 91 rows is computed in pieces.
SHAPES = [(1,), (1, 1), (2,), (7, 33), (33, 7), (257, 3), (3, 130), (2, 3, 5), (64, 32), (5, 91), (5, 92)]


def pairs(latent):
    return latent * (latent - 1) // 2


def operands(shape, dtype):
    torch.manual_seed(0)
    mean, log_diagonal = torch.randn(2, *shape).to(dtype)
    lower = (torch.randn(*shape[:-1], pairs(shape[-1])) / max(1, shape[-1]) ** 0.5).to(dtype)
    return [tensor.requires_grad_() for tensor in (mean, log_diagonal, lower)]


def factor(log_diagonal, lower):
    """L, written another way than the definition."""
    latent = log_diagonal.shape[-1]
    rows, columns = torch.tril_indices(latent, latent, -1)
    below = lower.new_zeros(*lower.shape[:-1], latent, latent)
    below[..., rows, columns] = lower
    return below + torch.diag_embed(log_diagonal.exp())


def eager(mean, log_diagonal, lower, noise):
    """What a user writes, with the noise given."""
    tril = factor(log_diagonal, lower)
    z = mean + (tril @ noise.to(mean.dtype).unsqueeze(-1)).squeeze(-1)
    kl = 0.5 * (mean.square().sum(-1) + tril.square().sum((-2, -1)) - mean.shape[-1]) - log_diagonal.sum(-1)
    return z, kl


def noise_of(shape, num_samples):
    """The backend's own noise: z of a standard normal. In float64 nothing is rounded on the way."""
    zeros = torch.zeros(shape, dtype=torch.float64)
    return gaussian_sample_kl(zeros, zeros, num_samples=num_samples, seed=SEED)[0]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, backend, assert_within_budget):
    num_samples = None if shape[0] % 2 else 3
    ours = operands(shape, dtype)
    peer = [tensor.detach().clone().requires_grad_() for tensor in ours]
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    noise = noise_of(shape, num_samples)

    outputs = full_gaussian_sample_kl(*ours, num_samples=num_samples, seed=SEED)
    exact_outputs, peer_outputs = (eager(*x, noise) for x in (exact, peer))
    assert outputs[0].dtype == dtype
    assert outputs[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    torch.manual_seed(1)
    grad_outputs = [torch.randn(o.shape).to(o.dtype) for o in outputs]
    results = [*outputs, *torch.autograd.grad(outputs, ours, grad_outputs)]
    references = []
    for made, leaves in ((exact_outputs, exact), (peer_outputs, peer)):
        upstream = [g.to(o.dtype) for g, o in zip(grad_outputs, made, strict=True)]
        references.append([*made, *torch.autograd.grad(made, leaves, upstream)])
    names = ["z", "kl", "grad_mean", "grad_log_diagonal", "grad_lower"]
    for name, mine, truth, other in zip(names, results, *references, strict=True):
        # Half precision: computed in float32 and rounded once, at most half a unit away.
        # In float64 the peer is the definition itself and leaves no room for the order of a sum.
        assert_within_budget(name, mine, truth, other, {torch.float32: 4, torch.float64: 16}.get(mine.dtype, 0.5))


@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_correlation_it_is_the_diagonal_family(dtype, num_samples, backend):
    mean, log_diagonal, lower = operands((7, 33), dtype)
    log_diagonal.data[0] *= 1e-4  # a small divergence keeps its digits
    mean.data[0] *= 1e-4
    lower.data.zero_()
    ours = full_gaussian_sample_kl(mean, log_diagonal, lower, num_samples=num_samples, seed=SEED)
    theirs = gaussian_sample_kl(mean, 2 * log_diagonal, num_samples=num_samples, seed=SEED)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=0)
    leaves = (mean, log_diagonal)
    grads = [torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs]) for outputs in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=4 * tolerance, atol=8 * tolerance)


def test_kl_is_that_of_torch_distributions(backend):
    mean, log_diagonal, lower = operands((33, 7), torch.float64)
    posterior = MultivariateNormal(mean, scale_tril=factor(log_diagonal, lower))
    prior = MultivariateNormal(torch.zeros(7, dtype=torch.float64), torch.eye(7, dtype=torch.float64))
    ours = full_gaussian_sample_kl(mean, log_diagonal, lower)[1]
    torch.testing.assert_close(ours, kl_divergence(posterior, prior), rtol=1e-12, atol=1e-12)


def test_samples_have_the_mean_and_the_covariance(backend):
    samples, latent = 40_000, 5
    mean, log_diagonal, lower = (t.detach() for t in operands((3, latent), torch.float64))
    z, kl = full_gaussian_sample_kl(mean, log_diagonal, lower, num_samples=samples, seed=SEED)
    tril = factor(log_diagonal, lower)
    covariance = tril @ tril.mT
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    assert ((z.mean(0) - mean).abs() < 5 * (variance / samples).sqrt()).all()
    centered = z - mean
    estimate = torch.einsum("sni, snj -> nij", centered, centered) / samples
    # Var(z_i z_j) = C_ii C_jj + C_ij^2 (Isserlis)
    standard_error = ((variance[:, :, None] * variance[:, None, :] + covariance.square()) / samples).sqrt()
    assert ((estimate - covariance).abs() < 5 * standard_error).all()
    prior = MultivariateNormal(torch.zeros(latent, dtype=torch.float64), torch.eye(latent, dtype=torch.float64))
    log_ratio = MultivariateNormal(mean, scale_tril=tril).log_prob(z) - prior.log_prob(z)
    assert ((log_ratio.mean(0) - kl).abs() < 5 * log_ratio.std(0) / math.sqrt(samples)).all()


@pytest.mark.parametrize("num_samples", [None, 3])
def test_noise_is_the_stream_at_the_flat_index(num_samples, backend):
    zeros, identity = torch.zeros(5, 33), torch.zeros(5, pairs(33))
    z, kl = full_gaussian_sample_kl(zeros, zeros, identity, num_samples=num_samples, seed=SEED)
    expected = random.normal(SEED, torch.arange(z.numel())).reshape(z.shape)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-6)
    assert torch.equal(kl, torch.zeros(5))


def test_more_samples_begin_with_the_fewer(backend):
    leaves = operands((4, 9), torch.float32)
    few, many = (full_gaussian_sample_kl(*leaves, num_samples=n, seed=SEED)[0] for n in (2, 5))
    torch.testing.assert_close(few, many[:2], rtol=1e-6, atol=1e-6)


EXTREMES = [-math.inf, -3e38, -1e4, -21.0, -20.0, -1e-40, 0.0, 20.0, 21.0, 1e4, 3e38, math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_extreme_diagonals_are_finite_and_their_gradients_stop(dtype, backend):
    size = len(EXTREMES)
    log_diagonal = torch.tensor(EXTREMES).repeat(3, 1).to(dtype).requires_grad_()
    mean, lower = torch.ones(3, size, dtype=dtype), torch.ones(3, pairs(size), dtype=dtype).requires_grad_()
    mean.requires_grad_()
    outputs = full_gaussian_sample_kl(mean, log_diagonal, lower, seed=SEED)
    grads = torch.autograd.grad(outputs, [mean, log_diagonal, lower], [torch.ones_like(o) for o in outputs])
    assert all(torch.isfinite(x).all() for x in (*outputs, *grads))
    clamped = full_gaussian_sample_kl(mean, log_diagonal.clamp(-20, 20), lower, seed=SEED)
    assert all(torch.equal(a, b) for a, b in zip(outputs, clamped, strict=True))
    outside = log_diagonal.abs() > 20
    assert (grads[1][outside] == 0).all()
    assert (grads[1][log_diagonal.abs() == 20] != 0).all(), "the bounds are inside, as for torch.clamp"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_extreme_means_and_factors_have_a_finite_divergence(dtype, backend):
    """In the KL's squares a number beyond 1e15 counts as that, and has no gradient."""
    mean = torch.tensor([[1e4, -1e19, 1e20, 3e38]], dtype=dtype, requires_grad=True)
    lower = torch.tensor([[1.0, -1e20, 1e14, 3e38, 0.5, -2.0]], dtype=dtype, requires_grad=True)
    log_diagonal = torch.tensor([[-1e4, 1e4, 0.0, 1.0]], dtype=dtype, requires_grad=True)
    kl = full_gaussian_sample_kl(mean, log_diagonal, lower, seed=SEED)[1]
    grads = torch.autograd.grad(kl, (mean, lower, log_diagonal), torch.ones_like(kl))
    squares = sum(t.detach().double().clamp(-1e15, 1e15).square().sum() for t in (mean, lower))
    torch.testing.assert_close(kl[0].double(), squares / 2, rtol=1e-5, atol=0)
    for grad, leaf in zip(grads, (mean, lower), strict=False):
        assert torch.equal(grad, leaf.detach().masked_fill(leaf.abs() > 1e15, 0))
    assert torch.isfinite(grads[2]).all()


@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("latent", [37, 95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_nan_stays_and_stays_where_it_is(dtype, latent, num_samples, backend):
    for which in range(3):
        leaves = [tensor.detach() for tensor in operands((4, latent), dtype)]
        leaves[which][1, 12] = math.nan
        leaves[which][2, -1] = math.nan
        leaves = [tensor.requires_grad_() for tensor in leaves]
        z, kl = full_gaussian_sample_kl(*leaves, num_samples=num_samples, seed=SEED)
        grads = torch.autograd.grad((z, kl), leaves, (torch.ones_like(z), torch.ones_like(kl)))
        wrong = torch.zeros(4, latent, dtype=torch.bool)
        # Numbers 10 to 14 below the diagonal are row 5; the last is in the last row.
        wrong[1, 5 if which == 2 else 12] = wrong[2, -1] = True
        assert torch.equal(z.isnan(), wrong.expand(z.shape))
        assert torch.equal(kl.isnan(), torch.tensor([False, True, True, False]))
        for i, (grad, leaf) in enumerate(zip(grads, leaves, strict=True)):
            assert not grad[~leaf.isnan()].isnan().any()
            assert which != 0 or grad.isnan().any() == (i == 0)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (0, 3, 5), (2, 0, 0)], ids=str)
def test_zero_sizes(shape, backend):
    leaves = operands(shape, torch.float32)
    z, kl = full_gaussian_sample_kl(*leaves, num_samples=2, seed=SEED)
    assert z.shape == (2, *shape)
    assert torch.equal(kl, torch.zeros(shape[:-1]))
    grads = torch.autograd.grad((z, kl), leaves, (torch.ones_like(z), torch.ones_like(kl)))
    for grad, leaf in zip(grads, leaves, strict=True):
        assert torch.equal(grad, torch.zeros(leaf.shape))
    assert scale_tril(*leaves[1:]).shape == (*shape, shape[-1])


def test_expanded_and_strided_inputs(backend):
    torch.manual_seed(0)
    mean = torch.randn(9, 7).T.requires_grad_()
    log_diagonal = torch.randn(9).requires_grad_()
    lower = torch.randn(36, 7).T.requires_grad_()
    expanded = full_gaussian_sample_kl(mean, log_diagonal.expand(7, 9), lower, seed=SEED)
    copies = [t.detach().clone().contiguous().requires_grad_() for t in (mean, log_diagonal.expand(7, 9), lower)]
    dense = full_gaussian_sample_kl(*copies, seed=SEED)
    torch.testing.assert_close(expanded, dense)
    upstream = [torch.ones(()).expand(7, 9), torch.ones(1).expand(7)]
    ours = torch.autograd.grad(expanded, [mean, log_diagonal, lower], upstream)
    theirs = torch.autograd.grad(dense, copies, upstream)
    torch.testing.assert_close(ours, (theirs[0], theirs[1].sum(0), theirs[2]))


@pytest.mark.parametrize("shape", [(257, 33), (5, 130)], ids=str)
def test_threads_do_not_change_a_bit(shape, with_threads):
    leaves = operands(shape, torch.float32)

    def run():
        outputs = full_gaussian_sample_kl(*leaves, num_samples=2, seed=SEED)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])]

    one, two = with_threads(1, run), with_threads(2, run)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_manual_seed_and_generator():
    leaves = operands((4, 5), torch.float32)

    def draws(**arguments):
        return [full_gaussian_sample_kl(*leaves, **arguments)[0] for _ in range(2)]

    torch.manual_seed(3)
    first = draws()
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, draws(), strict=True))
    assert not torch.equal(*first)
    before = torch.get_rng_state()
    third = draws(generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    draws(seed=SEED)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradcheck(backend):
    leaves = operands((3, 5), torch.float64)
    with torch.no_grad():
        leaves[1][0, 0] = -25.0  # outside the clamp: no gradient
    for num_samples in (None, 2):
        assert torch.autograd.gradcheck(
            lambda *x, n=num_samples: full_gaussian_sample_kl(*x, num_samples=n, seed=SEED), leaves
        )
    assert torch.autograd.gradcheck(scale_tril, leaves[1:])


@pytest.mark.parametrize(("num_samples", "dtype"), [(None, torch.float32), (3, torch.float64), (2, torch.bfloat16)])
def test_opcheck(num_samples, dtype):
    leaves = [tensor.detach() for tensor in operands((3, 5), dtype)]
    arguments = (*leaves, SEED, num_samples)
    torch.library.opcheck(torch.ops.fastvae.full_gaussian_sample_kl, arguments)
    z, kl = torch.ops.fastvae.full_gaussian_sample_kl(*arguments)
    for grad_z, grad_kl in ((z, kl), (None, kl), (z, None)):
        torch.library.opcheck(torch.ops.fastvae.full_gaussian_sample_kl_backward, (grad_z, grad_kl, *arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 4)], ids=str)
def test_scale_tril(shape, dtype):
    _, log_diagonal, lower = operands(shape, dtype)
    tril = scale_tril(log_diagonal, lower)
    assert tril.dtype == dtype
    assert torch.equal(tril, factor(log_diagonal, lower))
    extreme = scale_tril(torch.tensor([-1e4, 1e4]), torch.tensor([3.0]))
    torch.testing.assert_close(extreme, torch.tensor([[math.exp(-20), 0.0], [3.0, math.exp(20)]]))


def test_errors_name_the_argument():
    mean, lower = torch.zeros(4, 5), torch.zeros(4, 10)
    cases = [
        (TypeError, "mean: expected a tensor, got list", {"mean": [0.0]}),
        (TypeError, "mean: expected float32, .* got torch.int64", {"mean": mean.long()}),
        (TypeError, "log_diagonal: expected torch.float32 as mean", {"log_diagonal": mean.double()}),
        (ValueError, r"log_diagonal: .*\(4, 5\), got \(4, 6\)", {"log_diagonal": torch.zeros(4, 6)}),
        (ValueError, r"log_diagonal: .* of mean, \(\)", {"mean": mean[0, 0], "log_diagonal": mean[0, 0]}),
        (TypeError, "lower: expected torch.float32 as mean, got torch.float16", {"lower": lower.half()}),
        (ValueError, r"lower: .* = \(4, 10\), got \(4, 15\)", {"lower": torch.zeros(4, 15)}),
        (ValueError, r"lower: .* = \(4, 10\), got \(10,\)", {"lower": lower[0]}),
        (ValueError, "lower: expected device cpu as mean, got meta", {"lower": lower.to("meta")}),
        (ValueError, "num_samples: expected None or an integer of at least 1, got 0", {"num_samples": 0}),
        (TypeError, "seed: expected an int64 tensor, got torch.float32", {"seed": torch.zeros(1)}),
        (ValueError, "seed: expected None when a generator", {"seed": SEED, "generator": torch.Generator()}),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            full_gaussian_sample_kl(**({"mean": mean, "log_diagonal": mean, "lower": lower} | arguments))
    wide = torch.zeros(1, 1025)
    with pytest.raises(ValueError, match="mean: expected at most 1024 latent dimensions, got 1025"):
        full_gaussian_sample_kl(wide, wide, torch.zeros(1, pairs(1025)))
    with pytest.raises(ValueError, match=r"log_diagonal: expected shape \(\.\.\., latent\), got \(\)"):
        scale_tril(mean[0, 0], lower)
    with pytest.raises(ValueError, match=r"lower: .* = \(4, 10\), got \(4, 9\)"):
        scale_tril(mean, lower[:, 1:])
