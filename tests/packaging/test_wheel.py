"""The sdist and the wheel built from it, installed where nothing else of this project can be imported.

The builds are not isolated: an isolated one fetches its tools from the package index, which takes longer than the build
and is what ``make`` did a moment ago, for the editable install these tests run in. ``make slow`` has the isolated one.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EVERY_FUNCTION = """
import importlib.util
import pathlib
import sys

import torch

import fastvae
from fastvae import functional as F

home = pathlib.Path(fastvae.__file__).parent
assert home.is_relative_to(sys.prefix), home
assert home.joinpath("py.typed").exists()
kernels = importlib.util.find_spec("fastvae.kernels")
assert pathlib.Path(kernels.origin).parent == home / "kernels", kernels
assert importlib.util.find_spec("kernels") is None

mean, log_var = torch.zeros(3, 4), torch.zeros(3, 4)
z, kl = F.gaussian_sample_kl(mean, log_var)
assert z.shape == (3, 4) and z.std() > 0 and kl.tolist() == [0, 0, 0]
assert F.gaussian_kl(mean + 1, log_var).tolist() == [2, 2, 2]
loss = F.linear_cross_entropy(torch.zeros(3, 4), torch.ones(8, 4), torch.tensor([0, 1, 7]))
torch.testing.assert_close(loss, torch.tensor(8.0).log())
bag = F.bag_of_words_loss(torch.zeros(3, 4), torch.ones(8, 4), torch.tensor([[0, 1, 7]] * 3))
torch.testing.assert_close(bag, 3 * loss)
tokens, states = torch.tensor([[2, 1, 3]]), torch.zeros(1, 5)
weights = torch.randn(6, 4), torch.randn(20, 7), torch.randn(20, 5), torch.zeros(20)
hidden, h, c = F.lstm_decode(tokens, torch.randn(1, 3), states, states, *weights)
assert hidden.shape == (1, 3, 5) and torch.equal(hidden[:, -1], h) and c.abs().sum() > 0
assert torch.equal(F.lstm(torch.zeros(1, 3, 7), states, states, *weights[1:])[0], torch.zeros(1, 3, 5))
norms = torch.ones(20), torch.ones(20), torch.ones(2, 5)
normed = F.layer_norm_lstm_decode(tokens, torch.randn(1, 3), states, states, *weights, *norms)
assert normed[0].shape == (1, 3, 5) and torch.equal(normed[0][:, -1], normed[1])
assert F.layer_norm_lstm(torch.zeros(1, 3, 7), states, states, *weights[1:], *norms)[0].shape == (1, 3, 5)
weights = torch.randn(15, 7), torch.randn(15, 5), torch.zeros(15), torch.zeros(15)
hidden, h = F.gru_decode(tokens, torch.randn(1, 3), states, torch.randn(6, 4), *weights)
assert hidden.shape == (1, 3, 5) and torch.equal(hidden[:, -1], h) and h.abs().sum() > 0
assert torch.equal(F.gru(torch.zeros(1, 3, 7), states, *weights)[0], torch.zeros(1, 3, 5))
x, atoms = torch.tensor([[3.0, 0.5]]), torch.eye(2)
assert F.soft_threshold(x, 1.0).tolist() == [[2, 0]]
codes = F.sparse_encode(x, atoms, 1.0)
torch.testing.assert_close(codes, torch.tensor([[2.0, 0.0]]))
for run in (F.ista, F.fista):
    torch.testing.assert_close(run(x, atoms, 1.0), codes, rtol=1e-3, atol=1e-3)
assert F.ista_step(torch.zeros(1, 2), x, atoms, 1.0, step=1.0).tolist() == [[2, 0]]
torch.testing.assert_close(F.sparse_value(x, atoms, 1.0), torch.tensor([2.625]))
assert F.duality_gap(x, atoms, codes, 1.0) < 1e-3 and F.kkt_violation(x, atoms, codes, 1.0) < 1e-1
assert F.lambda_max(x, atoms).tolist() == [3]
torch.testing.assert_close(F.dictionary_update(atoms, codes.T @ codes, codes.T @ x)[1], atoms[1])
values, indices = F.top_k_encode(x, atoms, k=1)
assert (values.tolist(), indices.tolist()) == ([[3]], [[0]])
assert F.top_k_decode(values, indices, atoms).tolist() == [[3, 0]]
zeros, target, ln2 = torch.zeros(3, 4), torch.full((3, 4), 0.5), torch.tensor(2.0).log()
torch.testing.assert_close(F.bernoulli_nll(zeros, target), (4 * ln2).expand(3))
torch.testing.assert_close(F.gaussian_nll(zeros, zeros, 0.0), torch.tensor(6.283185307).log().expand(3) * 2)
z, kl = F.full_gaussian_sample_kl(mean, log_var, torch.zeros(3, 6), seed=torch.tensor([1]))
assert torch.equal(z, F.gaussian_sample_kl(mean, log_var, seed=torch.tensor([1]))[0]) and kl.abs().max() < 1e-6
assert torch.equal(F.scale_tril(mean, torch.zeros(3, 6)), torch.eye(4).expand(3, 4, 4))
z, log_ratio = F.gaussian_sample_log_ratio(mean, log_var, 5)
assert z.shape == (5, 3, 4) and log_ratio.abs().max() < 1e-5
torch.testing.assert_close(F.importance_weighted_bound(log_ratio + 2, log_ratio), torch.full((3,), 2.0))
sample, kl = F.gumbel_softmax_sample_kl(zeros, hard=True)
assert sample.sum(1).tolist() == [1, 1, 1] and kl.abs().max() < 1e-6 and F.categorical_kl(zeros).abs().max() < 1e-6
z, kl, *_ = F.gaussian_head(target, torch.zeros(8, 4), torch.zeros(8))
assert z.shape == (3, 4) and kl.abs().max() < 1e-6
assert F.corrupt(target, "masking", 1.0).tolist() == zeros.tolist()
assert F.corrupted_linear(target, torch.ones(2, 4), torch.ones(2), "masking", 1.0).tolist() == [[1, 1]] * 3
density = F.mixture_log_density(z, mean[:1], log_var[:1])
torch.testing.assert_close(density, torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1))
assert abs(F.mutual_information(mean, log_var)) < 1e-5
terms = F.mixture_kl(mean[:, None], log_var[:, None], zeros[:, None, :2], mean[None, :2], log_var[None, :2])
assert max(t.abs().max() for t in terms) < 1e-6
terms = F.categorical_mixture_kl(zeros[:, None], zeros[:, None, :2], zeros[None, :2])
assert max(t.abs().max() for t in terms) < 1e-6
called = {"bag_of_words_loss", "bernoulli_nll", "categorical_kl", "categorical_mixture_kl", "corrupt",
          "corrupted_linear", "dictionary_update", "duality_gap", "fista", "full_gaussian_sample_kl",
          "gaussian_head", "gaussian_kl", "gaussian_nll", "gaussian_sample_kl", "gaussian_sample_log_ratio", "gru",
          "gru_decode",
          "gumbel_softmax_sample_kl", "importance_weighted_bound", "ista", "ista_step", "kkt_violation", "lambda_max",
          "layer_norm_lstm", "layer_norm_lstm_decode", "linear_cross_entropy", "lstm", "lstm_decode", "mixture_kl",
          "mixture_log_density", "mutual_information", "scale_tril", "soft_threshold", "sparse_encode",
          "sparse_value", "top_k_decode", "top_k_encode"}
