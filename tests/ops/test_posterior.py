"""Mixture log-density and mutual information, both CPU backends: definition, error budget, extremes, op contract."""

import math

import pytest
import torch
from cases import DTYPES
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from fastvae.functional import gaussian_sample_kl, mixture_log_density, mutual_information
from fastvae.ops import posterior

SEED = torch.tensor([123456789012345])
# (points, components, latent): around the widths of vectors, tiles and blocks of the C++ kernel
SHAPES = [(1, 1, 1), (7, 33, 2), (33, 7, 7), (257, 65, 33), (3, 700, 5), (50, 31, 257)]


def operands(shape, dtype):
    torch.manual_seed(0)
    points, components, latent = shape
    z, mean, log_var = (torch.randn(n, latent).to(dtype) for n in (points, components, components))
    return [tensor.requires_grad_() for tensor in (z, mean, log_var)]


def eager(z, mean, log_var):
    """What a user writes, with the (N, M, D) tensor."""
    log_density = -0.5 * ((z[:, None] - mean) ** 2 / log_var.exp() + log_var + math.log(2 * math.pi))
    return log_density.sum(-1).logsumexp(1) - math.log(len(mean))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, backend, assert_within_budget):
    ours = operands(shape, dtype)
    # Sums are computed in float32 for half types too: so is the peer they are held to.
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    peer, exact = ([t.detach().to(d).requires_grad_() for t in ours] for d in (compute, torch.float64))
    grad = torch.randn(shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for function, leaves in ((mixture_log_density, ours), (eager, exact), (eager, peer)):
        output = function(*leaves)
        results.append([output, *torch.autograd.grad(output, leaves, grad.to(output.dtype))])
    assert results[0][0].dtype == compute
    for name, *values in zip(["log_density", "grad_z", "grad_mean", "grad_log_var"], *results, strict=True):
        # Half types are rounded once. A weight is the exponential of a difference of log-densities: its relative
        # rounding is the absolute one of those.
        size = results[1][0].abs().max().item() / 4 if name.startswith("grad") else 0
        assert_within_budget(name, *values, 8 + size if values[0].dtype.itemsize > 2 else 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("components", [256, 257, 1000])
def test_components_laid_out_some_at_a_time(components, dtype, backend):
    operand = [t.detach() for t in operands((41, components, 129), dtype)]  # in C++, 256 or 128 at a time
    exact = posterior.reference(*(t.double() for t in operand))
    torch.testing.assert_close(mixture_log_density(*operand).double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_is_that_of_torch_distributions(backend):
    z, mean, log_var = (t.detach() for t in operands((33, 40, 7), torch.float64))
    components = Independent(Normal(mean, (0.5 * log_var).exp()), 1)
    expected = MixtureSameFamily(Categorical(torch.ones(40)), components).log_prob(z)
    torch.testing.assert_close(mixture_log_density(z, mean, log_var), expected, rtol=1e-6, atol=1e-6)


def test_narrow_components_far_from_zero_keep_their_digits(backend):
    torch.manual_seed(0)
    mean = 1000 + torch.randn(40, 6)
    log_var = torch.full_like(mean, math.log(1e-4))
    z = mean[:20] + 0.01 * torch.randn(20, 6)
    exact = eager(z.double(), mean.double(), log_var.double())
    torch.testing.assert_close(mixture_log_density(z, mean, log_var).double(), exact, rtol=1e-5, atol=0)
    precision = torch.exp(-log_var)
    constant = (mean.square() * precision + log_var + math.log(2 * math.pi)).sum(-1)
    expanded = z.square() @ precision.T - 2 * z @ (mean * precision).T + constant
    lost = torch.logsumexp(-0.5 * expanded, 1) - math.log(40)
    assert (lost - exact).abs().max() > 10, "the expanded square has lost them: the test sees the difference"


def test_a_point_near_one_of_many_components(backend):
    """Far beyond exp's range for all other components, in whatever block they come."""
    mean = 100 * torch.arange(700.0)[:, None].expand(700, 3)
    z, log_var = mean[::37] + 0.5, torch.zeros(700, 3)
    expected = 3 * -0.5 * (0.25 + math.log(2 * math.pi)) - math.log(700)
    torch.testing.assert_close(mixture_log_density(z, mean, log_var), torch.full((19,), expected))


@pytest.mark.usefixtures("poison")
def test_extreme_log_variances_are_clamped_and_their_gradients_stop(backend):
    extremes = [-math.inf, -3e38, -1e4, -41.0, -40.0, -1e-40, 0.0, 40.0, 41.0, 1e4, 3e38, math.inf]
    log_var = torch.tensor(extremes)[:, None].requires_grad_()
    mean = torch.zeros(12, 1).requires_grad_()
    z = torch.tensor([[0.0], [1e-9], [1.0], [1e9], [-1e9]]).requires_grad_()
    output = mixture_log_density(z, mean, log_var)
    exact = eager(*(t.detach().double() for t in (z, mean, log_var.clamp(-40, 40))))
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(output.sum(), (z, mean, log_var))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[2][log_var.abs() > 40] == 0).all()
    assert (grads[2][log_var.abs() == 40] != 0).all(), "the bounds are inside, as for torch.clamp"


def test_a_density_below_the_range_is_minus_infinity_and_has_no_gradient(backend):
    z, mean, _ = operands((4, 40, 3), torch.float32)
    log_var = torch.full((40, 3), -2.0).requires_grad_()
    with torch.no_grad():
        z[1] = 1e19
    output = mixture_log_density(z, mean, log_var)
    assert output.isneginf().tolist() == [False, True, False, False]
    grads = torch.autograd.grad(output.sum(), (z, mean, log_var))
    kept = z.detach()[[0, 2, 3]].requires_grad_()
    expected = torch.autograd.grad(mixture_log_density(kept, mean, log_var).sum(), (kept, mean, log_var))
    assert (grads[0][1] == 0).all()
    torch.testing.assert_close((grads[0][[0, 2, 3]], *grads[1:]), expected)
    with torch.no_grad():
        z[1, 0] = -math.inf
    assert mixture_log_density(z, mean, log_var).isneginf().tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_of_a_point_stays_there_and_of_a_component_is_everywhere(dtype, backend):
    z, mean, log_var = (t.detach() for t in operands((40, 70, 5), dtype))
    z[3, 2] = math.nan
    assert mixture_log_density(z, mean, log_var).isnan().nonzero().tolist() == [[3]]
    for component in (mean, log_var):
        kept = component[68, 1].clone()
        component[68, 1] = math.nan
        assert mixture_log_density(z, mean, log_var).isnan().all()
        component[68, 1] = kept
    leaves = [t.requires_grad_() for t in (z, mean, log_var)]
    grads = torch.autograd.grad(mixture_log_density(*leaves)[4:].sum(), leaves)
    assert all(g[4:].isfinite().all() for g in grads[:1])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 5, 0), (0, 1, 0)], ids=str)
