"""Negative log-likelihoods, both CPU backends: definition, error budget, extremes, shared targets, op contract."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from torch.distributions import Bernoulli, Normal

from fastvae.functional import bernoulli_nll, gaussian_nll

# Shape of the prediction, dimensions of it that the target has, event_dims.
SHAPES = [
    ((1,), 1, 1),
    ((7, 33), 2, 1),
    ((257, 3), 2, 2),
    ((3, 257), 2, 1),
    ((3, 5, 33), 2, 1),
    ((2, 3, 4, 5, 7), 4, 3),
    ((2, 2500), 2, 1),
    ((2, 3, 1100), 1, 1),
    ((9, 64, 33), 2, 1),
]
LOG_VARS = ["number", "row", "full"]
densities = pytest.mark.parametrize("log_var", ["", *LOG_VARS], ids=lambda kind: kind or "Bernoulli")


def operands(shape, dtype=torch.float32, log_var="", scale=2.0):
    """Leaves: a prediction, a target in [0, 1], with a log_var if one is asked for."""
    (size, dims, event_dims), random = shape, torch.Generator().manual_seed(0)
    prediction = (scale * torch.randn(size, generator=random)).to(dtype)
    tensors = [prediction, torch.rand(size[len(size) - dims :], generator=random).to(dtype)]
    if log_var:
        kinds = {"number": (), "row": size[len(size) - event_dims :], "full": size}
        tensors.append(torch.randn(kinds[log_var], generator=random).to(dtype))
    return [tensor.requires_grad_() for tensor in tensors]


def nll_of(tensors, event_dims=1):
    return (bernoulli_nll if len(tensors) == 2 else gaussian_nll)(*tensors, event_dims=event_dims)


def eager(tensors, event_dims):
    """What a user writes."""
    if len(tensors) == 2:
        terms = F.binary_cross_entropy_with_logits(tensors[0], tensors[1].expand_as(tensors[0]), reduction="none")
    else:
        mean, target, log_var = tensors
        terms = 0.5 * (math.log(2 * math.pi) + log_var + (target - mean) ** 2 / log_var.exp())
    return terms.flatten(-event_dims).sum(-1)


@pytest.mark.usefixtures("poison")
@densities
@pytest.mark.parametrize(
    ("shape", "dtype"), [(s, d) for s in SHAPES for d in DTYPES if d == torch.float32 or s in SHAPES[4:8:3]], ids=str
)
def test_matches_float64(shape, dtype, log_var, backend, assert_within_budget):
    ours = operands(shape, dtype, log_var)
    results = []
    for tensors, function in ((ours, nll_of), *(([t.detach().to(d).requires_grad_() for t in ours], eager)
                                                for d in (torch.float64, dtype))):  # fmt: skip
        nll = function(tensors, shape[2])
        grad = torch.randn(nll.shape, generator=torch.Generator().manual_seed(1)).to(nll.dtype)
        results.append([nll, *torch.autograd.grad(nll, tensors, grad)])
    assert results[0][0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, mine, truth, peer in zip(["nll", "grad", "grad_target", "grad_log_var"], *results, strict=False):
        # In float64 the peer is the definition itself and leaves no room for the order of a sum.
        rounding = {torch.float32: 4, torch.float64: 32}.get(mine.dtype, 0.6)
        assert_within_budget(name, mine, truth, peer, rounding)


def test_are_those_of_torch_distributions(backend):
    logits, target = operands(SHAPES[1], torch.float64)
    rounded = target.detach().round()
    torch.testing.assert_close(bernoulli_nll(logits, rounded), -Bernoulli(logits=logits).log_prob(rounded).sum(-1))
    for kind in LOG_VARS:
        mean, target, log_var = operands(SHAPES[4], torch.float64, kind)
        expected = -Normal(mean, (0.5 * log_var).exp()).log_prob(target).sum(-1)
        torch.testing.assert_close(gaussian_nll(mean, target, log_var), expected, rtol=1e-12, atol=1e-12)


def test_a_number_is_a_tensor_without_gradient(backend):
    mean, target = operands(SHAPES[4])
    for value in (0.5, -1):
        number, tensor = (gaussian_nll(mean, target, v) for v in (value, torch.tensor(float(value))))
        assert torch.equal(number, tensor)


def test_confident_predictions_keep_their_digits(backend):
    """log(1 + exp(-|l|)) is below the last digit of 1 from |l| = 16 on; eager's gradient sigmoid(l) - 1 likewise."""
    magnitude = torch.linspace(1, 80, 257)[:, None]
    logits = torch.cat([magnitude, -magnitude], 1).requires_grad_()
    target = torch.tensor([1.0, 0.0]).expand(257, 2)
    for column in (slice(0, 1), slice(1, 2)):
        nll = bernoulli_nll(logits[:, column], target[:, column])
        expected = torch.log1p(torch.exp(-magnitude.double()))[:, 0]
        torch.testing.assert_close(nll.double(), expected, rtol=4e-7, atol=0)
    grad = torch.autograd.grad(bernoulli_nll(logits, target).sum(), logits)[0]
    expected = torch.sigmoid(-magnitude.double()) * torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(grad.double(), expected, rtol=4e-7, atol=0)

    rows = magnitude.expand(-1, 300)  # wide enough for several terms to share a logarithm
    expected = 300 * torch.log1p(torch.exp(-magnitude.double()))[:, 0]
    for sign in (1.0, -1.0):
        nll = bernoulli_nll(sign * rows, torch.full((257, 300), max(sign, 0.0)))
        torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=0)


