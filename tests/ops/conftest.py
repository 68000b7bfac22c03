"""Fixtures of the op tests: both CPU backends, poisoned memory, the error budget, one or two threads."""

import warnings

import pytest
import torch

from fastvae.ops import backend as backend_module
from fastvae.ops import (
    categorical,
    corruption,
    cross_entropy,
    full_gaussian,
    gaussian,
    gaussian_head,
    generation,
    gru,
    importance,
    layer_norm_lstm,
    likelihood,
    lstm,
    mixture,
    posterior,
    recurrence,
    sparse,
)

REFERENCES = {
    "gaussian_sample_kl": gaussian.reference_sample_kl,
    "gaussian_sample_kl_backward": gaussian.reference_sample_kl_backward,
    "gaussian_head": gaussian_head.reference,
    "gaussian_head_backward": gaussian_head.reference_backward,
    "mixture_log_density": posterior.reference,
    "mixture_log_density_backward": posterior.reference_backward,
    "bernoulli_nll": likelihood.reference_bernoulli,
    "bernoulli_nll_backward": likelihood.reference_bernoulli_backward,
    "gaussian_nll": likelihood.reference_gaussian,
    "gaussian_nll_backward": likelihood.reference_gaussian_backward,
    "full_gaussian_sample_kl": full_gaussian.reference_sample_kl,
    "full_gaussian_sample_kl_backward": full_gaussian.reference_sample_kl_backward,
    "gaussian_sample_log_ratio": importance.reference_sample,
    "gaussian_sample_log_ratio_backward": importance.reference_sample_backward,
    "importance_weighted_bound": importance.reference_bound,
    "importance_weighted_bound_backward": importance.reference_bound_backward,
    "gumbel_softmax_sample_kl": categorical.reference_sample_kl,
    "gumbel_softmax_sample_kl_backward": categorical.reference_sample_kl_backward,
    "corrupt": corruption.reference,
    "corrupted_linear": corruption.reference_linear,
    "corrupted_linear_backward": corruption.reference_linear_backward,
    "mixture_kl": mixture.reference,
    "mixture_kl_backward": mixture.reference_backward,
    "linear_cross_entropy": cross_entropy.reference,
    "linear_cross_entropy_backward": cross_entropy.reference_backward,
    "lstm_decode": lstm._reference_op,
    "lstm_decode_backward": lstm.reference_backward,
    "gru_decode": gru._reference_op,
    "gru_decode_backward": gru.reference_backward,
    "layer_norm_lstm_decode": layer_norm_lstm._reference_op,
    "layer_norm_lstm_decode_backward": layer_norm_lstm.reference_backward,
    "ista": sparse.reference_ista,
    "generate": generation.reference,
    "linear_rows": generation.F.linear,
}


@pytest.fixture(params=["C++", "reference"])
def backend(request, monkeypatch):
    """Run the test on the C++ core and on the reference, both with CPU tensors."""
    if request.param == "reference":
        for module in (cross_entropy, generation, gru, layer_norm_lstm, lstm, recurrence):
            monkeypatch.setattr(module, "CORE", None)
        with torch.library._scoped_library("fastvae", "IMPL") as library:
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it overrides
                for name, function in REFERENCES.items():
                    library.impl(name, function, "CPU", allow_override=True)
            yield request.param
        return
    if backend_module.CORE is None:
        pytest.skip("the C++ core is not built")
    yield request.param


@pytest.fixture
def poison(monkeypatch):
    """Fill fresh memory with NaN (integers: -12345, bytes: 90): an element left unwritten shows."""

    def poisoned(empty):
        def filled(*args, **kwargs):
            tensor = empty(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(-12345 if tensor.itemsize > 1 else 90)

        return filled

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def assert_within_budget():
    """Return a check that `ours` is as near to `exact` (float64) as `eager`, plus a tolerance."""

    def check(name, ours, exact, eager, rounding):
        """The tolerance is `rounding` units in the last place of the largest number, in `ours`'s type."""
        assert ours.shape == exact.shape, name
        if exact.numel() == 0:
            return
        ours, exact, eager = ours.detach(), exact.detach(), eager.detach()
        tolerance = rounding * torch.finfo(ours.dtype).eps * exact.abs().max().item()
        budget = (eager - exact).abs().max().item() + tolerance
        error = (ours - exact).abs().max().item()
        assert error <= budget, f"{name}: error {error:.3g} above the budget {budget:.3g}"

    return check


@pytest.fixture
def with_threads():
    """Return a function that calls another with a number of threads."""
    before = torch.get_num_threads()

    def call(threads, function):
        torch.set_num_threads(threads)
        return function()

    yield call
    torch.set_num_threads(before)
