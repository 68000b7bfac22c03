"""Variational auto-encoder for sentences: encoder, Gaussian posterior, decoder."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastvae.functional import bag_of_words_loss
from fastvae.models.evidence import check_free_bits, evaluating, free_bits_kl, importance_weighted_nll
from fastvae.models.interpolation import latent_line
from fastvae.models.pretrained import Pretrained
from fastvae.nn import (
    BatchNormGaussianHead,
    GaussianHead,
    GRUDecoder,
    GRUEncoder,
    LatentAdversary,
    LSTMDecoder,
    LSTMEncoder,
    TransformerDecoder,
    TransformerEncoder,
    noisy_words,
)
from fastvae.nn.sentences import SentenceDecoder, SentenceEncoder, checked_lengths
from fastvae.nn.transformer import Positions
from fastvae.nn.word_noise import check_noise
from fastvae.ops.backend import compute_dtype

ENCODERS: dict[str, type[Any]] = {"lstm": LSTMEncoder, "gru": GRUEncoder, "transformer": TransformerEncoder}
DECODERS: dict[str, type[Any]] = {"lstm": LSTMDecoder, "gru": GRUDecoder, "transformer": TransformerDecoder}
REGULARIZERS = ("kl", "none", "adversarial")
_STREAM = 0x5851F42D4C957F2D  # any large number: word dropout's seed is this far from the noise's


class SentenceVAEOutput(NamedTuple):
    """Losses of a batch, in nats.

    Attributes:
        loss: scalar to minimise, nats per sentence, batch mean: nll + kl_weight * kl, with free bits if any, and with
            the auxiliary losses that the model has.
        nll: -log p(x|z) of each sentence, `(batch,)`.
        kl: KL(q(z|x) || N(0, I)) of each sentence, neither weighted nor bounded, `(batch,)`.
        tokens: predicted tokens of each sentence, `</s>` counted and `<s>` not, int64 `(batch,)`.
    """

    loss: Tensor
    nll: Tensor
    kl: Tensor
    tokens: Tensor

    @property
    def neg_elbo(self) -> Tensor:
        """The negative evidence lower bound nll + kl, unweighted, nats per sentence, `(batch,)`."""
        return self.nll + self.kl


class SentenceVAE(Pretrained):
    """Sentence VAE: q(z|x) from a vector of the sentence, p(x|z) from a language model that sees z at every step.

    `config` holds the constructor's arguments: `SentenceVAE(**model.config)` builds the same model.

    Args:
        vocab_size: number of tokens V.
        encoder, decoder: "lstm", "gru" or "transformer", in any pairing. `LSTMDecoder` and `TransformerDecoder` tell
            how z enters.
        embed_dim: size of the token embeddings.
        hidden_size: size of the encoder's and the decoder's state.
        latent_dim: size of z, at least 1.
        num_layers: layers of the decoder, and of the encoder unless `encoder_layers` says otherwise.
        num_heads, feedforward_size, positions: of a Transformer, as `TransformerEncoder`.
        word_dropout: share of the decoder's input words replaced by `<unk>` in training.
        dropout: share of the encoder's final state and of the decoder's states dropped in training.
        layer_dropout: share of the states dropped in training on the way from layer to layer; in a Transformer of all
            that joins a shortcut, of the attention and of the inner layers.
        embedding_dropout: share of the words of the vocabulary read as zeros in a step of training.
        variational_dropout: drop the same entries of the states at all steps of a sentence.
        tie_weights: the decoder's output layer uses its embedding; needs `embed_dim == hidden_size`.
        share_embedding: encoder and decoder use the same embedding.
        batch_norm: gamma of a `BatchNormGaussianHead`, which keeps the KL above latent_dim * gamma^2 / 2 nats; 0 leaves
            the posterior's means as they are.
        bag_of_words: weight of an auxiliary loss, in which z alone tells the words of the sentence in any order (Zhao
            et al., Learning Discourse-level Diversity for Neural Dialog Models, 2017, section 3.3); 0 for none.
        encoder_noise: "drop", "blank", "substitute" or "shuffle" the words that the encoder reads in training, as
            `noisy_words`: a denoising auto-encoder; None for none.
        encoder_noise_level: share of the words that it hits; of "shuffle" how many places a word may move.
        regularizer: "kl"; "none" makes z the posterior's mean: a plain auto-encoder; "adversarial" does likewise and
            has a `LatentAdversary` pull these codes towards N(0, I). Without "kl" the KL counts as 0, and the -ELBO
            is the reconstruction alone: no bound of anything.
        pad_index, bos_index, eos_index, unk_index: special tokens, by default as `fastvae.data.Vocabulary`.

    Sources: Bowman et al., Generating Sentences from a Continuous Space (2016); of the options, in the classes and
    functions named.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        encoder: str = "lstm",
        decoder: str = "lstm",
        embed_dim: int = 256,
        hidden_size: int = 256,
        latent_dim: int = 32,
        num_layers: int = 1,
        encoder_layers: int | None = None,
        num_heads: int = 4,
        feedforward_size: int | None = None,
        positions: Positions = "sinusoidal",
        word_dropout: float = 0.0,
        dropout: float = 0.0,
        layer_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        variational_dropout: bool = False,
        tie_weights: bool = False,
        share_embedding: bool = False,
        batch_norm: float = 0.0,
        bag_of_words: float = 0.0,
        encoder_noise: str | None = None,
        encoder_noise_level: float = 0.1,
        regularizer: str = "kl",
        pad_index: int = 0,
        bos_index: int = 2,
        eos_index: int = 3,
        unk_index: int = 1,
    ) -> None:
        config: dict[str, Any] = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.config = config
        for name, kind, kinds in (("encoder", encoder, ENCODERS), ("decoder", decoder, DECODERS)):
            if kind not in kinds:
                raise ValueError(f"{name}: expected one of {', '.join(kinds)}, got {kind!r}")
        if regularizer not in REGULARIZERS:
            raise ValueError(f"regularizer: expected one of {', '.join(REGULARIZERS)}, got {regularizer!r}")
        if not 0 <= bag_of_words < float("inf"):
            raise ValueError(f"bag_of_words: expected a weight of at least 0, got {bag_of_words}")
        if encoder_noise is not None:
            check_noise(encoder_noise, encoder_noise_level)
        self.bag_of_words, self.regularizer = bag_of_words, regularizer
        self.encoder_noise, self.encoder_noise_level = encoder_noise, encoder_noise_level
        shared: dict[str, Any] = {
            "dropout": dropout,
            "layer_dropout": layer_dropout,
            "embedding_dropout": embedding_dropout,
            "variational_dropout": variational_dropout,
            "pad_index": pad_index,
        }
        attention = {"num_heads": num_heads, "feedforward_size": feedforward_size, "positions": positions}
        self.latent_dim = latent_dim
        self.head = (
            BatchNormGaussianHead(hidden_size, latent_dim, batch_norm)
            if batch_norm
            else GaussianHead(hidden_size, latent_dim)
        )
        self.decoder: SentenceDecoder = DECODERS[decoder](
            vocab_size,
            embed_dim,
            hidden_size,
            latent_dim,
            num_layers=num_layers,
            word_dropout=word_dropout,
            tie_weights=tie_weights,
            bos_index=bos_index,
            eos_index=eos_index,
            unk_index=unk_index,
            **shared | (attention if decoder == "transformer" else {}),
        )
        self.encoder: SentenceEncoder = ENCODERS[encoder](
            vocab_size,
            embed_dim,
            hidden_size,
            num_layers=num_layers if encoder_layers is None else encoder_layers,
            embedding=self.decoder.embedding if share_embedding else None,
            **shared | (attention if encoder == "transformer" else {}),
        )

        self.words = self.adversary = None
        if bag_of_words:
            self.words = nn.Sequential(
                nn.Linear(latent_dim, hidden_size), nn.Tanh(), nn.Linear(hidden_size, vocab_size)
            )
        if regularizer == "adversarial":
            self.adversary = LatentAdversary(latent_dim, hidden_size)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        *,
        kl_weight: float | Tensor = 1.0,
        free_bits: float = 0.0,
        free_bits_per: str = "dimension",
        generator: torch.Generator | None = None,
        seed: Tensor | None = None,
    ) -> SentenceVAEOutput:
        """One-sample estimate of the negative ELBO of each sentence.

        With `free_bits` lambda, the loss takes the sum over latent dimensions d of max(lambda, mean over
        the batch of KL_d) in place of the mean KL (Kingma et al. 2016, equation 15): below lambda nats a
        dimension gets no gradient from the KL. Per batch, it takes max(lambda, mean KL) of the whole z. Under DDP the
        mean is each process's own.

        Args:
            tokens: `(batch, time)` int64, each row `<s> ... </s>`, padded on the right.
            lengths: `(batch,)` int64, `<s>` and `</s>` counted; None counts the tokens that are not padding.
            kl_weight: weight of the KL in `loss`. In a compiled graph, give a 0-dim tensor to
                change it from step to step without compiling again. Of an adversary, the weight of what it tells
                the encoder.
            free_bits: lambda, nats per latent dimension, or in all.
            free_bits_per: "dimension" or "batch".
            generator: source of the noise, all kinds of it, and of word dropout; the global generator when None.
            seed: int64 tensor of shape (1,) that fixes them, in place of `generator`; the form to use in
                a compiled graph. `dropout` follows torch's global generator in any case.

        Returns:
            loss, nll, kl and the number of predicted tokens; `.neg_elbo` is unweighted.

        Raises:
            TypeError, ValueError, IndexError: as `LSTMDecoder.forward`; ValueError for negative `free_bits`, or
                some without a KL.
        """
        check_free_bits(free_bits, free_bits_per)
        if free_bits and self.regularizer != "kl":
            raise ValueError(f"free_bits: expected 0 with regularizer {self.regularizer!r}, got {free_bits}")
        lengths = checked_lengths(tokens, lengths, self.decoder.pad_index, shortest=2)

        def source(stream: int) -> dict[str, Any]:
            # One seed for all would make z, word dropout and the rest from the same random numbers.
            distance = (stream * _STREAM + 2**63) % 2**64 - 2**63  # as an int64 would wrap
            return {"generator": generator, "seed": None if seed is None else seed + distance}

        hidden = self.encoder(*self._read(tokens, lengths, **source(2)))
        if self.regularizer == "kl":
            z, kl_per_dimension, _, _ = self.head(hidden, reduction="none", **source(0))
        else:
            z = self.head.parameters_of(hidden)[0]
            kl_per_dimension = torch.zeros_like(z, dtype=compute_dtype(z))
        nll = self.decoder(tokens, z, lengths, **source(1))
        kl = kl_per_dimension.sum(-1)
        charged = free_bits_kl(kl_per_dimension, free_bits, free_bits_per) if free_bits > 0 else kl.mean()
        loss = nll.mean() + kl_weight * charged
        if self.adversary is not None:
            loss = loss + self.adversary(z, kl_weight, **source(3))
        if self.words is not None:
            last: Any = self.words[-1]
            inner = lengths - 2  # neither <s> nor </s>
            bag = bag_of_words_loss(self.words[:-1](z), last.weight, tokens[:, 1:], last.bias, lengths=inner)
            loss = loss + self.bag_of_words * bag
        return SentenceVAEOutput(loss, nll, kl, lengths - 1)

    def _read(
        self, tokens: Tensor, lengths: Tensor, generator: torch.Generator | None, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the encoder reads in training."""
        if self.encoder_noise is None or not self.training:
            return tokens, lengths
        special = (self.decoder.pad_index, self.decoder.bos_index, self.decoder.eos_index, self.decoder.unk_index)
        return noisy_words(
            tokens,
            lengths,
            self.encoder_noise,
            self.encoder_noise_level,
            vocab_size=self.decoder.vocab_size,
            unk_index=self.config["unk_index"],
            special=tuple(index for index in special if index is not None),
            generator=generator,
            seed=seed,
        )

    def encode(self, tokens: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Posterior q(z|x) of each sentence.

        Args:
            tokens: `(batch, time)` int64, as in `forward`.
            lengths: `(batch,)` int64, as in `forward`.

        Returns:
            mean and log_var, each `(batch, latent_dim)`. Without a KL the posterior is a point, for which a log_var of
            -20 stands.
        """
        lengths = checked_lengths(tokens, lengths, self.decoder.pad_index, shortest=2)
        mean, log_var = self.head.parameters_of(self.encoder(tokens, lengths))
        return mean, log_var if self.regularizer == "kl" else torch.full_like(log_var, -20.0)

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
            z: `(batch, latent_dim)`.
            max_length: most tokens to write, `</s>` counted.
            strategy: "greedy", "sample" or "beam".
            options: further arguments of `LSTMDecoder.generate`, such as `temperature` or `beam_size`.

        Returns:
            tokens `(batch, length)` without `<s>`, and lengths `(batch,)`, as `LSTMDecoder.generate`.
        """
        return self.decoder.generate(z, max_length, strategy, **options)

    def reconstruct(self, tokens: Tensor, lengths: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
        """Write each sentence again from its posterior mean, without dropout, greedily unless told.

        Args:
            tokens: `(batch, time)` int64, as in `forward`.
            lengths: `(batch,)` int64, as in `forward`.
            options: arguments of `decode`.

        Returns:
            As `decode`.
        """
        return self.decode(self.posterior_mean(tokens, lengths), **options)

    def sample(
        self,
        n: int,
        *,
        strategy: Literal["greedy", "sample", "beam"] = "sample",
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """Write n new sentences from z ~ N(0, I).

        Args:
            n: number of sentences, at least 1.
            strategy: as in `decode`; by default the words are drawn too.
            generator: source of z and of the words; the global generator when None.
            options: further arguments of `decode`.

        Returns:
            As `decode`.
        """
        if n < 1:
            raise ValueError(f"n: expected at least 1 sentence, got {n}")
        weight = self.head.linear.weight
        z = torch.randn(n, self.latent_dim, generator=generator, device=weight.device, dtype=weight.dtype)
        return self.decode(z, strategy=strategy, generator=generator, **options)

    def interpolate(self, a: Tensor, b: Tensor, steps: int, **options: Any) -> tuple[Tensor, ...]:
        """Write sentences along the straight line between two posterior means.

        Args:
            a: the first sentence, `(time,)` or `(1, time)` int64, `<s> ... </s>`.
            b: the last sentence, likewise.
            steps: number of sentences, both ends included, at least 2.
            options: arguments of `decode`; greedy unless told.

        Returns:
            As `decode`, with a batch of `steps`.
        """
        return self.decode(latent_line(self.posterior_mean, a, b, steps), **options)

    @torch.no_grad()
    def importance_weighted_nll(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        *,
        num_samples: int = 500,
        chunk: int = 50,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Importance-weighted estimate of -log p(x), a bound that tightens as samples are added.

        -log 1/S sum over s of p(x|z_s) p(z_s) / q(z_s|x), z_s ~ q(z|x), without dropout or gradient.
        With one sample it estimates the negative ELBO.

        Args:
            tokens: `(batch, time)` int64, as in `forward`.
            lengths: `(batch,)` int64, as in `forward`.
            num_samples: S, samples of z for each sentence.
            chunk: samples decoded at a time: memory grows with batch * chunk.
            generator: source of the samples; the global generator when None.

        Returns:
            Nats per sentence, float64, `(batch,)`.

        Raises:
            ValueError: if `num_samples` or `chunk` is below 1, for an auto-encoder without a KL, and as `forward`.

        Source: Burda et al., Importance Weighted Autoencoders (2016), equation 8.
        """
        if self.regularizer != "kl":
            raise ValueError(f"regularizer {self.regularizer!r} has no posterior density to weigh samples by")
        lengths = checked_lengths(tokens, lengths, self.decoder.pad_index, shortest=2)
        with evaluating(self):
            hidden = self.encoder(tokens, lengths)

            def draw(samples: int) -> tuple[Tensor, Tensor]:
                z, log_ratio, _ = self.head.weighted_samples(hidden, samples, generator=generator)
                return -self.decoder(tokens, z, lengths), log_ratio

            return importance_weighted_nll(draw, num_samples, chunk)

    @torch.no_grad()
    def posterior_mean(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Give the mean of q(z|x).

        Args:
            tokens, lengths: as in `forward`.

        Returns:
            `(batch, latent_dim)`, without dropout.
        """
        with evaluating(self):
            return self.encode(tokens, lengths)[0]
