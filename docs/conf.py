"""Sphinx: the repository's documents as they lie there, and what the package says of itself, docstrings and --help."""

import importlib
import inspect
import os
import re
from itertools import groupby
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import fastvae
from fastvae import cli

project = html_title = "fastvae"
release = version = fastvae.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_copy_source = False

# The sources begin at the root of the repository: a link from one document to another is the same here and there.
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "bench/results/*.md"]
exclude_patterns = [".*", "build"]
templates_path = ["."]
html_additional_pages = {"index": "index.html"}

myst_heading_anchors = 3
default_role = "code"  # `x` in a docstring
smartquotes = False  # "sum" is a string
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_param = False  # "a, b: ..." stays one entry
napoleon_attr_annotations = False  # the signature has them
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
nitpicky = True
nitpick_ignore_regex = [("py:(class|obj|data|exc)", ".*")]  # the types of signatures

CONTENTS = """
```{toctree}
:hidden:

Home <self>
docs/move-your-vae
docs/sparse-coding
docs/sentence-vae
docs/numerics
Benchmarks <bench/results/README>
```

```{toctree}
:hidden:
:caption: Reference

docs/command
docs/api/functional
docs/api/nn
docs/api/models
docs/api/estimators
docs/api/data
docs/api/training
```

```{toctree}
:hidden:
:caption: Project

CONTRIBUTING
CHANGELOG
```
"""


class Api(SphinxDirective):
    """The public names of a module from their docstrings; with ``:families:`` each under the module that has it."""

    required_arguments = 1
    option_spec = {"families": directives.flag}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:  # noqa: D102
        name = self.arguments[0]
        module = importlib.import_module(name)

        def home(member: str) -> str:
            return getattr(module, member).__module__ if "families" in self.options else name

        lines = []
        for source, members in groupby(sorted(module.__all__, key=lambda m: (home(m), m)), home):
            if source != name:
                lines += [f"## {source.rpartition('.')[2]}"]
            lines += ["```{eval-rst}", f".. automodule:: {source}", ""]
            for member in members:
                value = getattr(module, member)
                kind = "class" if inspect.isclass(value) else "function" if callable(value) else "data"
                lines += [f".. auto{kind}:: {name}.{member}"]
                lines += ["   :members:", "   :inherited-members:"] * (kind == "class")
            lines += ["```"]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


class Commands(SphinxDirective):
    """The help of the command and of each of its own."""

    def run(self) -> list[nodes.Node]:  # noqa: D102
        parser, commands = cli._parsers()
        lines = ["```text", parser.format_help(), "```"]
        for name, command in commands.items():
            lines += [f"## {name}", "```text", command.format_help(), "```"]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """Hang the contents on the README, which shows none where it is read as a file."""
    if docname == root_doc:
        source[0] += CONTENTS


def as_written(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Let a docstring mean what it shows: |x| and x_ are themselves, an indented paragraph is a formula."""
    text: list[str] = []
    last, formula = "", False  # the last line that was not empty
    for line in lines:
        if line.startswith("    ") and text and not text[-1].strip() and not last.startswith(" "):
            text += ["::", ""]
            formula = True
        elif line.strip() and not line.startswith(" "):
            formula = False
        text.append(line if formula else re.sub(r"(`+[^`]*`+)|([|*]|_(?![\w:]))", _escaped, line))
        if line == "Returns:":
            text.append(r"    \ ")  # nothing, so that words before a colon are not taken for a type
        last = line if line.strip() else last
    lines[:] = text


def _escaped(match: re.Match[str]) -> str:
    return match[1] or "\\" + match[2]


def without_machinery(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what others document (their methods, and ours that they call), and the fields of named tuples."""
    function = getattr(obj, "fget", obj)
    if not str(getattr(function, "__module__", "")).startswith("fastvae"):
        return True
    if name == "forward" or "." not in function.__qualname__:
        return None
    owner = getattr(importlib.import_module(function.__module__), function.__qualname__.partition(".")[0])
    others = [base for base in owner.__mro__ if base.__module__.startswith(("torch.", "lightning."))]
    return True if any(name in vars(base) for base in others) else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    os.environ["COLUMNS"] = "100"  # the width of --help
    app.add_directive("api", Api)
    app.add_directive("commands", Commands)
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", as_written, priority=400)  # before napoleon reads the sections
    app.connect("autodoc-skip-member", without_machinery)
