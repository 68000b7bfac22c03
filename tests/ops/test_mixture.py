"""Mixture terms, both CPU backends: the identities they obey, the error budget, extremes, the op contract."""

import math

import pytest
import torch
from cases import DTYPES
from torch.distributions import Categorical, Normal, kl_divergence

from fastvae.functional import categorical_mixture_kl, mixture_kl
from fastvae.ops import mixture

SHAPES = [(1, 1, 1, 1), (7, 3, 5, 2), (33, 7, 1, 3), (64, 20, 5, 2), (257, 2, 3, 33), (5, 3, 33, 7)]
FAMILIES = ["gaussian", "categorical"]


def operands(shape, family, dtype=torch.float64):
    batch, variables, size, latent = shape
    torch.manual_seed(0)
    posterior, prior = (batch, variables, latent), (variables, size, latent)
    shapes = [posterior, (batch, variables, size), prior]
    if family == "gaussian":
        shapes = [posterior, posterior, (batch, variables, size), prior, prior]
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def terms_of(family):
    return mixture_kl if family == "gaussian" else categorical_mixture_kl


def definition(family):
    return mixture.reference_gaussian if family == "gaussian" else mixture.reference_categorical


def expected_kl(family, inputs):
    """The mean over components of KL(q(z|x) || p(z|c)), of each datum, by torch.distributions."""
    if family == "gaussian":
        mean, log_var, logits, component_mean, component_log_var = inputs
        posterior = Normal(mean[:, :, None], (0.5 * log_var[:, :, None]).exp())
        kl = kl_divergence(posterior, Normal(component_mean, (0.5 * component_log_var).exp())).sum(-1)
    else:
        z_logits, logits, component_logits = inputs
        kl = kl_divergence(Categorical(logits=z_logits[:, :, None]), Categorical(logits=component_logits))
    return (logits.softmax(-1) * kl).sum((1, 2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_divergence_and_dispersion_sum_to_the_expected_divergence(shape, family, backend):
    inputs = operands(shape, family)
    terms = terms_of(family)(*inputs)
    torch.testing.assert_close(terms.kl + terms.dispersion, expected_kl(family, inputs), rtol=1e-10, atol=1e-10)
    assert (terms.dispersion >= -1e-12).all()
    assert (terms.kl >= -1e-12).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_aggregate_and_information_sum_to_the_mean_divergence(shape, family, backend):
    inputs = operands(shape, family)
    terms, logits = terms_of(family)(*inputs), inputs[-3 if family == "gaussian" else 1]
    uniform = Categorical(logits=torch.zeros_like(logits))
    expected = kl_divergence(Categorical(logits=logits), uniform).mean(0)
    torch.testing.assert_close(terms.aggregate_kl + terms.mutual_information, expected, rtol=1e-10, atol=1e-10)
    assert (terms.aggregate_kl >= -1e-12).all()
    assert (terms.mutual_information >= -1e-12).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_dispersion_is_that_of_the_log_partition_function(family, backend):
    """L_d = E A(eta_c) - A(E eta_c), by the exponential families' own A."""
    inputs = operands((9, 4, 5, 3), family)
    if family == "gaussian":
        _, _, logits, mean, log_var = inputs
        parameters = torch.cat([mean * (-log_var).exp(), -0.5 * (-log_var).exp()], -1)

        def log_partition(eta):
            first, second = eta.chunk(2, -1)
            return (-first.square() / (4 * second) - 0.5 * (-2 * second).log()).sum(-1)
    else:
        _, logits, component_logits = inputs
        parameters = component_logits - component_logits[..., -1:]

        def log_partition(eta):
            return eta.logsumexp(-1)

    q = logits.softmax(-1)
    average = torch.einsum("bmk,mke->bme", q, parameters)
    expected = ((q * log_partition(parameters)).sum(-1) - log_partition(average)).sum(1)
    torch.testing.assert_close(terms_of(family)(*inputs).dispersion, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, family, backend, assert_within_budget):
    ours = operands(shape, family, dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    peer = [x.detach().to(compute).requires_grad_() for x in ours]
    exact = [x.detach().double().requires_grad_() for x in ours]
    outputs = terms_of(family)(*ours)
    assert all(x.dtype == compute for x in outputs)
    upstream = [torch.randn(x.shape, dtype=torch.float64) for x in outputs]
    results = [*outputs, *torch.autograd.grad(outputs, ours, [g.to(compute) for g in upstream])]
    references = []
    for leaves in (exact, peer):
        made = definition(family)(*leaves)[:4]
        references.append([*made, *torch.autograd.grad(made, leaves, [g.to(made[0].dtype) for g in upstream])])
    for n, (mine, truth, other) in enumerate(zip(results, *references, strict=True)):
        # Terms that are 0 (of one component, or of one datum) are so to the rounding of 1.
        one = torch.ones(1, dtype=torch.float64)
        mine, truth, other = (torch.cat([x.flatten(), one.to(x.dtype)]) for x in (mine, truth, other))
        rounding = {torch.float32: 8, torch.float64: 64}.get(mine.dtype, 1)
        assert_within_budget(str(n), mine, truth, other, rounding)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradcheck(family, backend):
    inputs = operands((4, 2, 3, 2), family)
    if family == "gaussian":
        with torch.no_grad():
            inputs[1][0, 0, 0], inputs[4][0, 0, 0] = -50.0, 50.0  # outside the clamp: no gradient
    torch.autograd.gradcheck(terms_of(family), inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_opcheck(family):
    inputs = [x.detach() for x in operands((5, 2, 3, 2), family, torch.float32)]
    if family == "categorical":
        inputs = [inputs[0], None, inputs[1], None, inputs[2]]
    outputs = torch.ops.fastvae.mixture_kl(*inputs)
    torch.library.opcheck(torch.ops.fastvae.mixture_kl, inputs)
    grads = [torch.randn_like(x) for x in outputs[:4]]
    torch.library.opcheck(torch.ops.fastvae.mixture_kl_backward, (grads, outputs[4], *inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_components_have_no_dispersion(family, backend):
    inputs = [x.detach() for x in operands((33, 3, 5, 2), family, torch.float32)]
    for components in inputs[3:] if family == "gaussian" else inputs[2:]:
        components.copy_(components[:, :1].expand_as(components))
    terms = terms_of(family)(*inputs)
    assert terms.dispersion.abs().max() < 2e-6
    logits = inputs[2 if family == "gaussian" else 1]
    logits.zero_()
    terms = terms_of(family)(*inputs)
    assert terms.aggregate_kl.abs().max() < 1e-7
    assert terms.mutual_information.abs().max() < 1e-6


def test_certain_codes_carry_their_entropy(backend):
    """Each datum in a component of its own: q_bar is uniform, and I(c;x) = log K."""
    inputs = [x.detach() for x in operands((10, 2, 5, 2), "gaussian", torch.float32)]
    inputs[2] = torch.where(torch.arange(5) == torch.arange(10)[:, None] % 5, 0.0, -math.inf)[:, None].expand(10, 2, 5)
    inputs[2] = inputs[2].clone().requires_grad_()
    terms = mixture_kl(*inputs)
    torch.testing.assert_close(terms.mutual_information, torch.full((2,), math.log(5)))
    assert terms.aggregate_kl.abs().max() < 1e-6
    assert terms.dispersion.abs().max() < 1e-5
    (grad,) = torch.autograd.grad(sum(x.sum() for x in terms), inputs[2])
    assert grad.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_extreme_values_are_finite(family, backend):
    inputs = [x.detach() for x in operands((13, 2, 3, 2), family, torch.float32)]
    extremes = torch.tensor([-3e38, -1e4, -41.0, -40.0, 0.0, 40.0, 41.0, 1e4, 3e38])
    for places in ((1, 4), (0, 1, 2))[family == "categorical"]:
        flat = inputs[places].view(-1)
        flat[: min(9, flat.numel())] = extremes[: flat.numel()].clamp(-1e4, 1e4 if family == "categorical" else 3e38)
    leaves = [x.requires_grad_() for x in inputs]
    terms = terms_of(family)(*leaves)
    grads = torch.autograd.grad(terms, leaves, [torch.ones_like(x) for x in terms])
    assert all(x.isfinite().all() for x in (*terms, *grads))


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_stays_with_its_datum_and_variable(family, backend):
    inputs = [x.detach() for x in operands((37, 2, 3, 2), family, torch.float32)]
    inputs[0][4, 1, 0] = math.nan
    terms = terms_of(family)(*inputs)
    assert terms.kl.isnan().nonzero().flatten().tolist() == [4]
    assert not terms.dispersion.isnan().any()
    inputs[2 if family == "gaussian" else 1][5, 0, 0] = math.nan
    terms = terms_of(family)(*inputs)
    assert terms.dispersion.isnan().nonzero().flatten().tolist() == [5]
    assert terms.mutual_information.isnan().tolist() == [True, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_do_not_change_a_bit(family, with_threads):
    leaves = operands((300, 20, 5, 2), family, torch.float32)

    def run():
        terms = terms_of(family)(*leaves)
        return [*terms, *torch.autograd.grad(terms, leaves, [torch.ones_like(x) for x in terms])]

    assert all(torch.equal(a, b) for a, b in zip(with_threads(1, run), with_threads(2, run), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_strided_inputs(family, backend):
    dense = operands((6, 3, 4, 2), family, torch.float32)
    strided = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in dense]
    results = []
    for leaves in (dense, strided):
        terms = terms_of(family)(*leaves)
        loss = sum(x.expand(3, *x.shape).sum() for x in terms)  # an expanded gradient
        results.append([*terms, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiles_whole_and_runs_under_autocast():
    leaves = operands((5, 3, 4, 2), "gaussian", torch.float32)

    def loss(*inputs):
        terms = mixture_kl(*inputs)
        return (terms.kl - 0.3 * terms.dispersion).mean() + terms.aggregate_kl.sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, compiled = loss(*leaves), torch.compile(loss, fullgraph=True)(*leaves)
    torch.testing.assert_close(eager, compiled)
    for a, b in zip(torch.autograd.grad(eager, leaves), torch.autograd.grad(compiled, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_mistakes_are_named():
    good = operands((4, 3, 5, 2), "gaussian", torch.float32)

    def call(**changes):
        names = ["mean", "log_var", "logits", "component_mean", "component_log_var"]
        return mixture_kl(**(dict(zip(names, good, strict=True)) | changes))

    for changes, error, message in [
        ({"mean": torch.zeros(4, 3)}, ValueError, r"mean: expected shape \(batch, variables, latent\), none of them 0"),
        ({"mean": torch.zeros(0, 3, 2)}, ValueError, r"mean: .* got \(0, 3, 2\)"),
        ({"mean": torch.zeros(4, 3, 2, dtype=torch.int64)}, TypeError, "mean: expected float32"),
        ({"log_var": torch.zeros(4, 3, 1)}, ValueError, r"log_var: expected shape .* = \(4, 3, 2\), got \(4, 3, 1\)"),
        ({"logits": torch.zeros(4, 2, 5)}, ValueError, r"logits: expected shape \(4, 3, components\), got \(4, 2, 5\)"),
        ({"component_mean": torch.zeros(3, 4, 2)}, ValueError, r"component_mean: .* = \(3, 5, 2\), got \(3, 4, 2\)"),
        ({"component_log_var": None}, TypeError, "component_log_var: expected a tensor, got NoneType"),
    ]:
        with pytest.raises(error, match=message):
            call(**changes)
    with pytest.raises(ValueError, match=r"component_logits: expected shape .* = \(3, 5, 2\), got \(3, 5, 1\)"):
        categorical_mixture_kl(good[0], good[2], torch.zeros(3, 5, 1))
