"""Gaussian sampling + KL, both CPU backends: definition, error budget, noise, clamp, priors, op contract."""

import math

import pytest
import torch
from cases import DTYPES
from torch.distributions import Independent, Normal, kl_divergence

from fastvae.functional import gaussian_kl, gaussian_sample_kl
from fastvae.ops import random

SEED = torch.tensor([123456789012345])
SHAPES = [(1,), (1, 1), (7, 33), (33, 7), (257, 3), (3, 257), (2, 3, 5), (2, 2500), (64, 32)]


def operands(shape, dtype, prior="none"):
    torch.manual_seed(0)
    mean, log_var = torch.randn(2, *shape).to(dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    prior_shape = {"none": None, "shared": shape[-1:], "full": shape}[prior]
    priors = [] if prior_shape is None else list(torch.randn(2, *prior_shape, dtype=compute))
    return [tensor.requires_grad_() for tensor in (mean, log_var, *priors)]


def prior_arguments(priors):
    return dict(zip(("prior_mean", "prior_log_var"), priors, strict=False))


def eager(mean, log_var, priors, noise, reduction):
    """What a user writes, with the noise given."""
    z = mean + torch.exp(0.5 * log_var) * noise.to(mean.dtype)
    prior_mean, prior_log_var = [p.to(mean.dtype) for p in priors] or [torch.zeros(()).to(mean.dtype)] * 2
    variances = log_var.exp() + (mean - prior_mean) ** 2
    kl = 0.5 * (prior_log_var - log_var + variances / prior_log_var.exp() - 1)
    return z, kl.sum(-1) if reduction == "sum" else kl


def noise_of(shape, num_samples, seed=SEED):
    """The backend's own noise: z of a standard normal. In float64 nothing is rounded on the way."""
    zeros = torch.zeros(shape, dtype=torch.float64)
    return gaussian_sample_kl(zeros, zeros, num_samples=num_samples, seed=seed)[0]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("prior", ["none", "shared", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, prior, backend, assert_within_budget):
    num_samples, reduction = (None, "sum") if shape[0] % 2 else (3, "none")
    ours = operands(shape, dtype, prior)
    peer = [tensor.detach().clone().requires_grad_() for tensor in ours]
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    noise = noise_of(shape, num_samples)

    outputs = gaussian_sample_kl(
        *ours[:2], **prior_arguments(ours[2:]), num_samples=num_samples, reduction=reduction, seed=SEED
    )
    exact_outputs, peer_outputs = (eager(*x[:2], x[2:], noise, reduction) for x in (exact, peer))
    assert outputs[0].dtype == dtype
    assert outputs[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    torch.manual_seed(1)
    grad_outputs = [torch.randn(o.shape).to(o.dtype) for o in outputs]
    results = [*outputs, *torch.autograd.grad(outputs, ours, grad_outputs)]
    references = []
    for made, leaves in ((exact_outputs, exact), (peer_outputs, peer)):
        upstream = [g.to(o.dtype) for g, o in zip(grad_outputs, made, strict=True)]
        references.append([*made, *torch.autograd.grad(made, leaves, upstream)])
    names = ["z", "kl", "grad_mean", "grad_log_var", "grad_prior_mean", "grad_prior_log_var"]
    for name, mine, truth, other in zip(names, results, *references, strict=False):
        # Half precision: computed in float32 and rounded once, at most half a unit away.
        # In float64 the peer is the definition itself and leaves no room for the order of a sum.
        rounding = {torch.float32: 4, torch.float64: 16}.get(mine.dtype, 0.5)
        assert_within_budget(name, mine, truth, other, rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_samples", [None, 1, 3])
def test_noise_is_the_stream_at_the_flat_index(num_samples, dtype, backend):
    zeros = torch.zeros(5, 33, dtype=dtype)
    z, _ = gaussian_sample_kl(zeros, zeros, num_samples=num_samples, seed=SEED)
    assert z.shape == ((5, 33) if num_samples is None else (num_samples, 5, 33))
    expected = random.normal(SEED, torch.arange(z.numel())).reshape(z.shape)
    rounding = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0
    torch.testing.assert_close(z.double(), expected.double(), rtol=rounding, atol=1e-6)


def test_more_samples_begin_with_the_fewer(backend):
    mean, log_var = operands((4, 9), torch.float32)
    few, many = (gaussian_sample_kl(mean, log_var, num_samples=n, seed=SEED)[0] for n in (2, 5))
    assert torch.equal(few, many[:2])


@pytest.mark.parametrize("prior", ["none", "shared", "full"])
def test_kl_is_that_of_torch_distributions(prior, backend):
    mean, log_var, *priors = operands((33, 7), torch.float64, prior)
    prior_mean, prior_log_var = priors or [torch.zeros(7, dtype=torch.float64)] * 2
    posterior = Normal(mean, (0.5 * log_var).exp())
    expected = kl_divergence(posterior, Normal(prior_mean, (0.5 * prior_log_var).exp()))
    ours = gaussian_kl(mean, log_var, **prior_arguments(priors), reduction="none")
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prior", ["none", "full"])
def test_kl_is_the_mean_log_density_ratio_of_the_samples(prior, backend):
    mean, log_var, *priors = operands((3, 4), torch.float32, prior)
    z, kl = gaussian_sample_kl(mean, log_var, **prior_arguments(priors), num_samples=20_000, seed=SEED)
    prior_mean, prior_log_var = priors or [torch.zeros(3, 4)] * 2
    posterior = Independent(Normal(mean, (0.5 * log_var).exp()), 1)
    log_ratio = posterior.log_prob(z) - Independent(Normal(prior_mean, (0.5 * prior_log_var).exp()), 1).log_prob(z)
    standard_error = log_ratio.std(0) / math.sqrt(z.shape[0])
    assert ((log_ratio.mean(0) - kl).abs() < 4 * standard_error).all()


def test_posterior_equal_to_the_prior_has_no_divergence(backend):
    mean, log_var = operands((7, 33), torch.float32)
    kl = gaussian_kl(mean, log_var, prior_mean=mean, prior_log_var=log_var, reduction="none")
    assert torch.equal(kl, torch.zeros(7, 33))


def test_small_divergences_keep_their_digits(backend):
    """exp(log_var) - 1 - log_var has an error of 1e-7 whatever log_var; ours shrinks with log_var."""
    log_var = torch.logspace(-6, 0, 64).reshape(2, 32) * torch.tensor([[1.0], [-1.0]])
    kl = gaussian_kl(torch.zeros(2, 32), log_var, reduction="none")
    exact = 0.5 * (torch.expm1(log_var.double()) - log_var.double())
    assert ((kl - exact).abs() <= 2e-7 * log_var.abs()).all()


EXTREMES = [-math.inf, -3e38, -1e4, -41.0, -40.0, -1e-40, 0.0, 1e-40, 40.0, 41.0, 1e4, 3e38, math.inf]


@pytest.mark.parametrize("prior", ["none", "shared", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_extreme_log_variances_are_finite_and_their_gradients_stop(dtype, prior, backend):
    size = len(EXTREMES)
    log_var = torch.tensor(EXTREMES).repeat(size, 1).to(dtype).requires_grad_()
    mean = torch.ones_like(log_var).requires_grad_()
    values = torch.tensor(EXTREMES) if prior == "shared" else torch.tensor(EXTREMES).repeat(size, 1).T
    prior_log_var = values.clone().requires_grad_() if prior != "none" else None
    outputs = gaussian_sample_kl(mean, log_var, prior_log_var=prior_log_var, seed=SEED)
    leaves = [mean, log_var] + ([] if prior_log_var is None else [prior_log_var])
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
    assert all(torch.isfinite(x).all() for x in (*outputs, *grads))

    def clamped():
        limited = None if prior_log_var is None else prior_log_var.detach().clamp(-40, 40)
        return gaussian_sample_kl(mean, log_var.detach().clamp(-40, 40), prior_log_var=limited, seed=SEED)

    assert all(torch.equal(a, b) for a, b in zip(outputs, clamped(), strict=True))
    outside = log_var.abs() > 40
    assert (grads[1][outside] == 0).all()
    assert (grads[1][log_var.abs() == 40] != 0).all(), "the bounds are inside, as for torch.clamp"
    if prior_log_var is not None:
        assert (grads[2][prior_log_var.abs() > 40] == 0).all()
        assert (grads[2][prior_log_var.abs() == 40] != 0).all()


@pytest.mark.parametrize("prior", ["none", "shared", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_means_have_a_finite_divergence(dtype, prior, backend):
    """A distance beyond 1e15 of the prior's standard deviations counts as that many, and has no gradient."""
    means = torch.tensor([1e4, -1e14, 1e19, -1e20, 3e38], dtype=torch.float64)
    mean = means.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).repeat(3, 1).requires_grad_()
    log_var = torch.tensor([-1e4, 0, 1e4]).to(dtype)[:, None].expand(3, 5).requires_grad_()
    prior_log_vars = {"none": [], "shared": [-1e4, 0, 4, 1e4, -1e4], "full": [[-1e4] * 5] * 3}
    prior_log_var = torch.tensor(prior_log_vars[prior])
    priors = [torch.zeros_like(prior_log_var), prior_log_var] if prior != "none" else []
    leaves = [mean, log_var, *(p.requires_grad_() for p in priors)]
    z, kl = gaussian_sample_kl(*leaves[:2], **prior_arguments(priors), reduction="none", seed=SEED)
    grads = torch.autograd.grad(kl, leaves, torch.ones_like(kl))
    assert torch.isfinite(kl).all()
    assert torch.isfinite(kl.sum())
    if dtype != torch.float16:  # whose largest number is 65504
        assert all(torch.isfinite(t).all() for t in (z, *grads[1:]))
    limits = [log_var.detach().double().clamp(-40, 40), torch.zeros(5, dtype=torch.float64)]
    if priors:
        limits[1] = priors[1].detach().double().clamp(-40, 40)
    ratio, std = limits[0] - limits[1], torch.exp(limits[1] / 2)
    distance = mean.detach().double() / std
    truth = 0.5 * (distance.clamp(-1e15, 1e15).square() + torch.expm1(ratio) - ratio)
    torch.testing.assert_close(kl.double(), truth, rtol=1e-5, atol=0)
    expected = torch.where(distance.abs() > 1e15, 0, distance / std)
    fits = expected.abs() < torch.finfo(dtype).max
    rounding, tiny = 2 * torch.finfo(dtype).eps + 1e-5, torch.finfo(dtype).tiny
    torch.testing.assert_close(grads[0].double()[fits], expected[fits], rtol=rounding, atol=tiny)


@pytest.mark.parametrize("prior", ["none", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_and_stays_where_it_is(dtype, prior, backend):
    leaves = [tensor.detach() for tensor in operands((4, 37), dtype, prior)]
    places = [(0, 3), (1, 36), (2, 0), (3, 20)][: len(leaves)]
    for tensor, place in zip(leaves, places, strict=True):
        tensor[place] = math.nan
    leaves = [tensor.requires_grad_() for tensor in leaves]
    z, kl = gaussian_sample_kl(*leaves[:2], **prior_arguments(leaves[2:]), reduction="none", seed=SEED)
    grads = torch.autograd.grad((z, kl), leaves, (torch.ones_like(z), torch.ones_like(kl)))
    wrong_z, wrong_kl = torch.zeros(2, 4, 37, dtype=torch.bool)
    for i, place in enumerate(places):
        wrong_kl[place] = True
        wrong_z[place] = i < 2
    assert torch.equal(z.isnan(), wrong_z)
    assert torch.equal(kl.isnan(), wrong_kl)
    assert all(not grad[~wrong_kl].isnan().any() for grad in grads)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("prior_shape", [(), (1,), (5,), (1, 5), (4, 1), (3, 4, 1), (1, 1, 5), (3, 1, 5), (3, 4, 5)])
def test_priors_broadcast_and_their_gradients_sum(prior_shape, backend):
    torch.manual_seed(0)
    mean, log_var = torch.randn(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
    small = [p.requires_grad_() for p in torch.randn(2, *prior_shape, dtype=torch.float64)]
    full = [p.detach().expand(3, 4, 5).clone().requires_grad_() for p in small]
    weights = torch.randn(3, 4, dtype=torch.float64)
    kls, grads = [], []
    for priors in (small, full):
        kl = gaussian_sample_kl(mean, log_var, **prior_arguments(priors), seed=SEED)[1]
        kls.append(kl)
        grads.append(torch.autograd.grad(kl, priors, weights))
    torch.testing.assert_close(*kls, rtol=1e-12, atol=0)
    for ours, expanded in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expanded.sum_to_size(prior_shape), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("given", ["prior_mean", "prior_log_var"])
def test_one_half_of_the_prior_alone(given, backend):
    mean, log_var, *priors = operands((4, 5), torch.float32, "shared")
    one = dict([item for item in prior_arguments(priors).items() if item[0] == given])
    other = {"prior_mean": "prior_log_var", "prior_log_var": "prior_mean"}[given]
    both = one | {other: torch.zeros(5)}
    assert torch.equal(gaussian_kl(mean, log_var, **one), gaussian_kl(mean, log_var, **both))


@pytest.mark.parametrize("prior", ["none", "shared", "full"])
def test_divergence_alone_equals_the_second_output(prior, backend):
    leaves = operands((7, 33), torch.float32, prior)
    arguments = prior_arguments(leaves[2:])
    for reduction in ("sum", "none"):
        alone = gaussian_kl(*leaves[:2], **arguments, reduction=reduction)
        both = gaussian_sample_kl(*leaves[:2], **arguments, reduction=reduction, seed=SEED)[1]
        assert torch.equal(alone, both)
        grads = [torch.autograd.grad(kl.sum(), leaves) for kl in (alone, both)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    per_dimension = gaussian_kl(*leaves[:2], **arguments, reduction="none")
    assert per_dimension.shape == (7, 33)
    torch.testing.assert_close(per_dimension.sum(-1), gaussian_kl(*leaves[:2], **arguments))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("prior", ["none", "shared", "full"])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (0, 3, 5), (2, 0, 0)], ids=str)
def test_zero_sizes(shape, prior, backend):
    leaves = operands(shape, torch.float32, prior)
    z, kl = gaussian_sample_kl(*leaves[:2], **prior_arguments(leaves[2:]), num_samples=2, seed=SEED)
    assert z.shape == (2, *shape)
    assert torch.equal(kl, torch.zeros(shape[:-1]))
    grads = torch.autograd.grad((z, kl), leaves, (torch.ones_like(z), torch.ones_like(kl)))
    for grad, leaf in zip(grads, leaves, strict=True):
        assert torch.equal(grad, torch.zeros(leaf.shape))


def test_expanded_and_strided_inputs(backend):
    torch.manual_seed(0)
    mean = torch.randn(33, 7).T.requires_grad_()
    log_var = torch.randn(33).requires_grad_()
    prior = torch.randn(33, 2)[:, 0].requires_grad_()
    expanded = gaussian_sample_kl(mean, log_var.expand(7, 33), prior_mean=prior, seed=SEED)
    copies = [t.detach().clone().contiguous().requires_grad_() for t in (mean, log_var.expand(7, 33), prior)]
    dense = gaussian_sample_kl(copies[0], copies[1], prior_mean=copies[2], seed=SEED)
    torch.testing.assert_close(expanded, dense)
    upstream = [torch.ones(()).expand(7, 33), torch.ones(1).expand(7)]
    ours = torch.autograd.grad(expanded, [mean, log_var, prior], upstream)
    theirs = torch.autograd.grad(dense, copies, upstream)
    torch.testing.assert_close(ours, (theirs[0], theirs[1].sum(0), theirs[2]))


@pytest.mark.parametrize("shape", [(257, 33), (3, 2500)], ids=str)
@pytest.mark.parametrize("prior", ["none", "full"])
def test_threads_do_not_change_a_bit(shape, prior, with_threads):
    leaves = operands(shape, torch.float32, prior)

    def run():
        outputs = gaussian_sample_kl(*leaves[:2], **prior_arguments(leaves[2:]), num_samples=2, seed=SEED)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])]

    one, two = with_threads(1, run), with_threads(2, run)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_threads_share_the_sums_of_a_common_prior(with_threads):
    leaves = operands((4096, 33), torch.float32, "shared")

    def run():
        return torch.autograd.grad(gaussian_kl(*leaves[:2], **prior_arguments(leaves[2:])).sum(), leaves)

    torch.testing.assert_close(with_threads(1, run), with_threads(2, run), rtol=1e-5, atol=1e-3)


def test_manual_seed_and_generator():
    mean, log_var = operands((4, 5), torch.float32)

    def draws(**arguments):
        return [gaussian_sample_kl(mean, log_var, **arguments)[0] for _ in range(2)]

    torch.manual_seed(3)
    first = draws()
    torch.manual_seed(3)
    second = draws()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(*first)
    before = torch.get_rng_state()
    third = draws(generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    draws(seed=SEED), gaussian_kl(mean, log_var)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("prior", ["none", "shared", "full"])
def test_gradcheck(prior, backend):
    leaves = operands((3, 5), torch.float64, prior)
    with torch.no_grad():
        leaves[1][0, 0] = -50.0  # outside the clamp: no gradient

    def call(num_samples, reduction):
        def function(mean, log_var, *priors):
            return gaussian_sample_kl(
                mean, log_var, **prior_arguments(priors), num_samples=num_samples, reduction=reduction, seed=SEED
            )

        return function

    assert torch.autograd.gradcheck(call(None, "sum"), leaves)
    assert torch.autograd.gradcheck(call(2, "none"), leaves)


@pytest.mark.parametrize(
    ("num_samples", "prior", "dtype"),
    [
        (None, "none", torch.float32),
        (None, "shared", torch.bfloat16),
        (0, "none", torch.float64),
        (3, "full", torch.float64),
        (3, "shared", torch.float16),
    ],
)
def test_opcheck(num_samples, prior, dtype):
    mean, log_var, *priors = (tensor.detach() for tensor in operands((3, 5), dtype, prior))
    priors, sum_latent = priors or [None, None], num_samples is None
    arguments = (mean, log_var, *priors, SEED, num_samples, sum_latent)
    torch.library.opcheck(torch.ops.fastvae.gaussian_sample_kl, arguments)
    z, kl = torch.ops.fastvae.gaussian_sample_kl(*arguments)
    for grad_z, grad_kl in ((z, kl), (None, kl), (z, None)):
        torch.library.opcheck(torch.ops.fastvae.gaussian_sample_kl_backward, (grad_z, grad_kl, *arguments))


def test_errors_name_the_argument():
    mean, wrong = torch.zeros(4, 5), torch.zeros(4, 6)
    cases = [
        (TypeError, "mean: expected a tensor, got list", {"mean": [0.0]}),
        (TypeError, "mean: expected float32, .* got torch.int64", {"mean": mean.long()}),
        (TypeError, "log_var: expected torch.float32 as mean, got torch.float64", {"log_var": mean.double()}),
        (ValueError, r"log_var: .*\(4, 5\), got \(4, 6\)", {"log_var": wrong}),
        (ValueError, r"log_var: .*\(\.\.\., latent\) of mean, \(\)", {"mean": mean[0, 0], "log_var": mean[0, 0]}),
        (ValueError, "log_var: expected device cpu as mean, got meta", {"log_var": mean.to("meta")}),
        (ValueError, r"prior_mean: .*\(4, 5\), got \(4, 6\)", {"prior_mean": wrong}),
        (ValueError, r"prior_log_var: .*, got \(2, 4, 5\)", {"prior_log_var": torch.zeros(2, 4, 5)}),
        (TypeError, "prior_mean: expected float32, .* got torch.int64", {"prior_mean": mean.long()}),
        (ValueError, "prior_mean: expected device cpu as mean, got meta", {"prior_mean": mean.to("meta")}),
        (ValueError, "num_samples: expected None or an integer of at least 1, got 0", {"num_samples": 0}),
        (ValueError, r"num_samples: expected None or an integer of at least 1, got 1\.5", {"num_samples": 1.5}),
        (ValueError, "reduction: expected one of 'sum', 'none', got 'mean'", {"reduction": "mean"}),
        (TypeError, "seed: expected an int64 tensor, got torch.float32", {"seed": torch.zeros(1)}),
        (TypeError, "seed: expected an int64 tensor, got int", {"seed": 3}),
        (ValueError, r"seed: expected shape \(1,\) = \(1,\), got \(2,\)", {"seed": torch.tensor([1, 2])}),
        (ValueError, "seed: expected None when a generator", {"seed": SEED, "generator": torch.Generator()}),
    ]  # fmt: skip
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            gaussian_sample_kl(**({"mean": mean, "log_var": mean} | arguments))
