"""Lightning callbacks of a run: metrics, checkpoints, Ctrl-C, the time limit and the progress bar."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping

from fastvae.training.checkpoint import read_checkpoint, replace_atomically
from fastvae.training.config import KLConfig

if TYPE_CHECKING:
    from types import FrameType

    from rich.progress import Progress

LABELS = {
    "neg_elbo": "-ELBO", "iw_nll": "IW-NLL", "nll": "NLL", "kl": "KL", "ppl": "PPL", "error": "error",
    "objective": "objective", "dispersion": "L_d", "mutual_information": "I(c;x)", "policy_nll": "policy",
    "control_nll": "control NLL", "control": "control", "accuracy": "accuracy",
}  # fmt: skip


class Interrupted(Exception):  # noqa: N818 - not an error
    """Training stopped on request after saving the last checkpoint."""


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint so that the previous one survives a full disk or a crash in the middle."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, making its folder."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replace_atomically(path, lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint on the CPU; tensors and plain types only, whatever is asked."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


class RunCheckpoints(Checkpoint):
    """Keeps checkpoints/last.ckpt and checkpoints/best.ckpt (lowest of what the module monitors), and stops on Ctrl-C.

    The best model is also kept in the folder above, as `Pretrained.save_pretrained` writes it.
    `last` is written after each epoch's validation, every `every` steps, and when a stop is requested or due. The
    first Ctrl-C lets the step finish, saves and raises `Interrupted`; a second one stops at once without
    saving. A `Checkpoint` to Lightning, whose hook at the end of an epoch runs after the module's.

    Args:
        folder: where the two files go.
        every: steps between checkpoints within an epoch; 0 for none.
    """

    def __init__(self, folder: str | Path, every: int = 0) -> None:
        self.last = Path(folder) / "last.ckpt"
        self.best = Path(folder) / "best.ckpt"
        self.every = every
        self.best_value = math.inf
        self._cut = False  # the epoch, by the time limit
        self._previous_handler: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Return the lowest value so far."""
        return {"best_neg_elbo": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the lowest value."""
        self.best_value = state_dict["best_neg_elbo"]

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Listen for Ctrl-C."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only

        def request_stop(number: int, frame: FrameType | None) -> None:
            if pl_module.stop_requested:
                raise KeyboardInterrupt
            pl_module.stop_requested = True
            if trainer.is_global_zero:
                print("\nstopping after this step; press Ctrl-C again to stop without saving", file=sys.stderr)

        self._previous_handler = signal.signal(signal.SIGINT, request_stop)

    def release(self) -> None:
        """Hand Ctrl-C back, however the training ended."""
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save within an epoch where it is due."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # the end of the epoch saves, after its validation
        if pl_module.stopping:
            trainer.save_checkpoint(self.last)
            raise Interrupted
        if trainer.should_stop:  # what comes is a validation; a resumed run goes on from here
            self._cut = True
            trainer.save_checkpoint(self.last)
        elif self.every and pl_module.global_step % self.every == 0:
            trainer.save_checkpoint(self.last)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the epoch, and keep it as the best where it is."""
        value = float(trainer.callback_metrics[pl_module.monitor])
        if value < self.best_value and pl_module.may_be_best:
            self.best_value = value
            trainer.save_checkpoint(self.best)
            if trainer.is_global_zero:
                pl_module.model.save_pretrained(self.best.parents[1])
        if not self._cut:
            trainer.save_checkpoint(self.last)
        elif trainer.is_global_zero:
            checkpoint = read_checkpoint(self.last)
            checkpoint["callbacks"][self.state_key] = self.state_dict()
            replace_atomically(self.last, lambda file: torch.save(checkpoint, file))
        if pl_module.stopping:
            raise Interrupted


class StepMetrics(Callback):
    """Writes rows of metrics before checkpoints are saved, which is before the module's own hook."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write a row where it is due."""
        pl_module.write_step()


class TimeLimit(Callback):
    """Ends training, after a validation, when a time has passed.

    Args:
        minutes: the limit, from the start of the (resumed) training.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ask for the end where the time is over; the first process decides for all."""
        over = time.monotonic() - self._start > self.seconds
        if trainer.strategy.broadcast(over):
            trainer.should_stop = True


class Patience(EarlyStopping):
    """Stops a run that no longer gets better, from the first epoch on whose weights may be kept as the best."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore how long nothing got better; the patience is that of the resumed run."""
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Look at the last validation where checks are made at the end of an epoch."""
        if pl_module.may_be_best:
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Look at this validation where checks are made after each."""
        if pl_module.may_be_best:
            super().on_validation_end(trainer, pl_module)


class TrainingProgress(Callback):
    """A rich progress bar with the speed, the loss, active units and the time left, and lines of epochs that stay.

    The active units are those of the last validation. The time left is that of the whole run, whose pace is that since
    its start, validations included.

    Args:
        refresh: seconds between two updates, each of which waits for the device.
    """

    def __init__(self, refresh: float = 0.25) -> None:
        self.refresh = refresh
        self._progress: Progress | None = None
        self._task: Any = None
        self._done: torch.Tensor | int = 0
        self._shown = self._validated = 0.0
        self._figures = ""
        self._told = -math.inf
        self._steps = -1  # of the whole run, -1 where they are unknown
        self._first_step, self._start = 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Open the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        if not trainer.is_global_zero:
            return
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._progress.start()
        steps = trainer.estimated_stepping_batches
        self._steps = int(steps) if math.isfinite(steps) else -1
        self._first_step, self._start = trainer.global_step, time.monotonic()
        self._done, self._shown = 0, self._start
        parameters = sum(parameter.numel() for parameter in pl_module.parameters())
        where = f"on {pl_module.device} x {trainer.world_size}"
        self._print(f"{parameters:,} parameters, {pl_module.describe()}, {where}")

    def _print(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, highlight=False, soft_wrap=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the epoch's bar."""
        if self._progress is None:
            return
        if self._task is not None:
            self._progress.remove_task(self._task)
        batches = trainer.num_training_batches
        total = int(batches) if math.isfinite(batches) else None
        self._task = self._progress.add_task("", total=total, epoch=trainer.current_epoch + 1, figures=self._figures)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Advance the bar."""
        if self._progress is None or self._progress.disable:
            return
        if self._task is None:  # resumed within an epoch
            self.on_train_epoch_start(trainer, pl_module)
        self._done = self._done + pl_module.progress(batch)
        now = time.monotonic()
        if now - self._shown < self.refresh:
            return
        speed = int(self._done) * trainer.world_size / (now - self._shown)
        recent = pl_module.recent()
        terms = "  ".join(f"{LABELS[name]} {recent[name]:.2f}" for name in pl_module.on_bar if name in recent)
        self._figures = f"{speed:,.0f} {pl_module.unit[1]}/s  {terms}{self._active(trainer)}{self._left(trainer, now)}"
        self._progress.update(self._task, completed=batch_idx + 1, figures=self._figures)
        self._done, self._shown = 0, now

    def _active(self, trainer: Trainer) -> str:
        units = trainer.callback_metrics.get("valid/active_units")
        return "" if units is None else f"  active {int(units)}"

    def _left(self, trainer: Trainer, now: float) -> str:
        """Tell the time that the steps left take at the pace so far, or that the time limit leaves."""
        done = trainer.global_step - self._first_step
        left = math.inf
        if self._steps >= 0 and done:
            left = (now - self._start) / done * (self._steps - trainer.global_step)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, TimeLimit):
                left = min(left, max(0.0, callback.seconds - (now - self._start)))
        return "" if math.isinf(left) else f"  {timedelta(seconds=round(left))} left"

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop the clock that the speed is told by."""
        self._validated = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print the epoch's line."""
        if self._progress is None or trainer.sanity_checking:
            return
        number, now = trainer.current_epoch + 1, time.monotonic()
        self._shown += now - self._validated
        if now - self._told < pl_module.seconds_a_line and number != trainer.max_epochs:
            return
        self._told = now
        values = {name: float(trainer.callback_metrics[f"valid/{name}"]) for name in pl_module.terms}
        figures = "  ".join(f"{LABELS[name]} {value:.{2 if name == 'ppl' else 3}f}" for name, value in values.items())
        figures += self._active(trainer)
        weight = f"  (KL weight {pl_module.kl_weight:.2f})" if isinstance(pl_module.config, KLConfig) else ""
        self._print(f"epoch {number:>3}  step {trainer.global_step:>6}  valid  {figures}{weight}")

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the bar, which gives the terminal its cursor back."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Close the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._task = None
