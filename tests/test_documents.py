"""README and docs: every block of code is executed, every link leads somewhere, and every public name has a page.

A block of Python runs on two ranks, with names of its own and those that ``document_cases.Given`` gives to all: what
a reader would have by then (a small ``model``, a ``batch``, a ``mesh``).  Every command is read by the parser of the
program that it calls.  A comment right before a block says otherwise:

=================================== =================================================================================
comment                             what it means
=================================== =================================================================================
``<!-- ranks: 4 -->``               it runs on four ranks
``<!-- continues -->``              it goes on where the block before it has ended
``<!-- shown by: tests/x.py -->``   that test, or ``tests/x.py::test_name`` in it, executes it
``<!-- not run: reason -->``        it cannot be run here; the reasons are :data:`REASONS`
=================================== =================================================================================
"""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from pathlib import Path
from typing import NoReturn

import document_cases as cases
import pytest
from documents import ROOT, Block, blocks_of, chapter_pages, links_of, lost_links

import odysseus_kernels as ody
from odysseus_kernels import cli
from odysseus_kernels.testing.spawn import RankPools

REASONS = {
    "installs packages": r"\bpip install\b",
    "needs a GPU": r"cuda|run_gpu",
    "needs root": r"\bsudo\b",
    "needs your script": r"script\.py:build",
    "takes minutes": r"run_tests|run_example|benchmarks",
}
"""Why a block is not run, and what it must have in it, so that no other block says so."""

PAGES = chapter_pages()
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = [block for block in BLOCKS if block.language == "bash"]
RUN_HERE = [block for block in PYTHON if block.mark not in ("not run", "shown by")]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def by_place(block: Block) -> str:
    return block.place


def commands_of(block: Block) -> list[list[str]]:
    """The words of each line, without what begins or pays for the process."""
    found = []
    for line in block.text.splitlines():
        words = [word for word in shlex.split(line, comments=True) if word not in ("sudo", "$(which python)", "python")]
        if words[:1] == ["torchrun"]:
            at = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
            assert set(words[1:at:2]) <= {"--nproc-per-node", "--nnodes"}, line
            words = words[at:]
        if words:
            found.append(words)
    return found


def test_there_are_blocks_of_all_kinds() -> None:
    assert len(RUN_HERE) > 20
    assert len(SHELL) > 8
    directives = {"{eval-rst}", "{include} ../README.md", "{toctree}"}
    assert {block.language for block in BLOCKS} <= {"python", "bash"} | directives


@pytest.mark.parametrize("block", RUN_HERE, ids=by_place)
def test_python_runs(ranks: RankPools, block: Block, tmp_path: Path) -> None:
    if block.mark == "":
        world = 2
    else:
        assert block.mark in ("ranks", "continues"), block.place
        world = int(block.value or 2)
    counts = ranks(world).run(cases.run, block.place, block.text, str(tmp_path))
    assert len(set(counts)) == 1 and counts[0] > 0


def test_a_wrong_block_fails(ranks: RankPools, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"failed on 2 of 2 ranks(?s:.*)page\.md:7(?s:.*)name 'nowhere' is not defined"):
        ranks(2).run(cases.run, "page.md:7", "print(ody.OverlapConfig().mode)\nnowhere", str(tmp_path))


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.mark in ("not run", "shown by")], ids=by_place)
def test_what_is_not_run_says_why(block: Block) -> None:
    if block.mark == "not run":
        assert block.value in REASONS, f"{block.place}: expected one of {list(REASONS)}, got {block.value!r}"
        assert re.search(REASONS[block.value], block.text), f"{block.place}: what of it {block.value}?"
    else:
        path, _, name = block.value.partition("::")
        source = (ROOT / path).read_text()
        assert not name or re.search(rf"^def {name}\(", source, re.MULTILINE), f"{block.place}: {path} has no {name}"
        if block.language == "bash":
            named = {Path(word).stem for words in commands_of(block) for word in words if word.endswith(".py")}
            named |= {words[2] for words in commands_of(block) if words[:2] == ["-m", "odysseus_kernels"]}
            assert named and all(word in source for word in named), f"{block.place}: {path} does not run {named}"
    if block.language == "python":
        public = {node.attr for node in ast.walk(ast.parse(block.text)) if _is_of_ody(node)}
        assert public <= set(ody.__all__), f"{block.place}: {public - set(ody.__all__)} are not public"


