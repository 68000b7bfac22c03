"""Decoding in other programs: an `LSTMDecoder`'s start and step for `torch.export`, and as ONNX models.

A sentence is written by one call of the start and one call of the step for each token:

    static_gates, h, c = start(z)
    log_probs, h, c = step(tokens, static_gates, h, c)      # tokens: <s> at first, then those chosen

The greedy choice is the argmax of `log_probs`. Plain PyTorch operations, no dropout; the batch may have any size.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.nn.cells import LSTM
from fastvae.nn.lstm import LSTMDecoder
from fastvae.nn.sentences import SentenceDecoder
from fastvae.ops.backend import compute_dtype

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class DecoderStart(nn.Module):
    """What sentences start from, given their latents.

    Args:
        decoder: the decoder, whose parameters this module shares.
    """

    def __init__(self, decoder: LSTMDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the first state, and what a latent adds to the gates of every step.

        Args:
            z: `(batch, latent_dim)`.

        Returns:
            static_gates `(batch, 4 * hidden_size)`; h and c, each `(num_layers, batch, hidden_size)`.
        """
        weight_ih, _, bias = self.decoder.layer(0)
        static_gates = F.linear(z, weight_ih[:, self.decoder.embed_dim :], bias)
        h0, c0 = self.decoder.initial_states(z)
        return static_gates, h0, c0


class DecoderStep(nn.Module):
    """One step of a batch of sentences: from the last tokens to the probabilities of the next ones.

    Args:
        decoder: the decoder, whose parameters this module shares.
    """

    never: Tensor

    def __init__(self, decoder: LSTMDecoder) -> None:
        super().__init__()
        self.decoder = decoder
        never = torch.zeros(decoder.vocab_size, dtype=torch.bool, device=decoder.weight_hh.device)
        # Some vocabularies pad with </s>; that one must stay possible.
        never[[index for index in (decoder.pad_index, decoder.bos_index) if index not in (None, decoder.eos_index)]] = (
            True
        )
        self.register_buffer("never", never, persistent=False)

    def forward(self, tokens: Tensor, static_gates: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read a token of each sentence.

        Args:
            tokens: `(batch,)` int64; the first of a sentence is `<s>`.
            static_gates: `(batch, 4 * hidden_size)`, from `DecoderStart`.
            h, c: the states, each `(num_layers, batch, hidden_size)`.

        Returns:
            log p of each next token, `(batch, vocab_size)`, float32 or float64, in nats, -inf for `<pad>` and
            `<s>`, which are never written; and the new h and c.
        """
        weight_ih, weight_hh, _ = self.decoder.layer(0)
        gates = F.linear(F.embedding(tokens, self.decoder.embedding.weight), weight_ih[:, : self.decoder.embed_dim])
        gates = gates + static_gates
        states: list[Tensor] = []
        cells: list[Tensor] = []
        for layer in range(self.decoder.num_layers):
            if layer:
                weight_ih, weight_hh, bias = self.decoder.layer(layer)
                gates = F.linear(states[-1], weight_ih, bias)
            i, f, g, o = (gates + F.linear(h[layer], weight_hh)).chunk(4, -1)
            cells.append(f.sigmoid() * c[layer] + i.sigmoid() * g.tanh())
            states.append(o.sigmoid() * cells[-1].tanh())
        logits = self.decoder.output(states[-1])
        log_probs = logits.log_softmax(-1, dtype=compute_dtype(logits)).masked_fill(self.never, -torch.inf)
        return log_probs, torch.stack(states), torch.stack(cells)


class ExportedDecoder(NamedTuple):
    """`DecoderStart` and `DecoderStep` as programs that need no Python; `.module()` makes one callable."""

    start: ExportedProgram
    step: ExportedProgram


def export_decoder(decoder: SentenceDecoder) -> ExportedDecoder:
    """Export a decoder's start and step with `torch.export`, for batches of any size.

    Args:
        decoder: the decoder, in either mode. The programs share its parameters.

    Raises:
        ValueError: for layer-normalized layers, or those of another kind.
    """
    with torch.no_grad():
        return ExportedDecoder(
            *(torch.export.export(e.module, e.arguments, dynamic_shapes=e.dynamic_shapes) for e in _examples(decoder))
        )


def export_onnx(decoder: SentenceDecoder, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write a decoder as two ONNX models, `start.onnx` and `step.onnx`, for onnxruntime and the like.

    Inputs and outputs are named as in `DecoderStart` and `DecoderStep`, the new states `next_h` and `next_c`. The
    models' metadata holds `bos_index`, `eos_index`, `vocab_size`, `latent_dim`, `num_layers` and `hidden_size`. An
    existing file is replaced only by a whole one.

    Args:
        decoder: the decoder, in either mode, of float32 or float64 where onnxruntime is to run it on a CPU.
        folder: where to write; made if it is missing.

    Returns:
        the paths of the two files.

    Raises:
        ModuleNotFoundError: without onnx and onnxscript.
        ValueError: for layer-normalized layers, or those of another kind.
        OSError: if a file cannot be written.
    """
    _check_installed("onnx")
    _check_installed("onnxscript")
    settings = ("bos_index", "eos_index", "vocab_size", "latent_dim", "num_layers", "hidden_size")
    examples, folder = _examples(decoder), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "start.onnx", folder / "step.onnx"
    for example, path in zip(examples, paths, strict=True):
        with torch.no_grad(), _quietly():
            program: Any = torch.onnx.export(
                example.module,
                example.arguments,
                input_names=example.inputs,
                output_names=example.outputs,
                dynamic_shapes=example.dynamic_shapes,
                dynamo=True,
                verbose=False,
            )
        program.model.metadata_props.update({name: str(getattr(decoder, name)) for name in settings})
        partial = path.with_name(f".{path.name}.partial")
        try:
            program.save(partial, external_data=False)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return paths


class _Example(NamedTuple):
    """A module and how it is called, for both kinds of export."""

    module: nn.Module
    arguments: tuple[Tensor, ...]
    dynamic_shapes: tuple[dict[int, Any], ...]
    inputs: list[str]
    outputs: list[str]


def _examples(decoder: SentenceDecoder) -> tuple[_Example, _Example]:
    if not isinstance(decoder, LSTMDecoder) or decoder.cell != LSTM:
        raise ValueError("decoder: expected one of plain LSTM layers, got layer norm or layers of another kind")
    start, step = DecoderStart(decoder), DecoderStep(decoder)
    start.training = step.training = False  # or torch warns; the decoder stays in its mode, which makes no difference
    batch = torch.export.Dim("batch")
    # Three sentences: one would be taken for a constant.
    z = decoder.weight_hh.new_zeros(3, decoder.latent_dim)
    states = start(z)
    tokens = torch.zeros(3, dtype=torch.int64, device=z.device)
    row, state, names = {0: batch}, {1: batch}, ["static_gates", "h", "c"]
    return (
        _Example(start, (z,), (row,), ["z"], names),
        _Example(
            step, (tokens, *states), (row, row, state, state), ["tokens", *names], ["log_probs", "next_h", "next_c"]
        ),
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep back what the exporter says of packages it does not need and of its own use of PyTorch."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)


def _check_installed(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"ONNX export needs {package}, which is not installed: pip install 'fastvae[export]'", name=package
        )
