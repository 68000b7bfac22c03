"""Every public function under what PyTorch does to functions: compile, autocast, checkpoint, partial gradients."""

import pytest
import torch
import torch._dynamo.testing
from cases import CASES, backward, leaves, results
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fastvae.functional import gaussian_sample_kl, linear_cross_entropy, lstm_decode

every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def compiler():
    """torch.compile, started afresh and left clean."""
    torch.compiler.reset()
    yield torch.compile
    torch.compiler.reset()


def equal(ours, expected):
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_whole_equals_eager(name, dtype, compiler):
    compiled = compiler(CASES[name].call, fullgraph=True, backend="aot_eager")
    inputs = leaves(CASES[name], dtype)
    outputs = compiled(**inputs)
    assert equal([*outputs, *backward(outputs, inputs).values()], results(name, dtype))


@pytest.mark.parametrize("name", ["gaussian_sample_kl", "linear_cross_entropy", "lstm_decode"])
def test_inductor(name, compiler):
    compiled = compiler(CASES[name].call, fullgraph=True)
    inputs = leaves(CASES[name])
    outputs = compiled(**inputs)
    ours = [*outputs, *backward(outputs, inputs).values()]
    torch.testing.assert_close(ours, results(name, torch.float32))


@every_case
def test_dynamic_shapes_compile_once(name, compiler):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compiler(CASES[name].call, fullgraph=True, dynamic=True, backend=counter)
    for batch in (9, 14, 33):
        inputs = leaves(CASES[name], batch=batch)
        outputs = compiled(**inputs)
        ours = [*outputs, *backward(outputs, inputs).values()]
        torch.testing.assert_close(ours, results(name, torch.float32, batch))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["gaussian_sample_kl", "lstm_decode"])
def test_compiled_randomness_follows_manual_seed(name, compiler):
    inputs = leaves(CASES[name])
    del inputs["seed"]
    compiled = compiler(CASES[name].call, fullgraph=True, backend="aot_eager")

    def draws(function):
        torch.manual_seed(3)
        return [function(**inputs)[0] for _ in range(2)]

    first, second, plain = draws(compiled), draws(compiled), draws(CASES[name].call)
    assert equal(first, second)
    assert equal(first, plain)
    assert not torch.equal(*first)


@every_case
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(name, mode, backend):
    inputs = leaves(CASES[name])
    expected = CASES[name].call(**inputs)
    with mode():
        outputs = CASES[name].call(**inputs)
    assert all(o.grad_fn is not None for o in expected)
    assert not any(o.requires_grad for o in outputs)
    torch.testing.assert_close(outputs, expected, rtol=1e-6, atol=1e-6)
    assert all(o.is_inference() == (mode is torch.inference_mode) for o in outputs)


@every_case
def test_checkpoint_draws_the_same_noise_again(name, backend):
    inputs, plain = leaves(CASES[name]), leaves(CASES[name])
    if name in ("gaussian_sample_kl", "lstm_decode"):
        del inputs["seed"], plain["seed"]
    torch.manual_seed(3)
    outputs = checkpoint(lambda: CASES[name].call(**inputs), use_reentrant=False)
    torch.manual_seed(3)
    expected = CASES[name].call(**plain)
    torch.rand(1)  # the recomputation must not be at the mercy of what was drawn since
    assert equal(outputs, expected)
    assert equal(backward(outputs, inputs).values(), backward(expected, plain).values())


@every_case
def test_a_second_derivative_is_a_clear_error(name, backend):
    inputs = leaves(CASES[name])
    differentiable = [tensor for tensor in inputs.values() if tensor.requires_grad]
    for power in (1, 2):  # of a sum the upstream gradient needs none itself
        outputs = CASES[name].call(**inputs)
        first = torch.autograd.grad([o.pow(power).sum() for o in outputs], differentiable, create_graph=True)
        total = sum(grad.sum() for grad in first) + sum(tensor.square().sum() for tensor in differentiable)
        for ask in (lambda: total.backward(retain_graph=True), lambda: torch.autograd.grad(total, differentiable)):  # noqa: B023
            with pytest.raises(RuntimeError, match="first derivatives only"):
                ask()


@every_case
def test_frozen_inputs_get_no_gradient_and_change_no_other(name, backend):
    full = backward(CASES[name].call(**(inputs := leaves(CASES[name]))), inputs)
    for frozen in full:
        inputs = leaves(CASES[name])
        inputs[frozen].requires_grad_(False)
        if len(full) == 1:
            assert not any(o.requires_grad for o in CASES[name].call(**inputs))
            continue
        grads = backward(CASES[name].call(**inputs), inputs)
        assert frozen not in grads
        for other, grad in grads.items():
            torch.testing.assert_close(grad, full[other], rtol=1e-6, atol=1e-6)
        alone = leaves(CASES[name])
        for other in full:
            alone[other].requires_grad_(other == frozen)
        grad = backward(CASES[name].call(**alone), alone)[frozen]
        torch.testing.assert_close(grad, full[frozen], rtol=1e-6, atol=1e-6)


