"""LSTM encoder and decoder for sentences, and what those of other recurrences share with them.

Over the fused recurrences of `fastvae.functional` and `linear_cross_entropy`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Self, TypedDict, TypeVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.functional import linear_cross_entropy
from fastvae.nn.cells import LAYER_NORM_LSTM, LSTM, Cell
from fastvae.nn.generation import generate, stream

_IGNORED = -100
_Recurrence = TypeVar("_Recurrence", nn.LSTM, nn.GRU)


class EncoderSettings(TypedDict, total=False):
    """What all encoders take beside their sizes; `LSTMEncoder` tells what they mean."""

    num_layers: int
    dropout: float
    layer_dropout: float
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
    variational_dropout: bool
    tie_weights: bool
    pad_index: int | None
    bos_index: int | None
    eos_index: int | None
    unk_index: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class _Layers(nn.Module):
    """The layers that encoder and decoder have in common, the first of which reads tokens."""

    embedding: nn.Embedding
    weight_ih: nn.Parameter
    weight_hh: nn.Parameter

    def __init__(
        self, cell: Cell, hidden_size: int, num_layers: int, layer_dropout: float, variational_dropout: bool
    ) -> None:
        super().__init__()
        self.cell = cell
        if num_layers < 1:
            raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
        _check_probability("layer_dropout", layer_dropout)
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.layer_dropout = layer_dropout
        self.variational_dropout = variational_dropout

    def _add_layers(self, input_size: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        for layer in range(self.num_layers):
            size = self.hidden_size if layer else input_size
            for name, shape in self.cell.shapes(size, self.hidden_size).items():
                parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(_parameter_name(name, layer), parameter)

    def _reset_layers(self) -> None:
        bound = self.hidden_size**-0.5
        for layer in range(self.num_layers):
            for name, parameter in zip(self.cell.names, self.layer(layer), strict=True):
                if name.startswith("norm"):
                    nn.init.ones_(parameter)
                    if name == "norm_cell":
                        nn.init.zeros_(parameter[1])
                elif parameter is not None:
                    nn.init.uniform_(parameter, -bound, bound)

    def layer(self, index: int) -> tuple[nn.Parameter, ...]:
        """Give the parameters of a layer, counted from 0 at the tokens: weight_ih, weight_hh, bias (or None), ..."""
        if not 0 <= index < self.num_layers:
            raise IndexError(f"index: expected a layer in [0, {self.num_layers}), got {index}")
        return tuple(getattr(self, _parameter_name(name, index)) for name in self.cell.names)

    def _run(
        self,
        tokens: Tensor,
        z: Tensor | None,
        states: tuple[Tensor, ...],
        lengths: Tensor,
        **word_dropout: Any,
    ) -> tuple[Tensor, Tensor]:
        """Run all layers from states (num_layers, ..., batch, H); return the last's hidden states and final one."""
        hidden, final, *_ = self.cell.decode(
            tokens,
            z,
            *(state[0] for state in states),
            self.embedding.weight,
            *self.layer(0),
            lengths=lengths,
            **word_dropout,
        )
        shape = hidden.shape
        for layer in range(1, self.num_layers):
            # From here on, samples of a sequence share nothing.
            inputs = self._dropped(hidden, self.layer_dropout).reshape(-1, *shape[-2:])
            start = (state[layer].reshape(-1, shape[-1]) for state in states)
            repeated = lengths.repeat(inputs.size(0) // lengths.size(0))
            hidden, final, *_ = self.cell.dense(inputs, *start, *self.layer(layer), lengths=repeated)
        return hidden.view(shape), final.view(*shape[:-2], shape[-1])

    def _zero_states(self, *sizes: int) -> tuple[Tensor, ...]:
        # Tensors of their own: Dynamo refuses an autograd function that is given the same one twice.
        shape = (self.cell.states, self.num_layers, *sizes, self.hidden_size)
        return self.weight_hh.new_zeros(shape).unbind()

    def _dropped(self, hidden: Tensor, probability: float) -> Tensor:
        if not self.variational_dropout or not self.training:
            return F.dropout(hidden, probability, self.training)
        return hidden * F.dropout(torch.ones_like(hidden[..., :1, :]), probability)


class _Encoder(_Layers):
    """Reads a sentence and gives its last hidden state; `LSTMEncoder` tells the settings."""

    def __init__(
        self,
        cell: Cell,
        vocab_size: int,
        embed_dim: int,
        hidden_size: int,
        *,
        num_layers: int = 1,
        dropout: float = 0.0,
        layer_dropout: float = 0.0,
        variational_dropout: bool = False,
        pad_index: int | None = None,
        embedding: nn.Embedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(cell, hidden_size, num_layers, layer_dropout, variational_dropout)
        _check_probability("dropout", dropout)
        _check_indices(vocab_size, pad_index=pad_index)
        if embedding is not None and tuple(embedding.weight.shape) != (vocab_size, embed_dim):
            raise ValueError(
                f"embedding: expected shape (vocab_size, embed_dim) = {(vocab_size, embed_dim)}, "
                f"got {tuple(embedding.weight.shape)}"
            )
        self.vocab_size = vocab_size
        self.embed_dim = embed_dim
        self.dropout = dropout
        self.pad_index = pad_index
        shared = embedding is not None
        self.embedding = embedding or nn.Embedding(vocab_size, embed_dim, device=device, dtype=dtype)
        self._add_layers(embed_dim, device, dtype)
        if not shared:
            _reset_embedding(self.embedding)
        self._reset_layers()

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode a batch of sentences.

        Args:
            tokens: `(batch, time)` int64, `<s>` and `</s>` included, padded on the right.
            lengths: `(batch,)` int64, each in 1..time; None counts the tokens that are not padding.

        Returns:
            The last layer's state after each sentence's last token, `(batch, hidden_size)`.

        Raises:
            TypeError, ValueError: for a wrong shape or dtype; for lengths out of range, on CPU outside
                compiled graphs only.
            IndexError: for a token out of range (on CUDA the sentence's result is NaN instead).
        """
        lengths = checked_lengths(tokens, lengths, self.pad_index, shortest=1)
        states = self._zero_states(tokens.size(0))
        _, final = self._run(tokens, None, states, lengths)
        return F.dropout(final, self.dropout, self.training)

    def extra_repr(self) -> str:
        """List the settings for `print`."""
        return (
            f"{self.vocab_size}, {self.embed_dim}, {self.hidden_size}, num_layers={self.num_layers}, "
            f"dropout={self.dropout}, layer_dropout={self.layer_dropout}"
        )


class LSTMEncoder(_Encoder):
    """Reads a sentence and gives its last hidden state.

    Args:
        vocab_size: number of tokens V.
        embed_dim: size E of the token embeddings.
        hidden_size: size H of the state.
        num_layers: number of layers, each of which reads the states of the one before; named as in
            `LSTMDecoder`.
        dropout: probability of dropping an entry of the final state in training mode; the mask follows
            torch's global generator, as `nn.Dropout`.
        layer_dropout: the same for the states that go from layer to layer.
        variational_dropout: drop the same entries of the states at all steps of a sentence.
        pad_index: token that fills up short sentences, from which lengths are counted when not given.
        embedding: an `nn.Embedding(V, E)` to share with another layer; a new one when None.
        layer_norm: normalize the gates and the cell, as `fastvae.functional.layer_norm_lstm_decode`.
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        hidden_size: int,
        *,
        layer_norm: bool = False,
        **settings: Unpack[EncoderSettings],
    ) -> None:
        super().__init__(LAYER_NORM_LSTM if layer_norm else LSTM, vocab_size, embed_dim, hidden_size, **settings)


class _Decoder(_Layers):
    """Language model over sentences given a latent vector; `LSTMDecoder` tells the settings."""

    def __init__(
        self,
        cell: Cell,
        vocab_size: int,
        embed_dim: int,
        hidden_size: int,
        latent_dim: int,
        *,
        num_layers: int = 1,
        word_dropout: float = 0.0,
        dropout: float = 0.0,
        layer_dropout: float = 0.0,
        variational_dropout: bool = False,
        tie_weights: bool = False,
        pad_index: int | None = None,
        bos_index: int | None = None,
        eos_index: int | None = None,
        unk_index: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(cell, hidden_size, num_layers, layer_dropout, variational_dropout)
        _check_probability("word_dropout", word_dropout)
        _check_probability("dropout", dropout)
        _check_indices(vocab_size, pad_index=pad_index, bos_index=bos_index, eos_index=eos_index, unk_index=unk_index)
        if latent_dim < 0:
            raise ValueError(f"latent_dim: expected at least 0, got {latent_dim}")
        if word_dropout > 0 and unk_index is None:
            raise ValueError("unk_index: expected the index of <unk> when word_dropout > 0, got None")
        if tie_weights and embed_dim != hidden_size:
            raise ValueError(f"tie_weights: expected embed_dim equal to hidden_size, got {embed_dim} and {hidden_size}")
        self.vocab_size = vocab_size
        self.embed_dim = embed_dim
        self.latent_dim = latent_dim
        self.word_dropout = word_dropout
        self.dropout = dropout
        self.tie_weights = tie_weights
        self.pad_index = pad_index
        self.bos_index = bos_index
        self.eos_index = eos_index
        self.unk_index = unk_index

        self.embedding = nn.Embedding(vocab_size, embed_dim, device=device, dtype=dtype)
        self._add_layers(embed_dim + latent_dim, device, dtype)
        self.output = nn.Linear(hidden_size, vocab_size, device=device, dtype=dtype)
        states = cell.states * num_layers * hidden_size
        self.initial_state = nn.Linear(latent_dim, states, device=device, dtype=dtype) if latent_dim else None
        self.reset_parameters()
        if tie_weights:
            self.output.weight = self.embedding.weight

    def reset_parameters(self) -> None:
        """Draw the parameters anew: embeddings uniform in +-0.1, the rest as `nn.LSTM` and `nn.Linear`."""
        self.output.reset_parameters()
        if self.initial_state is not None:
            self.initial_state.reset_parameters()
        self._reset_layers()
        _reset_embedding(self.embedding)

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

    @classmethod
    def _adopt(
        cls,
        cell: Cell,
        name: str,
        recurrence: nn.LSTM | nn.GRU,
        embedding: nn.Embedding,
        output: nn.Linear,
        initial_state: nn.Linear | None,
        *,
        pad_index: int | None,
        **settings: Any,
    ) -> Self:
        """Make a decoder of PyTorch modules, of which the caller calls the recurrence `name`."""
        latent_dim = _check_modules(cell, name, recurrence, embedding, output, initial_state)
        decoder = cls(
            vocab_size=embedding.num_embeddings,
            embed_dim=embedding.embedding_dim,
            hidden_size=recurrence.hidden_size,
            latent_dim=latent_dim,
            num_layers=recurrence.num_layers,
            layer_dropout=recurrence.dropout,
            tie_weights=output.weight is embedding.weight,
            pad_index=embedding.padding_idx if pad_index is None else pad_index,
            device=embedding.weight.device,
            dtype=embedding.weight.dtype,
            **settings,
        )
        if not recurrence.bias:
            for layer in range(recurrence.num_layers):
                for bias in cell.vectors:
                    decoder.register_parameter(_parameter_name(bias, layer), None)
        if output.bias is None:
            decoder.output.register_parameter("bias", None)
        if initial_state is None:
            decoder.initial_state = None
        elif initial_state.bias is None and decoder.initial_state is not None:
            decoder.initial_state.register_parameter("bias", None)
        decoder.load_state_dict(_state_of(cell, recurrence, embedding, output, initial_state))
        return decoder.train(recurrence.training)

    def _copied_modules(self) -> tuple[nn.Embedding, nn.Linear, nn.Linear | None]:
        """Give embedding, output and initial_state as modules with copies of the weights."""
        embedding = nn.Embedding(self.vocab_size, self.embed_dim).to(self.weight_hh)
        output = nn.Linear(self.hidden_size, self.vocab_size, bias=self.output.bias is not None)
        output = output.to(self.weight_hh)
        embedding.load_state_dict(self.embedding.state_dict())
        output.load_state_dict(self.output.state_dict())
        if self.tie_weights:
            output.weight = embedding.weight
        return embedding, output, copy.deepcopy(self.initial_state)

    def _copied_recurrence(self, kind: type[_Recurrence]) -> _Recurrence:
        weights: dict[str, Tensor] = {}
        for n in range(self.num_layers):
            for name, parameter in zip(self.cell.names, self.layer(n), strict=True):
                if name == "bias" and parameter is not None:
                    weights |= {f"bias_ih_l{n}": parameter, f"bias_hh_l{n}": torch.zeros_like(parameter)}
                elif parameter is not None:
                    weights[f"{name}_l{n}"] = parameter
        recurrence = kind(
            self.embed_dim + self.latent_dim,
            self.hidden_size,
            self.num_layers,
            batch_first=True,
            bias="bias_ih_l0" in weights,
            dropout=self.layer_dropout if self.num_layers > 1 else 0.0,
        ).to(self.weight_hh)
        recurrence.load_state_dict(weights)
        return recurrence

    def initial_states(self, z: Tensor) -> tuple[Tensor, ...]:
        """Give (h0, c0), of a GRU (h0,), each `(num_layers, ..., hidden_size)`, for latents `(..., latent_dim)`."""
        if self.initial_state is None:
            return self._zero_states(*z.shape[:-1])
        states = self.initial_state(z).unflatten(-1, (self.cell.states, self.num_layers, self.hidden_size))
        return tuple(state.movedim(-2, 0) for state in states.unbind(-3))

    def _hidden(
        self,
        tokens: Tensor,
        z: Tensor | None,
        lengths: Tensor | None,
        generator: torch.Generator | None,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        lengths = checked_lengths(tokens, lengths, self.pad_index, shortest=2)
        batch = tokens.size(0)
        if z is None and not self.latent_dim:
            z = self.weight_hh.new_empty(batch, 0)
        if z is None or z.dim() not in (2, 3) or tuple(z.shape[-2:]) != (batch, self.latent_dim):
            got = "None" if z is None else str(tuple(z.shape))
            expected = f"(batch, latent_dim) = {(batch, self.latent_dim)}"
            raise ValueError(f"z: expected shape {expected}, or samples of it, got {got}")
        hidden, _ = self._run(
            tokens[:, :-1],
            z if self.latent_dim else None,
            self.initial_states(z),
            lengths - 1,
            word_dropout=self.word_dropout if self.training else 0.0,
            unk_index=self.unk_index,
            generator=generator,
            seed=seed,
        )
        return self._dropped(hidden, self.dropout), lengths

    def extra_repr(self) -> str:
        """List the settings for `print`."""
        return (
            f"{self.vocab_size}, {self.embed_dim}, {self.hidden_size}, {self.latent_dim}, "
            f"num_layers={self.num_layers}, word_dropout={self.word_dropout}, dropout={self.dropout}, "
            f"layer_dropout={self.layer_dropout}, tie_weights={self.tie_weights}"
        )


class DecoderModules(NamedTuple):
    """The PyTorch modules equivalent to an `LSTMDecoder`; `initial_state` is None for a zero start."""

    embedding: nn.Embedding
    lstm: nn.LSTM
    output: nn.Linear
    initial_state: nn.Linear | None


class LSTMDecoder(_Decoder):
    """Language model over sentences given a latent vector: p(x|z).

    The latent sets the initial state, (h0, c0) = W z + b, and enters every step beside the token's
    embedding. `latent_dim=0` gives a plain language model: pass `z=None`, it starts from zeros.

    Parameters: `embedding.weight` (V, E); `weight_ih` (4H, E + latent), gates in the order i, f, g, o of
    `nn.LSTM`; `weight_hh` (4H, H); `bias` (4H); for layer n from 1 on `weight_ih_ln` (4H, H),
    `weight_hh_ln` and `bias_ln`; `output.weight` (V, H) and `output.bias` (V); `initial_state.weight`
    (2 * num_layers * H, latent) and `initial_state.bias`, hidden states of all layers before cell states.

    Args:
        vocab_size: number of tokens V.
        embed_dim: size E of the token embeddings.
        hidden_size: size H of the state.
        latent_dim: size of z, 0 for none.
        num_layers: number of layers, each of which reads the states of the one before. z enters the
            first, and sets the initial state of all.
        word_dropout: probability of replacing an input token by `unk_index`, in training mode only;
            never the first token, never padding.
        dropout: probability of dropping an entry of the hidden states before the vocabulary product, in
            training mode only; the mask follows torch's global generator, as `nn.Dropout`. Embeddings
            are not dropped: they are gathered inside the fused recurrence.
        layer_dropout: the same for the states that go from layer to layer (the `dropout` of `nn.LSTM`).
        variational_dropout: drop the same entries of the states at all steps of a sentence.
        tie_weights: use the embedding as output weight; needs `embed_dim == hidden_size`.
        pad_index: token that fills up short sentences; None when there is none.
        bos_index: token that starts a sentence; needed by `generate`.
        eos_index: token that ends a sentence; needed by `generate`.
        unk_index: token that stands for unknown words; needed by `word_dropout`.
        layer_norm: normalize the gates and the cell, as `fastvae.functional.layer_norm_lstm_decode`; adds to
            each layer `norm_input` (4H), `norm_hidden` (4H) and `norm_cell` (2, H), named as `bias`.

    Sources: Bowman et al., Generating Sentences from a Continuous Space (2016); variational dropout: Gal &
    Ghahramani, A Theoretically Grounded Application of Dropout in Recurrent Neural Networks (2016).
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        hidden_size: int,
        latent_dim: int,
        *,
        layer_norm: bool = False,
        **settings: Unpack[DecoderSettings],
    ) -> None:
        cell = LAYER_NORM_LSTM if layer_norm else LSTM
        super().__init__(cell, vocab_size, embed_dim, hidden_size, latent_dim, **settings)

    @classmethod
    def from_modules(
        cls,
        embedding: nn.Embedding,
        lstm: nn.LSTM,
        output: nn.Linear,
        initial_state: nn.Linear | None = None,
        *,
        word_dropout: float = 0.0,
        dropout: float = 0.0,
        pad_index: int | None = None,
        bos_index: int | None = None,
        eos_index: int | None = None,
        unk_index: int | None = None,
    ) -> LSTMDecoder:
        """Adopt a decoder made of PyTorch modules: the same numbers to rounding.

        The weights are copied, the given modules stay as they are. Layers without a bias get none here
        either, and an output layer that shares the embedding's weight stays tied.

        Args:
            embedding: `nn.Embedding(V, E)`; its `padding_idx` is the default of `pad_index`.
            lstm: `nn.LSTM(E + latent, H)`, fed with [embedding; z] at every step; its `dropout` is the
                decoder's `layer_dropout`.
            output: `nn.Linear(H, V)`.
            initial_state: `nn.Linear(latent, 2 * num_layers * H)`, whose halves are (h0, c0), layer after
                layer; None starts from zeros.
            word_dropout, dropout, pad_index, bos_index, eos_index, unk_index: as for `LSTMDecoder`.

        Returns:
            A decoder on the modules' device, in their dtype and training mode.

        Raises:
            TypeError: if an argument is not a module of the kind named above.
            ValueError: for an LSTM with two directions or a projection, an embedding with
                `max_norm` or `scale_grad_by_freq`, or sizes, dtypes or devices that do not fit together.
        """
        return cls._adopt(
            LSTM,
            "lstm",
            lstm,
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

    def to_modules(self) -> DecoderModules:
        """Give the equivalent PyTorch modules, with copies of the weights.

        The one bias of a layer becomes its `bias_ih`; its `bias_hh` is zero.

        Returns:
            embedding, lstm (`batch_first=True`), output, and initial_state or None.

        Raises:
            ValueError: for a layer-normalized decoder.
        """
        if self.cell != LSTM:
            raise ValueError("layer_norm: expected False, as nn.LSTM has no such layers, got True")
        embedding, output, initial_state = self._copied_modules()
        modules = DecoderModules(embedding, self._copied_recurrence(nn.LSTM), output, initial_state)
        for module in modules:
            if module is not None:
                module.train(self.training)
        return modules


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


def _parameter_name(name: str, layer: int) -> str:
    return f"{name}_l{layer}" if layer else name


def _reset_embedding(embedding: nn.Embedding) -> None:
    nn.init.uniform_(embedding.weight, -0.1, 0.1)


def _check_probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")


def _check_indices(vocab_size: int, **indices: int | None) -> None:
    for name, index in indices.items():
        if index is not None and not 0 <= index < vocab_size:
            raise ValueError(f"{name}: expected a token in [0, {vocab_size}), got {index}")


def _check_modules(
    cell: Cell,
    name_of_recurrence: str,
    recurrence: nn.LSTM | nn.GRU,
    embedding: nn.Embedding,
    output: nn.Linear,
    initial_state: nn.Linear | None,
) -> int:
    kinds: dict[str, tuple[nn.Module | None, type[nn.Module]]] = {
        "embedding": (embedding, nn.Embedding),
        name_of_recurrence: (recurrence, nn.LSTM if cell == LSTM else nn.GRU),
        "output": (output, nn.Linear),
    }
    if initial_state is not None:
        kinds["initial_state"] = (initial_state, nn.Linear)
    for name, (module, kind) in kinds.items():
        if not isinstance(module, kind):
            raise TypeError(f"{name}: expected nn.{kind.__name__}, got {type(module).__name__}")
    wanted_settings: dict[str, tuple[nn.Module, dict[str, int | None]]] = {
        "embedding": (embedding, {"max_norm": None, "scale_grad_by_freq": False}),
        name_of_recurrence: (recurrence, {"bidirectional": False, "proj_size": 0}),
    }
    for name, (module, settings) in wanted_settings.items():
        for setting, wanted in settings.items():
            if getattr(module, setting) != wanted:
                raise ValueError(f"{name}: expected {setting}={wanted}, got {getattr(module, setting)}")
    vocab_size, embed_dim, hidden_size = embedding.num_embeddings, embedding.embedding_dim, recurrence.hidden_size
    latent_dim = recurrence.input_size - embed_dim
    if latent_dim < 0:
        raise ValueError(
            f"{name_of_recurrence}: expected input_size = embedding_dim + latent, at least {embed_dim}, "
            f"got {recurrence.input_size}"
        )
    _check_linear("output", output, hidden_size, vocab_size)
    if initial_state is not None:
        _check_linear("initial_state", initial_state, latent_dim, cell.states * recurrence.num_layers * hidden_size)
    weights = {name_of_recurrence: recurrence.weight_ih_l0, "output": output.weight}
    if initial_state is not None:
        weights["initial_state"] = initial_state.weight
    for name, weight in weights.items():
        if weight.dtype != embedding.weight.dtype or weight.device != embedding.weight.device:
            raise ValueError(
                f"{name}: expected {embedding.weight.dtype} on {embedding.weight.device} as the embedding, "
                f"got {weight.dtype} on {weight.device}"
            )
    return latent_dim


def _check_linear(name: str, linear: nn.Linear, in_features: int, out_features: int) -> None:
    if (linear.in_features, linear.out_features) != (in_features, out_features):
        raise ValueError(
            f"{name}: expected nn.Linear({in_features}, {out_features}), "
            f"got nn.Linear({linear.in_features}, {linear.out_features})"
        )


def _state_of(
    cell: Cell,
    recurrence: nn.LSTM | nn.GRU,
    embedding: nn.Embedding,
    output: nn.Linear,
    initial_state: nn.Linear | None,
) -> dict[str, Tensor]:
    layers = recurrence.state_dict()
    state = {"embedding.weight": embedding.weight.detach()}
    for n in range(recurrence.num_layers):
        if recurrence.bias:  # one bias of an LSTM stands for both of nn.LSTM
            layers[f"bias_l{n}"] = layers[f"bias_ih_l{n}"] + layers[f"bias_hh_l{n}"]
        state |= {_parameter_name(name, n): layers[f"{name}_l{n}"] for name in cell.names if f"{name}_l{n}" in layers}
    state |= {f"output.{name}": value for name, value in output.state_dict().items()}
    if initial_state is not None:
        state |= {f"initial_state.{name}": value for name, value in initial_state.state_dict().items()}
    return state
