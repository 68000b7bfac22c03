"""Sparse codes of rows x over a dictionary A, atoms as rows: ISTA's fixed iterations, and FISTA to a certified gap.

What: ``ista`` iterates ``h <- S(y + step * (x - y A) A^T, step * l1)``, S the soft threshold, y = h or h with
momentum; ``fista_solve`` minimises ``|x - h A|^2 / 2 + l1 * sum_j weights_j |h_j| + l2 / 2 * |h|^2`` until each
sample's duality gap is at most tol * |x|^2. The definitions are the references in ``fastvae/ops/sparse.py``.

Why: an iteration is 4*N*M*D FLOPs (2*N*M*M by the Gram matrix G = A A^T). Eager PyTorch at its best, two addmm and a
softshrink, moves 5*N*M numbers in three launches; momentum adds 5*N*M. Up to D*M = 32k one launch here runs all
iterations: a block's residual stays in registers, the dictionary (128 kB at most) and the block's codes in the nearest
caches, and each is read once an iteration. Beyond, threshold and momentum are the epilogue of the product, which
moves 3 or 4*N*M numbers, 2 more with momentum. The solver's elementwise part is one launch that moves 12*N*M.

How: on chip, a program owns 16 samples and walks the atoms in blocks: the gradient from the residual, the new codes,
and at once their part of the next residual. From 2 D atoms on the product is (x - H A) A^T, below it is B - H G with
B = x A^T. The solver keeps these correlations C at its iterates, so that one product an iteration gives the gradient
at the momentum point (it is linear), the test of the curvature L, and the gap. One launch over rows judges every
sample's proposal, and makes its next one; on chip, one launch does so, products included, for 10 iterations. L is a
sample's own: it starts at the largest squared atom, and is never less; a proposal steeper than L is refused and raises
it; one that holds lowers it by a tenth, until 32 were refused. From there L only grows, at most to an upper bound of
the largest eigenvalue of G, hence convergence. Every 10 iterations, the only time the host waits, the finished are
certified by a gradient made anew from x, and leave; those who fail it go on, to half the gap.

Limits: float32 alone; contiguous operands; l1 > 0 and weights > 0 where a gap is wanted. ISTA's products follow
``torch.set_float32_matmul_precision`` (see ``precision.py``); the solver's are IEEE float32, which reaches gaps
of 3e-6 * |x|^2 (TF32: 2.5e-4). Samples are solved 32 M numbers of codes at a time, in 7 buffers of that size.

Source: Daubechies et al. 2004 (ISTA); Beck & Teboulle 2009 (FISTA); O'Donoghue & Candes 2015 (restart); Fercoq et
al. 2015 (gap).
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.precision import dot_precision

_ON_CHIP_NUMBERS, _ON_CHIP_FEATURES = 1 << 15, 256
_ON_CHIP_ITERATIONS = 3  # for fewer, the residual after the last one, which nobody reads, weighs too much
_CHIP_BLOCK_N = 16
_BLOCK_N, _BLOCK_M = 64, 64
_ROW_TILE = 512  # 16 bytes a thread
_SOLVE_NUMBERS = 1 << 25
_CHECK_EVERY = 10
_TINY = 1e-30


def ista(
    x: Tensor,
    dictionary: Tensor,
    l1: Tensor,
    step: Tensor,
    init: Tensor | None,
    max_iter: int,
    momentum: bool,
) -> Tensor:
    """Run `max_iter` iterations of ISTA, or of FISTA with `momentum`.

    Args:
        x: (N, D) float32, as all that follow.
        dictionary: (M, D).
        l1: (N,).
        step: (1,).
        init: (N, M), or None for zeros.
        max_iter: iterations.
        momentum: whether to extrapolate, by (t - 1) / t_next with t_next = (1 + sqrt(1 + 4 t^2)) / 2, t = 1 at first.

    Returns:
        codes (N, M).
    """
    _check_dtype(x)
    (rows, features), atoms = x.shape, dictionary.shape[0]
    codes = x.new_zeros((rows, atoms)) if init is None else init.clone()
    if codes.numel() == 0 or max_iter == 0:
        return codes
    if not _fits_chip(dictionary) or max_iter < _ON_CHIP_ITERATIONS:
        return _ista_steps(x, dictionary, l1, step, codes, max_iter, momentum)
    width, block_atoms, warps = _chip_blocks(features)
    _sparse_ista_kernel[(triton.cdiv(rows, _CHIP_BLOCK_N),)](
        x, dictionary, l1, step, codes, codes.clone() if momentum else codes,
        rows, features, atoms, max_iter,
        HAS_INIT=int(init is not None), MOMENTUM=int(momentum), PRECISION=dot_precision(),
        BLOCK_N=_CHIP_BLOCK_N, BLOCK_M=block_atoms, BLOCK_D=width, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return codes


def fista_solve(
    x: Tensor,
    dictionary: Tensor,
    l1: Tensor,
    l2: float,
    weights: Tensor | None,
    positive: bool,
    init: Tensor | None,
    tol: float,
    max_iter: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Minimise |x - h A|^2 / 2 + l1 * sum_j weights_j |h_j| + l2 / 2 * |h|^2 for each row x.

    Args:
        x: (N, D) float32, as all that follow.
        dictionary: A, (M, D).
        l1: (N,), above 0.
        l2: at least 0.
        weights: (M,), above 0, or None for ones.
        positive: whether to keep h >= 0.
        init: (N, M) to start from, or None for zeros; any sign, also with `positive`.
        tol: a sample is solved when its duality gap is at most tol * |x|^2.
        max_iter: iterations at most.

    Returns:
        codes (N, M); duality gap relative to |x|^2, (N,), of these codes by a fresh float32 gradient; iterations,
        one product each, int64 (N,); status, int8 (N,): 0 solved, 1 `max_iter` reached.
    """
    _check_dtype(x)
    rows, atoms = x.shape[0], dictionary.shape[0]
    if x.numel() == 0 or atoms == 0:  # zero codes: nothing to explain, or nothing to do it with
        zeros = x.new_zeros(rows)
        return x.new_zeros((rows, atoms)), zeros, zeros.long(), zeros.to(torch.int8)
    codes = torch.empty((rows, atoms), dtype=x.dtype, device=x.device)
    gap = torch.empty(rows, dtype=x.dtype, device=x.device)
    iterations = torch.empty(rows, dtype=torch.int64, device=x.device)
    status = torch.ones(rows, dtype=torch.int8, device=x.device)
    weights = x.new_ones(atoms) if weights is None else weights
    block = max(_SOLVE_NUMBERS // atoms, 1)
    with _ieee_products():
        problem = _Problem.of(dictionary, weights, l2, positive)
        for first in range(0, rows, block):
            part = slice(first, first + block)
            state = _start(problem, x[part], l1[part], None if init is None else init[part], tol)
            _solve(problem, state, tol, max_iter, codes[part], gap[part], iterations[part], status[part])
    return codes, gap, iterations, status


class _Problem(NamedTuple):
    """What all samples share."""

    dictionary: Tensor  # (M, D)
    gram: Tensor | None  # (M, M), where that makes the cheaper product
    lowest: Tensor  # (1,) the curvature to start from
    highest: Tensor  # (1,) and one that always holds
    weights: Tensor  # (M,)
    l2: float
    positive: bool

    @classmethod
    def of(cls, dictionary: Tensor, weights: Tensor, l2: float, positive: bool) -> "_Problem":
        (atoms, features), transposed = dictionary.shape, dictionary.t()
        gram = dictionary @ transposed if atoms < 2 * features else None
        lowest = dictionary.square().sum(1).amax().clamp_min(_TINY) + l2
        highest = _largest_eigenvalue(dictionary @ transposed if atoms <= features else transposed @ dictionary) + l2
        highest = torch.maximum(highest, lowest)
        return cls(dictionary, gram, lowest.view(1), highest.view(1), weights, l2, positive)

    def multiply(self, codes: Tensor, x: Tensor) -> Tensor:
        """Return the product H G, or (x - H A) A^T where there is no G."""
        if self.gram is not None:
            return codes @ self.gram
        return torch.addmm(x, codes, self.dictionary, alpha=-1) @ self.dictionary.t()

    def gap(self, x: Tensor, codes: Tensor, l1: Tensor) -> Tensor:
        """Return the duality gap (N,), from x itself and as a sum of terms that are never negative."""
        residual = torch.addmm(x, codes, self.dictionary, alpha=-1)
        correlation = torch.addmm(codes, residual, self.dictionary.t(), beta=-self.l2)
        largest = ((correlation if self.positive else correlation.abs()) / self.weights).amax(1)
        scale = torch.where(largest > l1, l1 / largest, 1.0)
        penalty = l1[:, None] * self.weights * codes.abs() - scale[:, None] * correlation * codes
        energy = residual.square().sum(1) + self.l2 * codes.square().sum(1)
        return 0.5 * (1.0 - scale).square() * energy + penalty.clamp_min_(0.0).sum(1)


class _State(NamedTuple):
    """Samples still at work; everything here has one row for each."""

    index: Tensor  # (N,) int64, place among the outputs
    x: Tensor  # (N, D)
    l1: Tensor  # (N,)
    energy: Tensor  # (N,) |x|^2
    target: Tensor  # (N,) gap to reach
    correlation: Tensor  # (N, M) B
    codes: Tensor  # (N, M) H, the last iterate that held
    codes_correlation: Tensor  # (N, M) C at H
    point: Tensor  # (N, M) Y, where the proposal's gradient was taken
    point_correlation: Tensor  # (N, M) C at Y
    proposal: Tensor  # (N, M)
    curvature: Tensor  # (N,) L
    momentum: Tensor  # (N,) t
    refused: Tensor  # (N,) int32, proposals so far
    iterations: Tensor  # (N,) int64
    status: Tensor  # (N,) int8: 0 finished, and left as it is; 1 running


def _start(problem: _Problem, x: Tensor, l1: Tensor, init: Tensor | None, tol: float) -> _State:
    # The start is its own first proposal: it holds, and the kernel goes on from there.
    rows = x.shape[0]
    energy = x.square().sum(1)
    correlation = x @ problem.dictionary.t()
    codes = torch.zeros_like(correlation) if init is None else init.clamp_min(0.0) if problem.positive else init.clone()
    return _State(
        index=torch.arange(rows, device=x.device), x=x, l1=l1, energy=energy, target=tol * energy,
        correlation=correlation, codes=codes, codes_correlation=torch.zeros_like(codes),
        point=codes.clone(), point_correlation=torch.zeros_like(codes), proposal=codes.clone(),
        curvature=problem.lowest.repeat(rows), momentum=torch.ones_like(energy),
        refused=torch.zeros(rows, dtype=torch.int32, device=x.device),
        iterations=torch.zeros(rows, dtype=torch.int64, device=x.device),
        status=torch.ones(rows, dtype=torch.int8, device=x.device),
    )  # fmt: skip


def _solve(problem: _Problem, state: _State, tol: float, max_iter: int, codes: Tensor, gap: Tensor,
           iterations: Tensor, status: Tensor) -> None:  # fmt: skip
    """Iterate until all samples are certified, or `max_iter`; writes the last four, rows by `state.index`."""
    begin = 0
    for stop in (*range(_CHECK_EVERY, max_iter, _CHECK_EVERY), max_iter):
        if _fits_chip(problem.dictionary):
            _advance_on_chip(problem, state, begin, stop + 1 - begin)
        else:
            for iteration in range(begin, stop + 1):
                _advance(problem, state, iteration)
        begin, last = stop + 1, stop == max_iter
        leaving = torch.arange(state.index.numel(), device=gap.device) if last else (state.status == 0).nonzero()[:, 0]
        if leaving.numel() == 0:
            continue
        index, x, energy, l1, h = (t[leaving] for t in (state.index, state.x, state.energy, state.l1, state.codes))
        exact = problem.gap(x, h, l1)
        missed = ~(exact <= tol * energy)  # so is NaN
        codes[index], gap[index], iterations[index] = h, exact / energy.clamp_min(_TINY), state.iterations[leaving]
        status[index] = missed.to(torch.int8)
        if last:
            break
        state.status[leaving] = missed.to(torch.int8)
        state.target[leaving] *= torch.where(missed, 0.5, 1.0)
        staying = state.status.nonzero()[:, 0]
        if staying.numel() == 0:
            break
        state = _State(*(t[staying] for t in state))


def _advance(problem: _Problem, state: _State, iteration: int) -> None:
    """Judge each sample's proposal, and make the next one."""
    rows, atoms = state.proposal.shape
    block_atoms = min(triton.next_power_of_2(atoms), _ROW_TILE)
    block_rows = _ROW_TILE // block_atoms
    _sparse_fista_kernel[(triton.cdiv(rows, block_rows),)](
        problem.multiply(state.proposal, state.x), state.correlation, problem.weights, state.l1, state.energy,
        state.target, problem.lowest, problem.highest,
        state.codes, state.codes_correlation, state.point, state.point_correlation, state.proposal,
        state.curvature, state.momentum, state.refused, state.iterations, state.status,
        rows, atoms, iteration, float(problem.l2),
        GRAM=int(problem.gram is not None), POSITIVE=int(problem.positive),
        BLOCK_N=block_rows, BLOCK_M=block_atoms, num_warps=4, num_stages=1,
    )  # fmt: skip


def _advance_on_chip(problem: _Problem, state: _State, first: int, count: int) -> None:
    """As :func:`_advance`, `count` iterations from the one numbered `first` in one launch."""
    rows, atoms = state.proposal.shape
    width, block_atoms, warps = _chip_blocks(state.x.shape[1])
    _sparse_fista_chip_kernel[(triton.cdiv(rows, _CHIP_BLOCK_N),)](
        state.x, problem.dictionary, torch.empty_like(state.proposal), state.correlation, problem.weights, state.l1,
        state.energy, state.target, problem.lowest, problem.highest,
        state.codes, state.codes_correlation, state.point, state.point_correlation, state.proposal,
        state.curvature, state.momentum, state.refused, state.iterations, state.status,
        rows, state.x.shape[1], atoms, first, count, float(problem.l2),
        POSITIVE=int(problem.positive), BLOCK_N=_CHIP_BLOCK_N, BLOCK_M=min(block_atoms, 32), BLOCK_D=width,
        num_warps=warps, num_stages=1,
    )  # fmt: skip


def _fits_chip(dictionary: Tensor) -> bool:
    atoms, features = dictionary.shape
    return features <= _ON_CHIP_FEATURES and atoms * max(features, 16) <= _ON_CHIP_NUMBERS


def _chip_blocks(features: int) -> tuple[int, int, int]:
    """Columns of a block of samples, atoms of a block of the dictionary, and warps."""
    width = max(triton.next_power_of_2(features), 16)
    return (width, 64, 4) if width <= 64 else (width, 16, 8)


def _ista_steps(x: Tensor, dictionary: Tensor, l1: Tensor, step: Tensor, codes: Tensor, max_iter: int,
                momentum: bool) -> Tensor:  # fmt: skip
    (rows, features), atoms = x.shape, dictionary.shape[0]
    use_gram = atoms < 2 * features
    # Every program reads the codes of whole rows: the next ones go elsewhere.
    point, out = codes, torch.empty_like(codes)
    codes = codes.clone() if momentum else codes
    correlation = x @ dictionary.t() if use_gram else x
    matrix = dictionary @ dictionary.t() if use_gram else dictionary
    precision = dot_precision()
    # Without tensor cores a step's operands lie in registers: longer steps would take all 255 of a thread.
    block_k, stages = (16, 2) if precision == "ieee" else (32, 3)
    t = 1.0
    for _ in range(max_iter):
        left = point if use_gram else torch.addmm(x, point, dictionary, alpha=-1)
        t_next = 0.5 + (0.25 + t * t) ** 0.5 if momentum else t
        _sparse_ista_step_kernel[(triton.cdiv(rows, _BLOCK_N), triton.cdiv(atoms, _BLOCK_M))](
            left, matrix, correlation, l1, step, point, codes, out,
            rows, atoms, matrix.shape[1], (t - 1.0) / t_next,
            GRAM=int(use_gram), MOMENTUM=int(momentum), PRECISION=precision,
            BLOCK_N=_BLOCK_N, BLOCK_M=_BLOCK_M, BLOCK_K=block_k, num_warps=8, num_stages=stages,
        )  # fmt: skip
        point, out, t = out, point, t_next
    return codes if momentum else point


def _largest_eigenvalue(gram: Tensor) -> Tensor:
    """Return an upper bound of the largest eigenvalue of a positive semidefinite matrix, a few percent above it.

    Row sums bound it, and those of its 64th power, whose 64th root is taken, closely. Unlike an eigenvalue solver,
    products need no word from the device.
    """
    bound, power = gram.new_ones(()), 1
    for _ in range(7):
        norm = gram.abs().sum(1).amax().clamp_min(_TINY)
        bound = bound * norm ** (1 / power)
        gram = gram / norm
        gram, power = gram @ gram, 2 * power
    return 1.01 * bound


@contextlib.contextmanager
def _ieee_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _check_dtype(x: Tensor) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"x: expected float32, got {x.dtype}")


