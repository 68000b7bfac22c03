"""Compile every kernel ahead of time and tabulate what it takes of a multiprocessor; no GPU is needed.

    python tests/kernels/resources.py             writes kernels/RESOURCES.md
    python tests/kernels/resources.py --json      prints the rows and the table
    python tests/kernels/resources.py --smallest  compiles what sizes of 1 and float16 make of the kernels

The launch functions themselves run, on meta tensors, with each launch replaced by its compilation: what is
measured is what a user's call would compile.
"""

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastvae.kernels import (
    categorical,
    corruption,
    cross_entropy,
    full_gaussian,
    gaussian,
    gru,
    importance,
    layer_norm_lstm,
    likelihood,
    lstm,
    mixture,
    posterior,
    sparse,
)

ARCHITECTURES = (80, 90)
_NOISES = ("gaussian", "masking", "salt_and_pepper")
TABLE = Path(__file__).parents[2] / "kernels" / "RESOURCES.md"


def rows() -> Iterator[dict[str, Any]]:
    """Yield one row per kernel, case and architecture; what another case compiled already is not repeated.

    Raises:
        RuntimeError: if other numbers of rows or steps make a kernel compile again.
    """
    knobs.compilation.always_compile = True  # a kernel from the cache on disk has no ptxas log
    knobs.nvidia.dump_ptxas_log = True
    for architecture in ARCHITECTURES:
        driver.set_active(_Driver(architecture))
        for case, call in _CASES.items():
            with _compiling() as compiled:
                call(_Sizes(rows=960, steps=2))
            for name, (kernel, log) in compiled.items():
                yield {
                    "kernel": name,
                    "case": case,
                    "sm": architecture,
                    "warps": kernel.metadata.num_warps,
                    "registers": int(re.search(r"Used (\d+) registers", log)[1]),
                    "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
                    "shared": kernel.metadata.shared,
                }
            for sizes in (_Sizes(rows=1, steps=1), _Sizes(rows=257, steps=3)):
                with _compiling() as compiled:
                    call(sizes)
                if compiled:
                    raise RuntimeError(f"{case}: {sizes} compiled again: {', '.join(compiled)}")


def compile_smallest() -> int:
    """Compile sizes of 1, which Triton makes constants of, and float16; returns how many kernels that were."""
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    driver.set_active(_Driver(ARCHITECTURES[-1]))
    count = 0
    for case, call in _SMALLEST.items():
        with _compiling() as compiled:
            try:
                call(_Sizes(rows=1, steps=1))
            except Exception as error:
                raise RuntimeError(f"{case}: {error}") from error
        count += len(compiled)
    return count


