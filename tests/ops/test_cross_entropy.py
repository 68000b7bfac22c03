"""Linear + cross-entropy, both CPU backends: torch's semantics, error budget, blocks of rows, memory, op contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES

from fastvae.functional import bag_of_words_loss, linear_cross_entropy
from fastvae.ops import cross_entropy

SHAPES = [(1, 1, 1), (1, 33, 7), (7, 33, 257), (33, 257, 7), (257, 7, 33), (64, 32, 128)]  # rows, hidden, vocabulary


def operands(rows, size, vocabulary, dtype=torch.float32, bias=True, ignored=True):
    torch.manual_seed(0)
    leaves = [torch.randn(rows, size), torch.randn(vocabulary, size) / math.sqrt(size)]
    leaves += [torch.randn(vocabulary)] if bias else []
    target = torch.randint(0, vocabulary, (rows,))
    if ignored and rows > 1:
        target[::3] = -100
    return [leaf.to(dtype).requires_grad_() for leaf in leaves], target


def eager(leaves, target, reduction="mean", **arguments):
    return F.cross_entropy(F.linear(*leaves), target, reduction=reduction, **arguments)


def ours(leaves, target, reduction="mean", **arguments):
    hidden, weight, *bias = leaves
    return linear_cross_entropy(hidden, weight, target, *bias, reduction=reduction, **arguments)


def clones(leaves, dtype=None):
    return [leaf.detach().to(dtype or leaf.dtype, copy=True).requires_grad_() for leaf in leaves]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, bias, reduction, backend, assert_within_budget):
    leaves, target = operands(*shape, dtype, bias)
    peer, exact = clones(leaves), clones(leaves, torch.float64)
    torch.manual_seed(1)
    losses = [ours(leaves, target, reduction), eager(exact, target, reduction), eager(peer, target, reduction)]
    assert losses[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    upstream = torch.randn(losses[0].shape)
    names = ["loss", "grad_hidden", "grad_weight", "grad_bias"]
    results = [
        [loss, *torch.autograd.grad(loss, of, upstream.to(loss.dtype))]
        for loss, of in zip(losses, (leaves, exact, peer), strict=True)
    ]
    for name, mine, truth, other in zip(names, *results, strict=False):
        # Half precision: float32 inside, rounded once, or twice where a saved gradient is scaled.
        rounding = {torch.float32: 4, torch.float64: 16}.get(mine.dtype, 1)
        assert_within_budget(name, mine, truth, other, rounding)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_label_smoothing(shape, dtype, label_smoothing, reduction, backend, assert_within_budget):
    """As in torch, with ignored rows, and with row gradients that are equal or not."""
    leaves, target = operands(*shape, dtype)
    peer, exact = clones(leaves), clones(leaves, torch.float64)
    torch.manual_seed(1)
    upstream = torch.randn(target.shape if reduction == "none" else ())
    results = []
    for function, of in ((ours, leaves), (eager, exact), (eager, peer)):
        loss = function(of, target, reduction, label_smoothing=label_smoothing)
        results.append([loss, *torch.autograd.grad(loss, of, upstream.to(loss.dtype))])
    for name, mine, truth, other in zip(("loss", "hidden", "weight", "bias"), *results, strict=True):
        rounding = {torch.float32: 8, torch.float64: 16}.get(mine.dtype, 1)
        truth, other = (truth, other) if shape[2] > 1 else (truth + 1, other + 1)  # all is 0: an error of what?
        assert_within_budget(name, mine + (shape[2] == 1), truth, other, rounding)


def eager_words(leaves, targets, reduction="mean"):
    """Each sentence's words as so many rows."""
    logits = F.linear(*leaves).unsqueeze(-2).expand(*targets.shape, -1)
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").reshape(targets.shape).sum(-1)
    return {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]


def our_words(leaves, targets, reduction="mean", **arguments):
    hidden, weight, *bias = leaves
    return bag_of_words_loss(hidden, weight, targets, *bias, reduction=reduction, **arguments)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bag_of_words(shape, dtype, bias, reduction, backend, assert_within_budget):
    leaves, _ = operands(*shape, dtype, bias)
    peer, exact = clones(leaves), clones(leaves, torch.float64)
    targets = torch.randint(0, shape[2], (shape[0], 12))
    targets[0, 3:9] = targets[0, 2]  # a word that occurs often
    lengths = torch.arange(shape[0]) % 13
    lengths[0] = 9
    beyond = targets.masked_fill(torch.arange(12) >= lengths[:, None], -100)
    upstream = torch.randn(shape[0] if reduction == "none" else ())
    results = []
    for of in (leaves, exact, peer):
        loss = (
            our_words(of, targets, reduction, lengths=lengths) if of is leaves else eager_words(of, beyond, reduction)
        )
        results.append([loss, *torch.autograd.grad(loss, of, upstream.to(loss.dtype))])
    for name, mine, truth, other in zip(("loss", "hidden", "weight", "bias"), *results, strict=False):
        rounding = {torch.float32: 8, torch.float64: 16}.get(mine.dtype, 1)
        truth, other = (truth, other) if shape[2] > 1 else (truth + 1, other + 1)
        assert_within_budget(name, mine + (shape[2] == 1), truth, other, rounding)