assert set(F.__all__) == called, "call it here"
"""


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    # Built and run with the tools of this interpreter's environment, whether or not it is activated.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FASTVAE_", "PYTHON"))}
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | {"PATH": path} | variables,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished


def build(source: Path, out: Path, *options: str, **variables: str) -> Path:
    run(sys.executable, "-m", "build", *options, "--outdir", out, source, cwd=out.parent, **variables)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: a build leaves its traces in the tree it runs in, and other tests read this one.
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    return build(folder / "source", folder / "out", "--no-isolation", "--sdist")


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(unpacked, tmp_path_factory.mktemp("wheel") / "out", "--no-isolation", "--wheel")


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel into a new environment in `folder` that borrows torch; return its bin folder."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-index", "--no-deps", "--quiet", wheel, cwd=folder.parent)
    # Python reads no .pth file in a folder that a .pth file names: the editable install of fastvae there stays out.
    ours = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    Path(ours, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_sdist_holds_what_a_build_needs(unpacked: Path) -> None:
    for needed in ("LICENSE", "README.md", "setup.py", "fastvae/py.typed"):
        assert (unpacked / needed).is_file(), needed
    for folder, pattern in (("csrc", "*.cpp"), ("csrc", "*.h"), ("csrc", "CMakeLists.txt"), ("kernels", "*.py")):
        names = {path.name for path in (ROOT / folder).glob(pattern)}
        assert names == {path.name for path in (unpacked / folder).glob(pattern)}
        assert names


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastvae").rglob("*.py")}
    modules |= {f"fastvae/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert modules <= names
    others = {name for name in names - modules if ".dist-info/" not in name}
    core = {name for name in others if name.startswith("fastvae/_C.")}
    assert len(core) == 1
    data = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastvae").rglob("*.yaml")}
    assert others - core == {"fastvae/py.typed"} | data
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    scripts = install(wheel, tmp_path / "clean")
    finished = run(scripts / "python", "-W", "error::UserWarning", "-c", EVERY_FUNCTION, cwd=tmp_path)
    assert finished.stderr == ""
    info = run(scripts / "fastvae", "info", cwd=tmp_path)
    served = [line.split() for line in info.stdout.splitlines() if " cpu " in line]
    compiled = {line[0] for line in served if "C++" in line}
    assert {"gaussian_sample_kl", "lstm_decode", "sparse_encode"} <= compiled, info.stdout


def test_without_a_compiler_the_reference_serves_and_says_so_once(unpacked: Path, tmp_path: Path) -> None:
    environment = {"FASTVAE_BUILD_CPU": "0", "CXX": "/no/compiler/here"}
    wheel = build(unpacked, tmp_path / "out", "--no-isolation", "--wheel", **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "/_C." in name]
    scripts = install(wheel, tmp_path / "plain")
    finished = run(scripts / "python", "-W", "always", "-c", EVERY_FUNCTION, cwd=tmp_path)
    assert finished.stderr.count("fastvae:") == 1, finished.stderr
    assert "reference path" in finished.stderr
    assert "FASTVAE_BUILD_CPU" in finished.stderr or "compiler" in finished.stderr
    info = run(scripts / "fastvae", "info", cwd=tmp_path)
    served = [line.split() for line in info.stdout.splitlines() if " cpu " in line]
    assert served
    assert all("reference" in line for line in served), info.stdout


def test_a_failed_build_says_what_is_needed(unpacked: Path, tmp_path: Path) -> None:
    environment = os.environ | {"CXX": "/no/compiler/here"}
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, unpacked]
    finished = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert finished.returncode != 0
    assert "needs a C++17 compiler" in finished.stdout + finished.stderr
    assert "FASTVAE_BUILD_CPU=0" in finished.stdout + finished.stderr


@pytest.mark.slow
def test_isolated_build(unpacked: Path, tmp_path: Path) -> None:
    wheel = build(unpacked, tmp_path / "out", "--wheel")  # in an environment of its own, as pip does
    assert [name for name in zipfile.ZipFile(wheel).namelist() if "/_C." in name]
