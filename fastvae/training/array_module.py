"""The Lightning module that trains models of vectors and images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvae.data import Scaling
from fastvae.training.array_models import build_array_model, model_input, model_settings, row_kind
from fastvae.training.config import ArrayConfig
from fastvae.training.module import RunModule, row_sums

_TERMS = {"vae": ("neg_elbo", "nll", "kl"), "iwae": ("iw_nll", "neg_elbo", "nll", "kl")}
_WATCHED = {
    "vae": ("reconstruction NLL", "KL"),
    "iwae": ("reconstruction NLL", "KL", "importance-weighted bound"),
}


class ArrayModule(RunModule):
    """Training and validation of a `VAE`, an `IWAE` or an auto-encoder.

    Logged are neg_elbo, nll and kl; of an IWAE also iw_nll, minus its bound; of an auto-encoder its error alone.

    Args:
        config: settings of the run.
        scaling: of the rows, which come scaled.
        rows: how many there are to train on.
    """

    seconds_a_line = 2.0  # an epoch of few small images takes a fraction of it

    def __init__(self, config: ArrayConfig, scaling: Scaling, rows: int) -> None:
        self.terms = self.on_bar = _TERMS.get(config.model, ("error",))
        self.watched = _WATCHED.get(config.model, ("reconstruction error",))
        self.width = len(self.watched) + 1
        self.unit = ("image", "images") if scaling.is_image else ("row", "rows")
        self.settings = model_settings(config, scaling)
        super().__init__(build_array_model(self.settings), config)
        self.rows = rows
        self._scaling = scaling

    def losses(self, batch: Tensor, kl_weight: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the loss and the sums of nll and kl (and the bound), or of the error, and of the rows."""
        model: Any = self.model
        x = model_input(model, batch)
        name = self.config.model
        if name == "linear_autoencoder":
            output = model(x)
        elif name == "denoising_autoencoder":
            output = model(x, generator=generator)
        else:
            output = model(x, kl_weight=kl_weight, generator=generator)
            bound = (output.loss.expand(len(x)),) if name == "iwae" else ()
            return output.loss, row_sums(output.nll, output.kl, *bound)
        return output.loss, row_sums(output.error)

    def latent_means(self, batch: Tensor) -> Tensor | None:
        """Return the means of q(z|x) where there is one."""
        model: Any = self.model
        means: Tensor | None = model.encode(model_input(model, batch))[0] if self.config.model in _TERMS else None
        return means

    def averages(self, sums: Tensor) -> dict[str, float]:
        """Turn the sums into nats a row."""
        *terms, rows = sums.tolist()
        means = [term / max(rows, 1.0) for term in terms]
        if len(means) == 1:
            return {"error": means[0]}
        nll, kl, *bound = means
        return dict(zip(self.terms, (*bound, nll + kl, nll, kl), strict=True))

    def progress(self, batch: Tensor) -> int:
        """Count the rows."""
        return len(batch)

    def describe(self) -> str:
        """Say how many rows there are, of what size and how they are scaled."""
        return f"{self.rows:,} {row_kind(self._scaling)} {self._scaling}"

    def settings_of_model(self) -> dict[str, Any]:
        """Return what `build_array_model` needs."""
        return self.settings
