"""Sparse coding: iterative soft thresholding, and the lasso solved to a certificate for every sample.

The problem, for each sample x (a row) and a dictionary A with atoms as rows:

    minimise over h   1/2 |x - h A|^2 + l1 sum_j weights_j |h_j| + l2/2 |h|^2      (h >= 0 if positive)

The certificate is the duality gap: with c = A (x - h A) - l2 h and the dual point scaled by
s = min(1, l1 / max_j |c_j| / weights_j), it is a sum of terms that are never negative,

    gap = 1/2 (1 - s)^2 (|x - h A|^2 + l2 |h|^2) + sum_j (l1 weights_j |h_j| - s c_j h_j).

Sources: Daubechies et al. 2004 (ISTA); Beck & Teboulle 2009 (FISTA); O'Donoghue & Candes 2015 (restart); Fercoq et
al. 2015 (gap); Friedman et al. 2010 (coordinate descent); Lee et al. 2007 (active set of signs).
"""

import contextlib
import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.ops.backend import CORE, compute_dtype, first_order, kernel, large, pointer, register
from fastvae.ops.checks import check_choice, check_float, check_like, check_shape

CONVERGED, MISSED = 0, 1

# Relative gaps that the dtype can reach and certify: below, rounding costs more.
GAP_FLOOR = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 5e-4, torch.bfloat16: 5e-3}

_BLOCK_ITERATES = 1 << 24  # numbers kept for the backward of ISTA: 64 MB of float32

SOLVERS = ("auto", "ista", "fista", "cd", "omp", "iht")


class SparseInfo(NamedTuple):
    """How well each sample was solved.

    Attributes:
        gap: duality gap relative to |x|^2, (samples,); nan for "omp" and "iht", which solve another problem.
        iterations: of the solver, int64 (samples,); "cd" counts its steps to an exact solution and its sweeps.
        status: int8 (samples,), 0 where the tolerance was met, 1 where it was not; for "iht", where the support still
            changed in the last iteration.
    """

    gap: Tensor
    iterations: Tensor
    status: Tensor


# ------------------------------------------------------------------------------------------------ definition
def shrink(x: Tensor, threshold: Tensor | float, positive: bool = False) -> Tensor:
    """Soft threshold: the proximal operator of threshold * |x|, of it on x >= 0 if `positive`."""
    return (x - threshold).clamp_min(0) if positive else x.sign() * (x.abs() - threshold).clamp_min(0)


def reference_gap(codes: Tensor, correlation: Tensor, residual: Tensor, l1: Tensor, weights: Tensor,
                  positive: bool) -> Tensor:  # fmt: skip
    """Duality gap (samples,) from c = A r - l2 h, (samples, atoms), and |r|^2 + l2 |h|^2, (samples,)."""
    signed = correlation if positive else correlation.abs()
    largest = (signed / weights).amax(1) if codes.shape[1] else torch.zeros_like(l1)
    scale = torch.where(largest > l1, l1 / largest, 1.0)
    penalty = (l1[:, None] * weights * codes.abs() - scale[:, None] * correlation * codes).sum(1)
    return 0.5 * (1 - scale).square() * residual + penalty.clamp_min(0)


def reference_ista(x: Tensor, dictionary: Tensor, l1: Tensor, step: Tensor, init: Tensor | None, max_iter: int,
                   momentum: bool) -> Tensor:  # fmt: skip
    """Run `max_iter` iterations of ISTA, or of FISTA with `momentum`."""
    codes = x.new_zeros(x.shape[0], dictionary.shape[0]) if init is None else init.clone()
    point = codes
    for beta in _momenta(max_iter, momentum):
        residual = x - point @ dictionary
        new = shrink(point + step * (residual @ dictionary.T), step * l1[:, None])
        point = new + beta * (new - codes)
        codes = new
    return codes


def _momenta(max_iter: int, momentum: bool) -> list[float]:
    """How far each iteration goes on in the direction of its step: Nesterov's factors, or zeros."""
    betas, t = [], 1.0
    for _ in range(max_iter):
        t_next = 0.5 * (1 + math.sqrt(1 + 4 * t * t))
        betas.append((t - 1) / t_next if momentum else 0.0)
        t = t_next
    return betas


