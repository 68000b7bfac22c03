"""LSTM encoder and decoder for sentences, and what those of other recurrences share with them.

Over the fused recurrences of `fastvae.functional`.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Self, TypeVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.nn.cells import LAYER_NORM_LSTM, LSTM, Cell, States
from fastvae.nn.dropout import dropout
from fastvae.nn.sentences import (
    DecoderSettings,
    EncoderSettings,
    SentenceDecoder,
    SentenceEncoder,
    SentenceNetwork,
    reset_embedding,
)
from fastvae.nn.soft_generation import SoftSentences, soft_sentences
from fastvae.ops.backend import compute_dtype
from fastvae.ops.generation import Recurrence

_Recurrence = TypeVar("_Recurrence", nn.LSTM, nn.GRU)


class _Layers(SentenceNetwork):
    """The layers that encoder and decoder have in common, the first of which reads tokens."""

    cell: Cell
    weight_ih: nn.Parameter
    weight_hh: nn.Parameter

    def _add_layers(self, cell: Cell, input_size: int) -> None:
        self.cell = cell
        for layer in range(self.num_layers):
            size = self.hidden_size if layer else input_size
            for name, shape in self.cell.shapes(size, self.hidden_size).items():
                parameter = nn.Parameter(torch.empty(shape, **self._made_like()))
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
            self._words(),
            *self.layer(0),
            lengths=lengths,
            **word_dropout,
        )
        return self._run_above(hidden, final, states, lengths)

    def _run_above(
        self, hidden: Tensor, final: Tensor, states: tuple[Tensor, ...], lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the layers above the first, which has given hidden and final."""
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