def test_bag_of_words_arguments(backend):
    """Leading dimensions, ignore_index, no words at all, errors."""
    leaves, _ = operands(6, 5, 7)
    targets = torch.randint(0, 7, (6, 4))
    targets[2], targets[3, 1] = 6, 6
    losses = our_words(leaves, targets, "none", ignore_index=6)
    expected = eager_words(leaves, targets.masked_fill(targets == 6, -100), "none")
    torch.testing.assert_close(losses, expected)
    assert losses[2] == 0
    shaped = bag_of_words_loss(leaves[0].reshape(2, 3, 5), leaves[1], targets.reshape(2, 3, 4), leaves[2],
                               ignore_index=6, reduction="none")  # fmt: skip
    assert torch.equal(shaped.flatten(), losses)
    torch.testing.assert_close(our_words(leaves, targets, "sum", ignore_index=6), expected.sum())
    none = our_words(leaves, targets[:, :0], "sum")
    assert none == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(none, leaves))
    with pytest.raises(IndexError):
        our_words(leaves, targets + 1)
    for error, message, arguments in [
        (TypeError, "targets: expected an int64 tensor, got torch.float32", {"targets": targets.float()}),
        (ValueError, r"targets: expected .* = \(6, words\), got \(6,\)", {"targets": targets[:, 0]}),
        (ValueError, r"lengths: .*\(6,\), got \(5,\)", {"lengths": torch.zeros(5, dtype=torch.int64)}),
    ]:
        with pytest.raises(error, match=message):
            our_words(leaves, **({"targets": targets} | arguments))


def test_gradcheck_of_bag_of_words(backend):
    leaves, _ = operands(5, 3, 4, torch.float64)
    targets = torch.randint(0, 4, (5, 6))
    targets[1, 2:], targets[2] = -100, -100
    assert torch.autograd.gradcheck(lambda *tensors: our_words(tensors, targets, "none"), leaves)


@pytest.mark.parametrize("vocabulary", [1_000, 128_000])
def test_tied_embedding_adds_gradients_up(vocabulary, backend):
    torch.manual_seed(0)
    weight, tokens = torch.randn(vocabulary, 3, requires_grad=True), torch.randint(0, vocabulary, (9,))
    target = torch.randint(0, vocabulary, (9,))
    target[3] = vocabulary - 1
    losses = [f([F.embedding(tokens, w).tanh(), w], target) for f, w in ((ours, weight), (eager, weight.double()))]
    grads = [torch.autograd.grad(loss, weight)[0] for loss in losses]
    torch.testing.assert_close(losses[0].double(), losses[1])
    torch.testing.assert_close(grads[0], grads[1])


def test_vanishing_probabilities_are_zero_not_denormal(backend):
    """Far below the maximum a probability is no number of float32; products with denormals would take forever."""
    hidden, weight = torch.eye(3, requires_grad=True), torch.tensor([[0.0, -95.0, -200.0]] * 3).T.contiguous()
    grad = torch.autograd.grad(linear_cross_entropy(hidden, weight, torch.zeros(3, dtype=torch.int64)), hidden)[0]
    torch.testing.assert_close(grad, torch.zeros(3, 3), rtol=0, atol=1e-30)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_leading_dimensions(reduction, backend):
    (hidden, weight), target = operands(6, 5, 7, bias=False)
    flat = linear_cross_entropy(hidden, weight, target, reduction=reduction)
    shaped = linear_cross_entropy(hidden.reshape(2, 3, 5), weight, target.reshape(2, 3), reduction=reduction)
    one = linear_cross_entropy(hidden[1], weight, target[1], reduction=reduction)
    assert shaped.shape == ((2, 3) if reduction == "none" else ())
    assert torch.equal(shaped.flatten(), flat.flatten())
    assert one.shape == ()
    torch.testing.assert_close(one, eager([hidden[1], weight], target[1], reduction))