def reference_encode(x: Tensor, dictionary: Tensor, l1: Tensor, weights: Tensor, l2: float, positive: bool,
                     init: Tensor | None, tol: float, max_iter: int,
                     momentum: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Solve by FISTA with restart and backtracking of each sample's own, or by ISTA without `momentum`.

    Returns codes, relative gap, iterations and status.

    A large dictionary's Lipschitz constant is far above what a sparse code meets: each sample's L starts low, doubles
    when the quadratic bound fails, sinks by a tenth when it holds, and is pinned at the safe bound after many failures.
    One product an iteration gives the gradient, the gap and the test of the bound: the gradient is linear in the codes.
    """
    (samples, _), atoms = x.shape, dictionary.shape[0]
    squared = x.square().sum(1)
    use_gram = atoms < 2 * x.shape[1]
    gram = dictionary @ dictionary.T if use_gram else None
    products = x @ dictionary.T
    highest = lipschitz(dictionary) + l2
    lowest = torch.minimum(dictionary.square().sum(1).max() + l2, highest) if atoms else highest

    def correlate(h: Tensor, rows: Tensor) -> Tensor:
        if gram is not None:
            return products[rows] - h @ gram
        return (x[rows] - h @ dictionary) @ dictionary.T

    h = previous = x.new_zeros(samples, atoms) if init is None else init
    codes = torch.empty_like(h)
    gap, iterations = x.new_empty(samples), torch.zeros(samples, dtype=torch.int64, device=x.device)
    rows = torch.arange(samples, device=x.device)
    c = previous_c = correlate(h, rows)
    t = torch.ones_like(squared)
    bound, failures = lowest.expand_as(squared), torch.zeros_like(squared)
    for iteration in range(max_iter + 1):
        if iteration % 10 == 0 or iteration == max_iter:
            residual = squared[rows] - (h * (products[rows] + c)).sum(1) + l2 * h.square().sum(1)
            gap[rows] = reference_gap(h, c - l2 * h, residual.clamp_min(0), l1[rows], weights, positive)
            codes[rows] = h
            open_ = ~(gap[rows] <= tol * squared[rows])  # nan too
            rows = rows[open_]
            if rows.numel() == 0 or iteration == max_iter:
                break
            h, previous, c, previous_c = h[open_], previous[open_], c[open_], previous_c[open_]
            t, bound, failures = t[open_], bound[open_], failures[open_]
        t_next = 0.5 * (1 + torch.sqrt(1 + 4 * t * t))
        beta = ((t - 1) / t_next)[:, None]
        y, y_c = h + beta * (h - previous), c + beta * (c - previous_c)
        step = (1 / bound)[:, None]
        new = shrink(y + step * (y_c - l2 * y), step * l1[rows, None] * weights, positive)
        new_c = correlate(new, rows)
        move = new - y
        curvature = (move * (y_c - new_c)).sum(1) + l2 * move.square().sum(1)
        failed = (curvature > bound * move.square().sum(1) * (1 + 1e-6)) & (bound < highest)
        failures = failures + failed
        lowered = torch.where(failures > 30, highest, torch.maximum(0.9 * bound, lowest))
        bound = torch.where(failed, torch.minimum(2 * bound, highest), lowered)
        restart = ((y - new) * (new - h)).sum(1) > 0
        t = torch.where(failed | (not momentum), t, torch.where(restart, 1.0, t_next))
        keep = failed[:, None]
        previous, previous_c = torch.where(keep, previous, h), torch.where(keep, previous_c, c)
        h, c = torch.where(keep, h, new), torch.where(keep, c, new_c)
        iterations[rows] += 1
    status = torch.where(gap <= tol * squared, CONVERGED, MISSED).to(torch.int8)
    return codes, gap / squared.clamp_min(torch.finfo(x.dtype).tiny), iterations, status


def reference_ista_backward(grad: Tensor, x: Tensor, dictionary: Tensor, l1: Tensor, step: Tensor, init: Tensor | None,
                            max_iter: int, momentum: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dictionary, l1 and init; the iterates of a block of samples are made again and held."""
    grads = torch.zeros_like(x), torch.zeros_like(dictionary), torch.zeros_like(l1), torch.zeros_like(grad)
    betas = _momenta(max_iter, momentum)
    block = max(1, _BLOCK_ITERATES // max(1, dictionary.shape[0] * max_iter))
    for first in range(0, x.shape[0], block):
        rows = slice(first, first + block)
        codes = [grad.new_zeros(grad[rows].shape) if init is None else init[rows]]
        points = [codes[0]]
        for beta in betas:
            point = points[-1]
            codes.append(shrink(point + step * ((x[rows] - point @ dictionary) @ dictionary.T), step * l1[rows, None]))
            points.append(codes[-1] + beta * (codes[-1] - codes[-2]))
        g, g_point = grad[rows], torch.zeros_like(grad[rows])  # of the codes and of the point after iteration k
        for k in reversed(range(max_iter)):
            g, g_before = g + (1 + betas[k]) * g_point, -betas[k] * g_point
            through = g * (codes[k + 1] != 0)
            pull = step * (through @ dictionary)
            grads[0][rows] += pull
            grads[1].addmm_(through.T, step * (x[rows] - points[k] @ dictionary)).addmm_(points[k].T, pull, alpha=-1)
            grads[2][rows] -= step * (through * codes[k + 1].sign()).sum(1)
            g_point = through - pull @ dictionary.T
            g = g_before
        grads[3][rows] = g + g_point
    return grads


def reference_pursue(method: str, x: Tensor, dictionary: Tensor, n_nonzero: int, init: Tensor | None,
                     max_iter: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """At most `n_nonzero` atoms a sample; returns codes, iterations and status."""
    _check_values(x, dictionary, init)
    samples, atoms = x.shape[0], dictionary.shape[0]
    moving = torch.zeros(samples, dtype=torch.bool, device=x.device)
    if method == "iht":
        step = 1 / lipschitz(dictionary)
        codes = x.new_zeros(samples, atoms) if init is None else init
        for _ in range(max_iter):
            moved = codes + step * ((x - codes @ dictionary) @ dictionary.T)
            kept = moved.abs().topk(n_nonzero, 1).indices
            before, codes = codes, torch.zeros_like(moved).scatter_(1, kept, moved.gather(1, kept))
            moving = ((codes != 0) != (before != 0)).any(1)
        count = max_iter
    else:
        codes = torch.cat([_omp(block, dictionary, n_nonzero) for block in x.split(1024)])
        count = n_nonzero
    iterations = torch.full((samples,), count, dtype=torch.int64, device=x.device)
    return codes, iterations, torch.where(moving, MISSED, CONVERGED).to(torch.int8)


def _omp(x: Tensor, dictionary: Tensor, n_nonzero: int) -> Tensor:
    # Pati et al. 1993: add the atom most correlated with the residual, then refit all chosen ones.
    samples, atoms = x.shape[0], dictionary.shape[0]
    norms = dictionary.norm(dim=1)
    unit = dictionary / torch.where(norms > 0, norms, 1.0)[:, None]
    chosen = torch.zeros(samples, 0, dtype=torch.int64, device=x.device)
    residual, solution = x, x.new_zeros(samples, 0)
    for _ in range(n_nonzero):
        score = (residual @ unit.T).abs().scatter(1, chosen, -1.0)
        chosen = torch.cat([chosen, score.argmax(1, keepdim=True)], 1)
        basis = dictionary[chosen]
        gram = basis @ basis.mT
        ridge = torch.finfo(x.dtype).eps * gram.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-30)
        gram = gram + ridge[:, None, None] * torch.eye(chosen.shape[1], dtype=x.dtype, device=x.device)
        solution = torch.linalg.solve(gram, (basis @ x[:, :, None])).squeeze(2)
        residual = x - (solution[:, None] @ basis).squeeze(1)
    return x.new_zeros(samples, atoms).scatter_(1, chosen, solution)


def lipschitz(dictionary: Tensor) -> Tensor:
    """Largest eigenvalue of the Gram matrix, from above: the steepest curvature of 1/2 |x - h A|^2."""
    if dictionary.numel() == 0:
        return dictionary.new_ones(())
    small = dictionary if dictionary.shape[0] <= dictionary.shape[1] else dictionary.T
    top = torch.linalg.eigvalsh((small @ small.T).double())[-1]
    return (top * (1 + 1e-5)).clamp_min(torch.finfo(torch.float32).tiny).to(dictionary.dtype)


def reference_encode_backward(grad: Tensor, codes: Tensor, x: Tensor, dictionary: Tensor, l1: Tensor, weights: Tensor,
                              l2: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dictionary, l1 and weights, by the implicit function theorem on each sample's support S.

    There (G_SS + l2 I) h_S = A_S x - l1 weights_S sign(h_S); all follow from v with (G_SS + l2 I) v_S = grad_S.
    """
    v, counts = torch.zeros_like(codes), (codes != 0).sum(1)
    most = int(counts.max()) if counts.numel() else 0
    block = max(1, _BLOCK_ITERATES // max(1, most * max(most, dictionary.shape[1])))
    for first in range(0, codes.shape[0], block):
        rows = slice(first, first + block)
        support = (codes[rows] != 0).to(torch.int8).topk(most, 1).indices
        inside = torch.arange(most, device=codes.device) < counts[rows, None]
        atoms = dictionary[support] * inside[:, :, None]
        gram = atoms @ atoms.mT
        gram.diagonal(dim1=1, dim2=2).add_(torch.where(inside, l2, 1.0))
        solution = _solve_regularised(gram, grad[rows].gather(1, support) * inside)
        v[rows] = v[rows].scatter(1, support, solution)
    return _from_support_solution(v, codes, x, dictionary, l1, weights)


def _solve_regularised(matrices: Tensor, right: Tensor) -> Tensor:
    """Solve positive semidefinite systems, (n, size, size) and (n, size); singular ones with a growing ridge.

    Dependent atoms (duplicates, or more of them than features) have no inverse: the ridge chooses among the solutions.
    """
    diagonal, tiny = matrices.diagonal(dim1=1, dim2=2), 1e-12 if matrices.dtype == torch.float64 else 1e-5
    solution, rows, ridge = torch.zeros_like(right), torch.arange(len(right), device=right.device), 0.0
    while rows.numel():
        factor, info = torch.linalg.cholesky_ex(matrices[rows] + torch.diag_embed(ridge * diagonal[rows]))
        pivots = factor.diagonal(dim1=1, dim2=2).square()
        sound = (info == 0) & (pivots > tiny * diagonal[rows]).all(1)
        if ridge > 1:
            sound = torch.ones_like(sound)
        solution[rows[sound]] = torch.cholesky_solve(right[rows[sound], :, None], factor[sound]).squeeze(2)
        rows, ridge = rows[~sound], 10 * ridge if ridge else 1e-6
    return solution


def _from_support_solution(v: Tensor, codes: Tensor, x: Tensor, dictionary: Tensor, l1: Tensor,
                           weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x = v @ dictionary
    grad_dictionary = (v.T @ (x - codes @ dictionary)).addmm_(codes.T, grad_x, alpha=-1)
    signed = -v * codes.sign()
    return grad_x, grad_dictionary, (signed * weights).sum(1), (signed * l1[:, None]).sum(0)


def _check_values(x: Tensor, dictionary: Tensor, init: Tensor | None, **positive: Tensor) -> Tensor:
    """Raise for values that have no solution; returns |x|^2, (samples,)."""
    # Inside the ops, which wait for the data anyway; a test on values would break a compiled graph outside.
    squared, atoms_squared = (torch.linalg.vecdot(t, t) for t in (x, dictionary))
    for name, tensor, norms in (("x", x, squared), ("dictionary", dictionary, atoms_squared)):
        if not bool(torch.isfinite(norms).all()):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name}: expected finite numbers, got nan or inf")
            raise ValueError(f"{name}: expected rows of finite norm, got numbers up to {tensor.abs().max().item():g}")
    if init is not None and not bool(torch.isfinite(init).all()):
        raise ValueError("init: expected finite numbers, got nan or inf")
    _check_positive(**positive)
    return squared


def _check_positive(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not bool(((tensor > 0) & torch.isfinite(tensor)).all()):
            raise ValueError(f"{name}: expected finite numbers above 0, got {tensor.min().item():g} at least")


def _reference_op(method: str, x: Tensor, dictionary: Tensor, l1: Tensor, weights: Tensor, l2: float, positive: bool,
                  init: Tensor | None, tol: float, max_iter: int) -> tuple[Tensor, ...]:  # fmt: skip
    _check_values(x, dictionary, init, l1=l1, weights=weights)
    momentum = method != "ista"
    solved = reference_encode(x, dictionary, l1, weights, l2, positive, init, tol, max_iter, momentum)
    _warn(solved[3], max_iter)
    return solved


_quiet = threading.local()  # not the filters of `warnings`, which all threads share


@contextlib.contextmanager
def own_warning() -> Iterator[None]:
    """Leave it to the caller to tell of samples that missed the tolerance."""
    before, _quiet.on = getattr(_quiet, "on", False), True
    try:
        yield
    finally:
        _quiet.on = before


def _warn(status: Tensor, max_iter: int) -> None:
    if getattr(_quiet, "on", False):
        return
    missed = int((status != CONVERGED).sum())
    if missed:
        warnings.warn(
            f"fastvae: {missed} of {status.numel()} samples missed the tolerance, in at most {max_iter} iterations; "
            "their gaps are in the info of return_info=True",
            stacklevel=5,
        )


# ----------------------------------------------------------------------------------------------- C++ on CPU
_BLOCK_PRODUCTS = 1 << 20  # numbers of x A' at a time: 4 MB of float32
_MAX_GRAM_ATOMS = 8192  # a Gram matrix of 256 MB; beyond, FISTA without one


def _cpu_encode(method: str, x: Tensor, dictionary: Tensor, l1: Tensor, weights: Tensor, l2: float, positive: bool,
                init: Tensor | None, tol: float, max_iter: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    atoms = dictionary.shape[0]
    if method not in ("auto", "cd") or atoms > _MAX_GRAM_ATOMS or atoms == 0:
        return _reference_op(method, x, dictionary, l1, weights, l2, positive, init, tol, max_iter)  # type: ignore[return-value]
    squared = _check_values(x, dictionary, init, l1=l1, weights=weights)
    solved = _core_encode(x, dictionary, l1, weights, l2, positive, init, tol, max_iter, squared)
    if method == "auto":
        # Rounding and dependent atoms can stall the core: what it misses in float32 it mostly solves in float64, and
        # FISTA needs no basis at all.
        operands = x, dictionary, l1, weights, l2, positive, tol, max_iter
        if x.dtype == torch.float32:
            _solve_missed(solved, _core_encode, torch.float64, *operands)
        _solve_missed(solved, reference_encode, x.dtype, *operands)
    _warn(solved[3], max_iter)
    return solved


def _solve_missed(solved: tuple[Tensor, ...], solve: Callable[..., Any], dtype: torch.dtype, x: Tensor,
                  dictionary: Tensor, l1: Tensor, weights: Tensor, l2: float, positive: bool, tol: float,
                  max_iter: int) -> None:  # fmt: skip
    """Solve the samples that were missed once more, in `dtype`; the codes with the smaller gap stay."""
    missed = (solved[3] != CONVERGED).nonzero().squeeze(1)
    for rows in missed.split(max(64, _BLOCK_ITERATES // dictionary.shape[0])) if missed.numel() else ():
        operands = [t.to(dtype) for t in (x[rows], dictionary, l1[rows], weights)]
        codes, _, iterations, _ = solve(*operands, l2, positive, None, tol, max_iter)
        codes = codes.to(x.dtype)
        xs, atoms, penalty, factors = (t.double() for t in (x[rows], dictionary, l1[rows], weights))
        gap = duality_gap(xs, atoms, codes.double(), penalty, l2=l2, weights=factors, positive=positive)
        gap = gap / xs.square().sum(1).clamp_min(torch.finfo(x.dtype).tiny)
        better = ~(solved[1][rows] <= gap)
        status = torch.where(gap <= tol, CONVERGED, MISSED)
        for kept, found in zip(solved, (codes, gap, iterations, status), strict=True):
            kept[rows[better]] = found[better].to(kept.dtype)


def _core_encode(x: Tensor, dictionary: Tensor, l1: Tensor, weights: Tensor, l2: float, positive: bool,
                 init: Tensor | None, tol: float, max_iter: int,
                 squared: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert CORE is not None
    (samples, features), atoms = x.shape, dictionary.shape[0]
    squared = torch.linalg.vecdot(x, x) if squared is None else squared
    x, dictionary, l1 = x.contiguous(), dictionary.contiguous(), l1.contiguous()
    init = None if init is None else init.contiguous()
    factors = None if bool((weights == 1).all()) else torch.nn.functional.pad(weights, (0, -atoms % 16), value=1.0)
    gram = dictionary @ dictionary.T
    codes, gap = large(x.new_empty(samples, atoms)), x.new_empty(samples)
    iterations = torch.empty(samples, dtype=torch.int64)
    status = torch.empty(samples, dtype=torch.int8)
    # Supports are hardly larger than the features, except with l2. Each thread's memory is 8 to 16 capacity^2 bytes.
    capacity = min(atoms, 2048, max(512, 2 * features, 2048 if l2 else 0))
    double, threads = x.dtype == torch.float64, torch.get_num_threads()
    memory = torch.empty(threads * CORE.sparse_workspace(double, atoms, capacity), dtype=torch.uint8)
    block = max(64, _BLOCK_PRODUCTS // atoms)
    products = large(x.new_empty(min(block, samples), atoms))
    for first in range(0, samples, block):
        rows = slice(first, min(first + block, samples))
        count = rows.stop - first
        torch.mm(x[rows], dictionary.T, out=products[:count])
        CORE.sparse_encode(
            double, pointer(gram), pointer(products), pointer(squared[rows]), pointer(l1[rows]), pointer(factors),
            pointer(None if init is None else init[rows]), l2, tol, positive, count, atoms, max_iter, capacity,
            pointer(codes[rows]), pointer(gap[rows]), pointer(iterations[rows]), pointer(status[rows]),
            pointer(memory), threads,
        )  # fmt: skip
    return codes, gap, iterations, status


def _cpu_encode_backward(grad: Tensor, codes: Tensor, x: Tensor, dictionary: Tensor, l1: Tensor, weights: Tensor,
                         l2: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert CORE is not None
    atoms = dictionary.shape[0]
    if atoms > _MAX_GRAM_ATOMS or atoms == 0:
        return reference_encode_backward(grad, codes, x, dictionary, l1, weights, l2)
    codes, grad, gram = codes.contiguous(), grad.contiguous(), dictionary @ dictionary.T
    v = large(torch.empty_like(codes))
    capacity = int((codes != 0).sum(1).max()) if codes.shape[0] else 0
    double, threads = codes.dtype == torch.float64, torch.get_num_threads()
    memory = torch.empty(threads * CORE.sparse_workspace(double, atoms, capacity), dtype=torch.uint8)
    CORE.sparse_solve_support(
        double, pointer(gram), pointer(codes), pointer(grad), l2, codes.shape[0], atoms, capacity, pointer(v),
        pointer(memory), threads,
    )  # fmt: skip
    return _from_support_solution(v, codes, x, dictionary, l1, weights)


def _cpu_ista(x: Tensor, dictionary: Tensor, l1: Tensor, step: Tensor, init: Tensor | None, max_iter: int,
              momentum: bool) -> Tensor:  # fmt: skip
    assert CORE is not None
    _check_positive(l1=l1, step=step)
    (samples, features), atoms = x.shape, dictionary.shape[0]
    x, l1, init = x.contiguous(), l1.contiguous(), None if init is None else init.contiguous()
    use_gram = atoms < 2 * features
    matrix = dictionary @ dictionary.T if use_gram else dictionary.contiguous()
    target = x @ dictionary.T if use_gram else x
    codes = large(x.new_empty(samples, atoms))
    double, threads = x.dtype == torch.float64, torch.get_num_threads()
    packed_size, memory_size = CORE.ista_sizes(double, use_gram, atoms, features)
    packed, memory = x.new_empty(packed_size), x.new_empty(threads * memory_size)
    CORE.ista(
        double, use_gram, momentum, pointer(matrix), pointer(target), pointer(l1), pointer(init), step.item(), samples,
        atoms, features, max_iter, pointer(codes), pointer(packed), pointer(memory), threads,
    )  # fmt: skip
    return codes


# -------------------------------------------------------------------------------------------- Triton on CUDA
_triton_ista = kernel("sparse", "ista")
_triton_fista = kernel("sparse", "fista_solve")


def _cuda_encode(method: str, x: Tensor, dictionary: Tensor, l1: Tensor, weights: Tensor, l2: float, positive: bool,
                 init: Tensor | None, tol: float, max_iter: int) -> tuple[Tensor, ...]:  # fmt: skip
    if x.dtype == torch.float64 or method == "ista":
        return _reference_op(method, x, dictionary, l1, weights, l2, positive, init, tol, max_iter)
    _check_values(x, dictionary, init, l1=l1, weights=weights)
    operands = [t.contiguous() for t in (x, dictionary, l1)]
    init = None if init is None else init.contiguous()
    solved = _triton_fista(*operands, l2, weights.contiguous(), positive, init, tol, max_iter)
    _warn(solved[3], max_iter)
    return solved


def _cuda_ista(x: Tensor, dictionary: Tensor, l1: Tensor, step: Tensor, init: Tensor | None, max_iter: int,
               momentum: bool) -> Tensor:  # fmt: skip
    if x.dtype == torch.float64:
        return reference_ista(x, dictionary, l1, step, init, max_iter, momentum)
    operands = [t.contiguous() for t in (x, dictionary, l1, step.reshape(1))]
    return _triton_ista(*operands, None if init is None else init.contiguous(), max_iter, momentum)


# ------------------------------------------------------------------------------------------ schema, autograd
def _fake_encode(method: str, x: Tensor, dictionary: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    samples = x.shape[0]
    codes, gap = x.new_empty(samples, dictionary.shape[0]), x.new_empty(samples)
    return codes, gap, x.new_empty(samples, dtype=torch.int64), x.new_empty(samples, dtype=torch.int8)


def _fake_pursue(method: str, x: Tensor, dictionary: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    codes, _, iterations, status = _fake_encode(method, x, dictionary, *others)
    return codes, iterations, status


_encode = register(
    "sparse_encode(str method, Tensor x, Tensor dictionary, Tensor l1, Tensor weights, float l2, bool positive, "
    "Tensor? init, float tol, int max_iter) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_op,
    fake=_fake_encode,
    cpu=_cpu_encode,
    cuda=_cuda_encode,
    waits=True,
)
_encode_backward = register(
    "sparse_encode_backward(Tensor grad, Tensor codes, Tensor x, Tensor dictionary, Tensor l1, Tensor weights, "
    "float l2) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference_encode_backward,
    fake=lambda grad, codes, *inputs: tuple(t.new_empty(t.shape) for t in inputs[:4]),
    cpu=_cpu_encode_backward,
    cuda=None,
    waits=True,
)
_pursue = register(
    "sparse_pursue(str method, Tensor x, Tensor dictionary, int n_nonzero, Tensor? init, int max_iter) -> "
    "(Tensor, Tensor, Tensor)",
    reference=reference_pursue,
    fake=_fake_pursue,
    cpu=None,
    cuda=None,
    waits=True,
)
_ista = register(
    "ista(Tensor x, Tensor dictionary, Tensor l1, Tensor step, Tensor? init, int max_iter, bool momentum) -> Tensor",
    reference=reference_ista,
    fake=lambda x, dictionary, *_: x.new_empty(x.shape[0], dictionary.shape[0]),
    cpu=_cpu_ista,
    cuda=_cuda_ista,
)
_ista_backward = register(
    "ista_backward(Tensor grad, Tensor x, Tensor dictionary, Tensor l1, Tensor step, Tensor? init, int max_iter, "
    "bool momentum) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference_ista_backward,
    fake=lambda grad, x, dictionary, l1, *_: tuple(t.new_empty(t.shape) for t in (x, dictionary, l1, grad)),
    cpu=None,
    cuda=None,
)


class _OnSupport(torch.autograd.Function):
    """Gives solved codes their gradient: near a solution they move on their support alone, by a linear system."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, x: Tensor, dictionary: Tensor, l1: Tensor, weights: Tensor,
                l2: float) -> Tensor:  # fmt: skip
        ctx.save_for_backward(codes, x, dictionary, l1, weights)
        ctx.l2 = l2
        return codes.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_encode_backward(grad, *ctx.saved_tensors, ctx.l2), None


class _Ista(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dictionary: Tensor, l1: Tensor, step: Tensor, init: Tensor | None, max_iter: int,
                momentum: bool) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, dictionary, l1, step, init)
        ctx.settings = max_iter, momentum
        return _ista(x, dictionary, l1, step, init, max_iter, momentum)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dictionary, l1, init = _ista_backward(grad, *ctx.saved_tensors, *ctx.settings)
        return x, dictionary, l1, None, init if ctx.needs_input_grad[4] else None, None, None


class _Value(torch.autograd.Function):
    """The objective at solved codes, whose own change counts for nothing."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, x: Tensor, dictionary: Tensor, l1: Tensor, weights: Tensor,
                l2: float) -> Tensor:  # fmt: skip
        ctx.save_for_backward(codes, x, dictionary, l1, weights)
        error = 0.5 * (x - codes @ dictionary).square().sum(1)
        return error + l1 * (weights * codes.abs()).sum(1) + 0.5 * l2 * codes.square().sum(1)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, x, dictionary, l1, weights = ctx.saved_tensors
        pull, size = grad[:, None] * (x - codes @ dictionary), codes.abs()
        return None, pull, -codes.T @ pull, grad * (size @ weights), (grad * l1) @ size, None


# -------------------------------------------------------------------------------------------------- public
def _problem(x: Tensor, dictionary: Tensor, l1: float | Tensor, weights: Tensor | None,
             l2: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Check the arguments that every function shares; returns x, dictionary, l1 and weights to compute with."""
    check_float("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (samples, features), got {tuple(x.shape)}")
    check_like("dictionary", dictionary, "x", x)
    if dictionary.dim() != 2 or dictionary.shape[1] != x.shape[1]:
        raise ValueError(
            f"dictionary: expected shape (atoms, features) with the {x.shape[1]} features of x, "
            f"got {tuple(dictionary.shape)}"
        )
    compute = compute_dtype(x)
    if isinstance(l1, Tensor):
        check_float("l1", l1)
        if l1.dim() and tuple(l1.shape) != (x.shape[0],):
            raise ValueError(f"l1: expected a number or shape (samples,) = ({x.shape[0]},), got {tuple(l1.shape)}")
        l1 = l1.to(x.device, compute).expand(x.shape[0])
    else:
        if not 0 < l1 < math.inf:
            raise ValueError(f"l1: expected a finite number above 0, got {l1}")
        l1 = x.new_full((x.shape[0],), l1, dtype=compute)
    if weights is None:
        weights = x.new_ones(dictionary.shape[0], dtype=compute)
    else:
        check_float("weights", weights)
        check_shape("weights", weights, (dictionary.shape[0],), "(atoms,)")
        weights = weights.to(x.device, compute)
    if not 0 <= l2 < math.inf:
        raise ValueError(f"l2: expected a finite number of at least 0, got {l2}")
    return x.to(compute), dictionary.to(compute), l1, weights


def _check_codes(name: str, codes: Tensor, x: Tensor, dictionary: Tensor) -> Tensor:
    check_like(name, codes, "x", x)
    check_shape(name, codes, (x.shape[0], dictionary.shape[0]), "(samples, atoms)")
    return codes.to(compute_dtype(x))


def _certified(x: Tensor, dictionary: Tensor, codes: Tensor, l1: float | Tensor, l2: float,
               weights: Tensor | None) -> tuple[Tensor, ...]:  # fmt: skip
    """Check the arguments; returns l1, weights, codes h, the residual x - h A and the correlations c."""
    x, dictionary, l1, weights = _problem(x, dictionary, l1, weights, l2)
    h = _check_codes("codes", codes, x, dictionary)
    r = x - h @ dictionary
    return l1, weights, h, r, r @ dictionary.T - l2 * h


def _full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep autocast from lowering the products of a function whose first argument is a tensor."""

    @functools.wraps(function)
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Tensor):
            check_float("x", x)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return call


def soft_threshold(x: Tensor, threshold: float | Tensor) -> Tensor:
    """``sign(x) * max(|x| - threshold, 0)``: the proximal operator of threshold * |x|.

    Args:
        x: any shape, floating point.
        threshold: at least 0, broadcastable to `x`.

    Returns:
        A tensor like `x`.
    """
    check_float("x", x)
    if not isinstance(threshold, Tensor) and not threshold >= 0:
        raise ValueError(f"threshold: expected at least 0, got {threshold}")
    return shrink(x, threshold)


@_full_precision
def ista(
    x: Tensor,
    dictionary: Tensor,
    l1: float | Tensor,
    *,
    max_iter: int = 100,
    step: float | Tensor | None = None,
    init: Tensor | None = None,
    momentum: bool = False,
) -> Tensor:
    """Run iterative soft thresholding, h <- S(h + step (x - h A) A', step l1), differentiable through its iterations.

    Args:
        x: samples, (samples, features), float32, float64, bfloat16 or float16 (these two computed in float32).
        dictionary: atoms as rows, (atoms, features), like `x`.
        l1: weight of the L1 norm, a number or (samples,), above 0.
        max_iter: number of iterations.
        step: step size, above 0, no gradient; None takes 1 / the largest eigenvalue of the Gram matrix.
        init: codes to start from, (samples, atoms); zero if None.
        momentum: Nesterov's, which makes it FISTA.

    Returns:
        codes, (samples, atoms), like `x`. For a solution with a certificate use :func:`sparse_encode`.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.

    Source: Daubechies et al. 2004; Beck & Teboulle 2009.
    """
    x_, dictionary_, l1_, _ = _problem(x, dictionary, l1, None, 0.0)
    init_ = None if init is None else _check_codes("init", init, x, dictionary)
    if max_iter < 0:
        raise ValueError(f"max_iter: expected at least 0, got {max_iter}")
    if step is None:
        step = 1 / lipschitz(dictionary_.detach())
    elif not isinstance(step, Tensor):
        if not 0 < step < math.inf:
            raise ValueError(f"step: expected a finite number above 0, got {step}")
        step = x_.new_full((), step)
    elif step.numel() != 1:
        raise ValueError(f"step: expected a number or a tensor of one, got shape {tuple(step.shape)}")
    step = step.detach().to(x_.device, x_.dtype)
    return _Ista.apply(x_, dictionary_, l1_, step, init_, max_iter, momentum).to(x.dtype)


def fista(x: Tensor, dictionary: Tensor, l1: float | Tensor, *, max_iter: int = 100,
          step: float | Tensor | None = None, init: Tensor | None = None) -> Tensor:  # fmt: skip
    """:func:`ista` with momentum."""
    return ista(x, dictionary, l1, max_iter=max_iter, step=step, init=init, momentum=True)


def ista_step(codes: Tensor, x: Tensor, dictionary: Tensor, l1: float | Tensor, *, step: float | Tensor) -> Tensor:
    """One iteration of :func:`ista` from `codes`."""
    return ista(x, dictionary, l1, max_iter=1, step=step, init=codes)


@_full_precision
def duality_gap(x: Tensor, dictionary: Tensor, codes: Tensor, l1: float | Tensor, *, l2: float = 0.0,
                weights: Tensor | None = None, positive: bool = False) -> Tensor:  # fmt: skip
    """How far the objective at `codes` can be above its minimum, (samples,), not divided by |x|^2.

    Arguments as for :func:`sparse_encode`. Negative codes are infinitely far where `positive` forbids them.
    """
    l1_, weights_, h, r, c = _certified(x, dictionary, codes, l1, l2, weights)
    gap = reference_gap(h, c, r.square().sum(1) + l2 * h.square().sum(1), l1_, weights_, positive)
    return torch.where((h < 0).any(1), math.inf, gap) if positive else gap


@_full_precision
def kkt_violation(x: Tensor, dictionary: Tensor, codes: Tensor, l1: float | Tensor, *, l2: float = 0.0,
                  weights: Tensor | None = None, positive: bool = False) -> Tensor:  # fmt: skip
    """Largest distance of the correlations from what optimality asks for, (samples,).

    Arguments as for :func:`sparse_encode`.
    """
    l1_, weights_, h, _, c = _certified(x, dictionary, codes, l1, l2, weights)
    threshold = l1_[:, None] * weights_
    outside = ((c if positive else c.abs()) - threshold).clamp_min(0)
    violation = torch.where(h == 0, outside, (c - threshold * h.sign()).abs())
    if positive:
        violation = torch.maximum(violation, -h)
    return violation.amax(1) if h.shape[1] else violation.sum(1)


@_full_precision
def lambda_max(x: Tensor, dictionary: Tensor, *, weights: Tensor | None = None, positive: bool = False) -> Tensor:
    """The `l1` from which on each sample's codes are zero, (samples,)."""
    x_, dictionary_, _, weights_ = _problem(x, dictionary, 1.0, weights, 0.0)
    c = x_ @ dictionary_.T / weights_
    return (c if positive else c.abs()).amax(1).clamp_min(0) if c.shape[1] else c.sum(1)


@_full_precision
def sparse_encode(
    x: Tensor,
    dictionary: Tensor,
    l1: float | Tensor | None = None,
    *,
    l2: float = 0.0,
    weights: Tensor | None = None,
    positive: bool = False,
    init: Tensor | None = None,
    solver: str = "auto",
    tol: float | None = None,
    max_iter: int = 1000,
    n_nonzero: int | None = None,
    return_info: bool = False,
    sparse_output: bool = False,
) -> Any:
    """Solve the lasso for each sample, to a duality gap of at most ``tol * |x|^2``.

    Args:
        x: samples, (samples, features), float32, float64, bfloat16 or float16 (these two computed in float32).
        dictionary: atoms as rows, (atoms, features), like `x`; any norms.
        l1: weight of the L1 norm, a number or (samples,); None for "omp" and "iht".
        l2: weight of half the squared L2 norm (elastic net).
        weights: each atom's factor on `l1`, (atoms,), above 0; 1 if None.
        positive: allow no negative codes.
        init: codes to start from, (samples, atoms).
        solver: "cd" is an active set and coordinate descent within a working set (C++, on CPU, up to 8192 atoms);
            "fista" has restart and backtracking of each sample's own; "ista" neither momentum nor restart; "auto" takes
            "cd" where it exists, and solves what it misses once more, in float64 and by "fista"; else "fista".
            "omp" (orthogonal matching pursuit) and "iht" (iterative hard thresholding) solve the problem with at most
            `n_nonzero` atoms instead.
        tol: relative duality gap to reach; None is 1e-4, or what the dtype can reach.
        max_iter: most iterations of a sample. Samples that need more are flagged in the info, and one warning counts
            them.
        n_nonzero: most atoms of a sample, for "omp" and "iht".
        return_info: return a :class:`SparseInfo` too.
        sparse_output: return a CSR tensor, made block by block, without gradient.

    Returns:
        codes, (samples, atoms), like `x`; with `return_info`, (codes, info). Gradients of the codes with respect to
        `x`, `dictionary`, `l1` and `weights` are those of the solution, by implicit differentiation on its support.

    Raises:
        TypeError, ValueError: naming the argument that is wrong; ValueError for nan and inf.

    Source: see :mod:`fastvae.ops.sparse`.
    """
    check_choice("solver", solver, SOLVERS)
    pursuit = solver in ("omp", "iht")
    if pursuit != (l1 is None):
        raise ValueError(f"l1: expected {'None' if pursuit else 'a number'} for solver {solver!r}, got {l1!r}")
    if pursuit != (n_nonzero is not None):
        raise ValueError(
            f"n_nonzero: expected {'a number' if pursuit else 'None'} for solver {solver!r}, got {n_nonzero}"
        )
    x_, dictionary_, l1_, weights_ = _problem(x, dictionary, 1.0 if l1 is None else l1, weights, l2)
    init_ = None if init is None else _check_codes("init", init, x, dictionary)
    if init_ is not None and positive:
        init_ = init_.clamp_min(0)
    floor = GAP_FLOOR[x.dtype]
    if tol is None:
        tol = max(1e-4, floor)
    if not tol >= floor:
        raise ValueError(f"tol: expected at least {floor:g}, the smallest relative gap of {x.dtype}, got {tol}")
    if max_iter < 1:
        raise ValueError(f"max_iter: expected at least 1, got {max_iter}")
    if pursuit:
        _check_pursuit(n_nonzero, dictionary, weights, positive, l2)
    on_cpu = x.device.type == "cpu" and CORE is not None
    if solver == "cd" and not on_cpu:
        raise ValueError(f"solver: 'cd' runs in the C++ core on cpu tensors, use 'fista' on {x.device}")
    if solver == "cd" and dictionary.shape[0] > _MAX_GRAM_ATOMS:
        raise ValueError(f"solver: 'cd' takes up to {_MAX_GRAM_ATOMS} atoms, use 'fista' for {dictionary.shape[0]}")
    if sparse_output:
        return _encode_to_csr(
            x, dictionary, l1, l2=l2, weights=weights, positive=positive, init=init, solver=solver, tol=tol,
            max_iter=max_iter, n_nonzero=n_nonzero, return_info=return_info,
        )  # fmt: skip
    with torch.no_grad():
        if pursuit:
            assert n_nonzero is not None
            codes, iterations, status = _pursue(solver, x_.detach(), dictionary_.detach(), n_nonzero, init_, max_iter)
            info = SparseInfo(torch.full_like(l1_, math.nan), iterations, status)
            l1_ = torch.zeros_like(l1_)
        else:
            method = "fista" if solver == "auto" and not on_cpu else solver
            # In half precision most of the gap is left to the rounding of the codes.
            codes, gap, iterations, status = _encode(
                method, x_.detach(), dictionary_.detach(), l1_.detach(), weights_.detach(), l2, positive, init_,
                tol if x.dtype == x_.dtype else tol / 4, max_iter,
            )  # fmt: skip
            info = SparseInfo(gap, iterations, status)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x_, dictionary_, l1_, weights_)):
        codes = _OnSupport.apply(codes, x_, dictionary_, l1_, weights_, l2)
    codes = codes.to(x.dtype)
    if return_info and x.dtype != x_.dtype and not pursuit:
        # The certificate is of the codes that are returned, and rounding moved them.
        with torch.no_grad():
            gap = duality_gap(x_, dictionary_, codes.to(x_.dtype), l1_, l2=l2, weights=weights_, positive=positive)
            gap = gap / x_.square().sum(1).clamp_min(torch.finfo(x_.dtype).tiny)
        info = SparseInfo(gap, info.iterations, torch.where(gap <= tol, info.status, MISSED).to(torch.int8))
    return (codes, info) if return_info else codes