@triton.jit
def _shrink(x, threshold):
    # A difference, not a choice between three: NaN stays.
    return x - tl.minimum(tl.maximum(x, -threshold), threshold)


@triton.jit(do_not_specialize=["rows", "max_iter"])
def _sparse_ista_kernel(
    x_ptr,  # (N, D)
    dictionary_ptr,  # (M, D)
    l1_ptr,  # (N,)
    step_ptr,  # (1,)
    codes_ptr,  # (N, M), in place
    point_ptr,  # (N, M), in place: where the gradient is taken; the codes themselves without momentum
    rows,
    features,
    atoms,
    max_iter,
    HAS_INIT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None]
    x_mask = inside & (feature < features)[None, :]
    x = tl.load(x_ptr + row[:, None] * features + feature[None, :], mask=x_mask, other=0.0)
    step = tl.load(step_ptr)
    threshold = (step * tl.load(l1_ptr + row, mask=row < rows, other=0.0))[:, None]
    residual = x
    if HAS_INIT:
        for start in range(0, atoms, BLOCK_M):
            atom = start + tl.arange(0, BLOCK_M)
            block_mask = (atom < atoms)[:, None] & (feature < features)[None, :]
            block = tl.load(
                dictionary_ptr + atom[:, None] * features + feature[None, :], mask=block_mask, other=0.0
            )  # fmt: skip
            element, mask = row[:, None] * atoms + atom[None, :], inside & (atom < atoms)[None, :]
            point = tl.load(point_ptr + element, mask=mask, other=0.0)
            residual = tl.dot(-point, block, residual, input_precision=PRECISION)
    t = tl.full((), 1.0, tl.float32)
    for _ in range(max_iter):
        t_next = 0.5 + tl.sqrt(0.25 + t * t)
        beta = (t - 1.0) / t_next
        t = t_next
        next_residual = x
        for start in range(0, atoms, BLOCK_M):
            atom = start + tl.arange(0, BLOCK_M)
            block_mask = (atom < atoms)[:, None] & (feature < features)[None, :]
            block = tl.load(
                dictionary_ptr + atom[:, None] * features + feature[None, :], mask=block_mask, other=0.0
            )  # fmt: skip
            element, mask = row[:, None] * atoms + atom[None, :], inside & (atom < atoms)[None, :]
            point = tl.load(point_ptr + element, mask=mask, other=0.0)
            if MOMENTUM:
                old = tl.load(codes_ptr + element, mask=mask, other=0.0)
            gradient = tl.dot(residual, tl.trans(block), input_precision=PRECISION)
            new = _shrink(point + step * gradient, threshold)
            if MOMENTUM:
                tl.debug_barrier()  # `new` does not wait for `old`, which other threads may be loading
                tl.store(codes_ptr + element, new, mask=mask)
                new += beta * (new - old)
            tl.store(point_ptr + element, new, mask=mask)
            next_residual = tl.dot(-new, block, next_residual, input_precision=PRECISION)
        residual = next_residual
        # What one thread has stored another may load.
        tl.debug_barrier()


