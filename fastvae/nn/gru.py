"""GRU encoder and decoder for sentences: those of `fastvae.nn.lstm` over `fastvae.functional.gru_decode`."""

from __future__ import annotations

from typing import NamedTuple, Unpack

from torch import nn

from fastvae.nn.cells import GRU
from fastvae.nn.lstm import _Decoder, _Encoder
from fastvae.nn.sentences import DecoderSettings, EncoderSettings


class GRUEncoder(_Encoder):
    """Reads a sentence and gives its last hidden state.

    Args:
        vocab_size: number of tokens V.
        embed_dim: size E of the token embeddings.
        hidden_size: size H of the state.
        settings: num_layers, dropout, layer_dropout, embedding_dropout, variational_dropout, pad_index, embedding,
            device and dtype, as for `LSTMEncoder`. The parameters are named as in `GRUDecoder`.
    """

    def __init__(self, vocab_size: int, embed_dim: int, hidden_size: int, **settings: Unpack[EncoderSettings]) -> None:
        super().__init__(GRU, vocab_size, embed_dim, hidden_size, **settings)


class GRUDecoderModules(NamedTuple):
    """The PyTorch modules equivalent to a `GRUDecoder`; `initial_state` is None for a zero start."""

    embedding: nn.Embedding
    gru: nn.GRU
    output: nn.Linear
    initial_state: nn.Linear | None


class GRUDecoder(_Decoder):
    """Language model over sentences given a latent vector: p(x|z).

    The latent sets the initial state, h0 = W z + b, and enters every step beside the token's embedding.
    `latent_dim=0` gives a plain language model: pass `z=None`, it starts from zeros. Methods as `LSTMDecoder`.

    Parameters: `embedding.weight` (V, E); `weight_ih` (3H, E + latent), gates in the order r, z, n of `nn.GRU`;
    `weight_hh` (3H, H); `bias_ih` and `bias_hh` (3H); for layer n from 1 on `weight_ih_ln` (3H, H) and so on;
    `output.weight` (V, H) and `output.bias` (V); `initial_state.weight` (num_layers * H, latent) and
    `initial_state.bias`.

    Args:
        vocab_size: number of tokens V.
        embed_dim: size E of the token embeddings.
        hidden_size: size H of the state.
        latent_dim: size of z, 0 for none.
        settings: num_layers, word_dropout, dropout, layer_dropout, embedding_dropout, variational_dropout,
            tie_weights, pad_index, bos_index, eos_index, unk_index, device and dtype, as for `LSTMDecoder`.

    Sources: Cho et al., Learning Phrase Representations using RNN Encoder-Decoder (2014), in the form of `nn.GRU`;
    Bowman et al., Generating Sentences from a Continuous Space (2016).
    """

    def __init__(
        self, vocab_size: int, embed_dim: int, hidden_size: int, latent_dim: int, **settings: Unpack[DecoderSettings]
    ) -> None:
        super().__init__(GRU, vocab_size, embed_dim, hidden_size, latent_dim, **settings)

    @classmethod
    def from_modules(
        cls,
        embedding: nn.Embedding,
        gru: nn.GRU,
        output: nn.Linear,
        initial_state: nn.Linear | None = None,
        *,
        word_dropout: float = 0.0,
        dropout: float = 0.0,
        pad_index: int | None = None,
        bos_index: int | None = None,
        eos_index: int | None = None,
        unk_index: int | None = None,
    ) -> GRUDecoder:
        """Adopt a decoder made of PyTorch modules, as `LSTMDecoder.from_modules`.

        Args:
            embedding: `nn.Embedding(V, E)`; its `padding_idx` is the default of `pad_index`.
            gru: `nn.GRU(E + latent, H)`, fed with [embedding; z] at every step; its `dropout` is the decoder's
                `layer_dropout`.
            output: `nn.Linear(H, V)`.
            initial_state: `nn.Linear(latent, num_layers * H)`, the h0 of each layer; None starts from zeros.
            word_dropout, dropout, pad_index, bos_index, eos_index, unk_index: as for `GRUDecoder`.

        Raises:
            TypeError: if an argument is not a module of the kind named above.
            ValueError: for a GRU with two directions, an embedding with `max_norm` or `scale_grad_by_freq`, or sizes,
                dtypes or devices that do not fit together.
        """
        return cls._adopt(
            GRU,
            "gru",
            gru,
            embedding,
            output,
            initial_state,
            word_dropout=word_dropout,
            dropout=dropout,
            pad_index=pad_index,
            bos_index=bos_index,
            eos_index=eos_index,
            unk_index=unk_index,
        )

    def to_modules(self) -> GRUDecoderModules:
        """Give the equivalent PyTorch modules, with copies of the weights."""
        embedding, output, initial_state = self._copied_modules()
        modules = GRUDecoderModules(embedding, self._copied_recurrence(nn.GRU), output, initial_state)
        for module in modules:
            if module is not None:
                module.train(self.training)
        return modules
