"""Settings for the whole suite."""

import os

import pytest
import torch

# Triton decides at import whether kernels are interpreted; without a GPU that is the only way to run them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


LONGEST = ("packaging", "training", "kernels")  # folders whose files take longest: begun first, none is waited for


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folders = {folder: place for place, folder in enumerate(LONGEST)}
    items.sort(key=lambda item: folders.get(item.path.parent.name, len(folders)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
