"""docs/fallbacks.md names files that exist, quotes texts that are said, and knows every file that warns."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "odysseus_kernels"
PAGE = ROOT / "docs" / "fallbacks.md"
COLUMNS = ["what", "when", "what is said", "instead", "module"]
_QUOTED = re.compile(r'"([^"]+)"')
_CODE = re.compile(r"`([^`]*)`")


class Row(NamedTuple):
    """A row of the page: its line, its quotations, and the files that it names."""

    line: int
    quotations: list[str]
    files: list[Path]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _file(name: str) -> Path:
    inside = PACKAGE / name
    return inside if inside.exists() else ROOT / name


def page_rows() -> list[Row]:
    """Rows of all tables; quotations are what stands in double quotes outside of code."""
    rows = []
    for number, line in enumerate(PAGE.read_text().splitlines(), 1):
        if not line.startswith("|") or line.startswith("|---"):
            continue
        cells = _cells(line)
        if cells == COLUMNS:
            continue
        assert len(cells) == len(COLUMNS), f"{PAGE.name}:{number}: expected {len(COLUMNS)} cells, got {len(cells)}"
        what, when, said, _, module = cells
        assert what and when and said and module, f"{PAGE.name}:{number}: an empty cell"
        # Errors that belong to a condition are quoted beside it.
        quotations = [text for cell in (when, said) for text in _QUOTED.findall(_CODE.sub("", cell))]
        rows.append(Row(number, quotations, [_file(name) for name in _CODE.findall(module)]))
    return rows


@functools.cache
def texts_of(path: Path) -> list[str]:
    """What a file can say: its strings, joined as the language joins them, with ``…`` for what is put in."""
    source = path.read_text()
    if path.suffix != ".py":
        # Neighbouring literals of C++ are one, and what stands between two of them among arguments is put in.
        return [re.sub(r'"\s*,[^",;]+,\s*"', "…", re.sub(r'"\s*\n\s*"', "", source))]
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            found.append("".join(map(str, parts)))
    return found


def says(texts: list[str], quotation: str) -> bool:
    """Whether one of the texts has all parts of a quotation, in order and not far apart."""
    pattern = re.compile(".{0,200}?".join(re.escape(part.strip()) for part in quotation.split("…")), re.DOTALL)
    return any(pattern.search(text) for text in texts)


ROWS = page_rows()


def test_the_page_has_rows() -> None:
    assert len(ROWS) > 100
    assert sum(bool(row.quotations) for row in ROWS) > 50


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"line{row.line}")
def test_files_exist_and_say_what_is_quoted(row: Row) -> None:
    assert row.files and all(path.is_file() for path in row.files), row.files
    texts = [text for path in row.files for text in texts_of(path)]
    missing = [quotation for quotation in row.quotations if not says(texts, quotation)]
    assert not missing, f"{PAGE.name}:{row.line}: nowhere in {[path.name for path in row.files]}: {missing}"


def test_a_quotation_that_nobody_says_is_found() -> None:
    texts = texts_of(PACKAGE / "comm" / "group_transports.py")
    assert says(texts, "expected … tensors as in earlier calls")
    assert not says(texts, "expected … tensors as in later calls")


def _warns(path: Path) -> bool:
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    names = {(f.value.id, f.attr) for f in calls if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name)}
    return bool(names & {("warnings", "warn"), ("logger", "warning")})


def test_every_file_that_warns_is_named() -> None:
    warning = {path for path in PACKAGE.rglob("*.py") if _warns(path)}
    assert len(warning) >= 5
    unnamed = warning - {path for row in ROWS for path in row.files}
    assert not unnamed, f"{PAGE.name} does not name {sorted(path.relative_to(ROOT).as_posix() for path in unnamed)}"
