"""Pictures of trained models: inputs and reconstructions, samples, latent maps, manifolds and atoms, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastvae.data import Samples, Scaling
from fastvae.models import LinearAutoEncoder
from fastvae.training.array_models import ArrayModel
from fastvae.training.checkpoint import replace_atomically
from fastvae.training.curves import figure_to

_WIDE = 900  # pixels that a grid of small images takes, about
_LARGEST = 4000  # and one of large images at most, where they are not larger still
_MAPPED = 5000  # rows in a latent map, at most
_SIDE = 20  # images in a row of a manifold
_ATOMS = 144
PICTURES = ("latent_map", "reconstructions", "samples", "manifold", "atoms")  # names of those that a run may have


def draw_pictures(
    model: ArrayModel, train: Samples, valid: Samples, folder: str | Path, *, seed: int = 0
) -> list[Path]:
    """Draw all that makes sense of a model: reconstructions, samples, latent map, manifold, atoms.

    Args:
        model: in evaluation mode.
        train: rows to place in the latent map.
        valid: rows to reconstruct.
        folder: where the PNGs go.
        seed: of the samples.

    Returns:
        The files written.
    """
    folder, scaling = Path(folder), model.scaling
    written = [folder / "latent_map.png"]
    plot_latent_map(model, train, written[0])
    few = valid.read(slice(0, 32))
    if scaling.is_image:
        written.append(folder / "reconstructions.png")
        pairs = torch.stack([few, model.reconstruct(few).cpu()], 1).flatten(0, 1)
        plot_images(pairs, scaling, written[-1], columns=16, pairs=True)
        if model.has_prior:
            written.append(folder / "samples.png")
            plot_images(model.sample(100, seed), scaling, written[-1], columns=10)
            if model.model.latent_dim == 2:
                written.append(folder / "manifold.png")
                plot_manifold(model, written[-1])
        atoms = decoder_atoms(model)
        if atoms is not None:
            written.append(folder / "atoms.png")
            plot_atoms(atoms, written[-1], scaling.shape)
    else:
        written.append(folder / "reconstructions.png")
        plot_vectors(model, valid, written[-1], seed=seed)
    return written


# images


def plot_images(
    images: Tensor, scaling: Scaling, path: str | Path, *, columns: int, pairs: bool = False, space: int | None = None
) -> None:
    """Draw images beside each other, in the greys or colours between the smallest and the largest number of the data.

    Args:
        images: (N, channels, height, width), unscaled; large ones are drawn in part, the first of them.
        scaling: of the data.
        path: PNG to write.
        columns: images in a row.
        pairs: each two belong together, and stand closer.
        space: white between images, in pixels; by default half as much as a pixel of theirs takes.
    """
    height, width = images.shape[2:]
    columns = min(columns, max(1, _LARGEST // width // 2) * 2)
    images = images[: columns * max(1, _LARGEST // height)]
    shown = ((images.cpu().float() - scaling.low) / (scaling.high - scaling.low or 1.0)).clamp(0, 1)
    tiles = shown.numpy().transpose(0, 2, 3, 1)
    _save(_tiled(tiles, columns, pairs, space), path)


def _tiled(tiles: NDArray[Any], columns: int, pairs: bool = False, space: int | None = None) -> NDArray[Any]:
    """Lay tiles (N, height, width, channels) in [0, 1] into one picture, a pixel of theirs as a square of pixels."""
    count, height, width, channels = tiles.shape
    columns = min(columns, count)
    lines = ceil(count / columns)
    scale = max(1, _WIDE // (columns * width))
    space = max(2, scale // 2 + 1) if space is None else space
    gaps = [space // 3 + 1 if pairs and column % 2 == 0 else space for column in range(columns)]
    lefts = space + np.cumsum([0, *(width * scale + gap for gap in gaps)])
    picture = np.ones((space + lines * (height * scale + space), int(lefts[-1]), channels))
    for number, tile in enumerate(tiles):
        line, column = divmod(number, columns)
        top, left = space + line * (height * scale + space), int(lefts[column])
        picture[top : top + height * scale, left : left + width * scale] = tile.repeat(scale, 0).repeat(scale, 1)
    return picture


def _save(picture: NDArray[Any], path: str | Path, low: float = 0.0) -> None:
    """Write a picture (height, width, channels) of numbers in [low, 1]."""
    from matplotlib.image import imsave

    if picture.shape[2] != 3:
        picture = picture[..., :1].repeat(3, 2)
    shown = (255 * ((picture - low) / (1 - low)).clip(0, 1)).round().astype(np.uint8)
    replace_atomically(path, lambda file: imsave(cast(BinaryIO, file), shown, format="png"))


def plot_manifold(model: ArrayModel, path: str | Path) -> None:
    """Draw what a grid over a plane of z decodes to: the grid's lines cut off equal shares of N(0, 1) each.

    Args:
        model: of images, with 2 latent dimensions; the first grows to the right, the second upwards.
        path: PNG to write.
    """
    steps = torch.special.ndtri((torch.arange(_SIDE) + 0.5) / _SIDE)
    z = torch.cartesian_prod(steps.flip(0), steps).flip(1)
    plot_images(model.decode(z), model.scaling, path, columns=_SIDE, space=1)


# latent space


def plot_latent_map(model: ArrayModel, samples: Samples, path: str | Path) -> None:
    """Draw where rows lie in the latent space: two dimensions as they are, more by the two principal components.

    Args:
        model: in evaluation mode.
        samples: rows of the training part, of which some thousand are drawn, coloured by label where they have one.
        path: PNG to write.
    """
    rows = np.linspace(0, len(samples) - 1, min(_MAPPED, len(samples))).round().astype(int)
    codes = torch.cat([model.codes(samples.read(part)).flatten(1).cpu().double() for part in np.array_split(rows, 10)
                       if len(part)])  # fmt: skip
    names = ["z1", "z2"]
    if codes.size(1) != 2:
        codes, shares = principal_components(codes)
        names = [
            f"principal component {n + 1} of z ({100 * share:.0f} % of its variance)" for n, share in enumerate(shares)
        ]
    points = codes.numpy()
    with figure_to(path, 1, 1, (7.5, 6.5)) as (axis,):
        scatter(axis, points, None if samples.labels is None else samples.labels[rows], samples.label_names)
        axis.set(xlabel=names[0], ylabel=names[1], title=f"{len(points):,} training rows in the latent space")
        if codes.size(1) == 2 and len(names[0]) == 2:
            axis.set_aspect("equal", "datalim")
        axis.grid(alpha=0.3)


def principal_components(codes: Tensor) -> tuple[Tensor, list[float]]:
    """Project rows on their first two principal components; with the share of the variance that each has."""
    if codes.size(1) == 1:
        codes = torch.cat([codes, torch.zeros_like(codes)], 1)
    centred = codes - codes.mean(0)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    if len(singular) < 2:
        return torch.zeros(len(codes), 2, dtype=codes.dtype), [0.0, 0.0]
    shares = singular.square() / singular.square().sum().clamp_min(1e-300)
    return centred @ directions[:2].T, shares[:2].tolist()


def scatter(axis: Any, points: NDArray[Any], labels: NDArray[Any] | None, names: Sequence[str]) -> None:
    """Draw points, coloured by label, an index into at most 20 names; in one colour where there are more, or none."""
    size = float(np.clip(6000 / max(len(points), 1), 4, 30))
    if labels is None or len(names) > 20:  # more colours than the eye can tell apart
        axis.scatter(*points.T, s=size, color="tab:blue", alpha=0.6, linewidths=0)
        return
    from matplotlib import colormaps

    colours = colormaps["tab10" if len(names) <= 10 else "tab20"](np.arange(len(names)))
    for label, name in enumerate(names):
        chosen = points[labels == label]
        if len(chosen):
            axis.scatter(*chosen.T, s=size, color=tuple(colours[label]), alpha=0.75, linewidths=0, label=name)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, markerscale=max(1.0, 3 - size / 10))


# vectors


def plot_vectors(model: ArrayModel, samples: Samples, path: str | Path, *, seed: int = 0) -> None:
    """Draw vectors, their reconstructions and samples in the plane of the data's first two principal components.

    Args:
        model: of vectors.
        samples: rows, of which some thousand are drawn.
        path: PNG to write.
        seed: of the samples.
    """
    rows = np.linspace(0, len(samples) - 1, min(_MAPPED, len(samples))).round().astype(int)
    data = samples.read(rows)
    clouds = [("data", "tab:blue", data), ("reconstructions", "tab:orange", model.reconstruct(data).cpu())]
    if model.has_prior:
        clouds.append(("samples", "tab:green", model.sample(len(data), seed).cpu()))
    clouds = [(name, colour, model.scaling.apply(cloud.clone())) for name, colour, cloud in clouds]
    centre = clouds[0][2].mean(0)
    plane, names = torch.eye(2), ["feature 1", "feature 2"]
    if data.size(1) != 2:
        directions = torch.linalg.svd(clouds[0][2] - centre, full_matrices=False)[2]
        plane = torch.zeros(data.size(1), 2)
        plane[:, : len(directions)] = directions[:2].T
        names = ["principal component 1 of the data", "principal component 2"]
    with figure_to(path, 1, len(clouds), (4.2 * len(clouds), 4.2), sharex=True, sharey=True) as axes:
        for axis, (name, colour, cloud) in zip(axes, clouds, strict=True):
            points = ((cloud - centre) @ plane).numpy()
            axis.scatter(*points.T, s=float(np.clip(6000 / len(points), 3, 20)), color=colour, alpha=0.5, linewidths=0)
            axis.set(title=name, xlabel=names[0])
            axis.grid(alpha=0.3)
        axes[0].set_ylabel(names[1])


# atoms


def decoder_atoms(model: ArrayModel) -> NDArray[Any] | None:
    """Return what single units of the decoder's last layer add to an image, (atoms, features), largest first.

    Of a linear decoder these are what the codes add; None of a convolutional or categorical one.
    """
    if isinstance(model.model, LinearAutoEncoder):
        weight = model.model.decoder.detach()
    else:
        if getattr(model.model, "likelihood", "") == "categorical":
            return None
        layers = [
            layer for layer in model.model.decoder.modules() if isinstance(layer, (nn.Linear, nn.ConvTranspose2d))
        ]
        if not layers or not isinstance(layers[-1], nn.Linear):
            return None
        weight = layers[-1].weight.detach().T
    order = weight.square().sum(1).argsort(descending=True, stable=True)
    atoms: NDArray[Any] = weight[order].float().cpu().numpy()
    return atoms


def plot_atoms(components: NDArray[Any], path: str | Path, shape: Sequence[int] = ()) -> None:
    """Draw atoms, each in greys from its minimum to its maximum about 0.

    Args:
        components: dictionary, (atoms, features).
        path: PNG to write.
        shape: (channels, height, width) of an atom, of which the first 144 are drawn; when empty all are, as squares if
            the number of features is one, else as lines.
    """
    features = components.shape[1]
    if not shape:
        side = round(features**0.5)
        shape = (1, side, side) if side * side == features else ()
    else:
        components = components[:_ATOMS]
    largest = np.abs(components).max(1, keepdims=True)
    scaled = components / np.where(largest > 0, largest, 1)
    if not shape:
        _save(scaled[..., None], path, low=-1.0)  # an atom a line
        return
    tiles = scaled.reshape(-1, *shape).transpose(0, 2, 3, 1)
    _save(_tiled(tiles, ceil(len(tiles) ** 0.5)), path, low=-1.0)
