"""Importance-weighted bound and its samples, both CPU backends: definition, error budget, extremes, op contract."""

import math

import pytest
import torch
from cases import DTYPES
from torch.distributions import Normal

from fastvae.functional import gaussian_kl, gaussian_sample_kl, gaussian_sample_log_ratio, importance_weighted_bound

SEED = torch.tensor([123456789012345])
SHAPES = [(1,), (1, 1), (7, 33), (33, 7), (257, 3), (3, 257), (2, 3, 5), (2, 2500), (64, 32)]


def operands(shape, dtype):
    torch.manual_seed(0)
    return [tensor.requires_grad_() for tensor in torch.randn(2, *shape).to(dtype)]


def noise_of(shape, num_samples):
    """The backend's own noise: z of a standard normal. In float64 nothing is rounded on the way."""
    zeros = torch.zeros(shape, dtype=torch.float64)
    return gaussian_sample_kl(zeros, zeros, num_samples=num_samples, seed=SEED)[0]


def eager(mean, log_var, noise):
    """What a user writes, with the noise given."""
    std = torch.exp(0.5 * log_var)
    posterior, prior = Normal(mean, std, validate_args=False), Normal(torch.zeros_like(mean), torch.ones_like(std))
    z = mean + std * noise.to(mean.dtype)
    return z, prior.log_prob(z).sum(-1) - posterior.log_prob(z).sum(-1)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_samples_match_float64(shape, dtype, backend, assert_within_budget):
    num_samples = 1 if shape[0] % 2 else 3
    ours = operands(shape, dtype)
    peer = [tensor.detach().clone().requires_grad_() for tensor in ours]
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    noise = noise_of(shape, num_samples)

    outputs = gaussian_sample_log_ratio(*ours, num_samples, seed=SEED)
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
    for name, mine, truth, other in zip(("z", "log_ratio", "mean", "log_var"), results, *references, strict=True):
        # Half precision: computed in float32 and rounded once, at most half a unit away.
        # In float64 the peer is the definition itself and leaves no room for the order of a sum.
        assert_within_budget(name, mine, truth, other, {torch.float32: 4, torch.float64: 16}.get(mine.dtype, 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_are_those_of_the_gaussian_family(dtype, backend):
    leaves = operands((5, 33), dtype)
    z, _ = gaussian_sample_log_ratio(*leaves, 3, seed=SEED)
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6
    expected = gaussian_sample_kl(*leaves, num_samples=3, seed=SEED)[0]
    torch.testing.assert_close(z, expected, rtol=rounding, atol=rounding)


def test_mean_log_ratio_is_minus_the_divergence(backend):
    leaves = operands((3, 4), torch.float32)
    log_ratio = gaussian_sample_log_ratio(*leaves, 20_000, seed=SEED)[1]
    standard_error = log_ratio.std(0) / math.sqrt(len(log_ratio))
    assert ((log_ratio.mean(0) + gaussian_kl(*leaves)).abs() < 4 * standard_error).all()


EXTREMES = [-math.inf, -3e38, -1e4, -41.0, -40.0, -1e-40, 0.0, 40.0, 41.0, 1e4, 3e38, math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_extreme_log_variances_are_finite_and_their_gradients_stop(dtype, backend):
    log_var = torch.tensor(EXTREMES).repeat(3, 1).to(dtype).requires_grad_()
    mean = torch.ones_like(log_var).requires_grad_()
    outputs = gaussian_sample_log_ratio(mean, log_var, 2, seed=SEED)
    grads = torch.autograd.grad(outputs, [mean, log_var], [torch.ones_like(o) for o in outputs])
    assert all(torch.isfinite(x).all() for x in (*outputs, *grads))
    clamped = gaussian_sample_log_ratio(mean, log_var.clamp(-40, 40), 2, seed=SEED)
    assert all(torch.equal(a, b) for a, b in zip(outputs, clamped, strict=True))
    assert (grads[1][log_var.abs() > 40] == 0).all()
    assert (grads[1][log_var.abs() == 40] != 0).all(), "the bounds are inside, as for torch.clamp"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_extreme_means_have_finite_ratios(dtype, backend):
    """A sample beyond 1e15 counts as that in the square, and has no gradient from there."""
    mean = torch.tensor([1e4, -1e19, 1e20, 3e38]).repeat(3, 1).to(dtype).requires_grad_()
    log_var = torch.tensor([-1e4, 0.0, 1e4])[:, None].expand(3, 4).to(dtype).requires_grad_()
    z, log_ratio = gaussian_sample_log_ratio(mean, log_var, 2, seed=SEED)
    grads = torch.autograd.grad(log_ratio, (mean, log_var), torch.ones_like(log_ratio))
    assert all(torch.isfinite(t).all() for t in (z, log_ratio, *grads))
    assert (log_ratio <= -1e30).all()
    assert (grads[0][:, 1:] == 0).all()
    assert (grads[0][0, 0] + 2e4).abs() < 200


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_and_stays_where_it_is(dtype, backend):
    leaves = [tensor.detach() for tensor in operands((4, 37), dtype)]
    leaves[0][1, 3] = leaves[1][2, 36] = math.nan
    leaves = [tensor.requires_grad_() for tensor in leaves]
    z, log_ratio = gaussian_sample_log_ratio(*leaves, 2, seed=SEED)
    grads = torch.autograd.grad((z, log_ratio), leaves, (torch.ones_like(z), torch.ones_like(log_ratio)))
    wrong = leaves[0].isnan() | leaves[1].isnan()
    assert torch.equal(z.isnan(), wrong.expand(z.shape))
    assert torch.equal(log_ratio.isnan(), wrong.any(-1).expand(log_ratio.shape))
    assert torch.equal(grads[0].isnan(), wrong)
    assert not grads[1][~wrong].isnan().any()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 0)], ids=str)
