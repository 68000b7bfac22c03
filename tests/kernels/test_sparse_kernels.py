"""Sparse coding kernels against plain ISTA, FISTA, the optimality conditions and the duality gap in float64."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastvae.kernels import sparse

SHAPES = [(1, 1, 1), (7, 33, 65), (17, 40, 33), (3, 7, 257)]  # samples, features, atoms
ROUNDING = 3e-6  # gap, relative to |x|^2, that float32 may add or miss


def _operands(samples: int, features: int, atoms: int, level: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, unit atoms and an l1 of each sample: `level`, more or less, of the one that gives zero codes."""
    torch.manual_seed(0)
    x, dictionary = torch.randn(samples, features), torch.randn(atoms, features)
    dictionary /= dictionary.norm(dim=1, keepdim=True)
    l1 = level * (0.5 + torch.rand(samples)) * (x @ dictionary.T).abs().amax(1)
    return x, dictionary, l1


def _shrink(x: Tensor, threshold: Tensor, positive: bool = False) -> Tensor:
    shrunk = torch.relu(x - threshold)
    return shrunk if positive else shrunk - torch.relu(-x - threshold)


def _iterate(x: Tensor, dictionary: Tensor, l1: Tensor, step: Tensor, init: Tensor | None, max_iter: int,
             momentum: bool) -> Tensor:  # fmt: skip
    h = y = x.new_zeros(x.shape[0], dictionary.shape[0]) if init is None else init
    t = 1.0
    for _ in range(max_iter):
        new = _shrink(y - step * ((y @ dictionary - x) @ dictionary.T), step * l1[:, None])
        t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
        y = new + (t - 1) / t_next * (new - h) if momentum else new
        h, t = new, t_next
    return h


class _Lasso:
    """A problem in float64: what a solution must satisfy."""

    def __init__(self, x: Tensor, dictionary: Tensor, l1: Tensor, l2: float = 0.0, weights: Tensor | None = None,
                 positive: bool = False) -> None:  # fmt: skip
        self.x, self.dictionary, self.l1 = x.double(), dictionary.double(), l1.double()[:, None]
        self.weights = (torch.ones(len(dictionary)) if weights is None else weights).double()
        self.l2, self.positive = l2, positive
        self.arguments = (x, dictionary, l1, l2, weights, positive)
        self.energy = self.x.square().sum(1)

    def solve(self, tol: float, max_iter: int = 300, init: Tensor | None = None, device: str = "cpu") -> list[Tensor]:
        """The kernels' codes, gap, iterations and status."""
        tensors = [t.to(device) if isinstance(t, Tensor) else t for t in (*self.arguments, init)]
        return [t.cpu() for t in sparse.fista_solve(*tensors, tol, max_iter)]

    def exact(self) -> Tensor:
        """Codes by many iterations of plain FISTA."""
        largest = torch.linalg.matrix_norm(self.dictionary, 2) ** 2 + self.l2 + 1e-9
        h = y = torch.zeros(len(self.x), len(self.dictionary), dtype=torch.float64)
        for k in range(3000):
            new = _shrink(y + self.correlation(y) / largest, self.l1 * self.weights / largest, self.positive)
            y, h = new + k / (k + 3) * (new - h), new
        return h

    def correlation(self, h: Tensor) -> Tensor:
        return (self.x - h @ self.dictionary) @ self.dictionary.T - self.l2 * h

    def objective(self, h: Tensor) -> Tensor:
        fit = (self.x - h @ self.dictionary).square().sum(1) + self.l2 * h.square().sum(1)
        return fit / 2 + (self.l1 * self.weights * h.abs()).sum(1)

    def relative_gap(self, h: Tensor) -> Tensor:
        """Objective minus that of the dual at the scaled residual, over |x|^2."""
        c = self.correlation(h)
        largest = ((c if self.positive else c.abs()) / self.weights).amax(1, keepdim=True)
        scale = torch.where(largest > self.l1, self.l1 / largest, 1.0)
        # With l2 the problem is a lasso over the atoms [A, sqrt(l2) I], whose x is [x, 0].
        dual = scale * (self.x - h @ self.dictionary)
        dual_square = dual.square().sum(1) + self.l2 * (scale * h).square().sum(1)
        return (self.objective(h) - (dual * self.x).sum(1) + dual_square / 2) / self.energy.clamp_min(1e-30)

    def check(self, solution: list[Tensor], tol: float) -> None:
        """All solved, to what is claimed."""
        codes, gap, iterations, status = solution
        h, best = codes.double(), self.exact()
        assert (status == 0).all()
        assert status.dtype == torch.int8
        assert iterations.dtype == torch.int64
        assert (iterations >= 0).all()
        assert (gap <= tol).all()
        torch.testing.assert_close(gap.double(), self.relative_gap(h), rtol=1e-3, atol=ROUNDING)
        excess = self.objective(h) - self.objective(best)
        assert (excess <= (tol + ROUNDING) * self.energy).all()
        if self.positive:
            assert (h >= 0).all()
        # The optimality conditions, from the gap: |c - c_best|^2 / 2 <= gap for unit atoms at most.
        reach = self.dictionary.norm(dim=1).max() + math.sqrt(self.l2)
        slack = reach * (2 * (tol + ROUNDING) * self.energy[:, None]).sqrt()
        c, bound = self.correlation(h), self.l1 * self.weights
        outside = c if self.positive else c.abs()
        assert (outside <= bound + slack).all()
        support = best.abs() > 0
        assert ((c - bound * best.sign()).abs()[support] <= slack.expand_as(c)[support]).all()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("on_chip", [True, False])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ista_matches_float64(shape: tuple[int, int, int], momentum: bool, on_chip: bool, device: str,
                              monkeypatch: pytest.MonkeyPatch, assert_within_budget: Callable) -> None:  # fmt: skip
    if not on_chip:
        monkeypatch.setattr(sparse, "_ON_CHIP_NUMBERS", 0)
    x, dictionary, l1 = _operands(*shape, level=0.1)
    step = 0.9 / torch.linalg.matrix_norm(dictionary, 2).square().reshape(1)
    for init in (None, 0.1 * torch.randn(shape[0], shape[2])):
        operands = [t if t is None else t.to(device) for t in (x, dictionary, l1, step, init)]
        codes = sparse.ista(*operands, 4, momentum)
        if init is not None:
            assert torch.equal(operands[4].cpu(), init)
        plain = [_iterate(*(t if t is None else t.to(dtype) for t in (x, dictionary, l1, step, init)), 4, momentum)
                 for dtype in (torch.float64, torch.float32)]  # fmt: skip
        assert_within_budget("codes", codes.cpu(), *plain)
        assert (codes == 0).any() == (plain[0] == 0).any()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("max_iter", [0, 1, 2])
