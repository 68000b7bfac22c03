"""A small language and settings that train on it in about a second."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvae.training.config import TrainConfig

SUBJECTS = ["anna", "ben", "clara", "david"]
VERBS = ["likes", "sees", "calls"]
OBJECTS = ["jazz", "music", "lunch", "rain", "the old harbour"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    draw = random.Random(0)
    return [
        f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} {draw.choice(OBJECTS)}" + " again" * draw.randint(0, 2)
        for _ in range(160)
    ]


@pytest.fixture
def text_file(tmp_path: Path, sentences: list[str]) -> Path:
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(sentences) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def settings(tmp_path: Path, text_file: Path) -> Callable[..., TrainConfig]:
    def make(**changes: Any) -> TrainConfig:
        small: dict[str, Any] = {
            "data": str(text_file),
            "out": str(tmp_path / "run"),
            "embed_dim": 12,
            "hidden_size": 16,
            "latent_dim": 4,
            "batch_size": 16,
            "epochs": 2,
            "lr": 1e-2,
            "log_every": 3,
            "accelerator": "cpu",
        }
        return TrainConfig(**(small | changes))

    return make