def test_zero_sizes(shape, backend):
    leaves = operands(shape, torch.float32)
    output = mixture_log_density(*leaves)
    assert torch.equal(output, torch.zeros(shape[0]))
    for grad, leaf in zip(torch.autograd.grad(output.sum(), leaves), leaves, strict=True):
        assert torch.equal(grad, torch.zeros(leaf.shape))


def test_strided_inputs_and_upstream(backend):
    torch.manual_seed(0)
    z, both = torch.randn(33, 7).T.requires_grad_(), torch.randn(9, 66).requires_grad_()
    mean, log_var = both.chunk(2, -1)
    copies = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in (z, mean, log_var)]
    strided, dense = mixture_log_density(z, mean, log_var), mixture_log_density(*copies)
    torch.testing.assert_close(strided, dense)
    upstream = torch.ones(()).expand(7)
    ours, theirs = torch.autograd.grad(strided, (z, both), upstream), torch.autograd.grad(dense, copies, upstream)
    torch.testing.assert_close(ours, (theirs[0], torch.cat(theirs[1:], -1)), rtol=1e-5, atol=1e-5)


def test_threads(with_threads):
    leaves = operands((300, 700, 33), torch.float32)

    def run():
        output = mixture_log_density(*leaves)
        return [output, *torch.autograd.grad(output.sum(), leaves)]

    one, two, again = with_threads(1, run), with_threads(2, run), with_threads(2, run)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[2], two[2]), "a component belongs to one thread"
    assert torch.equal(one[3], two[3])
    torch.testing.assert_close(one[1], two[1])
    assert all(torch.equal(a, b) for a, b in zip(two, again, strict=True))


def test_scratch_does_not_grow_with_pairs():
    sizes = [posterior._workspace(backward, False, (n, n, 32), 2).nbytes for n in (1000, 10_000) for backward in (0, 1)]
    assert sizes[2] <= 10.1 * sizes[0]
    assert sizes[3] <= 10.1 * sizes[1]
    assert max(sizes) < 4 * 10_000 * 10_000 / 40