@triton.jit(do_not_specialize=["rows", "beta"])
def _sparse_ista_step_kernel(
    left_ptr,  # (N, K): the point itself (GRAM), or its residual
    matrix_ptr,  # (M, K): the Gram matrix, or the dictionary
    correlation_ptr,  # (N, M) x A^T; read with GRAM only
    l1_ptr,  # (N,)
    step_ptr,  # (1,)
    point_ptr,  # (N, M) where the gradient is taken
    codes_ptr,  # (N, M) with MOMENTUM, in place
    out_ptr,  # (N, M) the next point; without momentum, the codes
    rows,
    atoms,
    inner,
    beta,
    GRAM: tl.constexpr,
    MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    atom = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    left_row, matrix_row = left_ptr + row * inner, matrix_ptr + atom * inner
    product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(
            left_row[:, None] + k[None, :],
            mask=(row < rows)[:, None] & (k < inner)[None, :],
            other=0.0,
        )
        right = tl.load(
            matrix_row[None, :] + k[:, None],
            mask=(atom < atoms)[None, :] & (k < inner)[:, None],
            other=0.0,
        )
        product = tl.dot(left, right, product, input_precision=PRECISION)

    mask = (row < rows)[:, None] & (atom < atoms)[None, :]
    element = row[:, None] * atoms + atom[None, :]
    if GRAM:
        product = tl.load(correlation_ptr + element, mask=mask, other=0.0) - product
    step = tl.load(step_ptr)
    threshold = (step * tl.load(l1_ptr + row, mask=row < rows, other=0.0))[:, None]
    new = _shrink(tl.load(point_ptr + element, mask=mask, other=0.0) + step * product, threshold)
    if MOMENTUM:
        old = tl.load(codes_ptr + element, mask=mask, other=0.0)
        tl.debug_barrier()  # as above
        tl.store(codes_ptr + element, new, mask=mask)
        new += beta * (new - old)
    tl.store(out_ptr + element, new, mask=mask)


@triton.jit
def _judge(
    row,  # (BLOCK_N,) int64
    product_ptr, correlation_ptr, weights_ptr, l1_ptr, energy_ptr, target_ptr, lowest_ptr, highest_ptr, codes_ptr,
    codes_correlation_ptr, point_ptr, point_correlation_ptr, proposal_ptr, curvature_ptr, momentum_ptr, refused_ptr,
    iterations_ptr, status_ptr,
    rows, atoms, iteration, l2,
    GRAM: tl.constexpr, POSITIVE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Judge the proposals of some rows, and make their next ones; the pointers are those of the kernel below."""
    running = tl.load(status_ptr + row, mask=row < rows, other=0) != 0
    l1 = tl.load(l1_ptr + row, mask=running, other=0.0)
    # No pass over samples which have all finished.
    end = tl.max(running.to(tl.int32), axis=0) * atoms

    # Sums over the atoms; the correlations here are without l2, which the sums then get.
    move_square = tl.zeros((BLOCK_N,), tl.float32)  # |P - Y|^2
    move_curvature = tl.zeros((BLOCK_N,), tl.float32)  # <P - Y, (P - Y) G>
    turn = tl.zeros((BLOCK_N,), tl.float32)  # <P - Y, P - H>
    square = tl.zeros((BLOCK_N,), tl.float32)  # |P|^2
    fit = tl.zeros((BLOCK_N,), tl.float32)  # <P, B + C at P>
    largest = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, end, BLOCK_M):
        atom = start + tl.arange(0, BLOCK_M)
        mask = running[:, None] & (atom < atoms)[None, :]
        element = row[:, None] * atoms + atom[None, :]
        correlation = tl.load(correlation_ptr + element, mask=mask, other=0.0)
        proposed = tl.load(product_ptr + element, mask=mask, other=0.0)
        if GRAM:
            proposed = correlation - proposed
        proposal = tl.load(proposal_ptr + element, mask=mask, other=0.0)
        move = proposal - tl.load(point_ptr + element, mask=mask, other=0.0)
        change = tl.load(point_correlation_ptr + element, mask=mask, other=0.0) - proposed
        progress = proposal - tl.load(codes_ptr + element, mask=mask, other=0.0)
        move_square += tl.sum(move * move, axis=1)
        move_curvature += tl.sum(move * change, axis=1)
        turn += tl.sum(move * progress, axis=1)
        square += tl.sum(proposal * proposal, axis=1)
        fit += tl.sum(proposal * (correlation + proposed), axis=1)
        dual = proposed - l2 * proposal
        if POSITIVE == 0:
            dual = tl.abs(dual)
        weight = tl.load(weights_ptr + atom, mask=atom < atoms, other=1.0)
        largest = tl.maximum(largest, tl.max(dual / weight[None, :], axis=1))
    move_curvature += l2 * move_square

    lowest = tl.load(lowest_ptr)
    highest = tl.load(highest_ptr)
    curvature = tl.load(curvature_ptr + row, mask=running, other=1.0)
    refused = tl.load(refused_ptr + row, mask=running, other=0)
    # At the upper bound a proposal holds, whatever rounding makes of a small move.
    held = (move_curvature <= 1.00001 * curvature * move_square) | (curvature >= highest)
    lower = tl.where(refused < 32, tl.maximum(0.9 * curvature, lowest), curvature)
    higher = tl.maximum(2.0 * curvature, 1.2 * move_curvature / tl.maximum(move_square, 1e-30))
    next_curvature = tl.where(held, lower, tl.minimum(higher, highest))
    t = tl.load(momentum_ptr + row, mask=running, other=1.0)
    restarted = tl.where(turn < 0.0, 1.0, t)
    t_next = 0.5 + tl.sqrt(0.25 + restarted * restarted)
    beta = ((restarted - 1.0) / t_next)[:, None]
    scale = tl.where(largest > l1, l1 / tl.maximum(largest, 1e-30), 1.0)

    tl.debug_barrier()  # what follows overwrites what other threads have just read
    accept = (running & held)[:, None]
    rate = (1.0 / next_curvature)[:, None]
    penalty = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, end, BLOCK_M):
        atom = start + tl.arange(0, BLOCK_M)
        inside = (atom < atoms)[None, :]
        mask, accept_mask = running[:, None] & inside, accept & inside
        element = row[:, None] * atoms + atom[None, :]
        proposed = tl.load(product_ptr + element, mask=mask, other=0.0)
        if GRAM:
            proposed = tl.load(correlation_ptr + element, mask=mask, other=0.0) - proposed
        proposal = tl.load(proposal_ptr + element, mask=mask, other=0.0)
        weight = tl.load(weights_ptr + atom, mask=atom < atoms, other=1.0)[None, :]
        threshold = l1[:, None] * weight
        term = threshold * tl.abs(proposal) - scale[:, None] * (proposed - l2 * proposal) * proposal
        penalty += tl.sum(tl.maximum(term, 0.0), axis=1)

        old = tl.load(codes_ptr + element, mask=accept_mask, other=0.0)
        old_correlation = tl.load(codes_correlation_ptr + element, mask=accept_mask, other=0.0)
        point = tl.load(point_ptr + element, mask=mask, other=0.0)
        point = tl.where(accept, proposal + beta * (proposal - old), point)
        point_correlation = tl.load(point_correlation_ptr + element, mask=mask, other=0.0)
        extrapolated = proposed + beta * (proposed - old_correlation)
        point_correlation = tl.where(accept, extrapolated, point_correlation)
        tl.debug_barrier()
        tl.store(codes_ptr + element, proposal, mask=accept_mask)
        tl.store(codes_correlation_ptr + element, proposed, mask=accept_mask)
        tl.store(point_ptr + element, point, mask=accept_mask)
        tl.store(point_correlation_ptr + element, point_correlation, mask=accept_mask)

        forward = point + rate * (point_correlation - l2 * point)
        proposal = tl.maximum(forward - rate * threshold, 0.0) if POSITIVE else _shrink(forward, rate * threshold)
        tl.store(proposal_ptr + element, proposal, mask=mask)

    # |x - P A|^2 + l2 |P|^2
    energy = tl.load(energy_ptr + row, mask=running, other=0.0) - fit + l2 * square
    gap = 0.5 * (1.0 - scale) * (1.0 - scale) * tl.maximum(energy, 0.0) + penalty
    finished = held & (gap <= tl.load(target_ptr + row, mask=running, other=0.0))
    tl.store(curvature_ptr + row, next_curvature, mask=running)
    tl.store(momentum_ptr + row, t_next, mask=running & held)
    tl.store(refused_ptr + row, refused + 1, mask=running & (held == 0))
    tl.store(iterations_ptr + row, tl.zeros((BLOCK_N,), tl.int64) + iteration, mask=running)
    tl.store(status_ptr + row, tl.zeros((BLOCK_N,), tl.int8), mask=running & finished)


@triton.jit(do_not_specialize=["rows", "iteration", "l2"])
def _sparse_fista_kernel(
    product_ptr,  # (N, M), of the proposal: H G (GRAM), or its correlations themselves
    correlation_ptr,  # (N, M) B = x A^T
    weights_ptr,  # (M,)
    l1_ptr,  # (N,)
    energy_ptr,  # (N,) |x|^2
    target_ptr,  # (N,) the gap to reach
    lowest_ptr,  # (1,) curvature
    highest_ptr,  # (1,)
    codes_ptr,  # (N, M), and all that follow in place
    codes_correlation_ptr,  # (N, M)
    point_ptr,  # (N, M)
    point_correlation_ptr,  # (N, M)
    proposal_ptr,  # (N, M)
    curvature_ptr,  # (N,)
    momentum_ptr,  # (N,)
    refused_ptr,  # (N,) int32
    iterations_ptr,  # (N,) int64
    status_ptr,  # (N,) int8
    rows,
    atoms,
    iteration,
    l2,
    GRAM: tl.constexpr,
    POSITIVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    _judge(
        row,
        product_ptr, correlation_ptr, weights_ptr, l1_ptr, energy_ptr, target_ptr, lowest_ptr, highest_ptr, codes_ptr,
        codes_correlation_ptr, point_ptr, point_correlation_ptr, proposal_ptr, curvature_ptr, momentum_ptr,
        refused_ptr, iterations_ptr, status_ptr, rows, atoms, iteration, l2, GRAM, POSITIVE, BLOCK_N, BLOCK_M,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "first", "count", "l2"])
def _sparse_fista_chip_kernel(
    x_ptr,  # (N, D)
    dictionary_ptr,  # (M, D)
    product_ptr,  # (N, M), made here
    correlation_ptr,  # (N, M) B = x A^T
    weights_ptr,  # (M,)
    l1_ptr,  # (N,)
    energy_ptr,  # (N,) |x|^2
    target_ptr,  # (N,) the gap to reach
    lowest_ptr,  # (1,) curvature
    highest_ptr,  # (1,)
    codes_ptr,  # (N, M), and all that follow in place
    codes_correlation_ptr,  # (N, M)
    point_ptr,  # (N, M)
    point_correlation_ptr,  # (N, M)
    proposal_ptr,  # (N, M)
    curvature_ptr,  # (N,)
    momentum_ptr,  # (N,)
    refused_ptr,  # (N,) int32
    iterations_ptr,  # (N,) int64
    status_ptr,  # (N,) int8
    rows,
    features,
    atoms,
    first,
    count,
    l2,
    POSITIVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None]
    x_mask = inside & (feature < features)[None, :]
    x = tl.load(x_ptr + row[:, None] * features + feature[None, :], mask=x_mask, other=0.0)
    for k in range(count):
        running = tl.load(status_ptr + row, mask=row < rows, other=0) != 0
        end = tl.max(running.to(tl.int32), axis=0) * atoms
        residual = x
        for start in range(0, end, BLOCK_M):
            atom = start + tl.arange(0, BLOCK_M)
            block_mask = (atom < atoms)[:, None] & (feature < features)[None, :]
            block = tl.load(
                dictionary_ptr + atom[:, None] * features + feature[None, :], mask=block_mask, other=0.0
            )  # fmt: skip
            element, mask = row[:, None] * atoms + atom[None, :], inside & (atom < atoms)[None, :]
            proposal = tl.load(proposal_ptr + element, mask=mask, other=0.0)
            residual = tl.dot(-proposal, block, residual, input_precision="ieee")
        for start in range(0, end, BLOCK_M):
            atom = start + tl.arange(0, BLOCK_M)
            block_mask = (atom < atoms)[:, None] & (feature < features)[None, :]
            block = tl.load(
                dictionary_ptr + atom[:, None] * features + feature[None, :], mask=block_mask, other=0.0
            )  # fmt: skip
            element, mask = row[:, None] * atoms + atom[None, :], inside & (atom < atoms)[None, :]
            product = tl.dot(residual, tl.trans(block), input_precision="ieee")
            tl.store(product_ptr + element, product, mask=mask)
        # What one thread has stored another may load.
        tl.debug_barrier()
        _judge(
            row,
            product_ptr, correlation_ptr, weights_ptr, l1_ptr, energy_ptr, target_ptr, lowest_ptr, highest_ptr,
            codes_ptr, codes_correlation_ptr, point_ptr, point_correlation_ptr, proposal_ptr, curvature_ptr,
            momentum_ptr, refused_ptr, iterations_ptr, status_ptr, rows, atoms, first + k, l2,
            0, POSITIVE, BLOCK_N, BLOCK_M,
        )  # fmt: skip
        tl.debug_barrier()
