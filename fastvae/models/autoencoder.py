"""Auto-encoders without a prior: linear, denoising and sparse."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.functional import bernoulli_nll, corrupt, corrupted_linear
from fastvae.models.evidence import evaluating
from fastvae.models.pretrained import Pretrained
from fastvae.nn import MLPEncoder, SparseAutoEncoder, SparseAutoEncoderOutput
from fastvae.ops.backend import compute_dtype
from fastvae.ops.checks import check_choice, check_float

__all__ = [
    "AutoEncoderOutput",
    "DenoisingAutoEncoder",
    "LinearAutoEncoder",
    "SparseAutoEncoder",
    "SparseAutoEncoderOutput",
]


class AutoEncoderOutput(NamedTuple):
    """What an auto-encoder makes of a batch.

    Attributes:
        loss: scalar to minimise, the batch mean of `error`.
        error: of each datum, summed over it, float32, `(batch,)`: 1/2 |x - reconstruction|^2, which is -log p(x|codes)
            of unit variance less its constant; for a Bernoulli likelihood -log p(x|codes), nats.
        codes: what the encoder gives, `(batch, ...)`.
        reconstruction: mean of p(x|codes), as x.
    """

    loss: Tensor
    error: Tensor
    codes: Tensor
    reconstruction: Tensor


class LinearAutoEncoder(Pretrained):
    """Linear auto-encoder: codes = (x - bias) encoder^T, reconstruction = codes decoder + bias.

    Minimising the squared error finds the principal subspace: the span of the decoder's rows becomes that of the
    first `latent_dim` principal components, and the loss half of the variance outside of it.

    `config` holds the constructor's arguments: `LinearAutoEncoder(**model.config)` builds the same model.

    Args:
        in_features: size of a datum.
        latent_dim: number of codes.
        tied: use the decoder as encoder, so that `encoder` is None. Either has shape (latent_dim, in_features).
        bias: learn `bias`, the point through which the subspace goes, (in_features,); without one it is the origin.

    Source: Baldi & Hornik, Neural Networks and Principal Component Analysis (1989).
    """

    encoder: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        latent_dim: int,
        *,
        tied: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("latent_dim", latent_dim)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.config: dict[str, Any] = {
            "in_features": in_features,
            "latent_dim": latent_dim,
            "tied": tied,
            "bias": bias,
        }
        self.in_features = in_features
        self.latent_dim = latent_dim
        rows = torch.randn(latent_dim, in_features, device=device, dtype=dtype) / math.sqrt(in_features)
        self.decoder = nn.Parameter(rows)
        self.register_parameter("encoder", None if tied else nn.Parameter(rows.clone()))
        centre = torch.zeros(in_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(centre) if bias else None)

    def forward(self, x: Tensor) -> AutoEncoderOutput:
        """Encode and reconstruct x `(batch, in_features)`, at least one datum.

        Raises:
            TypeError, ValueError: naming x, if its type or shape is wrong.
        """
        codes = self.encode(x)
        reconstruction = self.decode(codes)
        error = _half_squared_error(x, reconstruction)
        return AutoEncoderOutput(error.mean(), error, codes, reconstruction)

    def encode(self, x: Tensor) -> Tensor:
        """Codes `(batch, latent_dim)` of x `(batch, in_features)`."""
        _check_batch(x)
        if x.shape[1:] != (self.in_features,):
            raise ValueError(f"x: expected shape (batch, {self.in_features}), got {tuple(x.shape)}")
        centred = x if self.bias is None else x - self.bias
        return F.linear(centred, self.decoder if self.encoder is None else self.encoder)

    def decode(self, codes: Tensor) -> Tensor:
        """Reconstruction `(batch, in_features)` of codes `(batch, latent_dim)`."""
        product = codes @ self.decoder
        return product if self.bias is None else product + self.bias

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode and decode x, without gradient."""
        return self.decode(self.encode(x))

    def extra_repr(self) -> str:
        """List the settings for `print`."""
        return f"{self.in_features}, {self.latent_dim}, tied={self.encoder is None}, bias={self.bias is not None}"


