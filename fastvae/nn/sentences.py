"""What the sentence encoders and decoders of every kind share: settings, checks, losses, generation.

`fastvae.nn.lstm`, `gru` and `transformer` say how hidden states come about; what is here asks for these and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from fastvae.functional import linear_cross_entropy
from fastvae.nn.cells import Cell
from fastvae.nn.dropout import dropout
from fastvae.nn.generation import generate, stream
from fastvae.ops.generation import Recurrence

_IGNORED = -100


class EncoderSettings(TypedDict, total=False):
    """What all encoders take beside their sizes; `LSTMEncoder` tells what they mean."""

    num_layers: int
    dropout: float
    layer_dropout: float
    embedding_dropout: float
    variational_dropout: bool
    pad_index: int | None
    embedding: nn.Embedding | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class DecoderSettings(TypedDict, total=False):
    """What all decoders take beside their sizes; `LSTMDecoder` tells what they mean."""

    num_layers: int
    word_dropout: float
    dropout: float
    layer_dropout: float
    embedding_dropout: float
    variational_dropout: bool
    tie_weights: bool
    pad_index: int | None
    bos_index: int | None
    eos_index: int | None
    unk_index: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class SentenceNetwork(nn.Module):
    """Sizes, shares to drop and the embedding, which encoders and decoders have alike."""

    embedding: nn.Embedding
    cell: Cell | None = None  # of a recurrence

    def _settle(
        self,
        vocab_size: int,
        embed_dim: int,
        hidden_size: int,
        *,
        num_layers: int,
        dropout: float,
        layer_dropout: float,
        embedding_dropout: float,
        variational_dropout: bool,
        pad_index: int | None,
    ) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
        shares = {"dropout": dropout, "layer_dropout": layer_dropout, "embedding_dropout": embedding_dropout}
        for name, share in shares.items():
            check_probability(name, share)
        check_indices(vocab_size, pad_index=pad_index)
        self.vocab_size = vocab_size
        self.embed_dim = embed_dim
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.dropout = dropout
        self.layer_dropout = layer_dropout
        self.embedding_dropout = embedding_dropout
        self.variational_dropout = variational_dropout
        self.pad_index = pad_index

    def _made_like(self) -> dict[str, Any]:
        return {"device": self.embedding.weight.device, "dtype": self.embedding.weight.dtype}

    def _words(self) -> Tensor:
        """Give the embedding's weight, in training without the words that `embedding_dropout` drops."""
        weight = self.embedding.weight
        if not self.training or not self.embedding_dropout:
            return weight
        return weight * dropout(weight.new_ones(len(weight), 1), self.embedding_dropout)

    def _dropped(self, hidden: Tensor, probability: float) -> Tensor:
        if not self.variational_dropout or not self.training:
            return dropout(hidden, probability, self.training)
        return hidden * dropout(torch.ones_like(hidden[..., :1, :]), probability)