@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 100])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows(reduction, ignore_index, backend):
    """Inside and outside the vocabulary; ignored rows may hold anything."""
    leaves, target = operands(20, 5, 7, ignored=False)
    target[[0, 4, 19]] = ignore_index
    with torch.no_grad():
        leaves[0][4] = 1e30
    peer = clones(leaves)
    loss = ours(leaves, target, reduction, ignore_index=ignore_index)
    expected = eager(peer, target, reduction, ignore_index=ignore_index)
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss.sum(), leaves)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), peer))
    assert (grads[0][target == ignore_index] == 0).all()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("rows", [0, 5])
def test_no_row_left_is_as_in_torch(rows, backend):
    leaves, target = operands(rows, 5, 7)
    target[:] = -100
    for reduction in ("mean", "sum", "none"):
        loss, expected = ours(leaves, target, reduction), eager(leaves, target, reduction)
        assert torch.equal(loss.isnan(), expected.isnan())
        for grad in torch.autograd.grad(loss.sum(), leaves):
            assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", [(0, 3, 4), (0, 0, 4), (0, 3, 0), (2, 0, 4)], ids=str)
def test_zero_sizes(shape, backend):
    leaves, target = (
        operands(*shape, ignored=False) if shape[2] else (operands(*shape[:2], 1)[0], torch.zeros(0).long())
    )
    if shape[2] == 0:
        leaves = [leaves[0], *(leaf.detach()[:0].requires_grad_() for leaf in leaves[1:])]
    losses = ours(leaves, target, "none")
    assert losses.shape == shape[:1]
    grads = torch.autograd.grad(losses.sum(), leaves)
    assert [g.shape for g in grads] == [leaf.shape for leaf in leaves]
    if shape[0]:
        torch.testing.assert_close(losses, F.cross_entropy(leaves[2].expand(2, 4), target, reduction="none"))


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_large_logits_do_not_overflow(scale, backend):
    logits = torch.tensor([[1.0, -1.0, 0.5], [-1.0, -0.5, 1.0], [1.0, 1.0, -1.0]]) * scale
    leaves, target = [torch.eye(3), logits.T.contiguous()], torch.tensor([0, 2, 1])
    losses = ours(leaves, target, "none")
    torch.testing.assert_close(losses, torch.tensor([0.0, 0.0, math.log(2)]), rtol=1e-6, atol=0)
    wrong = ours(leaves, torch.tensor([1, 0, 2]), "none")
    torch.testing.assert_close(wrong, torch.tensor([2.0, 2.0, 2.0]) * scale, rtol=1e-4, atol=0)


def test_small_losses_keep_their_digits(backend):
    """logsumexp - logit would lose all of them at logits of 1e4, where float32 has steps of 1e-3."""
    gaps = torch.tensor([1.0, 2.0, 4.0, 8.0, 12.0])
    logits = torch.stack([torch.full_like(gaps, 1e4), 1e4 - gaps], -1)
    leaves = [torch.eye(5), logits.T.contiguous()]
    losses = ours(leaves, torch.zeros(5, dtype=torch.int64), "none")
    torch.testing.assert_close(losses, torch.log1p(torch.exp(-gaps)), rtol=0, atol=2e-7)


def test_masked_classes(backend):
    """A bias of -inf takes a class out: no loss from it and no gradient to it."""
    leaves, target = operands(9, 5, 7, ignored=False)
    target[target == 3] = 4
    with torch.no_grad():
        leaves[2][3] = -math.inf
    peer = clones(leaves)
    loss, expected = ours(leaves, target), eager(peer, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, peer))
    target[0] = 3
    assert ours(leaves, target, "none")[0] == math.inf


