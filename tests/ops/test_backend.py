"""The backends as a whole: instruction sets, a missing core, what an import loads, what `describe` tells."""

import contextlib
import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, DTYPES, OTHERS, results

import fastvae.functional
from fastvae.ops import backend as backend_module
from fastvae.ops import cross_entropy, gaussian, lstm

HERE = str(Path(__file__).parent)
RUN_CASES = f"import runpy\nrunpy.run_path({HERE + '/cases.py'!r}, run_name='__main__')\n"
# As if there were no core: this process's import of it fails.
WITHOUT_CORE = "import sys; sys.modules['fastvae._C'] = None\n"
SOLVE = """
import sys
import torch
from fastvae.functional import dictionary_update, sparse_encode
results = []
for dtype, tol in ((torch.float32, 3e-6), (torch.float64, 1e-12)):
    random = torch.Generator().manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(57, 33, generator=random)).to(dtype).requires_grad_()
    x = torch.nn.functional.normalize(torch.randn(40, 33, generator=random)).to(dtype)
    codes = sparse_encode(x, dictionary, 0.15, tol=tol)
    (codes ** 3).sum().backward()
    codes = codes.detach()
    renewed = dictionary_update(dictionary.detach(), codes.T @ codes, codes.T @ x)
    results.append((codes, dictionary.grad, renewed))
torch.save(results, sys.argv[2])
"""


def python(*arguments, isa=None):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("FASTVAE_CPU_ISA", None)
    if isa is not None:
        environment["FASTVAE_CPU_ISA"] = isa
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def needs_core():
    if backend_module.CORE is None:
        pytest.skip("the C++ core is not built")
    return backend_module.CORE


def test_core_is_built():
    """The other tests may skip without it; one must not."""
    assert backend_module.CORE is not None, backend_module.CORE_MISSING


def test_the_fixture_switches_backends(backend):
    """What the tests of both backends rest on."""
    arguments = [torch.zeros(2, 3, dtype=torch.int64), torch.tensor([3, 3]), torch.zeros(2, 16)]
    arguments += [torch.zeros(shape) for shape in ((2, 4), (2, 4), (5, 3), (16, 3), (16, 4))]
    saved = torch.ops.fastvae.lstm_decode(*arguments, torch.tensor([1]), 0.0, -1, True)[3:]
    assert [s.numel() for s in saved] == ([96, 24] if backend == "C++" else [0, 0])
    seed, zeros = torch.tensor([1]), torch.zeros(100, 100)
    ours = torch.ops.fastvae.gaussian_sample_kl(zeros, zeros, None, None, seed, None, True)[0]
    reference = gaussian.reference_sample_kl(zeros, zeros, None, None, seed, None, True)[0]
    assert torch.equal(ours, reference) == (backend == "reference")


@pytest.fixture(scope="module")
def run_all(tmp_path_factory):
    """Give every case, what the solvers found and the complaints of a process with one instruction set, or no core."""

    @functools.cache
    def run(isa):
        folder = tmp_path_factory.mktemp(isa or "reference")
        first = f"import fastvae._C as core; assert core.isa() == {isa!r}\n" if isa else WITHOUT_CORE
        paths = [folder / "cases.pt", folder / "solved.pt"]
        process = python("-c", first + RUN_CASES + SOLVE, *map(str, paths), isa=isa)
        assert process.returncode == 0, process.stderr
        return *map(torch.load, paths), process.stderr

    return run


def assert_agrees(ours, expected):
    """Equal up to rounding: a few units of the type, at the size of the largest number."""
    assert ours.keys() == expected.keys() == {(name, dtype) for name in CASES for dtype in DTYPES}
    for case, tensors in expected.items():
        for mine, reference in zip(ours[case], tensors, strict=True):
            assert mine.dtype == reference.dtype, case
            # The noise is float32 for every type: 1e-6.
            tolerance = max(4 * torch.finfo(mine.dtype).eps, 2e-6) * reference.abs().max().item()
            torch.testing.assert_close(mine, reference, rtol=0, atol=tolerance, msg=lambda m, c=case: f"{c}: {m}")


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets_agree_with_the_reference(isa, run_all):
    if isa not in needs_core().isas():
        pytest.skip(f"this machine or build has no {isa}")
    cases, _, complaints = run_all(isa)
    assert complaints == ""
    assert_agrees(cases, run_all(None)[0])


def test_instruction_sets_solve_alike(run_all):
    """Solvers agree with the reference's other method to their tolerance, not to rounding."""
    for isa in needs_core().isas():
        for ours, reference, tolerance in zip(run_all(isa)[1], run_all(None)[1], (3e-4, 1e-9), strict=True):
            for mine, theirs in zip(ours, reference, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance, msg=lambda m, i=isa: f"{i}: {m}")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set elsewhere")
