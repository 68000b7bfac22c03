"""Mixture log-density kernels against float64 PyTorch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvae.kernels import posterior
from fastvae.ops.posterior import reference, reference_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (7, 65, 3), (33, 7, 9), (70, 130, 2), (3, 5, 33)]  # points, components, latent


def _operands(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    points, components, latent = shape
    return [torch.randn(n, latent).to(dtype) for n in (points, components, components)]


def _kernels(grad: Tensor, operands: list[Tensor], device: str) -> list[Tensor]:
    grad, *operands = (x.to(device) for x in (grad, *operands))
    log_density = posterior.forward(*operands)
    return [x.cpu() for x in (log_density, *posterior.backward(grad, log_density, *operands))]


def _references(grad: Tensor, operands: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    operands = [x.to(dtype) for x in operands]
    log_density = reference(*operands)
    return [log_density, *reference_backward(grad.to(log_density.dtype), log_density, *operands)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, assert_within_budget: Callable
) -> None:
    operands, grad = _operands(shape, dtype), torch.randn(shape[0])
    exact, eager = (_references(grad, operands, d) for d in (torch.float64, torch.float32))
    names = ["log_density", "grad_z", "grad_mean", "grad_log_var"]
    # The relative rounding of a weight is the absolute one of the log-densities it is the exponential of.
    size = exact[0].abs().max().item() / 4
    for name, mine, truth, peer in zip(names, _kernels(grad, operands, device), exact, eager, strict=True):
        assert mine.dtype == (torch.float32 if name == "log_density" else dtype), name
        rounding = 8 + size if mine.dtype.itemsize == 4 else 1
        assert_within_budget(name, mine, truth, peer.to(mine.dtype), rounding=rounding)


@pytest.mark.usefixtures("poison")
def test_extremes(device: str) -> None:
    z, mean, log_var = _operands((40, 70, 3), torch.float32)
    log_var[:] = -2.0
    log_var[0, 0], log_var[69, 0] = 50.0, -1e30
    z[33] = 1e19
    grad = torch.ones(40)
    log_density, *grads = _kernels(grad, [z, mean, log_var], device)
    assert log_density.isneginf().nonzero().flatten().tolist() == [33]
    finite = [i for i in range(40) if i != 33]
    expected = _references(grad[finite], [z[finite], mean, log_var], torch.float64)
    torch.testing.assert_close(log_density[finite].double(), expected[0], rtol=1e-5, atol=1e-5)
    assert (grads[0][33] == 0).all()
    assert (grads[2][[0, 69], 0] == 0).all()
    for ours, truth in zip((grads[0][finite], *grads[1:]), expected[1:], strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("poison")
def test_nan_in_gives_nan_out(device: str) -> None:
    z, mean, log_var = _operands((40, 70, 3), torch.float32)
    z[35, 1] = float("nan")
    assert _kernels(torch.ones(40), [z, mean, log_var], device)[0].isnan().nonzero().tolist() == [[35]]
    mean[66, 2] = float("nan")
    assert _kernels(torch.ones(40), [z, mean, log_var], device)[0].isnan().all()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 5, 0), (0, 0, 2)], ids=str)
def test_no_elements(shape: tuple[int, int, int], device: str) -> None:
    operands = _operands(shape, torch.float32)
    log_density, *grads = _kernels(torch.ones(shape[0]), operands, device)
    torch.testing.assert_close(log_density, torch.zeros(shape[0]))
    assert [g.shape for g in grads] == [x.shape for x in operands]
    assert all((g == 0).all() for g in grads)


def test_float64_is_refused(device: str) -> None:
    z = torch.zeros(2, 3, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match=r"^z: expected float32, bfloat16 or float16, got torch\.float64$"):
        posterior.forward(z, z, z)