def test_nan_stays_in_its_row(backend):
    leaves, target = operands(9, 5, 37, ignored=False)
    with torch.no_grad():
        leaves[0][4, 2] = math.nan
    losses = ours(leaves, target, "none")
    assert losses.isnan().tolist() == [row == 4 for row in range(9)]
    grad_hidden = torch.autograd.grad(losses.sum(), leaves[0])[0]
    assert grad_hidden.isnan().any(-1).tolist() == [row == 4 for row in range(9)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ignored", [True, False])
def test_many_blocks_equal_one(ignored, bias, monkeypatch):
    leaves, target = operands(37, 5, 7, bias=bias, ignored=ignored)
    weights = torch.randn(37)

    def run():
        results = []
        for reduction in ("mean", "none"):
            loss = ours(leaves, target, reduction)
            results += [loss, *torch.autograd.grad(loss, leaves, weights if reduction == "none" else None)]
        return results

    whole = run()
    monkeypatch.setattr(cross_entropy, "_BLOCK_LOGITS", 21)
    monkeypatch.setattr(cross_entropy, "_MIN_BLOCK_ROWS", 2)
    rows, core = [], cross_entropy.CORE

    class Counted:
        @staticmethod
        def cross_entropy(workspace, *arguments):
            rows.append(arguments[-3])
            return core.cross_entropy(workspace, *arguments)

    monkeypatch.setattr(cross_entropy, "CORE", Counted)
    torch.testing.assert_close(run(), whole, rtol=1e-5, atol=1e-6)
    assert 1 < min(rows) <= 3


def peak_bytes(function):
    """The most memory torch held at once during the call, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_are_never_whole_in_memory(reduction):
    if cross_entropy.CORE is None:
        pytest.skip("the C++ core is not built")
    leaves, target = operands(8192, 8, 2000, ignored=False)
    weights = torch.randn(8192) if reduction == "none" else torch.ones(())

    def step(function):
        return lambda: torch.autograd.grad(function(leaves, target, reduction), leaves, weights)

    logits = 8192 * 2000 * 4
    assert peak_bytes(step(eager)) > logits, "the measure sees logits where they are whole"
    assert peak_bytes(step(ours)) < 0.25 * logits


@pytest.mark.parametrize("wrong", [-1, 7, 2**40])
def test_target_out_of_range(wrong, backend):
    leaves, target = operands(9, 5, 7)
    target[4] = wrong
    message = rf"target: expected classes in \[0, 7\) or -100, got {wrong}" if backend == "C++" else "."
    for inputs in (leaves, [leaf.detach() for leaf in leaves]):
        with pytest.raises(IndexError, match=message):
            ours(inputs, target)


def test_uniform_and_other_upstream_gradients_agree(backend):
    """Equal row gradients scale saved ones; any other goes through the rows again."""
    leaves, target = operands(33, 5, 7)
    losses = ours(leaves, target, "none")
    kept, weights = target != -100, torch.full((33,), 0.7)
    uneven = weights.clone()
    uneven[kept.nonzero()[0]] = -2.0
    first, second, rest = (
        torch.autograd.grad(losses, leaves, w, retain_graph=True) for w in (weights, uneven, weights - uneven)
    )
    for a, b, c in zip(first, second, rest, strict=True):
        torch.testing.assert_close(a, b + c, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [None, "uneven"])
def test_graph_serves_twice(weights, backend):
    leaves, target = operands(33, 5, 7)
    losses = ours(leaves, target, "none")
    upstream = torch.ones(33) if weights is None else torch.randn(33)
    first = torch.autograd.grad(losses, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(losses, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_half_precision_gradients_neither_overflow_nor_vanish(backend):
    """The mean's gradient is of order 1, and so must be what it is computed from: the sum's passes fp16's 65504."""
    rows = 20_000
    hidden = torch.full((rows, 1), 8.0, dtype=torch.float16)
    weight = torch.tensor([[0.0], [-1.0]], dtype=torch.float16, requires_grad=True)
    target = torch.ones(rows, dtype=torch.int64)
    grad = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), weight)[0]
    torch.testing.assert_close(grad, torch.tensor([[8.0], [-8.0]], dtype=torch.float16), rtol=1e-3, atol=0)
    losses = linear_cross_entropy(hidden, weight, target, reduction="none")
    scaled = torch.autograd.grad(losses, weight, torch.full((rows,), 2.0**-10))[0]
    torch.testing.assert_close(scaled.float(), torch.tensor([[156.25], [-156.25]]), rtol=1e-3, atol=0)