def test_few_iterations(max_iter: int, device: str) -> None:
    x, dictionary, l1 = (t.to(device) for t in _operands(7, 5, 3))
    step, init = torch.full((1,), 0.3, device=device), torch.randn(7, 3).to(device)
    codes = sparse.ista(x, dictionary, l1, step, init, max_iter, True)
    torch.testing.assert_close(codes, _iterate(x, dictionary, l1, step, init, max_iter, True))
    assert codes.data_ptr() != init.data_ptr()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 5, 0), (4, 0, 3)], ids=str)
def test_no_elements(shape: tuple[int, int, int], device: str) -> None:
    samples, features, atoms = shape
    x, dictionary = torch.zeros(samples, features, device=device), torch.zeros(atoms, features, device=device)
    l1 = torch.ones(samples, device=device)
    assert torch.equal(sparse.ista(x, dictionary, l1, l1.new_ones(1), None, 4, True), x.new_zeros(samples, atoms))
    codes, gap, iterations, status = sparse.fista_solve(x, dictionary, l1, 0.0, None, False, None, 1e-4, 20)
    assert torch.equal(codes, x.new_zeros(samples, atoms))
    assert all(t.shape == (samples,) and (t == 0).all() for t in (gap, iterations, status))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("on_chip", [True, False])
def test_ista_keeps_nan_to_its_row(on_chip: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not on_chip:
        monkeypatch.setattr(sparse, "_ON_CHIP_NUMBERS", 0)
    x, dictionary, l1 = _operands(7, 5, 3)
    x[2, 1] = float("nan")
    operands = [t.to(device) for t in (x, dictionary, l1, torch.full((1,), 0.3))]
    codes = sparse.ista(*operands, None, 4, True)
    assert codes.isnan().all(1).tolist() == codes.isnan().any(1).tolist() == [row == 2 for row in range(7)]


def test_ista_step_addresses_beyond_32_bits(tmp_path: Path, device: str) -> None:
    if device == "cuda":
        pytest.skip("9 GB; here a sparse file holds them")
    samples, atoms = 66, 2**25 + 1
    assert (samples - 1) * atoms > 2**31
    file = torch.from_file(str(tmp_path / "codes"), shared=True, size=samples * atoms)
    codes, rows = file.view(samples, atoms), slice(64, 66)
    codes[rows, :64] = torch.randn(2, 64)
    residual, dictionary, l1 = torch.randn(samples, 1), torch.randn(64, 1), torch.rand(samples)
    expected = _shrink(codes[rows, :64] + residual[rows] * dictionary.T, l1[rows, None])
    sparse._sparse_ista_step_kernel[(2, 1)](
        residual, dictionary, residual, l1, torch.ones(1), codes, codes, codes, samples, atoms, 1, 0.0,
        GRAM=0, MOMENTUM=0, PRECISION="ieee", BLOCK_N=64, BLOCK_M=64, BLOCK_K=16,
    )  # fmt: skip
    torch.testing.assert_close(codes[rows, :64], expected)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("on_chip", [True, False])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("regular", [False, True], ids=["lasso", "weights and l2"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 9, 33), (7, 20, 16)], ids=str)
