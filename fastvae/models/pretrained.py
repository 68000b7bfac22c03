"""Models as files that any process can load: the tensors as safetensors, all else as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fastvae.files import replace_atomically
from fastvae.nn import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder, OneHot

TENSORS, DESCRIPTION = "model.safetensors", "model.json"

# Networks that a file can describe, each with those of its constructor's arguments that are attributes.
_NETWORKS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder), ()),  # their `config` has them all
    OneHot: ("classes",),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Identity: (),
    nn.Linear: ("in_features", "out_features"),
    nn.ReLU: (),
    nn.Unflatten: ("dim", "unflattened_size"),
}


class Pretrained(nn.Module):
    """A model that saves itself to a folder and loads from one, where `config` holds its constructor's arguments.

    The folder gets model.safetensors and model.json, each written whole or not at all. Loading runs no code of the
    files. A model around networks of the user's (`VAE`) describes those of `fastvae.nn`, `nn.Linear` and the like, and
    Sequentials of them; any other must be given to `from_pretrained` again.
    """

    config: dict[str, Any]
    networks: ClassVar[tuple[str, ...]] = ()  # arguments beside those in `config` that are modules

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model.

        Args:
            folder: made where there is none; an older model in it is replaced.

        Raises:
            OSError: a file could not be written.
            TypeError: `config` holds what JSON has no form for.
        """
        from safetensors.torch import save

        from fastvae import __version__

        description = {
            "model": type(self).__name__,
            "config": self.config,
            "networks": {name: _described(getattr(self, name)) for name in self.networks},
            "fastvae": __version__,
        }
        text = json.dumps(description, indent=2) + "\n"
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _distinct(self).items()}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        replace_atomically(folder / TENSORS, lambda file: file.write(save(tensors, {"format": "pt"})))
        replace_atomically(folder / DESCRIPTION, lambda file: file.write(text.encode()))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str = "cpu", **networks: nn.Module) -> Self:
        """Load a model that `save_pretrained` or a training run wrote.

        Args:
            folder: of the run or the model.
            device: where the tensors go; they keep the dtype they were saved in.
            networks: untrained ones, by name (`encoder=`, `decoder=`), where the file cannot describe them.

        Returns:
            The model in evaluation mode.

        Raises:
            FileNotFoundError: the folder or one of the two files is missing.
            ValueError: a file is damaged, of another model than this class, or does not fit this version.
            TypeError: a network that the model has not.
        """
        folder = Path(folder)
        description = _read_description(folder / DESCRIPTION)
        if description["model"] != cls.__name__:
            raise ValueError(f"{folder} holds a {description['model']}, not a {cls.__name__}")
        if unknown := networks.keys() - set(cls.networks):
            raise TypeError(f"{cls.__name__} takes no network {', '.join(sorted(unknown))}")
        for name in cls.networks:
            if name not in networks:
                networks[name] = _built(description["networks"].get(name), name, folder)
        try:
            model = cls(**networks, **description["config"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / DESCRIPTION} does not fit this version's {cls.__name__}: {error}") from error
        model.to(device).eval()
        _fill(model, folder / TENSORS, device)
        return model


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        missing = f"{path.name} is missing" if path.parent.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"no saved model in {path.parent}: {missing}")
    try:
        description = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is corrupt: {error}") from error
    if not isinstance(description, dict) or not {"model", "config", "networks"} <= description.keys():
        raise ValueError(f"{path} does not describe a model of fastvae")
    return description


def _fill(model: nn.Module, path: Path, device: torch.device | str) -> None:
    """Give the model the tensors of a file, of whatever floating-point type they are."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"no saved model in {path.parent}: {path.name} is missing")
    try:
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or not a safetensors file: {error}") from error
    wanted = _distinct(model)
    if odd := wanted.keys() ^ tensors.keys():
        raise ValueError(f"{path} does not fit this version's {type(model).__name__}: {_some(odd)} in only one of them")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{path}: expected {name} of shape {tuple(wanted[name].shape)}, got {tuple(tensor.shape)}")
        wanted[name].data = tensor


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    seen: dict[int, str] = {}
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if seen.setdefault(id(t), name) == name}


def _some(names: set[str]) -> str:
    first, *others = sorted(names)
    return first + (f" and {len(others)} more" if others else "")


def _described(network: nn.Module) -> dict[str, Any] | None:
    """Return what `_built` makes the untrained network of, None for one that only its author can make."""
    kind = type(network)
    if kind is nn.Sequential:
        layers = [_described(layer) for layer in network.children()]
        return None if None in layers else {"class": kind.__name__, "layers": layers}
    if kind not in _NETWORKS:
        return None
    arguments = dict(getattr(network, "config", {})) | {name: getattr(network, name) for name in _NETWORKS[kind]}
    if kind is nn.Linear:
        arguments["bias"] = network.bias is not None
    return {"class": kind.__name__, "arguments": arguments}


def _built(description: dict[str, Any] | None, name: str, folder: Path) -> nn.Module:
    if description is None:
        raise ValueError(f"{folder} does not describe the model's {name}: give it as {name}=, untrained")
    if "layers" in description:
        return nn.Sequential(*(_built(layer, name, folder) for layer in description["layers"]))
    kinds = {kind.__name__: kind for kind in _NETWORKS}
    if description.get("class") not in kinds:
        raise ValueError(f"{folder / DESCRIPTION}: unknown network {description.get('class')!r}")
    arguments = {
        key: tuple(value) if isinstance(value, list) else value for key, value in description["arguments"].items()
    }
    return kinds[description["class"]](**arguments)