@_full_precision
def sparse_value(x: Tensor, dictionary: Tensor, l1: float | Tensor, *, l2: float = 0.0, weights: Tensor | None = None,
                 positive: bool = False, init: Tensor | None = None, solver: str = "auto", tol: float | None = None,
                 max_iter: int = 1000) -> Tensor:  # fmt: skip
    """The optimal objective of each sample, (samples,), float32 or float64.

    Its gradient needs no derivative of the codes (Danskin): at the optimum the objective does not change with them.
    Arguments as for :func:`sparse_encode`, of whose solvers "omp" and "iht" minimise something else.
    """
    check_choice("solver", solver, SOLVERS[:4])
    settings: dict[str, Any] = {"l2": l2, "weights": weights, "positive": positive}
    with torch.no_grad():
        codes = sparse_encode(x, dictionary, l1, init=init, solver=solver, tol=tol, max_iter=max_iter, **settings)
    x_, dictionary_, l1_, weights_ = _problem(x, dictionary, l1, weights, l2)
    return _Value.apply(codes.to(x_.dtype), x_, dictionary_, l1_, weights_, l2)


# ------------------------------------------------------------------------------------- a number of atoms, not l1
def _check_pursuit(n_nonzero: int | None, dictionary: Tensor, weights: Tensor | None, positive: bool,
                   l2: float) -> None:  # fmt: skip
    if n_nonzero is None or not 1 <= n_nonzero <= min(dictionary.shape):
        raise ValueError(f"n_nonzero: expected 1 to {min(dictionary.shape)}, got {n_nonzero}")
    for name, given in (("weights", weights is not None), ("positive", positive), ("l2", l2 != 0)):
        if given:
            raise ValueError(f"{name}: not for solvers 'omp' and 'iht'")


