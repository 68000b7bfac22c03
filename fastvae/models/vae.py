"""Variational auto-encoders around any encoder and decoder, and the importance-weighted one."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.functional import bernoulli_nll, gaussian_nll, importance_weighted_bound
from fastvae.models.evidence import check_free_bits, evaluating, free_bits_kl, importance_weighted_nll
from fastvae.models.pretrained import Pretrained
from fastvae.nn import FullGaussianHead, GaussianHead
from fastvae.ops.backend import compute_dtype
from fastvae.ops.checks import check_choice, check_float

_BASELINE_MOMENTUM = 0.01  # the running mean forgets at this rate, once it has seen that many batches


class VAEOutput(NamedTuple):
    """Losses of a batch, in nats.

    Attributes:
        loss: scalar to minimise, nats per datum, batch mean: nll + beta * kl_weight * kl, with free bits if any.
        nll: -log p(x|z) of each datum, mean over its samples of z, float32, `(batch,)`.
        kl: KL(q(z|x) || N(0, I)) of each datum, neither weighted nor bounded, float32, `(batch,)`.
    """

    loss: Tensor
    nll: Tensor
    kl: Tensor

    @property
    def neg_elbo(self) -> Tensor:
        """The negative evidence lower bound nll + kl, unweighted, nats per datum, `(batch,)`."""
        return self.nll + self.kl

    @property
    def elbo(self) -> Tensor:
        """The evidence lower bound, unweighted, nats per datum, `(batch,)`."""
        return -self.neg_elbo


class VAE(Pretrained):
    """Variational auto-encoder: q(z|x) from an encoder and a Gaussian head, p(x|z) from a decoder, p(z) = N(0, I).

    Likelihoods, by what the decoder gives for z `(rows, latent_dim)`:

    - "gaussian": means `(rows, *data_shape)` of x, whose variance exp(log_var) all of x shares.
    - "bernoulli": logits `(rows, *data_shape)`; x in [0, 1].
    - "categorical": logits `(rows, classes, *data_shape)`; x int64 in [0, classes). `fastvae.nn.OneHot` before the
      encoder makes floats of such x.

    Estimators of the encoder's gradient of E_q[-log p(x|z)]; that of the KL is exact, and `loss` has the same value:

    - "reparameterized": through z = mean + L eps.
    - "score_function": E_q[-log p(x|z) grad log q(z|x)], z constant (REINFORCE); unbiased, of high variance.
    - "score_function_baseline": less the running mean of -log p(x|z) over the training batches before, the buffer
      `baseline`; unbiased too, of less variance.

    `config` holds the constructor's other arguments: `VAE(encoder, decoder, **model.config)` builds the same model.

    Args:
        encoder: any module from x `(batch, *data_shape)` to features `(batch, F)`.
        decoder: any module from z to what the likelihood asks for.
        latent_dim: size of z, at least 1.
        likelihood: "gaussian", "bernoulli" or "categorical".
        posterior: "diagonal" or "full" covariance of q(z|x).
        estimator: "reparameterized", "score_function" or "score_function_baseline".
        beta: weight of the KL in `loss`; above 1 for a beta-VAE.
        free_bits: nats of KL of each latent dimension, on average over the batch, that cost nothing; with a full
            posterior `latent_dim` times as many of the whole KL.
        log_var: for "gaussian", log of the variance of p(x|z); None learns it, one number.
        features: F; None takes the encoder's `out_features`, or that of the last layer of a Sequential that has one.

    Raises:
        ValueError: naming the argument that is out of its range, or `features` if F cannot be told.

    Source: Kingma & Welling, Auto-Encoding Variational Bayes (2014); Ranganath et al., Black Box Variational Inference
    (2014) for the score function; Higgins et al., beta-VAE (2017); Kingma et al., Improving Variational Inference with
    Inverse Autoregressive Flow (2016) for free bits.
    """

    networks = ("encoder", "decoder")
    baseline: Tensor
    baseline_batches: Tensor
    log_var: nn.Parameter | float | None

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        *,
        likelihood: Literal["gaussian", "bernoulli", "categorical"] = "gaussian",
        posterior: Literal["diagonal", "full"] = "diagonal",
        estimator: Literal["reparameterized", "score_function", "score_function_baseline"] = "reparameterized",
        beta: float = 1.0,
        free_bits: float = 0.0,
        log_var: float | None = None,
        features: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("likelihood", likelihood, ("gaussian", "bernoulli", "categorical"))
        check_choice("posterior", posterior, ("diagonal", "full"))
        check_choice("estimator", estimator, ("reparameterized", "score_function", "score_function_baseline"))
        check_free_bits(free_bits)
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta: expected a finite number of at least 0, got {beta}")
        if log_var is not None and likelihood != "gaussian":
            raise ValueError(f"log_var: expected None for likelihood {likelihood!r}, got {log_var}")
        weight = next((p for p in encoder.parameters() if p.is_floating_point()), torch.empty(0))
        made: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.config: dict[str, Any] = {
            "latent_dim": latent_dim,
            "likelihood": likelihood,
            "posterior": posterior,
            "estimator": estimator,
            "beta": beta,
            "free_bits": free_bits,
            "log_var": log_var,
            "features": features,
        }
        self.encoder = encoder
        count = _feature_count(encoder, features)
        self.head: GaussianHead | FullGaussianHead = (
            GaussianHead(count, latent_dim, fused=True, **made)
            if posterior == "diagonal"
            else FullGaussianHead(count, latent_dim, **made)
        )
        self.decoder = decoder
        self.latent_dim = latent_dim
        self.likelihood = likelihood
        self.estimator = estimator
        self.beta = beta
        self.free_bits = free_bits
        self.log_var = (
            nn.Parameter(torch.zeros((), **made)) if likelihood == "gaussian" and log_var is None else log_var
        )
        if estimator == "score_function_baseline":
            self.register_buffer("baseline", torch.zeros((), device=weight.device, dtype=compute_dtype(weight)))
            self.register_buffer("baseline_batches", torch.zeros((), device=weight.device, dtype=torch.int64))

    def forward(
        self,
        x: Tensor,
        *,
        num_samples: int = 1,
        kl_weight: float | Tensor = 1.0,
        generator: torch.Generator | None = None,
        seed: Tensor | None = None,
    ) -> VAEOutput:
        """Estimate the negative ELBO of each datum from samples of z.

        Args:
            x: data, `(batch, *data_shape)`, at least one.
            num_samples: samples of z for each datum, over which `nll` is the mean.
            kl_weight: further weight of the KL in `loss`, from a schedule. In a compiled graph, give a 0-dim tensor
                to change it from step to step without compiling again.
            generator: source of z; the global generator when None.
            seed: int64 tensor of shape (1,) that fixes z, in place of `generator`; the form to use in a compiled
                graph.

        Returns:
            loss, nll and kl; `.elbo` and `.neg_elbo` are unweighted. What overflows float32 is infinite, never NaN.

        Raises:
            TypeError, ValueError: naming x, the encoder or the decoder, whichever gives a wrong type or shape.
        """
        hidden = self._features(x)
        if isinstance(self.head, GaussianHead):
            reduction: Any = "none" if self.free_bits else "sum"
            z, kl, *parameters = self.head(
                hidden, num_samples=num_samples, reduction=reduction, generator=generator, seed=seed
            )
        else:
            z, kl, *parameters = self.head(hidden, num_samples=num_samples, generator=generator, seed=seed)
        charged = kl.mean()
        if self.free_bits:
            parts = kl.reshape(len(x), -1)  # one for each dimension, or the whole
            charged = free_bits_kl(parts, self.free_bits * self.latent_dim / parts.size(1))
            kl = parts.sum(1)
        if self.estimator == "reparameterized":
            nll = self.nll(x, z)
            loss = nll.mean()
        else:
            z = z.detach()
            nll = self.nll(x, z)
            loss = nll.mean() + self._score_function(nll.detach(), self.head.log_density(z, *parameters))
        return VAEOutput(loss + self.beta * kl_weight * charged, nll.mean(0), kl)

    def nll(self, x: Tensor, z: Tensor) -> Tensor:
        """-log p(x|z), summed over a datum.

        Args:
            x: data, `(batch, *data_shape)`.
            z: latents, `(*samples, batch, latent_dim)`.

        Returns:
            Nats per datum, float32 (float64 for float64), `(*samples, batch)`.

        Raises:
            ValueError: if the decoder's output does not have the shape that x asks for.
        """
        leading, event = z.shape[:-1], x.shape[1:]
        output = self.decoder(z.flatten(0, -2))
        categorical = self.likelihood == "categorical"
        shape = (*output.shape[:1], *output.shape[2:]) if categorical else output.shape
        if shape != (leading.numel(), *event) or output.dim() < 1 + categorical:
            named = ("rows", "classes", *event) if categorical else ("rows", *event)
            raise ValueError(
                f"decoder: expected an output of shape ({', '.join(map(str, named))}), as x asks, "
                f"got {tuple(output.shape)} for {leading.numel()} rows"
            )
        if categorical:
            _check_classes(x, output.size(1))
            target = x.expand(*leading, *event).flatten(0, len(leading) - 1)
            each = F.cross_entropy(output.to(compute_dtype(output)), target, reduction="none")
            return each.reshape(*leading, -1).sum(-1)
        output = output.reshape(*leading, *event)
        if self.likelihood == "bernoulli":
            return bernoulli_nll(output, x, event_dims=len(event))
        assert self.log_var is not None
        return gaussian_nll(output, x, self.log_var, event_dims=len(event))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Parameters of the posterior q(z|x).

        Args:
            x: data, `(batch, *data_shape)`.

        Returns:
            mean and log_var, each `(batch, latent_dim)`; of a full posterior mean, log_diagonal and lower, as
            `FullGaussianHead.parameters_of`.
        """
        return self.head.parameters_of(self._features(x))

    def decode(self, z: Tensor) -> Tensor:
        """Mean of p(x|z).

        Args:
            z: latents, `(rows, latent_dim)`.

        Returns:
            Means or probabilities, `(rows, *data_shape)`; for "categorical" the probabilities of all classes,
            `(rows, classes, *data_shape)`.
        """
        output = self.decoder(z)
        output = output.to(compute_dtype(output))
        if self.likelihood == "gaussian":
            return output
        return output.sigmoid() if self.likelihood == "bernoulli" else output.softmax(1)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Decode the posterior mean of x, without dropout or gradient; shapes as `encode` and `decode`."""
        with evaluating(self):
            return self.decode(self.encode(x)[0])

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Decode n latents drawn from N(0, I), without dropout or gradient.

        Args:
            n: how many, at least 1.
            generator: source of z; the global generator when None.

        Returns:
            Means of p(x|z), as `decode`.
        """
        if n < 1:
            raise ValueError(f"n: expected at least 1, got {n}")
        weight = self.head.linear.weight
        z = torch.randn(n, self.latent_dim, generator=generator, device=weight.device, dtype=weight.dtype)
        with evaluating(self):
            return self.decode(z)

    @torch.no_grad()
    def importance_weighted_nll(
        self, x: Tensor, *, num_samples: int = 500, chunk: int = 50, generator: torch.Generator | None = None
    ) -> Tensor:
        """Importance-weighted estimate of -log p(x), a bound that tightens as samples are added.

        -log 1/S sum over s of p(x|z_s) p(z_s) / q(z_s|x), z_s ~ q(z|x), without dropout or gradient.
        With one sample it estimates the negative ELBO.

        Args:
            x: data, `(batch, *data_shape)`, all at once.
            num_samples: S, samples of z for each datum.
            chunk: samples decoded at a time: memory grows with batch * chunk.
            generator: source of the samples; the global generator when None.

        Returns:
            Nats per datum, float64, `(batch,)`.

        Raises:
            ValueError: if `num_samples` or `chunk` is below 1, and as `forward`.

        Source: Burda et al., Importance Weighted Autoencoders (2016), equation 8.
        """
        with evaluating(self):
            hidden = self._features(x)

            def draw(samples: int) -> tuple[Tensor, Tensor]:
                z, log_ratio, _ = self.head.weighted_samples(hidden, samples, generator=generator)
                return -self.nll(x, z), log_ratio

            return importance_weighted_nll(draw, num_samples, chunk)

    def extra_repr(self) -> str:
        """List the settings for `print`."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    def _features(self, x: Tensor) -> Tensor:
        if self.likelihood != "categorical":
            check_float("x", x)
        elif not isinstance(x, Tensor) or x.dtype != torch.int64:
            raise TypeError(f"x: expected an int64 tensor of classes, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.dim() < (1 if self.likelihood == "categorical" else 2) or not len(x):
            raise ValueError(f"x: expected shape (batch, *data_shape) with at least one datum, got {tuple(x.shape)}")
        hidden: Tensor = self.encoder(x)
        if hidden.shape != (len(x), self.head.in_features):
            raise ValueError(
                f"encoder: expected features of shape (batch, {self.head.in_features}) for a batch of {len(x)}, "
                f"got {tuple(hidden.shape)}"
            )
        return hidden

    def _score_function(self, nll: Tensor, log_density: Tensor) -> Tensor:
        """Zero, with the gradient of E_q[nll] that goes through q's density."""
        finite = nll.isfinite()  # else one overflow would make NaN of the loss, and of the baseline for good
        advantage = nll
        if self.estimator == "score_function_baseline":
            before = self.baseline.clone()
            advantage = nll - before
            if self.training:
                self.baseline_batches += 1
                rate = self.baseline_batches.reciprocal().clamp_min(_BASELINE_MOMENTUM)
                self.baseline += rate * torch.where(finite, advantage, 0).mean()
        return (torch.where(finite, advantage, 0) * (log_density - log_density.detach())).mean()


