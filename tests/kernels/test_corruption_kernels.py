"""Corruption kernels against PyTorch with noise from the reference stream."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvae.kernels import corruption
from fastvae.ops import corruption as definition

SEED = -123456789012345
CORRUPTION = (0.4, -3.0, 2.5)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

every_noise = pytest.mark.parametrize("noise", definition.NOISES)


def _operands(rows: int, features: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((rows, features), (outputs, features), (outputs,), (rows, outputs))
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def _seed(device: str) -> Tensor:
    return torch.tensor([SEED], device=device)


@pytest.mark.usefixtures("poison")
@every_noise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (33, 257), (2, 1024)], ids=str)
def test_corrupt_is_the_definition(shape: tuple[int, ...], dtype: torch.dtype, noise: str, device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    ours = corruption.corrupt(x.to(device), _seed(device), noise, *CORRUPTION).cpu()
    expected = definition.reference(x, _seed("cpu"), noise, *CORRUPTION)
    if noise == "gaussian":
        # The interpreter cuts float32 to bfloat16 where a GPU rounds.
        rounding = 2 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
        torch.testing.assert_close(ours, expected, rtol=rounding, atol=2e-6)
    else:
        assert torch.equal(ours, expected)


@pytest.mark.usefixtures("poison")
@every_noise
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [*(((7, 33, 65), dtype) for dtype in DTYPES), ((1, 1, 1), torch.float32), ((65, 36, 3), torch.float32)],
    ids=str,
)
def test_products_match_float64(
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    noise: str,
    device: str,
    assert_within_budget: Callable,
) -> None:
    x, weight, bias, grad = _operands(*sizes, dtype)
    moved = [t.to(device) for t in (x, weight, grad)]
    arguments, has_bias = (_seed(device), noise, *CORRUPTION), sizes[0] > 1
    y = corruption.linear(*moved[:2], bias.to(device) if has_bias else None, *arguments).cpu()
    grad_weight = corruption.grad_weight(moved[2], moved[0], *arguments).cpu()
    copy = corruption.corrupt(moved[0], *arguments).cpu()

    def exact(compute: torch.dtype) -> tuple[Tensor, Tensor]:
        corrupted = copy.to(compute)
        shift = bias.to(compute) if has_bias else 0
        return corrupted @ weight.to(compute).T + shift, grad.to(compute).T @ corrupted

    for name, mine, truth, peer in zip(
        ["y", "grad_weight"], (y, grad_weight), exact(torch.float64), exact(dtype), strict=True
    ):
        assert mine.dtype == dtype
        assert_within_budget(name, mine, truth, peer, rounding=8 if dtype == torch.float32 else 1)


@every_noise
def test_no_elements(noise: str, device: str) -> None:
    arguments = (_seed(device), noise, *CORRUPTION)
    for sizes in ((0, 5, 3), (4, 0, 3), (4, 5, 0)):
        x, weight, bias, grad = (t.to(device) for t in _operands(*sizes, torch.float32))
        assert corruption.corrupt(x, *arguments).shape == x.shape
        torch.testing.assert_close(
            corruption.linear(x, weight, bias, *arguments), bias.expand(grad.shape) if 0 in x.shape else grad
        )
        assert torch.equal(corruption.grad_weight(grad, x, *arguments), torch.zeros_like(weight))


def test_float64_is_refused(device: str) -> None:
    x = torch.zeros(2, 3, dtype=torch.float64, device=device)
    for call in (
        lambda *corrupted: corruption.corrupt(x, *corrupted),
        lambda *corrupted: corruption.linear(x, x, None, *corrupted),
        lambda *corrupted: corruption.grad_weight(x, x, *corrupted),
    ):
        with pytest.raises(TypeError, match=r"^x: expected float32, bfloat16 or float16, got torch\.float64$"):
            call(_seed(device), "masking", *CORRUPTION)
