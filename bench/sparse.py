"""Sparse coding on dictionaries learned from photographs: time until every sample passes a duality gap, and ISTA.

Dictionaries of random atoms are several times easier and would hide the differences. The photographs come with
scikit-learn. SPAMS, under the GPL and no dependency of ours, is compared where it is installed:
``pip install spams-bin``. Whoever misses the gap, or takes over four seconds a call, is left out of a case, and named
in its title. scikit-learn's tolerance cannot be set: it is the same call for all gaps.
"""

import functools
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import sklearn.decomposition
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F

from bench.interleave import OURS, Case, WrongResultError, assert_close
from fastvae.estimators import MiniBatchDictionaryLearning
from fastvae.functional import duality_gap, ista, sparse_encode, sparse_value

PROBLEMS = [(64, 256, 0.15), (64, 256, 0.05), (144, 512, 0.1), (256, 1024, 0.075)]  # features, atoms, l1
SAMPLES = [1000, 16_000]
GAPS = [1e-2, 1e-3, 1e-4, 1e-6]
_LONGEST = 4.0  # seconds a call


def patches(features: int, count: int, seed: int) -> Tensor:
    """Square patches of the photographs: mean removed, the flat ones left out, of unit norm."""
    random, side = np.random.default_rng(seed), round(features**0.5)
    images = [image.mean(2) / 255 for image in load_sample_images().images]
    found: list[np.ndarray] = []
    while sum(map(len, found)) < count:
        image = images[random.integers(len(images))]
        windows = np.lib.stride_tricks.sliding_window_view(image, (side, side))
        rows, columns = (random.integers(0, n, 4096) for n in windows.shape[:2])
        chosen = windows[rows, columns].reshape(-1, features)
        chosen = chosen - chosen.mean(1, keepdims=True)
        found.append(chosen[chosen.std(1) > 0.02])
    chosen = np.concatenate(found)[:count]
    return torch.from_numpy(chosen / np.linalg.norm(chosen, axis=1, keepdims=True)).float()


@functools.cache
def learned(features: int, atoms: int, l1: float) -> Tensor:
    """A dictionary from two epochs over 20,000 patches (Mairal et al. 2009)."""
    learner = MiniBatchDictionaryLearning(
        atoms, alpha=l1, max_iter=2, batch_size=512, tol=0, max_no_improvement=None, random_state=0, verbose=False
    )
    return torch.from_numpy(learner.fit(patches(features, 20_000, seed=0).numpy()).components_)


def cases() -> Iterator[Case]:
    for features, atoms, l1 in PROBLEMS:
        for samples in SAMPLES:
            for gap in GAPS:
                yield _encode_case(features, atoms, l1, samples, gap)
    yield _ista_case(1024, 64, 256, 100)
    yield _learning_case(29_184, 64, 256, 0.15, 512)


def _encode_case(features: int, atoms: int, l1: float, samples: int, gap: float) -> Case:
    # float32 certifies gaps down to 3e-6.
    dtype = torch.float32 if gap > 1e-5 else torch.float64
    x, dictionary = patches(features, samples, seed=1).to(dtype), learned(features, atoms, l1).to(dtype)

    def scikit_learn(x: Tensor) -> Any:  # in float32 its tolerance is out of its reach
        return sklearn.decomposition.sparse_encode(
            x.double().numpy(), dictionary.double().numpy(), algorithm="lasso_cd", alpha=l1,
            n_jobs=torch.get_num_threads(), max_iter=100_000,
        )  # fmt: skip

    def passes(solve: Callable[[Tensor], Any]) -> bool:
        first = min(_seconds(solve, x[:1000]) for _ in range(2))  # the first call may start processes, or compile
        return first * samples / 1000 <= _LONGEST and _gap(solve(x), x, dictionary, l1) <= gap

    solvers: dict[str, list[Callable[[Tensor], Any]]] = {"scikit-learn, float64": [scikit_learn]}
    if importlib.util.find_spec("spams"):
        solvers |= _spams(dictionary, l1)
    found = {name: next(filter(passes, calls), None) for name, calls in solvers.items()}
    found |= _fista(x, dictionary, l1, gap)
    contenders: dict[str, Callable[[], Any]] = {OURS: lambda: sparse_encode(x, dictionary, l1, tol=gap)}
    contenders |= {name: functools.partial(solve, x) for name, solve in found.items() if solve}
    missing = " and ".join(name.removesuffix(", float64") for name, solve in found.items() if not solve)

    def check(name: str) -> None:
        reached = _gap(contenders[name](), x, dictionary, l1)
        if not reached <= 1.05 * gap:
            raise WrongResultError(f"{name}: a sample's gap is {reached:.2g}, more than {gap:g}")

    return Case(
        "sparse",
        f"{samples:,} patches, {features} features, {atoms} atoms, l1 {l1:g}, gap {gap:g}"
        + (", float64" if dtype == torch.float64 else "")
        + (f" (not by {missing})" if missing else ""),
        "forward",
        contenders,
        check,
        flops=2.0 * samples * features * atoms,
        bytes=4.0 * (samples * (features + atoms) + features * atoms),
    )


