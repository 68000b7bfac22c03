"""Sentence VAEs whose latents are governed by discrete codes: exponential-family mixtures, and what they compare to."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.functional import (
    categorical_kl,
    categorical_mixture_kl,
    gaussian_sample_kl,
    gumbel_softmax_sample_kl,
    mixture_kl,
)
from fastvae.models.evidence import evaluating
from fastvae.models.interpolation import latent_line
from fastvae.models.pretrained import Pretrained
from fastvae.nn import GaussianHead, LSTMDecoder, LSTMEncoder
from fastvae.nn.sentences import checked_lengths
from fastvae.ops.mixture import MixtureTerms

KINDS: dict[str, dict[str, Any]] = {
    "ae": {"prior": "none", "components": 1, "beta": 0.0, "mutual_information_weight": 0.0},
    "vae": {"prior": "standard", "components": 1, "beta": 0.0, "mutual_information_weight": 0.0},
    "di_vae": {"prior": "standard", "latent_dim": 0, "beta": 0.0, "mutual_information_weight": 1.0},
    "semi_vae": {"prior": "standard", "beta": 0.0},
    "gm_vae": {"prior": "mixture", "beta": 0.0},
    "dgm_vae": {"prior": "mixture"},
    "dcm_vae": {"prior": "mixture", "family": "categorical"},
}
"""What each kind fixes of the arguments of `MixtureVAE`."""

_SPREAD = 1.0  # deviation of the first means of the components: modes that begin together seldom part
_STREAM = 0x5851F42D4C957F2D  # any large number: the seeds of codes and word dropout are this far from that of z


class MixtureVAEOutput(NamedTuple):
    """Losses of a batch, in nats.

    Attributes:
        loss: scalar to minimise, nats per sentence.
        nll: -log p(x|z) of each sentence, mean over the samples of z, `(batch,)`.
        kl: KL(q(z, c|x) || p(z, c)) of each sentence, neither weighted nor relieved, `(batch,)`.
        dispersion: L_d of each sentence, a part of `kl`, `(batch,)`.
        mutual_information: I(c;x) of each variable under the batch, `(variables,)`.
        logits: of q(c|x), `(batch, variables, components)`.
        tokens: predicted tokens of each sentence, `</s>` counted and `<s>` not, int64 `(batch,)`.
    """

    loss: Tensor
    nll: Tensor
    kl: Tensor
    dispersion: Tensor
    mutual_information: Tensor
    logits: Tensor
    tokens: Tensor

    @property
    def neg_elbo(self) -> Tensor:
        """The negative evidence lower bound nll + kl, nats per sentence, `(batch,)`."""
        return self.nll + self.kl


class MixturePosterior(NamedTuple):
    """The posterior q(z|x) prod_m q(c_m|x).

    Attributes:
        mean: of Gaussian z, or the logits of categorical z, `(batch, variables, latent)`; None without z.
        log_var: of Gaussian z, likewise; else None.
        logits: of q(c|x), `(batch, variables, components)`.
    """

    mean: Tensor | None
    log_var: Tensor | None
    logits: Tensor


class MixtureVAE(Pretrained):
    """Sentence VAE with M discrete codes c_m ~ Uniform(K) and latents z_m, read and written by LSTMs.

    With `prior="mixture"` the code m chooses the component p(z_m|c_m) of a learned exponential-family mixture, and the
    decoder sees z alone. With "standard" each z_m is from N(0, I), or uniform over its classes, whatever the code, and
    the decoder sees z and the codes: K = 1 is the VAE, `latent_dim=0` the discrete VAE. With "none" z is the posterior
    mean and costs nothing: the auto-encoder. The loss is that of

        ELBO + beta L_d + mutual_information_weight I(c;x)

    where L_d is the dispersion of the components that `fastvae.functional.mixture_kl` tells of: beta = 0 lets the modes
    collapse, beta > 0 takes back part of the force that does it. Sums over codes are exact; those that the decoder sees
    are drawn, as is categorical z: relaxed one-hot vectors in training, one-hot ones in evaluation.

    `config` holds the constructor's arguments: `MixtureVAE(**model.config)` builds the same model.

    Args:
        vocab_size: number of tokens V.
        variables: M.
        components: K, of each variable.
        latent_dim: dimensions of each Gaussian z_m, or classes of each categorical one; 0 for codes alone.
        family: of z, "gaussian" or "categorical".
        prior: "mixture", "standard" or "none", see above.
        beta: weight of the dispersion; 1 takes it out of the loss.
        mutual_information_weight: of I(c;x); 1 leaves of mean KL(q(c|x)||p(c)) that of the batch's mean q(c|x).
        num_samples: S, samples of z for each sentence, which share the decoder's work on its tokens.
        temperature: of the relaxed one-hot samples.
        embed_dim, hidden_size, num_layers, word_dropout, dropout, tie_weights, share_embedding: as `SentenceVAE`.
        pad_index, bos_index, eos_index, unk_index: special tokens, by default as `fastvae.data.Vocabulary`.

    Source: Shi et al., Dispersed Exponential Family Mixture VAEs for Interpretable Text Generation (2020); for
    `di_vae` Zhao et al., Unsupervised Discrete Sentence Representation Learning (2018), section 3; for `semi_vae`
    Kingma et al., Semi-Supervised Learning with Deep Generative Models (2014), model M2.
    """

    component_mean: Tensor
    component_log_var: Tensor
    component_logits: Tensor
    head: Any  # nn.Linear of categorical z, GaussianHead of Gaussian z

    def __init__(
        self,
        vocab_size: int,
        *,
        variables: int = 3,
        components: int = 5,
        latent_dim: int = 5,
        family: Literal["gaussian", "categorical"] = "gaussian",
        prior: Literal["mixture", "standard", "none"] = "mixture",
        beta: float = 0.7,
        mutual_information_weight: float = 0.0,
        num_samples: int = 1,
        temperature: float = 1.0,
        embed_dim: int = 256,
        hidden_size: int = 256,
        num_layers: int = 1,
        word_dropout: float = 0.0,
        dropout: float = 0.0,
        tie_weights: bool = False,
        share_embedding: bool = False,
        pad_index: int = 0,
        bos_index: int = 2,
        eos_index: int = 3,
        unk_index: int = 1,
    ) -> None:
        config: dict[str, Any] = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.config = config
        self.variables, self.components, self.latent_dim = variables, components, latent_dim
        self.prior, self.beta, self.mutual_information_weight = prior, beta, mutual_information_weight
        self.num_samples, self.temperature = num_samples, temperature
        self.categorical = family == "categorical"
        _check(self)
        self.code_is_seen = prior == "standard" and components > 1
        self.code_head = nn.Linear(hidden_size, variables * components).requires_grad_(prior != "none")
        if latent_dim:
            size = variables * latent_dim
            self.head = nn.Linear(hidden_size, size) if self.categorical else GaussianHead(hidden_size, size)
        if prior != "none":
            self._add_components()
        self.decoder = LSTMDecoder(
            vocab_size,
            embed_dim,
            hidden_size,
            variables * (latent_dim + (components if self.code_is_seen else 0)),
            num_layers=num_layers,
            word_dropout=word_dropout,
            dropout=dropout,
            tie_weights=tie_weights,
            pad_index=pad_index,
            bos_index=bos_index,
            eos_index=eos_index,
            unk_index=unk_index,
        )
        self.encoder = LSTMEncoder(
            vocab_size,
            embed_dim,
            hidden_size,
            num_layers=num_layers,
            dropout=dropout,
            pad_index=pad_index,
            embedding=self.decoder.embedding if share_embedding else None,
        )

    @classmethod
    def of_kind(cls, kind: str, vocab_size: int, **settings: Any) -> MixtureVAE:
        """Build one of the models of the study: what `KINDS` says of a kind comes before `settings`.

        Args:
            kind: "ae", "vae", "di_vae", "semi_vae", "gm_vae", "dgm_vae" or "dcm_vae".
            vocab_size, settings: arguments of the constructor.

        Raises:
            ValueError: there is no such kind, or an argument is wrong.
        """
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        return cls(vocab_size, **(settings | KINDS[kind]))

    def _add_components(self) -> None:
        """Add p(z|c): parameters of a mixture, spread out at first; constants of a standard prior."""
        shape = self.variables, self.components, self.latent_dim or 1
        start = _SPREAD * torch.randn(shape) if self.prior == "mixture" else torch.zeros(shape)
        values = {"component_logits": start} if self.categorical or not self.latent_dim else {
            "component_mean": start, "component_log_var": torch.zeros(shape)
        }  # fmt: skip
        for name, value in values.items():
            if self.prior == "mixture":
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value, persistent=False)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        supervision_weight: float = 1.0,
        kl_weight: float | Tensor = 1.0,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
        seed: Tensor | None = None,
    ) -> MixtureVAEOutput:
        """Estimate the negative ELBO of each sentence; only the reconstruction is sampled.

        Args:
            tokens: `(batch, time)` int64, each row `<s> ... </s>`, padded on the right.
            lengths: `(batch,)` int64, `<s>` and `</s>` counted; None counts the tokens that are not padding.
            labels: known values of the first codes, `(batch, at most variables)` int64 in [0, components), -1 where
                unknown; their -log q(c|x) joins the loss, mean over the batch.
            supervision_weight: of that term.
            kl_weight: weight of all terms of the loss but the reconstruction and the supervision.
            num_samples: in place of the model's own.
            generator: source of the samples and of word dropout; the global generator when None.
            seed: int64 tensor of shape (1,) that fixes both, in place of `generator`; the form to use in a compiled
                graph. `dropout` follows torch's global generator in any case.

        Returns:
            The loss and its terms; `.neg_elbo` is unweighted.

        Raises:
            TypeError, ValueError, IndexError: as `LSTMDecoder.forward`; for labels of a wrong shape or value.
        """
        lengths = checked_lengths(tokens, lengths, self.decoder.pad_index, shortest=2)
        posterior = self._posterior(self.encoder(tokens, lengths))
        samples = self.num_samples if num_samples is None else num_samples
        latent = self._draw(posterior, 1 if self.prior == "none" else samples, generator, seed)
        decoder_seed = None if seed is None else seed + 2 * _STREAM
        nll = self.decoder(tokens, latent, lengths, generator=generator, seed=decoder_seed).mean(0)
        terms = self.terms(posterior)
        charged = (
            terms.kl.mean()
            + (1 - self.beta) * terms.dispersion.mean()
            + terms.aggregate_kl.sum()
            + (1 - self.mutual_information_weight) * terms.mutual_information.sum()
        )
        loss = nll.mean() + kl_weight * charged
        if labels is not None:
            loss = loss + supervision_weight * self._supervision(posterior.logits, labels)
        kl = terms.kl + terms.dispersion + categorical_kl(posterior.logits).sum(1)
        information = terms.mutual_information
        return MixtureVAEOutput(loss, nll, kl, terms.dispersion, information, posterior.logits, lengths - 1)

    def terms(self, posterior: MixturePosterior) -> MixtureTerms:
        """Give the parts of the KL, in nats, as `fastvae.functional.mixture_kl`; zeros where there is no prior."""
        mean, log_var, logits = posterior
        if self.prior == "none":
            return MixtureTerms(*(logits.new_zeros(size) for size in 2 * (len(logits),) + 2 * (self.variables,)))
        if mean is None:  # one class, which costs nothing
            mean = logits.new_zeros(*logits.shape[:2], 1)
        if log_var is None:
            return categorical_mixture_kl(mean, logits, self.component_logits)
        return mixture_kl(mean, log_var, logits, self.component_mean, self.component_log_var)

    def encode(self, tokens: Tensor, lengths: Tensor | None = None) -> MixturePosterior:
        """Posterior of each sentence.

        Args:
            tokens, lengths: as in `forward`.
        """
        lengths = checked_lengths(tokens, lengths, self.decoder.pad_index, shortest=2)
        return self._posterior(self.encoder(tokens, lengths))

    def prior_latents(self, codes: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw what the decoder sees from p(z|c), given the codes.

        Args:
            codes: `(batch, variables)` int64 in [0, components).
            generator: source of z; the global generator when None.

        Returns:
            `(batch, decoder.latent_dim)`, for `decode`.

        Raises:
            ValueError: the codes have a wrong shape or value.
        """
        self._check_codes(codes)
        weight = self.code_head.weight
        shape = len(codes), self.variables, self.latent_dim
        variable = torch.arange(self.variables, device=codes.device)
        if not self.latent_dim:
            z = weight.new_zeros(shape)
        elif self.categorical:
            probabilities = self.component_logits[variable, codes].softmax(-1)
            drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator)
            z = F.one_hot(drawn.view(shape[:2]), self.latent_dim).to(weight.dtype)
        else:
            z = torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)
            if self.prior == "mixture":
                spread = (0.5 * self.component_log_var[variable, codes]).exp()
                z = torch.addcmul(self.component_mean[variable, codes], spread, z)
        return self._seen(z, F.one_hot(codes, self.components).to(weight.dtype))

    def code_mean(self, codes: Tensor) -> Tensor:
        """Give what the decoder sees at the mean of p(z|c), of categorical z the probabilities of its classes.

        Args:
            codes: `(batch, variables)` int64 in [0, components).

        Returns:
            `(batch, decoder.latent_dim)`.

        Raises:
            ValueError: the codes have a wrong shape or value.
        """
        self._check_codes(codes)
        weight, variable = self.code_head.weight, torch.arange(self.variables, device=codes.device)
        mean = weight.new_zeros(len(codes), self.variables, self.latent_dim)
        if self.latent_dim and self.categorical:
            mean = self.component_logits[variable, codes].softmax(-1)
        elif self.prior == "mixture":
            mean = self.component_mean[variable, codes]
        return self._seen(mean, F.one_hot(codes, self.components).to(weight.dtype))

    def decode(
        self,
        z: Tensor,
        *,
        max_length: int = 100,
        strategy: Literal["greedy", "sample", "beam"] = "greedy",
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """Write one sentence for each latent vector.

        Args:
            z: `(batch, decoder.latent_dim)`: the latents of all variables, then the codes where the decoder sees them.
            max_length: most tokens to write, `</s>` counted.
            strategy: "greedy", "sample" or "beam".
            options: further arguments of `LSTMDecoder.generate`, such as `temperature` or `beam_size`.

        Returns:
            tokens `(batch, length)` without `<s>`, and lengths `(batch,)`, as `LSTMDecoder.generate`.
        """
        return self.decoder.generate(z, max_length, strategy, **options)

    def reconstruct(self, tokens: Tensor, lengths: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
        """Write each sentence again from its posterior mean and its likeliest codes, greedily unless told.

        Args:
            tokens, lengths: as in `forward`.
            options: arguments of `decode`.

        Returns:
            As `decode`.
        """
        return self.decode(self.posterior_mean(tokens, lengths), **options)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        codes: Tensor | None = None,
        strategy: Literal["greedy", "sample", "beam"] = "sample",
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """Write n new sentences from the prior; an auto-encoder, which has none, takes z from N(0, I).

        Args:
            n: number of sentences, at least 1.
            codes: c of each sentence, `(n, variables)` int64; uniform draws when None.
            strategy: as in `decode`; by default the words are drawn too.
            generator: source of the latents and of the words; the global generator when None.
            options: further arguments of `decode`.

        Returns:
            As `decode`.
        """
        if n < 1:
            raise ValueError(f"n: expected at least 1 sentence, got {n}")
        if codes is None:
            size, device = (n, self.variables), self.code_head.weight.device
            codes = torch.randint(self.components, size, generator=generator, device=device)
        elif len(codes) != n:
            raise ValueError(f"codes: expected {n} rows, got {len(codes)}")
        z = self.prior_latents(codes, generator=generator)
        return self.decode(z, strategy=strategy, generator=generator, **options)

    def interpolate(self, a: Tensor, b: Tensor, steps: int, **options: Any) -> tuple[Tensor, ...]:
        """Write sentences along the straight line between two posterior means; arguments as `SentenceVAE.interpolate`.

        Raises:
            ValueError: `steps` is below 2, or an end is not one sentence.
        """
        return self.decode(latent_line(self.posterior_mean, a, b, steps), **options)

    @torch.no_grad()
    def posterior_mean(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Give what the decoder sees at the posterior's mean, of discrete variables at their likeliest value.

        Args:
            tokens, lengths: as in `forward`.

        Returns:
            `(batch, decoder.latent_dim)`, without dropout.
        """
        with evaluating(self):
            mean, _, logits = self.encode(tokens, lengths)
        codes = F.one_hot(logits.argmax(-1), self.components).to(logits.dtype)
        if mean is None:
            mean = logits.new_zeros(*logits.shape[:2], 0)
        elif self.categorical:
            mean = F.one_hot(mean.argmax(-1), self.latent_dim).to(mean.dtype)
        return self._seen(mean, codes)

    def _posterior(self, hidden: Tensor) -> MixturePosterior:
        shape = self.variables, self.latent_dim
        logits = self.code_head(hidden).unflatten(1, (self.variables, self.components))
        if not self.latent_dim:
            return MixturePosterior(None, None, logits)
        if self.categorical:
            return MixturePosterior(self.head(hidden).unflatten(1, shape), None, logits)
        mean, log_var = self.head.parameters_of(hidden)
        return MixturePosterior(mean.unflatten(1, shape), log_var.unflatten(1, shape), logits)

    def _draw(
        self, posterior: MixturePosterior, samples: int, generator: torch.Generator | None, seed: Tensor | None
    ) -> Tensor:
        """Draw what the decoder sees, `(samples, batch, decoder.latent_dim)`."""
        mean, log_var, logits = posterior
        one_hot: dict[str, Any] = {
            "temperature": self.temperature, "hard": not self.training, "num_samples": samples, "generator": generator,
        }  # fmt: skip
        if mean is None:
            z = logits.new_zeros(samples, *logits.shape[:2], 0)
        elif self.prior == "none":
            z = mean.unsqueeze(0)
        elif log_var is None:
            z, _ = gumbel_softmax_sample_kl(mean, seed=seed, **one_hot)
        else:
            z, _ = gaussian_sample_kl(mean, log_var, num_samples=samples, generator=generator, seed=seed)
        codes = logits
        if self.code_is_seen:
            codes, _ = gumbel_softmax_sample_kl(logits, seed=None if seed is None else seed + _STREAM, **one_hot)
        return self._seen(z, codes)

    def _seen(self, z: Tensor, codes: Tensor) -> Tensor:
        """Join z `(..., variables, latent)` and, where the decoder sees them, codes `(..., variables, components)`."""
        return torch.cat([z.flatten(-2), codes.flatten(-2)], -1) if self.code_is_seen else z.flatten(-2)

    def _supervision(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.dim() != 2 or len(labels) != len(logits) or not 1 <= labels.size(1) <= self.variables:
            expected = f"({len(logits)}, at most {self.variables})"
            raise ValueError(f"labels: expected shape {expected}, got {tuple(labels.shape)}")
        known = logits[:, : labels.size(1)].transpose(1, 2)
        return F.cross_entropy(known, labels, ignore_index=-1, reduction="sum") / len(logits)

    def _check_codes(self, codes: Tensor) -> None:
        if codes.dtype != torch.int64 or codes.dim() != 2 or codes.size(1) != self.variables:
            got = f"{tuple(codes.shape)} {codes.dtype}"
            raise ValueError(f"codes: expected shape (batch, {self.variables}), int64, got {got}")
        if codes.numel() and not (codes.min() >= 0 and codes.max() < self.components):
            got = f"{int(codes.min())} to {int(codes.max())}"
            raise ValueError(f"codes: expected values in [0, {self.components}), got {got}")


def _check(model: MixtureVAE) -> None:
    config = model.config
    for name, choices in (("family", ("gaussian", "categorical")), ("prior", ("mixture", "standard", "none"))):
        if config[name] not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {config[name]!r}")
    least = {"variables": 1, "components": 1, "num_samples": 1, "latent_dim": int(model.prior != "standard")}
    for name, smallest in (least | {"beta": 0, "mutual_information_weight": 0}).items():
        if not smallest <= config[name] < float("inf"):
            raise ValueError(f"{name}: expected at least {smallest}, got {config[name]}")
    if model.prior == "none" and (model.components > 1 or model.categorical):
        raise ValueError("prior: expected 'none' with components=1 and Gaussian z only")
    if not model.latent_dim and model.components == 1:
        raise ValueError("latent_dim: expected at least 1 with components=1, got 0")
