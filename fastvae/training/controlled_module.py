"""Runs of controlled generation: sentences with attributes, the phases of training, and what is measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastvae.data import (
    LabeledBatch,
    LabeledCorpus,
    LabeledText,
    TextCorpus,
    TokenBatchSampler,
    Vocabulary,
    collate_labeled,
    load_labeled,
)
from fastvae.models import ControlledTextVAE
from fastvae.models.evidence import evaluating
from fastvae.training.batches import ordered_batches
from fastvae.training.config import ControlledConfig
from fastvae.training.datamodule import EpochLoader, RunDataModule, TextDataModule
from fastvae.training.metrics import Evaluation, evaluate, perplexity
from fastvae.training.module import TextModule, row_sums, shared_arguments
from fastvae.training.reports import IW_SAMPLES, ReportOptions, Rows, measure_writing, sentence_rows, title_of

_OF_MODEL = (
    *("embed_dim", "hidden_size", "latent_dim", "num_layers", "word_dropout", "dropout", "layer_dropout"),
    *("variational_dropout", "tie_weights", "share_embedding", "filters", "widths", "classifier_dropout"),
)
_SUMS = ("nll", "kl", "attribute_nll", "control_nll", "latent_nll", "tokens", "known", "correct", "found", "generated")


class LabeledDataModule(TextDataModule):
    """Training and validation batches of sentences with attributes: all in pre-training, then those up to `longest`.

    Args:
        config: settings of the run.
        vocabulary: the words; built from the training sentences when None.
        start_epoch, start_batch: as in `RunDataModule`.

    Raises:
        ValueError, FileNotFoundError: as `load_labeled`; there are too few sentences for a batch.
    """

    config: ControlledConfig

    def __init__(
        self,
        config: ControlledConfig,
        vocabulary: Vocabulary | None = None,
        *,
        start_epoch: int = 0,
        start_batch: int = 0,
    ) -> None:
        RunDataModule.__init__(self, start_epoch, start_batch)
        self.config = config
        text = _with_attributes(load_labeled(config.data, "train"), config)
        short = text.up_to(config.longest) if config.longest else text
        self.attributes = text.attributes
        self.vocabulary = vocabulary or Vocabulary.build(
            short.sentences, max_size=config.vocab_size, min_count=config.min_count
        )
        longest = config.max_length + 2 if config.max_length else None  # <s> and </s> count
        self._all, self._short = (LabeledCorpus(part, self.vocabulary, longest) for part in (text, short))
        self.longest = int(self._short.lengths.max()) - 1  # words of a sentence, </s> counted
        valid = _with_attributes(load_labeled(config.data, "valid"), config)
        valid = valid.up_to(config.longest) if config.longest else valid
        self._valid = LabeledCorpus(valid, self.vocabulary)
        self.valid = TextCorpus(valid.sentences, self.vocabulary)
        assert config.pretrain_epochs is not None
        self.pretrain_epochs = config.pretrain_epochs
        self.steps(1)  # a wrong batch size is better told now than from inside the trainer

    def steps(self, epochs: int) -> int:
        """Count the steps of the first epochs."""
        pretraining = min(epochs, self.pretrain_epochs)
        return pretraining * len(self._batches(self._all)) + (epochs - pretraining) * len(self._batches(self._short))

    def _batches(self, corpus: LabeledCorpus) -> TokenBatchSampler:
        return TokenBatchSampler(corpus.lengths, **self._budget(), seed=self.config.seed)

    def epoch(self, epoch: int) -> EpochLoader:
        """Return the training batches of an epoch, from 0, less those done before the start."""
        corpus = self._all if epoch < self.pretrain_epochs else self._short
        sampler = self._batches(corpus)
        sampler.set_epoch(epoch)
        loader: DataLoader[Any] = DataLoader(
            corpus,
            batch_sampler=sampler,
            collate_fn=collate_labeled,
            num_workers=self.config.workers,
            generator=torch.Generator().manual_seed(self.config.seed),
        )
        return EpochLoader(loader, self.skipped(epoch))

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation batches: every sentence once, over all processes."""
        return ordered_batches(self._valid, self.config.batch_size, collate_labeled)


def _with_attributes(text: LabeledText, config: ControlledConfig) -> LabeledText:
    names = [name.strip() for name in config.attributes.split(",") if name.strip()]
    return text.only(names) if names else text