class IWAE(VAE):
    """Importance-weighted auto-encoder: a VAE whose loss is minus a tighter bound on log p(x), from S samples of z.

        loss = -E log 1/S sum over s of p(x|z_s) (p(z_s) / q(z_s|x))^kl_weight

    `nll` and `kl` in the output remain the ELBO's terms. Arguments and methods otherwise as `VAE`.

    Args:
        encoder, decoder, latent_dim, likelihood, posterior, log_var, features: as in `VAE`.
        num_samples: S, samples of z for each datum, at least 1; with one the bound is the ELBO.

    Source: Burda et al., Importance Weighted Autoencoders (2016).
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        *,
        likelihood: Literal["gaussian", "bernoulli", "categorical"] = "gaussian",
        posterior: Literal["diagonal", "full"] = "diagonal",
        num_samples: int = 50,
        log_var: float | None = None,
        features: int | None = None,
    ) -> None:
        super().__init__(
            encoder, decoder, latent_dim, likelihood=likelihood, posterior=posterior, log_var=log_var, features=features
        )
        for name in ("estimator", "beta", "free_bits"):
            del self.config[name]
        self.config["num_samples"] = num_samples
        if num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
        self.num_samples = num_samples

    def forward(
        self,
        x: Tensor,
        *,
        num_samples: int | None = None,
        kl_weight: float | Tensor = 1.0,
        generator: torch.Generator | None = None,
        seed: Tensor | None = None,
    ) -> VAEOutput:
        """Estimate the importance-weighted bound; arguments and result as `VAE.forward`.

        Args:
            x: data, `(batch, *data_shape)`, at least one.
            num_samples: S; None takes the model's.
            kl_weight: power of p(z) / q(z|x) in the loss; at 1 it is minus the bound.
            generator: source of z; the global generator when None.
            seed: int64 tensor of shape (1,) that fixes z, in place of `generator`.
        """
        samples = self.num_samples if num_samples is None else num_samples
        z, log_ratio, kl = self.head.weighted_samples(self._features(x), samples, generator=generator, seed=seed)
        nll = self.nll(x, z)
        bound = importance_weighted_bound(-nll, kl_weight * log_ratio)
        return VAEOutput(-bound.mean(), nll.mean(0), kl)


def _feature_count(encoder: nn.Module, features: int | None) -> int:
    if features is not None:
        return features
    layers = [encoder]
    if isinstance(encoder, nn.Sequential):
        layers += encoder.modules()
    for layer in reversed(layers[:1] if hasattr(encoder, "out_features") else layers):
        size = getattr(layer, "out_features", None)
        if isinstance(size, int):
            return size
    raise ValueError(
        "features: expected the number of features that the encoder gives, since it is neither a Sequential with a "
        f"linear layer nor has out_features; got None for {type(encoder).__name__}"
    )


def _check_classes(x: Tensor, classes: int) -> None:
    # On CUDA looking would synchronise; F.cross_entropy asserts there.
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel():
        low, high = (int(end) for end in x.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"x: expected classes in [0, {classes}), as the decoder has, got {int(low)} to {int(high)}"
            )
