"""scikit-learn estimators for sparse coding and dictionary learning: NumPy in, NumPy out, computed by fastvae's ops.

Parameters, attributes and shapes are those of `sklearn.decomposition`, so that a class replaces its namesake; what is
added: `device`, `transform_tol`, `constraint`, `warm_start`, `dual_gap_`, memory-mapped data, many processes. What
differs: atoms have the norm 1 unless ``constraint="ball"`` asks for a norm of at most 1; the first atoms are samples;
a lasso is solved until its duality gap is at most `transform_tol` times |x|^2, by one solver whatever its name;
`fit_transform` is `fit`, then `transform`; threads are torch's (`torch.set_num_threads`), so `n_jobs` changes nothing.

Many processes: where `torch.distributed` is initialised, each process is given its own samples, a batch is the union
of the processes' batches, and all of them hold the same dictionary.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastvae.ops.checks import check_choice
from fastvae.ops.dictionary import CONSTRAINTS, dictionary_update, replace_atoms, unused, worst_reconstructed
from fastvae.ops.sparse import GAP_FLOOR, SparseInfo, own_warning, soft_threshold, sparse_encode

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils import check_array, check_random_state, metadata_routing
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ModuleNotFoundError(
        "fastvae.estimators needs scikit-learn: pip install 'fastvae[estimators]'", name="sklearn"
    ) from error

__all__ = ["DictionaryLearning", "MiniBatchDictionaryLearning", "SparseCoder"]

_SOLVERS = {"lasso_lars": "auto", "lasso_cd": "auto", "omp": "omp", "iht": "iht", "threshold": "threshold"}
_FLOATS = (np.float64, np.float32)
_ROWS = 8192  # samples coded at a time where all could be: bounds the memory beside the result
_CODES_BYTES = 1 << 30  # codes of all samples are kept for the next pass if they take no more than this
_TRIAL = 10  # samples for each atom seen between two looks for dead and repeated atoms
_SWEEPS = 5  # over the atoms, where the codes of all samples have been renewed
_FORGETTING = 3  # Mairal et al. 2010: after t batches the past counts (1 - 1/t)^3, so that about the last third does,
_WINDOW = 25  # and never more than so many samples for each atom: stale codes hold wrong dictionaries in place
_BAR_AFTER = 1.0  # seconds that a fit takes before it shows a progress bar


class _SparseCoding(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """What the three estimators share: coding with a dictionary, and back."""

    __metadata_request__transform = {"return_info": metadata_routing.UNUSED}  # noqa: RUF012

    def _atoms(self) -> np.ndarray:
        check_is_fitted(self)
        return self.components_

    def transform(self, X: Any, return_info: bool = False) -> Any:
        """Code samples with the dictionary.

        Args:
            X: samples, (n_samples, n_features); a memory-mapped array is read in batches.
            return_info: return a certificate of each sample too.

        Returns:
            Codes, (n_samples, n_components), or twice as wide with `split_sign`, in X's dtype; and with `return_info`
            :class:`fastvae.ops.sparse.SparseInfo` of NumPy arrays: gap relative to |x|^2, iterations, status.

        Raises:
            ValueError: X has another number of features, or numbers that are not finite.
        """
        atoms = self._atoms()
        self._check_settings()
        X, dtype = self._check_data(X, reset=False, atoms=atoms)
        dictionary = self._tensor(np.asarray(atoms), dtype)
        alpha = getattr(self, "alpha", 1.0) if self.transform_alpha is None else self.transform_alpha
        codes = np.empty((X.shape[0], self._n_features_out), dtype)
        infos = []
        for start in range(0, X.shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            batch, info = self._encode(self._batch(X, rows, dtype), dictionary, self.transform_algorithm, alpha)
            if self.split_sign:
                batch = torch.cat([batch.clamp_min(0), (-batch).clamp_min(0)], 1)
            codes[rows] = batch.cpu().numpy()
            infos.append(info)
        parts = [torch.cat(part).cpu().numpy() for part in zip(*infos, strict=True)]
        _warn_of_misses(int(np.count_nonzero(parts[2])), len(codes), self.transform_max_iter)
        return (codes, SparseInfo(*parts)) if return_info else codes  # type: ignore[arg-type]

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Return the samples, (n_samples, n_features), that codes (n_samples, n_components) stand for.

        Raises:
            ValueError: the codes have another width than `transform` gives.
        """
        codes, atoms = check_array(X, dtype=_FLOATS), np.asarray(self._atoms())
        width = atoms.shape[0] * (2 if self.split_sign else 1)
        if codes.shape[1] != width:
            raise ValueError(f"X: expected codes of {width} components, got {codes.shape[1]}")
        if self.split_sign:
            codes = codes[:, : width // 2] - codes[:, width // 2 :]
        return codes @ atoms.astype(codes.dtype, copy=False)

    @property
    def _n_features_out(self) -> int:
        return len(self._atoms()) * (2 if self.split_sign else 1)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _encode(
        self, x: Tensor, dictionary: Tensor, algorithm: str, alpha: float, init: Tensor | None = None
    ) -> tuple[Tensor, SparseInfo]:
        solver = _SOLVERS[algorithm]
        if solver == "threshold":
            if not torch.isfinite(dictionary).all():
                raise ValueError("dictionary: expected finite numbers, got nan or inf")
            codes = soft_threshold(x @ dictionary.T, alpha)
            zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            info = SparseInfo(torch.full_like(x[:, 0], math.nan), zeros, zeros.to(torch.int8))
            return (codes.clamp_min(0) if self.positive_code else codes), info
        options: dict[str, Any] = {"solver": solver, "positive": self.positive_code, "return_info": True}
        if solver == "auto":
            if self.transform_tol is not None and not self.transform_tol >= GAP_FLOOR[x.dtype]:
                expected = f"at least {GAP_FLOOR[x.dtype]:g}, the smallest relative gap of {x.dtype}"
                raise ValueError(f"transform_tol: expected {expected}, got {self.transform_tol}")
            options |= {"l1": alpha, "tol": self.transform_tol, "init": init}
        else:
            most = min(dictionary.shape)
            options["n_nonzero"] = min(self.transform_n_nonzero_coefs or max(x.shape[1] // 10, 1), most)
        with own_warning():  # one for all batches, of scikit-learn's kind, follows
            return sparse_encode(x, dictionary, max_iter=self.transform_max_iter, **options)

    def _tensor(self, array: np.ndarray, dtype: Any) -> Tensor:
        own = np.require(array, dtype, ["C", "W"])  # a tensor over memory that cannot be written draws a warning
        return torch.from_numpy(own).to(self.device or "cpu")

    def _batch(self, X: np.ndarray, rows: Any, dtype: Any) -> Tensor:
        batch = np.asarray(X[rows])
        if isinstance(X, np.memmap):  # not looked at as a whole, which would read all of it
            batch = check_array(batch, dtype=dtype, estimator=self, ensure_min_samples=0)
        return self._tensor(batch, dtype)

    def _check_data(self, X: Any, reset: bool, atoms: np.ndarray | None = None) -> tuple[np.ndarray, Any]:
        """Return X, checked, and the dtype to compute in; a memory-mapped array stays on the disk."""
        if not isinstance(X, np.memmap):
            X = validate_data(self, X, dtype=list(_FLOATS), order="C", reset=reset)
        else:
            if X.ndim != 2 or X.shape[0] == 0:
                raise ValueError(f"X: expected shape (n_samples, n_features), got {X.shape}. Reshape your data.")
            if X.dtype.kind not in "fiub":
                raise ValueError(f"X: expected real numbers, got {X.dtype}")
            validate_data(self, X, reset=reset, skip_check_array=True)
        if atoms is not None and np.ndim(atoms) != 2:
            raise ValueError(f"dictionary: expected shape (n_components, n_features), got {np.shape(atoms)}")
        if atoms is not None and X.shape[1] != np.shape(atoms)[1]:
            raise ValueError(
                f"X: expected {np.shape(atoms)[1]} features as the dictionary {np.shape(atoms)}, got {X.shape[1]}"
            )
        return X, X.dtype if X.dtype in _FLOATS else np.dtype(np.float64)

    def _check_settings(self) -> None:
        for name, (least, kind) in _LIMITS.items():
            value = getattr(self, name, None)
            if not hasattr(self, name) or (value is None and name in _OPTIONAL):
                continue
            if not isinstance(value, kind) or isinstance(value, bool) or not value >= least:
                what = "a whole number" if kind is numbers.Integral else "a number"
                raise ValueError(f"{name}: expected {what} of at least {least}, got {value!r}")
        check_choice("transform_algorithm", self.transform_algorithm, tuple(_SOLVERS))
        for name in ("alpha", "transform_alpha"):
            if getattr(self, name, None) == 0:
                raise ValueError(f"{name}: expected a number above 0, got 0")
        if hasattr(self, "alpha"):
            check_choice("fit_algorithm", self.fit_algorithm, ("lars", "cd"))
            check_choice("constraint", self.constraint, CONSTRAINTS)


_LIMITS: dict[str, tuple[int, Any]] = {
    "n_components": (1, numbers.Integral),
    "alpha": (0, numbers.Real),
    "batch_size": (1, numbers.Integral),
    "max_iter": (0, numbers.Integral),
    "tol": (0, numbers.Real),
    "max_no_improvement": (0, numbers.Integral),
    "transform_n_nonzero_coefs": (1, numbers.Integral),
    "transform_alpha": (0, numbers.Real),
    "transform_max_iter": (1, numbers.Integral),
    "transform_tol": (0, numbers.Real),
}
_OPTIONAL = ("n_components", "max_no_improvement", "transform_n_nonzero_coefs", "transform_alpha", "transform_tol")


class SparseCoder(_SparseCoding):
    """Codes of samples for a dictionary that is given.

    Args:
        dictionary: (n_components, n_features), atoms as rows, best of norm 1.
        transform_algorithm: "lasso_cd" and "lasso_lars" (the same lasso, certified by its duality gap), "omp"
            (orthogonal matching pursuit), "iht" (iterative hard thresholding) or "threshold" (of the correlations).
        transform_n_nonzero_coefs: of "omp" and "iht"; None takes a tenth of the features.
        transform_alpha: weight of the L1 norm, or the threshold; None takes 1.
        split_sign: give the positive and the negative parts of the codes columns of their own.
        n_jobs: changes nothing; threads are torch's.
        positive_code: allow no negative codes.
        transform_max_iter: most iterations of a lasso.
        transform_tol: largest duality gap of a lasso, relative to |x|^2; None takes 1e-4.
        device: where to compute, "cuda" say; None is the CPU.

    Attributes:
        n_components_: number of atoms.
        n_features_in_: number of features.

    It can transform without having been fitted.
    """

    def __init__(
        self,
        dictionary: Any,
        *,
        transform_algorithm: str = "omp",
        transform_n_nonzero_coefs: int | None = None,
        transform_alpha: float | None = None,
        split_sign: bool = False,
        n_jobs: int | None = None,
        positive_code: bool = False,
        transform_max_iter: int = 1000,
        transform_tol: float | None = None,
        device: Any = None,
    ) -> None:
        self.dictionary = dictionary
        self.transform_algorithm = transform_algorithm
        self.transform_n_nonzero_coefs = transform_n_nonzero_coefs
        self.transform_alpha = transform_alpha
        self.split_sign = split_sign
        self.n_jobs = n_jobs
        self.positive_code = positive_code
        self.transform_max_iter = transform_max_iter
        self.transform_tol = transform_tol
        self.device = device

    def _atoms(self) -> np.ndarray:
        return self.dictionary

    def fit(self, X: Any, y: Any = None) -> SparseCoder:
        """Check the parameters and the width of X; there is nothing to learn."""
        self._check_settings()
        self._check_data(X, reset=True, atoms=self.dictionary)
        self.n_components_ = len(self.dictionary)
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        return tags


class _DictionaryLearning(_SparseCoding):
    """What the two learners share: a beginning, one pass of codes, one update, and what remains of a fit."""

    def _resumes(self) -> bool:
        if not (self.warm_start and hasattr(self, "components_")):
            return False
        if self.n_components not in (None, len(self.components_)):
            raise ValueError(
                f"n_components: expected {len(self.components_)} as in the fit that warm_start goes on with, "
                f"got {self.n_components}"
            )
        return True

    def _begin(self, X: np.ndarray, dtype: Any) -> None:
        self._seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        atoms = _initial(X, self.n_components, self.dict_init, np.random.default_rng(self._seed))
        atoms = check_array(atoms, dtype=dtype)
        if self.positive_dict:
            atoms = np.abs(atoms)
        norms = np.linalg.norm(atoms, axis=1, keepdims=True)
        if self.dict_init is None or self.constraint == "sphere":
            if not norms.all():
                raise ValueError(f"dict_init: atom {int(norms.argmin())} is zero, which has no direction")
            self.components_ = atoms / norms
        else:
            self.components_ = atoms / np.maximum(norms, 1)
        self._code_gram = np.zeros((len(atoms), len(atoms)), dtype)
        self._cross = np.zeros_like(atoms)
        self._codes: np.ndarray | None = None
        self._seen, self.n_steps_ = 0.0, 0

    @contextlib.contextmanager
    def _keeping(self, learner: _Learner, codes: Tensor | None) -> Iterator[None]:
        """Leave a fitted estimator behind, whatever ends the fit."""
        self.interrupted_ = False
        try:
            with _interrupting_together(learner):
                yield
        except KeyboardInterrupt:
            self.interrupted_ = True
            if _processes() > 1 and not learner.stopped_together:  # the others wait for this one: end them all
                raise
            warnings.warn("the fit was interrupted; set warm_start=True and fit again to go on", stacklevel=4)
        finally:
            self._finish(learner, codes)

    def _finish(self, learner: _Learner, codes: Tensor | None) -> None:
        self.components_ = learner.dictionary.cpu().numpy()
        self._code_gram, self._cross = learner.code_gram.cpu().numpy(), learner.cross.cpu().numpy()
        self._seen, self.n_steps_ = learner.seen, learner.steps
        self._codes = codes.cpu().numpy() if codes is not None and self.warm_start else None
        _warn_of_misses(learner.missed, learner.coded, self.transform_max_iter)

    def _room_for_codes(self, samples: int, dtype: Any) -> Tensor | None:
        """Codes that begin the next pass, from the last fit if it was of as many samples; None if too large."""
        shape = (samples, len(self.components_))
        if self._codes is not None and self._codes.shape == shape:
            return self._tensor(self._codes, dtype)
        if math.prod(shape) * np.dtype(dtype).itemsize > _CODES_BYTES:
            return None
        return self._tensor(np.zeros(shape, dtype), dtype)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return state | {"_codes": None} if "_codes" in state else state  # as large as the data, and only a head start


class _Learner:
    """Dictionary and statistics on the device while a fit runs."""

    def __init__(self, estimator: Any, dtype: Any) -> None:
        self.estimator = estimator
        self.dictionary = _from_first(estimator._tensor(estimator.components_, dtype))
        self.code_gram = estimator._tensor(estimator._code_gram, dtype)
        self.cross = estimator._tensor(estimator._cross, dtype)
        self.seen: float = estimator._seen  # samples since dead atoms were last looked for
        self.steps: int = estimator.n_steps_
        self.missed = self.coded = 0
        self.stop_requested = self.stopped_together = False

    def code(self, x: Tensor, init: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Code a batch; return codes, gaps, and the sums h^T h, h^T x and (samples, objective)."""
        alpha = self.estimator.alpha
        codes, info = self.estimator._encode(x, self.dictionary, "lasso_cd", alpha, init)
        self.missed += int(torch.count_nonzero(info.status))
        self.coded += len(x)
        objective = 0.5 * (x - codes @ self.dictionary).square().sum() + alpha * codes.abs().sum()
        totals = torch.stack([objective.new_tensor(float(len(x))), objective])
        return codes, info.gap, [codes.T @ codes, codes.T @ x, totals]

    def over_processes(self, sums: list[Tensor]) -> list[Tensor]:
        """Sum over the processes, in one message that also says whether one of them was interrupted.

        Raises:
            KeyboardInterrupt: one was; they all raise it here.
        """
        if _processes() == 1:
            return sums
        request = sums[0].new_tensor([float(self.stop_requested)])
        flat = torch.cat([request, *(t.flatten() for t in sums)])
        dist.all_reduce(flat)
        request, *parts = flat.split([1, *(t.numel() for t in sums)])
        if request.item() > 0:
            self.stopped_together = True
            raise KeyboardInterrupt
        return [part.view_as(t) for part, t in zip(parts, sums, strict=True)]

    def improve(self, code_gram: Tensor, cross: Tensor, x: Tensor, codes: Tensor, *, sweeps: int, steps: int) -> Tensor:
        """Take over the statistics, replace what died, sweep; return the indices of the replaced atoms.

        The state changes in one assignment, so that an interruption leaves the old one or the new one.
        """
        dictionary, replaced = self.dictionary, torch.empty(0, dtype=torch.int64, device=x.device)
        seen, positive = self.seen, self.estimator.positive_dict
        if seen >= _TRIAL * len(dictionary):
            seen = 0.0
            if _processes() > 1 and (count := len(unused(dictionary, code_gram))):
                x, codes = _worst_of_all(dictionary, x, codes, count)
            x = x.clamp_min(0) if positive else x
            dictionary, code_gram, cross, replaced = replace_atoms(dictionary, code_gram, cross, x, codes)
        for _ in range(sweeps):
            dictionary = dictionary_update(
                dictionary, code_gram, cross, constraint=self.estimator.constraint, positive=positive
            )
        dictionary = _from_first(dictionary)
        self.dictionary, self.code_gram, self.cross, self.seen, self.steps = dictionary, code_gram, cross, seen, steps
        return replaced


class DictionaryLearning(_DictionaryLearning):
    """Learns a dictionary from codes of all samples at once: few, exact iterations.

    Minimises the sum over samples of 1/2 |x - h D|^2 + alpha |h|_1 over codes h and dictionary D in turns.

    Args:
        n_components: number of atoms; None takes that of the features.
        alpha: weight of the L1 norm of the codes.
        max_iter: most iterations, each a pass over all samples.
        tol: stop when an iteration lowers the objective by less than this part of it.
        fit_algorithm: "lars" or "cd": names of scikit-learn's for one solver here.
        transform_algorithm, transform_n_nonzero_coefs, transform_max_iter, transform_tol: as for :class:`SparseCoder`.
        transform_alpha, split_sign, n_jobs, positive_code, device: likewise, but `transform_alpha` None is `alpha`.
        code_init: codes to begin with, (n_samples, n_components).
        dict_init: dictionary to begin with, (n_components, n_features); None takes random samples.
        callback: called every five iterations with a dict of step, cost and dictionary.
        verbose: show a progress bar: True always, False never, None at a terminal if a fit takes over a second.
        random_state: seed of the first dictionary.
        positive_dict: allow no negative entries of the dictionary.
        constraint: "sphere", atoms of norm 1, or "ball", of norm at most 1 (scikit-learn's).
        warm_start: go on from the last fit instead of anew.

    Attributes:
        components_: dictionary, (n_components, n_features).
        error_: objective at the beginning of each iteration, summed over the samples.
        dual_gap_: duality gap of each sample's last codes, relative to |x|^2, (n_samples,).
        n_iter_: iterations run.
        interrupted_: whether Ctrl-C ended the fit; what was learnt until then is kept.

    Source: Mairal, Bach, Ponce, Sapiro 2009.
    """

    def __init__(
        self,
        n_components: int | None = None,
        *,
        alpha: float = 1,
        max_iter: int = 1000,
        tol: float = 1e-8,
        fit_algorithm: str = "lars",
        transform_algorithm: str = "omp",
        transform_n_nonzero_coefs: int | None = None,
        transform_alpha: float | None = None,
        n_jobs: int | None = None,
        code_init: np.ndarray | None = None,
        dict_init: np.ndarray | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        verbose: bool | None = None,
        split_sign: bool = False,
        random_state: Any = None,
        positive_code: bool = False,
        positive_dict: bool = False,
        transform_max_iter: int = 1000,
        transform_tol: float | None = None,
        constraint: str = "sphere",
        warm_start: bool = False,
        device: Any = None,
    ) -> None:
        self.n_components = n_components
        self.alpha = alpha
        self.max_iter = max_iter
        self.tol = tol
        self.fit_algorithm = fit_algorithm
        self.transform_algorithm = transform_algorithm
        self.transform_n_nonzero_coefs = transform_n_nonzero_coefs
        self.transform_alpha = transform_alpha
        self.n_jobs = n_jobs
        self.code_init = code_init
        self.dict_init = dict_init
        self.callback = callback
        self.verbose = verbose
        self.split_sign = split_sign
        self.random_state = random_state
        self.positive_code = positive_code
        self.positive_dict = positive_dict
        self.transform_max_iter = transform_max_iter
        self.transform_tol = transform_tol
        self.constraint = constraint
        self.warm_start = warm_start
        self.device = device

    def fit(self, X: Any, y: Any = None) -> DictionaryLearning:
        """Learn a dictionary.

        Args:
            X: samples, (n_samples, n_features); a memory-mapped array is read in batches.
            y: ignored.

        Raises:
            ValueError: naming a parameter, or X, whose value or shape is wrong.
        """
        self._check_settings()
        resumes = self._resumes()
        X, dtype = self._check_data(X, reset=not resumes)
        if not resumes:
            self._begin(X, dtype)
            self.error_: list[float] = []
        learner, codes = _Learner(self, dtype), self._room_for_codes(len(X), dtype)
        if self.code_init is not None and not resumes:
            codes = self._tensor(check_array(self.code_init, dtype=dtype, copy=True), dtype)
            if codes.shape != (len(X), len(self.components_)):
                shape = (len(X), len(self.components_))
                raise ValueError(f"code_init: expected shape {shape}, got {tuple(codes.shape)}")
        self.dual_gap_ = np.full(len(X), np.nan, dtype)
        self.n_iter_ = 0
        with self._keeping(learner, codes), _progress(self.max_iter, self.verbose) as advance:
            for iteration in range(self.max_iter):
                sums: list[Tensor] = []
                for start in range(0, len(X), _ROWS):
                    rows = slice(start, start + _ROWS)
                    x = self._batch(X, rows, dtype)
                    h, gap, parts = learner.code(x, None if codes is None else codes[rows])
                    if codes is not None:
                        codes[rows] = h
                    self.dual_gap_[rows] = gap.cpu().numpy()
                    sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
                code_gram, cross, totals = learner.over_processes(sums)
                samples, cost = totals.tolist()
                self.error_.append(cost)
                self.n_iter_ = iteration + 1
                advance(cost / samples)
                if iteration and self.error_[-2] - cost < self.tol * cost:
                    break
                learner.seen += samples
                replaced = learner.improve(code_gram, cross, x, h, sweeps=_SWEEPS, steps=learner.steps + 1)
                if codes is not None:
                    codes[:, replaced] = 0
                if iteration % 5 == 0 and self.callback is not None:
                    self.callback({"step": iteration, "cost": cost, "dictionary": learner.dictionary.cpu().numpy()})
        return self


class MiniBatchDictionaryLearning(_DictionaryLearning):
    """Learns a dictionary from one batch of samples after the other: fast, and for data larger than memory.

    Minimises the mean over samples of 1/2 |x - h D|^2 + alpha |h|_1 over codes h and dictionary D. Each batch's codes
    enter the statistics, in which old codes slowly lose weight, and one sweep over the atoms follows.

    Args:
        n_components: number of atoms; None takes that of the features.
        alpha: weight of the L1 norm of the codes.
        max_iter: most passes over all samples.
        fit_algorithm: "lars" or "cd": names of scikit-learn's for one solver here.
        batch_size: samples of a batch, of each process.
        shuffle: take the samples in random order; a memory-mapped array's batches, each contiguous.
        dict_init, verbose, positive_dict, constraint: as for :class:`DictionaryLearning`.
        random_state: seed of the first dictionary and of the order.
        transform_algorithm, transform_n_nonzero_coefs, transform_max_iter, transform_tol: as for :class:`SparseCoder`.
        transform_alpha, split_sign, n_jobs, positive_code, device: likewise, but `transform_alpha` None is `alpha`.
        callback: called after each batch with a dict of step, cost and dictionary.
        tol: stop when a batch moves the dictionary by less: Frobenius norm over number of atoms; 0 never stops.
        max_no_improvement: stop after so many batches without a lower smoothed objective; None never stops.
        warm_start: go on from the last fit instead of anew: an interrupted one exactly where it stopped and up to its
            `max_iter` passes in all, a finished one for `max_iter` further passes.

    Attributes:
        components_: dictionary, (n_components, n_features).
        objective_: mean objective of each batch's samples, before the batch was learnt from, (n_steps_,).
        dual_gap_: duality gap of each sample's last codes, relative to |x|^2, (n_samples,); after `partial_fit`
            those of its batch.
        n_iter_: passes over all samples, begun ones counted.
        n_steps_: batches learnt from, in all.
        interrupted_: whether Ctrl-C ended the fit; what was learnt until then is kept.

    Source: Mairal, Bach, Ponce, Sapiro 2009 and 2010, "Online learning for matrix factorization and sparse coding".
    """

    def __init__(
        self,
        n_components: int | None = None,
        *,
        alpha: float = 1,
        max_iter: int = 1000,
        fit_algorithm: str = "lars",
        n_jobs: int | None = None,
        batch_size: int = 256,
        shuffle: bool = True,
        dict_init: np.ndarray | None = None,
        transform_algorithm: str = "omp",
        transform_n_nonzero_coefs: int | None = None,
        transform_alpha: float | None = None,
        verbose: bool | None = None,
        split_sign: bool = False,
        random_state: Any = None,
        positive_code: bool = False,
        positive_dict: bool = False,
        transform_max_iter: int = 1000,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        tol: float = 1e-3,
        max_no_improvement: int | None = 10,
        transform_tol: float | None = None,
        constraint: str = "sphere",
        warm_start: bool = False,
        device: Any = None,
    ) -> None:
        self.n_components = n_components
        self.alpha = alpha
        self.max_iter = max_iter
        self.fit_algorithm = fit_algorithm
        self.n_jobs = n_jobs
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.dict_init = dict_init
        self.transform_algorithm = transform_algorithm
        self.transform_n_nonzero_coefs = transform_n_nonzero_coefs
        self.transform_alpha = transform_alpha
        self.verbose = verbose
        self.split_sign = split_sign
        self.random_state = random_state
        self.positive_code = positive_code
        self.positive_dict = positive_dict
        self.transform_max_iter = transform_max_iter
        self.callback = callback
        self.tol = tol
        self.max_no_improvement = max_no_improvement
        self.transform_tol = transform_tol
        self.constraint = constraint
        self.warm_start = warm_start
        self.device = device

    def fit(self, X: Any, y: Any = None) -> MiniBatchDictionaryLearning:
        """Learn a dictionary.

        Args:
            X: samples, (n_samples, n_features); a memory-mapped array is read batch by batch.
            y: ignored.

        Raises:
            ValueError: naming a parameter, or X, whose value or shape is wrong.
        """
        self._check_settings()
        resumes = self._resumes()
        X, dtype = self._check_data(X, reset=not resumes)
        if not resumes:
            self._begin(X, dtype)
        size = min(self.batch_size, len(X))
        per_pass = _largest(math.ceil(len(X) / size), self.device)
        of_these_rows = len(getattr(self, "dual_gap_", ())) == len(X)
        if not (resumes and getattr(self, "interrupted_", False) and of_these_rows):
            self._target = self.n_steps_ + self.max_iter * per_pass
            self._smoothed = self._best = math.inf
            self._first_step, self._no_improvement = self.n_steps_, 0
            self.n_iter_ = math.ceil(self.n_steps_ / per_pass)
            self.dual_gap_ = np.full(len(X), np.nan, dtype)
        learner, codes = _Learner(self, dtype), self._room_for_codes(len(X), dtype)
        nominal, order = _total(size, self.device), _Order(X, size, self._seed if self.shuffle else None)
        with self._keeping(learner, codes), _progress(self._target - self.n_steps_, self.verbose) as advance:
            while learner.steps < self._target:
                step, before = learner.steps, learner.dictionary
                rows = order.rows(*divmod(step, per_pass))
                init = None if codes is None else codes[rows]
                h, gap, cost, replaced = self._learn(learner, self._batch(X, rows, dtype), init, nominal)
                self.dual_gap_[rows] = gap
                if codes is not None:
                    codes[rows] = h
                    codes[:, replaced] = 0
                self.n_iter_ = math.ceil(learner.steps / per_pass)
                advance(cost)
                if self.callback is not None:
                    self.callback({"step": step, "cost": cost, "dictionary": learner.dictionary.cpu().numpy()})
                if self._converged(cost, learner.dictionary - before, step - self._first_step, per_pass):
                    break
        return self

    def partial_fit(self, X: Any, y: Any = None) -> MiniBatchDictionaryLearning:
        """Learn from X, (samples, n_features), as one batch."""
        self._check_settings()
        first = not hasattr(self, "components_")
        X, dtype = self._check_data(X, reset=first)
        if first:
            self._begin(X, dtype)
        learner = _Learner(self, dtype)
        _, self.dual_gap_, _, _ = self._learn(
            learner, self._batch(X, slice(None), dtype), None, _total(len(X), self.device)
        )
        self._finish(learner, None)
        return self

    def _begin(self, X: np.ndarray, dtype: Any) -> None:
        super()._begin(X, dtype)
        self.objective_: list[float] = []
        self.interrupted_ = False

    def _learn(
        self, learner: _Learner, x: Tensor, init: Tensor | None, batch: int
    ) -> tuple[Tensor, np.ndarray, float, Tensor]:  # fmt: skip
        """Learn from one batch; `batch` is the size of a full one, of all processes."""
        codes, gap, sums = learner.code(x, init)
        gram, cross, totals = learner.over_processes(sums)
        samples, cost = totals.tolist()
        window = max(_WINDOW * len(gram) / batch, 1)
        past = min((learner.steps / (learner.steps + 1)) ** _FORGETTING, 1 - 1 / window)
        learner.seen += samples
        code_gram = learner.code_gram * past + gram / batch
        cross = learner.cross * past + cross / batch
        replaced = learner.improve(code_gram, cross, x, codes, sweeps=1, steps=learner.steps + 1)
        self.objective_.append(cost / samples)
        return codes, gap.cpu().numpy(), cost / samples, replaced

    def _converged(self, cost: float, change: Tensor, step: int, per_pass: int) -> bool:
        """Stop as scikit-learn does: small changes, or a smoothed objective that falls no more."""
        if step < min(100, per_pass):
            return False
        weight = min(1 / per_pass, 1)
        self._smoothed = cost if math.isinf(self._smoothed) else (1 - weight) * self._smoothed + weight * cost
        if self.tol > 0 and torch.linalg.matrix_norm(change).item() <= self.tol * len(change):
            return True
        self._no_improvement = 0 if self._smoothed < self._best else self._no_improvement + 1
        self._best = min(self._best, self._smoothed)
        return self.max_no_improvement is not None and self._no_improvement >= self.max_no_improvement


class _Order:
    """Which samples make up a batch: a function of seed, pass and number, so that a fit can go on anywhere."""

    def __init__(self, X: np.ndarray, size: int, seed: int | None) -> None:
        self.samples, self.size, self.seed = len(X), size, seed
        self.blocks = math.ceil(len(X) / size)
        self.contiguous = isinstance(X, np.memmap) or seed is None  # a disk is read in blocks
        self.epoch: int | None = None

    def rows(self, epoch: int, batch: int) -> Any:
        if batch >= self.blocks:  # other processes have more
            return slice(0, 0)
        if self.seed is not None and epoch != self.epoch:
            generator = np.random.default_rng([self.seed, _rank(), epoch])
            self.epoch, self.order = epoch, generator.permutation(self.blocks if self.contiguous else self.samples)
        if not self.contiguous:
            return self.order[batch * self.size : (batch + 1) * self.size]
        start = self.size * int(batch if self.seed is None else self.order[batch])
        return slice(start, min(start + self.size, self.samples))


def _initial(X: np.ndarray, components: int | None, given: Any, generator: np.random.Generator) -> np.ndarray:
    """Return the dictionary to begin with: the one given, or random samples, random directions where they are few."""
    if given is not None:
        expected = (len(given) if components is None else components, X.shape[1])
        if np.shape(given) != expected:
            raise ValueError(
                f"dict_init: expected shape (n_components, n_features) = {expected}, got {np.shape(given)}"
            )
        return np.array(given)
    atoms = generator.standard_normal((components or X.shape[1], X.shape[1]))
    rows = np.sort(generator.choice(len(X), min(len(atoms), len(X)), replace=False))
    chosen = np.array(X[rows], np.float64)
    chosen = chosen[np.linalg.norm(chosen, axis=1) > 0]
    atoms[: len(chosen)] = chosen
    return atoms


def _warn_of_misses(missed: int, coded: int, max_iter: int) -> None:
    if missed:
        warnings.warn(
            f"{missed} of {coded} codes missed the tolerance within {max_iter} iterations: "
            "raise transform_max_iter or transform_tol",
            ConvergenceWarning,
            stacklevel=4,
        )


@contextlib.contextmanager
def _progress(total: int, verbose: bool | None) -> Iterator[Callable[[float], None]]:
    """Give a function to call with the objective after each step: a bar, if there is a terminal and time to look."""
    bar, task, done, begun = None, None, 0, time.monotonic()

    def advance(objective: float) -> None:
        nonlocal bar, task, done
        done += 1
        if bar is None and wanted and (verbose or time.monotonic() - begun > _BAR_AFTER):
            bar = _bar(verbose)
            if bar is not None:
                bar.start()
                task = bar.add_task("learning", total=total, objective=objective)
        if bar is not None:
            bar.update(task, completed=done, objective=objective)

    wanted = verbose is not False and _rank() == 0
    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _bar(verbose: bool | None) -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    console = Console(stderr=True)
    if not (verbose or console.is_terminal or console.is_jupyter):
        return None
    objective = TextColumn("objective {task.fields[objective]:.4g}")
    return Progress(BarColumn(), MofNCompleteColumn(), objective, TimeRemainingColumn(), console=console)


# ---------------------------------------------------------------------------------------------- many processes
def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _processes() > 1 else 0


@contextlib.contextmanager
def _interrupting_together(learner: _Learner) -> Iterator[None]:
    """Let Ctrl-C of any one of several processes end the fit of all, after the batch; a second one ends it at once."""
    if _processes() == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def request_stop(number: int, frame: Any) -> None:
        if learner.stop_requested:
            raise KeyboardInterrupt
        learner.stop_requested = True

    previous = signal.signal(signal.SIGINT, request_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _from_first(tensor: Tensor) -> Tensor:
    # Machines that round differently must not drift apart.
    if _processes() > 1:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, 0)
    return tensor


def _largest(value: int, device: Any) -> int:
    return _reduced(value, device, dist.ReduceOp.MAX) if _processes() > 1 else value


def _total(value: int, device: Any) -> int:
    return _reduced(value, device, dist.ReduceOp.SUM) if _processes() > 1 else value


def _reduced(value: int, device: Any, operation: Any) -> int:
    tensor = torch.tensor([value], device=device or "cpu")
    dist.all_reduce(tensor, operation)
    return int(tensor)


def _worst_of_all(dictionary: Tensor, x: Tensor, codes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Samples reconstructed worst and their codes, `count` of each process, zeros where one has fewer."""
    worst = worst_reconstructed(dictionary, x, codes, count)
    mine = x.new_zeros(count, x.shape[1] + codes.shape[1])
    mine[: len(worst)] = torch.cat([x[worst], codes[worst]], 1)
    everyone = [torch.empty_like(mine) for _ in range(_processes())]
    dist.all_gather(everyone, mine)
    return torch.cat(everyone).split([x.shape[1], codes.shape[1]], 1)
