"""Encoders and decoders for vectors and images, fully connected and convolutional."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OneHot(nn.Module):
    """Turn classes `(batch, *shape)`, int64, into one-hot floats `(batch, classes, *shape)`, as an encoder reads them.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        _check_sizes("classes", (classes,))
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        """Encode x, int64 with values in [0, classes), in torch's default floating-point type."""
        return F.one_hot(x, self.classes).movedim(-1, 1).to(torch.get_default_dtype())

    def extra_repr(self) -> str:
        """List the settings for `print`."""
        return str(self.classes)


class _Network(nn.Sequential):
    """Layers in a row that know what shape they read."""

    def __init__(self, layers: list[nn.Module], argument: str, shape: tuple[int, ...], **config: Any) -> None:
        super().__init__(*layers)
        self.config = config
        self._argument, self._shape = argument, shape

    def check_input(self, input: Tensor) -> None:
        """Raise ValueError, naming the argument, if the shape of `input` is wrong."""
        if tuple(input.shape[1:]) != self._shape or not input.dim():
            expected = ", ".join(map(str, ("batch", *self._shape)))
            raise ValueError(f"{self._argument}: expected shape ({expected}), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        self.check_input(input)
        output: Tensor = super().forward(input)
        return output


class MLPEncoder(_Network):
    """Fully connected encoder: data flattened, then linear layers, each followed by a ReLU.

    Data `(batch, *data_shape)` become features `(batch, out_features)`; a ValueError says when x has another shape.
    `config` holds the constructor's arguments.

    Args:
        data_shape: shape of a datum.
        hidden: sizes of the layers; with none the features are the flattened data.
    """

    def __init__(self, data_shape: Sequence[int], hidden: Sequence[int] = (400,)) -> None:
        data_shape, hidden = tuple(data_shape), tuple(hidden)
        _check_sizes("data_shape", data_shape)
        _check_sizes("hidden", hidden)
        sizes = (math.prod(data_shape), *hidden)
        super().__init__([nn.Flatten(), *_linear_layers(sizes)], "x", data_shape, data_shape=data_shape, hidden=hidden)
        self.out_features = sizes[-1]


class MLPDecoder(_Network):
    """Fully connected decoder: linear layers with a ReLU between each two.

    Latents z `(batch, latent_dim)` become logits or means `(batch, *data_shape)`; a ValueError says when z has another
    shape. `config` holds the constructor's arguments.

    Args:
        latent_dim: size of z.
        data_shape: shape of a datum; for a categorical likelihood `(classes, *shape of a datum)`.
        hidden: sizes of the layers before the last; with none the decoder is linear.
    """

    def __init__(self, latent_dim: int, data_shape: Sequence[int], hidden: Sequence[int] = (400,)) -> None:
        data_shape, hidden = tuple(data_shape), tuple(hidden)
        _check_sizes("latent_dim", (latent_dim,))
        _check_sizes("data_shape", data_shape)
        _check_sizes("hidden", hidden)
        sizes = (latent_dim, *hidden)
        last = [nn.Linear(sizes[-1], math.prod(data_shape)), nn.Unflatten(1, data_shape)]
        config = {"latent_dim": latent_dim, "data_shape": data_shape, "hidden": hidden}
        super().__init__([*_linear_layers(sizes), *last], "z", (latent_dim,), **config)


class ConvEncoder(_Network):
    """Convolutional encoder: each layer, 3 x 3 with a ReLU, halves height and width, rounded up.

    Images `(batch, *data_shape)` become features `(batch, out_features)`; a ValueError says when x has another shape.
    `config` holds the constructor's arguments.

    Args:
        data_shape: (channels, height, width) of an image, of any size.
        channels: channels that each layer gives.
    """

    def __init__(self, data_shape: Sequence[int], channels: Sequence[int] = (32, 64)) -> None:
        data_shape, channels = tuple(data_shape), tuple(channels)
        sizes = _image_sizes(data_shape, channels)
        layers: list[nn.Module] = []
        for before, after in pairwise((data_shape[0], *channels)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        super().__init__([*layers, nn.Flatten()], "x", data_shape, data_shape=data_shape, channels=channels)
        self.out_features = channels[-1] * math.prod(sizes[-1])


class ConvDecoder(_Network):
    """Convolutional decoder, the mirror of `ConvEncoder`: a linear layer, then transposed convolutions.

    Latents z `(batch, latent_dim)` become logits or means `(batch, *data_shape)`; a ValueError says when z has another
    shape. `config` holds the constructor's arguments.

    Args:
        latent_dim: size of z.
        data_shape: (channels, height, width) of an image, of any size; for a categorical likelihood of images without
            channels (classes, height, width).
        channels: channels that each convolution reads.
    """

    def __init__(self, latent_dim: int, data_shape: Sequence[int], channels: Sequence[int] = (64, 32)) -> None:
        data_shape, channels = tuple(data_shape), tuple(channels)
        _check_sizes("latent_dim", (latent_dim,))
        *sizes, smallest = _image_sizes(data_shape, channels)
        start = (channels[0], *smallest)
        layers: list[nn.Module] = [nn.Linear(latent_dim, math.prod(start)), nn.Unflatten(1, start)]
        for (before, after), (height, width) in zip(pairwise((*channels, data_shape[0])), reversed(sizes), strict=True):
            padding = (1 - height % 2, 1 - width % 2)  # 2n or 2n - 1 rows come from n
            layers += [nn.ReLU(), nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=padding)]
        config = {"latent_dim": latent_dim, "data_shape": data_shape, "channels": channels}
        super().__init__(layers, "z", (latent_dim,), **config)


def _linear_layers(sizes: Sequence[int]) -> Iterator[nn.Module]:
    for before, after in pairwise(sizes):
        yield nn.Linear(before, after)
        yield nn.ReLU()


def _image_sizes(data_shape: tuple[int, ...], channels: tuple[int, ...]) -> list[tuple[int, int]]:
    """Height and width before the encoder's first layer, and after each."""
    _check_sizes("data_shape", data_shape)
    _check_sizes("channels", channels)
    if len(data_shape) != 3:
        raise ValueError(f"data_shape: expected (channels, height, width), got {data_shape}")
    if not channels:
        raise ValueError("channels: expected at least one layer, got ()")
    sizes = [data_shape[1:]]
    for _ in channels:
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes


def _check_sizes(name: str, sizes: tuple[int, ...]) -> None:
    if not all(size >= 1 for size in sizes):
        raise ValueError(f"{name}: expected sizes of at least 1, got {sizes}")