class DenoisingAutoEncoder(Pretrained):
    """Auto-encoder that reconstructs data from a corrupted copy of them.

    An encoder that begins with a linear layer (`nn.Linear`, or a Sequential of one, before which a Flatten may stand)
    reads x through `corrupted_linear`: the corrupted copy is never whole in memory. With `nn.Linear` and
    `nn.Identity` as encoder and decoder the model is the linear one, whose optimum has a closed form.

    `config` holds the constructor's other arguments: `DenoisingAutoEncoder(encoder, decoder, **model.config)` builds
    the same model.

    Args:
        encoder: any module from x `(batch, *data_shape)` to codes.
        decoder: any module from codes to means or logits `(batch, *data_shape)`.
        noise: "gaussian" of deviation `level`, "masking" sets a share `level` of x to 0, "salt_and_pepper" to `low` or
            `high`.
        level: how strong the corruption is.
        likelihood: "gaussian", or "bernoulli" for x in [0, 1] and a decoder that gives logits.
        low, high: values of pepper and salt.

    Source: Vincent et al., Stacked Denoising Autoencoders (2010).
    """

    networks = ("encoder", "decoder")

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        noise: Literal["gaussian", "masking", "salt_and_pepper"] = "gaussian",
        level: float,
        likelihood: Literal["gaussian", "bernoulli"] = "gaussian",
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("likelihood", likelihood, ("gaussian", "bernoulli"))
        nothing, seed = torch.zeros(0), torch.zeros(1, dtype=torch.int64)
        corrupt(nothing, noise, level, low=low, high=high, seed=seed)  # its checks, before the first batch
        self.config: dict[str, Any] = {
            "noise": noise,
            "level": level,
            "likelihood": likelihood,
            "low": low,
            "high": high,
        }
        self.encoder = encoder
        self.decoder = decoder
        self.noise: Literal["gaussian", "masking", "salt_and_pepper"] = noise
        self.level = level
        self.likelihood = likelihood
        self._ends = {"low": low, "high": high}

    def forward(
        self, x: Tensor, *, generator: torch.Generator | None = None, seed: Tensor | None = None
    ) -> AutoEncoderOutput:
        """Corrupt x, in evaluation mode too, and reconstruct it.

        Args:
            x: clean data, `(batch, *data_shape)`, at least one.
            generator: source of the corruption; the global generator when None.
            seed: int64 tensor of shape (1,) that fixes it, in place of `generator`; the form to use in a compiled
                graph.

        Returns:
            loss, error (against the clean x), codes and reconstruction.

        Raises:
            TypeError, ValueError: naming x, or the decoder if it gives another shape.
        """
        _check_batch(x)
        codes = self._encode_corrupted(x, generator=generator, seed=seed)
        output: Tensor = self.decoder(codes)
        if output.shape != x.shape:
            raise ValueError(f"decoder: expected an output of x's shape {tuple(x.shape)}, got {tuple(output.shape)}")
        if self.likelihood == "gaussian":
            error = _half_squared_error(x, output)
        else:
            error = bernoulli_nll(output, x, event_dims=x.dim() - 1)
        return AutoEncoderOutput(error.mean(), error, codes, self._mean(output))

    def corrupt(self, x: Tensor, *, generator: torch.Generator | None = None, seed: Tensor | None = None) -> Tensor:
        """Return the corrupted copy of x that `forward` reads, with the same seed the same one."""
        return corrupt(x, self.noise, self.level, **self._ends, generator=generator, seed=seed)

    def encode(self, x: Tensor) -> Tensor:
        """Codes of x as it is."""
        _check_batch(x)
        codes: Tensor = self.encoder(x)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Mean of p(x|codes): means, or probabilities for a Bernoulli likelihood, `(batch, *data_shape)`."""
        return self._mean(self.decoder(codes))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode and decode x as it is, without dropout or gradient."""
        with evaluating(self):
            return self.decode(self.encode(x))

    def extra_repr(self) -> str:
        """List the settings for `print`."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    def _encode_corrupted(self, x: Tensor, **options: Any) -> Tensor:
        layers = _plain_layers(self.encoder)
        if isinstance(self.encoder, MLPEncoder):
            self.encoder.check_input(x)
        flat = layers.pop(0)(x) if layers and isinstance(layers[0], nn.Flatten) else x
        first = layers[0] if layers else self.encoder
        codes: Tensor
        if type(first) is not nn.Linear or _hooked(first):
            codes = self.encoder(self.corrupt(x, **options))
            return codes
        options |= self._ends
        codes = corrupted_linear(flat, first.weight, first.bias, self.noise, self.level, **options)
        for layer in layers[1:]:
            codes = layer(codes)
        return codes

    def _mean(self, output: Tensor) -> Tensor:
        return output.sigmoid() if self.likelihood == "bernoulli" else output


def _plain_layers(encoder: nn.Module) -> list[nn.Module]:
    """The layers of an encoder that does nothing but call them in turn; else the encoder alone."""
    if isinstance(encoder, nn.Sequential) and type(encoder) in (nn.Sequential, MLPEncoder) and not _hooked(encoder):
        return list(encoder)
    return [encoder]


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _half_squared_error(x: Tensor, reconstruction: Tensor) -> Tensor:
    dtype = compute_dtype(x)
    return 0.5 * (x.to(dtype) - reconstruction.to(dtype)).square().flatten(1).sum(1)


def _check_batch(x: Tensor) -> None:
    check_float("x", x)
    if x.dim() < 2 or not len(x):
        raise ValueError(f"x: expected shape (batch, *data_shape) with at least one datum, got {tuple(x.shape)}")
