"""The layers that turn a hidden vector into a sampled latent and its KL divergence."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastvae.functional import (
    full_gaussian_sample_kl,
    gaussian_head,
    gaussian_kl,
    gaussian_sample_kl,
    gaussian_sample_log_ratio,
    scale_tril,
)
from fastvae.ops.backend import compute_dtype
from fastvae.ops.posterior import gaussian_log_density


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


class FullGaussianPosterior(NamedTuple):
    """What `FullGaussianHead` returns.

    Attributes:
        z: the sample, `(..., latent)`, or `(num_samples, ..., latent)`.
        kl: KL(q(z|x) || N(0, I)) in nats, float32, `(...)`.
        mean: the mean of q, `(..., latent)`.
        log_diagonal: log of the diagonal of the Cholesky factor L of q's covariance L L^T, `(..., latent)`.
        lower: L below its diagonal, row by row, `(..., latent * (latent - 1) / 2)`.
    """

    z: Tensor
    kl: Tensor
    mean: Tensor
    log_diagonal: Tensor
    lower: Tensor


class WeightedSamples(NamedTuple):
    """Samples of a posterior q(z|x) with what weighs them against the prior p(z) = N(0, I).

    Attributes:
        z: `(num_samples, ..., latent)`.
        log_ratio: log p(z) - log q(z|x), nats, float32, `(num_samples, ...)`.
        kl: KL(q(z|x) || p(z)), nats, float32, `(...)`.
    """

    z: Tensor
    log_ratio: Tensor
    kl: Tensor


class GaussianHead(nn.Module):
    """Diagonal Gaussian posterior: one linear layer, then sampling and KL in one fused pass.

    Both are computed in the parameters' dtype, under autocast too: the product is small, and a
    log-variance kept in bfloat16 would carry its rounding error into every KL.

    Args:
        in_features: size of the incoming hidden vector.
        latent_dim: number of latent dimensions.
        fused: in `forward`, compute layer, sample and KL as one op, which gives the same numbers in less time.
            The layer's weight and bias are then used as they are: hooks on `linear` are not run.

    Source: Kingma and Welling, Auto-Encoding Variational Bayes (2014), section 2.4 and appendix B.
    """

    def __init__(
        self,
        in_features: int,
        latent_dim: int,
        *,
        fused: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim: expected at least 1, got {latent_dim}")
        self.in_features = in_features
        self.latent_dim = latent_dim
        self.fused = fused
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
        mean, log_var = _in_full_precision(self.linear, hidden).chunk(2, -1)
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
        how: Any = {"num_samples": num_samples, "reduction": reduction, "generator": generator, "seed": seed}
        if self.fused:
            hidden = _checked(self.linear, hidden)
            return GaussianPosterior(*gaussian_head(hidden, self.linear.weight, self.linear.bias, **how))
        mean, log_var = self.parameters_of(hidden)
        return GaussianPosterior(*gaussian_sample_kl(mean, log_var, **how), mean, log_var)

    def weighted_samples(
        self,
        hidden: Tensor,
        num_samples: int,
        *,
        generator: torch.Generator | None = None,
        seed: Tensor | None = None,
    ) -> WeightedSamples:
        """Sample z ~ q(z|x) and give the logarithm of its importance weight, p(z) / q(z|x).

        Args:
            hidden, generator, seed: as in `forward`.
            num_samples: S, how many samples to draw.

        Returns:
            z `(S, ..., latent)`, log_ratio `(S, ...)` and kl `(...)`, in nats.
        """
        mean, log_var = self.parameters_of(hidden)
        z, log_ratio = gaussian_sample_log_ratio(mean, log_var, num_samples, generator=generator, seed=seed)
        return WeightedSamples(z, log_ratio, gaussian_kl(mean, log_var))

    def log_density(self, z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        """log q(z|x) of given latents.

        Args:
            z: `(*samples, ..., latent)`.
            mean, log_var: `(..., latent)`, from `parameters_of`.

        Returns:
            Nats, float32 (float64 for float64), `(*samples, ...)`.
        """
        dtype = compute_dtype(mean)
        return gaussian_log_density(z.to(dtype), mean.to(dtype), log_var.to(dtype))

    def extra_repr(self) -> str:
        """List the settings for `print`."""
        return f"{self.in_features}, {self.latent_dim}, fused={self.fused}"


class BatchNormGaussianHead(GaussianHead):
    """`GaussianHead` whose means are normalized over the batch, which keeps the KL from vanishing.

    In a batch the means of a dimension d have standard deviation `scale` and average shift_d, so the KL, averaged over
    the batch, is at least latent_dim * scale^2 / 2 nats, whatever the weights. In evaluation mode the running average
    of the batches takes their place, as in `nn.BatchNorm1d`.

    Args:
        in_features: size of the incoming hidden vector.
        latent_dim: number of latent dimensions.
        scale: gamma, above 0, which is not learned; shift is.

    Source: Zhu et al., A Batch Normalized Inference Network Keeps the KL Vanishing Away (2020).
    """

    def __init__(
        self,
        in_features: int,
        latent_dim: int,
        scale: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, latent_dim, device=device, dtype=dtype)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale: expected above 0, got {scale}")
        self.scale = scale
        # Of a variance below eps the bound would not hold.
        self.norm = nn.BatchNorm1d(latent_dim, eps=1e-12, affine=False, device=device, dtype=dtype)
        self.shift = nn.Parameter(torch.zeros(latent_dim, device=device, dtype=dtype))

    def parameters_of(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """As `GaussianHead.parameters_of`; in training mode the batch must have 2 rows or more."""
        mean, log_var = super().parameters_of(hidden)
        normalized: Tensor = self.norm(mean.reshape(-1, self.latent_dim)).view_as(mean)
        return self.scale * normalized + self.shift, log_var

    def extra_repr(self) -> str:
        """List the settings for `print`."""
        return f"{self.in_features}, {self.latent_dim}, scale={self.scale}"


class FullGaussianHead(nn.Module):
    """Gaussian posterior with full covariance: one linear layer, then sampling and KL in one fused pass.

    The layer gives the mean and a Cholesky factor L of the covariance, in the parameters' dtype, under autocast too.
    What lies below L's diagonal starts at 0: at first the posterior is a diagonal one.

    Args:
        in_features: size of the incoming hidden vector.
        latent_dim: number of latent dimensions D; the layer has D (D + 3) / 2 outputs.

    Source: Kingma and Welling, An Introduction to Variational Autoencoders (2019), section 2.5.1.
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
        self.linear = nn.Linear(in_features, latent_dim * (latent_dim + 3) // 2, device=device, dtype=dtype)
        with torch.no_grad():
            self.linear.weight[2 * latent_dim :].zero_()
            self.linear.bias[2 * latent_dim :].zero_()

    def parameters_of(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the posterior's parameters without sampling.

        Args:
            hidden: `(..., in_features)`.

        Returns:
            mean and log_diagonal, each `(..., latent)`, and lower `(..., latent * (latent - 1) / 2)`.

        Raises:
            ValueError: if the last dimension of `hidden` is not `in_features`.
        """
        dim = self.latent_dim
        mean, log_diagonal, lower = _in_full_precision(self.linear, hidden).split((dim, dim, dim * (dim - 1) // 2), -1)
        return mean, log_diagonal, lower

    def forward(
        self,
        hidden: Tensor,
        *,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
        seed: Tensor | None = None,
    ) -> FullGaussianPosterior:
        """Sample z ~ q(z|x) with the reparameterization trick and give its KL against N(0, I).

        Args:
            hidden: `(..., in_features)`.
            num_samples: S, to draw z of shape `(S, ..., latent)`; None draws one, `(..., latent)`.
            generator: source of the noise; the global generator when None.
            seed: int64 tensor of shape (1,) that fixes the noise, in place of `generator`.

        Returns:
            z, kl (nats), mean, log_diagonal and lower.
        """
        parameters = self.parameters_of(hidden)
        z, kl = full_gaussian_sample_kl(*parameters, num_samples=num_samples, generator=generator, seed=seed)
        return FullGaussianPosterior(z, kl, *parameters)

    def weighted_samples(
        self,
        hidden: Tensor,
        num_samples: int,
        *,
        generator: torch.Generator | None = None,
        seed: Tensor | None = None,
    ) -> WeightedSamples:
        """Sample z ~ q(z|x) and give the logarithm of its importance weight; see `GaussianHead.weighted_samples`."""
        z, kl, *parameters = self(hidden, num_samples=num_samples, generator=generator, seed=seed)
        log_prior = _standard_log_density(z.to(compute_dtype(z)))
        return WeightedSamples(z, log_prior - self.log_density(z, *parameters), kl)

    def log_density(self, z: Tensor, mean: Tensor, log_diagonal: Tensor, lower: Tensor) -> Tensor:
        """log q(z|x) of given latents.

        Args:
            z: `(*samples, ..., latent)`.
            mean, log_diagonal, lower: of shapes `(..., latent)` and `(..., latent * (latent - 1) / 2)`, from
                `parameters_of`.

        Returns:
            Nats, float32 (float64 for float64), `(*samples, ...)`.
        """
        dtype = compute_dtype(mean)
        factor = scale_tril(log_diagonal.to(dtype), lower.to(dtype))
        distance = (z.to(dtype) - mean.to(dtype)).unsqueeze(-1)
        noise = torch.linalg.solve_triangular(factor, distance, upper=False).squeeze(-1)
        return _standard_log_density(noise) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def extra_repr(self) -> str:
        """List the settings for `print`."""
        return f"{self.in_features}, {self.latent_dim}"


def _in_full_precision(linear: nn.Linear, hidden: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        output: Tensor = linear(_checked(linear, hidden))
    return output


def _checked(linear: nn.Linear, hidden: Tensor) -> Tensor:
    if hidden.size(-1) != linear.in_features:
        raise ValueError(f"hidden: expected shape (..., {linear.in_features}), got {tuple(hidden.shape)}")
    return hidden.to(linear.weight.dtype)


def _standard_log_density(z: Tensor) -> Tensor:
    """log N(z; 0, I), summed over the last dimension."""
    return -0.5 * (z.square().sum(-1) + z.size(-1) * math.log(2 * math.pi))
