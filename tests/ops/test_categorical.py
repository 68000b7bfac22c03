"""Gumbel-softmax + KL, both CPU backends: definition, error budget, noise, statistics, extremes, op contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from torch.distributions import Categorical, kl_divergence

from fastvae.functional import categorical_kl, gumbel_softmax_sample_kl
from fastvae.ops import random

SEED = torch.tensor([123456789012345])
SHAPES = [(1,), (1, 1), (33, 7), (257, 3), (3, 257), (2, 3, 65), (2, 2500)]
INF = math.inf


def operands(shape, dtype, prior="none"):
    torch.manual_seed(0)
    logits = (2 * torch.randn(shape)).to(dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    prior_shape = {"none": None, "shared": shape[-1:], "full": shape}[prior]
    priors = [] if prior_shape is None else [torch.randn(prior_shape, dtype=compute)]
    return [tensor.requires_grad_() for tensor in (logits, *priors)]


def call(logits, *prior, **arguments):
    return gumbel_softmax_sample_kl(logits, prior_logits=prior[0] if prior else None, **arguments)


def eager(logits, prior, noise, temperature):
    """What a user writes, with the noise given."""
    log_p = F.log_softmax(logits, -1)
    sample = F.softmax((log_p + noise.to(logits.dtype)) / temperature, -1)
    log_prior = F.log_softmax((prior[0] if prior else torch.zeros_like(logits)).to(logits.dtype), -1)
    return sample, (log_p.exp() * (log_p - log_prior)).sum(-1)


def noise_of(shape, num_samples):
    """The stream at the flat index."""
    shape = shape if num_samples is None else (num_samples, *shape)
    return random.gumbel(SEED, torch.arange(math.prod(shape))).reshape(shape)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("prior", ["none", "shared", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, prior, backend, assert_within_budget):
    num_samples = None if shape[0] % 2 else 3
    ours = operands(shape, dtype, prior)
    peer = [tensor.detach().clone().requires_grad_() for tensor in ours]
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    noise = noise_of(shape, num_samples)

    outputs = call(*ours, num_samples=num_samples, temperature=0.7, seed=SEED)
    exact_outputs, peer_outputs = (eager(x[0], x[1:], noise, 0.7) for x in (exact, peer))
    assert outputs[0].dtype == dtype
    assert outputs[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    torch.manual_seed(1)
    grad_outputs = [torch.randn(o.shape).to(o.dtype) for o in outputs]
    results = [*outputs, *torch.autograd.grad(outputs, ours, grad_outputs)]
    references = []
    for made, leaves in ((exact_outputs, exact), (peer_outputs, peer)):
        upstream = [g.to(o.dtype) for g, o in zip(grad_outputs, made, strict=True)]
        references.append([*made, *torch.autograd.grad(made, leaves, upstream)])
    for name, mine, truth, other in zip(
        ["sample", "kl", "grad_logits", "grad_prior"], results, *references, strict=False
    ):
        # Half precision: computed in float32 and rounded once. The noise is float32, good to 2e-6, whatever the type.
        noise_error = 0 if name == "kl" else 4e-6 / torch.finfo(mine.dtype).eps
        rounding = {torch.float32: 8, torch.float64: 16}.get(mine.dtype, 0.5)
        assert_within_budget(name, mine, truth, other, rounding + noise_error)


@pytest.mark.parametrize("prior", ["none", "shared", "full"])
@pytest.mark.parametrize("shape", [(33, 7), (3, 257)], ids=str)
def test_hard_samples_are_one_hot_and_have_the_soft_gradient(shape, prior, backend):
    leaves = operands(shape, torch.float32, prior)
    (hard, hard_kl), (soft, soft_kl) = (
        call(*leaves, hard=hard, temperature=0.7, num_samples=2, seed=SEED) for hard in (True, False)
    )
    assert torch.equal(hard, F.one_hot(soft.argmax(-1), shape[-1]).float())
    assert torch.equal(hard_kl, soft_kl)
    upstream = [torch.randn_like(soft), torch.randn_like(soft_kl)]
    ours, expected = (torch.autograd.grad(o, leaves, upstream) for o in ((hard, hard_kl), (soft, soft_kl)))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 7, 64, 65, 1030])
def test_hard_samples_of_both_backends_are_the_largest_score(dtype, classes, backend):
    logits = operands((19, classes), dtype)[0].detach()
    sample, _ = gumbel_softmax_sample_kl(logits, hard=True, num_samples=2, seed=SEED)
    scores = logits.double() + noise_of((19, classes), 2)
    top = scores.topk(min(2, classes), -1).values
    clear = top[..., 0] - top[..., -1] > 1e-5 if classes > 1 else torch.ones(2, 19, dtype=torch.bool)
    assert clear.float().mean() > 0.99
    expected = F.one_hot(scores.argmax(-1), classes).to(dtype)
    assert torch.equal(sample[clear], expected[clear])
    assert torch.equal(sample.sum(-1), torch.ones(2, 19, dtype=dtype))


def test_the_only_possible_class_is_drawn(backend):
    logits = torch.full((40, 70), -INF)
    logits.diagonal()[:] = -3.0
    for hard in (False, True):
        sample, kl = gumbel_softmax_sample_kl(logits, hard=hard, seed=SEED)
        assert torch.equal(sample, torch.eye(40, 70))
        torch.testing.assert_close(kl, torch.full((40,), math.log(70)))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("hard", [False, True])
def test_classes_follow_the_probabilities_whatever_the_temperature(temperature, hard, backend):
    """Chi-square of the largest entry's class: 9 degrees of freedom, beyond 33.7 in one of 10,000 draws."""
    logits = torch.linspace(-2, 2, 10)
    draws = 40_000
    sample, _ = gumbel_softmax_sample_kl(logits, temperature=temperature, hard=hard, num_samples=draws, seed=SEED)
    counts = torch.bincount(sample.argmax(-1), minlength=10)
    expected = draws * F.softmax(logits, -1)
    assert ((counts - expected).square() / expected).sum() < 33.7