def write_table(table_rows: list[dict[str, Any]]) -> str:
    """Format `table_rows` as the Markdown file kept beside the kernels."""
    keys = dict.fromkeys((row["kernel"].strip("_"), row["case"], row["warps"]) for row in table_rows)
    cells = {
        (
            row["kernel"].strip("_"),
            row["case"],
            row["sm"],
        ): f"{row['registers']} | {row['spills']} | {row['shared']}"
        for row in table_rows
    }
    lines = [
        "# What each kernel takes of a multiprocessor",
        "",
        "Registers of a thread, bytes spilled, bytes of shared memory of a program, compiled ahead of time.",
        f"Written by `python tests/kernels/resources.py` with Triton {triton.__version__}; the tests hold",
        "the kernels to it.",
        "",
        "| kernel | case | warps | sm_80: registers | spills | shared | sm_90: registers | spills | shared |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for kernel, case, warps in keys:
        columns = " | ".join(cells[kernel, case, architecture] for architecture in ARCHITECTURES)
        lines.append(f"| {kernel} | {case} | {warps} | {columns} |")
    return "\n".join(lines) + "\n"


class _Driver:
    """Stands in for a GPU of one architecture, as far as compiling goes."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # the key of Triton's cache of compiled kernels

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _compiling() -> Iterator[dict[str, Any]]:
    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if log.getvalue():
            compiled[self.fn.__name__] = (kernel, log.getvalue())

    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


class _Sizes(NamedTuple):
    """What varies from call to call."""

    rows: int
    steps: int


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _gaussian(sizes: _Sizes, dtype: torch.dtype, latent: int, prior: str = "none") -> None:
    mean, seed = _tensor(sizes.rows, latent, dtype=dtype), _tensor(1, dtype=torch.int64)
    prior_rows = {"none": 0, "shared": 1, "full": sizes.rows}[prior]
    if prior == "full" and sizes.rows == 1:
        return  # the same as a shared one
    priors = [_tensor(prior_rows, latent)] * 2 if prior_rows else [None, None]
    gaussian.sample_kl_forward(mean, mean, *priors, seed, 1, True)
    grad_z, grad_kl = mean.unsqueeze(0), _tensor(sizes.rows)
    gaussian.sample_kl_backward(grad_z, grad_kl, mean, mean, *priors, seed, True)


def _likelihood(sizes: _Sizes, dtype: torch.dtype, features: int, log_var: tuple[int, ...] | None) -> None:
    prediction, target = _tensor(2, sizes.rows, features, dtype=dtype), _tensor(sizes.rows, features, dtype=dtype)
    nll = _tensor(2, sizes.rows)
    if log_var is None:
        likelihood.bernoulli_forward(prediction, target)
        likelihood.bernoulli_backward(nll, prediction, target, True, False)
        return
    likelihood.gaussian_forward(prediction, target, _tensor(*log_var))
    likelihood.gaussian_backward(nll, prediction, target, _tensor(*log_var), True, False, True)


def _categorical(sizes: _Sizes, dtype: torch.dtype, classes: int, prior: str = "none", hard: bool = False) -> None:
    logits, seed = _tensor(sizes.rows, classes, dtype=dtype), _tensor(1, dtype=torch.int64)
    log_prior = None if prior == "none" else _tensor(1, classes)
    slope = 0.5 * sizes.steps
    sample, kl = categorical.sample_kl_forward(logits, log_prior, seed, slope, hard, 1)
    categorical.sample_kl_backward(sample, kl, None if hard else sample, logits, log_prior, seed, slope)


def _corruption(sizes: _Sizes, dtype: torch.dtype, noise: str, features: int = 784) -> None:
    x, weight = _tensor(sizes.rows, features, dtype=dtype), _tensor(400, features, dtype=dtype)
    arguments = (_tensor(1, dtype=torch.int64), noise, 0.1 * sizes.steps, 0.0, 1.0)
    corruption.corrupt(x, *arguments)
    y = corruption.linear(x, weight, _tensor(400, dtype=dtype), *arguments)
    corruption.grad_weight(y, x, *arguments)


def _full_gaussian(sizes: _Sizes, dtype: torch.dtype, latent: int) -> None:
    mean, seed = _tensor(sizes.rows, latent, dtype=dtype), _tensor(1, dtype=torch.int64)
    lower = _tensor(sizes.rows, latent * (latent - 1) // 2, dtype=dtype)
    full_gaussian.sample_kl_forward(mean, mean, lower, seed, sizes.steps)
    grad_z = _tensor(sizes.steps, *mean.shape, dtype=dtype)
    full_gaussian.sample_kl_backward(grad_z, _tensor(sizes.rows), mean, mean, lower, seed)


def _importance(sizes: _Sizes, dtype: torch.dtype, latent: int) -> None:
    mean, seed = _tensor(sizes.rows, latent, dtype=dtype), _tensor(1, dtype=torch.int64)
    z, log_ratio = importance.sample_forward(mean, mean, seed, sizes.steps)
    importance.sample_backward(z, log_ratio, mean, mean, seed)
    bound = importance.bound_forward(log_ratio, log_ratio)
    importance.bound_backward(bound, log_ratio, log_ratio)


def _mixture(sizes: _Sizes, latent: int) -> None:
    z, density = _tensor(sizes.rows, latent), _tensor(sizes.rows)
    mixture = _tensor(sizes.rows + sizes.steps, latent)
    posterior.forward(z, mixture, mixture)
    posterior.backward(density, density, z, mixture, mixture)


def _mixture_prior(sizes: _Sizes, categorical: bool, count: int = 20, size: int = 5, latent: int = 16) -> None:
    z, logits = _tensor(sizes.rows, count, latent), _tensor(sizes.rows, count, size)
    components = _tensor(count, size, latent)
    inputs = (z, None, logits, None, components) if categorical else (z, z, logits, components, components)
    kl, dispersion, *terms, aggregate = mixture.forward(*inputs)
    mixture.backward([kl, dispersion, *terms], aggregate, *inputs)


def _cross_entropy(
    sizes: _Sizes, dtype: torch.dtype, label_smoothing: float = 0.0, vocabulary: int = 10000, size: int = 256
) -> None:
    hidden = _tensor(sizes.rows, size, dtype=dtype)
    weight, bias = _tensor(vocabulary, size, dtype=dtype), _tensor(vocabulary, dtype=dtype)
    target, losses = _tensor(sizes.rows, sizes.steps, dtype=torch.int64), _tensor(sizes.rows)
    cross_entropy.forward(hidden, weight, bias, target, -100, label_smoothing)
    cross_entropy.backward(losses, hidden, weight, bias, target, losses, -100, label_smoothing, True, True)


def _lstm(sizes: _Sizes, dtype: torch.dtype, hidden_size: int = 256) -> None:
    tokens, lengths = _tensor(*sizes, dtype=torch.int64), _tensor(sizes.rows, dtype=torch.int64)
    state, embedding = _tensor(sizes.rows, hidden_size, dtype=dtype), _tensor(10000, 256, dtype=dtype)
    seed = _tensor(1, dtype=torch.int64)
    weight_input, weight_hh = (_tensor(4 * hidden_size, size, dtype=dtype) for size in (256, hidden_size))
    weights = (state, state, embedding, weight_input, weight_hh, seed, 0.3, 1)
    hidden, h_n, c_n, gates, cells = lstm.forward(tokens, lengths, _tensor(sizes.rows, 4 * hidden_size), *weights)
    lstm.backward(hidden, h_n, c_n, hidden, gates, cells, tokens, lengths, *weights)


def _gru(sizes: _Sizes, dtype: torch.dtype) -> None:
    tokens, lengths = _tensor(*sizes, dtype=torch.int64), _tensor(sizes.rows, dtype=torch.int64)
    state, embedding = _tensor(2 * sizes.rows, 256, dtype=dtype), _tensor(10000, 256, dtype=dtype)
    weight, seed = _tensor(768, 256, dtype=dtype), _tensor(1, dtype=torch.int64)
    weights = (state, embedding, weight, weight, seed, 0.3, 1)
    hidden, h_n, gates = gru.forward(tokens, lengths, _tensor(2 * sizes.rows, 1024), *weights, True)
    gru.backward(hidden, h_n, hidden, gates, tokens, lengths, *weights)


def _layer_norm_lstm(sizes: _Sizes, dtype: torch.dtype, hidden_size: int = 256) -> None:
    tokens, lengths = _tensor(*sizes, dtype=torch.int64), _tensor(sizes.rows, dtype=torch.int64)
    state, embedding = _tensor(sizes.rows, hidden_size, dtype=dtype), _tensor(10000, 256, dtype=dtype)
    weight_input, weight_hh = (_tensor(4 * hidden_size, size, dtype=dtype) for size in (256, hidden_size))
    norms = _tensor(3, 4 * hidden_size, dtype=dtype), _tensor(2, hidden_size, dtype=dtype)
    weights = (state, state, embedding, weight_input, weight_hh, *norms, _tensor(1, dtype=torch.int64), 0.3, 1, 1e-5)
    static_inputs = _tensor(sizes.rows, 4 * hidden_size)
    hidden, h_n, c_n, *kept = layer_norm_lstm.forward(tokens, lengths, static_inputs, *weights, True)
    layer_norm_lstm.backward(hidden, h_n, c_n, hidden, *kept, tokens, lengths, *weights)


def _ista(sizes: _Sizes, atoms: int, features: int) -> None:
    x, dictionary, l1 = _tensor(sizes.rows, features), _tensor(atoms, features), _tensor(sizes.rows)
    sparse.ista(x, dictionary, l1, _tensor(1), _tensor(sizes.rows, atoms), sizes.steps + 2, True)


def _fista(sizes: _Sizes, atoms: int, features: int, positive: bool = False) -> None:
    x, l1, weights = _tensor(sizes.rows, features), _tensor(sizes.rows), _tensor(atoms)
    problem = sparse._Problem.of(_tensor(atoms, features), weights, 0.5 * sizes.steps, positive)
    state = sparse._start(problem, x, l1, None, 1e-4)
    sparse._advance(problem, state, sizes.steps)
    if sparse._fits_chip(problem.dictionary):
        sparse._advance_on_chip(problem, state, sizes.steps, 10 * sizes.steps)


def _tf32(family: Callable[..., None], sizes: _Sizes, *settings: Any) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        family(sizes, torch.float32, *settings)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


_CASES: dict[str, Callable[[_Sizes], None]] = {
    "float32, latent 128": lambda n: _gaussian(n, torch.float32, 128),
    "float32, latent 33": lambda n: _gaussian(n, torch.float32, 33),
    "bfloat16, latent 128, shared prior": lambda n: _gaussian(n, torch.bfloat16, 128, "shared"),
    "float32, latent 2048, full prior": lambda n: _gaussian(n, torch.float32, 2048, "full"),
    "Bernoulli in float32": lambda n: _likelihood(n, torch.float32, 784, None),
    "Bernoulli in bfloat16": lambda n: _likelihood(n, torch.bfloat16, 784, None),
    "Gaussian, one log_var": lambda n: _likelihood(n, torch.float32, 784, ()),
    "Gaussian, a log_var for each of 33": lambda n: _likelihood(n, torch.bfloat16, 33, (33,)),
    "float32, 10 classes": lambda n: _categorical(n, torch.float32, 10),
    "float32, 32 classes, shared prior, hard": lambda n: _categorical(n, torch.float32, 32, "shared", True),
    "bfloat16, 1000 classes": lambda n: _categorical(n, torch.bfloat16, 1000),
    "float32, 8192 classes": lambda n: _categorical(n, torch.float32, 8192),
    "masking in float32": lambda n: _corruption(n, torch.float32, "masking"),
    "masking in TF32": lambda n: _tf32(lambda n, dtype: _corruption(n, dtype, "masking"), n),
    "masking of 33 features in float32": lambda n: _corruption(n, torch.float32, "masking", 33),
    "Gaussian noise in bfloat16": lambda n: _corruption(n, torch.bfloat16, "gaussian"),
    "full covariance, float32, latent 32": lambda n: _full_gaussian(n, torch.float32, 32),
    "full covariance, bfloat16, latent 33": lambda n: _full_gaussian(n, torch.bfloat16, 33),
    "full covariance, float32, latent 128": lambda n: _full_gaussian(n, torch.float32, 128),
    "importance-weighted, float32, latent 20": lambda n: _importance(n, torch.float32, 20),
    "importance-weighted, bfloat16, latent 50": lambda n: _importance(n, torch.bfloat16, 50),
    "mixture, latent 32": lambda n: _mixture(n, 32),
    "mixture of Gaussians": lambda n: _mixture_prior(n, False),
    "mixture of categorical variables": lambda n: _mixture_prior(n, True),
    "logits in float32": lambda n: _cross_entropy(n, torch.float32),
    "logits in TF32": lambda n: _tf32(_cross_entropy, n),
    "logits in bfloat16": lambda n: _cross_entropy(n, torch.bfloat16),
    "smoothed logits in bfloat16": lambda n: _cross_entropy(n, torch.bfloat16, 0.1),
    "LSTM in float32": lambda n: _lstm(n, torch.float32),
    "LSTM in TF32": lambda n: _tf32(_lstm, n),
    "LSTM in bfloat16": lambda n: _lstm(n, torch.bfloat16),
    "LSTM of 32 units in float32": lambda n: _lstm(n, torch.float32, 32),
    "LSTM of 64 units in TF32": lambda n: _tf32(_lstm, n, 64),
    "LSTM of 64 units in bfloat16": lambda n: _lstm(n, torch.bfloat16, 64),
    "LSTM of 128 units in bfloat16": lambda n: _lstm(n, torch.bfloat16, 128),
    "GRU in float32": lambda n: _gru(n, torch.float32),
    "GRU in TF32": lambda n: _tf32(_gru, n),
    "GRU in bfloat16": lambda n: _gru(n, torch.bfloat16),
    "layer-normalized LSTM in float32": lambda n: _layer_norm_lstm(n, torch.float32),
    "layer-normalized LSTM in TF32": lambda n: _tf32(_layer_norm_lstm, n),
    "layer-normalized LSTM in bfloat16": lambda n: _layer_norm_lstm(n, torch.bfloat16),
    "layer-normalized LSTM of 33 units in float32": lambda n: _layer_norm_lstm(n, torch.float32, 33),
    "layer-normalized LSTM of 1024 units in bfloat16": lambda n: _layer_norm_lstm(n, torch.bfloat16, 1024),
    "256 atoms of 64 features": lambda n: _ista(n, 256, 64),
    "256 atoms of 64 features in TF32": lambda n: _tf32(lambda n, _: _ista(n, 256, 64), n),
    "65 atoms of 33 features": lambda n: _ista(n, 65, 33),
    "128 atoms of 256 features": lambda n: _ista(n, 128, 256),
    "1024 atoms of 256 features": lambda n: _ista(n, 1024, 256),
    "1024 atoms of 256 features in TF32": lambda n: _tf32(lambda n, _: _ista(n, 1024, 256), n),
    "257 atoms of 300 features": lambda n: _ista(n, 257, 300),
    "solving 256 atoms of 64 features": lambda n: _fista(n, 256, 64),
    "solving 65 atoms of 33 features": lambda n: _fista(n, 65, 33, True),
    "solving 128 atoms of 256 features": lambda n: _fista(n, 128, 256),
    "solving 2048 atoms of 256 features": lambda n: _fista(n, 2048, 256),
}

_HALF = torch.float16
_SMALLEST: dict[str, Callable[[_Sizes], None]] = {
    **{f"latent 1, {prior} prior": lambda n, p=prior: _gaussian(n, _HALF, 1, p) for prior in ("none", "shared")},
    "one pixel": lambda n: _likelihood(n, _HALF, 1, None),
    "one pixel's Gaussian": lambda n: _likelihood(n, _HALF, 1, (1,)),
    **{f"one class, {prior} prior": lambda n, p=prior: _categorical(n, _HALF, 1, p) for prior in ("none", "shared")},
    "one class, hard": lambda n: _categorical(n, _HALF, 1, hard=True),
    **{f"{noise} of one feature": lambda n, kind=noise: _corruption(n, _HALF, kind, 1) for noise in _NOISES},
    "full covariance of 2": lambda n: _full_gaussian(n, _HALF, 2),
    "importance-weighted, latent 1": lambda n: _importance(n, _HALF, 1),
    "mixture, latent 1": lambda n: _mixture(n, 1),
    "one component of one Gaussian": lambda n: _mixture_prior(n, False, 1, 1, 1),
    "one component of one class": lambda n: _mixture_prior(n, True, 1, 1, 1),
    "one word": lambda n: _cross_entropy(n, _HALF, 0.0, 1, 1),
    "one word, smoothed": lambda n: _cross_entropy(n, _HALF, 0.1, 1, 1),
    "LSTM of one unit": lambda n: _lstm(n, _HALF, 1),
    "LSTM of 256 units": lambda n: _lstm(n, _HALF, 256),
    "GRU": lambda n: _gru(n, _HALF),
    "layer-normalized LSTM of one unit": lambda n: _layer_norm_lstm(n, _HALF, 1),
    "one atom of one feature": lambda n: _ista(n, 1, 1),
    "solving one atom of one feature": lambda n: _fista(n, 1, 1),
}

if __name__ == "__main__":
    if "--smallest" in sys.argv:
        print(compile_smallest())
        sys.exit()
    collected = list(rows())
    if "--json" in sys.argv:
        print(json.dumps({"triton": triton.__version__, "rows": collected, "table": write_table(collected)}))
    else:
        TABLE.write_text(write_table(collected))
        print(TABLE.read_text())
