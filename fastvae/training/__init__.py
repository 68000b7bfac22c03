"""Training, evaluation and runs on disk. Names are imported when first used: only `train` needs Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvae.training.array_models import ArrayModel
    from fastvae.training.checkpoint import load_run
    from fastvae.training.config import DenoisingConfig, IWAEConfig, LinearConfig, TrainConfig, VAEConfig
    from fastvae.training.datamodule import TextDataModule
    from fastvae.training.metrics import (
        ArrayEvaluation,
        AutoEncoderEvaluation,
        Evaluation,
        evaluate,
        evaluate_array,
        evaluate_autoencoder,
    )
    from fastvae.training.module import SentenceVAEModule
    from fastvae.training.run import TrainResult, train
    from fastvae.training.schedules import make_schedule

__all__ = [
    "ArrayEvaluation",
    "ArrayModel",
    "AutoEncoderEvaluation",
    "DenoisingConfig",
    "Evaluation",
    "IWAEConfig",
    "LinearConfig",
    "SentenceVAEModule",
    "TextDataModule",
    "TrainConfig",
    "TrainResult",
    "VAEConfig",
    "evaluate",
    "evaluate_array",
    "evaluate_autoencoder",
    "load_run",
    "make_schedule",
    "train",
]
_HOMES = {
    "ArrayEvaluation": "metrics",
    "ArrayModel": "array_models",
    "AutoEncoderEvaluation": "metrics",
    "DenoisingConfig": "config",
    "Evaluation": "metrics",
    "IWAEConfig": "config",
    "LinearConfig": "config",
    "SentenceVAEModule": "module",
    "TextDataModule": "datamodule",
    "TrainConfig": "config",
    "TrainResult": "run",
    "VAEConfig": "config",
    "evaluate": "metrics",
    "evaluate_array": "metrics",
    "evaluate_autoencoder": "metrics",
    "load_run": "checkpoint",
    "make_schedule": "schedules",
    "train": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