class SentenceEncoder(SentenceNetwork):
    """Reads a sentence and gives a vector; `LSTMEncoder` tells the settings, a subclass has `_read`."""

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        hidden_size: int,
        *,
        num_layers: int = 1,
        dropout: float = 0.0,
        layer_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        variational_dropout: bool = False,
        pad_index: int | None = None,
        embedding: nn.Embedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._settle(
            vocab_size,
            embed_dim,
            hidden_size,
            num_layers=num_layers,
            dropout=dropout,
            layer_dropout=layer_dropout,
            embedding_dropout=embedding_dropout,
            variational_dropout=variational_dropout,
            pad_index=pad_index,
        )
        if embedding is None:
            embedding = nn.Embedding(vocab_size, embed_dim, device=device, dtype=dtype)
            reset_embedding(embedding)
        elif tuple(embedding.weight.shape) != (vocab_size, embed_dim):
            raise ValueError(
                f"embedding: expected shape (vocab_size, embed_dim) = {(vocab_size, embed_dim)}, "
                f"got {tuple(embedding.weight.shape)}"
            )
        self.embedding = embedding

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode a batch of sentences.

        Args:
            tokens: `(batch, time)` int64, `<s>` and `</s>` included, padded on the right.
            lengths: `(batch,)` int64, each in 1..time; None counts the tokens that are not padding.

        Returns:
            A vector of each sentence, `(batch, hidden_size)`: of a recurrence the last layer's state after the last
            token, of a Transformer the mean of the last layer's states.

        Raises:
            TypeError, ValueError: for a wrong shape or dtype; for lengths out of range, on CPU outside
                compiled graphs only.
            IndexError: for a token out of range (on CUDA the sentence's result is NaN instead, or the kernel stops).
        """
        lengths = checked_lengths(tokens, lengths, self.pad_index, shortest=1)
        return dropout(self._read(tokens, lengths), self.dropout, self.training)

    def _read(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """List the settings for `print`."""
        return (
            f"{self.vocab_size}, {self.embed_dim}, {self.hidden_size}, num_layers={self.num_layers}, "
            f"dropout={self.dropout}, layer_dropout={self.layer_dropout}"
        )


class SentenceDecoder(SentenceNetwork):
    """Language model over sentences given a latent vector.

    `LSTMDecoder` tells the settings; a subclass has `_states` and `recurrence`.
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        hidden_size: int,
        latent_dim: int,
        *,
        num_layers: int = 1,
        word_dropout: float = 0.0,
        dropout: float = 0.0,
        layer_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        variational_dropout: bool = False,
        tie_weights: bool = False,
        pad_index: int | None = None,
        bos_index: int | None = None,
        eos_index: int | None = None,
        unk_index: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._settle(
            vocab_size,
            embed_dim,
            hidden_size,
            num_layers=num_layers,
            dropout=dropout,
            layer_dropout=layer_dropout,
            embedding_dropout=embedding_dropout,
            variational_dropout=variational_dropout,
            pad_index=pad_index,
        )
        check_probability("word_dropout", word_dropout)
        check_indices(vocab_size, bos_index=bos_index, eos_index=eos_index, unk_index=unk_index)
        if latent_dim < 0:
            raise ValueError(f"latent_dim: expected at least 0, got {latent_dim}")
        if word_dropout > 0 and unk_index is None:
            raise ValueError("unk_index: expected the index of <unk> when word_dropout > 0, got None")
        if tie_weights and embed_dim != hidden_size:
            raise ValueError(f"tie_weights: expected embed_dim equal to hidden_size, got {embed_dim} and {hidden_size}")
        self.latent_dim = latent_dim
        self.word_dropout = word_dropout
        self.tie_weights = tie_weights
        self.bos_index = bos_index
        self.eos_index = eos_index
        self.unk_index = unk_index
        self.embedding = nn.Embedding(vocab_size, embed_dim, device=device, dtype=dtype)
        self.output = nn.Linear(hidden_size, vocab_size, device=device, dtype=dtype)

    def _tie(self) -> None:
        if self.tie_weights:
            self.output.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        z: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Negative log-likelihood -log p(x|z) of each sentence.

        Inputs are `tokens[:, :-1]`, targets `tokens[:, 1:]`; the logits are never whole in memory.

        Args:
            tokens: `(batch, time)` int64, each row `<s> ... </s>`, padded on the right.
            z: `(batch, latent_dim)`; None for `latent_dim=0`. Or several samples for each sentence,
                `(samples, batch, latent_dim)`: they share the work on the tokens, and the dropped words.
            lengths: `(batch,)` int64, each in 1..time, `<s>` and `</s>` counted; None counts the tokens
                that are not padding.
            generator: source of the word dropout; the global generator when None.
            seed: int64 tensor of shape (1,) that fixes the word dropout, in place of `generator`; the
                form to use in a compiled graph.

        Returns:
            nll in nats, summed over each sentence's targets, float32 (float64 for float64 parameters),
            `(batch,)` or `(samples, batch)`.

        Raises:
            TypeError, ValueError: for a wrong shape or dtype; for lengths out of range, on CPU outside
                compiled graphs only.
            IndexError: for a token out of range (on CUDA the sentence's result is NaN instead).
        """
        hidden, lengths = self._hidden(tokens, z, lengths, generator, seed)
        targets = tokens[:, 1:]
        beyond = torch.arange(targets.size(1), device=tokens.device) >= (lengths - 1).unsqueeze(1)
        losses = linear_cross_entropy(
            hidden,
            self.output.weight,
            targets.masked_fill(beyond, _IGNORED).expand(hidden.shape[:-1]),
            self.output.bias,
            ignore_index=_IGNORED,
            reduction="none",
        )
        return losses.sum(-1)

    def logits(
        self,
        tokens: Tensor,
        z: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Unnormalized log-probabilities of each next token, for uses that need them whole.

        Args: as `forward`.

        Returns:
            `(batch, time - 1, V)`, with samples `(samples, batch, time - 1, V)`. Position t scores
            `tokens[:, t + 1]`. Beyond a sentence's end the hidden state is zero and the logits are the output bias.
        """
        hidden, _ = self._hidden(tokens, z, lengths, generator, seed)
        logits: Tensor = self.output(hidden)
        return logits

    def generate(
        self,
        z: Tensor | None,
        max_length: int,
        strategy: Literal["greedy", "sample", "beam"] = "greedy",
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        beam_size: int = 5,
        length_penalty: float = 0.0,
        n_best: int = 1,
        no_repeat_ngram: int = 0,
        prefix: Tensor | None = None,
        seeds: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_log_probs: bool = False,
    ) -> tuple[Tensor, ...]:
        """Write one sentence for each latent vector.

        No dropout is applied, in either mode, and no gradient recorded. `<pad>` and `<s>` are never
        written. A sentence that has not ended after `max_length` tokens is cut there. On the CPU a
        sentence is the same, to the bit, whatever the batch around it and the number of threads.

        Args:
            z: `(batch, latent_dim)`. For `latent_dim=0`: `(batch, 0)`, or None for one sentence, or for
                as many as `prefix` or `seeds` has.
            max_length: most tokens to write, `</s>` counted, at least 1.
            strategy: "greedy" takes the likeliest token at each step, "sample" draws it, "beam" keeps
                the `beam_size` likeliest beginnings and gives the best sentences found.
            temperature: "sample" divides the logits by it; above 0.
            top_k: "sample" draws among the k likeliest tokens only; 0 for all.
            top_p: "sample" draws among the fewest likeliest tokens that hold this much probability,
                after temperature and `top_k`; in (0, 1].
            beam_size: number of beginnings kept by "beam"; 1 gives the greedy sentence.
            length_penalty: "beam" ranks by log p(x|z) / length ** length_penalty: 0 ranks by
                likelihood, 1 by the mean per token.
            n_best: number of sentences that "beam" gives for each latent, the best first, at most
                `beam_size`. Behind those that ended stand the likeliest beginnings, cut; where there are
                too few even of these, sentences of length 0.
            no_repeat_ngram: no n-gram of this size occurs twice in a sentence; 0 allows all.
            prefix: tokens to begin with, `(batch, at most max_length)` int64, padded on the right with
                `pad_index` (`eos_index` if that is None). They count as written.
            seeds: `(batch,)` int64: the draws of a sentence depend on its own seed alone.
            generator: source of the seeds when they are not given; the global generator when None.
            return_log_probs: also return the tokens' log-probabilities.

        Returns:
            tokens `(batch, length)` int64, length at most `max_length`: no `<s>`, `</s>` kept, then
            padding; lengths `(batch,)` int64 with `</s>` counted; and with `return_log_probs` each
            token's log p under the model itself (temperature 1, whole vocabulary), in nats, zero
            at padding, `(batch, length)`. For n_best above 1 each has a dimension `n_best` after `batch`.

        Raises:
            TypeError, ValueError: for an argument of the wrong type, shape or range, or a decoder without
                `bos_index` or `eos_index`.
        """
        generated = generate(
            self,
            z,
            max_length,
            strategy,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            beam_size=beam_size,
            length_penalty=length_penalty,
            n_best=n_best,
            no_repeat_ngram=no_repeat_ngram,
            prefix=prefix,
            seeds=seeds,
            generator=generator,
            log_probs=return_log_probs,
        )
        return generated if return_log_probs else generated[:2]

    def stream(
        self,
        z: Tensor | None,
        max_length: int,
        strategy: Literal["greedy", "sample"] = "greedy",
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        no_repeat_ngram: int = 0,
        prefix: Tensor | None = None,
        seeds: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Write as `generate`, and give the tokens as they come.

        The decoder must not change until the iterator ends.

        Args:
            z, max_length, strategy, ...: as for `generate`.

        Returns:
            An iterator over the steps: tokens `(batch,)` int64, padding where a sentence has ended. It
            stops when all have.

        Raises:
            TypeError, ValueError: as `generate`, at once.
        """
        return stream(
            self,
            z,
            max_length,
            strategy,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            no_repeat_ngram=no_repeat_ngram,
            prefix=prefix,
            seeds=seeds,
            generator=generator,
        )

    def recurrence(self, z: Tensor, max_length: int) -> Recurrence:
        """Give the steps that write a sentence from each latent `(batch, latent_dim)`, for the eager loops."""
        raise NotImplementedError

    def _hidden(
        self,
        tokens: Tensor,
        z: Tensor | None,
        lengths: Tensor | None,
        generator: torch.Generator | None,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """States that predict the next token, ([samples,] batch, time - 1, hidden_size), and the checked lengths."""
        lengths = checked_lengths(tokens, lengths, self.pad_index, shortest=2)
        batch = tokens.size(0)
        if z is None and not self.latent_dim:
            z = self.output.weight.new_empty(batch, 0)
        if z is None or z.dim() not in (2, 3) or tuple(z.shape[-2:]) != (batch, self.latent_dim):
            got = "None" if z is None else str(tuple(z.shape))
            expected = f"(batch, latent_dim) = {(batch, self.latent_dim)}"
            raise ValueError(f"z: expected shape {expected}, or samples of it, got {got}")
        return self._dropped(self._states(tokens[:, :-1], z, lengths - 1, generator, seed), self.dropout), lengths

    def _states(
        self, words: Tensor, z: Tensor, lengths: Tensor, generator: torch.Generator | None, seed: Tensor | None
    ) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """List the settings for `print`."""
        return (
            f"{self.vocab_size}, {self.embed_dim}, {self.hidden_size}, {self.latent_dim}, "
            f"num_layers={self.num_layers}, word_dropout={self.word_dropout}, dropout={self.dropout}, "
            f"layer_dropout={self.layer_dropout}, tie_weights={self.tie_weights}"
        )


def checked_lengths(tokens: Tensor, lengths: Tensor | None, pad_index: int | None, *, shortest: int) -> Tensor:
    """Check a batch of sentences and give its lengths, counted from the padding when None.

    Args:
        tokens: `(batch, time)` int64, padded on the right.
        lengths: `(batch,)` int64, each in 1..time, or None.
        pad_index: the padding; None takes every sentence as `time` long.
        shortest: least width of `tokens`.

    Returns:
        lengths `(batch,)` int64 on the device of `tokens`.

    Raises:
        TypeError, ValueError: naming the argument; values are looked at on CPU, outside compiled graphs.
    """
    if tokens.dim() != 2 or tokens.size(0) < 1 or tokens.size(1) < shortest:
        raise ValueError(
            f"tokens: expected shape (batch, time) with at least one sentence and {shortest} tokens, "
            f"got {tuple(tokens.shape)}"
        )
    batch, time = tokens.shape
    # Reading values would hold up a GPU's queue and break a compiled graph.
    readable = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
    if lengths is None:
        if pad_index is None:
            return torch.full((batch,), time, dtype=torch.int64, device=tokens.device)
        words = tokens != pad_index
        if readable and (words[:, 1:] & ~words[:, :-1]).any():
            raise ValueError("tokens: expected padding only at the end of a sentence, got words behind it")
        lengths = words.sum(1)
    if lengths.dtype != torch.int64:
        raise TypeError(f"lengths: expected int64, got {lengths.dtype}")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"lengths: expected shape (batch,) = {(batch,)}, got {tuple(lengths.shape)}")
    if readable:
        low, high = (int(value) for value in lengths.aminmax())
        if low < 1 or high > time:
            raise ValueError(f"lengths: expected 1 to {time} (the width of tokens), got {low} to {high}")
    return lengths.to(tokens.device)


def reset_embedding(embedding: nn.Embedding) -> None:
    """Draw an embedding anew, uniform in +-0.1."""
    nn.init.uniform_(embedding.weight, -0.1, 0.1)


def check_probability(name: str, value: float) -> None:
    """Raise ValueError unless the argument `name` is a probability."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")


def check_indices(vocab_size: int, **indices: int | None) -> None:
    """Raise ValueError unless each argument is a token, or None."""
    for name, index in indices.items():
        if index is not None and not 0 <= index < vocab_size:
            raise ValueError(f"{name}: expected a token in [0, {vocab_size}), got {index}")