def test_a_falling_temperature_nears_one_hot(backend):
    logits = operands((64, 10), torch.float32)[0]
    samples = [gumbel_softmax_sample_kl(logits, temperature=t, seed=SEED)[0] for t in (3.0, 1.0, 0.1, 1e-5)]
    largest = [sample.max(-1).values.mean().item() for sample in samples]
    assert largest == sorted(largest)
    assert largest[-1] > 0.999
    hard = gumbel_softmax_sample_kl(logits, hard=True, seed=SEED)[0]
    assert all(torch.equal(sample.argmax(-1), hard.argmax(-1)) for sample in samples)


@pytest.mark.parametrize("prior", ["none", "shared", "full"])
def test_kl_is_that_of_torch_distributions(prior, backend):
    logits, *priors = operands((33, 7), torch.float64, prior)
    other = Categorical(logits=priors[0].expand(33, 7) if priors else torch.zeros(33, 7, dtype=torch.float64))
    expected = kl_divergence(Categorical(logits=logits), other)
    ours = categorical_kl(logits, *priors)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), [logits, *priors]), torch.autograd.grad(expected.sum(), [logits, *priors])
    )
    assert torch.equal(ours, call(logits, *priors, seed=SEED)[1])


def test_posterior_equal_to_the_prior_has_no_divergence(backend):
    logits = operands((7, 33), torch.float32)[0]
    assert categorical_kl(logits, logits).abs().max() < 1e-6
    assert categorical_kl(torch.full((3, 33), 5.0)).abs().max() < 1e-6


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_extreme_logits_are_finite(dtype, temperature, hard, backend):
    rows = [[1e4, -1e4, 0], [-INF, 1e4, -1e4], [-INF, -INF, -3], [1e30, -1e30, -INF], [-1e38, -1e38, -1e38], [0, 0, 0]]
    logits = torch.tensor(rows).to(dtype).requires_grad_()
    outputs = gumbel_softmax_sample_kl(logits, temperature=temperature, hard=hard, seed=SEED)
    grads = torch.autograd.grad(outputs, logits, [torch.ones_like(o) for o in outputs])
    assert all(torch.isfinite(x).all() for x in (*outputs, *grads))
    impossible = logits == -INF
    assert (outputs[0][impossible] == 0).all()
    assert (grads[0][impossible] == 0).all()
    expected = torch.tensor([math.log(3)] * 4 + [0.0] * 2)
    torch.testing.assert_close(outputs[1].float(), expected, rtol=1e-6, atol=1e-6)


