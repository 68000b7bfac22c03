"""The layer that turns a hidden vector into a sampled latent and its KL divergence."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastvae.functional import gaussian_sample_kl


class GaussianPosterior(NamedTuple):
    """What `GaussianHead` returns.

    Attributes:
        z: the sample, `(..., latent)`, or `(num_samples, ..., latent)`.
        kl: KL(q(z|x) || N(0, I)) in nats, float32, `(...)`; `(..., latent)` with `reduction="none"`.
        mean: the mean of q, `(..., latent)`.
        log_var: the log-variance of q, `(..., latent)`.
    """

    z: Tensor
    kl: Tensor
    mean: Tensor
    log_var: Tensor


class GaussianHead(nn.Module):
    """Diagonal Gaussian posterior: one linear layer, then sampling and KL in one fused pass.

    Both are computed in the parameters' dtype, under autocast too: the product is small, and a
    log-variance kept in bfloat16 would carry its rounding error into every KL.

    Args:
        in_features: size of the incoming hidden vector.
        latent_dim: number of latent dimensions.

    Source: Kingma and Welling, Auto-Encoding Variational Bayes (2014), section 2.4 and appendix B.
    """

    def __init__(
        self,
        in_features: int,
        latent_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim: expected at least 1, got {latent_dim}")
        self.in_features = in_features
        self.latent_dim = latent_dim
        self.linear = nn.Linear(in_features, 2 * latent_dim, device=device, dtype=dtype)

    def parameters_of(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Give the posterior's parameters without sampling.

        Args:
            hidden: `(..., in_features)`.

        Returns:
            mean and log_var, each `(..., latent)`.

        Raises:
            ValueError: if the last dimension of `hidden` is not `in_features`.
        """
        if hidden.size(-1) != self.in_features:
            raise ValueError(f"hidden: expected shape (..., {self.in_features}), got {tuple(hidden.shape)}")
        with torch.autocast(hidden.device.type, enabled=False):
            mean, log_var = self.linear(hidden.to(self.linear.weight.dtype)).chunk(2, -1)
        return mean, log_var

    def forward(
        self,
        hidden: Tensor,
        *,
        num_samples: int | None = None,
        reduction: Literal["sum", "none"] = "sum",
        generator: torch.Generator | None = None,
        seed: Tensor | None = None,
    ) -> GaussianPosterior:
        """Sample z ~ q(z|x) with the reparameterization trick and give its KL against N(0, I).

        Args:
            hidden: `(..., in_features)`.
            num_samples: S, to draw z of shape `(S, ..., latent)`; None draws one, `(..., latent)`.
            reduction: "sum" sums the KL over the latent dimensions, "none" keeps them apart.
            generator: source of the noise; the global generator when None.
            seed: int64 tensor of shape (1,) that fixes the noise, in place of `generator`.

        Returns:
            z, kl (nats), mean and log_var.
        """
        mean, log_var = self.parameters_of(hidden)
        z, kl = gaussian_sample_kl(
            mean, log_var, num_samples=num_samples, reduction=reduction, generator=generator, seed=seed
        )
        return GaussianPosterior(z, kl, mean, log_var)

    def extra_repr(self) -> str:
        """List the settings for `print`."""
        return f"{self.in_features}, {self.latent_dim}"