def _encode_to_csr(x: Tensor, dictionary: Tensor, l1: float | Tensor | None, *, init: Tensor | None,
                   return_info: bool, **settings: Any) -> Any:  # fmt: skip
    crows, columns, values, infos = [torch.zeros(1, dtype=torch.int64, device=x.device)], [], [], []
    with torch.no_grad():
        for first in range(0, max(x.shape[0], 1), 4096):
            rows = slice(first, first + 4096)
            with own_warning():
                codes, info = sparse_encode(
                    x[rows], dictionary, l1[rows] if isinstance(l1, Tensor) and l1.dim() else l1,
                    init=None if init is None else init[rows], return_info=True, **settings,
                )  # fmt: skip
            crows.append(crows[-1][-1] + (codes != 0).sum(1).cumsum(0))
            where = codes.nonzero(as_tuple=True)
            columns.append(where[1])
            values.append(codes[where])
            infos.append(info)
        shape = (x.shape[0], dictionary.shape[0])
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch's, that CSR is in beta
            csr = torch.sparse_csr_tensor(torch.cat(crows), torch.cat(columns), torch.cat(values), shape)
    info = SparseInfo(*(torch.cat(parts) for parts in zip(*infos, strict=True)))
    if settings["solver"] != "iht":
        _warn(info.status, settings["max_iter"])
    return (csr, info) if return_info else csr
