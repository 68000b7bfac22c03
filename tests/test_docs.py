"""What the documents show works: their Python runs, their commands exist, their figures are the measured ones."""

import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tables
from fastvae import cli

ROOT = Path(__file__).parents[1]
SITE = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *SITE)


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.M | re.S)


def commands(document: str) -> list[list[str]]:
    """Commands of the document's shell blocks, of its indented lines and of its `inline code`."""
    text = (ROOT / document).read_text()
    lines = [line for block in blocks(document, "sh") for line in block.replace("\\\n", "").splitlines()]
    lines += re.findall(r"^    (make .*)$", text, re.M)
    lines += re.findall(
        r"`((?:make|fastvae|python -m bench) [^`]*)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    )
    return [parts for line in lines if (parts := shlex.split(line, comments=True))]


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if blocks(document, "python")])
def test_python_runs(document: str, tmp_path: Path) -> None:
    found = blocks(document, "python")
    # One process for a document, as a reader would go on from block to block, and none of this one's state.
    finished = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", "\n".join(found)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr


def test_no_python_hides_in_another_kind_of_block() -> None:
    for document in DOCUMENTS:
        fences = re.findall(r"^ *```(.*)$", (ROOT / document).read_text(), re.M)
        opened = {kind.split()[0] for kind in fences[::2]}
        assert opened <= (
            {"python", "sh", "text", "{api}", "{commands}", "{eval-rst}"} if document in SITE else {"python", "sh"}
        )
        assert set(fences[1::2]) <= {""}, document


@pytest.mark.parametrize("document", DOCUMENTS)
def test_fastvae_commands_parse(document: str) -> None:
    parser, _ = cli._parsers()
    shown = [command[1:] for command in commands(document) if command[0] == "fastvae"]
    assert shown or document != "README.md"
    for arguments in shown:
        if "--help" in arguments:
            arguments = [argument for argument in arguments if argument != "--help"]
        _, unknown = parser.parse_known_args(arguments)  # a wrong choice or number exits
        assert not unknown, arguments


def test_readme_shows_every_command() -> None:
    shown = {command[1] for command in commands("README.md") if command[0] == "fastvae"}
    assert shown == set(cli._parsers()[1])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_and_modules_exist(document: str) -> None:
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split())
    for command in commands(document):
        words = [word for word in command if "=" not in word]
        if words[0] == "make":
            assert set(words[1:]) <= targets, command
        if "-m" in words and words[words.index("-m") + 1].startswith("bench"):
            module = ROOT / words[words.index("-m") + 1].replace(".", "/")
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), command


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_measured_figures_are_those_of_the_result_files(document: str) -> None:
    text = (ROOT / document).read_text()
    assert tables.renewed(text) == text, f"run: python -m bench.tables --write {document}"


def test_the_report_is_that_of_the_result_files() -> None:
    assert (tables.RESULTS / "README.md").read_text() == tables.report(tables.read())


def test_every_document_with_figures_is_renewed_by_make_bench() -> None:
    renewed = re.search(r"bench.tables --write (.*)", (ROOT / "Makefile").read_text())[1].split()
    assert set(renewed) == {document for document in DOCUMENTS if tables.marked((ROOT / document).read_text())}


@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="needs the extra of `make docs`")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = re.search(r"python (-m sphinx .*) build/docs$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    finished = subprocess.run(
        [sys.executable, *command, "-d", tmp_path / "doctrees", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "site" / "index.html").exists()
    functions = (tmp_path / "site" / "docs" / "api" / "functional.html").read_text()
    assert 'id="fastvae.functional.gaussian_sample_kl"' in functions
    assert "fastvae train" in (tmp_path / "site" / "docs" / "command.html").read_text()


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What `docs/move-your-vae.md` defines: the usual VAE, with the noise of fastvae's stream, and the fused one."""
    names: dict[str, Any] = {"__name__": "page"}
    with contextlib.redirect_stdout(io.StringIO()):
        exec("\n".join(blocks("docs/move-your-vae.md", "python")), names)
    return names


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_moving_a_vae_changes_no_number(page: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    data = 0.8 * torch.rand(784, dtype=dtype).round() + 0.2 * torch.rand(20, 33, 784, dtype=dtype)
    usual, fused = page["UsualVAE"]().to(dtype), page["FusedVAE"]().to(dtype)
    fused.load_state_dict(usual.state_dict())
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in (usual, fused)]
    losses = []
    for step, x in enumerate(data):
        losses.append([])
        for model, optimizer in zip((usual, fused), optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            losses[-1].append(model.loss(x))
            losses[-1][-1].backward()
            optimizer.step()
        torch.testing.assert_close(losses[-1][1], losses[-1][0], rtol=tolerance, atol=0)
        for (name, ours), theirs in zip(fused.named_parameters(), usual.parameters(), strict=True):
            scale = theirs.grad.abs().max().item()
            torch.testing.assert_close(
                ours.grad, theirs.grad, rtol=0, atol=tolerance * scale, msg=lambda m, name=name: f"{name}: {m}"
            )
    assert losses[-1][0] < 0.8 * losses[0][0]  # they did learn


def test_the_model_of_the_page_has_the_same_loss_and_gradients(page: dict[str, Any]) -> None:
    fused, model, x = page["fused"], page["model"], page["x"]
    gradients = []
    for loss in (fused.loss, lambda x: len(x) * model(x).loss):
        fused.zero_grad()
        model.zero_grad()
        torch.manual_seed(1)
        total = loss(x)
        total.backward()
        head = [model.head.linear.weight.grad, model.head.linear.bias.grad]
        if head[0] is None:
            head = [
                torch.cat([getattr(layer, name).grad for layer in (fused.mean, fused.log_var)])
                for name in ("weight", "bias")
            ]
        shared = [p.grad.clone() for part in (fused.encoder, fused.decoder) for p in part.parameters()]
        gradients.append([total.detach(), *head, *shared])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
