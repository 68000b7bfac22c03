"""The linear layer, sampling and KL as one op: the same numbers as two, both CPU backends, op contract."""

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES

from fastvae.functional import gaussian_head, gaussian_sample_kl

SEED = torch.tensor([123456789012345])
SHAPES = [((1,), 1, 1), ((7,), 33, 2), ((257,), 7, 33), ((3, 5), 9, 20), ((4,), 33, 2500), ((), 5, 3)]


def operands(batch, hidden, latent, dtype):
    torch.manual_seed(0)
    shapes = (*batch, hidden), (2 * latent, hidden), (2 * latent,)
    return [(0.3 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]


def two_ops(hidden, weight, bias, **arguments):
    mean, log_var = F.linear(hidden, weight, bias).chunk(2, -1)
    return *gaussian_sample_kl(mean, log_var, **arguments), mean, log_var


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "hidden", "latent"), SHAPES, ids=str)
def test_equals_the_two_ops(batch, hidden, latent, dtype, backend):
    leaves = operands(batch, hidden, latent, dtype)
    how = {"seed": SEED, "num_samples": None if hidden == 33 else 2, "reduction": "sum" if hidden == 33 else "none"}
    ours, theirs = gaussian_head(*leaves, **how), two_ops(*leaves, **how)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    upstream = [torch.randn(o.shape).to(o.dtype) for o in ours]
    for used in (slice(4), slice(2), slice(1), slice(1, 2), slice(2, 3)):
        grads = [torch.autograd.grad(o[used], leaves, upstream[used], retain_graph=True) for o in (ours, theirs)]
        if dtype.itemsize > 2:
            torch.testing.assert_close(*grads)
            continue
        for mine, other in zip(*grads, strict=True):  # the two round each part of a sum of gradients
            assert (mine - other).abs().max() <= 4 * torch.finfo(dtype).eps * max(other.abs().max().item(), 1)


def test_without_bias(backend):
    hidden, weight, _ = operands((7,), 9, 4, torch.float32)
    outputs = gaussian_head(hidden, weight, seed=SEED), two_ops(hidden, weight, None, seed=SEED)
    torch.testing.assert_close(*outputs)
    grads = [torch.autograd.grad(o[1].sum(), (hidden, weight)) for o in outputs]
    torch.testing.assert_close(*grads)


def test_extreme_means_have_a_finite_divergence(backend):
    bias = torch.tensor([1e4, 1e20, -1e4, 1e4], requires_grad=True)
    z, kl, *_ = gaussian_head(torch.ones(3, 1), torch.zeros(4, 1), bias, reduction="none", seed=SEED)
    (grad,) = torch.autograd.grad(kl.sum(), bias)
    torch.testing.assert_close(kl, torch.tensor([0.5e8, 0.5e30]).expand(3, 2))
    assert torch.isfinite(z).all()
    torch.testing.assert_close(grad, torch.tensor([3e4, 0, 0, 0]))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("batch", "hidden", "latent"), [((0,), 4, 3), ((2, 0), 4, 3), ((3,), 0, 2), ((3,), 4, 0)])
def test_zero_sizes(batch, hidden, latent, backend):
    leaves = operands(batch, hidden, latent, torch.float32)
    z, kl, mean, log_var = gaussian_head(*leaves, num_samples=2, seed=SEED)
    assert z.shape == (2, *batch, latent)
    assert kl.shape == batch
    assert mean.shape == log_var.shape == (*batch, latent)
    for grad, leaf in zip(torch.autograd.grad(z.sum() + kl.sum(), leaves), leaves, strict=True):
        assert grad.shape == leaf.shape
        assert grad.isfinite().all()


def test_strided_inputs(backend):
    hidden, weight, bias = operands((9,), 12, 4, torch.float32)
    views = hidden[:, ::2], weight[:, 6:], bias.flip(0)
    copies = [v.detach().clone().requires_grad_() for v in views]
    strided, dense = gaussian_head(*views, seed=SEED), gaussian_head(*copies, seed=SEED)
    torch.testing.assert_close(strided, dense)
    upstream = torch.ones(()).expand(9, 4), torch.ones(()).expand(9)
    grads = torch.autograd.grad(strided[:2], views, upstream), torch.autograd.grad(dense[:2], copies, upstream)
    torch.testing.assert_close(*grads)


def test_gradcheck(backend):
    leaves = operands((3,), 4, 2, torch.float64)
    for how in ({"num_samples": None}, {"num_samples": 2, "reduction": "none"}):
        assert torch.autograd.gradcheck(lambda *x, how=how: gaussian_head(*x, seed=SEED, **how), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_samples", [None, 2])
def test_opcheck(num_samples, dtype):
    hidden, weight, bias = (t.detach() for t in operands((3,), 5, 2, dtype))
    how = SEED, num_samples, num_samples is None
    for b in (bias, None):
        torch.library.opcheck(torch.ops.fastvae.gaussian_head, (hidden, weight, b, *how))
    z, kl, parameters = torch.ops.fastvae.gaussian_head(hidden, weight, bias, *how)
    for grads in ((z, kl, parameters), (z, None, None), (None, None, parameters)):
        torch.library.opcheck(torch.ops.fastvae.gaussian_head_backward, (*grads, hidden, weight, parameters, *how))


def test_randomness_follows_manual_seed_and_generator():
    leaves = operands((4,), 5, 3, torch.float32)
    torch.manual_seed(3)
    first, second = (gaussian_head(*leaves)[0] for _ in range(2))
    assert torch.equal(first, gaussian_head(*leaves, generator=torch.Generator().manual_seed(3))[0])
    assert not torch.equal(first, second)


def test_under_autocast_it_computes_in_the_weights_type():
    leaves = operands((4,), 5, 3, torch.float32)
    hidden, *parameters = leaves
    seed = torch.tensor([3])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = gaussian_head(hidden.bfloat16(), *parameters, seed=seed)
    expected = gaussian_head(hidden.bfloat16().float(), *parameters, seed=seed)
    assert all(map(torch.equal, outputs, expected))


def test_errors_name_the_argument():
    hidden, weight, bias = (t.detach() for t in operands((4,), 5, 3, torch.float32))
    cases = [
        (TypeError, "hidden: expected float32, .* got torch.int64", {"hidden": hidden.long()}),
        (TypeError, "weight: expected torch.float32 as hidden, got torch.float64", {"weight": weight.double()}),
        (
            ValueError,
            r"weight: .*\(2 \* latent, hidden\) for hidden's \(4, 5\), got \(6, 4\)",
            {"weight": weight[:, :4]},
        ),
        (ValueError, r"weight: .*, got \(5, 5\)", {"weight": weight[:5]}),
        (ValueError, r"bias: expected shape \(2 \* latent,\) = \(6,\), got \(5,\)", {"bias": bias[:5]}),
        (TypeError, "bias: expected torch.float32 as hidden, got torch.float64", {"bias": bias.double()}),
        (ValueError, "num_samples: expected None or an integer of at least 1, got 0", {"num_samples": 0}),
        (ValueError, "reduction: expected one of 'sum', 'none', got 'mean'", {"reduction": "mean"}),
        (TypeError, "seed: expected an int64 tensor, got int", {"seed": 3}),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            gaussian_head(**({"hidden": hidden, "weight": weight, "bias": bias} | arguments))
