"""Ops as CUDA serves them, through Triton's interpreter on CPU tensors, against the C++ core."""

import os
import warnings

import pytest
import torch
from cases import CASES, leaves, results

from fastvae.ops import cross_entropy, gru, layer_norm_lstm, lstm, mixture
from fastvae.ops.recurrence import triton_backward, triton_forward

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, which a machine without a GPU has"
)


@pytest.fixture
def on_triton():
    """Serve the recurrences' ops on the CPU as they are served on CUDA."""
    with torch.library._scoped_library("fastvae", "IMPL") as library:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it overrides
            for module, outputs, saved in ((lstm, 3, 2), (gru, 2, 1), (layer_norm_lstm, 3, 3)):
                name = module.__name__.rpartition(".")[2]
                forward = triton_forward(name, module._reference_op)
                backward = triton_backward(name, module.reference_backward, outputs, saved)
                library.impl(f"{name}_decode", forward, "CPU", allow_override=True)
                library.impl(f"{name}_decode_backward", backward, "CPU", allow_override=True)
        yield


@pytest.fixture(scope="module")
def expected():
    names = ("lstm_decode", "gru_decode", "layer_norm_lstm_decode")
    return {(n, d): results(n, d, batch=5) for n in names for d in (torch.float32, torch.float64, torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["lstm_decode", "gru_decode", "layer_norm_lstm_decode"])
def test_matches_the_core(name, dtype, expected, on_triton):
    # The core computes bfloat16 in float32; a GPU rounds the states and the gates' gradients at every step.
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    for ours, core in zip(results(name, dtype, batch=5), expected[name, dtype], strict=True):
        assert ours.dtype == core.dtype
        assert (ours - core).abs().max() <= tolerance * core.abs().max().clamp_min(0.1)


@pytest.mark.parametrize("name", ["lstm_decode", "gru_decode", "layer_norm_lstm_decode"])
def test_a_length_beyond_the_tokens_counts_as_all_of_them(name, on_triton):
    """Values are not looked at on a GPU; the C++ core raises."""
    inputs, found = leaves(CASES[name], torch.float32, 3), []
    time = inputs["tokens"].shape[1]
    for first in (time, time + 5):
        inputs["lengths"] = torch.tensor([first, 1, 2])
        outputs = CASES[name].call(**inputs)
        differentiable = [tensor for tensor in inputs.values() if tensor.requires_grad]
        found.append([*outputs, *torch.autograd.grad(sum(output.sum() for output in outputs), differentiable)])
    assert all(map(torch.equal, *found))


def test_cross_entropy_with_a_strided_bias():
    hidden, weight, target = torch.randn(5, 7), torch.randn(11, 7), torch.randint(11, (5, 1))
    bias = torch.randn(11, 3)[:, 1]
    operands = hidden, weight, bias, target
    losses, lse = cross_entropy._cuda_forward(*operands, -100, 0.0)
    torch.testing.assert_close(losses, cross_entropy.reference(*operands, -100, 0.0)[0])
    settings = lse, -100, 0.0, [], True, True
    grads = cross_entropy._cuda_backward(torch.ones(5), *operands, *settings)
    expected = cross_entropy._cuda_backward(torch.ones(5), hidden, weight, bias.contiguous(), target, *settings)
    assert all(map(torch.equal, grads, expected))


@pytest.mark.parametrize("size", [5, 300])  # of the second the tiles would not fit registers
def test_mixtures_of_many_components(size, monkeypatch):
    calls = []
    monkeypatch.setattr(mixture, "reference", lambda *inputs, of=mixture.reference: calls.append(0) or of(*inputs))
    shapes = (3, 2, 64), (3, 2, 64), (3, 2, size), (2, size, 64), (2, size, 64)
    inputs = [torch.randn(shape) for shape in shapes]
    outputs = mixture._cuda(*inputs)
    assert len(calls) == (size == 300)
    for ours, core in zip(outputs, mixture._mixture(*inputs), strict=True):
        torch.testing.assert_close(ours, core, rtol=1e-4, atol=1e-4)
