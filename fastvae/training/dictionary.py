"""`fastvae dictionary`: learn a dictionary of patches or of an array's rows, and leave figures and pictures of it."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastvae.data.arrays import image_files, read_image, read_npy
from fastvae.estimators import MiniBatchDictionaryLearning, SparseCoder
from fastvae.training.checkpoint import replace_atomically
from fastvae.training.curves import figure_to
from fastvae.training.pictures import plot_atoms

_HELD_OUT = 5000  # samples at most, and at most a tenth of all
_FLAT = 0.1  # of the mean norm: patches under it are sky and noise, which normalising would blow up


@dataclass(frozen=True)
class DictionaryMetrics:
    """Figures of a learnt dictionary; means over samples that were held out (the file's own if they were not).

    Attributes:
        atoms, features, samples: sizes, of what was learnt from.
        l1: weight of the L1 norm of the codes.
        objective: 1/2 |x - h D|^2 + l1 |h|_1 of a sample.
        relative_error: |x - h D|^2 over |x|^2, sums over all samples.
        nonzeros: codes of a sample that are not 0.
        atoms_used: atoms that some sample uses.
        largest_gap: duality gap of the worst solved sample, relative to |x|^2.
        held_out: whether the samples measured on were kept from learning.
        batches, seconds: learning's.
        interrupted: whether Ctrl-C ended it.
    """

    atoms: int
    features: int
    samples: int
    l1: float
    objective: float
    relative_error: float
    nonzeros: float
    atoms_used: int
    largest_gap: float
    held_out: bool
    batches: int
    seconds: float
    interrupted: bool


def learn_dictionary(
    data: str | Path | None,
    folder: str | Path,
    *,
    atoms: int = 256,
    l1: float = 0.15,
    patch_size: int = 8,
    samples: int = 100_000,
    epochs: int = 10,
    batch_size: int = 512,
    raw: bool = False,
    seed: int = 0,
    device: Any = None,
    overwrite: bool = False,
) -> DictionaryMetrics:
    """Learn a dictionary; write components.npy, atoms.png, objective.png, sparsity.png and metrics.json.

    Args:
        data: .npy file with samples (samples, features) or images (images, height, width[, channels]), or a folder of
            images, of which patches are cut; None takes the photographs that come with scikit-learn.
        folder: folder to write to, made if it is not there.
        atoms: size of the dictionary.
        l1: weight of the L1 norm of the codes, for samples of norm 1.
        patch_size: side of the patches, in pixels.
        samples: most samples to learn from, drawn at random; 0 takes all rows of a file, or 100,000 patches.
        epochs: passes over the samples.
        batch_size: samples between two updates of the dictionary.
        raw: take rows as they are, where otherwise each has its mean removed and its norm made 1; with `samples` 0 a
            file is then read batch by batch and may be larger than memory.
        seed: of everything random.
        device: torch device to compute on; the CPU if None.
        overwrite: replace what is in `folder`.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: naming what is wrong with folder or data.
    """
    folder = Path(folder)
    if (folder / "components.npy").exists() and not overwrite:
        raise FileExistsError(f"{folder} already holds a dictionary; choose another --out or add --overwrite")
    for name, value, least in (("patch_size", patch_size, 1), ("samples", samples, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    random = np.random.default_rng(seed)
    x = _samples(data, patch_size, samples, raw, random)
    if len(x) < 2:
        raise ValueError(f"a dictionary needs at least 2 samples that are not flat, got {len(x)}")
    held_out = not isinstance(x, np.memmap)
    count = max(1, min(_HELD_OUT, len(x) // 10))
    test = np.array(x[:: max(1, len(x) // count)][:count]) if not held_out else x[:count]
    train = x[count:] if held_out else x
    folder.mkdir(parents=True, exist_ok=True)

    learner = MiniBatchDictionaryLearning(
        atoms, alpha=l1, max_iter=epochs, batch_size=batch_size, tol=0, max_no_improvement=None, random_state=seed,
        device=device,
    )  # fmt: skip
    begun = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the fit was interrupted")  # told in our own words
        learner.fit(train)
    seconds = time.monotonic() - begun
    coder = SparseCoder(learner.components_, transform_algorithm="lasso_cd", transform_alpha=l1, device=device)
    codes, info = coder.transform(test, return_info=True)
    used = (codes != 0).mean(0)
    order = np.argsort(-used, kind="stable")
    components, codes = learner.components_[order], codes[:, order]
    residual = np.square(test - codes @ components).sum(dtype=np.float64)
    metrics = DictionaryMetrics(
        atoms=len(components),
        features=x.shape[1],
        samples=len(train),
        l1=l1,
        objective=float((0.5 * residual + l1 * np.abs(codes).sum(dtype=np.float64)) / len(test)),
        relative_error=float(residual / max(np.square(test, dtype=np.float64).sum(), 1e-300)),
        nonzeros=float((codes != 0).sum(1).mean()),
        atoms_used=int((used > 0).sum()),
        largest_gap=float(info.gap.max()),
        held_out=held_out,
        batches=learner.n_steps_,
        seconds=seconds,
        interrupted=learner.interrupted_,
    )
    replace_atomically(folder / "components.npy", lambda file: np.save(file, components))
    plot_atoms(components, folder / "atoms.png")
    if learner.objective_:  # none if it was interrupted in the first batch
        _plot_objective(learner.objective_, folder / "objective.png")
    _plot_sparsity((codes != 0).sum(1), used[order], folder / "sparsity.png")
    text = json.dumps(asdict(metrics), indent=2) + "\n"
    replace_atomically(folder / "metrics.json", lambda file: file.write(text.encode()))
    return metrics


# data


def _samples(data: str | Path | None, patch_size: int, most: int, raw: bool, random: Any) -> np.ndarray:
    path = None if data is None else Path(data)
    if path is not None and path.suffix == ".npy":
        array = read_npy(path)
        if array.ndim == 2:
            if raw and not most:
                return array
            rows = random.permutation(len(array))[: most or None]
            kept = np.array(array[np.sort(rows)], np.float32)
            random.shuffle(kept)
            if not np.isfinite(kept).all():
                raise ValueError(f"{path}: expected finite numbers, got nan or inf")
            return kept if raw else _normalized(kept)
        images: Any = array
        names: Sequence[Any] = [f"{path}[{n}]" for n in range(len(array))]
    elif path is None:
        from sklearn.datasets import load_sample_images

        images = load_sample_images().images
        names = ["china", "flower"]
    else:
        images = names = image_files(path)
    return _patches(images, names, patch_size, most or 100_000, raw, random)


def _grey(image: Any) -> np.ndarray:
    if isinstance(image, Path):
        return read_image(image, "F")
    image = np.asarray(image, np.float32)
    return image.mean(2) if image.ndim == 3 else image


def _patches(
    images: Any, names: Sequence[Any], size: int, count: int, raw: bool, random: Any
) -> np.ndarray:  # fmt: skip
    """Return `count` patches, (patches, size * size), as many of each image."""
    parts = []
    shares = np.diff(np.linspace(0, count, len(images) + 1).round().astype(int))
    for image, name, share in zip(images, names, shares, strict=True):
        pixels = _grey(image)
        if not np.isfinite(pixels).all():
            raise ValueError(f"{name}: expected finite numbers, got nan or inf")
        if min(pixels.shape) < size:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (size, size))
        places = random.choice(windows.shape[0] * windows.shape[1], min(share, windows[..., 0, 0].size), replace=False)
        parts.append(windows[np.unravel_index(places, windows.shape[:2])].reshape(-1, size * size))
    if not parts:
        raise ValueError(f"no image has {size} x {size} pixels: choose a smaller --patch-size")
    patches = np.concatenate(parts).astype(np.float32)
    random.shuffle(patches)
    return patches if raw else _normalized(patches)


def _normalized(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(1, keepdims=True)
    norms = np.linalg.norm(x, axis=1)
    kept = norms > _FLAT * norms.mean()
    return x[kept] / norms[kept, None]


# pictures


def _plot_objective(objective: Sequence[float], path: Path) -> None:
    with figure_to(path, 1, 1, (5, 3.5)) as (axis,):
        width = max(1, len(objective) // 50)
        axis.plot(np.arange(1, len(objective) + 1), objective, color="tab:blue", alpha=0.3, label="batch")
        smooth = np.convolve(objective, np.ones(width) / width, "valid")
        axis.plot(np.arange(width, width + len(smooth)), smooth, color="tab:blue", label=f"mean of {width}")
        axis.set(xlabel="batch", ylabel="objective / sample", title="of each batch, before learning from it")
        axis.legend()


def _plot_sparsity(nonzeros: np.ndarray, used: np.ndarray, path: Path) -> None:
    with figure_to(path, 1, 2, (10, 3.5)) as (left, right):
        left.hist(nonzeros, bins=np.arange(nonzeros.max() + 2) - 0.5, color="tab:blue")
        left.set(xlabel="atoms a sample uses", ylabel="samples", title=f"{nonzeros.mean():.1f} in the mean")
        right.plot(100 * used, color="tab:orange")
        right.set(xlabel="atom", ylabel="% of samples", title="that use an atom", ylim=(0, None))
