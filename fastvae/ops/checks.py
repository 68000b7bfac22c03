"""Argument checks shared by the public functions: each error names the argument, the wish and what came."""

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_float(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` has one of the supported floating-point types."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless `tensor` has the dtype and device of `other`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other.dtype} as {other_name}, got {tensor.dtype}")
    check_device(name, tensor, other_name, other)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless `tensor` is on the device of `other`."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {other_name}, got {tensor.device}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless `tensor` has the `expected` shape; `meaning` names its dimensions."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: expected shape {meaning} = {expected}, got {tuple(tensor.shape)}")


def check_index(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless `tensor` holds int64 indices on the device of `other`."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected an int64 tensor, got {got}")
    check_device(name, tensor, other_name, other)


def check_seed(seed: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless `seed` is an int64 tensor of shape (1,) on the device of `other`."""
    check_index("seed", seed, other_name, other)
    check_shape("seed", seed, (1,), "(1,)")


def check_broadcast(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless `tensor` has a floating-point type and broadcasts to `other`, on the same device."""
    check_float(name, tensor)
    check_device(name, tensor, other_name, other)
    try:
        broadcasts = torch.broadcast_shapes(tensor.shape, other.shape) == other.shape
    except RuntimeError:
        broadcasts = False
    if not broadcasts:
        shape, other_shape = tuple(tensor.shape), tuple(other.shape)
        raise ValueError(f"{name}: expected a shape that broadcasts to {other_name}'s {other_shape}, got {shape}")


def check_samples(num_samples: Any, *, required: bool = False) -> None:
    """Raise ValueError unless `num_samples` is an integer of at least 1, or None where it is not `required`."""
    if num_samples is None and not required:
        return
    if not (isinstance(num_samples, int | torch.SymInt) and num_samples >= 1):
        wish = "an integer" if required else "None or an integer"
        raise ValueError(f"num_samples: expected {wish} of at least 1, got {num_samples!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