@every_case
def test_gradients_of_single_outputs_add_up(name, backend):
    """An output that is not used sends no gradient (None) back."""
    inputs = leaves(CASES[name])
    differentiable = [tensor for tensor in inputs.values() if tensor.requires_grad]
    outputs = CASES[name].call(**inputs)
    torch.manual_seed(1)
    upstream = [torch.randn(o.shape) for o in outputs]
    together = torch.autograd.grad(outputs, differentiable, upstream, retain_graph=True)
    totals = [torch.zeros_like(tensor) for tensor in differentiable]
    for output, grad_output in zip(outputs, upstream, strict=True):
        single = torch.autograd.grad(
            output, differentiable, grad_output, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        totals = [total + grad for total, grad in zip(totals, single, strict=True)]
    torch.testing.assert_close(totals, list(together), rtol=1e-5, atol=1e-5)


@every_case
def test_graph_serves_twice(name, backend):
    inputs = leaves(CASES[name])
    differentiable = [tensor for tensor in inputs.values() if tensor.requires_grad]
    outputs = CASES[name].call(**inputs)
    ones = [torch.ones_like(o) for o in outputs]
    first = torch.autograd.grad(outputs, differentiable, ones, retain_graph=True)
    assert equal(first, torch.autograd.grad(outputs, differentiable, ones))


@every_case
def test_inputs_are_left_alone(name, backend):
    inputs = leaves(CASES[name])
    before = {key: tensor.detach().clone() for key, tensor in inputs.items()}
    backward(CASES[name].call(**inputs), inputs)
    assert all(torch.equal(inputs[key], before[key]) for key in inputs)


@every_case
def test_autocast_does_not_lower_the_precision_within(name, backend):
    """float32 in: float32 sums, losses and recurrences, forward and backward; only a latent's product is torch's."""
    inputs = leaves(CASES[name])
    if "weight_ih" in inputs and "z" in inputs:
        inputs["z"] = None
        inputs["weight_ih"] = inputs["weight_ih"][:, :7].detach().requires_grad_()
    plain = CASES[name].call(**inputs)
    differentiable = {key: tensor for key, tensor in inputs.items() if tensor is not None}
    expected = backward(plain, differentiable)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = CASES[name].call(**inputs)
        grads = backward(outputs, differentiable)
    assert [o.dtype for o in outputs] == [o.dtype for o in plain]
    torch.testing.assert_close(outputs, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads, expected, rtol=1e-6, atol=1e-6)


@every_case
def test_compiled_under_autocast(name, compiler):
    inputs, plain = leaves(CASES[name]), leaves(CASES[name])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = compiler(CASES[name].call, fullgraph=True, backend="aot_eager")(**inputs)
        expected = CASES[name].call(**plain)
    assert equal(outputs, expected)
    ours, theirs = backward(outputs, inputs), backward(expected, plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_autocast_model():
    """Layers that autocast lowers feed the functions, and take their gradients back."""
    torch.manual_seed(0)
    head, initial = torch.nn.Linear(8, 6), torch.nn.Linear(3, 8)
    embedding, weight_ih, weight_hh = torch.randn(11, 4), torch.randn(32, 7), torch.randn(32, 8)
    output, bias = torch.randn(11, 8), torch.randn(11)
    parameters = [t.requires_grad_() for t in (embedding, weight_ih, weight_hh, output, bias)]
    parameters += [*head.parameters(), *initial.parameters()]
    data, tokens = torch.randn(5, 8), torch.randint(0, 11, (5, 6))

    def loss(lowered):
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            mean, log_var = head(data).chunk(2, -1)
            z, kl = gaussian_sample_kl(mean, log_var, seed=torch.tensor([1]))
            state = initial(z)
            hidden = lstm_decode(tokens, z, state, state, embedding, weight_ih, weight_hh, None)[0]
            if lowered:
                assert mean.dtype == z.dtype == state.dtype == torch.bfloat16
                hidden = hidden.bfloat16()  # as a layer in between would leave it
            nll = linear_cross_entropy(hidden, output, tokens, bias)
        assert kl.dtype == nll.dtype == torch.float32
        return nll + kl.mean()

    lowered, plain = loss(True), loss(False)
    torch.testing.assert_close(lowered, plain, rtol=0.03, atol=0)
    ours, expected = (torch.autograd.grad(x, parameters) for x in (lowered, plain))
    for grad, other in zip(ours, expected, strict=True):
        assert (grad - other).norm() < 0.05 * other.norm()
