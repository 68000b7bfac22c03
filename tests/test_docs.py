"""What the documents show works: their Python runs, their commands exist, their figures are the measured ones."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench import tables
from fastvae import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md")


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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_runs(document: str, tmp_path: Path) -> None:
    found = blocks(document, "python")
    assert found
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
        kinds = re.findall(r"^```(\w*)$", (ROOT / document).read_text(), re.M)
        assert set(kinds[::2]) <= {"python", "sh"}, document
        assert set(kinds[1::2]) == {""}, document


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
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_measured_figures_are_those_of_the_result_files() -> None:
    text = (ROOT / "README.md").read_text()
    assert tables.renewed(text) == text, "run: python -m bench.tables --write README.md"
    assert (tables.RESULTS / "README.md").read_text() == tables.report(tables.read())
