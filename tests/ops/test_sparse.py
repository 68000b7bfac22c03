"""Sparse coding against its definition, scikit-learn, exact optimality conditions and finite differences."""

import functools
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from fastvae.functional import (
    duality_gap,
    fista,
    ista,
    ista_step,
    kkt_violation,
    lambda_max,
    soft_threshold,
    sparse_encode,
    sparse_value,
)
from fastvae.ops import sparse
from fastvae.ops.backend import CORE

SHAPES = [(1, 1, 1), (1, 7, 1), (7, 1, 33), (33, 7, 13), (13, 33, 257), (7, 257, 33)]  # samples, features, atoms
OPTIONS = {
    "plain": {},
    "elastic": {"l2": 0.3},
    "positive": {"positive": True},
    "weights": {"weights": True},
    "all": {"l2": 0.1, "positive": True, "weights": True},
}
solvers = pytest.mark.parametrize("solver", ["cd", "fista"])


def problem(samples, features, atoms, dtype=torch.float64, seed=0, **options):
    random = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(atoms, features, generator=random, dtype=torch.float64)
    dictionary /= dictionary.norm(dim=1, keepdim=True)
    x = torch.randn(samples, features, generator=random, dtype=torch.float64)
    x /= x.norm(dim=1, keepdim=True)
    if options.get("weights"):
        options["weights"] = 0.5 + torch.rand(atoms, generator=random, dtype=torch.float64)
    return x.to(dtype), dictionary.to(dtype), options


@pytest.fixture(autouse=True)
def core_or_reference(request):
    if CORE is None and "cd" in request.node.name:
        pytest.skip("the C++ core is not built")


@solvers
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_solution_is_exact(shape, options, solver, poison):
    x, dictionary, options = problem(*shape, **options)
    l1 = torch.linspace(0.05, 0.3, shape[0], dtype=torch.float64)
    tol = 1e-12 if solver == "cd" else 1e-9
    codes, info = sparse_encode(x, dictionary, l1, solver=solver, tol=tol, max_iter=20_000, return_info=True, **options)
    assert (info.status == 0).all()
    assert (kkt_violation(x, dictionary, codes, l1, **options) < tol**0.5 * 5).all()
    gap = duality_gap(x, dictionary, codes, l1, **options)
    assert (gap <= 1.001 * tol).all()
    assert (gap >= 0).all()
    if options.get("positive"):
        assert (codes >= 0).all()