def test_zero_sizes(shape, backend):
    leaves = operands(shape, torch.float32)
    z, log_ratio = gaussian_sample_log_ratio(*leaves, 2, seed=SEED)
    assert z.shape == (2, *shape)
    assert torch.equal(log_ratio, torch.zeros(2, *shape[:-1]))
    grads = torch.autograd.grad((z, log_ratio), leaves, (torch.ones_like(z), torch.ones_like(log_ratio)))
    assert all(torch.equal(grad, torch.zeros(shape)) for grad in grads)
    nothing = torch.zeros(3, 0, 2).requires_grad_()
    assert torch.autograd.grad(importance_weighted_bound(nothing, nothing).sum(), nothing)[0].shape == (3, 0, 2)


@pytest.mark.parametrize("shape", [(257, 33), (3, 2500)], ids=str)
def test_threads_do_not_change_a_bit(shape, with_threads):
    leaves = operands(shape, torch.float32)

    def run():
        z, log_ratio = gaussian_sample_log_ratio(*leaves, 5, seed=SEED)
        bound = importance_weighted_bound(z.mean(-1), log_ratio)
        return [z, log_ratio, bound, *torch.autograd.grad(bound.sum(), leaves)]

    one, two = with_threads(1, run), with_threads(2, run)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_threads_share_the_data_of_a_bound(with_threads):
    log_weights = torch.randn(2, 33, 700).requires_grad_()

    def run():
        bound = importance_weighted_bound(*log_weights)
        return [bound, *torch.autograd.grad(bound.sum(), log_weights)]

    one, two = with_threads(1, run), with_threads(2, run)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# ------------------------------------------------------------------------------------------------------ bound
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (5,), (1, 7), (33, 1), (50, 257), (3, 2, 65), (500, 3)], ids=str)
def test_bound_matches_float64(shape, dtype, backend, assert_within_budget):
    torch.manual_seed(0)
    ours = [(20 * x).to(dtype).requires_grad_() for x in torch.randn(2, *shape)]
    peer = [tensor.detach().clone().requires_grad_() for tensor in ours]
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    bound = importance_weighted_bound(*ours)
    assert bound.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    grad_output = torch.randn(bound.shape).to(bound.dtype)
    results = [bound, *torch.autograd.grad(bound, ours, grad_output)]
    references = []
    for leaves in (exact, peer):
        made = torch.logsumexp(leaves[0] + leaves[1], 0) - math.log(shape[0])
        references.append([made, *torch.autograd.grad(made, leaves, grad_output.to(made.dtype))])
    for name, mine, truth, other in zip(("bound", "likelihood", "ratio"), results, *references, strict=True):
        # A weight is the exponential of a difference of numbers up to 100, whose rounding it inherits.
        assert_within_budget(name, mine, truth, other, {torch.float32: 4, torch.float64: 100}.get(mine.dtype, 0.5))


