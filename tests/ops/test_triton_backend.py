"""The recurrences as CUDA serves them, through Triton's interpreter on CPU tensors, against the C++ core."""

import os
import warnings

import pytest
import torch
from cases import results

from fastvae.ops import gru, layer_norm_lstm, lstm
from fastvae.ops.recurrence import triton_backward, triton_forward


@pytest.fixture
def on_triton():
    """Serve the recurrences' ops on the CPU as they are served on CUDA."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1, which a machine without a GPU has")
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
