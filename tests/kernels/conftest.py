"""Each kernel test runs in Triton's interpreter where there is no GPU, and on the GPU where there is one."""

import os
from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported

import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Device of the operands: "cpu" under the interpreter, "cuda" with compiled kernels."""
    if request.param == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA device, and TRITON_INTERPRET unset")
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("the kernels are compiled for the GPU; TRITON_INTERPRET=1 runs this on the CPU")
    if request.param == "cpu" and isinstance(tl.rand, triton.runtime.JITFunction):
        pytest.fail("Triton was imported before TRITON_INTERPRET=1 was set")
    return request.param


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with NaN (integers: -12345): an element left unwritten shows."""

    def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: object, **kwargs: object) -> Tensor:
            tensor = empty(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -12345)

        return filled

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture
def assert_within_budget() -> Callable[..., None]:
    """Return a check that `ours` is as near to `exact` (float64) as `eager`, plus a tolerance."""

    def check(name: str, ours: Tensor, exact: Tensor, eager: Tensor, rounding: float = 8.0) -> None:
        """The tolerance is `rounding` units in the last place of the largest number, in `ours`'s type."""
        assert ours.shape == exact.shape, name
        assert ours.dtype == eager.dtype, name
        if exact.numel() == 0:
            return
        scale = exact.abs().max().item()
        budget = (eager - exact).abs().max().item() + rounding * torch.finfo(ours.dtype).eps * scale
        error = (ours - exact).abs().max().item()
        assert error <= budget, f"{name}: error {error:.3g} above the budget {budget:.3g}"

    return check
