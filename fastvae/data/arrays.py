"""Vectors and images: scikit-learn's digits, .npy files, folders of images, IDX files, MNIST by download; scaling.

Rows stay as they are stored, memory-mapped where the file allows it, until they are asked for as float32.
"""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastvae.data.corpus import SPLIT_NAMES

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
SCALINGS = ("unit", "binary", "standard", "levels", "none")
_CHUNK = 4096  # rows read at a time
_CHANNELS = 4  # at most, in the last place
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_PARTS = {
    "train": "train",
    "valid": "train",
    "test": "t10k",
}  # of the files that MNIST's names have become a custom for

# SHA256 of the .gz files, as the checksum lists of several libraries have them. Fashion-MNIST's belong to the files
# whose MD5 its authors publish in the README of zalandoresearch/fashion-mnist.
_DOWNLOADS: dict[str, tuple[str, dict[str, str]]] = {
    "mnist": (
        "https://storage.googleapis.com/cvdf-datasets/mnist",
        {
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
    ),
    "fashion-mnist": (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
        {
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
    ),
}
NAMES = ("digits", *_DOWNLOADS)


@dataclass(frozen=True)
class Samples:
    """Rows of an array, read when they are asked for.

    Attributes:
        array: all rows as they are stored, (N, features) or (N, height, width[, channels]).
        rows: those that belong to this part, int64 (n,).
        labels: class of each row of the part, int64 (n,); None where there are none.
        label_names: name of each class.
    """

    array: NDArray[Any]
    rows: NDArray[np.int64]
    labels: NDArray[np.int64] | None = None
    label_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_image(self) -> bool:
        """Whether a row is an image rather than a vector."""
        return self.array.ndim > 2

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a row: (features,) or (channels, height, width)."""
        if not self.is_image:
            return (self.array.shape[1],)
        height, width, *channels = self.array.shape[1:]
        return (channels[0] if channels else 1, height, width)

    def read(self, which: slice | NDArray[np.int64]) -> Tensor:
        """Give some of the rows, float32 (number, *shape), unscaled.

        Raises:
            ValueError: a number is NaN or infinite.
        """
        chosen = np.asarray(self.array[self.rows[which]], np.float32)
        if not np.isfinite(chosen).all():
            raise ValueError("the data hold nan or inf where finite numbers were expected")
        if self.array.ndim == 4:
            chosen = np.ascontiguousarray(chosen.transpose(0, 3, 1, 2))
        return torch.from_numpy(chosen.reshape(-1, *self.shape))

    def chunks(self) -> Iterator[Tensor]:
        """Give all rows in order, some thousand at a time."""
        for start in range(0, len(self), _CHUNK):
            yield self.read(slice(start, start + _CHUNK))


def load_array(
    source: str | os.PathLike[str],
    part: str = "train",
    *,
    image_size: int = 0,
    mirror: str | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Samples:
    """Give one part of a set of vectors or images.

    Of each 20 rows the 19th is for validation and the 20th for testing, in the order of the file. Where test images
    come in a file of their own (a folder with MNIST's four), they are the test part, and the 20th is for training.

    Args:
        source: "digits", scikit-learn's 1,797 images of 8 x 8; "mnist" or "fashion-mnist", downloaded; a .npy file,
            (N, features) or (N, height, width[, channels]), memory-mapped; an IDX file, .gz or not, whose labels may
            lie beside it; a folder with MNIST's IDX files; or a folder of images, whose sub-folders are the labels. A
            name wins over a path spelt the same: write `./digits` for the path.
        part: "train", "valid", "test", or "all" of a source that has no test file of its own.
        image_size: images of a folder are cut and resized to squares of this side; 0 takes them as they are.
        mirror, cache: as in `download`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the part is unknown or empty, or a file is damaged or of a kind that is not read.
        OSError: a download failed.
    """
    return load_arrays(source, (part,), image_size=image_size, mirror=mirror, cache=cache)[0]


def load_arrays(
    source: str | os.PathLike[str],
    parts: Sequence[str],
    *,
    image_size: int = 0,
    mirror: str | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> list[Samples]:
    """Give several parts, each as `load_array` gives it, reading no file twice."""
    for part in parts:
        if part not in (*SPLIT_NAMES, "all"):
            raise ValueError(f"part must be one of {', '.join(SPLIT_NAMES)}, all; got {part!r}")
    path = download(str(source), mirror=mirror, cache=cache) if source in _DOWNLOADS else Path(source)
    if has_test_part(source):
        if "all" in parts:
            raise ValueError(f"part 'all' is for a single file or a folder of images; {source} has a test part apart")
        files = {prefix: _idx_part(path, prefix) for prefix in {_PARTS[part] for part in parts}}
        whole = [files[_PARTS[part]] for part in parts]
        kept = {
            "train": lambda place: place != 18,
            "valid": lambda place: place == 18,
            "test": lambda place: place >= 0,
        }
        chosen = [
            _select(samples, np.flatnonzero(kept[part](np.arange(len(samples)) % 20)))
            for samples, part in zip(whole, parts, strict=True)
        ]
    else:
        samples = _read(source, path, image_size)
        place = np.arange(len(samples)) % 20
        rows = {"train": place < 18, "valid": place == 18, "test": place == 19, "all": place >= 0}
        chosen = [_select(samples, np.flatnonzero(rows[part])) for part in parts]
    for samples, part in zip(chosen, parts, strict=True):
        if not len(samples.array):
            raise ValueError(f"{source} holds no rows")
        if not len(samples):
            count = len(samples.array)
            raise ValueError(f"{source}: {count} rows are too few to hold any out for {part!r}, 20 are needed")
    return chosen


def has_test_part(source: str | os.PathLike[str]) -> bool:
    """Whether a source is MNIST, Fashion-MNIST or a folder with files named as theirs, with test rows of its own."""
    path = Path(source)
    return source in _DOWNLOADS or (
        source != "digits" and path.is_dir() and _idx_file(path, "train-images") is not None
    )


def _read(source: str | os.PathLike[str], path: Path, image_size: int) -> Samples:
    if source == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        names = tuple(map(str, digits.target_names))
        return _whole(digits.images.astype(np.uint8), digits.target.astype(np.int64), names)
    if path.is_dir():
        return _image_folder(path, image_size)
    if path.suffix == ".npy":
        return _whole(read_npy(path))
    if path.is_file():
        return _idx(path)
    raise FileNotFoundError(f"{source}: no such file or folder, and not one of the names {', '.join(NAMES)}")


def _whole(array: NDArray[Any], labels: NDArray[np.int64] | None = None, names: tuple[str, ...] = ()) -> Samples:
    if array.ndim == 4 and array.shape[3] > _CHANNELS:
        raise ValueError(f"images must be (N, height, width, channels), channels last, got shape {array.shape}")
    if not all(array.shape[1:]):
        raise ValueError(f"a row must hold at least one number, got shape {array.shape}")
    return Samples(array, np.arange(len(array)), labels, names)


def _select(samples: Samples, rows: NDArray[np.int64]) -> Samples:
    labels = None if samples.labels is None else samples.labels[rows]
    return Samples(samples.array, samples.rows[rows], labels, samples.label_names)


# .npy and folders of images


def read_npy(path: str | os.PathLike[str]) -> NDArray[Any]:
    """Map a .npy file of real numbers, (N, features) or (N, height, width[, channels]).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError, BadZipFile) as error:
        raise ValueError(f"{path} is no array of numbers that numpy.save wrote: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} holds several arrays, as numpy.savez wrote them; expected one, of numpy.save")
    if array.dtype.kind not in "fiub" or array.ndim not in (2, 3, 4):
        raise ValueError(
            f"{path}: expected real numbers of shape (samples, features) or (images, height, width[, channels]), "
            f"got {array.dtype} of shape {array.shape}"
        )
    return array


def image_files(path: str | os.PathLike[str]) -> list[Path]:
    """Return the images of a folder and its sub-folders, sorted, or the one image that a path names.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: it is neither an image nor a folder with one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file or folder at {path}")
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else [path]
    if not files or files[0].suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"{path}: expected a .npy file, an image or a folder of images ({', '.join(IMAGE_SUFFIXES)})")
    return files


def read_image(path: Path, mode: str, size: int = 0) -> NDArray[Any]:
    """Read an image as (height, width[, 3]).

    Args:
        path: the file.
        mode: Pillow's: "L" (grey, uint8), "RGB" (uint8) or "F" (grey, float32).
        size: side of the square to cut and resize it to; 0 for none.

    Raises:
        ValueError: it cannot be read as an image.
    """
    from PIL import ImageOps

    with _opened_image(path) as opened:
        image = opened.convert(mode)
        return np.asarray(ImageOps.fit(image, (size, size)) if size else image)


@contextmanager
def _opened_image(path: Path) -> Iterator[Any]:
    from PIL import Image

    try:
        with Image.open(path) as opened:
            yield opened
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: a damaged PNG
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _image_folder(folder: Path, size: int) -> Samples:
    files = image_files(folder)
    modes = {_image_mode(file): file.name for file in files}
    if "F" in modes and len(modes) > 1:
        deep, other = modes.pop("F"), next(iter(modes.values()))
        raise ValueError(f"{folder}: images must have one range, but {deep} has more than 8 bits a pixel, {other} 8")
    mode = next(name for name in ("RGB", "F", "L") if name in modes)
    images: list[NDArray[Any]] = []
    for file in files:
        image = read_image(file, mode, size)
        if images and image.shape != images[0].shape:
            (height, width), (first_height, first_width) = image.shape[:2], images[0].shape[:2]
            raise ValueError(
                f"{folder}: images must have one size, but {files[0].name} has {first_width} x {first_height} and "
                f"{file.name} {width} x {height} pixels; fastvae train --image-size makes them alike, for the model too"
            )
        images.append(image)
    folders = [file.relative_to(folder).parts[0] for file in files]
    names = tuple(sorted(set(folders)))
    nested = all(len(file.relative_to(folder).parts) > 1 for file in files)
    labels = np.array([names.index(name) for name in folders]) if nested and len(names) > 1 else None
    return _whole(np.stack(images), labels, names if labels is not None else ())


def _image_mode(path: Path) -> str:
    with _opened_image(path) as opened:
        mode = opened.mode
    return "L" if mode in ("1", "L", "LA") else "F" if mode[0] in "IF" else "RGB"


# IDX files


def read_idx(path: str | os.PathLike[str]) -> NDArray[Any]:
    """Read an IDX file, the format of MNIST; one that is not compressed is memory-mapped.

    Four bytes (0, 0, type, dimensions), the sizes as big-endian uint32, then the numbers, big-endian.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no IDX file, is cut short, or longer than its header says.

    Source: LeCun, Cortes and Burges, The MNIST database, "file formats".
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    compressed = path.suffix == ".gz"
    with open(path, "rb") as file:
        data = file.read() if compressed else file.read(4 + 4 * 255)
    if compressed:
        try:
            data = gzip.decompress(data)
        except EOFError:
            raise ValueError(f"{path} is cut short: its compressed data end too early") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no gzip file, or a damaged one: {error}") from error
        except Exception as error:  # zlib.error
            raise ValueError(f"{path} is damaged: {error}") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES:
        raise ValueError(
            f"{path} is no IDX file: it begins with {data[:4].hex(' ') or 'nothing'}, expected 00 00, a type "
            f"({', '.join(f'{code:02x}' for code in _IDX_TYPES)}) and a number of dimensions"
        )
    dtype, header = np.dtype(_IDX_TYPES[data[2]]), 4 + 4 * data[3]
    if len(data) < header:
        raise ValueError(f"{path} is cut short: {len(data)} bytes, but its header alone takes {header}")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", data[3], offset=4))
    expected, found = header + prod(shape) * dtype.itemsize, len(data) if compressed else path.stat().st_size
    if found != expected:
        how = "cut short" if found < expected else "longer than its header says"
        raise ValueError(f"{path} is {how}: {found} bytes, {expected} expected of shape {shape}")
    if compressed or not prod(shape):
        return np.frombuffer(data, dtype, prod(shape), offset=header).reshape(shape)
    return np.memmap(path, dtype, "r", header, shape)


def _idx_file(folder: Path, kind: str) -> Path | None:
    """Find, say, train-images-idx3-ubyte.gz in a folder, spelt with or without .gz, with a dot or a dash."""
    pattern = re.compile(rf"{kind}[-.]idx\d-ubyte(\.gz)?")
    return next((file for file in sorted(folder.iterdir()) if pattern.fullmatch(file.name)), None)


def _idx_labels(images: Path, count: int) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Return the labels in the file beside one of images, and the names of the classes, where there is such a file."""
    match = re.fullmatch(r"(.*)images[-.]idx\d-ubyte(\.gz)?", images.name)
    file = match and _idx_file(images.parent, f"{re.escape(match[1])}labels")
    if not file:
        return None, ()
    labels = read_idx(file)
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        raise ValueError(
            f"{file}: expected labels, whole numbers (N,), got {labels.dtype.name} of shape {labels.shape}"
        )
    if len(labels) != count:
        raise ValueError(f"{file} holds {len(labels)} labels for the {count} images of {images.name}")
    values, numbers = np.unique(labels, return_inverse=True)
    return numbers.astype(np.int64), tuple(map(str, values))


def _idx_part(folder: Path, prefix: str) -> Samples:
    file = _idx_file(folder, f"{prefix}-images")
    if file is None:
        raise FileNotFoundError(f"{folder} holds no {prefix}-images-idx3-ubyte, nor one that ends with .gz")
    return _idx(file)


def _idx(path: Path) -> Samples:
    array = read_idx(path)
    if array.ndim not in (2, 3, 4):
        raise ValueError(f"{path}: expected (N, features) or (N, height, width[, channels]), got shape {array.shape}")
    return _whole(array, *_idx_labels(path, len(array)))


def download(name: str, *, mirror: str | None = None, cache: str | os.PathLike[str] | None = None) -> Path:
    """Fetch MNIST or Fashion-MNIST, unless its files are in the cache already, and check them against their SHA256.

    Args:
        name: "mnist" or "fashion-mnist".
        mirror: address of the folder with the four .gz files; $FASTVAE_MIRROR/NAME, or the usual place, when None.
        cache: folder for them; $FASTVAE_CACHE, or the user's cache folder, when None. The files go to a folder `name`.

    Returns:
        The folder with the four files.

    Raises:
        ValueError: what arrived is not what it should be; nothing is kept of it.
        OSError: there is no connection, or it broke.
    """
    import pooch
    import requests

    usual, checksums = _DOWNLOADS[name]
    root = os.environ.get("FASTVAE_MIRROR")
    base = (mirror or (f"{root.rstrip('/')}/{name}" if root else usual)).rstrip("/")
    folder = Path(cache or os.environ.get("FASTVAE_CACHE") or pooch.os_cache("fastvae")) / name
    for file, checksum in checksums.items():
        url = f"{base}/{file}"
        try:
            pooch.retrieve(url, f"sha256:{checksum}", file, folder, downloader=pooch.HTTPDownloader(timeout=30))
        except (requests.RequestException, OSError) as error:
            raise OSError(
                f"could not download {url}: {_cause(error)} (a mirror's address goes to FASTVAE_MIRROR; files that are "
                f"there already, to {folder})"
            ) from error
    return folder


def _cause(error: BaseException) -> str:
    """Say in few words what broke a download: the innermost error names it, those around it their objects."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"{response.status_code} {response.reason}"
    while error.__context__ is not None:
        error = error.__context__
    return str(getattr(error, "strerror", None) or error)


# scaling


@dataclass(frozen=True)
class Scaling:
    """A map of the stored numbers to those that a model sees, and back.

    Attributes:
        kind: "unit" maps [low, high] to [0, 1], and what lies outside to its ends; "binary" gives 1 above the middle
            and 0 below; "standard" has mean 0 and variance 1, of each feature, or of all pixels of images; "levels"
            counts whole numbers from 0; "none" changes nothing.
        shape: of a row, (features,) or (channels, height, width).
        shift, scale: the model sees (x - shift) / scale; 0-dim, or of a row's shape.
        low, high: smallest and largest number of the training rows; 0 and 1 where all lie between them.
    """

    kind: str
    shape: tuple[int, ...]
    shift: Tensor
    scale: Tensor
    low: float
    high: float

    @classmethod
    def fit(cls, kind: str, samples: Samples) -> Scaling:
        """Find the scaling of training rows, read once in chunks.

        Raises:
            ValueError: the kind is unknown, a number is not finite, or levels are asked of numbers that are not whole.
        """
        if kind not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {kind!r}")
        low, high, whole = np.inf, -np.inf, True
        total = squares = torch.zeros(())
        origin = next(samples.chunks()).double().mean(0)  # near the mean: nothing cancels in the variance
        for chunk in samples.chunks():
            low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
            whole = whole and bool((chunk == chunk.round()).all())
            centred = chunk.double() - origin
            total, squares = total + centred.sum(0), squares + centred.square().sum(0)
        if low >= 0 and high <= 1:
            low, high = 0.0, 1.0  # what is scaled already stays
        if kind == "levels" and not whole:
            raise ValueError("levels need whole numbers, and the data hold others")
        width = high - low or 1.0
        shift, scale = torch.tensor(low), torch.tensor(width)
        if kind == "binary":
            shift, scale = torch.tensor((low + high) / 2), torch.tensor(1.0)
        elif kind == "levels":
            scale = torch.tensor(1.0)
        elif kind == "none":
            shift, scale = torch.tensor(0.0), torch.tensor(1.0)
        elif kind == "standard":
            mean = total / len(samples)
            variance, mean = squares / len(samples) - mean.square(), mean + origin
            if samples.is_image:
                variance, mean = variance.mean() + mean.var(unbiased=False), mean.mean()
            deviation = variance.clamp_min(0).sqrt()
            constant = deviation <= 1e-6 * mean.abs().clamp_min(1e-30)
            shift, scale = mean.float(), torch.where(constant, 1.0, deviation).float()
        return cls(kind, samples.shape, shift, scale, low, high)

    @property
    def is_image(self) -> bool:
        """Whether a row is an image rather than a vector."""
        return len(self.shape) == 3

    @property
    def levels(self) -> int:
        """How many whole numbers lie between low and high."""
        return int(self.high - self.low) + 1

    def apply(self, x: Tensor) -> Tensor:
        """Scale rows, float32 (..., *shape)."""
        if self.kind == "none":
            return x
        x = (x - self.shift.to(x.device)) / self.scale.to(x.device)
        if self.kind == "binary":
            return (x > 0).float()
        if self.kind == "unit":
            return x.clamp_(0, 1)
        return x.clamp_(0, self.levels - 1) if self.kind == "levels" else x

    def undo(self, x: Tensor) -> Tensor:
        """Give scaled rows in the units of the data again."""
        if self.kind == "binary":
            return self.low + (self.high - self.low) * x
        return x * self.scale.to(x.device) + self.shift.to(x.device)

    def state(self) -> dict[str, Any]:
        """Return tensors and plain types, from which `Scaling(**state)` builds it again."""
        return dict(vars(self))

    def __str__(self) -> str:
        span = f"[{self.low:g}, {self.high:g}]"
        return {
            "unit": f"scaled from {span} to [0, 1]",
            "binary": f"1 above {(self.low + self.high) / 2:g}, 0 below",
            "standard": "standardised to mean 0 and variance 1",
            "levels": f"{self.levels} levels, {span}",
            "none": "as they are",
        }[self.kind]
