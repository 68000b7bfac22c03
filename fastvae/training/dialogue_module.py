"""The Lightning modules that train a `DialogueModel`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae.data import Vocabulary
from fastvae.data.dialogues import ExchangeCorpus, collate_exchanges, load_exchanges
from fastvae.models import DialogueModel, MixtureVAE
from fastvae.training.checkpoint import load_run
from fastvae.training.config import DialogueConfig
from fastvae.training.datamodule import RunDataModule, TextDataModule
from fastvae.training.metrics import perplexity
from fastvae.training.module import TextModule, row_sums

if TYPE_CHECKING:
    from fastvae.data.dialogues import ExchangeBatch

_SETTINGS = ("embed_dim", "hidden_size", "num_layers", "word_dropout", "dropout", "share_embedding")


class DialogueDataModule(TextDataModule):
    """Training and validation batches of exchanges, in the words of the VAE.

    Args:
        config: settings of the run.
        vocabulary: that of the run that is resumed; the VAE's when None.
        start_epoch, start_batch: as in `RunDataModule`.

    Raises:
        ValueError, FileNotFoundError: as `load_exchanges` and `load_run`; `vae` is no run of a mixture_vae.
    """

    config: DialogueConfig
    collate = staticmethod(collate_exchanges)

    def __init__(
        self,
        config: DialogueConfig,
        vocabulary: Vocabulary | None = None,
        *,
        start_epoch: int = 0,
        start_batch: int = 0,
    ) -> None:
        RunDataModule.__init__(self, start_epoch, start_batch)
        self.config = config
        vae, words, settings = load_run(config.vae)
        if not isinstance(vae, MixtureVAE):
            raise ValueError(
                f"vae must be the folder of a run of mixture_vae, and {config.vae} is of {settings['model']}"
            )
        self.vae, self.vocabulary = vae, vocabulary or words
        longest = config.max_length + 2 if config.max_length else None  # <s> and </s> count
        self._train, self.valid = (
            ExchangeCorpus(load_exchanges(config.data, split), self.vocabulary, most, config.context_words)
            for split, most in (("train", longest), ("valid", None))
        )
        self._sampler()


class DialogueModule(TextModule):
    """Training and validation of a `DialogueModel`: nll and policy_nll an answer, ppl a predicted token.

    Args:
        model: the model to train.
        config: settings of the run.
    """

    terms = ("objective", "nll", "policy_nll", "ppl")
    watched = ("NLL of the answer", "NLL of the policy")
    width = 4  # those two, tokens and answers
    on_bar = ("nll", "policy_nll")
    model: DialogueModel
    config: DialogueConfig

    @classmethod
    def build_model(cls, config: DialogueConfig, data: DialogueDataModule) -> DialogueModel:  # type: ignore[override]
        """Build the untrained model of a run over its VAE."""
        return DialogueModel.over(data.vae, **{name: getattr(config, name) for name in _SETTINGS})

    def losses(
        self, batch: ExchangeBatch, kl_weight: float, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the sums of nll, policy_nll, tokens and answers."""
        output = self.model(batch.tokens, batch.context, batch.lengths, batch.context_lengths, generator=generator)
        return output.loss, row_sums(output.nll, output.policy_nll, output.tokens)

    def averages(self, sums: Tensor) -> dict[str, float]:
        """Turn the sums into nats an answer and perplexity."""
        nll, policy_nll, tokens, answers = sums.tolist()
        count = max(answers, 1.0)
        ppl = perplexity(nll, tokens)
        return {
            "objective": (nll + policy_nll) / count,
            "nll": nll / count,
            "policy_nll": policy_nll / count,
            "ppl": ppl,
        }
