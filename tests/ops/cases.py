"""One call of each public function, for tests that put all of them through the same thing.

Run as a program it saves what every case gives, so that other processes (another instruction set, no C++ core) can be
compared: ``python cases.py results.pt``.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.functional import (
    bag_of_words_loss,
    bernoulli_nll,
    categorical_kl,
    categorical_mixture_kl,
    corrupt,
    corrupted_linear,
    fista,
    full_gaussian_sample_kl,
    gaussian_head,
    gaussian_kl,
    gaussian_nll,
    gaussian_sample_kl,
    gaussian_sample_log_ratio,
    gru,
    gru_decode,
    gumbel_softmax_sample_kl,
    importance_weighted_bound,
    ista,
    layer_norm_lstm,
    layer_norm_lstm_decode,
    linear_cross_entropy,
    lstm,
    lstm_decode,
    mixture_kl,
    mixture_log_density,
    mutual_information,
    top_k_decode,
    top_k_encode,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Case(NamedTuple):
    """A public function over named tensors, and a maker of those from a dtype and a batch size."""

    call: Callable[..., tuple[Tensor, ...]]
    inputs: Callable[[torch.dtype, int], dict[str, Tensor]]


def _gaussian_inputs(dtype, batch):
    random = torch.Generator().manual_seed(batch)
    names = ("mean", "log_var", "prior_mean", "prior_log_var")
    tensors = {name: torch.randn(batch, 33, generator=random).to(dtype) for name in names[:2]}
    tensors |= {name: torch.randn(33, generator=random) for name in names[2:]}
    return tensors | {"seed": torch.tensor([-6_000_000_000])}


def _bernoulli_inputs(dtype, batch):
    random = torch.Generator().manual_seed(batch)
    logits = (3 * torch.randn(2, batch, 33, generator=random)).to(dtype)
    return {"logits": logits, "target": torch.rand(batch, 33, generator=random).to(dtype)}


def _likelihood_inputs(dtype, batch, full=False):
    random = torch.Generator().manual_seed(batch)
    shapes = {"mean": (2, batch, 33), "target": (batch, 33), "log_var": (2, batch, 33) if full else (33,)}
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def _full_gaussian_inputs(dtype, batch):
    random = torch.Generator().manual_seed(batch)
    shapes = {"mean": (batch, 7), "log_diagonal": (batch, 7), "lower": (batch, 21)}
    tensors = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}
    return tensors | {"seed": torch.tensor([-6_000_000_000])}


def _importance_inputs(dtype, batch):
    tensors = _gaussian_inputs(dtype, batch)
    return {name: tensors[name] for name in ("mean", "log_var", "seed")}


def _bound_inputs(dtype, batch):
    random = torch.Generator().manual_seed(batch)
    return {n: torch.randn(5, batch, generator=random).to(dtype) for n in ("log_likelihood", "log_ratio")}


def _categorical_inputs(dtype, batch):
    random = torch.Generator().manual_seed(batch)
    tensors = {"logits": torch.randn(batch, 33, generator=random).to(dtype)}
    return tensors | {"prior_logits": torch.randn(33, generator=random), "seed": torch.tensor([-6_000_000_000])}


def _corruption_inputs(dtype, batch):
    x = torch.randn(batch, 33, generator=torch.Generator().manual_seed(batch)).to(dtype)
    return {"x": x, "seed": torch.tensor([7])}


def _corrupted_linear_inputs(dtype, batch):
    random = torch.Generator().manual_seed(batch)
    weights = {"weight": torch.randn(17, 33, generator=random), "bias": torch.randn(17, generator=random)}
    return _corruption_inputs(dtype, batch) | {name: tensor.to(dtype) for name, tensor in weights.items()}


def _mixture_prior_inputs(dtype, batch):
    random, posterior, prior = torch.Generator().manual_seed(batch), (batch, 3, 7), (3, 5, 7)
    shapes = {"mean": posterior, "log_var": posterior, "logits": (batch, 3, 5)}
    shapes |= {"component_mean": prior, "component_log_var": prior}
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def _cross_entropy_inputs(dtype, batch):
    random = torch.Generator().manual_seed(batch)
    shapes = {"hidden": (batch, 33), "weight": (257, 33), "bias": (257,)}
    tensors = {name: (0.3 * torch.randn(shape, generator=random)).to(dtype) for name, shape in shapes.items()}
    target = torch.randint(0, 257, (batch,), generator=random)
    target[1] = -100
    return tensors | {"target": target}


def _bag_of_words_inputs(dtype, batch):
    tensors = _cross_entropy_inputs(dtype, batch)
    del tensors["target"]
    targets = torch.randint(0, 257, (batch, 6), generator=torch.Generator().manual_seed(batch))
    return tensors | {"targets": targets, "lengths": torch.arange(batch) % 7}


def _lstm_inputs(dtype, batch):
    random, (time, vocabulary, embed, latent, size) = torch.Generator().manual_seed(batch), (6, 19, 7, 3, 33)
    shapes = {
        "z": (batch, latent),
        "h0": (batch, size),
        "c0": (batch, size),
        "embedding": (vocabulary, embed),
        "weight_ih": (4 * size, embed + latent),
        "weight_hh": (4 * size, size),
        "bias": (4 * size,),
    }
    tensors = {name: (0.3 * torch.randn(shape, generator=random)).to(dtype) for name, shape in shapes.items()}
    tokens = torch.randint(0, vocabulary, (batch, time), generator=random)
    lengths = torch.arange(batch) % (time + 1)
    return tensors | {"tokens": tokens, "lengths": lengths, "seed": torch.tensor([7])}


def _dense_lstm_inputs(dtype, batch):
    tensors = _lstm_inputs(dtype, batch)
    inputs = torch.randn(batch, 6, 10, generator=torch.Generator().manual_seed(batch)).to(dtype)
    return {"inputs": inputs} | {n: t for n, t in tensors.items() if n not in ("tokens", "z", "embedding", "seed")}


def _layer_norm_lstm_inputs(dtype, batch):
    random, size = torch.Generator().manual_seed(batch), 33
    shapes = {"norm_input": (4 * size,), "norm_hidden": (4 * size,), "norm_cell": (2, size)}
    norms = {name: torch.rand(shape, generator=random).to(dtype) for name, shape in shapes.items()}
    return _lstm_inputs(dtype, batch) | norms


def _dense_layer_norm_lstm_inputs(dtype, batch):
    norms = _layer_norm_lstm_inputs(dtype, batch)
    return _dense_lstm_inputs(dtype, batch) | {n: t for n, t in norms.items() if n.startswith("norm")}


def _gru_inputs(dtype, batch, samples=2):
    random, (time, vocabulary, embed, latent, size) = torch.Generator().manual_seed(batch), (6, 19, 7, 3, 33)
    shapes = {
        "z": (samples, batch, latent),
        "h0": (samples, batch, size),
        "embedding": (vocabulary, embed),
        "weight_ih": (3 * size, embed + latent),
        "weight_hh": (3 * size, size),
        "bias_ih": (3 * size,),
        "bias_hh": (3 * size,),
    }
    tensors = {name: (0.3 * torch.randn(shape, generator=random)).to(dtype) for name, shape in shapes.items()}
    tokens = torch.randint(0, vocabulary, (batch, time), generator=random)
    lengths = torch.arange(batch) % (time + 1)
    return tensors | {"tokens": tokens, "lengths": lengths, "seed": torch.tensor([7])}


def _dense_gru_inputs(dtype, batch):
    tensors = _gru_inputs(dtype, batch, samples=1)
    wanted = {name: tensors[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "lengths")}
    inputs = torch.randn(batch, 6, 10, generator=torch.Generator().manual_seed(batch)).to(dtype)
    return wanted | {"inputs": inputs, "h0": tensors["h0"][0]}


def _top_k_encode_inputs(dtype, batch):
    random = torch.Generator().manual_seed(batch)
    shapes = {"x": (batch, 33), "weight": (257, 33), "bias": (257,)}
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def _top_k_decode_inputs(dtype, batch):
    random = torch.Generator().manual_seed(batch)
    shapes = {"values": (batch, 7), "weight": (257, 33), "bias": (33,)}
    tensors = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}
    return tensors | {"indices": torch.randint(0, 257, (batch, 7), generator=random)}


def _ista_inputs(dtype, batch):
    random = torch.Generator().manual_seed(batch)
    shapes = {"x": (batch, 33), "dictionary": (57, 33), "init": (batch, 57)}
    tensors = {name: (0.3 * torch.randn(shape, generator=random)).to(dtype) for name, shape in shapes.items()}
    return tensors | {"l1": torch.full((batch,), 0.1, dtype=dtype)}


def _gaussian_head_inputs(dtype, batch):
    random = torch.Generator().manual_seed(batch)
    shapes = {"hidden": (batch, 33), "weight": (14, 33), "bias": (14,)}
    tensors = {name: (0.3 * torch.randn(shape, generator=random)).to(dtype) for name, shape in shapes.items()}
    return tensors | {"seed": torch.tensor([7])}


def _mixture_inputs(dtype, batch):
    random = torch.Generator().manual_seed(batch)
    shapes = {"z": (batch, 7), "mean": (2 * batch, 7), "log_var": (2 * batch, 7)}
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def _information_inputs(dtype, batch):
    tensors = _mixture_inputs(dtype, batch)
    return {"mean": tensors["mean"], "log_var": tensors["log_var"], "seed": torch.tensor([7])}


CASES = {
    "gaussian_sample_kl": Case(
        lambda **tensors: gaussian_sample_kl(**tensors, num_samples=2, reduction="none"), _gaussian_inputs
    ),
    "gaussian_kl": Case(lambda seed, **tensors: (gaussian_kl(**tensors),), _gaussian_inputs),
    "gaussian_head": Case(
        lambda **tensors: gaussian_head(**tensors, num_samples=2, reduction="none"), _gaussian_head_inputs
    ),
    "mixture_log_density": Case(lambda **tensors: (mixture_log_density(**tensors),), _mixture_inputs),
    "mutual_information": Case(lambda **tensors: (mutual_information(**tensors),), _information_inputs),
    "bernoulli_nll": Case(lambda **tensors: (bernoulli_nll(**tensors),), _bernoulli_inputs),
    "gaussian_nll": Case(lambda **tensors: (gaussian_nll(**tensors),), _likelihood_inputs),
    "gaussian_nll full": Case(
        lambda **tensors: (gaussian_nll(**tensors),), lambda *arguments: _likelihood_inputs(*arguments, full=True)
    ),
    "full_gaussian_sample_kl": Case(
        lambda **tensors: full_gaussian_sample_kl(**tensors, num_samples=2), _full_gaussian_inputs
    ),
    "categorical_mixture_kl": Case(
        lambda mean, logits, component_mean: tuple(categorical_mixture_kl(mean, logits, component_mean)),
        lambda *arguments: {n: t for n, t in _mixture_prior_inputs(*arguments).items() if "log_var" not in n},
    ),
    "mixture_kl": Case(lambda **tensors: tuple(mixture_kl(**tensors)), _mixture_prior_inputs),
    "gaussian_sample_log_ratio": Case(
        lambda **tensors: gaussian_sample_log_ratio(**tensors, num_samples=3), _importance_inputs
    ),
    "importance_weighted_bound": Case(lambda **tensors: (importance_weighted_bound(**tensors),), _bound_inputs),
    "gumbel_softmax_sample_kl": Case(
        lambda **tensors: gumbel_softmax_sample_kl(**tensors, num_samples=2, temperature=0.7), _categorical_inputs
    ),
    "gumbel_softmax_sample_kl hard": Case(
        lambda **tensors: gumbel_softmax_sample_kl(**tensors, hard=True, temperature=1.0), _categorical_inputs
    ),
    "categorical_kl": Case(lambda seed, **tensors: (categorical_kl(**tensors),), _categorical_inputs),
    "corrupt": Case(
        lambda **tensors: (corrupt(**tensors, noise="salt_and_pepper", level=0.4, low=-1.0, high=2.0),),
        _corruption_inputs,
    ),
    "corrupted_linear": Case(
        lambda **tensors: (corrupted_linear(**tensors, noise="masking", level=0.4, low=0.0, high=1.0),),
        _corrupted_linear_inputs,
    ),
    "linear_cross_entropy": Case(lambda **tensors: (linear_cross_entropy(**tensors),), _cross_entropy_inputs),
    "linear_cross_entropy rows": Case(
        lambda **tensors: (linear_cross_entropy(**tensors, reduction="none"),), _cross_entropy_inputs
    ),
    "bag_of_words_loss": Case(
        lambda **tensors: (bag_of_words_loss(**tensors, reduction="none"),), _bag_of_words_inputs
    ),
    "lstm_decode": Case(lambda **tensors: lstm_decode(**tensors, word_dropout=0.4, unk_index=1), _lstm_inputs),
    "lstm": Case(lstm, _dense_lstm_inputs),
    "gru_decode": Case(lambda **tensors: gru_decode(**tensors, word_dropout=0.4, unk_index=1), _gru_inputs),
    "gru": Case(gru, _dense_gru_inputs),
    "layer_norm_lstm_decode": Case(
        lambda **tensors: layer_norm_lstm_decode(**tensors, word_dropout=0.4, unk_index=1, eps=1e-3),
        _layer_norm_lstm_inputs,
    ),
    "layer_norm_lstm": Case(lambda **tensors: layer_norm_lstm(**tensors, eps=1e-3), _dense_layer_norm_lstm_inputs),
    "ista": Case(lambda **tensors: (ista(**tensors, step=0.05, max_iter=6),), _ista_inputs),
    "fista": Case(lambda **tensors: (fista(**tensors, step=0.05, max_iter=6),), _ista_inputs),
    "top_k_encode": Case(lambda **tensors: (top_k_encode(**tensors, k=5)[0],), _top_k_encode_inputs),
    "top_k_decode": Case(lambda **tensors: (top_k_decode(**tensors),), _top_k_decode_inputs),
}


# Public functions that are not one op of fixed arithmetic: solvers, which agree to their tolerance (tests/ops/
# test_sparse.py), what PyTorch differentiates by itself, and what has no gradient.
OTHERS = {
    "dictionary_update",
    "duality_gap",
    "ista_step",
    "kkt_violation",
    "lambda_max",
    "scale_tril",
    "soft_threshold",
    "sparse_encode",
    "sparse_value",
}


def leaves(case: Case, dtype: torch.dtype = torch.float32, batch: int = 9) -> dict[str, Tensor]:
    """Return the case's inputs; the floating-point ones take gradients."""
    return {
        name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in case.inputs(dtype, batch).items()
    }


def backward(outputs: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of a fixed random combination of the outputs, by input."""
    random = torch.Generator().manual_seed(0)
    grad_outputs = [torch.randn(o.shape, generator=random).to(o.dtype) for o in outputs]
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    grads = torch.autograd.grad(outputs, list(wanted.values()), grad_outputs, allow_unused=True)
    return dict(zip(wanted, grads, strict=True))


def results(name: str, dtype: torch.dtype, batch: int = 9) -> list[Tensor]:
    """Return outputs and gradients of the case `name`."""
    inputs = leaves(CASES[name], dtype, batch)
    outputs = CASES[name].call(**inputs)
    return [*(o.detach() for o in outputs), *backward(outputs, inputs).values()]


if __name__ == "__main__":
    torch.save({(name, dtype): results(name, dtype) for name in CASES for dtype in DTYPES}, sys.argv[1])