class ControlledModule(TextModule):
    """Training and validation of a `ControlledTextVAE`.

    The three losses are minimised as one sum: as each has gradients for its own part of the model alone, this is a
    step of each. In pre-training there are but the wake phase and the discriminators' real sentences.

    Logged are those of a sentence VAE given the attributes; `accuracy`, how often the discriminators are right on real
    sentences; of generated ones `control_nll`, -log q_D(c|x), and `control`, how often they find what was chosen; and
    objective = neg_elbo + lambda_c * control_nll, what the decoder is trained for, less z's term.

    Args:
        model: the model to train.
        config: settings of the run.
    """

    terms = ("objective", "neg_elbo", "nll", "kl", "ppl", "accuracy", "control_nll", "control")
    watched = ("reconstruction NLL", "KL", "discriminators' NLL", "NLL of generated attributes", "NLL of generated z")
    width = len(_SUMS) + 1
    on_bar = ("neg_elbo", "kl", "control")
    model: ControlledTextVAE
    config: ControlledConfig

    def __init__(self, model: torch.nn.Module, config: ControlledConfig) -> None:
        super().__init__(model, config)
        self._sleep_start = self._steps = 0

    @classmethod
    def build_model(cls, config: ControlledConfig, data: TextDataModule) -> ControlledTextVAE:
        """Build the untrained model of a run."""
        assert isinstance(data, LabeledDataModule)
        arguments = shared_arguments(config, data.vocabulary, _OF_MODEL)
        return ControlledTextVAE(attributes=data.attributes, max_length=data.longest, **arguments)

    def on_fit_start(self) -> None:
        """Learn the length of the run."""
        super().on_fit_start()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self._sleep_start, self._steps = data.steps(data.pretrain_epochs), self._total_steps()

    def _total_steps(self) -> int:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return int(data.steps(self.config.epochs))  # its epochs differ in length

    @property
    def asleep(self) -> bool:
        """Whether the sleep phase has begun."""
        return self.global_step >= self._sleep_start

    @property
    def may_be_best(self) -> bool:
        """Whether a step of the sleep phase has been done: before, the attributes are not controlled."""
        return self.global_step > self._sleep_start

    @property
    def sleep_weight(self) -> float:
        """The share of the sleep phase's weights that counts at the current step."""
        since = self.global_step - self._sleep_start
        return min(1.0, (since + 1) / (self.config.sleep_steps + 1)) if since >= 0 else 0.0

    @property
    def temperature(self) -> float:
        """The temperature of soft sentences at the current step, on a geometric course."""
        first, last = self.config.temperature, self.config.temperature_end
        done = (self.global_step - self._sleep_start) / max(self._steps - self._sleep_start, 1)
        return float(first * (last / first) ** min(max(done, 0.0), 1.0))

    def losses(self, batch: LabeledBatch, kl_weight: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the loss and the sums named in `_SUMS`, and of the sentences."""
        model, config = self.model, self.config
        wake = model(
            batch.tokens,
            batch.lengths,
            batch.attributes,
            kl_weight=kl_weight,
            free_bits=config.free_bits,
            generator=generator,
        )
        real = model.discriminate(batch.tokens[:, 1:], batch.lengths - 1, batch.attributes)
        loss = wake.loss + real.nll.mean()
        nothing = torch.zeros_like(real.nll)
        control_nll, latent_nll, found, generated = nothing, nothing, nothing, nothing
        if self.asleep or not self.training:
            words, lengths, chosen = self._generate(len(nothing), generator)
            written = model.discriminate(words, lengths, chosen)
            found, generated = written.correct.sum(1), torch.full_like(nothing, chosen.size(1))
            control_nll = written.nll
        if self.asleep and self.training:
            z, chosen = model.draw_latent(len(nothing)), model.draw_attributes(len(nothing))
            asleep = model.sleep(z, chosen, temperature=self.temperature)
            control_nll, latent_nll = asleep
            generator_loss = config.lambda_c * control_nll + config.lambda_z * latent_nll
            discriminator_loss = config.lambda_u * (written.nll + config.entropy_weight * written.entropy)
            loss = loss + self.sleep_weight * (generator_loss + discriminator_loss).mean()
        known = (batch.attributes >= 0).sum(1)
        counts = (wake.tokens, known, real.correct.sum(1), found, generated)
        return loss, row_sums(wake.nll, wake.kl, real.nll, control_nll, latent_nll, *counts)

    def _generate(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Write n sentences from the prior; give words, lengths and the attributes chosen."""
        z = self.model.draw_latent(n, generator=generator)
        chosen = self.model.draw_attributes(n, generator=generator)
        words, lengths = self.model.decode(z, chosen, strategy="sample", generator=generator)
        return words, lengths, chosen

    def averages(self, sums: Tensor) -> dict[str, float]:
        """Turn the sums into nats a sentence, perplexity and shares; without those of sentences yet to be generated."""
        *values, sentences = sums.tolist()
        total = dict(zip(_SUMS, values, strict=True))
        count = max(sentences, 1.0)
        nll, kl = total["nll"] / count, total["kl"] / count
        figures = {
            "neg_elbo": nll + kl,
            "nll": nll,
            "kl": kl,
            "ppl": perplexity(total["nll"] + total["kl"], total["tokens"]),
            "accuracy": total["correct"] / max(total["known"], 1.0),
        }
        if total["generated"]:
            figures["control_nll"] = total["control_nll"] / total["generated"] * len(self.model.attributes)
            figures["control"] = total["found"] / total["generated"]
            figures["objective"] = figures["neg_elbo"] + self.config.lambda_c * figures["control_nll"]
        return figures


@dataclass(frozen=True, kw_only=True)
class ControlledEvaluation(Evaluation):
    """Figures of a `ControlledTextVAE`; its -ELBO is that of sentences whose attributes the discriminators drew.

    Args:
        accuracy: share of the known attributes of these sentences that the discriminators find, of each attribute.
        control: share of generated sentences in which the model's own discriminators find what was chosen, likewise.
        generated: how many were.
    """

    accuracy: dict[str, float]
    control: dict[str, float]
    generated: int


def report_controlled(
    model: ControlledTextVAE, vocabulary: Vocabulary, options: ReportOptions
) -> tuple[ControlledEvaluation, str, Rows]:
    """Measure a `ControlledTextVAE` on the sentences of a split that are as short as those that it writes.

    Arguments and result as `fastvae.training.reports.report_sentences`; the data are those of `load_labeled`.
    """
    data, seed, batch_size = options.data, options.seed, options.batch_size
    text = load_labeled(data, options.split).only(list(model.attributes)).up_to(model.max_length - 1)
    for name, values in model.attributes.items():
        if list(text.attributes[name]) != values:
            raise ValueError(f"{data}: {name} has {', '.join(text.attributes[name])}, the model {', '.join(values)}")
    batches = ordered_batches(LabeledCorpus(text, vocabulary), batch_size, collate_labeled)
    iw_samples = IW_SAMPLES if options.iw_samples is None else options.iw_samples
    figures = evaluate(model, batches, iw_samples=iw_samples, **options.source)
    right, known, found, generated = _attributes_found(model, batches, batch_size, seed)
    names = list(model.attributes)
    result = ControlledEvaluation(
        **figures.to_dict(),
        accuracy=dict(zip(names, (right / known.clamp_min(1)).tolist(), strict=True)),
        control=dict(zip(names, (found / generated).tolist(), strict=True)),
        generated=generated,
    )
    result = measure_writing(result, model, vocabulary, text.sentences, seed=seed, **options.writing)
    rows = sentence_rows(result)
    rows += [(name, f"{100 * share:.1f} %", "found in these sentences") for name, share in result.accuracy.items()]
    rows += [
        (name, f"{100 * share:.1f} %", f"found in {generated:,} generated") for name, share in result.control.items()
    ]
    return result, title_of(result), rows


@torch.no_grad()
def _attributes_found(
    model: ControlledTextVAE, batches: Iterable[LabeledBatch], batch_size: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Count, for each attribute, those found and known of real sentences, and found of 1,000 generated ones."""
    device, generated = next(model.parameters()).device, 1000
    generator = torch.Generator(device).manual_seed(seed)
    right = known = found = torch.zeros(len(model.attributes), dtype=torch.int64, device=device)
    with evaluating(model):
        for batch in batches:
            tokens, lengths, attributes = batch.to(device)
            right = right + model.discriminate(tokens[:, 1:], lengths - 1, attributes).correct.sum(0)
            known = known + (attributes >= 0).sum(0)
        for start in range(0, generated, batch_size):
            n = min(batch_size, generated - start)
            z, chosen = (draw(n, generator=generator) for draw in (model.draw_latent, model.draw_attributes))
            words, lengths = model.decode(z, chosen, strategy="sample", generator=generator)
            found = found + model.discriminate(words, lengths, chosen).correct.sum(0)
    return right, known, found, generated
