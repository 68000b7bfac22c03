"""The Lightning modules that train: what all runs share, and a sentence VAE's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from fastvae.models import SentenceVAE, SentenceVAEOutput
from fastvae.training.config import KLConfig, RunConfig, TextConfig, TrainConfig
from fastvae.training.metrics import ACTIVE_VARIANCE, RunningMoments, mutual_information, perplexity
from fastvae.training.schedules import Schedule, make_schedule

if TYPE_CHECKING:
    from fastvae.data import TextBatch, Vocabulary
    from fastvae.training.datamodule import TextDataModule

_VALIDATION_SEED = 0x5EED  # the validation -ELBO of two epochs differs by the weights alone
_OF_SENTENCE_VAE = (
    *("encoder", "decoder", "embed_dim", "hidden_size", "latent_dim", "num_layers", "encoder_layers", "num_heads"),
    *("feedforward_size", "positions", "word_dropout", "dropout", "layer_dropout", "embedding_dropout"),
    *("variational_dropout", "tie_weights", "share_embedding", "batch_norm", "bag_of_words", "encoder_noise_level"),
    "regularizer",
)
_ENCODER_STEPS = 10  # of aggressive training between two looks at the loss
_INFORMATION_SENTENCES = 2048  # whose I(z;x) tells when to end it
_CHECK_EVERY = 50  # steps between two looks at the losses where a look stalls the device


class NonFiniteLossError(FloatingPointError):
    """A term of the loss became NaN or infinite; the message names the term and the step."""


def kl_schedule(config: KLConfig, total_steps: int) -> Schedule:
    """Build the schedule of the KL weight from a run's settings.

    Args:
        config: uses kl_schedule, kl_start, kl_weight and kl_steps.
        total_steps: optimizer steps of the run, a third of which stands for kl_steps = 0.
    """
    if config.kl_schedule == "constant":
        return make_schedule("constant", weight=config.kl_weight)
    steps = config.kl_steps or max(1, total_steps // 3)
    if config.kl_schedule == "linear":
        return make_schedule("linear", start=config.kl_start, end=config.kl_weight, steps=steps)
    if config.kl_schedule == "cyclical":
        return make_schedule("cyclical", period=steps, start=config.kl_start, end=config.kl_weight)
    # Bowman et al.'s k = 0.0025, x0 = 2500, rescaled to run from 0.002 to 0.998 in `steps`
    sigmoid = make_schedule("logistic", k=12.5 / steps, x0=steps / 2)
    return lambda step: config.kl_weight * sigmoid(step)


class RunModule(LightningModule):
    """Training and validation of a model, whose `losses` a subclass defines.

    Everything logged is in nats and never annealed; the weight of a KL is logged beside it. The random numbers of
    a step depend on the seed, the process and the step alone, so a resumed run draws what the uninterrupted one would
    have drawn.

    Args:
        model: the model to train.
        config: settings of the run.

    Raises (from training):
        NonFiniteLossError: a term of the loss is NaN or infinite.

    Attributes:
        terms: names of what is logged; the first is what the best checkpoint has least of.
        watched: names of the first few of the sums: those that must stay finite.
        width: how many sums there are.
        on_bar: those of the terms that the progress bar has room for.
        unit: what a row is called in the curves, and what the speed counts.
        seconds_a_line: least time between two lines that tell of an epoch.
    """

    terms: tuple[str, ...]
    watched: tuple[str, ...]
    width: int
    on_bar: tuple[str, ...]
    unit: tuple[str, str]
    seconds_a_line: float = 0.0

    def __init__(self, model: torch.nn.Module, config: RunConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.stop_requested = False  # set by a signal handler of this process
        self._stop_agreed = False
        self._schedule: Schedule = make_schedule("constant", weight=1.0)
        self._planned_steps: int | None = None  # of the run as it began, which a resumed one may be made longer than
        self._totals = self._no_sums()  # of this epoch, over all processes
        self._recent = self._no_sums()  # of the last `log_every` steps
        self._unchecked: list[tuple[int, Tensor]] = []
        self._validation: Tensor | None = None
        self._validation_generator: torch.Generator | None = None
        self._latents = RunningMoments()

    def losses(self, batch: Any, kl_weight: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch and its sums over it, float64 `(sums,)`: the watched terms first, the rows last.

        Args:
            batch: as the data module gives it.
            kl_weight: weight of the KL in the loss.
            generator: source of the noise; the global generator when None.
        """
        raise NotImplementedError

    def averages(self, sums: Tensor) -> dict[str, float]:
        """Turn sums over rows into the `terms`, nats a row unless they say otherwise."""
        raise NotImplementedError

    def progress(self, batch: Any) -> Tensor | int:
        """Count what the speed is told of: words, images, rows."""
        raise NotImplementedError

    def latent_means(self, batch: Any) -> Tensor | None:
        """Return the posterior means of a batch, of whose dimensions the active ones are counted; None for no count."""
        return None

    def describe(self) -> str:
        """Say in a few words what the model is trained on."""
        raise NotImplementedError

    def settings_of_model(self) -> dict[str, Any]:
        """Return plain types and tensors that `load_run` builds the model from."""
        raise NotImplementedError

    @property
    def monitor(self) -> str:
        """The metric whose least value is the best."""
        return f"valid/{self.terms[0]}"

    @property
    def may_be_best(self) -> bool:
        """Whether the weights are such as may be kept as the best: not in a phase that only prepares."""
        return True

    def _no_sums(self) -> Tensor:
        return torch.zeros(self.width, dtype=torch.float64)

    # Training

    def on_fit_start(self) -> None:
        """Learn the length of the run."""
        if isinstance(self.config, KLConfig):
            if self._planned_steps is None:
                self._planned_steps = self._total_steps()
            self._schedule = kl_schedule(self.config, self._planned_steps)

    def _total_steps(self) -> int:
        steps = self.trainer.estimated_stepping_batches
        return int(steps) if math.isfinite(steps) else -1

    @property
    def kl_weight(self) -> float:
        """The weight of the KL at the current step."""
        return self._schedule(self.global_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the random numbers of this step."""
        torch.manual_seed((self.config.seed * 1_000_003 + self.global_step) * 4_099 + self.global_rank)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the annealed loss of a batch.

        A mean over this process's rows: every process has as many of a global batch, so the mean over
        processes that DDP takes of the gradients is the mean over the global batch.
        """
        loss, figures = self.losses(batch, self.kl_weight, None)
        if self.trainer.world_size > 1:
            figures = self._share(figures)
        self._watch(figures)
        self._totals = self._totals.to(figures.device) + figures
        self._recent = self._recent.to(figures.device) + figures
        return loss

    def _share(self, figures: Tensor) -> Tensor:
        """Sum figures over processes and agree on stopping, in one message."""
        request = figures.new_tensor([float(self.stop_requested)])
        message = torch.cat([figures, request])
        torch.distributed.all_reduce(message)
        self._stop_agreed = bool(message[-1] > 0)
        return message[:-1]

    @property
    def stopping(self) -> bool:
        """Whether to stop after this step; all processes give the same answer."""
        return self._stop_agreed if self.trainer.world_size > 1 else self.stop_requested

    def _watch(self, figures: Tensor) -> None:
        self._unchecked.append((self.global_step, figures[: len(self.watched)]))
        if self.device.type == "cpu" or len(self._unchecked) >= _CHECK_EVERY:
            self.check_finite()

    def check_finite(self) -> None:
        """Look at the losses of the steps since the last look.

        Raises:
            NonFiniteLossError: one of them is NaN or infinite.
        """
        if not self._unchecked:
            return
        values = torch.stack([figures for _, figures in self._unchecked]).tolist()
        steps = [step for step, _ in self._unchecked]
        self._unchecked.clear()
        for step, terms in zip(steps, values, strict=True):
            self._check_finite(terms, step)

    def _check_finite(self, terms: list[float], step: int, where: str = "") -> None:
        for term, value in zip(self.watched, terms, strict=True):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the {term} became {value} at step {step}{where}; training stopped and the last good "
                    "checkpoint is kept. Try a smaller --lr or --clip, or --precision 32"
                )

    def write_step(self) -> None:
        """Write a row of metrics every `log_every` steps."""
        if self.global_step % self.config.log_every:
            return
        values = {f"train/{name}": value for name, value in self.averages(self._recent).items()}
        self._recent = torch.zeros_like(self._recent)
        self._write(values)

    def on_train_epoch_end(self) -> None:
        """Write the epoch's training averages."""
        values = {f"train_epoch/{name}": value for name, value in self.averages(self._totals).items()}
        self._totals = torch.zeros_like(self._totals)
        self._write(values)

    def recent(self) -> dict[str, float]:
        """Averages over the steps since the last row of metrics (waits for the device)."""
        return self.averages(self._recent if self._recent[-1] > 0 else self._totals)

    def _write(self, values: dict[str, float]) -> None:
        optimizer = self.trainer.optimizers[0]
        values = values | {"lr": optimizer.param_groups[0]["lr"], "epoch": float(self.current_epoch)}
        if isinstance(self.config, KLConfig):
            values["kl_weight"] = self.kl_weight
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=self.global_step)

    # Validation

    def on_validation_epoch_start(self) -> None:
        """Start the sums and the draws of z anew."""
        self._validation = self._no_sums().to(self.device)
        self._latents = RunningMoments()
        self._validation_generator = torch.Generator(self.device).manual_seed(_VALIDATION_SEED + self.global_rank)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add the un-annealed terms of a batch."""
        assert self._validation is not None
        self._validation += self.losses(batch, 1.0, self._validation_generator)[1]
        means = self.latent_means(batch)
        if means is not None:
            self._latents.update(means)

    def on_validation_epoch_end(self) -> None:
        """Log the validation averages over all processes, and the active units of this process's share.

        Raises:
            NonFiniteLossError: a term is NaN or infinite, before a checkpoint of such a model is written.
        """
        assert self._validation is not None
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(self._validation)
        self._check_finite(self._validation[: len(self.watched)].tolist(), self.global_step, ", in validation")
        values = {f"valid/{name}": value for name, value in self.averages(self._validation).items()}
        if self._latents.count:
            values["valid/active_units"] = float((self._latents.variance > ACTIVE_VARIANCE).sum())
        self.log_dict(values, logger=False)  # for early stopping and the choice of the best checkpoint
        self._write(values)

    # Optimizer and checkpoint

    def configure_optimizers(self) -> Any:
        """Adam, with the learning rate of `lr_schedule` after the warm-up."""
        fused = self.config.precision == "32"  # Lightning does not clip for a fused step in mixed precision
        optimizer = torch.optim.Adam(self.parameters(), lr=self.config.lr, fused=fused)
        course, warmup = self.config.lr_schedule, self.config.warmup_steps
        if course == "constant" and not warmup:
            return optimizer
        total = self._total_steps()

        def factor(step: int) -> float:
            rising, done = min((step + 1) / (warmup + 1), 1.0), min(step / total, 1.0)
            falling = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
            return rising * falling[course]

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `load_run` and a resumed run need."""
        self.check_finite()  # never overwrite a good checkpoint with a damaged one
        checkpoint["model_config"] = self.settings_of_model()
        checkpoint["train_config"] = self.config.to_dict()
        checkpoint["epoch_totals"] = torch.stack([self._totals, self._recent]).cpu()
        checkpoint["position"] = self._position()
        checkpoint["planned_steps"] = self._planned_steps

    def _position(self) -> dict[str, int]:
        """Return the epochs done, and the batches done of the one that is running."""
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        within = epochs.started > epochs.processed
        batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        batch = batches.processed if within else 0
        return {"epoch": epochs.processed, "batch": batch, "step": self.global_step}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the running sums of an interrupted epoch, and the course of the KL weight."""
        self._totals, self._recent = checkpoint["epoch_totals"].clone()
        self._planned_steps = checkpoint.get("planned_steps")


class TextModule(RunModule):
    """Training and validation of a model of sentences, whose `config` rebuilds it: `type(model)(**model.config)`."""

    unit = ("sentence", "tokens")

    @classmethod
    def build_model(cls, config: Any, data: TextDataModule) -> torch.nn.Module:
        """Build the untrained model of a run.

        Args:
            config: settings of the run.
            data: gives the vocabulary.
        """
        raise NotImplementedError

    def progress(self, batch: TextBatch) -> Tensor:
        """Count the predicted tokens."""
        return (batch.lengths - 1).sum()

    def describe(self) -> str:
        """Say how many words there are."""
        return f"{self.settings_of_model()['vocab_size']:,} words"

    def settings_of_model(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        settings: Any = self.model.config
        return dict(settings)


def shared_arguments(config: TextConfig, vocabulary: Vocabulary, names: Sequence[str]) -> dict[str, Any]:
    """Return what the settings of a run and its vocabulary say of a model's constructor arguments.

    Args:
        config: settings of the run.
        vocabulary: gives vocab_size and the indices of the special tokens.
        names: the settings that the model takes as they are.
    """
    indices = {name: getattr(vocabulary, name) for name in ("pad_index", "bos_index", "eos_index", "unk_index")}
    return {"vocab_size": len(vocabulary)} | {name: getattr(config, name) for name in names} | indices


class SentenceVAEModule(TextModule):
    """Training and validation of a `SentenceVAE`: nll, kl and neg_elbo a sentence, ppl a predicted token.

    Args:
        model: the model to train.
        config: settings of the run.
    """

    terms = ("neg_elbo", "nll", "kl", "ppl")
    watched = ("reconstruction NLL", "KL")
    width = 4  # those two, tokens and sentences
    on_bar = ("neg_elbo", "kl")
    model: SentenceVAE
    config: TrainConfig

    def __init__(self, model: SentenceVAE, config: TrainConfig) -> None:
        super().__init__(model, config)
        self.aggressive = config.aggressive_steps > 0
        self._information = -math.inf  # I(z;x) of the validation before
        self._posteriors: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def build_model(cls, config: TrainConfig, data: TextDataModule) -> SentenceVAE:
        """Build the untrained model of a run."""
        noise = None if config.encoder_noise == "none" else config.encoder_noise
        return SentenceVAE(**shared_arguments(config, data.vocabulary, _OF_SENTENCE_VAE), encoder_noise=noise)

    def losses(self, batch: TextBatch, kl_weight: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the loss and the sums of nll, kl, tokens and sentences."""
        output: SentenceVAEOutput = self.model(
            batch.tokens,
            batch.lengths,
            kl_weight=kl_weight,
            free_bits=self.config.free_bits,
            free_bits_per=self.config.free_bits_per,
            generator=generator,
        )
        return output.loss, row_sums(output.nll, output.kl, output.tokens)

    def latent_means(self, batch: TextBatch) -> Tensor:
        """Return the means of q(z|x)."""
        return self.model.encode(batch.tokens, batch.lengths)[0]

    def averages(self, sums: Tensor) -> dict[str, float]:
        """Turn the sums into nats a sentence and perplexity."""
        nll, kl, tokens, sentences = sums.tolist()
        count = max(sentences, 1.0)
        ppl = perplexity(nll + kl, tokens)
        return {"neg_elbo": (nll + kl) / count, "nll": nll / count, "kl": kl / count, "ppl": ppl}

    # Aggressive training: He et al., Lagging Inference Networks and Posterior Collapse in VAEs (2019), algorithm 1

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """Train the encoder alone first while training is aggressive, then return the loss of a batch."""
        if self.aggressive:
            self._train_encoder()
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        """Leave this step to the decoder while training is aggressive."""
        if self.aggressive:
            for parameter in self.encoder_parameters():
                parameter.grad = None

    def encoder_parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters of q(z|x) that are not the decoder's too."""
        shared = {id(parameter) for parameter in self.model.decoder.parameters()}
        both = [*self.model.encoder.parameters(), *self.model.head.parameters()]
        return [parameter for parameter in both if id(parameter) not in shared]

    def _train_encoder(self) -> None:
        """Step on random batches until the mean loss of ten of them no longer falls."""
        wrapped: Any = self.optimizers()
        optimizer = wrapped.optimizer  # whose steps Lightning does not count
        optimizer.zero_grad(set_to_none=True)
        parameters, before, recent = self.encoder_parameters(), math.inf, 0.0
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        seed = self.config.seed * 1_000_003 + self.global_step
        for step, batch in enumerate(data.random_batches(seed, self.config.aggressive_steps), 1):
            loss, _ = self.losses(batch.to(self.device), self.kl_weight, None)
            for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = grad
            torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
            optimizer.step()
            recent += float(loss.detach())
            if step % _ENCODER_STEPS == 0:
                if not recent < before:
                    break
                before, recent = recent, 0.0
        optimizer.zero_grad(set_to_none=True)

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Add the un-annealed terms of a batch, and keep its posteriors while training is aggressive."""
        super().validation_step(batch, batch_idx)
        if self.aggressive and sum(len(mean) for mean, _ in self._posteriors) < _INFORMATION_SENTENCES:
            self._posteriors.append(self.model.encode(batch.tokens, batch.lengths))

    def on_validation_epoch_end(self) -> None:
        """Log the averages, and end aggressive training where I(z;x) no longer rises."""
        super().on_validation_epoch_end()
        if self.aggressive:
            information = mutual_information(*(torch.cat(part) for part in zip(*self._posteriors, strict=True)))
            self.aggressive, self._information = information > self._information, information
            self._posteriors = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add whether training is still aggressive."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["aggressive"] = [self.aggressive, self._information]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore whether training is still aggressive."""
        super().on_load_checkpoint(checkpoint)
        self.aggressive, self._information = checkpoint.get("aggressive", [self.aggressive, self._information])


def row_sums(*terms: Tensor) -> Tensor:
    """Sum terms `(rows,)` over the rows, with the number of rows at the end: float64 `(terms + 1,)`."""
    stacked = torch.stack([term.detach().double() for term in terms])
    return torch.cat([stacked.sum(1), stacked.new_tensor([float(stacked.size(1))])])