def test_gradcheck(backend):
    leaves = operands((4, 3, 2), torch.float64)
    with torch.no_grad():
        leaves[2][0, 0] = -50.0  # outside the clamp: no gradient
    assert torch.autograd.gradcheck(mixture_log_density, leaves)
    assert torch.autograd.gradcheck(lambda mean, log_var: mutual_information(mean, log_var, seed=SEED), leaves[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    arguments = [tensor.detach() for tensor in operands((5, 4, 3), dtype)]
    torch.library.opcheck(torch.ops.fastvae.mixture_log_density, arguments)
    log_density = torch.ops.fastvae.mixture_log_density(*arguments)
    upstream = (torch.ones_like(log_density), log_density)
    torch.library.opcheck(torch.ops.fastvae.mixture_log_density_backward, (*upstream, *arguments))


# --------------------------------------------------------------------------------------- mutual information
def test_information_of_separate_and_of_equal_posteriors(backend):
    means = 100 * torch.arange(50.0)[:, None]
    assert mutual_information(means, torch.zeros(50, 1), seed=SEED).item() == pytest.approx(math.log(50), abs=1e-5)
    assert mutual_information(torch.ones(50, 3), torch.zeros(50, 3)).item() == pytest.approx(0, abs=1e-6)
    assert mutual_information(torch.zeros(0, 3), torch.zeros(0, 3)).item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_information_against_a_plain_sum(dtype, backend, monkeypatch):
    monkeypatch.setattr(posterior, "_OWN_ELEMENTS", 64)  # 32 rows at a time
    _, mean, log_var = (t.detach() for t in operands((1, 300, 2), dtype))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    z = gaussian_sample_kl(mean.to(compute), log_var.to(compute), seed=SEED)[0].double()
    normal = Normal(mean.double(), (log_var.double() / 2).exp())
    joint = normal.log_prob(z[:, None]).sum(-1)
    expected = (joint.diagonal() - joint.logsumexp(1) + math.log(300)).mean()
    ours = mutual_information(mean, log_var, seed=SEED)
    assert ours.dtype == compute
    assert ours.item() == pytest.approx(expected.item(), rel=1e-9 if dtype == torch.float64 else 1e-5)


def test_information_without_gradients_draws_z_in_parts(backend, monkeypatch):
    _, mean, log_var = operands((1, 300, 2), torch.float64)
    whole = mutual_information(mean, log_var, seed=SEED)
    monkeypatch.setattr(posterior, "_DRAWN_ELEMENTS", 256)  # 128 rows at a time
    assert torch.equal(mutual_information(mean, log_var, seed=SEED), whole)  # gradients are recorded
    mean, log_var = mean.detach(), log_var.detach()
    parts = zip(mean.split(128), log_var.split(128), strict=True)
    z = torch.cat([gaussian_sample_kl(*p, seed=SEED + i * posterior._STREAM)[0] for i, p in enumerate(parts)])
    joint = Normal(mean, (log_var / 2).exp()).log_prob(z[:, None]).sum(-1)
    expected = (joint.diagonal() - joint.logsumexp(1) + math.log(300)).mean()
    assert mutual_information(mean, log_var, seed=SEED).item() == pytest.approx(expected.item(), rel=1e-9)


def test_information_is_that_of_a_linear_gaussian_channel(backend):
    """q(z|x) = N(x, 1) with x ~ N(0, s^2): 1/2 log(1 + s^2) nats, far below log N."""
    torch.manual_seed(0)
    means = 2 * torch.randn(4000, 1)
    estimate = mutual_information(means, torch.zeros_like(means), seed=SEED)
    assert estimate.item() == pytest.approx(0.5 * math.log(5), abs=0.03)


def test_information_keeps_its_bound_where_float32_is_coarse(backend):
    mean, log_var = 1e6 + torch.arange(64.0)[:, None], torch.full((64, 1), -12.0)
    assert mutual_information(mean, log_var, seed=SEED).item() == pytest.approx(math.log(64), abs=1e-4)


def test_information_follows_manual_seed_and_generator():
    _, mean, log_var = operands((1, 20, 3), torch.float32)
    torch.manual_seed(3)
    first = mutual_information(mean, log_var)
    assert first == mutual_information(mean, log_var, generator=torch.Generator().manual_seed(3))
    assert first != mutual_information(mean, log_var)


def test_errors_name_the_argument():
    z, mean = torch.zeros(4, 5), torch.zeros(3, 5)
    cases = [
        (TypeError, "z: expected a tensor, got list", {"z": [0.0]}),
        (TypeError, "z: expected float32, .* got torch.int64", {"z": z.long()}),
        (ValueError, r"z: expected shape \(N, latent\), got \(5,\)", {"z": z[0]}),
        (TypeError, "mean: expected torch.float32 as z, got torch.float64", {"mean": mean.double()}),
        (ValueError, r"mean: expected shape \(M, latent\) .* latent 5 as z, got \(3, 6\)", {"mean": torch.zeros(3, 6)}),
        (ValueError, r"mean: .* M at least 1 .*, got \(0, 5\)", {"mean": mean[:0]}),
        (ValueError, "mean: expected device cpu as z, got meta", {"mean": mean.to("meta")}),
        (TypeError, "log_var: expected torch.float32 as mean, got torch.float64", {"log_var": mean.double()}),
        (ValueError, r"log_var: expected the shape of mean, \(3, 5\), got \(4, 5\)", {"log_var": z}),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            mixture_log_density(**({"z": z, "mean": mean, "log_var": mean} | arguments))
    cases = [
        (TypeError, "mean: expected float32, .* got torch.int64", {"mean": mean.long()}),
        (ValueError, r"mean: expected shape \(N, latent\), got \(5,\)", {"mean": mean[0], "log_var": mean[0]}),
        (ValueError, r"log_var: expected the shape of mean", {"log_var": z}),
        (TypeError, "seed: expected an int64 tensor, got int", {"seed": 3}),
        (ValueError, "seed: expected None when a generator", {"seed": SEED, "generator": torch.Generator()}),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            mutual_information(**({"mean": mean, "log_var": mean} | arguments))
