"""Checkpoints of a run, and loading a run back; needs torch alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastvae.files import replace_atomically as replace_atomically
from fastvae.training.text_models import text_model

if TYPE_CHECKING:
    from fastvae.data import Scaling, Vocabulary
    from fastvae.training.text_models import TextModel

CHECKPOINTS = ("best", "last")
_PREFIX = "model."  # of the model's tensors among those of the Lightning module


def checkpoint_path(folder: str | Path, which: str = "best") -> Path:
    """Return the path of a run's checkpoint.

    Args:
        folder: a run's folder.
        which: "best" (lowest validation -ELBO) or "last".

    Raises:
        FileNotFoundError: the folder is not a run's, or holds no such checkpoint.
        ValueError: `which` is neither.
    """
    folder = Path(folder)
    if which not in CHECKPOINTS:
        raise ValueError(f"which must be 'best' or 'last', got {which!r}")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no run at {folder}: there is no such folder (train one: fastvae train --out {folder})"
        )
    path = folder / "checkpoints" / f"{which}.ckpt"
    if not path.is_file():
        other = [name for name in CHECKPOINTS if (path.parent / f"{name}.ckpt").is_file()]
        hint = f"; there is a {other[0]!r} one (--checkpoint {other[0]})" if other else ""
        raise FileNotFoundError(f"{folder} holds no {which!r} checkpoint: {path} is missing{hint}")
    return path


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU; only tensors and plain types are ever unpickled.

    Raises:
        ValueError: the file is corrupt, or not a checkpoint of this package.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler fail in any way, with an OSError of no file too
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"checkpoint {path} is corrupt or not a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "model_config", "train_config"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of a fastvae run: its model or its settings are missing")
    return checkpoint


def load_run(
    folder: str | Path, *, which: str = "best", device: str | torch.device = "cpu"
) -> tuple[Any, Any, dict[str, Any]]:
    """Load a trained model with what its data are read by, and its settings.

    Args:
        folder: a run's folder, as written by `train`.
        which: checkpoint "best" or "last".
        device: where the model goes.

    Returns:
        The model in evaluation mode; the `Vocabulary` of a model of text, the `Scaling` of one of vectors or images;
        and the run's settings as a plain dict.

    Raises:
        FileNotFoundError: the folder, the checkpoint or vocabulary.txt is missing.
        ValueError: the checkpoint is corrupt, or does not belong to the vocabulary beside it.
    """
    path = checkpoint_path(folder, which)
    checkpoint = read_checkpoint(path)
    model: torch.nn.Module
    data: Vocabulary | Scaling
    parts = text_model(checkpoint["train_config"])
    if parts:
        model, data = _of_text(parts, Path(folder), path, checkpoint["model_config"])
    else:
        from fastvae.data import Scaling
        from fastvae.training.array_models import build_array_model

        model, data = build_array_model(checkpoint["model_config"]), Scaling(**checkpoint["model_config"]["scaling"])
    tensors = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(_PREFIX)
    }
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        what = type(model).__name__
        raise ValueError(f"{path} does not fit this version's {what}: {' '.join(str(error).split())}") from error
    return model.to(device).eval(), data, checkpoint["train_config"]


def _of_text(
    parts: TextModel, folder: Path, path: Path, model_config: dict[str, Any]
) -> tuple[torch.nn.Module, Vocabulary]:
    from fastvae.data import Vocabulary

    words = folder / "vocabulary.txt"
    if not words.is_file():
        raise FileNotFoundError(f"{folder} holds no vocabulary: {words} is missing")
    vocabulary = Vocabulary.load(words)
    if model_config["vocab_size"] != len(vocabulary):
        raise ValueError(
            f"{path} was trained with {model_config['vocab_size']} words but {words} holds "
            f"{len(vocabulary)}: the files are from different runs"
        )
    return parts.get("model")(**model_config), vocabulary
