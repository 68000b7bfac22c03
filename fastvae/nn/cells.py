"""The recurrences that encoders and decoders can be made of: ops, parameters, and one step in plain PyTorch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.functional import gru, gru_decode, layer_norm_lstm, layer_norm_lstm_decode, lstm, lstm_decode

States = tuple[Tensor, ...]


class Cell(NamedTuple):
    """One kind of recurrence.

    Attributes:
        gates: rows of its weights, in multiples of the hidden size.
        states: number of tensors that go from step to step, the hidden state first.
        vectors: names of its parameters beside weight_ih and weight_hh.
        decode: the op over tokens: (tokens, z, *states, embedding, *parameters) to (hidden, *states).
        dense: the op over the layer below: (inputs, *states, *parameters) to (hidden, *states).
        step: one step: (inputs times weight_ih (rows, gates * hidden), states, parameters) to states.
    """

    gates: int
    states: int
    vectors: tuple[str, ...]
    decode: Callable[..., Any]
    dense: Callable[..., Any]
    step: Callable[[Tensor, States, tuple[Any, ...]], States]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of a layer's parameters, in the order in which the ops take them."""
        return "weight_ih", "weight_hh", *self.vectors

    def shapes(self, inputs: int, size: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a layer's parameters by name."""
        rows = self.gates * size
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(self.vectors, (rows,))
        if "norm_cell" in shapes:
            shapes["norm_cell"] = (2, size)
        return {"weight_ih": (rows, inputs), "weight_hh": (rows, size)} | shapes


def _lstm_step(product: Tensor, states: States, parameters: tuple[Any, ...]) -> States:
    (h, c), (_, weight_hh, bias) = states, parameters
    i, f, g, o = (product + F.linear(h, weight_hh, bias)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _layer_norm_lstm_step(product: Tensor, states: States, parameters: tuple[Any, ...]) -> States:
    (h, c), (_, weight_hh, bias, norm_input, norm_hidden, norm_cell) = states, parameters
    gates = F.layer_norm(product, product.shape[-1:], norm_input, bias)
    gates = gates + F.layer_norm(F.linear(h, weight_hh), product.shape[-1:], norm_hidden)
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * F.layer_norm(c, c.shape[-1:], norm_cell[0], norm_cell[1]).tanh(), c


def _gru_step(product: Tensor, states: States, parameters: tuple[Any, ...]) -> States:
    (h,), (_, weight_hh, bias_ih, bias_hh) = states, parameters
    input_r, input_z, input_n = (product if bias_ih is None else product + bias_ih).chunk(3, -1)
    from_r, from_z, from_n = F.linear(h, weight_hh, bias_hh).chunk(3, -1)
    n = torch.tanh(input_n + torch.sigmoid(input_r + from_r) * from_n)
    return (n + torch.sigmoid(input_z + from_z) * (h - n),)


LSTM = Cell(4, 2, ("bias",), lstm_decode, lstm, _lstm_step)
LAYER_NORM_LSTM = Cell(
    4,
    2,
    ("bias", "norm_input", "norm_hidden", "norm_cell"),
    layer_norm_lstm_decode,
    layer_norm_lstm,
    _layer_norm_lstm_step,
)
GRU = Cell(3, 1, ("bias_ih", "bias_hh"), gru_decode, gru, _gru_step)
