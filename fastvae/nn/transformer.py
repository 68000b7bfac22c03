"""Transformer encoder and decoder for sentences, on `F.scaled_dot_product_attention`.

A layer is pre-norm: hidden + attention(norm(hidden)), in the decoder + what the latent gives, then
hidden + feedforward(norm(hidden)); a last norm follows the last layer. The decoder's memory is the latent: one vector.
Attention over one vector gives that vector's value, whatever is asked, so cross-attention comes down to a linear map of
z for each layer, the same at all steps of a sentence.

Sources: Vaswani et al., Attention Is All You Need (2017); norms before the layers: Xiong et al., On Layer Normalization
in the Transformer Architecture (2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.nn.sentences import (
    DecoderSettings,
    EncoderSettings,
    SentenceDecoder,
    SentenceEncoder,
    SentenceNetwork,
    reset_embedding,
)
from fastvae.ops.backend import compute_dtype
from fastvae.ops.generation import Recurrence, States, linear_rows
from fastvae.ops.random import seed_of
from fastvae.ops.recurrence import dropped_tokens

Positions = Literal["sinusoidal", "learned"]


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward network, each behind a norm and beside a shortcut.

    Args:
        hidden_size: size H of the states.
        num_heads: of the attention, a divisor of H.
        feedforward_size: size of the inner layer, which is rectified.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        feedforward_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(hidden_size, **made)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size, **made)
        self.attended = nn.Linear(hidden_size, hidden_size, **made)
        self.norm_feedforward = nn.LayerNorm(hidden_size, **made)
        self.inner = nn.Linear(hidden_size, feedforward_size, **made)
        self.outer = nn.Linear(feedforward_size, hidden_size, **made)

    def forward(
        self,
        hidden: Tensor,
        *,
        visible: Tensor | None = None,
        memory: Tensor | None = None,
        dropout: float = 0.0,
        dropped: Callable[[Tensor], Tensor] = lambda hidden: hidden,
    ) -> Tensor:
        """Let each position see others, then itself.

        Args:
            hidden: `(..., time, H)`.
            visible: `(batch, 1, 1, time)` bool, positions that may be seen; None for all that are not to the right.
            memory: what the latent gives, `(..., 1, H)`, which may have more dimensions in front than `hidden`.
            dropout: share of the attention that is dropped.
            dropped: applied to what joins a shortcut, and to the inner layer.

        Returns:
            As `hidden`, with the leading dimensions of `memory`.
        """
        rows = self.norm_attention(hidden).flatten(0, -3)
        projected = self.query_key_value(rows).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, dropout_p=dropout, is_causal=visible is None
        )
        hidden = hidden + dropped(self.attended(seen.transpose(1, 2).flatten(2))).view_as(hidden)
        if memory is not None:
            hidden = hidden + memory
        return hidden + dropped(self.outer(dropped(self.inner(self.norm_feedforward(hidden)).relu())))


class _Transformer(SentenceNetwork):
    """What encoder and decoder have in common: embeddings with positions, layers, the last norm."""

    positions: nn.Embedding | None

    def _add_layers(
        self, num_heads: int, feedforward_size: int | None, positions: Positions, max_positions: int
    ) -> None:
        size, made = self.hidden_size, self._made_like()
        if num_heads < 1 or size % num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size {size}, got {num_heads}")
        if positions not in ("sinusoidal", "learned"):
            raise ValueError(f"positions: expected 'sinusoidal' or 'learned', got {positions!r}")
        inner = 4 * size if feedforward_size is None else feedforward_size
        for name, value in (("feedforward_size", inner), ("max_positions", max_positions)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.num_heads = num_heads
        self.input = None if self.embed_dim == size else nn.Linear(self.embed_dim, size, **made)
        self.positions = nn.Embedding(max_positions, size, **made) if positions == "learned" else None
        self.layers = nn.ModuleList(TransformerLayer(size, num_heads, inner, **made) for _ in range(self.num_layers))
        self.norm = nn.LayerNorm(size, **made)

    def _reset_layers(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()
        if self.positions is not None:  # begins as the other kind, which tells near from far at once
            with torch.no_grad():
                self.positions.weight.copy_(_sinusoids(self.positions.weight))

    def position_vectors(self, time: int) -> Tensor:
        """Give the vectors of the first `time` positions, `(time, hidden_size)`.

        Raises:
            ValueError: for more than `max_positions` learned ones.
        """
        if self.positions is None:
            return _sinusoids(self.norm.weight.new_empty(time, self.hidden_size))
        if time > len(self.positions.weight):
            most = len(self.positions.weight)
            raise ValueError(f"tokens: expected at most max_positions = {most} learned positions, got {time}")
        return self.positions.weight[:time]

    def _embedded(self, words: Tensor) -> Tensor:
        """Words (batch, time) as the first layer takes them, (batch, time, H)."""
        # The embeddings are small, as an output layer tied to them wants; beside positions of size 1 they count alike.
        hidden = F.embedding(words, self._words()) * math.sqrt(self.embed_dim)
        if self.input is not None:
            hidden = self.input(hidden)
        return self._dropped(hidden + self.position_vectors(words.size(1)), self.layer_dropout)

    def _layer_settings(self) -> dict[str, Any]:
        if not self.training:
            return {}
        return {"dropout": self.layer_dropout, "dropped": lambda hidden: self._dropped(hidden, self.layer_dropout)}


class TransformerEncoder(_Transformer, SentenceEncoder):
    """Reads a sentence, every word of which sees all others, and gives the mean of the last states.

    Args:
        vocab_size: number of tokens V.
        embed_dim: size E of the token embeddings; a linear layer follows where it is not `hidden_size`.
        hidden_size: size H of the states.
        num_heads: of the attention, a divisor of H.
        feedforward_size: size of the inner layer; 4 H when None.
        positions: "sinusoidal", or "learned", which begin as these.
        max_positions: most tokens of a sentence with learned positions.
        settings: num_layers, dropout, embedding_dropout, variational_dropout, pad_index, embedding, device and dtype,
            as for `LSTMEncoder`; `layer_dropout` is the share dropped of the embedded words, of the attention, of the
            inner layers and of all that joins a shortcut.
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        hidden_size: int,
        *,
        num_heads: int = 4,
        feedforward_size: int | None = None,
        positions: Positions = "sinusoidal",
        max_positions: int = 512,
        **settings: Unpack[EncoderSettings],
    ) -> None:
        super().__init__(vocab_size, embed_dim, hidden_size, **settings)
        self._add_layers(num_heads, feedforward_size, positions, max_positions)
        self._reset_layers()

    def _read(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        valid = torch.arange(tokens.size(1), device=tokens.device) < lengths.unsqueeze(1)
        hidden = self._embedded(tokens.where(valid, 0))
        for layer in self.layers:
            hidden = layer(hidden, visible=valid[:, None, None], **self._layer_settings())
        hidden = self.norm(hidden).masked_fill(~valid.unsqueeze(2), 0.0)
        return hidden.sum(1) / lengths.unsqueeze(1)


class TransformerDecoder(_Transformer, SentenceDecoder):
    """Language model over sentences given a latent vector, p(x|z): every word sees those before it, and the latent.

    Methods as `LSTMDecoder`. Several samples of z share the first layer's attention, which the latent does not reach.

    Parameters: `embedding.weight` (V, E); `input` (H, E) where E is not H; `positions.weight` (max_positions, H) where
    learned; `memory` (num_layers * H, latent), what z adds to each layer; `layers.n` with `norm_attention`,
    `query_key_value` (3H, H), `attended` (H, H), `norm_feedforward`, `inner` (F, H), `outer` (H, F); `norm`;
    `output` (V, H).

    Args:
        vocab_size: number of tokens V.
        embed_dim: size E of the token embeddings; a linear layer follows where it is not `hidden_size`.
        hidden_size: size H of the states.
        latent_dim: size of z, 0 for none.
        num_heads, feedforward_size, positions, max_positions: as for `TransformerEncoder`.
        settings: num_layers, word_dropout, dropout, embedding_dropout, variational_dropout, tie_weights, pad_index,
            bos_index, eos_index, unk_index, device and dtype, as for `LSTMDecoder`; `layer_dropout` as for
            `TransformerEncoder`.
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        hidden_size: int,
        latent_dim: int,
        *,
        num_heads: int = 4,
        feedforward_size: int | None = None,
        positions: Positions = "sinusoidal",
        max_positions: int = 512,
        **settings: Unpack[DecoderSettings],
    ) -> None:
        super().__init__(vocab_size, embed_dim, hidden_size, latent_dim, **settings)
        self._add_layers(num_heads, feedforward_size, positions, max_positions)
        size = self.num_layers * hidden_size
        self.memory = nn.Linear(latent_dim, size, **self._made_like()) if latent_dim else None
        self.reset_parameters()
        self._tie()

    def reset_parameters(self) -> None:
        """Draw the parameters anew: embeddings uniform in +-0.1, the rest as `nn.Linear`."""
        self._reset_layers()
        reset_embedding(self.embedding)

    def _states(
        self, words: Tensor, z: Tensor, lengths: Tensor, generator: torch.Generator | None, seed: Tensor | None
    ) -> Tensor:
        valid = torch.arange(words.size(1), device=words.device) < lengths.unsqueeze(1)
        if self.training and self.word_dropout:
            assert self.unk_index is not None
            seed = seed_of(seed, generator, "tokens", words)
            words = dropped_tokens(words, lengths, seed, self.word_dropout, self.unk_index)
        hidden = self._embedded(words.where(valid, 0))
        memories = [None] * self.num_layers
        if self.memory is not None:
            memories = self.memory(z).unsqueeze(-2).chunk(self.num_layers, -1)
        for layer, memory in zip(self.layers, memories, strict=True):
            hidden = layer(hidden, memory=memory, **self._layer_settings())
        return self.norm(hidden).masked_fill(~valid.unsqueeze(2), 0.0)

    def recurrence(self, z: Tensor, max_length: int) -> Recurrence:
        """Give the steps that write sentences; their keys and values are kept, so a step reads one word.

        Memory grows with batch * max_length * num_layers * hidden_size. On a CPU a sentence does not depend on the
        batch around it: each product is one of rows on their own.
        """
        weight = self.embedding.weight
        compute, batch, heads, on_cpu = compute_dtype(weight), z.size(0), self.num_heads, weight.device.type == "cpu"
        z = z.to(compute)

        def operands(module: Any) -> tuple[Tensor, Tensor]:
            bias = module.weight.new_zeros(len(module.weight)) if module.bias is None else module.bias
            return module.weight.to(compute), bias.to(compute)

        def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], weight, bias)

        layers = [[operands(module) for module in layer.children()] for layer in self.layers]
        embedding, vectors = weight.to(compute), self.position_vectors(max_length).to(compute)
        final, output = operands(self.norm), operands(self.output)
        entry = None if self.input is None else operands(self.input)

        def step(words: Tensor, static: Tensor, states: States) -> tuple[Tensor, States]:
            keys, values, position = states
            place = position[0, :1]
            # A captured step sees all places and hides those that are not written yet; else they are left out.
            seen = int(place) + 1 if on_cpu else max_length
            visible = None if on_cpu else torch.arange(max_length, device=place.device) <= place
            hidden = F.embedding(words, embedding) * math.sqrt(self.embed_dim)
            if entry is not None:
                hidden = linear_rows(hidden, *entry)
            hidden = hidden + vectors.index_select(0, place)
            memories = static.chunk(self.num_layers, 1)
            for i, (norm_attention, projection, attended, norm_feedforward, inner, outer) in enumerate(layers):
                query, key, value = linear_rows(norm(hidden, *norm_attention), *projection).chunk(3, 1)
                for kept, new in ((keys[i], key), (values[i], value)):
                    kept.index_copy_(1, place, new.unsqueeze(1))
                query, key, value = (
                    x.unflatten(-1, (heads, -1)).transpose(1, 2)
                    for x in (query.unsqueeze(1), keys[i, :, :seen], values[i, :, :seen])
                )
                mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible).flatten(1)
                hidden = hidden + linear_rows(mixed, *attended) + memories[i]
                hidden = hidden + linear_rows(linear_rows(norm(hidden, *norm_feedforward), *inner).relu(), *outer)
            log_probs = linear_rows(norm(hidden, *final), *output).log_softmax(-1)
            return log_probs, (keys, values, position + 1)

        static = z.new_zeros(batch, self.num_layers * self.hidden_size)
        if self.memory is not None:
            static = linear_rows(z, *operands(self.memory))
        kept = z.new_zeros(2, self.num_layers, batch, max_length, self.hidden_size)
        return Recurrence(step, static, (kept[0], kept[1], torch.zeros(1, batch, dtype=torch.int64, device=z.device)))


def _sinusoids(like: Tensor) -> Tensor:
    """Sines, then cosines, of the positions, in the shape (positions, size) of `like`."""
    time, size = like.shape
    half = (size + 1) // 2
    rates = torch.arange(half, device=like.device, dtype=torch.float64) * (-math.log(10_000) / max(half - 1, 1))
    angles = torch.arange(time, device=like.device, dtype=torch.float64).unsqueeze(1) * rates.exp()
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :size].to(like.dtype)
