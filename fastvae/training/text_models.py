"""The models of text that runs train: where the parts of each are, imported when first used."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple


class TextModel(NamedTuple):
    """Where the parts of a model of text are, each as "module:name".

    Attributes:
        model: the class, whose `config` holds its constructor's arguments.
        module: the Lightning module that trains it, a `TextModule`.
        data: the Lightning data module of its runs, a `TextDataModule`.
        report: measures it for `fastvae evaluate`, a function like `fastvae.training.reports.report_sentences`.
        lacks: options of `fastvae.training.reports.ReportOptions` that it has no use for.
        samples: text for samples.txt, a function like `fastvae.training.run.samples_text`.
    """

    model: str
    module: str
    data: str = "fastvae.training.datamodule:TextDataModule"
    report: str = "fastvae.training.reports:report_sentences"
    lacks: tuple[str, ...] = ()
    samples: str = "fastvae.training.run:samples_text"

    def get(self, part: str) -> Any:
        """Import a part."""
        module, _, name = getattr(self, part).partition(":")
        return getattr(importlib.import_module(module), name)


TEXT_MODELS = {
    "sentence_vae": TextModel("fastvae.models:SentenceVAE", "fastvae.training.module:SentenceVAEModule"),
    "mixture_vae": TextModel(
        "fastvae.models:MixtureVAE",
        "fastvae.training.mixture_module:MixtureVAEModule",
        data="fastvae.training.mixture_module:MixtureDataModule",
        report="fastvae.training.mixture_metrics:report_mixture",
        lacks=("iw_samples",),
    ),
    "dialogue": TextModel(
        "fastvae.models:DialogueModel",
        "fastvae.training.dialogue_module:DialogueModule",
        data="fastvae.training.dialogue_module:DialogueDataModule",
        report="fastvae.training.dialogue_metrics:report_dialogue",
        lacks=("iw_samples", "samples", "reverse_samples"),
        samples="fastvae.training.dialogue_metrics:answers_text",
    ),
    "controlled_vae": TextModel(
        "fastvae.models:ControlledTextVAE",
        "fastvae.training.controlled_module:ControlledModule",
        data="fastvae.training.controlled_module:LabeledDataModule",
        report="fastvae.training.controlled_module:report_controlled",
    ),
}


def text_model(settings: dict[str, Any]) -> TextModel | None:
    """Return the parts of the model that a run's settings are of, None where that is not one of text."""
    return TEXT_MODELS.get(settings.get("model") or "sentence_vae")  # which once was the only one