EXTREMES = [-math.inf, -3e38, -1e4, -104.0, -88.5, -87.0, 0.0, -0.0, 87.0, 88.5, 104.0, 1e4, 3e38, math.inf]


@pytest.mark.parametrize("width", [1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_extreme_logits_give_the_exact_answer(dtype, width, backend):
    logits = torch.tensor(EXTREMES, dtype=torch.float64).repeat_interleave(20).to(dtype)  # enough to fill vectors
    exact = logits.double()
    for t in (0.0, 0.25, 1.0):
        leaf = logits[:, None].repeat(1, width).requires_grad_()
        nll = bernoulli_nll(leaf, torch.full((len(logits), width), t, dtype=dtype))
        far = torch.where(exact < 0, t, 1 - t)  # how much of the target is on the other side
        expected = torch.where(far == 0, 0, far * exact.abs()) + torch.log1p(torch.exp(-exact.abs()))
        overflows = width * expected > torch.finfo(nll.dtype).max
        expected = torch.where(overflows, math.inf, width * expected)
        torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=width * 1e-37)
        grad = torch.autograd.grad(nll.sum(), leaf)[0]
        expected = ((1 - t) * torch.sigmoid(exact) - t * torch.sigmoid(-exact)).to(dtype)[:, None].expand_as(grad)
        rounding = 1e-6 if dtype.itemsize > 2 else 0.01
        torch.testing.assert_close(grad.double(), expected.double(), rtol=rounding, atol=1e-37)


@densities
@pytest.mark.parametrize("width", [37, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_stays_and_stays_where_it_is(dtype, width, log_var, backend):
    tensors = [t.detach() for t in operands(((5, width), 2, 1), dtype, log_var)]
    tensors[0][1, 36] = math.nan
    if log_var == "full":
        tensors[2][3, 0] = math.nan
    tensors = [t.requires_grad_() for t in tensors]
    nll = nll_of(tensors)
    assert nll.isnan().tolist() == [False, True, False, log_var == "full", False]
    grad = torch.autograd.grad(nll.sum(), tensors[0])[0]
    assert grad.isnan().sum() == 1 + (log_var == "full")
    assert grad[1, 36].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("place", "value"),
    [((0, 0), -1e-3), ((3, 36), 1.01), ((4, 17), math.nan), ((4, 36), math.inf), ((1, 0), -math.inf)],
)
def test_an_impossible_target_is_an_error(place, value, dtype, backend):
    logits, target = (t.detach() for t in operands(((2, 5, 37), 2, 1), dtype))
    target[0, :3] = torch.tensor([0.0, 1.0, -0.0])  # the bounds are possible
    bernoulli_nll(logits, target)
    target[place] = value
    with pytest.raises(ValueError, match=r"^target: expected values in \[0, 1\], got \S+ at " + re.escape(str(place))):
        bernoulli_nll(logits, target)


EXTREME_LOG_VARS = [-math.inf, -3e38, -1e4, -41.0, -40.0, 0.0, 40.0, 41.0, 1e4, 3e38, math.inf]


@pytest.mark.parametrize("log_var", LOG_VARS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_extreme_log_variances_are_finite_and_their_gradients_stop(dtype, log_var, backend):
    row = torch.tensor(EXTREME_LOG_VARS).to(dtype)
    mean, target = torch.ones(3, len(row), dtype=dtype), torch.full((3, len(row)), 0.5, dtype=dtype)
    values = {"number": [*row], "row": [row], "full": [row.repeat(3, 1)]}[log_var]
    for value in values:
        value = value.clone().requires_grad_()
        nll = gaussian_nll(mean.requires_grad_(), target, value)
        grads = torch.autograd.grad(nll.sum(), (mean, value))
        assert all(torch.isfinite(x).all() for x in (nll, *grads))
        assert torch.equal(nll, gaussian_nll(mean, target, value.detach().clamp(-40, 40)))
        assert torch.equal(grads[1] != 0, value.abs() <= 40), "the bounds are inside, as for torch.clamp"


def test_a_far_mean_does_not_overflow_on_the_way(backend):
    mean, zero = torch.full((1, 33), 1e25).requires_grad_(), torch.zeros(1, 33)
    nll = gaussian_nll(mean, zero, 40.0)  # the square of 1e25 is beyond float32, that of 1e25 exp(-20) is not
    torch.testing.assert_close(nll.item(), 33 * (0.5e50 * math.exp(-40)), rtol=1e-5, atol=0)
    assert torch.isfinite(torch.autograd.grad(nll.sum(), mean)[0]).all()


@densities
def test_types_that_mix(log_var, backend):
    """A target in float32 beside half predictions, a shared log_var in float32: each keeps its type and digits."""
    prediction, target, *others = operands(SHAPES[4], torch.bfloat16, log_var)
    exact_target = torch.rand(target.shape).requires_grad_()
    others = [t.detach().float().requires_grad_() for t in others]
    nll = nll_of([prediction, exact_target, *others])
    grads = torch.autograd.grad(nll.sum(), [prediction, exact_target, *others])
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, *[torch.float32] * len(others)]
    wide = [t.detach().float().requires_grad_() for t in (prediction, exact_target, *others)]
    expected = nll_of(wide)
    torch.testing.assert_close(nll, expected)
    wide_grads = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(grads[0].float(), wide_grads[0], rtol=0.004, atol=0)
    torch.testing.assert_close(grads[1:], wide_grads[1:])
    double = nll_of([prediction, exact_target.double(), *others])
    assert double.dtype == torch.float32
    torch.testing.assert_close(double, nll)


@pytest.mark.usefixtures("poison")
@densities
@pytest.mark.parametrize("size", [(0, 4), (3, 0), (0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_zero_sizes(size, log_var, backend):
    tensors = operands((size, 2, 1), torch.float32, log_var)
    nll = nll_of(tensors)
    assert torch.equal(nll, torch.zeros(size[:-1]))
    for grad, leaf in zip(torch.autograd.grad(nll, tensors, torch.ones_like(nll)), tensors, strict=True):
        assert torch.equal(grad, torch.zeros(leaf.shape))


@densities
def test_expanded_and_strided_inputs(log_var, backend):
    torch.manual_seed(0)
    prediction = torch.randn(3, 33, 7).transpose(1, 2).requires_grad_()
    target, log_vars = torch.rand(7, 1).requires_grad_(), torch.randn(33, 2).requires_grad_()
    others = {"": [], "number": [log_vars[0, 0]], "row": [log_vars[:, 0]], "full": [log_vars[:, 0].expand(3, 7, 33)]}
    tensors = [prediction, target.expand(7, 33), *others[log_var]]
    copies = [t.detach().clone().contiguous().requires_grad_() for t in tensors]
    ours, dense = nll_of(tensors), nll_of(copies)
    torch.testing.assert_close(ours, dense)
    upstream = torch.ones(()).expand(3, 7)
    grads = torch.autograd.grad(ours, [prediction, target], upstream)
    expected = torch.autograd.grad(dense, copies, upstream)
    torch.testing.assert_close(grads, (expected[0], expected[1].sum(1, keepdim=True)))


@pytest.mark.parametrize("target_grad", [False, True])
@densities
@pytest.mark.parametrize("size", [(5, 257, 33), (2, 3, 9000)], ids=str)
def test_threads_do_not_change_a_bit(size, log_var, target_grad, with_threads):
    tensors = operands((size, 2, 1), torch.float32, log_var)
    tensors[1].requires_grad_(target_grad)

    def run():
        nll = nll_of(tensors)
        return [nll, *torch.autograd.grad(nll.sum(), [t for t in tensors if t.requires_grad])]

    one, two = with_threads(1, run), with_threads(2, run)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@densities
def test_gradcheck(log_var, backend):
    tensors = operands(((2, 3, 2, 3), 3, 2), torch.float64, log_var)
    with torch.no_grad():
        tensors[1].mul_(0.9).add_(0.05)  # room for differences within [0, 1]
        if log_var:
            tensors[2].view(-1)[0] = 50.0 if log_var != "number" else 0.3  # outside the clamp: no gradient
    assert torch.autograd.gradcheck(lambda *t: nll_of(t, 2), tensors)


@pytest.mark.parametrize(
    ("log_var", "dtype"),
    [("", torch.bfloat16), ("number", torch.float64), ("row", torch.bfloat16), ("full", torch.float16)],
)
def test_opcheck(log_var, dtype):
    tensors = [t.detach() for t in operands(((2, 3, 2, 3), 3, 2), dtype, log_var)]
    if log_var == "row":
        tensors[2] = tensors[2].float()
    name = "gaussian_nll" if log_var else "bernoulli_nll"
    forward, backward = (getattr(torch.ops.fastvae, n) for n in (name, f"{name}_backward"))
    torch.library.opcheck(forward, (*tensors, 2))
    grad = forward(*tensors, 2)
    for needed in ([True] * len(tensors), [True] + [False] * (len(tensors) - 1)):
        torch.library.opcheck(backward, (grad, *tensors, 2, *needed))


def test_errors_name_the_argument():
    mean, wrong = torch.zeros(4, 5), torch.zeros(4, 6)
    cases = [
        (TypeError, "mean: expected a tensor, got list", {"mean": [0.0]}),
        (TypeError, "mean: expected float32, .* got torch.int64", {"mean": mean.long()}),
        (TypeError, "target: expected a tensor, got float", {"target": 0.5}),
        (TypeError, "target: expected float32, .* got torch.uint8", {"target": mean.byte()}),
        (ValueError, "target: expected device cpu as mean, got meta", {"target": mean.to("meta")}),
        (ValueError, r"target: expected .* mean's shape \(4, 5\) .*, got \(4, 6\)", {"target": wrong}),
        (ValueError, r"target: expected .*, got \(2, 4, 5\)", {"target": torch.zeros(2, 4, 5)}),
        (ValueError, r"target: expected .* 2 event dimensions or more, got \(5,\)",
         {"target": mean[0], "event_dims": 2}),
        (ValueError, "event_dims: expected 1 to 2, the dimensions of mean, got 0", {"event_dims": 0}),
        (ValueError, "event_dims: expected 1 to 2, the dimensions of mean, got 3", {"event_dims": 3}),
        (TypeError, "log_var: expected float32, .* got torch.int64", {"log_var": mean.long()}),
        (TypeError, "log_var: expected a number or a tensor, got str", {"log_var": "1"}),
        (ValueError, "log_var: expected device cpu as mean, got meta", {"log_var": mean.to("meta")}),
        (ValueError, r"log_var: expected a number or shape \(\), event = \(5,\) .* \(4, 5\), got \(4,\)",
         {"log_var": mean[:, 0]}),
    ]  # fmt: skip
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            gaussian_nll(**({"mean": mean, "target": mean, "log_var": 0.0} | arguments))
    with pytest.raises(TypeError, match="logits: expected a tensor, got list"):
        bernoulli_nll([0.0], mean)
