"""Sphinx: the repository's documents as they lie there, and what the package says of itself, docstrings and --help."""

import importlib
import inspect
import os
import re
from itertools import groupby
from typing import Any

from sphinx.application import Sphinx

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
docs/mixtures
docs/numerics
docs/speed
Benchmarks <bench/results/README>
Variance of gradient estimators <bench/results/estimator_variance>
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


def api(module: str, families: bool) -> str:
    """Return the public names of a module, from their docstrings; in families, each under the module that has it."""
    names = importlib.import_module(module)

    def home(name: str) -> str:
        return getattr(names, name).__module__ if families else module

    lines = []
    for source, members in groupby(sorted(names.__all__, key=lambda name: (home(name), name)), home):
        lines += [f"## {source.rpartition('.')[2]}"] * families
        lines += ["```{eval-rst}", f".. automodule:: {source}"]
        for name in members:
            value = getattr(names, name)
            public = ".".join(getattr(value, "__module__", module).split(".")[:2])
            if not families and public != module:
                lines += ["", f"Also here: :class:`{public}.{name}`.", ""]
                continue
            kind = "class" if inspect.isclass(value) else "function" if callable(value) else "data"
            lines += ["", f".. auto{kind}:: {module}.{name}"]
            lines += ["   :members:", "   :inherited-members:"] * (kind == "class")
        lines += ["```"]
    return "\n".join(lines)


def commands() -> str:
    """Return the help of the command and of each of its own."""
    parser, commands = cli._parsers()
    named = [("", parser), *((f"## {name}\n", command) for name, command in commands.items())]
    return "\n".join(f"{heading}```text\n{command.format_help()}\n```" for heading, command in named)


def expand(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the reference where a page asks for it, and hang the contents on the README, which shows none as a file."""
    text = source[0] + CONTENTS if docname == root_doc else source[0]
    text = re.sub(r"^```\{api\} (\S+)( families)?\n```$", lambda m: api(m[1], bool(m[2])), text, flags=re.M)
    source[0] = re.sub(r"^```\{commands\}\n```$", lambda _: commands(), text, flags=re.M)


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
    app.connect("source-read", expand)
    app.connect("autodoc-process-docstring", as_written, priority=400)  # before napoleon reads the sections
    app.connect("autodoc-skip-member", without_machinery)