def test_classes_that_the_prior_excludes(backend):
    prior = torch.tensor([0.0, -INF, 0.0])
    logits = torch.tensor([[1.0, -INF, 2.0], [1.0, 0.0, 2.0]])
    kl = categorical_kl(logits, prior)
    assert torch.isfinite(kl[0])
    assert kl[1] == INF
    leaf, prior = logits[:1].clone().requires_grad_(), prior.requires_grad_()
    grads = torch.autograd.grad(categorical_kl(leaf, prior).sum(), [leaf, prior])
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("classes", [7, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_fills_its_row_and_no_other(dtype, classes, hard, backend):
    logits = operands((20, classes), dtype)[0].detach()
    logits[1, 3] = math.nan
    logits[17] = -INF  # no class is possible
    logits[18, 2] = INF
    wrong = torch.tensor([row in (1, 17, 18) for row in range(20)])
    logits.requires_grad_()
    sample, kl = gumbel_softmax_sample_kl(logits, hard=hard, seed=SEED)
    (grad,) = torch.autograd.grad((sample, kl), logits, (torch.ones_like(sample), torch.ones_like(kl)))
    assert torch.equal(sample.isnan(), wrong[:, None].expand_as(sample))
    assert torch.equal(kl.isnan(), wrong)
    assert torch.equal(grad.isnan(), wrong[:, None].expand_as(grad))


@pytest.mark.parametrize(("seed", "element", "noise"), [(1343428, 3, -math.log(32 * math.log(2))),
                                                         (482, 4083, 24 * math.log(2))])  # fmt: skip
def test_noise_at_the_ends_of_the_stream(seed, element, noise, backend):
    """The uniform number of these elements is 0, and the largest there is, 1 - 2**-24."""
    logits, seed = (
        torch.zeros(element + 1, 1, dtype=torch.float64).expand(-1, 2)[: element // 2 + 1],
        torch.tensor([seed]),
    )
    sample = gumbel_softmax_sample_kl(logits, seed=seed)[0].flatten()
    other = random.gumbel(seed, torch.tensor([element ^ 1])).double()
    ours = (sample[element] / sample[element ^ 1]).log() + other
    torch.testing.assert_close(ours, torch.tensor([noise], dtype=torch.float64), rtol=0, atol=4e-6)


def test_words_at_the_ends(monkeypatch):
    """Words 0 and 2**32 - 1 are the uniform number 0; 2**31 is the largest, 1 - 2**-24."""
    words = torch.tensor([0, 2**32 - 1, 2**31, 2**31 - 1])
    monkeypatch.setattr(random, "philox", lambda seed, counters: tuple(w.expand(counters.shape) for w in words))
    numbers = random.gumbel(SEED, torch.arange(8))
    assert torch.isfinite(numbers).all()
    torch.testing.assert_close(numbers[:2], torch.tensor([-math.log(32 * math.log(2))] * 2))
    assert (numbers[2:4] - 24 * math.log(2)).abs().max() < 1e-6


@pytest.mark.parametrize("prior_shape", [(), (1,), (5,), (1, 5), (4, 1), (3, 4, 1), (3, 1, 5), (3, 4, 5)])
def test_priors_broadcast_and_their_gradients_sum(prior_shape, backend):
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    small = torch.randn(prior_shape, dtype=torch.float64).requires_grad_()
    full = small.detach().expand(3, 4, 5).clone().requires_grad_()
    weights = torch.randn(3, 4, dtype=torch.float64)
    kls = [categorical_kl(logits, prior) for prior in (small, full)]
    torch.testing.assert_close(*kls, rtol=1e-12, atol=1e-13)
    ours, expanded = (torch.autograd.grad(kl, prior, weights)[0] for kl, prior in zip(kls, (small, full), strict=True))
    torch.testing.assert_close(ours, expanded.sum_to_size(prior_shape), rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("prior", ["none", "shared", "full"])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 5), (2, 0, 70)], ids=str)
def test_zero_sizes(shape, hard, prior, backend):
    leaves = operands(shape, torch.float32, prior)
    sample, kl = call(*leaves, hard=hard, num_samples=2, seed=SEED)
    assert sample.shape == (2, *shape)
    assert kl.shape == shape[:-1]
    grads = torch.autograd.grad((sample, kl), leaves, (torch.ones_like(sample), torch.ones_like(kl)))
    for grad, leaf in zip(grads, leaves, strict=True):
        assert torch.equal(grad, torch.zeros(leaf.shape))


def test_expanded_and_strided_inputs(backend):
    torch.manual_seed(0)
    logits, prior = torch.randn(33, 7).T.requires_grad_(), torch.randn(33, 2)[:, 0].requires_grad_()
    copies = [t.detach().clone().contiguous().requires_grad_() for t in (logits, prior)]
    strided, dense = call(logits, prior, seed=SEED), call(*copies, seed=SEED)
    torch.testing.assert_close(strided, dense)
    upstream = [torch.randn(33, 7).T, torch.ones(1).expand(7)]
    ours, theirs = torch.autograd.grad(strided, [logits, prior], upstream), torch.autograd.grad(dense, copies, upstream)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(2000, 7), (30, 700)], ids=str)
