"""The Lightning module that trains a `MixtureVAE`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastvae.data import TextCorpus, Vocabulary
from fastvae.data.labeled import LabeledCorpus, collate_labeled, load_labeled
from fastvae.models import MixtureVAE
from fastvae.models.mixture_vae import KINDS
from fastvae.training.batches import ordered_batches
from fastvae.training.config import MixtureConfig
from fastvae.training.datamodule import RunDataModule, TextDataModule
from fastvae.training.metrics import perplexity
from fastvae.training.mixture_metrics import code_entropy
from fastvae.training.module import TextModule, shared_arguments

if TYPE_CHECKING:
    from fastvae.data import TextBatch
    from fastvae.data.labeled import LabeledBatch

_SETTINGS = (
    *("variables", "components", "latent_dim", "beta", "mutual_information_weight", "num_samples", "temperature"),
    *("embed_dim", "hidden_size", "num_layers", "word_dropout", "dropout", "tie_weights", "share_embedding"),
)


class MixtureDataModule(TextDataModule):
    """Training and validation batches of sentences, with their attributes where these teach the codes.

    Args:
        config: settings of the run.
        vocabulary, start_epoch, start_batch: as in `TextDataModule`.

    Raises:
        ValueError, FileNotFoundError: as `TextDataModule` and `load_labeled`; an attribute has more values than a code.
    """

    config: MixtureConfig

    def __init__(self, config: MixtureConfig, vocabulary: Vocabulary | None = None, **where: int) -> None:
        names = [name.strip() for name in config.supervision.split(",") if name.strip()]
        if not names:
            super().__init__(config, vocabulary, **where)
            self._valid = self.valid
            return
        RunDataModule.__init__(self, **where)
        self.config = config
        train, valid = (load_labeled(config.data, split).only(names) for split in ("train", "valid"))
        if len(names) > config.variables:
            raise ValueError(f"supervision: expected at most {config.variables} attributes, got {config.supervision}")
        components = KINDS[config.kind].get("components", config.components)
        for name, values in train.attributes.items():
            if len(values) > components:
                most = f"a code of {config.kind} has {components}"
                raise ValueError(f"supervision: {name} has {len(values)} values, and {most}")
        self.vocabulary = vocabulary or Vocabulary.build(
            train.sentences, max_size=config.vocab_size, min_count=config.min_count
        )
        longest = config.max_length + 2 if config.max_length else None  # <s> and </s> count
        self.collate = collate_labeled
        self._train = LabeledCorpus(train, self.vocabulary, longest)
        self._valid = LabeledCorpus(valid, self.vocabulary)
        self.valid = TextCorpus(valid.sentences, self.vocabulary)
        self._sampler()

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation batches: every sentence once, over all processes."""
        return ordered_batches(self._valid, self.config.batch_size, self.collate)


class MixtureVAEModule(TextModule):
    """Training and validation of a `MixtureVAE`.

    The best checkpoint has the least of the objective, -ELBO - beta L_d - mutual_information_weight I(c;x): the -ELBO
    alone is least before the modes part. I(c;x) is that of all sentences that the sums are of, not of a batch.

    Args:
        model: the model to train.
        config: settings of the run.
    """

    terms = ("objective", "neg_elbo", "nll", "kl", "dispersion", "mutual_information", "ppl")
    watched = ("reconstruction NLL", "KL")
    on_bar = ("neg_elbo", "kl", "mutual_information")
    model: MixtureVAE
    config: MixtureConfig

    @classmethod
    def build_model(cls, config: MixtureConfig, data: TextDataModule) -> MixtureVAE:
        """Build the untrained model of a run."""
        return MixtureVAE.of_kind(config.kind, **shared_arguments(config, data.vocabulary, _SETTINGS))

    @property
    def width(self) -> int:  # type: ignore[override]
        """Sums of nll, kl, dispersion, log q(c|x) under q, tokens, q(c|x) of each code's value, and sentences."""
        return 6 + self.model.variables * self.model.components

    def losses(
        self, batch: TextBatch | LabeledBatch, kl_weight: float, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the sums."""
        output = self.model(
            batch.tokens,
            batch.lengths,
            labels=getattr(batch, "attributes", None),
            supervision_weight=self.config.supervision_weight,
            kl_weight=kl_weight,
            generator=generator,
        )
        with torch.no_grad():
            log_q = output.logits.double().log_softmax(-1)
            q = log_q.exp()
            terms = (output.nll, output.kl, output.dispersion, (q * log_q).sum((1, 2)), output.tokens)
            sums = torch.stack([term.double().sum() for term in terms])
            return output.loss, torch.cat([sums, q.sum(0).flatten(), sums.new_tensor([float(len(q))])])

    def averages(self, sums: Tensor) -> dict[str, float]:
        """Turn the sums into nats a sentence and perplexity."""
        count = max(float(sums[-1]), 1.0)
        mean = sums / count
        nll, kl, dispersion, log_q, tokens = mean[:5].tolist()
        codes = mean[5:-1].view(self.model.variables, self.model.components)
        information = log_q + float(code_entropy(codes).sum())
        relief = self.model.beta * dispersion + self.model.mutual_information_weight * information
        return {
            "objective": nll + kl - relief,
            "neg_elbo": nll + kl,
            "nll": nll,
            "kl": kl,
            "dispersion": dispersion,
            "mutual_information": information,
            "ppl": perplexity(nll + kl, tokens),
        }