class _Encoder(_Layers, SentenceEncoder):
    """Reads a sentence and gives its last hidden state; `LSTMEncoder` tells the settings."""

    def __init__(
        self, cell: Cell, vocab_size: int, embed_dim: int, hidden_size: int, **settings: Unpack[EncoderSettings]
    ) -> None:
        super().__init__(vocab_size, embed_dim, hidden_size, **settings)
        self._add_layers(cell, embed_dim)
        self._reset_layers()

    def _read(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self._run(tokens, None, self._zero_states(tokens.size(0)), lengths)[1]

    def forward_embedded(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Encode sentences whose words are embedded already: means of embeddings, where words are uncertain.

        Args:
            inputs: `(batch, time, embed_dim)`, `<s>` and `</s>` included.
            lengths: `(batch,)` int64, each in 1..time.

        Returns:
            As `forward`.

        Raises:
            TypeError, ValueError: for a wrong shape or dtype.
        """
        states = self._zero_states(inputs.size(0))
        hidden, final, *_ = self.cell.dense(inputs, *(state[0] for state in states), *self.layer(0), lengths=lengths)
        _, final = self._run_above(hidden, final, states, lengths)
        return dropout(final, self.dropout, self.training)


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
        embedding_dropout: probability that a word of the vocabulary is read as zeros throughout a batch.
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


class _Decoder(_Layers, SentenceDecoder):
    """Language model over sentences given a latent vector; `LSTMDecoder` tells the settings."""

    def __init__(
        self,
        cell: Cell,
        vocab_size: int,
        embed_dim: int,
        hidden_size: int,
        latent_dim: int,
        **settings: Unpack[DecoderSettings],
    ) -> None:
        super().__init__(vocab_size, embed_dim, hidden_size, latent_dim, **settings)
        self._add_layers(cell, embed_dim + latent_dim)
        states = cell.states * self.num_layers * hidden_size
        self.initial_state = nn.Linear(latent_dim, states, **self._made_like()) if latent_dim else None
        self.reset_parameters()
        self._tie()

    def reset_parameters(self) -> None:
        """Draw the parameters anew: embeddings uniform in +-0.1, the rest as `nn.LSTM` and `nn.Linear`."""
        self.output.reset_parameters()
        if self.initial_state is not None:
            self.initial_state.reset_parameters()
        self._reset_layers()
        reset_embedding(self.embedding)

    def generate_soft(
        self,
        z: Tensor,
        max_length: int,
        temperature: float,
        *,
        generator: torch.Generator | None = None,
        seed: Tensor | None = None,
    ) -> SoftSentences:
        """Write one sentence of relaxed words for each latent vector, with gradients to z and the parameters.

        Each word is a sample of the Gumbel-softmax distribution of the decoder's prediction, and the next step reads
        the mean of the embeddings that it makes. As the temperature falls to 0 the words become those that the
        prediction itself draws with the same noise. No dropout is applied, in either mode. `<pad>` and `<s>` are
        never written.

        Args:
            z: `(batch, latent_dim)`.
            max_length: most words to write, `</s>` counted, at least 1.
            temperature: of the relaxed samples, above 0.
            generator: source of the noise; the global generator when None.
            seed: int64 tensor of shape (1,) that fixes the noise, in place of `generator`.

        Returns:
            words `(batch, length, V)`, length at most `max_length`, without `<s>`; and lengths `(batch,)`.

        Raises:
            TypeError, ValueError: for an argument of the wrong type, shape or range, or a decoder without
                `bos_index` or `eos_index`.

        Source: Hu et al., Toward Controlled Generation of Text (2017), section 3.2.
        """
        return soft_sentences(self, z, max_length, temperature, generator=generator, seed=seed)

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

    def recurrence(self, z: Tensor, max_length: int) -> Recurrence:
        """Give the steps of any cell, in plain PyTorch and the type of the weights."""
        weight, embed = self.embedding.weight, self.embed_dim
        z = z.to(weight.dtype)
        weight_ih = self.layer(0)[0]

        def step(words: Tensor, static: Tensor, states: States) -> tuple[Tensor, States]:
            product = F.linear(F.embedding(words, weight), weight_ih[:, :embed]) + static
            after: list[States] = []
            for layer in range(self.num_layers):
                parameters = self.layer(layer)
                if layer:
                    product = F.linear(after[-1][0], parameters[0])
                after.append(self.cell.step(product, tuple(state[layer] for state in states), parameters))
            log_probs = self.output(after[-1][0]).log_softmax(-1, dtype=compute_dtype(weight))
            return log_probs, tuple(torch.stack(layers) for layers in zip(*after, strict=True))

        return Recurrence(step, F.linear(z, weight_ih[:, embed:]), self.initial_states(z))

    def _states(
        self, words: Tensor, z: Tensor, lengths: Tensor, generator: torch.Generator | None, seed: Tensor | None
    ) -> Tensor:
        return self._run(
            words,
            z if self.latent_dim else None,
            self.initial_states(z),
            lengths,
            word_dropout=self.word_dropout if self.training else 0.0,
            unk_index=self.unk_index,
            generator=generator,
            seed=seed,
        )[0]


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
            training mode only; the mask follows torch's global generator, as `nn.Dropout`.
        layer_dropout: the same for the states that go from layer to layer (the `dropout` of `nn.LSTM`).
        embedding_dropout: probability that a word of the vocabulary is read as zeros throughout a batch, in training
            mode only; the other embeddings grow to make up for it.
        variational_dropout: drop the same entries of the states at all steps of a sentence.
        tie_weights: use the embedding as output weight; needs `embed_dim == hidden_size`.
        pad_index: token that fills up short sentences; None when there is none.
        bos_index: token that starts a sentence; needed by `generate`.
        eos_index: token that ends a sentence; needed by `generate`.
        unk_index: token that stands for unknown words; needed by `word_dropout`.
        layer_norm: normalize the gates and the cell, as `fastvae.functional.layer_norm_lstm_decode`; adds to
            each layer `norm_input` (4H), `norm_hidden` (4H) and `norm_cell` (2, H), named as `bias`.

    Sources: Bowman et al., Generating Sentences from a Continuous Space (2016); variational and embedding dropout:
    Gal & Ghahramani, A Theoretically Grounded Application of Dropout in Recurrent Neural Networks (2016).
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


def _parameter_name(name: str, layer: int) -> str:
    return f"{name}_l{layer}" if layer else name


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