@pytest.mark.parametrize("hard", [False, True])
def test_threads_do_not_change_a_bit(shape, hard, with_threads):
    leaves = operands(shape, torch.float32, "full")

    def run():
        outputs = call(*leaves, num_samples=2, hard=hard, seed=SEED)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])]

    one, two = with_threads(1, run), with_threads(2, run)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_threads_share_the_sums_of_a_common_prior(with_threads):
    leaves = operands((4096, 7), torch.float32, "shared")

    def run():
        return torch.autograd.grad(categorical_kl(*leaves).sum(), leaves)

    torch.testing.assert_close(with_threads(1, run), with_threads(2, run), rtol=1e-5, atol=1e-3)


def test_manual_seed_and_generator():
    logits = operands((4, 5), torch.float32)[0]

    def draws(**arguments):
        return [gumbel_softmax_sample_kl(logits, **arguments)[0] for _ in range(2)]

    torch.manual_seed(3)
    first = draws()
    torch.manual_seed(3)
    second = draws()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(*first)
    third = draws(generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    few, many = (gumbel_softmax_sample_kl(logits, num_samples=n, seed=SEED)[0] for n in (2, 5))
    assert torch.equal(few, many[:2])


def test_a_soft_sample_is_kept_and_a_hard_one_is_not(backend):
    """Nothing else of the samples' size is: the noise is made again."""
    logits = operands((4, 5), torch.float32)[0]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gumbel_softmax_sample_kl(logits, hard=True, num_samples=9, seed=SEED)
        assert sorted(kept) == [1, 20]
        gumbel_softmax_sample_kl(logits, num_samples=9, seed=SEED)
    assert sorted(kept) == [1, 1, 20, 20, 180]


@pytest.mark.parametrize("prior", ["none", "shared", "full"])
def test_gradcheck(prior, backend):
    leaves = operands((3, 5), torch.float64, prior)
    for num_samples in (None, 2):
        assert torch.autograd.gradcheck(
            lambda *x, n=num_samples: call(*x, num_samples=n, temperature=0.7, seed=SEED), leaves
        )


@pytest.mark.parametrize(
    ("num_samples", "prior", "dtype", "hard"),
    [
        (None, "none", torch.float32, False),
        (None, "shared", torch.bfloat16, True),
        (0, "none", torch.float64, False),
        (3, "full", torch.float64, False),
        (3, "shared", torch.float16, True),
    ],
)
def test_opcheck(num_samples, prior, dtype, hard):
    logits, *priors = (tensor.detach() for tensor in operands((3, 5), dtype, prior))
    log_prior = F.log_softmax(priors[0], -1) if priors else None
    arguments = (logits, log_prior, SEED, 0.7, hard, num_samples)
    torch.library.opcheck(torch.ops.fastvae.gumbel_softmax_sample_kl, arguments)
    sample, kl = torch.ops.fastvae.gumbel_softmax_sample_kl(*arguments)
    for grad_sample, grad_kl in ((sample, kl), (None, kl), (sample, None)):
        torch.library.opcheck(
            torch.ops.fastvae.gumbel_softmax_sample_kl_backward,
            (grad_sample, grad_kl, None if hard else sample, logits, log_prior, SEED, 0.7, num_samples),
        )


def test_an_annealed_temperature_compiles():
    torch.compiler.reset()
    compiled = torch.compile(gumbel_softmax_sample_kl, fullgraph=True, backend="aot_eager")
    logits = operands((4, 5), torch.float32)[0].detach()
    for temperature in (1.0, 0.9, 0.8):
        ours, plain = (f(logits, temperature=temperature, seed=SEED) for f in (compiled, gumbel_softmax_sample_kl))
        assert torch.equal(ours[0], plain[0])
    torch.compiler.reset()


def test_errors_name_the_argument():
    logits = torch.zeros(4, 5)
    cases = [
        (TypeError, "logits: expected a tensor, got list", {"logits": [0.0]}),
        (TypeError, "logits: expected float32, .* got torch.int64", {"logits": logits.long()}),
        (ValueError, r"logits: .*\(\.\.\., classes\) with at least one class, got \(\)", {"logits": logits[0, 0]}),
        (ValueError, r"logits: .*\(\.\.\., classes\) with at least one class, got \(4, 0\)", {"logits": logits[:, :0]}),
        (ValueError, r"prior_logits: .*\(4, 5\), got \(4, 6\)", {"prior_logits": torch.zeros(4, 6)}),
        (TypeError, "prior_logits: expected float32, .* got torch.int64", {"prior_logits": logits.long()}),
        (ValueError, "prior_logits: expected device cpu as logits, got meta", {"prior_logits": logits.to("meta")}),
        (ValueError, "temperature: expected a finite number above 0, got 0", {"temperature": 0}),
        (ValueError, "temperature: expected a finite number above 0, got -1.0", {"temperature": -1.0}),
        (ValueError, "temperature: expected a finite number above 0, got nan", {"temperature": math.nan}),
        (ValueError, "temperature: expected a finite number above 0, got inf", {"temperature": INF}),
        (TypeError, "temperature: expected a number, got Tensor", {"temperature": torch.ones(())}),
        (ValueError, "num_samples: expected None or an integer of at least 1, got 0", {"num_samples": 0}),
        (TypeError, "seed: expected an int64 tensor, got int", {"seed": 3}),
        (ValueError, "seed: expected None when a generator", {"seed": SEED, "generator": torch.Generator()}),
    ]  # fmt: skip
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            gumbel_softmax_sample_kl(**({"logits": logits} | arguments))