def _is_of_ody(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ody"


class _Parsed(BaseException):
    """Ends a program whose arguments were accepted."""


def _read_and_end(parser: argparse.ArgumentParser, *arguments: object) -> NoReturn:
    _, unknown = parser.parse_known_args(*arguments)
    if unknown:
        parser.error(f"unrecognized arguments: {unknown}")
    raise _Parsed


@pytest.mark.parametrize("block", SHELL, ids=by_place)
def test_programs_accept_their_arguments(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in commands_of(block):
        if words[0] == "pip":
            _check_installation(words)
        elif words[0] == "bash":
            script = (ROOT / words[1]).read_text()
            assert all(word in script for word in words[2:] if word.startswith("--")), words
        else:
            _check_program(words, monkeypatch)


def test_a_wrong_argument_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _check_program(["-m", "odysseus_kernels", "doctor", "--timeuot", "3"], monkeypatch)
    assert "unrecognized arguments" in capsys.readouterr().err


def _check_program(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of modules that are imported already
        patch.setattr(argparse.ArgumentParser, "parse_args", _read_and_end)
        patch.chdir(ROOT)
        if words[0] == "-m":
            patch.setattr(sys, "argv", words[1:])
            with pytest.raises(_Parsed):
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            patch.setattr(sys, "argv", words)
            patch.syspath_prepend(str((ROOT / words[0]).parent))
            with pytest.raises(_Parsed):
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def _check_installation(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = (ROOT / "requirements.txt").read_text().split()
    for word in words[2:]:
        if word.startswith(".["):
            assert set(word[2:-1].split(",")) <= extras.keys(), word
        elif "==" in word:
            assert word in pinned, word


@pytest.mark.parametrize("block", [block for block in SHELL if not block.mark], ids=by_place)
def test_commands_run(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands_of(block):
        assert words[:3] == ["-m", "odysseus_kernels", "plan"], f"{block.place}: say which test runs it, or why none"
        assert cli.main(words[2:]) == 0
        assert "llama-3.1-8b" in capsys.readouterr().out
        if "--plot" in words:
            assert (tmp_path / words[words.index("--plot") + 1]).stat().st_size > 10_000


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not lost_links(page)


def test_a_wrong_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `heading`, with marks\n\n[a](#a-heading-with-marks) [b](#b) ![c](c.png)\n\n[d](page.md#d)\n")
    assert lost_links(page) == ["page.md:3: #b", "page.md:3: c.png", "page.md:5: page.md#d"]


def test_every_page_is_in_the_contents() -> None:
    lines = [line for block in blocks_of(ROOT / "docs" / "index.md") for line in block.text.splitlines()]
    listed = [line for line in lines if line and not line.startswith(":")]
    assert set(listed) == {page.stem for page in PAGES} - {"README", "index"}
    assert len(listed) == len(set(listed))
    readme = {target.partition("#")[0] for _, target in links_of(ROOT / "README.md")}
    assert {f"docs/{name}.md" for name in listed} <= readme


def test_every_public_name_is_in_the_reference() -> None:
    directives = re.findall(
        r"^\.\. auto(?:function|class|exception):: ([\w.]+)$",
        "\n".join((ROOT / "docs" / name).read_text() for name in ("operators.md", "reference.md")),
        re.MULTILINE,
    )
    assert sorted(name for name in directives if "." not in name) == sorted(ody.__all__)


def test_the_first_screen() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    first = "\n".join(lines[:40])
    assert "](docs/images/timeline.png)" in first
    source = re.search(r"`(benchmarks/results/[\w./-]+\.json)`", first)
    assert source is not None and (ROOT / source[1]).is_file()
    assert first.count("|---|") and len(lines) < 150