def _gap(codes: Any, x: Tensor, dictionary: Tensor, l1: float) -> float:
    """Largest relative gap, recomputed in float64."""
    if not isinstance(codes, Tensor):
        dense = codes.T.toarray() if hasattr(codes, "toarray") else codes
        codes = torch.from_numpy(np.ascontiguousarray(dense))
    x, dictionary = x.double(), dictionary.double()
    return (duality_gap(x, dictionary, codes.double(), l1) / x.square().sum(1)).max().item()


def _seconds(call: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def _spams(dictionary: Tensor, l1: float) -> dict[str, list[Callable[[Tensor], Any]]]:
    """Its two solvers; of the one that has a tolerance, from the loosest on."""
    import scipy.sparse
    import spams

    atoms, threads = dictionary.numpy().T, torch.get_num_threads()  # Fortran order, as it wants it, without a copy

    def lars(x: Tensor) -> Any:
        return spams.lasso(x.numpy().T, D=atoms, lambda1=l1, mode=2, numThreads=threads)

    def descent(tol: float, x: Tensor) -> Any:
        start = scipy.sparse.csc_matrix((atoms.shape[1], len(x)), dtype=atoms.dtype)
        return spams.cd(x.numpy().T, atoms, start, lambda1=l1, mode=2, itermax=10_000, tol=tol, numThreads=threads)

    tolerances = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    return {"SPAMS LARS": [lars], "SPAMS CD": [functools.partial(descent, tol) for tol in tolerances]}


def _fista(x: Tensor, dictionary: Tensor, l1: float, gap: float) -> dict[str, Callable[[Tensor], Any] | None]:
    """The batched loop a user would write, in Gram form, for as many iterations as the slowest sample needs."""

    def step(point: Tensor, codes: Tensor, gram: Tensor, products: Tensor, size: float, beta: Tensor) -> Any:
        new = F.softshrink(point + size * (products - point @ gram), size * l1)
        return new + beta * (new - codes), new

    def iterates(step: Callable[..., Any], x: Tensor) -> Iterator[Tensor]:
        gram, products = dictionary @ dictionary.T, x @ dictionary.T
        size = 1 / torch.linalg.matrix_norm(dictionary, 2).item() ** 2
        point = codes = torch.zeros_like(products)
        t = torch.tensor(1.0)
        while True:
            t_next = 0.5 * (1 + torch.sqrt(1 + 4 * t * t))
            point, codes = step(point, codes, gram, products, size, (t - 1) / t_next)
            t = t_next
            yield codes

    def solve(step: Callable[..., Any], iterations: int, x: Tensor) -> Tensor:
        return next(itertools.islice(iterates(step, x), iterations - 1, None))

    check, start = 100, time.perf_counter()
    for iteration, codes in enumerate(iterates(step, x), 1):
        if time.perf_counter() - start > _LONGEST:
            return {"eager": None, "torch.compile": None}
        if iteration == check:
            if _gap(codes, x, dictionary, l1) <= gap:
                break
            check = round(1.25 * check)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    return {name: functools.partial(solve, s, check) for name, s in (("eager", step), ("torch.compile", compiled))}


def _ista_case(samples: int, features: int, atoms: int, iterations: int) -> Case:
    x, dictionary, l1 = patches(features, samples, seed=1), learned(features, atoms, 0.15), 0.15
    size = 1 / torch.linalg.matrix_norm(dictionary, 2).item() ** 2

    def gram_form(codes: Tensor, shift: Tensor, matrix: Tensor) -> Tensor:
        for _ in range(iterations):
            codes = F.softshrink(torch.addmm(shift, codes, matrix), size * l1)
        return codes

    def residual_form(codes: Tensor) -> Tensor:
        for _ in range(iterations):
            residual = torch.addmm(x, codes, dictionary, alpha=-1)
            codes = F.softshrink(torch.addmm(codes, residual, dictionary.T, alpha=size), size * l1)
        return codes

    def run(form: Callable[..., Tensor]) -> Tensor:
        zero = x.new_zeros(samples, atoms)
        if form is not gram_form:
            return form(zero)
        return form(zero, size * (x @ dictionary.T), torch.eye(atoms) - size * (dictionary @ dictionary.T))

    contenders: dict[str, Callable[[], Any]] = {
        OURS: lambda: ista(x, dictionary, l1, step=size, max_iter=iterations),
        "eager": lambda: run(gram_form),
        "eager, residual form": lambda: run(residual_form),
        "torch.compile": functools.partial(run, torch.compile(residual_form, fullgraph=True, dynamic=False)),
    }

    def check(name: str) -> None:
        a, codes = dictionary.double(), torch.zeros(samples, atoms, dtype=torch.float64)
        for _ in range(iterations):
            codes = F.softshrink(codes + size * (x.double() - codes @ a) @ a.T, size * l1)
        assert_close(name, "codes", contenders[name](), codes)

    return Case(
        "sparse",
        f"ISTA, {samples:,} patches, {features} features, {atoms} atoms, {iterations} iterations",
        "forward",
        contenders,
        check,
        flops=iterations * samples * min(4.0 * features * atoms, 2.0 * atoms * atoms),
        bytes=4.0 * samples * (features + atoms),
    )


def _learning_case(samples: int, features: int, atoms: int, l1: float, batch: int) -> Case:
    """One pass of minibatch dictionary learning from the same start; objectives are compared on other patches."""
    x, held_out = patches(features, samples, seed=2).numpy(), patches(features, 5000, seed=3)
    start = x[np.random.default_rng(0).permutation(samples)[:atoms]].copy()
    settings: dict[str, Any] = {
        "n_components": atoms, "alpha": l1, "batch_size": batch, "max_iter": 1, "dict_init": start, "tol": 0,
        "max_no_improvement": None, "fit_algorithm": "cd", "random_state": 0,
    }  # fmt: skip
    theirs = sklearn.decomposition.MiniBatchDictionaryLearning(**settings, n_jobs=torch.get_num_threads())
    doubles = x.astype(np.float64)  # in float32 it never reaches its tolerance
    contenders: dict[str, Callable[[], Any]] = {
        OURS: lambda: MiniBatchDictionaryLearning(**settings, verbose=False).fit(x).components_,
        "scikit-learn, float64": lambda: theirs.fit(doubles).components_,
    }
    if importlib.util.find_spec("spams"):
        import spams

        columns, initial = np.asfortranarray(x.T), np.asfortranarray(start.T)
        contenders["SPAMS"] = lambda: (
            spams.trainDL(
                columns, D=initial, K=atoms, lambda1=l1, batchsize=batch, iter=samples // batch, verbose=False,
                numThreads=torch.get_num_threads(),
            ).T
        )  # fmt: skip

    @functools.cache
    def objective(name: str) -> float:
        dictionary = torch.from_numpy(np.ascontiguousarray(contenders[name]())).float()
        return sparse_value(held_out, dictionary, l1).mean().item()

    def check(name: str) -> None:
        if objective(name) > 1.005 * min(map(objective, contenders)):
            raise WrongResultError(f"{name}: the held-out objective is {objective(name):.4f}, more than 0.5 % above")

    return Case(
        "sparse",
        f"dictionary learning, one pass over {samples:,} patches, {features} features, {atoms} atoms, l1 {l1:g}",
        "forward",
        contenders,
        check,
        flops=2.0 * samples * atoms * (features + atoms),
        bytes=4.0 * samples * features,
    )
