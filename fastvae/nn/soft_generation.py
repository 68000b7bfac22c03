"""Writing sentences with gradients: at each step a relaxed sample of a word, which the next step reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.functional import gumbel_softmax_sample_kl
from fastvae.ops.checks import check_float
from fastvae.ops.random import seed_of

if TYPE_CHECKING:
    from fastvae.nn.lstm import _Decoder

_STEP = 0x2545F4914F6B  # any large odd number: the seeds of two steps are this far apart


class SoftSentences(NamedTuple):
    """Sentences of distributions over words.

    Attributes:
        words: relaxed samples, `(batch, length, V)`; what lies behind a sentence's end means nothing.
        lengths: `(batch,)` int64: a sentence ends where `</s>` is the likeliest word, which counts, or is cut.
    """

    words: Tensor
    lengths: Tensor


def soft_sentences(
    decoder: _Decoder,
    z: Tensor,
    max_length: int,
    temperature: float,
    *,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
) -> SoftSentences:
    """Write sentences; arguments and errors as for `LSTMDecoder.generate_soft`."""
    weight: Tensor = decoder.embedding.weight
    bos, eos = decoder.bos_index, decoder.eos_index
    if bos is None or eos is None:
        raise ValueError(f"{'bos' if bos is None else 'eos'}_index: expected a token in order to generate, got None")
    if max_length < 1:
        raise ValueError(f"max_length: expected at least 1, got {max_length}")
    check_float("z", z)
    if z.dim() != 2 or z.size(1) != decoder.latent_dim:
        raise ValueError(f"z: expected shape (batch, {decoder.latent_dim}), got {tuple(z.shape)}")
    seed = seed_of(seed, generator, "z", z)
    weight_ih = decoder.layer(0)[0]
    static = F.linear(z, weight_ih[:, decoder.embed_dim :])
    states = [tuple(state[layer] for state in decoder.initial_states(z)) for layer in range(decoder.num_layers)]
    bias: Tensor | None = decoder.output.bias
    bias = weight.new_zeros(decoder.vocab_size) if bias is None else bias
    # <pad> and <s> are never written
    never = [index for index in {decoder.pad_index, bos} if index is not None and index != eos]
    bias = bias.index_fill(0, torch.tensor(never, dtype=torch.int64, device=z.device), -torch.inf)
    embedded = weight[bos].expand(z.size(0), -1)
    words: list[Tensor] = []
    lengths = torch.full((z.size(0),), max_length, device=z.device)
    for t in range(max_length):
        product = F.linear(embedded, weight_ih[:, : decoder.embed_dim]) + static
        for layer in range(decoder.num_layers):
            parameters = decoder.layer(layer)
            if layer:
                product = F.linear(states[layer - 1][0], parameters[0])
            states[layer] = decoder.cell.step(product, states[layer], parameters)
        logits = F.linear(states[-1][0], decoder.output.weight, bias)
        word, _ = gumbel_softmax_sample_kl(logits, temperature=temperature, seed=seed + t * _STEP)
        words.append(word)
        ends = word.detach().argmax(-1) == eos
        lengths = torch.where(ends & (lengths == max_length), t + 1, lengths)
        if z.device.type == "cpu" and t + 1 < max_length and bool((lengths <= t + 1).all()):
            break  # elsewhere looking would hold up the device's queue
        if t + 1 < max_length:
            embedded = word @ weight
    return SoftSentences(torch.stack(words, 1), lengths.clamp_max(len(words)))
