"""Settings of the documentation: ``sphinx-build --fail-on-warning --keep-going docs build/docs``."""

from __future__ import annotations

import re
from typing import Any

import odysseus_kernels

project = "odysseus_kernels"
author = "The odysseus_kernels authors"
project_copyright = "The odysseus_kernels authors, Apache-2.0"
version = release = odysseus_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = f"odysseus_kernels {release}"
html_show_sphinx = False
smartquotes = False  # shapes have three dots

# Headings have GitHub's names, so that links between pages lead to the same place there.
myst_heading_anchors = 4
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100

_FORMULA = re.compile(r"[a-z][a-z ]*: {2,}\S")


def show_formulas(app: Any, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Operators' docstrings line up what they compute, one line for each gradient: it is shown as it stands."""
    paragraphs = "\n".join(lines).split("\n\n")
    for index, paragraph in enumerate(paragraphs):
        if _FORMULA.match(paragraph):
            indented = "\n".join(f"    {line}" for line in paragraph.replace("``", "").split("\n"))
            paragraphs[index] = f"::\n\n{indented}"
    lines[:] = "\n\n".join(paragraphs).split("\n")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    # Before napoleon, which would see a section where a line ends with a colon.
    app.connect("autodoc-process-docstring", show_formulas, priority=100)
