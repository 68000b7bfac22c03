"""Models of vectors and images built from a run's settings, and one interface to all of them; needs torch alone."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.data import Samples, Scaling
from fastvae.models import IWAE, VAE, DenoisingAutoEncoder, LinearAutoEncoder
from fastvae.nn import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder, OneHot
from fastvae.training.config import ArrayConfig

_OF_MODEL = (
    *("model", "encoder", "hidden", "channels", "latent_dim", "posterior", "estimator", "beta", "free_bits"),
    *("log_var", "num_samples", "noise", "level", "tied"),
)


def resolved_likelihood(config: ArrayConfig, is_image: bool) -> str:
    """Return the likelihood that "auto" stands for."""
    likelihood: str = getattr(config, "likelihood", "gaussian")
    return ("bernoulli" if is_image else "gaussian") if likelihood == "auto" else likelihood


def resolved_scaling(config: ArrayConfig, samples: Samples) -> str:
    """Return the kind of scaling that "auto" stands for.

    Raises:
        ValueError: it does not go with the likelihood.
    """
    likelihood = resolved_likelihood(config, samples.is_image)
    if config.scaling == "auto":
        if likelihood == "categorical":
            return "levels"
        return "unit" if samples.is_image or likelihood == "bernoulli" else "standard"
    if likelihood == "bernoulli" and config.scaling == "standard":
        raise ValueError("scaling 'standard' does not go with likelihood 'bernoulli', which images have by default")
    return config.scaling


def model_settings(config: ArrayConfig, scaling: Scaling) -> dict[str, Any]:
    """Return, as plain types, what `build_array_model` needs: the settings of the model and the data that it is of."""
    settings = {name: value for name, value in config.to_dict().items() if name in _OF_MODEL}
    likelihood = resolved_likelihood(config, scaling.is_image)
    return settings | {"likelihood": likelihood, "scaling": scaling.state()}


def build_array_model(settings: dict[str, Any]) -> nn.Module:
    """Build the untrained model of a run.

    Args:
        settings: as `model_settings` gives them.

    Raises:
        ValueError: settings that do not go together, or not with the data.
    """
    scaling = Scaling(**settings["scaling"])
    shape, name, latent_dim, likelihood = (
        tuple(scaling.shape), settings["model"], settings["latent_dim"], settings["likelihood"],
    )  # fmt: skip
    if name == "linear_autoencoder":
        return LinearAutoEncoder(prod(shape), latent_dim, tied=settings["tied"])
    encoder, decoder, features = _networks(settings, shape, scaling.levels if likelihood == "categorical" else 0)
    if name == "denoising_autoencoder":
        ends = {"standard": (-2.0, 2.0), "none": (scaling.low, scaling.high)}
        low, high = ends.get(scaling.kind, (0.0, 1.0))
        return DenoisingAutoEncoder(
            nn.Sequential(
                *(encoder if isinstance(encoder, nn.Sequential) else [encoder]), nn.Linear(features, latent_dim)
            ),
            decoder,
            noise=settings["noise"],
            level=settings["level"],
            likelihood=likelihood,
            low=low,
            high=high,
        )
    if settings["log_var"] is not None and likelihood != "gaussian":
        raise ValueError(f"log_var is of likelihood 'gaussian', and that of these data is {likelihood!r}")
    options = {key: settings[key] for key in ("posterior", "log_var", "likelihood")} | {"features": features}
    if name == "iwae":
        return IWAE(encoder, decoder, latent_dim, num_samples=settings["num_samples"], **options)
    options |= {key: settings[key] for key in ("estimator", "beta", "free_bits")}
    return VAE(encoder, decoder, latent_dim, **options)


def _networks(settings: dict[str, Any], shape: tuple[int, ...], levels: int) -> tuple[nn.Module, nn.Module, int]:
    """Return an encoder, a decoder and the number of features between encoder and head."""
    latent_dim, hidden, channels = settings["latent_dim"], settings["hidden"], settings["channels"]
    if settings["encoder"] == "mlp":
        data_shape = (levels, *shape) if levels else shape
        mlp = MLPEncoder(data_shape, hidden)
        decoder: nn.Module = MLPDecoder(latent_dim, data_shape, hidden[::-1])
        return (nn.Sequential(OneHot(levels), mlp) if levels else mlp), decoder, mlp.out_features
    if len(shape) != 3:
        raise ValueError(f"encoder 'conv' is for images, and these data are vectors of {shape[0]} numbers")
    if levels and shape[0] != 1:
        raise ValueError("encoder 'conv' with likelihood 'categorical' is for images of one channel")
    data_shape = (levels, *shape[1:]) if levels else shape
    conv = ConvEncoder(data_shape, channels)
    decoder = ConvDecoder(latent_dim, data_shape, channels[::-1])
    if levels:  # the one channel goes where the levels' come, and comes back
        encoder = nn.Sequential(nn.Flatten(1, 2), OneHot(levels), conv)
        return encoder, nn.Sequential(decoder, nn.Unflatten(2, (1, shape[1]))), conv.out_features
    return conv, decoder, conv.out_features


def row_kind(scaling: Scaling) -> str:
    """Say what the rows are: images of so many pixels, or vectors."""
    if not scaling.is_image:
        return f"vectors of {scaling.shape[0]} numbers"
    channels, height, width = scaling.shape
    return f"images of {width} x {height}" + (f" x {channels}" if channels > 1 else "")


class ArrayModel:
    """Rows in, rows out, in the data's own units, whichever the model.

    Args:
        model, scaling: what `load_run` gives.
    """

    def __init__(self, model: nn.Module, scaling: Scaling) -> None:
        self.model: Any = model
        self.scaling = scaling

    @property
    def has_prior(self) -> bool:
        """Whether the model is a VAE, that new rows can be drawn from."""
        return isinstance(self.model, VAE)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the mean of z, or the code, of rows (rows, *shape): (rows, latent_dim)."""
        codes = self.model.encode(self.input(x))
        return codes[0] if isinstance(codes, tuple) else codes

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Return the mean of p(x|z) of codes (rows, latent_dim): (rows, *shape)."""
        rows = self.model.decode(z.to(self.device))
        if getattr(self.model, "likelihood", "") == "categorical":
            rows = torch.einsum("rk...,k->r...", rows, torch.arange(rows.size(1), device=rows.device, dtype=rows.dtype))
        return self.scaling.undo(rows.reshape(-1, *self.scaling.shape))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return rows decoded from their codes, (rows, *shape)."""
        return self.decode(self.codes(x))

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Return the mean of p(x|z) of z ~ N(0, I), (count, *shape); the same seed gives the same.

        Raises:
            ValueError: the model has no prior, or count is below 1.
        """
        if not self.has_prior:
            raise ValueError("an auto-encoder without a prior cannot be sampled from; a vae and an iwae can")
        if count < 1:
            raise ValueError(f"the number of samples must be at least 1, got {count}")
        z = torch.randn(count, self.model.latent_dim, generator=torch.Generator().manual_seed(seed))
        return self.decode(z)

    def input(self, x: Tensor) -> Tensor:
        """Return rows as the model reads them: scaled, on its device."""
        return model_input(self.model, self.scaling.apply(x.to(self.device)))


def model_input(model: nn.Module, x: Tensor) -> Tensor:
    """Turn scaled rows (rows, *shape) into what a model reads: flat for a linear one, whole numbers for classes."""
    if isinstance(model, LinearAutoEncoder):
        return x.flatten(1)
    return x.long() if getattr(model, "likelihood", "") == "categorical" else x