def test_solver_is_certified(shape: tuple[int, int, int], regular: bool, positive: bool, on_chip: bool, device: str,
                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    if not on_chip:
        monkeypatch.setattr(sparse, "_ON_CHIP_NUMBERS", 0)
    operands = _operands(*shape, level=0.4)
    more = (0.3, 0.5 + torch.rand(shape[2])) if regular else (0.0, None)
    problem = _Lasso(*operands, *more, positive)
    problem.check(problem.solve(1e-4, device=device), 1e-4)


@pytest.mark.usefixtures("poison")
def test_on_chip_the_iterates_are_those_of_single_steps(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _Lasso(*_operands(17, 5, 65, level=0.7), 0.1, 0.5 + torch.rand(65))  # two blocks of samples and of atoms
    launches, advance = [], sparse._advance_on_chip
    monkeypatch.setattr(sparse, "_advance_on_chip", lambda *args: (launches.append(args[2:]), advance(*args)))
    on_chip = problem.solve(1e-6, 12, device=device)
    assert launches == [(0, 11), (11, 2)]
    monkeypatch.setattr(sparse, "_ON_CHIP_NUMBERS", 0)
    single = problem.solve(1e-6, 12, device=device)
    torch.testing.assert_close(on_chip[0], single[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(on_chip[2], single[2])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("positive", [False, True])
def test_solver_walks_rows_in_tiles(positive: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_ON_CHIP_NUMBERS", 0)
    problem = _Lasso(*_operands(1, 17, 257, level=0.6), 0.1, 0.5 + torch.rand(257), positive)
    whole = problem.solve(1e-3, device=device)
    monkeypatch.setattr(sparse, "_ROW_TILE", 128)
    tiles = problem.solve(1e-3, device=device)
    problem.check(whole, 1e-3)
    problem.check(tiles, 1e-3)
    torch.testing.assert_close(whole[0], tiles[0], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("poison")
def test_solver_reaches_the_floor_of_float32(device: str) -> None:
    problem = _Lasso(*_operands(3, 9, 16, level=0.2))
    problem.check(problem.solve(ROUNDING, device=device), ROUNDING)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("positive", [False, True])
def test_from_lambda_max_on_codes_are_zero_at_once(positive: bool, device: str) -> None:
    x, dictionary, _ = _operands(7, 9, 33)
    correlation = x @ dictionary.T
    l1 = 1.0001 * (correlation if positive else correlation.abs()).amax(1)
    codes, gap, iterations, status = _Lasso(x, dictionary, l1, positive=positive).solve(1e-4, device=device)
    assert all((t == 0).all() for t in (codes, gap, iterations, status))


@pytest.mark.usefixtures("poison")
def test_zero_samples_zero_atoms_and_twins(device: str) -> None:
    x, dictionary, l1 = _operands(7, 9, 12, level=0.4)
    x[3], dictionary[5], dictionary[7] = 0, 0, dictionary[8]
    l1[3] = 0.1
    problem = _Lasso(x, dictionary, l1)
    solution = problem.solve(1e-4, device=device)
    problem.check(solution, 1e-4)
    assert (solution[0][3] == 0).all()
    assert (solution[0][:, 5] == 0).all()
    assert solution[1][3] == solution[2][3] == 0
    twins = solution[0][:, 7:9]
    torch.testing.assert_close(twins[:, 0], twins[:, 1], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("poison")
def test_a_dictionary_of_zeros(device: str) -> None:
    x, l1 = torch.randn(3, 9), torch.ones(3)
    for init in (None, torch.randn(3, 5)):
        codes, gap, _, status = _Lasso(x, torch.zeros(5, 9), l1).solve(1e-4, init=init, device=device)
        assert all((t == 0).all() for t in (codes, gap, status))


@pytest.mark.usefixtures("poison")
def test_warm_start(device: str) -> None:
    problem = _Lasso(*_operands(7, 9, 7, level=0.5))
    best = problem.exact().float()
    given = best.clone()
    codes, _, iterations, status = problem.solve(1e-4, init=given, device=device)
    assert (iterations == 0).all()
    assert (status == 0).all()
    assert torch.equal(codes, best)
    assert torch.equal(given, best)
    problem.check(problem.solve(1e-4, init=best + torch.randn(best.shape), device=device), 1e-4)
    positive = _Lasso(*problem.arguments[:3], positive=True)
    positive.check(positive.solve(1e-4, init=-best, device=device), 1e-4)


@pytest.mark.usefixtures("poison")
def test_each_step_is_within_its_curvature(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_ON_CHIP_NUMBERS", 0)
    x, dictionary, l1 = _operands(3, 9, 33, level=0.2)
    hessian = dictionary.double() @ dictionary.double().T + 0.5 * torch.eye(33)
    steps, refusals, advance = [], [], sparse._advance

    def record(problem: sparse._Problem, state: sparse._State, i: int) -> None:
        move = (state.proposal - state.point).cpu().double()
        curvature, refused, running = state.curvature.cpu().clone(), state.refused.clone(), state.status.cpu() != 0
        advance(problem, state, i)
        steep = (move @ hessian * move).sum(1) / move.square().sum(1).clamp_min(1e-30)
        was_refused = (state.refused != refused).cpu()
        steps.append((steep, curvature, was_refused))
        lower, held = torch.maximum(0.9 * curvature, problem.lowest.cpu()), running & ~was_refused
        torch.testing.assert_close(state.curvature.cpu()[held], lower[held])
        assert (state.curvature <= problem.highest).all()
        assert (state.curvature >= problem.lowest).all()
        # The gradient at the momentum point, which no product has made.
        point, samples = state.point.cpu().double(), x[state.index.cpu()].double()
        exact = (samples - point @ dictionary.double()) @ dictionary.double().T
        torch.testing.assert_close(state.point_correlation.cpu().double(), exact, rtol=1e-5, atol=1e-5)

    monkeypatch.setattr(sparse, "_advance", record)
    _Lasso(x, dictionary, l1, 0.5).solve(1e-3, 20, device=device)
    for steep, curvature, refused in steps[:10]:  # before anyone leaves
        assert (steep <= 1.001 * curvature)[~refused].all()
        assert (steep >= 0.999 * curvature)[refused].all()
        refusals.append(refused)
    assert torch.stack(refusals).any()


def test_at_the_upper_bound_nothing_is_refused(device: str) -> None:
    x, dictionary, l1 = (t.to(device) for t in _operands(3, 9, 33, level=0.2))
    problem = sparse._Problem.of(dictionary, x.new_ones(33), 0.0, False)
    refused = []
    for case in (problem, problem._replace(highest=problem.lowest)):
        state = sparse._start(case, x, l1, None, 1e-4)
        for i in range(6):
            sparse._advance(case, state, i)
        refused.append(state.refused.sum().item())
    assert refused[0] > 0
    assert refused[1] == 0


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("max_iter", [0, 3])
def test_max_iter_is_flagged(max_iter: int, device: str) -> None:
    problem = _Lasso(*_operands(7, 9, 33, level=0.1))
    problem.l1[4] = problem.arguments[2][4] = 100  # zero codes
    codes, gap, iterations, status = problem.solve(1e-5, max_iter, device=device)
    assert status.tolist() == [int(row != 4) for row in range(7)]
    assert iterations.tolist() == [max_iter * int(row != 4) for row in range(7)]
    torch.testing.assert_close(gap.double(), problem.relative_gap(codes.double()), rtol=1e-4, atol=ROUNDING)
    assert (gap[status == 1] > 1e-5).all()


@pytest.mark.usefixtures("poison")
def test_samples_leave_when_done_and_land_in_their_place(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_ON_CHIP_NUMBERS", 0)
    x, dictionary, l1 = _operands(9, 12, 33)
    l1 *= torch.logspace(-0.2, 0.6, 9)  # from hard to nothing to do
    problem = _Lasso(x, dictionary, l1)
    sizes = []
    advance = sparse._advance
    monkeypatch.setattr(sparse, "_advance", lambda p, state, i: (sizes.append(len(state.x)), advance(p, state, i)))
    together = problem.solve(1e-3, device=device)
    problem.check(together, 1e-3)
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1
    assert len(set(together[2].tolist())) > 3
    apart = _Lasso(x[4:5], dictionary, l1[4:5]).solve(1e-3, device=device)
    torch.testing.assert_close(apart[0], together[0][4:5], rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(sparse, "_SOLVE_NUMBERS", 6 * 33)  # six samples at a time
    problem.check(problem.solve(1e-3, device=device), 1e-3)


@pytest.mark.usefixtures("poison")
def test_a_wrong_gradient_is_not_certified(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_ON_CHIP_NUMBERS", 0)
    problem, multiply = _Lasso(*_operands(3, 9, 12)), sparse._Problem.multiply
    monkeypatch.setattr(sparse._Problem, "multiply", lambda self, codes, x: 1.02 * multiply(self, codes, x))
    codes, gap, iterations, status = problem.solve(1e-5, 35, device=device)
    assert (status == 1).all()
    assert (iterations > 10).all()
    torch.testing.assert_close(gap.double(), problem.relative_gap(codes.double()), rtol=1e-3, atol=ROUNDING)


@pytest.mark.usefixtures("poison")
def test_nan_is_never_certified(device: str) -> None:
    problem = _Lasso(*_operands(5, 9, 12, level=0.5))
    problem.x[2, 3] = problem.arguments[0][2, 3] = float("nan")
    _, gap, _, status = problem.solve(1e-3, 40, device=device)
    assert status.tolist() == [0, 0, 1, 0, 0]
    assert gap.isnan().tolist() == [row == 2 for row in range(5)]


def test_host_waits_every_ten_iterations_at_most(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_ON_CHIP_NUMBERS", 0)
    at, iteration = [], [0]
    nonzero, advance = Tensor.nonzero, sparse._advance

    def count(problem: object, state: object, i: int) -> None:
        iteration[0] = i
        advance(problem, state, i)

    monkeypatch.setattr(sparse, "_advance", count)
    monkeypatch.setattr(Tensor, "nonzero", lambda self: (at.append(iteration[0]), nonzero(self))[1])
    problem = _Lasso(*_operands(2, 9, 33, level=0.1))
    problem.solve(1e-5, 32, device=device)
    assert set(at) == {10, 20, 30}


def test_far_fewer_iterations_than_plain_fista(device: str) -> None:
    torch.manual_seed(0)
    dictionary = torch.randn(24, 8) + 1.5  # coherent, as learned atoms are
    dictionary /= dictionary.norm(dim=1, keepdim=True)
    x = torch.randn(4, 8)
    l1 = 0.4 * (x @ dictionary.T).abs().amax(1)
    problem = _Lasso(x, dictionary, l1)
    _, _, iterations, status = problem.solve(1e-3, device=device)
    assert (status == 0).all()
    step = 1 / torch.linalg.matrix_norm(dictionary, 2).square().double()
    plain = _iterate(x.double(), dictionary.double(), l1.double(), step, None, 2 * int(iterations.max()), True)
    assert (problem.relative_gap(plain) > 1e-3).any()


def test_products_are_ieee_float32_and_the_setting_comes_back(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matmul, seen = torch.backends.cuda.matmul, []
    solve = sparse._solve
    monkeypatch.setattr(sparse, "_solve", lambda *args: (seen.append(matmul.fp32_precision), solve(*args)))
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        _Lasso(*_operands(2, 3, 2)).solve(1e-3, device=device)
        assert seen == ["ieee"]
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (33, 7), (257, 20)], ids=str)
def test_bound_of_the_largest_eigenvalue(shape: tuple[int, int], device: str) -> None:
    torch.manual_seed(0)
    dictionary = torch.rand(shape)
    problem = sparse._Problem.of(dictionary.to(device), torch.ones(shape[0], device=device), 0.0, False)
    exact = torch.linalg.matrix_norm(dictionary.double(), 2).square().item()
    assert exact <= problem.highest.item() <= 1.1 * exact
    assert problem.lowest.item() == pytest.approx(dictionary.square().sum(1).max().item())


def test_repeats_bit_for_bit(device: str) -> None:
    problem = _Lasso(*_operands(7, 9, 7, level=0.5))
    for first, second in zip(problem.solve(1e-3, device=device), problem.solve(1e-3, device=device), strict=True):
        assert torch.equal(first, second)


def test_other_types_are_refused(device: str) -> None:
    x = torch.zeros(2, 3, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match=r"^x: expected float32, got torch\.float64$"):
        sparse.ista(x, x, x[:, 0], x[0, :1], None, 3, False)
    with pytest.raises(TypeError, match=r"^x: expected float32, got torch\.float64$"):
        sparse.fista_solve(x, x, x[:, 0], 0.0, None, False, None, 1e-4, 10)