def test_every_instruction_set_is_in_the_build():
    binary = Path(needs_core().__file__).read_bytes()
    assert all(f"{isa}\0".encode() in binary for isa in ("baseline", "avx2", "avx512"))


def test_instruction_set_by_default_is_the_best():
    core = needs_core()
    if "FASTVAE_CPU_ISA" not in os.environ:
        assert core.isa() == core.isas()[-1]
    assert core.isas()[0] == "baseline"
    assert backend_module.cpu_isa() == core.isa()


def test_unknown_instruction_set_is_refused():
    known = ", ".join(needs_core().isas())
    process = python("-c", "import fastvae", isa="AVX2")
    assert process.returncode == 1
    assert f"ImportError: FASTVAE_CPU_ISA: expected one of {known}" in process.stderr
    assert "got 'AVX2'" in process.stderr


def test_without_a_core_all_works_after_one_warning(run_all):
    reference, _, stderr = run_all(None)
    assert stderr.count("Warning") == 1
    assert "CPU ops run on the slower reference path" in stderr
    assert "pip install" in stderr, "the warning says how to get it"
    needs_core()
    assert_agrees({(name, dtype): results(name, dtype) for name in CASES for dtype in DTYPES}, reference)


CHECK_WITHOUT_CORE = """
import warnings; warnings.simplefilter("ignore")
import torch
from fastvae.ops import backend
rows = backend.describe()
assert backend.cpu_isa() is None
assert all(row.backend == "reference" for row in rows if row.device == "cpu"), rows
assert any("C++" in row.reason for row in rows if row.device == "cpu"), rows
from test_cross_entropy import test_opcheck as cross_entropy
from test_gaussian import test_opcheck as gaussian
from test_lstm import test_opcheck as lstm
gaussian(3, "shared", torch.float32)
cross_entropy(torch.bfloat16, True, (True, True))
lstm(torch.float32, 0.5, 2)
"""


def test_references_are_proper_ops_too():
    """Strides and types as promised to the compiler, and autograd inside them also under PyTorch's dispatch modes."""
    path = f"sys.path.insert(0, {HERE!r})\n"
    process = python("-c", WITHOUT_CORE + path + CHECK_WITHOUT_CORE)
    assert process.returncode == 0, process.stderr


def test_import_loads_no_optional_package():
    code = "import sys, fastvae; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    process = python("-c", code)
    loaded = set(process.stdout.split())
    assert {"fastvae", "torch"} <= loaded, process.stderr
    optional = {"lightning", "pytorch_lightning", "rich", "yaml", "matplotlib", "triton", "sklearn", "scipy"}
    optional |= {"onnx", "onnxscript"}
    assert not optional & loaded


def test_describe_covers_every_op_on_both_devices():
    rows = backend_module.describe()
    registered = {
        name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastvae::")
    }
    assert len(registered) >= 7
    assert sorted((row.op, row.device) for row in rows) == sorted(
        (op, device) for op in registered for device in ("cpu", "cuda")
    )
    assert all(row.backend in ("C++", "Triton", "reference") and row.reason for row in rows)
    needs_core()
    products = {"ista_backward", "sparse_pursue"}
    products |= {"top_k_encode", "top_k_encode_backward", "top_k_decode", "top_k_decode_backward"}
    for row in rows:
        if row.device == "cpu":
            assert row.backend == ("reference" if row.op in products else "C++"), row
            assert row.backend == "reference" or backend_module.cpu_isa() in row.reason
    assert "Triton" in {row.backend for row in rows if row.device == "cuda"} or backend_module.TRITON_MISSING


def test_public_functions_are_those_of_the_ops():
    assert set(fastvae.functional.__all__) == {name.partition(" ")[0] for name in CASES} | OTHERS
    assert fastvae.functional.lstm_decode is lstm.lstm_decode
    assert fastvae.functional.linear_cross_entropy is cross_entropy.linear_cross_entropy


def test_ops_that_wait_for_the_host_are_kept_out_of_cuda_graphs():
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
    if unsafe is None:
        pytest.skip("this PyTorch has no such tag")
    marked = {name for name in backend_module._OPS if unsafe in getattr(torch.ops.fastvae, name).default.tags}
    assert marked == {"sparse_encode", "sparse_encode_backward", "sparse_pursue", "generate"}


def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch):
    """Triton takes the current device, which need not be theirs."""
    entered = []

    @contextlib.contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = torch.ones(3)
    assert backend_module._on_its_device(lambda count, tensor: tensor * count)(2, x).tolist() == [2, 2, 2]
    assert entered == [x]
