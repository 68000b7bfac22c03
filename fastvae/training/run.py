"""`train`: from settings to a run's folder with checkpoints, metrics, curves, and samples or pictures."""

from __future__ import annotations

import importlib.util
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fastvae.data import Scaling, Vocabulary
from fastvae.models.pretrained import DESCRIPTION, TENSORS
from fastvae.training.array_models import ArrayModel
from fastvae.training.array_module import ArrayModule
from fastvae.training.callbacks import (
    LABELS,
    AtomicCheckpointIO,
    Interrupted,
    Patience,
    RunCheckpoints,
    StepMetrics,
    TimeLimit,
    TrainingProgress,
)
from fastvae.training.checkpoint import checkpoint_path, load_run, read_checkpoint, replace_atomically
from fastvae.training.config import ArrayConfig, RunConfig, TextConfig, TrainConfig, write_yaml
from fastvae.training.curves import plot_curves
from fastvae.training.datamodule import ArrayDataModule, TextDataModule
from fastvae.training.metrics_file import MetricsFile, read_metrics
from fastvae.training.module import RunModule
from fastvae.training.pictures import PICTURES, draw_pictures
from fastvae.training.text import reconstruct_sentences, sample_sentences
from fastvae.training.text_models import TEXT_MODELS

# What a resumed run may set anew; all else is fixed by the checkpoint or by the position in the data.
_CHANGEABLE = frozenset(
    (
        "out",
        "epochs",
        "max_minutes",
        "patience",
        "workers",
        "precision",
        "accelerator",
        "devices",
        "log_every",
        "checkpoint_every",
    )
)
# What an earlier run, which is overwritten, has left.
_OF_A_RUN = (
    *("checkpoints/last.ckpt", "checkpoints/best.ckpt", "metrics.csv", TENSORS, DESCRIPTION, "vocabulary.txt"),
    *("samples.txt", "evaluation_*.json", "tensorboard/events.*", "codes.html", "map.png", "codes.png"),
    *("curves.png", *(f"{name}.png" for name in PICTURES)),
)
TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
_QUIET = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Args:
        folder: the run's folder.
        steps: optimizer steps done, earlier parts of a resumed run included.
        best: lowest validation -ELBO, nats a sentence or row, or whatever the model is chosen by; infinite before the
            first validation.
        interrupted: the run was stopped by Ctrl-C and can be resumed.
        seconds: time spent training in this call.
        measure: what `best` is: "-ELBO", "IW-NLL" or "error". unit: "sentence", "image" or "row".
        is_main: this is the process that writes files and prints (the only one, unless devices > 1).
    """

    folder: Path
    steps: int
    best: float
    interrupted: bool
    seconds: float
    measure: str
    unit: str
    is_main: bool

    @property
    def best_neg_elbo(self) -> float:
        """The lowest validation -ELBO, of a sentence VAE or a VAE."""
        return self.best


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    vocabulary: Vocabulary | None = None,
    floor: float | None = None,
) -> TrainResult:
    """Train a model and keep everything about it in the folder `config.out`.

    The folder then holds config.yaml, checkpoints/last.ckpt and best.ckpt, the best model as model.safetensors and
    model.json for `from_pretrained`, metrics.csv, curves.png and, where TensorBoard is installed, tensorboard/; of a
    model of text also vocabulary.txt and samples.txt, of other models pictures.

    Args:
        config: the settings.
        resume: continue the run in the folder from checkpoints/last.ckpt, as if it had never stopped.
        overwrite: start anew in a folder that holds a run.
        vocabulary: words of a model of text; when None, built from the training text, or read from the run that is
            resumed.
        floor: entropy of the data in nats a sentence, drawn in the curves.

    Returns:
        How it ended. Ctrl-C ends it cleanly after saving; a second Ctrl-C raises KeyboardInterrupt.

    Raises:
        FileExistsError: the folder holds a run, and neither `resume` nor `overwrite` is set.
        FileNotFoundError, ValueError: nothing to resume, settings that do not fit the run, missing or
            unusable data.
        NonFiniteLossError: the loss became NaN or infinite.
        OSError: a file could not be written.
    """
    folder = Path(config.out)
    checkpoint = _checkpoint_to_resume(config) if resume else None
    position = checkpoint["position"] if checkpoint else {"epoch": 0, "batch": 0, "step": 0}
    where = {"start_epoch": position["epoch"], "start_batch": position["batch"]}
    data: TextDataModule | ArrayDataModule
    if isinstance(config, TextConfig):
        words = Vocabulary.load(folder / "vocabulary.txt") if resume else vocabulary
        data = TEXT_MODELS[config.model].get("data")(config, words, **where)
    else:
        assert isinstance(config, ArrayConfig)
        scaling = Scaling(**checkpoint["model_config"]["scaling"]) if checkpoint else None
        data = ArrayDataModule(config, scaling, **where)
    torch.manual_seed(config.seed)
    module = build_module(config, data)
    checkpoints = RunCheckpoints(folder / "checkpoints", config.checkpoint_every)
    start = time.monotonic()
    interrupted = False
    with _quiet_lightning(), _matmul_precision(config.matmul_precision):
        trainer = _trainer(config, module, checkpoints, position["step"] if resume else None)
        if trainer.is_global_zero:  # nothing is written, and no older run deleted, until all is accepted
            _prepare_folder(folder, fresh=not resume, overwrite=overwrite)
            write_yaml(config, folder / "config.yaml")
            if not resume and isinstance(data, TextDataModule):
                data.vocabulary.save(folder / "vocabulary.txt")
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoints.last if resume else None)
        except Interrupted:
            interrupted = True
        except SystemExit as error:  # what Lightning makes of a KeyboardInterrupt
            raise KeyboardInterrupt from error
        finally:
            checkpoints.release()
    seconds = time.monotonic() - start
    if trainer.is_global_zero:
        _summarize(folder, module, data, floor=floor, seed=config.seed)
        _show_in_tensorboard(trainer, folder, module.global_step)
    return TrainResult(
        folder,
        module.global_step,
        checkpoints.best_value,
        interrupted,
        seconds,
        LABELS[module.terms[0]],
        module.unit[0],
        trainer.is_global_zero,
    )


def build_module(config: RunConfig, data: TextDataModule | ArrayDataModule) -> RunModule:
    """Build the untrained model of a run in the module that trains it."""
    if isinstance(data, ArrayDataModule):
        return ArrayModule(data.config, data.scaling, len(data.train))
    module = TEXT_MODELS[config.model].get("module")
    return module(module.build_model(config, data), config)


def _checkpoint_to_resume(config: RunConfig) -> dict[str, Any]:
    checkpoint = read_checkpoint(checkpoint_path(config.out, "last"))
    before, now = checkpoint["train_config"], config.to_dict()
    model = before.get("model") or TrainConfig.model  # which once was the only one
    if model != now["model"]:
        raise ValueError(f"{config.out} holds a run of {model}, which cannot go on as {now['model']}")
    # Settings younger than the run were what is their default now.
    known = {name: before[name] for name in now if name in before}
    before = type(config).from_mapping(known | {"model": model}).to_dict()
    for name, value in now.items():
        if name not in _CHANGEABLE and before[name] != value:
            raise ValueError(
                f"{name} cannot change when a run is resumed: it was {before[name]!r}, got {value!r}; "
                f"these can: {', '.join(sorted(_CHANGEABLE - {'out'}))}"
            )
    if checkpoint["position"]["epoch"] >= config.epochs:
        raise ValueError(f"{config.out} has been trained for all of its {config.epochs} epochs: give more (--epochs)")
    return checkpoint


def _prepare_folder(folder: Path, *, fresh: bool, overwrite: bool) -> None:
    last = folder / "checkpoints" / "last.ckpt"
    if fresh and last.exists() and not overwrite:
        raise FileExistsError(
            f"{folder} already holds a run: continue it with --resume, or choose another folder with --out"
        )
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    if fresh:
        for pattern in _OF_A_RUN:
            for path in folder.glob(pattern):
                path.unlink()


def _trainer(config: RunConfig, module: RunModule, checkpoints: RunCheckpoints, resume_step: int | None) -> Trainer:
    folder = Path(config.out)
    callbacks: list[Callback] = [TrainingProgress(), StepMetrics(), checkpoints]
    if config.max_minutes:
        callbacks.append(TimeLimit(config.max_minutes))
    if config.patience:
        callbacks.append(Patience(module.monitor, patience=config.patience, mode="min"))
    loggers: list[Logger] = [MetricsFile(folder / "metrics.csv", resume_step, module.terms)]
    if TENSORBOARD:
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))
    try:
        return Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            strategy="ddp" if config.devices > 1 else "auto",
            precision=config.precision,  # type: ignore[arg-type]
            max_epochs=config.epochs,
            gradient_clip_val=config.clip,
            callbacks=callbacks,
            logger=loggers,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the batches are shared out already
            reload_dataloaders_every_n_epochs=1,
        )
    except MisconfigurationException as error:  # a device or a precision this machine has not
        wanted = f"accelerator {config.accelerator!r}, precision {config.precision!r}"
        raise ValueError(f"{wanted}: {' '.join(str(error).split())}") from error


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's tips, device lists and worry about worker processes off the screen."""
    loggers = [logging.getLogger(name) for name in _QUIET]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _summarize(
    folder: Path, module: RunModule, data: TextDataModule | ArrayDataModule, *, floor: float | None, seed: int
) -> None:
    metrics = folder / "metrics.csv"
    rows = read_metrics(metrics) if metrics.is_file() else []
    if rows:
        plot_curves(rows, folder / "curves.png", terms=module.terms, unit=module.unit[0], floor=floor)
    if not (folder / "checkpoints" / "best.ckpt").is_file():
        return  # stopped before the first validation
    model, known, _ = load_run(folder)
    if isinstance(data, ArrayDataModule):
        draw_pictures(ArrayModel(model, known), data.train, data.valid, folder, seed=seed)
        return
    write = TEXT_MODELS[module.config.model].get("samples")
    text = write(model, known, [data.valid[i] for i in range(min(10, len(data.valid)))], seed=seed)
    replace_atomically(folder / "samples.txt", lambda file: file.write(text.encode()))


def _show_in_tensorboard(trainer: Trainer, folder: Path, step: int) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            from matplotlib.image import imread

            for name in ("curves", *PICTURES):
                if (folder / f"{name}.png").is_file():
                    logger.experiment.add_image(name, imread(folder / f"{name}.png"), step, dataformats="HWC")
            logger.experiment.flush()


def samples_text(model: Any, vocabulary: Vocabulary, sentences: list[torch.Tensor], *, seed: int = 0) -> str:
    """Return samples from the prior and reconstructions of sentences, as readable text.

    Args:
        model: in evaluation mode; with `sample` and `reconstruct`, as a `SentenceVAE`.
        vocabulary: of the model.
        sentences: 1-D int64 tensors.
        seed: of the samples.
    """
    lines = ["Samples from the prior:"]
    lines += [f"  {sentence}" for sentence in sample_sentences(model, vocabulary, 20, seed=seed)]
    originals = [vocabulary.decode(sentence) for sentence in sentences]
    lines += ["", "Validation sentences and their reconstructions from the mean of z:"]
    for original, copy in zip(originals, reconstruct_sentences(model, vocabulary, originals), strict=True):
        lines += [f"  {original}", f"    -> {copy}"]
    return "\n".join(lines) + "\n"