def test_strided_and_expanded_operands(backend):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 33).T, torch.randn(5, 7).T
    bias, target = torch.randn(7, 2)[:, 0], torch.randint(0, 7, (2, 33))[:, ::1].T[:, 0]
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    dense = [leaf.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for leaf in leaves]
    results = [
        (loss, *torch.autograd.grad(loss, of, torch.ones(()).expand(33)))
        for of in (leaves, dense)
        for loss in [ours(of, target if of is leaves else target.contiguous(), "none")]
    ]
    torch.testing.assert_close(*results)
    rows = [torch.randn(1, 5).expand(4, 5), torch.randn(1, 5).expand(7, 5), torch.randn(1).expand(7)]
    torch.testing.assert_close(
        ours(rows, torch.tensor(2).expand(4), "none"), torch.full((4,), math.log(7)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_threads_agree(reduction, with_threads):
    leaves, target = operands(257, 33, 257)
    weights = torch.randn(257) if reduction == "none" else torch.ones(())

    def run():
        loss = ours(leaves, target, reduction)
        return [loss, *torch.autograd.grad(loss, leaves, weights)]

    torch.testing.assert_close(with_threads(1, run), with_threads(2, run), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_frozen_operands_get_no_gradient_and_change_no_other(needed, backend):
    leaves, target = operands(9, 5, 7)
    full = torch.autograd.grad(ours(leaves, target), leaves)
    some = [leaf.detach().requires_grad_(i in needed) for i, leaf in enumerate(leaves)]
    ours(some, target).backward()
    for i, leaf in enumerate(some):
        if i in needed:
            torch.testing.assert_close(leaf.grad, full[i])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction, label_smoothing, bias, backend):
    leaves, target = operands(5, 3, 4, torch.float64, bias)
    settings = {"reduction": reduction, "label_smoothing": label_smoothing}
    assert torch.autograd.gradcheck(lambda *tensors: ours(tensors, target, **settings), leaves)


@pytest.mark.parametrize(
    ("dtype", "bias", "needs"),
    [(torch.float64, True, (True, True)), (torch.bfloat16, False, (True, False)), (torch.float32, True, (False, True))],
)
def test_opcheck(dtype, bias, needs):
    leaves, target = operands(5, 3, 4, dtype, bias)
    hidden, weight, bias, *_ = [*(leaf.detach() for leaf in leaves), None]
    words = torch.stack([target, target.flip(0)], 1)
    arguments = (hidden, weight, bias, words, -100, 0.1)
    ops = torch.ops.fastvae
    torch.library.opcheck(ops.linear_cross_entropy, arguments)
    torch.library.opcheck(ops.linear_cross_entropy_with_gradients, (*arguments, *needs))
    losses, lse, *saved = ops.linear_cross_entropy_with_gradients(*arguments, *needs)
    for grad_losses in (torch.ones_like(losses), torch.arange(5.0).to(losses)):
        for kept in (saved, []):
            backward = (grad_losses, *arguments[:4], lse, -100, 0.1, kept, *needs)
            torch.library.opcheck(ops.linear_cross_entropy_backward, backward)


def test_errors_name_the_argument():
    good = {"hidden": torch.zeros(4, 5), "weight": torch.zeros(7, 5), "target": torch.zeros(4, dtype=torch.int64)}
    cases = [
        (TypeError, "hidden: expected float32, .* got torch.int64", {"hidden": good["target"]}),
        (TypeError, "hidden: expected a tensor, got NoneType", {"hidden": None}),
        (TypeError, "weight: expected torch.float32 as hidden, got torch.float64", {"weight": good["weight"].double()}),
        (ValueError, r"weight: expected \(vocabulary, hidden\) .*5.*, got \(7, 6\)", {"weight": torch.zeros(7, 6)}),
        (ValueError, r"weight: expected \(vocabulary, hidden\) .*, got \(5,\)", {"weight": torch.zeros(5)}),
        (ValueError, "weight: expected device cpu as hidden, got meta", {"weight": good["weight"].to("meta")}),
        (TypeError, "target: expected an int64 tensor, got torch.int32", {"target": good["target"].int()}),
        (ValueError, r"target: .*\(4,\), got \(3,\)", {"target": good["target"][:3]}),
        (TypeError, "bias: expected torch.float32 as hidden, got torch.float16", {"bias": torch.zeros(7).half()}),
        (ValueError, r"bias: .*\(7,\), got \(1,\)", {"bias": torch.zeros(1)}),
        (ValueError, r"label_smoothing: expected a number in \[0, 1\], got 1.5", {"label_smoothing": 1.5}),
        (ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'max'", {"reduction": "max"}),
    ]  # fmt: skip
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            linear_cross_entropy(**(good | arguments))


def test_small_half_precision_numbers_count(backend):
    """Numbers of float16 below its normal ones, which become normal only once they are float32."""
    hidden, target = torch.full((3, 4), 2.0**15, dtype=torch.float16), torch.tensor([0, 1, 2])
    weight = (torch.arange(12).view(3, 4) * 2.0**-24).half()
    assert 0 < weight.max() < torch.finfo(torch.float16).tiny
    loss = linear_cross_entropy(hidden, weight, target, reduction="none")
    exact = F.cross_entropy(hidden.double() @ weight.double().T, target, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
