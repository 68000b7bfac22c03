"""The settings of a training run: one flat dataclass, read from flags or a YAML file and checked first."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastvae.training.checkpoint import replace_atomically

KL_SCHEDULES = ("constant", "linear", "logistic", "cyclical")
LR_SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("32", "bf16-mixed", "16-mixed")
_AT_LEAST = {
    0: "max_length workers max_tokens max_minutes kl_start kl_weight kl_steps free_bits patience seed checkpoint_every",
    1: "min_count embed_dim hidden_size latent_dim num_layers batch_size epochs devices log_every",
    5: "vocab_size",
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run of a sentence VAE.

    Args:
        data: name of a corpus ("assistant", "ptb") or path of a text file, one sentence a line.
        valid: path of the validation text; None takes the corpus's own split, or holds out 5 % of a file.
        out: folder of the run.
        vocab_size: largest vocabulary, special tokens included. min_count: rarer words become <unk>.
        max_length: longer training sentences are cut to this many words; 0 keeps them whole.
        streaming: read the training file sentence by sentence instead of holding it in memory.
        workers: processes that prepare batches; 0 prepares them in the training process.
        embed_dim, hidden_size, latent_dim: sizes of the word embeddings, the LSTM states and z.
        num_layers: LSTM layers of the encoder and of the decoder each.
        word_dropout: probability that the decoder sees <unk> instead of a word. dropout: of the states.
        layer_dropout: of the states between layers. variational_dropout: drop alike at all steps of a sentence.
        tie_weights: the output layer uses the decoder's embedding (embed_dim must equal hidden_size).
        share_embedding: encoder and decoder use the same embedding.
        batch_size: sentences a step. max_tokens: tokens a step instead of a fixed batch_size; 0 means unused.
        epochs: passes over the data. max_minutes: stop after this long; 0 means no limit.
        lr, lr_schedule: Adam's learning rate and its course over the run. clip: largest gradient norm.
        kl_schedule, kl_weight, kl_start, kl_steps: the weight of the KL term goes from kl_start to kl_weight
            in kl_steps optimizer steps (a cycle for "cyclical"); 0 steps means a third of the run.
        free_bits: nats of KL of each latent dimension, on average over a batch, that cost nothing.
        patience: stop after this many epochs without a better validation -ELBO; 0 never stops early.
        seed, precision, accelerator, devices: as in Lightning; devices > 1 trains by DDP.
        log_every: steps between two rows of metrics. checkpoint_every: steps between two checkpoints in an
            epoch.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    data: str
    valid: str | None = None
    out: str = "run"
    vocab_size: int = 10_000
    min_count: int = 1
    max_length: int = 0
    streaming: bool = False
    workers: int = 0
    embed_dim: int = 256
    hidden_size: int = 256
    latent_dim: int = 32
    num_layers: int = 1
    word_dropout: float = 0.0
    dropout: float = 0.0
    layer_dropout: float = 0.0
    variational_dropout: bool = False
    tie_weights: bool = False
    share_embedding: bool = False
    batch_size: int = 32
    max_tokens: int = 0
    epochs: int = 10
    max_minutes: float = 0.0
    lr: float = 1e-3
    lr_schedule: str = "constant"
    clip: float = 5.0
    kl_schedule: str = "linear"
    kl_weight: float = 1.0
    kl_start: float = 0.0
    kl_steps: int = 0
    free_bits: float = 0.0
    patience: int = 0
    seed: int = 0
    precision: str = "32"
    accelerator: str = "auto"
    devices: int = 1
    log_every: int = 50
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        for smallest, names in _AT_LEAST.items():
            for name in names.split():
                if not getattr(self, name) >= smallest:  # not <, which lets NaN pass
                    raise ValueError(f"{name} must be at least {smallest}, got {getattr(self, name)}")
        for name in ("word_dropout", "dropout", "layer_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        choices = {"kl_schedule": KL_SCHEDULES, "lr_schedule": LR_SCHEDULES, "precision": PRECISIONS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.tie_weights and self.embed_dim != self.hidden_size:
            raise ValueError(
                f"tie_weights needs embed_dim equal to hidden_size, got {self.embed_dim} and {self.hidden_size}"
            )
        if self.streaming and self.valid is None:
            raise ValueError("streaming needs a validation file: give valid (--valid FILE)")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> TrainConfig:
        """Build a config from a mapping and check names and types.

        Raises:
            ValueError: an unknown name (the closest known one is suggested), a wrong type, or no `data`.
        """
        checked = {name: _typed(name, value) for name, value in settings.items()}
        if checked.get("data") is None:
            raise ValueError("data is missing: give the name of a corpus or the path of a text file (--data)")
        return cls(**checked)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain types."""
        return asdict(self)


_TYPES = typing.get_type_hints(TrainConfig)
NAMES = tuple(field.name for field in fields(TrainConfig))


def setting_type(name: str) -> type:
    """Return the plain type (str, int, float or bool) of a setting."""
    annotation = _TYPES[name]
    if isinstance(annotation, types.UnionType):
        return next(part for part in annotation.__args__ if part is not types.NoneType)
    return annotation


def _typed(name: str, value: Any) -> Any:
    if name not in _TYPES:
        close = difflib.get_close_matches(str(name), NAMES, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known settings: {', '.join(NAMES)}"
        raise ValueError(f"unknown setting {str(name)!r}{hint}")
    expected = setting_type(name)
    if value is None and isinstance(_TYPES[name], types.UnionType):
        return None
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if name == "precision" and value in (16, 32):
        value = str(value)
    if type(value) is not expected:
        raise ValueError(f"{name} must be {expected.__name__}, got {value!r} ({type(value).__name__})")
    return value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read settings from a YAML file, without filling in defaults.

    Args:
        path: a YAML mapping from setting names to values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, not a mapping, an unknown name or a wrong type; the message names the file.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no settings file at {path}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold `name: value` lines, got a {type(settings).__name__}")
    try:
        return {name: _typed(name, value) for name, value in settings.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_yaml(config: TrainConfig, path: str | Path) -> None:
    """Write a config as YAML, atomically."""
    import yaml

    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    replace_atomically(path, lambda file: file.write(text.encode()))