def test_the_bound_of_one_sample_is_its_log_weight(backend):
    log_likelihood, log_ratio = 100 * torch.randn(2, 1, 257)
    assert torch.equal(importance_weighted_bound(log_likelihood, log_ratio), (log_likelihood + log_ratio)[0])


def test_equal_samples_have_equal_weights(backend):
    same = torch.full((7, 3), -1e4).requires_grad_()
    bound = importance_weighted_bound(same, torch.zeros(7, 3))
    torch.testing.assert_close(bound, torch.full((3,), -1e4), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(bound.sum(), same)[0], torch.full((7, 3), 1 / 7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_and_undefined_weights(dtype, backend):
    """Columns: one impossible sample, all impossible, one infinitely likely, NaN, NaN with impossible, ordinary."""
    inf, nan = math.inf, math.nan
    values = [[-inf, 1.0, 2.0], [-inf] * 3, [0.0, inf, -inf], [nan, 1.0, 2.0], [nan, -inf, -inf], [1.0, 2.0, 3.0]]
    log_likelihood = torch.tensor(values, dtype=dtype).T.contiguous().requires_grad_()
    bound = importance_weighted_bound(log_likelihood, torch.zeros_like(log_likelihood))
    grad = torch.autograd.grad(bound.sum(), log_likelihood)[0].double()
    expected = torch.tensor(values, dtype=torch.float64).logsumexp(1) - math.log(3)
    torch.testing.assert_close(bound.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    softmax = torch.tensor(values, dtype=torch.float64).softmax(1).T
    softmax[:, 1:3] = 0.0
    assert grad[0, 0] == 0
    torch.testing.assert_close(grad, softmax, rtol=torch.finfo(dtype).eps + 1e-6, atol=0, equal_nan=True)


def test_the_bound_rises_with_the_samples_to_the_likelihood(backend):
    """p(z) = N(0, 1), p(x|z) = N(x; z, 1): log p(x) = log N(x; 0, 2) whatever q."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = Normal(0.0, math.sqrt(2.0)).log_prob(x)
    bounds = []
    for samples in (1, 10, 100_000):
        repeats = 100_000 // samples
        mean, log_var = (t.expand(repeats, 9)[..., None] for t in (0.3 * x, torch.full_like(x, -0.2)))
        z, log_ratio = gaussian_sample_log_ratio(mean, log_var, samples, seed=SEED)
        log_likelihood = Normal(z[..., 0], 1.0).log_prob(x)
        bounds.append(importance_weighted_bound(log_likelihood, log_ratio).mean(0))
    assert (bounds[0] < bounds[1]).all()
    assert (bounds[1] < exact).all()
    torch.testing.assert_close(bounds[2], exact, rtol=0, atol=0.02)


def test_expanded_and_strided_inputs(backend):
    torch.manual_seed(0)
    mean, log_var = torch.randn(33, 7).T.requires_grad_(), torch.randn(33).requires_grad_()
    log_likelihood = torch.randn(7, 5).T.requires_grad_()

    def bound(mean, log_var, log_likelihood):
        return importance_weighted_bound(log_likelihood, gaussian_sample_log_ratio(mean, log_var, 5, seed=SEED)[1])

    ours, copies = (mean, log_var.expand(7, 33), log_likelihood), []
    copies = [t.detach().clone().contiguous().requires_grad_() for t in ours]
    outputs = bound(*ours), bound(*copies)
    torch.testing.assert_close(*outputs)
    upstream = torch.ones(1).expand(7)
    grads = torch.autograd.grad(outputs[0], (mean, log_var, log_likelihood), upstream)
    dense = torch.autograd.grad(outputs[1], copies, upstream)
    torch.testing.assert_close(grads, (dense[0], dense[1].sum(0), dense[2]))


def test_manual_seed_and_generator():
    leaves = operands((4, 5), torch.float32)
    torch.manual_seed(3)
    first = gaussian_sample_log_ratio(*leaves, 2)[0]
    assert not torch.equal(first, gaussian_sample_log_ratio(*leaves, 2)[0])
    third = gaussian_sample_log_ratio(*leaves, 2, generator=torch.Generator().manual_seed(3))[0]
    assert torch.equal(first, third)


def test_gradcheck(backend):
    leaves = operands((3, 5), torch.float64)
    with torch.no_grad():
        leaves[1][0, 0] = -50.0  # outside the clamp: no gradient
    assert torch.autograd.gradcheck(lambda *x: gaussian_sample_log_ratio(*x, 2, seed=SEED), leaves)
    assert torch.autograd.gradcheck(
        importance_weighted_bound, [x.requires_grad_() for x in operands((4, 3), DTYPES[1])]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    leaves = [tensor.detach() for tensor in operands((3, 5), dtype)]
    arguments = (*leaves, SEED, 2)
    torch.library.opcheck(torch.ops.fastvae.gaussian_sample_log_ratio, arguments)
    z, log_ratio = torch.ops.fastvae.gaussian_sample_log_ratio(*arguments)
    for grads in ((z, log_ratio), (None, log_ratio), (z, None)):
        torch.library.opcheck(torch.ops.fastvae.gaussian_sample_log_ratio_backward, (*grads, *arguments))
    torch.library.opcheck(torch.ops.fastvae.importance_weighted_bound, leaves)
    bound = torch.ops.fastvae.importance_weighted_bound(*leaves)
    torch.library.opcheck(torch.ops.fastvae.importance_weighted_bound_backward, (bound, *leaves))


def test_errors_name_the_argument():
    mean = torch.zeros(4, 5)
    cases = [
        (TypeError, "mean: expected a tensor, got list", {"mean": [0.0]}),
        (TypeError, "log_var: expected torch.float32 as mean, got torch.float64", {"log_var": mean.double()}),
        (ValueError, r"log_var: .*\(4, 5\), got \(4, 6\)", {"log_var": torch.zeros(4, 6)}),
        (ValueError, "num_samples: expected an integer of at least 1, got 0", {"num_samples": 0}),
        (ValueError, "num_samples: expected an integer of at least 1, got None", {"num_samples": None}),
        (TypeError, "seed: expected an int64 tensor, got int", {"seed": 3}),
        (ValueError, "seed: expected None when a generator", {"seed": SEED, "generator": torch.Generator()}),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            gaussian_sample_log_ratio(**({"mean": mean, "log_var": mean, "num_samples": 2} | arguments))
    cases = [
        (TypeError, "log_likelihood: expected float32, .* got torch.int64", {"log_likelihood": mean.long()}),
        (TypeError, "log_ratio: expected torch.float32 as log_likelihood", {"log_ratio": mean.double()}),
        (ValueError, r"log_ratio: .* of log_likelihood, \(4, 5\), got \(4, 1\)", {"log_ratio": mean[:, :1]}),
        (ValueError, "log_ratio: expected device cpu as log_likelihood", {"log_ratio": mean.to("meta")}),
        (ValueError, r"log_likelihood: .* S at least 1, got \(0, 5\)", {"log_likelihood": mean[:0]}),
        (ValueError, r"log_likelihood: .* S at least 1, got \(\)", {"log_likelihood": mean[0, 0]}),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            importance_weighted_bound(**({"log_likelihood": mean, "log_ratio": mean} | arguments))
