"""Controlled generation: a sentence VAE whose decoder is also told attributes, such as the sentiment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.models.evidence import check_free_bits, evaluating, free_bits_kl, importance_weighted_nll
from fastvae.models.pretrained import Pretrained
from fastvae.models.sentence_vae import SentenceVAEOutput
from fastvae.models.text_classifier import TextClassifier
from fastvae.nn import GaussianHead, LSTMDecoder, LSTMEncoder
from fastvae.nn.sentences import checked_lengths


class SleepOutput(NamedTuple):
    """What a sentence written from a given latent vector and given attributes loses of them, in nats.

    Attributes:
        attribute_nll: -log q_D(c|x), summed over the attributes, `(batch,)`.
        latent_nll: -log q_E(z|x), `(batch,)`.
    """

    attribute_nll: Tensor
    latent_nll: Tensor


class DiscriminatorOutput(NamedTuple):
    """How the discriminators read a batch of sentences.

    Attributes:
        nll: -log q_D(c|x), summed over the attributes that are known, nats, `(batch,)`.
        entropy: of q_D(c|x), summed over the attributes, nats, `(batch,)`.
        correct: whether the likeliest value is the given one, `(batch, attributes)`; False where none is given.
    """

    nll: Tensor
    entropy: Tensor
    correct: Tensor


class ControlledTextVAE(Pretrained):
    """Sentence VAE p(x|z,c) with a discriminator q_D(c|x) for each attribute of the sentence.

    Three losses train its three parts, each by itself or in one sum; none has a gradient for another's parameters:

    - `forward`, the wake phase: the negative ELBO of real sentences, for encoder and decoder;
    - `sleep`: the decoder writes soft sentences from z ~ N(0, I) and chosen c, in which the discriminators are to find
      c and the encoder z, so that z does not come to say what c says; for the decoder alone;
    - `discriminate`: -log q_D(c|x) of real sentences, and with its entropy of generated ones, for the discriminators.

    Attributes of a sentence are a row of int64, one value for each attribute in the order of `attributes`; -1 stands
    for an unknown one.

    `config` holds the constructor's arguments: `ControlledTextVAE(**model.config)` builds the same model.

    Args:
        vocab_size: number of tokens V.
        attributes: names of the values of each attribute, such as {"sentiment": ["negative", "positive"]}.
        embed_dim, hidden_size, latent_dim, num_layers, word_dropout, dropout, layer_dropout, variational_dropout,
            tie_weights, share_embedding, pad_index, bos_index, eos_index, unk_index: as in `SentenceVAE`.
        max_length: most words of a sentence that it writes unless told otherwise, `</s>` counted.
        filters, widths, classifier_dropout: of the discriminators, as in `TextClassifier`.

    Source: Hu et al., Toward Controlled Generation of Text (2017).
    """

    def __init__(
        self,
        vocab_size: int,
        attributes: Mapping[str, Sequence[str]],
        *,
        embed_dim: int = 128,
        hidden_size: int = 256,
        latent_dim: int = 32,
        num_layers: int = 1,
        word_dropout: float = 0.3,
        dropout: float = 0.0,
        layer_dropout: float = 0.0,
        variational_dropout: bool = False,
        tie_weights: bool = False,
        share_embedding: bool = False,
        max_length: int = 60,
        filters: int = 100,
        widths: Sequence[int] = (3, 4, 5),
        classifier_dropout: float = 0.5,
        pad_index: int = 0,
        bos_index: int = 2,
        eos_index: int = 3,
        unk_index: int = 1,
    ) -> None:
        config: dict[str, Any] = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        if not attributes or any(len(values) < 2 for values in attributes.values()):
            raise ValueError(f"attributes: expected at least one, with at least 2 values each, got {dict(attributes)}")
        attributes = {name: list(values) for name, values in attributes.items()}
        self.config: dict[str, Any] = config | {"attributes": attributes, "widths": list(widths)}
        self.attributes: dict[str, list[str]] = self.config["attributes"]
        self.latent_dim = latent_dim
        self.max_length = max_length
        self.head = GaussianHead(hidden_size, latent_dim)
        layers: Any = {
            "num_layers": num_layers,
            "dropout": dropout,
            "layer_dropout": layer_dropout,
            "variational_dropout": variational_dropout,
            "pad_index": pad_index,
        }
        self.decoder = LSTMDecoder(
            vocab_size,
            embed_dim,
            hidden_size,
            latent_dim + sum(map(len, self.attributes.values())),
            word_dropout=word_dropout,
            tie_weights=tie_weights,
            bos_index=bos_index,
            eos_index=eos_index,
            unk_index=unk_index,
            **layers,
        )
        shared = self.decoder.embedding if share_embedding else None
        self.encoder = LSTMEncoder(vocab_size, embed_dim, hidden_size, embedding=shared, **layers)
        self.discriminators = nn.ModuleList(  # not by name, which may be any: a column of the user's table
            TextClassifier(
                vocab_size,
                len(values),
                embed_dim=embed_dim,
                filters=filters,
                widths=widths,
                dropout=classifier_dropout,
                pad_index=pad_index,
            )
            for values in self.attributes.values()
        )

    # Wake

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        attributes: Tensor | None = None,
        *,
        kl_weight: float | Tensor = 1.0,
        free_bits: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> SentenceVAEOutput:
        """One-sample estimate of the negative ELBO of each sentence, given its attributes (equation 4).

        Args:
            tokens: `(batch, time)` int64, each row `<s> ... </s>`, padded on the right.
            lengths: `(batch,)` int64, `<s>` and `</s>` counted; None counts the tokens that are not padding.
            attributes: `(batch, attributes)` int64; an unknown one, and all where None, is drawn from its q_D(c|x).
            kl_weight, free_bits: as in `SentenceVAE.forward`.
            generator: source of z, of unknown attributes and of word dropout; the global generator when None.

        Returns:
            loss, nll, kl and the number of predicted tokens; `.neg_elbo` is unweighted.

        Raises:
            TypeError, ValueError, IndexError: as `SentenceVAE.forward`; ValueError naming attributes.
        """
        check_free_bits(free_bits)
        lengths = checked_lengths(tokens, lengths, self.decoder.pad_index, shortest=2)
        codes = self.codes(self._known(tokens, lengths, attributes, generator))
        posterior = self.head(self.encoder(tokens, lengths), reduction="none", generator=generator)
        nll = self.decoder(tokens, torch.cat([posterior.z, codes], 1), lengths, generator=generator)
        kl = posterior.kl.sum(-1)
        charged = free_bits_kl(posterior.kl, free_bits) if free_bits > 0 else kl.mean()
        return SentenceVAEOutput(nll.mean() + kl_weight * charged, nll, kl, lengths - 1)

    # Sleep

    def sleep(
        self,
        z: Tensor,
        attributes: Tensor,
        *,
        temperature: float,
        max_length: int | None = None,
        generator: torch.Generator | None = None,
        seed: Tensor | None = None,
    ) -> SleepOutput:
        """Write soft sentences and look for their attributes and their latent in them (equations 6 and 7).

        Args:
            z: `(batch, latent_dim)`, drawn from the prior.
            attributes: `(batch, attributes)` int64, all given.
            temperature, max_length, generator, seed: as in `LSTMDecoder.generate_soft`; None takes the model's length.

        Returns:
            Both terms; encoder and discriminators are constants in them.
        """
        soft = self.decoder.generate_soft(
            self._latent(z, attributes), max_length or self.max_length, temperature, generator=generator, seed=seed
        )
        with _constant(self.encoder), _constant(self.head), _constant(self.discriminators):
            attribute_nll = self.discriminate(soft.words, soft.lengths, attributes).nll
            embedding = self.encoder.embedding.weight
            first = embedding[self.decoder.bos_index].expand(len(z), 1, -1)
            inputs = torch.cat([first, soft.words @ embedding], 1)
            parameters = self.head.parameters_of(self.encoder.forward_embedded(inputs, soft.lengths + 1))
            return SleepOutput(attribute_nll, -self.head.log_density(z, *parameters))

    # Discriminators

    def discriminate(
        self, words: Tensor, lengths: Tensor | None = None, attributes: Tensor | None = None
    ) -> DiscriminatorOutput:
        """Read sentences with the discriminators (equations 9 and 10).

        Args:
            words, lengths: as in `TextClassifier.forward`: tokens without `<s>`, or distributions over words.
            attributes: `(batch, attributes)` int64; an unknown one adds nothing to `nll`; all are where None.
        """
        if attributes is None:
            attributes = torch.full((len(words), len(self.attributes)), -1, device=words.device)
        self._check(attributes, len(words), least=-1)
        logits = self._logits(words, lengths)
        log_probs = [each.log_softmax(-1) for each in logits]
        pairs = list(zip(log_probs, attributes.unbind(1), strict=True))
        return DiscriminatorOutput(
            torch.stack([F.nll_loss(each, values, ignore_index=-1, reduction="none") for each, values in pairs]).sum(0),
            torch.stack([-(each.exp() * each).sum(-1) for each in log_probs]).sum(0),
            torch.stack([each.argmax(-1) == values for each, values in pairs], 1),
        )

    def find_attributes(self, words: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Give the likeliest attributes of sentences, `(batch, attributes)` int64; arguments as `discriminate`."""
        with evaluating(self), torch.no_grad():
            return torch.stack([each.argmax(-1) for each in self._logits(words, lengths)], 1)

    # Writing

    def encode(self, tokens: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Posterior q(z|x) of each sentence: mean and log_var, each `(batch, latent_dim)`; as `SentenceVAE.encode`."""
        lengths = checked_lengths(tokens, lengths, self.decoder.pad_index, shortest=2)
        return self.head.parameters_of(self.encoder(tokens, lengths))

    def decode(
        self,
        z: Tensor,
        attributes: Tensor,
        *,
        max_length: int | None = None,
        strategy: Literal["greedy", "sample", "beam"] = "greedy",
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """Write one sentence for each latent vector and its attributes.

        Args:
            z: `(batch, latent_dim)`.
            attributes: `(batch, attributes)` int64, all given.
            max_length, strategy, options: as in `SentenceVAE.decode`.

        Returns:
            tokens `(batch, length)` without `<s>`, and lengths `(batch,)`, as `LSTMDecoder.generate`.
        """
        return self.decoder.generate(self._latent(z, attributes), max_length or self.max_length, strategy, **options)

    def sample(
        self,
        n: int,
        chosen: Mapping[str, str] | None = None,
        *,
        strategy: Literal["greedy", "sample", "beam"] = "sample",
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """Write n new sentences from z ~ N(0, I).

        Args:
            n: number of sentences, at least 1.
            chosen: values of attributes, such as {"sentiment": "positive"}; others are drawn uniformly.
            strategy, options: as in `decode`; by default the words are drawn too.
            generator: source of everything drawn; the global generator when None.

        Returns:
            As `decode`.

        Raises:
            ValueError: there is no such attribute or value, or n is below 1.
        """
        if n < 1:
            raise ValueError(f"n: expected at least 1 sentence, got {n}")
        z = self.draw_latent(n, generator=generator)
        attributes = self.choose(self.draw_attributes(n, generator=generator), chosen or {})
        return self.decode(z, attributes, strategy=strategy, generator=generator, **options)

    @torch.no_grad()
    def transfer(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        chosen: Mapping[str, str] | None = None,
        *,
        attributes: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """Write each sentence again from its posterior mean with other attributes, greedily unless told.

        Args:
            tokens, lengths: as in `forward`.
            chosen: the values to give all sentences; without any, this is a reconstruction.
            attributes: those of the sentences, `(batch, attributes)` int64; an unknown one, and all where None, are
                what the discriminators find.
            options: arguments of `decode`.

        Returns:
            As `decode`.

        Raises:
            ValueError: there is no such attribute or value.
        """
        lengths = checked_lengths(tokens, lengths, self.decoder.pad_index, shortest=2)
        found = self.find_attributes(tokens[:, 1:], lengths - 1)
        if attributes is not None:
            self._check(attributes, len(tokens), least=-1)
            found = torch.where(attributes < 0, found, attributes)
        with evaluating(self):
            mean, _ = self.encode(tokens, lengths)
        return self.decode(mean, self.choose(found, chosen or {}), **options)

    def reconstruct(self, tokens: Tensor, lengths: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
        """Write each sentence again from its posterior mean and the attributes found in it: `transfer` to none."""
        return self.transfer(tokens, lengths, **options)

    def draw_latent(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw z ~ N(0, I), `(n, latent_dim)`."""
        weight = self.head.linear.weight
        return torch.randn(n, self.latent_dim, generator=generator, device=weight.device, dtype=weight.dtype)

    def draw_attributes(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw attributes, uniformly and independently, `(n, attributes)` int64."""
        device = self.head.linear.weight.device
        columns = [
            torch.randint(len(values), (n,), generator=generator, device=device) for values in self.attributes.values()
        ]
        return torch.stack(columns, 1)

    def choose(self, attributes: Tensor, chosen: Mapping[str, str]) -> Tensor:
        """Give a copy of attributes `(batch, attributes)` with the chosen values, by name, in place of theirs.

        Raises:
            ValueError: there is no such attribute or value.
        """
        attributes = attributes.clone()
        for name, value in chosen.items():
            if name not in self.attributes:
                raise ValueError(f"attribute: expected one of {', '.join(self.attributes)}, got {name!r}")
            values = self.attributes[name]
            if value not in values:
                raise ValueError(f"{name}: expected one of {', '.join(values)}, got {value!r}")
            attributes[:, list(self.attributes).index(name)] = values.index(value)
        return attributes

    def codes(self, attributes: Tensor) -> Tensor:
        """Give attributes as the decoder reads them: one-hot vectors side by side, `(batch, values of all)`."""
        sizes = map(len, self.attributes.values())
        pairs = zip(attributes.unbind(1), sizes, strict=True)
        return torch.cat([F.one_hot(values, size) for values, size in pairs], 1).to(self.head.linear.weight.dtype)

    @torch.no_grad()
    def importance_weighted_nll(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        attributes: Tensor | None = None,
        *,
        num_samples: int = 500,
        chunk: int = 50,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Importance-weighted estimate of -log p(x|c) of each sentence, nats, float64, `(batch,)`.

        Args:
            tokens, lengths, attributes: as in `forward`.
            num_samples, chunk, generator: as in `SentenceVAE.importance_weighted_nll`.
        """
        lengths = checked_lengths(tokens, lengths, self.decoder.pad_index, shortest=2)
        with evaluating(self):
            codes = self.codes(self._known(tokens, lengths, attributes, generator))
            hidden = self.encoder(tokens, lengths)

            def draw(samples: int) -> tuple[Tensor, Tensor]:
                z, log_ratio, _ = self.head.weighted_samples(hidden, samples, generator=generator)
                latent = torch.cat([z, codes.expand(samples, -1, -1)], 2)
                return -self.decoder(tokens, latent, lengths), log_ratio

            return importance_weighted_nll(draw, num_samples, chunk)

    # Details

    def _latent(self, z: Tensor, attributes: Tensor) -> Tensor:
        self._check(attributes, len(z), least=0)
        return torch.cat([z, self.codes(attributes)], 1)

    def _logits(self, words: Tensor, lengths: Tensor | None) -> list[Tensor]:
        return [discriminator(words, lengths) for discriminator in self.discriminators]

    @torch.no_grad()
    def _known(
        self, tokens: Tensor, lengths: Tensor, attributes: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Attributes with the unknown ones drawn from q_D(c|x)."""
        if attributes is not None:
            self._check(attributes, len(tokens), least=-1)
            if attributes.device.type == "cpu" and bool((attributes >= 0).all()):
                return attributes
        logits = self._logits(tokens[:, 1:], lengths - 1)
        drawn = torch.cat([each.softmax(-1).multinomial(1, generator=generator) for each in logits], 1)
        return drawn if attributes is None else torch.where(attributes < 0, drawn, attributes)

    def _check(self, attributes: Tensor, batch: int, *, least: int) -> None:
        shape = (batch, len(self.attributes))
        if tuple(attributes.shape) != shape or attributes.dtype != torch.int64:
            got = f"{tuple(attributes.shape)} of {attributes.dtype}"
            raise ValueError(f"attributes: expected int64 of shape (batch, attributes) = {shape}, got {got}")
        if attributes.device.type != "cpu" or torch.compiler.is_compiling():
            return  # reading values would hold up a GPU's queue
        for (name, values), column in zip(self.attributes.items(), attributes.unbind(1), strict=True):
            low, high = (int(end) for end in column.aminmax()) if len(column) else (0, 0)
            if low < least or high >= len(values):
                raise ValueError(
                    f"attributes: expected values of {name} in [{least}, {len(values)}), got {low} to {high}"
                )


@contextmanager
def _constant(module: nn.Module) -> Iterator[None]:
    """Record no gradient for the parameters of a module in what it computes here."""
    learnt = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learnt:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learnt:
            parameter.requires_grad_(True)