@solvers
@pytest.mark.parametrize("tol", [1e-2, 1e-4, 3e-6])
def test_float32_certificate_holds_in_float64(solver, tol):
    x, dictionary, _ = problem(9, 64, 257, torch.float32)
    codes, info = sparse_encode(x, dictionary, 0.05, solver=solver, tol=tol, max_iter=5000, return_info=True)
    assert (info.status == 0).all()
    exact = duality_gap(x.double(), dictionary.double(), codes.double(), 0.05) / x.double().square().sum(1)
    assert (exact <= tol + 5e-7).all()
    torch.testing.assert_close(info.gap.double(), exact, rtol=1e-2, atol=5e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_reach_their_floor(dtype):
    x, dictionary, _ = problem(33, 64, 257, dtype)
    codes, info = sparse_encode(x, dictionary, 0.1, return_info=True)
    assert codes.dtype == dtype
    assert (info.status == 0).all()
    exact = duality_gap(x.double(), dictionary.double(), codes.double(), 0.1) / x.double().square().sum(1)
    assert (exact <= sparse.GAP_FLOOR[dtype] * 1.01).all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_coordinate_descent_and_fista_agree(options):
    x, dictionary, options = problem(9, 20, 33, **options)
    ours, other = (
        sparse_encode(x, dictionary, 0.1, solver=solver, tol=1e-12, max_iter=20_000, **options)
        for solver in ("cd", "fista")
    )
    torch.testing.assert_close(ours, other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("l1", [0.02, 0.15])
def test_agrees_with_scikit_learn(l1):
    decomposition = pytest.importorskip("sklearn.decomposition")
    x, dictionary, _ = problem(33, 20, 41)
    expected = torch.from_numpy(
        decomposition.sparse_encode(x.numpy(), dictionary.numpy(), algorithm="lasso_lars", alpha=l1)
    )
    codes = sparse_encode(x, dictionary, l1, tol=1e-12)

    def objective(h):
        return 0.5 * (x - h @ dictionary).square().sum(1) + l1 * h.abs().sum(1)

    assert (objective(codes) <= objective(expected) + 1e-12).all()
    torch.testing.assert_close(codes, expected, rtol=0, atol=1e-6)
    assert torch.equal(codes.abs() > 1e-6, expected.abs() > 1e-6)


def test_agrees_with_spams():
    spams = pytest.importorskip("spams")
    x, dictionary, _ = problem(33, 20, 41)
    expected = spams.lasso(x.numpy().T, D=dictionary.numpy().T, lambda1=0.1, mode=2, numThreads=1).T.toarray()
    codes = sparse_encode(x, dictionary, 0.1, tol=1e-12)
    torch.testing.assert_close(codes, torch.from_numpy(expected), rtol=0, atol=1e-6)


@solvers
def test_degenerate_problems(solver):
    x, dictionary, _ = problem(13, 7, 20)
    zero = torch.zeros(2, 7, dtype=torch.float64)
    dictionary = torch.cat([dictionary, dictionary[:3], zero])  # duplicates, and atoms that do nothing
    x = torch.cat([x, zero])
    codes, info = sparse_encode(x, dictionary, 0.05, solver=solver, tol=1e-10, max_iter=20_000, return_info=True)
    assert (info.status == 0).all()
    assert (kkt_violation(x, dictionary, codes, 0.05) < 1e-4).all()
    assert (codes[:, -2:] == 0).all()
    assert (codes[-2:] == 0).all()
    assert (info.gap[-2:] == 0).all()


@solvers
def test_codes_are_zero_from_lambda_max_on(solver):
    x, dictionary, options = problem(13, 7, 20, weights=True)
    highest = lambda_max(x, dictionary, **options)
    assert (sparse_encode(x, dictionary, highest * 1.0001, solver=solver, **options) == 0).all()
    below = sparse_encode(x, dictionary, highest * 0.99, solver=solver, tol=1e-10, **options)
    assert (below != 0).any(1).all()
    none = lambda_max(-dictionary[:1].abs(), dictionary.abs(), positive=True)
    assert (none == 0).all()


@solvers
def test_orthonormal_dictionary_shrinks_the_coefficients(solver):
    x, _, _ = problem(13, 33, 1)
    basis = torch.linalg.qr(torch.randn(33, 33, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    codes = sparse_encode(x, basis, 0.1, solver=solver, tol=1e-12)
    torch.testing.assert_close(codes, soft_threshold(x @ basis.T, 0.1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(0, 7, 13), (3, 7, 0)], ids=str)
def test_nothing_to_do(shape):
    x, dictionary, _ = problem(*shape)
    codes, info = sparse_encode(x, dictionary, 0.1, return_info=True)
    assert codes.shape == (shape[0], shape[2])
    assert info.gap.shape == (shape[0],)
    assert ista(x, dictionary, 0.1).shape == (shape[0], shape[2])


@solvers
def test_starting_at_the_solution_costs_nothing(solver):
    x, dictionary, _ = problem(33, 20, 41)
    codes = sparse_encode(x, dictionary, 0.1, solver=solver, tol=1e-10, max_iter=5000)
    again, info = sparse_encode(x, dictionary, 0.1, solver=solver, tol=1e-9, init=codes, return_info=True)
    assert (info.iterations == 0).all()
    torch.testing.assert_close(again, codes, rtol=0, atol=1e-12)


@solvers
def test_wrong_signs_to_start_from_are_dropped(solver):
    x, dictionary, _ = problem(13, 7, 20)
    settings = {"positive": True, "tol": 1e-10, "solver": solver}
    codes = sparse_encode(x, dictionary, 0.1, init=-torch.ones(13, 20).double(), **settings)
    expected = sparse_encode(x, dictionary, 0.1, **settings)
    torch.testing.assert_close(codes, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", ["cd", "fista", "ista"])
def test_missed_tolerance_is_told_once_and_per_sample(solver):
    x, dictionary, _ = problem(33, 20, 41)
    x[:3] = 0  # solved at once
    with pytest.warns(UserWarning, match=r"30 of 33 samples missed the tolerance, in at most 1 iterations") as record:
        codes, info = sparse_encode(x, dictionary, 0.01, solver=solver, tol=1e-12, max_iter=1, return_info=True)
    assert len(record) == 1
    assert info.status.tolist() == [0] * 3 + [1] * 30
    exact = duality_gap(x, dictionary, codes, 0.01)
    torch.testing.assert_close(info.gap[3:], (exact / x.square().sum(1))[3:], rtol=1e-6, atol=1e-12)


def test_codes_do_not_depend_on_threads_or_neighbours(with_threads):
    x, dictionary, _ = problem(33, 20, 41, torch.float32)
    one, two = (with_threads(n, lambda: sparse_encode(x, dictionary, 0.05)) for n in (1, 2))
    assert torch.equal(one, two)
    torch.testing.assert_close(sparse_encode(x[5:6], dictionary, 0.05), one[5:6], rtol=0, atol=1e-6)


def test_more_atoms_active_than_features():
    dictionary = torch.rand(700, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = dictionary.sum(0)[None] / 50
    codes, info = sparse_encode(x, dictionary, 0.01, l2=5.0, tol=1e-8, return_info=True)
    assert (codes != 0).sum() > 512
    assert info.status.item() == 0
    assert kkt_violation(x, dictionary, codes, 0.01, l2=5.0) < 1e-2


def test_strided_inputs():
    x, dictionary, _ = problem(13, 7, 20)
    expected = sparse_encode(x, dictionary, 0.1)
    assert torch.equal(sparse_encode(x.T.contiguous().T, dictionary.T.contiguous().T, 0.1), expected)
    wide = torch.stack([x, -x], 2)[:, :, 0]
    assert torch.equal(sparse_encode(wide, dictionary, 0.1), expected)


# ------------------------------------------------------------------------------------------------ ISTA, FISTA
@pytest.mark.parametrize("momentum", [False, True], ids=["ista", "fista"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (50, 64, 256)], ids=str)
def test_iterations_are_the_definitions(shape, dtype, momentum, poison):
    x, dictionary, _ = problem(*shape, dtype)
    init = 0.1 * torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(1)).to(dtype)
    step = 0.5 / sparse.lipschitz(dictionary)
    for start in (None, init):
        ours = ista(x, dictionary, 0.1, step=step, max_iter=7, init=start, momentum=momentum)
        h = y = torch.zeros_like(init) if start is None else start
        t = 1.0
        for _ in range(7):
            new = soft_threshold(y + step * (x - y @ dictionary) @ dictionary.T, step * 0.1)
            t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
            h, y, t = new, (new + (t - 1) / t_next * (new - h) if momentum else new), t_next
        torch.testing.assert_close(ours, h, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6)


def test_one_step_is_the_first_iteration():
    x, dictionary, _ = problem(13, 7, 20)
    codes = torch.zeros(13, 20, dtype=torch.float64)
    for _ in range(3):
        codes = ista_step(codes, x, dictionary, 0.1, step=0.2)
    torch.testing.assert_close(codes, ista(x, dictionary, 0.1, step=0.2, max_iter=3), rtol=0, atol=1e-14)


def test_momentum_reaches_the_solution_sooner():
    x, dictionary, _ = problem(33, 20, 41)
    plain, fast = (duality_gap(x, dictionary, f(x, dictionary, 0.05, max_iter=60), 0.05) for f in (ista, fista))
    assert fast.mean() < 0.5 * plain.mean()
    assert torch.equal(fista(x, dictionary, 0.05), ista(x, dictionary, 0.05, momentum=True))


def test_soft_threshold():
    x = torch.tensor([-2.0, -0.5, 0.0, 0.3, 1.5], dtype=torch.float64, requires_grad=True)
    assert soft_threshold(x, 0.5).tolist() == [-1.5, 0.0, 0.0, 0.0, 1.0]
    assert gradcheck(lambda x: soft_threshold(x, 0.4), (x,))
    assert soft_threshold(x.float(), torch.full((5,), 9.0)).tolist() == [0.0] * 5


# -------------------------------------------------------------------------------------------------- gradients
def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


@pytest.mark.parametrize("options", [{}, {"l2": 0.3}, {"positive": True}], ids=str)
def test_implicit_gradient(options):
    x, dictionary, options = problem(3, 5, 7, weights=True, **options)
    weights = leaf(options.pop("weights"))
    l1 = leaf(torch.linspace(0.1, 0.2, 3, dtype=torch.float64))

    def codes(x, dictionary, l1, weights):
        return sparse_encode(x, dictionary, l1, weights=weights, tol=1e-12, max_iter=100_000, **options)

    assert (codes(x, dictionary, l1, weights) != 0).sum() > 3
    assert gradcheck(codes, (leaf(x), leaf(dictionary), l1, weights), eps=1e-5, atol=1e-3, rtol=1e-3)


def test_gradient_of_the_optimal_value():
    x, dictionary, _ = problem(5, 7, 9)
    l1 = leaf(torch.linspace(0.1, 0.2, 5, dtype=torch.float64))

    def value(x, dictionary, l1):
        return sparse_value(x, dictionary, l1, l2=0.1, tol=1e-12)

    assert gradcheck(value, (leaf(x), leaf(dictionary), l1), eps=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [False, True], ids=["ista", "fista"])
@pytest.mark.parametrize("block", [1, 1 << 24])
def test_gradient_through_the_iterations(momentum, block, monkeypatch):
    monkeypatch.setattr(sparse, "_BLOCK_ITERATES", block)
    x, dictionary, _ = problem(5, 7, 9)
    init, l1 = 0.3 * torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), 0.1

    def codes(x, dictionary, init, l1):
        return ista(x, dictionary, l1, init=init, step=0.2, max_iter=6, momentum=momentum)

    inputs = leaf(x), leaf(dictionary), leaf(init), leaf(torch.full((5,), l1, dtype=torch.float64))
    assert gradcheck(codes, inputs, eps=1e-7, atol=1e-5)


def test_gradient_of_duplicated_atoms_is_finite():
    x, dictionary, _ = problem(5, 7, 4)
    twice = leaf(torch.cat([dictionary, dictionary]))
    init = torch.ones(5, 8, dtype=torch.float64)
    codes = sparse_encode(x, twice, 0.01, init=init)
    codes.square().sum().backward()
    assert torch.isfinite(twice.grad).all()


@pytest.mark.parametrize("function", [sparse_encode, sparse_value, ista])
def test_second_derivatives_are_refused(function):
    x, dictionary, _ = problem(5, 7, 9)
    x = leaf(x)
    for power in (1, 2):
        loss = function(x, dictionary, 0.1).pow(power).sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(grad.sum() + x.square().sum(), x)


def test_gradient_of_dependent_atoms_is_that_of_the_core():
    """Duplicates, and supports of more atoms than features: what a GPU's solver gives, whose gradient has no core."""
    x, dictionary, _ = problem(6, 7, 5)
    for atoms, l2 in ((torch.cat([dictionary, dictionary]), 0.0), (problem(1, 7, 40)[1], 0.01)):
        codes = torch.randn(6, len(atoms), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        codes[0] = 0
        codes[1, ::2] = 0
        inputs = codes, x, atoms, torch.full((6,), 0.1, dtype=torch.float64), torch.ones(len(atoms)).double(), l2
        grad = codes.cos() * (codes != 0)
        expected = sparse._encode_backward(grad, *inputs)
        for found, want in zip(sparse.reference_encode_backward(grad, *inputs), expected, strict=True):
            assert torch.isfinite(found).all()
            torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6 * want.abs().max().item())


@pytest.mark.skipif(CORE is None, reason="the C++ core is not built")
def test_what_the_core_misses_is_solved_once_more(recwarn):
    random = torch.Generator().manual_seed(0)
    common = torch.nn.functional.normalize(0.02 * torch.randn(128, 64, generator=random) + 1)  # all but one direction
    x = torch.randn(8, 64, generator=random) + 5
    missed = sparse_encode(x, common, 0.01, solver="cd", return_info=True)[1]
    assert missed.status.any()
    recwarn.clear()
    codes, info = sparse_encode(x, common, 0.01, return_info=True)
    assert not info.status.any()
    assert not recwarn
    exact = duality_gap(x.double(), common.double(), codes.double(), 0.01) / x.double().square().sum(1)
    assert (exact <= 1.01e-4).all()
    assert (info.gap <= missed.gap).all()

    wide = torch.eye(2500)  # more atoms in use than the core's working set holds
    x = torch.randn(2, 2500, generator=random) + 3
    codes, info = sparse_encode(x, wide, 0.01, return_info=True)
    assert not info.status.any()
    torch.testing.assert_close(codes, soft_threshold(x, 0.01), rtol=0, atol=1e-2)


@pytest.mark.parametrize("solver", ["cd", "fista", "ista"])
def test_a_broken_start_is_no_solution_and_spoils_no_neighbour(solver):
    x, dictionary, _ = problem(6, 7, 20, torch.float32)
    init = torch.zeros(6, 20)
    init[1] = torch.nan
    with pytest.raises(ValueError, match="init: expected finite numbers, got nan or inf"):
        sparse_encode(x, dictionary, 0.1, init=init, solver=solver)
    init[1] = 3e38
    with pytest.warns(UserWarning, match="missed the tolerance"):
        codes, info = sparse_encode(x, dictionary, 0.1, init=init, solver=solver, return_info=True)
    others = torch.arange(6) != 1
    alone, certified = sparse_encode(x[others], dictionary, 0.1, init=init[others], solver=solver, return_info=True)
    assert info.status[1] == 1
    torch.testing.assert_close(info.gap[others], certified.gap, rtol=0, atol=1e-6)
    torch.testing.assert_close(codes[others], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", ["omp", "iht"])
def test_pursuits_refuse_nan_and_tell_of_a_moving_support(solver):
    x, dictionary, _ = problem(6, 7, 20)
    _, info = sparse_encode(x, dictionary, solver=solver, n_nonzero=3, max_iter=1, return_info=True)
    assert info.status.tolist() == [int(solver == "iht")] * 6
    assert not sparse_encode(x, dictionary, solver=solver, n_nonzero=3, return_info=True)[1].status.any()
    for name, place in (("x", x), ("dictionary", dictionary)):
        place[2, 3] = torch.nan
        with pytest.raises(ValueError, match=f"{name}: expected finite numbers"):
            sparse_encode(x, dictionary, solver=solver, n_nonzero=3)
        place[2, 3] = 0


def test_one_warning_for_all_blocks_of_a_sparse_output():
    x, dictionary, _ = problem(5000, 3, 4)
    with pytest.warns(UserWarning, match="of 5000 samples missed") as record:
        sparse_encode(x, dictionary, 0.01, tol=1e-12, max_iter=1, solver="fista", sparse_output=True)
    assert len(record) == 1


def test_own_warning_is_of_one_thread():
    x, dictionary, _ = problem(5, 7, 9)
    solve = functools.partial(sparse_encode, x, dictionary, 0.01, solver="fista", max_iter=1)
    with sparse.own_warning(), ThreadPoolExecutor(1) as pool:
        with pytest.warns(UserWarning, match="missed"):
            pool.submit(solve).result()
        with warnings.catch_warnings(action="error"):
            solve()


def test_what_no_code_can_be_and_no_atoms():
    x, dictionary, _ = problem(5, 7, 9)
    codes = torch.zeros(5, 9).double()
    codes[2, 4] = -0.1
    assert duality_gap(x, dictionary, codes, 0.1, positive=True).isinf().tolist() == [False, False, True, False, False]
    assert lambda_max(x, dictionary[:0]).tolist() == [0] * 5


def test_ops_pass_opcheck():
    x, dictionary, _ = problem(5, 7, 9)
    l1, weights = torch.full((5,), 0.1, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
    codes, step = sparse_encode(x, dictionary, 0.1), torch.tensor(0.2, dtype=torch.float64)
    for method in ("cd", "fista", "ista"):
        for init in (None, codes):
            torch.library.opcheck(sparse._encode, (method, x, dictionary, l1, weights, 0.1, False, init, 1e-4, 999))
    for method in ("omp", "iht"):
        torch.library.opcheck(sparse._pursue, (method, x, dictionary, 3, None, 9))
    torch.library.opcheck(sparse._encode_backward, (torch.ones_like(codes), codes, x, dictionary, l1, weights, 0.1))
    for init in (None, codes):
        torch.library.opcheck(sparse._ista, (x, dictionary, l1, step, init, 5, True))
        torch.library.opcheck(sparse._ista_backward, (codes, x, dictionary, l1, step, init, 5, True))


# ------------------------------------------------------------------------- what PyTorch does to functions
def encode_with_gradients(encode, x, dictionary):
    x, dictionary = leaf(x), leaf(dictionary)
    codes = encode(x, dictionary)
    return codes.detach(), *torch.autograd.grad(codes.square().sum(), (x, dictionary))


@solvers
def test_compiled_whole_equals_eager(solver):
    x, dictionary, _ = problem(13, 7, 20, torch.float32)

    def encode(x, dictionary):
        return sparse_encode(x, dictionary, 0.1, solver=solver)

    expected = encode_with_gradients(encode, x, dictionary)
    torch.compiler.reset()
    compiled = torch.compile(encode, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, encode_with_gradients(compiled, x, dictionary), expected))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, encode_with_gradients(encode, x, dictionary), expected))
        gap = duality_gap(x, dictionary, expected[0], 0.1)
    assert torch.equal(gap, duality_gap(x, dictionary, expected[0], 0.1))
    checkpointed = encode_with_gradients(
        lambda *inputs: checkpoint(encode, *inputs, use_reentrant=False), x, dictionary
    )
    assert all(map(torch.equal, checkpointed, expected))
    with torch.inference_mode():
        assert torch.equal(encode(x, dictionary), expected[0])


# ------------------------------------------------------------------------------------ other solvers and outputs
def test_omp_agrees_with_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, dictionary, _ = problem(13, 20, 41)
    expected = linear_model.orthogonal_mp(dictionary.numpy().T, x.numpy().T, n_nonzero_coefs=4).T
    codes = sparse_encode(x, dictionary, solver="omp", n_nonzero=4)
    torch.testing.assert_close(codes, torch.from_numpy(expected.copy()), rtol=0, atol=1e-9)


def test_iht_lowers_the_error_at_fixed_sparsity():
    x, dictionary, _ = problem(13, 20, 41)
    errors = []
    for steps in (1, 5, 50):
        codes = sparse_encode(x, dictionary, solver="iht", n_nonzero=4, max_iter=steps)
        assert ((codes != 0).sum(1) <= 4).all()
        errors.append((x - codes @ dictionary).square().sum(1))
    assert (errors[1] <= errors[0] + 1e-12).all()
    assert (errors[2] <= errors[1] + 1e-12).all()


def test_gradient_of_matching_pursuit():
    x, dictionary, _ = problem(2, 5, 6)
    assert gradcheck(lambda x, a: sparse_encode(x, a, solver="omp", n_nonzero=3), (leaf(x), leaf(dictionary)))


def test_sparse_output():
    x, dictionary, _ = problem(5000, 5, 9, torch.float32)
    dense, info = sparse_encode(x, dictionary, 0.2, return_info=True)
    csr, csr_info = sparse_encode(x, dictionary, 0.2, return_info=True, sparse_output=True)
    assert csr.layout == torch.sparse_csr
    assert torch.equal(csr.to_dense(), dense)
    assert torch.equal(csr_info.iterations, info.iterations)


# ------------------------------------------------------------------------------------------------------- errors
def test_errors_name_the_argument():
    x, dictionary, _ = problem(5, 7, 9, torch.float32)
    nan = x.clone()
    nan[2, 3] = math.nan
    wrong = {
        r"x: expected shape \(samples, features\), got \(7,\)": lambda: sparse_encode(x[0], dictionary, 0.1),
        r"dictionary: expected shape \(atoms, features\) with the 7 features of x, got \(9, 6\)": lambda: sparse_encode(
            x, dictionary[:, 1:], 0.1
        ),
        "l1: expected a finite number above 0, got 0": lambda: sparse_encode(x, dictionary, 0),
        "l1: expected a finite number above 0, got -1": lambda: ista(x, dictionary, -1),
        r"l1: expected a number or shape \(samples,\) = \(5,\), got \(4,\)": lambda: sparse_encode(
            x, dictionary, torch.ones(4)
        ),
        "l1: expected finite numbers above 0, got -1 at least": lambda: sparse_encode(x, dictionary, -torch.ones(5)),
        "l1: expected a number for solver 'auto', got None": lambda: sparse_encode(x, dictionary),
        "l1: expected None for solver 'omp', got 0.1": lambda: sparse_encode(x, dictionary, 0.1, solver="omp"),
        "l2: expected a finite number of at least 0, got -1": lambda: sparse_encode(x, dictionary, 0.1, l2=-1),
        r"weights: expected shape \(atoms,\) = \(9,\), got \(8,\)": lambda: sparse_encode(
            x, dictionary, 0.1, weights=torch.ones(8)
        ),
        "weights: expected finite numbers above 0, got 0 at least": lambda: sparse_encode(
            x, dictionary, 0.1, weights=torch.zeros(9)
        ),
        r"init: expected shape \(samples, atoms\) = \(5, 9\), got \(5, 7\)": lambda: sparse_encode(
            x, dictionary, 0.1, init=x
        ),
        "solver: expected one of 'auto', .*, got 'lars'": lambda: sparse_encode(x, dictionary, 0.1, solver="lars"),
        "tol: expected at least 3e-06, the smallest relative gap of torch.float32, got 1e-08": lambda: sparse_encode(
            x, dictionary, 0.1, tol=1e-8
        ),
        "max_iter: expected at least 1, got 0": lambda: sparse_encode(x, dictionary, 0.1, max_iter=0),
        "n_nonzero: expected 1 to 7, got 8": lambda: sparse_encode(x, dictionary, solver="omp", n_nonzero=8),
        "n_nonzero: expected None for solver 'cd', got 3": lambda: sparse_encode(
            x, dictionary, 0.1, solver="cd", n_nonzero=3
        ),
        "positive: not for solvers": lambda: sparse_encode(x, dictionary, solver="iht", n_nonzero=3, positive=True),
        "x: expected finite numbers, got nan or inf": lambda: sparse_encode(nan, dictionary, 0.1),
        r"x: expected rows of finite norm, got numbers up to 1e\+30": lambda: sparse_encode(
            torch.full_like(x, 1e30), dictionary, 0.1
        ),
        "step: expected a finite number above 0, got 0": lambda: ista(x, dictionary, 0.1, step=0),
        "max_iter: expected at least 0, got -1": lambda: ista(x, dictionary, 0.1, max_iter=-1),
        "threshold: expected at least 0, got -1": lambda: soft_threshold(x, -1),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
    for message, call in {
        "x: expected float32, float64, bfloat16 or float16, got torch.int64": lambda: sparse_encode(
            x.long(), dictionary, 0.1
        ),
        "dictionary: expected torch.float32 as x, got torch.float64": lambda: sparse_encode(
            x, dictionary.double(), 0.1
        ),
    }.items():
        with pytest.raises(TypeError, match=message):
            call()


def test_a_normal_call_warns_of_nothing():
    x, dictionary, _ = problem(33, 20, 41, torch.float32)
    with warnings.catch_warnings(action="error"):
        sparse_encode(x, dictionary, 0.1)
